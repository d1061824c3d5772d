//! Results on standard output: tables for people, JSON for programs.
//!
//! All commands print through here, because a reader may close the pipe at any time (`quorate range |
//! head`), and `println!` panics when it does.

use std::io::{self, IsTerminal, Write};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::error::CliError;
use crate::kv::client::Item;

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Text for people
    Table,
    /// JSON for programs
    Json,
}

/// A result of printing after something has been changed: if it failed, the change is `done` all the same.
pub(super) fn after(done: &'static str, printed: Result<(), CliError>) -> Result<(), CliError> {
    printed.map_err(|error| match error {
        CliError::Output(source) => CliError::Unprinted { done, source },
        error => error,
    })
}

/// Returns when the reader of standard output has gone away, which a command that prints seldom would not notice before it
/// prints again. Never returns where that cannot be told, as of a file.
pub(super) async fn unread() {
    #[allow(
        deprecated,
        reason = "standard output is not closed while it is watched, which is all that is asked of the caller"
    )]
    let watched = AsyncFd::with_interest(io::stdout(), Interest::ERROR);
    if let Ok(stdout) = watched
        && stdout.ready(Interest::ERROR).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// Writes `bytes` as they are.
pub(super) fn raw(bytes: &[u8]) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(CliError::Output)
}

/// Writes a value as it is, and ends the line if a person is looking.
pub(super) fn value(bytes: &[u8]) -> Result<(), CliError> {
    raw(bytes)?;
    if io::stdout().is_terminal() && !bytes.ends_with(b"\n") { raw(b"\n") } else { Ok(()) }
}

/// Writes a line.
pub(super) fn line(text: &str) -> Result<(), CliError> {
    raw(format!("{text}\n").as_bytes())
}

/// Writes `value` as one JSON document.
pub(super) fn json(value: &impl Serialize) -> Result<(), CliError> {
    line(&serde_json::to_string_pretty(value).map_err(CliError::Json)?)
}

/// Writes `value` as JSON on one line.
pub(super) fn json_line(value: &impl Serialize) -> Result<(), CliError> {
    line(&serde_json::to_string(value).map_err(CliError::Json)?)
}

/// Writes a remark for people on standard error, where it is not in the way of the result.
pub(super) fn remark(text: &str) {
    // Nothing is left to complain to when standard error is closed.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Lines up `rows` below `headings`, two spaces between columns.
pub(super) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = headings.iter().map(|heading| heading.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let headings: Vec<String> = headings.iter().map(ToString::to_string).collect();
    for row in std::iter::once(&headings).chain(rows) {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Puts `bytes` into `object`: under `name` when they are UTF-8, else under `name_base64`.
pub(super) fn insert_bytes(object: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => object.insert(name.to_owned(), text.into()),
        Err(_) => object.insert(format!("{name}_base64"), BASE64_STANDARD.encode(bytes).into()),
    };
}

/// An item as a JSON object.
pub(super) fn item_object(item: &Item) -> Map<String, Value> {
    let mut object = Map::new();
    insert_bytes(&mut object, "key", &item.key);
    insert_bytes(&mut object, "value", &item.value);
    object.insert("create_revision".to_owned(), item.create_revision.into());
    object.insert("mod_revision".to_owned(), item.mod_revision.into());
    object.insert("version".to_owned(), item.version.into());
    let expires_ms = Some(item.expires_ms).filter(|expires_ms| *expires_ms != 0);
    object.insert("expires_ms".to_owned(), expires_ms.into());
    if expires_ms.is_some() {
        object.insert("past_due".to_owned(), item.past_due.into());
    }
    object
}

/// A time as RFC 3339 has it, in UTC, to the second.
pub(super) fn time(unix_ms: u64) -> String {
    let seconds = i64::try_from(unix_ms / 1000).unwrap_or(i64::MAX);
    prost_types::Timestamp { seconds, nanos: 0 }.to_string()
}

/// Bytes on one line, such that no two strings of bytes look alike, and so that they can be typed again between the
/// quotation marks of a transaction: a backslash is doubled, and what is not UTF-8, or is a character that cannot be
/// seen for what it is, is `\n`, `\t`, `\r` or `\xNN` for each of its bytes. In quotation marks where it could be taken
/// for something else: empty, with a space at either end or two in a row, or with a quotation mark in front.
pub(super) fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\t' => text.push_str("\\t"),
                '\r' => text.push_str("\\r"),
                c if is_plain(c) => text.push(c),
                c => escape(&mut text, c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        escape(&mut text, chunk.invalid());
    }
    let quote = text.is_empty() || text.starts_with([' ', '"']) || text.ends_with(' ') || text.contains("  ");
    match quote {
        true => format!("\"{}\"", text.replace('"', "\\\"")),
        false => text,
    }
}

/// The same of at most so many bytes that a message stays readable.
pub(super) fn shown(bytes: &[u8]) -> String {
    const SHOWN_BYTES: usize = 128;
    match bytes.get(..SHOWN_BYTES) {
        Some(beginning) if bytes.len() > SHOWN_BYTES => {
            // Not within a character.
            let whole = match std::str::from_utf8(beginning) {
                Err(error) if error.error_len().is_none() => &beginning[..error.valid_up_to()],
                _ => beginning,
            };
            format!("{}… ({} bytes)", printable(whole), bytes.len())
        }
        _ => printable(bytes),
    }
}

fn escape(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        text.push_str(&format!("\\x{byte:02x}"));
    }
}

