//! A cluster whose machine is upgraded node by node, while it is written to.

mod machines;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use quorate::testkit::runtime::TaskGroup;
use quorate::{Composed, Either, StateMachine};
use quorate::{Engine, MachineVersion, NodeId, NodeState, ReadLevel, Role};
use quorate::{FatalError, OpenError, WriteError, WriteOptions};
use quorate_testkit::simulation::{Hosts, address, in_world};

use machines::{Later, New, NewCommand, Old, OldCommand};

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
const NODES: [NodeId; 3] = [1, 2, 3];

/// The machine before the upgrade, with another one added to it.
type Both = Composed<Old, New, 1>;

enum Build {
    Old(Engine<Old>),
    New(Engine<New>),
    Later(Engine<Later>),
    Both(Engine<Both>),
}

impl Build {
    fn state(&self) -> NodeState {
        match self {
            Self::Old(engine) => engine.state(),
            Self::New(engine) => engine.state(),
            Self::Later(engine) => engine.state(),
            Self::Both(engine) => engine.state(),
        }
    }

    async fn add(&self, number: u64) -> Result<u64, WriteError> {
        match self {
            Self::Old(engine) => engine.write(OldCommand::Add(number)).await.map(|written| written.reply),
            Self::New(engine) => engine.write(NewCommand::Add(number)).await.map(|written| written.reply),
            Self::Later(_) => panic!("it no longer adds"),
            Self::Both(engine) => {
                let written = engine.write(Either::Base(OldCommand::Add(number))).await;
                written.map(|written| written.reply.base().expect("the first machine answers"))
            }
        }
    }

    async fn sum(&self) -> Option<u64> {
        let read = match self {
            Self::Old(engine) => engine.read((), ReadLevel::Linearizable).await,
            Self::New(engine) => engine.read((), ReadLevel::Linearizable).await,
            Self::Later(engine) => engine.read((), ReadLevel::Linearizable).await,
            Self::Both(engine) => {
                let read = engine.read(Either::Base(()), ReadLevel::Linearizable).await;
                return read.ok().and_then(|read| read.answer.base());
            }
        };
        read.ok().map(|read| read.answer)
    }

    async fn take_snapshot(&self) {
        match self {
            Self::Old(engine) => engine.take_snapshot().await.map(drop),
            Self::New(engine) => engine.take_snapshot().await.map(drop),
            Self::Later(engine) => engine.take_snapshot().await.map(drop),
            Self::Both(engine) => engine.take_snapshot().await.map(drop),
        }
        .unwrap();
    }
}

struct Cluster {
    hosts: Hosts,
    nodes: BTreeMap<NodeId, (Build, Arc<TaskGroup>)>,
    sum: u64,
}

impl Cluster {
    fn new(seed: u64) -> Self {
        Self { hosts: Hosts::new(seed), nodes: BTreeMap::new(), sum: 0 }
    }

    async fn start<M: StateMachine>(
        &mut self,
        node_id: NodeId,
        machine: M,
        build: fn(Engine<M>) -> Build,
    ) -> Result<(), OpenError> {
        let mut parts = self.hosts.parts(node_id);
        let snapshots = &mut parts.config.snapshots;
        (snapshots.every_entries, snapshots.keep_entries) = (1_000, 1_000);
        let (engine, group) = self.hosts.start(node_id, parts, machine).await?;
        self.nodes.insert(node_id, (build(engine), group));
        Ok(())
    }

    async fn start_old(&mut self, node_id: NodeId) -> Result<(), OpenError> {
        self.start(node_id, Old::default(), Build::Old).await
    }

    /// What an old build says on the disk of a node: when it starts, or when it hears what of its log is committed.
    async fn refusal_of_old(&mut self, node_id: NodeId) -> String {
        match self.start_old(node_id).await {
            Err(error) => error.to_string(),
            Ok(()) => {
                self.until("it stops", |cluster| cluster.nodes[&node_id].0.state().fatal.is_some()).await;
                self.nodes[&node_id].0.state().fatal.unwrap().to_string()
            }
        }
    }

    async fn start_new(&mut self, node_id: NodeId) {
        self.start(node_id, New::default(), Build::New).await.unwrap();
    }

    async fn start_later(&mut self, node_id: NodeId) {
        self.start(node_id, Later::default(), Build::Later).await.unwrap();
    }

    async fn start_both(&mut self, node_id: NodeId) {
        self.start(node_id, Both::default(), Build::Both).await.unwrap();
    }

    /// Ends a node as a crash does.
    async fn kill(&mut self, node_id: NodeId) {
        let Some((build, group)) = self.nodes.remove(&node_id) else { return };
        self.hosts.kill(node_id, build, group).await;
    }

