//! Nodes whose machines are not deterministic: found, and out of service.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use quorate::ReadError;
use quorate::store::{MemoryDisk, MemorySnapshots, MemoryStore, SyncMode};
use quorate::testkit::runtime::TaskGroup;
use quorate::{ApplyContext, StateMachine};
use quorate::{Divergence, Incarnation, NodeId, ReadLevel, Role};
use quorate::{Engine, EngineConfig, EngineParts};

use crate::network::{Network, SimTransport, address};
use crate::trace::Trace;

const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// Adds up what it is given, and on each node something more. It keeps no hash of its state.
#[derive(Debug, Clone)]
struct Sum {
    sum: u64,
    /// What no deterministic machine has.
    more: u64,
}

impl StateMachine for Sum {
    type Command = u64;
    type Reply = u64;
    type Query = ();
    type Answer = u64;
    type View = u64;

    fn apply(&mut self, _: &ApplyContext, number: u64) -> u64 {
        self.sum += number + self.more;
        self.sum
    }

    fn view(&self) -> u64 {
        self.sum
    }

    fn query(view: &u64, (): ()) -> u64 {
        *view
    }

    fn write_snapshot(view: &u64, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&view.to_le_bytes())
    }

    fn read_snapshot(_: u32, input: &mut dyn Read) -> io::Result<Self> {
        let mut bytes = [0; 8];
        input.read_exact(&mut bytes)?;
        Ok(Self { sum: u64::from_le_bytes(bytes), more: 0 })
    }
}

type Nodes = BTreeMap<NodeId, Engine<Sum>>;

async fn start(network: &Arc<Network>, more: [u64; 3]) -> Nodes {
    let mut nodes = Nodes::new();
    for (node_id, more) in (1..).zip(more) {
        let mut config = EngineConfig::new(node_id, "", address(node_id));
        config.initial_members = (1..=3).map(|id| (id, address(id))).collect();
        let parts = EngineParts::new(
            config,
            Incarnation(u128::from(node_id)),
            Arc::new(MemoryStore::open(&MemoryDisk::new(SyncMode::Immediate))),
            Arc::new(MemorySnapshots::new()),
            Arc::new(SimTransport { network: network.clone(), node_id }),
        );
        let group = Arc::new(TaskGroup::default());
        let engine = group.spawn(Engine::start(parts, Sum { sum: 0, more })).await.unwrap().unwrap();
        network.open_door(node_id, engine.peer_door(), group);
        nodes.insert(node_id, engine);
    }
    nodes
}

async fn eventually(what: &str, nodes: &Nodes, condition: impl Fn(&Nodes) -> bool) {
    let reached = async {
        while !condition(nodes) {
            tokio::time::sleep(POLL).await;
        }
    };
    let reached = tokio::time::timeout(PATIENCE, reached).await;
    let states = || nodes.values().map(|node| format!("{:?}", node.state())).collect::<Vec<_>>();
    assert!(reached.is_ok(), "in vain waited until {what}: {:#?}", states());
}

fn leader(nodes: &Nodes) -> Option<&Engine<Sum>> {
    let leading = nodes.values().filter(|node| node.state().role == Role::Leader);
    leading.max_by_key(|node| node.state().term)
}

/// Adds numbers, whoever leads.
async fn add(nodes: &Nodes, count: u64) {
    let written = async {
        let mut written = 0;
        while written < count {
            match leader(nodes) {
                Some(leader) if leader.write(1).await.is_ok() => written += 1,
                _ => tokio::time::sleep(POLL).await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, written).await.expect("writes are taken");
}

fn run<T>(seed: u64, more: [u64; 3], test: impl AsyncFnOnce(Nodes) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()))
        .build()
        .unwrap();
    runtime.block_on(async {
        let _guard = quorate::testkit::runtime::simulate(seed);
        let network = Network::new(seed, Arc::new(Trace::new(false)));
        let nodes = start(&network, more).await;
        eventually("all are ready", &nodes, |nodes| nodes.values().all(|node| node.state().is_ready())).await;
        test(nodes).await
    })
}

#[test]
fn the_one_that_differs_serves_no_more_and_the_others_go_on() {
    let mut led = 0;
    for (seed, odd) in [(0, 1), (1, 3), (2, 1), (3, 2)] {
        let mut more = [0; 3];
        more[odd as usize - 1] = 1;
        led += run(seed, more, async |nodes| goes_on_without(&nodes, odd, seed).await);
    }
    assert!(led > 0, "it never led: that it hands over was not tested");
}

/// Whether `odd`, which differs, led at first.
async fn goes_on_without(nodes: &Nodes, odd: NodeId, seed: u64) -> u64 {
    add(nodes, 1).await;
    let led = leader(nodes).is_some_and(|leader| leader.state().node_id == odd);
    // Also in the middle of a load, at positions that the nodes choose by themselves.
    add(nodes, 200).await;
    // While only two have spoken of a position, both are in doubt.
    let outvoted = |divergence: Divergence| divergence.majority.is_some_and(|hash| hash != divergence.own);
    eventually("it is found", nodes, |nodes| nodes[&odd].state().diverged.is_some_and(outvoted)).await;
    eventually("another one leads", nodes, |nodes| {
        leader(nodes).is_some_and(|leader| leader.state().node_id != odd)
    })
    .await;
    add(nodes, 10).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let mut answers = Vec::new();
    for (node_id, node) in nodes {
        let (state, read) = (node.state(), node.read((), ReadLevel::Linearizable).await);
        assert_eq!(state.fatal, None, "seed {seed}, node {node_id}");
        if *node_id == odd {
            assert!(!state.is_ready() && state.role == Role::Follower, "seed {seed}: {state:?}");
            assert!(matches!(read, Err(ReadError::Diverged { .. })), "seed {seed}: {read:?}");
        } else {
            assert_eq!(state.diverged, None, "seed {seed}, node {node_id}");
            answers.push(read.unwrap().answer);
        }
    }
    assert!(answers[0] == answers[1] && answers[0] >= 211, "seed {seed}: {answers:?}");
    led.into()
}

#[test]
fn where_no_two_are_the_same_all_say_so() {
    run(1, [0, 1, 2], async |nodes| {
        add(&nodes, 1).await;
        eventually("it is found", &nodes, |nodes| nodes.values().all(|node| node.state().diverged.is_some()))
            .await;
        for node in nodes.values() {
            let state = node.state();
            assert_eq!(state.diverged.unwrap().majority, None);
            assert!(matches!(node.read((), ReadLevel::Local).await, Err(ReadError::Diverged { .. })));
        }
        assert!(leader(&nodes).is_some(), "members can still be replaced");
    });
}

#[test]
fn where_all_are_the_same_none_does() {
    run(2, [1, 1, 1], async |nodes| {
        for _ in 0..4 {
            add(&nodes, 125).await;
            tokio::time::sleep(Duration::from_secs(2)).await;
            assert!(nodes.values().all(|node| node.state().diverged.is_none()));
        }
        for node in nodes.values() {
            assert!(node.read((), ReadLevel::Linearizable).await.unwrap().answer >= 1000);
        }
    });
}
