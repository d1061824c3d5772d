//! The clocks of the cluster in scripts: `tests/golden/scripts/clock`.

use goldenscript::{Context, Runner};

use super::*;
use crate::golden::{Told, scripts};

#[derive(goldenscript::Command)]
enum Step {
    /// An entry of this term is applied, with a reading of the leader that proposed it: in another term, if so said.
    Entry {
        #[arg(key)]
        term: u64,
        #[arg(key)]
        counted: u64,
        #[arg(key)]
        wall: u64,
        #[arg(key)]
        read_in: Option<u64>,
    },
    /// An entry of a build that had one clock.
    Old {
        #[arg(key)]
        term: u64,
        #[arg(key)]
        time: u64,
    },
}

#[derive(Default)]
struct Clock(ClusterClock);

impl Runner for Clock {
    type Command = Step;

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        match *step {
            Step::Entry { term, counted, wall, read_in } => {
                let reading = Reading { wall_ms: wall, term: read_in.unwrap_or(term), counted_ms: counted };
                self.0.advance(term, Stamp::Reading(reading));
            }
            Step::Old { term, time } => self.0.advance(term, Stamp::LogTime(time)),
        }
        Ok(format!("elapsed {}, log time {}", self.0.elapsed_ms, self.0.log_time_ms()))
    }
}

#[test]
fn scripts_of_the_clock() {
    scripts("clock", Clock::default);
}
