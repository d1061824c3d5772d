use bytes::Bytes;

use super::*;
use crate::engine::tests::lone;
use crate::engine::{NewMember, Settings};
use crate::error::{MembershipError, OperationError as _, TransferError};
use crate::kv::machine::{KvCommand, KvReply};
use crate::raft::network::DialError;
use crate::types::{AckLevel, HistoryEpoch, WriteOptions};

const DEADLINE: Duration = Duration::from_secs(30);

fn put(value: &str) -> KvCommand {
    let (tenant, collection) = ("t".to_owned(), "c".to_owned());
    KvCommand::Put { tenant, collection, key: "k".into(), value: value.to_owned().into() }
}

#[test]
fn only_what_can_do_no_harm_is_repeated() {
    for reason in Reason::all() {
        let certain = Told::of(reason);
        let is_passing = matches!(reason, Reason::NotLeader | Reason::NoQuorum | Reason::Stopped);
        let unknown = Told::of(reason).undecided(true);
        let is_lost = matches!(reason, Reason::Interrupted | Reason::Stopped);
        for is_undecided in [false, true] {
            assert_eq!(Repeats::Refusals.allow(&certain, is_undecided), is_passing, "{reason:?}");
            assert!(!Repeats::Refusals.allow(&unknown, is_undecided), "{reason:?}");
            assert_eq!(Repeats::Everything.allow(&unknown, is_undecided), is_lost, "{reason:?}");
        }
        assert_eq!(Repeats::Everything.allow(&certain, false), is_passing, "{reason:?}");
        // Its caller could do nothing else either, and would not know when.
        let is_for_now = matches!(
            reason,
            Reason::Overloaded | Reason::DiskFull | Reason::DiskStalled | Reason::WindowExceeded
        );
        assert_eq!(Repeats::Everything.allow(&certain, true), is_passing || is_for_now, "{reason:?}");
    }
}

fn target() -> AskedLeader {
    let leader = Leader { node_id: 2, client: "c:2".to_owned() };
    AskedLeader { leader, member: Some(Member::default()) }
}

fn call() -> LeaderCall {
    LeaderCall::Write {
        envelope: Bytes::new(),
        ack: AckLevel::Quorum,
        ack_timeout: Duration::ZERO,
        history: HistoryEpoch::UNKNOWN,
    }
}

#[test]
fn what_never_left_was_not_applied_and_what_was_lost_may_have_been() {
    let leader = 2;
    let (reason, patience) = (|| "why".to_owned(), Duration::from_millis(5));
    let dial = DialError::Unreachable(reason());
    for (error, maybe_applied, may_pass) in [
        (LeaderLineError::NotConnected { leader, error: dial }, false, true),
        (LeaderLineError::Broken { leader }, true, true),
        (LeaderLineError::Timeout { leader, patience, sent: false }, false, true),
        (LeaderLineError::Timeout { leader, patience, sent: true }, true, true),
        (LeaderLineError::Overloaded { leader }, false, true),
        // It does not know the call.
        (LeaderLineError::Failed { leader, reason: reason() }, false, false),
        (LeaderLineError::Unintelligible { leader, reason: reason() }, true, true),
    ] {
        let failed: FailedAttempt<WriteError> = target().unanswered(&error, &call());
        assert_eq!((failed.error.maybe_applied(), failed.may_pass), (maybe_applied, may_pass), "{error:?}");
        let is_overloaded = matches!(failed.error, WriteError::Overloaded);
        assert_eq!(is_overloaded, matches!(error, LeaderLineError::Overloaded { .. }));
        assert!(is_overloaded || failed.error.told().leader.is_some(), "it says who leads: {error:?}");
    }
}

#[test]
fn an_answer_of_another_operation_is_no_answer() {
    let failed: FailedAttempt<WriteError> = target().answered(CallError::Transfer(TransferError::NobodyElse));
    assert!(matches!(failed.error, WriteError::Forward(ForwardError::Lost { .. })));
    for maybe_applied in [false, true] {
        let other = || CallError::Other { message: "of a newer build".to_owned(), maybe_applied };
        let failed: FailedAttempt<TransferError> = target().answered(other());
        assert!(failed.error.to_string().contains("of a newer build"));
        assert_eq!(failed.error.told().maybe_applied, maybe_applied);
        let failed: FailedAttempt<MembershipError> = target().answered(other());
        assert_eq!(failed.error.told().maybe_applied, maybe_applied);
    }
}

