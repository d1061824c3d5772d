//! `Kv.Pipeline`: many tagged requests on one stream, answered in whatever order they are done.
//!
//! A unary call costs some thirty times a message on a stream, so clients put all their requests on one
//! pipeline. One task per pipeline reads requests. A write is proposed there and then, and its completion
//! pushes the answer to the pipeline's channel: no task per write. The reads of one message are awaited
//! together by one task, so that they share one confirmation of leadership. The response stream takes
//! whatever is ready off the channel and packs it into one message.
//!
//! # Bounds
//!
//! Every request holds permits ([`MAX_IN_FLIGHT`]) from when it is read until its answer is packed. A
//! pipeline without permits left is not read, and HTTP/2 flow control stops its client; nothing fails. What is left of a
//! message meanwhile counts as [unfinished](Held::Unfinished) for its connection.
//!
//! The bytes of answers that wait for their client are bounded by pipeline and for all pipelines together
//! ([`DoorLimits::queued_bytes`](super::limits::DoorLimits::queued_bytes)), however much one message asks for: a read whose
//! answer finds no room is read again once there is some, and a transaction that reads is proposed when there is room for
//! the most that it may answer. Values in answers share memory with the state, until it changes.
//!
//! # Ends
//!
//! When the client half-closes, or the server drains, no more requests are read; the stream ends once those
//! in flight are answered. When the client is gone, permits are closed and the channel with them: the
//! reading task ends, reads are abandoned, writes complete into nothing.
//!
//! So it is with a client that takes nothing for [`PATIENCE`] while something waits for it to do so: the answers that wait
//! are let go, and what it finds in their place, should it ever read again, is the end of its pipeline and why.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, Stream, StreamExt};
use prost::Message;
use tokio::sync::{Mutex, Notify, Semaphore, mpsc, watch};
use tonic::Status;

use crate::incoming::{Caller, Held};
use crate::machine::kv::{KvQuery, MAX_KEY_BYTES, MAX_TXN_RESULT_BYTES, MAX_VALUE_BYTES};
use crate::proto::v1::tagged_request::Request;
use crate::proto::v1::tagged_response::Response;
use crate::proto::v1::txn_operation::Operation;
use crate::proto::v1::{
    Failure, Item, PipelineRequest, PipelineResponse, TaggedRequest, TaggedResponse, TxnOperation,
};
use crate::runtime;
use crate::types::ReadOptions;

use super::bodies::hold_unfinished;
use super::failure;
use super::limits::{Bound, DoorLimits};
use super::metrics::{Metrics, OpenStream, Share};
use super::node::KvNode;
use super::wire::{self, Answerer, Asked, Call, Method};

/// Requests in flight on one pipeline; more are not read until some are answered.
pub(super) const MAX_IN_FLIGHT: usize = 16_384;

/// A range or a transaction counts as this many requests: its answer may be thousands of times larger than others.
const RANGE_PERMITS: u32 = 64;

/// A pipeline may have so many bytes of answers waiting however many others have, up to twice the bound for all.
const QUEUED_FLOOR_BYTES: usize = 64 * 1024;

/// A pipeline of which nothing is taken for this long, while something waits for room, has lost its client.
const PATIENCE: Duration = Duration::from_secs(60);

/// A pipeline that has nothing to be taken, and no room because of others, looks again after this long.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Most answers in one message.
const MESSAGE_RESPONSES: usize = 1024;

/// A message is sent once it has this many bytes. The last answer in it may exceed it, within [`FULL_MESSAGE_BYTES`].
const MESSAGE_BYTES: usize = 1024 * 1024;

/// An answer with which a message would have more than this begins the next one. What is counted of small answers is a
/// little less than what they take.
const FULL_MESSAGE_BYTES: usize = super::MAX_ANSWER_BYTES - 128 * 1024;

/// What a write's answer takes, and what any answer takes beyond its items.
pub(super) const RESPONSE_BYTES: usize = 64 + size_of::<Answered>();

/// What a pipeline works with.
pub(super) struct Service<N> {
    pub(super) node: N,
    pub(super) by: Answerer,
    pub(super) metrics: Arc<Metrics>,
    pub(super) draining: watch::Receiver<bool>,
    /// Whose connection it is on, as far as that is known.
    pub(super) caller: Option<Arc<Caller>>,
    pub(super) limits: Arc<DoorLimits>,
}

