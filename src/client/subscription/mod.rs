//! What was applied, for a follower: a stream of entries that goes on by itself, and single questions.
//!
//! `options` say what is wanted, `entries` is what comes and how it is read, `acks` tells the node how far the follower is, and
//! `looks` asks once. How a stream goes on at another node is told in [`following`](super::following).

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_stream::wrappers::WatchStream;
use tonic::{Status, Streaming};

use super::contact::Contacts;
use super::error::ClientError;
use super::following::{Boxed, Brought, Followed, Following, Waypoint};
use super::frame::MAX_RESPONSE_MESSAGE_BYTES;
use super::link::Link;
use super::metrics::{Metrics, PerStream};
use super::token::NodeChannel;
use super::{CLOSE_PATIENCE, Client};
use crate::proto::replication::replication_service_client::ReplicationServiceClient;
use crate::proto::replication::{Heartbeat, SnapshotMark, StatePart, SubscribeRequest, WalEntryProto};
use crate::types::{Bookmark, HistoryEpoch};
use acks::Acks;

pub use entries::{FollowedChange, FollowedEntry, FollowedOperation, SnapshotPart};
pub use looks::{EntriesPage, ReplicationStatus};
pub use options::{EntryCompression, EntryFilter, FollowFrom, SubscribeOptions};
pub(crate) use state_file::{HeldFile, StateFilePiece, StateFileStream};

mod acks;
mod entries;
mod looks;
mod options;
mod state_file;

/// Heartbeats that may fail to come before the node is left.
const HEARTBEATS_MISSED: u32 = 3;
/// For how long after something of a state has come its node is asked for the rest, if the stream breaks off: only that node has it.
const STAY: Duration = Duration::from_secs(15);
/// When nothing comes for so long, what was taken is acknowledged although it is little: the node may wait for it.
const SETTLE: Duration = Duration::from_millis(20);

/// What was applied after a position: in order, nothing left out, nothing twice.
///
/// When the connection breaks, or the node is silent or not healthy any more, the subscription goes on at another node where it
/// was. At its beginning it ends with [`ClientError::Unavailable`] or [`ClientError::DeadlineExceeded`] when no node answers within
/// the client's [`timeout`](super::ClientConfig::timeout). Once it has heard from one it waits for the cluster as long as it takes,
/// and [`contacts`](Self::contacts) tell whether it does; so the stream ends only with [`ClientError::Compacted`] when no node has
/// what comes next, with [`Reason::OtherHistory`](super::Reason::OtherHistory) or [`Reason::Ahead`](super::Reason::Ahead) when where
/// it stood is no place in this cluster, or with an error that says that the request itself is at fault. After an error it is over.
///
/// The nodes are told by itself what was taken: an entry is when the one after its position is asked for. A follower that asks for
/// nothing for long loses its place at the node, and has it again when it goes on.
#[must_use = "streams do nothing unless they are read"]
pub struct Subscription {
    entries: Boxed<FollowedEntry>,
    standing: Arc<Waypoint>,
    acks: Arc<Acks>,
    contacts: Contacts,
    progress: watch::Receiver<FollowedProgress>,
}

/// How far a node is that is followed, as it has said last.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct FollowedProgress {
    /// The node, as `host:port`.
    pub source: String,
    /// The history that positions belong to.
    pub history: HistoryEpoch,
    /// Everything up to here that is wanted was delivered.
    pub upto: u64,
    /// What the node had applied.
    pub applied_seq: u64,
    /// What the cluster had committed, as far as the node knew.
    pub committed_seq: u64,
    /// The cluster's clock at `upto`, in milliseconds since the Unix epoch.
    pub upto_time_ms: u64,
    /// The same at `applied_seq`.
    pub applied_time_ms: u64,
    /// Elapsed time at `applied_seq`, in milliseconds.
    pub applied_elapsed_ms: u64,
}

impl Subscription {
    /// How far the node is that is followed, as it says when it sends nothing else. It changes only while the subscription is read.
    pub fn progress(&self) -> watch::Receiver<FollowedProgress> {
        self.progress.clone()
    }

    /// Asks the node to say how far it is, in [`progress`](Self::progress), as soon as it has sent everything that it has applied by then, or
    /// finds the window full. While the subscription is read, and has no stream, it is said when it has one again.
    pub fn ask_progress(&self) {
        self.acks.want_progress();
    }

    /// The position after which another subscription has to begin to miss nothing: everything up to there was delivered, and
    /// more has been asked for since. In the middle of a position, that other subscription repeats what was delivered of it.
    pub fn position(&self) -> Bookmark {
        self.standing.get()
    }

