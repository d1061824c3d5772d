//! Where the log lines of a process go: a bounded queue, and one thread that writes them out.
//!
//! Standard error may be anything: a pipe whose reader is gone, a file on a full disk, a terminal that is stopped. A
//! write to it fails, or does not come back. Neither may touch the node: its tasks only put lines into the queue, which
//! never waits. A line that finds the queue full, or that cannot be written, is dropped and counted, and the log says how
//! many are missing as soon as it can be written again.
//!
//! # Promises
//! - [`LogWriter`] takes any number of lines without ever waiting for the output, failing or panicking.
//! - It holds [`MAX_QUEUED_BYTES`] at most, and what one write takes.
//! - [`flush`] and [`last_words`] return within [`FLUSH_PATIENCE`], whatever the output does. So a process that must end
//!   ends.
//!
//! It does not write to the standard library's `stderr()`: whoever holds that lock while the output hangs would hold up
//! everybody who wants to say something, a panicking task included.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

#[cfg(feature = "cli")]
use tracing_subscriber::fmt::MakeWriter;

/// Bytes of lines that wait to be written; more are dropped.
pub(crate) const MAX_QUEUED_BYTES: usize = 1024 * 1024;
/// A longer line is cut, and ends with a mark.
pub(crate) const MAX_LINE_BYTES: usize = 64 * 1024;
/// How long the end of a process waits for its last lines to be written.
pub(crate) const FLUSH_PATIENCE: Duration = Duration::from_secs(1);

/// Ends a line that was cut.
const CUT: &[u8] = b"... (cut)\n";
/// Lines are written together up to so many bytes.
const WRITE_BYTES: usize = 64 * 1024;
/// An output in non-blocking mode that takes nothing is asked again after this pause.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// For so long; then what was to be written is dropped.
const RETRY_PATIENCE: Duration = Duration::from_secs(1);

/// What the process has for its standard error, once it has said something through it.
static PROCESS: OnceLock<LogWriter> = OnceLock::new();

/// Takes lines, and has a thread of its own write them. Cheap to clone; all clones are the same queue.
#[derive(Debug, Clone)]
pub(crate) struct LogWriter(Arc<SharedLines>);

#[derive(Debug, Default)]
struct SharedLines {
    queue: Mutex<LineQueue>,
    changed: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct LineQueue {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The thread has taken lines that are not written yet.
    writing: bool,
}

impl SharedLines {
    fn lock(&self) -> MutexGuard<'_, LineQueue> {
        // No panic happens under this lock. If one ever did, the log would be the last thing to give up.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for lines, and takes as many as one write should have. Returns their bytes and their number.
    fn take(&self) -> (Vec<u8>, u64) {
        let mut queue = self.lock();
        while queue.lines.is_empty() {
            queue.writing = false;
            self.changed.notify_all();
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let (mut bytes, mut count) = (Vec::new(), 0);
        while let Some(line) =
            queue.lines.pop_front_if(|line| bytes.is_empty() || bytes.len() + line.len() <= WRITE_BYTES)
        {
            queue.bytes -= line.len();
            bytes.extend_from_slice(&line);
            count += 1;
        }
        queue.writing = true;
        (bytes, count)
    }

    /// Body of the thread.
    fn write_out(&self, out: &mut dyn Write) {
        // Whether the last write ended within a line, and how many missing lines the log has told of.
        let (mut torn, mut told) = (false, 0);
        loop {
            let (mut bytes, count) = self.take();
            if torn {
                bytes.insert(0, b'\n');
            }
            match write_patiently(out, &bytes) {
                Ok(()) => {
                    torn = false;
                    let dropped = self.dropped.load(Relaxed);
                    if dropped > told {
                        tracing::warn!(
                            lines = dropped - told,
                            "lines are missing here: the log could not be written"
                        );
                        told = dropped;
                    }
                }
                Err(Unwritten { ended_within_a_line }) => {
                    torn |= ended_within_a_line;
                    self.dropped.fetch_add(count, Relaxed);
                }
            }
        }
    }
}

/// Not everything was written.
struct Unwritten {
    ended_within_a_line: bool,
}

fn write_patiently(out: &mut dyn Write, bytes: &[u8]) -> Result<(), Unwritten> {
    let mut written = 0;
    let mut waiting_since = None;
    while written < bytes.len() {
        match out.write(&bytes[written..]) {
            Ok(count) if count > 0 => {
                written += count;
                waiting_since = None;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error)
                if error.kind() == ErrorKind::WouldBlock
                    && waiting_since.get_or_insert_with(Instant::now).elapsed() < RETRY_PATIENCE =>
            {
                std::thread::sleep(RETRY_PAUSE);
            }
            Ok(_) | Err(_) => {
                let ended_within_a_line = written > 0 && bytes[written - 1] != b'\n';
                return Err(Unwritten { ended_within_a_line });
            }
        }
    }
    Ok(())
}

impl LogWriter {
    /// Starts the thread that writes to `out`. It goes with the process.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub(crate) fn start(mut out: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(SharedLines::default());
        let for_thread = shared.clone();
        std::thread::Builder::new()
            .name("log-lines".to_owned())
            .spawn(move || for_thread.write_out(&mut out))?;
        Ok(Self(shared))
    }

