//! Members prove to each other who they are, as processes: who comes to the peer port without, and how credentials change.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use quorate::testkit::proto::peer::peer_client::PeerClient;
use quorate::testkit::proto::peer::{Hello, IdentifyRequest, Request, request};
use quorate_cluster::{Cluster, ClusterSpec, Node};
use quorate_testkit::processes::set::Outcome;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::support::{
    DEADLINE, QUORATE, TestCluster, client, eventually, eventually_within, get, outcome, output, spec,
};

/// Files are looked at every ten seconds, and what they do not vouch for ends at the next look at the latest.
const LOOKED_AT: Duration = Duration::from_secs(60);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// What is spoken on a connection that certificates secure.
const BY_CERTIFICATE: &[u8] = b"quorate-peer-certificate-1";
const SECRET: &str = "0123456789abcdef0123456789abcdef";

fn cert(dir: &Path, args: &[&str]) {
    let mut command = Command::new(QUORATE);
    command.arg("cert").args(args).args(["--dir", dir.to_str().unwrap(), "--force"]);
    let done = outcome(command);
    assert!(done.status.success(), "{done:#?}");
}

/// An authority in `dir`, and certificates of nodes.
fn certificates(dir: &Path, spec: &ClusterSpec) {
    cert(dir, &["ca"]);
    for node_id in spec.node_ids() {
        node_certificate(dir, spec, node_id);
    }
}

fn node_certificate(dir: &Path, spec: &ClusterSpec, node_id: u64) {
    cert(dir, &["node", &node_id.to_string(), "--cluster", &spec.cluster]);
}

fn started(spec: ClusterSpec, dir: tempfile::TempDir) -> TestCluster {
    let cluster = Cluster::start(spec).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() }
}

/// Three nodes with certificates, in a directory `certs`.
fn with_certificates() -> TestCluster {
    let (mut spec, dir) = spec();
    let certs = dir.path().join("certs");
    certificates(&certs, &spec);
    spec.peer_credentials = Some(certs);
    started(spec, dir)
}

/// A number at `/metrics`.
fn metric(node: &Node, name: &str) -> Option<f64> {
    let (_, text) = get(node, "/metrics")?;
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

fn failed_handshakes(node: &Node) -> f64 {
    metric(node, "quorate_peer_handshakes_failed_total ").unwrap()
}

/// Believes whoever answers: a stranger does not care.
#[derive(Debug)]
struct Careless;

impl rustls::client::danger::ServerCertVerifier for Careless {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        unreachable!("TLS 1.3 alone")
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ED25519]
    }
}

/// What is shown to a node: a certificate and its key, and what is said to be spoken.
struct Shown<'a> {
    certificate: Option<(&'a Path, &'a str)>,
    protocol: &'a [u8],
}

async fn tls(node: &Node, shown: Shown<'_>) -> std::io::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Careless));
    let mut config = match shown.certificate {
        None => builder.with_no_client_auth(),
        Some((dir, name)) => {
            let certificate = CertificateDer::from_pem_file(dir.join(format!("{name}.pem"))).unwrap();
            let key = PrivateKeyDer::from_pem_file(dir.join(format!("{name}.key"))).unwrap();
            builder.with_client_auth_cert(vec![certificate], key).unwrap()
        }
    };
    config.alpn_protocols = vec![shown.protocol.to_vec()];
    let stream = TcpStream::connect(node.peer_address()).await?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// What is heard of a node that is to let nobody in: nothing that is more than an alert.
async fn is_shut(mut stream: TlsStream<TcpStream>) {
    let _ = stream.write_all(PREFACE).await;
    let mut told = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut told)).await.expect("it ends");
    assert!(told.is_empty(), "a stranger is told {told:?}");
}

fn incarnation(node: &Node) -> String {
    let text = std::fs::read_to_string(node.data_dir().join("identity.json")).unwrap();
    let identity: serde_json::Value = serde_json::from_str(&text).unwrap();
    identity["incarnation"].as_str().unwrap().to_owned()
}

