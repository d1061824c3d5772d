//! What is in a directory of segments, and up to where it is a log.
//!
//! Everything is read before anything is changed, so that a file that cannot be read leaves all as it was.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::catalogue::{INDEX_BYTES, IndexEntry, KeptSegment, SegmentTally};
use super::format::{self, FileHead, HEAD_BYTES, NextRecord, VERSION, next};
use super::{Cut, CutReason};
use crate::error::StorageError;
use crate::storage::files::{self, io_error, unreadable};

/// Bytes read at once.
const PIECE_BYTES: usize = 1024 * 1024;

/// A log as it was found.
pub(super) struct ScannedSegments {
    /// Oldest first. Each continues the one before it.
    pub(super) segments: Vec<KeptSegment>,
    /// At the end of the last of them.
    pub(super) chain: u32,
    pub(super) cut: Option<Cut>,
    /// Files that are not part of it.
    excess: Vec<PathBuf>,
    /// Whether the last segment's file goes on after its last record.
    is_too_long: bool,
}

/// A file with the name of a segment.
struct FoundFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// `None` if it is not that of a segment with this name.
    head: Option<FileHead>,
}

impl FoundFile {
    fn open(path: PathBuf, first_key: u64, is_newest: bool) -> Result<Self, StorageError> {
        let file = File::open(&path).map_err(|error| unreadable(&path, error))?;
        if is_newest {
            refresh(&file).map_err(|error| io_error("cannot sync", &path, error))?;
        }
        let bytes = file.metadata().map_err(|error| unreadable(&path, error))?.len();
        let mut found = Self { path, file, bytes, head: None };
        if bytes < HEAD_BYTES {
            return Ok(found);
        }
        let mut head = [0; HEAD_BYTES as usize];
        found.file.read_exact_at(&mut head, 0).map_err(|error| unreadable(&found.path, error))?;
        let head = FileHead::decode(&head);
        if let Some(FileHead { version, .. }) = head
            && version != VERSION
        {
            return Err(StorageError::Version { path: found.path, found: version, supported: VERSION });
        }
        found.head = head.filter(|head| head.first_key == first_key);
        Ok(found)
    }
}

/// Has the disk say what it holds of the newest file. After a sync that failed, what is in the page cache may be nowhere
/// else; and what is found here must not be lost later.
fn refresh(file: &File) -> io::Result<()> {
    file.sync_all()?;
    // A file system that cannot do that has no cache of this kind.
    #[cfg(target_os = "linux")]
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
    Ok(())
}

/// Reads all of the log in `dir`, and changes nothing. `base` is the chain of an empty one.
pub(super) fn scan(dir: &Path, base: u32) -> Result<ScannedSegments, StorageError> {
    let listed = files::list(dir)?.into_iter();
    let listed: Vec<_> = listed.filter_map(|path| format::key_of(&path).map(|key| (path, key))).collect();
    let newest = listed.len().saturating_sub(1);
    let mut found = Vec::with_capacity(listed.len());
    // All heads before any record: one of another version says that none of this is ours to cut.
    for (number, (path, key)) in listed.into_iter().enumerate() {
        found.push(FoundFile::open(path, key, number == newest)?);
    }
    let mut scanned = ScannedSegments {
        segments: Vec::new(),
        chain: base,
        cut: None,
        excess: Vec::new(),
        is_too_long: false,
    };
    for (number, file) in found.iter().enumerate() {
        if let Some((kept, reason)) = scanned.add(file, number == newest)? {
            scanned.end(&found[number..], kept, reason);
            break;
        }
    }
    Ok(scanned)
}

