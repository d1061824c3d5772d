//! The calling side: what openraft sends through.
//!
//! One [`PeerClient`] per peer and purpose, each with a connection of its own that is dialled when needed
//! and again when it broke. A dial goes on in the background when its caller gives up: a heartbeat waits
//! only tens of milliseconds, less than a handshake may take on a long link.

mod snapshots;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, Stream, StreamExt};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError, StreamAppendResult,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::storage::Snapshot;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::addresses::Addresses;
use super::appends::AppendStream;
use super::handshake::OwnHandshake;
use super::plausible::{self, Bearings};
use super::progress::PeerFitness;
use super::wire::{self, Malformed};
use super::{Connection, DialError, Purpose, Target, Transport};
use crate::proto::peer::{Request, request, response};
use crate::raft::activity::{Activity, Succession};
use crate::raft::agreement::Agreement;
use crate::raft::durable_positions::DurablePositions;
use crate::raft::snapshot::SnapshotData;
use crate::raft::type_config::{self, CommittedLeaderId, LogId, TypeConfig, Vote};
use crate::runtime;
use crate::types::{Incarnation, Member, NodeId};

/// An append may wait for the peer's disk. One that is not answered for this long counts as lost.
pub(super) const APPEND_IDLE: Duration = Duration::from_secs(5);
/// A dial that takes longer has failed.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a request waits for a dial, which goes on without it.
const DIAL_PATIENCE: Duration = Duration::from_millis(500);
/// Pause after the first dial that failed; it doubles with every other one, up to a limit. openraft pauses only between
/// requests, and there is none without a connection: a peer that refuses at once would be dialled thousands of times a
/// second.
const FIRST_REDIAL_PAUSE: Duration = Duration::from_millis(10);
/// Makes a [`PeerClient`] for every peer and purpose.
#[derive(Clone)]
pub(crate) struct PeerClients {
    handshake: OwnHandshake,
    transport: Arc<dyn Transport>,
    /// The longest pause between two dials of a peer.
    redial_pause: Duration,
    /// When peers could not be reached last of which the log says so. Each has several clients that go on trying.
    away: Arc<Mutex<BTreeMap<NodeId, Instant>>>,
    /// Up to where the log is to be purged.
    pub(super) purge: Arc<AtomicU64>,
    /// Most bytes of a snapshot that a peer is sent in a second; 0: as many as there can be.
    pub(super) snapshot_bytes_per_second: Arc<AtomicU64>,
    /// Where to note what peers have on disk.
    pub(super) durable_positions: Arc<DurablePositions>,
    pub(super) fitness: Arc<PeerFitness>,
    /// Where to count what is sent.
    activity: Arc<Activity>,
    /// Whether this node's state is the others'.
    agreement: Arc<Agreement>,
}

impl PeerClients {
    /// Clients that begin each connection with `handshake`, over `transport`, and pause at most for `redial_pause` before they dial a peer
    /// again.
    pub(crate) fn new(
        handshake: OwnHandshake,
        transport: Arc<dyn Transport>,
        redial_pause: Duration,
    ) -> Self {
        let (away, purge, durable_positions, fitness) =
            (Arc::default(), Arc::default(), Arc::default(), Arc::default());
        let (activity, agreement, snapshot_bytes_per_second) =
            (Arc::default(), Arc::default(), Arc::default());
        Self {
            handshake,
            transport,
            redial_pause,
            away,
            purge,
            snapshot_bytes_per_second,
            durable_positions,
            fitness,
            activity,
            agreement,
        }
    }

    /// From now on `agreement` says whether this node's snapshots are fit to be sent.
    pub(crate) fn judged_by(&mut self, agreement: Arc<Agreement>) {
        self.agreement = agreement;
    }

    /// From now on what is sent is counted in `activity`.
    pub(crate) fn count_in(&mut self, activity: Arc<Activity>) {
        self.activity = activity;
    }

    /// What is known of which members hold which entries.
    pub(crate) fn durable_positions(&self) -> Arc<DurablePositions> {
        self.durable_positions.clone()
    }

    /// Where to note up to where the log is to be purged. openraft does not purge what it is sending, so a
    /// peer that lives but is slow would keep the log growing without bound: its stream is ended, and it gets
    /// a snapshot.
    pub(crate) fn purge_mark(&self) -> Arc<AtomicU64> {
        self.purge.clone()
    }

    /// Most bytes of a snapshot that a peer is sent in a second; 0: as many as there can be.
    pub(crate) fn snapshot_bytes_per_second(&self) -> Arc<AtomicU64> {
        self.snapshot_bytes_per_second.clone()
    }

