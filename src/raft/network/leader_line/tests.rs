use std::sync::atomic::AtomicUsize;

use super::*;
use crate::raft::network::addresses::Addresses;
use crate::raft::network::{Hello, IdentifyRequest, IdentifyResponse};
use crate::types::Leader;

/// The far ends of the connections that were made.
struct Fake {
    dials: AtomicUsize,
    accepted: mpsc::UnboundedSender<Connected>,
    refuse: AtomicBool,
}

struct Connected {
    target: Target,
    requests: mpsc::Receiver<Request>,
    responses: mpsc::Sender<Response>,
}

impl Transport for Fake {
    fn connect(
        &self,
        target: Target,
        _hello: Hello,
        purpose: Purpose,
    ) -> BoxFuture<'static, Result<Connection, DialError>> {
        assert_eq!(purpose, Purpose::Upstream);
        self.dials.fetch_add(1, Ordering::Relaxed);
        if self.refuse.load(Ordering::Relaxed) {
            return async { Err(DialError::Unreachable("nobody there".to_owned())) }.boxed();
        }
        let (requests, sent) = mpsc::channel(8);
        let (answers, responses) = mpsc::channel(8);
        let _ = self.accepted.send(Connected { target, requests: sent, responses: answers });
        async { Ok(Connection { requests, responses: responses.into() }) }.boxed()
    }

    fn identify(
        &self,
        _address: String,
        _request: IdentifyRequest,
    ) -> BoxFuture<'static, Result<IdentifyResponse, DialError>> {
        unreachable!("nobody is asked who it is on this line")
    }
}

const PATIENCE: Duration = Duration::from_secs(2);

fn member(id: u128) -> Member {
    Member {
        peer: format!("n{id}:1"),
        client: String::new(),
        incarnation: Incarnation(id),
        ..Member::default()
    }
}

fn line() -> (LeaderLine, Arc<Fake>, mpsc::UnboundedReceiver<Connected>) {
    let (accepted, connected) = mpsc::unbounded_channel();
    let fake = Arc::new(Fake { dials: AtomicUsize::new(0), accepted, refuse: AtomicBool::new(false) });
    let handshake = OwnHandshake {
        cluster: "c".to_owned(),
        node_id: 1,
        incarnation: Incarnation(1),
        peer: String::new(),
        addresses: Arc::new(Addresses::default()),
        refused: Arc::new(|_| {}),
    };
    (LeaderLine::new(handshake, fake.clone()), fake, connected)
}

fn index(id: u64, index: u64) -> Response {
    let outcome = Some(read_index_response::Outcome::Index(index));
    Response { id, body: Some(response::Body::ReadIndex(proto::ReadIndexResponse { outcome })) }
}

