//! What the client says when nothing is done for it: that no node can be connected to only if that is so.

use futures::future::LocalBoxFuture;
use futures::{FutureExt, StreamExt};

use super::fake::failure;
use super::*;
use crate::client::router::Hint;

/// What came of everything that a client can be asked for, all at the same time and each with `time`, by its name.
async fn all_failures(endpoint: &str, time: Duration) -> Vec<(&'static str, ClientError)> {
    let client = || {
        let config =
            ClientConfig { timeout: time, unavailable_after: Duration::ZERO, ..ClientConfig::default() };
        Client::new([endpoint], config).unwrap()
    };
    let (scope, at) = (&Scope::default(), &Endpoint::parse(endpoint).unwrap());
    let setting = &[("preferred_leader".to_owned(), "true".to_owned())];
    let read = |level| async move { get(&client(), "k", level).await.unwrap_err() };
    let read_at = async {
        let request = Request::Get { scope: scope.clone(), key: "k".into() };
        client().execute_at(at, request, ReadLevel::Local).await.unwrap_err()
    };
    let watch = |from: Option<Bookmark>| async move {
        match client().watch(scope, Range::key("k"), from).await {
            Ok(mut watch) => watch.next().await.unwrap().unwrap_err(),
            Err(error) => error,
        }
    };
    let snapshot = |at| async move { client().take_snapshot(at).await.unwrap_err() };
    let configure = |at| async move { client().configure(at, setting).await.unwrap_err() };
    let range =
        async { client().range_stream(scope, Range::all(), ReadLevel::Local).await.map(drop).unwrap_err() };
    let calls: Vec<(_, LocalBoxFuture<'_, ClientError>)> = vec![
        ("put", async { put(&client(), "k", "v").await.unwrap_err() }.boxed_local()),
        ("get", read(ReadLevel::Linearizable).boxed_local()),
        ("local get", read(ReadLevel::Local).boxed_local()),
        ("get at", read_at.boxed_local()),
        ("range", range.boxed_local()),
        ("watch", watch(None).boxed_local()),
        ("watch from", watch(Some(1.into())).boxed_local()),
        ("members", async { client().members().await.unwrap_err() }.boxed_local()),
        ("sessions", async { client().list_sessions(0, 1).await.unwrap_err() }.boxed_local()),
        ("transfer", async { client().transfer_leader(None).await.unwrap_err() }.boxed_local()),
        ("snapshot", snapshot(None).boxed_local()),
        ("snapshot at", snapshot(Some(at)).boxed_local()),
        ("configure", configure(None).boxed_local()),
        ("configure at", configure(Some(at)).boxed_local()),
    ];
    let calls = calls.into_iter().map(|(what, call)| async move { (what, call.await) });
    timeout(PATIENCE, join_all(calls)).await.expect("the client hangs")
}

/// Whatever is shorter, the time of the operation or that of connecting.
#[tokio::test]
async fn where_nobody_ever_answers_no_node_can_be_connected_to() {
    let hole = BlackHole::new();
    for (endpoint, timeout_ms) in
        [(hole.endpoint(), 100), (hole.endpoint(), 1200), (address_of_nobody(), 100)]
    {
        for (what, error) in all_failures(&endpoint, Duration::from_millis(timeout_ms)).await {
            let ClientError::Unavailable { tried } = &error else {
                panic!("{what}, {timeout_ms} ms: {error}")
            };
            assert_eq!((tried.len(), tried[0].0.as_str()), (1, endpoint.as_str()), "{what}");
            assert!(!tried[0].1.contains("error:"), "{what}: {error}");
        }
    }
}

