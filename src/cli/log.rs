//! `quorate log`.

use clap::Args;
use serde_json::{Map, Value};

use super::follow::{self, FilterArgs};
use super::{CliError, Common, Format, output};
use crate::kv::client::{Client, ClientError, EntriesPage, ReadPreference};
use crate::types::Bookmark;

/// Arguments of `quorate log`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate log                         the earliest that is kept\n  quorate log --after 42 --limit 10\n  quorate log --after 42 --tenant acme --collection orders -o json\n\nShows what was applied: position in the log, when it was proposed, what happened, to which key. The entries of one transaction have the same position. `quorate subscribe` goes on with what comes."
)]
pub struct LogArgs {
    /// Begin after this position; without it, with the earliest that is kept. Of another cluster's history, it is refused
    #[arg(long, value_name = "POSITION[@HISTORY]")]
    pub after: Option<Bookmark>,
    /// Show at most the entries of this many positions
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..), allow_negative_numbers = true)]
    pub limit: u32,
    /// Which entries
    #[command(flatten)]
    pub filters: FilterArgs,
}

/// Shows entries.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: LogArgs) -> Result<(), CliError> {
    // Followers have less to do than the leader.
    let client = common.client()?.preferring(ReadPreference::Any);
    let EntriesPage { entries, upto, more, .. } = read(&client, &args).await?;
    match common.output {
        Format::Table => {
            let rows: Vec<_> = entries.iter().map(follow::cells).collect();
            output::raw(output::table(&follow::HEADINGS, &rows).as_bytes())?;
            if more {
                output::remark(&format!(
                    "there are more: go on with --after {upto}, or allow more with --limit"
                ));
            }
            Ok(())
        }
        Format::Json => {
            let mut object = Map::new();
            let entries = entries.iter().map(|entry| Value::Object(follow::object(entry)));
            object.insert("entries".to_owned(), entries.collect());
            object.insert("upto".to_owned(), upto.index.into());
            object.insert("history".to_owned(), upto.history.to_string().into());
            object.insert("more".to_owned(), more.into());
            output::json(&object)
        }
    }
}

/// Reads page by page up to the limit.
async fn read(client: &Client, args: &LogArgs) -> Result<EntriesPage, CliError> {
    let filters = &args.filters.filters;
    let mut left = args.limit;
    let first = match client.entries_after(args.after.unwrap_or_default(), left, filters).await {
        Err(ClientError::Compacted { first_revision }) if args.after.is_none() => {
            client.entries_after(first_revision.saturating_sub(1), left, filters).await
        }
        first => first,
    };
    let mut all = first?;
    left = left.saturating_sub(positions(&all));
    while all.more && left > 0 {
        let page = client.entries_after(all.upto, left, filters).await?;
        if page.upto.index <= all.upto.index {
            let message = format!(
                "the entries of position {} do not fit into one answer: read them with `quorate subscribe --after {}`",
                all.upto.index + 1,
                all.upto
            );
            return Err(CliError::Usage(message));
        }
        left = left.saturating_sub(positions(&page));
        let EntriesPage { entries, upto, more, .. } = page;
        all.entries.extend(entries);
        (all.upto, all.more) = (upto, more);
    }
    Ok(all)
}

/// How many positions a page is about.
fn positions(page: &EntriesPage) -> u32 {
    let positions = page.entries.chunk_by(|one, next| one.seq == next.seq).count();
    u32::try_from(positions).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, parse};
    use crate::kv::client::tests::fake::{Fake, leader};
    use crate::kv::client::tests::replica::{because, entry, entry_of};
    use crate::kv::client::{ClientConfig, Reason};
    use crate::proto::replication::{EntriesResponse, WalEntryProto};

    async fn read_at(fake: &Fake, args: &[&str]) -> Result<EntriesPage, CliError> {
        let Command::Log(args) = parse([&["quorate", "log"], args].concat()).unwrap().command else {
            panic!("another command")
        };
        let client = Client::new([fake.endpoint()], ClientConfig::default()).unwrap();
        read(&client, &args).await
    }

    #[tokio::test]
    async fn pages_are_read_up_to_the_limit() {
        let node = Fake::start(leader);
        let page = |entries: Vec<WalEntryProto>, upto_seq, more| {
            Ok(EntriesResponse { entries, upto_seq, more, history: 0xabc })
        };
        node.replica().set_looks([
            (0, Err(because(Reason::Compacted, 5))),
            (4, page(vec![entry_of("a", 5, true), entry_of("b", 5, false)], 5, true)),
            (5, page(vec![], 90, true)),
            (90, page(vec![entry(91)], 91, true)),
            (91, page(vec![entry(92)], 92, false)),
            (200, page(vec![entry_of("a", 201, true)], 200, true)),
        ]);
        let seqs = |page: &EntriesPage| page.entries.iter().map(|entry| entry.seq).collect::<Vec<_>>();
        let all = read_at(&node, &[]).await.unwrap();
        assert_eq!((seqs(&all), all.upto.index, all.more), (vec![5, 5, 91, 92], 92, false));
        assert_eq!(node.replica().looked().last().unwrap().limit, 998);
        let some = read_at(&node, &["--after", "4@abc", "--limit", "2"]).await.unwrap();
        assert_eq!((seqs(&some), some.upto.index, some.more), (vec![5, 5, 91], 91, true));
        // Who names the beginning wants that one.
        let gone = read_at(&node, &["--after", "0"]).await.unwrap_err();
        assert_eq!(gone.reason(), Reason::Compacted);
        let divided = read_at(&node, &["--after", "200"]).await.unwrap_err();
        assert!(divided.to_string().contains("position 201 do not fit"), "{divided}");
    }
}
