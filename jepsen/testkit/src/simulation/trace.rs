//! What happened, in order, as a hash and on request as text.

use std::fmt::Write as _;
use std::sync::Mutex;

use tokio::time::Instant;
use xxhash_rust::xxh3::Xxh3;

/// What happened, in order.
pub struct Trace {
    start: Instant,
    state: Mutex<State>,
}

struct State {
    hash: Xxh3,
    line: String,
    text: Option<String>,
}

impl std::fmt::Debug for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trace").finish_non_exhaustive()
    }
}

impl Trace {
    /// One that is empty. With `keep_text` it can be read afterwards.
    pub fn new(keep_text: bool) -> Self {
        let state = State { hash: Xxh3::new(), line: String::new(), text: keep_text.then(String::new) };
        Self { start: Instant::now(), state: Mutex::new(state) }
    }

    /// Appends what happened.
    pub fn record(&self, event: std::fmt::Arguments<'_>) {
        let at = self.start.elapsed();
        let mut state = self.state.lock().unwrap();
        let State { hash, line, text } = &mut *state;
        line.clear();
        writeln!(line, "{:>12} {event}", at.as_micros()).unwrap();
        hash.update(line.as_bytes());
        if let Some(text) = text {
            text.push_str(line);
        }
    }

    /// Of all that was recorded, with the times.
    pub fn hash(&self) -> u64 {
        self.state.lock().unwrap().hash.digest()
    }

    /// What was recorded, if it was to be kept.
    pub fn text(&self) -> Option<String> {
        self.state.lock().unwrap().text.clone()
    }
}
