//! Calls that members pass on to their leader, for callers of their own, and the leader's answers.
//!
//! There is one request for all of them, one answer, and one encoding of errors (`failures`). A write travels as the
//! envelope that is to stand in the log, without a reading of clocks: the leader, which opens it to see whether it can
//! be read, fills in its own.
//!
//! A failure in place of an answer says that the leader did not understand the call and has done nothing: builds that
//! know no such calls answer so.

mod failures;
mod operations;
pub(crate) mod room;

use std::time::Duration;

use bytes::Bytes;

pub(crate) use self::operations::{CallError, LeaderOperation, OfCall};
use self::room::CallRoom;
use super::wire::{Malformed, plain_log_id};
use crate::error::WriteError;
use crate::proto::peer::{self as proto, forward_request as request, forward_response as response};
use crate::runtime::whole_ms;
use crate::types::{AckLevel, HistoryEpoch, Leader, LogId, NodeId};

/// Most calls of one member that are under way, in each [`CallRoom`]. It sends no more, and its leader refuses more on one connection.
pub(crate) const MOST_CALLS: usize = 4096;

/// Most calls that are under way on a leader, in each [`CallRoom`], whoever their senders say that they are: members do not prove that.
pub(crate) const MOST_CALLS_OF_ALL: usize = 4 * MOST_CALLS;

/// No call waits for longer, whatever its caller says: a clock does not reach as far as a duration may.
pub(crate) const LONGEST_PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// Most bytes of a machine's reply that are passed on. A larger message than a connection takes would break it, for all calls that
/// share it.
pub(super) const MOST_REPLY_BYTES: usize = 48 * 1024 * 1024;

/// Numbers of a call or an answer, and what holds them.
const OVERHEAD_BYTES: usize = 128;

/// What only the leader does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LeaderCall {
    /// Propose this.
    Write {
        /// What is to stand in the log, but for the reading of the clocks.
        envelope: Bytes,
        /// When it is acknowledged.
        ack: AckLevel,
        /// How long to wait for the slowest voter, where that is waited for.
        ack_timeout: Duration,
        /// The history that it belongs to.
        history: HistoryEpoch,
    },
    /// Change the membership.
    Membership(MembershipCall),
    /// Hand over the lead.
    TransferLeader {
        /// To whom; none for the voter that is furthest ahead.
        to: Option<NodeId>,
    },
}

/// Which change of the membership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MembershipCall {
    /// Add a member.
    Add {
        /// Its id.
        node_id: NodeId,
        /// Its peer address.
        peer: String,
        /// Whether it is to vote once it has caught up.
        promote: bool,
        /// How long that may take.
        timeout: Duration,
    },
    /// Make a learner a voter.
    Promote {
        /// Which.
        node_id: NodeId,
        /// How long it may take to catch up.
        timeout: Duration,
    },
    /// Make a voter a learner.
    Demote {
        /// Which.
        node_id: NodeId,
        /// Whether few well voters may be left.
        force: bool,
    },
    /// Remove a member.
    Remove {
        /// Which.
        node_id: NodeId,
        /// Whether few well voters may be left.
        force: bool,
    },
    /// Put one node in the place of another.
    Replace {
        /// Who goes.
        old: NodeId,
        /// Who comes.
        node_id: NodeId,
        /// Its peer address.
        peer: String,
        /// How long it may take to catch up.
        timeout: Duration,
    },
    /// Correct the addresses of a member.
    Update {
        /// Whose.
        node_id: NodeId,
        /// Its new peer address, if that changes.
        peer: Option<String>,
        /// Its new client address, if that changes.
        client: Option<String>,
    },
}

/// What the leader has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CallDone {
    /// A write is acknowledged.
    Written {
        /// Where it stands.
        log_id: LogId,
        /// What the machine answered, encoded, if that was waited for.
        reply: Option<Bytes>,
        /// The members known to hold it.
        held_by: Vec<NodeId>,
        /// Whether an earlier attempt had applied it.
        repeated: bool,
        /// The history that the position belongs to.
        history: HistoryEpoch,
    },
    /// The membership is as it was asked for.
    Changed {
        /// Where it stands.
        membership_at: Option<LogId>,
        /// Whether it was so before.
        unchanged: bool,
    },
    /// Another node leads.
    Leads(Leader),
}

impl LeaderCall {
    /// Whose errors tell what comes of it.
    pub(crate) fn operation(&self) -> LeaderOperation {
        match self {
            Self::Write { .. } => LeaderOperation::Write,
            Self::Membership(_) => LeaderOperation::Membership,
            Self::TransferLeader { .. } => LeaderOperation::Transfer,
        }
    }

