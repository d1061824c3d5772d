//! A state that is no member's: it is told what was applied, keeps that on its disk, and can be read and followed.
//!
//! What it is told goes into its event log, which is its log as well: after a restart the state is that of the newest snapshot and
//! what the event log has after it. Nothing is synced but before a snapshot. What a loss of power takes is told again, since the
//! state begins where the disk ends.
//!
//! [`ToldState`] belongs to whoever tells; [`ToldReader`] to everybody else.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use openraft::storage::RaftSnapshotBuilder as _;
use tokio::sync::Notify;

use super::activity::Activity;
use super::apply::Applier;
use super::published::{Applied, CurrentHistory, Progress, Published};
use super::snapshot::{self, catch};
use crate::error::StorageError;
use crate::feed::{EventLog, Feed, FeedRecord};
use crate::machine::StateMachine;
use crate::runtime::offload;
use crate::storage::{SnapshotDir, SnapshotMeta, SnapshotReceiver, SnapshotStore, StartProgress};
use crate::types::{Bookmark, ClusterClock, HistoryEpoch, LogId, NodeId};

/// Bytes of the event log that are applied at once at a start.
const REPLAY_BYTES: usize = 4 * 1024 * 1024;
/// A snapshot is due after this many bytes of what was told, and after half of what the event log may keep.
const SNAPSHOT_BYTES: u64 = 64 * 1024 * 1024;

/// A state that is told what was applied. See the [module](self).
pub(crate) struct ToldState<M: StateMachine> {
    applier: Applier<M>,
    snapshots: Arc<dyn SnapshotStore>,
    reader: ToldReader<M>,
    /// What had been told when the last snapshot was begun.
    covered: Progress,
    building: Option<tokio::task::JoinHandle<io::Result<()>>>,
}

/// Why a state that was received did not take the place of the present one.
pub(crate) enum NotTaken {
    /// No such state ever can.
    Unfit(String),
    /// Another source, or another attempt, may have one that does: it was damaged, could not be written, is behind, or is another cluster's.
    Failed(String),
}

/// Whether a state that says this of itself can take the place of one at `present`.
fn fits<M: StateMachine>(present: Bookmark, meta: &SnapshotMeta) -> Result<(), NotTaken> {
    let SnapshotMeta { log_id, history, machines, .. } = meta;
    if present.history.differs_from(*history) {
        return Err(NotTaken::Failed(format!(
            "it is of history {history}, and what was followed before is of {}",
            present.history
        )));
    }
    if present.index > 0 && present.index >= log_id.index {
        return Err(NotTaken::Failed(format!(
            "it is of position {}, and the present state of {}",
            log_id.index, present.index
        )));
    }
    machines.check(M::MACHINES).map_err(|error| NotTaken::Unfit(error.to_string()))
}

/// The same for those who read or follow it.
pub(crate) struct ToldReader<M: StateMachine> {
    published: Arc<Published<M::View>>,
    feed: Arc<Feed>,
    activity: Arc<Activity>,
    wanted: Arc<Notify>,
    snapshot_wanted: Arc<AtomicBool>,
    is_broken: Arc<AtomicBool>,
}

impl<M: StateMachine> Clone for ToldReader<M> {
    fn clone(&self) -> Self {
        let Self { published, feed, activity, wanted, snapshot_wanted, is_broken } = self;
        Self {
            published: published.clone(),
            feed: feed.clone(),
            activity: activity.clone(),
            wanted: wanted.clone(),
            snapshot_wanted: snapshot_wanted.clone(),
            is_broken: is_broken.clone(),
        }
    }
}

impl<M: StateMachine> ToldReader<M> {
    /// How far the state is.
    pub(crate) fn progress(&self) -> Progress {
        self.published.progress()
    }

    /// Tells every advance.
    pub(crate) fn watch(&self) -> tokio::sync::watch::Receiver<Progress> {
        self.published.watch()
    }

    /// The history that positions belong to.
    pub(crate) fn history(&self) -> &CurrentHistory {
        self.published.history()
    }

