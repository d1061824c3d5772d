//! A process that is a node: served from the first moment, until a signal stops it or it must not go on.
//!
//! The first signal stops it in order: the client port stops accepting and answers what is in flight, then the engine hands the
//! lead over and closes its log. A second signal ends that. So does the first while the node is still being opened: it has promised
//! nothing since it was started, and opening may be cut off anywhere, as by a power cut.
//!
//! A fatal error is told at once, and nothing is ended in order: nothing that still runs can acknowledge anything, and what hangs,
//! a disk for instance, would keep the process alive.

use std::io;

use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinHandle};

use super::{ServeError, Server};
use crate::door::Guest;
use crate::engine::{Engine, NodeState, StartProgress};
use crate::error::{FatalError, OpenError};
use crate::machine::StateMachine;
use crate::reason::{EXIT_ERROR, EXIT_INVALID};
use crate::runtime;
use crate::signals::StopSignals;
use crate::types::Role;

/// What has stopped a node in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoppedBy {
    /// This signal, by its name.
    Signal(&'static str),
    /// The program, which has called [`Engine::shutdown`].
    Program,
}

/// Why a node has ended otherwise. What is left of it may hold up the end of the process: see [`Server::run_until_signal`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The process cannot be told when to stop.
    #[error("cannot listen for signals: {0}")]
    Signals(#[source] io::Error),
    /// The node could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The client port failed. The node has been stopped in order.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// What serves the client port has panicked.
    #[error("the client port has failed: {0}")]
    Port(String),
    /// The node must not go on. A supervisor restarts the process; the text says what else is to be done.
    #[error("the node has stopped: {0}")]
    Fatal(#[source] FatalError),
    /// Another signal came while the node was being stopped in order.
    #[error("ended by {0} while it was being stopped")]
    SecondSignal(&'static str),
}

impl RunError {
    /// The code that the process should exit with: 3 where the configuration is at fault, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Open(OpenError::Config(_)) => EXIT_INVALID,
            Self::Open(_)
            | Self::Signals(_)
            | Self::Serve(_)
            | Self::Port(_)
            | Self::Fatal(_)
            | Self::SecondSignal(_) => EXIT_ERROR,
        }
    }
}

impl<G: Guest> Server<G> {
    /// Runs a node until SIGTERM, SIGINT or SIGHUP stops it, or the program shuts its engine down: requests in flight are answered,
    /// the lead is handed over, the log is closed. A second signal ends that at once.
    ///
    /// `opening` opens the engine; the port is served meanwhile, as [`serve_opening`](Self::serve_opening) does it. What the program
    /// does with the engine itself it starts in there, in a task of its own. From now on these signals do not end the process by
    /// themselves.
    ///
    /// ```no_run
    /// # use quorate::server::{MachineGuest, Server};
    /// # use quorate::{Engine, EngineConfig, StateMachine};
    /// # async fn run<Jobs: StateMachine<Query = String, Answer = String> + Default>(
    /// #     server: Server<MachineGuest<Jobs>>, config: EngineConfig) {
    /// let progress = config.progress.clone();
    /// let ended = server.run_until_signal(Engine::open(config, Jobs::default()), progress).await;
    /// let code = ended.map_or_else(|error| { eprintln!("{error}"); error.exit_code() }, |_| 0);
    /// std::process::exit(code.into());
    /// # }
    /// ```
    ///
    /// # Errors
    /// See [`RunError`]. A program ends then, by [`std::process::exit`]: what is left of the node may wait for a disk that hangs, and
    /// a runtime that is dropped would wait for it.
    pub async fn run_until_signal<O>(self, opening: O, progress: StartProgress) -> Result<StoppedBy, RunError>
    where
        O: Future<Output = Result<Engine<G::Machine>, OpenError>> + Send + 'static,
    {
        let signals = StopSignals::listen().map_err(RunError::Signals)?;
        Box::pin(self.run_until(signals, opening, progress)).await
    }

