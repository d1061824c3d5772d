//! A node whose answers the tests hold back and let go, and which tells of itself what they set.

use super::*;
use std::collections::BTreeMap;

use crate::door::served::PinnedView;
use crate::engine::{
    Activity, Counters, FollowError, HeldState, LeadError, LeadingSnapshot, NewAddresses, NewMember, Pinned,
    QuotaError, RequestedChange, Settings, SnapshotPolicy,
};
use crate::error::{ConfigureError, MembershipError, SnapshotError, TransferError};
use crate::feed::{EventLogLimits, Feed, FeedCursor, FeedReach, Recorder};
use crate::raft::published::Progress;
use crate::report::{
    Carried, FeedReport, InFlight, Lag, LedPeer, MemberList, MemberReport, Offsets, SessionsReport, StateSize,
};
use crate::storage::LogStats;
use crate::types::{Bookmark, DiskStatus, NodeId};

pub(super) type Held = Box<dyn FnOnce() + Send>;

pub(super) const HISTORY: HistoryEpoch = HistoryEpoch(0xabc);

#[derive(Clone)]
pub(super) struct FakeNode {
    pub(super) inner: Arc<Mutex<Inner>>,
    pub(super) state: Arc<watch::Sender<NodeState>>,
    /// Writes and reads are answered while true.
    pub(super) open: Arc<watch::Sender<bool>>,
    pub(super) observed: Arc<Observed>,
    pub(super) proposed: Arc<watch::Sender<usize>>,
    pub(super) reading: Arc<watch::Sender<usize>>,
    pub(super) progress: Arc<watch::Sender<Progress>>,
}

pub(super) struct Inner {
    pub(super) machine: KvMachine,
    index: u64,
    feed: Arc<Feed>,
    recorder: Recorder,
    /// What the leader knows, if that is more.
    pub(super) present: Option<u64>,
    pub(super) held: Vec<Held>,
    /// Whose sessions were opened.
    pub(super) openers: Vec<String>,
}

impl Inner {
    /// Of a node with `feed`.
    fn with_feed(feed: Arc<Feed>) -> Self {
        let mut recorder = Recorder::new(feed.clone());
        recorder.begin(HISTORY, 0);
        Self {
            machine: KvMachine::default(),
            index: 0,
            feed,
            recorder,
            present: None,
            held: Vec::new(),
            openers: Vec::new(),
        }
    }

    pub(super) fn apply(&mut self, command: KvCommand) -> (LogId, KvReply) {
        let log_id = LogId::new(3, self.index + 1);
        let context = ApplyContext { log_id, elapsed_ms: 0, time_ms: 0 };
        let machine = &mut self.machine;
        let reply = self.recorder.tell(&context, |events| machine.apply_telling(&context, command, events));
        self.reach(log_id.index);
        (log_id, reply)
    }

    /// All up to `index` is applied; what comes newly is no command.
    pub(super) fn reach(&mut self, index: u64) {
        self.index = index;
        self.recorder.applied(index);
        self.recorder.publish();
    }

    /// Nothing more is applied.
    pub(super) fn end(&mut self) {
        self.recorder = Recorder::new(Feed::new(None));
    }

    /// The state comes whole, as it is after `index`.
    pub(super) fn begin(&mut self, history: HistoryEpoch, index: u64) {
        self.index = index;
        self.recorder.begin(history, index + 1);
    }
}

impl FakeNode {
    pub(super) fn new() -> Self {
        Self::with_feed(Feed::new(None))
    }

    pub(super) fn with_feed(feed: Arc<Feed>) -> Self {
        let state = NodeState {
            node_id: 7,
            role: Role::Leader,
            term: 3,
            in_touch: true,
            leader: Some(Leader { node_id: 7, client: "here:7801".to_owned() }),
            last_log: Some(0),
            committed: None,
            applied: None,
            overdue: false,
            snapshot: None,
            purged: None,
            membership: Membership::default(),
            disk: DiskState::Ok,
            diverged: None,
            forming: None,
            fatal: None,
        };
        Self {
            inner: Arc::new(Mutex::new(Inner::with_feed(feed))),
            state: Arc::new(watch::Sender::new(state)),
            open: Arc::new(watch::Sender::new(true)),
            observed: Arc::default(),
            proposed: Arc::default(),
            reading: Arc::default(),
            progress: Arc::default(),
        }
    }

    pub(super) fn hold(&self) {
        self.open.send_replace(false);
    }

    pub(super) fn release(&self) {
        self.open.send_replace(true);
        let held = std::mem::take(&mut self.inner.lock().unwrap().held);
        held.into_iter().for_each(|done| done());
    }
}

