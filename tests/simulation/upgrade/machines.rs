//! A machine that adds up, in three versions.

use std::io::{self, Read, Write};

use quorate::{ApplyContext, StateMachine};
use serde::{Deserialize, Serialize};

/// The machine before the upgrade.
#[derive(Debug, Clone, Default)]
pub(super) struct Old(pub(super) u64);

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum OldCommand {
    Add(u64),
}

impl StateMachine for Old {
    type Command = OldCommand;
    type Reply = u64;
    type Query = ();
    type Answer = u64;
    type View = u64;

    fn apply(&mut self, _: &ApplyContext, OldCommand::Add(number): OldCommand) -> u64 {
        self.0 = self.0.wrapping_add(number);
        self.0
    }

    fn view(&self) -> u64 {
        self.0
    }

    fn query(view: &u64, (): ()) -> u64 {
        *view
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

/// After it: it also multiplies, and counts how often, in its snapshots too. It reads all since version `OLDEST`.
#[derive(Debug, Clone, Default)]
pub(super) struct Multiplier<const OLDEST: u32> {
    pub(super) sum: u64,
    pub(super) multiplied: u64,
}

pub(super) type New = Multiplier<0>;

/// A later build, which has left what was before the upgrade behind.
pub(super) type Later = Multiplier<2>;

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum NewCommand {
    Add(u64),
    Multiply(u64),
}

impl<const OLDEST: u32> StateMachine for Multiplier<OLDEST> {
    type Command = NewCommand;
    type Reply = u64;
    type Query = ();
    type Answer = u64;
    type View = Self;

    const VERSION: u32 = 2;
    const OLDEST_VERSION: u32 = OLDEST;
    const HASH_VERSION: u32 = 1;

    fn command_version(command: &NewCommand) -> u32 {
        match command {
            NewCommand::Add(_) => 0,
            NewCommand::Multiply(_) => Self::VERSION,
        }
    }

    fn apply(&mut self, _: &ApplyContext, command: NewCommand) -> u64 {
        match command {
            NewCommand::Add(number) => self.sum = self.sum.wrapping_add(number),
            NewCommand::Multiply(number) => {
                self.sum = self.sum.wrapping_mul(number);
                self.multiplied += 1;
            }
        }
        self.sum
    }

    fn view(&self) -> Self {
        self.clone()
    }

    fn query(view: &Self, (): ()) -> u64 {
        view.sum
    }

    fn write_snapshot(view: &Self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&view.sum.to_le_bytes())?;
        out.write_all(&view.multiplied.to_le_bytes())
    }

    fn read_snapshot(version: u32, input: &mut dyn Read) -> io::Result<Self> {
        let mut number = || {
            let mut bytes = [0; 8];
            input.read_exact(&mut bytes).map(|()| u64::from_le_bytes(bytes))
        };
        let sum = number()?;
        Ok(Self { sum, multiplied: if version == 0 { 0 } else { number()? } })
    }
}
