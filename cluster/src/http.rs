//! One HTTP/1.1 GET, for readiness. No redirects, no bodies, no connection reuse.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

/// A status line longer than this is not one.
const STATUS_LINE_BYTES: usize = 256;

/// The status code that `address` (`host:port`) answers to `GET path`. Each step takes at most
/// `timeout`.
pub(crate) fn status_code(address: &str, path: &str, timeout: Duration) -> io::Result<u16> {
    let resolved = address
        .to_socket_addrs()?
        .next()
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"))?;
    let mut stream = TcpStream::connect_timeout(&resolved, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    // In one piece: a server may answer and close before it has read the rest.
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;

    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < STATUS_LINE_BYTES && stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    parse_status_line(&line)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP"))
}

fn parse_status_line(line: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    words.next().filter(|version| version.starts_with("HTTP/1."))?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_status_line_is_read_and_anything_else_refused() {
        assert_eq!(parse_status_line(b"HTTP/1.1 200 OK\r"), Some(200));
        assert_eq!(parse_status_line(b"HTTP/1.0 503"), Some(503));
        assert_eq!(parse_status_line(b"SSH-2.0-OpenSSH_9.2"), None);
        assert_eq!(parse_status_line(b""), None);
    }

    #[test]
    fn the_code_comes_from_the_server() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let length = stream.read(&mut request).unwrap();
            stream.write_all(b"HTTP/1.1 503 Service Unavailable\r\n\r\n").unwrap();
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        assert_eq!(status_code(&address, "/readyz", Duration::from_secs(5)).unwrap(), 503);
        assert!(server.join().unwrap().starts_with("GET /readyz HTTP/1.1\r\n"));
    }
}
