//! Whether the disk can take what the node is about to promise.
//!
//! A log cannot be told that a disk is full: its first failed write is final. So no write may meet a full disk, and
//! the answer has to come before a write is taken on. [`Room`] looks at the file system before every batch that the
//! log writes, and every now and then besides, up to ten times a second when there is little left; [`DiskWatch`] is what others see of it, and of how long the log's
//! present write has been under way.
//!
//! # Room
//! A *reserve* holds blocks for what has been taken on already when the disk turns out to be full: commands in flight,
//! votes, what the store adds. Most of it is a file; a part, the *headroom*, the log's own file owns beyond its end at all
//! times (`fallocate` with `KEEP_SIZE`), so that whoever fills the disk cannot take the room of a batch between the
//! look before it and its write. Below a quarter of the reserve (or of what a batch may leave) the state is
//! [`DiskState::Full`], and the log's file is given all of the reserve but a piece for the next start. At every look it
//! is given again what it has lost: a store shortens its file now and then, and that frees what lies beyond.
//! Once the reserve is whole again, in whichever file, and half of it again is free, the state changes back.
//!
//! # Invariants
//! - Room is looked at before a batch reaches the store's file, never after.
//! - While the state is not `Full`, the reserve was whole at the last look, but for half of the headroom.
//! - At most one reserve is set aside: what the log owns counts.
//! - One look sets aside at most once. A file system that does not say what is set aside costs a warning, not a loop.
//! - A look that finds room which then cannot be had (a quota, of which `statvfs` says nothing) leads to `Full`.
//! - Readers of the state never wait for the disk, or for one who does.
//!
//! # What it does not do
//! Keep others from taking the blocks in the instant between their release by one file and their allocation by
//! another; protect a log whose file can own nothing beyond its end by more than the watermark. Either may end in
//! the log's failure, which stops the node.
//!
//! The protocol, with a figure: `docs/design/disk.md`.

mod policy;
mod reserve;
mod watch;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use crate::error::StorageError;
pub use crate::types::{DiskState, DiskStatus};

use super::files::{self, io_error, is_full};
use policy::{Figures, News, Policy, Space, Step};
use reserve::{Claimed, LEAST_CLAIM_BYTES, Reserve, claim, owned_beyond_end};
pub use watch::{DiskChanges, DiskWatch, Origin, Taken};

/// The name of the reserve in a data directory.
pub(super) const RESERVE: &str = "reserve";

/// The shortest pause between two looks at the file system while nothing is written.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// The longest. In between it is as long as others need to fill a disk at [`FILLED_BYTES_PER_MS`].
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The fastest that others are reckoned to fill a disk: 1 GB a second.
const FILLED_BYTES_PER_MS: u64 = 1_000_000;

/// Bytes that a batch may take on the disk, per byte of its entries: records, and what the store rewrites.
const BATCH_FACTOR: u64 = 2;
/// What a batch may take besides: it goes on in a new segment.
const SEGMENT_BYTES: u64 = 8 * 1024 * 1024;
/// Looks in a row that find nothing of what the log's file was just granted; then it is not asked for any more. One
/// may come at a moment when the store has shortened the file.
const MISSES: u8 = 3;

/// What all who look at the disk have last found.
#[derive(Debug, Default)]
struct SpaceGauge {
    /// A [`Space`]; see [`SpaceGauge::space`].
    space: AtomicU8,
    /// Told when that changes.
    changed: tokio::sync::watch::Sender<()>,
    available: AtomicU64,
    /// Bytes that are set aside, in whichever file.
    reserved: AtomicU64,
    /// Bytes that the log can surely write: free ones, and those that its file owns.
    room: AtomicU64,
    /// Bytes that are free beside a whole reserve.
    beside: AtomicU64,
    /// Whether the log's file owns room beyond its end.
    has_headroom: AtomicBool,
}

impl SpaceGauge {
    fn set_space(&self, space: Space) {
        let number = match space {
            Space::Ample => 0,
            Space::Low => 1,
            Space::Full => 2,
        };
        if self.space.swap(number, Relaxed) != number {
            self.changed.send_replace(());
        }
    }

    fn space(&self) -> Space {
        match self.space.load(Relaxed) {
            0 => Space::Ample,
            1 => Space::Low,
            _ => Space::Full,
        }
    }
}

/// The room of one data directory, and its reserve: opened before the log in it is, told of the log's file once that is
/// open ([`attend`](Self::attend)), and asked [before every batch](Self::before_batch). What the node sees of it is in a
/// [`DiskWatch`].
#[derive(Debug)]
pub struct Room {
    directory: PathBuf,
    reserve_bytes: u64,
    gauge: SpaceGauge,
    /// Held while looking, and while the reserve changes hands. Whoever holds it may wait for the disk.
    reserve_state: Mutex<ReserveState>,
    log: OnceLock<File>,
    phase: Mutex<LookPhase>,
    changed: Condvar,
}

