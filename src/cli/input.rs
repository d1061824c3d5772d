//! Keys and values as arguments, from files and in base64: any string of bytes can be given.
//!
//! An argument is taken byte by byte as the shell passes it, whether it is UTF-8 or not; one cannot be empty by
//! accident where that would mean everything. What no shell can pass comes in base64 or from a file.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::path::PathBuf;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};

use super::CliError;
use crate::kv::client::Scope;
use crate::shown::Shown;
use crate::types::NodeId;

/// Whose keys.
#[derive(Debug, Clone, Args)]
pub struct ScopeArgs {
    /// The tenant
    #[arg(long, env = "QUORATE_TENANT", default_value = "default", value_parser = parse_name)]
    pub tenant: String,
    /// The tenant's collection
    #[arg(long, env = "QUORATE_COLLECTION", default_value = "default", value_parser = parse_name)]
    pub collection: String,
}

impl ScopeArgs {
    pub(super) fn scope(&self) -> Scope {
        // The protocol's default; not to send the name saves its bytes in every request.
        let named = |name: &str| if name == "default" { String::new() } else { name.to_owned() };
        Scope { tenant: named(&self.tenant), collection: named(&self.collection) }
    }
}

/// A key that is not given as a plain argument.
#[derive(Debug, Clone, Default, Args)]
pub struct KeyFlags {
    /// The key in base64, instead of KEY: any bytes, as -o json prints them in "key_base64"
    #[arg(long, value_name = "BASE64", value_parser = parse_base64, conflicts_with = "key_file")]
    pub key_base64: Option<Bytes>,
    /// Read the key from a file, instead of KEY: every byte of it, a last line break included; `-` is standard input
    #[arg(long, value_name = "PATH")]
    pub key_file: Option<PathBuf>,
}

impl KeyFlags {
    /// Whether one of the flags is set.
    pub(super) fn is_given(&self) -> bool {
        self.key_base64.is_some() || self.key_file.is_some()
    }

    /// The key from these flags, or else the one in `argument`, which is called `name`. It may be empty.
    ///
    /// # Errors
    /// [`CliError::Usage`] when there are two or none, [`CliError::Input`] when the file cannot be read.
    pub(super) fn resolve(&self, name: &str, argument: Option<Bytes>) -> Result<Bytes, CliError> {
        match (argument, &self.key_base64, &self.key_file) {
            (Some(_), Some(_), _) | (Some(_), _, Some(_)) => {
                Err(CliError::Usage(format!("{name} is given twice: as an argument and by a flag")))
            }
            (Some(key), None, None) => Ok(key),
            (None, Some(key), _) => Ok(key.clone()),
            (None, None, Some(path)) => read(path.clone()).map(Into::into),
            (None, None, None) => Err(CliError::Usage(format!("{name} is missing"))),
        }
    }

    /// As [`resolve`](Self::resolve), for a command that is about one key: an empty one is refused.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub(super) fn key(&self, argument: Option<Bytes>) -> Result<Bytes, CliError> {
        match self.resolve("the key", argument)? {
            key if key.is_empty() => Err(CliError::Usage("the key is empty, and no key can be".to_owned())),
            key => Ok(key),
        }
    }
}

/// Most bytes of a file: no message could carry more. Some files have no end.
const MAX_INPUT_BYTES: u64 = 32 * 1024 * 1024;

/// Reads the whole of a file, or of standard input when it is called `-`.
///
/// # Errors
/// [`CliError::Input`], and [`CliError::Usage`] when it is larger than anything that could be sent.
pub(super) fn read(path: PathBuf) -> Result<Vec<u8>, CliError> {
    let mut bytes = Vec::new();
    let most = MAX_INPUT_BYTES + 1;
    let read = match path.as_os_str() == "-" {
        true => std::io::stdin().lock().take(most).read_to_end(&mut bytes),
        false => fs::File::open(&path).and_then(|file| file.take(most).read_to_end(&mut bytes)),
    };
    read.map_err(|source| CliError::Input { path: path.clone(), source })?;
    match bytes.len() as u64 > MAX_INPUT_BYTES {
        false => Ok(bytes),
        true => Err(CliError::Usage(format!(
            "{} has more than {MAX_INPUT_BYTES} bytes, which is more than a key, a value or a transaction can have",
            Shown(&path.to_string_lossy())
        ))),
    }
}

