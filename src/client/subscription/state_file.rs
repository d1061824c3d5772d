//! The whole state of a node as a file.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Streaming};

use super::super::Client;
use super::super::endpoint::Endpoint;
use super::super::error::ClientError;
use super::super::judge::{Failure, in_time, in_words};
use super::super::link::Link;
use super::looks::unanswered;
use super::replication;
use crate::proto::replication::{Compression, SnapshotPiece, SnapshotRequest};
use crate::types::{HistoryEpoch, LogId};

/// What is here of such a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeldFile {
    /// The position that the state is of.
    pub(crate) log_id: LogId,
    /// From the beginning.
    pub(crate) bytes: u64,
    pub(crate) crc32: u32,
}

/// A piece of such a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StateFilePiece {
    /// The position that the state is of, and the history that it belongs to.
    pub(crate) log_id: LogId,
    pub(crate) history: HistoryEpoch,
    /// Bytes of the file.
    pub(crate) total_bytes: u64,
    pub(crate) offset: u64,
    pub(crate) bytes: Bytes,
    pub(crate) crc32: u32,
    pub(crate) uncompressed_bytes: u32,
    pub(crate) last: bool,
}

/// Pieces of such a file, from one node.
pub(crate) struct StateFileStream {
    link: Arc<Link>,
    pieces: Streaming<SnapshotPiece>,
}

impl fmt::Debug for StateFileStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateFileStream").field("from", &self.link.node.endpoint).finish_non_exhaustive()
    }
}

impl Client {
    /// The state of the node at `endpoint` as a file, behind what is `held` of it if the node still has that one. `None` from a build that
    /// sends no files.
    ///
    /// # Errors
    /// See [`ClientError`]. Asks once.
    pub(crate) async fn read_state_file(
        &self,
        endpoint: &Endpoint,
        held: Option<HeldFile>,
        compressed: bool,
        bytes_per_second: u64,
    ) -> Result<Option<StateFileStream>, ClientError> {
        let mut request = SnapshotRequest { bytes_per_second, ..SnapshotRequest::default() };
        if let Some(HeldFile { log_id, bytes, crc32 }) = held {
            (request.seq, request.term) = (log_id.index, log_id.term);
            (request.offset, request.crc32) = (bytes, crc32);
        }
        request.set_compression(if compressed { Compression::Zstd } else { Compression::None });
        let config = &self.router.config;
        let expires = Instant::now() + config.connect_timeout + config.attempt_timeout;
        let link = self.router.at(endpoint);
        let mut client = replication(&link);
        let asking = async {
            match client.read_snapshot(request).await {
                Err(status) if status.code() == Code::Unimplemented => Ok(None),
                answer => answer.map(|answer| Some(answer.into_inner())),
            }
        };
        match link.node.counted(in_time(timeout_at(expires, asking))).await {
            Ok(pieces) => Ok(pieces.map(|pieces| StateFileStream { pieces, link })),
            Err(failure) => Err(failed_at(&link, &failure)),
        }
    }
}

impl StateFileStream {
    /// The next piece; `None` behind the last one. May be dropped at any time.
    ///
    /// # Errors
    /// See [`ClientError`]; what was received is good.
    pub(crate) async fn next(&mut self) -> Result<Option<StateFilePiece>, ClientError> {
        let next = self.pieces.message().await;
        let next = next.map_err(|status| failed_at(&self.link, &Failure::of_call(&status)))?;
        Ok(next.map(|piece| StateFilePiece {
            log_id: LogId::new(piece.term, piece.seq),
            history: HistoryEpoch(piece.history),
            total_bytes: piece.total_bytes,
            offset: piece.offset,
            bytes: piece.bytes,
            crc32: piece.crc32,
            uncompressed_bytes: piece.uncompressed_bytes,
            last: piece.last,
        }))
    }
}

fn failed_at(link: &Arc<Link>, failure: &Failure) -> ClientError {
    match failure {
        Failure::Attempt(_) => {
            ClientError::Unavailable { tried: vec![(link.node.endpoint.clone(), in_words(failure))] }
        }
        Failure::Answered(_) => unanswered(link, failure),
    }
}
