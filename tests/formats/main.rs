//! What this version writes must be read by the next: the files of a node, and the messages of every service.
//!
//! `fixtures/` holds what earlier versions have written, and is only ever added to:
//!
//! | file | what it is |
//! |---|---|
//! | `data-1.tar.gz` | the data directory of a node: log, vote, a snapshot with sessions, expiring keys |
//! | `data-2.tar.gz` | the same, with clocks in place of log time, a history, openers of sessions and a quota on the state |
//! | `composed-1.tar.gz` | that of a node with two machines, one of them of version 2: a founding membership with an initial state, agreements |
//! | `protocol-1.bin` | the descriptors of all protocol files |
//!
//! A new fixture is written by `QUORATE_WRITE_FIXTURES=1 cargo test --test formats`, under a new number, when a format
//! gets a new version.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod composed;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorSet};
use quorate::WriteOptions;
use quorate::kv::machine::{KvAnswer, KvCommand, KvMachine, KvQuery, KvReply, KvTxn, TxnOp};
use quorate::{Engine, EngineConfig};
use quorate::{HistoryEpoch, QuotaSource, ReadLevel, SessionSlot};

const DEADLINE: Duration = Duration::from_secs(30);
/// Who opens the session in it.
const OPENER: &str = "10.0.0.7:41234";
/// The quota on the state.
const QUOTA_BYTES: u64 = 96 * 1024 * 1024;
/// The cluster whose data the fixture is.
const CLUSTER: &str = "fixture";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/formats/fixtures")
}

async fn open(dir: &Path) -> Engine<KvMachine> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut config = EngineConfig::new(1, dir, listener.local_addr().unwrap().to_string());
    config.cluster = CLUSTER.to_owned();
    config.peer_listener = Some(listener);
    let engine = Engine::open(config, KvMachine::default()).await.unwrap();
    assert!(engine.ready(DEADLINE).await);
    engine
}

fn put(key: &str, value: &str, ttl_ms: u64) -> KvCommand {
    let (tenant, collection) = ("tenant".to_owned(), "collection".to_owned());
    let (key, value) = (Bytes::from(key.to_owned()), Bytes::from(value.to_owned()));
    match ttl_ms {
        0 => KvCommand::Put { tenant, collection, key, value },
        _ => KvCommand::PutExpiring { tenant, collection, key, value, ttl_ms },
    }
}

fn in_session(session: u64, sequence: u64) -> WriteOptions {
    let slot = SessionSlot { session, sequence, first_unanswered: 1 };
    WriteOptions { slot: Some(slot), ..WriteOptions::default() }
}

/// Everything that the fixture holds: before its snapshot, and in the log after it. Returns its session.
async fn write_all(engine: &Engine<KvMachine>) -> u64 {
    /// A century: the fixture is read long after it was written.
    const TTL_MS: u64 = 100 * 365 * 24 * 3_600_000;
    const SESSION_MS: u64 = 24 * 3_600_000;
    let session = engine.open_session_for(OPENER, SESSION_MS).await.unwrap().session;
    engine.set_state_quota(Some(QUOTA_BYTES / 2)).await.unwrap();
    engine.write(put("plain", "1", 0)).await.unwrap();
    engine.write(put("expiring", "2", TTL_MS)).await.unwrap();
    engine.write_with(put("counted", "3", 0), in_session(session, 1)).await.unwrap();
    engine.write(put("large", &"x".repeat(100_000), 0)).await.unwrap();
    engine.take_snapshot().await.unwrap();
    engine.write_with(put("counted", "4", 0), in_session(session, 2)).await.unwrap();
    let key = Bytes::from_static(b"plain");
    let delete = TxnOp::Delete { collection: "collection".to_owned(), key };
    let txn = KvTxn { tenant: "tenant".to_owned(), compares: vec![], then: vec![delete], otherwise: vec![] };
    engine.write(KvCommand::Txn(txn)).await.unwrap();
    let other = engine.open_session_for("another client", SESSION_MS).await.unwrap().session;
    assert!(engine.close_session(other).await.unwrap().was_open);
    engine.set_state_quota(Some(QUOTA_BYTES)).await.unwrap();
    engine.write(put("after the snapshot", "5", 0)).await.unwrap();
    session
}

async fn value(engine: &Engine<KvMachine>, key: &str) -> Option<(String, u64, bool)> {
    let query = KvQuery::Get {
        tenant: "tenant".to_owned(),
        collection: "collection".to_owned(),
        key: Bytes::from(key.to_owned()),
    };
    let KvAnswer::Item(item) = engine.read(query, ReadLevel::Linearizable).await.unwrap().answer else {
        panic!("a get is answered with an item")
    };
    item.map(|item| (String::from_utf8_lossy(&item.value).into_owned(), item.version, item.expires_ms > 0))
}

