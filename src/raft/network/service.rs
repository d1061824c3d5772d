//! The answering side: admits peers and passes their requests to the core.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{FuturesOrdered, FuturesUnordered};
use futures::{FutureExt, StreamExt};
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse};
use openraft::storage::Snapshot;
use openraft::{EntryPayload, Raft, ServerState};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::admission::{self, Known, Own};
use super::upstream::Announcement;
use super::wire::{self, Malformed};
use super::{IdentifyRequest, IdentifyResponse, PeerDoor, Refusal};
use crate::machine::StateMachine;
use crate::proto::peer::{self as proto, Hello, Request, Response, SnapshotPiece, request, response};
use crate::raft::activity::Activity;
use crate::raft::apply::Applier;
use crate::raft::read_index::ReadIndexes;
use crate::raft::snapshot::{self, SnapshotData};
use crate::raft::type_config::{self, TypeConfig, Vote};
use crate::runtime::offload;
use crate::storage::{DiskWatch, Origin, SnapshotReceiver, SnapshotStore, Taken};
use crate::types::{Incarnation, LogId, NodeId};

/// Requests of one connection that the core is working on; more stay in the connection.
const REQUESTS_IN_PROGRESS: usize = 64;
/// The same for requests that may be answered in any order.
const UNORDERED_IN_PROGRESS: usize = 1024;

/// How often a caller is told that its snapshot is still being installed.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// What a leader is told that sends more than there is room for; it tries again.
const DISK_FULL: &str = "the disk is full";

/// Who answers.
#[derive(Clone)]
pub struct Callee {
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
    /// Called when a member of the cluster expects another data directory, and this one belongs to no cluster, or to one
    /// of its own.
    pub fenced: Arc<dyn Fn(Incarnation) + Send + Sync>,
    /// Where what members announce goes while this node leads. Bounded: a member repeats what is not accepted.
    pub announcements: mpsc::Sender<(NodeId, Announcement)>,
    /// The disk under its log.
    pub disk: DiskWatch,
    /// The quota on the state that it could bear, if that is known.
    pub quota_bytes: Option<u64>,
}

/// Answers peers on behalf of one node.
pub struct PeerService<M: StateMachine> {
    callee: Callee,
    raft: Raft<TypeConfig, Applier<M>>,
    snapshots: Arc<dyn SnapshotStore>,
    /// Held while a received snapshot is being installed. openraft answers a second installation of the
    /// same snapshot at once, before the first one is durable.
    installing: Arc<tokio::sync::Mutex<()>>,
    reads: ReadIndexes,
    heard: Arc<LastHeard>,
    activity: Arc<Activity>,
    /// Until when this node elects nobody: see [`Promise`].
    silent_until: Instant,
    /// See [`Promise`].
    lease: Duration,
}

/// What a leader may rely on.
#[derive(Debug, Clone, Copy)]
pub struct Promise {
    /// For how long this node grants no vote from now on, unless the leader itself has asked for the election: before it
    /// was restarted it may have confirmed a leader, which relies on not being replaced meanwhile.
    pub silence: Duration,
    /// For how long after it has confirmed a leader it elects nobody else.
    pub lease: Duration,
}

/// When the leader was last heard.
#[derive(Debug, Default)]
pub struct LastHeard(std::sync::Mutex<Option<Instant>>);

impl LastHeard {
    fn now(&self) {
        *self.0.lock().expect("invariant: no panic under this lock") = Some(Instant::now());
    }

    /// How long ago that was.
    pub fn ago(&self) -> Option<Duration> {
        self.0.lock().expect("invariant: no panic under this lock").map(|at| at.elapsed())
    }

    /// Whether the leader was heard within `time`.
    pub fn within(&self, time: Duration) -> bool {
        self.ago().is_some_and(|ago| ago <= time)
    }
}

impl<M: StateMachine> Clone for PeerService<M> {
    fn clone(&self) -> Self {
        Self {
            callee: self.callee.clone(),
            raft: self.raft.clone(),
            snapshots: self.snapshots.clone(),
            installing: self.installing.clone(),
            reads: self.reads.clone(),
            heard: self.heard.clone(),
            activity: self.activity.clone(),
            silent_until: self.silent_until,
            lease: self.lease,
        }
    }
}

