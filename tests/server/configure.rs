//! `POST /replication/configure` by the names that other systems have, on members and on replicas; and a replica's pages.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::forwarding::{ReplicaProcess, ServedMember, shown, three};
use crate::replication::json_of;
use crate::{DEADLINE, POLL, put_many, with_node};

async fn configure(address: SocketAddr, body: &str) -> (u16, Value) {
    json_of(address, "POST", "/replication/configure", body).await
}

/// What is asked for at `address` is answered so, with words such as `part`.
async fn assert_told(address: SocketAddr, body: &str, code: u16, role: &str, part: &str) {
    let (told, answer) = configure(address, body).await;
    assert_eq!((told, &answer["success"]), (code, &json!(code == 200)), "{body}: {answer}");
    assert_eq!(answer["role"], role, "{body}: {answer}");
    assert!(answer["message"].as_str().unwrap().contains(part), "{body}: {answer}");
    // What earlier versions answered is there as well.
    assert_eq!(answer["settings"].is_object(), code == 200, "{answer}");
    assert_eq!(answer["hint"].is_string(), code != 200, "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_does_what_it_can_and_says_what_it_cannot() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |node| {
        let told = async |body: &str, code, part: &str| assert_told(node, body, code, "leader", part).await;
        told(r#"{"role": "master"}"#, 200, "leads already").await;
        told(r#"{"role": "standalone"}"#, 200, "by itself").await;
        told(r#"{"role": "replica"}"#, 409, "take its vote from the cluster").await;
        told(r#"{"role": "boss"}"#, 400, "no role \"boss\"").await;
        told(&format!(r#"{{"bind_address": "{node}", "master_address": "{node}"}}"#), 200, "listens at")
            .await;
        told(r#"{"bind_address": "127.0.0.1:1"}"#, 409, "needs a restart").await;
        told(r#"{"master_address": "a:1"}"#, 409, "follows whoever is elected").await;
        told(r#"{"log_size": 5000, "heartbeat_interval": 5}"#, 409, "say themselves").await;
        let (_, before) = json_of(node, "GET", "/replication/configure", "").await;
        assert_eq!(before["settings"]["event_log_operations"], 1_000_000, "nothing is done by halves");
        told(r#"{"log_size": 5000, "role": "master"}"#, 200, "event_log_operations is 5000").await;
        told(r#"{"log_size": 5}"#, 400, "event_log_operations").await;
        told(r#"{"preferred_leader": true}"#, 200, "preferred_leader is true").await;
        let (_, after) = json_of(node, "GET", "/replication/configure", "").await;
        assert_eq!(after["settings"]["event_log_operations"], 5000);
        told("{}", 200, "nothing was asked for").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_to_be_master_is_handed_the_lead() {
    let dir = tempfile::tempdir().unwrap();
    let members = three(dir.path()).await;
    for _ in 0..2 {
        let follower = members.iter().find(|member| !member.leads()).unwrap();
        assert_told(follower.address, r#"{"role": "replica"}"#, 200, "follower", "stays a voter").await;
        let (code, answer) = configure(follower.address, r#"{"role": "master"}"#).await;
        assert_eq!((code, &answer["success"]), (200, &json!(true)), "{answer}");
        let leads = async {
            while !follower.leads() {
                tokio::time::sleep(POLL).await;
            }
        };
        tokio::time::timeout(DEADLINE, leads).await.expect("it leads");
        assert_told(follower.address, r#"{"role": "replica"}"#, 409, "leader", "this node leads").await;
    }
    for member in members {
        member.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_follows_what_it_is_told_to_and_shows_how_it_stands() {
    let (dir, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let members = three(dir.path()).await;
    let leader = members.iter().find(|member| member.leads()).unwrap().address;
    put_many(leader, 50).await;
    let [first, second] = [&members[0], &members[1]].map(|member: &ServedMember| member.address);
    // As a node that others know: by a file and its role.
    let file = own.path().join("replica.yaml");
    let text = format!(
        "data_dir: {}\nreplication:\n  role: replica\n  bind_address: 127.0.0.1:0\n  master_address: {first}\n  heartbeat_interval_secs: 1\n",
        own.path().join("state").display()
    );
    std::fs::write(&file, text).unwrap();
    let replica = ReplicaProcess::start(&["serve", "--config", file.to_str().unwrap()]);
    let address = replica.address;
    let status = shown(address, |status| {
        let stats = &status["stats"];
        stats["replica_offset"].as_u64() >= Some(50) && stats["master_offset"] == stats["replica_offset"]
    })
    .await;
    assert_eq!((&status["role"], &status["enabled"]), (&json!("replica"), &json!(true)));
    let stats = &status["stats"];
    assert_eq!((&stats["lag_operations"], &stats["connected_replicas"]), (&json!(0), &json!(0)), "{stats}");
    let (_, stats) = json_of(address, "GET", "/replication/stats", "").await;
    assert_eq!(stats["role"], "replica");
    for name in ["bytes_received", "total_replicated", "last_sync"] {
        assert!(stats[name].as_u64() > Some(0), "{name}: {stats}");
    }
    let names = ["lag_ms", "bytes_sent", "operations_pending", "snapshot_size"];
    assert!(names.iter().all(|name| stats[name].is_number()), "{stats}");
    let (_, replicas) = json_of(address, "GET", "/replication/replicas", "").await;
    assert_eq!((&replicas["role"], &replicas["count"]), (&json!("replica"), &json!(0)), "{replicas}");
    let row = async |of: SocketAddr| {
        let (_, answer) = json_of(of, "GET", "/replication/replicas", "").await;
        let rows = answer["replicas"].as_array().unwrap().clone();
        rows.into_iter().find(|row| row["kind"] != "member")
    };
    let followed = row(first).await.expect("it is listed where it follows");
    assert_eq!(followed["status"], "Connected", "{followed}");
    let (_, totals) = json_of(first, "GET", "/replication/stats", "").await;
    assert!(totals["connected_replicas"].as_u64() >= Some(1), "{totals}");

    let told = async |body: &str, code, part: &str| assert_told(address, body, code, "replica", part).await;
    told(r#"{"role": "master"}"#, 409, "cannot lead").await;
    told(r#"{"role": "replica"}"#, 200, "is a replica, and follows").await;
    told(r#"{"master_address": "no address"}"#, 400, "no address").await;
    told(r#"{"bind_address": "127.0.0.1:1"}"#, 409, "needs a restart").await;
    told(r#"{"log_size": 5000, "heartbeat_interval": 2}"#, 200, "every 2 s").await;
    told(r#"{"max_command_bytes": 5000}"#, 400, "event log").await;
    let point = format!(r#"{{"role": "replica", "master_address": "{second}"}}"#);
    told(&point, 200, "from now on; a restart follows").await;
    shown(address, |status| status["replica"]["source"] == second.to_string()).await;
    let gone = async {
        while row(first).await.is_some() {
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(DEADLINE, gone).await.expect("it follows there no more");
    let (_, now) = json_of(address, "GET", "/replication/configure", "").await;
    assert_eq!(now["settings"]["event_log_operations"], 5000, "{now}");
    for member in members {
        member.end().await;
    }
}
