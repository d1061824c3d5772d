//! A lock whose holder loses it after a while: a machine of one's own with a lease, on one node.
//!
//! The lease ends by elapsed time, which no wall clock enters and no change of leader loses: `ApplyContext::elapsed_ms`.
//! `ApplyContext::time_ms` is for people; a machine that decided by it would end leases early when a clock is set.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use quorate::{ApplyContext, Engine, EngineConfig, ReadLevel, StateMachine};

/// Who holds the lock, and until when in elapsed time.
#[derive(Default)]
struct Lock(Option<(String, u64)>);

impl StateMachine for Lock {
    type Command = Option<(String, u64)>; // who takes it and for how many milliseconds; none: it is due
    type Reply = bool; // whether the lock was taken
    type Query = ();
    type Answer = Option<String>;
    type View = Option<(String, u64)>;

    fn apply(&mut self, context: &ApplyContext, command: Self::Command) -> bool {
        self.0.take_if(|(_, until_ms)| *until_ms <= context.elapsed_ms);
        let Some((holder, lease_ms)) = command else { return false };
        let free = self.0.is_none();
        if free {
            self.0 = Some((holder, context.elapsed_ms.saturating_add(lease_ms)));
        }
        free
    }
    fn next_wake_ms(&self) -> Option<u64> {
        self.0.as_ref().map(|(_, until_ms)| *until_ms)
    }
    fn wake() -> Option<Self::Command> {
        Some(None)
    }
    fn view(&self) -> Self::View {
        self.0.clone()
    }
    fn query(view: &Self::View, (): ()) -> Option<String> {
        view.as_ref().map(|(holder, _)| holder.clone())
    }
    fn write_snapshot(view: &Self::View, out: &mut dyn Write) -> io::Result<()> {
        let Some((holder, until_ms)) = view else { return Ok(()) };
        out.write_all(&until_ms.to_le_bytes())?;
        out.write_all(holder.as_bytes())
    }
    fn read_snapshot(_: u32, input: &mut dyn Read) -> io::Result<Self> {
        let mut bytes = Vec::new();
        input.read_to_end(&mut bytes)?;
        let Some((until_ms, holder)) = bytes.split_first_chunk() else { return Ok(Self(None)) };
        let holder = String::from_utf8(holder.to_vec()).map_err(io::Error::other)?;
        Ok(Self(Some((holder, u64::from_le_bytes(*until_ms)))))
    }
}

#[tokio::main]
pub(crate) async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (dir, listener) = (tempfile::tempdir()?, TcpListener::bind("127.0.0.1:0")?);
    let mut config = EngineConfig::new(1, dir.path(), listener.local_addr()?.to_string());
    config.peer_listener = Some(listener);
    let node = Engine::open(config, Lock::default()).await?;
    assert!(node.ready(Duration::from_secs(30)).await, "no leader");

    assert!(node.write(Some(("ann".to_owned(), 200))).await?.reply, "the lock is free");
    assert!(!node.write(Some(("bob".to_owned(), 200))).await?.reply, "ann has it");
    while node.read((), ReadLevel::Linearizable).await?.answer.is_some() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(node.write(Some(("bob".to_owned(), 200))).await?.reply, "ann's lease is over");
    node.shutdown().await;
    Ok(())
}