#[tokio::test(start_paused = true)]
async fn answers_in_any_order_on_one_connection() {
    let (line, fake, mut connected) = line();
    let ask = |line: LeaderLine| async move { line.read_index(2, &member(2), PATIENCE).await };
    let slow = runtime::spawn(ask(line.clone()));
    let mut far = connected.recv().await.unwrap();
    let first = far.requests.recv().await.unwrap();
    let quick = runtime::spawn(ask(line.clone()));
    let second = far.requests.recv().await.unwrap();
    far.responses.send(index(second.id, 20)).await.unwrap();
    assert_eq!(quick.await.unwrap(), Ok(ReadIndexAnswer::Index(20)));
    far.responses.send(index(first.id, 10)).await.unwrap();
    assert_eq!(slow.await.unwrap(), Ok(ReadIndexAnswer::Index(10)));
    assert_eq!(fake.dials.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_broken_connection_ends_its_calls_and_is_replaced() {
    let (line, fake, mut connected) = line();
    let call = runtime::spawn({
        let line = line.clone();
        async move { line.read_index(2, &member(2), PATIENCE).await }
    });
    let mut far = connected.recv().await.unwrap();
    far.requests.recv().await.unwrap();
    drop(far);
    assert_eq!(call.await.unwrap(), Err(LeaderLineError::Broken { leader: 2 }));

    let again = runtime::spawn(async move { line.read_index(2, &member(2), PATIENCE).await });
    let mut far = connected.recv().await.unwrap();
    let request = far.requests.recv().await.unwrap();
    far.responses.send(index(request.id, 3)).await.unwrap();
    assert_eq!(again.await.unwrap(), Ok(ReadIndexAnswer::Index(3)));
    assert_eq!(fake.dials.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn a_new_leader_gets_a_connection_of_its_own() {
    let (line, _fake, mut connected) = line();
    let gone = line.read_index(2, &member(2), Duration::from_millis(10)).await;
    assert!(matches!(gone, Err(LeaderLineError::Timeout { leader: 2, .. })), "{gone:?}");
    assert_eq!(connected.recv().await.unwrap().target.node_id, 2);
    let answer = runtime::spawn(async move { line.read_index(3, &member(3), PATIENCE).await });
    let mut far = connected.recv().await.unwrap();
    assert_eq!(far.target, Target { node_id: 3, address: "n3:1".to_owned() });
    let request = far.requests.recv().await.unwrap();
    far.responses.send(index(request.id, 3)).await.unwrap();
    assert_eq!(answer.await.unwrap(), Ok(ReadIndexAnswer::Index(3)));
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_is_given_up_and_a_lively_one_is_kept() {
    let (line, fake, mut connected) = line();
    let short = Duration::from_millis(10);
    line.read_index(2, &member(2), short).await.unwrap_err();
    let _silent = connected.recv().await.unwrap();

    let ask = |line: LeaderLine, patience| async move { line.read_index(2, &member(2), patience).await };
    let unanswered = runtime::spawn(ask(line.clone(), short));
    let mut far = connected.recv().await.unwrap();
    far.requests.recv().await.unwrap();
    tokio::time::sleep(short / 2).await;
    // The answer to nobody's call is a sign of life all the same.
    far.responses.send(index(9999, 1)).await.unwrap();
    unanswered.await.unwrap().unwrap_err();

    let answer = runtime::spawn(ask(line, PATIENCE));
    let request = far.requests.recv().await.unwrap();
    far.responses.send(index(request.id, 4)).await.unwrap();
    assert_eq!(answer.await.unwrap(), Ok(ReadIndexAnswer::Index(4)));
    assert_eq!(fake.dials.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn who_does_not_answer_is_not_dialled_all_the_time() {
    let (line, fake, _connected) = line();
    fake.refuse.store(true, Ordering::Relaxed);
    for _ in 0..100 {
        let failed = line.read_index(2, &member(2), PATIENCE).await;
        assert!(matches!(failed, Err(LeaderLineError::NotConnected { leader: 2, .. })), "{failed:?}");
    }
    assert_eq!(fake.dials.load(Ordering::Relaxed), 1);
    tokio::time::sleep(DIAL_PAUSE).await;
    line.read_index(2, &member(2), PATIENCE).await.unwrap_err();
    assert_eq!(fake.dials.load(Ordering::Relaxed), 2);
}

fn call() -> LeaderCall {
    LeaderCall::TransferLeader { to: Some(3) }
}

/// The outcome of a call on a fresh line, and the far end once it was connected to.
async fn forwarded(
    patience: Duration,
    far_end: impl AsyncFnOnce(&mut Connected),
) -> Result<Result<CallDone, CallError>, LeaderLineError> {
    let (line, _fake, mut connected) = line();
    let asked = runtime::spawn(async move {
        line.forward(2, &member(2), &call(), patience, std::future::pending()).await
    });
    let mut far = connected.recv().await.unwrap();
    far_end(&mut far).await;
    drop(far);
    asked.await.unwrap()
}

async fn answer_with(far: &mut Connected, body: response::Body) {
    let request = far.requests.recv().await.unwrap();
    let Some(request::Body::Forward(asked)) = request.body else { panic!("{request:?}") };
    assert_eq!(asked.patience_ms, PATIENCE.as_millis() as u64, "what is left, and no point in time");
    far.responses.send(Response { id: request.id, body: Some(body) }).await.unwrap();
    // The answer is taken in before the connection goes.
    tokio::time::sleep(Duration::from_millis(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_forwarded_call_is_answered_with_what_the_leader_did() {
    let leader = Leader { node_id: 3, client: "c:3".to_owned() };
    let answer = calls::answer_to_wire(Ok(CallDone::Leads(leader.clone())));
    let outcome = forwarded(PATIENCE, async move |far: &mut Connected| {
        answer_with(far, response::Body::Forward(answer)).await;
    });
    assert_eq!(outcome.await.unwrap().unwrap(), CallDone::Leads(leader));
}

/// A build of before answers like this.
#[tokio::test(start_paused = true)]
async fn a_leader_that_does_not_know_the_call_has_done_nothing() {
    let outcome = forwarded(PATIENCE, async |far: &mut Connected| {
        answer_with(far, response::Body::Failure("malformed message: request is empty".to_owned())).await;
    });
    let error = outcome.await.unwrap_err();
    assert!(matches!(error, LeaderLineError::Failed { leader: 2, .. }) && !error.maybe_done(), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_left_and_is_not_answered_may_have_been_done() {
    let broken = forwarded(PATIENCE, async |far: &mut Connected| {
        far.requests.recv().await.unwrap();
    });
    let error = broken.await.unwrap_err();
    assert!(matches!(error, LeaderLineError::Broken { .. }) && error.maybe_done(), "{error:?}");

    let late = forwarded(PATIENCE, async |far: &mut Connected| {
        far.requests.recv().await.unwrap();
        tokio::time::sleep(PATIENCE * 2).await;
    });
    let error = late.await.unwrap_err();
    assert!(matches!(error, LeaderLineError::Timeout { sent: true, .. }) && error.maybe_done(), "{error:?}");

    let strange = forwarded(PATIENCE, async |far: &mut Connected| {
        answer_with(far, response::Body::Forward(proto::ForwardResponse::default())).await;
    });
    let error = strange.await.unwrap_err();
    assert!(matches!(error, LeaderLineError::Unintelligible { .. }) && error.maybe_done(), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn an_impatient_caller_does_not_end_the_connection_of_others() {
    let (line, fake, mut connected) = line();
    let asked = |patience| {
        let line = line.clone();
        runtime::spawn(async move {
            line.forward(2, &member(2), &call(), patience, std::future::pending()).await.unwrap_err()
        })
    };
    let patient = asked(SILENCE * 2);
    let _far = connected.recv().await.unwrap();
    for _ in 0..3 {
        asked(Duration::from_millis(10)).await.unwrap();
    }
    assert_eq!(fake.dials.load(Ordering::Relaxed), 1);
    // It has heard nothing for so long that nobody may be there any more.
    patient.await.unwrap();
    asked(Duration::from_millis(10)).await.unwrap();
    assert_eq!(fake.dials.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_never_left_was_not_done() {
    let (line, fake, mut connected) = line();
    fake.refuse.store(true, Ordering::Relaxed);
    let error = line.forward(2, &member(2), &call(), PATIENCE, std::future::pending()).await.unwrap_err();
    assert!(matches!(error, LeaderLineError::NotConnected { .. }) && !error.maybe_done(), "{error:?}");

    // A leader that takes in nothing: the connection is full of what others have asked.
    fake.refuse.store(false, Ordering::Relaxed);
    tokio::time::sleep(DIAL_PAUSE).await;
    let before: Vec<_> = (0..8)
        .map(|_| {
            let line = line.clone();
            runtime::spawn(async move { line.read_index(2, &member(2), PATIENCE * 4).await })
        })
        .collect();
    let far = connected.recv().await.unwrap();
    tokio::time::sleep(Duration::from_millis(1)).await;
    let error = line.forward(2, &member(2), &call(), PATIENCE, std::future::pending()).await.unwrap_err();
    assert!(
        matches!(error, LeaderLineError::Timeout { sent: false, .. }) && !error.maybe_done(),
        "{error:?}"
    );
    assert_eq!(far.requests.len(), before.len(), "and it is not sent later");
    drop(far);
    for call in before {
        call.await.unwrap().unwrap_err();
    }
}

#[tokio::test(start_paused = true)]
async fn calls_leave_in_the_order_of_their_numbers() {
    let (line, _fake, mut connected) = line();
    for _ in 0..20 {
        let line = line.clone();
        runtime::spawn(async move {
            line.forward(2, &member(2), &call(), PATIENCE, std::future::pending()).await.map(drop)
        });
    }
    let mut far = connected.recv().await.unwrap();
    for expected in 1..=20 {
        assert_eq!(far.requests.recv().await.unwrap().id, expected);
    }
}
