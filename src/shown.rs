//! Text from outside, as messages repeat it: enough to recognise it by, however long it is.

use std::error::Error;
use std::fmt;
use std::fmt::Write as _;

/// Most bytes of a text from outside that a message repeats.
const SHOWN_BYTES: usize = 64;
/// A stretch without a space that is longer than this is nothing that a message says by itself.
const WORD_BYTES: usize = 256;
/// Longest message. In the header of a gRPC answer it stands several times, and generic clients allow 8 KiB.
pub(crate) const MESSAGE_BYTES: usize = 1024;

/// At most 64 bytes of a text, and how long it is when that is not all. Control characters are escaped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shown<'a>(pub(crate) &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = self.0.len() <= SHOWN_BYTES;
        let text = if whole { self.0 } else { beginning(self.0, SHOWN_BYTES) };
        for c in text.chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { f.write_char(c)? }
        }
        if whole { Ok(()) } else { write!(f, "… ({} bytes)", self.0.len()) }
    }
}

/// A message without what is too long in it: what it repeats of a text from outside, and its end when it is longer than
/// `limit` bytes.
pub(crate) fn shortened(message: &str, limit: usize) -> String {
    let mut short = String::with_capacity(message.len().min(limit));
    for word in message.split_inclusive(char::is_whitespace) {
        if short.len() + word.len().min(WORD_BYTES) > limit {
            let _ = write!(short, "… ({} bytes)", message.len());
            break;
        }
        match word.len() > WORD_BYTES {
            // A string takes everything.
            true => drop(write!(short, "{} ", Shown(word.trim_end()))),
            false => short.push_str(word),
        }
    }
    short
}

