//! The key-value guest: the machine that `quorate serve` hosts, and all that only it needs.
//!
//! - [`api`]: the vocabulary, in which clients ask and are answered;
//! - [`codec`]: the vocabulary on the wire, in both directions;
//! - [`machine`]: the state, and what the log stores of a change of it;
//! - [`calls`]: what a request asks of the machine, and what the machine's answers are to those who asked;
//! - [`service`]: the guest at a node's client port.
//!
//! Another guest beside it brings: its protocol in `proto/` (listed in `proto/tests/generated.rs`); a folder like this one, with `serve` as in
//! [`service`]; its exports in `lib.rs`; the line of `cli/serve.rs` that says what is served; its rows in `tests/architecture/rooms.rs`.
//!
//! No room of the core names anything in here. What the log stores is no part of the vocabulary: a request may get another
//! field, a stored command may not.

#[cfg(any(feature = "server", feature = "client"))]
pub mod api;
#[cfg(feature = "server")]
pub(crate) mod calls;
#[cfg(feature = "client")]
pub mod client;
#[cfg(any(feature = "server", feature = "client"))]
pub(crate) mod codec;
#[cfg(all(any(test, fuzzing), feature = "server"))]
pub(crate) mod fuzzed;
pub mod machine;
#[cfg(feature = "server")]
pub(crate) mod service;

#[cfg(any(feature = "server", feature = "client"))]
pub use api::*;
#[cfg(feature = "server")]
pub(crate) use service::with_services;
#[cfg(feature = "server")]
pub use service::{Kv, bind, serve};