    /// What it was told, for those who follow.
    pub(crate) fn feed(&self) -> &Arc<Feed> {
        &self.feed
    }

    /// What is counted of snapshots and the like.
    pub(crate) fn activity(&self) -> &Activity {
        &self.activity
    }

    /// The newest view that somebody has asked for, if it is there still.
    pub(crate) fn last_view(&self) -> Option<Arc<Applied<M::View>>> {
        self.published.last_view()
    }

    /// A view of all that was told by now, once position `index` is among it. Waits for ever if that is never told.
    pub(crate) async fn view(&self, index: Option<u64>) -> Arc<Applied<M::View>> {
        if let Some(index) = index {
            self.published.wait_applied(index).await;
        }
        loop {
            let next_index = self.published.progress().next_index();
            if let Some(view) = self.published.view_from(next_index) {
                return view;
            }
            self.published.want_view();
            self.wanted.notify_one();
            if let Some(view) = self.published.wait_view(next_index).await {
                return view;
            }
        }
    }

    /// Whether something was told that does not fit. A half of it may have been taken in, so nothing more is shown or kept of the state.
    pub(crate) fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Relaxed)
    }

    /// Has a snapshot begun soon.
    pub(crate) fn ask_for_snapshot(&self) {
        self.snapshot_wanted.store(true, Ordering::Relaxed);
        self.wanted.notify_one();
    }

    /// Returns when somebody waits for a view, or for a snapshot.
    pub(crate) async fn view_wanted(&self) {
        self.wanted.notified().await;
    }
}

impl<M: StateMachine> ToldState<M> {
    /// The state in the directory `dir`, or `machine` when there is none. Blocks.
    ///
    /// # Errors
    /// What cannot be read, or is not this machine's.
    pub(crate) fn open(dir: &Path, event_log: EventLog, machine: M) -> Result<Self, StorageError> {
        /// It is no member.
        const NO_MEMBER: NodeId = 0;
        let snapshots = SnapshotDir::open_in_room(&dir.join("snapshots"), None, StartProgress::default())?;
        let snapshots: Arc<dyn SnapshotStore> = Arc::new(snapshots);
        let event_log = Arc::new(event_log);
        let applier = Applier::recover(NO_MEMBER, machine, snapshots.clone(), Some(event_log.clone()))?;
        let reader = ToldReader {
            published: applier.published(),
            feed: applier.feed(),
            activity: applier.activity(),
            wanted: Arc::default(),
            snapshot_wanted: Arc::default(),
            is_broken: Arc::default(),
        };
        let mut this = Self { covered: reader.progress(), applier, snapshots, reader, building: None };
        this.replay(&event_log)
            .map_err(|source| StorageError::Unreadable { path: dir.join("events"), source })?;
        Ok(this)
    }

    /// Takes in what the event log has after the snapshot.
    fn replay(&mut self, log: &EventLog) -> io::Result<()> {
        let (history, begins, ends) = log.extent();
        let next = self.position().map_or(0, |position| position.index + 1);
        let is_own = self.history() == history || (next == 0 && begins == 0 && ends > 0);
        if !is_own || !(begins..ends).contains(&next) {
            return Ok(());
        }
        if next == 0 {
            self.applier.begin_told(history);
        }
        let mut next = next;
        while next < ends {
            let (records, after) = log.records(history, next, REPLAY_BYTES)?;
            self.take_in(&records)?;
            assert!(after > next, "invariant: every page leads on");
            next = after;
            self.pass(after - 1, records.last().map(|last| (last.elapsed_ms, last.time_ms)));
            self.tell();
        }
        Ok(())
    }

    /// For those who read it.
    pub(crate) fn reader(&self) -> ToldReader<M> {
        self.reader.clone()
    }

    /// The last position that was told.
    fn position(&self) -> Option<LogId> {
        self.applier.progress().log_id
    }

    fn history(&self) -> HistoryEpoch {
        self.applier.progress().history
    }

    /// Where to go on being told.
    pub(crate) fn bookmark(&self) -> Bookmark {
        let index = self.position().map_or(0, |position| position.index);
        Bookmark { index, history: self.history() }
    }

