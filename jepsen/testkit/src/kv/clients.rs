//! Callers that reach the cluster as programs elsewhere do: by the client library, through the client port.
//!
//! What they hold the cluster to is what the client promises:
//!
//! - A write that was acknowledged is there, one that certainly was not applied is not, and none was applied twice.
//! - A linearizable read finds what was acknowledged before it began; a read that is bound to an answer finds what the answer
//!   said.
//! - A [`Once`](quorate::kv::client::Once) that is asked for until it is answered counts exactly one.
//! - A watch tells of every write in its range, once and in order, whatever becomes of its nodes.
//! - A subscription tells every change, once and in order, and what it replaces: a copy that is kept by it has what was written.
//!
//! A register whose last write has an unknown outcome is given up: that write may be applied at any time.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use quorate::client::Reason;
use quorate::kv::client::{Client, ClientError, Range, Scope};
use quorate::kv::machine::KvMachine;
use quorate::kv::{self, Kv};
use quorate::server::Server;
use quorate::{Engine, NodeId, ReadLevel};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::mirror::Mirror;
use super::writes::{COLLECTION, COUNTER, ONCE, TENANT, Writes, number};
use crate::simulation::{Cluster, LIVENESS, Outcome, Shared, Subject, Trace, Workload};

const WRITERS: u64 = 3;
const COUNTERS: u64 = 2;
const READERS: u64 = 2;
/// How long an operation of a client may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// The last of those that are written once.
const LAST: &str = "once-last";

/// Callers that use the key-value machine by its client. To be run with [`ports`](crate::simulation::Scenario::ports).
#[derive(Debug, Clone, Copy, Default)]
pub struct Clients;

impl Subject for Clients {
    type Guest = Kv;
    type Workload = Calling;

    fn machine(&self) -> KvMachine {
        KvMachine::default()
    }

    fn serve(&self, server: Server<Kv>, _: &KvMachine) -> Server<Kv> {
        kv::serve(server)
    }

    fn start(&self, cluster: &Cluster<KvMachine>) -> Calling {
        let history = Arc::new(Mutex::new(History::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let caller = |id: u64, client: &Client| Caller {
            id,
            rng: SmallRng::seed_from_u64(cluster.seed.wrapping_mul(1000).wrapping_add(500 + id)),
            client: client.clone(),
            trace: cluster.trace.clone(),
            history: history.clone(),
            stop: stop.clone(),
        };
        let mut config = cluster.client_config();
        config.timeout = PATIENCE;
        let client = || Client::new(cluster.endpoints(), config.clone()).unwrap();
        let shared = client();
        let mut tasks: Vec<_> = (0..WRITERS).map(|id| tokio::spawn(caller(id, &shared).write())).collect();
        // It repeats what a node says that was certainly not applied, and nothing else.
        let mut once_at_most = config.clone();
        once_at_most.exactly_once = false;
        let without_session = Client::new(cluster.endpoints(), once_at_most).unwrap();
        tasks.push(tokio::spawn(caller(WRITERS, &without_session).write()));
        // Each in a session of its own.
        tasks.extend((10..10 + COUNTERS).map(|id| tokio::spawn(caller(id, &client()).count())));
        tasks.extend((20..20 + READERS).map(|id| tokio::spawn(caller(id, &shared).read())));
        let watching = tokio::spawn(caller(30, &client()).watch());
        let mirroring = tokio::spawn(Mirror::default().follow(client(), caller(40, &shared).rng, LAST));
        let following = Some((watching, mirroring));
        Calling { history, client: shared, stop, tasks, following }
    }
}

/// What the callers saw.
#[derive(Debug, Default)]
struct History {
    writes: Writes,
    /// Where keys that were written once stand in the log.
    revisions: BTreeMap<String, u64>,
    /// Writes of watchers, right after their watch had begun.
    marks: u64,
    acknowledgements: u64,
    unknown: u64,
    repeated: u64,
    reads: u64,
    read_back: u64,
    /// Revisions that no watch was promised: before its beginning, and between two watches.
    unwatched: Vec<(u64, u64)>,
    /// What watches told, in their order.
    told: Vec<(u64, String)>,
    mirror: Mirror,
    violations: Vec<String>,
}

/// What [`Clients`] has running.
pub struct Calling {
    history: Shared<History>,
    client: Client,
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
    /// Those who go on until the last key is written.
    following: Option<(JoinHandle<()>, JoinHandle<Mirror>)>,
}

impl fmt::Debug for Calling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calling").field("client", &self.client).finish_non_exhaustive()
    }
}

