//! Replicas: which are read at, for what, and what happens when one fails.

use super::*;
use crate::client::ReplicaReads;
use crate::proto::v1::{Position, ReplicaInfo};

const HISTORY: u64 = 0xabc;

fn at(history: u64) -> Option<Position> {
    Some(Position { term: 1, index: 9, history })
}

fn told(replicas: &[&Fake]) -> Vec<ReplicaInfo> {
    replicas.iter().map(|fake| ReplicaInfo { client: fake.endpoint(), ..Default::default() }).collect()
}

/// A member that leads, and tells of `replicas`.
fn member_telling(replicas: Vec<ReplicaInfo>) -> Fake {
    let member = Fake::start(leader);
    let leads = Some(LeaderHint { node_id: 1, client: member.endpoint() });
    let status = status_of(1, Role::Leader, 1, None);
    let cluster = "c".to_owned();
    member.set_status(StatusResponse { leader: leads, cluster, applied: at(HISTORY), replicas, ..status });
    member
}

/// What a replica tells of itself that is well.
fn replica_status() -> StatusResponse {
    let replica = Some(ReplicaInfo { lag_ms: Some(0), ..Default::default() });
    let status = status_of(0, Role::Learner, 1, None);
    StatusResponse { replica, cluster: "c".to_owned(), applied: at(HISTORY), ..status }
}

fn replica() -> Fake {
    let replica = Fake::start(leader);
    replica.set_status(replica_status());
    replica
}

fn reader(member: &Fake, change: impl FnOnce(&mut ClientConfig)) -> Client {
    client_with(&[member], |config| {
        config.health_interval = Duration::from_millis(20);
        config.read_preference = Some(ReadPreference::RoundRobin);
        change(config);
    })
}

/// The client has learnt of `count` replicas that may be read at.
async fn knows(client: &Client, count: usize) {
    get(client, "k", ReadLevel::Local).await.unwrap();
    until("the client knows the replicas", || client.replicas().len() == count).await;
}

async fn read_at(client: &Client, level: ReadLevel, times: usize) {
    for _ in 0..times {
        get(client, "k", level).await.unwrap();
    }
}

#[tokio::test]
async fn reads_that_any_node_answers_are_spread_over_members_and_replicas() {
    let replicas = [replica(), replica()];
    let member = member_telling(told(&replicas.each_ref()));
    let client = reader(&member, |_| {});
    knows(&client, 2).await;
    let counts = || [&member, &replicas[0], &replicas[1]].map(Fake::requests);
    for level in [ReadLevel::Local, ReadLevel::Bounded { max_lag_ms: 100 }] {
        let before = counts();
        read_at(&client, level, 30).await;
        let after = counts();
        // A probe that takes too long may make one unhealthy for a while.
        assert!((0..3).all(|at| after[at] - before[at] >= 5), "{level:?}: {before:?} {after:?}");
    }
    let before = counts();
    read_at(&client, ReadLevel::Linearizable, 9).await;
    read_at(&client, ReadLevel::Lease, 9).await;
    for _ in 0..9 {
        put(&client, "k", "v").await.unwrap();
    }
    let after = counts();
    assert_eq!(after[1..], before[1..], "that is for members");
    assert_eq!(client.endpoints().len(), 1, "replicas are no members");

    let everywhere = reader(&member, |config| config.replica_reads = ReplicaReads::Always);
    knows(&everywhere, 2).await;
    let before = counts();
    read_at(&everywhere, ReadLevel::Linearizable, 30).await;
    assert!(counts()[1] - before[1] >= 5);
    let nowhere = reader(&member, |config| config.replica_reads = ReplicaReads::Never);
    let before = counts();
    read_at(&nowhere, ReadLevel::Local, 30).await;
    nowhere.status_all().await;
    assert_eq!((&counts()[1..], nowhere.replicas().len()), (&before[1..], 0));
}

#[tokio::test]
async fn a_read_that_fails_at_a_replica_goes_on_to_the_members_unnoticed() {
    let mut faulty = replica();
    let member = member_telling(told(&[&faulty]));
    let reasons =
        [Reason::OtherHistory, Reason::Invalid, Reason::NotLeader, Reason::Behind, Reason::NoQuorum];
    for reason in reasons {
        faulty.set_script(refusing(fake::failure(reason, false)));
        let client = reader(&member, |_| {});
        knows(&client, 1).await;
        let before = faulty.requests();
        read_at(&client, ReadLevel::Local, 10).await;
        assert!(faulty.requests() > before, "{reason:?}");
        assert!(faulty.requests() <= before + 1, "it rests after a failure: {reason:?}");
    }
    faulty.set_script(|_| Step::BreakStream);
    let client = reader(&member, |_| {});
    knows(&client, 1).await;
    read_at(&client, ReadLevel::Local, 10).await;
    faulty.set_script(silent);
    let client = reader(&member, |config| config.attempt_timeout = Duration::from_millis(20));
    knows(&client, 1).await;
    read_at(&client, ReadLevel::Local, 10).await;
    faulty.set_script(leader);
    let client = reader(&member, |_| {});
    knows(&client, 1).await;
    read_at(&client, ReadLevel::Local, 4).await;
    faulty.kill();
    read_at(&client, ReadLevel::Local, 20).await;
    until("it is not offered any more", || client.replicas().is_empty()).await;
}

