//! Snapshots from the leader, piece by piece.
//!
//! A snapshot is read to its end, by the machine as well, before the core hears of it: one that this node cannot read is
//! refused and changes nothing. What has arrived outlives its connection: the leader asks how much that is, and sends the rest.

use std::any::Any;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse};
use openraft::storage::Snapshot;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::PeerService;
use super::append::DISK_FULL;
use super::refusals::Unanswered;
use crate::machine::StateMachine;
use crate::proto::peer::{self as proto, Response, SnapshotPiece, response};
use crate::raft::clock::LARGEST_TIME_MS;
use crate::raft::network::plausible;
use crate::raft::network::wire::{self, Malformed};
use crate::raft::snapshot::{self, SnapshotData};
use crate::raft::type_config::{self, Vote};
use crate::runtime::{self, offload};
use crate::storage::{FilePiece, READS_ZSTD, ReceivedSnapshot, SnapshotMeta, SnapshotReceiver};
use crate::types::{ClusterClock, LogId, NodeId, check_agreed};

/// How often a caller is told that its snapshot is still being installed.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// How long a snapshot that could not be read is refused at its first piece.
const UNREADABLE_FOR: Duration = Duration::from_secs(30);
/// How long what has arrived is kept for a connection that goes on with it. It takes room on the disk.
const KEEP_INTERRUPTED: Duration = Duration::from_mins(10);

/// A snapshot that was received in vain.
#[derive(Debug, Clone)]
pub(super) struct Unreadable {
    log_id: LogId,
    at: Instant,
    reason: String,
}

/// A snapshot of which some pieces have arrived.
struct IncomingSnapshot {
    log_id: LogId,
    receiver: SnapshotReceiver,
    /// The connection that it comes by.
    connection: u64,
}

/// The snapshot that this node receives, whichever connection it comes by: one that is made anew goes on where the one before was. Whoever
/// holds the lock writes a piece of it, or installs it, and others wait.
#[derive(Default)]
pub(super) struct IncomingSlot {
    snapshot: tokio::sync::Mutex<Option<IncomingSnapshot>>,
    connections: AtomicU64,
}

/// What one connection receives.
pub(super) struct Receiving {
    slot: Arc<IncomingSlot>,
    connection: u64,
    has_begun: bool,
}

impl Receiving {
    pub(super) fn new(slot: &Arc<IncomingSlot>) -> Self {
        let connection = slot.connections.fetch_add(1, Relaxed);
        Self { slot: slot.clone(), connection, has_begun: false }
    }

    /// Whether a piece that is not the first is waited for.
    pub(super) fn has_begun(&self) -> bool {
        self.has_begun
    }
}

impl Drop for Receiving {
    /// What has arrived takes room on the disk: it is kept for a while for the connection after this one.
    fn drop(&mut self) {
        if !self.has_begun {
            return;
        }
        let (slot, connection) = (Arc::downgrade(&self.slot), self.connection);
        runtime::spawn(async move {
            sleep(KEEP_INTERRUPTED).await;
            if let Some(slot) = slot.upgrade() {
                let outlived = slot.snapshot.lock().await.take_if(|held| held.connection == connection);
                // A file is removed.
                offload(move || drop(outlived)).await;
            }
        });
    }
}

/// A snapshot that has arrived and was read.
type ReadSnapshot = (ReceivedSnapshot, Box<dyn Any + Send>);

impl<M: StateMachine> PeerService<M> {
    /// Takes the next piece of a snapshot; installs it with the last one.
    pub(super) async fn take_piece(
        &self,
        from: NodeId,
        receiving: &mut Receiving,
        piece: SnapshotPiece,
    ) -> Result<proto::SnapshotResponse, Unanswered> {
        let vote = wire::from_leader(from, piece.vote)?;
        if self.deposed(vote).is_some() {
            // It is to hear of the newer term; its snapshot may contradict what has been committed since.
            return Ok(self.taken());
        }
        let last_log = piece.last_log.ok_or(Malformed("the snapshot's position is missing"))?;
        let log_id = LogId::new(last_log.term, last_log.index);
        self.bearings().snapshot(vote.leader_id.term, log_id)?;
        self.heard.now();
        let slot = receiving.slot.clone();
        let mut slot = slot.snapshot.lock().await;
        if !self.callee.disk.has_room() {
            // What has arrived is the first to go.
            let arrived = slot.take();
            offload(move || drop(arrived)).await;
            return Err(Unanswered::Failed(DISK_FULL.to_owned()));
        }
        receiving.has_begun = true;
        if piece.probe {
            return self.probed(vote, receiving.connection, &mut slot, log_id).await;
        }
        if piece.offset == 0 {
            self.check_readable(log_id)?;
            let receiver = self.snapshots.receive(log_id).map_err(Unanswered::failed)?;
            *slot = Some(IncomingSnapshot { log_id, receiver, connection: receiving.connection });
        }
        let current = slot.as_ref().filter(|current| current.connection == receiving.connection);
        let current = current.ok_or(Malformed("a piece of a snapshot whose beginning is missing"))?;
        let (have, offset) = (current.receiver.received_bytes(), piece.offset);
        if current.log_id != log_id || offset > have {
            return Err(Unanswered::Failed(format!(
                "a piece is missing: have {have} bytes, got offset {offset}"
            )));
        }
        if offset < have {
            // Delivered twice.
            return Ok(self.taken());
        }
        let SnapshotPiece { bytes, crc32, uncompressed_bytes, last, .. } = piece;
        let piece = FilePiece { offset, bytes, crc32, uncompressed_bytes, last };
        let bytes = offload(move || piece.content()).await.map_err(Unanswered::failed)?;
        let mut current = slot.take().expect("invariant: it was there before");
        let outdated = self.callee.outdated.clone();
        let written = offload(move || {
            current.receiver.write(offset, &bytes).map_err(Unanswered::failed)?;
            // The rest need not be sent if this build does not read it.
            if let Some(meta) = current.receiver.head().filter(|_| offset == 0) {
                check_versions::<M>(&meta, &*outdated)?;
            }
            Ok::<_, Unanswered>(current)
        });
        let current = written.await?;
        if !last {
            *slot = Some(current);
            return Ok(self.taken());
        }
        self.install(vote, current).await
    }

