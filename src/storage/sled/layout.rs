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

/// Records in one leaf. With their removals, fewer changes than make sled rewrite the leaf.
const GROUP_RECORDS: u64 = 4;

/// After so many records without a boundary, the groups are too wide for what is written now.
const CROWDED_RECORDS: u64 = 2 * GROUP_RECORDS;

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
    /// Records in it.
    records: u64,
}

impl Layout {
    /// Notes that a record is about to be written that begins with entry `index`; says before which indexes to plant
    /// fences first, in ascending order.
    pub(crate) fn record(&mut self, index: u64) -> Vec<u64> {
        let entered = self.boundaries.front().is_none_or(|boundary| *boundary <= index);
        if !entered && self.records < CROWDED_RECORDS {
            self.records += 1;
            return Vec::new();
        }
        let entries = index.saturating_sub(self.group);
        let width = match self.records {
            0 => GROUP_RECORDS,
            records => (entries * GROUP_RECORDS).div_ceil(records).max(1),
        };
        if entered {
            while self.boundaries.front().is_some_and(|boundary| *boundary <= index) {
                self.boundaries.pop_front();
            }
        } else {
            self.boundaries.clear();
        }
        self.group = index;
        self.records = 1;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_follow_the_size_of_records() {
        let mut layout = Layout::default();
        let mut planted = Vec::new();
        // One entry a record, then a hundred, then one.
        let indexes = (0..100).chain((100..10_000).step_by(100)).chain(10_000..10_100);
        for index in indexes {
            for boundary in layout.record(index) {
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
