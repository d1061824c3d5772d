//! The calling side: what openraft sends through.
//!
//! One [`PeerClient`] per peer and purpose, each with a connection of its own that is dialled when needed
//! and again when it broke. A dial goes on in the background when its caller gives up: a heartbeat waits
//! only tens of milliseconds, less than a handshake may take on a long link.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
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
use tokio::time::{Instant, Sleep};

use super::addresses::Addresses;
use super::progress::{PeerFitness, SendingSnapshot};
use super::wire::{self, Malformed};
use super::{Connection, DialError, PROTOCOL_VERSION, Purpose, Refusal, Target, Transport};
use crate::proto::peer::{Hello, Request, Response, SnapshotPiece, request, response};
use crate::raft::activity::Activity;
use crate::raft::held::Held;
use crate::raft::snapshot::SnapshotData;
use crate::raft::type_config::{CommittedLeaderId, LogId, TypeConfig, Vote};
use crate::runtime;
use crate::types::{Incarnation, Member, NodeId};

/// Appends sent to a peer and not yet answered, per connection.
const APPENDS_IN_FLIGHT: usize = 32;
/// An append may wait for the peer's disk. One that is not answered for this long counts as lost.
const APPEND_IDLE: Duration = Duration::from_secs(5);
/// A dial that takes longer has failed.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a request waits for a dial, which goes on without it.
const DIAL_PATIENCE: Duration = Duration::from_millis(500);
/// Pause after the first dial that failed; it doubles with every other one, up to
/// [`LONGEST_REDIAL_PAUSE`]. openraft pauses only between requests, and there is none without a connection: a peer that
/// refuses at once would be dialled thousands of times a second.
const FIRST_REDIAL_PAUSE: Duration = Duration::from_millis(10);
/// See [`FIRST_REDIAL_PAUSE`].
const LONGEST_REDIAL_PAUSE: Duration = Duration::from_millis(200);
/// How long a peer may keep the log from being purged before it is sent a snapshot instead.
const PURGE_PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a snapshot in one message.
const SNAPSHOT_PIECE_BYTES: usize = 512 * 1024;
/// Snapshot pieces sent and not yet answered.
const SNAPSHOT_PIECES_IN_FLIGHT: usize = 4;
/// A piece is answered once it is written, and while the peer verifies and loads the snapshot it gives signs
/// of life. A message that is not answered for this long counts as lost.
const SNAPSHOT_IDLE: Duration = Duration::from_secs(5);

/// Who this node is, and what to do when a peer says it may not be.
#[derive(Clone)]
pub struct Caller {
    /// Name of the cluster.
    pub cluster: String,
    /// This node.
    pub node_id: NodeId,
    /// Its data directory.
    pub incarnation: Incarnation,
    /// Where to dial members.
    pub addresses: Arc<Addresses>,
    /// Called when a peer refuses this node.
    pub refused: Arc<dyn Fn(&Refusal) + Send + Sync>,
}

impl Caller {
    /// The handshake towards `to_node`, whose incarnation is `to_incarnation` if known.
    pub fn hello(&self, to_node: NodeId, to_incarnation: Option<Incarnation>) -> Hello {
        Hello {
            protocol_version: PROTOCOL_VERSION,
            cluster: self.cluster.clone(),
            from_node: self.node_id,
            from_incarnation: self.incarnation.to_string(),
            to_node,
            to_incarnation: to_incarnation.map(|i| i.to_string()).unwrap_or_default(),
            membership: self.addresses.seen(to_node).at.map(wire::plain_log_id),
        }
    }
}

/// Makes a [`PeerClient`] for every peer and purpose.
#[derive(Clone)]
pub struct PeerClients {
    caller: Caller,
    transport: Arc<dyn Transport>,
    /// Up to where the log is to be purged.
    purge: Arc<AtomicU64>,
    /// Where to note what peers have on disk.
    held: Arc<Held>,
    fitness: Arc<PeerFitness>,
    /// Where to count what is sent.
    activity: Arc<Activity>,
}

