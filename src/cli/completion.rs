//! `quorate completion`.

use clap::Args;
use clap_complete::Shell;

use super::{CliError, output};

/// Arguments of `quorate completion`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate completion bash > /etc/bash_completion.d/quorate\n  quorate completion zsh > ~/.zfunc/_quorate"
)]
pub struct CompletionArgs {
    /// The shell
    pub shell: Shell,
}

/// Prints the script for `command`.
///
/// # Errors
/// [`CliError::Output`].
pub fn run(args: &CompletionArgs, command: &mut clap::Command) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, command, "quorate", &mut script);
    output::raw(&script)
}