/// Starts to serve `inbound`.
pub(super) fn start<N, S>(service: Service<N>, inbound: S) -> Outgoing
where
    N: KvNode,
    S: Stream<Item = Result<PipelineRequest, Status>> + Send + Unpin + 'static,
{
    let (sender, answers) = mpsc::unbounded_channel();
    let client = service.caller.as_ref().and_then(|caller| caller.address());
    let queue = Queue { answers, arrived: Vec::new(), pending: VecDeque::new() };
    let shared = Arc::new(Shared {
        permits: Semaphore::new(MAX_IN_FLIGHT),
        in_flight: service.metrics.pipeline_requests(),
        queued: service.metrics.pipeline_bytes(),
        expected: AtomicUsize::new(0),
        bound: service.limits.queued_bytes,
        queue: std::sync::Mutex::new(queue),
        packed: Notify::new(),
        turn: Mutex::new(()),
        broken: OnceLock::new(),
    });
    let open = service.metrics.open_pipeline();
    let outlet = Outlet {
        sender,
        shared: shared.clone(),
        by: service.by,
        metrics: service.metrics.clone(),
        client: client.map(|address| address.to_string()).unwrap_or_default().into(),
        caller: service.caller,
        limits: service.limits,
    };
    runtime::spawn(read_requests(service.node, inbound, Arc::new(outlet), service.draining));
    Outgoing { shared, _open: open }
}

/// What both directions share. Must not hold the channel's sender: the channel closes with the last request.
struct Shared {
    permits: Semaphore,
    /// Requests that were read, and bytes of answers, until they are in a message.
    in_flight: Share,
    queued: Share,
    /// Bytes that the answers to transactions under way may have.
    expected: AtomicUsize,
    bound: Bound,
    queue: std::sync::Mutex<Queue>,
    /// Notified when a message was packed.
    packed: Notify,
    /// Reads that found no room for their answers go one by one.
    turn: Mutex<()>,
    /// Why the request stream ended, if not in order.
    broken: OnceLock<Status>,
}

/// Answers on their way to the client.
struct Queue {
    answers: mpsc::UnboundedReceiver<Answered>,
    /// Scratch: what was just taken off the channel.
    arrived: Vec<Answered>,
    /// Taken off the channel, not yet in a message.
    pending: VecDeque<Answered>,
}

impl Shared {
    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody takes answers any more: lets go of those that wait, and of those to come.
    fn close(&self) {
        self.permits.close();
        let mut queue = self.queue();
        queue.answers.close();
        let Queue { answers, arrived, pending } = &mut *queue;
        arrived.clear();
        let mut bytes: usize = pending.drain(..).map(|answered| answered.bytes).sum();
        while let Ok(answered) = answers.try_recv() {
            bytes += answered.bytes;
        }
        self.queued.sub(bytes);
        // Those under way are not answered.
        self.in_flight.clear();
    }
}

/// Where answers go. One clone per request in flight; the response stream ends with the last of them.
struct Outlet {
    sender: mpsc::UnboundedSender<Answered>,
    shared: Arc<Shared>,
    by: Answerer,
    metrics: Arc<Metrics>,
    /// The client's address; empty if that is not known.
    client: Arc<str>,
    caller: Option<Arc<Caller>>,
    limits: Arc<DoorLimits>,
}

/// What is left of a message that waits, counted for its connection.
struct Waiting<'a> {
    caller: &'a Caller,
    bytes: usize,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.caller.give_back(Held::Unfinished, self.bytes);
    }
}

/// A response, and the permits it gives back.
struct Answered {
    response: TaggedResponse,
    permits: u32,
    bytes: usize,
}

/// A request in flight.
struct Ticket {
    tag: u64,
    method: Method,
    started: Instant,
    permits: u32,
    /// Bytes set aside for its answer.
    expected: usize,
}

impl Outlet {
    fn answer(&self, ticket: Ticket, outcome: Result<Response, Failure>) {
        self.metrics.observe(ticket.method, ticket.started, &outcome);
        self.send(ticket.tag, ticket.permits, outcome.unwrap_or_else(Response::Failure));
        if ticket.expected > 0 {
            self.shared.expected.fetch_sub(ticket.expected, Ordering::Relaxed);
            self.shared.packed.notify_waiters();
        }
    }

