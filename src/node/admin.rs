//! `quorate.v1.Admin`: what a node knows of itself and its cluster, and changes of the latter.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::{Extensions, Request, Response, Status};

use crate::call::encode_leader;
use crate::engine::{
    CATCH_UP_PATIENCE, MAX_LISTED_SESSIONS, NewAddresses, NewMember, RequestedChange, SessionList,
};
use crate::error::{MembershipError, ReadError, SnapshotError, TransferError, WriteError};
use crate::machine::sessions::SessionInfo;
use crate::proto::v1;
use crate::proto::v1::Failure;
use crate::proto::v1::admin_server::Admin;
use crate::report::NodeReport;
use crate::types::{HistoryEpoch, LogId};

use super::operated::OperatedNode;
use super::settings::NodeSettings;
use super::subscriptions::Subscribers;
use crate::door::deadline::AnswerBy;
use crate::door::methods::CLOSE_SESSION;
use crate::door::metrics::DoorMetrics;
use crate::door::rights::audit::{self, AuditedCall};
use crate::door::{Answerer, Method, permitted};
use crate::incoming::Caller;
use crate::proto::rpc::Rpc;

/// The service's name.
pub(crate) const NAME: &str = "quorate.v1.Admin";

const STATUS: Method = Method::read("status");
const MEMBER_LIST: Method = Method::read("member_list");
const ADD_MEMBER: Method = Method::write("add_member");
const PROMOTE_MEMBER: Method = Method::write("promote_member");
const DEMOTE_MEMBER: Method = Method::write("demote_member");
const REMOVE_MEMBER: Method = Method::write("remove_member");
const REPLACE_MEMBER: Method = Method::write("replace_member");
const UPDATE_MEMBER: Method = Method::write("update_member");
const TRANSFER_LEADER: Method = Method::write("transfer_leader");
const SNAPSHOT: Method = Method::read("snapshot");
const CONFIGURE: Method = Method::write("configure");
const LIST_SESSIONS: Method = Method::read("list_sessions");

/// What can be called, beside the end of a session.
pub(crate) const METHODS: [Method; 12] = [
    STATUS,
    MEMBER_LIST,
    ADD_MEMBER,
    PROMOTE_MEMBER,
    DEMOTE_MEMBER,
    REMOVE_MEMBER,
    REPLACE_MEMBER,
    UPDATE_MEMBER,
    TRANSFER_LEADER,
    SNAPSHOT,
    CONFIGURE,
    LIST_SESSIONS,
];

/// The service, over whatever node it is given.
pub(crate) struct AdminService<N> {
    pub(crate) node: N,
    pub(crate) by: Answerer,
    pub(crate) settings: NodeSettings<N>,
    pub(crate) followers: Subscribers,
    pub(crate) metrics: Arc<DoorMetrics>,
}

impl<N: OperatedNode> AdminService<N> {
    /// Does what was asked for, and counts it.
    async fn call<T, E: Into<Failure>>(
        &self,
        method: Method,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<Response<T>, Status> {
        let started = Instant::now();
        let outcome = work.await.map_err(Into::into);
        self.metrics.observe(self.metrics.methods().id(method.name), started, &outcome);
        Ok(Response::new(outcome?))
    }

    /// Makes the change that a request `asked` for.
    async fn change(&self, method: Method, asked: &Extensions, change: RequestedChange) -> Changed {
        let limit = asked.get().map(AnswerBy::left);
        self.call(method, async {
            let list = self.node.change(change, limit).await?;
            Ok::<_, MembershipError>(list.encode_changed(self.by.history()))
        })
        .await
    }

    fn position(&self, log_id: LogId) -> v1::Position {
        self.by.position(log_id)
    }
}

#[tonic::async_trait]
impl<N: OperatedNode> Admin for AdminService<N> {
    async fn status(
        &self,
        _request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        self.call(STATUS, async {
            let replicas = self.followers.replicas(&self.node);
            Ok::<_, Failure>(NodeReport { replicas, ..self.node.report() }.encode())
        })
        .await
    }

    async fn member_list(
        &self,
        _request: Request<v1::MemberListRequest>,
    ) -> Result<Response<v1::MemberListResponse>, Status> {
        let list = self.node.report().into_members().encode(self.by.history());
        self.call(MEMBER_LIST, async { Ok::<_, Failure>(list) }).await
    }

    async fn add_member(&self, request: Request<v1::AddMemberRequest>) -> Changed {
        let (_, asked, request) = request.into_parts();
        let v1::AddMemberRequest { node_id, peer, promote, timeout_ms } = request;
        let new = NewMember { node_id, peer };
        self.change(ADD_MEMBER, &asked, RequestedChange::Add { new, promote, timeout: patience(timeout_ms) })
            .await
    }

    async fn promote_member(&self, request: Request<v1::PromoteMemberRequest>) -> Changed {
        let (_, asked, request) = request.into_parts();
        let v1::PromoteMemberRequest { node_id, timeout_ms } = request;
        self.change(
            PROMOTE_MEMBER,
            &asked,
            RequestedChange::Promote { node_id, timeout: patience(timeout_ms) },
        )
        .await
    }

