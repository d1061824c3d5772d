//! A replica as a port serves it: a node that answers reads, and says of everything else who does it.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::relay::LeaderRelay;
use super::{Replica, ReplicaConfig, ReplicaState, SyncState};
use crate::client::ClientError;
use crate::door::ServedNode;
use crate::door::relay::Relay;
use crate::door::served::{PinnedView, Read, WriteOutcome};
use crate::engine::{
    Activity, ClosedSession, Counters, CurrentHistory, FollowError, HeldState, LeadError, LeadingSnapshot,
    NodeState, OpenedSession, Pinned, QuotaError, ReadOutcome, RequestedChange, SessionList, Settings,
    WriteOptions,
};
use crate::error::{
    ConfigureError, Leader, MembershipError, ReadError, SnapshotError, TransferError, WriteError,
};
use crate::feed::{FeedCursor, FeedReach};
use crate::machine::StateMachine;
use crate::node::operated::{FollowedSources, OperatedNode, ReceivedTotals};
use crate::raft::published::Applied;
use crate::reason::Reason;
use crate::report::{Lag, MemberList, NodeReport, Offsets, ReplicaReport, StateSize};
use crate::storage::{DiskState, LogStats};
use crate::types::{Bookmark, ClusterClock, HistoryEpoch, LogId, NodeId, ReadLevel, ReadOptions, Role};

/// How long a read waits for the state to be as recent as it asks for.
const PATIENCE: Duration = Duration::from_secs(5);
/// A view that is read for long may keep so much alive.
const PINNED_BYTES: u64 = 1024 * 1024 * 1024;

/// A position that was asked for at some time.
pub(super) type Confirmed = Arc<std::sync::Mutex<Option<(Bookmark, Instant)>>>;

impl<M: StateMachine> Replica<M> {
    /// A state as recent as `options` ask for.
    pub(super) async fn state_at(&self, options: ReadOptions) -> Result<Arc<Applied<M::View>>, ReadError> {
        let known = self.told.reader.history().epoch();
        if options.history.differs_from(known) {
            return Err(ReadError::OtherHistory { given: options.history, known });
        }
        let after = (options.after_index > 0).then_some(options.after_index);
        let confirmed = match options.level {
            ReadLevel::Local => None,
            ReadLevel::Lease => return Err(ReadError::NotLeader { leader: self.state().leader }),
            ReadLevel::Linearizable => Some(self.confirm(Duration::ZERO).await?),
            ReadLevel::Bounded { max_lag_ms } => Some(self.confirm(Duration::from_millis(max_lag_ms)).await?),
        };
        let wanted = confirmed.max(after);
        if self.told.reader.is_broken() {
            // What was taken in last is not whole. Whatever somebody has looked at before is.
            let last = self.told.reader.last_view();
            let stopped = || ReadError::Stopped { reason: self.state().gave_up.unwrap_or_default() };
            return last
                .filter(|view| wanted.is_none_or(|wanted| view.progress.next_index() > wanted))
                .ok_or_else(stopped);
        }
        match timeout(PATIENCE, self.told.reader.view(wanted)).await {
            Ok(applied) => Ok(applied),
            Err(_) => {
                let applied = self.told.reader.progress().log_id.map(|log_id| log_id.index);
                Err(ReadError::Behind { applied, wanted: wanted.or(applied).unwrap_or_default() })
            }
        }
    }

    /// A position that includes every write acknowledged before `max_lag` ago.
    async fn confirm(&self, max_lag: Duration) -> Result<u64, ReadError> {
        let own = self.told.reader.history().epoch();
        let lock = || self.confirmed.lock().expect("invariant: no panic under this lock");
        let asked = Instant::now();
        let fresh = (*lock()).filter(|(at, when)| {
            !max_lag.is_zero() && when.elapsed() <= max_lag && !at.history.differs_from(own)
        });
        if let Some((at, _)) = fresh {
            return Ok(at.index);
        }
        let client = self.told.client.lock().expect("invariant: no panic under this lock").clone();
        let Some(client) = client else {
            return Err(ReadError::NoQuorum { reason: "the replica has no source yet".to_owned() });
        };
        let present = client.present().await.map_err(not_confirmed)?;
        if present.history.differs_from(own) {
            return Err(ReadError::OtherHistory { given: own, known: present.history });
        }
        *lock() = Some((present, asked));
        Ok(present.index)
    }

