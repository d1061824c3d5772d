//! One connection of a follower that speaks frames: what it says is read, and what it is told is written, by one task.
//!
//! What ends the stream is said in a last frame, where the follower still takes it. Then the other direction is read for a moment: a connection
//! that is closed while something of it is unread may lose what was sent last.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader, BufWriter, ReadHalf, WriteHalf, split};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

use super::codec::{self, FirstFrame, HEAD_BYTES, Head, MAX_FIRST_BYTES, MAX_LATER_BYTES};
use super::encoding::FrameEncoding;
use crate::door::Credentials;
use crate::door::bodies::hold_unfinished;
use crate::door::failure::{self, invalid};
use crate::door::limits::DoorLimits;
use crate::door::rights::audit::AuditedCall;
use crate::door::rights::table::CallRight;
use crate::door::rights::{MAX_TOKEN_BYTES, Principal};
use crate::door::streams::{Responses, WatchPlace, stream};
use crate::incoming::{Accepted, Caller, Held};
use crate::node::identified;
use crate::node::operated::OperatedNode;
use crate::node::subscriptions::{self, Chunk, FIRST_PATIENCE, FollowerLine, SubscriptionService, drained};
use crate::proto::replication::SubscribeRequest;
use crate::proto::v1::Failure;

/// What a follower says is read this far ahead of what is made of it.
const MAX_UNHEARD: usize = 64;
/// Small frames are written together.
const WRITE_BYTES: usize = 64 * 1024;
const READ_BYTES: usize = 8 * 1024;
/// What a connection says before it is known to be a follower's.
pub(super) const BEGINNING_BYTES: usize = 2 * HEAD_BYTES + AUTHENTICATE_BYTES + MAX_FIRST_BYTES + READ_BYTES;
/// Bytes of a frame with the longest token.
const AUTHENTICATE_BYTES: usize = MAX_TOKEN_BYTES + 64;
/// How long what is left to say may take, the last frame included; and again how long the follower may take to go.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// So much of what a follower says is read after its end.
const DISCARDED_BYTES: u64 = 1024 * 1024;

/// Serves `accepted` from `service`, or says why there is none.
pub(super) async fn serve<N: OperatedNode>(
    accepted: Accepted,
    service: Result<SubscriptionService<N>, Failure>,
    credentials: Option<Credentials>,
) {
    let caller = accepted.caller().clone();
    let (from, to) = split(accepted);
    let mut follower = FrameReader { from: BufReader::with_capacity(READ_BYTES, from), caller };
    let mut to = BufWriter::with_capacity(WRITE_BYTES, to);
    let ended = match service {
        Ok(service) => follow(service, credentials, &mut follower, &mut to).await,
        Err(failure) => Some(failure),
    };
    if let Some(failure) = ended {
        // One that is gone meanwhile is told nothing.
        let _ = timeout(END_PATIENCE, farewell(&failure, &mut follower, &mut to)).await;
    }
}

/// Tells a follower what it asks for. Why nothing more is told; nothing if the follower has gone.
async fn follow<N: OperatedNode>(
    service: SubscriptionService<N>,
    credentials: Option<Credentials>,
    follower: &mut FrameReader,
    to: &mut FrameWriter,
) -> Option<Failure> {
    let call = service.call();
    let (limits, mut draining) = (service.door.limits.clone(), service.door.draining.clone());
    let first = tokio::select! {
        biased;
        () = drained(&mut draining) => Err(subscriptions::draining()),
        first = follower.first(&limits, credentials.as_ref()) => first.transpose()?,
    };
    let begun = first.and_then(|(principal, first)| {
        let counted = principal.begin().map_err(|_| failure::too_much_asked())?;
        Ok((first, (principal, counted), admit(&service, &follower.caller)?))
    });
    let ((first, (principal, _counted), place), open) = match call.open(begun) {
        Ok(begun) => begun,
        Err(failure) => return Some(failure),
    };
    let (outlet, chunks) = stream();
    let outlet = Arc::new(outlet);
    let (said, requests) = mpsc::channel(MAX_UNHEARD);
    said.try_send(Ok(first)).expect("invariant: an empty queue takes the first request");
    let line = FollowerLine {
        requests: ReceiverStream::new(requests).boxed(),
        outlet: outlet.clone(),
        encoding: FrameEncoding::default(),
        caller: follower.caller.clone(),
        principal: principal.clone(),
        limits,
        draining,
    };
    let (node, subscribers) = (service.door.node.clone(), service.subscribers.clone());
    let serving = Box::pin(async move {
        let outcome = subscriptions::serve(node, subscribers, line, place).await;
        outlet.complete();
        outcome
    });
    let mut writing = pin!(write(chunks, to));
    let outcome = tokio::select! {
        outcome = serving => outcome,
        _ = principal.ended() => Err(failure::no_longer_authenticated()),
        () = follower.rest(said) => Ok(()),
        _ = &mut writing => Ok(()),
    };
    open.ended(&outcome);
    let failure = outcome.err()?;
    let all_written = timeout(END_PATIENCE, writing).await;
    all_written.is_ok_and(|written| written.is_ok()).then_some(failure)
}

/// Who a follower is that has shown `token`, or a certificate.
///
/// # Errors
/// When it is nobody to whom anything may be told.
fn identify(
    credentials: Option<&Credentials>,
    caller: &Caller,
    token: Option<&str>,
) -> Result<Arc<Principal>, Failure> {
    let Some(credentials) = credentials else { return Ok(Principal::everyone()) };
    let shown = identified::shown_by(caller, token);
    let asked = AuditedCall { path: "frames", address: caller.address() };
    credentials.admit(shown, Some(CallRight::Data), &asked).map(Arc::new)
}

