//! What this node says of itself at the start of each connection to a peer.

use std::sync::Arc;

use super::addresses::Addresses;
use super::{PROTOCOL_VERSION, Refusal, wire};
use crate::proto::peer::Hello;
use crate::types::{Incarnation, NodeId};

/// What this node says of itself at the start of a connection to a peer, and what to do when a peer refuses that.
#[derive(Clone)]
pub(crate) struct OwnHandshake {
    /// Name of the cluster.
    pub cluster: String,
    /// This node.
    pub node_id: NodeId,
    /// Its data directory.
    pub incarnation: Incarnation,
    /// Where it is reached by its peers.
    pub peer: String,
    /// Where to dial members.
    pub addresses: Arc<Addresses>,
    /// Called when a peer refuses this node.
    pub refused: Arc<dyn Fn(&Refusal) + Send + Sync>,
}

impl OwnHandshake {
    /// The same towards `to_node`, whose incarnation is `to_incarnation` if known.
    pub(crate) fn towards(&self, to_node: NodeId, to_incarnation: Option<Incarnation>) -> Hello {
        Hello {
            protocol_version: PROTOCOL_VERSION,
            cluster: self.cluster.clone(),
            from_node: self.node_id,
            from_incarnation: self.incarnation.to_string(),
            to_node,
            to_incarnation: to_incarnation.map(|i| i.to_string()).unwrap_or_default(),
            membership: self.addresses.seen(to_node).at.map(wire::plain_log_id),
            from_peer: self.peer.clone(),
        }
    }
}