impl ServedNode for FakeNode {
    type Machine = KvMachine;

    async fn propose<F>(&self, command: KvCommand, options: WriteOptions, done: F)
    where
        F: FnOnce(Result<Acknowledged<KvReply>, WriteError>) + Send + 'static,
    {
        let mut inner = self.inner.lock().unwrap();
        let (log_id, reply) = inner.apply(command);
        let (ack, held_by) = (options.ack, vec![7]);
        let done = move || {
            done(Ok(Acknowledged {
                log_id,
                reply: Some(reply),
                ack,
                held_by,
                repeated: false,
                applied_here: true,
            }))
        };
        if *self.open.borrow() {
            drop(inner);
            done();
        } else {
            inner.held.push(Box::new(done));
        }
        self.proposed.send_modify(|proposed| *proposed += 1);
    }

    fn current_history(&self) -> CurrentHistory {
        let history = CurrentHistory::default();
        history.set(HISTORY);
        history
    }

    async fn open_session(&self, opener: &str, _ttl_ms: u64) -> Result<OpenedSession, WriteError> {
        let mut inner = self.inner.lock().unwrap();
        inner.openers.push(opener.to_owned());
        let log_id = LogId::new(3, inner.index + 1);
        inner.reach(log_id.index);
        Ok(OpenedSession { session: 42, log_id })
    }

    async fn close_session(&self, session: u64, _: HistoryEpoch) -> Result<ClosedSession, WriteError> {
        let OpenedSession { session: open, log_id } = self.open_session("", 0).await?;
        Ok(ClosedSession { log_id, was_open: session == open })
    }

    async fn write(
        &self,
        command: KvCommand,
        options: WriteOptions,
    ) -> Result<Acknowledged<KvReply>, WriteError> {
        let (done, outcome) = oneshot::channel();
        self.propose(command, options, |result| {
            let _ = done.send(result);
        })
        .await;
        outcome.await.unwrap()
    }

    async fn read(&self, query: KvQuery, _: ReadOptions) -> Result<ReadOutcome<KvAnswer>, ReadError> {
        self.reading.send_modify(|reading| *reading += 1);
        self.open.subscribe().wait_for(|open| *open).await.unwrap();
        self.reading.send_modify(|reading| *reading -= 1);
        let inner = self.inner.lock().unwrap();
        let answer = KvMachine::query(&inner.machine.view(), query);
        Ok(ReadOutcome { applied: Some(LogId::new(3, inner.index)), answer })
    }

    async fn view(&self, _: ReadOptions) -> Result<(Option<LogId>, KvView), ReadError> {
        let inner = self.inner.lock().unwrap();
        Ok((Some(LogId::new(3, inner.index)), inner.machine.view()))
    }

    async fn pinned_view(&self, _: ReadOptions) -> PinnedView<KvMachine> {
        let inner = self.inner.lock().unwrap();
        let pinned = Pinned::new(*self.progress.borrow(), self.progress.subscribe(), PINNED_BYTES);
        Ok((Some(LogId::new(3, inner.index)), inner.machine.view(), pinned))
    }

    fn log_time_at(&self, elapsed_ms: u64) -> u64 {
        elapsed_ms
    }

    fn feed_from(&self, next: u64) -> FeedCursor {
        self.inner.lock().unwrap().feed.follow(next)
    }

    async fn present(&self) -> Result<u64, ReadError> {
        let inner = self.inner.lock().unwrap();
        Ok(inner.present.unwrap_or(inner.index))
    }

    fn state(&self) -> NodeState {
        self.state.borrow().clone()
    }

    fn watch(&self) -> watch::Receiver<NodeState> {
        self.state.subscribe()
    }
}

/// What the fake node says of the size of its state.
pub(super) const QUOTA: Quota = Quota { bytes: 2_000, source: QuotaSource::Memory };

/// How much a view of it may keep alive.
pub(super) const PINNED_BYTES: u64 = 1_000_000;

/// Changes that succeed concern this node; the others fail, each in its way.
pub(super) const WELL: NodeId = 4;

/// What the fake node tells of itself.
pub(super) struct Observed {
    pub(super) settings: Mutex<Settings>,
    pub(super) quota: Mutex<Option<Quota>>,
    pub(super) activity: Activity,
    pub(super) counters: Counters,
}

