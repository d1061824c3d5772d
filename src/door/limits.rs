//! What callers of the client port may make a node hold: so much each, and so much all together.

pub use crate::incoming::Bound;

use crate::engine::memory_share_bytes;
use crate::engine::ranges::{self, SettingRange, or_zero, range};

const MIB: usize = 1024 * 1024;
const GIB: u64 = 1024 * MIB as u64;

/// The largest message there is must pass.
const MIN_BYTES: u64 = DoorLimits::MIN_BYTES as u64;
/// More than that is no bound.
const MAX_BYTES: u64 = 16 * GIB;
const MAX_ALL_BYTES: u64 = 64 * GIB;

/// From where to where every number among the settings of the client port may be set.
pub(crate) const RANGES: [SettingRange; 9] = [
    or_zero(range("max_connections", 1, 1_000_000), "for half of the files that the process may open"),
    range("max_connection_watches", 1, 1_000_000),
    range("max_watches", 1, 10_000_000),
    range("max_connection_unsent_bytes", MIN_BYTES, MAX_BYTES),
    range("max_unsent_bytes", 2 * MIN_BYTES, MAX_ALL_BYTES),
    range("max_connection_unfinished_bytes", MIN_BYTES, MAX_BYTES),
    range("max_unfinished_bytes", 2 * MIN_BYTES, MAX_ALL_BYTES),
    range("max_pipeline_queued_bytes", MIN_BYTES, MAX_BYTES),
    range("max_queued_bytes", 2 * MIN_BYTES, MAX_ALL_BYTES),
];

/// Bounds of the client port. Where a caller wants more it waits, or is refused with `REASON_LIMIT_REACHED`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoorLimits {
    /// Most connections; `None` for a share of the files that the process may open. A few more are kept back for probes
    /// and operators.
    pub connections: Option<usize>,
    /// Watches, by connection.
    pub watches: Bound,
    /// Bytes of answers that are encoded and that their callers do not take, by connection. Calls with more to answer wait.
    pub unsent_bytes: Bound,
    /// Bytes of requests that have not arrived as a whole, by connection. What exceeds them is refused.
    pub unfinished_bytes: Bound,
    /// Bytes of answers that wait on pipelines to be encoded, by pipeline. A pipeline that has more is not read.
    pub queued_bytes: Bound,
}

impl Default for DoorLimits {
    fn default() -> Self {
        Self {
            connections: None,
            watches: Bound { each: 2_048, all: 16_384 },
            unsent_bytes: Bound { each: 32 * MIB, all: 256 * MIB },
            unfinished_bytes: Bound { each: 64 * MIB, all: 256 * MIB },
            queued_bytes: Bound { each: 64 * MIB, all: 256 * MIB },
        }
    }
}

impl DoorLimits {
    /// What a bound in bytes cannot be less than: the largest message there is must pass.
    pub const MIN_BYTES: usize = super::MAX_MESSAGE_BYTES;

    /// The least that all callers together are given of each kind, where the memory is small: two who each hold the most
    /// that one is left.
    const MIN_SHARE_BYTES: usize = 16 * MIB;

    /// Has bounds in bytes that nobody set, those that are what they are by default, fit `memory_bytes` of memory: each kind may take
    /// a sixteenth of it.
    pub fn fit(&mut self, memory_bytes: u64) {
        let usual = Self::default();
        let bounds = [
            (&mut self.unsent_bytes, usual.unsent_bytes),
            (&mut self.unfinished_bytes, usual.unfinished_bytes),
            (&mut self.queued_bytes, usual.queued_bytes),
        ];
        for (bound, usual) in bounds {
            if bound.all != usual.all {
                continue;
            }
            let share = memory_share_bytes(memory_bytes, usual.all, Self::MIN_SHARE_BYTES);
            // Who set what one may take has set as much for all.
            let set = (bound.each != usual.each).then_some(bound.each);
            bound.all = share.max(2 * set.unwrap_or_default());
            bound.each = set.unwrap_or(usual.each.min(bound.all / 2));
        }
    }

