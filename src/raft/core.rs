//! The running core, behind our own types.
//!
//! openraft decides about terms, votes and commits. This file gives it a log, a network and a machine, asks it for what the engine wants,
//! and keeps its types out of everything above. What openraft cannot be asked for stands beside it:
//!
//! | part | for |
//! |---|---|
//! | [`Admission`] | refuses proposals of a leader without its quorum; the leader's lease |
//! | [`ReadIndexes`] | one confirmation of leadership for all reads that wait |
//! | [`Held`] | which members hold which entries, for writes that wait for all |
//! | [`PeerFitness`] | what peers say of themselves in their answers: disk, lease, state, versions |
//! | `Candidacy` | whether this node stands for election |
//! | [`Published`] | how far the machine is, and views of it |
//! | [`Offers`] | hand-overs that a leader has announced |
//!
//! # Promises
//!
//! - A proposal ends exactly once, in one [`Proposed`], which says whether the entry may be in the log. Its responder reports
//!   also when openraft drops it.
//! - A node that has ever had a log neither votes nor stands for the length of a lease after its start, or for as long as it promised before.
//! - A hand-over voids the lease before anything else happens. [`lease`](super::lease) has the orders that count.
//!
//! # Settings of openraft
//!
//! `raft_config` says them, each with its reason. Off are: its policy for snapshots and purges, its leader restore, and elections until
//! the silence after a start is over. Pre-vote is on.
//!
//! What it does not do: decide when to snapshot, purge, hand over or found a cluster. That is [`crate::engine`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{ClientWriteError, InitializeError, RaftError};
use openraft::raft::{ClientWriteResult, VoteRequest};
use openraft::{Config, LinearizerOption, Raft, ServerState, SnapshotPolicy};
use tokio::sync::{oneshot, watch};

use super::activity::Activity;
use super::agreed_versions::AgreedVersions;
use super::agreement::Agreement;
use super::apply::Applier;
use super::clock::Reading;
use super::consensus_tasks;
use super::held::Held;
use super::lease::{Admission, Closed, LEASE_SHARE};
use super::log::RaftLog;
use super::network::PeerDoor;
use super::network::addresses::{Addresses, Seen};
use super::network::client::PeerClients;
use super::network::plausible;
use super::network::progress::{PeerFitness, PeerProgress};
use super::network::service::{Callee, LastHeard, Offers, PeerService, Promise};
use super::published::{Applied, Progress, Published};
pub(crate) use super::read_index::NoReadIndex;
use super::read_index::{self, ReadIndexes};
use super::type_config::{self, Answer, Command, OnFlushed, Responder, TypeConfig, leader};
use crate::error::Leader;
use crate::machine::StateMachine;
use crate::machine::sessions::SessionTable;
use crate::runtime::Tasks;
use crate::storage::{LogStore, SnapshotStore};
use crate::types::{self, Incarnation, LogId, Member, NodeId, ReadableVersions};

mod candidacy;
mod metrics;

use candidacy::Candidacy;
pub(crate) use metrics::Metrics;

/// Most entries in one message to a peer, and in one write to the log.
const MAX_BATCH_ENTRIES: u64 = 4096;

/// Commits that may wait to be applied. What waits is in memory anyway, and is bounded by bytes.
const APPLY_QUEUE: u64 = 1 << 16;
/// How peers that cannot be reached are retried.
const BACKOFF: &str = "20ms 40ms 80ms ...500ms";

/// What the core needs to know before it starts.
#[derive(Debug, Clone)]
pub(crate) struct CoreConfig {
    /// Name of the cluster, for its messages.
    pub cluster: String,
    /// This node.
    pub node_id: NodeId,
    /// Interval between heartbeats, in milliseconds.
    pub heartbeat_interval_ms: u64,
    /// Shortest election timeout, in milliseconds.
    pub election_timeout_min_ms: u64,
    /// Longest election timeout, in milliseconds.
    pub election_timeout_max_ms: u64,
    /// What that was before, if it was longer: a leader may still rely on it.
    pub promised_lease_ms: u64,
    /// Most bytes of entries in one message to a peer.
    pub message_bytes: usize,
}

