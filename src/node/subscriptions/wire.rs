//! Entries as messages of gRPC. Those of a batch are written as their bytes at once, without a message in between: there are many.

use bytes::{BufMut, BytesMut};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use super::entry::{EntryAt, EntryContent, SentEntry};
use super::transport::{EntryBatch, FollowerEncoding, FollowerProgress, PartMark, StateMark, SyncBegin};
use crate::machine::{AppliedEvent, EventOperation};
use crate::proto::replication::{
    AppliedCommand, Batch, Compression, Entity, Heartbeat, SnapshotMark, StatePart, WalEntryProto,
    WalOperation,
};
use crate::types::HistoryEpoch;

/// Numbers of fields, as `proto/replication.proto` has them.
mod entry {
    pub(super) const SEQ: u32 = 1;
    pub(super) const OPERATION: u32 = 2;
    pub(super) const TENANT: u32 = 3;
    pub(super) const ENTITY: u32 = 4;
    pub(super) const TIME: u32 = 5;
    pub(super) const TERM: u32 = 6;
    pub(super) const MORE: u32 = 7;
    pub(super) const COMMAND: u32 = 8;
    pub(super) const HISTORY: u32 = 9;
    pub(super) const SNAPSHOT: u32 = 12;
    pub(super) const ELAPSED: u32 = 13;
}
/// See [`entry`].
mod entity {
    pub(super) const COLLECTION: u32 = 1;
    pub(super) const KEY: u32 = 2;
    pub(super) const VALUE: u32 = 3;
    pub(super) const CREATED: u32 = 4;
    pub(super) const PREVIOUS: u32 = 5;
    pub(super) const VERSION: u32 = 6;
    pub(super) const EXPIRES: u32 = 7;
    pub(super) const DEADLINE: u32 = 8;
    pub(super) const MACHINE: u32 = 9;
    pub(super) const PREVIOUS_VALUE: u32 = 10;
    pub(super) const PREVIOUS_UNKNOWN: u32 = 11;
}
/// The number of the only field of `Entries`, and of those of a command.
const ENTRIES: u32 = 1;
const COMMAND_FIELDS: [u32; 3] = [1, 2, 3];

fn operation(of: EventOperation) -> WalOperation {
    match of {
        EventOperation::Insert => WalOperation::Insert,
        EventOperation::Update => WalOperation::Update,
        EventOperation::Delete => WalOperation::Delete,
        EventOperation::Expire => WalOperation::Expire,
    }
}

fn number_len(tag: u32, value: u64) -> usize {
    if value == 0 { 0 } else { key_len(tag) + encoded_len_varint(value) }
}

fn bytes_len(tag: u32, bytes: &[u8]) -> usize {
    if bytes.is_empty() { 0 } else { nested_len(tag, bytes.len()) }
}

fn nested_len(tag: u32, length: usize) -> usize {
    key_len(tag) + encoded_len_varint(length as u64) + length
}

fn put_number(out: &mut BytesMut, tag: u32, value: u64) {
    if value != 0 {
        encode_key(tag, WireType::Varint, out);
        encode_varint(value, out);
    }
}

fn put_bytes(out: &mut BytesMut, tag: u32, bytes: &[u8]) {
    if !bytes.is_empty() {
        put_length(out, tag, bytes.len());
        out.put_slice(bytes);
    }
}

fn put_length(out: &mut BytesMut, tag: u32, length: usize) {
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(length as u64, out);
}

impl<'a> SentEntry<'a> {
    fn operation(&self) -> WalOperation {
        match self.content {
            EntryContent::Event(event) => operation(event.operation),
            EntryContent::Command { .. } => WalOperation::Command,
        }
    }