    /// Puts `line`, which ends with a line feed, into the queue, or drops it.
    pub(crate) fn line(&self, line: &[u8]) {
        let line = cut(line);
        let mut queue = self.0.lock();
        if queue.bytes + line.len() > MAX_QUEUED_BYTES {
            drop(queue);
            self.0.dropped.fetch_add(1, Relaxed);
            return;
        }
        queue.bytes += line.len();
        queue.lines.push_back(line);
        drop(queue);
        self.0.changed.notify_all();
    }

    /// Puts `line` into the queue, whatever has to give way there.
    fn urgent_line(&self, line: &[u8]) {
        let line = cut(line);
        let mut queue = self.0.lock();
        while queue.bytes + line.len() > MAX_QUEUED_BYTES
            && let Some(oldest) = queue.lines.pop_front()
        {
            queue.bytes -= oldest.len();
            self.0.dropped.fetch_add(1, Relaxed);
        }
        queue.bytes += line.len();
        queue.lines.push_back(line);
        drop(queue);
        self.0.changed.notify_all();
    }

    /// Waits until all lines are written or dropped, but no longer than `patience`. Whether they are.
    pub(crate) fn flush(&self, patience: Duration) -> bool {
        let queue = self.0.lock();
        let waited = self
            .0
            .changed
            .wait_timeout_while(queue, patience, |queue| queue.writing || !queue.lines.is_empty());
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Lines that were never written.
    pub(crate) fn dropped_lines(&self) -> u64 {
        self.0.dropped.load(Relaxed)
    }
}

/// No longer than [`MAX_LINE_BYTES`].
fn cut(line: &[u8]) -> Vec<u8> {
    if line.len() <= MAX_LINE_BYTES {
        return line.to_vec();
    }
    let mut short = line[..MAX_LINE_BYTES - CUT.len()].to_vec();
    short.extend_from_slice(CUT);
    short
}

/// Every write is a line: so `tracing` does it.
impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(feature = "cli")]
impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// A handle of its own to what `output` writes to, without the standard library's lock and buffer.
///
/// # Errors
/// When too many files are open.
pub(crate) fn unlocked(output: &impl AsFd) -> io::Result<File> {
    let handle: OwnedFd = output.as_fd().try_clone_to_owned()?;
    Ok(File::from(handle))
}

/// The writer of this process's standard error; its thread starts with the first call.
fn of_process() -> io::Result<LogWriter> {
    if let Some(writer) = PROCESS.get() {
        return Ok(writer.clone());
    }
    let writer = LogWriter::start(unlocked(&io::stderr())?)?;
    Ok(PROCESS.get_or_init(|| writer).clone())
}

/// The writer of this process's standard error. From the first call on, panics are reported through it too, as log
/// lines: the standard library's own report would wait for an output that hangs.
///
/// # Errors
/// When the system has no thread, or no file, to give.
pub(crate) fn start() -> io::Result<LogWriter> {
    let writer = of_process()?;
    std::panic::set_hook(Box::new(report_panic));
    Ok(writer)
}

fn report_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let message = panic.payload_as_str().unwrap_or("no message");
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    let backtrace = std::backtrace::Backtrace::capture();
    match backtrace.status() {
        std::backtrace::BacktraceStatus::Captured => {
            tracing::error!(thread, location, %backtrace, "panicked: {message}");
        }
        _ => tracing::error!(thread, location, "panicked: {message}"),
    }
}

/// Waits until the lines of this process are written, for [`FLUSH_PATIENCE`] at most. To be called before the process
/// ends. Does nothing in one that has said nothing through it.
#[cfg_attr(not(feature = "cli"), allow(dead_code, unreachable_pub))] // for programs
pub fn flush() {
    if let Some(writer) = PROCESS.get() {
        writer.flush(FLUSH_PATIENCE);
    }
}

/// Says `text`, some lines, as the last that this process has to say, ahead of nothing but what waits already; older
/// lines give way to it. Returns within [`FLUSH_PATIENCE`], whether it could be written or not.
#[cfg_attr(not(feature = "cli"), allow(dead_code, unreachable_pub))] // for programs
pub fn last_words(text: &str) {
    match of_process() {
        Ok(writer) => {
            writer.urgent_line(text.as_bytes());
            writer.flush(FLUSH_PATIENCE);
        }
        // A system without a thread to give. Nobody is left to complain to if this fails, too.
        Err(_) => drop(io::stderr().lock().write_all(text.as_bytes())),
    }
}

