//! Settings of the running node, by the names they have in its configuration file.
//!
//! Those that can change are the engine's, and the log's filter, which belongs to the process: whoever set up the log
//! hands over a [`LogLevel`]. A change takes effect at once, on this node only, until the node stops. Of several
//! settings in one request either all change or none: everything is parsed and checked before anything
//! is changed, and requests take turns.
//!
//! One setting is the cluster's: [`STATE_QUOTA`] goes through the log, to all nodes and for good, so it is changed at the
//! leader and by itself.
//!
//! The others are the process's: it tells the server what it was started with, to be shown beside those that can change.

use std::fmt;
use std::sync::{Arc, Mutex};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, ParseError, Targets};

use super::operated::OperatedNode;
use crate::door::failure;
use crate::engine::{QuotaError, Settings};
use crate::proto::v1::{self, Failure};
use crate::shown::Shown;

pub(super) const LOG_LEVEL: &str = "log_level";

/// A setting of the engine that can change while it runs.
pub(super) struct Live {
    name: &'static str,
    value: fn(&Settings) -> Value,
    /// What setting it to a text does.
    change: fn(&str) -> Result<SettingsChange, Refused>,
}

type SettingsChange = Box<dyn FnOnce(&mut Settings) + Send>;

macro_rules! live {
    ($($name:ident: $read:ident at $($place:ident).+;)+) => {
        const LIVE: &[Live] = &[$( Live {
            name: stringify!($name),
            value: |settings| settings.$($place).+.into(),
            change: |text| {
                let given = $read(stringify!($name), text)?;
                Ok(Box::new(move |settings| settings.$($place).+ = given))
            },
        } ),+];

        /// The settings that can change while a node runs, by their names in the configuration file.
        pub(crate) const CHANGEABLE: &[&str] = &[$( stringify!($name), )+ LOG_LEVEL];
    };
}

live! {
    snapshot_every_entries: whole_number at snapshots.every_entries;
    snapshot_every_bytes: whole_number at snapshots.every_bytes;
    snapshot_keep_entries: whole_number at snapshots.keep_entries;
    snapshot_keep_bytes: whole_number at snapshots.keep_bytes;
    snapshot_bytes_per_second: whole_number at snapshots.send_bytes_per_second;
    event_log_operations: whole_number at event_log.operations;
    event_log_bytes: whole_number at event_log.bytes;
    event_log_age_ms: whole_number at event_log.age_ms;
    max_command_bytes: size at max_command_bytes;
    max_inflight_bytes: size at max_inflight_bytes;
    preferred_leader: yes_or_no at preferred_leader;
}

/// The quota on the state, in bytes; 0 for what the memory of the smallest member allows. The cluster's, and in no
/// configuration file.
pub(crate) const STATE_QUOTA: &str = "state_quota_bytes";

/// Most settings in one request; more than there are makes no sense.
const MAX_CHANGES: usize = 64;

/// Where openraft logs that a core has stopped which was to be told something.
const STOPPED_CORE: &str = "openraft::raft::raft_inner";

/// Longest filter of the log.
const MAX_FILTER_BYTES: usize = 1024;

/// Reads `filter`: a level, and levels for targets. Nothing here is logged within spans, so those cannot be named.
///
/// Where of openraft only errors are asked for, what comes to a core that has stopped is none: peers write to a node until they
/// have noticed that it is stopping, are refused, and openraft would log each of those messages with all that it holds.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn parse_filter(filter: &str) -> Result<Targets, String> {
    if filter.len() > MAX_FILTER_BYTES {
        return Err(format!("it has {} bytes, more than {MAX_FILTER_BYTES}", filter.len()));
    }
    check_directives(filter)?;
    // The parser takes an empty part for a filter that lets nothing pass, and a blank for a part of a name.
    let said = directives(filter).collect::<Vec<_>>().join(",");
    let targets: Targets = said.parse().map_err(|error: ParseError| error.to_string())?;
    match targets.would_enable(STOPPED_CORE, &Level::WARN) {
        true => Ok(targets),
        false => Ok(targets.with_target(STOPPED_CORE, LevelFilter::OFF)),
    }
}