    fn tenant(&self) -> &'a [u8] {
        match self.content {
            EntryContent::Event(event) => &event.tenant,
            EntryContent::Command { .. } => &[],
        }
    }

    fn mark(&self) -> SnapshotMark {
        if self.is_item { SnapshotMark::SnapshotItem } else { SnapshotMark::NotOfASnapshot }
    }

    /// The numbers of an entity and their fields.
    fn entity_numbers(&self, event: &AppliedEvent) -> [(u32, u64); 6] {
        let deadline = event.deadline_ms.unwrap_or(0);
        let expires = self.expires_ms(event);
        [
            (entity::CREATED, event.created),
            (entity::PREVIOUS, event.previous),
            (entity::VERSION, event.version),
            (entity::EXPIRES, expires),
            (entity::DEADLINE, deadline),
            (entity::MACHINE, event.machine.into()),
        ]
    }

    fn content_len(&self) -> usize {
        match self.content {
            EntryContent::Event(event) => {
                let (numbers, (previous, is_unknown)) = (self.entity_numbers(event), self.previous());
                bytes_len(entity::COLLECTION, &event.collection)
                    + bytes_len(entity::KEY, &event.key)
                    + bytes_len(entity::VALUE, &event.value)
                    + numbers.iter().map(|(tag, value)| number_len(*tag, *value)).sum::<usize>()
                    // One that is empty is told, too.
                    + previous.map_or(0, |value| nested_len(entity::PREVIOUS_VALUE, value.len()))
                    + number_len(entity::PREVIOUS_UNKNOWN, is_unknown.into())
            }
            EntryContent::Command { wrote, command } => {
                let [machine, version, encoded] = COMMAND_FIELDS;
                number_len(machine, wrote.machine.into())
                    + number_len(version, wrote.version.into())
                    + bytes_len(encoded, command)
            }
        }
    }

    fn len_around(&self, content_len: usize) -> usize {
        let EntryAt { seq, term, time_ms, elapsed_ms } = self.at;
        let history = self.history.map_or(0, |history| history.0);
        number_len(entry::SEQ, seq)
            + number_len(entry::OPERATION, self.operation() as u64)
            + bytes_len(entry::TENANT, self.tenant())
            + nested_len(self.content_tag(), content_len)
            + number_len(entry::TIME, time_ms)
            + number_len(entry::TERM, term)
            + number_len(entry::MORE, self.more.into())
            + if history == 0 { 0 } else { key_len(entry::HISTORY) + 8 }
            + number_len(entry::SNAPSHOT, self.mark() as u64)
            + number_len(entry::ELAPSED, elapsed_ms)
    }

    fn content_tag(&self) -> u32 {
        match self.content {
            EntryContent::Event(_) => entry::ENTITY,
            EntryContent::Command { .. } => entry::COMMAND,
        }
    }

    /// Bytes of its message.
    pub(super) fn len(&self) -> usize {
        self.len_around(self.content_len())
    }

    /// Bytes that it adds to a batch.
    pub(super) fn batched_len(&self) -> usize {
        nested_len(ENTRIES, self.len())
    }

    /// Writes it as one of `Entries`.
    pub(super) fn put_batched(&self, out: &mut BytesMut) {
        let content_len = self.content_len();
        let length = self.len_around(content_len);
        out.reserve(nested_len(ENTRIES, length));
        put_length(out, ENTRIES, length);
        let EntryAt { seq, term, time_ms, elapsed_ms } = self.at;
        put_number(out, entry::SEQ, seq);
        put_number(out, entry::OPERATION, self.operation() as u64);
        put_bytes(out, entry::TENANT, self.tenant());
        if let EntryContent::Event(event) = self.content {
            put_length(out, entry::ENTITY, content_len);
            put_bytes(out, entity::COLLECTION, &event.collection);
            put_bytes(out, entity::KEY, &event.key);
            put_bytes(out, entity::VALUE, &event.value);
            self.entity_numbers(event).iter().for_each(|(tag, value)| put_number(out, *tag, *value));
            let (previous, is_unknown) = self.previous();
            if let Some(value) = previous {
                put_length(out, entity::PREVIOUS_VALUE, value.len());
                out.put_slice(value);
            }
            put_number(out, entity::PREVIOUS_UNKNOWN, is_unknown.into());
        }
        put_number(out, entry::TIME, time_ms);
        put_number(out, entry::TERM, term);
        put_number(out, entry::MORE, self.more.into());
        if let EntryContent::Command { wrote, command } = self.content {
            let [machine, version, encoded] = COMMAND_FIELDS;
            put_length(out, entry::COMMAND, content_len);
            put_number(out, machine, wrote.machine.into());
            put_number(out, version, wrote.version.into());
            put_bytes(out, encoded, command);
        }
        if let Some(history) = self.history.filter(|history| history.0 != 0) {
            encode_key(entry::HISTORY, WireType::SixtyFourBit, out);
            out.put_u64_le(history.0);
        }
        put_number(out, entry::SNAPSHOT, self.mark() as u64);
        put_number(out, entry::ELAPSED, elapsed_ms);
    }

    /// As a message of its own. Keys and values share memory with what it was made of.
    pub(super) fn message(&self) -> WalEntryProto {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut message = WalEntryProto {
            seq: self.at.seq,
            operation: self.operation().into(),
            tenant_id: text(self.tenant()),
            time_ms: self.at.time_ms,
            term: self.at.term,
            more: self.more,
            history: self.history.map_or(0, |history| history.0),
            snapshot: self.mark().into(),
            elapsed_ms: self.at.elapsed_ms,
            ..Default::default()
        };
        match self.content {
            EntryContent::Event(event) => {
                let [created, previous, version, expires, deadline, _] =
                    self.entity_numbers(event).map(|(_, number)| number);
                let (value_before, previous_unknown) = self.previous();
                message.entity = Some(Entity {
                    collection: text(&event.collection),
                    key: event.key.clone(),
                    value: event.value.clone(),
                    create_seq: created,
                    previous_seq: previous,
                    version,
                    expires_ms: expires,
                    deadline_elapsed_ms: deadline,
                    machine: event.machine.into(),
                    previous_value: value_before.cloned(),
                    previous_unknown,
                });
            }
            EntryContent::Command { wrote, command } => {
                let (machine, version) = (wrote.machine.into(), wrote.version);
                message.command = Some(AppliedCommand { machine, version, command: command.clone() });
            }
        }
        message
    }
}

