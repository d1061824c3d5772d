//! The settings of this guest: how much of its history a node keeps.

pub(crate) use super::machine::HistoryLimits;

use crate::engine::ranges::{self, SettingRange, or_zero, range};

const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// From where to where each may be set.
pub(crate) const RANGES: [SettingRange; 3] = [
    // A history with fewer changes or bytes would not last from one message to the next.
    range("history_events", 1_000, 1_000_000_000),
    range("history_bytes", 4 * MIB, 64 * GIB),
    or_zero(range("history_age_ms", 1, 3_650 * DAY_MS), "for any age"),
];

/// Refuses what is out of its range.
///
/// # Errors
/// The setting, and what it must be.
pub(crate) fn validate(limits: &HistoryLimits) -> Result<(), String> {
    let HistoryLimits { events, bytes, age_ms } = *limits;
    let values =
        [("history_events", events as u64), ("history_bytes", bytes as u64), ("history_age_ms", age_ms)];
    ranges::check_among(&RANGES, values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_every_range_are_within_and_their_neighbours_are_not() {
        RANGES.iter().for_each(ranges::assert_ends);
        assert_eq!(validate(&HistoryLimits::default()), Ok(()));
        let none = HistoryLimits { events: 0, ..HistoryLimits::default() };
        assert!(validate(&none).unwrap_err().contains("history_events"));
    }
}
