//! Composite keys, and ranges of them.
//!
//! The composite key of an item is `tenant NUL collection NUL key`. Names contain no NUL, so two
//! different triples never give the same bytes, and all keys of one collection stand together in the
//! order of their bytes. The encoding is part of the snapshot format.

use std::ops::Bound;

use bytes::Bytes;

use super::composite::CompositeKey;
use super::limits::{KvRejection, MAX_KEY_BYTES, MAX_NAME_BYTES, MAX_VALUE_BYTES};

/// Longest composite key, in bytes.
pub(super) const MAX_COMPOSITE_BYTES: usize = 2 * (MAX_NAME_BYTES + 1) + MAX_KEY_BYTES;

/// Ends each of the two names in a composite key.
const SEPARATOR: u8 = 0;

/// Checks a full address of an item.
pub(super) fn check(tenant: &str, collection: &str, key: &[u8]) -> Result<(), KvRejection> {
    check_names(tenant, collection)?;
    match key.len() {
        0 => Err(KvRejection::EmptyKey),
        bytes if bytes > MAX_KEY_BYTES => Err(KvRejection::KeyTooLong { bytes: bytes as u64 }),
        _ => Ok(()),
    }
}

fn check_names(tenant: &str, collection: &str) -> Result<(), KvRejection> {
    check_name(tenant)?;
    check_name(collection)
}

pub(super) fn check_name(name: &str) -> Result<(), KvRejection> {
    if name.is_empty() {
        return Err(KvRejection::EmptyName);
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(KvRejection::NameTooLong { bytes: name.len() as u64 });
    }
    if name.as_bytes().contains(&SEPARATOR) {
        return Err(KvRejection::NameContainsNul);
    }
    Ok(())
}

pub(super) fn check_value(value: &[u8]) -> Result<(), KvRejection> {
    if value.len() > MAX_VALUE_BYTES {
        return Err(KvRejection::ValueTooLong { bytes: value.len() as u64 });
    }
    Ok(())
}

/// Checks a range of keys.
pub(super) fn check_range(
    tenant: &str,
    collection: &str,
    start: &[u8],
    end: &[u8],
) -> Result<(), KvRejection> {
    check_names(tenant, collection)?;
    check_bound(start)?;
    check_bound(end)
}

/// Checks the start or end of a range: empty is fine, and so is the successor of the longest key.
fn check_bound(bound: &[u8]) -> Result<(), KvRejection> {
    if bound.len() > MAX_KEY_BYTES + 1 {
        return Err(KvRejection::KeyTooLong { bytes: bound.len() as u64 });
    }
    Ok(())
}

/// The composite key of `key`.
pub(super) fn composite(tenant: &str, collection: &str, key: &[u8]) -> CompositeKey {
    CompositeKey::concat(&[tenant.as_bytes(), &[SEPARATOR], collection.as_bytes(), &[SEPARATOR], key])
}

/// Tenant, collection and key that `composite` stands for.
pub(super) fn parts(composite: &[u8]) -> (&str, &str, &[u8]) {
    let mut parts = composite.splitn(3, |byte| *byte == SEPARATOR);
    let mut part = || parts.next().expect("invariant: a composite key has three parts");
    let (tenant, collection, key) = (part(), part(), part());
    let name = |name| std::str::from_utf8(name).expect("invariant: names are texts");
    (name(tenant), name(collection), key)
}

/// What the composite keys of a collection begin with.
fn prefix(tenant: &str, collection: &str) -> Vec<u8> {
    let mut prefix = Vec::with_capacity(tenant.len() + collection.len() + 2);
    for name in [tenant, collection] {
        prefix.extend_from_slice(name.as_bytes());
        prefix.push(SEPARATOR);
    }
    prefix
}

/// The composite keys between two keys of one collection. Holds at least one possible key.
#[derive(Debug)]
pub(super) struct KeyRange {
    prefix_bytes: usize,
    start: Vec<u8>,
    end: Vec<u8>,
}