    fn leads(&self) -> Option<Leader> {
        let client = self.told.client.lock().expect("invariant: no panic under this lock").clone()?;
        let leader = client.known_leader()?;
        Some(Leader { node_id: leader.node_id.unwrap_or_default(), client: leader.client.to_string() })
    }
}

fn not_confirmed(error: ClientError) -> ReadError {
    match error.reason() {
        Reason::Behind | Reason::NotLeader | Reason::Stopped => ReadError::NotLeader { leader: None },
        _ => ReadError::NoQuorum { reason: error.to_string() },
    }
}

/// A replica behind a port.
pub(crate) struct ReplicaNode<M: StateMachine> {
    pub(crate) replica: Replica<M>,
    counters: Arc<Counters>,
    settings: Arc<Mutex<Settings>>,
    node: watch::Receiver<NodeState>,
    client: String,
    /// There if it passes changes on.
    relay: Option<Arc<LeaderRelay>>,
    /// The name of the cluster, once a source has told it.
    cluster: Arc<Mutex<String>>,
}

impl<M: StateMachine> Clone for ReplicaNode<M> {
    fn clone(&self) -> Self {
        Self {
            replica: self.replica.clone(),
            counters: self.counters.clone(),
            settings: self.settings.clone(),
            node: self.node.clone(),
            client: self.client.clone(),
            relay: self.relay.clone(),
            cluster: self.cluster.clone(),
        }
    }
}

impl<M: StateMachine> fmt::Debug for ReplicaNode<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplicaNode").field("replica", &self.replica).finish_non_exhaustive()
    }
}

/// What a replica is to those who ask nodes.
fn node_state<M: StateMachine>(replica: &Replica<M>, state: &ReplicaState) -> NodeState {
    let applied = replica.told.reader.progress().log_id;
    let committed = match (applied, state.primary_seq) {
        (None, 0) => None,
        // Of a position that was only heard of the term is not known.
        (applied, heard) => Some(applied.unwrap_or_default())
            .map(|applied| LogId::new(applied.term, applied.index.max(heard))),
    };
    let has_ended = state.gave_up.is_some();
    NodeState {
        role: Role::Learner,
        leader: replica.leads().or_else(|| state.leader.clone()),
        in_touch: state.is_connected() && !has_ended,
        applied,
        committed,
        overdue: state.sync != SyncState::Synced && state.since.elapsed() > Duration::from_secs(10),
        disk: DiskState::Ok,
        ..NodeState::of_no_member()
    }
}

impl<M: StateMachine> ReplicaNode<M> {
    /// `replica`, whose clients reach it at `client`.
    pub(crate) fn new(replica: Replica<M>, client: String) -> Self {
        let (told, node) = watch::channel(node_state(&replica, &replica.state()));
        let (mut states, own) = (replica.state.clone(), replica.clone());
        // Ends with the replica, whose end closes the channel of its states.
        let weak = own.downgrade();
        crate::runtime::spawn(async move {
            while states.changed().await.is_ok() {
                let Some(replica) = weak.upgrade() else { return };
                let state = states.borrow_and_update().clone();
                told.send_replace(node_state(&replica, &state));
            }
        });
        let settings = Settings::of_no_member(replica.config().event_log);
        let settings = Arc::new(Mutex::new(settings));
        Self {
            replica,
            counters: Arc::default(),
            settings,
            node,
            client,
            cluster: Arc::default(),
            relay: None,
        }
    }

    /// The same, which passes changes on to whoever leads.
    #[must_use]
    pub(crate) fn forwarding(self) -> Self {
        let relay = LeaderRelay::new(self.replica.config.subscribe());
        Self { relay: Some(Arc::new(relay)), ..self }
    }

    /// Calls that were passed on, if it passes any on.
    pub(crate) fn passed_on(&self) -> Option<u64> {
        self.relay.as_ref().map(|relay| relay.passed_on())
    }

    /// The name of the cluster. A client that was made anew has not heard it yet.
    fn cluster(&self) -> String {
        let client = self.replica.told.client.lock().expect("invariant: no panic under this lock").clone();
        let mut known = self.cluster.lock().expect("invariant: no panic under this lock");
        if let Some(name) = client.and_then(|client| client.cluster()) {
            *known = name;
        }
        known.clone()
    }

