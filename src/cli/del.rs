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
    after_help = "Example:\n  quorate del greeting\n  quorate del --prefix user/\n\nRemoving a key that does not exist is no error; the output says whether it existed. With --prefix many keys are removed in several pieces; if one fails, those before it are done."
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

/// Removes the key and prints whether it existed.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: DelArgs) -> Result<(), CliError> {
    common.with_client(async |client| delete(client, common, args).await).await
}

async fn delete(client: &Client, common: &Common, args: DelArgs) -> Result<(), CliError> {
    let (scope, options) = (args.scope.scope(), args.write.options());
    if args.prefix {
        return delete_prefix(client, common, &args).await;
    }
    let reply = client.delete_with(&scope, args.key, options).await?;
    let applied = reply.header.ack != AckLevel::Leader;
    match common.output {
        Format::Table if applied => output::line(if reply.deleted { "deleted" } else { "did not exist" }),
        Format::Table => output::line(&write::not_applied(&reply.header)),
        Format::Json => {
            let deleted = if applied { Value::from(reply.deleted) } else { Value::Null };
            print(deleted, &reply.header)
        }
    }
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
        Format::Json => print(deleted.into(), &last.header),
    }
}

fn print(deleted: Value, header: &Header) -> Result<(), CliError> {
    let revision = header.position.map(|position| position.index);
    let mut object =
        Map::from_iter([("deleted".to_owned(), deleted), ("revision".to_owned(), revision.into())]);
    write::insert_header(&mut object, header);
    output::json(&object)
}
