//! Entries that are to be sent, one after the other: what is left of a page.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};

use super::entry::{EntryAt, EntryContent};
use super::wishes::Choice;
use crate::feed::{FeedContent, FeedRecord, KeyBefore, PreviousValues};
use crate::machine::{AppliedEvent, EventOperation, EventSink, NewEvent};

/// The records of a page that are not sent yet.
#[derive(Debug, Default)]
pub(super) struct Rest {
    records: VecDeque<FeedRecord>,
    /// The next event of the first of them.
    event: usize,
    /// The last one that is wanted, once that is known.
    last: Option<usize>,
    /// Whether they are items of a state.
    is_state: bool,
    /// The last position that is done with, and log time there.
    passed: Option<(u64, u64)>,
}

impl Rest {
    /// What is left is followed by `records`; of the first of them so many `events` are done with.
    pub(super) fn load(&mut self, records: Vec<FeedRecord>, events: usize) {
        debug_assert!(self.records.is_empty(), "invariant: a page comes after the one before");
        *self = Self { records: records.into(), event: events, passed: self.passed, ..Self::default() };
    }

    /// The same of items of a state.
    pub(super) fn load_state(&mut self, record: FeedRecord) {
        self.load(vec![record], 0);
        self.is_state = true;
    }

    /// Whether they are items of a state.
    pub(super) fn is_state(&self) -> bool {
        self.is_state
    }

    /// The last position that is done with, and log time there.
    pub(super) fn passed(&self) -> Option<(u64, u64)> {
        self.passed
    }

    /// Goes on to the next entry that is wanted; false when there is none.
    pub(super) fn seek(&mut self, choice: &Choice) -> bool {
        loop {
            let Some(record) = self.records.front() else { return false };
            let events = match &record.content {
                FeedContent::Events(events) => events,
                // Who wants some tenants alone wants no commands.
                FeedContent::Command { .. } if choice.is_all() => {
                    self.last = Some(0);
                    return true;
                }
                FeedContent::Command { .. } => {
                    self.pass();
                    continue;
                }
            };
            let last = match self.last {
                Some(last) => Some(last),
                None => {
                    events.iter().rposition(|event| choice.wants(event)).filter(|last| *last >= self.event)
                }
            };
            let Some(last) = last else {
                self.pass();
                continue;
            };
            self.last = Some(last);
            while !choice.wants(&events[self.event]) {
                self.event += 1;
            }
            return true;
        }
    }

    fn pass(&mut self) {
        if let Some(record) = self.records.pop_front()
            && !self.is_state
        {
            self.passed = Some((record.log_id.index, record.time_ms));
        }
        (self.event, self.last) = (0, None);
    }

    /// The entry that was found: where, what, and whether another one of its position follows.
    pub(super) fn found(&self) -> (EntryAt, EntryContent<'_>, bool) {
        let record = self.records.front().expect("invariant: something was found");
        let at = EntryAt::of(record);
        match &record.content {
            FeedContent::Command { wrote, command } => {
                (at, EntryContent::Command { wrote: *wrote, command }, false)
            }
            FeedContent::Events(events) => {
                let more = !self.is_state && self.last.is_some_and(|last| self.event < last);
                (at, EntryContent::Event(&events[self.event]), more)
            }
        }
    }

    /// What the key of the entry that was found was before, if it is an event that happened and that is `looked_up`.
    pub(super) async fn before_found(&self, looked_up: &mut Option<PreviousValues>) -> Option<KeyBefore> {
        let looked_up = looked_up.as_mut()?;
        match self.found() {
            (at, EntryContent::Event(event), _) if !self.is_state => {
                Some(looked_up.before(event, at.seq, self.event).await)
            }
            _ => None,
        }
    }

    /// It is done with.
    pub(super) fn take(&mut self) {
        match self.last {
            Some(last) if self.event < last => self.event += 1,
            _ => self.pass(),
        }
    }

    /// The rest of the position at hand is done with.
    pub(super) fn skip(&mut self) {
        self.pass();
    }

    /// Nothing beyond `passed` counts as done with.
    pub(super) fn passed_only(&mut self, passed: Option<(u64, u64)>) {
        self.passed = passed;
    }

    /// Lets go of what is left. Where to go on: the position, and how many of its events are done with; `None` if nothing is left.
    pub(super) fn let_go(&mut self) -> Option<(u64, usize)> {
        let first = self.records.front()?.log_id.index;
        let events = self.event;
        *self = Self { passed: self.passed, ..Self::default() };
        Some((first, events))
    }
}

