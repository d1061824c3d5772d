//! Pieces of snapshots, compressed on their way where that makes them smaller, in builds that have zstd.

use bytes::Bytes;

use super::wire::Malformed;

/// Most bytes of a piece.
pub(super) const MOST_BYTES: usize = 1024 * 1024;

/// Whether this build reads what is compressed.
pub(super) const READS_ZSTD: bool = cfg!(feature = "peers");

/// `bytes` compressed, if that saves a tenth of them. Blocks.
#[cfg(feature = "peers")]
pub(super) fn compressed(bytes: &[u8]) -> Option<Bytes> {
    /// As fast as it gets: a snapshot is to arrive, not to be small.
    const LEVEL: i32 = 1;
    let compressed = zstd::bulk::compress(bytes, LEVEL).ok()?;
    (compressed.len() < bytes.len() - bytes.len() / 10).then(|| compressed.into())
}

/// Nothing is compressed by a build without zstd.
#[cfg(not(feature = "peers"))]
pub(super) fn compressed(_: &[u8]) -> Option<Bytes> {
    None
}

/// The `length` bytes that were compressed into `bytes`. Blocks.
#[cfg(feature = "peers")]
pub(super) fn decompressed(bytes: &[u8], length: usize) -> Result<Bytes, Malformed> {
    if length > MOST_BYTES {
        return Err(Malformed("a piece of a snapshot is too large"));
    }
    let decompressed = zstd::bulk::decompress(bytes, length);
    let decompressed = decompressed.map_err(|_| Malformed("a piece of a snapshot cannot be decompressed"))?;
    match decompressed.len() == length {
        true => Ok(decompressed.into()),
        false => Err(Malformed("a piece of a snapshot is not as long as it says")),
    }
}

/// Only those that read it are sent what is compressed.
#[cfg(not(feature = "peers"))]
pub(super) fn decompressed(_: &[u8], _: usize) -> Result<Bytes, Malformed> {
    Err(Malformed("a piece of a snapshot is compressed, which this build does not read"))
}

#[cfg(all(test, feature = "peers"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_compressed_comes_back_and_nothing_else_is_believed() {
        let plain = vec![7; 100_000];
        let small = compressed(&plain).unwrap();
        assert!(small.len() < 1000);
        assert_eq!(decompressed(&small, plain.len()).unwrap(), plain);
        for length in [0, plain.len() - 1, plain.len() + 1, MOST_BYTES + 1, usize::MAX] {
            assert!(decompressed(&small, length).is_err(), "{length}");
        }
        assert!(decompressed(b"garbage", 7).is_err() && decompressed(&[], 7).is_err());
        let noise: Vec<u8> =
            (0..1000u32).flat_map(|n| crc32fast::hash(&n.to_le_bytes()).to_le_bytes()).collect();
        assert!(compressed(&noise).is_none() && compressed(&[]).is_none());
    }
}
