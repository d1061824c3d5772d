//! Writes at level `all` while one of three voters is not there: what came of them is told with the error, whichever way they went.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use futures::future::join_all;
use quorate::client::{Client, ClientConfig, ClientError, MachineClient, WriteOptions as ClientOptions};
use quorate::kv::Kv;
use quorate::kv::client::{self as keys, Compare, Scope, Txn, TxnOp};
use quorate::kv::machine::{KvCommand, KvMachine, KvReply};
use quorate::server::{Guest, MachineGuest, Server};
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::tagged_request::Request;
use quorate::testkit::proto::v1::tagged_response::Response;
use quorate::testkit::proto::v1::{
    self, Failure, PipelineRequest, PutRequest, PutResponse, TaggedRequest, TxnGet, TxnOperation, TxnRequest,
};
use quorate::{
    AckLevel, Acknowledged, Composed, Either, Engine, EngineConfig, Reason, Role, WriteError, WriteOptions,
};
use tokio::sync::watch;
use tonic::{Code, Status};

use crate::machine_guest::{Change, Sum};
use crate::{DEADLINE, channel};

/// For how long the voter that is not there is waited for.
const ACK_TIMEOUT: Duration = Duration::from_millis(100);

fn options() -> WriteOptions {
    WriteOptions { ack: AckLevel::All, ack_timeout: ACK_TIMEOUT, ..WriteOptions::default() }
}

/// Three nodes, of which one follower is gone: runs `test` with the leader, its client port, and the other follower.
async fn two_of_three<G: Guest>(
    dir: &Path,
    machine: impl Fn() -> G::Machine,
    bind: impl AsyncFn() -> Server<G>,
    test: impl AsyncFnOnce(&Engine<G::Machine>, SocketAddr, &Engine<G::Machine>),
) {
    let listeners: Vec<_> = (0..3).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let peer = |listener: &std::net::TcpListener| listener.local_addr().unwrap().to_string();
    let peers: std::collections::BTreeMap<_, _> = (1..).zip(listeners.iter().map(peer)).collect();
    let (mut nodes, mut servers) = (Vec::new(), Vec::new());
    for (id, listener) in (1..).zip(listeners) {
        let server = bind().await;
        let mut config = EngineConfig::new(id, dir.join(id.to_string()), peers[&id].clone());
        (config.peer_listener, config.initial_members) = (Some(listener), peers.clone());
        config.client_advertise = server.local_addr().to_string();
        nodes.push((Engine::open(config, machine()).await.unwrap(), server.local_addr()));
        servers.push(server);
    }
    for (engine, _) in &nodes {
        assert!(engine.ready(DEADLINE).await);
    }
    let (stop, stopped) = watch::channel(false);
    let serving = join_all(servers.into_iter().zip(&nodes).map(|(server, (engine, _))| {
        let mut stopped = stopped.clone();
        server.serve(engine.clone(), async move { drop(stopped.wait_for(|stopped| *stopped).await) })
    }));
    let testing = async {
        let leads = |engine: &Engine<G::Machine>| engine.state().role == Role::Leader;
        let (leader, at) = nodes.iter().find(|(engine, _)| leads(engine)).unwrap();
        let (follower, _) = nodes.iter().find(|(engine, _)| !leads(engine)).unwrap();
        let (gone, _) = nodes.iter().rfind(|(engine, _)| !leads(engine)).unwrap();
        gone.shutdown().await;
        test(leader, *at, follower).await;
        assert!(leads(leader), "the test is about one leader");
        stop.send(true).unwrap();
    };
    for served in tokio::join!(serving, testing).0 {
        served.unwrap();
    }
    for (engine, _) in &nodes {
        engine.shutdown().await;
    }
}

fn put(version_of: &str) -> KvCommand {
    let (tenant, collection) = ("t".to_owned(), "c".to_owned());
    KvCommand::Put { tenant, collection, key: version_of.to_owned().into(), value: "v".into() }
}

