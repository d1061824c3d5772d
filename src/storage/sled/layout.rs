//! Where sled splits its leaves.
//!
//! sled rewrites a whole leaf after every tenth change to it, and both halves when it splits, above 16 keys. Left to
//! itself, a log of large records is written four to five times. Here leaves are split *ahead* of the records, while
//! all they hold is a few small *fences*: keys without a value, planted where the log will be in a moment. A record then
//! falls into a leaf of its own group, gets a handful of neighbours, and is not written again until it is purged.
//!
//! ```text
//! planted:   |fences| group |fences| group |fences| …
//! leaves:          [f records fffffff][f records fffffff][f …
//! ```
//!
//! Eight fences before a group: when the next eight arrive, the last leaf holds 17 keys, and sled splits it in the
//! middle, so that one leaf spans one group. Fences carry no information: reads skip them, and recovery neither needs
//! nor checks them. How many entries make up a group follows the size of recent records; when that changes
//! abruptly, some leaves are written twice.

use std::collections::VecDeque;

use super::record::Key;

/// Most records in one leaf. With their removals, fewer changes than make sled rewrite the leaf.
const GROUP_RECORDS: u64 = 4;

/// Fewer records than that are in a leaf if they take more than this, in bytes. sled's cache has 256 parts, each of which keeps the
/// leaf that it was asked for last, however large.
const GROUP_BYTES: usize = 128 * 1024;

/// After so many times the records of a group without a boundary, the groups are too wide for what is written now.
const CROWDED: u64 = 2;

/// Groups planted ahead: one is split off when the next is planted.
const GROUPS_AHEAD: usize = 3;

/// Half of what sled allows in a leaf.
const FENCES: u16 = 8;

/// Chooses where to plant fences.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    /// First indexes of the groups to come, planted already.
    boundaries: VecDeque<u64>,
    /// First index of the present group.
    group: u64,
    /// Records in it, and their bytes.
    records: u64,
    bytes: usize,
}

impl Layout {
    /// Notes that a record of `bytes` is about to be written that begins with entry `index`; says before which indexes to
    /// plant fences first, in ascending order.
    pub(crate) fn record(&mut self, index: u64, bytes: usize) -> Vec<u64> {
        let entered = self.boundaries.front().is_none_or(|boundary| *boundary <= index);
        let wanted = group_records(self.bytes + bytes, self.records + 1);
        if !entered && self.records < CROWDED * wanted {
            self.records += 1;
            self.bytes += bytes;
            return Vec::new();
        }
        let entries = index.saturating_sub(self.group);
        let width = match self.records {
            0 => wanted,
            records => (entries * wanted).div_ceil(records).max(1),
        };
        if entered {
            while self.boundaries.front().is_some_and(|boundary| *boundary <= index) {
                self.boundaries.pop_front();
            }
        } else {
            self.boundaries.clear();
        }
        (self.group, self.records, self.bytes) = (index, 1, bytes);
        let mut planted = Vec::new();
        while self.boundaries.len() < GROUPS_AHEAD {
            let boundary = self.boundaries.back().copied().unwrap_or(index).saturating_add(width);
            self.boundaries.push_back(boundary);
            planted.push(boundary);
        }
        planted
    }

    /// Forgets what was planted: the log does not go on where it ended.
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }

    /// The fences before the entry with index `boundary`, which is not 0.
    pub(crate) fn fences(boundary: u64) -> impl Iterator<Item = Key> {
        (0..FENCES).map(move |number| Key::fence(boundary - 1, number))
    }
}

/// How many records make a group, where `records` take `bytes`.
fn group_records(bytes: usize, records: u64) -> u64 {
    let fit = (GROUP_BYTES as u64).saturating_mul(records) / (bytes as u64).max(1);
    fit.clamp(1, GROUP_RECORDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_records_make_small_groups() {
        assert_eq!([1, 32, 64, 100, 500].map(|kib| group_records(kib * 1024, 1)), [4, 4, 2, 1, 1]);
        let mut layout = Layout::default();
        let planted: Vec<u64> =
            (0..20_000).step_by(100).flat_map(|index| layout.record(index, GROUP_BYTES / 2)).collect();
        let groups = planted.iter().filter(|boundary| (1000..11_000).contains(*boundary)).count();
        assert!((45..=55).contains(&groups), "every 200th: {planted:?}");
    }

    #[test]
    fn groups_follow_the_size_of_records() {
        let mut layout = Layout::default();
        let mut planted = Vec::new();
        // One entry a record, then a hundred, then one.
        let indexes = (0..100).chain((100..10_000).step_by(100)).chain(10_000..10_100);
        for index in indexes {
            for boundary in layout.record(index, 1000) {
                assert!(boundary > index);
                planted.push(boundary);
            }
        }
        assert!(planted.contains(&96) && planted.contains(&100), "every fourth at first: {planted:?}");
        let wide = planted.iter().filter(|boundary| (1000..9000).contains(*boundary)).count();
        assert!((15..30).contains(&wide), "every 400th then: {planted:?}");
        let narrow = planted.iter().filter(|boundary| (10_030..10_100).contains(*boundary)).count();
        assert!(narrow > 12, "and closer again: {planted:?}");
    }
}
