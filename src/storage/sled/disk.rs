//! What the writer does to sled, one write after the other.
//!
//! sled recovers a prefix of the single inserts and removals made here. So each write is laid out such that
//! *every* prefix of it is a log in good order, and that nothing submitted later can survive without it:
//!
//! - an append is records in order; a large entry's parts are in order, so that only the last entry of the
//!   log can be incomplete;
//! - a vote or purge is in the hard state before any record submitted after it;
//! - a truncation lowers `last` in the hard state first, then removes records from the end backwards, then
//!   shortens the record that it cuts through: entries of before and after never stand side by side;
//! - purged records are removed only after a flush has made `purged` durable.
//!
//! What it does not do: decide when to flush, or recover from any error. After one, it must not be used again.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use crate::error::{StorageError, is_out_of_files};
use crate::storage::durable_log::{LogDisk, LogStats};
use crate::storage::files::unreadable;
use crate::types::{Entry, LogId, Vote};

use super::hard_state::{self, HardState};
use super::layout::Layout;
use super::marker::Marker;
use super::power::WriteErrors;
use super::reader::Reader;
use super::record::{Body, Key, Packed, Packer, Record};
use super::scan::{ScanError, age_cache, decode_key, record_before};
use super::words::words;
use super::{DISK_BYTES_BETWEEN_BLOB_CHECKS, DiskEvent, Observer};

