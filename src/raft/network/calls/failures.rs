//! The errors of forwarded calls on the wire: what the leader answered arrives as the same variant, with what it says.

use std::time::Duration;

use super::{CallError, MOST_REPLY_BYTES, from_leader_hint, from_log_id, leader_hint};
use crate::error::{ForwardError, MembershipError, OperationError, TransferError, WriteError};
use crate::proto::peer::{self as proto, call_failure as wire};
use crate::raft::network::wire::{Malformed, incarnation, plain_log_id};
use crate::runtime::whole_ms;
use crate::types::{Divergence, HistoryEpoch, Leader, MachineVersion, NodeId, UnconfirmedReply};

use wire::membership::Why as MembershipWhy;
use wire::transfer::Why as TransferWhy;
use wire::write::Why as WriteWhy;

impl CallError {
    /// The message that says so.
    pub(super) fn into_wire(self) -> proto::CallFailure {
        let known = |of, error: &dyn OperationError| {
            let (message, maybe_applied) = (error.to_string(), error.told().maybe_applied);
            proto::CallFailure { message, maybe_applied, of: Some(of) }
        };
        match self {
            Self::Write(error) => known(wire::Of::Write(write(&error)), &error),
            Self::Membership(error) => known(wire::Of::Membership(membership(&error)), &error),
            Self::Transfer(error) => known(wire::Of::Transfer(transfer(&error)), &error),
            Self::Overloaded => proto::CallFailure {
                message: "too many calls are under way; repeat this one after a pause".to_owned(),
                maybe_applied: false,
                of: Some(wire::Of::Overloaded(NOTHING)),
            },
            Self::Other { message, maybe_applied } => proto::CallFailure { message, maybe_applied, of: None },
        }
    }

    /// The error in a message. One that this build does not know keeps its words, and whether the call may have been
    /// carried out.
    ///
    /// # Errors
    /// When something is missing.
    pub(super) fn from_wire(failure: proto::CallFailure) -> Result<Self, Malformed> {
        let proto::CallFailure { of, message, maybe_applied } = failure;
        let known = match of {
            Some(wire::Of::Write(wire::Write { why: Some(why) })) => Self::Write(from_write(why)?),
            Some(wire::Of::Membership(wire::Membership { why: Some(why) })) => {
                Self::Membership(from_membership(why)?)
            }
            Some(wire::Of::Transfer(wire::Transfer { why: Some(why) })) => {
                Self::Transfer(from_transfer(why)?)
            }
            Some(wire::Of::Overloaded(_)) => Self::Overloaded,
            Some(
                wire::Of::Write(wire::Write { why: None })
                | wire::Of::Membership(wire::Membership { why: None })
                | wire::Of::Transfer(wire::Transfer { why: None }),
            )
            | None => Self::Other { message, maybe_applied },
        };
        Ok(known)
    }
}

const NOTHING: wire::Nothing = wire::Nothing {};

fn some_leader(leader: &Option<Leader>) -> wire::SomeLeader {
    wire::SomeLeader { leader: leader.clone().map(leader_hint) }
}

fn from_some_leader(wire::SomeLeader { leader }: wire::SomeLeader) -> Option<Leader> {
    leader.map(from_leader_hint)
}

fn passed_on(error: &ForwardError) -> wire::PassedOn {
    let (lost, overloaded) =
        (matches!(error, ForwardError::Lost { .. }), matches!(error, ForwardError::Overloaded { .. }));
    let (leader, reason) = match error.clone() {
        ForwardError::NotTaken { leader, reason } | ForwardError::Lost { leader, reason } => (leader, reason),
        ForwardError::Overloaded { leader } => (leader, String::new()),
    };
    wire::PassedOn { leader: Some(leader_hint(leader)), reason, lost, overloaded }
}

fn from_passed_on(
    wire::PassedOn { leader, reason, lost, overloaded }: wire::PassedOn,
) -> Result<ForwardError, Malformed> {
    let leader = from_leader_hint(leader.ok_or(Malformed("a leader is missing"))?);
    Ok(match (lost, overloaded) {
        (true, _) => ForwardError::Lost { leader, reason },
        (false, true) => ForwardError::Overloaded { leader },
        (false, false) => ForwardError::NotTaken { leader, reason },
    })
}

fn lag(node_id: NodeId, entries: u64) -> wire::Lag {
    wire::Lag { node_id, entries }
}

