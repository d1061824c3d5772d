//! openraft's own suite, run on a log store behind our adapter and on our state machine adapter.
//!
//! It does not test crashes or fsync; the property tests of the storage room and the simulation do.

use std::io;
use std::sync::{Arc, Mutex};

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

use super::apply::Applier;
use super::log::RaftLog;
use super::type_config::TypeConfig;
use crate::machine::counting::Count;
use crate::storage::{Completion, LogBounds, LogStore, SnapshotStore};
use crate::types::{Entry, Incarnation, LogId, Vote};

/// Lets a log begin at index 1, as some of the suite's do and no real one does: our stores refuse a log whose
/// entry 0 is missing. What lies before the first entry is purged, and the purge hidden from the suite.
struct FromAnywhere {
    store: Arc<dyn LogStore>,
    hidden: Mutex<Option<LogId>>,
}

impl LogStore for FromAnywhere {
    fn bounds(&self) -> LogBounds {
        let (bounds, hidden) = (self.store.bounds(), *self.hidden.lock().unwrap());
        let show = |log_id: Option<LogId>| log_id.filter(|_| log_id != hidden);
        LogBounds { purged: show(bounds.purged), last: show(bounds.last) }
    }

    fn vote(&self) -> Option<Vote> {
        self.store.vote()
    }

    fn committed(&self) -> Option<LogId> {
        self.store.committed()
    }

    fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        self.store.read(start, end, max_bytes)
    }

    fn append(&self, entries: Vec<Entry>, done: Completion) {
        let first = entries.first().map_or(0, |entry| entry.log_id.index);
        if first > 0 && self.store.bounds() == LogBounds::default() {
            let before = LogId::new(0, first - 1);
            *self.hidden.lock().unwrap() = Some(before);
            self.store.purge(before, Box::new(|purged| purged.unwrap()));
        }
        self.store.append(entries, done);
    }

    fn save_vote(&self, vote: Vote, done: Completion) {
        self.store.save_vote(vote, done);
    }

    fn save_committed(&self, committed: Option<LogId>) {
        self.store.save_committed(committed);
    }

    fn truncate(&self, last: Option<LogId>, done: Completion) {
        self.store.truncate(last, done);
    }

    fn purge(&self, upto: LogId, done: Completion) {
        *self.hidden.lock().unwrap() = None;
        self.store.purge(upto, done);
    }
}

/// Opens a fresh store; the guard keeps its directory.
type Open<G> = fn() -> (G, Arc<dyn LogStore>, Arc<dyn SnapshotStore>);

struct Builder<G>(Open<G>);

impl<G: Send + Sync + 'static> StoreBuilder<TypeConfig, RaftLog, Applier<Count>, G> for Builder<G> {
    async fn build(&self) -> Result<(G, RaftLog, Applier<Count>), StorageError<TypeConfig>> {
        let (guard, store, snapshots) = (self.0)();
        let log = Arc::new(FromAnywhere { store, hidden: Mutex::new(None) });
        let applier =
            Applier::recover(1, Count::default(), snapshots, None).expect("an empty store can be recovered");
        let activity = applier.activity();
        let (log, telling) = RaftLog::new(log, 1024 * 1024, (1, Incarnation(1)), Arc::default(), activity);
        crate::runtime::spawn(telling);
        Ok((guard, log, applier))
    }
}

#[tokio::test]
async fn the_memory_store_conforms() {
    use crate::storage::{MemoryDisk, MemorySnapshots, MemoryStore, SyncMode};
    Suite::test_all(Builder(|| {
        let log = MemoryStore::open(&MemoryDisk::new(SyncMode::Immediate));
        ((), Arc::new(log), Arc::new(MemorySnapshots::default()))
    }))
    .await
    .unwrap();
}

#[tokio::test]
async fn the_sled_store_conforms() {
    use crate::storage::{SledOptions, SledStore, SnapshotDir};
    Suite::test_all(Builder(|| {
        let dir = tempfile::tempdir().unwrap();
        let log = SledStore::open(&dir.path().join("log"), SledOptions::default()).unwrap();
        let snapshots = SnapshotDir::open(&dir.path().join("snapshots")).unwrap();
        (dir, Arc::new(log), Arc::new(snapshots))
    }))
    .await
    .unwrap();
}
