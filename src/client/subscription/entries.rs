//! Entries, and how they are read from what nodes send.

use std::io;

use bytes::Bytes;
use prost::Message;

use crate::proto::replication::{
    AppliedCommand, Batch, Compression, Entity, Entries, SnapshotMark, WalEntryProto, WalOperation,
};

/// Most bytes of a batch before compression, whatever a node says that it has.
const MAX_BATCH_BYTES: u64 = 64 * 1024 * 1024;

/// Something that was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FollowedEntry {
    /// The position in the log. Several entries of one transaction have the same.
    pub seq: u64,
    /// The term in which it was proposed.
    pub term: u64,
    /// When it was proposed by the cluster's clock, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// The same in elapsed milliseconds: deadlines are told in it. Differences count; it is no time of day.
    pub elapsed_ms: u64,
    /// Whether another entry at the same position follows.
    pub more: bool,
    /// Whether it is a part of the state as of its position.
    pub snapshot: SnapshotPart,
    /// What happened.
    pub change: FollowedChange,
}

/// What part of a whole state an entry is, for those who [accept](super::SubscribeOptions::accept_snapshot) one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum SnapshotPart {
    /// None: it happened.
    #[default]
    None,
    /// The state begins. What was known before is void, once it has ended.
    Begin,
    /// An item of the state. Its `previous_seq` is the position of its last write.
    Item,
    /// The state is complete: what comes next happened after its position.
    End,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FollowedChange {
    /// Nothing: the entry says where a state begins or ends.
    Nothing,
    /// A key has changed.
    Event {
        /// How.
        operation: FollowedOperation,
        /// Whose it is.
        tenant: String,
        /// Where it is.
        collection: String,
        /// The key.
        key: Bytes,
        /// Its new value, if it was inserted or updated.
        value: Bytes,
        /// Position at which it was created.
        create_seq: u64,
        /// Position of the write before; 0 if it did not exist.
        previous_seq: u64,
        /// Writes of the key since it was created, this one included.
        version: u64,
        /// When it expires by the cluster's clock, in milliseconds since the Unix epoch; 0: never.
        expires_ms: u64,
        /// The same in elapsed milliseconds.
        deadline_elapsed_ms: u64,
        /// The machine that it happened to, by its number in a composition; 0 for one that is alone.
        machine: u32,
        /// The value that it had before, if that was [asked](super::SubscribeOptions::previous) for. `None` for none, or if it is not known.
        previous_value: Option<Bytes>,
        /// Whether it had one that the node does not keep any more, that is too long to be told, or that the node is too old to tell.
        previous_unknown: bool,
    },
    /// A command of a machine that tells no events was applied.
    Command {
        /// The machine, by its number in the composition.
        machine: u32,
        /// The version of the machine that wrote the command.
        version: u32,
        /// As the machine encodes it.
        command: Bytes,
    },
}

/// How a key has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FollowedOperation {
    /// It has been created.
    Insert,
    /// It has another value.
    Update,
    /// It has been removed.
    Delete,
    /// It has been removed because its time had come.
    Expire,
}

impl FollowedOperation {
    /// Its name in lower case, such as `insert`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Delete => "delete",
            Self::Expire => "expire",
        }
    }

    /// Whether the key has a value after it.
    pub fn has_value(self) -> bool {
        matches!(self, Self::Insert | Self::Update)
    }
}

impl FollowedEntry {
    /// About what it takes in a message.
    pub(super) fn size_bytes(&self) -> u64 {
        const FIXED_BYTES: usize = 48;
        let bytes = match &self.change {
            FollowedChange::Event { tenant, collection, key, value, previous_value, .. } => {
                let previous_bytes = previous_value.as_ref().map_or(0, Bytes::len);
                tenant.len() + collection.len() + key.len() + value.len() + previous_bytes
            }
            FollowedChange::Command { command, .. } => command.len(),
            FollowedChange::Nothing => 0,
        };
        (bytes + FIXED_BYTES) as u64
    }

    /// For a follower that asked what keys held before: a node that does not know that question tells none, which is not to be taken
    /// for a key that was not there.
    pub(super) fn note_untold_previous(&mut self) {
        if let FollowedChange::Event { operation, previous_value: None, previous_unknown, .. } =
            &mut self.change
        {
            *previous_unknown |=
                *operation != FollowedOperation::Insert && self.snapshot == SnapshotPart::None;
        }
    }

