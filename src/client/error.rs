//! Why an operation failed.

use std::time::Duration;

use bytes::Bytes;

use super::endpoint::Endpoint;
use crate::call::Header;
use crate::reason::Reason;
use crate::types::{LogId, NodeId};

/// What was answered to a write that is committed and applied, and that not every voter has confirmed in time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct UnconfirmedAnswer {
    /// The method that was called.
    pub method: &'static str,
    /// Who answered, and where in the log the write stands. It is acknowledged at [`AckLevel::Quorum`](crate::AckLevel::Quorum).
    pub header: Header,
    /// The response, as the method has it.
    pub payload: Bytes,
    /// The machine that was written to, by its number in the composition.
    pub(crate) machine: u16,
}

/// Why an operation failed. [`maybe_applied`](Self::maybe_applied) says whether a write may have taken effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No known endpoint accepts a connection, or no node has ever answered at any. Nothing was sent that is still
    /// undecided.
    #[error("cannot connect to any endpoint: {}", list(.tried))]
    Unavailable {
        /// Every endpoint, and why it failed the last time.
        tried: Vec<(Endpoint, String)>,
    },
    /// The deadline of the operation passed.
    #[error("no answer within {} ms{}", .timeout.as_millis(), because(.last))]
    DeadlineExceeded {
        /// The time that the operation was given.
        timeout: Duration,
        /// Whether a write was under way when the deadline passed: it may take effect yet.
        maybe_applied: bool,
        /// Why the last attempt failed, when one did before the deadline.
        last: Option<String>,
    },
    /// The request itself is at fault, and fails again wherever it is sent.
    #[error("{message}")]
    Rejected {
        /// Which fault: [`TooLarge`](Reason::TooLarge), [`Invalid`](Reason::Invalid), [`Undecodable`](Reason::Undecodable),
        /// [`Unauthenticated`](Reason::Unauthenticated) or [`PermissionDenied`](Reason::PermissionDenied).
        reason: Reason,
        /// The fault in words.
        message: String,
    },
    /// The attempt failed, and trying again was not possible or not safe.
    #[error("{endpoint}: {message}{}", unknown(*.maybe_applied))]
    Failed {
        /// The node that was asked.
        endpoint: Endpoint,
        /// What kind of failure. [`Interrupted`](Reason::Interrupted) also when the connection was lost;
        /// [`Unspecified`](Reason::Unspecified) when the answer was none that this version knows.
        reason: Reason,
        /// The failure in words.
        message: String,
        /// Whether a write may have taken effect, or may still do so.
        maybe_applied: bool,
    },
    /// A write that was to be on disk at every voter is committed and applied, but not known to be everywhere.
    #[error(
        "{endpoint}: the write is committed and applied, but not known to be on disk at {}", nodes(.missing)
    )]
    AckTimeout {
        /// The node that was asked.
        endpoint: Endpoint,
        /// Where the write stands in the log.
        position: Option<LogId>,
        /// The voters not known to hold it.
        missing: Vec<NodeId>,
        /// What the call would have returned, in the words of its guest: replies of the [keys](crate::kv::client) and
        /// [`MachineClient`](super::MachineClient) decode it. `None` only where the node is of an earlier version, or the answer is
        /// too large to be told with an error.
        answer: Option<Box<UnconfirmedAnswer>>,
    },
    /// What was answered is nothing that this program can read: the machine that answered is another one, or a version that has
    /// changed its replies. A write was applied.
    #[error("node {node_id}: {message}{}", unknown(*.maybe_applied))]
    Unreadable {
        /// The node that answered.
        node_id: NodeId,
        /// What is wrong with it.
        message: String,
        /// Whether it is the answer to a write.
        maybe_applied: bool,
    },
    /// The history does not reach back to the revision that was to be watched from.
    #[error("the history begins at revision {first_revision}; read the keys anew, and watch from there")]
    Compacted {
        /// The first revision that can be watched from, on the node that was asked.
        first_revision: u64,
    },
}

