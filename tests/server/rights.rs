//! A node that asks its callers who they are: each may do what is granted to it, and nothing else.

mod calls;
mod commands;
mod ends;
mod guests;
mod keys;
mod limits;
mod strangers;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use bytes::{Buf, BufMut, Bytes};
use quorate::kv::Kv;
use quorate::server::{ClientAuth, Credentials, Server, token_hash};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request, Status, Streaming};

use crate::{DEADLINE, channel, with_server};

/// A token of the file, and what the file grants by it.
pub(super) struct TestToken {
    pub(super) name: &'static str,
    pub(super) says: String,
}

impl TestToken {
    pub(super) fn new(name: &'static str, says: &str) -> Self {
        Self { name, says: says.to_owned() }
    }

    /// What its caller shows.
    pub(super) fn secret(&self) -> String {
        format!("secret-of-{}", self.name)
    }
}

/// One to whom all is granted.
pub(super) fn root() -> TestToken {
    let all = "grants = [{ tenant = \"*\", rights = [\"read\", \"write\", \"subscribe\"] }]";
    TestToken::new("root", &format!("roles = [\"operate\"]\n{all}"))
}

/// Writes a file of `tokens`, and `more`.
pub(super) fn write_file(path: &Path, tokens: &[TestToken], more: &str) {
    let mut text = more.to_owned();
    for token in tokens {
        let (name, hash, says) = (token.name, token_hash(&token.secret()), &token.says);
        write!(text, "\n[[token]]\nname = \"{name}\"\nsha256 = \"{hash}\"\n{says}\n").unwrap();
    }
    // As a whole, as whoever keeps such files does.
    let whole = path.with_extension("new");
    std::fs::write(&whole, text).unwrap();
    std::fs::rename(whole, path).unwrap();
}

/// Runs `test` against a node that asks for these `tokens`, with the file of them.
pub(super) async fn guarded<T>(
    tokens: &[TestToken],
    more: &str,
    test: impl AsyncFnOnce(SocketAddr, PathBuf) -> T,
) -> T {
    guarded_at(quorate::kv::bind("127.0.0.1:0").await.unwrap(), tokens, more, test).await
}

/// The same at the ports of `server`.
pub(super) async fn guarded_at<T>(
    server: Server<Kv>,
    tokens: &[TestToken],
    more: &str,
    test: impl AsyncFnOnce(SocketAddr, PathBuf) -> T,
) -> T {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.toml");
    write_file(&file, tokens, more);
    let mut auth = ClientAuth::default();
    auth.tokens_file = Some(file.clone());
    let server = server.with_credentials(Credentials::load(auth).unwrap());
    let data = dir.path().join("data");
    with_server(&data, server, async move |address| test(address, file).await).await
}

/// `message` with `token` in its metadata.
pub(super) fn by<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

/// Messages as their bytes.
pub(super) struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buf.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buf.copy_to_bytes(buf.remaining())))
    }
}

/// The stream that a call of `path` with `message` is answered by.
pub(super) async fn call(
    address: SocketAddr,
    path: &'static str,
    token: Option<&str>,
    message: Bytes,
) -> Result<Streaming<Bytes>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel(address).await);
    grpc.ready().await.unwrap();
    // The caller says nothing more.
    let messages = tokio_stream::iter([message]);
    let request = match token {
        Some(token) => by(token, messages),
        None => Request::new(messages),
    };
    let answered = grpc.streaming(request, PathAndQuery::from_static(path), Raw);
    Ok(tokio::time::timeout(DEADLINE, answered).await.expect("it is answered")?.into_inner())
}

/// With which code an empty call of `path` ends; ok for one that is answered, or goes on.
pub(super) async fn code_of(address: SocketAddr, path: &'static str, token: Option<&str>) -> Code {
    let mut answers = match call(address, path, token, Bytes::new()).await {
        Ok(answers) => answers,
        Err(status) => return status.code(),
    };
    let first = tokio::time::timeout(std::time::Duration::from_millis(500), answers.message()).await;
    match first {
        Ok(Err(status)) => status.code(),
        Ok(Ok(_)) | Err(_) => Code::Ok,
    }
}
