//! Sending a snapshot, piece by piece.
//!
//! A connection that breaks, or a peer that is silent, does not end the transfer: the peer is asked how much it has, and is sent the
//! rest. What it has is the beginning of the same file if the checksums say so, whoever has sent it.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use openraft::errors::{ErrorSource, StreamingError};
use tokio::time::{Instant, sleep};

use super::{PeerClient, RpcError, broken, send, unreachable};
use crate::proto::peer::{HeldPieces, Response, SnapshotPiece, SnapshotResponse, request, response};
use crate::raft::network::progress::SendingSnapshot;
use crate::raft::network::wire::{self, Malformed};
use crate::raft::snapshot::SnapshotData;
use crate::raft::type_config::{self, TypeConfig, Vote};
use crate::storage::{FilePiece, SnapshotPieces};

/// Bytes of a snapshot in one message.
const PIECE_BYTES: usize = 512 * 1024;
/// The same over a line that is so slow that pieces are not answered in time.
const SMALLEST_PIECE_BYTES: usize = 32 * 1024;
/// Pieces sent and not yet answered.
const PIECES_IN_FLIGHT: usize = 4;
/// A piece is answered once it is written, and while the peer verifies and loads the snapshot it gives signs
/// of life. A message that is not answered for this long counts as lost.
const SNAPSHOT_IDLE: Duration = Duration::from_secs(5);
/// A transfer of which nothing arrives for so long is over. The next one is of the newest snapshot.
const RESUME_PATIENCE: Duration = Duration::from_secs(60);
/// How long to wait before the peer is asked how much it has.
const RESUME_PAUSE: Duration = Duration::from_millis(100);
/// A snapshot on its way to one peer.
struct Shipment {
    vote: Vote,
    log_id: type_config::LogId,
    pieces: SnapshotPieces,
    total_bytes: u64,
    /// The requests that carried pieces which are not answered yet.
    unanswered: VecDeque<u64>,
    piece_bytes: usize,
    /// When anything arrived last.
    advanced: Instant,
}

/// Why a transfer does not go on.
enum Interruption {
    /// The connection broke, there is none, or the peer is silent.
    Line(RpcError),
    /// Anything else.
    Final(StreamingError<TypeConfig>),
}

impl From<Malformed> for Interruption {
    fn from(error: Malformed) -> Self {
        Self::Final(RpcError::from(error).into())
    }
}

fn refused(reason: impl ToString) -> Interruption {
    Interruption::Final(unreachable(reason).into())
}

fn unreadable(error: &std::io::Error) -> Interruption {
    let source = ErrorSource::from_error(error);
    Interruption::Final(StreamingError::StorageError(openraft::StorageError::read_snapshot(None, source)))
}

impl Shipment {
    /// Goes on behind what the peer has.
    async fn resume(&mut self, held: Option<HeldPieces>) -> Result<(), Interruption> {
        let held = held.unwrap_or_default();
        self.unanswered.clear();
        self.pieces.compress(held.zstd);
        let resumed = self.pieces.resume(held.bytes, held.crc32).await;
        resumed.map_err(|error| unreadable(&error))
    }

    fn message(&self, piece: FilePiece) -> SnapshotPiece {
        let FilePiece { offset, bytes, crc32, uncompressed_bytes, last } = piece;
        SnapshotPiece {
            vote: Some(wire::vote(&self.vote)),
            last_log: Some(wire::log_id(&self.log_id)),
            offset,
            bytes,
            last,
            probe: false,
            crc32,
            uncompressed_bytes,
        }
    }

    async fn next_piece(&mut self, bytes_per_second: u64) -> Result<SnapshotPiece, Interruption> {
        let piece = self.pieces.next(self.piece_bytes, bytes_per_second).await;
        piece.map(|piece| self.message(piece)).map_err(|error| unreadable(&error))
    }

    /// Takes note of a response. Whether it is the answer to a piece of this snapshot.
    fn is_answered_by(&mut self, response: &Response) -> bool {
        let Some(place) = self.unanswered.iter().position(|id| *id == response.id) else { return false };
        self.advanced = Instant::now();
        // A sign of life, while the peer verifies and loads what it has received.
        if matches!(&response.body, Some(response::Body::Snapshot(answer)) if answer.installing) {
            return false;
        }
        self.unanswered.remove(place);
        true
    }

