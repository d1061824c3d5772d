//! The settings of the client port: what callers may make a node hold, what it may be called, whom it serves.

use std::path::PathBuf;
use std::time::Duration;

use super::{ServeConfig, SettingsError, invalid};
use crate::door::ClientAuth;
use crate::door::limits::DoorLimits;
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
    /// What callers are identified by.
    pub auth: ClientAuth,
}

/// The file that was given; an empty name is none.
pub(super) fn named(path: PathBuf) -> Option<PathBuf> {
    Some(path).filter(|path| !path.as_os_str().is_empty())
}

/// The same as it is told.
pub(super) fn shown(path: &Option<PathBuf>) -> String {
    path.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
}

/// Further apart no two clocks are that can be used.
const MAX_LEEWAY: Duration = Duration::from_mins(10);

impl DoorConfig {
    pub(super) fn validate(&self) -> Result<(), SettingsError> {
        let flag = |refusal: String| invalid(format!("--{}", refusal.replace('_', "-")));
        self.limits.validate().map_err(flag)?;
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
        let ClientAuth { jwt_keys, jwt_audience, jwt_issuer, jwt_leeway, .. } = &self.auth;
        if jwt_keys.is_none() && (jwt_audience.is_some() || jwt_issuer.is_some()) {
            return Err(invalid(
                "--jwt-audience and --jwt-issuer are asked of tokens that are signed by keys; name them with --jwt-keys",
            ));
        }
        if *jwt_leeway > MAX_LEEWAY {
            return Err(invalid("--jwt-leeway-ms must be ten minutes at most; have the clocks agree"));
        }
        Ok(())
    }

    /// Refuses bounds that were set to more than the `memory` that the node may use: they would bound nothing.
    pub(super) fn check_memory(&self, memory: u64) -> Result<(), SettingsError> {
        let usual = DoorLimits::default();
        let set = [
            ("--max-unsent-bytes", self.limits.unsent_bytes.all, usual.unsent_bytes.all),
            ("--max-unfinished-bytes", self.limits.unfinished_bytes.all, usual.unfinished_bytes.all),
            ("--max-queued-bytes", self.limits.queued_bytes.all, usual.queued_bytes.all),
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
        self.limits.fit(memory);
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
