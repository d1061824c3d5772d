//! Concurrent callers that write one fresh key after the other until told to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use quorate::kv::client::{Client, ClientError, Scope};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::set::{Attempt, Outcome};

/// The callers of one run.
pub struct Writers {
    callers: JoinSet<Vec<Attempt>>,
    acknowledged: watch::Receiver<u64>,
    stop: Arc<AtomicBool>,
}

impl Writers {
    /// Starts `callers` callers, whose keys begin with `run`. Times are counted from `began`.
    pub fn start(client: &Client, run: &str, callers: u32, began: Instant) -> Self {
        let (progress, acknowledged) = watch::channel(0);
        let progress = Arc::new(progress);
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for caller in 0..callers {
            let caller = Caller {
                client: client.clone(),
                caller,
                run: run.to_owned(),
                began,
                progress: progress.clone(),
                stop: stop.clone(),
            };
            tasks.spawn(caller.write_on());
        }
        Self { callers: tasks, acknowledged, stop }
    }

    /// How many writes have been acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        *self.acknowledged.borrow()
    }

    /// Waits until `count` writes have been acknowledged in all. False if `deadline` passes first.
    pub async fn reached(&mut self, count: u64, deadline: Duration) -> bool {
        let reached = self.acknowledged.wait_for(|acknowledged| *acknowledged >= count);
        // An error: all callers have ended, and what they reached will not change.
        matches!(tokio::time::timeout(deadline, reached).await, Ok(Ok(_)))
    }

    /// Lets every caller end what it has begun; returns all that was attempted.
    ///
    /// # Panics
    /// Panics when a caller has.
    pub async fn finish(self) -> Vec<Attempt> {
        self.stop.store(true, Ordering::Relaxed);
        self.callers.join_all().await.into_iter().flatten().collect()
    }
}

struct Caller {
    client: Client,
    caller: u32,
    run: String,
    began: Instant,
    progress: Arc<watch::Sender<u64>>,
    stop: Arc<AtomicBool>,
}

impl Caller {
    async fn write_on(self) -> Vec<Attempt> {
        let mut attempts = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let number = attempts.len();
            let key = format!("{}-{:02}-{number:06}", self.run, self.caller);
            let value = format!("value {number} of caller {} in {}", self.caller, self.run);
            let started_ms = self.elapsed_ms();
            let outcome = match self.client.put(&Scope::default(), key.clone(), value.clone()).await {
                Ok(reply) => {
                    self.progress.send_modify(|count| *count += 1);
                    let position = reply.header.position.unwrap_or_default();
                    Outcome::Acknowledged {
                        node_id: reply.header.node_id,
                        term: position.term,
                        index: position.index,
                    }
                }
                Err(error) if error.maybe_applied() => Outcome::Unknown { error: error.to_string() },
                Err(error) => {
                    // What is wrong with one request is wrong with the next one too.
                    let hopeless = matches!(error, ClientError::Rejected { .. });
                    if hopeless {
                        self.stop.store(true, Ordering::Relaxed);
                    }
                    Outcome::Refused { error: error.to_string() }
                }
            };
            let ended_ms = self.elapsed_ms();
            attempts.push(Attempt { caller: self.caller, key, value, started_ms, ended_ms, outcome });
        }
        attempts
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
