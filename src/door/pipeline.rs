//! Many tagged requests on one stream, answered in whatever order they are done. How they are written is for a
//! [`Framing`] to say.
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
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, Stream, StreamExt};
use prost::Message;
use tokio::sync::{Mutex, Notify, Semaphore, mpsc, watch};
use tonic::Status;

use super::bodies::hold_unfinished;
use super::guest::{Call, Guest};
use super::limits::{Bound, DoorLimits};
use super::methods::{CLOSE_SESSION, MethodId, OPEN_SESSION};
use super::metrics::{Metrics, OpenStream, Share};
use super::{Answerer, Door, ServedNode, failure};
use crate::call::{Options, Rejected};
use crate::incoming::{Caller, Held};
use crate::machine::StateMachine;
use crate::proto::v1::{self, Failure};
use crate::runtime;
use crate::types::{HistoryEpoch, ReadOptions};

/// Requests in flight on one pipeline; more are not read until some are answered.
pub(crate) const MAX_IN_FLIGHT: usize = 16_384;

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
pub(crate) const fn base_bytes<G: Guest>() -> usize {
    64 + size_of::<Answered<G>>()
}

/// How requests and responses are written on a stream.
pub(crate) trait Framing: Send + Sync + 'static {
    type Guest: Guest;
    /// A message of requests.
    type Requests: Send + 'static;
    /// One of them. Until its turn comes it stays as it was sent.
    type Request: Message;
    /// One response.
    type Response: Send;
    /// A message of responses.
    type Responses: Send + 'static;
    /// What is made of a request to weigh it. By default nothing.
    type Made: Default + Send;

    fn requests(message: Self::Requests) -> Vec<Self::Request>;

    /// What `request` may take, and what was made of it to know that. Most are weighed without making anything of them.
    fn weigh(request: &Self::Request) -> (Weight, Self::Made);

    /// The tag of `request`, and what it asks for; nothing for one that is empty or of a kind that is not known. What was
    /// `made` of it before need not be made again.
    fn open(request: Self::Request, made: Self::Made) -> (u64, Option<Ask<Self::Guest>>);

    fn response(tag: u64, outcome: Outcome<Self::Guest>) -> Self::Response;

    fn responses(responses: Vec<Self::Response>) -> Self::Responses;
}

/// What a request may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Weight {
    /// As how many requests in flight it counts.
    pub(crate) permits: u32,
    /// Bytes to be set aside for its answer.
    pub(crate) expected: usize,
}

/// What is asked for on a pipeline.
pub(crate) enum Ask<G: Guest> {
    /// A call of the guest, the method being the number of its place among the guest's.
    Guest {
        method: usize,
        request: Result<G::Request, Rejected>,
        options: Result<Options, Rejected>,
    },
    OpenSession(v1::OpenSessionRequest),
    CloseSession(v1::CloseSessionRequest),
}

/// What is answered.
pub(crate) enum Done<G: Guest> {
    Guest(v1::Header, G::Response),
    Opened(v1::OpenSessionResponse),
    Closed(v1::CloseSessionResponse),
}

/// What comes of a request.
pub(crate) type Outcome<G> = Result<Done<G>, Failure>;

type QueryOf<G> = <<G as Guest>::Machine as StateMachine>::Query;

/// Starts to serve `inbound`, requests of `caller`, as far as that is known.
pub(crate) fn start<F, N, S>(door: Door<N>, caller: Option<Arc<Caller>>, inbound: S) -> Outgoing<F>
where
    F: Framing,
    N: ServedNode<Machine = <F::Guest as Guest>::Machine>,
    S: Stream<Item = Result<F::Requests, Status>> + Send + Unpin + 'static,
{
    let (sender, answers) = mpsc::unbounded_channel();
    let Door { node, by, metrics, limits, draining } = door;
    let queue = Queue { answers, arrived: Vec::new(), pending: VecDeque::new() };
    let shared = Arc::new(Shared {
        permits: Semaphore::new(MAX_IN_FLIGHT),
        in_flight: metrics.pipeline_requests(),
        queued: metrics.pipeline_bytes(),
        expected: AtomicUsize::new(0),
        bound: limits.queued_bytes,
        queue: std::sync::Mutex::new(queue),
        packed: Notify::new(),
        turn: Mutex::new(()),
        broken: OnceLock::new(),
    });
    let open = metrics.open_pipeline();
    let sessions = [OPEN_SESSION, CLOSE_SESSION].map(|method| metrics.methods().id(method.name));
    let client = client_address(caller.as_deref()).into();
    let outlet = Outlet { sender, shared: shared.clone(), by, metrics, sessions, client, caller, limits };
    runtime::spawn(read_requests::<F, N, S>(node, inbound, Arc::new(outlet), draining));
    Outgoing { shared, framing: PhantomData, _open: open }
}