/// Where the core keeps its state, and how it reaches its peers.
pub(crate) struct Parts<M: StateMachine> {
    /// The durable log.
    pub log: Arc<dyn LogStore>,
    /// The snapshots.
    pub snapshots: Arc<dyn SnapshotStore>,
    /// The state machine, recovered.
    pub applier: Applier<M>,
    /// The calling side of the network.
    pub clients: PeerClients,
    /// The answering side of the network.
    pub callee: Callee,
    /// What the core's tasks join.
    pub tasks: Tasks,
}

/// How a proposal ended.
#[derive(Debug)]
pub(crate) enum Proposed {
    /// Committed and applied.
    Applied {
        /// Where it stands.
        log_id: LogId,
        /// What it was answered.
        answer: Answer,
    },
    /// This leader has it on disk; nothing more is known. Only for [`Core::propose_to_leader`].
    Flushed {
        /// Where it stands.
        log_id: LogId,
    },
    /// This node leads, but has lost touch with its quorum; nothing was proposed.
    NoQuorum,
    /// This node does not lead; nothing was proposed.
    NotLeader(Option<Leader>),
    /// Leadership was lost with the entry in the log: it may yet be committed.
    Interrupted(Option<Leader>),
    /// The core had stopped before; nothing was proposed.
    Gone,
    /// The core went away without an answer.
    Stopped,
}

impl From<Closed> for Proposed {
    fn from(closed: Closed) -> Self {
        match closed {
            Closed::Stopped => Self::Gone,
            Closed::NoQuorum => Self::NoQuorum,
        }
    }
}

/// The running consensus core of one node. Cheap to clone.
pub(crate) struct Core<M: StateMachine> {
    raft: Raft<TypeConfig, Applier<M>>,
    published: Arc<Published<M::View>>,
    door: Arc<dyn PeerDoor>,
    heard: Arc<LastHeard>,
    offers: Arc<Offers>,
    reads: ReadIndexes,
    purge_mark: Arc<AtomicU64>,
    held: Arc<Held>,
    admission: Arc<Admission>,
    fitness: Arc<PeerFitness>,
    activity: Arc<Activity>,
    agreement: Arc<Agreement>,
    agreed_versions: Arc<AgreedVersions>,
    candidacy: Arc<Candidacy>,
    /// A leader not heard of for this long may have been replaced.
    lease: Duration,
}

impl<M: StateMachine> Clone for Core<M> {
    fn clone(&self) -> Self {
        Self {
            raft: self.raft.clone(),
            published: self.published.clone(),
            door: self.door.clone(),
            heard: self.heard.clone(),
            offers: self.offers.clone(),
            reads: self.reads.clone(),
            purge_mark: self.purge_mark.clone(),
            held: self.held.clone(),
            admission: self.admission.clone(),
            fitness: self.fitness.clone(),
            activity: self.activity.clone(),
            agreement: self.agreement.clone(),
            agreed_versions: self.agreed_versions.clone(),
            candidacy: self.candidacy.clone(),
            lease: self.lease,
        }
    }
}

