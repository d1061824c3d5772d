//! What the figures mean: thresholds and hysteresis, without any IO.

/// Below a quarter of the reserve nothing new is taken on.
const FULL_SHARE: u64 = 4;
/// Half of the reserve must be left beside the whole reserve before anything new is taken on again.
const RESUME_SHARE: u64 = 2;

/// What one look at the disk has found, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Figures {
    /// What the file system would give this process.
    pub(crate) available: u64,
    /// What the reserve file holds of it.
    pub(crate) held: u64,
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

/// What is to be done with the reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Nothing,
    /// Give it to the log.
    Give,
    /// Set it aside again, whole. Nothing new is taken on before that has succeeded.
    Hold,
}

/// Turns figures into [`Space`]. Leaving [`Space::Full`] takes more room than entering it: the reserve has to be
/// whole again, and something left beside it.
#[derive(Debug)]
pub(crate) struct Policy {
    reserve: u64,
    space: Space,
}

impl Policy {
    /// For a reserve of so many bytes. Nothing is taken on before the first look.
    pub(crate) fn new(reserve: u64) -> Self {
        Self { reserve, space: Space::Full }
    }

    pub(crate) fn space(&self) -> Space {
        self.space
    }

    /// Looks at new figures.
    pub(crate) fn observe(&mut self, now: Figures) -> Step {
        let Figures { available, held } = now;
        let (full, resume) = (self.reserve / FULL_SHARE, self.reserve / RESUME_SHARE);
        if available < full {
            self.space = Space::Full;
            return Step::Give;
        }
        if self.space == Space::Full {
            if held < self.reserve {
                let enough = available.saturating_add(held) >= self.reserve.saturating_add(resume);
                return if enough { Step::Hold } else { Step::Nothing };
            }
            if available < resume {
                return Step::Nothing;
            }
        }
        self.space = if available < self.reserve { Space::Low } else { Space::Ample };
        Step::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One look per line: available, held, what to do, what it is.
    type Table = [(u64, u64, Step, Space)];

    fn check(table: &Table) {
        let mut policy = Policy::new(128);
        for (line, (available, held, step, space)) in table.iter().enumerate() {
            let found = policy.observe(Figures { available: *available, held: *held });
            assert_eq!((found, policy.space()), (*step, *space), "line {line}");
        }
    }

    #[test]
    fn a_disk_that_fills_up_slowly_and_empties_again() {
        check(&[
            (1000, 128, Step::Nothing, Space::Ample),
            (128, 128, Step::Nothing, Space::Ample),
            (127, 128, Step::Nothing, Space::Low),
            (32, 128, Step::Nothing, Space::Low),
            (31, 128, Step::Give, Space::Full),
            // The reserve is with the log now; its piece is kept.
            (0, 16, Step::Give, Space::Full),
            // Not before there is room for the whole reserve and half of it again.
            (100, 16, Step::Nothing, Space::Full),
            (175, 16, Step::Nothing, Space::Full),
            (176, 16, Step::Hold, Space::Full),
            // It did not work out: somebody was faster.
            (40, 32, Step::Nothing, Space::Full),
            (300, 16, Step::Hold, Space::Full),
            (188, 128, Step::Nothing, Space::Ample),
        ]);
    }

    #[test]
    fn a_disk_that_is_full_at_once() {
        check(&[(1000, 128, Step::Nothing, Space::Ample), (0, 128, Step::Give, Space::Full)]);
    }

    #[test]
    fn a_disk_that_was_full_at_the_start() {
        check(&[(40, 0, Step::Nothing, Space::Full), (192, 0, Step::Hold, Space::Full)]);
    }

    #[test]
    fn room_that_comes_and_goes_around_the_watermark_changes_nothing() {
        check(&[
            (31, 128, Step::Give, Space::Full),
            (33, 128, Step::Nothing, Space::Full),
            (63, 128, Step::Nothing, Space::Full),
            (64, 128, Step::Nothing, Space::Low),
            (33, 128, Step::Nothing, Space::Low),
        ]);
    }
}
