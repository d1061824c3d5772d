//! One client that opens all sessions there are, and everybody else.

use quorate::kv::client::{ClientError, Reason, Scope};
use quorate::testkit::proto::v1::tagged_request::Request;
use quorate::testkit::proto::v1::tagged_response::Response;
use quorate::testkit::proto::v1::{
    Failure, OpenSessionRequest, PipelineRequest, PipelineResponse, TaggedRequest, kv_client::KvClient,
};
use serde_json::Value;
use tokio::time::timeout;
use tonic::Code;

use crate::support::{DEADLINE, TestCluster, client, start};

/// A day: they do not go away by themselves.
const TTL_MS: u64 = 24 * 3_600_000;
/// What one connection may have open, and the cluster.
const MAX_OPENER_SESSIONS: usize = 1_024;
const MAX_SESSIONS: usize = 16_384;

/// Opens `count` sessions on a connection of its own to `address`; returns how many were opened, and the first failure.
async fn open(address: &str, count: usize) -> (usize, Option<Failure>) {
    let mut kv = KvClient::connect(format!("http://{address}")).await.unwrap();
    let request = Some(Request::OpenSession(OpenSessionRequest { ttl_ms: TTL_MS }));
    let requests = (0..count as u64).map(|tag| TaggedRequest { tag, request: request.clone() }).collect();
    let outbound = futures::StreamExt::chain(
        futures::stream::iter([PipelineRequest { requests }]),
        futures::stream::pending(),
    );
    let mut answers = kv.pipeline(outbound).await.unwrap().into_inner();
    let (mut opened, mut failure, mut answered) = (0, None, 0);
    while answered < count {
        let message = timeout(DEADLINE, answers.message()).await.expect("no answer").unwrap();
        let Some(PipelineResponse { responses }) = message else { panic!("the stream has ended") };
        answered += responses.len();
        for response in responses {
            match response.response {
                Some(Response::OpenSession(_)) => opened += 1,
                Some(Response::Failure(refusal)) => failure = failure.or(Some(refusal)),
                other => panic!("{other:?}"),
            }
        }
    }
    (opened, failure)
}

fn json(nodes: &TestCluster, args: &[&str]) -> Value {
    let outcome = nodes.quorate(&[args, &["-o", "json"]].concat());
    assert!(outcome.status.success(), "{args:?}: {outcome:?}");
    serde_json::from_str(&outcome.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_client_that_opens_all_sessions_keeps_nobody_else_from_writing() {
    let nodes = start(&[]);
    let leader = nodes.leader(0).await.node_id;
    let address = nodes.node(leader).client_address();
    let (opened, refusal) = open(&address, MAX_OPENER_SESSIONS + 1).await;
    assert_eq!(opened, MAX_OPENER_SESSIONS);
    let refusal = refusal.unwrap();
    assert_eq!(refusal.reason(), Reason::TooManySessions);
    assert_eq!(refusal.code, i32::from(Code::ResourceExhausted));
    assert!(refusal.message.contains("1024") && !refusal.maybe_applied, "{refusal:?}");
    // More connections of the same client, until all sessions are in use.
    for _ in 1..MAX_SESSIONS / MAX_OPENER_SESSIONS {
        assert_eq!(open(&address, MAX_OPENER_SESSIONS).await, (MAX_OPENER_SESSIONS, None));
    }
    let full = json(&nodes, &["session", "list"]);
    assert_eq!(full["sessions"].as_array().unwrap().len(), MAX_SESSIONS, "in pages");

    // Others still write, with sessions of their own.
    let others = client(&nodes.cluster);
    others.put(&Scope::default(), "k", "v").await.unwrap();
    let outcome = nodes.quorate(&["put", "k", "from the command line"]);
    assert!(outcome.status.success(), "{outcome:?}");

    let listed = json(&nodes, &["session", "list"]);
    let sessions = listed["sessions"].as_array().unwrap();
    assert!(sessions.len() > MAX_SESSIONS - 10, "{} sessions", sessions.len());
    let first = &sessions[0];
    assert!(first["opener"].as_str().unwrap().starts_with("127.0.0.1:"), "{first}");
    for time in ["opened_ms", "used_ms", "expires_ms"] {
        assert!(first[time].as_u64().unwrap() > 1_700_000_000_000, "{first}");
    }
    let opener = first["opener"].as_str().unwrap();
    let of_opener = sessions.iter().filter(|session| session["opener"] == opener).count();
    let closed = json(&nodes, &["session", "close", first["session"].as_str().unwrap()]);
    assert_eq!(closed["closed"].as_array().unwrap().len(), 1, "{closed}");
    let again = nodes.quorate(&["session", "close", first["session"].as_str().unwrap()]);
    again.assert_refused(4, &["not open"]);
    let left = json(&nodes, &["session", "list", "--opener", opener]);
    assert_eq!(left["sessions"].as_array().unwrap().len(), of_opener - 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_an_operator_closed_costs_its_client_a_new_one() {
    let nodes = start(&[]);
    nodes.put("k", "1").await;
    let sessions = nodes.client.list_sessions(0, 10).await.unwrap().sessions;
    assert_eq!(sessions.len(), 1, "{sessions:?}");
    let mut once = nodes.client.once().await.unwrap();
    assert!(nodes.client.close_session(sessions[0].session).await.unwrap());
    // A write that has its number in the old one is told so; the next one goes into a new session.
    let error = once.put(&Scope::default(), "k", "2").await.unwrap_err();
    assert!(matches!(error, ClientError::Failed { reason: Reason::SessionExpired, .. }), "{error}");
    nodes.put("k", "3").await;
    let page = nodes.client.list_sessions(0, 10).await.unwrap();
    assert_eq!((page.sessions.len(), page.next_after), (1, None));
    assert_ne!(page.sessions[0].session, sessions[0].session);
    assert!(page.sessions[0].expires_ms > page.sessions[0].used_ms);
}