/// What gRPC followers are told: messages of `replication.ReplicationService`.
pub(super) struct ProtobufEncoding;

impl FollowerEncoding for ProtobufEncoding {
    type Message = WalEntryProto;

    const TRANSPORT: &'static str = "grpc";

    /// The first message, whatever it is, names the history.
    fn beginning(&mut self, _: SyncBegin) -> Option<WalEntryProto> {
        None
    }

    fn entry_len(entry: &SentEntry<'_>) -> usize {
        entry.len()
    }

    fn entry(&mut self, entry: &SentEntry<'_>) -> WalEntryProto {
        entry.message()
    }

    fn batched_len(entry: &SentEntry<'_>) -> usize {
        entry.batched_len()
    }

    fn put_batched(entry: &SentEntry<'_>, out: &mut BytesMut) {
        entry.put_batched(out);
    }

    fn batch(&mut self, batch: EntryBatch) -> impl FnOnce() -> WalEntryProto + Send + 'static {
        move || batch_message(batch)
    }

    fn mark(&mut self, at: EntryAt, mark: StateMark, history: HistoryEpoch) -> WalEntryProto {
        let EntryAt { seq, term, time_ms, elapsed_ms } = at;
        let snapshot = match mark {
            StateMark::Begin => SnapshotMark::SnapshotBegin,
            StateMark::End => SnapshotMark::SnapshotEnd,
        };
        let (snapshot, history) = (snapshot.into(), history.0);
        WalEntryProto { seq, term, time_ms, elapsed_ms, history, snapshot, ..Default::default() }
    }

    fn part(&mut self, at: EntryAt, mark: PartMark, history: HistoryEpoch) -> Option<WalEntryProto> {
        let EntryAt { seq, term, time_ms, elapsed_ms } = at;
        let PartMark { begins, id, part } = mark;
        let snapshot = if begins { SnapshotMark::SnapshotBegin } else { SnapshotMark::SnapshotSoFar };
        let (snapshot, history, state_part) = (snapshot.into(), history.0, Some(StatePart { id, part }));
        Some(WalEntryProto {
            seq,
            term,
            time_ms,
            elapsed_ms,
            history,
            snapshot,
            state_part,
            ..Default::default()
        })
    }

    fn heartbeat(&mut self, progress: &FollowerProgress) -> WalEntryProto {
        let heartbeat = Heartbeat {
            upto_seq: progress.upto_seq,
            applied_seq: progress.applied_seq,
            committed_seq: progress.committed_seq,
            upto_time_ms: progress.upto_time_ms,
            applied_time_ms: progress.applied_time_ms,
            applied_elapsed_ms: progress.applied_elapsed_ms,
        };
        WalEntryProto { history: progress.history.0, heartbeat: Some(heartbeat), ..Default::default() }
    }

    fn len(message: &WalEntryProto) -> usize {
        message.encoded_len()
    }
}

