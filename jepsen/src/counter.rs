//! The exactly-once counter: concurrent callers increment one key, and send every increment again after whatever
//! error until it is acknowledged, while leaders are killed and paused.
//!
//! A key's version counts the writes applied to it. An increment is a write, so the last version must be the number
//! of increments, on every node, and the acknowledgements must carry every version up to it, each once. A write
//! that was lost, applied twice, or answered as somebody else's breaks one of the two.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quorate::kv::client::{Client, ClientConfig, Scope};
use quorate_cluster::{Cluster, ClusterSpec};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use tokio::task::JoinSet;

use crate::verdict::Verdict;
use quorate_testkit::processes::observe;
use quorate_testkit::processes::set::Reading;

/// The key that all callers write.
const KEY: &str = "counter";
/// For each thing that is waited for.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long a node may take to stop at the end.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// How long a call may take before its caller is told of it and calls again: short, so that it happens.
const CALL_TIMEOUT: Duration = Duration::from_millis(700);
/// How long a paused leader stays so.
const PAUSE_MS: std::ops::RangeInclusive<u64> = 300..=1500;
/// Callers that share a client, and with it a session.
const CALLERS_PER_CLIENT: u32 = 4;

/// What a run is made of.
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct Config {
    /// Number of nodes
    #[arg(long, default_value_t = 3)]
    pub(crate) nodes: u64,
    /// Increments in all
    #[arg(long, default_value_t = 10_000)]
    pub(crate) increments: u64,
    /// Concurrent callers
    #[arg(long, default_value_t = 16)]
    pub(crate) callers: u32,
    /// Faults, spread over the increments; every second one kills the leader, the others pause it
    #[arg(long, default_value_t = 6)]
    pub(crate) faults: u32,
    /// Runs, one after the other, each on a cluster of its own
    #[arg(long, default_value_t = 1)]
    pub(crate) runs: u32,
    /// Decides where among the increments the faults come, and how long a pause is [default: random]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
}

/// One run, as `results.json` tells it.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    pub(crate) verdict: Verdict,
    seed: u64,
    /// Why the verdict is not valid.
    reasons: Vec<String>,
    increments: u64,
    /// The counter on each node in the end.
    counters: BTreeMap<u64, u64>,
    /// Calls that ended in an error and were made again, by what the error began with.
    errors: BTreeMap<String, u64>,
    /// Acknowledgements that an earlier attempt had earned.
    repeated: u64,
    faults: Vec<Fault>,
    duration_ms: u64,
}

#[derive(Debug, Serialize)]
struct Fault {
    at_ms: u64,
    kind: &'static str,
    node_id: u64,
    term: u64,
    next_node_id: u64,
    next_term: u64,
}

/// What the callers saw.
#[derive(Debug, Default)]
struct Seen {
    versions: Vec<u64>,
    errors: BTreeMap<String, u64>,
    repeated: u64,
    final_errors: Vec<String>,
}

