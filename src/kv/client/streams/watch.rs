//! What happens to keys, from a revision on.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use crate::client::token::NodeChannel;
use futures::Stream;
use tokio::sync::watch::{Receiver, Sender, channel};
use tokio::time::{Instant, timeout_at};
use tonic::{Status, Streaming};

use super::super::super::api::{EventKind, Range, Scope, WatchEvent, WatchOptions};
use super::super::super::codec;
use super::super::Request;
use super::kv;
use crate::client::following::{Boxed, Brought, Followed, Following, Waypoint};
use crate::client::judge::{Failure, failed, in_time, in_words};
use crate::client::link::Link;
use crate::client::metrics::{Metrics, PerStream};
use crate::client::node::Node;
use crate::client::router::Router;
use crate::client::{ClientError, Contacts, ReadPreference, Reason};
use crate::proto::v1;
use crate::proto::v1::kv_client::KvClient;
use crate::runtime;
use crate::types::{Bookmark, HistoryEpoch};

/// What happens to a range of keys from a revision on: in order, nothing left out, nothing twice.
///
/// When the connection breaks, or the node is not healthy any more, the watch goes on at another node where it was.
/// At its beginning it ends with [`ClientError::Unavailable`] or [`ClientError::DeadlineExceeded`] when no node answers
/// within the client's [`timeout`](super::super::ClientConfig::timeout). Once it has heard from one it waits for the cluster as long
/// as it takes, and [`contacts`](Self::contacts) tell whether it does; so the stream ends only with
/// [`ClientError::Compacted`] when no node's history reaches back to where the watch stood, with
/// [`Reason::OtherHistory`](super::super::Reason::OtherHistory) or [`Reason::Ahead`](super::super::Reason::Ahead) when where it stood
/// is no place in this cluster, or with an error that says that the request itself is at fault. After an error it is over.
#[must_use = "streams do nothing unless they are read"]
pub struct Watch {
    events: Boxed<WatchEvent>,
    standing: Arc<Waypoint>,
    contacts: Contacts,
    open: Arc<Mutex<Option<OpenWatch>>>,
    progress: Receiver<Bookmark>,
    patience: Duration,
}

/// The stream of a watch, at the node that it is open at.
#[derive(Clone)]
struct OpenWatch {
    node: Arc<Node>,
    calls: KvClient<NodeChannel>,
    id: u64,
}

impl Watch {
    /// Tells before which revision everything was delivered, whenever that changes: also where nothing happens in the ranges of the watch. It
    /// changes only while the watch is read.
    pub fn progress(&self) -> Receiver<Bookmark> {
        self.progress.clone()
    }