/// What both directions share. Must not hold the channel's sender: the channel closes with the last request.
struct Shared<G: Guest> {
    permits: Semaphore,
    /// Requests that were read, and bytes of answers, until they are in a message.
    in_flight: Share,
    queued: Share,
    /// Bytes that the answers to transactions under way may have.
    expected: AtomicUsize,
    bound: Bound,
    queue: std::sync::Mutex<Queue<G>>,
    /// Notified when a message was packed.
    packed: Notify,
    /// Reads that found no room for their answers go one by one.
    turn: Mutex<()>,
    /// Why the request stream ended, if not in order.
    broken: OnceLock<Status>,
}

/// Answers on their way to the client.
struct Queue<G: Guest> {
    answers: mpsc::UnboundedReceiver<Answered<G>>,
    /// Scratch: what was just taken off the channel.
    arrived: Vec<Answered<G>>,
    /// Taken off the channel, not yet in a message.
    pending: VecDeque<Answered<G>>,
}

impl<G: Guest> Shared<G> {
    fn queue(&self) -> std::sync::MutexGuard<'_, Queue<G>> {
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
struct Outlet<G: Guest> {
    sender: mpsc::UnboundedSender<Answered<G>>,
    shared: Arc<Shared<G>>,
    by: Answerer,
    metrics: Arc<Metrics>,
    /// What opening and closing a session counts as.
    sessions: [MethodId; 2],
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

/// What came of a request, and the permits it gives back.
struct Answered<G: Guest> {
    tag: u64,
    outcome: Outcome<G>,
    permits: u32,
    bytes: usize,
}

/// A request in flight.
struct Ticket {
    tag: u64,
    method: MethodId,
    started: Instant,
    permits: u32,
    /// Bytes set aside for its answer.
    expected: usize,
}

impl<G: Guest> Outlet<G> {
    fn answer(&self, ticket: Ticket, outcome: Outcome<G>) {
        self.metrics.observe(ticket.method, ticket.started, &outcome);
        self.send(ticket.tag, ticket.permits, outcome);
        if ticket.expected > 0 {
            self.shared.expected.fetch_sub(ticket.expected, Ordering::Relaxed);
            self.shared.packed.notify_waiters();
        }
    }

