//! Ranges of any size, from one point in time.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::{Stream, stream};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tonic::Streaming;

use super::super::super::api::{Item, Range, RangeReply, Scope};
use super::super::super::codec;
use super::kv;
use crate::call::{Header, encode_read};
use crate::client::attempt::{AttemptError, backoff};
use crate::client::following::Boxed;
use crate::client::judge::{Failure, failed, in_time, in_words};
use crate::client::link::Link;
use crate::client::operation::{Operation, read_kind};
use crate::client::router::Router;
use crate::client::{ClientError, ReadPreference};
use crate::proto::v1;
use crate::reason::Reason;
use crate::types::ReadOptions;

/// The items of a range, in the order of their keys, all from one point in time.
///
/// If the connection breaks midway, the client goes on at the same node, which keeps the state for a minute, within the
/// client's [`timeout`](super::super::ClientConfig::timeout). Ends after the last item, or with an error: where that node is gone,
/// the rest cannot be had from the same point in time. To go on with what is newer, ask again from the key after the
/// last item.
#[must_use = "streams do nothing unless they are read"]
pub struct RangeStream {
    header: Header,
    items: Boxed<Item>,
}

impl RangeStream {
    /// Who answers, from which state.
    pub fn header(&self) -> &Header {
        &self.header
    }
}

impl Stream for RangeStream {
    type Item = Result<Item, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.items.as_mut().poll_next(cx)
    }
}

impl fmt::Debug for RangeStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RangeStream").field("header", &self.header).finish_non_exhaustive()
    }
}

/// Opens a range stream: repeated like a read until the first piece is there.
pub(in super::super) async fn range(
    router: &Arc<Router>,
    scope: &Scope,
    range: Range,
    read: ReadOptions,
    preference: Option<&ReadPreference>,
) -> Result<RangeStream, ClientError> {
    let left = match range.limit_items {
        0 => u64::MAX,
        limit => limit.into(),
    };
    let (level, freshness) = encode_read(read);
    let request = v1::RangeRequest { level, freshness, ..codec::encode_range(scope.clone(), range) };
    let kind = read_kind(read.level, preference);
    let mut operation = Operation::new(router, kind, preference, Instant::now());
    router.watch_health();
    let counts = &router.metrics.range_streams;
    counts.opened.fetch_add(1, Ordering::Relaxed);
    loop {
        let link = operation.link();
        let expires = operation.patience_ends(Instant::now());
        let failure = match open_range(&link, request.clone(), expires).await {
            Ok((first, pieces)) => {
                let (router, ready) = (router.clone(), VecDeque::new());
                return Ok(items_of(
                    first,
                    Pieces { router, link, request, ready, pieces, next: None, left },
                ));
            }
            Err(failure) => failure,
        };
        if let Failure::Attempt(AttemptError::NotSent(why)) = &failure {
            link.node.set_down(why.clone());
        }
        operation.after(&link, failure).await.inspect_err(|_| {
            counts.failed.fetch_add(1, Ordering::Relaxed);
        })?;
    }
}

/// Opens a range stream at one node. The first piece tells whether the node can answer at all.
async fn open_range(
    link: &Link,
    request: v1::RangeRequest,
    expires: Instant,
) -> Result<(v1::RangeResponse, Streaming<v1::RangeResponse>), Failure> {
    let opening = async {
        let mut pieces = kv(link).range_stream(request).await?.into_inner();
        let first = pieces.message().await?;
        Ok::<_, tonic::Status>((first, pieces))
    };
    match link.node.counted(in_time(timeout_at(expires, opening))).await? {
        (Some(first), pieces) => Ok((first, pieces)),
        (None, _) => Err(Failure::Attempt(AttemptError::Lost("the range has no beginning".into()))),
    }
}

struct Pieces {
    router: Arc<Router>,
    link: Arc<Link>,
    /// What is asked for again after a break, with the position and the key to go on from.
    request: v1::RangeRequest,
    ready: VecDeque<Item>,
    pieces: Streaming<v1::RangeResponse>,
    /// The first key that the last piece did not bring; none when it was the last of all.
    next: Option<Bytes>,
    /// Items still to come at most.
    left: u64,
}

impl Pieces {
    fn take_in(&mut self, mut piece: v1::RangeResponse) -> Header {
        self.request.at = piece.header.as_ref().and_then(|header| header.position);
        let head = Header::decode(piece.header.take());
        let RangeReply { header, items, next } = codec::decode_range_reply(head, piece);
        self.next = next;
        self.left = self.left.saturating_sub(items.len() as u64);
        self.ready = items.into();
        header
    }

    /// Whether the stream may end here.
    fn is_complete(&self) -> bool {
        self.next.is_none() || self.left == 0
    }

    /// Opens the stream again where a break left it, at the same node and the same state, within the client's timeout.
    ///
    /// # Errors
    /// Why it never will be, if the node says so.
    async fn resume(&mut self) -> Result<(), Option<Failure>> {
        let (router, deadline) = (self.router.clone(), Instant::now() + self.router.config.timeout);
        let (Some(start), Some(_)) = (self.next.clone(), &self.request.at) else { return Err(None) };
        // Of no bound at all it is more than a request can say.
        let limit = u32::try_from(self.left).unwrap_or(0);
        let request = v1::RangeRequest { start, limit, ..self.request.clone() };
        for attempt in 0.. {
            match open_range(&self.link, request.clone(), deadline).await {
                Ok((first, pieces)) => {
                    self.pieces = pieces;
                    self.take_in(first);
                    return Ok(());
                }
                Err(failure) if is_forgotten(&failure) => return Err(Some(failure)),
                Err(_) if Instant::now() >= deadline => return Err(None),
                Err(_) => {}
            }
            let pause = backoff(router.config.retry_backoff_min, router.config.retry_backoff_max, attempt);
            sleep_until(deadline.min(Instant::now() + pause)).await;
        }
        Err(None)
    }
}

/// Whether a node says that it cannot go on with a state, and never will.
fn is_forgotten(failure: &Failure) -> bool {
    let for_good =
        [Reason::Compacted, Reason::OtherHistory, Reason::Ahead, Reason::Diverged, Reason::Invalid];
    failure.reason().is_some_and(|reason| for_good.contains(&reason))
}

fn items_of(first: v1::RangeResponse, mut state: Pieces) -> RangeStream {
    let header = state.take_in(first);
    let items = stream::try_unfold(state, |mut state| async move {
        loop {
            if let Some(item) = state.ready.pop_front() {
                return Ok(Some((item, state)));
            }
            let failure = match in_time(timeout(state.router.config.timeout, state.pieces.message())).await {
                Ok(Some(piece)) => {
                    state.take_in(piece);
                    continue;
                }
                Ok(None) if state.is_complete() => return Ok(None),
                Ok(None) => Failure::Attempt(AttemptError::Lost("the server ended it too early".into())),
                Err(failure) => failure,
            };
            let Err(for_good) = state.resume().await else { continue };
            let failure = for_good.unwrap_or(failure);
            let reason = failure.reason().filter(|_| is_forgotten(&failure)).unwrap_or(Reason::Interrupted);
            state.router.metrics.range_streams.failed.fetch_add(1, Ordering::Relaxed);
            let endpoint = &state.link.node.endpoint;
            let message = format!("the range broke off midway: {}", in_words(&failure));
            return Err(failed(endpoint, reason, message, false));
        }
    });
    RangeStream { header, items: Box::pin(items) }
}
