//! Public errors: one enum per operation, so that a caller's `match` holds only what can happen.
//!
//! Three kinds are never mixed. A state machine's *rejection* is a value in its reply. An *operation
//! error* is one of the enums here and goes to the caller. A *fatal error* (a failed fsync, a checksum
//! mismatch, a panic in apply) stops the node; callers see [`WriteError::Stopped`] and its kin.

mod forward;
mod membership;
mod told;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use forward::ForwardError;
pub use membership::{MembershipError, TransferError};
pub use told::{OperationError, Told};

use crate::reason::Reason;
use crate::shown::Shown;
pub(crate) use crate::types::Leader;
use crate::types::{
    Divergence, HistoryEpoch, Incarnation, LogId, MachineVersion, NodeId, UnconfirmedReply,
    UnsupportedVersion,
};

fn describe(leader: &Option<Leader>) -> String {
    match leader {
        Some(leader) => format!("node {} at {} leads", leader.node_id, leader.client),
        None => "no leader is known at present; retry shortly".to_owned(),
    }
}

fn nodes(ids: &[NodeId]) -> String {
    let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
    format!("{} {}", if ids.len() == 1 { "node" } else { "nodes" }, ids.join(", "))
}

fn members_are(ids: &[NodeId]) -> String {
    match ids {
        // All have told; what they agree on is not committed yet.
        [] => "the cluster is".to_owned(),
        [_] => format!("{} is", nodes(ids)),
        _ => format!("{} are", nodes(ids)),
    }
}

fn applied_up_to(index: &Option<u64>) -> String {
    match index {
        Some(index) => format!("has applied up to entry {index}"),
        None => "has applied nothing yet".to_owned(),
    }
}

