//! What the rest of the node sees of its disk.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::policy::{Policy, Space};
use super::{BATCH_FACTOR, DiskState, DiskStatus, Room, SEGMENT_BYTES};

/// Tells how long a write has been under way.
type Writing = dyn Fn() -> Option<Duration> + Send + Sync;
/// Tells how many bytes wait to be written to the log.
type Queued = dyn Fn() -> u64 + Send + Sync;

/// Whose commands are to be taken on a full disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// At least one is of the leader that sends them.
    ThisLeader,
    /// All are of leaders before it: until they are in the log, its own first entry cannot be, and it answers no read.
    EarlierLeaders,
}

/// Room for entries on their way into the log; none by default. Dropped, it is free again, or used.
#[derive(Debug, Default)]
pub struct Taken(Option<(Arc<Watched>, u64)>);

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some((watched, bytes)) = &self.0 {
            watched.taken.fetch_sub(*bytes, Relaxed);
        }
    }
}

/// A node's view of its disk. Cheap to clone, and never waits for the disk. The default watches nothing and finds
/// everything in order: a store in memory has no disk.
#[derive(Clone, Default)]
pub struct DiskWatch(Option<Arc<Watched>>);

struct Watched {
    room: Option<Arc<Room>>,
    writing: Box<Writing>,
    queued: Box<Queued>,
    stall: Option<Duration>,
    stalled: AtomicBool,
    /// Told when that changes.
    stall_changed: watch::Sender<()>,
    /// What the looks at the present write have seen of it.
    seen: Mutex<Seen>,
    /// Bytes of entries that were taken and are on their way into the log.
    taken: AtomicU64,
}

/// The most that one look tells of the time since the look before it. A process that is stopped, or gets no time to run,
/// does not look: what it measures afterwards is its own pause.
const LONGEST_GAP: Duration = Duration::from_millis(250);

/// Later than this after the look before it, a look begins anew: the process was stopped.
const STANDSTILL: Duration = Duration::from_secs(1);

/// What is known of the write that is under way, from looks at it.
#[derive(Debug, Default)]
struct Seen {
    last_look: Option<Instant>,
    /// For how long the present write has been seen under way.
    under_way: Duration,
}

impl Seen {
    /// Takes in a look at `now`, by the clock at which a write has been under way for `writing`.
    fn look(&mut self, now: Instant, writing: Option<Duration>) -> Duration {
        let last = self.last_look.replace(now);
        let gap = last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.under_way = match writing {
            None => Duration::ZERO,
            // Nothing is known but this.
            Some(time) if last.is_none() => time,
            Some(_) if gap > STANDSTILL => Duration::ZERO,
            // It was under way at the last look already.
            Some(time) if time >= gap => self.under_way + gap.min(LONGEST_GAP),
            Some(time) => time,
        };
        self.under_way
    }
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watched").field("room", &self.room).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for DiskWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DiskWatch").field(&self.status()).finish()
    }
}

impl DiskWatch {
    /// Watches `room`, and a log whose present write is `writing` and for which so many bytes are `queued`; a write
    /// that takes longer than `stall` has stalled.
    pub fn new(
        room: Option<Arc<Room>>,
        writing: impl Fn() -> Option<Duration> + Send + Sync + 'static,
        queued: impl Fn() -> u64 + Send + Sync + 'static,
        stall: Option<Duration>,
    ) -> Self {
        Self(Some(Arc::new(Watched {
            room,
            writing: Box::new(writing),
            queued: Box::new(queued),
            stall,
            stalled: AtomicBool::new(false),
            stall_changed: watch::Sender::new(()),
            seen: Mutex::default(),
            taken: AtomicU64::new(0),
        })))
    }

    /// Whether there is anything to watch.
    pub fn watches(&self) -> bool {
        self.0.is_some()
    }

    /// Looks whether a write has stalled, or one that had has come back. To be called every now and then: the other
    /// methods tell what this one has found. Time in which nobody looked counts for little: then it was this process that
    /// stood still, and not the disk.
    pub fn look(&self) -> DiskState {
        self.look_at(Instant::now())
    }

