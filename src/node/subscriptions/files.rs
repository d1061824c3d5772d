//! The whole state as a file: snapshots for those that have the machine themselves.
//!
//! A snapshot that is sent is kept for a while, with what comes after it in the event log, whatever newer ones there are: a follower
//! whose connection broke goes on with it, and one that has all of it follows from there.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::failures;
use super::registry::Subscribers;
use super::stream::drained;
use crate::door::bodies::{Built, room_to_build};
use crate::door::failure::{failure, invalid};
use crate::door::limits::DoorLimits;
use crate::door::streams::Outlet;
use crate::engine::{LeadError, LeadingSnapshot};
use crate::feed::FeedHold;
use crate::incoming::Caller;
use crate::node::operated::OperatedNode;
use crate::proto::replication::{Compression, SnapshotPiece, SnapshotRequest};
use crate::proto::v1::Failure;
use crate::reason::Reason;
use crate::runtime;
use crate::storage::{FilePiece, SnapshotHandle, SnapshotPieces};
use crate::types::LogId;

/// Bytes of a file in one message.
const FILE_PIECE_BYTES: usize = 256 * 1024;
/// A slower follower would take a place for too long.
const LEAST_BYTES_PER_SECOND: u64 = 64 * 1024;
/// How long a snapshot is kept after a piece of it was sent last.
const KEPT_FOR: Duration = Duration::from_mins(5);
/// Snapshots that are kept; with one more the one that was asked for longest ago is let go of.
const MOST_KEPT: usize = 4;

/// Where the pieces go, whose connection that is, and its bounds.
type FileLine<'a> = (&'a Outlet<(SnapshotPiece, Built)>, &'a Arc<Caller>, &'a DoorLimits);
/// A snapshot, and its pieces from where they are to begin.
type SentFile = (Arc<KeptSnapshot>, SnapshotPieces);

/// What a follower asks for.
struct WantedFile {
    held: Option<(LogId, u64, u32)>,
    compressed: bool,
    bytes_per_second: u64,
}

impl WantedFile {
    /// # Errors
    /// The failure to answer instead.
    fn parse(request: SnapshotRequest) -> Result<Self, Failure> {
        let compressed = match request.compression() {
            Compression::Zstd => true,
            Compression::None if request.compression == 0 => false,
            Compression::None => {
                return Err(invalid("this node does not know that compression; it knows zstd"));
            }
        };
        if (1..LEAST_BYTES_PER_SECOND).contains(&request.bytes_per_second) {
            return Err(invalid(&format!(
                "bytes_per_second is 0, or {LEAST_BYTES_PER_SECOND} at least: a place is not for ever"
            )));
        }
        let SnapshotRequest { seq, term, offset, crc32, bytes_per_second, .. } = request;
        let held = (offset > 0).then_some((LogId::new(term, seq), offset, crc32));
        Ok(Self { held, compressed, bytes_per_second })
    }
}

/// A snapshot that followers are sent, with what keeps that which comes after it.
#[derive(Debug)]
struct KeptSnapshot {
    handle: SnapshotHandle,
    /// The newest one: none is for ever.
    hold: Mutex<Option<FeedHold>>,
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
        self.lock().iter().find(|kept| kept.handle.meta().log_id == log_id).cloned()
    }

    fn keep(self: &Arc<Self>, snapshot: LeadingSnapshot) -> Arc<KeptSnapshot> {
        let LeadingSnapshot { handle, hold } = snapshot;
        if let Some(kept) = self.find(handle.meta().log_id) {
            *kept.used() = Instant::now();
            *kept.hold.lock().unwrap_or_else(PoisonError::into_inner) = hold;
            return kept;
        }
        let kept = KeptSnapshot { handle, hold: Mutex::new(hold), used: Mutex::new(Instant::now()) };
        let kept = Arc::new(kept);
        let mut all = self.lock();
        let oldest = (0..all.len()).min_by_key(|at| *all[*at].used()).filter(|_| all.len() >= MOST_KEPT);
        let let_go = oldest.map(|at| all.swap_remove(at));
        all.push(kept.clone());
        drop(all);
        // Outside of the lock: it may be the last of a file.
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

/// What is asked for, if it is kept, and the rest of it. A file that is being read is read to its end, whoever has gone meanwhile: so
/// no more are read at a time than there are places.
async fn resumed(all: &KeptSnapshots, wanted: &WantedFile) -> Result<Option<SentFile>, Failure> {
    let Some((log_id, bytes, crc32)) = wanted.held else { return Ok(None) };
    let Some(kept) = all.find(log_id) else { return Ok(None) };
    let mut pieces = SnapshotPieces::of(kept.handle.clone());
    pieces.resume(bytes, crc32).await.map_err(|error| unreadable(&error))?;
    Ok((pieces.offset() > 0).then_some((kept, pieces)))
}

/// Sends the file until it has been sent, the follower has gone, or the node drains.
///
/// # Errors
/// Why nothing more is sent.
pub(super) async fn serve<N: OperatedNode>(
    node: &N,
    subscribers: &Subscribers,
    request: SnapshotRequest,
    line: FileLine<'_>,
    draining: &mut watch::Receiver<bool>,
) -> Result<(), Failure> {
    let wanted = WantedFile::parse(request)?;
    let kept = subscribers.kept_snapshots();
    let resumed = resumed(kept, &wanted).await?;
    let outlet = line.0;
    let sending = async {
        let found = match resumed {
            Some(found) => found,
            None => {
                let kept = kept.keep(node.leading_snapshot().await.map_err(of_lead)?);
                let pieces = SnapshotPieces::of(kept.handle.clone());
                (kept, pieces)
            }
        };
        send(node, &wanted, found, line).await
    };
    tokio::select! {
        biased;
        () = drained(draining) => Err(failures::draining()),
        () = outlet.gone() => Ok(()),
        outcome = sending => outcome,
    }
}

async fn send<N: OperatedNode>(
    node: &N,
    wanted: &WantedFile,
    (kept, mut pieces): SentFile,
    (outlet, caller, limits): FileLine<'_>,
) -> Result<(), Failure> {
    pieces.compress(wanted.compressed);
    let (meta, total_bytes) = (kept.handle.meta(), kept.handle.len_bytes());
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