/// A place for a follower, whose connection it keeps from now on.
fn admit<N: OperatedNode>(
    service: &SubscriptionService<N>,
    caller: &Arc<Caller>,
) -> Result<WatchPlace, Failure> {
    if caller.is_reserved() && !caller.promote() {
        return Err(failure::no_place(caller.places().counts().limit));
    }
    let place = service.place(caller)?;
    caller.stays();
    Ok(place)
}

type FrameWriter = BufWriter<WriteHalf<Accepted>>;

/// Writes what is handed over, until that ends.
///
/// # Errors
/// When the follower has gone.
async fn write(mut chunks: Responses<Chunk<Bytes>>, to: &mut FrameWriter) -> io::Result<()> {
    while let Some(Ok(Chunk { messages, built })) = chunks.next().await {
        for message in &messages {
            to.write_all(message).await?;
        }
        to.flush().await?;
        drop(built);
    }
    Ok(())
}

/// Says why nothing more is told, and lets the follower take it.
async fn farewell(failure: &Failure, follower: &mut FrameReader, to: &mut FrameWriter) -> io::Result<()> {
    to.write_all(&codec::end(failure)).await?;
    to.shutdown().await?;
    let mut left = (&mut follower.from).take(DISCARDED_BYTES);
    tokio::io::copy(&mut left, &mut tokio::io::sink()).await?;
    Ok(())
}

/// What a follower says, frame by frame.
struct FrameReader {
    from: BufReader<ReadHalf<Accepted>>,
    caller: Arc<Caller>,
}

/// A frame that has not arrived as a whole.
struct UnfinishedFrame<'a> {
    caller: &'a Caller,
    bytes: usize,
}

impl Drop for UnfinishedFrame<'_> {
    fn drop(&mut self) {
        self.caller.give_back(Held::Unfinished, self.bytes);
    }
}

impl FrameReader {
    /// Who the follower is and what it asks for; nothing if it has gone. Where followers are asked who they are, one that has not said so is heard no
    /// further than it takes to say it, so that strangers fill nothing that is for others.
    async fn first(
        &mut self,
        limits: &DoorLimits,
        credentials: Option<&Credentials>,
    ) -> Result<Option<(Arc<Principal>, SubscribeRequest)>, Failure> {
        let caller = self.caller.clone();
        let is_unknown = credentials.is_some() && caller.certificate().is_none();
        let mut most = if is_unknown { AUTHENTICATE_BYTES } else { MAX_FIRST_BYTES };
        let mut known = None;
        let first = async {
            loop {
                match self.first_frame(limits, most).await? {
                    None => return Ok(None),
                    Some(FirstFrame::Subscribe(request)) => {
                        let principal = match known {
                            Some(principal) => principal,
                            None => identify(credentials, &caller, None)?,
                        };
                        return Ok(Some((principal, *request)));
                    }
                    Some(FirstFrame::Authenticate(_)) if known.is_some() => {
                        return Err(invalid("the follower says once who it is"));
                    }
                    Some(FirstFrame::Authenticate(credential)) => {
                        known = Some(identify(credentials, &caller, Some(&credential.token))?);
                        most = MAX_FIRST_BYTES;
                    }
                }
            }
        };
        timeout(FIRST_PATIENCE, first)
            .await
            .unwrap_or_else(|_| Err(subscriptions::says_nothing(FIRST_PATIENCE)))
    }

    /// One of the frames that a follower begins with.
    async fn first_frame(&mut self, limits: &DoorLimits, most: usize) -> Result<Option<FirstFrame>, Failure> {
        let Some(head) = self.head(most).await? else { return Ok(None) };
        hold_unfinished(&self.caller, limits, head.bytes)?;
        let caller = self.caller.clone();
        let _unfinished = UnfinishedFrame { caller: &caller, bytes: head.bytes };
        let Some(message) = self.message(head).await? else { return Ok(None) };
        codec::read_first(head, &message).map(Some)
    }

    /// Hands over what is said from then on, until the follower has gone. One that cannot be read says nothing more.
    async fn rest(&mut self, said: mpsc::Sender<Result<SubscribeRequest, Failure>>) {
        loop {
            let request = match self.later().await {
                Ok(None) => return,
                Ok(Some(request)) => Ok(request),
                Err(failure) => Err(failure),
            };
            let is_over = request.is_err();
            if said.send(request).await.is_err() || is_over {
                // The stream ends by itself, and says why.
                return std::future::pending().await;
            }
        }
    }

    async fn later(&mut self) -> Result<Option<SubscribeRequest>, Failure> {
        let Some(head) = self.head(MAX_LATER_BYTES).await? else { return Ok(None) };
        let Some(message) = self.message(head).await? else { return Ok(None) };
        codec::read_later(head, &message).map(Some)
    }

    async fn head(&mut self, most: usize) -> Result<Option<Head>, Failure> {
        let mut head = [0; HEAD_BYTES];
        match self.from.read_exact(&mut head).await {
            Ok(_) => Head::read(head, most).map(Some),
            Err(error) => has_gone(&error),
        }
    }

    async fn message(&mut self, head: Head) -> Result<Option<Vec<u8>>, Failure> {
        let mut message = vec![0; head.bytes];
        match self.from.read_exact(&mut message).await {
            Ok(_) => Ok(Some(message)),
            Err(error) => has_gone(&error),
        }
    }
}

/// Nothing comes any more.
///
/// # Errors
/// When that is because nothing came for too long.
fn has_gone<T>(error: &io::Error) -> Result<Option<T>, Failure> {
    match error.kind() {
        io::ErrorKind::TimedOut => Err(subscriptions::says_nothing(FIRST_PATIENCE)),
        _ => Ok(None),
    }
}
