//! Many tagged requests on one stream, answered in whatever order they are done. How they are written is for a
//! [`PipelineFraming`] to say.
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
//! message meanwhile counts as [unfinished](crate::incoming::Held::Unfinished) for its connection.
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
//! So it is with a client that takes nothing for a minute while something waits for it to do so, or for a second when there is no room for other pipelines: the answers that wait
//! are let go, and what it finds in their place, should it ever read again, is the end of its pipeline and why.

mod answers;
mod framing;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures::stream::{FuturesUnordered, Stream, StreamExt};
use prost::Message;
use tokio::sync::{Mutex, Notify, Semaphore, mpsc, watch};
use tonic::Status;

use super::guest::{Call, Guest, guarded, guarded_async};
use super::methods::{CLOSE_SESSION, MethodId, OPEN_SESSION};
use super::metrics::OpenStream;
use super::relay::RelayedCall;
use super::rights::Principal;
use super::{Door, ServedNode, failure, permitted};
use crate::call::{Options, Rejected};
use crate::incoming::Caller;
use crate::machine::StateMachine;
use crate::proto::v1::call::Content;
use crate::proto::v1::{self, Failure};
use crate::runtime;
use crate::types::{HistoryEpoch, ReadOptions};

use answers::{AnswerOutlet, AnswerQueue, PipelineShared, RequestDone, RequestTicket};
pub(crate) use answers::{Done, RequestOutcome, base_bytes};
pub(crate) use framing::{PipelineFraming, PipelineRequestKind, Weight};

/// Requests in flight on one pipeline; more are not read until some are answered.
pub(crate) const MAX_IN_FLIGHT: usize = 16_384;

/// Most answers in one message.
const MESSAGE_RESPONSES: usize = 1024;

/// A message is sent once it has this many bytes. The last answer in it may exceed it, within [`FULL_MESSAGE_BYTES`].
const MESSAGE_BYTES: usize = 1024 * 1024;

/// An answer with which a message would have more than this begins the next one. What is counted of small answers is a
/// little less than what they take.
const FULL_MESSAGE_BYTES: usize = super::MAX_ANSWER_BYTES - 128 * 1024;

type QueryOf<G> = <<G as Guest>::Machine as StateMachine>::Query;

