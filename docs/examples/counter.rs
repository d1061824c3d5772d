//! A replicated counter: three nodes in one process, each with its own disk and sockets.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use quorate::{ApplyContext, Engine, EngineConfig, ReadLevel, StateMachine};

#[derive(Default)]
pub(crate) struct Counter(i64);

impl StateMachine for Counter {
    type Command = i64; // how much to add
    type Reply = i64; // the sum so far
    type Query = ();
    type Answer = i64;
    type View = i64;

    fn apply(&mut self, _: &ApplyContext, add: i64) -> i64 {
        self.0 += add;
        self.0
    }
    fn view(&self) -> i64 {
        self.0
    }
    fn query(view: &i64, (): ()) -> i64 {
        *view
    }
    fn write_snapshot(view: &i64, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&view.to_le_bytes())
    }
    fn read_snapshot(_: u32, input: &mut dyn Read) -> io::Result<Self> {
        let mut bytes = [0; 8];
        input.read_exact(&mut bytes)?;
        Ok(Self(i64::from_le_bytes(bytes)))
    }
}

#[tokio::main]
pub(crate) async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (dir, mut nodes) = (tempfile::tempdir()?, Vec::new());
    let listeners =
        (1..=3).map(|id| Ok((id, TcpListener::bind("127.0.0.1:0")?))).collect::<io::Result<Vec<_>>>()?;
    let address = |l: &TcpListener| l.local_addr().map(|a| a.to_string());
    let peers = listeners.iter().map(|(id, l)| Ok((*id, address(l)?))).collect::<io::Result<_>>()?;
    for (id, listener) in listeners {
        let mut config = EngineConfig::new(id, dir.path().join(id.to_string()), address(&listener)?);
        (config.peer_listener, config.initial_members) = (Some(listener), Clone::clone(&peers));
        nodes.push(Engine::open(config, Counter::default()).await?);
    }
    for node in &nodes {
        assert!(node.ready(Duration::from_secs(30)).await, "no leader");
    }
    // Whichever node is asked.
    assert_eq!(nodes[0].write_anywhere(40).await?.reply, 40);
    assert_eq!(nodes[1].write_anywhere(2).await?.reply, 42);
    assert_eq!(nodes[2].read((), ReadLevel::Linearizable).await?.answer, 42);
    Ok(())
}