impl PeerClients {
    /// Clients that call as `caller` over `transport`.
    pub fn new(caller: Caller, transport: Arc<dyn Transport>) -> Self {
        let (purge, held, fitness) = (Arc::default(), Arc::default(), Arc::default());
        Self { caller, transport, purge, held, fitness, activity: Arc::default() }
    }

    /// From now on what is sent is counted in `activity`.
    pub fn count_in(&mut self, activity: Arc<Activity>) {
        self.activity = activity;
    }

    /// What is known of which members hold which entries.
    pub fn held(&self) -> Arc<Held> {
        self.held.clone()
    }

    /// Where to note up to where the log is to be purged. openraft does not purge what it is sending, so a
    /// peer that lives but is slow would keep the log growing without bound: its stream is ended, and it gets
    /// a snapshot.
    pub fn purge_mark(&self) -> Arc<AtomicU64> {
        self.purge.clone()
    }

    /// What peers say of themselves.
    pub fn fitness(&self) -> Arc<PeerFitness> {
        self.fitness.clone()
    }

    /// Where peers are dialled.
    pub fn addresses(&self) -> Arc<Addresses> {
        self.caller.addresses.clone()
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
pub struct PeerClient {
    node_id: NodeId,
    member: Member,
    purpose: Purpose,
    clients: PeerClients,
    dialling: Option<oneshot::Receiver<Result<Connection, DialError>>>,
    redial: Redial,
    connection: Option<Connection>,
    next_id: u64,
    /// The last position this peer has accepted from this client.
    accepted: Option<LogId>,
}

/// When a peer may be dialled again. What is kept is a point in time: whoever waits for it may give up and come back.
#[derive(Debug, Default)]
struct Redial {
    failures: u32,
    not_before: Option<Instant>,
}

impl Redial {
    fn failed(&mut self) {
        let pause = FIRST_REDIAL_PAUSE.saturating_mul(1 << self.failures.min(10)).min(LONGEST_REDIAL_PAUSE);
        self.failures += 1;
        self.not_before = Some(Instant::now() + pause);
    }

    async fn pause(&self) {
        if let Some(not_before) = self.not_before {
            tokio::time::sleep_until(not_before).await;
        }
    }
}

type RpcError = RPCError<TypeConfig>;

fn unreachable(reason: impl ToString) -> RpcError {
    RPCError::Unreachable(Unreachable::from_string(reason))
}

fn broken(reason: impl ToString) -> RpcError {
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
        if self.connection.as_ref().is_some_and(|c| c.requests.is_closed() || c.responses.is_closed()) {
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
                .map_err(|_| unreachable(format!("not connected within {DIAL_PATIENCE:?}")))?;
            self.dialling = None;
            match outcome.unwrap_or_else(|_| Err(DialError::Unreachable("the dial was abandoned".to_owned()))) {
                Ok(connection) => {
                    self.redial = Redial::default();
                    self.connection = Some(connection);
                }
                Err(error) => {
                    self.redial.failed();
                    return Err(unreachable(error));
                }
            }
        }
        Ok(self.connection.as_mut().expect("invariant: just connected"))
    }

    fn dial(&self) -> oneshot::Receiver<Result<Connection, DialError>> {
        let (done, outcome) = oneshot::channel();
        let caller = &self.clients.caller;
        let addresses = caller.addresses.clone();
        let target = Target { node_id: self.node_id, address: addresses.of(self.node_id, &self.member) };
        let hello = caller.hello(self.node_id, Some(self.member.incarnation));
        let dial = self.clients.transport.connect(target.clone(), hello, self.purpose);
        let (refused, member) = (caller.refused.clone(), self.member.clone());
        runtime::spawn(async move {
            let result = match tokio::time::timeout(DIAL_TIMEOUT, dial).await {
                Ok(result) => result,
                Err(_) => Err(DialError::Unreachable(format!("no answer within {DIAL_TIMEOUT:?}"))),
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

    fn request(&mut self, body: request::Body) -> Request {
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
            Err(_) => Err(unreachable(format!("no answer within {timeout:?}"))),
        };
        match result {
            Ok(response::Body::Failure(reason)) => Err(unreachable(reason)),
            other => other,
        }
    }

    async fn send_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotData,
    ) -> Result<Vote, StreamingError<TypeConfig>> {
        let SnapshotData::Placed(handle) = snapshot else {
            return Err(unreachable("the snapshot is not in its place yet").into());
        };
        let total = handle.len_bytes();
        let log_id = wire::log_id(&crate::raft::type_config::log_id(handle.meta().log_id));
        if total == 0 {
            return Err(unreachable("the snapshot is empty").into());
        }
        let begun = Instant::now();
        let sending = SendingSnapshot::new(self.clients.fitness.clone(), self.node_id, total);
        let mut offset = 0;
        let mut unanswered: VecDeque<u64> = VecDeque::new();
        loop {
            sending.reached(offset);
            while unanswered.len() < SNAPSHOT_PIECES_IN_FLIGHT && offset < total {
                let (source, at) = (handle.clone(), offset);
                let bytes = runtime::offload(move || source.read_at(at, SNAPSHOT_PIECE_BYTES))
                    .await
                    .map_err(|e| {
                        StreamingError::StorageError(openraft::StorageError::read_snapshot(
                            None,
                            openraft::errors::ErrorSource::from_error(&e),
                        ))
                    })?;
                if bytes.is_empty() {
                    return Err(unreachable("the snapshot is shorter than it was").into());
                }
                offset += bytes.len() as u64;
                let piece = SnapshotPiece {
                    vote: Some(wire::vote(&vote)),
                    last_log: Some(log_id),
                    offset: at,
                    bytes,
                    last: offset >= total,
                };
                let request = self.request(request::Body::Snapshot(piece));
                unanswered.push_back(request.id);
                let connection = self.connected().await?;
                send(connection, request)?;
            }
            let connection = self.connected().await?;
            let response = tokio::time::timeout(SNAPSHOT_IDLE, connection.responses.recv())
                .await
                .map_err(|_| unreachable(format!("a piece was not answered within {SNAPSHOT_IDLE:?}")))?
                .ok_or_else(|| broken("connection closed"))?;
            let Some(place) = unanswered.iter().position(|id| *id == response.id) else { continue };
            if matches!(&response.body, Some(response::Body::Snapshot(answer)) if answer.installing) {
                continue;
            }
            unanswered.remove(place);
            match response.body {
                Some(response::Body::Snapshot(answer)) => {
                    let answered = wire::from_vote(answer.vote).map_err(RpcError::from)?;
                    let complete = unanswered.is_empty() && offset >= total;
                    if complete && answered <= vote {
                        self.clients.activity.snapshots_sent.add(total, begun.elapsed());
                    }
                    if answered > vote || complete {
                        return Ok(answered);
                    }
                }
                Some(response::Body::Failure(reason)) => return Err(unreachable(reason).into()),
                _ => return Err(RpcError::from(Malformed("not the answer to a snapshot")).into()),
            }
        }
    }
}

fn send(connection: &Connection, request: Request) -> Result<(), RpcError> {
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
                self.clients.fitness.note(self.node_id, &response);
                Ok(wire::from_append_response(response)?.into())
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
            Ok(AppendStream {
                client: self,
                input: Some(input),
                unanswered: VecDeque::new(),
                behind_since: None,
                idle: Box::pin(tokio::time::sleep(APPEND_IDLE)),
                ended: false,
            }
            .boxed())
        }
        .boxed()
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        match self.call(request::Body::Vote(wire::vote_request(rpc)), option.soft_ttl()).await? {
            response::Body::Vote(response) => Ok(wire::from_vote_response(response)?),
            _ => Err(Malformed("not the answer to a request for a vote").into()),
        }
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        match self.call(request::Body::PreVote(wire::vote_request(rpc)), option.soft_ttl()).await? {
            response::Body::Vote(response) => Ok(wire::from_vote_response(response)?),
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
            // The peer forgets a half-received snapshot with its connection.
            self.connection = None;
        }
        result
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RpcError> {
        match self.call(request::Body::TransferLeader(wire::transfer(&request)), option.soft_ttl()).await? {
            response::Body::TransferLeader(response) if response.accepted => Ok(Ok(())),
            response::Body::TransferLeader(response) => {
                Err(unreachable(format!("the peer declined the lead: {}", response.reason)))
            }
            _ => Err(Malformed("not the answer to a transfer of leadership").into()),
        }
    }
}

/// An append sent and not yet answered.
#[derive(Debug, Clone, Copy)]
struct Unanswered {
    id: u64,
    previous: Option<LogId>,
    last: Option<LogId>,
}

/// Appends on their way out and their results on the way back, in the order of the requests.
struct AppendStream<'s, S> {
    client: &'s mut PeerClient,
    input: Option<S>,
    unanswered: VecDeque<Unanswered>,
    /// Since when the peer has kept the log from being purged.
    behind_since: Option<Instant>,
    idle: Pin<Box<Sleep>>,
    ended: bool,
}

type AppendItem = Result<StreamAppendResult<TypeConfig>, RpcError>;

impl<S> AppendStream<'_, S>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
{
    /// Sends what the core has ready, as far as the window allows.
    fn send_ready(&mut self, cx: &mut Context<'_>) -> Result<(), RpcError> {
        while self.unanswered.len() < APPENDS_IN_FLIGHT {
            let Some(input) = &mut self.input else { return Ok(()) };
            match input.poll_next_unpin(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(None) => self.input = None,
                Poll::Ready(Some(append)) => {
                    let previous = append.prev_log_id;
                    let last = append.entries.last().map(|entry| entry.log_id).or(previous);
                    let request = self.client.request(request::Body::Append(wire::append(append)));
                    if self.unanswered.is_empty() {
                        self.restart_idle();
                    }
                    self.unanswered.push_back(Unanswered { id: request.id, previous, last });
                    let connection =
                        self.client.connection.as_ref().ok_or_else(|| broken("not connected"))?;
                    send(connection, request)?;
                }
            }
        }
        Ok(())
    }

