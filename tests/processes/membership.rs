//! Who belongs to the cluster, who leads it, and where its members are reached, changed while it serves.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Stdio};
use std::time::Instant;

use quorate::Reason;
use quorate::kv::client::{Client, ClientConfig, MemberChange, MemberList};
use quorate_cluster::Cluster;

use crate::support::{DEADLINE, QUORATE, TestCluster, client, eventually, output, spec};
use quorate_testkit::processes::set::{Attempt, Outcome};

/// A cluster of nodes 1 to 3, and `joining` more that were prepared and not started.
fn start(joining: u64, args: &[&str]) -> TestCluster {
    let (mut spec, dir) = spec();
    spec.nodes = 3 + joining;
    spec.joining = joining;
    spec.extra_args = args.iter().map(Into::into).collect();
    let founders: Vec<_> = spec.node_ids().take(3).map(|id| spec.client_address(id)).collect();
    let cluster = Cluster::prepare(spec).unwrap();
    let client = Client::new(founders, ClientConfig::default()).unwrap();
    let nodes = TestCluster { client, cluster, dir, program: QUORATE.into() };
    for id in 1..=3 {
        nodes.node(id).start().unwrap();
    }
    for id in 1..=3 {
        nodes.node(id).wait_ready(DEADLINE).unwrap();
    }
    nodes
}

fn add(nodes: &TestCluster, node_id: u64, promote: bool) -> MemberChange {
    MemberChange::Add { node_id, peer: nodes.node(node_id).peer_address(), promote, catch_up: DEADLINE }
}

fn remove(node_id: u64) -> MemberChange {
    MemberChange::Remove { node_id, force: false }
}

fn voters(list: &MemberList) -> Vec<u64> {
    list.members.iter().filter(|member| member.voter).map(|member| member.node_id).collect()
}

