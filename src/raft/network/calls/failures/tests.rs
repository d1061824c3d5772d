use std::collections::BTreeSet;

use bytes::Bytes;
use prost::Message;

use super::*;
use crate::types::{Incarnation, LogId, UnconfirmedReply};

fn leader() -> Leader {
    Leader { node_id: 2, client: "c:2".to_owned() }
}

fn forward_errors() -> [ForwardError; 3] {
    let reason = || "gone".to_owned();
    [
        ForwardError::NotTaken { leader: leader(), reason: reason() },
        ForwardError::Lost { leader: leader(), reason: reason() },
        ForwardError::Overloaded { leader: leader() },
    ]
}

/// At least one of each variant.
fn write_errors() -> Vec<WriteError> {
    let (reason, log_id, missing) = (|| "why".to_owned(), LogId::new(3, 9), vec![1, 3]);
    let diverged =
        |majority| WriteError::Diverged { divergence: Divergence { at: log_id, own: u64::MAX, majority } };
    let mut errors = vec![
        WriteError::NotLeader { leader: None },
        WriteError::NotLeader { leader: Some(leader()) },
        WriteError::TooLarge { bytes: 7, limit: 5 },
        WriteError::Unencodable { reason: reason() },
        WriteError::OtherHistory { given: HistoryEpoch(1), known: HistoryEpoch(u64::MAX) },
        WriteError::Undecodable { reason: reason() },
        WriteError::VersionNotAgreed {
            wrote: MachineVersion { machine: 4, version: 2 },
            missing: missing.clone(),
        },
        WriteError::UnreadableReply { log_id, reason: reason() },
        WriteError::Overloaded,
        WriteError::DiskFull { available_bytes: 5 },
        WriteError::DiskStalled { writing_for: Duration::from_millis(70) },
        WriteError::VotersStalled,
        diverged(None),
        diverged(Some(0)),
        WriteError::QuotaExceeded { state_bytes: 7, quota_bytes: 5 },
        WriteError::NoQuorum,
        WriteError::LeaderAckInSession,
        WriteError::SessionExpired { session: u64::MAX },
        WriteError::WindowExceeded,
        WriteError::AnswerForgotten,
        WriteError::TooManySessions,
        WriteError::TooManyOfOpener { limit: 1024 },
        WriteError::AckTimeout { log_id, missing: missing.clone(), reply: None },
        WriteError::AckTimeout {
            log_id,
            missing,
            reply: Some(Box::new(UnconfirmedReply {
                reply: Bytes::new(),
                held_by: vec![1, 2],
                repeated: true,
                ..UnconfirmedReply::default()
            })),
        },
        WriteError::Interrupted { leader: None },
        WriteError::Interrupted { leader: Some(leader()) },
        WriteError::Stopped { reason: reason(), maybe_applied: false },
        WriteError::Stopped { reason: reason(), maybe_applied: true },
    ];
    errors.extend(forward_errors().map(WriteError::Forward));
    errors
}

/// Whoever adds a variant adds one above as well.
fn place_of_write(error: &WriteError) -> usize {
    match error {
        WriteError::NotLeader { .. } => 0,
        WriteError::TooLarge { .. } => 1,
        WriteError::Unencodable { .. } => 2,
        WriteError::OtherHistory { .. } => 3,
        WriteError::Undecodable { .. } => 4,
        WriteError::VersionNotAgreed { .. } => 5,
        WriteError::UnreadableReply { .. } => 6,
        WriteError::Overloaded => 7,
        WriteError::DiskFull { .. } => 8,
        WriteError::DiskStalled { .. } => 9,
        WriteError::VotersStalled => 10,
        WriteError::Diverged { .. } => 11,
        WriteError::QuotaExceeded { .. } => 12,
        WriteError::NoQuorum => 13,
        WriteError::LeaderAckInSession => 14,
        WriteError::SessionExpired { .. } => 15,
        WriteError::WindowExceeded => 16,
        WriteError::AnswerForgotten => 17,
        WriteError::TooManySessions => 18,
        WriteError::TooManyOfOpener { .. } => 19,
        WriteError::AckTimeout { .. } => 20,
        WriteError::Interrupted { .. } => 21,
        WriteError::Stopped { .. } => 22,
        WriteError::Forward(_) => 23,
    }
}

