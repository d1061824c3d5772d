//! `Kv.RangeStream`: ranges of any size, from one point in time.
//!
//! A range is read from one view, which stays what it was, by a task that hands over one page after the other. However
//! long that takes, it goes on while its client reads. One that takes nothing for a while loses its stream, because a
//! view keeps alive what has been overwritten since. Whoever comes back soon goes on with the same view ([`Moments`]).

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::Stream;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tonic::Status;

use crate::incoming::{Caller, Held};
use crate::machine::StateMachine as _;
use crate::machine::kv::{KvAnswer, KvMachine, KvQuery, KvView, RangeQuery};
use crate::proto::v1::{self, Failure};
use crate::runtime;
use crate::types::{HistoryEpoch, LogId, ReadLevel, ReadOptions};

use super::failure;
use super::metrics::StreamCall;
use super::moments::{MAX_LONG_RANGES, Moments};
use super::node::KvNode;
use super::wire::{self, Answerer};

/// Pages of one range that wait for their client.
const STREAM_MESSAGES: usize = 1;
/// Most items in one page.
const PAGE_ITEMS: usize = 1_000;
/// Most bytes of keys and values in one page; one item may exceed it. Small, so that a slow link has one soon.
const PAGE_BYTES: usize = 256 * 1024;
/// A client that takes no page for this long has lost its stream.
const CLIENT_PATIENCE: Duration = Duration::from_secs(300);

/// Long ranges that are served on one connection at a time: nobody takes all of them.
pub(super) const MAX_CONNECTION_LONG_RANGES: usize = MAX_LONG_RANGES / 2;

/// A long range's place among those of its connection.
pub(super) struct Place(Arc<Caller>);

impl Place {
    /// One more on the connection of `caller`.
    ///
    /// # Errors
    /// The failure to answer instead, when there are as many as there may be.
    pub(super) fn take(caller: &Arc<Caller>) -> Result<Self, Failure> {
        match caller.try_take(Held::LongRanges, 1, MAX_CONNECTION_LONG_RANGES) {
            true => Ok(Self(caller.clone())),
            false => Err(failure::too_many_ranges()),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.give_back(Held::LongRanges, 1);
    }
}

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

/// Starts to send the range that `request` asks for, from one point in time.
///
/// # Errors
/// The failure to answer instead.
pub(super) async fn range<N: KvNode>(
    node: N,
    by: Answerer,
    moments: Arc<Moments>,
    own: Result<Place, Failure>,
    request: v1::RangeRequest,
    call: StreamCall,
) -> Result<Responses<v1::RangeResponse>, Failure> {
    let (range, open) = call.open(LongRange::prepare(&node, &moments, own, request).await)?;
    let (outlet, responses) = stream();
    runtime::spawn(async move {
        let at = range.applied;
        let ended = range.send(&node, &by, &outlet).await;
        let was_one_page = matches!(ended, Ok(true));
        open.ended(&ended.as_ref().map(|_| ()).map_err(Clone::clone));
        if let Err(failure) = ended {
            outlet.fail(failure);
        }
        // Whoever may come back needs the state, and neither the stream nor the node.
        drop((outlet, node, by));
        match at {
            Some(at) if was_one_page => moments.end(at),
            Some(at) => moments.leave(at).await,
            None => {}
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
    _places: (OwnedSemaphorePermit, Place),
}

impl LongRange {
    async fn prepare<N: KvNode>(
        node: &N,
        moments: &Moments,
        own: Result<Place, Failure>,
        request: v1::RangeRequest,
    ) -> Result<Self, Failure> {
        let places = (moments.place()?, own?);
        let again = request.at;
        let options: ReadOptions = wire::read_options(request.level, request.freshness)?;
        let left = match request.limit {
            0 => usize::MAX,
            limit => limit as usize,
        };
        let query = RangeQuery { max_bytes: PAGE_BYTES, ..wire::range_query(request) };
        KvQuery::Range(query.clone()).check()?;
        let (applied, view) = match again {
            None => {
                let (applied, view) = node.view(options).await?;
                if let Some(at) = applied {
                    moments.begin(at, &view);
                }
                (applied, view)
            }
            Some(position) => {
                let at = LogId::new(position.term, position.index);
                // Whether this node may answer at all, and of this history.
                let history = HistoryEpoch(position.history);
                node.view(ReadOptions { level: ReadLevel::Local, after_index: at.index, history }).await?;
                (Some(at), moments.again(at)?)
            }
        };
        Ok(Self { applied, view, query, left, _places: places })
    }

    /// Sends it all, unless the client goes. Whether that was one page, of which a reader has all or nothing: what was sent of
    /// others may be lost on the way.
    async fn send<N: KvNode>(
        self,
        node: &N,
        by: &Answerer,
        outlet: &Outlet<v1::RangeResponse>,
    ) -> Result<bool, Failure> {
        let Self { applied, view, mut query, mut left, _places } = self;
        let mut pages = 0;
        loop {
            query.limit = left.min(PAGE_ITEMS);
            let mut answer = match KvMachine::query(&view, KvQuery::Range(query.clone())) {
                KvAnswer::Range(answer) => answer,
                other => {
                    unreachable!("invariant: a range that was checked is answered with items, not {other:?}")
                }
            };
            answer.map_expiry(|expires_ms| node.log_time_at(expires_ms));
            left -= answer.items.len();
            pages += 1;
            let next = answer.next.clone();
            if !outlet.send(wire::range(Some(by.header(applied)), answer)).await? {
                return Ok(false);
            }
            match next {
                Some(next) if left > 0 => query.start = next,
                _ => return Ok(pages == 1),
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
        let failure = outlet.send(STREAM_MESSAGES).await.expect_err("nobody has read for minutes");
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
    async fn a_range_goes_on_while_it_is_read_however_slowly() {
        let (outlet, mut responses) = stream();
        let begun = tokio::time::Instant::now();
        let sending = async {
            for message in 0..100 {
                assert!(outlet.send(message).await.unwrap());
            }
            drop(outlet);
        };
        let reading = async {
            let mut read = 0;
            while let Some(message) = responses.next().await {
                assert_eq!(message.unwrap(), read);
                read += 1;
                tokio::time::sleep(CLIENT_PATIENCE / 3).await;
            }
            assert_eq!(read, 100);
        };
        tokio::join!(sending, reading);
        assert!(begun.elapsed() > CLIENT_PATIENCE * 30);
    }

    #[tokio::test(start_paused = true)]
    async fn a_range_that_fails_ends_with_an_error_although_its_channel_is_full() {
        let (outlet, mut responses) = stream();
        while outlet.messages.capacity() > 0 {
            assert!(outlet.send(()).await.unwrap());
        }
        outlet.fail(failure::too_slow(CLIENT_PATIENCE));
        drop(outlet);
        let all: Vec<_> = responses.by_ref().collect().await;
        assert_eq!(all.len(), STREAM_MESSAGES + 1);
        assert!(all.last().unwrap().is_err());
    }
}
