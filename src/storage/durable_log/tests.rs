//! What is true on every disk, on one in memory.

mod script;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, MutexGuard};

use proptest::prelude::*;

use super::*;
use crate::storage::conformance::tests::{fixed_cases, run, steps};
use crate::storage::conformance::{Rig, command, completion};

const PATIENCE: Duration = Duration::from_secs(10);

/// What a log holds.
#[derive(Debug, Clone, Default)]
struct Content {
    entries: BTreeMap<u64, Entry>,
    bounds: LogBounds,
    vote: Option<Vote>,
    committed: Option<LogId>,
}

/// A disk in memory. All clones are the same one.
#[derive(Clone, Default)]
struct RamDisk(Arc<Ram>);

#[derive(Default)]
struct Ram {
    written: Mutex<Content>,
    /// What is there when it is opened the next time.
    flushed: Mutex<Content>,
    /// Flushes fail from now on.
    is_off: AtomicBool,
    before_flush: Option<Box<dyn Fn() -> io::Result<()> + Send + Sync>>,
    /// Sweeps that are due, and were done.
    due: AtomicUsize,
    sweeps: AtomicUsize,
    closed: AtomicUsize,
    dropped: AtomicUsize,
    synced_later: AtomicUsize,
    /// Syncing later panics from now on.
    sync_panics: AtomicBool,
}

/// One of the two handles of an open log.
struct Handle(RamDisk);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.0.dropped.fetch_add(1, SeqCst);
    }
}

impl RamDisk {
    fn new(before_flush: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(Ram { before_flush: Some(Box::new(before_flush)), ..Ram::default() }))
    }

    fn written(&self) -> MutexGuard<'_, Content> {
        self.0.written.lock().unwrap()
    }

    fn open(&self, tail_bytes: usize) -> Result<DurableLog<Handle>, StorageError> {
        self.open_with(tail_bytes, Duration::from_secs(30), |_| {})
    }

    fn open_with(
        &self,
        tail_bytes: usize,
        flush_watchdog: Duration,
        on_failure: impl Fn(&Failure) + Send + Sync + 'static,
    ) -> Result<DurableLog<Handle>, StorageError> {
        let duties = Duties { flush_watchdog, on_failure: Arc::new(on_failure), room: None };
        DurableLog::open(Path::new("memory"), duties, |progress, _| {
            progress.step().map_err(|GaveUp| too_late(Path::new("memory")))?;
            let flushed = self.0.flushed.lock().unwrap().clone();
            *self.written() = flushed.clone();
            let mut tail = Tail::new(tail_bytes);
            for entry in flushed.entries.into_values() {
                tail.push(0, entry);
            }
            tail.settle(0);
            let ram = self.0.clone();
            Ok(Opened {
                disk: Handle(self.clone()),
                reader: Handle(self.clone()),
                sync_later: Box::new(move || {
                    ram.synced_later.fetch_add(1, SeqCst);
                    assert!(!ram.sync_panics.load(SeqCst), "as the test wants it");
                    Ok(())
                }),
                grows: "nowhere".into(),
                recovered: RecoveredLog {
                    bounds: flushed.bounds,
                    vote: flushed.vote,
                    committed: flushed.committed,
                    tail,
                },
            })
        })
    }
}

impl LogDisk for Handle {
    type Reader = Self;
    type Error = io::Error;

    fn append(&mut self, entries: &[Entry]) -> io::Result<()> {
        let mut content = self.0.written();
        for entry in entries {
            assert_eq!(entry.log_id.index, first_index(content.bounds.last), "the next one");
            content.bounds.last = Some(entry.log_id);
            content.entries.insert(entry.log_id.index, entry.clone());
        }
        Ok(())
    }

    fn save_vote(&mut self, vote: Vote) -> io::Result<()> {
        self.0.written().vote = Some(vote);
        Ok(())
    }

