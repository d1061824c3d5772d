//! Why a cluster was not changed: its members, and who leads it.

use super::{ForwardError, Leader, OperationError, Told, describe};
use crate::reason::Reason;
use crate::shown::Shown;
use crate::types::{Incarnation, NodeId};

/// Why a change of the membership was not made. Every message says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MembershipError {
    /// This node does not lead. Nothing was changed.
    #[error("this node is not the leader: {}", describe(.leader))]
    NotLeader {
        /// Where to go instead.
        leader: Option<Leader>,
    },
    /// No member has this id.
    #[error("node {node_id} is not a member; `quorate member list` shows who is")]
    UnknownMember {
        /// The id asked for.
        node_id: NodeId,
    },
    /// No node can have this id. Nothing was changed.
    #[error("{detail}")]
    NodeId {
        /// Which can be.
        detail: String,
    },
    /// The id belongs to a member with another data directory.
    #[error(
        "node {node_id} is a member with data directory {known}, not {presented}; to put the new one in its place, use `quorate member replace {node_id} --peer {peer}`"
    )]
    AlreadyMember {
        /// The id.
        node_id: NodeId,
        /// The member's data directory.
        known: Incarnation,
        /// The one found at the address that was given.
        presented: Incarnation,
        /// That address.
        peer: String,
    },
    /// The node did not catch up in time. It stays a learner and goes on catching up.
    #[error(
        "node {node_id} is still {lag} entries behind; it stays a learner and goes on catching up: repeat the command, with a longer --catch-up if it has much to fetch"
    )]
    NotCaughtUp {
        /// The learner.
        node_id: NodeId,
        /// Entries it is behind.
        lag: u64,
    },
    /// The node is a member, and does not answer the leader: waiting longer does not make it catch up.
    #[error(
        "node {node_id} is a learner, and the leader does not hear from it at {address}; it cannot catch up before the leader reaches it there: see that it runs, and that {address} leads to its peer port"
    )]
    NotReached {
        /// The learner.
        node_id: NodeId,
        /// Its peer address, as the members know it.
        address: String,
    },
    /// The node answers at the address given, and not at the one that it advertises. Nothing was changed.
    #[error(
        "node {node_id} answers at {address}, but advertises {advertised}, where the leader does not reach it: {reason}; start it with a --peer-advertise address that leads to its peer port from the other members"
    )]
    AdvertisedUnreachable {
        /// The node.
        node_id: NodeId,
        /// The address given.
        address: String,
        /// The one that it advertises.
        advertised: String,
        /// What was met there.
        reason: String,
    },
    /// Too few of the present voters, or of those that there would be, answer the leader. Nothing was changed.
    #[error(
        "of {voters} voters only {healthy} answer, and {needed} are needed to commit the change and to go on after it; bring the others back first, or remove those that are gone for good"
    )]
    WouldLoseQuorum {
        /// Voters that would be left.
        voters: usize,
        /// Those of them that have answered the leader a short while ago.
        healthy: usize,
        /// The majority.
        needed: usize,
    },
    /// The voters that would be left answer, but too few of them have caught up or have a disk that is well. Nothing was
    /// changed.
    #[error(
        "of the {voters} voters that would be left only {healthy} have caught up and have a disk that is well, and {needed} are needed to take writes; see to the others first, or use --force: then nothing may be written until {needed} are"
    )]
    WouldWeakenQuorum {
        /// Voters that would be left.
        voters: usize,
        /// Those of them that are well.
        healthy: usize,
        /// The majority.
        needed: usize,
    },
    /// The new node is in its place already, as a learner, and what the old one was is not known any more. Nothing was
    /// changed.
    #[error(
        "node {node_id} is in its place already, and a learner; if the one it replaced was a voter, `quorate member promote {node_id}` completes the replacement"
    )]
    AlreadyReplaced {
        /// The new node.
        node_id: NodeId,
    },
    /// Both nodes vote: the one would not take the other's place. Nothing was changed.
    #[error(
        "nodes {old} and {new} are both voters, so node {new} cannot take the place of node {old}; to have one voter less, use `quorate member remove {old}`"
    )]
    BothVote {
        /// The node that was to go.
        old: NodeId,
        /// The node that was to come.
        new: NodeId,
    },
    /// The node advertises other addresses, and would correct those given. Nothing was changed.
    #[error(
        "node {node_id} advertises peer address {peer} and client address {client}, and would announce them again; start it with the addresses it is to have, and it announces those by itself"
    )]
    Advertises {
        /// The node.
        node_id: NodeId,
        /// Its peer address, as it says.
        peer: String,
        /// Its client address, as it says.
        client: String,
    },
    /// A cluster without voters does not exist. Nothing was changed.
    #[error(
        "node {node_id} is the only voter; promote another one first, or stop the node to end the cluster"
    )]
    LastVoter {
        /// The voter.
        node_id: NodeId,
    },
    /// Another change is under way. Nothing was changed.
    #[error(
        "another change of the membership is under way; repeat this one once `quorate member list` shows its end"
    )]
    AnotherChange,
    /// As many changes are being made, or wait, as may at a time. Nothing was changed.
    #[error(
        "{limit} changes of the membership like this one are being made or wait, as many as may at a time; repeat this one once some of them have ended"
    )]
    TooManyChanges {
        /// How many may be.
        limit: usize,
    },
    /// The node does not answer. Nothing was changed.
    #[error(
        "node {node_id} cannot be reached at {}: {reason}; is it started (a new one with --join), and is this the address of its peer port?",
        Shown(.address)
    )]
    Unreachable {
        /// The node.
        node_id: NodeId,
        /// The address given.
        address: String,
        /// What was met there.
        reason: String,
    },
    /// Whoever answers is not the node to be added, or refuses to be. Nothing was changed.
    #[error("node {node_id} at {} cannot be added: {detail}", Shown(.address))]
    Identity {
        /// The node.
        node_id: NodeId,
        /// The address given.
        address: String,
        /// Why not, and what to do.
        detail: String,
    },
    /// An address that cannot be one.
    #[error(
        "\"{}\" is no address that others could connect to; write HOST:PORT, such as 10.0.0.4:7901",
        Shown(.address)
    )]
    Address {
        /// What was given.
        address: String,
    },
    /// Nothing had to be changed as far as this node knows, but it may not lead any more. Nothing was changed.
    #[error("whether the members are as they are to be is not known: {reason}; bring voters back first")]
    Unconfirmed {
        /// Why not.
        reason: String,
    },
    /// The caller waits no longer, and nothing was proposed by then. Nothing was changed, and nothing will be.
    #[error("nothing was changed: after {waited_ms} ms it still waited for {waited_for}; allow it more time")]
    OutOfTime {
        /// What it waited for.
        waited_for: String,
        /// How long, in milliseconds.
        waited_ms: u64,
    },
    /// A change was not committed in time. It may be made yet.
    #[error(
        "{step} was not committed within {waited_ms} ms: too few voters answer, or slowly; `quorate member list` shows whether it was made, and the command may be repeated"
    )]
    Timeout {
        /// What was waited for.
        step: String,
        /// How long, in milliseconds.
        waited_ms: u64,
    },
    /// A part of the change is made, and the rest is not. Repeating it completes it.
    #[error("a part of the change is made, and the same command completes it: {source}")]
    HalfMade {
        /// Why the rest is not made. Where it says that nothing was changed it speaks of its own step.
        source: Box<MembershipError>,
    },
    /// Leadership was lost on the way. The change may be made, by half or not at all; repeating it completes it.
    #[error(
        "leadership was lost during the change, which may be made by half; repeat the command to complete it"
    )]
    Interrupted {
        /// Who leads now, if known.
        leader: Option<Leader>,
    },
    /// The leader is to go, and could not hand over first. Nothing was changed.
    #[error("node {node_id} leads, and cannot hand over first: {source}")]
    HandOver {
        /// The leader.
        node_id: NodeId,
        /// Why not.
        source: TransferError,
    },
    /// The node has stopped or is stopping.
    #[error("the node has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
        /// Whether the change may be made, all or half; repeating it completes it.
        maybe_applied: bool,
    },
    /// It was passed on to the leader, and no answer came. Only of changes [from anywhere](crate::Engine::anywhere).
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

