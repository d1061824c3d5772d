//! How a command that failed says so on standard error: a line and a hint for people, one JSON object for programs.
//!
//! Every failure goes through here, those of the arguments included, so that `-o json` holds for all of them. Reason,
//! exit code and whether a write may have been applied come from [`crate::reason`]; the object is described in
//! `docs/OPERATIONS.md`.

use std::ffi::OsString;

use clap::error::{ContextKind, ErrorKind};
use serde::Serialize;
use serde_json::{Map, Value};

use super::error::CliError;
use super::process::StartError;
use super::{Cli, Format, Subject, output};
use crate::kv::client::KnownLeader;
use crate::logging::MAX_LINE_BYTES;
use crate::reason::{EXIT_OK, Reason};
use crate::shown::shortened;

/// Longest message, with what it repeats of the arguments.
const MESSAGE_BYTES: usize = 4096;

/// What is told of a failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    reason: &'static str,
    message: String,
    /// What to do about it.
    hint: Option<String>,
    /// Whether a write may have taken effect, or may still do so.
    maybe_applied: bool,
    /// What came of a write all the same, as its command prints it.
    result: Option<Map<String, Value>>,
    /// Who leads, as far as this process has learnt.
    leader: Option<ShownLeader>,
    /// The exit code of the process.
    code: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct ShownLeader {
    node_id: Option<u64>,
    client: Option<String>,
}

impl Report {
    /// Of a command that was about `subject`.
    pub(super) fn of(error: &CliError, subject: Subject, leader: Option<KnownLeader>) -> Self {
        let known = leader
            .map(|known| ShownLeader { node_id: known.node_id, client: Some(known.client.to_string()) });
        // What the failure says of the leader is newer than what was learnt before.
        let leader = match error.leader() {
            Some(node_id) => known
                .filter(|known| known.node_id == Some(node_id))
                .or(Some(ShownLeader { node_id: Some(node_id), client: None })),
            None => known,
        };
        Self {
            hint: error.hint(subject).map(str::to_owned),
            result: error.result().cloned(),
            leader,
            ..Self::new(error.reason(), &error.to_string(), error.maybe_applied(), error.exit_code())
        }
    }

    /// Of a process that could not begin.
    pub fn of_start(error: &StartError) -> Self {
        let reason = if error.is_invalid_input() { Reason::Invalid } else { Reason::Unspecified };
        let message = format!("the program cannot start: {error}");
        Self::new(reason, &message, false, reason.exit_code(false))
    }

    /// Of arguments that cannot be read. `None` when they ask for help or the version, which is no failure.
    pub(super) fn of_usage(error: &clap::Error) -> Option<Self> {
        let reason = match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => return None,
            _ => Reason::Invalid,
        };
        let text = error.render().to_string();
        let message = match error.kind() {
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "a command is missing".to_owned(),
            // What follows the first paragraph is the usage, and where there is more of it.
            _ => text.split("\n\n").next().unwrap_or_default().replace("\n ", " ").replace('\n', " "),
        };
        let message = message.trim().trim_start_matches("error: ");
        let usage = error.get(ContextKind::Usage).map(|usage| usage.to_string());
        let usage = usage.map(|usage| usage.split_whitespace().collect::<Vec<_>>().join(" "));
        let hint = usage
            .filter(|usage| !usage.is_empty())
            .unwrap_or_else(|| "`quorate --help` lists the commands".to_owned());
        Some(Self { hint: Some(hint), ..Self::new(reason, message, false, reason.exit_code(false)) })
    }

    fn new(reason: Reason, message: &str, maybe_applied: bool, code: u8) -> Self {
        let message = shortened(message, MESSAGE_BYTES);
        Self { reason: reason.name(), message, hint: None, maybe_applied, result: None, leader: None, code }
    }

    /// The exit code of the process.
    pub fn exit_code(&self) -> u8 {
        self.code
    }

    /// What is written to standard error, with the end of the line.
    pub fn text(&self, format: Format) -> String {
        match format {
            Format::Json => {
                let line = |report: &Self| {
                    let object =
                        serde_json::to_string(report).expect("invariant: text, numbers and names of fields");
                    format!("{object}\n")
                };
                match line(self) {
                    // A longer line would be cut. The result stands on standard output, too.
                    long if long.len() > MAX_LINE_BYTES => line(&Self { result: None, ..self.clone() }),
                    line => line,
                }
            }
            Format::Table => {
                let hint = self.hint.as_ref().map(|hint| format!("hint: {hint}\n")).unwrap_or_default();
                format!("error: {}\n{hint}", self.message)
            }
        }
    }
}

/// What [`parse`](super::parse) could not read, in the form that the arguments ask for: what to print, whether that is
/// what was asked for and so belongs on standard output, and the exit code.
pub fn usage(error: &clap::Error, args: &[OsString]) -> (String, bool, u8) {
    let Some(report) = Report::of_usage(error) else {
        return (error.render().to_string(), true, EXIT_OK);
    };
    match asks_for_json(args) {
        true => (report.text(Format::Json), false, report.exit_code()),
        // With its usage and tips, which people read better than a hint.
        false => (shortened_lines(&error.render().to_string()), false, report.exit_code()),
    }
}

/// Prints what the arguments ask for by themselves, such as the help: if it cannot be printed, what to tell of that, and the
/// exit code.
pub fn print(text: &str, args: &[OsString]) -> Option<(String, u8)> {
    let error = output::raw(text.as_bytes()).err().filter(|error| !error.is_broken_pipe())?;
    let report = Report::of(&error, Subject::Process, None);
    let format = if asks_for_json(args) { Format::Json } else { Format::Table };
    Some((report.text(format), report.exit_code()))
}

