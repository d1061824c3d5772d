//! One follower: a task that sends what is applied, as far as the follower takes it.
//!
//! The task keeps a position. It takes a page of what follows when the connection has room for it, makes messages of that, and hands
//! them over together; they count as unsent answers of their connection until they are encoded. Where a window is full it lets go
//! of the rest of the page, and takes it again later.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::credit::{Credit, NotSent};
use super::entry::{EntryAt, SentEntry};
use super::failures;
use super::registry::FollowerPlace;
use super::rest::Rest;
use super::transport::{
    Chunk, EntryBatch, FollowerEncoding, FollowerLine, FollowerProgress, PartMark, StateMark, SyncBegin,
    SyncKind,
};
use super::wishes::Wishes;
use crate::door::bodies::{Built, room_to_build};
use crate::door::failure::invalid;
use crate::feed::{FeedCursor, FeedRecord, PreviousValues};
use crate::proto::replication::SubscribeRequest;
use crate::proto::v1::Failure;
use crate::runtime::offload;
use crate::types::ClusterClock;

/// Bytes of a page of what was applied; about what becomes one chunk.
const PAGE_BYTES: usize = 192 * 1024;
/// Messages that are handed over together have so many bytes, and so has a batch; one entry may exceed it.
const CHUNK_BYTES: usize = 256 * 1024;
/// A batch with more bytes is compressed off the task.
const OFFLOADED_BYTES: usize = 16 * 1024;
/// A follower that was sent all there is is told so when nothing more comes for so long.
const SETTLED: Duration = Duration::from_millis(50);
/// Messages of a follower that are taken in before something is sent: about as many as its connection holds.
const MAX_HEARD: usize = 32 * 1024;
/// Least time for which a full window may stay as it is.
const LEAST_PATIENCE: Duration = Duration::from_secs(60);
/// The same in heartbeats.
const PATIENCE_HEARTBEATS: u32 = 3;

/// How far a node is, and the cluster's clocks there.
pub(super) struct NodeClocks {
    pub(super) applied: u64,
    pub(super) committed: u64,
    pub(super) clock: ClusterClock,
}

/// What tells it.
pub(super) type LookAtNode = Box<dyn Fn() -> NodeClocks + Send + Sync>;

/// Waits until the node drains. An error means that it is gone.
pub(in crate::node) async fn drained(draining: &mut watch::Receiver<bool>) {
    let _ = draining.wait_for(|draining| *draining).await;
}

/// What came of an attempt to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SendStep {
    /// Something was sent.
    Sent,
    /// What there was is not wanted, and there is more.
    Passed,
    /// There is nothing.
    Idle,
    /// The window is full.
    Blocked,
    /// The follower has gone.
    Gone,
}

/// A follower that is being sent what it asked for.
pub(super) struct Sending<E: FollowerEncoding> {
    node: LookAtNode,
    line: FollowerLine<E>,
    pub(super) wishes: Arc<Wishes>,
    place: FollowerPlace,
    cursor: FeedCursor,
    credit: Credit,
    rest: Rest,
    /// Of the next page so many events of this position are done with.
    resume: Option<(u64, usize)>,
    /// Everything up to here that is wanted was sent, and log time there.
    upto: (u64, u64),
    /// Whether nothing was sent yet, so that the history is to be named.
    is_first: bool,
    /// When the next heartbeat is due.
    beat: Instant,
    /// Whether something was sent since the last one, and since when the follower was sent all there is: it learns that soon.
    owes_beat: bool,
    settles: Option<Instant>,
    /// Whether the follower says nothing more.
    requests_over: bool,
    /// Since when the window is full and nothing is acknowledged.
    blocked: Option<Instant>,
    /// Whether something was acknowledged since it was found full.
    acknowledged: bool,
    /// The follower wants to hear that everything up to here was sent.
    progress_at: Option<u64>,
}

