//! The client of the key-value guest: what [`client::Client`] does for any guest, in the words of this one.
//!
//! ```no_run
//! use quorate::ReadLevel;
//! use quorate::kv::client::{Client, ClientConfig, Scope};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::new(["10.0.0.1:7801", "10.0.0.2:7801"], ClientConfig::default())?;
//! let scope = Scope::default();
//! client.put(&scope, "greeting", "hello").await?;
//! let reply = client.get(&scope, "greeting", ReadLevel::Linearizable).await?;
//! assert!(reply.item.is_some_and(|item| item.value == "hello"));
//!
//! // One write, asked for until its outcome is known.
//! let mut once = client.once().await?;
//! let reply = loop {
//!     match once.put(&scope, "counter", "17").await {
//!         Ok(reply) => break reply,
//!         Err(error) if error.is_final() => return Err(error.into()),
//!         Err(error) => eprintln!("again: {error}"),
//!     }
//!     tokio::time::sleep(std::time::Duration::from_millis(100)).await;
//! };
//! println!("version {}", reply.version);
//! drop(once);
//! client.close().await;
//! # Ok(())
//! # }
//! ```
//!
//! Beside single requests there are `streams`: ranges of any size, and a [`Watch`], which goes on by itself at another node,
//! without a gap and without repeating anything. They are calls of their own, over a second connection to the node.

use std::ops::Deref;

use bytes::Bytes;

pub use super::api::*;
pub use crate::client::{
    CallOptions, Candidate, ClientConfig, ClientError, ClientMetrics, ConfigError, Contact, Contacts,
    DEFAULT_ACK_TIMEOUT, Endpoint, EntriesPage, EntryCompression, EntryFilter, FollowFrom, FollowedChange,
    FollowedEntry, FollowedOperation, Header, KnownLeader, Latencies, MemberChange, MemberList, MemberReport,
    MethodMetrics, NodeMetrics, NodeReport, NodeSetting, ReadPreference, Reason, ReplicaReads, ReplicaReport,
    ReplicationStatus, SessionInfo, SessionPage, StreamMetrics, SubscribeOptions, Subscription, Token,
    UnconfirmedAnswer,
};
pub(crate) use crate::client::{SESSION_TTL_MAX, SESSION_TTL_MIN};
pub use once::Once;
pub use streams::{RangeStream, Watch};

use super::codec;
use crate::client;
use crate::types::{AckLevel, Bookmark, ReadLevel, ReadOptions};

mod once;
mod streams;
#[cfg(test)]
pub(crate) mod tests;
mod unconfirmed;

/// A handle on a cluster with a key-value machine. Cheap to clone; all clones share their connections.
///
/// It can all that a [`client::Client`] can: ask for the status, operate the cluster.
#[derive(Debug, Clone)]
pub struct Client {
    client: client::Client,
}

impl Deref for Client {
    type Target = client::Client;

    fn deref(&self) -> &client::Client {
        &self.client
    }
}

/// A request of this guest, as the client writes it into a call.
struct Encoded(codec::RequestMessage);

impl client::frame::Payload for Encoded {
    fn size_bytes(&self) -> usize {
        codec::request_bytes(&self.0)
    }

    fn write(&self, to: &mut Vec<u8>) {
        codec::write_request(&self.0, to);
    }
}

/// `request` as the payload of a call.
fn encode(request: Request) -> Result<Encoded, ClientError> {
    match &request {
        Request::Put { ttl: Some(ttl), .. } if ttl.is_zero() => {
            Err(invalid("a time to live must be longer than zero"))
        }
        _ => Ok(Encoded(codec::encode(request))),
    }
}

/// Makes the response to `method` of an answer.
fn decode(method: Method) -> impl Fn(Header, Bytes) -> Option<Response> {
    move |header, payload| codec::decode_response(header, codec::parse_response(method, payload)?)
}

/// How a write is acknowledged.
fn acknowledged(options: &WriteOptions) -> client::WriteOptions {
    let WriteOptions { ack, ack_timeout, history, ttl: _ } = *options;
    client::WriteOptions { ack, ack_timeout, history }
}