    /// What peers say of themselves.
    pub(crate) fn fitness(&self) -> Arc<PeerFitness> {
        self.fitness.clone()
    }

    /// Where peers are dialled.
    pub(crate) fn addresses(&self) -> Arc<Addresses> {
        self.handshake.addresses.clone()
    }

    /// What answers are judged by: this node has asked, so it has a log.
    fn bearings(&self) -> Bearings {
        Bearings { term: self.activity.term(), ..Bearings::default() }
    }

    /// Refuses an answer to a request for a vote that no member can have given.
    fn believe(&self, answer: VoteResponse<TypeConfig>) -> Result<VoteResponse<TypeConfig>, Malformed> {
        self.believe_vote(&answer.vote)?;
        if let Some(last) = answer.last_log_id.as_ref().map(type_config::from_log_id) {
            plausible::position(last)?;
            self.bearings().term(last.term)?;
        }
        Ok(answer)
    }

    /// Refuses an answer to an append that no member can have given.
    pub(super) fn believe_appended(
        &self,
        result: StreamAppendResult<TypeConfig>,
    ) -> Result<StreamAppendResult<TypeConfig>, Malformed> {
        if let Err(StreamAppendError::HigherVote(higher)) = &result {
            self.believe_vote(higher)?;
        }
        Ok(result)
    }

    /// Refuses a vote that a peer cannot have come by. The core takes a vote for this node for its own, so one that it has not
    /// cast is somebody else's invention, or its disk has lost it: then another node has to stand.
    fn believe_vote(&self, vote: &Vote) -> Result<(), Malformed> {
        let bearings = self.bearings();
        bearings.term(vote.leader_id.term)?;
        match vote.leader_id.voted_for == self.handshake.node_id && vote.leader_id.term > bearings.term {
            true => Err(Malformed("it names this node in a term in which this node has not stood")),
            false => Ok(()),
        }
    }

