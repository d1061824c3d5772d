//! A log of records in checksummed files, of which old ones are dropped whole.
//!
//! A record is a key, a number of operations, a time and a payload. What they mean is its owner's matter. There is one
//! writer, [`SegmentLog`], and any number of [`SegmentReader`]s beside it.
//!
//! # Invariants
//! - What is left of the log has no gap: it loses whole files at its beginning, and everything from some record on at its end.
//! - No record is given out whose checksum does not match. Each checksum begins with the one before it, across files too, so
//!   that a record or a file from elsewhere does not fit.
//! - A new file is begun only when the one before it is durable. So only the newest file may end in the middle of a record.
//! - Where a file cannot be read, nothing on the disk is changed: that is not damage.
//! - A sync that failed is final for the writer.
//!
//! `docs/FORMAT.md` has the bytes. What it does not do: decide when to sync and how much to keep, or bring back what was cut.

mod catalogue;
mod format;
mod reader;
mod recovery;
#[cfg(test)]
mod tests;
mod writer;

use std::path::PathBuf;

use bytes::Bytes;

use crate::error::StorageError;

#[cfg(any(test, fuzzing))]
pub(super) use format::path_of;
pub(crate) use reader::SegmentReader;
pub(crate) use writer::SegmentLog;

/// How the files of a log are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentOptions {
    /// A file that would become larger is ended, and a new one begun. A file holds at least one record.
    pub segment_bytes: u64,
}

impl Default for SegmentOptions {
    fn default() -> Self {
        Self { segment_bytes: 16 * 1024 * 1024 }
    }
}

/// How much of a log to keep. Whole files go, and never the newest with something durable in it, so that somewhat more may stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KeepLimits {
    /// Operations, by the sum of what records count; `u64::MAX` for no limit.
    pub max_count: u64,
    /// Bytes of the files; `u64::MAX` for no limit.
    pub max_bytes: u64,
    /// What is older goes, in milliseconds; 0 for no limit.
    pub max_age_ms: u64,
    /// Records with this key and later ones stay nevertheless, for somebody who needs them; `u64::MAX` for nobody.
    pub held_from: u64,
    /// As long as the files have no more bytes than this.
    pub max_held_bytes: u64,
}

impl KeepLimits {
    /// All of it.
    const ALL: Self = Self {
        max_count: u64::MAX,
        max_bytes: u64::MAX,
        max_age_ms: 0,
        held_from: u64::MAX,
        max_held_bytes: 0,
    };
}

/// What a log holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct SegmentReach {
    /// Key of the first record.
    pub first_key: Option<u64>,
    /// Key of the last record.
    pub last_key: Option<u64>,
    /// Number of records.
    pub records: u64,
    /// Operations, by the sum of what records count.
    pub count: u64,
    /// Bytes of the files.
    pub bytes: u64,
}

/// One record, as it was appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SegmentRecord {
    pub key: u64,
    /// Operations that it holds.
    pub count: u32,
    pub time_ms: u64,
    /// May share memory with the records beside it: who keeps one for long copies it.
    pub payload: Bytes,
}

/// Opening the log found an end that was not a record's, and cut it there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Key of the last record before the cut, which is the last that is left; `None` if none is.
    pub at_key: Option<u64>,
    pub reason: CutReason,
    /// Where it was cut: the file, and the byte in it.
    pub path: PathBuf,
    pub offset: u64,
    /// Bytes of files that were given up.
    pub bytes: u64,
}

/// Why a log was cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CutReason {
    /// The newest file ended within a record, or in bytes that are none: as a crash leaves what was not synced. Damage to that
    /// file looks the same.
    TornTail,
    /// A file that was durable is damaged or missing.
    Damage,
}

/// Why records could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadSegmentsError {
    /// The records were purged or cleared while they were looked for.
    #[error("these records were removed while they were read; the first that is left is {}",
        first_key.map_or_else(|| "none".to_owned(), |key| key.to_string()))]
    Purged {
        /// Key of the first record that is left.
        first_key: Option<u64>,
    },
    /// A record is not what was written.
    #[error("{} is damaged at byte {offset}: the log is cut there when it is opened again", path.display())]
    Damaged { path: PathBuf, offset: u64 },
    /// A file could not be read. That says nothing about what it holds.
    #[error(transparent)]
    Storage(#[from] StorageError),
}