/// Why a write did not become durable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("{}", words(.0))]
    Sled(#[from] sled::Error),
    #[error("the log was to be truncated after {}, but holds {found} there", .expected.map_or_else(|| "nothing".to_owned(), |log_id| log_id.to_string()))]
    OtherEntry { expected: Option<LogId>, found: LogId },
    #[error("cannot shorten the log: {0}")]
    Truncate(#[from] ScanError),
    #[error("a part of the log could not be written: {0}")]
    WriteBack(std::io::Error),
    #[error("cannot write the ready file: {0}")]
    Mark(std::io::Error),
    #[error("{0}")]
    Observer(std::io::Error),
    #[error("{} holds a file, and sled does not fsync those", .0.display())]
    Blob(PathBuf),
    #[error("cannot list {}: {}", .0.display(), .1)]
    List(PathBuf, std::io::Error),
}

/// sled's trees of one log.
#[derive(Debug, Clone)]
pub(crate) struct Trees {
    pub(crate) db: sled::Db,
    pub(crate) log: sled::Tree,
    pub(crate) meta: sled::Tree,
}

/// What a log is written to.
pub(crate) struct DiskFiles {
    pub(crate) trees: Trees,
    /// Of sled's one file.
    pub(crate) write_errors: WriteErrors,
    pub(crate) marker: Marker,
}

/// The log as it will be once everything written so far is flushed.
pub(crate) struct Disk {
    trees: Trees,
    write_errors: WriteErrors,
    blobs: PathBuf,
    marker: Marker,
    hard_state: HardState,
    layout: Layout,
    packer: Packer,
    /// The last entry given to the packer.
    pushed: Option<LogId>,
    /// The hard state holds a vote or purge that later records must not precede.
    hard_state_first: bool,
    /// Something was written that no flush covers yet.
    dirty: bool,
    /// Records of purged entries may be left.
    unswept: bool,
    bytes_until_blob_check: usize,
    observer: Option<Observer>,
    stats: Arc<LogStats>,
}

impl Disk {
    /// Takes over what recovery has found; `hard_state` is durable already.
    pub(crate) fn new(
        directory: &Path,
        files: DiskFiles,
        hard_state: HardState,
        observer: Option<Observer>,
        stats: Arc<LogStats>,
    ) -> Self {
        let DiskFiles { trees, write_errors, marker } = files;
        Self {
            trees,
            write_errors,
            blobs: blobs(directory),
            marker,
            pushed: hard_state.last,
            hard_state,
            layout: Layout::default(),
            packer: Packer::default(),
            hard_state_first: false,
            dirty: false,
            unswept: true,
            bytes_until_blob_check: DISK_BYTES_BETWEEN_BLOB_CHECKS,
            observer,
            stats,
        }
    }
}

impl LogDisk for Disk {
    type Reader = Reader;
    type Error = DiskError;

    fn append(&mut self, entries: &[Entry]) -> Result<(), DiskError> {
        let mut packer = std::mem::take(&mut self.packer);
        for entry in entries {
            let previous_term = self.pushed.map_or(0, |previous| previous.term);
            packer.push(entry, previous_term, &mut |packed| self.store(packed))?;
            self.pushed = Some(entry.log_id);
        }
        self.packer = packer;
        self.stats.entries.fetch_add(entries.len() as u64, Relaxed);
        Ok(())
    }

    fn save_vote(&mut self, vote: Vote) -> Result<(), DiskError> {
        self.finish_record()?;
        self.hard_state.vote = Some(vote);
        self.hard_state_first = true;
        Ok(())
    }

    fn truncate(&mut self, from: u64, last: Option<LogId>) -> Result<(), DiskError> {
        self.finish_record()?;
        let log = self.trees.log.clone();
        let cut = record_before(&log, from)?;
        let cut = match &cut {
            None => None,
            Some((key, record)) => {
                let decoded = Record::decode(*key, record);
                Some(decoded.map_err(|error| ScanError::Record { key: *key, error })?)
            }
        };
        if let Some(Record { body: Body::Packed(entries), .. }) = &cut
            && from > self.hard_state.first_index()
            && let Some(found) = entries.iter().map(|entry| entry.log_id).find(|id| id.index + 1 == from)
            && Some(found) != last
        {
            return Err(DiskError::OtherEntry { expected: last, found });
        }
        self.hard_state.last = last;
        self.pushed = last;
        self.write_hard_state()?;
        let doomed = log.range(Key::first(from).encode()..).keys().collect::<Result<Vec<_>, _>>()?;
        for key in doomed.iter().rev() {
            self.remove(key)?;
        }
        self.layout.reset();
        let Some(record) = cut else { return Ok(()) };
        match record.body {
            Body::Packed(entries) if entries.last().is_some_and(|last| last.log_id.index >= from) => {
                let mut packer = Packer::default();
                let mut previous_term = record.previous_term;
                for entry in entries.iter().take_while(|entry| entry.log_id.index < from) {
                    packer.push(entry, previous_term, &mut |packed| self.put(&packed))?;
                    previous_term = entry.log_id.term;
                }
                packer.finish(&mut |packed| self.put(&packed))
            }
            _ => Ok(()),
        }
    }

    fn purge(&mut self, upto: LogId) -> Result<(), DiskError> {
        self.finish_record()?;
        self.hard_state.purged = Some(upto);
        if self.hard_state.last.is_none_or(|last| last.index <= upto.index) {
            self.hard_state.last = Some(upto);
            self.pushed = Some(upto);
            self.layout.reset();
        }
        self.hard_state_first = true;
        self.unswept = true;
        Ok(())
    }

    fn flush(&mut self, committed: Option<LogId>) -> Result<(), DiskError> {
        self.finish_record()?;
        if !self.dirty && !self.hard_state_first {
            return Ok(());
        }
        let in_log =
            |committed: &LogId| self.hard_state.last.is_some_and(|last| committed.index <= last.index);
        if committed.as_ref().is_none_or(in_log) {
            self.hard_state.committed = committed;
        }
        self.write_hard_state()?;
        let start = Instant::now();
        self.observe(DiskEvent::Flush)?;
        self.trees.db.flush()?;
        self.write_errors.check().map_err(DiskError::WriteBack)?;
        self.stats.flushed(start.elapsed());
        // After the flush, so that the mark never promises more than is durable.
        self.marker.mark(self.hard_state.sequence).map_err(DiskError::Mark)?;
        self.dirty = false;
        if self.bytes_until_blob_check == 0 {
            match check_blobs(&self.blobs) {
                // Checked again at the next flush.
                Err(DiskError::List(_, error)) if is_out_of_files(&error) => return Ok(()),
                checked => checked?,
            }
            self.bytes_until_blob_check = DISK_BYTES_BETWEEN_BLOB_CHECKS;
        }
        Ok(())
    }

    /// Flushes what a sweep has removed.
    fn close(&mut self) -> Result<(), DiskError> {
        self.observe(DiskEvent::Flush)?;
        self.trees.db.flush()?;
        self.write_errors.check().map_err(DiskError::WriteBack)
    }

    fn unswept(&self) -> bool {
        self.unswept
    }

    /// Removes some records that hold purged entries only; call it when nothing is dirty. The removals become
    /// durable with the next flush: until then they are merely repeated after a crash.
    fn sweep(&mut self) -> Result<(), DiskError> {
        /// Removals at a time: what an append may have to wait for.
        const SWEEP_RECORDS: usize = 512;
        let first_kept = self.hard_state.first_index();
        let log = &self.trees.log;
        let mut doomed = Vec::new();
        let mut candidate: Option<sled::IVec> = None;
        self.unswept = false;
        for key in log.iter().keys() {
            let key = key?;
            let decoded = decode_key(&key)?;
            let begins = decoded.index;
            if decoded.is_fence() {
                // It stands after the entry that it names.
                if begins < first_kept {
                    doomed.push(key);
                    continue;
                }
                break;
            }
            // A record ends where the next one begins.
            if begins > first_kept {
                candidate = None;
                break;
            }
            doomed.extend(candidate.take());
            if begins == first_kept {
                break;
            }
            if doomed.len() >= SWEEP_RECORDS {
                self.unswept = true;
                break;
            }
            candidate = Some(key);
        }
        if self.hard_state.next_index() == first_kept {
            doomed.extend(candidate);
        }
        for key in doomed {
            self.remove(&key)?;
        }
        Ok(())
    }
}

impl Disk {
    fn finish_record(&mut self) -> Result<(), DiskError> {
        let mut packer = std::mem::take(&mut self.packer);
        packer.finish(&mut |packed| self.store(packed))?;
        self.packer = packer;
        Ok(())
    }

    /// Writes a record of appended entries.
    fn store(&mut self, packed: Packed) -> Result<(), DiskError> {
        if self.hard_state_first {
            self.write_hard_state()?;
        }
        for boundary in self.layout.record(packed.key.index, packed.record.len()) {
            for fence in Layout::fences(boundary) {
                let key = fence.encode();
                self.observe(DiskEvent::Insert(&key, &[]))?;
                self.trees.log.insert(key, &[])?;
            }
        }
        self.put(&packed)?;
        if packed.last.is_some() {
            self.hard_state.last = packed.last;
        }
        Ok(())
    }

    fn put(&mut self, packed: &Packed) -> Result<(), DiskError> {
        let key = packed.key.encode();
        self.observe(DiskEvent::Insert(&key, &packed.record))?;
        self.trees.log.insert(key, packed.record.as_slice())?;
        age_cache(&self.trees.log, &key, packed.record.len())?;
        self.dirty = true;
        self.bytes_until_blob_check = self.bytes_until_blob_check.saturating_sub(packed.record.len());
        self.stats.bytes_written.fetch_add(packed.record.len() as u64, Relaxed);
        Ok(())
    }

    fn remove(&self, key: &[u8]) -> Result<(), DiskError> {
        self.observe(DiskEvent::Remove(key))?;
        self.trees.log.remove(key)?;
        Ok(())
    }

    fn observe(&self, event: DiskEvent<'_>) -> Result<(), DiskError> {
        match &self.observer {
            None => Ok(()),
            Some(observer) => observer(event).map_err(DiskError::Observer),
        }
    }

    fn write_hard_state(&mut self) -> Result<(), DiskError> {
        self.hard_state.sequence += 1;
        self.observe(DiskEvent::HardState(&self.hard_state.encode()))?;
        write_hard_state(&self.trees, &self.hard_state)?;
        self.hard_state_first = false;
        self.dirty = true;
        Ok(())
    }
}

pub(crate) fn write_hard_state(trees: &Trees, hard_state: &HardState) -> Result<(), sled::Error> {
    trees.meta.insert(hard_state::KEY, hard_state.encode().as_slice()).map(drop)
}

/// Bytes of `files` together.
pub(crate) fn length_bytes(files: &[PathBuf]) -> Result<u64, StorageError> {
    let length =
        |path: &PathBuf| fs::metadata(path).map(|file| file.len()).map_err(|error| unreadable(path, error));
    files.iter().map(length).sum()
}

/// Where sled keeps what is too large for its log.
pub(crate) fn blobs(directory: &Path) -> PathBuf {
    directory.join("blobs")
}

/// Checks that sled has put nothing where it does not fsync.
pub(crate) fn check_blobs(blobs: &Path) -> Result<(), DiskError> {
    let list = |error| DiskError::List(blobs.to_owned(), error);
    match fs::read_dir(blobs).map_err(list)?.next() {
        None => Ok(()),
        Some(Ok(_)) => Err(DiskError::Blob(blobs.to_owned())),
        Some(Err(error)) => Err(list(error)),
    }
}
