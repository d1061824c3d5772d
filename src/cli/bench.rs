//! `quorate bench`: closed-loop callers through one shared client.
//!
//! Each caller sends its next operation when the last one is answered, so latency and throughput belong
//! together: `callers / latency`. Operations that end inside the window after the warm-up are measured;
//! errors are counted whenever they happen.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde::Serialize;
use tokio::time::Instant;

use super::read::parse_level;
use super::{CliError, Common, Format, ScopeArgs, output};
use crate::duration;
use crate::kv::client::{Client, ClientError, Endpoint, Request, Scope};
use crate::reason::Reason;
use crate::runtime;
use crate::types::ReadLevel;

/// Arguments of `quorate bench`.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  quorate bench --callers 256 --value-bytes 256 --seconds 10\n  quorate bench --callers 64 --kind get --local -o json\n  quorate bench --callers 64 --reads 0.9\n  quorate bench --no-session                what exactly-once costs, compared with the same without it\n\nWrites keys bench-00000000 and up in the chosen collection. Exits non-zero when no operation succeeded."
)]
pub struct BenchArgs {
    /// Callers, each with one operation under way at a time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000), allow_negative_numbers = true)]
    pub callers: u32,
    /// Size of the values, which are random
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(0..=1_048_576), allow_negative_numbers = true)]
    pub value_bytes: u32,
    /// How long to measure, in whole seconds
    #[arg(long, value_name = "TIME", default_value_t = 10, value_parser = parse_window, allow_hyphen_values = true)]
    pub seconds: u32,
    /// How long to run before measuring, in whole seconds
    #[arg(long, value_name = "TIME", default_value_t = 2, value_parser = duration::parse_seconds, allow_hyphen_values = true)]
    pub warmup_seconds: u32,
    /// How many different keys
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..), allow_negative_numbers = true)]
    pub keys: u32,
    /// What the callers do
    #[arg(long, value_enum, default_value_t = BenchKind::Put)]
    pub kind: BenchKind,
    /// Which part of the operations are gets, from 0 to 1; the others are puts
    #[arg(long, value_name = "FRACTION", value_parser = parse_fraction, allow_negative_numbers = true, conflicts_with = "kind")]
    pub reads: Option<f64>,
    /// How fresh gets are: linearizable, lease, bounded:MS or local
    #[arg(long, value_name = "LEVEL", value_parser = parse_level, default_value = "linearizable")]
    pub level: ReadLevel,
    /// Short for --level local
    #[arg(long, conflicts_with = "level")]
    pub local: bool,
    /// Write without a session, so that a put whose outcome is unknown fails instead of being sent again
    #[arg(long)]
    pub no_session: bool,
    /// Whose keys
    #[command(flatten)]
    pub scope: ScopeArgs,
}

/// What the callers of a measurement do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchKind {
    /// Only puts
    Put,
    /// Only gets
    Get,
}

/// A measurement of no time measures nothing.
pub(super) fn parse_window(text: &str) -> Result<u32, String> {
    match duration::parse_seconds(text)? {
        0 => Err("the time must be longer than zero".to_owned()),
        seconds => Ok(seconds),
    }
}

pub(super) fn parse_fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(fraction) if (0.0..=1.0).contains(&fraction) => Ok(fraction),
        _ => Err("write a number from 0 to 1".to_owned()),
    }
}

/// What is printed.
#[derive(Debug, Serialize)]
struct BenchReport {
    callers: u32,
    value_bytes: u32,
    seconds: f64,
    reads: f64,
    operations: u64,
    errors: u64,
    ops_per_second: f64,
    /// Null when nothing succeeded, as the next.
    p50_us: Option<u64>,
    p99_us: Option<u64>,
    p999_us: Option<u64>,
    max_us: Option<u64>,
    errors_by_kind: BTreeMap<&'static str, u64>,
}

/// What one caller does.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) client: Client,
    pub(super) scope: Scope,
    pub(super) level: ReadLevel,
    /// The nodes to read at, in turn; none: wherever the client reads. What is read at each is told apart.
    pub(super) nodes: Vec<Endpoint>,
    pub(super) keys: u64,
    pub(super) value_bytes: usize,
    pub(super) reads: f64,
    pub(super) measure_from: Instant,
    pub(super) until: Instant,
}

impl Plan {
    /// What is told apart: first what is not bound to a node, then the reads at each.
    fn lanes(&self) -> usize {
        1 + self.nodes.len()
    }
}

