//! The running core, behind our own types.
//!
//! openraft decides about terms, votes and commits. This file gives it a log, a network and a machine, asks it for what the engine wants,
//! and keeps its types out of everything above. What openraft cannot be asked for stands beside it:
//!
//! | part | for |
//! |---|---|
//! | [`LeaderLease`] | refuses proposals of a leader without its quorum; the leader's lease |
//! | [`ReadIndexes`] | one confirmation of leadership for all reads that wait |
//! | [`DurablePositions`] | which members hold which entries, for writes that wait for all |
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
//! `start` says them, each with its reason. Off are: its policy for snapshots and purges, its leader restore, and elections until
//! the silence after a start is over. Pre-vote is on.
//!
//! What it does not do: decide when to snapshot, purge, hand over or found a cluster. That is [`crate::engine`].

mod candidacy;
mod metrics;
mod proposals;
mod start;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{InitializeError, RaftError};
use openraft::raft::VoteRequest;
use openraft::{LinearizerOption, Raft, ServerState};
use tokio::sync::{oneshot, watch};

use self::candidacy::Candidacy;
pub(crate) use self::metrics::CoreMetrics;
pub(crate) use self::proposals::Proposed;
pub(crate) use self::start::{CoreConfig, Parts};
use super::activity::Activity;
use super::agreed_versions::AgreedVersions;
use super::agreement::Agreement;
use super::apply::Applier;
use super::clock::Reading;
use super::durable_positions::DurablePositions;
use super::lease::{LEASE_SHARE, LeaderLease};
use super::network::PeerDoor;
use super::network::progress::{PeerFitness, PeerProgress};
use super::network::service::{LastHeard, Offers};
use super::published::{Applied, Progress, Published};
pub(crate) use super::read_index::NoReadIndex;
use super::read_index::{self, ReadIndexes};
use super::type_config::{self, TypeConfig};
use crate::feed::Feed;
use crate::machine::StateMachine;
use crate::machine::sessions::SessionTable;
use crate::types::{self, Incarnation, LogId, Member, NodeId, ReadableVersions};

/// The running consensus core of one node. Cheap to clone.
pub(crate) struct Core<M: StateMachine> {
    raft: Raft<TypeConfig, Applier<M>>,
    published: Arc<Published<M::View>>,
    feed: Arc<Feed>,
    door: Arc<dyn PeerDoor>,
    heard: Arc<LastHeard>,
    offers: Arc<Offers>,
    reads: ReadIndexes,
    purge_mark: Arc<AtomicU64>,
    snapshot_bytes_per_second: Arc<AtomicU64>,
    durable_positions: Arc<DurablePositions>,
    admission: Arc<LeaderLease>,
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
            feed: self.feed.clone(),
            door: self.door.clone(),
            heard: self.heard.clone(),
            offers: self.offers.clone(),
            reads: self.reads.clone(),
            purge_mark: self.purge_mark.clone(),
            snapshot_bytes_per_second: self.snapshot_bytes_per_second.clone(),
            durable_positions: self.durable_positions.clone(),
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

    /// What was applied, for those who follow.
    pub(crate) fn feed(&self) -> &Arc<Feed> {
        &self.feed
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

    /// What an entry is to say of the time at which it is proposed here, `wall_ms` being what the wall clock shows.
    pub(crate) fn reading(&self, wall_ms: u64) -> Reading {
        self.activity.leader_clock.reading(wall_ms)
    }

    /// Which members are known to hold which entries on disk.
    pub(crate) fn durable_positions(&self) -> &Arc<DurablePositions> {
        &self.durable_positions
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
    /// ([`PeerService`](super::network::service::PeerService)). A leader that asks another to take over lets go of its lease for good.
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

    /// Sends each peer at most so many bytes of a snapshot in a second from now on; 0: as many as there can be.
    pub(crate) fn limit_snapshots(&self, bytes_per_second: u64) {
        self.snapshot_bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
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
