//! What a node's own files may hold, from any bytes: see [`crate::fuzzing`].

use std::path::{Path, PathBuf};

use super::identity;
use super::segments::{SegmentLog, SegmentOptions};
#[cfg(feature = "sled")]
pub(crate) use super::sled::fuzzed::{hard_state, log_record};

/// `identity.json`.
pub(crate) fn identity(bytes: &[u8]) {
    let _ = identity::parse(Path::new("identity.json"), bytes);
}

/// A directory whose only segment is `bytes`. What is opened can be written to, and is the same when it is opened again.
pub(crate) fn segments(bytes: &[u8]) {
    let dir = scratch("segments");
    let first = bytes.first_chunk().map_or(1, |first| u64::from_le_bytes(*first) >> 1);
    std::fs::write(super::segments::path_of(&dir, first), bytes.get(8..).unwrap_or_default())
        .expect("invariant: there is room for it");
    let Ok((mut log, _)) = SegmentLog::open(&dir, SegmentOptions::default()) else { return };
    let reach = log.reach();
    let read = log.reader().read(0, usize::MAX).unwrap_or_default();
    let Some(next) = read.last().map_or(Some(first), |record| record.key.checked_add(1)) else { return };
    let appended = log.append(next, 1, 0, b"more").and_then(|()| log.sync());
    drop(log);
    let (log, cut) =
        SegmentLog::open(&dir, SegmentOptions::default()).expect("invariant: it was opened before");
    assert!(cut.is_none(), "what was opened and synced needs no other cut: {cut:?}, {reach:?}");
    if appended.is_ok() {
        let again = log.reader().read(0, usize::MAX).expect("invariant: it was read before");
        assert_eq!(again.len(), read.len() + 1);
    }
}

/// An empty directory of this process's own.
fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("quorate-fuzz-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("invariant: temporary files can be made");
    dir
}

/// The file of a snapshot: its version, the length of its meta data in two bytes, meta data, payload.
pub(crate) fn snapshot_file(bytes: &[u8]) -> Vec<u8> {
    let Some(([version, length @ ..], rest)) = bytes.split_first_chunk::<3>() else { return bytes.to_vec() };
    let (meta, payload) = rest.split_at(rest.len().min(u16::from_le_bytes(*length).into()));
    super::snapshots::sealed(u32::from(version % 6), meta, payload)
}
