//! Clients of the simulated cluster, and what they were promised.
//!
//! Writers own their keys and write growing numbers, so a linearizable read has simple bounds: at least
//! the greatest number acknowledged before it began, at most the greatest one tried before it ended.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use quorate::engine::Engine;
use quorate::error::WriteError;
use quorate::machine::kv::{KvAnswer, KvCommand, KvMachine, KvQuery, KvReply};
use quorate::types::{NodeId, ReadLevel};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use crate::Shared;
use crate::trace::Trace;
use crate::world::Engines;

const WRITERS: u64 = 4;
const READERS: u64 = 2;
/// Keys each writer writes again and again.
const REGISTERS: u64 = 3;
/// A call that takes longer has an unknown outcome.
const PATIENCE: Duration = Duration::from_millis(800);

/// What the clients saw.
#[derive(Debug, Default)]
pub struct History {
    /// The greatest acknowledged value of each key.
    pub acknowledged: BTreeMap<String, u64>,
    /// The greatest value tried for each key.
    tried: BTreeMap<String, u64>,
    pub acknowledgements: u64,
    pub unknown: u64,
    pub reads: u64,
    pub violations: Vec<String>,
}

pub struct Workload {
    history: Shared<History>,
    acknowledged: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

#[derive(Clone)]
struct Client {
    id: u64,
    rng: SmallRng,
    engines: Engines,
    trace: Arc<Trace>,
    history: Shared<History>,
    acknowledged: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    leader: Option<NodeId>,
}

impl Workload {
    pub fn start(seed: u64, engines: Engines, trace: Arc<Trace>) -> Self {
        let history = Arc::new(Mutex::new(History::default()));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let client = |id: u64| Client {
            id,
            rng: SmallRng::seed_from_u64(seed.wrapping_mul(1000).wrapping_add(id)),
            engines: engines.clone(),
            trace: trace.clone(),
            history: history.clone(),
            acknowledged: acknowledged.clone(),
            stop: stop.clone(),
            leader: None,
        };
        let mut tasks: Vec<_> = (0..WRITERS).map(|id| tokio::spawn(client(id).write())).collect();
        tasks.extend((0..READERS).map(|id| tokio::spawn(client(WRITERS + id).read())));
        Self { history, acknowledged, stop, tasks }
    }

    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    pub async fn stop(self) -> History {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        std::mem::take(&mut *self.history.lock().unwrap())
    }
}

fn query(key: &str) -> KvQuery {
    KvQuery::Get { tenant: "t".to_owned(), collection: "c".to_owned(), key: Bytes::from(key.to_owned()) }
}

impl Client {
    /// The node last known to lead, else any that runs.
    fn pick(&mut self) -> Option<(NodeId, Engine<KvMachine>)> {
        let engines = self.engines.lock().unwrap();
        if let Some(found) = self.leader.and_then(|id| engines.get(&id).map(|engine| (id, engine.clone()))) {
            return Some(found);
        }
        let running: Vec<NodeId> = engines.keys().copied().collect();
        if running.is_empty() {
            return None;
        }
        let id = running[self.rng.random_range(0..running.len())];
        Some((id, engines[&id].clone()))
    }

    async fn pause(&mut self) {
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(1..60))).await;
    }

    async fn write(mut self) {
        let mut value = 0;
        while !self.stop.load(Ordering::Relaxed) {
            self.pause().await;
            let Some((node, engine)) = self.pick() else { continue };
            value += 1;
            let key = match self.rng.random_bool(0.5) {
                true => format!("register-{}-{}", self.id, self.rng.random_range(0..REGISTERS)),
                false => format!("once-{}-{value}", self.id),
            };
            self.history.lock().unwrap().tried.insert(key.clone(), value);
            let command = KvCommand::Put {
                tenant: "t".to_owned(),
                collection: "c".to_owned(),
                key: Bytes::from(key.clone()),
                value: Bytes::from(value.to_string()),
            };
            let result = tokio::time::timeout(PATIENCE, engine.write(command)).await;
            drop(engine);
            let mut history = self.history.lock().unwrap();
            match result {
                Ok(Ok(written)) => {
                    assert!(matches!(written.reply, KvReply::Put { .. }), "{:?}", written.reply);
                    self.trace.record(format_args!("ok {key}={value} at {}", written.log_id));
                    history.acknowledged.insert(key, value);
                    history.acknowledgements += 1;
                    self.acknowledged.fetch_add(1, Ordering::Relaxed);
                    self.leader = Some(node);
                }
                Ok(Err(error)) => {
                    history.unknown += u64::from(error.maybe_applied());
                    self.leader = match error {
                        WriteError::NotLeader { leader } => leader.map(|leader| leader.node_id),
                        _ => None,
                    };
                }
                Err(_) => {
                    history.unknown += 1;
                    self.leader = None;
                }
            }
        }
    }

    async fn read(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            self.pause().await;
            let Some((_, engine)) = self.pick() else { continue };
            let Some((key, at_least)) = self.known_key() else { continue };
            let result =
                tokio::time::timeout(PATIENCE, engine.read(query(&key), ReadLevel::Linearizable)).await;
            let Ok(Ok(outcome)) = result else {
                self.leader = match result {
                    Ok(Err(quorate::error::ReadError::NotLeader { leader })) => leader.map(|l| l.node_id),
                    _ => None,
                };
                continue;
            };
            let mut history = self.history.lock().unwrap();
            history.reads += 1;
            let found = match outcome.answer {
                KvAnswer::Item(item) => {
                    item.map_or(0, |item| std::str::from_utf8(&item.value).unwrap().parse().unwrap())
                }
                other => panic!("{other:?}"),
            };
            let at_most = history.tried[&key];
            self.trace.record(format_args!("read {key}={found}"));
            if found < at_least || found > at_most {
                let applied = outcome.applied;
                history.violations.push(format!(
                    "read {key}={found} at {applied:?}, but {at_least} was acknowledged before and {at_most} tried last"
                ));
            }
        }
    }

    /// A key somebody has written, and the greatest value acknowledged for it by now.
    fn known_key(&mut self) -> Option<(String, u64)> {
        let history = self.history.lock().unwrap();
        let count = history.acknowledged.len();
        if count == 0 {
            return None;
        }
        let (key, value) = history.acknowledged.iter().nth(self.rng.random_range(0..count))?;
        Some((key.clone(), *value))
    }
}
