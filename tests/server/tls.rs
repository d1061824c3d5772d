//! TLS at the ports for clients: whom a client believes, what it shows, and what is said to one that does not speak it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use quorate::kv::client::{Client, ClientConfig, ClientTls, Reason, Scope, Token};
use quorate::server::{ClientCertificates, PortTls};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::forwarding::ReplicaProcess;
use crate::{DEADLINE, rights, with_node, with_server};

/// An authority, and what it has signed, in a directory.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        this.make(&["ca"]);
        this.make(&["node", "1"]);
        this.make(&["client", "app"]);
        this
    }

    fn make(&self, args: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
        command.arg("cert").args(args).arg("--dir").arg(self.0.path()).arg("--force").stdout(Stdio::null());
        assert!(command.status().unwrap().success(), "{args:?}");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn port(&self, auth: ClientCertificates) -> PortTls {
        let mut tls = PortTls::new(self.path("node-1.pem"), self.path("node-1.key"));
        (tls.client_ca, tls.client_auth) = (Some(self.path("ca.pem")), auth);
        tls
    }

    /// What a client without a certificate of its own has.
    fn anonymous(&self) -> ClientTls {
        ClientTls::with_ca(self.path("ca.pem")).unwrap()
    }

    fn client(&self) -> ClientTls {
        let (certificate, key) = (self.path("app.pem"), self.path("app.key"));
        ClientTls::with_certificate(self.path("ca.pem"), certificate, key).unwrap()
    }
}

fn client(address: &str, tls: Option<ClientTls>) -> Client {
    let mut config = ClientConfig::default();
    config.tls = tls;
    // What is wrong is told at once.
    config.unavailable_after = Duration::ZERO;
    Client::new([address], config).unwrap()
}

async fn put(client: &Client) -> Result<(), String> {
    client.put(&Scope::default(), "k", "v").await.map(drop).map_err(|error| error.to_string())
}

async fn served(tls: PortTls) -> quorate::server::Server<quorate::kv::Kv> {
    quorate::kv::bind("127.0.0.1:0").await.unwrap().with_tls(tls).await.unwrap()
}

