//! The one place where production code takes its clock, its randomness and its tasks from.
//!
//! Simulation replaces all three: time is tokio's paused clock, random numbers come from one seed,
//! blocking work runs inline so that no thread's speed shows, and the tasks of one simulated node
//! form a [`TaskGroup`] that a crash aborts. Outside simulation every function here is a thin call
//! to tokio, the operating system's clock or its random numbers. `clippy.toml` keeps the direct calls
//! out of the rest of the code. The tasks that a node cannot do without form its [`Tasks`].

#![allow(clippy::disallowed_methods)] // the exception that the rule points to

mod tasks;

use std::cell::RefCell;
use std::future::Future;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use futures::future::BoxFuture;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::task::{AbortHandle, JoinHandle};

pub(crate) use tasks::panic_message;
pub use tasks::{TaskFailure, Tasks};

thread_local! {
    static SIMULATION: RefCell<Option<Simulation>> = const { RefCell::new(None) };
}

tokio::task_local! {
    static TASK_GROUP: Arc<TaskGroup>;
}

/// The state of a simulated world on this thread.
struct Simulation {
    rng: SmallRng,
    start: tokio::time::Instant,
}

/// The wall clock of a simulation starts here: 2026-01-01T00:00:00Z.
const SIMULATED_EPOCH_MS: u64 = 1_767_225_600_000;

/// Makes this thread a simulated world until the guard is dropped. Call inside a current-thread tokio
/// runtime with a paused clock and a seeded scheduler.
#[doc(hidden)]
pub fn simulate(seed: u64) -> SimulationGuard {
    SIMULATION
        .set(Some(Simulation { rng: SmallRng::seed_from_u64(seed), start: tokio::time::Instant::now() }));
    SimulationGuard
}

/// Ends the simulated world on this thread when dropped.
#[doc(hidden)]
#[derive(Debug)]
pub struct SimulationGuard;

impl Drop for SimulationGuard {
    fn drop(&mut self) {
        SIMULATION.set(None);
    }
}

/// A random number, from the simulation's seed inside a simulation.
pub fn random_u64() -> u64 {
    SIMULATION.with_borrow_mut(|simulation| match simulation {
        Some(simulation) => simulation.rng.next_u64(),
        None => rand::random(),
    })
}

/// Whole milliseconds, as they are logged.
pub fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds since the Unix epoch, by this node's wall clock; 0 if that is set to before the epoch.
pub fn unix_time_ms() -> u64 {
    WallClock::of_this_node().unix_time_ms()
}

/// The wall clock of one node, for tasks that do not belong to it: a caller of a simulated node has another clock.
#[derive(Debug, Clone, Default)]
pub struct WallClock {
    node: Option<Arc<TaskGroup>>,
}

impl WallClock {
    /// The clock of the node that the present task belongs to.
    pub fn of_this_node() -> Self {
        Self { node: TASK_GROUP.try_with(Arc::clone).ok() }
    }

    /// Milliseconds since the Unix epoch; 0 if the clock is set to before the epoch.
    pub fn unix_time_ms(&self) -> u64 {
        let world_ms = SIMULATION.with_borrow(|simulation| match simulation {
            Some(simulation) => SIMULATED_EPOCH_MS + millis(simulation.start.elapsed()),
            None => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis),
        });
        let shift_ms = self.node.as_ref().map_or(0, |node| node.wall_shift_ms.load(Ordering::Relaxed));
        world_ms.saturating_add_signed(shift_ms)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Runs `work`, which may block, without holding up other tasks.
///
///
/// # Panics
/// Panics when `work` does.
pub async fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    if SIMULATION.with_borrow(Option::is_some) {
        // As slow as a disk may be, in virtual time.
        tokio::time::sleep(Duration::from_micros(random_u64() % 20_000)).await;
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Spawns a task, into the spawner's [`TaskGroup`] if it belongs to one.
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    spawn_boxed(future.boxed())
}

/// What a task is made of does not depend on what it runs: tokio's part of it, and the future with it, would be compiled
/// four times for each kind of task, which was a fifth of the program.
fn spawn_boxed<T: Send + 'static>(future: BoxFuture<'static, T>) -> JoinHandle<T> {
    match TASK_GROUP.try_with(Arc::clone) {
        Err(_) => tokio::spawn(future),
        Ok(group) => {
            let task = tokio::spawn(TASK_GROUP.scope(group.clone(), future));
            group.register(task.abort_handle());
            task
        }
    }
}

/// Spawns tasks where it was made, from any thread.
#[derive(Debug, Clone)]
pub struct Spawner {
    handle: tokio::runtime::Handle,
    group: Option<Arc<TaskGroup>>,
}

impl Spawner {
    /// One that spawns as the present task would.
    ///
    /// # Panics
    /// Panics outside a tokio runtime.
    pub fn of_this_task() -> Self {
        Self { handle: tokio::runtime::Handle::current(), group: TASK_GROUP.try_with(Arc::clone).ok() }
    }

    /// Spawns a task that nobody waits for.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        let future = future.boxed();
        match &self.group {
            None => drop(self.handle.spawn(future)),
            Some(group) => {
                let task = self.handle.spawn(TASK_GROUP.scope(group.clone(), future));
                group.register(task.abort_handle());
            }
        }
    }
}

/// All tasks of one simulated node.
#[doc(hidden)]
#[derive(Debug, Default)]
pub struct TaskGroup {
    tasks: Mutex<Vec<AbortHandle>>,
    /// How far the node's wall clock is ahead of the world's, in milliseconds.
    wall_shift_ms: AtomicI64,
}

impl TaskGroup {
    /// Spawns `future` as the first task of a group: all tasks that it spawns join the group.
    pub fn spawn<F>(self: &Arc<Self>, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let task = tokio::spawn(TASK_GROUP.scope(self.clone(), future.boxed()));
        self.register(task.abort_handle());
        task
    }

    /// Sets the node's wall clock to be ahead of the world's by `shift_ms`.
    pub fn shift_wall_clock(&self, shift_ms: i64) {
        self.wall_shift_ms.store(shift_ms, Ordering::Relaxed);
    }

    fn register(&self, task: AbortHandle) {
        let mut tasks = self.tasks.lock().expect("invariant: no panic under this lock");
        /// Finished tasks are forgotten whenever the list has grown by this many.
        const SWEEP_TASKS: usize = 256;
        if tasks.len() % SWEEP_TASKS == SWEEP_TASKS - 1 {
            tasks.retain(|task| !task.is_finished());
        }
        tasks.push(task);
    }

    /// Ends every task of the group where it stands, as a crash of its process would.
    pub fn abort(&self) {
        for task in self.tasks.lock().expect("invariant: no panic under this lock").drain(..) {
            task.abort();
        }
    }
}
