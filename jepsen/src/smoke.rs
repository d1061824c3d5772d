//! Concurrent writers while the leader is killed again and again.
//!
//! A run proves something only if every kill was one, a new leader came of each, and writes went on: what
//! is short of that makes the verdict *unknown*, as does a cluster that does not settle afterwards.

use std::path::Path;
use std::time::{Duration, Instant};

use quorate::kv::client::{Client, ClientConfig};
use quorate_cluster::{Cluster, ClusterSpec};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use crate::verdict::Verdict;
use quorate_testkit::processes::Writers;
use quorate_testkit::processes::observe;
use quorate_testkit::processes::set::{self, Attempt, Findings};

/// For each thing that is waited for.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long a node may take to stop at the end.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// Writes between two faults, at least and at most.
const WRITES_BETWEEN_FAULTS: std::ops::RangeInclusive<u64> = 50..=400;

/// What a run is made of.
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct Config {
    /// Number of nodes
    #[arg(long, default_value_t = 3)]
    pub(crate) nodes: u64,
    /// How often the leader is killed
    #[arg(long, default_value_t = 5)]
    pub(crate) kills: u32,
    /// Concurrent callers
    #[arg(long, default_value_t = 8)]
    pub(crate) callers: u32,
    /// Acknowledged writes in the whole run, at least
    #[arg(long, default_value_t = 10_000)]
    pub(crate) writes: u64,
    /// Decides when the faults come, relative to the writes [default: random]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
}

/// `results.json`.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    pub(crate) verdict: Verdict,
    /// Why the verdict is unknown.
    reason: Option<String>,
    findings: Findings,
    kills: Vec<Kill>,
    /// Index that all nodes had applied in the end, and their state hash.
    applied: Option<u64>,
    state_hash: Option<String>,
    duration_ms: u64,
}

/// One fault, as it was seen to take effect.
#[derive(Debug, Clone, Serialize)]
struct Kill {
    at_ms: u64,
    node_id: u64,
    pid: u32,
    /// How the process ended.
    status: String,
    /// Of the killed leader.
    term: u64,
    /// From the kill to the first write acknowledged after it.
    unavailable_ms: u64,
    /// Who led next, and its term.
    next_node_id: u64,
    next_term: u64,
}

/// A run that has come to its end.
pub(crate) struct Run {
    pub(crate) history: Vec<Attempt>,
    pub(crate) results: Results,
}

/// `test.json`.
#[derive(Serialize)]
pub(crate) struct Test {
    workload: &'static str,
    seed: u64,
    config: Config,
    version: &'static str,
    binary: String,
    /// Repeats the run: the same faults at the same points of the workload. The interleaving of processes is
    /// not repeated.
    command: String,
}

/// The description of a run that is about to be made.
pub(crate) fn test(config: &Config, seed: u64, binary: &Path, store: &Path) -> Test {
    let program = std::env::args().next().unwrap_or_else(|| "quorate-jepsen".to_owned());
    let Config { nodes, kills, callers, writes, seed: _ } = config;
    let command = format!(
        "{program} smoke --nodes {nodes} --kills {kills} --callers {callers} --writes {writes} --seed {seed} --binary '{}' --store '{}'",
        binary.display(),
        store.display()
    );
    Test {
        workload: "smoke",
        seed,
        config: config.clone(),
        version: env!("CARGO_PKG_VERSION"),
        binary: binary.display().to_string(),
        command,
    }
}

