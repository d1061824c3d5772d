//! The client: one handle on a cluster, for any number of concurrent callers, whichever guest its nodes serve.
//!
//! A [`Client`] is given some endpoints and finds the rest: it learns the members and the leader from
//! whoever answers, sends writes and linearizable reads to the leader, follows it through a fail-over, and
//! spreads other reads over the healthy nodes, and over [replicas](ReplicaReads), as a [`ReadPreference`] says. All callers share one stream per
//! node; many calls travel in one message and are answered out of order.
//!
//! This client knows no methods and no formats of a guest. The guest's own client wraps this one, and says which method is
//! called and with which bytes: [`MachineClient`] is that of any machine that is served as it is,
//! [`kv::client`](crate::kv::client) that of the keys.
//!
//! ```no_run
//! use quorate::ReadLevel;
//! use quorate::client::{Client, ClientConfig, WriteOptions};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::new(["10.0.0.1:7801", "10.0.0.2:7801"], ClientConfig::default())?;
//! let pushed = client.write("push", "a job", WriteOptions::default()).await?;
//! let length = client.read("length", "", pushed.header.then_read(ReadLevel::Local)).await?;
//! println!("{:?}", length.payload);
//! client.close().await;
//! # Ok(())
//! # }
//! ```
//!
//! # What it promises
//!
//! - An operation ends by its deadline, with an answer or a [`ClientError`].
//! - The client repeats a call until it is answered or its time is over. A slow leader would only be slower if it got each
//!   call twice. So a call that only the leader answers is sent to it once, and the client waits. It sends the call again
//!   only when the stream to the leader is lost, or another node leads. Each call writes at most once, however often the
//!   write is sent, because it has a number in a [session](crate::session) that the client opens by itself. An
//!   operation that ends without an answer says whether it [may have been applied](ClientError::maybe_applied).
//! - A second call after an error is another write. A caller that must not write twice uses [`Client::once`]: it may ask the
//!   same [`Once`] again after any error that is not [final](ClientError::is_final).
//! - With [`ClientConfig::exactly_once`] off, a write is repeated only when it is certain that it was not applied.
//! - A leader whose process is gone is noticed at once, one that hangs within a second or two, and one that
//!   was deposed without knowing it as soon as another node tells of its successor.
//! - A [`Subscription`] brings what was applied in order, nothing left out and nothing twice, from whichever node.
//!
//! # What it does not do
//!
//! It does not cache, and it does not order the operations of concurrent callers. It does not carry exactly-once
//! over the end of the process: a session is forgotten with its client. It has no TLS yet.
//!
//! # Where things are
//!
//! `admin` operates the cluster, by a `member_change` for one; `token` is what calls show of the client, `machine_client` speaks for a machine. `execute` makes the attempts of one call, `operation` says where the next one goes, and `judge`
//! whether there may be one; `sessions` numbers writes, `router` knows who leads and who is healthy, by its `picture` of the cluster, `connection` owns the stream to
//! one node, `replicas` are read at beside the members, `connector` how it is made, `frame` is what travels on it, and `link` leads there, `node` is what the others share about that node, and `contact` tells whether the cluster is heard from at all.
//! `following` goes on from node to node with a stream of what happens: a guest's watches, and a `subscription`.
//! Tasks: one per node that was used, one that asks after the nodes' health, and short-lived probes; none per call.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use tokio::time::Instant;

pub use crate::reason::Reason;
pub use admin::{NodeSetting, SessionInfo, SessionPage};
pub use config::ClientConfig;
pub use connector::Connector;
pub use contact::{Contact, Contacts};
pub use endpoint::{ConfigError, Endpoint};
pub use error::{ClientError, UnconfirmedAnswer};
pub use machine_client::{Answered, MachineClient, MachineOnce, Written};
pub use member_change::MemberChange;
pub use metrics::{ClientMetrics, Latencies, MethodMetrics, NodeMetrics, StreamMetrics};
pub use once::Once;
pub use options::{CallOptions, WriteOptions};
pub use preference::{Candidate, ReadPreference};
pub use replicas::ReplicaReads;
pub use subscription::{
    EntriesPage, EntryCompression, EntryFilter, FollowFrom, FollowedChange, FollowedEntry, FollowedOperation,
    FollowedProgress, ReplicationStatus, SnapshotPart, SubscribeOptions, Subscription,
};
pub(crate) use subscription::{HeldFile, StateFilePiece, StateFileStream};
pub use token::Token;

pub use crate::call::Header;
pub use crate::report::{MemberList, MemberReport, NodeReport, ReplicaReport};
pub use crate::types::DEFAULT_ACK_TIMEOUT;

pub(crate) use config::{SESSION_TTL_MAX, SESSION_TTL_MIN};

use crate::types::{NodeId, ReadOptions};
use execute::Ask;
use frame::Payload;
use node::NoStatus;
use router::Router;
use sessions::Sessions;

