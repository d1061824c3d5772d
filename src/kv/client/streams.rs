//! Answers that come in pieces: ranges of any size, and watches.
//!
//! Both are calls of their own beside the pipeline, over a second connection to the node: a reader that is slow
//! stops its own stream and nothing else. What waits for such a reader is one message and one HTTP/2 window.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, stream};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tonic::Streaming;

use super::super::api::{Item, Range, RangeReply, Scope, WatchEvent};
use super::super::codec;
use super::Request;
use crate::call::{Header, encode_read};
use crate::client::attempt::{AttemptError, Kind, backoff};
use crate::client::connection::MAX_RESPONSE_MESSAGE_BYTES;
use crate::client::contact::ContactNote;
use crate::client::judge::{Case, Failure, Verdict, failed, in_words, judge};
use crate::client::link::Link;
use crate::client::node::Node;
use crate::client::operation::{Operation, read_kind};
use crate::client::router::Router;
use crate::client::{ClientError, Contacts, Endpoint, ReadPreference};
use crate::proto::v1::{self, kv_client::KvClient};
use crate::reason::Reason;
use crate::types::{Bookmark, HistoryEpoch, ReadOptions};

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, ClientError>> + Send>>;

/// The items of a range, in the order of their keys, all from one point in time.
///
/// If the connection breaks midway, the client goes on at the same node, which keeps the state for a minute, within the
/// client's [`timeout`](super::ClientConfig::timeout). Ends after the last item, or with an error: where that node is gone,
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

fn kv(link: &Link) -> KvClient<tonic::transport::Channel> {
    KvClient::new(link.node.side_channel()).max_decoding_message_size(MAX_RESPONSE_MESSAGE_BYTES)
}

/// Opens a range stream: repeated like a read until the first piece is there.
pub(super) async fn range(
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

/// What a call brought that had a limited time.
async fn in_time<T>(
    call: impl Future<Output = Result<Result<T, tonic::Status>, Elapsed>>,
) -> Result<T, Failure> {
    match call.await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) => Err(Failure::of_call(&status)),
        Err(_) => Err(Failure::Attempt(AttemptError::Expired { sent: true })),
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
    /// Whether that was possible.
    async fn resume(&mut self) -> bool {
        let (router, deadline) = (self.router.clone(), Instant::now() + self.router.config.timeout);
        let (Some(start), Some(_)) = (self.next.clone(), &self.request.at) else { return false };
        // Of no bound at all it is more than a request can say.
        let limit = u32::try_from(self.left).unwrap_or(0);
        let request = v1::RangeRequest { start, limit, ..self.request.clone() };
        for attempt in 0.. {
            match open_range(&self.link, request.clone(), deadline).await {
                Ok((first, pieces)) => {
                    self.pieces = pieces;
                    self.take_in(first);
                    return true;
                }
                Err(failure) if is_forgotten(&failure) || Instant::now() >= deadline => return false,
                Err(_) => {}
            }
            let pause = backoff(router.config.retry_backoff_min, router.config.retry_backoff_max, attempt);
            sleep_until(deadline.min(Instant::now() + pause)).await;
        }
        false
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
            if state.resume().await {
                continue;
            }
            state.router.metrics.range_streams.failed.fetch_add(1, Ordering::Relaxed);
            let endpoint = &state.link.node.endpoint;
            let message = format!("the range broke off midway: {}", in_words(&failure));
            return Err(failed(endpoint, Reason::Interrupted, message, false));
        }
    });
    RangeStream { header, items: Box::pin(items) }
}