impl<M: StateMachine> PeerService<M> {
    /// A service that answers as `callee`.
    pub fn new(
        callee: Callee,
        raft: Raft<TypeConfig, Applier<M>>,
        snapshots: Arc<dyn SnapshotStore>,
        reads: ReadIndexes,
        activity: Arc<Activity>,
        promise: Promise,
    ) -> Self {
        let (silent_until, lease) = (Instant::now() + promise.silence, promise.lease);
        let (installing, heard) = (Arc::default(), Arc::default());
        Self { callee, raft, snapshots, installing, reads, heard, activity, silent_until, lease }
    }

    /// When this node last heard its leader.
    pub fn last_heard(&self) -> Arc<LastHeard> {
        self.heard.clone()
    }

    async fn answer(self, from: NodeId, request: Request) -> Response {
        let id = request.id;
        let body = self.dispatch(from, request).await.unwrap_or_else(response::Body::Failure);
        Response { id, body: Some(body) }
    }

    async fn dispatch(&self, from: NodeId, request: Request) -> Result<response::Body, String> {
        let failed = |error: &dyn std::fmt::Display| error.to_string();
        match request.body.ok_or(Malformed("request is empty")).map_err(|e| failed(&e))? {
            request::Body::Append(append) => {
                let append = wire::from_append(from, append).map_err(|e| failed(&e))?;
                // Until they are written.
                let Some(_taken) = take_entries(&self.callee.disk, &append) else {
                    return Err(DISK_FULL.to_owned());
                };
                let previous = append.prev_log_id;
                let last = append.entries.last().map(|entry| entry.log_id).or(previous);
                let leader_commit = append.leader_commit.as_ref().map(|committed| committed.index);
                let result = self.raft.append_entries(append).await.map_err(|e| failed(&e))?;
                if !matches!(result, AppendEntriesResponse::HigherVote(_)) {
                    self.heard.now();
                    if let Some(index) = leader_commit {
                        self.activity.told_committed.note(index);
                    }
                }
                let unfit_to_lead = !self.callee.disk.state().takes_writes();
                let response = wire::append_response(result, previous, last);
                let lease_ms = self.lease_ms();
                let quota_bytes = self.callee.quota_bytes;
                let own = proto::AppendResponse { unfit_to_lead, lease_ms, quota_bytes, ..response };
                Ok(response::Body::Append(own))
            }
            request::Body::Vote(vote) => {
                let vote = wire::from_vote_request(from, vote).map_err(|e| failed(&e))?;
                self.check_silence(vote.leadership_transfer)?;
                let response = self.raft.vote(vote).await.map_err(|e| failed(&e))?;
                Ok(response::Body::Vote(wire::vote_response(response)))
            }
            request::Body::PreVote(vote) => {
                let vote = wire::from_vote_request(from, vote).map_err(|e| failed(&e))?;
                self.check_silence(false)?;
                let response = self.raft.pre_vote(vote).await.map_err(|e| failed(&e))?;
                Ok(response::Body::Vote(wire::vote_response(response)))
            }
            request::Body::TransferLeader(transfer) => {
                let transfer = wire::from_transfer(from, transfer).map_err(|e| failed(&e))?;
                let response = self.raft.handle_transfer_leader(transfer).await.map_err(|e| failed(&e))?;
                Ok(response::Body::TransferLeader(wire::transfer_response(response)))
            }
            request::Body::ReadIndex(_) => {
                Ok(response::Body::ReadIndex(wire::read_index_response(self.reads.next().await)))
            }
            request::Body::Announce(announcement) => {
                let announcement = wire::from_announce(announcement).map_err(|e| failed(&e))?;
                let leads = self.raft.metrics().borrow_watched().state == ServerState::Leader;
                // A full queue is worked off before the member says so again.
                let accepted = leads && self.callee.announcements.try_send((from, announcement)).is_ok();
                Ok(response::Body::Announce(proto::AnnounceResponse { accepted }))
            }
            request::Body::Hello(_) => Err("a handshake in the middle of a connection".to_owned()),
            request::Body::Snapshot(_) => Err("invariant: pieces are taken out before".to_owned()),
        }
    }

    fn lease_ms(&self) -> u64 {
        u64::try_from(self.lease.as_millis()).unwrap_or(u64::MAX)
    }

