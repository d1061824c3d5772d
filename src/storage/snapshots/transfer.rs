//! The file of a snapshot in pieces, on its way to another node: cut, checked, compressed, resumed, and no faster than it may go.
//!
//! Members and replicas are sent snapshots by this. What carries the pieces is another's matter.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep_until};

use super::SnapshotHandle;
use crate::runtime::offload;

/// Whether this build reads pieces that are compressed.
pub(crate) const READS_ZSTD: bool = cfg!(any(feature = "peers", feature = "client"));
/// Most bytes of a piece.
const MOST_PIECE_BYTES: usize = 1024 * 1024;
/// After a piece that did not become smaller, so many are not compressed.
const INCOMPRESSIBLE_PIECES: u32 = 16;

/// A piece of a snapshot's file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct FilePiece {
    /// Where in the file it begins.
    pub(crate) offset: u64,
    pub(crate) bytes: Bytes,
    /// CRC-32 of what is in the file. Earlier versions did not say it.
    pub(crate) crc32: Option<u32>,
    /// If the bytes are compressed: how many they were. Else 0.
    pub(crate) uncompressed_bytes: u32,
    /// Whether the file ends with it.
    pub(crate) last: bool,
}

/// A piece that is not what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a piece of a snapshot {0}")]
pub(crate) struct BadPiece(&'static str);

impl FilePiece {
    /// What is in the file. Blocks.
    ///
    /// # Errors
    /// That it was changed on its way.
    pub(crate) fn content(self) -> Result<Bytes, BadPiece> {
        let bytes = match usize::try_from(self.uncompressed_bytes).unwrap_or(usize::MAX) {
            0 => self.bytes,
            length => decompressed(&self.bytes, length)?,
        };
        match self.crc32.is_none_or(|crc32| crc32fast::hash(&bytes) == crc32) {
            true => Ok(bytes),
            false => Err(BadPiece("was changed on its way")),
        }
    }
}

/// Cuts the file of a snapshot into pieces, from anywhere in it.
#[derive(Debug)]
pub(crate) struct SnapshotPieces {
    handle: SnapshotHandle,
    offset: u64,
    /// Whether the last piece was cut.
    is_over: bool,
    compresses: bool,
    /// So many pieces are not compressed, because those before did not become smaller.
    incompressible: u32,
    /// When the next piece may be sent.
    not_before: Instant,
}

impl SnapshotPieces {
    /// From the beginning of the file, as it is.
    pub(crate) fn of(handle: SnapshotHandle) -> Self {
        let not_before = Instant::now();
        Self { handle, offset: 0, is_over: false, compresses: false, incompressible: 0, not_before }
    }

    /// From here on pieces are compressed where that makes them smaller, or not.
    pub(crate) fn compress(&mut self, compresses: bool) {
        self.compresses = compresses;
    }

    /// Goes on behind the first `bytes` of the file if that is what the receiver has: if their CRC-32 is `crc32`. Else begins anew.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) async fn resume(&mut self, bytes: u64, crc32: u32) -> io::Result<()> {
        (self.offset, self.is_over) = (0, false);
        if (1..=self.handle.len_bytes()).contains(&bytes) {
            let handle = self.handle.clone();
            let own = offload(move || handle.crc32_of_first(bytes)).await?;
            if own == crc32 {
                self.offset = bytes;
            }
        }
        Ok(())
    }

    /// Where the next piece begins.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether the last piece was cut.
    pub(crate) fn is_over(&self) -> bool {
        self.is_over
    }

    /// The next piece, of `piece_bytes` at most. It comes so late that no more than `bytes_per_second` are sent; 0: at once. The last one
    /// is empty if the receiver has all of the file.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) async fn next(&mut self, piece_bytes: usize, bytes_per_second: u64) -> io::Result<FilePiece> {
        sleep_until(self.not_before).await;
        let (handle, offset) = (self.handle.clone(), self.offset);
        let compress = self.compresses && self.incompressible == 0;
        let read = offload(move || {
            let bytes = handle.read_at(offset, piece_bytes)?;
            let crc32 = crc32fast::hash(&bytes);
            let compressed = compress.then(|| compressed(&bytes)).flatten();
            Ok::<_, io::Error>((bytes, crc32, compressed))
        });
        let (bytes, crc32, compressed) = read.await?;
        if bytes.is_empty() && offset < self.handle.len_bytes() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the snapshot is shorter than it was"));
        }
        self.incompressible = match compress && compressed.is_none() {
            true => INCOMPRESSIBLE_PIECES,
            false => self.incompressible.saturating_sub(1),
        };
        self.offset += bytes.len() as u64;
        self.is_over = self.offset >= self.handle.len_bytes();
        let (bytes, uncompressed_bytes) = match compressed {
            Some(compressed) => (compressed, u32::try_from(bytes.len()).unwrap_or(u32::MAX)),
            None => (bytes, 0),
        };
        if bytes_per_second > 0 {
            let takes = Duration::from_secs_f64(bytes.len() as f64 / bytes_per_second as f64);
            self.not_before = self.not_before.max(Instant::now()) + takes;
        }
        Ok(FilePiece { offset, bytes, crc32: Some(crc32), uncompressed_bytes, last: self.is_over })
    }
}

