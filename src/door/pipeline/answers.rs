//! The answers of a pipeline on their way to its client, and the room there is for them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, Notify, Semaphore, mpsc};
use tonic::Status;

use crate::door::bodies::hold_unfinished;
use crate::door::guest::{Guest, guarded};
use crate::door::limits::{Bound, DoorLimits};
use crate::door::methods::MethodId;
use crate::door::metrics::{DoorMetrics, Share};
use crate::door::relay::Relay;
use crate::door::rights::Principal;
use crate::door::{Answerer, failure};
use crate::incoming::{Caller, Held};
use crate::proto::v1::{self, Failure};

/// A pipeline may have so many bytes of answers waiting however many others have, up to twice the bound for all.
const QUEUED_FLOOR_BYTES: usize = 64 * 1024;

/// A pipeline with answers waiting, whose client has taken nothing at all for this long while something waits for room, has
/// lost it.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same while the answers of all pipelines together leave no room for others.
const SHORTAGE_PATIENCE: Duration = Duration::from_secs(1);
/// A client that takes so little of its answers that no message follows keeps its pipeline so long, while something waits for
/// room, and so long in a shortage.
const SLOW_PATIENCE: Duration = Duration::from_secs(600);
const SLOW_SHORTAGE_PATIENCE: Duration = Duration::from_secs(10);

/// After how long a pipeline without room looks again whether it has some, or has lost its client.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// What a write's answer takes, and what any answer takes beyond its items.
pub(crate) const fn base_bytes<G: Guest>() -> usize {
    64 + size_of::<RequestDone<G>>()
}

/// What is answered.
pub(crate) enum Done<G: Guest> {
    Guest(v1::Header, G::Response),
    Opened(v1::OpenSessionResponse),
    Closed(v1::CloseSessionResponse),
    /// What another node has answered to a call of the method with this number, or about a session.
    Relayed(Option<usize>, v1::Answer),
}

/// What comes of a request.
pub(crate) type RequestOutcome<G> = Result<Done<G>, Failure>;

/// What both directions share. Must not hold the channel's sender: the channel closes with the last request.
pub(super) struct PipelineShared<G: Guest> {
    pub(super) permits: Semaphore,
    /// Requests that were read, and bytes of answers, until they are in a message.
    pub(super) in_flight: Share,
    pub(super) queued: Share,
    /// Bytes that the answers to transactions under way may have.
    pub(super) expected: AtomicUsize,
    pub(super) bound: Bound,
    pub(super) queue: std::sync::Mutex<AnswerQueue<G>>,
    /// Notified when a message was packed.
    pub(super) packed: Notify,
    /// Reads that found no room for their answers go one by one.
    pub(super) turn: Mutex<()>,
    /// Why the request stream ended, if not in order.
    pub(super) broken: OnceLock<Status>,
}

/// Answers on their way to the client.
pub(super) struct AnswerQueue<G: Guest> {
    pub(super) answers: mpsc::UnboundedReceiver<RequestDone<G>>,
    /// Scratch: what was just taken off the channel.
    pub(super) arrived: Vec<RequestDone<G>>,
    /// Taken off the channel, not yet in a message.
    pub(super) pending: VecDeque<RequestDone<G>>,
}

impl<G: Guest> PipelineShared<G> {
    pub(super) fn queue(&self) -> std::sync::MutexGuard<'_, AnswerQueue<G>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody takes answers any more: lets go of those that wait, and of those to come.
    pub(super) fn close(&self) {
        self.permits.close();
        let mut queue = self.queue();
        queue.answers.close();
        let AnswerQueue { answers, arrived, pending } = &mut *queue;
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
pub(super) struct AnswerOutlet<G: Guest> {
    pub(super) sender: mpsc::UnboundedSender<RequestDone<G>>,
    pub(super) shared: Arc<PipelineShared<G>>,
    pub(super) by: Answerer,
    pub(super) metrics: Arc<DoorMetrics>,
    /// What opening and closing a session counts as.
    pub(super) sessions: [MethodId; 2],
    /// The client's address; empty if that is not known.
    pub(super) client: Arc<str>,
    pub(super) caller: Option<Arc<Caller>>,
    pub(super) principal: Arc<Principal>,
    pub(super) limits: Arc<DoorLimits>,
    /// What changes are passed on to.
    pub(super) relay: Option<Arc<dyn Relay>>,
}

/// What is left of a message that waits, counted for its connection.
pub(super) struct WaitingMessage<'a> {
    caller: &'a Caller,
    bytes: usize,
}

impl Drop for WaitingMessage<'_> {
    fn drop(&mut self) {
        self.caller.give_back(Held::Unfinished, self.bytes);
    }
}