    fn check_silence(&self, leadership_transfer: bool) -> Result<(), String> {
        match leadership_transfer || Instant::now() >= self.silent_until {
            true => Ok(()),
            false => Err("this node was restarted a moment ago; a leader may still rely on it".to_owned()),
        }
    }

    fn vote(&self) -> Vote {
        self.raft.metrics().borrow_watched().vote
    }

    /// Takes the next piece of a snapshot; installs it with the last one.
    async fn take_piece(
        &self,
        from: NodeId,
        incoming: &mut Option<Incoming>,
        piece: SnapshotPiece,
    ) -> Result<proto::SnapshotResponse, String> {
        let vote = wire::from_leader(from, piece.vote).map_err(|e| e.to_string())?;
        let last_log = piece.last_log.ok_or("the snapshot's position is missing")?;
        let log_id = LogId::new(last_log.term, last_log.index);
        if log_id.term > vote.leader_id.term {
            return Err("the snapshot is newer than its sender's term".to_owned());
        }
        // A leader of an earlier term is none any more.
        if vote >= self.vote() {
            self.heard.now();
        }
        if !self.callee.disk.has_room() {
            return Err(DISK_FULL.to_owned());
        }
        if piece.offset == 0 {
            let receiver = self.snapshots.receive(log_id).map_err(|e| e.to_string())?;
            *incoming = Some(Incoming { log_id, received: 0, receiver });
        }
        let mut current = incoming.take().ok_or("a piece of a snapshot whose beginning is missing")?;
        if current.log_id != log_id || piece.offset > current.received {
            return Err(format!(
                "a piece is missing: have {} bytes, got offset {}",
                current.received, piece.offset
            ));
        }
        let own_vote = wire::vote(&self.vote());
        if piece.offset < current.received {
            // Delivered twice.
            *incoming = Some(current);
            return Ok(proto::SnapshotResponse {
                vote: Some(own_vote),
                installing: false,
                lease_ms: self.lease_ms(),
            });
        }
        current.received += piece.bytes.len() as u64;
        let (offset, bytes) = (piece.offset, piece.bytes);
        let current = offload(move || current.receiver.write(offset, &bytes).map(|()| current))
            .await
            .map_err(|e| e.to_string())?;
        if !piece.last {
            *incoming = Some(current);
            return Ok(proto::SnapshotResponse {
                vote: Some(own_vote),
                installing: false,
                lease_ms: self.lease_ms(),
            });
        }
        let received = offload(move || current.receiver.finish()).await.map_err(|e| e.to_string())?;
        let meta = snapshot::meta(received.meta());
        let snapshot = Snapshot { meta, snapshot: SnapshotData::Received(received) };
        let _one_at_a_time = self.installing.lock().await;
        // Before the core may count on it.
        self.activity.leader_clock.snapshot_received();
        let response = self.raft.install_full_snapshot(vote, snapshot).await.map_err(|e| e.to_string())?;
        let vote = Some(wire::vote(&response.vote));
        Ok(proto::SnapshotResponse { vote, installing: false, lease_ms: self.lease_ms() })
    }

