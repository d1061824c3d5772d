//! The bytes of a snapshot file; `docs/FORMAT.md` has the layout.
//!
//! Head with the meta data, then frames of payload, then a terminator with the payload's length and the
//! checksum of the whole file. Each frame has its own checksum, so that nothing damaged is ever given out;
//! the one over the whole file finds frames that are missing, repeated or exchanged.

use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Serialize, de::DeserializeOwned};

use super::{SnapshotMeta, SnapshotMetaV2, Source};
use crate::error::StorageError;
use crate::storage::files::unreadable;
use crate::types::Intents;

const MAGIC: &[u8; 8] = b"QUORSNAP";
/// Version 2 begins its payload with the table of sessions; the file is as before. Version 3 has more meta data. Version 4 has
/// [machines](SnapshotMeta::machines), and is written only where there is something to say of them: who does not read it
/// could not read what it holds.
const VERSION: u32 = 4;
/// The version that says nothing of machines.
const PLAIN_VERSION: u32 = 3;
/// The first version with clocks, history and quota in its meta data.
const FULL_META_SINCE: u32 = 3;
/// The oldest version this build reads.
const OLDEST_VERSION: u32 = 1;

/// Magic, version, length of the meta data.
const HEAD_BYTES: usize = 16;

/// Bytes of payload in the frames that this build writes, except for the last.
const FRAME_BYTES: usize = 256 * 1024;

/// No frame is longer than this.
const MAX_FRAME_BYTES: usize = 1024 * 1024;

/// No meta data is longer than this: thousands of members.
const MAX_META_BYTES: usize = 1024 * 1024;

/// A snapshot's version is not one that this build reads.
#[derive(Debug, thiserror::Error)]
#[error("snapshot {}, byte 8: it has version {found}, this build reads up to {VERSION}", .path.display())]
struct UnknownVersion {
    path: PathBuf,
    found: u32,
}

/// What an error says about the snapshot at `path` that was to be read.
pub(super) fn refuse(path: &Path, error: io::Error) -> StorageError {
    let path = path.to_owned();
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(UnknownVersion { found, .. }) => {
            StorageError::Version { path, found: *found, supported: VERSION }
        }
        None if error.kind() == ErrorKind::InvalidData => {
            StorageError::Corrupt { path, detail: error.to_string() }
        }
        None => unreadable(&path, error),
    }
}

/// Where encoded bytes go.
type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> io::Result<()>;

/// Turns a payload into a snapshot file.
pub(crate) struct Encoder {
    frame: Vec<u8>,
    payload_bytes: u64,
    whole: crc32fast::Hasher,
}

impl Encoder {
    pub(crate) fn begin(meta: &SnapshotMeta, sink: Sink<'_>) -> io::Result<Self> {
        let intents: Intents = meta.membership.intents().collect();
        let (version, meta) = match meta.machines.is_plain() {
            true => (PLAIN_VERSION, encode(&(meta, intents))),
            false => (VERSION, encode(&(meta, intents, &meta.machines))),
        };
        let length = u32::try_from(meta.len()).ok().filter(|_| meta.len() <= MAX_META_BYTES);
        let length =
            length.ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "the membership is too large"))?;
        let mut head = Vec::with_capacity(HEAD_BYTES + meta.len() + 4);
        head.extend_from_slice(MAGIC);
        head.extend_from_slice(&version.to_le_bytes());
        head.extend_from_slice(&length.to_le_bytes());
        head.extend_from_slice(&meta);
        head.extend_from_slice(&crc32fast::hash(&head).to_le_bytes());
        let mut encoder = Self {
            frame: Vec::with_capacity(FRAME_BYTES),
            payload_bytes: 0,
            whole: crc32fast::Hasher::new(),
        };
        encoder.emit(&head, sink)?;
        Ok(encoder)
    }

    pub(crate) fn write(&mut self, mut bytes: &[u8], sink: Sink<'_>) -> io::Result<()> {
        while !bytes.is_empty() {
            let (taken, rest) = bytes.split_at(bytes.len().min(FRAME_BYTES - self.frame.len()));
            self.frame.extend_from_slice(taken);
            bytes = rest;
            if self.frame.len() == FRAME_BYTES {
                self.end_frame(sink)?;
            }
        }
        Ok(())
    }

    pub(crate) fn finish(&mut self, sink: Sink<'_>) -> io::Result<()> {
        self.end_frame(sink)?;
        let mut end = [0; 16];
        end[4..12].copy_from_slice(&self.payload_bytes.to_le_bytes());
        self.whole.update(&end[..12]);
        end[12..].copy_from_slice(&self.whole.clone().finalize().to_le_bytes());
        sink(&end)
    }

    fn end_frame(&mut self, sink: Sink<'_>) -> io::Result<()> {
        if self.frame.is_empty() {
            return Ok(());
        }
        let length = u32::try_from(self.frame.len()).expect("invariant: a frame is at most 1 MiB");
        let length = length.to_le_bytes();
        let checksum = frame_checksum(length, &self.frame).to_le_bytes();
        let frame = std::mem::take(&mut self.frame);
        self.emit(&length, sink)?;
        self.emit(&checksum, sink)?;
        self.emit(&frame, sink)?;
        self.payload_bytes += frame.len() as u64;
        self.frame = frame;
        self.frame.clear();
        Ok(())
    }

    fn emit(&mut self, bytes: &[u8], sink: Sink<'_>) -> io::Result<()> {
        self.whole.update(bytes);
        sink(bytes)
    }
}

