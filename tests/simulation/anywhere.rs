//! Calls through whichever node: nothing is lost, nothing is done twice, and what was said to be certain is.

use std::time::Duration;

use futures::StreamExt;
use quorate::kv::machine::{KvAnswer, KvCommand, KvMachine, KvQuery, KvReply};
use quorate::{AckLevel, Engine, ForwardError, OperationError, Reason};
use quorate::{ReadLevel, Succession, TransferError, WriteError, WriteOptions};
use quorate_testkit::kv::{Registers, Way};
use quorate_testkit::simulation::{Calm, Scenario, address, expect_to_hold, in_world, run_until, seeds};
use tokio::time::Instant;

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);

/// Callers that write through any node, while the lead is handed over now and then.
fn handed_over() -> Scenario {
    Scenario { hand_overs: true, ..Scenario::default() }
}

fn through_any(sessions: bool) -> Registers {
    Registers { way: Way { sessions, anywhere: true }, ..Registers::default() }
}

#[test]
fn whatever_is_written_through_whichever_node_holds() {
    expect_to_hold(
        seeds(8, 100),
        &handed_over(),
        &through_any(true),
        &[
            ("acknowledged writes", 50.0),
            ("writes acknowledged by followers", 30.0),
            ("writes that certainly were not applied", 0.5),
            ("writes with an unknown outcome", 0.5),
            ("exactly-once writes", 20.0),
            ("exactly-once writes that had to be repeated", 0.25),
            ("hand-overs", 0.5),
            ("crashes", 1.0),
            ("duplicated messages", 1.0),
            ("leader changes", 1.0),
        ],
    );
}

/// What [`Scenario::done_twice`] does is what a leader would do that does not know a call again.
#[test]
fn a_leader_that_does_a_call_twice_is_caught() {
    let scenario = Scenario { done_twice: true, ..handed_over() };
    let caught = run_until("times", 60, &scenario, &through_any(true));
    assert!(
        caught.is_ok(),
        "60 seeds in which calls are done twice had no write applied twice: the check is blind. {caught:?}"
    );
}

#[test]
fn retries_through_any_node_without_a_session_are_caught() {
    let caught = run_until("increments", 60, &handed_over(), &through_any(false));
    assert!(
        caught.is_ok(),
        "60 seeds of retries without a session applied nothing twice: the check is blind. {caught:?}"
    );
}

fn in_calm<F: Future<Output = ()>>(seed: u64, test: impl FnOnce(Calm<KvMachine>) -> F) {
    in_world(seed, async { test(Calm::start(seed, |_| KvMachine::default()).await).await });
}

/// Has the node that neither leads nor is [`Calm::follower`] reach nobody.
async fn cut_off_the_third(calm: &Calm<KvMachine>) {
    let others = [calm.leader().await.state().node_id, calm.follower().await.state().node_id];
    let third = (1..=3).find(|id| !others.contains(id)).unwrap();
    calm.hosts.network.set_cuts(others.iter().flat_map(|id| [(third, *id), (*id, third)]).collect());
}

fn put(key: &str, value: &str) -> KvCommand {
    let (tenant, collection) = ("t".to_owned(), "c".to_owned());
    KvCommand::Put { tenant, collection, key: key.to_owned().into(), value: value.to_owned().into() }
}

async fn version(engine: &Engine<KvMachine>, key: &str, level: ReadLevel) -> u64 {
    let (tenant, collection) = ("t".to_owned(), "c".to_owned());
    let query = KvQuery::Get { tenant, collection, key: key.to_owned().into() };
    let KvAnswer::Item(item) = engine.read(query, level).await.unwrap().answer else { panic!("an item") };
    item.map_or(0, |item| item.version)
}

#[test]
fn each_node_has_what_was_written_through_it() {
    in_calm(1, |calm| async move {
        for (number, engine) in (1..).zip(calm.engines().cycle().take(30)) {
            let written = engine.write_anywhere(put("k", "v")).await.unwrap();
            assert!(
                matches!(written.reply, KvReply::Put { version, .. } if version == number)
                    && written.applied_here
            );
            assert_eq!(version(engine, "k", ReadLevel::Local).await, number);
        }
    });
}

