//! `quorate put`.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::{Map, Value};

use super::read;
use super::write::{self, WriteArgs};
use super::{CliError, Common, Format, ScopeArgs, output, parse_time};
use crate::client::{Client, Compare, WriteOptions};
use crate::types::{AckLevel, Bookmark, HistoryEpoch};

/// Arguments of `quorate put`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate put greeting hello\n  quorate put logo --file logo.png\n  date | quorate put now -\n  quorate put lock me --if-absent --ttl 30s\n  quorate put greeting hi --if-revision 42\n  quorate put greeting hi --ack all\n\nThe write is applied at most once, however often it had to be sent. Exits with 4 when a condition does not hold, and with 5 when it is not known whether the value was written."
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
    /// Remove the key after this long, unless it is written again
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub ttl: Option<Duration>,
    /// Only if the key does not exist
    #[arg(long, conflicts_with = "if_revision")]
    pub if_absent: bool,
    /// Only if the key's last put was at this revision
    #[arg(long, value_name = "REVISION[@HISTORY]", value_parser = read::parse_revision)]
    pub if_revision: Option<Bookmark>,
    /// When it counts as done
    #[command(flatten)]
    pub write: WriteArgs,
    /// Whose key
    #[command(flatten)]
    pub scope: ScopeArgs,
}

impl PutArgs {
    fn options(&self) -> WriteOptions {
        let history = self.if_revision.map_or(HistoryEpoch::UNKNOWN, |revision| revision.history);
        let options = self.write.options().with_history(history);
        self.ttl.map_or(options, |ttl| options.with_ttl(ttl))
    }

    fn condition(&self) -> Option<Compare> {
        match self.if_revision {
            Some(revision) => Some(Compare::mod_revision(self.key.clone()).equals(revision.index)),
            None => self.if_absent.then(|| Compare::missing(self.key.clone())),
        }
    }
}

/// Sets the key and prints its revision.
///
/// # Errors
/// [`CliError::ConditionFailed`] when a condition does not hold; others see [`CliError`].
pub async fn run(common: &Common, args: PutArgs) -> Result<(), CliError> {
    common.with_client(async |client| put(client, common, args).await).await
}

async fn put(client: &Client, common: &Common, args: PutArgs) -> Result<(), CliError> {
    let (scope, options, condition) = (args.scope.scope(), args.options(), args.condition());
    let key = args.key.clone();
    let value = read_value(args)?;
    if let Some(condition) = condition {
        let reply = client.put_when(&scope, condition, key.clone(), value, options).await?;
        if !reply.succeeded {
            return Err(CliError::ConditionFailed {
                key,
                current_revision: reply.current.map(|item| item.mod_revision),
            });
        }
        return match common.output {
            Format::Table => output::line(&format!("revision {}", reply.revision)),
            Format::Json => {
                let mut object = Map::from_iter([("revision".to_owned(), reply.revision.into())]);
                write::insert_header(&mut object, &reply.header);
                output::json(&object)
            }
        };
    }
    let reply = client.put_with(&scope, key, value, options).await?;
    let applied = reply.header.ack != AckLevel::Leader;
    match common.output {
        Format::Table if applied => {
            output::line(&format!("revision {}, version {}", reply.revision, reply.version))
        }
        Format::Table => output::line(&write::not_applied(&reply.header)),
        Format::Json => {
            let known = |number: u64| if applied { Value::from(number) } else { Value::Null };
            let mut object = Map::from_iter([
                ("revision".to_owned(), known(reply.revision)),
                ("create_revision".to_owned(), known(reply.create_revision)),
                ("version".to_owned(), known(reply.version)),
            ]);
            write::insert_header(&mut object, &reply.header);
            output::json(&object)
        }
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
