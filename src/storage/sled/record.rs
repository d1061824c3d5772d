//! The bytes of entries and of the records that pack them.
//!
//! A record is one value in sled's `log` tree: either *packed*, several whole entries, or a *part*, a slice of
//! one entry too large for a packed record. Everything is little-endian and written by hand, so that no
//! library's upgrade moves a byte; `docs/FORMAT.md` has the layout.
//!
//! # Invariants
//! - The checksum covers every byte of the record except itself, the record's position included: a record
//!   found under another key is as wrong as a flipped bit.
//! - A record names the term of the entry before its first. By Raft's log matching property an entry's
//!   index and term identify the whole log up to it, so a stale record can not pass for part of a newer log.
//!
//! What it does not do: read or write anything.

use bytes::Bytes;

use crate::types::{Entry, Founding, Intents, LogId, Membership, NodeId, Payload};

/// The newest record version this build writes and reads.
pub(crate) const VERSION: u8 = 1;

/// Bytes before the body of a record.
pub(crate) const HEADER_BYTES: usize = 28;

/// A record grows no larger than this, header included.
///
/// sled moves a leaf of more than a quarter of a segment to a file that it never fsyncs. With segments of
/// 8 MiB that is 2 MiB, and a leaf splits above 16 records: 17 records of this size take 1.1 MiB.
pub(crate) const TARGET_BYTES: usize = 64 * 1024;

/// Bytes of an encoded entry before its payload.
pub(crate) const ENTRY_HEADER_BYTES: usize = 21;

const KIND_PACKED: u8 = 1;
const KIND_PART: u8 = 2;

const PAYLOAD_BLANK: u8 = 0;
const PAYLOAD_COMMAND: u8 = 1;
const PAYLOAD_MEMBERSHIP: u8 = 2;

/// Version of the membership payload, ahead of its bincode.
const MEMBERSHIP_VERSION: u8 = 1;
/// A membership that is followed by notes of what members are to be; written only where there are any.
const MEMBERSHIP_WITH_INTENTS_VERSION: u8 = 2;
/// The same, followed by what the founders agreed on; written only where that is known.
const MEMBERSHIP_WITH_FOUNDING_VERSION: u8 = 3;

/// What is wrong with a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RecordError {
    /// The record was cut, or a length in it points outside.
    #[error("it ends too early")]
    Short,
    /// Bytes have changed since it was written.
    #[error("its checksum does not match")]
    Checksum,
    /// A newer quorate wrote it.
    #[error("it has version {found}, this build reads up to {supported}")]
    Version {
        /// Its version.
        found: u8,
        /// The newest that this build reads.
        supported: u8,
    },
    /// Intact, but not what belongs there.
    #[error("{0}")]
    Content(String),
}

fn content(detail: impl Into<String>) -> RecordError {
    RecordError::Content(detail.into())
}

/// Where a record lives in the `log` tree: index of its first entry, then the part, both big-endian so that
/// sled's order is the log's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    /// Index of the first (or only) entry.
    pub(crate) index: u64,
    /// 0 for a packed record, else the number of the part, from 0; from [`FENCE_PART`] on, not a record.
    pub(crate) part: u16,
}

/// Keys from this part on are fences, which only steer sled's splits; see
/// [`layout`](super::layout). They sort after all parts of their index.
const FENCE_PART: u16 = 0xff00;

impl Key {
    /// Bytes of an encoded key.
    pub(crate) const BYTES: usize = 10;

    /// The first key an entry with `index` may have.
    pub(crate) const fn first(index: u64) -> Self {
        Self { index, part: 0 }
    }

    /// A fence after the entry with `index`.
    pub(crate) const fn fence(index: u64, number: u16) -> Self {
        Self { index, part: FENCE_PART + number }
    }

    pub(crate) const fn is_fence(self) -> bool {
        self.part >= FENCE_PART
    }

    pub(crate) fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.index.to_be_bytes());
        bytes[8..].copy_from_slice(&self.part.to_be_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; Self::BYTES] = bytes.try_into().ok()?;
        let (index, part) = bytes.split_at(8);
        Some(Self {
            index: u64::from_be_bytes(index.try_into().ok()?),
            part: u16::from_be_bytes(part.try_into().ok()?),
        })
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "record {}.{}", self.index, self.part)
    }
}

