//! Every call there is, by callers to whom it is granted and by all others.

use std::net::SocketAddr;

use quorate::testkit::proto::details;
use quorate::testkit::proto::rpc::Rpc;
use quorate::testkit::proto::v1::admin_client::AdminClient;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::{ListSessionsRequest, PutRequest, Reason, StatusRequest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::Code;

use super::{TestToken, by, call, code_of, guarded, root};
use crate::channel;

/// Callers to whom something is granted, by what that is.
fn tokens() -> [TestToken; 5] {
    let of_other = "grants = [{ tenant = \"other\", rights = [\"read\", \"write\", \"subscribe\"] }]";
    let of_all = root().says;
    [
        root(),
        TestToken::new("observer", "roles = [\"observe\"]"),
        TestToken::new("operator", "roles = [\"operate\"]"),
        TestToken::new("other", of_other),
        TestToken::new("expired", &format!("expires = 1\n{of_all}")),
    ]
}

/// To whom of them a call is granted that asks for nothing in particular, so for what is of the default tenant: written down here once more.
fn granted(path: &str) -> &'static [&'static str] {
    let (service, method) = path[1..].split_once('/').unwrap();
    match (service, method) {
        ("quorate.v1.Admin", "Status" | "MemberList") | ("replication.ReplicationService", "GetStatus") => {
            &["root", "observer", "operator", "other"]
        }
        // It changes nothing.
        ("quorate.v1.Admin", "Configure") => &["root", "observer", "operator"],
        ("quorate.v1.Admin", _) => &["root", "operator"],
        (_, "OpenSession" | "CloseSession") => &["root", "other"],
        // What comes on it is looked at one by one.
        ("quorate.v1.Pipeline", "Run") | ("quorate.v1.Kv", "Pipeline") => &["root", "other"],
        // It asks for a watch, which its caller alone can have.
        ("quorate.v1.Kv", "WatchProgress") => &["root", "other"],
        ("quorate.v1.Kv", _) | ("replication.ReplicationService", _) => &["root"],
        _ => panic!("nobody has said who may call {path}"),
    }
}

