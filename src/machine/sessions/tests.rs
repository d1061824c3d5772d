//! The table by itself: what it admits, and what it keeps.

mod script;

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn slot(session: u64, sequence: u64, first_unanswered: u64) -> SessionSlot {
    SessionSlot { session, sequence, first_unanswered }
}

fn apply(table: &mut SessionTable, slot: SessionSlot, index: u64, elapsed_ms: u64) -> Admission {
    let admission = table.admit(slot, elapsed_ms);
    if admission == Admission::Apply {
        table.record(slot, LogId::new(1, index), Bytes::from(format!("reply {index}")));
    }
    admission
}

fn repeats(index: u64) -> Admission {
    Admission::Repeat { log_id: LogId::new(1, index), reply: Bytes::from(format!("reply {index}")) }
}

#[test]
fn a_retry_gets_the_first_answer() {
    let mut table = SessionTable::default();
    table.open(5, 0, "", 0).unwrap();
    assert_eq!(apply(&mut table, slot(5, 2, 1), 6, 0), Admission::Apply);
    assert_eq!(apply(&mut table, slot(5, 1, 1), 7, 0), Admission::Apply, "in any order");
    assert_eq!(apply(&mut table, slot(5, 2, 1), 8, 0), repeats(6));
    assert_eq!(apply(&mut table, slot(5, 1, 1), 9, 0), repeats(7));
    assert_eq!(apply(&mut table, slot(5, 3, 2), 10, 0), Admission::Apply);
    assert_eq!(
        apply(&mut table, slot(5, 1, 1), 11, 0),
        Admission::Refuse(SessionRefusal::AnswerForgotten),
        "settled by the write before"
    );
    assert_eq!(apply(&mut table, slot(5, 2, 1), 12, 0), repeats(6), "a late hint forgets nothing more");
}

#[test]
fn a_write_that_was_given_up_does_not_surface_late() {
    let mut table = SessionTable::default();
    table.open(5, 0, "", 0).unwrap();
    assert_eq!(apply(&mut table, slot(5, 4, 4), 6, 0), Admission::Apply);
    assert_eq!(apply(&mut table, slot(5, 3, 1), 7, 0), Admission::Refuse(SessionRefusal::AnswerForgotten));
}

#[test]
fn the_window_is_bounded() {
    let mut table = SessionTable::default();
    table.open(5, 0, "", 0).unwrap();
    assert_eq!(apply(&mut table, slot(5, WINDOW, 1), 6, 0), Admission::Apply);
    let beyond = apply(&mut table, slot(5, WINDOW + 1, 1), 7, 0);
    assert_eq!(beyond, Admission::Refuse(SessionRefusal::WindowExceeded));
    assert_eq!(apply(&mut table, slot(5, WINDOW + 1, 2), 8, 0), Admission::Apply);
    assert_eq!(
        apply(&mut table, slot(5, u64::MAX, u64::MAX), 9, 0),
        Admission::Apply,
        "a jump forgets at once"
    );
    assert_eq!(table.bytes(), ANSWER_BYTES + "reply 9".len());
}

/// While the first one is refused nothing can be settled: it must not be refused for what came after it.
#[test]
fn the_first_unanswered_write_is_taken_however_large_the_answers_of_later_ones() {
    let mut table = SessionTable::default();
    table.open(5, 0, "", 0).unwrap();
    assert_eq!(table.admit(slot(5, 2, 1), 0), Admission::Apply);
    table.record(slot(5, 2, 1), LogId::new(1, 6), Bytes::from(vec![0; MAX_SESSION_BYTES]));
    let refused = Admission::Refuse(SessionRefusal::WindowExceeded);
    assert_eq!(apply(&mut table, slot(5, 3, 1), 7, 0), refused);
    assert_eq!(apply(&mut table, slot(5, 1, 1), 8, 0), Admission::Apply);
    assert_eq!(apply(&mut table, slot(5, 3, 3), 9, 0), Admission::Apply, "the large one is settled");
}

