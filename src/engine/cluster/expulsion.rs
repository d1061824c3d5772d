//! Whether this node still belongs to its cluster.
//!
//! The others refuse a node that they have removed, or whose id belongs to another data directory by now. Such a node
//! must not go on as if it were only alone: it says so and stops. But whoever refuses may be behind and not know of
//! this node yet. So a refusal counts only when it stands on a committed membership that is newer than the newest one
//! in which this node knows itself to be a member.
//!
//! What a caller says proves even less: anybody can call. A node that belongs to no cluster yet and is said to have lost its
//! disk ([`Claim`]) therefore asks the claimant in its turn, by the claimant's own identity and without giving away its own, and only an answer that
//! stands on a committed membership counts. Less than that is a doubt, while which a founder that is alone does not begin:
//! members that have just lost their leader may know of no commitment yet. A founder asks where its own `--peers` say that the claimant is; one that was
//! alone knows nobody, and asks where the claimant says.
//!
//! A voter meets refusals when it asks for votes. A learner asks for nothing; a member that hears from nobody
//! therefore asks the others every now and then.
//!
//! The protocol, with a figure: `docs/design/identity.md`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::engine::NodeState;
use crate::engine::stop::fatal::Fatal;
use crate::engine::stop::until_ended;
use crate::error::FatalError;
use crate::machine::StateMachine;
use crate::raft::core::{Core, CoreMetrics};
use crate::raft::network::admission::Claim;
use crate::raft::network::handshake::OwnHandshake;
use crate::raft::network::{DialError, Hello, IdentifyRequest, Refusal, Transport};
use crate::runtime;
use crate::types::{Incarnation, NodeId};

/// How often a member that hears from nobody asks the others.
const PACE: Duration = Duration::from_secs(2);
/// How long one of them may take to answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);
/// Claims that wait to be looked into; more are dropped, as they come again.
pub(in crate::engine) const MAX_CLAIMS: usize = 8;
/// Claims are looked into no more often than this: anybody can make one.
const CLAIM_PACE: Duration = Duration::from_millis(200);
/// Doubts that follow on each other so fast are one, and logged once.
const DOUBT_PACE: Duration = Duration::from_secs(1);
/// Refusals that wait to be judged; more are dropped, as they come again.
pub(in crate::engine) const MAX_REFUSALS: usize = 64;

/// What a node needs to judge by.
pub(in crate::engine) struct Expulsion<M: StateMachine> {
    pub(in crate::engine) core: Core<M>,
    pub(in crate::engine) transport: Arc<dyn Transport>,
    pub(in crate::engine) handshake: OwnHandshake,
    /// What peers said when they refused this node.
    pub(in crate::engine) refusals: mpsc::Receiver<Refusal>,
    /// Who says that this node has lost its disk.
    pub(in crate::engine) claims: mpsc::Receiver<Claim>,
    /// The founding members this node was given, with their peer addresses.
    pub(in crate::engine) founders: BTreeMap<NodeId, String>,
    /// It was started to be added: until it is, it is no surprise that it is no member.
    pub(in crate::engine) joins: bool,
    /// What this node is.
    pub(in crate::engine) state: watch::Receiver<NodeState>,
    /// Where to say that this node must not go on.
    pub(in crate::engine) fatal: Fatal,
    /// When a claim was last borne out, if only by what a member knows that is not committed yet.
    pub(in crate::engine) doubts: watch::Sender<Option<Instant>>,
}

impl<M: StateMachine> Expulsion<M> {
    /// Watches until this node has lost its place.
    pub(in crate::engine) async fn run(mut self) {
        let mut has_been_in_touch = false;
        let mut ask_at = Instant::now() + PACE;
        let mut state = self.state.clone();
        loop {
            let out_of_touch = async {
                let out_of_touch = state.wait_for(|state| {
                    has_been_in_touch |= state.in_touch;
                    !state.in_touch
                });
                // Its sender is gone only with the node.
                drop(out_of_touch.await);
                tokio::time::sleep_until(ask_at).await;
            };
            let refusal = tokio::select! {
                refusal = self.refusals.recv() => match refusal {
                    Some(refusal) => refusal,
                    None => return until_ended().await,
                },
                Some(claim) = self.claims.recv() => {
                    self.look_into(claim).await;
                    tokio::time::sleep(CLAIM_PACE).await;
                    continue;
                }
                () = out_of_touch => {
                    // What it is told arrives as a refusal.
                    self.ask_others().await;
                    ask_at = Instant::now() + PACE;
                    continue;
                }
            };
            let OwnHandshake { node_id, incarnation, .. } = self.handshake;
            let metrics = self.core.metrics();
            has_been_in_touch |= metrics.in_touch;
            if let Some(error) = verdict(node_id, incarnation, &metrics, &refusal) {
                if self.joins && !has_been_in_touch && matches!(error, FatalError::Removed { .. }) {
                    tracing::debug!(%error, "waiting to be added again");
                    continue;
                }
                self.fatal.report(error);
                return until_ended().await;
            }
        }
    }

    /// Asks a claimant whether this node has lost its disk. What it answers is judged like any refusal.
    async fn look_into(&self, claim: Claim) {
        let address = match (self.founders.get(&claim.node_id), self.founders.len()) {
            (Some(address), _) => address.clone(),
            (None, ..=1) => claim.peer,
            (None, _) => return,
        };
        let own = self.handshake.incarnation;
        let hello = Hello {
            // Any but its own: a claimant that lies is not to learn that.
            from_incarnation: Incarnation(u128::from(runtime::random_u64().max(1))).to_string(),
            membership: None,
            ..self.handshake.towards(claim.node_id, Some(claim.incarnation))
        };
        let request = IdentifyRequest { hello: Some(hello), ..IdentifyRequest::default() };
        let asked = tokio::time::timeout(CALL_TIMEOUT, self.transport.identify(address, request)).await;
        match asked {
            Ok(Err(DialError::Refused(refusal @ Refusal::CallerFenced { known, .. }))) if known != own => {
                let before = self.doubts.send_replace(Some(Instant::now()));
                if before.is_none_or(|before| before.elapsed() > DOUBT_PACE) {
                    tracing::warn!(node = claim.node_id, %refusal, "a member knows this node by another data directory");
                }
                (self.handshake.refused)(&refusal);
            }
            _ => tracing::debug!(
                node = claim.node_id,
                "a claim that this node has lost its disk is not borne out"
            ),
        }
    }