    /// Says how much of the snapshot at `log_id` is here. Another one is of no use any more.
    async fn probed(
        &self,
        vote: Vote,
        connection: u64,
        slot: &mut Option<IncomingSnapshot>,
        log_id: LogId,
    ) -> Result<proto::SnapshotResponse, Unanswered> {
        self.check_readable(log_id)?;
        if self.has_in_place(log_id).await? {
            // To say so counts as an acknowledgement, as after an installation.
            if let Some(higher) = self.heed(vote, log_id).await? {
                return Ok(self.answered_by(&higher));
            }
            let held = proto::HeldPieces { installed: true, ..proto::HeldPieces::default() };
            return Ok(proto::SnapshotResponse { held: Some(held), ..self.taken() });
        }
        if slot.as_ref().is_some_and(|held| held.log_id != log_id) {
            let useless = slot.take();
            offload(move || drop(useless)).await;
        }
        let received = slot.as_mut().map(|held| {
            held.connection = connection;
            &held.receiver
        });
        let held = proto::HeldPieces {
            bytes: received.map_or(0, |receiver| receiver.received_bytes()),
            crc32: received.map_or(0, |receiver| receiver.crc32()),
            installed: false,
            zstd: READS_ZSTD,
        };
        Ok(proto::SnapshotResponse { held: Some(held), ..self.taken() })
    }

    /// Whether the state is that of a snapshot at `log_id`, or a later one, which is in its place on the disk: the answer to its last
    /// piece was lost.
    async fn has_in_place(&self, log_id: LogId) -> Result<bool, Unanswered> {
        if self.bearings().committed.is_none_or(|committed| committed < log_id) {
            return Ok(false);
        }
        let snapshots = self.snapshots.clone();
        let newest = offload(move || snapshots.newest()).await.map_err(Unanswered::failed)?;
        Ok(newest.is_some_and(|newest| newest.meta().log_id >= log_id))
    }

    fn taken(&self) -> proto::SnapshotResponse {
        self.answered_by(&self.vote())
    }

    fn answered_by(&self, vote: &Vote) -> proto::SnapshotResponse {
        proto::SnapshotResponse {
            vote: Some(wire::vote(vote)),
            lease_ms: self.lease_ms(),
            ..proto::SnapshotResponse::default()
        }
    }

    /// Accepts the leader that has a snapshot at `log_id`. The vote of a newer one, if there is.
    async fn heed(&self, vote: Vote, log_id: LogId) -> Result<Option<Vote>, Unanswered> {
        self.statements.note(vote, Some(log_id), Some(log_id))?;
        let here = AppendEntriesRequest { vote, prev_log_id: None, entries: Vec::new(), leader_commit: None };
        match self.raft.append_entries(here).await.map_err(Unanswered::failed)? {
            AppendEntriesResponse::HigherVote(higher) => Ok(Some(higher)),
            AppendEntriesResponse::Success
            | AppendEntriesResponse::PartialSuccess(_)
            | AppendEntriesResponse::Conflict => Ok(None),
        }
    }

