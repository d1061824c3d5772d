//! `quorate.v1.Admin`: what a node knows of itself and its cluster, and changes of the latter.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::{Request, Response, Status};

use crate::engine::{CATCH_UP_PATIENCE, MAX_LISTED_SESSIONS, MemberList, NewAddresses, NewMember};
use crate::error::{MembershipError, ReadError, SnapshotError, TransferError, WriteError};
use crate::proto::v1;
use crate::proto::v1::Failure;
use crate::proto::v1::admin_server::Admin;
use crate::types::{HistoryEpoch, LogId};

use super::failure::leader_hint;
use super::members::Change;
use super::metrics::Metrics;
use super::observed::ObservedNode;
use super::settings::NodeSettings;
use super::wire::{self, Answerer, Method};
use crate::types::QuotaSource;

/// The service, over whatever node it is given.
pub(super) struct AdminService<N> {
    pub(super) node: N,
    pub(super) settings: NodeSettings<N>,
    pub(super) metrics: Arc<Metrics>,
}

impl<N: ObservedNode> AdminService<N> {
    /// Does what was asked for, and counts it.
    async fn call<T, E: Into<Failure>>(
        &self,
        method: Method,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<Response<T>, Status> {
        let started = Instant::now();
        let outcome = work.await.map_err(Into::into);
        self.metrics.observe(method, started, &outcome);
        Ok(Response::new(outcome?))
    }

    async fn change(&self, method: Method, change: Change) -> Changed {
        self.call(method, async {
            let before = self.node.members().position;
            let list = self.node.change(change).await?;
            let unchanged = list.position == before;
            let position = list.position.map(|at| self.position(at));
            Ok::<_, MembershipError>(v1::MemberChangeResponse { members: members(list), position, unchanged })
        })
        .await
    }

    fn position(&self, log_id: LogId) -> v1::Position {
        Answerer::of(&self.node).position(log_id)
    }

    async fn state(&self) -> v1::StatusResponse {
        let status = self.node.status().await;
        let state = status.state;
        let (sessions, session_bytes) = self.node.sessions();
        v1::StatusResponse {
            cluster: status.cluster,
            node_id: state.node_id,
            endpoint: status.client,
            role: state.role.to_string(),
            term: state.term,
            ready: state.is_ready(),
            disk: state.disk.to_string(),
            fatal: state.fatal.as_ref().map(ToString::to_string).unwrap_or_default(),
            diverged: state.diverged.as_ref().map(ToString::to_string).unwrap_or_default(),
            leader: state.leader.map(leader_hint),
            last_log: state.last_log,
            committed: state.committed.map(|at| self.position(at)),
            applied: state.applied.map(|at| self.position(at)),
            state_hash: status.state_hash,
            snapshot: state.snapshot.map(|at| self.position(at)),
            purged: state.purged.map(|at| self.position(at)),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            members: members(self.node.members()),
            sessions: sessions as u64,
            session_bytes: session_bytes as u64,
            state_bytes: status.state_bytes,
            state_quota_bytes: status.quota.map(|quota| quota.bytes),
            state_quota_set: status.quota.is_some_and(|quota| quota.source == QuotaSource::Operator),
        }
    }
}

#[tonic::async_trait]
impl<N: ObservedNode> Admin for AdminService<N> {
    async fn status(
        &self,
        _request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        self.call(Method::Status, async { Ok::<_, Failure>(self.state().await) }).await
    }

    async fn member_list(
        &self,
        _request: Request<v1::MemberListRequest>,
    ) -> Result<Response<v1::MemberListResponse>, Status> {
        let list = self.node.members();
        let response = v1::MemberListResponse {
            leader: list.leader.clone().map(leader_hint),
            position: list.position.map(|at| self.position(at)),
            joint: list.joint,
            members: members(list),
        };
        self.call(Method::MemberList, async { Ok::<_, Failure>(response) }).await
    }

    async fn add_member(&self, request: Request<v1::AddMemberRequest>) -> Changed {
        let v1::AddMemberRequest { node_id, peer, promote, timeout_ms } = request.into_inner();
        let new = NewMember { node_id, peer };
        self.change(Method::AddMember, Change::Add { new, promote, timeout: patience(timeout_ms) }).await
    }

