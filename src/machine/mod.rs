//! The state machine: what a user brings, and quorate keeps the same on every node.
//!
//! This room is pure. It has no IO, no clock, no randomness and nothing asynchronous: a state
//! machine that reads any of those gives different states on different nodes, and no protocol can
//! repair that. Time and position reach a command through its [`ApplyContext`].
//!
//! [`kv`](crate::kv::machine) is the machine that `quorate serve` hosts; the embedding examples bring their own. [`sessions`]
//! stands in front of whichever machine it is.

pub(crate) mod sessions;

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

use crate::types::LogId;

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

    /// Whether every command is sure to be decoded again as what was encoded. Until a machine says so, each of its commands
    /// is decoded once more before it is proposed: one that cannot be would end the whole cluster when it is applied, on
    /// every node and at every start. Types that derive `Serialize` and `Deserialize` and use none of serde's attributes
    /// `untagged`, `flatten`, `tag`, `skip_serializing_if`, nor types that ask the input what comes next, such as
    /// `serde_json::Value`, are sure to be.
    const COMMANDS_ROUND_TRIP: bool = false;

    /// Whether `encoded` is a command for certain, told without decoding it. What others send is decoded before it is taken into the
    /// log, and again when it is applied; a machine with many small commands may spare itself the first. False if that is
    /// not known.
    fn is_command(encoded: &[u8]) -> bool {
        let _ = encoded;
        false
    }

    /// Which way the state is hashed. Nodes compare their hashes, and a node whose hash differs stops serving; to be raised
    /// whenever a new version of the machine hashes the same state to something else, or writes it into snapshots in another way and keeps
    /// the default [`state_hash`](Self::state_hash). Hashes of different ways are not compared.
    const HASH_VERSION: u32 = 0;

    /// Applies one command. The only place where the state changes.
    fn apply(&mut self, context: &ApplyContext, command: Self::Command) -> Self::Reply;

    /// The present state. Called after every batch of commands, so it must be cheap: clone a
    /// persistent data structure, not the data.
    fn view(&self) -> Self::View;

    /// Answers `query` from `view`.
    fn query(view: &Self::View, query: Self::Query) -> Self::Answer;

    /// Writes all of `view` to `out`, in a form that [`read_snapshot`](Self::read_snapshot) of this
    /// and later versions understands. Runs off the apply path.
    ///
    /// # Errors
    /// Passes on what `out` returns.
    fn write_snapshot(view: &Self::View, out: &mut dyn Write) -> io::Result<()>;

    /// The machine that [`write_snapshot`](Self::write_snapshot) wrote. `input` has been checked
    /// against its checksum and ends where the snapshot ends.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] when the bytes are not a snapshot of this machine.
    fn read_snapshot(input: &mut dyn Read) -> io::Result<Self>
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
