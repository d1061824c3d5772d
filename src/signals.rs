//! The signals that ask a process to stop in order.
//!
//! SIGTERM is a supervisor's, SIGINT a terminal's, SIGHUP that of a terminal or session that ends. A process that was started
//! to outlive its terminal (`nohup`) ignores SIGHUP, and goes on doing so. SIGQUIT is left alone: it ends the process where
//! it stands, with a core dump, which is what one that hangs is sent it for.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Waits for the signals.
#[derive(Debug)]
pub(crate) struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    /// Nothing where the process is to outlive its terminal.
    hangup: Option<Signal>,
}

impl StopSignals {
    /// From now on these signals do not end the process by themselves.
    ///
    /// # Errors
    /// When the system does not let them be caught.
    pub(crate) fn listen() -> io::Result<Self> {
        let hangup = match hangup_is_ignored() {
            true => None,
            false => Some(signal(SignalKind::hangup())?),
        };
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup,
        })
    }

    /// The name of the next one.
    pub(crate) async fn next(&mut self) -> &'static str {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = hangup => "SIGHUP",
        }
    }
}

/// Whether whoever started this process has it ignore SIGHUP. Catching it would undo that.
fn hangup_is_ignored() -> bool {
    // Where there is no such file it cannot be told, and is not the case as a rule.
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| ignores_hangup(&status))
}

/// Reads the mask of ignored signals in a process's status, as Linux shows it.
fn ignores_hangup(status: &str) -> bool {
    /// The first bit is the signal with number 1.
    const HANGUP_BIT: u64 = 1;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & HANGUP_BIT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_under_nohup_is_recognised() {
        assert!(ignores_hangup("Name:\tq\nSigIgn:\t0000000000001001\n"));
        assert!(!ignores_hangup("Name:\tq\nSigIgn:\t0000000000001000\n"));
        assert!(!ignores_hangup("SigBlk:\t0000000000000001\n"));
    }
}