#[test]
fn a_leader_of_a_build_before_is_not_believed_to_have_done_anything() {
    in_calm(2, |calm| async move {
        let (leader, follower) = (calm.leader().await, calm.follower().await);
        let leading = leader.state().node_id;
        calm.hosts.network.set_old_builds([leading]);
        let begun = Instant::now();
        let refused = follower.write_anywhere(put("k", "v")).await.unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(1), "it is not asked again and again");
        let WriteError::Forward(ForwardError::NotTaken { leader: named, .. }) = &refused else {
            panic!("{refused:?}")
        };
        assert_eq!(named.node_id, leading);
        assert!(!refused.maybe_applied() && refused.reason() == Reason::NotLeader, "{refused}");
        assert!(follower.anywhere().remove_member(9, false).await.is_err());
        // The leader minds as little as a build would that does not know the message, and goes on answering reads.
        assert_eq!(version(&follower, "k", ReadLevel::Linearizable).await, 0);
        leader.write_anywhere(put("k", "v")).await.unwrap();
        calm.hosts.network.set_old_builds([]);
        follower.write_anywhere(put("k", "v")).await.unwrap();
        assert_eq!(version(&leader, "k", ReadLevel::Linearizable).await, 2);
    });
}

#[test]
fn a_leader_that_dies_is_replaced_on_the_way() {
    for seed in 0..4 {
        in_calm(seed, |mut calm| async move {
            let (leader, follower) = (calm.leader().await.state().node_id, calm.follower().await);
            let session = follower.anywhere().open_session(Duration::ZERO).await.unwrap();
            calm.kill(leader).await;
            let ticket = session.begin().unwrap();
            let written = follower.anywhere().write_in(&ticket, put("k", "v")).await.unwrap();
            assert!(matches!(written.reply, KvReply::Put { version: 1, .. }), "{written:?}");
            assert_eq!(version(&follower, "k", ReadLevel::Local).await, 1);
        });
    }
}

/// It takes everything in and answers nothing.
#[test]
fn a_leader_that_hangs_is_given_up_once_another_leads() {
    for seed in 0..4 {
        in_calm(seed, |calm| async move {
            let (leader, follower) = (calm.leader().await.state().node_id, calm.follower().await);
            let anywhere = follower.anywhere().within(PATIENCE);
            let session = anywhere.open_session(Duration::ZERO).await.unwrap();
            let others = (1..=3).filter(|id| *id != leader);
            calm.hosts.network.set_cuts(others.flat_map(|id| [(leader, id), (id, leader)]).collect());
            let begun = Instant::now();
            let ticket = session.begin().unwrap();
            let (alone, in_session) = tokio::join!(
                anywhere.write(put("alone", "v")),
                anywhere.write_in(&ticket, put("in session", "v"))
            );
            let lost = alone.unwrap_err();
            let WriteError::Forward(ForwardError::Lost { leader: named, .. }) = &lost else {
                panic!("{lost:?}")
            };
            assert!(named.node_id == leader && lost.maybe_applied(), "{lost}");
            assert!(matches!(in_session.unwrap().reply, KvReply::Put { version: 1, .. }));
            assert!(begun.elapsed() < PATIENCE / 6, "{:?}", begun.elapsed());
        });
    }
}

#[test]
fn what_waits_for_a_voter_that_is_down_holds_up_no_reads_and_no_other_writes() {
    /// As many writes for all voters as one member may have under way.
    const MOST: usize = 4096;
    in_calm(5, |calm| async move {
        let follower = calm.follower().await;
        cut_off_the_third(&calm).await;
        let all = WriteOptions { ack: AckLevel::All, ack_timeout: PATIENCE, ..WriteOptions::default() };
        let slow: Vec<_> = (0..MOST)
            .map(|_| {
                let follower = follower.clone();
                tokio::spawn(async move { follower.write_anywhere_with(put("slow", "v"), all).await })
            })
            .collect();
        // They are applied, and wait for the third node.
        while version(&follower, "slow", ReadLevel::Local).await < MOST as u64 {
            tokio::time::sleep(POLL).await;
        }
        let begun = Instant::now();
        assert_eq!(version(&follower, "slow", ReadLevel::Linearizable).await, MOST as u64);
        let refused = follower.write_anywhere_with(put("more", "v"), all).await.unwrap_err();
        assert!(matches!(refused, WriteError::Overloaded), "{refused:?}");
        follower.write_anywhere(put("other", "v")).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        calm.hosts.network.set_cuts([].into());
        for slow in slow {
            assert_eq!(slow.await.unwrap().unwrap().held_by, [1, 2, 3]);
        }
        follower.write_anywhere_with(put("more", "v"), all).await.unwrap();
    });
}