/// Of the thread that looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LookPhase {
    Looking,
    Ending,
    Ended,
}

#[derive(Debug)]
struct ReserveState {
    policy: Policy,
    reserve: Reserve,
    /// Of [`MISSES`].
    misses: u8,
    /// Whether the log says that the disk is full, and nothing else since.
    told_full: bool,
}

impl Room {
    /// Opens the reserve of the data directory at `directory`, which this process has locked. Nothing is taken on
    /// before [`attend`](Self::attend). If the disk is full, part of the reserve is freed for opening the log.
    ///
    /// # Errors
    /// When the reserve cannot be opened, or the file system does not say how much is free.
    pub fn open(directory: &Path, reserve_bytes: u64) -> Result<Arc<Self>, StorageError> {
        let reserve = Reserve::open(&directory.join(RESERVE))?;
        let failed = |error| io_error("cannot ask for free space of", directory, error);
        let available = available_bytes(directory).map_err(failed)?;
        reserve.lend(available).map_err(|error| io_error("cannot shorten", reserve.path(), error))?;
        let gauge = SpaceGauge::default();
        gauge.set_space(Space::Full);
        Ok(Arc::new(Self {
            directory: directory.to_owned(),
            reserve_bytes,
            gauge,
            reserve_state: Mutex::new(ReserveState {
                policy: Policy::new(reserve_bytes),
                reserve,
                misses: 0,
                told_full: false,
            }),
            log: OnceLock::new(),
            phase: Mutex::new(LookPhase::Looking),
            changed: Condvar::new(),
        }))
    }