fn batch_message(batch: EntryBatch) -> WalEntryProto {
    let (count, packed) = (batch.count, batch.pack());
    let compression = if packed.is_compressed { Compression::Zstd } else { Compression::None };
    let (entries, raw_bytes) = (packed.entries, packed.raw_bytes);
    let batch = Batch { compression: compression.into(), count, entries, raw_bytes };
    WalEntryProto { batch: Some(batch), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::feed::KeyBefore;
    use crate::proto::replication::Entries;
    use crate::types::MachineVersion;

    fn event(operation: EventOperation, deadline_ms: Option<u64>) -> AppliedEvent {
        AppliedEvent {
            machine: if deadline_ms.is_some() { 3 } else { 0 },
            operation,
            tenant: "t".into(),
            collection: "collection".into(),
            key: vec![7; 200].into(),
            value: if operation == EventOperation::Delete { Bytes::new() } else { vec![1; 70_000].into() },
            created: 3,
            previous: 300,
            version: 1 << 40,
            deadline_ms,
        }
    }

    /// What is written without a message in between is what the message would have been.
    #[test]
    fn entries_of_a_batch_are_those_that_are_sent_alone() {
        let at = EntryAt { seq: 400, term: 3, time_ms: 1_767_225_600_000, elapsed_ms: 5_000 };
        let events = [
            event(EventOperation::Insert, None),
            event(EventOperation::Update, Some(7_000)),
            event(EventOperation::Delete, None),
            event(EventOperation::Expire, Some(1)),
        ];
        let command = Bytes::from_static(b"a command");
        let wrote = MachineVersion { machine: 2, version: 9 };
        let contents = events
            .iter()
            .map(EntryContent::Event)
            .chain([EntryContent::Command { wrote, command: &command }]);
        let empty = AppliedEvent { value: Bytes::new(), ..events[0].clone() };
        let large = AppliedEvent { value: vec![1; 4 * 1024 * 1024 + 1].into(), ..events[0].clone() };
        let before = [
            KeyBefore::Unknown,
            KeyBefore::Written(events[0].clone()),
            KeyBefore::Written(empty),
            KeyBefore::Written(large),
        ];
        let (mut bytes, mut expected) = (BytesMut::new(), Entries::default());
        for (number, content) in contents.enumerate() {
            let (more, is_item) = (number % 2 == 0, number == 1);
            let history = (number == 0).then_some(HistoryEpoch(u64::MAX));
            let before = before.get(number);
            let outgoing = SentEntry { at, content, more, history, is_item, before };
            let before = bytes.len();
            outgoing.put_batched(&mut bytes);
            assert_eq!(bytes.len() - before, outgoing.batched_len());
            assert_eq!(outgoing.len(), outgoing.message().encoded_len());
            expected.entries.push(outgoing.message());
        }
        assert_eq!(&bytes[..], expected.encode_to_vec());
        assert_eq!(Entries::decode(bytes.freeze()).unwrap(), expected);
        let expires: Vec<_> =
            expected.entries.iter().filter_map(|entry| Some(entry.entity.as_ref()?.expires_ms)).collect();
        assert_eq!(expires, [0, at.time_ms + 2_000, 0, at.time_ms - 4_999]);
        let entities = expected.entries.iter().filter_map(|entry| entry.entity.as_ref());
        let previous: Vec<_> = entities
            .map(|entity| (entity.previous_value.as_ref().map(Bytes::len), entity.previous_unknown))
            .collect();
        assert_eq!(previous, [(None, true), (Some(70_000), false), (Some(0), false), (None, true)]);
    }

    #[test]
    fn a_batch_is_compressed_where_that_makes_it_smaller() {
        let mut state = 1u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        let noise: Vec<u8> = (0..1000).flat_map(|_| next()).collect();
        let even = Bytes::from(vec![7; 10_000]);
        for (entries, asked, compressed) in
            [(even.clone(), true, true), (even, false, false), (noise.into(), true, false)]
        {
            let batch = EntryBatch { entries: entries.clone(), count: 5, is_state: false, compress: asked };
            let batch = batch_message(batch).batch.unwrap();
            assert_eq!((batch.count, batch.raw_bytes), (5, entries.len() as u64));
            assert_eq!(batch.compression == i32::from(Compression::Zstd), compressed);
            let read = match compressed {
                true => zstd::bulk::decompress(&batch.entries, entries.len()).unwrap().into(),
                false => batch.entries,
            };
            assert_eq!(read, entries);
        }
    }
}