/// StateItems of a state that are wanted, while they are told.
pub(super) struct StateItems<'a> {
    choice: &'a Choice,
    parts: BytesMut,
    told: Vec<ItemMark>,
}

/// An item, without what is in the bytes of all of them.
struct ItemMark {
    machine: u16,
    operation: EventOperation,
    lengths: [usize; 4],
    created: u64,
    previous: u64,
    version: u64,
    deadline_ms: Option<u64>,
}

impl<'a> StateItems<'a> {
    /// None yet, with room for `bytes`.
    pub(super) fn new(choice: &'a Choice, bytes: usize) -> Self {
        Self { choice, parts: BytesMut::with_capacity(bytes), told: Vec::new() }
    }

    pub(super) fn into_events(self) -> Vec<AppliedEvent> {
        let mut parts: Bytes = self.parts.freeze();
        let event = |item: ItemMark| {
            let [tenant, collection, key, value] = item.lengths.map(|length| parts.split_to(length));
            let ItemMark { machine, operation, created, previous, version, deadline_ms, .. } = item;
            AppliedEvent {
                machine,
                operation,
                tenant,
                collection,
                key,
                value,
                created,
                previous,
                version,
                deadline_ms,
            }
        };
        self.told.into_iter().map(event).collect()
    }
}

impl EventSink for StateItems<'_> {
    fn event_of(&mut self, machine: u16, event: NewEvent<'_>) {
        let NewEvent { operation, created, previous, version, deadline_ms, .. } = event;
        let parts = [event.tenant.as_bytes(), event.collection.as_bytes(), event.key, event.value];
        if !self.choice.has(parts[0], parts[1]) {
            return;
        }
        parts.iter().for_each(|part| self.parts.put_slice(part));
        let lengths = parts.map(<[u8]>::len);
        self.told.push(ItemMark { machine, operation, lengths, created, previous, version, deadline_ms });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::replication::Filter;
    use crate::types::LogId;

    fn record(index: u64, tenants: &[&'static str]) -> FeedRecord {
        let event = |tenant: &&'static str| AppliedEvent {
            machine: 0,
            operation: EventOperation::Insert,
            tenant: Bytes::from_static(tenant.as_bytes()),
            collection: Bytes::new(),
            key: Bytes::new(),
            value: Bytes::new(),
            created: 0,
            previous: 0,
            version: 1,
            deadline_ms: None,
        };
        let content = FeedContent::Events(tenants.iter().map(event).collect());
        FeedRecord { log_id: LogId::new(1, index), time_ms: index * 10, elapsed_ms: 0, content }
    }

    #[test]
    fn more_is_said_of_what_is_wanted_and_what_is_left_can_be_come_back_to() {
        let only_a = vec![Filter { tenant_id: "a".to_owned(), ..Default::default() }];
        let choice = Choice::parse(only_a, true).unwrap();
        let page = || vec![record(3, &["b"]), record(5, &["b", "a", "b", "a", "b"]), record(6, &["b"])];
        let mut rest = Rest::default();
        rest.load(page(), 0);
        assert!(rest.seek(&choice));
        assert_eq!(rest.passed(), Some((3, 30)));
        let (at, _, more) = rest.found();
        assert_eq!((at.seq, more), (5, true));
        rest.take();
        assert!(rest.seek(&choice));
        assert!(!rest.found().2);
        let (first, events) = rest.let_go().unwrap();
        assert_eq!((first, events), (5, 3));
        rest.load(page().split_off(1), events);
        assert!(rest.seek(&choice) && !rest.found().2);
        rest.take();
        assert_eq!(rest.passed(), Some((5, 50)));
        assert!(!rest.seek(&choice));
        assert_eq!((rest.passed(), rest.let_go()), (Some((6, 60)), None));
    }

    #[test]
    fn items_are_what_was_told_of_those_that_are_wanted() {
        let only_a = vec![Filter { tenant_id: "a".to_owned(), ..Default::default() }];
        let choice = Choice::parse(only_a, true).unwrap();
        let mut items = StateItems::new(&choice, 0);
        for (tenant, key) in [("a", "k1"), ("b", "k2"), ("a", "k3")] {
            items.event(NewEvent {
                operation: EventOperation::Insert,
                tenant,
                collection: "c",
                key: key.as_bytes(),
                value: b"v",
                created: 1,
                previous: 2,
                version: 3,
                deadline_ms: Some(4),
            });
        }
        let events = items.into_events();
        let keys: Vec<_> = events.iter().map(|event| (&event.key[..], &event.value[..])).collect();
        assert_eq!(keys, [(&b"k1"[..], &b"v"[..]), (b"k3", b"v")]);
    }
}
