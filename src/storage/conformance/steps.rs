//! What a random run does.

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::types::{Entry, LogId, Payload};

/// One step of a random run.
#[derive(Debug, Clone)]
pub(crate) enum RandomStep {
    /// Append entries of these sizes, after raising the term by so much.
    Append(Vec<usize>, u64),
    Membership,
    Vote(u64, u64, bool),
    /// Commit at this fraction of the log.
    Commit(u8),
    /// Truncate so many entries from the end.
    Truncate(u8),
    /// Purge at this fraction of the log.
    Purge(u8),
    /// Purge so many entries beyond the end.
    PurgeBeyond(u8),
    /// Read from and to these fractions, with this many bytes.
    Read(u8, u8, usize),
    Sync,
    Reopen,
    Crash(usize),
}

impl RandomStep {
    /// The step that `seed` stands for.
    pub(crate) fn random(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        match rng.random_range(0..31) {
            0..8 => {
                let entries = rng.random_range(1..12);
                let raise = rng.random_range(0..2);
                Self::Append((0..entries).map(|_| size(&mut rng)).collect(), raise)
            }
            8 => Self::Append(Vec::new(), 0),
            9 => Self::Membership,
            10..12 => Self::Vote(rng.random_range(0..9), rng.random_range(1..4), rng.random()),
            12..14 => Self::Commit(rng.random()),
            14..17 => Self::Truncate(rng.random_range(0..20)),
            17..19 => Self::Purge(rng.random()),
            19 => Self::PurgeBeyond(rng.random_range(1..20)),
            20..25 => Self::Read(rng.random(), rng.random(), rng.random_range(0..400_000)),
            25 | 26 => Self::Sync,
            27 | 28 => Self::Reopen,
            _ => Self::Crash(rng.random_range(0..6)),
        }
    }
}

/// Of an entry, in bytes.
fn size(rng: &mut SmallRng) -> usize {
    /// Entries around this size are worth trying: a store may split those that are larger.
    const RECORD_BYTES: usize = 64 * 1024;
    match rng.random_range(0..14) {
        0..8 => rng.random_range(0..600),
        8..11 => rng.random_range(10_000..60_000),
        11..13 => rng.random_range(RECORD_BYTES - 80..RECORD_BYTES + 40),
        _ => rng.random_range(60_000..300_000),
    }
}

/// A random run of at most so many steps.
pub(super) fn sequence(seed: u64, longest: usize) -> Vec<RandomStep> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let count = rng.random_range(1..longest.max(2));
    (0..count).map(|_| RandomStep::random(rng.random())).collect()
}

pub(crate) fn command(term: u64, index: u64, bytes: usize) -> Entry {
    let fill = (index as u8).wrapping_mul(7).wrapping_add(term as u8);
    Entry { log_id: LogId::new(term, index), payload: Payload::Command(Bytes::from(vec![fill; bytes])) }
}