    fn not_here<T>(&self) -> Result<T, WriteError> {
        Err(WriteError::NotLeader { leader: self.replica.leads() })
    }
}

impl<M: StateMachine> ServedNode for ReplicaNode<M> {
    type Machine = M;

    async fn propose<F>(&self, _: M::Command, _: WriteOptions, done: F)
    where
        F: FnOnce(WriteOutcome<M>) + Send + 'static,
    {
        done(self.not_here());
    }

    async fn write(&self, _: M::Command, _: WriteOptions) -> WriteOutcome<M> {
        self.not_here()
    }

    async fn open_session(&self, _: &str, _: u64) -> Result<OpenedSession, WriteError> {
        self.not_here()
    }

    async fn close_session(&self, _: u64, _: HistoryEpoch) -> Result<ClosedSession, WriteError> {
        self.not_here()
    }

    async fn read(&self, query: M::Query, options: ReadOptions) -> Read<M> {
        self.counters.read(options.level);
        let (applied, answer) = self.replica.read(query, options).await?;
        Ok(ReadOutcome { applied, answer })
    }

    fn may_be_watched(&self) -> Result<(), ReadError> {
        match self.replica.config().filters.is_empty() {
            true => Ok(()),
            false => Err(ReadError::NotLeader { leader: self.replica.leads() }),
        }
    }

    fn feed_from(&self, next: u64) -> FeedCursor {
        self.replica.cursor(next)
    }

    async fn view(&self, options: ReadOptions) -> Result<(Option<LogId>, M::View), ReadError>
    where
        M::View: Clone,
    {
        self.replica.view(options).await
    }

    async fn pinned_view(&self, options: ReadOptions) -> PinnedView<M>
    where
        M::View: Clone,
    {
        let applied = self.replica.state_at(options).await?;
        let pinned = Pinned::new(applied.progress, self.replica.told.reader.watch(), PINNED_BYTES);
        Ok((applied.progress.log_id, applied.view.clone(), pinned))
    }

    fn log_time_at(&self, elapsed_ms: u64) -> u64 {
        self.replica.told.reader.progress().clock.log_time_at(elapsed_ms)
    }

    fn current_history(&self) -> CurrentHistory {
        self.replica.told.reader.history().clone()
    }

    /// Only a member may be asked, or two replicas would ask each other.
    async fn present(&self) -> Result<u64, ReadError> {
        Err(ReadError::NotLeader { leader: self.replica.leads() })
    }

    fn relay(&self) -> Option<Arc<dyn Relay>> {
        let relay: Arc<dyn Relay> = self.relay.clone()?;
        Some(relay)
    }

    fn state(&self) -> NodeState {
        node_state(&self.replica, &self.replica.state())
    }

    fn watch(&self) -> watch::Receiver<NodeState> {
        self.node.clone()
    }
}

impl<M: StateMachine> OperatedNode for ReplicaNode<M> {
    fn report(&self) -> NodeReport {
        let (state, node) = (self.replica.state(), self.state());
        let progress = self.replica.told.reader.progress();
        let config = self.replica.config();
        let replica = ReplicaReport {
            client: self.client.clone(),
            id: config.id,
            partial: !config.filters.is_empty(),
            source: state.source.clone(),
            state: state.sync.name().to_owned(),
            lag_entries: state.lag_entries(),
            lag: state.lag(),
        };
        NodeReport {
            cluster: self.cluster(),
            replica: Some(replica),
            client: self.client.clone(),
            role: Some(Role::Learner),
            term: progress.log_id.map_or(0, |applied| applied.term),
            ready: node.is_ready(),
            leader: node.leader.clone(),
            fatal: state.gave_up.clone(),
            offsets: Offsets { committed: node.committed, applied: node.applied, ..Offsets::default() },
            state_hash: progress.state_hash,
            state: StateSize { bytes: progress.state_bytes, ..StateSize::default() },
            lag: Some(Lag {
                entries: state.lag_entries(),
                time: state.lag(),
                leader_heard: state.heard.map(|heard| heard.elapsed()),
            }),
            history: progress.history,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..NodeReport::default()
        }
    }

