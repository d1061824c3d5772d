use proptest::prelude::*;

use super::*;
use crate::golden::golden;
use crate::proto::v1;

fn subscribe() -> SubscribeFrame {
    SubscribeFrame {
        magic: MAGIC,
        version: VERSION,
        from_seq: 42,
        history: 0x9f3c_52a8_0d1e_7b64,
        from_now: false,
        accept_snapshot: true,
        batched: true,
        compressed: true,
        window_bytes: 1 << 20,
        heartbeat_ms: 5_000,
        id: "mirror".to_owned(),
        filters: vec![
            FilterFrame { tenant: "acme".to_owned(), collection: "orders".to_owned() },
            FilterFrame { tenant: "other".to_owned(), collection: String::new() },
        ],
    }
}

fn head(frame: &[u8], most: usize) -> Result<Head, Failure> {
    Head::read(*frame.first_chunk().unwrap(), most)
}

/// As a node reads what a follower has sent.
fn read(frame: &[u8], is_first: bool) -> Result<SubscribeRequest, Failure> {
    match is_first {
        true => match read_first(head(frame, MAX_FIRST_BYTES)?, &frame[HEAD_BYTES..])? {
            FirstFrame::Subscribe(request) => Ok(*request),
            FirstFrame::Authenticate(_) => Err(invalid("it says who it is")),
        },
        false => read_later(head(frame, MAX_LATER_BYTES)?, &frame[HEAD_BYTES..]),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of a frame of each kind, which others write and read by hand.
#[test]
fn frames_are_the_same_bytes_for_ever() {
    let entity = |value: &'static [u8]| EntityFrame {
        tenant: Raw(b"t"),
        collection: Raw(b"c"),
        key: Raw(b"key"),
        value: Raw(value),
        create_seq: 3,
        previous_seq: 4,
        version: 2,
        expires_ms: 1_767_225_602_000,
        deadline_elapsed_ms: 7_000,
        machine: 0,
    };
    let entry = |more, change| EntryFrame {
        seq: 5,
        term: 1,
        time_ms: 1_767_225_600_000,
        elapsed_ms: 5_000,
        more,
        change,
    };
    let mut entries = BytesMut::new();
    for (more, change) in [
        (true, ChangeFrame::Insert(entity(b"value"))),
        (true, ChangeFrame::Update(entity(b"value"))),
        (true, ChangeFrame::Delete(entity(b""))),
        (true, ChangeFrame::Expire(entity(b""))),
        (false, ChangeFrame::Command { machine: 1, version: 2, command: Raw(b"command") }),
    ] {
        put(&entry(more, change), &mut entries);
    }
    let batch = |compression, entries: &'static [u8]| BatchFrame {
        compression,
        count: 1,
        raw_bytes: 3,
        entries: Raw(entries),
    };
    let heartbeat = HeartbeatFrame {
        upto_seq: 1,
        applied_seq: 2,
        committed_seq: 3,
        upto_time_ms: 4,
        applied_time_ms: 5,
        applied_elapsed_ms: 6,
        lag_operations: 7,
        lag_ms: 8,
    };
    let begin =
        |sync| NodeFrame::Begin { magic: MAGIC, version: VERSION, history: u64::MAX - 1, sync, seq: 42 };
    let compacted = Failure {
        first_revision: 17,
        leader: Some(v1::LeaderHint { node_id: 2, client: "b:7802".to_owned() }),
        ..failure(Reason::Compacted, "it is gone".to_owned(), false, None)
    };
    let node = [
        ("begin, partial", framed(&begin(SyncFrame::Partial), 0)),
        ("begin, full", framed(&begin(SyncFrame::Full), 0)),
        ("entries", framed(&NodeFrame::Entries(batch(CompressionFrame::None, b"abc")), 0)),
        ("entries, compressed", framed(&NodeFrame::Entries(batch(CompressionFrame::Zstd, b"z")), 0)),
        ("state begins", framed(&NodeFrame::StateBegin { seq: 9, term: 2, time_ms: 3, elapsed_ms: 4 }, 0)),
        ("part of a state", framed(&NodeFrame::StatePart(batch(CompressionFrame::None, b"abc")), 0)),
        ("state ends", framed(&NodeFrame::StateEnd { seq: 9, items: 1, crc32: 0x0102_0304 }, 0)),
        ("heartbeat", framed(&NodeFrame::Heartbeat(heartbeat), 0)),
        ("end", end(&compacted)),
    ];
    let follower = [
        ("subscribe", framed(&FollowerFrame::Subscribe(subscribe()), 0)),
        ("ack", framed(&FollowerFrame::Ack { seq: 0x0102_0304_0506_0708 }, 0)),
        ("alive", framed(&FollowerFrame::Alive, 0)),
    ];
    let lines = follower.iter().chain(&node).map(|(kind, frame)| format!("{kind}: {}\n", hex(frame)));
    let entries = format!("the entries insert, update, delete, expire and command: {}\n", hex(&entries));
    golden("frames.txt", &lines.chain([entries]).collect::<String>());
}

