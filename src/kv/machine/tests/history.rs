//! How far the history reaches, and how it is told.

use super::super::history::MAX_SCANNED_EVENTS;
use super::*;

const LIMITS: HistoryLimits = HistoryLimits { events: 10_000, bytes: 8 * 1024 * 1024, age_ms: 0 };

fn nothing_until(next_revision: u64) -> Result<EventsAnswer, u64> {
    Ok(EventsAnswer { next_revision, complete: true, ..EventsAnswer::default() })
}

#[test]
fn of_a_machine_that_has_applied_nothing() {
    let mut machine = KvMachine::default();
    assert_eq!(events(&machine.view(), events_query("c", 0)), nothing_until(0));
    assert_eq!(events(&machine.view(), events_query("c", 8)), nothing_until(8));
    machine.apply(&context(5), put("t", "c", b"k", b"v"));
    for from_revision in [0, 3, 5] {
        let answer = events(&machine.view(), events_query("c", from_revision)).unwrap();
        assert_eq!((answer.events.len(), answer.next_revision), (1, 6));
    }
    assert_eq!(events(&machine.view(), events_query("c", 8)), nothing_until(8));
}

#[test]
fn goes_on_where_nothing_changes() {
    let mut machine = KvMachine::default();
    machine.apply(&context(5), put("t", "c", b"k", b"v"));
    machine.apply(&context(6), put("", "c", b"k", b"v"));
    machine.apply(&context(7), delete("t", "c", b"none"));
    machine.apply(&context(8), put("t", "d", b"k", b"v"));
    machine.apply(&context(9), KvCommand::Expire);
    assert_eq!(events(&machine.view(), events_query("c", 6)), nothing_until(10));
    let nowhere = EventsQuery { start: bytes(b"z"), end: bytes(b"a"), ..events_query("c", 2) };
    assert_eq!(events(&machine.view(), nowhere), nothing_until(10));
    assert_eq!(events(&machine.view(), events_query("c", 10)), nothing_until(10));
}

#[test]
fn a_revision_is_told_whole() {
    let mut machine = KvMachine::default();
    machine.apply(&context(1), put("t", "c", b"k", b"v"));
    let puts = |count: u8| (0..count).map(|key| op_put(&[key], b"value", 0)).collect::<Vec<_>>();
    machine.apply(&context(2), txn(vec![], puts(10), vec![]));
    machine.apply(&context(3), txn(vec![], puts(3), vec![]));
    machine.apply(&context(4), put("t", "c", b"k", b"v"));
    let view = machine.view();
    // Events told and the next revision, from a revision on within bounds.
    let told = |from_revision, limit, max_bytes| {
        let answer =
            events(&view, EventsQuery { limit, max_bytes, ..events_query("c", from_revision) }).unwrap();
        (answer.events.len(), answer.next_revision)
    };
    assert_eq!(told(1, 1, usize::MAX), (1, 2));
    assert_eq!(told(1, 5, usize::MAX), (1, 2));
    assert_eq!(told(2, 5, usize::MAX), (10, 3));
    assert_eq!(told(2, 13, usize::MAX), (13, 4));
    assert_eq!(told(2, 12, usize::MAX), (10, 3));
    assert_eq!(told(3, 0, usize::MAX), (3, 4));
    assert_eq!(told(3, usize::MAX, 0), (3, 4));
    assert_eq!(told(3, usize::MAX, 3 * 70), (3, 4));
    assert_eq!(told(3, usize::MAX, 3 * 70 + 66), (4, 5));
    assert_eq!(told(3, usize::MAX, 3 * 70 + 65), (3, 4));
    assert_eq!(told(2, usize::MAX, 13 * 70 - 1), (10, 3));
}

