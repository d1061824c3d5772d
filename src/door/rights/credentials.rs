//! The credentials of callers, read from files, and read again while the node runs.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use ring::{hmac, rand::SystemRandom};
use tokio::sync::watch;

use super::audit::{AuditedCall, RefusedCallers};
use super::file::TokensFile;
use super::grants::AccessRole;
use super::in_force::{Identified, InForce, MAX_TOKEN_BYTES, PresentedCredential, Unidentified};
use super::jwt::{JwtKeys, JwtPolicy};
use super::principal::Principal;
use super::table::CallRight;
use super::usage::Usages;
use crate::proto::v1::Failure;
use crate::runtime;

/// How often the files are looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Most bytes of a file.
const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;
/// Signed tokens that are not verified again.
const MOST_VERIFIED: usize = 4096;
/// How far clocks are apart at most, where nothing is said.
const LEEWAY: Duration = Duration::from_secs(30);

/// What callers are identified by. Without either file nobody is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientAuth {
    /// The file of static tokens, names in certificates, and what callers may do who show nothing.
    pub tokens_file: Option<PathBuf>,
    /// Keys by which tokens are signed (JWT): a set (JWKS), or a public key as PEM.
    pub jwt_keys: Option<PathBuf>,
    /// For whom a signed token must be meant.
    pub jwt_audience: Option<String>,
    /// By whom it must be issued.
    pub jwt_issuer: Option<String>,
    /// How far the clock of an issuer may be from this node's. Default 30 s.
    pub jwt_leeway: Duration,
}

impl Default for ClientAuth {
    fn default() -> Self {
        Self { tokens_file: None, jwt_keys: None, jwt_audience: None, jwt_issuer: None, jwt_leeway: LEEWAY }
    }
}

impl ClientAuth {
    /// Whether callers are asked for a credential.
    pub fn is_required(&self) -> bool {
        self.tokens_file.is_some() || self.jwt_keys.is_some()
    }
}

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {detail}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        detail: String,
    },
    /// There is neither a file of tokens nor one of keys.
    #[error("callers can be identified by nothing: name a file of tokens or one of keys")]
    Nothing,
    /// The system has no random numbers.
    #[error("the system gives no random numbers")]
    NoRandom,
}

/// The credentials by which callers of a port are identified. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub struct Credentials(Arc<CredentialFiles>);

struct CredentialFiles {
    auth: ClientAuth,
    key: hmac::Key,
    in_force: watch::Sender<Arc<InForce>>,
    /// What the files held that is in force, and what they held when they were last read.
    read: Mutex<(FileHashes, FileHashes)>,
    reloads: AtomicU64,
    failures: AtomicU64,
    refused: Arc<RefusedCallers>,
    verified: VerifiedTokens,
    usages: Usages,
}

/// Signed tokens that were verified, by their hashes: of one state of the files, and of no more than [`MOST_VERIFIED`].
#[derive(Default)]
struct VerifiedTokens(Mutex<VerifiedBy>);

/// By what they were verified, and whom they stand for.
type VerifiedBy = (Weak<InForce>, HashMap<[u8; 32], Identified>);

impl VerifiedTokens {
    fn lock(&self) -> MutexGuard<'_, VerifiedBy> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, hash: &[u8; 32], in_force: &Arc<InForce>, now: u64) -> Option<Identified> {
        let verified = self.lock();
        let is_of_now = std::ptr::eq(verified.0.as_ptr(), Arc::as_ptr(in_force));
        let found = verified.1.get(hash).filter(|_| is_of_now)?;
        Some(found.clone()).filter(|found| found.expires.is_some_and(|expires| expires > now))
    }

    fn keep(&self, hash: [u8; 32], in_force: &Arc<InForce>, identified: &Identified) {
        let mut verified = self.lock();
        let is_of_now = std::ptr::eq(verified.0.as_ptr(), Arc::as_ptr(in_force));
        if !is_of_now || verified.1.len() >= MOST_VERIFIED {
            *verified = (Arc::downgrade(in_force), HashMap::new());
        }
        verified.1.insert(hash, identified.clone());
    }
}

/// The hashes of what the files hold, of those that there are.
type FileHashes = [Option<[u8; 32]>; 2];