    async fn run(
        self,
        from: NodeId,
        mut requests: mpsc::Receiver<Request>,
        responses: mpsc::Sender<Response>,
    ) {
        // In order, because the caller's core takes a conflict that overtakes an acceptance for a lost disk.
        let mut working = FuturesOrdered::new();
        // What members ask of their leader is not for the core's log.
        let mut unordered = FuturesUnordered::new();
        let mut newest = 0;
        let mut incoming = None;
        let mut open = true;
        while open || !working.is_empty() || !unordered.is_empty() {
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
                request = requests.recv(), if open
                    && working.len() < REQUESTS_IN_PROGRESS
                    && unordered.len() < UNORDERED_IN_PROGRESS => match request
                {
                    None => open = false,
                    // Delivered twice or late, they do no harm.
                    Some(request @ Request { body: Some(request::Body::ReadIndex(_) | request::Body::Announce(_)), .. }) => {
                        unordered.push(self.clone().answer(from, request));
                    }
                    // Late, or delivered twice.
                    Some(Request { id, .. }) if id <= newest => {}
                    Some(Request { id, body: Some(request::Body::Snapshot(piece)) }) => {
                        newest = id;
                        let is_awaited = piece.offset == 0 || incoming.is_some();
                        let taken = signs_of_life(id, &responses, self.vote(), self.take_piece(from, &mut incoming, piece));
                        let body = match taken.await {
                            Ok(response) => response::Body::Snapshot(response),
                            Err(reason) => {
                                // The caller begins anew. What it has sent meanwhile fails with this piece.
                                incoming = None;
                                self.activity.snapshots_not_received.fetch_add(is_awaited.into(), Relaxed);
                                response::Body::Failure(reason)
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
        _ => None,
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

/// Waits for `work`, and lets the caller of request `id` know every now and then that it goes on.
async fn signs_of_life<T>(
    id: u64,
    responses: &mpsc::Sender<Response>,
    vote: Vote,
    work: impl Future<Output = T>,
) -> T {
    tokio::pin!(work);
    loop {
        if let Ok(done) = tokio::time::timeout(SIGN_OF_LIFE, &mut work).await {
            return done;
        }
        let alive = proto::SnapshotResponse { vote: Some(wire::vote(&vote)), installing: true, lease_ms: 0 };
        // A caller that is gone does not stop the installation.
        let _ = responses.try_send(Response { id, body: Some(response::Body::Snapshot(alive)) });
    }
}

/// A snapshot of which some pieces have arrived.
struct Incoming {
    log_id: LogId,
    received: u64,
    receiver: SnapshotReceiver,
}

fn list(founders: &BTreeMap<NodeId, String>) -> String {
    founders.iter().map(|(id, address)| format!("{id}={address}")).collect::<Vec<_>>().join(",")
}

impl<M: StateMachine> PeerDoor for PeerService<M> {
    fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        let callee = &self.callee;
        let own = Own { cluster: &callee.cluster, node_id: callee.node_id, incarnation: callee.incarnation };
        admission::check_address(own, hello)?;
        let metrics = self.raft.metrics().borrow_watched().clone();
        if let Err(fatal) = &metrics.running_state {
            return Err(Refusal::Stopped(fatal.to_string()));
        }
        let position = |at: &Option<type_config::LogId>| at.as_ref().map(type_config::from_log_id);
        let members = metrics.membership_config.membership().nodes();
        let committed = &metrics.committed_membership_config;
        let known = Known {
            members: members.map(|(node_id, member)| (*node_id, member.incarnation)).collect(),
            at: position(metrics.membership_config.log_id()),
            committed_caller: committed
                .membership()
                .get_node(&hello.from_node)
                .map(|member| member.incarnation),
            committed_at: position(committed.log_id()),
        };
        admission::check_identities(own, &known, hello).map_err(|refused| {
            if let Some(lost) = refused.lost {
                (callee.fenced)(lost);
            }
            refused.refusal
        })
    }

    fn identify(&self, request: IdentifyRequest) -> Result<IdentifyResponse, Refusal> {
        let hello = request.hello.ok_or_else(|| Refusal::Malformed("the handshake is missing".to_owned()))?;
        self.admit(&hello)?;
        let theirs: BTreeMap<NodeId, String> = request.founders.into_iter().collect();
        let callee = &self.callee;
        if theirs.is_empty() {
            // Not about forming a cluster: then a node that does form one must not be drawn into another.
            let is_member = !self
                .raft
                .metrics()
                .borrow_watched()
                .membership_config
                .membership()
                .get_joint_config()
                .is_empty();
            if !is_member && !callee.joins {
                return Err(Refusal::NotJoining { node_id: callee.node_id });
            }
        } else if theirs != callee.founders {
            return Err(Refusal::OtherFounders { ours: list(&callee.founders), theirs: list(&theirs) });
        }
        Ok(IdentifyResponse {
            node_id: callee.node_id,
            incarnation: callee.incarnation.to_string(),
            peer_address: callee.peer_address.clone(),
            client_address: callee.client_address.clone(),
        })
    }

    fn serve(
        &self,
        from: NodeId,
        requests: mpsc::Receiver<Request>,
        responses: mpsc::Sender<Response>,
    ) -> BoxFuture<'static, ()> {
        self.clone().run(from, requests, responses).boxed()
    }
}