/// One record, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Record<'a> {
    /// Term of the entry before the first; 0 when there is none.
    pub(crate) previous_term: u64,
    /// What it holds.
    pub(crate) body: Body<'a>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Body<'a> {
    /// Whole entries, in order, at least one.
    Packed(Vec<Entry>),
    /// One of `parts` slices of an encoded entry.
    Part { parts: u16, bytes: &'a [u8] },
}

impl<'a> Record<'a> {
    /// Checks and decodes the record stored under `key`.
    pub(crate) fn decode(key: Key, record: &'a [u8]) -> Result<Self, RecordError> {
        if record.len() < HEADER_BYTES {
            return Err(RecordError::Short);
        }
        let mut fields = Fields(record);
        let version = fields.u8()?;
        let kind = fields.u8()?;
        let part = fields.u16()?;
        let checksum = fields.u32()?;
        if checksum != checksum_of(record) {
            return Err(RecordError::Checksum);
        }
        if version != VERSION {
            return Err(RecordError::Version { found: version, supported: VERSION });
        }
        let index = fields.u64()?;
        let previous_term = fields.u64()?;
        let count = fields.u32()?;
        if (Key { index, part }) != key {
            return Err(content(format!("it claims to be record {index}.{part}")));
        }
        let body = match kind {
            KIND_PACKED => {
                let mut entries = Vec::with_capacity(count.min(4096) as usize);
                for offset in 0..u64::from(count) {
                    let entry = decode_entry(&mut fields)?;
                    if Some(entry.log_id.index) != index.checked_add(offset) {
                        return Err(content(format!("entry {} is out of place", entry.log_id)));
                    }
                    entries.push(entry);
                }
                if entries.is_empty() || part != 0 {
                    return Err(content("an empty or numbered packed record"));
                }
                fields.end()?;
                Body::Packed(entries)
            }
            KIND_PART => {
                let parts = u16::try_from(count).map_err(|_| content("too many parts"))?;
                if part >= parts {
                    return Err(content(format!("part {part} of {parts}")));
                }
                Body::Part { parts, bytes: fields.0 }
            }
            other => return Err(content(format!("unknown record kind {other}"))),
        };
        Ok(Self { previous_term, body })
    }
}

/// The checksum of a record: all bytes except the checksum itself.
fn checksum_of(record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&record[..4]);
    hasher.update(&record[8..]);
    hasher.finalize()
}

/// Fills the header of a record whose body stands from [`HEADER_BYTES`] on.
fn seal(record: &mut [u8], kind: u8, key: Key, previous_term: u64, count: u32) {
    record[0] = VERSION;
    record[1] = kind;
    record[2..4].copy_from_slice(&key.part.to_le_bytes());
    record[8..16].copy_from_slice(&key.index.to_le_bytes());
    record[16..24].copy_from_slice(&previous_term.to_le_bytes());
    record[24..28].copy_from_slice(&count.to_le_bytes());
    let checksum = checksum_of(record);
    record[4..8].copy_from_slice(&checksum.to_le_bytes());
}