    fn truncate(&mut self, from: u64, last: Option<LogId>) -> io::Result<()> {
        let mut content = self.0.written();
        assert!(!content.entries.split_off(&from).is_empty(), "there is something to be removed");
        assert!(first_index(content.bounds.purged) <= from && first_index(last) == from);
        content.bounds.last = last;
        Ok(())
    }

    fn purge(&mut self, upto: LogId) -> io::Result<()> {
        let mut content = self.0.written();
        content.entries = content.entries.split_off(&(upto.index + 1));
        content.bounds.purged = Some(upto);
        content.bounds.last = content.bounds.last.filter(|last| last.index > upto.index).or(Some(upto));
        self.0.0.due.store(3, SeqCst);
        Ok(())
    }

    fn flush(&mut self, committed: Option<LogId>) -> io::Result<()> {
        if let Some(before) = &self.0.0.before_flush {
            before()?;
        }
        let mut content = self.0.written();
        if committed.is_none_or(|committed| committed.index < first_index(content.bounds.last)) {
            content.committed = committed;
        }
        let mut flushed = self.0.0.flushed.lock().unwrap();
        if self.0.0.is_off.load(SeqCst) {
            return Err(io::Error::other("the disk is off"));
        }
        *flushed = content.clone();
        Ok(())
    }

    fn unswept(&self) -> bool {
        self.0.0.due.load(SeqCst) > 0
    }

    fn sweep(&mut self) -> io::Result<()> {
        self.0.0.due.fetch_sub(1, SeqCst);
        self.0.0.sweeps.fetch_add(1, SeqCst);
        Ok(())
    }

    fn close(&mut self) -> io::Result<()> {
        assert_eq!(self.0.0.dropped.load(SeqCst), 0, "closed before it is let go of");
        self.0.0.closed.fetch_add(1, SeqCst);
        Ok(())
    }
}

impl LogReader for Handle {
    fn read(&self, (start, end): (u64, u64), collected: &mut Collected) -> io::Result<Scanned> {
        let content = self.0.0.flushed.lock().unwrap();
        for index in start..end {
            let entry = content.entries.get(&index).ok_or(io::ErrorKind::InvalidData)?;
            if !collected.push(entry.clone()) {
                return Ok(Scanned::Full);
            }
        }
        Ok(Scanned::All)
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        Ok(0)
    }
}

fn append(log: &DurableLog<Handle>, index: u64) -> Receiver<io::Result<()>> {
    let (done, outcome) = completion();
    log.append(vec![command(1, index, 1)], done);
    outcome
}

struct RamRig {
    disk: RamDisk,
    tail_bytes: usize,
    log: Option<DurableLog<Handle>>,
}

impl RamRig {
    fn new(tail_bytes: usize) -> Self {
        let mut rig = Self { disk: RamDisk::default(), tail_bytes, log: None };
        rig.reopen();
        rig
    }
}

impl Rig for RamRig {
    fn store(&self) -> &dyn LogStore {
        self.log.as_ref().unwrap()
    }

    fn sync(&mut self) {}

    fn reopen(&mut self) {
        self.log = None;
        self.log = Some(self.disk.open(self.tail_bytes).unwrap());
    }

    /// Goes on with what is flushed at this moment.
    fn crash(&mut self, _keep: usize) {
        let flushed = {
            let flushed = self.disk.0.flushed.lock().unwrap();
            self.disk.0.is_off.store(true, SeqCst);
            flushed.clone()
        };
        self.log = None;
        self.disk = RamDisk::default();
        *self.disk.0.flushed.lock().unwrap() = flushed;
        self.reopen();
    }

    fn fail_next_write(&mut self) -> bool {
        self.disk.0.is_off.store(true, SeqCst);
        true
    }
}

