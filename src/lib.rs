//! quorate: a Raft replication engine.

pub mod engine;
pub mod error;
pub mod machine;
#[doc(hidden)]
pub mod runtime;
pub mod storage;
pub mod types;
pub mod server;
pub mod client;
pub mod cli;
mod proto;