/// A file of `version` with this meta data and payload, whatever they are, and checksums that match.
#[cfg(any(test, fuzzing))]
pub(in crate::storage) fn sealed(version: u32, meta: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut sink = |bytes: &[u8]| {
        file.extend_from_slice(bytes);
        Ok(())
    };
    let mut head = [&MAGIC[..], &version.to_le_bytes(), &(meta.len() as u32).to_le_bytes(), meta].concat();
    head.extend_from_slice(&crc32fast::hash(&head).to_le_bytes());
    let mut encoder = Encoder { frame: Vec::new(), payload_bytes: 0, whole: crc32fast::Hasher::new() };
    encoder
        .emit(&head, &mut sink)
        .and_then(|()| encoder.write(payload, &mut sink))
        .and_then(|()| encoder.finish(&mut sink))
        .expect("invariant: memory takes it");
    file
}

fn encode(meta: &impl Serialize) -> Vec<u8> {
    bincode::serde::encode_to_vec(meta, bincode::config::standard())
        .expect("invariant: meta data is encodable")
}

/// What all of `bytes` are.
fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let config = bincode::config::standard().with_limit::<{ 16 * MAX_META_BYTES }>();
    let (decoded, read) = bincode::serde::decode_from_slice(bytes, config).ok()?;
    (read == bytes.len()).then_some(decoded)
}

/// Of a frame: its length as stored, then its bytes.
fn frame_checksum(length: [u8; 4], bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length);
    hasher.update(bytes);
    hasher.finalize()
}

/// Reads the payload of a snapshot file, and checks it on the way.
pub(crate) struct SnapshotPayload {
    version: u32,
    source: Arc<dyn Source>,
    offset: u64,
    whole: crc32fast::Hasher,
    payload_bytes: u64,
    frame: Vec<u8>,
    /// How much of the frame was given out.
    given: usize,
    ended: bool,
}

impl SnapshotPayload {
    /// Reads and checks the head.
    pub(crate) fn open(source: Arc<dyn Source>) -> io::Result<(Self, SnapshotMeta)> {
        let mut payload = Self {
            version: VERSION,
            source,
            offset: 0,
            whole: crc32fast::Hasher::new(),
            payload_bytes: 0,
            frame: Vec::new(),
            given: 0,
            ended: false,
        };
        let meta = payload.read_head()?;
        Ok((payload, meta))
    }