    fn restart_idle(&mut self) {
        self.idle.as_mut().reset(Instant::now() + APPEND_IDLE);
    }

    /// The answer to the oldest unanswered append.
    ///
    /// The peer answers in order. An answer that overtook another one therefore means that a message was
    /// lost, and what the peer made of the later ones cannot be reported to the core: it takes a conflict
    /// below what has matched for a follower that lost its disk.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Result<(Unanswered, Response), RpcError>> {
        let front = *self.unanswered.front().expect("invariant: asked only while something is unanswered");
        loop {
            let Some(connection) = &mut self.client.connection else {
                return Poll::Ready(Err(broken("not connected")));
            };
            match connection.responses.poll_recv(cx) {
                Poll::Ready(None) => return Poll::Ready(Err(broken("connection closed"))),
                Poll::Ready(Some(response)) if response.id == front.id => {
                    self.unanswered.pop_front();
                    self.restart_idle();
                    return Poll::Ready(Ok((front, response)));
                }
                Poll::Ready(Some(response)) if response.id > front.id => {
                    return Poll::Ready(Err(broken("an earlier message was lost")));
                }
                // The answer to a request of an earlier stream, or delivered twice.
                Poll::Ready(Some(_)) => {}
                Poll::Pending => {
                    std::task::ready!(self.idle.as_mut().poll(cx));
                    return Poll::Ready(Err(unreachable(format!("no answer within {APPEND_IDLE:?}"))));
                }
            }
        }
    }