#[test]
fn sessions_expire_by_elapsed_time() {
    let mut table = SessionTable::default();
    table.open(5, MIN_TTL_MS, "", 0).unwrap();
    table.open(6, MIN_TTL_MS * 10, "", 0).unwrap();
    assert_eq!(apply(&mut table, slot(5, 1, 1), 7, MIN_TTL_MS), Admission::Apply);
    assert_eq!(apply(&mut table, slot(5, 2, 1), 8, MIN_TTL_MS * 2), Admission::Apply, "used meanwhile");
    let late = apply(&mut table, slot(5, 3, 1), 9, MIN_TTL_MS * 3 + 1);
    assert_eq!(late, Admission::Refuse(SessionRefusal::Expired));
    assert_eq!((table.len(), table.bytes()), (1, 0));
    assert_eq!(
        apply(&mut table, slot(99, 1, 1), 10, 0),
        Admission::Refuse(SessionRefusal::Expired),
        "never opened"
    );
    table.close(6);
    table.close(6);
    assert_eq!(table.len(), 0);
    assert_eq!(table.take_counts(), SessionCounts { opened: 2, closed: 1, expired: 1, evicted: 0 });
    assert_eq!(table.take_counts(), SessionCounts::default(), "taken once");
}

#[test]
fn a_full_table_gives_way_only_where_nobody_works() {
    let mut table = SessionTable::default();
    for id in 1..=MAX_SESSIONS as u64 {
        table.open(id, 0, "", id % 7).unwrap();
    }
    let id = MAX_SESSIONS as u64 + 1;
    assert_eq!(table.open(id, 0, "", 100), Err(SessionRefusal::TooManySessions));
    assert_eq!(apply(&mut table, slot(7, 1, 1), 0, MIN_IDLE_MS), Admission::Apply);
    table.open(id, 0, "", MIN_IDLE_MS).unwrap();
    assert_eq!(table.len(), MAX_SESSIONS);
    assert_eq!(table.take_counts(), SessionCounts { opened: id, evicted: 1, ..Default::default() });
    assert_eq!(apply(&mut table, slot(7, 1, 1), 0, MIN_IDLE_MS), repeats(0), "in use, so it stayed");
    assert_eq!(
        apply(&mut table, slot(14, 1, 1), 0, MIN_IDLE_MS),
        Admission::Refuse(SessionRefusal::Expired),
        "the one that was unused for longest"
    );
}

/// One opener fills the table; everybody else still gets in, and it does not.
#[test]
fn nobody_takes_all_sessions() {
    let mut table = SessionTable::default();
    let most = MAX_OPENER_SESSIONS as u64;
    let greedy = |id: u64| format!("192.0.2.1:{}", 1000 + id / most);
    for id in 0..MAX_SESSIONS as u64 {
        table.open(id + 1, MAX_TTL_MS, &greedy(id), id).unwrap();
    }
    assert_eq!((table.len(), table.largest_opener()), (MAX_SESSIONS, MAX_OPENER_SESSIONS));
    let now_ms = MAX_SESSIONS as u64;
    let another = MAX_SESSIONS as u64 + 1;
    let refused = table.open(another, 0, &greedy(0), now_ms);
    assert_eq!(refused, Err(SessionRefusal::TooManyOfOpener), "one connection has its bound");
    // The idlest of the connections with most; which one of them that is does not matter.
    let ids: Vec<u64> = (another..another + 50).collect();
    for id in &ids {
        table.open(*id, 0, &format!("198.51.100.1:{id}"), now_ms).unwrap();
        assert_eq!(table.len(), MAX_SESSIONS);
    }
    assert_eq!(table.take_counts().evicted, 50);
    for id in &ids {
        assert_eq!(table.admit(slot(*id, 1, 1), now_ms), Admission::Apply, "those with one are left alone");
    }
    // A new connection of the greedy host gets in too, at the cost of the others of that host.
    table.open(another + 50, 0, "192.0.2.1:9", now_ms).unwrap();
    let listed = table.list(0, usize::MAX);
    assert_eq!(listed.len(), MAX_SESSIONS);
    assert_eq!(listed.iter().filter(|info| info.opener.starts_with("198.51.100.1:")).count(), 50);
}