#[test]
fn a_leader_without_room_is_told_from_a_node_without_room() {
    in_calm(8, |calm| async move {
        let (leader, follower) = (calm.leader().await, calm.follower().await);
        let limits = |settings: &mut quorate::Settings| {
            (settings.max_command_bytes, settings.max_inflight_bytes) = (4096, 4096);
        };
        leader.configure(limits).unwrap();
        cut_off_the_third(&calm).await;
        let ack_timeout = Duration::from_secs(5);
        let all = WriteOptions { ack: AckLevel::All, ack_timeout, ..WriteOptions::default() };
        let large = put("large", &"x".repeat(3000));
        let slow = tokio::spawn({
            let (follower, large) = (follower.clone(), large.clone());
            async move { follower.write_anywhere_with(large, all).await }
        });
        while version(&follower, "large", ReadLevel::Local).await < 1 {
            tokio::time::sleep(POLL).await;
        }
        let refused = follower.write_anywhere_with(large.clone(), all).await.unwrap_err();
        let WriteError::Forward(ForwardError::Overloaded { leader: named }) = &refused else {
            panic!("{refused:?}")
        };
        assert_eq!(named.node_id, leader.state().node_id);
        assert!(!refused.maybe_applied() && refused.reason() == Reason::Overloaded, "{refused}");
        follower.write_anywhere(large.clone()).await.unwrap();
        slow.await.unwrap().unwrap_err();
        assert_eq!(version(&follower, "large", ReadLevel::Linearizable).await, 2);
    });
}

/// The write is applied, and its leader waits for a voter that is down.
#[test]
fn a_node_ends_with_its_last_handle_also_while_a_call_of_another_one_waits() {
    in_calm(9, |mut calm| async move {
        let (leading, follower) = (calm.leader().await.state().node_id, calm.follower().await);
        cut_off_the_third(&calm).await;
        let all = WriteOptions { ack: AckLevel::All, ack_timeout: PATIENCE, ..WriteOptions::default() };
        let waiting = tokio::spawn({
            let follower = follower.clone();
            async move { follower.write_anywhere_with(put("k", "v"), all).await }
        });
        while version(&follower, "k", ReadLevel::Local).await < 1 {
            tokio::time::sleep(POLL).await;
        }
        let begun = Instant::now();
        let (engine, _tasks) = calm.take(leading);
        let mut changes = engine.changes();
        drop(engine);
        while changes.next().await.is_some() {}
        let told = waiting.await.unwrap().unwrap_err();
        assert!(told.maybe_applied(), "{told}");
        assert!(begun.elapsed() < PATIENCE / 10, "{:?}", begun.elapsed());
    });
}

/// Whoever removes the leader through another node does not see that two leaders had to do it.
#[test]
fn the_leader_is_removed_and_the_lead_handed_over_through_a_follower() {
    in_calm(3, |calm| async move {
        let (leader, follower) = (calm.leader().await.state().node_id, calm.follower().await);
        let other = (1..=3).find(|id| ![leader, follower.state().node_id].contains(id)).unwrap();
        let leads = follower.anywhere().transfer_leader(Some(other)).await.unwrap();
        assert_eq!(leads.node_id, other);
        let list = follower.anywhere().remove_member(other, false).await.unwrap();
        assert!(!list.unchanged && list.members.iter().all(|member| member.node_id != other), "{list:?}");
        let again = follower.anywhere().remove_member(other, false).await.unwrap();
        assert!(again.unchanged, "{again:?}");
    });
}

