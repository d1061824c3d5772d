//! `quorate txn`: a transaction from flags, a file or standard input.
//!
//! The text is one clause per line, each beginning with `when`, `then` or `else`; the flags are the same clauses
//! without that word. A word is bare, or in double quotes with `\"`, `\\`, `\n`, `\t` and `\xNN`.

use std::fs;
use std::io::Read;
use std::path::PathBuf;

use bytes::Bytes;
use clap::Args;
use serde_json::{Map, Value, json};

use super::write::{self, WriteArgs};
use super::{CliError, Common, Format, ScopeArgs, output, parse_time};
use crate::client::{Client, Compare, Comparison, Item, Range, Txn, TxnOp, TxnReply, TxnResult};
use crate::types::AckLevel;

/// Arguments of `quorate txn`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate txn --when 'owner = \"a\"' --then 'put owner b' --else 'get owner'\n  quorate txn --when 'missing lock' --then 'put lock me ttl=30s'\n  quorate txn move.txt\n\n  where move.txt holds\n    # comments and empty lines are skipped\n    when value(from) = \"10\"\n    when version(to) > 0\n    then put from \"9\"\n    then put to \"1\"\n    else get from\n\nComparisons: KEY = VALUE or value(KEY) = VALUE, version(KEY), created(KEY) and modified(KEY) with a number, each with = != < or >; exists KEY; missing KEY. All must hold.\nOperations: get KEY; put KEY VALUE [ttl=TIME]; del KEY; range START [END]; prefix KEY; del-range START [END]; del-prefix KEY.\nExits with 0 whichever list was done; the first line of the output says which."
)]
pub struct TxnArgs {
    /// File with the transaction; `-` is standard input
    #[arg(conflicts_with_all = ["when", "then", "otherwise"], required_unless_present_any = ["then", "otherwise"])]
    pub file: Option<PathBuf>,
    /// A comparison; all must hold. May be repeated
    #[arg(long, value_name = "COMPARISON")]
    pub when: Vec<String>,
    /// An operation to do if all comparisons hold. May be repeated
    #[arg(long, value_name = "OPERATION")]
    pub then: Vec<String>,
    /// An operation to do if not. May be repeated
    #[arg(long = "else", value_name = "OPERATION")]
    pub otherwise: Vec<String>,
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
    let txn = read(&args)?;
    common.with_client(async |client| execute(client, common, &args, txn).await).await
}

async fn execute(client: &Client, common: &Common, args: &TxnArgs, txn: Txn) -> Result<(), CliError> {
    let reply = client.txn_with(&args.scope.scope(), txn, args.write.options()).await?;
    match common.output {
        Format::Json => output::json(&object(&reply)),
        Format::Table if reply.header.ack == AckLevel::Leader => {
            output::line(&write::not_applied(&reply.header))
        }
        Format::Table => output::raw(text(&reply).as_bytes()),
    }
}

fn read(args: &TxnArgs) -> Result<Txn, CliError> {
    let Some(path) = &args.file else {
        let refuse = |flag: &str, text: &str, why| CliError::Usage(format!("--{flag} '{text}': {why}"));
        let mut txn = Txn::new();
        for text in &args.when {
            txn = txn.when(comparison(text).map_err(|why| refuse("when", text, why))?);
        }
        for text in &args.then {
            txn = txn.then(operation(text).map_err(|why| refuse("then", text, why))?);
        }
        for text in &args.otherwise {
            txn = txn.otherwise(operation(text).map_err(|why| refuse("else", text, why))?);
        }
        return Ok(txn);
    };
    let unreadable = |source| CliError::Input { path: path.clone(), source };
    let mut text = String::new();
    if path.as_os_str() == "-" {
        std::io::stdin().lock().read_to_string(&mut text).map_err(unreadable)?;
    } else {
        text = fs::read_to_string(path).map_err(unreadable)?;
    }
    parse(&text).map_err(|why| CliError::Usage(format!("{}: {why}", path.display())))
}

/// A whole transaction.
fn parse(text: &str) -> Result<Txn, String> {
    let mut txn = Txn::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let at = |why| format!("line {}: {why}", number + 1);
        txn = match word {
            "when" => txn.when(comparison(rest).map_err(at)?),
            "then" => txn.then(operation(rest).map_err(at)?),
            "else" => txn.otherwise(operation(rest).map_err(at)?),
            _ => return Err(at(format!("a line begins with when, then or else, not with \"{word}\""))),
        };
    }
    if txn.is_empty() { Err("there is nothing in it".to_owned()) } else { Ok(txn) }
}

/// One word or mark of a clause.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Bare(String),
    Quoted(Vec<u8>),
    /// `=`, `!=`, `<`, `>`, `(` or `)`, only where [`tokens`] is asked for marks.
    Mark(&'static str),
}

impl Token {
    fn into_bytes(self) -> Result<Bytes, String> {
        match self {
            Self::Bare(text) => Ok(text.into_bytes().into()),
            Self::Quoted(bytes) => Ok(bytes.into()),
            Self::Mark(mark) => Err(format!("a word was expected instead of {mark}")),
        }
    }
}

