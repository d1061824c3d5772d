//! What an engine needs to know before it starts.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::OpenError;
use crate::types::NodeId;

/// Settings of one node. [`EngineConfig::new`] gives defaults for everything but identity.
#[derive(Debug)]
#[non_exhaustive]
pub struct EngineConfig {
    /// Name of the cluster; nodes of differently named clusters refuse each other.
    pub cluster: String,
    /// This node's id, from 1.
    pub node_id: NodeId,
    /// Where it keeps log, vote, snapshots and identity.
    pub data_dir: PathBuf,
    /// `host:port` to listen on for peers.
    pub peer_listen: String,
    /// A socket that already listens for peers; takes the place of `peer_listen`.
    pub peer_listener: Option<TcpListener>,
    /// `host:port` under which peers reach this node.
    pub peer_advertise: String,
    /// `host:port` under which clients reach this node; told to clients that ask another node.
    pub client_advertise: String,
    /// All founding members with their peer addresses, this node included. Used once, to form the cluster. A node
    /// that already belongs to one dials members also here, where the membership's addresses fail. Empty only with
    /// [`join`](Self::join), or for a node that belongs to a cluster.
    pub initial_members: BTreeMap<NodeId, String>,
    /// The node forms no cluster but waits until it is added to one; see
    /// [`Engine::add_member`](super::Engine::add_member). No effect on a node that already belongs to one.
    pub join: bool,
    /// The node prefers to lead: once it has caught up, a leader that does not prefer it itself hands over to it.
    pub preferred_leader: bool,
    /// Heartbeats and elections.
    pub timing: Timing,
    /// When snapshots are taken and the log is cut.
    pub snapshots: SnapshotPolicy,
    /// Bounds on memory and messages.
    pub limits: Limits,
    /// What is asked of the disk.
    pub disk: DiskPolicy,
    /// What is made of peers that are slow or silent.
    pub peers: PeerPolicy,
    /// Memory that this node may use, in bytes: its buffers fit into it, and the cluster's quota on the state is what the
    /// member with the least of it can bear. `None` for all that the machine, the control groups and the resource limits of
    /// the process allow. Nodes that share a machine are to be given their shares.
    pub memory_bytes: Option<u64>,
}

impl EngineConfig {
    /// Settings for node `node_id` in `data_dir`, reached by its peers at `peer`: a cluster of its own, unless more
    /// [`initial_members`](Self::initial_members) are added.
    pub fn new(node_id: NodeId, data_dir: impl Into<PathBuf>, peer: impl Into<String>) -> Self {
        let peer = peer.into();
        Self {
            cluster: "quorate".to_owned(),
            node_id,
            data_dir: data_dir.into(),
            peer_listen: peer.clone(),
            peer_listener: None,
            peer_advertise: peer.clone(),
            client_advertise: String::new(),
            initial_members: BTreeMap::from([(node_id, peer)]),
            join: false,
            preferred_leader: false,
            timing: Timing::default(),
            snapshots: SnapshotPolicy::default(),
            limits: Limits::default(),
            disk: DiskPolicy::default(),
            peers: PeerPolicy::default(),
            memory_bytes: None,
        }
    }
}

