//! For how long nothing can be written: when the leader is killed, when nodes are restarted one after the other in
//! order, and in quiet times, when there should be no gap and no election at all.
//!
//! Callers write as fast as they are answered. A *gap* is the longest time between two successful writes, of
//! whichever callers, from a fault until the cluster is whole again. With the client's default retries no call
//! should fail.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quorate::kv::client::{Client, ClientConfig, Scope};
use quorate_cluster::{Cluster, ClusterSpec};
use serde::Serialize;
use tokio::task::JoinSet;

use crate::verdict::Verdict;
use quorate_testkit::processes::observe;

/// For each thing that is waited for.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long a node may take to stop.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// Undisturbed time before each fault, and after the cluster is whole again.
const QUIET: Duration = Duration::from_millis(1500);
/// Bytes of a value.
const VALUE_BYTES: usize = 256;
/// Keys that each caller writes in turn.
const KEYS: u64 = 100;

/// What is done to the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Disturbance {
    /// The leader is killed with SIGKILL, and started again.
    Kill,
    /// Every node in turn is stopped in order and started again.
    Restart,
    /// Nothing.
    Nothing,
}

/// What a run is made of.
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct Config {
    /// What is done to the nodes
    #[arg(long, value_enum, default_value_t = Disturbance::Kill)]
    pub(crate) disturbance: Disturbance,
    /// Number of nodes
    #[arg(long, default_value_t = 3)]
    pub(crate) nodes: u64,
    /// How often: kills, or restarts of all nodes
    #[arg(long, default_value_t = 20)]
    pub(crate) rounds: u32,
    /// With nothing done: for how long
    #[arg(long, default_value_t = 600)]
    pub(crate) seconds: u64,
    /// Concurrent callers
    #[arg(long, default_value_t = 64)]
    pub(crate) callers: u32,
    /// Median gap above which the run is invalid, in milliseconds [default: none]
    #[arg(long)]
    pub(crate) max_median_ms: Option<u64>,
    /// Longest gap above which the run is invalid, in milliseconds [default: none]
    #[arg(long)]
    pub(crate) max_gap_ms: Option<u64>,
}

/// `results.json`.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    pub(crate) verdict: Verdict,
    reasons: Vec<String>,
    /// Successful writes.
    writes: u64,
    /// Writes a second, faults included.
    writes_per_second: u64,
    /// Calls that failed.
    failed: u64,
    first_failure: Option<String>,
    /// Elections in all, and those that no fault explains.
    elections: u64,
    unexplained_elections: u64,
    /// One per fault, in milliseconds.
    gaps_ms: Vec<u64>,
    /// Of those in which the node that led was hit.
    leader_gaps_ms: Vec<u64>,
    median_gap_ms: Option<u64>,
    longest_gap_ms: Option<u64>,
    duration_ms: u64,
}

/// Measures the time between successes.
struct Pulse {
    began: Instant,
    /// When the last write succeeded, in microseconds since `began`.
    last_us: AtomicU64,
    /// The longest gap since it was last taken.
    longest_us: AtomicU64,
    writes: AtomicU64,
    failed: AtomicU64,
    first_failure: std::sync::Mutex<Option<String>>,
    stop: AtomicBool,
}

impl Pulse {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            last_us: AtomicU64::new(0),
            longest_us: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            first_failure: std::sync::Mutex::default(),
            stop: AtomicBool::new(false),
        }
    }

    fn beat(&self) {
        self.beat_at(micros(self.began.elapsed()));
    }

    fn beat_at(&self, now_us: u64) {
        let last_us = self.last_us.fetch_max(now_us, Ordering::Relaxed);
        self.longest_us.fetch_max(now_us.saturating_sub(last_us), Ordering::Relaxed);
        self.writes.fetch_add(1, Ordering::Relaxed);
    }

    fn failed(&self, error: String) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        if let Ok(mut first) = self.first_failure.lock() {
            first.get_or_insert(error);
        }
    }

    /// The longest gap since this was last called, in milliseconds.
    fn take_longest_ms(&self) -> u64 {
        self.longest_us.swap(0, Ordering::Relaxed).div_ceil(1000)
    }
}

