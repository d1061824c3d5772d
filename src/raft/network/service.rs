//! The answering side: admits peers and passes their requests to the core.
//!
//! openraft's core takes what it is told for true, and relies on appends being processed and answered in order: it takes a conflict
//! below what has matched for a follower that lost its disk. A network loses, delays, doubles and reorders messages, and any
//! program may call. So nothing reaches the core before its caller is admitted, its message is [plausible], and its turn has come.
//!
//! ```text
//! handshake -> door: a member, in the right directory? -> requests of one connection
//!                                                           |
//!      in order, late ones dropped:  append, votes, hand-over -> plausible? -> room on the disk? -> core
//!      one at a time:                pieces of a snapshot     -> plausible? -> file -> read whole  -> core
//!      in any order:                 read index, announcement, comparison     -> what the leader keeps
//!      each its own task:            forwarded calls, each number once        -> the engine's desk
//! ```
//!
//! - `door`: whom it admits;
//! - `pieces`: snapshots, piece by piece;
//! - `offers`: hand-overs that a leader has announced;
//! - `forwarded`: calls that members pass on to their leader.
//!
//! # Invariants
//!
//! - Answers to appends leave in the order of their requests, each with what this node says of itself: disk, lease, state, versions.
//! - Only a leader appends and only a candidate asks for votes: the sender is who was admitted, whatever the message says.
//! - To refuse is the same as to lose, so a refusal breaks nothing of Raft. A leader that was deposed is told of the newer term first.
//! - A restarted node grants no vote before its [silence](Promise) is over, unless its leader itself has asked for the election.
//! - An entry that this build could not apply is refused before it is in the log. If it is committed the node stops, and says why.
//! - Blank entries and memberships always pass a full disk; commands pass while there is room for them.
//!
//! # What it does not do
//!
//! Prove who calls: a caller that knows a member's name, id and incarnation passes for that member. Repeat anything.

mod door;
mod forwarded;
mod offers;
mod pieces;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{FuturesOrdered, FuturesUnordered};
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, VoteRequest};
use openraft::{EntryPayload, Raft, ServerState};
use tokio::sync::mpsc;
use tokio::time::Instant;

pub(crate) use self::forwarded::{Carried, Desk};
use self::forwarded::{Forwarded, Standing};
pub(crate) use self::offers::Offers;
use self::pieces::Unreadable;
use super::admission::Claim;
use super::calls::room::{Level, Rooms};
use super::incoming::Incoming;
use super::plausible::{self, Bearings, Statements};
use super::upstream::Announcement;
use super::wire::{self, Malformed};
use crate::machine::StateMachine;
use crate::proto::peer::{self as proto, Request, Response, request, response};
use crate::raft::activity::Activity;
use crate::raft::agreement::{Agreement, Told};
use crate::raft::apply::Applier;
use crate::raft::envelope::Unusable;
use crate::raft::read_index::ReadIndexes;
use crate::raft::type_config::{self, TypeConfig, Vote};
use crate::shown::without_directories;
use crate::storage::{DiskState, DiskWatch, LogStore, Origin, SnapshotStore, Taken};
use crate::types::{self, Incarnation, InitialState, LogId, NodeId, check_agreed, check_initial_state};

/// Requests of one connection that the core is working on; more stay in the connection.
const REQUESTS_IN_PROGRESS: usize = 64;
/// The same for requests that may be answered in any order.
const UNORDERED_IN_PROGRESS: usize = 1024;

/// What a leader is told that sends more than there is room for; it tries again.
const DISK_FULL: &str = "the disk is full";

