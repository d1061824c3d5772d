//! `quorate range`.

use bytes::Bytes;
use clap::Args;
use futures::StreamExt;
use serde_json::{Map, Value};

use super::input::{self, KeyFlags};
use super::read::ReadArgs;
use super::{CliError, Common, Format, ScopeArgs, output};
use crate::kv::client::{Item, Range};
use crate::shown::Shown;

/// Arguments of `quorate range`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate range                       all keys, in order\n  quorate range user/100 user/200     from user/100, before user/200\n  quorate range --prefix user/ --limit 10\n  quorate range --all -o json | wc -l  every key, from one point in time, one object per line\n\nWithout --all the answer is read in pages: writes between two pages show."
)]
pub struct RangeArgs {
    /// The first key; without it, from the beginning
    #[arg(value_parser = input::argument())]
    pub start: Option<Bytes>,
    /// The first key that is not listed any more; without it, to the end
    #[arg(value_parser = input::argument())]
    pub end: Option<Bytes>,
    /// END in base64
    #[arg(long, value_name = "BASE64", value_parser = input::parse_base64, conflicts_with = "end")]
    pub end_base64: Option<Bytes>,
    /// List the keys that begin with START
    #[arg(long, conflicts_with_all = ["end", "end_base64"])]
    pub prefix: bool,
    /// Other ways to give START
    #[command(flatten)]
    pub key_flags: KeyFlags,
    /// List at most this many
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..), allow_negative_numbers = true)]
    pub limit: u32,
    /// List all, however many, as they were at one moment; with -o json one object per line
    #[arg(long, conflicts_with = "limit")]
    pub all: bool,
    /// How fresh, and from where
    #[command(flatten)]
    pub read: ReadArgs,
    /// Whose keys
    #[command(flatten)]
    pub scope: ScopeArgs,
}

/// Lists keys and values.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: RangeArgs) -> Result<(), CliError> {
    let range = args.range()?;
    if args.all {
        return stream(common, &args, range).await;
    }
    let remark = from_there_on(&range, args.prefix);
    let (items, next) = read(common, &args, range).await?;
    match common.output {
        Format::Table => {
            let rows: Vec<_> = items.iter().map(row).collect();
            output::raw(output::table(&["KEY", "VALUE", "REVISION", "VERSION"], &rows).as_bytes())?;
            if let Some(next) = next {
                output::remark(&format!(
                    "there are more: go on from {}, or allow more with --limit",
                    output::printable(&next)
                ));
            }
            if let Some(remark) = remark {
                output::remark(&remark);
            }
            Ok(())
        }
        Format::Json => {
            let mut object = Map::new();
            let items = items.iter().map(|item| Value::Object(output::item_object(item)));
            object.insert("items".to_owned(), items.collect());
            match next {
                Some(next) => output::insert_bytes(&mut object, "next", &next),
                None => drop(object.insert("next".to_owned(), Value::Null)),
            }
            output::json(&object)
        }
    }
}

/// Reads page by page up to the limit. Each page is a read of its own: writes between two of them show.
async fn read(
    common: &Common,
    args: &RangeArgs,
    range: Range,
) -> Result<(Vec<Item>, Option<Bytes>), CliError> {
    let client = args.read.prefer(&common.client()?).await;
    let scope = args.scope.scope();
    let Range { mut start, end, .. } = range;
    let mut items = Vec::new();
    let mut left = args.limit;
    loop {
        let range = Range { start: start.clone(), end: end.clone(), limit_items: left };
        let page = client.range(&scope, range, args.read.options()).await?;
        left = left.saturating_sub(u32::try_from(page.items.len()).unwrap_or(u32::MAX));
        items.extend(page.items);
        match page.next {
            // A server that does not move on would keep us here for ever.
            Some(next) if left > 0 && next > start => start = next,
            next => return Ok((items, next)),
        }
    }
}

/// Prints item by item, so that the memory it takes does not grow with the answer.
async fn stream(common: &Common, args: &RangeArgs, range: Range) -> Result<(), CliError> {
    let client = args.read.prefer(&common.client()?).await;
    let mut items = client.range_stream(&args.scope.scope(), range, args.read.options()).await?;
    while let Some(item) = items.next().await {
        let item = item?;
        match common.output {
            Format::Table => output::line(&row(&item).join("  "))?,
            Format::Json => output::json_line(&output::item_object(&item))?,
        }
    }
    Ok(())
}

