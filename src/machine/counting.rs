//! The smallest machine there is, for tests.

use std::io::{self, Read, Write};

use super::{ApplyContext, StateMachine};

/// Counts the commands. Two nodes that begin with different numbers differ.
#[derive(Debug, Clone, Default)]
pub(crate) struct Count(pub(crate) u64);

impl StateMachine for Count {
    type Command = ();
    type Reply = u64;
    type Query = ();
    type Answer = u64;
    type View = u64;

    fn apply(&mut self, _: &ApplyContext, (): ()) -> u64 {
        self.0 += 1;
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