    async fn list_sessions(&self, _: u64, _: usize) -> Result<SessionList, ReadError> {
        Err(ReadError::NotLeader { leader: self.replica.leads() })
    }

    async fn change(&self, _: RequestedChange, _: Option<Duration>) -> Result<MemberList, MembershipError> {
        Err(MembershipError::NotLeader { leader: self.replica.leads() })
    }

    async fn transfer_leader(&self, _: Option<NodeId>) -> Result<Leader, TransferError> {
        Err(TransferError::NotLeader { leader: self.replica.leads() })
    }

    async fn take_snapshot(&self) -> Result<LogId, SnapshotError> {
        self.replica.take_snapshot().await
    }

    fn activity(&self) -> &Activity {
        self.replica.told.reader.activity()
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn log_stats(&self) -> Option<&LogStats> {
        None
    }

    fn settings(&self) -> Settings {
        self.settings.lock().expect("invariant: no panic under this lock").clone()
    }

    fn configure(&self, change: impl FnOnce(&mut Settings)) -> Result<Settings, ConfigureError> {
        let mut current = self.settings.lock().expect("invariant: no panic under this lock");
        let mut changed = current.clone();
        change(&mut changed);
        let kept = Settings { event_log: changed.event_log, ..current.clone() };
        if changed != kept {
            return Err(ConfigureError(
                "a replica can change its event log while it runs (event_log_operations, event_log_bytes, event_log_age_ms), and nothing else"
                    .to_owned(),
            ));
        }
        changed.check_event_log()?;
        self.replica.keep(changed.event_log);
        *current = changed.clone();
        Ok(changed)
    }

    fn following(&self) -> Option<FollowedSources> {
        let ReplicaConfig { sources, heartbeat, .. } = self.replica.config();
        Some(FollowedSources { sources, heartbeat })
    }

    fn follow_by(
        &self,
        FollowedSources { sources, heartbeat }: FollowedSources,
    ) -> Result<(), ConfigureError> {
        self.replica.follow_by(sources, heartbeat).map_err(|error| ConfigureError(error.to_string()))
    }

    fn received(&self) -> Option<ReceivedTotals> {
        let state = self.replica.state();
        Some(ReceivedTotals { entries: state.received_entries, bytes: state.received_bytes })
    }

    async fn set_state_quota(&self, _: Option<u64>) -> Result<LogId, QuotaError> {
        Err(QuotaError::Write(WriteError::NotLeader { leader: self.replica.leads() }))
    }

    /// For watches, of what the replica follows.
    async fn follow(&self, after: Bookmark) -> Result<FeedCursor, FollowError> {
        let applied = self.replica.told.reader.progress().next_index();
        let level = if after.index < applied { ReadLevel::Local } else { ReadLevel::Linearizable };
        self.replica.state_at(ReadOptions::from(level).after(after)).await?;
        let (first, next) =
            (self.replica.feed_reach().first, if after.index == 0 { 0 } else { after.index + 1 });
        match next < first {
            true => Err(FollowError::Compacted { after: after.index, first }),
            false => Ok(self.replica.cursor(next)),
        }
    }

    async fn follow_from_now(&self) -> Result<FeedCursor, FollowError> {
        let present = self.replica.confirm(Duration::ZERO).await?;
        Ok(self.replica.cursor(present + 1))
    }

    /// What follows a replica could follow one that follows it, and both would hear of nothing new; and it may have a part only.
    fn may_be_followed(&self) -> Result<(), ReadError> {
        Err(ReadError::NotLeader { leader: self.replica.leads() })
    }

    fn feed_reach(&self) -> FeedReach {
        self.replica.feed_reach()
    }

    async fn leading_snapshot(&self) -> Result<LeadingSnapshot, LeadError> {
        Err(ReadError::NotLeader { leader: self.replica.leads() }.into())
    }

    fn applied_clock(&self) -> (Option<LogId>, ClusterClock) {
        let progress = self.replica.told.reader.progress();
        (progress.log_id, progress.clock)
    }

    async fn held_state(&self) -> Result<HeldState<M::View>, ReadError> {
        let applied = self.replica.state_at(ReadLevel::Local.into()).await?;
        let pinned = Pinned::new(applied.progress, self.replica.told.reader.watch(), PINNED_BYTES);
        Ok(HeldState::new(applied, pinned))
    }
}
