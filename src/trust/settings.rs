//! What a node is told of how members prove who they are.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};

use super::TrustError;
use super::challenge::{MAX_SECRET_BYTES, MIN_SECRET_BYTES};

/// Whether members have to prove to each other who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum PeerAuth {
    /// No: connections are plain, and whoever reaches the peer port may say that it is a member.
    Off,
    /// As far as the other end can, while a cluster changes over: secured connections are dialled first and plain ones taken, too. Protects
    /// against nobody who can stand between members, or who dials.
    Optional,
    /// Yes: a plain connection is neither dialled nor taken.
    Required,
}

/// A secret that the members of a cluster share. What is shown of it is that there is one.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerSecret(String);

impl<'de> Deserialize<'de> for PeerSecret {
    /// Whatever it is instead of a text is not shown.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer);
        text.map(Self).map_err(|_| serde::de::Error::custom("a secret is a text; put it in quotes"))
    }
}

impl PeerSecret {
    /// This text, of 16 bytes at least. It should be random: `openssl rand -hex 32` makes one.
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// As it is given: an empty one is none.
    #[cfg(feature = "cli")]
    pub(crate) fn given(self) -> Option<Self> {
        (!self.0.is_empty()).then_some(self)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for PeerSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeerSecret(…)")
    }
}

/// How the members of a cluster prove to each other who they are: by certificates, by a secret that they share, or, by default, not at all.
///
/// Files are read again when they change, within twenty seconds. Those that cannot be used leave in force what was. `docs/SECURITY.md` says
/// what each way promises.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerTrust {
    /// A PEM file with the authorities whose certificates are believed; several while one takes the place of another.
    pub ca: Option<PathBuf>,
    /// A PEM file with this node's certificate, and the chain to its authority.
    pub certificate: Option<PathBuf>,
    /// A PEM file with the key of that.
    pub key: Option<PathBuf>,
    /// A file with the secret in its first line. A second line is another secret that is accepted, too, while one takes the place of the other.
    pub secret_file: Option<PathBuf>,
    /// The secret itself.
    pub secret: Option<PeerSecret>,
    /// Whether they have to. Without this they do where there is anything to prove it by.
    pub auth: Option<PeerAuth>,
}

/// What is proven by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ProofSource {
    Certificates { ca: PathBuf, certificate: PathBuf, key: PathBuf },
    SecretFile(PathBuf),
    Secret(PeerSecret),
}

impl PeerTrust {
    /// By certificates: all three are PEM files.
    #[must_use]
    pub fn certificates(
        ca: impl Into<PathBuf>,
        certificate: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
    ) -> Self {
        Self {
            ca: Some(ca.into()),
            certificate: Some(certificate.into()),
            key: Some(key.into()),
            ..Self::default()
        }
    }

    /// By the secret in a file.
    #[must_use]
    pub fn secret_file(path: impl Into<PathBuf>) -> Self {
        Self { secret_file: Some(path.into()), ..Self::default() }
    }

    /// By a secret.
    #[must_use]
    pub fn secret(secret: PeerSecret) -> Self {
        Self { secret: Some(secret), ..Self::default() }
    }

    /// Whether members have to prove who they are.
    pub fn auth(&self) -> PeerAuth {
        let has_any =
            [&self.ca, &self.certificate, &self.key, &self.secret_file].iter().any(|path| path.is_some())
                || self.secret.is_some();
        self.auth.unwrap_or(if has_any { PeerAuth::Required } else { PeerAuth::Off })
    }

    /// The same, without an `auth` that says what holds without it.
    #[cfg(feature = "cli")]
    #[must_use]
    pub(crate) fn settled(mut self) -> Self {
        let given = self.auth.take();
        if given != Some(self.auth()) {
            self.auth = given;
        }
        self
    }

    /// Refuses what contradicts itself. Reads no file.
    ///
    /// # Errors
    /// [`TrustError::Settings`], saying what to do.
    pub fn validate(&self) -> Result<(), TrustError> {
        self.source().map(drop)
    }