impl EngineConfig {
    /// Refuses settings that cannot work.
    ///
    /// # Errors
    /// [`OpenError::Config`], saying which setting and why.
    pub fn validate(&self) -> Result<(), OpenError> {
        let refuse = |reason: String| Err(OpenError::Config(reason));
        let Timing {
            heartbeat_interval_ms: heartbeat,
            election_timeout_min_ms: min,
            election_timeout_max_ms: max,
        } = self.timing;
        if self.node_id == 0 {
            return refuse("node id 0 is reserved; number the nodes from 1".to_owned());
        }
        if self.cluster.is_empty() || self.cluster.len() > MAX_CLUSTER_NAME_BYTES {
            return refuse(format!("the cluster's name must have 1 to {MAX_CLUSTER_NAME_BYTES} bytes"));
        }
        let founds = !self.join && !self.initial_members.is_empty();
        if founds && !self.initial_members.contains_key(&self.node_id) {
            return refuse(format!("node {} is not among the founding members it was given", self.node_id));
        }
        if heartbeat == 0 || heartbeat.saturating_mul(2) > min || min >= max {
            return refuse(format!(
                "timing must satisfy 0 < 2 x heartbeat_interval_ms <= election_timeout_min_ms < election_timeout_max_ms, got {heartbeat}, {min}, {max}"
            ));
        }
        self.snapshots.validate().map_err(OpenError::Config)?;
        self.peers.validate().map_err(OpenError::Config)?;
        if self.memory_bytes.is_some_and(|bytes| bytes < MIN_MEMORY_BYTES) {
            return refuse(format!(
                "memory_bytes must be at least {MIN_MEMORY_BYTES}: a node without any state takes as much"
            ));
        }
        let limits = &self.limits;
        if limits.max_command_bytes == 0 || limits.max_inflight_bytes < limits.max_command_bytes {
            return refuse(
                "max_inflight_bytes must be at least max_command_bytes, and that at least 1".to_owned(),
            );
        }
        let reserve = self.disk.reserve_bytes;
        let needed = DiskPolicy::needed_bytes(limits);
        if reserve != 0 && reserve < needed {
            return refuse(format!(
                "disk_reserve_bytes ({reserve}) must be 0, for none, or at least {needed}: 32 MiB and five quarters of max_inflight_bytes"
            ));
        }
        if limits.max_command_bytes > MAX_COMMAND_BYTES || limits.append_message_bytes > MAX_COMMAND_BYTES {
            return refuse(format!(
                "max_command_bytes and append_message_bytes must be at most {MAX_COMMAND_BYTES}: messages between nodes are limited to twice that"
            ));
        }
        Ok(())
    }
}

/// What to say to a node that belongs to no cluster and was not told how to get one.
pub(super) const NO_CLUSTER: &str = "this node belongs to no cluster yet, and was not told which. There are three ways: --peers 1=HOST:PORT,2=HOST:PORT,… forms a cluster with the nodes it names; --join waits until `quorate member add` takes the node into one that exists; --single forms a cluster of this node alone";

/// Largest command, and batch of entries, that a message between nodes has room for.
const MAX_COMMAND_BYTES: usize = 32 * 1024 * 1024 - 1024 * 1024;
/// The least memory, in bytes, that a node can be told to live with.
pub const MIN_MEMORY_BYTES: u64 = 192 * 1024 * 1024;
/// Longest name of a cluster.
const MAX_CLUSTER_NAME_BYTES: usize = 128;

/// Heartbeat and election timing, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timing {
    /// Interval between a leader's heartbeats.
    pub heartbeat_interval_ms: u64,
    /// Shortest randomised election timeout.
    pub election_timeout_min_ms: u64,
    /// Longest randomised election timeout; also the length of the leader's lease.
    pub election_timeout_max_ms: u64,
}

impl Timing {
    /// How long a leader may take to show up, or to confirm that it leads, before its caller is told.
    pub fn patience(&self) -> Duration {
        Duration::from_millis(self.election_timeout_max_ms.saturating_mul(2))
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self { heartbeat_interval_ms: 50, election_timeout_min_ms: 150, election_timeout_max_ms: 300 }
    }
}

/// When a snapshot is taken, and how much of the log is kept behind it.
///
/// The log never holds much more than `every` plus `keep`, in entries and in bytes: that, the state itself
/// and one snapshot of it bound the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotPolicy {
    /// Take a snapshot after this many entries since the last one.
    pub every_entries: u64,
    /// Take a snapshot after this many bytes of commands since the last one.
    pub every_bytes: u64,
    /// Entries kept in the log although a snapshot covers them, for followers that are a little behind.
    pub keep_entries: u64,
    /// Bytes of commands kept in the log although a snapshot covers them.
    pub keep_bytes: u64,
}

