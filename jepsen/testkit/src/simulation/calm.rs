//! A cluster to which nothing happens but what a test does: one thing at a time.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use quorate::store::{MemoryDisk, MemorySnapshots, MemoryStore, SyncMode};
use quorate::testkit::runtime::TaskGroup;
use quorate::{Engine, EngineConfig, EngineParts, Incarnation, NodeId, OpenError, Role, StateMachine};
use tokio::time::{Instant, timeout_at};

use super::ports::Ports;
use super::{Network, SimTransport, Trace, address};

/// The nodes that found a calm cluster.
const FOUNDERS: u64 = 3;
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);

/// What nodes run on: a network, and for each a disk that syncs at once and outlives its node.
pub struct Hosts {
    /// Between the nodes.
    pub network: Arc<Network>,
    disks: BTreeMap<NodeId, (MemoryDisk, Arc<MemorySnapshots>)>,
}

/// Nodes of one build on [`Hosts`].
pub struct Calm<M: StateMachine> {
    /// What they run on.
    pub hosts: Hosts,
    nodes: BTreeMap<NodeId, (Engine<M>, Arc<TaskGroup>)>,
}

impl fmt::Debug for Hosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hosts").field("disks", &self.disks.keys()).finish_non_exhaustive()
    }
}

impl<M: StateMachine> fmt::Debug for Calm<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.engines().map(Engine::state)).finish()
    }
}

impl Hosts {
    /// With a network drawn from `seed`, and no disk yet.
    pub fn new(seed: u64) -> Self {
        Self { network: Network::new(seed, Arc::new(Trace::new(false))), disks: BTreeMap::new() }
    }

    /// What a node is made of: one of the three that found the cluster, or one that joins it.
    pub fn parts(&mut self, node_id: NodeId) -> EngineParts {
        let mut config = EngineConfig::new(node_id, "", address(node_id));
        config.client_advertise = Ports::address(node_id).to_string();
        config.join = node_id > FOUNDERS;
        if !config.join {
            config.initial_members = (1..=FOUNDERS).map(|id| (id, address(id))).collect();
        }
        let new = || (MemoryDisk::new(SyncMode::Immediate), Arc::new(MemorySnapshots::new()));
        let (log, snapshots) = self.disks.entry(node_id).or_insert_with(new);
        let mut parts = EngineParts::new(
            config,
            Incarnation(u128::from(node_id)),
            Arc::new(MemoryStore::open(log)),
            snapshots.clone(),
            Arc::new(SimTransport { network: self.network.clone(), node_id }),
        );
        parts.memory_bytes = Some(1 << 30);
        parts
    }

    /// Starts a node, which others reach from now on. What it does ends with the group.
    ///
    /// # Errors
    /// When the engine does not start.
    pub async fn start<M: StateMachine>(
        &self,
        node_id: NodeId,
        parts: EngineParts,
        machine: M,
    ) -> Result<(Engine<M>, Arc<TaskGroup>), OpenError> {
        let group = Arc::new(TaskGroup::default());
        let engine = group.spawn(Engine::start(parts, machine)).await.unwrap()?;
        self.network.open_door(node_id, engine.peer_door(), group.clone());
        Ok((engine, group))
    }

    /// Ends a node as a crash does, with what is left of its handle.
    pub async fn kill<H>(&self, node_id: NodeId, handle: H, group: Arc<TaskGroup>) {
        self.network.close_door(node_id);
        group.abort();
        drop(handle);
        // Lets the aborted tasks go.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

impl<M: StateMachine> Calm<M> {
    /// A cluster none of whose nodes was started yet.
    pub fn new(seed: u64) -> Self {
        Self { hosts: Hosts::new(seed), nodes: BTreeMap::new() }
    }

    /// Three nodes that are ready, each with the machine that it is given.
    pub async fn start(seed: u64, machine: impl Fn(NodeId) -> M) -> Self {
        Self::start_as(seed, machine, |_| {}).await
    }

    /// The same, with settings of their own.
    pub async fn start_as(seed: u64, machine: impl Fn(NodeId) -> M, set: impl Fn(&mut EngineConfig)) -> Self {
        let mut calm = Self::new(seed);
        for node_id in 1..=FOUNDERS {
            calm.start_node(node_id, machine(node_id), &set).await.unwrap();
        }
        for engine in calm.engines() {
            assert!(engine.ready(PATIENCE).await, "it does not become ready: {calm:#?}");
        }
        calm
    }

    /// Starts one node on what is on its disk.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start_node(
        &mut self,
        node_id: NodeId,
        machine: M,
        set: impl FnOnce(&mut EngineConfig),
    ) -> Result<(), OpenError> {
        let mut parts = self.hosts.parts(node_id);
        set(&mut parts.config);
        let node = self.hosts.start(node_id, parts, machine).await?;
        self.nodes.insert(node_id, node);
        Ok(())
    }

    /// Ends a node as a crash does, if it runs.
    pub async fn kill(&mut self, node_id: NodeId) {
        if let Some((engine, group)) = self.nodes.remove(&node_id) {
            self.hosts.kill(node_id, engine, group).await;
        }
    }

    /// Takes the last handle of a node, and what its tasks live by.
    pub fn take(&mut self, node_id: NodeId) -> (Engine<M>, Arc<TaskGroup>) {
        self.nodes.remove(&node_id).expect("it runs")
    }

    /// The node of this id, which runs.
    pub fn engine(&self, node_id: NodeId) -> &Engine<M> {
        &self.nodes[&node_id].0
    }

    /// All that run, by their ids.
    pub fn engines(&self) -> impl Iterator<Item = &Engine<M>> + Clone {
        self.nodes.values().map(|(engine, _)| engine)
    }

    /// The ids of all that run.
    pub fn ids(&self) -> Vec<NodeId> {
        self.nodes.keys().copied().collect()
    }

    /// Whoever leads the highest term, as it says itself.
    pub fn leading(&self) -> Option<&Engine<M>> {
        let leading = self.engines().filter(|engine| engine.state().role == Role::Leader);
        leading.max_by_key(|engine| engine.state().term)
    }

    /// Waits for a leader that is in touch with a majority.
    pub async fn leader(&self) -> Engine<M> {
        self.until("one leads", |calm| calm.leading().is_some_and(|engine| engine.state().in_touch)).await;
        self.leading().unwrap().clone()
    }

    /// Waits for a node that follows that leader.
    pub async fn follower(&self) -> Engine<M> {
        let leader = self.leader().await.state().node_id;
        let follows = |engine: &&Engine<M>| {
            let state = engine.state();
            state.leader.is_some_and(|known| known.node_id == leader) && state.node_id != leader
        };
        self.until("one follows", |calm| calm.engines().any(|engine| follows(&engine))).await;
        self.engines().find(follows).unwrap().clone()
    }

    /// Waits until `condition` holds.
    ///
    /// # Panics
    /// When it does not within a minute.
    pub async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "in vain waited until {what}: {self:#?}");
            tokio::time::sleep(POLL).await;
        }
    }

    /// Writes through whoever leads, again and again until it is taken: it may be applied more than once.
    pub async fn write(&self, command: impl Fn() -> M::Command) -> M::Reply {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(leader) = self.leading()
                && let Ok(Ok(written)) = timeout_at(deadline, leader.write(command())).await
            {
                return written.reply;
            }
            assert!(Instant::now() < deadline, "no write is taken: {self:#?}");
            tokio::time::sleep(POLL).await;
        }
    }
}