/// The innermost cause of an error, in words that no library has put around it or left out; `None` when there is none.
pub(crate) fn cause(error: &(dyn Error + 'static)) -> Option<String> {
    let mut innermost = error.source()?;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    let words = match innermost.to_string() {
        words if words == "deadline has elapsed" => "no connection in time".to_owned(),
        words if words.contains("frame with invalid size") || words.contains("invalid HTTP") => {
            "what answers there is no node".to_owned()
        }
        words if words == "stream closed because of a broken pipe" => "the connection was closed".to_owned(),
        words => words,
    };
    Some(words)
}

/// `message` with the names of files but not where they are: for those whom that does not concern.
pub(crate) fn without_directories(message: &str) -> String {
    let word = |word: &str| word.rsplit_once('/').map_or(word, |(_, file)| file).to_owned();
    message.split_inclusive(char::is_whitespace).map(word).collect()
}

/// The longest beginning of at most `bytes` bytes.
fn beginning(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_file_is_named_without_its_directory() {
        for (message, expected) in [
            ("cannot write /var/lib/q/snapshots/7.part: no space", "cannot write 7.part: no space"),
            ("data/log is gone,\nor data/b is", "log is gone,\nor b is"),
            ("nothing of the kind", "nothing of the kind"),
        ] {
            assert_eq!(without_directories(message), expected);
        }
    }

    #[test]
    fn a_text_is_shown_whole_or_cut_with_its_length() {
        assert_eq!(Shown("10.0.0.1:x").to_string(), "10.0.0.1:x");
        assert_eq!(Shown("a\nb\u{7f}").to_string(), "a\\nb\\u{7f}");
        let all = "x".repeat(SHOWN_BYTES);
        assert_eq!(Shown(&all).to_string(), all);
        assert_eq!(Shown(&"x".repeat(100_000)).to_string(), format!("{all}… (100000 bytes)"));
        // Two bytes each, and the cut would be within one.
        let odd = format!("x{}", "ä".repeat(50_000));
        assert_eq!(Shown(&odd).to_string(), format!("x{}… (100001 bytes)", "ä".repeat(31)));
    }

    #[test]
    fn a_cause_is_told_once_and_in_plain_words() {
        #[derive(Debug, thiserror::Error)]
        #[error("{text}: {inner}")]
        struct Wrapped {
            text: &'static str,
            #[source]
            inner: Box<dyn Error + Send + Sync>,
        }
        let wrap = |text, inner| Wrapped { text, inner };
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let inner = wrap("tcp connect error", refused().into());
        let outer = wrap("transport error", wrap("tcp connect error", Box::new(inner)).into());
        assert_eq!(cause(&outer).unwrap(), "connection refused");
        for (technical, plain) in [
            ("deadline has elapsed", "no connection in time"),
            ("frame with invalid size", "what answers there is no node"),
            ("stream closed because of a broken pipe", "the connection was closed"),
            ("no route", "no route"),
        ] {
            assert_eq!(cause(&wrap("transport error", technical.into())).unwrap(), plain);
        }
        assert_eq!(cause(&refused()), None);
    }

    #[test]
    fn a_message_keeps_what_it_says_itself() {
        let plain = "this node is not the leader: node 2 at b:7802 leads";
        assert_eq!(shortened(plain, MESSAGE_BYTES), plain);
        let echo = format!("invalid value '{}' for '--endpoints <HOST:PORT,...>'", "9".repeat(100_000));
        let short = shortened(&echo, MESSAGE_BYTES);
        assert!(
            short.starts_with("invalid value '9999") && short.ends_with("for '--endpoints <HOST:PORT,...>'")
        );
        assert!(short.contains("bytes)") && short.len() < 200, "{short}");
        let words = shortened(&"word ".repeat(100_000), MESSAGE_BYTES);
        assert!(words.ends_with("… (500000 bytes)") && words.len() < MESSAGE_BYTES + 40, "{words}");
        for text in ["", " ", "ä", "\n\n"] {
            assert_eq!(shortened(text, MESSAGE_BYTES), text);
        }
    }

    /// Whether a line shows a value in the form that is for programmers. Not in an assertion, which no one else meets.
    fn shows_debug_form(lines: &[&str], at: usize) -> bool {
        let line = lines[at].trim_start();
        let in_text = [":?}", ":#?}"].iter().any(|form| line.contains(form));
        let as_field = line.char_indices().any(|(mark, c)| {
            let before = line[..mark].trim_end();
            c == '?' && (before.is_empty() || before.ends_with(['=', ',', '(']))
        });
        let begins = |line: &&&str| line.trim_end().ends_with([';', '}', '{']);
        let statement = lines[..at].iter().rposition(|line| begins(&line)).map_or(0, |before| before + 1);
        let asserts =
            |line: &&str| ["assert", "unreachable!", "panic!"].iter().any(|word| line.contains(word));
        !line.starts_with("//") && (in_text || as_field) && !lines[statement..=at].iter().any(asserts)
    }

    #[test]
    fn the_form_for_programmers_is_found() {
        let found = |text: &str| {
            let lines: Vec<_> = text.lines().collect();
            (0..lines.len()).filter(|at| shows_debug_form(&lines, *at)).map(|at| at + 1).collect::<Vec<_>>()
        };
        assert_eq!(
            found("a(\"{x:?}\");\nb(\"{:#?}\");\nc(%x, ?y);\nd(z = ?y);\ne(\n    ?y,\n);"),
            [1, 2, 3, 4, 6]
        );
        let passed =
            "// {x:?}\nlet a = b()?;\nassert!(\n    a,\n    \"{a:?}\"\n);\n_ => unreachable!(\"{a:?}\")";
        assert!(found(passed).is_empty(), "{:?}", found(passed));
    }

    /// People read logs and messages: durations as numbers with their units, errors in words.
    #[test]
    fn nothing_is_told_in_the_form_for_programmers() {
        /// A report for whoever writes a store.
        const FOR_PROGRAMMERS: &str = "storage/conformance";
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let (mut dirs, mut files, mut found) = (vec![root], 0, Vec::new());
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let name = path.display().to_string();
                let is_test = ["tests", "tests.rs", "_tests.rs"].iter().any(|end| name.ends_with(end));
                if is_test || name.contains(FOR_PROGRAMMERS) {
                    continue;
                }
                if path.is_dir() {
                    dirs.push(path);
                    continue;
                }
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
                let lines: Vec<_> = code.lines().collect();
                let told = (0..lines.len()).filter(|at| shows_debug_form(&lines, *at));
                found.extend(told.map(|at| format!("{name}:{}: {}", at + 1, lines[at].trim())));
                files += 1;
            }
        }
        assert!(files > 100, "the sources are not where this test looks for them");
        assert!(found.is_empty(), "\n{}\n", found.join("\n"));
    }
}