impl<M: StateMachine> Core<M> {
    /// Starts the core: recovers, and takes part in elections if this node is a voter.
    ///
    /// # Errors
    /// What openraft says when it cannot recover from the log and the snapshots.
    pub(crate) async fn start(config: &CoreConfig, mut parts: Parts<M>) -> Result<Self, String> {
        let (published, activity) = (parts.applier.published(), parts.applier.activity());
        let (agreement, agreed_versions) = (parts.applier.agreement(), parts.applier.agreed_versions());
        parts.clients.count_in(activity.clone());
        parts.clients.judged_by(agreement.clone());
        let purge_mark = parts.clients.purge_mark();
        let addresses = parts.clients.addresses();
        let (held, fitness) = (parts.clients.held(), parts.clients.fitness());
        let own = (config.node_id, parts.callee.incarnation);
        if let Some(vote) = parts.log.vote() {
            // The next one is not to be out of bounds.
            if vote.term >= plausible::LARGEST_TERM {
                return Err(format!("this node has voted in term {}, after which there is none", vote.term));
            }
            activity.had_voted(vote);
        }
        let tasks = &parts.tasks;
        let (log, telling) =
            RaftLog::new(parts.log.clone(), config.message_bytes, own, held.clone(), activity.clone());
        tasks.passing("flushed-writes", telling);
        let raft_config = raft_config(config)?;
        let raft = Raft::new(config.node_id, Arc::new(raft_config), parts.clients, log, parts.applier);
        let raft = consensus_tasks::joining(tasks, raft).await.map_err(|error| type_config::fatal(&error))?;
        follow_membership(&raft, &addresses);
        // The core reports its state before it answers: from here on peers are checked against the membership.
        let has_confirmed = raft.is_initialized().await.map_err(|error| type_config::fatal(&error))?;
        let voter_lease = Duration::from_millis(config.election_timeout_max_ms);
        // A leader may rely on what this node confirmed before it was restarted, so for a while it elects nobody, neither
        // others, see `PeerService`, nor itself. An election that the leader asks for is not held up.
        let silence = match has_confirmed {
            true => voter_lease.max(Duration::from_millis(config.promised_lease_ms)),
            false => Duration::ZERO,
        };
        let candidacy = Arc::new(Candidacy::silent());
        let (elects, candidate) = (raft.clone(), candidacy.clone());
        tasks.passing("silence", async move {
            tokio::time::sleep(silence).await;
            candidate.silence_is_over(&elects);
        });
        let lease = voter_lease.saturating_mul(2);
        let reads = ReadIndexes::start(raft.clone(), lease, activity.clone(), tasks);
        let service = PeerService::new(
            parts.callee,
            raft.clone(),
            (parts.log, parts.snapshots),
            reads.clone(),
            (activity.clone(), agreement.clone()),
            Promise { silence, lease: voter_lease },
        );
        let (heard, offers) = (service.last_heard(), service.offers());
        let admission = Arc::new(Admission::new(raft.metrics(), voter_lease));
        let door = Arc::new(service);
        Ok(Self {
            raft,
            published,
            door,
            heard,
            offers,
            reads,
            purge_mark,
            held,
            admission,
            fitness,
            activity,
            agreement,
            agreed_versions,
            candidacy,
            lease,
        })
    }

    pub(super) fn raft(&self) -> &Raft<TypeConfig, Applier<M>> {
        &self.raft
    }

    /// What this node shows to its peers.
    pub(crate) fn door(&self) -> Arc<dyn PeerDoor> {
        self.door.clone()
    }

    /// The applied state.
    pub(crate) fn published(&self) -> &Arc<Published<M::View>> {
        &self.published
    }

    /// A view of the state with everything that has been applied by now. Does not return when the core has
    /// stopped without leaving one.
    pub(crate) async fn view(&self) -> Arc<Applied<M::View>> {
        loop {
            // Each time: the view that is waited for may be let go of before it is seen.
            let next_index = self.published.progress().next_index();
            if let Some(view) = self.published.view_from(next_index) {
                return view;
            }
            if self.published.want_view() {
                self.have_view_taken();
            }
            if let Some(view) = self.published.wait_view(next_index).await {
                return view;
            }
        }
    }

    /// Has the apply task look whether a view is wanted: after its next batch it does so by itself, this is for when there is
    /// none. In a task of its own, because the reader may give up, and others rely on its having asked.
    fn have_view_taken(&self) {
        let raft = self.raft.clone();
        crate::runtime::spawn(async move {
            // Nobody looks when the core has stopped.
            let _ = raft
                .external_state_machine_request(|applier| {
                    // A machine that panics here has the apply task panic, as it would after a batch.
                    applier.publish_if_wanted();
                    Box::pin(std::future::ready(()))
                })
                .await;
        });
    }

    /// The table of sessions, and up to where it has been applied; `None` when the core has stopped.
    pub(crate) async fn sessions(&self) -> Option<(Progress, SessionTable)> {
        let (done, table) = oneshot::channel();
        let asked = self.raft.external_state_machine_request(move |applier| {
            // Whoever asked may have given up.
            let _ = done.send(applier.sessions());
            Box::pin(std::future::ready(()))
        });
        asked.await.ok()?;
        table.await.ok()
    }

    /// Proposes `command`; `done` is called exactly once.
    pub(crate) async fn propose(&self, command: Bytes, done: impl FnOnce(Proposed) + Send + 'static) {
        if let Err(closed) = self.admission.check() {
            return done(closed.into());
        }
        let responder = Responder::new(|outcome| done(outcome.map_or(Proposed::Stopped, proposed)));
        // On failure the responder has been dropped, and has reported so.
        let _ = self.raft.client_write_ff(Command::new(command), Some(responder)).await;
    }

