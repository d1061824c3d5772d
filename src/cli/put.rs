//! `quorate put`.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use serde_json::{Map, Value};

use super::input::{self, KeyFlags};
use super::read;
use super::write::{self, WriteArgs, WriteTold};
use super::{CliError, Common, ScopeArgs, output};
use crate::duration;
use crate::kv::client::{Client, Compare, ConditionalPut, PutReply, WriteOptions};
use crate::types::{AckLevel, Bookmark, HistoryEpoch};

/// Arguments of `quorate put`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate put greeting hello\n  quorate put logo --file logo.png\n  date | quorate put now -\n  quorate put dash --value -                       the character, not standard input\n  quorate put --key-base64 /wA= --value-base64 AAE=   bytes that are no text\n  quorate put lock me --if-absent --ttl 30s\n  quorate put greeting hi --if-revision 42\n  quorate put greeting hi --ack all\n\nThe write is applied at most once, however often it had to be sent. Exits with 4 when a condition does not hold, and with 5 when it is not known whether the value was written, or when with --ack all not every voter has confirmed it in time: what came of it is printed then."
)]
pub struct PutArgs {
    /// The key; left out with --key-base64 or --key-file
    #[arg(value_parser = input::argument(), required_unless_present_any = ["key_base64", "key_file"])]
    pub key: Option<Bytes>,
    /// Its new value; `-` reads it from standard input
    #[arg(
        value_parser = input::argument(),
        required_unless_present_any = ["file", "literal", "value_base64", "key_base64", "key_file"],
        allow_hyphen_values = true
    )]
    pub value: Option<Bytes>,
    /// Read the value from a file
    #[arg(long, value_name = "PATH", conflicts_with = "value")]
    pub file: Option<PathBuf>,
    /// The value as it is, even if it is `-`
    #[arg(
        long = "value",
        value_name = "VALUE",
        value_parser = input::argument(),
        allow_hyphen_values = true,
        conflicts_with_all = ["value", "file"]
    )]
    pub literal: Option<Bytes>,
    /// The value in base64: any bytes
    #[arg(
        long,
        value_name = "BASE64",
        value_parser = input::parse_base64,
        conflicts_with_all = ["value", "file", "literal"]
    )]
    pub value_base64: Option<Bytes>,
    /// Other ways to give the key
    #[command(flatten)]
    pub key_flags: KeyFlags,
    /// Remove the key after this long, unless it is written again
    #[arg(long, value_name = "TIME", value_parser = duration::parse, allow_hyphen_values = true)]
    pub ttl: Option<Duration>,
    /// Only if the key does not exist
    #[arg(long, conflicts_with = "if_revision")]
    pub if_absent: bool,
    /// Only if the key's last put was at this revision
    #[arg(long, value_name = "REVISION[@HISTORY]", value_parser = read::parse_revision)]
    pub if_revision: Option<Bookmark>,
    /// When it counts as done
    #[command(flatten)]
    pub write: WriteArgs,
    /// Whose key
    #[command(flatten)]
    pub scope: ScopeArgs,
}

impl PutArgs {
    fn options(&self) -> WriteOptions {
        let history = self.if_revision.map_or(HistoryEpoch::UNKNOWN, |revision| revision.history);
        let options = self.write.options().with_history(history);
        self.ttl.map_or(options, |ttl| options.with_ttl(ttl))
    }

    fn condition(&self, key: &Bytes) -> Option<Compare> {
        match self.if_revision {
            Some(revision) => Some(Compare::mod_revision(key.clone()).equals(revision.index)),
            None => self.if_absent.then(|| Compare::missing(key.clone())),
        }
    }

    /// Key and value. With a flag for the key, the first argument is the value.
    fn read(&mut self) -> Result<(Bytes, Bytes), CliError> {
        if self.key_flags.is_given() && self.value.is_none() {
            self.value = self.key.take();
        }
        let ways =
            [self.value.is_some(), self.file.is_some(), self.literal.is_some(), self.value_base64.is_some()];
        match ways.into_iter().filter(|given| *given).count() {
            0 => return Err(CliError::Usage("the value is missing".to_owned())),
            1 => {}
            _ => return Err(CliError::Usage("the value is given twice".to_owned())),
        }
        let key = self.key_flags.key(self.key.take())?;
        let value = match (self.file.take(), self.value.take()) {
            (Some(path), _) => input::read(path)?.into(),
            (None, Some(value)) if value == "-" => input::read("-".into())?.into(),
            (None, Some(value)) => value,
            (None, None) => self.literal.take().or(self.value_base64.take()).unwrap_or_default(),
        };
        Ok((key, value))
    }
}

/// Sets the key and prints its revision.
///
/// # Errors
/// [`CliError::ConditionFailed`] when a condition does not hold; others see [`CliError`].
pub async fn run(common: &Common, args: PutArgs) -> Result<(), CliError> {
    common.with_client(async |client| put(client, common, args).await).await
}