    /// Which room it takes up.
    pub(crate) fn room(&self) -> CallRoom {
        match self {
            Self::Write { ack: AckLevel::All, .. } => CallRoom::AllVoters,
            Self::Write { ack: AckLevel::Quorum | AckLevel::Leader, .. }
            | Self::Membership(_)
            | Self::TransferLeader { .. } => CallRoom::Quorum,
        }
    }

    /// Bytes that it takes, give or take a few.
    pub(crate) fn size_bytes(&self) -> usize {
        OVERHEAD_BYTES
            + match self {
                Self::Write { envelope, .. } => envelope.len(),
                Self::Membership(call) => call.text_bytes(),
                Self::TransferLeader { .. } => 0,
            }
    }

    /// The message that asks for it, for a caller that waits for `patience` yet.
    pub(super) fn to_wire(&self, patience: Duration) -> proto::ForwardRequest {
        let call = match self.clone() {
            Self::Write { envelope, ack, ack_timeout, history } => request::Call::Write(request::Write {
                envelope,
                ack: wire_ack(ack).into(),
                ack_timeout_ms: whole_ms(ack_timeout),
                history: history.0,
            }),
            Self::Membership(call) => call.into_wire(),
            Self::TransferLeader { to } => request::Call::TransferLeader(request::TransferLeader { to }),
        };
        proto::ForwardRequest { patience_ms: whole_ms(patience), call: Some(call) }
    }

    /// The call in a message, and for how long its caller waits yet.
    ///
    /// # Errors
    /// When there is none, or one that this build does not know.
    pub(super) fn from_wire(message: proto::ForwardRequest) -> Result<(Self, Duration), Malformed> {
        let call = match message.call.ok_or(Malformed("a call that this build does not know"))? {
            request::Call::Write(write) => {
                let ack = request::AckLevel::try_from(write.ack);
                let ack = ack.map_err(|_| Malformed("an acknowledgement that this build does not know"))?;
                Self::Write {
                    envelope: write.envelope,
                    ack: from_wire_ack(ack),
                    ack_timeout: time(write.ack_timeout_ms),
                    history: HistoryEpoch(write.history),
                }
            }
            request::Call::TransferLeader(request::TransferLeader { to }) => Self::TransferLeader { to },
            request::Call::AddMember(request::AddMember { node_id, peer, promote, timeout_ms }) => {
                let timeout = time(timeout_ms);
                Self::Membership(MembershipCall::Add { node_id, peer, promote, timeout })
            }
            request::Call::PromoteMember(request::PromoteMember { node_id, timeout_ms }) => {
                Self::Membership(MembershipCall::Promote { node_id, timeout: time(timeout_ms) })
            }
            request::Call::DemoteMember(request::DropVoter { node_id, force }) => {
                Self::Membership(MembershipCall::Demote { node_id, force })
            }
            request::Call::RemoveMember(request::DropVoter { node_id, force }) => {
                Self::Membership(MembershipCall::Remove { node_id, force })
            }
            request::Call::ReplaceMember(request::ReplaceMember { old, node_id, peer, timeout_ms }) => {
                let timeout = time(timeout_ms);
                Self::Membership(MembershipCall::Replace { old, node_id, peer, timeout })
            }
            request::Call::UpdateMember(request::UpdateMember { node_id, peer, client }) => {
                Self::Membership(MembershipCall::Update { node_id, peer, client })
            }
        };
        Ok((call, time(message.patience_ms)))
    }
}

impl MembershipCall {
    fn text_bytes(&self) -> usize {
        match self {
            Self::Add { peer, .. } | Self::Replace { peer, .. } => peer.len(),
            Self::Update { peer, client, .. } => [peer, client].into_iter().flatten().map(String::len).sum(),
            Self::Promote { .. } | Self::Demote { .. } | Self::Remove { .. } => 0,
        }
    }

    fn into_wire(self) -> request::Call {
        match self {
            Self::Add { node_id, peer, promote, timeout } => {
                let timeout_ms = whole_ms(timeout);
                request::Call::AddMember(request::AddMember { node_id, peer, promote, timeout_ms })
            }
            Self::Promote { node_id, timeout } => {
                let timeout_ms = whole_ms(timeout);
                request::Call::PromoteMember(request::PromoteMember { node_id, timeout_ms })
            }
            Self::Demote { node_id, force } => {
                request::Call::DemoteMember(request::DropVoter { node_id, force })
            }
            Self::Remove { node_id, force } => {
                request::Call::RemoveMember(request::DropVoter { node_id, force })
            }
            Self::Replace { old, node_id, peer, timeout } => {
                let timeout_ms = whole_ms(timeout);
                request::Call::ReplaceMember(request::ReplaceMember { old, node_id, peer, timeout_ms })
            }
            Self::Update { node_id, peer, client } => {
                request::Call::UpdateMember(request::UpdateMember { node_id, peer, client })
            }
        }
    }
}

