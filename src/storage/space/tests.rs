//! Rooms on disks that really are full: a tmpfs of a given size. These tests mount one, so they need root (or a user
//! namespace). Where that is missing they fail, unless `QUORATE_TEST_WITHOUT_MOUNT` is set: a check that did not run must
//! not look like one that passed.

mod script;

use std::os::unix::fs::FileExt;

use super::policy::{HEADROOM_BYTES, OPENING_BYTES};
use super::*;

const MIB: u64 = 1024 * 1024;

/// A room whose thread has ended, so that looks come when the test says so.
struct Still {
    room: Arc<Room>,
    log: PathBuf,
}

fn in_a_thread(body: Box<dyn FnOnce() + Send>) -> Result<(), StorageError> {
    std::thread::spawn(body);
    Ok(())
}

impl Still {
    fn open(directory: &Path, reserve_bytes: u64) -> Self {
        let log = directory.join("db");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&log).unwrap();
        if file.metadata().unwrap().len() == 0 {
            file.write_all_at(b"log", 0).unwrap();
        }
        let room = Room::open(directory, reserve_bytes).unwrap();
        drop(room.attend(&log, in_a_thread).unwrap());
        Self { room, log }
    }

    fn look(&self) -> Space {
        self.room.look_with(&mut self.room.reserve_state(), 0, true).unwrap();
        self.room.gauge.space()
    }

    fn figures(&self) -> Figures {
        self.room.figures(&self.room.reserve_state()).unwrap()
    }

    /// Writes as a log does: on at the end, to what the file owns.
    fn write(&self, bytes: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(&self.log)?;
        let mut end = file.metadata()?.len();
        let upto = end + bytes;
        let chunk = vec![7; MIB as usize];
        while end < upto {
            let length = (upto - end).min(MIB);
            file.write_all_at(&chunk[..length as usize], end)?;
            end += length;
        }
        Ok(())
    }
}

#[cfg(target_os = "linux")]
mod small_disk {
    use super::*;
    use quorate_disk::{SmallDisk, mounted};

    /// A mounted disk of so many bytes, unless that was allowed to be left out. Unmounted before its directory goes.
    fn small(bytes: u64) -> Option<(SmallDisk, tempfile::TempDir)> {
        let dir = tempfile::tempdir().unwrap();
        Some((mounted(SmallDisk::mount(dir.path(), bytes))?, dir))
    }

    #[test]
    fn a_disk_that_is_full_again_and_again_costs_one_reserve() {
        let Some((disk, dir)) = small(300 * MIB) else { return };
        let still = Still::open(dir.path(), 64 * MIB);
        let free = still.figures().available;
        for episode in 0..8 {
            disk.fill("ballast").unwrap();
            assert_eq!(still.look(), Space::Full);
            let full = still.figures();
            assert_eq!(full.held, OPENING_BYTES, "episode {episode}");
            assert!(full.owned >= 48 * MIB, "episode {episode}: {full:?}");
            assert!(full.available < MIB, "nobody else can take it");
            still.write(5 * MIB).unwrap();
            disk.empty("ballast").unwrap();
            assert_eq!(still.look(), Space::Ample, "episode {episode}");
            let now = still.figures();
            assert!(now.held + now.owned >= 64 * MIB, "episode {episode}: {now:?}");
            let used = free - now.available;
            assert!(used <= (episode + 1) * 5 * MIB + MIB, "episode {episode}: {used} bytes are gone");
        }
    }

    #[test]
    fn who_fills_the_disk_before_a_write_does_not_get_the_room_of_its_batch() {
        let Some((disk, dir)) = small(300 * MIB) else { return };
        let still = Still::open(dir.path(), 64 * MIB);
        for _ in 0..4 {
            assert!(still.figures().owned >= HEADROOM_BYTES / 2);
            still.room.before_batch(8 * MIB).unwrap();
            assert!(still.room.gauge.space() != Space::Full);
            disk.fill("ballast").unwrap();
            // What a batch of this size may take.
            still.write(8 * MIB * BATCH_FACTOR).unwrap();
            disk.empty("ballast").unwrap();
            still.look();
        }
        // While somebody looks, too.
        let reserve_state = still.room.reserve_state();
        still.room.before_batch(MIB).unwrap();
        drop(reserve_state);
    }

