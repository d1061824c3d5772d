//! What is on its way through a connection, counted: requests that have not arrived as a whole, and answers that their
//! callers have not taken.
//!
//! A request is counted from its first byte to its last. gRPC says how long a message is before it sends it, and the
//! decoder sets aside as much: a long message counts as a whole from the beginning. The messages of a pipeline count one
//! by one, all other requests until their caller says that nothing more comes. What exceeds a connection's share is
//! refused, and so is a request that does not get on: see [`Patience`].
//!
//! An answer is counted from when it is there ([`Built`]), or else encoded, until the last byte of it has been handed to the
//! operating system, or its stream is gone. An answer is made, and the next message of a stream encoded, only while its
//! connection has room, so a caller that does not read makes the node hold a little more than the bound, whatever it asked
//! for.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderMap, header};
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;

use super::failure;
use super::limits::{Bound, DoorLimits};
use crate::incoming::{Caller, Held, UnderWay};
use crate::proto::v1::Failure;

/// A connection that has taken nothing of its answers for this long is closed when other answers wait for it.
const UNSENT_PATIENCE: Duration = Duration::from_secs(30);
/// The same while the answers of all connections together leave no room for others.
pub(crate) const SHORTAGE_PATIENCE: Duration = Duration::from_secs(1);
/// Messages of up to this many bytes count as what has arrived of them.
const SHORT_MESSAGE_BYTES: usize = 64 * 1024;
/// What a connection may have under way however much others have, up to twice the bound for all.
const UNFINISHED_FLOOR_BYTES: usize = 1024 * 1024;
/// What gRPC puts before a message: a flag and the length.
const PREFIX_BYTES: usize = 5;

/// How long a request may take to arrive.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// Without another byte of it.
    silent: Duration,
    /// As a whole.
    total: Duration,
}

const PATIENCE: Patience = Patience { silent: Duration::from_secs(15), total: Duration::from_secs(120) };

/// Counts `bytes` more as unfinished for `caller`.
///
/// # Errors
/// The failure to answer, when they are too many; then they are not counted.
pub(crate) fn hold_unfinished(caller: &Caller, limits: &DoorLimits, bytes: usize) -> Result<(), Failure> {
    let (bound, all) = (limits.unfinished_bytes, caller.places().held(Held::Unfinished));
    let floor = if all < bound.all.saturating_mul(2) { UNFINISHED_FLOOR_BYTES } else { 0 };
    match caller.try_take(Held::Unfinished, bytes, bound.share(all).max(floor)) {
        true => Ok(()),
        false => Err(failure::too_much_unfinished(bound)),
    }
}

/// What a request says that its body is.
pub(crate) fn content_type(headers: &HeaderMap) -> String {
    let value = headers.get(header::CONTENT_TYPE).map_or(&b""[..], |value| value.as_bytes());
    let kind = value.split(|byte| *byte == b';').next().unwrap_or_default();
    String::from_utf8_lossy(kind).trim().to_ascii_lowercase()
}

/// Whether a request is a call of gRPC.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = content_type(headers);
    kind == "application/grpc" || kind.starts_with("application/grpc+")
}

/// How a request's bytes belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// All are one request.
    Plain,
    /// One message of gRPC, or few, before the request is answered.
    Message,
    /// Messages of gRPC, each answered by itself.
    Pipeline,
}

/// The body of a request.
pub(crate) struct Arriving {
    body: Body,
    caller: Arc<Caller>,
    limits: Arc<DoorLimits>,
    framing: Framing,
    message: MessageBounds,
    /// Bytes of messages that are complete and still count.
    complete: usize,
    /// Counted for the caller.
    held: usize,
    /// Runs while something is awaited.
    timer: Option<(Instant, Pin<Box<Sleep>>)>,
    over: bool,
}

/// Where in the messages of gRPC the bytes are.
#[derive(Debug, Default)]
struct MessageBounds {
    /// Of the next message, as far as they have arrived.
    prefix: [u8; PREFIX_BYTES],
    prefix_bytes: usize,
    /// Of the message itself.
    length: usize,
    missing: usize,
}

