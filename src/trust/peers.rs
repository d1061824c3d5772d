//! Members prove to each other who they are, and nobody reads along.
//!
//! By certificates: both ends show one that an authority of the file has signed, with the name of a member of this cluster. By
//! a secret: see [`challenge`]. Either way the accepting end has the caller prove itself first, and says that it is satisfied;
//! so a dial that succeeds has been accepted, and one that does not fails at the dial.
//!
//! While the cluster changes over ([`PeerAuth::Optional`]) plain connections are taken, and dialled where a secured one cannot be had.

use std::io;
use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::certificates::ClusterLabel;
use super::challenge::{self, BINDING_LABEL, Binding};
use super::material::{Means, OwnName, PeerMaterial, now};
use super::settings::{PeerAuth, PeerTrust, ProofSource};
use super::wire::{
    Basis, ConnectionLife, Connections, OpenedWire, Proof, Proven, ProvenCertificate, RawWire, SecuredWire,
};
use super::{HANDSHAKE_PATIENCE, TrustError};
use crate::runtime::{self, offload};
use crate::types::NodeId;
use crate::wire::Wire;

/// How often files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// Between two lines of the log about the same thing.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(300);
/// A certificate that expires sooner is spoken of in the log.
const EXPIRES_SOON_S: i64 = 14 * 24 * 3600;
/// What the accepting end says once a caller's certificate has been verified.
const WELCOME: u8 = 1;

/// What handshakes between members came to, since the node started.
#[derive(Debug, Default)]
pub struct Handshakes {
    failed: Arc<AtomicU64>,
    plain: AtomicU64,
    reloads_failed: AtomicU64,
    /// In seconds since the Unix epoch; 0 for never.
    expires_s: AtomicI64,
}

impl Handshakes {
    /// Connections at the peer port that ended before their caller had proven who it is.
    pub fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    /// Connections with members that were made plain, in either direction, although this node has credentials.
    pub fn plain(&self) -> u64 {
        self.plain.load(Relaxed)
    }

    /// Times that credentials on disk could not be used, and what was in force stayed so.
    pub fn reloads_failed(&self) -> u64 {
        self.reloads_failed.load(Relaxed)
    }

    /// Seconds until this node's certificate expires; less than 0 once it has. None without a certificate.
    pub fn certificate_expires_seconds(&self) -> Option<i64> {
        let expires_s = self.expires_s.load(Relaxed);
        (expires_s != 0).then(|| expires_s - now_s())
    }
}

fn now_s() -> i64 {
    i64::try_from(runtime::unix_time_ms() / 1000).unwrap_or(i64::MAX)
}

/// What this node proves itself by, and what it believes of others.
pub(crate) struct PeerAuthenticator {
    source: ProofSource,
    own: OwnName,
    is_optional: bool,
    current: ArcSwap<PeerMaterial>,
    last_read: ArcSwap<Vec<Vec<u8>>>,
    connections: Mutex<Connections>,
    handshakes: Arc<Handshakes>,
    /// How often connections are yet to be judged anew: a handshake that was under way when credentials changed is judged at the next look.
    judgements: AtomicU8,
    /// When the log said last that a plain connection had to be dialled.
    complained: Mutex<Option<Instant>>,
}

impl std::fmt::Debug for PeerAuthenticator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerAuthenticator").field("source", &self.source).finish_non_exhaustive()
    }
}

