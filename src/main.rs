//! The `quorate` program: arguments → command → exit code.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use quorate::cli::{self, CliError};

/// Commands are allocated on one thread and freed on another, which glibc's allocator does badly.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(usage) => {
            // Goes to standard output for --help and --version. Nobody is left to complain to if it fails.
            let _ = usage.print();
            return cli::usage_exit_code(&usage).into();
        }
    };
    match execute(cli) {
        Ok(()) => cli::EXIT_OK.into(),
        Err(error) => report(&error).into(),
    }
}

fn execute(cli: cli::Cli) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")?;
    runtime.block_on(cli::run(cli))?;
    Ok(())
}

/// Prints the error and its hint; returns the exit code.
fn report(error: &anyhow::Error) -> u8 {
    let (code, hint) = match error.downcast_ref::<CliError>() {
        Some(error) if error.is_broken_pipe() => return error.exit_code(),
        Some(error) => (error.exit_code(), error.hint()),
        None => (cli::EXIT_ERROR, None),
    };
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "error: {error}");
    if let Some(hint) = hint {
        let _ = writeln!(stderr, "hint: {hint}");
    }
    code
}
