//! Requests in the client's own types, and their passage to the wire.

use std::time::Duration;

use bytes::Bytes;

use super::sessions::Place;
use super::txn::Txn;
use crate::proto::v1::{self, tagged_request};
use crate::types::{AckLevel, HistoryEpoch, ReadLevel, ReadOptions, SessionSlot};

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
/// use quorate::{AckLevel, client::WriteOptions};
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
    /// [`ClientError::AckTimeout`](super::ClientError::AckTimeout). Default 5 s. Shortened to what is left of
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

/// How long [`AckLevel::All`] waits for the slowest voter unless told otherwise.
pub const DEFAULT_ACK_TIMEOUT: Duration = Duration::from_secs(5);

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

/// One operation on the key-value state.
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
        /// How it is acknowledged, and how long the value lives.
        options: WriteOptions,
    },
    /// Reads a key.
    Get {
        /// Whose key.
        scope: Scope,
        /// The key.
        key: Bytes,
        /// How fresh.
        read: ReadOptions,
    },
    /// Removes a key.
    Delete {
        /// Whose key.
        scope: Scope,
        /// The key.
        key: Bytes,
        /// How it is acknowledged.
        options: WriteOptions,
    },
    /// Removes the keys of an interval, or the first of them.
    DeleteRange {
        /// Whose keys.
        scope: Scope,
        /// The interval.
        range: Range,
        /// How it is acknowledged.
        options: WriteOptions,
    },
    /// Reads the keys of an interval, in order.
    Range {
        /// Whose keys.
        scope: Scope,
        /// The interval.
        range: Range,
        /// How fresh.
        read: ReadOptions,
    },
    /// Compares, then does one of two lists of operations, all at one revision.
    Txn {
        /// Whose keys; operations and comparisons may name other collections of the tenant.
        scope: Scope,
        /// What to compare and to do.
        txn: Txn,
        /// How it is acknowledged.
        options: WriteOptions,
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

/// Where an attempt goes, and whether repeating it is harmless.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// To the leader; repeating it is harmless only within a session.
    Write,
    /// To the leader; harmless to repeat.
    AtLeader,
    /// To any node; harmless to repeat.
    Anywhere,
}

/// What operations are counted by.
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
    pub fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::Delete => "delete",
            Self::DeleteRange => "delete_range",
            Self::Range => "range",
            Self::Txn => "txn",
        }
    }
}

impl Request {
    pub(super) fn method(&self) -> Method {
        match self {
            Self::Put { .. } => Method::Put,
            Self::Get { .. } => Method::Get,
            Self::Delete { .. } => Method::Delete,
            Self::DeleteRange { .. } => Method::DeleteRange,
            Self::Range { .. } => Method::Range,
            Self::Txn { .. } => Method::Txn,
        }
    }

    /// Of a write, how it is acknowledged.
    pub(super) fn write_options(&self) -> Option<&WriteOptions> {
        match self {
            Self::Put { options, .. }
            | Self::Delete { options, .. }
            | Self::DeleteRange { options, .. }
            | Self::Txn { options, .. } => Some(options),
            Self::Get { .. } | Self::Range { .. } => None,
        }
    }

    /// Of a read, how fresh it must be.
    pub(super) fn read_level(&self) -> Option<ReadLevel> {
        match self {
            Self::Get { read, .. } | Self::Range { read, .. } => Some(read.level),
            _ => None,
        }
    }

    /// What is wrong with it, if this can be told before it is sent.
    pub(super) fn fault(&self) -> Option<&'static str> {
        match self.write_options()?.ttl {
            Some(ttl) if ttl.is_zero() => Some("a time to live must be longer than zero"),
            Some(_) if !matches!(self, Self::Put { .. }) => Some("only a put can have a time to live"),
            _ => None,
        }
    }

    /// Bytes on the wire, give or take the framing.
    pub(super) fn size_bytes(&self) -> usize {
        let (scope, content) = match self {
            Self::Put { scope, key, value, .. } => (scope, key.len() + value.len()),
            Self::Get { scope, key, .. } | Self::Delete { scope, key, .. } => (scope, key.len()),
            Self::Range { scope, range, .. } | Self::DeleteRange { scope, range, .. } => {
                (scope, range.start.len() + range.end.len())
            }
            Self::Txn { scope, txn, .. } => (scope, txn.size_bytes()),
        };
        scope.tenant.len() + scope.collection.len() + content
    }

    /// For one attempt: in its `place` in a session if it is a write of one, with `left` of the operation's time.
    pub(super) fn into_wire(self, place: Option<&Place>, left: Duration) -> tagged_request::Request {
        match self {
            Self::Put { scope: Scope { tenant, collection }, key, value, options } => {
                let ttl_ms = options.ttl.map_or(0, whole_ms);
                let options = wire_options(&options, place, left);
                tagged_request::Request::Put(v1::PutRequest {
                    tenant,
                    collection,
                    key,
                    value,
                    ttl_ms,
                    options,
                })
            }
            Self::Get { scope: Scope { tenant, collection }, key, read } => {
                let (level, freshness) = wire_read(read);
                tagged_request::Request::Get(v1::GetRequest { tenant, collection, key, level, freshness })
            }
            Self::Delete { scope: Scope { tenant, collection }, key, options } => {
                let options = wire_options(&options, place, left);
                tagged_request::Request::Delete(v1::DeleteRequest { tenant, collection, key, options })
            }
            Self::DeleteRange { scope: Scope { tenant, collection }, range, options } => {
                let Range { start, end, limit_items: limit } = range;
                let options = wire_options(&options, place, left);
                tagged_request::Request::DeleteRange(v1::DeleteRangeRequest {
                    tenant,
                    collection,
                    start,
                    end,
                    limit,
                    options,
                })
            }
            Self::Range { scope, range, read } => {
                tagged_request::Request::Range(wire_range(scope, range, read))
            }
            Self::Txn { scope, txn, options } => {
                let options = wire_options(&options, place, left);
                tagged_request::Request::Txn(txn.into_wire(scope, options))
            }
        }
    }
}

