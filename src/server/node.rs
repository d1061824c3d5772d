//! What the doors need of the node they serve: a narrow trait, so that they are tested without a cluster.
//!
//! Here deadlines turn from elapsed time, in which the machine measures lifetimes, into log time, which clients compare
//! with their own wall clocks.

use tokio::sync::watch;

use crate::engine::{
    Acknowledged, ClosedSession, CurrentHistory, Engine, NodeState, OpenedSession, ReadOutcome, SessionList,
    Status, WriteOptions,
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

    fn open_session(
        &self,
        opener: &str,
        ttl_ms: u64,
    ) -> impl Future<Output = Result<OpenedSession, WriteError>> + Send;

    fn close_session(
        &self,
        session: u64,
        history: HistoryEpoch,
    ) -> impl Future<Output = Result<ClosedSession, WriteError>> + Send;

    fn list_sessions(
        &self,
        after: u64,
        limit: usize,
    ) -> impl Future<Output = Result<SessionList, ReadError>> + Send;

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

    /// Answers from the newest state that anybody has asked for; `None` when the node no longer has it.
    fn read_last(&self, query: KvQuery) -> Option<ReadOutcome<KvAnswer>>;

    /// A state from which any number of queries can be answered, and its position.
    fn view(
        &self,
        options: ReadOptions,
    ) -> impl Future<Output = Result<(Option<LogId>, KvView), ReadError>> + Send;

    /// What wall clocks will show when elapsed time is `elapsed_ms`, for the items of a view.
    fn log_time_at(&self, elapsed_ms: u64) -> u64;

    /// The history that the node's positions belong to.
    fn current_history(&self) -> CurrentHistory;

    /// A position that includes every write acknowledged before this call.
    fn present(&self) -> impl Future<Output = Result<u64, ReadError>> + Send;

    fn state(&self) -> NodeState;

    fn watch(&self) -> watch::Receiver<NodeState>;

    fn status(&self) -> impl Future<Output = Status> + Send;
}

impl KvNode for Engine<KvMachine> {
    async fn propose<F>(&self, command: KvCommand, options: WriteOptions, done: F)
    where
        F: FnOnce(Result<Acknowledged<KvReply>, WriteError>) + Send + 'static,
    {
        if !matches!(command, KvCommand::Txn(_)) {
            return Engine::propose(self, command, options, done).await;
        }
        let engine = self.clone();
        let done = move |outcome| done(in_log_time(&engine, outcome));
        Engine::propose(self, command, options, done).await;
    }

    async fn write(
        &self,
        command: KvCommand,
        options: WriteOptions,
    ) -> Result<Acknowledged<KvReply>, WriteError> {
        in_log_time(self, Engine::write_with(self, command, options).await)
    }

    async fn open_session(&self, opener: &str, ttl_ms: u64) -> Result<OpenedSession, WriteError> {
        Engine::open_session_for(self, opener, ttl_ms).await
    }

    async fn close_session(&self, session: u64, history: HistoryEpoch) -> Result<ClosedSession, WriteError> {
        Engine::close_session_in(self, session, history).await
    }

    async fn list_sessions(&self, after: u64, limit: usize) -> Result<SessionList, ReadError> {
        Engine::list_sessions(self, after, limit).await
    }

    async fn read(&self, query: KvQuery, options: ReadOptions) -> Result<ReadOutcome<KvAnswer>, ReadError> {
        let mut outcome = Engine::read(self, query, options).await?;
        outcome.answer.map_expiry(|expires_ms| Engine::log_time_at(self, expires_ms));
        Ok(outcome)
    }

    fn read_last(&self, query: KvQuery) -> Option<ReadOutcome<KvAnswer>> {
        let mut outcome = Engine::read_last(self, query)?;
        outcome.answer.map_expiry(|expires_ms| Engine::log_time_at(self, expires_ms));
        Some(outcome)
    }

    async fn view(&self, options: ReadOptions) -> Result<(Option<LogId>, KvView), ReadError> {
        Engine::view(self, options).await
    }

    fn log_time_at(&self, elapsed_ms: u64) -> u64 {
        Engine::log_time_at(self, elapsed_ms)
    }

    fn current_history(&self) -> CurrentHistory {
        Engine::current_history(self)
    }

    async fn present(&self) -> Result<u64, ReadError> {
        Engine::present(self).await
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

/// The items that a transaction has read, as clients see them.
fn in_log_time(
    engine: &Engine<KvMachine>,
    outcome: Result<Acknowledged<KvReply>, WriteError>,
) -> Result<Acknowledged<KvReply>, WriteError> {
    outcome.map(|mut acknowledged| {
        if let Some(reply) = &mut acknowledged.reply {
            reply.map_expiry(|expires_ms| Engine::log_time_at(engine, expires_ms));
        }
        acknowledged
    })
}