/// Starts to serve `inbound`, requests of `caller`, as far as that is known, who is `principal`.
pub(crate) fn start<F, N, S>(
    door: Door<N>,
    caller: Option<Arc<Caller>>,
    principal: Arc<Principal>,
    inbound: S,
) -> Outgoing<F>
where
    F: PipelineFraming,
    N: ServedNode<Machine = <F::Guest as Guest>::Machine>,
    S: Stream<Item = Result<F::Requests, Status>> + Send + Unpin + 'static,
{
    let (sender, answers) = mpsc::unbounded_channel();
    let relay = door.relay();
    let Door { node, by, metrics, limits, draining, is_relayed: _ } = door;
    let queue = AnswerQueue { answers, arrived: Vec::new(), pending: VecDeque::new() };
    let shared = Arc::new(PipelineShared {
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
    let outlet = Arc::new(AnswerOutlet {
        sender,
        shared: shared.clone(),
        by,
        metrics,
        sessions,
        client,
        caller,
        principal,
        limits,
        relay,
    });
    let reading = read_requests::<F, N, S>(node, inbound, outlet.clone(), draining);
    runtime::spawn(async move {
        if let Err(failure) = guarded_async(true, reading).await {
            // Said before the outlet goes, and with it the end of the stream comes: else that would look like one in order.
            let _ = outlet.shared.broken.set(failure.into());
        }
    });
    Outgoing { shared, next: None, _open: open }
}

/// The reading side of a pipeline.
async fn read_requests<F, N, S>(
    node: N,
    mut inbound: S,
    outlet: Arc<AnswerOutlet<F::Guest>>,
    mut draining: watch::Receiver<bool>,
) where
    F: PipelineFraming,
    N: ServedNode<Machine = <F::Guest as Guest>::Machine>,
    S: Stream<Item = Result<F::Requests, Status>> + Unpin,
{
    let principal = outlet.principal.clone();
    let mut ended = std::pin::pin!(principal.ended());
    loop {
        let message = tokio::select! {
            biased;
            // An error means that the server is gone, which ends its pipelines too.
            _ = draining.wait_for(|draining| *draining) => return,
            _ = &mut ended => {
                // What was begun is answered first.
                let _ = outlet.shared.broken.set(failure::no_longer_authenticated().into());
                return;
            }
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
                let _ = outlet.shared.broken.set(failure::unread(status));
                return;
            }
            None => return,
        }
    }
}

/// The next message, once the client has taken enough of the answers.
async fn next_message<G, M, S>(outlet: &AnswerOutlet<G>, inbound: &mut S) -> Option<Result<M, Status>>
where
    G: Guest,
    S: Stream<Item = Result<M, Status>> + Unpin,
{
    match outlet.turn_to_read().await {
        true => inbound.next().await,
        false => None,
    }
}

/// What requests that wait take in memory.
fn waiting_bytes<R: Message>(requests: &[R]) -> usize {
    requests.iter().map(|request| request.encoded_len() + size_of::<R>()).sum()
}

/// The same in memory of its own.
fn owned<R: Message + Default>(request: &R) -> R {
    R::decode(request.encode_to_vec().as_slice()).expect("invariant: it has been decoded before")
}

/// Starts all requests of a message; false when the client is gone, or the pipeline has to end.
async fn start_requests<F, N>(
    node: &N,
    outlet: &Arc<AnswerOutlet<F::Guest>>,
    requests: Vec<F::Request>,
) -> bool
where
    F: PipelineFraming,
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
    while let Some(mut request) = requests.next() {
        let (Weight { permits, expected }, mut made) = F::weigh(&request);
        let (admitted, pause) = (outlet.try_admit(permits), outlet.principal.ask_later());
        if !admitted || pause.is_some() || (expected > 0 && !outlet.has_room()) {
            // Reads that are not started would never give back what they have.
            start_reads(node, outlet, std::mem::take(&mut reads));
            // What waits stays as it was sent.
            made = F::Made::default();
            if waiting.is_none() {
                // They are slices of their message, which may be many times what they are.
                request = owned(&request);
                requests = requests.map(|request| owned(&request)).collect::<Vec<_>>().into_iter();
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
            if !outlet.pauses(pause).await {
                return false;
            }
            if expected > 0 && !outlet.room().await {
                return false;
            }
            if !outlet.is_permitted() {
                return false;
            }
        }
        let weight = Weight { permits, expected };
        if let Some((ticket, ask)) = opened::<F>(outlet, (request, made), weight, started) {
            reads.extend(begin(node, outlet, ticket, ask).await);
        }
    }
    start_reads(node, outlet, reads);
    true
}

/// What a request asks for, and its ticket; none if it has been passed on or refused.
fn opened<F: PipelineFraming>(
    outlet: &Arc<AnswerOutlet<F::Guest>>,
    (request, made): (F::Request, F::Made),
    Weight { permits, expected }: Weight,
    started: Instant,
) -> Option<(RequestTicket, PipelineRequestKind<F::Guest>)> {
    match pass_on::<F>(outlet, &request, Weight { permits, expected }, started) {
        Ok(true) => return None,
        Ok(false) => {}
        Err((tag, failure)) => {
            outlet.refuse(tag, permits, failure);
            return None;
        }
    }
    let (tag, ask) = F::open(request, made);
    let ask = match ask.and_then(|ask| permit(&outlet.principal, &ask).map(|()| ask)) {
        Ok(ask) => ask,
        Err(failure) => {
            outlet.refuse(tag, permits, failure);
            return None;
        }
    };
    outlet.shared.expected.fetch_add(expected, Ordering::Relaxed);
    let method = match &ask {
        PipelineRequestKind::Guest { method, .. } => MethodId(*method),
        PipelineRequestKind::OpenSession(_) => outlet.sessions[0],
        PipelineRequestKind::CloseSession(_) => outlet.sessions[1],
    };
    Some((RequestTicket { tag, method, started, permits, expected }, ask))
}

/// Whether `ask` is granted to `principal`.
///
/// # Errors
/// The failure to answer instead.
fn permit<G: Guest>(principal: &Principal, ask: &PipelineRequestKind<G>) -> Result<(), Failure> {
    match ask {
        PipelineRequestKind::Guest { method, request: Ok(request), .. } => {
            permitted::request::<G>(principal, *method, request)
        }
        // It is refused for what it is, and nothing is done.
        PipelineRequestKind::Guest { request: Err(_), .. } => Ok(()),
        PipelineRequestKind::OpenSession(_) | PipelineRequestKind::CloseSession(_) => {
            permitted::session(principal)
        }
    }
}

/// Has another node answer a change, in a task of its own, in this node's name. False if the request is to be carried out here.
///
/// # Errors
/// The tag and the failure to answer instead, when it is not granted to the caller.
fn pass_on<F: PipelineFraming>(
    outlet: &Arc<AnswerOutlet<F::Guest>>,
    request: &F::Request,
    Weight { permits, expected }: Weight,
    started: Instant,
) -> Result<bool, (u64, Failure)> {
    let Some(relay) = outlet.relay.clone() else { return Ok(false) };
    let Some(RelayedCall { tag, method, call }) = F::relayed(request) else { return Ok(false) };
    if !outlet.principal.is_everyone() {
        // Of what cannot be read nobody knows what it touches.
        let (_, ask) = F::open(request.clone(), F::Made::default());
        match ask {
            Ok(PipelineRequestKind::Guest { request: Err(rejected), .. }) => {
                return Err((tag, rejected.into()));
            }
            Ok(ask) => permit(&outlet.principal, &ask).map_err(|failure| (tag, failure))?,
            Err(failure) => return Err((tag, failure)),
        }
    }
    let id = match (method, &call.content) {
        (Some(method), _) => MethodId(method),
        (None, Some(Content::OpenSession(_))) => outlet.sessions[0],
        (None, _) => outlet.sessions[1],
    };
    let ticket = RequestTicket { tag, method: id, started, permits, expected };
    outlet.shared.expected.fetch_add(expected, Ordering::Relaxed);
    let outlet = outlet.clone();
    runtime::spawn(async move {
        tokio::select! {
            // What was sent goes on, whoever waits for it.
            () = outlet.sender.closed() => {}
            outcome = relay.relay(call, None) => {
                outlet.answer(ticket, || outcome.map(|answer| Done::Relayed(method, answer)));
            }
        }
    });
    Ok(true)
}

/// A read that waits for the others of its message.
struct PendingRead<G: Guest> {
    ticket: RequestTicket,
    query: QueryOf<G>,
    options: ReadOptions,
    asked: G::Asked,
}

/// Begins what `ask` says, or gives it back if it is a read.
async fn begin<G, N>(
    node: &N,
    outlet: &Arc<AnswerOutlet<G>>,
    ticket: RequestTicket,
    ask: PipelineRequestKind<G>,
) -> Option<PendingRead<G>>
where
    G: Guest,
    N: ServedNode<Machine = G::Machine>,
{
    match ask {
        PipelineRequestKind::Guest { request, options, .. } => {
            let call = || {
                let (options, (call, asked)) = (options?, G::call(request?)?);
                // Not asked of a read, which is answered here and has the clock at hand.
                let tells_times = matches!(call, Call::Write(_)) && G::tells_times(&asked);
                Ok::<_, Rejected>((options, (call, asked, tells_times)))
            };
            let call = match guarded(false, call) {
                Ok(call) => call.map_err(Failure::from),
                Err(failure) => Err(failure),
            };
            match call {
                Ok((Options::Write(options), (Call::Write(command), asked, tells_times))) => {
                    // A node that is kept for this would outlive its pipeline.
                    let clock = tells_times.then(|| node.clone());
                    let told = outlet.clone();
                    let proposing = node.propose(command, options, move |outcome| {
                        let time_at = clock.map(|node| move |elapsed_ms| node.log_time_at(elapsed_ms));
                        let time_at = time_at.as_ref().map(|time_at| time_at as &dyn Fn(u64) -> u64);
                        told.answer(ticket, || {
                            let written = told.by.written::<G>(asked, outcome, time_at);
                            written.map(|(header, response)| Done::Guest(header, response))
                        });
                    });
                    // The machine is asked of its command before that is proposed, and not after.
                    if let Err(failure) = guarded_async(false, proposing).await {
                        outlet.answer(ticket, || Err(failure));
                    }
                }
                Ok((Options::Read(options), (Call::Read(query), asked, _))) => {
                    return Some(PendingRead { ticket, query, options, asked });
                }
                Ok(_) => outlet.answer(ticket, || Err(failure::mixed_up())),
                Err(failure) => outlet.answer(ticket, || Err(failure)),
            }
        }
        // Rare enough for a task each.
        PipelineRequestKind::OpenSession(v1::OpenSessionRequest { ttl_ms }) => {
            let (node, outlet) = (node.clone(), outlet.clone());
            runtime::spawn(async move {
                let opened = node.open_session(&outlet.client, ttl_ms).await;
                let opened = opened.map(|opened| Done::Opened(outlet.by.opened(ttl_ms, opened)));
                outlet.answer(ticket, || opened.map_err(Failure::from));
            });
        }
        PipelineRequestKind::CloseSession(v1::CloseSessionRequest { session, history }) => {
            let (node, outlet) = (node.clone(), outlet.clone());
            runtime::spawn(async move {
                let closed = node.close_session(session, HistoryEpoch(history)).await;
                let closed = closed.map(|closed| Done::Closed(outlet.by.closed(closed)));
                outlet.answer(ticket, || closed.map_err(Failure::from));
            });
        }
    }
    None
}

/// Awaits `reads` together in a task of their own.
fn start_reads<G, N>(node: &N, outlet: &Arc<AnswerOutlet<G>>, reads: Vec<PendingRead<G>>)
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
            reads.into_iter().map(|reading| read_guarded(node, outlet, reading)).collect();
        tokio::select! {
            () = outlet.sender.closed() => {}
            () = async { while running.next().await.is_some() {} } => {}
        }
    });
}

