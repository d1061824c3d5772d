//! What waits in the server, and calls that streams answer, show in its metrics.

use super::*;

const MIB: usize = 1024 * 1024;

async fn shows(port: &Port, lines: &[&str]) {
    for line in lines {
        port.http_shows("/metrics", &format!("\n{line}\n")).await;
    }
}

/// Puts `count` values of 1 MiB, `k0` and so on.
async fn put_large(kv: &mut KvClient<Channel>, count: usize) {
    for number in 0..count {
        let (key, value) = (format!("k{number}").into(), vec![0; MIB].into());
        kv.put(v1::PutRequest { key, value, ..Default::default() }).await.unwrap();
    }
}

#[tokio::test]
async fn requests_on_pipelines_and_their_answers_are_counted_until_they_are_sent() {
    const REQUESTS: &str = "quorate_server_pipeline_requests_in_flight";
    const BYTES: &str = "quorate_server_pipeline_queued_bytes";
    let port = Port::open().await;
    put_large(&mut port.kv().await, 1).await;
    let (mut first, second) = (port.pipeline().await, port.pipeline().await);
    port.node.hold();
    first.send([(1, Some(put("k", b"v"))), (2, Some(get("k0")))]);
    second.send((0..100).map(|tag| (tag, Some(get("k0")))));
    reaches(&port.node.reading, 101).await;
    shows(&port, &[&format!("{REQUESTS} 102"), &format!("{BYTES} 0")]).await;

    // The second client reads nothing: most of its answers stay.
    port.node.release();
    first.answers(2).await;
    within(async {
        loop {
            let (_, text) = port.http("/metrics").await;
            let bytes = text.lines().find_map(|line| line.strip_prefix(BYTES)?.trim().parse::<usize>().ok());
            if bytes.unwrap() > 50 * MIB {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    drop(second);
    shows(&port, &[&format!("{REQUESTS} 0"), &format!("{BYTES} 0")]).await;
}

#[tokio::test]
async fn a_stream_is_open_until_it_ends_and_counts_by_how_it_ended() {
    let mut port = Port::open().await;
    let mut kv = port.kv().await;
    put_large(&mut kv, 16).await;
    let range = kv.range_stream(v1::RangeRequest::default()).await.unwrap();
    let watch = kv.watch(v1::WatchRequest::default()).await.unwrap();
    shows(&port, &["quorate_server_long_ranges_open 1", "quorate_server_watches_open 1"]).await;
    drop((range, watch));
    shows(&port, &["quorate_server_long_ranges_open 0", "quorate_server_watches_open 0"]).await;

    let level = 99;
    kv.range_stream(v1::RangeRequest { level, ..Default::default() }).await.unwrap_err();
    let collection = "where nothing happens".to_owned();
    let _watch = kv.watch(v1::WatchRequest { collection, ..Default::default() }).await.unwrap();
    let tenant = "x".repeat(100_000);
    kv.watch(v1::WatchRequest { tenant, ..Default::default() }).await.unwrap_err();
    shows(
        &port,
        &[
            r#"quorate_server_requests_total{method="range_stream",outcome="ok"} 1"#,
            r#"quorate_server_requests_total{method="range_stream",outcome="invalid"} 1"#,
            r#"quorate_server_requests_total{method="watch",outcome="ok"} 1"#,
            r#"quorate_server_requests_total{method="watch",outcome="invalid"} 1"#,
            r#"quorate_server_request_duration_seconds_count{method="watch"} 2"#,
            "quorate_server_watches_open 1",
        ],
    )
    .await;

    // A watch that the node ends has failed.
    port.node.state.send_modify(|state| state.role = Role::Stopped);
    shows(&port, &[r#"quorate_server_requests_total{method="watch",outcome="stopped"} 1"#]).await;
    port.stop();
}
