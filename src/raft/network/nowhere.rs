//! A network in which nobody is reached, for tests.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use futures::FutureExt;
use futures::future::BoxFuture;

use super::{Connection, DialError, Hello, IdentifyRequest, IdentifyResponse, Purpose, Target, Transport};

/// Refuses every dial at once, as a host does on which no node runs.
#[derive(Debug, Default)]
pub(crate) struct Nowhere {
    dials: AtomicU32,
}

impl Nowhere {
    /// How often somebody was to be connected to.
    pub(crate) fn dials(&self) -> u32 {
        self.dials.load(Relaxed)
    }
}

fn refused<T: Send + 'static>() -> BoxFuture<'static, Result<T, DialError>> {
    async { Err(DialError::Unreachable("connection refused".to_owned())) }.boxed()
}

impl Transport for Nowhere {
    fn connect(
        &self,
        _target: Target,
        _hello: Hello,
        _purpose: Purpose,
    ) -> BoxFuture<'static, Result<Connection, DialError>> {
        self.dials.fetch_add(1, Relaxed);
        refused()
    }

    fn identify(
        &self,
        _address: String,
        _request: IdentifyRequest,
    ) -> BoxFuture<'static, Result<IdentifyResponse, DialError>> {
        refused()
    }
}