impl KeyRange {
    /// From `start`, inclusive, to `end`, exclusive; an empty `end` means the end of the collection. `None` when no
    /// key can be in between.
    pub(super) fn new(tenant: &str, collection: &str, start: &[u8], end: &[u8]) -> Option<Self> {
        let prefix = prefix(tenant, collection);
        let end = if end.is_empty() { collection_end(&prefix) } else { [&prefix, end].concat() };
        let start = [&prefix, start].concat();
        // The tree, like the standard library's, does not accept an empty range.
        (start < end).then_some(Self { prefix_bytes: prefix.len(), start, end })
    }

    /// The range as the tree takes it.
    pub(super) fn bounds(&self) -> (Bound<&[u8]>, Bound<&[u8]>) {
        (Bound::Included(&self.start), Bound::Excluded(&self.end))
    }

    /// The key in the collection that `composite`, which is in this range, stands for.
    pub(super) fn key(&self, composite: &[u8]) -> Bytes {
        Bytes::copy_from_slice(&composite[self.prefix_bytes..])
    }
}

/// A bound above every key of the collection with this prefix, and below every other one after it.
fn collection_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    *end.last_mut().expect("invariant: a prefix ends in a separator") = SEPARATOR + 1;
    end
}

/// Whether `composite` could have come from [`composite`] and passed [`check`].
pub(super) fn is_composite(composite: &[u8]) -> bool {
    let mut parts = composite.splitn(3, |byte| *byte == SEPARATOR);
    let (Some(tenant), Some(collection), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    match (std::str::from_utf8(tenant), std::str::from_utf8(collection)) {
        (Ok(tenant), Ok(collection)) => check(tenant, collection, key).is_ok(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::ops::RangeBounds;

    use super::*;

    #[test]
    fn limits_are_inclusive() {
        let name = "n".repeat(MAX_NAME_BYTES);
        let key = vec![b'k'; MAX_KEY_BYTES];
        assert_eq!(check(&name, &name, &key), Ok(()));
        assert_eq!(composite(&name, &name, &key).len(), MAX_COMPOSITE_BYTES);
        assert_eq!(check(&format!("{name}n"), "c", b"k"), Err(KvRejection::NameTooLong { bytes: 129 }));
        assert_eq!(check("t", "", b"k"), Err(KvRejection::EmptyName));
        assert_eq!(check("t", "a\0b", b"k"), Err(KvRejection::NameContainsNul));
        assert_eq!(check("t", "c", b""), Err(KvRejection::EmptyKey));
        let long = vec![b'k'; MAX_KEY_BYTES + 1];
        assert_eq!(check("t", "c", &long), Err(KvRejection::KeyTooLong { bytes: 4097 }));
        assert_eq!(check_bound(&long), Ok(()));
        assert_eq!(check_value(&vec![0; MAX_VALUE_BYTES]), Ok(()));
        assert!(check_value(&vec![0; MAX_VALUE_BYTES + 1]).is_err());
    }

    #[test]
    fn collections_do_not_overlap() {
        // Names chosen so that a careless encoding would interleave them.
        let collections = [("a", "b"), ("a", "b!"), ("ab", "c"), ("a\u{1}", "b"), ("a", "\u{1}")];
        for (tenant, collection) in collections {
            let range = KeyRange::new(tenant, collection, b"", b"").unwrap();
            for (other_tenant, other_collection) in collections {
                for key in [&[0_u8][..], &[1], &[255; 8], b"b\0k"] {
                    let composite = composite(other_tenant, other_collection, key);
                    assert!(is_composite(&composite));
                    assert_eq!(
                        RangeBounds::<[u8]>::contains(&range.bounds(), &composite[..]),
                        (tenant, collection) == (other_tenant, other_collection)
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_composite_key_is_recognised() {
        for garbage in [&b""[..], b"t", b"t\0c", b"t\0c\0", b"\0c\0k", b"t\0\0k", b"\xff\0c\0k"] {
            assert!(!is_composite(garbage), "{garbage:?}");
        }
    }
}
