//! The log as it should be.

use std::collections::BTreeMap;
use std::fmt;

use crate::storage::{Completion, LogBounds, LogStore};
use crate::types::{Entry, Incarnation, LogId, Member, Membership, Payload, Vote};

use super::steps::{RandomStep, command};
use super::{Broken, Promise, broken, ensure};

/// The log at one moment.
#[derive(Debug, Clone, Default)]
pub(super) struct LogMoment {
    pub(super) entries: BTreeMap<u64, Entry>,
    pub(super) purged: Option<LogId>,
    pub(super) vote: Option<Vote>,
    pub(super) committed: Option<LogId>,
    /// Of the next entry.
    pub(super) term: u64,
}

impl fmt::Display for LogMoment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LogBounds { purged, last } = self.bounds();
        write!(f, "a log of {} entries from {purged:?} to {last:?}", self.entries.len())?;
        write!(f, " with vote {:?}, committed {:?}", self.vote, self.committed)
    }
}

impl LogMoment {
    /// What a store shows.
    pub(super) fn of(store: &dyn LogStore) -> Result<Self, Broken> {
        let read = store.read(0, u64::MAX, usize::MAX);
        let read = read.map_err(|error| broken(Promise::Visibility, format!("a read fails: {error}")))?;
        let bounds = store.bounds();
        let entries: BTreeMap<_, _> = read.into_iter().map(|entry| (entry.log_id.index, entry)).collect();
        let (vote, committed) = (store.vote(), store.committed());
        let found = Self { entries, purged: bounds.purged, vote, committed, term: 0 };
        ensure(bounds == found.bounds(), Promise::Visibility, || {
            format!("the store says that it holds {bounds:?}, but can be read: {found}")
        })?;
        Ok(found)
    }

    pub(super) fn shows_the_same(&self, other: &Self) -> bool {
        (self.purged, self.vote) == (other.purged, other.vote) && self.entries == other.entries
    }

    pub(super) fn bounds(&self) -> LogBounds {
        let last = self.entries.values().next_back().map(|entry| entry.log_id).or(self.purged);
        LogBounds { purged: self.purged, last }
    }

    pub(super) fn first(&self) -> u64 {
        self.purged.map_or(0, |purged| purged.index + 1)
    }

    pub(super) fn next(&self) -> u64 {
        self.bounds().last.map_or(0, |last| last.index + 1)
    }

    /// Whether it holds the entry at `position`, or has purged it.
    pub(super) fn holds(&self, position: LogId) -> bool {
        let entry = self.entries.get(&position.index).map(|entry| entry.log_id);
        position.index < self.first() || entry == Some(position)
    }

    /// The index at a fraction of the log, or just after it.
    pub(super) fn index_at(&self, fraction: u8) -> u64 {
        self.first() + (self.next() - self.first()) * u64::from(fraction) / 255
    }

    pub(super) fn entry_at(&self, fraction: u8) -> Option<&Entry> {
        self.entries.get(&self.index_at(fraction))
    }

    pub(super) fn read(&self, start: u64, end: u64, max_bytes: usize) -> Vec<Entry> {
        let mut read: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        for entry in self.entries.values().filter(|entry| (start..end).contains(&entry.log_id.index)) {
            bytes += entry.size_bytes();
            if bytes > max_bytes && !read.is_empty() {
                break;
            }
            read.push(entry.clone());
        }
        read
    }

    /// Takes a write, and returns every moment on the way: a crash may come between any two entries.
    pub(super) fn take(&mut self, write: &ModelWrite) -> Vec<Self> {
        let mut moments = Vec::new();
        match write {
            ModelWrite::Append(entries) => {
                for entry in entries {
                    self.entries.insert(entry.log_id.index, entry.clone());
                    moments.push(self.clone());
                }
            }
            ModelWrite::Vote(vote) => self.vote = Some(*vote),
            ModelWrite::Truncate(last) => {
                let from = last.map_or(0, |last| last.index + 1);
                while self.entries.last_key_value().is_some_and(|(index, _)| *index >= from) {
                    self.entries.pop_last();
                    moments.push(self.clone());
                }
            }
            ModelWrite::Purge(upto) => {
                self.entries = self.entries.split_off(&(upto.index + 1));
                self.purged = Some(*upto);
            }
        }
        // Also where nothing has changed: then this is what was written before.
        moments.push(self.clone());
        moments
    }
}

/// One write to a store.
#[derive(Debug, Clone)]
pub(super) enum ModelWrite {
    Append(Vec<Entry>),
    Vote(Vote),
    Truncate(Option<LogId>),
    Purge(LogId),
}

impl ModelWrite {
    /// What a step writes to a log that is `now`; nothing for a step that reads, or for want of entries.
    pub(super) fn of(step: &RandomStep, now: &mut LogMoment) -> Option<Self> {
        match step {
            RandomStep::Append(sizes, raise) => {
                now.term += raise;
                let entries = sizes.iter().zip(now.next()..);
                Some(Self::Append(entries.map(|(size, index)| command(now.term, index, *size)).collect()))
            }
            RandomStep::Membership => {
                let member = Member {
                    peer: "a:1".into(),
                    client: "b:2".into(),
                    incarnation: Incarnation(9),
                    ..Member::default()
                };
                let membership = Membership { voters: vec![[1].into()], members: [(1, member)].into() };
                let at = |index| LogId::new(now.term, index);
                Some(Self::Append(vec![
                    Entry { log_id: at(now.next()), payload: Payload::Membership(membership) },
                    Entry { log_id: at(now.next() + 1), payload: Payload::Blank },
                ]))
            }
            RandomStep::Vote(term, node_id, committed) => {
                Some(Self::Vote(Vote { term: *term, node_id: *node_id, committed: *committed }))
            }
            RandomStep::Truncate(count) => {
                // What is committed is never truncated.
                let floor = now.committed.map_or(0, |committed| committed.index + 1).max(now.first());
                let from = now.next().saturating_sub(u64::from(*count)).max(floor);
                let last = now.entries.range(..from).next_back().map(|(_, entry)| entry.log_id);
                Some(Self::Truncate(last.or(now.purged)))
            }
            RandomStep::Purge(fraction) => now.entry_at(*fraction).map(|entry| Self::Purge(entry.log_id)),
            RandomStep::PurgeBeyond(count) => {
                Some(Self::Purge(LogId::new(now.term, now.next() + u64::from(*count))))
            }
            RandomStep::Commit(_)
            | RandomStep::Read(..)
            | RandomStep::Sync
            | RandomStep::Reopen
            | RandomStep::Crash(_) => None,
        }
    }

    pub(super) fn submit(self, store: &dyn LogStore, done: Completion) {
        match self {
            Self::Append(entries) => store.append(entries, done),
            Self::Vote(vote) => store.save_vote(vote, done),
            Self::Truncate(last) => store.truncate(last, done),
            Self::Purge(upto) => store.purge(upto, done),
        }
    }
}
