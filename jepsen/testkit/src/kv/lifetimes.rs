//! Keys and sessions that end: never early, whatever wall clocks and leaders do, and in the end all of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use quorate::ReadLevel;
use quorate::WriteError;
use quorate::kv::machine::{Item, KvAnswer, KvCommand, KvMachine, KvQuery};
use quorate::{Engine, WriteOptions};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::time::{Instant, timeout};

use crate::simulation::{Engines, Shared};

/// A call that takes longer has an unknown outcome.
const PATIENCE: Duration = Duration::from_millis(800);
/// Keys that are watched at a time.
const KEYS: usize = 12;
/// The shortest time to live that a session can have.
const SESSION_TTL: Duration = Duration::from_secs(10);

/// What was seen.
#[derive(Debug, Default)]
struct Seen {
    /// Keys that were there, and then were not.
    ended: u64,
    /// Uses of a session that had been unused for more than half of its time.
    kept: u64,
    /// Keys that may still be there: when the call that wrote each began, and its time to live.
    present: BTreeMap<String, (Instant, Duration)>,
    violations: Vec<String>,
}

pub(super) struct Lifetimes {
    seen: Shared<Seen>,
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// Writes a key that is to end after `ttl`.
pub fn put(key: &str, ttl: Duration) -> KvCommand {
    KvCommand::PutExpiring {
        tenant: "t".to_owned(),
        collection: "lifetimes".to_owned(),
        key: Bytes::from(key.to_owned()),
        value: Bytes::from_static(b"v"),
        ttl_ms: u64::try_from(ttl.as_millis()).unwrap(),
    }
}

/// The key, by a linearizable read; `None` when nobody answers in time.
pub async fn get(engine: &Engine<KvMachine>, key: &str) -> Option<Option<Item>> {
    let (tenant, collection) = ("t".to_owned(), "lifetimes".to_owned());
    let query = KvQuery::Get { tenant, collection, key: Bytes::from(key.to_owned()) };
    let outcome = timeout(PATIENCE, engine.read(query, ReadLevel::Linearizable)).await.ok()?.ok()?;
    match outcome.answer {
        KvAnswer::Item(item) => Some(item),
        other => panic!("{other:?}"),
    }
}

impl Lifetimes {
    pub(super) fn start(seed: u64, engines: &Engines<KvMachine>) -> Self {
        let (seen, stop) = (Arc::new(Mutex::new(Seen::default())), Arc::new(AtomicBool::new(false)));
        let client = |id: u64| Client {
            rng: SmallRng::seed_from_u64(seed ^ (0x006c_6966_6500 + id)),
            engines: engines.clone(),
            seen: seen.clone(),
            stop: stop.clone(),
        };
        let tasks = vec![tokio::spawn(client(0).keys()), tokio::spawn(client(1).session())];
        Self { seen, stop, tasks }
    }

    /// Ends the clients, and waits until no key is left. The cluster is healed.
    pub(super) async fn finish(self, engines: &Engines<KvMachine>, patience: Duration) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        let Seen { mut ended, kept, present, violations } = std::mem::take(&mut *self.seen.lock().unwrap());
        assert!(violations.is_empty(), "{}", violations.join("\n"));
        let deadline = Instant::now() + patience;
        for (key, (began, ttl)) in present {
            loop {
                let any = engines.lock().unwrap().values().next().cloned().unwrap();
                if get(&any, &key).await == Some(None) {
                    break;
                }
                assert!(Instant::now() < deadline, "{key} of {ttl:?} is there {:?} later", began.elapsed());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            assert!(began.elapsed() >= ttl, "{key} is gone after {:?} of {ttl:?}", began.elapsed());
            ended += 1;
        }
        (ended, kept)
    }
}

struct Client {
    rng: SmallRng,
    engines: Engines<KvMachine>,
    seen: Shared<Seen>,
    stop: Arc<AtomicBool>,
}

impl Client {
    fn any(&mut self) -> Option<Engine<KvMachine>> {
        let engines = self.engines.lock().unwrap();
        let count = engines.len();
        (count > 0).then(|| engines.values().nth(self.rng.random_range(0..count)).unwrap().clone())
    }

    async fn keys(mut self) {
        let mut number = 0;
        while !self.stop.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(5..40))).await;
            let Some(engine) = self.any() else { continue };
            let present: Vec<_> = self.seen.lock().unwrap().present.clone().into_iter().collect();
            if present.len() < KEYS && self.rng.random_bool(0.5) {
                number += 1;
                let key = format!("key-{number}");
                let (began, ttl) = (Instant::now(), Duration::from_millis(self.rng.random_range(100..4000)));
                if let Ok(Ok(_)) = timeout(PATIENCE, engine.write(put(&key, ttl))).await {
                    self.seen.lock().unwrap().present.insert(key, (began, ttl));
                }
            } else if !present.is_empty() {
                let (key, (began, ttl)) = &present[self.rng.random_range(0..present.len())];
                if get(&engine, key).await == Some(None) {
                    let (mut seen, lived) = (self.seen.lock().unwrap(), began.elapsed());
                    seen.present.remove(key);
                    seen.ended += 1;
                    if lived < *ttl {
                        seen.violations
                            .push(format!("{key} was to live for {ttl:?}, and is gone after {lived:?}"));
                    }
                }
            }
        }
    }

    /// Uses a session just often enough.
    async fn session(mut self) {
        let mut session = None;
        let mut used: Option<Instant> = None;
        while !self.stop.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(5..40))).await;
            let Some(engine) = self.any() else { continue };
            let Some(open) = &session else {
                let began = Instant::now();
                if let Ok(Ok(opened)) = timeout(PATIENCE, engine.open_session(SESSION_TTL)).await {
                    (session, used) = (Some(opened), Some(began));
                }
                continue;
            };
            let unused = used.map_or(Duration::ZERO, |used| used.elapsed());
            if unused < SESSION_TTL * 6 / 10 {
                continue;
            }
            let ticket = open.begin().unwrap();
            let options = WriteOptions { slot: Some(ticket.slot()), ..WriteOptions::default() };
            let began = Instant::now();
            let write = engine.write_with(put("session", Duration::from_secs(60)), options);
            match timeout(PATIENCE, write).await {
                Ok(Ok(_)) => {
                    used = Some(began);
                    self.seen.lock().unwrap().kept += 1;
                }
                Ok(Err(WriteError::SessionExpired { .. })) => {
                    let unused = used.map_or(Duration::ZERO, |used| used.elapsed());
                    if unused < SESSION_TTL {
                        let violation = format!("a session of {SESSION_TTL:?} is gone after {unused:?}");
                        self.seen.lock().unwrap().violations.push(violation);
                    }
                    (session, used) = (None, None);
                }
                _ => {}
            }
        }
    }
}
