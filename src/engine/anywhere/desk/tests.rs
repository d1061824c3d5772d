use std::io::{self, Read, Write};
use std::sync::atomic::Ordering;

use serde::{Deserialize, Deserializer, Serialize};

use super::*;
use crate::engine::tests::lone;
use crate::error::MembershipError;
use crate::kv::machine::{KvCommand, KvMachine};
use crate::machine::ApplyContext;
use crate::raft::envelope::UNSTAMPED;
use crate::raft::membership::MembershipChange;
use crate::raft::network::calls::room::CallRoom;
use crate::types::{AckLevel, HistoryEpoch, Incarnation, MachineVersion, Member, UnconfirmedReply};

const DEADLINE: Duration = Duration::from_secs(30);

fn put(value: &str) -> KvCommand {
    let (tenant, collection) = ("t".to_owned(), "c".to_owned());
    KvCommand::Put { tenant, collection, key: "k".into(), value: value.to_owned().into() }
}

fn write(envelope: impl Into<Bytes>) -> LeaderCall {
    LeaderCall::Write {
        envelope: envelope.into(),
        ack: AckLevel::Quorum,
        ack_timeout: Duration::ZERO,
        history: HistoryEpoch::UNKNOWN,
    }
}

fn sealed(value: &str) -> Bytes {
    envelope::seal::<KvMachine>(UNSTAMPED, &put(value), None).unwrap()
}