/// As [`read`], where that may panic.
async fn read_guarded<G, N>(node: &N, outlet: &AnswerOutlet<G>, reading: PendingRead<G>)
where
    G: Guest,
    N: ServedNode<Machine = G::Machine>,
{
    let ticket = reading.ticket;
    if let Err(failure) = guarded_async(false, read(node, outlet, reading)).await {
        outlet.answer(ticket, || Err(failure));
    }
}

/// Reads and answers, when there is room for the answer: what is read while there is none is let go and read again.
async fn read<G, N>(node: &N, outlet: &AnswerOutlet<G>, reading: PendingRead<G>)
where
    G: Guest,
    N: ServedNode<Machine = G::Machine>,
{
    let PendingRead { ticket, query, options, asked } = reading;
    let mut turn = None;
    loop {
        let outcome = node.read(query.clone(), options).await;
        if outlet.has_room() {
            let time_at = |elapsed_ms| node.log_time_at(elapsed_ms);
            return outlet.answer(ticket, || {
                let answered = outlet.by.answered::<G>(asked, outcome, &time_at);
                answered.map(|(header, response)| Done::Guest(header, response))
            });
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
pub(crate) struct Outgoing<F: PipelineFraming> {
    shared: Arc<PipelineShared<F::Guest>>,
    /// One that did not fit the last message.
    next: Option<PackedResponse<F::Response>>,
    _open: OpenStream,
}

/// A response as it is sent, and what it gives back then.
struct PackedResponse<R> {
    response: R,
    /// At least what it takes in a message.
    bytes: usize,
    queued: usize,
    permits: usize,
}

/// What comes of a request, as it is sent: what no message can carry is replaced.
fn packed<F: PipelineFraming>(answered: RequestDone<F::Guest>) -> PackedResponse<F::Response> {
    let RequestDone { tag, outcome, permits, bytes: queued, changes } = answered;
    let encoded = guarded(changes, || F::response(tag, outcome));
    let mut response = encoded.unwrap_or_else(|failure| F::response(tag, Err(failure)));
    let encoded = F::encoded_bytes(&response);
    if encoded > FULL_MESSAGE_BYTES {
        response = F::response(tag, Err(failure::answer_too_large(encoded, FULL_MESSAGE_BYTES, changes)));
    }
    let bytes = queued.max(F::encoded_bytes(&response));
    PackedResponse { response, bytes, queued, permits: permits as usize }
}

impl<F: PipelineFraming> Outgoing<F> {
    /// One message of `next` and what is pending.
    fn pack(
        shared: &PipelineShared<F::Guest>,
        next: &mut Option<PackedResponse<F::Response>>,
        queue: &mut AnswerQueue<F::Guest>,
    ) -> F::Responses {
        let mut responses = Vec::with_capacity(queue.pending.len() + 1);
        let (mut bytes, mut permits, mut queued) = (0, 0, 0);
        while bytes < MESSAGE_BYTES
            && let Some(one) = next.take().or_else(|| queue.pending.pop_front().map(packed::<F>))
        {
            if bytes > 0 && bytes + one.bytes > FULL_MESSAGE_BYTES {
                *next = Some(one);
                break;
            }
            bytes += one.bytes;
            permits += one.permits;
            queued += one.queued;
            responses.push(one.response);
        }
        shared.permits.add_permits(permits);
        shared.in_flight.sub(responses.len());
        shared.queued.sub(queued);
        shared.packed.notify_waiters();
        F::responses(responses)
    }
}

impl<F: PipelineFraming> Stream for Outgoing<F> {
    type Item = Result<F::Responses, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { shared, next, _open } = self.get_mut();
        let mut queue = shared.queue();
        let AnswerQueue { answers, arrived, pending } = &mut *queue;
        if pending.is_empty() && next.is_none() {
            if ready!(answers.poll_recv_many(cx, arrived, MESSAGE_RESPONSES)) == 0 {
                return Poll::Ready(shared.broken.get().cloned().map(Err));
            }
            pending.extend(arrived.drain(..));
        }
        Poll::Ready(Some(Ok(Self::pack(shared, next, &mut queue))))
    }
}

impl<F: PipelineFraming> Drop for Outgoing<F> {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// Where `caller` is, to tell whose sessions are whose; empty if that is not known. What tonic tells as the remote address of
/// a request is of connections that it has accepted itself.
pub(super) fn client_address(caller: Option<&Caller>) -> String {
    caller.and_then(Caller::address).map(|address| address.to_string()).unwrap_or_default()
}
