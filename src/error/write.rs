//! Why a write was not acknowledged, and whether it may have been applied.

use std::time::Duration;

use super::{ForwardError, OperationError, Told, describe, nodes, other_history};
use crate::reason::Reason;
use crate::types::{Divergence, HistoryEpoch, Leader, LogId, MachineVersion, NodeId, UnconfirmedReply};

fn members_are(ids: &[NodeId]) -> String {
    match ids {
        // All have told; what they agree on is not committed yet.
        [] => "the cluster is".to_owned(),
        [_] => format!("{} is", nodes(ids)),
        _ => format!("{} are", nodes(ids)),
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
