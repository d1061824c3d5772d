//! When snapshots are taken, and how much of the log is kept behind them.
//!
//! Both are counted in entries and in bytes, whichever comes first: a log of small entries costs time at
//! the next start, one of large entries costs disk. While a follower is being sent a snapshot, and until it has caught up
//! from there, the log after that snapshot is kept for it as well, within bounds.
//!
//! The protocol, with a figure: `docs/design/snapshots.md`.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::config::SnapshotPolicy;
use super::{Engine, Settings, until_ended};
use crate::error::SnapshotError;
use crate::machine::StateMachine;
use crate::raft::core::{Core, Metrics};
use crate::storage::DiskWatch;
use crate::types::{LogId, NodeId, Role};

/// How often the applied position is looked at.
const PACE: Duration = Duration::from_millis(20);
/// A request for a snapshot is ignored while another one is being written, and repeated after this long.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How often that is doubled: a snapshot for which there is no room is not to be begun over and over.
const MAX_DOUBLINGS: u32 = 6;
/// How long a snapshot that somebody asked for may take.
const TAKE_PATIENCE: Duration = Duration::from_secs(60);
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
struct Mark {
    index: u64,
    bytes: u64,
}

/// Measures the log as it is applied.
#[derive(Debug)]
struct Gauge {
    policy: SnapshotPolicy,
    /// Where the newest snapshot stands.
    base: Mark,
    /// In order; from where the log may begin to now.
    marks: VecDeque<Mark>,
}

impl Gauge {
    fn new(policy: SnapshotPolicy, start: Mark) -> Self {
        Self { policy, base: start, marks: VecDeque::from([start]) }
    }

    fn observe(&mut self, now: Mark) {
        let last = self.marks.back().copied().unwrap_or(self.base);
        if now.index >= last.index + MARK_ENTRIES || now.bytes >= last.bytes + MARK_BYTES {
            self.marks.push_back(now);
        }
    }

    fn is_snapshot_due(&self, now: Mark) -> bool {
        now.index.saturating_sub(self.base.index) >= self.policy.every_entries
            || now.bytes.saturating_sub(self.base.bytes) >= self.policy.every_bytes
    }

    /// A snapshot up to `index` exists. Returns up to where the log may now be purged.
    fn snapshot_taken(&mut self, index: u64) -> Option<u64> {
        let bytes = self.bytes_at(index).unwrap_or(self.base.bytes);
        self.base = Mark { index, bytes };
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
    fn purged(&mut self, upto: u64) {
        while self.marks.len() > 1 && self.marks[0].index < upto {
            self.marks.pop_front();
        }
    }

    /// Whether the log from `index` to `now` is more than may be held for one that needs it.
    fn is_too_much(&self, index: u64, now: Mark) -> bool {
        let bytes = now.bytes.saturating_sub(self.bytes_at(index).unwrap_or(0));
        now.index.saturating_sub(index) > self.policy.every_entries.saturating_mul(HELD_SNAPSHOTS)
            || bytes > self.policy.every_bytes.saturating_mul(HELD_SNAPSHOTS)
    }
}

/// What followers of this leader need that are being sent a snapshot: the log from its end on. Without it they would need
/// another snapshot as soon as they have this one, and so on: behind a link that takes longer for a snapshot than the
/// leader to the next one they would never catch up.
#[derive(Debug, Default)]
struct Held(BTreeMap<NodeId, Need>);

/// One follower's need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Need {
    /// The last entry of its snapshot.
    from: u64,
    since: Instant,
    /// It is too large, or has lasted for too long.
    is_given_up: bool,
}

