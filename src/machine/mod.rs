//! The state machine: what a user brings, and quorate keeps the same on every node.
//!
//! This room is pure. It has no IO, no clock, no randomness and nothing asynchronous: a state
//! machine that reads any of those gives different states on different nodes, and no protocol can
//! repair that. Time and position reach a command through its [`ApplyContext`].
//!
//! [`kv`](crate::kv::machine) is the machine that `quorate serve` hosts; the embedding examples bring their own. [`sessions`]
//! stands in front of whichever machine it is.

mod composition;
#[cfg(test)]
pub(crate) mod counting;
mod encoding;
mod events;
#[cfg(any(feature = "server", feature = "client"))]
pub(crate) mod message;
mod recording;
pub(crate) mod sessions;
mod snapshot_parts;

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

pub use self::composition::{Composed, Either};
pub use self::encoding::{DecodeError, decode, encode};
pub use self::events::{AppliedEvent, EventOperation, EventSink, NewEvent};
pub use self::recording::{Recording, RecordingError};
pub use self::snapshot_parts::SnapshotParts;
use self::snapshot_parts::write_part;
use crate::types::{LogId, MachineVersion, ReadableVersions, check_version};

/// Most machines of one node.
pub const MOST_MACHINES: usize = 16;

/// What a command may know about the world, the same on every node that applies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApplyContext {
    /// Position of the entry that carries the command. Its index is the revision of the state.
    pub log_id: LogId,
    /// Elapsed time when the command was proposed, in milliseconds: for leases and everything else that ends after a
    /// while. Never less than that of any command applied before. Between two commands it advances by no more than
    /// what has passed between their proposals, and by little less: a change of leader may cost some milliseconds, a
    /// restart of all nodes at once the time they were down and up to ten seconds. No wall clock enters it. The difference
    /// of two values is what counts: it begins at a wall clock, so it looks like a time of day, but it is none.
    pub elapsed_ms: u64,
    /// Log time when the command was proposed, in milliseconds since the Unix epoch: for people to read. It is the wall clock of the
    /// leader, give or take a second, and goes back when that is set back. Decide nothing by it.
    pub time_ms: u64,
}

/// When which machines of a node want to be woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wakes([Option<u64>; MOST_MACHINES]);

impl Wakes {
    /// The machine in this `place` among the [machines](StateMachine::MACHINES) of its node wants to be woken then, in [elapsed
    /// time](ApplyContext::elapsed_ms).
    pub fn set(&mut self, place: usize, at_ms: Option<u64>) {
        self.0[place] = at_ms;
    }

    /// Each machine that wants to be woken: its place, and when.
    pub fn iter(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.0.iter().enumerate().filter_map(|(place, at_ms)| Some((place, (*at_ms)?)))
    }

    /// When the first of them is due.
    pub fn first_ms(&self) -> Option<u64> {
        self.0.iter().flatten().copied().min()
    }
}

