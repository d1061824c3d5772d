//! The quota on the state: who proposes it, how an operator sets it, and writes that are refused before they are proposed.
//!
//! Where nobody has set a quota, it follows the member with the least memory. Every member tells its leader what it could
//! bear, with each answer, and the leader proposes the least of these. It lowers the quota as soon as one member bears less;
//! it raises it, and proposes the first one, only once all members have told, so that a member that is down is not
//! forgotten, and no member of an older version, which would not understand the entry, is sent one.
//!
//! Whether a write fits is decided where it is applied (`raft/apply/quota.rs`), at the same entry on every node. What the leader
//! can see to be refused it does not propose, unless the write belongs to a session: an earlier attempt may have been
//! applied, and only the log knows.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::engine::write::Writer;
use crate::engine::{Engine, Inner};
use crate::error::{OperationError, Told, WriteError};
use crate::machine::StateMachine;
use crate::raft::envelope::{self, QuotaChange};
use crate::raft::published::{Applied, Progress};
use crate::reason::Reason;
use crate::types::{LogId, NodeId, Quota, QuotaSource, Role};

/// The members are looked at this often while they or what is applied change.
const PACE: Duration = Duration::from_millis(500);
/// At first, and while there is no quota, more often: nothing bounds the state before.
const FIRST_PACE: Duration = Duration::from_millis(50);
/// A leader that has lost its quorum is not waited for any longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the quota should become, if something else than what it is. `told` has what each member could bear, and nothing
/// for those that have not said so.
fn due(present: Option<Quota>, told: &BTreeMap<NodeId, Option<u64>>) -> Option<u64> {
    if present.is_some_and(|quota| quota.source == QuotaSource::Operator) {
        return None;
    }
    let least = told.values().copied().flatten().min()?;
    let all = told.values().all(Option::is_some);
    match present {
        Some(quota) if least < quota.bytes => Some(least),
        Some(quota) => (all && least > quota.bytes).then_some(least),
        None => all.then_some(least),
    }
}

/// Proposes the quota while this node leads, for as long as there is a handle to it. Ends at once where there is to be none.
pub(in crate::engine) async fn run<M: StateMachine>(node: Weak<Inner<M>>) {
    let Some((mut state, mut peers)) =
        node.upgrade().map(|inner| (inner.state.clone(), inner.core.peer_changes()))
    else {
        return;
    };
    loop {
        // Before anything is looked at.
        peers.borrow_and_update();
        let leads = state.borrow_and_update().role == Role::Leader;
        let Some(inner) = node.upgrade() else { return };
        let progress = inner.core.published().progress();
        if inner.quota_bytes.is_none() || progress.state_bytes.is_none() {
            return;
        }
        let proposed = if leads { due(progress.quota, &inner.quotas_told()) } else { None };
        if let Some(bytes) = proposed {
            let engine = Engine::within(inner);
            match tokio::time::timeout(PATIENCE, engine.write_quota(QuotaChange::Follow(bytes))).await {
                Ok(Ok(log_id)) => {
                    tracing::info!(bytes, %log_id, "the quota on the state follows the member with the least memory")
                }
                Ok(Err(error)) => tracing::debug!(%error, "the quota was not changed; it is proposed again"),
                Err(_) => tracing::debug!("the quota is not changed in time; it is proposed again"),
            }
        } else {
            drop(inner);
            // Who leads, who is a member, what is applied, and what members say.
            tokio::select! {
                Ok(()) = state.changed() => {}
                Ok(()) = peers.changed() => {}
                else => return,
            }
        }
        let pace = if progress.quota.is_none() { FIRST_PACE } else { PACE };
        tokio::time::sleep(pace).await;
    }
}

impl<M: StateMachine> Engine<M> {
    /// Sets the quota on the state, for the whole cluster and for good; `None` leaves it to the leader again, which takes
    /// it from the member with the least memory. A state that is larger already stays, and does not grow. Returns where
    /// the change stands in the log.
    ///
    /// # Errors
    /// [`QuotaError::Range`] when the quota is too small to be of use, or larger than can be;
    /// [`QuotaError::NotCounted`] for a machine that does not say [how large it is](StateMachine::state_bytes);
    /// [`QuotaError::Write`] as for any write.
    pub async fn set_state_quota(&self, bytes: Option<u64>) -> Result<LogId, QuotaError> {
        Ok(self.write_quota(self.quota_change(bytes)?).await?)
    }

