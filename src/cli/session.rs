//! `quorate session`: whose sessions are open.

use std::collections::HashSet;

use clap::{Args, Subcommand};
use futures::stream::{FuturesUnordered, StreamExt};
use serde::Serialize;
use serde_json::{Value, json};

use super::{CliError, Common, Format, output};
use crate::kv::client::{Client, ClientError, SessionInfo};

/// Sessions asked for at a time.
const PAGE: u32 = 1_000;
/// Sessions that are being closed at a time: so many that they share the flushes of the logs.
const AT_A_TIME: usize = 64;

/// Arguments of `quorate session`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate session list\n  quorate session close --opener 192.0.2.7\n\nA session makes a client's writes exactly-once. Clients open them by themselves; when all are in use, the connection that\nhas most of them loses its idlest one to one that has fewer."
)]
pub struct SessionArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: SessionCommand,
}

/// What can be done with sessions.
#[derive(Debug, Subcommand)]
pub enum SessionCommand {
    /// Show the open sessions, as the leader has applied them
    #[command(
        after_help = "Example:\n  quorate session list\n  quorate session list --opener 192.0.2.7\n  quorate session list -o json | jq '.sessions | group_by(.opener) | map([.[0].opener, length])'"
    )]
    List {
        /// Only those of a client: HOST:PORT for one connection, HOST for all of them
        #[arg(long, value_name = "ADDRESS")]
        opener: Option<String>,
    },
    /// Close sessions, whoever opened them
    #[command(
        after_help = "Example:\n  quorate session close 10376293541461622784\n  quorate session close --opener 192.0.2.7:50312\n\nA client whose session is closed opens another one for its next write. Of a write that it was sending again it is told that\nthe outcome is unknown. Says how many were closed, and which, which were not open, and after a failure which are left. Exits with 4 when none of the\nsessions is open."
    )]
    Close {
        /// Their ids, as listed
        #[arg(value_name = "SESSION", required_unless_present = "opener", conflicts_with = "opener")]
        sessions: Vec<u64>,
        /// All of a client: HOST:PORT for one connection, HOST for all of them
        #[arg(long, value_name = "ADDRESS")]
        opener: Option<String>,
    },
}

/// One session, as shown. Ids are texts, because many programs read numbers of that size wrongly.
#[derive(Debug, Serialize)]
struct SessionRow<'a> {
    session: String,
    opener: Option<&'a str>,
    opened_ms: u64,
    used_ms: u64,
    expires_ms: u64,
    bytes: u64,
    unanswered: u64,
}

/// Does what was asked for.
///
/// # Errors
/// [`CliError::SessionNotOpen`] when nothing was there to be closed; others see [`CliError`].
pub async fn run(common: &Common, args: SessionArgs) -> Result<(), CliError> {
    let client = common.client()?;
    match args.command {
        SessionCommand::List { opener } => {
            let sessions = all(&client, opener.as_deref()).await?;
            show(common.output, &sessions)
        }
        SessionCommand::Close { sessions, opener } => {
            let (sessions, nothing) = match &opener {
                None => {
                    let nothing = match &sessions[..] {
                        [one] => format!("session {one} is not open"),
                        many => format!("none of the sessions {} is open", list(many)),
                    };
                    (sessions, nothing)
                }
                Some(opener) => {
                    let all = all(&client, Some(opener)).await?;
                    (all.iter().map(|info| info.session).collect(), format!("no session of {opener} is open"))
                }
            };
            let (closing, failed) = close(&sessions, |session| client.close_session(session)).await;
            let failed = match failed {
                Some(error) if closing.closed.is_empty() => return Err(error.into()),
                None if closing.closed.is_empty() => return Err(CliError::SessionNotOpen { nothing }),
                failed => failed.map(|error| client.after_part(error)),
            };
            let printed = match common.output {
                Format::Table => output::line(&closing.text()),
                Format::Json => output::json(&closing.document()),
            };
            match failed {
                Some(error) => Err(error.into()),
                None => output::after("the sessions are closed", printed),
            }
        }
    }
}

/// What has come of sessions that were to be closed, each in the order given and once.
#[derive(Debug, PartialEq, Eq)]
struct Closing {
    closed: Vec<u64>,
    /// Those that were not.
    not_open: Vec<u64>,
    /// Those of which it is not known, or that were not asked for after a failure.
    left: Vec<u64>,
}

