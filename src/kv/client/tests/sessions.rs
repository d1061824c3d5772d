//! Writes in sessions: numbered, repeated, and honest about what became of them.

use super::fake::{Next, failure, steps};
use super::*;
use crate::proto::v1::UnconfirmedAnswer;
use crate::proto::v1::{AckLevel as WireAck, Header as WireHeader, Position, PutResponse, TxnResponse};
use crate::proto::v1::{TaggedRequest, tagged_request, tagged_response};
use crate::types::LogId;
use prost::Message as _;

/// Answers puts with this header.
fn answering(header: WireHeader) -> impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static {
    move |requests| {
        let put = PutResponse { header: Some(header.clone()), ..Default::default() };
        let answer = tagged_response::Response::Put(put);
        let answers = requests
            .iter()
            .map(|request| TaggedResponse { tag: request.tag, response: Some(answer.clone()) });
        Step::Answer(answers.collect())
    }
}

#[tokio::test]
async fn a_write_keeps_its_number_until_it_is_answered() {
    let mut breaks = 2;
    let mut repeated = answering(WireHeader { repeated_write: true, ..Default::default() });
    let (script, notes) = noting(move |requests| {
        if breaks > 0 {
            breaks -= 1;
            return Step::BreakStream;
        }
        repeated(requests)
    });
    let node = Fake::start(script);
    let client = client_of(&[&node]);
    assert!(put(&client, "k", "v").await.unwrap().header.repeated_write);
    put(&client, "k", "v").await.unwrap();
    assert_eq!(*notes.lock().unwrap(), [(1, 1), (1, 1), (1, 1), (1, 2)]);
    assert_eq!(node.sessions(), (1, 0));
    let metrics = client.metrics();
    assert_eq!((metrics.sessions_opened, metrics.of(Method::Put.name()).unwrap().requests), (1, 2));
    assert!(metrics.retries >= 2);
}

#[tokio::test]
async fn failures_that_leave_a_write_open_are_survived() {
    let node = Fake::start(leader);
    let client = client_of(&[&node]);
    let open = [Reason::Interrupted, Reason::NoQuorum, Reason::Stopped, Reason::Unspecified]
        .map(|reason| failure(reason, true));
    let all = open.into_iter().chain([failure(Reason::WindowExceeded, false)]);
    for (sequence, failure) in (1..).zip(all) {
        let (script, notes) = noting(steps([Next::Refuse(failure)]));
        node.set_script(script);
        put(&client, "k", "v").await.unwrap();
        assert_eq!(
            *notes.lock().unwrap(),
            [(1, sequence); 2],
            "under another number it would be another write"
        );
    }
}

#[tokio::test]
async fn an_expired_session_is_replaced_while_nothing_can_have_been_applied_in_it() {
    let expired = || Next::Refuse(failure(Reason::SessionExpired, false));
    let overloaded = || Next::Refuse(failure(Reason::Overloaded, false));
    let (script, notes) = noting(steps([overloaded(), expired()]));
    let node = Fake::start(script);
    let client = client_of(&[&node]);
    put(&client, "k", "v").await.unwrap();
    assert_eq!(*notes.lock().unwrap(), [(1, 1), (1, 1), (2, 1)]);
    assert_eq!(client.metrics().sessions_opened, 2);
}

#[tokio::test]
async fn a_session_that_expires_under_a_write_leaves_it_undecided() {
    let node = Fake::start(steps([Next::Break, Next::Refuse(failure(Reason::SessionExpired, false))]));
    let client = client_of(&[&node]);
    let error = put(&client, "k", "v").await.unwrap_err();
    let expected =
        matches!(error, ClientError::Failed { reason: Reason::SessionExpired, maybe_applied: true, .. });
    assert!(expected, "{error}");
    put(&client, "k", "v").await.unwrap();
}

#[tokio::test]
async fn whatever_ends_a_write_after_an_open_attempt_says_so() {
    let node = Fake::start(leader);
    let client = client_with(&[&node], |config| config.timeout = Duration::from_millis(300));
    for reason in [Reason::Invalid, Reason::TooLarge, Reason::AnswerForgotten, Reason::DiskFull] {
        let refuse = (0..100).map(|_| Next::Refuse(failure(reason, false)));
        node.set_script(steps([Next::Break].into_iter().chain(refuse)));
        let error = put(&client, "k", "v").await.unwrap_err();
        assert!(error.maybe_applied(), "{reason:?}: {error}");
    }
    let refuse = (0..1000).map(|_| Next::Refuse(failure(Reason::Overloaded, false)));
    node.set_script(steps([Next::Break].into_iter().chain(refuse)));
    let error = put(&client, "k", "v").await.unwrap_err();
    assert!(matches!(error, ClientError::DeadlineExceeded { maybe_applied: true, .. }), "{error}");
}

