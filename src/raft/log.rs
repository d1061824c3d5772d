//! openraft's log storage on a [`LogStore`].
//!
//! openraft trusts its log: an entry whose append was completed counts for a quorum, and a stream of entries that ends early counts as
//! all there is. So this adapter stands between openraft and the store, and changes nothing. It only notes some things on
//! the way:
//!
//! ```text
//! append ---> clocks, ages of entries ---> store ---> fsync ---> held ---> completion ---> flushed-writes: callers at level leader
//!   returns at once; entries can be read     queue     log-writer's thread
//! ```
//!
//! # Invariants
//!
//! - The completion is called by the store, after the fsync. Nothing here calls it.
//! - Vote, truncation and purge are awaited until they are durable, as openraft expects. They go through the same queue as appends.
//! - A read of entries for apply either gives the next entry or fails: a hole is an error, never an end.
//! - Replication reads at most `message_bytes` of entries, or one entry that is larger.
//!
//! # What it does not do
//!
//! It does not make the committed position durable at once: [`save_committed`](RaftLogStorage::save_committed) rides along
//! with the next flush. It does not tell callers on `log-writer`'s thread, because that thread has the next batch to write.
//! It does not know Raft's rules: those are openraft's, and the store's are in [`crate::storage`].

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use futures::{Stream, StreamExt, stream};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{OptionalSend, entry::RaftEntry as _};
use tokio::sync::{mpsc, oneshot};

use super::activity::Activity;
use super::clock::Batch;
use super::durable_positions::DurablePositions;
use super::type_config::{self, Entry, LogId, OnFlushed, Payload, SealedCommand, TypeConfig, Vote};
use crate::storage::LogStore;
use crate::types::{self, Incarnation, NodeId};

/// The target of log lines that follow single writes by their `log_id`, at level trace: `proposed` on the leader and
/// `appended` on followers, `applied` on all. `flushed` and `committed` come once per batch, and say up to where.
pub(super) const WRITES: &str = "quorate::write";

/// The adapter. Cheap to clone; every clone reads and writes the same store.
#[derive(Clone)]
pub(crate) struct RaftLog {
    store: Arc<dyn LogStore>,
    /// Most bytes of entries in one message to a peer.
    message_bytes: usize,
    /// This node and its data directory.
    own: (NodeId, Incarnation),
    /// Where to note what is on disk.
    durable_positions: Arc<DurablePositions>,
    activity: Arc<Activity>,
    /// To the task that tells those who wait for their commands to be on disk.
    flushed_commands: mpsc::UnboundedSender<FlushedCommands>,
}

/// Commands that are on disk, with who waits for that.
type FlushedCommands = Vec<(types::LogId, OnFlushed)>;

/// Tells callers until the last clone of the log is gone.
async fn tell(mut flushed: mpsc::UnboundedReceiver<FlushedCommands>) {
    while let Some(commands) = flushed.recv().await {
        for (log_id, on_flushed) in commands {
            on_flushed.flushed(log_id);
        }
    }
}

impl Debug for RaftLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RaftLog").field("message_bytes", &self.message_bytes).finish_non_exhaustive()
    }
}

impl RaftLog {
    /// An adapter whose replication reads return at most `message_bytes` of entries, or one entry; and the task that tells
    /// those who wait for their commands to be on disk.
    pub(crate) fn new(
        store: Arc<dyn LogStore>,
        message_bytes: usize,
        own: (NodeId, Incarnation),
        durable_positions: Arc<DurablePositions>,
        activity: Arc<Activity>,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        // What was there before is at least as old as this.
        if let Some(last) = store.bounds().last {
            activity.appended(last.index);
        }
        // Bounded by the bytes in flight that admission allows.
        let (flushed_commands, flushed) = mpsc::unbounded_channel();
        (Self { store, message_bytes, own, durable_positions, activity, flushed_commands }, tell(flushed))
    }

    /// Submits a write and waits until it is durable.
    async fn durably(&self, submit: impl FnOnce(crate::storage::Completion)) -> io::Result<()> {
        let (done, outcome) = oneshot::channel();
        self.activity.writes.submit();
        submit(Box::new(move |result| {
            // The receiver is gone only when the core is.
            let _ = done.send(result);
        }));
        outcome.await.unwrap_or_else(|_| Err(io::Error::other("the log store went away")))
    }

    /// Tells of every command in `entries`, for those who follow single writes.
    fn trace(&self, entries: &[types::Entry]) {
        if !tracing::enabled!(target: WRITES, tracing::Level::TRACE) {
            return;
        }
        let (node_id, leads) = (self.own.0, self.activity.leads());
        for types::Entry { log_id, payload } in entries {
            let types::Payload::Command(command) = payload else { continue };
            let bytes = command.len();
            match leads {
                true => tracing::trace!(target: WRITES, node_id, %log_id, bytes, "proposed"),
                false => tracing::trace!(target: WRITES, node_id, %log_id, bytes, "appended"),
            }
        }
    }

    fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let entries = self.store.read(start, end, max_bytes)?;
        check_read(&entries, (start, end), max_bytes);
        entries
            .into_iter()
            .map(|entry| type_config::entry(entry).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e)))
            .collect()
    }
}

/// What a store owes to whoever reads `range` of it.
fn check_read(entries: &[types::Entry], (start, end): (u64, u64), max_bytes: usize) {
    let index = |entry: &types::Entry| entry.log_id.index;
    assert!(
        entries.windows(2).all(|pair| index(&pair[0]) + 1 == index(&pair[1])),
        "invariant: what is read has no hole"
    );
    assert!(
        entries.iter().all(|entry| (start..end).contains(&index(entry))),
        "invariant: nothing is read that was not asked for"
    );
    let bytes = || entries.iter().map(types::Entry::size_bytes).sum::<usize>();
    assert!(entries.len() < 2 || bytes() <= max_bytes, "invariant: a read has a bound");
}

