//! What another node has told, into the state of one that is no member: a replica has no log of its own, and applies what was applied.

use std::io;

use super::Applier;
use crate::feed::{FeedContent, FeedRecord};
use crate::machine::sessions::SessionTable;
use crate::machine::{ApplyContext, StateMachine};
use crate::raft::published::Progress;
use crate::raft::snapshot::{Restored, SnapshotBuilder};
use crate::types::{ClusterClock, HistoryEpoch, LogId, check_version};

impl<M: StateMachine> Applier<M> {
    /// Takes in what happened at the position of `record`, which comes after all that was taken in before. Nobody is told before it is
    /// [published](Self::publish_if_wanted).
    ///
    /// # Errors
    /// That it does not fit the state: it was told by another build, or of another state. Nothing more must be taken in then.
    pub(crate) fn take_in(&mut self, record: &FeedRecord) -> io::Result<()> {
        let log_id = record.log_id;
        let wrong = |reason: String| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("what happened at {log_id} cannot be applied: {reason}"),
            )
        };
        if self.progress.log_id.is_some_and(|applied| log_id.index <= applied.index) {
            return Err(wrong(format!("the state is at {} already", self.progress.next_index() - 1)));
        }
        let context = ApplyContext { log_id, elapsed_ms: record.elapsed_ms, time_ms: record.time_ms };
        match &record.content {
            FeedContent::Events(events) => {
                let machine = &mut self.machine;
                self.recorder
                    .tell(&context, |sink| {
                        events.iter().try_for_each(|event| {
                            machine.take_event(log_id.index, event).inspect(|()| event.tell(sink))
                        })
                    })
                    .map_err(wrong)?;
            }
            FeedContent::Command { wrote, command } => {
                check_version(*wrote, M::MACHINES).map_err(|error| wrong(error.to_string()))?;
                let decoded = M::decode_of(*wrote, command).map_err(|error| wrong(error.to_string()))?;
                let _reply = self.machine.apply(&context, decoded);
                self.recorder.command(&context, *wrote, command);
            }
        }
        self.progress.command_bytes += record.bytes() as u64;
        self.come_to(log_id, Some((record.elapsed_ms, record.time_ms)));
        Ok(())
    }

    /// Nothing happened up to position `index` that concerns this state. The elapsed time and log time there, if they are known.
    pub(crate) fn pass(&mut self, index: u64, times_ms: Option<(u64, u64)>) {
        let applied = self.progress.log_id.unwrap_or_default();
        if index > applied.index {
            self.come_to(LogId::new(applied.term, index), times_ms);
        }
    }

    fn come_to(&mut self, log_id: LogId, times_ms: Option<(u64, u64)>) {
        self.progress.log_id = Some(log_id);
        let clock = &mut self.progress.clock;
        clock.term = log_id.term;
        if let Some((elapsed_ms, time_ms)) = times_ms {
            clock.elapsed_ms = clock.elapsed_ms.max(elapsed_ms);
            clock.wall_offset_ms = time_ms.cast_signed().wrapping_sub(elapsed_ms.cast_signed());
        }
        self.recorder.applied(log_id.index);
    }

    /// How far the state is, told or not.
    pub(crate) fn progress(&self) -> Progress {
        self.progress
    }

    /// Begins `history`, of which nothing was told yet.
    pub(crate) fn begin_told(&mut self, history: HistoryEpoch) {
        self.progress.history = history;
        self.recorder.begin(history, self.progress.next_index());
    }

    /// What writes the state as it is into a snapshot.
    pub(crate) fn told_snapshot(&mut self) -> SnapshotBuilder<M> {
        self.snapshot_builder()
    }

    /// Takes a whole state, told as of `log_id`, in the place of the present one.
    ///
    /// # Errors
    /// That the state at hand is further than that, of the same history.
    pub(crate) fn take_state(
        &mut self,
        machine: M,
        log_id: LogId,
        clock: ClusterClock,
        history: HistoryEpoch,
    ) -> io::Result<()> {
        let applied = self.progress.log_id.unwrap_or_default();
        if self.progress.history == history && applied.index >= log_id.index {
            return Err(io::Error::other(format!(
                "the state is at {applied}, and it was told one of {log_id}"
            )));
        }
        let sessions = SessionTable::default();
        self.begin_anew(Restored { machine, sessions }, (log_id, clock), history);
        Ok(())
    }
}
