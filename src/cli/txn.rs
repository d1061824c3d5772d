//! `quorate txn`: a transaction from flags, a file or standard input.
//!
//! The text is one clause per line, each beginning with `when`, `then` or `else`; the flags are the same clauses
//! without that word. A word is bare, or in double quotes with `\"`, `\\`, `\n`, `\r`, `\t` and `\xNN`: as tables print
//! what is no plain text, so it can be copied from there. In quotes a line break is one byte of the word like any other.
//! The text need not be UTF-8; a byte-order mark at its beginning is none of it.

use std::path::PathBuf;

use bytes::Bytes;
use clap::Args;
use serde_json::{Map, Value, json};

use super::input;
use super::write::{self, WriteArgs, WriteTold};
use super::{CliError, Common, ScopeArgs, output};
use crate::duration;
use crate::kv::client::{Client, Compare, Comparison, Item, Range, Txn, TxnOp, TxnReply, TxnResult};
use crate::types::{AckLevel, Bookmark, HistoryEpoch};

/// Arguments of `quorate txn`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate txn --when 'owner = \"a\"' --then 'put owner b' --else 'get owner'\n  quorate txn --when 'missing lock' --then 'put lock me ttl=30s'\n  quorate txn move.txt\n\n  where move.txt holds\n    # comments and empty lines are skipped\n    when value(from) = \"10\"\n    when version(to) > 0\n    then put from \"9\"\n    then put to \"1\"\n    else get from\n\nComparisons: KEY = VALUE or value(KEY) = VALUE, version(KEY) with a number, created(KEY) and modified(KEY) with a revision, which may be a bookmark 42@HISTORY, each with = != < or >; exists KEY; missing KEY. All must hold.\nOperations: get KEY; put KEY VALUE [ttl=TIME]; del KEY; range START [END]; prefix KEY; del-range START END; del-from START, to the end; del-prefix KEY; del-all.\nA word that is no plain text is written in double quotes, with \\\" \\\\ \\n \\r \\t and \\xNN for a byte; a line break may also stand there as it is.\nExits with 0 whichever list was done, and with 5 when with --ack all not every voter has confirmed it in time; the first line of the output says which was done."
)]
pub struct TxnArgs {
    /// File with the transaction; `-` is standard input
    #[arg(conflicts_with_all = ["when", "then", "otherwise"], required_unless_present_any = ["then", "otherwise"])]
    pub file: Option<PathBuf>,
    /// A comparison; all must hold. May be repeated
    #[arg(long, value_name = "COMPARISON", value_parser = input::argument())]
    pub when: Vec<Bytes>,
    /// An operation to do if all comparisons hold. May be repeated
    #[arg(long, value_name = "OPERATION", value_parser = input::argument())]
    pub then: Vec<Bytes>,
    /// An operation to do if not. May be repeated
    #[arg(long = "else", value_name = "OPERATION", value_parser = input::argument())]
    pub otherwise: Vec<Bytes>,
    /// When it counts as done
    #[command(flatten)]
    pub write: WriteArgs,
    /// Whose keys
    #[command(flatten)]
    pub scope: ScopeArgs,
}

/// Executes the transaction and prints what came of it.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: TxnArgs) -> Result<(), CliError> {
    let script = read(&args)?;
    common.with_client(async |client| execute(client, common, &args, script).await).await
}

/// A transaction, and the history that the revisions in its comparisons were read in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Script {
    txn: Txn,
    history: HistoryEpoch,
}

impl Script {
    fn when(self, (compare, history): (Compare, HistoryEpoch)) -> Result<Self, String> {
        let Self { txn, history: known } = self;
        match (known, history) {
            (_, HistoryEpoch::UNKNOWN) => Ok(Self { txn: txn.when(compare), history: known }),
            (known, history) if known != HistoryEpoch::UNKNOWN && known != history => {
                Err("the revisions that are compared with are of two histories".to_owned())
            }
            _ => Ok(Self { txn: txn.when(compare), history }),
        }
    }

    fn then(self, operation: TxnOp) -> Self {
        Self { txn: self.txn.then(operation), ..self }
    }

    fn otherwise(self, operation: TxnOp) -> Self {
        Self { txn: self.txn.otherwise(operation), ..self }
    }
}

