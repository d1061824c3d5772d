//! `quorate load-test`: what [`bench`](super::bench) does, for a short while, at every node, and whether all went well.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tokio::time::Instant;

use super::bench::{BenchTally, Plan, measure, parse_fraction, parse_window};
use super::endpoints::{self, NodeKind};
use super::read::parse_level;
use super::{CliError, Common, Format, output};
use crate::duration;
use crate::kv::client::{ReplicaReads, Scope};
use crate::runtime;
use crate::types::ReadLevel;

/// Whose keys are written, in a collection of its own for each test.
const TENANT: &str = "load-test";

/// Arguments of `quorate load-test`.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  quorate load-test\n  quorate load-test --callers 64 --reads 0.5 --seconds 30 --max-p99 20ms\n  quorate load-test --level linearizable -o json | jq .lanes\n\nWrites go to the leader; reads go to every member and every replica in turn, those that were not given included. Partial replicas are left out. Writes in the tenant `load-test`, in a collection of its own, and removes it in the end. Exits with 0 when every node has answered and no more operations have failed than --max-errors, within --max-p99 if that is set; else with 1, or with 2 when no node answers."
)]
pub struct LoadTestArgs {
    /// Callers, each with one operation under way at a time
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=100_000), allow_negative_numbers = true)]
    pub callers: u32,
    /// How long to measure, in whole seconds
    #[arg(long, value_name = "TIME", default_value_t = 10, value_parser = parse_window, allow_hyphen_values = true)]
    pub seconds: u32,
    /// Which part of the operations are gets, from 0 to 1; the others are puts
    #[arg(long, value_name = "FRACTION", value_parser = parse_fraction, allow_negative_numbers = true, default_value = "0.8")]
    pub reads: f64,
    /// How fresh gets are: linearizable, bounded:MS or local
    #[arg(long, value_name = "LEVEL", value_parser = parse_level, default_value = "local")]
    pub level: ReadLevel,
    /// Size of the values, which are random
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(0..=1_048_576), allow_negative_numbers = true)]
    pub value_bytes: u32,
    /// How many operations may fail
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub max_errors: u64,
    /// How long 99 % of the operations of each kind, at each node, may take at most
    #[arg(long, value_name = "TIME", value_parser = duration::parse, allow_hyphen_values = true)]
    pub max_p99: Option<Duration>,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct LoadReport {
    passed: bool,
    /// What is wrong, in words.
    problems: Vec<String>,
    seconds: f64,
    callers: u32,
    operations: u64,
    errors: u64,
    ops_per_second: f64,
    lanes: Vec<Lane>,
}

/// Operations of one kind at one node.
#[derive(Debug, Serialize)]
struct Lane {
    /// `writes` or `reads`.
    what: &'static str,
    /// Null for writes, which go wherever the leader is.
    endpoint: Option<String>,
    /// `leader`, or what the node is.
    at: &'static str,
    operations: u64,
    errors: u64,
    ops_per_second: f64,
    /// Null when nothing succeeded, as the next.
    p50_us: Option<u64>,
    p99_us: Option<u64>,
    max_us: Option<u64>,
    errors_by_kind: BTreeMap<&'static str, u64>,
}

impl Lane {
    fn of(place: Option<&(String, NodeKind)>, tally: &BenchTally, window: Duration) -> Self {
        let operations = tally.latency_us.len();
        Self {
            what: if place.is_some() { "reads" } else { "writes" },
            endpoint: place.map(|(endpoint, _)| endpoint.clone()),
            at: place.map_or("leader", |(_, kind)| kind.name()),
            operations,
            errors: tally.errors.values().sum(),
            ops_per_second: (operations as f64 / window.as_secs_f64() * 10.0).round() / 10.0,
            p50_us: tally.quantile_us(0.5),
            p99_us: tally.quantile_us(0.99),
            max_us: tally.quantile_us(1.0),
            errors_by_kind: tally.errors.clone(),
        }
    }