/// A node that is being opened refuses every call, and says how far it is.
#[tokio::test]
async fn a_node_that_answers_and_refuses_is_not_called_unreachable() {
    let node = Fake::start(leader);
    let message = "the node is not open yet; recovering".to_owned();
    let stopped =
        Failure { code: tonic::Code::Unavailable.into(), message, ..failure(Reason::Stopped, false) };
    node.close(Some(stopped));
    // Far more than it takes to be refused.
    for (what, error) in all_failures(&node.endpoint(), Duration::from_secs(5)).await {
        let ClientError::DeadlineExceeded { maybe_applied: false, last: Some(last), .. } = &error else {
            panic!("{what}: {error:?}")
        };
        assert!(last.contains("recovering"), "{what}: {error}");
    }
    let client = client_with(&[&node], |config| config.unavailable_after = Duration::ZERO);
    let status = client.status(&Endpoint::parse(&node.endpoint()).unwrap()).await.unwrap_err();
    assert!(matches!(status, ClientError::Failed { reason: Reason::Stopped, .. }), "{status}");
    let open = async {
        let before = node.streams();
        until("the client has been refused", || node.streams() > before).await;
        node.close(None);
    };
    let (written, ()) = tokio::join!(put(&client, "k", "v"), open);
    written.unwrap();
}

#[tokio::test]
async fn what_was_met_is_told_whatever_the_last_try_brings() {
    let nobody = address_of_nobody();
    for hint in [None, Some(LeaderHint { node_id: 7, client: nobody.clone() })] {
        let follower = Fake::start(refusing(not_leader(hint.clone().map(|hint| (7, hint.client)))));
        let status = status_of(1, Role::Follower, 3, None);
        follower.set_status(StatusResponse { leader: hint.clone(), ..status });
        let client = client_with(&[&follower], |config| {
            config.unavailable_after = Duration::ZERO;
            config.timeout = Duration::from_millis(800);
        });
        client.status(&Endpoint::parse(&follower.endpoint()).unwrap()).await.unwrap();
        // One more is answered, and the one after it has not time enough to count.
        follower.tell_status(1);
        let error = timeout(PATIENCE, client.members()).await.expect("the client hangs").unwrap_err();
        let ClientError::DeadlineExceeded { last: Some(last), .. } = &error else { panic!("{error:?}") };
        match hint {
            None => assert!(last.contains("node 1 knows no leader"), "{error}"),
            Some(_) => {
                assert!(last.contains("node 7 leads") && last.contains(&nobody), "{error}");
                let leader = KnownLeader { node_id: Some(7), client: Endpoint::parse(&nobody).unwrap() };
                assert_eq!(client.known_leader(), Some(leader));
            }
        }
    }
}

#[tokio::test]
async fn the_leader_is_known_from_whatever_says_so() {
    let (first, third) = (Fake::start(leader), Fake::start(leader));
    first.set_status(status_of(1, Role::Leader, 1, Some((1, &first))));
    let known = |node_id, fake: &Fake| {
        Some(KnownLeader { node_id: Some(node_id), client: Endpoint::parse(&fake.endpoint()).unwrap() })
    };
    let client = client_of(&[&first]);
    assert_eq!(client.known_leader(), None);
    client.list_sessions(0, 1).await.unwrap();
    assert_eq!(client.known_leader(), known(1, &first));
    first.set_transferred(LeaderHint { node_id: 3, client: third.endpoint() });
    assert_eq!(client.transfer_leader(Some(1)).await, Ok(3));
    assert_eq!(client.known_leader(), known(3, &third), "the leader before is not named");

    let client = client_of(&[&first]);
    client.status_all().await;
    assert_eq!(client.known_leader(), known(1, &first));
    let client = client_of(&[&first]);
    assert_eq!(client.find_leader(PATIENCE).await, known(1, &first));
}

#[tokio::test]
async fn an_answer_that_tells_nothing_is_an_error() {
    let node = Fake::start(leader);
    node.set_status(status_of(1, Role::Leader, 1, Some((1, &node))));
    let client = client_of(&[&node]);
    for empty in [None, Some(LeaderHint::default())] {
        if let Some(empty) = empty {
            node.set_transferred(empty);
        }
        let error = client.transfer_leader(None).await.unwrap_err();
        assert!(error.maybe_applied() && error.to_string().contains("without who leads now"), "{error}");
    }
    let at = Endpoint::parse(&node.endpoint()).unwrap();
    for at in [None, Some(&at)] {
        let error = client.take_snapshot(at).await.unwrap_err();
        assert!(!error.maybe_applied() && error.to_string().contains("what the snapshot covers"), "{error}");
    }
}

