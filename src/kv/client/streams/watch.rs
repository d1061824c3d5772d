//! What happens to keys, from a revision on.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::task::{Context, Poll};

use futures::Stream;
use tonic::{Status, Streaming};

use super::super::super::api::{EventKind, Range, Scope, WatchEvent, WatchOptions};
use super::super::super::codec;
use super::super::Request;
use super::kv;
use crate::client::following::{Boxed, Brought, Followed, Following, Waypoint};
use crate::client::link::Link;
use crate::client::metrics::{Metrics, PerStream};
use crate::client::router::Router;
use crate::client::{ClientError, Contacts, ReadPreference};
use crate::proto::v1;
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
}

impl Watch {
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
    let WatchOptions { mut ranges, kinds, .. } = options;
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
    };
    let watching = Watching { request, standing: standing.clone() };
    let following = Following::new(router, watching, from, preference);
    let contacts = following.contacts();
    Watch { events: following.into_stream(), standing, contacts }
}

impl Followed for Watching {
    type Message = v1::WatchResponse;
    type Item = WatchEvent;
    const NAME: &'static str = "watch";

    async fn open(&mut self, link: &Link, from: Bookmark) -> Result<Streaming<v1::WatchResponse>, Status> {
        self.request.from_revision = from.index;
        self.request.history = from.history.0;
        kv(link).watch(self.request.clone()).await.map(tonic::Response::into_inner)
    }

    fn read(&mut self, message: v1::WatchResponse) -> Result<Brought<WatchEvent>, String> {
        let v1::WatchResponse { header, events, next_revision, more, .. } = message;
        let history = header.as_ref().map_or(HistoryEpoch::UNKNOWN, history);
        let after = events.iter().map(|event| event.revision.saturating_add(1)).max().unwrap_or(0);
        // Of a revision that comes in pieces there is more to come.
        let next = if more { 0 } else { next_revision.max(after) };
        let items = events.into_iter().map(|event| (event.revision, codec::decode_event(event))).collect();
        Ok(Brought { history, items, next, anew: None })
    }

    fn delivered(&mut self, _: &WatchEvent, rest: Bookmark) {
        self.standing.set(rest);
    }

    fn taken(&mut self, rest: Bookmark) {
        self.standing.set(rest);
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
