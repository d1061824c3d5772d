//! `quorate range`.

use bytes::Bytes;
use clap::Args;
use futures::StreamExt;
use serde_json::{Map, Value};

use super::read::ReadArgs;
use super::{CliError, Common, Format, ScopeArgs, output};
use crate::client::{Item, Range, end_of_prefix};
use crate::shown::Shown;

/// Arguments of `quorate range`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate range                       all keys, in order\n  quorate range user/100 user/200     from user/100, before user/200\n  quorate range --prefix user/ --limit 10\n  quorate range --all -o json | wc -l  every key, from one point in time, one object per line\n\nWithout --all the answer is read in pages: writes between two pages show."
)]
pub struct RangeArgs {
    /// The first key; without it, from the beginning
    #[arg(default_value = "", hide_default_value = true)]
    pub start: String,
    /// The first key that is not listed any more; without it, to the end
    pub end: Option<String>,
    /// List the keys that begin with START
    #[arg(long, conflicts_with = "end")]
    pub prefix: bool,
    /// List at most this many
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
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
    if args.all {
        return stream(common, &args).await;
    }
    let (items, next) = read(common, &args).await?;
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
            if let Some(remark) = from_there_on(&args.range(), args.prefix) {
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
async fn read(common: &Common, args: &RangeArgs) -> Result<(Vec<Item>, Option<Bytes>), CliError> {
    let client = args.read.prefer(&common.client()?).await;
    let scope = args.scope.scope();
    let Range { mut start, end, .. } = args.range();
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
async fn stream(common: &Common, args: &RangeArgs) -> Result<(), CliError> {
    let client = args.read.prefer(&common.client()?).await;
    let mut items = client.range_stream(&args.scope.scope(), args.range(), args.read.options()).await?;
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
    fn range(&self) -> Range {
        let start = Bytes::from(self.start.clone());
        let end = match &self.end {
            Some(end) => Bytes::from(end.clone()),
            None if self.prefix => end_of_prefix(&start),
            None => Bytes::new(),
        };
        Range { start, end, limit_items: 0 }
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
mod remarks {
    use super::*;

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
