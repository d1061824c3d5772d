//! What every [`LogStore`] promises, checked against a model that is too simple to be wrong.
//!
//! A [`Rig`] wraps a store together with what it takes to close or crash it and open it again. Fixed cases
//! first, then random sequences of writes, reads, reopenings and crashes.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc;

use bytes::Bytes;
use proptest::prelude::*;

use super::{Completion, LogBounds, LogStore};
use crate::types::{Entry, Incarnation, LogId, Member, Membership, Payload, Vote};

/// A store under test.
pub(crate) trait Rig {
    fn store(&self) -> &dyn LogStore;
    /// Makes what was submitted durable, if the store does not do so by itself.
    fn sync(&mut self);
    /// Closes in order and opens again: nothing may be lost.
    fn reopen(&mut self);
    /// Crashes, keeps at most `keep` of the writes that are not durable, and opens again. Returns how many were
    /// kept; more than there were means all.
    fn crash(&mut self, keep: usize) -> usize;
}

/// A completion, and where its outcome arrives.
pub(crate) fn completion() -> (Completion, mpsc::Receiver<io::Result<()>>) {
    let (sender, receiver) = mpsc::channel();
    (Box::new(move |outcome| sender.send(outcome).unwrap_or_default()), receiver)
}

pub(crate) fn command(term: u64, index: u64, bytes: usize) -> Entry {
    let fill = (index as u8).wrapping_mul(7).wrapping_add(term as u8);
    Entry { log_id: LogId::new(term, index), payload: Payload::Command(Bytes::from(vec![fill; bytes])) }
}

/// One step of a random run.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// Append entries of these sizes, after raising the term by so much.
    Append(Vec<usize>, u64),
    Membership,
    Vote(u64, u64, bool),
    /// Commit at this fraction of the log.
    Commit(u8),
    /// Truncate so many entries from the end.
    Truncate(u8),
    /// Purge at this fraction of the log.
    Purge(u8),
    /// Purge so many entries beyond the end.
    PurgeBeyond(u8),
    /// Read from and to these fractions, with this many bytes.
    Read(u8, u8, usize),
    Sync,
    Reopen,
    Crash(usize),
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        8 => 0usize..600,
        3 => 10_000usize..60_000,
        // Around the size of a record.
        2 => (65_536usize - 80)..(65_536 + 40),
        1 => 60_000usize..300_000,
    ]
}

pub(crate) fn steps(count: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (prop::collection::vec(size(), 1..12), 0u64..2).prop_map(|(sizes, raise)| Step::Append(sizes, raise)),
        1 => Just(Step::Append(Vec::new(), 0)),
        1 => Just(Step::Membership),
        2 => (0u64..9, 1u64..4, any::<bool>()).prop_map(|(term, node, committed)| Step::Vote(term, node, committed)),
        2 => any::<u8>().prop_map(Step::Commit),
        3 => (0u8..20).prop_map(Step::Truncate),
        2 => any::<u8>().prop_map(Step::Purge),
        1 => (1u8..20).prop_map(Step::PurgeBeyond),
        5 => (any::<u8>(), any::<u8>(), 0usize..400_000).prop_map(|(from, to, bytes)| Step::Read(from, to, bytes)),
        2 => Just(Step::Sync),
        2 => Just(Step::Reopen),
        2 => (0usize..6).prop_map(Step::Crash),
    ];
    prop::collection::vec(step, 1..count)
}

/// The log as it should be.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    entries: BTreeMap<u64, Entry>,
    purged: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    term: u64,
}

impl Model {
    fn bounds(&self) -> LogBounds {
        let last = self.entries.values().next_back().map(|entry| entry.log_id).or(self.purged);
        LogBounds { purged: self.purged, last }
    }

    fn first(&self) -> u64 {
        self.purged.map_or(0, |purged| purged.index + 1)
    }

    fn next(&self) -> u64 {
        self.bounds().last.map_or(0, |last| last.index + 1)
    }

