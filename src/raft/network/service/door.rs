//! Whom the answering side admits.

use std::collections::BTreeMap;

use futures::FutureExt;
use futures::future::BoxFuture;
use openraft::async_runtime::watch::WatchReceiver as _;
use tokio::sync::mpsc;

use super::PeerService;
use crate::machine::StateMachine;
use crate::proto::peer::{Hello, Request, Response};
use crate::raft::network::admission::{self, CallerRefused, KnownCluster, OwnSide, Wish};
use crate::raft::network::incoming::Incoming;
use crate::raft::network::wire;
use crate::raft::network::{IdentifyRequest, IdentifyResponse, PeerDoor, Refusal};
use crate::raft::type_config;
use crate::types::{InitialState, NodeId};

impl<M: StateMachine> PeerService<M> {
    fn known(&self, caller: NodeId) -> KnownCluster {
        let metrics = self.raft.metrics().borrow_watched().clone();
        let position = |at: &Option<type_config::LogId>| at.as_ref().map(type_config::from_log_id);
        let members = metrics.membership_config.membership().nodes();
        let committed = &metrics.committed_membership_config;
        KnownCluster {
            members: members.map(|(node_id, member)| (*node_id, member.incarnation)).collect(),
            at: position(metrics.membership_config.log_id()),
            committed_caller: committed.membership().get_node(&caller).map(|member| member.incarnation),
            committed_at: position(committed.log_id()),
        }
    }

    /// Lets a caller in, or tells it and the log why not.
    fn check(&self, hello: &Hello, wish: Wish) -> Result<(), Refusal> {
        let callee = &self.callee;
        let own =
            OwnSide { cluster: &callee.cluster, node_id: callee.node_id, incarnation: callee.incarnation };
        let known = self.known(hello.from_node);
        if let Err(refused) = admission::check(own, &known, hello, wish) {
            let CallerRefused { told, why, claim } = *refused;
            self.log_refusal(hello.from_node, &why);
            if let Some(claim) = claim {
                (callee.claimed)(claim);
            }
            return Err(told);
        }
        let running = self.raft.metrics().borrow_watched().running_state.clone();
        running.map_err(|fatal| Refusal::Stopped(type_config::fatal(&fatal)))
    }

    /// Refuses to found a cluster with whoever begins with another state, or does not say so where that matters.
    fn check_founders_state(
        &self,
        from: NodeId,
        ours: InitialState,
        theirs: Option<InitialState>,
    ) -> Result<(), Refusal> {
        let refusal = match theirs {
            Some(theirs) if ours.differs_from(&theirs) || ours.is_restored != theirs.is_restored => {
                Refusal::OtherState { node_id: self.callee.node_id, ours, theirs }
            }
            None if ours.is_restored => {
                let silent = "the caller does not say what its state begins with, and a restored state must be the same on all founders";
                Refusal::Malformed(silent.to_owned())
            }
            Some(_) | None => return Ok(()),
        };
        self.log_refusal(from, &refusal);
        Err(refusal)
    }

    fn log_refusal(&self, node: NodeId, why: &Refusal) {
        if let Some(unsaid) = self.complaints.is_due() {
            tracing::warn!(node, %why, unsaid, "refused a peer");
        }
    }
}

impl<M: StateMachine> PeerDoor for PeerService<M> {
    fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        self.check(hello, Wish::Exchange)
    }

    fn identify(&self, request: IdentifyRequest) -> Result<IdentifyResponse, Refusal> {
        let theirs: BTreeMap<NodeId, String> = request.founders.into_iter().collect();
        // All that a caller without a name could be.
        let hello = request.hello.ok_or(Refusal::Stranger)?;
        self.check(&hello, if theirs.is_empty() { Wish::Identity } else { Wish::Founding })?;
        let callee = &self.callee;
        if theirs.is_empty() {
            // Not about forming a cluster: then a node that does form one must not be drawn into another.
            let membership = self.raft.metrics().borrow_watched().membership_config.clone();
            if membership.membership().get_joint_config().is_empty() && !callee.joins {
                return Err(Refusal::NotJoining { node_id: callee.node_id });
            }
        } else if theirs != callee.founders {
            if let Some(unsaid) = self.complaints.is_due() {
                let (ours, theirs) = (list(&callee.founders), list(&theirs));
                tracing::warn!(
                    node = hello.from_node,
                    ours,
                    theirs,
                    unsaid,
                    "nodes disagree on the founding members"
                );
            }
            return Err(Refusal::OtherFounders { node_id: callee.node_id, theirs: list(&theirs) });
        } else if let Some(ours) = callee.initial_state {
            self.check_founders_state(hello.from_node, ours, request.state.map(wire::from_initial_state))?;
        }
        Ok(IdentifyResponse {
            node_id: callee.node_id,
            incarnation: callee.incarnation.to_string(),
            peer_address: callee.peer_address.clone(),
            client_address: callee.client_address.clone(),
            machines: wire::readable_versions(M::MACHINES),
            state: callee.initial_state.as_ref().map(wire::initial_state),
        })
    }

    fn serve(
        &self,
        from: NodeId,
        requests: Incoming<Request>,
        responses: mpsc::Sender<Response>,
    ) -> BoxFuture<'static, ()> {
        self.clone().run(from, requests, responses).boxed()
    }
}

/// The first of `founders`, for a message.
fn list(founders: &BTreeMap<NodeId, String>) -> String {
    /// A cluster is not formed by more.
    const SHOWN: usize = 16;
    let shown = founders.iter().take(SHOWN);
    shown.map(|(id, address)| format!("{id}={}", admission::shortened(address))).collect::<Vec<_>>().join(",")
}