#[test]
fn a_host_with_many_connections_gives_way_as_well() {
    let mut table = SessionTable::default();
    for id in 1..=MAX_SESSIONS as u64 {
        table.open(id, MAX_TTL_MS, &format!("192.0.2.1:{id}"), 0).unwrap();
    }
    let id = MAX_SESSIONS as u64 + 1;
    table.open(id, 0, "198.51.100.1:1", 1).unwrap();
    assert_eq!(table.admit(slot(1, 1, 1), 1), Admission::Refuse(SessionRefusal::Expired), "the idlest of it");
    let refused = Err(SessionRefusal::TooManySessions);
    assert_eq!(table.open(id + 1, 0, "192.0.2.1:99999", 2), refused, "it has its share");
    assert_eq!(table.open(id + 1, 0, "192.0.2.1:99999", MIN_IDLE_MS - 1), refused);
    table.open(id + 1, 0, "192.0.2.1:99999", MIN_IDLE_MS).unwrap();
}

#[test]
fn sessions_are_listed_in_pages() {
    let mut table = SessionTable::default();
    for id in [3, 5, u64::MAX] {
        table.open(id, MIN_TTL_MS, "192.0.2.1:5", 7).unwrap();
    }
    apply(&mut table, slot(3, 2, 1), 6, 9);
    let first = table.list(0, 2);
    let bytes = 2 * ANSWER_BYTES + "reply 6".len();
    let (opener, expires_ms) = ("192.0.2.1:5".to_owned(), 9 + MIN_TTL_MS);
    let expected =
        SessionInfo { session: 3, opener, opened_ms: 7, used_ms: 9, expires_ms, bytes, unsettled: 1 };
    assert_eq!(first[0], expected);
    assert_eq!(first[1].session, 5);
    assert_eq!(table.list(5, 2).iter().map(|info| info.session).collect::<Vec<_>>(), [u64::MAX]);
    assert!(table.list(u64::MAX, 2).is_empty());
    assert!(table.close(3) && !table.close(3));
}

#[test]
fn large_answers_cost_their_session_not_the_others() {
    let mut table = SessionTable::default();
    table.open(1, 0, "", 0).unwrap();
    assert_eq!(apply(&mut table, slot(1, 1, 1), 1, 0), Admission::Apply);
    let large = Bytes::from(vec![0; MAX_SESSION_BYTES]);
    for id in 2..=16 {
        table.open(id, 0, "", id).unwrap();
        assert_eq!(table.admit(slot(id, 1, 1), id), Admission::Apply);
        assert_eq!(table.record(slot(id, 1, 1), LogId::new(1, id), large.clone()), 0);
        assert!(table.bytes() <= MAX_TABLE_BYTES);
    }
    let full = table.admit(slot(2, 2, 1), 20);
    assert_eq!(full, Admission::Refuse(SessionRefusal::WindowExceeded), "settle some first");
    assert_eq!(table.admit(slot(2, 2, 2), 20), Admission::Apply);
    assert_eq!(table.record(slot(2, 2, 2), LogId::new(1, 20), large.clone()), 0);

    table.open(17, 0, "", 20).unwrap();
    assert_eq!(table.admit(slot(17, 1, 1), 20), Admission::Apply);
    let evicted = table.record(slot(17, 1, 1), LogId::new(1, 21), large);
    assert!(evicted > 0 && table.bytes() <= MAX_TABLE_BYTES);
    assert_eq!(table.take_counts(), SessionCounts { opened: 17, evicted, ..Default::default() });
    assert_eq!(
        table.admit(slot(17, 1, 1), 20),
        Admission::Refuse(SessionRefusal::Expired),
        "one of the largest"
    );
    assert_eq!(table.admit(slot(1, 1, 1), 20), repeats(1), "the small one stays");
}

