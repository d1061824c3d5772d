//! Where sled's log ends, found by reading it the way sled does.
//!
//! sled says nothing when its recovery ends early, and overwrites what it has not seen. So what it is about to do is compared with what
//! was read just before: it must not cut its log, nor note in a snapshot of its pages that the log ends, anywhere before the
//! end that is found here. The mark in the ready file cannot tell by itself: it may be a second old.
//!
//! # What is read
//! The header of each segment, then the newest segments message by message: from the last one that some header calls stable.
//! That is `pagecache/iterator.rs` of sled 0.34.7, with the difference that every error is one.
//!
//! What it does not do: look into messages, or at segments before those; [`recovery`](super::recovery) verifies every record.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::StorageError;
use crate::storage::files::unreadable;

use super::read_watch::LogEnd;
use super::recovery::SEGMENT_BYTES;

const SEGMENT: u64 = SEGMENT_BYTES as u64;
const HEADER_BYTES: usize = 20;
/// sled reads so much to begin with. What is beyond the end of the file counts as zeros.
const MESSAGE_HEADER_BYTES: usize = 128;
/// What a message's header may need: no message begins closer to the end of its segment.
const MAX_MESSAGE_HEADER_BYTES: u64 = 32;

/// The header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SegmentHeader {
    /// Where in the file it is.
    offset: u64,
    /// Position in the log of the segment's first byte.
    lsn: u64,
    /// Up to where the log was stable when the segment was begun.
    stable_lsn: u64,
}

/// Finds the end of the log in `db` that goes on after the `snapshot` of pages that sled will start from, 0 if there is none.
/// `None` if nothing complete is there.
///
/// # Errors
/// [`StorageError::Corrupt`] for a header that is damaged: its segment would be free to sled, and overwritten with zeros.
pub(crate) fn find(db: &Path, snapshot: u64) -> Result<Option<LogEnd>, StorageError> {
    let file = File::open(db).map_err(|error| unreadable(db, error))?;
    let headers = headers(&file).map_err(|error| unreadable(db, error))?.map_err(|offset| {
        let detail = format!("the header of the segment at byte {offset} is damaged");
        StorageError::Corrupt { path: db.to_owned(), detail }
    })?;
    walk(&file, headers, snapshot).map_err(|error| unreadable(db, error))
}

/// All valid headers, or the offset of one that is damaged.
///
/// A header lies within one sector, so a power cut leaves the old one, the new one, or zeros where there was none.
/// The last segment of the file is left to sled: the file may have grown by it and no further.
fn headers(file: &File) -> io::Result<Result<Vec<SegmentHeader>, u64>> {
    let length = file.metadata()?.len();
    let mut headers = Vec::new();
    for offset in (0..length).step_by(SEGMENT_BYTES) {
        if length - offset < HEADER_BYTES as u64 {
            break;
        }
        let mut bytes = [0; HEADER_BYTES];
        file.read_exact_at(&mut bytes, offset)?;
        let is_last = offset + SEGMENT >= length;
        match SegmentHeader::decode(offset, &bytes) {
            Some(header) => headers.push(header),
            None if is_last || bytes == [0; HEADER_BYTES] => {}
            None => return Ok(Err(offset)),
        }
    }
    Ok(Ok(headers))
}

impl SegmentHeader {
    fn decode(offset: u64, bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let (checksum, content) = bytes.split_at(4);
        let checksum = u32::from_le_bytes(checksum.try_into().expect("invariant: four bytes"));
        if !crc32fast::hash(content) != checksum {
            return None;
        }
        let (lsn, stable_lsn) = content.split_at(8);
        // Both are signed; -1 is the position before the log.
        let position = |bytes: &[u8]| {
            let stored = i64::from_le_bytes(bytes.try_into().expect("invariant: eight bytes"));
            u64::try_from(stored ^ i64::MAX).unwrap_or(0)
        };
        Some(Self { offset, lsn: position(lsn), stable_lsn: position(stable_lsn) })
    }
}

