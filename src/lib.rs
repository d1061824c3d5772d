//! quorate: a Raft replication engine.

pub mod cli;
pub mod client;
pub mod config;
pub mod engine;
pub mod error;
pub mod machine;
mod proto;
pub mod raft;
#[doc(hidden)]
pub mod runtime;
pub mod server;
pub mod storage;
pub mod types;
