//! `quorate put`.

use std::io::Read;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{CliError, Common, Format, ScopeArgs, output};

/// Arguments of `quorate put`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate put greeting hello\n  quorate put logo --file logo.png\n  date | quorate put now -"
)]
pub struct PutArgs {
    /// The key
    pub key: String,
    /// Its new value; `-` reads it from standard input
    #[arg(required_unless_present = "file", allow_hyphen_values = true)]
    pub value: Option<String>,
    /// Read the value from a file
    #[arg(long, value_name = "PATH", conflicts_with = "value")]
    pub file: Option<PathBuf>,
    /// Whose key
    #[command(flatten)]
    pub scope: ScopeArgs,
}

/// Sets the key and prints its revision.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: PutArgs) -> Result<(), CliError> {
    let scope = args.scope.scope();
    let key = args.key.clone();
    let value = read_value(args)?;
    let reply = common.client()?.put(&scope, key, value).await?;
    match common.output {
        Format::Table => output::line(&format!("revision {}, version {}", reply.revision, reply.version)),
        Format::Json => output::json(&json!({
            "revision": reply.revision,
            "create_revision": reply.create_revision,
            "version": reply.version,
            "node_id": reply.header.node_id,
        })),
    }
}

fn read_value(args: PutArgs) -> Result<Vec<u8>, CliError> {
    if let Some(path) = args.file {
        return std::fs::read(&path).map_err(|source| CliError::Input { path, source });
    }
    match args.value.as_deref() {
        Some("-") => {
            let mut value = Vec::new();
            let read = std::io::stdin().lock().read_to_end(&mut value);
            read.map_err(|source| CliError::Input { path: "-".into(), source })?;
            Ok(value)
        }
        Some(value) => Ok(value.as_bytes().to_vec()),
        None => Ok(Vec::new()),
    }
}
