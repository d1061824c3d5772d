//! Keys whose time passes while their replica hears of nothing.

#![allow(clippy::disallowed_methods)] // of this process, not of a node

use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use quorate::kv::client::{Client, ClientConfig, Scope, WriteOptions};
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::{GetRequest, Item, ReadLevel};
use tonic::transport::Channel;

use crate::replicas::{ReplicaProcess, position};
use crate::support::{QUORATE, eventually, free_address, get_at, outcome};
use crate::transfer::Running;

const TTL: Duration = Duration::from_millis(2_500);

fn unix_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// What the node at `address` has, whatever that is.
async fn local(address: &str, key: &str) -> Option<Item> {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let level = ReadLevel::Local.into();
    let get = GetRequest { key: key.to_owned().into(), level, ..Default::default() };
    KvClient::new(channel).get(get).await.unwrap().into_inner().item
}

/// What `quorate get` prints of a key.
fn printed(address: &str, key: &str) -> serde_json::Value {
    let mut command = Command::new(QUORATE);
    command.args(["--endpoints", address, "get", key, "--local", "-o", "json"]);
    let printed = outcome(command);
    serde_json::from_str(&printed.stdout).unwrap_or_else(|_| panic!("{printed:?}"))
}

/// L12: the deadline is shown as it was told, and that it has passed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_whose_time_has_passed_while_the_source_is_away_is_shown_as_past_due() {
    let dir = tempfile::tempdir().unwrap();
    let (listens, peers, serves) = (free_address(), free_address(), free_address());
    let serve = || {
        let mut command = Command::new(QUORATE);
        command.args(["serve", "--single", "--data-dir"]).arg(dir.path().join("node"));
        command.args(["--client-listen", &listens, "--peer-listen", &peers]);
        Running::start(&mut command)
    };
    let node = serve();
    let is_ready = async || get_at(&listens, "/readyz").is_some_and(|(code, _)| code == 200);
    eventually("the node serves", is_ready).await;
    let place = dir.path().join("replica");
    let begin = || ReplicaProcess::following(&listens, &place, &serves, &dir.path().join("replica.log"));
    let mut replica = begin();
    eventually("the replica serves", async || position(&serves).is_some()).await;

    let client = Client::new([&listens], ClientConfig::default()).unwrap();
    let scope = Scope::default();
    client.put(&scope, "lasting", "v").await.unwrap();
    let put_at = unix_ms();
    let put = client.put_with(&scope, "short", "v", WriteOptions::default().with_ttl(TTL)).await.unwrap();
    let has_it = async || position(&serves).is_some_and(|(applied, _)| applied >= put.revision);
    eventually("the replica has it", has_it).await;
    drop(node);

    let told = local(&serves, "short").await.unwrap();
    let due = put_at + TTL.as_millis() as u64;
    assert!((due - 1_000..due + 1_000).contains(&told.expires_ms), "{} for {due}", told.expires_ms);
    let is_past_due = async || {
        let (before, item, after) = (unix_ms(), local(&serves, "short").await.unwrap(), unix_ms());
        assert_eq!((&item.value, item.expires_ms), (&told.value, told.expires_ms), "as it was told");
        assert!(item.past_due || before < item.expires_ms, "{item:?} at {before}");
        assert!(!item.past_due || after >= item.expires_ms, "{item:?} at {after}");
        item.past_due
    };
    eventually("the answer says that its time has passed", is_past_due).await;
    let object = printed(&serves, "short");
    assert_eq!((&object["past_due"], &object["expires_ms"]), (&true.into(), &told.expires_ms.into()));
    assert!(!local(&serves, "lasting").await.unwrap().past_due, "it never expires");
    assert_eq!(printed(&serves, "lasting").get("past_due"), None);

    // A restart knows nothing of how long it took, but what the clock shows.
    replica.kill();
    let _replica = begin();
    let serves_again = async || position(&serves).is_some_and(|(applied, _)| applied >= put.revision);
    eventually("the replica serves again", serves_again).await;
    let item = local(&serves, "short").await.unwrap();
    assert_eq!((item.expires_ms, item.past_due), (told.expires_ms, true));

    // And it is gone when the source says so.
    let _node = serve();
    eventually("it has expired", async || local(&serves, "short").await.is_none()).await;
}
