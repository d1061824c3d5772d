//! Opens sled's directory, or refuses to.
//!
//! The order of steps was found with simulated power cuts, and each has its reason:
//!
//! 1. Left-over `snap.*.generating` files go: sled would read a torn one as its newest snapshot and never
//!    open again.
//! 2. The directory, then every file in it and in `blobs/`, is synced, so that sled's recovery builds on what
//!    the next power cut will still find.
//!    Then the kernel is made to forget what it holds of them: after a failed fsync it may hold pages that never
//!    reached the disk, and what they say must not be taken for durable.
//! 3. Every byte is read once. The headers of sled's segments are looked at, as sled takes for free space, and
//!    overwrites, what is damaged; and so is the [end of its log](super::log_end).
//! 4. sled opens, which rewrites the end of its log. What it cannot read it takes for free as well, without a word, and
//!    that the same read succeeded a moment ago proves nothing. So its [reads are watched](super::read_watch):
//!    the first that fails ends the start, and nothing of what sled wants to write after it is written, nor does it
//!    write anything if it finds another end. Then flush; everything is synced again, the parent included.
//! 5. All records are verified, streaming, before anything of ours is changed.
//! 6. Only then is the [ready file](super::marker) written. A store without one has promised nothing and may
//!    be made anew; with one, a store that is missing or does not open is a lost disk.
//!
//! # What is refused
//! A checksum that does not match, a hole or overlap, a record that does not follow on the one before it,
//! a log that ends before the hard state's `last`, a hard state older than the mark. The one thing that is cut is an
//! incomplete entry at the very end, beyond the hard state's `last`: a write that nobody was told is durable.
//!
//! Damage within the writes of the very last flush before a power cut cannot be told from a torn write once
//! the unsynced mark is lost with it; no log without a second fsync can tell.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::StorageError;
use crate::runtime::panic_message;
use crate::storage::LogBounds;
use crate::storage::durable_log::{
    GaveUp, LogStats, Opened, RecoveredLog, Tail, WriterProgress, first_index, too_late,
};
use crate::storage::files::{self, exists, io_error, unreadable};
use crate::storage::progress::{StartProgress, StartStep};
use crate::types::LogId;

use super::SledOptions;
use super::disk::{self, Disk, DiskError, DiskFiles, Trees};
use super::hard_state::{self, HardState};
use super::log_end;
use super::marker::Marker;
use super::power::{WriteErrors, ensure_intercepted, ensure_power_safe, forget_cached};
use super::read_watch::{LogEnd, ReadWatch, ensure_reads_watched};
use super::reader::Reader;
use super::record::{Key, RecordError};
use super::scan::{Scan, ScanError};
use super::words;

/// sled writes to `blobs/` what exceeds a quarter of this; see [`TARGET_BYTES`](super::record::TARGET_BYTES).
pub(super) const SEGMENT_BYTES: usize = 8 * 1024 * 1024;

/// Opens or creates the log in `directory`.
pub(crate) fn open(
    directory: &Path,
    options: &SledOptions,
    stats: Arc<LogStats>,
    progress: &WriterProgress,
) -> Result<Opened<Disk>, StorageError> {
    ensure_power_safe()?;
    ensure_reads_watched()?;
    begin_step(directory, progress)?;
    let marker_path = Marker::path(directory);
    if exists(&marker_path)? {
        files::sync(&marker_path)?;
        forget_cached(&marker_path)
            .map_err(|error| io_error("cannot drop from memory", &marker_path, error))?;
    }
    let marker = Marker::open(&marker_path)?;
    let mark = marker.as_ref().map(|(_, mark)| *mark);
    if mark.is_some() {
        for missing in [directory.to_owned(), directory.join("conf"), directory.join("db")] {
            if !exists(&missing)? {
                return Err(StorageError::Lost { missing, marker: marker_path });
            }
        }
    }
    wait_until_unlocked(directory)?;

    let verified = match open_and_verify(directory, options, mark, progress) {
        Err(error) if mark.is_none() && may_recreate(&error) => {
            tracing::warn!(directory = %directory.display(), %error, "the log was never ready; making it anew");
            set_aside(directory)?;
            open_and_verify(directory, options, mark, progress)?
        }
        other => other?,
    };
    let Verified { trees, write_errors, watch, found } = verified;
    let written = begin(directory, (&trees, &write_errors), &found, marker, progress);
    let (marker, hard_state) = unless_unread(directory, &watch, written)?;
    let mark_sync = marker.syncer();
    let files = DiskFiles { trees: trees.clone(), write_errors, marker };
    let disk = Disk::new(directory, files, hard_state, options.observer.clone(), stats);
    Ok(Opened {
        disk,
        reader: Reader { trees, directory: directory.to_owned() },
        sync_later: Box::new(move || {
            mark_sync.sync().map_err(|error| format!("cannot sync the ready file: {error}"))
        }),
        grows: database(directory),
        recovered: RecoveredLog {
            bounds: LogBounds { purged: hard_state.purged, last: hard_state.last },
            vote: hard_state.vote,
            committed: hard_state.committed,
            tail: found.tail,
        },
    })
}

