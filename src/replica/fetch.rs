//! The whole state from a source, as the file of a snapshot.
//!
//! What has arrived stays when a connection breaks, and the same source is asked for the rest. Another source has another file.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::ReplicaConfig;
use super::follow::{Follower, SubscriptionEnd};
use super::state::SyncState;
use crate::client::{Client, Endpoint, HeldFile, StateFilePiece, StateFileStream};
use crate::machine::StateMachine;
use crate::raft::told::NotTaken;
use crate::runtime::offload;
use crate::storage::{FilePiece, SnapshotReceiver};
use crate::types::LogId;

/// A source that sends nothing for so long is given up.
const PIECE_PATIENCE: Duration = Duration::from_secs(30);
/// A source that has sent a part is asked for the rest for so long; another one would begin anew.
const SOURCE_PATIENCE: Duration = Duration::from_secs(15);
/// How long to wait before a source is asked again.
const AGAIN: Duration = Duration::from_millis(200);

/// What has arrived.
struct ArrivedFile {
    log_id: LogId,
    receiver: SnapshotReceiver,
}

/// Why a source is asked no more.
enum SourceEnd {
    /// It failed, or its connection.
    Failed(String),
    /// It does not know how to.
    Unable,
    /// The replica is to do something else.
    Over(SubscriptionEnd),
}

/// What became of a state that was asked for.
pub(super) enum Fetched {
    /// The replica has it.
    Taken,
    /// No source sends files.
    Unable,
}

impl<M: StateMachine> Follower<M> {
    /// Asks one source after the other for the whole state, until the replica has it.
    pub(super) async fn fetch(&mut self, config: &ReplicaConfig) -> Result<Fetched, SubscriptionEnd> {
        // A connection of its own: what is said beside it does not wait.
        let client = config.connect().map_err(|error| SubscriptionEnd::Fatal(error.to_string()))?;
        let (mut arrived, mut advanced, mut why) = (None, Instant::now(), String::new());
        self.state.send_modify(|state| state.enter(SyncState::Syncing));
        while advanced.elapsed() < config.patience {
            let mut unable = 0;
            let sources = client.endpoints();
            for source in &sources {
                loop {
                    let before = held(arrived.as_ref());
                    match self.fetch_from(&client, source, config, &mut arrived).await {
                        Ok(()) => return Ok(Fetched::Taken),
                        Err(SourceEnd::Over(over)) => return Err(over),
                        Err(SourceEnd::Unable) => {
                            unable += 1;
                            break;
                        }
                        Err(SourceEnd::Failed(failed)) => why = format!("{source}: {failed}"),
                    }
                    if *self.config.borrow() != *config {
                        return Err(SubscriptionEnd::Repointed);
                    }
                    if held(arrived.as_ref()) != before {
                        advanced = Instant::now();
                        tracing::debug!(%source, why, "a state is interrupted");
                    } else if arrived.is_none() || advanced.elapsed() > SOURCE_PATIENCE {
                        break;
                    }
                    self.rest(AGAIN).await;
                }
            }
            if unable == sources.len() {
                return Ok(Fetched::Unable);
            }
            self.rest(AGAIN).await;
        }
        Err(SubscriptionEnd::Lost(format!("no source has sent the whole state: {why}")))
    }

