//! What an engine needs to know before it starts; from where to where each number may be set (`ranges`), which of them can be
//! changed while it runs (`settings`), and what they are on a machine of this size (`memory`).

pub(super) mod memory;
pub(crate) mod ranges;
pub(super) mod settings;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::OpenError;
use crate::feed::EventLogLimits;
use crate::storage::{self, StartProgress};
#[cfg(feature = "peers")]
use crate::trust::settings::PeerTrust;
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
    /// The machine that the node is opened with holds a state that its cluster is to be formed with, rather than the one that such
    /// machines begin with; see [`Engine::restore`](super::Engine::restore). The same on all founding members. No effect on a
    /// node that already belongs to a cluster.
    pub restore: bool,
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
    /// How much of what was applied is kept on disk for those who follow it.
    pub event_log: EventLogLimits,
    /// What is made of peers that are slow or silent.
    pub peers: PeerPolicy,
    /// How members prove to each other who they are.
    #[cfg(feature = "peers")]
    pub peer_trust: PeerTrust,
    /// Memory that this node may use, in bytes: its buffers fit into it, and the cluster's quota on the state is what the
    /// member with the least of it can bear. `None` for all that the machine, the control groups and the resource limits of
    /// the process allow; more than that is refused. Nodes that share a machine are to be given their shares.
    pub memory_bytes: Option<u64>,
    /// Is told how far opening the node has come. Keep a clone to look at.
    pub progress: StartProgress,
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
            restore: false,
            preferred_leader: false,
            timing: Timing::default(),
            snapshots: SnapshotPolicy::default(),
            limits: Limits::default(),
            disk: DiskPolicy::default(),
            event_log: EventLogLimits::default(),
            peers: PeerPolicy::default(),
            #[cfg(feature = "peers")]
            peer_trust: PeerTrust::default(),
            memory_bytes: None,
            progress: StartProgress::default(),
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
        for node_id in [&self.node_id].into_iter().chain(self.initial_members.keys()) {
            ranges::check_node_id(*node_id).map_err(OpenError::Config)?;
        }
        if self.cluster.is_empty() || self.cluster.len() > MAX_CLUSTER_NAME_BYTES {
            return refuse(format!("the cluster's name must have 1 to {MAX_CLUSTER_NAME_BYTES} bytes"));
        }
        ranges::check(&self.numbers()).map_err(OpenError::Config)?;
        let founds = !self.join && !self.initial_members.is_empty();
        if founds && !self.initial_members.contains_key(&self.node_id) {
            return refuse(format!("node {} is not among the founding members it was given", self.node_id));
        }
        if self.restore && self.join {
            return refuse(
                "a node that joins receives the state of its cluster: restore is for founding members"
                    .to_owned(),
            );
        }
        if heartbeat == 0 || heartbeat.saturating_mul(2) > min || min >= max {
            return refuse(format!(
                "timing must satisfy 0 < 2 x heartbeat_interval_ms <= election_timeout_min_ms < election_timeout_max_ms, got {heartbeat}, {min}, {max}"
            ));
        }
        self.peers.validate().map_err(OpenError::Config)?;
        #[cfg(feature = "peers")]
        self.peer_trust.validate().map_err(|error| OpenError::Config(error.to_string()))?;
        if self.memory_bytes.is_some_and(|bytes| bytes < MIN_MEMORY_BYTES) {
            return refuse(format!(
                "memory_bytes must be at least {MIN_MEMORY_BYTES}: a node without any state takes as much"
            ));
        }
        // A node that was given the least there is may be on a machine with less than that.
        let available = memory::available_bytes().max(MIN_MEMORY_BYTES);
        if let Some(bytes) = self.memory_bytes.filter(|bytes| *bytes > available) {
            return refuse(format!(
                "memory_bytes ({bytes}) is more than the {available} bytes that this machine has, or that its control group or resource limits allow this process; give at most that, or 0 for all of it"
            ));
        }
        let (limits, usual) = (&self.limits, Limits::default());
        let memory = self.memory_bytes.unwrap_or(available);
        let set = [
            ("max_inflight_bytes", limits.max_inflight_bytes, usual.max_inflight_bytes),
            ("log_tail_bytes", limits.log_tail_bytes, usual.log_tail_bytes),
        ];
        if let Some((name, bytes, _)) =
            set.into_iter().find(|(_, bytes, usual)| bytes != usual && *bytes as u64 > memory)
        {
            return refuse(format!(
                "{name} ({bytes}) is more than the {memory} bytes of memory that this node may use; set less"
            ));
        }
        if limits.max_inflight_bytes < limits.max_command_bytes {
            return refuse("max_inflight_bytes must be at least max_command_bytes".to_owned());
        }
        let needed = DiskPolicy::needed_bytes(limits);
        match self.disk.reserve_bytes {
            Some(reserve) if reserve != 0 && reserve < needed => refuse(format!(
                "disk_reserve_bytes ({reserve}) must be 0, for none, or at least {needed}: 32 MiB and five quarters of max_inflight_bytes"
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// Every number among the settings, by the name it has in a configuration file.
    fn numbers(&self) -> [(&'static str, u64); ranges::RANGES.len()] {
        let Self { timing, snapshots, limits, disk, event_log, peers, .. } = self;
        [
            ("heartbeat_interval_ms", timing.heartbeat_interval_ms),
            ("election_timeout_min_ms", timing.election_timeout_min_ms),
            ("election_timeout_max_ms", timing.election_timeout_max_ms),
            ("snapshot_every_entries", snapshots.every_entries),
            ("snapshot_every_bytes", snapshots.every_bytes),
            ("snapshot_keep_entries", snapshots.keep_entries),
            ("snapshot_keep_bytes", snapshots.keep_bytes),
            ("snapshot_bytes_per_second", snapshots.send_bytes_per_second),
            ("max_command_bytes", limits.max_command_bytes as u64),
            ("max_inflight_bytes", limits.max_inflight_bytes as u64),
            ("log_tail_bytes", limits.log_tail_bytes as u64),
            ("append_message_bytes", limits.append_message_bytes as u64),
            ("disk_reserve_bytes", disk.reserve_bytes.unwrap_or_default()),
            ("fsync_stall_ms", disk.stall_ms),
            ("event_log_operations", event_log.operations),
            ("event_log_bytes", event_log.bytes),
            ("event_log_age_ms", event_log.age_ms),
            ("lagging_after_ms", peers.lagging_after_ms),
            ("disconnected_after_ms", peers.disconnected_after_ms),
            ("reconnect_interval_ms", peers.reconnect_interval_ms),
        ]
    }

    /// Has the event log, the reserve, and with it what may be in flight, fit the file system that the data directory is on, or is going
    /// to be. Settings that were given stay as they are. [`Engine::open`](super::Engine::open) does this by itself.
    ///
    /// # Errors
    /// [`OpenError::Config`] when what was given does not fit, saying what would; [`OpenError::Storage`] when the file
    /// system cannot be asked.
    pub fn fit_disk(&mut self) -> Result<(), OpenError> {
        let size = storage::file_system_bytes(&self.data_dir)?;
        if self.event_log.bytes == EventLogLimits::default().bytes && size > 0 {
            let share = (size / EVENT_LOG_SHARE).max(ranges::MIN_EVENT_LOG_BYTES);
            self.event_log.bytes = self.event_log.bytes.min(share);
        }
        if self.disk.reserve_bytes == Some(0) {
            return Ok(());
        }
        let fitting = self.disk.fitting(&self.limits, size);
        let (reserve, inflight) = fitting.map_err(|why| {
            OpenError::Config(format!("{why}. The directory is {}", self.data_dir.display()))
        })?;
        self.disk.reserve_bytes = Some(reserve);
        self.limits.max_inflight_bytes = inflight;
        Ok(())
    }
}

/// What to say to a node that belongs to no cluster and was not told how to get one.
pub(super) const NO_CLUSTER: &str = "this node belongs to no cluster yet, and was not told which. There are three ways: --peers 1=HOST:PORT,2=HOST:PORT,… forms a cluster with the nodes it names; --join waits until `quorate member add` takes the node into one that exists; --single forms a cluster of this node alone";

/// The least memory, in bytes, that a node can be told to live with.
pub const MIN_MEMORY_BYTES: u64 = 192 * 1024 * 1024;
/// The event log takes at most one part in so many of the file system, unless it is told otherwise.
const EVENT_LOG_SHARE: u64 = 16;
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
    /// Most bytes of a snapshot sent in a second, to each that needs one; 0 for as many as there can be.
    pub send_bytes_per_second: u64,
}

impl SnapshotPolicy {
    /// Refuses what cannot work.
    ///
    /// # Errors
    /// Which setting, and why.
    pub(super) fn validate(&self) -> Result<(), String> {
        ranges::check(&[
            ("snapshot_every_entries", self.every_entries),
            ("snapshot_every_bytes", self.every_bytes),
            ("snapshot_keep_entries", self.keep_entries),
            ("snapshot_keep_bytes", self.keep_bytes),
            ("snapshot_bytes_per_second", self.send_bytes_per_second),
        ])
    }
}

impl Default for SnapshotPolicy {
    fn default() -> Self {
        Self {
            every_entries: 500_000,
            every_bytes: 256 * 1024 * 1024,
            keep_entries: 100_000,
            keep_bytes: 64 * 1024 * 1024,
            send_bytes_per_second: 0,
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
    /// Refuses what does not go together.
    fn validate(&self) -> Result<(), String> {
        let Self { lagging_after_ms: lagging, disconnected_after_ms: disconnected, .. } = *self;
        match disconnected <= lagging {
            true => Err(format!(
                "peers must satisfy lagging_after_ms < disconnected_after_ms, got {lagging}, {disconnected}"
            )),
            false => Ok(()),
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
    /// for no reserve and no such check: a full disk then stops the node. None for one that fits the file system: 128 MiB,
    /// or an eighth of a file system smaller than 1 GiB, so that several nodes may share it.
    pub reserve_bytes: Option<u64>,
    /// A write of the log that takes longer has stalled: a leader hands over and refuses writes meanwhile. 0 for
    /// no such check.
    pub stall_ms: u64,
}

impl DiskPolicy {
    /// Beside what is in flight, a reserve has room for a segment of the log, and for votes.
    const BESIDE_BYTES: u64 = 32 * 1024 * 1024;
    /// The reserve where nothing else was asked for, and there is room.
    const USUAL_RESERVE_BYTES: u64 = 128 * 1024 * 1024;
    /// It takes no more than one in so many bytes of the file system, which several nodes may share.
    const FILE_SYSTEM_SHARE: u64 = 8;
    /// A reserve that was asked for may be one in so many: half of its size must be free beside it before writes are
    /// taken.
    const MOST_SHARE: u64 = 2;
    /// So much may be in flight even under the smallest reserve.
    const LEAST_INFLIGHT_BYTES: u64 = 4 * 1024 * 1024;

    /// The smallest reserve for these limits: what may be in flight with what the log adds to it, and what is beside it.
    fn needed_bytes(limits: &Limits) -> u64 {
        Self::needed_for(limits.max_inflight_bytes as u64)
    }

    fn needed_for(inflight: u64) -> u64 {
        inflight.saturating_add(inflight / 4).saturating_add(Self::BESIDE_BYTES)
    }

    /// The reserve, and what may be in flight, on a file system of `size` bytes.
    ///
    /// What may be in flight gives way to a small reserve only if it is what it is by default.
    ///
    /// # Errors
    /// What does not fit, and what would.
    fn fitting(&self, limits: &Limits, size: u64) -> Result<(u64, usize), String> {
        if size == 0 {
            // The file system does not say.
            return Ok((
                self.reserve_bytes.unwrap_or(Self::needed_bytes(limits).max(Self::USUAL_RESERVE_BYTES)),
                limits.max_inflight_bytes,
            ));
        }
        let most = size / Self::MOST_SHARE;
        let instead = match Self::needed_for(limits.max_command_bytes as u64) <= most {
            true => {
                "set a smaller one, with a smaller max_inflight_bytes if need be, or 0 for none (QUORATE_DISK_RESERVE_BYTES=0), or use a larger disk"
            }
            false => {
                "on so small a file system there can be none: set it to 0 (QUORATE_DISK_RESERVE_BYTES=0), or use a larger disk"
            }
        };
        let refuse = |asked: u64, why: &str| {
            format!(
                "disk_reserve_bytes ({asked}{why}) must be at most {most}, half of the file system of the data directory ({size} bytes); {instead}"
            )
        };
        if let Some(reserve) = self.reserve_bytes {
            return match reserve <= most {
                true => Ok((reserve, limits.max_inflight_bytes)),
                false => Err(refuse(reserve, "")),
            };
        }
        let given = limits.max_inflight_bytes != Limits::default().max_inflight_bytes;
        let command = limits.max_command_bytes as u64;
        let least = match given {
            true => Self::needed_bytes(limits),
            false => Self::needed_for(Self::LEAST_INFLIGHT_BYTES.max(command)),
        };
        let reserve = (size / Self::FILE_SYSTEM_SHARE).min(Self::USUAL_RESERVE_BYTES).max(least);
        if reserve > most {
            let why = match given {
                true => ", what max_inflight_bytes needs",
                false => ", the smallest with these limits",
            };
            return Err(refuse(reserve, why));
        }
        let room = (reserve - Self::BESIDE_BYTES) / 5 * 4;
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let inflight = if given { limits.max_inflight_bytes } else { limits.max_inflight_bytes.min(room) };
        Ok((reserve, inflight))
    }
}

impl Default for DiskPolicy {
    fn default() -> Self {
        Self { reserve_bytes: None, stall_ms: 1000 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    #[test]
    fn more_memory_than_there_is_is_refused() {
        let config = |memory_bytes| EngineConfig { memory_bytes, ..EngineConfig::new(1, "unused", "a:1") };
        let available = memory::available_bytes().max(MIN_MEMORY_BYTES);
        for bytes in [None, Some(MIN_MEMORY_BYTES), Some(available)] {
            assert!(config(bytes).validate().is_ok(), "{bytes:?}");
        }
        for bytes in [available + 1, u64::MAX] {
            let refused = config(Some(bytes)).validate().unwrap_err().to_string();
            assert!(refused.contains(&format!("memory_bytes ({bytes})")), "{refused}");
            assert!(refused.contains(&format!("{available} bytes")), "{refused}");
        }
    }

    fn fit(reserve_bytes: Option<u64>, inflight_mib: u64, size: u64) -> Result<(u64, u64), String> {
        let limits = Limits { max_inflight_bytes: (inflight_mib * MIB) as usize, ..Limits::default() };
        let policy = DiskPolicy { reserve_bytes, ..DiskPolicy::default() };
        let (reserve, inflight) = policy.fitting(&limits, size)?;
        assert!(reserve >= DiskPolicy::needed_for(inflight as u64), "{reserve} for {inflight}");
        assert!(reserve <= size / 2);
        Ok((reserve / MIB, inflight as u64 / MIB))
    }

    #[test]
    fn a_reserve_that_nobody_asked_for_leaves_room_for_other_nodes() {
        assert_eq!(fit(None, 64, 1 << 50), Ok((128, 64)));
        assert_eq!(fit(None, 64, 1024 * MIB), Ok((128, 64)));
        assert_eq!(fit(None, 64, 400 * MIB), Ok((50, 14)), "three of them take 150 of 400");
        assert_eq!(fit(None, 64, 100 * MIB), Ok((37, 4)), "the smallest there is");
        // Beside three whole reserves, what ends a full disk is free for each.
        let (reserve, _) = fit(None, 64, 400 * MIB).unwrap();
        assert!(400 > 3 * reserve + reserve);
    }

    #[test]
    fn what_was_asked_for_is_kept_or_refused_with_what_would_fit() {
        assert_eq!(fit(None, 8, 400 * MIB), Ok((50, 8)));
        assert_eq!(fit(None, 100, 400 * MIB), Ok((157, 100)), "it needs more");
        assert_eq!(fit(Some(112 * MIB), 64, 400 * MIB), Ok((112, 64)));
        let too_large = fit(Some(u64::MAX), 64, 400 * MIB).unwrap_err();
        assert!(too_large.contains(&format!("at most {}", 200 * MIB)), "{too_large}");
        for refused in [fit(None, 200, 400 * MIB), fit(None, 64, 70 * MIB)] {
            assert!(refused.unwrap_err().contains("disk_reserve_bytes"));
        }
    }
}
