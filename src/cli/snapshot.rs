//! `quorate snapshot`.

use clap::Args;
use serde_json::json;

use super::{CliError, Common, Format, output};
use crate::kv::client::Endpoint;

/// Arguments of `quorate snapshot`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate snapshot                            on the leader\n  quorate snapshot --endpoint 10.0.0.2:7801\n\nNodes take snapshots by themselves; one that is taken now makes the next start shorter."
)]
pub struct SnapshotArgs {
    /// Client address of the node that takes it [default: the leader's]
    #[arg(long, value_name = "HOST:PORT", value_parser = Endpoint::parse)]
    pub endpoint: Option<Endpoint>,
}

/// Takes a snapshot and prints what it covers.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: SnapshotArgs) -> Result<(), CliError> {
    let taken = common.client()?.take_snapshot(args.endpoint.as_ref()).await?;
    let printed = match common.output {
        Format::Table => output::line(&format!("a snapshot covers entries up to {taken}")),
        Format::Json => output::json(&json!({ "term": taken.term, "index": taken.index })),
    };
    output::after("a snapshot was taken", printed)
}