    async fn promote_member(&self, request: Request<v1::PromoteMemberRequest>) -> Changed {
        let v1::PromoteMemberRequest { node_id, timeout_ms } = request.into_inner();
        self.change(Method::PromoteMember, Change::Promote { node_id, timeout: patience(timeout_ms) }).await
    }

    async fn demote_member(&self, request: Request<v1::DemoteMemberRequest>) -> Changed {
        let v1::DemoteMemberRequest { node_id, force } = request.into_inner();
        self.change(Method::DemoteMember, Change::Demote { node_id, force }).await
    }

    async fn remove_member(&self, request: Request<v1::RemoveMemberRequest>) -> Changed {
        let v1::RemoveMemberRequest { node_id, force } = request.into_inner();
        self.change(Method::RemoveMember, Change::Remove { node_id, force }).await
    }

    async fn replace_member(&self, request: Request<v1::ReplaceMemberRequest>) -> Changed {
        let v1::ReplaceMemberRequest { node_id, new_node_id, peer, timeout_ms } = request.into_inner();
        let new = NewMember { node_id: new_node_id, peer };
        self.change(
            Method::ReplaceMember,
            Change::Replace { old: node_id, new, timeout: patience(timeout_ms) },
        )
        .await
    }

    async fn update_member(&self, request: Request<v1::UpdateMemberRequest>) -> Changed {
        let v1::UpdateMemberRequest { node_id, peer, client } = request.into_inner();
        let addresses = NewAddresses { peer: given(peer), client: given(client) };
        self.change(Method::UpdateMember, Change::Update { node_id, addresses }).await
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::TransferLeaderResponse>, Status> {
        let to = Some(request.into_inner().to_node).filter(|node_id| *node_id != 0);
        self.call(Method::TransferLeader, async {
            let leader = Some(leader_hint(self.node.transfer_leader(to).await?));
            Ok::<_, TransferError>(v1::TransferLeaderResponse { leader })
        })
        .await
    }

    async fn snapshot(
        &self,
        _request: Request<v1::SnapshotRequest>,
    ) -> Result<Response<v1::SnapshotResponse>, Status> {
        self.call(Method::Snapshot, async {
            let position = Some(self.position(self.node.take_snapshot().await?));
            Ok::<_, SnapshotError>(v1::SnapshotResponse { position })
        })
        .await
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        let v1::ListSessionsRequest { after, limit } = request.into_inner();
        let limit = match usize::try_from(limit) {
            Ok(limit @ 1..=MAX_LISTED_SESSIONS) => limit,
            _ => MAX_LISTED_SESSIONS,
        };
        self.call(Method::ListSessions, async {
            let list = self.node.list_sessions(after, limit).await?;
            Ok::<_, ReadError>(wire::sessions(&Answerer::of(&self.node), list))
        })
        .await
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        let v1::CloseSessionRequest { session, .. } = request.into_inner();
        self.call(Method::CloseSession, async {
            let closed = self.node.close_session(session, HistoryEpoch::UNKNOWN).await?;
            Ok::<_, WriteError>(wire::closed_session(&Answerer::of(&self.node), closed))
        })
        .await
    }

    async fn configure(
        &self,
        request: Request<v1::ConfigureRequest>,
    ) -> Result<Response<v1::ConfigureResponse>, Status> {
        self.call(Method::Configure, self.settings.configure(request.into_inner())).await
    }
}

type Changed = Result<Response<v1::MemberChangeResponse>, Status>;

/// The time that was asked for; more than any log takes to be sent is not waited for.
fn patience(timeout_ms: u64) -> Duration {
    const MAX: Duration = Duration::from_secs(24 * 60 * 60);
    match timeout_ms {
        0 => CATCH_UP_PATIENCE,
        _ => Duration::from_millis(timeout_ms).min(MAX),
    }
}

fn given(address: String) -> Option<String> {
    (!address.is_empty()).then_some(address)
}

fn members(list: MemberList) -> Vec<v1::MemberInfo> {
    let info = |state: crate::engine::MemberState| v1::MemberInfo {
        node_id: state.node_id,
        peer: state.member.peer,
        client: state.member.client,
        voter: state.voter,
        incarnation: state.member.incarnation.to_string(),
        matched: state.matched,
        reachable: state.reachable,
    };
    list.members.into_iter().map(info).collect()
}
