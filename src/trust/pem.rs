//! Certificates and keys, as files hold them.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use super::{TrustError, provider};

/// No file with credentials is larger.
const MAX_FILE_BYTES: u64 = 256 * 1024;
/// Most authorities in one file.
const MAX_AUTHORITIES: usize = 64;
/// Most certificates from a node's own to its authority.
const MAX_CHAIN: usize = 8;

/// All of a file.
pub(super) fn read(setting: &'static str, path: &Path) -> Result<Vec<u8>, TrustError> {
    let unreadable = |reason: String| TrustError::Unreadable { setting, path: path.to_owned(), reason };
    let file = File::open(path).map_err(|error| unreadable(error.to_string()))?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| unreadable(error.to_string()))?;
    match bytes.len() as u64 <= MAX_FILE_BYTES {
        true => Ok(bytes),
        false => Err(unreadable(format!("it has more than {MAX_FILE_BYTES} bytes"))),
    }
}

/// A file's content, with where it is from: for messages.
pub(super) struct PemText<'a> {
    pub(super) setting: &'static str,
    pub(super) path: &'a Path,
    pub(super) bytes: &'a [u8],
}

impl PemText<'_> {
    pub(super) fn wrong(&self, reason: impl Into<String>) -> TrustError {
        TrustError::Content { setting: self.setting, path: self.path.to_owned(), reason: reason.into() }
    }

    /// The certificates in it, at least one.
    pub(super) fn certificates(&self, most: usize) -> Result<Vec<CertificateDer<'static>>, TrustError> {
        let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(self.bytes).collect();
        let parsed = parsed.map_err(|error| self.wrong(format!("it is no PEM file: {error}")))?;
        match parsed.len() {
            0 => Err(self.wrong("no certificate is in it; it must be a PEM file with BEGIN CERTIFICATE")),
            many if many > most => Err(self.wrong(format!("more than {most} certificates are in it"))),
            _ => Ok(parsed),
        }
    }

    /// The authorities in it.
    pub(super) fn authorities(&self) -> Result<Arc<RootCertStore>, TrustError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates(MAX_AUTHORITIES)? {
            roots
                .add(certificate)
                .map_err(|error| self.wrong(format!("a certificate in it cannot be read: {error}")))?;
        }
        Ok(Arc::new(roots))
    }
}

/// A certificate with its chain, and its key.
pub(super) fn certified(
    certificate: &PemText<'_>,
    key: &PemText<'_>,
) -> Result<Arc<CertifiedKey>, TrustError> {
    let chain = certificate.certificates(MAX_CHAIN)?;
    let secret = PrivateKeyDer::from_pem_slice(key.bytes)
        .map_err(|error| key.wrong(format!("no private key is in it that can be read: {error}")))?;
    let certified = CertifiedKey::from_der(chain, secret, &provider());
    let certified = certified
        .map_err(|error| key.wrong(format!("it does not fit {}: {error}", certificate.path.display())))?;
    Ok(Arc::new(certified))
}