/// What one caller, or all together, saw.
#[derive(Debug)]
pub(super) struct BenchTally {
    pub(super) latency_us: Histogram<u64>,
    pub(super) errors: BTreeMap<&'static str, u64>,
    pub(super) last_error: Option<ClientError>,
}

impl BenchTally {
    pub(super) fn new() -> Self {
        /// Three digits: the error of a percentile is at most 0.1 %.
        const SIGNIFICANT_DIGITS: u8 = 3;
        /// A day; longer than an operation may take.
        const MAX_LATENCY_US: u64 = 24 * 60 * 60 * 1_000_000;
        let latency_us = Histogram::new_with_max(MAX_LATENCY_US, SIGNIFICANT_DIGITS)
            .expect("invariant: precision and maximum are valid");
        Self { latency_us, errors: BTreeMap::new(), last_error: None }
    }

    pub(super) fn fail(&mut self, error: ClientError) {
        *self.errors.entry(error.reason().name()).or_default() += 1;
        self.last_error = Some(error);
    }

    /// The latency below which so large a part of the operations was; `None` where there was none.
    pub(super) fn quantile_us(&self, part: f64) -> Option<u64> {
        (!self.latency_us.is_empty()).then(|| self.latency_us.value_at_quantile(part))
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.latency_us.add(&other.latency_us).expect("invariant: all histograms have the same bounds");
        for (kind, count) in &other.errors {
            *self.errors.entry(kind).or_default() += count;
        }
        if other.last_error.is_some() {
            self.last_error.clone_from(&other.last_error);
        }
    }
}

/// Measures, and prints the report.
///
/// # Errors
/// Without a report when nothing can be read to begin with. [`CliError::NothingMeasured`], after the report, when no
/// operation succeeded. Others see [`CliError`].
pub async fn run(common: &Common, args: BenchArgs) -> Result<(), CliError> {
    let reads = args.reads.unwrap_or(match args.kind {
        BenchKind::Put => 0.0,
        BenchKind::Get => 1.0,
    });
    let window = Duration::from_secs(args.seconds.into());
    let level = if args.local { ReadLevel::Local } else { args.level };
    // Where nothing can be measured, that is known at once, and why.
    common.client()?.get(&args.scope.scope(), "bench-00000000", level).await?;
    let measure_from = Instant::now() + Duration::from_secs(args.warmup_seconds.into());
    let plan = Plan {
        client: common.client_with(|config| config.exactly_once = !args.no_session)?,
        scope: args.scope.scope(),
        level,
        nodes: Vec::new(),
        keys: args.keys.into(),
        value_bytes: args.value_bytes as usize,
        reads,
        measure_from,
        until: measure_from + window,
    };
    let total = measure(&plan, args.callers as usize).await.swap_remove(0);
    plan.client.close().await;
    let report = report(&args, reads, window, &total);
    let printed = match common.output {
        Format::Json => output::json(&report),
        Format::Table => output::raw(table(&report).as_bytes()),
    };
    match total.last_error {
        Some(last) if report.operations == 0 => Err(CliError::NothingMeasured {
            why: format!("the last error was: {last}"),
            reason: last.reason(),
            maybe_applied: last.maybe_applied(),
        }),
        None if report.operations == 0 => Err(CliError::NothingMeasured {
            why: "none ended within the time that is measured".to_owned(),
            reason: Reason::DeadlineExceeded,
            maybe_applied: reads < 1.0,
        }),
        Some(last) => {
            output::remark(&format!("{} operations failed; the last error was: {last}", report.errors));
            printed
        }
        None => printed,
    }
}

/// Runs the callers to their end; what they saw, by lane. They share a few tallies, because a histogram takes more memory than all
/// else that belongs to a caller.
pub(super) async fn measure(plan: &Plan, callers: usize) -> Vec<BenchTally> {
    /// Enough that callers on different threads seldom meet at one.
    const TALLIES: usize = 16;
    let lanes = || (0..plan.lanes()).map(|_| BenchTally::new()).collect::<Vec<_>>();
    let tallies: Vec<_> =
        (0..TALLIES.div_ceil(plan.lanes())).map(|_| Arc::new(Mutex::new(lanes()))).collect();
    let start = |n: usize| runtime::spawn(caller(plan.clone(), tallies[n % tallies.len()].clone(), n));
    let callers: Vec<_> = (0..callers).map(start).collect();
    for caller in callers {
        if let Err(error) = caller.await
            && let Ok(panic) = error.try_into_panic()
        {
            std::panic::resume_unwind(panic);
        }
    }
    let mut total = lanes();
    for tally in tallies {
        let tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        total.iter_mut().zip(&*tally).for_each(|(total, lane)| total.add(lane));
    }
    total
}