    fn name(&self) -> String {
        match &self.endpoint {
            Some(endpoint) => format!("{} at {endpoint}", self.what),
            None => self.what.to_owned(),
        }
    }
}

/// Writes and reads, prints what came of it, and says whether all is well.
///
/// # Errors
/// After the report: [`CliError::TestFailed`]. Before it: no node answers, or nothing can be written.
pub async fn run(common: &Common, args: LoadTestArgs) -> Result<(), CliError> {
    if matches!(args.level, ReadLevel::Lease) {
        return Err(CliError::Usage(
            "only the leader answers reads at level lease: use another one".to_owned(),
        ));
    }
    let client = common.client_with(|config| config.replica_reads = ReplicaReads::Never)?;
    let asked = endpoints::ask_all(&client).await;
    if asked.iter().all(|(_, answer)| answer.is_err()) {
        return Err(CliError::NoNodeAnswers);
    }
    let silent: Vec<_> = asked
        .iter()
        .filter_map(|(endpoint, answer)| answer.as_ref().err().map(|error| format!("{endpoint}: {error}")))
        .collect();
    let nodes: Vec<_> = endpoints::each_once(asked)
        .into_iter()
        .map(|(endpoint, report)| (endpoint, NodeKind::of(&report)))
        .filter(|(_, kind)| *kind != NodeKind::PartialReplica)
        .collect();
    let scope = Scope { tenant: TENANT.to_owned(), collection: format!("{:016x}", runtime::random_u64()) };
    // Where nothing can be written, that is known at once, and why.
    client.put(&scope, "bench-00000000", "").await?;
    let window = Duration::from_secs(args.seconds.into());
    let measure_from = Instant::now();
    let plan = Plan {
        client,
        scope,
        level: args.level,
        nodes: nodes.iter().map(|(endpoint, _)| endpoint.clone()).collect(),
        keys: 1000,
        value_bytes: args.value_bytes as usize,
        reads: args.reads,
        measure_from,
        until: measure_from + window,
    };
    let tallies = measure(&plan, args.callers as usize).await;
    let cleaned = plan.client.delete_prefix(&plan.scope, "bench-").await;
    plan.client.close().await;
    let places: Vec<_> = nodes.iter().map(|(endpoint, kind)| (endpoint.to_string(), *kind)).collect();
    let mut report = report(&args, window, &places, &tallies, silent);
    if let Err(error) = cleaned {
        report.problems.push(format!("what was written is not removed: {error}"));
        report.passed = false;
    }
    let printed = match common.output {
        Format::Json => output::json(&report),
        Format::Table => output::raw(table(&report).as_bytes()),
    };
    match report.passed {
        true => printed,
        false => Err(CliError::TestFailed(format!("the test has failed: {}", report.problems.join("; ")))),
    }
}

fn report(
    args: &LoadTestArgs,
    window: Duration,
    places: &[(String, NodeKind)],
    tallies: &[BenchTally],
    mut problems: Vec<String>,
) -> LoadReport {
    let places = std::iter::once(None).chain(places.iter().map(Some));
    let lanes = places.zip(tallies).filter_map(|(place, tally)| {
        // What was not asked for is not shown.
        let is_asked_for = if place.is_some() { args.reads > 0.0 } else { args.reads < 1.0 };
        is_asked_for.then(|| (Lane::of(place, tally, window), tally))
    });
    let (lanes, tallies): (Vec<_>, Vec<_>) = lanes.unzip();
    let errors: u64 = lanes.iter().map(|lane| lane.errors).sum();
    if errors > args.max_errors {
        let last = tallies.iter().find_map(|tally| tally.last_error.as_ref());
        let last = last.map(|error| format!("; one of them: {error}")).unwrap_or_default();
        problems.push(format!("{errors} operations failed, and {} may{last}", args.max_errors));
    }
    for lane in &lanes {
        let name = lane.name();
        match (lane.p99_us, args.max_p99) {
            (None, _) => problems.push(format!("none of the {name} succeeded within the time")),
            (Some(p99_us), Some(most)) if u128::from(p99_us) > most.as_micros() => {
                problems.push(format!("1 % of the {name} took {} or longer", in_ms(Some(p99_us))));
            }
            (Some(_), _) => {}
        }
    }
    let operations: u64 = lanes.iter().map(|lane| lane.operations).sum();
    LoadReport {
        passed: problems.is_empty(),
        problems,
        seconds: window.as_secs_f64(),
        callers: args.callers,
        operations,
        errors,
        ops_per_second: (operations as f64 / window.as_secs_f64() * 10.0).round() / 10.0,
        lanes,
    }
}