/// A time in a message.
fn time(ms: u64) -> Duration {
    Duration::from_millis(ms).min(LONGEST_PATIENCE)
}

/// Bytes that the answer takes which says so, give or take a few.
pub(crate) fn answer_bytes(outcome: &Result<CallDone, CallError>) -> usize {
    OVERHEAD_BYTES
        + match outcome {
            Ok(CallDone::Written { reply: Some(reply), .. }) => reply.len(),
            Err(CallError::Write(WriteError::AckTimeout { reply: Some(unconfirmed), .. })) => {
                unconfirmed.reply.len()
            }
            Ok(CallDone::Written { reply: None, .. } | CallDone::Changed { .. } | CallDone::Leads(_))
            | Err(_) => 0,
        }
}

fn wire_ack(ack: AckLevel) -> request::AckLevel {
    match ack {
        AckLevel::Quorum => request::AckLevel::Quorum,
        AckLevel::All => request::AckLevel::All,
        AckLevel::Leader => request::AckLevel::Leader,
    }
}

fn from_wire_ack(ack: request::AckLevel) -> AckLevel {
    match ack {
        request::AckLevel::Quorum => AckLevel::Quorum,
        request::AckLevel::All => AckLevel::All,
        request::AckLevel::Leader => AckLevel::Leader,
    }
}

fn leader_hint(Leader { node_id, client }: Leader) -> proto::LeaderHint {
    proto::LeaderHint { node_id, client }
}

fn from_leader_hint(proto::LeaderHint { node_id, client }: proto::LeaderHint) -> Leader {
    Leader { node_id, client }
}

fn from_log_id(log_id: Option<proto::LogId>) -> Result<LogId, Malformed> {
    let proto::LogId { term, index } = log_id.ok_or(Malformed("a position is missing"))?;
    Ok(LogId { term, index })
}

/// What is `done`, unless its reply is too large to be passed on: then whoever asked learns at least where it stands.
fn fitting(done: CallDone) -> Result<CallDone, CallError> {
    match done {
        CallDone::Written { log_id, reply: Some(reply), .. } if reply.len() > MOST_REPLY_BYTES => {
            let bytes = reply.len();
            let reason = format!("it takes {bytes} bytes, and no more than {MOST_REPLY_BYTES} are passed on");
            Err(CallError::Write(WriteError::UnreadableReply { log_id, reason }))
        }
        CallDone::Written { .. } | CallDone::Changed { .. } | CallDone::Leads(_) => Ok(done),
    }
}

/// The message that answers with `outcome`.
pub(super) fn answer_to_wire(outcome: Result<CallDone, CallError>) -> proto::ForwardResponse {
    let outcome = match outcome.and_then(fitting) {
        Ok(CallDone::Written { log_id, reply, held_by, repeated, history }) => {
            let at = Some(plain_log_id(log_id));
            response::Outcome::Written(response::Written { at, reply, held_by, repeated, history: history.0 })
        }
        Ok(CallDone::Changed { membership_at, unchanged }) => {
            let membership = membership_at.map(plain_log_id);
            response::Outcome::Changed(response::Changed { membership, unchanged })
        }
        Ok(CallDone::Leads(leader)) => response::Outcome::Leads(leader_hint(leader)),
        Err(error) => response::Outcome::Failed(error.into_wire()),
    };
    proto::ForwardResponse { outcome: Some(outcome) }
}

