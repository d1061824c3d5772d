//! The state of a backup, for a cluster that is to be formed from it.
//!
//! A backup is a copy of a node's snapshots: they are whole files, checked from the first byte to the last, and say by which versions of
//! which machines they were written.

use std::io;
use std::path::Path;

use crate::engine::Engine;
use crate::error::StorageError;
use crate::machine::StateMachine;
use crate::raft::snapshot;
use crate::storage::{SnapshotDir, SnapshotStore};

impl<M: StateMachine> Engine<M> {
    /// The state in the newest snapshot in `dir`, a copy of the directory `snapshots` in a node's data directory; for
    /// [`restore`](Self::restore). [`take_snapshot`](Self::take_snapshot) has a node write one of the present. Sessions are left
    /// behind: they belong to the cluster that was. Reads the whole file, and blocks meanwhile.
    ///
    /// # Errors
    /// [`StorageError`] when there is no such directory or no snapshot in it, when the newest one is damaged, or when this build does not
    /// read what wrote it.
    pub fn read_backup(dir: &Path) -> Result<M, StorageError> {
        let none = |kind: io::ErrorKind| StorageError::Io {
            operation: "there is no snapshot in",
            path: dir.to_owned(),
            source: kind.into(),
        };
        // Opening it would create it.
        if !dir.is_dir() {
            return Err(none(io::ErrorKind::NotADirectory));
        }
        let newest = SnapshotDir::open(dir)?.newest()?;
        let handle = newest.ok_or_else(|| none(io::ErrorKind::NotFound))?;
        snapshot::read::<M>(&handle).map(|restored| restored.machine)
    }
}
