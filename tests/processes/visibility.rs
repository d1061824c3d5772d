//! What operators see of real nodes: status over HTTP, settings that change while nodes run, one write in all logs.

use std::io::{Read, Write};
use std::net::TcpStream;

use quorate::{MemberKind, PeerStanding, Role};
use quorate_cluster::Node;
use serde_json::{Value, json};

use crate::support::{DEADLINE, eventually, output, start};

/// The code and the JSON that a node answers.
fn http(node: &Node, method: &str, path: &str, body: &str) -> (u16, Value) {
    let address = node.client_address();
    let mut stream = TcpStream::connect(&address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    (code, serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {response}")))
}

/// The fields of the lines by which writes are followed in a node's log.
fn write_lines(node: &Node) -> Vec<Value> {
    let output = output(node);
    let lines = output.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["target"] == "quorate::write").map(|mut line| line["fields"].take()).collect()
}

/// Messages of the lines that name the write at `log_id`.
fn seen(node: &Node, log_id: &str) -> Vec<String> {
    let of_write = write_lines(node).into_iter().filter(|fields| fields["log_id"] == log_id);
    of_write.map(|fields| fields["message"].as_str().unwrap().to_owned()).collect()
}

/// Whether a line with this message says that everything up to `index` has come that far.
fn has_come(node: &Node, message: &str, index: u64) -> bool {
    write_lines(node).iter().filter(|fields| fields["message"] == message).any(|fields| {
        let (_, upto) = fields["upto"].as_str().unwrap().split_once(':').unwrap();
        upto.parse::<u64>().unwrap() >= index
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_write_is_followed_across_nodes_by_its_log_id() {
    let nodes = start(&["--log-format", "json"]);
    let leader = nodes.leader(0).await.node_id;
    let put = async |key: &str| {
        let put = nodes.client.put(&Default::default(), key.to_owned(), "v").await.unwrap();
        put.header.position.unwrap().to_string()
    };
    let before = put("silent").await;
    // Asked of each node as it runs: by the command line, and over HTTP.
    for node in nodes.cluster.nodes() {
        let filter = "info,quorate::write=trace";
        match node.node_id() == leader {
            true => {
                let endpoint = node.client_address();
                let set =
                    nodes.quorate(&["configure", &format!("log_level={filter}"), "--endpoint", &endpoint]);
                assert!(set.status.success() && set.stdout.contains(filter), "{set:?}");
                let restart = set.stdout.lines().find(|line| line.starts_with("data_dir "));
                assert!(restart.unwrap().ends_with("at a restart"), "{set:?}");
            }
            false => {
                let body = json!({ "log_level": filter }).to_string();
                let (code, answer) = http(node, "POST", "/replication/configure", &body);
                assert_eq!((code, &answer["settings"]["log_level"]), (200, &json!(filter)));
                assert_eq!(answer["fixed"]["node_id"], node.node_id());
            }
        }
    }
    let log_id = put("loud").await;
    let index = log_id.split_once(':').unwrap().1.parse().unwrap();
    for node in nodes.cluster.nodes() {
        let first = if node.node_id() == leader { "proposed" } else { "appended" };
        eventually("the write shows in every log", async || seen(node, &log_id) == [first, "applied"]).await;
        for message in ["flushed", "committed"] {
            eventually("its batch shows, too", async || has_come(node, message, index)).await;
        }
        assert!(write_lines(node).iter().all(|fields| fields["node_id"] == node.node_id()));
        assert!(seen(node, &before).is_empty(), "nothing is logged of a write unless it is asked for");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_shows_who_is_there_and_who_is_not() {
    let nodes = start(&[]);
    let leader = nodes.leader(0).await.node_id;
    nodes.put("k", "v").await;
    let leading = nodes.node(leader);
    let replicas =
        || http(leading, "GET", "/replication/replicas", "").1["replicas"].as_array().unwrap().clone();
    eventually("both followers are connected and have everything", async || {
        let replicas = replicas();
        assert_eq!(replicas.len(), 2);
        replicas.iter().all(|replica| {
            replica["status"] == PeerStanding::Connected.name() && replica["operations_behind"] == 0
        })
    })
    .await;
    for replica in replicas() {
        assert!(replica["operations_synced"].as_u64().unwrap() > 0, "{replica}");
        assert!(replica["last_heartbeat_ms"].as_f64().unwrap() < 30_000.0, "{replica}");
        assert_eq!((&replica["role"], &replica["ms_behind"]), (&json!(MemberKind::Voter), &json!(0.0)));
    }
    let (_, stats) = http(leading, "GET", "/replication/stats", "");
    assert!(stats["sent"]["bytes"].as_u64().unwrap() > 0 && stats["received"]["bytes"].as_u64().unwrap() > 0);
    assert_eq!((&stats["pending_operations"], &stats["elections_won"]), (&json!(0), &json!(1)), "{stats}");
    assert!(
        stats["log"]["flushes"].as_u64().unwrap() > 0 && stats["applied_operations"].as_u64().unwrap() > 0
    );

    let follower = nodes.follower().await;
    let (code, there) = http(nodes.node(follower), "GET", "/replication/status", "");
    assert_eq!((code, &there["role"], &there["healthy"]), (200, &json!(Role::Follower), &json!(true)));
    assert_eq!(there["leader"]["client"], leading.client_address());
    let (_, there) = http(nodes.node(follower), "GET", "/replication/replicas", "");
    assert_eq!(
        (&there["replicas"][0]["status"], &there["leader"]["node_id"]),
        (&Value::Null, &json!(leader))
    );

    // Who is paused answers nothing, and what is written meanwhile is what it lacks.
    nodes.node(follower).pause().unwrap();
    nodes.put("k", "w").await;
    eventually("the paused follower lags", async || {
        let replicas = replicas();
        let paused = replicas.iter().find(|replica| replica["id"] == follower).unwrap();
        paused["status"] == PeerStanding::Lagging.name()
            && paused["operations_behind"].as_u64() >= Some(1)
            && paused["ms_behind"].as_f64().unwrap() > 1000.0
    })
    .await;
    nodes.node(follower).resume().unwrap();
    eventually("it has caught up", async || {
        replicas().iter().all(|replica| replica["status"] == PeerStanding::Connected.name())
    })
    .await;
}
