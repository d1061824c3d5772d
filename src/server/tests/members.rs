//! The admin service: what it asks of the node, and what callers are told.

use tonic::{Request, Status};

use super::*;
use crate::engine::{MemberList, MemberState, NewAddresses, NewMember};
use crate::error::{MembershipError, SnapshotError, TransferError};
use crate::proto::v1::admin_server::Admin;
use crate::server::members::{Change, ClusterNode};
use crate::types::{Member, NodeId};

/// Changes that succeed concern this node; the others fail, each in its way.
const WELL: NodeId = 4;

impl ClusterNode for FakeNode {
    fn members(&self) -> MemberList {
        let member = Member {
            peer: "p:1".to_owned(),
            client: "c:1".to_owned(),
            incarnation: Incarnation(9),
            ..Member::default()
        };
        let state =
            MemberState { node_id: WELL, member, voter: true, matched: Some(5), reachable: Some(true) };
        MemberList {
            members: vec![state],
            leader: Some(Leader { node_id: 7, client: "here:7801".to_owned() }),
            position: Some(LogId::new(3, 5)),
            joint: true,
        }
    }

    async fn change(&self, change: Change) -> Result<MemberList, MembershipError> {
        let leader = Some(Leader { node_id: 2, client: "b:7801".to_owned() });
        match change {
            Change::Add { new: NewMember { node_id: WELL, peer }, promote: true, timeout }
                if peer == "p:1" && timeout == Duration::from_secs(60) =>
            {
                Ok(self.members())
            }
            Change::Replace { old: 3, new, timeout } if timeout == Duration::from_millis(1) => {
                assert_eq!(new, NewMember { node_id: WELL, peer: "p:1".to_owned() });
                Ok(self.members())
            }
            Change::Update { node_id: WELL, addresses } => {
                assert_eq!(addresses, NewAddresses { peer: None, client: Some("c:1".to_owned()) });
                Ok(self.members())
            }
            Change::Promote { .. } => Err(MembershipError::NotLeader { leader }),
            Change::Demote { force: true, .. } => {
                Err(MembershipError::Timeout { step: "the demotion", waited_ms: 1 })
            }
            Change::Remove { .. } => {
                Err(MembershipError::WouldWeakenQuorum { voters: 2, healthy: 1, needed: 2 })
            }
            other => panic!("{other:?}"),
        }
    }

    async fn transfer_leader(&self, to: Option<NodeId>) -> Result<Leader, TransferError> {
        match to {
            None => Ok(Leader { node_id: WELL, client: "c:1".to_owned() }),
            Some(node_id) => Err(TransferError::NotInTouch { node_id }),
        }
    }

    async fn take_snapshot(&self) -> Result<LogId, SnapshotError> {
        Ok(LogId::new(3, 4))
    }
}

fn service() -> AdminService<FakeNode> {
    admin_of(FakeNode::new(), None)
}

/// The service in front of `node`.
pub(super) fn admin_of(node: FakeNode, log_level: Option<LogLevel>) -> AdminService<FakeNode> {
    AdminService {
        settings: NodeSettings::new(node.clone(), log_level, [("node_id", 7.into())]),
        metrics: Arc::new(Metrics::new(node.clone(), Vec::new())),
        node,
    }
}

fn failure(status: &Status) -> Failure {
    details::failure(status.details()).unwrap()
}

#[tokio::test]
async fn changes_reach_the_node_and_the_membership_comes_back() {
    let node = service();
    let add =
        v1::AddMemberRequest { node_id: WELL, peer: "p:1".to_owned(), promote: true, ..Default::default() };
    let changed = node.add_member(Request::new(add)).await.unwrap().into_inner();
    assert_eq!(changed.position, Some(v1::Position { term: 3, index: 5, history: HISTORY.0 }));
    let member = &changed.members[0];
    assert_eq!((member.node_id, member.matched, member.reachable), (WELL, Some(5), Some(true)));
    assert_eq!(member.incarnation, Incarnation(9).to_string());
    let peer = "p:1".to_owned();
    let replace = v1::ReplaceMemberRequest { node_id: 3, new_node_id: WELL, peer, timeout_ms: 1 };
    node.replace_member(Request::new(replace)).await.unwrap();
    let client = "c:1".to_owned();
    let update = v1::UpdateMemberRequest { node_id: WELL, client, ..Default::default() };
    node.update_member(Request::new(update)).await.unwrap();
    let list = node.member_list(Request::new(v1::MemberListRequest {})).await.unwrap().into_inner();
    assert!(list.joint && list.leader.unwrap().node_id == 7);
    let leader = node.transfer_leader(Request::new(v1::TransferLeaderRequest::default())).await.unwrap();
    assert_eq!(leader.into_inner().leader.unwrap().node_id, WELL);
    let snapshot = node.snapshot(Request::new(v1::SnapshotRequest {})).await.unwrap().into_inner();
    assert_eq!(snapshot.position.unwrap().index, 4);
}

#[tokio::test]
async fn refusals_carry_their_reason() {
    let node = service();
    let elsewhere = node.promote_member(Request::new(Default::default())).await.unwrap_err();
    assert_eq!(failure(&elsewhere).reason(), Reason::NotLeader);
    assert_eq!(failure(&elsewhere).leader.unwrap().node_id, 2);
    let refused = node.remove_member(Request::new(Default::default())).await.unwrap_err();
    assert_eq!((refused.code(), failure(&refused).reason()), (Code::FailedPrecondition, Reason::Membership));
    assert!(refused.message().contains("--force"));
    let demote = v1::DemoteMemberRequest { node_id: 1, force: true };
    let unknown = node.demote_member(Request::new(demote)).await.unwrap_err();
    assert_eq!((unknown.code(), failure(&unknown).maybe_applied), (Code::Unknown, true));
    let transfer = v1::TransferLeaderRequest { to_node: 3 };
    let nobody = node.transfer_leader(Request::new(transfer)).await.unwrap_err();
    assert_eq!(failure(&nobody).reason(), Reason::Membership);

    node.status(Request::new(v1::StatusRequest {})).await.unwrap();
    let metrics = node.metrics.encode().unwrap();
    for line in [
        r#"quorate_server_requests_total{method="promote_member",outcome="not_leader"} 1"#,
        r#"quorate_server_requests_total{method="remove_member",outcome="membership"} 1"#,
        r#"quorate_server_requests_total{method="transfer_leader",outcome="membership"} 1"#,
        r#"quorate_server_requests_total{method="status",outcome="ok"} 1"#,
        r#"quorate_server_requests_total{method="configure",outcome="ok"} 0"#,
        r#"quorate_server_request_duration_seconds_count{method="demote_member"} 1"#,
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
}
