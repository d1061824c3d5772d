//! A guest with defects: a request that brings one about fails alone, on the pipeline it came on and on the node.

use std::io::{self, Read, Write};
use std::path::Path;

use bytes::Bytes;
use quorate::Reason;
use quorate::server::Rejected;
use quorate::server::Server;
use quorate::server::{Call, Guest, Method};
use quorate::testkit::proto::v1::answer::Content as Answered;
use quorate::testkit::proto::v1::call::Content;
use quorate::testkit::proto::v1::pipeline_client::PipelineClient;
use quorate::testkit::proto::v1::{self, PipelineCalls};
use quorate::{ApplyContext, Engine, EngineConfig, LogId, StateMachine};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::{DEADLINE, channel};

/// Replies with what it is told, and answers with what it is asked.
#[derive(Clone)]
struct Echo;

/// What is told.
#[derive(serde::Deserialize)]
struct Told(String);

impl serde::Serialize for Told {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        assert_ne!(self.0, "serialize", "a defect");
        serializer.serialize_newtype_struct("Told", &self.0)
    }
}

impl StateMachine for Echo {
    type Command = Told;
    type Reply = String;
    type Query = String;
    type Answer = String;
    type View = ();

    fn apply(&mut self, _: &ApplyContext, Told(text): Told) -> String {
        text
    }

    fn most_growth_bytes(Told(text): &Told) -> u64 {
        assert_ne!(text, "most_growth_bytes", "a defect");
        0
    }

    fn view(&self) {}

    fn query((): &(), query: String) -> String {
        assert_ne!(query, "query", "a defect");
        query
    }

    fn write_snapshot((): &(), _: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }

    fn read_snapshot(_: u32, _: &mut dyn Read) -> io::Result<Self> {
        Ok(Self)
    }
}

/// Panics in the function that a request names.
enum Faulty {}

const LARGE_BYTES: usize = 5 * 1024 * 1024;

impl Guest for Faulty {
    type Machine = Echo;
    type Request = (usize, String);
    type Response = String;
    type Asked = String;

    const METHODS: &'static [Method] =
        &[Method::write("tell").weighed(), Method::read("ask").counted_as(100_000)];

    fn parse(method: usize, payload: Bytes) -> Result<Self::Request, Rejected> {
        assert_ne!(payload, "parse", "a defect");
        let text = String::from_utf8(payload.to_vec());
        Ok((method, text.map_err(|_| Rejected::invalid("it is no text"))?))
    }

    fn expected_bytes((_, text): &Self::Request) -> usize {
        assert_ne!(text, "expected_bytes", "a defect");
        0
    }

    fn call((method, text): Self::Request) -> Result<(Call<Told, String>, String), Rejected> {
        assert_ne!(text, "call", "a defect");
        Ok((if method == 0 { Call::Write(Told(text.clone())) } else { Call::Read(text.clone()) }, text))
    }

    fn tells_times(asked: &String) -> bool {
        assert_ne!(asked, "tells_times", "a defect");
        false
    }

    fn written(_: String, _: LogId, reply: Option<String>) -> Result<String, Rejected> {
        assert_ne!(reply.as_deref(), Some("written"), "a defect");
        Ok(reply.unwrap_or_default())
    }

    fn answered(_: String, answer: String) -> Result<String, Rejected> {
        assert_ne!(answer, "answered", "a defect");
        Ok(answer)
    }

    fn encode(response: String) -> Bytes {
        assert_ne!(response, "encode", "a defect");
        match response.as_str() {
            "large" => vec![0; LARGE_BYTES].into(),
            "quarter" => vec![0; LARGE_BYTES / 4].into(),
            _ => response.into(),
        }
    }

    /// Says nothing of what is large.
    fn response_bytes(response: &String) -> usize {
        assert_ne!(response, "response_bytes", "a defect");
        0
    }
}

async fn with_node(dir: &Path, test: impl AsyncFnOnce(&mut PipelineClient<tonic::transport::Channel>)) {
    let peer = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let server = Server::<Faulty>::bind("127.0.0.1:0").await.unwrap();
    let address = server.local_addr();
    let mut config = EngineConfig::new(1, dir, peer.local_addr().unwrap().to_string());
    config.peer_listener = Some(peer);
    let engine = Engine::open(config, Echo).await.unwrap();
    assert!(engine.ready(DEADLINE).await);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = server.serve(engine.clone(), async { stopped.await.unwrap() });
    let test = async {
        test(&mut PipelineClient::new(channel(address).await)).await;
        assert_eq!(engine.state().fatal, None);
        stop.send(()).unwrap();
    };
    let (served, ()) = tokio::join!(serving, test);
    served.unwrap();
    engine.shutdown().await;
}

