//! What is there before the core starts: the newest snapshot, or the machine as it begins, and then the log after it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::time::Instant;

use super::{Applier, BATCH_BYTES, wakes};
use crate::error::StorageError;
use crate::feed::{EventLog, Feed, Recorder};
use crate::machine::StateMachine;
use crate::machine::sessions::SessionTable;
use crate::raft::published::{Applied, Progress, Published};
use crate::raft::snapshot;
use crate::raft::type_config::{self, StoredMembership};
use crate::runtime::whole_ms;
use crate::storage::{LogStore, SnapshotStore};
use crate::types::{InitialState, NodeId};

impl<M: StateMachine> Applier<M> {
    /// The state of the newest snapshot in `snapshots`, or `machine` when there is none, on node `node_id`. What is applied goes into a
    /// feed with `event_log` behind it.
    ///
    /// # Errors
    /// When the newest snapshot is corrupt, or not one of this machine.
    pub(crate) fn recover(
        node_id: NodeId,
        machine: M,
        snapshots: Arc<dyn SnapshotStore>,
        event_log: Option<Arc<EventLog>>,
    ) -> Result<Self, StorageError> {
        let progress = Progress {
            state_hash: machine.running_hash(),
            wakes: wakes(&machine),
            state_bytes: machine.state_bytes(),
            ..Progress::default()
        };
        let mut this = Self {
            node_id,
            published: Published::new(Applied { progress, view: machine.view() }),
            machine,
            sessions: SessionTable::default(),
            progress,
            membership: StoredMembership::default(),
            snapshots,
            activity: Arc::default(),
            agreement: Arc::default(),
            agreed: Arc::default(),
            recorder: Recorder::new(Feed::new(event_log)),
            begun_with: None,
            snapshot_lag_bytes: u64::MAX,
            writing: None,
        };
        if let Some(handle) = this.snapshots.newest()? {
            let (begun, upto, bytes) = (Instant::now(), handle.meta().log_id, handle.len_bytes());
            tracing::info!(%upto, bytes, "reading the snapshot");
            let content = snapshot::read::<M>(&handle)?;
            tracing::info!(%upto, took_ms = whole_ms(begun.elapsed()), "read the snapshot");
            this.replace(content, handle.meta());
            this.activity.snapshot_bytes.store(handle.len_bytes(), Relaxed);
        }
        Ok(this)
    }

    /// The state that the machine begins with: it has applied nothing yet. None if it cannot be hashed: then it is compared as
    /// little as any later one.
    pub(crate) fn initial_state(&mut self, is_restored: bool) -> Option<InitialState> {
        debug_assert!(self.progress.log_id.is_none(), "invariant: it has applied nothing");
        let hashed = snapshot::catch("hashing the state", || Ok(M::state_hash(&self.machine.view())));
        let hash = hashed
            .inspect_err(|error| tracing::warn!(%error, "the initial state is not compared with the others'"))
            .ok()?;
        self.begun_with = Some(InitialState { hash_version: M::HASH_VERSION, hash, is_restored });
        self.begun_with
    }

    /// The log still holds what its cluster was founded with: a state that was restored.
    pub(crate) fn begins_restored(&mut self) {
        self.progress.is_restored = true;
        self.published.advance(self.progress);
    }

    /// Applies what `log` knows to be committed, piece by piece. The core would do the same when it starts, with 64 entries
    /// in memory at a time, however large they are.
    ///
    /// # Errors
    /// What the log says that cannot be read, or the machine that cannot be applied.
    pub(crate) fn replay(&mut self, log: &dyn LogStore) -> io::Result<()> {
        let Some(committed) = log.committed() else { return Ok(()) };
        let begun = Instant::now();
        let first = self.progress.next_index();
        while self.progress.next_index() <= committed.index {
            let next = self.progress.next_index();
            let entries = log.read(next, committed.index + 1, BATCH_BYTES)?;
            if entries.first().is_none_or(|entry| entry.log_id.index != next) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("entry {next} is missing")));
            }
            let last = entries.last().filter(|last| last.log_id.index == committed.index);
            if let Some(last) = last.filter(|last| last.log_id != committed) {
                let message = format!("the log holds {} where {committed} is committed", last.log_id);
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            let piece = entries.into_iter().map(|entry| {
                let entry = type_config::entry(entry)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                Ok((entry, None))
            });
            let mut piece = piece.peekable();
            while piece.peek().is_some() {
                snapshot::catch("applying a command", || self.apply_batch(&mut piece))?;
            }
            if self.recorder.feed().is_log_behind() {
                // Nobody waits for this node yet, and the disk may be slower than the machine.
                self.recorder.feed().write_log();
            }
        }
        let entries = self.progress.next_index() - first;
        if entries > 0 {
            let took_ms = whole_ms(begun.elapsed());
            tracing::info!(first, upto = committed.index, took_ms, "applied the log");
        }
        Ok(())
    }
}
