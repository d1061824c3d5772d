//! Whose word an answer is, and what it is headed by.

use tokio::sync::watch;

use super::guest::Guest;
use super::served::{Read, WriteOutcome};
use super::{MAX_ANSWER_BYTES, ServedNode, told};
use crate::call::{encode_ack, encode_position};
use crate::engine::{
    Acknowledged, ClosedSession, CurrentHistory, Engine, NodeState, OpenedSession, ReadOutcome,
};
use crate::error::WriteError;
use crate::machine::StateMachine;
use crate::machine::sessions::{WINDOW, granted_ttl_ms};
use crate::proto::v1::{self, Failure};
use crate::types::{HistoryEpoch, LogId, NodeId};

/// A failure holds a response of so many bytes at most: what surrounds it has room beside it in a message.
const MOST_UNCONFIRMED_BYTES: usize = MAX_ANSWER_BYTES / 4 * 3;

/// A node, the history that it holds, and what it knows besides.
#[derive(Debug, Clone)]
pub(crate) struct Answerer {
    node_id: NodeId,
    history: CurrentHistory,
    state: watch::Receiver<NodeState>,
}

impl Answerer {
    pub(crate) fn of<N: ServedNode>(node: &N) -> Self {
        Self { node_id: node.state().node_id, history: node.current_history(), state: node.watch() }
    }

    /// `failure`, with who leads if that is known.
    pub(crate) fn told(&self, mut failure: Failure) -> Failure {
        told::name_leader(&mut failure, &self.state.borrow());
        failure
    }

    /// What heads an answer from the state after `log_id`.
    pub(crate) fn header(&self, log_id: Option<LogId>) -> v1::Header {
        let position = log_id.map(|log_id| self.position(log_id));
        v1::Header { node_id: self.node_id, position, ..Default::default() }
    }

    /// What is answered to a write. Of one that not every voter has confirmed the failure holds what else would be. `time_at` makes times of day of elapsed time, where the reply
    /// [has any](Guest::tells_times).
    ///
    /// # Errors
    /// The failure to answer instead.
    pub(crate) fn written<G: Guest>(
        &self,
        asked: G::Asked,
        outcome: WriteOutcome<G::Machine>,
        time_at: Option<&dyn Fn(u64) -> u64>,
    ) -> Result<(v1::Header, G::Response), Failure> {
        let error = match outcome {
            Ok(acknowledged) => return self.acknowledged::<G>(asked, acknowledged, time_at),
            Err(error) => error,
        };
        let unconfirmed = Engine::<G::Machine>::unconfirmed(&error);
        let failure = self.failure(error);
        let Some(unconfirmed) = unconfirmed else { return Err(failure) };
        // What the machine has rejected is not done, whoever holds it.
        let (header, response) = self.acknowledged::<G>(asked, unconfirmed, time_at)?;
        Err(match G::encode(response) {
            response if response.len() > MOST_UNCONFIRMED_BYTES => failure,
            response => {
                let answer = v1::UnconfirmedAnswer { header: Some(header), response };
                Failure { unconfirmed: Some(Box::new(answer)), ..failure }
            }
        })
    }

    fn acknowledged<G: Guest>(
        &self,
        asked: G::Asked,
        acknowledged: Acknowledged<<G::Machine as StateMachine>::Reply>,
        time_at: Option<&dyn Fn(u64) -> u64>,
    ) -> Result<(v1::Header, G::Response), Failure> {
        let Acknowledged { log_id, mut reply, ack, held_by, repeated, applied_here: _ } = acknowledged;
        if let (Some(reply), Some(time_at)) = (&mut reply, time_at) {
            G::tell_reply_times(reply, time_at);
        }
        let ack = encode_ack(ack).into();
        let header = v1::Header { ack, held_by, repeated_write: repeated, ..self.header(Some(log_id)) };
        Ok((header, G::written(asked, log_id, reply)?))
    }

    /// What is answered to a read.
    ///
    /// # Errors
    /// The failure to answer instead.
    pub(crate) fn answered<G: Guest>(
        &self,
        asked: G::Asked,
        outcome: Read<G::Machine>,
        time_at: &dyn Fn(u64) -> u64,
    ) -> Result<(v1::Header, G::Response), Failure> {
        let ReadOutcome { applied, mut answer } = outcome?;
        G::tell_answer_times(&mut answer, time_at);
        Ok((self.header(applied), G::answered(asked, answer)?))
    }

    /// The history that its positions belong to.
    pub(crate) fn history(&self) -> HistoryEpoch {
        self.history.epoch()
    }

    pub(crate) fn position(&self, log_id: LogId) -> v1::Position {
        encode_position(log_id, self.history.epoch())
    }

    /// What is answered to a write that failed: it may stand somewhere nevertheless.
    fn failure(&self, error: WriteError) -> Failure {
        let mut failure = Failure::from(error);
        if let Some(position) = &mut failure.position {
            position.history = self.history.epoch().0;
        }
        failure
    }

    /// The answer to a request for a session.
    pub(crate) fn opened(&self, ttl_ms: u64, opened: OpenedSession) -> v1::OpenSessionResponse {
        let OpenedSession { session, log_id } = opened;
        let header = Some(self.header(Some(log_id)));
        v1::OpenSessionResponse { header, session, ttl_ms: granted_ttl_ms(ttl_ms), window: WINDOW }
    }

    /// The answer to a session's end.
    pub(crate) fn closed(&self, closed: ClosedSession) -> v1::CloseSessionResponse {
        let ClosedSession { log_id, was_open } = closed;
        v1::CloseSessionResponse { header: Some(self.header(Some(log_id))), was_open }
    }
}