/// The same for what has no time to live.
fn untimed(options: WriteOptions) -> Result<client::WriteOptions, ClientError> {
    match options.ttl {
        Some(_) => Err(invalid("only a put can have a time to live")),
        None => Ok(acknowledged(&options)),
    }
}

fn invalid(message: &str) -> ClientError {
    ClientError::Rejected { reason: Reason::Invalid, message: message.to_owned() }
}

impl Client {
    /// A client of the cluster that the nodes at `endpoints` (`host:port` or `http://host:port`) belong to.
    /// One endpoint is enough as long as it answers; more are better. Connects to nothing yet.
    ///
    /// # Errors
    /// [`ConfigError`] when there is no endpoint, or one or a setting is invalid.
    pub fn new<I>(endpoints: I, config: ClientConfig) -> Result<Self, ConfigError>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        Ok(Self { client: client::Client::new(endpoints, config)? })
    }

    /// The same client, with its connections and its session, whose reads go where `preference` says.
    #[must_use]
    pub fn preferring(&self, preference: ReadPreference) -> Self {
        Self { client: self.client.preferring(preference) }
    }

    /// Sets `key` to `value`.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::maybe_applied`] says whether the value may be set all the same.
    pub async fn put(
        &self,
        scope: &Scope,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
    ) -> Result<PutReply, ClientError> {
        self.put_with(scope, key, value, WriteOptions::default()).await
    }

    /// Sets `key` to `value`, acknowledged and expiring as `options` say: [`WriteOptions`] or an [`AckLevel`].
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::AckTimeout`] when not every voter holds it in time: [`PutReply::unconfirmed`] then
    /// makes the reply of it, as that of every kind of reply does.
    pub async fn put_with(
        &self,
        scope: &Scope,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
        options: impl Into<WriteOptions>,
    ) -> Result<PutReply, ClientError> {
        let options = options.into();
        let request = Request::put(scope.clone(), key, value, &options);
        match self.execute(request, acknowledged(&options)).await? {
            Response::Put(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }

    /// Sets `key` to `value` if it does not exist.
    ///
    /// # Errors
    /// See [`ClientError`]. A key that exists is no error: the reply says so.
    pub async fn put_if_absent(
        &self,
        scope: &Scope,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
    ) -> Result<ConditionalPut, ClientError> {
        let key = key.into();
        self.put_when(scope, Compare::missing(key.clone()), key, value, WriteOptions::default()).await
    }

    /// Sets `key` to `new` if its value is `expected`.
    ///
    /// # Errors
    /// See [`ClientError`]. Another value, or none, is no error: the reply says so.
    pub async fn compare_and_set(
        &self,
        scope: &Scope,
        key: impl Into<Bytes>,
        expected: impl Into<Bytes>,
        new: impl Into<Bytes>,
    ) -> Result<ConditionalPut, ClientError> {
        let key = key.into();
        let condition = Compare::value(key.clone()).equals(expected);
        self.put_when(scope, condition, key, new, WriteOptions::default()).await
    }

    /// Sets `key` to `value` if `condition` holds, whatever key that is about. Not with [`AckLevel::Leader`], which
    /// is acknowledged before it is known whether the condition holds.
    ///
    /// # Errors
    /// See [`ClientError`]. A condition that does not hold is no error: the reply says so.
    pub async fn put_when(
        &self,
        scope: &Scope,
        condition: Compare,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
        options: impl Into<WriteOptions>,
    ) -> Result<ConditionalPut, ClientError> {
        let (key, options) = (key.into(), options.into());
        if options.ack == AckLevel::Leader {
            let message = "a conditional put cannot be acknowledged before it is applied".to_owned();
            return Err(ClientError::Rejected { reason: Reason::Invalid, message });
        }
        let put = match options.ttl {
            Some(ttl) => TxnOp::put_with_ttl(key.clone(), value, ttl),
            None => TxnOp::put(key.clone(), value),
        };
        let txn = Txn::new().when(condition).then(put).otherwise(TxnOp::get(key));
        self.txn_with(scope, txn, WriteOptions { ttl: None, ..options }).await.map(ConditionalPut::of)
    }

    /// Reads `key`. The reply holds no item when the key does not exist. `read` is a [`ReadLevel`], or
    /// [`ReadOptions`] such as [`Header::then_read`] makes.
    ///
    /// # Errors
    /// See [`ClientError`].
    ///
    /// [`ReadLevel`]: crate::ReadLevel
    pub async fn get(
        &self,
        scope: &Scope,
        key: impl Into<Bytes>,
        read: impl Into<ReadOptions>,
    ) -> Result<GetReply, ClientError> {
        let request = Request::Get { scope: scope.clone(), key: key.into() };
        let read: ReadOptions = read.into();
        match self.execute(request, read).await? {
            Response::Get(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }

    /// Removes `key`. The reply says whether it existed.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::maybe_applied`] says whether the key may be gone all the same.
    pub async fn delete(&self, scope: &Scope, key: impl Into<Bytes>) -> Result<DeleteReply, ClientError> {
        self.delete_with(scope, key, WriteOptions::default()).await
    }

    /// Removes `key`, acknowledged as `options` say.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete_with(
        &self,
        scope: &Scope,
        key: impl Into<Bytes>,
        options: impl Into<WriteOptions>,
    ) -> Result<DeleteReply, ClientError> {
        let request = Request::Delete { scope: scope.clone(), key: key.into() };
        match self.execute(request, untimed(options.into())?).await? {
            Response::Delete(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }

    /// Removes the first keys of `range`, at one revision: as many as its limit and the server's allow. A reply
    /// with `more` set has left some.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete_range(
        &self,
        scope: &Scope,
        range: Range,
        options: impl Into<WriteOptions>,
    ) -> Result<DeleteRangeReply, ClientError> {
        let request = Request::DeleteRange { scope: scope.clone(), range };
        match self.execute(request, untimed(options.into())?).await? {
            Response::DeleteRange(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }

    /// Removes all keys that begin with `prefix`, however many: in pieces, each at a revision of its own and with the
    /// operation's time of its own, the first keys first. The reply counts all.
    ///
    /// # Errors
    /// See [`ClientError`]. The pieces before the one that failed have been removed: if there are any, the error says that
    /// the removal [may have been applied](ClientError::maybe_applied).
    pub async fn delete_prefix(
        &self,
        scope: &Scope,
        prefix: impl Into<Bytes>,
    ) -> Result<DeleteRangeReply, ClientError> {
        let range = Range::prefix(prefix);
        let mut deleted = 0;
        loop {
            let piece = match self.delete_range(scope, range.clone(), WriteOptions::default()).await {
                Ok(piece) => piece,
                Err(error) if deleted == 0 => return Err(error),
                Err(error) => return Err(self.client.after_part(error)),
            };
            deleted += piece.deleted;
            // A server that does not move on would keep us here for ever.
            if !piece.more || piece.deleted == 0 {
                return Ok(DeleteRangeReply { deleted, ..piece });
            }
        }
    }

    /// Reads the keys in `range`, in order. A reply with `next` set holds only the first of them.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn range(
        &self,
        scope: &Scope,
        range: Range,
        read: impl Into<ReadOptions>,
    ) -> Result<RangeReply, ClientError> {
        let request = Request::Range { scope: scope.clone(), range };
        let read: ReadOptions = read.into();
        match self.execute(request, read).await? {
            Response::Range(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }

    /// Reads all keys in `range`, however many, from one point in time, as a stream. The limit of `range` bounds the
    /// whole; 0 means no bound.
    ///
    /// # Errors
    /// See [`ClientError`]. The stream too can end with an error: see [`RangeStream`].
    pub async fn range_stream(
        &self,
        scope: &Scope,
        range: Range,
        read: impl Into<ReadOptions>,
    ) -> Result<RangeStream, ClientError> {
        streams::range(&self.router, scope, range, read.into(), self.preference.as_ref()).await
    }

    /// Compares, and does one of two lists of operations, all at one revision.
    ///
    /// # Errors
    /// See [`ClientError`]. A comparison that does not hold is no error: the reply says so.
    pub async fn txn(&self, scope: &Scope, txn: Txn) -> Result<TxnReply, ClientError> {
        self.txn_with(scope, txn, WriteOptions::default()).await
    }

    /// As [`txn`](Self::txn), acknowledged as `options` say.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn txn_with(
        &self,
        scope: &Scope,
        txn: Txn,
        options: impl Into<WriteOptions>,
    ) -> Result<TxnReply, ClientError> {
        let request = Request::Txn { scope: scope.clone(), txn };
        match self.execute(request, untimed(options.into())?).await? {
            Response::Txn(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }

    /// Watches the keys in `range`, whose limit does not count, from a revision on, or without one from the
    /// present: every write that is begun after this call has returned shows. With one the watch connects when it is
    /// first read.
    ///
    /// # Errors
    /// See [`ClientError`]: the present could not be asked for. The stream has its own: see [`Watch`].
    pub async fn watch(
        &self,
        scope: &Scope,
        range: Range,
        from: Option<Bookmark>,
    ) -> Result<Watch, ClientError> {
        self.watch_with(scope, WatchOptions { from, ..WatchOptions::of(range) }).await
    }

    /// As [`watch`](Self::watch), of several ranges, or of some kinds of events.
    ///
    /// # Errors
    /// As [`watch`](Self::watch).
    pub async fn watch_with(&self, scope: &Scope, options: WatchOptions) -> Result<Watch, ClientError> {
        let from = match options.from {
            Some(from) => Bookmark { index: from.index.max(1), ..from },
            // "From now on" would mean another moment after each break of the connection.
            None => {
                match self.execute(streams::present(scope, &options.ranges), ReadLevel::Linearizable).await? {
                    Response::Range(reply) => {
                        let present = reply.header.bookmark();
                        Bookmark { index: present.index + 1, ..present }
                    }
                    _ => unreachable!("invariant: a response answers its request"),
                }
            }
        };
        Ok(streams::watch(&self.router, scope, options, from, self.preference.as_ref()))
    }

    /// Executes `request`: writes on the leader, reads where level and preference say. The response is of the
    /// request's kind.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn execute(
        &self,
        request: Request,
        options: impl Into<CallOptions>,
    ) -> Result<Response, ClientError> {
        self.execute_on(None, request, options.into()).await
    }

    /// Executes `request` on the node at `endpoint` and on no other.
    ///
    /// # Errors
    /// See [`ClientError`]; [`Reason::NotLeader`] when the node does not lead and the request needs the leader.
    pub async fn execute_at(
        &self,
        endpoint: &Endpoint,
        request: Request,
        options: impl Into<CallOptions>,
    ) -> Result<Response, ClientError> {
        self.execute_on(Some(endpoint), request, options.into()).await
    }

    async fn execute_on(
        &self,
        chosen: Option<&Endpoint>,
        request: Request,
        options: CallOptions,
    ) -> Result<Response, ClientError> {
        let method = request.method();
        if method.is_write() != matches!(options, CallOptions::Write(_)) {
            return Err(invalid("a write is not carried out like a read, nor a read like a write"));
        }
        self.client.call(method.name(), encode(request)?, options, chosen, decode(method)).await
    }
}

#[cfg(test)]
mod unit_tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_time_to_live_belongs_to_puts() {
        let put = |ttl| {
            let options = WriteOptions::default().with_ttl(ttl);
            encode(Request::put(Scope::default(), "k", "", &options))
        };
        assert!(put(Duration::from_micros(1)).is_ok());
        assert!(put(Duration::ZERO).is_err());
        assert!(untimed(WriteOptions::default().with_ttl(Duration::from_secs(1))).is_err());
        assert!(untimed(WriteOptions::default()).is_ok());
    }
}
