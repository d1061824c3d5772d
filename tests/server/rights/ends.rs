//! Streams whose caller's credential ends while they are open.

use std::time::{Duration, Instant};

use futures::StreamExt as _;
use quorate::kv::client::{Client, ClientConfig, Range, Scope, Token};
use quorate::testkit::proto::details;
use quorate::testkit::proto::replication::SubscribeRequest;
use quorate::testkit::proto::replication::replication_service_client::ReplicationServiceClient;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::tagged_request::Request as Tagged;
use quorate::testkit::proto::v1::{
    GetRequest, PipelineRequest, PutRequest, Reason, TaggedRequest, WatchRequest,
};
use quorate::testkit::runtime;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{TestToken, by, code_of, guarded, root, write_file};
use crate::{DEADLINE, channel};

/// A credential that is withdrawn ends what it has begun within this time.
const WITHDRAWN: Duration = Duration::from_secs(60);

/// How a stream ends, and when; whatever it brings before.
async fn end<T>(mut stream: Streaming<T>) -> (Status, Instant) {
    let ended = async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it has ended as if all was told"),
                Err(status) => return (status, Instant::now()),
            }
        }
    };
    timeout(WITHDRAWN + DEADLINE, ended).await.expect("it ends")
}

fn assert_ended(what: &str, status: &Status) {
    assert_eq!(status.code(), Code::Unauthenticated, "{what}: {status:?}");
    let failure = details::failure(status.details()).unwrap_or_else(|| panic!("{what}: {status:?}"));
    assert_eq!(failure.reason(), Reason::Unauthenticated, "{what}");
}

/// Opens a stream of each kind with `token`, has `then` done, and sees how long they go on after that.
async fn all_end(address: std::net::SocketAddr, token: &str, then: impl AsyncFnOnce()) -> Duration {
    let mut kv = KvClient::new(channel(address).await);
    let watch = kv.watch(by(token, WatchRequest::default())).await.unwrap().into_inner();
    let mut service = ReplicationServiceClient::new(channel(address).await);
    let first = SubscribeRequest { from_now: true, heartbeat_ms: 100, ..Default::default() };
    let asked = tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
    let followed = service.subscribe(by(token, asked)).await.unwrap().into_inner();
    let (requests, given) = mpsc::channel(4);
    let get = |tag| {
        let request = Some(Tagged::Get(GetRequest { key: "k".into(), ..Default::default() }));
        PipelineRequest { requests: vec![TaggedRequest { tag, request }] }
    };
    requests.send(get(1)).await.unwrap();
    let mut answers = kv.pipeline(by(token, ReceiverStream::new(given))).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap().responses.len(), 1);
    then().await;
    let began = Instant::now();
    let ((of_watch, first), (of_follower, second), (of_pipeline, third)) =
        tokio::join!(end(watch), end(followed), end(answers));
    for (what, status) in [("watch", of_watch), ("follower", of_follower), ("pipeline", of_pipeline)] {
        assert_ended(what, &status);
    }
    first.max(second).max(third) - began
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_when_their_token_expires() {
    const LIFE: Duration = Duration::from_secs(3);
    let now = runtime::unix_time_ms() / 1000;
    let expires = now + LIFE.as_secs();
    let short = TestToken::new("short", &format!("expires = {expires}\n{}", root().says));
    let tokens = [root(), short];
    guarded(&tokens, "", async |address, _| {
        let went_on = all_end(address, &tokens[1].secret(), async || {}).await;
        assert!(went_on < LIFE + Duration::from_secs(2), "{went_on:?}");
        assert_eq!(
            code_of(address, "/quorate.v1.Kv/Get", Some(&tokens[1].secret())).await,
            Code::Unauthenticated
        );
        // Other callers go on.
        let mut kv = KvClient::new(channel(address).await);
        let put = PutRequest { key: "k".into(), ..Default::default() };
        kv.put(by(&root().secret(), put)).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_soon_after_their_token_is_withdrawn_and_a_broken_file_withdraws_none() {
    let tokens = [root(), TestToken::new("withdrawn", &root().says)];
    guarded(&tokens, "", async |address, file| {
        let token = tokens[1].secret();
        std::fs::write(&file, "[[token]\nname = ").unwrap();
        let look = Duration::from_secs(6);
        tokio::time::sleep(look).await;
        assert_eq!(code_of(address, "/quorate.v1.Admin/Status", Some(&token)).await, Code::Ok);
        let went_on = all_end(address, &token, async || write_file(&file, &[root()], "")).await;
        assert!(went_on < WITHDRAWN, "{went_on:?}");
        assert_eq!(code_of(address, "/quorate.v1.Admin/Status", Some(&token)).await, Code::Unauthenticated);
        // One that is there again is as good as before.
        write_file(&file, &tokens, "");
        let back = async {
            while code_of(address, "/quorate.v1.Admin/Status", Some(&token)).await != Code::Ok {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        timeout(WITHDRAWN, back).await.expect("it is taken again");
    })
    .await;
}

/// Whoever keeps the file of a client's token puts a newer one there in time: nothing of what the client does is interrupted for good.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_goes_on_with_a_newer_token_from_its_file() {
    /// Longer than a client may take to read its file again.
    const LIFE: Duration = Duration::from_secs(10);
    let now = runtime::unix_time_ms() / 1000;
    let expires = now + LIFE.as_secs();
    let short = TestToken::new("short", &format!("expires = {expires}\n{}", root().says));
    let tokens = [root(), short];
    guarded(&tokens, "", async |address, file| {
        let own = file.with_file_name("client.token");
        std::fs::write(&own, tokens[1].secret()).unwrap();
        let mut config = ClientConfig::default();
        config.token = Some(Token::from_file(&own).unwrap());
        let client = Client::new([address.to_string()], config).unwrap();
        let scope = Scope::default();
        let mut watch = client.watch(&scope, Range::all(), None).await.unwrap();
        std::fs::write(&own, root().secret()).unwrap();
        let (begun, mut written) = (Instant::now(), 0);
        while begun.elapsed() < LIFE + Duration::from_secs(4) {
            client.put(&scope, format!("k{written}"), "v").await.unwrap();
            written += 1;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(
            code_of(address, "/quorate.v1.Admin/Status", Some(&tokens[1].secret())).await,
            Code::Unauthenticated
        );
        for number in 0..written {
            let event = timeout(DEADLINE, watch.next()).await.expect("in time").unwrap().unwrap();
            assert_eq!(event.item.key, format!("k{number}"), "each once, in order");
        }
    })
    .await;
}
