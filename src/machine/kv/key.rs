//! Composite keys and the limits on their parts.
//!
//! The composite key of an item is `tenant NUL collection NUL key`. Names contain no NUL, so two
//! different triples never give the same bytes, and all keys of one collection stand together in the
//! order of their bytes. The encoding is part of the snapshot format.

use serde::{Deserialize, Serialize};

/// Longest tenant or collection name, in bytes.
///
/// Limits on what is stored may be raised, never lowered: logs and snapshots hold what older limits let in.
pub const MAX_NAME_BYTES: usize = 128;

/// Longest key, in bytes. Keys are compared on every step of a lookup and copied into log entries; what is
/// longer belongs into the value.
pub const MAX_KEY_BYTES: usize = 4 * 1024;

/// Longest value, in bytes. A value travels in one log entry, which must fit one message to a peer.
pub const MAX_VALUE_BYTES: usize = 1024 * 1024;

/// Longest composite key, in bytes.
pub(super) const MAX_COMPOSITE_BYTES: usize = 2 * (MAX_NAME_BYTES + 1) + MAX_KEY_BYTES;

/// Ends each of the two names in a composite key.
const SEPARATOR: u8 = 0;

/// Why a command or query was not accepted. Encoded by variant index: add variants at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum KvRejection {
    /// A tenant or collection name is empty.
    #[error("tenant and collection must not be empty")]
    EmptyName,
    /// A tenant or collection name is too long.
    #[error("a tenant or collection name has {bytes} bytes, more than the limit of {MAX_NAME_BYTES} bytes")]
    NameTooLong {
        /// Its length.
        bytes: u64,
    },
    /// A tenant or collection name contains a NUL character.
    #[error("tenant and collection must not contain a NUL character")]
    NameContainsNul,
    /// The key is empty.
    #[error("the key must not be empty")]
    EmptyKey,
    /// The key, or a bound of a range, is too long.
    #[error("the key has {bytes} bytes, more than the limit of {MAX_KEY_BYTES} bytes")]
    KeyTooLong {
        /// Its length.
        bytes: u64,
    },
    /// The value is too long.
    #[error("the value has {bytes} bytes, more than the limit of {MAX_VALUE_BYTES} bytes")]
    ValueTooLong {
        /// Its length.
        bytes: u64,
    },
}

/// Checks a full address of an item.
pub(super) fn check(tenant: &str, collection: &str, key: &[u8]) -> Result<(), KvRejection> {
    check_names(tenant, collection)?;
    match key.len() {
        0 => Err(KvRejection::EmptyKey),
        bytes if bytes > MAX_KEY_BYTES => Err(KvRejection::KeyTooLong { bytes: bytes as u64 }),
        _ => Ok(()),
    }
}

pub(super) fn check_names(tenant: &str, collection: &str) -> Result<(), KvRejection> {
    for name in [tenant, collection] {
        if name.is_empty() {
            return Err(KvRejection::EmptyName);
        }
        if name.len() > MAX_NAME_BYTES {
            return Err(KvRejection::NameTooLong { bytes: name.len() as u64 });
        }
        if name.as_bytes().contains(&SEPARATOR) {
            return Err(KvRejection::NameContainsNul);
        }
    }
    Ok(())
}

pub(super) fn check_value(value: &[u8]) -> Result<(), KvRejection> {
    if value.len() > MAX_VALUE_BYTES {
        return Err(KvRejection::ValueTooLong { bytes: value.len() as u64 });
    }
    Ok(())
}

/// Checks the start or end of a range: empty is fine, and so is the successor of the longest key.
pub(super) fn check_bound(bound: &[u8]) -> Result<(), KvRejection> {
    if bound.len() > MAX_KEY_BYTES + 1 {
        return Err(KvRejection::KeyTooLong { bytes: bound.len() as u64 });
    }
    Ok(())
}

/// The composite key of `key`.
pub(super) fn composite(tenant: &str, collection: &str, key: &[u8]) -> Vec<u8> {
    let mut composite = Vec::with_capacity(tenant.len() + collection.len() + key.len() + 2);
    push_names(&mut composite, tenant, collection);
    composite.extend_from_slice(key);
    composite
}

/// What the composite keys of a collection begin with.
pub(super) fn prefix(tenant: &str, collection: &str) -> Vec<u8> {
    let mut prefix = Vec::with_capacity(tenant.len() + collection.len() + 2);
    push_names(&mut prefix, tenant, collection);
    prefix
}

fn push_names(composite: &mut Vec<u8>, tenant: &str, collection: &str) {
    composite.extend_from_slice(tenant.as_bytes());
    composite.push(SEPARATOR);
    composite.extend_from_slice(collection.as_bytes());
    composite.push(SEPARATOR);
}

/// The composite key of `key` in the collection with this prefix.
pub(super) fn within(prefix: &[u8], key: &[u8]) -> Vec<u8> {
    [prefix, key].concat()
}

/// A bound above every key of the collection with this prefix, and below every other one after it.
pub(super) fn collection_end(prefix: &[u8]) -> Vec<u8> {
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
            let prefix = prefix(tenant, collection);
            let end = collection_end(&prefix);
            for (other_tenant, other_collection) in collections {
                for key in [&[0_u8][..], &[1], &[255; 8], b"b\0k"] {
                    let composite = composite(other_tenant, other_collection, key);
                    assert!(is_composite(&composite));
                    let inside = (prefix.as_slice()..end.as_slice()).contains(&composite.as_slice());
                    assert_eq!(inside, (tenant, collection) == (other_tenant, other_collection));
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
