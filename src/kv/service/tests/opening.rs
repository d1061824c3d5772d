//! The port while the node behind it is being opened.

use futures::StreamExt as _;

use crate::storage::StartStep;

use super::*;

async fn health(channel: Channel) -> Health {
    let request = tonic_health::pb::HealthCheckRequest { service: NAME.to_owned() };
    let answer = within(HealthClient::new(channel).check(request)).await.unwrap().into_inner();
    answer.status()
}

#[tokio::test]
async fn a_node_that_is_not_there_yet_is_alive_and_not_ready_and_then_it_is() {
    let server = with_services(Server::bind("127.0.0.1:0").await.unwrap());
    let (address, (stop, stopped)) = (server.local_addr(), oneshot::channel());
    let (give, opening) = oneshot::channel();
    let progress = StartProgress::default();
    let told = progress.clone();
    let serving = runtime::spawn(async move {
        let opening = async { opening.await.unwrap() };
        let stopped = async { stopped.await.unwrap_or(()) };
        server.serve_gated(opening, told, DEADLINE, stopped).await
    });
    let port = Port { node: FakeNode::new(), address, stop: Some(stop), serving };

    assert_eq!(port.http("/livez").await, (200, "ok\n".to_owned()));
    progress.begin(StartStep::ReadingLog, 800 << 20);
    progress.add(312 << 20);
    let recovering = "recovering: reading the log: 312 of 800 MiB\n";
    assert_eq!(port.http("/readyz").await, (503, recovering.to_owned()));
    assert_eq!(port.http("/metrics").await.0, 503);
    let (code, content_type, body) = port.ask("POST", "/replication/configure", "{}").await;
    assert_eq!((code, &*content_type), (503, "application/json"));
    assert!(body.contains("312 of 800 MiB"), "{body}");
    assert!(body.contains("\"reason\":\"STOPPED\""), "{body}");
    let channel = port.channel().await;
    assert_eq!(health(channel.clone()).await, Health::NotServing);
    let mut kv = KvClient::new(channel.clone());
    let refused = kv.get(v1::GetRequest { key: "k".into(), ..Default::default() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(refused.message().contains("312 of 800 MiB"), "{refused}");
    let asked = tokio_stream::iter([PipelineRequest::default()]);
    assert_eq!(kv.pipeline(asked).await.unwrap_err().code(), Code::Unavailable);

    // The same connections go on with the node.
    let given = give.send(port.node.clone());
    assert!(given.is_ok());
    port.http_shows("/readyz", "ok").await;
    kv.get(v1::GetRequest { key: "k".into(), ..Default::default() }).await.unwrap();
    within(async {
        while health(channel.clone()).await != Health::Serving {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop((kv, channel));
    let mut port = port;
    port.stop();
    port.ended().await;
}

#[tokio::test]
async fn a_port_without_a_node_stops_when_it_is_told() {
    let server = with_services(Server::bind("127.0.0.1:0").await.unwrap());
    let never = std::future::pending::<FakeNode>();
    let served = server.serve_gated(never, StartProgress::default(), DEADLINE, async {});
    within(served).await.unwrap();
}

/// A port whose connections come from elsewhere ends when there are no more of them, whatever is open on those that there were.
#[tokio::test]
async fn a_port_over_connections_of_its_own_ends_with_them() {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let (end, ended) = oneshot::channel::<()>();
    let no_more = futures::stream::once(ended).filter_map(|_| std::future::ready(None));
    let connections = futures::stream::iter([theirs]).chain(no_more);
    let server = with_services(Server::over(([10, 0, 0, 1], 7801).into(), connections));
    let never = std::future::pending();
    let serving = runtime::spawn(server.serve_node(FakeNode::new(), DEADLINE, never));
    let ours = std::sync::Mutex::new(Some(ours));
    let connector = crate::client::Connector::new(move |_| {
        let taken = ours.lock().unwrap().take();
        std::future::ready(taken.ok_or_else(|| std::io::ErrorKind::ConnectionRefused.into()))
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://10.0.0.1:7801");
    let mut kv = KvClient::new(connector.connect_lazy(&endpoint, None));
    let mut watch = kv.watch(v1::WatchRequest::default()).await.unwrap().into_inner();
    drop(end);
    within(async { while let Ok(Some(_)) = watch.message().await {} }).await;
    drop((watch, kv));
    within(serving).await.unwrap().unwrap();
}