#[tokio::test]
async fn a_write_whose_nodes_are_all_gone_afterwards_is_undecided() {
    let mut node = Fake::start(silent);
    let client = client_with(&[&node], |config| {
        config.unavailable_after = Duration::ZERO;
        config.timeout = HOUR;
    });
    let scope = Scope::default();
    let fail = async {
        until("the write is in flight", || node.requests() > 0).await;
        let before = client.metrics().retries;
        node.kill();
        until("it is tried again in vain", || client.metrics().retries > before + 1).await;
        pass(HOUR).await;
    };
    let (error, ()) = tokio::join!(client.put(&scope, "k", "v"), fail);
    let error = error.unwrap_err();
    assert!(matches!(error, ClientError::DeadlineExceeded { maybe_applied: true, .. }), "{error}");
    // The next one has nothing under way.
    let error = put(&client, "k", "v").await.unwrap_err();
    assert!(!error.maybe_applied(), "{error}");
}

/// Whoever gives up connecting at once gives up no write that may have been applied.
#[tokio::test]
async fn a_write_whose_node_comes_back_in_time_is_sent_again() {
    let mut node = Fake::start(silent);
    let client = client_with(&[&node], |config| config.unavailable_after = Duration::ZERO);
    let address = node.address;
    let writing = put(&client, "k", "v");
    let restart = async {
        until("the write is in flight", || node.requests() > 0).await;
        node.kill();
        until("nobody listens there", || std::net::TcpStream::connect(address).is_err()).await;
        let again = crate::runtime::offload(move || Fake::start_at(address, silent)).await;
        let (script, notes) = noting(leader);
        again.set_script(script);
        (again, notes)
    };
    let (written, (_again, notes)) = tokio::join!(writing, restart);
    written.unwrap();
    assert_eq!(*notes.lock().unwrap(), [(1, 1)], "in the same place of its session");
}

#[tokio::test]
async fn callers_that_need_a_session_at_once_share_one() {
    let node = Fake::start(leader);
    let client = client_of(&[&node]);
    for write in join_all((0..50).map(|_| put(&client, "k", "v"))).await {
        write.unwrap();
    }
    assert_eq!(node.sessions(), (1, 0));
}

#[tokio::test]
async fn callers_that_need_a_session_at_once_share_its_refusal() {
    let node = Fake::start(refusing(failure(Reason::TooManySessions, false)));
    node.script_sessions();
    let client = client_with(&[&node], |config| {
        config.timeout = Duration::from_millis(500);
        config.retry_backoff_min = Duration::from_millis(100);
        config.retry_backoff_max = Duration::from_millis(100);
    });
    let mut told = 0;
    for write in join_all((0..50).map(|_| put(&client, "k", "v"))).await {
        let error = write.unwrap_err();
        assert!(!error.maybe_applied(), "{error}");
        told += u32::from(matches!(error, ClientError::Failed { reason: Reason::TooManySessions, .. }));
    }
    assert!(told > 0);
    assert!((2..=10).contains(&node.requests()), "one of them asks again and again: {}", node.requests());
}

#[tokio::test]
async fn a_place_for_a_session_is_waited_for() {
    let full = || Next::Refuse(failure(Reason::TooManySessions, false));
    let second = Fake::start(leader);
    let hint = not_leader(Some((2, second.endpoint())));
    let first = Fake::start(steps([full(), full(), full(), Next::Refuse(hint)]));
    first.script_sessions();
    put(&client_of(&[&first]), "k", "v").await.unwrap();
    assert_eq!((first.requests(), second.sessions()), (4, (1, 0)));
}

#[tokio::test]
async fn a_write_can_do_without_a_session_when_all_are_in_use() {
    let script = |requests: Vec<TaggedRequest>| match &requests[0].request {
        Some(tagged_request::Request::OpenSession(_)) => {
            refusing(failure(Reason::TooManySessions, false))(requests)
        }
        Some(tagged_request::Request::Put(put)) => {
            assert_eq!(put.options.unwrap_or_default().session, 0, "{put:?}");
            leader(requests)
        }
        _ => leader(requests),
    };
    let node = Fake::start(script);
    node.script_sessions();
    let client = client_with(&[&node], |config| config.without_session_when_full = true);
    put(&client, "k", "v").await.unwrap();
    assert_eq!(node.requests(), 2, "it does not wait for a place");
    // It is sent once: when its answer is lost it says so.
    node.set_script(move |requests| match &requests[0].request {
        Some(tagged_request::Request::Put(_)) => Step::BreakStream,
        _ => script(requests),
    });
    let error = put(&client, "k", "v").await.unwrap_err();
    assert!(error.maybe_applied(), "{error}");
    assert_eq!(node.requests(), 4);
}

