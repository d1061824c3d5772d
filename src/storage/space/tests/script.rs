//! What is made of the room on a disk, in scripts: `tests/golden/scripts/disk-policy`. All figures are in MiB.

use goldenscript::{Context, Runner};

use super::super::policy::{Figures, News, Policy, Space, Step};
use crate::golden::{Told, scripts};

const MIB: u64 = 1024 * 1024;

#[derive(goldenscript::Command)]
enum Command {
    /// The disk is looked at.
    Look {
        /// What the file system would give.
        #[arg(key)]
        free: u64,
        /// What the reserve's file holds.
        #[arg(key)]
        reserve: u64,
        /// What the log's file owns beyond its end.
        #[arg(key)]
        owned: u64,
    },
    /// Something that should have fitted did not.
    DidNotFit,
}

struct Disk {
    policy: Policy,
    told_full: bool,
}

impl Runner for Disk {
    type Command = Command;

    fn run(&mut self, command: &Command, _: &Context) -> Told {
        let before = self.policy.space();
        let step = match *command {
            Command::Look { free, reserve, owned } => self.policy.observe(Figures {
                available: free * MIB,
                held: reserve * MIB,
                owned: owned * MIB,
            }),
            Command::DidNotFit => {
                self.policy.fill_up();
                Step::Give
            }
        };
        let space = match self.policy.space() {
            Space::Ample => "ample",
            Space::Low => "low",
            Space::Full => "full: no new writes",
        };
        let step = match step {
            Step::Nothing => "",
            Step::Give => "; give the reserve to the log",
            Step::Hold => "; set the reserve aside",
        };
        let news = match News::of(before, self.policy.space(), &mut self.told_full) {
            None => "",
            Some(News::Full) => "; say that it is full",
            Some(News::RoomAgain) => "; say that there is room again",
            Some(News::FillingUp) => "; say that it fills up",
        };
        Ok(format!("{space}{step}{news}"))
    }
}

#[test]
fn scripts_of_the_disk() {
    scripts("disk-policy", || Disk { policy: Policy::new(128 * MIB), told_full: false });
}