impl Config {
    /// What of the limits does not hold.
    fn broken_by(
        &self,
        failed: u64,
        elections: u64,
        median_gap_ms: Option<u64>,
        longest_gap_ms: Option<u64>,
    ) -> Vec<String> {
        let mut reasons = Vec::new();
        if failed > 0 {
            reasons.push(format!("{failed} calls failed"));
        }
        if self.disturbance == Disturbance::Nothing && elections > 0 {
            reasons.push(format!("{elections} elections without a fault"));
        }
        if let (Some(limit), Some(median)) = (self.max_median_ms, median_gap_ms)
            && median > limit
        {
            reasons.push(format!("the median gap is {median} ms, more than {limit}"));
        }
        if let (Some(limit), Some(longest)) = (self.max_gap_ms, longest_gap_ms)
            && longest > limit
        {
            reasons.push(format!("the longest gap is {longest} ms, more than {limit}"));
        }
        reasons
    }
}

/// Makes one run.
///
/// # Errors
/// When the cluster cannot be started. What goes wrong after that is a verdict.
pub(crate) async fn run(config: &Config, binary: &Path, data_dir: &Path) -> anyhow::Result<Results> {
    let mut spec = ClusterSpec::new(binary, data_dir).with_free_ports()?;
    spec.nodes = config.nodes;
    let cluster = Cluster::start(spec)?;
    cluster.wait_ready(DEADLINE)?;
    let client = Client::new(cluster.endpoints(), ClientConfig::default())?;
    let pulse = Arc::new(Pulse::new());
    let mut callers = JoinSet::new();
    for caller in 0..config.callers {
        callers.spawn(write_on(client.clone(), caller, pulse.clone()));
    }
    let observer = Client::new(cluster.endpoints(), ClientConfig::default())?;
    let mut disturber = Disturber { cluster: &cluster, observer: &observer, pulse: &pulse, gaps: Vec::new() };
    let first_term = observe::leader(&observer, 0, DEADLINE).await.map_or(0, |leader| leader.term);
    let disturbed = disturber.disturb(config).await;
    let gaps = disturber.gaps;
    let last_term = observe::leader(&observer, 0, DEADLINE).await.map_or(0, |leader| leader.term);
    pulse.stop.store(true, Ordering::Relaxed);
    let duration = pulse.began.elapsed();
    callers.join_all().await;
    let settled = observe::converged(&observer, DEADLINE).await;

    let unknown = [disturbed.err(), settled.err()].into_iter().flatten().collect::<Vec<_>>();
    let elections = last_term.saturating_sub(first_term);
    let explained = gaps.iter().filter(|gap| gap.led).count() as u64;
    // A killed leader may need more than one election; a quiet cluster needs none.
    let unexplained_elections = match config.disturbance {
        Disturbance::Nothing => elections,
        _ => elections.saturating_sub(explained.max(elections.min(2 * explained))),
    };
    let leader_gaps_ms: Vec<u64> = gaps.iter().filter(|gap| gap.led).map(|gap| gap.longest_ms).collect();
    let median_gap_ms = median(&leader_gaps_ms);
    let longest_gap_ms = gaps.iter().map(|gap| gap.longest_ms).max();
    let failed = pulse.failed.load(Ordering::Relaxed);
    let mut reasons = config.broken_by(failed, elections, median_gap_ms, longest_gap_ms);
    let verdict = match (reasons.is_empty(), unknown.is_empty()) {
        (false, _) => Verdict::Invalid,
        (true, false) => Verdict::Unknown,
        (true, true) => Verdict::Valid,
    };
    reasons.extend(unknown);
    let _ = cluster.stop(&[], STOP_DEADLINE);
    let writes = pulse.writes.load(Ordering::Relaxed);
    let first_failure = pulse.first_failure.lock().ok().and_then(|first| first.clone());
    Ok(Results {
        verdict,
        reasons,
        writes,
        writes_per_second: writes * 1000 / millis(duration).max(1),
        failed,
        first_failure,
        elections,
        unexplained_elections,
        gaps_ms: gaps.iter().map(|gap| gap.longest_ms).collect(),
        leader_gaps_ms,
        median_gap_ms,
        longest_gap_ms,
        duration_ms: millis(duration),
    })
}

