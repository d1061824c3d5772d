//! The admin service: what it asks of the node, and what callers are told.

use tonic::{Request, Status};

use super::fake::WELL;
use super::*;
use crate::door::Answerer;
use crate::node::admin::AdminService;
use crate::node::settings::{LogLevel, NodeSettings};
use crate::proto::v1::admin_server::Admin;

fn service() -> AdminService<FakeNode> {
    admin_of(FakeNode::new(), None)
}

/// The service in front of `node`.
pub(super) fn admin_of(node: FakeNode, log_level: Option<LogLevel>) -> AdminService<FakeNode> {
    AdminService {
        by: Answerer::of(&node),
        settings: NodeSettings::new(node.clone(), log_level, [("node_id", 7.into())]),
        followers: Default::default(),
        metrics: metrics().0,
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
    assert_eq!(changed.joint, Some(true));
    assert!(list.joint && list.leader.unwrap().node_id == 7);
    let leader = node.transfer_leader(Request::new(v1::TransferLeaderRequest::default())).await.unwrap();
    assert_eq!(leader.into_inner().leader.unwrap().node_id, WELL);
    let snapshot = node.snapshot(Request::new(v1::SnapshotRequest {})).await.unwrap().into_inner();
    assert_eq!(snapshot.position.unwrap().index, 4);
}

#[tokio::test]
async fn refusals_carry_their_reason() {
    let (counted, registry) = metrics();
    let node = AdminService { metrics: counted, ..service() };
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
    let metrics = crate::node::metrics::encode(&registry).unwrap();
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
