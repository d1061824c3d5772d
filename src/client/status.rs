//! What a node says of itself, in the client's own types.

use super::endpoint::Endpoint;
use crate::proto::v1;
use crate::types::{LogId, NodeId};

/// A node's answer to `Admin.Status`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeStatus {
    /// Where it was asked.
    pub endpoint: Endpoint,
    /// Name of its cluster.
    pub cluster: String,
    /// Its id.
    pub node_id: NodeId,
    /// The client address that it advertises.
    pub advertised: String,
    /// `learner`, `follower`, `candidate`, `leader` or `stopped`.
    pub role: String,
    /// Its term.
    pub term: u64,
    /// Whom it believes to lead.
    pub leader: Option<NodeId>,
    /// Index of its last log entry.
    pub last_log: Option<u64>,
    /// Up to where it knows the log to be committed.
    pub committed: Option<LogId>,
    /// Up to where it has applied; `state_hash` belongs to this position.
    pub applied: Option<LogId>,
    /// Hash of its state; equal on nodes that have applied the same entry. `None` from a node that does not keep it up to
    /// date.
    pub state_hash: Option<u64>,
    /// Bytes of state, as the quota counts them; `None` from a node that does not tell.
    pub state_bytes: Option<u64>,
    /// How many they may be; `None` before that is agreed.
    pub state_quota_bytes: Option<u64>,
    /// Whether an operator has set that; otherwise it follows the member with the least memory.
    pub state_quota_set: bool,
    /// Last position covered by its newest snapshot.
    pub snapshot: Option<LogId>,
    /// Up to where it has purged its log.
    pub purged: Option<LogId>,
    /// What its disk is good for: `ok`, `low`, `full` or `stalled`; empty from a node that does not tell.
    pub disk: String,
    /// The version that it runs.
    pub version: String,
    /// Whether it follows or leads, and has applied what it knows to be committed.
    pub ready: bool,
    /// Why it has stopped by itself; empty while it runs.
    pub fatal: String,
    /// How its state differs from the other nodes', for which it serves nothing; empty while it does not.
    pub diverged: String,
    /// All members that it knows, itself included.
    pub members: Vec<MemberStatus>,
}

/// One member of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemberStatus {
    /// Its id.
    pub node_id: NodeId,
    /// Its peer address.
    pub peer: String,
    /// Its client address; may be empty while it is unknown.
    pub client: String,
    /// Whether it votes.
    pub voter: bool,
}

impl NodeStatus {
    pub(super) fn from_wire(endpoint: Endpoint, status: v1::StatusResponse) -> Self {
        let position = |position: Option<v1::Position>| position.map(|p| LogId::new(p.term, p.index));
        Self {
            endpoint,
            cluster: status.cluster,
            node_id: status.node_id,
            advertised: status.endpoint,
            role: status.role,
            term: status.term,
            leader: status.leader.map(|leader| leader.node_id),
            last_log: status.last_log,
            committed: position(status.committed),
            applied: position(status.applied),
            state_hash: status.state_hash,
            state_bytes: status.state_bytes,
            state_quota_bytes: status.state_quota_bytes,
            state_quota_set: status.state_quota_set,
            diverged: status.diverged,
            snapshot: position(status.snapshot),
            purged: position(status.purged),
            disk: status.disk,
            version: status.version,
            ready: status.ready,
            fatal: status.fatal,
            members: status.members.into_iter().map(MemberStatus::from_wire).collect(),
        }
    }
}

impl MemberStatus {
    fn from_wire(member: v1::MemberInfo) -> Self {
        Self { node_id: member.node_id, peer: member.peer, client: member.client, voter: member.voter }
    }
}
