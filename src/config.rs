//! The settings of `quorate serve`, and where they come from.
//!
//! Defaults, then a TOML or YAML file, then the environment (`QUORATE_*`), then flags: the later wins, setting
//! by setting. All of them are in one table, so that a setting has one name: `--node-id`, `QUORATE_NODE_ID`,
//! `node_id`. [`ServeConfig`] is what comes out: complete, and checked as a whole.
//!
//! Nothing is corrected silently. A setting that cannot work is refused with a message that names it and
//! says what to do, and so is a key that the file has and this build does not know.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Deserialize;

use crate::address::{Address, FORM};
use crate::engine::ranges::MIN_COMMAND_BYTES;
use crate::engine::{
    DiskPolicy, EngineConfig, Limits, PeerPolicy, SnapshotPolicy, Timing, available_memory_bytes,
    check_node_id,
};
use crate::feed::EventLogLimits;
use crate::node::settings::parse_filter;
use crate::shown::Shown;
use crate::trust::settings::PeerTrust;
use crate::types::NodeId;

mod data_dir;
mod door;
mod exposure;
mod file;
mod fixed;
mod flags;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
mod given;
mod peers;
mod replication;
mod reserve;
mod table;
#[cfg(test)]
mod tests;
mod tls;

pub(crate) use door::DoorConfig;
pub(crate) use peers::Peers;
pub(crate) use replication::{GivenReplication, ReplicaWishes, Translation};
pub(crate) use reserve::ReserveBytes;
pub(crate) use table::GivenSettings;
pub(crate) use tls::TlsSettings;

/// Arguments of `quorate serve`.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(after_help = flags::after_help())]
pub struct ServeArgs {
    /// File with settings, TOML or YAML by its extension; flags and environment take precedence
    #[arg(long, value_name = "FILE", env = "QUORATE_CONFIG")]
    pub config: Option<PathBuf>,

    /// The settings given as flags or in the environment.
    #[command(flatten)]
    pub settings: GivenSettings,
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
pub enum SettingsError {
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
    /// Where it listens for followers that speak frames; `None` for nowhere.
    pub frames_listen: Option<String>,
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
    /// How much of what was applied is kept on disk.
    pub event_log: EventLogLimits,
    /// What is made of peers that are slow or silent.
    pub peer_policy: PeerPolicy,
    /// How members prove to each other who they are.
    pub peer_trust: PeerTrust,
    /// Memory that this node may use, in bytes; `None` for all that it is allowed.
    pub memory_bytes: Option<u64>,
    /// The client port.
    pub door: DoorConfig,
    /// TLS there.
    pub tls: TlsSettings,
    /// Whether it listens where anybody may be, and asks nobody who it is.
    pub insecure: bool,
    /// What was made of names that others have for settings.
    pub translation: Translation,
}

/// What the engine has no default for. Where the data goes, and how the others reach the node, follow from the rest.
impl Default for ServeConfig {
    fn default() -> Self {
        Self {
            node_id: 1,
            cluster: "quorate".to_owned(),
            data_dir: PathBuf::new(),
            client_listen: "127.0.0.1:7801".to_owned(),
            client_advertise: None,
            frames_listen: None,
            peer_listen: "127.0.0.1:7901".to_owned(),
            peer_advertise: String::new(),
            peers: BTreeMap::new(),
            join: false,
            single: false,
            preferred_leader: false,
            log_format: LogFormat::default(),
            log_level: "info,openraft=error".to_owned(),
            timing: Timing::default(),
            snapshots: SnapshotPolicy::default(),
            limits: Limits::default(),
            disk: DiskPolicy::default(),
            event_log: EventLogLimits::default(),
            peer_policy: PeerPolicy::default(),
            peer_trust: PeerTrust::default(),
            memory_bytes: None,
            door: DoorConfig::default(),
            tls: TlsSettings::default(),
            insecure: false,
            translation: Translation::default(),
        }
    }
}

impl ServeConfig {
    /// The settings from `args` and the file they name.
    ///
    /// # Errors
    /// See [`SettingsError`].
    pub(crate) fn load(args: ServeArgs) -> Result<Self, SettingsError> {
        let mut settings = args.settings.or(GivenSettings::of(args.config.as_deref())?);
        let translation = settings.others_names()?.translate(&mut settings)?;
        Self::resolve_as(settings, translation)
    }

    /// The settings of a replica from `settings`, which win, and the file at `path`.
    ///
    /// # Errors
    /// See [`SettingsError`].
    pub(crate) fn load_replica(
        settings: GivenSettings,
        usual: GivenSettings,
        path: Option<&Path>,
    ) -> Result<Self, SettingsError> {
        let mut settings = settings.or(GivenSettings::of(path)?);
        let translation = settings.others_names()?.translate_for_replica(&mut settings)?;
        Self::resolve_as(settings.or(usual), translation)
    }

    /// Adds the defaults to `settings`, and checks the whole.
    ///
    /// # Errors
    /// [`SettingsError::Invalid`].
    #[cfg(any(test, fuzzing))]
    pub(crate) fn resolve(settings: GivenSettings) -> Result<Self, SettingsError> {
        Self::resolve_as(settings, Translation::default())
    }

