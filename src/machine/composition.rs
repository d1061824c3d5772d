//! Several machines in one log.
//!
//! [`Composed`] is a machine made of two, and one of the two may be composed again. Each has its own number, its own versions, its own part
//! of the snapshot; they share the log, and with it the order in which everything is applied, its clocks, and its sessions. What a
//! command changes in one of them, no command of another one sees.
//!
//! # Numbers
//!
//! A machine that is alone has the number 0, and so have all logs and snapshots of it. One that is added to it
//! later gets the next number, and finds all that was written before to be the first machine's: it is added by an upgrade like any other.
//! Numbers are never used again, and grow from the inside out, so that the parts of a snapshot have one order:
//!
//! ```
//! # use quorate::Composed;
//! # use quorate::kv::machine::KvMachine as Keys;
//! # type Jobs = Keys; type Counts = Keys;
//! type All = Composed<Composed<Keys, Jobs, 1>, Counts, 2>;
//! ```
//!
//! # What it costs
//!
//! A machine that is alone is not composed: it is stored without number and length, as before there were any. For each machine that is added, a
//! command has a `match` more, and six bytes; all calls are static.
//!
//! # What it does not do
//!
//! Take a machine out again, or let machines call each other: that would be one machine.
//!
//! The protocol, with a figure: `docs/design/composition.md`.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, Serializer};

use super::events::NumberedEvents;
use super::snapshot_parts::{SnapshotParts, write_part};
use super::{AppliedEvent, ApplyContext, DecodeError, EventSink, MOST_MACHINES, StateMachine, Wakes};
use crate::types::{MachineVersion, ReadableVersions};

/// A machine beside others, under its `NUMBER`. See the [module](self).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Composed<A, B, const NUMBER: u16> {
    /// The machine or machines that it was added to.
    pub base: A,
    /// The machine that was added. On a node whose snapshot is older than that, its initial state is the default one.
    pub added: B,
}

impl<A, B, const NUMBER: u16> Composed<A, B, NUMBER> {
    /// `base` with `added`, in their initial states.
    pub fn new(base: A, added: B) -> Self {
        Self { base, added }
    }
}

/// Of one of two machines: a command, a reply, a query, an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Either<A, B> {
    /// Of the machine or machines that the other was added to.
    Base(A),
    /// Of the machine that was added.
    Added(B),
}

impl<A, B> Either<A, B> {
    /// What it holds, if that is the base's.
    pub fn base(self) -> Option<A> {
        match self {
            Self::Base(base) => Some(base),
            Self::Added(_) => None,
        }
    }

    /// What it holds, if that is the added machine's.
    pub fn added(self) -> Option<B> {
        match self {
            Self::Base(_) => None,
            Self::Added(added) => Some(added),
        }
    }
}

/// Serializes what it holds, and not which it is: that is told beside it.
struct Bare<A, B>(Either<A, B>);

impl<A: Serialize, B: Serialize> Serialize for Bare<A, B> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            Either::Base(base) => base.serialize(serializer),
            Either::Added(added) => added.serialize(serializer),
        }
    }
}

/// One number for two, none of which can be told from it.
fn mixed(base: u64, added: u64, number: u16) -> u64 {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&base.to_le_bytes());
    bytes[8..16].copy_from_slice(&added.to_le_bytes());
    bytes[16..].copy_from_slice(&number.to_le_bytes());
    xxhash_rust::xxh3::xxh3_64(&bytes)
}

/// Adds up what those count that count at all.
fn sum(base: Option<u64>, added: Option<u64>) -> Option<u64> {
    match (base, added) {
        (Some(base), Some(added)) => Some(base.saturating_add(added)),
        (counted, None) | (None, counted) => counted,
    }
}

impl<A: StateMachine, B: StateMachine + Default, const NUMBER: u16> Composed<A, B, NUMBER> {
    /// Machines with what is added.
    const COUNT: usize = A::MACHINES.len() + 1;