impl<E: FollowerEncoding> Sending<E> {
    /// To a follower that has everything up to `from`, or a state before.
    pub(super) fn new(
        node: LookAtNode,
        line: FollowerLine<E>,
        wishes: Arc<Wishes>,
        (place, cursor): (FollowerPlace, FeedCursor),
        from: u64,
    ) -> Self {
        let (credit, beat) = (Credit::new(wishes.window_bytes, from), Instant::now() + wishes.heartbeat);
        Self {
            node,
            line,
            wishes,
            place,
            cursor,
            credit,
            rest: Rest::default(),
            resume: None,
            upto: (from, 0),
            is_first: true,
            beat,
            owes_beat: false,
            settles: None,
            requests_over: false,
            blocked: None,
            acknowledged: false,
            progress_at: None,
        }
    }

    /// Says how the follower is brought up to date; false if it has gone.
    pub(super) async fn begin(&mut self, kind: SyncKind, seq: u64) -> Result<bool, Failure> {
        let begins = SyncBegin { kind, seq, history: self.cursor.history() };
        let Some(message) = self.line.encoding.beginning(begins) else { return Ok(true) };
        let bytes = E::len(&message);
        self.send(vec![message], 0, bytes).await
    }

    /// Sends what is applied until one of the two has had enough.
    ///
    /// # Errors
    /// Why nothing more is sent.
    pub(super) async fn tail(&mut self) -> Result<(), Failure> {
        loop {
            self.hear_what_came()?;
            let may_go_on = self.blocked.is_none() || (self.acknowledged && self.credit.is_roomy());
            let step = if may_go_on { self.advance().await? } else { SendStep::Blocked };
            self.note(step);
            let is_first = self.is_first && step == SendStep::Idle;
            let overdue = self.is_overdue() || is_first || self.is_progress_due();
            let goes_on = match step {
                SendStep::Gone => false,
                _ if overdue => self.heartbeat().await?,
                SendStep::Sent => true,
                SendStep::Passed => {
                    tokio::task::yield_now().await;
                    true
                }
                SendStep::Idle | SendStep::Blocked => self.wait(step).await?,
            };
            if !goes_on {
                return Ok(());
            }
        }
    }

    /// Sends the next entries there are room for.
    async fn advance(&mut self) -> Result<SendStep, Failure> {
        if !self.rest.seek(&self.wishes.choice) {
            if !self.room().await? {
                return Ok(SendStep::Gone);
            }
            let page = self.cursor.page(PAGE_BYTES).await;
            let page = page.map_err(|error| failures::of_feed(error, self.cursor.history()))?;
            let (is_last, next) = (page.is_last(), page.next);
            let resume = self.resume.take();
            let first = page.records.first().map(|record| record.log_id.index);
            let events = resume.filter(|(at, _)| first == Some(*at)).map_or(0, |(_, events)| events);
            self.rest.load(page.records, events);
            if !self.rest.seek(&self.wishes.choice) {
                let time_ms = self.rest.passed().map_or(self.upto.1, |(_, time_ms)| time_ms);
                self.upto = (self.upto.0.max(next.saturating_sub(1)), time_ms);
                return Ok(if is_last { SendStep::Idle } else { SendStep::Passed });
            }
        }
        self.send_found().await
    }

    /// Sends what was found, and what follows it.
    pub(super) async fn send_rest(&mut self) -> Result<bool, Failure> {
        while self.rest.seek(&self.wishes.choice) {
            self.hear_what_came()?;
            match self.send_found().await? {
                SendStep::Gone => return Ok(false),
                // All of it is of one position: no window holds it up.
                step => debug_assert_eq!(step, SendStep::Sent),
            }
        }
        Ok(true)
    }

    /// A page of a state is to be sent.
    pub(super) fn load_state(&mut self, record: FeedRecord) {
        self.rest.load_state(record);
    }

