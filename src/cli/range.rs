//! `quorate range`.

use bytes::Bytes;
use clap::Args;
use serde_json::{Map, Value};

use super::get::level;
use super::{CliError, Common, Format, ScopeArgs, output};
use crate::client::{Item, Range};

/// Arguments of `quorate range`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate range                       all keys, in order\n  quorate range user/100 user/200     from user/100, before user/200\n  quorate range --prefix user/ --limit 10"
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
    /// Read from any node what it has applied so far, which may be old
    #[arg(long)]
    pub local: bool,
    /// Whose keys
    #[command(flatten)]
    pub scope: ScopeArgs,
}

/// Lists keys and values.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: RangeArgs) -> Result<(), CliError> {
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
    let client = common.client()?;
    let scope = args.scope.scope();
    let mut start = Bytes::from(args.start.clone());
    let end = match &args.end {
        Some(end) => Bytes::from(end.clone()),
        None if args.prefix => end_of_prefix(&start),
        None => Bytes::new(),
    };
    let mut items = Vec::new();
    let mut left = args.limit;
    loop {
        let range = Range { start: start.clone(), end: end.clone(), limit_items: left };
        let page = client.range(&scope, range, level(args.local)).await?;
        left = left.saturating_sub(u32::try_from(page.items.len()).unwrap_or(u32::MAX));
        items.extend(page.items);
        match page.next {
            // A server that does not move on would keep us here for ever.
            Some(next) if left > 0 && next > start => start = next,
            next => return Ok((items, next)),
        }
    }
}

/// The first key after all keys that begin with `prefix`; empty when there is none.
fn end_of_prefix(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    end.into()
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

    #[test]
    fn the_end_of_a_prefix_is_the_next_key_that_does_not_have_it() {
        assert_eq!(end_of_prefix(b"user/"), "user0");
        assert_eq!(end_of_prefix(b"a\xff\xff"), "b");
        assert_eq!(end_of_prefix(b"\xff"), "");
        assert_eq!(end_of_prefix(b""), "");
    }
}