    const READS: [ReadableVersions; MOST_MACHINES] = {
        assert!(Self::COUNT <= MOST_MACHINES, "a node has at most 16 machines");
        assert!(B::MACHINES.len() == 1, "what is added is one machine: compose from the inside out");
        let mut all = [ReadableVersions::FIRST; MOST_MACHINES];
        let mut at = 0;
        while at < A::MACHINES.len() {
            all[at] = A::MACHINES[at];
            at += 1;
        }
        assert!(
            all[at - 1].machine < NUMBER,
            "the number of a machine is larger than those of all before it"
        );
        all[at] = ReadableVersions { machine: NUMBER, oldest: B::OLDEST_VERSION, newest: B::VERSION };
        all
    };

    const ALL_READS: &'static [ReadableVersions; MOST_MACHINES] = &Self::READS;
}

impl<A: StateMachine, B: StateMachine + Default, const NUMBER: u16> StateMachine for Composed<A, B, NUMBER> {
    type Command = Either<A::Command, B::Command>;
    type Reply = Either<A::Reply, B::Reply>;
    type Query = Either<A::Query, B::Query>;
    type Answer = Either<A::Answer, B::Answer>;
    type View = (A::View, B::View);

    const COMMANDS_ROUND_TRIP: bool = A::COMMANDS_ROUND_TRIP && B::COMMANDS_ROUND_TRIP;
    /// Of some of them; see [`tells_events`](Self::tells_events).
    const TELLS_EVENTS: bool = A::TELLS_EVENTS || B::TELLS_EVENTS;
    /// One after the other would not be of one moment for those who follow a part.
    const TELLS_STATE: bool = false;
    const TAKES_EVENTS: bool = A::TAKES_EVENTS && B::TAKES_EVENTS;

    /// Another one than that of `A` alone, and of any other composition.
    const HASH_VERSION: u32 = {
        let (base, added) = (A::HASH_VERSION.wrapping_mul(31), B::HASH_VERSION.wrapping_mul(0x0001_0003));
        base.wrapping_add(added).wrapping_add(NUMBER as u32).wrapping_add(0x436f_6d70)
    };

    const MACHINES: &'static [ReadableVersions] = Self::ALL_READS.split_at(Self::COUNT).0;

    fn apply(&mut self, context: &ApplyContext, command: Self::Command) -> Self::Reply {
        match command {
            Either::Base(command) => Either::Base(self.base.apply(context, command)),
            Either::Added(command) => Either::Added(self.added.apply(context, command)),
        }
    }

    fn apply_telling(
        &mut self,
        context: &ApplyContext,
        command: Self::Command,
        events: &mut dyn EventSink,
    ) -> Self::Reply {
        match command {
            Either::Base(command) => Either::Base(self.base.apply_telling(context, command, events)),
            Either::Added(command) => {
                let events = &mut NumberedEvents { machine: NUMBER, events };
                Either::Added(self.added.apply_telling(context, command, events))
            }
        }
    }

    fn take_event(&mut self, index: u64, event: &AppliedEvent) -> Result<(), String> {
        match event.machine == NUMBER {
            true => self.added.take_event(index, event),
            false => self.base.take_event(index, event),
        }
    }

    fn tells_events(command: &Self::Command) -> bool {
        match command {
            Either::Base(command) => A::tells_events(command),
            Either::Added(command) => B::tells_events(command),
        }
    }

    fn view(&self) -> Self::View {
        (self.base.view(), self.added.view())
    }

    fn query((base, added): &Self::View, query: Self::Query) -> Self::Answer {
        match query {
            Either::Base(query) => Either::Base(A::query(base, query)),
            Either::Added(query) => Either::Added(B::query(added, query)),
        }
    }

    fn write_snapshot(view: &Self::View, out: &mut dyn Write) -> io::Result<()> {
        Self::write_parts(view, out)
    }

    /// Of a composition there is no snapshot without parts.
    fn read_snapshot(_: u32, _: &mut dyn Read) -> io::Result<Self> {
        Err(io::Error::new(io::ErrorKind::InvalidData, "a composition is read by its parts"))
    }

    fn write_parts((base, added): &Self::View, out: &mut dyn Write) -> io::Result<()> {
        A::write_parts(base, out)?;
        write_part(out, |out| B::write_snapshot(added, out))
    }

