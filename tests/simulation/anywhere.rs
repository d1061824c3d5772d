//! Calls through whichever node: nothing is lost, nothing is done twice, and what was said to be certain is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use quorate::kv::machine::{KvAnswer, KvCommand, KvMachine, KvQuery, KvReply};
use quorate::store::{MemoryDisk, MemorySnapshots, MemoryStore, SyncMode};
use quorate::testkit::runtime::TaskGroup;
use quorate::{AckLevel, Engine, EngineConfig, EngineParts, ForwardError, OperationError, Reason};
use quorate::{Incarnation, NodeId, ReadLevel, Role, Succession, TransferError, WriteError, WriteOptions};
use tokio::time::Instant;

use crate::network::{Network, SimTransport, address};
use crate::trace::Trace;
use crate::world::Scenario;
use crate::{run_all, run_until, seeds};

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);

#[test]
fn whatever_is_written_through_whichever_node_holds() {
    let count = seeds(8, 100);
    let scenario = Scenario { anywhere: true, ..Scenario::default() };
    let (did, failures) = run_all(0..count, scenario);
    assert!(failures.is_empty(), "{} of {count} seeds failed:\n{}", failures.len(), failures.join("\n"));
    eprintln!("{count} seeds: {did:?}");
    for (what, happened, at_least) in [
        ("acknowledged writes", did.acknowledged, 50 * count),
        ("writes acknowledged by followers", did.passed_on, 30 * count),
        ("writes that certainly were not applied", did.refused, count / 2),
        ("writes with an unknown outcome", did.unknown, count / 2),
        ("exactly-once writes", did.counted, 20 * count),
        ("exactly-once writes that had to be repeated", did.repeated, count / 4),
        ("hand-overs", did.hand_overs, count / 2),
        ("crashes", did.crashes, count),
        ("duplicated messages", did.duplicated, count),
        ("leader changes", did.leader_changes, count),
    ] {
        assert!(happened >= at_least, "only {happened} {what} in {count} seeds: {did:?}");
    }
}

/// What [`Scenario::done_twice`] does is what a leader would do that does not know a call again.
#[test]
fn a_leader_that_does_a_call_twice_is_caught() {
    let scenario = Scenario { anywhere: true, done_twice: true, ..Scenario::default() };
    let caught = run_until("times", 60, scenario);
    assert!(
        caught.is_ok(),
        "60 seeds in which calls are done twice had no write applied twice: the check is blind. {caught:?}"
    );
}

#[test]
fn retries_through_any_node_without_a_session_are_caught() {
    let scenario = Scenario { anywhere: true, no_sessions: true, ..Scenario::default() };
    let caught = run_until("increments", 60, scenario);
    assert!(
        caught.is_ok(),
        "60 seeds of retries without a session applied nothing twice: the check is blind. {caught:?}"
    );
}

/// Three nodes whose disks are in order.
struct Calm {
    network: Arc<Network>,
    nodes: BTreeMap<NodeId, (Engine<KvMachine>, Arc<TaskGroup>)>,
}

impl Calm {
    async fn start(seed: u64) -> Self {
        let network = Network::new(seed, Arc::new(Trace::new(false)));
        let mut calm = Self { network, nodes: BTreeMap::new() };
        for node_id in 1..=3 {
            let mut config = EngineConfig::new(node_id, "", address(node_id));
            config.client_advertise = format!("node-{node_id}:7801");
            config.initial_members = (1..=3).map(|id| (id, address(id))).collect();
            let transport = SimTransport { network: calm.network.clone(), node_id };
            let parts = EngineParts::new(
                config,
                Incarnation(u128::from(node_id)),
                Arc::new(MemoryStore::open(&MemoryDisk::new(SyncMode::Immediate))),
                Arc::new(MemorySnapshots::new()),
                Arc::new(transport),
            );
            let group = Arc::new(TaskGroup::default());
            let engine = group.spawn(Engine::start(parts, KvMachine::default())).await.unwrap().unwrap();
            calm.network.open_door(node_id, engine.peer_door(), group.clone());
            calm.nodes.insert(node_id, (engine, group));
        }
        for (engine, _) in calm.nodes.values() {
            assert!(engine.ready(PATIENCE).await);
        }
        calm
    }