impl Default for Observed {
    fn default() -> Self {
        let settings = Settings {
            snapshots: SnapshotPolicy::default(),
            event_log: EventLogLimits::default(),
            max_command_bytes: 100,
            max_inflight_bytes: 1000,
            preferred_leader: false,
        };
        let (activity, counters) = (Activity::default(), Counters::default());
        Self { settings: Mutex::new(settings), quota: Mutex::default(), activity, counters }
    }
}

/// The largest that the fake accepts.
const MOST_INFLIGHT_BYTES: usize = 1000;

/// As the leader of nodes 2 and 3 knows a member; node 3 is a learner, and gone.
fn member(node_id: u64, leads: bool) -> MemberReport {
    let gone = node_id == 3;
    let led = LedPeer {
        standing: if gone { PeerStanding::Disconnected } else { PeerStanding::Connected },
        behind_entries: 2,
        behind: Duration::from_micros(1500),
        heard: (!gone).then_some(Duration::from_millis(30)),
        accepted_entries: 5,
        snapshot: None,
    };
    let matched = BTreeMap::from([(2, 8), (7, 10)]).remove(&node_id);
    MemberReport {
        node_id,
        peer: format!("10.0.0.{node_id}:7901"),
        client: format!("10.0.0.{node_id}:7801"),
        voter: !gone,
        incarnation: Some(Incarnation(u128::from(node_id))),
        matched: matched.filter(|_| leads),
        reachable: leads.then_some(!gone),
        carried: Some(carried(node_id)),
        led: (leads && node_id != 7).then_some(led),
    }
}

/// What was carried to and from a peer.
fn carried(node_id: NodeId) -> Carried {
    Carried { sent_bytes: 10 * node_id, received_bytes: 1, dials_failed: 2, ..Carried::default() }
}

/// The membership after a change.
fn changed() -> MemberList {
    let member = MemberReport {
        node_id: WELL,
        peer: "p:1".to_owned(),
        client: "c:1".to_owned(),
        voter: true,
        incarnation: Some(Incarnation(9)),
        matched: Some(5),
        reachable: Some(true),
        ..Default::default()
    };
    MemberList {
        members: vec![member],
        position: Some(LogId::new(3, 5)),
        joint: Some(true),
        ..Default::default()
    }
}

