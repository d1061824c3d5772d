//! A node that is told nonsense by somebody that passes for its leader: whatever it hears, it goes on.
//!
//! Everything is in memory and on virtual time. What is sent comes from a seed, so that a failure can be repeated.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use quorate::kv::machine::{KvCommand, KvMachine};
use quorate::store::{MemoryDisk, MemorySnapshots, MemoryStore, SyncMode};
use quorate::testkit::clock::Reading;
use quorate::testkit::envelope;
use quorate::testkit::proto::peer::{self as proto, Request, Response, entry, request, response};
use quorate::transport::{
    Connection, DialError, Hello, IdentifyRequest, IdentifyResponse, PROTOCOL_VERSION, Purpose, Target,
    Transport,
};
use quorate::{Engine, EngineConfig, EngineParts};
use quorate::{Incarnation, Role};
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use tokio::sync::mpsc;

/// How far a term may be ahead, and the largest that there is; indexes have the same bound.
const TERM_LEAP: u64 = 1 << 20;
const LARGEST: u64 = 1 << 62;

/// Messages that one seed sends.
const MESSAGES: usize = 300;
const SEEDS: u64 = 12;
const PATIENCE: Duration = Duration::from_secs(30);

/// Node 2, which passes for the leader of node 1, and for a candidate.
struct Liar {
    rng: SmallRng,
    term: u64,
    /// Where the log ends that it has made node 1 believe.
    last: u64,
    refused: u64,
    answered: u64,
}

impl Liar {
    fn number(&mut self, near: u64) -> u64 {
        const ABSURD: [u64; 12] = [
            0,
            1,
            TERM_LEAP,
            1 << 40,
            LARGEST - 1,
            LARGEST,
            LARGEST + 1,
            1 << 63,
            u64::MAX - 2,
            u64::MAX - 1,
            u64::MAX,
            i64::MAX as u64,
        ];
        match self.rng.random_range(0..4) {
            0 => ABSURD[self.rng.random_range(0..ABSURD.len())],
            1 => self.rng.next_u64() >> self.rng.random_range(0..64),
            _ => near.saturating_add(self.rng.random_range(0..4)).saturating_sub(2),
        }
    }

    fn log_id(&mut self) -> Option<proto::LogId> {
        let (term, last) = (self.term, self.last);
        let id = proto::LogId { term: self.number(term), index: self.number(last) };
        self.rng.random_bool(0.8).then_some(id)
    }

    fn vote(&mut self) -> Option<proto::Vote> {
        let near = self.term;
        let term = if self.rng.random_bool(0.6) { near } else { self.number(near) };
        let node_id = if self.rng.random_bool(0.9) { 2 } else { self.number(1) };
        let committed = self.rng.random_bool(0.7);
        self.rng.random_bool(0.95).then_some(proto::Vote { term, node_id, committed })
    }

    fn bytes(&mut self) -> Bytes {
        let length = self.rng.random_range(0..80);
        let mut bytes = vec![0; length];
        self.rng.fill_bytes(&mut bytes);
        if self.rng.random_bool(0.5) && length > 2 {
            bytes[0] = 3;
            bytes[1] = self.rng.random_range(0..5);
        }
        bytes.into()
    }

    fn command(&mut self) -> Bytes {
        let command = KvCommand::Put {
            tenant: "t".to_owned(),
            collection: "c".to_owned(),
            key: Bytes::from("k"),
            value: self.bytes(),
        };
        let now = if self.rng.random_bool(0.9) { 1 } else { u64::MAX };
        envelope::seal::<KvMachine>(Reading { wall_ms: now, ..Reading::default() }, &command, None).unwrap()
    }

    /// Memberships without a meaning, or without a way to them.
    fn membership(&mut self) -> proto::Membership {
        let member = proto::Member { incarnation: Incarnation(7).to_string(), ..Default::default() };
        let mut ids: Vec<u64> = (0..self.rng.random_range(0..4)).map(|_| self.number(5)).collect();
        ids.retain(|id| *id != 1);
        let members = ids.iter().map(|id| (*id, member.clone()));
        let members: HashMap<_, _> = members.filter(|_| self.rng.random_bool(0.8)).collect();
        let set = proto::VoterSet { node_ids: ids };
        // Two at least, none of them known: no step leads there.
        let others = proto::VoterSet { node_ids: vec![8, 9] };
        proto::Membership { voters: vec![set, others], members }
    }

    fn entry(&mut self, index: u64) -> proto::Entry {
        let near = self.term;
        let term = if self.rng.random_bool(0.7) { near } else { self.number(near) };
        let index = if self.rng.random_bool(0.8) { index } else { self.number(index) };
        let payload = match self.rng.random_range(0..6) {
            0 => None,
            1 => Some(entry::Payload::Command(self.bytes())),
            2 => Some(entry::Payload::Membership(self.membership())),
            _ => Some(entry::Payload::Command(self.command())),
        };
        proto::Entry { term, index, payload }
    }