async fn execute(client: &Client, common: &Common, args: &TxnArgs, script: Script) -> Result<(), CliError> {
    let Script { txn, history } = script;
    let options = args.write.options().with_history(history);
    let txn = client.txn_with(&args.scope.scope(), txn, options).await;
    let (reply, error) = write::reply(txn, TxnReply::unconfirmed)?;
    let text = match reply.header.ack {
        AckLevel::Leader => format!("{}\n", write::not_applied(&reply.header)),
        AckLevel::Quorum | AckLevel::All => text(&reply),
    };
    let (object, header) = (object(&reply), reply.header);
    WriteTold { header, text: Some(text), object, nothing: None }.tell(common.output, error)
}

fn read(args: &TxnArgs) -> Result<Script, CliError> {
    let Some(path) = &args.file else {
        let refuse = |flag: &str, text: &Bytes, why| {
            CliError::Usage(format!("--{flag} '{}': {why}", output::shown(text)))
        };
        let mut txn = Script::default();
        for text in &args.when {
            let compared = comparison(text).and_then(|comparison| txn.when(comparison));
            txn = compared.map_err(|why| refuse("when", text, why))?;
        }
        for text in &args.then {
            txn = txn.then(operation(text).map_err(|why| refuse("then", text, why))?);
        }
        for text in &args.otherwise {
            txn = txn.otherwise(operation(text).map_err(|why| refuse("else", text, why))?);
        }
        return Ok(txn);
    };
    let text = input::read(path.clone())?;
    parse(&text).map_err(|why| CliError::Usage(format!("{}: {why}", path.display())))
}

/// A whole transaction.
fn parse(text: &[u8]) -> Result<Script, String> {
    const UTF_8_MARK: &[u8] = b"\xef\xbb\xbf";
    const UTF_16_MARKS: [&[u8]; 2] = [b"\xff\xfe", b"\xfe\xff"];
    if UTF_16_MARKS.iter().any(|mark| text.starts_with(mark)) {
        return Err("the text is in UTF-16; write it in UTF-8".to_owned());
    }
    let text = text.strip_prefix(UTF_8_MARK).unwrap_or(text);
    let mut rest = text.trim_ascii_start();
    let mut txn = Script::default();
    while !rest.is_empty() {
        if rest[0] == b'#' {
            rest = rest[end_of(rest, |byte| byte != b'\n')..].trim_ascii_start();
            continue;
        }
        let line = 1 + text[..text.len() - rest.len()].iter().filter(|byte| **byte == b'\n').count();
        let at = |why: String| format!("line {line}: {why}");
        let (word, clause) = rest.split_at(end_of(rest, |byte| !byte.is_ascii_whitespace()));
        let is_comparison = word == b"when";
        let (found, after) = tokens(clause, is_comparison, true).map_err(at)?;
        txn = match word {
            b"when" => txn.when(read_comparison(&found).map_err(at)?).map_err(at)?,
            b"then" => txn.then(read_operation(found).map_err(at)?),
            b"else" => txn.otherwise(read_operation(found).map_err(at)?),
            _ => {
                let word = output::shown(word);
                return Err(at(format!("a line begins with when, then or else, not with \"{word}\"")));
            }
        };
        rest = after.trim_ascii_start();
    }
    if txn.txn.is_empty() { Err("the transaction is empty".to_owned()) } else { Ok(txn) }
}