impl MembershipError {
    /// The same error, of a change of which a part `is_made` already.
    pub(crate) fn after(self, is_made: bool) -> Self {
        match self {
            error if !is_made => error,
            Self::NotLeader { leader } => Self::Interrupted { leader },
            Self::Stopped { reason, .. } => Self::Stopped { reason, maybe_applied: true },
            error @ (Self::HalfMade { .. } | Self::Interrupted { .. } | Self::Timeout { .. }) => error,
            source => Self::HalfMade { source: Box::new(source) },
        }
    }
}

impl OperationError for MembershipError {
    fn told(&self) -> Told<'_> {
        match self {
            Self::NotLeader { leader } => Told::of(Reason::NotLeader).led_by(leader),
            Self::Interrupted { leader } => Told::of(Reason::Interrupted).undecided(true).led_by(leader),
            Self::Unconfirmed { .. } => Told::of(Reason::NoQuorum),
            Self::Timeout { .. } | Self::HalfMade { .. } => Told::of(Reason::Membership).undecided(true),
            Self::Stopped { maybe_applied, .. } => Told::of(Reason::Stopped).undecided(*maybe_applied),
            Self::OutOfTime { .. } => Told::of(Reason::DeadlineExceeded),
            Self::TooManyChanges { .. } => Told::of(Reason::Overloaded),
            Self::Forward(error) => error.told(),
            Self::NodeId { .. } | Self::Address { .. } => Told::of(Reason::Invalid),
            Self::UnknownMember { .. } => Told::of(Reason::NotFound),
            Self::AlreadyMember { .. }
            | Self::NotCaughtUp { .. }
            | Self::NotReached { .. }
            | Self::AdvertisedUnreachable { .. }
            | Self::WouldLoseQuorum { .. }
            | Self::WouldWeakenQuorum { .. }
            | Self::AlreadyReplaced { .. }
            | Self::BothVote { .. }
            | Self::Advertises { .. }
            | Self::LastVoter { .. }
            | Self::AnotherChange
            | Self::Unreachable { .. }
            | Self::Identity { .. }
            | Self::HandOver { .. } => Told::of(Reason::Membership),
        }
    }
}

