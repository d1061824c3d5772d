//! Following what happens, from node to node: what watches and subscriptions have in common.
//!
//! A [`Followed`] says how a stream is opened at a position, and what its messages mean. [`Following`] chooses the node, goes on at
//! another one where it was when a stream breaks, is silent, or comes from a node that is cut off, and delivers every item once:
//! also within a position that comes in several pieces, which is told from its beginning again after a break.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{Stream, stream};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Status, Streaming};

use super::attempt::{AttemptError, Kind, backoff};
use super::contact::{ContactNote, Contacts};
use super::endpoint::Endpoint;
use super::error::ClientError;
use super::judge::{Case, Failure, Verdict, in_time, in_words, judge};
use super::link::Link;
use super::metrics::{Metrics, PerStream};
use super::node::Node;
use super::preference::ReadPreference;
use super::router::Router;
use crate::proto::v1;
use crate::reason::Reason;
use crate::types::{Bookmark, HistoryEpoch};

/// Items, until an error ends them.
pub(crate) type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, ClientError>> + Send>>;

/// What is followed.
pub(crate) trait Followed: Send + Sync + 'static {
    /// What streams consist of.
    type Message: Send + 'static;
    /// What is delivered.
    type Item: Send + Sync + 'static;
    /// What users call it.
    const NAME: &'static str;

    /// Opens a stream at a node, whose first position is to be that of `from`.
    fn open(
        &mut self,
        link: &Link,
        from: Bookmark,
    ) -> impl Future<Output = Result<Streaming<Self::Message>, Status>> + Send;

    /// Waits for the next message. May be dropped at any time.
    fn message(
        &mut self,
        stream: &mut Streaming<Self::Message>,
    ) -> impl Future<Output = Result<Option<Self::Message>, Status>> + Send {
        stream.message()
    }

    /// What a message brings.
    ///
    /// # Errors
    /// Why no node may say that, in words.
    fn read(&mut self, message: Self::Message) -> Result<Brought<Self::Item>, String>;

    /// Where a stream has to begin that takes the place of one that is broken, if that is not where it was.
    fn begins_again(&mut self) -> Option<Bookmark> {
        None
    }

    /// Whether a stream that has just broken off is better opened again at the same node.
    fn stays(&self) -> bool {
        false
    }

    /// `item` is delivered, and with it everything before `rest`.
    fn delivered(&mut self, item: &Self::Item, rest: Bookmark);

    /// Everything before `rest` was delivered, and the caller asks for more.
    fn taken(&mut self, rest: Bookmark);

    /// How long a node may send nothing at all.
    fn silence(&self) -> Duration {
        Duration::MAX
    }

    /// Where it is counted how such streams end, and how often they go on elsewhere.
    fn counters(metrics: &Metrics) -> (&PerStream, &AtomicU64);

    /// That it cannot begin at `next`.
    fn cannot_begin(next: u64) -> String;
}

/// What one message brings.
#[derive(Debug)]
pub(crate) struct Brought<T> {
    /// The history that its positions belong to, if it says.
    pub(crate) history: HistoryEpoch,
    /// By position, in order.
    pub(crate) items: Vec<(u64, T)>,
    /// Everything before this has been told.
    pub(crate) next: u64,
    /// It begins anew at this position, of which nothing was received before.
    pub(crate) anew: Option<u64>,
    /// It goes on within the position that was being received, behind so many of its items.
    pub(crate) goes_on_behind: Option<usize>,
    /// What was received of a position last is void: it begins there instead.
    pub(crate) falls_back: Option<Bookmark>,
}

/// A position that one end moves and others look at.
#[derive(Debug)]
pub(crate) struct Waypoint {
    index: AtomicU64,
    history: AtomicU64,
}

impl Waypoint {
    pub(crate) fn at(Bookmark { index, history }: Bookmark) -> Arc<Self> {
        Arc::new(Self { index: AtomicU64::new(index), history: AtomicU64::new(history.0) })
    }