    fn leader(&self) -> Option<NodeId> {
        let states = self.nodes.values().map(|(build, _)| build.state());
        let leading = states.filter(|state| state.role == Role::Leader && state.in_touch);
        leading.max_by_key(|state| state.term).map(|state| state.node_id)
    }

    fn new_leader(&self) -> Option<&Engine<New>> {
        match &self.nodes[&self.leader()?].0 {
            Build::New(engine) => Some(engine),
            Build::Old(_) | Build::Later(_) | Build::Both(_) => None,
        }
    }

    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let reached = async {
            while !condition(self) {
                tokio::time::sleep(POLL).await;
            }
        };
        let reached = tokio::time::timeout(PATIENCE, reached).await;
        let states =
            || self.nodes.values().map(|(build, _)| format!("{:?}", build.state())).collect::<Vec<_>>();
        assert!(reached.is_ok(), "in vain waited until {what}: {:#?}", states());
    }

    /// Adds one after the other, whoever leads.
    async fn add(&mut self, count: u64) {
        let written = async {
            let mut written = 0;
            while written < count {
                if let Some(leader) = self.leader()
                    && let Ok(sum) = self.nodes[&leader].0.add(1).await
                {
                    written += 1;
                    self.sum = sum;
                } else {
                    tokio::time::sleep(POLL).await;
                }
            }
        };
        tokio::time::timeout(PATIENCE, written).await.expect("writes are taken");
    }

    /// Multiplies by two, once that is taken.
    async fn double(&mut self) {
        let written = async {
            loop {
                let written = match self.leader().map(|leader| &self.nodes[&leader].0) {
                    Some(Build::New(leader)) => leader.write(NewCommand::Multiply(2)).await.ok(),
                    Some(Build::Later(leader)) => leader.write(NewCommand::Multiply(2)).await.ok(),
                    Some(Build::Old(_) | Build::Both(_)) | None => None,
                };
                if let Some(written) = written {
                    return written.reply;
                }
                tokio::time::sleep(POLL).await;
            }
        };
        self.sum = tokio::time::timeout(PATIENCE, written).await.expect("it is taken");
    }

    /// All that run have the sum.
    async fn expect_sum(&self) {
        for (node_id, (build, _)) in &self.nodes {
            let read = async {
                loop {
                    match build.sum().await {
                        Some(sum) => return sum,
                        None => tokio::time::sleep(POLL).await,
                    }
                }
            };
            assert_eq!(tokio::time::timeout(PATIENCE, read).await, Ok(self.sum), "node {node_id}");
            assert_eq!(build.state().diverged, None, "node {node_id}");
        }
    }
}

fn simulated<T>(seed: u64, test: impl AsyncFnOnce(Cluster) -> T) -> T {
    founded_by(seed, &[], test)
}

/// Of three founders, of which these have been upgraded.
fn founded_by<T>(seed: u64, upgraded: &[NodeId], test: impl AsyncFnOnce(Cluster) -> T) -> T {
    in_world(seed, async {
        let mut cluster = Cluster::new(seed);
        for node_id in NODES {
            match upgraded.contains(&node_id) {
                true => cluster.start_new(node_id).await,
                false => cluster.start_old(node_id).await.unwrap(),
            }
        }
        test(cluster).await
    })
}

const UPGRADE: &str = "written by version 2 of the machine, this build reads 0 only: upgrade this node";

/// Upgrades all nodes, one after the other, beginning with `first`.
async fn upgrade(cluster: &mut Cluster, first: NodeId) -> u64 {
    let mut refused = 0;
    for step in 0..3 {
        let node_id = (first + step - 1) % 3 + 1;
        cluster.add(5).await;
        cluster.kill(node_id).await;
        cluster.add(2).await;
        cluster.start_new(node_id).await;
        cluster.add(5).await;
        cluster
            .until("it has caught up", |cluster| {
                cluster
                    .nodes
                    .values()
                    .all(|(build, _)| build.state().applied >= cluster.nodes[&node_id].0.state().committed)
            })
            .await;
        if step < 2
            && let Some(leader) = cluster.new_leader()
        {
            // The next one in turn is old.
            let old: Vec<NodeId> = (step + 1..3).map(|step| (first + step - 1) % 3 + 1).collect();
            let before = leader.state().last_log;
            let error = leader.write(NewCommand::Multiply(2)).await.unwrap_err();
            let WriteError::VersionNotAgreed { wrote, mut missing } = error else { panic!("{error}") };
            missing.sort_unstable();
            assert_eq!(wrote, MachineVersion { machine: 0, version: 2 });
            assert!(
                missing.iter().all(|node_id| old.contains(node_id)) && !missing.is_empty(),
                "{missing:?} of {old:?}"
            );
            assert_eq!(leader.state().last_log, before, "nothing was proposed");
            refused += 1;
            // Others wait behind who proposes for many.
            let (done, outcome) = tokio::sync::oneshot::channel();
            let begun = tokio::time::Instant::now();
            let answer = move |outcome| drop(done.send(outcome));
            leader.propose(NewCommand::Multiply(2), WriteOptions::default(), answer).await;
            assert!(outcome.await.unwrap().is_err());
            assert_eq!(begun.elapsed(), Duration::ZERO, "it does not wait for an agreement");
        }
    }
    refused
}