#[tokio::test]
async fn a_change_of_members_is_told_by_all_the_time_that_it_had() {
    let node = Fake::start(leader);
    node.set_status(status_of(1, Role::Leader, 1, Some((1, &node))));
    let client = client_with(&[&node], |config| config.timeout = Duration::from_millis(300));
    let promote = |catch_up| client.change_members(MemberChange::Promote { node_id: 2, catch_up });
    let error = timeout(PATIENCE, promote(Duration::from_millis(100))).await.unwrap().unwrap_err();
    let ClientError::DeadlineExceeded { timeout: told, maybe_applied: true, .. } = error else {
        panic!("{error:?}")
    };
    assert_eq!(told, Duration::from_millis(400));
    // More than there can be of it.
    assert!(timeout(Duration::from_millis(500), promote(Duration::MAX)).await.is_err(), "it waits");
}

fn info(node_id: u64, fake: &Fake) -> MemberInfo {
    MemberInfo { node_id, client: fake.endpoint(), voter: true, ..Default::default() }
}

/// The address of a member that is gone belongs to a node of another cluster by now, which leads there in a later term.
#[tokio::test]
async fn what_a_node_of_another_cluster_says_does_not_count() {
    let [first, second, third] = [(); 3].map(|()| Fake::start(leader));
    let of = |cluster: &str, members: Vec<MemberInfo>, status| StatusResponse {
        cluster: cluster.to_owned(),
        members,
        ..status
    };
    let ours = |members| of("ours", members, status_of(1, Role::Leader, 1, Some((1, &first))));
    first.set_status(ours(vec![info(1, &first), info(2, &second)]));
    let members = vec![info(1, &second), info(3, &third)];
    second.set_status(of("theirs", members, status_of(1, Role::Leader, 9, Some((1, &second)))));
    let client = client_of(&[&first]);
    let at = |fake: &Fake| Endpoint::parse(&fake.endpoint()).unwrap();
    client.status(&at(&first)).await.unwrap();
    assert_eq!(client.endpoints(), [at(&first), at(&second)]);
    assert_eq!(client.status(&at(&second)).await.unwrap().cluster, "theirs", "who asks is told");
    assert_eq!(client.endpoints(), [at(&first), at(&second)], "its members are none of ours");
    assert_eq!(client.known_leader().unwrap().client, at(&first));
    for _ in 0..4 {
        put(&client, "k", "v").await.unwrap();
        get(&client, "k", ReadLevel::Local).await.unwrap();
    }
    assert_eq!((first.requests(), second.requests()), (8, 0));
    // Nor is its address kept that the leader does not list any more.
    first.set_status(ours(vec![info(1, &first)]));
    client.status(&at(&first)).await.unwrap();
    assert_eq!(client.endpoints(), [at(&first)]);
}

/// What leads says so with more right than a hint, which may be out of date.
#[tokio::test]
async fn a_claim_of_the_leader_itself_counts_more_than_a_hint() {
    let [first, second] = [(); 2].map(|()| Fake::start(leader));
    second.set_status(status_of(2, Role::Leader, 2, None));
    let client = client_of(&[&first, &second]);
    let at = |fake: &Fake| Endpoint::parse(&fake.endpoint()).unwrap();
    let leads = || client.known_leader().map(|leader| leader.client);
    client.status(&at(&second)).await.unwrap();
    assert_eq!(leads(), Some(at(&second)));
    client.router.lost_leader(&at(&second));
    let hint = crate::types::Leader { node_id: 1, client: first.endpoint() };
    assert_eq!(client.router.hinted(&at(&second), &hint).await, Hint::Followed);
    assert_eq!(leads(), Some(at(&first)));
    client.status(&at(&second)).await.unwrap();
    assert_eq!(leads(), Some(at(&second)));
}
