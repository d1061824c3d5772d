//! quorate: give it a deterministic state machine, and it keeps that state on three or more machines,
//! durable, linearizable, and serving through the loss of any minority.
//!
//! # The way of a write
//!
//! 1. A [`door`] has its guest, such as [`kv`], decode it, or a program that embeds quorate calls [`Engine::write`] itself.
//! 2. [`engine`] admits it (size, bytes in flight), stamps it with its clock and proposes it.
//! 3. [`raft::log`] appends it to the [`storage`]: one fsync for everything that waits. At the same time
//!    [`raft::network`] sends it to the peers, which do the same.
//! 4. Once a quorum holds it on disk it is committed, and [`raft::apply`] hands it to the [`machine`]:
//!    state, position and clocks change together.
//! 5. The new position is published, and then the caller is told.
//!
//! # A node
//!
//! ```no_run
//! use quorate::{Engine, EngineConfig, kv::machine::KvMachine};
//!
//! # async fn start() -> Result<(), quorate::error::OpenError> {
//! let mut config = EngineConfig::new(1, "/var/lib/quorate", "10.0.0.1:7901");
//! config.initial_members.insert(2, "10.0.0.2:7901".to_owned());
//! config.initial_members.insert(3, "10.0.0.3:7901".to_owned());
//! let node = Engine::open(config, KvMachine::default()).await?;
//! # Ok(())
//! # }
//! ```
//!
//! `docs/examples/counter.rs` is a state machine of one's own, replicated three times in one process; `docs/examples/queue.rs` is one
//! that is served over the network.

// The module docs are the map of the code, for those who read it as well as for those who use it.
#![allow(rustdoc::private_intra_doc_links)]
// What some features leave out is used by others.
#![cfg_attr(not(feature = "cli"), allow(dead_code, unused_imports))]

pub(crate) mod address;
#[cfg(any(feature = "server", feature = "client"))]
pub mod call;
#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "cli")]
pub mod config;
#[cfg(feature = "server")]
pub mod door;
#[cfg(feature = "cli")]
pub(crate) mod duration;
pub mod engine;
pub mod error;
#[cfg(feature = "peers")]
pub(crate) mod incoming;
pub mod kv;
#[cfg(any(feature = "sled", feature = "server"))]
pub mod logging;
pub mod machine;
#[cfg(feature = "server")]
pub mod node;
pub mod proto;
pub mod raft;
pub mod reason;
#[doc(hidden)]
pub mod runtime;
pub mod session;
pub(crate) mod shown;
pub mod storage;
pub mod types;

pub use engine::{Engine, EngineConfig};
pub use machine::{ApplyContext, StateMachine};
pub use reason::Reason;
pub use session::Session;
pub use types::{AckLevel, LogId, NodeId, ReadLevel, ReadOptions};
