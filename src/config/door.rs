//! The settings of the client port: what callers may make a node hold, what it may be called, how much can be watched.

use serde_json::Value;

use super::{ConfigError, ServeConfig, Settings, invalid};
use crate::door::limits::{Bound, DoorLimits};
use crate::engine::memory_share_bytes;
use crate::kv::settings::{self, HistoryLimits};
use crate::node::Names;

/// What is set for the client port.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct DoorConfig {
    /// Names that requests may call the node by, beside those that it listens on and advertises.
    pub allowed_hosts: Vec<String>,
    /// Origins whose pages may use the node.
    pub allowed_origins: Vec<String>,
    /// What callers may make the node hold.
    pub limits: DoorLimits,
    /// How much of the latest changes is kept for watches.
    pub history: HistoryLimits,
}

impl DoorConfig {
    pub(super) fn of(settings: &Settings) -> Self {
        let (limits, history) = (DoorLimits::default(), HistoryLimits::default());
        let bound = |each: Option<usize>, all: Option<usize>, default: Bound| Bound {
            each: each.unwrap_or(default.each),
            all: all.unwrap_or(default.all),
        };
        Self {
            allowed_hosts: settings.allowed_hosts.clone().unwrap_or_default(),
            allowed_origins: settings.allowed_origins.clone().unwrap_or_default(),
            limits: DoorLimits {
                connections: settings.max_connections.filter(|connections| *connections > 0),
                watches: bound(settings.max_connection_watches, settings.max_watches, limits.watches),
                unsent_bytes: bound(
                    settings.max_connection_unsent_bytes,
                    settings.max_unsent_bytes,
                    limits.unsent_bytes,
                ),
                unfinished_bytes: bound(
                    settings.max_connection_unfinished_bytes,
                    settings.max_unfinished_bytes,
                    limits.unfinished_bytes,
                ),
                queued_bytes: bound(
                    settings.max_pipeline_queued_bytes,
                    settings.max_queued_bytes,
                    limits.queued_bytes,
                ),
            },
            history: HistoryLimits {
                events: settings.history_events.unwrap_or(history.events),
                bytes: settings.history_bytes.unwrap_or(history.bytes),
                age_ms: settings.history_age_ms.unwrap_or(history.age_ms),
            },
        }
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let flag = |refusal: String| invalid(format!("--{}", refusal.replace('_', "-")));
        self.limits.validate().map_err(flag)?;
        settings::validate(&self.history).map_err(flag)?;
        for host in &self.allowed_hosts {
            if host.is_empty() || host.contains([':', '/', ' ']) {
                return Err(invalid(format!(
                    "--allowed-hosts \"{host}\" is no host name; give names without ports, such as quorate.example.com"
                )));
            }
        }
        for origin in &self.allowed_origins {
            if origin != "*" && !origin.starts_with("http://") && !origin.starts_with("https://") {
                return Err(invalid(format!(
                    "--allowed-origins \"{origin}\" is no origin; give it as https://console.example.com"
                )));
            }
        }
        Ok(())
    }

    /// Refuses bounds that were set to more than the `memory` that the node may use: they would bound nothing.
    pub(super) fn check_memory(&self, memory: u64) -> Result<(), ConfigError> {
        let (usual, history) = (DoorLimits::default(), HistoryLimits::default());
        let set = [
            ("--max-unsent-bytes", self.limits.unsent_bytes.all, usual.unsent_bytes.all),
            ("--max-unfinished-bytes", self.limits.unfinished_bytes.all, usual.unfinished_bytes.all),
            ("--max-queued-bytes", self.limits.queued_bytes.all, usual.queued_bytes.all),
            ("--history-bytes", self.history.bytes, history.bytes),
        ];
        match set.into_iter().find(|(_, bytes, usual)| bytes != usual && *bytes as u64 > memory) {
            None => Ok(()),
            Some((flag, bytes, _)) => Err(invalid(format!(
                "{flag} ({bytes}) is more than the {memory} bytes of memory that this node may use; set less"
            ))),
        }
    }

