//! The file of tokens: who may do what, by the hash of a token or the name in a certificate.
//!
//! It holds no token, so whoever reads it can use none.

use std::collections::HashSet;

use serde::Deserialize;

use super::grants::{AccessRole, CallerLimits, Grant, Granted};
use super::hex;

/// Most entries of a file.
const MAX_ENTRIES: usize = 10_000;
/// Most grants of an entry.
pub(super) const MAX_GRANTS: usize = 256;
/// Longest name of a caller.
pub(super) const MAX_NAME_BYTES: usize = 128;

/// What the file says.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct TokensFile {
    pub(super) token: Vec<TokenEntry>,
    pub(super) certificate: Vec<CertificateEntry>,
    /// What callers may do who show nothing.
    pub(super) anonymous: Option<Granted>,
}

/// A static token.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TokenEntry {
    pub(super) name: String,
    /// SHA-256 of the token, in hexadecimal digits.
    pub(super) sha256: String,
    /// In seconds since the Unix epoch.
    #[serde(default)]
    pub(super) expires: Option<u64>,
    #[serde(default)]
    pub(super) roles: Vec<AccessRole>,
    #[serde(default)]
    pub(super) grants: Vec<Grant>,
    #[serde(default)]
    pub(super) limits: CallerLimits,
}

impl TokenEntry {
    /// # Errors
    /// What is wrong with it.
    pub(super) fn hash(&self) -> Result<[u8; 32], String> {
        hex::decode(&self.sha256).ok_or_else(|| {
            format!(
                "the sha256 of token \"{}\" is not 64 hexadecimal digits: `quorate token hash` prints it",
                self.name
            )
        })
    }
}

/// The name in a certificate.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CertificateEntry {
    pub(super) name: String,
    #[serde(default)]
    pub(super) roles: Vec<AccessRole>,
    #[serde(default)]
    pub(super) grants: Vec<Grant>,
    #[serde(default)]
    pub(super) limits: CallerLimits,
}

impl TokensFile {
    /// # Errors
    /// What is wrong with `text`. It repeats no hash.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let file: Self = toml::from_str(text).map_err(|error| {
            // Its text shows the line, which may hold what should not be shown.
            let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
            format!("line {line}: {}", error.message())
        })?;
        file.check().map(|()| file)
    }

    fn check(&self) -> Result<(), String> {
        let entries = self.token.len() + self.certificate.len();
        if entries > MAX_ENTRIES {
            return Err(format!("it has {entries} entries, more than {MAX_ENTRIES}"));
        }
        let tokens = self.token.iter().map(|entry| (&entry.name, &entry.grants, entry.limits));
        let certificates = self.certificate.iter().map(|entry| (&entry.name, &entry.grants, entry.limits));
        for (name, grants, limits) in tokens.chain(certificates) {
            check_name(name)?;
            if limits.requests_per_second == Some(0) {
                return Err(format!(
                    "\"{name}\" may make no request in a second; take its grants away instead"
                ));
            }
            if grants.len() > MAX_GRANTS {
                return Err(format!("\"{name}\" has {} grants, more than {MAX_GRANTS}", grants.len()));
            }
        }
        let (mut names, mut hashes) = (HashSet::new(), HashSet::new());
        for entry in &self.token {
            if !names.insert(&entry.name) {
                return Err(format!("two tokens are called \"{}\"; give each a name of its own", entry.name));
            }
            if !hashes.insert(entry.hash()?) {
                return Err(format!("token \"{}\" stands in the file twice", entry.name));
            }
        }
        let mut certified = HashSet::new();
        match self.certificate.iter().find(|entry| !certified.insert(&entry.name)) {
            Some(twice) => Err(format!("two certificates are called \"{}\"", twice.name)),
            None => Ok(()),
        }
    }
}

/// # Errors
/// Why `name` is none: it stands in lines of the log.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    match name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
        true => Err(format!("a name has 1 to {MAX_NAME_BYTES} bytes, all of them printable")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::grants::{DataRight, Touched};
    use super::*;

    const HASH: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    #[test]
    fn a_file_says_who_may_do_what() {
        let text = format!(
            "[[token]]\nname = \"app\"\nsha256 = \"{HASH}\"\nexpires = 1800000000\nroles = [\"observe\"]\n\n[[token.grants]]\ntenant = \"acme\"\nprefix = \"orders\"\nrights = [\"read\", \"write\"]\n\n[[certificate]]\nname = \"replica.example.com\"\ngrants = [{{ tenant = \"*\", rights = [\"subscribe\"] }}]\n\n[anonymous]\nroles = [\"observe\"]\n"
        );
        let file = TokensFile::parse(&text).unwrap();
        let [token] = &file.token[..] else { panic!("{file:?}") };
        assert_eq!((token.name.as_str(), token.expires), ("app", Some(1_800_000_000)));
        let (roles, grants) = (token.roles.clone(), token.grants.clone());
        let granted = Granted { roles, grants, ..Granted::default() };
        let orders = Touched::Collection { tenant: "acme", collection: "orders" };
        assert!(granted.covers(DataRight::Write, orders) && granted.has(AccessRole::Observe));
        assert_eq!(file.certificate[0].name, "replica.example.com");
        assert!(file.anonymous.is_some_and(|granted| granted.has(AccessRole::Observe)));
    }

    #[test]
    fn what_is_wrong_is_said_without_what_is_secret() {
        let entry = |name: &str, hash: &str| format!("[[token]]\nname = \"{name}\"\nsha256 = \"{hash}\"\n");
        let other = HASH.replace('9', "8");
        for (text, says) in [
            (entry("a", "5ecret"), "64 hexadecimal digits"),
            (entry("", HASH), "1 to 128 bytes"),
            (entry("a", HASH) + &entry("a", &other), "two tokens are called"),
            (entry("a", HASH) + &entry("b", HASH), "stands in the file twice"),
            (entry("a", HASH) + "granted = []\n", "line 4: unknown field"),
            ("[[token]]\nname = \"a\"\n".to_owned(), "missing field"),
            ("[[token]]\nname = \"a\nsha256 = 5ecret".to_owned(), "line 2"),
            (entry("a", HASH) + "roles = [\"root\"]\n", "unknown variant"),
        ] {
            let error = TokensFile::parse(&text).unwrap_err();
            assert!(error.contains(says), "{error}");
            assert!(!error.contains("5ecret") && !error.contains(HASH), "{error}");
        }
    }
}