/// It does not hear of its removal, and its line to the leader is open still.
#[test]
fn a_member_that_was_removed_writes_nothing_any_more() {
    in_calm(6, |calm| async move {
        let (leader, follower) = (calm.leader().await, calm.follower().await);
        let (leading, removed) = (leader.state().node_id, follower.state().node_id);
        follower.write_anywhere(put("before", "v")).await.unwrap();
        calm.hosts.network.set_cuts([(leading, removed)].into());
        leader.remove_member(removed, true).await.unwrap();
        assert_eq!(follower.state().leader.map(|known| known.node_id), Some(leading), "it knows no better");
        let refused = follower.anywhere().within(Duration::from_millis(500)).write(put("k", "v")).await;
        assert!(refused.is_err());
        assert_eq!(version(&leader, "k", ReadLevel::Linearizable).await, 0);
    });
}

/// A leader that hangs does not say that it does not take the time that such calls may take.
#[test]
fn a_call_ends_with_the_patience_of_its_caller_also_where_no_answer_comes() {
    in_calm(7, |calm| async move {
        let (leader, follower) = (calm.leader().await.state().node_id, calm.follower().await);
        let patience = Duration::from_millis(400);
        let anywhere = follower.anywhere().within(patience);
        // The line is open.
        anywhere.write(put("k", "v")).await.unwrap();
        calm.hosts.network.set_cuts([(leader, follower.state().node_id)].into());
        let begun = Instant::now();
        let lost = anywhere.remove_member(9, false).await.unwrap_err();
        let took = begun.elapsed();
        assert!(lost.told().maybe_applied, "{lost}");
        assert!(took >= patience && took < patience + Duration::from_millis(2), "{took:?}");
        calm.hosts.network.set_cuts([].into());
        let unknown = follower.anywhere().remove_member(9, false).await;
        assert_eq!(unknown, Err(quorate::MembershipError::UnknownMember { node_id: 9 }));
    });
}

#[test]
fn what_a_leader_knows_of_a_hand_over_is_told() {
    in_calm(7, |calm| async move {
        let (leader, follower) = (calm.leader().await.state().node_id, calm.follower().await);
        let other = (1..=3).find(|id| ![leader, follower.state().node_id].contains(id)).unwrap();
        calm.hosts.network.set_cuts([(leader, other), (other, leader)].into());
        // Until it counts as gone.
        tokio::time::sleep(PATIENCE / 6).await;
        for anywhere in [follower.anywhere(), calm.leader().await.anywhere()] {
            let refused = anywhere.transfer_leader(Some(other)).await.unwrap_err();
            assert!(matches!(refused, TransferError::NotInTouch { .. }), "{refused:?}");
        }
    });
}

#[test]
fn every_node_tells_who_leads_and_why() {
    in_calm(4, |mut calm| async move {
        let first = calm.leader().await.state().node_id;
        let (mut streams, mut term) = (Vec::new(), 0);
        for engine in calm.engines() {
            let node_id = engine.state().node_id;
            let mut changes = engine.leader_changes();
            let now = changes.next().await.unwrap();
            assert_eq!(now.leader.as_ref().map(|leader| leader.node_id), Some(first));
            assert_eq!(now.peer, Some(address(first)));
            assert_eq!((now.is_this_node, now.why), (node_id == first, Some(Succession::Start)));
            term = now.term;
            streams.push((node_id, changes));
        }
        let follower = calm.follower().await;
        let second = follower.state().node_id;
        follower.anywhere().transfer_leader(Some(second)).await.unwrap();
        let until = async |changes: &mut quorate::LeaderChanges, term: u64| {
            let newer = async {
                loop {
                    let change = changes.next().await.unwrap();
                    if change.leader.is_some() && change.term > term {
                        return change;
                    }
                }
            };
            tokio::time::timeout(PATIENCE, newer).await.unwrap()
        };
        let first_term = term;
        for (node_id, changes) in &mut streams {
            let change = until(changes, first_term).await;
            assert_eq!(change.leader.map(|leader| leader.node_id), Some(second));
            assert_eq!((change.is_this_node, change.why), (*node_id == second, Some(Succession::Transfer)));
            term = change.term;
        }
        calm.kill(second).await;
        streams.retain(|(node_id, _)| *node_id != second);
        let mut told = Vec::new();
        for (_, changes) in &mut streams {
            let change = until(changes, term).await;
            assert!(matches!(change.why, Some(Succession::Timeout | Succession::HigherTerm)), "{change:?}");
            told.push((change.term, change.leader));
        }
        assert_eq!(told[0], told[1]);
    });
}
