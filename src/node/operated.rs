//! What status pages, metrics, settings and the admin service need of the node they are about, beside what calls do.

use std::time::Duration;

use crate::door::ServedNode;
use crate::engine::{
    Activity, Counters, DiskStatus, Engine, InFlight, Lag, MemberList, NewAddresses, NewMember, PeerState,
    QuotaError, SessionList, Settings, Status,
};
use crate::error::{ConfigureError, Leader, MembershipError, ReadError, SnapshotError, TransferError};
use crate::machine::StateMachine;
use crate::storage::LogStats;
use crate::types::{LogId, NodeId, Quota};

/// A change that the admin service was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Add { new: NewMember, promote: bool, timeout: Duration },
    Promote { node_id: NodeId, timeout: Duration },
    Demote { node_id: NodeId, force: bool },
    Remove { node_id: NodeId, force: bool },
    Replace { old: NodeId, new: NewMember, timeout: Duration },
    Update { node_id: NodeId, addresses: NewAddresses },
}

/// A member of a cluster that tells how it is. The methods promise what those of [`Engine`] do.
pub(crate) trait OperatedNode: ServedNode {
    fn status(&self) -> impl Future<Output = Status> + Send;

    fn list_sessions(
        &self,
        after: u64,
        limit: usize,
    ) -> impl Future<Output = Result<SessionList, ReadError>> + Send;

    fn members(&self) -> MemberList;

    fn change(&self, change: Change) -> impl Future<Output = Result<MemberList, MembershipError>> + Send;

    fn transfer_leader(
        &self,
        to: Option<NodeId>,
    ) -> impl Future<Output = Result<Leader, TransferError>> + Send;

    fn take_snapshot(&self) -> impl Future<Output = Result<LogId, SnapshotError>> + Send;

    fn peers(&self) -> Vec<PeerState>;

    fn lag(&self) -> Lag;

    fn in_flight(&self) -> InFlight;

    /// Sessions open, and bytes of answers kept for them.
    fn sessions(&self) -> (usize, usize);

    /// Sessions of the client connection that has most of them.
    fn largest_opener(&self) -> usize;

    fn disk(&self) -> DiskStatus;

    fn activity(&self) -> &Activity;

    fn counters(&self) -> &Counters;

    fn log_stats(&self) -> Option<&LogStats>;

    fn settings(&self) -> Settings;

    fn configure(&self, change: impl FnOnce(&mut Settings)) -> Result<Settings, ConfigureError>;

    /// Bytes of state, and how many they may be.
    fn state_size(&self) -> (Option<u64>, Option<Quota>);

    fn set_state_quota(&self, bytes: Option<u64>) -> impl Future<Output = Result<LogId, QuotaError>> + Send;
}

impl<M: StateMachine> OperatedNode for Engine<M> {
    async fn status(&self) -> Status {
        Engine::status(self).await
    }

    async fn list_sessions(&self, after: u64, limit: usize) -> Result<SessionList, ReadError> {
        Engine::list_sessions(self, after, limit).await
    }

    fn members(&self) -> MemberList {
        Engine::members(self)
    }

    async fn change(&self, change: Change) -> Result<MemberList, MembershipError> {
        match change {
            Change::Add { new, promote, timeout } => self.add_member(new, promote, timeout).await,
            Change::Promote { node_id, timeout } => self.promote_member(node_id, timeout).await,
            Change::Demote { node_id, force } => self.demote_member(node_id, force).await,
            Change::Remove { node_id, force } => self.remove_member(node_id, force).await,
            Change::Replace { old, new, timeout } => self.replace_member(old, new, timeout).await,
            Change::Update { node_id, addresses } => self.update_member(node_id, addresses).await,
        }
    }

    async fn transfer_leader(&self, to: Option<NodeId>) -> Result<Leader, TransferError> {
        Engine::transfer_leader(self, to).await
    }

    async fn take_snapshot(&self) -> Result<LogId, SnapshotError> {
        Engine::take_snapshot(self).await
    }

    fn peers(&self) -> Vec<PeerState> {
        Engine::peers(self)
    }

    fn lag(&self) -> Lag {
        Engine::lag(self)
    }

    fn in_flight(&self) -> InFlight {
        Engine::in_flight(self)
    }

    fn sessions(&self) -> (usize, usize) {
        Engine::sessions(self)
    }

    fn largest_opener(&self) -> usize {
        Engine::largest_opener(self)
    }

    fn disk(&self) -> DiskStatus {
        Engine::disk(self)
    }

    fn activity(&self) -> &Activity {
        Engine::activity(self)
    }

    fn counters(&self) -> &Counters {
        Engine::counters(self)
    }

    fn log_stats(&self) -> Option<&LogStats> {
        Engine::log_stats(self).map(|stats| &**stats)
    }

    fn settings(&self) -> Settings {
        Engine::settings(self)
    }

    fn configure(&self, change: impl FnOnce(&mut Settings)) -> Result<Settings, ConfigureError> {
        Engine::configure(self, change)
    }

    fn state_size(&self) -> (Option<u64>, Option<Quota>) {
        (Engine::state_bytes(self), Engine::state_quota(self))
    }

    async fn set_state_quota(&self, bytes: Option<u64>) -> Result<LogId, QuotaError> {
        Engine::set_state_quota(self, bytes).await
    }
}
