//! In which order the log becomes durable, in scripts: `tests/golden/scripts/log-order`.
//!
//! What is submitted in one block of a script is queued while the writer is held up, so that it is one batch: then come what
//! the writer does to sled, and the completions. Left out are fences, which carry no information.

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, MutexGuard};

use goldenscript::{Block, Context, Runner};

use super::super::hard_state::HardState;
use super::super::record::{Body, Record};
use super::*;
use crate::golden::{Told, scripts};

#[derive(goldenscript::Command)]
enum Step {
    /// Entries with these indexes are appended.
    Append {
        #[arg(key)]
        term: u64,
        /// Of the payload of each.
        #[arg(key)]
        kib: Option<usize>,
        indexes: Vec<u64>,
    },
    Vote {
        #[arg(key)]
        term: u64,
        #[arg(key)]
        node: u64,
    },
    /// The log ends after this entry.
    Truncate {
        #[arg(key)]
        term: u64,
        #[arg(key)]
        index: u64,
    },
    /// Everything up to this entry is in a snapshot.
    Purge {
        #[arg(key)]
        term: u64,
        #[arg(key)]
        index: u64,
    },
    /// This entry is known to be committed.
    Committed {
        #[arg(key)]
        term: u64,
        #[arg(key)]
        index: u64,
    },
    /// The store is closed, and opened again.
    Reopen,
}

/// What was seen, in order, by the writer thread or after it.
struct Seen {
    lines: Mutex<Vec<String>>,
    ready: PathBuf,
    mark: Mutex<Option<u64>>,
}

impl Seen {
    fn note(&self, line: String) {
        let mut mark = self.mark.lock().unwrap();
        let now = Marker::open(&self.ready).unwrap().map(|(_, mark)| mark);
        let mut lines = self.lines();
        if now != *mark {
            *mark = now;
            lines.extend(now.map(|sequence| format!("ready file: hard state {sequence} is durable")));
        }
        lines.push(line);
    }

    fn lines(&self) -> MutexGuard<'_, Vec<String>> {
        self.lines.lock().unwrap()
    }

    fn event(&self, event: DiskEvent<'_>) {
        let line = match event {
            DiskEvent::Insert(key, _) if Key::decode(key).unwrap().is_fence() => return,
            DiskEvent::Remove(key) if Key::decode(key).unwrap().is_fence() => return,
            DiskEvent::Insert(key, record) => {
                let key = Key::decode(key).unwrap();
                match Record::decode(key, record).unwrap().body {
                    Body::Packed(entries) => {
                        let held: Vec<_> = entries.iter().map(|entry| entry.log_id.to_string()).collect();
                        format!("insert the record {}: entries {}", key.index, held.join(" "))
                    }
                    Body::Part { parts, .. } => {
                        format!("insert part {} of {parts} of entry {}", key.part + 1, key.index)
                    }
                }
            }
            DiskEvent::Remove(key) => match Key::decode(key).unwrap() {
                Key { index, part: 0 } => format!("remove the record {index}"),
                Key { index, part } => format!("remove part {} of entry {index}", part + 1),
            },
            DiskEvent::HardState(bytes) => in_words(&HardState::decode(bytes).unwrap()),
            DiskEvent::Flush => "flush".to_owned(),
        };
        self.note(line);
    }
}

fn in_words(state: &HardState) -> String {
    let vote = state.vote.map(|vote| format!("vote for {} in term {}", vote.node_id, vote.term));
    let position = |name: &str, at: Option<LogId>| at.map(|at| format!("{name} {at}"));
    let fields = [
        vote,
        position("purged up to", state.purged),
        position("committed", state.committed),
        position("last", state.last),
    ];
    let fields: Vec<_> = fields.into_iter().flatten().collect();
    format!("hard state {}: {}", state.sequence, fields.join(", "))
}