async fn put(client: &Client, common: &Common, mut args: PutArgs) -> Result<(), CliError> {
    let (key, value) = args.read()?;
    let (scope, options) = (args.scope.scope(), args.options());
    let Some(condition) = args.condition(&key) else {
        let put = client.put_with(&scope, key, value, options).await;
        let (reply, error) = write::reply(put, PutReply::unconfirmed)?;
        return told(&reply).tell(common.output, error);
    };
    let put = client.put_when(&scope, condition, key.clone(), value, options).await;
    let (put, error) = write::reply(put, ConditionalPut::unconfirmed)?;
    let ConditionalPut { header, succeeded, revision, create_revision, version, current } = put;
    let mut told = told(&PutReply { header, revision, create_revision, version });
    if error.is_some() {
        told.object.insert("succeeded".to_owned(), succeeded.into());
    }
    if succeeded {
        return told.tell(common.output, error);
    }
    let (key, current_revision) = (output::printable(&key), current.map(|item| item.mod_revision));
    let failed = CliError::ConditionFailed { key, current_revision };
    let Some(error) = error else { return Err(failed) };
    told.object.insert("current_revision".to_owned(), current_revision.into());
    Err(write::unconfirmed(error, told.object, Some(failed)))
}

fn told(reply: &PutReply) -> WriteTold {
    let text = match reply.header.ack {
        AckLevel::Leader => write::not_applied(&reply.header),
        AckLevel::Quorum | AckLevel::All => format!("revision {}, version {}", reply.revision, reply.version),
    };
    let (header, text) = (reply.header.clone(), Some(format!("{text}\n")));
    WriteTold { header, text, object: object(reply), nothing: None }
}

/// All fields, whatever kind of put it was; what is not known is null.
fn object(reply: &PutReply) -> Map<String, Value> {
    let applied = reply.header.ack != AckLevel::Leader;
    let known = |number: u64| if applied && number > 0 { Value::from(number) } else { Value::Null };
    let mut object = Map::from_iter([
        ("revision".to_owned(), known(reply.revision)),
        ("create_revision".to_owned(), known(reply.create_revision)),
        ("version".to_owned(), known(reply.version)),
    ]);
    write::insert_header(&mut object, &reply.header);
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, parse};

    fn read(args: &[&str]) -> Result<(Bytes, Bytes), CliError> {
        match parse([&["quorate", "put"], args].concat()).unwrap().command {
            Command::Put(mut put) => put.read(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_put_has_the_same_fields_and_what_is_not_known_is_null() {
        let mut reply = PutReply { revision: 7, create_revision: 3, version: 2, ..PutReply::default() };
        let fields = |reply: &PutReply| {
            ["revision", "create_revision", "version"].map(|name| object(reply)[name].clone())
        };
        assert_eq!(fields(&reply), [7, 3, 2].map(Value::from));
        reply.header.ack = AckLevel::Leader;
        assert_eq!(fields(&reply), [Value::Null, Value::Null, Value::Null]);
        let old_server = PutReply { revision: 7, ..PutReply::default() };
        assert_eq!(fields(&old_server), [7.into(), Value::Null, Value::Null]);
    }

    #[test]
    fn key_and_value_are_taken_from_wherever_they_are_given() {
        for (args, key, value) in [
            (&["k", "v"][..], &b"k"[..], &b"v"[..]),
            (&["k", "--value", "-"], b"k", b"-"),
            (&["k", "--value=--ttl"], b"k", b"--ttl"),
            (&["k", "-v"], b"k", b"-v"),
            (&["k", ""], b"k", b""),
            (&["k", "--value-base64", "/wA="], b"k", b"\xff\0"),
            (&["--key-base64", "/w==", "v"], b"\xff", b"v"),
            (&["--key-base64", "/w==", "--value", "-"], b"\xff", b"-"),
            (&["-", "v"], b"-", b"v"),
        ] {
            let (found_key, found_value) = read(args).unwrap();
            assert_eq!((&found_key[..], &found_value[..]), (key, value), "{args:?}");
        }
        for args in [
            &["--key-base64", "/w=="][..],
            &["--key-base64", "/w==", "k", "v"],
            &["--key-base64", "/w==", "v", "--value", "w"],
            &["", "v"],
            &["--key-base64", "", "v"],
        ] {
            assert!(matches!(read(args), Err(CliError::Usage(_))), "{args:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn arguments_need_not_be_utf_8() {
        use std::os::unix::ffi::OsStringExt;
        let args = ["quorate".into(), "put".into(), b"\xffk".to_vec(), b"\xfe\x01".to_vec()];
        let args = args.map(std::ffi::OsString::from_vec);
        let Command::Put(mut put) = parse(args).unwrap().command else { panic!("another command") };
        assert_eq!(put.read().unwrap(), (Bytes::from_static(b"\xffk"), Bytes::from_static(b"\xfe\x01")));
    }
}
