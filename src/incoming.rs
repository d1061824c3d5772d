//! Connections that are accepted on a port: so many at a time and no more.
//!
//! Every connection takes a file descriptor, and a node without descriptors can neither write a snapshot nor open a
//! file of its log. So each port has a share of what the process may open. Those that find it used up wait in the
//! socket's backlog until another connection ends. A connection on which nothing is said gives its place back: no
//! keep-alive of a protocol looks after it before it has begun to speak one.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

/// After a failed accept, before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A connection has begun to speak when it has said as much as HTTP/2 begins with. A request of HTTP/1 may be shorter, and
/// is answered all the same.
const OPENING_BYTES: usize = 24;
/// For how long one that has not keeps its place.
const OPENING_PATIENCE: Duration = Duration::from_secs(10);
/// Most connections on one port, however many files the process may open.
const MAX_CONNECTIONS: usize = 16_384;
/// A port gets so many even where few files may be opened.
const MIN_CONNECTIONS: usize = 64;

/// Lets this process open as many files as it is allowed to ask for.
///
/// # Errors
/// When the system does not let it.
pub(crate) fn raise_open_files() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    match limit.current < limit.maximum || (limit.current.is_some() && limit.maximum.is_none()) {
        true => Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?),
        false => Ok(()),
    }
}

/// How many connections a port may have that is to use one part of `parts` of the files that the process may open.
pub(crate) fn connections(parts: usize) -> usize {
    let open_files = getrlimit(Resource::Nofile).current.map_or(usize::MAX, |files| files as usize);
    (open_files / parts).clamp(MIN_CONNECTIONS, MAX_CONNECTIONS)
}

/// A connection, which has its place for as long as it lives.
#[derive(Debug)]
pub(crate) struct Accepted {
    stream: TcpStream,
    /// Until it has begun to speak: what it has said, and when its time is over.
    opening: Option<(usize, Pin<Box<Sleep>>)>,
    _place: OwnedSemaphorePermit,
}

impl Accepted {
    fn new(stream: TcpStream, place: OwnedSemaphorePermit) -> Self {
        Self { stream, opening: Some((0, Box::pin(sleep(OPENING_PATIENCE)))), _place: place }
    }
}

/// What `incoming` accepts, at most `connections` at a time. Never fails: an accept that does is tried again.
pub(crate) fn bounded(incoming: TcpIncoming, connections: usize) -> impl Stream<Item = io::Result<Accepted>> {
    let places = Arc::new(Semaphore::new(connections));
    stream::unfold((incoming, places), |(mut incoming, places)| async move {
        let place = places.clone().acquire_owned().await.ok()?;
        loop {
            match incoming.next().await? {
                Ok(stream) => return Some((Ok(Accepted::new(stream, place)), (incoming, places))),
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

impl Connected for Accepted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        if let Poll::Ready(read) = Pin::new(&mut self.stream).poll_read(cx, buffer) {
            if let Some((said, _)) = &mut self.opening {
                *said += buffer.filled().len() - before;
                if *said >= OPENING_BYTES {
                    self.opening = None;
                }
            }
            return Poll::Ready(read);
        }
        if let Some((_, over)) = &mut self.opening {
            ready!(over.as_mut().poll(cx));
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the caller says nothing")));
        }
        Poll::Pending
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_connection_waits_for_the_place_of_another() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut accepted = Box::pin(bounded(TcpIncoming::from(listener), 2));
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        let first = timeout(DEADLINE, accepted.next()).await.unwrap().unwrap().unwrap();
        let mut second = timeout(DEADLINE, accepted.next()).await.unwrap().unwrap().unwrap();
        assert!(
            timeout(Duration::from_millis(50), accepted.next()).await.is_err(),
            "two places, two connections"
        );
        drop(first);
        timeout(DEADLINE, accepted.next()).await.unwrap().unwrap().unwrap();
        clients[1].write_all(b"still there").await.unwrap();
        let mut heard = [0; 11];
        timeout(DEADLINE, second.read_exact(&mut heard)).await.unwrap().unwrap();
        assert_eq!(&heard, b"still there");
    }

    #[tokio::test]
    async fn a_place_is_given_back_by_a_caller_that_says_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut accepted = Box::pin(bounded(TcpIncoming::from(listener), 8));
        let mut accept = async |opening: &[u8]| {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(opening).await.unwrap();
            let mut server = accepted.next().await.unwrap().unwrap();
            let mut heard = vec![0; opening.len()];
            server.read_exact(&mut heard).await.unwrap();
            (client, server)
        };
        let (_silent, mut of_silent) = accept(b"").await;
        let (_slow, mut of_slow) = accept(&[b'x'; OPENING_BYTES - 1]).await;
        let (_speaking, mut of_speaking) = accept(&[b'x'; OPENING_BYTES]).await;
        tokio::time::pause();
        for server in [&mut of_silent, &mut of_slow] {
            assert_eq!(server.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
        assert!(timeout(OPENING_PATIENCE * 10, of_speaking.read_u8()).await.is_err(), "it may pause");
    }

    #[test]
    fn every_port_has_some() {
        assert_eq!(connections(usize::MAX), MIN_CONNECTIONS);
        assert!(connections(1) >= MIN_CONNECTIONS && connections(1) <= MAX_CONNECTIONS);
    }
}
