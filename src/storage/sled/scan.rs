//! Walks the records of sled's `log` tree in order and gives back entries.
//!
//! Both recovery and reads use it, so that both check the same things: every checksum, the order of keys,
//! and that the parts of a large entry are all there. Whether there is a hole *between* records is for the
//! caller to see: only it knows what has been purged.

use super::record::{Body, Key, Record, RecordError, decode_joined};
use super::words::words;
use crate::types::Entry;

/// The entries of one packed record, or the one entry that parts were joined to.
#[derive(Debug)]
pub(crate) struct EntryRun {
    /// Where the run begins.
    pub(crate) key: Key,
    /// Term of the entry before the first.
    pub(crate) previous_term: u64,
    /// At least one.
    pub(crate) entries: Vec<Entry>,
}

/// Why the walk stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScanError {
    /// sled failed.
    #[error("{}", words(.0))]
    Sled(#[from] sled::Error),
    /// A record is not what it should be.
    #[error("{key}: {error}")]
    Record {
        /// Where.
        key: Key,
        /// What is wrong.
        error: RecordError,
    },
    /// A key that no record has.
    #[error("key {0:02x?} belongs to no record")]
    Key(Vec<u8>),
    /// The log ends within a large entry: a crash did this, if nobody was promised that entry.
    #[error("entry {index} is incomplete: {found} of {parts} parts")]
    Torn {
        /// Its index.
        index: u64,
        /// Parts found, the first ones.
        found: u16,
        /// Parts there should be.
        parts: u16,
    },
}

/// An iterator over the runs of the log.
pub(crate) struct Scan {
    log: sled::Tree,
    records: sled::Iter,
}

impl Scan {
    /// Starts with the record that holds entry `index`, or else with the next one.
    pub(crate) fn from(log: &sled::Tree, index: u64) -> Result<Self, ScanError> {
        let start = match record_before(log, index)? {
            Some((key, record)) => {
                let holds_index = match Record::decode(key, &record).map(|record| record.body) {
                    Ok(Body::Packed(entries)) => key.index + entries.len() as u64 > index,
                    Ok(Body::Part { .. }) => false,
                    // What it holds is unknown; the walk will meet it and say so.
                    Err(_) => true,
                };
                if holds_index { Key::first(key.index) } else { Key::first(index) }
            }
            None => Key::first(index),
        };
        Ok(Self { log: log.clone(), records: log.range(start.encode()..) })
    }

    fn next_record(&mut self) -> Option<Result<(Key, sled::IVec), ScanError>> {
        loop {
            let next = self.records.next()?.and_then(|(key, record)| {
                age_cache(&self.log, &key, record.len())?;
                Ok((key, record))
            });
            let (key, record) = match next {
                Ok(pair) => pair,
                Err(error) => return Some(Err(error.into())),
            };
            match decode_key(&key) {
                Ok(key) if key.is_fence() => {}
                Ok(key) => return Some(Ok((key, record))),
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Reads the parts after the first one and joins all.
    fn join(&mut self, key: Key, parts: u16, first: &[u8]) -> Result<Entry, ScanError> {
        let refuse =
            |key, detail: &str| ScanError::Record { key, error: RecordError::Content(detail.to_owned()) };
        if key.part != 0 {
            return Err(refuse(key, "the parts before it are missing"));
        }
        let mut joined = first.to_vec();
        for part in 1..parts {
            let Some(next) = self.next_record() else {
                return Err(ScanError::Torn { index: key.index, found: part, parts });
            };
            let (found, record) = next?;
            if found != (Key { index: key.index, part }) {
                return Err(refuse(found, &format!("part {part} of entry {} should be here", key.index)));
            }
            match decode(found, &record)?.body {
                Body::Part { parts: same, bytes } if same == parts => joined.extend_from_slice(bytes),
                _ => return Err(refuse(found, "it does not belong to the part before it")),
            }
        }
        decode_joined(key.index, &joined).map_err(|error| ScanError::Record { key, error })
    }

    fn run(&mut self, key: Key, record: &[u8]) -> Result<EntryRun, ScanError> {
        let record = decode(key, record)?;
        let entries = match record.body {
            Body::Packed(entries) => entries,
            Body::Part { parts, bytes } => vec![self.join(key, parts, bytes)?],
        };
        Ok(EntryRun { key, previous_term: record.previous_term, entries })
    }
}

impl Iterator for Scan {
    type Item = Result<EntryRun, ScanError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.next_record()?;
        Some(next.and_then(|(key, record)| self.run(key, &record)))
    }
}

/// Lets sled notice what it has in memory, after the record `key` of so many bytes was written or read.
///
/// It looks at the size of its cache only after 64 accesses to the pages of one of 256 parts. A log that is written, or read from
/// end to end, accesses a leaf a dozen times, and each leaf falls into another part: more than a thousand leaves, hundreds of
/// megabytes of large records, were never given up. Looking at what was just written or read, more often the larger it is, makes up
/// the number at a microsecond each.
pub(crate) fn age_cache(log: &sled::Tree, key: &[u8], bytes: usize) -> Result<(), sled::Error> {
    /// One access for so many bytes: a leaf of four full records is accessed 64 times.
    const ACCESS_BYTES: usize = 4 * 1024;
    for _ in 0..bytes / ACCESS_BYTES {
        log.get(key)?;
    }
    Ok(())
}

/// The last record that begins before entry `index`.
pub(crate) fn record_before(log: &sled::Tree, index: u64) -> Result<Option<(Key, sled::IVec)>, ScanError> {
    for pair in log.range(..Key::first(index).encode()).rev() {
        let (key, record) = pair?;
        let key = decode_key(&key)?;
        if !key.is_fence() {
            return Ok(Some((key, record)));
        }
    }
    Ok(None)
}

pub(crate) fn decode_key(key: &[u8]) -> Result<Key, ScanError> {
    Key::decode(key).ok_or_else(|| ScanError::Key(key.to_vec()))
}

fn decode(key: Key, record: &[u8]) -> Result<Record<'_>, ScanError> {
    Record::decode(key, record).map_err(|error| ScanError::Record { key, error })
}
