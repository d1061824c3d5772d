//! A wire that proves who is at its other end before anything else is carried.
//!
//! An accepted connection costs nothing before somebody reads from it or writes to it: then it shakes hands, within
//! [`HANDSHAKE_PATIENCE`] and [`HANDSHAKE_BYTES`], and whoever reads or writes waits. Reading and writing may be two tasks'
//! work; both drive the handshake.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll, Wake, Waker, ready};

use futures::FutureExt;
use futures::future::BoxFuture;
use futures::task::AtomicWaker;
use rustls::pki_types::{CertificateDer, UnixTime};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::timeout;

use super::certificates::{facts, names};
use super::{HANDSHAKE_BYTES, HANDSHAKE_PATIENCE};
use crate::wire::Wire;

/// The first byte of a TLS connection: a record of the handshake. No request begins with it.
const TLS_RECORD: u8 = 0x16;

/// What the other end of a connection has proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Proven {
    /// Nothing: the connection is plain, and plain ones are taken.
    Plain,
    /// Nothing, on a connection that nobody else reads.
    Anonymous,
    /// That it knows the secret.
    Secret,
    /// That it has the key of a certificate that is signed as it should be.
    Certificate(ProvenCertificate),
}

/// What stands in the certificate of the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProvenCertificate {
    /// DNS names and URIs.
    pub(crate) names: Vec<String>,
    /// Until when it is valid, in seconds since the Unix epoch; 0 if that cannot be read.
    pub(crate) expires_s: u64,
}

impl ProvenCertificate {
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Self {
        let expires_s = facts(certificate).and_then(|facts| u64::try_from(facts.not_after_s).ok());
        Self { names: names(certificate), expires_s: expires_s.unwrap_or_default() }
    }
}

/// Where the proof is found once there is one. Shared by a connection and those who ask.
#[derive(Debug, Default)]
pub(crate) struct Proof(OnceLock<Proven>);

impl Proof {
    /// What was proven; nothing before the handshake is complete.
    pub(crate) fn proven(&self) -> Option<&Proven> {
        self.0.get()
    }
}

/// What a connection stands on: it ends when that is believed no longer.
#[derive(Debug)]
pub(super) enum Basis {
    /// A certificate, and when it was verified; `accepted` on the side that was called.
    Chain { chain: Vec<CertificateDer<'static>>, at: UnixTime, accepted: bool },
    /// A secret, by its mark.
    Secret([u8; 32]),
}

/// A wire after its handshake.
pub(super) struct OpenedWire {
    pub(super) wire: Box<dyn Wire>,
    pub(super) proven: Proven,
    /// None for one that stays whatever becomes of credentials.
    pub(super) basis: Option<Basis>,
}

impl OpenedWire {
    /// One on which nothing was proven.
    pub(super) fn plain(wire: RawWire) -> Self {
        Self { wire: Box::new(wire), proven: Proven::Plain, basis: None }
    }
}

/// The life of a connection, for those who may end it: its wakers, and what it stands on.
#[derive(Debug, Default)]
pub(super) struct ConnectionLife {
    basis: OnceLock<Basis>,
    ended: AtomicBool,
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl ConnectionLife {
    pub(super) fn basis(&self) -> Option<&Basis> {
        self.basis.get()
    }

    /// Nothing is read or written on it any more.
    pub(super) fn end(self: &Arc<Self>) {
        self.ended.store(true, Ordering::Release);
        self.wake_by_ref();
    }
}

impl Wake for ConnectionLife {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.reader.wake();
        self.writer.wake();
    }
}

/// Connections that are to end when nothing vouches for them any more.
#[derive(Debug, Default)]
pub(super) struct Connections {
    lives: Vec<Weak<ConnectionLife>>,
    /// Those that are gone are forgotten when there are so many.
    sweep_at: usize,
}

impl Connections {
    const LEAST_SWEPT: usize = 64;

    pub(super) fn enter(&mut self, life: &Arc<ConnectionLife>) {
        if self.lives.len() >= self.sweep_at.max(Self::LEAST_SWEPT) {
            self.lives.retain(|life| life.strong_count() > 0);
            self.sweep_at = self.lives.len() * 2;
        }
        self.lives.push(Arc::downgrade(life));
    }

    pub(super) fn living(&self) -> Vec<Arc<ConnectionLife>> {
        self.lives.iter().filter_map(Weak::upgrade).collect()
    }
}

/// A direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

enum Securing {
    Opening(BoxFuture<'static, io::Result<OpenedWire>>),
    Open(Box<dyn Wire>),
    Failed(io::ErrorKind, String),
}

/// A secured wire: see the [module](self).
pub(super) struct SecuredWire {
    stage: Securing,
    life: Arc<ConnectionLife>,
    proof: Arc<Proof>,
    /// Where a handshake that fails counts.
    failed: Arc<AtomicU64>,
}

impl SecuredWire {
    /// One that `opening` makes when it is first used, in time. A failure counts in `failed`.
    pub(super) fn opening(
        opening: impl Future<Output = io::Result<OpenedWire>> + Send + 'static,
        failed: Arc<AtomicU64>,
    ) -> (Self, Arc<ConnectionLife>, Arc<Proof>) {
        let in_time = async {
            // Together they are large.
            match timeout(HANDSHAKE_PATIENCE, Box::pin(opening)).await {
                Ok(opened) => opened,
                Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake takes too long")),
            }
        };
        let (life, proof) = (Arc::<ConnectionLife>::default(), Arc::<Proof>::default());
        let stage = Securing::Opening(in_time.boxed());
        (Self { stage, life: life.clone(), proof: proof.clone(), failed }, life, proof)
    }

