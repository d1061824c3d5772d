//! The settings of `quorate serve`, and where they come from.
//!
//! Defaults, then a TOML or YAML file, then the environment (`QUORATE_*`), then flags: the later wins, setting
//! by setting. All three sources share one struct, [`Settings`], so that a setting has one name: `--node-id`,
//! `QUORATE_NODE_ID`, `node_id`. [`ServeConfig`] is what comes out: complete, and checked as a whole.
//!
//! Nothing is corrected silently. A setting that cannot work is refused with a message that names it and
//! says what to do, and so is a key that the file has and this build does not know.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Deserialize;

use crate::address::{Address, FORM};
use crate::duration::parse_ms;
use crate::engine::ranges::MIN_COMMAND_BYTES;
use crate::engine::{
    DiskPolicy, EngineConfig, Limits, PeerPolicy, SnapshotPolicy, Timing, available_memory_bytes,
    check_node_id,
};
use crate::node::settings::parse_filter;
use crate::shown::Shown;
use crate::types::NodeId;

mod data_dir;
mod door;
mod fixed;
mod peers;
mod reserve;
#[cfg(test)]
mod tests;

pub(crate) use door::DoorConfig;
pub(crate) use peers::Peers;
pub(crate) use reserve::ReserveBytes;

const EXAMPLE: &str = "Example:
  quorate serve --single                       one node by itself
  quorate serve --node-id 1 --data-dir /var/lib/quorate \\
    --client-listen 0.0.0.0:7801 --client-advertise 10.0.0.1:7801 --peer-listen 0.0.0.0:7901 \\
    --peers 1=10.0.0.1:7901,2=10.0.0.2:7901,3=10.0.0.3:7901
  quorate serve --node-id 4 --data-dir /var/lib/quorate --client-listen 10.0.0.4:7801 --peer-listen 10.0.0.4:7901 --join
  quorate serve --config quorate.toml

A node that belongs to no cluster yet needs one of --peers, --join and --single; later starts need none of them.

Settings come from the file, then the environment, then flags; the later wins. In a file, --node-id is node_id.
cluster/config/node.toml explains all of them.

These can change while the node runs, with `quorate configure`: log_level, preferred_leader, snapshot_every_entries,
snapshot_every_bytes, snapshot_keep_entries, snapshot_keep_bytes, max_command_bytes, max_inflight_bytes; and, for the
whole cluster, state_quota_bytes.";

/// Arguments of `quorate serve`.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct ServeArgs {
    /// File with settings, TOML or YAML by its extension; flags and environment take precedence
    #[arg(long, value_name = "FILE", env = "QUORATE_CONFIG")]
    pub config: Option<PathBuf>,

    /// The settings given as flags or in the environment.
    #[command(flatten)]
    pub settings: Settings,
}