    /// Proposes `command`; `done` is called exactly once: with [`Proposed::Flushed`] as soon as this leader has it on
    /// disk, or with what went wrong before. `ended` is called exactly once, when it has been applied here or is lost
    /// to this node.
    pub(crate) async fn propose_to_leader(
        &self,
        command: Bytes,
        done: impl FnOnce(Proposed) + Send + 'static,
        ended: impl FnOnce() + Send + 'static,
    ) {
        if let Err(closed) = self.admission.check() {
            done(closed.into());
            return ended();
        }
        let done = Arc::new(Mutex::new(Some(done)));
        let once = move |outcome| {
            let done = done.lock().expect("invariant: no panic under this lock").take();
            if let Some(done) = done {
                done(outcome);
            }
        };
        let flushed = once.clone();
        let on_flushed = OnFlushed::new(move |log_id| flushed(Proposed::Flushed { log_id }));
        let command = Command { bytes: command, on_flushed: Some(on_flushed) };
        let responder = Responder::new(move |outcome| {
            once(outcome.map_or(Proposed::Stopped, proposed));
            ended();
        });
        let _ = self.raft.client_write_ff(command, Some(responder)).await;
    }

    /// What an entry is to say of the time at which it is proposed here, `wall_ms` being what the wall clock shows.
    pub(crate) fn reading(&self, wall_ms: u64) -> Reading {
        self.activity.leader_clock.reading(wall_ms)
    }

    /// Which members are known to hold which entries on disk.
    pub(crate) fn held(&self) -> &Arc<Held> {
        &self.held
    }