/// Makes one run.
///
/// # Errors
/// When the cluster cannot be started. What goes wrong after that is a verdict.
pub(crate) async fn run(
    config: &Config,
    seed: u64,
    binary: &Path,
    data_dir: &Path,
) -> anyhow::Result<Results> {
    let mut spec = ClusterSpec::new(binary, data_dir).with_free_ports()?;
    spec.nodes = config.nodes;
    let cluster = Cluster::start(spec)?;
    cluster.wait_ready(DEADLINE)?;
    let began = Instant::now();
    let done = Arc::new(AtomicU64::new(0));
    let taken = Arc::new(AtomicU64::new(0));
    let mut callers = JoinSet::new();
    let mut client = None;
    for caller in 0..config.callers {
        if caller % CALLERS_PER_CLIENT == 0 {
            let mut client_config = ClientConfig::default();
            client_config.timeout = CALL_TIMEOUT;
            client = Some(Client::new(cluster.endpoints(), client_config)?);
        }
        let Some(client) = client.clone() else { continue };
        callers.spawn(increment(client, caller, config.increments, taken.clone(), done.clone()));
    }

    let observer = Client::new(cluster.endpoints(), ClientConfig::default())?;
    let mut faults = Vec::new();
    let mut reasons = Vec::new();
    let rng = SmallRng::seed_from_u64(seed);
    let nemesis = Nemesis { cluster: &cluster, observer: &observer, rng, began };
    if let Err(why) = nemesis.inject(config, &done, &mut faults).await {
        reasons.push(why);
    }
    let seen = match tokio::time::timeout(DEADLINE, callers.join_all()).await {
        Ok(all) => all.into_iter().fold(Seen::default(), Seen::with),
        Err(_) => {
            reasons.push(format!("the callers did not end: {} increments", done.load(Ordering::Relaxed)));
            Seen::default()
        }
    };
    let readings = observe::converged(&observer, DEADLINE).await.unwrap_or_else(|why| {
        reasons.push(why);
        Vec::new()
    });
    let wrong = check(config.increments, &seen, &readings);
    let verdict = match (wrong.is_empty(), reasons.is_empty()) {
        (false, _) => Verdict::Invalid,
        (true, false) => Verdict::Unknown,
        (true, true) => Verdict::Valid,
    };
    reasons.extend(wrong);
    let counters = readings.iter().map(|reading| (reading.node_id, counter(reading))).collect();
    // A node that does not stop in order is killed with the cluster; the verdict stands.
    let _ = cluster.stop(&[], STOP_DEADLINE);
    Ok(Results {
        verdict,
        seed,
        reasons,
        increments: config.increments,
        counters,
        errors: seen.errors,
        repeated: seen.repeated,
        faults,
        duration_ms: millis(began.elapsed()),
    })
}

impl Seen {
    fn with(mut self, other: Self) -> Self {
        self.versions.extend(other.versions);
        self.repeated += other.repeated;
        self.final_errors.extend(other.final_errors);
        for (error, count) in other.errors {
            *self.errors.entry(error).or_default() += count;
        }
        self
    }

    fn note(&mut self, error: &impl ToString) {
        // Without addresses and figures, which differ from call to call.
        let text = error.to_string();
        let kind: String = text
            .rsplit_once(": ")
            .map_or(&*text, |(_, last)| last)
            .chars()
            .filter(|c| !c.is_ascii_digit())
            .take(80)
            .collect();
        *self.errors.entry(kind).or_default() += 1;
    }
}

