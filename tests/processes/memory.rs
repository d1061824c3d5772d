//! A node with little memory: it is fed until it refuses, and is never killed.
//!
//! The limit is a control group's where this process may make one (root, version 1 or 2), else that of `ulimit -v`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::future::join_all;
use quorate::ReadLevel;
use quorate::kv::client::{Client, ClientError, Endpoint, Range, Reason, Scope, WriteOptions};
use quorate_cluster::Cluster;

use crate::support::{DEADLINE, QUORATE, TestCluster, client, eventually, spec};

const MIB: u64 = 1024 * 1024;
/// All that the node may use, page cache included.
const MEMORY_BYTES: u64 = 400 * MIB;
/// Under `ulimit -v` what is reserved counts as well as what is used: stacks of threads, areas of the allocator.
const ADDRESS_SPACE_BYTES: u64 = 1024 * MIB;
/// Writers at a time.
const WRITERS: usize = 16;

/// A control group of the kernel, removed when dropped.
struct Group {
    directory: PathBuf,
}

impl Group {
    /// One with a limit of `bytes`; `None` where there can be none.
    fn new(bytes: u64) -> Option<Self> {
        let name = format!("quorate-test-{}", std::process::id());
        for (root, file) in
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
        {
            let directory = Path::new(root).join(&name);
            if fs::create_dir(&directory).is_err() {
                continue;
            }
            let group = Self { directory };
            if fs::write(group.directory.join(file), bytes.to_string()).is_ok() {
                // So that swap does not hide what is too much. Not everywhere to be had.
                let _ = fs::write(group.directory.join("memory.swap.max"), "0");
                return Some(group);
            }
        }
        None
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The kernel may still be counting what its last process had.
        for _ in 0..100 {
            if fs::remove_dir(&self.directory).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// A program that starts `quorate` with little memory.
fn limited(directory: &Path, group: Option<&Group>) -> PathBuf {
    let limit = match group {
        Some(group) => format!("echo $$ > {}/cgroup.procs", group.directory.display()),
        None => format!("ulimit -v {}", ADDRESS_SPACE_BYTES / 1024),
    };
    let path = directory.join("limited");
    fs::write(&path, format!("#!/bin/sh\n{limit} || exit 90\nexec {QUORATE} \"$@\"\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// One node with little memory. Dropped in this order.
struct Limited {
    nodes: TestCluster,
    _group: Option<Group>,
}

impl Limited {
    fn start() -> Self {
        let group = Group::new(MEMORY_BYTES);
        let (mut spec, dir) = spec();
        spec.nodes = 1;
        spec.binary = limited(dir.path(), group.as_ref());
        let cluster = Cluster::start(spec).unwrap();
        cluster.wait_ready(DEADLINE).unwrap();
        Self {
            nodes: TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() },
            _group: group,
        }
    }

    fn client(&self) -> &Client {
        &self.nodes.client
    }

    /// Bytes of state, and how many they may be.
    async fn size(&self) -> (u64, u64) {
        let endpoint = Endpoint::parse(&self.nodes.node(1).client_address()).unwrap();
        let status = self.client().status(&endpoint).await.unwrap();
        (status.state.bytes.unwrap(), status.state.quota_bytes.unwrap_or(0))
    }

    /// Writes keys of `value_bytes` from `first` on until one is refused. How many there are then.
    async fn feed(&self, first: u64, value_bytes: usize) -> u64 {
        let value = Bytes::from(vec![b'v'; value_bytes]);
        let put = |number: u64| {
            let (client, value) = (self.client().clone(), value.clone());
            async move { client.put(&Scope::default(), key(number), value).await }
        };
        let mut next = first;
        loop {
            let batch = next..next + WRITERS as u64;
            next = batch.end;
            let outcomes = join_all(batch.map(put)).await;
            let refused: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
            refused.iter().for_each(|error| assert_quota(error));
            if !refused.is_empty() {
                return next;
            }
        }
    }
}

fn key(number: u64) -> String {
    format!("key-{number:012}")
}

#[track_caller]
fn assert_quota(error: &ClientError) {
    match error {
        ClientError::Failed { reason: Reason::QuotaExceeded, maybe_applied: false, message, .. } => {
            assert!(message.contains("delete something, or raise the quota"), "{message}");
        }
        other => panic!("not the quota: {other}"),
    }
}

/// Feeds a node until it refuses; then everything but growth goes on, also after a restart, and there is room again once
/// something has been deleted.
async fn lives_within_its_memory(value_bytes: usize) {
    let limited = Limited::start();
    let (scope, nodes) = (Scope::default(), &limited.nodes);
    let pid = nodes.node(1).pid();
    eventually("a quota is agreed", async || limited.size().await.1 > 0).await;
    let (_, quota) = limited.size().await;
    assert!(quota < ADDRESS_SPACE_BYTES / 2, "it follows the memory: {quota}");

    let keys = limited.feed(0, value_bytes).await;
    let (state, _) = limited.size().await;
    assert!(state <= quota && state + 2 * value_bytes as u64 + 1024 > quota, "{state} of {quota}");
    assert_eq!(nodes.node(1).pid(), pid, "it was never killed");
    let read = limited.client().get(&scope, key(0), ReadLevel::Linearizable).await.unwrap();
    assert_eq!(read.item.unwrap().value.len(), value_bytes);
    let same = Bytes::from(vec![b'w'; value_bytes]);
    limited.client().put(&scope, key(0), same).await.expect("a key that becomes no larger can be written");

    // As large as those that filled it: a smaller one may still fit.
    let large = nodes.dir.path().join("large");
    fs::write(&large, vec![b'x'; value_bytes]).unwrap();
    let shell = nodes.quorate(&["put", "another", "--file", large.to_str().unwrap(), "-o", "json"]);
    let error: serde_json::Value = serde_json::from_str(&shell.stdout)
        .or_else(|_| serde_json::from_str(&shell.stderr))
        .unwrap_or_else(|_| panic!("{shell:#?}"));
    assert_eq!(error["reason"], "QUOTA_EXCEEDED", "{error}");

    // SIGKILL, and a start that needs no more than running did.
    nodes.node(1).kill().unwrap();
    nodes.node(1).start().unwrap();
    nodes.cluster.wait_ready(DEADLINE).unwrap();
    assert_eq!(limited.size().await, (state, quota));
    let another = Bytes::from(vec![b'y'; value_bytes]);
    assert_quota(&limited.client().put(&scope, "another", another).await.unwrap_err());

    let half = Range { start: Bytes::new(), end: Bytes::from(key(keys / 2)), limit_items: 0 };
    loop {
        let deleted =
            limited.client().delete_range(&scope, half.clone(), WriteOptions::default()).await.unwrap();
        if !deleted.more {
            break;
        }
    }
    limited.client().put(&scope, "another", "value").await.unwrap();
    let refilled = limited.feed(keys, value_bytes).await;
    assert!(refilled > keys, "there was room for more");
    let alive = nodes.node(1).pid();
    assert!(alive.is_some() && alive == nodes.node(1).pid());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_little_memory_refuses_in_time() {
    lives_within_its_memory(256 * 1024).await;
}

/// Many small keys, whose overhead is larger than they are: takes minutes.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "writes hundreds of thousands of keys"]
async fn many_small_keys_count_what_they_take() {
    lives_within_its_memory(64).await;
}