#[test]
fn what_a_follower_says_is_read_as_it_was_sent() {
    let asked = read(&framed(&FollowerFrame::Subscribe(subscribe()), 0), true).unwrap();
    let filter = |tenant: &str, collection: &str| Filter {
        tenant_id: tenant.to_owned(),
        collection: collection.to_owned(),
    };
    let expected = SubscribeRequest {
        from_seq: 42,
        history: 0x9f3c_52a8_0d1e_7b64,
        accept_snapshot: true,
        batched: true,
        compression: Compression::Zstd.into(),
        window_bytes: 1 << 20,
        heartbeat_ms: 5_000,
        id: "mirror".to_owned(),
        filters: vec![filter("acme", "orders"), filter("other", "")],
        ..Default::default()
    };
    assert_eq!(asked, expected);
    let ack = read(&framed(&FollowerFrame::Ack { seq: 7 }, 0), false).unwrap();
    assert_eq!(ack, SubscribeRequest { ack_seq: 7, ..Default::default() });
    let alive = read(&framed(&FollowerFrame::Alive, 0), false).unwrap();
    assert_eq!(alive, SubscribeRequest { heartbeat: true, ..Default::default() });
    // The most that is taken of each of them fits.
    let filters = vec![FilterFrame { tenant: "t".repeat(1024), collection: "c".repeat(1024) }; 64];
    let largest = FollowerFrame::Subscribe(SubscribeFrame { filters, id: "i".repeat(128), ..subscribe() });
    assert_eq!(read(&framed(&largest, 0), true).unwrap().filters.len(), 64);
}

#[test]
fn what_is_no_frame_is_refused_with_words() {
    let framed_bytes = |message: &[u8]| {
        let length = u32::try_from(message.len() + CHECKSUM_BYTES).unwrap().to_le_bytes();
        [&length[..], &crc32fast::hash(message).to_le_bytes(), message].concat()
    };
    let first = framed(&FollowerFrame::Subscribe(subscribe()), 0);
    let message = |change: fn(&mut Vec<u8>)| {
        let mut message = first[HEAD_BYTES..].to_vec();
        change(&mut message);
        framed_bytes(&message)
    };
    let mut torn = first.to_vec();
    *torn.last_mut().unwrap() ^= 1;
    let (invalid, too_large) = (Reason::Invalid, Reason::TooLarge);
    let cases: [(Vec<u8>, bool, Reason, &str); 16] = [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), true, invalid, "this is HTTP,"),
        (b"PRI * HTTP/2.0\r\n\r\n".to_vec(), true, invalid, "HTTP/2"),
        (vec![0x16, 3, 1, 2, 0, 1, 0, 1], true, invalid, "TLS"),
        (vec![0xff; 8], true, too_large, "at most 262148"),
        (vec![0; 8], true, invalid, "its checksum alone"),
        (torn, true, invalid, "checksum"),
        (framed_bytes(b""), true, invalid, "the first frame"),
        (framed_bytes(b"a"), true, invalid, "the first frame"),
        (message(|message| message[4] ^= 1), true, invalid, "the first frame"),
        (message(|message| message[12] = 9), true, invalid, "version 9"),
        (message(|message| message[32] = 2), true, invalid, "cannot be read"),
        (message(|message| message.push(0)), true, invalid, "after its end"),
        (message(|message| message.truncate(60)), true, invalid, "cannot be read"),
        (framed(&FollowerFrame::Ack { seq: 1 }, 0).to_vec(), true, invalid, "the first frame"),
        (first.to_vec(), false, invalid, "once"),
        (framed_bytes(&[9; 12]), false, invalid, "cannot be read"),
    ];
    for (frame, is_first, reason, words) in cases {
        let failure = read(&frame, is_first).unwrap_err();
        assert_eq!(failure.reason(), reason, "{}", failure.message);
        assert!(failure.message.contains(words), "{words}: {}", failure.message);
    }
    let late = framed_bytes(&[1; MAX_LATER_BYTES + 1]);
    assert_eq!(read(&late, false).unwrap_err().reason(), too_large);
}

