//! What the figures mean: thresholds and hysteresis, without any IO.

/// Below a quarter of the reserve nothing new is taken on.
const FULL_SHARE: u64 = 4;
/// Half of the reserve must be left beside the whole reserve before anything new is taken on again.
const RESUME_SHARE: u64 = 2;

/// What is kept in the reserve file when the rest is given up. The next start on a full disk has it: opening the log
/// writes a snapshot of the store's own, and may begin a segment.
pub(crate) const OPENING_BYTES: u64 = 16 * 1024 * 1024;
/// What the log's file owns beyond its end at all times: its largest batch with what the store adds to it, and a segment.
pub(crate) const HEADROOM_BYTES: u64 = 24 * 1024 * 1024;

/// What one look at the disk has found, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Figures {
    /// What the file system would give this process.
    pub(crate) available: u64,
    /// What the reserve file holds beside that.
    pub(crate) held: u64,
    /// What the log's file owns beyond its end beside that.
    pub(crate) owned: u64,
}

/// How much room there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    Ample,
    /// Time to tell somebody.
    Low,
    /// Nothing new is taken on; what is under way has what was the reserve.
    Full,
}

/// What the log is told about room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum News {
    Full,
    RoomAgain,
    FillingUp,
}

impl News {
    /// What there is to tell when what was `before` is `now` something else. Nothing is taken on before the first look;
    /// that is no full disk, and was not `told_full`.
    pub(crate) fn of(before: Space, now: Space, told_full: &mut bool) -> Option<Self> {
        match (before, now) {
            (Space::Full, Space::Full) => None,
            (_, Space::Full) => {
                *told_full = true;
                Some(Self::Full)
            }
            (Space::Full, _) if std::mem::take(told_full) => Some(Self::RoomAgain),
            (Space::Full | Space::Ample, Space::Low) => Some(Self::FillingUp),
            _ => None,
        }
    }
}

/// What is to be done with the reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Nothing,
    /// Give it to the log.
    Give,
    /// Set aside what is missing. Nothing new is taken on before that has succeeded.
    Hold,
}

/// Turns figures into [`Space`]. The reserve counts as a whole, whether its file holds it or the log's: so what the
/// log was given and has not used is not set aside a second time. Leaving [`Space::Full`] takes more room than
/// entering it: the reserve has to be whole again, and something left beside it.
#[derive(Debug)]
pub(crate) struct Policy {
    reserve: u64,
    /// What the log's file is to own in any case; 0 where it cannot own anything beyond its end.
    headroom: u64,
    space: Space,
}

impl Policy {
    /// For a reserve of so many bytes. Nothing is taken on before the first look.
    pub(crate) fn new(reserve: u64) -> Self {
        let headroom = HEADROOM_BYTES.min(reserve.saturating_sub(OPENING_BYTES));
        Self { reserve, headroom, space: Space::Full }
    }

    pub(crate) fn space(&self) -> Space {
        self.space
    }

    /// What the log's file is to own beyond its end in any case.
    pub(crate) fn headroom(&self) -> u64 {
        self.headroom
    }

    /// The log's file is not to own anything beyond its end from now on; all of the reserve is in its own file.
    pub(crate) fn give_up_headroom(&mut self) {
        self.headroom = 0;
    }

    /// What the reserve file keeps in any case.
    pub(crate) fn piece(&self) -> u64 {
        OPENING_BYTES.min(self.reserve)
    }

    /// What the reserve file is to hold while the log's owns `owned`.
    pub(crate) fn to_hold(&self, owned: u64) -> u64 {
        self.reserve.saturating_sub(owned).max(self.piece())
    }

    /// What the log's file is to own once it has been given the reserve.
    pub(crate) fn to_own(&self) -> u64 {
        self.reserve - self.piece()
    }

    /// What is left beside a whole reserve.
    pub(crate) fn beside(&self, now: Figures) -> u64 {
        now.available.saturating_sub(self.missing(now))
    }

    /// What must be left beside the reserve by anything that can wait, such as a snapshot: as much as ends
    /// [`Space::Full`], so that it cannot be the cause of it.
    pub(crate) fn untouched(reserve: u64) -> u64 {
        reserve / RESUME_SHARE
    }

    /// What must be available and set aside together to end [`Space::Full`].
    pub(crate) fn needed(reserve: u64) -> u64 {
        reserve.saturating_add(Self::untouched(reserve))
    }

    /// Something that should have fitted did not: what the file system says is not the whole truth.
    pub(crate) fn fill_up(&mut self) {
        self.space = Space::Full;
    }

    /// Looks at new figures.
    pub(crate) fn observe(&mut self, now: Figures) -> Step {
        let (full, resume) = (self.reserve / FULL_SHARE, self.reserve / RESUME_SHARE);
        let (beside, missing) = (self.beside(now), self.missing(now));
        if beside < full || (self.space == Space::Full && beside < resume) {
            self.space = Space::Full;
            return Step::Give;
        }
        // While writes are taken the log may use half of its headroom before there is more to do.
        let tolerated = self.headroom / 2;
        let short = now.owned < tolerated;
        if self.space == Space::Full && (missing > 0 || short) {
            return Step::Hold;
        }
        self.space = if beside < self.reserve { Space::Low } else { Space::Ample };
        if missing > tolerated || short { Step::Hold } else { Step::Nothing }
    }

