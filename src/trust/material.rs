//! What the two ends of a connection between members present and believe: made from files, and never changed. Files that have changed
//! make another one.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig, client};

use super::certificates::{ClusterLabel, facts, names};
use super::challenge::{MAX_SECRETS, SecretKey};
use super::pem::{self, PemText};
use super::settings::{ProofSource, check_secret};
use super::verify::{AnyCertificate, MemberVerifier};
use super::wire::Basis;
use super::{TrustError, provider};
use crate::types::NodeId;

/// What is spoken on a connection that certificates secure; and on one that a secret does. A member of another kind is told so
/// before it is shown anything.
const BY_CERTIFICATE: &[u8] = b"quorate-peer-certificate-1";
const BY_SECRET: &[u8] = b"quorate-peer-secret-1";

/// Whose credentials they are to be.
#[derive(Debug, Clone)]
pub(super) struct OwnName {
    pub(super) cluster: String,
    pub(super) label: ClusterLabel,
    pub(super) node_id: NodeId,
}

/// See the [module](self).
pub(super) struct PeerMaterial {
    pub(super) server: Arc<ServerConfig>,
    pub(super) client: Arc<ClientConfig>,
    pub(super) means: Means,
    /// Until when this node's own certificate is valid, in seconds since the Unix epoch.
    pub(super) expires_s: Option<i64>,
    /// What the files held that it is made of.
    pub(super) content: Vec<Vec<u8>>,
}

/// By what the other end proves who it is.
pub(super) enum Means {
    Certificates {
        accepted: Arc<dyn ClientCertVerifier>,
        dialled: Arc<MemberVerifier>,
    },
    /// The first is proven with, all are accepted; there is at least one.
    Secrets(Vec<SecretKey>),
}

impl Means {
    /// What both ends name at the beginning of a connection.
    pub(super) fn protocol(&self) -> &'static [u8] {
        match self {
            Self::Certificates { .. } => BY_CERTIFICATE,
            Self::Secrets(_) => BY_SECRET,
        }
    }
}

impl PeerMaterial {
    /// What the files of `source` hold now.
    pub(super) fn content(source: &ProofSource) -> Result<Vec<Vec<u8>>, TrustError> {
        source.files().into_iter().map(|(setting, path)| pem::read(setting, path)).collect()
    }

    /// From what the files of `source` hold.
    pub(super) fn of(source: &ProofSource, content: Vec<Vec<u8>>, own: &OwnName) -> Result<Self, TrustError> {
        let texts: Vec<PemText<'_>> = source
            .files()
            .into_iter()
            .zip(&content)
            .map(|((setting, path), bytes)| PemText { setting, path, bytes })
            .collect();
        let made = match (source, &texts[..]) {
            (ProofSource::Certificates { .. }, [ca, certificate, key]) => {
                warn_if_readable(key.path);
                by_certificates(ca, certificate, key, own)?
            }
            (ProofSource::SecretFile(path), [text]) => {
                warn_if_readable(path);
                by_secrets(secrets_in(text, own)?)?
            }
            (ProofSource::Secret(secret), _) => {
                by_secrets(vec![SecretKey::derive(&own.cluster, secret.as_bytes())])?
            }
            _ => unreachable!("each source has as many files as it names"),
        };
        drop(texts);
        Ok(Self { content, ..made })
    }

    /// Whether a connection that stands on `basis` may go on.
    pub(super) fn vouches_for(&self, basis: &Basis) -> bool {
        match (&self.means, basis) {
            // As of when it was made: a certificate that has expired since does not end it, and one whose authority is gone does.
            (Means::Certificates { accepted, dialled }, Basis::Chain { chain, at, accepted: came }) => {
                let Some((own, rest)) = chain.split_first() else { return false };
                match came {
                    true => accepted.verify_client_cert(own, rest, *at).is_ok(),
                    false => dialled.verify(own, rest, *at).is_ok(),
                }
            }
            (Means::Secrets(secrets), Basis::Secret(mark)) => {
                secrets.iter().any(|secret| secret.mark == *mark)
            }
            _ => false,
        }
    }
}

