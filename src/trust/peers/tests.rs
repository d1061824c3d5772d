use std::path::Path;

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, date_time_ymd};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, duplex};

use super::super::HANDSHAKE_BYTES;
use super::super::issue::{Authority, Issued, authority};
use super::super::settings::PeerSecret;
use super::*;

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Credentials in a directory.
struct Credentials {
    dir: TempDir,
    made: Issued,
}

impl Credentials {
    fn new() -> Self {
        let made = authority("an authority", 10).unwrap();
        let this = Self { dir: tempfile::tempdir().unwrap(), made };
        this.write("ca.pem", &this.made.certificate);
        this
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn authority(&self) -> Authority {
        Authority::read(&self.made.certificate, &self.made.key).unwrap()
    }

    fn put(&self, name: &str, issued: &Issued) {
        self.write(&format!("{name}.pem"), &issued.certificate);
        self.write(&format!("{name}.key"), &issued.key);
    }

    /// What node `node_id` of cluster "c" is told, with a certificate of its own.
    fn node(&self, node_id: NodeId) -> PeerTrust {
        self.put(&format!("node-{node_id}"), &self.authority().node("c", node_id, &[], 10).unwrap());
        self.with(&format!("node-{node_id}"))
    }

    fn with(&self, name: &str) -> PeerTrust {
        let path = |file: String| self.dir.path().join(file);
        PeerTrust::certificates(
            path("ca.pem".to_owned()),
            path(format!("{name}.pem")),
            path(format!("{name}.key")),
        )
    }
}

async fn node(trust: &PeerTrust, node_id: NodeId) -> Arc<PeerAuthenticator> {
    PeerAuthenticator::open(trust, "c", node_id).await.unwrap().unwrap()
}

fn optional(trust: PeerTrust) -> PeerTrust {
    PeerTrust { auth: Some(PeerAuth::Optional), ..trust }
}

fn by_secret(secret: &str) -> PeerTrust {
    PeerTrust::secret(PeerSecret::new(secret))
}

/// What a dial and the connection that it met came to, after a word in each direction.
struct Met {
    dialled: io::Result<Proven>,
    accepted: Option<Proven>,
    /// Both ends of the connection.
    wires: Vec<Box<dyn Wire>>,
}

/// Dials `callee` as `caller`.
async fn meet(caller: &PeerAuthenticator, callee: &Arc<PeerAuthenticator>, wanted: Option<NodeId>) -> Met {
    let (near, far) = duplex(64 * 1024);
    let near = Mutex::new(Some(near));
    let connect = || {
        let wire = near.lock().unwrap().take().ok_or(io::ErrorKind::ConnectionRefused);
        async move { Ok(Box::new(wire?) as Box<dyn Wire>) }
    };
    let (mut accepted, proof) = callee.accepting(Box::new(far));
    let dials = async {
        let (mut wire, proven) = caller.dial(connect, wanted).await?;
        wire.write_all(b"hello").await?;
        wire.flush().await?;
        let mut answer = [0; 5];
        wire.read_exact(&mut answer).await?;
        io::Result::Ok((wire, proven))
    };
    let accepts = async {
        let mut heard = [0; 5];
        accepted.read_exact(&mut heard).await?;
        accepted.write_all(&heard).await?;
        accepted.flush().await?;
        io::Result::Ok(accepted)
    };
    let (dialled, accepted) = tokio::join!(dials, accepts);
    let mut wires: Vec<Box<dyn Wire>> = accepted.into_iter().collect();
    let dialled = dialled.map(|(wire, proven)| {
        wires.push(wire);
        proven
    });
    Met { dialled, accepted: proof.proven().cloned(), wires }
}

/// What comes of a dial that is not to succeed: what the caller is told. The other end has heard nothing.
async fn fails(
    caller: &PeerAuthenticator,
    callee: &Arc<PeerAuthenticator>,
    wanted: Option<NodeId>,
) -> String {
    let met = meet(caller, callee, wanted).await;
    let told = met.dialled.expect_err("it must not succeed").to_string();
    assert!(met.wires.is_empty(), "what was said was heard: {told}");
    told
}

/// Files are believed at the second look.
fn looked(authenticator: &PeerAuthenticator) -> Result<(), TrustError> {
    authenticator.look()?;
    let looked = authenticator.look();
    authenticator.judge_again();
    looked
}

#[tokio::test]
async fn members_with_certificates_know_each_other_by_name() {
    let credentials = Credentials::new();
    let (one, two) = (node(&credentials.node(1), 1).await, node(&credentials.node(2), 2).await);
    for wanted in [Some(2), None] {
        let met = meet(&one, &two, wanted).await;
        let dialled = met.dialled.unwrap();
        assert!(may_speak_for(Some(&dialled), "c", 2) && !may_speak_for(Some(&dialled), "c", 1));
        assert!(
            may_speak_for(met.accepted.as_ref(), "c", 1) && !may_speak_for(met.accepted.as_ref(), "c", 2)
        );
        assert!(!may_speak_for(met.accepted.as_ref(), "d", 1), "another cluster's member of that id");
    }
    let told = fails(&one, &two, Some(3)).await;
    assert!(told.contains("not that of node 3 but of node 2"), "{told}");
    assert_eq!(two.handshakes().failed(), 1, "the caller went before it was let in");
}

#[tokio::test]
async fn those_whom_no_authority_vouches_for_are_told_nothing_and_say_nothing() {
    let (ours, others) = (Credentials::new(), Credentials::new());
    let callee = node(&ours.node(1), 1).await;
    let told = fails(&*node(&others.node(2), 2).await, &callee, Some(1)).await;
    assert!(told.contains("no authority in --peer-ca"), "{told}");
    // One that believes our authority, and was signed by another: the other end refuses it, at the dial.
    let mixed = PeerTrust { ca: ours.node(2).ca, ..others.node(2) };
    let told = fails(&*node(&mixed, 2).await, &callee, Some(1)).await;
    assert!(told.contains("does not accept this node's certificate"), "{told}");
    assert_eq!(callee.handshakes().failed(), 2);
}

#[tokio::test]
async fn a_clients_certificate_and_one_that_has_expired_make_no_member() {
    let credentials = Credentials::new();
    let callee = node(&credentials.node(1), 1).await;
    // By way of a member that presents them: it would not do that by itself.
    let caller = node(&credentials.node(2), 2).await;
    let stranger = credentials.authority().client("app", 1).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![ClusterLabel::of("c").name_of(2)]).unwrap();
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2021, 1, 1);
    let signer = KeyPair::from_pem(&credentials.made.key).unwrap();
    let der =
        rustls::pki_types::pem::PemObject::from_pem_slice(credentials.made.certificate.as_bytes()).unwrap();
    let issuer = Issuer::from_ca_cert_der(&der, signer).unwrap();
    let expired = params.signed_by(&key, &issuer).unwrap().pem();
    let expired = Issued { certificate: expired, key: key.serialize_pem() };
    for (name, issued) in [("app", stranger), ("expired", expired)] {
        credentials.put(name, &issued);
        let shows = credentials.with(name);
        if name == "app" {
            let refused = PeerAuthenticator::open(&shows, "c", 2).await.unwrap_err().to_string();
            assert!(
                refused.contains("not the certificate of node 2") && refused.contains("app"),
                "{refused}"
            );
        }
        let material = presenting(&shows, &caller);
        let dialler = PeerAuthenticator { current: ArcSwap::from_pointee(material), ..bare(&caller) };
        let told = fails(&dialler, &callee, Some(1)).await;
        assert!(told.contains("ended the handshake") || told.contains("does not accept"), "{name}: {told}");
    }
    assert_eq!(callee.handshakes().failed(), 2);
}

