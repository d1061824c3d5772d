//! What was applied at one position, in bytes: the same in memory and in the event log.
//!
//! | bytes | content |
//! |---|---|
//! | 4 | bytes that follow |
//! | 1 | kind: 1 events, 2 a command |
//! | 8 | term |
//! | 8 | index |
//! | 8 | log time, in milliseconds since the Unix epoch |
//! | 8 | elapsed time, in milliseconds |
//! | rest | by kind |
//!
//! Events: how many (4), then each: operation (1: 1 insert, 2 update, 3 delete, 4 expire; 128 more for the event of a machine whose number is not 0, which
//! follows: 2), index of the entry that created the key (8), of the
//! write before (8), writes since it was created (8), deadline in elapsed milliseconds (8, 0 for none), bytes of tenant, collection, key and value (4
//! each), and those. A command: machine (2), version (4), the command as its machine encodes it. Numbers are little-endian.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::machine::{AppliedEvent, ApplyContext, EventOperation, EventSink, NewEvent};
use crate::types::{LogId, MachineVersion};

const EVENTS: u8 = 1;
const COMMAND: u8 = 2;
/// In the operation of an event: the number of its machine follows.
const NUMBERED: u8 = 1 << 7;
/// Bytes before what depends on the kind, without the length.
const HEAD_BYTES: usize = 1 + 4 * 8;
/// Bytes of an event beside its labels, key and value.
const EVENT_BYTES: usize = 1 + 4 * 8 + 4 * 4;

/// What was applied at one position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeedRecord {
    /// Where.
    pub log_id: LogId,
    /// Log time, in milliseconds since the Unix epoch: for people to read.
    pub time_ms: u64,
    /// [Elapsed time](crate::ApplyContext::elapsed_ms), in milliseconds: deadlines are told in it.
    pub elapsed_ms: u64,
    /// What.
    pub content: FeedContent,
}

/// What a record holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedContent {
    /// What the machine told of it, in order; at least one.
    Events(Vec<AppliedEvent>),
    /// The command, of a machine that tells no events.
    Command {
        /// Which machine it is for, and the version that wrote it.
        wrote: MachineVersion,
        /// As that machine encodes it.
        command: Bytes,
    },
}

/// Bytes that are no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("what was applied cannot be read: {0}")]
pub(crate) struct NoRecord(pub &'static str);

impl FeedRecord {
    /// Operations that it stands for.
    pub(crate) fn operations(&self) -> usize {
        match &self.content {
            FeedContent::Events(events) => events.len(),
            FeedContent::Command { .. } => 1,
        }
    }

    /// Bytes of what happened.
    pub(crate) fn bytes(&self) -> usize {
        match &self.content {
            FeedContent::Events(events) => {
                events.iter().map(|event| event.key.len() + event.value.len()).sum()
            }
            FeedContent::Command { command, .. } => command.len(),
        }
    }

    /// The record at the front of `bytes`, which is taken off.
    pub(crate) fn take(bytes: &mut Bytes) -> Result<Self, NoRecord> {
        let length = bytes.try_get_u32_le().map_err(|_| NoRecord("no length"))? as usize;
        if length < HEAD_BYTES || length > bytes.len() {
            return Err(NoRecord("a wrong length"));
        }
        let mut record = bytes.split_to(length);
        let kind = record.get_u8();
        let log_id = LogId::new(record.get_u64_le(), record.get_u64_le());
        let (time_ms, elapsed_ms) = (record.get_u64_le(), record.get_u64_le());
        let content = match kind {
            EVENTS => FeedContent::Events(take_events(&mut record)?),
            COMMAND => take_command(record)?,
            _ => return Err(NoRecord("a kind that this build does not know")),
        };
        Ok(Self { log_id, time_ms, elapsed_ms, content })
    }
}

/// The index of the record at the front of `bytes`, and its length in all.
pub(crate) fn glance(bytes: &[u8]) -> Result<(u64, usize), NoRecord> {
    let mut head = bytes;
    let length = head.try_get_u32_le().map_err(|_| NoRecord("no length"))? as usize;
    if length < HEAD_BYTES || length > head.len() {
        return Err(NoRecord("a wrong length"));
    }
    head.advance(1 + 8);
    Ok((head.get_u64_le(), 4 + length))
}

fn take_command(mut record: Bytes) -> Result<FeedContent, NoRecord> {
    if record.len() < 2 + 4 {
        return Err(NoRecord("a command without its version"));
    }
    let wrote = MachineVersion { machine: record.get_u16_le(), version: record.get_u32_le() };
    Ok(FeedContent::Command { wrote, command: record })
}

fn take_events(record: &mut Bytes) -> Result<Vec<AppliedEvent>, NoRecord> {
    let count = record.try_get_u32_le().map_err(|_| NoRecord("events without a number"))? as usize;
    if count > record.len() / EVENT_BYTES {
        return Err(NoRecord("more events than there are bytes"));
    }
    let mut events = Vec::with_capacity(count);
    for _ in 0..count {
        events.push(take_event(record)?);
    }
    if !record.is_empty() {
        return Err(NoRecord("bytes behind the last event"));
    }
    Ok(events)
}

fn take_event(record: &mut Bytes) -> Result<AppliedEvent, NoRecord> {
    if record.len() < EVENT_BYTES {
        return Err(NoRecord("half an event"));
    }
    let tag = record.get_u8();
    let machine = match tag & NUMBERED {
        0 => 0,
        // The rest may be too short then.
        _ if record.len() < EVENT_BYTES + 1 => return Err(NoRecord("half an event")),
        _ => record.get_u16_le(),
    };
    let operation = EventOperation::of(tag & !NUMBERED).ok_or(NoRecord("an unknown operation"))?;
    let [created, previous, version, deadline_ms] = std::array::from_fn(|_| record.get_u64_le());
    let lengths: [usize; 4] = std::array::from_fn(|_| record.get_u32_le() as usize);
    let mut parts = [const { Bytes::new() }; 4];
    for (part, length) in parts.iter_mut().zip(lengths) {
        if length > record.len() {
            return Err(NoRecord("half an event"));
        }
        *part = record.split_to(length);
    }
    let [tenant, collection, key, value] = parts;
    let deadline_ms = (deadline_ms != 0).then_some(deadline_ms);
    Ok(AppliedEvent {
        machine,
        operation,
        tenant,
        collection,
        key,
        value,
        created,
        previous,
        version,
        deadline_ms,
    })
}

/// Writes the record of one position behind what is in `out`.
pub(crate) struct RecordWriter<'a> {
    out: &'a mut BytesMut,
    /// Where the record begins.
    begin: usize,
    events: u32,
}

