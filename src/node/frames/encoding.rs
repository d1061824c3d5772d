//! What a follower is told, as frames.

use bytes::{Bytes, BytesMut};

use super::codec::{
    self, BATCH_HEAD_BYTES, BatchFrame, COMMAND_BYTES, ChangeFrame, CompressionFrame, ENTITY_BYTES,
    EntityFrame, EntryFrame, HEAD_BYTES, HeartbeatFrame, MAGIC, NodeFrame, Raw, SyncFrame, VERSION,
};
use crate::machine::{AppliedEvent, EventOperation};
use crate::node::subscriptions::{
    EntryAt, EntryBatch, EntryContent, FollowerEncoding, FollowerProgress, PartMark, SentEntry, StateMark,
    SyncBegin, SyncKind,
};
use crate::types::HistoryEpoch;

/// Bytes that are set aside for a frame of a few numbers.
const SMALL_BYTES: usize = 80;

/// Frames for one follower.
#[derive(Debug, Default)]
pub(super) struct FrameEncoding {
    state: StateSum,
}

/// What was sent of a state.
#[derive(Debug, Default)]
struct StateSum {
    items: u64,
    /// Of the items, one after the other, before they are compressed.
    checksum: crc32fast::Hasher,
}

impl StateSum {
    fn add(&mut self, entries: &[u8], count: u32) {
        self.items += u64::from(count);
        self.checksum.update(entries);
    }
}

impl FollowerEncoding for FrameEncoding {
    type Message = Bytes;

    const TRANSPORT: &'static str = "frames";

    fn beginning(&mut self, begins: SyncBegin) -> Option<Bytes> {
        let SyncBegin { kind, seq, history } = begins;
        let sync = match kind {
            SyncKind::Partial => SyncFrame::Partial,
            SyncKind::Full => SyncFrame::Full,
        };
        let begin = NodeFrame::Begin { magic: MAGIC, version: VERSION, history: history.0, sync, seq };
        Some(codec::framed(&begin, SMALL_BYTES))
    }

    fn entry_len(entry: &SentEntry<'_>) -> usize {
        HEAD_BYTES + BATCH_HEAD_BYTES + Self::batched_len(entry)
    }

    fn entry(&mut self, entry: &SentEntry<'_>) -> Bytes {
        let mut entries = BytesMut::with_capacity(Self::batched_len(entry));
        Self::put_batched(entry, &mut entries);
        let entries = entries.freeze();
        self.batch(EntryBatch { entries, count: 1, is_state: entry.is_item, compress: false })()
    }

    fn batched_len(entry: &SentEntry<'_>) -> usize {
        match entry.content {
            EntryContent::Event(AppliedEvent { tenant, collection, key, value, .. }) => {
                ENTITY_BYTES + tenant.len() + collection.len() + key.len() + value.len()
            }
            EntryContent::Command { command, .. } => COMMAND_BYTES + command.len(),
        }
    }

    fn put_batched(entry: &SentEntry<'_>, out: &mut BytesMut) {
        let EntryAt { seq, term, time_ms, elapsed_ms } = entry.at;
        let change = change(entry);
        out.reserve(Self::batched_len(entry));
        codec::put(&EntryFrame { seq, term, time_ms, elapsed_ms, more: entry.more, change }, out);
    }

    fn batch(&mut self, batch: EntryBatch) -> impl FnOnce() -> Bytes + Send + 'static {
        if batch.is_state {
            self.state.add(&batch.entries, batch.count);
        }
        move || {
            let (count, is_state, packed) = (batch.count, batch.is_state, batch.pack());
            let compression = match packed.is_compressed {
                true => CompressionFrame::Zstd,
                false => CompressionFrame::None,
            };
            let (raw_bytes, entries) = (packed.raw_bytes, Raw(&packed.entries));
            let batch = BatchFrame { compression, count, raw_bytes, entries };
            let frame = if is_state { NodeFrame::StatePart(batch) } else { NodeFrame::Entries(batch) };
            codec::framed(&frame, BATCH_HEAD_BYTES + packed.entries.len())
        }
    }

    fn mark(&mut self, at: EntryAt, mark: StateMark, _: HistoryEpoch) -> Bytes {
        let EntryAt { seq, term, time_ms, elapsed_ms } = at;
        let frame = match mark {
            StateMark::Begin => {
                self.state = StateSum::default();
                NodeFrame::StateBegin { seq, term, time_ms, elapsed_ms }
            }
            StateMark::End => {
                let StateSum { items, checksum } = std::mem::take(&mut self.state);
                NodeFrame::StateEnd { seq, items, crc32: checksum.finalize() }
            }
        };
        codec::framed(&frame, SMALL_BYTES)
    }

    /// A state by frames is taken as a whole or not at all: its sum is that of all items.
    fn part(&mut self, _: EntryAt, _: PartMark, _: HistoryEpoch) -> Option<Bytes> {
        None
    }

    fn heartbeat(&mut self, progress: &FollowerProgress) -> Bytes {
        let FollowerProgress { upto_seq, applied_seq, committed_seq, upto_time_ms, applied_time_ms, .. } =
            *progress;
        let heartbeat = HeartbeatFrame {
            upto_seq,
            applied_seq,
            committed_seq,
            upto_time_ms,
            applied_time_ms,
            applied_elapsed_ms: progress.applied_elapsed_ms,
            lag_operations: committed_seq.saturating_sub(upto_seq),
            lag_ms: applied_time_ms.saturating_sub(upto_time_ms),
        };
        codec::framed(&NodeFrame::Heartbeat(heartbeat), SMALL_BYTES)
    }

    fn len(message: &Bytes) -> usize {
        message.len()
    }
}

fn change<'a>(entry: &SentEntry<'a>) -> ChangeFrame<'a> {
    let event = match entry.content {
        EntryContent::Event(event) => event,
        EntryContent::Command { wrote, command } => {
            let (machine, version) = (wrote.machine.into(), wrote.version);
            return ChangeFrame::Command { machine, version, command: Raw(command) };
        }
    };
    let entity = EntityFrame {
        tenant: Raw(&event.tenant),
        collection: Raw(&event.collection),
        key: Raw(&event.key),
        value: Raw(&event.value),
        create_seq: event.created,
        previous_seq: event.previous,
        version: event.version,
        expires_ms: entry.expires_ms(event),
        deadline_elapsed_ms: event.deadline_ms.unwrap_or(0),
        machine: event.machine.into(),
    };
    match event.operation {
        EventOperation::Insert => ChangeFrame::Insert(entity),
        EventOperation::Update => ChangeFrame::Update(entity),
        EventOperation::Delete => ChangeFrame::Delete(entity),
        EventOperation::Expire => ChangeFrame::Expire(entity),
    }
}

#[cfg(test)]
mod tests;
