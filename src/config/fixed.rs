//! The settings that only a restart changes, for those who ask a running node.

use clap::ValueEnum;
use serde_json::Value;

use super::{Peers, ServeConfig};

/// The settings of the configuration file that take effect when the node is started: all but
/// [those](crate::node::settings::CHANGEABLE) that can change while it runs.
pub(super) const NEED_RESTART: [&str; 36] = [
    "node_id",
    "cluster",
    "data_dir",
    "client_listen",
    "client_advertise",
    "peer_listen",
    "peer_advertise",
    "peers",
    "join",
    "single",
    "log_format",
    "heartbeat_interval_ms",
    "election_timeout_min_ms",
    "election_timeout_max_ms",
    "log_tail_bytes",
    "append_message_bytes",
    "disk_reserve_bytes",
    "fsync_stall_ms",
    "lagging_after_ms",
    "disconnected_after_ms",
    "reconnect_interval_ms",
    "memory_bytes",
    "allowed_hosts",
    "allowed_origins",
    "max_connections",
    "max_connection_watches",
    "max_watches",
    "max_connection_unsent_bytes",
    "max_unsent_bytes",
    "max_connection_unfinished_bytes",
    "max_unfinished_bytes",
    "max_pipeline_queued_bytes",
    "max_queued_bytes",
    "history_events",
    "history_bytes",
    "history_age_ms",
];

impl ServeConfig {
    /// The settings that take effect when the node is started, by their names in the configuration file and with the
    /// values that the node was started with, defaults included. Addresses are as configured: a free port is 0.
    pub(crate) fn fixed_settings(&self) -> Vec<(&'static str, Value)> {
        NEED_RESTART.into_iter().map(|name| (name, self.fixed_setting(name))).collect()
    }

    fn fixed_setting(&self, name: &str) -> Value {
        match name {
            "node_id" => self.node_id.into(),
            "cluster" => self.cluster.clone().into(),
            "data_dir" => self.data_dir.display().to_string().into(),
            "client_listen" => self.client_listen.clone().into(),
            "client_advertise" => {
                self.client_advertise.as_ref().unwrap_or(&self.client_listen).clone().into()
            }
            "peer_listen" => self.peer_listen.clone().into(),
            "peer_advertise" => self.peer_advertise.clone().into(),
            "peers" => Peers(self.peers.clone()).to_string().into(),
            "join" => self.join.into(),
            "single" => self.single.into(),
            "log_format" => {
                self.log_format.to_possible_value().map(|format| format.get_name().to_owned()).into()
            }
            "heartbeat_interval_ms" => self.timing.heartbeat_interval_ms.into(),
            "election_timeout_min_ms" => self.timing.election_timeout_min_ms.into(),
            "election_timeout_max_ms" => self.timing.election_timeout_max_ms.into(),
            "log_tail_bytes" => self.limits.log_tail_bytes.into(),
            "append_message_bytes" => self.limits.append_message_bytes.into(),
            "disk_reserve_bytes" => self.disk.reserve_bytes.map_or_else(|| "auto".into(), Value::from),
            "fsync_stall_ms" => self.disk.stall_ms.into(),
            "lagging_after_ms" => self.peer_policy.lagging_after_ms.into(),
            "disconnected_after_ms" => self.peer_policy.disconnected_after_ms.into(),
            "reconnect_interval_ms" => self.peer_policy.reconnect_interval_ms.into(),
            "memory_bytes" => self.memory_bytes.unwrap_or_default().into(),
            other => self.door.setting(other).unwrap_or_else(|| {
                unreachable!("invariant: {other} is among the settings that need a restart")
            }),
        }
    }
}
