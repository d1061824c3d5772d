//! Clients of the simulated cluster, and what they were promised.
//!
//! Writers own their keys and write growing numbers, so a linearizable read has simple bounds: at least
//! the greatest number acknowledged before it began, at most the greatest one tried before it ended. Reads of
//! every other level have bounds of the same kind, and are asked of any node.
//!
//! Counters write one key all together, each write in a session and sent again after every failure until it is
//! acknowledged. A key's version counts the writes applied to it, so no two acknowledgements may carry the
//! same version, and the last version is the number of writes.
//!
//! With [`Anywhere`](quorate::Anywhere) the same clients write through whichever node, and each looks at once whether the node that it
//! called has what it wrote. The keys that are written once tell whether a write was applied twice, or although it was said
//! that it certainly was not.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use quorate::Session;
use quorate::kv::Kv;
use quorate::kv::machine::{KvAnswer, KvCommand, KvMachine, KvReply};
use quorate::{Engine, WriteOptions};
use quorate::{NodeId, ReadLevel, Role};
use quorate::{ReadError, WriteError};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout};

use super::followers::{Followed, follow};
use super::lifetimes::Lifetimes;
use super::writes::{COLLECTION, COUNTER, ONCE, TENANT, Writes, number, query};
use crate::simulation::{Cluster, Engines, LIVENESS, Outcome, SAFETY, Shared, Subject, Trace, Workload};

const WRITERS: u64 = 4;
const READERS: u64 = 3;
const COUNTERS: u64 = 2;
const FOLLOWERS: u64 = 2;
/// Keys each writer writes again and again.
const REGISTERS: u64 = 3;
/// A call that takes longer has an unknown outcome.
const PATIENCE: Duration = Duration::from_millis(800);
/// The same for one of the writers, who therefore soon finds whoever leads instead.
const IMPATIENCE: Duration = Duration::from_millis(50);

/// A node that answers a local read so late has crashed meanwhile, and answers with the last that anybody had read.
const CRASHED: Duration = Duration::from_millis(500);

/// What the clients saw.
#[derive(Debug, Default)]
struct History {
    writes: Writes,
    /// When which value was acknowledged.
    when: BTreeMap<String, Vec<(Instant, u64)>>,
    /// Answers that an earlier attempt had earned.
    repeated: u64,
    /// Reads answered by a node that did not lead.
    follower_reads: u64,
    lease_reads: u64,
    bounded_reads: u64,
    /// Writes and counts that were acknowledged by a node that did not lead.
    passed_on: u64,
    acknowledgements: u64,
    unknown: u64,
    reads: u64,
    violations: Vec<String>,
}

/// Callers that write and read registers and a counter, each node by its handle.
#[derive(Debug, Clone, Copy)]
pub struct Registers {
    /// How they write.
    pub way: Way,
    /// Whether keys and sessions are watched, too, that are to end after a while.
    pub lifetimes: bool,
}

impl Default for Registers {
    fn default() -> Self {
        Self { way: Way { sessions: true, anywhere: false }, lifetimes: false }
    }
}

impl Subject for Registers {
    type Guest = Kv;
    type Workload = Callers;

    fn machine(&self) -> KvMachine {
        KvMachine::default()
    }

    fn start(&self, cluster: &Cluster<KvMachine>) -> Callers {
        let callers = Callers::start(cluster, self.way);
        let lifetimes = self.lifetimes.then(|| Lifetimes::start(cluster.seed, &cluster.engines));
        Callers { lifetimes, ..callers }
    }
}

/// What [`Registers`] has running.
pub struct Callers {
    history: Shared<History>,
    engines: Engines<KvMachine>,
    acknowledged: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    followers: Vec<tokio::task::JoinHandle<Followed>>,
    followed: Mutex<Vec<Followed>>,
    lifetimes: Option<Lifetimes>,
    /// Keys whose end was seen, and uses of a session that was nearly over.
    ended: u64,
    kept: u64,
}

impl fmt::Debug for Callers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callers").field("acknowledged", &self.acknowledged).finish_non_exhaustive()
    }
}

#[derive(Clone)]
struct Client {
    id: u64,
    rng: SmallRng,
    engines: Engines<KvMachine>,
    trace: Arc<Trace>,
    history: Shared<History>,
    acknowledged: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    leader: Option<NodeId>,
    way: Way,
}