    /// The index at a fraction of the log, or just after it.
    fn at(&self, fraction: u8) -> u64 {
        self.first() + (self.next() - self.first()) * u64::from(fraction) / 255
    }

    fn read(&self, start: u64, end: u64, max_bytes: usize) -> Vec<Entry> {
        let mut read: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        for entry in self.entries.values().filter(|entry| (start..end).contains(&entry.log_id.index)) {
            bytes += entry.size_bytes();
            if bytes > max_bytes && !read.is_empty() {
                break;
            }
            read.push(entry.clone());
        }
        read
    }
}

/// Runs `steps` on the store and on the model, and compares them after each.
pub(crate) fn run(rig: &mut dyn Rig, steps: &[Step]) {
    let mut model = Model::default();
    // What the log was after each write since the last sync, oldest first; the first is surely durable.
    let mut history = vec![model.clone()];
    let mut waiting = Vec::new();
    for step in steps {
        let (done, outcome) = completion();
        let mut wrote = true;
        match step {
            Step::Append(sizes, raise) => {
                model.term += raise;
                let entries: Vec<_> = sizes
                    .iter()
                    .zip(model.next()..)
                    .map(|(size, index)| command(model.term, index, *size))
                    .collect();
                model.entries.extend(entries.iter().map(|entry| (entry.log_id.index, entry.clone())));
                rig.store().append(entries, done);
            }
            Step::Membership => {
                let member = Member {
                    peer: "a:1".into(),
                    client: "b:2".into(),
                    incarnation: Incarnation(9),
                    ..Member::default()
                };
                let membership = Membership { voters: vec![[1].into()], members: [(1, member)].into() };
                let log_id = LogId::new(model.term, model.next());
                let entries = [
                    Entry { log_id, payload: Payload::Membership(membership) },
                    Entry { log_id: LogId::new(log_id.term, log_id.index + 1), payload: Payload::Blank },
                ];
                model.entries.extend(entries.iter().map(|entry| (entry.log_id.index, entry.clone())));
                rig.store().append(entries.to_vec(), done);
            }
            Step::Vote(term, node_id, committed) => {
                let vote = Vote { term: *term, node_id: *node_id, committed: *committed };
                model.vote = Some(vote);
                rig.store().save_vote(vote, done);
            }
            Step::Commit(fraction) => {
                let committed = model.entries.get(&model.at(*fraction)).map(|entry| entry.log_id);
                if committed > model.committed {
                    model.committed = committed;
                    rig.store().save_committed(committed);
                }
                wrote = false;
            }
            Step::Truncate(count) => {
                // What is committed is never truncated.
                let floor = model.committed.map_or(0, |committed| committed.index + 1).max(model.first());
                let from = model.next().saturating_sub(u64::from(*count)).max(floor);
                model.entries.split_off(&from);
                rig.store().truncate(model.bounds().last, done);
            }
            Step::Purge(fraction) => {
                match model.entries.get(&model.at(*fraction)).map(|entry| entry.log_id) {
                    Some(upto) => {
                        model.entries = model.entries.split_off(&(upto.index + 1));
                        model.purged = Some(upto);
                        rig.store().purge(upto, done);
                    }
                    None => wrote = false,
                }
            }
            Step::PurgeBeyond(count) => {
                let upto = LogId::new(model.term, model.next() + u64::from(*count));
                model.entries.clear();
                model.purged = Some(upto);
                rig.store().purge(upto, done);
            }
            Step::Read(from, to, max_bytes) => {
                let (start, end) = (model.at(*from), model.at(*to));
                let read = rig.store().read(start, end, *max_bytes).unwrap();
                assert_eq!(read, model.read(start, end, *max_bytes), "read {start}..{end}");
                wrote = false;
            }
            Step::Sync | Step::Reopen => {
                rig.sync();
                for outcome in waiting.drain(..) {
                    let outcome: mpsc::Receiver<io::Result<()>> = outcome;
                    outcome.recv().expect("every write is completed").unwrap();
                    assert!(outcome.try_recv().is_err(), "exactly once");
                }
                if matches!(step, Step::Reopen) {
                    rig.reopen();
                    model.committed = rig.store().committed(); // checked below
                }
                history = vec![model.clone()];
                wrote = false;
            }
            Step::Crash(keep) => {
                let kept = rig.crash(*keep).min(history.len() - 1);
                let committed = rig.store().committed();
                model = history.swap_remove(kept);
                assert!(
                    committed <= model.bounds().last.max(model.committed),
                    "{committed:?} is beyond the log"
                );
                model.committed = committed;
                model.term += 1; // entries of before and after can be told apart
                waiting.clear();
                history = vec![model.clone()];
                wrote = false;
            }
        }
        if wrote {
            waiting.push(outcome);
            history.push(model.clone());
        }
        check(rig.store(), &model);
    }
}

