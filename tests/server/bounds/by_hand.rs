//! HTTP/2 by hand: calls whose answers are not read, or whose messages do not end.

use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use prost::Message;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::codegen::http;

use crate::DEADLINE;

/// A connection that speaks HTTP/2 by hand. It ends when its sender and all its streams are gone.
#[allow(clippy::disallowed_methods)] // of this process, not of a node
pub(super) async fn raw(address: SocketAddr) -> SendRequest<Bytes> {
    let socket = TcpStream::connect(address).await.unwrap();
    // Else its many small frames, and what is answered to them, wait for each other.
    socket.set_nodelay(true).unwrap();
    let mut builder = h2::client::Builder::new();
    // By itself this library gives a connection up that brings many small frames which nobody reads.
    let (sender, connection) = builder.data_frame_budget(usize::MAX).handshake(socket).await.unwrap();
    tokio::spawn(async move {
        // It ends when the node closes it.
        let _ = connection.await;
    });
    sender
}

pub(super) fn call(path: &str) -> http::Request<()> {
    let request = http::Request::post(format!("http://localhost{path}"));
    request.header("content-type", "application/grpc").header("te", "trailers").body(()).unwrap()
}

pub(super) fn framed(message: &impl Message) -> Bytes {
    let length = u32::try_from(message.encoded_len()).unwrap().to_be_bytes();
    [&[0][..], &length, &message.encode_to_vec()].concat().into()
}

/// The first message of `arrived`, once it is there as a whole.
pub(super) fn message_of(arrived: &mut BytesMut) -> Option<BytesMut> {
    let length = u32::from_be_bytes(arrived.get(1..5)?.try_into().unwrap()) as usize;
    (arrived.len() >= 5 + length).then(|| arrived.split_to(5 + length).split_off(5))
}

/// Calls `path` with a first message, and perhaps more to come; returns the answer once it has begun.
pub(super) async fn begin(
    sender: &mut SendRequest<Bytes>,
    path: &str,
    message: &impl Message,
    is_all: bool,
) -> (RecvStream, SendStream<Bytes>) {
    let begun = async {
        *sender = sender.clone().ready().await.unwrap();
        let (answer, mut stream) = sender.send_request(call(path), false).unwrap();
        stream.send_data(framed(message), is_all).unwrap();
        (answer.await.unwrap().into_body(), stream)
    };
    timeout(DEADLINE, begun).await.expect("it is not answered")
}

/// Sends `bytes` as the node takes them.
pub(super) async fn send_all(stream: &mut SendStream<Bytes>, mut bytes: Bytes) {
    while !bytes.is_empty() {
        stream.reserve_capacity(bytes.len());
        let granted = std::future::poll_fn(|cx| stream.poll_capacity(cx));
        let granted = timeout(DEADLINE, granted).await.expect("it is not taken").unwrap().unwrap();
        stream.send_data(bytes.split_to(granted.min(bytes.len())), false).unwrap();
    }
}
