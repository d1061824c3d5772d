//! The composite key, as the tree keeps it.
//!
//! Most keys are short. One of at most [`INLINE_BYTES`] stands in the tree's own nodes: it needs no allocation, which would take
//! more than the key itself, and a lookup that compares it need not go elsewhere. A longer one is shared.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// What fits into a key without an allocation. With it a key takes 32 bytes, whichever it is.
const INLINE_BYTES: usize = 30;

/// The composite key of an item; see [`key`](super::key). It is compared, and looked up, as its bytes.
#[derive(Clone)]
pub(super) struct CompositeKey(Bytes);

#[derive(Clone)]
enum Bytes {
    Inline { length: u8, bytes: [u8; INLINE_BYTES] },
    Shared(Arc<[u8]>),
}

const _: () = assert!(size_of::<CompositeKey>() == INLINE_BYTES + 2);

impl CompositeKey {
    /// The key whose bytes are those of `parts`, one after the other.
    pub(super) fn concat(parts: &[&[u8]]) -> Self {
        let length = parts.iter().map(|part| part.len()).sum();
        if length <= INLINE_BYTES {
            let mut bytes = [0; INLINE_BYTES];
            fill(&mut bytes[..length], parts);
            let length = u8::try_from(length).expect("invariant: just compared");
            return Self(Bytes::Inline { length, bytes });
        }
        // Collecting an iterator of known length allocates once; a Vec in between would be copied again.
        let mut bytes: Arc<[u8]> = std::iter::repeat_n(0, length).collect();
        fill(Arc::get_mut(&mut bytes).expect("invariant: a new allocation has one owner"), parts);
        Self(Bytes::Shared(bytes))
    }
}

/// Writes `parts` into `slot`, which they fill.
fn fill(mut slot: &mut [u8], parts: &[&[u8]]) {
    for part in parts {
        let (here, after) = slot.split_at_mut(part.len());
        here.copy_from_slice(part);
        slot = after;
    }
}

impl Deref for CompositeKey {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Bytes::Inline { length, bytes } => &bytes[..usize::from(*length)],
            Bytes::Shared(bytes) => bytes,
        }
    }
}

impl Borrow<[u8]> for CompositeKey {
    fn borrow(&self) -> &[u8] {
        self
    }
}

impl PartialEq for CompositeKey {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for CompositeKey {}

impl PartialOrd for CompositeKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for CompositeKey {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other)
    }
}

impl fmt::Debug for CompositeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_keys_are_ordered_by_their_bytes() {
        let bytes: Vec<u8> = (1..=2 * INLINE_BYTES as u8).collect();
        let keys: Vec<_> = (0..=bytes.len()).map(|end| CompositeKey::concat(&[&bytes[..end]])).collect();
        assert!(keys.is_sorted() && keys.windows(2).all(|pair| pair[0] != pair[1]));
        for (end, key) in keys.iter().enumerate() {
            assert_eq!(**key, bytes[..end]);
            let (left, right) = bytes[..end].split_at(end / 2);
            assert_eq!(*key, CompositeKey::concat(&[left, &[], right]));
            assert_eq!(matches!(key.0, Bytes::Shared(_)), end > INLINE_BYTES);
        }
        assert!(CompositeKey::concat(&[&[2]]) > *keys.last().unwrap(), "not by length");
    }
}