    /// # Errors
    /// Why it is no entry, in words.
    pub(crate) fn decode(message: WalEntryProto) -> Result<Self, String> {
        let WalEntryProto { seq, operation, tenant_id: tenant, time_ms, term, more, elapsed_ms, .. } =
            message;
        if seq == 0 {
            return Err("an entry without a position".to_owned());
        }
        let snapshot = match SnapshotMark::try_from(message.snapshot) {
            Ok(SnapshotMark::NotOfASnapshot) => SnapshotPart::None,
            Ok(SnapshotMark::SnapshotBegin) => SnapshotPart::Begin,
            Ok(SnapshotMark::SnapshotItem) => SnapshotPart::Item,
            Ok(SnapshotMark::SnapshotEnd) => SnapshotPart::End,
            Ok(SnapshotMark::SnapshotSoFar) | Err(_) => {
                return Err(format!("position {seq} is of a snapshot in a way that is not known here"));
            }
        };
        if message.heartbeat.is_some() || message.batch.is_some() {
            return Err(format!("a heartbeat or a batch in the place of an entry at position {seq}"));
        }
        let event = |operation| {
            let Some(entity) = message.entity.clone() else {
                return Err(format!("position {seq} changes a key and names none"));
            };
            let Entity { collection, key, value, create_seq, previous_seq, version, expires_ms, .. } = entity;
            Ok(FollowedChange::Event {
                operation,
                tenant,
                collection,
                key,
                value,
                create_seq,
                previous_seq,
                version,
                expires_ms,
                deadline_elapsed_ms: entity.deadline_elapsed_ms,
                machine: entity.machine,
                previous_value: entity.previous_value,
                previous_unknown: entity.previous_unknown,
            })
        };
        let change = match WalOperation::try_from(operation) {
            Ok(WalOperation::Insert) => event(FollowedOperation::Insert)?,
            Ok(WalOperation::Update) => event(FollowedOperation::Update)?,
            Ok(WalOperation::Delete) => event(FollowedOperation::Delete)?,
            Ok(WalOperation::Expire) => event(FollowedOperation::Expire)?,
            Ok(WalOperation::Command) => match message.command.clone() {
                Some(AppliedCommand { machine, version, command }) => {
                    FollowedChange::Command { machine, version, command }
                }
                None => return Err(format!("position {seq} is a command, and there is none")),
            },
            Ok(WalOperation::None) if matches!(snapshot, SnapshotPart::Begin | SnapshotPart::End) => {
                FollowedChange::Nothing
            }
            Ok(WalOperation::None) | Err(_) => {
                return Err(format!("position {seq} is of operation {operation}, which is not known here"));
            }
        };
        Ok(Self { seq, term, time_ms, elapsed_ms, more, snapshot, change })
    }
}

/// The entries of a batch. Takes no more memory than a batch may have, whatever it claims.
///
/// # Errors
/// Why it is no batch, in words.
pub(super) fn unpack(batch: Batch) -> Result<Vec<WalEntryProto>, String> {
    let Batch { compression, count, entries, raw_bytes } = batch;
    let raw = usize::try_from(raw_bytes).ok().filter(|_| raw_bytes <= MAX_BATCH_BYTES);
    let Some(raw) = raw else {
        return Err(format!("a batch of {raw_bytes} bytes; it may have {MAX_BATCH_BYTES}"));
    };
    let entries = match Compression::try_from(compression) {
        Ok(Compression::None) => entries,
        Ok(Compression::Zstd) => decompress(&entries, raw)
            .map_err(|error| format!("a batch of {raw} bytes that cannot be decompressed: {error}"))?,
        Err(_) => return Err(format!("a batch in compression {compression}, which is not known here")),
    };
    if entries.len() != raw {
        return Err(format!("a batch that should have {raw} bytes, and has {}", entries.len()));
    }
    let Entries { entries } =
        Entries::decode(entries).map_err(|error| format!("a batch that cannot be decoded: {error}"))?;
    if entries.len() as u64 != u64::from(count) {
        return Err(format!("a batch that should have {count} entries, and has {}", entries.len()));
    }
    Ok(entries)
}