    /// Whether the core may be told of `result`: it believes what it hears.
    fn check(&mut self, asked: Unanswered, result: &StreamAppendResult<TypeConfig>) -> Result<(), RpcError> {
        match result {
            Ok(last) if *last == asked.last => {
                self.client.accepted = asked.last.max(self.client.accepted);
                if let Some(last) = &asked.last {
                    let held = &self.client.clients.held;
                    let holder = (self.client.node_id, self.client.member.incarnation);
                    held.note(holder, crate::raft::type_config::from_log_id(last));
                    let before = asked.previous.map_or(0, |previous| previous.index + 1);
                    let entries = (last.index + 1).saturating_sub(before);
                    if entries > 0 {
                        let fitness = &self.client.clients.fitness;
                        fitness.update(self.client.node_id, |peer| peer.accepted_entries += entries);
                    }
                }
                self.check_purge(asked.last)
            }
            Err(StreamAppendError::Conflict(at)) if Some(*at) == asked.previous => {
                if asked.previous <= self.client.accepted {
                    let node_id = self.client.node_id;
                    tracing::error!(node_id, conflict = %at, "a peer no longer has entries that it had accepted");
                    return Err(unreachable("the peer has lost entries that it had accepted"));
                }
                Ok(())
            }
            Err(StreamAppendError::HigherVote(_)) => Ok(()),
            Ok(_) | Err(StreamAppendError::Conflict(_)) => {
                Err(Malformed("an answer to something else").into())
            }
        }
    }