/// Step 6: the first write to a log that is complete.
fn begin(
    directory: &Path,
    (trees, write_errors): (&Trees, &WriteErrors),
    found: &Found,
    marker: Option<(Marker, u64)>,
    progress: &WriterProgress,
) -> Result<(Marker, HardState), StorageError> {
    begin_step(directory, progress)?;
    if let Some(index) = found.torn {
        tracing::warn!(index, "cutting an incomplete entry at the end of the log; it was never acknowledged");
        cut(trees, index).map_err(|error| sled_error(directory, error))?;
    }
    let last = found.last;
    let committed = found.hard_state.committed.filter(|committed| committed.index < first_index(last));
    begin_step(directory, progress)?;
    // Always written, so that there is something to flush.
    let hard_state =
        HardState { sequence: found.hard_state.sequence + 1, last, committed, ..found.hard_state };
    ensure_intercepted(|| {
        disk::write_hard_state(trees, &hard_state)
            .and_then(|()| trees.db.flush())
            .map_err(|error| sled_error(directory, error))?;
        Ok(())
    })?;
    sync_all(directory)?;
    files::sync(files::parent(directory))?;
    write_errors.check().map_err(|error| io_error("cannot write", directory, error))?;
    let marker_path = Marker::path(directory);
    let marker = match marker {
        Some((marker, _)) => marker,
        None => Marker::create(&marker_path, hard_state.sequence)?,
    };
    marker.mark(hard_state.sequence).map_err(|error| io_error("cannot write", &marker_path, error))?;
    Ok((marker, hard_state))
}

/// Restarts the watchdog's clock, unless it has run out: then the node is lost, even if the disk comes back.
fn begin_step(directory: &Path, progress: &WriterProgress) -> Result<(), StorageError> {
    progress.step().map_err(|GaveUp| too_late(directory))
}

/// Gives a log that does not open another name. It is not removed: nothing was promised as far as this directory
/// shows, but its ready file may have been lost.
fn set_aside(directory: &Path) -> Result<(), StorageError> {
    let mut aside = directory.as_os_str().to_owned();
    aside.push(format!(".aside-{:016x}", crate::runtime::random_u64()));
    let aside = PathBuf::from(aside);
    tracing::warn!(aside = %aside.display(), "what the log held is kept here; remove it if this node is new");
    files::rename_durably(directory, &aside)
}

fn open_and_verify(
    directory: &Path,
    options: &SledOptions,
    mark: Option<u64>,
    progress: &WriterProgress,
) -> Result<Verified, StorageError> {
    let write_errors = prepare(directory, options, progress)?;
    begin_step(directory, progress)?;
    let end = log_end(directory)?;
    options.progress.begin(StartStep::OpeningLog, 0);
    begin_step(directory, progress)?;
    let (trees, watch) = open_sled(directory, options, end)?;
    begin_step(directory, progress)?;
    let found = without_panic(directory, || {
        disk::check_blobs(&disk::blobs(directory)).map_err(|error| match error {
            DiskError::List(path, source) => unreadable(&path, source),
            other => StorageError::Corrupt { path: disk::blobs(directory), detail: other.to_string() },
        })?;
        verify(&trees, directory, options, mark)
    });
    let found = unless_unread(directory, &watch, found)?;
    Ok(Verified { trees, write_errors, watch, found })
}

