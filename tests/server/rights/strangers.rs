//! What callers may not do to others: stand in their way, or take their place.

use quorate::server::DoorLimits;
use quorate::testkit::proto::replication::SubscribeRequest;
use quorate::testkit::proto::replication::replication_service_client::ReplicationServiceClient;
use quorate::testkit::proto::v1::admin_client::AdminClient;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::{PutRequest, StatusRequest};
use tokio::time::timeout;

use super::{TestToken, by, call, guarded, guarded_at, root};
use crate::{DEADLINE, channel};

const WATCH_HEALTH: &str = "/grpc.health.v1.Health/Watch";

#[tokio::test(flavor = "multi_thread")]
async fn strangers_that_listen_to_probes_keep_no_place_from_others() {
    const PLACES: usize = 4;
    let limits = DoorLimits { connections: Some(PLACES), ..DoorLimits::default() };
    let server = quorate::kv::bind("127.0.0.1:0").await.unwrap().with_limits(limits);
    guarded_at(server, &[root()], "", async |address, _| {
        let mut listening = Vec::new();
        for _ in 0..3 * PLACES {
            // Each has a connection of its own, and no end. Some have given way to the next ones.
            if let Ok(stream) = call(address, WATCH_HEALTH, None, bytes::Bytes::new()).await {
                listening.push(stream);
            }
        }
        assert!(listening.len() >= PLACES, "{}", listening.len());
        let put = async {
            let mut kv = KvClient::new(channel(address).await);
            let request = PutRequest { key: "k".into(), ..PutRequest::default() };
            kv.put(by(&root().secret(), request)).await
        };
        timeout(DEADLINE, put).await.expect("there is a place").expect("it is carried out");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_are_told_of_a_replica_that_may_answer_them() {
    let follows = "grants = [{ tenant = \"*\", rights = [\"subscribe\"] }]";
    let tokens = [
        root(),
        TestToken::new("follower", follows),
        TestToken::new("replica", &format!("roles = [\"replica\"]\n{follows}")),
    ];
    guarded(&tokens, "", async |address, _| {
        let mut open = Vec::new();
        for (name, port) in [("follower", 1), ("replica", 2)] {
            let first = SubscribeRequest {
                from_now: true,
                serves: format!("127.0.0.1:{port}"),
                heartbeat_ms: 100,
                ..SubscribeRequest::default()
            };
            let said = tokio_stream::iter([first]);
            let said = tokio_stream::StreamExt::chain(said, tokio_stream::pending());
            let mut client = ReplicationServiceClient::new(channel(address).await);
            let token = tokens.iter().find(|token| token.name == name).unwrap().secret();
            let mut stream = client.subscribe(by(&token, said)).await.unwrap().into_inner();
            stream.message().await.unwrap().expect("both may follow");
            open.push(stream);
        }
        let mut admin = AdminClient::new(channel(address).await);
        let status = admin.status(by(&root().secret(), StatusRequest::default())).await.unwrap().into_inner();
        let told: Vec<_> = status.replicas.iter().map(|replica| replica.client.as_str()).collect();
        assert_eq!(told, ["127.0.0.1:2"]);
    })
    .await;
}
