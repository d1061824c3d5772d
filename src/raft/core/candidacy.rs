//! Whether this node stands for election: openraft is told when that changes.

use std::sync::Mutex;

use openraft::Raft;

use super::super::apply::Applier;
use super::super::type_config::TypeConfig;
use crate::machine::StateMachine;

/// Whether a node stands for election.
#[derive(Debug)]
pub(super) struct Candidacy(Mutex<Grounds>);

/// What it takes to stand: both.
#[derive(Debug)]
struct Grounds {
    /// The silence after the start is over.
    may_speak: bool,
    /// Nothing is known against it.
    may_stand: bool,
}

impl Candidacy {
    /// Of a node that was just started.
    pub(super) fn silent() -> Self {
        Self(Mutex::new(Grounds { may_speak: false, may_stand: true }))
    }

    fn change<M: StateMachine>(
        &self,
        raft: &Raft<TypeConfig, Applier<M>>,
        change: impl FnOnce(&mut Grounds),
    ) {
        let mut grounds = self.0.lock().expect("invariant: no panic under this lock");
        let stands = |grounds: &Grounds| grounds.may_speak && grounds.may_stand;
        let before = stands(&grounds);
        change(&mut grounds);
        let now = stands(&grounds);
        if now != before {
            raft.runtime_config().elect(now);
        }
    }

    /// The silence after the start is over.
    pub(super) fn silence_is_over<M: StateMachine>(&self, raft: &Raft<TypeConfig, Applier<M>>) {
        self.change(raft, |grounds| grounds.may_speak = true);
    }

    /// Whether it is to stand, once that is over.
    pub(super) fn wish<M: StateMachine>(&self, raft: &Raft<TypeConfig, Applier<M>>, may: bool) {
        self.change(raft, |grounds| grounds.may_stand = may);
    }
}