impl OperatedNode for FakeNode {
    fn report(&self) -> NodeReport {
        let state = self.state();
        let leads = state.role == Role::Leader;
        let quota = *self.observed.quota.lock().unwrap();
        NodeReport {
            node_id: state.node_id,
            cluster: "c".to_owned(),
            client: "here:7801".to_owned(),
            role: Some(state.role),
            term: state.term,
            leader: state.leader.clone(),
            ready: state.is_ready(),
            fatal: state.fatal.as_ref().map(ToString::to_string),
            diverged: state.diverged.as_ref().map(ToString::to_string),
            offsets: Offsets {
                last_log: state.last_log,
                committed: state.committed,
                applied: state.applied,
                snapshot: state.snapshot,
                purged: state.purged,
            },
            state_hash: Some(42),
            state: StateSize {
                bytes: Some(1_000),
                quota_bytes: quota.map(|quota| quota.bytes),
                quota_source: quota.map(|quota| quota.source),
            },
            lag: Some(Lag { entries: 1, time: Some(Duration::from_micros(250)), leader_heard: None }),
            disk: Some(DiskStatus { state: state.disk, ..DiskStatus::default() }),
            feed: Some(FeedReport {
                first_position: 2,
                next_position: 12,
                event_log_operations: 9,
                event_log_bytes: 900,
                event_log_failing: false,
                event_log_restarts: 1,
            }),
            sessions: SessionsReport { open: 4, bytes: 400, largest_opener: Some(3) },
            unknown_disk: None,
            replicas: Vec::new(),
            replica: None,
            in_flight: Some(InFlight { commands: 3, bytes: 300, waiting_for_all: 2 }),
            // Node 5 is no member any more.
            carried: Some([2, 3, 5].map(carried).into_iter().sum()),
            members: [2, 3, 7].map(|node_id| member(node_id, leads)).into(),
            membership: Some(LogId::new(3, 5)),
            joint: Some(true),
            history: HISTORY,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// It has applied nothing that could be followed.
    async fn follow(&self, after: Bookmark) -> Result<FeedCursor, FollowError> {
        Err(FollowError::Compacted { after: after.index, first: u64::MAX })
    }

    async fn follow_from_now(&self) -> Result<FeedCursor, FollowError> {
        self.follow(Bookmark::from(0)).await
    }

    async fn leading_snapshot(&self) -> Result<LeadingSnapshot, LeadError> {
        Err(SnapshotError::Nothing.into())
    }

    fn feed_reach(&self) -> FeedReach {
        FeedReach::default()
    }

    fn applied_clock(&self) -> (Option<LogId>, ClusterClock) {
        (self.state().applied, ClusterClock::default())
    }

    async fn held_state(&self) -> Result<HeldState<KvView>, ReadError> {
        Err(ReadError::Stopped { reason: "it has no states to hold".to_owned() })
    }

    async fn list_sessions(&self, after: u64, limit: usize) -> Result<SessionList, ReadError> {
        let info = |session| SessionInfo {
            session,
            opener: format!("192.0.2.1:{session}"),
            opened_ms: 1_000,
            used_ms: 2_000,
            expires_ms: 3_000,
            bytes: 64,
            unsettled: 1,
        };
        let mut sessions: Vec<_> = (1..=5).filter(|session| *session > after).map(info).collect();
        let more = sessions.len() > limit;
        sessions.truncate(limit);
        let clock = ClusterClock { elapsed_ms: 2_500, wall_offset_ms: 100, ..Default::default() };
        Ok(SessionList { applied: Some(LogId::new(3, 9)), clock, sessions, more })
    }

    async fn change(
        &self,
        change: RequestedChange,
        _: Option<Duration>,
    ) -> Result<MemberList, MembershipError> {
        let leader = Some(Leader { node_id: 2, client: "b:7801".to_owned() });
        match change {
            RequestedChange::Add { new: NewMember { node_id: WELL, peer }, promote: true, timeout }
                if peer == "p:1" && timeout == Duration::from_secs(60) =>
            {
                Ok(changed())
            }
            RequestedChange::Replace { old: 3, new, timeout } if timeout == Duration::from_millis(1) => {
                assert_eq!(new, NewMember { node_id: WELL, peer: "p:1".to_owned() });
                Ok(changed())
            }
            RequestedChange::Update { node_id: WELL, addresses } => {
                assert_eq!(addresses, NewAddresses { peer: None, client: Some("c:1".to_owned()) });
                Ok(changed())
            }
            RequestedChange::Promote { .. } => Err(MembershipError::NotLeader { leader }),
            RequestedChange::Demote { force: true, .. } => {
                Err(MembershipError::Timeout { step: "the demotion".to_owned(), waited_ms: 1 })
            }
            RequestedChange::Remove { .. } => {
                Err(MembershipError::WouldWeakenQuorum { voters: 2, healthy: 1, needed: 2 })
            }
            other => panic!("{other:?}"),
        }
    }

    async fn transfer_leader(&self, to: Option<NodeId>) -> Result<Leader, TransferError> {
        match to {
            None => Ok(Leader { node_id: WELL, client: "c:1".to_owned() }),
            Some(node_id) => Err(TransferError::NotInTouch { node_id }),
        }
    }

    async fn take_snapshot(&self) -> Result<LogId, SnapshotError> {
        Ok(LogId::new(3, 4))
    }

    fn activity(&self) -> &Activity {
        &self.observed.activity
    }

    fn counters(&self) -> &Counters {
        &self.observed.counters
    }

    fn log_stats(&self) -> Option<&LogStats> {
        None
    }

    async fn set_state_quota(&self, bytes: Option<u64>) -> Result<LogId, QuotaError> {
        match bytes {
            Some(bytes @ ..1_000) => Err(QuotaError::Range { bytes }),
            Some(9_999) => Err(QuotaError::Write(WriteError::NoQuorum)),
            Some(9_998) => {
                let leader = Some(Leader { node_id: 2, client: "b:7802".to_owned() });
                Err(QuotaError::Write(WriteError::NotLeader { leader }))
            }
            Some(9_997) => Err(QuotaError::Write(WriteError::Interrupted { leader: None })),
            _ => {
                let quota = bytes.map(|bytes| Quota { bytes, source: QuotaSource::Operator });
                *self.observed.quota.lock().unwrap() = Some(quota.unwrap_or(QUOTA));
                Ok(LogId::new(1, 9))
            }
        }
    }

    fn settings(&self) -> Settings {
        self.observed.settings.lock().unwrap().clone()
    }

    fn configure(&self, change: impl FnOnce(&mut Settings)) -> Result<Settings, ConfigureError> {
        let mut changed = self.settings();
        change(&mut changed);
        if changed.max_inflight_bytes > MOST_INFLIGHT_BYTES {
            return Err(ConfigureError("max_inflight_bytes is too large".to_owned()));
        }
        *self.observed.settings.lock().unwrap() = changed.clone();
        Ok(changed)
    }
}
