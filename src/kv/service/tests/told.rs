//! What failed calls are told besides their code: why, and who leads.

use bytes::Bytes;
use tonic_prost::ProstCodec;

use super::*;
use crate::reason::Reason as Why;

fn known(status: &tonic::Status) -> Failure {
    let failure = details::failure(status.details()).unwrap_or_else(|| panic!("{status:?} says no more"));
    assert_eq!((failure.code, &*failure.message), (status.code() as i32, status.message()));
    failure
}

fn follows(port: &Port) {
    port.node.state.send_modify(|state| {
        state.role = Role::Follower;
        state.leader = Some(Leader { node_id: 2, client: "b:7802".to_owned() });
    });
}

fn leader(failure: &Failure) -> Option<(u64, &str)> {
    failure.leader.as_ref().map(|leader| (leader.node_id, &*leader.client))
}

const LEADER: Option<(u64, &str)> = Some((2, "b:7802"));

/// Calls `path` with bytes as the message.
async fn call(port: &Port, path: &'static str, message: &'static [u8]) -> tonic::Status {
    let mut client = tonic::client::Grpc::new(port.channel().await);
    client.ready().await.unwrap();
    let request = tonic::Request::new(Raw(Bytes::from_static(message)));
    let path = axum::http::uri::PathAndQuery::from_static(path);
    let answer: Result<tonic::Response<v1::GetResponse>, _> =
        client.unary(request, path, ProstCodec::default()).await;
    answer.unwrap_err()
}

/// A message of any bytes.
#[derive(Debug, Default)]
struct Raw(Bytes);

impl prost::Message for Raw {
    fn encode_raw(&self, buffer: &mut impl bytes::BufMut) {
        buffer.put_slice(&self.0);
    }