/// The parts of a filter: blanks around them, and commas without anything between them, say nothing.
fn directives(filter: &str) -> impl Iterator<Item = &str> {
    filter.split(',').map(str::trim).filter(|part| !part.is_empty())
}

/// Refuses what would be taken for the name of a target and log nothing of this program.
fn check_directives(filter: &str) -> Result<(), String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    /// The modules of this program, as targets.
    const OWN: &str = "quorate";
    let mut speaks = false;
    for directive in directives(filter) {
        let is_level = LEVELS.iter().any(|level| level.eq_ignore_ascii_case(directive));
        if directive.contains(['[', '{']) {
            return Err(format!("\"{directive}\" names a span or a field; only targets have levels"));
        }
        if !is_level && !directive.contains('=') {
            return Err(format!(
                "\"{directive}\" is no level; the levels are {}, and for a target TARGET=LEVEL",
                LEVELS.join(", ")
            ));
        }
        speaks |= is_level || directive.starts_with(OWN);
    }
    match speaks {
        true => Ok(()),
        false => Err("it says no level for this program; begin it with one, such as info".to_owned()),
    }
}

/// The filter of the process's log, and how to change it. Cheap to clone; all clones are the same filter.
#[derive(Clone)]
pub struct LogLevel {
    current: Arc<Mutex<String>>,
    apply: Arc<ApplyFilter>,
}

type ApplyFilter = dyn Fn(&str) -> Result<(), String> + Send + Sync;

impl LogLevel {
    /// The log is filtered by `current`, and `apply` makes it another filter, which it is given as text that
    /// [`parse_filter`] understands; it fails with the reason.
    pub fn new(
        current: impl Into<String>,
        apply: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        Self { current: Arc::new(Mutex::new(current.into())), apply: Arc::new(apply) }
    }
}

impl fmt::Debug for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LogLevel").field(&self.current).finish()
    }
}

/// Why settings were not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub(crate) struct Refused {
    /// What is wrong.
    pub(crate) error: String,
    /// What to do.
    pub(crate) hint: String,
}

impl Refused {
    pub(crate) fn new(error: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { error: error.into(), hint: hint.into() }
    }
}

/// Why a request for settings was not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotChanged {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error(transparent)]
    Quota(#[from] QuotaError),
}

impl From<NotChanged> for Failure {
    fn from(error: NotChanged) -> Self {
        match error {
            NotChanged::Refused(refused) => refused.into(),
            NotChanged::Quota(error) => error.into(),
        }
    }
}

impl NotChanged {
    /// What to do.
    pub(crate) fn hint(&self) -> String {
        match self {
            Self::Refused(refused) => refused.hint.clone(),
            Self::Quota(_) => format!("{STATE_QUOTA} is changed at the leader"),
        }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        failure::invalid(&format!("{}: {}", refused.error, refused.hint))
    }
}

