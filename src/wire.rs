//! Both directions of a connection, whatever carries it.

use tokio::io::{AsyncRead, AsyncWrite};

/// A connection.
pub(crate) trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}