/// Every setting, given or not.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// This node's id, from 1, never reused [default: 1 when no --peers are given]
    #[arg(long, value_name = "ID", env = "QUORATE_NODE_ID")]
    pub node_id: Option<NodeId>,

    /// Name of the cluster; nodes of differently named clusters refuse each other [default: quorate]
    #[arg(long, value_name = "NAME", env = "QUORATE_CLUSTER")]
    pub cluster: Option<String>,

    /// Directory for log, vote, snapshots and identity
    /// [default: $XDG_DATA_HOME/quorate/node-ID, else $HOME/.local/share/quorate/node-ID]
    #[arg(long, value_name = "DIR", env = "QUORATE_DATA_DIR")]
    pub data_dir: Option<PathBuf>,

    /// Address to listen on for clients, gRPC and HTTP [default: 127.0.0.1:7801]
    #[arg(long, value_name = "HOST:PORT", env = "QUORATE_CLIENT_LISTEN")]
    pub client_listen: Option<String>,

    /// Address that clients are told to use [default: the listen address]
    #[arg(long, value_name = "HOST:PORT", env = "QUORATE_CLIENT_ADVERTISE")]
    pub client_advertise: Option<String>,

    /// Address to listen on for the other nodes [default: 127.0.0.1:7901]
    #[arg(long, value_name = "HOST:PORT", env = "QUORATE_PEER_LISTEN")]
    pub peer_listen: Option<String>,

    /// Address that the other nodes are told to use [default: this node's entry in --peers, else the
    /// listen address]
    #[arg(long, value_name = "HOST:PORT", env = "QUORATE_PEER_ADVERTISE")]
    pub peer_advertise: Option<String>,

    /// Founding members, this node included, as 1=HOST:PORT,2=HOST:PORT,… with their peer addresses; used once,
    /// to form the cluster, and later only to find members that the cluster's own list of addresses does not lead to
    #[arg(long, value_name = "PEERS", env = "QUORATE_PEERS")]
    pub peers: Option<Peers>,

    /// Form no cluster, but wait until `quorate member add` or `member replace` takes this node into one
    #[arg(long, value_name = "BOOL", env = "QUORATE_JOIN", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub join: Option<bool>,

    /// Form a cluster of this node alone, on an empty data directory. Leave it out again once other nodes have been
    /// added: should the directory be lost, the node must come back with --join, and not form another cluster
    #[arg(long, value_name = "BOOL", env = "QUORATE_SINGLE", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub single: Option<bool>,

    /// Prefer to lead: take the lead, from a node that does not prefer it, once this one has caught up
    #[arg(long, value_name = "BOOL", env = "QUORATE_PREFERRED_LEADER", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub preferred_leader: Option<bool>,

    /// How to write the log to stderr [default: text]
    #[arg(long, value_name = "FORMAT", env = "QUORATE_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,

    /// What to log: error, warn, info, debug, trace, or a filter such as info,quorate=debug
    /// [default: info,openraft=error]
    #[arg(long, value_name = "FILTER", env = "QUORATE_LOG_LEVEL")]
    pub log_level: Option<String>,

    /// Milliseconds between a leader's heartbeats [default: 50]
    #[arg(long, value_name = "MS", value_parser = parse_ms, env = "QUORATE_HEARTBEAT_INTERVAL_MS")]
    pub heartbeat_interval_ms: Option<u64>,

    /// Shortest election timeout in milliseconds; at least twice the heartbeat interval [default: 150]
    #[arg(long, value_name = "MS", value_parser = parse_ms, env = "QUORATE_ELECTION_TIMEOUT_MIN_MS")]
    pub election_timeout_min_ms: Option<u64>,

    /// Longest election timeout in milliseconds [default: 300]
    #[arg(long, value_name = "MS", value_parser = parse_ms, env = "QUORATE_ELECTION_TIMEOUT_MAX_MS")]
    pub election_timeout_max_ms: Option<u64>,

    /// Take a snapshot after this many log entries [default: 500000]
    #[arg(long, value_name = "N", env = "QUORATE_SNAPSHOT_EVERY_ENTRIES")]
    pub snapshot_every_entries: Option<u64>,

    /// Take a snapshot after this many bytes of commands [default: 256 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_SNAPSHOT_EVERY_BYTES")]
    pub snapshot_every_bytes: Option<u64>,

    /// Log entries kept behind a snapshot, for followers that are a little behind [default: 100000]
    #[arg(long, value_name = "N", env = "QUORATE_SNAPSHOT_KEEP_ENTRIES")]
    pub snapshot_keep_entries: Option<u64>,

    /// Bytes of commands kept behind a snapshot [default: 64 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_SNAPSHOT_KEEP_BYTES")]
    pub snapshot_keep_bytes: Option<u64>,

    /// Largest encoded command in bytes [default: 1.5 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_MAX_COMMAND_BYTES")]
    pub max_command_bytes: Option<usize>,

    /// Most bytes of commands proposed and not yet applied; more are refused as overloaded [default: 64 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_MAX_INFLIGHT_BYTES")]
    pub max_inflight_bytes: Option<usize>,

    /// Bytes of log entries kept in memory for replication and apply [default: 16 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_LOG_TAIL_BYTES")]
    pub log_tail_bytes: Option<usize>,

    /// Most bytes of log entries in one message to another node [default: 1 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_APPEND_MESSAGE_BYTES")]
    pub append_message_bytes: Option<usize>,

    /// Disk space set aside for writes under way when the disk turns out to be full; no writes are taken on while less
    /// than a quarter of this is free beside it. At most half of the file system. 0 for none; auto for 128 MiB, or an
    /// eighth of a file system smaller than 1 GiB [default: auto]
    #[arg(long, value_name = "BYTES", env = "QUORATE_DISK_RESERVE_BYTES")]
    pub disk_reserve_bytes: Option<ReserveBytes>,

    /// A write to the log that takes longer, in milliseconds, counts as a disk that hangs: a leader hands over and
    /// takes no writes meanwhile. 0 for never [default: 1000]
    #[arg(long, value_name = "MS", value_parser = parse_ms, env = "QUORATE_FSYNC_STALL_MS")]
    pub fsync_stall_ms: Option<u64>,

    /// A member counts as lagging when it has not answered the leader for this many milliseconds, or when the first
    /// entry that it lacks is older than that [default: 1000]
    #[arg(long, value_name = "MS", value_parser = parse_ms, env = "QUORATE_LAGGING_AFTER_MS")]
    pub lagging_after_ms: Option<u64>,

    /// A member counts as disconnected when it has not answered the leader for this many milliseconds
    /// [default: 60000]
    #[arg(long, value_name = "MS", value_parser = parse_ms, env = "QUORATE_DISCONNECTED_AFTER_MS")]
    pub disconnected_after_ms: Option<u64>,

    /// Longest pause, in milliseconds, between two attempts to connect to another member [default: 200]
    #[arg(long, value_name = "MS", value_parser = parse_ms, env = "QUORATE_RECONNECT_INTERVAL_MS")]
    pub reconnect_interval_ms: Option<u64>,

    /// Memory that this node may use: buffers, history and what clients may make it hold fit into it unless they are set, and the quota on the cluster's state follows the member
    /// with the least. 0 for all that the machine, the control group and the resource limits allow: give nodes that share a
    /// machine their shares [default: 0]
    #[arg(long, value_name = "BYTES", env = "QUORATE_MEMORY_BYTES")]
    pub memory_bytes: Option<u64>,
    /// Host names that requests may call this node by, beside addresses, localhost and the names that it listens on and
    /// advertises: those of load balancers and the like. *.example.com stands for all below it, * for every name
    #[arg(long, value_name = "NAMES", env = "QUORATE_ALLOWED_HOSTS", value_delimiter = ',')]
    pub allowed_hosts: Option<Vec<String>>,

    /// Origins whose pages may use this node from a browser, such as `https://console.example.com`
    #[arg(long, value_name = "ORIGINS", env = "QUORATE_ALLOWED_ORIGINS", value_delimiter = ',')]
    pub allowed_origins: Option<Vec<String>>,

    /// Most connections of clients; 8 more are kept back for probes and operators. 0 for half of the files that the
    /// process may open beside its own [default: 0]
    #[arg(long, value_name = "N", env = "QUORATE_MAX_CONNECTIONS")]
    pub max_connections: Option<usize>,

    /// Most watches on one connection [default: 2048]
    #[arg(long, value_name = "N", env = "QUORATE_MAX_CONNECTION_WATCHES")]
    pub max_connection_watches: Option<usize>,

    /// Most watches in all [default: 16384]
    #[arg(long, value_name = "N", env = "QUORATE_MAX_WATCHES")]
    pub max_watches: Option<usize>,

    /// Bytes of answers that one connection does not take before others on it wait [default: 32 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_MAX_CONNECTION_UNSENT_BYTES")]
    pub max_connection_unsent_bytes: Option<usize>,

    /// The same of all connections [default: 256 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_MAX_UNSENT_BYTES")]
    pub max_unsent_bytes: Option<usize>,

    /// Most bytes of requests on one connection that have not arrived as a whole [default: 64 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_MAX_CONNECTION_UNFINISHED_BYTES")]
    pub max_connection_unfinished_bytes: Option<usize>,

    /// The same on all connections [default: 256 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_MAX_UNFINISHED_BYTES")]
    pub max_unfinished_bytes: Option<usize>,

    /// Bytes of answers that wait on one pipeline before it is not read any more [default: 64 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_MAX_PIPELINE_QUEUED_BYTES")]
    pub max_pipeline_queued_bytes: Option<usize>,

    /// The same on all pipelines [default: 256 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_MAX_QUEUED_BYTES")]
    pub max_queued_bytes: Option<usize>,

    /// Most changes kept in memory for watches, which go back as far as these reach [default: 1000000]
    #[arg(long, value_name = "N", env = "QUORATE_HISTORY_EVENTS")]
    pub history_events: Option<usize>,

    /// Most bytes kept for them [default: 64 MiB]
    #[arg(long, value_name = "BYTES", env = "QUORATE_HISTORY_BYTES")]
    pub history_bytes: Option<usize>,

    /// How old they may be, in milliseconds; 0 for any age [default: 0]
    #[arg(long, value_name = "MS", env = "QUORATE_HISTORY_AGE_MS")]
    pub history_age_ms: Option<u64>,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Why the settings cannot be used. Every message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file's extension is none of those known.
    #[error("configuration file {} must end in .toml, .yaml or .yml", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be parsed, or holds a key or value that is not accepted.
    #[error("configuration file {}: {detail}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        detail: String,
    },
    /// A setting cannot work, by itself or together with others.
    #[error("invalid configuration: {0}")]
    Invalid(String),
}

