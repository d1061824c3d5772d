//! A queue of jobs, kept by three processes: each job is pushed once, leased to one worker at a time, and done once.
//!
//! ```sh
//! jobs serve 1 /tmp/jobs/1 127.0.0.1:7801 127.0.0.1:7901,127.0.0.1:7902,127.0.0.1:7903   # and 2 and 3, in other terminals
//! jobs push 127.0.0.1:7801 wash dry fold
//! jobs work 127.0.0.1:7802 ann
//! ```
//!
//! `serve … --machine-version 1` runs the queue as it was before leases could be renewed. `serve … --restore DIR` forms a new cluster with
//! the state in DIR, a copy of some node's directory `snapshots`. `quorate status`, `snapshot` and the like operate it.

#![allow(clippy::print_stdout)] // it is what the program is for

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use quorate::client::{ClientConfig, ClientError, MachineClient};
use quorate::server::{MachineGuest, Server};
use quorate::{ApplyContext, Engine, EngineConfig, ReadLevel, StateMachine};
use serde::{Deserialize, Serialize};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The state. A view of it is a copy, which is well for thousands of jobs; for millions, use maps that share what they have in common.
/// In a program of your own the version is a constant. Here it is a parameter, so that one program can be both.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Jobs<const VERSION: u32> {
    waiting: BTreeMap<u64, String>,
    leased: BTreeMap<u64, Lease>,
    /// When each lease ends, in elapsed time, and the number of its job.
    ends: BTreeSet<(u64, u64)>,
    pushed: u64,
    done: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Lease {
    what: String,
    worker: String,
    until_ms: u64,
}

/// What can be written. Variants are stored by their places: a new one comes last.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Command {
    Push(String),
    Take {
        worker: String,
        lease_ms: u64,
    },
    Done {
        number: u64,
        worker: String,
    },
    Expire,
    /// Since version 2.
    Renew {
        number: u64,
        worker: String,
        lease_ms: u64,
    },
}

/// The number of a job, and what it is.
pub(crate) type Job = (u64, String);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) waiting: u64,
    pub(crate) leased: u64,
    pub(crate) done: u64,
}

impl<const VERSION: u32> Jobs<VERSION> {
    fn lease(&mut self, (number, what): Job, worker: String, until_ms: u64) -> Job {
        self.ends.insert((until_ms, number));
        self.leased.insert(number, Lease { what: what.clone(), worker, until_ms });
        (number, what)
    }
    /// Takes a job back from `worker`, if it still has it.
    fn take_back(&mut self, number: u64, worker: &str) -> Option<Job> {
        let lease = self.leased.get(&number).filter(|lease| lease.worker == worker)?;
        self.ends.remove(&(lease.until_ms, number));
        self.leased.remove(&number).map(|lease| (number, lease.what))
    }
    /// Ends the leases that last until then.
    fn expire(&mut self, until_ms: u64) {
        while let Some(end) = self.ends.first().copied().filter(|end| end.0 <= until_ms) {
            self.ends.remove(&end);
            let ended = self.leased.remove(&end.1);
            self.waiting.extend(ended.map(|lease| (end.1, lease.what)));
        }
    }
}

impl<const VERSION: u32> StateMachine for Jobs<VERSION> {
    type Command = Command;
    type Reply = Option<Job>; // the job pushed, taken, done or renewed; or none waits, or the worker has it no more
    type Query = ();
    type Answer = Counts;
    type View = Self;
    const VERSION: u32 = VERSION;
    fn command_version(command: &Command) -> u32 {
        match command {
            Command::Push(_) | Command::Take { .. } | Command::Done { .. } | Command::Expire => 1,
            Command::Renew { .. } => 2,
        }
    }
    fn apply(&mut self, context: &ApplyContext, command: Command) -> Option<Job> {
        let until = |lease_ms| context.elapsed_ms.saturating_add(lease_ms);
        match command {
            Command::Push(what) => {
                // Not the position in the log: that begins anew in a cluster that is formed from a backup.
                self.pushed += 1;
                self.waiting.insert(self.pushed, what.clone());
                Some((self.pushed, what))
            }
            Command::Take { worker, lease_ms } => {
                let job = self.waiting.pop_first()?;
                Some(self.lease(job, worker, until(lease_ms)))
            }
            Command::Done { number, worker } => {
                let job = self.take_back(number, &worker)?;
                self.done += 1;
                Some(job)
            }
            Command::Renew { number, worker, lease_ms } => {
                let job = self.take_back(number, &worker)?;
                Some(self.lease(job, worker, until(lease_ms)))
            }
            Command::Expire => {
                self.expire(context.elapsed_ms);
                None
            }
        }
    }
    /// When the first lease ends, whether or not anybody asks for anything then.
    fn next_wake_ms(&self) -> Option<u64> {
        self.ends.first().map(|(until_ms, _)| *until_ms)
    }
    /// What the leader proposes at that time.
    fn wake() -> Option<Command> {
        Some(Command::Expire)
    }
    fn view(&self) -> Self {
        self.clone()
    }
    fn query(view: &Self, (): ()) -> Counts {
        Counts { waiting: view.waiting.len() as u64, leased: view.leased.len() as u64, done: view.done }
    }
    fn write_snapshot(view: &Self, out: &mut dyn Write) -> io::Result<()> {
        serde_json::to_writer(out, view).map_err(io::Error::other)
    }
    fn read_snapshot(_: u32, input: &mut dyn Read) -> io::Result<Self> {
        serde_json::from_reader(input).map_err(io::Error::other)
    }
}

