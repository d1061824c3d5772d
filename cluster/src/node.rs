//! One node's process, from start to exit status.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, PipeReader, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::error::ClusterError;
use crate::http;
use crate::record::Record;
use crate::spawn;
use crate::spec::ClusterSpec;

/// Pause between two looks at a process or a readiness page.
const POLL_INTERVAL_MS: u64 = 5;
/// Longest wait for one answer from `/readyz`.
const READY_TIMEOUT_MS: u64 = 500;
/// Lines of output quoted in an error.
const TAIL_LINES: usize = 20;
/// Most bytes read from the end of the output to find them.
const TAIL_BYTES: u64 = 64 * 1024;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The process.
    pub pid: u32,
    /// Its exit code or signal.
    pub status: ExitStatus,
}

/// One node of a [`Cluster`](crate::Cluster). All methods may be called from any thread.
#[derive(Debug)]
pub struct Node {
    node_id: u64,
    spec: Arc<ClusterSpec>,
    record: Arc<Record>,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Never,
    Running {
        child: Child,
        paused: bool,
        /// Of its standard error, if that is not to be read.
        _unread: Option<PipeReader>,
    },
    Ended(Exit),
}

impl Node {
    pub(crate) fn new(node_id: u64, spec: Arc<ClusterSpec>, record: Arc<Record>) -> Self {
        Self { node_id, spec, record, state: Mutex::new(State::Never) }
    }

    /// Its id.
    pub fn node_id(&self) -> u64 {
        self.node_id
    }

    /// `host:port` for clients.
    pub fn client_address(&self) -> String {
        self.spec.client_address(self.node_id)
    }

    /// `host:port` for peers.
    pub fn peer_address(&self) -> String {
        self.spec.peer_address(self.node_id)
    }

    /// The node's own `--data-dir`.
    pub fn data_dir(&self) -> PathBuf {
        self.spec.node_data_dir(self.node_id)
    }

    /// Where standard output and error of all its runs are appended.
    pub fn log_path(&self) -> PathBuf {
        self.spec.node_log(self.node_id)
    }

    /// The last `lines` lines of its output, at most 64 KiB.
    pub fn log_tail(&self, lines: usize) -> String {
        let read = || -> io::Result<VecDeque<String>> {
            let mut file = fs::File::open(self.log_path())?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
            let mut tail = VecDeque::new();
            for line in BufReader::new(file).split(b'\n') {
                if tail.len() == lines {
                    tail.pop_front();
                }
                tail.push_back(String::from_utf8_lossy(&line?).into_owned());
            }
            Ok(tail)
        };
        match read() {
            Ok(tail) => Vec::from(tail).join("\n"),
            Err(error) => format!("(cannot be read: {error})"),
        }
    }

    /// The command that runs this node, for a shell.
    pub fn command_line(&self) -> String {
        self.spec.command_line(self.node_id)
    }

