//! How much of the log is kept behind snapshots, in entries and in bytes, and for followers that are being sent one.
//!
//! While a follower is being sent a snapshot, and until it has caught up from there, the log after that snapshot is kept for it as
//! well, within bounds.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::engine::config::SnapshotPolicy;
use crate::machine::StateMachine;
use crate::raft::core::{Core, CoreMetrics};
use crate::types::{NodeId, Role};

/// While a snapshot is being sent to a follower, what comes after it is kept for that follower: no more than so many times what
/// makes another snapshot due, in entries or in bytes.
const HELD_SNAPSHOTS: u64 = 4;
/// The same, and for no longer than this.
const HOLD_TIME: Duration = Duration::from_secs(30 * 60);
/// The log is measured at points this many bytes or entries apart.
const MARK_BYTES: u64 = 1024 * 1024;
const MARK_ENTRIES: u64 = 1000;

/// A point of the log: how many bytes of commands had been applied when it was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LogMark {
    pub(super) index: u64,
    pub(super) bytes: u64,
}

/// Measures the log as it is applied.
#[derive(Debug)]
pub(super) struct LogGauge {
    pub(super) policy: SnapshotPolicy,
    /// Where the newest snapshot stands.
    base: LogMark,
    /// In order; from where the log may begin to now.
    marks: VecDeque<LogMark>,
}

impl LogGauge {
    pub(super) fn new(policy: SnapshotPolicy, start: LogMark) -> Self {
        Self { policy, base: start, marks: VecDeque::from([start]) }
    }

    pub(super) fn observe(&mut self, now: LogMark) {
        let last = self.marks.back().copied().unwrap_or(self.base);
        if now.index >= last.index + MARK_ENTRIES || now.bytes >= last.bytes + MARK_BYTES {
            self.marks.push_back(now);
        }
    }

    pub(super) fn is_snapshot_due(&self, now: LogMark) -> bool {
        now.index.saturating_sub(self.base.index) >= self.policy.every_entries
            || now.bytes.saturating_sub(self.base.bytes) >= self.policy.every_bytes
    }

    /// A snapshot up to `index` exists. Returns up to where the log may now be purged.
    pub(super) fn snapshot_taken(&mut self, index: u64) -> Option<u64> {
        let bytes = self.bytes_at(index).unwrap_or(self.base.bytes);
        self.base = LogMark { index, bytes };
        let by_entries = index.saturating_sub(self.policy.keep_entries);
        // The last point that lies more than `keep_bytes` back.
        let by_bytes = self
            .marks
            .iter()
            .rev()
            .find(|mark| mark.index <= index && bytes.saturating_sub(mark.bytes) >= self.policy.keep_bytes)
            .map_or(0, |mark| mark.index);
        let upto = by_entries.max(by_bytes).min(index);
        (upto > 0).then_some(upto)
    }

    fn bytes_at(&self, index: u64) -> Option<u64> {
        self.marks.iter().rev().find(|mark| mark.index <= index).map(|mark| mark.bytes)
    }

    /// The log up to `upto` is to be purged.
    pub(super) fn purged(&mut self, upto: u64) {
        while self.marks.len() > 1 && self.marks[0].index < upto {
            self.marks.pop_front();
        }
    }

    /// Whether the log from `index` to `now` is more than may be held for one that needs it.
    fn is_too_much(&self, index: u64, now: LogMark) -> bool {
        let bytes = now.bytes.saturating_sub(self.bytes_at(index).unwrap_or(0));
        now.index.saturating_sub(index) > self.policy.every_entries.saturating_mul(HELD_SNAPSHOTS)
            || bytes > self.policy.every_bytes.saturating_mul(HELD_SNAPSHOTS)
    }
}

/// What followers of this leader need that are being sent a snapshot: the log from its end on. Without it they would need
/// another snapshot as soon as they have this one, and so on: behind a link that takes longer for a snapshot than the
/// leader to the next one they would never catch up.
#[derive(Debug, Default)]
pub(super) struct RetainedLog(BTreeMap<NodeId, Need>);

