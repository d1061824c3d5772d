//! A machine served as it is, and its client: a sum of numbers, in several builds.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use quorate::client::{Client, ClientConfig, ClientError, MachineClient};
use quorate::kv::Kv;
use quorate::kv::client::Scope;
use quorate::kv::machine::KvMachine;
use quorate::server::{Guest, MachineGuest, Server};
use quorate::{
    AckLevel, ApplyContext, Composed, Either, Engine, EngineConfig, ReadLevel, Reason, StateMachine,
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::DEADLINE;

/// Builds: up to version 1, up to version 2, and one that has replies of another type.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sum<const VERSION: u32>(u64);

/// What no build should be: its replies are others.
const OTHER_REPLIES: u32 = 99;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Change {
    Add(u64),
    /// Since version 2.
    Multiply(u64),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Ask {
    Sum,
    /// Since version 2.
    IsEven,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Told {
    Sum(u64),
    Yes(bool),
}

impl<const VERSION: u32> StateMachine for Sum<VERSION> {
    type Command = Change;
    type Reply = String;
    type Query = Ask;
    type Answer = Told;
    type View = u64;

    const VERSION: u32 = VERSION;

    fn command_version(command: &Change) -> u32 {
        match command {
            Change::Add(_) => 1,
            Change::Multiply(_) => 2,
        }
    }

    fn decode_reply(_: u16, encoded: &[u8]) -> Result<String, quorate::DecodeError> {
        match VERSION {
            OTHER_REPLIES => quorate::decode::<u64>(encoded).map(|number| number.to_string()),
            _ => quorate::decode(encoded),
        }
    }

    fn apply(&mut self, _: &ApplyContext, command: Change) -> String {
        match command {
            Change::Add(number) => self.0 += number,
            Change::Multiply(number) => self.0 *= number,
        }
        format!("it is {}", self.0)
    }

    fn view(&self) -> u64 {
        self.0
    }

    fn query(view: &u64, query: Ask) -> Told {
        match query {
            Ask::Sum => Told::Sum(*view),
            Ask::IsEven => Told::Yes(view.is_multiple_of(2)),
        }
    }

    fn write_snapshot(view: &u64, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&view.to_le_bytes())
    }

    fn read_snapshot(_: u32, input: &mut dyn Read) -> io::Result<Self> {
        let mut bytes = [0; 8];
        input.read_exact(&mut bytes)?;
        Ok(Self(u64::from_le_bytes(bytes)))
    }
}

/// Runs `test` against a node that serves `G`.
pub(crate) async fn served<G: Guest>(machine: G::Machine, test: impl AsyncFnOnce(Client)) {
    served_at::<G>(machine, async |_, client| test(client).await).await;
}

/// The same, with where its client port is.
pub(crate) async fn served_at<G: Guest>(machine: G::Machine, test: impl AsyncFnOnce(SocketAddr, Client)) {
    served_on(Server::<G>::bind("127.0.0.1:0").await.unwrap(), machine, test).await;
}

/// The same at the ports of `server`.
pub(crate) async fn served_on<G: Guest>(
    server: Server<G>,
    machine: G::Machine,
    test: impl AsyncFnOnce(SocketAddr, Client),
) {
    let dir = tempfile::tempdir().unwrap();
    let peer = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = server.local_addr();
    let address = at.to_string();
    let mut config = EngineConfig::new(1, dir.path(), peer.local_addr().unwrap().to_string());
    (config.peer_listener, config.client_advertise) = (Some(peer), address.clone());
    let engine = Box::pin(Engine::open(config, machine)).await.unwrap();
    assert!(engine.ready(DEADLINE).await);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = server.serve(engine.clone(), async { stopped.await.unwrap_or(()) });
    let page = quorate::server::metrics(&engine);
    assert!(page.contains("# TYPE quorate_raft_is_leader gauge\nquorate_raft_is_leader 1\n"), "{page}");
    assert!(page.contains("# TYPE quorate_write_acknowledged_total counter\n"), "{page}");
    let testing = async {
        let mut config = ClientConfig::default();
        // What is refused for a while is asked for again meanwhile.
        config.timeout = Duration::from_secs(2);
        test(at, Client::new([address], config).unwrap()).await;
        drop(stop);
    };
    let (served, ()) = tokio::join!(serving, testing);
    served.unwrap();
    engine.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_served_as_it_is() {
    served::<MachineGuest<Sum<2>>>(Sum::default(), async |client| {
        let sum = MachineClient::<Sum<2>>::from(client);
        let written = sum.write(Change::Add(5)).await.unwrap();
        assert_eq!(written.reply, "it is 5");
        let read = written.header.then_read(ReadLevel::Local);
        assert_eq!(sum.read(Ask::Sum, read).await.unwrap().answer, Told::Sum(5));
        let early = sum.write_with(Change::Multiply(2), AckLevel::Leader).await.unwrap();
        assert_eq!(early.header.ack, AckLevel::Leader);
        let even = sum.read(Ask::IsEven, early.header.then_read(ReadLevel::Linearizable)).await.unwrap();
        assert_eq!(even.answer, Told::Yes(true));

        let mut once = sum.once().await.unwrap();
        let (first, again) =
            (once.write(&Change::Add(1)).await.unwrap(), once.write(&Change::Add(1)).await.unwrap());
        assert_eq!((first.reply, again.reply), ("it is 11".to_owned(), "it is 11".to_owned()));
        assert!(!first.header.repeated_write && again.header.repeated_write);
        assert_eq!(sum.clone().metrics().sessions_opened, 1, "clones share it");
        sum.close().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_another_version_is_understood_or_refused_in_words() {
    served::<MachineGuest<Sum<1>>>(Sum::default(), async |client| {
        let later = MachineClient::<Sum<2>>::from(client);
        assert_eq!(later.write(Change::Add(5)).await.unwrap().reply, "it is 5");
        assert_eq!(later.read(Ask::Sum, ReadLevel::Local).await.unwrap().answer, Told::Sum(5));
        let refused = later.write(Change::Multiply(2)).await.unwrap_err();
        assert_eq!((refused.reason(), refused.maybe_applied()), (Reason::VersionNotAgreed, false));
        let words =
            "the command is of version 2 of the machine, and this node reads 0 to 1: upgrade this node";
        assert!(refused.to_string().ends_with(words), "{refused}");
    })
    .await;
    served::<MachineGuest<Sum<2>>>(Sum::default(), async |client| {
        let earlier = MachineClient::<Sum<1>>::from(client);
        assert_eq!(earlier.write(Change::Add(5)).await.unwrap().reply, "it is 5");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_cannot_be_read_is_told_as_one_and_leaves_the_write_undecided() {
    served::<MachineGuest<Sum<1>>>(Sum::default(), async |client| {
        let other = MachineClient::<Sum<OTHER_REPLIES>>::from(client.clone());
        let error = other.write(Change::Add(5)).await.unwrap_err();
        assert!(matches!(error, ClientError::Unreadable { node_id: 1, .. }), "{error:?}");
        assert!(error.maybe_applied() && error.is_final(), "{error}");
        assert!(
            error.to_string().contains("its reply is none of the machine that this program knows"),
            "{error}"
        );
        let mut once = other.once().await.unwrap();
        assert!(once.write(&Change::Add(1)).await.unwrap_err().maybe_applied());
        let right = MachineClient::<Sum<1>>::from(client.clone());
        assert_eq!(right.read(Ask::Sum, ReadLevel::Linearizable).await.unwrap().answer, Told::Sum(6));
        // What is no message of a machine fails by itself.
        let error = client.write("write", "no message", AckLevel::default()).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Invalid, "{error}");
        let error = client.read("length", "", ReadLevel::Local).await.unwrap_err();
        assert!(error.to_string().contains("this node serves nothing called `length`"), "{error}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_are_served_beside_others() {
    type Both = Composed<Sum<1>, Sum<2>, 4>;
    served::<MachineGuest<Both>>(Both::default(), async |client| {
        let both = MachineClient::<Both>::from(client.clone());
        let added = both.write(Either::Added(Change::Multiply(3))).await.unwrap();
        assert_eq!(added.reply, Either::Added("it is 0".to_owned()));
        // A client of before the second machine was added.
        let first = MachineClient::<Sum<1>>::from(client);
        assert_eq!(first.write(Change::Add(7)).await.unwrap().reply, "it is 7");
        assert_eq!(first.read(Ask::Sum, ReadLevel::Local).await.unwrap().answer, Told::Sum(7));
        let answer = both.read(Either::Base(Ask::Sum), ReadLevel::Linearizable).await.unwrap().answer;
        assert_eq!(answer, Either::Base(Told::Sum(7)));
    })
    .await;
    type Beside = Composed<Kv, MachineGuest<Sum<2>>, 1>;
    served::<Beside>(Composed::<KvMachine, Sum<2>, 1>::default(), async |client| {
        let sum = MachineClient::<Sum<2>>::from(client.clone());
        assert_eq!(sum.write(Change::Add(7)).await.unwrap().reply, "it is 7");
        let keys = quorate::kv::client::Client::new(
            client.endpoints().iter().map(|it| it.as_str()),
            ClientConfig::default(),
        );
        keys.unwrap().put(&Scope::default(), "k", "v").await.unwrap();
        assert_eq!(sum.read(Ask::IsEven, ReadLevel::Linearizable).await.unwrap().answer, Told::Yes(false));
    })
    .await;
}