    fn read_head(&mut self) -> io::Result<SnapshotMeta> {
        let mut head = self.take(HEAD_BYTES)?;
        if &head[..8] != MAGIC {
            return Err(self.damage(0, "it does not begin as a snapshot"));
        }
        let length = u32_at(&head, 12) as usize;
        if length > MAX_META_BYTES {
            return Err(self.damage(12, "its head is damaged"));
        }
        let meta = self.take(length)?;
        head.extend_from_slice(&meta);
        if u32_at(&self.take(4)?, 0) != crc32fast::hash(&head) {
            return Err(self.damage(0, "the checksum of its head does not match"));
        }
        let version = u32_at(&head, 8);
        self.version = version;
        if !(OLDEST_VERSION..=VERSION).contains(&version) {
            let unknown = UnknownVersion { path: self.source.path().to_owned(), found: version };
            return Err(io::Error::new(ErrorKind::Unsupported, unknown));
        }
        let decoded = match version {
            VERSION.. => decode(&meta).map(|(meta, intents, machines): (SnapshotMeta, Intents, _)| {
                let membership = meta.membership.clone().with_intents(intents);
                SnapshotMeta { membership, machines, ..meta }
            }),
            FULL_META_SINCE.. => decode(&meta).map(|(meta, intents): (SnapshotMeta, Intents)| {
                let membership = meta.membership.clone().with_intents(intents);
                SnapshotMeta { membership, ..meta }
            }),
            _ => decode::<SnapshotMetaV2>(&meta).map(SnapshotMeta::from),
        };
        decoded.ok_or_else(|| self.damage(HEAD_BYTES as u64, "its meta data does not decode"))
    }

    /// The version of the file.
    pub(crate) fn version(&self) -> u32 {
        self.version
    }

    /// Reads the next frame; false at the end of the payload, once everything was checked.
    pub(crate) fn next_frame(&mut self) -> io::Result<bool> {
        if self.ended {
            return Ok(false);
        }
        let begin = self.offset;
        let length = self.take(4)?;
        let length: [u8; 4] = length.try_into().expect("invariant: four bytes");
        let bytes = u32::from_le_bytes(length) as usize;
        if bytes == 0 {
            return self.end(begin).map(|()| false);
        }
        if bytes > MAX_FRAME_BYTES {
            return Err(self.damage(begin, "the length of a frame is damaged"));
        }
        let checksum = u32_at(&self.take(4)?, 0);
        self.frame = self.take(bytes)?;
        self.given = 0;
        if checksum != frame_checksum(length, &self.frame) {
            self.frame.clear();
            return Err(self.damage(begin, "the checksum of a frame does not match"));
        }
        self.payload_bytes += bytes as u64;
        Ok(true)
    }

    fn end(&mut self, begin: u64) -> io::Result<()> {
        let total = self.take(8)?;
        let whole = self.whole.clone().finalize();
        if u64::from_le_bytes(total.try_into().expect("invariant: eight bytes")) != self.payload_bytes {
            return Err(self.damage(begin, "the payload has another length than it should"));
        }
        if u32_at(&self.take(4)?, 0) != whole {
            return Err(self.damage(begin, "the checksum of the whole file does not match"));
        }
        if self.offset != self.source.len_bytes() {
            return Err(self.damage(self.offset, "bytes follow its end"));
        }
        self.frame.clear();
        self.given = 0;
        self.ended = true;
        Ok(())
    }

    fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        // A damaged length must not allocate more than there is to read.
        if self.source.len_bytes() - self.offset < length as u64 {
            return Err(self.damage(self.offset, "it ends too early"));
        }
        let mut bytes = vec![0; length];
        read_exact_at(&*self.source, self.offset, &mut bytes)?;
        self.offset += length as u64;
        self.whole.update(&bytes);
        Ok(bytes)
    }

    fn damage(&self, offset: u64, detail: &str) -> io::Error {
        let path = self.source.path().display();
        io::Error::new(ErrorKind::InvalidData, format!("snapshot {path}, byte {offset}: {detail}"))
    }
}

impl Read for SnapshotPayload {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.given == self.frame.len() {
            if !self.next_frame()? {
                return Ok(0);
            }
        }
        let rest = &self.frame[self.given..];
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        self.given += length;
        Ok(length)
    }
}

/// Fills `buffer` from `offset` on.
pub(crate) fn read_exact_at(source: &dyn Source, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        let read = source.read_at(offset, buffer)?;
        if read == 0 {
            let path = source.path().display();
            // It is as long as it says: this is not what it holds.
            return Err(io::Error::new(
                ErrorKind::UnexpectedEof,
                format!("snapshot {path} seemed to end at byte {offset}, before its end"),
            ));
        }
        offset += read as u64;
        buffer = &mut buffer[read..];
    }
    Ok(())
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("invariant: four bytes"))
}
