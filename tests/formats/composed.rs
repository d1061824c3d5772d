//! Directories of one machine, opened by a composition, and what a composition writes itself.

use std::io::{self, Read, Write};
use std::path::Path;

use quorate::WriteOptions;
use quorate::kv::machine::{KvAnswer, KvMachine, KvQuery};
use quorate::{ApplyContext, Engine, EngineConfig, StateMachine};
use quorate::{Composed, DecodeError, Either, decode};
use quorate::{MachineVersion, ReadLevel, SessionSlot};
use serde::{Deserialize, Serialize};

use super::{CLUSTER, DEADLINE, OPENER, fixtures, in_session, put, tar};

/// A list of words. Version 1 had single letters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Words(Vec<String>);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Word {
    Say(String),
}

impl StateMachine for Words {
    type Command = Word;
    type Reply = u64;
    type Query = ();
    type Answer = Vec<String>;
    type View = Vec<String>;

    const VERSION: u32 = 2;
    const OLDEST_VERSION: u32 = 1;

    fn decode_command(version: u32, encoded: &[u8]) -> Result<Word, DecodeError> {
        match version {
            1 => decode::<char>(encoded).map(|letter| Word::Say(letter.to_string())),
            _ => decode(encoded),
        }
    }

    fn apply(&mut self, _: &ApplyContext, Word::Say(word): Word) -> u64 {
        self.0.push(word);
        self.0.len() as u64
    }

    fn view(&self) -> Vec<String> {
        self.0.clone()
    }

    fn query(view: &Vec<String>, (): ()) -> Vec<String> {
        view.clone()
    }

    fn write_snapshot(view: &Vec<String>, out: &mut dyn Write) -> io::Result<()> {
        serde_json::to_writer(out, view).map_err(io::Error::other)
    }

    fn read_snapshot(version: u32, input: &mut dyn Read) -> io::Result<Self> {
        assert_eq!(version, 2);
        serde_json::from_reader(input).map(Self).map_err(io::Error::other)
    }
}

type Both = Composed<KvMachine, Words, 3>;

async fn open<M: StateMachine>(dir: &Path, machine: M) -> Result<Engine<M>, String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut config = EngineConfig::new(1, dir, listener.local_addr().unwrap().to_string());
    config.cluster = CLUSTER.to_owned();
    config.peer_listener = Some(listener);
    let engine = Engine::open(config, machine).await.map_err(|error| error.to_string())?;
    assert!(engine.ready(DEADLINE).await);
    Ok(engine)
}

fn say(word: &str) -> Either<quorate::kv::machine::KvCommand, Word> {
    Either::Added(Word::Say(word.to_owned()))
}

async fn words(engine: &Engine<Both>) -> Vec<String> {
    let answer = engine.read(Either::Added(()), ReadLevel::Linearizable).await.unwrap().answer;
    answer.added().unwrap()
}

async fn value(engine: &Engine<Both>, key: &str) -> Option<String> {
    let (tenant, collection) = ("tenant".to_owned(), "collection".to_owned());
    let query = KvQuery::Get { tenant, collection, key: key.to_owned().into() };
    let answer = engine.read(Either::Base(query), ReadLevel::Linearizable).await.unwrap().answer;
    let Some(KvAnswer::Item(item)) = answer.base() else { panic!("a get is answered with an item") };
    item.map(|item| String::from_utf8_lossy(&item.value).into_owned())
}

fn unpacked(archive: &str, into: &Path) -> std::path::PathBuf {
    std::fs::create_dir_all(into).unwrap();
    tar(&["-xzf", fixtures().join(archive).to_str().unwrap(), "-C", into.to_str().unwrap()]);
    into.join("data")
}

/// A machine is added to a cluster whose log and snapshots know nothing of numbers and versions.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_added_to_the_data_directories_of_one() {
    let scratch = tempfile::tempdir().unwrap();
    for archive in ["data-1.tar.gz", "data-2.tar.gz"] {
        let data = unpacked(archive, &scratch.path().join(archive));
        let engine = open(&data, Both::default()).await.unwrap();
        assert_eq!(value(&engine, "counted").await.as_deref(), Some("4"));
        assert_eq!(value(&engine, "after the snapshot").await.as_deref(), Some("5"));
        assert_eq!(words(&engine).await, [""; 0]);
        // What a session was answered before is answered again.
        let session =
            engine.list_sessions(0, 10).await.unwrap().sessions.first().map(|listed| listed.session);
        engine.write(say("one")).await.unwrap();
        assert_eq!(engine.agreed_versions(), [MachineVersion { machine: 3, version: 2 }]);
        if let Some(session) = session {
            let again =
                engine.write_with(Either::Base(put("counted", "again", 0)), in_session(session, 2)).await;
            // It is long unused: an entry with the time has ended it, unless it was just in time.
            assert!(again.is_err() || again.unwrap().repeated);
        }
        engine.take_snapshot().await.unwrap();
        engine.write(say("two")).await.unwrap();
        engine.write(Either::Base(put("plain", "again", 0))).await.unwrap();
        engine.shutdown().await;
        drop(engine);
        let engine = open(&data, Both::default()).await.unwrap();
        assert_eq!(words(&engine).await, ["one", "two"]);
        assert_eq!(value(&engine, "plain").await.as_deref(), Some("again"));
        assert_eq!(value(&engine, "large").await.map(|large| large.len()), Some(100_000));
        engine.shutdown().await;
        drop(engine);
        // The build before is told what it lacks.
        let refused = open(&data, KvMachine::default()).await.unwrap_err();
        assert!(
            refused.contains("of machine 3, which this build does not have: upgrade this node"),
            "{refused}"
        );
        assert!(refused.contains("untouched") && !refused.contains("corrupt"), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_composition_wrote_is_read() {
    let scratch = tempfile::tempdir().unwrap();
    if std::env::var_os("QUORATE_WRITE_FIXTURES").is_some() {
        let data = scratch.path().join("written/data");
        let engine = open(&data, Both::default()).await.unwrap();
        engine.write(say("before")).await.unwrap();
        engine.write(Either::Base(put("key", "before", 0))).await.unwrap();
        engine.take_snapshot().await.unwrap();
        let session = engine.open_session_for(OPENER, 24 * 3_600_000).await.unwrap().session;
        engine.write_with(say("after"), in_session(session, 1)).await.unwrap();
        engine.write(Either::Base(put("key", "after", 0))).await.unwrap();
        engine.shutdown().await;
        drop(engine);
        std::fs::remove_file(data.join("reserve")).unwrap();
        let archive = fixtures().join("composed-new.tar.gz");
        tar(&["-czf", archive.to_str().unwrap(), "-C", data.parent().unwrap().to_str().unwrap(), "data"]);
    }
    let data = unpacked("composed-1.tar.gz", scratch.path());
    let engine = open(&data, Both::default()).await.unwrap();
    // No time has passed for a node that was stopped.
    let session = engine.list_sessions(0, 10).await.unwrap().sessions[0].session;
    assert_eq!(words(&engine).await, ["before", "after"]);
    assert_eq!(value(&engine, "key").await.as_deref(), Some("after"));
    let slot = Some(SessionSlot { session, sequence: 1, first_unanswered: 1 });
    let again =
        engine.write_with(say("again"), WriteOptions { slot, ..WriteOptions::default() }).await.unwrap();
    assert!(again.repeated);
    assert_eq!(again.reply, Some(Either::Added(2)));
    engine.shutdown().await;
}
