//! Reads: which node answers them, and what happens when it cannot.

use super::fake::{Next, failure, steps};
use super::*;
use crate::proto::v1::{TaggedRequest, tagged_request};

fn endpoint(fake: &Fake) -> Endpoint {
    Endpoint::parse(&fake.endpoint()).unwrap()
}

async fn read_times(client: &Client, times: usize) {
    for _ in 0..times {
        get(client, "k", ReadLevel::Local).await.unwrap();
    }
}

#[tokio::test]
async fn preferences_choose_the_node() {
    let fakes = [(); 3].map(|()| Fake::start(leader));
    let client = client_of(&fakes.each_ref());
    put(&client, "k", "v").await.unwrap();
    let before = fakes.each_ref().map(Fake::requests);
    let leading = before.iter().position(|count| *count == 1).unwrap();

    read_times(&client.preferring(ReadPreference::Leader), 9).await;
    assert_eq!(fakes[leading].requests(), 10);
    let weights = [(endpoint(&fakes[0]), 1), (endpoint(&fakes[1]), 2)];
    let before = fakes.each_ref().map(Fake::requests);
    read_times(&client.preferring(ReadPreference::weighted(weights)), 300).await;
    let after = fakes.each_ref().map(Fake::requests);
    assert!((after[0] - before[0]).abs_diff(100) <= 2, "{before:?} {after:?}");
    assert_eq!(after[2], before[2]);
}

#[tokio::test]
async fn a_linearizable_read_goes_to_the_leader_unless_another_node_is_preferred() {
    let fakes = [(); 2].map(|()| Fake::start(leader));
    let client = client_of(&fakes.each_ref());
    put(&client, "k", "v").await.unwrap();
    let leading = fakes.iter().position(|fake| fake.requests() == 1).unwrap();
    let other = &fakes[1 - leading];
    for _ in 0..5 {
        get(&client, "k", ReadLevel::Linearizable).await.unwrap();
    }
    assert_eq!(other.requests(), 0);
    let spread = client.preferring(ReadPreference::weighted([(endpoint(other), 1)]));
    get(&spread, "k", ReadLevel::Linearizable).await.unwrap();
    assert_eq!(other.requests(), 1);
    get(&spread, "k", ReadLevel::Lease).await.unwrap();
    assert_eq!(other.requests(), 1, "a lease is the leader's");
}

#[tokio::test]
async fn when_the_preferred_node_fails_another_one_answers() {
    let (mut first, second) = (Fake::start(leader), Fake::start(leader));
    let client = client_of(&[&first, &second]).preferring(ReadPreference::weighted([(endpoint(&first), 1)]));
    first.set_script(steps([Next::Refuse(failure(Reason::Behind, false))]));
    read_times(&client, 1).await;
    assert_eq!((first.requests(), second.requests()), (1, 1), "the first is behind");
    read_times(&client, 1).await;
    assert_eq!((first.requests(), second.requests()), (2, 1), "and asked again the next time");
    first.kill();
    read_times(&client, 5).await;
    assert_eq!(second.requests(), 6);
}

#[tokio::test]
async fn a_node_that_is_not_ready_is_passed_over_until_it_is() {
    let fakes = [(); 2].map(|()| Fake::start(leader));
    for (fake, node_id) in fakes.iter().zip(1..) {
        fake.set_status(status_of(node_id, Role::Follower, 1, None));
    }
    let client = client_with(&fakes.each_ref(), |config| config.health_interval = Duration::from_millis(10));
    read_times(&client, 10).await;
    assert!(fakes[0].requests() > 0);

    fakes[0].set_status(StatusResponse { ready: false, ..status_of(1, Role::Follower, 1, None) });
    let ready = |client: &Client| client.router.at(&endpoint(&fakes[0])).node.is_healthy();
    until("the node counts as unhealthy", || !ready(&client)).await;
    let before = fakes[0].requests();
    read_times(&client, 10).await;
    assert_eq!(fakes[0].requests(), before);

    fakes[0].set_status(status_of(1, Role::Follower, 1, None));
    until("the node counts as healthy", || ready(&client)).await;
    read_times(&client, 10).await;
    assert!(fakes[0].requests() > before);
}

#[tokio::test]
async fn a_node_that_was_down_comes_back_by_itself() {
    let (mut first, second) = (Fake::start(leader), Fake::start(leader));
    let client = client_with(&[&first, &second], |config| {
        (config.health_interval, config.unavailable_after) = (Duration::from_millis(10), Duration::ZERO);
    });
    read_times(&client, 4).await;
    first.kill();
    let (address, chosen) = (first.address, endpoint(&first));
    let link = client.router.at(&chosen);
    // Others may pass it over before they have met that it is down.
    let request = Request::Get { scope: Scope::default(), key: "k".into() };
    let met = client.execute_at(&chosen, request, ReadLevel::Local);
    timeout(PATIENCE, met).await.expect("the client hangs").unwrap_err();
    assert!(link.node.is_down());
    let back = crate::runtime::offload(move || Fake::start_at(address, leader)).await;
    back.set_status(status_of(1, Role::Follower, 1, None));
    until("the node is up again", || !link.node.is_down()).await;
    until("the node is healthy again", || link.node.is_healthy()).await;
    // A probe that takes too long may make it unhealthy for a while.
    let deadline = Instant::now() + PATIENCE;
    while back.requests() == 0 {
        assert!(Instant::now() < deadline, "it is not asked");
        read_times(&client, 1).await;
    }
}