    fn away(&self) -> MutexGuard<'_, BTreeMap<NodeId, Instant>> {
        self.away.lock().expect("invariant: no panic under this lock")
    }

    /// A peer cannot be reached. Whether that is news.
    fn is_gone(&self, node_id: NodeId) -> bool {
        let before = self.away().insert(node_id, Instant::now());
        before.is_none_or(|at| self.is_forgotten(at))
    }

    /// A peer was reached. Whether that is news.
    fn is_back(&self, node_id: NodeId) -> bool {
        let before = self.away().remove(&node_id);
        before.is_some_and(|at| !self.is_forgotten(at))
    }

    /// Whether nobody has tried for so long, such as since this node led, that it says nothing about the present.
    fn is_forgotten(&self, at: Instant) -> bool {
        at.elapsed() > self.redial_pause.saturating_mul(2).max(DIAL_TIMEOUT * 2)
    }

    fn client(&self, node_id: NodeId, member: &Member, purpose: Purpose) -> PeerClient {
        PeerClient {
            node_id,
            member: member.clone(),
            purpose,
            clients: self.clone(),
            dialling: None,
            redial: Redial::default(),
            connection: None,
            next_id: 0,
            accepted: None,
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for PeerClients {
    type Network = PeerClient;

    async fn new_client(&mut self, target: NodeId, node: &Member) -> PeerClient {
        self.client(target, node, Purpose::Append)
    }

    async fn new_heartbeat_client(&mut self, target: NodeId, node: &Member) -> PeerClient {
        self.client(target, node, Purpose::Heartbeat)
    }

    async fn new_snapshot_client(&mut self, target: NodeId, node: &Member) -> PeerClient {
        self.client(target, node, Purpose::Snapshot)
    }
}

/// Sends one peer's messages for one purpose.
pub(crate) struct PeerClient {
    pub(super) node_id: NodeId,
    pub(super) member: Member,
    purpose: Purpose,
    pub(super) clients: PeerClients,
    dialling: Option<oneshot::Receiver<Result<Connection, DialError>>>,
    redial: Redial,
    pub(super) connection: Option<Connection>,
    next_id: u64,
    /// The last position this peer has accepted from this client.
    pub(super) accepted: Option<LogId>,
}

/// When a peer may be dialled again. What is kept is a point in time: whoever waits for it may give up and come back.
#[derive(Debug, Default)]
struct Redial {
    failures: u32,
    not_before: Option<Instant>,
}

impl Redial {
    fn failed(&mut self, longest_pause: Duration) {
        let pause = FIRST_REDIAL_PAUSE.saturating_mul(1 << self.failures.min(20)).min(longest_pause);
        self.failures += 1;
        self.not_before = Some(Instant::now() + pause);
    }

    async fn pause(&self) {
        if let Some(not_before) = self.not_before {
            tokio::time::sleep_until(not_before).await;
        }
    }
}

pub(super) type RpcError = RPCError<TypeConfig>;

pub(super) fn unreachable(reason: impl ToString) -> RpcError {
    RPCError::Unreachable(Unreachable::from_string(reason))
}

pub(super) fn broken(reason: impl ToString) -> RpcError {
    RPCError::Network(NetworkError::from_string(reason))
}

impl From<Malformed> for RpcError {
    fn from(error: Malformed) -> Self {
        unreachable(error)
    }
}

impl PeerClient {
    /// The open connection, after dialling if there is none.
    async fn connected(&mut self) -> Result<&mut Connection, RpcError> {
        if self.connection.as_mut().is_some_and(|c| c.requests.is_closed() || c.responses.is_closed()) {
            self.connection = None;
        }
        if self.connection.is_none() {
            let dialled = match &mut self.dialling {
                Some(dialling) => dialling,
                None => {
                    self.redial.pause().await;
                    let dialling = self.dial();
                    self.dialling.insert(dialling)
                }
            };
            let outcome = tokio::time::timeout(DIAL_PATIENCE, dialled)
                .await
                .map_err(|_| unreachable(format!("not connected within {} ms", DIAL_PATIENCE.as_millis())))?;
            self.dialling = None;
            match outcome.unwrap_or_else(|_| Err(DialError::Unreachable("the dial was abandoned".to_owned())))
            {
                Ok(connection) => {
                    if self.clients.is_back(self.node_id) {
                        tracing::info!(node = self.node_id, "reached the peer again");
                    }
                    self.redial = Redial::default();
                    self.connection = Some(connection);
                }
                Err(error) => {
                    if self.clients.is_gone(self.node_id) {
                        tracing::warn!(node = self.node_id, %error, "cannot reach a peer; trying again until it answers");
                    }
                    self.redial.failed(self.clients.redial_pause);
                    return Err(unreachable(error));
                }
            }
        }
        Ok(self.connection.as_mut().expect("invariant: just connected"))
    }

    fn dial(&self) -> oneshot::Receiver<Result<Connection, DialError>> {
        let (done, outcome) = oneshot::channel();
        let handshake = &self.clients.handshake;
        let addresses = handshake.addresses.clone();
        let target = Target { node_id: self.node_id, address: addresses.of(self.node_id, &self.member) };
        let hello = handshake.towards(self.node_id, Some(self.member.incarnation));
        let dial = self.clients.transport.connect(target.clone(), hello, self.purpose);
        let (refused, member) = (handshake.refused.clone(), self.member.clone());
        runtime::spawn(async move {
            let result = match tokio::time::timeout(DIAL_TIMEOUT, dial).await {
                Ok(result) => result,
                Err(_) => Err(DialError::no_answer_within(DIAL_TIMEOUT)),
            };
            match &result {
                Ok(_) => addresses.reached(target.node_id, &member, &target.address),
                Err(_) => addresses.failed(target.node_id, &target.address),
            }
            match &result {
                Err(DialError::Refused(refusal)) => {
                    tracing::warn!(node = target.node_id, address = %target.address, %refusal, "peer refused this node");
                    refused(refusal);
                }
                Err(error) => tracing::debug!(node = target.node_id, %error, "cannot reach peer"),
                Ok(_) => {}
            }
            // Nobody waits any more when the client was dropped.
            let _ = done.send(result);
        });
        outcome
    }

    /// The peer, in the data directory that it is expected to have.
    pub(super) fn holder(&self) -> (NodeId, Incarnation) {
        (self.node_id, self.member.incarnation)
    }

    pub(super) fn request(&mut self, body: request::Body) -> Request {
        self.next_id += 1;
        Request { id: self.next_id, body: Some(body) }
    }

    /// Sends one request and waits for its response.
    async fn call(&mut self, body: request::Body, timeout: Duration) -> Result<response::Body, RpcError> {
        let request = self.request(body);
        let id = request.id;
        let exchange = async {
            let connection = self.connected().await?;
            send(connection, request)?;
            loop {
                let response =
                    connection.responses.recv().await.ok_or_else(|| broken("connection closed"))?;
                if response.id == id {
                    return response.body.ok_or(Malformed("response is empty").into());
                }
                // The answer to a request that was given up, or delivered twice.
            }
        };
        let result = match tokio::time::timeout(timeout, exchange).await {
            Ok(result) => result,
            Err(_) => Err(unreachable(format!("no answer within {} ms", timeout.as_millis()))),
        };
        match result {
            Ok(response::Body::Failure(reason)) => Err(unreachable(reason)),
            other => other,
        }
    }
}

pub(super) fn send(connection: &Connection, request: Request) -> Result<(), RpcError> {
    connection.requests.try_send(request).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => unreachable("too many requests are waiting to be sent"),
        mpsc::error::TrySendError::Closed(_) => broken("connection closed"),
    })
}

