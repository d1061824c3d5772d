//! `Kv.Watch` and `Kv.RangeStream`: answers that go on.
//!
//! Both are fed by one task per stream through a short channel, so that a client that reads slowly holds up
//! nobody else and costs a bounded amount of memory. A watch reads the machine's history, on whichever node it
//! is asked: every node has the same. A long range is read from one view, which stays what it was.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tonic::Status;

use crate::machine::StateMachine as _;
use crate::machine::kv::{
    Change, Event, EventsAnswer, EventsQuery, KvAnswer, KvMachine, KvQuery, KvView, RangeQuery,
};
use crate::proto::v1::{self, Failure};
use crate::runtime;
use crate::types::{Bookmark, HistoryEpoch, LogId, ReadLevel, ReadOptions, Role};

use super::failure;
use super::metrics::StreamCall;
use super::node::KvNode;
use super::wire::{self, Answerer};

/// Messages of one stream that wait for their client.
const STREAM_MESSAGES: usize = 4;
/// Most events in one message; those of one revision are never split.
const MESSAGE_EVENTS: usize = 1_000;
/// Most items in one message.
const MESSAGE_ITEMS: usize = 1_000;
/// Most bytes of keys and values in one message; one item, or the events of one revision, may exceed it.
const MESSAGE_BYTES: usize = 1024 * 1024;
/// How often a watch on which nothing happens tells how far it is.
const PROGRESS: Duration = Duration::from_secs(5);
/// New events are looked for this often at most: those that come closer together go into one message.
const PACE: Duration = Duration::from_millis(2);
/// A client that takes nothing for this long has lost its stream.
const CLIENT_PATIENCE: Duration = Duration::from_secs(60);

/// Long ranges that one node serves at a time, each from a state that it keeps in memory.
pub(super) const MAX_LONG_RANGES: usize = 64;
/// How long one of them may take.
const RANGE_PATIENCE: Duration = Duration::from_secs(300);

/// A stream of responses.
pub(super) type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Where the messages of a stream go.
struct Outlet<T> {
    messages: mpsc::Sender<T>,
    end: Arc<OnceLock<Status>>,
}

impl<T> Outlet<T> {
    /// False when the client has gone.
    ///
    /// # Errors
    /// When it takes nothing.
    async fn send(&self, message: T) -> Result<bool, Failure> {
        match tokio::time::timeout(CLIENT_PATIENCE, self.messages.send(message)).await {
            Ok(sent) => Ok(sent.is_ok()),
            Err(_) => Err(failure::too_slow(CLIENT_PATIENCE)),
        }
    }

    /// Once the messages sent before are taken, the stream ends with `failure`. The first one counts.
    fn fail(&self, failure: Failure) {
        let _ = self.end.set(failure.into());
    }
}

/// Messages, and then the error that they end with, if any. It does not take a place among the messages: for want of
/// one, a stream that was cut short would look like one that is complete.
struct Inlet<T> {
    messages: mpsc::Receiver<T>,
    end: Arc<OnceLock<Status>>,
    ended: bool,
}

impl<T> Stream for Inlet<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let message = ready!(self.messages.poll_recv(cx));
        self.ended = message.is_none();
        Poll::Ready(message.map(Ok).or_else(|| self.end.get().cloned().map(Err)))
    }
}

fn stream<T: Send + 'static>() -> (Outlet<T>, Responses<T>) {
    let (sender, receiver) = mpsc::channel(STREAM_MESSAGES);
    let end = Arc::new(OnceLock::new());
    let inlet = Inlet { messages: receiver, end: end.clone(), ended: false };
    (Outlet { messages: sender, end }, Box::pin(inlet))
}

/// Starts to watch what `request` asks for.
///
/// # Errors
/// The failure to answer instead.
pub(super) async fn watch<N: KvNode>(
    node: N,
    by: Answerer,
    draining: watch::Receiver<bool>,
    request: v1::WatchRequest,
    call: StreamCall,
) -> Result<Responses<v1::WatchResponse>, Failure> {
    let bookmark = Bookmark { index: request.from_revision, history: HistoryEpoch(request.history) };
    let (query, open) =
        call.open(check_beginning(&node, bookmark).await.and_then(|()| events_query(&node, request)))?;
    let (outlet, responses) = stream();
    runtime::spawn(async move {
        let ended = tokio::select! {
            () = outlet.messages.closed() => Ok(()),
            ended = follow(node, by, draining, query, &outlet) => ended,
        };
        open.ended(&ended);
        if let Err(failure) = ended {
            outlet.fail(failure);
        }
    });
    Ok(responses)
}