/// Who answers.
#[derive(Clone)]
pub(crate) struct Callee {
    /// Name of the cluster.
    pub cluster: String,
    /// This node.
    pub node_id: NodeId,
    /// Its data directory.
    pub incarnation: Incarnation,
    /// Its advertised peer address.
    pub peer_address: String,
    /// Its advertised client address.
    pub client_address: String,
    /// It was started to be added to a cluster, and forms none.
    pub joins: bool,
    /// The founding members it was given, with their peer addresses.
    pub founders: BTreeMap<NodeId, String>,
    /// Called when a caller expects another data directory, and this node belongs to no cluster yet. It is only a claim, to be
    /// looked into.
    pub claimed: Arc<dyn Fn(Claim) + Send + Sync>,
    /// Where what members announce goes while this node leads. Bounded: a member repeats what is not accepted.
    pub announcements: mpsc::Sender<(NodeId, Announcement)>,
    /// What it does for members that pass calls on to it.
    pub desk: Arc<dyn Desk>,
    /// The disk under its log.
    pub disk: DiskWatch,
    /// The quota on the state that it could bear, if that is known.
    pub quota_bytes: Option<u64>,
    /// The state that its machine begins with, if it has applied nothing yet.
    pub initial_state: Option<InitialState>,
    /// Called when something is committed that this build does not read, with what that is.
    pub outdated: Arc<dyn Fn(String) + Send + Sync>,
}

/// Why a request is not answered.
#[derive(Debug, thiserror::Error)]
enum Unanswered {
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
    fn failed(error: impl std::fmt::Display) -> Self {
        Self::Failed(error.to_string())
    }
}

/// What is logged of refusals: one in a while, whoever calls and however often.
#[derive(Debug, Default)]
struct Complaints(Mutex<(Option<Instant>, u64)>);

impl Complaints {
    /// How long nothing more is logged.
    const PAUSE: Duration = Duration::from_secs(1);

    /// Whether to log now, and how many were not logged since the last time.
    fn is_due(&self) -> Option<u64> {
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
    fn refused(&self, from: NodeId, refused: &Unanswered) {
        if !matches!(refused, Unanswered::Failed(_))
            && let Some(unsaid) = self.is_due()
        {
            tracing::warn!(node = from, %refused, unsaid, "refused a peer's message");
        }
    }
}

/// Answers peers on behalf of one node.
pub(crate) struct PeerService<M: StateMachine> {
    callee: Callee,
    raft: Raft<TypeConfig, Applier<M>>,
    /// Gone once the core has stopped: a handle to the node must not keep its data directory.
    log: Weak<dyn LogStore>,
    snapshots: Arc<dyn SnapshotStore>,
    /// What leaders have said of their logs.
    statements: Arc<Statements>,
    agreement: Arc<Agreement>,
    offers: Arc<Offers>,
    /// What is refused over and over is logged now and then.
    complaints: Arc<Complaints>,
    /// A snapshot that this node cannot read is not received again and again.
    unreadable: Arc<Mutex<Option<Unreadable>>>,
    /// Held while a received snapshot is being installed. openraft answers a second installation of the
    /// same snapshot at once, before the first one is durable.
    installing: Arc<tokio::sync::Mutex<()>>,
    reads: ReadIndexes,
    /// How many calls are under way that members have passed on.
    forwarded: Arc<Rooms<Level>>,
    heard: Arc<LastHeard>,
    activity: Arc<Activity>,
    /// Until when this node elects nobody: see [`Promise`].
    silent_until: Instant,
    /// See [`Promise`].
    lease: Duration,
}

/// What a leader may rely on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Promise {
    /// For how long this node grants no vote from now on, unless the leader itself has asked for the election: before it
    /// was restarted it may have confirmed a leader, which relies on not being replaced meanwhile.
    pub silence: Duration,
    /// For how long after it has confirmed a leader it elects nobody else.
    pub lease: Duration,
}

/// When the leader was last heard.
#[derive(Debug, Default)]
pub(crate) struct LastHeard(std::sync::Mutex<Option<Instant>>);

impl LastHeard {
    fn now(&self) {
        *self.0.lock().expect("invariant: no panic under this lock") = Some(Instant::now());
    }

    /// How long ago that was.
    pub(crate) fn ago(&self) -> Option<Duration> {
        self.0.lock().expect("invariant: no panic under this lock").map(|at| at.elapsed())
    }

    /// Whether the leader was heard within `time`.
    pub(crate) fn within(&self, time: Duration) -> bool {
        self.ago().is_some_and(|ago| ago <= time)
    }
}