async fn write_on(client: Client, caller: u32, pulse: Arc<Pulse>) {
    let value = vec![b'v'; VALUE_BYTES];
    let mut number = 0;
    while !pulse.stop.load(Ordering::Relaxed) {
        number += 1;
        let key = format!("{caller:04}-{:03}", number % KEYS);
        match client.put(&Scope::default(), key, value.clone()).await {
            Ok(_) => pulse.beat(),
            Err(error) => pulse.failed(error.to_string()),
        }
    }
}

/// What one fault cost.
struct Gap {
    /// Whether the node led.
    led: bool,
    longest_ms: u64,
}

struct Disturber<'a> {
    cluster: &'a Cluster,
    observer: &'a Client,
    pulse: &'a Pulse,
    gaps: Vec<Gap>,
}

impl Disturber<'_> {
    async fn disturb(&mut self, config: &Config) -> Result<(), String> {
        match config.disturbance {
            Disturbance::Nothing => {
                tokio::time::sleep(Duration::from_secs(config.seconds)).await;
                self.gaps.push(Gap { led: false, longest_ms: self.pulse.take_longest_ms() });
                Ok(())
            }
            Disturbance::Kill => {
                for _ in 0..config.rounds {
                    self.kill().await?;
                }
                Ok(())
            }
            Disturbance::Restart => {
                for _ in 0..config.rounds {
                    for node in self.cluster.nodes() {
                        self.restart(node.node_id()).await?;
                    }
                }
                Ok(())
            }
        }
    }

    async fn leader(&self) -> Result<u64, String> {
        let leader = observe::leader(self.observer, 0, DEADLINE).await;
        leader.map(|leader| leader.node_id).ok_or_else(|| "nobody leads".to_owned())
    }

    async fn kill(&mut self) -> Result<(), String> {
        tokio::time::sleep(QUIET).await;
        let victim = self.cluster.node(self.leader().await?);
        let (failed, writes) = (|error: quorate_cluster::ClusterError| error.to_string(), &self.pulse.writes);
        self.pulse.take_longest_ms();
        victim.kill().map_err(failed)?;
        // The gap ends with the first writes that the next leader acknowledges.
        let before = writes.load(Ordering::Relaxed);
        let end = Instant::now() + DEADLINE;
        while writes.load(Ordering::Relaxed) < before + 1000 {
            if Instant::now() > end {
                return Err("nothing was written after the kill".to_owned());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.gaps.push(Gap { led: true, longest_ms: self.pulse.take_longest_ms() });
        victim.start().map_err(failed)?;
        victim.wait_ready(DEADLINE).map_err(failed)
    }

    async fn restart(&mut self, node_id: u64) -> Result<(), String> {
        tokio::time::sleep(QUIET).await;
        let led = self.leader().await? == node_id;
        let node = self.cluster.node(node_id);
        let failed = |error: quorate_cluster::ClusterError| error.to_string();
        self.pulse.take_longest_ms();
        node.stop(STOP_DEADLINE).map_err(failed)?;
        node.start().map_err(failed)?;
        node.wait_ready(DEADLINE).map_err(failed)?;
        tokio::time::sleep(QUIET).await;
        self.gaps.push(Gap { led, longest_ms: self.pulse.take_longest_ms() });
        Ok(())
    }
}

fn median(values: &[u64]) -> Option<u64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_kept_until_it_is_taken() {
        let pulse = Pulse::new();
        for at_us in [1_000, 31_500, 30_000] {
            pulse.beat_at(at_us);
        }
        assert_eq!(pulse.take_longest_ms(), 31, "rounded up");
        pulse.beat_at(32_000);
        assert_eq!(pulse.take_longest_ms(), 1);
        assert_eq!(pulse.writes.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[5, 1, 9]), Some(5));
    }
}