/// Refuses a revision that is of another history, or that the cluster has not got to.
async fn check_beginning<N: KvNode>(node: &N, from: Bookmark) -> Result<(), Failure> {
    // What is watched from may be the next revision: that of the entry before it must be there.
    let before = Bookmark { index: from.index.saturating_sub(1), ..from };
    let applied = node.state().applied.map_or(0, |applied| applied.index);
    let level = if before.index <= applied { ReadLevel::Local } else { ReadLevel::Linearizable };
    node.view(ReadOptions::from(level).after(before)).await?;
    Ok(())
}

fn events_query<N: KvNode>(node: &N, request: v1::WatchRequest) -> Result<EventsQuery, Failure> {
    let v1::WatchRequest { tenant, collection, start, end, from_revision, history: _ } = request;
    // Decided before the caller is answered, who may write next and wait for that.
    let from_revision = match from_revision {
        0 => node.state().applied.map_or(0, |applied| applied.index) + 1,
        from_revision => from_revision,
    };
    let query = EventsQuery {
        tenant: wire::name(tenant),
        collection: wire::name(collection),
        start,
        end,
        from_revision,
        limit: MESSAGE_EVENTS,
        max_bytes: MESSAGE_BYTES,
    };
    KvQuery::Events(query.clone()).check()?;
    Ok(query)
}

/// Sends events until the client has gone, or what has failed.
async fn follow<N: KvNode>(
    node: N,
    by: Answerer,
    mut draining: watch::Receiver<bool>,
    mut query: EventsQuery,
    outlet: &Outlet<v1::WatchResponse>,
) -> Result<(), Failure> {
    let mut state = node.watch();
    let mut told = None;
    loop {
        let seen = state.borrow_and_update().clone();
        if seen.role == Role::Stopped {
            let reason = seen.fatal.map_or_else(|| "the node is shutting down".to_owned(), |f| f.to_string());
            return Err(failure::stopped(reason));
        }
        let outcome = node.read(KvQuery::Events(query.clone()), ReadLevel::Local.into()).await?;
        let applied = outcome.applied;
        let EventsAnswer { events, next_revision } = match outcome.answer {
            KvAnswer::Events(events) => events,
            KvAnswer::Compacted { first_revision } => {
                return Err(failure::compacted(query.from_revision, first_revision));
            }
            other => unreachable!("invariant: events are answered with events, not {other:?}"),
        };
        let more = !events.is_empty();
        let next_revision = next_revision.max(query.from_revision);
        let overdue = told.is_none_or(|at: tokio::time::Instant| at.elapsed() >= PROGRESS);
        if more || overdue {
            told = Some(tokio::time::Instant::now());
            let message = response(&by, applied, events, next_revision);
            if !outlet.send(message).await? {
                return Ok(());
            }
        }
        let advanced = next_revision > query.from_revision;
        query.from_revision = next_revision;
        if more {
            // What else there is may have come meanwhile.
            tokio::time::sleep(PACE).await;
            continue;
        }
        if advanced && next_revision <= applied.map_or(0, |applied| applied.index) {
            // The scan of the history is bounded; go on with it.
            tokio::task::yield_now().await;
            continue;
        }
        tokio::select! {
            biased;
            () = until_draining(&mut draining) => {
                return Err(failure::stopped("the node is shutting down".to_owned()));
            }
            changed = state.changed() => if changed.is_err() { return Ok(()) },
            () = tokio::time::sleep(PROGRESS) => {}
        }
    }
}

async fn until_draining(draining: &mut watch::Receiver<bool>) {
    // An error means that the server is gone.
    let _ = draining.wait_for(|draining| *draining).await;
}

fn response(
    by: &Answerer,
    applied: Option<LogId>,
    events: Vec<Event>,
    next_revision: u64,
) -> v1::WatchResponse {
    let event = |Event { revision, key, change }| {
        let (kind, item) = match change {
            Change::Put(item) => (v1::event::Kind::Put, wire::item(key, item)),
            Change::Deleted => (v1::event::Kind::Delete, v1::Item { key, ..Default::default() }),
            Change::Expired => (v1::event::Kind::Expire, v1::Item { key, ..Default::default() }),
        };
        v1::Event { kind: kind.into(), revision, item: Some(item) }
    };
    v1::WatchResponse {
        header: Some(by.header(applied)),
        events: events.into_iter().map(event).collect(),
        next_revision,
    }
}