    #[test]
    fn a_log_that_is_shortened_on_a_full_disk_gets_the_room_again() {
        let Some((disk, dir)) = small(300 * MIB) else { return };
        let still = Still::open(dir.path(), 64 * MIB);
        still.write(8 * MIB).unwrap();
        disk.fill("ballast").unwrap();
        still.look();
        let full = still.figures();
        let log = OpenOptions::new().write(true).open(&still.log).unwrap();
        log.set_len(MIB).unwrap();
        assert_eq!(still.figures().owned, 0, "that freed it");
        assert_eq!(still.look(), Space::Full);
        let now = still.figures();
        assert!(now.owned >= full.owned + 7 * MIB, "{full:?}, then {now:?}");
        assert!(now.available < MIB && now.held == full.held, "{full:?}, then {now:?}");
    }

    #[test]
    fn a_claim_that_does_not_fit_gets_what_there_is() {
        let Some((disk, dir)) = small(64 * MIB) else { return };
        let file = std::fs::File::create(dir.path().join("db")).unwrap();
        assert_eq!(claim(&file, 100 * MIB).unwrap(), Claimed::Part);
        let owned = owned_beyond_end(&file).unwrap();
        assert!(owned > 60 * MIB, "{owned}");
        drop(disk);
    }

    #[test]
    fn a_start_on_a_full_disk_leaves_the_reserve_to_the_log() {
        let Some((disk, dir)) = small(300 * MIB) else { return };
        drop(Still::open(dir.path(), 128 * MIB));
        disk.fill("ballast").unwrap();
        let still = Still::open(dir.path(), 128 * MIB);
        assert_eq!(still.room.gauge.space(), Space::Full);
        let now = still.figures();
        assert!(now.available < 2 * MIB, "free for anybody: {now:?}");
        assert!(now.held + now.owned >= 126 * MIB, "{now:?}");
        let watch = DiskWatch::new(Some(still.room.clone()), || None, || 0, None);
        assert!(watch.take_entries(MIB, Origin::ThisLeader).is_some());
        disk.empty("ballast").unwrap();
        assert_eq!(still.look(), Space::Ample);
    }

    #[test]
    fn something_that_can_wait_does_not_fill_the_disk() {
        let Some((disk, dir)) = small(300 * MIB) else { return };
        let still = Still::open(dir.path(), 64 * MIB);
        let beside = still.room.gauge.beside.load(Relaxed);
        assert!(still.room.has_room_for(beside - 33 * MIB).unwrap());
        assert!(!still.room.has_room_for(beside - 31 * MIB).unwrap());
        // It need not be noticed first.
        disk.fill("ballast").unwrap();
        assert!(!still.room.has_room_for(1).unwrap());
    }
}

/// Looks go on by themselves on a disk with plenty of room, and end with the attendant.
#[test]
fn a_disk_with_room_takes_writes_once_the_reserve_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("db");
    std::fs::write(&log, b"log").unwrap();
    let room = Room::open(dir.path(), 4 * MIB).unwrap();
    let watch = DiskWatch::new(Some(room.clone()), || None, || 0, None);
    assert_eq!(watch.state(), DiskState::Full, "nothing is held yet");
    let attendant = room.attend(&log, in_a_thread).unwrap();
    assert!(watch.state().takes_writes() && watch.take_entries(1, Origin::ThisLeader).is_some());
    let status = watch.status();
    assert!(status.reserve_bytes >= Some(4 * MIB));
    assert!(status.available_bytes > Some(0));
    assert_eq!(std::fs::metadata(dir.path().join(RESERVE)).unwrap().len(), 4 * MIB);
    room.before_batch(100).unwrap();
    assert!(watch.state().takes_writes());
    drop(attendant);
}