    /// Those who vote at present.
    pub(crate) fn voters(&self) -> BTreeMap<NodeId, Incarnation> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let incarnation = |node_id| membership.get_node(&node_id).map(|member| (node_id, member.incarnation));
        membership.voter_ids().filter_map(incarnation).collect()
    }

    /// As [`shared_read_index`](Self::shared_read_index), without asking anybody: a quorum answered a short while ago, and no
    /// voter that did so elects another leader before this one's lease is over (Raft thesis, §6.4.1).
    ///
    /// The lease is a tenth shorter than what voters wait for, as they say themselves, in case their clocks run faster. A
    /// voter that was restarted does not know of its promise: it elects nobody for the length of a lease
    /// ([`PeerService`]). A leader that asks another to take over lets go of its lease for good.
    ///
    /// # Errors
    /// [`NoReadIndex::NoQuorum`] when there is no lease, [`NoReadIndex::NotLeader`] on other nodes.
    pub(crate) async fn lease_index(&self) -> Result<u64, NoReadIndex> {
        let shortest = || self.fitness.shortest_lease(self.admission.lease, &self.voters());
        let lease = shortest();
        let option = LinearizerOption::new(Some(lease.mul_f64(LEASE_SHARE)), false);
        let index = read_index::ask(&self.raft, option.with_wait_timeout(Duration::ZERO)).await?;
        // What the core went by may be an answer that came since, of a voter that promises less.
        if shortest() < lease {
            return Err(NoReadIndex::NoQuorum("a voter's lease is shorter than was known".to_owned()));
        }
        // Looked at last: a transfer that began before this was seen is a transfer that ends after this read.
        if self.admission.is_lease_void() {
            return Err(NoReadIndex::NoQuorum("leadership is being handed over".to_owned()));
        }
        Ok(index)
    }

    /// An index such that a state that has applied it has seen every write acknowledged before this call
    /// (Raft thesis, §6.4). Costs a round of heartbeats, shared by all who ask at the same time, peers included.
    ///
    /// # Errors
    /// See [`NoReadIndex`].
    pub(crate) async fn shared_read_index(&self) -> Result<u64, NoReadIndex> {
        self.reads.next().await
    }

    /// Whether the log or the vote shows that this node belongs to a cluster.
    pub(crate) async fn is_initialized(&self) -> bool {
        self.raft.is_initialized().await.unwrap_or(true)
    }

    /// Writes the founding membership into an empty log. A node that has a log already is left alone, so
    /// every founder may call this, with the same members.
    ///
    /// # Errors
    /// When this node is not among `members`, or the core has stopped.
    pub(crate) async fn initialize(&self, members: BTreeMap<NodeId, Member>) -> Result<(), String> {
        match self.raft.initialize(members).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(RaftError::APIError(InitializeError::NotInMembers(_))) => {
                Err("this node is not one of the founding members that it was given".to_owned())
            }
            Err(RaftError::Fatal(fatal)) => Err(type_config::fatal(&fatal)),
        }
    }

    /// Asks for a snapshot of the present state; it is taken in the background.
    pub(crate) async fn snapshot(&self) {
        // A core that has stopped takes none.
        let _ = self.raft.trigger().snapshot().await;
    }

    /// Removes entries up to `upto` that a snapshot covers.
    pub(crate) async fn purge(&self, upto: u64) {
        self.purge_mark.fetch_max(upto, Ordering::Relaxed);
        let _ = self.raft.trigger().purge_log(upto).await;
    }

    /// Asks `to` to take the lead at once, because that node `wants_lead` or for another reason. Ignored unless this node
    /// leads.
    pub(crate) async fn transfer_leader(&self, to: NodeId, wants_lead: bool) {
        self.admission.void_lease();
        // This node's own vote is one of those that the other one needs.
        let vote = self.raft.metrics().borrow_watched().vote;
        self.offers.note(vote, to, wants_lead);
        if self.is_handing_over() {
            self.activity.transfer_begun();
        }
        let _ = self.raft.trigger().transfer_leader(to).await;
    }

    /// Tells of every hand-over that this node begins.
    pub(crate) fn hand_overs(&self) -> watch::Receiver<()> {
        self.admission.hand_overs()
    }

    /// Whether this node leads and has asked another one to take over. openraft has no way back from there.
    pub(crate) fn is_handing_over(&self) -> bool {
        self.raft.metrics().borrow_watched().state == ServerState::Leader && self.admission.is_lease_void()
    }

    /// Whether the core is gone, or will be.
    pub(crate) fn has_stopped(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.running_state.is_err() || metrics.state == ServerState::Shutdown
    }

    /// Ends this node's term, if it leads: it votes in the next one, as if `candidate`, with a log as long as its own, had
    /// asked it to. Nobody is told of that vote, so nobody wins by it; if `candidate` asks for it later its log is compared
    /// like anybody's. This node stands for election itself when its timeout has passed.
    pub(crate) async fn give_up_lead(&self, candidate: NodeId) {
        let metrics = self.raft.metrics().borrow_watched().clone();
        let (ServerState::Leader, Some(last_index)) = (metrics.state, metrics.last_log_index) else { return };
        // Every leader's last entry is of its own term, and one that hands over appends nothing more.
        let last_log_id = type_config::log_id(LogId::new(metrics.current_term, last_index));
        let next = types::Vote { term: metrics.current_term + 1, node_id: candidate, committed: false };
        let mut request = VoteRequest::new(type_config::vote(next), Some(last_log_id));
        request.leadership_transfer = true;
        match self.raft.vote(request).await {
            Ok(_) => self.activity.lead_given_up(),
            Err(RaftError::Fatal(fatal)) => {
                let error = type_config::fatal(&fatal);
                tracing::error!(error, "the core does not give up the lead");
            }
        }
    }

    /// Peers that have answered this node, as their leader, a short while ago, and whether their disks are well.
    pub(crate) fn peers_in_touch(&self) -> BTreeMap<NodeId, bool> {
        self.fitness.within(self.lease)
    }

    /// The same peers, and whether they are fit to lead.
    pub(crate) fn peers_fit_to_lead(&self) -> BTreeMap<NodeId, bool> {
        self.fitness.fit_within(self.lease)
    }

    /// Of those, the ones whose disks hang.
    pub(crate) fn peers_stalled(&self) -> BTreeSet<NodeId> {
        self.fitness.stalled_within(self.lease)
    }

    /// Tells when a peer has said something else of itself than before.
    pub(crate) fn peer_changes(&self) -> watch::Receiver<()> {
        self.fitness.changes()
    }

    /// Waits until something has happened that [`changes`](Self::changes) do not tell of. For one caller.
    pub(crate) async fn noticed(&self) {
        self.activity.noticed.notified().await;
    }

    /// Waits until a write of the log is submitted, or was since the last look. For one caller.
    pub(crate) async fn write_submitted(&self) {
        self.activity.writes.submitted().await;
    }

    /// Whether a write of the log was submitted since this was last asked.
    pub(crate) fn was_written(&self) -> bool {
        self.activity.writes.take()
    }

    /// What this node has counted of its own work.
    pub(crate) fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    /// Whether this node's state is the others'.
    pub(crate) fn agreement(&self) -> &Arc<Agreement> {
        &self.agreement
    }

    /// Whether this node stands for election from now on. It is silent after a start in any case.
    pub(crate) fn may_stand(&self, may: bool) {
        self.candidacy.wish(&self.raft, may);
    }

    /// What this node knows of its peers from its own messages to them.
    pub(crate) fn peer_progress(&self) -> BTreeMap<NodeId, PeerProgress> {
        self.fitness.progress()
    }

    /// The versions of the machine that the members have agreed on.
    pub(crate) fn agreed_versions(&self) -> &Arc<AgreedVersions> {
        &self.agreed_versions
    }

    /// See [`PeerFitness::forget_reads`].
    pub(crate) fn forget_peer_reads(&self) {
        self.fitness.forget_reads();
    }

    /// What the builds of peers read, as they said last, and in which data directories.
    pub(crate) fn peer_reads(&self) -> BTreeMap<NodeId, (Incarnation, Vec<ReadableVersions>)> {
        self.fitness.reads()
    }

    /// For how long the entry at `index` has been in this node's log, at least; `None` when it is not.
    pub(crate) fn entry_age(&self, index: u64) -> Option<Duration> {
        self.activity.appended.age(index)
    }

    /// How long ago this node first heard a leader say that the entry at `index` is committed; `None` when it has not.
    pub(crate) fn told_committed(&self, index: u64) -> Option<Duration> {
        self.activity.told_committed.age(index)
    }

    /// How long ago this node last heard its leader; `None` when it never has, or leads itself.
    pub(crate) fn leader_heard(&self) -> Option<Duration> {
        self.heard.ago()
    }

    /// Why a core that has gone away did so.
    pub(crate) async fn cause_of_death(&self) -> String {
        match self.raft.is_initialized().await {
            Ok(_) => "the consensus core stopped answering".to_owned(),
            Err(fatal) => format!("the consensus core stopped: {}", type_config::fatal(&fatal)),
        }
    }

    /// Stops the core and waits until it has stopped.
    pub(crate) async fn shutdown(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::error!(%error, "the core did not stop in order");
        }
    }
}

