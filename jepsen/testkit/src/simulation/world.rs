//! One simulated cluster, from its formation to the scan after the last fault.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quorate::server::{DoorLimits, Server};
use quorate::testkit::runtime::TaskGroup;
use quorate::{Engine, EngineConfig, EngineParts, SnapshotPolicy};
use quorate::{Incarnation, NodeId};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::disk::Disk;
use super::faults::{self, Fault};
use super::network::{Network, SimTransport, Weather, address};
use super::outcome::Outcome;
use super::ports::Ports;
use super::subject::{Cluster, Engines, MachineOf, Subject, Workload};
use super::trace::Trace;

/// How long faults go on.
pub const SAFETY: Duration = Duration::from_secs(12);
/// How long a healed cluster may take to answer, and then to agree.
pub const LIVENESS: Duration = Duration::from_secs(20);
/// Connections that a client port takes.
const CONNECTIONS: usize = 1_000;
/// Pause between two looks at a condition.
pub const POLL: Duration = Duration::from_millis(10);

/// What a cluster is like, and what happens to it.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Nodes that found the cluster.
    pub nodes: u64,
    /// Nodes that do not found the cluster: with any of these, members come and go.
    pub spare: u64,
    /// Wall clocks jump.
    pub clocks: bool,
    /// The lead is handed over now and then.
    pub hand_overs: bool,
    /// Nodes serve clients, whose connections stand still and break at times.
    pub ports: bool,
    /// Acknowledge writes before they are synced: a bug that must be noticed.
    pub lying_disk: bool,
    /// Calls that are passed on are done again when they arrive twice: a bug of a leader that must be noticed.
    pub done_twice: bool,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            nodes: 3,
            spare: 0,
            clocks: false,
            hand_overs: false,
            ports: false,
            lying_disk: false,
            done_twice: false,
        }
    }
}

/// Saves the trace even when the run fails.
struct SaveTrace {
    seed: u64,
    trace: Arc<Trace>,
}

impl Drop for SaveTrace {
    fn drop(&mut self) {
        if let (Ok(path), Some(text)) = (std::env::var("QUORATE_SIM_TRACE"), self.trace.text()) {
            let _ = std::fs::write(format!("{path}.{}", self.seed), text);
        }
    }
}

pub(super) struct Node {
    pub(super) disk: Disk,
    pub(super) incarnation: u128,
    /// Started to be added.
    pub(super) joins: bool,
    /// The longest lease it has promised in any of its lives.
    promised_lease_ms: u64,
    /// How far its wall clock is ahead.
    wall_shift_ms: i64,
    group: Option<Arc<TaskGroup>>,
    port: Option<Port>,
}

/// The client port of a node that runs.
struct Port {
    stop: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

/// A simulated cluster. [`run`](Self::run) does all that a seed does; a test that is to see one thing at a time calls the parts.
pub struct World<S: Subject> {
    pub(super) seed: u64,
    pub(super) scenario: Scenario,
    subject: S,
    pub(super) rng: SmallRng,
    pub(super) trace: Arc<Trace>,
    network: Arc<Network>,
    ports: Arc<Ports>,
    pub(super) nodes: BTreeMap<NodeId, Node>,
    pub(super) engines: Engines<MachineOf<S>>,
    /// A member whose disk was lost, until the cluster has taken it back.
    pub(super) wiped: Option<NodeId>,
    /// Nodes that were removed for certain.
    pub(super) retired: BTreeSet<NodeId>,
    pub(super) outcome: Outcome,
}

impl<S: Subject> fmt::Debug for World<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World")
            .field("seed", &self.seed)
            .field("scenario", &self.scenario)
            .finish_non_exhaustive()
    }
}

impl<S: Subject> World<S> {
    /// A cluster none of whose nodes was started yet. To be called [in a world](super::in_world).
    pub fn new(seed: u64, scenario: Scenario, subject: S) -> Self {
        let keep_text = std::env::var_os("QUORATE_SIM_TRACE").is_some();
        let trace = Arc::new(Trace::new(keep_text));
        let node = |id| Node {
            promised_lease_ms: 0,
            wall_shift_ms: 0,
            disk: Disk::new(seed ^ id, scenario.lying_disk),
            incarnation: u128::from(id),
            joins: id > scenario.nodes,
            group: None,
            port: None,
        };
        let nodes = (1..=scenario.nodes + scenario.spare).map(|id| (id, node(id))).collect();
        Self {
            seed,
            scenario,
            subject,
            rng: SmallRng::seed_from_u64(seed ^ 0x0077_6f72_6c64),
            network: Network::new(seed, trace.clone()),
            ports: Ports::new(seed, trace.clone()),
            trace,
            nodes,
            engines: Arc::new(Mutex::new(BTreeMap::new())),
            wiped: None,
            retired: BTreeSet::new(),
            outcome: Outcome::default(),
        }
    }

