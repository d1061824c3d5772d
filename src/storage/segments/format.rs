//! The bytes of a segment file; `docs/FORMAT.md` has the layout.
//!
//! A head, then records up to the end of the file. The *chain* is the checksum of the newest record: the next one's
//! checksum begins with it.

use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"QUORSEGM";
pub(super) const VERSION: u32 = 1;

/// Bytes of a file before its first record.
pub(super) const HEAD_BYTES: u64 = 28;
/// Bytes of a record before its payload.
pub(super) const RECORD_HEAD_BYTES: usize = 28;
/// No payload is longer than this.
pub(super) const MAX_PAYLOAD_BYTES: usize = 64 * 1024 * 1024;

/// Ends the name of a segment file.
const EXTENSION: &str = ".segment";
/// Hexadecimal digits of the first key, before that.
const NAME_DIGITS: usize = 16;

/// The file whose first record has this key. The order of names is the order of keys.
pub(in crate::storage) fn path_of(dir: &Path, first_key: u64) -> PathBuf {
    dir.join(format!("{first_key:016x}{EXTENSION}"))
}

/// The first key by the name of a file; `None` if it is no segment's.
pub(super) fn key_of(path: &Path) -> Option<u64> {
    let digits = path.file_name()?.to_str()?.strip_suffix(EXTENSION)?;
    let plain = digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    let key = u64::from_str_radix(digits, 16).ok()?;
    (plain && digits.len() == NAME_DIGITS).then_some(key)
}

/// How a segment file begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileHead {
    pub(super) version: u32,
    /// What the first record's checksum begins with: the chain at the end of the file before.
    pub(super) base: u32,
    pub(super) first_key: u64,
}

impl FileHead {
    pub(super) fn encode(self) -> [u8; HEAD_BYTES as usize] {
        let mut bytes = [0; HEAD_BYTES as usize];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.base.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.first_key.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[..24]);
        bytes[24..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// `None` if these bytes are no head of any version.
    pub(super) fn decode(bytes: &[u8; HEAD_BYTES as usize]) -> Option<Self> {
        if &bytes[..8] != MAGIC || u32_at(bytes, 24) != crc32fast::hash(&bytes[..24]) {
            return None;
        }
        Some(Self { version: u32_at(bytes, 8), base: u32_at(bytes, 12), first_key: u64_at(bytes, 16) })
    }
}

/// What stands before a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordHead {
    pub(super) checksum: u32,
    pub(super) payload_bytes: usize,
    pub(super) key: u64,
    pub(super) time_ms: u64,
    pub(super) count: u32,
}

impl RecordHead {
    /// `None` if there is no such record: the checksum is not looked at yet.
    pub(super) fn decode(bytes: &[u8; RECORD_HEAD_BYTES]) -> Option<Self> {
        let payload_bytes = u32_at(bytes, 4) as usize;
        (payload_bytes <= MAX_PAYLOAD_BYTES).then(|| Self {
            checksum: u32_at(bytes, 0),
            payload_bytes,
            key: u64_at(bytes, 8),
            time_ms: u64_at(bytes, 16),
            count: u32_at(bytes, 24),
        })
    }

    /// Bytes of the whole record.
    pub(super) fn bytes(&self) -> usize {
        RECORD_HEAD_BYTES + self.payload_bytes
    }
}

/// Appends a record to `buffer`, and returns the new chain.
pub(super) fn encode_record(
    buffer: &mut Vec<u8>,
    chain: u32,
    key: u64,
    count: u32,
    time_ms: u64,
    payload: &[u8],
) -> u32 {
    let begin = buffer.len();
    let length = u32::try_from(payload.len()).expect("invariant: a payload is at most 64 MiB");
    buffer.extend_from_slice(&[0; 4]);
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(&key.to_le_bytes());
    buffer.extend_from_slice(&time_ms.to_le_bytes());
    buffer.extend_from_slice(&count.to_le_bytes());
    buffer.extend_from_slice(payload);
    let checksum = chained(chain, &buffer[begin..]);
    buffer[begin..begin + 4].copy_from_slice(&checksum.to_le_bytes());
    checksum
}

/// The checksum of a whole record that follows `chain`.
pub(super) fn chained(chain: u32, record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(chain);
    hasher.update(&record[4..]);
    hasher.finalize()
}

/// What comes next in some bytes of a segment.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NextRecord {
    /// A record that begins here.
    Record(RecordHead),
    /// As far as can be seen, a record of so many bytes begins here, and more of it is needed.
    Needs(usize),
    /// There is none that follows `chain`.
    Invalid,
}

/// Looks at the record that begins with `bytes` and follows `chain`.
pub(super) fn next(bytes: &[u8], chain: u32) -> NextRecord {
    let Some(head) = bytes.first_chunk() else { return NextRecord::Needs(RECORD_HEAD_BYTES) };
    let Some(head) = RecordHead::decode(head) else { return NextRecord::Invalid };
    match bytes.get(..head.bytes()) {
        None => NextRecord::Needs(head.bytes()),
        Some(record) if chained(chain, record) == head.checksum => NextRecord::Record(head),
        Some(_) => NextRecord::Invalid,
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("invariant: four bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("invariant: eight bytes"))
}
