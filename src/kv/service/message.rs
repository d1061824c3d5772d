//! What of the feed goes into one message of a watch.

use super::wishes::WatchWishes;
use crate::feed::{FeedContent, FeedPage, KeyBefore, PreviousValues};
use crate::kv::api::{PreviousItem, WatchEvent};
use crate::kv::{calls, codec};
use crate::machine::AppliedEvent;
use crate::proto::v1;
use crate::types::LogId;

/// Most events in one message; those of one revision are split only when they alone are more.
const MESSAGE_EVENTS: usize = 1_000;
/// Most bytes of keys and values in one message, each event counted with [`EVENT_BYTES`] more; one event may exceed it.
const MESSAGE_BYTES: usize = 1024 * 1024;
/// What an event takes beside its key and value.
const EVENT_BYTES: usize = 64;

/// How far a watch has been told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ToldUpTo {
    /// All of what is below.
    pub(super) next: u64,
    /// And so many of the events at that revision which it wants.
    pub(super) events: usize,
}

impl ToldUpTo {
    /// Everything below `position` is told, or is nothing that it wants.
    pub(super) fn go_on_at(&mut self, position: u64) {
        if position > self.next {
            *self = Self { next: position, events: 0 };
        }
    }
}

/// The content of one message.
#[derive(Debug, Default)]
pub(super) struct WatchMessage {
    /// In order.
    pub(super) events: Vec<v1::Event>,
    /// Where the last of them was applied.
    pub(super) last: Option<LogId>,
}

impl WatchMessage {
    /// As much of `page`, which begins at what comes next, as a message takes, with what keys were before where that is `looked_up`.
    /// `told` moves on; `time_at` makes times of day of elapsed time.
    pub(super) async fn of(
        wishes: &WatchWishes,
        page: FeedPage,
        mut looked_up: Option<PreviousValues>,
        told: &mut ToldUpTo,
        time_at: impl Fn(u64) -> u64,
    ) -> Self {
        let (mut message, mut bytes) = (Self::default(), 0);
        for record in page.records {
            let revision = record.log_id.index;
            // Commands of other machines are nothing that happens to a key.
            let FeedContent::Events(events) = record.content else { continue };
            let before = message.events.len();
            if before > 0 && (before >= MESSAGE_EVENTS || bytes >= MESSAGE_BYTES) {
                *told = ToldUpTo { next: revision, events: 0 };
                return message;
            }
            let earlier = if revision == told.next { told.events } else { 0 };
            let wanted = events.into_iter().enumerate().filter(|(_, event)| wishes.want(event));
            for (place, event) in wanted.skip(earlier) {
                let key_before = match &mut looked_up {
                    Some(looked_up) => Some(looked_up.before(&event, revision, place).await),
                    None => None,
                };
                bytes += event_bytes(&event) + key_before.as_ref().map_or(0, before_bytes);
                let written_at = event.previous;
                let previous = key_before.map(|before| previous_item(written_at, before, &time_at));
                let event = WatchEvent { previous, ..calls::event(revision, event, &time_at) };
                message.events.push(codec::encode_event(event));
                let count = message.events.len();
                let is_spent = looked_up.as_ref().is_some_and(PreviousValues::is_spent);
                let is_too_much = count > MESSAGE_EVENTS || bytes > MESSAGE_BYTES || is_spent;
                if is_too_much && before > 0 {
                    message.events.truncate(before);
                    *told = ToldUpTo { next: revision, events: 0 };
                    return message;
                }
                if is_too_much && count > 1 {
                    message.events.pop();
                    message.last = Some(record.log_id);
                    *told = ToldUpTo { next: revision, events: earlier + count - 1 };
                    return message;
                }
            }
            if message.events.len() > before {
                message.last = Some(record.log_id);
            }
        }
        told.go_on_at(page.next);
        message
    }
}

fn event_bytes(event: &AppliedEvent) -> usize {
    event.key.len() + event.value.len() + EVENT_BYTES
}

/// What a key was before, which was `written_at` some revision if it was there.
fn previous_item(written_at: u64, before: KeyBefore, time_at: impl Fn(u64) -> u64) -> PreviousItem {
    match before {
        KeyBefore::Absent => PreviousItem::Absent,
        KeyBefore::Written(event) => PreviousItem::Item(calls::written_item(written_at, event, time_at)),
        KeyBefore::Unknown => PreviousItem::Unknown,
    }
}

