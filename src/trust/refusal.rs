//! What a caller that does not speak TLS is told at a port that does: that, in the protocol that it speaks.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

const SPEAKS_TLS: &str = "this port speaks TLS: use https://, or give --tls-ca to quorate";
/// How HTTP/2 begins, and how much of that tells it from everything else.
const PREFACE_BYTES: u64 = 24;
const TOLD_APART: usize = 3;
/// Longest frame that is read: none that begins a connection may be longer (RFC 9113, section 4.2).
const MAX_FRAME_BYTES: usize = 16 * 1024;
const HEADERS: u8 = 0x1;

/// Answers a request in HTTP, of the version that it begins with.
pub(super) async fn in_http(caller: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
    let mut begun = [0; TOLD_APART];
    caller.read_exact(&mut begun).await?;
    match &begun {
        b"PRI" => in_http2(caller).await,
        _ => caller.write_all(&http1()).await,
    }
}

fn http1() -> Vec<u8> {
    let length = SPEAKS_TLS.len() + 1;
    format!(
        "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{SPEAKS_TLS}\n"
    )
    .into_bytes()
}

/// Answers each request until its client goes, or its time is over: what is only said of the connection, a client does not tell its user.
async fn in_http2(caller: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
    const SETTINGS: [u8; 9] = [0, 0, 0, 0x4, 0, 0, 0, 0, 0];
    caller.write_all(&SETTINGS).await?;
    caller.flush().await?;
    let mut rest = [0; PREFACE_BYTES as usize - TOLD_APART];
    caller.read_exact(&mut rest).await?;
    loop {
        let mut head = [0; 9];
        // A client that has gone has heard it.
        if caller.read(&mut head[..1]).await? == 0 {
            return Ok(());
        }
        caller.read_exact(&mut head[1..]).await?;
        let [high, middle, low, kind, _, stream @ ..] = head;
        let bytes = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        if bytes > MAX_FRAME_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut content = vec![0; bytes];
        caller.read_exact(&mut content).await?;
        if kind == HEADERS {
            caller.write_all(&http2(stream)).await?;
            caller.flush().await?;
        }
    }
}

/// The answer on `stream`. It is one of gRPC that has no content, in headers that stand for themselves
/// (RFC 7541, section 6.2.2).
fn http2(stream: [u8; 4]) -> Vec<u8> {
    const STATUS_200: u8 = 0x88;
    const UNAVAILABLE: &str = "14";
    const ENDS_STREAM_AND_HEADERS: u8 = 0x5;
    let short = |text: &str| u8::try_from(text.len()).expect("invariant: it is a short text");
    let mut fields = vec![STATUS_200];
    for (name, value) in
        [("content-type", "application/grpc"), ("grpc-status", UNAVAILABLE), ("grpc-message", SPEAKS_TLS)]
    {
        fields.extend([0, short(name)]);
        fields.extend(name.as_bytes());
        fields.push(short(value));
        fields.extend(value.as_bytes());
    }
    let length = u8::try_from(fields.len()).expect("invariant: they are short");
    let mut answer = vec![0, 0, length, HEADERS, ENDS_STREAM_AND_HEADERS];
    answer.extend(stream);
    answer.extend(fields);
    answer
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    async fn told(said: &[u8]) -> (Vec<u8>, io::Result<()>) {
        let (mut near, mut far) = duplex(64 * 1024);
        near.write_all(said).await.unwrap();
        near.shutdown().await.unwrap();
        let outcome = in_http(&mut far).await;
        drop(far);
        let mut told = Vec::new();
        near.read_to_end(&mut told).await.unwrap();
        (told, outcome)
    }

    #[tokio::test]
    async fn what_is_no_http_is_not_waited_for() {
        const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        let huge = [PREFACE, &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0]].concat();
        for said in [&b"PR"[..], b"PRI * HTTP", &huge, &[PREFACE, &[0, 0, 4, 0]].concat()] {
            assert!(told(said).await.1.is_err(), "{said:?}");
        }
        let (answer, outcome) = told(b"\0\0\0\x08").await;
        assert!(outcome.is_ok() && answer.starts_with(b"HTTP/1.1 400"));
    }

    /// Read by another implementation of HTTP/2.
    #[tokio::test]
    async fn a_client_of_http2_reads_the_answer() {
        let (near, mut far) = duplex(64 * 1024);
        let refuses = async {
            in_http(&mut far).await.unwrap();
            far.shutdown().await.unwrap();
            let _ = tokio::io::copy(&mut far, &mut tokio::io::sink()).await;
        };
        let asks = async {
            let (client, connection) = h2::client::handshake(near).await.unwrap();
            let connection = crate::runtime::spawn(async move {
                let _ = connection.await;
            });
            let mut client = client.ready().await.unwrap();
            let request = axum::http::Request::post("http://a/b").body(()).unwrap();
            let (answer, mut content) = client.send_request(request, false).unwrap();
            let _ = content.send_data(bytes::Bytes::new(), true);
            let (answer, body) = answer.await.unwrap().into_parts();
            // Whoever holds any of these holds the connection open.
            drop((client, content, body));
            let _ = connection.await;
            answer
        };
        let (answer, ()) = tokio::join!(asks, refuses);
        assert_eq!(answer.status, 200);
        assert_eq!(answer.headers["grpc-status"], "14");
        assert_eq!(answer.headers["grpc-message"], SPEAKS_TLS);
    }
}
