use super::*;
use crate::types::MachineVersion;

const AT: EntryAt = EntryAt { seq: 400, term: 3, time_ms: 1_767_225_600_000, elapsed_ms: 5_000 };

fn event(operation: EventOperation, value: &[u8]) -> AppliedEvent {
    AppliedEvent {
        machine: 7,
        operation,
        tenant: "t".into(),
        collection: "collection".into(),
        key: vec![7; 200].into(),
        value: Bytes::copy_from_slice(value),
        created: 3,
        previous: 300,
        version: 1 << 40,
        deadline_ms: Some(7_000),
    }
}

fn entry(content: EntryContent<'_>, is_item: bool) -> SentEntry<'_> {
    SentEntry { at: AT, content, more: false, history: None, is_item, before: None }
}

/// The kind of a frame, and what stands behind it.
fn message(frame: &Bytes) -> (u32, &[u8]) {
    let (kind, rest) = frame[HEAD_BYTES..].split_first_chunk().unwrap();
    (u32::from_le_bytes(*kind), rest)
}

#[test]
fn what_is_counted_of_an_entry_is_what_it_takes() {
    let command = Bytes::from_static(b"a command");
    let wrote = MachineVersion { machine: 2, version: 9 };
    let events = [
        event(EventOperation::Insert, &[1; 7_000]),
        event(EventOperation::Update, b""),
        event(EventOperation::Delete, b""),
        event(EventOperation::Expire, b""),
    ];
    let contents =
        events.iter().map(EntryContent::Event).chain([EntryContent::Command { wrote, command: &command }]);
    for (number, content) in (1..).zip(contents) {
        let entry = entry(content, false);
        let mut bytes = BytesMut::new();
        FrameEncoding::put_batched(&entry, &mut bytes);
        assert_eq!(bytes.len(), FrameEncoding::batched_len(&entry));
        assert_eq!(bytes[33..37], u32::to_le_bytes(number), "numbered as in the protocol of gRPC");
        let frame = FrameEncoding::default().entry(&entry);
        assert_eq!(frame.len(), FrameEncoding::entry_len(&entry));
        let (kind, rest) = message(&frame);
        assert_eq!((kind, &rest[BATCH_HEAD_BYTES - 4..]), (1, &bytes[..]));
    }
}

#[test]
fn the_sum_of_a_state_is_that_of_its_items_however_they_are_sent() {
    let items: Vec<_> = (0..100).map(|number| event(EventOperation::Insert, &[number; 100])).collect();
    let mut all = BytesMut::new();
    items
        .iter()
        .for_each(|item| FrameEncoding::put_batched(&entry(EntryContent::Event(item), true), &mut all));
    let all = all.freeze();
    let end = |encoding: &mut FrameEncoding| encoding.mark(AT, StateMark::End, HistoryEpoch(1));
    let mut encoding = FrameEncoding::default();
    let nothing = end(&mut encoding);
    let mut ends = Vec::new();
    for compress in [None, Some(false), Some(true)] {
        assert_eq!(message(&encoding.mark(AT, StateMark::Begin, HistoryEpoch(1))).0, 2);
        match compress {
            None => {
                for item in &items {
                    let frame = encoding.entry(&entry(EntryContent::Event(item), true));
                    assert_eq!(message(&frame).0, 3);
                }
            }
            Some(compress) => {
                let batch = EntryBatch { entries: all.clone(), count: 100, is_state: true, compress };
                let frame = encoding.batch(batch)();
                let (kind, rest) = message(&frame);
                assert_eq!((kind, u32::from(compress).to_le_bytes()), (3, *rest.first_chunk().unwrap()));
                assert_eq!(frame.len() < all.len(), compress);
            }
        }
        // What happens meanwhile is none of it.
        encoding.entry(&entry(EntryContent::Event(&items[0]), false));
        ends.push(end(&mut encoding));
    }
    let sum =
        [&AT.seq.to_le_bytes()[..], &100u64.to_le_bytes(), &crc32fast::hash(&all).to_le_bytes()].concat();
    for end in &ends {
        assert_eq!(message(end), (4, &sum[..]));
    }
    assert_ne!(nothing, ends[0]);
    assert_eq!(end(&mut encoding), nothing, "it begins anew");
}