    /// Tells whether the subscription hears from its cluster, from now on. It changes only while the subscription is read.
    pub fn contacts(&self) -> Contacts {
        self.contacts.clone()
    }

    /// Ends it. What was delivered counts as taken: the node is told so (best effort, 20 ms at most), and the position after which
    /// another subscription has to begin is returned.
    pub async fn close(self) -> Bookmark {
        let index = self.acks.finish();
        sleep(CLOSE_PATIENCE).await;
        Bookmark { index, ..self.position() }
    }
}

impl Stream for Subscription {
    type Item = Result<FollowedEntry, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.entries.as_mut().poll_next(cx)
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").field("position", &self.position()).finish_non_exhaustive()
    }
}

impl Client {
    /// Subscribes to what is applied. With [`FollowFrom::Now`] every write that is begun after this call has returned shows;
    /// otherwise the subscription connects when it is first read.
    ///
    /// # Errors
    /// See [`ClientError`]: an option is out of its range, or no node says where the present begins. The stream has its own: see
    /// [`Subscription`].
    pub async fn subscribe(&self, options: SubscribeOptions) -> Result<Subscription, ClientError> {
        let opening = options.opening()?;
        let (after, from_now) = match options.from {
            FollowFrom::Beginning => (Bookmark::default(), false),
            FollowFrom::After(after) => (after, false),
            FollowFrom::Now => (Bookmark::default(), true),
        };
        let (standing, acks) = (Waypoint::at(after), Arc::new(Acks::new(after.index, options.window_bytes)));
        let (progress, told) = watch::channel(FollowedProgress::default());
        let source = Subscribing {
            opening,
            progress,
            state: None,
            resumes: false,
            from_now,
            silence: options.heartbeat * HEARTBEATS_MISSED,
            standing: standing.clone(),
            acks: acks.clone(),
            history: after.history,
            from: 0,
            upto: 0,
            settle_at: None,
        };
        let next = if from_now { 0 } else { after.index.saturating_add(1) };
        let from = Bookmark { index: next, ..after };
        let preference = options.preference.as_ref().or(self.preference.as_ref());
        let mut following = Following::new(&self.router, source, from, preference);
        let contacts = following.contacts();
        if from_now {
            // At another node, or a moment later, it would be another position.
            following.begin().await?;
        }
        Ok(Subscription { entries: following.into_stream(), standing, acks, contacts, progress: told })
    }
}

fn replication(link: &Link) -> ReplicationServiceClient<NodeChannel> {
    let client = ReplicationServiceClient::new(link.node.side_channel());
    client.max_decoding_message_size(MAX_RESPONSE_MESSAGE_BYTES)
}

/// What a subscription asks for, and where it stands.
struct Subscribing {
    opening: SubscribeRequest,
    /// How far the node is.
    progress: watch::Sender<FollowedProgress>,
    /// Where the whole state that is being told is of, and where to begin again should it break off.
    state: Option<ToldPart>,
    /// Whether the open stream was asked to go on within that state, and has not said yet whether it does.
    resumes: bool,
    /// Whether no node has said yet where the present begins.
    from_now: bool,
    silence: Duration,
    standing: Arc<Waypoint>,
    acks: Arc<Acks>,
    /// The history that positions belong to, as soon as it is known.
    history: HistoryEpoch,
    /// The position that the open stream was to begin after.
    from: u64,
    /// The open stream has brought everything up to here, as it says.
    upto: u64,
    /// When what was taken is acknowledged, if nothing comes before.
    settle_at: Option<Instant>,
}

/// A whole state of which a part was told.
#[derive(Debug, Clone, Copy)]
struct ToldPart {
    /// Its position.
    at: u64,
    /// What the follower had before.
    before: Bookmark,
    /// Whether all of it was told, and its end is not taken yet.
    is_over: bool,
    /// Entries of it that have come, its beginning included.
    entries: usize,
    /// The part of it that can be gone on behind, and how many entries that is.
    part: Option<(StatePart, usize)>,
    /// When something of it has come last.
    at_time: Instant,
}

impl ToldPart {
    /// Where it can be gone on with, if it has broken off.
    fn rest(&self) -> Option<(StatePart, usize)> {
        self.part.filter(|_| !self.is_over)
    }
}

/// What is said of a state that goes on.
enum StateGoesOn {
    /// What has come is a part.
    SoFar,
    /// It goes on behind so many entries.
    Behind(usize),
    /// It does not, and where the follower was before.
    Void(Bookmark),
}

