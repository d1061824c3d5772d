//! What is put into a simulated cluster, and who uses it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use quorate::client::{ClientConfig, Connector};
use quorate::server::{Guest, Server};
use quorate::{Engine, NodeId, StateMachine};

use super::{Outcome, Ports, Shared, Trace};

/// The machine of a subject.
pub type MachineOf<S> = <<S as Subject>::Guest as Guest>::Machine;

/// The nodes that run at present.
pub type Engines<M> = Shared<BTreeMap<NodeId, Engine<M>>>;

/// What is put into a simulated cluster, and who uses it there.
pub trait Subject: Clone + Send + Sync + 'static {
    /// How nodes serve their machine to clients.
    type Guest: Guest;
    /// Who uses it.
    type Workload: Workload<MachineOf<Self>>;

    /// A machine in its initial state.
    fn machine(&self) -> MachineOf<Self>;

    /// What a node serves `machine` with.
    fn serve(&self, server: Server<Self::Guest>, machine: &MachineOf<Self>) -> Server<Self::Guest> {
        let _ = machine;
        server
    }

    /// Starts all callers.
    fn start(&self, cluster: &Cluster<MachineOf<Self>>) -> Self::Workload;
}

/// Callers of a cluster, and what they were promised.
pub trait Workload<M: StateMachine> {
    /// How much was acknowledged so far. Once the cluster is healed it must grow by ten within [`LIVENESS`](super::LIVENESS).
    fn acknowledged(&self) -> u64;

    /// Ends all callers. The cluster is healed.
    fn stop(&mut self) -> impl Future<Output = ()>;

    /// Panics when what a node holds in the end, after all nodes have agreed, is not what callers were promised.
    fn scan(&self, node_id: NodeId, engine: &Engine<M>) -> impl Future<Output = ()>;

    /// Counts what was done.
    fn count(&self, outcome: &mut Outcome);
}

/// A cluster as its callers have it: through its nodes' handles, as a program that embeds them, or as clients.
pub struct Cluster<M: StateMachine> {
    /// What all that callers draw at random is drawn from.
    pub seed: u64,
    /// Nodes that run.
    pub engines: Engines<M>,
    /// What callers note in it is part of what a seed must repeat.
    pub trace: Arc<Trace>,
    pub(super) ports: Arc<Ports>,
    pub(super) nodes: Vec<NodeId>,
}

impl<M: StateMachine> fmt::Debug for Cluster<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("nodes", &self.nodes).finish_non_exhaustive()
    }
}

impl<M: StateMachine> Cluster<M> {
    /// Where clients find the nodes.
    pub fn endpoints(&self) -> Vec<String> {
        self.nodes.iter().map(|node_id| Ports::address(*node_id).to_string()).collect()
    }

    /// Settings of a client whose connections go through the simulated network.
    pub fn client_config(&self) -> ClientConfig {
        let (ports, mut config) = (self.ports.clone(), ClientConfig::default());
        config.connector = Connector::new(move |address| {
            let ports = ports.clone();
            async move { ports.dial(&address).await }
        });
        config
    }
}
