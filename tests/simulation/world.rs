//! One simulated cluster, from its formation to the scan after the last fault.

mod clocks;
mod members;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use quorate::kv::machine::{KvAnswer, KvMachine, KvQuery};
use quorate::testkit::runtime::TaskGroup;
use quorate::{Engine, EngineConfig, EngineParts, SnapshotPolicy};
use quorate::{Incarnation, NodeId, ReadLevel};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::time::Instant;

use crate::Shared;
use crate::disk::Disk;
use crate::faults::{self, Fault};
use crate::lifetimes::Lifetimes;
use crate::network::{Network, SimTransport, Weather, address};
use crate::trace::Trace;
use crate::workload::{COUNTER, History, Way, Workload};

/// How long faults go on.
const SAFETY: Duration = Duration::from_secs(12);
/// How long a healed cluster may take to answer, and then to agree.
const LIVENESS: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(10);

#[derive(Debug, Clone)]
pub struct Scenario {
    pub nodes: u64,
    /// Nodes that do not found the cluster: with any of these, members come and go.
    pub spare: u64,
    /// Acknowledge writes before they are synced: a bug that must be noticed.
    pub lying_disk: bool,
    /// Send writes again without a session: a bug of a client that must be noticed.
    pub no_sessions: bool,
    /// Wall clocks jump, and keys and sessions are watched that are to end after a while.
    pub clocks: bool,
    /// Clients write through whichever node, and the lead is handed over now and then.
    pub anywhere: bool,
    /// Calls that are passed on are done again when they arrive twice: a bug of a leader that must be noticed.
    pub done_twice: bool,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            nodes: 3,
            spare: 0,
            lying_disk: false,
            no_sessions: false,
            clocks: false,
            anywhere: false,
            done_twice: false,
        }
    }
}

/// What a run did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    pub trace_hash: u64,
    pub acknowledged: u64,
    pub unknown: u64,
    pub reads: u64,
    pub crashes: u64,
    pub stops: u64,
    pub cuts: u64,
    pub lost: u64,
    pub duplicated: u64,
    pub forgotten: u64,
    pub leader_changes: u64,
    pub snapshots_built: u64,
    pub snapshots_installed: u64,
    pub counted: u64,
    pub repeated: u64,
    pub follower_reads: u64,
    pub lease_reads: u64,
    pub bounded_reads: u64,
    /// Changes of the membership that were made, and wiped nodes that were taken back.
    pub changes: u64,
    pub replaced: u64,
    /// Jumps of wall clocks, keys whose end was seen, and sessions that were nearly over when they were used.
    pub jumps: u64,
    pub ended: u64,
    pub kept: u64,
    /// Writes acknowledged by nodes that did not lead, writes that certainly were not applied, and leads that were handed
    /// over through any node.
    pub passed_on: u64,
    pub refused: u64,
    pub hand_overs: u64,
}

impl Outcome {
    pub fn add(&mut self, other: &Self) {
        self.trace_hash ^= other.trace_hash;
        self.acknowledged += other.acknowledged;
        self.unknown += other.unknown;
        self.reads += other.reads;
        self.crashes += other.crashes;
        self.stops += other.stops;
        self.cuts += other.cuts;
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.forgotten += other.forgotten;
        self.leader_changes += other.leader_changes;
        self.snapshots_built += other.snapshots_built;
        self.snapshots_installed += other.snapshots_installed;
        self.counted += other.counted;
        self.repeated += other.repeated;
        self.follower_reads += other.follower_reads;
        self.lease_reads += other.lease_reads;
        self.bounded_reads += other.bounded_reads;
        self.changes += other.changes;
        self.replaced += other.replaced;
        self.jumps += other.jumps;
        self.ended += other.ended;
        self.kept += other.kept;
        self.passed_on += other.passed_on;
        self.refused += other.refused;
        self.hand_overs += other.hand_overs;
    }
}

/// Saves the trace even when the run fails.
struct SaveTrace(Arc<Trace>);

impl Drop for SaveTrace {
    fn drop(&mut self) {
        if let (Some(path), Some(text)) = (std::env::var_os("QUORATE_SIM_TRACE"), self.0.text()) {
            let _ = std::fs::write(path, text);
        }
    }
}

pub type Engines = Shared<BTreeMap<NodeId, Engine<KvMachine>>>;

struct Node {
    disk: Disk,
    incarnation: u128,
    /// Started to be added.
    joins: bool,
    /// The longest lease it has promised in any of its lives.
    promised_lease_ms: u64,
    /// How far its wall clock is ahead.
    wall_shift_ms: i64,
    group: Option<Arc<TaskGroup>>,
}