impl<M: StateMachine> Clone for PeerService<M> {
    fn clone(&self) -> Self {
        Self {
            callee: self.callee.clone(),
            raft: self.raft.clone(),
            log: self.log.clone(),
            snapshots: self.snapshots.clone(),
            statements: self.statements.clone(),
            agreement: self.agreement.clone(),
            offers: self.offers.clone(),
            complaints: self.complaints.clone(),
            unreadable: self.unreadable.clone(),
            installing: self.installing.clone(),
            reads: self.reads.clone(),
            forwarded: self.forwarded.clone(),
            heard: self.heard.clone(),
            activity: self.activity.clone(),
            silent_until: self.silent_until,
            lease: self.lease,
        }
    }
}

impl<M: StateMachine> PeerService<M> {
    /// A service that answers as `callee`.
    pub(crate) fn new(
        callee: Callee,
        raft: Raft<TypeConfig, Applier<M>>,
        (log, snapshots): (Arc<dyn LogStore>, Arc<dyn SnapshotStore>),
        reads: ReadIndexes,
        (activity, agreement): (Arc<Activity>, Arc<Agreement>),
        promise: Promise,
    ) -> Self {
        Self {
            callee,
            raft,
            log: Arc::downgrade(&log),
            snapshots,
            statements: Arc::default(),
            agreement,
            offers: Arc::new(Offers::new(activity.clone())),
            complaints: Arc::default(),
            unreadable: Arc::default(),
            installing: Arc::default(),
            reads,
            forwarded: Arc::default(),
            heard: Arc::default(),
            activity,
            silent_until: Instant::now() + promise.silence,
            lease: promise.lease,
        }
    }

    /// The hand-overs that leaders have announced; this node's own are to be noted there as well.
    pub(crate) fn offers(&self) -> Arc<Offers> {
        self.offers.clone()
    }

    /// When this node last heard its leader.
    pub(crate) fn last_heard(&self) -> Arc<LastHeard> {
        self.heard.clone()
    }

    async fn answer(self, from: NodeId, request: Request) -> Response {
        let id = request.id;
        let body = self.dispatch(from, request).await;
        let body = body.unwrap_or_else(|refused| self.refused(from, &refused));
        Response { id, body: Some(body) }
    }

    /// Says in the log, now and then, and to its sender that a message is not answered.
    fn refused(&self, from: NodeId, refused: &Unanswered) -> response::Body {
        self.complaints.refused(from, refused);
        response::Body::Failure(without_directories(&refused.to_string()))
    }

    async fn dispatch(&self, from: NodeId, request: Request) -> Result<response::Body, Unanswered> {
        match request.body.ok_or(Malformed("request is empty"))? {
            request::Body::Append(append) => self.append(from, append).await,
            request::Body::Vote(vote) => {
                let vote = self.vote_request(wire::from_vote_request(from, vote)?)?;
                let vote = self.authorised(vote).await?;
                let response = self.raft.vote(vote).await.map_err(Unanswered::failed)?;
                Ok(response::Body::Vote(wire::vote_response(response)))
            }
            request::Body::PreVote(vote) => {
                let mut vote = self.vote_request(wire::from_vote_request(from, vote)?)?;
                vote.leadership_transfer = false;
                self.check_silence()?;
                let response = self.raft.pre_vote(vote).await.map_err(Unanswered::failed)?;
                Ok(response::Body::Vote(wire::vote_response(response)))
            }
            request::Body::TransferLeader(transfer) => {
                let wants_lead = transfer.wants_lead;
                let transfer = wire::from_transfer(from, transfer)?;
                let (vote, to) = (*transfer.from_leader(), *transfer.to_node_id());
                self.bearings().candidate(vote.leader_id.term, None)?;
                if let Some(last) = transfer.last_log_id() {
                    plausible::position(type_config::from_log_id(last))?;
                }
                if vote == self.vote() {
                    self.offers.note(vote, to, wants_lead);
                }
                if to == self.callee.node_id && self.agreement.is_outvoted() {
                    let differs = "this node's state differs from the others': it is not to lead";
                    return Err(Unanswered::Failed(differs.to_owned()));
                }
                let response =
                    self.raft.handle_transfer_leader(transfer).await.map_err(Unanswered::failed)?;
                Ok(response::Body::TransferLeader(wire::transfer_response(response)))
            }
            request::Body::ReadIndex(_) => {
                Ok(response::Body::ReadIndex(wire::read_index_response(self.reads.next().await)))
            }
            request::Body::Announce(announcement) => {
                let announcement = wire::from_announce(announcement)?;
                let leads = self.raft.metrics().borrow_watched().state == ServerState::Leader;
                // A full queue is worked off before the member says so again.
                let accepted = leads && self.callee.announcements.try_send((from, announcement)).is_ok();
                Ok(response::Body::Announce(proto::AnnounceResponse { accepted }))
            }
            request::Body::Compare(compare) => {
                let metrics = self.raft.metrics().borrow_watched().clone();
                let checks = wire::from_compare::<M>(compare)?;
                let mut told = Told::new();
                if let (ServerState::Leader, Some(checks)) = (metrics.state, checks) {
                    self.agreement.told(from, checks);
                    let members = metrics.membership_config.membership().nodes();
                    told = self.agreement.all_told(&members.map(|(node_id, _)| *node_id).collect());
                }
                Ok(response::Body::Compare(wire::compare_response(&told)))
            }
            request::Body::Forward(_) => Err(Malformed("a forwarded call out of its turn").into()),
            request::Body::Hello(_) => Err(Malformed("a handshake in the middle of a connection").into()),
            request::Body::Snapshot(_) => Err(Malformed("a piece of a snapshot out of its turn").into()),
        }
    }

