//! How a member's peer port is connected to: over TCP, and secured where members prove to each other who they are.

use std::io;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;

use crate::trust::peers::PeerAuthenticator;
use crate::trust::wire::Proven;
use crate::types::NodeId;
use crate::wire::Wire;

/// Makes one connection, which is secured.
pub(super) struct PeerDialler {
    authenticator: Arc<PeerAuthenticator>,
    wanted: Option<NodeId>,
    proven: Arc<OnceLock<Proven>>,
}

impl PeerDialler {
    /// To node `wanted`, or to any member; and where it is found what the other end has proven.
    pub(super) fn to(
        wanted: Option<NodeId>,
        authenticator: Arc<PeerAuthenticator>,
    ) -> (Self, Arc<OnceLock<Proven>>) {
        let proven = Arc::<OnceLock<Proven>>::default();
        (Self { authenticator, wanted, proven: proven.clone() }, proven)
    }
}

impl Service<Uri> for PeerDialler {
    type Response = TokioIo<Box<dyn Wire>>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, address: Uri) -> Self::Future {
        let (authenticator, wanted, proven) = (self.authenticator.clone(), self.wanted, self.proven.clone());
        async move {
            let authority = address.authority().map(ToString::to_string).unwrap_or_default();
            let (wire, said) = authenticator.dial(|| connected(authority.clone()), wanted).await?;
            // One connection is made, or there is none.
            let _ = proven.set(said);
            Ok(TokioIo::new(wire))
        }
        .boxed()
    }
}

async fn connected(address: String) -> io::Result<Box<dyn Wire>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(Box::new(stream))
}
