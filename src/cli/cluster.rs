//! `quorate cluster`.

use std::error::Error;

use clap::Args;

/// Arguments of `quorate cluster`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  quorate cluster")]
pub struct ClusterArgs {}

/// Runs a local cluster until Ctrl-C.
///
/// # Errors
/// Always, in this build.
pub async fn run(args: ClusterArgs) -> Result<(), Box<dyn Error + Send + Sync>> {
    let ClusterArgs {} = args;
    Err("this build has no clusterr".into())
}