fn check(store: &dyn LogStore, model: &Model) {
    assert_eq!(store.bounds(), model.bounds());
    assert_eq!(store.vote(), model.vote);
    assert_eq!(store.committed(), model.committed);
    assert_eq!(store.read(0, u64::MAX, usize::MAX).unwrap(), model.read(0, u64::MAX, usize::MAX));
}

/// The cases that every store has to get right, one by one.
pub(crate) fn fixed_cases(mut open: impl FnMut() -> Box<dyn Rig>) {
    completions_come_in_order(&mut *open());
    appends_must_follow(&mut *open());
    truncations_name_what_is_there(&mut *open());
    purging_beyond_the_end(&mut *open());
    committed_stays_within_the_log(&mut *open());
}

fn wait(rig: &mut dyn Rig, write: impl FnOnce(&dyn LogStore, Completion)) -> io::Result<()> {
    let (done, outcome) = completion();
    write(rig.store(), done);
    rig.sync();
    outcome.recv().expect("completed")
}

fn completions_come_in_order(rig: &mut dyn Rig) {
    let (sender, order) = mpsc::channel();
    let note = |number: u64| -> Completion {
        let sender = sender.clone();
        Box::new(move |outcome| {
            outcome.unwrap();
            sender.send(number).unwrap();
        })
    };
    for index in 0..50 {
        rig.store().append(vec![command(1, index, 10)], note(4 * index));
        rig.store().append(Vec::new(), note(4 * index + 1));
        rig.store().save_vote(Vote { term: index, node_id: 1, committed: false }, note(4 * index + 2));
        rig.store().truncate(Some(LogId::new(1, index)), note(4 * index + 3));
    }
    rig.sync();
    let order: Vec<_> = (0..200).map(|_| order.recv().unwrap()).collect();
    assert!(order.is_sorted());
}

fn appends_must_follow(rig: &mut dyn Rig) {
    wait(rig, |store, done| store.append(vec![command(1, 0, 1)], done)).unwrap();
    wait(rig, |store, done| store.append(vec![command(1, 2, 1)], done)).unwrap_err();
    assert_eq!(rig.store().bounds().last, Some(LogId::new(1, 0)));
    // That was final.
    wait(rig, |store, done| store.append(vec![command(1, 1, 1)], done)).unwrap_err();
    rig.reopen();
    wait(rig, |store, done| store.append(vec![command(1, 1, 1)], done)).unwrap();
}

fn truncations_name_what_is_there(rig: &mut dyn Rig) {
    let entries = (0..6).map(|index| command(1, index, 9)).collect();
    wait(rig, |store, done| store.append(entries, done)).unwrap();
    wait(rig, |store, done| store.truncate(Some(LogId::new(1, 9)), done)).unwrap();
    assert_eq!(rig.store().bounds().last, Some(LogId::new(1, 5)), "there was nothing after it");
    wait(rig, |store, done| store.purge(LogId::new(1, 1), done)).unwrap();
    wait(rig, |store, done| store.truncate(Some(LogId::new(1, 3)), done)).unwrap();
    assert_eq!(rig.store().bounds().last, Some(LogId::new(1, 3)));
    wait(rig, |store, done| store.truncate(Some(LogId::new(2, 2)), done)).unwrap_err();
    assert_eq!(rig.store().bounds().last, Some(LogId::new(1, 3)));
    rig.reopen();
    // Purged entries cannot come back.
    wait(rig, |store, done| store.truncate(None, done)).unwrap();
    for _ in 0..2 {
        let purged = Some(LogId::new(1, 1));
        assert_eq!(rig.store().bounds(), LogBounds { purged, last: purged });
        rig.reopen();
    }
    wait(rig, |store, done| store.append(vec![command(3, 2, 1)], done)).unwrap();
}

