//! What is asked of the key-value state.

use std::time::Duration;

use bytes::Bytes;

use super::txn::Txn;
use crate::types::{AckLevel, DEFAULT_ACK_TIMEOUT, HistoryEpoch};

/// Whose keys: a collection of a tenant. Empty names mean `default`, and cost nothing to send.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Scope {
    /// The tenant.
    pub tenant: String,
    /// The collection.
    pub collection: String,
}

/// How a write is acknowledged, and how long a value lives.
///
/// ```
/// use std::time::Duration;
/// use quorate::{AckLevel, kv::WriteOptions};
///
/// let all = WriteOptions::from(AckLevel::All);
/// let lease = WriteOptions::default().with_ttl(Duration::from_secs(30));
/// # assert_eq!((all.ack, lease.ttl), (AckLevel::All, Some(Duration::from_secs(30))));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct WriteOptions {
    /// When the write is acknowledged. Default [`AckLevel::Quorum`].
    pub ack: AckLevel,
    /// [`AckLevel::All`]: how long to wait for the slowest voter, before
    /// [`ClientError::AckTimeout`](crate::client::ClientError::AckTimeout). Default 5 s. Shortened to what is left of
    /// the operation's time.
    pub ack_timeout: Duration,
    /// A put: the key is removed after this long, unless it is written again. In milliseconds, rounded up; zero is
    /// refused. Other writes refuse it; a transaction's puts have their own. Default: never.
    pub ttl: Option<Duration>,
    /// The history that the revisions in a transaction's comparisons were read in:
    /// [`Reason::OtherHistory`](crate::reason::Reason::OtherHistory), and nothing is done, where it is another one by now.
    /// Default: not checked.
    pub history: HistoryEpoch,
}

impl Default for WriteOptions {
    fn default() -> Self {
        let (ack, ack_timeout, history) = (AckLevel::default(), DEFAULT_ACK_TIMEOUT, HistoryEpoch::UNKNOWN);
        Self { ack, ack_timeout, ttl: None, history }
    }
}

impl WriteOptions {
    /// The same with another acknowledgement level.
    #[must_use]
    pub fn with_ack(self, ack: AckLevel) -> Self {
        Self { ack, ..self }
    }

    /// The same with another patience for the slowest voter.
    #[must_use]
    pub fn with_ack_timeout(self, ack_timeout: Duration) -> Self {
        Self { ack_timeout, ..self }
    }

    /// The same, of revisions that were read in this history.
    #[must_use]
    pub fn with_history(self, history: HistoryEpoch) -> Self {
        Self { history, ..self }
    }

    /// The same with a time to live.
    #[must_use]
    pub fn with_ttl(self, ttl: Duration) -> Self {
        Self { ttl: Some(ttl), ..self }
    }
}

impl From<AckLevel> for WriteOptions {
    fn from(ack: AckLevel) -> Self {
        Self::default().with_ack(ack)
    }
}

/// One operation on the key-value state. How a write of it is acknowledged, and how fresh a read must be, is said beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Sets a key.
    Put {
        /// Whose key.
        scope: Scope,
        /// The key.
        key: Bytes,
        /// Its new value.
        value: Bytes,
        /// The key is removed after this long, unless it is written again. In milliseconds, rounded up.
        ttl: Option<Duration>,
    },
    /// Reads a key.
    Get {
        /// Whose key.
        scope: Scope,
        /// The key.
        key: Bytes,
    },
    /// Removes a key.
    Delete {
        /// Whose key.
        scope: Scope,
        /// The key.
        key: Bytes,
    },
    /// Removes the keys of an interval, or the first of them.
    DeleteRange {
        /// Whose keys.
        scope: Scope,
        /// The interval.
        range: Range,
    },
    /// Reads the keys of an interval, in order.
    Range {
        /// Whose keys.
        scope: Scope,
        /// The interval.
        range: Range,
    },
    /// Compares, then does one of two lists of operations, all at one revision.
    Txn {
        /// Whose keys; operations and comparisons may name other collections of the tenant.
        scope: Scope,
        /// What to compare and to do.
        txn: Txn,
    },
}

/// An interval of keys.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Range {
    /// The first key, if it exists.
    pub start: Bytes,
    /// The first key that is not part of the interval. Empty: to the end of the collection.
    pub end: Bytes,
    /// At most this many items; 0 means the server's limit.
    pub limit_items: u32,
}

impl Range {
    /// The keys that begin with `prefix`. An empty prefix means all keys.
    pub fn prefix(prefix: impl Into<Bytes>) -> Self {
        let start = prefix.into();
        Self { end: end_of_prefix(&start), start, limit_items: 0 }
    }

    /// All keys of the collection.
    pub fn all() -> Self {
        Self::default()
    }

    /// The one key `key`.
    pub fn key(key: impl Into<Bytes>) -> Self {
        let start = key.into();
        // The next key in the order of bytes is this one with a zero byte more.
        let end = start.iter().copied().chain([0]).collect();
        Self { start, end, limit_items: 0 }
    }

    /// The same with at most `limit_items` items; 0 means the server's limit.
    #[must_use]
    pub fn with_limit(self, limit_items: u32) -> Self {
        Self { limit_items, ..self }
    }
}

/// The first key after all keys that begin with `prefix`; empty when there is none.
pub fn end_of_prefix(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    end.into()
}

/// What requests are told apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Method {
    /// [`Request::Put`]
    Put,
    /// [`Request::Get`]
    Get,
    /// [`Request::Delete`]
    Delete,
    /// [`Request::DeleteRange`]
    DeleteRange,
    /// [`Request::Range`]
    Range,
    /// [`Request::Txn`]
    Txn,
}

impl Method {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::Put, Self::Get, Self::Delete, Self::DeleteRange, Self::Range, Self::Txn];

    /// Its name in lower case, as metrics have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::Delete => "delete",
            Self::DeleteRange => "delete_range",
            Self::Range => "range",
            Self::Txn => "txn",
        }
    }

    /// Whether it changes the state.
    pub const fn is_write(self) -> bool {
        match self {
            Self::Put | Self::Delete | Self::DeleteRange | Self::Txn => true,
            Self::Get | Self::Range => false,
        }
    }
}

impl Request {
    /// Sets `key` to `value`, with what of `options` is a put's own, such as its time to live. How the write is acknowledged is said
    /// beside it.
    pub fn put(scope: Scope, key: impl Into<Bytes>, value: impl Into<Bytes>, options: &WriteOptions) -> Self {
        Self::Put { scope, key: key.into(), value: value.into(), ttl: options.ttl }
    }

    /// Which it is.
    pub fn method(&self) -> Method {
        match self {
            Self::Put { .. } => Method::Put,
            Self::Get { .. } => Method::Get,
            Self::Delete { .. } => Method::Delete,
            Self::DeleteRange { .. } => Method::DeleteRange,
            Self::Range { .. } => Method::Range,
            Self::Txn { .. } => Method::Txn,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix_is_the_next_key_that_does_not_have_it() {
        assert_eq!(end_of_prefix(b"user/"), "user0");
        assert_eq!(end_of_prefix(b"a\xff\xff"), "b");
        assert_eq!(end_of_prefix(b"\xff"), "");
        assert_eq!(end_of_prefix(b""), "");
        assert_eq!(Range::key("k").end, "k\0");
    }
}
