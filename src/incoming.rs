//! Connections that are accepted on a port: so many at a time and no more.
//!
//! Every connection takes a file descriptor, and a node without descriptors can neither write a snapshot nor open a
//! file of its log. So each port has a share of what the process may open. When it is used up, idle connections give way
//! ([`places`]); when none is idle, newcomers wait in the socket's backlog until another connection ends. A connection on
//! which nothing is said gives its place back: no keep-alive of a protocol looks after it before it has begun to speak one.

mod places;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt, stream};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::{Sleep, sleep};
use tonic::transport::server::{Connected, TcpIncoming};

use crate::error::is_out_of_files;
use crate::trust::wire::Proof;
use crate::wire::Wire;

pub use places::Bound;
pub(crate) use places::{Caller, Held, Places, UnderWay};

/// After a failed accept, before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What HTTP/2 begins with. Who has said that much speaks it, and may pause.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// For how long a connection keeps its place that has neither said that much nor sent the head of a request.
const OPENING_PATIENCE: Duration = Duration::from_secs(10);
/// A write of so many bytes is part of an answer.
const PROGRESS_BYTES: usize = 1024;
/// Most connections on one port, however many files the process may open.
const MAX_CONNECTIONS: usize = 16_384;
/// A port gets so many even where few files may be opened.
const MIN_CONNECTIONS: usize = 12;
/// Files that a node opens for itself: its log, its own connections to other members.
const OWN_FILES: usize = 32;

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

/// How many connections a port may have that is to use one part of `parts` of the files that the process may open beside its
/// own.
pub(crate) fn connections(parts: usize) -> usize {
    let open_files = getrlimit(Resource::Nofile).current.map_or(usize::MAX, |files| files as usize);
    share_of(open_files, parts)
}

fn share_of(open_files: usize, parts: usize) -> usize {
    (open_files.saturating_sub(OWN_FILES) / parts).clamp(MIN_CONNECTIONS, MAX_CONNECTIONS)
}

/// A connection that has no place yet, and whose it is where that is known.
pub(crate) struct Arrived {
    wire: Box<dyn Wire>,
    peer: Option<SocketAddr>,
    /// Where it is found who is at the other end, if that is to be proven.
    proof: Option<Arc<Proof>>,
}

impl Arrived {
    fn new(wire: impl Wire + 'static, peer: Option<SocketAddr>) -> Self {
        Self { wire: Box::new(wire), peer, proof: None }
    }
}

/// Connections as they arrive at a port.
pub(crate) type Arrivals = BoxStream<'static, io::Result<Arrived>>;

/// Those of a socket. One that is silent for `keepalive` is looked after.
pub(crate) fn arrivals_at(listener: TcpListener, keepalive: Duration) -> Arrivals {
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(keepalive));
    let arrived = |accepted: io::Result<tokio::net::TcpStream>| {
        accepted.map(|stream| {
            let peer = stream.peer_addr().ok();
            Arrived::new(stream, peer)
        })
    };
    incoming.map(arrived).boxed()
}

/// The same. One whose other end does not confirm for `dead_after` what it was sent is broken, too.
pub(crate) fn arrivals_that_confirm(
    listener: TcpListener,
    keepalive: Duration,
    dead_after: Duration,
) -> Arrivals {
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(keepalive));
    let arrived = move |accepted: io::Result<tokio::net::TcpStream>| {
        let stream = accepted?;
        // Without it the connection breaks all the same, some minutes later.
        if let Err(error) = SockRef::from(&stream).set_tcp_user_timeout(Some(dead_after)) {
            tracing::debug!(%error, "cannot say how long a connection may be dead");
        }
        let peer = stream.peer_addr().ok();
        Ok(Arrived::new(stream, peer))
    };
    incoming.map(arrived).boxed()
}

/// Those that a program makes by other means than a socket.
pub(crate) fn arrivals_of<W>(connections: impl Stream<Item = W> + Send + 'static) -> Arrivals
where
    W: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    connections.map(|wire| Ok(Arrived::new(wire, None))).boxed()
}

/// The same, each made by `secure` of what has arrived. Who calls is proven when the connection is first used: it takes its place before.
pub(crate) fn secured(
    arrivals: Arrivals,
    secure: impl Fn(Box<dyn Wire>) -> (Box<dyn Wire>, Arc<Proof>) + Send + 'static,
) -> Arrivals {
    let secured = move |arrived: io::Result<Arrived>| {
        let Arrived { wire, peer, .. } = arrived?;
        let (wire, proof) = secure(wire);
        Ok(Arrived { wire, peer, proof: Some(proof) })
    };
    arrivals.map(secured).boxed()
}

