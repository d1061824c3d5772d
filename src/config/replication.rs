//! Settings by the names that users of other replication systems know: the section `replication` of a configuration file, and variables
//! `REPLICATION_*` of the environment, which win over the file.
//!
//! Each of them is translated into the setting that it means here, or changes nothing, and the log says at the start which. A setting of this
//! program that is given as well, from wherever, has the last word. `docs/OPERATIONS.md` has the table.

use std::ffi::OsString;
use std::fmt::{self, Display};
use std::time::Duration;

use serde::Deserialize;

use super::table::GivenSettings;
use super::{SettingsError, check_address, invalid};
use crate::shown::Shown;

/// Longest time, in seconds, between two signs of life of a source.
const MAX_HEARTBEAT_SECS: u64 = 3600;
/// Longest silence after which a source is given up.
const MAX_TIMEOUT_SECS: u64 = 7 * 24 * 3600;
/// Longest pause before the first new attempt to reach a source; pauses after it double up to this.
const MAX_RECONNECT_SECS: u64 = 60;
/// Fewest and most operations of the log of those who follow.
const LOG_SIZES: (u64, u64) = (1_000, 1_000_000_000_000);

/// What a node is to be, in the words of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GivenRole {
    /// A member of a cluster, and its leader if possible.
    #[serde(alias = "primary")]
    Master,
    /// One that follows, outside the quorum.
    Replica,
    /// One by itself.
    Standalone,
}

impl GivenRole {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "master" | "primary" => Some(Self::Master),
            "replica" => Some(Self::Replica),
            "standalone" => Some(Self::Standalone),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Master => "master",
            Self::Replica => "replica",
            Self::Standalone => "standalone",
        }
    }
}

/// The section `replication`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GivenReplication {
    /// Whether others are to be followed, or to follow. False: as [`GivenRole::Standalone`].
    pub enabled: Option<bool>,
    /// What the node is to be.
    pub role: Option<GivenRole>,
    /// Where it listens for clients and for those who follow it.
    pub bind_address: Option<String>,
    /// What a replica follows: a member's client address, or several with commas between them.
    pub master_address: Option<String>,
    /// How often a replica wants to hear from its source.
    pub heartbeat_interval_secs: Option<u64>,
    /// After how much silence a replica gives its sources up, and a member counts as disconnected.
    pub replica_timeout_secs: Option<u64>,
    /// Operations kept for those who follow.
    pub log_size: Option<u64>,
    /// The pause before a replica tries its sources again for the first time.
    pub reconnect_interval_secs: Option<u64>,
}

/// What became of one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TranslatedSetting {
    name: &'static str,
    given: String,
    outcome: String,
}

impl Display for TranslatedSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "replication.{} = {} {}", self.name, Shown(&self.given), self.outcome)
    }
}

/// What a node is to follow that is a replica, and how. What is not said is left to whoever runs it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ReplicaWishes {
    /// Client addresses of members.
    pub(crate) sources: Vec<String>,
    /// How often a source is to say that it is there.
    pub(crate) heartbeat: Option<Duration>,
    /// How long all sources may be silent.
    pub(crate) patience: Option<Duration>,
    /// The first pause after that.
    pub(crate) first_pause: Option<Duration>,
}

/// What the names of others have led to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Translation {
    /// For the log, one line each.
    pub(crate) lines: Vec<TranslatedSetting>,
    /// There if the node is to be a replica.
    pub(crate) replica: Option<ReplicaWishes>,
}

impl Translation {
    /// Says in the log what became of each.
    pub(crate) fn log(&self) {
        for line in &self.lines {
            tracing::info!("{line}");
        }
    }

    /// A flag of the program says what `name` was for.
    pub(crate) fn overrule(&mut self, name: &str, flag: &str) {
        for line in self.lines.iter_mut().filter(|line| line.name == name) {
            line.outcome = own_wins(flag);
        }
    }

    fn say(&mut self, name: &'static str, given: impl Display, outcome: impl Into<String>) {
        self.lines.push(TranslatedSetting { name, given: given.to_string(), outcome: outcome.into() });
    }