    /// One that has its handshake behind it.
    pub(super) fn opened(opened: OpenedWire) -> (Self, Arc<ConnectionLife>) {
        let life = Arc::<ConnectionLife>::default();
        let mut this = Self {
            stage: Securing::Failed(io::ErrorKind::NotConnected, String::new()),
            life: life.clone(),
            proof: Arc::default(),
            failed: Arc::default(),
        };
        this.open(opened);
        (this, life)
    }

    fn open(&mut self, opened: OpenedWire) {
        if let Some(basis) = opened.basis {
            let _ = self.life.basis.set(basis);
        }
        let _ = self.proof.0.set(opened.proven);
        self.stage = Securing::Open(opened.wire);
    }

    /// The wire once it is open.
    fn poll_open(
        &mut self,
        cx: &mut Context<'_>,
        direction: Direction,
    ) -> Poll<io::Result<&mut Box<dyn Wire>>> {
        match direction {
            Direction::Read => self.life.reader.register(cx.waker()),
            Direction::Write => self.life.writer.register(cx.waker()),
        }
        if self.life.ended.load(Ordering::Acquire) {
            let why = "what vouched for the other end is no longer in force";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, why)));
        }
        if let Securing::Opening(opening) = &mut self.stage {
            let waker = Waker::from(self.life.clone());
            match ready!(opening.as_mut().poll(&mut Context::from_waker(&waker))) {
                Ok(opened) => self.open(opened),
                Err(error) => {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(%error, "a handshake failed");
                    self.stage = Securing::Failed(error.kind(), error.to_string());
                }
            }
            // The other direction may have waited for it, too.
            self.life.wake_by_ref();
        }
        Poll::Ready(match &mut self.stage {
            Securing::Open(wire) => Ok(wire),
            Securing::Failed(kind, why) => Err(io::Error::new(*kind, why.clone())),
            Securing::Opening(_) => unreachable!("it has just been left"),
        })
    }
}

impl fmt::Debug for SecuredWire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecuredWire").field("proof", &self.proof).finish_non_exhaustive()
    }
}

impl AsyncRead for SecuredWire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let wire = ready!(self.poll_open(cx, Direction::Read))?;
        Pin::new(wire).poll_read(cx, buffer)
    }
}

impl AsyncWrite for SecuredWire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wire = ready!(self.poll_open(cx, Direction::Write))?;
        Pin::new(wire).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stage {
            Securing::Open(wire) => Pin::new(wire).poll_flush(cx),
            // Nothing has been written.
            Securing::Opening(_) | Securing::Failed(..) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stage {
            Securing::Open(wire) => Pin::new(wire).poll_shutdown(cx),
            Securing::Opening(_) | Securing::Failed(..) => {
                self.stage = Securing::Failed(io::ErrorKind::NotConnected, "it was closed".to_owned());
                Poll::Ready(Ok(()))
            }
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wire = ready!(self.poll_open(cx, Direction::Write))?;
        Pin::new(wire).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stage {
            Securing::Open(wire) => wire.is_write_vectored(),
            // As it is going to be.
            Securing::Opening(_) | Securing::Failed(..) => true,
        }
    }
}

/// A wire below the handshake: what is read of it is bounded until that is complete, and its first byte can be looked at.
pub(super) struct RawWire {
    wire: Box<dyn Wire>,
    first: Option<u8>,
    left_bytes: Option<usize>,
}

impl RawWire {
    pub(super) fn new(wire: Box<dyn Wire>) -> Self {
        Self { wire, first: None, left_bytes: Some(HANDSHAKE_BYTES) }
    }

    /// Whether the caller speaks TLS; false also where it says nothing and goes.
    pub(super) async fn speaks_tls(&mut self) -> io::Result<bool> {
        let mut first = [0];
        let read = self.read(&mut first).await?;
        self.first = (read > 0).then_some(first[0]);
        Ok(self.first == Some(TLS_RECORD))
    }

    /// The handshake is complete: as much is read as there is.
    pub(super) fn is_known(&mut self) {
        self.left_bytes = None;
    }
}

impl AsyncRead for RawWire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buffer.remaining() > 0
            && let Some(first) = self.first.take()
        {
            buffer.put_slice(&[first]);
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.wire).poll_read(cx, buffer))?;
        if let Some(left_bytes) = &mut self.left_bytes {
            let read = buffer.filled().len() - before;
            *left_bytes = left_bytes.checked_sub(read).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "the handshake is longer than any should be")
            })?;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for RawWire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.wire).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.wire).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.wire.is_write_vectored()
    }
}