    async fn send_found(&mut self) -> Result<SendStep, Failure> {
        let sent = if self.wishes.batched { self.send_batch().await? } else { self.send_single().await? };
        if let Some((upto, time_ms)) = self.rest.passed() {
            self.upto = (self.upto.0.max(upto), time_ms);
        }
        let Some(is_there) = sent else {
            if let Some((at, events)) = self.rest.let_go() {
                self.cursor.move_to(at);
                self.resume = Some((at, events));
            }
            return Ok(SendStep::Blocked);
        };
        Ok(if is_there { SendStep::Sent } else { SendStep::Gone })
    }

    /// Sends entries one by one. `None` if the window is full; false if the follower has gone.
    async fn send_single(&mut self) -> Result<Option<bool>, Failure> {
        let (mut messages, mut bytes) = (Vec::new(), 0);
        let mut looked_up = self.wishes.previous.then(|| self.cursor.previous_values());
        while bytes < CHUNK_BYTES && self.rest.seek(&self.wishes.choice) {
            if !messages.is_empty() && looked_up.as_ref().is_some_and(PreviousValues::is_spent) {
                break;
            }
            let before = self.rest.before_found(&mut looked_up).await;
            let (at, content, more) = self.rest.found();
            let history = self.is_first.then(|| self.cursor.history());
            let (is_item, before) = (self.rest.is_state(), before.as_ref());
            let entry = SentEntry { at, content, more, history, is_item, before };
            let length = E::entry_len(&entry);
            if !self.credit.may_begin(at.seq, length) {
                break;
            }
            messages.push(self.line.encoding.entry(&entry));
            self.credit.sent(None, at.seq, length, at.time_ms);
            bytes += length;
            self.is_first = false;
            self.rest.take();
        }
        if messages.is_empty() {
            return Ok(None);
        }
        let operations = messages.len() as u64;
        self.send(messages, operations, bytes).await.map(Some)
    }

    /// The same in one message.
    async fn send_batch(&mut self) -> Result<Option<bool>, Failure> {
        let (mut entries, mut count, mut first) = (BytesMut::new(), 0, None);
        let (mut complete, mut last): (Option<u64>, Option<EntryAt>) = (None, None);
        let mut looked_up = self.wishes.previous.then(|| self.cursor.previous_values());
        while self.rest.seek(&self.wishes.choice) {
            if count > 0 && looked_up.as_ref().is_some_and(PreviousValues::is_spent) {
                break;
            }
            let before = self.rest.before_found(&mut looked_up).await;
            let (at, content, more) = self.rest.found();
            let history = entries.is_empty().then(|| self.cursor.history());
            let (is_item, before) = (self.rest.is_state(), before.as_ref());
            let entry = SentEntry { at, content, more, history, is_item, before };
            let length = entries.len() + E::batched_len(&entry);
            let has_room = match first {
                None => self.credit.may_begin(at.seq, length),
                Some(_) if length > CHUNK_BYTES => false,
                Some(first) if first == at.seq => self.credit.may_begin(first, length),
                Some(_) => self.credit.fits(length),
            };
            if !has_room {
                break;
            }
            E::put_batched(&entry, &mut entries);
            count += 1;
            first.get_or_insert(at.seq);
            complete = last.filter(|last| last.seq < at.seq).map(|last| last.seq).or(complete);
            last = Some(at);
            self.rest.take();
        }
        let Some(last) = last else { return Ok(None) };
        let (entries, compress, is_state) = (entries.freeze(), self.wishes.compressed, self.rest.is_state());
        let is_offloaded = compress && entries.len() >= OFFLOADED_BYTES;
        let message = self.line.encoding.batch(EntryBatch { entries, count, is_state, compress });
        let message = if is_offloaded { offload(message).await } else { message() };
        let bytes = E::len(&message);
        self.credit.sent(complete, last.seq, bytes, last.time_ms);
        self.is_first = false;
        self.send(vec![message], count.into(), bytes).await.map(Some)
    }