/// What happens to a range of keys from a revision on: in order, nothing left out, nothing twice.
///
/// When the connection breaks, or the node is not healthy any more, the watch goes on at another node where it was.
/// At its beginning it ends with [`ClientError::Unavailable`] or [`ClientError::DeadlineExceeded`] when no node answers
/// within the client's [`timeout`](super::ClientConfig::timeout). Once it has heard from one it waits for the cluster as long
/// as it takes, and [`contacts`](Self::contacts) tell whether it does; so the stream ends only with
/// [`ClientError::Compacted`] when no node's history reaches back to where the watch stood, with
/// [`Reason::OtherHistory`] or [`Reason::Ahead`] when where it stood is no place in this cluster, or with an error that
/// says that the request itself is at fault. After an error it is over.
#[must_use = "streams do nothing unless they are read"]
pub struct Watch {
    events: Boxed<WatchEvent>,
    resume_from: Arc<AtomicU64>,
    history: Arc<AtomicU64>,
    contacts: Contacts,
}

impl Watch {
    /// Tells whether the watch hears from its cluster, from now on. It changes only while the watch is read.
    pub fn contacts(&self) -> Contacts {
        self.contacts.clone()
    }

    /// Where another watch has to begin to miss nothing that this one has not delivered yet: pass it as
    /// `from`. In the middle of a transaction's changes, that other watch repeats those already delivered.
    pub fn resume_from(&self) -> Bookmark {
        let history = HistoryEpoch(self.history.load(Ordering::Relaxed));
        Bookmark { index: self.resume_from.load(Ordering::Relaxed), history }
    }
}

impl Stream for Watch {
    type Item = Result<WatchEvent, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.as_mut().poll_next(cx)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("resume_from", &self.resume_from()).finish_non_exhaustive()
    }
}

/// What a watch knows between two events.
struct Watching {
    router: Arc<Router>,
    preference: ReadPreference,
    request: v1::WatchRequest,
    /// Everything below has been received.
    next_revision: u64,
    /// Changes at `next_revision` that have been received, when it comes in pieces.
    received: usize,
    /// The same of what the open stream has brought: after a break the revision is told again from its beginning.
    brought: usize,
    /// Received, not yet delivered; at most one message.
    ready: VecDeque<WatchEvent>,
    open: Option<(Arc<Link>, Streaming<v1::WatchResponse>)>,
    /// The node that failed last.
    failed: Option<Arc<Link>>,
    /// Attempts in vain since the last message.
    pauses: u32,
    resume_from: Arc<AtomicU64>,
    /// The history that `next_revision` belongs to, as soon as it is known.
    history: Arc<AtomicU64>,
    contact: ContactNote,
    /// When it was first read.
    begun: Option<Instant>,
    /// Whether a node has ever sent a message.
    heard: bool,
    /// Why nodes have failed since the last message; no more of them than the router knows.
    failures: BTreeMap<Endpoint, String>,
    /// What a node has refused last, before any was heard from.
    refused: Option<String>,
    /// Nodes whose history is not the one asked for, does not reach back far enough, or not that far forward, and what
    /// they say, since the watch last got on.
    refusals: BTreeMap<Endpoint, ClientError>,
}

/// Watches from `from` on. Connects when the stream is first read.
pub(super) fn watch(
    router: &Arc<Router>,
    scope: &Scope,
    range: Range,
    from: Bookmark,
    preference: Option<&ReadPreference>,
) -> Watch {
    router.metrics.watches.opened.fetch_add(1, Ordering::Relaxed);
    let resume_from = Arc::new(AtomicU64::new(from.index));
    let history = Arc::new(AtomicU64::new(from.history.0));
    let contact = ContactNote::new();
    let contacts = contact.follow();
    let watching = Watching {
        router: router.clone(),
        preference: preference.cloned().unwrap_or_default(),
        request: v1::WatchRequest {
            tenant: scope.tenant.clone(),
            collection: scope.collection.clone(),
            start: range.start,
            end: range.end,
            from_revision: from.index,
            history: from.history.0,
        },
        next_revision: from.index,
        received: 0,
        brought: 0,
        ready: VecDeque::new(),
        open: None,
        failed: None,
        pauses: 0,
        resume_from: resume_from.clone(),
        history: history.clone(),
        contact,
        begun: None,
        heard: false,
        failures: BTreeMap::new(),
        refused: None,
        refusals: BTreeMap::new(),
    };
    let events = stream::try_unfold(watching, |mut watching| async move {
        let event = watching.next().await?;
        Ok(Some((event, watching)))
    });
    Watch { events: Box::pin(events), resume_from, history, contacts }
}

