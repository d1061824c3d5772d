//! What the doors need of the node they serve: a narrow trait, so that they are tested without a cluster.

use std::sync::Arc;

use tokio::sync::watch;

use super::relay::Relay;

use crate::engine::{
    Acknowledged, ClosedSession, CurrentHistory, Engine, NodeState, OpenedSession, Pinned, ReadOutcome,
    WriteOptions,
};
use crate::error::{ReadError, WriteError};
use crate::feed::FeedCursor;
use crate::machine::StateMachine;
use crate::types::{HistoryEpoch, LogId, ReadOptions};

/// What a node of machine `M` has to say to a write.
pub(crate) type WriteOutcome<M> = Result<Acknowledged<<M as StateMachine>::Reply>, WriteError>;
/// And to a read.
pub(crate) type Read<M> = Result<ReadOutcome<<M as StateMachine>::Answer>, ReadError>;

/// A view, of what position, and how much it keeps alive.
pub(crate) type PinnedView<M> = Result<(Option<LogId>, <M as StateMachine>::View, Pinned), ReadError>;

/// A node that calls are made to. The methods promise what those of [`Engine`] do.
pub(crate) trait ServedNode: Clone + Send + Sync + 'static {
    type Machine: StateMachine;

    fn propose<F>(
        &self,
        command: <Self::Machine as StateMachine>::Command,
        options: WriteOptions,
        done: F,
    ) -> impl Future<Output = ()> + Send
    where
        F: FnOnce(WriteOutcome<Self::Machine>) + Send + 'static;

    fn write(
        &self,
        command: <Self::Machine as StateMachine>::Command,
        options: WriteOptions,
    ) -> impl Future<Output = WriteOutcome<Self::Machine>> + Send;

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

    fn read(
        &self,
        query: <Self::Machine as StateMachine>::Query,
        options: ReadOptions,
    ) -> impl Future<Output = Read<Self::Machine>> + Send;

    /// A state from which any number of queries can be answered, and its position.
    fn view(
        &self,
        options: ReadOptions,
    ) -> impl Future<Output = Result<(Option<LogId>, <Self::Machine as StateMachine>::View), ReadError>> + Send
    where
        <Self::Machine as StateMachine>::View: Clone;

    /// The same for who reads it for long, and how much it keeps alive from then on.
    fn pinned_view(&self, options: ReadOptions) -> impl Future<Output = PinnedView<Self::Machine>> + Send
    where
        <Self::Machine as StateMachine>::View: Clone;

    /// What wall clocks will show when elapsed time is `elapsed_ms`.
    fn log_time_at(&self, elapsed_ms: u64) -> u64;

    /// The history that the node's positions belong to.
    fn current_history(&self) -> CurrentHistory;

    /// Refuses those who want what happens to some keys, where not all of it is known.
    ///
    /// # Errors
    /// Where to go instead.
    fn may_be_watched(&self) -> Result<(), ReadError> {
        Ok(())
    }

    /// What is applied from position `next` on. Whether the node has it is told by its first page.
    fn feed_from(&self, next: u64) -> FeedCursor;

    /// A position that includes every write acknowledged before this call.
    fn present(&self) -> impl Future<Output = Result<u64, ReadError>> + Send;

    /// What passes on the changes that this node does not carry out, if anything does.
    fn relay(&self) -> Option<Arc<dyn Relay>> {
        None
    }

    fn state(&self) -> NodeState;

    fn watch(&self) -> watch::Receiver<NodeState>;
}

impl<M: StateMachine> ServedNode for Engine<M> {
    type Machine = M;

    async fn propose<F>(&self, command: M::Command, options: WriteOptions, done: F)
    where
        F: FnOnce(WriteOutcome<M>) + Send + 'static,
    {
        Engine::propose(self, command, options, done).await;
    }

    async fn write(&self, command: M::Command, options: WriteOptions) -> WriteOutcome<M> {
        Engine::write_with(self, command, options).await
    }

    async fn open_session(&self, opener: &str, ttl_ms: u64) -> Result<OpenedSession, WriteError> {
        Engine::open_session_for(self, opener, ttl_ms).await
    }

    async fn close_session(&self, session: u64, history: HistoryEpoch) -> Result<ClosedSession, WriteError> {
        Engine::close_session_in(self, session, history).await
    }

    async fn read(&self, query: M::Query, options: ReadOptions) -> Read<M> {
        Engine::read(self, query, options).await
    }

    async fn view(&self, options: ReadOptions) -> Result<(Option<LogId>, M::View), ReadError>
    where
        M::View: Clone,
    {
        Engine::view(self, options).await
    }

    async fn pinned_view(&self, options: ReadOptions) -> PinnedView<M>
    where
        M::View: Clone,
    {
        Engine::pinned_view(self, options).await
    }

    fn log_time_at(&self, elapsed_ms: u64) -> u64 {
        Engine::log_time_at(self, elapsed_ms)
    }

    fn current_history(&self) -> CurrentHistory {
        Engine::current_history(self)
    }

    fn feed_from(&self, next: u64) -> FeedCursor {
        Engine::feed_from(self, next)
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
}