#[tokio::test]
async fn opening_a_session_survives_lost_answers_and_a_change_of_leader() {
    let second = Fake::start(leader);
    let hint = not_leader(Some((2, second.endpoint())));
    let first = Fake::start(steps([Next::Break, Next::Break].into_iter().chain([Next::Refuse(hint)])));
    first.script_sessions();
    let client = client_of(&[&first]);
    put(&client, "k", "v").await.unwrap();
    assert_eq!((first.requests(), second.requests(), second.sessions()), (3, 1, (1, 0)));
}

#[tokio::test]
async fn the_window_is_never_exceeded_and_everybody_gets_through_it() {
    const WINDOW: u64 = 2;
    let node = Fake::start(|requests| {
        for request in &requests {
            let Some(tagged_request::Request::Put(put)) = &request.request else { panic!("{request:?}") };
            let options = put.options.unwrap();
            assert!(options.sequence < options.first_unanswered + WINDOW, "{options:?}");
        }
        leader(requests)
    });
    node.set_window(WINDOW);
    let client = client_of(&[&node]);
    for write in join_all((0..200).map(|_| put(&client, "k", "v"))).await {
        write.unwrap();
    }
}

#[tokio::test]
async fn waiting_for_room_in_the_window_ends_with_the_deadline() {
    let node = Fake::start(silent);
    node.set_window(1);
    let client = client_with(&[&node], |config| config.timeout = Duration::from_millis(200));
    let (first, second) = tokio::join!(put(&client, "k", "v"), put(&client, "k", "v"));
    assert!(first.unwrap_err().maybe_applied());
    let error = second.unwrap_err();
    assert!(matches!(error, ClientError::DeadlineExceeded { maybe_applied: false, .. }), "{error}");
    // Both have been given up: there is room again.
    node.set_script(leader);
    put(&client, "k", "v").await.unwrap();
}

#[tokio::test]
async fn closing_gives_the_session_back_and_a_later_write_opens_another() {
    let node = Fake::start(leader);
    let client = client_of(&[&node]);
    client.close().await;
    assert_eq!(node.sessions(), (0, 0), "none was open");
    put(&client, "k", "v").await.unwrap();
    client.close().await;
    until("the session is closed", || node.sessions() == (1, 1)).await;
    put(&client, "k", "v").await.unwrap();
    assert_eq!(node.sessions(), (2, 1));
}

#[tokio::test]
async fn closing_does_not_wait_for_a_cluster_that_does_not_answer() {
    let node = Fake::start(leader);
    let client = client_of(&[&node]);
    put(&client, "k", "v").await.unwrap();
    node.script_sessions();
    node.set_script(silent);
    let began = Instant::now();
    timeout(PATIENCE, client.close()).await.expect("the client hangs");
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "20 ms, and as long as this machine does something else"
    );
}

#[tokio::test]
async fn without_sessions_writes_carry_nothing() {
    let (script, notes) = noting(leader);
    let node = Fake::start(script);
    let client = sessionless(&[&node]);
    put(&client, "k", "v").await.unwrap();
    client.delete(&Scope::default(), "k").await.unwrap();
    assert_eq!(*notes.lock().unwrap(), [(0, 0), (0, 0)]);
    assert_eq!(node.sessions(), (0, 0));
}

#[tokio::test]
async fn an_acknowledgement_says_what_it_promises_and_who_holds_the_write() {
    let node = Fake::start(answering(WireHeader {
        node_id: 2,
        position: Some(Position { term: 3, index: 40, history: 0xabc }),
        ack: WireAck::All.into(),
        held_by: vec![1, 2, 3],
        ..Default::default()
    }));
    let client = client_of(&[&node]);
    let reply = client.put_with(&Scope::default(), "k", "v", AckLevel::All).await.unwrap();
    assert_eq!((reply.header.ack, &reply.header.held_by[..]), (AckLevel::All, &[1, 2, 3][..]));
    let own = reply.header.then_read(ReadLevel::Local);
    assert_eq!((own.level, own.after_index, own.history.0), (ReadLevel::Local, 40, 0xabc));

    node.set_script(refusing(Failure {
        position: Some(Position { term: 3, index: 41, history: 0xabc }),
        missing: vec![3],
        ..failure(Reason::AckTimeout, true)
    }));
    let error = client.put_with(&Scope::default(), "k", "v", AckLevel::All).await.unwrap_err();
    assert!(error.maybe_applied());
    assert_eq!(
        (PutReply::unconfirmed(&error), error.unconfirmed()),
        (None, None),
        "of a version that does not tell"
    );
    let ClientError::AckTimeout { position, missing, .. } = error else { panic!("{error}") };
    assert_eq!((position, missing), (Some(LogId::new(3, 41)), vec![3]));
}

