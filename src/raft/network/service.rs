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
//! - `append`: entries from a leader;
//! - `votes`: requests for votes, and the lead that is offered;
//! - `pieces`: snapshots, piece by piece;
//! - `offers`: hand-overs that a leader has announced;
//! - `forwarded`: calls that members pass on to their leader;
//! - `refusals`: why a request is not answered.
//!
//! # Invariants
//!
//! - Answers to appends leave in the order of their requests, each with what this node says of itself: disk, lease, state, versions.
//! - Only a leader appends and only a candidate asks for votes: the sender is who was admitted, whatever the message says.
//! - To refuse is the same as to lose, so a refusal breaks nothing of Raft. A leader that was deposed is told of the newer term first.
//! - A restarted node grants no vote before its [silence](VoterPromise) is over, unless its leader itself has asked for the election.
//! - An entry that this build could not apply is refused before it is in the log. If it is committed the node stops, and says why.
//! - Blank entries and memberships always pass a full disk; commands pass while there is room for them.
//!
//! # What it does not do
//!
//! Prove who calls: a caller that knows a member's name, id and incarnation passes for that member. Repeat anything.

mod append;
mod door;
mod forwarded;
mod offers;
mod pieces;
pub(super) mod refusals;
mod votes;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{FuturesOrdered, FuturesUnordered};
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::{Raft, ServerState};
use tokio::sync::mpsc;
use tokio::time::Instant;

pub(crate) use self::forwarded::{CallOutcome, Desk};
use self::forwarded::{CallerStanding, Forwarded};
pub(crate) use self::offers::Offers;
use self::pieces::{IncomingSlot, Receiving, Unreadable};
use self::refusals::{Complaints, Unanswered};
pub(crate) use self::votes::{LastHeard, VoterPromise};
use super::admission::Claim;
use super::calls::room::{Level, Rooms};
use super::incoming::Incoming;
use super::leader_line::Announcement;
use super::plausible::{Bearings, Statements};
use super::wire::{self, Malformed};
use crate::machine::StateMachine;
use crate::proto::peer::{self as proto, Request, Response, request, response};
use crate::raft::activity::Activity;
use crate::raft::agreement::{Agreement, HashesTold};
use crate::raft::apply::Applier;
use crate::raft::read_index::ReadIndexes;
use crate::raft::type_config::{self, TypeConfig, Vote};
use crate::shown::without_directories;
use crate::storage::{DiskWatch, LogStore, SnapshotStore};
use crate::types::{Incarnation, InitialState, NodeId};

/// Requests of one connection that the core is working on; more stay in the connection.
const REQUESTS_IN_PROGRESS: usize = 64;
/// The same for requests that may be answered in any order.
const UNORDERED_IN_PROGRESS: usize = 1024;

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
    /// The one that is being received or installed. openraft answers a second installation of the same snapshot at once, before the
    /// first one is durable.
    incoming: Arc<IncomingSlot>,
    reads: ReadIndexes,
    /// How many calls are under way that members have passed on.
    forwarded: Arc<Rooms<Level>>,
    heard: Arc<LastHeard>,
    activity: Arc<Activity>,
    /// Until when this node elects nobody: see [`VoterPromise`].
    silent_until: Instant,
    /// See [`VoterPromise`].
    lease: Duration,
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
            incoming: self.incoming.clone(),
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
        promise: VoterPromise,
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
            incoming: Arc::default(),
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
            request::Body::Vote(vote) => self.vote_for(from, vote).await,
            request::Body::PreVote(vote) => self.would_vote_for(from, vote).await,
            request::Body::TransferLeader(transfer) => self.take_lead(from, transfer).await,
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
                let mut told = HashesTold::new();
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

    fn lease_ms(&self) -> u64 {
        u64::try_from(self.lease.as_millis()).unwrap_or(u64::MAX)
    }

    fn vote(&self) -> Vote {
        self.raft.metrics().borrow_watched().vote
    }

    /// This node's vote, if that is newer than the `vote` of a leader, which then leads no more.
    fn deposed(&self, vote: Vote) -> Option<Vote> {
        Some(self.vote()).filter(|own| vote < *own)
    }

    fn standing_of(&self, caller: NodeId) -> CallerStanding {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let member = metrics.membership_config.membership().get_node(&caller);
        CallerStanding {
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
        let mut receiving = Receiving::new(&self.incoming);
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
                        let is_awaited = piece.offset == 0 || receiving.has_begun();
                        let taken = pieces::signs_of_life(id, &responses, self.vote(), self.take_piece(from, &mut receiving, piece));
                        let body = match taken.await {
                            Ok(response) => response::Body::Snapshot(response),
                            Err(refused) => {
                                // The caller asks anew how much is here. What it has sent meanwhile fails with this piece.
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
