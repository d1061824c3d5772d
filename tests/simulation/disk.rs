//! The disk of a simulated node (temporary memory log).
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quorate::runtime::TaskGroup;
use quorate::storage::{Completion, LogBounds, LogStore, MemorySnapshots, SnapshotStore};
use quorate::types::{Entry, LogId, Vote};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use std::io;
use tokio::sync::Notify;

#[derive(Clone, Default)]
struct Image {
    entries: VecDeque<Entry>,
    purged: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
}
impl Image {
    fn next(&self) -> u64 {
        self.entries.back().map(|e| e.log_id).or(self.purged).map_or(0, |l| l.index + 1)
    }
    fn first(&self) -> u64 {
        self.purged.map_or(0, |l| l.index + 1)
    }
    fn apply(&mut self, op: &Op) {
        match op {
            Op::Append(entries) => {
                for e in entries {
                    assert_eq!(e.log_id.index, self.next());
                    self.entries.push_back(e.clone());
                }
            }
            Op::Vote(v) => self.vote = Some(*v),
            Op::Truncate(from) => {
                while self.entries.back().is_some_and(|e| e.log_id.index >= *from) {
                    self.entries.pop_back();
                }
            }
            Op::Purge(upto) => {
                while self.entries.front().is_some_and(|e| e.log_id.index <= upto.index) {
                    self.entries.pop_front();
                }
                if self.purged.is_none_or(|p| p.index < upto.index) {
                    self.purged = Some(*upto);
                }
            }
        }
    }
}
enum Op {
    Append(Vec<Entry>),
    Vote(Vote),
    Truncate(u64),
    Purge(LogId),
}
#[derive(Default)]
struct State {
    durable: Image,
    current: Image,
    queue: VecDeque<(Op, Option<Completion>)>,
    epoch: u64,
}
pub struct Disk {
    state: Arc<Mutex<State>>,
    notify: Arc<Notify>,
    rng: SmallRng,
    snaps: MemorySnapshots,
    lying: bool,
}
struct MemLog {
    state: Arc<Mutex<State>>,
    notify: Arc<Notify>,
    epoch: u64,
    lying: bool,
}
impl MemLog {
    fn submit(&self, op: Op, done: Completion) {
        let mut s = self.state.lock().unwrap();
        if s.epoch != self.epoch {
            return;
        }
        s.current.apply(&op);
        let done = if self.lying {
            drop(s);
            done(Ok(()));
            s = self.state.lock().unwrap();
            None
        } else {
            Some(done)
        };
        s.queue.push_back((op, done));
        self.notify.notify_one();
    }
}
impl LogStore for MemLog {
    fn bounds(&self) -> LogBounds {
        let s = self.state.lock().unwrap();
        LogBounds {
            purged: s.current.purged,
            last: s.current.entries.back().map(|e| e.log_id).or(s.current.purged),
        }
    }
    fn vote(&self) -> Option<Vote> {
        self.state.lock().unwrap().current.vote
    }
    fn committed(&self) -> Option<LogId> {
        self.state.lock().unwrap().current.committed
    }
    fn read(&self, start: u64, end: u64, max: usize) -> io::Result<Vec<Entry>> {
        let s = self.state.lock().unwrap();
        let first = s.current.first();
        let mut out = vec![];
        let mut bytes = 0;
        for i in start.max(first)..end.min(s.current.next()) {
            let e = s.current.entries[(i - first) as usize].clone();
            bytes += e.size_bytes();
            if bytes > max && !out.is_empty() {
                break;
            }
            out.push(e);
        }
        Ok(out)
    }
    fn append(&self, entries: Vec<Entry>, done: Completion) {
        self.submit(Op::Append(entries), done)
    }
    fn save_vote(&self, vote: Vote, done: Completion) {
        self.submit(Op::Vote(vote), done)
    }
    fn save_committed(&self, c: Option<LogId>) {
        self.state.lock().unwrap().current.committed = c;
    }
    fn truncate(&self, from: u64, done: Completion) {
        self.submit(Op::Truncate(from), done)
    }
    fn purge(&self, upto: LogId, done: Completion) {
        self.submit(Op::Purge(upto), done)
    }
}
impl Disk {
    pub fn new(seed: u64, lying: bool) -> Self {
        Self {
            state: Default::default(),
            notify: Default::default(),
            rng: SmallRng::seed_from_u64(seed),
            snaps: Default::default(),
            lying,
        }
    }
    pub fn open_log(&mut self, group: &Arc<TaskGroup>) -> Arc<dyn LogStore> {
        let epoch = self.state.lock().unwrap().epoch;
        let (state, notify, mut rng) =
            (self.state.clone(), self.notify.clone(), SmallRng::seed_from_u64(self.rng.random()));
        group.spawn(async move {
            loop {
                notify.notified().await;
                let stall = rng.random_bool(0.02);
                tokio::time::sleep(Duration::from_micros(if stall {
                    rng.random_range(50_000..300_000)
                } else {
                    rng.random_range(100..4_000)
                }))
                .await;
                let done = {
                    let mut s = state.lock().unwrap();
                    if s.epoch != epoch {
                        return;
                    }
                    let committed = s.current.committed;
                    s.durable.committed = committed;
                    let mut done = vec![];
                    while let Some((op, d)) = s.queue.pop_front() {
                        s.durable.apply(&op);
                        done.extend(d);
                    }
                    done
                };
                for d in done {
                    d(Ok(()));
                }
            }
        });
        Arc::new(MemLog { state: self.state.clone(), notify: self.notify.clone(), epoch, lying: self.lying })
    }
    pub fn snapshots(&self) -> Arc<dyn SnapshotStore> {
        Arc::new(self.snaps.clone())
    }
    pub fn crash(&mut self) -> u64 {
        let mut s = self.state.lock().unwrap();
        let n = s.queue.len();
        let keep = self.rng.random_range(0..=n);
        for _ in 0..keep {
            let (op, _) = s.queue.pop_front().unwrap();
            s.durable.apply(&op);
        }
        let lost: Vec<_> = s.queue.drain(..).collect();
        s.epoch += 1;
        s.current = s.durable.clone();
        drop(s);
        drop(lost);
        (n - keep) as u64
    }
    pub fn snapshot_counts(&self) -> (u64, u64) {
        (1, 1)
    }
}
