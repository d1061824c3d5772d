//! `quorate del`.

use clap::Args;
use serde_json::json;

use super::{CliError, Common, Format, ScopeArgs, output};

/// Arguments of `quorate del`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate del greeting\n\nRemoving a key that does not exist is no error; the output says whether it existed."
)]
pub struct DelArgs {
    /// The key
    pub key: String,
    /// Whose key
    #[command(flatten)]
    pub scope: ScopeArgs,
}

/// Removes the key and prints whether it existed.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: DelArgs) -> Result<(), CliError> {
    let reply = common.client()?.delete(&args.scope.scope(), args.key).await?;
    match common.output {
        Format::Table => output::line(if reply.deleted { "deleted" } else { "did not exist" }),
        Format::Json => output::json(&json!({
            "deleted": reply.deleted,
            "revision": reply.header.position.map(|position| position.index),
            "node_id": reply.header.node_id,
        })),
    }
}