proptest! {
    /// Whatever comes is read, or refused.
    #[test]
    fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..200), begun in 0usize..4) {
        // The property is about what comes after a correct checksum, too, and after the beginning of a correct message.
        let first = framed(&FollowerFrame::Subscribe(subscribe()), 0);
        let prefix = &first[HEAD_BYTES..HEAD_BYTES + [0, 4, 16, 48][begun]];
        let message = [prefix, &bytes].concat();
        let length = u32::try_from(message.len() + CHECKSUM_BYTES).unwrap().to_le_bytes();
        let frame = [&length[..], &crc32fast::hash(&message).to_le_bytes(), &message].concat();
        for frame in [&frame[..], &[&bytes[..], &[0; 8]].concat()] {
            for is_first in [true, false] {
                if let Err(failure) = read(frame, is_first) {
                    prop_assert!([Reason::Invalid, Reason::TooLarge].contains(&failure.reason()));
                    prop_assert!(failure.message.len() < 400, "{}", failure.message);
                }
            }
        }
    }

    /// A frame that was damaged on its way is never taken for another one.
    #[test]
    fn no_damaged_frame_is_read(at in 0usize..100, bit in 0u8..8) {
        let frame = framed(&FollowerFrame::Subscribe(subscribe()), 0);
        let mut damaged = frame.to_vec();
        damaged[at % frame.len()] ^= 1 << bit;
        let read = head(&damaged, MAX_FIRST_BYTES).and_then(|head| {
            // So many are waited for.
            let message = damaged.get(HEAD_BYTES..HEAD_BYTES + head.bytes).unwrap_or_default();
            read_first(head, message)
        });
        prop_assert!(read.is_err());
    }

    /// Whatever a follower may ask for is read as it was meant.
    #[test]
    fn all_that_may_be_asked_for_is_read(
        numbers in any::<(u64, u64, u64, u32)>(),
        flags in any::<[bool; 4]>(),
        id in ".{0,20}",
        filters in prop::collection::vec((".{0,9}", ".{0,9}"), 0..5),
    ) {
        let (from_seq, history, window_bytes, heartbeat_ms) = numbers;
        let [from_now, accept_snapshot, batched, compressed] = flags;
        let filters: Vec<_> =
            filters.into_iter().map(|(tenant, collection)| FilterFrame { tenant, collection }).collect();
        let asked = SubscribeFrame {
            from_seq, history, window_bytes, heartbeat_ms, from_now, accept_snapshot, batched, compressed, id, filters,
            ..subscribe()
        };
        let expected: SubscribeRequest = asked.clone().into();
        prop_assert_eq!(read(&framed(&FollowerFrame::Subscribe(asked), 0), true).unwrap(), expected);
    }
}