/// All that node `from` would say to node `to`.
fn insider(nodes: &TestCluster, from: u64, to: u64) -> Hello {
    Hello {
        protocol_version: quorate::transport::PROTOCOL_VERSION,
        cluster: nodes.cluster.spec().cluster.clone(),
        from_node: from,
        from_incarnation: incarnation(nodes.node(from)),
        to_node: to,
        to_incarnation: incarnation(nodes.node(to)),
        membership: None,
        from_peer: String::new(),
    }
}

/// Calls of a stranger that has seen all disks, on a channel of its own: both are refused in the same way.
async fn is_refused(channel: Channel, hello: &Hello) {
    let mut peer = PeerClient::new(channel);
    let identify = IdentifyRequest { hello: Some(hello.clone()), ..IdentifyRequest::default() };
    let status = peer.identify(identify).await.unwrap_err();
    assert!(!format!("{status:?}").contains(&hello.to_incarnation), "{status:?}");
    let (requests, outgoing) = tokio::sync::mpsc::channel(4);
    requests.send(Request { id: 0, body: Some(request::Body::Hello(hello.clone())) }).await.unwrap();
    assert!(peer.exchange(ReceiverStream::new(outgoing)).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_at_a_secured_peer_port_learn_nothing_and_change_nothing() {
    let nodes = with_certificates();
    let certs = nodes.dir.path().join("certs");
    let others = nodes.dir.path().join("others");
    certificates(&others, nodes.cluster.spec());
    cert(&certs, &["client", "app"]);
    nodes.put("k", "1").await;
    let leader = nodes.leader(0).await;
    let (node, hello) = (nodes.node(1), insider(&nodes, 2, 1));
    let before = failed_handshakes(node);

    // Plain, with all that a member would say.
    let plain = Endpoint::from_shared(format!("http://{}", node.peer_address())).unwrap();
    is_refused(plain.connect_lazy(), &hello).await;
    // Half open, by the hundred, in the way of nobody. Some say a little, and all are gone in the end.
    let mut half_open = Vec::new();
    for number in 0..300_usize {
        let mut stream = TcpStream::connect(node.peer_address()).await.unwrap();
        let garbage = vec![0x16; number % 64];
        stream.write_all(&garbage).await.unwrap();
        half_open.push(stream);
    }
    // TLS, without a certificate, with that of another authority, and with that of a client.
    for certificate in [None, Some((&*others, "node-2")), Some((&*certs, "app"))] {
        for protocol in [BY_CERTIFICATE, b"h2", b"quorate-peer-secret-1"] {
            if let Ok(stream) = tls(node, Shown { certificate, protocol }).await {
                is_shut(stream).await;
            }
        }
    }
    // A member's certificate, and another member's name.
    let mut known =
        tls(node, Shown { certificate: Some((&certs, "node-3")), protocol: BY_CERTIFICATE }).await.unwrap();
    assert_eq!(known.read_u8().await.unwrap(), 1, "it is a member");
    let known = std::sync::Mutex::new(Some(known));
    let as_three = Endpoint::from_static("http://peer").connect_with_connector_lazy(tower(move || {
        known.lock().unwrap().take().ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected))
    }));
    let mut peer = PeerClient::new(as_three);
    let identify = IdentifyRequest { hello: Some(hello.clone()), ..IdentifyRequest::default() };
    assert_eq!(peer.identify(identify).await.unwrap_err().code(), Code::PermissionDenied);
    let own = IdentifyRequest { hello: Some(insider(&nodes, 3, 1)), ..IdentifyRequest::default() };
    assert_eq!(peer.identify(own).await.unwrap().into_inner().node_id, 1, "as itself it is answered");

    for mut stream in half_open {
        let mut told = Vec::new();
        let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut told)).await.expect("it ends");
        assert!(told.len() <= 16, "{told:?}");
    }
    assert!(failed_handshakes(node) >= before + 300.0);
    nodes.put("k", "2").await;
    let after = nodes.leader(0).await;
    assert_eq!((after.node_id, after.term), (leader.node_id, leader.term), "nobody was elected meanwhile");
    assert!(metric(node, "quorate_certificate_expires_seconds ").unwrap() > 360.0 * 24.0 * 3600.0);
    assert!(!output(node).contains("panicked"), "{}", node.log_tail(20));
}

