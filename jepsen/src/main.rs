//! The fault-injection suite: workloads on real processes, faults from outside, and checkers that look for
//! what must never happen.
//!
//! | run | what must hold |
//! |---|---|
//! | `smoke` | no acknowledged write is lost while the leader is killed again and again |
//! | `counter` | increments that are sent again after every error are applied exactly once |
//! | `planted` | bugs that are planted in a copy of the tree are found by the simulation |
//! | `gaps` | how long nothing can be written around a kill, an orderly restart, or nothing at all |
//!
//! A run starts nodes of the `quorate` binary that lies beside its own, or the one that `--binary` or `QUORATE_BIN`
//! names. Verdict and figures go to standard output as JSON; everything about the run (seed, exact command,
//! history, logs of all nodes) to `store/<run>/<time>/`.
//!
//! Exit codes: 0 valid, 1 invalid, 2 unknown.
//!
//! Callers and checkers are those of the testkit. Here are:
//!
//! - `smoke`, `counter`, `gaps`: the runs;
//! - `verdict`: what a run has shown;
//! - `store`: its record.

mod counter;
mod gaps;
mod planted;
mod smoke;
mod store;
mod verdict;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use serde::Serialize;

use store::Store;
use verdict::Verdict;

#[derive(Debug, Parser)]
#[command(
    name = "quorate-jepsen",
    version,
    about = "Fault injection for quorate on real processes",
    after_help = "Example:\n  cargo build --release --workspace\n  target/release/quorate-jepsen smoke --kills 5\n\nExit codes: 0 valid, 1 invalid, 2 unknown"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Kill the leader again and again under concurrent writers; no acknowledged write may be lost
    Smoke(SmokeArgs),
    /// Increment a counter, each increment sent again until it is acknowledged, while leaders are killed and paused
    #[command(after_help = "Example:\n  quorate-jepsen counter --runs 20")]
    Counter(CounterArgs),
    /// Measure for how long nothing can be written when nodes are killed or restarted
    #[command(
        after_help = "Examples:\n  quorate-jepsen gaps --disturbance kill --rounds 20 --max-median-ms 600\n  quorate-jepsen gaps --disturbance restart --rounds 3 --max-gap-ms 100\n  quorate-jepsen gaps --disturbance nothing --seconds 600 --callers 256"
    )]
    Gaps(GapsArgs),
    /// Plant one bug after the other in a copy of the tree, and see that the simulation finds each
    #[command(after_help = "Example:\n  cargo run -p quorate-jepsen -- planted --only client")]
    Planted(planted::Config),
}

#[derive(Debug, clap::Args)]
struct Common {
    /// The quorate binary [default: the one beside this program]
    #[arg(long, value_name = "PATH", env = "QUORATE_BIN")]
    binary: Option<PathBuf>,
    /// Where the records of runs go
    #[arg(long, value_name = "DIR", default_value = "store")]
    store: PathBuf,
}

#[derive(Debug, clap::Args)]
struct SmokeArgs {
    #[command(flatten)]
    config: smoke::Config,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct CounterArgs {
    #[command(flatten)]
    config: counter::Config,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct GapsArgs {
    #[command(flatten)]
    config: gaps::Config,
    #[command(flatten)]
    common: Common,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(verdict) => verdict.exit_code().into(),
        Err(error) => {
            // A run that could not be made has no verdict.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            Verdict::Unknown.exit_code().into()
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<Verdict> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match cli.command {
        Command::Smoke(args) => {
            let binary = binary(args.common.binary)?;
            let seed = args.config.seed.unwrap_or_else(quorate::testkit::runtime::random_u64);
            let store = Store::create(&args.common.store, "smoke")?;
            store.write_json("test.json", &smoke::test(&args.config, seed, &binary, &args.common.store))?;
            let run =
                runtime.block_on(smoke::run(&args.config, seed, &binary, &store.path().join("cluster")))?;
            store.write_lines("history.jsonl", &run.history)?;
            conclude(&store, run.results.verdict, &run.results)
        }
        Command::Counter(args) => {
            let binary = binary(args.common.binary)?;
            let first = args.config.seed.unwrap_or_else(quorate::testkit::runtime::random_u64);
            let mut worst = Verdict::Valid;
            for number in 0..args.config.runs {
                let seed = first.wrapping_add(u64::from(number));
                let store = Store::create(&args.common.store, "counter")?;
                store.write_json("test.json", &Test::of("counter", Some(seed), &args.config, &binary))?;
                let cluster = store.path().join("cluster");
                let results = runtime.block_on(counter::run(&args.config, seed, &binary, &cluster))?;
                worst = worst.max(conclude(&store, results.verdict, &results)?);
            }
            Ok(worst)
        }
        Command::Planted(config) => {
            let results = planted::run(&config)?;
            print(&results)?;
            Ok(results.verdict)
        }
        Command::Gaps(args) => {
            let binary = binary(args.common.binary)?;
            let store = Store::create(&args.common.store, "gaps")?;
            store.write_json("test.json", &Test::of("gaps", None, &args.config, &binary))?;
            let results =
                runtime.block_on(gaps::run(&args.config, &binary, &store.path().join("cluster")))?;
            conclude(&store, results.verdict, &results)
        }
    }
}

/// `test.json`.
#[derive(Serialize)]
struct Test<'a, C> {
    workload: &'static str,
    seed: Option<u64>,
    config: &'a C,
    version: &'static str,
    binary: String,
    /// Repeats the run, but for the interleaving of processes; a seed that was drawn is to be added.
    command: String,
}

impl<'a, C> Test<'a, C> {
    fn of(workload: &'static str, seed: Option<u64>, config: &'a C, binary: &Path) -> Self {
        let quoted = std::env::args().map(|arg| format!("'{arg}'")).collect::<Vec<_>>();
        let (version, binary) = (env!("CARGO_PKG_VERSION"), binary.display().to_string());
        Self { workload, seed, config, version, binary, command: quoted.join(" ") }
    }
}

/// Records what came of a run, and says it.
fn conclude(store: &Store, verdict: Verdict, results: &impl Serialize) -> anyhow::Result<Verdict> {
    store.write_json("results.json", results)?;
    if verdict == Verdict::Valid {
        store.keep_only_logs("cluster")?;
    }
    print(results)?;
    writeln!(std::io::stderr(), "recorded in {}", store.path().display())?;
    Ok(verdict)
}

fn print(results: &impl Serialize) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut stdout, results)?;
    Ok(writeln!(stdout)?)
}

/// The binary under test: named, or beside this program, where a build of the workspace puts both.
fn binary(named: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let binary = match named {
        Some(binary) => binary,
        None => std::env::current_exe().context("cannot find this program's path")?.with_file_name("quorate"),
    };
    if !binary.is_file() {
        anyhow::bail!(
            "there is no quorate binary at {}: build it with `cargo build --bin quorate`, or name one with --binary",
            binary.display()
        );
    }
    Ok(std::path::absolute(binary)?)
}
