//! Which of many ranges hold a key.
//!
//! The ranges stand in the order of their starts. Bisected again and again, that is a balanced tree without pointers: the root of
//! a part is its middle. Each root knows the range of its part that ends last, so that a part in which nothing reaches the key is
//! not entered. A range that was found is taken out until all are [put back](RangeTree::put_back): whoever asks for many keys finds
//! each range once, and of ranges that all hold the same keys only the first key costs anything.
//!
//! What is added or removed is sorted in with the next question: many at once cost little more than one.

use bytes::Bytes;

/// A range, and whose it is. An empty end is none.
#[derive(Debug)]
struct TreeRange<T> {
    start: Bytes,
    end: Bytes,
    is_taken: bool,
    owner: T,
}

impl<T> TreeRange<T> {
    fn ends_behind(&self, key: &[u8]) -> bool {
        self.end.is_empty() || key < &self.end[..]
    }

    fn ends_before(&self, other: &Self) -> bool {
        !self.end.is_empty() && (other.end.is_empty() || self.end < other.end)
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct RangeTree<T> {
    ranges: Vec<TreeRange<T>>,
    /// For the part whose root is at this place: the range that ends last of those that are not taken.
    last_end: Vec<Option<usize>>,
    taken: Vec<usize>,
    is_sorted: bool,
}

impl<T> Default for RangeTree<T> {
    fn default() -> Self {
        Self { ranges: Vec::new(), last_end: Vec::new(), taken: Vec::new(), is_sorted: true }
    }
}

/// The root of the part from the first to before the second place, if there is anything in it.
fn root((from, to): (usize, usize)) -> Option<usize> {
    (from < to).then(|| from + (to - from) / 2)
}

impl<T> RangeTree<T> {
    /// Adds the keys from `start`, inclusive, to `end`, exclusive; an empty `end` is none.
    pub(super) fn add(&mut self, start: Bytes, end: Bytes, owner: T) {
        self.ranges.push(TreeRange { start, end, is_taken: false, owner });
        self.is_sorted = false;
    }

    /// Removes those whose owner is not to be kept.
    pub(super) fn retain(&mut self, is_kept: impl Fn(&T) -> bool) {
        let before = self.ranges.len();
        self.ranges.retain(|range| is_kept(&range.owner));
        self.is_sorted &= self.ranges.len() == before;
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.ranges.len()
    }

    /// All of them.
    pub(super) fn owners(&self) -> impl Iterator<Item = &T> {
        self.ranges.iter().map(|range| &range.owner)
    }

    /// Takes the ranges that hold `key` and are not taken, and tells their owners. True if there are any, and none was taken before.
    pub(super) fn take(&mut self, key: &[u8], mut found: impl FnMut(&T)) -> bool {
        self.sort();
        let before = self.taken.len();
        self.take_in((0, self.ranges.len()), key, &mut found);
        before == 0 && !self.taken.is_empty()
    }

    /// Puts back all that was taken.
    pub(super) fn put_back(&mut self) {
        for at in std::mem::take(&mut self.taken) {
            self.ranges[at].is_taken = false;
            let mut part = (0, self.ranges.len());
            while let Some(root) = root(part) {
                let last = &mut self.last_end[root];
                if last.is_none_or(|last| self.ranges[last].ends_before(&self.ranges[at])) {
                    *last = Some(at);
                }
                part = match at.cmp(&root) {
                    std::cmp::Ordering::Less => (part.0, root),
                    std::cmp::Ordering::Equal => break,
                    std::cmp::Ordering::Greater => (root + 1, part.1),
                };
            }
        }
    }

    fn sort(&mut self) {
        if self.is_sorted {
            return;
        }
        assert!(self.taken.is_empty(), "invariant: what was taken is put back before anything changes");
        // Little moves: all but what was added is in order.
        self.ranges.sort_by(|a, b| a.start.cmp(&b.start));
        self.last_end.clear();
        self.last_end.resize(self.ranges.len(), None);
        self.note_ends((0, self.ranges.len()));
        self.is_sorted = true;
    }

    fn note_ends(&mut self, part: (usize, usize)) {
        if let Some(root) = root(part) {
            self.note_ends((part.0, root));
            self.note_ends((root + 1, part.1));
            self.note_end(part, root);
        }
    }

    /// The parts below `root` know their ends.
    fn note_end(&mut self, part: (usize, usize), at: usize) {
        let below =
            [(part.0, at), (at + 1, part.1)].map(|below| root(below).and_then(|root| self.last_end[root]));
        let own = Some(at).filter(|at| !self.ranges[*at].is_taken);
        self.last_end[at] = below.into_iter().chain([own]).flatten().reduce(|last, other| {
            if self.ranges[last].ends_before(&self.ranges[other]) { other } else { last }
        });
    }

    fn take_in(&mut self, part: (usize, usize), key: &[u8], found: &mut impl FnMut(&T)) {
        let Some(at) = root(part) else { return };
        if !self.last_end[at].is_some_and(|last| self.ranges[last].ends_behind(key)) {
            return;
        }
        let before = self.taken.len();
        self.take_in((part.0, at), key, found);
        let range = &mut self.ranges[at];
        if &range.start[..] <= key {
            if !range.is_taken && range.ends_behind(key) {
                range.is_taken = true;
                found(&range.owner);
                self.taken.push(at);
            }
            self.take_in((at + 1, part.1), key, found);
        }
        if self.taken.len() > before {
            self.note_end(part, at);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn key(rng: &mut SmallRng, lengths: std::ops::Range<usize>) -> Vec<u8> {
        let length = rng.random_range(lengths);
        (0..length).map(|_| rng.random_range(0..6)).collect()
    }

    fn holds((start, end): &(Vec<u8>, Vec<u8>), key: &[u8]) -> bool {
        &start[..] <= key && (end.is_empty() || key < &end[..])
    }

    #[test]
    fn finds_what_looking_at_each_finds() {
        for seed in 0..200 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut tree, mut plain) = (RangeTree::default(), Vec::new());
            let mut next = 0;
            for _ in 0..30 {
                for _ in 0..rng.random_range(0..20) {
                    // Also such as hold nothing.
                    let (start, end) = (key(&mut rng, 0..4), key(&mut rng, 0..4));
                    tree.add(start.clone().into(), end.clone().into(), next);
                    plain.push((next, (start, end)));
                    next += 1;
                }
                let gone = rng.random_range(1..10);
                if gone < 4 {
                    tree.retain(|owner| owner % gone != 0);
                    plain.retain(|(owner, _)| owner % gone != 0);
                }
                assert_eq!(tree.len(), plain.len());
                let mut is_found = std::collections::BTreeSet::new();
                for _ in 0..rng.random_range(0..8) {
                    let key = key(&mut rng, 1..5);
                    let mut found = Vec::new();
                    let begins = tree.take(&key, |owner| found.push(*owner));
                    let (before, holding) =
                        (is_found.len(), plain.iter().filter(|(_, range)| holds(range, &key)));
                    let mut expected: Vec<_> = holding.map(|(owner, _)| *owner).collect();
                    expected.retain(|owner| is_found.insert(*owner));
                    found.sort_unstable();
                    assert_eq!(found, expected, "seed {seed}, key {key:?}");
                    assert_eq!(begins, before == 0 && !expected.is_empty());
                }
                tree.put_back();
            }
        }
    }

    /// How many ranges a key has to be compared with.
    fn looked_at(tree: &RangeTree<usize>, key: &[u8], part: (usize, usize)) -> usize {
        let Some(at) = root(part) else { return 0 };
        if !tree.last_end[at].is_some_and(|last| tree.ranges[last].ends_behind(key)) {
            return 1;
        }
        let right = &tree.ranges[at].start[..] <= key;
        let left = looked_at(tree, key, (part.0, at));
        1 + left + if right { looked_at(tree, key, (at + 1, part.1)) } else { 0 }
    }

    #[test]
    fn many_ranges_apart_or_within_each_other_cost_little_unless_they_hold_the_key() {
        const RANGES: u32 = 10_000;
        let bytes = |number: u32| Bytes::copy_from_slice(&number.to_be_bytes());
        let (mut apart, mut nested) = (RangeTree::default(), RangeTree::default());
        for number in 0..RANGES {
            apart.add(bytes(2 * number), bytes(2 * number + 1), number as usize);
            nested.add(bytes(number), bytes(3 * RANGES - number), number as usize);
        }
        for key in (0..3 * RANGES).step_by(601).map(|key| key.to_be_bytes()) {
            for tree in [&mut apart, &mut nested] {
                tree.sort();
                let all = (0, tree.len());
                let (cost, mut found) = (looked_at(tree, &key, all), 0);
                tree.take(&key, |_| found += 1);
                assert!(cost <= 60 + 3 * found, "{cost} looked at for {found}");
                let again = looked_at(tree, &key, all);
                assert!(again <= 60, "{again} looked at for what was taken");
                tree.put_back();
            }
        }
    }
}