pub struct World {
    seed: u64,
    scenario: Scenario,
    rng: SmallRng,
    trace: Arc<Trace>,
    network: Arc<Network>,
    nodes: BTreeMap<NodeId, Node>,
    engines: Engines,
    /// A member whose disk was lost, until the cluster has taken it back.
    wiped: Option<NodeId>,
    /// Nodes that were removed for certain.
    retired: BTreeSet<NodeId>,
    outcome: Outcome,
}

impl World {
    pub fn new(seed: u64, scenario: Scenario) -> Self {
        let keep_text = std::env::var_os("QUORATE_SIM_TRACE").is_some();
        let trace = Arc::new(Trace::new(keep_text));
        let node = |id| Node {
            promised_lease_ms: 0,
            wall_shift_ms: 0,
            disk: Disk::new(seed ^ id, scenario.lying_disk),
            incarnation: u128::from(id),
            joins: id > scenario.nodes,
            group: None,
        };
        let nodes = (1..=scenario.nodes + scenario.spare).map(|id| (id, node(id))).collect();
        Self {
            seed,
            scenario,
            rng: SmallRng::seed_from_u64(seed ^ 0x0077_6f72_6c64),
            network: Network::new(seed, trace.clone()),
            trace,
            nodes,
            engines: Arc::new(Mutex::new(BTreeMap::new())),
            wiped: None,
            retired: BTreeSet::new(),
            outcome: Outcome::default(),
        }
    }

    pub async fn run(mut self) -> Outcome {
        let _trace = SaveTrace(self.trace.clone());
        self.start_all().await;
        let way = Way { sessions: !self.scenario.no_sessions, anywhere: self.scenario.anywhere };
        self.network.renumber_copies(self.scenario.done_twice);
        let workload = Workload::start(self.seed, self.engines.clone(), self.trace.clone(), way);
        let lifetimes = self.scenario.clocks.then(|| Lifetimes::start(self.seed, &self.engines));
        self.suffer().await;
        self.heal().await;
        self.settle_members().await;
        self.expect_progress(&workload).await;
        let history = workload.stop().await;
        if let Some(lifetimes) = lifetimes {
            // The time that was lost with all nodes comes on top.
            (self.outcome.ended, self.outcome.kept) =
                lifetimes.finish(&self.engines, SAFETY + LIVENESS).await;
        }
        self.expect_agreement().await;
        self.scan(&history).await;
        self.finish(&history)
    }

    fn ids(&self) -> Vec<NodeId> {
        self.nodes.keys().copied().collect()
    }

    async fn start_all(&mut self) {
        for id in self.ids() {
            if self.nodes[&id].group.is_none() {
                self.start(id).await;
            }
        }
    }

    async fn start(&mut self, id: NodeId) {
        self.trace.record(format_args!("start {id}"));
        let group = Arc::new(TaskGroup::default());
        group.shift_wall_clock(self.nodes[&id].wall_shift_ms);
        // Nodes do not agree on how long a lease is, and change their minds when they are restarted.
        let lease_ms = [300, 300, 600, 1200][self.rng.random_range(0..4)];
        let node = self.nodes.get_mut(&id).unwrap();
        let mut config = EngineConfig::new(id, "", address(id));
        config.cluster = "simulation".to_owned();
        config.client_advertise = format!("node-{id}:7801");
        config.initial_members = (1..=self.scenario.nodes).map(|id| (id, address(id))).collect();
        config.join = node.joins;
        config.timing.election_timeout_max_ms = lease_ms;
        node.promised_lease_ms = node.promised_lease_ms.max(lease_ms);
        config.snapshots =
            SnapshotPolicy { every_entries: 40, keep_entries: 10, ..SnapshotPolicy::default() };
        let mut parts = EngineParts::new(
            config,
            Incarnation(node.incarnation),
            node.disk.open_log(&group),
            node.disk.snapshots(),
            Arc::new(SimTransport { network: self.network.clone(), node_id: id }),
        );
        parts.promised_lease_ms = node.promised_lease_ms;
        parts.memory_bytes = Some((500 + id) << 20);
        let engine = group.spawn(Engine::start(parts, KvMachine::default())).await.unwrap();
        let engine = engine.unwrap_or_else(|error| panic!("node {id} does not start: {error}"));
        self.network.open_door(id, engine.peer_door(), group.clone());
        self.engines.lock().unwrap().insert(id, engine);
        node.group = Some(group);
    }

