//! `quorate subscribe`.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use clap::{ArgGroup, Args};
use futures::StreamExt;
use tokio::time::{MissedTickBehavior, interval};

use super::follow::{self, FilterArgs, Whereabouts};
use super::{CliError, Common, Format, output};
use crate::kv::client::{EntryCompression, FollowedEntry, ReadPreference, SubscribeOptions, Subscription};
use crate::runtime;
use crate::signals::StopSignals;
use crate::storage;
use crate::types::Bookmark;

/// How often the position is stored while entries come.
const STORE_EVERY: Duration = Duration::from_secs(1);
/// Or after how many entries.
const STORE_AFTER: u64 = 1000;
/// A file with a position is smaller.
const STATE_BYTES: u64 = 1024;

/// Arguments of `quorate subscribe`.
#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("from"),
    after_help = "Example:\n  quorate subscribe\n  quorate subscribe --from-beginning --tenant acme --collection orders\n  quorate subscribe --state /var/lib/mirror/position -o json | mirror\n\nPrints one line for each entry that is applied, in order, nothing left out and nothing twice: position, time, what happened, tenant, collection, key, value, and with --prev the value before; with -o json one object per line. Goes on at another node when the one it reads from fails, and says on standard error when it loses its cluster and when it has it back. With --state it goes on where it stopped: the file holds the position up to which everything was printed. If the process is killed, or the machine fails, it may print up to a second, or 1000 entries, once more. Ends with Ctrl-C or SIGTERM (exit code 0), when the reader of its output goes away, when no node answers at its beginning within --timeout (exit code 2), or when no node has what comes next (exit code 1)."
)]
pub struct SubscribeArgs {
    /// Begin after this position. Of another cluster's history, it is refused
    #[arg(long, value_name = "POSITION[@HISTORY]", group = "from")]
    pub after: Option<Bookmark>,
    /// Begin with what is written from now on, as without any of these
    #[arg(long, group = "from")]
    pub from_now: bool,
    /// Begin with the first entry that there ever was
    #[arg(long, group = "from")]
    pub from_beginning: bool,
    /// Which entries
    #[command(flatten)]
    pub filters: FilterArgs,
    /// Keep the position in this file; if it is there, go on after the one in it, whatever the other flags say
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// What the nodes call this follower where they list them
    #[arg(long, value_name = "NAME", default_value = "")]
    pub id: String,
    /// End after this many entries, and those that have the position of the last
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Also tell the value that the key had before
    #[arg(long)]
    pub prev: bool,
    /// Have what travels compressed
    #[arg(long)]
    pub compress: bool,
}

impl SubscribeArgs {
    fn options(&self, stored: Option<Bookmark>) -> SubscribeOptions {
        let mut options = match (stored.or(self.after), self.from_beginning) {
            (Some(after), _) => SubscribeOptions::after(after),
            (None, true) => SubscribeOptions::from_beginning(),
            (None, false) => SubscribeOptions::from_now(),
        };
        options.filters.clone_from(&self.filters.filters);
        options.id.clone_from(&self.id);
        options.previous = self.prev;
        options.compression = if self.compress { EntryCompression::Zstd } else { EntryCompression::None };
        options
    }
}

/// Prints entries until it is told to stop.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: SubscribeArgs) -> Result<(), CliError> {
    let mut stop = StopSignals::listen().map_err(CliError::Signals)?;
    let state = args.state.clone().map(StateFile::open).transpose()?;
    let options = args.options(state.as_ref().and_then(|state| state.stored));
    // Followers have less to do than the leader.
    let client = common.client()?.preferring(ReadPreference::Any);
    let stopped = async {
        tokio::select! {
            signal = stop.next() => {
                tracing::debug!(signal, "stopping");
                Ok(())
            }
            () = output::unread() => Err(CliError::Output(io::ErrorKind::BrokenPipe.into())),
        }
    };
    let mut stopped = pin!(stopped);
    let subscription = tokio::select! {
        subscription = client.subscribe(options) => subscription?,
        ended = &mut stopped => return ended,
    };
    let printing = Printing::new(subscription, common.output, state, output::raw);
    printing.run(args.count, stopped).await
}

/// Prints a position at a time: what was printed is then up to where the next process begins.
struct Printing<W> {
    subscription: Subscription,
    format: Format,
    state: Option<StateFile>,
    write: W,
    /// Lines of a position of which more is to come, or that could not be printed.
    lines: String,
    /// Which position, and how many lines.
    waiting: Option<(u64, u64)>,
    /// Everything up to here was printed.
    printed: u64,
    /// How many entries.
    count: u64,
    /// How many of them when the position was stored last.
    stored_at: u64,
}

