//! Messages between the members of a cluster.
//!
//! On one connection, a snapshot would delay heartbeats. So a node has three connections per peer: for appends, for
//! heartbeats and for snapshots. Every other member has one more connection to the leader, for what members ask of it. Each
//! connection begins with a handshake. In it each side names the cluster, its own node and incarnation, and the node and
//! incarnation that it expects. After that the caller sends requests, and the callee answers them; an id matches an answer
//! with its request. A request for a vote goes over a connection that is dialled for it. So with the default timing, round
//! trips between members should stay below 40 ms.
//!
//! - [`client`]: the calling side, what openraft sends through;
//! - [`handshake`]: what this node says of itself at the start of a connection;
//! - [`addresses`]: where members are dialled;
//! - [`leader_line`]: a node's own line to its leader;
//! - [`calls`]: what members pass on to their leader on it;
//! - `admission`: whom a node talks to;
//! - `plausible`: what a peer's messages may say;
//! - [`service`]: the answering side;
//! - [`progress`]: what is learnt of peers by talking to them;
//! - [`traffic`]: what was carried, per peer;
//! - [`wire`]: the message formats;
//! - `incoming`: messages as they arrive;
//! - [`grpc`]: both over tonic. Simulation brings a transport of its own.
//!
//! # What a transport may do to messages
//!
//! Lose them, delay them, deliver them twice or out of order. openraft's core, however, relies on appends
//! being processed and answered in order. This room sees to it: ids grow along a connection, the callee
//! drops what arrives late and answers in order, and the caller gives a connection up when an answer
//! overtakes another one or does not come in time. What a transport must not do is change messages or invent
//! them.

pub(crate) mod addresses;
pub(crate) mod admission;
mod appends;
pub(crate) mod calls;
pub(crate) mod client;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
#[cfg(feature = "peers")]
pub(crate) mod grpc;
pub(crate) mod handshake;
mod incoming;
pub(crate) mod leader_line;
#[cfg(test)]
pub(crate) mod nowhere;
pub(crate) mod plausible;
pub(crate) mod progress;
pub(crate) mod service;
pub(crate) mod traffic;
pub(crate) mod wire;

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::mpsc;

pub use crate::proto::peer::{Hello, IdentifyRequest, IdentifyResponse, Request, Response};
#[cfg(feature = "peers")]
use crate::trust::peers::Handshakes;
use crate::types::{Incarnation, InitialState, NodeId};
pub use incoming::Incoming;
use traffic::Traffic;

/// The version of the messages between members. Nodes of different versions refuse each other.
pub const PROTOCOL_VERSION: u32 = 2;

/// Requests a connection holds before its sender sees it as stalled.
pub const CONNECTION_REQUESTS: usize = 256;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// Log entries, votes and leadership transfer.
    Append,
    /// Proofs of life, which must not queue behind anything.
    Heartbeat,
    /// Snapshots, which may be large.
    Snapshot,
    /// What a member asks of its leader; answered in any order.
    Upstream,
}

/// Whom to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its id.
    pub node_id: NodeId,
    /// `host:port` of its peer port.
    pub address: String,
}

/// An open connection, after the handshake. Dropping either half closes it.
#[derive(Debug)]
pub struct Connection {
    /// To the peer.
    pub requests: mpsc::Sender<Request>,
    /// From the peer.
    pub responses: Incoming<Response>,
}

