//! What a client knows of its cluster at one moment; a change makes another picture.

use std::sync::Arc;
use std::time::Duration;

use super::config::ClientConfig;
use super::endpoint::Endpoint;
use super::link::Link;
use super::node::Node;
use super::replicas::{MAX_REPLICAS, ReplicaReads};
use crate::report::{MemberReport, NodeReport, ReplicaReport};
use crate::types::{HistoryEpoch, NodeId};

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
    /// The history of the members' state, as they say.
    pub(super) history: HistoryEpoch,
}

/// Endpoints kept at most. Beyond this what was learnt first is forgotten.
const MAX_ENDPOINTS: usize = 64;

impl Picture {
    /// All but the replicas that were learnt of: those that count where it matters who is there.
    pub(super) fn own(&self) -> impl Iterator<Item = &Arc<Link>> + Clone {
        self.links.iter().filter(|link| !link.node.replica.is_announced())
    }

    /// Who may be asked what any member can answer, and such replicas as are `replicas` behind at most, if any may be. Others
    /// only where there are no members.
    pub(super) fn readers(&self, replicas: Option<Duration>) -> Vec<&Arc<Link>> {
        let may_answer = |node: &Node| match (node.replica.is_replica(), replicas) {
            (false, _) => true,
            (true, Some(most_lag)) => node.is_healthy() && node.replica.may_answer(self.history, most_lag),
            (true, None) => false,
        };
        let is_ours = |link: &&Arc<Link>| !link.node.is_stranger();
        let mut links: Vec<_> =
            self.links.iter().filter(|link| is_ours(link) && may_answer(&link.node)).collect();
        if links.is_empty() {
            links.extend(self.own().filter(is_ours));
        }
        if links.is_empty() {
            links.extend(self.own());
        }
        links
    }

    /// Replicas that may answer reads, however fresh these are to be.
    pub(super) fn replicas(&self) -> impl Iterator<Item = &Arc<Node>> {
        let nodes = self.links.iter().map(|link| &link.node);
        nodes.filter(|node| node.is_healthy() && node.replica.may_answer(self.history, Duration::MAX))
    }

    /// Takes in what a member claims of who else there is: members, and replicas where they are read at. Returns the replicas that are new.
    pub(super) fn take_in(
        &mut self,
        status: &NodeReport,
        config: &Arc<ClientConfig>,
        is_member: bool,
    ) -> Vec<Arc<Node>> {
        for member in &status.members {
            match self.resolve(member.node_id, &member.client) {
                Some(link) => link.node.replica.is_told_to_be_a_member(),
                None => {
                    if let Ok(endpoint) = Endpoint::parse(&member.client) {
                        self.learn(endpoint, config);
                    }
                }
            }
        }
        if !is_member || config.replica_reads == ReplicaReads::Never {
            return Vec::new();
        }
        if status.term >= self.term && status.history != HistoryEpoch::UNKNOWN {
            self.history = status.history;
        }
        self.told_of(&status.replicas, config)
    }

    /// The link to `endpoint`, made if need be.
    pub(super) fn learn(&mut self, endpoint: Endpoint, config: &Arc<ClientConfig>) -> Arc<Link> {
        if let Some(link) = self.find(&endpoint) {
            return link.clone();
        }
        self.make_room();
        tracing::debug!(%endpoint, "learnt of another node");
        let link = Arc::new(Link::new(endpoint, false, config));
        self.links.push(link.clone());
        link
    }

    /// Takes in the replicas that a member tells of, and forgets those that none has told of for long. Returns those that are new.
    fn told_of(&mut self, replicas: &[ReplicaReport], config: &Arc<ClientConfig>) -> Vec<Arc<Node>> {
        let mut new = Vec::new();
        for replica in replicas.iter().filter(|replica| !replica.partial) {
            let Ok(endpoint) = Endpoint::parse(&replica.client) else { continue };
            match self.find(&endpoint) {
                Some(link) => link.node.replica.told_again(),
                None if self.may_learn_replica() => {
                    tracing::debug!(%endpoint, "learnt of a replica");
                    let link = Arc::new(Link::to(Node::announced(endpoint, config), config));
                    new.push(link.node.clone());
                    self.links.push(link);
                }
                None => {}
            }
        }
        self.links.retain(|link| !link.node.replica.is_gone(config.health_interval));
        new
    }

    fn may_learn_replica(&self) -> bool {
        let learnt = self.links.len() - self.own().count();
        learnt < MAX_REPLICAS && self.links.len() < MAX_ENDPOINTS
    }

    /// Makes room for one more node that was learnt of: a replica goes first, then the oldest member.
    fn make_room(&mut self) {
        if self.links.len() < MAX_ENDPOINTS {
            return;
        }
        let replica = self.links.iter().position(|link| link.node.replica.is_announced());
        let learnt = || self.links.iter().position(|link| !link.node.configured);
        if let Some(oldest) = replica.or_else(learnt) {
            let forgotten = self.links.remove(oldest);
            self.leader.take_if(|leader| leader.link.node.endpoint == forgotten.node.endpoint);
        }
    }

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

    /// Forgets addresses that were learnt as members', and are not those of `members`.
    pub(super) fn forget_all_but(&mut self, members: &[MemberReport]) {
        let is_of = |node: &Node, member: &MemberReport| {
            node.endpoint.as_str() == member.client
                || (node.node_id() == Some(member.node_id) && !node.is_stranger())
        };
        self.links.retain(|link| {
            link.node.configured
                || link.node.replica.is_announced()
                || members.iter().any(|member| is_of(&link.node, member))
        });
    }
}