/// First index of `range`, and the one after its last.
fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(&start) => start,
        Bound::Excluded(&before) => before + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(&last) => last.saturating_add(1),
        Bound::Excluded(&end) => end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogReader<TypeConfig> for RaftLog {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        let (start, end) = bounds(&range);
        self.read(start, end, usize::MAX)
    }

    /// Reads piece by piece: after a restart the range may be the whole log.
    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = io::Result<Entry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        let pieces = stream::unfold((self.clone(), start), move |(log, next)| async move {
            if next >= end {
                return None;
            }
            let piece = log.read(next, end, log.message_bytes).and_then(|entries| {
                // Absence is tolerated where the log does not reach. Elsewhere, ending early would make the core
                // believe that everything had been applied.
                let bounds = log.store.bounds();
                let held = bounds.last.is_some_and(|last| next <= last.index)
                    && bounds.purged.is_none_or(|purged| next > purged.index);
                match held && entries.first().is_none_or(|first| first.log_id.index != next) {
                    true => {
                        Err(io::Error::new(io::ErrorKind::InvalidData, format!("entry {next} is missing")))
                    }
                    false => Ok(entries),
                }
            });
            let last = piece.as_ref().ok().and_then(|entries| entries.last());
            let after = last.map_or(end, |last| last.log_id.index + 1);
            Some((piece, (log, after)))
        });
        pieces
            .flat_map(|piece| match piece {
                Ok(entries) => stream::iter(entries).map(Ok).left_stream(),
                Err(error) => stream::iter([Err(error)]).right_stream(),
            })
            .boxed()
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.store.vote().map(type_config::vote))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.read(start, end, self.message_bytes)
    }
}

impl RaftLogStorage<TypeConfig> for RaftLog {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let bounds = self.store.bounds();
        Ok(LogState {
            last_purged_log_id: bounds.purged.map(type_config::log_id),
            last_log_id: bounds.last.map(type_config::log_id),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let vote = type_config::from_vote(vote);
        assert!(
            self.store.vote().is_none_or(|held| held.term <= vote.term),
            "invariant: a voter's term does not fall"
        );
        if let Some(held) = self.store.vote().filter(|held| held.term == vote.term) {
            // Somebody else may have been elected than the one that was voted for.
            let is_elected = vote.committed && !held.committed;
            assert!(
                is_elected || held.node_id == vote.node_id,
                "invariant: a voter has one candidate in a term, and one leader"
            );
            assert!(
                held.committed <= vote.committed,
                "invariant: who was elected stays elected for the term"
            );
        }
        self.activity.voted(self.own.0, vote);
        self.durably(|done| self.store.save_vote(vote, done)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        let committed = committed.as_ref().map(type_config::from_log_id);
        assert!(self.store.committed() <= committed, "invariant: what is committed stays committed");
        if let Some(upto) = committed {
            self.activity.committed(upto.index);
            tracing::trace!(target: WRITES, node_id = self.own.0, %upto, "committed");
        }
        self.store.save_committed(committed);
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.store.committed().map(type_config::log_id))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut waiting = Vec::new();
        let mut local = |entry: Entry| {
            if let Payload::Normal(SealedCommand { on_flushed: Some(on_flushed), .. }) = &entry.payload {
                waiting.push((position(&entry), on_flushed.clone()));
            }
            type_config::from_entry(entry)
        };
        let entries: Vec<types::Entry> = entries.into_iter().map(&mut local).collect();
        assert!(
            entries.is_sorted_by_key(|entry| entry.log_id),
            "invariant: entries of one log are in the order of their positions"
        );
        if let (Some(first), Some(committed)) = (entries.first(), self.store.committed()) {
            assert!(first.log_id > committed, "invariant: no entry takes the place of one that is committed");
        }
        let (last, own, positions) =
            (entries.last().map(|entry| entry.log_id), self.own, self.durable_positions.clone());
        let flushed_commands = self.flushed_commands.clone();
        if let (Some(batch), Some(last)) = (Batch::of(&entries), last) {
            self.activity.leader_clock.entries_received(batch);
            self.activity.appended(last.index);
        }
        self.trace(&entries);
        let flushed = move |result: io::Result<()>| {
            let durable = result.is_ok();
            if let (true, Some(last)) = (durable, last) {
                positions.note(own, last);
                tracing::trace!(target: WRITES, node_id = own.0, upto = %last, "flushed");
            }
            callback.io_completed(result);
            if durable && !waiting.is_empty() {
                // Not on this thread, which has the next batch to write. Nobody receives once the core is gone.
                let _ = flushed_commands.send(waiting);
            }
        };
        self.activity.writes.submit();
        self.store.append(entries, Box::new(flushed));
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        let last = last.as_ref().map(type_config::from_log_id);
        assert!(self.store.committed() <= last, "invariant: what is committed is not truncated");
        self.activity.truncated(last.map(|last| last.index));
        self.durably(|done| self.store.truncate(last, done)).await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        let upto = type_config::from_log_id(&upto);
        self.activity.purges.fetch_add(1, Relaxed);
        let purged = self.durably(|done| self.store.purge(upto, done)).await;
        self.activity.noticed.notify_one();
        purged
    }
}

/// Position of `entry`.
pub(crate) fn position(entry: &Entry) -> types::LogId {
    type_config::from_log_id(&entry.log_id())
}