/// A deterministic state machine.
///
/// # Invariants an implementation owes
///
/// - *Determinism*: the same commands with the same contexts in the same order give the same state,
///   the same replies and the same [`state_hash`](Self::state_hash) on every node, in every build.
///   Iteration over a `HashMap`, the clock, random numbers and floating-point that depends on the
///   platform all break this.
/// - *Totality*: `apply` accepts every command that can be decoded. A command that the machine does
///   not want is answered with a reply that says so. A panic stops the node.
/// - *Independence*: a [`View`](Self::View) does not change when later commands are applied.
///
/// A machine in memory is rebuilt at start from the newest snapshot and the log after it.
///
/// # Another version of a machine
///
/// What a machine writes stays: in logs, in snapshots, on nodes that are not upgraded yet. Whoever changes a command or a
/// snapshot raises [`VERSION`](Self::VERSION), and is handed the version of all that earlier ones wrote. Members agree on a version
/// before anything is written in it; `docs/design/composition.md` says how.
pub trait StateMachine: Send + Sync + 'static {
    /// What a write carries. Replicated and stored, so its encoding must outlive upgrades.
    type Command: Serialize + DeserializeOwned + Send + 'static;
    /// What a write answers, rejections included.
    type Reply: Serialize + DeserializeOwned + Send + 'static;
    /// What a read asks. Never leaves the node that answers it.
    type Query: Send + 'static;
    /// What a read is told.
    type Answer: Send + 'static;
    /// The state at one point in time. Queries are answered and snapshots written from views, so
    /// that neither waits for `apply` nor holds it up.
    type View: Send + Sync + 'static;

    /// The version that this build writes. To be raised with every command or snapshot that builds before would not read, or would
    /// read as something else.
    const VERSION: u32 = 0;

    /// The oldest version that this build reads. What is older is refused, never guessed at.
    const OLDEST_VERSION: u32 = 0;

    /// Whether every command is sure to be decoded again as what was encoded. Until a machine says so, each of its commands
    /// is decoded once more before it is proposed: one that cannot be would end the whole cluster when it is applied, on
    /// every node and at every start. Types that derive `Serialize` and `Deserialize` and use none of serde's attributes
    /// `untagged`, `flatten`, `tag`, `skip_serializing_if`, nor types that ask the input what comes next, such as
    /// `serde_json::Value`, are sure to be.
    const COMMANDS_ROUND_TRIP: bool = false;

    /// The first version that reads `command` as this build encodes it. A command is proposed once all members read that
    /// version: one that has not changed should go on to name the version that it came with, so that it can be written while
    /// nodes are being upgraded.
    fn command_version(command: &Self::Command) -> u32 {
        let _ = command;
        Self::VERSION
    }

    /// The command that `version`, from [`OLDEST_VERSION`](Self::OLDEST_VERSION) to [`VERSION`](Self::VERSION), wrote as `encoded`: it must do what
    /// it did then. [`decode`] reads any type that an earlier version had.
    ///
    /// # Errors
    /// When it is none.
    fn decode_command(version: u32, encoded: &[u8]) -> Result<Self::Command, DecodeError> {
        let _ = version;
        decode(encoded)
    }

    /// Whether `encoded`, which `version` wrote, is a command for certain, told without decoding it. What others send is decoded before it is taken into the
    /// log, and again when it is applied; a machine with many small commands may spare itself the first. False if that is
    /// not known.
    fn is_command(version: u32, encoded: &[u8]) -> bool {
        let _ = (version, encoded);
        false
    }

    /// Which way the state is hashed. Nodes compare their hashes, and a node whose hash differs stops serving; to be raised
    /// whenever a new version of the machine hashes the same state to something else, or writes it into snapshots in another way and keeps
    /// the default [`state_hash`](Self::state_hash). Hashes of different ways are not compared.
    const HASH_VERSION: u32 = 0;

    /// Applies one command. The only place where the state changes.
    fn apply(&mut self, context: &ApplyContext, command: Self::Command) -> Self::Reply;

    /// Whether the machine tells those who follow it what happens, by [`apply_telling`](Self::apply_telling). Of one that does not, they are
    /// told its commands.
    const TELLS_EVENTS: bool = false;

    /// Whether it also tells its [state](Self::tell_state). A composition does not.
    const TELLS_STATE: bool = Self::TELLS_EVENTS;

    /// Whether it [takes in](Self::take_event) what another one has told, if that [tells](Self::TELLS_EVENTS) anything: whether it can have replicas.
    const TAKES_EVENTS: bool = Self::TELLS_STATE || !Self::TELLS_EVENTS;

    /// As [`apply`](Self::apply), for a machine that [tells](Self::TELLS_EVENTS) what happens. The events follow from the command and the state, as the
    /// reply does: they are the same on every node. A command that tells nothing changes nothing that concerns those who follow.
    fn apply_telling(
        &mut self,
        context: &ApplyContext,
        command: Self::Command,
        events: &mut dyn EventSink,
    ) -> Self::Reply {
        let _ = events;
        self.apply(context, command)
    }

    /// Takes in what another state of this machine has [told](Self::apply_telling) of the entry at `index`, or of its [state](Self::tell_state): a replica
    /// comes to the same state in this way, or, told of a part only, to that part of it. Only asked of a machine that
    /// [does so](Self::TAKES_EVENTS); one that tells no events is given the commands.
    ///
    /// # Errors
    /// That this cannot have happened to this state, in words.
    fn take_event(&mut self, index: u64, event: &AppliedEvent) -> Result<(), String> {
        let _ = event;
        Err(format!("the event at position {index} is told to a machine that takes none"))
    }

    /// Tells the items that `view` holds as [inserts](EventOperation::Insert), `previous` being the index of the entry that wrote the item
    /// last: those after `after`, which is empty at first, until they are about `max_bytes`. Returns what to give as `after` for
    /// the rest; `None` when there is none. Only asked of a machine that [does so](Self::TELLS_STATE): those who begin to follow it are told
    /// its state in this way.
    fn tell_state(
        view: &Self::View,
        after: &[u8],
        max_bytes: usize,
        events: &mut dyn EventSink,
    ) -> Option<Vec<u8>> {
        let _ = (view, after, max_bytes, events);
        None
    }

    /// The present state. Called after every batch of commands, so it must be cheap: clone a
    /// persistent data structure, not the data.
    fn view(&self) -> Self::View;

    /// Answers `query` from `view`.
    fn query(view: &Self::View, query: Self::Query) -> Self::Answer;

    /// Writes all of `view` to `out`, in the form of [`VERSION`](Self::VERSION). Runs off the apply path.
    ///
    /// # Errors
    /// Passes on what `out` returns.
    fn write_snapshot(view: &Self::View, out: &mut dyn Write) -> io::Result<()>;

    /// The machine that [`write_snapshot`](Self::write_snapshot) of `version`, from
    /// [`OLDEST_VERSION`](Self::OLDEST_VERSION) to [`VERSION`](Self::VERSION), wrote. `input` has been checked
    /// against its checksum and ends where the snapshot ends.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] when the bytes are not a snapshot of this machine.
    fn read_snapshot(version: u32, input: &mut dyn Read) -> io::Result<Self>
    where
        Self: Sized;

    /// Called on a machine that was read from a snapshot before it takes the place of `previous`, on the same node. What a
    /// machine has from its node rather than from the log, such as how much of a history to keep, is in no snapshot: take
    /// it over here. It must not change what [`write_snapshot`](Self::write_snapshot) writes.
    fn replaces(&mut self, previous: &Self)
    where
        Self: Sized,
    {
        let _ = previous;
    }

    /// The hash of the present state, for a machine that keeps it up to date anyway; the same as
    /// [`state_hash`](Self::state_hash) of a view taken now. It lets a node tell its hash without taking a view.
    fn running_hash(&self) -> Option<u64> {
        None
    }

    /// Bytes that the state takes in memory, for a machine that counts them: what the cluster's quota is compared with.
    /// A part of the state, the same on every node. `None` for a machine that does not count: it has no quota. Asked
    /// with every command, so it must cost nothing.
    fn state_bytes(&self) -> Option<u64> {
        None
    }

    /// Most bytes by which `command` may make any state grow, as [`state_bytes`](Self::state_bytes) counts; 0 for a
    /// command that only removes, which no quota holds up. Asked with every command, so it must be cheap.
    fn most_growth_bytes(command: &Self::Command) -> u64 {
        let _ = command;
        0
    }

    /// Bytes by which `command` would make this state grow: no more than
    /// [`most_growth_bytes`](Self::most_growth_bytes), and no less than it then does. Asked only when the quota is
    /// nearly reached. The answer decides whether the command is applied, so it must be the same on every node.
    fn growth_bytes(view: &Self::View, command: &Self::Command) -> u64 {
        let _ = view;
        Self::most_growth_bytes(command)
    }

    /// When, in [elapsed time](ApplyContext::elapsed_ms), the command that [`wake`](Self::wake) gives is due; `None` for never. The
    /// leader proposes it once that much time has passed, again and again until this is later. While this is not
    /// `None`, time is written to the log although nothing else is, so that it is not lost with all nodes. Asked
    /// after every batch, so it must be cheap.
    fn next_wake_ms(&self) -> Option<u64> {
        None
    }

    /// The command that the leader proposes when the machine is due. `None` for a machine that never wakes.
    fn wake() -> Option<Self::Command>
    where
        Self: Sized,
    {
        None
    }

    // What follows is for compositions of several machines; one that is alone leaves it as it is.

    /// All that a build reads, in the order of the machines' numbers.
    const MACHINES: &'static [ReadableVersions] =
        &[ReadableVersions { machine: 0, oldest: Self::OLDEST_VERSION, newest: Self::VERSION }];

    /// The machine that `command` is for, and its [version](Self::command_version).
    fn wrote(command: &Self::Command) -> MachineVersion {
        MachineVersion { machine: 0, version: Self::command_version(command) }
    }

    /// What is encoded of `command`, beside its [machine and version](Self::wrote).
    fn content(command: &Self::Command) -> impl Serialize + '_ {
        command
    }

    /// The command in `encoded`, of a machine and a version that are among [`MACHINES`](Self::MACHINES).
    ///
    /// # Errors
    /// When it is none.
    fn decode_of(wrote: MachineVersion, encoded: &[u8]) -> Result<Self::Command, DecodeError> {
        Self::decode_command(wrote.version, encoded)
    }

    /// As [`is_command`](Self::is_command), of any machine and version.
    fn is_command_of(wrote: MachineVersion, encoded: &[u8]) -> bool {
        check_version(wrote, Self::MACHINES).is_ok() && Self::is_command(wrote.version, encoded)
    }

    /// Whether events are told of `command`.
    fn tells_events(command: &Self::Command) -> bool {
        let _ = command;
        Self::TELLS_EVENTS
    }

    /// What is encoded of `reply`: whose it is, its command says.
    fn reply_content(reply: &Self::Reply) -> impl Serialize + '_ {
        reply
    }

    /// The reply of `machine` in `encoded`.
    ///
    /// # Errors
    /// When it is none.
    fn decode_reply(machine: u16, encoded: &[u8]) -> Result<Self::Reply, DecodeError> {
        let _ = machine;
        decode(encoded)
    }

    /// Writes `view` as one part of several.
    ///
    /// # Errors
    /// Passes on what `out` returns.
    fn write_parts(view: &Self::View, out: &mut dyn Write) -> io::Result<()> {
        write_part(out, |out| Self::write_snapshot(view, out))
    }

    /// The machine whose part is among `parts`.
    ///
    /// # Errors
    /// As [`read_snapshot`](Self::read_snapshot).
    fn read_parts(parts: &mut SnapshotParts<'_>) -> io::Result<Self>
    where
        Self: Sized,
    {
        let read = parts.read(0, |version, input| Self::read_snapshot(version, input))?;
        read.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it has no part of the first machine"))
    }

    /// Says when each of the machines is due.
    fn wakes(&self, wakes: &mut Wakes) {
        wakes.set(0, self.next_wake_ms());
    }

    /// Whether what is added counts no bytes before anything is applied to it. While a cluster is upgraded, nodes with and without
    /// it decide what the quota has room for.
    fn counts_from_nothing() -> bool
    where
        Self: Sized,
    {
        true
    }

    /// The machine is to begin a cluster's history, which knows only the machines in `known`: those that are added later begin
    /// in their default states, on every node.
    fn begins_with(&mut self, known: &dyn Fn(u16) -> bool) {
        let _ = known;
    }

    /// The command that the leader proposes when `machine` is due.
    fn wake_of(machine: u16) -> Option<Self::Command>
    where
        Self: Sized,
    {
        let _ = machine;
        Self::wake()
    }

    /// A hash of the state: equal on two nodes that have applied the same entries, and in practice
    /// different otherwise. The default hashes what `write_snapshot` writes, which costs time
    /// proportional to the state on every call; a machine of size should keep a running hash.
    fn state_hash(view: &Self::View) -> u64 {
        let mut hasher = HashWriter(xxhash_rust::xxh3::Xxh3::new());
        Self::write_snapshot(view, &mut hasher).expect("invariant: a hash accepts every byte");
        hasher.0.digest()
    }
}

/// Feeds a hash with what is written to it.
struct HashWriter(xxhash_rust::xxh3::Xxh3);

impl Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