    /// Gives back what an earlier run has set aside in `directory`, for a node that is to set nothing aside.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn give_up(directory: &Path) -> Result<(), StorageError> {
        let path = directory.join(RESERVE);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(io_error("cannot remove", &path, error)),
            _ => Ok(()),
        }
    }

    /// Takes up its work for the log whose file is `log`, which is open by now: sets the reserve aside if that is
    /// possible, and has `spawn` start the thread that looks. It ends when what is returned is dropped; drop that after the
    /// last batch.
    ///
    /// # Errors
    /// When the file cannot be opened, or nothing can be set aside for another reason than that the disk is full; those of
    /// `spawn`.
    pub fn attend(
        self: &Arc<Self>,
        log: &Path,
        spawn: impl FnOnce(Box<dyn FnOnce() + Send>) -> Result<(), StorageError>,
    ) -> Result<Attendant, StorageError> {
        let file = OpenOptions::new().write(true).open(log);
        let file = file.map_err(|error| io_error("cannot open", log, error))?;
        self.log.get_or_init(|| file);
        self.look_with(&mut self.reserve_state(), 0, true)
            .map_err(|error| io_error("cannot set room aside in", &self.directory, error))?;
        if self.gauge.space() == Space::Full {
            let needed = Policy::needed(self.reserve_bytes);
            let (available, held) = (self.gauge.available.load(Relaxed), self.gauge.reserved.load(Relaxed));
            self.reserve_state().told_full = true;
            tracing::warn!(
                directory = %self.directory.display(),
                available,
                held,
                needed,
                "the disk is full; this node starts without taking writes until what is available and what it holds of its reserve are what is needed, in bytes"
            );
        }
        let looking = Looking(self.clone());
        spawn(Box::new(move || looking.0.look_until_ended()))?;
        Ok(Attendant(self.clone()))
    }

    /// Looks whether a batch of `bytes` will leave enough, and gives the log the reserve if it will not. A store calls it
    /// before the batch reaches its file, and then writes to blocks that the file owns already.
    ///
    /// # Errors
    /// When the file system does not answer. That the disk is full is no error: what was taken on already may be written.
    pub fn before_batch(&self, bytes: u64) -> io::Result<()> {
        let soon = bytes.saturating_mul(BATCH_FACTOR);
        let mut reserve_state = match self.reserve_state.try_lock() {
            Ok(reserve_state) => reserve_state,
            // Somebody looks at this moment, or sets the reserve aside, which takes time, and has found plenty.
            Err(_) if self.owns(soon)? => return Ok(()),
            Err(_) => self.reserve_state(),
        };
        self.look_with(&mut reserve_state, soon, false)?;
        if self.gauge.has_headroom.load(Relaxed)
            && !self.owns(soon)?
            && let Some(log) = self.log.get()
        {
            // No batch takes more than the reserve is meant for.
            let wanted = soon.saturating_add(SEGMENT_BYTES).min(reserve_state.policy.to_own());
            let available = self.gauge.available.load(Relaxed);
            if available >= LEAST_CLAIM_BYTES {
                let most = owned_beyond_end(log)?.saturating_add(available);
                let claimed = claim(log, wanted.max(reserve_state.policy.headroom()).min(most))?;
                if claimed == Claimed::Part {
                    // The batch has the reserve.
                    let before = reserve_state.policy.space();
                    self.find_full(&mut reserve_state)?;
                    self.report(before, &mut reserve_state);
                }
            }
        }
        Ok(())
    }

    /// Whether the log's file owns enough for a batch that takes `bytes`, or is not to own anything.
    fn owns(&self, bytes: u64) -> io::Result<bool> {
        let Some(log) = self.log.get().filter(|_| self.gauge.has_headroom.load(Relaxed)) else {
            return Ok(true);
        };
        Ok(owned_beyond_end(log)? >= bytes.saturating_add(SEGMENT_BYTES))
    }

    /// Whether `bytes` of something that can wait, such as a snapshot, may be written: what is left then is at least
    /// what ends [`DiskState::Full`], so they are never what leads to it. Asks the file system, because much can be
    /// written between two looks.
    pub(crate) fn has_room_for(&self, bytes: u64) -> io::Result<bool> {
        let available = available_bytes(&self.directory)?;
        let gauge = &self.gauge;
        let missing = gauge.available.load(Relaxed).saturating_sub(gauge.beside.load(Relaxed));
        let left = available.saturating_sub(missing).checked_sub(bytes);
        Ok(gauge.space() != Space::Full && left >= Some(Policy::untouched(self.reserve_bytes)))
    }

    fn reserve_state(&self) -> MutexGuard<'_, ReserveState> {
        self.reserve_state.lock().expect("invariant: no panic under this lock")
    }

    fn figures(&self, reserve_state: &ReserveState) -> io::Result<Figures> {
        Ok(Figures {
            available: available_bytes(&self.directory)?,
            held: reserve_state.reserve.held()?,
            owned: self.log.get().map_or(Ok(0), owned_beyond_end)?,
        })
    }

    /// Looks, as if `soon` more bytes were in use, and does what follows from it, once. Setting the reserve aside takes
    /// time, so it is left to those who `may_hold`.
    fn look_with(&self, reserve_state: &mut ReserveState, soon: u64, may_hold: bool) -> io::Result<()> {
        let before = reserve_state.policy.space();
        let figures = self.figures(reserve_state)?;
        let step = reserve_state
            .policy
            .observe(Figures { available: figures.available.saturating_sub(soon), ..figures });
        // Before anything that takes time: nothing more is to be taken on meanwhile.
        self.note(reserve_state, figures);
        match step {
            Step::Nothing => {}
            Step::Give => self.give(reserve_state, figures)?,
            Step::Hold if !may_hold => {}
            Step::Hold => match self.hold(reserve_state) {
                Ok(()) => {
                    let figures = self.figures(reserve_state)?;
                    // Whatever it says is the next look's to do.
                    reserve_state.policy.observe(figures);
                    self.note(reserve_state, figures);
                }
                Err(error) if is_full(error.kind()) => self.find_full(reserve_state)?,
                Err(error) => return Err(error),
            },
        }
        self.report(before, reserve_state);
        Ok(())
    }

    /// Room that should be there could not be had: somebody was faster, or there is a quota.
    fn find_full(&self, reserve_state: &mut ReserveState) -> io::Result<()> {
        reserve_state.policy.fill_up();
        let figures = self.figures(reserve_state)?;
        self.note(reserve_state, figures);
        self.give(reserve_state, figures)
    }

    fn report(&self, before: Space, reserve_state: &mut ReserveState) {
        let available = self.gauge.available.load(Relaxed);
        match News::of(before, reserve_state.policy.space(), &mut reserve_state.told_full) {
            Some(News::Full) => {
                tracing::error!(available, "the disk is full: this node takes no writes until there is room");
            }
            Some(News::RoomAgain) => {
                tracing::info!(available, "there is room again: this node takes writes");
            }
            Some(News::FillingUp) => tracing::warn!(available, "the disk is filling up"),
            None => {}
        }
    }

    /// Gives the log's file all of the reserve but a piece, and makes up for what either has lost since. On a file
    /// system that cannot do that what is given becomes free, for whoever is first.
    fn give(&self, reserve_state: &mut ReserveState, found: Figures) -> io::Result<()> {
        let Some(log) = self.log.get() else { return Ok(()) };
        let ReserveState { policy, reserve, .. } = &mut *reserve_state;
        reserve.keep(policy.piece(), found.available)?;
        let freed = found.held.saturating_sub(reserve.held()?);
        let missing = policy.to_own().saturating_sub(found.owned);
        // Beyond what is free there is nothing to be had, and asking is not cheap.
        let grant = missing.min(available_bytes(&self.directory)?.max(freed));
        let asks = grant >= LEAST_CLAIM_BYTES && (freed > 0 || policy.headroom() > 0);
        if asks {
            claim(log, found.owned.saturating_add(grant))?;
        }
        let figures = self.figures(reserve_state)?;
        self.note(reserve_state, figures);
        Ok(())
    }

    /// Sets aside what is missing: first for the log's file, then in the reserve's.
    ///
    /// # Errors
    /// One for which [`is_full`] holds if it cannot be had.
    fn hold(&self, reserve_state: &mut ReserveState) -> io::Result<()> {
        let Some(log) = self.log.get() else { return Ok(()) };
        let ReserveState { policy, reserve, misses, .. } = reserve_state;
        let headroom = policy.headroom();
        if headroom > 0 {
            let claimed = claim(log, headroom)?;
            if claimed == Claimed::Part {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let counts = owned_beyond_end(log)? >= headroom / 2;
            *misses = if counts { 0 } else { misses.saturating_add(1) };
            if claimed == Claimed::Nothing || *misses >= MISSES {
                tracing::warn!(directory = %self.directory.display(), "on this file system the log's file cannot own room in advance");
                policy.give_up_headroom();
            }
        }
        reserve.hold(policy.to_hold(owned_beyond_end(log)?))
    }

    fn note(&self, reserve_state: &ReserveState, found: Figures) {
        let Figures { available, held, owned } = found;
        self.gauge.available.store(available, Relaxed);
        self.gauge.reserved.store(held.saturating_add(owned), Relaxed);
        self.gauge.room.store(available.saturating_add(owned), Relaxed);
        self.gauge.beside.store(reserve_state.policy.beside(found), Relaxed);
        self.gauge.has_headroom.store(reserve_state.policy.headroom() > 0, Relaxed);
        self.gauge.set_space(reserve_state.policy.space());
    }

    fn look_until_ended(&self) {
        let mut failing = false;
        while self.goes_on_after(self.pause()) {
            let looked = self.look_with(&mut self.reserve_state(), 0, true);
            if let Err(error) = &looked
                && !failing
            {
                tracing::warn!(%error, directory = %self.directory.display(), "cannot look at the disk");
            }
            failing = looked.is_err();
        }
    }

    /// How long nobody need look.
    fn pause(&self) -> Duration {
        let beside = self.gauge.beside.load(Relaxed);
        Duration::from_millis(beside / FILLED_BYTES_PER_MS).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
    }

    fn phase(&self) -> MutexGuard<'_, LookPhase> {
        self.phase.lock().expect("invariant: no panic under this lock")
    }

    fn goes_on_after(&self, pause: Duration) -> bool {
        let looking = |phase: &mut LookPhase| *phase == LookPhase::Looking;
        let waited = self.changed.wait_timeout_while(self.phase(), pause, looking);
        *waited.expect("invariant: no panic under this lock").0 == LookPhase::Looking
    }
}

