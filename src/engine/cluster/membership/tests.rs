//! What a change says of itself when not all of it is made.

mod script;

use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::*;
use crate::engine::tests::lone;
use crate::error::OperationError;
use crate::kv::machine::KvMachine;
use crate::raft::network::{
    Connection, DialError, Hello, IdentifyRequest, IdentifyResponse, Purpose, Target, Transport,
};
use crate::reason::Reason;
use crate::types::Membership;

const DEADLINE: Duration = Duration::from_secs(30);

/// A network in which a node that is asked at an address says that it is the one looked for, and answers nothing else; at
/// [`SILENT`] it does not even say that.
struct SaysItsName;

const SILENT: &str = "silent:1";

impl Transport for SaysItsName {
    fn connect(
        &self,
        _target: Target,
        _hello: Hello,
        _purpose: Purpose,
    ) -> BoxFuture<'static, Result<Connection, DialError>> {
        async { Err(DialError::Unreachable("connection refused".to_owned())) }.boxed()
    }

    fn identify(
        &self,
        address: String,
        request: IdentifyRequest,
    ) -> BoxFuture<'static, Result<IdentifyResponse, DialError>> {
        if address == SILENT {
            return std::future::pending().boxed();
        }
        let node_id = request.hello.map(|hello| hello.to_node).unwrap_or_default();
        let incarnation = Incarnation(u128::from(node_id)).to_string();
        let response =
            IdentifyResponse { node_id, incarnation, peer_address: address, ..IdentifyResponse::default() };
        async { Ok(response) }.boxed()
    }
}

/// Node 1, which leads a cluster of its own.
async fn leader() -> Engine<KvMachine> {
    let engine = lone::engine_among(KvMachine::default(), Arc::new(SaysItsName)).await;
    assert!(engine.ready(DEADLINE).await);
    engine
}

fn new(node_id: NodeId) -> NewMember {
    NewMember { node_id, peer: format!("n{node_id}:1") }
}

fn membership(engine: &Engine<KvMachine>) -> Membership {
    engine.inner.core.metrics().membership
}

#[tokio::test(start_paused = true)]
async fn a_change_of_which_a_part_is_made_says_so() {
    let engine = leader().await;
    let half = engine.add_member(new(4), true, Duration::ZERO).await.unwrap_err();
    let is_learner = |id| {
        let now = membership(&engine);
        now.members.contains_key(&id) && !now.is_voter(id)
    };
    assert!(is_learner(4));
    let told = half.told();
    assert_eq!((told.reason, told.maybe_applied), (Reason::Membership, true), "{half}");
    assert!(matches!(&half, MembershipError::HalfMade { source }
        if matches!(**source, MembershipError::NotReached { node_id: 4, .. })));

    // Of the same call again nothing is made: it is a member already.
    let before = engine.inner.core.metrics().membership_at;
    for again in [
        engine.add_member(new(4), true, Duration::ZERO).await.unwrap_err(),
        engine.promote_member(4, Duration::ZERO).await.unwrap_err(),
    ] {
        assert!(matches!(again, MembershipError::NotReached { node_id: 4, .. }), "{again}");
        assert!(!again.told().maybe_applied);
    }
    assert_eq!(engine.inner.core.metrics().membership_at, before);

    // The old one goes, and the new one waits for its vote: another one's, or its own with another data directory.
    engine.inner.core.change_membership(intended(4)).await.unwrap();
    let half = engine.replace_member(4, new(5), Duration::ZERO).await.unwrap_err();
    assert!(is_learner(5) && !membership(&engine).members.contains_key(&4));
    assert!(matches!(half, MembershipError::HalfMade { .. }) && half.told().maybe_applied, "{half}");
    engine.shutdown().await;
}

/// What a member is to be is noted: a voter.
fn intended(node_id: NodeId) -> MembershipChange {
    let peer = format!("n{node_id}:1");
    let incarnation = Incarnation(u128::from(node_id));
    let intents = [(node_id, Intent::Voter)].into();
    let member = Member { peer, incarnation, intents, ..Member::default() };
    MembershipChange::Readdress { node_id, member }
}

