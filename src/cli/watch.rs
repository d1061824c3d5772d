//! `quorate watch`.

use std::io;

use bytes::Bytes;
use clap::Args;
use futures::StreamExt;
use serde_json::{Map, Value};

use super::follow::Whereabouts;
use super::input::{self, KeyFlags};
use super::{CliError, Common, Format, ScopeArgs, output, read};
use crate::kv::client::{EventKind, Range, ReadPreference, Watch, WatchEvent};
use crate::types::Bookmark;

/// Arguments of `quorate watch`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate watch greeting\n  quorate watch --prefix user/ --from 1\n  quorate watch --all -o json | jq -r .key\n\nPrints one line for each change, in order, nothing left out: revision, what happened, key, value; with -o json one object per line. Goes on at another node when the one it reads from fails, and says on standard error when it loses its cluster and when it has it back. Ends with Ctrl-C (exit code 0), when no node answers at its beginning within --timeout (exit code 2), or when no node's history reaches back to where it stood (exit code 1)."
)]
pub struct WatchArgs {
    /// The key, or with --prefix the beginning of the keys; left out with --all, --key-base64 or --key-file
    #[arg(value_parser = input::argument(), required_unless_present_any = ["all", "key_base64", "key_file"])]
    pub key: Option<Bytes>,
    /// Watch all keys that begin with KEY; an empty KEY means all keys, as --all does
    #[arg(long)]
    pub prefix: bool,
    /// Watch all keys of the collection
    #[arg(long, conflicts_with_all = ["key", "prefix", "key_base64", "key_file"])]
    pub all: bool,
    /// Other ways to give the key
    #[command(flatten)]
    pub key_flags: KeyFlags,
    /// Begin at this revision; without it, with the next change. Of another cluster's history, it is refused
    #[arg(long, value_name = "REVISION[@HISTORY]", value_parser = read::parse_revision)]
    pub from: Option<Bookmark>,
    /// Whose keys
    #[command(flatten)]
    pub scope: ScopeArgs,
}

impl WatchArgs {
    fn range(&self) -> Result<Range, CliError> {
        if self.all {
            return Ok(Range::all());
        }
        let key = self.key_flags.resolve("the key", self.key.clone())?;
        match (self.prefix, key.is_empty()) {
            (true, _) => Ok(Range::prefix(key)),
            (false, false) => Ok(Range::key(key)),
            // Nothing would ever be reported.
            (false, true) => Err(CliError::Usage(
                "the key is empty, and no key can be: --all watches every key of the collection".to_owned(),
            )),
        }
    }
}

/// Prints changes until it is told to stop.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: WatchArgs) -> Result<(), CliError> {
    let range = args.range()?;
    // Followers have less to do than the leader; a watch is the same at all of them.
    let client = common.client()?.preferring(ReadPreference::Any);
    let watching = async {
        let watch = client.watch(&args.scope.scope(), range, args.from).await?;
        print(watch, common.output).await
    };
    tokio::select! {
        ended = watching => ended,
        () = output::unread() => Err(CliError::Output(io::ErrorKind::BrokenPipe.into())),
        stop = tokio::signal::ctrl_c() => stop.map_err(CliError::Signals),
    }
}

async fn print(mut watch: Watch, format: Format) -> Result<(), CliError> {
    let mut contacts = watch.contacts();
    let mut whereabouts = Whereabouts::default();
    loop {
        tokio::select! {
            event = watch.next() => {
                let Some(event) = event else { return Ok(()) };
                let event = event?;
                match format {
                    Format::Table => output::line(&line(&event))?,
                    Format::Json => {
                        let mut object = object(&event);
                        object.insert("history".to_owned(), watch.resume_from().history.to_string().into());
                        output::json_line(&object)?;
                    }
                }
            }
            Some(contact) = contacts.changed() => whereabouts.tell(format, contact),
        }
    }
}

fn name(kind: EventKind) -> &'static str {
    match kind {
        EventKind::Put => "put",
        EventKind::Delete => "delete",
        EventKind::Expire => "expire",
    }
}

fn line(event: &WatchEvent) -> String {
    let (revision, key) = (event.revision, output::printable(&event.item.key));
    match event.kind {
        EventKind::Put => format!("{revision}  put     {key}  {}", output::printable(&event.item.value)),
        kind => format!("{revision}  {:<6}  {key}", name(kind)),
    }
}

fn object(event: &WatchEvent) -> Map<String, Value> {
    let mut object = match event.kind {
        EventKind::Put => output::item_object(&event.item),
        EventKind::Delete | EventKind::Expire => {
            let mut object = Map::new();
            output::insert_bytes(&mut object, "key", &event.item.key);
            object
        }
    };
    object.insert("event".to_owned(), name(event.kind).into());
    object.insert("revision".to_owned(), event.revision.into());
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::client::Item;

    #[test]
    fn an_event_is_one_line() {
        let item = Item { key: "a\nb".into(), value: "v".into(), version: 2, ..Item::default() };
        let put = WatchEvent { kind: EventKind::Put, revision: 7, item: item.clone() };
        assert_eq!(line(&put), "7  put     a\\nb  v");
        let gone = WatchEvent { kind: EventKind::Expire, revision: 8, item };
        assert_eq!(line(&gone), "8  expire  a\\nb");
        let json = serde_json::to_string(&object(&gone)).unwrap();
        assert_eq!(json, "{\"event\":\"expire\",\"key\":\"a\\nb\",\"revision\":8}");
    }
}