/// Why a write was not acknowledged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// This node does not lead. The command was not proposed.
    #[error("this node is not the leader: {}", describe(.leader))]
    NotLeader {
        /// Where to go instead.
        leader: Option<Leader>,
    },
    /// The encoded command exceeds the limit. It was not proposed.
    #[error("the command takes {bytes} bytes, more than the limit of {limit} bytes")]
    TooLarge {
        /// Size of the encoded command.
        bytes: usize,
        /// The configured limit, `max_command_bytes`.
        limit: usize,
    },
    /// The command's `Serialize` implementation failed. It was not proposed.
    #[error("the command cannot be encoded: {reason}")]
    Unencodable {
        /// What it said.
        reason: String,
    },
    /// The session, or a position in the command, belongs to another history than this cluster's. The command was not
    /// proposed.
    #[error("{}", other_history(.given, .known))]
    OtherHistory {
        /// The history that was given.
        given: HistoryEpoch,
        /// This cluster's.
        known: HistoryEpoch,
    },
    /// The command can be encoded, but not be decoded again from that. It was not proposed: no node could have applied it.
    #[error(
        "the command cannot be decoded again from its own encoding: {reason}; its types need Serialize and Deserialize implementations that fit a format which does not describe itself"
    )]
    Undecodable {
        /// What was wrong.
        reason: String,
    },
    /// Not all members are known to read this version of the command yet, so it was not proposed: one that does not would have to
    /// stop. It is taken once all of them have been upgraded.
    #[error(
        "the command is of {wrote}, which {} not known to read yet; upgrade all members, and retry",
        members_are(.missing)
    )]
    VersionNotAgreed {
        /// The version of the command.
        wrote: MachineVersion,
        /// The members of which it is not known.
        missing: Vec<NodeId>,
    },
    /// The write was applied, but what the state machine replied cannot be read: it does not decode from its own encoding,
    /// or comes from another version of the machine that replied to an earlier attempt.
    #[error("the write at {log_id} was applied, but its reply cannot be read: {reason}")]
    UnreadableReply {
        /// Where the command stands.
        log_id: LogId,
        /// What was wrong.
        reason: String,
    },
    /// Too many bytes are in flight on this node. The command was not proposed.
    #[error("too many writes are in flight on this node; retry after a pause")]
    Overloaded,
    /// The disk of this node has too little room, or the disks of so many voters have that nothing would be
    /// committed. The command was not proposed. Writes are taken again, without a restart, once there is room; reads
    /// go on meanwhile.
    #[error(
        "the disk of this node, or of too many other voters, is full ({available_bytes} bytes are left on this node): free some space there, or enlarge it"
    )]
    DiskFull {
        /// Bytes that are free on this node.
        available_bytes: u64,
    },
    /// The disk of this node hangs. The command was not proposed.
    #[error("the disk of this node has not finished a write for {} ms; retry, another node may lead by now", .writing_for.as_millis())]
    DiskStalled {
        /// How long the present write has been under way.
        writing_for: Duration,
    },
    /// The disks of so many other voters hang that nothing would be committed. The command was not proposed. Writes are
    /// taken again, without a restart, once enough of them answer; reads go on meanwhile.
    #[error(
        "the disks of so many other voters do not finish their writes that this one could not be committed: `quorate status` shows whose; look at those disks, and retry"
    )]
    VotersStalled,
    /// This node's state differs from the other nodes' at the same position, so whatever it replied would be wrong. The
    /// command was not proposed.
    #[error(
        "{divergence}: this node's state differs from the others', and it takes no writes; rebuild it from its peers"
    )]
    Diverged {
        /// Where, and how.
        divergence: Divergence,
    },
    /// The state would have outgrown its quota, so the command was not applied, on any node. Reads, deletes, and writes
    /// that do not make the state larger go on. A repetition is applied once there is room.
    #[error(
        "the state has {state_bytes} of {quota_bytes} bytes that its quota allows, and this write does not fit: delete something, or raise the quota"
    )]
    QuotaExceeded {
        /// Bytes of state.
        state_bytes: u64,
        /// How many they may be.
        quota_bytes: u64,
    },
    /// This node leads, but has not heard from a quorum for longer than its lease. The command was not proposed.
    #[error("this leader has lost touch with its quorum; retry, another node may lead by now")]
    NoQuorum,
    /// A write of a session cannot be acknowledged by the leader alone: whether the session lets it through is known
    /// only when it is applied. It was not proposed.
    #[error(
        "a write of a session cannot be acknowledged at level leader; choose another level, or no session"
    )]
    LeaderAckInSession,
    /// The session was never opened, was closed, or was not used for too long. This attempt was not applied; an
    /// earlier one of the same write may have been.
    #[error(
        "session {session} does not exist any more: whether earlier attempts were applied cannot be told"
    )]
    SessionExpired {
        /// The session.
        session: u64,
    },
    /// The sequence is too far ahead of the first unanswered one. The command was not applied.
    #[error("the session has too many unanswered writes; wait for some of them")]
    WindowExceeded,
    /// The session has said before that this write was answered or given up. It was not applied by this attempt.
    #[error("the answer to this write was forgotten, because the session had said that it was settled")]
    AnswerForgotten,
    /// All sessions are in use. None was opened.
    #[error(
        "all sessions are in use; close some (`quorate session list` shows whose they are), or wait until unused ones expire"
    )]
    TooManySessions,
    /// The client has as many sessions as one connection may have. None was opened.
    #[error(
        "this connection has {limit} sessions open, the most it may have; close some, or use one for many writes"
    )]
    TooManyOfOpener {
        /// How many it may have.
        limit: usize,
    },
    /// Committed and applied, but not every voter is known to hold it.
    #[error(
        "the write at {log_id} is committed and applied, but not known to be on disk at {}", nodes(.missing)
    )]
    AckTimeout {
        /// Where it stands.
        log_id: LogId,
        /// The voters not known to hold it.
        missing: Vec<NodeId>,
        /// What came of it; [`Engine::unconfirmed`](crate::Engine::unconfirmed) decodes it. `None` only where it was passed on to a
        /// leader of an earlier version, or is too large for a message.
        reply: Option<Box<UnconfirmedReply>>,
    },
    /// Leadership was lost while the command was in flight: it may have been applied, or may be later.
    #[error("leadership was lost before the outcome was known: the write may have been applied")]
    Interrupted {
        /// Who leads now, if known.
        leader: Option<Leader>,
    },
    /// The node has stopped or is stopping. A command in flight may have been applied.
    #[error("the node has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
        /// Whether the command had been proposed when the node stopped.
        maybe_applied: bool,
    },
    /// It was passed on to the leader, and no answer came. Only of writes [from anywhere](crate::Engine::anywhere).
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