    /// Has `given` be the setting `own`, unless that is given.
    fn set<T: Display, U>(
        &mut self,
        (name, given): (&'static str, T),
        own: &'static str,
        place: &mut Option<U>,
        meant: U,
    ) {
        match place {
            Some(_) => self.say(name, given, own_wins(own)),
            None => {
                *place = Some(meant);
                self.say(name, given, format!("sets {own}"));
            }
        }
    }
}

/// What is said of a name whose setting is given by its own.
fn own_wins(own: &str) -> String {
    format!("changes nothing: {own} is given, which has the last word")
}

impl GivenReplication {
    /// What the environment says, of which `variable` shows one.
    ///
    /// # Errors
    /// [`SettingsError::Invalid`] with what is allowed.
    pub(crate) fn from_environment(
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, SettingsError> {
        let text = |name: &'static str| match variable(name).map(OsString::into_string) {
            None => Ok(None),
            // An empty variable is how many supervisors leave one out.
            Some(Ok(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
            Some(Err(_)) => Err(invalid(format!("{name} is no text"))),
        };
        let number = |name: &'static str, what: &str| {
            let parsed = text(name)?.map(|text| {
                let refused =
                    || invalid(format!("{name} must be a whole number of {what}, not \"{}\"", Shown(&text)));
                text.parse::<u64>().map_err(|_| refused())
            });
            parsed.transpose()
        };
        let role = |text: String| {
            let refused = || {
                invalid(format!(
                    "REPLICATION_ROLE must be master, replica or standalone, not \"{}\"",
                    Shown(&text)
                ))
            };
            GivenRole::parse(&text).ok_or_else(refused)
        };
        Ok(Self {
            enabled: None,
            role: text("REPLICATION_ROLE")?.map(role).transpose()?,
            bind_address: text("REPLICATION_BIND_ADDRESS")?,
            master_address: text("REPLICATION_MASTER_ADDRESS")?,
            heartbeat_interval_secs: number("REPLICATION_HEARTBEAT_INTERVAL", "seconds")?,
            replica_timeout_secs: None,
            log_size: number("REPLICATION_LOG_SIZE", "operations")?,
            reconnect_interval_secs: number("REPLICATION_RECONNECT_INTERVAL", "seconds")?,
        })
    }

    /// These, with what they leave open taken from `other`.
    #[must_use]
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            enabled: self.enabled.or(other.enabled),
            role: self.role.or(other.role),
            bind_address: self.bind_address.or(other.bind_address),
            master_address: self.master_address.or(other.master_address),
            heartbeat_interval_secs: self.heartbeat_interval_secs.or(other.heartbeat_interval_secs),
            replica_timeout_secs: self.replica_timeout_secs.or(other.replica_timeout_secs),
            log_size: self.log_size.or(other.log_size),
            reconnect_interval_secs: self.reconnect_interval_secs.or(other.reconnect_interval_secs),
        }
    }

    /// Refuses what cannot work.
    fn check(&self) -> Result<(), SettingsError> {
        if let Some(address) = &self.bind_address {
            check_address("replication.bind_address", address)?;
        }
        for source in self.sources() {
            let parsed = check_address("replication.master_address", &source)?;
            if parsed.is_unspecified() || parsed.port == 0 {
                return Err(invalid(format!(
                    "replication.master_address \"{}\" is nothing that can be connected to; write HOST:PORT of a member's client port",
                    Shown(&source)
                )));
            }
        }
        let (least, most) = LOG_SIZES;
        let numbers = [
            ("heartbeat_interval_secs", self.heartbeat_interval_secs, 1, MAX_HEARTBEAT_SECS),
            ("replica_timeout_secs", self.replica_timeout_secs, 2, MAX_TIMEOUT_SECS),
            ("log_size", self.log_size, least, most),
            ("reconnect_interval_secs", self.reconnect_interval_secs, 1, MAX_RECONNECT_SECS),
        ];
        for (name, given, least, most) in numbers {
            if let Some(given) = given.filter(|given| !(least..=most).contains(given)) {
                return Err(invalid(format!("replication.{name} ({given}) must be from {least} to {most}")));
            }
        }
        match (self.heartbeat_interval_secs, self.replica_timeout_secs) {
            (Some(heartbeat), Some(timeout)) if timeout <= heartbeat => Err(invalid(format!(
                "replication.replica_timeout_secs ({timeout}) must be more than heartbeat_interval_secs ({heartbeat})"
            ))),
            _ => Ok(()),
        }
    }

    fn sources(&self) -> Vec<String> {
        let sources = self.master_address.iter().flat_map(|addresses| addresses.split(','));
        sources.map(|source| source.trim().to_owned()).collect()
    }

    /// Sets in `settings` what these mean to `quorate serve`.
    ///
    /// # Errors
    /// [`SettingsError::Invalid`] with what is allowed.
    pub(crate) fn translate(self, settings: &mut GivenSettings) -> Result<Translation, SettingsError> {
        self.check()?;
        let mut told = Translation::default();
        let role = if self.enabled == Some(false) { Some(GivenRole::Standalone) } else { self.role };
        if let Some(enabled) = self.enabled {
            let outcome = match enabled {
                true => "changes nothing: a node always replicates",
                false => "is read as the role standalone, whatever the role",
            };
            told.say("enabled", enabled, outcome);
        }
        let membership = membership(settings);
        match (role, membership) {
            (Some(GivenRole::Replica), None) => {
                if self.master_address.is_none() {
                    return Err(invalid(
                        "replication.role is replica, and replication.master_address does not say what to follow; set it to HOST:PORT of a member's client port",
                    ));
                }
                told.say("role", "replica", "has this process be a replica, as quorate replica does");
                self.of_replica(settings, &mut told);
            }
            (role, membership) => {
                if let Some(role) = role {
                    of_role(role, membership, settings, &mut told);
                }
                self.of_member(settings, &mut told);
            }
        }
        Ok(told)
    }

