//! What a run did.

use std::collections::BTreeMap;

/// What a run did, or several: how often each thing happened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Of all that happened, in its order.
    pub trace_hash: u64,
    counts: BTreeMap<&'static str, u64>,
}

impl Outcome {
    /// It happened `times` more.
    pub fn count(&mut self, what: &'static str, times: u64) {
        *self.counts.entry(what).or_default() += times;
    }

    /// It happened up to the number `high`, as far as was seen.
    pub fn reach(&mut self, what: &'static str, high: u64) {
        let count = self.counts.entry(what).or_default();
        *count = high.max(*count);
    }

    /// How often it happened. Zero for what nobody counts.
    pub fn of(&self, what: &str) -> u64 {
        self.counts.get(what).copied().unwrap_or(0)
    }

    /// Takes in what another run did.
    pub fn add(&mut self, other: &Self) {
        self.trace_hash ^= other.trace_hash;
        for (what, times) in &other.counts {
            self.count(what, *times);
        }
    }
}