impl OperationError for WriteError {
    fn told(&self) -> Told<'_> {
        match self {
            Self::NotLeader { leader } => Told::of(Reason::NotLeader).led_by(leader),
            Self::TooLarge { .. } => Told::of(Reason::TooLarge),
            Self::Unencodable { .. } | Self::LeaderAckInSession => Told::of(Reason::Invalid),
            Self::Undecodable { .. } => Told::of(Reason::Undecodable),
            Self::UnreadableReply { .. } => Told::of(Reason::Undecodable).undecided(true),
            Self::Diverged { .. } => Told::of(Reason::Diverged),
            Self::Overloaded => Told::of(Reason::Overloaded),
            Self::NoQuorum => Told::of(Reason::NoQuorum),
            Self::DiskFull { .. } => Told::of(Reason::DiskFull),
            Self::DiskStalled { .. } | Self::VotersStalled => Told::of(Reason::DiskStalled),
            Self::QuotaExceeded { .. } => Told::of(Reason::QuotaExceeded),
            Self::VersionNotAgreed { .. } => Told::of(Reason::VersionNotAgreed),
            // Earlier attempts are what the session was for.
            Self::SessionExpired { .. } => Told::of(Reason::SessionExpired),
            Self::AnswerForgotten => Told::of(Reason::AnswerForgotten),
            Self::WindowExceeded => Told::of(Reason::WindowExceeded),
            Self::TooManySessions | Self::TooManyOfOpener { .. } => Told::of(Reason::TooManySessions),
            Self::AckTimeout { log_id, missing, reply: _ } => {
                Told { standing: Some((*log_id, missing)), ..Told::of(Reason::AckTimeout).undecided(true) }
            }
            Self::Interrupted { leader } => Told::of(Reason::Interrupted).undecided(true).led_by(leader),
            Self::OtherHistory { .. } => Told::of(Reason::OtherHistory),
            Self::Stopped { maybe_applied, .. } => Told::of(Reason::Stopped).undecided(*maybe_applied),
            Self::Forward(error) => error.told(),
        }
    }
}

impl WriteError {
    /// Whether the write may have taken effect, or may still do so.
    pub fn maybe_applied(&self) -> bool {
        self.told().maybe_applied
    }

    /// The same, of a write to `machine`.
    pub(crate) fn of_machine(mut self, machine: u16) -> Self {
        if let Self::AckTimeout { reply: Some(reply), .. } = &mut self {
            reply.machine = machine;
        }
        self
    }
}

/// Why a read was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// This node does not lead, and the level asks for the leader.
    #[error("this node is not the leader: {}", describe(.leader))]
    NotLeader {
        /// Where to go instead.
        leader: Option<Leader>,
    },
    /// A quorum did not confirm this node's leadership in time.
    #[error("no quorum confirmed this node's leadership: {reason}")]
    NoQuorum {
        /// What was heard instead.
        reason: String,
    },
    /// This node's state did not become as recent as was asked for in time.
    #[error("this node {}, and the state after entry {wanted} was asked for; ask another node, or wait", applied_up_to(.applied))]
    Behind {
        /// Index of the last entry it has applied.
        applied: Option<u64>,
        /// Index asked for.
        wanted: u64,
    },
    /// No entry of the cluster has the index asked for: it is of another cluster, or of a write that was lost.
    #[error(
        "position {wanted} is ahead of the cluster, whose last committed position is {last}: it is of another cluster, or of a write that was acknowledged by its leader alone and lost with it"
    )]
    Ahead {
        /// Index asked for.
        wanted: u64,
        /// The last that was committed.
        last: u64,
    },
    /// The position asked for belongs to another history than this cluster's.
    #[error("{}", other_history(.given, .known))]
    OtherHistory {
        /// The history that was given.
        given: HistoryEpoch,
        /// This cluster's.
        known: HistoryEpoch,
    },
    /// This node's state differs from the other nodes' at the same position, so whatever it answered would be wrong.
    #[error(
        "{divergence}: this node's state differs from the others', and it answers no reads; ask another node, and rebuild this one from its peers"
    )]
    Diverged {
        /// Where, and how.
        divergence: Divergence,
    },
    /// The node has stopped or is stopping.
    #[error("the node has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
}