    fn send(&self, tag: u64, permits: u32, response: Response) {
        let response = match response {
            Response::Failure(failure) => Response::Failure(self.by.told(failure)),
            done => done,
        };
        let response = TaggedResponse { tag, response: Some(response) };
        let bytes = response_bytes(&response);
        self.shared.queued.add(bytes);
        // Fails when the client is gone: then nobody wants to know.
        if self.sender.send(Answered { response, permits, bytes }).is_err() {
            self.shared.queued.sub(bytes);
        }
    }

    fn try_admit(&self, permits: u32) -> bool {
        self.shared.permits.try_acquire_many(permits).map(|permit| permit.forget()).is_ok()
    }

    /// Whether another answer may be queued.
    fn has_room(&self) -> bool {
        let Shared { queued, expected, bound, .. } = &*self.shared;
        let (taken, all) = (queued.own() + expected.load(Ordering::Relaxed), queued.all());
        let floor = if all < bound.all.saturating_mul(2) { QUEUED_FLOOR_BYTES } else { 0 };
        taken < bound.share(all).max(floor)
    }

    /// Waits until the client has taken enough of the answers; false when it is gone, or takes nothing.
    async fn room(&self) -> bool {
        loop {
            let mut packed = std::pin::pin!(self.shared.packed.notified());
            packed.as_mut().enable();
            if self.has_room() {
                return true;
            }
            tokio::select! {
                () = packed => {}
                () = self.sender.closed() => return false,
                () = self.idles() => return false,
            }
        }
    }

    /// Waits for permits; false when the client is gone, or takes nothing.
    async fn admit(&self, permits: u32) -> bool {
        let mut admitted = std::pin::pin!(self.shared.permits.acquire_many(permits));
        loop {
            let mut packed = std::pin::pin!(self.shared.packed.notified());
            packed.as_mut().enable();
            tokio::select! {
                biased;
                admitted = &mut admitted => return admitted.map(|permit| permit.forget()).is_ok(),
                () = packed => {}
                () = self.idles() => return false,
            }
        }
    }

    /// Ends the pipeline, and returns, if from now on the client takes nothing for [`PATIENCE`] although something is there
    /// for it. The caller stops waiting for this when anything is taken; what others take is noticed here.
    async fn idles(&self) {
        let mut since = None;
        loop {
            let now = tokio::time::Instant::now();
            match self.shared.queued.own() {
                // There is nothing to take: others leave no room, or nothing is answered.
                0 => since = None,
                _ if now.duration_since(*since.get_or_insert(now)) >= PATIENCE => break,
                _ => {}
            }
            tokio::time::sleep(if since.is_none() { LOOK_AGAIN } else { PATIENCE }).await;
            if since.is_none() && self.has_room() {
                self.shared.packed.notify_waiters();
            }
        }
        let _ = self.shared.broken.set(failure::pipeline_not_read(PATIENCE, self.shared.bound).into());
        self.shared.close();
    }

    /// Counts `bytes` of requests that wait.
    ///
    /// # Errors
    /// The failure that ends the pipeline, when they are too many.
    fn keep(&self, bytes: usize) -> Result<Option<Waiting<'_>>, Failure> {
        let Some(caller) = self.caller.as_deref() else { return Ok(None) };
        hold_unfinished(caller, &self.limits, bytes)?;
        Ok(Some(Waiting { caller, bytes }))
    }
}

/// The reading side of a pipeline.
async fn read_requests<N, S>(
    node: N,
    mut inbound: S,
    outlet: Arc<Outlet>,
    mut draining: watch::Receiver<bool>,
) where
    N: KvNode,
    S: Stream<Item = Result<PipelineRequest, Status>> + Unpin,
{
    loop {
        let message = tokio::select! {
            biased;
            // An error means that the server is gone, which ends its pipelines too.
            _ = draining.wait_for(|draining| *draining) => return,
            () = outlet.sender.closed() => return,
            message = next_request(&outlet, &mut inbound) => message,
        };
        match message {
            Some(Ok(message)) => {
                if !start_requests(&node, &outlet, message).await {
                    return;
                }
            }
            Some(Err(status)) => {
                // A message that cannot be decoded, or a broken connection. Answers still go out first.
                let _ = outlet.shared.broken.set(status);
                return;
            }
            None => return,
        }
    }
}

