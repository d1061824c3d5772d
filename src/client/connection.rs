//! The task that owns the one stream to a node.
//!
//! Callers queue their requests; the task puts whatever is queued into one message, remembers who waits
//! for which tag, and hands out the answers. A unary call costs thirty times as much as a message on a
//! stream, and a message of many requests costs little more than one of a single request.
//!
//! # Invariants
//!
//! - Every call is answered exactly once, by its `expires` or one sweep later, whatever happens to the
//!   stream. Callers therefore need no timer of their own.
//! - A request counts as sent from the moment it is given to the stream: what breaks later leaves it
//!   undecided, what broke before does not.
//! - The task never waits without bound: not for a connection, not for room in the stream.
//!
//! It decides nothing about retries; that is `operation`'s business.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::select;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::attempt::{AttemptError, Kind, Outcome, Way, backoff, describe};
use super::config::ClientConfig;
use super::endpoint::Endpoint;
use super::frame::{self, Answers, Calls, Frame};
use super::in_flight::{InFlight, Waiter};
use super::node::Node;
use crate::proto::{details, v1};

/// How often expired and stalled requests are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_millis(20);
/// Messages between this task and the transport. Few: what waits in the queue instead joins a batch.
const OUTBOUND_MESSAGES: usize = 2;
/// What a call takes in a message beside its frame: a tag, and lengths.
const TAG_BYTES: usize = 16;
/// Pauses between attempts to reach a node that is down.
const RECONNECT_MIN: Duration = Duration::from_millis(25);
const RECONNECT_MAX: Duration = Duration::from_secs(2);
/// A node that is down is tried this often without a caller that wants it, so that it is known to be back
/// before the next caller finds out the hard way.
const UNASKED_RECONNECTS: u32 = 16;

/// After this long without a connection the other nodes are asked who leads, and requests that another node can answer
/// go there.
const HEDGE_AFTER: Duration = Duration::from_millis(50);

/// What a connection tells and asks of the other nodes.
pub(crate) trait Cluster: Send + Sync {
    /// Notes whether any node answers.
    fn note_contact(&self);
    /// Asks one node for its status.
    fn ask(self: Arc<Self>, node: &Arc<Node>);
    /// Asks all nodes who leads.
    fn hunt(self: Arc<Self>);
    /// From now on asks after the health of all nodes.
    fn watch_health(self: Arc<Self>);
    /// The node at `endpoint` leads no more, or cannot be reached.
    fn lost_leader(&self, endpoint: &Endpoint);
    /// Whether it is known for certain that another node leads.
    fn is_led_by_other_than(&self, endpoint: &Endpoint) -> bool;
    /// Whether another node is healthy and has answered lately.
    fn has_reached_other_than(&self, endpoint: &Endpoint) -> bool;
}

/// One attempt on its way to the task.
#[derive(Debug)]
pub(crate) struct Call {
    /// Its tag is given to it when it is sent.
    pub(super) frame: Frame,
    pub(super) way: Way,
    pub(super) expires: Instant,
    pub(super) reply: oneshot::Sender<Outcome>,
}

impl Call {
    /// Whether its caller has gone: then it need not be sent.
    fn is_abandoned(&self) -> bool {
        self.reply.is_closed()
    }

    fn fail(self, error: AttemptError) {
        // The caller may have given up by itself; nobody else wants to know.
        let _ = self.reply.send(Err(error));
    }
}

/// Why there is no stream to a node.
enum Unopened {
    /// The node takes no requests at present, as it says itself.
    Refused(Arc<v1::Failure>),
    /// No node is met there.
    Unreached(Arc<str>),
}

impl Unopened {
    fn why(&self) -> Arc<str> {
        match self {
            Self::Refused(failure) => failure.message.as_str().into(),
            Self::Unreached(why) => why.clone(),
        }
    }

