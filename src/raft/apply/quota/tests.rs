//! What the quota on the state does to entries, sessions and snapshots, and how much is in memory on the way.

use futures::FutureExt as _;
use openraft::storage::RaftSnapshotBuilder as _;

use super::super::state_machine::{PUBLISH_ENTRIES, next_batch};
use super::super::*;
use crate::kv::machine::{KvCommand, KvMachine, KvReply};
use crate::raft::clock::Reading;
use crate::raft::envelope::QuotaChange;
use crate::raft::type_config::NotApplied;
use crate::storage::{LogStore as _, MemoryDisk, MemorySnapshots, MemoryStore, SyncMode};
use crate::types::{QuotaSource, SessionSlot};

/// All entries are of one moment.
const NOW: Reading = Reading { wall_ms: 0, term: 1, counted_ms: 0 };

type Node = Applier<KvMachine>;

fn node() -> Node {
    Applier::recover(1, KvMachine::default(), Arc::new(MemorySnapshots::default()), None).unwrap()
}

fn entry(index: u64, envelope: Bytes) -> Entry {
    let payload = types::Payload::Command(envelope);
    type_config::entry(types::Entry { log_id: types::LogId::new(1, index), payload }).unwrap()
}

fn put(key: &str, value_bytes: usize) -> KvCommand {
    let (tenant, collection) = ("t".to_owned(), "c".to_owned());
    KvCommand::Put { tenant, collection, key: key.to_owned().into(), value: vec![7; value_bytes].into() }
}

fn delete(key: &str) -> KvCommand {
    KvCommand::Delete { tenant: "t".to_owned(), collection: "c".to_owned(), key: key.to_owned().into() }
}

fn seal(command: &KvCommand, slot: Option<SessionSlot>) -> Bytes {
    envelope::seal::<KvMachine>(NOW, command, slot).unwrap()
}

fn quota(change: QuotaChange) -> Bytes {
    envelope::seal_quota(NOW, change)
}

/// What a put of such a key and value adds to the state.
fn item_bytes(value_bytes: usize) -> u64 {
    ("t\0c\0k".len() + 32 + value_bytes + 128) as u64
}

/// Applies envelopes one after the other, to a node and to another one that is given all at once.
struct Both {
    one: Node,
    entries: Vec<Bytes>,
}

impl Both {
    fn new() -> Self {
        Self { one: node(), entries: Vec::new() }
    }

    fn apply(&mut self, envelope: Bytes) -> Result<Bytes, NotApplied> {
        self.entries.push(envelope.clone());
        let answer = self.one.apply_entry(entry(self.entries.len() as u64, envelope)).unwrap();
        self.one.publish_if_wanted();
        answer.reply
    }

    fn apply_command(&mut self, command: &KvCommand) -> Result<KvReply, NotApplied> {
        self.apply(seal(command, None)).map(|reply| machine::decode(&reply).unwrap())
    }

    fn state_bytes(&self) -> u64 {
        self.one.progress.state_bytes.unwrap()
    }

    /// That a node that applies the same entries in one batch is in the same state.
    fn assert_same_on_another(&self) {
        let mut other = node();
        let mut batch =
            (1..).zip(self.entries.clone()).map(|(index, envelope)| Ok((entry(index, envelope), None)));
        while !other.apply_batch(&mut batch).unwrap().is_empty() {}
        assert_eq!(other.progress.state_hash, self.one.progress.state_hash);
        assert_eq!(other.progress.state_bytes, self.one.progress.state_bytes);
        assert_eq!(other.progress.quota, self.one.progress.quota);
        assert_eq!(other.sessions, self.one.sessions);
    }
}

