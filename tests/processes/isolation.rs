//! Leaders that are cut off or asleep: what they must refuse, and what they may still answer.
//!
//! They are asked over plain gRPC: the client library would go to another node with what they refuse.

use std::time::Duration;

use quorate::kv::client::Scope;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::{Failure, Freshness, GetRequest, PutRequest, ReadLevel, Reason};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::support::{DEADLINE, TestCluster, eventually, start};

const KEY: &str = "k";
/// A call that takes longer is given up: one to a node that has been stopped in the middle of it.
const PATIENCE: Duration = Duration::from_secs(2);

async fn connect(nodes: &TestCluster, node_id: u64) -> KvClient<Channel> {
    let address = format!("http://{}", nodes.node(node_id).client_address());
    KvClient::new(Channel::from_shared(address).unwrap().connect().await.unwrap())
}

fn get(level: ReadLevel, max_lag_ms: u64) -> GetRequest {
    let freshness = Some(Freshness { max_lag_ms, ..Freshness::default() });
    GetRequest { key: KEY.into(), level: level.into(), freshness, ..Default::default() }
}

/// The number under the key, or why there is none.
async fn read(kv: &mut KvClient<Channel>, request: GetRequest) -> Result<u64, Status> {
    let answer = tokio::time::timeout(PATIENCE, kv.get(request)).await;
    let answer = answer.map_err(|_| Status::deadline_exceeded("no answer"))??;
    let item = answer.into_inner().item;
    Ok(item.map_or(0, |item| std::str::from_utf8(&item.value).unwrap().parse().unwrap()))
}

fn failure(status: &Status) -> Failure {
    quorate::testkit::proto::details::failure(status.details()).unwrap()
}

/// A leader falls asleep in the middle of its lease, and wakes when another one has acknowledged a write. It does not
/// know yet that it leads no more, and what clients asked of it meanwhile lies before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_wakes_answers_nothing_from_before_it_slept() {
    const MAX_LAG: Duration = Duration::from_millis(100);
    let nodes = start(&[]);
    let (mut answered, mut number) = (0, 0);
    for _ in 0..4 {
        let leader = nodes.leader(0).await;
        let mut kv = connect(&nodes, leader.node_id).await;
        number += 1;
        nodes.put(KEY, &number.to_string()).await;
        eventually("the lease holds", async || {
            read(&mut kv, get(ReadLevel::Lease, 0)).await.ok() == Some(number)
        })
        .await;

        nodes.node(leader.node_id).pause().unwrap();
        nodes.leader(leader.term).await;
        number += 1;
        nodes.put(KEY, &number.to_string()).await;
        tokio::time::sleep(MAX_LAG + Duration::from_millis(20)).await;
        let levels = [
            (ReadLevel::Lease, 0),
            (ReadLevel::Linearizable, 0),
            (ReadLevel::Bounded, MAX_LAG.as_millis() as u64),
        ];
        let reads = levels.into_iter().cycle().take(60).map(|(level, lag)| {
            let mut kv = kv.clone();
            async move { (level, read(&mut kv, get(level, lag)).await) }
        });
        let wake = async {
            // The requests are on their way.
            tokio::time::sleep(Duration::from_millis(50)).await;
            nodes.node(leader.node_id).resume().unwrap();
        };
        let (found, ()) = tokio::join!(futures::future::join_all(reads), wake);
        for (level, found) in found {
            if let Ok(found) = found {
                assert_eq!(found, number, "{level:?} on node {}", leader.node_id);
                answered += 1;
            }
        }
        nodes.converged().await;
    }
    assert!(answered > 0, "nothing was answered: nothing was tested");
}

/// Both followers stop. The leader must not go on taking writes that nobody confirms; what it holds can still be read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_without_its_quorum_refuses_writes_and_leases_and_takes_them_again() {
    let nodes = start(&[]);
    nodes.put(KEY, "1").await;
    let leader = nodes.leader(0).await.node_id;
    let mut kv = connect(&nodes, leader).await;
    let others: Vec<u64> = nodes.cluster.spec().node_ids().filter(|id| *id != leader).collect();
    for id in &others {
        nodes.node(*id).pause().unwrap();
    }
    let put = || PutRequest { key: KEY.into(), value: "2".into(), ..Default::default() };
    eventually("writes are refused", async || {
        let answer = tokio::time::timeout(Duration::from_millis(100), kv.put(put())).await;
        // Those that are taken in the first moments wait for the followers.
        let Ok(Err(status)) = answer else { return false };
        let failure = failure(&status);
        assert_eq!((failure.reason(), failure.maybe_applied), (Reason::NoQuorum, false), "{status}");
        true
    })
    .await;
    let refused = read(&mut kv, get(ReadLevel::Lease, 0)).await.unwrap_err();
    assert_eq!(failure(&refused).reason(), Reason::NoQuorum, "{refused}");
    assert!(read(&mut kv, get(ReadLevel::Linearizable, 0)).await.is_err());
    assert_eq!(read(&mut kv, get(ReadLevel::Local, 0)).await.unwrap(), 1);
    for id in &others {
        nodes.node(*id).resume().unwrap();
    }
    nodes.client.put(&Scope::default(), KEY, "3").await.unwrap();
    nodes.converged().await;
}

/// More than the leader takes on at a time, while nothing is confirmed: refused at once, and given back in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_flight_is_bounded() {
    const VALUE_BYTES: usize = 512 * 1024;
    let nodes = start(&["--max-inflight-bytes", "2097152", "--disk-reserve-bytes", "0"]);
    let mut refused = 0;
    // The leader takes writes for one lease only; on a busy machine that may be over before they are here.
    for _ in 0..20 {
        let leader = nodes.leader(0).await.node_id;
        let kv = connect(&nodes, leader).await;
        let others: Vec<u64> = nodes.cluster.spec().node_ids().filter(|id| *id != leader).collect();
        for id in &others {
            nodes.node(*id).pause().unwrap();
        }
        let puts = (0..16).map(|number| {
            let mut kv = kv.clone();
            let key = format!("large-{number}").into();
            let request = PutRequest { key, value: vec![7; VALUE_BYTES].into(), ..Default::default() };
            async move { tokio::time::timeout(DEADLINE, kv.put(request)).await.expect("an answer") }
        });
        let resume = async {
            tokio::time::sleep(Duration::from_millis(250)).await;
            for id in &others {
                nodes.node(*id).resume().unwrap();
            }
        };
        let (answers, ()) = tokio::join!(futures::future::join_all(puts), resume);
        for status in answers.into_iter().filter_map(Result::err) {
            let failure = failure(&status);
            if failure.reason() == Reason::Overloaded {
                assert_eq!((status.code(), failure.maybe_applied), (Code::ResourceExhausted, false));
                refused += 1;
            }
        }
        if refused > 0 {
            break;
        }
    }
    assert!(refused > 0, "8 MiB at a time were never too much for 2 MiB");
    // One that fits only when everything has been given back, on whichever node leads by now.
    for number in 0..8 {
        let value = vec![7; 1024 * 1024];
        nodes.client.put(&Scope::default(), format!("later-{number}"), value).await.unwrap();
    }
    nodes.converged().await;
}
