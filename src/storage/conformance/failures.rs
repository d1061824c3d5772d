//! The first failure of the disk is final, whatever failed, and whatever waits behind it.

use std::time::Duration;

use crate::storage::{Completion, LogStore};
use crate::types::{LogId, Vote};

use super::fixed::FixedCase;
use super::steps::command;
use super::{Broken, Promise, Rig, broken, completion, ensure, outcome};

const VOTE: Vote = Vote { term: 2, node_id: 1, committed: false };

type FailingWrite = fn(&dyn LogStore, Completion);

/// One write of each kind, for a log with three entries.
const WRITES: [(&str, FailingWrite); 4] = [
    ("an append", |store, done| store.append(vec![command(1, 3, 1)], done)),
    ("a vote", |store, done| store.save_vote(VOTE, done)),
    ("a truncation", |store, done| store.truncate(Some(LogId::new(1, 1)), done)),
    ("a purge", |store, done| store.purge(LogId::new(1, 0), done)),
];

pub(super) fn cases(open: &mut impl FnMut() -> Box<dyn Rig>, patience: Duration) -> Result<(), Broken> {
    let mut case = || -> Result<Option<FixedCase>, Broken> {
        let mut case = FixedCase { rig: open(), patience };
        case.append(1, 0..3)?;
        Ok(case.rig.fail_next_write().then_some(case))
    };
    for (kind, write) in WRITES {
        if let Some(mut case) = case()? {
            a_failed_write_is_final(&mut case, kind, write)?;
        }
    }
    match case()? {
        Some(mut case) => those_behind_a_failed_write_fail(&mut case),
        None => Ok(()),
    }
}

fn a_failed_write_is_final(case: &mut FixedCase, kind: &str, write: FailingWrite) -> Result<(), Broken> {
    case.fails(&format!("of which the disk failed: {kind}"), write)?;
    let after = format!("after {kind} that failed");
    case.fails(&after, |store, done| store.save_vote(VOTE, done))?;
    case.fails(&after, |store, done| store.append(vec![command(1, 4, 1)], done))?;
    case.rig.crash(0);
    // What a failed write has left is not known; before it nothing had touched this one.
    let left = case.store().read(1, 2, 100);
    let is_there = left.as_ref().is_ok_and(|entries| *entries == [command(1, 1, 9)]);
    ensure(is_there, Promise::Durability, || {
        format!("what was confirmed before {kind} failed is not there: {left:?}")
    })
}

fn those_behind_a_failed_write_fail(case: &mut FixedCase) -> Result<(), Broken> {
    let outcomes: Vec<_> = (3..40)
        .map(|index| {
            let (done, of) = completion();
            match index % 2 {
                0 => case.store().save_vote(VOTE, done),
                _ => case.store().append(vec![command(1, 3 + (index - 3) / 2, 1)], done),
            }
            of
        })
        .collect();
    case.rig.sync();
    let outcomes = outcomes.iter().map(|of| outcome(of, case.patience)).collect::<Result<Vec<_>, _>>()?;
    let first = outcomes.iter().position(Result::is_err);
    let first = first.ok_or_else(|| broken(Promise::Failure, "a write succeeds of which the disk failed"))?;
    ensure(outcomes[first..].iter().all(Result::is_err), Promise::Failure, || {
        "a write succeeds that was queued behind one that failed".to_owned()
    })
}