fn before_bytes(before: &KeyBefore) -> usize {
    match before {
        KeyBefore::Written(event) => event_bytes(event),
        KeyBefore::Absent | KeyBefore::Unknown => 0,
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::feed::FeedRecord;
    use crate::machine::EventOperation;

    /// What is applied at the revisions from 1 on: so many events at each, with values of so many bytes.
    fn page(counts: &[(usize, usize)], from: u64) -> FeedPage {
        let next = counts.len() as u64 + 1;
        let event = |revision: u64, number: usize, bytes: usize| AppliedEvent {
            machine: 0,
            operation: EventOperation::Update,
            tenant: "default".into(),
            collection: "default".into(),
            key: format!("{revision}/{number}").into(),
            value: vec![0; bytes].into(),
            created: 1,
            previous: 1,
            version: 2,
            deadline_ms: Some(revision),
        };
        let records = (1..next).zip(counts).filter(|(revision, (count, _))| *revision >= from && *count > 0);
        let records = records.map(|(revision, (count, bytes))| FeedRecord {
            log_id: LogId::new(1, revision),
            time_ms: 0,
            elapsed_ms: 0,
            content: FeedContent::Events((0..*count).map(|at| event(revision, at, *bytes)).collect()),
        });
        FeedPage { records: records.collect(), next, applied_next: next }
    }

    /// Events, and then what is told, message by message.
    fn messages(counts: &[(usize, usize)]) -> Vec<(usize, u64, usize)> {
        let wishes = WatchWishes::of(v1::WatchRequest::default()).unwrap();
        let mut told = ToldUpTo { next: 1, events: 0 };
        let (mut messages, mut keys) = (Vec::new(), Vec::new());
        while told.next <= counts.len() as u64 {
            let message = WatchMessage::of(&wishes, page(counts, told.next), None, &mut told, |ms| ms + 7);
            let message = message.now_or_never().expect("nothing is looked up");
            messages.push((message.events.len(), told.next, told.events));
            assert_eq!(message.last.map(|last| last.index), message.events.last().map(|last| last.revision));
            for event in message.events {
                let item = event.item.unwrap();
                assert_eq!((item.mod_revision, item.expires_ms), (event.revision, event.revision + 7));
                keys.push((event.revision, item.key));
            }
            assert!(messages.len() <= 2 * keys.len() + 1, "no progress");
        }
        let all =
            (1..).zip(counts).flat_map(|(revision, (count, _))| (0..*count).map(move |at| (revision, at)));
        let expected: Vec<_> =
            all.map(|(revision, at)| (revision, format!("{revision}/{at}").into())).collect();
        assert_eq!(keys, expected, "all of it, once and in order");
        messages
    }

    #[test]
    fn a_revision_is_told_whole_or_in_pieces_if_it_is_too_much_alone() {
        assert_eq!(messages(&[]), []);
        assert_eq!(messages(&[(0, 0), (0, 0)]), [(0, 3, 0)]);
        assert_eq!(messages(&[(1, 0), (999, 0), (1, 0)]), [(1_000, 3, 0), (1, 4, 0)]);
        assert_eq!(messages(&[(2, 0), (999, 0), (1, 0)]), [(2, 2, 0), (1_000, 4, 0)]);
        assert_eq!(
            messages(&[(1, 0), (2_500, 0), (3, 0), (0, 0)]),
            [(1, 2, 0), (1_000, 2, 1_000), (1_000, 2, 2_000), (503, 5, 0)]
        );
        assert_eq!(messages(&[(2_000, 0), (1, 0)]), [(1_000, 1, 1_000), (1_000, 2, 0), (1, 3, 0)]);
    }

    #[test]
    fn bytes_bound_a_message_too_unless_one_event_alone_is_more() {
        const HALF: usize = 500 * 1024;
        assert_eq!(messages(&[(1, HALF), (1, HALF), (1, HALF)]), [(2, 3, 0), (1, 4, 0)]);
        assert_eq!(messages(&[(1, 0), (5, HALF), (1, 0)]), [(1, 2, 0), (2, 2, 2), (2, 2, 4), (2, 4, 0)]);
        let large = MESSAGE_BYTES + 1;
        assert_eq!(messages(&[(1, large), (2, large)]), [(1, 2, 0), (1, 2, 1), (1, 3, 0)]);
    }
}