/// At most `raw` bytes; more are an error.
fn decompress(bytes: &[u8], raw: usize) -> io::Result<Bytes> {
    zstd::bulk::decompress(bytes, raw).map(Bytes::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(seq: u64) -> WalEntryProto {
        let entity = Entity { key: "k".into(), value: "v".into(), ..Entity::default() };
        WalEntryProto {
            seq,
            operation: WalOperation::Insert.into(),
            entity: Some(entity),
            ..WalEntryProto::default()
        }
    }

    fn batch(compression: Compression) -> Batch {
        let raw = Entries { entries: vec![entry(1), entry(2)] }.encode_to_vec();
        let raw_bytes = raw.len() as u64;
        let entries = match compression {
            Compression::None => raw,
            Compression::Zstd => zstd::bulk::compress(&raw, 3).unwrap(),
        };
        Batch { compression: compression.into(), count: 2, entries: entries.into(), raw_bytes }
    }

    #[test]
    fn a_batch_is_read_as_it_was_packed_or_refused() {
        for compression in [Compression::None, Compression::Zstd] {
            let good = batch(compression);
            assert_eq!(unpack(good.clone()).unwrap(), [entry(1), entry(2)]);
            let raw_bytes = good.raw_bytes;
            for bad in [
                Batch { count: 3, ..good.clone() },
                Batch { raw_bytes: raw_bytes - 1, ..good.clone() },
                Batch { raw_bytes: raw_bytes + 1, ..good.clone() },
                Batch { raw_bytes: MAX_BATCH_BYTES + 1, ..good.clone() },
                Batch { raw_bytes: u64::MAX, ..good.clone() },
                Batch { compression: 77, ..good.clone() },
                Batch { entries: good.entries.slice(1..), ..good.clone() },
                Batch { entries: good.entries.slice(..good.entries.len() - 1), ..good.clone() },
            ] {
                assert!(unpack(bad.clone()).is_err(), "{bad:?}");
            }
        }
    }

    /// As a node tells it that knows nothing of previous values.
    #[test]
    fn a_previous_value_that_no_node_told_is_unknown_unless_there_is_none() {
        let told = |operation: WalOperation, snapshot: SnapshotMark, before: Option<&'static str>| {
            let mut message = entry(7);
            (message.operation, message.snapshot) = (operation.into(), snapshot.into());
            message.entity.as_mut().unwrap().previous_value = before.map(Bytes::from);
            let mut entry = FollowedEntry::decode(message).unwrap();
            entry.note_untold_previous();
            match entry.change {
                FollowedChange::Event { previous_unknown, .. } => previous_unknown,
                other => panic!("{other:?}"),
            }
        };
        let happened = SnapshotMark::NotOfASnapshot;
        for operation in [WalOperation::Update, WalOperation::Delete, WalOperation::Expire] {
            assert!(told(operation, happened, None), "{operation:?}");
            assert!(!told(operation, happened, Some("")), "{operation:?}");
        }
        assert!(!told(WalOperation::Insert, happened, None));
        assert!(!told(WalOperation::Update, SnapshotMark::SnapshotItem, None), "an item has none");
    }

    #[test]
    fn what_is_no_entry_is_refused_with_its_position() {
        let whole = FollowedEntry::decode(entry(7)).unwrap();
        assert!(matches!(&whole.change, FollowedChange::Event { key, .. } if key == "k"), "{whole:?}");
        for bad in [
            WalEntryProto { operation: 0, ..entry(7) },
            WalEntryProto { operation: 99, ..entry(7) },
            WalEntryProto { operation: WalOperation::Command.into(), ..entry(7) },
            WalEntryProto { entity: None, ..entry(7) },
            WalEntryProto { snapshot: 99, ..entry(7) },
            WalEntryProto { batch: Some(Batch::default()), ..entry(7) },
        ] {
            let why = FollowedEntry::decode(bad.clone()).unwrap_err();
            assert!(why.contains("position 7"), "{bad:?}: {why}");
        }
        assert!(FollowedEntry::decode(entry(0)).is_err());
    }
}
