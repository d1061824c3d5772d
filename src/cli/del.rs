//! `quorate del`.

use bytes::Bytes;
use clap::Args;
use serde_json::{Map, Value};

use super::input::{self, KeyFlags};
use super::write::{self, WriteArgs, WriteTold};
use super::{CliError, Common, Format, ScopeArgs, output};
use crate::kv::client::{Client, DeleteRangeReply, DeleteReply, Header, Range};
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
                "the key is empty, and no key can be: --all removes every key of the collection".to_owned(),
            ));
        }
        (false, true) => return delete_many(client, common, &args, Range::prefix(key)).await,
        (false, false) => {}
    }
    let removal = client.delete_with(&scope, key.clone(), options).await;
    let (DeleteReply { header, deleted, .. }, error) = write::reply(removal, DeleteReply::unconfirmed)?;
    let applied = header.ack != AckLevel::Leader;
    let missing = applied && !deleted;
    let text = match (applied, missing) {
        (false, _) => Some(write::not_applied(&header)),
        (true, false) => Some("deleted".to_owned()),
        (true, true) => None,
    };
    let object = object(if applied { deleted.into() } else { Value::Null }, applied, &header);
    let nothing = missing.then(|| CliError::NotFound { key: output::printable(&key) });
    let text = text.map(|text| format!("{text}\n"));
    WriteTold { header, text, object, nothing }.tell(common.output, error)
}

/// Removes the keys of `range`, in as many pieces as it takes.
async fn delete_many(client: &Client, common: &Common, args: &DelArgs, range: Range) -> Result<(), CliError> {
    let scope = args.scope.scope();
    if args.write.options().ack == AckLevel::Leader {
        return Err(CliError::Usage(
            "--ack leader cannot be used here: how many keys were removed must be known before more can be"
                .to_owned(),
        ));
    }
    let (mut deleted, mut header, mut more) = (0, Header::default(), false);
    let (failed, is_told) = loop {
        let piece = client.delete_range(&scope, range.clone(), args.write.options()).await;
        match write::reply(piece, DeleteRangeReply::unconfirmed) {
            Ok((piece, unconfirmed)) => {
                deleted += piece.deleted;
                (header, more) = (piece.header, piece.more);
                if unconfirmed.is_some() || !piece.more || piece.deleted == 0 {
                    break (unconfirmed, true);
                }
            }
            Err(error) if deleted == 0 => return Err(error.into()),
            // Of its own piece nothing is known.
            Err(error) => break (Some(client.after_part(error)), false),
        }
    };
    let mut object = object(deleted.into(), true, &header);
    let text = match (&failed, more) {
        (Some(_), true) => format!("deleted {deleted}, and there are more\n"),
        _ => format!("deleted {deleted}\n"),
    };
    match failed {
        Some(error) if is_told => {
            object.insert("more".to_owned(), more.into());
            WriteTold { header, text: Some(text), object, nothing: None }.tell(common.output, Some(error))
        }
        failed => {
            let printed = match common.output {
                Format::Table => output::raw(text.as_bytes()),
                Format::Json => output::json(&object),
            };
            match failed {
                Some(error) => Err(error.into()),
                None if deleted == 0 => printed,
                None => output::after("the keys were removed", printed),
            }
        }
    }
}

fn object(deleted: Value, applied: bool, header: &Header) -> Map<String, Value> {
    let revision = header.position.filter(|_| applied).map(|position| position.index);
    let mut object =
        Map::from_iter([("deleted".to_owned(), deleted), ("revision".to_owned(), revision.into())]);
    write::insert_header(&mut object, header);
    object
}
