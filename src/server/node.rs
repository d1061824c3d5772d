//! What the doors need of the node they serve: a narrow trait, so that they are tested without a cluster.

use tokio::sync::watch;

use crate::engine::{Engine, NodeState, ReadOutcome, Status, Written};
use crate::error::{ReadError, WriteError};
use crate::machine::kv::{KvAnswer, KvCommand, KvMachine, KvQuery, KvReply};
use crate::types::ReadLevel;

/// A node with a key-value machine. The methods promise what those of [`Engine`] do.
pub(super) trait KvNode: Clone + Send + Sync + 'static {
    fn propose<F>(&self, command: KvCommand, done: F) -> impl Future<Output = ()> + Send
    where
        F: FnOnce(Result<Written<KvReply>, WriteError>) + Send + 'static;

    fn write(&self, command: KvCommand) -> impl Future<Output = Result<Written<KvReply>, WriteError>> + Send;

    fn read(
        &self,
        query: KvQuery,
        level: ReadLevel,
    ) -> impl Future<Output = Result<ReadOutcome<KvAnswer>, ReadError>> + Send;

    fn state(&self) -> NodeState;

    fn watch(&self) -> watch::Receiver<NodeState>;

    fn status(&self) -> impl Future<Output = Status> + Send;
}

impl KvNode for Engine<KvMachine> {
    async fn propose<F>(&self, command: KvCommand, done: F)
    where
        F: FnOnce(Result<Written<KvReply>, WriteError>) + Send + 'static,
    {
        Engine::propose(self, command, done).await;
    }

    async fn write(&self, command: KvCommand) -> Result<Written<KvReply>, WriteError> {
        Engine::write(self, command).await
    }

    async fn read(&self, query: KvQuery, level: ReadLevel) -> Result<ReadOutcome<KvAnswer>, ReadError> {
        Engine::read(self, query, level).await
    }

    fn state(&self) -> NodeState {
        Engine::state(self)
    }

    fn watch(&self) -> watch::Receiver<NodeState> {
        Engine::watch(self)
    }

    async fn status(&self) -> Status {
        Engine::status(self).await
    }
}