/// Steps 1 to 3, as far as they come before sled.
fn prepare(
    directory: &Path,
    options: &SledOptions,
    progress: &WriterProgress,
) -> Result<WriteErrors, StorageError> {
    files::create_directory(directory)?;
    // Listened to from before the first write on.
    let db = database(directory);
    let create = OpenOptions::new().create(true).truncate(false).write(true).open(&db);
    let write_errors =
        create.and_then(|_| WriteErrors::of(&db)).map_err(|error| io_error("cannot open", &db, error))?;
    for path in list(directory)? {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with(SNAPSHOT) && name.ends_with(".generating") {
            files::remove(&path)?;
        }
    }
    sync_all(directory)?;
    for path in all_files(directory)? {
        forget_cached(&path).map_err(|error| io_error("cannot drop from memory", &path, error))?;
    }
    options.progress.begin(StartStep::ReadingLog, disk::length_bytes(&all_files(directory)?)?);
    for path in all_files(directory)? {
        begin_step(directory, progress)?;
        read_through(&path, &options.progress)?;
    }
    Ok(write_errors)
}

/// Where sled has to find the end of its log, if that is after the newest snapshot of its pages.
fn log_end(directory: &Path) -> Result<Option<LogEnd>, StorageError> {
    let mut newest = 0;
    // In the order of names, as sled looks at them.
    for path in list(directory)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if let Some(position) = name.strip_prefix(SNAPSHOT) {
            // There is no end to be found after one that is called otherwise.
            newest = u64::from_str_radix(position, 16).unwrap_or(u64::MAX);
        }
    }
    let end = log_end::find(&database(directory), newest)?;
    Ok(end.filter(|end| end.lsn > newest))
}

/// Step 4. What sled does to its files before it returns rests on what it has read of them, so a read that fails
/// ends all of it, and so does another `end`.
fn open_sled(
    directory: &Path,
    options: &SledOptions,
    end: Option<LogEnd>,
) -> Result<(Trees, ReadWatch), StorageError> {
    let db = database(directory);
    let watch = ReadWatch::on(&db, &directory.join(SNAPSHOT), end).map_err(|error| unreadable(&db, error))?;
    let is_empty = db.metadata().map_err(|error| unreadable(&db, error))?.len() == 0;
    let config = sled::Config::new()
        .path(directory)
        .segment_size(SEGMENT_BYTES)
        .cache_capacity(options.cache_bytes)
        .use_compression(false)
        .flush_every_ms(None);
    let opened = without_panic(directory, || {
        config.open().map_err(|error| match error {
            // It has changed nothing yet: what failed is a read of a small file, the error of which it returns.
            sled::Error::Io(source) if !watch.touched() && !files::is_full(source.kind()) => {
                unreadable(directory, words::io_error(source))
            }
            other => sled_error(directory, other),
        })
    });
    let checked = watch.check().and_then(|()| if opened.is_ok() { watch.check_end() } else { Ok(()) });
    if let Err(error) = checked {
        discard(directory, opened.ok(), watch);
        return Err(unseen(directory, error));
    }
    let opened = opened?;
    if !is_empty && !watch.seen() {
        let detail = "sled has read its file, but not by the pread64 of this program".to_owned();
        return Err(StorageError::NotPowerSafe { detail });
    }
    // What sled knows is complete. It returns the errors of later reads, and must be able to finish what it writes.
    watch.allow_writes();
    let trees = without_panic(directory, || {
        let open = || -> sled::Result<Trees> {
            let (log, meta) = (opened.open_tree("log")?, opened.open_tree("meta")?);
            opened.flush()?;
            Ok(Trees { db: opened, log, meta })
        };
        open().map_err(|error| sled_error(directory, error))
    });
    let trees = unless_unread(directory, &watch, trees)?;
    sync_all(directory)?;
    files::sync(files::parent(directory))?;
    Ok((trees, watch))
}

/// Lets go of a sled that has missed a part of its file, so that what it still does to it comes to nothing.
fn discard(directory: &Path, opened: Option<sled::Db>, watch: ReadWatch) {
    if let Some(opened) = opened {
        // sled flushes when its last handle goes, and may wait for ever for a write that is refused.
        let discard = std::thread::Builder::new().name("log-discard".to_owned());
        if let Err(error) = discard.spawn(move || drop(opened)) {
            tracing::warn!(%error, "cannot start a thread to close sled");
        }
    }
    // Threads of sled may be about to write until they have closed the file.
    if wait_until_unlocked(directory).is_err() {
        watch.keep();
    }
}

/// The outcome of a step, unless a read has failed: then all that it found may be due to that.
fn unless_unread<T>(
    directory: &Path,
    watch: &ReadWatch,
    outcome: Result<T, StorageError>,
) -> Result<T, StorageError> {
    watch.check().map_err(|error| unseen(directory, error))?;
    outcome
}