    fn merge_field(
        &mut self,
        _: u32,
        _: prost::encoding::WireType,
        _: &mut impl bytes::Buf,
        _: prost::encoding::DecodeContext,
    ) -> Result<(), prost::DecodeError> {
        unreachable!("it is only sent")
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {}
}

#[tokio::test]
async fn what_the_transport_refuses_is_told_like_everything_else() {
    let port = Port::open().await;
    follows(&port);
    for (path, message, code, why) in [
        ("/quorate.v1.Kv/Get", &b"\xff\xff\xff"[..], Code::InvalidArgument, "cannot be read"),
        ("/quorate.v1.Kv/Put", &b"\x0a\xff"[..], Code::InvalidArgument, "cannot be read"),
        ("/quorate.v1.Kv/Nothing", b"", Code::Unimplemented, "there is no /quorate.v1.Kv/Nothing"),
        ("/quorate.v9.Kv/Get", b"", Code::Unimplemented, "there is no /quorate.v9.Kv/Get"),
    ] {
        let status = call(&port, path, message).await;
        let failure = known(&status);
        assert_eq!((status.code(), failure.reason()), (code, Why::Invalid), "{path}: {status:?}");
        assert!(failure.message.contains(why) && !failure.maybe_applied, "{path}: {failure:?}");
        assert_eq!(leader(&failure), LEADER, "{path}");
    }
    let channel = Channel::from_shared(format!("http://{}", port.address)).unwrap();
    let channel = channel.origin("http://evil.example".parse().unwrap()).connect().await.unwrap();
    let status = KvClient::new(channel).get(v1::GetRequest::default()).await.unwrap_err();
    assert_eq!((status.code(), known(&status).reason()), (Code::PermissionDenied, Why::Invalid));
}

/// The code is that of the reason, whoever refuses the request.
#[tokio::test]
async fn a_message_above_the_limit_is_too_large() {
    let port = Port::open().await;
    let message = vec![0; crate::door::MAX_MESSAGE_BYTES + 1].leak();
    let status = call(&port, "/quorate.v1.Kv/Put", message).await;
    assert_eq!(
        (status.code(), known(&status).reason()),
        (Code::InvalidArgument, Why::TooLarge),
        "{status:?}"
    );
}

/// Nothing of it was begun, and what came before it has been answered.
#[tokio::test]
async fn a_pipeline_is_told_what_is_wrong_with_its_message() {
    let port = Port::open().await;
    follows(&port);
    for path in ["/quorate.v1.Kv/Pipeline", "/quorate.v1.Pipeline/Run"] {
        let mut client = tonic::client::Grpc::new(port.channel().await);
        client.ready().await.unwrap();
        let requests = tonic::Request::new(futures::stream::iter([Raw(Bytes::from_static(b"\xff"))]));
        let path = axum::http::uri::PathAndQuery::from_static(path);
        let answers: tonic::Response<tonic::Streaming<v1::PipelineResponse>> =
            client.streaming(requests, path.clone(), ProstCodec::default()).await.unwrap();
        let status = within(answers.into_inner().message()).await.unwrap_err();
        let failure = known(&status);
        assert_eq!(
            (status.code(), failure.reason()),
            (Code::InvalidArgument, Why::Invalid),
            "{path}: {status:?}"
        );
        assert!(!failure.maybe_applied && failure.message.contains("cannot be read"), "{path}: {failure:?}");
    }
}

#[tokio::test]
async fn every_failure_names_the_leader_that_is_known() {
    let port = Port::open().await;
    follows(&port);
    let mut kv = port.kv().await;
    let failure = known(&kv.put(v1::PutRequest::default()).await.unwrap_err());
    assert_eq!((failure.reason(), leader(&failure)), (Why::Invalid, LEADER));
    let long = v1::WatchRequest { start: vec![0; 100_000].into(), ..Default::default() };
    let failure = known(&kv.watch(long).await.unwrap_err());
    assert_eq!(leader(&failure), LEADER);
    let mut pipeline = port.pipeline().await;
    pipeline.send([(1, Some(put("", b"")))]);
    let Reply::Failure(failure) = &pipeline.answers(1).await[&1] else { panic!("it was applied") };
    assert_eq!((failure.reason(), leader(failure)), (Why::Invalid, LEADER));
    port.node.state.send_modify(|state| state.leader = None);
    let failure = known(&kv.put(v1::PutRequest::default()).await.unwrap_err());
    assert_eq!(leader(&failure), None);
}

#[test]
fn a_refusal_that_knows_better_is_left_alone() {
    let state = FakeNode::new().state();
    let named = |reason: Why| {
        let mut failure = Failure { reason: reason.into(), ..Default::default() };
        crate::door::told::name_leader(&mut failure, &state);
        failure.leader.map(|leader| leader.node_id)
    };
    assert_eq!(named(Why::NotLeader), None, "the node may believe in itself a little longer");
    assert_eq!(named(Why::Interrupted), None);
    assert_eq!(named(Why::QuotaExceeded), Some(7));
    let mut failure =
        Failure { leader: Some(v1::LeaderHint { node_id: 3, ..Default::default() }), ..Default::default() };
    crate::door::told::name_leader(&mut failure, &state);
    assert_eq!(failure.leader.map(|leader| leader.node_id), Some(3));
}

#[tokio::test]
async fn a_stream_that_is_open_at_its_deadline_is_told_so() {
    let port = Port::open().await;
    follows(&port);
    let mut kv = port.kv().await;
    let mut request = tonic::Request::new(v1::WatchRequest::default());
    // Written by hand: with a timeout of its own the client would give up by itself.
    request.metadata_mut().insert("grpc-timeout", "500m".parse().unwrap());
    let mut watched = kv.watch(request).await.unwrap().into_inner();
    let end = within(async {
        loop {
            match watched.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it has ended as if nothing were missing"),
                Err(status) => return status,
            }
        }
    })
    .await;
    let failure = known(&end);
    assert_eq!((end.code(), failure.reason()), (Code::DeadlineExceeded, Why::DeadlineExceeded), "{end:?}");
    assert_eq!((failure.maybe_applied, leader(&failure)), (false, LEADER));

    port.node.hold();
    let (requests, outgoing) = mpsc::unbounded_channel();
    let mut request = tonic::Request::new(UnboundedReceiverStream::new(outgoing));
    request.metadata_mut().insert("grpc-timeout", "500m".parse().unwrap());
    let mut answers = port.kv().await.pipeline(request).await.unwrap().into_inner();
    let asked = TaggedRequest { tag: 1, request: Some(put("k", b"v")) };
    requests.send(PipelineRequest { requests: vec![asked] }).unwrap();
    let end = within(answers.message()).await.unwrap_err();
    let failure = known(&end);
    assert_eq!(
        (failure.reason(), failure.maybe_applied),
        (Why::DeadlineExceeded, true),
        "a write is under way"
    );
    port.node.release();
}