impl Subscribing {
    /// Positions only ever grow, and a state is of one.
    ///
    /// # Errors
    /// That this one does not, in words.
    fn advance(&mut self, entry: &FollowedEntry) -> Result<(), String> {
        let before = self.from.max(self.upto);
        let part = self.state.filter(|part| !part.is_over);
        match (entry.snapshot, part) {
            (SnapshotPart::Item, Some(part)) if entry.seq == part.at => {
                let (entries, at_time) = (part.entries + 1, Instant::now());
                self.state = Some(ToldPart { entries, at_time, ..part });
                return Ok(());
            }
            (SnapshotPart::End, Some(part)) if entry.seq == part.at => {
                self.state = Some(ToldPart { is_over: true, ..part });
                self.upto = entry.seq;
                return Ok(());
            }
            (SnapshotPart::Begin, None) if entry.seq >= before => {
                let before = Bookmark { index: self.from, history: self.history };
                let (at, at_time) = (entry.seq, Instant::now());
                self.state = Some(ToldPart { at, before, is_over: false, entries: 1, part: None, at_time });
                return Ok(());
            }
            (SnapshotPart::None, None) => {}
            _ => {
                return Err(format!(
                    "a part of a state at position {} that is in the wrong place",
                    entry.seq
                ));
            }
        }
        if entry.seq <= before {
            return Err(format!("it goes back: position {} after everything up to {before}", entry.seq));
        }
        self.upto = if entry.more { entry.seq - 1 } else { entry.seq };
        Ok(())
    }

    /// What a message says of the part of a state that has come; `None` for one that is about something else.
    ///
    /// # Errors
    /// That it cannot be said there, in words.
    fn told_part(&mut self, message: &WalEntryProto) -> Result<Option<StateGoesOn>, String> {
        let mark = SnapshotMark::try_from(message.snapshot).unwrap_or_default();
        let state = self.state.filter(|state| !state.is_over);
        if std::mem::take(&mut self.resumes) {
            let state = state.expect("invariant: what it asks for is a rest");
            let rest = state.rest().filter(|(part, _)| message.state_part == Some(*part));
            if let Some((_, entries)) =
                rest.filter(|_| mark == SnapshotMark::SnapshotBegin && message.seq == state.at)
            {
                self.state = Some(ToldPart { entries, ..state });
                return Ok(Some(StateGoesOn::Behind(entries)));
            }
            // The node does not have it any more. What was told of it is void.
            self.state = None;
            return Ok(Some(StateGoesOn::Void(state.before)));
        }
        if mark != SnapshotMark::SnapshotSoFar {
            return Ok(None);
        }
        match (state, message.state_part) {
            (Some(state), Some(part)) if state.at == message.seq => {
                self.state = Some(ToldPart { part: Some((part, state.entries)), ..state });
                Ok(Some(StateGoesOn::SoFar))
            }
            _ => Err(format!("a part of a state at position {} that is in the wrong place", message.seq)),
        }
    }

    /// The same of a heartbeat. One that begins may be about less than was asked for.
    fn upto(&mut self, heartbeat: Heartbeat) -> Result<(), String> {
        let Heartbeat { upto_seq, .. } = heartbeat;
        if self.state.is_some_and(|part| !part.is_over) {
            // It is about what was before the state.
            return Ok(());
        }
        if upto_seq < self.upto {
            return Err(format!("it goes back: a heartbeat up to {upto_seq} after {}", self.upto));
        }
        self.upto = upto_seq;
        self.acks.ask();
        self.progress.send_modify(|progress| {
            progress.upto = upto_seq;
            progress.applied_seq = heartbeat.applied_seq;
            progress.committed_seq = heartbeat.committed_seq;
            progress.upto_time_ms = heartbeat.upto_time_ms;
            progress.applied_time_ms = heartbeat.applied_time_ms;
            progress.applied_elapsed_ms = heartbeat.applied_elapsed_ms;
        });
        self.acks.progress_came();
        Ok(())
    }
}

impl Followed for Subscribing {
    type Message = WalEntryProto;
    type Item = FollowedEntry;
    const NAME: &'static str = "subscription";

    async fn open(&mut self, link: &Link, from: Bookmark) -> Result<Streaming<WalEntryProto>, Status> {
        let rest = self.state.and_then(|state| Some((state.before, state.rest()?.0)));
        self.resumes = rest.is_some();
        let from_seq = rest.map_or(from.index.saturating_sub(1), |(before, _)| before.index);
        (self.from, self.upto) = (from_seq, 0);
        let source = link.node.endpoint.to_string();
        self.progress.send_if_modified(|progress| {
            progress.source = source;
            // Whether it answers is another matter.
            false
        });
        let first = SubscribeRequest {
            from_seq,
            history: from.history.0,
            from_now: self.from_now,
            state: rest.map(|(_, part)| part),
            ..self.opening.clone()
        };
        let (number, acks) = self.acks.begin(from_seq);
        let (acks, told) = (WatchStream::from_changes(acks), Arc::downgrade(&self.acks));
        // What is said ends with the subscription: so it must not keep that alive.
        let acks =
            acks.inspect(move |message| told.upgrade().iter().for_each(|acks| acks.sent(number, message)));
        let messages = stream::iter([first]).chain(acks);
        replication(link).subscribe(messages).await.map(tonic::Response::into_inner)
    }

