//! Why a peer's request is not answered, and how often the log says so.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use crate::raft::envelope::Unusable;
use crate::raft::network::wire::Malformed;
use crate::types::{LogId, NodeId};

/// Why a request is not answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unanswered {
    /// No member can have meant it.
    #[error(transparent)]
    Implausible(#[from] Malformed),
    /// An entry that this node could not apply.
    #[error("entry {at} cannot be applied by this node: {why}")]
    Undecodable { at: LogId, why: Unusable },
    /// This node cannot, at present.
    #[error("{0}")]
    Failed(String),
}

impl Unanswered {
    pub(super) fn failed(error: impl std::fmt::Display) -> Self {
        Self::Failed(error.to_string())
    }
}

/// What is logged of refusals: one in a while, whoever calls and however often.
#[derive(Debug, Default)]
pub(in crate::raft::network) struct Complaints(Mutex<(Option<Instant>, u64)>);

impl Complaints {
    /// How long nothing more is logged.
    const PAUSE: Duration = Duration::from_secs(1);

    /// Whether to log now, and how many were not logged since the last time.
    pub(in crate::raft::network) fn is_due(&self) -> Option<u64> {
        let mut last = self.0.lock().expect("invariant: no panic under this lock");
        let is_due = last.0.is_none_or(|at| at.elapsed() >= Self::PAUSE);
        match is_due {
            true => {
                let unsaid = last.1;
                *last = (Some(Instant::now()), 0);
                Some(unsaid)
            }
            false => {
                last.1 = last.1.saturating_add(1);
                None
            }
        }
    }

    /// A message was refused. What this node only cannot do at present is its caller's to tell.
    pub(super) fn refused(&self, from: NodeId, refused: &Unanswered) {
        if !matches!(refused, Unanswered::Failed(_))
            && let Some(unsaid) = self.is_due()
        {
            tracing::warn!(node = from, %refused, unsaid, "refused a peer's message");
        }
    }
}