#[test]
fn a_leader_without_room_is_told_from_this_node_without_room_and_from_no_leader() {
    let own = AskedLeader { member: None, ..target() };
    let full = || CallError::Write(WriteError::Overloaded);
    let here: FailedAttempt<WriteError> = own.answered(full());
    assert!(matches!(here.error, WriteError::Overloaded));
    let here: FailedAttempt<WriteError> = target().not_given(&call());
    assert!(matches!(here.error, WriteError::Overloaded));
    let hand_over = LeaderCall::TransferLeader { to: None };
    let write: FailedAttempt<WriteError> = target().answered(full());
    let change: FailedAttempt<MembershipError> = target().answered(CallError::Overloaded);
    let transfer: FailedAttempt<TransferError> = target().not_given(&hand_over);
    let WriteError::Forward(error @ ForwardError::Overloaded { .. }) = write.error else {
        panic!("{:?}", write.error)
    };
    assert_eq!(change.error, MembershipError::Forward(error.clone()));
    assert_eq!(transfer.error, TransferError::Forward(error.clone()));
    let told = error.told();
    assert_eq!((told.reason, told.maybe_applied), (Reason::Overloaded, false));
    assert_eq!(told.leader.map(|leader| leader.node_id), Some(2));
    assert!(write.may_pass && change.may_pass && transfer.may_pass);
}

#[test]
fn an_unknown_outcome_is_not_forgotten_when_a_later_attempt_is_refused() {
    let interrupted = || Some(WriteError::Interrupted { leader: None });
    let told = |unknown, last| told_of::<WriteError>(unknown, last).to_string();
    let unknown = told(interrupted(), WriteError::NotLeader { leader: None });
    assert_eq!(unknown, interrupted().unwrap().to_string());
    // A session that has ended since says nothing of what was applied before.
    for last in
        [WriteError::Overloaded, WriteError::AnswerForgotten, WriteError::SessionExpired { session: 7 }]
    {
        assert_eq!(told(interrupted(), last), unknown);
    }
    let stopped = || WriteError::Stopped { reason: String::new(), maybe_applied: true };
    assert_eq!(told(interrupted(), stopped()), stopped().to_string());
    assert_eq!(told(None, WriteError::Overloaded), WriteError::Overloaded.to_string());
}