    async fn fetch_from(
        &mut self,
        client: &Client,
        source: &Endpoint,
        config: &ReplicaConfig,
        arrived: &mut Option<ArrivedFile>,
    ) -> Result<(), SourceEnd> {
        let (compressed, rate) = (config.compressed, config.state_bytes_per_second);
        let asked = client.read_state_file(source, held(arrived.as_ref()), compressed, rate).await;
        // Builds of before there were files do not know how to.
        let mut file = asked.map_err(|error| failed(&error))?.ok_or(SourceEnd::Unable)?;
        loop {
            let Some(piece) = self.next_piece(&mut file).await? else {
                return Err(SourceEnd::Failed("the file has ended before its last piece".to_owned()));
            };
            let (last, length) = (piece.last, piece.bytes.len() as u64);
            let (source, upto, history) = (source.to_string(), piece.log_id.index, piece.history);
            if arrived.is_none() || piece.offset == 0 {
                tracing::info!(
                    source,
                    upto,
                    bytes = piece.total_bytes,
                    "the replica is sent the whole state"
                );
            }
            self.take_piece(arrived, piece).await?;
            self.state.send_modify(|state| {
                state.heard = Some(Instant::now());
                state.received_bytes += length;
                state.primary_seq = state.primary_seq.max(upto);
                (state.source, state.error) = (source, None);
                state.enter(SyncState::Syncing);
            });
            if last && let Some(ArrivedFile { receiver, .. }) = arrived.take() {
                // All of it would be sent again: not at once.
                self.told.take_file(receiver).await.map_err(|error| match not_taken(error) {
                    SourceEnd::Failed(why) => SourceEnd::Over(SubscriptionEnd::Lost(why)),
                    over => over,
                })?;
                let local = self.told.bookmark();
                self.state.send_modify(|state| {
                    (state.full_syncs, state.local, state.retries) = (state.full_syncs + 1, local, 0);
                });
                tracing::info!(upto, %history, "the replica has the whole state");
                return Ok(());
            }
        }
    }

    /// Waits for the next piece. Those who read the state before are answered meanwhile.
    async fn next_piece(&mut self, file: &mut StateFileStream) -> Result<Option<StateFilePiece>, SourceEnd> {
        let deadline = Instant::now() + PIECE_PATIENCE;
        loop {
            tokio::select! {
                biased;
                () = self.shared.reader.view_wanted() => self.told.tell(),
                changed = self.config.changed() => if changed.is_ok() {
                    return Err(SourceEnd::Over(SubscriptionEnd::Repointed));
                },
                piece = timeout_at(deadline, file.next()) => return match piece {
                    Ok(piece) => piece.map_err(|error| failed(&error)),
                    Err(_) => Err(SourceEnd::Failed(format!("nothing was sent for {} s", PIECE_PATIENCE.as_secs()))),
                },
            }
        }
    }

    async fn take_piece(
        &self,
        arrived: &mut Option<ArrivedFile>,
        piece: StateFilePiece,
    ) -> Result<(), SourceEnd> {
        let StateFilePiece { log_id, offset, bytes, crc32, uncompressed_bytes, last, .. } = piece;
        if offset == 0 {
            let receiver = self.told.receive(log_id).map_err(|error| failed(&error))?;
            *arrived = Some(ArrivedFile { log_id, receiver });
        }
        let Some(mut current) = arrived.take().filter(|arrived| arrived.log_id == log_id) else {
            return Err(SourceEnd::Failed("a piece of a file whose beginning is missing".to_owned()));
        };
        let piece = FilePiece { offset, bytes, crc32: Some(crc32), uncompressed_bytes, last };
        let written = offload(move || match piece.content() {
            Ok(content) => current.receiver.write(offset, &content).map(|()| (current, None)),
            // What was there before is good.
            Err(bad) => Ok((current, Some(bad))),
        });
        // What a write has left of the file on a full disk is not known.
        let (current, bad) = written.await.map_err(|error| failed(&error))?;
        if offset == 0 {
            // The rest need not be sent then.
            self.told.may_take(&current.receiver).map_err(not_taken)?;
        }
        *arrived = Some(current);
        bad.map_or(Ok(()), |bad| Err(failed(&bad)))
    }
}

fn held(arrived: Option<&ArrivedFile>) -> Option<HeldFile> {
    let ArrivedFile { log_id, receiver } = arrived?;
    Some(HeldFile { log_id: *log_id, bytes: receiver.received_bytes(), crc32: receiver.crc32() })
}

fn not_taken(error: NotTaken) -> SourceEnd {
    match error {
        NotTaken::Unfit(why) => SourceEnd::Over(SubscriptionEnd::Fatal(format!(
            "the whole state of its source cannot be used: {why}"
        ))),
        NotTaken::Failed(why) => SourceEnd::Failed(why),
    }
}

fn failed(error: &dyn std::fmt::Display) -> SourceEnd {
    SourceEnd::Failed(error.to_string())
}