impl Closing {
    fn text(&self) -> String {
        let Self { closed, not_open, left } = self;
        let count = |sessions: &[u64]| match sessions {
            [one] => format!("1 session: {one}"),
            many => format!("{} sessions: {}", many.len(), list(many)),
        };
        let mut text = format!("closed {}", count(closed));
        for (what, sessions) in [("not open", not_open), ("left", left)] {
            if !sessions.is_empty() {
                text.push_str(&format!("\n{what}: {}", count(sessions)));
            }
        }
        text
    }

    fn document(&self) -> Value {
        let Self { closed, not_open, left } = self;
        // As texts, because many programs read numbers of that size wrongly.
        let ids = |sessions: &[u64]| sessions.iter().map(ToString::to_string).collect::<Vec<_>>();
        json!({ "count": closed.len(), "closed": ids(closed), "not_open": ids(not_open), "left": ids(left) })
    }
}

fn list(sessions: &[u64]) -> String {
    sessions.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Closes `sessions` with `close_one`, many at a time. What has come of them, and why the rest was left.
async fn close<F>(sessions: &[u64], close_one: impl Fn(u64) -> F) -> (Closing, Option<ClientError>)
where
    F: Future<Output = Result<bool, ClientError>>,
{
    let mut left = sessions.iter().copied();
    let (mut closing, mut closed, mut not_open) = (FuturesUnordered::new(), HashSet::new(), HashSet::new());
    let mut failed: Option<ClientError> = None;
    loop {
        // After a failure those under way are waited for, to know what has come of them, and no others are begun.
        while closing.len() < AT_A_TIME
            && failed.is_none()
            && let Some(session) = left.next()
        {
            let outcome = close_one(session);
            closing.push(async move { (session, outcome.await) });
        }
        match closing.next().await {
            Some((session, Ok(true))) => drop(closed.insert(session)),
            Some((session, Ok(false))) => drop(not_open.insert(session)),
            // One that leaves it open whether something was done says more than one that does not.
            Some((_, Err(error))) if failed.as_ref().is_none_or(|failed| !failed.maybe_applied()) => {
                failed = Some(error);
            }
            Some((_, Err(_))) => {}
            None => break,
        }
    }
    let mut told = HashSet::with_capacity(sessions.len());
    let mut in_order = Closing { closed: Vec::new(), not_open: Vec::new(), left: Vec::new() };
    for session in sessions.iter().copied().filter(|session| told.insert(*session)) {
        // One that is given twice is closed once, and then not open.
        match (closed.contains(&session), not_open.contains(&session)) {
            (true, _) => in_order.closed.push(session),
            (false, true) => in_order.not_open.push(session),
            (false, false) => in_order.left.push(session),
        }
    }
    (in_order, failed)
}

/// All sessions, or those of `opener`.
async fn all(client: &Client, opener: Option<&str>) -> Result<Vec<SessionInfo>, CliError> {
    let (deadline, mut sessions) = (client.deadline(), Vec::new());
    let mut after = Some(0);
    while let Some(from) = after {
        let page = client.list_sessions_by(deadline, from, PAGE).await?;
        sessions.extend(page.sessions.into_iter().filter(|info| opener.is_none_or(|of| is_of(info, of))));
        // Ids grow from page to page, so this ends.
        after = page.next_after.filter(|next| *next > from);
    }
    Ok(sessions)
}

/// Whether `info` was opened by the connection or the host `opener`.
fn is_of(info: &SessionInfo, opener: &str) -> bool {
    let host = info.opener.rsplit_once(':').map(|(host, _)| host);
    info.opener == opener
        || host.is_some_and(|host| host == opener || host.trim_matches(['[', ']']) == opener)
}

fn row(info: &SessionInfo) -> SessionRow<'_> {
    SessionRow {
        session: info.session.to_string(),
        opener: (!info.opener.is_empty()).then_some(info.opener.as_str()),
        opened_ms: info.opened_ms,
        used_ms: info.used_ms,
        expires_ms: info.expires_ms,
        bytes: info.bytes,
        unanswered: info.unsettled,
    }
}