impl MessageBounds {
    /// Takes in what has arrived; calls `done` with the length of each message that is complete.
    fn take_in(&mut self, mut bytes: &[u8], mut done: impl FnMut(usize)) {
        while !bytes.is_empty() {
            if self.prefix_bytes < PREFIX_BYTES {
                let taken = bytes.len().min(PREFIX_BYTES - self.prefix_bytes);
                self.prefix[self.prefix_bytes..][..taken].copy_from_slice(&bytes[..taken]);
                self.prefix_bytes += taken;
                bytes = &bytes[taken..];
                if self.prefix_bytes < PREFIX_BYTES {
                    return;
                }
                let [_flag, length @ ..] = self.prefix;
                self.length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
                self.missing = self.length;
            }
            let taken = bytes.len().min(self.missing);
            self.missing -= taken;
            bytes = &bytes[taken..];
            if self.missing == 0 {
                done(self.length);
                *self = Self::default();
            }
        }
    }

    /// Bytes that the message at hand takes.
    fn held(&self) -> usize {
        match self.prefix_bytes {
            PREFIX_BYTES if self.length > SHORT_MESSAGE_BYTES => self.length,
            PREFIX_BYTES => self.length - self.missing,
            begun => begun,
        }
    }
}

impl Arriving {
    pub(crate) fn new(body: Body, caller: Arc<Caller>, limits: Arc<DoorLimits>, framing: Framing) -> Self {
        let over = body.is_end_stream();
        Self {
            body,
            caller,
            limits,
            framing,
            message: MessageBounds::default(),
            complete: 0,
            held: 0,
            timer: None,
            over,
        }
    }

    /// Counts what has arrived.
    fn count(&mut self, bytes: &[u8]) -> Result<(), Status> {
        let mut complete = 0;
        match self.framing {
            Framing::Plain => complete = bytes.len(),
            Framing::Message | Framing::Pipeline => self.message.take_in(bytes, |length| complete += length),
        }
        match self.framing {
            // What is complete stays until the caller has said that nothing follows.
            Framing::Plain | Framing::Message => self.complete = self.complete.saturating_add(complete),
            Framing::Pipeline if complete > 0 => self.timer = None,
            Framing::Pipeline => {}
        }
        self.hold(self.complete.saturating_add(self.message.held()))
    }

    fn hold(&mut self, held: usize) -> Result<(), Status> {
        if held > self.held {
            hold_unfinished(&self.caller, &self.limits, held - self.held)?;
        } else {
            self.caller.give_back(Held::Unfinished, self.held - held);
        }
        self.held = held;
        Ok(())
    }

    fn end(&mut self) {
        self.over = true;
        self.timer = None;
        self.caller.give_back(Held::Unfinished, self.held);
        self.held = 0;
    }

    /// Whether more must come, and when it is too late for that.
    fn poll_overdue(&mut self, cx: &mut Context<'_>, progress: bool) -> Poll<Status> {
        if self.over || (self.framing == Framing::Pipeline && self.held == 0) {
            self.timer = None;
            return Poll::Pending;
        }
        let now = Instant::now();
        let until = |begun: Instant| (now + PATIENCE.silent).min(begun + PATIENCE.total);
        let (begun, timer) = self.timer.get_or_insert_with(|| (now, Box::pin(sleep_until(until(now)))));
        if progress {
            let until = until(*begun);
            timer.as_mut().reset(until);
        }
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(failure::unfinished(PATIENCE.silent, PATIENCE.total).into())
    }
}

impl HttpBody for Arriving {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let this = &mut *self;
        let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) else {
            let overdue = ready!(this.poll_overdue(cx, false));
            this.end();
            return Poll::Ready(Some(Err(overdue.into())));
        };
        let Some(frame) = frame else {
            this.end();
            return Poll::Ready(None);
        };
        if let Ok(frame) = &frame
            && let Some(bytes) = frame.data_ref()
        {
            if let Err(refused) = this.count(bytes) {
                this.end();
                return Poll::Ready(Some(Err(refused.into())));
            }
            if this.body.is_end_stream() {
                this.end();
            } else if this.timer.is_some() {
                // Not due: something has just come.
                let _ = this.poll_overdue(cx, true);
            }
        }
        Poll::Ready(Some(frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.caller.give_back(Held::Unfinished, self.held);
    }
}

/// Waits until `caller` may be answered more: see [`Caller::room`].
pub(crate) async fn room(caller: &Caller, limits: &DoorLimits) {
    caller.room(limits.unsent_bytes, UNSENT_PATIENCE, SHORTAGE_PATIENCE).await;
}

/// The same for who makes what is encoded later, message by message: what waits for that leaves half of the room to what is
/// encoded, or nothing of it would ever be.
pub(crate) async fn room_to_build(caller: &Caller, limits: &DoorLimits) {
    let Bound { each, all } = limits.unsent_bytes;
    caller.room(Bound { each: each / 2, all: all / 2 }, UNSENT_PATIENCE, SHORTAGE_PATIENCE).await;
}

