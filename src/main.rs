//! The `quorate` program: arguments → command → exit code.

use std::ffi::OsString;
use std::process::ExitCode;

use quorate::cli::{self, Report};

mod allocator;

fn main() -> ExitCode {
    allocator::reserve_little();
    let args: Vec<OsString> = std::env::args_os().collect();
    let cli = match cli::parse(&args) {
        Ok(cli) => cli::Cli { on_memory: Some(allocator::fit), ..cli },
        Err(usage) => {
            let (text, asked_for, code) = cli::report::usage(&usage, &args);
            if !asked_for {
                // A process that was started wrongly ends, whether or not that can be read.
                cli::last_words(&text);
                return code.into();
            }
            return match cli::report::print(&text, &args) {
                None => code.into(),
                Some((text, code)) => {
                    cli::last_words(&text);
                    code.into()
                }
            };
        }
    };
    let format = cli::report::format(&cli);
    let code = match execute(cli) {
        Ok(()) | Err(None) => cli::EXIT_OK,
        Err(Some(report)) => {
            cli::last_words(&report.text(format));
            report.exit_code()
        }
    };
    cli::flush_log();
    code.into()
}

/// The error is `None` when nobody is left to be told.
fn execute(cli: cli::Cli) -> Result<(), Option<Report>> {
    let runtime = cli::process::start(cli.command.runs_a_node());
    let runtime = runtime.map_err(|error| Some(Report::of_start(&error)))?;
    let outcome = runtime.block_on(cli::execute(cli));
    // What still runs would hold up the end, a disk that hangs for ever. All that matters has ended, or may end anywhere.
    runtime.shutdown_background();
    outcome
}