/// Log lines of this process that were never written.
pub(crate) fn dropped_lines() -> u64 {
    PROCESS.get().map_or(0, LogWriter::dropped_lines)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::mpsc;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(30);

    /// Takes what it is given once it is told to, and fails while it is told to.
    struct Output {
        permits: mpsc::Receiver<io::Result<()>>,
        written: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.permits.recv().unwrap_or(Ok(()))?;
            // Nobody may listen any more.
            let _ = self.written.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn output() -> (LogWriter, mpsc::Sender<io::Result<()>>, mpsc::Receiver<Vec<u8>>) {
        let (permit, permits) = mpsc::channel();
        let (sender, written) = mpsc::channel();
        (LogWriter::start(Output { permits, written: sender }).unwrap(), permit, written)
    }

    #[test]
    fn an_output_that_hangs_costs_lines_and_nothing_else() {
        let (writer, permit, written) = output();
        let line = [b'x'; 1023].iter().chain(b"\n").copied().collect::<Vec<_>>();
        let lines = 4 * MAX_QUEUED_BYTES / line.len();
        for _ in 0..lines {
            writer.line(&line);
        }
        let held = MAX_QUEUED_BYTES + WRITE_BYTES;
        let dropped = writer.dropped_lines() as usize;
        assert!((lines - dropped) * line.len() <= held, "{dropped} of {lines} were dropped");
        assert!(!writer.flush(Duration::from_millis(1)), "nothing was written");
        // It comes back: what was queued is written, in order, and nothing is lost any more.
        drop(permit);
        assert!(writer.flush(DEADLINE));
        writer.line(b"last\n");
        assert!(writer.flush(DEADLINE));
        let all: Vec<u8> = written.try_iter().flatten().collect();
        assert_eq!(all.len(), (lines - dropped) * line.len() + 5);
        assert!(all.ends_with(b"x\nlast\n"));
        assert_eq!(writer.dropped_lines() as usize, dropped);
    }

    #[test]
    fn what_an_output_refuses_is_counted_and_the_next_line_begins_anew() {
        let (writer, permit, written) = output();
        for error in [ErrorKind::BrokenPipe, ErrorKind::StorageFull, ErrorKind::WriteZero] {
            permit.send(Err(error.into())).unwrap();
            writer.line(b"lost\n");
            assert!(writer.flush(DEADLINE), "{error:?}");
        }
        assert_eq!(writer.dropped_lines(), 3);
        permit.send(Ok(())).unwrap();
        writer.line(b"kept\n");
        assert!(writer.flush(DEADLINE));
        assert_eq!(written.try_iter().collect::<Vec<_>>(), [b"kept\n"]);
    }

    /// A disk that fills up in the middle of a line.
    #[test]
    fn half_a_line_is_ended_before_the_next_one() {
        struct Half(Vec<usize>, mpsc::Sender<Vec<u8>>);
        impl Write for Half {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let count = self.0.pop().unwrap_or(bytes.len()).min(bytes.len());
                if count == 0 {
                    return Err(ErrorKind::StorageFull.into());
                }
                let _ = self.1.send(bytes[..count].to_vec());
                Ok(count)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (sender, written) = mpsc::channel();
        let writer = LogWriter::start(Half(vec![0, 3], sender)).unwrap();
        writer.line(b"half a line\n");
        assert!(writer.flush(DEADLINE));
        writer.line(b"whole\n");
        assert!(writer.flush(DEADLINE));
        assert_eq!(written.try_iter().flatten().collect::<Vec<_>>(), b"hal\nwhole\n");
        assert_eq!(writer.dropped_lines(), 1);
    }

    #[test]
    fn last_words_find_room_in_a_full_queue() {
        let (writer, permit, written) = output();
        for _ in 0..2 * MAX_QUEUED_BYTES / 1000 {
            writer.line(&[&[b'x'; 999][..], b"\n"].concat());
        }
        let dropped = writer.dropped_lines();
        writer.urgent_line(b"error: the end\n");
        assert!(writer.dropped_lines() <= dropped + 1, "one gave way, or none had to");
        drop(permit);
        assert!(writer.flush(DEADLINE));
        assert!(written.try_iter().flatten().collect::<Vec<_>>().ends_with(b"error: the end\n"));
    }

    #[test]
    fn a_long_line_is_cut_and_a_pipe_is_read_in_order() {
        let (mut reader, pipe) = io::pipe().unwrap();
        let writer = LogWriter::start(unlocked(&pipe).unwrap()).unwrap();
        drop(pipe);
        writer.line(&vec![b'y'; 2 * MAX_LINE_BYTES]);
        writer.line(b"next\n");
        let mut read = vec![0; MAX_LINE_BYTES + 5];
        reader.read_exact(&mut read).unwrap();
        assert!(read.ends_with(&[CUT, b"next\n"].concat()));
        // Nobody reads any more.
        drop(reader);
        writer.line(b"gone\n");
        assert!(writer.flush(DEADLINE));
        assert_eq!(writer.dropped_lines(), 1);
    }
}
