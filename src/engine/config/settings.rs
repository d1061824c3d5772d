//! What can be changed while the node runs.
//!
//! A change takes effect at once, on this node only, and lasts until the node stops: the configuration file has
//! the last word at the next start.

use super::ranges;
use super::{Limits, SnapshotPolicy};
use crate::engine::{Engine, EngineConfig};
use crate::error::ConfigureError;
use crate::feed::EventLogLimits;
use crate::machine::StateMachine;

/// The settings of a running node that can be changed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// When snapshots are taken and the log is cut.
    pub snapshots: SnapshotPolicy,
    /// How much of what was applied is kept on disk for those who follow it.
    pub event_log: EventLogLimits,
    /// Largest encoded command, in bytes.
    pub max_command_bytes: usize,
    /// Most bytes of proposed commands that are not yet applied.
    pub max_inflight_bytes: usize,
    /// See [`EngineConfig::preferred_leader`].
    pub preferred_leader: bool,
}

impl Settings {
    pub(in crate::engine) fn of(config: &EngineConfig) -> Self {
        Self {
            snapshots: config.snapshots.clone(),
            event_log: config.event_log,
            max_command_bytes: config.limits.max_command_bytes,
            max_inflight_bytes: config.limits.max_inflight_bytes,
            preferred_leader: config.preferred_leader,
        }
    }

    /// Of one who takes no writes.
    pub(crate) fn of_no_member(event_log: EventLogLimits) -> Self {
        Self {
            snapshots: SnapshotPolicy::default(),
            event_log,
            max_command_bytes: 0,
            max_inflight_bytes: 0,
            preferred_leader: false,
        }
    }

    /// Refuses limits of the event log that cannot work.
    pub(crate) fn check_event_log(&self) -> Result<(), ConfigureError> {
        let EventLogLimits { operations, bytes, age_ms } = self.event_log;
        let event_log =
            [("event_log_operations", operations), ("event_log_bytes", bytes), ("event_log_age_ms", age_ms)];
        ranges::check(&event_log).map_err(ConfigureError)
    }

    /// Refuses what cannot work. Limits that stay below those the node was started with fit its messages and its
    /// reserve of disk.
    fn validate(&self, started_with: &Limits) -> Result<(), ConfigureError> {
        self.snapshots.validate().map_err(ConfigureError)?;
        self.check_event_log()?;
        let limits = [
            ("max_command_bytes", self.max_command_bytes, started_with.max_command_bytes),
            ("max_inflight_bytes", self.max_inflight_bytes, started_with.max_inflight_bytes),
        ];
        for (name, value, most) in limits {
            // What more it could be started with is another matter.
            if value > most {
                return Err(ConfigureError(format!(
                    "{name} ({value}) must not be more than the {most} that the node was started with; restart it with more"
                )));
            }
            ranges::check(&[(name, value as u64)]).map_err(ConfigureError)?;
        }
        match self.max_inflight_bytes < self.max_command_bytes {
            true => Err(ConfigureError("max_inflight_bytes must be at least max_command_bytes".to_owned())),
            false => Ok(()),
        }
    }
}

impl<M: StateMachine> Engine<M> {
    /// The present settings.
    pub fn settings(&self) -> Settings {
        self.inner.settings.borrow().clone()
    }

    /// Changes settings, all that `change` changes or none. Returns what they are then.
    ///
    /// # Errors
    /// [`ConfigureError`] says which setting cannot have its new value, and why.
    pub fn configure(&self, change: impl FnOnce(&mut Settings)) -> Result<Settings, ConfigureError> {
        let inner = &self.inner;
        let mut outcome = Ok(());
        inner.settings.send_if_modified(|current| {
            let mut changed = current.clone();
            change(&mut changed);
            outcome = changed.validate(&inner.config.limits);
            let changes = outcome.is_ok() && changed != *current;
            if changes {
                tracing::info!(
                    snapshot_every_entries = changed.snapshots.every_entries,
                    snapshot_every_bytes = changed.snapshots.every_bytes,
                    snapshot_keep_entries = changed.snapshots.keep_entries,
                    snapshot_keep_bytes = changed.snapshots.keep_bytes,
                    snapshot_bytes_per_second = changed.snapshots.send_bytes_per_second,
                    event_log_operations = changed.event_log.operations,
                    event_log_bytes = changed.event_log.bytes,
                    event_log_age_ms = changed.event_log.age_ms,
                    max_command_bytes = changed.max_command_bytes,
                    max_inflight_bytes = changed.max_inflight_bytes,
                    preferred_leader = changed.preferred_leader,
                    "settings changed"
                );
                if let Some(log) = self.feed().log() {
                    log.set_limits(changed.event_log);
                }
                inner.core.limit_snapshots(changed.snapshots.send_bytes_per_second);
                *current = changed;
            }
            changes
        });
        outcome.map(|()| self.settings())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A range that ends above what can be set here would lead into the next refusal.
    #[test]
    fn the_limit_that_is_told_is_the_one_that_can_be_set() {
        let config = EngineConfig::new(1, "", "a:1");
        let most = config.limits.max_command_bytes;
        let refused = |bytes| {
            let settings = Settings { max_command_bytes: bytes, ..Settings::of(&config) };
            settings.validate(&config.limits).unwrap_err().to_string()
        };
        for bytes in [most + 1, usize::MAX] {
            assert!(refused(bytes).contains(&format!("more than the {most} that")), "{}", refused(bytes));
        }
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let config = EngineConfig::new(1, "", "a:1");
        let settings = Settings::of(&config);
        assert_eq!(settings.validate(&config.limits), Ok(()));
        let broken: [fn(&mut Settings); 4] = [
            |settings| settings.snapshots.every_entries = 0,
            |settings| settings.max_command_bytes = 0,
            |settings| settings.max_inflight_bytes *= 2,
            |settings| settings.max_inflight_bytes = settings.max_command_bytes - 1,
        ];
        for break_it in broken {
            let mut settings = settings.clone();
            break_it(&mut settings);
            assert!(settings.validate(&config.limits).is_err(), "{settings:?}");
        }
    }
}