/// The settings of one node.
#[derive(Debug, Clone)]
pub(crate) struct NodeSettings<N> {
    node: N,
    log_level: Option<LogLevel>,
    fixed: Arc<[(&'static str, Value)]>,
    turn: Arc<Mutex<()>>,
}

impl<N: OperatedNode> NodeSettings<N> {
    /// The log's filter can be changed if there is a `log_level`. `fixed` are settings that only a restart changes.
    pub(crate) fn new(
        node: N,
        log_level: Option<LogLevel>,
        fixed: impl Into<Arc<[(&'static str, Value)]>>,
    ) -> Self {
        Self { node, log_level, fixed: fixed.into(), turn: Arc::default() }
    }

    /// The settings that only a restart changes, as far as they are known.
    pub(crate) fn fixed(&self) -> &[(&'static str, Value)] {
        &self.fixed
    }

    /// The settings that can change, with their present values.
    pub(crate) fn list(&self) -> Vec<(&'static str, Value)> {
        let settings = self.node.settings();
        let log_level = self
            .log_level
            .as_ref()
            .map(|log| log.current.lock().expect("invariant: no panic under this lock").clone());
        let of_engine = LIVE.iter().map(|live| (live.name, (live.value)(&settings)));
        let of_node = of_engine.chain(log_level.map(|filter| (LOG_LEVEL, filter.into())));
        let quota_bytes = self.node.report().state.quota_bytes;
        of_node.chain(quota_bytes.map(|bytes| (STATE_QUOTA, bytes.into()))).collect()
    }

    /// Changes all of `wanted` or nothing.
    ///
    /// # Errors
    /// The first that cannot be changed, and why.
    pub(super) async fn change(&self, wanted: &[(String, String)]) -> Result<(), NotChanged> {
        if let Some((_, value)) = wanted.iter().find(|(name, _)| name == STATE_QUOTA) {
            if wanted.len() > 1 {
                return Err(Refused::new(
                    format!("{STATE_QUOTA} is the cluster's, the others are this node's"),
                    "change it by itself",
                )
                .into());
            }
            let bytes = whole_number(STATE_QUOTA, value)?;
            self.node.set_state_quota((bytes != 0).then_some(bytes)).await?;
            return Ok(());
        }
        Ok(self.change_node(wanted)?)
    }

    fn change_node(&self, wanted: &[(String, String)]) -> Result<(), Refused> {
        if wanted.len() > MAX_CHANGES {
            return Err(Refused::new(
                format!("{} settings in one request", wanted.len()),
                format!("these can change: {}", CHANGEABLE.join(", ")),
            ));
        }
        let mut changes = Vec::new();
        let mut filter = None;
        for (at, (name, value)) in wanted.iter().enumerate() {
            if wanted[..at].iter().any(|(earlier, _)| earlier == name) {
                return Err(Refused::new(format!("{} is given twice", Shown(name)), "give it once"));
            }
            match name == LOG_LEVEL {
                true => filter = Some((self.changeable_log()?, checked_filter(value)?)),
                false => changes.push((live(name, &self.fixed)?.change)(value)?),
            }
        }
        let _turn = self.turn.lock().expect("invariant: no panic under this lock");
        let before = self.node.settings();
        self.node
            .configure(|settings| changes.into_iter().for_each(|change| change(settings)))
            .map_err(|error| Refused::new(error.to_string(), "nothing was changed"))?;
        let Some((log, filter)) = filter else { return Ok(()) };
        if let Err(reason) = (log.apply)(&filter) {
            // What was in force a moment ago is valid.
            let _ = self.node.configure(|settings| *settings = before);
            return Err(Refused::new(
                format!("{LOG_LEVEL} cannot be changed: {reason}"),
                "nothing was changed",
            ));
        }
        tracing::info!(filter, "the log's filter has changed");
        *log.current.lock().expect("invariant: no panic under this lock") = filter;
        Ok(())
    }

    fn changeable_log(&self) -> Result<&LogLevel, Refused> {
        self.log_level.as_ref().ok_or_else(|| {
            Refused::new(
                format!("{LOG_LEVEL} cannot be changed here"),
                "the program that this node is part of has set up the log by itself",
            )
        })
    }

    /// `Admin.Configure`: changes what is asked for, and lists what there is then.
    ///
    /// # Errors
    /// The failure to answer instead.
    pub(crate) async fn configure(
        &self,
        request: v1::ConfigureRequest,
    ) -> Result<v1::ConfigureResponse, Failure> {
        let wanted: Vec<_> =
            request.settings.into_iter().map(|setting| (setting.name, setting.value)).collect();
        if !wanted.is_empty() {
            self.change(&wanted).await?;
        }
        let setting = |name: &str, value: &Value, changeable| v1::Setting {
            name: name.to_owned(),
            value: text(value),
            changeable,
        };
        let changeable = self.list();
        let changeable = changeable.iter().map(|(name, value)| setting(name, value, true));
        let fixed = self.fixed().iter().map(|(name, value)| setting(name, value, false));
        Ok(v1::ConfigureResponse { settings: changeable.chain(fixed).collect() })
    }
}

/// The members of a JSON object as they came: a map would keep the last of those with the same name.
pub(super) struct GivenMembers(pub(super) Vec<(String, Value)>);

impl<'de> Deserialize<'de> for GivenMembers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = GivenMembers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<GivenMembers, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(GivenMembers(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// As in a configuration file, but without quotes.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn checked_filter(value: &str) -> Result<String, Refused> {
    match parse_filter(value) {
        Ok(_) => Ok(value.to_owned()),
        Err(error) => Err(Refused::new(
            format!("{LOG_LEVEL} \"{}\" is not a filter: {error}", Shown(value)),
            "write error, warn, info, debug or trace, or a filter such as info,quorate=debug",
        )),
    }
}

/// The setting of that name, which is to be one that can change; `fixed` are the others.
pub(super) fn live(name: &str, fixed: &[(&'static str, Value)]) -> Result<&'static Live, Refused> {
    if let Some(live) = LIVE.iter().find(|live| live.name == name) {
        return Ok(live);
    }
    let can = format!("these can change while the node runs: {}, {STATE_QUOTA}", CHANGEABLE.join(", "));
    Err(match fixed.iter().any(|(known, _)| *known == name) {
        true => Refused::new(
            format!("{name} cannot change while the node runs"),
            format!("set it in the configuration file and restart the node; {can}"),
        ),
        false => Refused::new(format!("there is no setting \"{}\"", Shown(name)), can),
    })
}

fn whole_number(name: &str, value: &str) -> Result<u64, Refused> {
    value.parse().map_err(|_| {
        Refused::new(
            format!("{name} must be a whole number, not \"{}\"", Shown(value)),
            "write it without a unit, such as 1048576",
        )
    })
}

fn size(name: &str, value: &str) -> Result<usize, Refused> {
    usize::try_from(whole_number(name, value)?)
        .map_err(|_| Refused::new(format!("{name} is too large"), "give a smaller number"))
}

fn yes_or_no(name: &str, value: &str) -> Result<bool, Refused> {
    value.parse().map_err(|_| {
        Refused::new(format!("{name} must be true or false, not \"{}\"", Shown(value)), "write true or false")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_cannot_take_the_memory() {
        assert!(parse_filter("info,quorate::write=trace").is_ok());
        assert!(parse_filter("quorate=loud").is_err());
        let GivenMembers(twice) =
            serde_json::from_str(r#"{"log_level": "info", "log_level": "warn"}"#).unwrap();
        assert_eq!(twice.len(), 2, "which is then refused");
        let info = parse_filter("info").unwrap();
        for filter in ["info,", "info,,", " info", "info\n", "\tinfo ,", ",info"] {
            assert_eq!(parse_filter(filter).as_ref(), Ok(&info), "{filter:?}");
        }
        assert!(parse_filter(&format!("info,{}=debug", "x".repeat(MAX_FILTER_BYTES))).is_err());
        // As a regular expression this one would have a thousand million states.
        let greedy = format!("info,[{{f=a{}}}]=info", ".".repeat(30));
        assert!(parse_filter(&greedy).is_err());
    }

    #[test]
    fn messages_to_a_core_that_has_stopped_are_logged_to_those_who_ask_for_more() {
        let shows = |filter, target| parse_filter(filter).unwrap().would_enable(target, &Level::ERROR);
        for filter in ["info,openraft=error", "openraft=error,info", "error", "info,openraft=off"] {
            assert!(!shows(filter, STOPPED_CORE), "{filter}");
        }
        for filter in ["info", "info,openraft=warn", "info,openraft=error,openraft::raft=debug"] {
            assert!(shows(filter, STOPPED_CORE), "{filter}");
        }
        assert!(shows("info,openraft=error", "openraft::core::raft_core"), "other errors are shown");
    }

    #[test]
    fn a_filter_that_would_log_nothing_is_refused() {
        for silent in
            ["loud", "info,loud", "", " , ", "openraft=debug", "1x", "verbose,info", "info,[x]=debug"]
        {
            assert!(parse_filter(silent).is_err(), "{silent:?}");
        }
        for filter in ["off", "INFO", "warn,quorate=debug", "quorate::write=trace"] {
            assert!(parse_filter(filter).is_ok(), "{filter:?}");
        }
        assert!(parse_filter("loud").err().unwrap().contains("error, warn, info"));
    }
}