fn refused(outcome: Result<CallDone, CallError>) -> WriteError {
    match outcome {
        Err(CallError::Write(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// Panics where it is decoded, and has a version that says so.
#[derive(Debug, Serialize)]
struct Trap(u8);

impl<'de> Deserialize<'de> for Trap {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let byte = u8::deserialize(from)?;
        assert!(byte < 100, "no such trap");
        Ok(Self(byte))
    }
}

struct Traps;

impl StateMachine for Traps {
    type Command = Trap;
    type Reply = u8;
    type Query = ();
    type Answer = ();
    type View = ();

    fn apply(&mut self, _: &ApplyContext, Trap(byte): Trap) -> u8 {
        byte
    }

    fn view(&self) {}

    fn query((): &(), (): ()) {}

    fn write_snapshot((): &(), _: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }

    fn read_snapshot(_: u32, _: &mut dyn Read) -> io::Result<Self> {
        Ok(Self)
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_decoded_is_refused_and_does_no_harm() {
    let engine = lone::engine_of(false, Traps).await;
    assert!(engine.ready(DEADLINE).await);
    let before = engine.state().last_log;
    let good = envelope::seal::<Traps>(UNSTAMPED, &Trap(7), None).unwrap();
    let with = |at: usize, byte: u8| {
        let mut bytes = good.to_vec();
        bytes[at] = byte;
        bytes
    };
    let longer = [&good[..], b"more"].concat();
    let (version, kind, command) = (with(0, 99), with(1, 99), with(good.len() - 1, 200));
    for garbage in
        [vec![], vec![0; 3], vec![255; 200], good[..good.len() - 1].to_vec(), longer, version, kind, command]
    {
        let error = refused(engine.carry_out(write(garbage.clone()), DEADLINE).await);
        assert!(matches!(error, WriteError::Undecodable { .. }), "{garbage:?}: {error:?}");
        assert!(!error.maybe_applied());
    }
    assert_eq!((engine.state().last_log, engine.state().fatal), (before, None), "nothing was proposed");
    let done = engine.carry_out(write(good), DEADLINE).await.unwrap();
    assert!(matches!(done, CallDone::Written { repeated: false, .. }), "{done:?}");
    engine.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn what_only_a_leader_writes_for_itself_is_refused() {
    let engine = lone::engine(false).await;
    assert!(engine.ready(DEADLINE).await);
    let before = engine.state().last_log;
    for own in [
        envelope::seal_clock(UNSTAMPED),
        envelope::seal_agreement(UNSTAMPED, MachineVersion { machine: 0, version: 0 }),
        envelope::seal_quota(UNSTAMPED, QuotaChange::Follow(1 << 30)),
        envelope::seal_quota(UNSTAMPED, QuotaChange::Set(1)),
    ] {
        let error = refused(engine.carry_out(write(own), DEADLINE).await);
        assert!(matches!(error, WriteError::Undecodable { .. }), "{error:?}");
    }
    assert_eq!(engine.state().last_log, before);
    engine.carry_out(write(envelope::seal_quota(UNSTAMPED, QuotaChange::Release)), DEADLINE).await.unwrap();
    engine.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_version_that_the_leader_does_not_read_is_refused_by_name() {
    let engine = lone::engine(false).await;
    assert!(engine.ready(DEADLINE).await);
    let mut newer = vec![3, 6];
    newer.extend([0; 24]);
    newer.extend([0, 0, 99, 0, 0, 0, 1]);
    let error = refused(engine.carry_out(write(newer), DEADLINE).await);
    let WriteError::VersionNotAgreed { wrote, missing } = &error else { panic!("{error:?}") };
    assert_eq!((*wrote, missing.as_slice()), (MachineVersion { machine: 0, version: 99 }, &[1_u64][..]));
    engine.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn limits_are_the_leaders() {
    let engine = lone::engine(false).await;
    assert!(engine.ready(DEADLINE).await);
    engine.inner.settings.send_modify(|settings| {
        (settings.max_command_bytes, settings.max_inflight_bytes) = (4096, 8192);
    });
    // It is not even decoded.
    let error = refused(engine.carry_out(write(vec![255; 5000]), DEADLINE).await);
    assert!(matches!(error, WriteError::TooLarge { bytes: 5000, limit: 4096 }), "{error:?}");

    let desk = LeaderDesk::new();
    desk.open(Arc::downgrade(&engine.inner));
    let large = sealed(&"x".repeat(3900));
    let bytes = || desk.bytes.of(CallRoom::Quorum).load(Ordering::Relaxed);
    let first = desk.carry_out(write(large.clone()), DEADLINE);
    assert_eq!(bytes(), write(large.clone()).size_bytes());
    // Nothing else has room beside it.
    let error = refused(desk.carry_out(write(sealed("x")), DEADLINE).await.outcome);
    assert!(matches!(error, WriteError::Overloaded), "{error:?}");
    let other = desk.carry_out(LeaderCall::TransferLeader { to: None }, DEADLINE).await.outcome;
    assert!(matches!(other, Err(CallError::Overloaded)), "{other:?}");
    // But for what would wait for a voter that may be down, and has a room of its own.
    let mut all = write(sealed("x"));
    let LeaderCall::Write { ack, .. } = &mut all else { panic!("a write") };
    *ack = AckLevel::All;
    desk.carry_out(all, DEADLINE).await.outcome.unwrap();
    let answered = first.await;
    assert_eq!(bytes(), answer_bytes(&answered.outcome), "its answer counts until it is sent");
    answered.outcome.unwrap();
    drop(answered.taken);
    assert_eq!(bytes(), 0);
    desk.carry_out(write(sealed("x")), DEADLINE).await.outcome.unwrap();
    drop(desk.carry_out(write(large), DEADLINE));
    assert_eq!(bytes(), 0, "a call that is given up gives back its room");
    engine.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_ends_with_its_node() {
    let engine = lone::engine(false).await;
    assert!(engine.ready(DEADLINE).await);
    let desk = LeaderDesk::new();
    desk.open(Arc::downgrade(&engine.inner));
    let member = Member { peer: "nowhere:2".to_owned(), incarnation: Incarnation(2), ..Member::default() };
    let learner = MembershipChange::AddLearner { node_id: 2, member, intent: None };
    engine.inner.core.change_membership(learner).await.unwrap();
    let (node, mut changes) = (Arc::downgrade(&engine.inner), engine.changes());
    // It never catches up.
    let promotion = MembershipCall::Promote { node_id: 2, timeout: DEADLINE * 100 };
    let promotion = crate::runtime::spawn(desk.carry_out(LeaderCall::Membership(promotion), DEADLINE * 100));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!promotion.is_finished());
    let begun = tokio::time::Instant::now();
    drop(engine);
    assert!(node.upgrade().is_some(), "the call holds it");
    let Err(CallError::Membership(error)) = promotion.await.unwrap().outcome else { panic!("an error") };
    assert!(matches!(error, MembershipError::Stopped { maybe_applied: true, .. }), "{error:?}");
    while changes.next().await.is_some() {}
    assert!(node.upgrade().is_none() && begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
}

/// The change goes on without its caller, but not without anybody.
#[tokio::test(start_paused = true)]
async fn a_change_whose_caller_has_gone_away_ends_with_its_node() {
    let engine = lone::engine(false).await;
    assert!(engine.ready(DEADLINE).await);
    let member = Member { peer: "nowhere:2".to_owned(), incarnation: Incarnation(2), ..Member::default() };
    let learner = MembershipChange::AddLearner { node_id: 2, member, intent: None };
    engine.inner.core.change_membership(learner).await.unwrap();
    let (node, mut changes) = (Arc::downgrade(&engine.inner), engine.changes());
    let promotion = engine.promote_member(2, DEADLINE * 100);
    assert!(tokio::time::timeout(Duration::from_secs(1), promotion).await.is_err());
    let begun = tokio::time::Instant::now();
    drop(engine);
    while changes.next().await.is_some() {}
    assert!(node.upgrade().is_none() && begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
}

#[test]
fn an_answer_counts_where_it_comes_with_an_error_too() {
    let bytes = |reply| {
        let reply = Some(Box::new(UnconfirmedReply { reply, ..UnconfirmedReply::default() }));
        let error = WriteError::AckTimeout { log_id: Default::default(), missing: vec![2], reply };
        answer_bytes(&Err(CallError::Write(error)))
    };
    assert_eq!(bytes(Bytes::from(vec![0; 1000])), 1000 + bytes(Bytes::new()));
}

#[tokio::test(start_paused = true)]
async fn a_node_that_does_not_lead_says_so_and_passes_nothing_on() {
    let alone = lone::engine(true).await;
    let unopened = LeaderDesk::<KvMachine>::new();
    let gone = LeaderDesk::<KvMachine>::new();
    gone.open(Weak::new());
    for call in [write(sealed("x")), write(b"garbage".to_vec())] {
        for outcome in [
            alone.carry_out(call.clone(), DEADLINE).await,
            unopened.carry_out(call.clone(), DEADLINE).await.outcome,
            gone.carry_out(call, DEADLINE).await.outcome,
        ] {
            let error = refused(outcome);
            assert!(matches!(error, WriteError::NotLeader { leader: None }), "{error:?}");
        }
    }
    let removal = MembershipCall::Remove { node_id: 2, force: false };
    let member = alone.carry_out(LeaderCall::Membership(removal), DEADLINE).await;
    let Err(CallError::Membership(error)) = member else { panic!("{member:?}") };
    assert_eq!(error, MembershipError::NotLeader { leader: None });
    alone.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_time_is_over_may_have_been_done() {
    let engine = lone::engine(false).await;
    assert!(engine.ready(DEADLINE).await);
    let outcome = engine.carry_out(write(sealed("x")), Duration::ZERO).await;
    assert!(matches!(outcome, Err(CallError::Other { maybe_applied: true, .. })), "{outcome:?}");
    // And here it was.
    let version = engine.write(put("y")).await.unwrap().reply;
    assert!(matches!(version, crate::kv::machine::KvReply::Put { version: 2, .. }), "{version:?}");
    engine.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_command_is_stamped_with_the_clocks_of_the_leader() {
    let engine = lone::engine(false).await;
    assert!(engine.ready(DEADLINE).await);
    engine.write(put("x")).await.unwrap();
    let before = engine.inner.core.published().progress().clock;
    tokio::time::sleep(Duration::from_secs(5)).await;
    engine.carry_out(write(sealed("y")), DEADLINE).await.unwrap();
    let after = engine.inner.core.published().progress().clock;
    assert_eq!(after.term, before.term, "it has a reading");
    let passed_ms = after.elapsed_ms - before.elapsed_ms;
    assert!((5_000..6_000).contains(&passed_ms), "{passed_ms} ms have passed by it");
    engine.shutdown().await;
}

/// Its commands say themselves in which version they would be written.
struct Rewritten;

impl StateMachine for Rewritten {
    type Command = u32;
    type Reply = u32;
    type Query = ();
    type Answer = ();
    type View = ();

    fn wrote(version: &u32) -> MachineVersion {
        MachineVersion { machine: 0, version: *version }
    }

    fn apply(&mut self, _: &ApplyContext, version: u32) -> u32 {
        version
    }

    fn view(&self) {}

    fn query((): &(), (): ()) {}

    fn write_snapshot((): &(), _: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }

    fn read_snapshot(_: u32, _: &mut dyn Read) -> io::Result<Self> {
        Ok(Self)
    }
}

#[tokio::test(start_paused = true)]
async fn what_must_be_agreed_on_is_the_version_that_was_sealed() {
    let engine = lone::engine_of(false, Rewritten).await;
    assert!(engine.ready(DEADLINE).await);
    let mut old = vec![3, 0];
    old.extend([0; 24]);
    old.push(99);
    // Every build reads it. This one would write it in a version that nobody has agreed on.
    let old = engine.carry_out(write(old), DEADLINE).await.unwrap();
    assert!(matches!(old, CallDone::Written { .. }), "{old:?}");
    engine.shutdown().await;
}