    async fn install(
        &self,
        vote: Vote,
        complete: IncomingSnapshot,
    ) -> Result<proto::SnapshotResponse, Unanswered> {
        let log_id = complete.log_id;
        let outdated = self.callee.outdated.clone();
        let read = offload(move || read::<M>(complete.receiver, &*outdated)).await;
        let (received, content) = read.inspect_err(|reason| self.note_unreadable(log_id, reason))?;
        let meta = snapshot::meta(received.meta());
        // From here on no other leader commits anything that the snapshot might contradict: the core asserts that it does
        // not.
        if let Some(higher) = self.heed(vote, log_id).await? {
            return Ok(self.answered_by(&higher));
        }
        let committed = self
            .raft
            .with_raft_state(|state| state.local_committed().map(type_config::from_log_id))
            .await
            .map_err(Unanswered::failed)?;
        plausible::Bearings { committed, ..self.bearings() }.snapshot(vote.leader_id.term, log_id)?;
        let snapshot = Snapshot { meta, snapshot: SnapshotData::Received(received, content) };
        // Before the core may count on it.
        self.activity.leader_clock.snapshot_received();
        let response = self.raft.install_full_snapshot(vote, snapshot).await.map_err(Unanswered::failed)?;
        Ok(self.answered_by(&response.vote))
    }

    /// Refuses a snapshot that could not be read a short while ago.
    fn check_readable(&self, log_id: LogId) -> Result<(), Unanswered> {
        let unreadable = self.unreadable.lock().expect("invariant: no panic under this lock");
        match &*unreadable {
            Some(before) if before.log_id == log_id && before.at.elapsed() < UNREADABLE_FOR => {
                Err(Unanswered::Failed(before.reason.clone()))
            }
            _ => Ok(()),
        }
    }

    fn note_unreadable(&self, log_id: LogId, refused: &Unanswered) {
        let (at, reason) = (Instant::now(), refused.to_string());
        tracing::error!(%log_id, reason, "the leader's snapshot cannot be used by this node");
        let mut unreadable = self.unreadable.lock().expect("invariant: no panic under this lock");
        *unreadable = Some(Unreadable { log_id, at, reason });
    }
}

/// What a snapshot that has arrived holds. One of a machine that this build does not read is refused. If its cluster has agreed on that
/// version, this node cannot go on; until then, it waits to be upgraded with the others.
fn read<M: StateMachine>(
    receiver: SnapshotReceiver,
    outdated: &dyn Fn(String),
) -> Result<ReadSnapshot, Unanswered> {
    let received = receiver.finish().map_err(Unanswered::failed)?;
    check(received.meta())?;
    check_versions::<M>(received.meta(), outdated)?;
    let content = snapshot::catch("reading a snapshot", || {
        snapshot::read::<M>(received.handle()).map_err(io::Error::other)
    });
    Ok((received, Box::new(content.map_err(Unanswered::failed)?)))
}

/// Refuses a snapshot that this build does not read, and ends the node if the cluster has agreed on what follows.
fn check_versions<M: StateMachine>(
    SnapshotMeta { log_id, machines, .. }: &SnapshotMeta,
    outdated: &dyn Fn(String),
) -> Result<(), Unanswered> {
    let agreed = machines.agreed.iter().try_for_each(|agreed| check_agreed(*agreed, M::MACHINES));
    if let Err(unsupported) = agreed {
        outdated(format!("entries up to {log_id}: {unsupported}"));
        return Err(Unanswered::failed(unsupported));
    }
    machines.check(M::MACHINES).map_err(Unanswered::failed)
}

/// Refuses a snapshot that says impossible things of itself. They would be believed at every start.
fn check(meta: &SnapshotMeta) -> Result<(), Malformed> {
    plausible::membership(&meta.membership)?;
    let membership_at =
        meta.membership_log_id.ok_or(Malformed("the snapshot's membership stands nowhere"))?;
    if membership_at.index > meta.log_id.index || membership_at.term > meta.log_id.term {
        return Err(Malformed("the snapshot's membership is newer than the snapshot"));
    }
    let ClusterClock { elapsed_ms, wall_offset_ms, term, counted_ms } = meta.clock;
    let times = [elapsed_ms, wall_offset_ms.unsigned_abs(), counted_ms.unwrap_or(0)];
    // A cluster whose first leader's clock showed the last of times has gone on since.
    match times.iter().all(|ms| *ms <= 2 * LARGEST_TIME_MS) && term <= meta.log_id.term {
        true => Ok(()),
        false => Err(Malformed("the snapshot's clocks are beyond the year 9999, or of a later term")),
    }
}

/// Waits for `work`, and lets the caller of request `id` know every now and then that it goes on.
pub(super) async fn signs_of_life<T>(
    id: u64,
    responses: &mpsc::Sender<Response>,
    vote: Vote,
    work: impl Future<Output = T>,
) -> T {
    tokio::pin!(work);
    loop {
        if let Ok(done) = tokio::time::timeout(SIGN_OF_LIFE, &mut work).await {
            return done;
        }
        let alive = proto::SnapshotResponse {
            vote: Some(wire::vote(&vote)),
            installing: true,
            ..proto::SnapshotResponse::default()
        };
        // A caller that is gone does not stop the installation.
        let _ = responses.try_send(Response { id, body: Some(response::Body::Snapshot(alive)) });
    }
}
