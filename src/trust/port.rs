//! TLS at the ports that clients use: the one for gRPC and HTTP, and the one for frames.
//!
//! A certificate that a client shows is verified, and its names are kept for those who decide what the client may do. One that
//! shows none is let in unless certificates are required. A client that does not speak TLS is told so in the protocol that it
//! speaks, as far as that can be told from how it begins.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoClientAuth, NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;

use super::certificates::facts;
use super::material::now;
use super::pem::{self, PemText};
use super::wire::{Basis, Connections, OpenedWire, Proof, Proven, ProvenCertificate, RawWire, SecuredWire};
use super::{TrustError, provider, refusal};
use crate::runtime::offload;
use crate::wire::Wire;

/// How often files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// Between two lines of the log about the same thing.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(300);
/// For how long one that does not speak TLS is listened to after it was told so: what it has sent must be read, or it may lose the answer.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(1);

/// Whether clients must show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum ClientCertificates {
    /// They may.
    #[default]
    Optional,
    /// They must.
    Required,
}

/// TLS at a port for clients. The files are read again when they change; those that cannot be used leave in force what was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortTls {
    /// A PEM file with the node's certificate, and the chain to its authority.
    pub certificate: PathBuf,
    /// A PEM file with the key of that.
    pub key: PathBuf,
    /// A PEM file with the authorities whose certificates are believed of clients. Without it no client can show one.
    pub client_ca: Option<PathBuf>,
    /// Whether clients must show one.
    pub client_auth: ClientCertificates,
}

impl PortTls {
    /// With the certificate and the key in these files.
    pub fn new(certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self { certificate: certificate.into(), key: key.into(), ..Self::default() }
    }

    fn content(&self) -> Result<Vec<Vec<u8>>, TrustError> {
        let mut content =
            vec![pem::read("--tls-cert", &self.certificate)?, pem::read("--tls-key", &self.key)?];
        if let Some(ca) = &self.client_ca {
            content.push(pem::read("--tls-client-ca", ca)?);
        }
        Ok(content)
    }

    fn material(&self, content: Vec<Vec<u8>>) -> Result<PortMaterial, TrustError> {
        let text = |setting, path, bytes| PemText { setting, path, bytes };
        let certified = pem::certified(
            &text("--tls-cert", &self.certificate, &content[0]),
            &text("--tls-key", &self.key, &content[1]),
        )?;
        let expires_s = certified.cert.first().and_then(facts).map(|facts| facts.not_after_s);
        let verifier: Arc<dyn ClientCertVerifier> = match &self.client_ca {
            None if self.client_auth == ClientCertificates::Required => {
                return Err(TrustError::Settings(
                    "--tls-client-auth required needs --tls-client-ca: name the authorities whose certificates are believed".to_owned(),
                ));
            }
            None => Arc::new(NoClientAuth),
            Some(path) => {
                let ca = text("--tls-client-ca", path, &content[2]);
                let verifier = WebPkiClientVerifier::builder_with_provider(ca.authorities()?, provider())
                    .clear_root_hint_subjects();
                let verifier = match self.client_auth {
                    ClientCertificates::Optional => verifier.allow_unauthenticated(),
                    ClientCertificates::Required => verifier,
                };
                verifier
                    .build()
                    .map_err(|error| ca.wrong(format!("its certificates cannot be used: {error}")))?
            }
        };
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .expect("invariant: ring speaks TLS 1.3")
            .with_client_cert_verifier(verifier.clone())
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // Each connection proves everything anew.
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(PortMaterial { server: Arc::new(server), verifier, expires_s, content })
    }
}

struct PortMaterial {
    server: Arc<ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
    expires_s: Option<i64>,
    content: Vec<Vec<u8>>,
}

/// What a caller that does not speak TLS is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PlainAnswer {
    /// In HTTP, of the version that it begins with.
    Http,
    /// These bytes.
    Bytes(Arc<[u8]>),
}

/// The ports of a node that are secured by the same files.
pub(crate) struct PortSecurity {
    tls: PortTls,
    current: ArcSwap<PortMaterial>,
    last_read: ArcSwap<Vec<Vec<u8>>>,
    connections: Mutex<Connections>,
    failed: Arc<AtomicU64>,
    reloads_failed: AtomicU64,
    /// In seconds since the Unix epoch; 0 where that is not known.
    expires_s: AtomicI64,
}

impl fmt::Debug for PortSecurity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortSecurity").field("tls", &self.tls).finish_non_exhaustive()
    }
}