/// The outcome in a message.
///
/// # Errors
/// When it is not complete. The call may have been carried out.
pub(super) fn answer_from_wire(
    answer: proto::ForwardResponse,
) -> Result<Result<CallDone, CallError>, Malformed> {
    let outcome = answer.outcome.ok_or(Malformed("an outcome that this build does not know"))?;
    Ok(Ok(match outcome {
        response::Outcome::Written(written) => CallDone::Written {
            log_id: from_log_id(written.at)?,
            reply: written.reply,
            held_by: written.held_by,
            repeated: written.repeated,
            history: HistoryEpoch(written.history),
        },
        response::Outcome::Changed(response::Changed { membership, unchanged }) => {
            let membership_at = membership.map(|at| from_log_id(Some(at))).transpose()?;
            CallDone::Changed { membership_at, unchanged }
        }
        response::Outcome::Leads(leader) => CallDone::Leads(from_leader_hint(leader)),
        response::Outcome::Failed(failure) => return Ok(Err(CallError::from_wire(failure)?)),
    }))
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    fn calls() -> Vec<LeaderCall> {
        let (peer, timeout) = ("p:1".to_owned(), Duration::from_millis(1500));
        let changes = [
            MembershipCall::Add { node_id: 4, peer: peer.clone(), promote: true, timeout },
            MembershipCall::Promote { node_id: 4, timeout },
            MembershipCall::Demote { node_id: 4, force: true },
            MembershipCall::Remove { node_id: 4, force: true },
            MembershipCall::Replace { old: 3, node_id: 4, peer: peer.clone(), timeout },
            MembershipCall::Update { node_id: 4, peer: Some(peer), client: None },
            MembershipCall::Update { node_id: 4, peer: None, client: Some(String::new()) },
        ];
        let mut calls: Vec<_> = changes.into_iter().map(LeaderCall::Membership).collect();
        calls.extend([LeaderCall::TransferLeader { to: None }, LeaderCall::TransferLeader { to: Some(0) }]);
        calls.extend(AckLevel::ALL.map(|ack| LeaderCall::Write {
            envelope: Bytes::from_static(b"\x03\x00"),
            ack,
            ack_timeout: timeout,
            history: HistoryEpoch(u64::MAX),
        }));
        calls
    }

    #[test]
    fn every_call_arrives_as_it_was_sent() {
        for call in calls() {
            let sent = call.to_wire(Duration::from_millis(7)).encode_to_vec();
            let arrived = proto::ForwardRequest::decode(sent.as_slice()).unwrap();
            assert_eq!(LeaderCall::from_wire(arrived), Ok((call, Duration::from_millis(7))));
        }
        assert!(LeaderCall::from_wire(proto::ForwardRequest { patience_ms: 1, call: None }).is_err());
        let mut strange = calls().pop().unwrap().to_wire(Duration::MAX);
        assert_eq!(LeaderCall::from_wire(strange.clone()).unwrap().1, LONGEST_PATIENCE);
        let Some(request::Call::Write(write)) = &mut strange.call else { panic!("{strange:?}") };
        write.ack = 99;
        assert!(
            LeaderCall::from_wire(strange).is_err(),
            "what this build does not know is not taken for the default"
        );
    }

    #[test]
    fn a_reply_that_is_too_large_for_a_message_is_told_as_one_that_cannot_be_read() {
        let written = |bytes| CallDone::Written {
            log_id: LogId::new(3, 9),
            reply: Some(Bytes::from(vec![0; bytes])),
            held_by: vec![1],
            repeated: false,
            history: HistoryEpoch(7),
        };
        let arrived = answer_from_wire(answer_to_wire(Ok(written(MOST_REPLY_BYTES)))).unwrap();
        assert_eq!(arrived.unwrap(), written(MOST_REPLY_BYTES));
        let arrived = answer_from_wire(answer_to_wire(Ok(written(MOST_REPLY_BYTES + 1)))).unwrap();
        let Err(CallError::Write(error @ WriteError::UnreadableReply { .. })) = arrived else {
            panic!("{arrived:?}")
        };
        assert!(error.maybe_applied() && error.to_string().contains("50331649 bytes"), "{error}");
    }

    #[test]
    fn every_outcome_arrives_as_it_was_sent() {
        let written = |reply| CallDone::Written {
            log_id: LogId::new(3, 9),
            reply,
            held_by: vec![1, 3],
            repeated: true,
            history: HistoryEpoch(8),
        };
        for done in [
            written(None),
            written(Some(Bytes::new())),
            CallDone::Changed { membership_at: Some(LogId::new(3, 9)), unchanged: false },
            CallDone::Changed { membership_at: None, unchanged: true },
            CallDone::Leads(Leader { node_id: 2, client: "c:2".to_owned() }),
        ] {
            let sent = answer_to_wire(Ok(done.clone())).encode_to_vec();
            let arrived = proto::ForwardResponse::decode(sent.as_slice()).unwrap();
            let arrived = answer_from_wire(arrived).unwrap().map_err(|error| format!("{error:?}"));
            assert_eq!(arrived, Ok(done));
        }
        assert!(answer_from_wire(proto::ForwardResponse::default()).is_err());
        let incomplete = response::Outcome::Written(response::Written::default());
        assert!(answer_from_wire(proto::ForwardResponse { outcome: Some(incomplete) }).is_err());
    }

    /// What the ranges of settings allow is to fit into a message, whatever surrounds it.
    #[test]
    fn what_surrounds_the_largest_command_is_small() {
        for call in calls() {
            let around = call.to_wire(Duration::MAX).encoded_len();
            assert!(around < 64 && around <= call.size_bytes(), "{call:?} takes {around} bytes");
        }
    }
}