    /// What is proven by; none if nothing is proven.
    pub(super) fn source(&self) -> Result<Option<ProofSource>, TrustError> {
        let refuse = |why: String| Err(TrustError::Settings(why));
        let has_secret = self.secret.is_some() || self.secret_file.is_some();
        let source = match (&self.ca, &self.certificate, &self.key) {
            (None, None, None) => match (&self.secret, &self.secret_file) {
                (None, None) => None,
                (Some(_), Some(_)) => {
                    return refuse(
                        "--peer-secret and --peer-secret-file are both given; leave one out".to_owned(),
                    );
                }
                (Some(secret), None) => {
                    check_secret("--peer-secret", secret.as_bytes()).map_err(TrustError::Settings)?;
                    Some(ProofSource::Secret(secret.clone()))
                }
                (None, Some(path)) => Some(ProofSource::SecretFile(path.clone())),
            },
            _ if has_secret => {
                return refuse(
                    "--peer-ca, --peer-cert and --peer-key are one way in which members prove who they are, --peer-secret and --peer-secret-file are another; leave one of them out"
                        .to_owned(),
                );
            }
            (Some(ca), Some(certificate), Some(key)) => Some(ProofSource::Certificates {
                ca: ca.clone(),
                certificate: certificate.clone(),
                key: key.clone(),
            }),
            (ca, certificate, key) => {
                let given = [("--peer-ca", ca), ("--peer-cert", certificate), ("--peer-key", key)];
                let missing: Vec<_> =
                    given.iter().filter(|(_, path)| path.is_none()).map(|(name, _)| *name).collect();
                return refuse(format!(
                    "--peer-ca, --peer-cert and --peer-key belong together; give {}, too",
                    missing.join(" and ")
                ));
            }
        };
        match (self.auth(), source) {
            (PeerAuth::Off, _) => Ok(None),
            (PeerAuth::Optional | PeerAuth::Required, None) => refuse(
                "--peer-auth needs something to prove it by: give --peer-ca, --peer-cert and --peer-key, or --peer-secret-file"
                    .to_owned(),
            ),
            (PeerAuth::Optional | PeerAuth::Required, source) => Ok(source),
        }
    }
}

impl ProofSource {
    /// Its files, with the settings that name them.
    pub(super) fn files(&self) -> Vec<(&'static str, &Path)> {
        match self {
            Self::Certificates { ca, certificate, key } => {
                vec![("--peer-ca", ca), ("--peer-cert", certificate), ("--peer-key", key)]
            }
            Self::SecretFile(path) => vec![("--peer-secret-file", path)],
            Self::Secret(_) => Vec::new(),
        }
    }
}

/// Refuses what is no secret.
pub(super) fn check_secret(setting: &str, secret: &[u8]) -> Result<(), String> {
    match secret.len() {
        MIN_SECRET_BYTES..=MAX_SECRET_BYTES => Ok(()),
        bytes => Err(format!(
            "{setting}: a secret has {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, and this one {bytes}; `openssl rand -hex 32` makes a good one"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_contradicts_itself_is_refused_and_says_what_to_do() {
        let whole = || PeerTrust::certificates("ca", "cert", "key");
        let secret = || PeerSecret::new("0123456789abcdef");
        for (trust, said) in [
            (PeerTrust { key: None, ..whole() }, "give --peer-key, too"),
            (PeerTrust { secret: Some(secret()), ..whole() }, "leave one of them out"),
            (PeerTrust { secret: Some(secret()), ..PeerTrust::secret_file("s") }, "leave one out"),
            (PeerTrust::secret(PeerSecret::new("short")), "16 to 1024 bytes"),
            (PeerTrust { auth: Some(PeerAuth::Required), ..PeerTrust::default() }, "--peer-auth needs"),
        ] {
            let refused = trust.validate().unwrap_err().to_string();
            assert!(refused.contains(said) && !refused.contains("0123"), "{refused}");
        }
        assert!(whole().validate().is_ok() && PeerTrust::default().validate().is_ok());
    }

    #[test]
    fn who_has_credentials_must_prove_them_unless_told_otherwise() {
        assert_eq!(PeerTrust::default().auth(), PeerAuth::Off);
        assert_eq!(PeerTrust::secret_file("s").auth(), PeerAuth::Required);
        let off = PeerTrust { auth: Some(PeerAuth::Off), ..PeerTrust::secret_file("s") };
        assert_eq!(off.source(), Ok(None));
        assert_eq!(off.clone().settled(), off);
        let required = PeerTrust { auth: Some(PeerAuth::Required), ..PeerTrust::secret_file("s") };
        assert_eq!(required.settled(), PeerTrust::secret_file("s"));
    }

    #[test]
    fn a_secret_is_not_shown() {
        let shown = format!("{:?}", PeerTrust::secret(PeerSecret::new("0123456789abcdef")));
        assert!(!shown.contains("0123"), "{shown}");
    }
}
