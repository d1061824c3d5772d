//! What comes in at the peer port from callers that are no members, or that pretend to be one.

use std::collections::BTreeMap;
use std::time::Duration;

use quorate::testkit::proto::peer::peer_client::PeerClient;
use quorate::testkit::proto::peer::{
    AppendRequest, Entry, Hello, IdentifyRequest, LogId, Member, Membership, Request, SnapshotPiece,
    TransferLeaderRequest, Vote, VoteRequest, VoterSet, entry, request, response,
};
use quorate_cluster::{Cluster, Node};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::support::{DEADLINE, QUORATE, TestCluster, client, eventually, output, spec, start};

/// The protocol's version.
const VERSION: u32 = quorate::transport::PROTOCOL_VERSION;
/// A call that takes longer is not answered.
const PATIENCE: Duration = Duration::from_secs(10);

async fn dial(node: &Node) -> PeerClient<Channel> {
    let address = format!("http://{}", node.peer_address());
    PeerClient::new(Channel::from_shared(address).unwrap().connect().await.unwrap())
}

/// What is known to a caller that has seen a node's disk.
fn incarnation(node: &Node) -> String {
    let text = std::fs::read_to_string(node.data_dir().join("identity.json")).unwrap();
    let identity: serde_json::Value = serde_json::from_str(&text).unwrap();
    identity["incarnation"].as_str().unwrap().to_owned()
}

/// Node `from` calls node `to`, and says all that a member would.
fn insider(nodes: &TestCluster, from: u64, to: u64) -> Hello {
    Hello {
        protocol_version: VERSION,
        cluster: nodes.cluster.spec().cluster.clone(),
        from_node: from,
        from_incarnation: incarnation(nodes.node(from)),
        to_node: to,
        to_incarnation: incarnation(nodes.node(to)),
        membership: None,
        from_peer: String::new(),
    }
}

async fn identify(node: &Node, hello: Hello, founders: &[(u64, String)]) -> Result<(), Status> {
    let request =
        IdentifyRequest { hello: Some(hello), founders: founders.iter().cloned().collect(), state: None };
    let answer = tokio::time::timeout(PATIENCE, dial(node).await.identify(request)).await.expect("an answer");
    answer.map(|_| ())
}

/// A connection as a member has it.
struct Line {
    requests: tokio::sync::mpsc::Sender<Request>,
    answers: Streaming<quorate::testkit::proto::peer::Response>,
    next_id: u64,
}

impl Line {
    async fn open(node: &Node, hello: Hello) -> Result<Self, Status> {
        let (requests, outgoing) = tokio::sync::mpsc::channel(64);
        requests.send(Request { id: 0, body: Some(request::Body::Hello(hello)) }).await.unwrap();
        let call = dial(node).await;
        let answers = call.max_decoding_message_size(1 << 26).exchange(ReceiverStream::new(outgoing)).await?;
        Ok(Self { requests, answers: answers.into_inner(), next_id: 1 })
    }

    async fn call(&mut self, body: request::Body) -> response::Body {
        let id = self.next_id;
        self.next_id += 1;
        self.requests.send(Request { id, body: Some(body) }).await.unwrap();
        loop {
            let answer = tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("an answer");
            let answer = answer.unwrap().expect("the connection stays open");
            if answer.id == id {
                return answer.body.unwrap();
            }
        }
    }

