//! Sending a snapshot, piece by piece.

use std::collections::VecDeque;
use std::time::Duration;

use openraft::errors::{ErrorSource, StreamingError};
use tokio::time::Instant;

use super::{PeerClient, RpcError, broken, send, unreachable};
use crate::proto::peer::{Response, SnapshotPiece, request, response};
use crate::raft::network::progress::SendingSnapshot;
use crate::raft::network::wire::{self, Malformed};
use crate::raft::snapshot::SnapshotData;
use crate::raft::type_config::{self, TypeConfig, Vote};
use crate::runtime;
use crate::storage::SnapshotHandle;

/// Bytes of a snapshot in one message.
const SNAPSHOT_PIECE_BYTES: usize = 512 * 1024;
/// Snapshot pieces sent and not yet answered.
const SNAPSHOT_PIECES_IN_FLIGHT: usize = 4;
/// A piece is answered once it is written, and while the peer verifies and loads the snapshot it gives signs
/// of life. A message that is not answered for this long counts as lost.
const SNAPSHOT_IDLE: Duration = Duration::from_secs(5);

/// A snapshot on its way to one peer.
struct Shipment {
    vote: Vote,
    handle: SnapshotHandle,
    total_bytes: u64,
    /// Up to where it has been sent.
    offset: u64,
    /// The requests that carried pieces which are not answered yet.
    unanswered: VecDeque<u64>,
}

impl Shipment {
    fn is_sent(&self) -> bool {
        self.offset >= self.total_bytes
    }

    /// The next piece.
    async fn next_piece(&mut self) -> Result<SnapshotPiece, StreamingError<TypeConfig>> {
        let (source, at) = (self.handle.clone(), self.offset);
        let read = runtime::offload(move || source.read_at(at, SNAPSHOT_PIECE_BYTES)).await;
        let bytes = read.map_err(|error| {
            let source = ErrorSource::from_error(&error);
            StreamingError::StorageError(openraft::StorageError::read_snapshot(None, source))
        })?;
        if bytes.is_empty() {
            return Err(unreachable("the snapshot is shorter than it was").into());
        }
        self.offset += bytes.len() as u64;
        Ok(SnapshotPiece {
            vote: Some(wire::vote(&self.vote)),
            last_log: Some(wire::log_id(&type_config::log_id(self.handle.meta().log_id))),
            offset: at,
            bytes,
            last: self.is_sent(),
        })
    }

    /// Takes note of a response. Whether it is the answer to a piece of this snapshot.
    fn is_answered_by(&mut self, response: &Response) -> bool {
        let Some(place) = self.unanswered.iter().position(|id| *id == response.id) else { return false };
        // A sign of life, while the peer verifies and loads what it has received.
        if matches!(&response.body, Some(response::Body::Snapshot(answer)) if answer.installing) {
            return false;
        }
        self.unanswered.remove(place);
        true
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
        let (total_bytes, upto) = (shipment.total_bytes, shipment.handle.meta().log_id.index);
        let sending = SendingSnapshot::new(self.clients.fitness.clone(), self.node_id, (total_bytes, upto));
        loop {
            sending.reached(shipment.offset);
            while shipment.unanswered.len() < SNAPSHOT_PIECES_IN_FLIGHT && !shipment.is_sent() {
                let piece = shipment.next_piece().await?;
                let request = self.request(request::Body::Snapshot(piece));
                shipment.unanswered.push_back(request.id);
                send(self.connected().await?, request)?;
            }
            let response = self.next_response().await?;
            if !shipment.is_answered_by(&response) {
                continue;
            }
            let answered = self.answered_vote(response.body)?;
            let is_complete = shipment.unanswered.is_empty() && shipment.is_sent();
            if is_complete && answered <= vote {
                self.clients.activity.snapshots_sent.add(total_bytes, begun.elapsed());
            }
            if answered > vote || is_complete {
                return Ok(answered);
            }
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
        Ok(Shipment { vote, handle, total_bytes, offset: 0, unanswered: VecDeque::new() })
    }

    async fn next_response(&mut self) -> Result<Response, RpcError> {
        let connection = self.connected().await?;
        let response = tokio::time::timeout(SNAPSHOT_IDLE, connection.responses.recv()).await;
        let late = |_| unreachable(format!("a piece was not answered within {} s", SNAPSHOT_IDLE.as_secs()));
        response.map_err(late)?.ok_or_else(|| broken("connection closed"))
    }

    /// The vote of a peer that has answered to a piece.
    fn answered_vote(&self, body: Option<response::Body>) -> Result<Vote, RpcError> {
        match body {
            Some(response::Body::Snapshot(answer)) => {
                self.clients.fitness.note_lease(self.holder(), answer.lease_ms);
                let answered = wire::from_vote(answer.vote)?;
                self.clients.believe_vote(&answered)?;
                Ok(answered)
            }
            Some(response::Body::Failure(reason)) => Err(unreachable(reason)),
            _ => Err(Malformed("not the answer to a snapshot").into()),
        }
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
        assert!(!send().await.contains("differs"));
        assert_eq!(transport.dials(), 1, "nobody is there");
        let divergence = Divergence { at: LogId::new(1, 9), own: 7, majority: Some(8) };
        assert!(agreement.differs(agreement.life(), &divergence));
        assert!(send().await.contains("differs"));
        assert_eq!(transport.dials(), 1);
    }
}
