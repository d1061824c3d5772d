//! Every setting of a node, written once: its flag, its variable of the environment, its key in the configuration file, what a
//! running node tells of it, and the commented example `cluster/config/node.toml` are made from its row here.
//!
//! A row is what there is to say of the setting, its name, the type it is given as, what stands for it in the help, when it takes
//! effect, and where in [`ServeConfig`] it goes. The default is what stands there in [`ServeConfig::default`]; a text
//! that ends in a default of its own, in brackets, says it instead. The first paragraph is the short help.
//!
//! A new setting is a row, and the place in the configuration that it sets. A number of the engine has its range in
//! `engine/config/ranges.rs` besides, and one that a running node changes a line in `node/settings.rs`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, ArgMatches, FromArgMatches};
use serde::Deserialize;
use serde_json::Value;

use super::door::{named, shown};
use super::given::{FromArgument, ToJson};
use super::replication::GivenReplication;
use super::{LogFormat, Peers, ReserveBytes, ServeConfig};
use crate::runtime::whole_ms;
use crate::trust::port::ClientCertificates;
use crate::trust::settings::{PeerAuth, PeerSecret};
use crate::types::NodeId;

/// When a setting takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TakesEffect {
    /// At the next start.
    Restart,
    /// At once, by `quorate configure`, too.
    Live,
}

/// Milliseconds, or a time with its unit.
pub(super) const MS: &str = "MS";
/// Whole bytes.
pub(super) const BYTES: &str = "BYTES";
/// Not to be shown.
pub(super) const SECRET: &str = "SECRET";
/// True by being there.
pub(super) const SWITCH: &str = "BOOL";

/// One setting.
pub(crate) struct SettingRow {
    /// Its name in the file; the flag and the variable of the environment follow from it.
    pub name: &'static str,
    /// What there is to say of it, and its default.
    pub text: &'static str,
    /// When it takes effect.
    pub effect: TakesEffect,
    /// What stands for its value in the help; [`MS`] and [`SWITCH`] say how it is read, too.
    pub form: &'static str,
    /// Has its argument parsed as the type that it is given as.
    pub parsed: fn(Arg) -> Arg,
    /// What it is in a configuration.
    pub value: fn(&ServeConfig) -> Value,
}

/// Where a setting goes, and how it is told: at a place that holds it as it is given, or in words of its own.
macro_rules! place {
    (set $config:ident, $given:ident, at $($place:ident).+) => { $config.$($place).+ = $given };
    (set $config:ident, $given:ident, by |$c:ident, $v:ident| $set:expr, told |$t:ident| $told:expr) => {{
        let ($c, $v) = (&mut *$config, $given);
        $set
    }};
    (told $config:ident, at $($place:ident).+) => { ToJson::value(&$config.$($place).+) };
    (told $config:ident, by |$c:ident, $v:ident| $set:expr, told |$t:ident| $told:expr) => {{
        let $t = $config;
        ToJson::value(&$told)
    }};
}

/// A path as it is given: an empty one is none.
fn given_path(path: PathBuf) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then_some(path)
}

/// A path as it is told; nothing where there is none.
fn shown_path(path: &Option<PathBuf>) -> String {
    path.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
}