#[tokio::test(start_paused = true)]
async fn on_the_leader_it_is_what_it_always_was() {
    let engine = lone::engine(false).await;
    assert!(engine.ready(DEADLINE).await);
    let written = engine.write_anywhere(put("1")).await.unwrap();
    assert!(matches!(written.reply, KvReply::Put { version: 1, .. }) && written.applied_here);
    let session = engine.anywhere().open_session(Duration::ZERO).await.unwrap();
    assert_eq!(session.history(), engine.history());
    let ticket = session.begin().unwrap();
    for _ in 0..2 {
        let written = engine.anywhere().write_in(&ticket, put("2")).await.unwrap();
        assert!(matches!(written.reply, KvReply::Put { version: 2, .. }), "applied once");
    }
    let unclear = engine.write_anywhere_with(
        put("3"),
        WriteOptions { slot: Some(ticket.slot()), ack: AckLevel::Leader, ..WriteOptions::default() },
    );
    assert!(matches!(unclear.await, Err(WriteError::LeaderAckInSession)));
    let anywhere = engine.anywhere();
    assert!(anywhere.close_session(session.id()).await.unwrap().was_open);
    assert!(!anywhere.close_session(session.id()).await.unwrap().was_open);
    let expired = anywhere.write_in(&ticket, put("3")).await;
    assert!(matches!(expired, Err(WriteError::SessionExpired { .. })), "{expired:?}");
    anywhere.set_state_quota(Some(1 << 30)).await.unwrap();
    let nobody = anywhere.remove_member(9, false).await;
    assert_eq!(nobody, Err(MembershipError::UnknownMember { node_id: 9 }));
    let last = anywhere.demote_member(1, false).await;
    assert_eq!(last, Err(MembershipError::LastVoter { node_id: 1 }));
    assert_eq!(anywhere.transfer_leader(Some(1)).await.unwrap().node_id, 1);
    engine.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn without_a_leader_a_call_waits_as_long_as_it_may_and_has_done_nothing() {
    let engine = lone::engine(true).await;
    let begun = Instant::now();
    let patience = Duration::from_secs(3);
    let anywhere = engine.anywhere().within(patience);
    let refused = anywhere.write(put("1")).await.unwrap_err();
    assert!(matches!(refused, WriteError::NotLeader { leader: None }), "{refused:?}");
    assert!(begun.elapsed() >= patience && begun.elapsed() < patience + PAUSE, "{:?}", begun.elapsed());
    let refused = anywhere.transfer_leader(None).await;
    assert_eq!(refused, Err(TransferError::NotLeader { leader: None }));
    let refused = anywhere.promote_member(2, Duration::ZERO).await;
    assert_eq!(refused, Err(MembershipError::NotLeader { leader: None }));
    engine.shutdown().await;
}

/// It is offered to a voter that does not take it, and meanwhile nothing is proposed.
#[tokio::test(start_paused = true)]
async fn a_call_of_the_leader_itself_ends_when_its_patience_is_over() {
    let engine = lone::engine(false).await;
    assert!(engine.ready(DEADLINE).await);
    let patience = Duration::from_millis(20);
    let anywhere = engine.anywhere().within(patience);
    engine.inner.core.transfer_leader(2, false).await;
    let begun = Instant::now();
    anywhere.write(put("1")).await.unwrap_err();
    let took = begun.elapsed();
    assert!(took >= patience && took < patience + Duration::from_millis(2), "{took:?}");
    let begun = Instant::now();
    let add =
        anywhere.add_member(NewMember { node_id: 2, peer: "nowhere:2".to_owned() }, false, Duration::ZERO);
    add.await.unwrap_err();
    assert!(begun.elapsed() < patience + Duration::from_millis(2), "{:?}", begun.elapsed());
    engine.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn calls_end_with_the_node() {
    let engine = lone::engine(true).await;
    let waiting = crate::runtime::spawn({
        let engine = engine.clone();
        async move { engine.anywhere().within(DEADLINE * 100).write(put("1")).await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begun = Instant::now();
    engine.shutdown().await;
    let stopped = waiting.await.unwrap().unwrap_err();
    assert!(matches!(stopped, WriteError::Stopped { maybe_applied: false, .. }), "{stopped:?}");
    let stopped = engine.write_anywhere(put("1")).await.unwrap_err();
    assert!(matches!(stopped, WriteError::Stopped { .. }), "{stopped:?}");
    assert!(begun.elapsed() < DEADLINE);
}

#[tokio::test(start_paused = true)]
async fn writes_that_wait_for_a_leader_count_as_in_flight() {
    let engine = lone::engine(true).await;
    let bytes = 1024;
    engine.inner.settings.send_modify(|settings| {
        *settings =
            Settings { max_command_bytes: 2 * bytes, max_inflight_bytes: 3 * bytes, ..settings.clone() };
    });
    let write = |size: usize| {
        let engine = engine.clone();
        crate::runtime::spawn(async move {
            engine.anywhere().within(DEADLINE).write(put(&"x".repeat(size))).await
        })
    };
    let waiting = [write(bytes), write(bytes)];
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(engine.report().in_flight.unwrap().commands, 2);
    let begun = Instant::now();
    assert!(matches!(write(bytes).await.unwrap(), Err(WriteError::Overloaded)));
    assert!(matches!(write(3 * bytes).await.unwrap(), Err(WriteError::TooLarge { .. })));
    assert!(begun.elapsed() < Duration::from_secs(1), "refused at once");
    for waiting in waiting {
        assert!(matches!(waiting.await.unwrap(), Err(WriteError::NotLeader { .. })));
    }
    assert_eq!(
        (engine.report().in_flight.unwrap().commands, engine.report().in_flight.unwrap().bytes),
        (0, 0)
    );
    engine.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn no_patience_is_too_long() {
    let engine = lone::engine(false).await;
    assert!(engine.ready(DEADLINE).await);
    let anywhere = engine.anywhere().within(Duration::MAX);
    anywhere.write(put("1")).await.unwrap();
    let (ack, ack_timeout) = (AckLevel::All, Duration::MAX);
    let all = WriteOptions { ack, ack_timeout, ..WriteOptions::default() };
    anywhere.write_with(put("2"), all).await.unwrap();
    assert_eq!(anywhere.transfer_leader(Some(1)).await.unwrap().node_id, 1);
    assert!(anywhere.promote_member(1, Duration::MAX).await.unwrap().unchanged);
    let unknown = MembershipError::UnknownMember { node_id: 9 };
    assert_eq!(anywhere.promote_member(9, Duration::MAX).await, Err(unknown));
    engine.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_write_that_this_node_is_to_repeat_counts_as_in_flight_in_between() {
    let engine = lone::engine(false).await;
    assert!(engine.ready(DEADLINE).await);
    // Nobody takes the lead, and meanwhile this leader refuses what it is given.
    engine.inner.core.transfer_leader(2, false).await;
    assert!(engine.inner.core.leads(), "it is given to this node");
    let write = crate::runtime::spawn({
        let engine = engine.clone();
        async move { engine.anywhere().within(DEADLINE * 10).write(put("1")).await }
    });
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(3)).await;
        assert_eq!(engine.report().in_flight.unwrap().commands, 1);
    }
    write.await.unwrap().unwrap();
    assert_eq!(
        (engine.report().in_flight.unwrap().commands, engine.report().in_flight.unwrap().bytes),
        (0, 0)
    );
    engine.shutdown().await;
}