    async fn append(&self, from: NodeId, append: proto::AppendRequest) -> Result<response::Body, Unanswered> {
        let mut append = wire::from_append(from, append)?;
        let leader_commit = append.leader_commit.as_ref().map(|committed| committed.index);
        let previous = append.prev_log_id;
        let last = append.entries.last().map(|entry| entry.log_id).or(previous);
        let result = match self.deposed(append.vote) {
            // It may well contradict what has been committed since, and is to hear of the newer term.
            Some(newer) => AppendEntriesResponse::HigherVote(newer),
            None => {
                self.examine(&mut append)?;
                // Until they are written.
                let taken = take_entries(&self.callee.disk, &append);
                let _taken = taken.ok_or_else(|| Unanswered::Failed(DISK_FULL.to_owned()))?;
                self.raft.append_entries(append).await.map_err(Unanswered::failed)?
            }
        };
        if !matches!(result, AppendEntriesResponse::HigherVote(_)) {
            self.heard.now();
            if let Some(index) = leader_commit {
                self.activity.told_committed(index);
            }
        }
        let disk = self.callee.disk.state();
        let (unfit_to_lead, disk_stalled) = (!disk.takes_writes(), disk == DiskState::Stalled);
        let response = wire::append_response(result, previous, last);
        let own = proto::AppendResponse {
            unfit_to_lead,
            disk_stalled,
            lease_ms: self.lease_ms(),
            quota_bytes: self.callee.quota_bytes,
            state_differs: self.agreement.is_outvoted(),
            machines: wire::readable_versions(M::MACHINES),
            ..response
        };
        Ok(response::Body::Append(own))
    }

    /// Refuses what the sender of `append` cannot have meant, or what this node could not apply.
    fn examine(&self, append: &mut AppendEntriesRequest<TypeConfig>) -> Result<(), Unanswered> {
        let has_memberships =
            append.entries.iter().any(|entry| matches!(entry.payload, EntryPayload::Membership(_)));
        let bearings = if has_memberships { self.full_bearings(append.vote) } else { self.bearings() };
        bearings.append(append)?;
        // What is known here to be committed is the same there, and is not taken again: this build may have left its version
        // behind, and this node may begin with a snapshot.
        let is_new = |entry: &&type_config::Entry| {
            bearings.committed.is_none_or(|upto| entry.log_id.index > upto.index)
        };
        for entry in append.entries.iter().filter(is_new) {
            if let (EntryPayload::Membership(founders), 0) = (&entry.payload, entry.log_id.index) {
                self.check_founding(&type_config::from_membership(founders))?;
            }
            if let EntryPayload::Normal(command) = &entry.payload {
                let at = type_config::from_log_id(&entry.log_id);
                let examined = plausible::command::<M>(&command.bytes);
                examined.map_err(|why| self.refuse_entry(at, why, append))?;
            }
        }
        let term_at = |index: u64| {
            let found = self.log.upgrade()?.read(index, index + 1, usize::MAX).ok()?;
            found.first().filter(|entry| entry.log_id.index == index).map(|entry| entry.log_id.term)
        };
        Ok(self.statements.take(append, bearings.committed, term_at)?)
    }