fn membership_errors() -> Vec<MembershipError> {
    let (reason, address, peer) = (|| "why".to_owned(), || "a:1".to_owned(), || "p:1".to_owned());
    let node_id = 4;
    let (voters, healthy, needed) = (5, 2, 3);
    let mut errors = vec![
        MembershipError::NotLeader { leader: None },
        MembershipError::NotLeader { leader: Some(leader()) },
        MembershipError::UnknownMember { node_id },
        MembershipError::NodeId { detail: reason() },
        MembershipError::AlreadyMember {
            node_id,
            known: Incarnation(u128::MAX),
            presented: Incarnation(1),
            peer: peer(),
        },
        MembershipError::NotCaughtUp { node_id, lag: 9 },
        MembershipError::NotReached { node_id, address: address() },
        MembershipError::AdvertisedUnreachable {
            node_id,
            address: address(),
            advertised: peer(),
            reason: reason(),
        },
        MembershipError::WouldLoseQuorum { voters, healthy, needed },
        MembershipError::WouldWeakenQuorum { voters, healthy, needed },
        MembershipError::AlreadyReplaced { node_id },
        MembershipError::BothVote { old: 3, new: 4 },
        MembershipError::Advertises { node_id, peer: peer(), client: address() },
        MembershipError::LastVoter { node_id },
        MembershipError::AnotherChange,
        MembershipError::Unreachable { node_id, address: address(), reason: reason() },
        MembershipError::Identity { node_id, address: address(), detail: reason() },
        MembershipError::Address { address: address() },
        MembershipError::Unconfirmed { reason: reason() },
        MembershipError::Timeout { step: "the promotion".to_owned(), waited_ms: 10 },
        MembershipError::Interrupted { leader: Some(leader()) },
        MembershipError::Stopped { reason: reason(), maybe_applied: false },
        MembershipError::Stopped { reason: reason(), maybe_applied: true },
        MembershipError::HalfMade { source: Box::new(MembershipError::NotCaughtUp { node_id, lag: 9 }) },
        MembershipError::TooManyChanges { limit: 32 },
        MembershipError::OutOfTime { waited_for: reason(), waited_ms: 7 },
    ];
    errors.extend(forward_errors().map(MembershipError::Forward));
    errors.extend(transfer_errors().into_iter().map(|source| MembershipError::HandOver { node_id, source }));
    errors
}

fn place_of_membership(error: &MembershipError) -> usize {
    match error {
        MembershipError::NotLeader { .. } => 0,
        MembershipError::UnknownMember { .. } => 1,
        MembershipError::NodeId { .. } => 2,
        MembershipError::AlreadyMember { .. } => 3,
        MembershipError::NotCaughtUp { .. } => 4,
        MembershipError::NotReached { .. } => 5,
        MembershipError::AdvertisedUnreachable { .. } => 6,
        MembershipError::WouldLoseQuorum { .. } => 7,
        MembershipError::WouldWeakenQuorum { .. } => 8,
        MembershipError::AlreadyReplaced { .. } => 9,
        MembershipError::BothVote { .. } => 10,
        MembershipError::Advertises { .. } => 11,
        MembershipError::LastVoter { .. } => 12,
        MembershipError::AnotherChange => 13,
        MembershipError::Unreachable { .. } => 14,
        MembershipError::Identity { .. } => 15,
        MembershipError::Address { .. } => 16,
        MembershipError::Unconfirmed { .. } => 17,
        MembershipError::Timeout { .. } => 18,
        MembershipError::Interrupted { .. } => 19,
        MembershipError::HandOver { .. } => 20,
        MembershipError::Stopped { .. } => 21,
        MembershipError::Forward(_) => 22,
        MembershipError::HalfMade { .. } => 23,
        MembershipError::TooManyChanges { .. } => 24,
        MembershipError::OutOfTime { .. } => 25,
    }
}

fn transfer_errors() -> Vec<TransferError> {
    let node_id = 4;
    let mut errors = vec![
        TransferError::NotLeader { leader: None },
        TransferError::NotLeader { leader: Some(leader()) },
        TransferError::UnknownMember { node_id },
        TransferError::NotAVoter { node_id },
        TransferError::NotInTouch { node_id },
        TransferError::NotCaughtUp { node_id, lag: 9 },
        TransferError::Unfit { node_id },
        TransferError::NobodyElse,
        TransferError::Timeout { waited_ms: 10 },
        TransferError::Stopped { reason: "why".to_owned(), maybe_applied: false },
        TransferError::Stopped { reason: "why".to_owned(), maybe_applied: true },
    ];
    errors.extend(forward_errors().map(TransferError::Forward));
    errors
}