/// What `like` has, but for what it presents.
fn presenting(trust: &PeerTrust, like: &PeerAuthenticator) -> PeerMaterial {
    let source = trust.source().unwrap().unwrap();
    let content = PeerMaterial::content(&source).unwrap();
    let text = |place: usize| super::super::pem::PemText {
        setting: "",
        path: Path::new(""),
        bytes: &content[place],
    };
    let certified = super::super::pem::certified(&text(1), &text(2)).unwrap();
    let current = like.current.load_full();
    let mut client = (*current.client).clone();
    client.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(certified));
    let Means::Certificates { accepted, dialled } = &current.means else { panic!("by certificates") };
    let means = Means::Certificates { accepted: accepted.clone(), dialled: dialled.clone() };
    PeerMaterial { server: current.server.clone(), client: Arc::new(client), means, expires_s: None, content }
}

fn bare(like: &PeerAuthenticator) -> PeerAuthenticator {
    PeerAuthenticator {
        source: like.source.clone(),
        own: like.own.clone(),
        is_optional: false,
        last_read: ArcSwap::default(),
        current: ArcSwap::new(like.current.load_full()),
        connections: Mutex::default(),
        handshakes: Arc::default(),
        judgements: AtomicU8::new(0),
        complained: Mutex::default(),
    }
}

