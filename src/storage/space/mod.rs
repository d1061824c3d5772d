//! Whether the disk can take what the node is about to promise.
//!
//! sled cannot be told that a disk is full: its first failed write is final. So no write may meet a full disk, and
//! the answer has to come before a write is taken on. [`Room`] looks at the file system before every batch that the
//! log writes, and ten times a second besides; [`DiskWatch`] is what others see of it, and of how long the log's
//! present write has been under way.
//!
//! # Room
//! A *reserve* file holds blocks for what has been taken on already when the disk turns out to be full: commands in
//! flight, votes, what sled adds. Below a quarter of the reserve (or of what a batch may leave) the state is
//! [`DiskState::Full`], and the reserve is given to the log's file, beyond its end: from then on nobody else can
//! take it, even a process that goes on writing. A piece is kept, for the next start. Once the whole reserve
//! and half of it again are free, it is set aside again, and only then the state changes back.
//!
//! # Invariants
//! - Room is looked at before a batch reaches sled, never after.
//! - While the state is not `Full`, the reserve was whole at the last look.
//! - Readers of the state never wait for the disk, or for one who does.
//!
//! # What it does not do
//! Keep others from taking the blocks in the instant between their release by one file and their allocation by
//! another; notice a quota of which `statvfs` says nothing. Either may end in sled's failure, which stops the node.

mod policy;
mod reserve;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use crate::error::StorageError;

use super::files::io_error;
use policy::{Figures, Policy, Space, Step};
use reserve::{Reserve, owned_beyond_end};

/// The name of the reserve in a data directory.
const RESERVE: &str = "reserve";

/// How often the file system is asked while nothing is written.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Bytes that a batch may take on the disk, per byte of its entries: records, and what sled rewrites.
const BATCH_FACTOR: u64 = 2;

/// What the disk is good for at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskState {
    /// Writes are taken.
    #[default]
    Ok,
    /// Writes are taken, but room is getting short: less than the size of the reserve is left beside it.
    Low,
    /// No new writes are taken; reads go on.
    Full,
    /// A write has been under way for too long. No new writes are taken.
    Stalled,
}

impl DiskState {
    /// Every state, in the order of their badness.
    pub const ALL: [Self; 4] = [Self::Ok, Self::Low, Self::Full, Self::Stalled];

    /// Whether a node in this state may take on writes.
    pub fn takes_writes(self) -> bool {
        matches!(self, Self::Ok | Self::Low)
    }

    /// `ok`, `low`, `full` or `stalled`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Low => "low",
            Self::Full => "full",
            Self::Stalled => "stalled",
        }
    }
}

impl std::fmt::Display for DiskState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a node knows of its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskStatus {
    /// What it is good for.
    pub state: DiskState,
    /// Bytes free for this process at the last look; none where nobody looks.
    pub available_bytes: Option<u64>,
    /// Bytes that the reserve holds; none without a reserve.
    pub reserve_bytes: Option<u64>,
    /// How long the present write of the log has been under way.
    pub writing_for: Option<Duration>,
}

/// What all who look at the disk have last found.
#[derive(Debug, Default)]
struct Gauge {
    /// A [`Space`]; see [`Gauge::space`].
    space: AtomicU8,
    available: AtomicU64,
    held: AtomicU64,
    /// Bytes that the log can surely write: free ones, and those that its file owns.
    room: AtomicU64,
}

impl Gauge {
    fn set_space(&self, space: Space) {
        let number = match space {
            Space::Ample => 0,
            Space::Low => 1,
            Space::Full => 2,
        };
        self.space.store(number, Relaxed);
    }

    fn space(&self) -> Space {
        match self.space.load(Relaxed) {
            0 => Space::Ample,
            1 => Space::Low,
            _ => Space::Full,
        }
    }
}

/// The room of one data directory, and its reserve.
#[derive(Debug)]
pub(crate) struct Room {
    directory: PathBuf,
    reserve_bytes: u64,
    gauge: Gauge,
    /// Held while looking, and while the reserve changes hands. Whoever holds it may wait for the disk.
    ledger: Mutex<Ledger>,
    log: OnceLock<File>,
    phase: Mutex<Phase>,
    changed: Condvar,
}

/// Of the thread that looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Looking,
    Ending,
    Ended,
}