/// Complete and checked settings of one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServeConfig {
    /// This node's id.
    pub node_id: NodeId,
    /// Name of the cluster.
    pub cluster: String,
    /// Where the node keeps its data.
    pub data_dir: PathBuf,
    /// Where it listens for clients.
    pub client_listen: String,
    /// Where clients are told to go; `None` when that is where it listens.
    pub client_advertise: Option<String>,
    /// Where it listens for peers.
    pub peer_listen: String,
    /// Where peers are told to go.
    pub peer_advertise: String,
    /// The founding members; none when the node joins, or was not told.
    pub peers: BTreeMap<NodeId, String>,
    /// Whether the node waits to be added to a cluster.
    pub join: bool,
    /// Whether the node forms a cluster by itself.
    pub single: bool,
    /// Whether the node prefers to lead.
    pub preferred_leader: bool,
    /// How log lines are written.
    pub log_format: LogFormat,
    /// Which log lines are written.
    pub log_level: String,
    /// Heartbeats and elections.
    pub timing: Timing,
    /// When snapshots are taken and the log is cut.
    pub snapshots: SnapshotPolicy,
    /// Bounds on memory and messages.
    pub limits: Limits,
    /// What is asked of the disk.
    pub disk: DiskPolicy,
    /// What is made of peers that are slow or silent.
    pub peer_policy: PeerPolicy,
    /// Memory that this node may use, in bytes; `None` for all that it is allowed.
    pub memory_bytes: Option<u64>,
    /// The client port.
    pub door: DoorConfig,
}

