//! The client: one handle on a cluster, for any number of concurrent callers.
//!
//! A [`Client`] is given some endpoints and finds the rest: it learns the members and the leader from
//! whoever answers, sends writes and linearizable reads to the leader, follows it through a fail-over, and
//! spreads other reads over the healthy nodes as a [`ReadPreference`] says. All callers share one stream per
//! node; many requests travel in one message and are answered out of order.
//!
//! ```no_run
//! use quorate::ReadLevel;
//! use quorate::client::{Client, ClientConfig, Scope};
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
//! };
//! println!("version {}", reply.version);
//! drop(once);
//! client.close().await;
//! # Ok(())
//! # }
//! ```
//!
//! # What it promises
//!
//! - An operation ends by its deadline, with an answer or a [`ClientError`].
//! - Everything is repeated until it is answered or its time is over. Each call writes at most once, however often the
//!   write is sent, because it has a number in a [session](crate::session) that the client opens by itself. An
//!   operation that ends without an answer says whether it [may have been applied](ClientError::maybe_applied).
//! - To call again after an error is to make another write. [`Client::once`] is for those who must not: the same
//!   [`Once`] may be asked again after any error that is not [final](ClientError::is_final).
//! - With [`ClientConfig::exactly_once`] off, a write is repeated only when it is certain that it was not applied.
//! - A [`Watch`] goes on by itself at another node, without a gap and without repeating anything.
//! - A leader whose process is gone is noticed at once, one that hangs within a second or two, and one that
//!   was deposed without knowing it as soon as another node tells of its successor.
//!
//! # What it does not do
//!
//! It does not cache, and it does not order the operations of concurrent callers. It does not carry exactly-once
//! over the end of the process: a session is forgotten with its client. It has no TLS yet.
//!
//! # Where things are
//!
//! `admin` operates the cluster. `operation` carries one request to its end, and `judge` decides whether it may be
//! tried again; `sessions` numbers writes, `router` knows who leads and who is healthy, `connection` owns the stream to
//! one node, `node` is what the others share about that node, `streams` are the answers that come in pieces, and `contact`
//! tells whether the cluster is heard from at all. Tasks: one
//! per node that was used, one that asks after the nodes' health, and short-lived probes; none per request.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use tokio::time::Instant;

pub use crate::reason::Reason;
pub use admin::{Member, MemberChange, Members, NodeSetting, SessionInfo, SessionPage};
pub use config::{ClientConfig, Endpoint};
pub use contact::{Contact, Contacts};
pub use error::{ClientError, ConfigError};
pub use metrics::{ClientMetrics, Latencies, MethodMetrics, NodeMetrics, StreamMetrics};
pub use once::Once;
pub use preference::{Candidate, ReadPreference};
pub use reply::{
    ConditionalPut, DeleteRangeReply, DeleteReply, GetReply, Header, Item, PutReply, RangeReply, Response,
};
pub use request::{DEFAULT_ACK_TIMEOUT, Method, Range, Request, Scope, WriteOptions, end_of_prefix};
pub use status::{MemberStatus, NodeStatus};
pub use streams::{EventKind, RangeStream, Watch, WatchEvent};
pub use txn::{Compare, Comparison, NumberOf, Txn, TxnOp, TxnReply, TxnResult, ValueOf};

pub(crate) use config::{SESSION_TTL_MAX, SESSION_TTL_MIN};

use crate::types::{AckLevel, Bookmark, NodeId, ReadOptions};
use node::NoStatus;
use router::Router;
use sessions::Sessions;

mod admin;
mod config;
mod connection;
mod contact;
mod error;
mod in_flight;
mod judge;
mod metrics;
mod node;
mod once;
mod operation;
mod preference;
mod reply;
mod request;
mod router;
mod sessions;
mod status;
mod streams;
#[cfg(test)]
pub(crate) mod tests;
mod txn;

/// A handle on a cluster. Cheap to clone; all clones share their connections.
///
/// Connections are made when they are first needed, on the tokio runtime of the caller that needs them;
/// they end with that runtime. Dropping the future of an operation does not recall what was sent: a write
/// may be applied all the same.
///
/// The last clone that is dropped leaves its session to expire; [`close`](Self::close) gives it back at once.
#[derive(Clone)]
pub struct Client {
    router: Arc<Router>,
    sessions: Arc<Sessions>,
    preference: Option<ReadPreference>,
}