    /// Sets in `settings` what these mean to `quorate replica`.
    ///
    /// # Errors
    /// [`SettingsError::Invalid`] with what is allowed.
    pub(crate) fn translate_for_replica(
        self,
        settings: &mut GivenSettings,
    ) -> Result<Translation, SettingsError> {
        self.check()?;
        let mut told = Translation::default();
        let runs = "changes nothing: quorate replica runs a replica";
        if let Some(enabled) = self.enabled {
            told.say("enabled", enabled, runs);
        }
        if let Some(role) = self.role {
            told.say("role", role.name(), runs);
        }
        self.of_replica(settings, &mut told);
        Ok(told)
    }

    fn of_replica(self, settings: &mut GivenSettings, told: &mut Translation) {
        let mut wishes = ReplicaWishes { sources: self.sources(), ..ReplicaWishes::default() };
        self.shared(settings, told);
        if let Some(addresses) = &self.master_address {
            told.say("master_address", addresses, "is what this replica follows");
        }
        let seconds = [
            (
                "heartbeat_interval_secs",
                self.heartbeat_interval_secs,
                &mut wishes.heartbeat,
                "is how often a source is to say that it is there",
            ),
            (
                "replica_timeout_secs",
                self.replica_timeout_secs,
                &mut wishes.patience,
                "is the silence after which a source is given up",
            ),
            (
                "reconnect_interval_secs",
                self.reconnect_interval_secs,
                &mut wishes.first_pause,
                "is the first pause before sources are tried again; each further one is twice as long, up to 60 s",
            ),
        ];
        for (name, given, place, outcome) in seconds {
            if let Some(given) = given {
                *place = Some(Duration::from_secs(given));
                told.say(name, given, outcome);
            }
        }
        told.replica = Some(wishes);
    }

    fn of_member(self, settings: &mut GivenSettings, told: &mut Translation) {
        self.shared(settings, told);
        if let Some(addresses) = &self.master_address {
            told.say("master_address", addresses, "changes nothing: a member follows whoever is elected");
        }
        if let Some(given) = self.heartbeat_interval_secs {
            let outcome = "changes nothing: those who follow say themselves how often they want to hear from this node, and the heartbeats between members are heartbeat_interval_ms, by which leaders are elected";
            told.say("heartbeat_interval_secs", given, outcome);
        }
        if let Some(given) = self.replica_timeout_secs {
            let named = ("replica_timeout_secs", given);
            told.set(named, "disconnected_after_ms", &mut settings.disconnected_after_ms, given * 1000);
        }
        if let Some(given) = self.reconnect_interval_secs {
            let outcome = "changes nothing: it is for replicas; between members it is reconnect_interval_ms";
            told.say("reconnect_interval_secs", given, outcome);
        }
    }

    /// What is the same for both.
    fn shared(&self, settings: &mut GivenSettings, told: &mut Translation) {
        if let Some(address) = &self.bind_address {
            let named = ("bind_address", address);
            told.set(named, "client_listen", &mut settings.client_listen, address.clone());
        }
        if let Some(size) = self.log_size {
            let named = ("log_size", size);
            told.set(named, "event_log_operations", &mut settings.event_log_operations, size);
        }
    }
}

/// The setting that makes the node a member, if one is given.
fn membership(settings: &GivenSettings) -> Option<&'static str> {
    [
        ("peers", settings.peers.is_some()),
        ("join", settings.join == Some(true)),
        ("single", settings.single == Some(true)),
    ]
    .into_iter()
    .find_map(|(name, is_given)| is_given.then_some(name))
}

/// What `role` means to a member, of which `membership` says whose.
fn of_role(
    role: GivenRole,
    membership: Option<&'static str>,
    settings: &mut GivenSettings,
    told: &mut Translation,
) {
    match (role, membership) {
        (GivenRole::Replica, own) => {
            let own = own.unwrap_or_default();
            told.say(
                "role",
                role.name(),
                format!("changes nothing: {own} is given, so this node is a member"),
            );
        }
        (GivenRole::Standalone, Some(own)) => told.say("role", role.name(), own_wins(own)),
        (GivenRole::Master, Some(_)) => {
            let named = ("role", role.name());
            told.set(named, "preferred_leader", &mut settings.preferred_leader, true);
        }
        (GivenRole::Master | GivenRole::Standalone, None) => {
            // A switch that was turned off by its own name stays off.
            told.set(("role", role.name()), "single", &mut settings.single, true);
        }
    }
}