macro_rules! settings {
    ($( $(#[doc = $text:literal])+ $name:ident: $given:ty as $form:literal, $effect:ident, { $($place:tt)+ } )+) => {
        /// Every setting, given or not.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct GivenSettings {
            $( $(#[doc = $text])+ pub $name: Option<$given>, )+
            /// The same by the names of others; in a file only.
            pub replication: Option<GivenReplication>,
        }

        /// All settings, in the order in which they are explained.
        pub(crate) const ROWS: &[SettingRow] = &[ $( SettingRow {
            name: stringify!($name),
            text: concat!($($text, "\n"),+),
            effect: TakesEffect::$effect,
            form: $form,
            parsed: <$given>::parsed,
            value: |config| place!(told config, $($place)+),
        } ),+ ];

        impl GivenSettings {
            /// These settings, with what they leave open taken from `other`.
            #[must_use]
            pub fn or(self, other: Self) -> Self {
                Self {
                    $( $name: self.$name.or(other.$name), )+
                    replication: self.replication.or(other.replication),
                }
            }

            /// Sets in `config` what is given.
            pub(super) fn apply(self, config: &mut ServeConfig) {
                $( if let Some(given) = self.$name { place!(set config, given, $($place)+); } )+
            }
        }

        impl FromArgMatches for GivenSettings {
            fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
                Ok(Self {
                    $( $name: FromArgument::taken(matches, stringify!($name)), )+
                    replication: None,
                })
            }

            fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
                *self = Self::from_arg_matches(matches)?.or(std::mem::take(self));
                Ok(())
            }
        }
    };
}

settings! {
    /// This node's id, from 1 [default: 1 when no peers are given]
    ///
    /// It differs on every node, and is never reused.
    node_id: NodeId as "ID", Restart, { at node_id }
    /// Name of the cluster
    ///
    /// The same on all nodes. Nodes of differently named clusters refuse each other.
    cluster: String as "NAME", Restart, { at cluster }
    /// Directory for log, vote, snapshots and identity
    /// [default: $XDG_DATA_HOME/quorate/node-ID, else $HOME/.local/share/quorate/node-ID]
    ///
    /// What is in it was promised to the other nodes: never copy it, never empty it.
    data_dir: PathBuf as "DIR", Restart, { by |config, dir| config.data_dir = dir, told |config| config.data_dir.display().to_string() }
    /// Address to listen on for clients, gRPC and HTTP on one port
    client_listen: String as "HOST:PORT", Restart, { at client_listen }
    /// Address that clients are told to use [default: the listen address]
    client_advertise: String as "HOST:PORT", Restart, {
        by |config, address| config.client_advertise = Some(address),
        told |config| config.client_advertise.as_ref().unwrap_or(&config.client_listen).clone()
    }
    /// Address to listen on for followers without gRPC; empty for none [default: none]
    ///
    /// They follow what is applied over TCP, in frames; docs/FORMAT.md has the protocol. With tls_cert it speaks TLS, as the
    /// other port does.
    frames_listen: String as "HOST:PORT", Restart, {
        by |config, address| config.frames_listen = (!address.is_empty()).then_some(address),
        told |config| config.frames_listen.clone().unwrap_or_default()
    }
    /// PEM file with this node's certificate for clients, and its chain; with it the ports for clients speak TLS and nothing else
    ///
    /// `quorate cert` makes one. The file, and the next two, are read again when they change.
    tls_cert: PathBuf as "FILE", Restart, {
        by |config, path| config.tls.certificate = given_path(path), told |config| shown_path(&config.tls.certificate)
    }
    /// PEM file with the key of that
    tls_key: PathBuf as "FILE", Restart, {
        by |config, path| config.tls.key = given_path(path), told |config| shown_path(&config.tls.key)
    }
    /// PEM file with the authorities whose certificates are believed of clients
    tls_client_ca: PathBuf as "FILE", Restart, {
        by |config, path| config.tls.client_ca = given_path(path), told |config| shown_path(&config.tls.client_ca)
    }
    /// Whether clients must show a certificate: optional or required
    tls_client_auth: ClientCertificates as "WHETHER", Restart, { at tls.client_auth }
    /// Address to listen on for the other nodes
    ///
    /// Keep this port off networks that you do not trust, unless members prove to each other who they are: see peer_ca and
    /// peer_secret_file.
    peer_listen: String as "HOST:PORT", Restart, { at peer_listen }
    /// Address that the other nodes are told to use [default: this node's entry in the peers, else the listen address]
    peer_advertise: String as "HOST:PORT", Restart, { at peer_advertise }
    /// PEM file with the authorities whose certificates are believed of other members
    ///
    /// With peer_cert and peer_key: members prove by certificates who they are, and nobody reads along. `quorate cert` makes them. The
    /// files are read again when they change.
    peer_ca: PathBuf as "FILE", Restart, {
        by |config, path| config.peer_trust.ca = given_path(path), told |config| shown_path(&config.peer_trust.ca)
    }
    /// PEM file with this node's certificate for other members, and its chain
    peer_cert: PathBuf as "FILE", Restart, {
        by |config, path| config.peer_trust.certificate = given_path(path), told |config| shown_path(&config.peer_trust.certificate)
    }
    /// PEM file with the key of that
    peer_key: PathBuf as "FILE", Restart, {
        by |config, path| config.peer_trust.key = given_path(path), told |config| shown_path(&config.peer_trust.key)
    }
    /// File with a secret that all members share, in its first line, instead of certificates
    ///
    /// At least 16 bytes; `openssl rand -hex 32` makes one. A second line is a secret that is accepted, too, while one takes the
    /// place of the other. The file is read again when it changes.
    peer_secret_file: PathBuf as "FILE", Restart, {
        by |config, path| config.peer_trust.secret_file = given_path(path), told |config| shown_path(&config.peer_trust.secret_file)
    }
    /// The secret itself; a file is better
    ///
    /// On the command line it can be seen by other users for a moment: then the process replaces itself by one that has it in its
    /// environment.
    peer_secret: PeerSecret as "SECRET", Restart, {
        by |config, secret| config.peer_trust.secret = secret.given(),
        told |config| if config.peer_trust.secret.is_some() { "(set)" } else { "" }.to_owned()
    }
    /// Whether members have to prove who they are: off, optional or required [default: required where there is anything to prove it by, else off]
    ///
    /// optional is for the change from one to the other: it takes plain connections, too, and makes one where there is no other.
    peer_auth: PeerAuth as "WHETHER", Restart, {
        by |config, auth| config.peer_trust.auth = Some(auth), told |config| config.peer_trust.auth()
    }
    /// Wait until `quorate member add` or `member replace` takes this node into a cluster, and form none
    join: bool as "BOOL", Restart, { at join }
    /// Form a cluster of this node alone, on an empty data directory
    ///
    /// Leave it out again once other nodes have been added: should the directory be lost, the node must come back with
    /// join, and not form another cluster.
    single: bool as "BOOL", Restart, { at single }
    /// How to write the log to standard error: text for people, json for collectors
    log_format: LogFormat as "FORMAT", Restart, { at log_format }
    /// Milliseconds between a leader's heartbeats
    ///
    /// For a network whose round trip exceeds 40 ms: raise this and both election timeouts in the same proportion, on all
    /// nodes. At most a minute.
    heartbeat_interval_ms: u64 as "MS", Restart, { at timing.heartbeat_interval_ms }
    /// Shortest election timeout in milliseconds; at least twice the heartbeat interval
    election_timeout_min_ms: u64 as "MS", Restart, { at timing.election_timeout_min_ms }
    /// Longest election timeout in milliseconds; at most ten minutes
    election_timeout_max_ms: u64 as "MS", Restart, { at timing.election_timeout_max_ms }
    /// Bytes of log entries kept in memory for replication and apply
    log_tail_bytes: usize as "BYTES", Restart, { at limits.log_tail_bytes }
    /// Most bytes of log entries in one message to another node
    append_message_bytes: usize as "BYTES", Restart, { at limits.append_message_bytes }
    /// Disk space set aside for writes under way when the disk turns out to be full; 0 for none [default: auto]
    ///
    /// No writes are taken on while less than a quarter of this is free beside it. At least 32 MiB and five quarters of
    /// max_inflight_bytes, at most half of the file system. "auto" is 128 MiB, or an eighth of a file system smaller than
    /// 1 GiB; max_inflight_bytes, where it is not set, is then what fits.
    disk_reserve_bytes: ReserveBytes as "BYTES", Restart, {
        by |config, reserve| config.disk.reserve_bytes = reserve.given(),
        told |config| config.disk.reserve_bytes.map_or_else(|| Value::from("auto"), Value::from)
    }
    /// A write to the log that takes longer, in milliseconds, counts as a disk that hangs; 0 for never
    ///
    /// A leader hands over and takes no writes meanwhile. At most 30 s, after which the process ends.
    fsync_stall_ms: u64 as "MS", Restart, { at disk.stall_ms }
    /// A member counts as lagging when it has not answered the leader for this many milliseconds, or when the first
    /// entry that it lacks is older than that
    lagging_after_ms: u64 as "MS", Restart, { at peer_policy.lagging_after_ms }
    /// A member counts as disconnected when it has not answered the leader for this many milliseconds
    disconnected_after_ms: u64 as "MS", Restart, { at peer_policy.disconnected_after_ms }
    /// Longest pause, in milliseconds, between two attempts to connect to another member; at most a minute
    reconnect_interval_ms: u64 as "MS", Restart, { at peer_policy.reconnect_interval_ms }
    /// Memory that this node may use; 0 for all that the machine, the control group and the resource limits allow [default: 0]
    ///
    /// Buffers, history and what clients may make the node hold fit into it unless they are set, and the quota on the
    /// cluster's state follows the member with the least. Give nodes that share a machine their shares.
    memory_bytes: u64 as "BYTES", Restart, {
        by |config, bytes| config.memory_bytes = (bytes != 0).then_some(bytes),
        told |config| config.memory_bytes.unwrap_or_default()
    }
    /// Host names that requests may call this node by, beside addresses, localhost and the names that it listens on and
    /// advertises
    ///
    /// A browser can be made to send requests to any address that its user can reach. So a request must call the node by
    /// a name that it knows: those of load balancers and the like are allowed here. *.example.com stands for all below it, * for
    /// every name.
    allowed_hosts: Vec<String> as "NAMES", Restart, { at door.allowed_hosts }
    /// Origins whose pages may use this node from a browser, such as https://console.example.com
    allowed_origins: Vec<String> as "ORIGINS", Restart, { at door.allowed_origins }
    /// File that says who may do what: by the hash of a token, or the name in a certificate
    ///
    /// With it, or with jwt_keys, callers are asked for a credential, and each may do what is granted to it; docs/SECURITY.md has the form.
    /// It is read again when it changes. `quorate token create` makes a token and its entry.
    tokens_file: PathBuf as "FILE", Restart, {
        by |config, path| config.door.auth.tokens_file = named(path),
        told |config| shown(&config.door.auth.tokens_file)
    }
    /// File of the keys that sign tokens (JWT): a set of keys (JWKS) of Ed25519 and HMAC, or a public key as PEM
    ///
    /// It is read again when it changes; what was signed by a key that is gone is not taken any more.
    jwt_keys: PathBuf as "FILE", Restart, {
        by |config, path| config.door.auth.jwt_keys = named(path),
        told |config| shown(&config.door.auth.jwt_keys)
    }
    /// For whom a signed token must be meant (`aud`) [default: none]
    jwt_audience: String as "NAME", Restart, {
        by |config, name| config.door.auth.jwt_audience = (!name.is_empty()).then_some(name),
        told |config| config.door.auth.jwt_audience.clone().unwrap_or_default()
    }
    /// Who must have issued a signed token (`iss`) [default: anyone with a key]
    jwt_issuer: String as "NAME", Restart, {
        by |config, name| config.door.auth.jwt_issuer = (!name.is_empty()).then_some(name),
        told |config| config.door.auth.jwt_issuer.clone().unwrap_or_default()
    }
    /// Milliseconds that the clock of an issuer may be from this node's; at most ten minutes
    jwt_leeway_ms: u64 as "MS", Restart, {
        by |config, ms| config.door.auth.jwt_leeway = Duration::from_millis(ms),
        told |config| whole_ms(config.door.auth.jwt_leeway)
    }
    /// Listen on other addresses than loopback ones although whoever reaches them may do everything
    ///
    /// For networks that only those can use who may.
    insecure: bool as "BOOL", Restart, { at insecure }
    /// Most connections of clients; 0 for half of the files that the process may open beside its own [default: 0]
    ///
    /// When all are busy there are 8 more for probes and operators; when some are idle, the one that has been idle for
    /// the longest gives way.
    max_connections: usize as "N", Restart, {
        by |config, most| config.door.limits.connections = (most != 0).then_some(most),
        told |config| config.door.limits.connections.unwrap_or_default()
    }
    /// Most watches on one connection
    max_connection_watches: usize as "N", Restart, { at door.limits.watches.each }
    /// Most watches in all
    max_watches: usize as "N", Restart, { at door.limits.watches.all }
    /// Bytes of answers that one connection does not take before others on it wait
    ///
    /// A connection that takes nothing for 30 s while others wait is closed.
    max_connection_unsent_bytes: usize as "BYTES", Restart, { at door.limits.unsent_bytes.each }
    /// The same of all connections
    ///
    /// Unless it is set to something else, at most a sixteenth of the node's memory, and half of that for one connection.
    /// So are the next two of their kind.
    max_unsent_bytes: usize as "BYTES", Restart, { at door.limits.unsent_bytes.all }
    /// Most bytes of requests on one connection that have not arrived as a whole; more are refused
    max_connection_unfinished_bytes: usize as "BYTES", Restart, { at door.limits.unfinished_bytes.each }
    /// The same on all connections
    max_unfinished_bytes: usize as "BYTES", Restart, { at door.limits.unfinished_bytes.all }
    /// Bytes of answers that wait on one pipeline before it is not read any more
    max_pipeline_queued_bytes: usize as "BYTES", Restart, { at door.limits.queued_bytes.each }
    /// The same on all pipelines
    max_queued_bytes: usize as "BYTES", Restart, { at door.limits.queued_bytes.all }
    /// What to log: off, error, warn, info, debug, trace, or a filter such as info,quorate=debug
    ///
    /// quorate::write=trace shows every single write on its way. A filter that says nothing of this program is refused.
    log_level: String as "FILTER", Live, { at log_level }
    /// Prefer to lead: take the lead, from a node that does not prefer it, once this one has caught up
    preferred_leader: bool as "BOOL", Live, { at preferred_leader }
    /// Take a snapshot after this many log entries; at most 1000000000
    snapshot_every_entries: u64 as "N", Live, { at snapshots.every_entries }
    /// Take a snapshot after this many bytes of commands; at most 1 TiB
    snapshot_every_bytes: u64 as "BYTES", Live, { at snapshots.every_bytes }
    /// Log entries kept behind a snapshot, for followers that are a little behind
    snapshot_keep_entries: u64 as "N", Live, { at snapshots.keep_entries }
    /// Bytes of commands kept behind a snapshot
    ///
    /// No more is kept than both allow.
    snapshot_keep_bytes: u64 as "BYTES", Live, { at snapshots.keep_bytes }
    /// Most bytes of a snapshot that this node sends in a second, to each that needs one; 0 for as many as there can be
    ///
    /// For links that a snapshot must not fill. A follower that is sent one at 1 MiB/s is away for as long as that takes.
    snapshot_bytes_per_second: u64 as "BYTES", Live, { at snapshots.send_bytes_per_second }
    /// Operations kept on disk for those who follow what is applied
    ///
    /// How far back a follower may begin, or fall behind, without being sent the whole state: as far as this, the bytes and the age
    /// allow. `quorate status` and /metrics show how far that is.
    event_log_operations: u64 as "N", Live, { at event_log.operations }
    /// Most bytes of them; unless it is set to something else, at most a sixteenth of the file system
    event_log_bytes: u64 as "BYTES", Live, { at event_log.bytes }
    /// How old they may be, in milliseconds; 0 for any age
    event_log_age_ms: u64 as "MS", Live, { at event_log.age_ms }
    /// Largest encoded command in bytes; at most 4 MiB
    max_command_bytes: usize as "BYTES", Live, { at limits.max_command_bytes }
    /// Most bytes of commands proposed and not yet applied; more are refused as overloaded; at most 16 GiB
    ///
    /// While the node runs this and max_command_bytes can be lowered, and raised again up to what it was started with.
    max_inflight_bytes: usize as "BYTES", Live, { at limits.max_inflight_bytes }
    /// Founding members, this node included, as 1=HOST:PORT,2=HOST:PORT,… with their peer addresses
    ///
    /// Used once, to form the cluster, and later only to find members that the cluster's own list of addresses does not
    /// lead to.
    peers: Peers as "PEERS", Restart, { by |config, peers| config.peers = peers.0, told |config| Peers(config.peers.clone()).to_string() }
}