    async fn ask_others(&self) {
        let metrics = self.core.metrics();
        let own = self.handshake.node_id;
        if metrics.in_touch || !metrics.membership.members.contains_key(&own) {
            return;
        }
        for (node_id, member) in metrics.membership.members.iter().filter(|(id, _)| **id != own) {
            let request = IdentifyRequest {
                hello: Some(self.handshake.towards(*node_id, Some(member.incarnation))),
                ..IdentifyRequest::default()
            };
            let address = self.handshake.addresses.of(*node_id, member);
            let call = self.transport.identify(address, request);
            if let Ok(Err(DialError::Refused(refusal))) = tokio::time::timeout(CALL_TIMEOUT, call).await {
                (self.handshake.refused)(&refusal);
            }
        }
    }
}

/// What a refusal means for this node, if it means anything for certain.
fn verdict(
    node_id: NodeId,
    presented: Incarnation,
    metrics: &CoreMetrics,
    refusal: &Refusal,
) -> Option<FatalError> {
    let (known, at) = match refusal {
        Refusal::CallerFenced { known, at: Some(at), .. } => (Some(*known), *at),
        Refusal::UnknownPeer { at: Some(at), .. } => (None, *at),
        Refusal::CallerFenced { at: None, .. }
        | Refusal::UnknownPeer { at: None, .. }
        | Refusal::ProtocolVersion { .. }
        | Refusal::OtherCluster { .. }
        | Refusal::OtherNode { .. }
        | Refusal::CalleeFenced
        | Refusal::Stranger
        | Refusal::Stopped(_)
        | Refusal::NotJoining { .. }
        | Refusal::OtherFounders { .. }
        | Refusal::OtherState { .. }
        | Refusal::Malformed(_) => return None,
    };
    let is_newer = match metrics.membership_at {
        // A disk without a membership, under an id that the cluster knows.
        None => known.is_some(),
        Some(own_at) => {
            let own = metrics.membership.members.get(&node_id);
            // A node that catches up has yet to read the entry that added it.
            own.is_some_and(|member| member.incarnation == presented) && at > own_at.index
        }
    };
    is_newer.then_some(match known {
        Some(known) => FatalError::Fenced { node_id, known, presented },
        None => FatalError::Removed { node_id },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{LogId, Member, Membership, Role};

    const OWN: Incarnation = Incarnation(7);

    fn metrics(at: Option<u64>, incarnation: Option<Incarnation>) -> CoreMetrics {
        let member = |incarnation| Member { incarnation, ..Member::default() };
        let members = incarnation.map(|incarnation| (3, member(incarnation))).into_iter().collect();
        CoreMetrics {
            role: Role::Follower,
            term: 1,
            leader: None,
            in_touch: false,
            last_log: at,
            committed: None,
            cluster_committed: None,
            snapshot: None,
            purged: None,
            membership: Membership { voters: Vec::new(), members },
            membership_at: at.map(|index| LogId::new(1, index)),
            committed_membership: Membership::default(),
            committed_membership_at: None,
            reachable: Default::default(),
            matched: BTreeMap::new(),
            fatal: None,
        }
    }

    fn judge(metrics: &CoreMetrics, refusal: Refusal) -> Option<FatalError> {
        verdict(3, OWN, metrics, &refusal)
    }

    fn unknown(at: Option<u64>) -> Refusal {
        Refusal::UnknownPeer { node_id: 3, at }
    }

    fn fenced(at: Option<u64>) -> Refusal {
        Refusal::CallerFenced { node_id: 3, known: Incarnation(8), at }
    }

    #[test]
    fn a_newer_committed_membership_decides() {
        let member = metrics(Some(10), Some(OWN));
        assert_eq!(judge(&member, unknown(Some(11))), Some(FatalError::Removed { node_id: 3 }));
        let replaced = FatalError::Fenced { node_id: 3, known: Incarnation(8), presented: OWN };
        assert_eq!(judge(&member, fenced(Some(11))), Some(replaced));
    }

    #[test]
    fn whoever_is_behind_or_not_sure_decides_nothing() {
        let member = metrics(Some(10), Some(OWN));
        for at in [Some(9), Some(10), None] {
            assert_eq!(judge(&member, unknown(at)), None, "{at:?}");
            assert_eq!(judge(&member, fenced(at)), None, "{at:?}");
        }
    }

    #[test]
    fn a_node_that_catches_up_waits_for_the_entry_that_added_it() {
        let before_it = metrics(Some(10), None);
        assert_eq!(judge(&before_it, unknown(Some(20))), None);
        let still_the_old_one = metrics(Some(10), Some(Incarnation(6)));
        assert_eq!(judge(&still_the_old_one, fenced(Some(20))), None);
    }

    #[test]
    fn an_empty_disk_under_a_known_id_is_fenced() {
        let empty = metrics(None, None);
        assert!(matches!(judge(&empty, fenced(Some(0))), Some(FatalError::Fenced { .. })));
        assert_eq!(judge(&empty, unknown(Some(0))), None, "formation decides about that");
    }
}
