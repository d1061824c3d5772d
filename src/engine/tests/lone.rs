//! A node in memory that reaches nobody, for tests.

use std::sync::Arc;

use crate::engine::{Engine, EngineConfig, EngineParts};
use crate::kv::machine::KvMachine;
use crate::machine::StateMachine;
use crate::raft::network::Transport;
use crate::raft::network::nowhere::Nowhere;
use crate::storage::{MemoryDisk, MemorySnapshots, MemoryStore, SyncMode};
use crate::types::Incarnation;

/// Node 1 of a cluster of its own, or of none while it `joins`.
pub(in crate::engine) async fn engine(joins: bool) -> Engine<KvMachine> {
    engine_of(joins, KvMachine::default()).await
}

/// The same, with another machine.
pub(in crate::engine) async fn engine_of<M: StateMachine>(joins: bool, machine: M) -> Engine<M> {
    started(joins, machine, None, Arc::new(Nowhere::default())).await
}

/// One that does not join, among those whom `transport` reaches.
pub(in crate::engine) async fn engine_among<M: StateMachine>(
    machine: M,
    transport: Arc<dyn Transport>,
) -> Engine<M> {
    started(false, machine, None, transport).await
}

/// One that does not join, in so much memory.
pub(in crate::engine) async fn engine_with<M: StateMachine>(
    machine: M,
    memory_bytes: Option<u64>,
) -> Engine<M> {
    started(false, machine, memory_bytes, Arc::new(Nowhere::default())).await
}

async fn started<M: StateMachine>(
    joins: bool,
    machine: M,
    memory_bytes: Option<u64>,
    transport: Arc<dyn Transport>,
) -> Engine<M> {
    let disk = MemoryDisk::new(SyncMode::Immediate);
    let mut config = EngineConfig::new(1, "", "nowhere:1");
    config.join = joins;
    if joins {
        config.initial_members.clear();
    }
    let parts = EngineParts {
        config,
        incarnation: Incarnation(1),
        log: Arc::new(MemoryStore::open(&disk)),
        snapshots: Arc::new(MemorySnapshots::new()),
        transport,
        promised_lease_ms: 0,
        memory_bytes,
        event_log: None,
    };
    Engine::start(parts, machine).await.expect("a node in memory can be started")
}