/// Gives `record` the version and the checksum that it should have.
#[cfg(any(test, fuzzing))]
pub(crate) fn mend(record: &mut [u8]) {
    if record.len() >= HEADER_BYTES {
        record[0] = VERSION;
        let checksum = checksum_of(record);
        record[4..8].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// Packs consecutive entries into records.
#[derive(Debug, Default)]
pub(crate) struct Packer {
    record: Vec<u8>,
    count: u32,
    first: u64,
    previous_term: u64,
    last: Option<LogId>,
}

/// A finished record and where it goes.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) key: Key,
    pub(crate) record: Vec<u8>,
    /// The last entry that is complete once this record is stored; none for all but the last part.
    pub(crate) last: Option<LogId>,
}

impl Packer {
    /// Adds `entry`, whose predecessor has `previous_term`, and hands every record that is full to `emit`.
    pub(crate) fn push<E>(
        &mut self,
        entry: &Entry,
        previous_term: u64,
        emit: &mut impl FnMut(Packed) -> Result<(), E>,
    ) -> Result<(), E> {
        let payload = encode_payload(&entry.payload);
        let encoded_bytes = ENTRY_HEADER_BYTES + payload.as_ref().len();
        if HEADER_BYTES + encoded_bytes > TARGET_BYTES {
            self.finish(emit)?;
            return split(entry, &payload, previous_term, emit);
        }
        if self.count > 0 && self.record.len() + encoded_bytes > TARGET_BYTES {
            self.finish(emit)?;
        }
        if self.count == 0 {
            self.first = entry.log_id.index;
            self.previous_term = previous_term;
            self.record.resize(HEADER_BYTES, 0);
        }
        encode_entry(entry, &payload, &mut self.record);
        self.count += 1;
        self.last = Some(entry.log_id);
        Ok(())
    }

    /// Hands over the record begun, if any.
    pub(crate) fn finish<E>(&mut self, emit: &mut impl FnMut(Packed) -> Result<(), E>) -> Result<(), E> {
        if self.count == 0 {
            return Ok(());
        }
        let mut record = std::mem::take(&mut self.record);
        let key = Key::first(self.first);
        seal(&mut record, KIND_PACKED, key, self.previous_term, self.count);
        self.count = 0;
        emit(Packed { key, record, last: self.last.take() })
    }
}

/// Emits an entry too large for a packed record as parts, in order.
fn split<E>(
    entry: &Entry,
    payload: &EncodedPayload<'_>,
    previous_term: u64,
    emit: &mut impl FnMut(Packed) -> Result<(), E>,
) -> Result<(), E> {
    let mut encoded = Vec::with_capacity(ENTRY_HEADER_BYTES + payload.as_ref().len());
    encode_entry(entry, payload, &mut encoded);
    let slices = encoded.chunks(TARGET_BYTES - HEADER_BYTES);
    let parts = u16::try_from(slices.len()).ok().filter(|parts| *parts < FENCE_PART);
    let parts = parts.expect("invariant: an entry is smaller than 3.9 GiB");
    for (part, slice) in (0..parts).zip(slices) {
        let key = Key { index: entry.log_id.index, part };
        let mut record = Vec::with_capacity(HEADER_BYTES + slice.len());
        record.resize(HEADER_BYTES, 0);
        record.extend_from_slice(slice);
        seal(&mut record, KIND_PART, key, previous_term, u32::from(parts));
        emit(Packed { key, record, last: (part + 1 == parts).then_some(entry.log_id) })?;
    }
    Ok(())
}

/// A payload's kind and bytes; borrowed where they exist already.
enum EncodedPayload<'a> {
    Blank,
    Command(&'a [u8]),
    Membership(Vec<u8>),
}

impl EncodedPayload<'_> {
    fn kind(&self) -> u8 {
        match self {
            Self::Blank => PAYLOAD_BLANK,
            Self::Command(_) => PAYLOAD_COMMAND,
            Self::Membership(_) => PAYLOAD_MEMBERSHIP,
        }
    }
}

impl AsRef<[u8]> for EncodedPayload<'_> {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Blank => &[],
            Self::Command(bytes) => bytes,
            Self::Membership(bytes) => bytes,
        }
    }
}

fn encode_payload(payload: &Payload) -> EncodedPayload<'_> {
    match payload {
        Payload::Blank => EncodedPayload::Blank,
        Payload::Command(command) => EncodedPayload::Command(command),
        Payload::Membership(membership) => {
            let intents: Intents = membership.intents().collect();
            let mut bytes = Vec::new();
            match (membership.founding(), intents.is_empty()) {
                (Some(founding), _) => {
                    bytes.push(MEMBERSHIP_WITH_FOUNDING_VERSION);
                    encode_into(&mut bytes, &(membership, intents, founding));
                }
                (None, false) => {
                    bytes.push(MEMBERSHIP_WITH_INTENTS_VERSION);
                    encode_into(&mut bytes, &(membership, intents));
                }
                (None, true) => {
                    bytes.push(MEMBERSHIP_VERSION);
                    encode_into(&mut bytes, membership);
                }
            }
            EncodedPayload::Membership(bytes)
        }
    }
}