#[test]
fn what_a_step_says_after_another_is_made() {
    let leader = Some(crate::error::Leader { node_id: 2, client: "c:2".to_owned() });
    let removed_by_then = MembershipError::NotLeader { leader: leader.clone() };
    let told = removed_by_then.clone().after(true);
    assert_eq!(told, MembershipError::Interrupted { leader });
    assert_eq!(removed_by_then.clone().after(false), removed_by_then);
    let stop = stopped("x");
    assert!(!stop.told().maybe_applied && stop.clone().after(true).told().maybe_applied);
    let half = MembershipError::LastVoter { node_id: 1 }.after(true);
    assert!(
        half.told().maybe_applied && half.to_string().contains("the same command completes it"),
        "{half}"
    );
    assert_eq!(half.clone().after(true), half, "told once");
}

#[tokio::test(start_paused = true)]
async fn changes_whose_callers_are_gone_are_bounded() {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    let engine = leader().await;
    engine.add_member(new(4), false, Duration::ZERO).await.unwrap();
    let abandoned = || async { tokio::time::timeout(PAUSE, engine.promote_member(4, DAY)).await };
    for _ in 0..ChangeWaits::ForLearner.limit() {
        assert!(abandoned().await.is_err(), "it waits");
    }
    let refused = abandoned().await.unwrap().unwrap_err();
    assert!(matches!(refused, MembershipError::TooManyChanges { .. }), "{refused}");
    let told = refused.told();
    assert_eq!((told.reason, told.maybe_applied), (Reason::Overloaded, false));
    // What takes a moment is not kept out, and ends what waited for the learner.
    engine.remove_member(4, false).await.unwrap();
    let unknown = || async { engine.promote_member(4, Duration::MAX).await.unwrap_err() };
    let ended = async {
        while !matches!(unknown().await, MembershipError::UnknownMember { .. }) {
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::time::timeout(DEADLINE, ended).await.unwrap();
    engine.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_not_proposed_by_the_end_of_its_callers_time_never_is() {
    let engine = leader().await;
    let before = engine.inner.core.metrics().membership_at;
    let add = |new, limit| {
        engine.change_members(
            RequestedChange::Add { new, promote: false, timeout: Duration::ZERO },
            Some(limit),
        )
    };
    let out_of_time = |refused: MembershipError, waited_for: &str| {
        let told = refused.told();
        assert_eq!((told.reason, told.maybe_applied), (Reason::DeadlineExceeded, false), "{refused}");
        let expected = format!("after 1000 ms it still waited for {waited_for}");
        assert!(refused.to_string().contains(&expected), "{refused}");
    };
    let silent = NewMember { node_id: 4, peer: SILENT.to_owned() };
    let refused = add(silent, Duration::from_secs(1)).await.unwrap_err();
    out_of_time(refused, "node 4 to answer at silent:1");

    let turn = engine.inner.changes.turn().await;
    let refused = add(new(5), Duration::from_secs(1)).await.unwrap_err();
    out_of_time(refused, "an earlier change to end");
    drop(turn);
    tokio::time::sleep(TURN_PATIENCE).await;
    assert_eq!(engine.inner.core.metrics().membership_at, before, "it is not made later, either");
    add(new(5), DEADLINE).await.unwrap();
    assert!(membership(&engine).members.contains_key(&5));
    engine.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_has_stopped_begins_no_change() {
    let engine = leader().await;
    engine.shutdown().await;
    let refused = engine.add_member(new(4), false, Duration::ZERO).await.unwrap_err();
    let told = refused.told();
    assert_eq!((told.reason, told.maybe_applied), (Reason::Stopped, false), "{refused}");
}

#[test]
fn only_a_learner_that_follows_the_log_becomes_a_voter() {
    let learner = Behind { receives_snapshot: false, missing: 0, age: None };
    assert!(learner.is_little());
    let under_load = Behind { missing: CAUGHT_UP_ENTRIES, age: Some(CAUGHT_UP_AGE), ..learner };
    assert!(under_load.is_little());
    let older = Some(CAUGHT_UP_AGE + Duration::from_millis(1));
    for behind in [
        Behind { receives_snapshot: true, ..learner },
        Behind { missing: CAUGHT_UP_ENTRIES + 1, ..under_load },
        // Few entries may be many bytes.
        Behind { missing: 1, age: older, ..learner },
    ] {
        assert!(!behind.is_little(), "{behind:?}");
    }
}
