//! The state that a cluster begins with: the same on all founders, and received by whoever joins.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use quorate::store::{MemoryDisk, MemorySnapshots, MemoryStore, SyncMode};
use quorate::testkit::runtime::TaskGroup;
use quorate::{ApplyContext, StateMachine};
use quorate::{Engine, EngineConfig, EngineParts, NewMember};
use quorate::{FatalError, OpenError};
use quorate::{Incarnation, NodeId, ReadLevel, Role};

use crate::network::{Network, SimTransport, address};
use crate::trace::Trace;

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
const NODES: [NodeId; 3] = [1, 2, 3];
/// What was restored.
const RESTORED: u64 = 12_040;

/// Adds up.
#[derive(Debug, Clone, Default)]
struct Sum(u64);

impl StateMachine for Sum {
    type Command = u64;
    type Reply = u64;
    type Query = ();
    type Answer = u64;
    type View = u64;

    fn apply(&mut self, _: &ApplyContext, number: u64) -> u64 {
        self.0 += number;
        self.0
    }

    fn view(&self) -> u64 {
        self.0
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
        Ok(Self(u64::from_le_bytes(bytes)))
    }
}

/// How a node is started.
#[derive(Debug, Clone, Copy)]
struct Start {
    state: u64,
    restore: bool,
}

const RESTORE: Start = Start { state: RESTORED, restore: true };
const DEFAULT: Start = Start { state: 0, restore: false };

struct Cluster {
    network: Arc<Network>,
    disks: BTreeMap<NodeId, (MemoryDisk, Arc<MemorySnapshots>)>,
    nodes: BTreeMap<NodeId, (Engine<Sum>, Arc<TaskGroup>)>,
}

impl Cluster {
    async fn start(&mut self, node_id: NodeId, start: Start) -> Result<(), OpenError> {
        let mut config = EngineConfig::new(node_id, "", address(node_id));
        config.client_advertise = format!("node-{node_id}:7801");
        config.join = !NODES.contains(&node_id);
        config.restore = start.restore;
        config.initial_members =
            if config.join { BTreeMap::new() } else { NODES.map(|id| (id, address(id))).into() };
        let new = || (MemoryDisk::new(SyncMode::Immediate), Arc::new(MemorySnapshots::new()));
        let (log, snapshots) = self.disks.entry(node_id).or_insert_with(new);
        let parts = EngineParts::new(
            config,
            Incarnation(u128::from(node_id)),
            Arc::new(MemoryStore::open(log)),
            snapshots.clone(),
            Arc::new(SimTransport { network: self.network.clone(), node_id }),
        );
        let group = Arc::new(TaskGroup::default());
        let engine = group.spawn(Engine::start(parts, Sum(start.state))).await.unwrap()?;
        self.network.open_door(node_id, engine.peer_door(), group.clone());
        self.nodes.insert(node_id, (engine, group));
        Ok(())
    }

    async fn kill(&mut self, node_id: NodeId) {
        let Some((engine, group)) = self.nodes.remove(&node_id) else { return };
        self.network.close_door(node_id);
        group.abort();
        drop(engine);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    fn leader(&self) -> Option<&Engine<Sum>> {
        let leading = self.nodes.values().map(|(engine, _)| engine);
        leading.filter(|engine| engine.state().role == Role::Leader).max_by_key(|engine| engine.state().term)
    }

    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let reached = async {
            while !condition(self) {
                tokio::time::sleep(POLL).await;
            }
        };
        let reached = tokio::time::timeout(PATIENCE, reached).await;
        let states =
            || self.nodes.values().map(|(node, _)| format!("{:?}", node.state())).collect::<Vec<_>>();
        assert!(reached.is_ok(), "in vain waited until {what}: {:#?}", states());
    }

    async fn add_one(&self) -> u64 {
        let written = async {
            loop {
                if let Some(leader) = self.leader()
                    && let Ok(written) = leader.write(1).await
                {
                    return written.reply;
                }
                tokio::time::sleep(POLL).await;
            }
        };
        tokio::time::timeout(PATIENCE, written).await.expect("writes are taken")
    }

    async fn add_member(&self, node_id: NodeId, promote: bool) {
        let member = NewMember { node_id, peer: address(node_id) };
        let leader = self.leader().unwrap().clone();
        leader.add_member(member, promote, PATIENCE).await.unwrap();
    }
}

fn simulated<T>(seed: u64, test: impl AsyncFnOnce(Cluster) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()))
        .build()
        .unwrap();
    runtime.block_on(async {
        let _guard = quorate::testkit::runtime::simulate(seed);
        let network = Network::new(seed, Arc::new(Trace::new(false)));
        test(Cluster { network, disks: BTreeMap::new(), nodes: BTreeMap::new() }).await
    })
}