/// Why the lead was not handed over. Every message says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// This node does not lead.
    #[error("this node is not the leader: {}", describe(.leader))]
    NotLeader {
        /// Where to go instead.
        leader: Option<Leader>,
    },
    /// No member has this id.
    #[error("node {node_id} is not a member; `quorate member list` shows who is")]
    UnknownMember {
        /// The id asked for.
        node_id: NodeId,
    },
    /// A learner cannot lead.
    #[error(
        "node {node_id} is a learner and cannot lead; `quorate member promote {node_id}` makes it a voter"
    )]
    NotAVoter {
        /// The learner.
        node_id: NodeId,
    },
    /// The node has not answered the leader for a while.
    #[error("node {node_id} does not answer the leader; choose another node, or see to it first")]
    NotInTouch {
        /// The node.
        node_id: NodeId,
    },
    /// The node has too little of the log.
    #[error("node {node_id} is {lag} entries behind; choose another node, or wait until it has caught up")]
    NotCaughtUp {
        /// The node.
        node_id: NodeId,
        /// Entries it is behind.
        lag: u64,
    },
    /// The node's disk is full or hangs, or its state is not the others'.
    #[error(
        "node {node_id} is not fit to lead: its disk is full or hangs, or its state differs from the others'; choose another node, or see to that first"
    )]
    Unfit {
        /// The node.
        node_id: NodeId,
    },
    /// There is no other voter that answers, has caught up, and whose disk is well.
    #[error(
        "no other voter answers, has caught up and has a disk that is well; `quorate status` shows what they lack"
    )]
    NobodyElse,
    /// The lead was offered, and nobody took it in time. It is offered further, and may move yet.
    #[error(
        "nobody took the lead within {waited_ms} ms; it is offered to the other voters in turn, and may move yet"
    )]
    Timeout {
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// The node has stopped or is stopping.
    #[error("the node has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
        /// Whether the lead was offered before.
        maybe_applied: bool,
    },
    /// It was passed on to the leader, and no answer came. Only of hand-overs [from anywhere](crate::Engine::anywhere).
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

impl OperationError for TransferError {
    fn told(&self) -> Told<'_> {
        match self {
            Self::NotLeader { leader } => Told::of(Reason::NotLeader).led_by(leader),
            Self::Stopped { maybe_applied, .. } => Told::of(Reason::Stopped).undecided(*maybe_applied),
            Self::Timeout { .. } => Told::of(Reason::Membership).undecided(true),
            Self::Forward(error) => error.told(),
            Self::UnknownMember { .. } => Told::of(Reason::NotFound),
            Self::NotAVoter { .. }
            | Self::NotInTouch { .. }
            | Self::NotCaughtUp { .. }
            | Self::Unfit { .. }
            | Self::NobodyElse => Told::of(Reason::Membership),
        }
    }
}
