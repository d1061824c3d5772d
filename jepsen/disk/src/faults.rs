//! What goes wrong, and what waits meanwhile.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard};

use fuser::Errno;

/// How the disk fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Fault {
    /// It does not.
    #[default]
    None,
    /// Writes and syncs do not come back before the disk is mended. Reads do.
    Stall,
    /// Syncs fail with EIO. Writes succeed.
    FailSyncs,
    /// Writes and allocations fail with ENOSPC, and there is no space to see.
    Full,
}

/// What an operation is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deed {
    /// Change content, or take up space.
    Write,
    /// Make something durable.
    Sync,
}

/// What becomes of it.
#[derive(Debug)]
pub(crate) enum Verdict {
    Proceed,
    Fail(Errno),
    Hold,
}

type Operation = Box<dyn FnOnce() + Send>;

/// The present fault, and the operations that wait for its end.
#[derive(Default)]
pub(crate) struct Faults(Mutex<State>);

#[derive(Default)]
struct State {
    fault: Fault,
    held: VecDeque<Operation>,
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Faults").field("fault", &state.fault).field("held", &state.held.len()).finish()
    }
}

impl Faults {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("invariant: no panic under this lock")
    }

    fn judge(fault: Fault, deed: Deed) -> Verdict {
        match (fault, deed) {
            (Fault::Stall, _) => Verdict::Hold,
            (Fault::FailSyncs, Deed::Sync) => Verdict::Fail(Errno::EIO),
            (Fault::Full, Deed::Write) => Verdict::Fail(Errno::ENOSPC),
            (Fault::None | Fault::FailSyncs | Fault::Full, _) => Verdict::Proceed,
        }
    }

    /// Runs `operation`, now or when the disk is mended, with the error it is to report, if any.
    pub(crate) fn meet(&self, deed: Deed, operation: impl FnOnce(Result<(), Errno>) + Send + 'static) {
        let mut state = self.lock();
        let outcome = match Self::judge(state.fault, deed) {
            Verdict::Proceed => Ok(()),
            Verdict::Fail(errno) => Err(errno),
            Verdict::Hold => return state.held.push_back(Box::new(|| operation(Ok(())))),
        };
        drop(state);
        operation(outcome);
    }

    pub(crate) fn is_full(&self) -> bool {
        self.lock().fault == Fault::Full
    }

    pub(crate) fn set(&self, fault: Fault) {
        self.lock().fault = fault;
    }

    pub(crate) fn held(&self) -> usize {
        self.lock().held.len()
    }

    pub(crate) fn mend(&self) {
        let held = {
            let mut state = self.lock();
            state.fault = Fault::None;
            std::mem::take(&mut state.held)
        };
        for operation in held {
            operation();
        }
    }
}
