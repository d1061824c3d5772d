//! Why a call that was passed on to the leader has no answer.

use super::{Leader, OperationError, Told};
use crate::reason::Reason;

/// A call from a node that does not lead, passed on to the leader, has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// The call did not reach the leader, or the leader's build takes no such calls. Nothing was done.
    #[error(
        "node {} leads, and this node cannot pass the call on to it: {reason}; nothing was done: call that node, or see to the connection between the two",
        .leader.node_id
    )]
    NotTaken {
        /// Whom the call was for.
        leader: Leader,
        /// What was met.
        reason: String,
    },
    /// The leader, or the way to it, has no room for the call at present. Nothing was done, and the call may be repeated after a
    /// pause. Of writes, what the node that was called has no room for itself is told apart: that is
    /// [`WriteError::Overloaded`](crate::WriteError::Overloaded).
    #[error(
        "node {} leads, and there or on the way to it too many calls are under way; nothing was done: repeat this one after a pause",
        .leader.node_id
    )]
    Overloaded {
        /// Whom the call was for.
        leader: Leader,
    },
    /// The call left for the leader, and no answer came. It may have been carried out, or may be yet.
    #[error(
        "the call was given to node {}, which leads, and no answer came: {reason}; it may have been carried out",
        .leader.node_id
    )]
    Lost {
        /// Whom the call was for.
        leader: Leader,
        /// What was met.
        reason: String,
    },
}

impl OperationError for ForwardError {
    fn told(&self) -> Told<'_> {
        match self {
            // The leader itself may well take it.
            Self::NotTaken { leader, .. } => Told { leader: Some(leader), ..Told::of(Reason::NotLeader) },
            Self::Overloaded { leader } => Told { leader: Some(leader), ..Told::of(Reason::Overloaded) },
            Self::Lost { leader, .. } => {
                Told { leader: Some(leader), ..Told::of(Reason::Interrupted).undecided(true) }
            }
        }
    }
}