mod admin;
pub(crate) mod attempt;
mod config;
pub(crate) mod connection;
mod connector;
pub(crate) mod contact;
mod endpoint;
mod error;
mod execute;
pub(crate) mod following;
pub(crate) mod frame;
mod in_flight;
pub(crate) mod judge;
pub(crate) mod link;
mod machine_client;
mod member_change;
pub(crate) mod metrics;
pub(crate) mod node;
mod once;
pub(crate) mod operation;
mod options;
mod picture;
mod preference;
mod relay;
mod replicas;
pub(crate) mod router;
pub(crate) mod sessions;
mod subscription;
pub(crate) mod token;

/// A handle on a cluster. Cheap to clone; all clones share their connections.
///
/// Connections are made when they are first needed, on the tokio runtime of the caller that needs them;
/// they end with that runtime, and while nobody drives it they stand still: operations from other runtimes then wait for it beyond
/// their deadlines. Dropping the future of an operation does not recall what was sent: a write
/// may be applied all the same. What was not sent yet will not be.
///
/// The last clone that is dropped leaves its session to expire; [`close`](Self::close) gives it back at once.
#[derive(Clone)]
pub struct Client {
    pub(crate) router: Arc<Router>,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) preference: Option<ReadPreference>,
}

/// What was answered to a call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Answer {
    /// Who answered, from which state.
    pub header: Header,
    /// The response, as the method has it.
    pub payload: Bytes,
}

/// The node that leads, as a client has heard.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
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
        let (sessions, expires) = (self.sessions.take(), Instant::now() + CLOSE_PATIENCE);
        join_all(sessions.iter().map(|session| sessions::close_session(&self.router, session, expires)))
            .await;
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

    /// Writes: calls `method` with the request in `payload`.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::maybe_applied`] says whether it may have been applied all the same.
    pub async fn write(
        &self,
        method: &'static str,
        payload: impl Into<Bytes>,
        options: impl Into<WriteOptions>,
    ) -> Result<Answer, ClientError> {
        self.call(method, payload.into(), CallOptions::Write(options.into()), None, answer).await
    }

    /// Reads: calls `method` with the request in `payload`, where level and preference say. `read` is a
    /// [`ReadLevel`](crate::ReadLevel), or [`ReadOptions`] such as [`Header::then_read`] makes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn read(
        &self,
        method: &'static str,
        payload: impl Into<Bytes>,
        read: impl Into<ReadOptions>,
    ) -> Result<Answer, ClientError> {
        self.call(method, payload.into(), CallOptions::Read(read.into()), None, answer).await
    }

    /// Calls `method`, on the node at `chosen` and on no other if that is set; `decode` makes of the answer what was asked for.
    pub(crate) async fn call<T>(
        &self,
        method: &'static str,
        payload: impl Payload,
        options: CallOptions,
        chosen: Option<&Endpoint>,
        decode: impl Fn(Header, Bytes) -> Option<T>,
    ) -> Result<T, ClientError> {
        let ask = Ask { method, payload, options };
        let (router, preference) = (&self.router, self.preference.as_ref());
        execute::execute(router, &self.sessions, &ask, decode, chosen, preference).await
    }

    /// Asks the node at `endpoint` what it tells of itself; once, without retries.
    ///
    /// # Errors
    /// [`ClientError::Unavailable`] when it does not answer in time; [`ClientError::Failed`] when it answers and cannot say,
    /// as one does that is being opened.
    pub async fn status(&self, endpoint: &Endpoint) -> Result<NodeReport, ClientError> {
        self.status_within(endpoint, self.router.config.timeout).await
    }

    /// The same, within `left` of an operation's time.
    pub(crate) async fn status_within(
        &self,
        endpoint: &Endpoint,
        left: Duration,
    ) -> Result<NodeReport, ClientError> {
        let config = &self.router.config;
        let link = self.router.at(endpoint);
        match link.node.status(left.min(config.connect_timeout + config.attempt_timeout)).await {
            Ok(report) => {
                self.router.heard(&link.node, &report);
                Ok(report)
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
    pub async fn status_all(&self) -> Vec<(Endpoint, Result<NodeReport, ClientError>)> {
        let ask = |endpoint: Endpoint| async move {
            let status = self.status(&endpoint).await;
            (endpoint, status)
        };
        join_all(self.router.endpoints(true).into_iter().map(ask)).await
    }

    /// `error`, with which a part of an operation has ended after other parts were done.
    pub(crate) fn after_part(&self, error: ClientError) -> ClientError {
        error.undecided(&self.router.leader_or_next().node.endpoint)
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

    /// Replicas that may answer reads at present, however fresh these are to be: those that were given or learnt of, and answer.
    pub fn replicas(&self) -> Vec<Endpoint> {
        self.router.replicas()
    }

    /// The name of the cluster, once a node has told it.
    pub(crate) fn cluster(&self) -> Option<String> {
        self.router.cluster()
    }

    /// All endpoints known at present: those given, then those of members that were learnt.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.router.endpoints(false)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("endpoints", &self.endpoints()).finish_non_exhaustive()
    }
}

fn answer(header: Header, payload: Bytes) -> Option<Answer> {
    Some(Answer { header, payload })
}
