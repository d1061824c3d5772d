//! The one writer of a log of segments.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::catalogue::{
    INDEX_BYTES, IndexEntry, KeptSegment, SegmentCatalogue, SegmentTally, SharedSegments,
};
use super::format::{self, FileHead, HEAD_BYTES, MAX_PAYLOAD_BYTES, RECORD_HEAD_BYTES, VERSION};
use super::{Cut, KeepLimits, SegmentOptions, SegmentReach, SegmentReader, recovery};
use crate::error::StorageError;
use crate::runtime;
use crate::storage::files::{self, io_error};

/// Its existence means nothing; the lock on it does.
const LOCK: &str = "lock";

/// Buffered records are written before more are taken once they are as many bytes.
const BUFFER_BYTES: usize = 256 * 1024;

/// A segment is to be at most this part of what is kept: what is kept beyond the limits is no more than that.
const PARTS: u64 = 16;

/// What a log asks of the operating system to make its records durable. Tests have it fail.
pub(super) trait SegmentDisk: Send {
    fn write(&mut self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    fn sync(&mut self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    fn sync_directory(&mut self, path: &Path) -> Result<(), StorageError> {
        files::sync(path)
    }

    fn create(&mut self, path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)
    }

    fn remove(&mut self, path: &Path) -> Result<(), StorageError> {
        files::remove(path)
    }
}

struct RealDisk;

impl SegmentDisk for RealDisk {}

/// A log on disk: appends at its end, purges at its beginning. Every call but [`reach`](Self::reach) and
/// [`reader`](Self::reader) may wait for the disk.
///
/// A failed write, of a full disk for example, loses nothing that was taken: a record whose append failed was not taken, and
/// those before it stay buffered until they can be written. A failed sync is final: every later call fails. What is
/// buffered when the log is dropped is lost.
pub(crate) struct SegmentLog {
    dir: PathBuf,
    _lock: File,
    options: SegmentOptions,
    /// Those of the last purge.
    limits: KeepLimits,
    disk: Box<dyn SegmentDisk>,
    shared: Arc<SharedSegments>,
    /// The segment that is being written.
    newest: Option<NewestSegment>,
    /// Whether the next record begins a new segment in any case.
    is_due: bool,
    last_key: Option<u64>,
    /// Checksum of the last record.
    pub(super) chain: u32,
    next_id: u64,
    /// Files that were purged, and are still to be removed, in this order.
    purged: VecDeque<PathBuf>,
    /// Whether a sync has failed.
    has_failed: bool,
}

struct NewestSegment {
    id: u64,
    path: PathBuf,
    file: Arc<File>,
    base: u32,
    first_key: u64,
    /// With what is buffered.
    tally: SegmentTally,
    /// Without. Zeros for a segment that readers have not seen yet.
    published: SegmentTally,
    /// What the next write goes on with, at `written`.
    buffer: Vec<u8>,
    written: u64,
    is_dirty: bool,
    /// Whether some of its records are.
    is_durable: bool,
    /// Entries for records in the buffer.
    index: Vec<IndexEntry>,
    /// Offset of the last entry.
    indexed: u64,
}

impl SegmentLog {
    /// Opens or creates the log in the directory, which is created if need be and which nothing else uses. All of the log is
    /// read. It is cut before the first record that is damaged, durably, and the second value says so: what followed is given
    /// up, so that what is left has no gap.
    ///
    /// # Errors
    /// [`StorageError::InUse`] if it is open already, [`StorageError::Version`] if a later version wrote a part of it, and
    /// [`StorageError::Unreadable`] if a file cannot be read: in each of these cases nothing was changed.
    pub(crate) fn open(dir: &Path, options: SegmentOptions) -> Result<(Self, Option<Cut>), StorageError> {
        Self::open_on(dir, options, Box::new(RealDisk))
    }