    /// The same, for a process that listens for `signals` already.
    pub(crate) async fn run_until<O>(
        self,
        mut signals: StopSignals,
        opening: O,
        progress: StartProgress,
    ) -> Result<StoppedBy, RunError>
    where
        O: Future<Output = Result<Engine<G::Machine>, OpenError>> + Send + 'static,
    {
        let client = self.local_addr();
        let (give, opened) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let serving = self.serve_opening(
            async {
                match opened.await {
                    Ok(engine) => engine,
                    // It is not going to be one.
                    Err(_) => std::future::pending().await,
                }
            },
            progress,
            async {
                // The sender is dropped when nobody waits for the port any more.
                let _ = stopped.await;
            },
        );
        let mut serving = runtime::spawn(serving);
        // In a task of its own: whatever it waits for, signals are heard meanwhile.
        let mut opening = runtime::spawn(opening);
        let engine = tokio::select! {
            opened = &mut opening => opened.unwrap_or_else(|panic| Err(OpenError::Core(panic.to_string()))),
            signal = signals.next() => {
                tracing::info!(signal, "stopped before the node was open; the next start begins anew");
                opening.abort();
                serving.abort();
                return Ok(StoppedBy::Signal(signal));
            }
            served = &mut serving => {
                opening.abort();
                return Err(port_failed(served));
            }
        };
        let engine = engine.inspect_err(|_| serving.abort())?;
        // Whoever waits for it lives as long as the port is served.
        let _ = give.send(engine.clone());
        tracing::info!(%client, "serving");
        until_stopped(engine, serving, stop, signals).await
    }
}

/// Waits for what stops a node that is open, and stops it by `stop`.
async fn until_stopped<M: StateMachine>(
    engine: Engine<M>,
    mut serving: JoinHandle<Result<(), ServeError>>,
    stop: oneshot::Sender<()>,
    mut signals: StopSignals,
) -> Result<StoppedBy, RunError> {
    let stopped_by = tokio::select! {
        biased;
        ended = ended(&engine) => match ended {
            Some(fatal) => return Err(at_once(engine, RunError::Fatal(fatal))),
            None => StoppedBy::Program,
        },
        served = &mut serving => {
            let failed = port_failed(served);
            if let RunError::Serve(_) = failed {
                engine.shutdown().await;
            }
            return Err(failed);
        }
        signal = signals.next() => StoppedBy::Signal(signal),
    };
    if let StoppedBy::Signal(signal) = stopped_by {
        tracing::info!(signal, "stopping; a second signal exits at once");
    }
    let _ = stop.send(());
    let stopping = engine.clone();
    // In a task of its own, for the same reason as above.
    let in_order = runtime::spawn(async move {
        let served = serving.await;
        stopping.shutdown().await;
        served
    });
    let fatal = async {
        match ended(&engine).await {
            Some(fatal) => fatal,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        fatal = fatal => Err(at_once(engine, RunError::Fatal(fatal))),
        signal = signals.next() => {
            tracing::warn!(signal, "exiting at once");
            Err(at_once(engine, RunError::SecondSignal(signal)))
        }
        served = in_order => match served {
            Ok(Ok(Ok(()))) => {
                tracing::info!("stopped");
                Ok(stopped_by)
            }
            Ok(served) => Err(port_failed(served)),
            Err(panic) => Err(RunError::Port(panic.to_string())),
        },
    }
}

/// Waits for the end of the node: with a fatal error, or in order.
async fn ended<M: StateMachine>(engine: &Engine<M>) -> Option<FatalError> {
    let has_ended = |state: &NodeState| state.fatal.is_some() || state.role == Role::Stopped;
    engine.wait_for(has_ended).await.and_then(|state| state.fatal)
}

/// The port has ended, and nobody had asked for it.
fn port_failed(served: Result<Result<(), ServeError>, JoinError>) -> RunError {
    match served {
        Ok(Ok(())) => RunError::Port("it has ended although nobody asked for it".to_owned()),
        Ok(Err(error)) => RunError::Serve(error),
        Err(panic) => RunError::Port(panic.to_string()),
    }
}

/// `error`, with the engine left as it is: its last handle waits for the writer of its log, which may hang.
fn at_once<M: StateMachine>(engine: Engine<M>, error: RunError) -> RunError {
    std::mem::forget(engine);
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_at_fault_have_an_exit_code_of_their_own() {
        assert_eq!(RunError::from(OpenError::Config("x".to_owned())).exit_code(), EXIT_INVALID);
        assert_eq!(RunError::from(OpenError::Core("x".to_owned())).exit_code(), EXIT_ERROR);
        assert_eq!(RunError::SecondSignal("SIGTERM").exit_code(), EXIT_ERROR);
        let fatal = RunError::Fatal(FatalError::StuckTransfer);
        assert!(fatal.to_string().starts_with("the node has stopped: "), "{fatal}");
    }
}