pub(super) fn wire_range(scope: Scope, range: Range, read: ReadOptions) -> v1::RangeRequest {
    let (level, freshness) = wire_read(read);
    let Scope { tenant, collection } = scope;
    let Range { start, end, limit_items: limit } = range;
    v1::RangeRequest { tenant, collection, start, end, limit, level, freshness, at: None }
}

/// Level and freshness; the latter is left out when it says nothing.
fn wire_read(read: ReadOptions) -> (i32, Option<v1::Freshness>) {
    let (level, max_lag_ms) = match read.level {
        ReadLevel::Linearizable => (v1::ReadLevel::Linearizable, 0),
        ReadLevel::Local => (v1::ReadLevel::Local, 0),
        ReadLevel::Lease => (v1::ReadLevel::Lease, 0),
        ReadLevel::Bounded { max_lag_ms } => (v1::ReadLevel::Bounded, max_lag_ms),
    };
    let freshness = v1::Freshness { max_lag_ms, after_index: read.after_index, history: read.history.0 };
    (level.into(), (freshness != v1::Freshness::default()).then_some(freshness))
}

/// Left out when it says nothing, which saves its bytes in every request.
fn wire_options(options: &WriteOptions, place: Option<&Place>, left: Duration) -> Option<v1::WriteOptions> {
    let (ack, ack_timeout_ms) = match options.ack {
        AckLevel::Quorum => (v1::AckLevel::Quorum, 0),
        AckLevel::Leader => (v1::AckLevel::Leader, 0),
        // The server is to give up first: its answer says where the write stands, our deadline does not.
        AckLevel::All => (v1::AckLevel::All, whole_ms(options.ack_timeout.min(left / 10 * 9))),
    };
    let history = match options.history {
        HistoryEpoch::UNKNOWN => place.map_or(HistoryEpoch::UNKNOWN, Place::history),
        history => history,
    };
    if place.is_none() && ack == v1::AckLevel::Quorum && history == HistoryEpoch::UNKNOWN {
        return None;
    }
    let none = SessionSlot { session: 0, sequence: 0, first_unanswered: 0 };
    let slot = place.map_or(none, Place::slot);
    Some(v1::WriteOptions {
        history: history.0,
        session: slot.session,
        sequence: slot.sequence,
        first_unanswered: slot.first_unanswered,
        ack: ack.into(),
        ack_timeout_ms,
    })
}

/// Milliseconds, rounded up, and never zero: zero means something else on the wire.
pub(super) fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX).max(1)
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

    #[test]
    fn options_that_say_nothing_are_not_sent() {
        let left = Duration::from_secs(10);
        assert_eq!(wire_options(&WriteOptions::default(), None, left), None);
        assert_eq!(wire_read(ReadLevel::Linearizable.into()), (0, None));
        let bookmark = "9@b".parse().unwrap();
        let read = ReadOptions::from(ReadLevel::Bounded { max_lag_ms: 7 }).after(bookmark);
        let (level, freshness) = wire_read(read);
        assert_eq!(level, v1::ReadLevel::Bounded as i32);
        assert_eq!(freshness, Some(v1::Freshness { max_lag_ms: 7, after_index: 9, history: 0xb }));
    }

    #[test]
    fn the_server_gives_up_waiting_for_all_voters_before_the_client_does() {
        let all = WriteOptions::from(AckLevel::All);
        let sent = |left| wire_options(&all, None, left).unwrap().ack_timeout_ms;
        assert_eq!(sent(Duration::from_secs(10)), 5000);
        assert_eq!(sent(Duration::from_secs(1)), 900);
        assert_eq!(sent(Duration::ZERO), 1);
    }

    #[test]
    fn a_time_to_live_belongs_to_puts() {
        let delete = |options| Request::Delete { scope: Scope::default(), key: "k".into(), options };
        let put =
            |options| Request::Put { scope: Scope::default(), key: "k".into(), value: Bytes::new(), options };
        let ttl = |time| WriteOptions::default().with_ttl(time);
        assert!(put(ttl(Duration::from_micros(1))).fault().is_none());
        assert!(put(ttl(Duration::ZERO)).fault().is_some());
        assert!(delete(ttl(Duration::from_secs(1))).fault().is_some());
        assert!(delete(WriteOptions::default()).fault().is_none());
        assert_eq!(whole_ms(Duration::from_micros(1)), 1);
    }
}