    fn engines(&self) -> impl Iterator<Item = &Engine<KvMachine>> + Clone {
        self.nodes.values().map(|(engine, _)| engine)
    }

    async fn leader(&self) -> Engine<KvMachine> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let leading = self.engines().filter(|engine| engine.state().role == Role::Leader);
            match leading.max_by_key(|engine| engine.state().term) {
                Some(engine) if engine.state().in_touch => return engine.clone(),
                _ => assert!(Instant::now() < deadline, "nobody leads"),
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn follower(&self) -> Engine<KvMachine> {
        let leader = self.leader().await.state().node_id;
        let follows = |engine: &&Engine<KvMachine>| {
            engine.state().leader.is_some_and(|known| known.node_id == leader)
                && engine.state().node_id != leader
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(engine) = self.engines().find(follows) {
                return engine.clone();
            }
            assert!(Instant::now() < deadline, "nobody follows");
            tokio::time::sleep(POLL).await;
        }
    }

    /// Has the node that neither leads nor is [`Self::follower`] reach nobody.
    async fn cut_off_the_third(&self) {
        let others = [self.leader().await.state().node_id, self.follower().await.state().node_id];
        let third = (1..=3).find(|id| !others.contains(id)).unwrap();
        self.network.set_cuts(others.iter().flat_map(|id| [(third, *id), (*id, third)]).collect());
    }

    async fn kill(&mut self, node_id: NodeId) {
        let (engine, group) = self.nodes.remove(&node_id).unwrap();
        self.network.close_door(node_id);
        group.abort();
        drop(engine);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn in_calm<F: Future<Output = ()>>(seed: u64, test: impl FnOnce(Calm) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()))
        .build()
        .unwrap();
    runtime.block_on(async move {
        let _guard = quorate::testkit::runtime::simulate(seed);
        test(Calm::start(seed).await).await;
    });
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
        calm.network.set_old_builds([leading]);
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
        calm.network.set_old_builds([]);
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
            calm.network.set_cuts(others.flat_map(|id| [(leader, id), (id, leader)]).collect());
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
        calm.cut_off_the_third().await;
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
        calm.network.set_cuts([].into());
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
        calm.cut_off_the_third().await;
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
        calm.cut_off_the_third().await;
        let all = WriteOptions { ack: AckLevel::All, ack_timeout: PATIENCE, ..WriteOptions::default() };
        let waiting = tokio::spawn({
            let follower = follower.clone();
            async move { follower.write_anywhere_with(put("k", "v"), all).await }
        });
        while version(&follower, "k", ReadLevel::Local).await < 1 {
            tokio::time::sleep(POLL).await;
        }
        let begun = Instant::now();
        let (engine, _tasks) = calm.nodes.remove(&leading).unwrap();
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
        calm.network.set_cuts([(leading, removed)].into());
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
        calm.network.set_cuts([(leader, follower.state().node_id)].into());
        let begun = Instant::now();
        let lost = anywhere.remove_member(9, false).await.unwrap_err();
        let took = begun.elapsed();
        assert!(lost.told().maybe_applied, "{lost}");
        assert!(took >= patience && took < patience + Duration::from_millis(2), "{took:?}");
        calm.network.set_cuts([].into());
        let unknown = follower.anywhere().remove_member(9, false).await;
        assert_eq!(unknown, Err(quorate::MembershipError::UnknownMember { node_id: 9 }));
    });
}

#[test]
fn what_a_leader_knows_of_a_hand_over_is_told() {
    in_calm(7, |calm| async move {
        let (leader, follower) = (calm.leader().await.state().node_id, calm.follower().await);
        let other = (1..=3).find(|id| ![leader, follower.state().node_id].contains(id)).unwrap();
        calm.network.set_cuts([(leader, other), (other, leader)].into());
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
        for (node_id, (engine, _)) in &calm.nodes {
            let mut changes = engine.leader_changes();
            let now = changes.next().await.unwrap();
            assert_eq!(now.leader.as_ref().map(|leader| leader.node_id), Some(first));
            assert_eq!(now.peer, Some(address(first)));
            assert_eq!((now.is_this_node, now.why), (*node_id == first, Some(Succession::Start)));
            term = now.term;
            streams.push((*node_id, changes));
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