    pub(super) fn open_on(
        dir: &Path,
        options: SegmentOptions,
        disk: Box<dyn SegmentDisk>,
    ) -> Result<(Self, Option<Cut>), StorageError> {
        files::create_directory(dir)?;
        let lock = lock(dir)?;
        let scanned = recovery::scan(dir, random_chain())?;
        scanned.settle(dir)?;
        let recovery::ScannedSegments { mut segments, chain, cut, .. } = scanned;
        let next_id = segments.len() as u64;
        let last_key = segments.last().map(|segment| segment.tally.last_key);
        let newest = segments.last_mut().map(NewestSegment::go_on).transpose()?;
        let mut catalogue = SegmentCatalogue::default();
        segments.into_iter().for_each(|segment| catalogue.push(segment));
        let log = Self {
            dir: dir.to_owned(),
            _lock: lock,
            options,
            limits: KeepLimits::ALL,
            disk,
            shared: SharedSegments::new(catalogue),
            newest,
            is_due: false,
            last_key,
            chain,
            next_id,
            purged: VecDeque::new(),
            has_failed: false,
        };
        Ok((log, cut))
    }

    /// Appends one record, which holds `count` operations. Keys may have gaps. It is buffered; once 256 KiB are, the next append
    /// writes them first. A new segment is begun only after the one before it was made durable.
    ///
    /// # Errors
    /// When what came before cannot be written, or a new segment not begun: the record was not taken, and may be appended again.
    /// When a payload is longer than 64 MiB.
    ///
    /// # Panics
    /// When `key` is not larger than every key before it.
    pub(crate) fn append(
        &mut self,
        key: u64,
        count: u32,
        time_ms: u64,
        payload: &[u8],
    ) -> Result<(), StorageError> {
        self.check()?;
        assert!(self.last_key.is_none_or(|last| key > last), "invariant: keys of records rise");
        if payload.len() > MAX_PAYLOAD_BYTES {
            let error = io::Error::new(ErrorKind::InvalidInput, "a record of more than 64 MiB");
            return Err(io_error("cannot append to", &self.dir, error));
        }
        let bytes = RECORD_HEAD_BYTES + payload.len();
        if self.newest.as_ref().is_some_and(|newest| self.is_complete(newest, bytes as u64)) {
            self.close()?;
        } else if self.newest.as_ref().is_some_and(|newest| newest.buffer.len() >= BUFFER_BYTES) {
            self.flush()?;
        }
        let (chain, newest) = (self.chain, self.newest(key)?);
        if newest.tally.end - newest.indexed >= INDEX_BYTES {
            newest.indexed = newest.tally.end;
            newest.index.push(IndexEntry { key, offset: newest.indexed, chain });
        }
        let chain = format::encode_record(&mut newest.buffer, chain, key, count, time_ms, payload);
        newest.tally.add(key, count, time_ms, bytes);
        self.chain = chain;
        self.last_key = Some(key);
        Ok(())
    }

    /// Hands what is buffered to the operating system: readers see it. It is not durable yet.
    ///
    /// # Errors
    /// When it cannot be written. It stays buffered, and readers see none of it.
    pub(crate) fn flush(&mut self) -> Result<(), StorageError> {
        self.check()?;
        let Some(newest) = self.newest.as_mut().filter(|newest| !newest.buffer.is_empty()) else {
            return Ok(());
        };
        newest.is_dirty = true;
        if let Err(error) = self.disk.write(&newest.file, &newest.buffer, newest.written) {
            // A part of it may be there. It would be written over; until then it only takes room.
            let _ = newest.file.set_len(newest.written);
            return Err(io_error("cannot write to", &newest.path, error));
        }
        newest.written += newest.buffer.len() as u64;
        newest.buffer.clear();
        newest.buffer.shrink_to(BUFFER_BYTES);
        newest.publish(&self.shared);
        Ok(())
    }