/// The next message, once the client has taken enough of the answers.
async fn next_request<S>(outlet: &Outlet, inbound: &mut S) -> Option<Result<PipelineRequest, Status>>
where
    S: Stream<Item = Result<PipelineRequest, Status>> + Unpin,
{
    match outlet.room().await {
        true => inbound.next().await,
        false => None,
    }
}

/// What requests that wait take in memory.
fn waiting_bytes(requests: &[TaggedRequest]) -> usize {
    requests.iter().map(|request| request.encoded_len() + size_of::<TaggedRequest>()).sum()
}

/// Starts all requests of a message; false when the client is gone, or the pipeline has to end.
async fn start_requests<N: KvNode>(node: &N, outlet: &Arc<Outlet>, message: PipelineRequest) -> bool {
    if message.requests.len() > MAX_IN_FLIGHT {
        // It would be held until that many others are answered; eight megabytes can hold four million empty requests.
        let failure = failure::invalid(&format!("a message holds more than {MAX_IN_FLIGHT} requests"));
        let _ = outlet.shared.broken.set(failure.into());
        return false;
    }
    let started = Instant::now();
    let mut reads = Vec::new();
    outlet.shared.in_flight.add(message.requests.len());
    let mut requests = message.requests.into_iter();
    let mut waiting = None;
    while let Some(TaggedRequest { tag, request }) = requests.next() {
        let method = request.as_ref().map(wire::method);
        let permits = match method {
            Some(Method::Range | Method::Txn) => RANGE_PERMITS,
            _ => 1,
        };
        let expected = request.as_ref().map_or(0, expected_bytes);
        let admitted = outlet.try_admit(permits);
        if !admitted || (expected > 0 && !outlet.has_room()) {
            // Reads that are not started would never give back what they have.
            start_reads(node, outlet, std::mem::take(&mut reads));
            if waiting.is_none() {
                let own = request.as_ref().map_or(0, |request| request.encoded_len());
                match outlet.keep(own + waiting_bytes(requests.as_slice())) {
                    Ok(kept) => waiting = kept,
                    Err(failure) => {
                        let _ = outlet.shared.broken.set(failure.into());
                        return false;
                    }
                }
            }
            if !admitted && !outlet.admit(permits).await {
                return false;
            }
            if expected > 0 && !outlet.room().await {
                return false;
            }
        }
        let (Some(request), Some(method)) = (request, method) else {
            let failure = failure::invalid("the request is empty, or of a kind that this node does not know");
            outlet.send(tag, permits, Response::Failure(failure));
            continue;
        };
        outlet.shared.expected.fetch_add(expected, Ordering::Relaxed);
        let ticket = Ticket { tag, method, started, permits, expected };
        match wire::decode(request) {
            Ok(Call::Write(command, options)) => {
                let outlet = outlet.clone();
                let asked = Asked::new(ticket.method, &command);
                node.propose(command, options, move |outcome| {
                    let outcome = wire::written(&outlet.by, asked, outcome);
                    outlet.answer(ticket, outcome);
                })
                .await;
            }
            Ok(Call::Read(query, options)) => reads.push((ticket, query, options)),
            // Rare enough for a task each.
            Ok(Call::OpenSession { ttl_ms }) => {
                let (node, outlet) = (node.clone(), outlet.clone());
                runtime::spawn(async move {
                    let opened = node.open_session(&outlet.client, ttl_ms).await;
                    outlet.answer(ticket, wire::opened(&outlet.by, ttl_ms, opened));
                });
            }
            Ok(Call::CloseSession { session, history }) => {
                let (node, outlet) = (node.clone(), outlet.clone());
                runtime::spawn(async move {
                    let closed = node.close_session(session, history).await;
                    outlet.answer(ticket, wire::closed(&outlet.by, closed));
                });
            }
            Err(failure) => outlet.answer(ticket, Err(failure)),
        }
    }
    start_reads(node, outlet, reads);
    true
}