/// Has peers be dialled where the membership says.
fn follow_membership<M: StateMachine>(raft: &Raft<TypeConfig, Applier<M>>, addresses: &Addresses) {
    let membership = raft.metrics();
    addresses.follow(move |node_id| {
        let metrics = membership.borrow_watched();
        let stored = &metrics.membership_config;
        Seen {
            at: stored.log_id().as_ref().map(type_config::from_log_id),
            member: stored.membership().get_node(&node_id).cloned(),
        }
    });
}

fn raft_config(config: &CoreConfig) -> Result<Config, String> {
    Config {
        cluster_name: config.cluster.clone(),
        heartbeat_interval: config.heartbeat_interval_ms,
        election_timeout_min: config.election_timeout_min_ms,
        election_timeout_max: config.election_timeout_max_ms,
        max_payload_entries: MAX_BATCH_ENTRIES,
        max_append_entries: Some(MAX_BATCH_ENTRIES),
        // While entries wait for a snapshot one is queued per commit, and the core stops when the queue is full: no heartbeats,
        // no votes. What is in flight is to reach its limit first.
        state_machine_channel_size: Some(APPLY_QUEUE),
        // Snapshots and purges are triggered by the engine, which also counts bytes.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        // A follower is sent a snapshot only when the log no longer holds what it needs.
        replication_lag_threshold: u64::MAX,
        // Snapshots have idle timeouts of their own.
        install_snapshot_timeout: Duration::from_secs(24 * 3600).as_millis() as u64,
        enable_pre_vote: Some(true),
        // Until it is known whether this node must be silent first.
        enable_elect: false,
        // The state machine is in memory: a restarted leader must be elected again.
        enable_leader_restore: Some(false),
        backoff: BACKOFF.to_owned(),
        ..Config::default()
    }
    .validate()
    .map_err(|error| error.to_string())
}

fn proposed(result: ClientWriteResult<TypeConfig>) -> Proposed {
    match result {
        Ok(response) => {
            Proposed::Applied { log_id: type_config::from_log_id(&response.log_id), answer: response.data }
        }
        Err(ClientWriteError::ForwardToLeader(forward)) => Proposed::NotLeader(leader(forward)),
        Err(ClientWriteError::LogEntryDiscarded(forward)) => Proposed::Interrupted(leader(forward)),
        // Only membership changes and conditional writes end like this.
        Err(ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_)) => {
            Proposed::Stopped
        }
    }
}