#[test]
fn a_machine_that_joins_receives_what_was_restored() {
    for seed in 0..4 {
        simulated(seed, async |mut cluster| {
            for node_id in NODES {
                cluster.start(node_id, RESTORE).await.unwrap();
            }
            cluster.until("one leads", |cluster| cluster.leader().is_some()).await;
            cluster.start(4, DEFAULT).await.unwrap();
            // At once, or after some writes.
            let mut sum = RESTORED;
            if seed % 2 == 0 {
                sum = cluster.add_one().await;
            }
            cluster.add_member(4, true).await;
            assert_eq!(cluster.add_one().await, sum + 1);
            for (node_id, (engine, _)) in &cluster.nodes {
                let read = engine.read((), ReadLevel::Linearizable).await.unwrap();
                assert_eq!(read.answer, sum + 1, "node {node_id}");
                assert!(engine.state().snapshot.is_some(), "node {node_id} has it in a snapshot");
            }
            // From then on it takes no special call.
            for node_id in NODES {
                cluster.kill(node_id).await;
                cluster.start(node_id, DEFAULT).await.unwrap();
            }
            assert_eq!(cluster.add_one().await, sum + 2);
        });
    }
}

#[test]
fn founders_that_begin_with_other_states_form_nothing() {
    for odd in [DEFAULT, Start { state: 5, restore: true }, Start { state: RESTORED, restore: false }] {
        for place in NODES {
            simulated(place, async |mut cluster| {
                for node_id in NODES {
                    let start = if node_id == place { odd } else { RESTORE };
                    cluster.start(node_id, start).await.unwrap();
                }
                tokio::time::sleep(Duration::from_secs(10)).await;
                let words = |forming: String| forming.contains("begins with another state");
                let told = |engine: &Engine<Sum>| engine.state().forming.map(|forming| forming.to_string());
                let said = cluster
                    .nodes
                    .values()
                    .filter_map(|(engine, _)| told(engine))
                    .filter(|text| words(text.clone()));
                assert!(said.count() >= 2, "{odd:?} at {place}");
                assert!(cluster.nodes.values().all(|(engine, _)| engine.state().last_log.is_none()));
                cluster.kill(place).await;
                cluster.start(place, RESTORE).await.unwrap();
                assert_eq!(cluster.add_one().await, RESTORED + 1);
            });
        }
    }
}

#[test]
fn who_joins_a_cluster_that_restored_nothing_with_another_state_is_told_and_holds_nothing() {
    simulated(3, async |mut cluster| {
        for node_id in NODES {
            cluster.start(node_id, Start { state: RESTORED, restore: false }).await.unwrap();
        }
        cluster.until("one leads", |cluster| cluster.leader().is_some()).await;
        cluster.start(4, DEFAULT).await.unwrap();
        cluster.add_member(4, false).await;
        cluster
            .until("it stops", |cluster| {
                let fatal = cluster.nodes[&4].0.state().fatal;
                matches!(fatal, Some(FatalError::Outdated { reason }) if reason.contains("another initial state"))
            })
            .await;
        assert_eq!(cluster.nodes[&4].0.state().last_log, None);
        cluster.kill(4).await;
        cluster.start(4, Start { state: RESTORED, restore: false }).await.unwrap();
        let sum = cluster.add_one().await;
        cluster.until("it has caught up", |cluster| cluster.nodes[&4].0.state().applied.is_some()).await;
        let read = cluster.nodes[&4].0.read((), ReadLevel::Linearizable).await.unwrap();
        assert_eq!((sum, read.answer), (RESTORED + 1, RESTORED + 1));
    });
}

#[test]
fn before_there_is_a_snapshot_a_node_is_started_with_the_same_state_again() {
    simulated(5, async |mut cluster| {
        for node_id in NODES {
            cluster.start(node_id, Start { state: RESTORED, restore: false }).await.unwrap();
        }
        let sum = cluster.add_one().await;
        cluster.kill(2).await;
        // Without a snapshot, its log begins with the founding membership.
        let error = match cluster.start(2, DEFAULT).await {
            Err(error) => error.to_string(),
            Ok(()) => {
                cluster.until("it stops", |cluster| cluster.nodes[&2].0.state().fatal.is_some()).await;
                cluster.nodes[&2].0.state().fatal.unwrap().to_string()
            }
        };
        assert!(error.contains("another initial state"), "{error}");
        cluster.kill(2).await;
        cluster.start(2, RESTORE).await.unwrap();
        assert_eq!(cluster.add_one().await, sum + 1);
        cluster.until("it has caught up", |cluster| cluster.nodes[&2].0.state().is_ready()).await;
        let read = cluster.nodes[&2].0.read((), ReadLevel::Linearizable).await.unwrap();
        assert_eq!(read.answer, sum + 1);
    });
}