/// What a plain connection is told that says this.
async fn told(address: SocketAddr, said: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(said).await.unwrap();
    let mut told = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut told)).await.expect("it ends");
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_speak_tls_and_those_that_do_not_are_told_so() {
    let (certificates, others) = (Certificates::new(), Certificates::new());
    let dir = tempfile::tempdir().unwrap();
    let server = served(certificates.port(ClientCertificates::Optional)).await;
    with_server(dir.path(), server, async |address| {
        let at = address.to_string();
        for tls in [certificates.anonymous(), certificates.client()] {
            assert_eq!(put(&client(&at, Some(tls))).await, Ok(()));
        }
        let localhost = format!("localhost:{}", address.port());
        assert_eq!(put(&client(&localhost, Some(certificates.anonymous()))).await, Ok(()));
        // Plain.
        let error = put(&client(&at, None)).await.unwrap_err();
        assert!(error.contains("this port speaks TLS"), "{error}");
        let answer =
            String::from_utf8(told(address, b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n").await).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("https://"), "{answer}");
        // Whom it does not believe, and what it does not expect.
        let error = put(&client(&at, Some(others.anonymous()))).await.unwrap_err();
        assert!(error.contains("no authority in --tls-ca has signed"), "{error}");
        let elsewhere = certificates.anonymous().expecting("elsewhere.example").unwrap();
        let error = put(&client(&at, Some(elsewhere))).await.unwrap_err();
        assert!(error.contains("does not name"), "{error}");
        let named = certificates.anonymous().expecting("localhost").unwrap();
        assert_eq!(put(&client(&at, Some(named))).await, Ok(()));
        // A certificate that nobody here has signed.
        let ca = std::fs::read(certificates.path("ca.pem")).unwrap();
        let [shown, key] = ["app.pem", "app.key"].map(|name| std::fs::read(others.path(name)).unwrap());
        let stranger = ClientTls::from_pem(&ca, Some((&shown, &key))).unwrap();
        put(&client(&at, Some(stranger))).await.unwrap_err();
    })
    .await;
    with_node(dir.path(), async |address| {
        let error = put(&client(&address.to_string(), Some(certificates.anonymous()))).await.unwrap_err();
        assert!(
            error.contains("this port does not speak TLS") || error.contains("may not speak TLS"),
            "{error}"
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_must_show_a_certificate_is_let_in_with_one() {
    let certificates = Certificates::new();
    let dir = tempfile::tempdir().unwrap();
    let server = served(certificates.port(ClientCertificates::Required)).await;
    with_server(dir.path(), server, async |address| {
        let at = address.to_string();
        assert_eq!(put(&client(&at, Some(certificates.client()))).await, Ok(()));
        let error = put(&client(&at, Some(certificates.anonymous()))).await.unwrap_err();
        assert!(error.contains("certificate") || error.contains("Certificate"), "{error}");
    })
    .await;
}

async fn https(
    certificates: &Certificates,
    address: SocketAddr,
) -> (CertificateDer<'static>, tokio_rustls::client::TlsStream<TcpStream>) {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(certificates.path("ca.pem")).unwrap()).unwrap();
    let shown = CertificateDer::from_pem_file(certificates.path("app.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(certificates.path("app.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![shown], key)
        .unwrap();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let shown = stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned();
    (shown, stream)
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_served_by_https_and_new_certificates_are_taken_up_while_it_runs() {
    let certificates = Certificates::new();
    let dir = tempfile::tempdir().unwrap();
    let server = served(certificates.port(ClientCertificates::Optional)).await;
    with_server(dir.path(), server, async |address| {
        let (first, mut stream) = https(&certificates, address).await;
        let ask = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n";
        stream.write_all(ask).await.unwrap();
        let mut page = Vec::new();
        let _ = stream.read_to_end(&mut page).await;
        let page = String::from_utf8(page).unwrap();
        assert!(page.starts_with("HTTP/1.1 200"), "{page}");
        assert!(page.contains("quorate_server_handshakes_failed_total 0"), "{page}");
        assert!(page.contains("quorate_server_certificate_expires_seconds 3"), "a year: {page}");
        certificates.make(&["node", "1"]);
        let taken_up = async {
            while https(&certificates, address).await.0 == first {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(DEADLINE, taken_up).await.expect("within ten seconds");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_speaks_frames_without_tls_is_told_so_in_a_frame() {
    let certificates = Certificates::new();
    let dir = tempfile::tempdir().unwrap();
    let server = served(certificates.port(ClientCertificates::Optional))
        .await
        .with_frames("127.0.0.1:0")
        .await
        .unwrap();
    let frames = server.frames_addr().unwrap();
    with_server(dir.path(), server, async |_| {
        let answer = told(frames, &[0, 0, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]).await;
        assert!(String::from_utf8_lossy(&answer).contains("this port speaks TLS"), "{answer:?}");
        // Half a handshake ends by itself.
        let answer = told(frames, &[0x16, 3, 1, 0, 5]).await;
        assert!(answer.len() <= 16, "{answer:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_follows_and_passes_on_by_tls() {
    let certificates = Certificates::new();
    let (dir, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = served(certificates.port(ClientCertificates::Required)).await;
    with_server(dir.path(), server, async |address| {
        assert_eq!(put(&client(&address.to_string(), Some(certificates.client()))).await, Ok(()));
        let paths = ["ca.pem", "node-1.pem", "node-1.key"].map(|name| certificates.path(name));
        let [ca, certificate, key] = paths.each_ref().map(|path| path.to_str().unwrap());
        let tls = ["--tls-ca", ca, "--tls-cert", certificate, "--tls-key", key, "--forward-writes"];
        let replica = ReplicaProcess::of(&[address], own.path(), &tls);
        let through = client(&replica.address.to_string(), Some(certificates.anonymous()));
        let written = async {
            while put(&through).await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(DEADLINE, written).await.expect("it is passed on");
        // Its own port speaks TLS, too.
        let error = put(&client(&replica.address.to_string(), None)).await.unwrap_err();
        assert!(error.contains("this port speaks TLS"), "{error}");
    })
    .await;
}

/// Runs a command while what it talks to is served.
async fn cli(args: &[&str]) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
    command.args(args).stdin(Stdio::null());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("QUORATE_")) {
        command.env_remove(name);
    }
    quorate::testkit::runtime::offload(move || command.output().unwrap()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_take_certificates() {
    let certificates = Certificates::new();
    let dir = tempfile::tempdir().unwrap();
    let server = served(certificates.port(ClientCertificates::Optional)).await;
    with_server(dir.path(), server, async |address| {
        let at = address.to_string();
        let path = |name: &str| certificates.path(name).to_str().unwrap().to_owned();
        let (ca, shown, key) = (path("ca.pem"), path("app.pem"), path("app.key"));
        for tls in [&["--tls-ca", &ca][..], &["--tls-ca", &ca, "--tls-cert", &shown, "--tls-key", &key]] {
            for command in [&["put", "k", "v"][..], &["get", "k"], &["status"]] {
                let done = cli(&[command, &["--endpoints", &at], tls].concat()).await;
                assert!(done.status.success(), "{command:?} {tls:?}: {done:?}");
            }
        }
        let plain = cli(&["get", "k", "--endpoints", &at]).await;
        assert!(String::from_utf8_lossy(&plain.stderr).contains("this port speaks TLS"), "{plain:?}");
        for tls in [&["--tls-cert", &shown, "--tls-key", &key][..], &["--tls-ca", &ca, "--tls-key", &key]] {
            let refused = cli(&[&["get", "k", "--endpoints", &at], tls].concat()).await;
            assert_eq!(refused.status.code(), Some(3), "{refused:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_port_with_files_that_do_not_go_together_is_not_opened() {
    let certificates = Certificates::new();
    let path = |name: &str| certificates.path(name).to_str().unwrap().to_owned();
    let data = tempfile::tempdir().unwrap();
    let dir = data.path().to_str().unwrap();
    let ports = ["--client-listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0", "--data-dir", dir];
    let start = async |args: &[&str]| cli(&[&["serve", "--single"], &ports[..], args].concat()).await;
    for (args, said) in [
        (&["--tls-cert", &*path("node-1.pem")][..], "give --tls-key, too"),
        (&["--tls-client-ca", &path("ca.pem")], "give --tls-cert and --tls-key, too"),
        (&["--tls-cert", &path("node-1.pem"), "--tls-key", &path("app.key")], "does not fit"),
        (&["--tls-cert", &path("node-1.pem"), "--tls-key", &path("none")], "cannot read --tls-key"),
    ] {
        let refused = start(args).await;
        assert_eq!(refused.status.code(), Some(3), "{refused:?}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains(said), "{refused:?}");
    }
}

/// A verified name stands for what the file of tokens grants to it; a token goes before it, and nothing shown is nothing granted.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_in_a_certificate_may_do_what_is_granted_to_it() {
    let certificates = Certificates::new();
    certificates.make(&["client", "other"]);
    let server = served(certificates.port(ClientCertificates::Optional)).await;
    let more =
        "[[certificate]]\nname = \"app\"\ngrants = [{ tenant = \"acme\", rights = [\"read\", \"write\"] }]\n";
    rights::guarded_at(server, &[rights::root()], more, async |address, _| {
        let at = address.to_string();
        let write = async |tls: ClientTls, token: Option<&str>, tenant: &str| {
            let mut config = ClientConfig::default();
            (config.tls, config.unavailable_after) = (Some(tls), Duration::ZERO);
            config.token = token.map(|token| Token::new(token).unwrap());
            let client = Client::new([at.as_str()], config).unwrap();
            let scope = Scope { tenant: tenant.to_owned(), collection: String::new() };
            client.put(&scope, "k", "v").await.map(drop).map_err(|error| error.reason())
        };
        let named = |name: &str| {
            let [certificate, key] = ["pem", "key"].map(|end| certificates.path(&format!("{name}.{end}")));
            ClientTls::with_certificate(certificates.path("ca.pem"), certificate, key).unwrap()
        };
        assert_eq!(write(named("app"), None, "acme").await, Ok(()));
        assert_eq!(write(named("app"), None, "other").await, Err(Reason::PermissionDenied));
        for tls in [named("other"), certificates.anonymous()] {
            assert_eq!(write(tls, None, "acme").await, Err(Reason::Unauthenticated));
        }
        let root = rights::root().secret();
        assert_eq!(write(named("other"), Some(&root), "other").await, Ok(()));
        assert_eq!(write(named("app"), Some("wrong"), "acme").await, Err(Reason::Unauthenticated));
    })
    .await;
}
