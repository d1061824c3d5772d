//! The stores of this crate keep their promises, and stores that do not are found out.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;

use super::steps::command;
use super::{Effort, Promise, RandomStep, Rig, check, completion, failures, fixed, try_steps};
use crate::storage::{Completion, LogBounds, LogStore};
use crate::types::{Entry, LogId, Vote};

const PATIENCE: Duration = Duration::from_secs(30);

/// Sequences that proptest can shorten.
pub(crate) fn steps(longest: usize) -> impl Strategy<Value = Vec<RandomStep>> {
    prop::collection::vec(any::<u64>().prop_map(RandomStep::random), 1..longest)
}

pub(crate) fn fixed_cases(mut open: impl FnMut() -> Box<dyn Rig>) {
    fixed::cases(&mut open, PATIENCE).unwrap();
    failures::cases(&mut open, PATIENCE).unwrap();
}

pub(crate) fn run(rig: &mut dyn Rig, steps: &[RandomStep]) {
    try_steps(rig, steps, PATIENCE).unwrap();
}

fn wait(rig: &mut dyn Rig, write: impl FnOnce(&dyn LogStore, Completion)) -> io::Result<()> {
    let (done, outcome) = completion();
    write(rig.store(), done);
    rig.sync();
    outcome.recv().expect("completed")
}

mod memory {
    use super::*;
    use crate::storage::memory::{MemoryDisk, MemoryStore, SyncMode};

    pub(super) struct MemoryRig {
        disk: MemoryDisk,
        store: MemoryStore,
    }

    impl MemoryRig {
        pub(super) fn new(mode: SyncMode) -> Self {
            let disk = MemoryDisk::new(mode);
            Self { store: MemoryStore::open(&disk), disk }
        }
    }

    impl Rig for MemoryRig {
        fn store(&self) -> &dyn LogStore {
            &self.store
        }

        fn sync(&mut self) {
            self.disk.sync();
        }

        fn reopen(&mut self) {
            self.disk.sync();
            self.store = MemoryStore::open(&self.disk);
        }

        fn crash(&mut self, keep: usize) {
            self.disk.crash(keep);
            let (done, outcome) = completion();
            self.store.append(Vec::new(), done);
            outcome.recv().unwrap().unwrap_err();
            self.store = MemoryStore::open(&self.disk);
        }

        fn fail_next_write(&mut self) -> bool {
            self.disk.fail_next_sync("EIO");
            true
        }
    }

    #[test]
    fn fixed() {
        fixed_cases(|| Box::new(MemoryRig::new(SyncMode::Manual)));
    }

    #[test]
    fn a_failed_sync_is_final_until_the_disk_is_opened_again() {
        let mut rig = MemoryRig::new(SyncMode::Manual);
        wait(&mut rig, |store, done| store.append(vec![command(1, 0, 1)], done)).unwrap();
        rig.disk.fail_next_sync("EIO");
        wait(&mut rig, |store, done| store.append(vec![command(1, 1, 1)], done)).unwrap_err();
        wait(&mut rig, |store, done| store.append(vec![command(1, 2, 1)], done)).unwrap_err();
        assert_eq!(rig.disk.sync(), 0);
        rig.disk.crash(1); // the write had reached the disk after all
        rig.store = MemoryStore::open(&rig.disk);
        assert_eq!(rig.store.bounds().last, Some(LogId::new(1, 1)));
        wait(&mut rig, |store, done| store.append(vec![command(1, 2, 1)], done)).unwrap();
    }

    #[test]
    fn those_who_sync_hear_of_writes() {
        let disk = MemoryDisk::new(SyncMode::Manual);
        let store = MemoryStore::open(&disk);
        let (sender, receiver) = mpsc::channel();
        disk.on_pending(move || sender.send(()).unwrap());
        store.append(vec![command(1, 0, 1)], completion().0);
        store.save_vote(Vote { term: 1, node_id: 1, committed: false }, completion().0);
        assert_eq!((receiver.try_iter().count(), disk.pending()), (2, 2));
        assert_eq!(disk.sync_first(1), 1);
        assert_eq!(disk.sync(), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn random(steps in steps(40)) {
            run(&mut MemoryRig::new(SyncMode::Manual), &steps);
        }
    }
}

mod sled {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::storage::{DiskEvent, SledOptions, SledStore, files};