    async fn message(
        &mut self,
        stream: &mut Streaming<WalEntryProto>,
    ) -> Result<Option<WalEntryProto>, Status> {
        if self.acks.owes() {
            let due = *self.settle_at.get_or_insert_with(|| Instant::now() + SETTLE);
            if let Ok(outcome) = timeout_at(due, stream.message()).await {
                self.settle_at = None;
                return outcome;
            }
            self.acks.settle();
        }
        self.settle_at = None;
        stream.message().await
    }

    fn read(&mut self, mut message: WalEntryProto) -> Result<Brought<FollowedEntry>, String> {
        let mut history = HistoryEpoch(message.history);
        let (mut items, mut anew, mut goes_on_behind, mut falls_back) = (Vec::new(), None, None, None);
        let is_told = match self.told_part(&message)? {
            Some(StateGoesOn::SoFar) => true,
            Some(StateGoesOn::Behind(entries)) => {
                goes_on_behind = Some(entries);
                true
            }
            Some(StateGoesOn::Void(before)) => {
                falls_back = Some(Bookmark { index: before.index.saturating_add(1), ..before });
                false
            }
            None => false,
        };
        if is_told {
            // Nothing of it is for the follower.
        } else if let Some(heartbeat) = message.heartbeat.take() {
            self.upto(heartbeat)?;
        } else {
            let messages = match message.batch.take() {
                Some(batch) => entries::unpack(batch)?,
                None => vec![message],
            };
            items.reserve(messages.len());
            for message in messages {
                if message.history != 0 {
                    history = HistoryEpoch(message.history);
                }
                let mut entry = FollowedEntry::decode(message)?;
                if self.opening.previous {
                    entry.note_untold_previous();
                }
                self.advance(&entry)?;
                if entry.snapshot == SnapshotPart::Begin {
                    anew = Some(entry.seq);
                }
                items.push((entry.seq, entry));
            }
        }
        if history.differs_from(self.history) {
            return Err(format!("positions of another history, {history}, than before, {}", self.history));
        }
        if history != HistoryEpoch::UNKNOWN {
            self.history = history;
            self.standing.set(Bookmark { history, ..self.standing.get() });
            self.progress.send_if_modified(|progress| {
                progress.history = history;
                false
            });
        }
        self.from_now = false;
        let next = self.upto.saturating_add(1);
        Ok(Brought { history, items, next, anew, goes_on_behind, falls_back })
    }

    fn begins_again(&mut self) -> Option<Bookmark> {
        if self.state.is_some_and(|state| state.rest().is_some()) {
            // What has come may be gone on with.
            return None;
        }
        // What a follower has of a state that broke off is nothing.
        let part = self.state.take().filter(|part| !part.is_over)?;
        Some(Bookmark { index: part.before.index.saturating_add(1), ..part.before })
    }

    fn delivered(&mut self, entry: &FollowedEntry, rest: Bookmark) {
        if matches!(entry.snapshot, SnapshotPart::Begin | SnapshotPart::Item) {
            return;
        }
        self.acks.delivered(rest.index.saturating_sub(1), entry.size_bytes());
    }

    fn taken(&mut self, rest: Bookmark) {
        match self.state {
            // Of a state nothing is taken before its end is.
            Some(part) if !part.is_over || rest.index <= part.at => return,
            Some(_) => self.state = None,
            None => {}
        }
        let index = rest.index.saturating_sub(1);
        self.standing.set(Bookmark { index, ..rest });
        self.acks.taken(index);
    }

    fn stays(&self) -> bool {
        self.state.is_some_and(|state| state.rest().is_some() && state.at_time.elapsed() < STAY)
    }

    fn silence(&self) -> Duration {
        self.silence
    }

    fn counters(metrics: &Metrics) -> (&PerStream, &AtomicU64) {
        (&metrics.subscriptions, &metrics.subscription_reconnects)
    }

    fn cannot_begin(next: u64) -> String {
        format!("a subscription cannot begin after position {}", next.saturating_sub(1))
    }
}