impl OperationError for ReadError {
    fn told(&self) -> Told<'_> {
        match self {
            Self::NotLeader { leader } => Told::of(Reason::NotLeader).led_by(leader),
            Self::NoQuorum { .. } => Told::of(Reason::NoQuorum),
            Self::Behind { .. } => Told::of(Reason::Behind),
            Self::Ahead { .. } => Told::of(Reason::Ahead),
            Self::OtherHistory { .. } => Told::of(Reason::OtherHistory),
            Self::Diverged { .. } => Told::of(Reason::Diverged),
            Self::Stopped { .. } => Told::of(Reason::Stopped),
        }
    }
}

fn other_history(given: &HistoryEpoch, known: &HistoryEpoch) -> String {
    format!(
        "the position or session belongs to history {given}, and this cluster's is {known}: it was made anew or restored, or is another cluster; read what it holds and begin again from there"
    )
}

/// A setting that a running node does not take. Says which, and what would do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigureError(pub String);

/// Why no snapshot was taken on request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The node has applied nothing.
    #[error("this node has applied nothing yet; there is nothing to take a snapshot of")]
    Nothing,
    /// It was not written in time; it may be later.
    #[error(
        "no snapshot after {waited_ms} ms; it is being written still, or the node's log says why it is not"
    )]
    Timeout {
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// The disk has no room for one.
    #[error("no snapshot: the disk is full. One is taken once there is room")]
    DiskFull,
    /// The node has stopped or is stopping.
    #[error("the node has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
}

impl OperationError for SnapshotError {
    fn told(&self) -> Told<'_> {
        match self {
            Self::Nothing => Told::of(Reason::Behind),
            // It is being written, and there may be one yet.
            Self::Timeout { .. } => Told::of(Reason::DeadlineExceeded).undecided(true),
            Self::DiskFull => Told::of(Reason::DiskFull),
            Self::Stopped { .. } => Told::of(Reason::Stopped),
        }
    }
}

/// Whether an IO error says that this process, or the system, has too many files open: it passes.
pub(crate) fn is_out_of_files(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

fn unreadable_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            "Give the user that this program runs as the right to read and write it"
        }
        _ if is_out_of_files(source) => "Allow this program more open files, and start again",
        _ => {
            "Start again; if that fails too, the disk is at fault: move the whole data directory aside and rebuild this node from its peers"
        }
    }
}

fn room_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull => "; its file system is full: make room there, and start again",
        _ => "",
    }
}

fn listen_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => "stop the process that uses it, or choose another address",
        io::ErrorKind::AddrNotAvailable => {
            "this machine has no such address: listen on one that it has, and advertise the one that others use"
        }
        io::ErrorKind::PermissionDenied => {
            "choose a port above 1023, or give the process the right to use this one"
        }
        _ => "it must be HOST:PORT with a host that this machine can resolve and that is its own",
    }
}

/// Why a node could not be opened. Every message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A setting is missing or contradicts another.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// The peer or client address cannot be listened on.
    #[error("cannot listen on {}: {source}; {}", Shown(.address), listen_hint(.source))]
    Listen {
        /// The address asked for.
        address: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// What the data directory holds cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The consensus core refused to start.
    #[error("the consensus core did not start: {0}")]
    Core(String),
}

