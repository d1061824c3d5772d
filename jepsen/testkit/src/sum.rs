//! The smallest machine that tells whether everything was applied once: it adds up. It can be made to err.

use std::io::{self, Read, Write};

use quorate::{ApplyContext, StateMachine};

/// Adds up what it is given.
#[derive(Debug, Clone, Default)]
pub struct Sum {
    /// What it has come to.
    pub sum: u64,
    /// Added with every command. No deterministic machine has something of its own: with it a node differs from the others, until
    /// it is sent a snapshot.
    pub more: u64,
    /// Added with the next command only.
    pub once: u64,
    /// Whether it keeps a hash of its state up to date.
    pub hashed: bool,
}

impl StateMachine for Sum {
    type Command = u64;
    type Reply = u64;
    type Query = ();
    type Answer = u64;
    type View = u64;

    fn apply(&mut self, _: &ApplyContext, number: u64) -> u64 {
        self.sum += number + self.more + std::mem::take(&mut self.once);
        self.sum
    }

    fn view(&self) -> u64 {
        self.sum
    }

    fn query(view: &u64, (): ()) -> u64 {
        *view
    }

    fn running_hash(&self) -> Option<u64> {
        self.hashed.then(|| Self::state_hash(&self.sum))
    }

    /// It never grows.
    fn state_bytes(&self) -> Option<u64> {
        Some(8)
    }

    fn write_snapshot(view: &u64, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&view.to_le_bytes())
    }

    fn read_snapshot(_: u32, input: &mut dyn Read) -> io::Result<Self> {
        let mut bytes = [0; 8];
        input.read_exact(&mut bytes)?;
        Ok(Self { sum: u64::from_le_bytes(bytes), ..Self::default() })
    }

    fn replaces(&mut self, previous: &Self) {
        self.hashed = previous.hashed;
    }
}
