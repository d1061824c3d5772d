//! Changes of the membership that are cut short, and nodes that are not where they say they are.

use std::fs;
use std::net::TcpListener;

use quorate::kv::client::{Client, ClientConfig, MemberList};
use quorate_cluster::Cluster;

use crate::support::{DEADLINE, QUORATE, TestCluster, Unlisted, eventually, outcome, output, spec};

/// A cluster of nodes 1 to 3, and `joining` more that were prepared and not started.
fn start(joining: u64) -> TestCluster {
    let (mut spec, dir) = spec();
    spec.nodes = 3 + joining;
    spec.joining = joining;
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

fn voters(list: &MemberList) -> Vec<u64> {
    list.members.iter().filter(|member| member.voter).map(|member| member.node_id).collect()
}

fn learners(list: &MemberList) -> Vec<u64> {
    list.members.iter().filter(|member| !member.voter).map(|member| member.node_id).collect()
}

fn address_of_nobody() -> String {
    // Bound and closed again: connecting is refused.
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// The node comes back with an empty disk, to be taken in again.
async fn wipe(nodes: &TestCluster, id: u64) {
    let node = nodes.node(id);
    if node.pid().is_some() {
        node.kill().unwrap();
    }
    fs::remove_dir_all(node.data_dir()).unwrap();
    let before = output(node).matches("waiting to be added").count();
    node.start_with(&["--join"]).unwrap();
    eventually("it waits", async || output(node).matches("waiting to be added").count() > before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_not_where_it_advertises_does_not_get_into_the_membership() {
    let nodes = start(1);
    let nobody = address_of_nobody();
    let before = nodes.client.members().await.unwrap();
    let peer = nodes.node(4).peer_address();
    let follower = nodes.follower().await;
    let id = follower.to_string();

    let elsewhere =
        |id, args: &[&str]| Unlisted::start(nodes.cluster.spec(), id, "--peer-advertise", &nobody, args);
    let unreached = elsewhere(4, &[]);
    for args in [
        &["member", "add", "4", "--peer", &peer][..],
        &["member", "add", "4", "--peer", &peer, "--promote"],
        &["member", "replace", &id, "--with", "4", "--peer", &peer],
    ] {
        let mut refused = nodes.quorate(args);
        eventually("it answers at the address given", async || {
            refused = nodes.quorate(args);
            !refused.stderr.contains("cannot be reached")
        })
        .await;
        refused.assert_refused(1, &["advertises", &nobody, "--peer-advertise"]);
        // Neither would help.
        assert!(!refused.stderr.contains("promote") && !refused.stderr.contains("catch-up"), "{refused:#?}");
    }
    drop(unreached);
    let untouched = nodes.client.members().await.unwrap();
    assert_eq!(untouched.position, before.position, "nothing was committed");

    // One that was wiped is not removed for another that could not take its place.
    nodes.node(follower).kill().unwrap();
    fs::remove_dir_all(nodes.node(follower).data_dir()).unwrap();
    let unreached = elsewhere(follower, &["--join"]);
    let own = nodes.node(follower).peer_address();
    let replace = ["member", "replace", &id, "--peer", &own];
    let mut refused = nodes.quorate(&replace);
    eventually("it answers at the address given", async || {
        refused = nodes.quorate(&replace);
        !refused.stderr.contains("cannot be reached")
    })
    .await;
    refused.assert_refused(1, &["advertises", &nobody]);
    drop(unreached);
    let untouched = nodes.client.members().await.unwrap();
    assert_eq!((untouched.position, voters(&untouched)), (before.position, vec![1, 2, 3]));

    // At the right address it is taken.
    wipe(&nodes, follower).await;
    let replaced = nodes.quorate(&replace);
    assert_eq!(replaced.status.code(), Some(0), "{replaced:#?}");

    // A member that announces an address where nobody reaches it stays where it is known.
    let leader = nodes.leader(0).await.node_id;
    let mover = (1..=3).find(|id| *id != leader).unwrap();
    nodes.node(mover).stop(DEADLINE).unwrap();
    let moved = elsewhere(mover, &[]);
    eventually("a leader has refused the address", async || {
        (1..=3).any(|id| output(nodes.node(id)).contains("its new addresses are not in the membership yet"))
    })
    .await;
    let list = nodes.client.members().await.unwrap();
    assert!(list.members.iter().all(|member| member.peer != nobody), "{list:?}");
    drop(moved);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replacement_that_was_cut_short_is_completed_by_the_same_call() {
    let nodes = start(1);
    let follower = nodes.follower().await;
    let (id, peer) = (follower.to_string(), nodes.node(follower).peer_address());
    wipe(&nodes, follower).await;
    // So little time that the new one is taken in, and usually not waited for.
    let replace = ["member", "replace", &id, "--peer", &peer];
    let cut = nodes.quorate(&[&replace[..], &["--catch-up", "1ms"]].concat());
    assert!(matches!(cut.status.code(), Some(0 | 5)), "a part is made: {cut:#?}");
    for attempt in ["the same call", "once more"] {
        let again = nodes.quorate(&replace);
        assert_eq!(again.status.code(), Some(0), "{attempt}: {again:#?}");
        assert_eq!(voters(&nodes.client.members().await.unwrap()), [1, 2, 3], "{attempt}");
    }
    // A learner that is replaced stays one, cut short or not.
    let demoted = nodes.quorate(&["member", "demote", &id]);
    assert_eq!(demoted.status.code(), Some(0), "{demoted:#?}");
    wipe(&nodes, follower).await;
    for attempt in 0..3 {
        let replaced = nodes.quorate(&replace);
        assert_eq!(replaced.status.code(), Some(0), "{attempt}: {replaced:#?}");
        let list = nodes.client.members().await.unwrap();
        assert_eq!((voters(&list).len(), learners(&list)), (2, vec![follower]), "{attempt}");
    }
    // By another node: the learner first, then that one's voter.
    nodes.node(4).start().unwrap();
    eventually("it waits", async || output(nodes.node(4)).contains("waiting to be added")).await;
    let other = nodes.node(4).peer_address();
    let replace = ["member", "replace", &id, "--with", "4", "--peer", &other];
    for attempt in 0..2 {
        let replaced = nodes.quorate(&replace);
        assert_eq!(replaced.status.code(), Some(0), "{attempt}: {replaced:#?}");
        let list = nodes.client.members().await.unwrap();
        assert_eq!((voters(&list).len(), learners(&list)), (2, vec![4]), "{attempt}");
    }
}

/// Makes the change, kills the leader as soon as anything of it is committed, or it is over, and brings that back; then the
/// same call again completes the change.
async fn cut_by_the_loss_of_the_leader(nodes: &TestCluster, args: &[&str]) {
    let before = nodes.client.members().await.unwrap();
    let leader = nodes.leader(0).await.node_id;
    let endpoints = nodes.cluster.endpoints().join(",");
    let mut command = std::process::Command::new(crate::support::QUORATE);
    command.args(["--endpoints", &endpoints, "--timeout", "5s"]).args(args);
    let call = std::thread::spawn(move || outcome(command));
    eventually("something is committed", async || {
        let now = nodes.client.members().await;
        call.is_finished() || now.is_ok_and(|now| now.position != before.position)
    })
    .await;
    nodes.node(leader).kill().unwrap();
    let first = call.join().unwrap();
    assert!(matches!(first.status.code(), Some(0..=5)), "{first:#?}");
    nodes.node(leader).start().unwrap();
    nodes.node(leader).wait_ready(DEADLINE).unwrap();
    let mut last = None;
    eventually(&format!("{args:?} is completed"), async || {
        let again = nodes.quorate(args);
        let done = again.status.success();
        last = Some(again);
        done
    })
    .await;
    let again = nodes.quorate(args);
    assert!(again.status.success(), "once more: {again:#?}, after {last:#?}");
    assert_eq!(nodes.client.members().await.unwrap().joint, Some(false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_change_is_completed_by_the_same_call_when_its_leader_is_lost() {
    let nodes = start(1);
    let follower = nodes.follower().await;
    let (id, peer) = (follower.to_string(), nodes.node(follower).peer_address());
    let others: Vec<u64> = (1..=3).filter(|other| *other != follower).collect();
    let members = async || nodes.client.members().await.unwrap();

    cut_by_the_loss_of_the_leader(&nodes, &["member", "demote", &id]).await;
    assert_eq!((voters(&members().await), learners(&members().await)), (others.clone(), vec![follower]));
    cut_by_the_loss_of_the_leader(&nodes, &["member", "promote", &id]).await;
    assert_eq!(voters(&members().await), [1, 2, 3]);

    nodes.node(4).start().unwrap();
    eventually("it waits", async || output(nodes.node(4)).contains("waiting to be added")).await;
    let other = nodes.node(4).peer_address();
    cut_by_the_loss_of_the_leader(&nodes, &["member", "add", "4", "--peer", &other, "--promote"]).await;
    assert_eq!(voters(&members().await), [1, 2, 3, 4]);
    cut_by_the_loss_of_the_leader(&nodes, &["member", "remove", "4"]).await;
    assert_eq!((voters(&members().await), members().await.members.len()), (vec![1, 2, 3], 3));

    let wiped = nodes.follower().await;
    let (id, peer) = match wiped == follower {
        true => (id, peer),
        false => (wiped.to_string(), nodes.node(wiped).peer_address()),
    };
    wipe(&nodes, wiped).await;
    cut_by_the_loss_of_the_leader(&nodes, &["member", "replace", &id, "--peer", &peer]).await;
    assert_eq!(voters(&members().await), [1, 2, 3]);
    nodes.put("k", "v").await;
}