#[test]
fn founders_agree_on_what_all_of_them_read() {
    for (upgraded, agreed) in [(&NODES[..], 2), (&[1, 2], 0)] {
        founded_by(11, upgraded, async |mut cluster| {
            cluster.until("one leads", |cluster| cluster.leader().is_some()).await;
            let leader = cluster.leader().unwrap();
            // One that has said nothing to its leader yet, if that was quick enough.
            let is_upgraded = cluster.new_leader().is_some();
            cluster.kill(if is_upgraded { leader % 3 + 1 } else { leader }).await;
            cluster.until("an upgraded node leads", |cluster| cluster.new_leader().is_some()).await;
            let leader = cluster.new_leader().unwrap();
            let written = leader.write(NewCommand::Multiply(3)).await;
            match agreed {
                0 => assert!(matches!(written, Err(WriteError::VersionNotAgreed { .. })), "{written:?}"),
                version => {
                    assert!(written.is_ok(), "{written:?}");
                    assert_eq!(leader.agreed_versions(), [MachineVersion { machine: 0, version }]);
                }
            }
        });
    }
}

#[test]
fn old_members_first_then_new_commands() {
    let mut refused = 0;
    for seed in 0..6 {
        refused += simulated(seed, async |mut cluster| {
            let refused = upgrade(&mut cluster, seed % 3 + 1).await;
            cluster.double().await;
            cluster.expect_sum().await;
            // What was agreed stays agreed, whoever is down and whoever leads.
            let leader = cluster.leader().unwrap();
            cluster.kill(leader).await;
            cluster.double().await;
            cluster.add(3).await;
            cluster.start_new(leader).await;
            cluster.expect_sum().await;
            // In snapshots, too.
            for node_id in NODES {
                cluster.nodes[&node_id].0.take_snapshot().await;
            }
            for node_id in NODES {
                cluster.kill(node_id).await;
            }
            for node_id in [1, 3] {
                cluster.start_new(node_id).await;
            }
            cluster.double().await;
            cluster.start_new(2).await;
            cluster.expect_sum().await;
            refused
        });
    }
    assert!(refused > 0, "no upgraded node has led before all were: that it refuses was not tested");
}

#[test]
fn a_node_that_is_given_its_old_build_back_refuses_to_start_and_keeps_its_data() {
    simulated(7, async |mut cluster| {
        upgrade(&mut cluster, 1).await;
        cluster.double().await;
        for with_snapshot in [false, true] {
            if with_snapshot {
                cluster.nodes[&2].0.take_snapshot().await;
            }
            cluster.kill(2).await;
            let error = cluster.refusal_of_old(2).await;
            assert!(error.contains(UPGRADE) && !error.contains("corrupt"), "{error}");
            cluster.kill(2).await;
            cluster.add(1).await;
            cluster.start_new(2).await;
            cluster.add(1).await;
            cluster.expect_sum().await;
        }
    });
}

#[test]
fn a_node_that_is_too_old_for_what_is_committed_stops_and_goes_on_once_it_is_upgraded() {
    for with_snapshot in [false, true] {
        founded_by(9, &[1, 3], async |mut cluster| {
            cluster.until("one leads", |cluster| cluster.leader().is_some()).await;
            cluster.kill(2).await;
            cluster.until("an upgraded node leads", |cluster| cluster.new_leader().is_some()).await;
            // It says what it reads, and is given the build before.
            cluster.start_new(4).await;
            let leader = cluster.new_leader().unwrap().clone();
            leader.add_member(member(4), false, PATIENCE).await.unwrap();
            cluster.until("it follows", |cluster| cluster.nodes[&4].0.state().applied.is_some()).await;
            cluster.kill(4).await;
            cluster.start_new(2).await;
            cluster.double().await;
            if with_snapshot {
                // More than the log keeps.
                cluster.add(2_100).await;
                cluster
                    .until("the log is purged", |cluster| {
                        cluster.nodes.values().all(|(build, _)| build.state().purged.is_some())
                    })
                    .await;
            }
            cluster.start_old(4).await.unwrap();
            cluster.until("it stops", |cluster| {
                matches!(&cluster.nodes[&4].0.state().fatal, Some(FatalError::Outdated { reason }) if reason.contains(UPGRADE))
            }).await;
            cluster.add(5).await;
            cluster.kill(4).await;
            cluster.start_new(4).await;
            cluster.double().await;
            cluster.expect_sum().await;
        });
    }
}

