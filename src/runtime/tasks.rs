//! The tasks that a node cannot do without, by name.
//!
//! A task that panics ends alone: nobody hears of it but the log, and what it did for the node is not done any more. So
//! every task that a node needs for as long as it runs is spawned into the node's set, which reports a panic, and an end
//! that nobody asked for. What follows from that is its owner's to decide: a node stops.
//!
//! Tasks are watched from within, by the future that they run: that costs two atomic operations each time it is polled.
//! What it does not do: start a task again, or watch what a task spawns for one request; that is the request's to answer for.

use std::any::Any;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::Context;

use futures::FutureExt;
use futures::task::AtomicWaker;
use tokio::sync::watch;

/// How a task has failed its node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TaskFailure {
    /// It has panicked.
    #[error("has panicked: {message}")]
    Panicked {
        /// What the panic said.
        message: String,
    },
    /// It has come to its end, which a task of its kind does only when the node stops.
    #[error("has ended, although nobody has asked it to")]
    Ended,
}

/// A node's set of tasks. Cheap to clone; all clones are the same set.
#[derive(Clone)]
pub struct Tasks(Arc<Set>);

struct Set {
    running: Mutex<Vec<Weak<Task>>>,
    /// True once the node stops; closed when its last handle is gone.
    stop: watch::Receiver<bool>,
    failed: Box<dyn Fn(&'static str, TaskFailure) + Send + Sync>,
}

/// A task that runs.
struct Task {
    name: &'static str,
    /// It is to panic when it is polled next.
    is_to_panic: AtomicBool,
    waker: AtomicWaker,
    polls: AtomicU64,
}

impl std::fmt::Debug for Tasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tasks").field(&self.names()).finish()
    }
}

impl Tasks {
    /// An empty set, for a node that stops when `stop` turns true or is closed. `failed` is called on the thread on which a
    /// task has failed, with the task's name.
    pub fn new(
        stop: watch::Receiver<bool>,
        failed: impl Fn(&'static str, TaskFailure) + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Set { running: Mutex::default(), stop, failed: Box::new(failed) }))
    }

    /// Spawns a task that runs until the node stops. Its own end is a failure, like its panic.
    pub fn permanent(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let set = self.0.clone();
        self.until_stopped(name, task.map(move |()| set.fail(name, TaskFailure::Ended)));
    }

    /// Spawns a task that may come to its end before the node stops: when it has done what it is for, or nobody is left that
    /// it works for. Its panic is a failure.
    pub fn passing(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.until_stopped(name, task);
    }

    fn until_stopped(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let (mut stop, task) = (self.0.stop.clone(), self.watched(name, task));
        super::spawn(async move {
            tokio::select! {
                biased;
                // An error means that every handle to the node is gone.
                _ = stop.wait_for(|stop| *stop) => {}
                () = task => {}
            }
        });
    }

    /// `task`, which is part of the set from now until it has ended, and whose panic is a failure. The panic goes on from
    /// there: whoever joins the task finds it.
    pub fn watched<F>(&self, name: &'static str, task: F) -> impl Future<Output = F::Output> + Send + use<F>
    where
        F: Future + Send,
        F::Output: Send,
    {
        let (set, this) = (self.0.clone(), Arc::new(Task::new(name)));
        set.enter(&this);
        let mut task = Box::pin(task);
        async move {
            let mut is_known = false;
            let polled = poll_fn(|context| {
                this.look(context, &mut is_known);
                task.as_mut().poll(context)
            });
            match AssertUnwindSafe(polled).catch_unwind().await {
                Ok(output) => output,
                Err(panic) => {
                    set.fail(name, TaskFailure::Panicked { message: panic_message(&*panic).to_owned() });
                    resume_unwind(panic)
                }
            }
        }
    }

    /// The names of all tasks that run at present, in their order. Several tasks may have one name.
    pub fn names(&self) -> Vec<&'static str> {
        self.polls().into_keys().collect()
    }

    /// How often the tasks of each name were polled, of those that run at present. What nobody waits for should cost nothing.
    pub fn polls(&self) -> BTreeMap<&'static str, u64> {
        let mut polls = BTreeMap::new();
        for task in self.0.running().iter().filter_map(Weak::upgrade) {
            *polls.entry(task.name).or_default() += task.polls.load(Ordering::Relaxed);
        }
        polls
    }

    /// Has every task of this name panic. False when there is none. For tests of what follows from that.
    #[doc(hidden)]
    pub fn panic_in(&self, name: &str) -> bool {
        let tasks: Vec<_> = self.0.running().iter().filter_map(Weak::upgrade).collect();
        let named = tasks.iter().filter(|task| task.name == name);
        named.inspect(|task| task.panics()).count() > 0
    }
}

