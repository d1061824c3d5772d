//! The range of every number that an engine is set up with, in one table, for its start and for changes while it runs.
//! Those of the client port are with its [limits](crate::door::limits), and a guest has its own.
//!
//! A value within its range works by itself. How values must fit each other is checked where they are.

use crate::types::NodeId;

/// From where to where a setting may be set. Units are in the names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SettingRange {
    /// The setting, by its name in the configuration file.
    pub name: &'static str,
    /// The smallest value.
    pub least: u64,
    /// The largest value.
    pub most: u64,
    /// What 0 stands for beside that, if anything.
    pub zero: Option<&'static str>,
}

/// The largest node id: larger numbers come out of many JSON readers as others.
pub(crate) const MAX_NODE_ID: NodeId = (1 << 53) - 1;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;
const TIB: u64 = 1024 * GIB;

const MINUTE_MS: u64 = 60_000;
const HOUR_MS: u64 = 60 * MINUTE_MS;
const WEEK_MS: u64 = 7 * 24 * HOUR_MS;

/// Smallest limit on commands. Hardly one is smaller: a node that takes none would look well.
pub(crate) const MIN_COMMAND_BYTES: u64 = KIB;

/// Smallest limit on the event log.
pub(in crate::engine) const MIN_EVENT_LOG_BYTES: u64 = 4 * MIB;

/// Largest command, and batch of entries, that a message between nodes has room for: half of it.
pub(in crate::engine) const MAX_COMMAND_BYTES: u64 = 31 * MIB;

/// Every number among the settings.
pub(crate) const RANGES: [SettingRange; 20] = [
    range("heartbeat_interval_ms", 1, MINUTE_MS),
    range("election_timeout_min_ms", 2, 10 * MINUTE_MS),
    range("election_timeout_max_ms", 3, 10 * MINUTE_MS),
    // A log that is never cut fills every disk in the end.
    range("snapshot_every_entries", 1, 1_000_000_000),
    range("snapshot_every_bytes", 1, TIB),
    range("snapshot_keep_entries", 0, 1_000_000_000),
    range("snapshot_keep_bytes", 0, TIB),
    // A snapshot that takes longer than a day does not catch up.
    or_zero(range("snapshot_bytes_per_second", 64 * 1024, TIB), "for no limit"),
    range("max_command_bytes", MIN_COMMAND_BYTES, MAX_COMMAND_BYTES),
    range("max_inflight_bytes", 1, 16 * GIB),
    range("log_tail_bytes", 1, 64 * GIB),
    range("append_message_bytes", 1, MAX_COMMAND_BYTES),
    or_zero(range("disk_reserve_bytes", 32 * MIB, TIB), "for none"),
    // After 30 s the log gives up on a write, and the process ends.
    or_zero(range("fsync_stall_ms", 1, 30_000), "for never"),
    // One with less would not last from one message to the next.
    range("event_log_operations", 1_000, 1_000_000_000_000),
    range("event_log_bytes", MIN_EVENT_LOG_BYTES, 64 * TIB),
    or_zero(range("event_log_age_ms", 1, 520 * WEEK_MS), "for any age"),
    range("lagging_after_ms", 1, WEEK_MS),
    range("disconnected_after_ms", 2, WEEK_MS),
    // A peer that has come back is not to wait for longer.
    range("reconnect_interval_ms", 1, MINUTE_MS),
];

pub(crate) const fn range(name: &'static str, least: u64, most: u64) -> SettingRange {
    SettingRange { name, least, most, zero: None }
}

pub(crate) const fn or_zero(range: SettingRange, meaning: &'static str) -> SettingRange {
    SettingRange { zero: Some(meaning), ..range }
}

/// Checks each of `values`, which are settings among `ranges` by their names.
///
/// # Errors
/// The first that is out of its range.
pub(crate) fn check_among<const N: usize>(
    ranges: &[SettingRange],
    values: [(&str, u64); N],
) -> Result<(), String> {
    for (name, value) in values {
        let range = ranges.iter().find(|range| range.name == name);
        range.ok_or_else(|| format!("there is no setting {name}"))?.check(value)?;
    }
    Ok(())
}

impl SettingRange {
    /// Refuses a value that is not within.
    ///
    /// # Errors
    /// The range, in words.
    pub(crate) fn check(&self, value: u64) -> Result<(), String> {
        if (self.least..=self.most).contains(&value) || (value == 0 && self.zero.is_some()) {
            return Ok(());
        }
        let zero = self.zero.map(|meaning| format!(", or 0 {meaning}")).unwrap_or_default();
        let Self { name, least, most, .. } = self;
        Err(format!("{name} ({value}) must be from {least} to {most}{zero}"))
    }
}

/// Refuses what is no node's id.
///
/// # Errors
/// The range, in words.
pub(crate) fn check_node_id(node_id: NodeId) -> Result<(), String> {
    match node_id {
        1..=MAX_NODE_ID => Ok(()),
        _ => Err(format!("node id {node_id} must be from 1 to {MAX_NODE_ID}; number the nodes from 1")),
    }
}

/// Checks each of `values`, which are settings by their names.
///
/// # Errors
/// The first that is out of its range.
pub(in crate::engine) fn check(values: &[(&str, u64)]) -> Result<(), String> {
    for (name, value) in values {
        let range = RANGES.iter().find(|range| range.name == *name);
        range.ok_or_else(|| format!("there is no setting {name}"))?.check(*value)?;
    }
    Ok(())
}

/// Fails a test unless the ends of `range` are within and their neighbours are not.
#[cfg(test)]
pub(crate) fn assert_ends(range: &SettingRange) {
    assert!(range.least <= range.most, "{range:?}");
    assert_eq!((range.check(range.least), range.check(range.most)), (Ok(()), Ok(())));
    for beyond in [range.least.checked_sub(1), Some(range.most + 1), Some(u64::MAX)].into_iter().flatten() {
        let allowed = beyond == 0 && range.zero.is_some();
        assert_eq!(range.check(beyond).is_ok(), allowed, "{range:?}: {beyond}");
    }
    let told = range.check(range.most + 1).unwrap_err();
    assert!(told.contains(range.name) && told.contains(&range.most.to_string()), "{told}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_every_range_are_within_and_their_neighbours_are_not() {
        assert!(check_node_id(0).is_err() && check_node_id(1).is_ok());
        assert!(check_node_id(MAX_NODE_ID).is_ok() && check_node_id(MAX_NODE_ID + 1).is_err());
        RANGES.iter().for_each(assert_ends);
    }
}
