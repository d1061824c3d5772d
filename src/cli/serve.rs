//! `quorate serve`.

use std::error::Error;

use clap::Args;

/// Arguments of `quorate serve`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  quorate serve")]
pub struct ServeArgs {}

/// Runs one node until it is told to stop.
///
/// # Errors
/// Always, in this build.
pub async fn run(args: ServeArgs) -> Result<(), Box<dyn Error + Send + Sync>> {
    let ServeArgs {} = args;
    Err("this build has no server".into())
}