    /// The line was lost. Whether another attempt makes sense.
    fn may_resume(&mut self) -> bool {
        // A line on which pieces are not answered in time may carry smaller ones.
        self.piece_bytes = (self.piece_bytes / 2).max(SMALLEST_PIECE_BYTES);
        self.advanced.elapsed() < RESUME_PATIENCE
    }
}

impl PeerClient {
    /// Sends the whole of `snapshot`. The peer's vote, which is newer than `vote` where the peer follows another leader by now.
    pub(super) async fn send_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotData,
    ) -> Result<Vote, StreamingError<TypeConfig>> {
        let mut shipment = self.shipment(vote, snapshot)?;
        let begun = Instant::now();
        let (total_bytes, upto) = (shipment.total_bytes, shipment.log_id.index);
        let sending = SendingSnapshot::new(self.clients.fitness.clone(), self.node_id, (total_bytes, upto));
        loop {
            match self.send_rest(&mut shipment, &sending).await {
                Ok(answered) => {
                    if answered <= vote {
                        self.clients.activity.snapshots_sent.add(total_bytes, begun.elapsed());
                    }
                    return Ok(answered);
                }
                Err(Interruption::Final(error)) => return Err(error),
                Err(Interruption::Line(error)) => {
                    self.connection = None;
                    if !shipment.may_resume() {
                        return Err(error.into());
                    }
                    self.clients.activity.snapshots_resumed.fetch_add(1, Relaxed);
                    tracing::debug!(node = self.node_id, %error, offset = shipment.pieces.offset(), "a snapshot is interrupted");
                    sleep(RESUME_PAUSE).await;
                }
            }
        }
    }

    /// Sends what the peer lacks of it, over one connection.
    async fn send_rest(
        &mut self,
        shipment: &mut Shipment,
        sending: &SendingSnapshot,
    ) -> Result<Vote, Interruption> {
        let (answered, held) = self.ask_what_it_has(shipment).await?;
        if answered > shipment.vote || held.is_some_and(|held| held.installed) {
            return Ok(answered);
        }
        shipment.resume(held).await?;
        loop {
            sending.reached(shipment.pieces.offset());
            while shipment.unanswered.len() < PIECES_IN_FLIGHT && !shipment.pieces.is_over() {
                let rate = self.clients.snapshot_bytes_per_second.load(Relaxed);
                let piece = shipment.next_piece(rate).await?;
                let request = self.request(request::Body::Snapshot(piece));
                shipment.unanswered.push_back(request.id);
                send(self.connected().await.map_err(Interruption::Line)?, request)
                    .map_err(Interruption::Line)?;
            }
            let response = self.next_response().await?;
            if !shipment.is_answered_by(&response) {
                continue;
            }
            let answered = self.answered_vote(&Self::snapshot_answer(response.body)?)?;
            if answered > shipment.vote || (shipment.unanswered.is_empty() && shipment.pieces.is_over()) {
                return Ok(answered);
            }
        }
    }

    /// The peer's vote, and how much of the snapshot it has: nothing is said of that by builds that do not know of it.
    async fn ask_what_it_has(
        &mut self,
        shipment: &mut Shipment,
    ) -> Result<(Vote, Option<HeldPieces>), Interruption> {
        let probe = SnapshotPiece { probe: true, ..shipment.message(FilePiece::default()) };
        let request = self.request(request::Body::Snapshot(probe));
        let id = request.id;
        send(self.connected().await.map_err(Interruption::Line)?, request).map_err(Interruption::Line)?;
        loop {
            let response = self.next_response().await?;
            if response.id != id {
                continue;
            }
            let answer = Self::snapshot_answer(response.body)?;
            if answer.installing {
                // A sign of life: it is still finding out, and promises nothing.
                shipment.advanced = Instant::now();
                continue;
            }
            return Ok((self.answered_vote(&answer)?, answer.held));
        }
    }

    /// Refuses a snapshot that is not to be sent.
    fn shipment(&self, vote: Vote, snapshot: SnapshotData) -> Result<Shipment, RpcError> {
        let SnapshotData::Placed(handle) = snapshot else {
            return Err(unreachable("the snapshot is not in its place yet"));
        };
        let total_bytes = handle.len_bytes();
        if total_bytes == 0 {
            return Err(unreachable("the snapshot is empty"));
        }
        // It would make others wrong as well, until the wrong ones are the majority.
        if self.clients.agreement.is_outvoted() {
            return Err(unreachable("this node's state differs from the others': it sends no snapshots"));
        }
        Ok(Shipment {
            vote,
            log_id: type_config::log_id(handle.meta().log_id),
            pieces: SnapshotPieces::of(handle),
            total_bytes,
            unanswered: VecDeque::new(),
            piece_bytes: PIECE_BYTES,
            advanced: Instant::now(),
        })
    }

    async fn next_response(&mut self) -> Result<Response, Interruption> {
        let connection = self.connected().await.map_err(Interruption::Line)?;
        let response = tokio::time::timeout(SNAPSHOT_IDLE, connection.responses.recv()).await;
        let late = |_| unreachable(format!("a piece was not answered within {} s", SNAPSHOT_IDLE.as_secs()));
        response
            .map_err(late)
            .and_then(|response| response.ok_or_else(|| broken("connection closed")))
            .map_err(Interruption::Line)
    }

    fn snapshot_answer(body: Option<response::Body>) -> Result<SnapshotResponse, Interruption> {
        match body {
            Some(response::Body::Snapshot(answer)) => Ok(answer),
            Some(response::Body::Failure(reason)) => Err(refused(reason)),
            _ => Err(Malformed("not the answer to a snapshot").into()),
        }
    }

    /// The vote of a peer that has answered to a piece.
    fn answered_vote(&self, answer: &SnapshotResponse) -> Result<Vote, Interruption> {
        self.clients.fitness.note_lease(self.holder(), answer.lease_ms);
        let answered = wire::from_vote(answer.vote)?;
        self.clients.believe_vote(&answered)?;
        Ok(answered)
    }
}
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::tests::clients;
    use super::*;
    use crate::raft::agreement::Agreement;
    use crate::raft::network::Purpose;
    use crate::raft::network::nowhere::Nowhere;
    use crate::storage::{MemorySnapshots, SnapshotMeta, SnapshotStore};
    use crate::types::{Divergence, LogId, Member, Vote};

    #[tokio::test(start_paused = true)]
    async fn a_node_whose_state_differs_sends_no_snapshots() {
        let transport = Arc::new(Nowhere::default());
        let meta = SnapshotMeta {
            log_id: LogId::new(1, 9),
            clock: Default::default(),
            membership_log_id: None,
            membership: Default::default(),
            history: Default::default(),
            quota_bytes: 0,
            machines: Default::default(),
        };
        let handle = MemorySnapshots::new().begin(&meta).unwrap().finish().unwrap();
        let agreement = Arc::new(Agreement::default());
        let mut clients = clients(transport.clone());
        clients.judged_by(agreement.clone());
        let vote = type_config::vote(Vote { term: 1, node_id: 1, committed: true });
        let send = async || {
            let mut client = clients.client(2, &Member::default(), Purpose::Snapshot);
            let sent = client.send_snapshot(vote, SnapshotData::Placed(handle.clone())).await;
            sent.unwrap_err().to_string()
        };
        let begun = Instant::now();
        assert!(!send().await.contains("differs"));
        assert!(begun.elapsed() >= RESUME_PATIENCE && begun.elapsed() < RESUME_PATIENCE * 2);
        let dials = transport.dials();
        assert!(dials > 1, "nobody is there");
        let divergence = Divergence { at: LogId::new(1, 9), own: 7, majority: Some(8) };
        assert!(agreement.differs(agreement.life(), &divergence));
        assert!(send().await.contains("differs"));
        assert_eq!(transport.dials(), dials);
    }
}