/// What came of a request, and the permits it gives back.
pub(super) struct RequestDone<G: Guest> {
    pub(super) tag: u64,
    pub(super) outcome: RequestOutcome<G>,
    pub(super) permits: u32,
    pub(super) bytes: usize,
    /// Whether the request may have changed something.
    pub(super) changes: bool,
}

/// A request in flight.
#[derive(Clone, Copy)]
pub(super) struct RequestTicket {
    pub(super) tag: u64,
    pub(super) method: MethodId,
    pub(super) started: Instant,
    pub(super) permits: u32,
    /// Bytes set aside for its answer.
    pub(super) expected: usize,
}

impl<G: Guest> AnswerOutlet<G> {
    /// Answers `ticket` with what `outcome` makes of what has come of it. It may panic, being the guest's: that request fails,
    /// and nothing else.
    pub(super) fn answer(&self, ticket: RequestTicket, outcome: impl FnOnce() -> RequestOutcome<G>) {
        let changes = self.metrics.methods().get(ticket.method).changes;
        let weighed = || {
            let outcome = outcome();
            let bytes = outcome_bytes(&outcome);
            (outcome, bytes)
        };
        let (outcome, bytes) = guarded(changes, weighed).unwrap_or_else(|failure| (Err(failure), 0));
        self.metrics.observe(ticket.method, ticket.started, &outcome);
        self.send(RequestDone { tag: ticket.tag, outcome, permits: ticket.permits, bytes, changes });
        if ticket.expected > 0 {
            self.shared.expected.fetch_sub(ticket.expected, Ordering::Relaxed);
            self.shared.packed.notify_waiters();
        }
    }

    /// Answers what is no request.
    pub(super) fn refuse(&self, tag: u64, permits: u32, failure: Failure) {
        let bytes = failure.message.len();
        self.send(RequestDone { tag, outcome: Err(failure), permits, bytes, changes: false });
    }

    fn send(&self, mut answered: RequestDone<G>) {
        answered.outcome = answered.outcome.map_err(|failure| self.by.told(failure));
        answered.bytes += base_bytes::<G>();
        let bytes = answered.bytes;
        self.shared.queued.add(bytes);
        // Fails when the client is gone: then nobody wants to know.
        if self.sender.send(answered).is_err() {
            self.shared.queued.sub(bytes);
        }
    }

    pub(super) fn try_admit(&self, permits: u32) -> bool {
        self.shared.permits.try_acquire_many(permits).map(|permit| permit.forget()).is_ok()
    }

    /// Whether another answer may be queued.
    pub(super) fn has_room(&self) -> bool {
        let PipelineShared { queued, expected, bound, .. } = &*self.shared;
        let (taken, all) = (queued.own() + expected.load(Ordering::Relaxed), queued.all());
        let floor = if self.is_short() { 0 } else { QUEUED_FLOOR_BYTES };
        taken < bound.share(all).max(floor)
    }

    /// Whether the answers that wait on all pipelines leave nothing even for one that has none.
    fn is_short(&self) -> bool {
        self.shared.queued.all() >= self.shared.bound.all.saturating_mul(2)
    }

    /// Whether another message may be read. What others leave unread is no reason to hold up a pipeline whose own answers
    /// are all taken: its writes need next to no room, and its reads wait for theirs.
    fn may_read(&self) -> bool {
        self.has_room() || self.shared.queued.own() == 0
    }