    fn append(&mut self) -> proto::AppendRequest {
        let count = self.rng.random_range(0..4);
        let (previous, leader_commit) = match self.rng.random_bool(0.4) {
            // The true end of the log, as far as it is known here.
            true => (Some(proto::LogId { term: self.term, index: self.last }), self.log_id()),
            false => (self.log_id(), self.log_id()),
        };
        let begin = previous.map_or(0, |previous| previous.index.wrapping_add(1));
        let entries = (0..count).map(|offset| self.entry(begin.wrapping_add(offset))).collect();
        proto::AppendRequest { vote: self.vote(), previous, entries, leader_commit }
    }

    fn body(&mut self) -> Option<request::Body> {
        let body = match self.rng.random_range(0..12) {
            0..5 => request::Body::Append(self.append()),
            5 | 6 => {
                let (vote, last_log) = (self.vote(), self.log_id());
                let leadership_transfer = self.rng.random_bool(0.5);
                let request = proto::VoteRequest { vote, last_log, leadership_transfer };
                match self.rng.random_bool(0.5) {
                    true => request::Body::Vote(request),
                    false => request::Body::PreVote(request),
                }
            }
            7 => request::Body::TransferLeader(proto::TransferLeaderRequest {
                from_leader: self.vote(),
                to_node: self.number(1),
                last_log: self.log_id(),
                wants_lead: self.rng.random_bool(0.5),
            }),
            8 | 9 => {
                let (vote, last_log, bytes) = (self.vote(), self.log_id(), self.bytes());
                let offset = if self.rng.random_bool(0.7) { 0 } else { self.number(0) };
                let last = self.rng.random_bool(0.5);
                let (probe, is_checked) = (self.rng.random_bool(0.2), self.rng.random_bool(0.3));
                let crc32 = is_checked.then(|| self.rng.random());
                let uncompressed_bytes = if self.rng.random_bool(0.2) { self.rng.random() } else { 0 };
                let piece = proto::SnapshotPiece {
                    vote,
                    last_log,
                    offset,
                    bytes,
                    last,
                    probe,
                    crc32,
                    uncompressed_bytes,
                };
                request::Body::Snapshot(piece)
            }
            10 => request::Body::Announce(proto::AnnounceRequest {
                member: Some(proto::Member { peer: "x".repeat(2000), ..Default::default() }),
                wants_lead: true,
            }),
            _ => request::Body::ReadIndex(proto::ReadIndexRequest {}),
        };
        self.rng.random_bool(0.98).then_some(body)
    }
}

const CLUSTER: &str = "c";

/// A network in which nobody is reached.
struct Nowhere;

fn unreachable<T: Send + 'static>() -> BoxFuture<'static, Result<T, DialError>> {
    async { Err(DialError::Unreachable("connection refused".to_owned())) }.boxed()
}

impl Transport for Nowhere {
    fn connect(&self, _: Target, _: Hello, _: Purpose) -> BoxFuture<'static, Result<Connection, DialError>> {
        unreachable()
    }

    fn identify(
        &self,
        _: String,
        _: IdentifyRequest,
    ) -> BoxFuture<'static, Result<IdentifyResponse, DialError>> {
        unreachable()
    }
}

/// Node 1, which waits to be added to a cluster.
async fn start(disk: &MemoryDisk) -> Engine<KvMachine> {
    let mut config = EngineConfig::new(1, "", "nowhere:1");
    config.cluster = CLUSTER.to_owned();
    config.join = true;
    config.initial_members.clear();
    let parts = EngineParts::new(
        config,
        Incarnation(1),
        Arc::new(MemoryStore::open(disk)),
        Arc::new(MemorySnapshots::new()),
        Arc::new(Nowhere),
    );
    Engine::start(parts, KvMachine::default()).await.unwrap()
}

/// One connection to node 1.
struct Line {
    requests: mpsc::Sender<Request>,
    responses: mpsc::Receiver<Response>,
    next_id: u64,
}

impl Line {
    fn open(engine: &Engine<KvMachine>) -> Self {
        let door = engine.peer_door();
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            cluster: CLUSTER.to_owned(),
            from_node: 2,
            from_incarnation: Incarnation(2).to_string(),
            to_node: 1,
            to_incarnation: Incarnation(1).to_string(),
            membership: None,
            from_peer: String::new(),
        };
        door.admit(&hello).unwrap();
        let (requests, sent) = mpsc::channel(16);
        let (answers, responses) = mpsc::channel(16);
        tokio::spawn(door.serve(2, sent.into(), answers));
        Self { requests, responses, next_id: 0 }
    }

    /// The answer; none if the core gave up on it.
    async fn call(&mut self, body: Option<request::Body>) -> Option<response::Body> {
        self.next_id += 1;
        let id = self.next_id;
        self.requests.send(Request { id, body }).await.ok()?;
        let answer = async {
            loop {
                match self.responses.recv().await {
                    Some(answer) if answer.id == id => return answer.body,
                    Some(_) => {}
                    None => return None,
                }
            }
        };
        tokio::time::timeout(PATIENCE, answer).await.ok().flatten()
    }
}

