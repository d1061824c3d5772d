//! openraft's own suite, run on a log store behind our adapter and on our state machine adapter.
//!
//! It does not test crashes or fsync; the property tests of the storage room and the simulation do.

use std::io::{self, Read, Write};
use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

use super::apply::Applier;
use super::log::RaftLog;
use super::type_config::TypeConfig;
use crate::machine::{ApplyContext, StateMachine};
use crate::storage::{LogStore, SnapshotStore};

/// A machine that only counts.
#[derive(Default)]
struct Count(u64);

impl StateMachine for Count {
    type Command = ();
    type Reply = u64;
    type Query = ();
    type Answer = u64;
    type View = u64;

    fn apply(&mut self, _: &ApplyContext, (): ()) -> u64 {
        self.0 += 1;
        self.0
    }

    fn view(&self) -> u64 {
        self.0
    }

    fn query(view: &u64, (): ()) -> u64 {
        *view
    }

    fn write_snapshot(view: &u64, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&view.to_le_bytes())
    }

    fn read_snapshot(input: &mut dyn Read) -> io::Result<Self> {
        let mut bytes = [0; 8];
        input.read_exact(&mut bytes)?;
        Ok(Self(u64::from_le_bytes(bytes)))
    }
}

/// Opens a fresh store; the guard keeps its directory.
type Open<G> = fn() -> (G, Arc<dyn LogStore>, Arc<dyn SnapshotStore>);

struct Builder<G>(Open<G>);

impl<G: Send + Sync + 'static> StoreBuilder<TypeConfig, RaftLog, Applier<Count>, G> for Builder<G> {
    async fn build(&self) -> Result<(G, RaftLog, Applier<Count>), StorageError<TypeConfig>> {
        let (guard, log, snapshots) = (self.0)();
        let applier = Applier::recover(Count::default(), snapshots).expect("an empty store can be recovered");
        Ok((guard, RaftLog::new(log, 1024 * 1024), applier))
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
