//! What a client shows of itself to the nodes that it calls.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{HeaderValue, Request, Response, header};
use tonic::transport::{Channel, Error};

use crate::runtime;

/// How old what was read from a file may be.
const READ_AGAIN: Duration = Duration::from_secs(5);
/// Longest token that a node looks at.
const MAX_TOKEN_BYTES: u64 = 8 * 1024;

/// A token that a client shows with every call, in the header `authorization`. Cheap to clone; `Debug` does not show it.
///
/// Whoever reads it on its way can use it: give it only to nodes that are reached by TLS, or on a network that is trusted.
#[derive(Clone)]
pub struct Token(Arc<TokenSource>);

struct TokenSource {
    path: Option<PathBuf>,
    value: Mutex<(HeaderValue, Instant)>,
}

impl Token {
    /// This one.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`], when it can be none: a token has 1 to 8192 printable characters, and no spaces.
    pub fn new(token: &str) -> io::Result<Self> {
        Self::of(token, None)
    }

    /// The one in the file at `path`, which is read again while the client is used: a newer token takes effect some seconds after it
    /// is there. Space and ends of lines around it do not count.
    ///
    /// # Errors
    /// When it cannot be read, or holds no token.
    pub fn from_file(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let token = read(&path)?;
        Self::of(&token, Some(path))
    }

    fn of(token: &str, path: Option<PathBuf>) -> io::Result<Self> {
        let value = Mutex::new((header(token)?, Instant::now()));
        Ok(Self(Arc::new(TokenSource { path, value })))
    }

    /// What is sent. Of a file what was read last, and it is read again if that was long ago.
    fn header(&self) -> HeaderValue {
        let mut value = self.0.value.lock().unwrap_or_else(PoisonError::into_inner);
        if self.0.path.is_some() && value.1.elapsed() >= READ_AGAIN {
            value.1 = Instant::now();
            let source = self.0.clone();
            runtime::spawn(async move { runtime::offload(move || source.read_again()).await });
        }
        value.0.clone()
    }
}

impl TokenSource {
    fn read_again(&self) {
        let Some(path) = &self.path else { return };
        match read(path).and_then(|token| header(&token)) {
            Ok(token) => self.value.lock().unwrap_or_else(PoisonError::into_inner).0 = token,
            Err(error) => tracing::warn!(%error, path = %path.display(), "the token stays as it was"),
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut token = String::new();
    File::open(path)?.take(MAX_TOKEN_BYTES + 2).read_to_string(&mut token)?;
    Ok(token.trim().to_owned())
}

fn header(token: &str) -> io::Result<HeaderValue> {
    let is_one = !token.is_empty()
        && token.len() as u64 <= MAX_TOKEN_BYTES
        && token.bytes().all(|byte| byte.is_ascii_graphic());
    let unusable = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a token has 1 to {MAX_TOKEN_BYTES} printable characters, and no spaces"),
        )
    };
    let mut value =
        HeaderValue::try_from(format!("Bearer {token}")).ok().filter(|_| is_one).ok_or_else(unusable)?;
    value.set_sensitive(true);
    Ok(value)
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("path", &self.0.path).finish_non_exhaustive()
    }
}

/// The same source.
impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Token {}

/// The connection to a node, on which every call shows the client's token, if it has one.
#[derive(Debug, Clone)]
pub(crate) struct NodeChannel {
    channel: Channel,
    token: Option<Token>,
}

impl NodeChannel {
    pub(super) fn new(channel: Channel, token: Option<Token>) -> Self {
        Self { channel, token }
    }
}

impl Service<Request<Body>> for NodeChannel {
    type Response = Response<Body>;
    type Error = Error;
    type Future = <Channel as Service<Request<Body>>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.channel.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if let Some(token) = &self.token {
            request.headers_mut().insert(header::AUTHORIZATION, token.header());
        }
        self.channel.call(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_is_shown_to_nodes_and_to_nobody_else() {
        let token = Token::new("5ecret").unwrap();
        assert_eq!(token.header(), "Bearer 5ecret");
        let channel = tonic::transport::Endpoint::from_static("http://localhost:1").connect_lazy();
        let shown =
            format!("{token:?} {:?} {:?}", token.header(), NodeChannel::new(channel, Some(token.clone())));
        assert!(!shown.contains("5ecret"), "{shown}");
        for wrong in ["", "two words", "line\nbreak", "\u{e9}", &"x".repeat(9000)] {
            assert_eq!(Token::new(wrong).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[tokio::test]
    async fn a_token_in_a_file_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        assert!(Token::from_file(&path).is_err());
        std::fs::write(&path, "first\n").unwrap();
        let token = Token::from_file(&path).unwrap();
        assert_eq!(token.header(), "Bearer first");
        std::fs::write(&path, "second\n").unwrap();
        token.0.read_again();
        assert_eq!(token.header(), "Bearer second");
        // One that is half written changes nothing.
        std::fs::write(&path, "").unwrap();
        token.0.read_again();
        assert_eq!(token.header(), "Bearer second");
        let old = Instant::now() - READ_AGAIN;
        std::fs::write(&path, "third").unwrap();
        token.0.value.lock().unwrap().1 = old;
        let read = async {
            while token.header() != "Bearer third" {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), read).await.expect("it is read by itself");
    }
}
