//! When snapshots are taken, and that the log is purged behind them as far as `retention` allows.
//!
//! Both are counted in entries and in bytes, whichever comes first: a log of small entries costs time at
//! the next start, one of large entries costs disk.
//!
//! The protocol, with a figure: `docs/design/snapshots.md`.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::retention::{LogGauge, LogMark, RetainedLog, followers};
use crate::engine::stop::until_ended;
use crate::engine::{Engine, Settings};
use crate::error::SnapshotError;
use crate::machine::StateMachine;
use crate::raft::core::{Core, CoreMetrics};
use crate::storage::DiskWatch;
use crate::types::{LogId, Role};

/// How often the applied position is looked at.
const PACE: Duration = Duration::from_millis(20);
/// A request for a snapshot is ignored while another one is being written, and repeated after this long.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How often that is doubled: a snapshot for which there is no room is not to be begun over and over.
const MAX_DOUBLINGS: u32 = 6;
/// How long a snapshot that somebody asked for may take.
const TAKE_PATIENCE: Duration = Duration::from_secs(60);

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
pub(in crate::engine) async fn run<M: StateMachine>(
    core: Core<M>,
    settings: watch::Receiver<Settings>,
    disk: DiskWatch,
) {
    let mut progress = core.published().watch();
    let mut compaction = Compaction::begin(core, settings, disk);
    // A restored state is kept at once, also where nothing is written after a restart.
    let mut is_first_look = true;
    loop {
        // While a snapshot is being written its end is awaited even if nothing is applied meanwhile, and while a follower
        // needs the log, the end of that.
        if !compaction.asking.is_under_way() && !std::mem::take(&mut is_first_look) {
            let changed = match compaction.retained.is_empty() {
                true => progress.changed().await,
                false => tokio::time::timeout(ASK_AGAIN, progress.changed()).await.unwrap_or(Ok(())),
            };
            if changed.is_err() {
                return until_ended().await;
            }
        }
        tokio::time::sleep(PACE).await;
        let mark = compaction.measure();
        let metrics = compaction.core.metrics();
        if metrics.fatal.is_some() || metrics.role == Role::Stopped {
            return until_ended().await;
        }
        compaction.note_snapshot(&metrics);
        compaction.purge(mark, &metrics).await;
        compaction.ask_if_due(mark).await;
    }
}

/// What is known from one look at the core to the next.
struct Compaction<M: StateMachine> {
    core: Core<M>,
    settings: watch::Receiver<Settings>,
    disk: DiskWatch,
    gauge: LogGauge,
    /// The newest snapshot that was noted.
    newest: Option<LogId>,
    asking: Asking,
    had_room: bool,
    /// Up to where the log is to be purged, has been, and what is held back from that.
    wanted: Option<u64>,
    purged: Option<u64>,
    retained: RetainedLog,
}

impl<M: StateMachine> Compaction<M> {
    fn begin(core: Core<M>, settings: watch::Receiver<Settings>, disk: DiskWatch) -> Self {
        let newest = core.metrics().snapshot;
        // What is applied is counted from the snapshot on, at a restart as well.
        let start = LogMark { index: newest.map_or(0, |snapshot| snapshot.index), bytes: 0 };
        let gauge = LogGauge::new(settings.borrow().snapshots.clone(), start);
        // The node was stopped between the snapshot of a restored state and the purge behind it.
        let wanted = (core.published().progress().is_restored && newest.is_some()).then_some(0);
        Self {
            core,
            settings,
            disk,
            gauge,
            newest,
            asking: Asking::default(),
            had_room: true,
            wanted,
            purged: None,
            retained: RetainedLog::default(),
        }
    }

    /// Where the log is now, by the settings of now.
    fn measure(&mut self) -> LogMark {
        let applied = self.core.published().progress();
        let index = applied.log_id.map_or(0, |log_id| log_id.index);
        let mark = LogMark { index, bytes: applied.command_bytes };
        self.gauge.observe(mark);
        if self.settings.has_changed().unwrap_or(false) {
            self.gauge.policy = self.settings.borrow_and_update().snapshots.clone();
        }
        mark
    }

    /// A snapshot that was not there before lets the log before it be purged.
    fn note_snapshot(&mut self, metrics: &CoreMetrics) {
        let Some(snapshot) = metrics.snapshot.filter(|_| metrics.snapshot > self.newest) else { return };
        self.newest = Some(snapshot);
        self.asking = Asking::default();
        self.wanted = self.gauge.snapshot_taken(snapshot.index).max(self.wanted);
        // A restored state is in the snapshot, and in nobody's else.
        let is_restored = self.core.published().progress().is_restored;
        self.wanted = self.wanted.max(is_restored.then_some(0));
    }

    async fn purge(&mut self, mark: LogMark, metrics: &CoreMetrics) {
        // Looked at all the time: a snapshot may have been sent before there is something to purge.
        let followers = followers(&self.core, metrics);
        self.retained.look(&self.gauge, mark, self.wanted.unwrap_or(0), &followers);
        let upto = self.wanted.map(|wanted| self.retained.allows(wanted));
        if let Some(upto) = upto.filter(|upto| Some(*upto) > self.purged) {
            self.purged = Some(upto);
            self.gauge.purged(upto);
            self.core.purge(upto).await;
        }
    }

    async fn ask_if_due(&mut self, mark: LogMark) {
        // A full disk has no room for a snapshot; it is taken once there is.
        let has_room = self.disk.has_room();
        if has_room && !self.had_room {
            self.asking.begin_anew();
        }
        self.had_room = has_room;
        let applied = self.core.published().progress();
        let is_first_due = applied.is_restored && self.newest.is_none() && applied.log_id.is_some();
        if has_room && (is_first_due || self.gauge.is_snapshot_due(mark)) && self.asking.ask() {
            self.core.snapshot().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