/// Why the data directory cannot be used, or can no longer be trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// Reading or writing failed.
    #[error("{operation} {}: {source}{}", path.display(), room_hint(.source))]
    Io {
        /// What was attempted, such as `cannot write`.
        operation: &'static str,
        /// Where.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Reading failed while the data directory was opened. That is not corruption: nothing was changed since, and the
    /// next start may find everything.
    #[error(
        "{} cannot be read: {source}; the data is untouched. {}",
        path.display(),
        unreadable_hint(.source)
    )]
    Unreadable {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Another process holds the directory.
    #[error("data directory {} is in use by another process; stop it first, or choose another --data-dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The directory belongs to another cluster.
    #[error(
        "data directory {} belongs to cluster \"{found}\", not \"{expected}\"; choose another --data-dir, or start with --cluster {found}",
        path.display()
    )]
    OtherCluster {
        /// The directory.
        path: PathBuf,
        /// The cluster it belongs to.
        found: String,
        /// The cluster asked for.
        expected: String,
    },
    /// The directory belongs to another node.
    #[error(
        "data directory {} belongs to node {found}, not node {expected}; choose another --data-dir, or start with --node-id {found}",
        path.display()
    )]
    OtherNode {
        /// The directory.
        path: PathBuf,
        /// The node it belongs to.
        found: NodeId,
        /// The node asked for.
        expected: NodeId,
    },
    /// A file holds something that was not written there.
    #[error(
        "{} is corrupt: {detail}. Move the whole data directory aside and rebuild this node from its peers",
        path.display()
    )]
    Corrupt {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong, and where in the file.
        detail: String,
    },
    /// A snapshot is whole, as its checksums show, but this program cannot read it: another version of it wrote the snapshot,
    /// or one with another state machine.
    #[error(
        "{} is whole, but this program cannot read what it holds: {detail}. The data is untouched: start the program that wrote it, or a newer version",
        path.display()
    )]
    Undecodable {
        /// The file.
        path: PathBuf,
        /// What the reader says.
        detail: String,
    },
    /// A snapshot is whole, and holds the state of a machine, or of a version of it, that this build does not read.
    #[error("{}: {source}. The data is untouched", path.display())]
    Machine {
        /// The file.
        path: PathBuf,
        /// Which, and what to do.
        source: UnsupportedVersion,
    },
    /// The directory was in use before, and what it held is gone.
    #[error(
        "{} is gone, but {} shows that this node had promised to keep it; restore the directory, or move all of it aside and rejoin as a new node",
        missing.display(),
        marker.display()
    )]
    Lost {
        /// What is missing.
        missing: PathBuf,
        /// The marker that says it was there.
        marker: PathBuf,
    },
    /// Written by a version that this one does not know.
    #[error("{} has format version {found}; this build reads up to {supported}. Use a newer quorate", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest this build understands.
        supported: u32,
    },
    /// The durability of sled's log could not be ensured on this system.
    #[error("sled's log is not power-safe here: {detail}; refusing to start")]
    NotPowerSafe {
        /// What the self-check found.
        detail: String,
    },
}

/// Why a node stopped although nobody asked it to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FatalError {
    /// The cluster knows this node id with another data directory.
    #[error(
        "node {node_id} is known to its cluster by data directory {known}, but presents {presented}: the disk was wiped or replaced, and with it the log and vote this node had promised to keep. Restore the old data directory; or start the node with --join on an empty one, and let the cluster take it back with `quorate member replace {node_id} --peer HOST:PORT`"
    )]
    Fenced {
        /// This node.
        node_id: NodeId,
        /// The incarnation in the membership.
        known: Incarnation,
        /// The incarnation of this data directory.
        presented: Incarnation,
    },
    /// The cluster has removed this node.
    #[error(
        "node {node_id} was removed from its cluster. To bring it back, start it with --join and use `quorate member add {node_id} --peer HOST:PORT`; its data directory may be kept"
    )]
    Removed {
        /// This node.
        node_id: NodeId,
    },
    /// The peers this node was given belong to a cluster that does not know it.
    #[error(
        "node {node_id} is not a member of the cluster at {address}; start it with the --peers of a cluster it founds, or with --join, and then add it with `quorate member add {node_id} --peer HOST:PORT`"
    )]
    NotAMember {
        /// This node.
        node_id: NodeId,
        /// The peer that said so.
        address: String,
    },
    /// The node has offered its lead to others, nobody has taken it, and it could not give it up.
    #[error(
        "this node offered its lead to the others, nobody took it, and it could not give it up either; start it again: it then stands for election like any other"
    )]
    StuckTransfer,
    /// The cluster has committed what this node's machine does not read: it would have to leave out a part of the log.
    #[error("{reason}. The data of this node is untouched")]
    Outdated {
        /// What that is, and what to do.
        reason: String,
    },
    /// A task that the node cannot do without has panicked, or has come to its end.
    #[error("task {name} {failure}")]
    Task {
        /// Its name.
        name: &'static str,
        /// What has become of it.
        failure: String,
    },
    /// Writing, flushing or reading the log or a snapshot failed, or apply panicked.
    #[error("{0}")]
    Core(String),
}
