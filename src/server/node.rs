//! What the doors need of the node they serve: a narrow trait, so that they are tested without a cluster.

use tokio::sync::watch;

use crate::engine::{
    Acknowledged, CurrentHistory, Engine, NodeState, OpenedSession, ReadOutcome, Status, WriteOptions,
};
use crate::error::{ReadError, WriteError};
use crate::machine::kv::{KvAnswer, KvCommand, KvMachine, KvQuery, KvReply, KvView};
use crate::types::{HistoryEpoch, LogId, ReadOptions};

/// A node with a key-value machine. The methods promise what those of [`Engine`] do.
pub(super) trait KvNode: Clone + Send + Sync + 'static {
    fn propose<F>(
        &self,
        command: KvCommand,
        options: WriteOptions,
        done: F,
    ) -> impl Future<Output = ()> + Send
    where
        F: FnOnce(Result<Acknowledged<KvReply>, WriteError>) + Send + 'static;

    fn open_session(&self, ttl_ms: u64) -> impl Future<Output = Result<OpenedSession, WriteError>> + Send;

    fn close_session(
        &self,
        session: u64,
        history: HistoryEpoch,
    ) -> impl Future<Output = Result<LogId, WriteError>> + Send;

    fn write(
        &self,
        command: KvCommand,
        options: WriteOptions,
    ) -> impl Future<Output = Result<Acknowledged<KvReply>, WriteError>> + Send;

    fn read(
        &self,
        query: KvQuery,
        options: ReadOptions,
    ) -> impl Future<Output = Result<ReadOutcome<KvAnswer>, ReadError>> + Send;

    /// A state from which any number of queries can be answered, and its position.
    fn view(
        &self,
        options: ReadOptions,
    ) -> impl Future<Output = Result<(Option<LogId>, KvView), ReadError>> + Send;

    /// The history that the node's positions belong to.
    fn current_history(&self) -> CurrentHistory;

    fn state(&self) -> NodeState;

    fn watch(&self) -> watch::Receiver<NodeState>;

    fn status(&self) -> impl Future<Output = Status> + Send;
}

impl KvNode for Engine<KvMachine> {
    async fn propose<F>(&self, command: KvCommand, options: WriteOptions, done: F)
    where
        F: FnOnce(Result<Acknowledged<KvReply>, WriteError>) + Send + 'static,
    {
        Engine::propose(self, command, options, done).await;
    }

    async fn write(
        &self,
        command: KvCommand,
        options: WriteOptions,
    ) -> Result<Acknowledged<KvReply>, WriteError> {
        Engine::write_with(self, command, options).await
    }

    async fn open_session(&self, ttl_ms: u64) -> Result<OpenedSession, WriteError> {
        Engine::open_session_at(self, ttl_ms).await
    }

    async fn close_session(&self, session: u64, history: HistoryEpoch) -> Result<LogId, WriteError> {
        Engine::close_session_in(self, session, history).await
    }

    async fn read(&self, query: KvQuery, options: ReadOptions) -> Result<ReadOutcome<KvAnswer>, ReadError> {
        Engine::read(self, query, options).await
    }

    async fn view(&self, options: ReadOptions) -> Result<(Option<LogId>, KvView), ReadError> {
        Engine::view(self, options).await
    }

    fn current_history(&self) -> CurrentHistory {
        Engine::current_history(self)
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