/// No call failed, whatever happened around it.
fn assert_all_acknowledged(attempts: &[Attempt]) {
    let failed: Vec<_> =
        attempts.iter().filter(|attempt| !matches!(attempt.outcome, Outcome::Acknowledged { .. })).collect();
    assert!(failed.is_empty(), "{} of {} failed: {:?}", failed.len(), attempts.len(), failed.first());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_to_five_to_three_nodes_under_load() {
    let nodes = start(2, &[]);
    let mut writers = nodes.writers(4);
    assert!(writers.reached(50, DEADLINE).await);
    for id in [4, 5] {
        nodes.node(id).start().unwrap();
        eventually("it waits", async || output(nodes.node(id)).contains("waiting to be added")).await;
        nodes.client.change_members(add(&nodes, id, true)).await.unwrap();
        // Twice is as good as once.
        nodes.client.change_members(add(&nodes, id, true)).await.unwrap();
        nodes.node(id).wait_ready(DEADLINE).unwrap();
    }
    let five = nodes.client.members().await.unwrap();
    assert_eq!(voters(&five), [1, 2, 3, 4, 5]);
    assert_eq!(five.joint, Some(false));
    let served = writers.acknowledged() + 50;
    assert!(writers.reached(served, DEADLINE).await);

    // The leader is among those that go: it hands over first.
    let leader = nodes.leader(0).await.node_id;
    let other = if leader == 1 { 2 } else { 1 };
    for id in [leader, other] {
        nodes.client.change_members(remove(id)).await.unwrap();
        let exit = nodes.node(id).wait_exit(DEADLINE).unwrap();
        assert_eq!(exit.status.code(), Some(1), "{}", nodes.node(id).log_tail(20));
        let log = output(nodes.node(id));
        assert!(log.contains(&format!("node {id} was removed from its cluster")), "{log}");
        assert!(log.contains("quorate member add"), "{log}");
    }
    let left: Vec<u64> = (1..=5).filter(|id| *id != leader && *id != other).collect();
    assert_eq!(voters(&nodes.client.members().await.unwrap()), left);
    let served = writers.acknowledged() + 50;
    assert!(writers.reached(served, DEADLINE).await);
    assert_all_acknowledged(&writers.finish().await);

    // A removed node comes back with what it had.
    let back = nodes.node(other);
    back.start_with(&["--join"]).unwrap();
    eventually("it is added again", async || {
        nodes.client.change_members(add(&nodes, other, true)).await.is_ok()
    })
    .await;
    back.wait_ready(DEADLINE).unwrap();
    assert!(voters(&nodes.client.members().await.unwrap()).contains(&other));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_replaced_by_another_one() {
    let nodes = start(1, &[]);
    let mut writers = nodes.writers(4);
    assert!(writers.reached(50, DEADLINE).await);
    let dead = nodes.follower().await;
    nodes.node(dead).kill().unwrap();
    nodes.node(4).start().unwrap();
    let replace = MemberChange::Replace {
        node_id: dead,
        new_node_id: 4,
        peer: nodes.node(4).peer_address(),
        catch_up: DEADLINE,
    };
    // Twice at the same time: each waits for the other's change, and finds it to be its own.
    let call = || nodes.client.change_members(replace.clone());
    let expected: Vec<u64> = (1..=4).filter(|id| *id != dead).collect();
    let lists: [_; 2] = tokio::join!(call(), call()).into();
    for list in lists {
        let list = list.unwrap();
        assert_eq!((voters(&list), list.members.len()), (expected.clone(), 3));
    }
    assert_eq!(nodes.client.change_members(replace).await.unwrap().members.len(), 3, "repeated");
    nodes.node(4).wait_ready(DEADLINE).unwrap();
    let served = writers.acknowledged() + 50;
    assert!(writers.reached(served, DEADLINE).await);
    assert_all_acknowledged(&writers.finish().await);

    // The dead one comes back, is told what has happened, and stops.
    nodes.node(dead).start().unwrap();
    let exit = nodes.node(dead).wait_exit(DEADLINE).unwrap();
    assert_eq!(exit.status.code(), Some(1));
    let log = output(nodes.node(dead));
    assert!(log.contains("was removed from its cluster"), "{log}");

    // Who was a member is not to be removed again, and who was none is most likely a mistake.
    assert!(nodes.client.change_members(remove(dead)).await.unwrap().unchanged);
    let refused = nodes.client.change_members(remove(77)).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::NotFound, "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_node_is_fenced_and_taken_back_under_its_old_id() {
    let nodes = start(0, &[]);
    let mut writers = nodes.writers(4);
    assert!(writers.reached(50, DEADLINE).await);
    let id = nodes.follower().await;
    let node = nodes.node(id);
    node.kill().unwrap();
    let old_disk = nodes.dir.path().join("old-disk");
    fs::rename(node.data_dir(), &old_disk).unwrap();
    node.start().unwrap();
    let exit = node.wait_exit(DEADLINE).unwrap();
    assert_eq!(exit.status.code(), Some(1));
    let log = output(node);
    assert!(log.contains("--join") && log.contains(&format!("quorate member replace {id} --peer")), "{log}");

    fs::remove_dir_all(node.data_dir()).unwrap();
    node.start_with(&["--join"]).unwrap();
    let peer = node.peer_address();
    // It is not taken for the old one, nor for a new one.
    eventually("it answers", async || {
        let plain = nodes.quorate(&["member", "add", &id.to_string(), "--peer", &peer]);
        assert_eq!(plain.status.code(), Some(1), "{plain:#?}");
        plain.stderr.contains("quorate member replace")
    })
    .await;
    let replaced = nodes.quorate(&["member", "replace", &id.to_string(), "--peer", &peer]);
    assert_eq!(replaced.status.code(), Some(0), "{replaced:#?}");
    assert_eq!(voters(&nodes.client.members().await.unwrap()), [1, 2, 3]);
    node.wait_ready(DEADLINE).unwrap();
    let served = writers.acknowledged() + 50;
    assert!(writers.reached(served, DEADLINE).await);
    let attempts = writers.finish().await;
    assert_all_acknowledged(&attempts);
    nodes.check(&attempts).await;

    // The old disk turns up again: it stays fenced.
    node.stop(DEADLINE).unwrap();
    let new_disk = nodes.dir.path().join("new-disk");
    fs::rename(node.data_dir(), &new_disk).unwrap();
    fs::rename(&old_disk, node.data_dir()).unwrap();
    node.start().unwrap();
    assert_eq!(node.wait_exit(DEADLINE).unwrap().status.code(), Some(1));
    fs::remove_dir_all(node.data_dir()).unwrap();
    fs::rename(&new_disk, node.data_dir()).unwrap();
    node.start().unwrap();
    node.wait_ready(DEADLINE).unwrap();
    nodes.check(&attempts).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_move_to_new_addresses() {
    let (spec_before, dir) = spec();
    let cluster = Cluster::start(spec_before.clone()).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let nodes = TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() };
    let mut writers = nodes.writers(4);
    assert!(writers.reached(50, DEADLINE).await);
    let attempts = writers.finish().await;
    nodes.cluster.stop(&[], DEADLINE).unwrap();
    let TestCluster { cluster, dir, .. } = nodes;
    drop(cluster);

    // The same directories on other ports. The record of the old ones says that this cannot be.
    fs::remove_file(spec_before.data_dir.join("cluster.json")).unwrap();
    let (mut moved, _unused) = spec();
    moved.data_dir.clone_from(&spec_before.data_dir);
    assert_ne!(moved.peer_address(1), spec_before.peer_address(1));
    let cluster = Cluster::start(moved).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let nodes = TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() };
    eventually("the membership has the new addresses", async || {
        let list = nodes.client.members().await.unwrap();
        list.members.iter().all(|member| {
            let spec = nodes.cluster.spec();
            member.peer == spec.peer_address(member.node_id)
                && member.client == spec.client_address(member.node_id)
        })
    })
    .await;
    nodes.check(&attempts).await;
}

/// Killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A node is started at other addresses than before. The others were not told, and it was told of nobody where anybody is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_moves_and_announces_itself() {
    let nodes = start(0, &[]);
    nodes.put("k", "v").await;
    let id = nodes.follower().await;
    let node = nodes.node(id);
    node.stop(DEADLINE).unwrap();
    let (mut elsewhere, _unused) = spec();
    elsewhere.data_dir.clone_from(&nodes.cluster.spec().data_dir);
    let (peer, client) = (elsewhere.peer_address(id), elsewhere.client_address(id));
    assert_ne!(peer, node.peer_address());
    let mut command = elsewhere.command(id);
    let moved = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    eventually("the membership has the new addresses", async || {
        let list = nodes.client.members().await.unwrap();
        list.members.iter().any(|member| {
            (member.node_id, &member.peer, &member.client, member.reachable)
                == (id, &peer, &client, Some(true))
        })
    })
    .await;
    // What it does not advertise it would correct again.
    let other = nodes.node(id).peer_address();
    nodes
        .quorate(&["member", "update", &id.to_string(), "--peer", &other])
        .assert_refused(1, &["cannot be reached"]);
    nodes
        .quorate(&["member", "update", &id.to_string(), "--client", &other])
        .assert_refused(1, &["advertises peer address", &peer]);
    drop(moved);
}