    fn missing(&self, now: Figures) -> u64 {
        self.to_hold(now.owned).saturating_sub(now.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    /// One look per line, in MiB: available, held, owned, what to do, what it is.
    type Table = [(u64, u64, u64, Step, Space)];

    fn check(table: &Table) {
        let mut policy = Policy::new(128 * MIB);
        for (line, (available, held, owned, step, space)) in table.iter().enumerate() {
            let figures = Figures { available: available * MIB, held: held * MIB, owned: owned * MIB };
            let found = policy.observe(figures);
            assert_eq!((found, policy.space()), (*step, *space), "line {line}");
        }
    }

    #[test]
    fn a_disk_that_fills_up_slowly_and_empties_again() {
        check(&[
            (1000, 0, 0, Step::Hold, Space::Full),
            (872, 104, 24, Step::Nothing, Space::Ample),
            (128, 104, 24, Step::Nothing, Space::Ample),
            (127, 104, 24, Step::Nothing, Space::Low),
            (32, 104, 24, Step::Nothing, Space::Low),
            (31, 104, 24, Step::Give, Space::Full),
            // The reserve is with the log now; its piece is kept.
            (0, 16, 112, Step::Give, Space::Full),
            // Not before half of the reserve is left beside the whole; the log has used 12 MiB of it.
            (75, 16, 100, Step::Give, Space::Full),
            (76, 16, 100, Step::Hold, Space::Full),
            // It did not work out: somebody was faster.
            (40, 20, 100, Step::Give, Space::Full),
            (64, 28, 100, Step::Nothing, Space::Low),
        ]);
    }

    #[test]
    fn room_is_there_again_only_where_it_was_missed() {
        use Space::{Ample, Full, Low};
        let mut told_full = false;
        let mut news = |before, now| News::of(before, now, &mut told_full);
        assert_eq!(news(Full, Ample), None, "the first look");
        assert_eq!(news(Full, Low), Some(News::FillingUp), "as the first");
        assert_eq!(news(Ample, Low), Some(News::FillingUp));
        assert_eq!(news(Low, Full), Some(News::Full));
        assert_eq!(news(Full, Full), None);
        assert_eq!(news(Full, Low), Some(News::RoomAgain));
        assert_eq!(news(Low, Ample), None);
        assert_eq!(news(Ample, Full), Some(News::Full));
        assert_eq!(news(Full, Ample), Some(News::RoomAgain));
    }

    #[test]
    fn what_the_log_owns_already_is_not_set_aside_again() {
        check(&[(64, 16, 112, Step::Nothing, Space::Low), (63, 16, 112, Step::Nothing, Space::Low)]);
    }

    #[test]
    fn the_log_may_use_half_of_its_headroom_before_more_is_set_aside() {
        check(&[
            (1000, 104, 24, Step::Nothing, Space::Ample),
            (1000, 104, 12, Step::Nothing, Space::Ample),
            (1000, 104, 11, Step::Hold, Space::Ample),
            // The room that it was given is used up.
            (1000, 16, 112, Step::Nothing, Space::Ample),
            (1000, 16, 99, Step::Hold, Space::Ample),
            // What is missing is not free for anything else.
            (140, 16, 99, Step::Hold, Space::Low),
            (44, 16, 99, Step::Give, Space::Full),
        ]);
    }

    #[test]
    fn a_log_without_headroom_needs_the_reserve_in_its_file() {
        let mut policy = Policy::new(128 * MIB);
        policy.give_up_headroom();
        let mut look = |held| policy.observe(Figures { available: 1000 * MIB, held, owned: 0 });
        assert_eq!(look(127 * MIB), Step::Hold);
        assert_eq!(look(128 * MIB), Step::Nothing);
    }

    #[test]
    fn a_disk_that_is_full_at_once() {
        check(&[(1000, 104, 24, Step::Nothing, Space::Ample), (0, 104, 24, Step::Give, Space::Full)]);
    }

    #[test]
    fn a_disk_that_was_full_at_the_start() {
        check(&[(40, 0, 0, Step::Give, Space::Full), (192, 0, 0, Step::Hold, Space::Full)]);
    }

    #[test]
    fn room_that_comes_and_goes_around_the_watermark_changes_nothing() {
        check(&[
            (31, 104, 24, Step::Give, Space::Full),
            (33, 104, 24, Step::Give, Space::Full),
            (63, 104, 24, Step::Give, Space::Full),
            (64, 104, 24, Step::Nothing, Space::Low),
            (33, 104, 24, Step::Nothing, Space::Low),
        ]);
    }
}
