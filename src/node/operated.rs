//! What status pages, metrics, settings and the admin service need of the node they are about, beside what calls do.

use std::sync::Arc;
use std::time::Duration;

use crate::door::ServedNode;
use crate::engine::{
    Activity, Counters, Engine, FollowError, HeldState, LeadError, LeadingSnapshot, QuotaError,
    RequestedChange, SessionList, Settings,
};
use crate::error::{ConfigureError, Leader, MembershipError, ReadError, SnapshotError, TransferError};
use crate::feed::{FeedCursor, FeedReach};
use crate::machine::StateMachine;
use crate::report::{MemberList, NodeReport};
use crate::storage::LogStats;
use crate::trust::peers::Handshakes;
use crate::types::{Bookmark, ClusterClock, LogId, NodeId};

/// A state of the machine of `N`.
pub(crate) type ViewOf<N> = <<N as ServedNode>::Machine as StateMachine>::View;

/// What a replica follows, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FollowedSources {
    /// Client addresses of members.
    pub(crate) sources: Vec<String>,
    /// How often a source says that it is there.
    pub(crate) heartbeat: Duration,
}

/// What a replica has been told since it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReceivedTotals {
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
}

/// A member of a cluster that tells how it is. The methods promise what those of [`Engine`] do.
pub(crate) trait OperatedNode: ServedNode {
    fn report(&self) -> NodeReport;

    fn list_sessions(
        &self,
        after: u64,
        limit: usize,
    ) -> impl Future<Output = Result<SessionList, ReadError>> + Send;

    /// Makes `change`. Where no part of it is proposed by the end of `limit`, none is any more.
    fn change(
        &self,
        change: RequestedChange,
        limit: Option<Duration>,
    ) -> impl Future<Output = Result<MemberList, MembershipError>> + Send;

    fn transfer_leader(
        &self,
        to: Option<NodeId>,
    ) -> impl Future<Output = Result<Leader, TransferError>> + Send;

    /// Has this node lead, wherever the lead is.
    fn take_lead(&self) -> impl Future<Output = Result<Leader, TransferError>> + Send {
        self.transfer_leader(Some(self.state().node_id))
    }

    /// What it follows, of a replica.
    fn following(&self) -> Option<FollowedSources> {
        None
    }

    /// Has a replica follow this from now on.
    ///
    /// # Errors
    /// What is wrong with it.
    fn follow_by(&self, following: FollowedSources) -> Result<(), ConfigureError> {
        let _ = following;
        Err(ConfigureError("a member follows whoever is elected".to_owned()))
    }

    /// What it has been told, of a replica.
    fn received(&self) -> Option<ReceivedTotals> {
        None
    }

    fn take_snapshot(&self) -> impl Future<Output = Result<LogId, SnapshotError>> + Send;

    fn activity(&self) -> &Activity;

    fn counters(&self) -> &Counters;

    fn log_stats(&self) -> Option<&LogStats>;

    /// What handshakes with other members came to, where they prove who they are.
    fn handshakes(&self) -> Option<Arc<Handshakes>> {
        None
    }

    fn settings(&self) -> Settings;

    fn configure(&self, change: impl FnOnce(&mut Settings)) -> Result<Settings, ConfigureError>;

    fn set_state_quota(&self, bytes: Option<u64>) -> impl Future<Output = Result<LogId, QuotaError>> + Send;

    fn follow(&self, after: Bookmark) -> impl Future<Output = Result<FeedCursor, FollowError>> + Send;

    fn follow_from_now(&self) -> impl Future<Output = Result<FeedCursor, FollowError>> + Send;

    /// Refuses those who want all that happens.
    ///
    /// # Errors
    /// Where to go instead.
    fn may_be_followed(&self) -> Result<(), ReadError> {
        Ok(())
    }

    fn feed_reach(&self) -> FeedReach;

    /// A snapshot behind which this node can tell everything.
    fn leading_snapshot(&self) -> impl Future<Output = Result<LeadingSnapshot, LeadError>> + Send;

    /// The last entry applied, and the cluster's clocks there.
    fn applied_clock(&self) -> (Option<LogId>, ClusterClock);

    /// The present state, for who reads it for long.
    fn held_state(&self) -> impl Future<Output = Result<HeldState<ViewOf<Self>>, ReadError>> + Send;
}

impl<M: StateMachine> OperatedNode for Engine<M> {
    fn report(&self) -> NodeReport {
        Engine::report(self)
    }

    async fn list_sessions(&self, after: u64, limit: usize) -> Result<SessionList, ReadError> {
        Engine::list_sessions(self, after, limit).await
    }

    async fn change(
        &self,
        change: RequestedChange,
        limit: Option<Duration>,
    ) -> Result<MemberList, MembershipError> {
        Engine::change_members(self, change, limit).await
    }

    async fn transfer_leader(&self, to: Option<NodeId>) -> Result<Leader, TransferError> {
        Engine::transfer_leader(self, to).await
    }

    async fn take_lead(&self) -> Result<Leader, TransferError> {
        self.anywhere().transfer_leader(Some(self.state().node_id)).await
    }

    async fn take_snapshot(&self) -> Result<LogId, SnapshotError> {
        Engine::take_snapshot(self).await
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

    fn handshakes(&self) -> Option<Arc<Handshakes>> {
        Engine::handshakes(self)
    }

    fn settings(&self) -> Settings {
        Engine::settings(self)
    }

    fn configure(&self, change: impl FnOnce(&mut Settings)) -> Result<Settings, ConfigureError> {
        Engine::configure(self, change)
    }

    async fn set_state_quota(&self, bytes: Option<u64>) -> Result<LogId, QuotaError> {
        Engine::set_state_quota(self, bytes).await
    }

    async fn follow(&self, after: Bookmark) -> Result<FeedCursor, FollowError> {
        Engine::follow(self, after).await
    }

    async fn follow_from_now(&self) -> Result<FeedCursor, FollowError> {
        Engine::follow_from_now(self).await
    }

    async fn leading_snapshot(&self) -> Result<LeadingSnapshot, LeadError> {
        Engine::leading_snapshot(self).await
    }

    fn feed_reach(&self) -> FeedReach {
        Engine::feed_reach(self)
    }

    fn applied_clock(&self) -> (Option<LogId>, ClusterClock) {
        Engine::applied_clock(self)
    }

    async fn held_state(&self) -> Result<HeldState<M::View>, ReadError> {
        Engine::held_state(self).await
    }
}