fn version(written: &Acknowledged<KvReply>) -> u64 {
    let Some(KvReply::Put { version, .. }) = written.reply else { panic!("{written:?}") };
    version
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_tells_what_came_of_a_write_here_and_passed_on() {
    let dir = tempfile::tempdir().unwrap();
    let bind = async || Server::<Kv>::bind("127.0.0.1:0").await.unwrap();
    two_of_three(dir.path(), KvMachine::default, bind, async |leader, _, follower| {
        let unconfirmed = |error: WriteError| {
            assert!(error.maybe_applied(), "{error}");
            let WriteError::AckTimeout { log_id, missing, .. } = &error else { panic!("{error}") };
            assert_eq!(missing.len(), 1, "{error}");
            let written = Engine::<KvMachine>::unconfirmed(&error).unwrap();
            assert_eq!((written.log_id, written.ack), (*log_id, AckLevel::Quorum));
            assert!(written.applied_here && !written.held_by.contains(&missing[0]), "{written:?}");
            written
        };
        let here = leader.write_with(put("k"), options()).await.unwrap_err();
        assert_eq!(version(&unconfirmed(here)), 1);
        for (count, node) in (2..).zip([leader, follower]) {
            let written = node.write_anywhere_with(put("k"), options()).await.unwrap_err();
            assert_eq!(version(&unconfirmed(written)), count);
        }
        // Asked for again it is the same write, and the same is told of it.
        let session = follower.anywhere().open_session(Duration::ZERO).await.unwrap();
        let ticket = session.begin().unwrap();
        let slot = WriteOptions { slot: Some(ticket.slot()), ..options() };
        let first = unconfirmed(follower.write_anywhere_with(put("once"), slot).await.unwrap_err());
        for node in [leader, follower] {
            let again = unconfirmed(node.write_anywhere_with(put("once"), slot).await.unwrap_err());
            assert_eq!((version(&again), again.log_id), (1, first.log_id));
            assert_eq!((first.repeated, again.repeated), (false, true));
        }
    })
    .await;
}

fn failure(status: &Status) -> Failure {
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    let failure = quorate::testkit::proto::details::failure(status.details()).unwrap();
    assert_eq!((failure.reason(), failure.maybe_applied), (Reason::AckTimeout, true));
    assert_eq!(failure.missing.len(), 1);
    failure
}

/// What heads the answer that `failure` holds, and that to a put.
fn put_told(failure: Failure) -> (v1::Header, PutResponse) {
    let answer = failure.unconfirmed.unwrap();
    let header = answer.header.unwrap();
    assert_eq!((header.position, header.held_by.len()), (failure.position, 2));
    let response: PutResponse = prost::Message::decode(answer.response).unwrap();
    assert_eq!(response.revision, header.position.unwrap().index);
    (header, response)
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_of_the_protocol_are_told_in_the_details() {
    let dir = tempfile::tempdir().unwrap();
    let bind = async || quorate::kv::bind("127.0.0.1:0").await.unwrap();
    two_of_three(dir.path(), KvMachine::default, bind, async |_, at, _| {
        let mut kv = KvClient::new(channel(at).await);
        let ack_timeout_ms = ACK_TIMEOUT.as_millis() as u64;
        let options =
            v1::WriteOptions { ack: v1::AckLevel::All.into(), ack_timeout_ms, ..Default::default() };
        let put =
            PutRequest { key: "k".into(), value: "v".into(), options: Some(options), ..Default::default() };

        let (header, told) = put_told(failure(&kv.put(put.clone()).await.unwrap_err()));
        assert_eq!((told.version, header.repeated_write), (1, false));
        let session = kv.open_session(v1::OpenSessionRequest::default()).await.unwrap().into_inner().session;
        let in_session = v1::WriteOptions { session, sequence: 1, ..options };
        let once = PutRequest { options: Some(in_session), ..put.clone() };
        for repeated in [false, true] {
            let (header, told) = put_told(failure(&kv.put(once.clone()).await.unwrap_err()));
            assert_eq!((told.version, header.repeated_write), (2, repeated));
        }
        let request = TaggedRequest { tag: 7, request: Some(Request::Put(put.clone())) };
        let message = PipelineRequest { requests: vec![request] };
        let mut answers = kv.pipeline(tokio_stream::iter([message])).await.unwrap().into_inner();
        let answer = answers.message().await.unwrap().unwrap().responses.remove(0);
        let Some(Response::Failure(told)) = answer.response else { panic!("{answer:?}") };
        assert_eq!(put_told(told).1.version, 3);

        // Headers are small: what the transaction has read is left out of them.
        let large = PutRequest { value: vec![b'x'; 4096].into(), options: None, ..put };
        kv.put(large).await.unwrap();
        let get = TxnGet { key: "k".into() };
        let operation = Some(v1::txn_operation::Operation::Get(get));
        let get = TxnOperation { operation, ..Default::default() };
        let txn = TxnRequest { success: vec![get], options: Some(options), ..Default::default() };
        let told = failure(&kv.txn(txn).await.unwrap_err());
        assert!(told.unconfirmed.is_none() && told.position.is_some());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_make_the_reply_of_the_error() {
    let dir = tempfile::tempdir().unwrap();
    let all = || keys::WriteOptions::from(AckLevel::All).with_ack_timeout(ACK_TIMEOUT);
    let bind = async || Server::<Kv>::bind("127.0.0.1:0").await.unwrap();
    two_of_three(dir.path(), KvMachine::default, bind, async |_, at, _| {
        let client = keys::Client::new([at.to_string()], ClientConfig::default()).unwrap();
        let scope = Scope::default();
        let put = client.put_with(&scope, "k", "x".repeat(4096), all()).await.unwrap_err();
        assert_eq!(keys::PutReply::unconfirmed(&put).unwrap().version, 1);
        let put = client.put_when(&scope, Compare::missing("k"), "k", "w", all()).await.unwrap_err();
        let put = keys::ConditionalPut::unconfirmed(&put).unwrap();
        assert_eq!((put.succeeded, put.current.unwrap().value.len()), (false, 4096), "however long it is");
        let txn = Txn::new().when(Compare::exists("k")).then(TxnOp::delete("k"));
        let txn = client.txn_with(&scope, txn, all()).await.unwrap_err();
        let txn = keys::TxnReply::unconfirmed(&txn).unwrap();
        assert_eq!((txn.succeeded, txn.results), (true, vec![keys::TxnResult::Delete { deleted: true }]));
        let removal = client.delete_with(&scope, "k", all()).await.unwrap_err();
        let removal = keys::DeleteReply::unconfirmed(&removal).unwrap();
        assert!(!removal.deleted && removal.header.held_by.len() == 2);
        client.close().await;
    })
    .await;

    type Both = Composed<Sum<1>, Sum<2>, 4>;
    let dir = tempfile::tempdir().unwrap();
    let all = || ClientOptions::from(AckLevel::All).with_ack_timeout(ACK_TIMEOUT);
    let bind = async || Server::<MachineGuest<Both>>::bind("127.0.0.1:0").await.unwrap();
    two_of_three(dir.path(), Both::default, bind, async |_, at, _| {
        let client = Client::new([at.to_string()], ClientConfig::default()).unwrap();
        let both = MachineClient::<Both>::from(client);
        for (command, expected) in [
            (Either::Added(Change::Add(5)), Either::Added("it is 5".to_owned())),
            (Either::Base(Change::Add(7)), Either::Base("it is 7".to_owned())),
        ] {
            let error: ClientError = both.write_with(command, all()).await.unwrap_err();
            let written = MachineClient::<Both>::unconfirmed(&error).unwrap();
            assert_eq!((written.reply, written.header.held_by.len()), (expected, 2));
            assert_eq!(keys::PutReply::unconfirmed(&error), None, "it is none of a key");
        }
        both.close().await;
    })
    .await;
}
