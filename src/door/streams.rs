//! Answers that come in pieces: handed over one by one, to a client that takes them.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::Stream;
use tokio::sync::mpsc;
use tonic::Status;

use super::failure;
use super::limits::Bound;
use crate::incoming::{Caller, Held};
use crate::proto::v1::Failure;

/// Messages of one stream that wait for their client.
const STREAM_MESSAGES: usize = 1;
/// A client that takes no message for this long has lost its stream.
const CLIENT_PATIENCE: Duration = Duration::from_secs(300);

/// A stream of responses.
pub(crate) type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The place of a stream without an end, a watch or a follower, among those of its connection.
pub(crate) struct WatchPlace(Arc<Caller>);

impl WatchPlace {
    /// One more on the connection of `caller`.
    ///
    /// # Errors
    /// The failure to answer instead, when there are as many as there may be.
    pub(crate) fn take(caller: &Arc<Caller>, bound: Bound) -> Result<Self, Failure> {
        // Others may take one at the same moment; a few more than all do no harm.
        let is_free = caller.places().held(Held::Watches) < bound.all;
        match is_free && caller.try_take(Held::Watches, 1, bound.each) {
            true => Ok(Self(caller.clone())),
            false => Err(failure::too_many_watches(bound)),
        }
    }

    /// Whose it is.
    pub(crate) fn caller(&self) -> &Arc<Caller> {
        &self.0
    }
}

impl Drop for WatchPlace {
    fn drop(&mut self) {
        self.0.give_back(Held::Watches, 1);
    }
}

/// Where the messages of a stream go.
pub(crate) struct Outlet<T> {
    messages: mpsc::Sender<T>,
    end: Arc<OnceLock<Result<(), Status>>>,
}

impl<T> Outlet<T> {
    /// False when the client has gone.
    ///
    /// # Errors
    /// When it takes nothing.
    pub(crate) async fn send(&self, message: T) -> Result<bool, Failure> {
        match tokio::time::timeout(CLIENT_PATIENCE, self.messages.send(message)).await {
            Ok(sent) => Ok(sent.is_ok()),
            Err(_) => Err(failure::too_slow(CLIENT_PATIENCE)),
        }
    }

    /// Waits until the client has gone.
    pub(crate) async fn gone(&self) {
        self.messages.closed().await;
    }

    /// Once the messages sent before are taken, the stream ends with `failure`. The first one counts.
    pub(crate) fn fail(&self, failure: Failure) {
        let _ = self.end.set(Err(failure.into()));
    }

    /// Once the messages sent before are taken, the stream ends, and its reader has all. One whose outlet is dropped without
    /// this or a failure, by a task that panics, is not taken for complete.
    pub(crate) fn complete(&self) {
        let _ = self.end.set(Ok(()));
    }
}

/// Messages, and then the error that they end with, if any. It does not take a place among the messages: for want of
/// one, a stream that was cut short would look like one that is complete.
struct Inlet<T> {
    messages: mpsc::Receiver<T>,
    end: Arc<OnceLock<Result<(), Status>>>,
    ended: bool,
}

impl<T> Stream for Inlet<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let message = ready!(self.messages.poll_recv(cx));
        let Some(message) = message else {
            self.ended = true;
            let end = self.end.get().cloned().unwrap_or_else(|| Err(failure::broken_off().into()));
            return Poll::Ready(end.err().map(Err));
        };
        Poll::Ready(Some(Ok(message)))
    }
}

/// Both ends of a stream.
pub(crate) fn stream<T: Send + 'static>() -> (Outlet<T>, Responses<T>) {
    let (sender, receiver) = mpsc::channel(STREAM_MESSAGES);
    let end = Arc::new(OnceLock::new());
    let inlet = Inlet { messages: receiver, end: end.clone(), ended: false };
    (Outlet { messages: sender, end }, Box::pin(inlet))
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
            outlet.complete();
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

    #[tokio::test]
    async fn a_stream_whose_task_is_gone_does_not_look_complete() {
        let (outlet, responses) = stream();
        assert!(outlet.send(1).await.unwrap());
        drop(outlet);
        let all: Vec<_> = responses.collect().await;
        assert!(matches!(&all[..], [Ok(1), Err(_)]), "{all:?}");
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