/// What is counted of credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct CredentialCounts {
    /// How often what the files hold has changed, and how often they could not be used.
    pub(crate) reloads: u64,
    pub(crate) failures: u64,
    /// Requests that were refused: for want of a credential, and of a right.
    pub(crate) unidentified: u64,
    pub(crate) denied: u64,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("auth", &self.0.auth).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Those in the files of `auth`.
    ///
    /// # Errors
    /// [`CredentialsError`], when a file cannot be used, or there is none.
    pub fn load(auth: ClientAuth) -> Result<Self, CredentialsError> {
        if !auth.is_required() {
            return Err(CredentialsError::Nothing);
        }
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new());
        let key = key.map_err(|_| CredentialsError::NoRandom)?;
        let (in_force, read) = read(&auth, &key)?;
        Ok(Self(Arc::new(CredentialFiles {
            auth,
            key,
            in_force: watch::Sender::new(Arc::new(in_force)),
            read: Mutex::new((read, read)),
            reloads: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            refused: Arc::default(),
            verified: VerifiedTokens::default(),
            usages: Usages::default(),
        })))
    }

    /// Who makes `call` and has shown this, if it has `right`; without one, whoever it is.
    ///
    /// # Errors
    /// The failure to answer instead. It is counted, and told in the log.
    pub(crate) fn admit(
        &self,
        shown: PresentedCredential<'_>,
        right: Option<CallRight>,
        call: &AuditedCall<'_>,
    ) -> Result<Principal, Failure> {
        let refused = &self.0.refused;
        let principal = self.identify(shown, call).map_err(|why| refused.unidentified(call, why))?;
        match right.is_none_or(|right| principal.may(right)) {
            true => Ok(principal),
            false => Err(principal.deny(call.path)),
        }
    }

    /// Whether whoever has shown this may see how the node is. Nothing is counted or told in the log: probes need show nothing.
    pub(crate) fn observes(&self, shown: PresentedCredential<'_>) -> bool {
        let identified = self.0.in_force.borrow().clone().identify(shown, runtime::unix_time_ms() / 1000);
        identified.is_ok_and(|identified| identified.granted.has(AccessRole::Observe))
    }

    fn identify(
        &self,
        shown: PresentedCredential<'_>,
        call: &AuditedCall<'_>,
    ) -> Result<Principal, Unidentified> {
        let now = runtime::unix_time_ms() / 1000;
        let receiver = self.0.in_force.subscribe();
        let in_force = receiver.borrow().clone();
        // To verify a signature takes a hundred times as long as to look it up.
        let signed = shown.bearer.filter(|bearer| bearer.len() <= MAX_TOKEN_BYTES && bearer.contains('.'));
        let hash = signed.map(|bearer| super::sha256(bearer.as_bytes()));
        let known = hash.and_then(|hash| self.0.verified.find(&hash, &in_force, now));
        let identified = match known {
            Some(identified) => identified,
            None => {
                let identified = in_force.identify(shown, now)?;
                if let Some(hash) = hash {
                    self.0.verified.keep(hash, &in_force, &identified);
                }
                identified
            }
        };
        let told = (call.address, self.0.refused.clone());
        Ok(Principal::new(identified, now, receiver, &self.0.usages, told))
    }

    /// What has been counted since the process started.
    pub(crate) fn counts(&self) -> CredentialCounts {
        let CredentialFiles { reloads, failures, refused, .. } = &*self.0;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CredentialCounts {
            reloads: count(reloads),
            failures: count(failures),
            unidentified: count(&refused.unidentified),
            denied: count(&refused.denied),
        }
    }

    /// Reads the files again whenever they have changed. A file that cannot be used changes nothing.
    pub(crate) async fn keep(self) -> std::convert::Infallible {
        // Of the last look, so that a file that stays as it is is told of once.
        let mut told = String::new();
        loop {
            tokio::time::sleep(LOOK_AGAIN).await;
            let files = self.0.clone();
            match runtime::offload(move || files.look()).await {
                Ok(false) => told.clear(),
                Ok(true) => {
                    told.clear();
                    tracing::info!("the credentials of callers have changed");
                }
                Err(error) => {
                    self.0.failures.fetch_add(1, Ordering::Relaxed);
                    let error = error.to_string();
                    if error != told {
                        tracing::error!(error, "the credentials of callers stay as they were");
                        told = error;
                    }
                }
            }
        }
    }
}

impl CredentialFiles {
    /// Takes what the files hold by now. Whether that is something else.
    fn look(&self) -> Result<bool, CredentialsError> {
        let (in_force, read) = read(&self.auth, &self.key)?;
        let mut known = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let last = std::mem::replace(&mut known.1, read);
        // What half a file says may be more than the whole one does: it is believed when it was the same twice.
        if known.0 == read || last != read {
            return Ok(false);
        }
        known.0 = read;
        self.in_force.send_replace(Arc::new(in_force));
        self.reloads.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }
}

/// What the files of `auth` hold, and what tells whether that has changed.
fn read(auth: &ClientAuth, key: &hmac::Key) -> Result<(InForce, FileHashes), CredentialsError> {
    let (tokens, keys) = (text(auth.tokens_file.as_deref())?, text(auth.jwt_keys.as_deref())?);
    let wrong = |path: &Option<PathBuf>| {
        let path = path.clone().unwrap_or_default();
        move |detail| CredentialsError::Parse { path, detail }
    };
    let jwt = match &keys {
        Some(keys) => {
            let policy = JwtPolicy {
                audience: auth.jwt_audience.clone(),
                issuer: auth.jwt_issuer.clone(),
                leeway: auth.jwt_leeway,
            };
            Some(JwtKeys::parse(keys, policy).map_err(wrong(&auth.jwt_keys))?)
        }
        None => None,
    };
    let file = TokensFile::parse(tokens.as_deref().unwrap_or_default()).map_err(wrong(&auth.tokens_file))?;
    let in_force = InForce::new(key, file, jwt).map_err(wrong(&auth.tokens_file))?;
    let hash = |text: Option<String>| text.map(|text| super::sha256(text.as_bytes()));
    Ok((in_force, [hash(tokens), hash(keys)]))
}

fn text(path: Option<&Path>) -> Result<Option<String>, CredentialsError> {
    let Some(path) = path else { return Ok(None) };
    let failed = |source| CredentialsError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    match text.len() as u64 > MAX_FILE_BYTES {
        true => {
            let detail = format!("it has more than {MAX_FILE_BYTES} bytes: is it the right file?");
            Err(CredentialsError::Parse { path: path.to_owned(), detail })
        }
        false => Ok(Some(text)),
    }
}