/// One of the processes, until it is told to stop. `peers` are the addresses of all three, that of node 1 first.
async fn serve<const V: u32>(node_id: u64, at: [&str; 3], backup: Option<&str>) -> Result<(), Error> {
    let [dir, client, peers] = at;
    let server = Server::<MachineGuest<Jobs<V>>>::bind(client).await?;
    let members: BTreeMap<u64, String> = (1..).zip(peers.split(',').map(str::to_owned)).collect();
    let own = members.get(&node_id).ok_or("this node is not among its peers")?;
    let mut config = EngineConfig::new(node_id, dir, own);
    config.client_advertise = server.local_addr().to_string();
    config.initial_members = members;
    let progress = config.progress.clone();
    let mut restored = backup.map(|dir| Engine::<Jobs<V>>::read_backup(Path::new(dir))).transpose()?;
    // Time begins anew in a new cluster: a lease of the old one would not end there.
    restored.iter_mut().for_each(|jobs| jobs.expire(u64::MAX));
    let opening = async {
        match restored {
            Some(jobs) => Engine::restore(config, jobs).await,
            None => Engine::open(config, Jobs::default()).await,
        }
    };
    let ended = server.run_until_signal(opening, progress).await;
    let code =
        ended.inspect_err(|error| tracing::error!("{error}")).map_or_else(|error| error.exit_code(), |_| 0);
    std::process::exit(code.into())
}

/// A client of the newest version: what nodes do not know yet, they refuse.
pub(crate) type Queue = MachineClient<Jobs<2>>;

/// Pushes a job, however often it has to be asked for: it is pushed once.
pub(crate) async fn push(queue: &Queue, what: &str) -> Result<Option<Job>, ClientError> {
    let (command, mut once) = (Command::Push(what.to_owned()), queue.once().await?);
    loop {
        match once.write(&command).await {
            Ok(pushed) => return Ok(pushed.reply),
            Err(error) if error.is_final() => return Err(error),
            Err(error) => tracing::warn!("again: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Does jobs, and tells each when it is done, until there are none left.
pub(crate) async fn work(queue: &Queue, worker: &str, mut tell: impl FnMut(Job)) -> Result<(), ClientError> {
    loop {
        let worker = worker.to_owned();
        let take = Command::Take { worker: worker.clone(), lease_ms: 30_000 };
        if let Some((number, _)) = queue.write(take).await?.reply {
            // Here the work is done. Work that takes longer renews its lease meanwhile.
            let done = queue.write(Command::Done { number, worker }).await?;
            done.reply.map(&mut tell);
            continue;
        }
        let left = queue.read((), ReadLevel::Linearizable).await?.answer;
        if left.waiting + left.leased == 0 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await; // others have them, and may fail
    }
}

pub(crate) async fn run(args: &[&str]) -> Result<(), Error> {
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    let queue = |at: &str| Queue::new([at], ClientConfig::default());
    match args {
        ["serve", node_id, dir, client, peers, options @ ..] => {
            let option = |name| options.chunks(2).find(|pair| pair[0] == name).and_then(|pair| pair.get(1));
            let (node_id, at) = (node_id.parse()?, [*dir, *client, *peers]);
            match option("--machine-version") {
                Some(&"1") => serve::<1>(node_id, at, option("--restore").copied()).await,
                _ => serve::<2>(node_id, at, option("--restore").copied()).await,
            }
        }
        ["push", at, jobs @ ..] => {
            let queue = queue(at)?;
            for what in jobs {
                println!("{:?}", push(&queue, what).await?);
            }
            queue.close().await;
            Ok(())
        }
        ["work", at, worker] => Ok(work(&queue(at)?, worker, |job| println!("{job:?}")).await?),
        _ => Err("jobs serve|push|work …".into()),
    }
}

#[tokio::main]
pub(crate) async fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    run(&args.iter().map(String::as_str).collect::<Vec<_>>()).await
}