    /// What [`set_state_quota`](Self::set_state_quota) is to write.
    pub(in crate::engine) fn quota_change(&self, bytes: Option<u64>) -> Result<QuotaChange, QuotaError> {
        let change = match bytes {
            None => QuotaChange::Release,
            Some(bytes @ Quota::MIN_BYTES..=Quota::MAX_BYTES) => QuotaChange::Set(bytes),
            Some(bytes) => return Err(QuotaError::Range { bytes }),
        };
        match self.inner.core.published().progress().state_bytes {
            Some(_) => Ok(change),
            None => Err(QuotaError::NotCounted),
        }
    }

    async fn write_quota(&self, change: QuotaChange) -> Result<LogId, WriteError> {
        let envelope = envelope::seal_quota(self.inner.reading(), change);
        self.write_envelope(Writer::Node, envelope).await.map(|written| written.log_id)
    }
}

/// Why the quota was not changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuotaError {
    /// There is no such quota.
    #[error(
        "state_quota_bytes must be from {} to {}, or 0 for what the memory of the smallest member allows; not {bytes}",
        Quota::MIN_BYTES,
        Quota::MAX_BYTES
    )]
    Range {
        /// What was asked for.
        bytes: u64,
    },
    /// The state machine does not say how large its state is.
    #[error("this state machine does not count the bytes of its state, so it has no quota")]
    NotCounted,
    /// It was not written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl OperationError for QuotaError {
    fn told(&self) -> Told<'_> {
        match self {
            Self::Range { .. } | Self::NotCounted => Told::of(Reason::Invalid),
            Self::Write(error) => error.told(),
        }
    }
}

impl<M: StateMachine> Inner<M> {
    /// What each member could bear, as far as it has told this node, its leader.
    fn quotas_told(&self) -> BTreeMap<NodeId, Option<u64>> {
        let told = self.core.peer_progress();
        let members = self.core.metrics().membership.members.into_keys();
        members
            .map(|node_id| match node_id == self.config.node_id {
                true => (node_id, self.quota_bytes),
                false => (node_id, told.get(&node_id).and_then(|peer| peer.quota_bytes)),
            })
            .collect()
    }

    /// The state, if a command that adds up to `growth_bytes` might not fit its quota, and this node leads.
    pub(in crate::engine) async fn nearly_full(&self, growth_bytes: u64) -> Option<Arc<Applied<M::View>>> {
        let core = &self.core;
        let progress = core.published().progress();
        let (quota, state_bytes) = progress.quota.zip(progress.state_bytes)?;
        let fits = growth_bytes <= quota.bytes.saturating_sub(state_bytes);
        if fits || self.state.borrow().role != Role::Leader {
            return None;
        }
        // While nothing is applied the last view will do.
        match core.published().view_from(progress.next_index()) {
            Some(view) => Some(view),
            // If there is none in time the log will tell.
            None => tokio::time::timeout(self.config.timing.patience(), core.view()).await.ok(),
        }
    }

    /// Refuses `command` if it does not fit the quota of a state that is `nearly_full`.
    pub(in crate::engine) fn admit_growth(
        &self,
        nearly_full: &Applied<M::View>,
        command: &M::Command,
    ) -> Result<(), WriteError> {
        let Progress { quota: Some(quota), state_bytes: Some(state_bytes), .. } = nearly_full.progress else {
            return Ok(());
        };
        let room = quota.bytes.saturating_sub(state_bytes);
        if M::growth_bytes(&nearly_full.view, command) <= room {
            return Ok(());
        }
        let refusal = WriteError::QuotaExceeded { state_bytes, quota_bytes: quota.bytes };
        self.counters.refuse(refusal.reason());
        Err(refusal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(bytes: [Option<u64>; 3]) -> BTreeMap<NodeId, Option<u64>> {
        (1..).zip(bytes).collect()
    }

    fn quota(bytes: u64, source: QuotaSource) -> Option<Quota> {
        Some(Quota { bytes, source })
    }

    #[test]
    fn the_first_quota_waits_for_all_members() {
        assert_eq!(due(None, &told([Some(9), None, Some(7)])), None);
        assert_eq!(due(None, &told([Some(9), Some(8), Some(7)])), Some(7));
        assert_eq!(due(None, &BTreeMap::new()), None);
    }

    #[test]
    fn it_falls_with_one_member_and_rises_with_all() {
        let present = quota(7, QuotaSource::Memory);
        assert_eq!(due(present, &told([Some(9), None, None])), None, "whoever had 7 may be down");
        assert_eq!(due(present, &told([Some(9), None, Some(5)])), Some(5));
        assert_eq!(due(present, &told([Some(9), Some(8), Some(7)])), None);
        assert_eq!(due(present, &told([Some(9), Some(8), Some(8)])), Some(8));
    }

    #[test]
    fn what_an_operator_set_stays() {
        assert_eq!(due(quota(7, QuotaSource::Operator), &told([Some(1), Some(1), Some(1)])), None);
    }
}