    pub(super) fn look_at(&self, now: Instant) -> DiskState {
        if let Some(watched) = &self.0
            && let Some(limit) = watched.stall
        {
            let writing = (watched.writing)();
            let seen = watched.seen.lock().unwrap_or_else(PoisonError::into_inner).look(now, writing);
            let stalled = seen > limit;
            let was_stalled = watched.stalled.swap(stalled, Relaxed);
            if was_stalled != stalled {
                watched.stall_changed.send_replace(());
            }
            match (was_stalled, stalled) {
                (false, true) => {
                    let writing_ms = writing.map(crate::runtime::whole_ms);
                    tracing::error!(writing_ms, "the disk hangs: this node takes no writes");
                }
                (true, false) => tracing::info!("the disk answers again"),
                _ => {}
            }
        }
        self.state()
    }

    /// Tells when [`state`](Self::state) may have changed.
    pub fn changes(&self) -> DiskChanges {
        let watched = self.0.as_ref();
        DiskChanges {
            stall: watched.map(|watched| watched.stall_changed.subscribe()),
            space: watched.and_then(|watched| Some(watched.room.as_ref()?.gauge.changed.subscribe())),
        }
    }

    /// What the disk is good for.
    pub fn state(&self) -> DiskState {
        let Some(watched) = &self.0 else { return DiskState::Ok };
        if watched.stalled.load(Relaxed) {
            return DiskState::Stalled;
        }
        match watched.room.as_ref().map_or(Space::Ample, |room| room.gauge.space()) {
            Space::Ample => DiskState::Ok,
            Space::Low => DiskState::Low,
            Space::Full => DiskState::Full,
        }
    }

    /// Takes `bytes` of a leader's entries, or none if there is no room for them. There is on a full disk, as long as
    /// half of what was the reserve is left for votes and what is under way: the last writes of a cluster whose disks
    /// are all full are to be committed. What a new leader needs to get to its own first entry may use
    /// more. What was taken and is not written yet counts as written; keep the outcome until it is.
    pub fn take_entries(&self, bytes: u64, origin: Origin) -> Option<Taken> {
        /// Left for votes in any case: they may begin a segment.
        const LAST_BYTES: u64 = 2 * SEGMENT_BYTES;
        const SHARE: u64 = 2;
        let Some(watched) = &self.0 else { return Some(Taken(None)) };
        let before = watched.taken.fetch_add(bytes, Relaxed);
        let taken = Taken(Some((watched.clone(), bytes)));
        let Some(room) = &watched.room else { return Some(taken) };
        let gauge = &room.gauge;
        if gauge.space() != Space::Full {
            return Some(taken);
        }
        let half = room.reserve_bytes / SHARE;
        let kept = match origin {
            Origin::ThisLeader => half,
            Origin::EarlierLeaders => LAST_BYTES.min(half),
        };
        // What is queued was taken, but may be longer than its sender has waited for the answer.
        let pending = before.max((watched.queued)()).saturating_add(bytes);
        let needed = kept.saturating_add(pending.saturating_mul(BATCH_FACTOR));
        (gauge.room.load(Relaxed) >= needed).then_some(taken)
    }

    /// Whether something that can wait, such as a snapshot, should be begun.
    pub fn has_room(&self) -> bool {
        let room = self.0.as_ref().and_then(|watched| watched.room.as_ref());
        room.is_none_or(|room| {
            let untouched = Policy::untouched(room.reserve_bytes);
            room.gauge.space() != Space::Full && room.gauge.beside.load(Relaxed) >= untouched
        })
    }

    /// All that is known.
    pub fn status(&self) -> DiskStatus {
        let Some(watched) = &self.0 else { return DiskStatus::default() };
        let gauge = watched.room.as_ref().map(|room| &room.gauge);
        DiskStatus {
            state: self.state(),
            is_watched: true,
            available_bytes: gauge.map(|gauge| gauge.available.load(Relaxed)),
            reserve_bytes: gauge.map(|gauge| gauge.reserved.load(Relaxed)),
            needed_bytes: watched.room.as_ref().map(|room| Policy::needed(room.reserve_bytes)),
            writing_for: (watched.writing)(),
        }
    }
}