fn place_of_transfer(error: &TransferError) -> usize {
    match error {
        TransferError::NotLeader { .. } => 0,
        TransferError::UnknownMember { .. } => 1,
        TransferError::NotAVoter { .. } => 2,
        TransferError::NotInTouch { .. } => 3,
        TransferError::NotCaughtUp { .. } => 4,
        TransferError::Unfit { .. } => 5,
        TransferError::NobodyElse => 6,
        TransferError::Timeout { .. } => 7,
        TransferError::Stopped { .. } => 8,
        TransferError::Forward(_) => 9,
    }
}

/// What arrives of `sent`.
fn arrived(sent: CallError) -> CallError {
    let bytes = sent.into_wire().encode_to_vec();
    CallError::from_wire(proto::CallFailure::decode(bytes.as_slice()).unwrap()).unwrap()
}

fn is_every<T>(errors: &[T], place: impl Fn(&T) -> usize, count: usize) {
    let places: BTreeSet<usize> = errors.iter().map(place).collect();
    assert_eq!(places, (0..count).collect(), "a variant has no example");
}

#[test]
fn every_error_of_a_write_arrives_as_the_variant_that_was_sent() {
    is_every(&write_errors(), place_of_write, 24);
    for error in write_errors() {
        let (shown, told) = (format!("{error:?}"), format!("{:?}", error.told()));
        let CallError::Write(arrived) = arrived(CallError::Write(error)) else { panic!("{shown}") };
        assert_eq!((format!("{arrived:?}"), format!("{:?}", arrived.told())), (shown, told));
    }
}

#[test]
fn every_error_of_a_change_of_the_membership_arrives_as_the_variant_that_was_sent() {
    is_every(&membership_errors(), place_of_membership, 26);
    for error in membership_errors() {
        let CallError::Membership(arrived) = arrived(CallError::Membership(error.clone())) else {
            panic!("{error:?}")
        };
        assert_eq!(arrived, error);
    }
}

#[test]
fn every_error_of_a_hand_over_arrives_as_the_variant_that_was_sent() {
    is_every(&transfer_errors(), place_of_transfer, 10);
    for error in transfer_errors() {
        let CallError::Transfer(arrived) = arrived(CallError::Transfer(error.clone())) else {
            panic!("{error:?}")
        };
        assert_eq!(arrived, error);
    }
}

#[test]
fn a_leader_without_room_is_told_apart_and_builds_before_learn_that_nothing_was_done() {
    let sent = CallError::Overloaded.into_wire();
    assert!(!sent.maybe_applied && !sent.message.is_empty());
    assert!(matches!(arrived(CallError::Overloaded), CallError::Overloaded));
    // As a build reads it that does not know the number.
    let before = CallError::from_wire(proto::CallFailure { of: None, ..sent }).unwrap();
    assert!(matches!(before, CallError::Other { maybe_applied: false, .. }), "{before:?}");
}

#[test]
fn an_error_that_this_build_does_not_know_keeps_its_words_and_its_outcome() {
    for maybe_applied in [false, true] {
        let unknown = wire::Of::Write(wire::Write { why: None });
        for of in [None, Some(unknown)] {
            let failure = proto::CallFailure { of, message: "of a newer build".to_owned(), maybe_applied };
            let arrived = CallError::from_wire(failure).unwrap();
            assert!(
                matches!(&arrived, CallError::Other { message, maybe_applied: told }
                    if message == "of a newer build" && *told == maybe_applied),
                "{arrived:?}"
            );
        }
    }
}

#[test]
fn what_an_error_lacks_is_not_made_up() {
    let lost = wire::PassedOn { lost: true, ..wire::PassedOn::default() };
    let of = wire::Of::Write(wire::Write { why: Some(WriteWhy::PassedOn(lost)) });
    let failure = proto::CallFailure { of: Some(of), ..proto::CallFailure::default() };
    assert!(CallError::from_wire(failure).is_err());
}
