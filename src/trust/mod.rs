//! Who is at the other end of a connection, and that nobody reads along.
//!
//! A connection is carried by a [`Wire`](crate::wire::Wire). This room makes a secured wire of a plain one:
//!
//! - [`wire`]: a secured wire that shakes hands when it is first read or written, the bounds of that, and how it ends later;
//! - [`peers`]: members prove to each other who they are, by certificates or by a shared secret;
//! - [`material`]: what the two ends of a connection between members present and believe, made from files;
//! - [`challenge`]: the proof that the other end knows the secret;
//! - [`verify`]: which certificates a member believes;
//! - [`port`]: TLS at the ports that clients use;
//! - [`client`]: TLS of a client;
//! - [`certificates`], [`pem`]: files, and what stands in a certificate; [`issue`]: certificates are made.
//!
//! # Promises
//!
//! - TLS 1.3 alone, with ring. There is no resumption and no early data, so each connection proves everything anew.
//! - The accept loop never waits for a handshake. A handshake has [a time](HANDSHAKE_PATIENCE) and [a number of
//!   bytes](HANDSHAKE_BYTES). One that fails costs its connection, a line of the log at `debug`, and a count.
//! - Nothing that a caller says is looked at before the caller has proven itself.
//! - Files are read again when they change. Files that cannot be used change nothing: what was in force stays in force.
//! - A connection ends within a minute once nothing in force vouches for its other end any more.
//!
//! What is promised to operators, and what is not: `docs/SECURITY.md`.

#[cfg(feature = "peers")]
pub(crate) mod certificates;
#[cfg(feature = "peers")]
mod challenge;
#[cfg(feature = "client")]
pub(crate) mod client;
#[cfg(feature = "peers")]
pub(crate) mod issue;
#[cfg(feature = "peers")]
mod material;
#[cfg(feature = "peers")]
pub(crate) mod peers;
mod pem;
#[cfg(feature = "peers")]
pub(crate) mod port;
#[cfg(feature = "peers")]
pub(crate) mod settings;
#[cfg(feature = "peers")]
mod verify;
#[cfg(feature = "peers")]
pub(crate) mod wire;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::CryptoProvider;

/// How long a handshake may take.
pub(crate) const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes that are read of a caller before its handshake is complete. A chain of three certificates takes some 4 KiB.
pub(crate) const HANDSHAKE_BYTES: usize = 20 * 1024;

/// Why credentials cannot be used. Every message says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// A file cannot be read.
    #[error("cannot read {setting} {}: {reason}", path.display())]
    Unreadable {
        /// The setting that names it.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        reason: String,
    },
    /// A file does not hold what it should.
    #[error("{setting} {}: {reason}", path.display())]
    Content {
        /// The setting that names it.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The settings contradict each other, or one of them cannot work.
    #[error("{0}")]
    Settings(String),
}

/// The algorithms of every connection.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