    async fn crash(&mut self, id: NodeId) {
        let node = self.nodes.get_mut(&id).unwrap();
        let Some(group) = node.group.take() else { return };
        self.network.close_door(id);
        let engine = self.engines.lock().unwrap().remove(&id);
        self.note(engine.as_ref());
        group.abort();
        let node = self.nodes.get_mut(&id).unwrap();
        let forgotten = node.disk.crash();
        self.trace.record(format_args!("crash {id}, forgetting {forgotten}"));
        self.outcome.forgotten += forgotten;
        self.outcome.crashes += 1;
        drop(engine);
        // Lets the aborted tasks go.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    async fn stop(&mut self, id: NodeId) {
        let engine = self.engines.lock().unwrap().get(&id).cloned();
        let Some(engine) = engine else { return };
        self.trace.record(format_args!("stop {id}"));
        engine.shutdown().await;
        self.outcome.stops += 1;
        drop(engine);
        self.crash(id).await;
    }

    fn note(&mut self, engine: Option<&Engine<KvMachine>>) {
        if let Some(engine) = engine {
            let state = engine.state();
            let fatal = state.fatal.as_ref().filter(|fatal| !self.may_stop(fatal));
            assert_eq!(fatal, None, "node {} has stopped", state.node_id);
            self.outcome.leader_changes = self.outcome.leader_changes.max(state.term.saturating_sub(1));
        }
    }

    async fn suffer(&mut self) {
        let end = Instant::now() + SAFETY;
        while Instant::now() < end {
            let ids = self.ids();
            let (pause, fault) = faults::next(&mut self.rng, &ids);
            tokio::time::sleep(pause).await;
            if self.scenario.clocks {
                let id = ids[self.rng.random_range(0..ids.len())];
                let shift_ms = [0, 0, 3_600_000, 45_000, -45_000, -3_600_000][self.rng.random_range(0..6)];
                self.shift(id, shift_ms);
            }
            if self.scenario.spare > 0 && self.rng.random_bool(0.5) {
                self.change_members().await;
            }
            if self.scenario.anywhere && self.rng.random_bool(0.4) {
                self.hand_over().await;
            }
            self.trace.record(format_args!("fault {fault:?}"));
            match fault {
                Fault::Crash(id) => self.crash(id).await,
                Fault::Stop(id) => self.stop(id).await,
                Fault::CrashAll => {
                    for id in ids {
                        self.crash(id).await;
                    }
                }
                Fault::StartAll => self.start_all().await,
                Fault::Cut(cuts) => {
                    self.outcome.cuts += cuts.len() as u64;
                    self.network.set_cuts(cuts);
                }
                Fault::Isolate => self.isolate_leader(false).await,
                Fault::IsolateAndRestart => self.isolate_leader(true).await,
                Fault::Join => self.network.set_cuts(BTreeSet::new()),
                Fault::Weather(weather) => self.network.set_weather(weather),
            }
        }
    }

    /// Asks any node to have the lead handed over.
    async fn hand_over(&mut self) {
        let engines: Vec<_> = self.engines.lock().unwrap().values().cloned().collect();
        if engines.is_empty() {
            return;
        }
        let engine = &engines[self.rng.random_range(0..engines.len())];
        let handed = engine.anywhere().within(Duration::from_millis(500)).transfer_leader(None).await;
        self.trace.record(format_args!("hand-over by {}: {}", engine.state().node_id, handed.is_ok()));
        self.outcome.hand_overs += u64::from(handed.is_ok());
    }

    async fn isolate_leader(&mut self, restart_others: bool) {
        let Some(leader) = self.leading().map(|engine| engine.state().node_id) else { return };
        let others: Vec<NodeId> = self.ids().into_iter().filter(|id| *id != leader).collect();
        let cuts: BTreeSet<_> = others.iter().flat_map(|id| [(leader, *id), (*id, leader)]).collect();
        self.outcome.cuts += cuts.len() as u64;
        self.network.set_cuts(cuts);
        if restart_others {
            for id in others {
                self.crash(id).await;
                self.start(id).await;
            }
        }
    }

    async fn heal(&mut self) {
        self.trace.record(format_args!("heal"));
        self.network.set_cuts(BTreeSet::new());
        self.network.set_weather(Weather::FAIR);
        self.start_all().await;
    }

