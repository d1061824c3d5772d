//! `quorate watch`.

use std::io;

use bytes::Bytes;
use clap::{Args, ValueEnum};
use futures::StreamExt;
use serde_json::{Map, Value};

use super::follow::Whereabouts;
use super::input::{self, KeyFlags};
use super::{CliError, Common, Format, ScopeArgs, output, read};
use crate::kv::client::{EventKind, PreviousItem, Range, ReadPreference, Watch, WatchEvent, WatchOptions};
use crate::types::Bookmark;

/// Arguments of `quorate watch`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate watch greeting\n  quorate watch --prefix user/ --from 1\n  quorate watch --prefix user/ group/ --kind delete,expire\n  quorate watch --all -o json | jq -r .key\n  quorate watch --prefix user/ --prev\n\nPrints one line for each change, in order, nothing left out: revision, what happened, key, value, and with --prev what the key held before, if it existed; with -o json one object per line. Goes on at another node when the one it reads from fails, and says on standard error when it loses its cluster and when it has it back. Ends with Ctrl-C (exit code 0), when no node answers at its beginning within --timeout (exit code 2), or when no node's history reaches back to where it stood (exit code 1)."
)]
pub struct WatchArgs {
    /// The keys, or with --prefix the beginnings of the keys, 64 at most; left out with --all, --key-base64 or --key-file
    #[arg(value_parser = input::argument(), required_unless_present_any = ["all", "key_base64", "key_file"], num_args = 1..=64)]
    pub key: Vec<Bytes>,
    /// Watch all keys that begin with KEY, or any of them; an empty KEY means all keys, as --all does
    #[arg(long, overrides_with = "prefix")]
    pub prefix: bool,
    /// Watch all keys of the collection
    #[arg(long, conflicts_with_all = ["key", "prefix", "key_base64", "key_file"])]
    pub all: bool,
    /// Other ways to give the key
    #[command(flatten)]
    pub key_flags: KeyFlags,
    /// Only what happens in these ways; may be given several times
    #[arg(long = "kind", value_name = "KIND,...", value_delimiter = ',', value_enum)]
    pub kinds: Vec<WatchedKind>,
    /// Begin at this revision; without it, with the next change. Of another cluster's history, it is refused
    #[arg(long, value_name = "REVISION[@HISTORY]", value_parser = read::parse_revision)]
    pub from: Option<Bookmark>,
    /// Also tell what the keys held before
    #[arg(long)]
    pub prev: bool,
    /// Whose keys
    #[command(flatten)]
    pub scope: ScopeArgs,
}

/// What happens to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WatchedKind {
    /// It is set
    Put,
    /// It is removed
    Delete,
    /// It is removed because its time to live is over
    Expire,
}

impl From<WatchedKind> for EventKind {
    fn from(kind: WatchedKind) -> Self {
        match kind {
            WatchedKind::Put => Self::Put,
            WatchedKind::Delete => Self::Delete,
            WatchedKind::Expire => Self::Expire,
        }
    }
}

impl WatchArgs {
    fn ranges(&self) -> Result<Vec<Range>, CliError> {
        if self.all {
            return Ok(vec![Range::all()]);
        }
        let keys = match &self.key[..] {
            [first, _, ..] => {
                // Refuses a flag beside them.
                self.key_flags.resolve("the key", Some(first.clone()))?;
                self.key.clone()
            }
            one_or_none => vec![self.key_flags.resolve("the key", one_or_none.first().cloned())?],
        };
        keys.into_iter().map(|key| self.range(key)).collect()
    }

    fn range(&self, key: Bytes) -> Result<Range, CliError> {
        match (self.prefix, key.is_empty()) {
            (true, _) => Ok(Range::prefix(key)),
            (false, false) => Ok(Range::key(key)),
            // Nothing would ever be reported.
            (false, true) => Err(CliError::Usage(
                "the key is empty, and no key can be: --all watches every key of the collection".to_owned(),
            )),
        }
    }

