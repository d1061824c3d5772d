//! The `quorate` program: arguments → command → exit code.

use std::ffi::OsString;
use std::process::ExitCode;

use quorate::cli;

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
    if cli.command.runs_a_node()
        && let Err(error) = cli::conceal(&args)
    {
        cli::last_words(&format!(
            "error: cannot take the peer secret off the command line: {error}; give it in a file, with --peer-secret-file\n"
        ));
        return cli::EXIT_ERROR.into();
    }
    let format = cli::report::format(&cli);
    let code = match cli::execute(cli) {
        Ok(()) | Err(None) => cli::EXIT_OK,
        Err(Some(report)) => {
            cli::last_words(&report.text(format));
            report.exit_code()
        }
    };
    cli::flush_log();
    code.into()
}