#[test]
fn fixed() {
    fixed_cases(|| Box::new(RamRig::new(1000)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// Everything in the tail, a little, or nothing.
    #[test]
    fn random(tail_bytes in prop_oneof![Just(usize::MAX), Just(100_000), Just(0)], steps in steps(40)) {
        run(&mut RamRig::new(tail_bytes), &steps);
    }
}

#[test]
fn what_is_purged_is_swept_without_another_write() {
    let disk = RamDisk::default();
    let log = disk.open(0).unwrap();
    for index in 0..9 {
        append(&log, index).recv().unwrap().unwrap();
    }
    let (done, outcome) = completion();
    log.purge(LogId::new(1, 4), done);
    outcome.recv().unwrap().unwrap();
    let deadline = std::time::Instant::now() + PATIENCE;
    while disk.0.sweeps.load(SeqCst) < 3 {
        assert!(std::time::Instant::now() < deadline, "three sweeps are due");
        std::thread::yield_now();
    }
    drop(log);
    assert_eq!(disk.0.sweeps.load(SeqCst), 3, "and no more");
}

#[test]
fn a_log_that_is_well_is_closed_once_and_then_let_go_of() {
    let disk = RamDisk::default();
    let log = disk.open(0).unwrap();
    let (ram, (told, closed)) = (disk.clone(), mpsc::channel());
    log.on_closed(Box::new(move || told.send(ram.0.dropped.load(SeqCst)).unwrap()));
    let outcome = append(&log, 0);
    drop(log);
    outcome.recv().unwrap().unwrap();
    assert_eq!(closed.try_iter().collect::<Vec<_>>(), [2], "told once, and afterwards");
    assert_eq!(disk.0.flushed.lock().unwrap().bounds.last, Some(LogId::new(1, 0)));
    assert_eq!(disk.0.closed.load(SeqCst), 1);
    assert_eq!(disk.0.dropped.load(SeqCst), 2, "by the writer, and by those who read");
    assert!(disk.0.synced_later.load(SeqCst) >= 1, "what nobody waits for is durable too");
}

/// Whoever drops it may have it flush once more, and be told that all is well.
#[test]
fn a_disk_that_has_failed_is_not_even_dropped() {
    let disk = RamDisk::new(|| Err(io::Error::other("EIO")));
    let (sender, failures) = failures();
    let log = disk.open_with(0, PATIENCE, move |failure| sender.tell(failure)).unwrap();
    assert!(append(&log, 0).recv().unwrap().unwrap_err().to_string().contains("EIO"));
    assert!(!failures.recv().unwrap().hung);
    assert!(log.stats().unwrap().failed.load(Relaxed));
    drop(log);
    assert_eq!((disk.0.dropped.load(SeqCst), disk.0.closed.load(SeqCst)), (0, 0));
    assert_eq!(disk.0.flushed.lock().unwrap().bounds.last, None);
}

/// Nothing is wrong with the disk, so what was accepted before is written.
#[test]
fn a_write_that_does_not_fit_fails_the_log_and_not_the_disk() {
    let disk = RamDisk::default();
    let log = disk.open(0).unwrap();
    append(&log, 0).recv().unwrap().unwrap();
    append(&log, 2).recv().unwrap().unwrap_err();
    append(&log, 1).recv().unwrap().unwrap_err();
    drop(log);
    assert_eq!((disk.0.dropped.load(SeqCst), disk.0.closed.load(SeqCst)), (2, 1));
}

#[test]
fn an_entry_of_a_term_before_the_last_fails_the_log() {
    let disk = RamDisk::default();
    let log = disk.open(0).unwrap();
    let of_term = |term, index| {
        let (done, outcome) = completion();
        log.append(vec![command(term, index, 1)], done);
        outcome.recv().unwrap()
    };
    of_term(2, 0).unwrap();
    let refused = of_term(1, 1).unwrap_err().to_string();
    assert!(refused.contains("after one of term 2"), "{refused}");
}

#[test]
fn a_hang_is_reported_although_the_state_is_locked() {
    let (release, gate) = mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let disk = RamDisk::new(move || {
        let _ = gate.lock().unwrap().recv();
        Ok(())
    });
    let (sender, failures) = failures();
    let log = disk.open_with(0, Duration::from_millis(50), move |failure| sender.tell(failure)).unwrap();
    let outcome = append(&log, 0);
    let locked = log.shared.write();
    let failure = failures.recv_timeout(PATIENCE).expect("reported under the lock");
    assert!(failure.hung);
    drop(locked);
    outcome.recv().unwrap().unwrap_err();
    drop(log); // does not wait for the writer
    assert_eq!(disk.0.dropped.load(SeqCst), 0);
    drop(release);
}

/// What is said to be committed while a batch is written may come with the next one only, in the place of what is there.
#[test]
fn what_is_committed_is_written_with_what_it_was_said_after() {
    let (enter, entered) = mpsc::channel::<()>();
    let (release, released) = mpsc::channel::<()>();
    let (enter, released) = (Mutex::new(enter), Mutex::new(released));
    let disk = RamDisk::new(move || {
        enter.lock().unwrap().send(()).unwrap();
        released.lock().unwrap().recv().unwrap_or_default();
        Ok(())
    });
    let log = disk.open(usize::MAX).unwrap();
    let (done, first) = completion();
    log.append((0..10).map(|index| command(1, index, 1)).collect(), done);
    entered.recv_timeout(PATIENCE).unwrap();
    log.truncate(Some(LogId::new(1, 4)), completion().0);
    log.append((5..10).map(|index| command(2, index, 1)).collect(), completion().0);
    log.save_committed(Some(LogId::new(2, 8)));
    release.send(()).unwrap();
    first.recv_timeout(PATIENCE).unwrap().unwrap();
    let flushed = disk.0.flushed.lock().unwrap().clone();
    assert_eq!((flushed.bounds.last, flushed.committed), (Some(LogId::new(1, 9)), None));
    let (done, last) = completion();
    log.append(vec![command(2, 10, 1)], done);
    drop(release);
    last.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(disk.0.flushed.lock().unwrap().committed, Some(LogId::new(2, 8)));
}

/// Those who wait for their writes hear of it all the same, and closing waits for nobody.
#[test]
fn a_failure_is_final_although_the_one_who_is_told_panics() {
    let disk = RamDisk::new(|| Err(io::Error::other("EIO")));
    let log = disk.open_with(0, Duration::from_secs(30), |_| panic!("as the test wants it")).unwrap();
    append(&log, 0).recv_timeout(PATIENCE).unwrap().unwrap_err();
    append(&log, 1).recv_timeout(PATIENCE).unwrap().unwrap_err();
    drop(log);
    assert_eq!(disk.0.closed.load(SeqCst), 0);
}

#[test]
fn a_thread_that_panics_fails_the_log() {
    let disk = RamDisk::default();
    let (sender, failures) = failures();
    let log = disk.open_with(0, Duration::from_secs(30), move |failure| sender.tell(failure)).unwrap();
    append(&log, 0).recv().unwrap().unwrap();
    disk.0.sync_panics.store(true, SeqCst);
    let failure = failures.recv_timeout(PATIENCE).expect("reported");
    assert!(failure.reason.contains("log-sync-later") && !failure.hung, "{failure:?}");
    append(&log, 1).recv().unwrap().unwrap_err();
    drop(log);
    assert_eq!((disk.0.closed.load(SeqCst), disk.0.dropped.load(SeqCst)), (0, 0), "it is not touched again");
}

/// Where a failure is reported.
struct Teller(Mutex<Sender<Failure>>);

impl Teller {
    fn tell(&self, failure: &Failure) {
        self.0.lock().unwrap().send(failure.clone()).unwrap();
    }
}

fn failures() -> (Teller, Receiver<Failure>) {
    let (sender, failures) = mpsc::channel();
    (Teller(Mutex::new(sender)), failures)
}