/// A founder that was single and lost its disk after its cluster had grown must not found another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_single_founder_does_not_found_a_second_cluster() {
    let (mut spec, dir) = spec();
    spec.nodes = 3;
    spec.joining = 2;
    let founder = vec![spec.client_address(1)];
    let cluster = Cluster::prepare(spec).unwrap();
    let nodes = TestCluster {
        client: Client::new(founder, ClientConfig::default()).unwrap(),
        cluster,
        dir,
        program: QUORATE.into(),
    };
    nodes.node(1).start().unwrap();
    nodes.node(1).wait_ready(DEADLINE).unwrap();
    for id in [2, 3] {
        nodes.node(id).start().unwrap();
        eventually("it is added", async || nodes.client.change_members(add(&nodes, id, true)).await.is_ok())
            .await;
    }
    nodes.put("k", "v").await;
    nodes.node(1).kill().unwrap();
    fs::remove_dir_all(nodes.node(1).data_dir()).unwrap();
    nodes.node(1).start().unwrap();
    let exit = nodes.node(1).wait_exit(DEADLINE).unwrap();
    assert_eq!(exit.status.code(), Some(1), "{}", nodes.node(1).log_tail(20));
    let log = output(nodes.node(1));
    assert!(log.contains("quorate member replace 1 --peer"), "{log}");
    let (_, after_the_wipe) = log.rsplit_once("starting").unwrap();
    assert!(!after_the_wipe.contains("the cluster has formed"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_would_lose_the_quorum_is_refused() {
    let nodes = start(0, &[]);
    let leader = nodes.leader(0).await.node_id;
    let followers: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
    let (dead, alive) = (followers[0], followers[1]);
    nodes.node(dead).kill().unwrap();
    eventually("the leader misses it", async || {
        let list = nodes.client.members().await.unwrap();
        list.members.iter().any(|member| member.node_id == dead && member.reachable == Some(false))
    })
    .await;
    for command in ["remove", "demote"] {
        // By force neither: the change itself could not be committed.
        for force in [&[][..], &["--force"]] {
            let alive = alive.to_string();
            let refused = nodes.quorate(&[&["member", command, &alive], force].concat());
            refused.assert_refused(1, &["only 1 answer, and 2 are needed"]);
        }
    }
    assert_eq!(voters(&nodes.client.members().await.unwrap()), [1, 2, 3]);
    nodes.put("k", "v").await;
    // The dead one may go: the others are a majority of what is left.
    nodes.client.change_members(remove(dead)).await.unwrap();
    let demoted = nodes.quorate(&["member", "demote", &alive.to_string()]);
    assert_eq!(demoted.status.code(), Some(0), "{demoted:#?}");
    let list = nodes.client.members().await.unwrap();
    assert_eq!(voters(&list), [leader]);
    nodes
        .quorate(&["member", "remove", &leader.to_string()])
        .assert_refused(1, &["is the only voter", "promote another one first"]);
    nodes.put("k", "v").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_preferred_leader_takes_the_lead_back() {
    let (mut spec, dir) = spec();
    spec.nodes = 3;
    let cluster = Cluster::prepare(spec).unwrap();
    for node in cluster.nodes() {
        let preferred = node.node_id() == 2;
        node.start_with(if preferred { &["--preferred-leader"][..] } else { &[] }).unwrap();
    }
    cluster.wait_ready(DEADLINE).unwrap();
    let nodes = TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() };
    let leads = async || nodes.leader(0).await.node_id == 2;
    eventually("node 2 leads", leads).await;
    let mut writers = nodes.writers(4);
    assert!(writers.reached(50, DEADLINE).await);
    nodes.node(2).kill().unwrap();
    eventually("another node leads", async || nodes.leader(0).await.node_id != 2).await;
    nodes.node(2).start_with(&["--preferred-leader"]).unwrap();
    nodes.node(2).wait_ready(DEADLINE).unwrap();
    eventually("node 2 leads again", leads).await;

    let transferred = nodes.quorate(&["transfer-leader", "3", "-o", "json"]);
    assert_eq!(transferred.status.code(), Some(0), "{transferred:#?}");
    eventually("node 2 takes the lead back once more", leads).await;
    let attempts = writers.finish().await;
    nodes.check(&attempts).await;
}

/// What a rolling restart costs those who write: the longest time without an acknowledgement, told and not judged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handing_over_is_measured() {
    let nodes = start(0, &[]);
    let mut writers = nodes.writers(4);
    assert!(writers.reached(200, DEADLINE).await);
    let mut handed_over = BTreeMap::new();
    for _ in 0..3 {
        let leader = nodes.leader(0).await;
        let begun = Instant::now();
        nodes.node(leader.node_id).stop(DEADLINE).unwrap();
        let next = nodes.leader(leader.term).await;
        assert_ne!(next.node_id, leader.node_id);
        handed_over.insert(leader.node_id, begun.elapsed());
        nodes.node(leader.node_id).start().unwrap();
        nodes.node(leader.node_id).wait_ready(DEADLINE).unwrap();
        let served = writers.acknowledged() + 100;
        assert!(writers.reached(served, DEADLINE).await);
    }
    let attempts = writers.finish().await;
    let mut ends: Vec<u64> = attempts
        .iter()
        .filter(|attempt| matches!(attempt.outcome, Outcome::Acknowledged { .. }))
        .map(|attempt| attempt.ended_ms)
        .collect();
    ends.sort_unstable();
    let gap = ends.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
    println!("longest time without an acknowledged write: {gap} ms; stops took {handed_over:?}");
    nodes.check(&attempts).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_tell_what_they_did() {
    let nodes = start(1, &[]);
    nodes.put("k", "v").await;
    let listed = nodes.quorate(&["member", "list"]);
    for text in ["NODE", "voter, leads", &nodes.node(3).peer_address()] {
        assert!(listed.stdout.contains(text), "{listed:#?}");
    }
    let snapshot = nodes.quorate(&["snapshot"]);
    assert!(snapshot.stdout.contains("a snapshot covers entries up to"), "{snapshot:#?}");
    let endpoint = nodes.node(2).client_address();
    assert_eq!(nodes.quorate(&["snapshot", "--endpoint", &endpoint]).status.code(), Some(0));

    let peer = nodes.node(4).peer_address();
    nodes
        .quorate(&["member", "add", "4", "--peer", &peer])
        .assert_refused(1, &["cannot be reached", "--join"]);
    nodes
        .quorate(&["member", "add", "4", "--peer", &nodes.node(3).peer_address()])
        .assert_refused(1, &["this is node 3, not node 4"]);
    nodes.quorate(&["member", "promote", "9"]).assert_refused(4, &["node 9 is not a member"]);
    nodes.quorate(&["transfer-leader", "9"]).assert_refused(4, &["node 9 is not a member"]);

    nodes.node(4).start().unwrap();
    eventually("it is added", async || {
        nodes.quorate(&["member", "add", "4", "--peer", &peer]).status.code() == Some(0)
    })
    .await;
    nodes.quorate(&["transfer-leader", "4"]).assert_refused(1, &["is a learner"]);
    assert_eq!(nodes.quorate(&["member", "promote", "4"]).status.code(), Some(0));
    assert_eq!(nodes.quorate(&["transfer-leader", "4"]).stdout.trim(), "node 4 leads");
}
