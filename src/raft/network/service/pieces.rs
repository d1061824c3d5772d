//! Snapshots from the leader, piece by piece.
//!
//! A snapshot is read to its end, by the machine as well, before the core hears of it: one that this node cannot read is
//! refused and changes nothing. What has arrived outlives its connection: the leader asks how much that is, and sends the rest.

use std::any::Any;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
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
pub(super) struct IncomingSnapshot {
    log_id: LogId,
    receiver: SnapshotReceiver,
}

/// What has arrived of a snapshot over a connection that is gone: the next one goes on with it. One per node, and not for ever.
#[derive(Default)]
pub(super) struct InterruptedSnapshot(Mutex<Option<(IncomingSnapshot, Instant)>>);

impl InterruptedSnapshot {
    fn put(this: &Arc<Self>, snapshot: IncomingSnapshot) {
        let since = Instant::now();
        *this.held() = Some((snapshot, since));
        let held = Arc::downgrade(this);
        runtime::spawn(async move {
            sleep(KEEP_INTERRUPTED).await;
            if let Some(held) = held.upgrade() {
                // Outside of the lock: a file is removed.
                let _outlived = held.held().take_if(|(_, put)| *put == since);
            }
        });
    }

    /// What there is of the snapshot at `log_id`. Another one is of no use any more.
    fn take(&self, log_id: LogId) -> Option<IncomingSnapshot> {
        let taken = self.held().take();
        taken.map(|(snapshot, _)| snapshot).filter(|snapshot| snapshot.log_id == log_id)
    }

    fn held(&self) -> MutexGuard<'_, Option<(IncomingSnapshot, Instant)>> {
        self.0.lock().expect("invariant: no panic under this lock")
    }
}

/// What one connection receives.
pub(super) struct Receiving {
    current: Option<IncomingSnapshot>,
    interrupted: Arc<InterruptedSnapshot>,
}

impl Receiving {
    pub(super) fn new(interrupted: &Arc<InterruptedSnapshot>) -> Self {
        Self { current: None, interrupted: interrupted.clone() }
    }

    /// Whether a piece that is not the first is waited for.
    pub(super) fn has_begun(&self) -> bool {
        self.current.is_some()
    }

    /// The pieces that are on their way are of no use: whoever sends asks first how much is here.
    pub(super) fn interrupt(&mut self) {
        if let Some(current) = self.current.take()
            && current.receiver.received_bytes() > 0
        {
            InterruptedSnapshot::put(&self.interrupted, current);
        }
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.interrupt();
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
        if !self.callee.disk.has_room() {
            return Err(Unanswered::Failed(DISK_FULL.to_owned()));
        }
        if piece.probe {
            return self.probed(receiving, log_id).await;
        }
        if piece.offset == 0 {
            self.check_readable(log_id)?;
            let receiver = self.snapshots.receive(log_id).map_err(Unanswered::failed)?;
            receiving.current = Some(IncomingSnapshot { log_id, receiver });
        }
        let current = receiving.current.as_ref();
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
        let mut current = receiving.current.take().expect("invariant: it was there before");
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
            receiving.current = Some(current);
            return Ok(self.taken());
        }
        self.install(vote, current).await
    }

    /// Says how much of the snapshot at `log_id` is here.
    async fn probed(
        &self,
        receiving: &mut Receiving,
        log_id: LogId,
    ) -> Result<proto::SnapshotResponse, Unanswered> {
        self.check_readable(log_id)?;
        if self.has_in_place(log_id).await? {
            let held = proto::HeldPieces { installed: true, ..proto::HeldPieces::default() };
            return Ok(proto::SnapshotResponse { held: Some(held), ..self.taken() });
        }
        receiving.interrupt();
        receiving.current = receiving.interrupted.take(log_id);
        let received = receiving.current.as_ref().map(|current| &current.receiver);
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
        proto::SnapshotResponse {
            vote: Some(wire::vote(&self.vote())),
            lease_ms: self.lease_ms(),
            ..proto::SnapshotResponse::default()
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
        let _one_at_a_time = self.installing.lock().await;
        let answer = |vote: &Vote| proto::SnapshotResponse {
            vote: Some(wire::vote(vote)),
            lease_ms: self.lease_ms(),
            ..proto::SnapshotResponse::default()
        };
        // From here on no other leader commits anything that the snapshot might contradict: the core asserts that it does
        // not.
        self.statements.note(vote, Some(log_id), Some(log_id))?;
        let here = AppendEntriesRequest { vote, prev_log_id: None, entries: Vec::new(), leader_commit: None };
        match self.raft.append_entries(here).await.map_err(Unanswered::failed)? {
            AppendEntriesResponse::HigherVote(higher) => return Ok(answer(&higher)),
            AppendEntriesResponse::Success
            | AppendEntriesResponse::PartialSuccess(_)
            | AppendEntriesResponse::Conflict => {}
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
        Ok(answer(&response.vote))
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