#[test]
fn is_bounded_by_events() {
    let mut machine = KvMachine::with_history(LIMITS);
    let written = LIMITS.events as u64 + 1000;
    for index in 1..=written {
        machine.apply(&context(index), put("t", "c", &(index % 100).to_be_bytes(), b"v"));
    }
    assert_consistent(&machine);
    let view = machine.view();
    let first = events(&view, events_query("c", 0)).unwrap_err();
    assert_eq!(events(&view, events_query("c", first - 1)), Err(first));
    let mut query = events_query("c", first);
    let mut revisions = Vec::new();
    while query.from_revision <= written {
        let answer = events(&view, query.clone()).unwrap();
        revisions.extend(answer.events.iter().map(|event| event.revision));
        query.from_revision = answer.next_revision;
    }
    assert!(revisions.iter().copied().eq(first..=written));
    // No more is dropped than must be, but for a block of 32.
    assert!((LIMITS.events - 32..=LIMITS.events).contains(&revisions.len()));
}

#[test]
fn is_bounded_by_bytes() {
    let mut machine = KvMachine::with_history(LIMITS);
    let reach = machine.history_reach();
    assert_eq!((reach.first_revision(), reach.events()), (None, 0));
    let value = vec![0; MAX_VALUE_BYTES];
    for index in 1..=40 {
        machine.apply(&context(index), put("t", "c", b"k", &value));
    }
    assert_consistent(&machine);
    let first = events(&machine.view(), events_query("c", 0)).unwrap_err();
    let kept = events(&machine.view(), events_query("c", first)).unwrap().events.len();
    assert_eq!(kept, LIMITS.bytes / MAX_VALUE_BYTES - 1, "8 values and their keys are a little more");
    assert_eq!((reach.first_revision(), reach.events()), (Some(first), kept));
    assert!((kept * MAX_VALUE_BYTES..LIMITS.bytes).contains(&reach.bytes()));
}

/// What keeps a small change takes more than the change itself.
#[test]
fn counts_what_keeping_takes() {
    let mut machine =
        KvMachine::with_history(HistoryLimits { events: usize::MAX, bytes: 1024 * 1024, age_ms: 0 });
    for index in 0..100_000_u64 {
        machine.apply(&context(index), put("t", "c", &(index % 10).to_be_bytes(), b"v"));
    }
    assert_consistent(&machine);
    let events = machine.history_reach().events();
    assert!((2_000..12_000).contains(&events), "{events}");
}

#[test]
fn is_bounded_by_age() {
    let mut machine = KvMachine::with_history(HistoryLimits { age_ms: 1_000, ..LIMITS });
    for index in 0..2_000 {
        machine.apply(&at(index, index * 10), put("t", "c", b"k", b"v"));
    }
    assert_consistent(&machine);
    let first = events(&machine.view(), events_query("c", 0)).unwrap_err();
    // Blocks of 32 changes go as a whole, once the last of them is older than a second.
    assert!((1_899 - 64..=1_899).contains(&first), "{first}");
}

#[test]
fn a_machine_that_takes_over_keeps_as_much_as_the_one_before() {
    let before = KvMachine::with_history(LIMITS);
    let mut other = KvMachine::default();
    other.apply(&context(7), put("t", "c", b"k", b"v"));
    let mut after = KvMachine::read_snapshot(0, &mut &snapshot_of(&other.view())[..]).unwrap();
    after.replaces(&before);
    assert_eq!(after.history_limits(), LIMITS);
    assert_eq!(before.history_reach().first_revision(), Some(8));
    after.apply(&context(8), put("t", "c", b"k", b"v"));
    assert_eq!(before.history_reach().events(), 1, "seen from outside it is the same history");
}