    /// Suffers, heals, and is held against what its callers were promised.
    pub async fn run(mut self) -> Outcome {
        let _trace = SaveTrace { seed: self.seed, trace: self.trace.clone() };
        self.start_all().await;
        self.network.renumber_copies(self.scenario.done_twice);
        let mut workload = self.subject.start(&self.cluster());
        self.suffer().await;
        self.heal().await;
        self.settle_members().await;
        self.expect_progress(&workload).await;
        workload.stop().await;
        self.expect_agreement().await;
        let engines = self.engines.lock().unwrap().clone();
        for (node_id, engine) in engines {
            workload.scan(node_id, &engine).await;
        }
        workload.count(&mut self.outcome);
        self.finish()
    }

    fn cluster(&self) -> Cluster<MachineOf<S>> {
        Cluster {
            seed: self.seed,
            engines: self.engines.clone(),
            trace: self.trace.clone(),
            ports: self.ports.clone(),
            nodes: (1..=self.scenario.nodes).collect(),
        }
    }

    /// The nodes that run.
    pub fn engines(&self) -> &Engines<MachineOf<S>> {
        &self.engines
    }

    /// All nodes, whether they run or not.
    pub fn ids(&self) -> Vec<NodeId> {
        self.nodes.keys().copied().collect()
    }

    /// Starts every node that does not run.
    pub async fn start_all(&mut self) {
        for id in self.ids() {
            if self.nodes[&id].group.is_none() {
                self.start(id).await;
            }
        }
    }

    /// Starts a node on what is left on its disk.
    pub async fn start(&mut self, id: NodeId) {
        self.trace.record(format_args!("start {id}"));
        let group = Arc::new(TaskGroup::default());
        group.shift_wall_clock(self.nodes[&id].wall_shift_ms);
        // Nodes do not agree on how long a lease is, and change their minds when they are restarted.
        let lease_ms = [300, 300, 600, 1200][self.rng.random_range(0..4)];
        let node = self.nodes.get_mut(&id).unwrap();
        let mut config = EngineConfig::new(id, "", address(id));
        config.cluster = "simulation".to_owned();
        config.client_advertise = Ports::address(id).to_string();
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
        parts.event_log = node.disk.event_log();
        let machine = self.subject.machine();
        let server = self.scenario.ports.then(|| {
            let server = Server::over(Ports::address(id), self.ports.open(id));
            // Not by how many files this process may open.
            let limits = DoorLimits { connections: Some(CONNECTIONS), ..DoorLimits::default() };
            self.subject.serve(server.with_limits(limits), &machine)
        });
        let engine = group.spawn(Engine::start(parts, machine)).await.unwrap();
        let engine = engine.unwrap_or_else(|error| panic!("node {id} does not start: {error}"));
        self.network.open_door(id, engine.peer_door(), group.clone());
        node.port = server.map(|server| {
            let ((stop, stopped), engine) = (oneshot::channel::<()>(), engine.clone());
            let served = group.spawn(async move {
                let stopped = async {
                    // Dropped with its node.
                    let _ = stopped.await;
                };
                server.serve(engine, stopped).await.unwrap();
            });
            Port { stop, served }
        });
        self.engines.lock().unwrap().insert(id, engine);
        node.group = Some(group);
    }

    /// Ends a node where it stands. Its disk forgets some of what was not synced.
    pub async fn crash(&mut self, id: NodeId) {
        let node = self.nodes.get_mut(&id).unwrap();
        let Some(group) = node.group.take() else { return };
        self.network.close_door(id);
        self.ports.close(id);
        let engine = self.engines.lock().unwrap().remove(&id);
        self.note(engine.as_ref());
        let node = self.nodes.get_mut(&id).unwrap();
        if let Some(port) = node.port.take() {
            assert!(!port.served.is_finished(), "the client port of node {id} has ended before its node");
        }
        group.abort();
        let forgotten = node.disk.crash();
        self.trace.record(format_args!("crash {id}, forgetting {forgotten}"));
        self.outcome.count("writes forgotten by a disk", forgotten);
        self.outcome.count("crashes", 1);
        drop(engine);
        // Lets the aborted tasks go.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    async fn stop(&mut self, id: NodeId) {
        let engine = self.engines.lock().unwrap().get(&id).cloned();
        let Some(engine) = engine else { return };
        self.trace.record(format_args!("stop {id}"));
        if let Some(port) = self.nodes.get_mut(&id).and_then(|node| node.port.take()) {
            // Whether it still waits for that, is none of our business.
            let _ = port.stop.send(());
            port.served.await.unwrap();
        }
        engine.shutdown().await;
        self.outcome.count("orderly stops", 1);
        drop(engine);
        self.crash(id).await;
    }

