//! Why a read was not answered.

use super::{OperationError, Told, describe, other_history};
use crate::reason::Reason;
use crate::types::{Divergence, HistoryEpoch, Leader};

fn applied_up_to(index: &Option<u64>) -> String {
    match index {
        Some(index) => format!("has applied up to entry {index}"),
        None => "has applied nothing yet".to_owned(),
    }
}

/// Why a read was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// This node does not lead, and the level asks for the leader.
    #[error("this node is not the leader: {}", describe(.leader))]
    NotLeader {
        /// Where to go instead.
        leader: Option<Leader>,
    },
    /// A quorum did not confirm this node's leadership in time.
    #[error("no quorum confirmed this node's leadership: {reason}")]
    NoQuorum {
        /// What was heard instead.
        reason: String,
    },
    /// This node's state did not become as recent as was asked for in time.
    #[error("this node {}, and the state after entry {wanted} was asked for; ask another node, or wait", applied_up_to(.applied))]
    Behind {
        /// Index of the last entry it has applied.
        applied: Option<u64>,
        /// Index asked for.
        wanted: u64,
    },
    /// No entry of the cluster has the index asked for: it is of another cluster, or of a write that was lost.
    #[error(
        "position {wanted} is ahead of the cluster, whose last committed position is {last}: it is of another cluster, or of a write that was acknowledged by its leader alone and lost with it"
    )]
    Ahead {
        /// Index asked for.
        wanted: u64,
        /// The last that was committed.
        last: u64,
    },
    /// The position asked for belongs to another history than this cluster's.
    #[error("{}", other_history(.given, .known))]
    OtherHistory {
        /// The history that was given.
        given: HistoryEpoch,
        /// This cluster's.
        known: HistoryEpoch,
    },
    /// This node's state differs from the other nodes' at the same position, so whatever it answered would be wrong.
    #[error(
        "{divergence}: this node's state differs from the others', and it answers no reads; ask another node, and rebuild this one from its peers"
    )]
    Diverged {
        /// Where, and how.
        divergence: Divergence,
    },
    /// The node has stopped or is stopping.
    #[error("the node has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
}

impl OperationError for ReadError {
    fn told(&self) -> Told<'_> {
        match self {
            Self::NotLeader { leader } => Told::of(Reason::NotLeader).led_by(leader),
            Self::NoQuorum { .. } => Told::of(Reason::NoQuorum),
            Self::Behind { .. } => Told::of(Reason::Behind),
            Self::Ahead { .. } => Told::of(Reason::Ahead),
            Self::OtherHistory { .. } => Told::of(Reason::OtherHistory),
            Self::Diverged { .. } => Told::of(Reason::Diverged),
            Self::Stopped { .. } => Told::of(Reason::Stopped),
        }
    }
}
