//! `quorate.v1.Admin`: what a node knows of itself and its cluster.

use tonic::{Request, Response, Status};

use crate::proto::v1;
use crate::proto::v1::admin_server::Admin;
use crate::types::Membership;

use super::failure::leader_hint;
use super::node::KvNode;
use super::wire::position;

/// The service, over whatever node it is given.
pub(super) struct AdminService<N>(pub(super) N);

#[tonic::async_trait]
impl<N: KvNode> Admin for AdminService<N> {
    async fn status(
        &self,
        _request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        let status = self.0.status().await;
        let state = status.state;
        Ok(Response::new(v1::StatusResponse {
            cluster: status.cluster,
            node_id: state.node_id,
            endpoint: status.client,
            role: state.role.to_string(),
            term: state.term,
            ready: state.is_ready(),
            disk: state.disk.to_string(),
            fatal: state.fatal.as_ref().map(ToString::to_string).unwrap_or_default(),
            leader: state.leader.map(leader_hint),
            last_log: state.last_log,
            committed: state.committed.map(position),
            applied: state.applied.map(position),
            state_hash: status.state_hash,
            snapshot: state.snapshot.map(position),
            purged: state.purged.map(position),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            members: members(&state.membership),
            ..Default::default()
        }))
    }
}

fn members(membership: &Membership) -> Vec<v1::MemberInfo> {
    let info = |(&node_id, member): (&u64, &crate::types::Member)| v1::MemberInfo {
        node_id,
        peer: member.peer.clone(),
        client: member.client.clone(),
        voter: membership.is_voter(node_id),
        ..Default::default()
    };
    membership.members.iter().map(info).collect()
}