/// One word or mark of a clause.
#[derive(Debug, Clone, PartialEq, Eq)]
enum TxnToken {
    Bare(Bytes),
    Quoted(Bytes),
    /// `=`, `!=`, `<`, `>`, `(` or `)`, only where [`tokens`] is asked for marks.
    Mark(&'static str),
}

impl TxnToken {
    fn into_bytes(self) -> Result<Bytes, String> {
        match self {
            Self::Bare(bytes) | Self::Quoted(bytes) => Ok(bytes),
            Self::Mark(mark) => Err(format!("a word was expected instead of {mark}")),
        }
    }
}

/// Where what `belongs` at the beginning of `text` ends.
fn end_of(text: &[u8], belongs: impl Fn(u8) -> bool) -> usize {
    text.iter().position(|byte| !belongs(*byte)).unwrap_or(text.len())
}

/// Splits a clause, and returns what follows it: with `one_line` it ends at a line break outside of quotes. Marks end bare
/// words in comparisons, and mean nothing in operations.
fn tokens(text: &[u8], marks: bool, one_line: bool) -> Result<(Vec<TxnToken>, &[u8]), String> {
    const MARKS: [&str; 6] = ["!=", "=", "<", ">", "(", ")"];
    let mark_at = |rest: &[u8]| MARKS.into_iter().find(|mark| marks && rest.starts_with(mark.as_bytes()));
    let is_space = |byte: u8| byte.is_ascii_whitespace() && !(one_line && byte == b'\n');
    let mut found = Vec::new();
    let mut rest = text;
    loop {
        rest = &rest[end_of(rest, is_space)..];
        if rest.is_empty() || (one_line && rest[0] == b'\n') {
            return Ok((found, rest));
        }
        if let Some(mark) = mark_at(rest) {
            found.push(TxnToken::Mark(mark));
            rest = &rest[mark.len()..];
        } else if let Some(quoted) = rest.strip_prefix(b"\"") {
            let (bytes, after) = unquote(quoted)?;
            found.push(TxnToken::Quoted(bytes));
            rest = after;
        } else {
            let ends = |at: &usize| rest[*at].is_ascii_whitespace() || mark_at(&rest[*at..]).is_some();
            let end = (0..rest.len()).find(ends).unwrap_or(rest.len());
            found.push(TxnToken::Bare(Bytes::copy_from_slice(&rest[..end])));
            rest = &rest[end..];
        }
    }
}

/// The bytes up to the closing quote, and what follows it.
fn unquote(text: &[u8]) -> Result<(Bytes, &[u8]), String> {
    let mut bytes = Vec::new();
    let mut at = 0;
    while let Some(byte) = text.get(at) {
        at += 1;
        if *byte == b'"' {
            return Ok((bytes.into(), &text[at..]));
        }
        if *byte != b'\\' {
            bytes.push(*byte);
            continue;
        }
        let escaped = text.get(at);
        at += 1;
        bytes.push(match escaped {
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(c @ (b'"' | b'\\')) => *c,
            Some(b'x') => {
                let digits = text.get(at..at + 2).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
                at += 2;
                let byte = digits.and_then(|digits| std::str::from_utf8(digits).ok());
                let byte = byte.and_then(|digits| u8::from_str_radix(digits, 16).ok());
                byte.ok_or("\\x must be followed by two hexadecimal digits")?
            }
            _ => return Err("a \\ in quotation marks must be followed by one of \" \\ n r t x".to_owned()),
        });
    }
    Err("a quotation mark is missing at the end".to_owned())
}

fn comparison(text: &[u8]) -> Result<(Compare, HistoryEpoch), String> {
    read_comparison(&tokens(text, true, false)?.0)
}

/// A comparison, and the history of the revision in it, if it is given.
fn read_comparison(tokens: &[TxnToken]) -> Result<(Compare, HistoryEpoch), String> {
    const FORM: &str = "write KEY = VALUE, value(KEY), version(KEY), created(KEY) or modified(KEY) with = != < >, exists KEY, or missing KEY";
    let any = |compare| Ok((compare, HistoryEpoch::UNKNOWN));
    match tokens {
        [TxnToken::Bare(word), key] if word == "exists" => any(Compare::exists(key.clone().into_bytes()?)),
        [TxnToken::Bare(word), key] if word == "missing" => any(Compare::missing(key.clone().into_bytes()?)),
        [key, TxnToken::Mark(mark), value] => {
            let (key, value) = (key.clone().into_bytes()?, value.clone().into_bytes()?);
            any(Compare::value(key).is(sign(mark).ok_or(FORM)?, value))
        }
        [TxnToken::Bare(of), TxnToken::Mark("("), key, TxnToken::Mark(")"), TxnToken::Mark(mark), value] => {
            let (key, value) = (key.clone().into_bytes()?, value.clone().into_bytes()?);
            let sign = sign(mark).ok_or(FORM)?;
            let text = std::str::from_utf8(&value).unwrap_or_default();
            let revision = || {
                let revision = text.parse::<Bookmark>();
                let of = output::shown(of);
                revision.map_err(|_| {
                    format!("{of} is compared with a revision: 42, or 42@HISTORY as it was printed")
                })
            };
            match &of[..] {
                b"value" => any(Compare::value(key).is(sign, value)),
                b"version" => {
                    let number = text.parse().map_err(|_| "version is compared with a number".to_owned())?;
                    any(Compare::version(key).is(sign, number))
                }
                b"created" => {
                    let Bookmark { index, history } = revision()?;
                    Ok((Compare::create_revision(key).is(sign, index), history))
                }
                b"modified" => {
                    let Bookmark { index, history } = revision()?;
                    Ok((Compare::mod_revision(key).is(sign, index), history))
                }
                _ => Err(FORM.to_owned()),
            }
        }
        _ => Err(FORM.to_owned()),
    }
}

fn sign(mark: &str) -> Option<Comparison> {
    match mark {
        "=" => Some(Comparison::Equal),
        "!=" => Some(Comparison::NotEqual),
        "<" => Some(Comparison::Less),
        ">" => Some(Comparison::Greater),
        _ => None,
    }
}

fn operation(text: &[u8]) -> Result<TxnOp, String> {
    read_operation(tokens(text, false, false)?.0)
}

fn read_operation(tokens: Vec<TxnToken>) -> Result<TxnOp, String> {
    const FORM: &str = "write get KEY, put KEY VALUE [ttl=TIME], del KEY, range START [END], prefix KEY, del-range START END, del-from START, del-prefix KEY, or del-all";
    const EMPTY: &str = "an empty word there would remove more than it says; del-all removes every key";
    let mut tokens = tokens.into_iter();
    let Some(TxnToken::Bare(verb)) = tokens.next() else { return Err(FORM.to_owned()) };
    let words = tokens.map(TxnToken::into_bytes).collect::<Result<Vec<_>, _>>()?;
    let between =
        |start: &Bytes, end: &Bytes| Range { start: start.clone(), end: end.clone(), limit_items: 0 };
    if verb.starts_with(b"del-") && words.iter().any(Bytes::is_empty) {
        return Err(EMPTY.to_owned());
    }
    Ok(match (&verb[..], &words[..]) {
        (b"get", [key]) => TxnOp::get(key.clone()),
        (b"put", [key, value]) => TxnOp::put(key.clone(), value.clone()),
        (b"put", [key, value, ttl]) => {
            let time = std::str::from_utf8(ttl).ok().and_then(|text| text.strip_prefix("ttl="));
            TxnOp::put_with_ttl(key.clone(), value.clone(), duration::parse(time.ok_or(FORM)?)?)
        }
        (b"del", [key]) => TxnOp::delete(key.clone()),
        (b"range", [start]) => TxnOp::range(between(start, &Bytes::new())),
        (b"range", [start, end]) => TxnOp::range(between(start, end)),
        (b"prefix", [key]) => TxnOp::range(Range::prefix(key.clone())),
        (b"del-range", [start, end]) => TxnOp::delete_range(between(start, end)),
        // With an end that is forgotten, or empty in a script, del-range would be this.
        (b"del-range", [_]) => {
            return Err("END is missing; del-from START removes all keys from START to the end".to_owned());
        }
        (b"del-from", [start]) => TxnOp::delete_range(between(start, &Bytes::new())),
        (b"del-prefix", [key]) => TxnOp::delete_range(Range::prefix(key.clone())),
        (b"del-all", []) => TxnOp::delete_range(Range::all()),
        _ => return Err(FORM.to_owned()),
    })
}

fn text(reply: &TxnReply) -> String {
    let which = if reply.succeeded { "all comparisons hold" } else { "not all comparisons hold" };
    let mut text = format!("{which}, revision {}\n", reply.revision);
    let item =
        |item: &Item| format!("{}  {}\n", output::printable(&item.key), output::printable(&item.value));
    for result in &reply.results {
        match result {
            TxnResult::Get(Some(found)) => text.push_str(&item(found)),
            TxnResult::Get(None) => text.push_str("(does not exist)\n"),
            TxnResult::Range { items, next } => {
                text.extend(items.iter().map(item));
                if let Some(next) = next {
                    text.push_str(&format!("(there are more, from {})\n", output::printable(next)));
                }
            }
            TxnResult::Put { version, .. } => text.push_str(&format!("put, version {version}\n")),
            TxnResult::Delete { deleted } => {
                text.push_str(if *deleted { "deleted\n" } else { "did not exist\n" });
            }
            TxnResult::DeleteRange { deleted } => text.push_str(&format!("deleted {deleted}\n")),
        }
    }
    text
}

fn object(reply: &TxnReply) -> Map<String, Value> {
    let item = |item: &Item| Value::Object(output::item_object(item));
    let result = |result: &TxnResult| match result {
        TxnResult::Get(found) => json!({ "get": found.as_ref().map(item) }),
        TxnResult::Range { items, next } => {
            let mut range = Map::from_iter([("items".to_owned(), items.iter().map(item).collect())]);
            match next {
                Some(next) => output::insert_bytes(&mut range, "next", next),
                None => drop(range.insert("next".to_owned(), Value::Null)),
            }
            json!({ "range": range })
        }
        TxnResult::Put { create_revision, version } => {
            json!({ "put": { "create_revision": create_revision, "version": version } })
        }
        TxnResult::Delete { deleted } => json!({ "delete": { "deleted": deleted } }),
        TxnResult::DeleteRange { deleted } => json!({ "delete_range": { "deleted": deleted } }),
    };
    let applied = reply.header.ack != AckLevel::Leader;
    let known = |value: Value| if applied { value } else { Value::Null };
    let mut object = Map::from_iter([
        ("succeeded".to_owned(), known(reply.succeeded.into())),
        ("revision".to_owned(), known(reply.revision.into())),
        ("results".to_owned(), known(reply.results.iter().map(result).collect())),
    ]);
    write::insert_header(&mut object, &reply.header);
    object
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_text_is_read_as_what_it_says() {
        let text = r#"
            # take the lock over
            when owner = "a b\x00\"\n"
            when version(lock)>3
            when created("k (1)") != 7
            when modified(k)<9
            when exists x
            when missing y
            then put owner b
            then put lock me ttl=30s
            then del "a=b"
            else prefix user/
            else del-range a b
        "#;
        let expected = Txn::new()
            .when(Compare::value("owner").equals(&b"a b\0\"\n"[..]))
            .when(Compare::version("lock").is(Comparison::Greater, 3))
            .when(Compare::create_revision("k (1)").differs_from(7))
            .when(Compare::mod_revision("k").is(Comparison::Less, 9))
            .when(Compare::exists("x"))
            .when(Compare::missing("y"))
            .then(TxnOp::put("owner", "b"))
            .then(TxnOp::put_with_ttl("lock", "me", Duration::from_secs(30)))
            .then(TxnOp::delete("a=b"))
            .otherwise(TxnOp::range(Range::prefix("user/")))
            .otherwise(TxnOp::delete_range(Range { start: "a".into(), end: "b".into(), limit_items: 0 }));
        assert_eq!(parse(text.as_bytes()).unwrap().txn, expected);
        // What stands before the first sign is the key, whatever it is called.
        assert_eq!(comparison(b"exists = 1").unwrap().0, Compare::value("exists").equals("1"));
        assert_eq!(operation(b"put k a=b").unwrap(), TxnOp::put("k", "a=b"));
        assert_eq!(
            operation(b"put k\nv").unwrap(),
            TxnOp::put("k", "v"),
            "a flag is one clause whatever is in it"
        );
        assert_eq!(
            operation(b"del-from a").unwrap(),
            TxnOp::delete_range(Range { start: "a".into(), ..Range::all() })
        );
        assert_eq!(operation(b"del-all").unwrap(), TxnOp::delete_range(Range::all()));
    }

    #[test]
    fn a_text_holds_any_bytes() {
        for text in [
            &b"\xef\xbb\xbfthen put k \"two\nlines\"\nthen del x\n"[..],
            b"then put k \"two\\nlines\"\r\n\r\n # a comment\r\nthen del x",
        ] {
            let expected = Txn::new().then(TxnOp::put("k", "two\nlines")).then(TxnOp::delete("x"));
            assert_eq!(parse(text).unwrap().txn, expected, "{text:?}");
        }
        let bare = b"when \xff\xfe\x01=\xe4\nthen put \xff \xff\nelse get \"#\n#\"";
        let expected = Txn::new()
            .when(Compare::value(&b"\xff\xfe\x01"[..]).equals(&b"\xe4"[..]))
            .then(TxnOp::put(&b"\xff"[..], &b"\xff"[..]))
            .otherwise(TxnOp::get("#\n#"));
        assert_eq!(parse(bare).unwrap().txn, expected);
        // Whatever a table prints can be written between quotation marks, and means the same bytes.
        for first in 0..=u8::MAX {
            for second in [b'a', b'"', b'\\', b'\n', b' ', 0x80, 0xff] {
                let bytes = [first, second];
                let printed = output::printable(&bytes);
                let quoted = match printed.starts_with('"') {
                    true => printed,
                    false => format!("\"{}\"", printed.replace('"', "\\\"")),
                };
                let read = parse(format!("then put k {quoted}").as_bytes()).unwrap();
                assert_eq!(read.txn, Txn::new().then(TxnOp::put("k", bytes.to_vec())), "{quoted}");
            }
        }
    }

    #[test]
    fn a_revision_may_be_a_bookmark_whose_history_counts_for_all() {
        let script =
            parse(b"when modified(k) = 4@9f3c\nwhen created(k) < 7\nwhen version(k) = 1\nthen get k")
                .unwrap();
        let expected = Txn::new()
            .when(Compare::mod_revision("k").equals(4))
            .when(Compare::create_revision("k").is(Comparison::Less, 7))
            .when(Compare::version("k").equals(1))
            .then(TxnOp::get("k"));
        assert_eq!(script, Script { txn: expected, history: HistoryEpoch(0x9f3c) });
        assert_eq!(comparison(b"created(k) != 4@b").unwrap().1, HistoryEpoch(0xb));
        for text in [
            "when version(k) = 4@b",
            "when modified(k) = 4@",
            "when modified(k) = 4@b\nwhen created(k) = 4@c",
        ] {
            assert!(parse(format!("{text}\nthen get k").as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn nothing_empty_means_everything() {
        for text in [
            "del-prefix \"\"",
            "del-prefix",
            "del-range \"\" b",
            "del-range a \"\"",
            "del-range a",
            "del-range",
            "del-from \"\"",
            "del-from",
            "del-all \"\"",
            "del-all x",
        ] {
            assert!(operation(text.as_bytes()).is_err(), "{text}");
        }
        assert!(operation(b"del-prefix \"\"").unwrap_err().contains("del-all"));
        assert!(operation(b"del-range a").unwrap_err().contains("del-from"));
    }

    /// What is acknowledged before it is applied has not been compared yet.
    #[test]
    fn what_is_not_known_yet_is_null() {
        let mut reply = TxnReply { succeeded: true, revision: 7, ..TxnReply::default() };
        let known = Value::Object(object(&reply));
        assert_eq!(
            (&known["succeeded"], &known["revision"], &known["results"]),
            (&true.into(), &7.into(), &json!([]))
        );
        reply.header.ack = AckLevel::Leader;
        let unknown = Value::Object(object(&reply));
        for name in ["succeeded", "revision", "results"] {
            assert!(unknown[name].is_null() && unknown.get(name).is_some(), "{name} in {unknown}");
        }
        assert_eq!(unknown["ack"], "leader");
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_its_line() {
        assert_eq!(
            parse(b"when k = v\nif k").unwrap_err(),
            "line 2: a line begins with when, then or else, not with \"if\""
        );
        assert_eq!(
            parse(b"then put k \"a\nb\"\n\nthen put k \"a\n").unwrap_err(),
            "line 4: a quotation mark is missing at the end"
        );
        assert!(parse(b"\xff\xfet\0").unwrap_err().contains("UTF-16"));
        for text in [
            "",
            "when",
            "when k",
            "when k =",
            "when k == v",
            "when version(k) = x",
            "when size(k) = 1",
            "when k = \"v",
            "then",
            "then put k",
            "then put k v w",
            "then put k v ttl=",
            "then get a b",
            "then put k \"\\q\"",
            "then put k \"\\x1\"",
            "then put k \"\\xzz\"",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