    /// Makes all that was appended durable, and lets readers see it.
    ///
    /// # Errors
    /// When it cannot be written: it stays buffered. When the sync fails: then this and every later call fails, since the
    /// operating system may have dropped what it could not write.
    pub(crate) fn sync(&mut self) -> Result<(), StorageError> {
        self.flush()?;
        let Some(newest) = self.newest.as_mut().filter(|newest| newest.is_dirty) else { return Ok(()) };
        if let Err(error) = self.disk.sync(&newest.file) {
            self.has_failed = true;
            return Err(io_error("cannot sync", &newest.path, error));
        }
        (newest.is_dirty, newest.is_durable) = (false, true);
        Ok(())
    }

    /// Removes the oldest segments while the log is beyond one of these limits. The newest one stays, and so does the one before
    /// it until something of the newest is durable: a crash must not leave nothing. New segments are begun often enough for
    /// these limits from now on: none takes more than a 16th of one, unless a single record does.
    ///
    /// # Errors
    /// When a file cannot be removed. It is no longer part of the log, and is removed later.
    pub(crate) fn keep(&mut self, limits: &KeepLimits, now_ms: u64) -> Result<(), StorageError> {
        self.check()?;
        self.limits = *limits;
        let too_old = |time_ms: u64, parts: u64| {
            limits.max_age_ms > 0 && time_ms.saturating_add(limits.max_age_ms / parts) < now_ms
        };
        self.is_due = self.newest.as_ref().is_some_and(|newest| too_old(newest.tally.oldest_ms, PARTS));
        let stays = match &self.newest {
            Some(newest) if newest.is_durable => newest.id,
            Some(newest) => newest.id.saturating_sub(1),
            None => self.next_id.saturating_sub(1),
        };
        loop {
            let reach = self.reach();
            let mut catalogue = self.shared.lock();
            let Some(oldest) = catalogue.oldest().filter(|oldest| oldest.id < stays) else { break };
            let is_beyond = reach.count > limits.max_count || reach.bytes > limits.max_bytes;
            if !is_beyond && !too_old(oldest.tally.newest_ms, 1) {
                break;
            }
            if oldest.tally.last_key >= limits.held_from && reach.bytes <= limits.max_held_bytes {
                break;
            }
            self.purged.extend(catalogue.pop_oldest().map(|oldest| oldest.path));
        }
        self.remove_purged()
    }

    /// Removes everything, durably. The next record may have any key.
    ///
    /// # Errors
    /// When a file cannot be removed. The log is empty nevertheless, but what is left of its files comes back if it is opened
    /// again before this or an append has succeeded.
    pub(crate) fn clear(&mut self) -> Result<(), StorageError> {
        self.check()?;
        if let Some(newest) = self.newest.take().filter(|newest| newest.published.records == 0) {
            self.purged.push_back(newest.path);
        }
        let mut catalogue = self.shared.lock();
        while let Some(oldest) = catalogue.pop_oldest() {
            self.purged.push_back(oldest.path);
        }
        drop(catalogue);
        self.is_due = false;
        self.last_key = None;
        self.chain = random_chain();
        // Whoever looks for the next of an old one must not find a new one.
        self.next_id += 1;
        self.remove_purged()
    }

    /// What the log holds, with what is buffered.
    pub(crate) fn reach(&self) -> SegmentReach {
        let mut reach = self.shared.lock().reach();
        if let Some(newest) = &self.newest {
            let (all, seen) = (&newest.tally, &newest.published);
            reach.first_key = reach.first_key.or(Some(newest.first_key));
            reach.last_key = Some(all.last_key);
            reach.records += all.records - seen.records;
            reach.count += all.count - seen.count;
            reach.bytes += all.end - seen.end;
        }
        reach
    }

    /// A reader of what is flushed.
    pub(crate) fn reader(&self) -> SegmentReader {
        SegmentReader::new(self.shared.clone())
    }

    fn check(&self) -> Result<(), StorageError> {
        if !self.has_failed {
            return Ok(());
        }
        let error = io::Error::other("a sync has failed before; check the disk and start again");
        Err(io_error("cannot go on with", &self.dir, error))
    }