/// What a watch says: a read has failed, or what is read differs.
fn unseen(directory: &Path, error: io::Error) -> StorageError {
    let path = database(directory);
    match error.kind() {
        ErrorKind::InvalidData => StorageError::Corrupt { path, detail: error.to_string() },
        _ => unreadable(&path, error),
    }
}

/// How the names of sled's snapshots of its pages begin; what follows is the end of the log at that time.
const SNAPSHOT: &str = "snap.";

/// Whether `path`, in the directory of a log, is something of sled's. Anything else there is the file system's.
pub(crate) fn is_sleds(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    matches!(&*name, "db" | "conf" | "blobs") || name.starts_with(SNAPSHOT)
}

/// All that sled has in `directory`, in the order of names.
fn list(directory: &Path) -> Result<Vec<PathBuf>, StorageError> {
    let mut paths = files::list(directory)?;
    paths.retain(|path| is_sleds(path));
    Ok(paths)
}

/// sled's one file.
fn database(directory: &Path) -> PathBuf {
    directory.join("db")
}

/// Fails if any part of a file cannot be read.
fn read_through(path: &Path, progress: &StartProgress) -> Result<(), StorageError> {
    const CHUNK_BYTES: usize = 1024 * 1024;
    let read = || -> io::Result<()> {
        let mut file = File::open(path)?;
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            match file.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(bytes) => progress.add(bytes as u64),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    };
    read().map_err(|error| unreadable(path, error))
}

/// sled panics on some kinds of damage; that is an answer as well.
fn without_panic<T>(
    directory: &Path,
    work: impl FnOnce() -> Result<T, StorageError>,
) -> Result<T, StorageError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(StorageError::Corrupt {
            path: directory.to_owned(),
            detail: format!("sled panicked while opening it: {}", panic_message(&*panic)),
        })
    })
}

/// Whether an error means that the content is bad, rather than that the disk or its permissions are.
fn may_recreate(error: &StorageError) -> bool {
    match error {
        StorageError::Corrupt { .. } => true,
        StorageError::Io { source, .. } => {
            matches!(source.kind(), ErrorKind::UnexpectedEof | ErrorKind::InvalidData)
        }
        _ => false,
    }
}

fn sled_error(directory: &Path, error: sled::Error) -> StorageError {
    match error {
        sled::Error::Io(source) => io_error("sled cannot use", directory, words::io_error(source)),
        other => StorageError::Corrupt { path: directory.to_owned(), detail: words::words(&other) },
    }
}

/// Refuses a directory that another store has open.
pub(crate) fn wait_until_unlocked(directory: &Path) -> Result<(), StorageError> {
    /// A store closed a moment ago in this process: a thread of sled may hold on to its file for an instant.
    const PATIENCE: Duration = Duration::from_secs(2);
    const PAUSE: Duration = Duration::from_millis(2);
    let path = database(directory);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("cannot open", &path, error)),
    };
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => std::thread::sleep(PAUSE),
            Err(TryLockError::WouldBlock) => return Err(StorageError::InUse { path: directory.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(io_error("cannot lock", &path, error)),
        }
    }
}

/// sled's files in the directory and in those below it.
fn all_files(directory: &Path) -> Result<Vec<PathBuf>, StorageError> {
    let mut found = Vec::new();
    for path in list(directory)? {
        if files::is_directory(&path)? { found.extend(files::list(&path)?) } else { found.push(path) }
    }
    Ok(found)
}

/// Syncs the directory, then all files in it and in `blobs/`, then `blobs/`.
fn sync_all(directory: &Path) -> Result<(), StorageError> {
    files::sync(directory)?;
    let mut directories = Vec::new();
    for path in list(directory)? {
        if files::is_directory(&path)? { directories.push(path) } else { files::sync(&path)? }
    }
    for directory in directories {
        for path in files::list(&directory)? {
            files::sync(&path)?;
        }
        files::sync(&directory)?;
    }
    Ok(())
}

/// A log that is complete, and has not been written to yet.
struct Verified {
    trees: Trees,
    write_errors: WriteErrors,
    watch: ReadWatch,
    found: Found,
}

/// What a walk over all records has found.
struct Found {
    /// As stored.
    hard_state: HardState,
    tail: Tail,
    /// Index of an incomplete entry at the end.
    torn: Option<u64>,
    /// Where the log really ends.
    last: Option<LogId>,
}