#[tokio::test]
async fn members_with_one_secret_meet_and_others_do_not() {
    let (one, two) = (node(&by_secret(SECRET), 1).await, node(&by_secret(SECRET), 2).await);
    let met = meet(&one, &two, Some(2)).await;
    assert_eq!((met.dialled.unwrap(), met.accepted), (Proven::Secret, Some(Proven::Secret)));
    let told = fails(&*node(&by_secret("another secret, and long"), 3).await, &two, Some(2)).await;
    assert!(told.contains("does not accept this node's peer secret"), "{told}");
    let elsewhere = PeerAuthenticator::open(&by_secret(SECRET), "d", 3).await.unwrap().unwrap();
    fails(&elsewhere, &two, Some(2)).await;
    let credentials = Credentials::new();
    let told = fails(&*node(&credentials.node(3), 3).await, &two, Some(2)).await;
    assert!(told.contains("proves itself in another way"), "{told}");
    assert_eq!(two.handshakes().failed(), 3);
}

/// Says `words` to a port, and hears what it answers until it ends the connection.
async fn stranger(callee: &Arc<PeerAuthenticator>, words: &[u8]) -> (Vec<u8>, io::Error) {
    let (mut near, far) = duplex(64 * 1024);
    let (mut accepted, proof) = callee.accepting(Box::new(far));
    let says = async {
        // One that is not heard to the end is told so by a broken connection.
        let _ = near.write_all(words).await;
        let mut told = Vec::new();
        let _ = near.read_to_end(&mut told).await;
        told
    };
    let hears = async {
        let mut heard = Vec::new();
        let error = accepted.read_to_end(&mut heard).await.unwrap_err();
        assert!(heard.is_empty() && proof.proven().is_none());
        drop(accepted);
        error
    };
    tokio::join!(says, hears)
}