/// Makes one run.
///
/// # Errors
/// When the cluster cannot be started. What goes wrong after that is a verdict.
pub(crate) async fn run(config: &Config, seed: u64, binary: &Path, data_dir: &Path) -> anyhow::Result<Run> {
    let mut spec = ClusterSpec::new(binary, data_dir).with_free_ports()?;
    spec.nodes = config.nodes;
    let cluster = Cluster::start(spec)?;
    cluster.wait_ready(DEADLINE)?;
    let client = Client::new(cluster.endpoints(), ClientConfig::default())?;

    let began = Instant::now();
    let mut writers = Writers::start(&client, &format!("{seed:016x}"), config.callers, began);
    let mut kills = Vec::new();
    let mut faults = Faults {
        cluster: &cluster,
        client: &client,
        rng: SmallRng::seed_from_u64(seed),
        began,
        kills: &mut kills,
    };
    let faulted = faults.inject(config, &mut writers).await;
    let history = writers.finish().await;
    // Also after a run that went wrong: what has been lost by then is lost.
    let settled = observe::converged(&client, DEADLINE).await;

    let readings = settled.as_deref().unwrap_or_default();
    let findings = set::check(&history, readings);
    let reason = faulted.err().or_else(|| settled.as_ref().err().cloned());
    let verdict = match (findings.is_valid(), &reason) {
        (false, _) => Verdict::Invalid,
        (true, Some(_)) => Verdict::Unknown,
        (true, None) => Verdict::Valid,
    };
    let results = Results {
        verdict,
        reason,
        findings,
        kills,
        applied: readings.first().map(|reading| reading.applied),
        state_hash: readings.first().map(|reading| format!("{:016x}", reading.state_hash)),
        duration_ms: millis(began.elapsed()),
    };
    // A node that does not stop in order is killed with the cluster; the verdict stands.
    let _ = cluster.stop(&[], STOP_DEADLINE);
    Ok(Run { history, results })
}

/// The one who kills.
struct Faults<'a> {
    cluster: &'a Cluster,
    client: &'a Client,
    rng: SmallRng,
    began: Instant,
    kills: &'a mut Vec<Kill>,
}

impl Faults<'_> {
    /// Kills the leader as often as asked for, and lets every victim return before the next.
    async fn inject(&mut self, config: &Config, writers: &mut Writers) -> Result<(), String> {
        let mut term = 0;
        for number in 1..=config.kills {
            self.wait_for_writes(writers, &format!("before kill {number}")).await?;
            term = self.kill_leader(term, config.callers, writers).await?;
            self.wait_for_writes(writers, &format!("after kill {number}")).await?;
            let victim = self.cluster.node(self.kills.last().map_or(1, |kill| kill.node_id));
            victim.start().map_err(|error| error.to_string())?;
            victim.wait_ready(DEADLINE).map_err(|error| error.to_string())?;
        }
        // The longest part may be this one, so the deadline is for progress, not for the whole.
        while writers.acknowledged() < config.writes {
            let next = config.writes.min(writers.acknowledged() + WRITES_BETWEEN_FAULTS.end());
            if !writers.reached(next, DEADLINE).await {
                return Err(format!("no progress at {} writes", writers.acknowledged()));
            }
        }
        Ok(())
    }

    async fn wait_for_writes(&mut self, writers: &mut Writers, when: &str) -> Result<(), String> {
        let next = writers.acknowledged() + self.rng.random_range(WRITES_BETWEEN_FAULTS);
        if writers.reached(next, DEADLINE).await { Ok(()) } else { Err(format!("no progress {when}")) }
    }

    /// Kills the leader of a term after `newer_than`; returns its term.
    async fn kill_leader(
        &mut self,
        newer_than: u64,
        callers: u32,
        writers: &mut Writers,
    ) -> Result<u64, String> {
        let leader = observe::leader(self.client, newer_than, DEADLINE).await;
        let leader = leader.ok_or_else(|| format!("no leader of a term after {newer_than}"))?;
        let exit = self.cluster.node(leader.node_id).kill().map_err(|error| error.to_string())?;
        let killed = Instant::now();
        let at_ms = millis(killed - self.began);
        // Each caller may still receive what the victim had sent it; one more is the successor's.
        let next = writers.acknowledged() + u64::from(callers) + 1;
        if !writers.reached(next, DEADLINE).await {
            return Err(format!("no write was acknowledged after the kill of node {}", leader.node_id));
        }
        let unavailable_ms = millis(killed.elapsed());
        let next = observe::leader(self.client, leader.term, DEADLINE).await;
        let next = next.ok_or_else(|| format!("nobody leads after node {}", leader.node_id))?;
        self.kills.push(Kill {
            at_ms,
            node_id: leader.node_id,
            pid: exit.pid,
            status: exit.status.to_string(),
            term: leader.term,
            unavailable_ms,
            next_node_id: next.node_id,
            next_term: next.term,
        });
        Ok(leader.term)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