fn encode_into(bytes: &mut Vec<u8>, membership: &impl serde::Serialize) {
    bincode::serde::encode_into_std_write(membership, bytes, bincode::config::standard())
        .expect("invariant: a membership is encodable, and a Vec takes any bytes");
}

fn encode_entry(entry: &Entry, payload: &EncodedPayload<'_>, out: &mut Vec<u8>) {
    let bytes = payload.as_ref();
    let length = u32::try_from(bytes.len()).expect("invariant: an entry is smaller than 4 GiB");
    out.extend_from_slice(&entry.log_id.term.to_le_bytes());
    out.extend_from_slice(&entry.log_id.index.to_le_bytes());
    out.push(payload.kind());
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes);
}

fn decode_entry(fields: &mut Fields<'_>) -> Result<Entry, RecordError> {
    let term = fields.u64()?;
    let index = fields.u64()?;
    let kind = fields.u8()?;
    let length = fields.u32()?;
    let bytes = fields.take(length as usize)?;
    let payload = match kind {
        PAYLOAD_BLANK if bytes.is_empty() => Payload::Blank,
        // Copied, so that a small command kept by a state machine does not keep its whole record alive.
        PAYLOAD_COMMAND => Payload::Command(Bytes::copy_from_slice(bytes)),
        PAYLOAD_MEMBERSHIP => Payload::Membership(decode_membership(bytes)?),
        other => return Err(content(format!("entry {term}:{index} has unknown kind {other}"))),
    };
    Ok(Entry { log_id: LogId::new(term, index), payload })
}

fn decode_membership(bytes: &[u8]) -> Result<Membership, RecordError> {
    let (version, bytes) = bytes.split_first().ok_or(RecordError::Short)?;
    match *version {
        MEMBERSHIP_VERSION => decode_whole(bytes),
        MEMBERSHIP_WITH_INTENTS_VERSION => {
            let (membership, intents): (Membership, Intents) = decode_whole(bytes)?;
            Ok(membership.with_intents(intents))
        }
        MEMBERSHIP_WITH_FOUNDING_VERSION => {
            let (membership, intents, founding): (Membership, Intents, (NodeId, Founding)) =
                decode_whole(bytes)?;
            Ok(membership.with_intents(intents).with_founding(Some(founding)))
        }
        found => Err(RecordError::Version { found, supported: MEMBERSHIP_WITH_FOUNDING_VERSION }),
    }
}

/// What is decoded of a membership may claim so many bytes, many times the largest one.
const MOST_DECODED_BYTES: usize = 16 * 1024 * 1024;

/// What all of `bytes` are.
fn decode_whole<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, RecordError> {
    // A length in it may be anything.
    let config = bincode::config::standard().with_limit::<MOST_DECODED_BYTES>();
    match bincode::serde::decode_from_slice(bytes, config) {
        Ok((decoded, read)) if read == bytes.len() => Ok(decoded),
        Ok(_) => Err(content("bytes follow a membership")),
        Err(error) => Err(content(format!("a membership does not decode: {error}"))),
    }
}

/// Decodes the one entry that parts were joined to.
pub(crate) fn decode_joined(index: u64, encoded: &[u8]) -> Result<Entry, RecordError> {
    let mut fields = Fields(encoded);
    let entry = decode_entry(&mut fields)?;
    fields.end()?;
    if entry.log_id.index != index {
        return Err(content(format!("entry {} is out of place", entry.log_id)));
    }
    Ok(entry)
}