#[test]
fn a_full_state_takes_what_does_not_make_it_larger() {
    let mut nodes = Both::new();
    nodes.apply(quota(QuotaChange::Set(item_bytes(100) + item_bytes(50)))).unwrap();
    nodes.apply_command(&put("a", 100)).unwrap();
    assert_eq!(nodes.state_bytes(), item_bytes(100));
    nodes.apply_command(&put("b", 50)).unwrap();
    let full = nodes.state_bytes();
    let refused = Err(NotApplied::QuotaExceeded { state_bytes: full, quota_bytes: full });
    assert_eq!(nodes.apply_command(&put("c", 0)), refused);
    assert_eq!(nodes.apply_command(&put("b", 51)), refused, "it would become larger");
    assert_eq!(nodes.one.activity.quota_refusals.load(Relaxed), 2);
    let KvReply::Put { version, .. } = nodes.apply_command(&put("b", 50)).unwrap() else { panic!() };
    assert_eq!(version, 2, "the refused write is no version");
    nodes.apply_command(&delete("a")).unwrap();
    nodes.apply_command(&put("c", 100)).unwrap();
    assert_eq!(nodes.apply_command(&put("d", 0)), refused);
    nodes.assert_same_on_another();
}

#[test]
fn a_quota_below_the_state_lets_it_shrink_and_not_grow() {
    let mut nodes = Both::new();
    nodes.apply_command(&put("a", 1000)).unwrap();
    nodes.apply_command(&put("b", 1000)).unwrap();
    nodes.apply(quota(QuotaChange::Set(10))).unwrap();
    assert!(nodes.apply_command(&put("a", 1001)).is_err());
    nodes.apply_command(&put("a", 999)).unwrap();
    nodes.apply_command(&delete("b")).unwrap();
    assert!(nodes.apply_command(&put("b", 0)).is_err());
    nodes.assert_same_on_another();
}

#[test]
fn a_refused_write_of_a_session_can_be_repeated_and_is_applied_once() {
    let mut nodes = Both::new();
    let slot = |sequence| Some(SessionSlot { session: 5, sequence, first_unanswered: 1 });
    nodes.apply(quota(QuotaChange::Set(item_bytes(10)))).unwrap();
    nodes.apply(envelope::seal_open_session(NOW, 5, 0, "")).unwrap();
    let first = nodes.apply(seal(&put("a", 10), slot(1))).unwrap();
    assert!(matches!(nodes.apply(seal(&put("b", 10), slot(2))), Err(NotApplied::QuotaExceeded { .. })));
    // The answer to what was applied comes again, although it would not fit.
    assert_eq!(nodes.apply(seal(&put("a", 10), slot(1))).unwrap(), first);
    nodes.apply(seal(&delete("a"), slot(3))).unwrap();
    let second = nodes.apply(seal(&put("b", 10), slot(2))).unwrap();
    nodes.apply_command(&delete("b")).unwrap();
    assert_eq!(nodes.apply(seal(&put("b", 10), slot(2))).unwrap(), second);
    assert_eq!(nodes.state_bytes(), 0, "the repetition was not applied");
    nodes.assert_same_on_another();
}

#[test]
fn the_leaders_quota_gives_way_to_an_operators() {
    let mut nodes = Both::new();
    let quota_of = |nodes: &Both| nodes.one.progress.quota.map(|quota| (quota.bytes, quota.source));
    assert_eq!(quota_of(&nodes), None);
    nodes.apply(quota(QuotaChange::Release)).unwrap();
    assert_eq!(quota_of(&nodes), None);
    nodes.apply(quota(QuotaChange::Follow(70))).unwrap();
    assert_eq!(quota_of(&nodes), Some((70, QuotaSource::Memory)));
    nodes.apply(quota(QuotaChange::Set(50))).unwrap();
    nodes.apply(quota(QuotaChange::Follow(90))).unwrap();
    assert_eq!(quota_of(&nodes), Some((50, QuotaSource::Operator)));
    nodes.apply(quota(QuotaChange::Release)).unwrap();
    assert_eq!(quota_of(&nodes), Some((50, QuotaSource::Memory)), "until the leader says more");
    nodes.apply(quota(QuotaChange::Follow(90))).unwrap();
    assert_eq!(quota_of(&nodes), Some((90, QuotaSource::Memory)));
    nodes.assert_same_on_another();
}

