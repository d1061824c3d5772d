//! The fault-injection suite: workloads on real processes, faults from outside, and checkers that look for
//! what must never happen.
//!
//! `quorate-jepsen smoke` is the first of its runs, and the shortest: concurrent writers while the leader
//! is killed again and again. It starts nodes of the `quorate` binary that lies beside its own, or the one
//! that `--binary` or `QUORATE_BIN` names. Verdict and figures go to standard output as JSON; everything
//! about the run (seed, exact command, history, logs of all nodes) to `store/smoke/<time>/`.
//!
//! Exit codes: 0 valid, 1 invalid, 2 unknown.
//!
//! - `set`: what was written, what is there, and whether the two fit;
//! - `writers`: the callers;
//! - `observe`: who leads, and what every node holds;
//! - `smoke`: the run;
//! - `store`: its record.

mod observe;
mod set;
mod smoke;
mod store;
mod writers;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

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
}

#[derive(Debug, clap::Args)]
struct SmokeArgs {
    #[command(flatten)]
    config: smoke::Config,
    /// The quorate binary [default: the one beside this program]
    #[arg(long, value_name = "PATH", env = "QUORATE_BIN")]
    binary: Option<PathBuf>,
    /// Where the records of runs go
    #[arg(long, value_name = "DIR", default_value = "store")]
    store: PathBuf,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(verdict) => verdict.exit_code().into(),
        Err(error) => {
            // A run that could not be made has no verdict.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            smoke::Verdict::Unknown.exit_code().into()
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<smoke::Verdict> {
    let Command::Smoke(args) = cli.command;
    let binary = binary(args.binary)?;
    let seed = args.config.seed.unwrap_or_else(quorate::runtime::random_u64);
    let store = store::Store::create(&args.store, "smoke")?;
    store.write_json("test.json", &smoke::test(&args.config, seed, &binary, &args.store))?;

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let run = runtime.block_on(smoke::run(&args.config, seed, &binary, &store.path().join("cluster")))?;
    store.write_lines("history.jsonl", &run.history)?;
    store.write_json("results.json", &run.results)?;
    if run.results.verdict == smoke::Verdict::Valid {
        store.keep_only_logs("cluster")?;
    }
    let mut stdout = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut stdout, &run.results)?;
    writeln!(stdout)?;
    writeln!(std::io::stderr(), "recorded in {}", store.path().display())?;
    Ok(run.results.verdict)
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