/// The rest of a record, read field by field.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8], RecordError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(RecordError::Short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(RecordError::Short)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, RecordError> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, RecordError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, RecordError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, RecordError> {
        self.array().map(u64::from_le_bytes)
    }

    fn end(&self) -> Result<(), RecordError> {
        if self.0.is_empty() { Ok(()) } else { Err(content("bytes follow the last entry")) }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::types::Intent;
    use crate::types::{Incarnation, InitialState, MachineVersion, Member};

    fn pack(entries: &[Entry]) -> Vec<Packed> {
        let mut records = Vec::new();
        let mut packer = Packer::default();
        let mut emit = |packed| {
            records.push(packed);
            Ok::<_, Infallible>(())
        };
        for entry in entries {
            packer.push(entry, 7, &mut emit).unwrap();
        }
        packer.finish(&mut emit).unwrap();
        records
    }

    fn command(index: u64, bytes: usize) -> Entry {
        Entry {
            log_id: LogId::new(7, index),
            payload: Payload::Command(Bytes::from(vec![index as u8; bytes])),
        }
    }

    #[test]
    fn every_kind_of_payload_survives() {
        let member = Member {
            peer: "a:1".into(),
            client: "b:2".into(),
            incarnation: Incarnation(3),
            ..Member::default()
        };
        let membership = Membership {
            voters: vec![[1, 2].into(), [1].into()],
            members: [(1, member)].into_iter().collect(),
        };
        let founding = Founding {
            state: InitialState { hash_version: 1, hash: 0x0123_4567_89ab_cdef, is_restored: true },
            versions: vec![MachineVersion { machine: 0, version: 2 }],
        };
        let entries = [
            Entry { log_id: LogId::new(7, 5), payload: Payload::Blank },
            command(6, 0),
            Entry { log_id: LogId::new(7, 7), payload: Payload::Membership(membership.clone()) },
            // With notes of what members are to be, one of them about a node that is away.
            Entry {
                log_id: LogId::new(7, 8),
                payload: Payload::Membership(
                    membership.clone().with_intents([(1, 1, Intent::Learner), (1, 2, Intent::Voter)]),
                ),
            },
            // With what the founders agreed on.
            Entry {
                log_id: LogId::new(7, 9),
                payload: Payload::Membership(
                    membership.with_intents([(1, 2, Intent::Voter)]).with_founding(Some((1, founding))),
                ),
            },
        ];
        let records = pack(&entries);
        assert_eq!(records.len(), 1);
        let record = Record::decode(records[0].key, &records[0].record).unwrap();
        assert_eq!(record, Record { previous_term: 7, body: Body::Packed(entries.to_vec()) });
    }

    #[test]
    fn records_stay_below_the_target_and_large_entries_are_split() {
        let entries: Vec<_> = [10, 60_000, 60_000, 200_000, 10].into_iter().zip(0..).collect();
        let entries: Vec<_> = entries.into_iter().map(|(bytes, index)| command(index, bytes)).collect();
        let records = pack(&entries);
        assert!(records.iter().all(|packed| packed.record.len() <= TARGET_BYTES));
        let keys: Vec<_> = records.iter().map(|packed| (packed.key.index, packed.key.part)).collect();
        assert_eq!(keys, [(0, 0), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3), (4, 0)]);
        let joined: Vec<u8> =
            records[2..6].iter().flat_map(|packed| packed.record[HEADER_BYTES..].to_vec()).collect();
        assert_eq!(decode_joined(3, &joined).unwrap(), entries[3]);
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let packed = pack(&[command(5, 20)]).remove(0);
        for bit in 0..packed.record.len() * 8 {
            let mut record = packed.record.clone();
            record[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::decode(packed.key, &record), Err(RecordError::Checksum), "bit {bit}");
        }
        for length in 0..packed.record.len() {
            assert!(Record::decode(packed.key, &packed.record[..length]).is_err());
        }
    }

    #[test]
    fn a_newer_version_is_called_that_and_compared_with_the_right_one() {
        let newer = |version: u8| decode_membership(&[version, 0]).unwrap_err();
        assert_eq!(newer(9), RecordError::Version { found: 9, supported: MEMBERSHIP_WITH_FOUNDING_VERSION });
        assert!(!matches!(newer(MEMBERSHIP_WITH_FOUNDING_VERSION), RecordError::Version { .. }));
    }

    #[test]
    fn a_record_under_another_key_is_refused() {
        let packed = pack(&[command(5, 20)]).remove(0);
        assert!(matches!(Record::decode(Key::first(6), &packed.record), Err(RecordError::Content(_))));
    }
}