impl PeerAuthenticator {
    /// That of node `node_id` of `cluster`, as `trust` says; none where members prove nothing to each other. Reads files.
    ///
    /// # Errors
    /// [`TrustError`].
    pub(crate) async fn open(
        trust: &PeerTrust,
        cluster: &str,
        node_id: NodeId,
    ) -> Result<Option<Arc<Self>>, TrustError> {
        let Some(source) = trust.source()? else { return Ok(None) };
        let own = OwnName { cluster: cluster.to_owned(), label: ClusterLabel::of(cluster), node_id };
        let made = {
            let (source, own) = (source.clone(), own.clone());
            offload(move || PeerMaterial::of(&source, PeerMaterial::content(&source)?, &own)).await?
        };
        let is_optional = trust.auth() == PeerAuth::Optional;
        if is_optional {
            tracing::warn!(
                "peer_auth is optional: whoever reaches the peer port may still say that it is a member; set it to required once all members have credentials"
            );
        }
        let this = Arc::new(Self {
            source,
            own,
            is_optional,
            last_read: ArcSwap::from_pointee(made.content.clone()),
            current: ArcSwap::from_pointee(made),
            connections: Mutex::default(),
            handshakes: Arc::default(),
            judgements: AtomicU8::new(0),
            complained: Mutex::default(),
        });
        this.note_expiry();
        Ok(Some(this))
    }

    /// What handshakes came to.
    pub(crate) fn handshakes(&self) -> Arc<Handshakes> {
        self.handshakes.clone()
    }

    /// Whether there are files to look at.
    pub(crate) fn has_files(&self) -> bool {
        !self.source.files().is_empty()
    }

    /// An accepted connection, which proves who calls when it is first read or written; and where that is found then.
    pub(crate) fn accepting(self: &Arc<Self>, wire: Box<dyn Wire>) -> (Box<dyn Wire>, Arc<Proof>) {
        let opening = self.clone().accept(RawWire::new(wire));
        let (wire, life, proof) = SecuredWire::opening(opening, self.handshakes.failed.clone());
        self.enter(&life);
        (Box::new(wire), proof)
    }

    async fn accept(self: Arc<Self>, mut raw: RawWire) -> io::Result<OpenedWire> {
        if self.is_optional && !raw.speaks_tls().await? {
            raw.is_known();
            self.handshakes.plain.fetch_add(1, Relaxed);
            return Ok(OpenedWire::plain(raw));
        }
        let material = self.current.load_full();
        let mut tls = TlsAcceptor::from(material.server.clone()).accept(raw).await?;
        if tls.get_ref().1.alpn_protocol() != Some(material.means.protocol()) {
            return Err(denied("the caller does not say that it is a member"));
        }
        let (proven, basis) = match &material.means {
            Means::Certificates { .. } => {
                let chain = owned(tls.get_ref().1.peer_certificates());
                let shown = chain.first().map(ProvenCertificate::of);
                let shown = shown.filter(|shown| self.own.label.nodes_of(&shown.names).next().is_some());
                let shown = shown.ok_or_else(|| denied("the caller's certificate is no member's"))?;
                tls.write_all(&[WELCOME]).await?;
                tls.flush().await?;
                (Proven::Certificate(shown), Basis::Chain { chain, at: now(), accepted: true })
            }
            Means::Secrets(secrets) => {
                let binding =
                    binding_of(|out| tls.get_ref().1.export_keying_material(out, BINDING_LABEL, None))?;
                let known = challenge::accepting(&mut tls, &binding, secrets).await?;
                (Proven::Secret, Basis::Secret(known.mark))
            }
        };
        tls.get_mut().0.is_known();
        Ok(OpenedWire { wire: Box::new(tls), proven, basis: Some(basis) })
    }

    /// A connection that `connect` makes to node `wanted`, or to any member where that is not known; and what its other end has proven.
    ///
    /// # Errors
    /// When there is none, or what answers is not who it should be.
    pub(crate) async fn dial<C>(
        &self,
        connect: impl Fn() -> C,
        wanted: Option<NodeId>,
    ) -> io::Result<(Box<dyn Wire>, Proven)>
    where
        C: Future<Output = io::Result<Box<dyn Wire>>>,
    {
        let secured = timeout(HANDSHAKE_PATIENCE, Box::pin(self.secure(connect().await?, wanted))).await;
        let secured = secured
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake takes too long")));
        match secured {
            Ok(opened) => {
                let proven = opened.proven.clone();
                let (wire, life) = SecuredWire::opened(opened);
                self.enter(&life);
                Ok((Box::new(wire), proven))
            }
            Err(error) if self.is_optional => {
                self.complain(wanted, &error);
                self.handshakes.plain.fetch_add(1, Relaxed);
                Ok((connect().await?, Proven::Plain))
            }
            Err(error) => Err(in_words(error)),
        }
    }

