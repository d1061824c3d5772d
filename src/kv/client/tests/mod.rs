//! The client against servers that do what a test wants, at real sockets.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use tokio::time::{Instant, timeout};

use super::*;
use crate::proto::v1::{
    Failure, LeaderHint, MemberInfo, Reason, StatusResponse, TaggedRequest, TaggedResponse, tagged_request,
};
use crate::types::{ReadLevel, Role};
use fake::{Fake, Step, leader, not_leader, refused, refusing, served, silent};

pub(crate) mod fake;
mod once;
mod patience;
mod read_replicas;
mod reads;
pub(crate) mod replica;
mod sessions;
mod streams;
mod subscriptions;
mod unserved;

/// Longer than any test takes; only a client that hangs meets it.
const PATIENCE: Duration = Duration::from_secs(20);

fn client_of(fakes: &[&Fake]) -> Client {
    client_with(fakes, |_| {})
}

fn client_with(fakes: &[&Fake], change: impl FnOnce(&mut ClientConfig)) -> Client {
    let mut config = ClientConfig::default();
    change(&mut config);
    Client::new(fakes.iter().map(|fake| fake.endpoint()), config).unwrap()
}

/// Without sessions: each write is sent once, unless it is certain that it was not applied.
fn sessionless(fakes: &[&Fake]) -> Client {
    client_with(fakes, |config| config.exactly_once = false)
}

/// Waits until `condition` holds; looks again whenever other tasks have run.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "in vain waited until {what}");
        tokio::task::yield_now().await;
    }
}

const HOUR: Duration = Duration::from_secs(3600);

/// Lets so much time pass at once. What waits for it ends; how fast this machine is makes no difference.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

async fn put(client: &Client, key: &'static str, value: &'static str) -> Result<PutReply, ClientError> {
    timeout(PATIENCE, client.put(&Scope::default(), key, value)).await.expect("the client hangs")
}

async fn get(client: &Client, key: &'static str, level: ReadLevel) -> Result<GetReply, ClientError> {
    timeout(PATIENCE, client.get(&Scope::default(), key, level)).await.expect("the client hangs")
}

/// Session and sequence of each write that was seen.
type Notes = Arc<Mutex<Vec<(u64, u64)>>>;

/// A script that notes session and sequence of every write.
fn noting(
    mut script: impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static,
) -> (impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static, Notes) {
    let notes = Arc::new(Mutex::new(Vec::new()));
    let noted = notes.clone();
    let reads = |request: &TaggedRequest| {
        use tagged_request::Request as Ask;
        matches!(request.request, Some(Ask::Get(_) | Ask::Range(_)))
    };
    let script = move |requests: Vec<TaggedRequest>| {
        noted.lock().unwrap().extend(requests.iter().filter(|request| !reads(request)).map(fake::slot));
        script(requests)
    };
    (script, notes)
}

fn status_of(node_id: u64, role: Role, term: u64, leader: Option<(u64, &Fake)>) -> StatusResponse {
    StatusResponse {
        node_id,
        role: role.name().to_owned(),
        ready: true,
        term,
        leader: leader.map(|(node_id, fake)| LeaderHint { node_id, client: fake.endpoint() }),
        ..Default::default()
    }
}