fn show(format: Format, sessions: &[SessionInfo]) -> Result<(), CliError> {
    let cells = |info: &SessionInfo| {
        let opener =
            if info.opener.is_empty() { "-".to_owned() } else { output::printable(info.opener.as_bytes()) };
        vec![
            info.session.to_string(),
            opener,
            output::time(info.opened_ms),
            output::time(info.used_ms),
            output::time(info.expires_ms),
            info.bytes.to_string(),
            info.unsettled.to_string(),
        ]
    };
    match format {
        Format::Json => output::json(&json!({ "sessions": sessions.iter().map(row).collect::<Vec<_>>() })),
        Format::Table => {
            let headings = ["SESSION", "OPENER", "OPENED", "LAST USED", "EXPIRES", "BYTES", "UNANSWERED"];
            let cells: Vec<_> = sessions.iter().map(cells).collect();
            output::raw(output::table(&headings, &cells).as_bytes())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;

    fn late(maybe_applied: bool) -> ClientError {
        ClientError::DeadlineExceeded { timeout: Duration::from_secs(1), maybe_applied, last: None }
    }

    #[tokio::test(start_paused = true)]
    async fn many_sessions_are_closed_at_a_time_and_all_of_them() {
        let sessions: Vec<u64> = (0..16_384).collect();
        let (under_way, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let begun = Instant::now();
        let (closed, failed) = close(&sessions, async |session| {
            most.fetch_max(under_way.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(3 + session % 5)).await;
            under_way.fetch_sub(1, Ordering::Relaxed);
            Ok(session % 3 > 0)
        })
        .await;
        assert!(failed.is_none());
        assert!(closed.closed.into_iter().eq((0..16_384).filter(|session| session % 3 > 0)));
        assert_eq!((closed.not_open.len(), closed.left.len()), (5_462, 0));
        assert_eq!(most.into_inner(), AT_A_TIME);
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_closed_before_a_failure_or_beside_it_is_known() {
        let sessions: Vec<u64> = (0..1_000).collect();
        let last = AtomicU64::new(0);
        let (closed, failed) = close(&sessions, async |session| {
            last.fetch_max(session, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(session + 1)).await;
            match session {
                100 => Err(late(false)),
                120 => Err(late(true)),
                130 => Err(late(false)),
                _ => Ok(true),
            }
        })
        .await;
        let last = last.into_inner();
        assert!(last < 200, "{last} was begun");
        let is_closed = |session: &u64| ![100, 120, 130].contains(session);
        let left = [100, 120, 130].into_iter().chain(last + 1..1_000);
        assert!(closed.left.into_iter().eq(left));
        assert!(closed.closed.into_iter().eq((0..=last).filter(is_closed)));
        assert!(failed.unwrap().maybe_applied());
    }

    #[tokio::test]
    async fn how_many_were_closed_is_told_and_which() {
        let told = async |sessions: &[u64]| {
            let asked = std::cell::RefCell::new(HashSet::new());
            let close_one = |session| {
                let is_first = asked.borrow_mut().insert(session);
                async move { if session == 9 { Err(late(true)) } else { Ok(is_first && session % 2 > 0) } }
            };
            let closing = close(sessions, close_one).await.0;
            (closing.text(), closing.document())
        };
        let document = |closed: &[&str], not_open: &[&str], left: &[&str]| json!({ "count": closed.len(), "closed": closed, "not_open": not_open, "left": left });
        for (sessions, text, expected) in [
            (&[7, 7][..], "closed 1 session: 7", document(&["7"], &[], &[])),
            (&[3, 1, 5], "closed 3 sessions: 3, 1, 5", document(&["3", "1", "5"], &[], &[])),
            (&[1, 2], "closed 1 session: 1\nnot open: 1 session: 2", document(&["1"], &["2"], &[])),
            (&[1, 9], "closed 1 session: 1\nleft: 1 session: 9", document(&["1"], &[], &["9"])),
        ] {
            assert_eq!(told(sessions).await, (text.to_owned(), expected));
        }
    }

    #[test]
    fn openers_are_named_by_connection_or_host() {
        let of = |opener: &str| SessionInfo { opener: opener.to_owned(), ..SessionInfo::default() };
        for (opener, asked, expected) in [
            ("192.0.2.1:5", "192.0.2.1:5", true),
            ("192.0.2.1:5", "192.0.2.1", true),
            ("192.0.2.1:5", "192.0.2", false),
            ("192.0.2.1:5", "192.0.2.1:50", false),
            ("[2001:db8::1]:5", "2001:db8::1", true),
            ("[2001:db8::1]:5", "[2001:db8::1]", true),
            ("", "192.0.2.1", false),
        ] {
            assert_eq!(is_of(&of(opener), asked), expected, "{opener} {asked}");
        }
    }
}