/// Defaults that the engine does not have.
const DEFAULT_CLUSTER: &str = "quorate";
const DEFAULT_CLIENT_LISTEN: &str = "127.0.0.1:7801";
const DEFAULT_PEER_LISTEN: &str = "127.0.0.1:7901";
const DEFAULT_LOG_LEVEL: &str = "info,openraft=error";

impl ServeConfig {
    /// The settings from `args` and the file they name.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub(crate) fn load(args: ServeArgs) -> Result<Self, ConfigError> {
        let file = match &args.config {
            Some(path) => Settings::from_file(path)?,
            None => Settings::default(),
        };
        Self::resolve(args.settings.or(file))
    }

    /// Adds the defaults to `settings`, and checks the whole.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`].
    pub(crate) fn resolve(settings: Settings) -> Result<Self, ConfigError> {
        let (timing, snapshots, limits) = (Timing::default(), SnapshotPolicy::default(), Limits::default());
        let (disk, peer_policy) = (DiskPolicy::default(), PeerPolicy::default());
        let door = DoorConfig::of(&settings);
        let node_id = match (settings.node_id, &settings.peers) {
            (Some(node_id), _) => node_id,
            (None, None) => 1,
            (None, Some(_)) => {
                return Err(invalid("--peers needs --node-id: say which of the peers this node is"));
            }
        };
        let peer_listen = settings.peer_listen.unwrap_or_else(|| DEFAULT_PEER_LISTEN.to_owned());
        let peers = settings.peers.map(|peers| peers.0);
        let listed = peers.as_ref().and_then(|peers| peers.get(&node_id));
        if let (Some(listed), None) = (listed, &settings.peer_advertise) {
            check_listed_port(node_id, listed, &peer_listen)?;
        }
        if let Some(given) = &settings.peer_advertise {
            check_advertised("--peer-advertise", given, false)?;
        }
        let peer_advertise =
            settings.peer_advertise.or(listed.cloned()).unwrap_or_else(|| peer_listen.clone());
        let (join, single) = (settings.join.unwrap_or(false), settings.single.unwrap_or(false));
        if single && (join || peers.as_ref().is_some_and(|peers| peers.len() > 1)) {
            return Err(invalid(
                "--single forms a cluster of this node alone; leave it out, or leave out --join and --peers",
            ));
        }
        let alone = || match single {
            true => BTreeMap::from([(node_id, peer_advertise.clone())]),
            false => BTreeMap::new(),
        };
        let data_dir = match settings.data_dir {
            Some(data_dir) => data_dir,
            None => data_dir::usual(node_id, |name| std::env::var_os(name), Path::new("."))?,
        };
        let mut config = Self {
            node_id,
            join,
            single,
            preferred_leader: settings.preferred_leader.unwrap_or(false),
            cluster: settings.cluster.unwrap_or_else(|| DEFAULT_CLUSTER.to_owned()),
            data_dir,
            client_listen: settings.client_listen.unwrap_or_else(|| DEFAULT_CLIENT_LISTEN.to_owned()),
            client_advertise: settings.client_advertise,
            peers: peers.unwrap_or_else(alone),
            peer_listen,
            peer_advertise,
            log_format: settings.log_format.unwrap_or_default(),
            log_level: settings.log_level.unwrap_or_else(|| DEFAULT_LOG_LEVEL.to_owned()),
            timing: Timing {
                heartbeat_interval_ms: settings.heartbeat_interval_ms.unwrap_or(timing.heartbeat_interval_ms),
                election_timeout_min_ms: settings
                    .election_timeout_min_ms
                    .unwrap_or(timing.election_timeout_min_ms),
                election_timeout_max_ms: settings
                    .election_timeout_max_ms
                    .unwrap_or(timing.election_timeout_max_ms),
            },
            snapshots: SnapshotPolicy {
                every_entries: settings.snapshot_every_entries.unwrap_or(snapshots.every_entries),
                every_bytes: settings.snapshot_every_bytes.unwrap_or(snapshots.every_bytes),
                keep_entries: settings.snapshot_keep_entries.unwrap_or(snapshots.keep_entries),
                keep_bytes: settings.snapshot_keep_bytes.unwrap_or(snapshots.keep_bytes),
            },
            limits: Limits {
                max_command_bytes: settings.max_command_bytes.unwrap_or(limits.max_command_bytes),
                max_inflight_bytes: settings.max_inflight_bytes.unwrap_or(limits.max_inflight_bytes),
                log_tail_bytes: settings.log_tail_bytes.unwrap_or(limits.log_tail_bytes),
                append_message_bytes: settings.append_message_bytes.unwrap_or(limits.append_message_bytes),
            },
            disk: DiskPolicy {
                reserve_bytes: match settings.disk_reserve_bytes {
                    Some(ReserveBytes::Given(bytes)) => Some(bytes),
                    Some(ReserveBytes::Auto) | None => disk.reserve_bytes,
                },
                stall_ms: settings.fsync_stall_ms.unwrap_or(disk.stall_ms),
            },
            peer_policy: PeerPolicy {
                lagging_after_ms: settings.lagging_after_ms.unwrap_or(peer_policy.lagging_after_ms),
                disconnected_after_ms: settings
                    .disconnected_after_ms
                    .unwrap_or(peer_policy.disconnected_after_ms),
                reconnect_interval_ms: settings
                    .reconnect_interval_ms
                    .unwrap_or(peer_policy.reconnect_interval_ms),
            },
            memory_bytes: settings.memory_bytes.filter(|bytes| *bytes != 0),
            door,
        };
        config.validate()?;
        config.door.fit(config.memory());
        Ok(config)
    }

    /// Refuses what cannot work.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`], saying which setting and what to do.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        check_name("--cluster", &self.cluster)?;
        for node_id in [&self.node_id].into_iter().chain(self.peers.keys()) {
            check_node_id(*node_id).map_err(invalid)?;
        }
        if self.data_dir.as_os_str().is_empty() {
            return Err(invalid("--data-dir is empty; name a directory"));
        }
        check_address("--client-listen", &self.client_listen)?;
        check_address("--peer-listen", &self.peer_listen)?;
        match &self.client_advertise {
            Some(address) => check_advertised("--client-advertise", address, false)?,
            None => check_advertised("--client-advertise", &self.client_listen, true)?,
        }
        // The bound port takes the place of a free one only where nothing else is said of the address.
        let as_listened = self.peer_advertise == self.peer_listen;
        check_advertised("--peer-advertise", &self.peer_advertise, self.peers.len() <= 1 && as_listened)?;
        self.check_peers()?;
        parse_filter(&self.log_level).map_err(|error| {
            invalid(format!("--log-level \"{}\" is not a filter: {error}", Shown(&self.log_level)))
        })?;
        self.check_limits()?;
        self.door.validate()?;
        self.door.check_memory(self.memory())?;
        self.engine_config(String::new())
            .validate()
            .map_err(|error| ConfigError::Invalid(error.to_string().replace("invalid configuration: ", "")))
    }

    /// Memory that this node may use, in bytes: what was given, or all that it is allowed.
    pub(crate) fn memory(&self) -> u64 {
        self.memory_bytes.unwrap_or_else(available_memory_bytes)
    }

    fn check_peers(&self) -> Result<(), ConfigError> {
        let Self { node_id, peers, peer_advertise, .. } = self;
        for (id, address) in peers {
            check_advertised("--peers", address, peers.len() == 1)?;
            if let Some((other, _)) = peers.iter().find(|(other, at)| *other > id && *at == address) {
                return Err(invalid(format!(
                    "--peers gives nodes {id} and {other} the same address {address}; each needs its own"
                )));
            }
        }
        match peers.get(node_id) {
            None if self.join || peers.is_empty() => Ok(()),
            None => Err(invalid(format!(
                "--peers does not name node {node_id}; add {node_id}={peer_advertise}, or correct --node-id"
            ))),
            Some(listed) if listed != peer_advertise => Err(invalid(format!(
                "--peers says that node {node_id} is reached at {listed}, --peer-advertise says {peer_advertise}; make them agree"
            ))),
            Some(_) => Ok(()),
        }
    }

    fn check_limits(&self) -> Result<(), ConfigError> {
        /// What one message of the client port has room for, beside the value's frame.
        const MAX_COMMAND_BYTES: u64 = crate::door::MAX_MESSAGE_BYTES as u64 / 2;
        let Limits { max_command_bytes, append_message_bytes, log_tail_bytes, .. } = self.limits;
        // Where clients have less room than the engine, theirs is the limit, whatever is asked for.
        if !(MIN_COMMAND_BYTES..=MAX_COMMAND_BYTES).contains(&(max_command_bytes as u64)) {
            return Err(invalid(format!(
                "--max-command-bytes ({max_command_bytes}) must be from {MIN_COMMAND_BYTES} to {MAX_COMMAND_BYTES}"
            )));
        }
        if append_message_bytes == 0 || log_tail_bytes < append_message_bytes {
            return Err(invalid(format!(
                "--log-tail-bytes ({log_tail_bytes}) must be at least --append-message-bytes ({append_message_bytes}), and that at least 1"
            )));
        }
        Ok(())
    }

    /// What the engine needs of it. `client_listens_at` is advertised unless another address was given.
    pub(crate) fn engine_config(&self, client_listens_at: String) -> EngineConfig {
        let mut config = EngineConfig::new(self.node_id, &self.data_dir, &self.peer_advertise);
        config.cluster.clone_from(&self.cluster);
        config.peer_listen.clone_from(&self.peer_listen);
        config.client_advertise = self.client_advertise.clone().unwrap_or(client_listens_at);
        config.initial_members.clone_from(&self.peers);
        config.join = self.join;
        config.preferred_leader = self.preferred_leader;
        config.timing = self.timing.clone();
        config.snapshots = self.snapshots.clone();
        config.limits = self.limits.clone();
        config.disk = self.disk.clone();
        config.peers = self.peer_policy;
        config.memory_bytes = self.memory_bytes;
        config
    }
}