impl Workload<KvMachine> for Calling {
    fn acknowledged(&self) -> u64 {
        self.history.lock().unwrap().acknowledgements
    }

    async fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks.drain(..) {
            timeout(LIVENESS, task).await.expect("calls end in a healed cluster").unwrap();
        }
        let all = timeout(LIVENESS, self.all_once()).await.expect("a healed cluster is read");
        // Again and again: a watch that has to begin anew is not told of what was before.
        let (mut watching, mut mirroring) = self.following.take().unwrap();
        let told = timeout(LIVENESS, async {
            loop {
                let _ = self.client.put(&scope(), LAST, "0").await;
                if let Ok(ended) = timeout(PATIENCE, &mut watching).await {
                    return ended.unwrap();
                }
            }
        });
        told.await.expect("watches go on in a healed cluster");
        let mirror =
            timeout(LIVENESS, &mut mirroring).await.expect("a subscription goes on in a healed cluster");
        let mut history = self.history.lock().unwrap();
        history.hold_against_watches(&all);
        history.mirror = mirror.unwrap();
        history.mirror.hold_against(&all);
        let violations = std::mem::take(&mut history.mirror.violations);
        history.violations.extend(violations);
    }

    async fn scan(&self, node_id: NodeId, engine: &Engine<KvMachine>) {
        let history = std::mem::take(&mut *self.history.lock().unwrap());
        history.writes.hold_against(node_id, engine).await;
        assert!(history.violations.is_empty(), "{}", history.violations.join("\n"));
        *self.history.lock().unwrap() = history;
    }

    fn count(&self, outcome: &mut Outcome) {
        let history = self.history.lock().unwrap();
        for (what, times) in [
            ("acknowledged writes", history.acknowledgements),
            ("writes with an unknown outcome", history.unknown),
            ("writes that certainly were not applied", history.writes.refused.len() as u64),
            ("reads", history.reads),
            ("reads of what was just written", history.read_back),
            ("exactly-once writes", history.writes.counted.len() as u64),
            ("exactly-once writes that had to be repeated", history.repeated),
            ("watched changes", history.told.len() as u64),
            ("mirrored changes", history.mirror.changes),
            ("mirrored changes that told the value before", history.mirror.previous),
            ("states that were mirrored", history.mirror.states),
            ("subscriptions of a mirror", history.mirror.subscriptions),
            ("writes after the beginning of a watch", history.marks),
            ("watches that were too late", history.unwatched.len().saturating_sub(1) as u64),
        ] {
            outcome.count(what, times);
        }
    }
}

impl Calling {
    /// All keys that were written once, and at which revision, whether their writers know it or not.
    async fn all_once(&self) -> BTreeMap<String, u64> {
        loop {
            let range = Range::prefix(Bytes::from_static(ONCE.as_bytes()));
            let Ok(mut items) = self.client.range_stream(&scope(), range, ReadLevel::Linearizable).await
            else {
                continue;
            };
            let mut all = BTreeMap::new();
            while let Some(item) = items.next().await {
                let Ok(item) = item else { break };
                all.insert(String::from_utf8(item.key.to_vec()).unwrap(), item.mod_revision);
            }
            let acknowledged = &self.history.lock().unwrap().revisions;
            if acknowledged.iter().all(|(key, revision)| all.get(key) == Some(revision)) {
                return all;
            }
        }
    }
}

