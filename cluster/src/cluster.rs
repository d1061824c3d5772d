//! All nodes of one local cluster.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::ClusterError;
use crate::node::Node;
use crate::record::Record;
use crate::spec::ClusterSpec;

/// Nodes in their processes. Dropping it kills and reaps them all.
#[derive(Debug)]
pub struct Cluster {
    spec: Arc<ClusterSpec>,
    nodes: Vec<Node>,
}

impl Cluster {
    /// Takes possession of the data directory without starting a node.
    ///
    /// # Errors
    /// A spec that cannot be run; a directory that is in use, or was made for another cluster.
    pub fn prepare(mut spec: ClusterSpec) -> Result<Self, ClusterError> {
        spec.validate()?;
        fs::create_dir_all(&spec.data_dir).map_err(ClusterError::io("cannot create", &spec.data_dir))?;
        // Absolute, so that printed paths and commands hold from any directory.
        spec.data_dir =
            fs::canonicalize(&spec.data_dir).map_err(ClusterError::io("cannot resolve", &spec.data_dir))?;
        let record = Arc::new(Record::open(&spec)?);
        let spec = Arc::new(spec);
        let nodes = spec.node_ids().map(|node_id| Node::new(node_id, spec.clone(), record.clone())).collect();
        Ok(Self { spec, nodes })
    }

    /// Starts all nodes. Returns at once; see [`Cluster::wait_ready`]. If one cannot be started, none is
    /// left running.
    ///
    /// # Errors
    /// As [`Cluster::prepare`]; [`ClusterError::PortInUse`].
    pub fn start(spec: ClusterSpec) -> Result<Self, ClusterError> {
        let cluster = Self::prepare(spec)?;
        cluster.start_all()?;
        Ok(cluster)
    }

    /// Starts all nodes that do not run.
    ///
    /// # Errors
    /// [`ClusterError::PortInUse`] before anything is started; [`ClusterError::Io`].
    pub fn start_all(&self) -> Result<(), ClusterError> {
        let down: Vec<_> = self.nodes.iter().filter(|node| node.pid().is_none()).collect();
        for node in &down {
            check_free(&node.client_address())?;
            check_free(&node.peer_address())?;
            self.spec.frames_address(node.node_id()).as_deref().map_or(Ok(()), check_free)?;
        }
        for node in down {
            node.start()?;
        }
        Ok(())
    }

    /// What runs here.
    pub fn spec(&self) -> &ClusterSpec {
        &self.spec
    }

    /// The directory of everything, absolute.
    pub fn data_dir(&self) -> &Path {
        &self.spec.data_dir
    }

    /// The nodes in the order of their ids.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node with `node_id`.
    ///
    /// # Panics
    /// Panics when the cluster has no such node.
    pub fn node(&self, node_id: u64) -> &Node {
        let found = self.nodes.iter().find(|node| node.node_id() == node_id);
        found.unwrap_or_else(|| panic!("the cluster has nodes 1 to {}, no {node_id}", self.nodes.len()))
    }

    /// The client addresses of all nodes.
    pub fn endpoints(&self) -> Vec<String> {
        self.spec.endpoints()
    }

    /// Waits until every node that runs is ready.
    ///
    /// # Errors
    /// As [`Node::wait_ready`], for the first node that fails it.
    pub fn wait_ready(&self, deadline: Duration) -> Result<(), ClusterError> {
        let end = Instant::now() + deadline;
        for node in self.nodes.iter().filter(|node| node.exit().is_none()) {
            node.wait_ready(end.saturating_duration_since(Instant::now()))?;
        }
        Ok(())
    }

    /// Stops the nodes in order, one after the other, those of `last` at the end. With the leader last no
    /// node takes over a cluster that is about to go. A node that takes longer than `deadline` is killed.
    ///
    /// # Errors
    /// The first node's that would not stop, after all have ended.
    pub fn stop(&self, last: &[u64], deadline: Duration) -> Result<(), ClusterError> {
        let (late, early): (Vec<_>, Vec<_>) =
            self.nodes.iter().partition(|node| last.contains(&node.node_id()));
        let mut outcome = Ok(());
        for node in early.into_iter().chain(late) {
            match node.stop(deadline) {
                Ok(_) | Err(ClusterError::NotRunning { .. }) => {}
                Err(error) => {
                    // It runs until killed; that it has ended by now is the only way to fail.
                    let _ = node.kill();
                    outcome = outcome.and(Err(error));
                }
            }
        }
        outcome
    }

    /// Kills all nodes that run, as close together as possible.
    ///
    /// # Errors
    /// [`ClusterError::Signal`].
    pub fn kill_all(&self) -> Result<(), ClusterError> {
        for node in &self.nodes {
            match node.kill() {
                Ok(_) | Err(ClusterError::NotRunning { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A node that cannot listen says so in its log; here it can be said before anything has started.
fn check_free(address: &str) -> Result<(), ClusterError> {
    TcpListener::bind(address).map(drop).map_err(|source| ClusterError::PortInUse {
        address: address.to_owned(),
        port: address.rsplit(':').next().and_then(|port| port.parse().ok()).unwrap_or_default(),
        source,
    })
}