fn in_ms(us: Option<u64>) -> String {
    us.map_or_else(|| "-".to_owned(), |us| format!("{:.3} ms", us as f64 / 1000.0))
}

fn table(report: &LoadReport) -> String {
    let row = |lane: &Lane| {
        vec![
            lane.what.to_owned(),
            lane.endpoint.clone().unwrap_or_else(|| "-".to_owned()),
            lane.at.to_owned(),
            lane.operations.to_string(),
            format!("{:.0}", lane.ops_per_second),
            in_ms(lane.p50_us),
            in_ms(lane.p99_us),
            in_ms(lane.max_us),
            lane.errors.to_string(),
        ]
    };
    let rows: Vec<_> = report.lanes.iter().map(row).collect();
    let headings = ["WHAT", "ENDPOINT", "AT", "OPERATIONS", "PER SECOND", "P50", "P99", "MAX", "ERRORS"];
    let verdict = if report.passed { "passed" } else { "FAILED" };
    format!(
        "{}{verdict}: {} operations, {:.0} per second, {} errors\n",
        output::table(&headings, &rows),
        report.operations,
        report.ops_per_second,
        report.errors
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::golden;
    use crate::kv::client::{ClientError, Endpoint};
    use crate::reason::Reason;

    #[derive(clap::Parser)]
    struct Loading {
        #[command(flatten)]
        args: LoadTestArgs,
    }

    fn args(given: &[&str]) -> LoadTestArgs {
        <Loading as clap::Parser>::parse_from(["load-test"].iter().chain(given)).args
    }

    fn tally(latency_us: &[u64], errors: u64) -> BenchTally {
        let mut tally = BenchTally::new();
        for us in latency_us {
            tally.latency_us.saturating_record(*us);
        }
        for _ in 0..errors {
            let endpoint = Endpoint::parse("n1:1").unwrap();
            let (reason, message) = (Reason::Behind, "it is behind".to_owned());
            tally.fail(ClientError::Failed { endpoint, reason, message, maybe_applied: false });
        }
        tally
    }

    #[test]
    fn every_node_and_what_went_wrong_there_is_shown() {
        let places = [("n1:1".to_owned(), NodeKind::Member), ("r1:1".to_owned(), NodeKind::Replica)];
        let window = Duration::from_secs(2);
        let mut shown = String::new();
        for (given, tallies, silent) in [
            (&[][..], [tally(&[900], 0), tally(&[100, 200], 0), tally(&[300], 0)], None),
            (&["--max-p99", "1ms"], [tally(&[200], 0), tally(&[100], 0), tally(&[3000], 0)], None),
            (
                &["--max-errors", "1"],
                [tally(&[900], 0), tally(&[100], 0), tally(&[], 2)],
                Some("n2:1: refused"),
            ),
            (&["--reads", "1"], [tally(&[], 0), tally(&[100], 0), tally(&[100], 0)], None),
        ] {
            let silent = silent.map(str::to_owned).into_iter().collect();
            let report = report(&args(given), window, &places, &tallies, silent);
            let json = serde_json::to_string_pretty(&report).unwrap();
            shown.push_str(&format!("{given:?}\n{}{json}\n", table(&report)));
        }
        golden("cli-load-test.txt", &shown);
    }
}
