//! How long the client waits for an answer, and what it does meanwhile.

use super::*;
use crate::proto::v1::{PutResponse, tagged_response};

fn gets(request: &TaggedRequest) -> bool {
    matches!(request.request, Some(tagged_request::Request::Get(_)))
}

/// With more time than a test lets pass, on a connection that is not taken for dead when it does.
fn unhurried(config: &mut ClientConfig) {
    (config.timeout, config.keep_alive_interval) = (2 * HOUR, 3 * HOUR);
}

/// A leader that is slow: holds what it is sent until it is asked to get a key, and answers all then.
fn slow() -> impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static {
    let mut held = Vec::new();
    move |requests| {
        let over = requests.iter().any(gets);
        held.extend(requests);
        if over { leader(std::mem::take(&mut held)) } else { Step::Answer(vec![]) }
    }
}

/// It would not become faster by being sent everything again, and the answer to the first copy is as good.
#[tokio::test]
async fn what_a_slow_leader_is_sent_is_sent_once_and_answered() {
    let node = Fake::start(slow());
    let client = client_with(&[&node], unhurried);
    let scope = Scope::default();
    let range = Range::key("k");
    let answered = async {
        until("both are sent", || node.requests() == 2).await;
        pass(HOUR).await;
        get(&client, "k", ReadLevel::Linearizable).await.unwrap();
    };
    let all = async {
        tokio::join!(
            client.put(&scope, "k", "v"),
            client.range(&scope, range, ReadLevel::Linearizable),
            answered
        )
    };
    let (written, read, ()) = timeout(HOUR + PATIENCE, all).await.expect("the client hangs");
    assert_eq!(written.unwrap().revision, 1);
    read.unwrap();
    assert_eq!((node.requests(), client.metrics().retries), (3, 0));
}

/// A node that was chosen is waited for: that another leads is known, and no reason to leave it.
#[tokio::test]
async fn a_read_at_a_chosen_node_is_not_broken_off_because_another_leads() {
    let (first, second) = (Fake::start(leader), Fake::start(slow()));
    first.set_status(status_of(1, "leader", 1, None));
    second.set_status(status_of(2, "follower", 1, Some((1, &first))));
    let client = client_with(&[&first, &second], |config| config.stall_after = Duration::from_millis(1));
    put(&client, "k", "v").await.unwrap();
    client.status_all().await;
    let chosen = Endpoint::parse(&second.endpoint()).unwrap();
    let range = || Request::Range { scope: Scope::default(), range: Range::key("k") };
    let get = Request::Get { scope: Scope::default(), key: "k".into() };
    let answered = async {
        until("it is sent", || second.requests() >= 1).await;
        for _ in 0..10 {
            pass(Duration::from_millis(50)).await;
        }
        client.execute_at(&chosen, get, ReadLevel::Local).await.unwrap();
    };
    let read = client.execute_at(&chosen, range(), ReadLevel::Linearizable);
    let (read, ()) =
        timeout(PATIENCE, async { tokio::join!(read, answered) }).await.expect("the client hangs");
    read.unwrap();
    assert_eq!(second.requests(), 2);
}

#[tokio::test]
async fn what_its_caller_has_given_up_is_not_sent() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = ClientConfig { connect_timeout: HOUR, exactly_once: false, ..ClientConfig::default() };
    let client = Client::new([listener.local_addr().unwrap().to_string()], config).unwrap();
    let given_up = timeout(Duration::from_millis(50), put(&client, "k", "v")).await;
    assert!(given_up.is_err(), "nobody answers there yet");
    let node = Fake::start_on(listener, |requests| {
        assert!(requests.iter().all(gets), "{requests:?}");
        leader(requests)
    });
    get(&client, "k", ReadLevel::Linearizable).await.unwrap();
    assert_eq!(node.requests(), 1);
}

/// What waits behind writes to a leader that is slow is not held up by their having more time.
#[tokio::test]
async fn a_read_behind_a_full_queue_goes_elsewhere_in_time() {
    let (first, second) = (Fake::start(silent), Fake::start(leader));
    first.set_status(status_of(1, "leader", 1, None));
    let client = client_with(&[&first, &second], |config| {
        (config.exactly_once, config.timeout) = (false, HOUR);
        (config.in_flight_requests, config.batch_requests) = (1, 1);
        config.attempt_timeout = Duration::from_millis(50);
    });
    let endpoint = Endpoint::parse(&first.endpoint()).unwrap();
    client.status(&endpoint).await.unwrap();
    let scope = Scope::default();
    let writes = join_all((0..3).map(|_| client.put(&scope, "k", "v")));
    let read = async {
        until("one is in flight", || first.requests() == 1).await;
        let client = client.preferring(ReadPreference::weighted([(endpoint, 1)]));
        get(&client, "k", ReadLevel::Local).await.unwrap();
    };
    tokio::select! {
        _ = writes => panic!("nobody has answered them"),
        () = read => {}
    }
    assert_eq!((first.requests(), second.requests()), (1, 1));
}

/// It has been sent again meanwhile, on another stream and under another tag.
#[tokio::test]
async fn an_answer_to_what_an_earlier_stream_lost_answers_nobody() {
    let mut lost = None;
    let node = Fake::start(move |requests| {
        let Some(tag) = lost else {
            lost = Some(requests[0].tag);
            return Step::BreakStream;
        };
        let put = PutResponse { revision: 99, ..Default::default() };
        let late = TaggedResponse { tag, response: Some(tagged_response::Response::Put(put)) };
        let answers = requests.iter().map(served);
        Step::Answer([late].into_iter().chain(answers).collect())
    });
    let client = client_of(&[&node]);
    assert_eq!(put(&client, "k", "v").await.unwrap().revision, 1);
    assert_eq!(put(&client, "k", "four").await.unwrap().revision, 4);
    assert_eq!(node.requests(), 3);
}