/// Makes node 1, which was started to join, the only voter of a cluster in which node 2 leads.
async fn take_in(line: &mut Line) {
    let member = |id: u128| proto::Member {
        peer: format!("n{id}:1"),
        incarnation: Incarnation(id).to_string(),
        ..proto::Member::default()
    };
    let membership = proto::Membership {
        voters: vec![proto::VoterSet { node_ids: vec![1] }],
        members: HashMap::from([(1, member(1)), (2, member(2))]),
    };
    let founding = proto::Entry { term: 1, index: 0, payload: Some(entry::Payload::Membership(membership)) };
    let vote = Some(proto::Vote { term: 1, node_id: 2, committed: true });
    let leader_commit = Some(proto::LogId { term: 1, index: 0 });
    let append = proto::AppendRequest { vote, previous: None, entries: vec![founding], leader_commit };
    let answer = line.call(Some(request::Body::Append(append))).await;
    assert!(matches!(answer, Some(response::Body::Append(_))), "{answer:?}");
}

async fn survives(seed: u64) -> (u64, u64) {
    let disk = MemoryDisk::new(SyncMode::Immediate);
    let engine = start(&disk).await;
    let mut line = Line::open(&engine);
    take_in(&mut line).await;
    let rng = SmallRng::seed_from_u64(seed);
    let mut liar = Liar { rng, term: 1, last: 0, refused: 0, answered: 0 };
    for number in 0..MESSAGES {
        let body = liar.body();
        let sent = format!("{body:?}");
        match line.call(body).await {
            Some(response::Body::Failure(_)) => liar.refused += 1,
            Some(_) => liar.answered += 1,
            None => {}
        }
        let state = engine.state();
        assert_eq!(state.fatal, None, "seed {seed}, message {number}: {sent}");
        assert_ne!(state.role, Role::Stopped, "seed {seed}, message {number}: {sent}");
        liar.term = state.term.max(1);
        liar.last = state.last_log.unwrap_or(0);
        if line.requests.is_closed() {
            line = Line::open(&engine);
        }
    }
    drop(line);
    serves(&engine, seed).await;
    engine.shutdown().await;
    // What it took is nothing that keeps it from starting.
    let again = start(&disk).await;
    serves(&again, seed).await;
    again.shutdown().await;
    (liar.refused, liar.answered)
}

async fn serves(engine: &Engine<KvMachine>, seed: u64) {
    let written = async {
        loop {
            let (tenant, collection) = ("t".to_owned(), "c".to_owned());
            let put = KvCommand::Put { tenant, collection, key: Bytes::from("k"), value: Bytes::from("v") };
            if engine.write(put).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let written = tokio::time::timeout(PATIENCE, written).await;
    assert!(written.is_ok(), "seed {seed}: {:?}", engine.state());
}

/// A leader that was cut off, and has entries that were never committed, is no liar.
#[test]
fn a_leader_that_was_deposed_is_told_of_the_newer_term() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let _guard = quorate::testkit::runtime::simulate(1);
        let engine = start(&MemoryDisk::new(SyncMode::Immediate)).await;
        let mut line = Line::open(&engine);
        take_in(&mut line).await;
        // The only voter elects itself, and commits other entries at the same positions.
        serves(&engine, 1).await;
        let vote = Some(proto::Vote { term: 1, node_id: 2, committed: true });
        let entries = (1..4).map(|index| proto::Entry { term: 1, index, payload: None }).collect();
        let previous = Some(proto::LogId { term: 1, index: 0 });
        let append = proto::AppendRequest { vote, previous, entries, leader_commit: None };
        let snapshot = proto::SnapshotPiece {
            vote,
            last_log: Some(proto::LogId { term: 1, index: 3 }),
            bytes: Bytes::from("s"),
            ..Default::default()
        };
        let newer = |vote: Option<proto::Vote>| vote.is_some_and(|vote| vote.term > 1 && vote.node_id == 1);
        match line.call(Some(request::Body::Append(append))).await {
            Some(response::Body::Append(proto::AppendResponse {
                outcome: Some(proto::append_response::Outcome::HigherVote(vote)),
                ..
            })) => assert!(newer(Some(vote))),
            answer => panic!("{answer:?}"),
        }
        match line.call(Some(request::Body::Snapshot(snapshot))).await {
            Some(response::Body::Snapshot(answer)) => assert!(newer(answer.vote)),
            answer => panic!("{answer:?}"),
        }
        engine.shutdown().await;
    });
}

#[test]
fn no_message_of_a_peer_ends_a_node() {
    let (mut refused, mut answered) = (0, 0);
    for seed in 0..SEEDS {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let counts = runtime.block_on(async move {
            let _guard = quorate::testkit::runtime::simulate(seed);
            survives(seed).await
        });
        refused += counts.0;
        answered += counts.1;
    }
    let all = SEEDS * MESSAGES as u64;
    assert!(
        refused > all / 4 && answered > all / 20,
        "{refused} refused, {answered} answered: nothing was tested"
    );
}
