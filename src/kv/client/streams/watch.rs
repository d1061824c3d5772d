//! What happens to keys, from a revision on.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, stream};
use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

use super::super::super::api::{Range, Scope, WatchEvent};
use super::super::super::codec;
use super::super::Request;
use super::{Boxed, in_time, kv};
use crate::client::attempt::{AttemptError, Kind, backoff};
use crate::client::contact::ContactNote;
use crate::client::judge::{Case, Failure, Verdict, in_words, judge};
use crate::client::link::Link;
use crate::client::node::Node;
use crate::client::router::Router;
use crate::client::{ClientError, Contacts, Endpoint, ReadPreference};
use crate::proto::v1;
use crate::reason::Reason;
use crate::types::{Bookmark, HistoryEpoch};

/// What happens to a range of keys from a revision on: in order, nothing left out, nothing twice.
///
/// When the connection breaks, or the node is not healthy any more, the watch goes on at another node where it was.
/// At its beginning it ends with [`ClientError::Unavailable`] or [`ClientError::DeadlineExceeded`] when no node answers
/// within the client's [`timeout`](super::super::ClientConfig::timeout). Once it has heard from one it waits for the cluster as long
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
    /// When the first of them has refused.
    refused_at: Option<Instant>,
}

/// Watches from `from` on. Connects when the stream is first read.
pub(in super::super) fn watch(
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
            ..Default::default()
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
        refused_at: None,
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
        tracing::debug!(%endpoint, failure = in_words(failure), from = self.next_revision, "watch broke off");
        let case = Case { kind: Kind::Anywhere, in_session: false, undecided: false };
        match judge(case, &endpoint, failure) {
            Verdict::Return(error @ ClientError::Rejected { .. }) => return Err(self.ended(error)),
            Verdict::Return(error) if is_about_history(&error) => {
                let error = self.told_from_where(error);
                self.note_refusal(&link, error).await;
            }
            Verdict::Return(_)
            | Verdict::Elsewhere
            | Verdict::Later
            | Verdict::Patiently(_)
            | Verdict::NewSession => drop(self.failures.insert(endpoint.clone(), in_words(failure))),
        }
        if !self.refusals.is_empty() {
            return match self.may_have_history().await {
                true => Ok(()),
                false => Err(self.ended(self.history_is_gone())),
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

    /// Another node may have the history that this one has not: learns first who there is. What failed before may be back, as
    /// this one is.
    async fn note_refusal(&mut self, link: &Arc<Link>, error: ClientError) {
        if self.refusals.is_empty() {
            self.failures.clear();
            self.refused_at = Some(Instant::now());
            if let Ok(status) = link.node.status(self.router.config.attempt_timeout).await {
                self.router.heard(&link.node, &status);
            }
        }
        self.refusals.insert(link.node.endpoint.clone(), error);
    }

    /// Whether a node is left that may have the history that others have not. Those that are not reached are tried again for a
    /// while: where all were restarted, the first that is back need not be the one that remembers most.
    async fn may_have_history(&mut self) -> bool {
        if self.router.find(|node| self.is_unasked(node)).is_some() {
            return true;
        }
        let config = self.router.config.clone();
        let patient = self.refused_at.is_some_and(|at| at.elapsed() < config.unavailable_after);
        let may_be_back = |node: &Node| {
            let endpoint = &node.endpoint;
            node.has_answered()
                && self.failures.contains_key(endpoint)
                && !self.refusals.contains_key(endpoint)
        };
        if !patient || self.router.find(may_be_back).is_none() {
            return false;
        }
        sleep(backoff(config.retry_backoff_min, config.retry_backoff_max, self.pauses)).await;
        self.pauses += 1;
        self.failures.clear();
        true
    }

    /// What all nodes that answer have refused: with the earliest beginning that any history has.
    fn history_is_gone(&self) -> ClientError {
        let begins = |error: &ClientError| {
            if let ClientError::Compacted { first_revision } = error { *first_revision } else { u64::MAX }
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
    [Reason::Compacted, Reason::OtherHistory, Reason::Ahead].contains(&error.reason())
}

fn history(header: &v1::Header) -> HistoryEpoch {
    HistoryEpoch(header.position.map_or(0, |position| position.history))
}

/// What to read to learn at which revision the present begins: a linearizable read of next to nothing.
pub(in super::super) fn present(scope: &Scope, range: &Range) -> Request {
    Request::Range { scope: scope.clone(), range: range.clone().with_limit(1) }
}