    /// Waits until the client has taken enough of the answers; false when it is gone, or takes nothing.
    pub(super) async fn room(&self) -> bool {
        self.until(Self::has_room).await
    }

    /// The same for the next message.
    pub(super) async fn turn_to_read(&self) -> bool {
        self.until(Self::may_read).await
    }

    async fn until(&self, is_enough: fn(&Self) -> bool) -> bool {
        loop {
            let mut packed = std::pin::pin!(self.shared.packed.notified());
            packed.as_mut().enable();
            if is_enough(self) {
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
    pub(super) async fn admit(&self, permits: u32) -> bool {
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

    /// Ends the pipeline, and returns, if from now on its client takes too little for too long although something is there
    /// for it. The caller stops waiting for this when a message is packed; what others take is noticed here.
    async fn idles(&self) {
        let now = tokio::time::Instant::now;
        let taken = || self.caller.as_deref().map_or(0, Caller::progress_ms);
        // Since when nothing has been packed, and since when no byte has been taken.
        let (mut packed, mut moved) = (now(), (now(), taken()));
        let patience = loop {
            if self.shared.queued.own() == 0 {
                // There is nothing to take: others leave no room, or nothing is answered.
                packed = now();
            }
            if moved.1 != taken() {
                moved = (now(), taken());
            }
            let (unpacked, still) = (packed.elapsed(), packed.max(moved.0).elapsed());
            let (at_rest, at_all) = match self.is_short() {
                true => (SHORTAGE_PATIENCE, SLOW_SHORTAGE_PATIENCE),
                false => (PATIENCE, SLOW_PATIENCE),
            };
            if still >= at_rest || unpacked >= at_all {
                break if still >= at_rest { still } else { unpacked };
            }
            tokio::time::sleep(LOOK_AGAIN).await;
            if self.shared.queued.own() == 0 && self.has_room() {
                self.shared.packed.notify_waiters();
            }
        };
        let _ = self.shared.broken.set(failure::pipeline_not_read(patience, self.shared.bound).into());
        self.shared.close();
    }

    /// Waits before the next request of a caller that asks for more than it may; false when the client is gone.
    pub(super) async fn pauses(&self, pause: Option<Duration>) -> bool {
        let Some(pause) = pause else { return true };
        tokio::select! {
            () = tokio::time::sleep(pause) => true,
            () = self.sender.closed() => false,
            _ = self.principal.ended() => true,
        }
    }

    /// Whether requests of this caller are still begun; if not, the pipeline ends.
    pub(super) fn is_permitted(&self) -> bool {
        let has_ended = self.principal.has_ended();
        if has_ended {
            let _ = self.shared.broken.set(failure::no_longer_authenticated().into());
        }
        !has_ended
    }

    /// Counts `bytes` of requests that wait.
    ///
    /// # Errors
    /// The failure that ends the pipeline, when they are too many.
    pub(super) fn keep(&self, bytes: usize) -> Result<Option<WaitingMessage<'_>>, Failure> {
        let Some(caller) = self.caller.as_deref() else { return Ok(None) };
        hold_unfinished(caller, &self.limits, bytes)?;
        Ok(Some(WaitingMessage { caller, bytes }))
    }
}

/// Roughly what `outcome` takes in memory beyond what every one does, which is no less than in a message.
fn outcome_bytes<G: Guest>(outcome: &RequestOutcome<G>) -> usize {
    match outcome {
        Ok(Done::Guest(_, response)) => G::response_bytes(response),
        Ok(Done::Relayed(_, answer)) => match &answer.content {
            Some(v1::answer::Content::Payload(payload)) => payload.len(),
            _ => 0,
        },
        Ok(Done::Opened(_) | Done::Closed(_)) => 0,
        Err(failure) => {
            let answer = failure.unconfirmed.as_ref().map_or(0, |answer| answer.response.len());
            failure.message.len() + answer
        }
    }
}