#[test]
fn a_revision_may_be_told_in_pieces() {
    let mut machine = KvMachine::default();
    machine.apply(&context(1), put("t", "c", b"k", b"v"));
    let puts = |count: u8| (0..count).map(|key| op_put(&[key], b"value", 0)).collect::<Vec<_>>();
    machine.apply(&context(2), txn(vec![], puts(10), vec![]));
    machine.apply(&context(3), txn(vec![], puts(3), vec![]));
    let view = machine.view();
    let told = |from_revision, split, limit, max_bytes| {
        let query = EventsQuery { limit, max_bytes, split: Some(split), ..events_query("c", from_revision) };
        let EventsAnswer { events, next_revision, told, complete } = events(&view, query).unwrap();
        (events.len(), next_revision, told, complete)
    };
    assert_eq!(told(1, 0, 100, usize::MAX), (14, 4, 0, true));
    assert_eq!(told(1, 0, 4, usize::MAX), (1, 2, 0, false), "whole revisions first");
    assert_eq!(told(2, 0, 4, usize::MAX), (4, 2, 4, false));
    assert_eq!(told(2, 4, 4, usize::MAX), (4, 2, 8, false));
    assert_eq!(told(2, 8, 4, usize::MAX), (2, 3, 0, false));
    assert_eq!(told(2, 8, 5, usize::MAX), (5, 4, 0, true));
    assert_eq!(told(2, 0, usize::MAX, 3 * 70), (3, 2, 3, false));
    assert_eq!(told(2, 9, usize::MAX, 0), (1, 3, 0, false));
    assert_eq!(told(3, 1, 1, usize::MAX), (1, 3, 2, false));
    assert_eq!(told(3, 2, 1, usize::MAX), (1, 4, 0, true));
    assert_eq!(told(2, 10, 1, usize::MAX), (1, 3, 1, false), "nothing is left of the first");
    // All of it together is what there is.
    let mut query = EventsQuery { limit: 3, split: Some(0), ..events_query("c", 1) };
    let mut pieces = Vec::new();
    loop {
        let answer = events(&view, query.clone()).unwrap();
        pieces.extend(answer.events);
        (query.from_revision, query.split) = (answer.next_revision, Some(answer.told));
        if answer.complete {
            break;
        }
    }
    assert_eq!(pieces, events(&view, events_query("c", 1)).unwrap().events);
}

#[test]
fn a_change_larger_than_the_history_is_not_in_it() {
    let mut machine = KvMachine::with_history(LIMITS);
    let keys = LIMITS.bytes as u64 / MAX_KEY_BYTES as u64 + 1;
    for number in 0..keys {
        let key = [&number.to_be_bytes()[..], &[b'k'; MAX_KEY_BYTES - 8]].concat();
        machine.apply(&context(number), put("t", "c", &key, b""));
    }
    let reply = machine.apply(&context(keys), delete_range("c", b"", b"", 0));
    assert_eq!(reply, KvReply::DeletedRange { revision: keys, deleted: keys, more: false });
    assert_consistent(&machine);
    assert_eq!(events(&machine.view(), events_query("c", keys)), Err(keys + 1));
    assert_eq!(events(&machine.view(), events_query("c", keys + 1)), nothing_until(keys + 1));
    machine.apply(&context(keys + 1), put("t", "c", b"k", b"v"));
    assert_eq!(events(&machine.view(), events_query("c", keys + 1)).unwrap().events.len(), 1);
}

#[test]
fn a_query_that_matches_nothing_makes_progress() {
    let mut machine = KvMachine::default();
    let scanned = MAX_SCANNED_EVENTS as u64;
    for index in 0..scanned + 10 {
        machine.apply(&context(index), put("t", "other", &index.to_be_bytes(), b"v"));
    }
    machine.apply(&context(scanned + 10), put("t", "c", b"k", b"v"));
    let view = machine.view();
    let on_the_way = EventsAnswer { next_revision: scanned, ..EventsAnswer::default() };
    assert_eq!(events(&view, events_query("c", 0)), Ok(on_the_way));
    assert_eq!(events(&view, events_query("c", scanned)).unwrap().events.len(), 1);

    // The last revision looked at is looked at as a whole.
    machine.apply(&context(scanned + 11), delete_range("other", b"", b"", 10_000));
    machine.apply(&context(scanned + 12), delete_range("other", b"", b"", 0));
    machine.apply(&context(scanned + 13), put("t", "c", b"k", b"v"));
    let view = machine.view();
    let on_the_way = EventsAnswer { next_revision: scanned + 13, ..EventsAnswer::default() };
    assert_eq!(events(&view, events_query("c", scanned + 11)), Ok(on_the_way));
    let answer = events(&view, events_query("c", scanned)).unwrap();
    assert_eq!((answer.events.len(), answer.next_revision), (1, scanned + 13));
    assert_consistent(&machine);
}