impl RangeArgs {
    /// With a flag for START, the first argument is END.
    fn range(&self) -> Result<Range, CliError> {
        let (start, end) = match self.key_flags.is_given() {
            true if self.end.is_some() => (self.start.clone(), self.end.clone()),
            true => (None, self.start.clone()),
            false => (Some(self.start.clone().unwrap_or_default()), self.end.clone()),
        };
        let start = self.key_flags.resolve("START", start)?;
        let end = match (end, &self.end_base64) {
            (Some(_), Some(_)) => {
                return Err(CliError::Usage("END is given twice: as an argument and by a flag".to_owned()));
            }
            (Some(_), None) if self.prefix => {
                return Err(CliError::Usage(
                    "--prefix lists what begins with START: not with END".to_owned(),
                ));
            }
            (None, None) if self.prefix => return Ok(Range::prefix(start)),
            (None, None) => return Ok(Range { start, ..Range::default() }),
            (Some(end), None) => end,
            (None, Some(end)) => end.clone(),
        };
        match end.is_empty() {
            true => Err(CliError::Usage(
                "END is empty, and no key comes before that: leave it out to list to the end".to_owned(),
            )),
            false => Ok(Range { start, end, limit_items: 0 }),
        }
    }
}

/// What a START alone means: it looks like the beginning of the keys that are wanted.
fn from_there_on(range: &Range, prefix: bool) -> Option<String> {
    let alone = !prefix && !range.start.is_empty() && range.end.is_empty();
    alone.then(|| {
        let start = output::printable(&range.start);
        let start = Shown(&start);
        format!("these are the keys from {start} on, to the end of the collection; --prefix lists only those that begin with {start}")
    })
}

fn row(item: &Item) -> Vec<String> {
    vec![
        output::printable(&item.key),
        output::printable(&item.value),
        item.mod_revision.to_string(),
        item.version.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, parse};

    fn range(args: &[&str]) -> Result<Range, CliError> {
        match parse([&["quorate", "range"], args].concat()).unwrap().command {
            Command::Range(range) => range.range(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn both_ends_can_be_any_bytes_and_the_second_is_not_empty_by_accident() {
        let between = |start: &'static [u8], end: &'static [u8]| Range {
            start: start.into(),
            end: end.into(),
            limit_items: 0,
        };
        for (args, expected) in [
            (&[][..], Range::all()),
            (&["a"], between(b"a", b"")),
            (&["a", "b"], between(b"a", b"b")),
            (&["", "b"], between(b"", b"b")),
            (&["--prefix", "a"], between(b"a", b"b")),
            (&["--prefix", "--key-base64", "/w=="], between(b"\xff", b"")),
            (&["--key-base64", "/gA=", "\u{7f}"], between(b"\xfe\0", b"\x7f")),
            (&["a", "--end-base64", "/w=="], between(b"a", b"\xff")),
        ] {
            assert_eq!(range(args).unwrap(), expected, "{args:?}");
        }
        for args in [
            &["a", ""][..],
            &["a", "--end-base64", ""],
            &["--key-base64", "/w==", "a", "b"],
            &["--key-base64", "/w==", "a", "--end-base64", "/w=="],
            &["--key-base64", "/w==", "a", "--prefix"],
        ] {
            assert!(matches!(range(args), Err(CliError::Usage(_))), "{args:?}");
        }
    }

    #[test]
    fn a_start_alone_is_explained() {
        let range = |start: &'static str, end: &'static str| Range {
            start: start.into(),
            end: end.into(),
            limit_items: 0,
        };
        let remark = from_there_on(&range("he", ""), false).unwrap();
        assert!(remark.contains("from he on") && remark.contains("--prefix"), "{remark}");
        for (range, prefix) in [(range("", ""), false), (range("a", "b"), false), (range("he", "hf"), true)] {
            assert_eq!(from_there_on(&range, prefix), None);
        }
        assert_eq!(from_there_on(&range("\u{10ffff}", ""), true), None, "nothing is after that prefix");
    }
}