fn tar(args: &[&str]) {
    assert!(Command::new("tar").args(args).status().unwrap().success(), "tar {args:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_data_directory_of_every_earlier_version_is_read() {
    let scratch = tempfile::tempdir().unwrap();
    if std::env::var_os("QUORATE_WRITE_FIXTURES").is_some() {
        let data = scratch.path().join("written/data");
        let engine = open(&data).await;
        write_all(&engine).await;
        engine.shutdown().await;
        drop(engine);
        std::fs::remove_file(data.join("reserve")).unwrap();
        let archive = fixtures().join("data-new.tar.gz");
        tar(&["-czf", archive.to_str().unwrap(), "-C", data.parent().unwrap().to_str().unwrap(), "data"]);
    }
    for version in ["data-1", "data-2"] {
        let dir = scratch.path().join(version);
        std::fs::create_dir_all(&dir).unwrap();
        let archive = fixtures().join(format!("{version}.tar.gz"));
        tar(&["-xzf", archive.to_str().unwrap(), "-C", dir.to_str().unwrap()]);
        let engine = open(&dir.join("data")).await;
        // The session is long unused, but no entry has said so yet.
        let report = engine.report();
        assert!(report.sessions.open == 1 && report.sessions.bytes > 0, "{:?}", report.sessions);
        let expect = |text: &str, version, expires| Some((text.to_owned(), version, expires));
        assert_eq!(value(&engine, "plain").await, None);
        assert_eq!(value(&engine, "expiring").await, expect("2", 1, true));
        assert_eq!(value(&engine, "counted").await, expect("4", 2, false));
        assert_eq!(value(&engine, "large").await, expect(&"x".repeat(100_000), 1, false));
        assert_eq!(value(&engine, "after the snapshot").await, expect("5", 1, false));
        assert!(engine.state().snapshot.is_some(), "the fixture holds a snapshot");
        if version != "data-1" {
            let listed = engine.list_sessions(0, 10).await.unwrap().sessions;
            assert_eq!(listed.iter().map(|listed| listed.opener.as_str()).collect::<Vec<_>>(), [OPENER]);
            let quota = (report.state.quota_bytes, report.state.quota_source);
            assert_eq!(quota, (Some(QUOTA_BYTES), Some(QuotaSource::Operator)));
            assert_ne!(engine.history(), HistoryEpoch::UNKNOWN);
        }
        engine.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_in_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let session = write_all(&engine).await;
    engine.shutdown().await;
    drop(engine);
    let engine = open(dir.path()).await;
    for (sequence, version) in [(1, 1), (2, 2)] {
        let again =
            engine.write_with(put("counted", "again", 0), in_session(session, sequence)).await.unwrap();
        assert!(again.repeated, "sequence {sequence}");
        assert!(matches!(again.reply, Some(KvReply::Put { version: found, .. }) if found == version));
    }
    engine.shutdown().await;
}

/// All fields and values by their full names: number and type.
fn names(descriptors: &[u8]) -> BTreeMap<String, String> {
    fn messages(prefix: &str, all: &[DescriptorProto], names: &mut BTreeMap<String, String>) {
        for message in all {
            let name = format!("{prefix}.{}", message.name());
            for field in &message.field {
                let kind = format!(
                    "{} {:?} {:?} {}",
                    field.number(),
                    field.label(),
                    field.r#type(),
                    field.type_name()
                );
                names.insert(format!("{name}.{}", field.name()), kind);
            }
            enums(&name, &message.enum_type, names);
            messages(&name, &message.nested_type, names);
        }
    }
    fn enums(prefix: &str, all: &[EnumDescriptorProto], names: &mut BTreeMap<String, String>) {
        for kind in all {
            for value in &kind.value {
                names
                    .insert(format!("{prefix}.{}.{}", kind.name(), value.name()), value.number().to_string());
            }
        }
    }
    let mut names = BTreeMap::new();
    for file in FileDescriptorSet::decode(descriptors).unwrap().file {
        let package = file.package().to_owned();
        messages(&package, &file.message_type, &mut names);
        enums(&package, &file.enum_type, &mut names);
        for service in &file.service {
            for method in &service.method {
                let (input, output) = (method.input_type(), method.output_type());
                let streams = (method.client_streaming(), method.server_streaming());
                names.insert(
                    format!("{package}.{}.{}", service.name(), method.name()),
                    format!("{input} {output} {streams:?}"),
                );
            }
        }
    }
    names
}

/// Writing the code anew takes forty crates, so that only this is looked at here.
#[test]
fn the_protocol_code_is_that_of_the_definitions() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let sources = std::fs::read_to_string(directory.join("generated/sources.txt")).unwrap();
    assert!(sources.lines().count() >= 7);
    for line in sources.lines() {
        let (name, crc) = line.split_once(' ').unwrap();
        let now = crc32fast::hash(&std::fs::read(directory.join(name)).unwrap());
        assert_eq!(crc, format!("{now:08x}"), "{name} has changed; see proto/src/lib.rs");
    }
}

/// What was once sent keeps its number, its type and its meaning: a node or client of an earlier version is understood.
#[test]
fn the_protocol_is_only_added_to() {
    let now = names(quorate::testkit::proto::DESCRIPTORS);
    if std::env::var_os("QUORATE_WRITE_FIXTURES").is_some() {
        std::fs::write(fixtures().join("protocol-new.bin"), quorate::testkit::proto::DESCRIPTORS).unwrap();
    }
    let earlier = names(&std::fs::read(fixtures().join("protocol-1.bin")).unwrap());
    assert!(earlier.len() > 200, "the fixture holds {} names", earlier.len());
    for (name, what) in &earlier {
        assert_eq!(now.get(name), Some(what), "{name} has changed or is gone");
    }
}