#[tokio::test]
async fn a_stranger_learns_nothing_and_is_heard_for_a_few_bytes() {
    let credentials = Credentials::new();
    let by_certificate = node(&credentials.node(1), 1).await;
    let garbage: Vec<u8> = (0..64 * 1024_u32).map(|at| (at % 251) as u8).collect();
    // A first message that TLS itself would wait for, of which no end comes.
    let record = |content: &[u8]| [&[0x16, 3, 1, 0x40, 0][..], content].concat();
    let first = [&[1, 0, 0xff, 0xff][..], &[0; 16 * 1024 - 4]].concat();
    let endless = [record(&first), record(&[0; 16 * 1024])].concat();
    for callee in [by_certificate, node(&by_secret(SECRET), 1).await] {
        for words in [PREFACE, &garbage, &endless] {
            let (told, error) = stranger(&callee, words).await;
            assert!(told.len() <= 16, "no more than an alert: {told:?}");
            let is_cut = error.to_string().contains("longer than any");
            assert_eq!(is_cut, words == endless, "{error}");
        }
        assert_eq!(callee.handshakes().failed(), 3);
    }
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_is_not_gone_on_with_ends() {
    let callee = node(&by_secret(SECRET), 1).await;
    for begun in [&b""[..], &[0x16, 3, 1]] {
        let (mut near, far) = duplex(1024);
        near.write_all(begun).await.unwrap();
        let (mut accepted, _) = callee.accepting(Box::new(far));
        let started = Instant::now();
        let error = accepted.read_u8().await.unwrap_err();
        assert_eq!((error.kind(), started.elapsed()), (io::ErrorKind::TimedOut, HANDSHAKE_PATIENCE));
        assert!(accepted.write_u8(1).await.is_err());
    }
    assert_eq!(callee.handshakes().failed(), 2);
}

/// One that writes first waits for the handshake, too, and both directions may be in tasks of their own.
#[tokio::test]
async fn whoever_is_first_drives_the_handshake() {
    let (one, two) = (node(&by_secret(SECRET), 1).await, node(&by_secret(SECRET), 2).await);
    let (near, far) = duplex(1024);
    let (accepted, _) = two.accepting(Box::new(far));
    let (mut from, mut to) = tokio::io::split(accepted);
    let writes = async {
        to.write_all(b"from two").await.unwrap();
        to.flush().await.unwrap();
    };
    let reads = async {
        let mut heard = [0; 8];
        from.read_exact(&mut heard).await.unwrap();
        heard
    };
    let near = Mutex::new(Some(near));
    let dials = async {
        let connect = || {
            let wire: Box<dyn Wire> = Box::new(near.lock().unwrap().take().unwrap());
            async { Ok(wire) }
        };
        let (mut wire, _) = one.dial(connect, Some(2)).await.unwrap();
        wire.write_all(b"from one").await.unwrap();
        wire.flush().await.unwrap();
        let mut heard = [0; 8];
        wire.read_exact(&mut heard).await.unwrap();
        heard
    };
    let ((), heard, told) = tokio::join!(writes, reads, dials);
    assert_eq!((&heard, &told), (b"from one", b"from two"));
}

#[tokio::test]
async fn while_it_is_optional_plain_connections_are_taken_and_made() {
    let callee = node(&optional(by_secret(SECRET)), 1).await;
    let (mut near, far) = duplex(1024);
    let (mut accepted, proof) = callee.accepting(Box::new(far));
    near.write_all(PREFACE).await.unwrap();
    let mut heard = [0; 24];
    accepted.read_exact(&mut heard).await.unwrap();
    assert_eq!((&heard[..], proof.proven()), (PREFACE, Some(&Proven::Plain)));
    assert!(may_speak_for(proof.proven(), "c", 7));
    // Secured where that can be had.
    let caller = node(&optional(by_secret(SECRET)), 2).await;
    assert_eq!(meet(&caller, &callee, Some(1)).await.dialled.unwrap(), Proven::Secret);
    // And plain where what answers does not know TLS.
    let far_ends = Mutex::new(Vec::new());
    let connect = || {
        let (near, mut far) = duplex(1024);
        let is_first = far_ends.lock().unwrap().is_empty();
        async move {
            if is_first {
                far.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await?;
            }
            io::Result::Ok((Box::new(near) as Box<dyn Wire>, far))
        }
    };
    let connect = || {
        let made = connect();
        let far_ends = &far_ends;
        async move {
            let (wire, far) = made.await?;
            far_ends.lock().unwrap().push(far);
            io::Result::Ok(wire)
        }
    };
    let (_, proven) = caller.dial(connect, Some(1)).await.unwrap();
    assert_eq!((proven, far_ends.lock().unwrap().len()), (Proven::Plain, 2));
    assert_eq!((callee.handshakes().plain(), caller.handshakes().plain()), (1, 1));
}

fn is_open(wire: &mut Box<dyn Wire>) -> bool {
    let waker = futures::task::noop_waker();
    let mut cx = std::task::Context::from_waker(&waker);
    let mut bytes = [0];
    let polled = std::pin::Pin::new(wire).poll_read(&mut cx, &mut tokio::io::ReadBuf::new(&mut bytes));
    polled.is_pending()
}

#[tokio::test]
async fn an_authority_takes_the_place_of_another_and_what_it_vouched_for_ends() {
    let (old, new) = (Credentials::new(), Credentials::new());
    let (trust_one, trust_two) = (old.node(1), old.node(2));
    let (one, two) = (node(&trust_one, 1).await, node(&trust_two, 2).await);
    let mut before = meet(&one, &two, Some(2)).await;
    // Both in force: certificates of either are believed.
    old.write("ca.pem", &format!("{}{}", old.made.certificate, new.made.certificate));
    old.put("node-2", &new.authority().node("c", 2, &[], 10).unwrap());
    for authenticator in [&one, &two] {
        looked(authenticator).unwrap();
    }
    let mut between = meet(&one, &two, Some(2)).await;
    assert!(between.dialled.is_ok());
    assert!(before.wires.iter_mut().all(is_open), "nothing ended");
    // Only the new one: what stands on the old one ends, at both ends.
    old.write("ca.pem", &new.made.certificate);
    old.put("node-1", &new.authority().node("c", 1, &[], 10).unwrap());
    for authenticator in [&one, &two] {
        looked(authenticator).unwrap();
    }
    for wire in &mut before.wires {
        let read = timeout(HANDSHAKE_PATIENCE, wire.read_u8()).await.expect("it ends");
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(wire.write_u8(1).await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }
    // At its caller, whose certificate was of the old one, and at no other.
    assert_eq!(between.wires.iter_mut().map(is_open).collect::<Vec<_>>(), [false, true]);
    assert!(meet(&one, &two, Some(2)).await.dialled.is_ok());
}

#[tokio::test]
async fn files_that_cannot_be_used_change_nothing() {
    let credentials = Credentials::new();
    let (one, two) = (node(&credentials.node(1), 1).await, node(&credentials.node(2), 2).await);
    let first = credentials.authority().node("c", 1, &[], 10).unwrap();
    for (file, text) in [
        ("node-1.key", first.key.as_str()),
        ("node-1.pem", "no certificate"),
        ("ca.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        ("ca.pem", ""),
    ] {
        let path = credentials.dir.path().join(file);
        let good = std::fs::read(&path).unwrap();
        std::fs::write(&path, text).unwrap();
        assert!(looked(&one).unwrap_err().to_string().contains(file), "{file}");
        assert!(meet(&one, &two, Some(2)).await.dialled.is_ok(), "{file}");
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(looked(&one), Err(TrustError::Unreadable { .. })));
        std::fs::write(&path, good).unwrap();
        looked(&one).unwrap();
    }
    // A certificate of another node is none for this one.
    credentials.put("node-1", &credentials.authority().node("c", 3, &[], 10).unwrap());
    assert!(looked(&one).unwrap_err().to_string().contains("not the certificate of node 1"));
}

#[tokio::test]
async fn a_secret_takes_the_place_of_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = |node: u8| dir.path().join(format!("secret-{node}"));
    let write = |node: u8, lines: &[&str]| std::fs::write(path(node), lines.join("\n")).unwrap();
    let (old, new) = (SECRET, "fedcba9876543210fedcba9876543210");
    let mut nodes = Vec::new();
    for node_id in [1, 2] {
        write(node_id, &[old]);
        nodes.push(node(&PeerTrust::secret_file(path(node_id)), node_id.into()).await);
    }
    let mut first = meet(&nodes[0], &nodes[1], Some(2)).await;
    for (node_id, lines) in [(1, &[old, new][..]), (2, &[old, new]), (1, &[new, old]), (2, &[new])] {
        write(node_id, lines);
        looked(&nodes[usize::from(node_id) - 1]).unwrap();
        // At the last step the old one is proven by nobody any more.
        for (caller, callee) in [(0, 1), (1, 0)] {
            let met = meet(&nodes[caller], &nodes[callee], None).await;
            assert!(met.dialled.is_ok(), "node {node_id} has {lines:?}");
        }
    }
    // At node 2 the old one is out of force, and at node 1 it is not yet.
    assert_eq!(first.wires.iter_mut().map(is_open).collect::<Vec<_>>(), [false, true]);
    write(1, &[new]);
    looked(&nodes[0]).unwrap();
    assert_eq!(first.wires.iter_mut().map(is_open).collect::<Vec<_>>(), [false, false]);
    write(1, &["short"]);
    assert!(looked(&nodes[0]).unwrap_err().to_string().contains("16 to 1024"));
}

/// A connection that carries what is read of another one: whoever stands between two members.
async fn relay(mut one: impl AsyncRead + AsyncWrite + Unpin, mut other: impl AsyncRead + AsyncWrite + Unpin) {
    let _ = tokio::io::copy_bidirectional(&mut one, &mut other).await;
}

/// It ends TLS itself, as members believe any certificate when they have a secret, and passes on what is said inside.
#[tokio::test]
async fn who_stands_between_two_members_learns_and_proves_nothing() {
    let (one, two) = (node(&by_secret(SECRET), 1).await, node(&by_secret(SECRET), 2).await);
    let between = node(&by_secret("whatever the stranger has"), 9).await;
    let material = between.current.load_full();
    let (near, far) = duplex(64 * 1024);
    let (near_two, far_two) = duplex(64 * 1024);
    let (mut accepted, proof) = two.accepting(Box::new(far_two));
    let passes_on = async {
        let to_one = TlsAcceptor::from(material.server.clone()).accept(far).await.unwrap();
        let name = ServerName::try_from("peer.quorate").unwrap();
        let to_two = TlsConnector::from(material.client.clone()).connect(name, near_two).await.unwrap();
        relay(to_one, to_two).await;
    };
    let near: Mutex<Option<DuplexStream>> = Mutex::new(Some(near));
    let connect = || {
        let wire: Box<dyn Wire> = Box::new(near.lock().unwrap().take().unwrap());
        async { Ok(wire) }
    };
    let accepts = async {
        let error = accepted.read_u8().await.unwrap_err();
        drop(accepted);
        error
    };
    let all = async { tokio::join!(one.dial(connect, Some(2)), accepts, passes_on) };
    let (dialled, refused, ()) = timeout(HANDSHAKE_PATIENCE * 4, all).await.expect("it ends");
    assert!(dialled.is_err() && proof.proven().is_none());
    assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn a_handshake_has_room_for_a_chain_and_little_more() {
    let chain: usize = 4 * 1024;
    assert!((chain * 4..chain * 8).contains(&HANDSHAKE_BYTES));
}
