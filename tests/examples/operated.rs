//! The commands of the program `quorate`, on the nodes of another program.

use std::process::Command;

use serde_json::{Value, json};

use crate::jobs::Command as Change;
use crate::three_processes::{Nodes, eventually, get};

/// What a command says on standard output, as JSON.
pub(crate) fn quorate(endpoints: &str, args: &[&str]) -> Value {
    let (code, value, errors) = outcome(endpoints, args);
    assert_eq!(code, 0, "{args:?}: {value} {errors}");
    value
}

/// The exit code of a command, what it says, and what it complains about.
fn outcome(endpoints: &str, args: &[&str]) -> (i32, Value, Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("QUORATE_")) {
        command.env_remove(name);
    }
    let output = command.args(args).args(["--endpoints", endpoints, "-o", "json"]).output().unwrap();
    let json = |bytes: &[u8]| serde_json::from_slice(bytes).unwrap_or(Value::Null);
    (output.status.code().unwrap(), json(&output.stdout), json(&output.stderr))
}

/// The values of a field, one of each row.
fn all(rows: &Value, field: &str) -> Vec<Value> {
    rows.as_array().unwrap().iter().map(|row| row[field].clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_another_program_are_asked_how_they_are() {
    let nodes = Nodes::start(&[]).await;
    let (every, queue) = (nodes.all_addresses(), nodes.queue(1));
    queue.write(Change::Push("wash".to_owned())).await.unwrap();

    let status = quorate(&every, &["status"]);
    assert_eq!(all(&status, "node_id"), [1, 2, 3]);
    assert_eq!(
        all(&status, "role").iter().filter(|role| **role == quorate::Role::Leader.to_string()).count(),
        1,
        "{status}"
    );
    assert!(all(&status, "applied").iter().all(|applied| applied.as_u64() > Some(0)), "{status}");
    assert_eq!(all(&quorate(&every, &["health"]), "ready"), [true; 3]);
    let members = quorate(&nodes.address(2), &["member", "list"]);
    assert_eq!(all(&members["members"], "role"), ["voter"; 3]);
    let addresses: Vec<_> = (1..=3).map(|node_id| nodes.address(node_id)).collect();
    assert_eq!(all(&members["members"], "client"), addresses);

    for path in ["/livez", "/readyz", "/stats", "/replication/status"] {
        assert_eq!(get(&nodes.address(3), path).map(|(code, _)| code), Some(200), "{path}");
    }
    let written = (1..=3).filter(|node_id| {
        let (_, page) = get(&nodes.address(*node_id), "/metrics").unwrap();
        page.contains("quorate_server_requests_total{method=\"write\",outcome=\"ok\"} 1\n")
    });
    assert_eq!(written.count(), 1, "the leader counts what it has written");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_another_program_do_as_they_are_told() {
    let mut nodes = Nodes::start(&[]).await;
    let (every, queue) = (nodes.all_addresses(), nodes.queue(1));
    queue.write(Change::Push("wash".to_owned())).await.unwrap();

    let open = quorate(&every, &["session", "list"])["sessions"].clone();
    assert_eq!(open.as_array().unwrap().len(), 1, "{open}");
    quorate(&every, &["session", "close", open[0]["session"].as_str().unwrap()]);
    assert_eq!(quorate(&every, &["session", "list"])["sessions"], json!([]));
    queue.write(Change::Push("dry".to_owned())).await.unwrap();
    assert_eq!(queue.metrics().sessions_opened, 2, "it goes on in another session");

    for follower in ["1", "2", "3"] {
        assert_eq!(quorate(&every, &["transfer-leader", follower])["leader"].to_string(), follower);
    }
    let taken = quorate(&every, &["snapshot", "--endpoint", &nodes.address(2)]);
    eventually("the snapshot is told of", async || {
        let status = get(&nodes.address(2), "/replication/status").unwrap().1;
        serde_json::from_str::<Value>(&status).unwrap()["offsets"]["snapshot"] == taken["index"]
    })
    .await;

    let (one, name) = (nodes.address(1), "snapshot_every_entries");
    let configure = ["configure", "--endpoint", &one];
    assert_eq!(quorate(&every, &[&configure[..], &[&format!("{name}=7000")]].concat())[name], "7000");
    assert_eq!(quorate(&every, &configure)[name], "7000");
    // It is a setting of programs that let their nodes change it.
    let (code, _, complaint) = outcome(&every, &[&configure[..], &["log_level=debug"]].concat());
    assert_eq!((code, &complaint["reason"]), (3, &json!("INVALID")), "{complaint}");

    quorate(&every, &["member", "demote", "1"]);
    let members = quorate(&every, &["member", "promote", "1"])["members"].clone();
    assert_eq!(all(&members, "role"), ["voter"; 3]);
    let left = quorate(&every, &["member", "remove", "2"])["members"].clone();
    assert_eq!(all(&left, "node_id"), [1, 3]);
    assert_eq!(nodes.ended(2).await.code(), Some(1));
    assert!(
        nodes.log(2).contains("the node has stopped: node 2 was removed from its cluster"),
        "{}",
        nodes.log(2)
    );
    queue.write(Change::Push("fold".to_owned())).await.unwrap();
}

/// What belongs to keys says that there are none.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_another_program_say_that_they_have_no_keys() {
    let nodes = Nodes::start(&[]).await;
    for args in [&["get", "k"][..], &["put", "k", "v"], &["del", "k"], &["range", "a", "b"], &["watch", "k"]]
    {
        let (code, _, complaint) = outcome(&nodes.all_addresses(), args);
        let words = complaint["message"].as_str().unwrap_or_default();
        assert!(words.starts_with("this node serves nothing called `"), "{args:?}: {complaint}");
        assert_eq!((code, &complaint["reason"]), (3, &json!("INVALID")), "{args:?}: {complaint}");
    }
}
