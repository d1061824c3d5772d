//! The disk of a simulated node: syncs take time, and a crash forgets what was not synced.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quorate::StorageError;
use quorate::store::{
    Completion, LogBounds, LogStore, MemoryDisk, MemorySnapshots, MemoryStore, SnapshotHandle, SnapshotMeta,
    SnapshotReceiver, SnapshotStore, SnapshotWriter, SyncMode,
};
use quorate::store::{Entry, Vote};
use quorate::testkit::runtime::TaskGroup;
use quorate::{EventLog, EventLogLimits, LogId};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tempfile::TempDir;
use tokio::sync::Notify;

pub(super) struct Disk {
    log: MemoryDisk,
    snapshots: Arc<CountedSnapshots>,
    /// Where the event log is. In memory, so that its syncs cost nothing.
    events: TempDir,
    rng: SmallRng,
    /// Of its own, so that what else happens does not depend on it.
    events_rng: SmallRng,
    lying: bool,
}

impl Disk {
    pub(super) fn new(seed: u64, lying: bool) -> Self {
        Self {
            log: MemoryDisk::new(SyncMode::Manual),
            snapshots: Arc::default(),
            events: tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap(),
            rng: SmallRng::seed_from_u64(seed ^ 0x6469_736b),
            events_rng: SmallRng::seed_from_u64(seed ^ 0x6576_656e),
            lying,
        }
    }

    /// Opens the log for a process whose tasks form `group`.
    pub(super) fn open_log(&mut self, group: &Arc<TaskGroup>) -> Arc<dyn LogStore> {
        let store = MemoryStore::open(&self.log);
        let written = Arc::new(Notify::new());
        let notify = written.clone();
        self.log.on_pending(move || notify.notify_one());
        let (disk, rng) = (self.log.clone(), SmallRng::seed_from_u64(self.rng.random()));
        // A disk that lies is in no hurry.
        let stalls = if self.lying { 1.0 } else { 0.02 };
        group.spawn(sync_forever(disk, written, rng, stalls));
        match self.lying {
            true => Arc::new(LyingStore(store)),
            false => Arc::new(store),
        }
    }

    pub(super) fn snapshots(&self) -> Arc<dyn SnapshotStore> {
        self.snapshots.clone()
    }

    /// Opens the event log, which keeps little or much, unless the node is to have none in this life.
    pub(super) fn event_log(&mut self) -> Option<Arc<EventLog>> {
        let operations = [0, 30, 300, 100_000][self.events_rng.random_range(0..4)];
        let limits = EventLogLimits { operations, ..EventLogLimits::default() };
        (operations > 0).then(|| Arc::new(EventLog::open(self.events.path(), limits).unwrap()))
    }

    /// Cuts off an end of the event log. How much of it was synced is not known here: a node may be left with a log that does not lead
    /// to its state.
    fn cut_events(&mut self) {
        let files = std::fs::read_dir(self.events.path()).unwrap().map(|file| file.unwrap().path());
        let segment = |path: &PathBuf| path.extension().is_some_and(|end| end == "segment");
        let Some(newest) = files.filter(segment).max() else { return };
        let length = std::fs::metadata(&newest).unwrap().len();
        let file = std::fs::OpenOptions::new().write(true).open(&newest).unwrap();
        file.set_len(self.events_rng.random_range(0..=length)).unwrap();
    }

    /// Forgets some of what was not synced. Returns how many writes that were.
    pub(super) fn crash(&mut self) -> u64 {
        if self.events_rng.random_bool(0.3) {
            self.cut_events();
        }
        let pending = self.log.pending();
        let keep = self.rng.random_range(0..=pending);
        self.log.crash(keep);
        (pending - keep) as u64
    }

    /// How many snapshots this node has built, and how many it has received.
    pub(super) fn snapshot_counts(&self) -> (u64, u64) {
        let CountedSnapshots { built, received, .. } = &*self.snapshots;
        (built.load(Ordering::Relaxed), received.load(Ordering::Relaxed))
    }
}

/// Syncs whenever something was written: mostly at once, now and then after a stall.
async fn sync_forever(disk: MemoryDisk, written: Arc<Notify>, mut rng: SmallRng, stall_probability: f64) {
    loop {
        written.notified().await;
        let stalls = rng.random_bool(stall_probability);
        let micros = if stalls { rng.random_range(50_000..300_000) } else { rng.random_range(100..4_000) };
        tokio::time::sleep(Duration::from_micros(micros)).await;
        disk.sync();
    }
}

/// Reports every write as durable when it is submitted: the bug that no other check of a store can make up for.
struct LyingStore(MemoryStore);

impl LyingStore {
    fn at_once(&self, done: Completion, submit: impl FnOnce(Completion)) {
        submit(Box::new(|_| {}));
        done(Ok(()));
    }
}

impl LogStore for LyingStore {
    fn bounds(&self) -> LogBounds {
        self.0.bounds()
    }

    fn vote(&self) -> Option<Vote> {
        self.0.vote()
    }

    fn committed(&self) -> Option<LogId> {
        self.0.committed()
    }

    fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        self.0.read(start, end, max_bytes)
    }

    fn append(&self, entries: Vec<Entry>, done: Completion) {
        self.at_once(done, |sunk| self.0.append(entries, sunk));
    }

    fn save_vote(&self, vote: Vote, done: Completion) {
        self.at_once(done, |sunk| self.0.save_vote(vote, sunk));
    }

    fn save_committed(&self, committed: Option<LogId>) {
        self.0.save_committed(committed);
    }

    fn truncate(&self, last: Option<LogId>, done: Completion) {
        self.at_once(done, |sunk| self.0.truncate(last, sunk));
    }

    fn purge(&self, upto: LogId, done: Completion) {
        self.at_once(done, |sunk| self.0.purge(upto, sunk));
    }
}

/// Counts what is built and received, so that a run in which neither happens does not pass for a test of it.
#[derive(Default)]
struct CountedSnapshots {
    snapshots: MemorySnapshots,
    built: AtomicU64,
    received: AtomicU64,
    /// Positions under way, so that a snapshot of which each piece came twice counts once.
    last_received: Mutex<Option<LogId>>,
}

impl SnapshotStore for CountedSnapshots {
    fn begin(&self, meta: &SnapshotMeta) -> Result<SnapshotWriter, StorageError> {
        self.built.fetch_add(1, Ordering::Relaxed);
        self.snapshots.begin(meta)
    }

    fn receive(&self, log_id: LogId) -> Result<SnapshotReceiver, StorageError> {
        if self.last_received.lock().unwrap().replace(log_id) != Some(log_id) {
            self.received.fetch_add(1, Ordering::Relaxed);
        }
        self.snapshots.receive(log_id)
    }

    fn newest(&self) -> Result<Option<SnapshotHandle>, StorageError> {
        self.snapshots.newest()
    }
}