#[tokio::test]
async fn the_nearest_node_is_the_one_that_answers_soonest() {
    let fakes = [(); 2].map(|()| Fake::start(leader));
    for (fake, node_id) in fakes.iter().zip(1..) {
        fake.set_status(status_of(node_id, Role::Follower, 1, None));
    }
    let client = client_of(&fakes.each_ref());
    for _ in 0..3 {
        client.status_all().await;
    }
    let nearest = fakes.each_ref().map(|fake| client.router.at(&endpoint(fake)).node.round_trip().unwrap());
    let chosen = client.router.choose(&ReadPreference::Nearest, None, None);
    let measured = chosen.node.round_trip().unwrap();
    assert_eq!(measured, nearest[0].min(nearest[1]));
}

#[tokio::test]
async fn freshness_is_asked_for() {
    let node = Fake::start(|requests: Vec<TaggedRequest>| {
        let Some(tagged_request::Request::Get(get)) = &requests[0].request else { panic!("{requests:?}") };
        let freshness = get.freshness.unwrap();
        assert_eq!((freshness.max_lag_ms, freshness.after_index), (250, 40));
        leader(requests)
    });
    let read = ReadOptions::from(ReadLevel::Bounded { max_lag_ms: 250 }).after(40.into());
    client_of(&[&node]).get(&Scope::default(), "k", read).await.unwrap();
}

#[tokio::test]
async fn conditional_puts_are_transactions() {
    let node = Fake::start(leader);
    let client = client_of(&[&node]);
    let scope = Scope::default();
    assert!(client.put_if_absent(&scope, "k", "v").await.unwrap().succeeded);
    node.set_script(|requests| {
        use crate::proto::v1::{
            GetResponse, Item as WireItem, TxnResponse, TxnResult, tagged_response, txn_result,
        };
        let item = WireItem { key: "k".into(), mod_revision: 9, ..Default::default() };
        let get = txn_result::Result::Get(GetResponse { item: Some(item), ..Default::default() });
        let txn = TxnResponse { results: vec![TxnResult { result: Some(get) }], ..Default::default() };
        let response = Some(tagged_response::Response::Txn(txn));
        Step::Answer(vec![TaggedResponse { tag: requests[0].tag, response }])
    });
    let reply = client.compare_and_set(&scope, "k", "old", "new").await.unwrap();
    assert_eq!((reply.succeeded, reply.current.unwrap().mod_revision), (false, 9));
    let early = client.put_when(&scope, Compare::missing("k"), "k", "v", AckLevel::Leader).await;
    assert!(matches!(early, Err(ClientError::Rejected { .. })));
}

#[tokio::test]
async fn a_prefix_is_removed_piece_by_piece() {
    use crate::proto::v1::{DeleteRangeResponse, tagged_response};
    let mut left = 25;
    let node = Fake::start(move |requests| {
        let Some(tagged_request::Request::DeleteRange(delete)) = &requests[0].request else {
            panic!("{requests:?}")
        };
        assert_eq!((&delete.start[..], &delete.end[..]), (&b"user/"[..], &b"user0"[..]));
        let deleted = 10.min(left);
        left -= deleted;
        let answer = DeleteRangeResponse { deleted, more: left > 0, header: None };
        let response = Some(tagged_response::Response::DeleteRange(answer));
        Step::Answer(vec![TaggedResponse { tag: requests[0].tag, response }])
    });
    let reply = client_of(&[&node]).delete_prefix(&Scope::default(), "user/").await.unwrap();
    assert_eq!((reply.deleted, reply.more, node.requests()), (25, false, 3));
}

/// What was removed before is gone, whatever becomes of the rest.
#[tokio::test]
async fn a_prefix_that_is_removed_in_part_is_not_called_untouched() {
    use crate::proto::v1::{DeleteRangeResponse, tagged_response};
    let mut first = true;
    let node = Fake::start(move |requests| match std::mem::take(&mut first) {
        true => {
            let answer = DeleteRangeResponse { deleted: 10, more: true, header: None };
            let response = Some(tagged_response::Response::DeleteRange(answer));
            Step::Answer(vec![TaggedResponse { tag: requests[0].tag, response }])
        }
        false => refusing(failure(Reason::QuotaExceeded, false))(requests),
    });
    let client = client_of(&[&node]);
    let error = client.delete_prefix(&Scope::default(), "user/").await.unwrap_err();
    assert!(error.maybe_applied(), "{error}");
    let error = client.delete_prefix(&Scope::default(), "user/").await.unwrap_err();
    assert!(!error.maybe_applied(), "{error}");
}