fn invalid(message: impl Into<String>) -> ConfigError {
    ConfigError::Invalid(message.into())
}

fn check_name(flag: &str, name: &str) -> Result<(), ConfigError> {
    if name.is_empty() || name.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(invalid(format!("{flag} \"{}\" must have no spaces and not be empty", Shown(name))));
    }
    Ok(())
}

/// Host and port of `address`, on which somebody could listen.
fn check_address<'a>(flag: &str, address: &'a str) -> Result<Address<'a>, ConfigError> {
    let shown = Shown(address);
    let parsed =
        Address::parse(address).ok_or_else(|| invalid(format!("{flag} \"{shown}\" is not {FORM}")))?;
    parsed.check_host().map_err(|why| {
        invalid(format!("{flag} \"{shown}\" is no address of one host: {why}; set it to one that is"))
    })?;
    Ok(parsed)
}

/// Refuses addresses that nobody else could connect to. Port 0 is a free port: fine where the bound address
/// is what gets advertised, as `free_port` says.
fn check_advertised(flag: &str, address: &str, free_port: bool) -> Result<(), ConfigError> {
    let parsed = check_address(flag, address)?;
    if parsed.is_unspecified() {
        let host = parsed.host;
        return Err(invalid(format!(
            "{address} cannot be advertised: nobody can connect to {host}; set {flag} to an address that others reach this node at"
        )));
    }
    if parsed.port == 0 && !free_port {
        return Err(invalid(format!(
            "{flag} \"{}\" has port 0; others need to know the port",
            Shown(address)
        )));
    }
    Ok(())
}