    struct SledRig {
        directory: tempfile::TempDir,
        tail_bytes: usize,
        store: Option<SledStore>,
        /// The next flush fails.
        fails: Arc<AtomicBool>,
    }

    impl SledRig {
        fn new(tail_bytes: usize) -> Self {
            let (directory, fails) = (tempfile::tempdir().unwrap(), Arc::default());
            let mut rig = Self { directory, tail_bytes, store: None, fails };
            rig.reopen();
            rig
        }

        fn path(&self) -> PathBuf {
            self.directory.path().join("log")
        }

        fn open(&mut self) {
            let fails = self.fails.clone();
            let options = SledOptions {
                tail_bytes: self.tail_bytes,
                observer: Some(Arc::new(move |event| match event {
                    DiskEvent::Flush if fails.swap(false, SeqCst) => Err(io::Error::other("EIO")),
                    _ => Ok(()),
                })),
                ..SledOptions::default()
            };
            self.store = Some(SledStore::open(&self.path(), options).unwrap());
        }
    }

    impl Rig for SledRig {
        fn store(&self) -> &dyn LogStore {
            self.store.as_ref().unwrap()
        }

        fn sync(&mut self) {}

        fn reopen(&mut self) {
            self.store = None;
            self.open();
        }

        /// Goes on with a copy of the files as they are when everything is durable, or has failed, and the store still open.
        fn crash(&mut self, _keep: usize) {
            let (done, outcome) = completion();
            self.store().append(Vec::new(), done);
            let failed = outcome.recv().unwrap().is_err();
            assert_eq!(failed, self.store().stats().unwrap().failed.load(SeqCst));
            let copy = tempfile::tempdir().unwrap();
            copy_directory(self.directory.path(), copy.path());
            self.store = None;
            self.directory = copy;
            self.open();
        }

        fn fail_next_write(&mut self) -> bool {
            self.fails.store(true, SeqCst);
            true
        }
    }

    fn copy_directory(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for path in files::list(from).unwrap() {
            let target = to.join(path.file_name().unwrap());
            if path.is_dir() {
                copy_directory(&path, &target);
            } else {
                fs::copy(&path, &target).unwrap();
            }
        }
    }

    #[test]
    fn fixed() {
        fixed_cases(|| Box::new(SledRig::new(1000)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

        /// Everything in the tail, a little, or nothing.
        #[test]
        fn random(tail_bytes in prop_oneof![Just(usize::MAX), Just(100_000), Just(0)], steps in steps(40)) {
            run(&mut SledRig::new(tail_bytes), &steps);
        }
    }
}

/// Stores that break one promise each.
mod broken {
    use super::memory::MemoryRig;
    use super::*;
    use crate::storage::SyncMode;

    /// What is wrong with a store.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Defect {
        /// Calls completions before anything is durable.
        ConfirmsAtOnce,
        /// Never calls the completion of a vote.
        ForgetsTheVotesCompletion,
        /// Returns one entry more than fits.
        ReadsTooMuch,
        /// Writes a vote again only if its term is another.
        ComparesTermsOnly,
        /// Takes an append that leaves a hole for done.
        HidesErrors,
        /// Purges what is there, but not beyond the end.
        StopsAtTheEnd,
        /// Takes all that it finds when it is opened for committed.
        SaysAllIsCommitted,
        /// Takes a vote that its disk failed to write for done.
        HidesTheVotesErrors,
        /// Lets go of what is queued when it is closed.
        ForgetsItsQueue,
    }

    struct BrokenStore {
        defect: Defect,
        inner: MemoryRig,
        is_reopened: bool,
    }

    impl BrokenStore {
        fn store(&self) -> &dyn LogStore {
            self.inner.store()
        }

        fn done(&self, done: Completion) -> Completion {
            match self.defect {
                Defect::ConfirmsAtOnce => {
                    done(Ok(()));
                    Box::new(|_| {})
                }
                Defect::HidesErrors => Box::new(|_| done(Ok(()))),
                _ => done,
            }
        }
    }

    impl LogStore for BrokenStore {
        fn bounds(&self) -> LogBounds {
            self.store().bounds()
        }

        fn vote(&self) -> Option<Vote> {
            self.store().vote()
        }

        fn committed(&self) -> Option<LogId> {
            let found = self.store().bounds().last.filter(|_| self.defect == Defect::SaysAllIsCommitted);
            self.store().committed().or(found.filter(|_| self.is_reopened))
        }

        fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
            let mut read = self.store().read(start, end, max_bytes)?;
            if self.defect == Defect::ReadsTooMuch
                && let Some(last) = read.last()
            {
                let next = last.log_id.index + 1;
                read.extend(self.store().read(next, end.min(next.saturating_add(1)), 0)?);
            }
            Ok(read)
        }

        fn append(&self, entries: Vec<Entry>, done: Completion) {
            self.store().append(entries, self.done(done));
        }

        fn save_vote(&self, vote: Vote, done: Completion) {
            match self.defect {
                Defect::ForgetsTheVotesCompletion => self.store().save_vote(vote, Box::new(|_| {})),
                Defect::ComparesTermsOnly if self.vote().is_some_and(|known| known.term == vote.term) => {
                    self.store().append(Vec::new(), done);
                }
                Defect::HidesTheVotesErrors => self.store().save_vote(vote, Box::new(|_| done(Ok(())))),
                _ => self.store().save_vote(vote, self.done(done)),
            }
        }

        fn save_committed(&self, committed: Option<LogId>) {
            self.store().save_committed(committed);
        }

        fn truncate(&self, last: Option<LogId>, done: Completion) {
            self.store().truncate(last, self.done(done));
        }

        fn purge(&self, upto: LogId, done: Completion) {
            let upto = match self.bounds().last {
                Some(last) if self.defect == Defect::StopsAtTheEnd && last < upto => last,
                _ => upto,
            };
            self.store().purge(upto, self.done(done));
        }
    }