    /// Begins `history`, of which it was told nothing yet.
    pub(crate) fn begin(&mut self, history: HistoryEpoch) {
        self.applier.begin_told(history);
    }

    /// Takes in what happened. Nobody is told before [`tell`](Self::tell).
    ///
    /// # Errors
    /// That it cannot have happened to this state; nothing after it must be taken in.
    pub(crate) fn take_in(&mut self, records: &[FeedRecord]) -> io::Result<()> {
        let applier = &mut self.applier;
        let taken =
            catch("applying what was told", || records.iter().try_for_each(|record| applier.take_in(record)));
        taken.inspect_err(|_| self.reader.is_broken.store(true, Ordering::Relaxed))
    }

    /// Nothing that concerns it happened up to position `index`. The elapsed time and log time there, if they are known.
    pub(crate) fn pass(&mut self, index: u64, times_ms: Option<(u64, u64)>) {
        self.applier.pass(index, times_ms);
    }

    /// Takes `machine` in its place, as of `log_id` of `history`.
    ///
    /// # Errors
    /// That it is further than that already.
    pub(crate) fn take_state(
        &mut self,
        machine: M,
        log_id: LogId,
        clock: ClusterClock,
        history: HistoryEpoch,
    ) -> io::Result<()> {
        self.applier.take_state(machine, log_id, clock, history)
    }