#[derive(Debug)]
struct Ledger {
    policy: Policy,
    reserve: Reserve,
}

impl Room {
    /// Opens the reserve of the data directory at `directory`, which this process has locked. Nothing is taken on
    /// before [`attend`](Self::attend). If the disk is full, part of the reserve is freed for opening the log.
    pub(crate) fn open(directory: &Path, reserve_bytes: u64) -> Result<Arc<Self>, StorageError> {
        let reserve = Reserve::open(&directory.join(RESERVE), reserve_bytes)?;
        let failed = |error| io_error("cannot ask for free space of", directory, error);
        let available = available_bytes(directory).map_err(failed)?;
        reserve.lend(available).map_err(|error| io_error("cannot shorten", reserve.path(), error))?;
        let gauge = Gauge::default();
        gauge.set_space(Space::Full);
        Ok(Arc::new(Self {
            directory: directory.to_owned(),
            reserve_bytes,
            gauge,
            ledger: Mutex::new(Ledger { policy: Policy::new(reserve_bytes), reserve }),
            log: OnceLock::new(),
            phase: Mutex::new(Phase::Looking),
            changed: Condvar::new(),
        }))
    }

    /// Takes up its work for the log whose file is `log`, which is open by now: sets the reserve aside if that is
    /// possible, and starts the thread that looks.
    pub(crate) fn attend(self: &Arc<Self>, log: &Path) -> Result<Attendant, StorageError> {
        let file = OpenOptions::new().write(true).open(log);
        let file = file.map_err(|error| io_error("cannot open", log, error))?;
        self.log.get_or_init(|| file);
        {
            let mut ledger = self.ledger();
            match ledger.reserve.hold() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                    tracing::warn!(directory = %self.directory.display(), "the disk is full; this node starts without taking writes");
                }
                Err(error) => return Err(io_error("cannot set aside", ledger.reserve.path(), error)),
            }
            self.look_with(&mut ledger, 0, true)
                .map_err(|error| io_error("cannot ask for free space of", &self.directory, error))?;
        }
        let room = self.clone();
        std::thread::Builder::new()
            .name("disk-look".to_owned())
            .spawn(move || room.look_until_ended())
            .map_err(|error| io_error("cannot start a thread for", &self.directory, error))?;
        Ok(Attendant(self.clone()))
    }

    /// Looks whether a batch of `bytes` will leave enough, and gives the log the reserve if it will not. Called before
    /// the batch reaches sled.
    pub(crate) fn before_batch(&self, bytes: u64) -> io::Result<()> {
        // Whoever sets the reserve aside at this moment has found plenty.
        let Ok(mut ledger) = self.ledger.try_lock() else { return Ok(()) };
        self.look_with(&mut ledger, bytes.saturating_mul(BATCH_FACTOR), false)
    }

    /// Whether `bytes` of something that can wait, such as a snapshot, may be written.
    pub(crate) fn has_room_for(&self, bytes: u64) -> bool {
        self.gauge.space() != Space::Full && self.gauge.available.load(Relaxed) > bytes
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().expect("invariant: no panic under this lock")
    }

    /// Looks, as if `soon` more bytes were in use, and does what follows from it. Setting the reserve aside takes
    /// time, so it is left to those who `may_hold`.
    fn look_with(&self, ledger: &mut Ledger, soon: u64, may_hold: bool) -> io::Result<()> {
        let before = ledger.policy.space();
        loop {
            let available = available_bytes(&self.directory)?;
            let held = ledger.reserve.held()?;
            let step = ledger.policy.observe(Figures { available: available.saturating_sub(soon), held });
            // Before anything that takes time: nothing more is to be taken on meanwhile.
            self.note(ledger.policy.space(), available, held)?;
            match step {
                Step::Nothing => break,
                Step::Give => {
                    if let Some(log) = self.log.get() {
                        ledger.reserve.give(log)?;
                    }
                    self.note(
                        ledger.policy.space(),
                        available_bytes(&self.directory)?,
                        ledger.reserve.held()?,
                    )?;
                    break;
                }
                Step::Hold if !may_hold => break,
                Step::Hold => match ledger.reserve.hold() {
                    Ok(()) => {}
                    // Somebody was faster. Another time.
                    Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                    Err(error) => return Err(error),
                },
            }
        }
        let (now, available) = (ledger.policy.space(), self.gauge.available.load(Relaxed));
        match (before, now) {
            (Space::Full, Space::Full) => {}
            (_, Space::Full) => {
                tracing::error!(available, "the disk is full: this node takes no writes until there is room");
            }
            (Space::Full, _) => tracing::info!(available, "there is room again: this node takes writes"),
            (Space::Ample, Space::Low) => tracing::warn!(available, "the disk is filling up"),
            _ => {}
        }
        Ok(())
    }

    fn note(&self, space: Space, available: u64, held: u64) -> io::Result<()> {
        let owned = self.log.get().map_or(Ok(0), owned_beyond_end)?;
        self.gauge.available.store(available, Relaxed);
        self.gauge.held.store(held, Relaxed);
        self.gauge.room.store(available.saturating_add(owned), Relaxed);
        self.gauge.set_space(space);
        Ok(())
    }

    fn look_until_ended(&self) {
        let mut failing = false;
        while self.goes_on_after(LOOK_INTERVAL) {
            let looked = self.look_with(&mut self.ledger(), 0, true);
            if let Err(error) = &looked
                && !failing
            {
                tracing::warn!(%error, directory = %self.directory.display(), "cannot look at the disk");
            }
            failing = looked.is_err();
        }
        *self.phase() = Phase::Ended;
        self.changed.notify_all();
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().expect("invariant: no panic under this lock")
    }

    fn goes_on_after(&self, pause: Duration) -> bool {
        let looking = |phase: &mut Phase| *phase == Phase::Looking;
        let waited = self.changed.wait_timeout_while(self.phase(), pause, looking);
        *waited.expect("invariant: no panic under this lock").0 == Phase::Looking
    }
}

