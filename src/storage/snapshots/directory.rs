//! Snapshots as files of a directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::StorageError;
use crate::runtime;
use crate::storage::Room;
use crate::storage::files::{self, UNFINISHED, io_error};
use crate::storage::progress::{StartProgress, StartStep};
use crate::types::LogId;

use super::{
    SnapshotHandle, SnapshotMeta, SnapshotReceiver, SnapshotStore, SnapshotWriter, Source, Staging, format,
};

/// Ends the name of a complete snapshot.
const EXTENSION: &str = "snapshot";

/// Bytes written between two syncs: what an fsync of the log may have to wait for, on a file system that writes out
/// everything older with it.
const SYNC_BYTES: u64 = 32 * 1024 * 1024;

/// After a snapshot was refused for what it probably takes, one is tried nevertheless: the state may have shrunk.
const TRY_ANYWAY: Duration = Duration::from_secs(60);

/// Snapshots in one directory, which nobody else uses.
#[derive(Debug)]
pub struct SnapshotDir {
    shared: Arc<SharedDirectory>,
}

#[derive(Debug)]
struct SharedDirectory {
    path: PathBuf,
    /// The newest snapshot, once it was asked for or published.
    newest: Mutex<Option<SnapshotHandle>>,
    /// What the log needs is not for snapshots.
    room: Option<Arc<Room>>,
    refused: Mutex<Option<RefusedSnapshot>>,
    /// Of the start that opened the directory.
    progress: StartProgress,
}

/// A snapshot for which there was no room.
#[derive(Debug, Clone, Copy)]
struct RefusedSnapshot {
    since: Instant,
    /// What a snapshot takes at least.
    bytes: u64,
}

impl SnapshotDir {
    /// Opens the directory, or creates it, and removes unfinished files.
    ///
    /// # Errors
    /// When the directory cannot be used. Snapshots are looked at by [`newest`](SnapshotStore::newest) only.
    pub fn open(path: &Path) -> Result<Self, StorageError> {
        Self::open_in_room(path, None, StartProgress::default())
    }

    /// [`open`](Self::open); snapshots then fail with [`ErrorKind::StorageFull`] before `room` gets short for the
    /// log. One that would not fit, by the size of the last one or by how far the last attempt got, is refused
    /// before anything is written. How far reading the newest one is counts as `progress`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_in_room(
        path: &Path,
        room: Option<Arc<Room>>,
        progress: StartProgress,
    ) -> Result<Self, StorageError> {
        files::create_directory(path)?;
        for file in files::list(path)? {
            if has_extension(&file, UNFINISHED) {
                files::remove(&file)?;
            }
        }
        // A crash may have come between a rename and its fsync; from here on the name counts.
        files::sync(path)?;
        let (path, newest, refused) = (path.to_owned(), Mutex::new(None), Mutex::new(None));
        let shared = SharedDirectory { path, newest, room, refused, progress };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// For a snapshot that takes about `bytes`.
    fn stage(&self, log_id: LogId, bytes: u64) -> Result<Box<dyn Staging>, StorageError> {
        let begun = self.shared.check_room_to_begin(bytes);
        begun.map_err(|error| io_error("cannot write to", &self.shared.path, error))?;
        // Random, because somebody who had the directory open before may not have noticed yet that it is closed.
        let number = runtime::random_u64();
        let path = self.shared.path.join(format!("{}.{number:016x}.{UNFINISHED}", name(log_id)));
        let file = OpenOptions::new()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| io_error("cannot create", &path, error))?;
        Ok(Box::new(UnfinishedFile { shared: self.shared.clone(), path, file, length: 0, unsynced: 0 }))
    }
}

/// The order of names is the order of positions.
fn name(log_id: LogId) -> String {
    format!("{:016x}-{:016x}.{EXTENSION}", log_id.term, log_id.index)
}

/// Whether `path`, in the directory of snapshots, is a complete snapshot.
pub(crate) fn is_complete(path: &Path) -> bool {
    has_extension(path, EXTENSION)
}