fn write(error: &WriteError) -> wire::Write {
    use wire::write::{Diverged, Histories, NotAgreed, Sizes, Standing, Stopped, Unreadable};
    let why = match error {
        WriteError::NotLeader { leader } => WriteWhy::NotLeader(some_leader(leader)),
        WriteError::TooLarge { bytes, limit } => {
            WriteWhy::TooLarge(Sizes { bytes: *bytes as u64, limit: *limit as u64 })
        }
        WriteError::Unencodable { reason } => WriteWhy::Unencodable(reason.clone()),
        WriteError::OtherHistory { given, known } => {
            WriteWhy::OtherHistory(Histories { given: given.0, known: known.0 })
        }
        WriteError::Undecodable { reason } => WriteWhy::Undecodable(reason.clone()),
        WriteError::VersionNotAgreed { wrote, missing } => {
            let wrote = proto::MachineVersion { machine: wrote.machine.into(), version: wrote.version };
            WriteWhy::VersionNotAgreed(NotAgreed { wrote: Some(wrote), missing: missing.clone() })
        }
        WriteError::UnreadableReply { log_id, reason } => {
            WriteWhy::UnreadableReply(Unreadable { at: Some(plain_log_id(*log_id)), reason: reason.clone() })
        }
        WriteError::Overloaded => WriteWhy::Overloaded(NOTHING),
        WriteError::DiskFull { available_bytes } => WriteWhy::DiskFull(*available_bytes),
        WriteError::DiskStalled { writing_for } => WriteWhy::DiskStalled(whole_ms(*writing_for)),
        WriteError::VotersStalled => WriteWhy::VotersStalled(NOTHING),
        WriteError::Diverged { divergence: Divergence { at, own, majority } } => {
            let (at, own, majority) = (Some(plain_log_id(*at)), *own, *majority);
            WriteWhy::Diverged(Diverged { at, own, majority })
        }
        WriteError::QuotaExceeded { state_bytes, quota_bytes } => {
            WriteWhy::QuotaExceeded(Sizes { bytes: *state_bytes, limit: *quota_bytes })
        }
        WriteError::NoQuorum => WriteWhy::NoQuorum(NOTHING),
        WriteError::LeaderAckInSession => WriteWhy::LeaderAckInSession(NOTHING),
        WriteError::SessionExpired { session } => WriteWhy::SessionExpired(*session),
        WriteError::WindowExceeded => WriteWhy::WindowExceeded(NOTHING),
        WriteError::AnswerForgotten => WriteWhy::AnswerForgotten(NOTHING),
        WriteError::TooManySessions => WriteWhy::TooManySessions(NOTHING),
        WriteError::TooManyOfOpener { limit } => WriteWhy::TooManyOfOpener(*limit as u64),
        WriteError::AckTimeout { log_id, missing, reply } => {
            let told =
                Standing { at: Some(plain_log_id(*log_id)), missing: missing.clone(), ..Default::default() };
            // What is too large for a message is left out: the error says more than that it is.
            let reply = reply.as_deref().filter(|told| told.reply.len() <= MOST_REPLY_BYTES);
            WriteWhy::AckTimeout(match reply.cloned() {
                Some(UnconfirmedReply { reply, held_by, repeated, machine: _, applied_here: _ }) => {
                    Standing { reply: Some(reply), held_by, repeated, ..told }
                }
                None => told,
            })
        }
        WriteError::Interrupted { leader } => WriteWhy::Interrupted(some_leader(leader)),
        WriteError::Stopped { reason, maybe_applied } => {
            WriteWhy::Stopped(Stopped { reason: reason.clone(), maybe_applied: *maybe_applied })
        }
        WriteError::Forward(error) => WriteWhy::PassedOn(passed_on(error)),
    };
    wire::Write { why: Some(why) }
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn from_write(why: WriteWhy) -> Result<WriteError, Malformed> {
    Ok(match why {
        WriteWhy::NotLeader(leader) => WriteError::NotLeader { leader: from_some_leader(leader) },
        WriteWhy::TooLarge(sizes) => {
            WriteError::TooLarge { bytes: size(sizes.bytes), limit: size(sizes.limit) }
        }
        WriteWhy::Unencodable(reason) => WriteError::Unencodable { reason },
        WriteWhy::OtherHistory(told) => {
            WriteError::OtherHistory { given: HistoryEpoch(told.given), known: HistoryEpoch(told.known) }
        }
        WriteWhy::Undecodable(reason) => WriteError::Undecodable { reason },
        WriteWhy::VersionNotAgreed(told) => {
            let wrote = told.wrote.ok_or(Malformed("a version is missing"))?;
            let machine = u16::try_from(wrote.machine);
            let machine = machine.map_err(|_| Malformed("there is no machine of such a number"))?;
            let wrote = MachineVersion { machine, version: wrote.version };
            WriteError::VersionNotAgreed { wrote, missing: told.missing }
        }
        WriteWhy::UnreadableReply(told) => {
            WriteError::UnreadableReply { log_id: from_log_id(told.at)?, reason: told.reason }
        }
        WriteWhy::Overloaded(_) => WriteError::Overloaded,
        WriteWhy::DiskFull(available_bytes) => WriteError::DiskFull { available_bytes },
        WriteWhy::DiskStalled(ms) => WriteError::DiskStalled { writing_for: Duration::from_millis(ms) },
        WriteWhy::VotersStalled(_) => WriteError::VotersStalled,
        WriteWhy::Diverged(told) => {
            let at = from_log_id(told.at)?;
            WriteError::Diverged { divergence: Divergence { at, own: told.own, majority: told.majority } }
        }
        WriteWhy::QuotaExceeded(sizes) => {
            WriteError::QuotaExceeded { state_bytes: sizes.bytes, quota_bytes: sizes.limit }
        }
        WriteWhy::NoQuorum(_) => WriteError::NoQuorum,
        WriteWhy::LeaderAckInSession(_) => WriteError::LeaderAckInSession,
        WriteWhy::SessionExpired(session) => WriteError::SessionExpired { session },
        WriteWhy::WindowExceeded(_) => WriteError::WindowExceeded,
        WriteWhy::AnswerForgotten(_) => WriteError::AnswerForgotten,
        WriteWhy::TooManySessions(_) => WriteError::TooManySessions,
        WriteWhy::TooManyOfOpener(limit) => WriteError::TooManyOfOpener { limit: size(limit) },
        WriteWhy::AckTimeout(told) => {
            let (held_by, repeated) = (told.held_by, told.repeated);
            // Which machine it is of is for the caller to say, and whether it is applied there.
            let reply = told
                .reply
                .map(|reply| Box::new(UnconfirmedReply { reply, held_by, repeated, ..Default::default() }));
            WriteError::AckTimeout { log_id: from_log_id(told.at)?, missing: told.missing, reply }
        }
        WriteWhy::Interrupted(leader) => WriteError::Interrupted { leader: from_some_leader(leader) },
        WriteWhy::Stopped(told) => {
            WriteError::Stopped { reason: told.reason, maybe_applied: told.maybe_applied }
        }
        WriteWhy::PassedOn(told) => WriteError::Forward(from_passed_on(told)?),
    })
}

fn node_at(node_id: NodeId, address: &str, reason: &str) -> wire::membership::NodeAt {
    wire::membership::NodeAt { node_id, address: address.to_owned(), reason: reason.to_owned() }
}

fn membership(error: &MembershipError) -> wire::Membership {
    use wire::membership::{Advertised, Advertises, AlreadyMember, BothVote, HandOver, Quorum, Timeout};
    let quorum = |voters: usize, healthy: usize, needed: usize| Quorum {
        voters: voters as u64,
        healthy: healthy as u64,
        needed: needed as u64,
    };
    let why = match error.clone() {
        MembershipError::NotLeader { leader } => MembershipWhy::NotLeader(some_leader(&leader)),
        MembershipError::UnknownMember { node_id } => MembershipWhy::UnknownMember(node_id),
        MembershipError::NodeId { detail } => MembershipWhy::NodeId(detail),
        MembershipError::AlreadyMember { node_id, known, presented, peer } => {
            let (known, presented) = (known.to_string(), presented.to_string());
            MembershipWhy::AlreadyMember(AlreadyMember { node_id, known, presented, peer })
        }
        MembershipError::NotCaughtUp { node_id, lag: entries } => {
            MembershipWhy::NotCaughtUp(lag(node_id, entries))
        }
        MembershipError::NotReached { node_id, address } => {
            MembershipWhy::NotReached(node_at(node_id, &address, ""))
        }
        MembershipError::AdvertisedUnreachable { node_id, address, advertised, reason } => {
            let node = Some(node_at(node_id, &address, &reason));
            MembershipWhy::AdvertisedUnreachable(Advertised { node, advertised })
        }
        MembershipError::WouldLoseQuorum { voters, healthy, needed } => {
            MembershipWhy::WouldLoseQuorum(quorum(voters, healthy, needed))
        }
        MembershipError::WouldWeakenQuorum { voters, healthy, needed } => {
            MembershipWhy::WouldWeakenQuorum(quorum(voters, healthy, needed))
        }
        MembershipError::AlreadyReplaced { node_id } => MembershipWhy::AlreadyReplaced(node_id),
        MembershipError::BothVote { old, new } => MembershipWhy::BothVote(BothVote { old, new }),
        MembershipError::Advertises { node_id, peer, client } => {
            MembershipWhy::Advertises(Advertises { node_id, peer, client })
        }
        MembershipError::LastVoter { node_id } => MembershipWhy::LastVoter(node_id),
        MembershipError::AnotherChange => MembershipWhy::AnotherChange(NOTHING),
        MembershipError::Unreachable { node_id, address, reason } => {
            MembershipWhy::Unreachable(node_at(node_id, &address, &reason))
        }
        MembershipError::Identity { node_id, address, detail } => {
            MembershipWhy::Identity(node_at(node_id, &address, &detail))
        }
        MembershipError::Address { address } => MembershipWhy::Address(address),
        MembershipError::Unconfirmed { reason } => MembershipWhy::Unconfirmed(reason),
        MembershipError::Timeout { step, waited_ms } => MembershipWhy::Timeout(Timeout { step, waited_ms }),
        MembershipError::Interrupted { leader } => MembershipWhy::Interrupted(some_leader(&leader)),
        MembershipError::HandOver { node_id, source } => {
            MembershipWhy::HandOver(HandOver { node_id, source: Some(transfer(&source)) })
        }
        MembershipError::Stopped { reason, maybe_applied } => {
            MembershipWhy::Stopped(wire::write::Stopped { reason, maybe_applied })
        }
        MembershipError::HalfMade { source } => MembershipWhy::HalfMade(Box::new(membership(&source))),
        MembershipError::OutOfTime { waited_for, waited_ms } => {
            MembershipWhy::OutOfTime(Timeout { step: waited_for, waited_ms })
        }
        MembershipError::TooManyChanges { limit } => MembershipWhy::TooManyChanges(limit as u64),
        MembershipError::Forward(error) => MembershipWhy::PassedOn(passed_on(&error)),
    };
    wire::Membership { why: Some(why) }
}

fn from_membership(why: MembershipWhy) -> Result<MembershipError, Malformed> {
    Ok(match why {
        MembershipWhy::NotLeader(leader) => MembershipError::NotLeader { leader: from_some_leader(leader) },
        MembershipWhy::UnknownMember(node_id) => MembershipError::UnknownMember { node_id },
        MembershipWhy::NodeId(detail) => MembershipError::NodeId { detail },
        MembershipWhy::AlreadyMember(told) => from_already_member(told)?,
        MembershipWhy::NotCaughtUp(wire::Lag { node_id, entries }) => {
            MembershipError::NotCaughtUp { node_id, lag: entries }
        }
        MembershipWhy::NotReached(at) => {
            MembershipError::NotReached { node_id: at.node_id, address: at.address }
        }
        MembershipWhy::AdvertisedUnreachable(told) => from_unreachable(told)?,
        MembershipWhy::WouldLoseQuorum(told) => MembershipError::WouldLoseQuorum {
            voters: size(told.voters),
            healthy: size(told.healthy),
            needed: size(told.needed),
        },
        MembershipWhy::WouldWeakenQuorum(told) => MembershipError::WouldWeakenQuorum {
            voters: size(told.voters),
            healthy: size(told.healthy),
            needed: size(told.needed),
        },
        MembershipWhy::AlreadyReplaced(node_id) => MembershipError::AlreadyReplaced { node_id },
        MembershipWhy::BothVote(told) => MembershipError::BothVote { old: told.old, new: told.new },
        MembershipWhy::Advertises(told) => {
            MembershipError::Advertises { node_id: told.node_id, peer: told.peer, client: told.client }
        }
        MembershipWhy::LastVoter(node_id) => MembershipError::LastVoter { node_id },
        MembershipWhy::AnotherChange(_) => MembershipError::AnotherChange,
        MembershipWhy::Unreachable(at) => {
            MembershipError::Unreachable { node_id: at.node_id, address: at.address, reason: at.reason }
        }
        MembershipWhy::Identity(at) => {
            MembershipError::Identity { node_id: at.node_id, address: at.address, detail: at.reason }
        }
        MembershipWhy::Address(address) => MembershipError::Address { address },
        MembershipWhy::Unconfirmed(reason) => MembershipError::Unconfirmed { reason },
        MembershipWhy::Timeout(told) => {
            MembershipError::Timeout { step: told.step, waited_ms: told.waited_ms }
        }
        MembershipWhy::Interrupted(leader) => {
            MembershipError::Interrupted { leader: from_some_leader(leader) }
        }
        MembershipWhy::HandOver(told) => {
            let why = told.source.and_then(|source| source.why);
            let source = from_transfer(why.ok_or(Malformed("the reason of a hand-over is missing"))?)?;
            MembershipError::HandOver { node_id: told.node_id, source }
        }
        MembershipWhy::Stopped(told) => {
            MembershipError::Stopped { reason: told.reason, maybe_applied: told.maybe_applied }
        }
        MembershipWhy::HalfMade(source) => {
            let why = source.why.ok_or(Malformed("what stopped a change is missing"))?;
            MembershipError::HalfMade { source: Box::new(from_membership(why)?) }
        }
        MembershipWhy::OutOfTime(told) => {
            MembershipError::OutOfTime { waited_for: told.step, waited_ms: told.waited_ms }
        }
        MembershipWhy::TooManyChanges(limit) => MembershipError::TooManyChanges { limit: size(limit) },
        MembershipWhy::PassedOn(told) => MembershipError::Forward(from_passed_on(told)?),
    })
}

fn from_already_member(told: wire::membership::AlreadyMember) -> Result<MembershipError, Malformed> {
    Ok(MembershipError::AlreadyMember {
        node_id: told.node_id,
        known: incarnation(&told.known)?,
        presented: incarnation(&told.presented)?,
        peer: told.peer,
    })
}

fn from_unreachable(told: wire::membership::Advertised) -> Result<MembershipError, Malformed> {
    let at = told.node.ok_or(Malformed("a node is missing"))?;
    Ok(MembershipError::AdvertisedUnreachable {
        node_id: at.node_id,
        address: at.address,
        advertised: told.advertised,
        reason: at.reason,
    })
}

fn transfer(error: &TransferError) -> wire::Transfer {
    let why = match error {
        TransferError::NotLeader { leader } => TransferWhy::NotLeader(some_leader(leader)),
        TransferError::UnknownMember { node_id } => TransferWhy::UnknownMember(*node_id),
        TransferError::NotAVoter { node_id } => TransferWhy::NotAVoter(*node_id),
        TransferError::NotInTouch { node_id } => TransferWhy::NotInTouch(*node_id),
        TransferError::NotCaughtUp { node_id, lag: entries } => {
            TransferWhy::NotCaughtUp(lag(*node_id, *entries))
        }
        TransferError::Unfit { node_id } => TransferWhy::Unfit(*node_id),
        TransferError::NobodyElse => TransferWhy::NobodyElse(NOTHING),
        TransferError::Timeout { waited_ms } => TransferWhy::Timeout(*waited_ms),
        TransferError::Stopped { reason, maybe_applied } => TransferWhy::Stopped(wire::write::Stopped {
            reason: reason.clone(),
            maybe_applied: *maybe_applied,
        }),
        TransferError::Forward(error) => TransferWhy::PassedOn(passed_on(error)),
    };
    wire::Transfer { why: Some(why) }
}

fn from_transfer(why: TransferWhy) -> Result<TransferError, Malformed> {
    Ok(match why {
        TransferWhy::NotLeader(leader) => TransferError::NotLeader { leader: from_some_leader(leader) },
        TransferWhy::UnknownMember(node_id) => TransferError::UnknownMember { node_id },
        TransferWhy::NotAVoter(node_id) => TransferError::NotAVoter { node_id },
        TransferWhy::NotInTouch(node_id) => TransferError::NotInTouch { node_id },
        TransferWhy::NotCaughtUp(wire::Lag { node_id, entries }) => {
            TransferError::NotCaughtUp { node_id, lag: entries }
        }
        TransferWhy::Unfit(node_id) => TransferError::Unfit { node_id },
        TransferWhy::NobodyElse(_) => TransferError::NobodyElse,
        TransferWhy::Timeout(waited_ms) => TransferError::Timeout { waited_ms },
        TransferWhy::Stopped(told) => {
            TransferError::Stopped { reason: told.reason, maybe_applied: told.maybe_applied }
        }
        TransferWhy::PassedOn(told) => TransferError::Forward(from_passed_on(told)?),
    })
}

#[cfg(test)]
mod tests;