/// A connector that gives what `make` makes.
fn tower<W, F>(
    make: F,
) -> impl tonic::codegen::Service<
    tonic::codegen::http::Uri,
    Response = hyper_util::rt::TokioIo<W>,
    Error = std::io::Error,
    Future = std::future::Ready<std::io::Result<hyper_util::rt::TokioIo<W>>>,
> + Send
+ 'static
where
    F: Fn() -> std::io::Result<W> + Send + 'static,
    W: Send + 'static,
{
    struct Made<F>(F);
    impl<F, W> tonic::codegen::Service<tonic::codegen::http::Uri> for Made<F>
    where
        F: Fn() -> std::io::Result<W>,
    {
        type Response = hyper_util::rt::TokioIo<W>;
        type Error = std::io::Error;
        type Future = std::future::Ready<std::io::Result<Self::Response>>;

        fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
            std::task::Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: tonic::codegen::http::Uri) -> Self::Future {
            std::future::ready((self.0)().map(hyper_util::rt::TokioIo::new))
        }
    }
    Made(make)
}

/// How often node `node` has read its credentials again.
fn reloads(node: &Node) -> usize {
    output(node).matches("peer credentials were read again").count()
}

async fn all_reload(nodes: &TestCluster, change: impl FnOnce()) {
    let before: Vec<_> = nodes.cluster.nodes().iter().map(reloads).collect();
    change();
    eventually_within(LOOKED_AT, "all have read their credentials again", async || {
        nodes.cluster.nodes().iter().zip(&before).all(|(node, before)| reloads(node) > *before)
    })
    .await;
}

#[ignore = "takes more than a minute"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn authority_and_certificates_change_under_load_without_a_call_that_fails() {
    let nodes = with_certificates();
    let (certs, new) = (nodes.dir.path().join("certs"), nodes.dir.path().join("new"));
    let spec = nodes.cluster.spec().clone();
    let writers = nodes.writers(4);
    let old_ca = std::fs::read_to_string(certs.join("ca.pem")).unwrap();
    cert(&new, &["ca"]);
    let new_ca = std::fs::read_to_string(new.join("ca.pem")).unwrap();
    let put = |name: &str, text: &str| {
        let part = certs.join("part");
        std::fs::write(&part, text).unwrap();
        std::fs::rename(part, certs.join(name)).unwrap();
    };
    // Both are believed; then all are signed by the new one; then the old one is not believed any more.
    all_reload(&nodes, || put("ca.pem", &format!("{old_ca}{new_ca}"))).await;
    all_reload(&nodes, || {
        for node_id in spec.node_ids() {
            node_certificate(&new, &spec, node_id);
            for kind in ["pem", "key"] {
                let name = format!("node-{node_id}.{kind}");
                put(&name, &std::fs::read_to_string(new.join(&name)).unwrap());
            }
        }
    })
    .await;
    all_reload(&nodes, || put("ca.pem", &new_ca)).await;
    // Connections that stood on the old one have ended by themselves.
    eventually_within(LOOKED_AT, "what the old authority vouched for has ended", async || {
        nodes.cluster.nodes().iter().any(|node| output(node).contains("vouch for no longer"))
    })
    .await;
    let attempts = writers.finish().await;
    nodes.check(&attempts).await;
    let failed: Vec<_> =
        attempts.iter().filter(|attempt| !matches!(attempt.outcome, Outcome::Acknowledged { .. })).collect();
    assert!(failed.is_empty() && attempts.len() > 100, "{} of {}: {failed:?}", failed.len(), attempts.len());
    for node in nodes.cluster.nodes() {
        assert_eq!(metric(node, "quorate_peer_connections_plain_total "), Some(0.0));
    }
}