/// `--peers` says where this node is reached; catch a listen address that cannot be that.
fn check_listed_port(node_id: NodeId, listed: &str, peer_listen: &str) -> Result<(), ConfigError> {
    let listed_port = check_address("--peers", listed)?.port;
    let Address { host, port: listen_port, .. } = check_address("--peer-listen", peer_listen)?;
    if listed_port != listen_port {
        return Err(invalid(format!(
            "--peers says that node {node_id} is reached at {listed}, but it listens on {peer_listen}; set --peer-listen {host}:{listed_port}, or --peer-advertise {listed} if the port is mapped"
        )));
    }
    Ok(())
}

/// Most bytes of a configuration file. Some files have no end.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

impl Settings {
    /// Reads `path`.
    ///
    /// # Errors
    /// [`ConfigError::Read`], [`ConfigError::UnknownFormat`] or [`ConfigError::Parse`].
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::Read { path: path.to_owned(), source };
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(failed)?;
        file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > MAX_FILE_BYTES {
            let detail = format!("it has more than {MAX_FILE_BYTES} bytes: is it the right file?");
            return Err(ConfigError::Parse { path: path.to_owned(), detail });
        }
        let parsed = match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") => toml::from_str(&text).map_err(|error| error.to_string()),
            // A file of comments only has no document to parse.
            Some("yaml" | "yml") if is_blank_yaml(&text) => Ok(Self::default()),
            Some("yaml" | "yml") => serde_saphyr::from_str(&text).map_err(|error| error.to_string()),
            _ => return Err(ConfigError::UnknownFormat { path: path.to_owned() }),
        };
        parsed.map_err(|detail| ConfigError::Parse { path: path.to_owned(), detail })
    }

    /// These settings, with what they leave open taken from `other`.
    #[must_use]
    pub fn or(mut self, other: Self) -> Self {
        self = DoorConfig::or(self, &other);
        Self {
            node_id: self.node_id.or(other.node_id),
            cluster: self.cluster.or(other.cluster),
            data_dir: self.data_dir.or(other.data_dir),
            client_listen: self.client_listen.or(other.client_listen),
            client_advertise: self.client_advertise.or(other.client_advertise),
            peer_listen: self.peer_listen.or(other.peer_listen),
            peer_advertise: self.peer_advertise.or(other.peer_advertise),
            peers: self.peers.or(other.peers),
            join: self.join.or(other.join),
            single: self.single.or(other.single),
            preferred_leader: self.preferred_leader.or(other.preferred_leader),
            log_format: self.log_format.or(other.log_format),
            log_level: self.log_level.or(other.log_level),
            heartbeat_interval_ms: self.heartbeat_interval_ms.or(other.heartbeat_interval_ms),
            election_timeout_min_ms: self.election_timeout_min_ms.or(other.election_timeout_min_ms),
            election_timeout_max_ms: self.election_timeout_max_ms.or(other.election_timeout_max_ms),
            snapshot_every_entries: self.snapshot_every_entries.or(other.snapshot_every_entries),
            snapshot_every_bytes: self.snapshot_every_bytes.or(other.snapshot_every_bytes),
            snapshot_keep_entries: self.snapshot_keep_entries.or(other.snapshot_keep_entries),
            snapshot_keep_bytes: self.snapshot_keep_bytes.or(other.snapshot_keep_bytes),
            max_command_bytes: self.max_command_bytes.or(other.max_command_bytes),
            max_inflight_bytes: self.max_inflight_bytes.or(other.max_inflight_bytes),
            log_tail_bytes: self.log_tail_bytes.or(other.log_tail_bytes),
            append_message_bytes: self.append_message_bytes.or(other.append_message_bytes),
            disk_reserve_bytes: self.disk_reserve_bytes.or(other.disk_reserve_bytes),
            fsync_stall_ms: self.fsync_stall_ms.or(other.fsync_stall_ms),
            lagging_after_ms: self.lagging_after_ms.or(other.lagging_after_ms),
            disconnected_after_ms: self.disconnected_after_ms.or(other.disconnected_after_ms),
            reconnect_interval_ms: self.reconnect_interval_ms.or(other.reconnect_interval_ms),
            memory_bytes: self.memory_bytes.or(other.memory_bytes),
            ..self
        }
    }
}

fn is_blank_yaml(text: &str) -> bool {
    text.lines().map(str::trim).all(|line| line.is_empty() || line.starts_with('#') || line == "---")
}
