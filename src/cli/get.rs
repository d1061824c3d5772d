//! `quorate get`.

use clap::Args;

use super::{CliError, Common, Format, ScopeArgs, output};
use crate::types::ReadLevel;

/// Arguments of `quorate get`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate get greeting\n  quorate get logo > logo.png\n  quorate get greeting -o json\n\nPrints the value as it is; with -o json an object whose value is in \"value\", or in \"value_base64\" when it is not UTF-8. Exits with 1 when the key does not exist."
)]
pub struct GetArgs {
    /// The key
    pub key: String,
    /// Read from any node what it has applied so far, which may be old
    #[arg(long)]
    pub local: bool,
    /// Whose key
    #[command(flatten)]
    pub scope: ScopeArgs,
}

/// The read level that `--local` asks for.
pub(super) fn level(local: bool) -> ReadLevel {
    if local { ReadLevel::Local } else { ReadLevel::Linearizable }
}

/// Prints the value.
///
/// # Errors
/// [`CliError::NotFound`] when there is none; others see [`CliError`].
pub async fn run(common: &Common, args: GetArgs) -> Result<(), CliError> {
    let reply = common.client()?.get(&args.scope.scope(), args.key.clone(), level(args.local)).await?;
    let Some(item) = reply.item else {
        return Err(CliError::NotFound { key: args.key });
    };
    match common.output {
        Format::Table => output::value(&item.value),
        Format::Json => {
            let mut object = output::item_object(&item);
            object.insert("node_id".to_owned(), reply.header.node_id.into());
            output::json(&object)
        }
    }
}