    /// What becomes of a request that was not sent for this.
    fn error(&self) -> AttemptError {
        match self {
            Self::Refused(failure) => AttemptError::Refused(failure.clone()),
            Self::Unreached(why) => AttemptError::NotSent(why.clone()),
        }
    }
}

struct Stream {
    outbound: mpsc::Sender<Calls>,
    inbound: Streaming<Answers>,
}

/// See the module's documentation.
pub(super) struct Connection {
    node: Arc<Node>,
    cluster: Weak<dyn Cluster>,
    config: Arc<ClientConfig>,
    queue: mpsc::Receiver<Call>,
    /// Taken from the queue, not yet sent; at most `batch_requests`, or as many more as the queue holds when that is swept.
    waiting: Vec<Call>,
    in_flight: InFlight,
    hunting: Hunting,
    sweep_due: Interval,
}

impl Connection {
    pub(super) fn new(
        node: Arc<Node>,
        queue: mpsc::Receiver<Call>,
        config: Arc<ClientConfig>,
        cluster: Weak<dyn Cluster>,
    ) -> Self {
        let mut sweep_due = interval(SWEEP_INTERVAL);
        sweep_due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            node,
            cluster,
            queue,
            waiting: Vec::with_capacity(config.batch_requests.min(1024)),
            in_flight: InFlight::new(config.in_flight_requests),
            hunting: Hunting::new(config.health_interval),
            config,
            sweep_due,
        }
    }

    /// Serves calls until the client is dropped.
    pub(super) async fn run(mut self) {
        let mut failures = 0;
        loop {
            if failures == 0 && self.waiting.is_empty() {
                let received = self.queue.recv_many(&mut self.waiting, self.config.batch_requests).await;
                if received == 0 {
                    return;
                }
            }
            match self.open().await {
                Ok(stream) => {
                    failures = 0;
                    self.node.set_up();
                    if let Some(cluster) = self.cluster.upgrade() {
                        cluster.note_contact();
                        cluster.ask(&self.node);
                    }
                    let why = self.pump(stream).await;
                    self.node.set_untried();
                    self.lost(&why, &AttemptError::NotSent(why.clone()));
                }
                Err(unopened) => {
                    failures += 1;
                    let (why, error) = (unopened.why(), unopened.error());
                    match unopened {
                        // It is there: whoever has time left waits for it.
                        Unopened::Refused(_) => self.node.set_refusing(why.clone()),
                        Unopened::Unreached(_) => self.node.set_down(why.clone()),
                    }
                    self.lost(&why, &error);
                    if !self.back_off(failures, &error).await {
                        return;
                    }
                    if failures > UNASKED_RECONNECTS {
                        self.node.set_untried();
                        failures = 0;
                    }
                }
            }
        }
    }

    /// Opens the stream. Nothing is sent on it before the server has accepted it.
    async fn open(&mut self) -> Result<Stream, Unopened> {
        let (outbound, messages) = mpsc::channel(OUTBOUND_MESSAGES);
        let pipeline = frame::open(self.node.channel(), ReceiverStream::new(messages), self.config.relays);
        let opening = timeout(self.config.connect_timeout, pipeline);
        let hedge = sleep(HEDGE_AFTER);
        tokio::pin!(opening, hedge);
        let (mut abandoned, mut hedged) = (false, false);
        loop {
            let limit = self.config.batch_requests.saturating_sub(self.waiting.len());
            select! {
                opened = &mut opening => return match opened {
                    Ok(Ok(inbound)) => Ok(Stream { outbound, inbound }),
                    Ok(Err(status)) => Err(match details::failure(status.details()) {
                        Some(failure) => Unopened::Refused(Arc::new(failure)),
                        None => Unopened::Unreached(describe(&status)),
                    }),
                    Err(_) => {
                        let patience_ms = self.config.connect_timeout.as_millis();
                        Err(Unopened::Unreached(format!("no answer within {patience_ms} ms").into()))
                    }
                },
                received = self.queue.recv_many(&mut self.waiting, limit), if limit > 0 && !abandoned => {
                    abandoned = received == 0;
                }
                () = &mut hedge, if !hedged => {
                    hedged = true;
                    if let Some(cluster) = self.cluster.upgrade() {
                        cluster.hunt();
                    }
                }
                _ = self.sweep_due.tick(), if !self.waiting.is_empty() => {
                    self.sweep();
                    if hedged {
                        self.send_elsewhere();
                    }
                }
            }
        }
    }

    /// There is still no connection: whoever waits for one, and could be answered by another node, is told so.
    fn send_elsewhere(&mut self) {
        let Some(cluster) = self.cluster.upgrade() else { return };
        let led_elsewhere = cluster.is_led_by_other_than(&self.node.endpoint);
        let answered_elsewhere = cluster.has_reached_other_than(&self.node.endpoint);
        let why: Arc<str> = "no connection yet, and another node answers".into();
        let may_leave = |call: &mut Call| {
            let by_another = match call.way.kind {
                Kind::Anywhere => answered_elsewhere,
                Kind::Write | Kind::AtLeader => led_elsewhere,
            };
            by_another && !call.way.bound
        };
        for call in self.waiting.extract_if(.., may_leave) {
            call.fail(AttemptError::NotSent(why.clone()));
        }
    }

    /// Moves requests and answers until the stream breaks; returns why it did.
    async fn pump(&mut self, mut stream: Stream) -> Arc<str> {
        loop {
            let limit = self.config.batch_requests.saturating_sub(self.waiting.len());
            let idle = self.in_flight.is_empty() && self.waiting.is_empty();
            select! {
                message = stream.inbound.message() => match message {
                    Ok(Some(message)) => self.complete(message),
                    Ok(None) => return "the server closed the stream".into(),
                    Err(status) => return describe(&status),
                },
                permit = stream.outbound.reserve(), if !self.waiting.is_empty() && self.in_flight.room() > 0 => {
                    match permit {
                        Ok(permit) => if let Some(message) = self.next_message() {
                            permit.send(message);
                        },
                        Err(_) => return "the connection broke".into(),
                    }
                }
                received = self.queue.recv_many(&mut self.waiting, limit), if limit > 0 => {
                    if received == 0 {
                        return "the client was dropped".into();
                    }
                }
                _ = self.sweep_due.tick(), if !idle => self.sweep(),
            }
        }
    }

    /// Puts what waits into one message, within its bounds, and enters it in the table.
    fn next_message(&mut self) -> Option<Calls> {
        let now = Instant::now();
        let mut bytes = 0;
        let mut count = 0;
        for call in self.waiting.iter().take(self.in_flight.room().min(self.config.batch_requests)) {
            if bytes >= self.config.batch_bytes {
                break;
            }
            bytes += call.frame.size_bytes() + TAG_BYTES;
            count += 1;
        }
        let mut calls = Vec::with_capacity(count);
        for call in self.waiting.drain(..count) {
            if call.is_abandoned() {
                continue;
            }
            let Call { frame, way, expires, reply } = call;
            if expires <= now {
                let _ = reply.send(Err(AttemptError::Expired { sent: false }));
                continue;
            }
            calls.push((self.in_flight.insert(Waiter { way, sent: now, expires, reply }), frame));
        }
        (!calls.is_empty()).then_some(calls)
    }

    /// Hands out the answers. One that nobody waits for (given up, or never asked for) is ignored.
    fn complete(&mut self, answers: Answers) {
        for (tag, answer) in answers {
            if let Some(waiter) = self.in_flight.take(tag) {
                let _ = waiter.reply.send(Ok(answer));
            }
        }
    }

    /// Gives up what has expired, and finds out whether the leader has stalled or changed.
    fn sweep(&mut self) {
        let now = Instant::now();
        let oldest = self.in_flight.sweep(now);
        // What stays in the queue would expire unnoticed behind calls that have more time.
        while self.waiting.len() < self.config.batch_requests.saturating_add(self.config.queue_requests)
            && let Ok(call) = self.queue.try_recv()
        {
            self.waiting.push(call);
        }
        for call in self.waiting.extract_if(.., |call| call.expires <= now || call.is_abandoned()) {
            call.fail(AttemptError::Expired { sent: false });
        }
        let Some(cluster) = self.cluster.upgrade() else { return };
        let is_late = |oldest: Option<Instant>| {
            oldest.is_some_and(|sent| now.duration_since(sent) >= self.config.stall_after)
        };
        if is_late(oldest.any) && cluster.is_led_by_other_than(&self.node.endpoint) {
            tracing::debug!(endpoint = %self.node.endpoint, "leader has changed while requests were in flight");
            self.in_flight.fail(&AttemptError::LeaderChanged, |waiter| waiter.way.needs_leader());
        } else if !is_late(oldest.prompt) {
            self.hunting.end();
        } else if self.hunting.is_due(now) {
            cluster.hunt();
        }
    }

    /// The stream is gone: fails all calls that this task holds.
    fn lost(&mut self, why: &Arc<str>, unsent: &AttemptError) {
        tracing::debug!(endpoint = %self.node.endpoint, %why, "connection lost");
        // First, so that a retry does not come here again.
        if let Some(cluster) = self.cluster.upgrade() {
            cluster.lost_leader(&self.node.endpoint);
            cluster.note_contact();
            cluster.hunt();
        }
        self.in_flight.fail(&AttemptError::Lost(why.clone()), |_| true);
        for call in self.waiting.drain(..) {
            call.fail(unsent.clone());
        }
    }

    /// Pauses before the next attempt to connect, or until a probe has reached the node; calls that arrive meanwhile fail at once, so that they
    /// can go elsewhere. False when the client was dropped.
    async fn back_off(&mut self, failures: u32, error: &AttemptError) -> bool {
        let pause = sleep(backoff(RECONNECT_MIN, RECONNECT_MAX, failures - 1));
        tokio::pin!(pause);
        loop {
            select! {
                () = &mut pause => return true,
                () = self.node.revived.notified() => return true,
                received = self.queue.recv_many(&mut self.waiting, self.config.batch_requests) => {
                    if received == 0 {
                        return false;
                    }
                    for call in self.waiting.drain(..) {
                        call.fail(error.clone());
                    }
                }
            }
        }
    }
}