    fn send(&self, tag: u64, permits: u32, outcome: Outcome<G>) {
        let outcome = outcome.map_err(|failure| self.by.told(failure));
        let bytes = base_bytes::<G>() + outcome_bytes(&outcome);
        self.shared.queued.add(bytes);
        // Fails when the client is gone: then nobody wants to know.
        if self.sender.send(Answered { tag, outcome, permits, bytes }).is_err() {
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
async fn read_requests<F, N, S>(
    node: N,
    mut inbound: S,
    outlet: Arc<Outlet<F::Guest>>,
    mut draining: watch::Receiver<bool>,
) where
    F: Framing,
    N: ServedNode<Machine = <F::Guest as Guest>::Machine>,
    S: Stream<Item = Result<F::Requests, Status>> + Unpin,
{
    loop {
        let message = tokio::select! {
            biased;
            // An error means that the server is gone, which ends its pipelines too.
            _ = draining.wait_for(|draining| *draining) => return,
            () = outlet.sender.closed() => return,
            message = next_message(&outlet, &mut inbound) => message,
        };
        match message {
            Some(Ok(message)) => {
                if !start_requests::<F, N>(&node, &outlet, F::requests(message)).await {
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
async fn next_message<G, M, S>(outlet: &Outlet<G>, inbound: &mut S) -> Option<Result<M, Status>>
where
    G: Guest,
    S: Stream<Item = Result<M, Status>> + Unpin,
{
    match outlet.room().await {
        true => inbound.next().await,
        false => None,
    }
}

/// What requests that wait take in memory.
fn waiting_bytes<R: Message>(requests: &[R]) -> usize {
    requests.iter().map(|request| request.encoded_len() + size_of::<R>()).sum()
}

/// Starts all requests of a message; false when the client is gone, or the pipeline has to end.
async fn start_requests<F, N>(node: &N, outlet: &Arc<Outlet<F::Guest>>, requests: Vec<F::Request>) -> bool
where
    F: Framing,
    N: ServedNode<Machine = <F::Guest as Guest>::Machine>,
{
    if requests.len() > MAX_IN_FLIGHT {
        // It would be held until that many others are answered; eight megabytes can hold four million empty requests.
        let failure = failure::invalid(&format!("a message holds more than {MAX_IN_FLIGHT} requests"));
        let _ = outlet.shared.broken.set(failure.into());
        return false;
    }
    let started = Instant::now();
    let mut reads = Vec::new();
    outlet.shared.in_flight.add(requests.len());
    let mut requests = requests.into_iter();
    let mut waiting = None;
    while let Some(request) = requests.next() {
        let (Weight { permits, expected }, mut made) = F::weigh(&request);
        let admitted = outlet.try_admit(permits);
        if !admitted || (expected > 0 && !outlet.has_room()) {
            // Reads that are not started would never give back what they have.
            start_reads(node, outlet, std::mem::take(&mut reads));
            // What waits stays as it was sent.
            made = F::Made::default();
            if waiting.is_none() {
                match outlet.keep(request.encoded_len() + waiting_bytes(requests.as_slice())) {
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
        let (tag, ask) = F::open(request, made);
        let Some(ask) = ask else {
            let failure = failure::invalid("the request is empty, or of a kind that this node does not know");
            outlet.send(tag, permits, Err(failure));
            continue;
        };
        outlet.shared.expected.fetch_add(expected, Ordering::Relaxed);
        let method = match &ask {
            Ask::Guest { method, .. } => MethodId(*method),
            Ask::OpenSession(_) => outlet.sessions[0],
            Ask::CloseSession(_) => outlet.sessions[1],
        };
        let ticket = Ticket { tag, method, started, permits, expected };
        reads.extend(begin(node, outlet, ticket, ask).await);
    }
    start_reads(node, outlet, reads);
    true
}

/// A read that waits for the others of its message.
struct Reading<G: Guest> {
    ticket: Ticket,
    query: QueryOf<G>,
    options: ReadOptions,
    asked: G::Asked,
}

/// Begins what `ask` says, or gives it back if it is a read.
async fn begin<G, N>(node: &N, outlet: &Arc<Outlet<G>>, ticket: Ticket, ask: Ask<G>) -> Option<Reading<G>>
where
    G: Guest,
    N: ServedNode<Machine = G::Machine>,
{
    match ask {
        Ask::Guest { request, options, .. } => {
            let call = options.and_then(|options| Ok((options, G::call(request?)?)));
            match call {
                Ok((Options::Write(options), (Call::Write(command), asked))) => {
                    let outlet = outlet.clone();
                    // A node that is kept for this would outlive its pipeline.
                    let clock = G::tells_times(&asked).then(|| node.clone());
                    node.propose(command, options, move |outcome| {
                        let time_at = clock.map(|node| move |elapsed_ms| node.log_time_at(elapsed_ms));
                        let time_at = time_at.as_ref().map(|time_at| time_at as &dyn Fn(u64) -> u64);
                        let outcome = outlet.by.written::<G>(asked, outcome, time_at);
                        outlet
                            .answer(ticket, outcome.map(|(header, response)| Done::Guest(header, response)));
                    })
                    .await;
                }
                Ok((Options::Read(options), (Call::Read(query), asked))) => {
                    return Some(Reading { ticket, query, options, asked });
                }
                Ok(_) => outlet.answer(ticket, Err(failure::mixed_up())),
                Err(rejected) => outlet.answer(ticket, Err(rejected.into())),
            }
        }
        // Rare enough for a task each.
        Ask::OpenSession(v1::OpenSessionRequest { ttl_ms }) => {
            let (node, outlet) = (node.clone(), outlet.clone());
            runtime::spawn(async move {
                let opened = node.open_session(&outlet.client, ttl_ms).await;
                let opened = opened.map(|opened| Done::Opened(outlet.by.opened(ttl_ms, opened)));
                outlet.answer(ticket, opened.map_err(Failure::from));
            });
        }
        Ask::CloseSession(v1::CloseSessionRequest { session, history }) => {
            let (node, outlet) = (node.clone(), outlet.clone());
            runtime::spawn(async move {
                let closed = node.close_session(session, HistoryEpoch(history)).await;
                let closed = closed.map(|closed| Done::Closed(outlet.by.closed(closed)));
                outlet.answer(ticket, closed.map_err(Failure::from));
            });
        }
    }
    None
}

/// Awaits `reads` together in a task of their own.
fn start_reads<G, N>(node: &N, outlet: &Arc<Outlet<G>>, reads: Vec<Reading<G>>)
where
    G: Guest,
    N: ServedNode<Machine = G::Machine>,
{
    if reads.is_empty() {
        return;
    }
    let (node, outlet) = (node.clone(), outlet.clone());
    runtime::spawn(async move {
        let (node, outlet) = (&node, &*outlet);
        let mut running: FuturesUnordered<_> =
            reads.into_iter().map(|reading| read(node, outlet, reading)).collect();
        tokio::select! {
            () = outlet.sender.closed() => {}
            () = async { while running.next().await.is_some() {} } => {}
        }
    });
}

/// Reads and answers, when there is room for the answer: what is read while there is none is let go and read again.
async fn read<G, N>(node: &N, outlet: &Outlet<G>, reading: Reading<G>)
where
    G: Guest,
    N: ServedNode<Machine = G::Machine>,
{
    let Reading { ticket, query, options, asked } = reading;
    let mut turn = None;
    loop {
        let outcome = node.read(query.clone(), options).await;
        if outlet.has_room() {
            let time_at = |elapsed_ms| node.log_time_at(elapsed_ms);
            let outcome = outlet.by.answered::<G>(asked, outcome, &time_at);
            return outlet.answer(ticket, outcome.map(|(header, response)| Done::Guest(header, response)));
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
pub(crate) struct Outgoing<F: Framing> {
    shared: Arc<Shared<F::Guest>>,
    framing: PhantomData<fn() -> F>,
    _open: OpenStream,
}

impl<F: Framing> Outgoing<F> {
    /// One message of what is pending.
    fn pack(shared: &Shared<F::Guest>, queue: &mut Queue<F::Guest>) -> F::Responses {
        let pending = &mut queue.pending;
        let mut responses = Vec::with_capacity(pending.len());
        let (mut bytes, mut permits) = (0, 0);
        while bytes < MESSAGE_BYTES
            && let Some(answered) =
                pending.pop_front_if(|next| bytes == 0 || bytes + next.bytes <= FULL_MESSAGE_BYTES)
        {
            bytes += answered.bytes;
            permits += answered.permits as usize;
            responses.push(F::response(answered.tag, answered.outcome));
        }
        shared.permits.add_permits(permits);
        shared.in_flight.sub(responses.len());
        shared.queued.sub(bytes);
        shared.packed.notify_waiters();
        F::responses(responses)
    }
}

impl<F: Framing> Stream for Outgoing<F> {
    type Item = Result<F::Responses, Status>;

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
        Poll::Ready(Some(Ok(Self::pack(shared, &mut queue))))
    }
}

impl<F: Framing> Drop for Outgoing<F> {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// Roughly what `outcome` takes in memory beyond what every one does, which is no less than in a message.
fn outcome_bytes<G: Guest>(outcome: &Outcome<G>) -> usize {
    match outcome {
        Ok(Done::Guest(_, response)) => G::response_bytes(response),
        Ok(Done::Opened(_) | Done::Closed(_)) => 0,
        Err(failure) => failure.message.len(),
    }
}

/// Where `caller` is, to tell whose sessions are whose; empty if that is not known. What tonic tells as the remote address of
/// a request is of connections that it has accepted itself.
pub(super) fn client_address(caller: Option<&Caller>) -> String {
    caller.and_then(Caller::address).map(|address| address.to_string()).unwrap_or_default()
}