impl RaftNetworkV2<TypeConfig> for PeerClient {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RpcError> {
        match self.call(request::Body::Append(wire::append(rpc)), APPEND_IDLE).await? {
            response::Body::Append(response) => {
                self.clients.fitness.note(self.holder(), &response);
                Ok(self.clients.believe_appended(wire::from_append_response(response)?)?.into())
            }
            _ => Err(Malformed("not the answer to an append").into()),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<TypeConfig>, RpcError>>, RpcError>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        async move {
            self.connected().await?;
            Ok(AppendStream::new(self, input).boxed())
        }
        .boxed()
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        match self.call(request::Body::Vote(wire::vote_request(rpc)), option.soft_ttl()).await? {
            response::Body::Vote(response) => {
                Ok(self.clients.believe(wire::from_vote_response(response)?)?)
            }
            _ => Err(Malformed("not the answer to a request for a vote").into()),
        }
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        match self.call(request::Body::PreVote(wire::vote_request(rpc)), option.soft_ttl()).await? {
            response::Body::Vote(response) => {
                Ok(self.clients.believe(wire::from_vote_response(response)?)?)
            }
            _ => Err(Malformed("not the answer to a request for a vote").into()),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot<CommittedLeaderId, NodeId, Member, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let result = tokio::select! {
            biased;
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = self.send_snapshot(vote, snapshot.snapshot) => sent.map(SnapshotResponse::new),
        };
        if result.is_err() {
            // What is still on its way is of no use.
            self.connection = None;
        }
        result
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RpcError> {
        let offer = self.clients.activity.offer(request.from_leader().leader_id.term, *request.to_node_id());
        let body = wire::transfer(&request, offer == Some(Succession::Preference));
        match self.call(request::Body::TransferLeader(body), option.soft_ttl()).await? {
            response::Body::TransferLeader(response) if response.accepted => Ok(Ok(())),
            response::Body::TransferLeader(response) => {
                Err(unreachable(format!("the peer declined the lead: {}", response.reason)))
            }
            _ => Err(Malformed("not the answer to a transfer of leadership").into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::nowhere::Nowhere;
    use super::*;

    /// Of node 1.
    pub(super) fn clients(transport: Arc<Nowhere>) -> PeerClients {
        let handshake = OwnHandshake {
            cluster: "c".to_owned(),
            node_id: 1,
            incarnation: Incarnation(1),
            peer: String::new(),
            addresses: Arc::new(Addresses::new(BTreeMap::new())),
            refused: Arc::new(|_| {}),
        };
        PeerClients::new(handshake, transport, Duration::from_millis(200))
    }

    #[test]
    fn a_vote_for_this_node_that_it_has_not_cast_is_not_believed() {
        let clients = clients(Arc::default());
        clients.activity.had_voted(crate::types::Vote { term: 5, node_id: 1, committed: false });
        let vote = |term, node_id| type_config::vote(crate::types::Vote { term, node_id, committed: false });
        for (term, node_id, believed) in [(5, 1, true), (4, 1, true), (6, 2, true), (6, 1, false)] {
            let vote = vote(term, node_id);
            let granted = clients.believe(VoteResponse::new(vote, None, false));
            let appended = clients.believe_appended(Err(StreamAppendError::HigherVote(vote)));
            assert_eq!((granted.is_ok(), appended.is_ok()), (believed, believed), "term {term} of {node_id}");
        }
    }

    /// The core asks for a stream again as soon as it has heard that there is none: it is here that time must pass.
    #[tokio::test(start_paused = true)]
    async fn a_peer_that_refuses_is_dialled_a_few_times_a_second() {
        let transport = Arc::new(Nowhere::default());
        let clients = clients(transport.clone());
        let mut client = clients.client(2, &Member::default(), Purpose::Append);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(10) {
            assert!(client.connected().await.is_err());
            // One who gives up in the middle of a pause does not shorten it.
            let _ = tokio::time::timeout(Duration::from_millis(1), client.connected()).await;
        }
        assert!(!clients.is_gone(2) && clients.is_back(2) && !clients.is_back(2), "told once");
        assert!(clients.is_gone(2));
        tokio::time::advance(DIAL_TIMEOUT * 3).await;
        assert!(clients.is_gone(2), "another time");
        let dials = transport.dials();
        assert!((50..=56).contains(&dials), "{dials} dials in 10 s");
    }
}