async fn caller(plan: Plan, tally: Arc<Mutex<Vec<BenchTally>>>, number: usize) {
    let mut rng = SmallRng::seed_from_u64(runtime::random_u64());
    let mut began = Instant::now();
    let mut turn = number;
    while began < plan.until {
        turn += 1;
        let (lane, outcome) = operate(&plan, &mut rng, turn).await;
        let ended = Instant::now();
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(()) if ended >= plan.measure_from && ended < plan.until => {
                let latency_us = u64::try_from((ended - began).as_micros()).unwrap_or(u64::MAX);
                tally[lane].latency_us.saturating_record(latency_us);
            }
            Ok(()) => {}
            Err(error) => tally[lane].fail(error),
        }
        began = ended;
    }
}

/// One operation, and its lane.
async fn operate(plan: &Plan, rng: &mut SmallRng, turn: usize) -> (usize, Result<(), ClientError>) {
    let key = Bytes::from(format!("bench-{:08}", rng.next_u64() % plan.keys));
    // 53 bits, as many as the fraction of a double has.
    let read = plan.reads > 0.0 && ((rng.next_u64() >> 11) as f64) < plan.reads * (1u64 << 53) as f64;
    if !read {
        let mut value = vec![0; plan.value_bytes];
        rng.fill_bytes(&mut value);
        return (0, plan.client.put(&plan.scope, key, value).await.map(drop));
    }
    match plan.nodes.get(turn % plan.nodes.len().max(1)) {
        None => (0, plan.client.get(&plan.scope, key, plan.level).await.map(drop)),
        Some(node) => {
            let get = Request::Get { scope: plan.scope.clone(), key };
            let outcome = plan.client.execute_at(node, get, plan.level).await.map(drop);
            (1 + turn % plan.nodes.len(), outcome)
        }
    }
}

fn report(args: &BenchArgs, reads: f64, window: Duration, total: &BenchTally) -> BenchReport {
    let operations = total.latency_us.len();
    let seconds = window.as_secs_f64();
    let quantile = |part| total.quantile_us(part);
    BenchReport {
        callers: args.callers,
        value_bytes: args.value_bytes,
        seconds,
        reads,
        operations,
        errors: total.errors.values().sum(),
        ops_per_second: (operations as f64 / seconds * 10.0).round() / 10.0,
        p50_us: quantile(0.5),
        p99_us: quantile(0.99),
        p999_us: quantile(0.999),
        max_us: (operations > 0).then(|| total.latency_us.max()),
        errors_by_kind: total.errors.clone(),
    }
}

fn table(report: &BenchReport) -> String {
    let mut rows = vec![
        vec!["callers".to_owned(), report.callers.to_string()],
        vec!["value bytes".to_owned(), report.value_bytes.to_string()],
        vec!["reads".to_owned(), format!("{:.0} %", report.reads * 100.0)],
        vec!["seconds".to_owned(), report.seconds.to_string()],
        vec!["operations".to_owned(), report.operations.to_string()],
        vec!["errors".to_owned(), report.errors.to_string()],
    ];
    for (kind, count) in &report.errors_by_kind {
        rows.push(vec![format!("  {kind}"), count.to_string()]);
    }
    let in_ms =
        |us: Option<u64>| us.map_or_else(|| "-".to_owned(), |us| format!("{:.3} ms", us as f64 / 1000.0));
    rows.push(vec!["operations/s".to_owned(), format!("{:.0}", report.ops_per_second)]);
    for (name, us) in
        [("p50", report.p50_us), ("p99", report.p99_us), ("p99.9", report.p999_us), ("max", report.max_us)]
    {
        rows.push(vec![name.to_owned(), in_ms(us)]);
    }
    output::table(&["MEASURE", "VALUE"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tallies_add_up() {
        let endpoint = crate::kv::client::Endpoint::parse("n1:1").unwrap();
        let lost = ClientError::Failed {
            endpoint,
            reason: Reason::Interrupted,
            message: String::new(),
            maybe_applied: true,
        };
        let mut total = BenchTally::new();
        for latency_us in [100, 3_000_000] {
            let mut one = BenchTally::new();
            one.latency_us.saturating_record(latency_us);
            one.fail(lost.clone());
            one.fail(lost.clone());
            total.add(&one);
        }
        assert_eq!(total.latency_us.len(), 2);
        assert!(total.latency_us.max() >= 3_000_000);
        assert_eq!(total.errors["INTERRUPTED"], 4);
        assert!(total.last_error.is_some());
    }
}
