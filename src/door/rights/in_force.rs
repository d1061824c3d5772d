//! The credentials that are in force at one moment: whom what a caller shows stands for, and whether that is still so later.
//!
//! # Secrets
//!
//! A token is looked up by its hash, and the hash by a code of it under a key that this process has made up: how long a
//! look-up takes says nothing of the tokens that there are.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use ring::digest::{SHA256, digest};
use ring::hmac;

use super::file::{CertificateEntry, TokenEntry, TokensFile};
use super::grants::Granted;
use super::jwt::JwtKeys;

/// Longest credential that is looked at.
pub(crate) const MAX_TOKEN_BYTES: usize = 8 * 1024;

/// What a caller has shown.
#[derive(Clone, Copy, Default)]
pub(crate) struct PresentedCredential<'a> {
    pub(crate) bearer: Option<&'a str>,
    /// The names in its certificate, which has been verified.
    pub(crate) certificate: &'a [String],
    /// Until when that is valid, in seconds since the Unix epoch.
    pub(crate) certificate_expires: u64,
}

/// Which credential a caller was identified by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum CredentialKey {
    /// None is asked for.
    Unneeded,
    /// None was shown.
    Anonymous,
    /// A token whose hash has this code.
    Token([u8; 32]),
    /// A signature by the key with this hash.
    Jwt([u8; 32]),
    Certificate(String),
}

impl CredentialKey {
    /// What lines of the log call it.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Unneeded => "unneeded",
            Self::Anonymous => "anonymous",
            Self::Token(_) => "token",
            Self::Jwt(_) => "jwt",
            Self::Certificate(_) => "certificate",
        }
    }
}

/// Whom a credential stands for.
#[derive(Debug, Clone)]
pub(crate) struct Identified {
    pub(crate) name: Arc<str>,
    pub(crate) key: CredentialKey,
    pub(crate) granted: Arc<Granted>,
    /// In seconds since the Unix epoch.
    pub(crate) expires: Option<u64>,
}

/// Why a credential stands for nobody. For the log: a caller is told nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unidentified {
    Missing,
    Malformed,
    TooLong,
    Unknown,
    Expired,
    NotYet,
    WrongSignature,
    WrongClaims,
}

impl Unidentified {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Malformed => "malformed",
            Self::TooLong => "too_long",
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::NotYet => "not_yet_valid",
            Self::WrongSignature => "wrong_signature",
            Self::WrongClaims => "wrong_claims",
        }
    }
}

struct NamedEntry {
    name: Arc<str>,
    granted: Arc<Granted>,
    expires: Option<u64>,
}

/// See the [module](self).
pub(crate) struct InForce {
    key: hmac::Key,
    tokens: HashMap<[u8; 32], NamedEntry>,
    certificates: HashMap<String, NamedEntry>,
    anonymous: Option<Arc<Granted>>,
    jwt: Option<JwtKeys>,
}

/// Nothing of what is in it is shown.
impl fmt::Debug for InForce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InForce").field("tokens", &self.tokens.len()).finish_non_exhaustive()
    }
}

fn code(key: &hmac::Key, hash: &[u8]) -> [u8; 32] {
    let tag = hmac::sign(key, hash);
    tag.as_ref().try_into().expect("invariant: a code by SHA-256 has 32 bytes")
}

impl InForce {
    /// What `file` and the keys say. `key` is the process's own.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub(super) fn new(key: &hmac::Key, file: TokensFile, jwt: Option<JwtKeys>) -> Result<Self, String> {
        let mut tokens = HashMap::new();
        for entry in file.token {
            let hash = entry.hash()?;
            let TokenEntry { name, expires, roles, grants, limits, .. } = entry;
            let granted = Arc::new(Granted { roles, grants, limits });
            tokens.insert(code(key, &hash), NamedEntry { name: name.into(), granted, expires });
        }
        let certificates = file.certificate.into_iter().map(|entry| {
            let CertificateEntry { name, roles, grants, limits } = entry;
            let granted = Arc::new(Granted { roles, grants, limits });
            (name.clone(), NamedEntry { name: name.into(), granted, expires: None })
        });
        let (certificates, anonymous) = (certificates.collect(), file.anonymous.map(Arc::new));
        Ok(Self { key: key.clone(), tokens, certificates, anonymous, jwt })
    }

    /// Whom `shown` stands for at `now`, in seconds since the Unix epoch. A token that is not valid is not taken for none.
    ///
    /// # Errors
    /// Why for nobody.
    pub(crate) fn identify(
        &self,
        shown: PresentedCredential<'_>,
        now: u64,
    ) -> Result<Identified, Unidentified> {
        match shown.bearer {
            Some(bearer) if bearer.len() > MAX_TOKEN_BYTES => Err(Unidentified::TooLong),
            Some(bearer) => match &self.jwt {
                // No token that this program makes has a dot in it.
                Some(keys) if bearer.contains('.') => keys.identify(bearer, now),
                _ => self.token(bearer, now),
            },
            None => match self.certified(shown) {
                Some(_) if shown.certificate_expires <= now => Err(Unidentified::Expired),
                certified => certified.or_else(|| self.anonymous()).ok_or(Unidentified::Missing),
            },
        }
    }

    fn token(&self, bearer: &str, now: u64) -> Result<Identified, Unidentified> {
        let code = code(&self.key, digest(&SHA256, bearer.as_bytes()).as_ref());
        let entry = self.tokens.get(&code).ok_or(Unidentified::Unknown)?;
        match entry.expires {
            Some(expires) if expires <= now => Err(Unidentified::Expired),
            _ => Ok(entry.identified(CredentialKey::Token(code))),
        }
    }

    /// Its connection goes on when the certificate expires, so that is looked at here.
    fn certified(&self, shown: PresentedCredential<'_>) -> Option<Identified> {
        shown.certificate.iter().find_map(|name| {
            let entry = self.certificates.get(name)?;
            let identified = entry.identified(CredentialKey::Certificate(name.clone()));
            Some(Identified { expires: Some(shown.certificate_expires), ..identified })
        })
    }

    fn anonymous(&self) -> Option<Identified> {
        let granted = self.anonymous.clone()?;
        Some(Identified { name: "anonymous".into(), key: CredentialKey::Anonymous, granted, expires: None })
    }

    /// Whether the credential `key`, by which so much was granted until `expires`, grants just that by now.
    pub(crate) fn still_grants(&self, key: &CredentialKey, granted: &Granted, expires: Option<u64>) -> bool {
        let entry = match key {
            CredentialKey::Unneeded => return true,
            // What is granted stands in the token.
            CredentialKey::Jwt(hash) => return self.jwt.as_ref().is_some_and(|keys| keys.has(hash)),
            CredentialKey::Anonymous => return self.anonymous.as_deref() == Some(granted),
            CredentialKey::Token(code) => self.tokens.get(code),
            CredentialKey::Certificate(name) => {
                // Until when it is valid stands in the certificate.
                return self.certificates.get(name).is_some_and(|entry| *entry.granted == *granted);
            }
        };
        entry.is_some_and(|entry| *entry.granted == *granted && entry.expires == expires)
    }
}

impl NamedEntry {
    fn identified(&self, key: CredentialKey) -> Identified {
        Identified { name: self.name.clone(), key, granted: self.granted.clone(), expires: self.expires }
    }
}