/// Step 5.
fn verify(
    trees: &Trees,
    directory: &Path,
    options: &SledOptions,
    mark: Option<u64>,
) -> Result<Found, StorageError> {
    let corrupt = |detail: String| StorageError::Corrupt { path: directory.to_owned(), detail };
    let hard_state = stored_hard_state(trees, directory, mark)?;
    if let Some(mark) = mark
        && hard_state.sequence < mark
    {
        return Err(corrupt(format!(
            "sled has lost acknowledged writes: its ledger has sequence {}, but {mark} had been flushed",
            hard_state.sequence
        )));
    }
    let first = hard_state.first_index();
    options.progress.begin(StartStep::VerifyingLog, hard_state.next_index().saturating_sub(first));
    let mut last = hard_state.purged;
    let mut tail = Tail::new(options.tail_bytes);
    let mut torn = None;
    for run in Scan::from(&trees.log, first).map_err(|error| refuse(directory, error))? {
        let run = match run {
            Ok(run) => run,
            // Beyond what the hard state knows: the end of a flush that did not happen.
            Err(ScanError::Torn { index, .. })
                if index >= hard_state.next_index() && index == first_index(last) =>
            {
                torn = Some(index);
                break;
            }
            Err(error) => return Err(refuse(directory, error)),
        };
        let expected = first_index(last);
        let cut_by_purge = run.key.index < first && expected == first;
        if run.key.index != expected && !cut_by_purge {
            return Err(corrupt(format!("{} found where entry {expected} should be", run.key)));
        }
        if expected > first && last.is_some_and(|last| last.term != run.previous_term) {
            return Err(corrupt(format!("{} does not follow on the entry before it", run.key)));
        }
        for entry in run.entries.into_iter().skip_while(|entry| entry.log_id.index < first) {
            if entry.log_id.index > first && last.is_some_and(|last| last.term > entry.log_id.term) {
                return Err(corrupt(format!("the term decreases at entry {}", entry.log_id)));
            }
            last = Some(entry.log_id);
            options.progress.add(1);
            if hard_state.last.is_some_and(|known| known.index == entry.log_id.index && known != entry.log_id)
            {
                return Err(corrupt(format!("entry {} is not the one that was last", entry.log_id)));
            }
            tail.push(0, entry);
        }
        tail.settle(0);
    }
    if first_index(last) < hard_state.next_index() {
        return Err(corrupt(format!(
            "the log ends before entry {}, but went up to entry {}",
            first_index(last),
            hard_state.next_index() - 1
        )));
    }
    Ok(Found { hard_state, tail, torn, last })
}

fn stored_hard_state(trees: &Trees, directory: &Path, mark: Option<u64>) -> Result<HardState, StorageError> {
    let stored = trees.meta.get(hard_state::KEY).map_err(|error| sled_error(directory, error))?;
    let corrupt = |detail: String| StorageError::Corrupt { path: directory.to_owned(), detail };
    match stored {
        Some(bytes) => HardState::decode(&bytes).map_err(|error| match error {
            RecordError::Version { found, supported } => version(directory, found, supported),
            other => corrupt(format!("the ledger is damaged: {other}")),
        }),
        None if mark.is_none() && trees.log.is_empty() => Ok(HardState::default()),
        None => Err(corrupt("the ledger is missing".to_owned())),
    }
}

fn refuse(directory: &Path, error: ScanError) -> StorageError {
    match error {
        ScanError::Sled(error) => sled_error(directory, error),
        ScanError::Record { error: RecordError::Version { found, supported }, .. } => {
            version(directory, found, supported)
        }
        other => StorageError::Corrupt { path: directory.to_owned(), detail: other.to_string() },
    }
}

fn version(directory: &Path, found: u8, supported: u8) -> StorageError {
    StorageError::Version { path: PathBuf::from(directory), found: found.into(), supported: supported.into() }
}

/// Removes the parts of an incomplete entry, the last one first.
fn cut(trees: &Trees, index: u64) -> Result<(), sled::Error> {
    let parts = trees.log.range(Key::first(index).encode()..).keys().collect::<Result<Vec<_>, _>>()?;
    for key in parts.iter().rev() {
        trees.log.remove(key)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn what_cannot_be_read_is_named() {
        // Nothing is mapped at its beginning.
        let path = Path::new("/proc/self/mem");
        let error = read_through(path, &StartProgress::default()).unwrap_err();
        assert!(matches!(error, StorageError::Unreadable { path: named, .. } if named == path));
    }
}
