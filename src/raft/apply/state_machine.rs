//! The applier as openraft sees it.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use futures::{FutureExt, Stream, StreamExt};
use openraft::OptionalSend;
use openraft::storage::{EntryResponder, RaftStateMachine, Snapshot};
use tokio::time::Instant;

use super::{Applier, BATCH_BYTES};
use crate::machine::StateMachine;
use crate::raft::snapshot::{self, SnapshotBuilder, SnapshotData, install};
use crate::raft::type_config::{
    self, CommittedLeaderId, Entry, LogId, Payload, SnapshotMeta, StoredMembership, TypeConfig,
};
use crate::runtime::whole_ms;
use crate::types::{Member, NodeId};

/// Most entries applied before readers and callers are told. After a restart the whole log may be waiting.
pub(super) const PUBLISH_ENTRIES: usize = 4096;

/// The entries of `entries` that are there, at least one unless it has ended. Not more than fit in memory: a node that
/// starts, or catches up, has all of its log there.
pub(super) async fn next_batch<S>(entries: &mut S) -> Vec<io::Result<EntryResponder<TypeConfig>>>
where
    S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin,
{
    let (mut batch, mut bytes) = (Vec::new(), 0);
    let mut next = entries.next().await;
    while let Some(item) = next {
        if let Ok((Entry { payload: Payload::Normal(command), .. }, _)) = &item {
            bytes += command.bytes.len();
        }
        batch.push(item);
        if batch.len() >= PUBLISH_ENTRIES || bytes >= BATCH_BYTES {
            break;
        }
        next = entries.next().now_or_never().flatten();
    }
    batch
}

impl<M: StateMachine> RaftStateMachine<TypeConfig> for Applier<M> {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder<M>;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.progress.log_id.map(type_config::log_id), self.membership.clone()))
    }

    async fn apply<S>(&mut self, entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        let mut entries = entries.fuse();
        loop {
            self.wait_for_snapshot().await;
            let batch = next_batch(&mut entries).await;
            if batch.is_empty() {
                return Ok(());
            }
            let mut batch = batch.into_iter().peekable();
            while batch.peek().is_some() {
                let replies = snapshot::catch("applying a command", || self.apply_batch(&mut batch))?;
                assert!(
                    self.published.progress().log_id == self.progress.log_id,
                    "invariant: nothing is answered before it is published"
                );
                for (responder, reply) in replies {
                    responder.send(reply);
                }
                tokio::task::consume_budget().await;
            }
        }
    }

    /// A snapshot of nothing is refused, unless the core insists.
    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<SnapshotBuilder<M>> {
        if self.progress.log_id.is_none() && !force {
            return None;
        }
        Some(self.snapshot_builder())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder<M> {
        self.snapshot_builder()
    }

    async fn install_snapshot(&mut self, _meta: &SnapshotMeta, snapshot: SnapshotData) -> io::Result<()> {
        let begun = Instant::now();
        let (content, handle) = install::<M>(snapshot, self.snapshots.clone()).await?;
        let (upto, bytes, took) = (handle.meta().log_id, handle.len_bytes(), begun.elapsed());
        self.activity.snapshots_installed.add(bytes, took);
        self.activity.snapshot_bytes.store(bytes, Relaxed);
        tracing::info!(%upto, bytes, took_ms = whole_ms(took), "installed the leader's snapshot");
        self.replace(content, handle.meta());
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> io::Result<Option<Snapshot<CommittedLeaderId, NodeId, Member, SnapshotData>>> {
        let newest = self.snapshots.newest().map_err(io::Error::other)?;
        Ok(newest.map(|handle| Snapshot {
            meta: snapshot::meta(handle.meta()),
            snapshot: SnapshotData::Placed(handle),
        }))
    }
}
