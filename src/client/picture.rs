//! What a client knows of its cluster at one moment; a change makes another picture.

use std::sync::Arc;

use super::endpoint::Endpoint;
use super::link::Link;
use super::node::Node;
use crate::proto::v1;
use crate::types::NodeId;

/// The node believed to lead.
#[derive(Debug, Clone)]
pub(super) struct Leader {
    pub(super) link: Arc<Link>,
    /// By its own claim or another node's, rather than by a hint.
    pub(super) confirmed: bool,
}

/// See [`router`](super::router).
#[derive(Debug, Clone, Default)]
pub(super) struct Picture {
    pub(super) links: Vec<Arc<Link>>,
    pub(super) leader: Option<Leader>,
    /// The highest term heard of.
    pub(super) term: u64,
    /// Who led last, for counting fail-overs.
    pub(super) led: Option<Endpoint>,
    /// The last leader, when it is known to lead no more or not to be reached: others may not know yet.
    pub(super) lost: Option<Endpoint>,
}

impl Picture {
    pub(super) fn find(&self, endpoint: &Endpoint) -> Option<&Arc<Link>> {
        self.links.iter().find(|link| link.node.endpoint == *endpoint)
    }

    /// The link to a node that is named by id and address. The id counts first: the user may have given
    /// another address of the same node, and that one is known to work.
    pub(super) fn resolve(&self, node_id: NodeId, address: &str) -> Option<&Arc<Link>> {
        let is_it = |node: &Node| node.node_id() == Some(node_id) && !node.is_down() && !node.is_stranger();
        let by_id = self.links.iter().find(|link| is_it(&link.node));
        by_id.or_else(|| Endpoint::parse(address).ok().and_then(|endpoint| self.find(&endpoint)))
    }

    /// Forgets addresses that were learnt, and are not those of `members`.
    pub(super) fn forget_all_but(&mut self, members: &[v1::MemberInfo]) {
        let is_of = |node: &Node, member: &v1::MemberInfo| {
            node.endpoint.as_str() == member.client
                || (node.node_id() == Some(member.node_id) && !node.is_stranger())
        };
        self.links
            .retain(|link| link.node.configured || members.iter().any(|member| is_of(&link.node, member)));
    }
}
