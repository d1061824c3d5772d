//! What a store counts for metrics.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds of the flush histogram's buckets, in microseconds; a last bucket takes what is longer.
pub const FLUSH_BUCKETS_US: [u64; 14] =
    [50, 100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 51_200, 102_400, 1_000_000, 10_000_000];

/// Counters of one [`LogStore`](crate::storage::LogStore) since it was opened. Read at any time; each is exact, but two
/// read one after the other may belong to different moments.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct LogStats {
    /// Flushes that made writes durable.
    pub flushes: AtomicU64,
    /// Their durations summed up, in microseconds.
    pub flush_us_sum: AtomicU64,
    /// The longest of them, in microseconds.
    pub flush_us_max: AtomicU64,
    /// Flushes by duration; see [`FLUSH_BUCKETS_US`].
    pub flush_us_buckets: [AtomicU64; FLUSH_BUCKETS_US.len() + 1],
    /// Entries written.
    pub entries: AtomicU64,
    /// Bytes of records written to the disk, without what a store adds to them on the way.
    pub bytes_written: AtomicU64,
    /// Bytes of entries submitted and not yet flushed.
    pub queued_bytes: AtomicU64,
    /// Writes submitted and not yet flushed.
    pub queued_writes: AtomicU64,
    /// Whether the store has failed for good.
    pub failed: AtomicBool,
}

impl LogStats {
    pub(crate) fn flushed(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = FLUSH_BUCKETS_US.iter().position(|bound| us <= *bound).unwrap_or(FLUSH_BUCKETS_US.len());
        self.flushes.fetch_add(1, Relaxed);
        self.flush_us_sum.fetch_add(us, Relaxed);
        self.flush_us_max.fetch_max(us, Relaxed);
        self.flush_us_buckets[bucket].fetch_add(1, Relaxed);
    }
}