    async fn secure(&self, wire: Box<dyn Wire>, wanted: Option<NodeId>) -> io::Result<OpenedWire> {
        let material = self.current.load_full();
        // It is not sent, and not looked at: whom the certificate is to name is looked at below.
        let server = ServerName::try_from("peer.quorate").expect("invariant: it is a name");
        let connector = TlsConnector::from(material.client.clone());
        let mut tls = connector.connect(server, RawWire::new(wire)).await?;
        if tls.get_ref().1.alpn_protocol() != Some(material.means.protocol()) {
            return Err(denied("what answers there does not say that it is a member"));
        }
        let (proven, basis) = match &material.means {
            Means::Certificates { .. } => {
                let chain = owned(tls.get_ref().1.peer_certificates());
                let shown = chain.first().map(ProvenCertificate::of);
                let shown = shown.ok_or_else(|| denied("what answers there shows no certificate"))?;
                if let Some(wanted) = wanted
                    && !self.own.label.nodes_of(&shown.names).any(|node_id| node_id == wanted)
                {
                    let there = self.own.label.nodes_of(&shown.names).map(|id| format!("node {id}"));
                    let there = there.collect::<Vec<_>>().join(", ");
                    let why = format!("the certificate there is not that of node {wanted} but of {there}");
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
                }
                tls.read_u8().await?;
                (Proven::Certificate(shown), Basis::Chain { chain, at: now(), accepted: false })
            }
            Means::Secrets(secrets) => {
                let secret = secrets.first().expect("invariant: there is at least one");
                let binding =
                    binding_of(|out| tls.get_ref().1.export_keying_material(out, BINDING_LABEL, None))?;
                challenge::dialling(&mut tls, &binding, secret).await?;
                (Proven::Secret, Basis::Secret(secret.mark))
            }
        };
        tls.get_mut().0.is_known();
        Ok(OpenedWire { wire: Box::new(tls), proven, basis: Some(basis) })
    }

    fn complain(&self, wanted: Option<NodeId>, error: &io::Error) {
        let mut complained = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        if complained.is_none_or(|at| at.elapsed() >= COMPLAINT_INTERVAL) {
            *complained = Some(Instant::now());
            tracing::warn!(node = wanted, %error, "a connection to a member is not secured, and made plain");
        }
    }