fn shortened_lines(text: &str) -> String {
    let lines = text.lines().map(|line| shortened(line, MESSAGE_BYTES));
    lines.collect::<Vec<_>>().join("\n") + "\n"
}

/// Whether the arguments, which cannot be read as a whole, ask for JSON anywhere.
fn asks_for_json(args: &[OsString]) -> bool {
    let args: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).take_while(|arg| arg != "--").collect();
    let flags = ["-o", "--output"];
    let mut last = None;
    for (at, arg) in args.iter().enumerate() {
        let attached = flags.iter().find_map(|flag| arg.strip_prefix(flag));
        match attached {
            Some("") => last = args.get(at + 1).map(|value| value.to_string()),
            Some(value) => last = Some(value.trim_start_matches('=').to_owned()),
            None => {}
        }
    }
    last.or_else(|| std::env::var("QUORATE_OUTPUT").ok()).as_deref() == Some("json")
}

/// How results, and so failures, are printed.
pub fn format(cli: &Cli) -> Format {
    cli.common.output
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{EXIT_INVALID, parse};

    fn refused(args: &[&str]) -> (serde_json::Value, u8) {
        let error = parse(args).unwrap_err();
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        let (text, asked_for, code) = usage(&error, &args);
        assert!(!asked_for && text.ends_with('\n') && text.trim_end().lines().count() == 1, "{text}");
        (serde_json::from_str(&text).unwrap(), code)
    }

    #[test]
    fn arguments_that_cannot_be_read_are_told_in_the_form_they_ask_for() {
        let long = "9".repeat(100_000);
        for args in [
            &["quorate", "-o", "json"][..],
            &["quorate", "put", "-o", "json"],
            &["quorate", "put", "k", "--output=json"],
            &["quorate", "-ojson", "frobnicate"],
            &["quorate", "get", "k", "--timeout", "x", "--output", "json"],
            &["quorate", "get", "k", "--frob", "-o=json"],
            &["quorate", "get", "k", "-o", "json", "--endpoints", &long],
            &["quorate", "-o", "json", &long],
            &["quorate", "get", "k", "-o", "json", &format!("--{long}")],
            &["quorate", "transfer-leader", &long, "-o", "json"],
            &["quorate", "serve", "--node-id", &long, "-o", "json"],
        ] {
            let (object, code) = refused(args);
            assert_eq!((code, &object["code"]), (EXIT_INVALID, &EXIT_INVALID.into()), "{object}");
            assert_eq!((&object["reason"], &object["maybe_applied"]), (&"INVALID".into(), &false.into()));
            assert!(object["leader"].is_null(), "{object}");
            let message = object["message"].as_str().unwrap();
            assert!(!message.is_empty() && !message.contains('\n') && message.len() < 500, "{message}");
            assert!(!message.starts_with("error"), "{message}");
            assert!(object["hint"].as_str().is_some_and(|hint| hint.contains("quorate")), "{object}");
            assert_eq!(object.as_object().unwrap().len(), 7, "{object}");
        }
    }

    /// The leader in the object is the one in the message.
    #[test]
    fn the_leader_that_a_failure_names_is_the_one_that_is_told() {
        let known = |node_id| {
            let client = crate::kv::client::Endpoint::parse("n:1").unwrap();
            Some(KnownLeader { node_id: Some(node_id), client })
        };
        let report =
            |leader| Report::of(&CliError::OtherLeads { wanted: 1, leader: 3 }, Subject::Lead, leader).leader;
        let told =
            |client: Option<&str>| Some(ShownLeader { node_id: Some(3), client: client.map(str::to_owned) });
        assert_eq!(report(known(3)), told(Some("n:1")));
        assert_eq!(report(known(2)), told(None));
        assert_eq!(report(None), told(None));
    }

    #[test]
    fn a_person_is_told_in_lines_none_of_which_is_long() {
        let long = "9".repeat(100_000);
        let args = ["quorate", "get", "k", &format!("--{long}")];
        let error = parse(args).unwrap_err();
        let (text, _, code) = usage(&error, &args.map(OsString::from));
        assert_eq!(code, EXIT_INVALID);
        assert!(text.starts_with("error: ") && text.contains("Usage") && text.len() < 2000, "{text}");
    }

    #[test]
    fn help_is_no_failure() {
        let args = ["quorate", "--help", "-o", "json"];
        let (text, asked_for, code) = usage(&parse(args).unwrap_err(), &args.map(OsString::from));
        assert!(asked_for && code == EXIT_OK && text.contains("Exit codes"));
    }

    #[test]
    fn the_last_flag_before_the_separator_says_the_form() {
        let asks = |args: &[&str]| asks_for_json(&args.iter().map(OsString::from).collect::<Vec<_>>());
        assert!(asks(&["-o", "table", "--output=json"]));
        assert!(!asks(&["-o", "json", "-otable"]));
        assert!(!asks(&["--", "-o", "json"]) || std::env::var_os("QUORATE_OUTPUT").is_some());
    }

    /// A line of the log has an end; what is cut is no object any more.
    #[test]
    fn a_report_with_a_large_result_is_still_an_object() {
        let mut report =
            Report::of_start(&StartError::Threads { threads: 1, source: std::io::Error::other("x") });
        let with = |report: &mut Report, bytes: usize| {
            report.result = Some(Map::from_iter([("value".to_owned(), "x".repeat(bytes).into())]));
            serde_json::from_str::<serde_json::Value>(&report.text(Format::Json)).unwrap()
        };
        assert!(with(&mut report, 1_000)["result"].is_object());
        assert!(with(&mut report, MAX_LINE_BYTES)["result"].is_null());
    }
}
