//! A node from its beginning: what is in its data directory (`directory`) or what it is given ([`EngineParts`]) is assembled
//! (`assemble`) while it tells how far it is (`progress`); `backup` reads a state for a new cluster.

mod assemble;
mod backup;
#[cfg(all(feature = "sled", feature = "peers"))]
mod directory;
mod progress;

use std::sync::Arc;

use crate::engine::EngineConfig;
use crate::feed::EventLog;
use crate::raft::network::Transport;
use crate::storage::{LogStore, SnapshotStore};
use crate::types::Incarnation;

/// What a node is made of, for those who bring their own: simulation, and tests.
#[non_exhaustive]
pub struct EngineParts {
    /// Settings; the data directory and addresses to listen on are not used.
    pub config: EngineConfig,
    /// Identity of what the parts hold.
    pub incarnation: Incarnation,
    /// The durable log.
    pub log: Arc<dyn LogStore>,
    /// The snapshots.
    pub snapshots: Arc<dyn SnapshotStore>,
    /// How peers are reached.
    pub transport: Arc<dyn Transport>,
    /// The longest lease, in milliseconds, that whoever used these parts before may have promised; 0 if it was the same.
    pub promised_lease_ms: u64,
    /// Memory that the node may use, in bytes; `None` for a node that proposes no quota on the state.
    pub memory_bytes: Option<u64>,
    /// Where what was applied is kept for those who follow it from further back than memory reaches; `None` for nowhere.
    pub event_log: Option<Arc<EventLog>>,
}

impl EngineParts {
    /// Parts that belong to `incarnation`: settings, a log, snapshots, and how peers are reached. Whoever used them before
    /// promised no lease, the node proposes no quota, and has no event log.
    pub fn new(
        config: EngineConfig,
        incarnation: Incarnation,
        log: Arc<dyn LogStore>,
        snapshots: Arc<dyn SnapshotStore>,
        transport: Arc<dyn Transport>,
    ) -> Self {
        Self {
            config,
            incarnation,
            log,
            snapshots,
            transport,
            promised_lease_ms: 0,
            memory_bytes: None,
            event_log: None,
        }
    }
}