impl SnapshotPolicy {
    /// Refuses what cannot work.
    ///
    /// # Errors
    /// Which setting, and why.
    pub(super) fn validate(&self) -> Result<(), String> {
        match self.every_entries == 0 || self.every_bytes == 0 {
            true => Err("snapshots must be taken every 1 or more entries and bytes".to_owned()),
            false => Ok(()),
        }
    }
}

impl Default for SnapshotPolicy {
    fn default() -> Self {
        Self {
            every_entries: 500_000,
            every_bytes: 256 * 1024 * 1024,
            keep_entries: 100_000,
            keep_bytes: 64 * 1024 * 1024,
        }
    }
}

/// Bounds on memory and messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Largest encoded command.
    pub max_command_bytes: usize,
    /// Most bytes of proposed commands that are not yet applied; more are refused as overloaded.
    pub max_inflight_bytes: usize,
    /// Entries kept in memory for replication and apply.
    pub log_tail_bytes: usize,
    /// Most bytes of entries in one message to a peer.
    pub append_message_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_command_bytes: 1536 * 1024,
            max_inflight_bytes: 64 * 1024 * 1024,
            log_tail_bytes: 16 * 1024 * 1024,
            append_message_bytes: 1024 * 1024,
        }
    }
}

/// What is made of peers that are slow or silent, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerPolicy {
    /// A peer whose first missing entry is older than this, or that has been silent for longer, lags.
    pub lagging_after_ms: u64,
    /// A peer that has been silent for longer is disconnected.
    pub disconnected_after_ms: u64,
    /// The longest pause between two attempts to connect to a peer.
    pub reconnect_interval_ms: u64,
}

impl PeerPolicy {
    /// Refuses what cannot work.
    fn validate(&self) -> Result<(), String> {
        /// A peer that has come back is not to wait for longer.
        const MAX_RECONNECT_INTERVAL_MS: u64 = 60_000;
        let Self { lagging_after_ms: lagging, disconnected_after_ms: disconnected, .. } = *self;
        if lagging == 0 || disconnected <= lagging {
            return Err(format!(
                "peers must satisfy 0 < lagging_after_ms < disconnected_after_ms, got {lagging}, {disconnected}"
            ));
        }
        match self.reconnect_interval_ms {
            1..=MAX_RECONNECT_INTERVAL_MS => Ok(()),
            other => {
                Err(format!("reconnect_interval_ms ({other}) must be from 1 to {MAX_RECONNECT_INTERVAL_MS}"))
            }
        }
    }
}

impl Default for PeerPolicy {
    fn default() -> Self {
        Self { lagging_after_ms: 1_000, disconnected_after_ms: 60_000, reconnect_interval_ms: 200 }
    }
}

/// What is asked of the disk before writes are taken on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPolicy {
    /// Size of the reserve that the data directory holds for writes under way when the disk turns out to be full;
    /// writes are refused once less than a quarter of it is left beside it, and taken again once half of it is. 0
    /// for no reserve and no such check: a full disk then stops the node.
    pub reserve_bytes: u64,
    /// A write of the log that takes longer has stalled: a leader hands over and refuses writes meanwhile. 0 for
    /// no such check.
    pub stall_ms: u64,
}

impl DiskPolicy {
    /// The smallest reserve for these limits: what may be in flight with what the log adds to it, a segment of the
    /// log, and room for votes.
    fn needed_bytes(limits: &Limits) -> u64 {
        const BESIDE_BYTES: u64 = 32 * 1024 * 1024;
        let inflight = limits.max_inflight_bytes as u64;
        inflight.saturating_add(inflight / 4).saturating_add(BESIDE_BYTES)
    }
}

impl Default for DiskPolicy {
    fn default() -> Self {
        Self { reserve_bytes: 128 * 1024 * 1024, stall_ms: 1000 }
    }
}