/// Splits a clause. Marks end bare words in comparisons, and mean nothing in operations.
fn tokens(text: &str, marks: bool) -> Result<Vec<Token>, String> {
    const MARKS: [&str; 6] = ["!=", "=", "<", ">", "(", ")"];
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let mark = MARKS.into_iter().find(|mark| marks && rest.starts_with(mark));
        if let Some(mark) = mark {
            found.push(Token::Mark(mark));
            rest = &rest[mark.len()..];
        } else if let Some(quoted) = rest.strip_prefix('"') {
            let (bytes, after) = unquote(quoted)?;
            found.push(Token::Quoted(bytes));
            rest = after;
        } else {
            let ends = |(at, c): (usize, char)| {
                c.is_whitespace() || (marks && MARKS.iter().any(|mark| rest[at..].starts_with(mark)))
            };
            let end = rest.char_indices().find(|place| ends(*place)).map_or(rest.len(), |(at, _)| at);
            found.push(Token::Bare(rest[..end].to_owned()));
            rest = &rest[end..];
        }
        rest = rest.trim_start();
    }
    Ok(found)
}

/// The bytes up to the closing quote, and what follows it.
fn unquote(text: &str) -> Result<(Vec<u8>, &str), String> {
    let mut bytes = Vec::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((bytes, &text[at + 1..])),
            '\\' => match chars.next().map(|(_, c)| c) {
                Some('n') => bytes.push(b'\n'),
                Some('t') => bytes.push(b'\t'),
                Some(c @ ('"' | '\\')) => bytes.push(c as u8),
                Some('x') => {
                    let digits: String = chars.by_ref().take(2).map(|(_, c)| c).collect();
                    let byte = u8::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 2);
                    bytes.push(byte.ok_or("\\x wants two hexadecimal digits")?);
                }
                _ => return Err("after \\ comes one of \" \\ n t x".to_owned()),
            },
            c => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Err("a quotation mark is missing at the end".to_owned())
}

fn comparison(text: &str) -> Result<Compare, String> {
    const FORM: &str = "write KEY = VALUE, value(KEY), version(KEY), created(KEY) or modified(KEY) with = != < >, exists KEY, or missing KEY";
    let tokens = tokens(text, true)?;
    match &tokens[..] {
        [Token::Bare(word), key] if word == "exists" => Ok(Compare::exists(key.clone().into_bytes()?)),
        [Token::Bare(word), key] if word == "missing" => Ok(Compare::missing(key.clone().into_bytes()?)),
        [key, Token::Mark(mark), value] => {
            let (key, value) = (key.clone().into_bytes()?, value.clone().into_bytes()?);
            Ok(Compare::value(key).is(sign(mark).ok_or(FORM)?, value))
        }
        [Token::Bare(of), Token::Mark("("), key, Token::Mark(")"), Token::Mark(mark), value] => {
            let (key, value) = (key.clone().into_bytes()?, value.clone().into_bytes()?);
            let sign = sign(mark).ok_or(FORM)?;
            let subject = match of.as_str() {
                "value" => return Ok(Compare::value(key).is(sign, value)),
                "version" => Compare::version(key),
                "created" => Compare::create_revision(key),
                "modified" => Compare::mod_revision(key),
                _ => return Err(FORM.to_owned()),
            };
            let number = std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok());
            Ok(subject.is(sign, number.ok_or_else(|| format!("{of} is compared with a number"))?))
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

fn operation(text: &str) -> Result<TxnOp, String> {
    const FORM: &str = "write get KEY, put KEY VALUE [ttl=TIME], del KEY, range START [END], prefix KEY, del-range START [END], or del-prefix KEY";
    let mut tokens = tokens(text, false)?.into_iter();
    let Some(Token::Bare(verb)) = tokens.next() else { return Err(FORM.to_owned()) };
    let words = tokens.map(Token::into_bytes).collect::<Result<Vec<_>, _>>()?;
    let between =
        |start: &Bytes, end: &Bytes| Range { start: start.clone(), end: end.clone(), limit_items: 0 };
    Ok(match (verb.as_str(), &words[..]) {
        ("get", [key]) => TxnOp::get(key.clone()),
        ("put", [key, value]) => TxnOp::put(key.clone(), value.clone()),
        ("put", [key, value, ttl]) => {
            let time = std::str::from_utf8(ttl).ok().and_then(|text| text.strip_prefix("ttl="));
            TxnOp::put_with_ttl(key.clone(), value.clone(), parse_time(time.ok_or(FORM)?)?)
        }
        ("del", [key]) => TxnOp::delete(key.clone()),
        ("range", [start]) => TxnOp::range(between(start, &Bytes::new())),
        ("range", [start, end]) => TxnOp::range(between(start, end)),
        ("prefix", [key]) => TxnOp::range(Range::prefix(key.clone())),
        ("del-range", [start]) => TxnOp::delete_range(between(start, &Bytes::new())),
        ("del-range", [start, end]) => TxnOp::delete_range(between(start, end)),
        ("del-prefix", [key]) => TxnOp::delete_range(Range::prefix(key.clone())),
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
        assert_eq!(parse(text).unwrap(), expected);
        // What stands before the first sign is the key, whatever it is called.
        assert_eq!(comparison("exists = 1").unwrap(), Compare::value("exists").equals("1"));
        assert_eq!(operation("put k a=b").unwrap(), TxnOp::put("k", "a=b"));
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
            parse("when k = v\nif k").unwrap_err(),
            "line 2: a line begins with when, then or else, not with \"if\""
        );
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
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