impl ClientError {
    /// Which of the reasons that all interfaces share.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Unavailable { .. } => Reason::Unreachable,
            Self::DeadlineExceeded { .. } => Reason::DeadlineExceeded,
            Self::Rejected { reason, .. } | Self::Failed { reason, .. } => *reason,
            Self::AckTimeout { .. } => Reason::AckTimeout,
            Self::Compacted { .. } => Reason::Compacted,
            Self::Unreadable { .. } => Reason::Unspecified,
        }
    }

    /// Whether trying again cannot help: the request itself is at fault, its answer cannot be read, or the session that made it
    /// exactly-once is gone, be it because the cluster was restored or made anew.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Rejected { .. } | Self::Unreadable { .. } => true,
            Self::Failed { reason, .. } => matches!(
                reason,
                Reason::TooLarge
                    | Reason::Invalid
                    | Reason::Undecodable
                    | Reason::Unauthenticated
                    | Reason::PermissionDenied
                    | Reason::SessionExpired
                    | Reason::AnswerForgotten
                    | Reason::OtherHistory
            ),
            Self::Unavailable { .. }
            | Self::DeadlineExceeded { .. }
            | Self::AckTimeout { .. }
            | Self::Compacted { .. } => false,
        }
    }

    /// Whether a write may have taken effect, or may still do so. Never true for a read.
    pub fn maybe_applied(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Rejected { .. } | Self::Compacted { .. } => false,
            Self::AckTimeout { .. } => true,
            Self::DeadlineExceeded { maybe_applied, .. }
            | Self::Failed { maybe_applied, .. }
            | Self::Unreadable { maybe_applied, .. } => *maybe_applied,
        }
    }

    /// What the call would have returned, if this is [`AckTimeout`](Self::AckTimeout) and that is known.
    pub fn unconfirmed(&self) -> Option<&UnconfirmedAnswer> {
        if let Self::AckTimeout { answer, .. } = self { answer.as_deref() } else { None }
    }

    /// The same error of another answer.
    pub(crate) fn answering(mut self, change: impl FnOnce(&mut UnconfirmedAnswer)) -> Self {
        if let Self::AckTimeout { answer: Some(answer), .. } = &mut self {
            change(answer);
        }
        self
    }

    /// The same, of a write of which an earlier attempt may have been applied.
    pub(super) fn undecided(self, endpoint: &Endpoint) -> Self {
        let failed = |reason, message| Self::Failed {
            endpoint: endpoint.clone(),
            reason,
            message,
            maybe_applied: true,
        };
        match self {
            Self::DeadlineExceeded { timeout, last, .. } => {
                Self::DeadlineExceeded { timeout, maybe_applied: true, last }
            }
            Self::Failed { endpoint, reason, message, .. } => {
                Self::Failed { endpoint, reason, message, maybe_applied: true }
            }
            Self::Unavailable { .. } => failed(Reason::Interrupted, self.to_string()),
            Self::Rejected { reason, message } => failed(reason, message),
            Self::Unreadable { node_id, message, .. } => {
                Self::Unreadable { node_id, message, maybe_applied: true }
            }
            Self::AckTimeout { .. } | Self::Compacted { .. } => self,
        }
    }
}

fn list(tried: &[(Endpoint, String)]) -> String {
    let lines: Vec<_> = tried.iter().map(|(endpoint, why)| format!("{endpoint} ({why})")).collect();
    lines.join(", ")
}

fn nodes(ids: &[NodeId]) -> String {
    let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
    format!("{} {}", if ids.len() == 1 { "node" } else { "nodes" }, ids.join(", "))
}

fn because(last: &Option<String>) -> String {
    last.as_ref().map_or_else(String::new, |last| format!("; last failure: {last}"))
}

fn unknown(maybe_applied: bool) -> &'static str {
    if maybe_applied { "; it may have been done all the same" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_rejected_stays_so_even_when_an_attempt_is_undecided() {
        let rejected = || ClientError::Rejected { reason: Reason::TooLarge, message: "too large".into() };
        assert!(rejected().is_final() && !rejected().maybe_applied());
        let undecided = rejected().undecided(&Endpoint::parse("n1:1").unwrap());
        assert!(undecided.is_final() && undecided.maybe_applied(), "{undecided:?}");
    }
}
