//! What the log and a snapshot may hold, from any bytes: see [`crate::fuzzing`].

use super::{envelope, snapshot};
use crate::machine::StateMachine;
use crate::storage::fuzzed::snapshot_file;
use crate::storage::{MemorySnapshots, SnapshotStore};
use crate::types::LogId;

/// What an entry of the log carries. What the check before the log lets in can be opened when it is applied.
pub(crate) fn envelope<M: StateMachine>(bytes: &[u8]) {
    let checked = envelope::check::<M>(bytes);
    let opened = envelope::open::<M>(bytes);
    assert!(
        checked.is_err() || opened.is_ok(),
        "it passes the check and cannot be applied: {:?}",
        opened.err()
    );
}

/// The file of a snapshot, as it comes from a peer. Its checksums are made to match.
pub(crate) fn snapshot<M: StateMachine>(bytes: &[u8]) {
    let store = MemorySnapshots::new();
    let file = snapshot_file(bytes);
    let Ok(mut receiver) = store.receive(LogId::new(1, 1)) else { return };
    if receiver.write(0, &file).is_err() {
        return;
    }
    let Ok(received) = receiver.finish() else { return };
    if let Ok(handle) = received.place() {
        let _ = snapshot::read::<M>(&handle);
    }
}