    /// Hands over `messages`; false if the follower has gone.
    async fn send(
        &mut self,
        messages: Vec<E::Message>,
        operations: u64,
        bytes: usize,
    ) -> Result<bool, Failure> {
        let chunk = Chunk { messages, built: Built::new(self.line.caller.clone(), bytes) };
        let outlet = self.line.outlet.clone();
        let sent = self.meanwhile(async { outlet.send(chunk).await }).await?;
        let sent = sent.map_err(|_| failures::untaken())?;
        self.place.sent(operations, bytes);
        self.settles = None;
        self.owes_beat = true;
        Ok(sent)
    }

    /// Waits for `what`, and takes in what the follower says meanwhile: too much that is not taken in ends its connection.
    async fn meanwhile<T>(&mut self, what: impl Future<Output = T>) -> Result<T, Failure> {
        let mut what = pin!(what);
        loop {
            let came = tokio::select! {
                biased;
                done = &mut what => return Ok(done),
                () = drained(&mut self.line.draining) => return Err(failures::draining()),
                came = self.line.requests.next(), if !self.requests_over => came,
            };
            self.hear(came)?;
        }
    }

    /// Says where a state begins or ends.
    pub(super) async fn mark(&mut self, at: EntryAt, mark: StateMark) -> Result<bool, Failure> {
        let message = self.line.encoding.mark(at, mark, self.cursor.history());
        let bytes = E::len(&message);
        self.is_first = false;
        self.credit.sent(None, at.seq, bytes, at.time_ms);
        let ends = mark == StateMark::End;
        if ends {
            self.upto = (at.seq, at.time_ms);
        }
        self.place.update(|at| at.in_snapshot = !ends);
        self.send(vec![message], 0, bytes).await
    }

    /// Says which part of a state was sent, or is gone on behind.
    pub(super) async fn part(&mut self, at: EntryAt, mark: PartMark) -> Result<bool, Failure> {
        let Some(message) = self.line.encoding.part(at, mark, self.cursor.history()) else { return Ok(true) };
        let bytes = E::len(&message);
        self.is_first = false;
        self.credit.sent(None, at.seq, bytes, at.time_ms);
        self.place.update(|at| at.in_snapshot = true);
        self.send(vec![message], 0, bytes).await
    }

    /// What follows the state that was not sent, and whether its node drains.
    pub(super) fn into_rest(self) -> (FeedCursor, watch::Receiver<bool>) {
        (self.cursor, self.line.draining)
    }

    /// Says how far everything is.
    pub(super) async fn heartbeat(&mut self) -> Result<bool, Failure> {
        let NodeClocks { applied, committed, clock } = (self.node)();
        let (upto_seq, time_ms) = self.upto;
        let progress = FollowerProgress {
            history: self.cursor.history(),
            upto_seq,
            applied_seq: applied,
            committed_seq: committed,
            upto_time_ms: if upto_seq >= applied { clock.log_time_ms() } else { time_ms },
            applied_time_ms: clock.log_time_ms(),
            applied_elapsed_ms: clock.elapsed_ms,
        };
        let message = self.line.encoding.heartbeat(&progress);
        let bytes = E::len(&message);
        self.is_first = false;
        self.credit.tell(upto_seq);
        let sent = self.send(vec![message], 0, bytes).await?;
        self.beat = Instant::now() + self.wishes.heartbeat;
        self.owes_beat = false;
        if self.is_progress_due() {
            self.progress_at = None;
        }
        Ok(sent)
    }

    /// Whether the follower has asked how far it was told, and that can be said: all that there was is sent, or cannot be for want of room.
    fn is_progress_due(&self) -> bool {
        self.progress_at.is_some_and(|at| self.upto.0 >= at || self.blocked.is_some())
    }

    /// Whether a heartbeat is due.
    pub(super) fn is_overdue(&self) -> bool {
        Instant::now() >= self.beat
    }