impl ScannedSegments {
    /// Takes what follows the log so far. If that is not all of the file, how many bytes of it were taken, and why.
    fn add(&mut self, file: &FoundFile, is_newest: bool) -> Result<Option<(u64, CutReason)>, StorageError> {
        let reason = if is_newest { CutReason::TornTail } else { CutReason::Damage };
        let Some(head) = file.head else { return Ok(Some((0, reason))) };
        let before = self.segments.last();
        if before.is_some_and(|before| head.base != self.chain || head.first_key <= before.tally.last_key) {
            // It is whole; what it followed is missing.
            return Ok(Some((0, CutReason::Damage)));
        }
        let mut records = Records::new(file, head);
        let index = records.read_all()?;
        let Records { tally, chain, .. } = records;
        if tally.records == 0 {
            return Ok(Some((0, reason)));
        }
        let (id, path) = (self.segments.len() as u64, file.path.clone());
        let (base, first_key) = (head.base, head.first_key);
        self.segments.push(KeptSegment { id, path, file: None, base, first_key, tally, index });
        self.chain = chain;
        Ok((tally.end != file.bytes).then_some((tally.end, reason)))
    }

    /// The log ends after `kept` bytes of the first of these files.
    fn end(&mut self, rest: &[FoundFile], kept: u64, reason: CutReason) {
        self.is_too_long = kept > 0;
        let excess = if kept > 0 { &rest[1..] } else { rest };
        self.excess = excess.iter().map(|file| file.path.clone()).collect();
        let bytes = rest.iter().map(|file| file.bytes).sum::<u64>() - kept;
        // A file without anything after its head is what a crash leaves that came before its first record.
        if reason == CutReason::TornTail && kept == 0 && bytes <= HEAD_BYTES {
            return;
        }
        let at_key = self.segments.last().map(|segment| segment.tally.last_key);
        self.cut = Some(Cut { at_key, reason, path: rest[0].path.clone(), offset: kept, bytes });
    }

    /// Makes the disk hold this log and nothing else, durably. Interrupted, it leaves what the next scan cuts too.
    pub(super) fn settle(&self, dir: &Path) -> Result<(), StorageError> {
        if let Some(last) = self.segments.last().filter(|_| self.is_too_long) {
            let cut = || {
                let file = OpenOptions::new().write(true).open(&last.path)?;
                file.set_len(last.tally.end)?;
                file.sync_all()
            };
            cut().map_err(|error| io_error("cannot shorten", &last.path, error))?;
        }
        for path in &self.excess {
            files::remove(path)?;
        }
        // Also when nothing was changed: a crash may have come before the entry of the newest file was durable.
        files::sync(dir)
    }
}

/// Reads the records of one file, up to the first that is none.
struct Records<'a> {
    source: &'a FoundFile,
    first_key: u64,
    tally: SegmentTally,
    chain: u32,
}

impl<'a> Records<'a> {
    fn new(source: &'a FoundFile, head: FileHead) -> Self {
        Self { source, first_key: head.first_key, tally: SegmentTally::empty(), chain: head.base }
    }

    /// Returns their index.
    fn read_all(&mut self) -> Result<Vec<IndexEntry>, StorageError> {
        let (mut index, mut indexed) = (Vec::new(), HEAD_BYTES);
        let mut buffer = Vec::new();
        let mut needed = 0;
        loop {
            let left = self.source.bytes - self.tally.end;
            // A damaged length must not allocate more than there is to read.
            if left == 0 || needed as u64 > left {
                return Ok(index);
            }
            let length = PIECE_BYTES.max(needed).min(usize::try_from(left).unwrap_or(usize::MAX));
            buffer.resize(length, 0);
            let read = self.source.file.read_exact_at(&mut buffer, self.tally.end);
            read.map_err(|error| unreadable(&self.source.path, error))?;
            let mut at = 0;
            needed = loop {
                match next(&buffer[at..], self.chain) {
                    NextRecord::Record(head) if self.is_next(head.key) => {
                        if self.tally.end - indexed >= INDEX_BYTES {
                            indexed = self.tally.end;
                            index.push(IndexEntry { key: head.key, offset: indexed, chain: self.chain });
                        }
                        self.tally.add(head.key, head.count, head.time_ms, head.bytes());
                        self.chain = head.checksum;
                        at += head.bytes();
                    }
                    NextRecord::Needs(bytes) => break bytes,
                    NextRecord::Record(_) | NextRecord::Invalid => return Ok(index),
                }
            };
        }
    }

    fn is_next(&self, key: u64) -> bool {
        if self.tally.records == 0 { key == self.first_key } else { key > self.tally.last_key }
    }
}