/// Whether it is a snapshot, complete or not. Anything else there is the file system's.
pub(crate) fn is_snapshot(path: &Path) -> bool {
    is_complete(path) || has_extension(path, UNFINISHED)
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

impl SharedDirectory {
    fn has_room_for(&self, bytes: u64) -> io::Result<bool> {
        self.room.as_ref().map_or(Ok(true), |room| room.has_room_for(bytes))
    }

    /// Refuses a snapshot of about `bytes`, and any that is sure to need more than there is. Both are guesses: now and
    /// then one may show.
    fn check_room_to_begin(&self, bytes: u64) -> io::Result<()> {
        let mut refused = self.refused.lock().expect("invariant: no panic under this lock");
        let bytes = refused.map_or(bytes, |refused| refused.bytes.max(bytes));
        if self.has_room_for(bytes)? {
            return Ok(());
        }
        let since = refused.map_or_else(Instant::now, |refused| refused.since);
        if since.elapsed() >= TRY_ANYWAY && self.has_room_for(0)? {
            *refused = None;
            return Ok(());
        }
        *refused = Some(RefusedSnapshot { since, bytes });
        Err(ErrorKind::StorageFull.into())
    }

    /// Refuses the next `bytes` of a snapshot of which `written` are there.
    fn check_room(&self, written: u64, bytes: u64) -> io::Result<()> {
        if self.has_room_for(bytes)? {
            return Ok(());
        }
        let mut refused = self.refused.lock().expect("invariant: no panic under this lock");
        *refused = Some(RefusedSnapshot { since: Instant::now(), bytes: written.saturating_add(bytes) });
        Err(ErrorKind::StorageFull.into())
    }

    /// Complete snapshots, oldest first.
    fn snapshots(&self) -> Result<Vec<PathBuf>, StorageError> {
        let mut paths = files::list(&self.path)?;
        paths.retain(|path| is_complete(path));
        Ok(paths)
    }

    fn open_newest(&self) -> Result<Option<SnapshotHandle>, StorageError> {
        let Some(path) = self.snapshots()?.pop() else { return Ok(None) };
        let open = || -> io::Result<SnapshotHandle> {
            let file = File::open(&path)?;
            let length = file.metadata()?.len();
            /// Once to verify it, once to load it.
            const PASSES: u64 = 2;
            self.progress.begin(StartStep::ReadingSnapshot, length.saturating_mul(PASSES));
            let progress = self.progress.clone();
            SnapshotHandle::verified(Arc::new(FileSource { path: path.clone(), file, length, progress }))
        };
        let handle = open().map_err(|error| format::refuse(&path, error))?;
        if path.file_name().is_none_or(|found| found != name(handle.meta.log_id).as_str()) {
            let detail = format!("byte 16: it was taken at {}", handle.meta.log_id);
            return Err(StorageError::Corrupt { path, detail });
        }
        Ok(Some(handle))
    }
}

impl SnapshotStore for SnapshotDir {
    fn begin(&self, meta: &SnapshotMeta) -> Result<SnapshotWriter, StorageError> {
        // Not asked of the file: what has not been verified yet says nothing.
        let newest = self.shared.newest.lock().expect("invariant: no panic under this lock").clone();
        let about = newest.map_or(0, |newest| newest.len_bytes());
        SnapshotWriter::begin(self.stage(meta.log_id, about)?, meta)
    }

    fn receive(&self, log_id: LogId) -> Result<SnapshotReceiver, StorageError> {
        Ok(SnapshotReceiver::begin(self.stage(log_id, 0)?, log_id))
    }

    fn newest(&self) -> Result<Option<SnapshotHandle>, StorageError> {
        let mut newest = self.shared.newest.lock().expect("invariant: no panic under this lock");
        if newest.is_none() {
            *newest = self.shared.open_newest()?;
        }
        Ok(newest.clone())
    }
}

/// A snapshot in the making.
struct UnfinishedFile {
    shared: Arc<SharedDirectory>,
    path: PathBuf,
    file: File,
    length: u64,
    /// Of `length`, since the last sync.
    unsynced: u64,
}

impl UnfinishedFile {
    /// Whether the name still belongs to the file that was written.
    fn has_its_name(&self) -> io::Result<bool> {
        let (named, own) = (fs::symlink_metadata(&self.path)?, self.file.metadata()?);
        Ok((named.dev(), named.ino()) == (own.dev(), own.ino()))
    }
}

impl Staging for UnfinishedFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.shared.check_room(self.length, bytes.len() as u64)?;
        self.file.write_all(bytes)?;
        self.length += bytes.len() as u64;
        self.unsynced += bytes.len() as u64;
        if self.unsynced >= SYNC_BYTES {
            self.unsynced = 0;
            self.file.sync_data()?;
        }
        Ok(())
    }

    fn source(&self) -> io::Result<Arc<dyn Source>> {
        let file = self.file.try_clone()?;
        let progress = StartProgress::default();
        Ok(Arc::new(FileSource { path: self.path.clone(), file, length: self.length, progress }))
    }

    fn publish(self: Box<Self>, handle: SnapshotHandle) -> Result<SnapshotHandle, StorageError> {
        self.file.sync_all().map_err(|error| io_error("cannot sync", &self.path, error))?;
        let path = self.shared.path.join(name(handle.meta.log_id));
        let file = self.file.try_clone().map_err(|error| io_error("cannot open", &self.path, error))?;
        let progress = StartProgress::default();
        let source = Arc::new(FileSource { path: path.clone(), file, length: self.length, progress });
        let handle = SnapshotHandle { source, meta: handle.meta };

        let mut newest = self.shared.newest.lock().expect("invariant: no panic under this lock");
        let named = self.has_its_name().map_err(|error| io_error("cannot find", &self.path, error))?;
        if !named {
            let taken = io::Error::other("another file has taken its place");
            return Err(io_error("cannot publish", &self.path, taken));
        }
        files::rename_durably(&self.path, &path)?;
        *self.shared.refused.lock().expect("invariant: no panic under this lock") = None;
        let snapshots = self.shared.snapshots()?;
        if snapshots.last() == Some(&path) {
            *newest = Some(handle.clone());
        }
        // This one is complete and durable: those before it are no longer needed. One after it stays.
        for older in snapshots.iter().take_while(|older| **older < path) {
            if let Err(error) = files::remove(older) {
                tracing::warn!(%error, "an old snapshot stays until the next one is taken");
            }
        }
        Ok(handle)
    }
}

impl Drop for UnfinishedFile {
    fn drop(&mut self) {
        // After publishing, the name is gone already. What cannot be removed now is removed at the next open.
        if self.has_its_name().unwrap_or(false) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A complete snapshot. The open file outlives its name.
struct FileSource {
    path: PathBuf,
    file: File,
    length: u64,
    /// Counts what is read. After the start nobody looks at it.
    progress: StartProgress,
}

impl Source for FileSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn len_bytes(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.file.read_at(buffer, offset) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(bytes) => {
                    self.progress.add(bytes as u64);
                    return Ok(bytes);
                }
                Err(error) => return Err(error),
            }
        }
    }
}