/// Whoever names an address may be wrong, or lie.
#[tokio::test]
async fn an_address_that_a_node_names_is_read_at_only_if_it_is_a_whole_replica_of_this_cluster() {
    let replica = replica();
    let member = member_telling(told(&[&replica]));
    let well = replica_status;
    let of = |info: ReplicaInfo| StatusResponse { replica: Some(info), ..well() };
    for (why, status) in [
        ("another cluster", StatusResponse { cluster: "d".to_owned(), ..well() }),
        ("another history", StatusResponse { applied: at(0xdef), ..well() }),
        ("no state yet", StatusResponse { applied: None, ..well() }),
        ("a part", of(ReplicaInfo { partial: true, lag_ms: Some(0), ..Default::default() })),
        ("far behind", of(ReplicaInfo { lag_ms: Some(60_000), ..Default::default() })),
        ("does not know how far", of(ReplicaInfo::default())),
        ("not ready", StatusResponse { ready: false, ..well() }),
        ("no replica", StatusResponse { replica: None, ..well() }),
    ] {
        replica.set_status(status);
        let client = reader(&member, |_| {});
        get(&client, "k", ReadLevel::Local).await.unwrap();
        let address = Endpoint::parse(&replica.endpoint()).unwrap();
        let probed = || client.metrics().nodes.iter().any(|node| node.endpoint == address);
        until("it is learnt of", probed).await;
        let link = client.router.at(&address);
        until("it has answered", || link.node.has_answered()).await;
        let before = replica.requests();
        read_at(&client, ReadLevel::Local, 9).await;
        // Those are listed all the same that are only late.
        let listed = usize::from(matches!(why, "far behind" | "does not know how far"));
        assert_eq!((replica.requests(), client.replicas().len()), (before, listed), "{why}");
        put(&client, "k", "v").await.unwrap();
        assert_eq!(replica.requests(), before, "a write at {why}");
    }
    replica.set_status(of(ReplicaInfo { lag_ms: Some(300), ..Default::default() }));
    let client = reader(&member, |_| {});
    knows(&client, 1).await;
    let before = replica.requests();
    read_at(&client, ReadLevel::Bounded { max_lag_ms: 200 }, 9).await;
    assert_eq!(replica.requests(), before, "further behind than is asked for");
    read_at(&client, ReadLevel::Local, 9).await;
    assert!(replica.requests() > before);
}

#[tokio::test]
async fn a_replica_that_no_member_tells_of_any_more_is_forgotten() {
    let replica = replica();
    let member = member_telling(told(&[&replica]));
    let client = reader(&member, |_| {});
    knows(&client, 1).await;
    let status = status_of(1, Role::Leader, 1, None);
    member.set_status(StatusResponse { cluster: "c".to_owned(), applied: at(HISTORY), ..status });
    until("it is forgotten", || client.metrics().nodes.len() == 1).await;
    read_at(&client, ReadLevel::Local, 9).await;
    assert!(client.replicas().is_empty());
}

#[tokio::test]
async fn many_replicas_crowd_out_no_member() {
    let replicas = (1..1000)
        .map(|port| ReplicaInfo { client: format!("127.0.0.1:{port}"), ..Default::default() })
        .collect();
    let member = member_telling(replicas);
    let client = reader(&member, |_| {});
    get(&client, "k", ReadLevel::Local).await.unwrap();
    until("some are learnt of", || client.metrics().nodes.len() > 1).await;
    assert!(client.metrics().nodes.len() <= 33, "{}", client.metrics().nodes.len());
    read_at(&client, ReadLevel::Local, 9).await;
    put(&client, "k", "v").await.unwrap();
}

/// As `quorate get --endpoints REPLICA` does.
#[tokio::test]
async fn a_replica_that_the_user_has_given_is_read_at_where_no_member_is_known() {
    let replica = replica();
    let client = reader(&replica, |_| {});
    for level in [ReadLevel::Local, ReadLevel::Linearizable] {
        read_at(&client, level, 3).await;
        client.status_all().await;
        read_at(&client, level, 3).await;
    }
    assert_eq!(replica.requests(), 12);
}
