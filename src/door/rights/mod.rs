//! Who calls, and what each may do.
//!
//! - [`table`]: the right that each call needs; what does not stand there is refused;
//! - [`grants`]: roles, and rights to parts of the state;
//! - [`credentials`]: the files that say to whom what is granted ([`file`], [`jwt`]), and what of them is [`in_force`];
//! - [`signing`]: tokens that are made;
//! - [`principal`]: a caller that was identified, and when that ends; [`usage`]: what it takes at a time;
//! - [`audit`]: who has done what, and who was refused, for the log.
//!
//! The entrance of the port identifies each request and asks the table. Where the right depends on what is asked for, the door
//! asks the guest what a request [touches](super::Guest::touches), before anything is done or passed on.
//!
//! # Promises
//!
//! - Without a credential that is valid nothing is answered, changed or told, but to probes and what is granted to anonymous callers.
//! - All refusals are alike: that a credential is wrong, has expired or is missing is not told apart, nor whether what was asked for exists.
//! - A stream ends when the credential that it was begun with expires, and some seconds after that is withdrawn.
//! - Where there are no credentials everybody may do everything.
//!
//! No token or key is shown by `Debug`, in the log, in metrics or in an error.

pub(crate) mod audit;
mod credentials;
mod file;
pub(crate) mod grants;
mod hex;
mod in_force;
mod jwt;
mod principal;
pub(crate) mod signing;
pub(crate) mod table;
#[cfg(test)]
mod tests;
mod usage;

use ring::digest::{SHA256, digest};

pub use credentials::{ClientAuth, Credentials, CredentialsError};
pub(crate) use in_force::{MAX_TOKEN_BYTES, PresentedCredential};
pub(crate) use principal::Principal;
pub(crate) use usage::CountedCall;

/// The hash of `bytes` that stands in files.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest(&SHA256, bytes).as_ref().try_into().expect("invariant: SHA-256 has 32 bytes")
}

/// The same in digits.
pub fn token_hash(token: &str) -> String {
    hex::encode(&sha256(token.as_bytes()))
}