    /// Refuses what cannot work.
    ///
    /// # Errors
    /// The setting, and what it must be.
    pub fn validate(&self) -> Result<(), String> {
        if self.connections == Some(0) {
            return Err("max_connections must be at least 1".to_owned());
        }
        ranges::check_among(
            &RANGES,
            [
                ("max_connections", self.connections.unwrap_or_default() as u64),
                ("max_connection_watches", self.watches.each as u64),
                ("max_watches", self.watches.all as u64),
                ("max_connection_unsent_bytes", self.unsent_bytes.each as u64),
                ("max_unsent_bytes", self.unsent_bytes.all as u64),
                ("max_connection_unfinished_bytes", self.unfinished_bytes.each as u64),
                ("max_unfinished_bytes", self.unfinished_bytes.all as u64),
                ("max_pipeline_queued_bytes", self.queued_bytes.each as u64),
                ("max_queued_bytes", self.queued_bytes.all as u64),
            ],
        )?;
        if self.watches.all < self.watches.each {
            let Bound { each, all } = self.watches;
            return Err(format!("max_watches ({all}) must be at least max_connection_watches ({each})"));
        }
        let bytes = [
            ("unsent_bytes", self.unsent_bytes),
            ("unfinished_bytes", self.unfinished_bytes),
            ("queued_bytes", self.queued_bytes),
        ];
        for (name, Bound { each, all }) in bytes {
            if all / 2 < each {
                let owner = if name == "queued_bytes" { "pipeline" } else { "connection" };
                return Err(format!("max_{name} ({all}) must be at least twice max_{owner}_{name} ({each})"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_every_range_are_within_and_their_neighbours_are_not() {
        RANGES.iter().for_each(crate::engine::ranges::assert_ends);
    }

    #[test]
    fn what_nobody_set_follows_the_memory() {
        let fitted = |memory: u64, mut limits: DoorLimits| {
            limits.fit(memory * MIB as u64);
            assert_eq!(limits.validate(), Ok(()));
            limits
        };
        let of = |bound: Bound| (bound.each / MIB, bound.all / MIB);
        assert_eq!(fitted(8 * 1024, DoorLimits::default()), DoorLimits::default());
        let small = fitted(400, DoorLimits::default());
        for bound in [small.unsent_bytes, small.unfinished_bytes, small.queued_bytes] {
            assert_eq!(bound, Bound { each: 25 * MIB / 2, all: 25 * MIB });
        }
        assert_eq!(
            of(fitted(192, DoorLimits::default()).unsent_bytes),
            (8, 16),
            "the largest message passes"
        );
        let middle = fitted(2048, DoorLimits::default());
        assert_eq!((of(middle.unsent_bytes), of(middle.queued_bytes)), ((32, 128), (64, 128)));

        let usual = DoorLimits::default().unsent_bytes;
        let one = Bound { each: 20 * MIB, ..usual };
        let all = Bound { all: 200 * MIB, ..usual };
        assert_eq!(
            of(fitted(192, DoorLimits { unsent_bytes: one, ..DoorLimits::default() }).unsent_bytes),
            (20, 40)
        );
        let set = fitted(192, DoorLimits { unsent_bytes: all, ..DoorLimits::default() });
        assert_eq!((set.unsent_bytes, of(set.queued_bytes)), (all, (8, 16)), "what was set stays");
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let limits = DoorLimits::default();
        assert_eq!(limits.validate(), Ok(()));
        type Break = fn(&mut DoorLimits);
        let broken: [(Break, &str); 9] = [
            (|limits| limits.connections = Some(0), "max_connections"),
            (|limits| limits.connections = Some(usize::MAX), "max_connections"),
            (|limits| limits.watches.all = usize::MAX, "max_watches"),
            (|limits| limits.unsent_bytes.all = usize::MAX, "max_unsent_bytes"),
            (|limits| limits.queued_bytes.each = 1 << 40, "max_pipeline_queued_bytes"),
            (|limits| limits.watches.all = 1, "max_watches"),
            (|limits| limits.unsent_bytes.each = 1, "max_connection_unsent_bytes"),
            (
                |limits| limits.unfinished_bytes.all = limits.unfinished_bytes.each,
                "max_connection_unfinished_bytes",
            ),
            (|limits| limits.queued_bytes.each = 0, "max_pipeline_queued_bytes"),
        ];
        for (break_it, name) in broken {
            let mut limits = limits.clone();
            break_it(&mut limits);
            assert!(limits.validate().unwrap_err().contains(name), "{limits:?}");
        }
    }
}
