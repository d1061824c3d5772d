//! Two guests behind one port: keys and notes, in one log.

use std::io::{self, Read, Write};

use bytes::Bytes;
use prost::Message;
use quorate::Composed;
use quorate::Quota;
use quorate::client::{Client, ClientConfig, WriteOptions};
use quorate::kv::Kv;
use quorate::kv::machine::KvMachine;
use quorate::server::Rejected;
use quorate::server::Server;
use quorate::server::{Call, Guest, Method};
use quorate::testkit::proto::v1::{GetRequest, GetResponse, PutRequest, PutResponse};
use quorate::{ApplyContext, Engine, EngineConfig, LogId, ReadLevel, Replica, ReplicaConfig, StateMachine};
use tokio::sync::oneshot;

/// Notes, one after the other.
#[derive(Debug, Clone, Default)]
struct Notes(Vec<String>);

impl StateMachine for Notes {
    type Command = String;
    type Reply = u64;
    type Query = u64;
    type Answer = Option<String>;
    type View = Vec<String>;

    fn apply(&mut self, _: &ApplyContext, note: String) -> u64 {
        self.0.push(note);
        self.0.len() as u64
    }

    fn view(&self) -> Vec<String> {
        self.0.clone()
    }

    fn query(view: &Vec<String>, number: u64) -> Option<String> {
        view.get(usize::try_from(number).ok()?.checked_sub(1)?).cloned()
    }

    fn write_snapshot(view: &Vec<String>, out: &mut dyn Write) -> io::Result<()> {
        serde_json::to_writer(out, view).map_err(io::Error::other)
    }

    fn read_snapshot(_: u32, input: &mut dyn Read) -> io::Result<Self> {
        serde_json::from_reader(input).map(Self).map_err(io::Error::other)
    }
}

enum Noted {}

impl Guest for Noted {
    type Machine = Notes;
    type Request = (usize, String);
    type Response = String;
    type Asked = ();

    const METHODS: &'static [Method] = &[Method::write("note"), Method::read("noted")];

    fn parse(method: usize, payload: Bytes) -> Result<(usize, String), Rejected> {
        let text = String::from_utf8(payload.to_vec());
        text.map(|text| (method, text)).map_err(|_| Rejected::invalid("a note is a text"))
    }

    fn encode(response: String) -> Bytes {
        response.into()
    }

    fn call((method, text): (usize, String)) -> Result<(Call<String, u64>, ()), Rejected> {
        Ok((if method == 0 { Call::Write(text) } else { Call::Read(text.parse().unwrap_or(0)) }, ()))
    }

    fn written((): (), _: LogId, reply: Option<u64>) -> Result<String, Rejected> {
        Ok(reply.map(|number| number.to_string()).unwrap_or_default())
    }

    fn answered((): (), answer: Option<String>) -> Result<String, Rejected> {
        Ok(answer.unwrap_or_default())
    }

    fn response_bytes(response: &String) -> usize {
        response.len()
    }
}

type Machines = Composed<KvMachine, Notes, 1>;
type Guests = Composed<Kv, Noted, 1>;

async fn use_both(client: &Client) {
    let put =
        |value: &'static str| PutRequest { key: "k".into(), value: value.into(), ..PutRequest::default() };
    for (round, value) in (1..).zip(["one", "two"]) {
        let written = client.write("put", put(value).encode_to_vec(), WriteOptions::default()).await.unwrap();
        assert_eq!(PutResponse::decode(written.payload).unwrap().version, round);
        let noted = client.write("note", value, WriteOptions::default()).await.unwrap();
        assert_eq!(noted.payload, round.to_string());
        let found = client.read("noted", round.to_string(), ReadLevel::Linearizable).await.unwrap();
        assert_eq!(found.payload, value);
    }
    let get = GetRequest { key: "k".into(), ..GetRequest::default() }.encode_to_vec();
    let found = client.read("get", get, ReadLevel::Linearizable).await.unwrap();
    assert_eq!(&GetResponse::decode(found.payload).unwrap().item.unwrap().value[..], b"two");
    assert!(client.read("unknown", "", ReadLevel::Linearizable).await.is_err());
    assert_eq!(client.metrics().sessions_opened, 1, "one for both");
}