    struct BrokenRig(BrokenStore);

    impl Rig for BrokenRig {
        fn store(&self) -> &dyn LogStore {
            &self.0
        }

        fn sync(&mut self) {
            self.0.inner.sync();
        }

        fn reopen(&mut self) {
            match self.0.defect {
                Defect::ForgetsItsQueue => self.0.inner.crash(0),
                _ => self.0.inner.reopen(),
            }
            self.0.is_reopened = true;
        }

        fn crash(&mut self, keep: usize) {
            self.0.inner.crash(keep);
        }

        fn fail_next_write(&mut self) -> bool {
            self.0.inner.fail_next_write()
        }
    }

    fn rig(defect: Defect) -> Box<dyn Rig> {
        Box::new(BrokenRig(BrokenStore {
            defect,
            inner: MemoryRig::new(SyncMode::Manual),
            is_reopened: false,
        }))
    }

    fn effort() -> Effort {
        Effort { runs: 200, patience: Duration::from_millis(20), ..Effort::default() }
    }

    #[test]
    fn each_is_found_out() {
        for (defect, promise) in [
            (Defect::ConfirmsAtOnce, Promise::Failure),
            (Defect::ForgetsTheVotesCompletion, Promise::Completion),
            (Defect::ReadsTooMuch, Promise::Visibility),
            (Defect::ComparesTermsOnly, Promise::Visibility),
            (Defect::HidesErrors, Promise::Failure),
            (Defect::StopsAtTheEnd, Promise::Visibility),
            (Defect::SaysAllIsCommitted, Promise::Order),
            (Defect::HidesTheVotesErrors, Promise::Failure),
            (Defect::ForgetsItsQueue, Promise::Completion),
        ] {
            let broken = check(|| rig(defect), effort()).expect_err(&format!("{defect:?} goes unnoticed"));
            assert_eq!(broken.promise, promise, "{defect:?}: {broken}");
        }
    }

    /// The fixed cases aside: what is confirmed at once is gone after a crash, and two steps are enough to show it.
    #[test]
    fn a_sequence_is_shortened() {
        let found = (0..200).find_map(|seed| {
            let steps = super::super::steps::sequence(seed, 40);
            let broken = try_steps(&mut *rig(Defect::ConfirmsAtOnce), &steps, PATIENCE).err()?;
            Some((steps, broken))
        });
        let (steps, broken) = found.expect("a write that is lost");
        assert_eq!(broken.promise, Promise::Durability);
        let mut open = || rig(Defect::ConfirmsAtOnce);
        let shortened = super::super::shorten(&mut open, steps, broken, PATIENCE);
        assert!(shortened.to_string().contains("Crash("), "{shortened}");
        assert_eq!(shortened.detail.matches("Crash(").count(), 1, "{shortened}");
        assert!(!shortened.detail.contains("Read("), "{shortened}");
    }
}