/// How clients write.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    /// Sends what is not answered again only in its place in a session.
    pub sessions: bool,
    /// Through any node.
    pub anywhere: bool,
}

impl Callers {
    fn start(cluster: &Cluster<KvMachine>, way: Way) -> Self {
        let history = Arc::new(Mutex::new(History::default()));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let client = |id: u64| Client {
            id,
            rng: SmallRng::seed_from_u64(cluster.seed.wrapping_mul(1000).wrapping_add(id)),
            engines: cluster.engines.clone(),
            trace: cluster.trace.clone(),
            history: history.clone(),
            acknowledged: acknowledged.clone(),
            stop: stop.clone(),
            leader: None,
            way,
        };
        let mut tasks: Vec<_> = (0..WRITERS).map(|id| tokio::spawn(client(id).write())).collect();
        tasks.extend((0..COUNTERS).map(|id| tokio::spawn(client(100 + id).count())));
        tasks.extend((0..READERS).map(|id| tokio::spawn(client(WRITERS + id).read())));
        tasks.push(tokio::spawn(client(WRITERS + READERS).watch_leases()));
        let engines = cluster.engines.clone();
        let following = |id: u64| follow(cluster.seed ^ (id << 32), engines.clone(), stop.clone());
        let followers = (1..=FOLLOWERS).map(|id| tokio::spawn(following(id))).collect();
        Self {
            history,
            engines,
            acknowledged,
            stop,
            tasks,
            followers,
            followed: Mutex::default(),
            lifetimes: None,
            ended: 0,
            kept: 0,
        }
    }
}

impl Workload<KvMachine> for Callers {
    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    async fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks.drain(..) {
            timeout(LIVENESS, task).await.expect("calls end in a healed cluster").unwrap();
        }
        for follower in self.followers.drain(..) {
            let followed =
                timeout(LIVENESS, follower).await.expect("followers end in a healed cluster").unwrap();
            if let Some(violation) = &followed.violation {
                self.history.lock().unwrap().violations.push(violation.clone());
            }
            self.followed.get_mut().unwrap().push(followed);
        }
        if let Some(lifetimes) = self.lifetimes.take() {
            // The time that was lost with all nodes comes on top.
            (self.ended, self.kept) = lifetimes.finish(&self.engines, SAFETY + LIVENESS).await;
        }
    }

    /// Every acknowledged write must be there, on every node, and every counted one exactly once.
    async fn scan(&self, id: NodeId, engine: &Engine<KvMachine>) {
        let history = std::mem::take(&mut *self.history.lock().unwrap());
        history.writes.hold_against(id, engine).await;
        assert!(history.violations.is_empty(), "{}", history.violations.join("\n"));
        *self.history.lock().unwrap() = history;
        let mut followed = std::mem::take(&mut *self.followed.lock().unwrap());
        for follower in &mut followed {
            follower.hold_against(engine).await;
        }
        *self.followed.lock().unwrap() = followed;
    }

    fn count(&self, outcome: &mut Outcome) {
        let history = self.history.lock().unwrap();
        let followed = self.followed.lock().unwrap();
        let sum = |count: fn(&Followed) -> u64| followed.iter().map(count).sum();
        for (what, times) in [
            ("followed events", sum(|followed| followed.events)),
            ("states that followers took", sum(|followed| followed.states)),
            ("moves of followers", sum(|followed| followed.moves)),
            ("acknowledged writes", history.acknowledgements),
            ("writes with an unknown outcome", history.unknown),
            ("reads", history.reads),
            ("exactly-once writes", history.writes.counted.len() as u64),
            ("exactly-once writes that had to be repeated", history.repeated),
            ("linearizable reads on followers", history.follower_reads),
            ("lease reads", history.lease_reads),
            ("bounded reads", history.bounded_reads),
            ("writes acknowledged by followers", history.passed_on),
            ("writes that certainly were not applied", history.writes.refused.len() as u64),
            ("keys that ended", self.ended),
            ("sessions used shortly before their end", self.kept),
        ] {
            outcome.count(what, times);
        }
    }
}

