//! Snapshots in memory, for simulation: publishing is atomic, and what was published survives a crash.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::error::StorageError;
use crate::types::LogId;

use super::{SnapshotHandle, SnapshotMeta, SnapshotReceiver, SnapshotStore, SnapshotWriter, Source, Staging};

/// The snapshots of one simulated node. Cheap to clone; all clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct MemorySnapshots {
    newest: Arc<Mutex<Option<SnapshotHandle>>>,
}

impl MemorySnapshots {
    /// A disk without snapshots.
    pub fn new() -> Self {
        Self::default()
    }

    fn stage(&self, log_id: LogId) -> Box<dyn Staging> {
        let path = PathBuf::from(format!("memory:{log_id}"));
        Box::new(UnfinishedBytes { newest: self.newest.clone(), path, bytes: Vec::new() })
    }
}

impl SnapshotStore for MemorySnapshots {
    fn begin(&self, meta: &SnapshotMeta) -> Result<SnapshotWriter, StorageError> {
        SnapshotWriter::begin(self.stage(meta.log_id), meta)
    }

    fn receive(&self, log_id: LogId) -> Result<SnapshotReceiver, StorageError> {
        Ok(SnapshotReceiver::begin(self.stage(log_id), log_id))
    }

    fn newest(&self) -> Result<Option<SnapshotHandle>, StorageError> {
        Ok(self.newest.lock().expect("invariant: no panic under this lock").clone())
    }
}

struct UnfinishedBytes {
    newest: Arc<Mutex<Option<SnapshotHandle>>>,
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Staging for UnfinishedBytes {
    fn path(&self) -> &Path {
        &self.path
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn source(&self) -> io::Result<Arc<dyn Source>> {
        Ok(Arc::new(ByteSource { path: self.path.clone(), bytes: self.bytes.clone() }))
    }

    fn publish(self: Box<Self>, handle: SnapshotHandle) -> Result<SnapshotHandle, StorageError> {
        let mut newest = self.newest.lock().expect("invariant: no panic under this lock");
        if newest.as_ref().is_none_or(|newest| newest.meta.log_id <= handle.meta.log_id) {
            *newest = Some(handle.clone());
        }
        Ok(handle)
    }
}

struct ByteSource {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Source for ByteSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let begin = usize::try_from(offset).unwrap_or(usize::MAX).min(self.bytes.len());
        let length = buffer.len().min(self.bytes.len() - begin);
        buffer[..length].copy_from_slice(&self.bytes[begin..begin + length]);
        Ok(length)
    }
}