    /// Refuses to begin with the log of a cluster that was founded with another state than this node's. One that was restored comes as
    /// a snapshot, a moment later; any other one this node will never have.
    fn check_founding(&self, founders: &types::Membership) -> Result<(), Unanswered> {
        let founding = founders.founding().map(|(_, founding)| founding);
        let versions = founding.map_or(&[][..], |founding| &founding.versions);
        if let Err(unsupported) = versions.iter().try_for_each(|agreed| check_agreed(*agreed, M::MACHINES)) {
            (self.callee.outdated)(unsupported.to_string());
            return Err(Unanswered::failed(unsupported));
        }
        let Err(other) = check_initial_state(founding, self.callee.initial_state) else { return Ok(()) };
        if founding.is_some_and(|founding| !founding.state.is_restored) {
            (self.callee.outdated)(other.to_string());
        }
        Err(Unanswered::failed(other))
    }

    /// Refuses the entry of `append` that stands `at`. One that this build does not read ends the node, if it is committed: all that
    /// follows in the log is out of its reach. Until then it may be taken back, and its leader is not to have proposed it.
    fn refuse_entry(
        &self,
        at: LogId,
        why: Unusable,
        append: &AppendEntriesRequest<TypeConfig>,
    ) -> Unanswered {
        let is_committed = append.leader_commit.as_ref().is_some_and(|committed| committed.index >= at.index);
        if why.unsupported.is_some() && is_committed && append.vote == self.vote() {
            (self.callee.outdated)(format!("entry {at}: {why}"));
        }
        Unanswered::Undecodable { at, why }
    }

    /// What this node judges messages by.
    fn bearings(&self) -> Bearings {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        Bearings {
            term: self.activity.term(),
            is_empty: metrics.last_log_index.is_none(),
            committed: metrics.local_committed.as_ref().map(type_config::from_log_id),
            memberships: Vec::new(),
        }
    }

    /// The same, with the memberships known here and the last one that the leader with this `vote` has sent, which may not
    /// have got to the core yet.
    fn full_bearings(&self, vote: Vote) -> Bearings {
        let bearings = self.bearings();
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let stored = [&metrics.membership_config, &metrics.committed_membership_config];
        let memberships = stored.into_iter().filter_map(|stored| {
            let at = type_config::from_log_id(stored.log_id().as_ref()?);
            Some((at, stored.membership().get_joint_config().clone()))
        });
        Bearings { memberships: memberships.chain(self.statements.membership(vote)).collect(), ..bearings }
    }

    fn vote_request(&self, request: VoteRequest<TypeConfig>) -> Result<VoteRequest<TypeConfig>, Malformed> {
        let last = request.last_log_id.as_ref().map(type_config::from_log_id);
        self.bearings().candidate(request.vote.leader_id.term, last)?;
        Ok(request)
    }

    /// Takes the mark of a hand-over off a request for a vote whose sender was not asked to stand by this node's leader.
    /// It is the leader's word that lets a voter break its promise to that leader.
    async fn authorised(
        &self,
        mut request: VoteRequest<TypeConfig>,
    ) -> Result<VoteRequest<TypeConfig>, Unanswered> {
        if request.leadership_transfer {
            request.leadership_transfer = self.offers.authorise(request.vote, || self.vote()).await;
        }
        if !request.leadership_transfer {
            self.check_silence()?;
        }
        Ok(request)
    }

    fn lease_ms(&self) -> u64 {
        u64::try_from(self.lease.as_millis()).unwrap_or(u64::MAX)
    }

    fn check_silence(&self) -> Result<(), Unanswered> {
        match Instant::now() >= self.silent_until {
            true => Ok(()),
            false => {
                let silent = "this node was restarted a moment ago; a leader may still rely on it";
                Err(Unanswered::Failed(silent.to_owned()))
            }
        }
    }

    fn vote(&self) -> Vote {
        self.raft.metrics().borrow_watched().vote
    }

    /// This node's vote, if that is newer than the `vote` of a leader, which then leads no more.
    fn deposed(&self, vote: Vote) -> Option<Vote> {
        Some(self.vote()).filter(|own| vote < *own)
    }