    fn options(&self) -> Result<WatchOptions, CliError> {
        let mut options = WatchOptions::default().kinds(self.kinds.iter().map(|kind| EventKind::from(*kind)));
        (options.ranges, options.from, options.previous) = (self.ranges()?, self.from, self.prev);
        Ok(options)
    }
}

/// Prints changes until it is told to stop.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: WatchArgs) -> Result<(), CliError> {
    let options = args.options()?;
    // Followers have less to do than the leader; a watch is the same at all of them.
    let client = common.client()?.preferring(ReadPreference::Any);
    let watching = async {
        let watch = client.watch_with(&args.scope.scope(), options).await?;
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
    let line = match event.kind {
        EventKind::Put => format!("{revision}  put     {key}  {}", output::printable(&event.item.value)),
        kind => format!("{revision}  {:<6}  {key}", name(kind)),
    };
    match &event.previous {
        Some(PreviousItem::Item(item)) => format!("{line}  (before: {})", output::printable(&item.value)),
        Some(PreviousItem::Unknown) => format!("{line}  (before: not kept any more)"),
        _ => line,
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
    if let Some(previous) = &event.previous {
        let item = match previous {
            PreviousItem::Item(item) => output::item_object(item).into(),
            _ => Value::Null,
        };
        object.insert("previous".to_owned(), item);
        object.insert("previous_unknown".to_owned(), (*previous == PreviousItem::Unknown).into());
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::client::Item;

    #[test]
    fn several_keys_and_kinds_are_one_watch() {
        #[derive(clap::Parser)]
        struct Watching {
            #[command(flatten)]
            args: WatchArgs,
        }
        let options = |args: &[&str]| {
            let parsed = <Watching as clap::Parser>::try_parse_from(["watch"].iter().chain(args));
            parsed.map_err(|error| error.to_string()).map(|parsed| parsed.args.options())
        };
        let two = options(&["--prefix", "a/", "--prefix", "b/", "--kind", "delete,expire"]).unwrap().unwrap();
        let expected = WatchOptions::of(Range::prefix("a/")).and(Range::prefix("b/"));
        assert_eq!(two, expected.kinds([EventKind::Delete, EventKind::Expire]));
        let keys = options(&["a", "b", "--from", "7"]).unwrap().unwrap();
        assert_eq!(keys, WatchOptions::of(Range::key("a")).and(Range::key("b")).from(7));
        assert_eq!(options(&["--all"]).unwrap().unwrap().ranges, [Range::all()]);
        let refused = options(&["a", "b", "--key-base64", "/w=="]).unwrap().unwrap_err();
        assert!(refused.to_string().contains("twice"), "{refused}");
        assert!(options(&["a", "--kind", "read"]).is_err());
    }

    #[test]
    fn an_event_is_one_line() {
        let item = Item { key: "a\nb".into(), value: "v".into(), version: 2, ..Item::default() };
        let put = WatchEvent { kind: EventKind::Put, revision: 7, item: item.clone(), previous: None };
        assert_eq!(line(&put), "7  put     a\\nb  v");
        let gone = WatchEvent { kind: EventKind::Expire, revision: 8, item: item.clone(), previous: None };
        assert_eq!(line(&gone), "8  expire  a\\nb");
        let json = serde_json::to_string(&object(&gone)).unwrap();
        assert_eq!(json, "{\"event\":\"expire\",\"key\":\"a\\nb\",\"revision\":8}");
        let told = |previous| WatchEvent { previous: Some(previous), ..gone.clone() };
        let [absent, unknown, known] =
            [PreviousItem::Absent, PreviousItem::Unknown, PreviousItem::Item(item)].map(told);
        assert_eq!(line(&absent), "8  expire  a\\nb");
        assert_eq!(line(&unknown), "8  expire  a\\nb  (before: not kept any more)");
        assert_eq!(line(&known), "8  expire  a\\nb  (before: v)");
        assert_eq!(object(&known)["previous"]["value"], "v");
        assert_eq!(object(&absent)["previous"], Value::Null);
        assert_eq!(object(&absent)["previous_unknown"], false);
        assert_eq!(object(&unknown)["previous_unknown"], true);
    }
}