#[test]
fn what_is_stored_has_its_documented_bytes() {
    let mut table = SessionTable::default();
    table.open(5, MIN_TTL_MS, "a:1", 3).unwrap();
    apply(&mut table, slot(5, 2, 1), 7, 4);
    let mut bytes = Vec::new();
    table.write(&mut bytes).unwrap();
    let mut expected = 2_u32.to_le_bytes().to_vec();
    expected.extend(0_u64.to_le_bytes());
    expected.extend(1_u32.to_le_bytes());
    let session = b"\x05\xfb\x10\x27\x04\x01\x02\x00\x01\x01\x07\x07reply 7\x03a:1\x03";
    expected.extend((session.len() as u32).to_le_bytes());
    expected.extend(session);
    assert_eq!(bytes, expected);
    let read = SessionTable::read(&mut bytes.as_slice()).unwrap();
    assert_eq!(read, table);
    assert_eq!(read.largest_opener(), 1);

    // Of version 1, without an opener.
    let session = &session[..session.len() - 5];
    let mut earlier = 1_u32.to_le_bytes().to_vec();
    earlier.extend(0_u64.to_le_bytes());
    earlier.extend(1_u32.to_le_bytes());
    earlier.extend((session.len() as u32).to_le_bytes());
    earlier.extend(session);
    let read = SessionTable::read(&mut earlier.as_slice()).unwrap();
    let (of_table, of_read) = (table.list(0, 1).remove(0), read.list(0, 1).remove(0));
    assert_eq!(of_read, SessionInfo { opener: String::new(), opened_ms: 4, ..of_table });
}

#[test]
fn damage_is_refused() {
    let mut table = SessionTable::default();
    table.open(5, 0, "", 0).unwrap();
    let mut bytes = Vec::new();
    table.write(&mut bytes).unwrap();
    for end in 0..bytes.len() {
        assert!(SessionTable::read(&mut &bytes[..end]).is_err());
    }
    let mut newer = bytes.clone();
    newer[0] = 3;
    assert!(SessionTable::read(&mut newer.as_slice()).is_err());
    let mut many = bytes;
    many[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(SessionTable::read(&mut many.as_slice()).is_err());
}

proptest! {
    /// Any history of sends and re-sends applies every write at most once and answers it always the same;
    /// a snapshot at any point changes nothing.
    #[test]
    fn every_write_is_applied_at_most_once(
        sends in prop::collection::vec((0..3_u64, 1..12_u64, 0..6_u64, any::<bool>()), 1..200),
    ) {
        let mut table = SessionTable::default();
        for id in 0..3 {
            table.open(id, 0, "", 0).unwrap();
        }
        let mut applied: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        let mut settled = [1_u64; 3];
        for (index, (session, sequence, behind, snapshot)) in sends.into_iter().enumerate() {
            let index = index as u64 + 10;
            let first = sequence.saturating_sub(behind).max(1);
            let slot = slot(session, sequence, first);
            let admission = apply(&mut table, slot, index, index);
            let mark = &mut settled[session as usize];
            *mark = first.max(*mark);
            let expected = match applied.get(&(session, sequence)) {
                _ if sequence < *mark => Admission::Refuse(SessionRefusal::AnswerForgotten),
                Some(first) => repeats(*first),
                None => Admission::Apply,
            };
            prop_assert_eq!(&admission, &expected);
            if admission == Admission::Apply {
                prop_assert!(applied.insert((session, sequence), index).is_none());
            }
            if snapshot {
                let mut bytes = Vec::new();
                table.write(&mut bytes).unwrap();
                let restored = SessionTable::read(&mut bytes.as_slice()).unwrap();
                prop_assert_eq!(&restored, &table);
                table = restored;
            }
        }
    }
}
