//! A machine of one's own, served over the network: a queue of jobs, each leased to whoever takes it.
//!
//! A job that is not done when its lease ends is given to the next who asks. The node brings sessions, levels, status pages
//! and metrics; the client brings retries, fail-over and exactly-once.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use bytes::Bytes;
use quorate::client::{Client, ClientConfig, WriteOptions};
use quorate::server::Rejected;
use quorate::server::Server;
use quorate::server::{Call, Guest, Method};
use quorate::{ApplyContext, Engine, EngineConfig, LogId, ReadLevel, StateMachine};
use serde::{Deserialize, Serialize};

/// Jobs by number: what is to be done, and until when in elapsed time somebody has it.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Queue(BTreeMap<u64, (String, u64)>);

#[derive(Serialize, Deserialize)]
enum Command {
    Push(String),
    Take { lease_ms: u64 },
    Done(u64),
}

impl StateMachine for Queue {
    type Command = Command;
    type Reply = Option<(u64, String)>; // the job pushed, taken or done
    type Query = ();
    type Answer = u64; // how many there are
    type View = Self;

    fn apply(&mut self, context: &ApplyContext, command: Command) -> Self::Reply {
        match command {
            Command::Push(job) => {
                self.0.insert(context.log_id.index, (job.clone(), 0));
                Some((context.log_id.index, job))
            }
            Command::Take { lease_ms } => {
                let mut jobs = self.0.iter_mut();
                let (number, (job, until_ms)) =
                    jobs.find(|(_, (_, until_ms))| *until_ms <= context.elapsed_ms)?;
                *until_ms = context.elapsed_ms.saturating_add(lease_ms);
                Some((*number, job.clone()))
            }
            Command::Done(number) => self.0.remove(&number).map(|(job, _)| (number, job)),
        }
    }
    fn view(&self) -> Self {
        self.clone()
    }
    fn query(view: &Self, (): ()) -> u64 {
        view.0.len() as u64
    }
    fn write_snapshot(view: &Self, out: &mut dyn Write) -> io::Result<()> {
        serde_json::to_writer(out, view).map_err(io::Error::other)
    }
    fn read_snapshot(_: u32, input: &mut dyn Read) -> io::Result<Self> {
        serde_json::from_reader(input).map_err(io::Error::other)
    }
}

/// How the queue is called: `change` is a write, with a command as JSON, and `length` is a read.
enum Jobs {}

impl Guest for Jobs {
    type Machine = Queue;
    type Request = (usize, Bytes);
    type Response = Bytes;
    type Asked = ();
    const METHODS: &'static [Method] = &[Method::write("change"), Method::read("length")];

    fn parse(method: usize, payload: Bytes) -> Result<Self::Request, Rejected> {
        Ok((method, payload))
    }
    fn call((method, payload): Self::Request) -> Result<(Call<Command, ()>, ()), Rejected> {
        let command =
            || serde_json::from_slice(&payload).map_err(|error| Rejected::invalid(error.to_string()));
        Ok((if method == 0 { Call::Write(command()?) } else { Call::Read(()) }, ()))
    }
    fn written((): (), _: LogId, reply: Option<Option<(u64, String)>>) -> Result<Bytes, Rejected> {
        Ok(serde_json::to_vec(&reply.flatten()).unwrap_or_default().into())
    }
    fn answered((): (), length: u64) -> Result<Bytes, Rejected> {
        Ok(length.to_string().into())
    }
    fn encode(response: Bytes) -> Bytes {
        response
    }
    fn response_bytes(response: &Bytes) -> usize {
        response.len()
    }
}

/// The queue's client: the words of the queue for what any client can.
struct Worker(Client);

impl Worker {
    async fn change(&self, command: Command) -> io::Result<Option<(u64, String)>> {
        let written = self.0.write("change", serde_json::to_vec(&command)?, WriteOptions::default());
        Ok(serde_json::from_slice(&written.await.map_err(io::Error::other)?.payload)?)
    }
    async fn length(&self) -> io::Result<u64> {
        let length = self.0.read("length", "", ReadLevel::Linearizable).await.map_err(io::Error::other)?;
        Ok(serde_json::from_slice(&length.payload)?)
    }
}

async fn work(address: String) -> Result<(), Box<dyn std::error::Error>> {
    let worker = Worker(Client::new([address], ClientConfig::default())?);
    let (first, _) = worker.change(Command::Push("wash".to_owned())).await?.ok_or("it is pushed")?;
    worker.change(Command::Push("dry".to_owned())).await?;
    assert_eq!(worker.change(Command::Take { lease_ms: 60_000 }).await?, Some((first, "wash".to_owned())));
    let (second, job) = worker.change(Command::Take { lease_ms: 50 }).await?.ok_or("there is another")?;
    assert_eq!(job, "dry");
    while worker.change(Command::Take { lease_ms: 60_000 }).await? != Some((second, "dry".to_owned())) {
        tokio::time::sleep(Duration::from_millis(10)).await; // its lease is not over yet
    }
    worker.change(Command::Done(first)).await?;
    assert_eq!((worker.change(Command::Done(first)).await?, worker.length().await?), (None, 1));
    assert_eq!(worker.0.metrics().sessions_opened, 1, "each write had its number in a session");
    worker.0.close().await;
    Ok(())
}

#[tokio::main]
pub(crate) async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (dir, listener) = (tempfile::tempdir()?, TcpListener::bind("127.0.0.1:0")?);
    let server = Server::<Jobs>::bind("127.0.0.1:0").await?;
    let address = server.local_addr().to_string();
    let mut config = EngineConfig::new(1, dir.path(), listener.local_addr()?.to_string());
    (config.peer_listener, config.client_advertise) = (Some(listener), address.clone());
    let engine = Engine::open(config, Queue::default()).await?;
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let serving = server.serve(engine.clone(), async { stopped.await.unwrap_or(()) });
    let working = async {
        let worked = work(address).await;
        drop(stop);
        worked
    };
    let (served, worked) = tokio::join!(serving, working);
    engine.shutdown().await;
    served?;
    worked
}
