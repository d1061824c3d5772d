//! The cases that every store has to get right, one by one.

use std::io;
use std::sync::mpsc;
use std::time::Duration;

use crate::storage::{Completion, LogBounds, LogStore};
use crate::types::{Entry, LogId, Vote};

use super::steps::command;
use super::{Broken, Promise, Rig, broken, completion, ensure, outcome};

pub(super) fn cases(open: &mut impl FnMut() -> Box<dyn Rig>, patience: Duration) -> Result<(), Broken> {
    let cases = [
        completions_come_in_order,
        appends_must_follow,
        truncations_name_what_is_there,
        purging_beyond_the_end,
        committed_stays_within_the_log,
        what_is_confirmed_survives_a_crash,
        closing_writes_what_is_queued,
        the_end_is_told_when_it_comes,
    ];
    cases.iter().try_for_each(|case| case(&mut FixedCase { rig: open(), patience }))
}

/// A store in one of these cases.
pub(super) struct FixedCase {
    pub(super) rig: Box<dyn Rig>,
    pub(super) patience: Duration,
}

impl FixedCase {
    pub(super) fn store(&self) -> &dyn LogStore {
        self.rig.store()
    }

    /// Writes and waits for the outcome.
    fn outcome(&mut self, write: impl FnOnce(&dyn LogStore, Completion)) -> Result<io::Result<()>, Broken> {
        let (done, of) = completion();
        write(self.rig.store(), done);
        self.rig.sync();
        outcome(&of, self.patience)
    }

    pub(super) fn succeeds(&mut self, write: impl FnOnce(&dyn LogStore, Completion)) -> Result<(), Broken> {
        let failed = |error| broken(Promise::Completion, format!("a write fails that fits: {error}"));
        self.outcome(write)?.map_err(failed)
    }

    pub(super) fn fails(
        &mut self,
        why: &str,
        write: impl FnOnce(&dyn LogStore, Completion),
    ) -> Result<(), Broken> {
        ensure(self.outcome(write)?.is_err(), Promise::Failure, || format!("a write succeeds {why}"))
    }

    pub(super) fn append(&mut self, term: u64, indexes: impl Iterator<Item = u64>) -> Result<(), Broken> {
        let entries = indexes.map(|index| command(term, index, 9)).collect();
        self.succeeds(|store, done| store.append(entries, done))
    }

    /// Checks what there is, and that closing and opening again changes nothing.
    fn stays(&mut self, purged: Option<LogId>, last: Option<LogId>) -> Result<(), Broken> {
        for promise in [Promise::Visibility, Promise::Durability] {
            let (found, expected) = (self.store().bounds(), LogBounds { purged, last });
            ensure(found == expected, promise, || format!("there is {found:?}, and should be {expected:?}"))?;
            self.rig.reopen();
        }
        Ok(())
    }
}

fn completions_come_in_order(case: &mut FixedCase) -> Result<(), Broken> {
    let (sender, order) = mpsc::channel();
    let note = |number: u64| -> Completion {
        let sender = sender.clone();
        Box::new(move |outcome| sender.send((number, outcome)).unwrap_or_default())
    };
    for index in 0..50 {
        let vote = Vote { term: index, node_id: 1, committed: false };
        case.store().append(vec![command(1, index, 10)], note(4 * index));
        case.store().append(Vec::new(), note(4 * index + 1));
        case.store().save_vote(vote, note(4 * index + 2));
        case.store().truncate(Some(LogId::new(1, index)), note(4 * index + 3));
    }
    case.rig.sync();
    for expected in 0..200 {
        let missing = |_| broken(Promise::Completion, "not all of many writes are completed");
        let (number, outcome) = order.recv_timeout(case.patience).map_err(missing)?;
        ensure(number == expected, Promise::Completion, || {
            format!("write {number} was completed before write {expected}")
        })?;
        outcome.map_err(|error| broken(Promise::Completion, format!("a write fails that fits: {error}")))?;
    }
    Ok(())
}

fn appends_must_follow(case: &mut FixedCase) -> Result<(), Broken> {
    case.append(1, 0..1)?;
    case.fails("that leaves a hole", |store, done| store.append(vec![command(1, 2, 1)], done))?;
    let last = case.store().bounds().last;
    ensure(last == Some(LogId::new(1, 0)), Promise::Visibility, || {
        format!("an entry that was refused shows: the last is {last:?}")
    })?;
    case.fails("after one that failed", |store, done| store.append(vec![command(1, 1, 1)], done))?;
    case.rig.reopen();
    case.append(1, 1..2)
}

