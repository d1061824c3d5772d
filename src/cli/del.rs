//! `quorate del`.

use bytes::Bytes;
use clap::Args;
use serde_json::{Map, Value};

use super::input::{self, KeyFlags};
use super::write::{self, WriteArgs};
use super::{CliError, Common, Format, ScopeArgs, output};
use crate::kv::client::{Client, Header, Range};
use crate::types::AckLevel;

/// Arguments of `quorate del`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate del greeting\n  quorate del --prefix user/\n  quorate del --all --collection drafts   every key of the collection\n\nExits with 4 when the key does not exist. With --prefix or --all many keys are removed in several pieces; if one fails, those before it are done, and counted before the failure is told; there may be none."
)]
pub struct DelArgs {
    /// The key; left out with --all, --key-base64 or --key-file
    #[arg(value_parser = input::argument(), required_unless_present_any = ["all", "key_base64", "key_file"])]
    pub key: Option<Bytes>,
    /// Remove all keys that begin with KEY, which must not be empty
    #[arg(long)]
    pub prefix: bool,
    /// Remove every key of the collection
    #[arg(long, conflicts_with_all = ["key", "prefix", "key_base64", "key_file"])]
    pub all: bool,
    /// Other ways to give the key
    #[command(flatten)]
    pub key_flags: KeyFlags,
    /// When it counts as done
    #[command(flatten)]
    pub write: WriteArgs,
    /// Whose key
    #[command(flatten)]
    pub scope: ScopeArgs,
}

/// Removes the key and prints that it did.
///
/// # Errors
/// [`CliError::NotFound`] when it does not exist; others see [`CliError`].
pub async fn run(common: &Common, args: DelArgs) -> Result<(), CliError> {
    common.with_client(async |client| delete(client, common, args).await).await
}

async fn delete(client: &Client, common: &Common, args: DelArgs) -> Result<(), CliError> {
    if args.all {
        return delete_many(client, common, &args, Range::all()).await;
    }
    let (scope, options) = (args.scope.scope(), args.write.options());
    let key = args.key_flags.resolve("the key", args.key.clone())?;
    match (key.is_empty(), args.prefix) {
        (true, true) => {
            return Err(CliError::Usage(
                "the prefix is empty, and every key begins with it: --all removes every key of the collection"
                    .to_owned(),
            ));
        }
        (true, false) => {
            return Err(CliError::Usage(
                "the key is empty, and no key is: --all removes every key of the collection".to_owned(),
            ));
        }
        (false, true) => return delete_many(client, common, &args, Range::prefix(key)).await,
        (false, false) => {}
    }
    let reply = client.delete_with(&scope, key.clone(), options).await?;
    let applied = reply.header.ack != AckLevel::Leader;
    let missing = applied && !reply.deleted;
    let printed = match common.output {
        Format::Table if missing => Ok(()),
        Format::Table if applied => output::line("deleted"),
        Format::Table => output::line(&write::not_applied(&reply.header)),
        Format::Json => {
            let deleted = if applied { Value::from(reply.deleted) } else { Value::Null };
            print(deleted, applied, &reply.header)
        }
    };
    if missing { printed } else { output::after(write::done(&reply.header), printed) }?;
    if missing { Err(CliError::NotFound { key: output::printable(&key) }) } else { Ok(()) }
}

/// Removes the keys of `range`, in as many pieces as it takes.
async fn delete_many(client: &Client, common: &Common, args: &DelArgs, range: Range) -> Result<(), CliError> {
    let scope = args.scope.scope();
    if args.write.options().ack == AckLevel::Leader {
        return Err(CliError::Usage(
            "how many keys were removed must be known before the next ones can be: not with --ack leader"
                .to_owned(),
        ));
    }
    let (mut deleted, mut header) = (0, Header::default());
    let failed = loop {
        match client.delete_range(&scope, range.clone(), args.write.options()).await {
            Ok(piece) => {
                deleted += piece.deleted;
                header = piece.header;
                if !piece.more || piece.deleted == 0 {
                    break None;
                }
            }
            Err(error) if deleted == 0 => return Err(error.into()),
            Err(error) => break Some(client.after_part(error)),
        }
    };
    let printed = match common.output {
        Format::Table => output::line(&format!("deleted {deleted}")),
        Format::Json => print(deleted.into(), true, &header),
    };
    if let Some(error) = failed {
        return Err(error.into());
    }
    if deleted == 0 { printed } else { output::after("the keys were removed", printed) }
}

fn print(deleted: Value, applied: bool, header: &Header) -> Result<(), CliError> {
    let revision = header.position.filter(|_| applied).map(|position| position.index);
    let mut object =
        Map::from_iter([("deleted".to_owned(), deleted), ("revision".to_owned(), revision.into())]);
    write::insert_header(&mut object, header);
    output::json(&object)
}
