//! `quorate get`.

use bytes::Bytes;
use clap::Args;

use super::input::{self, KeyFlags};
use super::read::ReadArgs;
use super::{CliError, Common, Format, ScopeArgs, output};

/// Arguments of `quorate get`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate get greeting\n  quorate get logo > logo.png\n  quorate get --key-base64 /wA= -o json\n  quorate get greeting -o json\n  quorate get greeting --level bounded:500 --prefer nearest\n  quorate get greeting --local --after 42      what the put at revision 42 wrote, from any node\n\nPrints the value as it is; with -o json an object whose value is in \"value\", or in \"value_base64\" when it is not UTF-8. Exits with 4 when the key does not exist."
)]
pub struct GetArgs {
    /// The key; left out with --key-base64 or --key-file
    #[arg(value_parser = input::argument(), required_unless_present_any = ["key_base64", "key_file"])]
    pub key: Option<Bytes>,
    /// Other ways to give the key
    #[command(flatten)]
    pub key_flags: KeyFlags,
    /// How fresh, and from where
    #[command(flatten)]
    pub read: ReadArgs,
    /// Whose key
    #[command(flatten)]
    pub scope: ScopeArgs,
}

/// Prints the value.
///
/// # Errors
/// [`CliError::NotFound`] when there is none; others see [`CliError`].
pub async fn run(common: &Common, args: GetArgs) -> Result<(), CliError> {
    let key = args.key_flags.key(args.key)?;
    let client = args.read.prefer(&common.client()?).await;
    let reply = client.get(&args.scope.scope(), key.clone(), args.read.options()).await?;
    let Some(item) = reply.item else {
        return Err(CliError::NotFound { key: output::printable(&key) });
    };
    match common.output {
        Format::Table => output::value(&item.value),
        Format::Json => {
            let mut object = output::item_object(&item);
            object.insert("node_id".to_owned(), reply.header.node_id.into());
            object.insert("bookmark".to_owned(), reply.header.bookmark().to_string().into());
            output::json(&object)
        }
    }
}