/// `bytes` compressed, if that saves a tenth of them.
#[cfg(any(feature = "peers", feature = "client"))]
fn compressed(bytes: &[u8]) -> Option<Bytes> {
    /// As fast as it gets: a snapshot is to arrive, not to be small.
    const LEVEL: i32 = 1;
    let compressed = zstd::bulk::compress(bytes, LEVEL).ok()?;
    (compressed.len() < bytes.len() - bytes.len() / 10).then(|| compressed.into())
}

/// Nothing is compressed by a build without zstd.
#[cfg(not(any(feature = "peers", feature = "client")))]
fn compressed(_: &[u8]) -> Option<Bytes> {
    None
}

/// The `length` bytes that were compressed into `bytes`.
#[cfg(any(feature = "peers", feature = "client"))]
fn decompressed(bytes: &[u8], length: usize) -> Result<Bytes, BadPiece> {
    if length > MOST_PIECE_BYTES {
        return Err(BadPiece("is too large"));
    }
    let decompressed = zstd::bulk::decompress(bytes, length);
    let decompressed = decompressed.map_err(|_| BadPiece("cannot be decompressed"))?;
    match decompressed.len() == length {
        true => Ok(decompressed.into()),
        false => Err(BadPiece("is not as long as it says")),
    }
}

/// Only those that read it are sent what is compressed.
#[cfg(not(any(feature = "peers", feature = "client")))]
fn decompressed(_: &[u8], _: usize) -> Result<Bytes, BadPiece> {
    let _ = MOST_PIECE_BYTES;
    Err(BadPiece("is compressed, which this build does not read"))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::storage::{MemorySnapshots, SnapshotMeta, SnapshotStore as _};
    use crate::types::LogId;

    /// Bytes that do not become smaller.
    fn noise(words: u32) -> Vec<u8> {
        (0..words).flat_map(|n| crc32fast::hash(&n.to_le_bytes()).to_le_bytes()).collect()
    }

    fn snapshot(payload: &[u8]) -> SnapshotHandle {
        let meta = SnapshotMeta {
            log_id: LogId::new(1, 1),
            clock: Default::default(),
            membership_log_id: None,
            membership: Default::default(),
            history: Default::default(),
            quota_bytes: 0,
            machines: Default::default(),
        };
        let mut writer = MemorySnapshots::new().begin(&meta).unwrap();
        writer.write_all(payload).unwrap();
        writer.finish().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn pieces_make_up_the_file_from_wherever_a_receiver_is() {
        let payload = [vec![7; 30_000], noise(5_000), vec![9; 30_000]].concat();
        let handle = snapshot(&payload);
        let file = handle.read_at(0, usize::MAX).unwrap();
        for compresses in [false, true] {
            let mut pieces = SnapshotPieces::of(handle.clone());
            pieces.compress(compresses);
            let (mut got, mut sent, mut has) = (Vec::new(), 0, 0);
            while has < file.len() {
                // Every other piece gets lost, with its connection.
                pieces.resume(has as u64, crc32fast::hash(&file[..has])).await.unwrap();
                for lost in [false, true] {
                    if pieces.is_over() {
                        break;
                    }
                    let piece = pieces.next(1000, 0).await.unwrap();
                    sent += piece.bytes.len();
                    let content = piece.clone().content().unwrap();
                    if !lost {
                        assert_eq!(piece.offset, got.len() as u64);
                        got.extend_from_slice(&content);
                        has = got.len();
                        assert_eq!(piece.last, has == file.len());
                    }
                }
            }
            assert_eq!(got, file);
            assert!(!compresses || sent < file.len(), "{sent}");
            // One that has everything is told so.
            pieces.resume(file.len() as u64, crc32fast::hash(&file)).await.unwrap();
            let end = pieces.next(1000, 0).await.unwrap();
            assert!(end.last && end.bytes.is_empty() && end.offset == file.len() as u64);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_has_something_else_is_sent_all_of_it() {
        let handle = snapshot(&noise(100));
        let mut pieces = SnapshotPieces::of(handle.clone());
        for (bytes, crc32) in [(0, 0), (10, 1), (u64::MAX, 0), (handle.len_bytes() + 1, 0)] {
            pieces.resume(bytes, crc32).await.unwrap();
            assert_eq!(pieces.offset(), 0, "{bytes}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_is_sent_in_a_second_than_may_be() {
        let mut pieces = SnapshotPieces::of(snapshot(&noise(25_000)));
        let begun = Instant::now();
        while !pieces.is_over() {
            pieces.next(1000, 10_000).await.unwrap();
        }
        assert!((9..=11).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    }

    #[test]
    fn what_was_changed_on_its_way_is_not_taken() {
        let plain = vec![7; 100_000];
        let small = compressed(&plain).unwrap();
        let piece = |bytes: &[u8], uncompressed_bytes, crc32| FilePiece {
            bytes: bytes.to_vec().into(),
            uncompressed_bytes,
            crc32,
            ..FilePiece::default()
        };
        let crc32 = Some(crc32fast::hash(&plain));
        assert_eq!(piece(&small, 100_000, crc32).content().unwrap(), plain);
        assert_eq!(piece(&plain, 0, None).content().unwrap(), plain);
        for bad in [
            piece(&plain, 0, Some(1)),
            piece(&small, 100_000, Some(1)),
            piece(&small, 99_999, crc32),
            piece(&small, 100_001, crc32),
            piece(&small, u32::MAX, crc32),
            piece(b"garbage", 7, None),
            piece(b"", 7, None),
        ] {
            assert!(bad.content().is_err());
        }
        assert!(compressed(&noise(1000)).is_none() && compressed(&[]).is_none());
    }
}