fn address_of_nobody() -> String {
    // Bound and closed again: connecting is refused.
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

#[tokio::test]
async fn a_hint_leads_to_the_leader_and_is_remembered() {
    let second = Fake::start(leader);
    let first = Fake::start(refusing(not_leader(Some((2, second.endpoint())))));
    let client = client_of(&[&first]);
    assert_eq!(put(&client, "k", "four").await.unwrap().revision, 4);
    assert_eq!(put(&client, "k", "fiver").await.unwrap().revision, 5);
    assert_eq!(first.requests(), 1, "the second put knows where to go");
    assert_eq!(client.endpoints().len(), 2);
}

#[tokio::test]
async fn without_a_hint_the_other_endpoints_are_tried() {
    let (first, second, third) = (
        Fake::start(refusing(not_leader(None))),
        Fake::start(refusing(not_leader(None))),
        Fake::start(leader),
    );
    let client = client_of(&[&first, &second, &third]);
    put(&client, "k", "v").await.unwrap();
    put(&client, "k", "v").await.unwrap();
    assert_eq!(third.requests(), 2);
}

#[tokio::test]
async fn the_status_of_one_node_is_enough_to_find_the_others() {
    let second = Fake::start(leader);
    let first = Fake::start(refusing(not_leader(None)));
    let mut status = status_of(1, Role::Follower, 3, Some((2, &second)));
    status.members = [(1, &first), (2, &second)]
        .map(|(node_id, fake)| MemberInfo {
            node_id,
            client: fake.endpoint(),
            voter: true,
            ..Default::default()
        })
        .to_vec();
    first.set_status(status);
    let client = client_of(&[&first]);
    put(&client, "k", "v").await.unwrap();
    assert_eq!(second.requests(), 1);
}

#[tokio::test]
async fn a_hint_to_a_dead_leader_does_not_keep_the_client_from_the_living_one() {
    let dead = address_of_nobody();
    let follower = Fake::start(refusing(not_leader(Some((1, dead.clone())))));
    let third = Fake::start(leader);
    let client = Client::new([dead, follower.endpoint(), third.endpoint()], ClientConfig::default()).unwrap();
    put(&client, "k", "v").await.unwrap();
    assert_eq!(third.requests(), 1);
}

/// Takes connections and answers nothing: connecting to it costs the whole time that connecting may take.
struct BlackHole(std::net::TcpListener);

impl BlackHole {
    fn new() -> Self {
        Self(std::net::TcpListener::bind("127.0.0.1:0").unwrap())
    }

    fn endpoint(&self) -> String {
        self.0.local_addr().unwrap().to_string()
    }
}

/// The addresses that the nodes advertise lead nowhere from here; those that the user has given are other ones.
#[tokio::test]
async fn endpoints_given_are_preferred_to_advertised_ones_that_lead_nowhere() {
    let hole = BlackHole::new();
    let fakes = [(); 3].map(|()| Fake::start(leader));
    let lead = |led: usize, term: u64| {
        for (at, fake) in fakes.iter().enumerate() {
            let hint = LeaderHint { node_id: led as u64 + 1, client: hole.endpoint() };
            let role = if at == led { Role::Leader } else { Role::Follower };
            let members = (1..=3)
                .map(|node_id| MemberInfo {
                    node_id,
                    client: hole.endpoint(),
                    voter: true,
                    ..Default::default()
                })
                .collect();
            let status = status_of(at as u64 + 1, role, term, None);
            fake.set_status(StatusResponse { leader: Some(hint.clone()), members, ..status });
            match at == led {
                true => fake.set_script(leader),
                false => fake.set_script(refusing(not_leader(Some((hint.node_id, hint.client))))),
            }
        }
    };
    let began = Instant::now();
    let lasting = client_of(&fakes.each_ref());
    for (turn, led) in [2, 0, 1, 2].into_iter().enumerate() {
        lead(led, turn as u64 + 1);
        put(&lasting, "k", "v").await.unwrap();
        // Another begins with knowing nothing, as every command does.
        for _ in 0..3 {
            put(&client_of(&fakes.each_ref()), "k", "v").await.unwrap();
            get(&client_of(&fakes.each_ref()), "k", ReadLevel::Local).await.unwrap();
        }
    }
    // 28 operations: one second lost by each would be far above this.
    assert!(began.elapsed() < ClientConfig::default().connect_timeout * 5, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_leader_that_is_not_reached_is_named() {
    let hole = BlackHole::new();
    let nobody = address_of_nobody();
    for (leads, given) in
        [(hole.endpoint(), false), (nobody.clone(), false), (hole.endpoint(), true), (nobody, true)]
    {
        let follower = Fake::start(refusing(not_leader(Some((7, leads.clone())))));
        follower.set_status(status_of(1, Role::Follower, 3, None));
        let config = ClientConfig { timeout: Duration::from_millis(2500), ..ClientConfig::default() };
        let endpoints = [Some(follower.endpoint()), given.then(|| leads.clone())];
        let client = Client::new(endpoints.into_iter().flatten(), config).unwrap();
        let error = put(&client, "k", "v").await.unwrap_err();
        let ClientError::DeadlineExceeded { maybe_applied: false, last: Some(last), .. } = &error else {
            panic!("{error:?}")
        };
        assert!(last.contains("node 7 leads") && last.contains(&leads), "{error}");
        // It is remembered for a while that nobody answers there: the follower is not asked all the time.
        assert!(follower.requests() < 200, "{}", follower.requests());
    }
}

/// A node that hangs costs an operation no second while another answers.
#[tokio::test]
async fn an_endpoint_that_leads_nowhere_does_not_hold_up_what_others_can_answer() {
    let (hole, node) = (BlackHole::new(), Fake::start(leader));
    node.set_status(status_of(1, Role::Leader, 1, None));
    let began = Instant::now();
    for turn in 0..6 {
        let client = Client::new([hole.endpoint(), node.endpoint()], ClientConfig::default()).unwrap();
        match turn % 2 {
            0 => drop(put(&client, "k", "v").await.unwrap()),
            _ => drop(get(&client, "k", ReadLevel::Local).await.unwrap()),
        }
    }
    assert!(began.elapsed() < ClientConfig::default().connect_timeout * 3, "{:?}", began.elapsed());
    // Who asks for that very node waits for it.
    let client = Client::new([hole.endpoint(), node.endpoint()], ClientConfig::default()).unwrap();
    put(&client, "k", "v").await.unwrap();
    let request = Request::Get { scope: Scope::default(), key: "k".into() };
    let chosen = Endpoint::parse(&hole.endpoint()).unwrap();
    let error = client.execute_at(&chosen, request, ReadLevel::Local).await.unwrap_err();
    assert!(error.to_string().contains(chosen.as_str()), "{error}");
}

#[tokio::test]
async fn a_broken_stream_leaves_writes_without_a_session_undecided_and_repeats_reads() {
    let first = Fake::start(|_| Step::BreakStream);
    let client = sessionless(&[&first]);
    let error = put(&client, "k", "v").await.unwrap_err();
    assert!(error.maybe_applied());
    assert!(matches!(error, ClientError::Failed { reason: Reason::Interrupted, .. }), "{error}");
    assert_eq!(first.requests(), 1, "the write was not repeated");

    let mut breaks = 2;
    first.set_script(move |requests| {
        if breaks > 0 {
            breaks -= 1;
            return Step::BreakStream;
        }
        leader(requests)
    });
    let reply = get(&client, "key", ReadLevel::Linearizable).await.unwrap();
    assert_eq!(reply.item.unwrap().value, "key");
    assert_eq!(first.requests(), 4, "the read was repeated twice");
}

#[tokio::test]
async fn all_that_is_in_flight_goes_to_the_next_leader_when_one_dies() {
    let mut first = Fake::start(leader);
    let second = Fake::start(refusing(not_leader(Some((1, first.endpoint())))));
    let client = client_of(&[&first, &second]);
    put(&client, "k", "v").await.unwrap();

    let (script, lost) = noting(silent);
    first.set_script(script);
    let (script, served) = noting(leader);
    let writes = join_all((0..100).map(|_| put(&client, "k", "v")));
    let read = get(&client, "key", ReadLevel::Linearizable);
    let fail_over = async {
        until("all are in flight", || first.requests() >= 102).await;
        first.kill();
        second.set_script(script);
    };
    let (writes, read, ()) = tokio::join!(writes, read, fail_over);
    for write in writes {
        write.unwrap();
    }
    let [lost, served] = [lost, served].map(|notes| {
        let mut slots = notes.lock().unwrap().clone();
        slots.sort_unstable();
        slots
    });
    assert_eq!(lost, served, "under other numbers they would be other writes");
    assert!(client.metrics().fail_overs >= 1);
    assert_eq!(read.unwrap().item.unwrap().value, "key");
    put(&client, "k", "v").await.unwrap();
}

#[tokio::test]
async fn a_hung_leader_is_left_when_another_claims_a_newer_term() {
    let first = Fake::start(leader);
    first.set_status(status_of(1, Role::Leader, 1, None));
    let second = Fake::start(refusing(not_leader(Some((1, first.endpoint())))));
    let client = client_with(&[&first, &second], |config| {
        config.stall_after = Duration::from_millis(20);
        config.exactly_once = false;
    });
    put(&client, "k", "v").await.unwrap();

    first.set_script(silent);
    let hangs = put(&client, "k", "v");
    let elect = async {
        until("the write is in flight", || first.requests() >= 2).await;
        second.set_script(leader);
        second.set_status(status_of(2, Role::Leader, 2, None));
    };
    let (error, ()) = tokio::join!(hangs, elect);
    let error = error.unwrap_err();
    assert!(matches!(error, ClientError::Failed { reason: Reason::Interrupted, .. }), "{error}");
    assert!(error.maybe_applied());
    let before = second.requests();
    put(&client, "k", "v").await.unwrap();
    assert_eq!(second.requests(), before + 1);
}

#[tokio::test]
async fn a_slow_leader_is_not_left_on_a_claim_of_an_old_term() {
    let first = Fake::start(silent);
    first.set_status(status_of(1, Role::Leader, 7, None));
    let second = Fake::start(refusing(not_leader(Some((1, first.endpoint())))));
    second.set_status(status_of(2, Role::Leader, 6, None));
    let client = client_with(&[&first, &second], |config| {
        config.stall_after = Duration::from_millis(10);
        config.timeout = Duration::from_millis(400);
    });
    let error = put(&client, "k", "v").await.unwrap_err();
    assert!(matches!(error, ClientError::DeadlineExceeded { maybe_applied: true, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_callers_share_one_stream_and_answers_come_in_any_order() {
    const CALLERS: usize = 5000;
    let mut held = Vec::new();
    let node = Fake::start(move |requests| {
        held.extend(requests);
        if held.len() < CALLERS {
            return Step::Answer(vec![]);
        }
        // All at once, backwards, between answers to questions that nobody asked.
        let garbage = |tag| TaggedResponse { tag, ..served(&held[0]) };
        let mut answers = vec![garbage(0), garbage(u64::MAX), garbage(held[0].tag + 1)];
        answers.extend(held.drain(..).rev().map(|request| served(&request)));
        answers.push(TaggedResponse { tag: 1, response: None });
        Step::Answer(answers)
    });
    let client = client_of(&[&node]);
    let callers = (0..CALLERS).map(|n| {
        let client = client.clone();
        crate::runtime::spawn(async move {
            let key = format!("key-{n}");
            let reply = client.get(&Scope::default(), key.clone(), ReadLevel::Linearizable).await.unwrap();
            assert_eq!(reply.item.unwrap().value, key);
        })
    });
    for caller in timeout(PATIENCE, join_all(callers)).await.expect("the client hangs") {
        caller.unwrap();
    }
    assert_eq!(node.streams(), 1);
}

#[tokio::test]
async fn the_deadline_holds_and_says_whether_a_write_is_undecided() {
    let node = Fake::start(silent);
    let client = client_with(&[&node], |config| config.timeout = HOUR);
    let time_passes = |requests| {
        let node = &node;
        async move {
            until("it is sent", || node.requests() == requests).await;
            pass(HOUR).await;
        }
    };
    let scope = Scope::default();
    let write = async { tokio::join!(client.put(&scope, "k", "v"), time_passes(1)).0 };
    let write = timeout(HOUR + PATIENCE, write).await.expect("the client hangs").unwrap_err();
    assert!(matches!(write, ClientError::DeadlineExceeded { maybe_applied: true, .. }), "{write}");
    let level = ReadLevel::Linearizable;
    let read = async { tokio::join!(client.get(&scope, "k", level), time_passes(2)).0 };
    let read = timeout(HOUR + PATIENCE, read).await.expect("the client hangs").unwrap_err();
    assert!(matches!(read, ClientError::DeadlineExceeded { maybe_applied: false, .. }), "{read}");
}

#[tokio::test]
async fn a_read_that_hangs_and_that_any_node_can_answer_is_tried_again() {
    let mut ignored = 0;
    let node = Fake::start(move |requests| {
        ignored += 1;
        if ignored == 1 { silent(requests) } else { leader(requests) }
    });
    let client = client_with(&[&node], |config| config.attempt_timeout = Duration::from_millis(50));
    get(&client, "k", ReadLevel::Local).await.unwrap();
    assert_eq!(node.requests(), 2);
}

#[tokio::test]
async fn endpoints_that_refuse_connections_are_unavailable() {
    let config = ClientConfig { unavailable_after: Duration::ZERO, ..ClientConfig::default() };
    let client = Client::new([address_of_nobody(), address_of_nobody()], config).unwrap();
    let error = put(&client, "k", "v").await.unwrap_err();
    let ClientError::Unavailable { tried } = &error else { panic!("{error}") };
    assert_eq!(tried.len(), 2);
    assert!(tried.iter().all(|(_, why)| why.contains("refused")), "{error}");
    assert!(!error.maybe_applied());
}

#[tokio::test]
async fn an_operation_waits_for_a_node_that_comes_back() {
    let mut node = Fake::start(leader);
    let client = client_of(&[&node]);
    put(&client, "k", "v").await.unwrap();
    node.kill();
    let address = node.address;
    let back = async {
        // Once the client has noticed, so that it meets a closed port first.
        let endpoint = Endpoint::parse(&address.to_string()).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while client.status(&endpoint).await.is_ok() && Instant::now() < deadline {}
        let deadline = Instant::now() + PATIENCE;
        while std::net::TcpStream::connect(address).is_ok() && Instant::now() < deadline {
            tokio::task::yield_now().await;
        }
        crate::runtime::offload(move || Fake::start_at(address, leader)).await
    };
    let (answer, _node) = tokio::join!(get(&client, "k", ReadLevel::Linearizable), back);
    answer.unwrap();
}

#[tokio::test]
async fn refusals_are_repeated_or_returned_by_their_reason() {
    let refuse_first = |reason: Reason, maybe_applied| {
        let mut first = true;
        move |requests: Vec<_>| {
            let failure = Failure { reason: reason.into(), maybe_applied, ..Default::default() };
            if std::mem::take(&mut first) {
                return Step::Answer(requests.iter().map(|request| refused(request, &failure)).collect());
            }
            leader(requests)
        }
    };
    let node = Fake::start(leader);
    let client = client_with(&[&node], |config| {
        config.max_request_bytes = 100;
        config.exactly_once = false;
    });
    for reason in [Reason::Overloaded, Reason::NotLeader, Reason::Stopped] {
        node.set_script(refuse_first(reason, false));
        put(&client, "k", "v").await.unwrap();
    }
    node.set_script(refuse_first(Reason::Interrupted, true));
    let error = put(&client, "k", "v").await.unwrap_err();
    assert!(matches!(error, ClientError::Failed { reason: Reason::Interrupted, maybe_applied: true, .. }));
    node.set_script(refuse_first(Reason::NoQuorum, false));
    get(&client, "k", ReadLevel::Linearizable).await.unwrap();
    node.set_script(refuse_first(Reason::Invalid, false));
    let error = put(&client, "k", "v").await.unwrap_err();
    assert!(matches!(error, ClientError::Rejected { reason: Reason::Invalid, .. }));

    let sent = node.requests();
    let error = client.put(&Scope::default(), "k", vec![0; 200]).await.unwrap_err();
    assert!(matches!(error, ClientError::Rejected { reason: Reason::TooLarge, .. }));
    assert_eq!(node.requests(), sent, "what is too large is not sent");
}

#[tokio::test]
async fn local_reads_go_round_the_nodes_that_answer() {
    let mut fakes = [(); 3].map(|()| Fake::start(leader));
    let client = client_of(&fakes.each_ref());
    for _ in 0..30 {
        get(&client, "k", ReadLevel::Local).await.unwrap();
    }
    let served = fakes.each_ref().map(Fake::requests);
    assert_eq!(served, [10, 10, 10]);
    fakes[1].kill();
    for _ in 0..30 {
        get(&client, "k", ReadLevel::Local).await.unwrap();
    }
}

#[tokio::test]
async fn a_chosen_node_is_asked_and_no_other() {
    let (first, second) = (Fake::start(leader), Fake::start(refusing(not_leader(None))));
    let client = client_of(&[&first, &second]);
    let endpoint = Endpoint::parse(&second.endpoint()).unwrap();
    let request = Request::Get { scope: Scope::default(), key: "k".into() };
    let error = client.execute_at(&endpoint, request, ReadLevel::Linearizable).await.unwrap_err();
    assert!(matches!(error, ClientError::Failed { reason: Reason::NotLeader, .. }), "{error}");
    assert_eq!((first.requests(), second.requests()), (0, 1));
}

#[tokio::test]
async fn status_tells_the_reachable_from_the_others() {
    let node = Fake::start(leader);
    node.set_status(StatusResponse {
        state_hash: Some(7),
        last_log: Some(3),
        ..status_of(1, Role::Leader, 2, None)
    });
    let nobody = address_of_nobody();
    let client = Client::new([node.endpoint(), nobody], ClientConfig::default()).unwrap();
    let all = client.status_all().await;
    let status = all[0].1.as_ref().unwrap();
    assert_eq!(
        (status.node_id, status.term, status.state_hash, status.offsets.last_log),
        (1, 2, Some(7), Some(3))
    );
    assert!(matches!(all[1].1, Err(ClientError::Unavailable { .. })));
}

#[tokio::test]
async fn every_kind_of_request_is_answered_in_kind() {
    let node = Fake::start(leader);
    let client = client_of(&[&node]);
    assert!(client.delete(&Scope::default(), "k").await.unwrap().deleted);
    let range = Range { start: "a".into(), ..Range::default() };
    let page = client.range(&Scope::default(), range, ReadLevel::Linearizable).await.unwrap();
    assert_eq!(page.next.unwrap(), "a");

    node.set_script(|requests| {
        let put = served(&requests[0]).tag;
        let get = TaggedResponse { tag: put, response: None };
        // The tag is all that says which call an answer is for: a payload of another method is taken for what it could be.
        // What is no payload at all is found out.
        let wrong = crate::proto::v1::tagged_response::Response::OpenSession(Default::default());
        Step::Answer(vec![get, TaggedResponse { tag: put, response: Some(wrong) }])
    });
    let error = put(&client, "k", "v").await.unwrap_err();
    assert!(matches!(error, ClientError::Failed { reason: Reason::Unspecified, maybe_applied: true, .. }));
}

/// Not a test of correctness: shows what one stream carries, and what sessions cost. The two are measured in turns,
/// so that what else the machine does meets both. `cargo test --release one_stream -- --ignored --nocapture`
#[test]
#[ignore = "measures"]
fn one_stream_throughput() {
    const TURNS: u64 = 4;
    const TURN: Duration = Duration::from_millis(750);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let node = Fake::start(leader);
    let run = |client: &Client, callers: u64| -> u64 {
        runtime.block_on(async {
            let until = Instant::now() + TURN;
            let callers = (0..callers).map(|_| {
                let client = client.clone();
                crate::runtime::spawn(async move {
                    let value = Bytes::from(vec![7; 256]);
                    let mut operations = 0;
                    while Instant::now() < until {
                        client.put(&Scope::default(), "key-00001", value.clone()).await.unwrap();
                        operations += 1;
                    }
                    operations
                })
            });
            join_all(callers).await.into_iter().map(Result::unwrap).sum()
        })
    };
    for callers in [1, 64, 256, 1000, 4000] {
        let (with, without) = (client_of(&[&node]), sessionless(&[&node]));
        let mut totals = [0, 0];
        for _ in 0..TURNS {
            totals[0] += run(&with, callers);
            totals[1] += run(&without, callers);
        }
        let [with, without] = totals.map(|total| total as f64 / (TURN.as_secs_f64() * TURNS as f64));
        let ratio = with / without;
        println!("{callers} callers: {with:.0} operations/s in a session, {without:.0} without: {ratio:.2}");
    }
}