/// The same, and what is over once there are no more of them.
pub(crate) fn telling_the_end(arrivals: Arrivals) -> (Arrivals, oneshot::Receiver<()>) {
    let (over, no_more) = oneshot::channel();
    // What is made after the last connection is none, and tells that there was a last one.
    let end = stream::once(async { drop(over) }).filter_map(|()| std::future::ready(None));
    (arrivals.chain(end).boxed(), no_more)
}

/// A connection, which has its place for as long as it lives.
pub(crate) struct Accepted {
    wire: Box<dyn Wire>,
    opening: Option<Opening>,
    caller: Arc<Caller>,
}

/// What a connection may do before it is known what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beginning {
    /// Begin to speak HTTP/2, or send a request, in time.
    Request,
    /// Tell by its first request who it is, in time and within so many bytes: see [`Caller::stays`].
    Identify { max_bytes: usize },
}

/// A connection that has not begun yet.
#[derive(Debug)]
struct Opening {
    beginning: Beginning,
    said: usize,
    /// Whether all it has said is how HTTP/2 begins.
    is_preface: bool,
    over: Pin<Box<Sleep>>,
}

impl Opening {
    fn new(beginning: Beginning) -> Self {
        Self { beginning, said: 0, is_preface: true, over: Box::pin(sleep(OPENING_PATIENCE)) }
    }

    /// Takes in what was said. Whether the connection may go on as it likes.
    ///
    /// # Errors
    /// When it may not go on at all.
    fn hears(&mut self, bytes: &[u8]) -> io::Result<bool> {
        let expected = PREFACE.get(self.said..).unwrap_or_default();
        let compared = expected.len().min(bytes.len());
        self.is_preface &= expected[..compared] == bytes[..compared];
        self.said += bytes.len();
        match self.beginning {
            Beginning::Request => Ok(self.is_preface && self.said >= PREFACE.len()),
            Beginning::Identify { max_bytes } if self.said > max_bytes => {
                Err(io::Error::new(io::ErrorKind::InvalidData, "too much is said before the handshake"))
            }
            Beginning::Identify { .. } => Ok(false),
        }
    }
}