impl Watching {
    async fn next(&mut self) -> Result<WatchEvent, ClientError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                let rest = self.ready.front().map_or(self.next_revision, |next| next.revision);
                self.resume_from.store(rest, Ordering::Relaxed);
                return Ok(event);
            }
            self.resume_from.store(self.next_revision, Ordering::Relaxed);
            match self.receive().await {
                Ok(message) => self.take_in(message).await,
                Err((link, failure)) => self.after(link, &failure).await?,
            }
        }
    }

    /// The next message, from a stream that is opened if need be.
    async fn receive(&mut self) -> Result<v1::WatchResponse, (Arc<Link>, Failure)> {
        self.begun.get_or_insert_with(Instant::now);
        if self.open.is_none() {
            self.open = Some(self.connect().await?);
            self.brought = 0;
        }
        loop {
            let (interval, left) = (self.router.config.health_interval, self.left());
            let (link, messages) = self.open.as_mut().expect("invariant: opened above");
            let link = link.clone();
            match timeout(interval.min(left), messages.message()).await {
                Ok(Ok(Some(message))) => return Ok(message),
                Ok(Ok(None)) => {
                    let why = "the server closed the watch".into();
                    return Err((link, Failure::Attempt(AttemptError::Lost(why))));
                }
                Ok(Err(status)) => return Err((link, Failure::of_call(&status))),
                Err(_) if self.left().is_zero() => {
                    return Err((link, Failure::Attempt(AttemptError::Expired { sent: true })));
                }
                // A node that has lost the cluster stays silent and knows nothing new.
                Err(_) if link.node.is_healthy() => self.note_heard(&link.node.endpoint),
                Err(_) if !self.router.has_healthy_other_than(&link.node.endpoint) => {
                    self.note_lost(|| match link.node.is_reached() {
                        true => format!("{} is cut off from its cluster, or not ready", link.node.endpoint),
                        false => format!("{}: {}", link.node.endpoint, link.node.last_failure()),
                    });
                }
                Err(_) => {
                    let why = "the node is not healthy".into();
                    return Err((link, Failure::Attempt(AttemptError::Lost(why))));
                }
            }
        }
    }

    /// How long a watch that has heard from nobody yet goes on looking for somebody.
    fn left(&self) -> Duration {
        match self.begun {
            Some(begun) if !self.heard => self.router.config.timeout.saturating_sub(begun.elapsed()),
            _ => Duration::MAX,
        }
    }

    async fn connect(&self) -> Result<(Arc<Link>, Streaming<v1::WatchResponse>), (Arc<Link>, Failure)> {
        let config = &self.router.config;
        self.router.watch_health();
        let link = self.pick();
        let request = v1::WatchRequest {
            from_revision: self.next_revision,
            history: self.history.load(Ordering::Relaxed),
            ..self.request.clone()
        };
        let mut kv = kv(&link);
        let patience = (config.connect_timeout + config.attempt_timeout).min(self.left());
        let opening = timeout(patience, kv.watch(request));
        match link.node.counted(in_time(opening)).await {
            Ok(answer) => Ok((link, answer.into_inner())),
            Err(failure) => {
                if let Failure::Attempt(_) = &failure {
                    link.node.note_unready(in_words(&failure).into());
                }
                Err((link, failure))
            }
        }
    }

    /// Which node to ask next.
    fn pick(&self) -> Arc<Link> {
        let unasked = match self.refusals.is_empty() {
            true => None,
            false => self.router.find(|node| self.is_unasked(node)),
        };
        let failed = self.failed.as_ref().map(|link| &link.node.endpoint);
        unasked.unwrap_or_else(|| self.router.choose(&self.preference, failed))
    }

    /// Whether a node may have the history that others have not.
    fn is_unasked(&self, node: &Node) -> bool {
        let endpoint = &node.endpoint;
        let in_vain = self.refusals.contains_key(endpoint) || self.failures.contains_key(endpoint);
        !in_vain && (node.is_usable() || !node.was_missed())
    }

    async fn take_in(&mut self, message: v1::WatchResponse) {
        self.pauses = 0;
        self.failed = None;
        self.failures.clear();
        self.heard = true;
        if let Some(HistoryEpoch(history @ 1..)) = message.header.as_ref().map(history) {
            self.history.store(history, Ordering::Relaxed);
        }
        if let Some((link, _)) = &self.open {
            let link = link.clone();
            if link.node.is_healthy() || (!self.contact.is_heard() && self.is_in_touch(&link).await) {
                self.note_heard(&link.node.endpoint);
            }
        }
        let v1::WatchResponse { events, mut next_revision, more, .. } = message;
        for event in events {
            next_revision = next_revision.max(event.revision + 1);
            // After a break a node may begin a little earlier than it was asked to.
            if event.revision < self.next_revision {
                continue;
            }
            self.reach(event.revision);
            self.brought += 1;
            // Nor is a revision that comes in pieces delivered twice when a break cuts it.
            if self.brought > self.received {
                self.received = self.brought;
                self.ready.push_back(codec::decode_event(event));
            }
        }
        if !more {
            self.reach(next_revision);
        }
    }

    /// Everything below `revision` has been received.
    fn reach(&mut self, revision: u64) {
        if revision > self.next_revision {
            (self.next_revision, self.received, self.brought) = (revision, 0, 0);
            self.refusals.clear();
        }
    }

    /// Whether the node is in touch with its cluster, as it says when it is asked: one that is cut off sends messages, too.
    async fn is_in_touch(&self, link: &Link) -> bool {
        let asked = link.node.status(self.router.config.attempt_timeout).await;
        asked.is_ok_and(|status| status.ready) || link.node.is_healthy()
    }

    fn note_heard(&self, endpoint: &Endpoint) {
        if self.contact.heard(endpoint) {
            tracing::debug!(%endpoint, from = self.next_revision, "the watch hears from its cluster");
        }
    }

    fn note_lost(&self, why: impl Fn() -> String) {
        if self.contact.lost(&why) {
            tracing::warn!(
                why = why(),
                from = self.next_revision,
                "the watch has lost its cluster; trying again"
            );
        }
    }

    /// Waits before the next attempt, unless another node can be asked at once; or gives up.
    async fn after(&mut self, link: Arc<Link>, failure: &Failure) -> Result<(), ClientError> {
        let was_open = self.open.take().is_some();
        let endpoint = link.node.endpoint.clone();
        tracing::debug!(%endpoint, ?failure, from = self.next_revision, "watch broke off");
        let case = Case { kind: Kind::Anywhere, in_session: false, undecided: false };
        match judge(case, &endpoint, failure) {
            Verdict::Return(error @ ClientError::Rejected { .. }) => return Err(self.ended(error)),
            Verdict::Return(error) if is_about_history(&error) => {
                let error = self.told_from_where(error);
                self.note_refusal(&link, error).await;
            }
            _ => drop(self.failures.insert(endpoint.clone(), in_words(failure))),
        }
        if !self.refusals.is_empty() {
            return match self.router.find(|node| self.is_unasked(node)) {
                Some(_) => Ok(()),
                None => Err(self.ended(self.history_is_gone())),
            };
        }
        if was_open {
            self.router.metrics.watch_reconnects.fetch_add(1, Ordering::Relaxed);
        }
        if let Failure::Answered(answer) = failure {
            self.router.note_failure(answer);
            self.refused = Some(in_words(failure));
        }
        if let Some(error) = self.nobody_answers() {
            return Err(self.ended(error));
        }
        let another = self.router.has_healthy_other_than(&endpoint);
        let first = self.failed.replace(link).is_none();
        if !(first && another) {
            self.note_lost(|| format!("{endpoint}: {}", in_words(failure)));
            let config = &self.router.config;
            let pause = backoff(config.retry_backoff_min, config.retry_backoff_max, self.pauses);
            self.pauses += 1;
            self.router.hunt();
            sleep(pause.min(self.left())).await;
        }
        Ok(())
    }

    /// With the revision that was to be watched from: a node names the position before it.
    fn told_from_where(&self, error: ClientError) -> ClientError {
        match error {
            ClientError::Failed { endpoint, reason: reason @ Reason::Ahead, message, maybe_applied } => {
                let message = format!("a watch cannot begin at revision {}: {message}", self.next_revision);
                ClientError::Failed { endpoint, reason, message, maybe_applied }
            }
            error => error,
        }
    }

    /// Another node may have the history that this one has not: learns first who there is.
    async fn note_refusal(&mut self, link: &Arc<Link>, error: ClientError) {
        if self.refusals.is_empty()
            && let Ok(status) = link.node.status(self.router.config.attempt_timeout).await
        {
            self.router.heard(&link.node, &status);
        }
        self.refusals.insert(link.node.endpoint.clone(), error);
    }

    /// What all nodes that answer have refused: with the earliest beginning that any history has.
    fn history_is_gone(&self) -> ClientError {
        let begins = |error: &ClientError| match error {
            ClientError::Compacted { first_revision } => *first_revision,
            _ => u64::MAX,
        };
        let error = self.refusals.values().min_by_key(|error| begins(error));
        error.expect("invariant: only asked once a node has refused").clone()
    }

    /// What a watch ends with that has heard from nobody in time.
    fn nobody_answers(&self) -> Option<ClientError> {
        let (config, begun) = (&self.router.config, self.begun?);
        if self.heard {
            return None;
        }
        let endpoints = self.router.endpoints(false);
        let all_failed = endpoints.iter().all(|endpoint| self.failures.contains_key(endpoint));
        let is_over = self.left().is_zero();
        match &self.refused {
            Some(refused) if is_over => Some(ClientError::DeadlineExceeded {
                timeout: config.timeout,
                maybe_applied: false,
                last: Some(refused.clone()),
            }),
            None if is_over || (all_failed && begun.elapsed() >= config.unavailable_after) => {
                let why = |endpoint: &Endpoint| match self.failures.get(endpoint) {
                    Some(why) => why.clone(),
                    None => self.router.at(endpoint).node.last_failure(),
                };
                let tried =
                    endpoints.into_iter().map(|endpoint| (endpoint.clone(), why(&endpoint))).collect();
                Some(ClientError::Unavailable { tried })
            }
            Some(_) | None => None,
        }
    }

    fn ended(&self, error: ClientError) -> ClientError {
        self.router.metrics.watches.failed.fetch_add(1, Ordering::Relaxed);
        error
    }
}

/// Whether a node has refused a watch for what its history is, so that another may have what it lacks.
fn is_about_history(error: &ClientError) -> bool {
    match error {
        ClientError::Compacted { .. } => true,
        ClientError::Failed { reason, .. } => matches!(reason, Reason::OtherHistory | Reason::Ahead),
        _ => false,
    }
}

fn history(header: &v1::Header) -> HistoryEpoch {
    HistoryEpoch(header.position.map_or(0, |position| position.history))
}

/// What to read to learn at which revision the present begins: a linearizable read of next to nothing.
pub(super) fn present(scope: &Scope, range: &Range) -> Request {
    Request::Range { scope: scope.clone(), range: range.clone().with_limit(1) }
}