/// Whether a character is seen as itself: not a control character, a space of another kind, one without a width, or
/// one that turns the direction of writing.
fn is_plain(c: char) -> bool {
    let is_invisible = matches!(c,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
        | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}'
        | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{e000}'..='\u{f8ff}' | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0000}'..='\u{10ffff}');
    !c.is_control() && !is_invisible && (c == ' ' || !c.is_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let rows = [vec!["1".to_owned(), "längere".to_owned()], vec!["22".to_owned(), "x".to_owned()]];
        assert_eq!(table(&["ID", "NAME"], &rows), "ID  NAME\n1   längere\n22  x\n");
    }

    #[test]
    fn times_are_for_people() {
        assert_eq!(time(1_767_225_600_999), "2026-01-01T00:00:00Z");
        assert!(!time(u64::MAX).is_empty());
    }

    #[test]
    fn bytes_that_are_no_text_are_named_so() {
        let mut object = Map::new();
        insert_bytes(&mut object, "key", b"k");
        insert_bytes(&mut object, "value", &[0xff, 0x00]);
        assert_eq!(serde_json::to_string(&object).unwrap(), r#"{"key":"k","value_base64":"/wA="}"#);
    }

    #[test]
    fn what_is_printed_is_seen_for_what_it_is() {
        for (bytes, expected) in [
            (&b"plain / text=1"[..], "plain / text=1"),
            ("l\u{e4}nger \u{65e5}".as_bytes(), "l\u{e4}nger \u{65e5}"),
            (b"a\tb\nc\rd", "a\\tb\\nc\\rd"),
            (b"a\\nb", "a\\\\nb"),
            (b"\xffa\0", "\\xffa\\x00"),
            (b"\xe4\xb8", "\\xe4\\xb8"),
            (b"\x1b[31m\x7f", "\\x1b[31m\\x7f"),
            (
                "a\u{202e}b\u{200b}\u{feff}\u{a0}\u{2028}".as_bytes(),
                "a\\xe2\\x80\\xaeb\\xe2\\x80\\x8b\\xef\\xbb\\xbf\\xc2\\xa0\\xe2\\x80\\xa8",
            ),
            (b"", "\"\""),
            (b" a", "\" a\""),
            (b"a  b", "\"a  b\""),
            (b"\"", "\"\\\"\""),
            (b"say \"hi\"", "say \"hi\""),
        ] {
            assert_eq!(printable(bytes), expected, "{bytes:?}");
        }
        assert_eq!(shown(b"short"), "short");
        let long = shown("\u{e4}".repeat(5_000).as_bytes());
        assert!(long.len() < 300 && long.ends_with("\u{e4}… (10000 bytes)"), "{long}");
    }
}