/// Awaits `reads` together in a task of their own.
fn start_reads<N: KvNode>(node: &N, outlet: &Arc<Outlet>, reads: Vec<(Ticket, KvQuery, ReadOptions)>) {
    if reads.is_empty() {
        return;
    }
    let (node, outlet) = (node.clone(), outlet.clone());
    runtime::spawn(async move {
        let (node, outlet) = (&node, &*outlet);
        let mut running: FuturesUnordered<_> = reads
            .into_iter()
            .map(|(ticket, query, options)| read(node, outlet, ticket, query, options))
            .collect();
        tokio::select! {
            () = outlet.sender.closed() => {}
            () = async { while running.next().await.is_some() {} } => {}
        }
    });
}

/// Reads and answers, when there is room for the answer: what is read while there is none is let go and read again.
async fn read<N: KvNode>(node: &N, outlet: &Outlet, ticket: Ticket, query: KvQuery, options: ReadOptions) {
    let key = wire::asked_key(&query);
    let mut turn = None;
    loop {
        let outcome = node.read(query.clone(), options).await;
        if outlet.has_room() {
            return outlet.answer(ticket, wire::answered(&outlet.by, key, outcome));
        }
        drop(outcome);
        if turn.is_none() {
            turn = Some(outlet.shared.turn.lock().await);
        }
        if !outlet.room().await {
            return;
        }
    }
}

/// The responses of a pipeline.
pub(super) struct Outgoing {
    shared: Arc<Shared>,
    _open: OpenStream,
}

impl Shared {
    /// One message of what is pending.
    fn pack(&self, queue: &mut Queue) -> PipelineResponse {
        let pending = &mut queue.pending;
        let mut responses = Vec::with_capacity(pending.len());
        let (mut bytes, mut permits) = (0, 0);
        while bytes < MESSAGE_BYTES
            && let Some(answered) =
                pending.pop_front_if(|next| bytes == 0 || bytes + next.bytes <= FULL_MESSAGE_BYTES)
        {
            bytes += answered.bytes;
            permits += answered.permits as usize;
            responses.push(answered.response);
        }
        self.permits.add_permits(permits);
        self.in_flight.sub(responses.len());
        self.queued.sub(bytes);
        self.packed.notify_waiters();
        PipelineResponse { responses }
    }
}

impl Stream for Outgoing {
    type Item = Result<PipelineResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let shared = &self.shared;
        let mut queue = shared.queue();
        let Queue { answers, arrived, pending } = &mut *queue;
        if pending.is_empty() {
            if ready!(answers.poll_recv_many(cx, arrived, MESSAGE_RESPONSES)) == 0 {
                return Poll::Ready(shared.broken.get().cloned().map(Err));
            }
            pending.extend(arrived.drain(..));
        }
        Poll::Ready(Some(Ok(shared.pack(&mut queue))))
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// The most that the answer to `request` may have, where that is much and the request cannot be made again.
fn expected_bytes(request: &Request) -> usize {
    let Request::Txn(txn) = request else { return 0 };
    let of = |operations: &[TxnOperation]| {
        let operation = |operation: &TxnOperation| match operation.operation {
            Some(Operation::Get(_)) => MAX_VALUE_BYTES + MAX_KEY_BYTES,
            Some(Operation::Range(_)) => MAX_TXN_RESULT_BYTES,
            Some(Operation::Put(_) | Operation::Delete(_) | Operation::DeleteRange(_)) | None => 0,
        };
        operations.iter().map(operation).fold(0, usize::saturating_add)
    };
    of(&txn.success).max(of(&txn.failure)).min(MAX_TXN_RESULT_BYTES)
}

/// What `response` takes.
fn response_bytes(response: &TaggedResponse) -> usize {
    RESPONSE_BYTES + response.response.as_ref().map_or(0, answer_bytes)
}

/// Roughly what `answer` takes in memory beyond what every answer does, which is no less than in a message.
pub(super) fn answer_bytes(answer: &Response) -> usize {
    match answer {
        Response::Get(get) => get.encoded_len(),
        Response::Range(range) => range.encoded_len() + range.items.len() * size_of::<Item>(),
        Response::Failure(failure) => failure.message.len(),
        Response::Txn(txn) => txn.encoded_len(),
        _ => 0,
    }
}