fn by_certificates(
    ca: &PemText<'_>,
    certificate: &PemText<'_>,
    key: &PemText<'_>,
    own: &OwnName,
) -> Result<PeerMaterial, TrustError> {
    let roots = ca.authorities()?;
    let certified = pem::certified(certificate, key)?;
    let end_entity = certified.cert.first().expect("invariant: a chain has at least one certificate");
    let shown = names(end_entity);
    if !own.label.nodes_of(&shown).any(|node_id| node_id == own.node_id) {
        return Err(certificate.wrong(format!(
            "it is not the certificate of node {} of cluster \"{}\": the DNS name {} is not in it, but {}; `quorate cert node` makes one",
            own.node_id,
            own.cluster,
            own.label.name_of(own.node_id),
            if shown.is_empty() { "none".to_owned() } else { shown.join(", ") },
        )));
    }
    let expires_s = facts(end_entity).map(|facts| facts.not_after_s);
    let accepted = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
        // Callers are not told who is believed.
        .clear_root_hint_subjects()
        .build()
        .map_err(|error| ca.wrong(format!("its certificates cannot be used: {error}")))?;
    let dialled = Arc::new(MemberVerifier::new(roots, own.label.clone()));
    let means = Means::Certificates { accepted: accepted.clone(), dialled: dialled.clone() };
    let resolver = Arc::new(SingleCertAndKey::from(certified));
    let server = server_builder().with_client_cert_verifier(accepted).with_cert_resolver(resolver.clone());
    let client = client_builder()
        .dangerous()
        .with_custom_certificate_verifier(dialled)
        .with_client_cert_resolver(resolver);
    Ok(material(server, client, means, expires_s))
}

fn by_secrets(secrets: Vec<SecretKey>) -> Result<PeerMaterial, TrustError> {
    let failed = |error: String| {
        TrustError::Settings(format!(
            "no certificate for the connections of this process can be made: {error}"
        ))
    };
    // It lasts as long as this process, and nobody believes it: it is there for privacy.
    let made = rcgen::generate_simple_self_signed(vec!["peer".to_owned()])
        .map_err(|error| failed(error.to_string()))?;
    let chain: Vec<CertificateDer<'static>> = vec![made.cert.into()];
    let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let certified =
        CertifiedKey::from_der(chain, key, &provider()).map_err(|error| failed(error.to_string()))?;
    let server = server_builder()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    let client = client_builder()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate::new()))
        .with_no_client_auth();
    Ok(material(server, client, Means::Secrets(secrets), None))
}

fn server_builder() -> rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier> {
    ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("invariant: ring speaks TLS 1.3")
}

fn client_builder() -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("invariant: ring speaks TLS 1.3")
}

fn material(
    mut server: ServerConfig,
    mut client: ClientConfig,
    means: Means,
    expires_s: Option<i64>,
) -> PeerMaterial {
    server.alpn_protocols = vec![means.protocol().to_vec()];
    client.alpn_protocols = vec![means.protocol().to_vec()];
    // Each connection proves everything anew.
    server.send_tls13_tickets = 0;
    server.session_storage = Arc::new(NoServerSessionStorage {});
    client.resumption = client::Resumption::disabled();
    // A name in the clear would tell whoever listens which cluster it is.
    client.enable_sni = false;
    PeerMaterial { server: Arc::new(server), client: Arc::new(client), means, expires_s, content: Vec::new() }
}

/// The secrets of a file, one a line.
fn secrets_in(text: &PemText<'_>, own: &OwnName) -> Result<Vec<SecretKey>, TrustError> {
    let lines = text.bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let secrets: Vec<_> = lines.filter(|line| !line.is_empty()).collect();
    if secrets.is_empty() {
        return Err(text.wrong("it is empty; put a secret in it: `openssl rand -hex 32` makes one"));
    }
    if secrets.len() > MAX_SECRETS {
        return Err(text.wrong(format!("it has more than {MAX_SECRETS} lines, each of which is a secret")));
    }
    secrets
        .into_iter()
        .map(|secret| {
            check_secret("a line of it", secret).map_err(|why| text.wrong(why))?;
            Ok(SecretKey::derive(&own.cluster, secret))
        })
        .collect()
}

/// Says so when others than its owner may read a file with a secret.
pub(super) fn warn_if_readable(path: &Path) {
    const OTHERS: u32 = 0o077;
    let mode = std::fs::metadata(path).map_or(0, |metadata| metadata.mode());
    if mode & OTHERS != 0 {
        tracing::warn!(
            path = %path.display(),
            mode = format!("{:o}", mode & 0o777),
            "others than its owner may read a file with a secret; take that away with chmod 600"
        );
    }
}

/// Now, as certificates are verified by.
pub(super) fn now() -> UnixTime {
    UnixTime::since_unix_epoch(std::time::Duration::from_millis(crate::runtime::unix_time_ms()))
}