    /// Begins to receive a whole state as of `log_id`, as a file.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub(crate) fn receive(&self, log_id: LogId) -> Result<SnapshotReceiver, StorageError> {
        self.snapshots.receive(log_id)
    }

    /// Whether the state whose beginning was received can take the place of the present one, as far as it says so itself.
    ///
    /// # Errors
    /// Why not: it is of another history, not ahead, or of a machine that this build does not read.
    pub(crate) fn may_take(&self, receiver: &SnapshotReceiver) -> Result<(), NotTaken> {
        receiver.head().map_or(Ok(()), |meta| fits::<M>(self.bookmark(), &meta))
    }

    /// Takes the state in the file that was received in the place of the present one. The file is the newest snapshot from then on.
    ///
    /// # Errors
    /// See [`NotTaken`]: the present state stays then.
    pub(crate) async fn take_file(&mut self, receiver: SnapshotReceiver) -> Result<LogId, NotTaken> {
        // One that is being written would be of an older state.
        if let Some(building) = self.building.take() {
            let _ = building.await;
        }
        let present = self.bookmark();
        let failed = |error: &dyn std::fmt::Display| NotTaken::Failed(error.to_string());
        let taken = offload(move || {
            let received = receiver.finish().map_err(|error| failed(&error))?;
            fits::<M>(present, received.meta())?;
            let read = catch("reading a snapshot", || {
                snapshot::read::<M>(received.handle()).map_err(io::Error::other)
            });
            let restored = read.map_err(|error| NotTaken::Unfit(error.to_string()))?;
            let handle = received.place().map_err(|error| failed(&error))?;
            Ok((restored, handle))
        });
        let (restored, handle) = taken.await?;
        let meta = handle.meta();
        let taken = self.applier.take_state(restored.machine, meta.log_id, meta.clock, meta.history);
        taken.map_err(|error| NotTaken::Unfit(error.to_string()))?;
        self.covered = self.applier.progress();
        self.reader.activity.snapshot_bytes.store(handle.len_bytes(), Ordering::Relaxed);
        Ok(meta.log_id)
    }

    /// Those who read and follow it learn what was taken in.
    pub(crate) fn tell(&mut self) {
        if !self.reader.is_broken() {
            self.applier.publish_if_wanted();
        }
    }

    /// Writes what was taken in to the event log.
    pub(crate) async fn write(&self) {
        let feed = self.reader.feed.clone();
        offload(move || feed.write_log()).await;
    }

    /// Has the event log know how far it is, also where nothing happened that concerns it, so that a start goes on there.
    pub(crate) async fn mark(&self) {
        let (feed, position) = (self.reader.feed.clone(), self.reader.progress().log_id);
        if let Some(position) = position {
            offload(move || feed.sync_log(position.index)).await;
        }
    }

    /// Begins a snapshot if one is `due`, or if so much was told since the last one that it is, and none is being written.
    ///
    /// # Errors
    /// That the last one has failed.
    pub(crate) async fn snapshot(&mut self, due: bool) -> io::Result<()> {
        if self.building.as_ref().is_some_and(|building| building.is_finished())
            && let Some(building) = self.building.take()
        {
            building.await.map_err(io::Error::other)??;
        }
        let now = self.applier.progress();
        let bytes = now.command_bytes - self.covered.command_bytes;
        let due = due || self.reader.snapshot_wanted.swap(false, Ordering::Relaxed);
        let is_wanted = due || bytes > SNAPSHOT_BYTES || self.is_about_to_lose();
        if !is_wanted || now.log_id.is_none() || self.reader.is_broken() {
            return Ok(());
        }
        if self.building.is_some() {
            if due {
                // Of what is being written now it is not.
                self.reader.snapshot_wanted.store(true, Ordering::Relaxed);
            }
            return Ok(());
        }
        self.covered = now;
        let mut builder = self.applier.told_snapshot();
        self.building =
            Some(crate::runtime::spawn(async move { builder.build_snapshot().await.map(|_| ()) }));
        Ok(())
    }

    /// Whether the event log may soon let go of what the last snapshot does not have.
    fn is_about_to_lose(&self) -> bool {
        let Some(limits) = self.reader.feed.log().map(|log| log.limits()) else { return false };
        let reach = self.reader.feed.reach();
        let is_half_full = reach.operations > limits.operations / 2 || reach.bytes > limits.bytes / 2;
        let middle = reach.first + (reach.next.saturating_sub(reach.first)) / 2;
        (is_half_full || limits.age_ms > 0) && self.covered.next_index() < middle
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::feed::{EventLogLimits, FeedContent};
    use crate::kv::machine::KvMachine;
    use crate::machine::{AppliedEvent, EventOperation};

    const HISTORY: HistoryEpoch = HistoryEpoch(7);

    fn open(dir: &Path) -> ToldState<KvMachine> {
        let log = EventLog::open(&dir.join("events"), EventLogLimits::default()).unwrap();
        ToldState::open(dir, log, KvMachine::default()).unwrap()
    }

    fn record(index: u64, events: &[(EventOperation, &'static str, u64)]) -> FeedRecord {
        let event = |(operation, key, previous): &(EventOperation, &'static str, u64)| AppliedEvent {
            machine: 0,
            operation: *operation,
            tenant: "t".into(),
            collection: "c".into(),
            key: (*key).into(),
            value: "v".into(),
            created: index,
            previous: *previous,
            version: 1,
            deadline_ms: None,
        };
        let content = FeedContent::Events(events.iter().map(event).collect());
        FeedRecord { log_id: LogId::new(1, index), time_ms: 1, elapsed_ms: 1, content }
    }

    #[tokio::test]
    async fn half_of_what_does_not_fit_is_neither_shown_nor_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut told = open(dir.path());
        told.begin(HISTORY);
        told.take_in(&[record(1, &[(EventOperation::Insert, "a", 0)])]).unwrap();
        told.tell();
        told.write().await;
        // The first fits; the second is of a key that is not there.
        let torn = record(2, &[(EventOperation::Insert, "b", 0), (EventOperation::Update, "none", 1)]);
        assert!(told.take_in(&[torn]).is_err());
        told.tell();
        told.write().await;
        told.snapshot(true).await.unwrap();
        let reader = told.reader();
        assert!(reader.is_broken());
        assert_eq!(reader.progress().next_index(), 2, "nothing after the first is shown");
        drop((told, reader));
        let again = open(dir.path());
        assert_eq!(again.bookmark(), Bookmark { index: 1, history: HISTORY });
        again.applier.published().want_view();
        let mut again = again;
        again.tell();
        assert_eq!(again.reader().last_view().unwrap().view.len(), 1, "only the first is kept");
    }
}
