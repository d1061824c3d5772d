//! Messages as they arrive from a peer.
//!
//! The task that waits for a message polls the connection itself. A task and a queue between the two would cost another
//! wake-up for each message, twice on the way of every write, and buy nothing: a gRPC stream holds back its sender by itself.

use std::fmt;
use std::future::poll_fn;
use std::sync::Mutex;
use std::task::{Context, Poll, ready};

use futures::stream::BoxStream;
use futures::{FutureExt, Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// What a peer sends on one connection, in the order in which it arrives.
pub struct Incoming<T> {
    /// Never locked: streams cannot be shared, and what holds this one has to be.
    stream: Mutex<BoxStream<'static, T>>,
    /// Arrived while somebody looked whether anything could.
    early: Option<T>,
    has_ended: bool,
}

impl<T: Send + 'static> Incoming<T> {
    /// The messages of `stream`.
    pub fn new(stream: impl Stream<Item = T> + Send + 'static) -> Self {
        Self { stream: Mutex::new(stream.boxed()), early: None, has_ended: false }
    }

    /// The next message; none once there will be no more.
    pub async fn recv(&mut self) -> Option<T> {
        poll_fn(|context| self.poll_recv(context)).await
    }

    /// The same, for one who polls.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<T>> {
        if let Some(early) = self.early.take() {
            return Poll::Ready(Some(early));
        }
        if self.has_ended {
            return Poll::Ready(None);
        }
        let stream = self.stream.get_mut().expect("invariant: nobody locks it");
        let next = ready!(stream.poll_next_unpin(context));
        self.has_ended = next.is_none();
        Poll::Ready(next)
    }

    /// Whether there will be no more messages. Loses none.
    pub fn is_closed(&mut self) -> bool {
        if self.early.is_none() {
            self.early = self.recv().now_or_never().flatten();
        }
        self.early.is_none() && self.has_ended
    }
}

impl<T: Send + 'static> From<mpsc::Receiver<T>> for Incoming<T> {
    fn from(receiver: mpsc::Receiver<T>) -> Self {
        Self::new(ReceiverStream::new(receiver))
    }
}

impl<T> fmt::Debug for Incoming<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("has_ended", &self.has_ended).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_looks_whether_more_can_come_loses_nothing() {
        let (sender, receiver) = mpsc::channel(4);
        let mut incoming = Incoming::from(receiver);
        assert!(!incoming.is_closed());
        sender.try_send(1).unwrap();
        sender.try_send(2).unwrap();
        assert!(!incoming.is_closed() && !incoming.is_closed());
        assert_eq!(incoming.recv().await, Some(1));
        drop(sender);
        assert!(!incoming.is_closed(), "one is left");
        assert_eq!(incoming.recv().await, Some(2));
        assert!(incoming.is_closed());
        assert_eq!(incoming.recv().await, None);
        assert_eq!(incoming.recv().await, None, "and ever after");
    }
}