struct Log {
    home: Home,
    seen: Arc<Seen>,
    store: Option<SledStore>,
    /// Dropped, it lets the writer go on.
    hold: Option<Sender<()>>,
    /// Of what was submitted and has not ended.
    pending: Vec<Receiver<()>>,
}

impl Log {
    fn new() -> Self {
        let home = Home::new();
        let ready = Marker::path(&home.log());
        let seen = Arc::new(Seen { lines: Mutex::default(), ready, mark: Mutex::default() });
        let mut log = Self { home, seen, store: None, hold: None, pending: Vec::new() };
        log.open();
        log.seen.note("opened".to_owned());
        log.seen.lines().clear();
        log
    }

    fn open(&mut self) {
        let seen = self.seen.clone();
        let observer: Observer = Arc::new(move |event| {
            seen.event(event);
            Ok(())
        });
        let options = SledOptions { observer: Some(observer), ..SledOptions::default() };
        self.store = Some(SledStore::open(&self.home.log(), options).unwrap());
        // What is left of purged entries goes between two writes.
        self.pass();
        self.pass();
    }

    fn store(&self) -> &SledStore {
        self.store.as_ref().expect("it is open")
    }

    /// Waits until the writer has done all that it was given, and has swept.
    fn pass(&self) {
        append(self.store(), Vec::new()).unwrap();
    }

    /// Holds the writer up in a completion of its own.
    fn hold(&mut self) {
        let (hold, held) = mpsc::channel::<()>();
        let (begin, begun) = mpsc::channel();
        let wait = move |outcome: io::Result<()>| {
            outcome.unwrap();
            begin.send(()).unwrap();
            // Ends when the other end is dropped.
            let _ = held.recv();
        };
        self.store().append(Vec::new(), Box::new(wait));
        begun.recv().unwrap();
        self.hold = Some(hold);
    }

    /// Lets it go on, and waits until all has ended.
    fn release(&mut self) {
        self.hold = None;
        for pending in self.pending.drain(..) {
            pending.recv().unwrap();
        }
        self.pass();
    }

    fn completion(&mut self, what: String) -> Completion {
        let (done, pending) = mpsc::channel();
        self.pending.push(pending);
        let seen = self.seen.clone();
        Box::new(move |outcome| {
            outcome.unwrap();
            seen.note(format!("completion: {what}"));
            done.send(()).unwrap();
        })
    }
}

impl Runner for Log {
    type Command = Step;

    fn start_block(&mut self, _: &Block) -> Told {
        self.hold();
        Ok(String::new())
    }

    fn end_block(&mut self, _: &Block) -> Told {
        self.release();
        Ok(self.seen.lines().drain(..).map(|line| line + "\n").collect())
    }

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        match step {
            Step::Append { term, kib, indexes } => {
                let bytes = kib.unwrap_or(0) * 1024;
                let done = self.completion(format!("append {indexes:?}"));
                let entries = indexes.iter().map(|index| command(*term, *index, bytes)).collect();
                self.store().append(entries, done);
            }
            Step::Vote { term, node } => {
                let done = self.completion("vote".to_owned());
                self.store().save_vote(Vote { term: *term, node_id: *node, committed: false }, done);
            }
            Step::Truncate { term, index } => {
                let done = self.completion("truncate".to_owned());
                self.store().truncate(Some(LogId::new(*term, *index)), done);
            }
            Step::Purge { term, index } => {
                let done = self.completion("purge".to_owned());
                self.store().purge(LogId::new(*term, *index), done);
            }
            Step::Committed { term, index } => self.store().save_committed(Some(LogId::new(*term, *index))),
            Step::Reopen => {
                self.release();
                self.store = None;
                self.seen.note("closed".to_owned());
                self.open();
                self.seen.note("opened".to_owned());
                self.hold();
            }
        }
        Ok(String::new())
    }
}

#[test]
fn scripts_of_the_order_in_the_log() {
    scripts("log-order", Log::new);
}