impl PortSecurity {
    /// What the files of `tls` hold.
    ///
    /// # Errors
    /// [`TrustError`].
    pub(crate) async fn open(tls: PortTls) -> Result<Arc<Self>, TrustError> {
        let files = tls.clone();
        let material = offload(move || files.material(files.content()?)).await?;
        let expires_s = AtomicI64::new(material.expires_s.unwrap_or_default());
        Ok(Arc::new(Self {
            tls,
            last_read: ArcSwap::from_pointee(material.content.clone()),
            current: ArcSwap::from_pointee(material),
            connections: Mutex::default(),
            failed: Arc::default(),
            reloads_failed: AtomicU64::new(0),
            expires_s,
        }))
    }

    /// Connections that ended before their handshake was complete.
    pub(crate) fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    /// Times that the files could not be used.
    pub(crate) fn reloads_failed(&self) -> u64 {
        self.reloads_failed.load(Relaxed)
    }

    /// Seconds until the certificate expires.
    pub(crate) fn certificate_expires_seconds(&self) -> Option<i64> {
        let expires_s = self.expires_s.load(Relaxed);
        let now_s = i64::try_from(now().as_secs()).unwrap_or(i64::MAX);
        (expires_s != 0).then(|| expires_s - now_s)
    }

    /// An accepted connection, which shakes hands when it is first used; and where it is found then what its caller has proven.
    pub(crate) fn accepting(
        self: &Arc<Self>,
        wire: Box<dyn Wire>,
        plain: PlainAnswer,
    ) -> (Box<dyn Wire>, Arc<Proof>) {
        let opening = self.clone().accept(RawWire::new(wire), plain);
        let (wire, life, proof) = SecuredWire::opening(opening, self.failed.clone());
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).enter(&life);
        (Box::new(wire), proof)
    }

    async fn accept(self: Arc<Self>, mut raw: RawWire, plain: PlainAnswer) -> io::Result<OpenedWire> {
        if !raw.speaks_tls().await? {
            let _ = timeout(FAREWELL_PATIENCE, refuse(&mut raw, plain)).await;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the caller does not speak TLS"));
        }
        let server = self.current.load().server.clone();
        let mut tls = TlsAcceptor::from(server).accept(raw).await?;
        let chain: Vec<_> = tls.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
        let (proven, basis) = match chain.first().map(ProvenCertificate::of) {
            None => (Proven::Anonymous, None),
            Some(shown) => {
                (Proven::Certificate(shown), Some(Basis::Chain { chain, at: now(), accepted: true }))
            }
        };
        tls.get_mut().0.is_known();
        Ok(OpenedWire { wire: Box::new(tls), proven, basis })
    }

    /// Keeps what is in force in step with its files for as long as it is polled.
    pub(crate) async fn keep_fresh(self: Arc<Self>) {
        let mut told: Option<(String, Instant)> = None;
        // A handshake that was under way when the files changed is judged at the next look.
        let mut judgements = 0_u8;
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let this = self.clone();
            match offload(move || this.look()).await {
                Ok(changed) => {
                    told = None;
                    judgements = if changed { 2 } else { judgements };
                }
                Err(error) => {
                    self.reloads_failed.fetch_add(1, Relaxed);
                    let error = error.to_string();
                    let is_new =
                        |(said, at): &(String, Instant)| *said != error || at.elapsed() >= COMPLAINT_INTERVAL;
                    if told.as_ref().is_none_or(is_new) {
                        tracing::error!(
                            error,
                            "TLS files on disk cannot be used; those before stay in force"
                        );
                        told = Some((error, Instant::now()));
                    }
                }
            }
            if judgements > 0 {
                judgements -= 1;
                self.judge();
            }
        }
    }

    /// Takes over what the files hold; whether that has changed.
    fn look(&self) -> Result<bool, TrustError> {
        let content = self.tls.content()?;
        // Half a file may be one, too: it is believed when it was the same twice.
        let last = self.last_read.swap(Arc::new(content.clone()));
        if content == self.current.load().content || *last != content {
            return Ok(false);
        }
        let material = self.tls.material(content)?;
        self.expires_s.store(material.expires_s.unwrap_or_default(), Relaxed);
        self.current.store(Arc::new(material));
        tracing::info!("the TLS files of the client port were read again");
        Ok(true)
    }

    fn judge(&self) {
        let verifier = self.current.load().verifier.clone();
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner).living();
        for life in connections {
            if let Some(Basis::Chain { chain, at, .. }) = life.basis()
                && let Some((own, rest)) = chain.split_first()
                && verifier.verify_client_cert(own, rest, *at).is_err()
            {
                life.end();
            }
        }
    }
}

/// Says that TLS is spoken here.
async fn refuse(raw: &mut RawWire, plain: PlainAnswer) -> io::Result<()> {
    match plain {
        PlainAnswer::Bytes(bytes) => raw.write_all(&bytes).await?,
        PlainAnswer::Http => refusal::in_http(raw).await?,
    }
    raw.shutdown().await?;
    tokio::io::copy(raw, &mut tokio::io::sink()).await?;
    Ok(())
}
