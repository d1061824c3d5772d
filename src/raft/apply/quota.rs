//! The quota on the state, as entries meet it: what follows from it is the same on every node.

use super::Applier;
use crate::machine::StateMachine;
use crate::raft::envelope::QuotaChange;
use crate::raft::type_config::NotApplied;
use crate::types::{Quota, QuotaSource};

impl<M: StateMachine> Applier<M> {
    /// The answers kept for sessions are bounded by the quota as well: both count on the same memory.
    pub(super) fn set_quota(&mut self, quota: Option<Quota>) {
        self.progress.quota = quota;
        self.sessions.fit_quota(quota.map(|quota| quota.bytes));
    }

    pub(super) fn change_quota(&mut self, change: QuotaChange) {
        let current = self.progress.quota;
        let by_operator = current.is_some_and(|quota| quota.source == QuotaSource::Operator);
        let quota = match change {
            QuotaChange::Follow(_) if by_operator => return,
            QuotaChange::Follow(bytes) => Some(Quota { bytes, source: QuotaSource::Memory }),
            QuotaChange::Set(bytes) => Some(Quota { bytes, source: QuotaSource::Operator }),
            QuotaChange::Release => current.map(|quota| Quota { source: QuotaSource::Memory, ..quota }),
        };
        // As it is stored: in a snapshot, and on the nodes that are restored from it.
        self.set_quota(quota.and_then(|quota| Quota::from_stored(quota.to_stored())));
    }

    /// Why `command` must not be applied: it would have the state outgrow its quota.
    pub(super) fn over_quota(&self, command: &M::Command) -> Option<NotApplied> {
        let (quota, state_bytes) = self.progress.quota.zip(self.machine.state_bytes())?;
        let room = quota.bytes.saturating_sub(state_bytes);
        // The view is gone before the machine changes again, so nothing needs to be copied for it.
        let exceeds =
            M::most_growth_bytes(command) > room && M::growth_bytes(&self.machine.view(), command) > room;
        exceeds.then_some(NotApplied::QuotaExceeded { state_bytes, quota_bytes: quota.bytes })
    }
}

#[cfg(test)]
mod tests;