fn purging_beyond_the_end(rig: &mut dyn Rig) {
    let upto = LogId::new(3, 100);
    wait(rig, |store, done| store.append((0..10).map(|index| command(1, index, 9)).collect(), done)).unwrap();
    wait(rig, |store, done| store.purge(upto, done)).unwrap();
    for _ in 0..2 {
        assert_eq!(rig.store().bounds(), LogBounds { purged: Some(upto), last: Some(upto) });
        assert_eq!(rig.store().read(0, 200, 1000).unwrap(), []);
        rig.reopen();
    }
    wait(rig, |store, done| store.append(vec![command(3, 101, 1)], done)).unwrap();
    wait(rig, |store, done| store.purge(LogId::new(1, 5), done)).unwrap();
    rig.reopen();
    assert_eq!(rig.store().bounds(), LogBounds { purged: Some(upto), last: Some(LogId::new(3, 101)) });
    assert_eq!(rig.store().read(0, 200, 0).unwrap(), [command(3, 101, 1)]);
}

fn committed_stays_within_the_log(rig: &mut dyn Rig) {
    wait(rig, |store, done| store.append(vec![command(1, 0, 1), command(1, 1, 1)], done)).unwrap();
    rig.store().save_committed(Some(LogId::new(1, 0)));
    wait(rig, |store, done| store.append(vec![command(1, 2, 1)], done)).unwrap();
    rig.store().save_committed(Some(LogId::new(1, 9)));
    assert_eq!(rig.store().committed(), Some(LogId::new(1, 9)));
    wait(rig, |store, done| store.append(vec![command(1, 3, 1)], done)).unwrap();
    rig.reopen();
    assert_eq!(rig.store().committed(), Some(LogId::new(1, 0)), "9 is not in the log");
}

mod memory {
    use super::*;
    use crate::storage::memory::{MemoryDisk, MemoryStore, SyncMode};

    struct MemoryRig {
        disk: MemoryDisk,
        store: MemoryStore,
    }

    impl MemoryRig {
        fn new(mode: SyncMode) -> Self {
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

        fn crash(&mut self, keep: usize) -> usize {
            let kept = keep.min(self.disk.pending());
            self.disk.crash(keep);
            let (done, outcome) = completion();
            self.store.append(Vec::new(), done);
            outcome.recv().unwrap().unwrap_err();
            self.store = MemoryStore::open(&self.disk);
            kept
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
    use crate::storage::{SledOptions, SledStore, files};

    struct SledRig {
        directory: tempfile::TempDir,
        tail_bytes: usize,
        store: Option<SledStore>,
    }

    impl SledRig {
        fn new(tail_bytes: usize) -> Self {
            let mut rig = Self { directory: tempfile::tempdir().unwrap(), tail_bytes, store: None };
            rig.reopen();
            rig
        }

        fn path(&self) -> PathBuf {
            self.directory.path().join("log")
        }

        fn open(&mut self) {
            let options = SledOptions { tail_bytes: self.tail_bytes, ..SledOptions::default() };
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

        /// Goes on with a copy of the files as they are when everything is durable and the store still open.
        fn crash(&mut self, _keep: usize) -> usize {
            let (done, outcome) = completion();
            self.store().append(Vec::new(), done);
            outcome.recv().unwrap().unwrap();
            let copy = tempfile::tempdir().unwrap();
            copy_directory(self.directory.path(), copy.path());
            self.store = None;
            self.directory = copy;
            self.open();
            usize::MAX
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