    fn read_parts(parts: &mut SnapshotParts<'_>) -> io::Result<Self> {
        let base = A::read_parts(parts)?;
        let added = parts.read(NUMBER, |version, input| B::read_snapshot(version, input))?;
        Ok(Self { base, added: added.unwrap_or_default() })
    }

    fn replaces(&mut self, previous: &Self) {
        self.base.replaces(&previous.base);
        self.added.replaces(&previous.added);
    }

    fn running_hash(&self) -> Option<u64> {
        Some(mixed(self.base.running_hash()?, self.added.running_hash()?, NUMBER))
    }

    fn state_hash((base, added): &Self::View) -> u64 {
        mixed(A::state_hash(base), B::state_hash(added), NUMBER)
    }

    /// Of those machines that count their bytes. What is added counts none in its default state, or nodes that are not upgraded yet
    /// would find more room than the others.
    fn state_bytes(&self) -> Option<u64> {
        sum(self.base.state_bytes(), self.added.state_bytes())
    }

    fn most_growth_bytes(command: &Self::Command) -> u64 {
        match command {
            Either::Base(command) => A::most_growth_bytes(command),
            Either::Added(command) => B::most_growth_bytes(command),
        }
    }

    fn growth_bytes((base, added): &Self::View, command: &Self::Command) -> u64 {
        match command {
            Either::Base(command) => A::growth_bytes(base, command),
            Either::Added(command) => B::growth_bytes(added, command),
        }
    }

    fn next_wake_ms(&self) -> Option<u64> {
        let mut wakes = Wakes::default();
        self.wakes(&mut wakes);
        wakes.first_ms()
    }

    fn wakes(&self, wakes: &mut Wakes) {
        self.base.wakes(wakes);
        wakes.set(Self::COUNT - 1, self.added.next_wake_ms());
    }

    fn counts_from_nothing() -> bool {
        A::counts_from_nothing() && B::default().state_bytes().is_none_or(|bytes| bytes == 0)
    }

    fn begins_with(&mut self, known: &dyn Fn(u16) -> bool) {
        self.base.begins_with(known);
        if !known(NUMBER) {
            self.added = B::default();
        }
    }

    fn wake_of(machine: u16) -> Option<Self::Command> {
        match machine == NUMBER {
            true => B::wake().map(Either::Added),
            false => A::wake_of(machine).map(Either::Base),
        }
    }

    fn wrote(command: &Self::Command) -> MachineVersion {
        match command {
            Either::Base(command) => A::wrote(command),
            Either::Added(command) => {
                MachineVersion { machine: NUMBER, version: B::command_version(command) }
            }
        }
    }

    fn content(command: &Self::Command) -> impl Serialize + '_ {
        Bare(match command {
            Either::Base(command) => Either::Base(A::content(command)),
            Either::Added(command) => Either::Added(B::content(command)),
        })
    }

    fn decode_of(wrote: MachineVersion, encoded: &[u8]) -> Result<Self::Command, DecodeError> {
        match wrote.machine == NUMBER {
            true => B::decode_command(wrote.version, encoded).map(Either::Added),
            false => A::decode_of(wrote, encoded).map(Either::Base),
        }
    }

    fn is_command_of(wrote: MachineVersion, encoded: &[u8]) -> bool {
        match wrote.machine == NUMBER {
            true => B::is_command_of(MachineVersion { machine: 0, ..wrote }, encoded),
            false => A::is_command_of(wrote, encoded),
        }
    }

    fn reply_content(reply: &Self::Reply) -> impl Serialize + '_ {
        Bare(match reply {
            Either::Base(reply) => Either::Base(A::reply_content(reply)),
            Either::Added(reply) => Either::Added(B::reply_content(reply)),
        })
    }

    fn decode_reply(machine: u16, encoded: &[u8]) -> Result<Self::Reply, DecodeError> {
        match machine == NUMBER {
            true => B::decode_reply(0, encoded).map(Either::Added),
            false => A::decode_reply(machine, encoded).map(Either::Base),
        }
    }
}

#[cfg(test)]
mod tests;