    /// Whether a record of so many bytes belongs into the next segment.
    fn is_complete(&self, newest: &NewestSegment, bytes: u64) -> bool {
        let limits = &self.limits;
        let most_bytes = self.options.segment_bytes.min(limits.max_bytes / PARTS);
        self.is_due
            || newest.tally.end + bytes > most_bytes
            || newest.tally.count >= (limits.max_count / PARTS).max(1)
    }

    /// Ends the newest segment.
    fn close(&mut self) -> Result<(), StorageError> {
        self.sync()?;
        self.shared.lock().close();
        self.newest = None;
        self.is_due = false;
        Ok(())
    }

    /// The segment to append to. If there is none, one is begun that has `key` first.
    fn newest(&mut self, key: u64) -> Result<&mut NewestSegment, StorageError> {
        if self.newest.is_none() {
            self.remove_purged()?;
            let path = format::path_of(&self.dir, key);
            let created = self.disk.create(&path);
            let file = created.map_err(|error| io_error("cannot create", &path, error))?;
            self.sync_directory()?;
            let head = FileHead { version: VERSION, base: self.chain, first_key: key };
            self.newest = Some(NewestSegment {
                id: self.next_id,
                path,
                file: Arc::new(file),
                base: self.chain,
                first_key: key,
                tally: SegmentTally::empty(),
                published: SegmentTally::default(),
                buffer: head.encode().to_vec(),
                written: 0,
                is_dirty: true,
                is_durable: false,
                index: Vec::new(),
                indexed: HEAD_BYTES,
            });
            self.next_id += 1;
        }
        Ok(self.newest.as_mut().expect("invariant: there is one now"))
    }

    /// Removes the files of purged segments. One is gone durably before the next goes: were they to come back after a crash in
    /// another order, there would be a gap.
    fn remove_purged(&mut self) -> Result<(), StorageError> {
        while let Some(path) = self.purged.front() {
            self.disk.remove(path)?;
            self.sync_directory()?;
            self.purged.pop_front();
        }
        Ok(())
    }

    fn sync_directory(&mut self) -> Result<(), StorageError> {
        let outcome = self.disk.sync_directory(&self.dir);
        self.has_failed |= outcome.is_err();
        outcome
    }
}

impl NewestSegment {
    /// The last segment that was found, to be written further.
    fn go_on(segment: &mut KeptSegment) -> Result<Self, StorageError> {
        let opened = OpenOptions::new().read(true).write(true).open(&segment.path);
        let file = opened.map_err(|error| io_error("cannot open", &segment.path, error))?;
        let file = Arc::new(file);
        segment.file = Some(file.clone());
        Ok(Self {
            id: segment.id,
            path: segment.path.clone(),
            file,
            base: segment.base,
            first_key: segment.first_key,
            tally: segment.tally,
            published: segment.tally,
            buffer: Vec::new(),
            written: segment.tally.end,
            is_dirty: false,
            is_durable: true,
            index: Vec::new(),
            indexed: segment.index.last().map_or(HEAD_BYTES, |entry| entry.offset),
        })
    }

    /// Shows readers all that was written.
    fn publish(&mut self, shared: &SharedSegments) {
        let is_new = self.published.records == 0;
        self.published = self.tally;
        let index = std::mem::take(&mut self.index);
        let mut catalogue = shared.lock();
        if !is_new {
            return catalogue.grow(self.tally, index);
        }
        catalogue.push(KeptSegment {
            id: self.id,
            path: self.path.clone(),
            file: Some(self.file.clone()),
            base: self.base,
            first_key: self.first_key,
            tally: self.tally,
            index,
        });
    }
}

/// What the checksums of an empty log begin with: another number each time, so that remains of an earlier log do not fit.
fn random_chain() -> u32 {
    (runtime::random_u64() >> 32) as u32
}

fn lock(dir: &Path) -> Result<File, StorageError> {
    let path = dir.join(LOCK);
    let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = opened.map_err(|error| io_error("cannot open", &path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StorageError::InUse { path: dir.to_owned() }),
        Err(TryLockError::Error(error)) => Err(io_error("cannot lock", &path, error)),
    }
}