    /// Asks the node that the watch is open at to say how far it is, as soon as everything was told that had been acknowledged before this call. Returns
    /// the revision that [`progress`](Self::progress) is about to reach. It is not that far before the watch was read.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::Unavailable`] where the watch is open at no node at present, and
    /// [`Reason::NotFound`](super::super::Reason::NotFound) where it has just been lost: it looks for another node, if it is read.
    pub fn ask_progress(&self) -> impl Future<Output = Result<u64, ClientError>> + Send + 'static + use<> {
        let (open, expires) = (self.lock_open().clone(), Instant::now() + self.patience);
        async move {
            let Some(OpenWatch { node, mut calls, id }) = open else {
                return Err(ClientError::Unavailable { tried: Vec::new() });
            };
            let asking = calls.watch_progress(v1::WatchProgressRequest { watch_id: id });
            match node.counted(in_time(timeout_at(expires, asking))).await {
                Ok(answer) => Ok(answer.into_inner().next_revision),
                Err(failure @ Failure::Attempt(_)) => {
                    Err(ClientError::Unavailable { tried: vec![(node.endpoint.clone(), in_words(&failure))] })
                }
                Err(failure) => {
                    let reason = failure.reason().unwrap_or(Reason::Interrupted);
                    Err(failed(&node.endpoint, reason, in_words(&failure), false))
                }
            }
        }
    }

    fn lock_open(&self) -> MutexGuard<'_, Option<OpenWatch>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells whether the watch hears from its cluster, from now on. It changes only while the watch is read.
    pub fn contacts(&self) -> Contacts {
        self.contacts.clone()
    }

    /// Where another watch has to begin to miss nothing that this one has not delivered yet: pass it as
    /// `from`. In the middle of a transaction's changes, that other watch repeats those already delivered.
    pub fn resume_from(&self) -> Bookmark {
        self.standing.get()
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

/// What a watch asks for, and where it stands.
struct Watching {
    request: v1::WatchRequest,
    standing: Arc<Waypoint>,
    /// Where it can be asked how far it is.
    open: Arc<Mutex<Option<OpenWatch>>>,
    progress: Sender<Bookmark>,
}

impl Watching {
    /// Everything before `rest` was delivered.
    fn stand_at(&self, rest: Bookmark) {
        self.standing.set(rest);
        self.progress.send_if_modified(|before| std::mem::replace(before, rest) != rest);
    }
}

/// Watches from `from` on. Connects when the stream is first read.
pub(in super::super) fn watch(
    router: &Arc<Router>,
    scope: &Scope,
    options: WatchOptions,
    from: Bookmark,
    preference: Option<&ReadPreference>,
) -> Watch {
    let standing = Waypoint::at(from);
    let WatchOptions { mut ranges, kinds, previous, .. } = options;
    let only = if ranges.len() <= 1 { ranges.pop().unwrap_or_default() } else { Range::all() };
    let ranges = ranges.into_iter().map(|Range { start, end, .. }| v1::WatchRange { start, end });
    let request = v1::WatchRequest {
        tenant: scope.tenant.clone(),
        collection: scope.collection.clone(),
        start: only.start,
        end: only.end,
        ranges: ranges.collect(),
        kinds: kinds.into_iter().map(|kind| kind_of(kind).into()).collect(),
        from_revision: from.index,
        history: from.history.0,
        previous,
        watch_id: 0,
    };
    let (open, (progress, told)) = (Arc::default(), channel(from));
    let watching = Watching { request, standing: standing.clone(), open: Arc::clone(&open), progress };
    let following = Following::new(router, watching, from, preference);
    let contacts = following.contacts();
    let patience = router.config.timeout;
    Watch { events: following.into_stream(), standing, contacts, open, progress: told, patience }
}

impl Followed for Watching {
    type Message = v1::WatchResponse;
    type Item = WatchEvent;
    const NAME: &'static str = "watch";

    async fn open(&mut self, link: &Link, from: Bookmark) -> Result<Streaming<v1::WatchResponse>, Status> {
        self.request.from_revision = from.index;
        self.request.history = from.history.0;
        // Another one for each stream: a node may still have the one before.
        self.request.watch_id = runtime::random_u64().max(1);
        let mut calls = kv(link);
        let lock = || self.open.lock().unwrap_or_else(PoisonError::into_inner);
        *lock() = None;
        let stream = calls.watch(self.request.clone()).await?.into_inner();
        *lock() = Some(OpenWatch { node: link.node.clone(), calls, id: self.request.watch_id });
        Ok(stream)
    }

    fn read(&mut self, message: v1::WatchResponse) -> Result<Brought<WatchEvent>, String> {
        let v1::WatchResponse { header, events, next_revision, more, .. } = message;
        let history = header.as_ref().map_or(HistoryEpoch::UNKNOWN, history);
        let after = events.iter().map(|event| event.revision.saturating_add(1)).max().unwrap_or(0);
        // Of a revision that comes in pieces there is more to come.
        let next = if more { 0 } else { next_revision.max(after) };
        let decode = |event| codec::decode_event(event, self.request.previous);
        let items = events.into_iter().map(|event| (event.revision, decode(event))).collect();
        Ok(Brought { history, items, next, anew: None, goes_on_behind: None, falls_back: None })
    }

    fn delivered(&mut self, _: &WatchEvent, rest: Bookmark) {
        self.stand_at(rest);
    }

    fn taken(&mut self, rest: Bookmark) {
        self.stand_at(rest);
    }

    fn counters(metrics: &Metrics) -> (&PerStream, &AtomicU64) {
        (&metrics.watches, &metrics.watch_reconnects)
    }

    fn cannot_begin(next: u64) -> String {
        format!("a watch cannot begin at revision {next}")
    }
}

fn kind_of(kind: EventKind) -> v1::event::Kind {
    match kind {
        EventKind::Put => v1::event::Kind::Put,
        EventKind::Delete => v1::event::Kind::Delete,
        EventKind::Expire => v1::event::Kind::Expire,
    }
}

fn history(header: &v1::Header) -> HistoryEpoch {
    HistoryEpoch(header.position.map_or(0, |position| position.history))
}

/// What to read to learn at which revision the present begins: a linearizable read of next to nothing.
pub(in super::super) fn present(scope: &Scope, ranges: &[Range]) -> Request {
    let range = ranges.first().cloned().unwrap_or_default();
    Request::Range { scope: scope.clone(), range: range.with_limit(1) }
}