/// Takes an argument as it is, byte by byte.
pub(super) fn argument() -> impl TypedValueParser<Value = Bytes> {
    OsStringValueParser::new().map(|text: OsString| Bytes::from(text.into_encoded_bytes()))
}

/// A node id.
///
/// # Errors
/// In words.
pub(super) fn parse_node_id(text: &str) -> Result<NodeId, String> {
    match text.parse() {
        Ok(node_id @ 1..) => Ok(node_id),
        _ => Err("a node id is a whole number from 1".to_owned()),
    }
}

/// The name of a tenant or a collection. An empty one is most likely that of a variable that is not set, and would mean
/// `default`, whose keys are somebody else's.
///
/// # Errors
/// In words.
pub(super) fn parse_name(text: &str) -> Result<String, String> {
    match text {
        "" => Err("the name is empty, as an unset variable is; write `default`, or leave the flag out (and the variable QUORATE_TENANT or QUORATE_COLLECTION unset), for the one that is called so".to_owned()),
        name => Ok(name.to_owned()),
    }
}

/// Reads base64 with or without the `=` at its end.
///
/// # Errors
/// In words.
pub(super) fn parse_base64(text: &str) -> Result<Bytes, String> {
    let text = text.trim();
    let padded = match text.ends_with('=') {
        true => text.to_owned(),
        false => format!("{text}{}", "=".repeat((4 - text.len() % 4) % 4)),
    };
    let form = "this is not base64: write letters, digits, + and / in groups of four, the last filled up with = or not";
    BASE64_STANDARD.decode(padded).map(Bytes::from).map_err(|_| form.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_base64(text: &str) -> KeyFlags {
        KeyFlags { key_base64: Some(parse_base64(text).unwrap()), key_file: None }
    }

    #[test]
    fn every_string_of_bytes_can_be_given_in_base64() {
        for length in 0..20_u8 {
            let bytes: Vec<u8> = (0..length).map(|n| n.wrapping_mul(53).wrapping_add(length)).collect();
            let text = BASE64_STANDARD.encode(&bytes);
            assert_eq!(parse_base64(&text).unwrap(), bytes, "{text}");
            assert_eq!(parse_base64(text.trim_end_matches('=')).unwrap(), bytes, "{text} without padding");
        }
        for text in ["%", "a", "YQ==Y", "Y Q", "\u{e4}", "/w=", "/w===", "="] {
            let refused = parse_base64(text).unwrap_err();
            assert!(refused.starts_with("this is not base64"), "{text}: {refused}");
        }
        for text in ["", "0", "-1", "x", "1.5", "18446744073709551616"] {
            assert_eq!(parse_node_id(text).unwrap_err(), "a node id is a whole number from 1", "{text}");
        }
        assert_eq!(parse_node_id("7"), Ok(7));
    }

    #[test]
    fn a_file_without_an_end_is_refused() {
        let refused = read(PathBuf::from("/dev/zero")).unwrap_err().to_string();
        assert!(refused.contains("/dev/zero has more than 33554432 bytes"), "{refused}");
    }

    #[test]
    fn an_empty_name_is_not_taken_for_the_default_one() {
        assert_eq!(parse_name("c"), Ok("c".to_owned()));
        assert!(parse_name("").unwrap_err().contains("write `default`"));
    }

    #[test]
    fn a_key_comes_from_one_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"\xff\n").unwrap();
        let from_file = KeyFlags { key_base64: None, key_file: Some(file.path().to_owned()) };
        assert_eq!(from_file.key(None).unwrap(), &b"\xff\n"[..]);
        assert_eq!(in_base64("/wA=").key(None).unwrap(), &b"\xff\0"[..]);
        assert_eq!(KeyFlags::default().key(Some("k".into())).unwrap(), "k");
        for (flags, argument) in [
            (from_file, Some("k".into())),
            (in_base64("aw=="), Some("k".into())),
            (KeyFlags::default(), None),
            (KeyFlags::default(), Some(Bytes::new())),
            (in_base64(""), None),
        ] {
            let refused = flags.key(argument).unwrap_err();
            assert!(matches!(refused, CliError::Usage(_)), "{refused}");
        }
        let missing = KeyFlags { key_base64: None, key_file: Some("/nonexistent/file".into()) };
        assert!(matches!(missing.key(None), Err(CliError::Input { .. })));
    }
}