/// See [`DiskWatch::changes`].
#[derive(Debug)]
pub struct DiskChanges {
    stall: Option<watch::Receiver<()>>,
    space: Option<watch::Receiver<()>>,
}

impl DiskChanges {
    /// Waits for a change, for ever where nobody watches.
    pub async fn changed(&mut self) {
        async fn of(one: &mut Option<watch::Receiver<()>>) {
            if let Some(receiver) = one
                && receiver.changed().await.is_ok()
            {
                return;
            }
            // Nothing changes any more.
            std::future::pending().await
        }
        tokio::select! {
            () = of(&mut self.stall) => {}
            () = of(&mut self.space) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    /// A watch of a disk whose present write began at a time that the test sets.
    struct Clock {
        now: Instant,
        began: Arc<Mutex<Option<Instant>>>,
        at: Arc<Mutex<Instant>>,
        disk: DiskWatch,
    }

    impl Clock {
        fn new() -> Self {
            let now = Instant::now();
            let (began, at) = (Arc::new(Mutex::new(None)), Arc::new(Mutex::new(now)));
            let (since, present) = (began.clone(), at.clone());
            let writing = move || since.lock().unwrap().map(|began| *present.lock().unwrap() - began);
            let disk = DiskWatch::new(None, writing, || 0, Some(Duration::from_secs(1)));
            Self { now, began, at, disk }
        }

        fn begin_write(&self) {
            *self.began.lock().unwrap() = Some(self.now);
        }

        fn end_write(&self) {
            *self.began.lock().unwrap() = None;
        }

        fn look_after(&mut self, ms: u64) -> DiskState {
            self.now += Duration::from_millis(ms);
            *self.at.lock().unwrap() = self.now;
            self.disk.look_at(self.now)
        }
    }

    #[test]
    fn a_write_that_does_not_come_back_is_a_stall() {
        let mut clock = Clock::new();
        let mut changes = clock.disk.changes();
        clock.look_after(50);
        clock.begin_write();
        let looks: Vec<_> = (0..30).map(|_| clock.look_after(50)).collect();
        let first = looks.iter().position(|state| *state == DiskState::Stalled).unwrap();
        assert_eq!(first, 20, "after 1050 ms: {looks:?}");
        assert!(changes.changed().now_or_never().is_some(), "it is told");
        assert!(changes.changed().now_or_never().is_none(), "once");
        assert!(looks[first..].iter().all(|state| *state == DiskState::Stalled));
        clock.end_write();
        assert_eq!(clock.look_after(50), DiskState::Ok);
        assert!(changes.changed().now_or_never().is_some());
        // Another that has begun since is another.
        clock.begin_write();
        assert!((0..20).all(|_| clock.look_after(50) == DiskState::Ok));
    }

    /// The process is stopped for a minute in the middle of a write, and goes on.
    #[test]
    fn a_pause_of_the_process_is_no_stall() {
        for before_the_pause in [0, 400, 950] {
            let mut clock = Clock::new();
            clock.look_after(50);
            clock.begin_write();
            for _ in 0..before_the_pause / 50 {
                assert_eq!(clock.look_after(50), DiskState::Ok);
            }
            assert_eq!(clock.look_after(60_000), DiskState::Ok, "{before_the_pause} ms before the pause");
            assert_eq!(clock.look_after(50), DiskState::Ok);
            clock.end_write();
            assert_eq!(clock.look_after(50), DiskState::Ok);
        }
        // A disk that does not answer after the pause either hangs.
        let mut clock = Clock::new();
        clock.look_after(50);
        clock.begin_write();
        clock.look_after(60_000);
        assert!((0..21).any(|_| clock.look_after(50) == DiskState::Stalled));
        // So does one on a machine that is so busy that each look comes late.
        let mut clock = Clock::new();
        clock.look_after(50);
        clock.begin_write();
        assert!((0..6).any(|_| clock.look_after(700) == DiskState::Stalled));
    }
}