    /// A healed cluster must acknowledge new writes.
    async fn expect_progress(&self, workload: &Workload) {
        let before = workload.acknowledged();
        let deadline = Instant::now() + LIVENESS;
        while workload.acknowledged() < before + 10 {
            assert!(Instant::now() < deadline, "healed, but no progress: {:?}", self.states());
            tokio::time::sleep(POLL).await;
        }
    }

    fn states(&self) -> Vec<String> {
        let engines = self.engines.lock().unwrap();
        engines.values().map(|engine| format!("{:?}", engine.state())).collect()
    }

    /// All nodes must reach the same position with the same state.
    async fn expect_agreement(&self) {
        let deadline = Instant::now() + LIVENESS;
        loop {
            let engines: Vec<_> = self.engines.lock().unwrap().values().cloned().collect();
            let mut seen = BTreeSet::new();
            let mut committed = BTreeSet::new();
            for engine in engines {
                let report = engine.report();
                seen.insert((report.offsets.applied, report.state_hash));
                committed.insert(report.offsets.committed);
            }
            let positions: BTreeSet<_> = seen.iter().map(|(applied, _)| *applied).collect();
            assert!(positions.len() == seen.len(), "two states at one position: {seen:?}");
            if seen.len() == 1 && committed == positions {
                return;
            }
            assert!(Instant::now() < deadline, "healed, but no agreement: {:?}", self.states());
            tokio::time::sleep(POLL).await;
        }
    }

    /// Every acknowledged write must be there, on every node, and every counted one exactly once.
    async fn scan(&self, history: &History) {
        let engines: Vec<_> = self.engines.lock().unwrap().clone().into_iter().collect();
        for (id, engine) in engines {
            let query = KvQuery::Get {
                tenant: "t".to_owned(),
                collection: "c".to_owned(),
                key: Bytes::from(COUNTER),
            };
            let read = engine.read(query, ReadLevel::Local).await.unwrap();
            let KvAnswer::Item(counter) = read.answer else { panic!("{:?}", read.answer) };
            let (applied, asked) = (counter.map_or(0, |item| item.version), history.counted.len() as u64);
            assert_eq!(applied, asked, "node {id} has applied {applied} increments of {asked}");
            for (key, value) in &history.acknowledged {
                let query = KvQuery::Get {
                    tenant: "t".to_owned(),
                    collection: "c".to_owned(),
                    key: Bytes::from(key.clone()),
                };
                let read = engine.read(query, ReadLevel::Local).await.unwrap();
                let KvAnswer::Item(Some(item)) = read.answer else {
                    panic!("node {id} has lost {key}={value}, which was acknowledged");
                };
                let found: u64 = std::str::from_utf8(&item.value).unwrap().parse().unwrap();
                assert!(found >= *value, "node {id} has {key}={found}, but {value} was acknowledged");
                let is_once = key.starts_with("once-");
                assert!(!is_once || item.version == 1, "node {id} has applied {key} {} times", item.version);
            }
            for key in &history.refused {
                let query = KvQuery::Get {
                    tenant: "t".to_owned(),
                    collection: "c".to_owned(),
                    key: Bytes::from(key.clone()),
                };
                let read = engine.read(query, ReadLevel::Local).await.unwrap();
                let is_absent = matches!(read.answer, KvAnswer::Item(None));
                assert!(is_absent, "node {id} has {key}, which certainly was not applied");
            }
        }
        assert!(history.violations.is_empty(), "{}", history.violations.join("\n"));
    }

    fn finish(mut self, history: &History) -> Outcome {
        let engines: Vec<_> = self.engines.lock().unwrap().values().cloned().collect();
        for engine in &engines {
            self.note(Some(engine));
        }
        for node in self.nodes.values() {
            let (built, installed) = node.disk.snapshot_counts();
            self.outcome.snapshots_built += built;
            self.outcome.snapshots_installed += installed;
        }
        (self.outcome.lost, self.outcome.duplicated) = self.network.counts();
        self.outcome.acknowledged = history.acknowledgements;
        self.outcome.unknown = history.unknown;
        self.outcome.reads = history.reads;
        self.outcome.counted = history.counted.len() as u64;
        self.outcome.repeated = history.repeated;
        self.outcome.follower_reads = history.follower_reads;
        self.outcome.lease_reads = history.lease_reads;
        self.outcome.bounded_reads = history.bounded_reads;
        self.outcome.passed_on = history.passed_on;
        self.outcome.refused = history.refused.len() as u64;
        self.outcome.trace_hash = self.trace.hash();
        self.outcome
    }
}