/// Increments until all increments are taken.
async fn increment(
    client: Client,
    caller: u32,
    increments: u64,
    taken: Arc<AtomicU64>,
    done: Arc<AtomicU64>,
) -> Seen {
    let mut seen = Seen::default();
    while taken.fetch_add(1, Ordering::Relaxed) < increments {
        let mut once = loop {
            match client.once().await {
                Ok(once) => break once,
                Err(error) => seen.note(&error),
            }
        };
        loop {
            match once.put(&Scope::default(), KEY, caller.to_string()).await {
                Ok(reply) => {
                    seen.versions.push(reply.version);
                    seen.repeated += u64::from(reply.header.repeated_write);
                    break;
                }
                Err(error) if error.is_final() => {
                    seen.final_errors.push(error.to_string());
                    break;
                }
                Err(error) => seen.note(&error),
            }
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
    seen
}

fn counter(reading: &Reading) -> u64 {
    reading.items.get(KEY).map_or(0, |item| item.writes)
}

/// What is wrong; nothing if the list is empty.
fn check(increments: u64, seen: &Seen, readings: &[Reading]) -> Vec<String> {
    let mut wrong = seen.final_errors.clone();
    for reading in readings {
        let counter = counter(reading);
        if counter != increments {
            wrong.push(format!("node {} counts {counter}, not {increments}", reading.node_id));
        }
    }
    let hashes: BTreeSet<u64> = readings.iter().map(|reading| reading.state_hash).collect();
    if hashes.len() > 1 {
        wrong.push("the nodes hold different states".to_owned());
    }
    let mut versions = seen.versions.clone();
    versions.sort_unstable();
    if !versions.iter().copied().eq(1..=increments) {
        let distinct: BTreeSet<u64> = versions.iter().copied().collect();
        wrong.push(format!(
            "{} acknowledgements carry {} versions, instead of 1 to {increments}",
            versions.len(),
            distinct.len()
        ));
    }
    wrong
}

struct Nemesis<'a> {
    cluster: &'a Cluster,
    observer: &'a Client,
    rng: SmallRng,
    began: Instant,
}

impl Nemesis<'_> {
    async fn inject(
        mut self,
        config: &Config,
        done: &AtomicU64,
        faults: &mut Vec<Fault>,
    ) -> Result<(), String> {
        let stride = config.increments / u64::from(config.faults + 1).max(1);
        for number in 0..config.faults {
            let target = stride * u64::from(number) + self.rng.random_range(stride / 2..=stride);
            self.wait_for(done, target).await?;
            faults.push(self.strike(number % 2 == 0).await?);
        }
        Ok(())
    }

    async fn wait_for(&self, done: &AtomicU64, target: u64) -> Result<(), String> {
        let (mut last, mut since) = (done.load(Ordering::Relaxed), Instant::now());
        loop {
            let now = done.load(Ordering::Relaxed);
            if now >= target {
                return Ok(());
            }
            if now > last {
                (last, since) = (now, Instant::now());
            }
            if since.elapsed() > DEADLINE {
                return Err(format!("no progress at {now} increments"));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Kills or pauses the leader, and brings it back once another one leads.
    async fn strike(&mut self, kill: bool) -> Result<Fault, String> {
        let leader = observe::leader(self.observer, 0, DEADLINE).await.ok_or("nobody leads")?;
        let at_ms = millis(self.began.elapsed());
        let victim = self.cluster.node(leader.node_id);
        let failed = |error: quorate_cluster::ClusterError| error.to_string();
        if kill {
            victim.kill().map_err(failed)?;
        } else {
            victim.pause().map_err(failed)?;
            let pause_ms = self.rng.random_range(PAUSE_MS);
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            // Resumed in the middle of an election, or after it.
            if pause_ms < *PAUSE_MS.end() / 2 {
                victim.resume().map_err(failed)?;
            }
        }
        let next = observe::leader(self.observer, if kill { leader.term } else { 0 }, DEADLINE).await;
        let next = next.ok_or_else(|| format!("nobody leads after node {}", leader.node_id))?;
        if kill {
            victim.start().map_err(failed)?;
            victim.wait_ready(DEADLINE).map_err(failed)?;
        } else {
            victim.resume().map_err(failed)?;
        }
        Ok(Fault {
            at_ms,
            kind: if kill { "kill" } else { "pause" },
            node_id: leader.node_id,
            term: leader.term,
            next_node_id: next.node_id,
            next_term: next.term,
        })
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_testkit::processes::set::Item;

    fn reading(node_id: u64, writes: u64) -> Reading {
        let item = Item { value: "1".to_owned(), index: 9, writes };
        Reading { node_id, applied: 9, state_hash: 7, items: BTreeMap::from([(KEY.to_owned(), item)]) }
    }

    fn seen(versions: &[u64]) -> Seen {
        Seen { versions: versions.to_vec(), ..Seen::default() }
    }

    #[test]
    fn a_good_history_is_valid() {
        assert!(check(3, &seen(&[2, 1, 3]), &[reading(1, 3), reading(2, 3)]).is_empty());
    }

    #[test]
    fn bad_histories_are_found() {
        // Applied twice, lost, acknowledged twice with one version, nodes that disagree, given up.
        assert!(!check(3, &seen(&[1, 2, 4]), &[reading(1, 4)]).is_empty());
        assert!(!check(3, &seen(&[1, 2, 3]), &[reading(1, 2)]).is_empty());
        assert!(!check(3, &seen(&[1, 2, 2]), &[reading(1, 3)]).is_empty());
        assert!(!check(3, &seen(&[1, 2]), &[reading(1, 3)]).is_empty());
        let other = Reading { state_hash: 8, ..reading(2, 3) };
        assert!(!check(3, &seen(&[1, 2, 3]), &[reading(1, 3), other]).is_empty());
        let lost = Seen { final_errors: vec!["the session is gone".to_owned()], ..seen(&[1, 2, 3]) };
        assert!(!check(3, &lost, &[reading(1, 3)]).is_empty());
    }
}
