//! TLS of a client: whom it believes, and what it shows of itself.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{
    AlertDescription as Alert, CertificateError, ClientConfig, Error, InvalidMessage,
    client::WebPkiServerVerifier,
};
use tokio_rustls::TlsConnector;

use super::pem::{self, PemText};
use super::{TrustError, provider};
use crate::runtime::offload;
use crate::wire::Wire;

/// Where credentials are.
#[derive(Clone, PartialEq, Eq)]
enum CredentialsAt {
    Files {
        ca: PathBuf,
        own: Option<(PathBuf, PathBuf)>,
    },
    /// Whatever they were read from.
    Memory,
}

/// What connections are made with, and what it was made of.
struct LoadedTls {
    config: Arc<ClientConfig>,
    content: Vec<Vec<u8>>,
}

/// TLS of a [`Client`](crate::client::Client): the authorities that it believes, and the certificate that it shows, if it has one. Cheap to
/// clone.
///
/// Files are looked at before each connection; those that cannot be used leave in force what was.
#[derive(Clone)]
pub struct ClientTls {
    at: CredentialsAt,
    loaded: Arc<Mutex<LoadedTls>>,
    server_name: Option<ServerName<'static>>,
}

impl ClientTls {
    /// Believes the authorities in the PEM file `ca`, and shows no certificate. Reads the file.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn with_ca(ca: impl Into<PathBuf>) -> Result<Self, TrustError> {
        Self::at(CredentialsAt::Files { ca: ca.into(), own: None })
    }

    /// The same, and shows the certificate in the PEM file `certificate`, whose key is in `key`.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn with_certificate(
        ca: impl Into<PathBuf>,
        certificate: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
    ) -> Result<Self, TrustError> {
        Self::at(CredentialsAt::Files { ca: ca.into(), own: Some((certificate.into(), key.into())) })
    }

    /// From PEM texts: authorities, and a certificate with its key if one is to be shown.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn from_pem(ca: &[u8], own: Option<(&[u8], &[u8])>) -> Result<Self, TrustError> {
        let mut content = vec![ca.to_vec()];
        content.extend(own.into_iter().flat_map(|(certificate, key)| [certificate.to_vec(), key.to_vec()]));
        let loaded = LoadedTls { config: configured(&content, &CredentialsAt::Memory)?, content };
        Ok(Self { at: CredentialsAt::Memory, loaded: Arc::new(Mutex::new(loaded)), server_name: None })
    }

    /// Expects nodes to have `name` in their certificates, instead of the host or address that they are reached by.
    ///
    /// # Errors
    /// [`TrustError::Settings`] when that is no name and no address.
    pub fn expecting(mut self, name: &str) -> Result<Self, TrustError> {
        let parsed = ServerName::try_from(name.to_owned()).map_err(|_| {
            TrustError::Settings(format!(
                "\"{}\" is no name that a certificate can hold",
                name.escape_debug()
            ))
        })?;
        self.server_name = Some(parsed);
        Ok(self)
    }

    fn at(at: CredentialsAt) -> Result<Self, TrustError> {
        let content = at.read()?;
        let loaded = LoadedTls { config: configured(&content, &at)?, content };
        Ok(Self { at, loaded: Arc::new(Mutex::new(loaded)), server_name: None })
    }

    /// What is in force now, by the files.
    async fn current(&self) -> Arc<ClientConfig> {
        if self.at != CredentialsAt::Memory {
            let this = self.clone();
            offload(move || this.look()).await;
        }
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner).config.clone()
    }

    fn look(&self) {
        let Ok(content) = self.at.read() else { return };
        if self.loaded.lock().unwrap_or_else(PoisonError::into_inner).content == content {
            return;
        }
        match configured(&content, &self.at) {
            Ok(config) => {
                *self.loaded.lock().unwrap_or_else(PoisonError::into_inner) = LoadedTls { config, content };
            }
            Err(error) => tracing::debug!(%error, "TLS files cannot be used; those before stay in force"),
        }
    }

    /// `wire`, which leads to `authority`, a `host:port`, secured.
    ///
    /// # Errors
    /// In words that say what to do.
    pub(crate) async fn secure(&self, wire: Box<dyn Wire>, authority: &str) -> io::Result<Box<dyn Wire>> {
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let server = match &self.server_name {
            Some(name) => name.clone(),
            None => ServerName::try_from(host.to_owned()).map_err(io::Error::other)?,
        };
        let connector = TlsConnector::from(self.current().await);
        let secured = Box::pin(connector.connect(server, wire)).await;
        Ok(Box::new(secured.map_err(|error| in_words(error, host))?))
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("ClientTls");
        if let CredentialsAt::Files { ca, own } = &self.at {
            shown.field("ca", ca).field("certificate", &own.as_ref().map(|(path, _)| path));
        }
        shown.finish_non_exhaustive()
    }
}

/// The same credentials from the same place, not such that say the same.
impl PartialEq for ClientTls {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.loaded, &other.loaded) && self.server_name == other.server_name
    }
}

impl Eq for ClientTls {}

impl CredentialsAt {
    fn read(&self) -> Result<Vec<Vec<u8>>, TrustError> {
        let Self::Files { ca, own } = self else { return Ok(Vec::new()) };
        let mut content = vec![pem::read("--tls-ca", ca)?];
        if let Some((certificate, key)) = own {
            content.extend([pem::read("--tls-cert", certificate)?, pem::read("--tls-key", key)?]);
        }
        Ok(content)
    }

    /// Where each is: for messages.
    fn paths(&self) -> [&Path; 3] {
        match self {
            Self::Files { ca, own: Some((certificate, key)) } => [ca, certificate, key],
            Self::Files { ca, own: None } => [ca, Path::new(""), Path::new("")],
            Self::Memory => [Path::new("(given as text)"); 3],
        }
    }
}

fn configured(content: &[Vec<u8>], at: &CredentialsAt) -> Result<Arc<ClientConfig>, TrustError> {
    let paths = at.paths();
    let text = |setting, place: usize| PemText { setting, path: paths[place], bytes: &content[place] };
    let ca = text("--tls-ca", 0);
    let verifier = WebPkiServerVerifier::builder_with_provider(ca.authorities()?, provider())
        .build()
        .map_err(|error| ca.wrong(format!("its certificates cannot be used: {error}")))?;
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("invariant: ring speaks TLS 1.3")
        .with_webpki_verifier(verifier);
    let mut config = match content.len() {
        3 => {
            let certified = pem::certified(&text("--tls-cert", 1), &text("--tls-key", 2))?;
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
        }
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// Says of the usual failures what to do.
fn in_words(error: io::Error, host: &str) -> io::Error {
    let tls = error.get_ref().and_then(|source| source.downcast_ref::<Error>());
    let said = match tls {
        Some(Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            "this port does not speak TLS: leave out --tls-ca, or start the node with --tls-cert".to_owned()
        }
        // The latter where another authority has the same name.
        Some(Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
            "no authority in --tls-ca has signed the node's certificate".to_owned()
        }
        Some(Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => format!(
            "the node's certificate does not name {host}; reach it by a name that it has, or make one with --host {host}"
        ),
        Some(Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        )) => "the node's certificate has expired".to_owned(),
        Some(Error::AlertReceived(Alert::CertificateRequired)) => {
            "the node wants a certificate: give --tls-cert and --tls-key".to_owned()
        }
        _ if error.kind() == io::ErrorKind::UnexpectedEof => {
            "what answers there ended the handshake: it may not speak TLS".to_owned()
        }
        _ => return error,
    };
    io::Error::new(io::ErrorKind::InvalidData, said)
}