impl Set {
    fn running(&self) -> MutexGuard<'_, Vec<Weak<Task>>> {
        self.running.lock().expect("invariant: no panic under this lock")
    }

    fn enter(&self, task: &Arc<Task>) {
        let mut running = self.running();
        running.retain(|task| task.strong_count() > 0);
        running.push(Arc::downgrade(task));
    }

    fn fail(&self, name: &'static str, failure: TaskFailure) {
        (self.failed)(name, failure);
    }
}

impl Task {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            is_to_panic: AtomicBool::new(false),
            waker: AtomicWaker::new(),
            polls: AtomicU64::new(0),
        }
    }

    fn panics(&self) {
        self.is_to_panic.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Panics if it is to. The first look leaves word how to wake the task, which stays the same.
    fn look(&self, context: &Context<'_>, is_known: &mut bool) {
        if !*is_known {
            self.waker.register(context.waker());
            *is_known = true;
        }
        self.polls.fetch_add(1, Ordering::Relaxed);
        if self.is_to_panic.load(Ordering::Acquire) {
            panic!("task {} was made to panic", self.name);
        }
    }
}

/// What a caught panic has said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::time::Duration;

    use tokio::sync::{mpsc, oneshot};

    use super::*;

    type Failures = mpsc::UnboundedReceiver<(&'static str, TaskFailure)>;

    fn set() -> (Tasks, watch::Sender<bool>, Failures) {
        let (stop, (failed, failures)) = (watch::Sender::new(false), mpsc::unbounded_channel());
        let tasks = Tasks::new(stop.subscribe(), move |name, failure| failed.send((name, failure)).unwrap());
        (tasks, stop, failures)
    }

    fn panicked(message: &str) -> TaskFailure {
        TaskFailure::Panicked { message: message.to_owned() }
    }

    #[tokio::test]
    async fn a_panic_is_told_by_name() {
        let (tasks, _stop, mut failures) = set();
        tasks.permanent("lives", pending());
        tasks.permanent("panics", async { panic!("it is {}", "broken") });
        assert_eq!(failures.recv().await, Some(("panics", panicked("it is broken"))));
        tasks.passing("passes", async { panic!("so is this") });
        assert_eq!(failures.recv().await, Some(("passes", panicked("so is this"))));
        let joined = crate::runtime::spawn(tasks.watched("joined", async { panic!("and this") })).await;
        assert!(joined.unwrap_err().is_panic());
        assert_eq!(failures.recv().await, Some(("joined", panicked("and this"))));
        assert_eq!(tasks.names(), ["lives"], "those that have ended are forgotten");
    }

    #[tokio::test]
    async fn only_an_end_that_nobody_asked_for_is_a_failure() {
        let (tasks, stop, mut failures) = set();
        tasks.passing("passes", async {});
        let (end, ended) = oneshot::channel();
        tasks.permanent("ends", async { ended.await.unwrap() });
        end.send(()).unwrap();
        assert_eq!(failures.recv().await, Some(("ends", TaskFailure::Ended)));
        tasks.permanent("lives", pending());
        stop.send_replace(true);
        let gone = async {
            while !tasks.names().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), gone).await.expect("they end with the node");
        assert!(failures.try_recv().is_err());
    }

    #[tokio::test]
    async fn tasks_end_with_the_last_handle() {
        let (tasks, stop, mut failures) = set();
        let (held, dropped) = oneshot::channel::<()>();
        tasks.permanent("lives", async move {
            let _held = held;
            pending().await
        });
        drop(stop);
        assert!(dropped.await.is_err());
        assert!(failures.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_task_that_waits_can_be_made_to_panic() {
        let (tasks, _stop, mut failures) = set();
        tasks.permanent("waits", pending());
        tasks.permanent("others", pending());
        assert_eq!(tasks.names(), ["others", "waits"]);
        tokio::task::yield_now().await;
        assert_eq!(tasks.polls(), [("others", 1), ("waits", 1)].into());
        // Whether it has been polled before or not.
        for polled in [true, false] {
            if !polled {
                tasks.permanent("waits", pending());
            }
            assert!(tasks.panic_in("waits"));
            assert_eq!(failures.recv().await, Some(("waits", panicked("task waits was made to panic"))));
        }
        assert_eq!(tasks.names(), ["others"]);
        assert!(!tasks.panic_in("waits"));
    }
}