impl Client {
    /// The node last known to lead, else any that runs.
    fn pick(&mut self) -> Option<(NodeId, Engine<KvMachine>)> {
        let engines = self.engines.lock().unwrap();
        if self.way.anywhere {
            self.leader = None;
        }
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
        let patience = if self.id == 0 { IMPATIENCE } else { PATIENCE };
        while !self.stop.load(Ordering::Relaxed) {
            self.pause().await;
            let Some((node, engine)) = self.pick() else { continue };
            value += 1;
            let key = match self.rng.random_bool(0.5) {
                true => format!("register-{}-{}", self.id, self.rng.random_range(0..REGISTERS)),
                false => format!("{ONCE}{}-{value}", self.id),
            };
            self.history.lock().unwrap().writes.tried.insert(key.clone(), value);
            let command = KvCommand::Put {
                tenant: TENANT.to_owned(),
                collection: COLLECTION.to_owned(),
                key: Bytes::from(key.clone()),
                value: Bytes::from(value.to_string()),
            };
            let result = match self.way.anywhere {
                true => {
                    let result = engine.anywhere().within(patience).write(command).await;
                    if result.as_ref().is_ok_and(|written| written.applied_here) {
                        self.expect_here(&engine, &key, value).await;
                    }
                    Ok(result)
                }
                false => tokio::time::timeout(patience, engine.write(command)).await,
            };
            let leads = engine.state().role == Role::Leader;
            drop(engine);
            let mut history = self.history.lock().unwrap();
            match result {
                Ok(Ok(written)) => {
                    history.passed_on += u64::from(!leads);
                    assert!(matches!(written.reply, KvReply::Put { .. }), "{:?}", written.reply);
                    self.trace.record(format_args!("ok {key}={value} at {}", written.log_id));
                    history.when.entry(key.clone()).or_default().push((Instant::now(), value));
                    history.writes.acknowledge(&key, value);
                    history.acknowledgements += 1;
                    self.acknowledged.fetch_add(1, Ordering::Relaxed);
                    self.leader = Some(node);
                }
                Ok(Err(error)) => {
                    history.unknown += u64::from(error.maybe_applied());
                    if !error.maybe_applied() {
                        history.writes.refuse(key, value);
                    }
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

    async fn count(mut self) {
        let mut session: Option<Arc<Session>> = None;
        while !self.stop.load(Ordering::Relaxed) {
            self.pause().await;
            let Some((node, engine)) = self.pick() else { continue };
            let Some(open) = &session else {
                let opened = match self.way.anywhere {
                    true => Ok(engine.anywhere().within(PATIENCE).open_session(Duration::ZERO).await),
                    false => tokio::time::timeout(PATIENCE, engine.open_session(Duration::ZERO)).await,
                };
                self.follow(node, &opened);
                session = opened.ok().and_then(Result::ok);
                continue;
            };
            let ticket = open.begin().expect("one write at a time fits every window");
            // Sent until it is answered, also beyond the end of the run: the cluster is healed by then.
            loop {
                self.pause().await;
                let Some((node, engine)) = self.pick() else { continue };
                let command = KvCommand::Put {
                    tenant: TENANT.to_owned(),
                    collection: COLLECTION.to_owned(),
                    key: Bytes::from(COUNTER),
                    value: Bytes::from(self.id.to_string()),
                };
                let slot = self.way.sessions.then(|| ticket.slot());
                let options = WriteOptions { slot, ..WriteOptions::default() };
                let result = match self.way.anywhere {
                    true => Ok(engine.anywhere().within(PATIENCE).write_with(command, options).await),
                    false => tokio::time::timeout(PATIENCE, engine.write_with(command, options)).await,
                };
                let leads = engine.state().role == Role::Leader;
                self.follow(node, &result);
                if let Ok(Err(error @ WriteError::SessionExpired { .. })) = &result {
                    let id = self.id;
                    let violation =
                        format!("counter {id} uses its session all the time, and was told: {error}");
                    return self.history.lock().unwrap().violations.push(violation);
                }
                let Ok(Ok(written)) = result else { continue };
                let Some(KvReply::Put { version, .. }) = written.reply else { panic!("{:?}", written.reply) };
                self.trace.record(format_args!("counted {version}"));
                let mut history = self.history.lock().unwrap();
                history.repeated += u64::from(written.repeated);
                history.passed_on += u64::from(!leads);
                if !history.writes.counted.insert(version) {
                    history.violations.push(format!("version {version} of the counter was given twice"));
                }
                break;
            }
        }
    }

    /// Whoever wrote through a node reads it there.
    async fn expect_here(&self, engine: &Engine<KvMachine>, key: &str, value: u64) {
        let begun = Instant::now();
        let Ok(read) = engine.read(query(key), ReadLevel::Local).await else { return };
        if begun.elapsed() >= CRASHED {
            return;
        }
        let found = match read.answer {
            KvAnswer::Item(Some(item)) => number(&item.value),
            _ => 0,
        };
        if found < value {
            let node = engine.state().node_id;
            let mut history = self.history.lock().unwrap();
            history.violations.push(format!("node {node} has {key}={found} right after it took {value}"));
        }
    }

    /// Remembers who leads.
    fn follow<T>(&mut self, node: NodeId, result: &Result<Result<T, WriteError>, Elapsed>) {
        self.leader = match result {
            Ok(Ok(_)) => Some(node),
            Ok(Err(WriteError::NotLeader { leader })) => leader.as_ref().map(|leader| leader.node_id),
            Ok(Err(error @ (WriteError::SessionExpired { .. } | WriteError::AnswerForgotten))) => {
                self.history.lock().unwrap().violations.push(error.to_string());
                None
            }
            _ => None,
        };
    }

    async fn read(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            self.pause().await;
            // Any node answers, except for the lease, which only the leader has.
            let level = match self.rng.random_range(0..6) {
                0 => ReadLevel::Lease,
                1 => ReadLevel::Bounded { max_lag_ms: self.rng.random_range(0..400) },
                _ => ReadLevel::Linearizable,
            };
            if level != ReadLevel::Lease {
                self.leader = None;
            }
            let Some((_, engine)) = self.pick() else { continue };
            let Some((key, at_least)) = self.known_key(level) else { continue };
            let result = tokio::time::timeout(PATIENCE, engine.read(query(&key), level)).await;
            let leads = engine.state().role == Role::Leader;
            let Ok(Ok(outcome)) = result else {
                self.leader = match result {
                    Ok(Err(ReadError::NotLeader { leader })) => leader.map(|l| l.node_id),
                    _ => None,
                };
                continue;
            };
            let mut history = self.history.lock().unwrap();
            history.reads += 1;
            match level {
                ReadLevel::Lease => history.lease_reads += 1,
                ReadLevel::Bounded { .. } => history.bounded_reads += 1,
                _ => history.follower_reads += u64::from(!leads),
            }
            let found = match outcome.answer {
                KvAnswer::Item(item) => item.map_or(0, |item| number(&item.value)),
                other => panic!("{other:?}"),
            };
            let at_most = history.writes.tried[&key];
            self.trace.record(format_args!("read {key}={found} {level:?}"));
            if found < at_least || found > at_most {
                let applied = outcome.applied;
                history.violations.push(format!(
                    "{level:?} read {key}={found} at {applied:?}, but {at_least} was acknowledged before and {at_most} tried last"
                ));
            }
        }
    }

    /// Asks every node for what was acknowledged last, again and again: one that takes its lease for longer than it is
    /// shows itself.
    async fn watch_leases(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(5..25))).await;
            let engines = self.engines.lock().unwrap().clone();
            for (node, engine) in engines {
                let Some((key, at_least)) = self.history.lock().unwrap().writes.newest.clone() else { break };
                let read = engine.read(query(&key), ReadLevel::Lease);
                let Ok(Ok(outcome)) = tokio::time::timeout(PATIENCE, read).await else { continue };
                let found = match outcome.answer {
                    KvAnswer::Item(Some(item)) => number(&item.value),
                    _ => 0,
                };
                let mut history = self.history.lock().unwrap();
                history.lease_reads += 1;
                if found < at_least {
                    let applied = outcome.applied;
                    history.violations.push(format!(
                        "by its lease node {node} read {key}={found} at {applied:?}, but {at_least} was acknowledged before"
                    ));
                }
            }
        }
    }

    /// A key somebody has written, and the least value that a read of it at this level may find now.
    fn known_key(&mut self, level: ReadLevel) -> Option<(String, u64)> {
        let history = self.history.lock().unwrap();
        let (key, value) = history.writes.known_key(&mut self.rng, 0.0)?;
        let at_least = match level {
            ReadLevel::Bounded { max_lag_ms } => {
                let settled = |at: &Instant| at.elapsed() > Duration::from_millis(max_lag_ms);
                history.when[&key].iter().filter(|(at, _)| settled(at)).map(|(_, value)| *value).max()
            }
            _ => Some(value),
        };
        Some((key, at_least.unwrap_or(0)))
    }
}
