//! When log positions came to be known here, to tell how old is what somebody lacks.
//!
//! Kept in two rings of marks, fine for the last second or so, coarse for the minutes before. A mark covers the
//! positions after the one before it, and its time is that of the first of them: an age is never told too
//! low, and too high by less than the distance of two marks. What lies before the first mark is at least as old as that.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

/// Distance of two marks, and how many are kept: a second, and then nearly three minutes.
const FINE_STEP: Duration = Duration::from_millis(1);
const FINE_MARKS: usize = 1_024;
const COARSE_STEP: Duration = Duration::from_millis(20);
const COARSE_MARKS: usize = 8_192;

#[derive(Debug, Clone, Copy)]
struct Mark {
    /// The last index covered.
    last: u64,
    at: Instant,
}

#[derive(Debug, Default)]
struct Marks {
    coarse: VecDeque<Mark>,
    fine: VecDeque<Mark>,
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(crate) struct EntryAges(Mutex<Marks>);

impl EntryAges {
    fn marks(&self) -> MutexGuard<'_, Marks> {
        self.0.lock().expect("invariant: no panic under this lock")
    }

    /// Everything up to `index` is known as of now. Positions that were known before stay as old as they are. Whether any of
    /// them is news.
    pub(crate) fn note(&self, index: u64) -> bool {
        let mut marks = self.marks();
        if marks.last().is_some_and(|last| index <= last) {
            return false;
        }
        let Marks { coarse, fine } = &mut *marks;
        if let (Some(before), Some(after)) = (coarse.back(), fine.front()) {
            assert!(before.last <= after.last, "invariant: the fine marks go on where the coarse ones end");
        }
        extend(fine, Mark { last: index, at: Instant::now() }, FINE_STEP);
        if fine.len() > FINE_MARKS
            && let Some(oldest) = fine.pop_front()
        {
            extend(coarse, oldest, COARSE_STEP);
            if coarse.len() > COARSE_MARKS {
                coarse.pop_front();
            }
        }
        assert!(fine.len() <= FINE_MARKS, "invariant: the marks have a bound");
        true
    }

    /// Positions after `index` are known no more.
    pub(crate) fn cut(&self, index: Option<u64>) {
        let mut marks = self.marks();
        let Marks { coarse, fine } = &mut *marks;
        for ring in [coarse, fine] {
            let Some(index) = index else {
                ring.clear();
                continue;
            };
            while ring.len() > 1 && ring[ring.len() - 2].last >= index {
                ring.pop_back();
            }
            if let Some(mark) = ring.back_mut() {
                mark.last = mark.last.min(index);
            }
        }
    }

    /// For how long `index` has been known; `None` when it is not.
    pub(crate) fn age(&self, index: u64) -> Option<Duration> {
        let marks = self.marks();
        let first_from = |ring: &VecDeque<Mark>| {
            let place = ring.partition_point(|mark| mark.last < index);
            ring.get(place).map(|mark| mark.at.elapsed())
        };
        first_from(&marks.coarse).or_else(|| first_from(&marks.fine))
    }
}

impl Marks {
    fn last(&self) -> Option<u64> {
        self.fine.back().or(self.coarse.back()).map(|mark| mark.last)
    }
}

/// Adds `mark`, as a part of the last one if that is no older than `step`.
fn extend(ring: &mut VecDeque<Mark>, mark: Mark, step: Duration) {
    match ring.back_mut() {
        Some(last) if mark.at.saturating_duration_since(last.at) < step => last.last = mark.last,
        _ => ring.push_back(mark),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn an_entry_is_as_old_as_the_batch_that_brought_it() {
        let line = EntryAges::default();
        assert_eq!(line.age(0), None);
        line.note(9);
        tokio::time::advance(30 * MS).await;
        line.note(19);
        line.note(15);
        tokio::time::advance(5 * MS).await;
        assert_eq!(line.age(9), Some(35 * MS));
        assert_eq!(line.age(10), Some(5 * MS));
        assert_eq!(line.age(19), Some(5 * MS));
        assert_eq!(line.age(20), None);
        // What was before is at least as old.
        assert_eq!(line.age(0), Some(35 * MS));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_cut_off_is_new_when_it_comes_again() {
        let line = EntryAges::default();
        line.note(9);
        tokio::time::advance(30 * MS).await;
        line.note(19);
        tokio::time::advance(30 * MS).await;
        line.cut(Some(12));
        assert_eq!(line.age(13), None);
        line.note(13);
        assert_eq!((line.age(12), line.age(13)), (Some(30 * MS), Some(Duration::ZERO)));
        line.cut(Some(9));
        assert_eq!((line.age(9), line.age(10)), (Some(60 * MS), None));
        line.cut(None);
        assert_eq!(line.age(0), None);
    }

    /// Any number of entries in any time; never too young, and never older than a step allows.
    #[tokio::test(start_paused = true)]
    async fn ages_are_kept_for_minutes_in_bounded_memory() {
        let line = EntryAges::default();
        let start = Instant::now();
        let mut appended = Vec::new();
        for index in 0..120_000 {
            line.note(index);
            appended.push(start.elapsed());
            tokio::time::advance(MS).await;
        }
        let now = start.elapsed();
        for index in [0, 1_000, 60_000, 118_000] {
            let (told, real) = (line.age(index).unwrap(), now - appended[index as usize]);
            assert!(told >= real && told < real + COARSE_STEP, "{index}: {told:?} is not {real:?}");
        }
        assert_eq!(line.age(119_990), Some(10 * MS));
        let marks = line.marks();
        assert!(marks.fine.len() <= FINE_MARKS && marks.coarse.len() <= COARSE_MARKS);
    }
}