    /// Has what nobody set, and is what it is by default, fit `memory` bytes.
    pub(super) fn fit(&mut self, memory: u64) {
        /// A watch that pauses for a moment finds where it was.
        const MIN_HISTORY_BYTES: usize = 4 * 1024 * 1024;
        self.limits.fit(memory);
        let usual = HistoryLimits::default().bytes;
        if self.history.bytes == usual {
            self.history.bytes = memory_share_bytes(memory, usual, MIN_HISTORY_BYTES);
        }
    }

    /// The present value of setting `name`, if it is one of these.
    pub(super) fn setting(&self, name: &str) -> Option<Value> {
        let Self { allowed_hosts, allowed_origins, limits, history } = self;
        Some(match name {
            "allowed_hosts" => allowed_hosts.clone().into(),
            "allowed_origins" => allowed_origins.clone().into(),
            "max_connections" => limits.connections.unwrap_or_default().into(),
            "max_connection_watches" => limits.watches.each.into(),
            "max_watches" => limits.watches.all.into(),
            "max_connection_unsent_bytes" => limits.unsent_bytes.each.into(),
            "max_unsent_bytes" => limits.unsent_bytes.all.into(),
            "max_connection_unfinished_bytes" => limits.unfinished_bytes.each.into(),
            "max_unfinished_bytes" => limits.unfinished_bytes.all.into(),
            "max_pipeline_queued_bytes" => limits.queued_bytes.each.into(),
            "max_queued_bytes" => limits.queued_bytes.all.into(),
            "history_events" => history.events.into(),
            "history_bytes" => history.bytes.into(),
            "history_age_ms" => history.age_ms.into(),
            _ => return None,
        })
    }

    /// These, where they are given, else `other`'s.
    pub(super) fn or(settings: Settings, other: &Settings) -> Settings {
        let (own, other) = (settings, other);
        Settings {
            allowed_hosts: own.allowed_hosts.or_else(|| other.allowed_hosts.clone()),
            allowed_origins: own.allowed_origins.or_else(|| other.allowed_origins.clone()),
            max_connections: own.max_connections.or(other.max_connections),
            max_connection_watches: own.max_connection_watches.or(other.max_connection_watches),
            max_watches: own.max_watches.or(other.max_watches),
            max_connection_unsent_bytes: own
                .max_connection_unsent_bytes
                .or(other.max_connection_unsent_bytes),
            max_unsent_bytes: own.max_unsent_bytes.or(other.max_unsent_bytes),
            max_connection_unfinished_bytes: own
                .max_connection_unfinished_bytes
                .or(other.max_connection_unfinished_bytes),
            max_unfinished_bytes: own.max_unfinished_bytes.or(other.max_unfinished_bytes),
            max_pipeline_queued_bytes: own.max_pipeline_queued_bytes.or(other.max_pipeline_queued_bytes),
            max_queued_bytes: own.max_queued_bytes.or(other.max_queued_bytes),
            history_events: own.history_events.or(other.history_events),
            history_bytes: own.history_bytes.or(other.history_bytes),
            history_age_ms: own.history_age_ms.or(other.history_age_ms),
            ..own
        }
    }
}

impl ServeConfig {
    /// What requests may call the node: what is allowed, where it listens and what it advertises. The name of the machine
    /// is known, too.
    pub(crate) fn names(&self) -> Names {
        let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let hosts = self.door.allowed_hosts.iter().cloned().chain([machine.trim().to_owned()]);
        let names =
            Names::new(hosts.filter(|host| !host.is_empty()), self.door.allowed_origins.iter().cloned());
        let names = names.and_host_of(&self.client_listen);
        self.client_advertise.iter().fold(names, |names, address| names.and_host_of(address))
    }
}