/// An answer that is not encoded yet, and counts as unsent all the same: HTTP/2 asks for it when its caller has a window
/// for it, and that may never be.
#[derive(Debug, Clone)]
pub(crate) struct Built(#[expect(dead_code, reason = "it counts for as long as it lives")] Arc<CountedBytes>);

#[derive(Debug)]
struct CountedBytes {
    caller: Arc<Caller>,
    bytes: usize,
}

impl Built {
    pub(crate) fn new(caller: Arc<Caller>, bytes: usize) -> Self {
        caller.take(Held::Unsent, bytes);
        Self(Arc::new(CountedBytes { caller, bytes }))
    }
}

impl Drop for CountedBytes {
    fn drop(&mut self) {
        self.caller.give_back(Held::Unsent, self.bytes);
    }
}

/// The body of an answer.
pub(crate) struct Leaving {
    body: Body,
    /// What counts for it until it is encoded.
    built: Option<Built>,
    caller: Arc<Caller>,
    limits: Arc<DoorLimits>,
    /// Whether it waits for room. What a probe or an operator asks for does not.
    waits: bool,
    room: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    _under_way: Option<UnderWay>,
}

impl Leaving {
    pub(crate) fn new(
        body: Body,
        built: Option<Built>,
        under_way: Option<UnderWay>,
        caller: Arc<Caller>,
        limits: Arc<DoorLimits>,
        waits: bool,
    ) -> Self {
        let built = built.or_else(|| {
            // A page.
            let bytes = usize::try_from(body.size_hint().exact()?).ok()?;
            Some(Built::new(caller.clone(), bytes))
        });
        Self { body, built, caller, limits, waits, room: None, _under_way: under_way }
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let is_due = !self.waits || self.built.is_some() || self.caller.has_room(self.limits.unsent_bytes);
        if self.room.is_none() && is_due {
            return Poll::Ready(());
        }
        let room = self.room.get_or_insert_with(|| {
            let (caller, limits) = (self.caller.clone(), self.limits.clone());
            Box::pin(async move { room(&caller, &limits).await })
        });
        ready!(room.as_mut().poll(cx));
        self.room = None;
        Poll::Ready(())
    }
}

impl HttpBody for Leaving {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        ready!(this.poll_room(cx));
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        let caller = &this.caller;
        let counted =
            frame.map(|frame| frame.map(|frame| frame.map_data(|bytes| Unsent::count(bytes, caller))));
        this.built = None;
        Poll::Ready(counted)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Bytes that count as unsent for as long as anybody has them.
struct Unsent {
    bytes: Bytes,
    caller: Arc<Caller>,
}

impl Unsent {
    fn count(bytes: Bytes, caller: &Arc<Caller>) -> Bytes {
        if bytes.is_empty() {
            return bytes;
        }
        caller.take(Held::Unsent, bytes.len());
        Bytes::from_owner(Self { bytes, caller: caller.clone() })
    }
}

impl AsRef<[u8]> for Unsent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        self.caller.give_back(Held::Unsent, self.bytes.len());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::incoming::Places;

    /// Frames that are there, and then silence.
    struct Frames(VecDeque<Bytes>);

    impl HttpBody for Frames {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            self.0.pop_front().map_or(Poll::Pending, |bytes| Poll::Ready(Some(Ok(Frame::data(bytes)))))
        }
    }

    fn message(length: usize, arrived: usize) -> Bytes {
        let prefix = u32::try_from(length).unwrap().to_be_bytes();
        [&[0][..], &prefix, &vec![7; arrived]].concat().into()
    }

    async fn caller() -> Arc<Caller> {
        Places::new(8, 0).admit(None).await
    }

    fn arriving(caller: &Arc<Caller>, framing: Framing, frames: impl IntoIterator<Item = Bytes>) -> Arriving {
        let body = Body::new(Frames(frames.into_iter().collect()));
        Arriving::new(body, caller.clone(), Arc::default(), framing)
    }

    async fn frame(
        body: &mut (impl HttpBody<Data = Bytes, Error = axum::BoxError> + Unpin),
    ) -> Result<Bytes, Status> {
        let frame = futures::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await;
        match frame.unwrap() {
            Ok(frame) => Ok(frame.into_data().unwrap()),
            Err(error) => Err(*error.downcast::<Status>().unwrap()),
        }
    }

    #[tokio::test]
    async fn messages_count_until_they_are_complete() {
        let caller = caller().await;
        let held = || caller.holds(Held::Unfinished);
        let whole = message(100, 100);
        let frames =
            [whole.slice(..3), whole.slice(3..50), whole.slice(50..), message(1 << 20, 10), whole.clone()];
        let mut pipeline = arriving(&caller, Framing::Pipeline, frames.clone());
        let mut counted = Vec::new();
        for _ in 0..4 {
            frame(&mut pipeline).await.unwrap();
            counted.push(held());
        }
        assert_eq!(counted, [3, 45, 0, 1 << 20], "a long message counts from its beginning");
        drop(pipeline);
        assert_eq!(held(), 0);

        // Until the caller says that nothing follows, a request counts with all that has come.
        let mut unary = arriving(&caller, Framing::Message, frames);
        frame(&mut unary).await.unwrap();
        frame(&mut unary).await.unwrap();
        frame(&mut unary).await.unwrap();
        assert_eq!(held(), 100);
        drop(unary);
        let mut plain = arriving(&caller, Framing::Plain, [whole.clone(), whole]);
        frame(&mut plain).await.unwrap();
        frame(&mut plain).await.unwrap();
        assert_eq!(held(), 210);
        drop(plain);
        assert_eq!((held(), caller.places().held(Held::Unfinished)), (0, 0));
    }

    #[tokio::test]
    async fn more_than_a_connections_share_is_refused() {
        const MIB: usize = 1024 * 1024;
        let caller = caller().await;
        let mut bodies: Vec<_> =
            (0..300).map(|_| arriving(&caller, Framing::Message, [message(8 * MIB, 16)])).collect();
        let mut passed = 0;
        for body in &mut bodies {
            match frame(body).await {
                Ok(_) => passed += 1,
                Err(refused) => assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused}"),
            }
        }
        assert_eq!(passed, 8, "64 MiB");
        // What is short gets through elsewhere, whatever others hold.
        let places = caller.places().clone();
        for _ in 0..7 {
            let other = places.admit(None).await;
            other.take(Held::Unfinished, 40 * MIB);
        }
        let other = places.admit(None).await;
        frame(&mut arriving(&other, Framing::Message, [message(MIB, 16)])).await.unwrap();
        drop(bodies);
        assert_eq!(caller.holds(Held::Unfinished), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_does_not_get_on_ends() {
        let caller = caller().await;
        for (framing, frames) in [
            (Framing::Message, vec![]),
            (Framing::Message, vec![message(100, 100)]),
            (Framing::Pipeline, vec![message(100, 99)]),
            (Framing::Plain, vec![message(100, 3)]),
        ] {
            let mut body = arriving(&caller, framing, frames.clone());
            for _ in &frames {
                frame(&mut body).await.unwrap();
            }
            let begun = Instant::now();
            assert_eq!(frame(&mut body).await.unwrap_err().code(), tonic::Code::ResourceExhausted);
            assert!(begun.elapsed() < PATIENCE.silent * 2);
            assert_eq!(caller.holds(Held::Unfinished), 0);
        }
        // A pipeline may be silent between two messages.
        let mut pipeline = arriving(&caller, Framing::Pipeline, [message(100, 100)]);
        frame(&mut pipeline).await.unwrap();
        assert!(tokio::time::timeout(PATIENCE.total * 3, frame(&mut pipeline)).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn answers_count_until_they_are_sent_and_wait_for_room() {
        let caller = caller().await;
        let bytes = Bytes::from(vec![1; 1000]);
        let limits = DoorLimits { unsent_bytes: Bound { each: 1500, all: 3000 }, ..DoorLimits::default() };
        let limits = Arc::new(limits);
        let frames = Frames(std::iter::repeat_n(bytes, 3).collect());
        let mut answer =
            Leaving::new(Body::new(frames), None, Some(caller.begin()), caller.clone(), limits, true);
        let mut next = async || futures::future::poll_fn(|cx| Pin::new(&mut answer).poll_frame(cx)).await;
        let first = next().await.unwrap().unwrap().into_data().unwrap();
        let second = next().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!((first.len(), caller.holds(Held::Unsent)), (1000, 2000));
        assert!(tokio::time::timeout(Duration::from_millis(100), next()).await.is_err(), "no room");
        drop(first);
        let third = next().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(caller.holds(Held::Unsent), 2000);
        drop((second, third));
        assert_eq!((caller.holds(Held::Unsent), caller.places().held(Held::Unsent)), (0, 0));
    }
}