/// What a caller could have changed: the state, sessions, members, who leads. A node alone agrees on things with itself at any time, so
/// its position says nothing.
async fn content(address: SocketAddr) -> impl PartialEq + std::fmt::Debug {
    let (mut admin, root) = (AdminClient::new(channel(address).await), root().secret());
    let status = admin.status(by(&root, StatusRequest {})).await.unwrap().into_inner();
    let sessions = admin.list_sessions(by(&root, ListSessionsRequest::default())).await.unwrap().into_inner();
    let members: Vec<_> = status.members.iter().map(|member| (member.node_id, member.peer.clone())).collect();
    (status.state_hash, status.term, members, sessions.sessions.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_credential_that_is_valid_every_call_is_refused_alike() {
    guarded(&tokens(), "", async |address, _| {
        let put = PutRequest { key: "k".into(), value: "v".into(), ..Default::default() };
        KvClient::new(channel(address).await).put(by(&root().secret(), put)).await.unwrap();
        let before = content(address).await;
        let expired = tokens()[4].secret();
        let huge = "x".repeat(9000);
        let mut told = Vec::new();
        for rpc in Rpc::ALL {
            let path = rpc.path();
            for token in [None, Some("wrong"), Some(expired.as_str()), Some(&huge), Some("a.b.c")] {
                let refused = call(address, path, token, Default::default()).await;
                let status = refused.err().unwrap_or_else(|| panic!("{path} is answered with {token:?}"));
                assert_eq!(status.code(), Code::Unauthenticated, "{path} {token:?} {status:?}");
                let failure = details::failure(status.details()).expect("it is told in detail");
                assert_eq!((failure.reason(), failure.maybe_applied), (Reason::Unauthenticated, false));
                // Who leads is told to nobody who may not know.
                told.push((status.message().to_owned(), failure.leader));
            }
        }
        told.dedup();
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!(told[0].1, None);
        assert!(told[0].0.contains("--token-file"), "{told:?}");
        assert_eq!(content(address).await, before);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_call_takes_its_own_right_and_no_other() {
    guarded(&tokens(), "", async |address, _| {
        for rpc in Rpc::ALL {
            let path = rpc.path();
            // It would take a second for each.
            let changes = path.starts_with("/quorate.v1.Admin/") && granted(path) == ["root", "operator"];
            for token in &tokens()[..4] {
                let is_granted = granted(path).contains(&token.name);
                if is_granted && changes && path.ends_with("Leader") {
                    continue;
                }
                let code = code_of(address, path, Some(&token.secret())).await;
                match is_granted {
                    true => assert!(
                        ![Code::Unauthenticated, Code::PermissionDenied, Code::Unimplemented].contains(&code),
                        "{path} by {}: {code:?}",
                        token.name
                    ),
                    false => assert_eq!(code, Code::PermissionDenied, "{path} by {}", token.name),
                }
            }
        }
    })
    .await;
}

/// Code and text of the answer to a request of a page.
async fn page(address: SocketAddr, method: &str, path: &str, token: Option<&str>) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let shown = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{shown}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    (response.split(' ').nth(1).unwrap().parse().unwrap(), response)
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_are_answered_and_other_pages_ask_who_asks() {
    guarded(&tokens(), "", async |address, _| {
        let [root, observer, operator, other, expired] = tokens().map(|token| token.secret());
        for path in ["/livez", "/readyz"] {
            for token in [None, Some("wrong"), Some(observer.as_str())] {
                assert_eq!(page(address, "GET", path, token).await.0, 200, "{path} {token:?}");
            }
        }
        let pages = [
            "/metrics",
            "/stats",
            "/replication/status",
            "/replication/stats",
            "/replication/replicas",
            "/replication/configure",
        ];
        for path in pages {
            for token in [None, Some("wrong"), Some(expired.as_str())] {
                let (code, answer) = page(address, "GET", path, token).await;
                assert_eq!(code, 401, "{path} {token:?}");
                assert!(
                    answer.contains("www-authenticate: Bearer") && answer.contains("UNAUTHENTICATED"),
                    "{answer}"
                );
            }
            for (token, code) in [(&root, 200), (&observer, 200), (&operator, 200), (&other, 403)] {
                assert_eq!(page(address, "GET", path, Some(token)).await.0, code, "{path} {token}");
            }
        }
        for (token, code) in [(&observer, 403), (&other, 403), (&operator, 200), (&root, 200)] {
            let answer = page(address, "POST", "/replication/configure", Some(token)).await;
            assert_eq!(answer.0, code, "{token} {}", answer.1);
        }
        // What does not stand in the table: nobody learns whether there is something.
        for path in ["/", "/nothing", "/replication/", "/quorate.v1.Kv/Nothing"] {
            assert_eq!(
                page(address, "GET", path, None).await.0,
                if path.contains('.') { 415 } else { 401 },
                "{path}"
            );
        }
        assert_eq!(page(address, "GET", "/nothing", Some(&observer)).await.0, 404);
        for path in ["/quorate.v1.Kv/Nothing", "/quorate.peer.v1.Peer/Identify", "/some.Service/Call"] {
            assert_eq!(code_of(address, path, None).await, Code::Unauthenticated, "{path}");
            assert_eq!(code_of(address, path, Some(&root)).await, Code::Unimplemented, "{path}");
        }
        let health = "/grpc.health.v1.Health/Check";
        assert_eq!(code_of(address, health, None).await, Code::Ok);
        for reflection in [
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ] {
            assert_eq!(code_of(address, reflection, None).await, Code::Unauthenticated);
            assert_eq!(code_of(address, reflection, Some(&other)).await, Code::PermissionDenied);
            let code = code_of(address, reflection, Some(&observer)).await;
            assert!(![Code::Unauthenticated, Code::PermissionDenied].contains(&code), "{code:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_shows_nothing_may_do_what_is_granted_to_anonymous_callers() {
    let anonymous = "[anonymous]\nroles = [\"observe\"]\n";
    guarded(&tokens(), anonymous, async |address, _| {
        assert_eq!(code_of(address, "/quorate.v1.Admin/Status", None).await, Code::Ok);
        assert_eq!(code_of(address, "/quorate.v1.Admin/Snapshot", None).await, Code::PermissionDenied);
        assert_eq!(code_of(address, "/quorate.v1.Kv/Get", None).await, Code::PermissionDenied);
        // A wrong token is not none.
        assert_eq!(code_of(address, "/quorate.v1.Admin/Status", Some("wrong")).await, Code::Unauthenticated);
    })
    .await;
}

/// What a page in a browser may send unasked, and a request without an end: a credential that the browser adds changes nothing, and of a
/// stranger nothing is read.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_others_and_requests_without_an_end_are_refused_at_once() {
    guarded(&tokens(), "", async |address, _| {
        let (before, root) = (content(address).await, root().secret());
        for (path, headers) in [
            ("/quorate.v1.Kv/Put", "Content-Type: text/plain\r\n"),
            ("/quorate.v1.Admin/RemoveMember", "Content-Type: text/plain\r\n"),
            ("/replication/configure", "Content-Type: text/plain\r\n"),
            ("/replication/configure", "Content-Type: application/json\r\nOrigin: https://evil.example\r\n"),
        ] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let request = format!(
                "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {root}\r\n{headers}Content-Length: 2\r\n\r\n{{}}"
            );
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut response = String::new();
            stream.read_to_string(&mut response).await.unwrap();
            let code: u16 = response.split(' ').nth(1).unwrap().parse().unwrap();
            assert!([403, 415, 505].contains(&code), "{path} {headers}: {response}");
        }
        // It says that a gigabyte follows, and sends nothing of it.
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = "POST /replication/configure HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1073741824\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        let read = stream.read_exact(&mut answer);
        tokio::time::timeout(crate::DEADLINE, read).await.expect("it is answered at once").unwrap();
        assert_eq!(&answer, b"HTTP/1.1 401");
        assert_eq!(content(address).await, before);
    })
    .await;
}