fn walk(file: &File, mut headers: Vec<SegmentHeader>, snapshot: u64) -> io::Result<Option<LogEnd>> {
    let from = snapshot / SEGMENT * SEGMENT;
    headers.retain(|header| header.lsn >= from);
    headers.sort_by_key(|header| header.lsn);
    let stable = headers.iter().map(|header| header.stable_lsn).fold(from, u64::max);
    let first = stable / SEGMENT * SEGMENT;
    let mut expected = first;
    let mut end = None;
    for header in headers.into_iter().filter(|header| header.lsn >= first) {
        if header.lsn != expected {
            break;
        }
        expected += SEGMENT;
        let (last, flow) = Segment::read(file, header)?.end();
        end = Some(LogEnd { lsn: header.lsn + last, offset: header.offset + last });
        if flow.is_break() {
            break;
        }
    }
    Ok(end)
}

/// A segment in memory; what the file does not have of it is zeros.
struct Segment {
    header: SegmentHeader,
    bytes: Vec<u8>,
    /// How much the file has of it.
    length: usize,
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SegmentMessage {
    /// Complete, so many bytes long.
    Complete(u64),
    /// The end of its segment.
    Cap,
    /// Torn, or nothing at all.
    None,
}

impl Segment {
    fn read(file: &File, header: SegmentHeader) -> io::Result<Self> {
        let mut bytes = vec![0; SEGMENT_BYTES];
        let mut length = 0;
        while length < bytes.len() {
            match file.read_at(&mut bytes[length..], header.offset + length as u64) {
                Ok(0) => break,
                Ok(read) => length += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self { header, bytes, length })
    }

    /// Where its messages end, counted from its beginning, and whether the log can go on in the next segment.
    fn end(&self) -> (u64, ControlFlow<()>) {
        let mut at = HEADER_BYTES as u64;
        loop {
            if at > SEGMENT - MAX_MESSAGE_HEADER_BYTES {
                return (at, ControlFlow::Continue(()));
            }
            match self.message(at as usize).unwrap_or(SegmentMessage::None) {
                SegmentMessage::Complete(bytes) => at += bytes,
                SegmentMessage::Cap => return (at, ControlFlow::Continue(())),
                SegmentMessage::None => return (at, ControlFlow::Break(())),
            }
        }
    }

    /// The message at `at`; `None` if it is cut off by the end of the file.
    fn message(&self, at: usize) -> Option<SegmentMessage> {
        const CORRUPTED: u8 = 0;
        const CAP: u8 = 2;
        const KINDS: u8 = 12;
        let mut rest = Varints(&self.bytes[at..(at + MESSAGE_HEADER_BYTES).min(SEGMENT_BYTES)]);
        let checksum = u32::from_le_bytes(rest.take(4)?.try_into().ok()?);
        let kind = rest.take(1)?[0];
        let (length, segment_number, _page) = (rest.integer()?, rest.integer()?, rest.integer()?);
        let header = at..SEGMENT_BYTES.min(at + MESSAGE_HEADER_BYTES) - rest.0.len();
        if kind == CORRUPTED || kind >= KINDS || length > (SEGMENT_BYTES - header.end) as u64 {
            return Some(SegmentMessage::None);
        }
        let body = header.end..header.end + length as usize;
        if body.len() > rest.0.len() && body.end > self.length {
            return None;
        }
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.bytes[body.clone()]);
        hasher.update(&self.bytes[header.start + 4..header.end]);
        if !hasher.finalize() != checksum || segment_number != self.header.lsn / SEGMENT {
            return Some(SegmentMessage::None);
        }
        Some(if kind == CAP { SegmentMessage::Cap } else { SegmentMessage::Complete((body.end - at) as u64) })
    }
}

/// sled's integers of variable length.
struct Varints<'a>(&'a [u8]);

