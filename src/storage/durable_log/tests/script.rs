//! The log's tail in scripts: `tests/golden/scripts/log-tail`. There is room for three entries.

use bytes::Bytes;
use goldenscript::{Context, Runner};

use super::super::tail::Tail;
use crate::golden::{Told, scripts};
use crate::types::{Entry, LogId, Payload};

#[derive(goldenscript::Command)]
pub(crate) enum Step {
    /// A write appends an entry.
    Append {
        #[arg(key)]
        write: u64,
        #[arg(key)]
        term: u64,
        #[arg(key)]
        index: u64,
    },
    /// All writes up to this one are on the disk.
    Durable(u64),
    /// The log ends before this index.
    Truncate(u64),
    /// All up to this index is in a snapshot.
    Purge(u64),
    /// What a read from this index on finds here.
    Read(u64),
}

impl Runner for Tail {
    type Command = Step;

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        let mut from = self.first_index();
        match *step {
            Step::Append { write, term, index } => {
                let payload = Payload::Command(Bytes::from_static(&[0; 68]));
                self.push(write, Entry { log_id: LogId::new(term, index), payload });
                from = self.first_index();
            }
            Step::Durable(write) => {
                self.settle(write);
                from = self.first_index();
            }
            Step::Truncate(index) => self.truncate(index),
            Step::Purge(index) => {
                self.purge(index);
                from = self.first_index();
            }
            Step::Read(index) => from = Some(index),
        }
        let entries: Vec<_> =
            from.map_or_else(Vec::new, |index| self.from(index).map(|e| e.log_id.to_string()).collect());
        Ok(if entries.is_empty() { "nothing".to_owned() } else { entries.join(" ") })
    }
}

#[test]
fn scripts_of_the_tail() {
    let entry = Entry { log_id: LogId::new(1, 0), payload: Payload::Command(Bytes::from_static(&[0; 68])) };
    scripts("log-tail", || Tail::new(3 * Tail::bytes_of(&entry)));
}