/// One follower's need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Need {
    /// The last entry of its snapshot.
    from: u64,
    since: Instant,
    /// It is too large, or has lasted for too long.
    is_given_up: bool,
}

impl RetainedLog {
    /// Looks at who is being sent which snapshot and how far the others' logs reach by now, and lets go of what is needed no
    /// more: by those who have the entries up to `wanted` and nearly all after it, and by those who are no members. What has
    /// become too large or has lasted for too long is given up.
    pub(super) fn look(
        &mut self,
        gauge: &LogGauge,
        now: LogMark,
        wanted: u64,
        members: &BTreeMap<NodeId, FollowerPosition>,
    ) {
        for (node_id, follower) in members {
            if let Some(from) = follower.receives {
                let new = Need { from, since: Instant::now(), is_given_up: false };
                let need = self.0.entry(*node_id).or_insert(new);
                if need.from != from {
                    *need = new;
                }
            }
        }
        let nearly_all = wanted.max(now.index.saturating_sub(gauge.policy.keep_entries));
        self.0.retain(|node_id, need| {
            let Some(follower) = members.get(node_id) else { return false };
            let is_served = follower.receives.is_none() && follower.matched >= Some(nearly_all);
            if !need.is_given_up && (need.since.elapsed() > HOLD_TIME || gauge.is_too_much(need.from, now)) {
                need.is_given_up = true;
                tracing::warn!(
                    node_id,
                    from = need.from,
                    "a follower is too far behind its snapshot for the log"
                );
            }
            !is_served
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Up to where the log may be purged, if it is to be purged up to `wanted`.
    pub(super) fn allows(&self, wanted: u64) -> u64 {
        self.0.values().filter(|need| !need.is_given_up).map(|need| need.from).fold(wanted, u64::min)
    }
}

/// How far a follower of this leader is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FollowerPosition {
    /// The last entry of the snapshot that it is being sent.
    receives: Option<u64>,
    matched: Option<u64>,
}

/// How far the followers of this leader are; none if it does not lead.
pub(super) fn followers<M: StateMachine>(
    core: &Core<M>,
    metrics: &CoreMetrics,
) -> BTreeMap<NodeId, FollowerPosition> {
    if metrics.role != Role::Leader {
        return BTreeMap::new();
    }
    let progress = core.peer_progress();
    let follower = |node_id: &NodeId| {
        let receives = progress.get(node_id).and_then(|peer| peer.snapshot_upto);
        let matched = metrics.matched.get(node_id).copied().flatten().map(|matched| matched.index);
        (*node_id, FollowerPosition { receives, matched })
    };
    metrics.membership.members.keys().map(follower).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> SnapshotPolicy {
        SnapshotPolicy {
            every_entries: 10_000,
            every_bytes: 100 << 20,
            keep_entries: 4_000,
            keep_bytes: 20 << 20,
            ..SnapshotPolicy::default()
        }
    }

    #[test]
    fn entries_or_bytes_make_a_snapshot_due() {
        let gauge = LogGauge::new(policy(), LogMark { index: 500, bytes: 0 });
        assert!(!gauge.is_snapshot_due(LogMark { index: 10_499, bytes: (100 << 20) - 1 }));
        assert!(gauge.is_snapshot_due(LogMark { index: 10_500, bytes: 0 }));
        assert!(gauge.is_snapshot_due(LogMark { index: 501, bytes: 100 << 20 }));
    }

    #[test]
    fn small_entries_are_kept_by_count() {
        let mut gauge = LogGauge::new(policy(), LogMark { index: 0, bytes: 0 });
        (1..=10).for_each(|n| gauge.observe(LogMark { index: n * 1000, bytes: n * 1000 }));
        assert_eq!(gauge.snapshot_taken(10_000), Some(6_000));
        assert_eq!(gauge.base, LogMark { index: 10_000, bytes: 10_000 });
        gauge.purged(6_000);
        assert_eq!(gauge.marks[0].index, 6_000);
    }

    #[test]
    fn large_entries_are_kept_by_bytes() {
        let mut gauge = LogGauge::new(policy(), LogMark { index: 0, bytes: 0 });
        (1..=100).for_each(|n| gauge.observe(LogMark { index: n, bytes: n << 20 }));
        assert_eq!(gauge.snapshot_taken(100), Some(80));
    }

    #[tokio::test(start_paused = true)]
    async fn what_follows_a_snapshot_in_flight_is_kept_for_who_gets_it() {
        let mut gauge = LogGauge::new(policy(), LogMark { index: 0, bytes: 0 });
        (1..=30).for_each(|n| gauge.observe(LogMark { index: n * 1000, bytes: n * 1000 }));
        let now = LogMark { index: 30_000, bytes: 30_000 };
        let followers = |receives: Option<u64>, matched: Option<u64>| {
            BTreeMap::from([
                (2, FollowerPosition { receives: None, matched: Some(30_000) }),
                (4, FollowerPosition { receives, matched }),
            ])
        };
        let mut retained = RetainedLog::default();
        retained.look(&gauge, now, 26_000, &followers(None, None));
        assert_eq!(retained.allows(26_000), 26_000, "nobody is sent one");
        retained.look(&gauge, now, 26_000, &followers(Some(10_000), None));
        assert_eq!(retained.allows(26_000), 10_000);
        assert_eq!(retained.allows(6_000), 6_000);
        // It has the snapshot, and what follows is on its way.
        retained.look(&gauge, now, 26_000, &followers(None, Some(12_000)));
        assert_eq!(retained.allows(26_000), 10_000);
        retained.look(&gauge, LogMark { index: 30_001, bytes: 0 }, 26_000, &followers(None, Some(26_000)));
        assert_eq!(retained.allows(26_000), 10_000, "not quite");
        retained.look(&gauge, now, 26_000, &followers(None, Some(26_000)));
        assert_eq!(retained.allows(26_000), 26_000, "it has caught up");

        // Who gets another one needs what follows that.
        retained.look(&gauge, now, 26_000, &followers(Some(10_000), None));
        retained.look(&gauge, now, 26_000, &followers(Some(20_000), None));
        assert_eq!(retained.allows(26_000), 20_000);
        let much = LogMark { index: 20_001 + 4 * 10_000, bytes: 0 };
        retained.look(&gauge, much, 26_000, &followers(Some(20_000), None));
        assert_eq!(retained.allows(26_000), 26_000, "too many entries");
        let large = LogMark { index: 30_000, bytes: (401 << 20) + 20_000 };
        let mut retained = RetainedLog::default();
        retained.look(&gauge, large, 26_000, &followers(Some(20_000), None));
        assert_eq!(retained.allows(26_000), 26_000, "too many bytes");
        let mut retained = RetainedLog::default();
        retained.look(&gauge, now, 26_000, &followers(Some(20_000), None));
        tokio::time::advance(HOLD_TIME + Duration::from_millis(20)).await;
        retained.look(&gauge, now, 26_000, &followers(Some(20_000), None));
        assert_eq!(retained.allows(26_000), 26_000, "too long");
        retained.look(&gauge, now, 26_000, &followers(Some(20_000), None));
        assert_eq!(retained.allows(26_000), 26_000, "for good");
        retained.look(&gauge, now, 26_000, &followers(Some(25_000), None));
        assert_eq!(retained.allows(26_000), 25_000, "another snapshot");
        retained.look(&gauge, now, 26_000, &BTreeMap::new());
        assert_eq!(retained.allows(26_000), 26_000, "no member any more, or this node leads no more");
    }

    #[test]
    fn nothing_is_purged_before_there_is_enough() {
        let mut gauge = LogGauge::new(policy(), LogMark { index: 0, bytes: 0 });
        gauge.observe(LogMark { index: 3_000, bytes: 1 << 20 });
        assert_eq!(gauge.snapshot_taken(3_000), None);
    }
}