impl<'a> Varints<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn integer(&mut self) -> Option<u64> {
        let first = self.take(1)?[0];
        Some(match first {
            0..=240 => u64::from(first),
            241..=248 => 240 + 256 * (u64::from(first) - 241) + u64::from(self.take(1)?[0]),
            249 => {
                let bytes = self.take(2)?;
                2288 + 256 * u64::from(bytes[0]) + u64::from(bytes[1])
            }
            250..=255 => {
                let mut little_endian = [0; 8];
                let bytes = self.take(usize::from(first) - 247)?;
                little_endian[..bytes.len()].copy_from_slice(bytes);
                u64::from_le_bytes(little_endian)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    const ENTRY_BYTES: usize = 50_000;

    /// A sled of some segments, and its file.
    fn written(directory: &Path, inserts: u64) -> PathBuf {
        let db = sled::Config::new()
            .path(directory)
            .segment_size(SEGMENT_BYTES)
            .flush_every_ms(None)
            .open()
            .unwrap();
        for key in 0..inserts {
            db.insert(key.to_be_bytes(), vec![key as u8; ENTRY_BYTES]).unwrap();
        }
        db.flush().unwrap();
        drop(db);
        // A thread of sled may hold on to its file for an instant.
        super::super::recovery::wait_until_unlocked(directory).unwrap();
        directory.join("db")
    }

    /// Where sled's newest snapshot says that its log ends.
    fn snapshot(directory: &Path) -> u64 {
        let names = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
        let name =
            names.filter_map(|name| name.to_str().map(str::to_owned)).find(|name| name.starts_with("snap."));
        u64::from_str_radix(&name.unwrap()[5..], 16).unwrap()
    }

    #[test]
    fn it_ends_where_sled_finds_it() {
        for inserts in [1, 10, 300, 700] {
            let dir = tempfile::tempdir().unwrap();
            let db = written(dir.path(), inserts);
            let from_the_beginning = find(&db, 0).unwrap().unwrap();
            written(dir.path(), 0); // opens it, and notes where it ended
            assert_eq!(from_the_beginning.lsn, snapshot(dir.path()), "after {inserts} inserts");
            let from_there = find(&db, from_the_beginning.lsn).unwrap().unwrap();
            assert_eq!(from_there, from_the_beginning);
        }
    }

    #[test]
    fn it_ends_at_the_first_damage() {
        let dir = tempfile::tempdir().unwrap();
        let db = written(dir.path(), 30);
        let whole = find(&db, 0).unwrap().unwrap();
        let mut bytes = std::fs::read(&db).unwrap();
        bytes[whole.offset as usize - ENTRY_BYTES / 2] ^= 1;
        std::fs::write(&db, &bytes).unwrap();
        let damaged = find(&db, 0).unwrap().unwrap();
        assert!(damaged.lsn < whole.lsn && damaged.lsn > whole.lsn - 2 * ENTRY_BYTES as u64);
        bytes.truncate(damaged.offset as usize - 10);
        std::fs::write(&db, &bytes).unwrap();
        assert!(find(&db, 0).unwrap().unwrap().lsn < damaged.lsn);
        std::fs::write(&db, b"").unwrap();
        assert_eq!(find(&db, 0).unwrap(), None);
    }

    #[test]
    fn a_damaged_header_is_refused_unless_it_is_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let db = written(dir.path(), 300);
        let bytes = std::fs::read(&db).unwrap();
        assert!(bytes.len() > SEGMENT_BYTES, "there are two");
        let damage = |offset: usize| {
            let mut damaged = bytes.clone();
            damaged[offset] ^= 1;
            std::fs::write(&db, damaged).unwrap();
            find(&db, 0)
        };
        assert!(matches!(damage(7), Err(StorageError::Corrupt { .. })));
        assert!(damage(bytes.len() / SEGMENT_BYTES * SEGMENT_BYTES + 7).is_ok());
    }

    #[test]
    fn integers_are_of_variable_length() {
        let cases: [(&[u8], Option<u64>); 8] = [
            (&[240], Some(240)),
            (&[241, 0], Some(240)),
            (&[248, 255], Some(2287)),
            (&[249, 0, 0], Some(2288)),
            (&[250, 1, 2, 3], Some(0x03_0201)),
            (&[255, 1, 0, 0, 0, 0, 0, 0, 0x80], Some(0x8000_0000_0000_0001)),
            (&[255, 1], None),
            (&[], None),
        ];
        for (bytes, expected) in cases {
            assert_eq!(Varints(bytes).integer(), expected, "{bytes:?}");
        }
    }
}