    async fn demote_member(&self, request: Request<v1::DemoteMemberRequest>) -> Changed {
        let (_, asked, request) = request.into_parts();
        let v1::DemoteMemberRequest { node_id, force } = request;
        self.change(DEMOTE_MEMBER, &asked, RequestedChange::Demote { node_id, force }).await
    }

    async fn remove_member(&self, request: Request<v1::RemoveMemberRequest>) -> Changed {
        let (_, asked, request) = request.into_parts();
        let v1::RemoveMemberRequest { node_id, force } = request;
        self.change(REMOVE_MEMBER, &asked, RequestedChange::Remove { node_id, force }).await
    }

    async fn replace_member(&self, request: Request<v1::ReplaceMemberRequest>) -> Changed {
        let (_, asked, request) = request.into_parts();
        let v1::ReplaceMemberRequest { node_id, new_node_id, peer, timeout_ms } = request;
        let new = NewMember { node_id: new_node_id, peer };
        self.change(
            REPLACE_MEMBER,
            &asked,
            RequestedChange::Replace { old: node_id, new, timeout: patience(timeout_ms) },
        )
        .await
    }

    async fn update_member(&self, request: Request<v1::UpdateMemberRequest>) -> Changed {
        let (_, asked, request) = request.into_parts();
        let v1::UpdateMemberRequest { node_id, peer, client } = request;
        let addresses = NewAddresses { peer: given(peer), client: given(client) };
        self.change(UPDATE_MEMBER, &asked, RequestedChange::Update { node_id, addresses }).await
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::TransferLeaderResponse>, Status> {
        let to = Some(request.into_inner().to_node).filter(|node_id| *node_id != 0);
        self.call(TRANSFER_LEADER, async {
            let leader = Some(encode_leader(self.node.transfer_leader(to).await?));
            Ok::<_, TransferError>(v1::TransferLeaderResponse { leader })
        })
        .await
    }

    async fn snapshot(
        &self,
        _request: Request<v1::SnapshotRequest>,
    ) -> Result<Response<v1::SnapshotResponse>, Status> {
        self.call(SNAPSHOT, async {
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
        self.call(LIST_SESSIONS, async {
            let list = self.node.list_sessions(after, limit).await?;
            Ok::<_, ReadError>(sessions(&self.by, list))
        })
        .await
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        let v1::CloseSessionRequest { session, .. } = request.into_inner();
        self.call(CLOSE_SESSION, async {
            let closed = self.node.close_session(session, HistoryEpoch::UNKNOWN).await?;
            Ok::<_, WriteError>(self.by.closed(closed))
        })
        .await
    }

    async fn configure(
        &self,
        request: Request<v1::ConfigureRequest>,
    ) -> Result<Response<v1::ConfigureResponse>, Status> {
        let (_, extensions, request) = request.into_parts();
        // Who only looks changes nothing.
        let (changes, principal) = (!request.settings.is_empty(), permitted::caller(&extensions));
        let permitted = if changes { permitted::operation(&principal) } else { Ok(()) };
        let address = extensions.get::<Arc<Caller>>().and_then(|caller| caller.address());
        let call = AuditedCall { path: Rpc::AdminConfigure.path(), address };
        if changes {
            // Before it is done, for it may be that less is logged from then on.
            principal.operated(&call, audit::ASKED);
        }
        let answer = self.call(CONFIGURE, async {
            permitted?;
            self.settings.configure(request).await
        });
        let answer = answer.await;
        if changes {
            principal.operated(&call, audit::outcome(answer.as_ref().err()));
        }
        answer
    }
}

type Changed = Result<Response<v1::MemberChangeResponse>, Status>;

/// The time that was asked for.
fn patience(timeout_ms: u64) -> Duration {
    match timeout_ms {
        0 => CATCH_UP_PATIENCE,
        _ => Duration::from_millis(timeout_ms),
    }
}

fn given(address: String) -> Option<String> {
    (!address.is_empty()).then_some(address)
}

/// Open sessions, their times as wall clocks show them.
fn sessions(by: &Answerer, list: SessionList) -> v1::ListSessionsResponse {
    let SessionList { applied, clock, sessions, more } = list;
    let next_after = sessions.last().filter(|_| more).map_or(0, |last| last.session);
    let info = |info: SessionInfo| v1::SessionInfo {
        session: info.session,
        opener: info.opener,
        opened_ms: clock.log_time_at(info.opened_ms),
        used_ms: clock.log_time_at(info.used_ms),
        expires_ms: clock.log_time_at(info.expires_ms),
        bytes: info.bytes as u64,
        unsettled: info.unsettled as u64,
    };
    let sessions = sessions.into_iter().map(info).collect();
    v1::ListSessionsResponse { header: Some(by.header(applied)), sessions, next_after }
}