    /// Gives a peer up that has been keeping the log from being purged for too long.
    fn check_purge(&mut self, accepted: Option<LogId>) -> Result<(), RpcError> {
        let purge = self.client.clients.purge.load(Ordering::Relaxed);
        if accepted.map_or(0, |accepted| accepted.index) >= purge {
            self.behind_since = None;
            return Ok(());
        }
        let since = *self.behind_since.get_or_insert_with(Instant::now);
        match since.elapsed() < PURGE_PATIENCE {
            true => Ok(()),
            false => Err(unreachable("the peer is too far behind for the log; a snapshot follows")),
        }
    }

    fn poll_item(&mut self, cx: &mut Context<'_>) -> Poll<Option<AppendItem>> {
        loop {
            if let Err(error) = self.send_ready(cx) {
                return Poll::Ready(Some(Err(error)));
            }
            if self.unanswered.is_empty() {
                return if self.input.is_none() { Poll::Ready(None) } else { Poll::Pending };
            }
            let item = match std::task::ready!(self.poll_answer(cx)) {
                Ok((asked, response)) => match self.judge(asked, response) {
                    // The core takes an acceptance for the answer to every request that ends at the same entry, and
                    // believes that the peer followed this leader when the last of them was sent: its lease and its
                    // read indexes rest on that. So it is told once the last of them is answered.
                    Ok(Ok(_)) if self.unanswered.iter().any(|later| later.last == asked.last) => continue,
                    item => item,
                },
                Err(error) => Err(error),
            };
            return Poll::Ready(Some(item));
        }
    }

    fn judge(&mut self, asked: Unanswered, response: Response) -> AppendItem {
        match response.body {
            Some(response::Body::Append(response)) => {
                let client = &self.client;
                client.clients.fitness.note(client.node_id, &response);
                let result = wire::from_append_response(response)?;
                self.check(asked, &result)?;
                Ok(result)
            }
            Some(response::Body::Failure(reason)) => Err(unreachable(reason)),
            _ => Err(Malformed("not the answer to an append").into()),
        }
    }
}

impl<S> Stream for AppendStream<'_, S>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
{
    type Item = AppendItem;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<AppendItem>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        let item = std::task::ready!(this.poll_item(cx));
        match &item {
            Some(Err(_)) => {
                // Whatever is still under way belongs to a connection that failed.
                this.client.connection = None;
                this.ended = true;
            }
            None | Some(Ok(Err(StreamAppendError::Conflict(_) | StreamAppendError::HigherVote(_)))) => {
                this.ended = true;
            }
            Some(Ok(Ok(_))) => {}
        }
        Poll::Ready(item)
    }
}
