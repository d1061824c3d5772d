//! The reason for which a node must not go on. There is one, the first, and it is never taken back.

use std::sync::{Arc, OnceLock, Weak};

use tokio::sync::watch;

use crate::error::FatalError;

/// What is done about it.
pub(in crate::engine) type Consequence = dyn Fn(&FatalError) + Send + Sync;

/// Where a node is told that it must not go on. Cheap to clone; all clones are the same.
///
/// What follows is done by whoever tells, and by no task that could have failed itself.
#[derive(Clone)]
pub(in crate::engine) struct Fatal(Arc<FatalState>);

struct FatalState {
    reason: watch::Sender<Option<FatalError>>,
    /// Held by the node: the tasks that may tell must not keep it alive.
    consequence: OnceLock<Weak<Consequence>>,
}

impl Fatal {
    /// Nothing has been told, and nothing follows yet.
    pub(in crate::engine) fn new() -> Self {
        Self(Arc::new(FatalState { reason: watch::Sender::new(None), consequence: OnceLock::new() }))
    }

    /// The node must not go on. The first reason is the one that counts.
    pub(in crate::engine) fn report(&self, error: FatalError) {
        let is_first = self.0.reason.send_if_modified(|reason| {
            let is_first = reason.is_none();
            if is_first {
                tracing::error!(%error, "the node has stopped");
                *reason = Some(error);
            }
            is_first
        });
        if is_first {
            self.act();
        }
    }

    /// Has `consequence` follow what is told, or has been told already: then it may be called twice.
    pub(in crate::engine) fn leads_to(&self, consequence: &Arc<Consequence>) {
        let is_only = self.0.consequence.set(Arc::downgrade(consequence)).is_ok();
        debug_assert!(is_only, "invariant: a node is assembled once");
        self.act();
    }

    fn act(&self) {
        let consequence = self.0.consequence.get().and_then(Weak::upgrade);
        if let (Some(consequence), Some(reason)) = (consequence, self.reason()) {
            consequence(&reason);
        }
    }

    /// Why the node must not go on, if it must not.
    pub(in crate::engine) fn reason(&self) -> Option<FatalError> {
        self.0.reason.borrow().clone()
    }

    /// The same, in words.
    pub(in crate::engine) fn in_words(&self) -> Option<String> {
        self.0.reason.borrow().as_ref().map(ToString::to_string)
    }

    /// Tells when there is a reason.
    pub(in crate::engine) fn subscribe(&self) -> watch::Receiver<Option<FatalError>> {
        self.0.reason.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn core(text: &str) -> FatalError {
        FatalError::Core(text.to_owned())
    }

    #[test]
    fn the_first_reason_counts_whenever_it_is_told() {
        for told_before in [true, false] {
            let (fatal, seen) = (Fatal::new(), Arc::new(Mutex::new(Vec::new())));
            let watched = fatal.subscribe();
            if told_before {
                fatal.report(core("first"));
            }
            let notes = seen.clone();
            let consequence: Arc<Consequence> =
                Arc::new(move |error: &FatalError| notes.lock().unwrap().push(error.clone()));
            fatal.leads_to(&consequence);
            fatal.report(core("first"));
            fatal.report(core("second"));
            assert_eq!(*seen.lock().unwrap(), [core("first")]);
            assert_eq!(
                (fatal.reason(), watched.borrow().clone()),
                (Some(core("first")), Some(core("first")))
            );
            assert_eq!(fatal.in_words().as_deref(), Some("first"));
        }
    }

    #[test]
    fn nothing_follows_once_the_node_is_gone() {
        let fatal = Fatal::new();
        let consequence: Arc<Consequence> = Arc::new(|_: &FatalError| panic!("there is nothing to stop"));
        fatal.leads_to(&consequence);
        drop(consequence);
        fatal.report(core("too late"));
        assert_eq!(fatal.reason(), Some(core("too late")));
    }
}