    /// Waits until the connection has room for more; false if the follower has gone.
    pub(super) async fn room(&mut self) -> Result<bool, Failure> {
        let FollowerLine { caller, limits, outlet, .. } = &self.line;
        let (caller, limits, outlet) = (caller.clone(), limits.clone(), outlet.clone());
        self.meanwhile(async {
            tokio::select! {
                biased;
                () = room_to_build(&caller, &limits) => true,
                () = outlet.gone() => false,
            }
        })
        .await
    }

    /// Takes in what the follower has said, without waiting.
    pub(super) fn hear_what_came(&mut self) -> Result<(), Failure> {
        if *self.line.draining.borrow() {
            return Err(failures::draining());
        }
        for _ in 0..MAX_HEARD {
            if self.requests_over {
                break;
            }
            let Some(came) = self.line.requests.next().now_or_never() else { break };
            self.hear(came)?;
        }
        Ok(())
    }

    fn hear(&mut self, came: Option<Result<SubscribeRequest, Failure>>) -> Result<(), Failure> {
        let Some(request) = came.transpose()? else {
            self.requests_over = true;
            return Ok(());
        };
        let now = Instant::now();
        self.place.update(|at| at.heard = now);
        if request.progress {
            let NodeClocks { applied, .. } = (self.node)();
            self.progress_at = self.progress_at.max(Some(applied));
        }
        // 0 acknowledges nothing.
        if request.ack_seq > 0 {
            match self.credit.ack(request.ack_seq) {
                Ok(true) => {
                    self.acknowledged = true;
                    self.blocked = self.blocked.map(|_| now);
                }
                Ok(false) => {}
                Err(NotSent { told }) => {
                    return Err(invalid(&format!(
                        "it acknowledges position {}, and was sent nothing beyond {told}",
                        request.ack_seq
                    )));
                }
            }
        }
        Ok(())
    }

    /// Waits for something to send, room for it, the next heartbeat; false if the follower has gone.
    async fn wait(&mut self, step: SendStep) -> Result<bool, Failure> {
        let patience = LEAST_PATIENCE.max(self.wishes.heartbeat * PATIENCE_HEARTBEATS);
        let since = self.blocked.unwrap_or(self.beat);
        let is_blocked = step == SendStep::Blocked;
        if step == SendStep::Idle && self.owes_beat {
            let settles = *self.settles.get_or_insert_with(|| Instant::now() + SETTLED);
            self.beat = self.beat.min(settles);
        }
        let FollowerLine { requests, outlet, draining, .. } = &mut self.line;
        let came = tokio::select! {
            biased;
            () = drained(draining) => return Err(failures::draining()),
            () = outlet.gone() => return Ok(false),
            came = requests.next(), if !self.requests_over => Some(came),
            () = self.cursor.changed(), if !is_blocked => None,
            () = sleep_until(self.beat) => None,
            () = sleep_until(since + patience), if is_blocked => {
                return Err(failures::unacknowledged(patience));
            }
        };
        match came {
            Some(came) => self.hear(came).map(|()| true),
            None => Ok(true),
        }
    }

    /// Notes what came of a step, for whoever looks.
    fn note(&mut self, step: SendStep) {
        match step {
            SendStep::Blocked => {
                self.blocked.get_or_insert_with(Instant::now);
                self.acknowledged = false;
            }
            SendStep::Sent => self.blocked = None,
            SendStep::Passed | SendStep::Idle | SendStep::Gone => {}
        }
        let (upto, time_ms) = self.upto;
        let (position, time_ms) = self.credit.position(upto, time_ms);
        let is_even = step == SendStep::Idle && position == upto;
        self.place.update(|at| {
            (at.sent, at.position, at.time_ms) = (upto, position, time_ms);
            at.behind = if is_even { None } else { at.behind.or_else(|| Some(Instant::now())) };
        });
    }
}

#[cfg(test)]
mod tests;