/// Nobody waits for a thread that has panicked, and its panic reaches whoever started it.
#[test]
fn a_look_that_panics_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("db");
    std::fs::write(&log, b"log").unwrap();
    let room = Room::open(dir.path(), 4 * MIB).unwrap();
    let (sender, told) = std::sync::mpsc::channel();
    let guarded = |body: Box<dyn FnOnce() + Send>| {
        let body = std::panic::AssertUnwindSafe(body);
        std::thread::spawn(move || sender.send(std::panic::catch_unwind(|| { body }.0()).is_err()));
        Ok(())
    };
    let attendant = room.attend(&log, guarded).unwrap();
    let poisoner = room.clone();
    std::thread::spawn(move || {
        let _reserve_state = poisoner.reserve_state();
        panic!("as the test wants it");
    })
    .join()
    .unwrap_err();
    assert_eq!(told.recv_timeout(std::time::Duration::from_secs(30)), Ok(true));
    assert_eq!(*room.phase(), LookPhase::Ended);
    drop(attendant);
}

/// A batch that would leave nothing gives the log the reserve before it is written.
#[test]
fn a_batch_that_needs_all_there_is_finds_the_reserve_with_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let still = Still::open(dir.path(), 32 * MIB);
    still.room.before_batch(u64::MAX / BATCH_FACTOR).unwrap();
    assert_eq!(still.room.gauge.space(), Space::Full);
    assert!(still.figures().held <= OPENING_BYTES);
    #[cfg(target_os = "linux")]
    assert!(still.figures().owned >= 15 * MIB);
    assert!(still.look() != Space::Full);
    let now = still.figures();
    assert!(now.held + now.owned >= 32 * MIB, "{now:?}");
}

/// What the file system says is there may not be there for this process.
#[test]
fn room_that_cannot_be_had_is_a_full_disk() {
    let mut policy = Policy::new(128 * MIB);
    let plenty = Figures { available: 1000 * MIB, held: 104 * MIB, owned: 24 * MIB };
    assert_eq!((policy.observe(plenty), policy.space()), (Step::Nothing, Space::Ample));
    let used = Figures { owned: 4 * MIB, ..plenty };
    assert_eq!(policy.observe(used), Step::Hold);
    policy.fill_up();
    assert_eq!((policy.observe(used), policy.space()), (Step::Hold, Space::Full), "until it can be had");
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
        assert!(is_full(kind));
    }
    assert!(!is_full(io::ErrorKind::Other));
}

#[test]
fn entries_are_taken_on_a_full_disk_until_half_of_the_reserve_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let room = Room::open(dir.path(), 128 * MIB).unwrap();
    room.gauge.room.store(112 * MIB, Relaxed);
    let queued = Arc::new(AtomicU64::new(0));
    let waiting = queued.clone();
    let watch = DiskWatch::new(Some(room.clone()), || None, move || waiting.load(Relaxed), None);
    let take = |mib, origin| watch.take_entries(mib * MIB, origin);
    // Twice the bytes, and 64 MiB left.
    assert!(take(25, Origin::ThisLeader).is_none());
    let first = take(20, Origin::ThisLeader).unwrap();
    assert!(take(5, Origin::ThisLeader).is_none(), "what is under way counts");
    // What comes before a new leader's first entry leaves less.
    assert!(take(28, Origin::EarlierLeaders).is_some());
    assert!(take(29, Origin::EarlierLeaders).is_none());
    drop(first);
    assert!(take(24, Origin::ThisLeader).is_some());
    queued.store(20 * MIB, Relaxed);
    assert!(take(5, Origin::ThisLeader).is_none(), "and what is queued");
    room.gauge.set_space(Space::Low);
    assert!(take(500, Origin::ThisLeader).is_some());
}

#[test]
fn a_write_that_takes_too_long_is_a_stall_until_it_ends() {
    let writing = Arc::new(Mutex::new(None));
    let now = writing.clone();
    let limit = Duration::from_secs(1);
    let watch = DiskWatch::new(None, move || *now.lock().unwrap(), || 0, Some(limit));
    let began = std::time::Instant::now();
    let look_after = |part: u32| {
        *writing.lock().unwrap() = Some(limit * part / 5);
        watch.look_at(began + limit * part / 5)
    };
    assert_eq!(watch.look_at(began), DiskState::Ok);
    assert!((1..=5).all(|part| look_after(part) == DiskState::Ok));
    assert_eq!(look_after(6), DiskState::Stalled);
    assert!(watch.take_entries(1, Origin::ThisLeader).is_some());
    *writing.lock().unwrap() = None;
    assert_eq!(watch.state(), DiskState::Stalled, "what the last look has found");
    assert_eq!(watch.look_at(began + limit * 2), DiskState::Ok);
}
