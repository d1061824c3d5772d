//! A cluster that was wiped and made anew on the same addresses: whoever comes back with a position or a session of
//! the one before is told so.

use futures::StreamExt;
use quorate::Reason;
use quorate::kv::client::{Client, ClientError, Range, Scope};
use quorate::{Bookmark, ReadLevel, ReadOptions};

use crate::support::{DEADLINE, start};

async fn reason_of_read(client: &Client, after: Bookmark, level: ReadLevel) -> Option<Reason> {
    let read = ReadOptions::from(level).after(after);
    client.get(&Scope::default(), "k", read).await.err().map(|error| error.reason())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn positions_of_the_cluster_before_are_refused() {
    let nodes = start(&[]);
    let (client, scope) = (&nodes.client, Scope::default());
    for _ in 0..20 {
        nodes.put("k", "old").await;
    }
    let old = client.put(&scope, "k", "last").await.unwrap().header.bookmark();
    let mut watch = client.watch(&scope, Range::prefix(""), Some(1.into())).await.unwrap();
    for _ in 0..21 {
        watch.next().await.unwrap().unwrap();
    }
    assert_eq!(watch.resume_from().history, old.history);

    nodes.cluster.kill_all().unwrap();
    for node in nodes.cluster.nodes() {
        std::fs::remove_dir_all(node.data_dir()).unwrap();
    }
    nodes.cluster.start_all().unwrap();
    nodes.cluster.wait_ready(DEADLINE).unwrap();

    // The client's session is of the old cluster: a write in it is refused, and the next one goes on in this one.
    let refused = client.put(&scope, "k", "new").await.unwrap_err();
    assert_eq!((refused.reason(), refused.maybe_applied()), (Reason::OtherHistory, false), "{refused}");
    let new = client.put(&scope, "k", "new").await.unwrap().header.bookmark();
    assert_ne!(new.history, old.history);

    let ended = tokio::time::timeout(DEADLINE, watch.next()).await.expect("the watch is silent");
    let ended: ClientError = ended.expect("the watch just ends").unwrap_err();
    assert_eq!(ended.reason(), Reason::OtherHistory, "{ended}");

    let far = 100_000_000;
    for level in [ReadLevel::Local, ReadLevel::Linearizable, ReadLevel::Bounded { max_lag_ms: 1000 }] {
        assert_eq!(reason_of_read(client, old, level).await, Some(Reason::OtherHistory), "{level:?}");
        assert_eq!(reason_of_read(client, new, level).await, None, "{level:?}");
        assert_eq!(reason_of_read(client, far.into(), level).await, Some(Reason::Ahead), "{level:?}");
    }
    let mut watch = client.watch(&scope, Range::prefix(""), Some(far.into())).await.unwrap();
    let ended = tokio::time::timeout(DEADLINE, watch.next()).await.expect("the watch is silent");
    assert_eq!(ended.unwrap().unwrap_err().reason(), Reason::Ahead);

    let (old, other) = (old.to_string(), format!("history {}", old.history));
    let said = ["watch", "k", "--from", &old];
    nodes.quorate(&said).assert_refused(1, &[&other]);
    nodes.quorate(&["get", "k", "--after", &old]).assert_refused(1, &[&other]);
    nodes.quorate(&["put", "k", "v", "--if-revision", &old]).assert_refused(1, &[&other]);
    nodes.quorate(&["watch", "k", "--from", "100000000"]).assert_refused(1, &["ahead of the cluster"]);
    nodes.quorate(&["get", "k", "--after", "100000000"]).assert_refused(1, &["ahead of the cluster"]);
    nodes.quorate(&["watch", "k", "--from", "5@zz"]).assert_refused(3, &["42@"]);
}