/// What the machines share with their node goes on for each of them: wake-ups, and the quota on their states together.
async fn expire_and_fill(client: &Client, engine: &Engine<Machines>) {
    let get = GetRequest { key: "short".into(), ..GetRequest::default() }.encode_to_vec();
    let put = PutRequest { key: "short".into(), value: "lived".into(), ttl_ms: 500, ..PutRequest::default() };
    client.write("put", put.encode_to_vec(), WriteOptions::default()).await.unwrap();
    let expired = async {
        loop {
            let found = client.read("get", get.clone(), ReadLevel::Linearizable).await.unwrap();
            if GetResponse::decode(found.payload).unwrap().item.is_none() {
                return;
            }
            tokio::time::sleep(crate::POLL).await;
        }
    };
    tokio::time::timeout(crate::DEADLINE, expired).await.expect("the key expires");
    engine.set_state_quota(Some(Quota::MIN_BYTES)).await.unwrap();
    let large = vec![7; 900_000];
    let mut refused = None;
    for key in ["a", "b", "c"] {
        let put = PutRequest { key: key.into(), value: large.clone().into(), ..PutRequest::default() };
        let written = client.write("put", put.encode_to_vec(), WriteOptions::default()).await;
        refused = written.err();
    }
    assert!(refused.unwrap().to_string().contains("quota"), "of the keys, which count");
    client.write("note", "goes on", WriteOptions::default()).await.expect("notes count nothing");
    assert_ne!(engine.report().state.bytes, Some(0));
}

/// Once told what happens from the beginning on, one by its events and the other by its commands, and once sent the whole state as a file,
/// a replica has the state of both.
async fn follow_both(client: &Client, engine: &Engine<Machines>, address: &str) {
    let (early, late) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let replica = async |dir: &std::path::Path, full_syncs: u64| {
        let config = ReplicaConfig::new([address], dir);
        let replica = Box::pin(Replica::open(config, Machines::default)).await.unwrap();
        let upto = engine.report().offsets.applied.unwrap().index;
        let reached = replica.wait_for(|state| state.local.index >= upto);
        let state = tokio::time::timeout(crate::DEADLINE, reached).await.unwrap().unwrap();
        assert_eq!(state.full_syncs, full_syncs, "{state:?}");
        let (of_replica, of_node) =
            (replica.view(ReadLevel::Local).await.unwrap(), engine.view(ReadLevel::Local).await.unwrap());
        assert_eq!(of_replica.0, of_node.0);
        assert_eq!(Machines::state_hash(&of_replica.1), Machines::state_hash(&of_node.1));
        replica
    };
    let first = replica(early.path(), 0).await;
    // So many that the event log lets go of the first.
    engine.configure(|settings| settings.event_log.operations = 1000).unwrap();
    for round in 0..30 {
        // More than stays in memory.
        let note = |n| format!("{round}/{n}/{}", "x".repeat(5000));
        let notes = (0..100).map(|n| client.write("note", note(n), WriteOptions::default()));
        futures::future::join_all(notes).await.into_iter().for_each(|noted| drop(noted.unwrap()));
    }
    let purged = async {
        while engine.feed_reach().first < 100 {
            tokio::time::sleep(crate::POLL).await;
        }
    };
    tokio::time::timeout(crate::DEADLINE, purged).await.expect("the event log lets go of what is old");
    drop(replica(late.path(), 1).await);
    // Both go on where they were.
    drop(first);
    client.write("note", "the last", WriteOptions::default()).await.unwrap();
    drop(replica(late.path(), 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_guests_are_served_behind_one_port() {
    assert_eq!(Guests::METHODS.len(), Kv::METHODS.len() + 2);
    let dir = tempfile::tempdir().unwrap();
    let peer = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    peer.set_nonblocking(true).unwrap();
    let server = Server::<Guests>::bind("127.0.0.1:0").await.unwrap();
    let address = server.local_addr().to_string();
    let at = address.clone();
    let mut config = EngineConfig::new(1, dir.path(), peer.local_addr().unwrap().to_string());
    (config.peer_listener, config.client_advertise) = (Some(peer), address.clone());
    let engine = Engine::open(config, Machines::default()).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = server.serve(engine.clone(), async { stopped.await.unwrap_or(()) });
    let working = async {
        let client = Client::new([address], ClientConfig::default()).unwrap();
        use_both(&client).await;
        expire_and_fill(&client, &engine).await;
        Box::pin(follow_both(&client, &engine, &at)).await;
        client.close().await;
        drop(stop);
    };
    let (served, ()) = tokio::join!(serving, working);
    served.unwrap();
    engine.shutdown().await;
}