#[tokio::test]
async fn a_snapshot_carries_the_quota_and_the_size() {
    for change in [QuotaChange::Set(5000), QuotaChange::Follow(6000)] {
        let mut nodes = Both::new();
        nodes.apply(quota(change)).unwrap();
        nodes.apply_command(&put("a", 3000)).unwrap();
        let mut builder = nodes.one.snapshot_builder();
        builder.build_snapshot().await.unwrap();
        let mut restored =
            Applier::recover(1, KvMachine::default(), nodes.one.snapshots.clone(), None).unwrap();
        assert_eq!(restored.progress.quota, nodes.one.progress.quota);
        assert_eq!(restored.progress.state_bytes, Some(item_bytes(3000)));
        let index = nodes.entries.len() as u64 + 1;
        let refused = restored.apply_entry(entry(index, seal(&put("b", 3000), None))).unwrap();
        assert_eq!(refused.reply, nodes.apply(seal(&put("b", 3000), None)));
        assert!(refused.reply.is_err());
    }
}

#[tokio::test]
async fn entries_wait_for_a_snapshot_that_falls_behind() {
    let mut node = node();
    node.bound_snapshot_lag(1000);
    node.apply_entry(entry(1, seal(&put("a", 1), None))).unwrap();
    let builder = node.snapshot_builder();
    node.apply_entry(entry(2, seal(&put("a", 100), None))).unwrap();
    node.wait_for_snapshot().now_or_never().expect("little has been applied since");
    node.apply_entry(entry(3, seal(&put("b", 1000), None))).unwrap();
    assert!(node.wait_for_snapshot().now_or_never().is_none(), "what it replaced must not pile up");
    drop(builder);
    node.wait_for_snapshot().now_or_never().expect("the snapshot is written");
    assert!(node.writing.is_none());
}

#[tokio::test]
async fn a_batch_has_few_bytes_however_many_entries_wait() {
    const MIB: usize = 1024 * 1024;
    let envelope = seal(&put("a", MIB - 200), None);
    let waiting = (1..=100).map(|index| Ok((entry(index, envelope.clone()), None)));
    let mut waiting = futures::stream::iter(waiting);
    let mut sizes = Vec::new();
    loop {
        let batch = next_batch(&mut waiting).await;
        if batch.is_empty() {
            break;
        }
        sizes.push(batch.len());
    }
    assert_eq!(sizes.iter().sum::<usize>(), 100);
    assert!(sizes.iter().all(|entries| *entries <= BATCH_BYTES / MIB + 1), "{sizes:?}");
    let small =
        (1..=2 * PUBLISH_ENTRIES as u64).map(|index| Ok((entry(index, seal(&put("a", 1), None)), None)));
    assert_eq!(next_batch(&mut futures::stream::iter(small)).await.len(), PUBLISH_ENTRIES);
}

#[test]
fn the_log_is_replayed_up_to_what_is_committed() {
    let disk = MemoryDisk::new(SyncMode::Immediate);
    let log = MemoryStore::open(&disk);
    let entries = (0..20).map(|index| types::Entry {
        log_id: types::LogId::new(1, index),
        payload: types::Payload::Command(seal(&put(&format!("k{index}"), BATCH_BYTES / 4), None)),
    });
    log.append(entries.collect(), Box::new(|result| result.unwrap()));
    let mut node = node();
    node.replay(&log).unwrap();
    assert_eq!(node.progress.log_id, None, "nothing is known to be committed");
    log.save_committed(Some(types::LogId::new(1, 17)));
    node.replay(&log).unwrap();
    assert_eq!(node.progress.log_id, Some(types::LogId::new(1, 17)));
    assert_eq!(node.published().progress().state_bytes, node.machine.state_bytes());
    node.replay(&log).unwrap();
    assert_eq!(node.activity.applied_entries.load(Relaxed), 18, "each is applied once");
    log.save_committed(Some(types::LogId::new(2, 18)));
    let error = node.replay(&log).unwrap_err();
    assert!(error.to_string().contains("the log holds"), "{error}");
}
