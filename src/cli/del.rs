//! `quorate del`.

use clap::Args;
use serde_json::{Map, Value};

use super::write::{self, WriteArgs};
use super::{CliError, Common, Format, ScopeArgs, output};
use crate::client::{Client, Header, Range};
use crate::types::AckLevel;

/// Arguments of `quorate del`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate del greeting\n  quorate del --prefix user/\n\nExits with 4 when the key does not exist. With --prefix many keys are removed in several pieces; if one fails, those before it are done; there may be none."
)]
pub struct DelArgs {
    /// The key
    pub key: String,
    /// Remove all keys that begin with KEY
    #[arg(long)]
    pub prefix: bool,
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
    let (scope, options) = (args.scope.scope(), args.write.options());
    if args.prefix {
        return delete_prefix(client, common, &args).await;
    }
    let reply = client.delete_with(&scope, args.key.clone(), options).await?;
    let applied = reply.header.ack != AckLevel::Leader;
    let missing = applied && !reply.deleted;
    match common.output {
        Format::Table if missing => Ok(()),
        Format::Table if applied => output::line("deleted"),
        Format::Table => output::line(&write::not_applied(&reply.header)),
        Format::Json => {
            let deleted = if applied { Value::from(reply.deleted) } else { Value::Null };
            print(deleted, applied, &reply.header)
        }
    }?;
    if missing { Err(CliError::NotFound { key: args.key }) } else { Ok(()) }
}

async fn delete_prefix(client: &Client, common: &Common, args: &DelArgs) -> Result<(), CliError> {
    let (scope, range) = (args.scope.scope(), Range::prefix(args.key.clone()));
    if args.write.options().ack == AckLevel::Leader {
        return Err(CliError::Usage(
            "--prefix must know how many keys were removed: not with --ack leader".to_owned(),
        ));
    }
    let mut deleted = 0;
    let last = loop {
        let piece = client.delete_range(&scope, range.clone(), args.write.options()).await?;
        deleted += piece.deleted;
        if !piece.more || piece.deleted == 0 {
            break piece;
        }
    };
    match common.output {
        Format::Table => output::line(&format!("deleted {deleted}")),
        Format::Json => print(deleted.into(), true, &last.header),
    }
}

fn print(deleted: Value, applied: bool, header: &Header) -> Result<(), CliError> {
    let revision = header.position.filter(|_| applied).map(|position| position.index);
    let mut object =
        Map::from_iter([("deleted".to_owned(), deleted), ("revision".to_owned(), revision.into())]);
    write::insert_header(&mut object, header);
    output::json(&object)
}
