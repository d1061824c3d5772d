//! Callers that ask for more than their credential allows.

use quorate::testkit::proto::details;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::tagged_request::Request as Tagged;
use quorate::testkit::proto::v1::{GetRequest, PipelineRequest, Reason, TaggedRequest, WatchRequest};
use std::time::{Duration, Instant};
use tonic::Status;

use super::{TestToken, by, guarded, root};
use crate::channel;

fn reason(status: &Status) -> Reason {
    details::failure(status.details()).expect("it is told in detail").reason()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_is_held_to_its_limits_and_others_are_not() {
    let limited = format!("limits = {{ max_calls = 2, requests_per_second = 50 }}\n{}", root().says);
    let tokens = [root(), TestToken::new("limited", &limited)];
    guarded(&tokens, "", async |address, _| {
        let [root, limited] = [tokens[0].secret(), tokens[1].secret()];
        let mut kv = KvClient::new(channel(address).await);
        // On whichever connection.
        let mut other = KvClient::new(channel(address).await);
        let first = kv.watch(by(&limited, WatchRequest::default())).await.unwrap();
        let second = other.watch(by(&limited, WatchRequest::default())).await.unwrap();
        let refused =
            kv.get(by(&limited, GetRequest { key: "k".into(), ..Default::default() })).await.unwrap_err();
        assert_eq!(reason(&refused), Reason::LimitReached);
        kv.get(by(&root, GetRequest { key: "k".into(), ..Default::default() })).await.unwrap();
        drop((first, second));
        let get = || GetRequest { key: "k".into(), ..Default::default() };
        let free = async {
            while kv.get(by(&limited, get())).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(crate::DEADLINE, free).await.expect("their places are free again");

        // A hundred and fifty at once: what is more than fifty is refused one by one, and read later on a pipeline.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut refused = 0;
        for _ in 0..150 {
            if let Err(status) = kv.get(by(&limited, get())).await {
                assert_eq!(reason(&status), Reason::LimitReached);
                refused += 1;
            }
        }
        assert!(refused > 0, "all were answered");
        tokio::time::sleep(Duration::from_secs(1)).await;
        let requests = (0..150).map(|tag| TaggedRequest { tag, request: Some(Tagged::Get(get())) });
        let message = PipelineRequest { requests: requests.collect() };
        let began = Instant::now();
        let mut answers =
            kv.pipeline(by(&limited, tokio_stream::iter([message]))).await.unwrap().into_inner();
        let mut answered = 0;
        while let Some(message) = answers.message().await.unwrap() {
            answered += message.responses.len();
        }
        assert_eq!(answered, 150);
        assert!(began.elapsed() > Duration::from_millis(1_500), "{:?}", began.elapsed());
    })
    .await;
}