impl<W: FnMut(&[u8]) -> Result<(), CliError>> Printing<W> {
    fn new(subscription: Subscription, format: Format, state: Option<StateFile>, write: W) -> Self {
        let (lines, printed) = (String::new(), subscription.position().index);
        Self { subscription, format, state, write, lines, waiting: None, printed, count: 0, stored_at: 0 }
    }

    /// Prints until `count` entries are printed, or `stopped` says so; then stores how far it came.
    async fn run(
        mut self,
        count: Option<u64>,
        stopped: impl Future<Output = Result<(), CliError>>,
    ) -> Result<(), CliError> {
        // What begins with the present begins with this one from now on.
        self.store().await?;
        let ended = self.print(count, stopped).await;
        let position = self.position();
        let Self { subscription, state, waiting, .. } = self;
        if waiting.is_none() {
            // So that the node hears of the last entries, too.
            subscription.close().await;
        }
        let Some(mut state) = state else { return ended };
        match (ended, state.store(position).await) {
            (Err(error), Err(unstored)) if !error.is_broken_pipe() => {
                output::remark(&unstored.to_string());
                Err(error)
            }
            (_, Err(unstored)) => Err(unstored),
            (ended, Ok(())) => ended,
        }
    }

    async fn print(
        &mut self,
        count: Option<u64>,
        stopped: impl Future<Output = Result<(), CliError>>,
    ) -> Result<(), CliError> {
        let (mut contacts, mut whereabouts) = (self.subscription.contacts(), Whereabouts::default());
        let mut stopped = pin!(stopped);
        let mut due = interval(STORE_EVERY);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                entry = self.subscription.next() => match entry {
                    Some(entry) => self.take(&entry?)?,
                    None => return Ok(()),
                },
                Some(contact) = contacts.changed() => whereabouts.tell(self.format, contact),
                _ = due.tick() => self.store().await?,
                ended = &mut stopped => return ended,
            }
            if self.waiting.is_none() && count.is_some_and(|count| self.count >= count) {
                return Ok(());
            }
            if self.count - self.stored_at >= STORE_AFTER {
                self.store().await?;
                due.reset();
            }
        }
    }

    fn take(&mut self, entry: &FollowedEntry) -> Result<(), CliError> {
        if self.waiting.is_some_and(|(seq, _)| seq != entry.seq) {
            self.flush()?;
        }
        match self.format {
            Format::Table => self.lines.push_str(&follow::line(entry)),
            Format::Json => {
                let mut object = follow::object(entry);
                let history = self.subscription.position().history;
                object.insert("history".to_owned(), history.to_string().into());
                self.lines.push_str(&serde_json::to_string(&object).map_err(CliError::Json)?);
            }
        }
        self.lines.push('\n');
        let lines = self.waiting.map_or(0, |(_, lines)| lines) + 1;
        self.waiting = Some((entry.seq, lines));
        if entry.more { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), CliError> {
        let Some((seq, lines)) = self.waiting else { return Ok(()) };
        (self.write)(self.lines.as_bytes())?;
        self.lines.clear();
        self.waiting = None;
        self.printed = seq;
        self.count += lines;
        Ok(())
    }

    /// Everything up to here was printed, or was not asked for.
    fn position(&self) -> Bookmark {
        let taken = self.subscription.position();
        let index = taken.index.max(self.printed);
        let index = self.waiting.map_or(index, |(seq, _)| index.min(seq - 1));
        Bookmark { index, ..taken }
    }

    async fn store(&mut self) -> Result<(), CliError> {
        let position = self.position();
        self.stored_at = self.count;
        match &mut self.state {
            Some(state) => state.store(position).await,
            None => Ok(()),
        }
    }
}

/// The file that holds the position: one line, as `--after` takes it.
#[derive(Debug)]
struct StateFile {
    path: PathBuf,
    /// What it holds; `None` when it is not there.
    stored: Option<Bookmark>,
}

impl StateFile {
    fn open(path: PathBuf) -> Result<Self, CliError> {
        let text = match read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self { path, stored: None }),
            Err(source) => return Err(CliError::Input { path, source }),
        };
        match text.trim().parse() {
            Ok(position) => Ok(Self { path, stored: Some(position) }),
            Err(_) => Err(CliError::Usage(format!(
                "{} holds no position such as 42@9f3c52a80d1e7b64: name another file, or remove it to begin anew",
                path.display()
            ))),
        }
    }

    /// After a crash the file holds this position, or the one before.
    async fn store(&mut self, position: Bookmark) -> Result<(), CliError> {
        if self.stored == Some(position) {
            return Ok(());
        }
        let path = self.path.clone();
        let text = format!("{position}\n");
        let written = runtime::offload(move || storage::write_durably(&path, text.as_bytes())).await;
        written.map_err(|source| CliError::State { position, source: Box::new(source) })?;
        self.stored = Some(position);
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(STATE_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests;