/// Ends the looking when dropped.
#[derive(Debug)]
pub(crate) struct Attendant(Arc<Room>);

impl Drop for Attendant {
    fn drop(&mut self) {
        /// A look at a disk that hangs goes with the process.
        const PATIENCE: Duration = Duration::from_secs(2);
        let Self(room) = self;
        let mut phase = room.phase();
        if *phase == Phase::Looking {
            *phase = Phase::Ending;
        }
        room.changed.notify_all();
        let ended = room.changed.wait_timeout_while(phase, PATIENCE, |phase| *phase != Phase::Ended);
        drop(ended.expect("invariant: no panic under this lock"));
    }
}

/// Tells how long a write has been under way.
type Writing = dyn Fn() -> Option<Duration> + Send + Sync;

/// A node's view of its disk. Cheap to clone, and never waits for the disk. The default watches nothing and finds
/// everything in order: a store in memory has no disk.
#[derive(Clone, Default)]
pub struct DiskWatch(Option<Arc<Watched>>);

struct Watched {
    room: Option<Arc<Room>>,
    writing: Box<Writing>,
    stall: Option<Duration>,
    stalled: AtomicBool,
}

impl std::fmt::Debug for DiskWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DiskWatch").field(&self.status()).finish()
    }
}

impl DiskWatch {
    /// Watches `room`, and a log whose present write is `writing`; one that takes longer than `stall` has stalled.
    pub(crate) fn new(
        room: Option<Arc<Room>>,
        writing: impl Fn() -> Option<Duration> + Send + Sync + 'static,
        stall: Option<Duration>,
    ) -> Self {
        let writing = Box::new(writing);
        Self(Some(Arc::new(Watched { room, writing, stall, stalled: AtomicBool::new(false) })))
    }

    /// Whether there is anything to watch.
    pub fn watches(&self) -> bool {
        self.0.is_some()
    }