    /// Its process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        match &*self.current() {
            State::Running { child, .. } => Some(child.id()),
            State::Never | State::Ended(_) => None,
        }
    }

    /// How its last process ended; `None` while it runs and before it was ever started.
    pub fn exit(&self) -> Option<Exit> {
        match &*self.current() {
            State::Ended(exit) => Some(*exit),
            State::Never | State::Running { .. } => None,
        }
    }

    /// Starts its process. Returns at once; see [`Node::wait_ready`].
    ///
    /// # Errors
    /// [`ClusterError::AlreadyRunning`], [`ClusterError::Io`].
    pub fn start(&self) -> Result<u32, ClusterError> {
        self.start_with::<&str>(&[])
    }

    /// [`Node::start`] with further arguments for this run.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn start_with<A: AsRef<OsStr>>(&self, args: &[A]) -> Result<u32, ClusterError> {
        let mut state = self.current();
        if let State::Running { child, .. } = &*state {
            return Err(ClusterError::AlreadyRunning { node_id: self.node_id, pid: child.id() });
        }
        let dir = self.spec.node_dir(self.node_id);
        fs::create_dir_all(&dir).map_err(ClusterError::io("cannot create", &dir))?;
        let log_path = self.log_path();
        let open = OpenOptions::new().create(true).append(true).open(&log_path);
        let (stdout, stderr) = open
            .and_then(|log| Ok((log.try_clone()?, log)))
            .map_err(ClusterError::io("cannot open", &log_path))?;

        let mut command = self.spec.command(self.node_id);
        let stderr =
            self.spec.stderr.open(stderr).map_err(ClusterError::io("cannot lead astray", &log_path))?;
        command.args(args).stdin(Stdio::null()).stdout(stdout).stderr(stderr.stdio);
        // Ctrl-C in a terminal reaches its whole foreground group. It is for whoever runs the cluster to
        // stop the nodes, in order.
        command.process_group(0);
        let child = spawn::spawn(command).map_err(ClusterError::io("cannot start", &self.spec.binary))?;
        let pid = child.id();
        *state = State::Running { child, paused: false, _unread: stderr.reader };
        self.record.set_pid(self.node_id, Some(pid))?;
        Ok(pid)
    }

    /// Asks it to stop (SIGTERM) and waits. Resumes it first if it was paused.
    ///
    /// # Errors
    /// [`ClusterError::NotRunning`]; [`ClusterError::StillRunning`] after `deadline`.
    pub fn stop(&self, deadline: Duration) -> Result<Exit, ClusterError> {
        self.resume()?;
        self.signal(Signal::TERM)?;
        self.wait_exit(deadline)
    }

    /// Kills it (SIGKILL) and reaps it: what a crash of the process does, not what a power cut does.
    ///
    /// # Errors
    /// [`ClusterError::NotRunning`], [`ClusterError::Signal`].
    pub fn kill(&self) -> Result<Exit, ClusterError> {
        let mut state = self.current();
        let State::Running { child, .. } = &mut *state else {
            return Err(ClusterError::NotRunning { node_id: self.node_id });
        };
        let pid = child.id();
        let status = child.kill().and_then(|()| child.wait());
        let status = status.map_err(|source| ClusterError::Signal { node_id: self.node_id, pid, source })?;
        let exit = Exit { pid, status };
        *state = State::Ended(exit);
        self.record.set_pid(self.node_id, None)?;
        Ok(exit)
    }

    /// Freezes it where it stands (SIGSTOP). Its sockets stay open and fall silent.
    ///
    /// # Errors
    /// [`ClusterError::NotRunning`], [`ClusterError::Signal`].
    pub fn pause(&self) -> Result<(), ClusterError> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on (SIGCONT). No effect when it is not paused.
    ///
    /// # Errors
    /// [`ClusterError::NotRunning`], [`ClusterError::Signal`].
    pub fn resume(&self) -> Result<(), ClusterError> {
        self.signal(Signal::CONT)
    }

    /// Whether it is paused by [`Node::pause`].
    pub fn is_paused(&self) -> bool {
        matches!(&*self.current(), State::Running { paused: true, .. })
    }

    /// Stops it in order if it runs, and starts it again.
    ///
    /// # Errors
    /// As [`Node::stop`] and [`Node::start`].
    pub fn restart(&self, deadline: Duration) -> Result<u32, ClusterError> {
        match self.stop(deadline) {
            Ok(_) | Err(ClusterError::NotRunning { .. }) => self.start(),
            Err(error) => Err(error),
        }
    }

    /// Waits until its process has ended.
    ///
    /// # Errors
    /// [`ClusterError::StillRunning`] after `deadline`; [`ClusterError::NotRunning`] if it never ran.
    pub fn wait_exit(&self, deadline: Duration) -> Result<Exit, ClusterError> {
        let start = Instant::now();
        loop {
            match &*self.current() {
                State::Ended(exit) => return Ok(*exit),
                State::Never => return Err(ClusterError::NotRunning { node_id: self.node_id }),
                State::Running { child, .. } if start.elapsed() >= deadline => {
                    return Err(ClusterError::StillRunning {
                        node_id: self.node_id,
                        pid: child.id(),
                        waited_ms: start.elapsed().as_millis(),
                        log: self.log_path(),
                    });
                }
                State::Running { .. } => {}
            }
            thread::sleep(Duration::from_millis(POLL_INTERVAL_MS));
        }
    }

    /// Whether it answers `/readyz` with 200: it knows a leader and has caught up.
    pub fn is_ready(&self) -> bool {
        self.readiness() == Ok(200)
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// [`ClusterError::Exited`] when its process ends; [`ClusterError::NotReady`] after `deadline`, with the
    /// end of its output.
    pub fn wait_ready(&self, deadline: Duration) -> Result<(), ClusterError> {
        let start = Instant::now();
        loop {
            // Looked at first: a process that has ended may have left its port to somebody else.
            match &*self.current() {
                State::Running { .. } => {}
                State::Never => return Err(ClusterError::NotRunning { node_id: self.node_id }),
                State::Ended(exit) => {
                    return Err(ClusterError::Exited {
                        node_id: self.node_id,
                        pid: exit.pid,
                        status: exit.status,
                        log: self.log_path(),
                        tail: self.log_tail(TAIL_LINES),
                    });
                }
            }
            let last = match self.readiness() {
                Ok(200) => return Ok(()),
                Ok(code) => format!("/readyz answers {code}"),
                Err(why) => why,
            };
            if start.elapsed() >= deadline {
                return Err(ClusterError::NotReady {
                    node_id: self.node_id,
                    waited_ms: start.elapsed().as_millis(),
                    last,
                    log: self.log_path(),
                    tail: self.log_tail(TAIL_LINES),
                });
            }
            thread::sleep(Duration::from_millis(POLL_INTERVAL_MS));
        }
    }

    fn readiness(&self) -> Result<u16, String> {
        let timeout = Duration::from_millis(READY_TIMEOUT_MS);
        http::status_code(&self.client_address(), "/readyz", timeout).map_err(|error| error.to_string())
    }

    fn signal(&self, signal: Signal) -> Result<(), ClusterError> {
        let mut state = self.current();
        let State::Running { child, paused, .. } = &mut *state else {
            return Err(ClusterError::NotRunning { node_id: self.node_id });
        };
        // The child is not reaped while `state` is locked, so the id cannot have passed to another process.
        let pid = child.id();
        kill_process(Pid::from_child(child), signal).map_err(|errno| ClusterError::Signal {
            node_id: self.node_id,
            pid,
            source: errno.into(),
        })?;
        match signal {
            Signal::STOP => *paused = true,
            Signal::CONT => *paused = false,
            _ => {}
        }
        Ok(())
    }

    /// The state after reaping a process that has ended by itself.
    fn current(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere must not keep the processes from being killed.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Running { child, .. } = &mut *state
            && let Ok(Some(status)) = child.try_wait()
        {
            *state = State::Ended(Exit { pid: child.id(), status });
            // A record that cannot be written now will be with the next change; the exit is what matters.
            let _ = self.record.set_pid(self.node_id, None);
        }
        state
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The only failures are that it does not run, and that it has ended in this moment.
        let _ = self.kill();
    }
}