    /// The same of a node that names of others have led to something for.
    fn resolve_as(mut settings: GivenSettings, translation: Translation) -> Result<Self, SettingsError> {
        let is_replica = translation.replica.is_some();
        if is_replica {
            // It is no member, so what is said of membership is not its own.
            (settings.peers, settings.join, settings.single) = (None, None, None);
        }
        if settings.node_id.is_none() && settings.peers.is_some() {
            return Err(invalid("--peers needs --node-id: say which of the peers this node is"));
        }
        let mut config = Self { translation, ..Self::default() };
        settings.clone().apply(&mut config);
        config.peer_trust = std::mem::take(&mut config.peer_trust).settled();
        config.place_peer(&settings)?;
        if settings.data_dir.is_none() {
            let name = if is_replica { "replica".to_owned() } else { format!("node-{}", config.node_id) };
            config.data_dir = data_dir::usual(&name, |name| std::env::var_os(name), Path::new("."))?;
        }
        config.validate()?;
        config.door.fit(config.memory());
        Ok(config)
    }

    /// Where the other nodes reach this one, and who founds the cluster: what was not said follows from what was.
    fn place_peer(&mut self, settings: &GivenSettings) -> Result<(), SettingsError> {
        let Self { node_id, peer_listen, peers, join, single, .. } = self;
        let listed = peers.get(node_id).cloned();
        if let (Some(listed), None) = (&listed, &settings.peer_advertise) {
            check_listed_port(*node_id, listed, peer_listen)?;
        }
        match &settings.peer_advertise {
            Some(given) => drop(check_advertised("--peer-advertise", given, false)?),
            None => self.peer_advertise = listed.unwrap_or_else(|| peer_listen.clone()),
        }
        if *single && (*join || peers.len() > 1) {
            return Err(invalid(
                "--single forms a cluster of this node alone; leave it out, or leave out --join and --peers",
            ));
        }
        if *single && settings.peers.is_none() {
            self.peers = BTreeMap::from([(*node_id, self.peer_advertise.clone())]);
        }
        Ok(())
    }

    /// Refuses what cannot work.
    ///
    /// # Errors
    /// [`SettingsError::Invalid`], saying which setting and what to do.
    pub(crate) fn validate(&self) -> Result<(), SettingsError> {
        check_name("--cluster", &self.cluster)?;
        for node_id in [&self.node_id].into_iter().chain(self.peers.keys()) {
            check_node_id(*node_id).map_err(invalid)?;
        }
        if self.data_dir.as_os_str().is_empty() {
            return Err(invalid("--data-dir is empty; name a directory"));
        }
        check_address("--client-listen", &self.client_listen)?;
        check_address("--peer-listen", &self.peer_listen)?;
        self.frames_listen
            .iter()
            .try_for_each(|address| check_address("--frames-listen", address).map(drop))?;
        match &self.client_advertise {
            Some(address) => check_advertised("--client-advertise", address, false)?,
            // Nobody is told where a replica is.
            None if self.translation.replica.is_some() => {}
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
        self.tls.resolve()?;
        self.door.check_memory(self.memory())?;
        self.engine_config(String::new())
            .validate()
            .map_err(|error| SettingsError::Invalid(error.to_string().replace("invalid configuration: ", "")))
    }

    /// Memory that this node may use, in bytes: what was given, or all that it is allowed.
    pub(crate) fn memory(&self) -> u64 {
        self.memory_bytes.unwrap_or_else(available_memory_bytes)
    }

    fn check_peers(&self) -> Result<(), SettingsError> {
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

    fn check_limits(&self) -> Result<(), SettingsError> {
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
        config.event_log = self.event_log;
        config.peers = self.peer_policy;
        config.peer_trust = self.peer_trust.clone();
        config.memory_bytes = self.memory_bytes;
        config
    }
}

fn invalid(message: impl Into<String>) -> SettingsError {
    SettingsError::Invalid(message.into())
}

fn check_name(flag: &str, name: &str) -> Result<(), SettingsError> {
    if name.is_empty() || name.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(invalid(format!("{flag} \"{}\" must have no spaces and not be empty", Shown(name))));
    }
    Ok(())
}

/// Host and port of `address`, on which somebody could listen.
fn check_address<'a>(flag: &str, address: &'a str) -> Result<Address<'a>, SettingsError> {
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
fn check_advertised(flag: &str, address: &str, free_port: bool) -> Result<(), SettingsError> {
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
fn check_listed_port(node_id: NodeId, listed: &str, peer_listen: &str) -> Result<(), SettingsError> {
    let listed_port = check_address("--peers", listed)?.port;
    let Address { host, port: listen_port, .. } = check_address("--peer-listen", peer_listen)?;
    if listed_port != listen_port {
        return Err(invalid(format!(
            "--peers says that node {node_id} is reached at {listed}, but it listens on {peer_listen}; set --peer-listen {host}:{listed_port}, or --peer-advertise {listed} if the port is mapped"
        )));
    }
    Ok(())
}