/// What the thread that looks has as long as it looks, whatever ends that.
struct Looking(Arc<Room>);

impl Drop for Looking {
    fn drop(&mut self) {
        *self.0.phase() = LookPhase::Ended;
        self.0.changed.notify_all();
    }
}

/// Ends the looking when dropped.
#[derive(Debug)]
pub struct Attendant(Arc<Room>);

impl Drop for Attendant {
    fn drop(&mut self) {
        /// A look at a disk that hangs goes with the process.
        const PATIENCE: Duration = Duration::from_secs(2);
        let Self(room) = self;
        let mut phase = room.phase();
        if *phase == LookPhase::Looking {
            *phase = LookPhase::Ending;
        }
        room.changed.notify_all();
        let ended = room.changed.wait_timeout_while(phase, PATIENCE, |phase| *phase != LookPhase::Ended);
        drop(ended.expect("invariant: no panic under this lock"));
    }
}

/// Size of the file system that `directory` is on, or would be made on.
///
/// # Errors
/// When the system does not say.
pub(crate) fn file_system_bytes(directory: &Path) -> Result<u64, StorageError> {
    let mut existing = directory;
    while !existing.exists() && existing != files::parent(existing) {
        existing = files::parent(existing);
    }
    let stat = rustix::io::retry_on_intr(|| rustix::fs::statvfs(existing))
        .map_err(|error| io_error("cannot ask for the size of the file system of", existing, error.into()))?;
    Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
}

/// Bytes that an unprivileged process could write to the file system of `directory`.
fn available_bytes(directory: &Path) -> io::Result<u64> {
    let stat = rustix::io::retry_on_intr(|| rustix::fs::statvfs(directory))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests;