    /// Looks whether a write has stalled, or one that had has come back. To be called every now and then: the other
    /// methods tell what this one has found.
    pub fn look(&self) -> DiskState {
        if let Some(watched) = &self.0
            && let Some(limit) = watched.stall
        {
            let writing = (watched.writing)();
            let stalled = writing.is_some_and(|time| time > limit);
            match (watched.stalled.swap(stalled, Relaxed), stalled) {
                (false, true) => tracing::error!(?writing, "the disk hangs: this node takes no writes"),
                (true, false) => tracing::info!("the disk answers again"),
                _ => {}
            }
        }
        self.state()
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

    /// Whether entries of a leader can be taken. They can on a full disk, as long as half of what was the
    /// reserve is left for votes and what is under way: the last writes of a cluster whose disks are all full
    /// are to be committed.
    pub fn takes_entries(&self) -> bool {
        const SHARE: u64 = 2;
        let room = self.0.as_ref().and_then(|watched| watched.room.as_ref());
        room.is_none_or(|room| {
            let gauge = &room.gauge;
            gauge.space() != Space::Full || gauge.room.load(Relaxed) >= room.reserve_bytes / SHARE
        })
    }

    /// Whether something that can wait, such as a snapshot, should be begun.
    pub fn has_room(&self) -> bool {
        let room = self.0.as_ref().and_then(|watched| watched.room.as_ref());
        room.is_none_or(|room| room.gauge.space() != Space::Full)
    }

    /// All that is known.
    pub fn status(&self) -> DiskStatus {
        let Some(watched) = &self.0 else { return DiskStatus::default() };
        let gauge = watched.room.as_ref().map(|room| &room.gauge);
        DiskStatus {
            state: self.state(),
            available_bytes: gauge.map(|gauge| gauge.available.load(Relaxed)),
            reserve_bytes: gauge.map(|gauge| gauge.held.load(Relaxed)),
            writing_for: (watched.writing)(),
        }
    }
}

/// Bytes that an unprivileged process could write to the file system of `directory`.
fn available_bytes(directory: &Path) -> io::Result<u64> {
    let stat = rustix::io::retry_on_intr(|| rustix::fs::statvfs(directory))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    /// Looks go on by themselves on a disk with plenty of room, and end with the attendant.
    #[test]
    fn a_disk_with_room_takes_writes_once_the_reserve_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("db");
        std::fs::write(&log, b"log").unwrap();
        let room = Room::open(dir.path(), 4 * MIB).unwrap();
        let watch = DiskWatch::new(Some(room.clone()), || None, None);
        assert_eq!(watch.state(), DiskState::Full, "nothing is held yet");
        let attendant = room.attend(&log).unwrap();
        assert!(watch.state().takes_writes() && watch.takes_entries());
        let status = watch.status();
        assert_eq!(status.reserve_bytes, Some(4 * MIB));
        assert!(status.available_bytes > Some(0));
        assert_eq!(std::fs::metadata(dir.path().join(RESERVE)).unwrap().len(), 4 * MIB);
        room.before_batch(100).unwrap();
        assert!(watch.state().takes_writes());
        drop(attendant);
    }

    /// A batch that would leave nothing gives the log the reserve before it is written.
    #[test]
    fn a_batch_that_needs_all_there_is_finds_the_reserve_with_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("db");
        std::fs::write(&log, b"log").unwrap();
        let room = Room::open(dir.path(), 32 * MIB).unwrap();
        let attendant = room.attend(&log).unwrap();
        // Otherwise the thread would set the reserve aside again at once.
        drop(attendant);
        room.before_batch(u64::MAX).unwrap();
        assert_eq!(room.gauge.space(), Space::Full);
        assert!(room.gauge.held.load(Relaxed) < 32 * MIB);
        #[cfg(target_os = "linux")]
        assert!(owned_beyond_end(room.log.get().unwrap()).unwrap() >= 15 * MIB);
        room.before_batch(0).unwrap();
        assert_eq!(room.gauge.space(), Space::Full, "that takes time, and is not for the writer");
        room.look_with(&mut room.ledger(), 0, true).unwrap();
        assert!(room.gauge.space() != Space::Full);
        assert_eq!(room.gauge.held.load(Relaxed), 32 * MIB);
    }

    #[test]
    fn a_write_that_takes_too_long_is_a_stall_until_it_ends() {
        let writing = Arc::new(Mutex::new(None));
        let now = writing.clone();
        let limit = Duration::from_secs(1);
        let watch = DiskWatch::new(None, move || *now.lock().unwrap(), Some(limit));
        assert_eq!(watch.look(), DiskState::Ok);
        *writing.lock().unwrap() = Some(limit);
        assert_eq!(watch.look(), DiskState::Ok);
        *writing.lock().unwrap() = Some(limit * 2);
        assert_eq!((watch.look(), watch.takes_entries()), (DiskState::Stalled, true));
        *writing.lock().unwrap() = None;
        assert_eq!(watch.state(), DiskState::Stalled, "what the last look has found");
        assert_eq!(watch.look(), DiskState::Ok);
    }
}