impl History {
    /// Every write in the range must have been told, once and in order, but where no watch was promised to tell it.
    fn hold_against_watches(&mut self, all: &BTreeMap<String, u64>) {
        let mut violations = Vec::new();
        let mut seen = BTreeSet::new();
        for pair in self.told.windows(2) {
            // Each is a write of its own.
            if pair[0].0 >= pair[1].0 {
                violations.push(format!("watches told of {:?} before {:?}", pair[0], pair[1]));
            }
        }
        for (revision, key) in &self.told {
            if !seen.insert(key.clone()) {
                violations.push(format!("watches told twice of {key}, which was written at {revision}"));
            }
            if self.writes.refused.contains(key) {
                violations.push(format!("watches told of {key}, which certainly was not written"));
            }
            if all.get(key) != Some(revision) {
                let stands = all.get(key);
                violations.push(format!("watches told of {key} at {revision}, and it stands at {stands:?}"));
            }
        }
        for (key, revision) in all {
            let promised = !self.unwatched.iter().any(|(from, to)| (from..=to).contains(&revision));
            if promised && !seen.contains(key) {
                violations.push(format!("watches did not tell of {key}, which was written at {revision}"));
            }
        }
        self.violations.extend(violations);
    }
}

fn scope() -> Scope {
    Scope { tenant: TENANT.to_owned(), collection: COLLECTION.to_owned() }
}

struct Caller {
    id: u64,
    rng: SmallRng,
    client: Client,
    trace: Arc<Trace>,
    history: Shared<History>,
    stop: Arc<AtomicBool>,
}

