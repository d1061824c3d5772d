//! Which writes are let in, and what counts as in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::panicking;

use crate::engine::Inner;
use crate::error::WriteError;
use crate::machine::StateMachine;
use crate::raft::network::calls::room::CallRoom;

/// Whose a write is. The limits on commands are for what callers write; what the node writes for itself is small, one entry
/// at a time, and nobody's write: neither refused by those limits nor counted as refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Writer {
    /// A command of a caller.
    Caller,
    /// A session that a caller opens or closes: as small as it can be.
    Session,
    /// The node itself.
    Node,
}

/// An admitted command, in flight until this is dropped.
pub(in crate::engine) struct Admitted<M: StateMachine> {
    engine: Arc<Inner<M>>,
    /// What counts it. A proposal of this node's own counts until a quorum holds it, whatever it waits for then.
    room: CallRoom,
    bytes: usize,
}

impl<M: StateMachine> Drop for Admitted<M> {
    fn drop(&mut self) {
        let bytes = self.engine.in_flight(self.room).fetch_sub(self.bytes, Ordering::Relaxed);
        assert!(bytes >= self.bytes || panicking(), "invariant: what leaves was counted when it came");
        let commands = self.engine.inflight_commands.fetch_sub(1, Ordering::Relaxed);
        assert!(commands > 0 || panicking(), "invariant: what leaves was counted when it came");
    }
}

impl<M: StateMachine> Inner<M> {
    /// Takes `bytes` into account as in flight, unless they are too many, until what is returned is dropped.
    pub(super) fn admit(self: &Arc<Self>, writer: Writer, bytes: usize) -> Result<Admitted<M>, WriteError> {
        if let Some(divergence) = self.core.agreement().divergence() {
            return Err(WriteError::Diverged { divergence });
        }
        self.try_admit(writer, bytes).map_err(|refusal| self.counted(writer, refusal))?;
        Ok(Admitted { engine: self.clone(), room: CallRoom::Quorum, bytes })
    }

    fn try_admit(&self, writer: Writer, bytes: usize) -> Result<(), WriteError> {
        if writer == Writer::Caller {
            self.check_size(bytes)?;
        }
        self.check_disks()?;
        self.take_into_account(writer, CallRoom::Quorum, bytes)
    }

    /// Takes a write that is passed on to the leader into account, until what is returned is dropped. This node's limits are for
    /// that too; what its own disk takes is not asked.
    pub(in crate::engine) fn admit_passed_on(
        self: &Arc<Self>,
        room: CallRoom,
        bytes: usize,
    ) -> Result<Admitted<M>, WriteError> {
        if let Some(divergence) = self.core.agreement().divergence() {
            return Err(WriteError::Diverged { divergence });
        }
        let admitted = self.check_size(bytes);
        let admitted = admitted.and_then(|()| self.take_into_account(Writer::Caller, room, bytes));
        admitted.map_err(|refusal| self.counted(Writer::Caller, refusal))?;
        Ok(Admitted { engine: self.clone(), room, bytes })
    }

    /// The same, for one that was admitted before and is still here: it counts, whatever else is in flight by now.
    pub(in crate::engine) fn readmit_passed_on(
        self: &Arc<Self>,
        room: CallRoom,
        bytes: usize,
    ) -> Admitted<M> {
        let admitted = self.take_into_account(Writer::Node, room, bytes);
        admitted.expect("invariant: only what is a caller's is refused");
        Admitted { engine: self.clone(), room, bytes }
    }

    /// Refuses a command that is too large.
    pub(in crate::engine) fn check_size(&self, bytes: usize) -> Result<(), WriteError> {
        let limit = self.settings.borrow().max_command_bytes;
        match bytes > limit {
            true => Err(WriteError::TooLarge { bytes, limit }),
            false => Ok(()),
        }
    }

    /// Bytes of what is in flight.
    fn in_flight(&self, room: CallRoom) -> &AtomicUsize {
        match room {
            CallRoom::Quorum => &self.inflight_bytes,
            CallRoom::AllVoters => &self.waiting_bytes,
        }
    }

    fn take_into_account(&self, writer: Writer, room: CallRoom, bytes: usize) -> Result<(), WriteError> {
        let (limits, level) = (self.settings.borrow(), self.in_flight(room));
        let in_flight = level.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if writer != Writer::Node && in_flight > limits.max_inflight_bytes {
            level.fetch_sub(bytes, Ordering::Relaxed);
            return Err(WriteError::Overloaded);
        }
        self.inflight_commands.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