#[tokio::test]
async fn what_not_every_voter_has_confirmed_is_told_as_the_reply_that_the_call_would_have_had() {
    let node = Fake::start(leader);
    let (client, scope) = (client_of(&[&node]), Scope::default());
    let position = Some(Position { term: 3, index: 41, history: 0xabc });
    let unconfirmed = |response: Vec<u8>| {
        let header = Some(WireHeader { node_id: 2, position, held_by: vec![1, 2], ..Default::default() });
        let unconfirmed = Some(Box::new(UnconfirmedAnswer { header, response: response.into() }));
        let failure = failure(Reason::AckTimeout, true);
        refusing(Failure { position, missing: vec![3], unconfirmed, ..failure })
    };
    let of = |header: &Header| (header.bookmark().to_string(), header.ack, header.held_by.clone());
    let expected = || ("41@0000000000000abc".to_owned(), AckLevel::Quorum, vec![1, 2]);

    node.set_script(unconfirmed(
        PutResponse { revision: 41, version: 2, ..Default::default() }.encode_to_vec(),
    ));
    let error = client.put_with(&scope, "k", "v", AckLevel::All).await.unwrap_err();
    let reply = PutReply::unconfirmed(&error).unwrap();
    assert_eq!((reply.revision, reply.version, of(&reply.header)), (41, 2, expected()));
    assert_eq!(DeleteReply::unconfirmed(&error), None, "it is the reply to a put");
    assert!(matches!(error, ClientError::AckTimeout { .. }) && error.maybe_applied());

    // Nothing was there: no field is set, so the response has no bytes.
    node.set_script(unconfirmed(Vec::new()));
    let error = client.delete_with(&scope, "k", AckLevel::All).await.unwrap_err();
    let reply = DeleteReply::unconfirmed(&error).unwrap();
    assert_eq!((reply.deleted, of(&reply.header)), (false, expected()));

    let held = TxnResponse { revision: 41, succeeded: false, ..Default::default() };
    node.set_script(unconfirmed(held.encode_to_vec()));
    let put = client.put_when(&scope, Compare::missing("k"), "k", "v", AckLevel::All).await;
    let reply = ConditionalPut::unconfirmed(&put.unwrap_err()).unwrap();
    assert_eq!((reply.succeeded, reply.revision, of(&reply.header)), (false, 41, expected()));

    node.set_script(unconfirmed(Vec::new()));
    let mut once = client.once().await.unwrap();
    let request = || Request::Delete { scope: Scope::default(), key: "k".into() };
    for _ in 0..2 {
        let error = once.execute_with(request(), AckLevel::All).await.unwrap_err();
        assert!(matches!(Response::unconfirmed(&error), Some(Response::Delete(_))), "{error}");
    }
}

#[tokio::test]
async fn a_full_disk_is_waited_for_and_named_if_it_lasts() {
    let node = Fake::start(steps([Next::Refuse(failure(Reason::DiskFull, false))]));
    let client = client_with(&[&node], |config| config.timeout = HOUR);
    put(&client, "k", "v").await.unwrap();
    node.set_script(refusing(failure(Reason::DiskFull, false)));
    let before = client.metrics().retries;
    let time_passes = async {
        // Between two attempts: of one under way nobody would know what becomes of it.
        let pauses = || client.metrics().nodes.iter().all(|node| node.in_flight == 0);
        until("it is refused again", || client.metrics().retries > before && pauses()).await;
        pass(HOUR).await;
    };
    let scope = Scope::default();
    let (refused, ()) = tokio::join!(client.put(&scope, "k", "v"), time_passes);
    let error = refused.unwrap_err();
    let expected =
        matches!(error, ClientError::Failed { reason: Reason::DiskFull, maybe_applied: false, .. });
    assert!(expected, "{error}");
}

#[tokio::test]
async fn a_session_of_another_history_is_said_once_and_then_replaced() {
    let node = Fake::start(leader);
    let client = client_of(&[&node]);
    put(&client, "k", "v").await.unwrap();
    node.set_script(steps([Next::Refuse(failure(Reason::OtherHistory, false))]));
    let error = put(&client, "k", "v").await.unwrap_err();
    assert_eq!((error.reason(), error.maybe_applied()), (Reason::OtherHistory, false), "{error}");
    assert_eq!(node.sessions().0, 1);
    put(&client, "k", "v").await.unwrap();
    assert_eq!(node.sessions().0, 2, "the old one does not exist in this history");
}