impl Caller {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    async fn pause(&mut self) {
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(1..60))).await;
    }

    fn violates(&self, what: String) {
        self.history.lock().unwrap().violations.push(what);
    }

    async fn write(mut self) {
        let (mut value, mut given_up) = (0, 0);
        while self.goes_on() {
            self.pause().await;
            value += 1;
            let key = match self.rng.random_bool(0.4) {
                true => format!("register-{}-{given_up}", self.id),
                false => format!("{ONCE}{}-{value}", self.id),
            };
            self.history.lock().unwrap().writes.tried.insert(key.clone(), value);
            let reply = self.client.put(&scope(), key.clone(), value.to_string()).await;
            match reply {
                Ok(reply) => {
                    self.acknowledged(&key, value, reply.revision);
                    self.read_back(&key, value, reply.header.then_read(ReadLevel::Local)).await;
                }
                Err(error) => {
                    self.judge("a write", &error);
                    let (unknown, is_once) = (error.maybe_applied(), key.starts_with(ONCE));
                    self.trace.record(format_args!("failed {key}={value}, unknown: {unknown}"));
                    given_up += u64::from(unknown && !is_once);
                    let mut history = self.history.lock().unwrap();
                    history.unknown += u64::from(unknown);
                    if !unknown {
                        history.writes.refuse(key, value);
                    }
                }
            }
        }
    }

    fn acknowledged(&self, key: &str, value: u64, revision: u64) {
        self.trace.record(format_args!("ok {key}={value} at {revision}"));
        let mut history = self.history.lock().unwrap();
        history.acknowledgements += 1;
        history.writes.acknowledge(key, value);
        if key.starts_with(ONCE) {
            history.revisions.insert(key.to_owned(), revision);
        }
    }

    /// Whoever has written reads what was written, at any node.
    async fn read_back(&self, key: &str, value: u64, read: quorate::ReadOptions) {
        let reply = match self.client.get(&scope(), key.to_owned(), read).await {
            Ok(reply) => reply,
            Err(error) => return self.judge("a read of what was just written", &error),
        };
        self.history.lock().unwrap().read_back += 1;
        let found = reply.item.map_or(0, |item| number(&item.value));
        if found < value {
            self.violates(format!("{key}={found} was read after the answer to {value}"));
        }
    }

    async fn count(mut self) {
        while self.goes_on() {
            self.pause().await;
            let Ok(mut once) = self.client.once().await else { continue };
            let mut attempts = 0;
            // Asked for until it is answered, also beyond the end of the run: the cluster is healed by then.
            let version = loop {
                attempts += 1;
                match once.put(&scope(), COUNTER, self.id.to_string()).await {
                    Ok(reply) => break reply.version,
                    Err(error) if error.is_final() => {
                        self.violates(format!("an increment ends with {error}"));
                        return;
                    }
                    Err(_) => self.pause().await,
                }
            };
            self.trace.record(format_args!("counted {version}"));
            let mut history = self.history.lock().unwrap();
            history.repeated += u64::from(attempts > 1);
            if !history.writes.counted.insert(version) {
                history.violations.push(format!("version {version} of the counter was given twice"));
            }
        }
    }

    async fn read(mut self) {
        while self.goes_on() {
            self.pause().await;
            let known = self.history.lock().unwrap().writes.known_key(&mut self.rng, 0.6);
            let Some((key, at_least)) = known else { continue };
            let level = if self.rng.random_bool(0.7) { ReadLevel::Linearizable } else { ReadLevel::Lease };
            let reply = match self.client.get(&scope(), key.clone(), level).await {
                Ok(reply) => reply,
                Err(error) => {
                    self.judge("a read", &error);
                    continue;
                }
            };
            let found = reply.item.map_or(0, |item| number(&item.value));
            self.trace.record(format_args!("read {key}={found} {level:?}"));
            let mut history = self.history.lock().unwrap();
            history.reads += 1;
            let at_most = history.writes.tried[&key];
            if history.writes.refused_values.contains(&(key.clone(), found)) {
                history
                    .violations
                    .push(format!("{level:?} read {key}={found}, which certainly was not applied"));
            }
            if found < at_least || found > at_most {
                history.violations.push(format!(
                    "{level:?} read {key}={found}, but {at_least} was acknowledged before and {at_most} tried last"
                ));
            }
        }
    }

    /// A call may fail for what happens to the cluster, and for nothing else.
    fn judge(&self, what: &str, error: &ClientError) {
        if !is_for_the_weather(error) {
            self.violates(format!("{what} fails with {error}"));
        }
    }

    /// Watches until the last key is told of.
    async fn watch(self) {
        let prefix = Range::prefix(Bytes::from_static(ONCE.as_bytes()));
        let (mut told_until, mut begun) = (0, 0);
        loop {
            let Ok(mut watch) = self.client.watch(&scope(), prefix.clone(), None).await else { continue };
            let from = watch.resume_from().index;
            self.history.lock().unwrap().unwatched.push((told_until + 1, from - 1));
            // Begun after the watch, so it is to be told.
            begun += 1;
            self.mark(&format!("{ONCE}mark-{begun}"), from).await;
            let mut has_told = false;
            while let Some(event) = watch.next().await {
                let event = match event {
                    Ok(event) => event,
                    Err(error) => {
                        self.trace.record(format_args!("a watch ends"));
                        told_until = watch.resume_from().index - 1;
                        self.judge_end(has_told, &error);
                        break;
                    }
                };
                has_told = true;
                let key = String::from_utf8(event.item.key.to_vec()).unwrap();
                self.trace.record(format_args!("told of {key} at {}", event.revision));
                if key == LAST {
                    return;
                }
                self.history.lock().unwrap().told.push((event.revision, key));
            }
        }
    }

    /// Writes a key that a watch from `from` on must be told of.
    async fn mark(&self, key: &str, from: u64) {
        let Ok(reply) = self.client.put(&scope(), key.to_owned(), "0").await else { return };
        if reply.revision < from {
            let at = reply.revision;
            self.violates(format!("a watch begins at {from}, after {key}, which was written later, at {at}"));
        }
        let mut history = self.history.lock().unwrap();
        history.marks += 1;
        history.revisions.insert(key.to_owned(), reply.revision);
    }

    /// A watch that has told of anything ends only where no node's history reaches back to.
    fn judge_end(&self, has_told: bool, error: &ClientError) {
        let unheard = matches!(error, ClientError::Unavailable { .. } | ClientError::DeadlineExceeded { .. })
            && !has_told;
        if !unheard && !matches!(error, ClientError::Compacted { .. }) {
            self.violates(format!("a watch ends with {error}"));
        }
    }
}

/// Whether a call may fail like this where nodes fail, and connections to them: not for what it is, nor for a fault of a node.
pub(crate) fn is_for_the_weather(error: &ClientError) -> bool {
    let of_itself = matches!(error, ClientError::Rejected { .. } | ClientError::Unreadable { .. });
    !of_itself && ![Reason::Unspecified, Reason::Invalid, Reason::Diverged].contains(&error.reason())
}
