//! The `quorate` program: arguments → command → exit code.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use quorate::cli::{self, Report};

/// Commands are allocated on one thread and freed on another, which glibc's allocator does badly.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let cli = match cli::parse(&args) {
        Ok(cli) => cli,
        Err(usage) => {
            let (text, asked_for, code) = cli::report::usage(&usage, &args);
            // Nobody is left to complain to if it fails.
            let _ = match asked_for {
                true => std::io::stdout().lock().write_all(text.as_bytes()),
                false => std::io::stderr().lock().write_all(text.as_bytes()),
            };
            return code.into();
        }
    };
    let format = cli::report::format(&cli);
    match execute(cli) {
        Ok(()) | Err(None) => cli::EXIT_OK.into(),
        Err(Some(report)) => {
            let _ = std::io::stderr().lock().write_all(report.text(format).as_bytes());
            report.exit_code().into()
        }
    }
}

/// The error is `None` when nobody is left to be told.
fn execute(cli: cli::Cli) -> Result<(), Option<Report>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.map_err(|error| Some(Report::of_start(&error)))?.block_on(cli::execute(cli))
}