    fn enter(&self, life: &Arc<ConnectionLife>) {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).enter(life);
    }

    /// Keeps credentials in step with their files for as long as it is polled.
    pub(crate) async fn keep_fresh(self: Arc<Self>) {
        let mut told: Option<(String, Instant)> = None;
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let this = self.clone();
            let looked = offload(move || this.look()).await;
            // Also where the files cannot be used: what was in force before them was judged by once only.
            self.judge_again();
            let Err(error) = looked else {
                told = None;
                continue;
            };
            self.handshakes.reloads_failed.fetch_add(1, Relaxed);
            let error = error.to_string();
            if told.as_ref().is_none_or(|(said, at)| *said != error || at.elapsed() >= COMPLAINT_INTERVAL) {
                tracing::error!(error, "peer credentials on disk cannot be used; those before stay in force");
                told = Some((error, Instant::now()));
            }
        }
    }

    /// Takes over what the files hold, if that has changed.
    fn look(&self) -> Result<(), TrustError> {
        let content = PeerMaterial::content(&self.source)?;
        // Half a file may be one, too: it is believed when it was the same twice.
        let last = self.last_read.swap(Arc::new(content.clone()));
        if content != self.current.load().content && *last == content {
            self.current.store(Arc::new(PeerMaterial::of(&self.source, content, &self.own)?));
            self.judgements.store(2, Relaxed);
            self.note_expiry();
            tracing::info!("peer credentials were read again");
        }
        Ok(())
    }

    /// Judges the connections, if that is due.
    fn judge_again(&self) {
        let left = self.judgements.load(Relaxed);
        if left > 0 {
            self.judgements.store(left - 1, Relaxed);
            self.judge();
        }
    }

    /// Ends the connections that nothing vouches for any more.
    fn judge(&self) {
        let material = self.current.load_full();
        let lives = self.connections.lock().unwrap_or_else(PoisonError::into_inner).living();
        let is_left =
            |life: &&Arc<ConnectionLife>| life.basis().is_some_and(|basis| !material.vouches_for(basis));
        let ended = lives.iter().filter(is_left).inspect(|life| life.end()).count();
        if ended > 0 {
            tracing::info!(ended, "connections ended that peer credentials vouch for no longer");
        }
    }

    fn note_expiry(&self) {
        let Some(expires_s) = self.current.load().expires_s else { return };
        self.handshakes.expires_s.store(expires_s, Relaxed);
        let left_s = expires_s - now_s();
        if left_s <= 0 {
            tracing::error!(
                "this node's certificate has expired: no member accepts it; put a new one in its place"
            );
        } else if left_s < EXPIRES_SOON_S {
            tracing::warn!(
                seconds = left_s,
                "this node's certificate expires soon; put a new one in its place"
            );
        }
    }
}

/// Whether what a caller has proven lets it speak for node `node_id` of `cluster`.
pub(crate) fn may_speak_for(proven: Option<&Proven>, cluster: &str, node_id: NodeId) -> bool {
    match proven {
        // Members prove nothing to each other, or need not.
        None | Some(Proven::Plain) => true,
        Some(Proven::Secret) => true,
        Some(Proven::Certificate(shown)) => {
            ClusterLabel::of(cluster).nodes_of(&shown.names).any(|named| named == node_id)
        }
        Some(Proven::Anonymous) => false,
    }
}

fn owned(chain: Option<&[CertificateDer<'_>]>) -> Vec<CertificateDer<'static>> {
    chain.unwrap_or_default().iter().map(|certificate| certificate.clone().into_owned()).collect()
}

fn binding_of(export: impl FnOnce(Binding) -> Result<Binding, rustls::Error>) -> io::Result<Binding> {
    export(Binding::default()).map_err(io::Error::other)
}

fn denied(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

/// Says of the usual failures what to do.
fn in_words(error: io::Error) -> io::Error {
    use rustls::{AlertDescription as Alert, CertificateError, Error, InvalidMessage};
    let tls = error.get_ref().and_then(|source| source.downcast_ref::<Error>());
    let said = match tls {
        Some(Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            "what answers there does not speak TLS: its peer_auth is off, or it is no peer port".to_owned()
        }
        // The latter where another authority has the same name.
        Some(Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
            "no authority in --peer-ca has signed the certificate there".to_owned()
        }
        Some(Error::InvalidCertificate(CertificateError::NotValidForName)) => {
            "the certificate there is no member's of this cluster".to_owned()
        }
        Some(Error::AlertReceived(Alert::NoApplicationProtocol)) => {
            "the node there proves itself in another way: give all members certificates, or all the same secret"
                .to_owned()
        }
        Some(Error::AlertReceived(alert)) => {
            let why = alert.as_str().unwrap_or("it does not say why");
            format!("the node there does not accept this node's certificate: {why}")
        }
        _ if error.kind() == io::ErrorKind::UnexpectedEof => {
            "what answers there ended the handshake: it does not speak TLS, or does not accept this node's credentials"
                .to_owned()
        }
        _ => return error,
    };
    io::Error::new(io::ErrorKind::PermissionDenied, said)
}

#[cfg(test)]
mod tests;
