//! What the log's files may hold, from any bytes: see [`crate::fuzzing`].

use super::hard_state::HardState;
use super::record::{self, Body, Key, Record};

/// A record of the log. Its checksum is mended first, or nearly everything would end there.
pub(crate) fn log_record(bytes: &[u8]) {
    let Some((key, stored)) = bytes.split_first_chunk::<{ Key::BYTES }>() else { return };
    let key = Key::decode(key).expect("invariant: so long is a key");
    let mut stored = stored.to_vec();
    record::mend(&mut stored);
    match Record::decode(key, &stored) {
        Ok(Record { body: Body::Packed(entries), .. }) => {
            assert!(!entries.is_empty());
            assert_eq!(entries[0].log_id.index, key.index);
        }
        Ok(Record { body: Body::Part { parts, bytes }, .. }) => {
            assert!(key.part < parts && bytes.len() <= stored.len());
        }
        Err(_) => {}
    }
    let _ = record::decode_joined(key.index, &stored);
}

/// Vote, purged and last position.
pub(crate) fn hard_state(bytes: &[u8]) {
    if let Ok(state) = HardState::decode(bytes) {
        assert_eq!(HardState::decode(&state.encode()).expect("invariant: what was encoded decodes"), state);
    }
}
