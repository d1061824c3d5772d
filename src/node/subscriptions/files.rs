//! The whole state as a file: snapshots for those that have the machine themselves.
//!
//! A snapshot that is sent is kept for a while, with what comes after it in the event log, whatever newer ones there are: a follower
//! whose connection broke goes on with it, and one that has all of it follows from there.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::registry::Subscribers;
use crate::door::bodies::{Built, room_to_build};
use crate::door::failure::{failure, invalid};
use crate::door::limits::DoorLimits;
use crate::door::streams::Outlet;
use crate::engine::{LeadError, LeadingSnapshot};
use crate::incoming::Caller;
use crate::node::operated::OperatedNode;
use crate::proto::replication::{Compression, SnapshotPiece, SnapshotRequest};
use crate::proto::v1::Failure;
use crate::reason::Reason;
use crate::runtime;
use crate::storage::{FilePiece, SnapshotPieces};
use crate::types::LogId;

/// Bytes of a file in one message.
const FILE_PIECE_BYTES: usize = 256 * 1024;
/// How long a snapshot is kept after a piece of it was sent last.
const KEPT_FOR: Duration = Duration::from_mins(5);
/// Snapshots that are kept; with one more the one that was asked for longest ago is let go of.
const MOST_KEPT: usize = 4;

/// What a follower asks for.
pub(super) struct WantedFile {
    held: Option<(LogId, u64, u32)>,
    compressed: bool,
    bytes_per_second: u64,
}

impl WantedFile {
    /// # Errors
    /// The failure to answer instead.
    pub(super) fn parse(request: SnapshotRequest) -> Result<Self, Failure> {
        let compressed = match request.compression() {
            Compression::Zstd => true,
            Compression::None if request.compression == 0 => false,
            Compression::None => {
                return Err(invalid("this node does not know that compression; it knows zstd"));
            }
        };
        let SnapshotRequest { seq, term, offset, crc32, bytes_per_second, .. } = request;
        let held = (offset > 0).then_some((LogId::new(term, seq), offset, crc32));
        Ok(Self { held, compressed, bytes_per_second })
    }
}

/// A snapshot that followers are sent, with what keeps that which comes after it.
#[derive(Debug)]
struct KeptSnapshot {
    snapshot: LeadingSnapshot,
    used: Mutex<Instant>,
}

impl KeptSnapshot {
    fn used(&self) -> MutexGuard<'_, Instant> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those that followers are sent, or were a short while ago.
#[derive(Debug, Default)]
pub(super) struct KeptSnapshots(Mutex<Vec<Arc<KeptSnapshot>>>);

impl KeptSnapshots {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<KeptSnapshot>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, log_id: LogId) -> Option<Arc<KeptSnapshot>> {
        let found = self.lock().iter().find(|kept| kept.snapshot.handle.meta().log_id == log_id).cloned();
        found.inspect(|kept| *kept.used() = Instant::now())
    }

    fn keep(self: &Arc<Self>, snapshot: LeadingSnapshot) -> Arc<KeptSnapshot> {
        let log_id = snapshot.handle.meta().log_id;
        if let Some(kept) = self.find(log_id) {
            return kept;
        }
        let kept = Arc::new(KeptSnapshot { snapshot, used: Mutex::new(Instant::now()) });
        // Outside of the lock: what is let go of may be the last of a file.
        let mut let_go = None;
        let mut all = self.lock();
        if all.len() >= MOST_KEPT
            && let Some(oldest) = (0..all.len()).min_by_key(|at| *all[*at].used())
        {
            let_go = Some(all.swap_remove(oldest));
        }
        all.push(kept.clone());
        drop(all);
        drop(let_go);
        runtime::spawn(let_go_in_time(Arc::downgrade(self), Arc::downgrade(&kept)));
        kept
    }
}

/// Lets go of `kept` once it was not used for a while.
async fn let_go_in_time(all: Weak<KeptSnapshots>, kept: Weak<KeptSnapshot>) {
    loop {
        let Some(used) = kept.upgrade().map(|kept| *kept.used()) else { return };
        sleep_until(used + KEPT_FOR).await;
        let (Some(all), Some(kept)) = (all.upgrade(), kept.upgrade()) else { return };
        if kept.used().elapsed() >= KEPT_FOR {
            all.lock().retain(|other| !Arc::ptr_eq(other, &kept));
            return;
        }
    }
}

fn of_lead(error: LeadError) -> Failure {
    match error {
        LeadError::Read(error) => error.into(),
        LeadError::Snapshot(error) => error.into(),
    }
}

fn unreadable(error: &std::io::Error) -> Failure {
    let message = format!("the snapshot cannot be read on this node: {error}");
    failure(Reason::Unspecified, message, false, None)
}

/// The snapshot to send, and its pieces from where they are to begin.
async fn find<N: OperatedNode>(
    node: &N,
    all: &Arc<KeptSnapshots>,
    wanted: &WantedFile,
) -> Result<(Arc<KeptSnapshot>, SnapshotPieces), Failure> {
    if let Some((log_id, bytes, crc32)) = wanted.held
        && let Some(kept) = all.find(log_id)
    {
        let mut pieces = SnapshotPieces::of(kept.snapshot.handle.clone());
        pieces.resume(bytes, crc32).await.map_err(|error| unreadable(&error))?;
        if pieces.offset() > 0 {
            return Ok((kept, pieces));
        }
    }
    let kept = all.keep(node.leading_snapshot().await.map_err(of_lead)?);
    let pieces = SnapshotPieces::of(kept.snapshot.handle.clone());
    Ok((kept, pieces))
}

/// Sends the file until it has been sent, or the follower has gone.
///
/// # Errors
/// Why nothing more is sent.
pub(super) async fn send<N: OperatedNode>(
    node: &N,
    subscribers: &Subscribers,
    wanted: WantedFile,
    (outlet, caller, limits): (&Outlet<(SnapshotPiece, Built)>, &Arc<Caller>, &DoorLimits),
) -> Result<(), Failure> {
    let (kept, mut pieces) = find(node, subscribers.kept_snapshots(), &wanted).await?;
    pieces.compress(wanted.compressed);
    let (meta, total_bytes) = (kept.snapshot.handle.meta(), kept.snapshot.handle.len_bytes());
    while !pieces.is_over() {
        room_to_build(caller, limits).await;
        let rates = [node.settings().snapshots.send_bytes_per_second, wanted.bytes_per_second];
        let rate = rates.into_iter().filter(|rate| *rate > 0).min().unwrap_or(0);
        let piece = pieces.next(FILE_PIECE_BYTES, rate).await.map_err(|error| unreadable(&error))?;
        let FilePiece { offset, bytes, crc32, uncompressed_bytes, last } = piece;
        let built = Built::new(caller.clone(), bytes.len());
        let piece = SnapshotPiece {
            seq: meta.log_id.index,
            term: meta.log_id.term,
            history: meta.history.0,
            total_bytes,
            offset,
            bytes,
            crc32: crc32.unwrap_or_default(),
            uncompressed_bytes,
            last,
        };
        *kept.used() = Instant::now();
        if !outlet.send((piece, built)).await? {
            return Ok(());
        }
    }
    Ok(())
}
