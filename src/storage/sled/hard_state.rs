//! The small state that goes with the log, written as a whole with every flush: vote, committed, purged, and
//! where the log ends.
//!
//! It is one value in the `meta` tree. Its sequence number grows with every write; together with the mark in
//! the ready file it shows whether sled has brought back everything it once had.

use crate::storage::durable_log::first_index;
use crate::types::{LogId, Vote};

use super::record::{Fields, RecordError};

/// Key of the value in the `meta` tree.
pub(crate) const KEY: &[u8] = b"ledger";

const VERSION: u8 = 1;
const BYTES: usize = 80;

const HAS_VOTE: u8 = 1;
const VOTE_COMMITTED: u8 = 1 << 1;
const HAS_COMMITTED: u8 = 1 << 2;
const HAS_PURGED: u8 = 1 << 3;
const HAS_LAST: u8 = 1 << 4;

/// What the node remembers besides its entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct HardState {
    /// Counts the writes of the hard state.
    pub(crate) sequence: u64,
    /// The vote.
    pub(crate) vote: Option<Vote>,
    /// How far the log is known to be committed; never beyond `last`.
    pub(crate) committed: Option<LogId>,
    /// Entries up to here are gone.
    pub(crate) purged: Option<LogId>,
    /// The last entry at the time of writing, or `purged`. The log may go further, never end earlier.
    pub(crate) last: Option<LogId>,
}

impl HardState {
    pub(crate) fn encode(&self) -> [u8; BYTES] {
        let mut flags = 0;
        let mut bytes = [0; BYTES];
        let mut put =
            |offset: usize, value: u64| bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        put(8, self.sequence);
        if let Some(vote) = self.vote {
            flags |= HAS_VOTE | if vote.committed { VOTE_COMMITTED } else { 0 };
            put(16, vote.term);
            put(24, vote.node_id);
        }
        for (flag, offset, position) in
            [(HAS_COMMITTED, 32, self.committed), (HAS_PURGED, 48, self.purged), (HAS_LAST, 64, self.last)]
        {
            if let Some(position) = position {
                flags |= flag;
                put(offset, position.term);
                put(offset + 8, position.index);
            }
        }
        bytes[0] = VERSION;
        bytes[1] = flags;
        let checksum = checksum_of(&bytes);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let bytes: &[u8; BYTES] = bytes.try_into().map_err(|_| RecordError::Short)?;
        let mut fields = Fields(bytes);
        let version = fields.u8()?;
        let flags = fields.u8()?;
        fields.u16()?;
        if fields.u32()? != checksum_of(bytes) {
            return Err(RecordError::Checksum);
        }
        if version != VERSION {
            return Err(RecordError::Version { found: version, supported: VERSION });
        }
        let sequence = fields.u64()?;
        let mut pair = |flag| -> Result<Option<(u64, u64)>, RecordError> {
            let pair = (fields.u64()?, fields.u64()?);
            Ok((flags & flag != 0).then_some(pair))
        };
        let vote = pair(HAS_VOTE)?.map(|(term, node_id)| Vote {
            term,
            node_id,
            committed: flags & VOTE_COMMITTED != 0,
        });
        let mut position = |flag| pair(flag).map(|pair| pair.map(|(term, index)| LogId::new(term, index)));
        let (committed, purged, last) =
            (position(HAS_COMMITTED)?, position(HAS_PURGED)?, position(HAS_LAST)?);
        Ok(Self { sequence, vote, committed, purged, last })
    }

    /// Index of the first entry that is not purged.
    pub(crate) fn first_index(&self) -> u64 {
        first_index(self.purged)
    }

    /// Index that the next entry has to have.
    pub(crate) fn next_index(&self) -> u64 {
        first_index(self.last)
    }
}

fn checksum_of(bytes: &[u8; BYTES]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..4]);
    hasher.update(&bytes[8..]);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_survives() {
        let position = |present: bool, index| present.then_some(LogId::new(3, index));
        for bits in 0..32u8 {
            let bit = |number: u8| bits & (1 << number) != 0;
            let hard_state = HardState {
                sequence: 9,
                vote: bit(0).then_some(Vote { term: 4, node_id: 5, committed: bit(1) }),
                committed: position(bit(2), 6),
                purged: position(bit(3), 7),
                last: position(bit(4), 8),
            };
            assert_eq!(HardState::decode(&hard_state.encode()), Ok(hard_state));
        }
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let bytes = HardState { sequence: 1, ..HardState::default() }.encode();
        for bit in 0..BYTES * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(HardState::decode(&damaged), Err(RecordError::Checksum), "bit {bit}");
        }
    }
}
