//! The `quorate` program: arguments → command → exit code.

use std::process::ExitCode;

use quorate::cli::{self, CliError};

/// Commands are allocated on one thread and freed on another, which glibc's allocator does badly.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(usage) => {
            print_usage(&usage);
            return cli::usage_exit_code(&usage).into();
        }
    };
    let code = match execute(cli) {
        Ok(()) => cli::EXIT_OK,
        Err(error) => report(&error),
    };
    cli::flush_log();
    code.into()
}

fn execute(cli: cli::Cli) -> anyhow::Result<()> {
    let runtime = cli::process::start(cli.command.runs_a_node())?;
    let outcome = runtime.block_on(cli::run(cli));
    // What still runs would hold up the end, a disk that hangs for ever. All that matters has ended, or may end anywhere.
    runtime.shutdown_background();
    Ok(outcome?)
}

/// Prints what clap has to say, on standard output for --help and --version.
fn print_usage(usage: &clap::Error) {
    use std::io::IsTerminal;
    match usage.use_stderr() && !std::io::stderr().is_terminal() {
        // A process that was started wrongly ends, whether or not that can be read.
        true => cli::last_words(&usage.render().to_string()),
        // Nobody is left to complain to if it fails.
        false => drop(usage.print()),
    }
}

/// Prints the error and its hint; returns the exit code.
fn report(error: &anyhow::Error) -> u8 {
    let (code, hint) = match error.downcast_ref::<CliError>() {
        Some(error) if error.is_broken_pipe() => return error.exit_code(),
        Some(error) => (error.exit_code(), error.hint()),
        None => (cli::EXIT_ERROR, None),
    };
    let hint = hint.map(|hint| format!("hint: {hint}\n")).unwrap_or_default();
    cli::last_words(&format!("error: {error}\n{hint}"));
    code
}
