//! Three engines in one process, on real disks and sockets: calls through whichever of them.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use quorate::kv::machine::{KvAnswer, KvCommand, KvMachine, KvQuery, KvReply};
use quorate::testkit::proto::peer::forward_request::{Call, TransferLeader};
use quorate::testkit::proto::peer::peer_client::PeerClient;
use quorate::testkit::proto::peer::{ForwardRequest, Request, request};
use quorate::{AckLevel, Engine, EngineConfig, NewMember, ReadLevel, Role, WriteError, WriteOptions};
use tonic::Code;

use crate::{DEADLINE, POLL};

fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

async fn three(dir: &Path) -> Vec<Engine<KvMachine>> {
    let listeners: Vec<_> = (0..3).map(|_| listener()).collect();
    let peers = (1..).zip(&listeners).map(|(id, (_, address))| (id, address.clone())).collect();
    let mut engines = Vec::new();
    for (id, (listener, address)) in (1..).zip(listeners) {
        let mut config = EngineConfig::new(id, dir.join(id.to_string()), address);
        (config.peer_listener, config.initial_members) = (Some(listener), Clone::clone(&peers));
        engines.push(Engine::open(config, KvMachine::default()).await.unwrap());
    }
    for engine in &engines {
        assert!(engine.ready(DEADLINE).await);
    }
    engines
}

fn put(key: &str, value: impl Into<String>) -> KvCommand {
    let (tenant, collection) = ("t".to_owned(), "c".to_owned());
    KvCommand::Put { tenant, collection, key: key.to_owned().into(), value: value.into().into() }
}

async fn version(engine: &Engine<KvMachine>, key: &str) -> u64 {
    let (tenant, collection) = ("t".to_owned(), "c".to_owned());
    let query = KvQuery::Get { tenant, collection, key: key.to_owned().into() };
    let read = engine.read(query, ReadLevel::Local).await.unwrap();
    let KvAnswer::Item(item) = read.answer else { panic!("{:?}", read.answer) };
    item.map_or(0, |item| item.version)
}

fn leads(engine: &Engine<KvMachine>) -> bool {
    engine.state().role == Role::Leader
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_sessions_and_members_through_any_of_three_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let engines = three(dir.path()).await;
    for (round, engine) in (1..).zip(engines.iter().cycle().take(9)) {
        let written = engine.write_anywhere(put("k", "v")).await.unwrap();
        assert!(matches!(written.reply, KvReply::Put { version, .. } if version == round));
        assert!(written.applied_here);
        assert_eq!(version(engine, "k").await, round);
    }
    let all = WriteOptions { ack: AckLevel::All, ..WriteOptions::default() };
    for engine in &engines {
        let written = engine.write_anywhere_with(put("all", "v"), all).await.unwrap();
        assert_eq!((written.ack, written.held_by), (AckLevel::All, vec![1, 2, 3]));
        // The largest command that there may be is taken whole, and one that is larger is refused by name.
        let most = engine.settings().max_command_bytes;
        engine.write_anywhere(put("large", "x".repeat(most - 100))).await.unwrap();
        let refused = engine.write_anywhere(put("large", "x".repeat(most))).await.unwrap_err();
        assert!(matches!(refused, WriteError::TooLarge { .. }), "{refused}");
    }

    let (follower, other) =
        (engines.iter().find(|e| !leads(e)).unwrap(), engines.iter().rfind(|e| !leads(e)).unwrap());
    let session = follower.anywhere().open_session(Duration::ZERO).await.unwrap();
    let ticket = session.begin().unwrap();
    for engine in [follower, other, follower] {
        let written = engine.anywhere().write_in(&ticket, put("once", "v")).await.unwrap();
        assert!(matches!(written.reply, KvReply::Put { version: 1, .. }), "{written:?}");
    }
    assert!(other.anywhere().close_session(session.id()).await.unwrap().was_open);

    let (listener, peer) = listener();
    let mut config = EngineConfig::new(4, dir.path().join("4"), peer.clone());
    (config.peer_listener, config.join) = (Some(listener), true);
    config.initial_members.clear();
    let fourth = Engine::open(config, KvMachine::default()).await.unwrap();
    let new = NewMember { node_id: 4, peer };
    let list = follower.anywhere().add_member(new, true, DEADLINE).await.unwrap();
    assert!(list.members.iter().any(|member| member.node_id == 4 && member.voter), "{list:?}");
    assert!(fourth.ready(DEADLINE).await);
    fourth.write_anywhere(put("k", "v")).await.unwrap();
    let list = fourth.anywhere().remove_member(4, false).await;
    // It may learn that it was removed before it is answered.
    assert!(list.is_ok() || fourth.stopped().await.fatal.is_some(), "{list:?}");

    for engine in engines.iter().chain([&fourth]) {
        engine.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_stops_amid_the_writes_of_others_loses_and_doubles_nothing() {
    const WRITES: u64 = 200;
    let dir = tempfile::tempdir().unwrap();
    let engines = three(dir.path()).await;
    let followers: Vec<_> = engines.iter().filter(|engine| !leads(engine)).cloned().collect();
    let leader = engines.iter().find(|engine| leads(engine)).unwrap();
    let session = followers[0].anywhere().open_session(Duration::ZERO).await.unwrap();
    let writers = followers.iter().flat_map(|engine| (0..4).map(move |_| engine)).map(async |engine| {
        for _ in 0..WRITES / 8 {
            let ticket = session.begin().unwrap();
            engine.anywhere().within(DEADLINE).write_in(&ticket, put("k", "v")).await.unwrap();
        }
    });
    let stops = async {
        while version(&followers[0], "k").await < WRITES / 4 {
            tokio::time::sleep(POLL).await;
        }
        // It hands over first, and is gone a moment later.
        leader.shutdown().await;
    };
    tokio::join!(futures::future::join_all(writers), stops);
    for follower in &followers {
        assert!(follower.write_anywhere(put("end", "v")).await.unwrap().applied_here);
        assert_eq!(version(follower, "k").await, WRITES);
    }
    for engine in &engines {
        engine.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_passes_a_call_on_who_has_not_said_who_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (listener, address) = listener();
    let mut config = EngineConfig::new(1, dir.path(), address.clone());
    config.peer_listener = Some(listener);
    let engine = Engine::open(config, KvMachine::default()).await.unwrap();
    assert!(engine.ready(DEADLINE).await);
    let term = engine.state().term;
    let mut stranger = PeerClient::connect(format!("http://{address}")).await.unwrap();
    let call = Call::TransferLeader(TransferLeader { to: None });
    let forward = ForwardRequest { patience_ms: 1_000, call: Some(call) };
    let request = Request { id: 1, body: Some(request::Body::Forward(forward)) };
    let refused = stranger.exchange(tokio_stream::iter([request])).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    assert_eq!((engine.state().term, leads(&engine)), (term, true));
    engine.shutdown().await;
}