/// Why a handshake was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The two nodes speak different versions.
    #[error("protocol version {theirs} is not {ours}; run the same quorate version on all nodes")]
    ProtocolVersion {
        /// The refusing side's version.
        ours: u32,
        /// The caller's version.
        theirs: u32,
    },
    /// The caller belongs to another cluster.
    #[error(
        "this node belongs to cluster \"{ours}\", the caller to \"{theirs}\"; check addresses and --cluster"
    )]
    OtherCluster {
        /// The refusing side's cluster.
        ours: String,
        /// The caller's cluster.
        theirs: String,
    },
    /// The caller wanted to reach another node.
    #[error("this is node {ours}, not node {wanted}; check the peer addresses")]
    OtherNode {
        /// The refusing node.
        ours: NodeId,
        /// Whom the caller wanted.
        wanted: NodeId,
    },
    /// The caller's data directory is not the one its node id joined with.
    #[error(
        "node {node_id} joined this cluster with data directory {known}; another one is not trusted under the same id"
    )]
    CallerFenced {
        /// The caller.
        node_id: NodeId,
        /// The incarnation in the membership.
        known: Incarnation,
        /// Index of the refusing side's membership, if it is committed and says so too.
        at: Option<u64>,
    },
    /// The callee's data directory is not the one the caller knows.
    #[error("this node's data directory is not the one the caller's cluster knows")]
    CalleeFenced,
    /// The callee does not know the caller, and says no more than that.
    #[error(
        "this node does not answer callers that it does not know; check --cluster, the node ids and the peer addresses on both sides: the log of the node that was asked says what is wrong"
    )]
    Stranger,
    /// The refusing node has stopped because of an error.
    #[error("this node has stopped: {0}")]
    Stopped(String),
    /// The caller is no member.
    #[error("node {node_id} is not a member of this cluster; add it first, or remove its data directory")]
    UnknownPeer {
        /// The caller.
        node_id: NodeId,
        /// Index of the refusing side's membership, if it is committed and says so too.
        at: Option<u64>,
    },
    /// The callee is about to form a cluster of its own.
    #[error(
        "node {node_id} is not waiting to be added: it forms a cluster with its own --peers; start it with --join on an empty data directory"
    )]
    NotJoining {
        /// The refusing node.
        node_id: NodeId,
    },
    /// Two nodes were started with different founding members.
    #[error(
        "the nodes disagree on the founding members: the caller was given {theirs}, and node {node_id} something else, which its log says; start all with the same --peers"
    )]
    OtherFounders {
        /// The refusing node.
        node_id: NodeId,
        /// The caller's list.
        theirs: String,
    },
    /// Two nodes were started with different initial states of their machines.
    #[error(
        "node {node_id} begins with another state ({ours}) than the caller ({theirs}): start all founders with the same state, and either restore it on all of them or on none"
    )]
    OtherState {
        /// The refusing node.
        node_id: NodeId,
        /// Its initial state.
        ours: InitialState,
        /// The caller's.
        theirs: InitialState,
    },
    /// A handshake this build does not understand.
    #[error("{0}")]
    Malformed(String),
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// Nobody answered, or the connection broke.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// The peer answered and refused.
    #[error("refused: {0}")]
    Refused(Refusal),
}

impl DialError {
    /// Nothing came for so long.
    pub(crate) fn no_answer_within(patience: Duration) -> Self {
        Self::Unreachable(format!("no answer within {} ms", patience.as_millis()))
    }
}

/// Carries requests to peers and responses back. See the [module](self) for what it may do to them.
pub trait Transport: Send + Sync + 'static {
    /// Opens a connection and shakes hands.
    fn connect(
        &self,
        target: Target,
        hello: Hello,
        purpose: Purpose,
    ) -> BoxFuture<'static, Result<Connection, DialError>>;

    /// Asks the node at `address` who it is.
    fn identify(
        &self,
        address: String,
        request: IdentifyRequest,
    ) -> BoxFuture<'static, Result<IdentifyResponse, DialError>>;

    /// What it has carried, if it counts.
    fn traffic(&self) -> Option<Arc<Traffic>> {
        None
    }

    /// What its handshakes came to, if members prove to each other who they are.
    #[cfg(feature = "peers")]
    fn handshakes(&self) -> Option<Arc<Handshakes>> {
        None
    }
}

/// What a node shows to its peers: the answering side of [`Transport`].
pub trait PeerDoor: Send + Sync + 'static {
    /// Whether to talk to this caller.
    ///
    /// # Errors
    /// Why not.
    fn admit(&self, hello: &Hello) -> Result<(), Refusal>;

    /// Who this node is.
    ///
    /// # Errors
    /// As [`admit`](Self::admit).
    fn identify(&self, request: IdentifyRequest) -> Result<IdentifyResponse, Refusal>;

    /// Answers the requests of one connection, admitted for node `from`, until it ends.
    fn serve(
        &self,
        from: NodeId,
        requests: Incoming<Request>,
        responses: mpsc::Sender<Response>,
    ) -> BoxFuture<'static, ()>;
}