/// Starts to send the range that `request` asks for, from one point in time.
///
/// # Errors
/// The failure to answer instead.
pub(super) async fn range<N: KvNode>(
    node: N,
    by: Answerer,
    places: &Arc<Semaphore>,
    request: v1::RangeRequest,
    call: StreamCall,
) -> Result<Responses<v1::RangeResponse>, Failure> {
    let (range, open) = call.open(LongRange::prepare(&node, places, request).await)?;
    let (outlet, responses) = stream();
    runtime::spawn(async move {
        // The state it is read from is let go when it takes too long, whether or not anybody hears of it.
        let sending = tokio::time::timeout(RANGE_PATIENCE, range.send(&node, &by, &outlet)).await;
        let ended = sending.unwrap_or_else(|_| Err(failure::range_too_slow(RANGE_PATIENCE)));
        open.ended(&ended);
        if let Err(failure) = ended {
            outlet.fail(failure);
        }
    });
    Ok(responses)
}

/// A range that is read from one state.
struct LongRange {
    applied: Option<LogId>,
    view: KvView,
    query: RangeQuery,
    /// Items to be sent.
    left: usize,
    _place: OwnedSemaphorePermit,
}

impl LongRange {
    async fn prepare<N: KvNode>(
        node: &N,
        places: &Arc<Semaphore>,
        request: v1::RangeRequest,
    ) -> Result<Self, Failure> {
        let Ok(place) = places.clone().try_acquire_owned() else { return Err(failure::too_many_ranges()) };
        let options: ReadOptions = wire::read_options(request.level, request.freshness)?;
        let left = match request.limit {
            0 => usize::MAX,
            limit => limit as usize,
        };
        let query = RangeQuery { max_bytes: MESSAGE_BYTES, ..wire::range_query(request) };
        KvQuery::Range(query.clone()).check()?;
        let (applied, view) = node.view(options).await?;
        Ok(Self { applied, view, query, left, _place: place })
    }

    /// Sends it all, unless the client goes.
    async fn send<N: KvNode>(
        self,
        node: &N,
        by: &Answerer,
        outlet: &Outlet<v1::RangeResponse>,
    ) -> Result<(), Failure> {
        let Self { applied, view, mut query, mut left, _place } = self;
        loop {
            query.limit = left.min(MESSAGE_ITEMS);
            let mut answer = match KvMachine::query(&view, KvQuery::Range(query.clone())) {
                KvAnswer::Range(answer) => answer,
                other => {
                    unreachable!("invariant: a range that was checked is answered with items, not {other:?}")
                }
            };
            answer.map_expiry(|expires_ms| node.log_time_at(expires_ms));
            left -= answer.items.len();
            let next = answer.next.clone();
            if !outlet.send(wire::range(Some(by.header(applied)), answer)).await? {
                return Ok(());
            }
            match next {
                Some(next) if left > 0 => query.start = next,
                _ => return Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    /// A stream that simply ended would look complete to its reader.
    #[tokio::test(start_paused = true)]
    async fn a_reader_that_is_too_slow_finds_what_was_sent_and_then_an_error() {
        let (outlet, mut responses) = stream();
        for message in 0..STREAM_MESSAGES {
            assert!(outlet.send(message).await.unwrap());
        }
        let failure = outlet.send(STREAM_MESSAGES).await.expect_err("nobody has read for a minute");
        outlet.fail(failure);
        drop(outlet);
        for message in 0..STREAM_MESSAGES {
            assert_eq!(responses.next().await.unwrap().unwrap(), message);
        }
        let end = responses.next().await.unwrap().unwrap_err();
        assert!(end.message().contains("nothing was read"), "{end}");
        assert!(responses.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_range_that_takes_too_long_ends_with_an_error_although_its_channel_is_full() {
        let (outlet, mut responses) = stream();
        while outlet.messages.capacity() > 0 {
            assert!(outlet.send(()).await.unwrap());
        }
        outlet.fail(failure::range_too_slow(RANGE_PATIENCE));
        drop(outlet);
        let all: Vec<_> = responses.by_ref().collect().await;
        assert_eq!(all.len(), STREAM_MESSAGES + 1);
        assert!(all.last().unwrap().is_err());
    }
}