fn truncations_name_what_is_there(case: &mut FixedCase) -> Result<(), Broken> {
    let last_is = |case: &FixedCase, index: u64| {
        let last = case.store().bounds().last;
        ensure(last == Some(LogId::new(1, index)), Promise::Visibility, || {
            format!("the last entry is {last:?}, and should be the one with index {index}")
        })
    };
    case.append(1, 0..6)?;
    case.succeeds(|store, done| store.truncate(Some(LogId::new(1, 9)), done))?;
    last_is(case, 5)?; // there was nothing after it
    case.succeeds(|store, done| store.purge(LogId::new(1, 1), done))?;
    case.succeeds(|store, done| store.truncate(Some(LogId::new(1, 3)), done))?;
    last_is(case, 3)?;
    case.fails("that names another entry", |store, done| store.truncate(Some(LogId::new(2, 2)), done))?;
    last_is(case, 3)?;
    case.rig.reopen();
    // Purged entries cannot come back.
    case.succeeds(|store, done| store.truncate(None, done))?;
    let purged = Some(LogId::new(1, 1));
    case.stays(purged, purged)?;
    case.append(3, 2..3)
}

fn purging_beyond_the_end(case: &mut FixedCase) -> Result<(), Broken> {
    let upto = LogId::new(3, 100);
    let reads = |case: &FixedCase, max_bytes, expected: &[Entry]| {
        let read = case.store().read(0, 200, max_bytes);
        let is_right = read.as_ref().is_ok_and(|read| read == expected);
        ensure(is_right, Promise::Visibility, || format!("there should be {expected:?}, not {read:?}"))
    };
    case.append(1, 0..10)?;
    case.succeeds(|store, done| store.purge(upto, done))?;
    case.stays(Some(upto), Some(upto))?;
    reads(case, 1000, &[])?;
    case.append(3, 101..102)?;
    case.succeeds(|store, done| store.purge(LogId::new(1, 5), done))?;
    case.stays(Some(upto), Some(LogId::new(3, 101)))?;
    reads(case, 0, &[command(3, 101, 9)])
}

fn committed_stays_within_the_log(case: &mut FixedCase) -> Result<(), Broken> {
    let committed_is = |case: &FixedCase, index, promise| {
        let committed = case.store().committed();
        ensure(committed == Some(LogId::new(1, index)), promise, || {
            format!("{committed:?} is committed, and should be the entry with index {index}")
        })
    };
    case.append(1, 0..2)?;
    case.store().save_committed(Some(LogId::new(1, 0)));
    case.append(1, 2..3)?;
    case.store().save_committed(Some(LogId::new(1, 9)));
    committed_is(case, 9, Promise::Visibility)?;
    case.append(1, 3..4)?;
    case.rig.reopen();
    committed_is(case, 0, Promise::Durability) // 9 is not in the log
}

fn what_is_confirmed_survives_a_crash(case: &mut FixedCase) -> Result<(), Broken> {
    let vote = Vote { term: 7, node_id: 3, committed: true };
    case.append(1, 0..5)?;
    case.succeeds(|store, done| store.save_vote(vote, done))?;
    case.succeeds(|store, done| store.truncate(Some(LogId::new(1, 3)), done))?;
    case.succeeds(|store, done| store.purge(LogId::new(1, 0), done))?;
    case.rig.crash(0);
    let (bounds, found) = (case.store().bounds(), case.store().vote());
    let expected = LogBounds { purged: Some(LogId::new(1, 0)), last: Some(LogId::new(1, 3)) };
    ensure((bounds, found) == (expected, Some(vote)), Promise::Durability, || {
        format!("a crash leaves {bounds:?} and vote {found:?}; {expected:?} and {vote:?} were confirmed")
    })
}

fn closing_writes_what_is_queued(case: &mut FixedCase) -> Result<(), Broken> {
    let outcomes: Vec<_> = (0..50)
        .map(|index| {
            let (done, of) = completion();
            case.store().append(vec![command(1, index, 10)], done);
            of
        })
        .collect();
    case.rig.reopen();
    for of in outcomes {
        outcome(&of, case.patience)?
            .map_err(|error| broken(Promise::Durability, format!("closing fails a write: {error}")))?;
    }
    let last = case.store().bounds().last;
    ensure(last == Some(LogId::new(1, 49)), Promise::Durability, || {
        format!("after closing in order the last entry is {last:?}")
    })
}

/// A store that lets go of nothing that another one needs may tell at once.
fn the_end_is_told_when_it_comes(case: &mut FixedCase) -> Result<(), Broken> {
    case.append(1, 0..1)?;
    let (sender, told) = mpsc::channel();
    case.store().on_closed(Box::new(move || sender.send(()).unwrap_or_default()));
    case.rig.reopen();
    told.recv_timeout(case.patience)
        .map_err(|_| broken(Promise::Completion, "nobody is told that the store is closed"))
}