    pub(crate) fn set(&self, Bookmark { index, history }: Bookmark) {
        self.history.store(history.0, Ordering::Relaxed);
        self.index.store(index, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> Bookmark {
        let history = HistoryEpoch(self.history.load(Ordering::Relaxed));
        Bookmark { index: self.index.load(Ordering::Relaxed), history }
    }
}

/// An attempt that failed, and where.
type Failed = (Arc<Link>, Failure);

/// What is known between two items.
pub(crate) struct Following<S: Followed> {
    router: Arc<Router>,
    preference: ReadPreference,
    source: S,
    /// Everything below has been received.
    next: u64,
    /// The history that `next` belongs to, as soon as it is known.
    history: HistoryEpoch,
    /// Items at `next` that have been received, when it comes in pieces.
    received: usize,
    /// The same of what the open stream has brought: after a break the position is told again from its beginning.
    brought: usize,
    /// Received, not yet delivered; at most one message.
    ready: VecDeque<(u64, S::Item)>,
    open: Option<(Arc<Link>, Streaming<S::Message>)>,
    /// The node that failed last.
    failed: Option<Arc<Link>>,
    /// Attempts in vain since it last got on.
    pauses: u32,
    /// When it last got on, or the stream was opened.
    got_on: Option<Instant>,
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
    /// they say, since it last got on.
    refusals: BTreeMap<Endpoint, ClientError>,
    /// When the first of them has refused.
    refused_at: Option<Instant>,
}

impl<S: Followed> Following<S> {
    /// Follows from `from` on. Connects when it is first read.
    pub(crate) fn new(
        router: &Arc<Router>,
        source: S,
        from: Bookmark,
        preference: Option<&ReadPreference>,
    ) -> Self {
        S::counters(&router.metrics).0.opened.fetch_add(1, Ordering::Relaxed);
        Self {
            router: router.clone(),
            preference: preference.cloned().unwrap_or_default(),
            source,
            next: from.index,
            history: from.history,
            received: 0,
            brought: 0,
            ready: VecDeque::new(),
            open: None,
            failed: None,
            pauses: 0,
            got_on: None,
            contact: ContactNote::new(),
            begun: None,
            heard: false,
            failures: BTreeMap::new(),
            refused: None,
            refusals: BTreeMap::new(),
            refused_at: None,
        }
    }

    /// Tells whether it hears from its cluster.
    pub(crate) fn contacts(&self) -> Contacts {
        self.contact.follow()
    }

    /// Reads until a node has sent its first message.
    pub(crate) async fn begin(&mut self) -> Result<(), ClientError> {
        while !self.heard {
            self.step().await?;
        }
        self.source.taken(self.rest());
        Ok(())
    }

    pub(crate) fn into_stream(self) -> Boxed<S::Item> {
        Box::pin(stream::try_unfold(self, |mut following| async move {
            let item = following.next().await?;
            Ok(Some((item, following)))
        }))
    }

    async fn next(&mut self) -> Result<S::Item, ClientError> {
        loop {
            self.source.taken(self.rest());
            if let Some((_, item)) = self.ready.pop_front() {
                self.source.delivered(&item, self.rest());
                return Ok(item);
            }
            self.step().await?;
        }
    }

    /// The first position of which not everything has been delivered.
    fn rest(&self) -> Bookmark {
        let index = self.ready.front().map_or(self.next, |(position, _)| *position);
        Bookmark { index, history: self.history }
    }

    /// Takes in a message, or a failure.
    async fn step(&mut self) -> Result<(), ClientError> {
        let outcome = match self.receive().await {
            Ok(message) => self.take_in(message).await,
            Err(failed) => Err(failed),
        };
        match outcome {
            Ok(()) => Ok(()),
            Err((link, failure)) => self.after(link, &failure).await,
        }
    }

    /// The next message, from a stream that is opened if need be.
    async fn receive(&mut self) -> Result<S::Message, Failed> {
        self.begun.get_or_insert_with(Instant::now);
        if self.open.is_none() {
            self.open = Some(self.connect().await?);
            self.brought = 0;
            self.got_on = Some(Instant::now());
        }
        let (waiting, silence) = (Instant::now(), self.source.silence());
        loop {
            let quiet = silence.saturating_sub(waiting.elapsed());
            let patience = self.router.config.health_interval.min(self.left()).min(quiet);
            let (link, messages) = self.open.as_mut().expect("invariant: opened above");
            let link = link.clone();
            match timeout(patience, self.source.message(messages)).await {
                Ok(Ok(Some(message))) => return Ok(message),
                Ok(Ok(None)) => return Err((link, lost(format!("the server closed the {}", S::NAME)))),
                Ok(Err(status)) => return Err((link, Failure::of_call(&status))),
                Err(_) if self.left().is_zero() => {
                    return Err((link, Failure::Attempt(AttemptError::Expired { sent: true })));
                }
                Err(_) if waiting.elapsed() >= silence => {
                    return Err((link, lost(format!("nothing was sent for {} ms", silence.as_millis()))));
                }
                // A node that has lost the cluster stays silent and knows nothing new.
                Err(_) if link.node.is_healthy() => self.note_heard(&link.node.endpoint),
                Err(_) if !self.router.has_healthy_other_than(&link.node.endpoint) => {
                    self.note_lost(|| match link.node.is_reached() {
                        true => format!("{} is cut off from its cluster, or not ready", link.node.endpoint),
                        false => format!("{}: {}", link.node.endpoint, link.node.last_failure()),
                    });
                }
                Err(_) => return Err((link, lost("the node is not healthy".to_owned()))),
            }
        }
    }

    /// How long one that has heard from nobody yet goes on looking for somebody.
    fn left(&self) -> Duration {
        match self.begun {
            Some(begun) if !self.heard => self.router.config.timeout.saturating_sub(begun.elapsed()),
            _ => Duration::MAX,
        }
    }

    async fn connect(&mut self) -> Result<(Arc<Link>, Streaming<S::Message>), Failed> {
        self.router.watch_health();
        if let Some(from) = self.source.begins_again() {
            debug_assert!(self.ready.is_empty(), "invariant: what was received is delivered first");
            (self.next, self.received) = (from.index, 0);
        }
        let link = self.pick();
        let patience = self.router.config.connect_timeout + self.router.config.attempt_timeout;
        let from = Bookmark { index: self.next, history: self.history };
        let opening = timeout(patience.min(self.left()), self.source.open(&link, from));
        match link.node.counted(in_time(opening)).await {
            Ok(messages) => Ok((link, messages)),
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
        if let Some(failed) = self.failed.as_ref().filter(|_| self.source.stays()) {
            return failed.clone();
        }
        let unasked = match self.refusals.is_empty() {
            true => None,
            false => self.router.find(|node| self.is_unasked(node)),
        };
        let failed = self.failed.as_ref().map(|link| &link.node.endpoint);
        unasked.unwrap_or_else(|| self.router.choose(&self.preference, failed, None))
    }

    /// Whether a node may have the history that others have not.
    fn is_unasked(&self, node: &Node) -> bool {
        let endpoint = &node.endpoint;
        let in_vain = self.refusals.contains_key(endpoint) || self.failures.contains_key(endpoint);
        !in_vain && (node.is_usable() || !node.was_missed())
    }

    async fn take_in(&mut self, message: S::Message) -> Result<(), Failed> {
        let link = self.open.as_ref().expect("invariant: messages come from an open stream").0.clone();
        let brought = match self.source.read(message) {
            Ok(brought) => brought,
            Err(why) => return Err((link, unreadable(why))),
        };
        self.failed = None;
        self.failures.clear();
        self.heard = true;
        let Brought { history, items, next, anew, goes_on_behind, falls_back } = brought;
        if history != HistoryEpoch::UNKNOWN {
            self.history = history;
        }
        if link.node.is_healthy() || (!self.contact.is_heard() && self.is_in_touch(&link).await) {
            self.note_heard(&link.node.endpoint);
        }
        let before = (self.next, self.received);
        if let Some(items) = goes_on_behind {
            self.brought = items;
        }
        if let Some(Bookmark { index, .. }) = falls_back {
            (self.next, self.received, self.brought) = (index, 0, 0);
        }
        if let Some(at) = anew {
            (self.next, self.received, self.brought) = (at.max(self.next), 0, 0);
        }
        for (position, item) in items {
            // After a break a node may begin a little earlier than it was asked to.
            if position < self.next {
                continue;
            }
            self.reach(position);
            self.brought += 1;
            // Nor is a position that comes in pieces delivered twice when a break cuts it.
            if self.brought > self.received {
                self.received = self.brought;
                self.ready.push_back((position, item));
            }
        }
        self.reach(next);
        if (self.next, self.received) != before {
            self.pauses = 0;
            self.got_on = Some(Instant::now());
            return Ok(());
        }
        // One that has lost the cluster may go on saying that it lives.
        let interval = self.router.config.health_interval;
        let is_stuck = self.got_on.is_some_and(|at| at.elapsed() >= interval) && !link.node.is_healthy();
        match is_stuck && self.router.has_healthy_other_than(&link.node.endpoint) {
            true => Err((link, lost("the node is not healthy".to_owned()))),
            false => Ok(()),
        }
    }

    /// Everything below `position` has been received.
    fn reach(&mut self, position: u64) {
        if position > self.next {
            (self.next, self.received, self.brought) = (position, 0, 0);
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
            tracing::debug!(%endpoint, from = self.next, "the {} hears from its cluster", S::NAME);
        }
    }

    fn note_lost(&self, why: impl Fn() -> String) {
        if self.contact.lost(&why) {
            let why = why();
            tracing::warn!(why, from = self.next, "the {} has lost its cluster; trying again", S::NAME);
        }
    }

    /// Waits before the next attempt, unless another node can be asked at once; or gives up.
    async fn after(&mut self, link: Arc<Link>, failure: &Failure) -> Result<(), ClientError> {
        let was_open = self.open.take().is_some();
        let endpoint = link.node.endpoint.clone();
        tracing::debug!(%endpoint, failure = in_words(failure), from = self.next, "{} broke off", S::NAME);
        let case = Case { kind: Kind::Anywhere, in_session: false, undecided: false };
        match judge(case, &endpoint, failure) {
            // The token has come to its end, and there may be a newer one.
            Verdict::Return(ClientError::Rejected { reason: Reason::Unauthenticated, .. }) if was_open => {
                drop(self.failures.insert(endpoint.clone(), in_words(failure)));
            }
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
            S::counters(&self.router.metrics).1.fetch_add(1, Ordering::Relaxed);
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

    /// With the position that was asked for: a node names the one before it.
    fn told_from_where(&self, error: ClientError) -> ClientError {
        match error {
            ClientError::Failed { endpoint, reason: reason @ Reason::Ahead, message, maybe_applied } => {
                let message = format!("{}: {message}", S::cannot_begin(self.next));
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

    /// What all nodes that answer have refused.
    fn history_is_gone(&self) -> ClientError {
        earliest(self.refusals.values()).expect("invariant: only asked once a node has refused").clone()
    }

    /// What it ends with when it has heard from nobody in time.
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
        S::counters(&self.router.metrics).0.failed.fetch_add(1, Ordering::Relaxed);
        error
    }
}

/// Of what nodes have refused for their history: that of the earliest beginning.
pub(crate) fn earliest<'a>(refusals: impl Iterator<Item = &'a ClientError>) -> Option<&'a ClientError> {
    refusals.min_by_key(|error| match error {
        ClientError::Compacted { first_revision } => *first_revision,
        _ => u64::MAX,
    })
}

/// Whether a node has refused for what its history is, so that another may have what it lacks.
pub(crate) fn is_about_history(error: &ClientError) -> bool {
    [Reason::Compacted, Reason::OtherHistory, Reason::Ahead].contains(&error.reason())
}

fn lost(why: String) -> Failure {
    Failure::Attempt(AttemptError::Lost(why.into()))
}

/// What a node has sent is nothing that a node may send: another one may do better.
fn unreadable(why: String) -> Failure {
    let message = format!("what the node sends cannot be used: {why}");
    let (code, reason) = (Code::Internal.into(), Reason::Interrupted.into());
    Failure::Answered(v1::Failure { code, reason, message, ..v1::Failure::default() })
}
