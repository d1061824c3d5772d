//! What a command may hold and do, and what is answered to one that wants more.
//!
//! The limits decide which commands change the state, so they are part of what a command means: nodes that differ
//! in one would come to different states from the same log. Those on what is stored may be raised with care (by
//! every node before the first larger command), never lowered: logs and snapshots hold what older limits let in.
//! Those that are reached only while a command is applied do not change at all: a new variant brings its own.

use serde::{Deserialize, Serialize};

/// Longest tenant or collection name, in bytes.
pub const MAX_NAME_BYTES: usize = 128;

/// Longest key, in bytes. Keys are compared on every step of a lookup and copied into log entries; what is
/// longer belongs into the value.
pub const MAX_KEY_BYTES: usize = 4 * 1024;

/// Longest value, in bytes. A value travels in one log entry, which must fit one message to a peer.
pub const MAX_VALUE_BYTES: usize = 1024 * 1024;

/// Most compares of one transaction.
pub const MAX_TXN_COMPARES: usize = 128;

/// Most operations in each of the two branches of a transaction.
pub const MAX_TXN_OPERATIONS: usize = 128;

/// Most bytes of names, keys and values in one transaction, both branches together: one value of the greatest
/// length, and room for what surrounds it. What the encoding adds stays below 16 KiB.
pub const MAX_TXN_BYTES: usize = MAX_VALUE_BYTES + 256 * 1024;

/// Most bytes of keys and values that the operations of one transaction may read, each item counted with 64 bytes
/// more. They travel in the reply, and are kept with it.
pub const MAX_TXN_RESULT_BYTES: usize = 2 * 1024 * 1024;

/// Most keys that one command deletes: other commands wait while it does. A range has more: a
/// [`DeleteRange`](super::KvCommand::DeleteRange) says so, a transaction is rejected.
pub const MAX_DELETED_KEYS: usize = 10_000;

/// Most keys that one [`Expire`](super::KvCommand::Expire) removes. What is left makes the next one due at once,
/// and other commands get in between.
pub const MAX_EXPIRED_KEYS: usize = 4096;

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
    /// The time to live of a write that expires is zero.
    #[error("the time to live must be at least 1 ms")]
    NoTimeToLive,
    /// The transaction has too many compares.
    #[error("the transaction has {compares} comparisons, more than the limit of {MAX_TXN_COMPARES}")]
    TooManyCompares {
        /// How many.
        compares: u64,
    },
    /// A branch of the transaction has too many operations.
    #[error(
        "a branch of the transaction has {operations} operations, more than the limit of {MAX_TXN_OPERATIONS}"
    )]
    TooManyOperations {
        /// How many.
        operations: u64,
    },
    /// The names, keys and values of the transaction are too long together.
    #[error("the transaction has {bytes} bytes, more than the limit of {MAX_TXN_BYTES} bytes")]
    TxnTooLong {
        /// Their length.
        bytes: u64,
    },
    /// What the transaction reads is too long. Known only when it is applied.
    #[error("the transaction reads more than the limit of {MAX_TXN_RESULT_BYTES} bytes")]
    ResultsTooLong,
    /// The transaction deletes too many keys. Known only when it is applied.
    #[error("the transaction deletes more than the limit of {MAX_DELETED_KEYS} keys")]
    TooManyDeleted,
}