fn member(node_id: NodeId) -> quorate::NewMember {
    quorate::NewMember { node_id, peer: address(node_id) }
}

#[test]
fn who_does_not_read_what_is_agreed_becomes_no_member() {
    simulated(4, async |mut cluster| {
        upgrade(&mut cluster, 1).await;
        cluster.double().await;
        cluster.start_old(4).await.unwrap();
        let leader = cluster.new_leader().unwrap().clone();
        let refused = leader.add_member(member(4), false, PATIENCE).await.unwrap_err().to_string();
        assert!(refused.contains("its build does not read version 2 of the machine"), "{refused}");
        assert!(!leader.state().membership.members.contains_key(&4));
    });
}

#[test]
fn what_a_later_build_has_left_behind_is_not_asked_of_it_again() {
    for seed in 0..4 {
        simulated(seed, async |mut cluster| {
            upgrade(&mut cluster, 1).await;
            cluster.double().await;
            for node_id in NODES {
                cluster.nodes[&node_id].0.take_snapshot().await;
            }
            // Its log still begins with what was written before the upgrade.
            cluster.kill(3).await;
            cluster.start_later(3).await;
            cluster.double().await;
            for leader in [1, 2] {
                // Whoever leads next looks for what this node has from the beginning of the log on.
                cluster.kill(leader).await;
                cluster.double().await;
                cluster.start_new(leader).await;
                cluster.double().await;
                cluster.expect_sum().await;
            }
        });
    }
}

/// Gives the added machine a command, once that is taken.
async fn add_to_added(cluster: &Cluster, number: u64) -> u64 {
    let written = async {
        loop {
            let leader = cluster.leader().map(|leader| &cluster.nodes[&leader].0);
            if let Some(Build::Both(leader)) = leader
                && let Ok(written) = leader.write(Either::Added(NewCommand::Add(number))).await
            {
                return written.reply.added().expect("the added machine answers");
            }
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(PATIENCE, written).await.expect("it is taken")
}

#[test]
fn a_machine_is_added_to_a_running_cluster() {
    let mut refused = 0;
    for seed in 0..8 {
        refused += simulated(seed, async |mut cluster| {
            cluster.add(10).await;
            cluster.nodes[&1].0.take_snapshot().await;
            let mut refused = 0;
            // The leader second: then an upgraded node or one that is not takes the lead.
            let leader = cluster.leader().unwrap();
            let others: Vec<NodeId> = NODES.into_iter().filter(|node_id| *node_id != leader).collect();
            for (step, node_id) in [others[0], leader, others[1]].into_iter().enumerate() {
                // One that was just started stands for no election.
                tokio::time::sleep(Duration::from_secs(5)).await;
                cluster.kill(node_id).await;
                cluster.add(2).await;
                cluster.start_both(node_id).await;
                cluster.add(2).await;
                let leader = cluster.leader().map(|leader| &cluster.nodes[&leader].0);
                if let Some(Build::Both(leader)) = leader.filter(|_| step < 2) {
                    let error = leader.write(Either::Added(NewCommand::Add(1))).await.unwrap_err();
                    assert!(
                        matches!(error, WriteError::VersionNotAgreed { .. } | WriteError::NotLeader { .. }),
                        "{error}"
                    );
                    refused += u64::from(matches!(error, WriteError::VersionNotAgreed { .. }));
                }
            }
            assert_eq!(add_to_added(&cluster, 7).await, 7);
            cluster.add(1).await;
            for node_id in NODES {
                cluster.nodes[&node_id].0.take_snapshot().await;
            }
            assert_eq!(add_to_added(&cluster, 8).await, 15);
            for node_id in NODES {
                cluster.kill(node_id).await;
                cluster.start_both(node_id).await;
            }
            assert_eq!(add_to_added(&cluster, 1).await, 16);
            cluster.expect_sum().await;
            cluster.kill(3).await;
            let error = cluster.refusal_of_old(3).await;
            assert!(
                error.contains("of machine 1, which this build does not have: upgrade this node"),
                "{error}"
            );
            refused
        });
    }
    assert!(refused > 0, "no upgraded node has led before all were");
}