    async fn is_refused(&mut self, what: &str, body: request::Body) {
        let answer = self.call(body).await;
        assert!(matches!(answer, response::Body::Failure(_)), "{what}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_learns_nothing_whatever_it_gets_wrong() {
    let nodes = start(&[]);
    let secrets: Vec<String> = (1..=3).map(|id| incarnation(nodes.node(id))).collect();
    let name = nodes.cluster.spec().cluster.clone();
    let none = String::new;
    let stranger = |id| Hello { to_incarnation: none(), ..insider(&nodes, if id == 2 { 3 } else { 2 }, id) };
    let zero = "0".repeat(32);
    let made_up = "7".repeat(32);
    for id in 1..=3 {
        let node = nodes.node(id);
        let callers = [
            Hello { cluster: "other".to_owned(), ..stranger(id) },
            Hello { cluster: none(), from_incarnation: zero.clone(), ..stranger(id) },
            Hello { from_incarnation: zero.clone(), ..stranger(id) },
            Hello { from_incarnation: none(), ..stranger(id) },
            Hello { from_incarnation: made_up.clone(), ..stranger(id) },
            Hello { from_incarnation: made_up.clone(), to_incarnation: made_up.clone(), ..stranger(id) },
            Hello { from_node: 9, ..stranger(id) },
            Hello { from_node: 0, ..stranger(id) },
            Hello { from_node: id, from_incarnation: secrets[id as usize - 1].clone(), ..stranger(id) },
            Hello { to_node: 9, from_incarnation: made_up.clone(), ..stranger(id) },
            Hello { protocol_version: 0, from_incarnation: made_up.clone(), ..stranger(id) },
        ];
        let mut told = Vec::new();
        for caller in callers {
            let status = identify(node, caller.clone(), &[]).await.unwrap_err();
            assert_eq!(status.code(), Code::PermissionDenied, "{status}");
            told.push((status.message().to_owned(), status.details().to_vec()));
            let status = Line::open(node, caller).await.err().expect("no connection for strangers");
            told.push((status.message().to_owned(), status.details().to_vec()));
        }
        told.dedup();
        assert_eq!(told.len(), 1, "strangers are told apart: {told:#?}");
        let (message, details) = &told[0];
        let details = String::from_utf8_lossy(details);
        for secret in secrets.iter().chain([&format!("\"{name}\"")]) {
            assert!(!message.contains(secret) && !details.contains(secret), "{message} {details}");
        }
    }
    // The log of the node that was asked says more; members are still told who it is.
    assert!(output(nodes.node(1)).contains("refused a peer"), "{}", nodes.node(1).log_tail(20));
    identify(nodes.node(1), insider(&nodes, 2, 1), &[]).await.unwrap();
    // One whose member id has another data directory, and that guesses the founders too.
    let founders: Vec<_> = (1..=3).map(|id| (id, nodes.node(id).peer_address())).collect();
    let guess = Hello { from_incarnation: made_up, ..stranger(1) };
    let status = identify(nodes.node(1), guess, &founders).await.unwrap_err();
    assert!(secrets.iter().all(|secret| !format!("{status:?}").contains(secret)), "{status:?}");
    nodes.put("k", "v").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_call_does_not_stop_a_node_that_is_alone() {
    let (mut spec, dir) = spec();
    spec.nodes = 1;
    let cluster = Cluster::start(spec).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let nodes = TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() };
    nodes.put("k", "1").await;
    let node = nodes.node(1);
    let caller = |expected: &str, membership| Hello {
        from_node: 2,
        from_incarnation: "2".repeat(32),
        to_incarnation: expected.to_owned(),
        membership: Some(membership),
        from_peer: "127.0.0.1:1".to_owned(),
        ..insider(&nodes, 1, 1)
    };
    let far = LogId { term: 1 << 40, index: 1 << 40 };
    for expected in ["7".repeat(32), "0".repeat(32)] {
        for membership in [LogId { term: 1, index: 5 }, far, LogId { term: u64::MAX, index: u64::MAX }] {
            identify(node, caller(&expected, membership), &[]).await.unwrap_err();
            assert!(Line::open(node, caller(&expected, membership)).await.is_err());
        }
    }
    // Both what it looks into and what it does not are over by now.
    tokio::time::sleep(Duration::from_millis(500)).await;
    nodes.put("k", "2").await;
    assert!(node.pid().is_some(), "{}", node.log_tail(20));
    assert!(!output(node).contains("the node has stopped"), "{}", node.log_tail(20));
}

fn vote(term: u64, node_id: u64, committed: bool) -> Option<Vote> {
    Some(Vote { term, node_id, committed })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_member_can_take_the_terms_away_or_leave_an_entry_that_ends_a_node() {
    let nodes = start(&[]);
    nodes.put("k", "1").await;
    let leader = nodes.leader(0).await;
    let followers: Vec<u64> = (1..=3).filter(|id| *id != leader.node_id).collect();
    let (from, to) = (followers[0], followers[1]);
    let last = Some(LogId { term: leader.term, index: 1 << 61 });
    for target in [to, leader.node_id] {
        let mut line = Line::open(nodes.node(target), insider(&nodes, from, target)).await.unwrap();
        for term in [u64::MAX, u64::MAX - 1, 1 << 63, 1 << 40, leader.term + (1 << 21)] {
            for leadership_transfer in [true, false] {
                let request =
                    VoteRequest { vote: vote(term, from, false), last_log: last, leadership_transfer };
                line.is_refused("a vote", request::Body::Vote(request)).await;
                line.is_refused("a round before", request::Body::PreVote(request)).await;
            }
            let append = AppendRequest { vote: vote(term, from, true), ..AppendRequest::default() };
            line.is_refused("an append", request::Body::Append(append)).await;
            let piece = SnapshotPiece {
                vote: vote(term, from, true),
                last_log: Some(LogId { term: 1, index: 9 }),
                last: true,
                ..SnapshotPiece::default()
            };
            line.is_refused("a snapshot", request::Body::Snapshot(piece)).await;
            let transfer = TransferLeaderRequest {
                from_leader: vote(term, from, true),
                to_node: target,
                ..TransferLeaderRequest::default()
            };
            line.is_refused("a hand-over", request::Body::TransferLeader(transfer)).await;
        }
        // A term that could be, from a node that nobody has asked to stand.
        let next = VoteRequest {
            vote: vote(leader.term + 1, from, false),
            last_log: last,
            leadership_transfer: true,
        };
        let answer = line.call(request::Body::Vote(next)).await;
        let response::Body::Vote(answer) = answer else { panic!("{answer:?}") };
        assert!(!answer.granted, "the leader did not ask for it: {answer:?}");
        assert!(answer.vote.unwrap().term <= leader.term, "{answer:?}");
    }
    assert_eq!(nodes.leader(0).await.term, leader.term);

    // As the leader of the next term, which is possible, with entries that are not.
    let mut line = Line::open(nodes.node(to), insider(&nodes, from, to)).await.unwrap();
    let at = nodes.status(to).await.unwrap().offsets.applied.unwrap().index;
    let previous = Some(LogId { term: leader.term, index: at });
    let mut is_refused = async |what: &str, index: u64, payload: entry::Payload| {
        let entries = vec![Entry { term: leader.term + 1, index, payload: Some(payload) }];
        let leader_commit = Some(LogId { term: leader.term + 1, index });
        let append =
            AppendRequest { vote: vote(leader.term + 1, from, true), previous, entries, leader_commit };
        line.is_refused(what, request::Body::Append(append)).await;
    };
    for garbage in [
        &b""[..],
        b"garbage",
        &[2, 0],
        &[2; 64],
        &[3, 0],
        &[3; 64],
        &[9; 200],
        &[2, 0, 255, 255, 255, 255, 255, 255, 255, 255, 9],
    ] {
        is_refused("a command", at + 1, entry::Payload::Command(garbage.to_vec().into())).await;
    }
    let member =
        |id: u64| Member { peer: format!("n{id}:1"), incarnation: "1".repeat(32), ..Member::default() };
    let membership = |voters: &[&[u64]], members: &[u64]| {
        let voters = voters.iter().map(|ids| VoterSet { node_ids: ids.to_vec() }).collect();
        let members: std::collections::HashMap<u64, Member> =
            members.iter().map(|id| (*id, member(*id))).collect();
        entry::Payload::Membership(Membership { voters, members })
    };
    for (what, payload) in [
        ("no voters", membership(&[], &[1, 2, 3])),
        ("an empty set", membership(&[&[]], &[1, 2, 3])),
        ("unknown voters", membership(&[&[1, 2, 3]], &[1])),
        ("node id 0", membership(&[&[0, 1, 2]], &[0, 1, 2])),
        ("a voter twice", membership(&[&[1, 1, 2]], &[1, 2])),
        ("three sets", membership(&[&[1], &[1], &[1]], &[1, 2, 3])),
        ("nobody it knows", membership(&[&[7, 8, 9]], &[7, 8, 9])),
        ("all but one gone", membership(&[&[from]], &[from])),
    ] {
        is_refused(what, at + 1, payload).await;
    }
    is_refused("a gap", at + 2, entry::Payload::Command(Vec::new().into())).await;
    is_refused("the last index", u64::MAX, entry::Payload::Command(Vec::new().into())).await;

    // Everybody is there, and comes back.
    nodes.put("k", "2").await;
    for id in 1..=3 {
        let node = nodes.node(id);
        node.kill().unwrap();
        node.start().unwrap();
        node.wait_ready(DEADLINE).unwrap();
    }
    eventually("it serves again", async || {
        nodes.client.put(&quorate::kv::client::Scope::default(), "k", "3").await.is_ok()
    })
    .await;
    let terms: BTreeMap<u64, u64> =
        nodes.converged().await.iter().map(|reading| (reading.node_id, 0)).collect();
    assert_eq!(terms.len(), 3);
    assert!(nodes.leader(0).await.term < leader.term + 1000);
}