/// The node that leads, as a client has heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownLeader {
    /// Its id, unless it has not been asked for that yet.
    pub node_id: Option<NodeId>,
    /// Where clients reach it.
    pub client: Endpoint,
}

/// How long [`Client::close`] waits: long enough for the request to leave this process. Whether it is answered does
/// not matter.
const CLOSE_PATIENCE: Duration = Duration::from_millis(20);

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
        config.validate()?;
        let mut parsed = Vec::new();
        for endpoint in endpoints {
            let endpoint = Endpoint::parse(endpoint.as_ref())?;
            if !parsed.contains(&endpoint) {
                parsed.push(endpoint);
            }
        }
        if parsed.is_empty() {
            return Err(ConfigError::NoEndpoints);
        }
        let preference = config.read_preference.clone();
        let router = Arc::new(Router::new(parsed, config));
        Ok(Self { router, sessions: Arc::new(Sessions::new()), preference })
    }

    /// The same client, with its connections and its session, whose reads go where `preference` says.
    #[must_use]
    pub fn preferring(&self, preference: ReadPreference) -> Self {
        Self { preference: Some(preference), ..self.clone() }
    }

    /// Closes the client's session, so that the cluster need not keep it until it expires. Best effort: one
    /// attempt, and back after 20 ms at most. Call it when all writes have ended; one that is under way loses its
    /// session. A later write opens another.
    pub async fn close(&self) {
        if let Some(session) = self.sessions.take() {
            operation::close_session(&self.router, &session, Instant::now() + CLOSE_PATIENCE).await;
        }
    }

    /// Tells whether any node of the cluster answers this client, from now on. Nodes are asked every
    /// [`health_interval`](ClientConfig::health_interval) once the client has been used.
    pub fn contacts(&self) -> Contacts {
        self.router.contact.follow()
    }

    /// What this client and its clones have done so far.
    pub fn metrics(&self) -> ClientMetrics {
        self.router.metrics.snapshot(self.router.node_metrics())
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
    /// See [`ClientError`]; [`ClientError::AckTimeout`] when not every voter holds it in time.
    pub async fn put_with(
        &self,
        scope: &Scope,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
        options: impl Into<WriteOptions>,
    ) -> Result<PutReply, ClientError> {
        let (key, value, options) = (key.into(), value.into(), options.into());
        match self.execute(Request::Put { scope: scope.clone(), key, value, options }).await? {
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
        let reply = self.txn_with(scope, txn, WriteOptions { ttl: None, ..options }).await?;
        let (mut create_revision, mut version, mut current) = (0, 0, None);
        for result in reply.results {
            match result {
                TxnResult::Get(item) => current = item,
                TxnResult::Put { create_revision: created, version: puts } => {
                    (create_revision, version) = (created, puts);
                }
                _ => {}
            }
        }
        let TxnReply { header, revision, succeeded, .. } = reply;
        Ok(ConditionalPut { header, succeeded, revision, create_revision, version, current })
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
        let request = Request::Get { scope: scope.clone(), key: key.into(), read: read.into() };
        match self.execute(request).await? {
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
        let request = Request::Delete { scope: scope.clone(), key: key.into(), options: options.into() };
        match self.execute(request).await? {
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
        let request = Request::DeleteRange { scope: scope.clone(), range, options: options.into() };
        match self.execute(request).await? {
            Response::DeleteRange(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }

    /// Removes all keys that begin with `prefix`, however many: in pieces, each at a revision of its own and with the
    /// operation's time of its own, the first keys first. The reply counts all.
    ///
    /// # Errors
    /// See [`ClientError`]. The pieces before the one that failed have been removed.
    pub async fn delete_prefix(
        &self,
        scope: &Scope,
        prefix: impl Into<Bytes>,
    ) -> Result<DeleteRangeReply, ClientError> {
        let range = Range::prefix(prefix);
        let mut deleted = 0;
        loop {
            let piece = self.delete_range(scope, range.clone(), WriteOptions::default()).await?;
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
        let request = Request::Range { scope: scope.clone(), range, read: read.into() };
        match self.execute(request).await? {
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
        let request = Request::Txn { scope: scope.clone(), txn, options: options.into() };
        match self.execute(request).await? {
            Response::Txn(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }

    /// Watches the keys in `range`, whose limit does not count, from a revision on, or without one from the
    /// present: every write that is acknowledged after this call has returned shows. With one the watch connects when it is
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
        let from = match from {
            Some(from) => Bookmark { index: from.index.max(1), ..from },
            // "From now on" would mean another moment after each break of the connection.
            None => match self.execute(streams::present(scope, &range)).await? {
                Response::Range(reply) => {
                    let present = reply.header.bookmark();
                    Bookmark { index: present.index + 1, ..present }
                }
                _ => unreachable!("invariant: a response answers its request"),
            },
        };
        Ok(streams::watch(&self.router, scope, range, from, self.preference.as_ref()))
    }

    /// Executes `request`: writes on the leader, reads where level and preference say. The response is of the
    /// request's kind.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn execute(&self, request: Request) -> Result<Response, ClientError> {
        operation::execute(&self.router, &self.sessions, request, None, self.preference.as_ref()).await
    }

    /// Executes `request` on the node at `endpoint` and on no other.
    ///
    /// # Errors
    /// See [`ClientError`]; [`Reason::NotLeader`] when the node does not lead and the request needs the leader.
    pub async fn execute_at(&self, endpoint: &Endpoint, request: Request) -> Result<Response, ClientError> {
        let preference = self.preference.as_ref();
        operation::execute(&self.router, &self.sessions, request, Some(endpoint), preference).await
    }

    /// Asks the node at `endpoint` for its status; once, without retries.
    ///
    /// # Errors
    /// [`ClientError::Unavailable`] when it does not answer in time; [`ClientError::Failed`] when it answers and cannot say,
    /// as one does that is being opened.
    pub async fn status(&self, endpoint: &Endpoint) -> Result<NodeStatus, ClientError> {
        self.status_within(endpoint, self.router.config.timeout).await
    }

    /// The same, within `left` of an operation's time.
    pub(crate) async fn status_within(
        &self,
        endpoint: &Endpoint,
        left: Duration,
    ) -> Result<NodeStatus, ClientError> {
        let config = &self.router.config;
        let link = self.router.at(endpoint);
        match link.node.status(left.min(config.connect_timeout + config.attempt_timeout)).await {
            Ok(status) => {
                self.router.heard(&link.node, &status);
                Ok(NodeStatus::from_wire(endpoint.clone(), status))
            }
            Err(NoStatus::Refused(failure)) => {
                let reason = failure.reason();
                Err(judge::failed(endpoint, reason, failure.message, failure.maybe_applied))
            }
            Err(NoStatus::Unanswered(why)) => {
                Err(ClientError::Unavailable { tried: vec![(endpoint.clone(), why.to_string())] })
            }
        }
    }

    /// Asks all endpoints that the client was made with, at the same time.
    pub async fn status_all(&self) -> Vec<(Endpoint, Result<NodeStatus, ClientError>)> {
        let ask = |endpoint: Endpoint| async move {
            let status = self.status(&endpoint).await;
            (endpoint, status)
        };
        join_all(self.router.endpoints(true).into_iter().map(ask)).await
    }

    /// Who leads, as far as this client has learnt from answers; it asks nobody. The leader that a node has named counts
    /// although it is not reached. `None` when no leader is known, or when the one that was known has been lost.
    pub fn known_leader(&self) -> Option<KnownLeader> {
        self.router.known_leader()
    }

    /// As [`known_leader`](Self::known_leader), but asks the nodes when it is not known, for as long as `patience` at most.
    pub(crate) async fn find_leader(&self, patience: Duration) -> Option<KnownLeader> {
        if self.known_leader().is_none() {
            self.router.seek_leader(patience).await;
        }
        self.known_leader()
    }

    /// All endpoints known at present: those given, then those learnt.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.router.endpoints(false)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("endpoints", &self.endpoints()).finish_non_exhaustive()
    }
}