/// Starts a node again with other credentials than the cluster was started with.
async fn restart_with(nodes: &TestCluster, node_id: u64, args: &[&str]) {
    let node = nodes.node(node_id);
    node.stop(DEADLINE).unwrap();
    node.start_with(args).unwrap();
    node.wait_ready(DEADLINE).unwrap();
    eventually("it is caught up", async || nodes.status(node_id).await.is_some_and(|status| status.ready))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_changes_over_to_a_secret_while_it_is_written_to() {
    let (spec, dir) = spec();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, SECRET).unwrap();
    let secret = secret.to_str().unwrap();
    let nodes = started(spec, dir);
    let writers = nodes.writers(2);
    for auth in ["optional", "required"] {
        for node_id in 1..=3 {
            restart_with(&nodes, node_id, &["--peer-secret-file", secret, "--peer-auth", auth]).await;
        }
    }
    for node in nodes.cluster.nodes() {
        assert!(metric(node, "quorate_peer_connections_plain_total ").is_some(), "it has credentials");
    }
    let attempts = writers.finish().await;
    nodes.check(&attempts).await;
    let acknowledged =
        attempts.iter().filter(|attempt| matches!(attempt.outcome, Outcome::Acknowledged { .. })).count();
    assert!(acknowledged > 100, "{acknowledged} of {}", attempts.len());
    // One that comes back without finds nobody who talks to it, and the others go on.
    let leader = nodes.leader(0).await;
    let lost = (1..=3).find(|id| *id != leader.node_id).unwrap();
    nodes.node(lost).stop(DEADLINE).unwrap();
    nodes.node(lost).start().unwrap();
    nodes.put("k", "v").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!nodes.node(lost).is_ready(), "it is no member without the secret");
    let after = nodes.leader(0).await;
    assert_eq!((after.node_id, after.term), (leader.node_id, leader.term));
    restart_with(&nodes, lost, &["--peer-secret-file", secret]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_on_the_command_line_does_not_stay_there() {
    let (mut spec, dir) = spec();
    spec.extra_args = ["--peer-secret", SECRET].map(Into::into).into();
    let nodes = started(spec, dir);
    nodes.put("k", "v").await;
    for node in nodes.cluster.nodes() {
        // The process that was started is the one that runs.
        let pid = node.pid().unwrap();
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        let arguments = String::from_utf8_lossy(&arguments).into_owned();
        assert!(arguments.contains("--node-id") && !arguments.contains(SECRET), "{arguments:?}");
        assert!(!output(node).contains(SECRET));
        let (_, settings) = get(node, "/replication/configure").unwrap();
        assert!(!settings.contains(SECRET), "{settings}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_cannot_prove_themselves_say_why_and_do_not_start() {
    let (spec, dir) = spec();
    let certs = dir.path().join("certs");
    certificates(&certs, &spec);
    let path = |name: &str| certs.join(name).to_str().unwrap().to_owned();
    let start = |args: &[&str]| {
        let mut command = spec.command(1);
        command.args(args);
        outcome(command)
    };
    let (ca, two, key) = (path("ca.pem"), path("node-2.pem"), path("node-2.key"));
    let wrong = start(&["--peer-ca", &ca, "--peer-cert", &two, "--peer-key", &key]);
    wrong.assert_refused(3, &["not the certificate of node 1", "node-1.", "quorate cert node"]);
    let mixed = start(&["--peer-ca", &ca, "--peer-cert", &two, "--peer-key", &path("node-1.key")]);
    mixed.assert_refused(3, &["--peer-key", "does not fit"]);
    start(&["--peer-ca", &ca]).assert_refused(3, &["give --peer-cert and --peer-key, too"]);
    start(&["--peer-ca", &ca, "--peer-secret", SECRET]).assert_refused(3, &["leave one of them out"]);
    start(&["--peer-secret", "short"]).assert_refused(3, &["16 to 1024 bytes"]);
    start(&["--peer-auth", "required"]).assert_refused(3, &["--peer-auth needs"]);
}