fn call(tag: u64, method: &str, payload: &'static str) -> v1::Call {
    let content = Some(Content::Payload(payload.into()));
    v1::Call { tag, method: method.to_owned(), content, ..Default::default() }
}

/// What is answered to `calls`, by tag.
async fn answers(
    pipeline: &mut PipelineClient<tonic::transport::Channel>,
    calls: Vec<v1::Call>,
) -> Vec<Result<usize, v1::Failure>> {
    let count = calls.len();
    let mut all = vec![None; count];
    let mut answers = pipeline.run(tokio_stream::once(PipelineCalls { calls })).await.unwrap().into_inner();
    while let Some(message) = timeout(DEADLINE, answers.message()).await.expect("all are answered").unwrap() {
        for answer in message.answers {
            let outcome = match answer.content.unwrap() {
                Answered::Payload(payload) => Ok(payload.len()),
                Answered::Failure(failure) => Err(failure),
                other => panic!("{other:?}"),
            };
            assert_eq!(all[answer.tag as usize].replace(outcome), None, "it is answered twice");
        }
    }
    all.into_iter().map(|outcome| outcome.expect("it is answered")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_makes_its_guest_panic_fails_alone() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |pipeline| {
        let writes = [
            "parse",
            "expected_bytes",
            "call",
            "tells_times",
            "most_growth_bytes",
            "serialize",
            "written",
            "encode",
            "response_bytes",
        ];
        let reads = ["parse", "call", "query", "answered", "encode", "response_bytes"];
        let applied = ["written", "encode", "response_bytes"];
        for (method, places) in [("tell", &writes[..]), ("ask", &reads[..])] {
            for &place in places {
                let calls = vec![
                    call(0, "tell", "before"),
                    call(1, method, place),
                    call(2, "ask", "after"),
                    call(3, method, place),
                ];
                let answers = answers(pipeline, calls).await;
                assert_eq!((&answers[0], &answers[2]), (&Ok(6), &Ok(5)), "{method} {place}");
                for answer in [&answers[1], &answers[3]] {
                    // Of what a request may bring only a guess is lost.
                    if place == "expected_bytes" {
                        assert_eq!(answer, &Ok(place.len()));
                        continue;
                    }
                    let failure = answer.as_ref().unwrap_err();
                    assert!(failure.message.contains("a defect"), "{method} {place}: {failure:?}");
                    let may_be = method == "tell" && applied.contains(&place);
                    assert_eq!(failure.maybe_applied, may_be, "{method} {place}: {failure:?}");
                }
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_no_message_can_carry_fails_alone() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |pipeline| {
        let mut calls = vec![call(0, "tell", "large"), call(1, "ask", "large"), call(2, "tell", "after")];
        calls.extend((3..13).map(|tag| call(tag, if tag % 2 == 0 { "tell" } else { "ask" }, "quarter")));
        let answers = answers(pipeline, calls).await;
        for (answer, may_be) in [(&answers[0], true), (&answers[1], false)] {
            let failure = answer.as_ref().unwrap_err();
            assert_eq!((failure.reason(), failure.maybe_applied), (Reason::TooLarge, may_be), "{failure:?}");
        }
        assert_eq!(answers[2], Ok(5));
        assert!(answers[3..].iter().all(|answer| *answer == Ok(LARGE_BYTES / 4)), "{answers:?}");
    })
    .await;
}

/// What a call says of how it is to be carried out must fit it.
#[tokio::test(flavor = "multi_thread")]
async fn options_of_the_other_kind_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |pipeline| {
        let write = v1::Call { level: v1::ReadLevel::Local.into(), ..call(0, "tell", "x") };
        let read = v1::Call { write: Some(v1::WriteOptions::default()), ..call(1, "ask", "x") };
        for answer in answers(pipeline, vec![write, read]).await {
            assert_eq!(answer.unwrap_err().reason(), Reason::Invalid);
        }
    })
    .await;
}