    fn standing_of(&self, caller: NodeId) -> Standing {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let member = metrics.membership_config.membership().get_node(&caller);
        Standing {
            is_told_by_leader: metrics.state == ServerState::Leader,
            directory: member.map(|member| member.incarnation),
        }
    }

    async fn run(self, from: NodeId, mut requests: Incoming<Request>, responses: mpsc::Sender<Response>) {
        // In order, because the caller's core takes a conflict that overtakes an acceptance for a lost disk.
        let mut working = FuturesOrdered::new();
        // What members ask of their leader is not for the core's log.
        let mut unordered = FuturesUnordered::new();
        // Nor for their leader's reads to wait behind.
        let (desk, others) = (self.callee.desk.clone(), self.forwarded.clone());
        let mut forwarded = Forwarded::new(desk, self.standing_of(from), others);
        let mut newest = 0;
        let mut incoming = None;
        let mut open = true;
        while open || !working.is_empty() || !unordered.is_empty() || !forwarded.is_empty() {
            tokio::select! {
                biased;
                // The caller is gone; what the core has taken in it will finish without us.
                () = responses.closed() => return,
                Some(response) = working.next() => {
                    if responses.send(response).await.is_err() {
                        return;
                    }
                }
                Some(response) = unordered.next() => {
                    if responses.send(response).await.is_err() {
                        return;
                    }
                }
                Some(answer) = forwarded.next() => {
                    if !answer.send(&responses).await {
                        return;
                    }
                }
                request = requests.recv(), if open
                    && working.len() < REQUESTS_IN_PROGRESS
                    && unordered.len() < UNORDERED_IN_PROGRESS => match request
                {
                    None => open = false,
                    // Delivered twice or late, they do no harm.
                    Some(request @ Request { body: Some(request::Body::ReadIndex(_) | request::Body::Announce(_) | request::Body::Compare(_)), .. }) => {
                        unordered.push(self.clone().answer(from, request));
                    }
                    Some(Request { id, body: Some(request::Body::Forward(call)) }) => {
                        forwarded.begin(id, call, self.standing_of(from), |refused| self.refused(from, &refused.into()));
                    }
                    // Late, or delivered twice.
                    Some(Request { id, .. }) if id <= newest => {}
                    Some(Request { id, body: Some(request::Body::Snapshot(piece)) }) => {
                        newest = id;
                        let is_awaited = piece.offset == 0 || incoming.is_some();
                        let taken = pieces::signs_of_life(id, &responses, self.vote(), self.take_piece(from, &mut incoming, piece));
                        let body = match taken.await {
                            Ok(response) => response::Body::Snapshot(response),
                            Err(refused) => {
                                // The caller begins anew. What it has sent meanwhile fails with this piece.
                                incoming = None;
                                self.activity.snapshots_not_received.fetch_add(is_awaited.into(), Relaxed);
                                self.refused(from, &refused)
                            }
                        };
                        if responses.send(Response { id, body: Some(body) }).await.is_err() {
                            return;
                        }
                    }
                    Some(request) => {
                        newest = request.id;
                        working.push_back(self.clone().answer(from, request));
                    }
                },
            }
        }
    }
}

/// Takes the commands of `append`, if the disk has room for them. Blank entries and memberships are small, and a new
/// leader answers no read before its first entry is committed: they always pass, and what they have to follow may use
/// room that is not for its own commands.
fn take_entries(disk: &DiskWatch, append: &AppendEntriesRequest<TypeConfig>) -> Option<Taken> {
    let commands = append.entries.iter().filter_map(|entry| match &entry.payload {
        EntryPayload::Normal(command) => Some((entry.log_id.leader_id.term, command.bytes.len())),
        EntryPayload::Blank | EntryPayload::Membership(_) => None,
    });
    let (mut bytes, mut origin) = (0, Origin::EarlierLeaders);
    for (term, length) in commands {
        bytes += length as u64;
        if term == append.vote.leader_id.term {
            origin = Origin::ThisLeader;
        }
    }
    match bytes {
        0 => Some(Taken::default()),
        _ => disk.take_entries(bytes, origin),
    }
}