    fn note(&mut self, engine: Option<&Engine<MachineOf<S>>>) {
        if let Some(engine) = engine {
            let state = engine.state();
            let fatal = state.fatal.as_ref().filter(|fatal| !self.may_stop(fatal));
            assert_eq!(fatal, None, "node {} has stopped", state.node_id);
            self.outcome.reach("leader changes", state.term.saturating_sub(1));
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
            if self.scenario.hand_overs && self.rng.random_bool(0.4) {
                self.hand_over().await;
            }
            if self.scenario.ports && self.rng.random_bool(0.5) {
                self.disturb_ports();
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
                    self.outcome.count("cut links", cuts.len() as u64);
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
        self.outcome.count("hand-overs", u64::from(handed.is_ok()));
    }

    /// Has some ports stand still, or breaks the connections to one.
    fn disturb_ports(&mut self) {
        let ids = self.ids();
        let one = ids[self.rng.random_range(0..ids.len())];
        match self.rng.random_range(0..4) {
            0 => {
                self.trace.record(format_args!("clients of {one} are cut off"));
                self.outcome.count("ports that stood still", 1);
                self.ports.silence([one].into());
            }
            1 => {
                self.trace.record(format_args!("connections to {one} break"));
                self.ports.break_connections(one);
            }
            _ => self.ports.silence(BTreeSet::new()),
        }
    }

    async fn isolate_leader(&mut self, restart_others: bool) {
        let Some(leader) = self.leading().map(|engine| engine.state().node_id) else { return };
        let others: Vec<NodeId> = self.ids().into_iter().filter(|id| *id != leader).collect();
        let cuts: BTreeSet<_> = others.iter().flat_map(|id| [(leader, *id), (*id, leader)]).collect();
        self.outcome.count("cut links", cuts.len() as u64);
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
        self.ports.silence(BTreeSet::new());
        self.start_all().await;
    }

    /// A healed cluster must acknowledge new writes.
    async fn expect_progress(&self, workload: &S::Workload) {
        let before = workload.acknowledged();
        let deadline = Instant::now() + LIVENESS;
        while workload.acknowledged() < before + 10 {
            assert!(Instant::now() < deadline, "healed, but no progress: {:?}", self.states());
            tokio::time::sleep(POLL).await;
        }
    }

    /// What nodes say of themselves, for messages of failures.
    pub fn states(&self) -> Vec<String> {
        let engines = self.engines.lock().unwrap();
        engines.values().map(|engine| format!("{:?}", engine.state())).collect()
    }

    /// All nodes must reach the same position with the same state.
    ///
    /// # Panics
    /// When they do not.
    pub async fn expect_agreement(&self) {
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

    /// Sets the wall clock of a node to be ahead of true time by so many milliseconds.
    pub fn shift(&mut self, id: NodeId, shift_ms: i64) {
        self.trace.record(format_args!("clock {id} {shift_ms}"));
        self.outcome.count("jumps of a wall clock", 1);
        let node = self.nodes.get_mut(&id).unwrap();
        node.wall_shift_ms = shift_ms;
        if let Some(group) = &node.group {
            group.shift_wall_clock(shift_ms);
        }
    }

    fn finish(mut self) -> Outcome {
        let engines: Vec<_> = self.engines.lock().unwrap().values().cloned().collect();
        for engine in &engines {
            self.note(Some(engine));
        }
        for (id, node) in &self.nodes {
            let served = node.port.as_ref().is_none_or(|port| !port.served.is_finished());
            assert!(served, "the client port of node {id} has ended although its node goes on");
            let (built, installed) = node.disk.snapshot_counts();
            self.outcome.count("snapshots built", built);
            self.outcome.count("snapshots installed", installed);
        }
        let (lost, duplicated) = self.network.counts();
        self.outcome.count("lost messages", lost);
        self.outcome.count("duplicated messages", duplicated);
        self.outcome.count("broken connections", self.ports.broken());
        self.outcome.trace_hash = self.trace.hash();
        self.outcome
    }
}