impl<'a> RecordWriter<'a> {
    /// Begins the record of the position `at`.
    pub(crate) fn begin(out: &'a mut BytesMut, at: &ApplyContext) -> Self {
        let begin = begin_record(out, EVENTS, at);
        out.put_u32_le(0);
        Self { out, begin, events: 0 }
    }

    /// Ends it, and says how many operations it holds. There is none if nothing was told.
    pub(crate) fn end(self) -> u32 {
        if self.events == 0 {
            self.out.truncate(self.begin);
            return 0;
        }
        let count = self.begin + 4 + HEAD_BYTES;
        self.out[count..count + 4].copy_from_slice(&self.events.to_le_bytes());
        end_record(self.out, self.begin);
        self.events
    }
}

impl EventSink for RecordWriter<'_> {
    fn event_of(&mut self, machine: u16, event: NewEvent<'_>) {
        let NewEvent { operation, tenant, collection, key, value, .. } = event;
        let parts = [tenant.as_bytes(), collection.as_bytes(), key, value];
        self.out.reserve(EVENT_BYTES + 2 + parts.iter().map(|part| part.len()).sum::<usize>());
        if machine == 0 {
            self.out.put_u8(operation as u8);
        } else {
            self.out.put_u8(operation as u8 | NUMBERED);
            self.out.put_u16_le(machine);
        }
        for number in [event.created, event.previous, event.version, event.deadline_ms.unwrap_or(0)] {
            self.out.put_u64_le(number);
        }
        for part in parts {
            self.out
                .put_u32_le(u32::try_from(part.len()).expect("invariant: a part of a command is smaller"));
        }
        for part in parts {
            self.out.put_slice(part);
        }
        self.events += 1;
    }
}

/// Writes the record of a command behind what is in `out`.
pub(crate) fn put_command(out: &mut BytesMut, at: &ApplyContext, wrote: MachineVersion, command: &[u8]) {
    out.reserve(4 + HEAD_BYTES + 2 + 4 + command.len());
    let begin = begin_record(out, COMMAND, at);
    out.put_u16_le(wrote.machine);
    out.put_u32_le(wrote.version);
    out.put_slice(command);
    end_record(out, begin);
}

fn begin_record(out: &mut BytesMut, kind: u8, at: &ApplyContext) -> usize {
    let begin = out.len();
    out.put_u32_le(0);
    out.put_u8(kind);
    for number in [at.log_id.term, at.log_id.index, at.time_ms, at.elapsed_ms] {
        out.put_u64_le(number);
    }
    begin
}

fn end_record(out: &mut BytesMut, begin: usize) {
    let length = u32::try_from(out.len() - begin - 4).expect("invariant: what a command does is smaller");
    out[begin..begin + 4].copy_from_slice(&length.to_le_bytes());
}