impl Held {
    /// Looks at who is being sent which snapshot and how far the others' logs reach by now, and lets go of what is needed no
    /// more: by those who have the entries up to `wanted` and nearly all after it, and by those who are no members. What has
    /// become too large or has lasted for too long is given up.
    fn look(&mut self, gauge: &Gauge, now: Mark, wanted: u64, members: &BTreeMap<NodeId, Standing>) {
        for (node_id, standing) in members {
            if let Some(from) = standing.receives {
                let new = Need { from, since: Instant::now(), is_given_up: false };
                let need = self.0.entry(*node_id).or_insert(new);
                if need.from != from {
                    *need = new;
                }
            }
        }
        let nearly_all = wanted.max(now.index.saturating_sub(gauge.policy.keep_entries));
        self.0.retain(|node_id, need| {
            let Some(standing) = members.get(node_id) else { return false };
            let is_served = standing.receives.is_none() && standing.matched >= Some(nearly_all);
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

    /// Up to where the log may be purged, if it is to be purged up to `wanted`.
    fn allows(&self, wanted: u64) -> u64 {
        self.0.values().filter(|need| !need.is_given_up).map(|need| need.from).fold(wanted, u64::min)
    }
}

/// How far a follower of this leader is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    /// The last entry of the snapshot that it is being sent.
    receives: Option<u64>,
    matched: Option<u64>,
}

/// How far the followers of this leader are; none if it does not lead.
fn standings<M: StateMachine>(core: &Core<M>, metrics: &Metrics) -> BTreeMap<NodeId, Standing> {
    if metrics.role != Role::Leader {
        return BTreeMap::new();
    }
    let progress = core.peer_progress();
    let standing = |node_id: &NodeId| {
        let receives = progress.get(node_id).and_then(|peer| peer.snapshot_upto);
        let matched = metrics.matched.get(node_id).copied().flatten().map(|matched| matched.index);
        (*node_id, Standing { receives, matched })
    };
    metrics.membership.members.keys().map(standing).collect()
}

/// When a snapshot is asked for again that has not come.
#[derive(Debug, Default)]
struct Asking {
    last: Option<Instant>,
    /// Requests in a row that led to nothing.
    vain: u32,
}

impl Asking {
    fn is_under_way(&self) -> bool {
        self.last.is_some()
    }

    /// Whether to ask now; each time after the first it takes twice as long.
    fn ask(&mut self) -> bool {
        let Some(last) = self.last else {
            self.last = Some(Instant::now());
            return true;
        };
        let due = last.elapsed() > ASK_AGAIN.saturating_mul(1 << self.vain.min(MAX_DOUBLINGS));
        if due {
            self.last = Some(Instant::now());
            self.vain += 1;
        }
        due
    }

    /// What stood in the way is gone: the next request is not to wait for long.
    fn begin_anew(&mut self) {
        self.vain = 0;
    }
}

impl<M: StateMachine> Engine<M> {
    /// Takes a snapshot of what is applied now, unless there is one, and waits until it is on disk. Returns what it
    /// covers.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub async fn take_snapshot(&self) -> Result<LogId, SnapshotError> {
        let begun = Instant::now();
        let core = &self.inner.core;
        let wanted = core.published().progress().log_id.ok_or(SnapshotError::Nothing)?;
        let mut asked: Option<Instant> = None;
        loop {
            if let Some(reason) = self.inner.fatal.in_words() {
                return Err(SnapshotError::Stopped { reason });
            }
            let metrics = core.metrics();
            match metrics.snapshot {
                Some(snapshot) if snapshot >= wanted => return Ok(snapshot),
                _ if !self.inner.disk.has_room() => return Err(SnapshotError::DiskFull),
                _ if metrics.role == Role::Stopped => {
                    return Err(SnapshotError::Stopped { reason: "the node is shutting down".to_owned() });
                }
                _ if begun.elapsed() >= TAKE_PATIENCE => {
                    let waited_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                    return Err(SnapshotError::Timeout { waited_ms });
                }
                _ => {}
            }
            if asked.is_none_or(|at| at.elapsed() > ASK_AGAIN) {
                asked = Some(Instant::now());
                core.snapshot().await;
            }
            tokio::time::sleep(PACE).await;
        }
    }
}

/// Takes snapshots and purges the log behind them for as long as the core runs.
pub(super) async fn run<M: StateMachine>(
    core: Core<M>,
    mut settings: watch::Receiver<Settings>,
    disk: DiskWatch,
) {
    let now = || {
        let progress = core.published().progress();
        Mark { index: progress.log_id.map_or(0, |log_id| log_id.index), bytes: progress.command_bytes }
    };
    let mut progress = core.published().watch();
    let mut newest = core.metrics().snapshot;
    // What is applied is counted from the snapshot on, at a restart as well.
    let start = Mark { index: newest.map_or(0, |snapshot| snapshot.index), bytes: 0 };
    let mut gauge = Gauge::new(settings.borrow().snapshots.clone(), start);
    let (mut asking, mut had_room) = (Asking::default(), true);
    // Up to where the log is to be purged, and what is held back from that.
    let (mut wanted, mut purged, mut held) = (None, None, Held::default());
    if core.published().progress().is_restored && newest.is_some() {
        // The node was stopped between the two.
        wanted = Some(0);
    }
    // A restored state is kept at once, also where nothing is written after a restart.
    let mut is_first_look = true;
    loop {
        // While a snapshot is being written its end is awaited even if nothing is applied meanwhile, and while a follower
        // needs the log, the end of that.
        if !asking.is_under_way() && !std::mem::take(&mut is_first_look) {
            let changed = match held.0.is_empty() {
                true => progress.changed().await,
                false => tokio::time::timeout(ASK_AGAIN, progress.changed()).await.unwrap_or(Ok(())),
            };
            if changed.is_err() {
                return until_ended().await;
            }
        }
        tokio::time::sleep(PACE).await;
        let mark = now();
        gauge.observe(mark);
        if settings.has_changed().unwrap_or(false) {
            gauge.policy = settings.borrow_and_update().snapshots.clone();
        }
        let metrics = core.metrics();
        if metrics.fatal.is_some() || metrics.role == crate::types::Role::Stopped {
            return until_ended().await;
        }
        if let Some(snapshot) = metrics.snapshot
            && metrics.snapshot > newest
        {
            newest = metrics.snapshot;
            asking = Asking::default();
            wanted = gauge.snapshot_taken(snapshot.index).max(wanted);
            // A restored state is in the snapshot, and in nobody's else.
            wanted = wanted.max(core.published().progress().is_restored.then_some(0));
        }
        // Looked at all the time: a snapshot may have been sent before there is something to purge.
        held.look(&gauge, mark, wanted.unwrap_or(0), &standings(&core, &metrics));
        if let Some(upto) = wanted.map(|wanted| held.allows(wanted)).filter(|upto| Some(*upto) > purged) {
            purged = Some(upto);
            gauge.purged(upto);
            core.purge(upto).await;
        }
        // A full disk has no room for one; it is taken once there is.
        let has_room = disk.has_room();
        if has_room && !had_room {
            asking.begin_anew();
        }
        had_room = has_room;
        let applied = core.published().progress();
        let is_first_due = applied.is_restored && newest.is_none() && applied.log_id.is_some();
        if has_room && (is_first_due || gauge.is_snapshot_due(mark)) && asking.ask() {
            core.snapshot().await;
        }
    }
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
        }
    }

    #[test]
    fn entries_or_bytes_make_a_snapshot_due() {
        let gauge = Gauge::new(policy(), Mark { index: 500, bytes: 0 });
        assert!(!gauge.is_snapshot_due(Mark { index: 10_499, bytes: (100 << 20) - 1 }));
        assert!(gauge.is_snapshot_due(Mark { index: 10_500, bytes: 0 }));
        assert!(gauge.is_snapshot_due(Mark { index: 501, bytes: 100 << 20 }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_snapshot_that_does_not_come_is_asked_for_more_and_more_rarely() {
        let mut asking = Asking::default();
        let begun = Instant::now();
        let mut asked = Vec::new();
        while begun.elapsed() < Duration::from_secs(200) {
            if asking.ask() {
                asked.push(begun.elapsed().as_secs());
            }
            tokio::time::sleep(PACE).await;
        }
        assert_eq!(asked, [0, 1, 3, 7, 15, 31, 63, 127, 191]);
        asking.begin_anew();
        tokio::time::sleep(ASK_AGAIN + PACE).await;
        assert!(asking.ask() && asking.is_under_way());
    }

    #[test]
    fn small_entries_are_kept_by_count() {
        let mut gauge = Gauge::new(policy(), Mark { index: 0, bytes: 0 });
        (1..=10).for_each(|n| gauge.observe(Mark { index: n * 1000, bytes: n * 1000 }));
        assert_eq!(gauge.snapshot_taken(10_000), Some(6_000));
        assert_eq!(gauge.base, Mark { index: 10_000, bytes: 10_000 });
        gauge.purged(6_000);
        assert_eq!(gauge.marks[0].index, 6_000);
    }

    #[test]
    fn large_entries_are_kept_by_bytes() {
        let mut gauge = Gauge::new(policy(), Mark { index: 0, bytes: 0 });
        (1..=100).for_each(|n| gauge.observe(Mark { index: n, bytes: n << 20 }));
        assert_eq!(gauge.snapshot_taken(100), Some(80));
    }

    #[tokio::test(start_paused = true)]
    async fn what_follows_a_snapshot_in_flight_is_kept_for_who_gets_it() {
        let mut gauge = Gauge::new(policy(), Mark { index: 0, bytes: 0 });
        (1..=30).for_each(|n| gauge.observe(Mark { index: n * 1000, bytes: n * 1000 }));
        let now = Mark { index: 30_000, bytes: 30_000 };
        let standings = |receives: Option<u64>, matched: Option<u64>| {
            BTreeMap::from([
                (2, Standing { receives: None, matched: Some(30_000) }),
                (4, Standing { receives, matched }),
            ])
        };
        let mut held = Held::default();
        held.look(&gauge, now, 26_000, &standings(None, None));
        assert_eq!(held.allows(26_000), 26_000, "nobody is sent one");
        held.look(&gauge, now, 26_000, &standings(Some(10_000), None));
        assert_eq!(held.allows(26_000), 10_000);
        assert_eq!(held.allows(6_000), 6_000);
        // It has the snapshot, and what follows is on its way.
        held.look(&gauge, now, 26_000, &standings(None, Some(12_000)));
        assert_eq!(held.allows(26_000), 10_000);
        held.look(&gauge, Mark { index: 30_001, bytes: 0 }, 26_000, &standings(None, Some(26_000)));
        assert_eq!(held.allows(26_000), 10_000, "not quite");
        held.look(&gauge, now, 26_000, &standings(None, Some(26_000)));
        assert_eq!(held.allows(26_000), 26_000, "it has caught up");

        // Who gets another one needs what follows that.
        held.look(&gauge, now, 26_000, &standings(Some(10_000), None));
        held.look(&gauge, now, 26_000, &standings(Some(20_000), None));
        assert_eq!(held.allows(26_000), 20_000);
        let much = Mark { index: 20_001 + 4 * 10_000, bytes: 0 };
        held.look(&gauge, much, 26_000, &standings(Some(20_000), None));
        assert_eq!(held.allows(26_000), 26_000, "too many entries");
        let large = Mark { index: 30_000, bytes: (401 << 20) + 20_000 };
        let mut held = Held::default();
        held.look(&gauge, large, 26_000, &standings(Some(20_000), None));
        assert_eq!(held.allows(26_000), 26_000, "too many bytes");
        let mut held = Held::default();
        held.look(&gauge, now, 26_000, &standings(Some(20_000), None));
        tokio::time::advance(HOLD_TIME + PACE).await;
        held.look(&gauge, now, 26_000, &standings(Some(20_000), None));
        assert_eq!(held.allows(26_000), 26_000, "too long");
        held.look(&gauge, now, 26_000, &standings(Some(20_000), None));
        assert_eq!(held.allows(26_000), 26_000, "for good");
        held.look(&gauge, now, 26_000, &standings(Some(25_000), None));
        assert_eq!(held.allows(26_000), 25_000, "another snapshot");
        held.look(&gauge, now, 26_000, &BTreeMap::new());
        assert_eq!(held.allows(26_000), 26_000, "no member any more, or this node leads no more");
    }

    #[test]
    fn nothing_is_purged_before_there_is_enough() {
        let mut gauge = Gauge::new(policy(), Mark { index: 0, bytes: 0 });
        gauge.observe(Mark { index: 3_000, bytes: 1 << 20 });
        assert_eq!(gauge.snapshot_taken(3_000), None);
    }
}