/// What arrives, each with one of `places`. Never fails: an accept that does is tried again.
pub(crate) fn bounded(
    arrivals: Arrivals,
    places: Arc<Places>,
    beginning: Beginning,
) -> impl Stream<Item = io::Result<Accepted>> {
    stream::unfold((arrivals, places), move |(mut arrivals, places)| async move {
        loop {
            match arrivals.next().await? {
                Ok(Arrived { wire, peer, proof }) => {
                    let caller = places.admit(peer).await;
                    if let Some(proof) = proof {
                        caller.is_to_prove(proof);
                    }
                    let accepted = Accepted { wire, opening: Some(Opening::new(beginning)), caller };
                    return Some((Ok(accepted), (arrivals, places)));
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a connection");
                    // What the process has too many of may be idle connections.
                    if is_out_of_files(&error) {
                        places.close_longest_idle();
                    }
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

impl Drop for Accepted {
    fn drop(&mut self) {
        self.caller.left();
    }
}

impl Connected for Accepted {
    type ConnectInfo = Arc<Caller>;

    fn connect_info(&self) -> Arc<Caller> {
        self.caller.clone()
    }
}

impl Accepted {
    /// Whose connection it is.
    pub(crate) fn caller(&self) -> &Arc<Caller> {
        &self.caller
    }

    /// Notes what came of a write. What keeps a connection alive is no answer taken.
    fn wrote(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(written, Poll::Ready(Ok(bytes)) if bytes >= PROGRESS_BYTES) {
            self.caller.progresses();
        }
        written
    }
}

fn gives_way() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the connection gives way to others")
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.caller.is_closed(cx.waker()) {
            return Poll::Ready(Err(gives_way()));
        }
        if this.caller.has_begun() {
            this.opening = None;
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.wire).poll_read(cx, buffer);
        let Some(opening) = &mut this.opening else { return polled };
        if let Poll::Ready(read) = polled {
            if opening.hears(&buffer.filled()[before..])? {
                this.opening = None;
            }
            return Poll::Ready(read);
        }
        ready!(opening.over.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the caller does not begin")))
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.caller.is_closed_to(cx.waker()) {
            return Poll::Ready(Err(gives_way()));
        }
        let written = Pin::new(&mut self.wire).poll_write(cx, bytes);
        self.wrote(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.caller.is_closed_to(cx.waker()) {
            return Poll::Ready(Err(gives_way()));
        }
        let written = Pin::new(&mut self.wire).poll_write_vectored(cx, pieces);
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.wire.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::time::timeout;

    use super::places::PlaceCounts;
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(30);

    async fn within<T>(future: impl Future<Output = T>) -> T {
        timeout(DEADLINE, future).await.expect("in time")
    }

    type Connections = Pin<Box<dyn Stream<Item = io::Result<Accepted>>>>;

    /// A port with so many places, and its address.
    async fn port(
        ordinary: usize,
        reserved: usize,
        beginning: Beginning,
    ) -> (Connections, SocketAddr, Arc<Places>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, places) = (listener.local_addr().unwrap(), Places::new(ordinary, reserved));
        (Box::pin(bounded(arrivals_at(listener, DEADLINE), places.clone(), beginning)), address, places)
    }

    async fn next(connections: &mut Connections) -> Accepted {
        within(connections.next()).await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn the_longest_idle_gives_way_and_the_busy_do_not() {
        let (mut connections, address, places) = port(3, 0, Beginning::Request).await;
        let (mut clients, mut accepted) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            clients.push(TcpStream::connect(address).await.unwrap());
            accepted.push(next(&mut connections).await);
        }
        let _busy = accepted[0].caller.begin();
        drop(accepted[1].caller.begin());
        tokio::time::pause();
        tokio::time::advance(Duration::from_millis(5)).await;
        drop(accepted[1].caller.begin());
        tokio::time::resume();
        clients.push(TcpStream::connect(address).await.unwrap());
        let newcomer = next(&mut connections).await;
        let closed = within(accepted[2].read_u8()).await.unwrap_err();
        assert_eq!(closed.kind(), io::ErrorKind::ConnectionAborted, "idle since it was accepted");
        assert_eq!(accepted[2].write_u8(1).await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        clients[0].write_all(b"still there").await.unwrap();
        let mut heard = [0; 11];
        within(accepted[0].read_exact(&mut heard)).await.unwrap();
        assert_eq!(&heard, b"still there");

        // All busy: the next one waits for a place.
        let _busy = (accepted[1].caller.begin(), newcomer.caller.begin());
        clients.push(TcpStream::connect(address).await.unwrap());
        assert!(timeout(Duration::from_millis(50), connections.next()).await.is_err());
        assert_eq!(places.counts(), PlaceCounts { open: 3, reserved: 0, limit: 3, accepted: 4, evicted: 1 });
        drop(accepted.swap_remove(1));
        next(&mut connections).await;
    }

    #[tokio::test]
    async fn places_are_kept_back_while_all_others_are_busy() {
        let (mut connections, address, places) = port(1, 1, Beginning::Request).await;
        let mut clients = vec![TcpStream::connect(address).await.unwrap()];
        let ordinary = next(&mut connections).await;
        let busy = ordinary.caller.begin();
        clients.push(TcpStream::connect(address).await.unwrap());
        let mut first = next(&mut connections).await;
        assert!(first.caller.is_reserved() && !ordinary.caller.is_reserved());
        assert!(!first.caller.promote());
        // One that is idle gives way at once, one that is busy after a while.
        clients.push(TcpStream::connect(address).await.unwrap());
        let mut second = next(&mut connections).await;
        assert!(second.caller.is_reserved());
        assert!(within(first.read_u8()).await.is_err());
        let _long = second.caller.begin();
        clients.push(TcpStream::connect(address).await.unwrap());
        let third = next(&mut connections).await;
        assert!(within(second.read_u8()).await.is_err());
        assert_eq!((places.counts().open, places.counts().reserved), (2, 1));
        // An ordinary place that becomes free is for those who ask for more than a probe does.
        drop(busy);
        assert!(third.caller.promote() && !third.caller.is_reserved());
        assert_eq!((places.counts().open, places.counts().reserved), (1, 0));
        drop((first, second, ordinary, third));
        assert_eq!((places.counts().open, places.counts().reserved), (0, 0));
    }

    #[tokio::test]
    async fn a_place_is_given_back_by_a_caller_that_does_not_begin() {
        let (mut connections, address, _places) = port(8, 0, Beginning::Request).await;
        let mut accept = async |opening: &[u8]| {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(opening).await.unwrap();
            let mut server = next(&mut connections).await;
            let mut heard = vec![0; opening.len()];
            server.read_exact(&mut heard).await.unwrap();
            (client, server)
        };
        let (_silent, mut of_silent) = accept(b"").await;
        let (_slow, mut of_slow) = accept(&PREFACE[..PREFACE.len() - 1]).await;
        let (_half, mut of_half) = accept(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n").await;
        let (_speaking, mut of_speaking) = accept(PREFACE).await;
        let (_asking, mut of_asking) = accept(b"GET /livez HTTP/1.1\r\n\r\n").await;
        let _request = of_asking.caller.begin();
        tokio::time::pause();
        for server in [&mut of_silent, &mut of_slow, &mut of_half] {
            assert_eq!(server.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
        for server in [&mut of_speaking, &mut of_asking] {
            assert!(timeout(OPENING_PATIENCE * 10, server.read_u8()).await.is_err(), "it may pause");
        }
    }

    #[tokio::test]
    async fn a_stranger_says_little_and_not_for_long() {
        let beginning = Beginning::Identify { max_bytes: 100 };
        let (mut connections, address, _places) = port(8, 0, beginning).await;
        let mut accept = async |opening: &[u8]| {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(opening).await.unwrap();
            (client, next(&mut connections).await)
        };
        let (_much, mut of_much) = accept(&[b'x'; 101]).await;
        let mut heard = [0; 101];
        assert_eq!(of_much.read_exact(&mut heard).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let (_little, mut of_little) = accept(PREFACE).await;
        of_little.read_exact(&mut heard[..PREFACE.len()]).await.unwrap();
        let (mut known, mut of_known) = accept(PREFACE).await;
        of_known.read_exact(&mut heard[..PREFACE.len()]).await.unwrap();
        of_known.caller.stays();
        known.write_all(&[b'x'; 101]).await.unwrap();
        within(of_known.read_exact(&mut heard)).await.unwrap();
        tokio::time::pause();
        assert_eq!(of_little.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(timeout(OPENING_PATIENCE * 10, of_known.read_u8()).await.is_err(), "it may pause");
    }

    #[tokio::test]
    async fn what_is_held_is_counted_by_connection_and_for_all() {
        let places = Places::new(2, 0);
        let bound = Bound { each: 40, all: 100 };
        assert_eq!([0, 50, 60, 99, 200].map(|held| bound.share(held)), [40, 40, 40, 1, 0]);
        let callers = [places.admit(None).await, places.admit(None).await];
        callers[0].take(Held::Unsent, 39);
        assert!(callers[0].has_room(bound));
        callers[0].take(Held::Unsent, 1);
        assert!(!callers[0].has_room(bound) && callers[1].has_room(bound));
        callers[1].take(Held::Unsent, 35);
        assert!(!callers[1].has_room(bound), "as much is left as it has");
        callers[0].give_back(Held::Unsent, 40);
        assert!(callers[0].has_room(bound) && callers[1].has_room(bound));
        assert_eq!((places.held(Held::Unsent), callers[0].holds(Held::Unsent)), (35, 0));
        assert!(callers[0].try_take(Held::Watches, 3, 3) && !callers[0].try_take(Held::Watches, 1, 3));
        assert_eq!((places.held(Held::Watches), callers[0].holds(Held::Watches)), (3, 3));
    }

    #[tokio::test(start_paused = true)]
    async fn room_is_made_by_callers_that_take_nothing() {
        const PATIENCE: Duration = Duration::from_secs(10);
        const SHORTAGE: Duration = Duration::from_secs(1);
        let places = Places::new(8, 0);
        let bound = Bound { each: 40, all: 50 };
        let (greedy, other) = (places.admit(None).await, places.admit(None).await);
        greedy.take(Held::Unsent, 45);
        other.take(Held::Unsent, 5);
        assert!(!other.has_room(bound));
        // The greedy one is closed, and what it held is given back by its connection.
        let waiting = other.room(bound, PATIENCE, SHORTAGE);
        let closing = async {
            futures::future::poll_fn(|cx| match greedy.is_closed(cx.waker()) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            })
            .await;
            greedy.give_back(Held::Unsent, 45);
        };
        timeout(SHORTAGE * 3, async { tokio::join!(waiting, closing) }).await.unwrap();

        // One that takes nothing of its own answers is closed later.
        other.take(Held::Unsent, 40);
        let waiting = timeout(PATIENCE / 2, other.room(bound, PATIENCE, SHORTAGE));
        assert!(waiting.await.is_err());
        let closed = futures::future::poll_fn(|cx| match other.is_closed(cx.waker()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        });
        tokio::select! {
            () = closed => {}
            () = other.room(bound, PATIENCE, SHORTAGE) => panic!("there is no room"),
            () = tokio::time::sleep(PATIENCE * 2) => panic!("it keeps its place"),
        }
    }

    #[test]
    fn every_port_has_some() {
        assert_eq!(share_of(64, 2), 16);
        assert_eq!(share_of(1024, 2), 496);
        assert_eq!(share_of(64, 8), MIN_CONNECTIONS);
        assert_eq!(share_of(usize::MAX, 8), MAX_CONNECTIONS);
    }
}