/// When the other nodes are asked who leads, while this one is late: at once, and then more and more rarely, because it may
/// well be slow and lead.
#[derive(Debug)]
struct Hunting {
    /// When they are asked next, and after which pause.
    next: Option<(Instant, Duration)>,
    longest_pause: Duration,
}

impl Hunting {
    const FIRST_PAUSE: Duration = Duration::from_millis(250);

    fn new(longest_pause: Duration) -> Self {
        Self { next: None, longest_pause }
    }

    fn is_due(&mut self, now: Instant) -> bool {
        let pause = match self.next {
            Some((next, _)) if now < next => return false,
            Some((_, pause)) => pause * 2,
            None => Self::FIRST_PAUSE,
        };
        let pause = pause.min(self.longest_pause);
        self.next = Some((now + pause, pause));
        true
    }

    /// It is not late any more.
    fn end(&mut self) {
        self.next = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_leader_makes_the_client_ask_the_others_now_and_then() {
        let mut hunting = Hunting::new(Duration::from_secs(2));
        let began = Instant::now();
        let due = |hunting: &mut Hunting| {
            let sweeps = (0..500).map(|sweep| began + SWEEP_INTERVAL * sweep);
            let due = sweeps.filter(|now| hunting.is_due(*now));
            due.map(|now| now.duration_since(began).as_millis()).collect::<Vec<_>>()
        };
        assert_eq!(due(&mut hunting), [0, 260, 760, 1760, 3760, 5760, 7760, 9760]);
        hunting.end();
        assert_eq!(due(&mut hunting)[..2], [0, 260]);
    }
}
