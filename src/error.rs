//! Public errors: one enum per operation, so that a caller's `match` holds only what can happen.
//!
//! Three kinds are never mixed. A state machine's *rejection* is a value in its reply. An *operation
//! error* is one of the enums here and goes to the caller. A *fatal error* (a failed fsync, a checksum
//! mismatch, a panic in apply) stops the node; callers see [`WriteError::Stopped`] and its kin.

mod forward;
mod membership;
mod open;
mod read;
mod told;
mod write;

pub use forward::ForwardError;
pub use membership::{MembershipError, TransferError};
pub(crate) use open::is_out_of_files;
pub use open::{OpenError, StorageError};
pub use read::ReadError;
pub use told::{OperationError, Told};
pub use write::WriteError;

use crate::reason::Reason;
pub(crate) use crate::types::Leader;
use crate::types::{HistoryEpoch, Incarnation, NodeId};

fn describe(leader: &Option<Leader>) -> String {
    match leader {
        Some(leader) => format!("node {} at {} leads", leader.node_id, leader.client),
        None => "no leader is known at present; retry shortly".to_owned(),
    }
}

fn nodes(ids: &[NodeId]) -> String {
    let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
    format!("{} {}", if ids.len() == 1 { "node" } else { "nodes" }, ids.join(", "))
}

fn other_history(given: &HistoryEpoch, known: &HistoryEpoch) -> String {
    format!(
        "the position or session belongs to history {given}, and this cluster's is {known}: it was made anew or restored, or is another cluster; read what it holds and begin again from there"
    )
}

/// A setting that a running node does not take. Says which, and what would do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigureError(pub String);

/// Why no snapshot was taken on request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The node has applied nothing.
    #[error("this node has applied nothing yet; there is nothing to take a snapshot of")]
    Nothing,
    /// It was not written in time; it may be later.
    #[error(
        "no snapshot after {waited_ms} ms; it is being written still, or the node's log says why it is not"
    )]
    Timeout {
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// The one that there is cannot be read.
    #[error("the newest snapshot cannot be read: {reason}")]
    Unreadable {
        /// Why.
        reason: String,
    },
    /// The disk has no room for one.
    #[error("no snapshot: the disk is full. One is taken once there is room")]
    DiskFull,
    /// The node has stopped or is stopping.
    #[error("the node has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
}

impl OperationError for SnapshotError {
    fn told(&self) -> Told<'_> {
        match self {
            Self::Nothing => Told::of(Reason::Behind),
            // It is being written, and there may be one yet.
            Self::Timeout { .. } => Told::of(Reason::DeadlineExceeded).undecided(true),
            Self::Unreadable { .. } => Told::of(Reason::Unspecified),
            Self::DiskFull => Told::of(Reason::DiskFull),
            Self::Stopped { .. } => Told::of(Reason::Stopped),
        }
    }
}

/// Why a node stopped although nobody asked it to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FatalError {
    /// The cluster knows this node id with another data directory.
    #[error(
        "node {node_id} is known to its cluster by data directory {known}, but presents {presented}: the disk was wiped or replaced, and with it the log and vote this node had promised to keep. Restore the old data directory; or start the node with --join on an empty one, and let the cluster take it back with `quorate member replace {node_id} --peer HOST:PORT`"
    )]
    Fenced {
        /// This node.
        node_id: NodeId,
        /// The incarnation in the membership.
        known: Incarnation,
        /// The incarnation of this data directory.
        presented: Incarnation,
    },
    /// The cluster has removed this node.
    #[error(
        "node {node_id} was removed from its cluster. To bring it back, start it with --join and use `quorate member add {node_id} --peer HOST:PORT`; its data directory may be kept"
    )]
    Removed {
        /// This node.
        node_id: NodeId,
    },
    /// The peers this node was given belong to a cluster that does not know it.
    #[error(
        "node {node_id} is not a member of the cluster at {address}; start it with the --peers of a cluster it founds, or with --join, and then add it with `quorate member add {node_id} --peer HOST:PORT`"
    )]
    NotAMember {
        /// This node.
        node_id: NodeId,
        /// The peer that said so.
        address: String,
    },
    /// The node has offered its lead to others, nobody has taken it, and it could not give it up.
    #[error(
        "this node offered its lead to the others, nobody took it, and it could not give it up either; start it again: it then stands for election like any other"
    )]
    StuckTransfer,
    /// The cluster has committed what this node's machine does not read: it would have to leave out a part of the log.
    #[error("{reason}. The data of this node is untouched")]
    Outdated {
        /// What that is, and what to do.
        reason: String,
    },
    /// A task that the node cannot do without has panicked, or has come to its end.
    #[error("task {name} {failure}")]
    Task {
        /// Its name.
        name: &'static str,
        /// What has become of it.
        failure: String,
    },
    /// Writing, flushing or reading the log or a snapshot failed, or apply panicked.
    #[error("{0}")]
    Core(String),
}
