//! Consensus: openraft's core, fed with our log, our network and the user's state machine.
//!
//! The only room that names openraft. Its types end here: [`type_config`] converts at the border, so
//! that the public API, the disk and the wire know only [`crate::types`].
//!
//! - [`envelope`]: what surrounds a command inside an entry;
//! - [`clock`]: how much time has passed, by the log;
//! - [`log`]: openraft's log storage on a [`LogStore`](crate::storage::LogStore);
//! - [`core`]: the running core, behind our own types;
//! - [`apply`]: committed entries into the state machine, in batches;
//! - [`read_index`]: linearizable reads that share one confirmation of leadership;
//! - [`published`]: how far that is, and views for readers;
//! - [`snapshot`]: views of the state into files, off the apply path, and back;
//! - [`membership`]: changes of the membership;
//! - [`durable_positions`]: which members are known to hold which entries;
//! - [`agreed_versions`]: up to which version of its machine commands may be proposed;
//! - [`agreement`]: whether the nodes' states are the same at the same positions;
//! - [`told`]: a state that is no member's, which is told what was applied;
//! - `succession`: why another node leads;
//! - `consensus_tasks`: openraft's own tasks, whose panics are the node's end;
//! - [`activity`], [`entry_ages`]: what the core has done, counted, and how old what it holds is;
//! - [`network`]: messages between members, over any [`Transport`](network::Transport).
//!
//! What it does not do: decide when a cluster forms, whom to answer, or when a snapshot is due. That is
//! [`crate::engine`].

pub(crate) mod activity;
pub(crate) mod agreed_versions;
pub(crate) mod agreement;
pub(crate) mod apply;
pub mod clock;
#[cfg(test)]
mod conformance;
mod consensus_tasks;
pub(crate) mod core;
pub(crate) mod durable_positions;
pub(crate) mod entry_ages;
pub mod envelope;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
mod lease;
pub(crate) mod log;
pub(crate) mod membership;
pub(crate) mod network;
pub(crate) mod pinned;
pub(crate) mod published;
pub(crate) mod read_index;
pub(crate) mod snapshot;
mod succession;
#[cfg_attr(not(all(feature = "server", feature = "client")), allow(dead_code))]
// what is told comes from a client
pub(crate) mod told;
pub(crate) mod type_config;
