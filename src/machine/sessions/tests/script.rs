//! The table of sessions in scripts: `tests/golden/scripts/sessions`.

use goldenscript::{Context, Runner};

use super::*;
use crate::golden::{Told, scripts};

#[derive(goldenscript::Command)]
enum Step {
    /// Opens a session, at a moment of elapsed time.
    Open {
        session: u64,
        #[arg(key, optional)]
        ttl_ms: u64,
        #[arg(key, optional)]
        opener: String,
        #[arg(key, optional)]
        at: u64,
    },
    /// A write of a session is at the next position of the log.
    Write {
        session: u64,
        sequence: u64,
        /// Below it the caller has all answers.
        #[arg(key)]
        first_unanswered: u64,
        #[arg(key, optional)]
        at: u64,
    },
    /// The owner closes it.
    Close(u64),
    /// Time passes.
    Expire(#[arg(key = "at")] u64),
    /// What is open.
    List,
}

#[derive(Default)]
struct Table {
    table: SessionTable,
    index: u64,
}

impl Table {
    fn write(&mut self, slot: SessionSlot, at: u64) -> String {
        self.index += 1;
        let log_id = LogId::new(1, self.index);
        match self.table.admit(slot, at) {
            Admission::Apply => {
                let reply = format!("reply {}", self.index);
                self.table.record(slot, log_id, Bytes::from(reply.clone()));
                format!("entry {}: applied, \"{reply}\"", self.index)
            }
            Admission::Repeat { log_id, reply } => {
                let reply = String::from_utf8_lossy(&reply).into_owned();
                format!("entry {}: not applied, as entry {} was: \"{reply}\"", self.index, log_id.index)
            }
            Admission::Refuse(why) => format!("entry {}: not applied, {why:?}", self.index),
        }
    }
}

impl Runner for Table {
    type Command = Step;

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        Ok(match step {
            Step::Open { session, ttl_ms, opener, at } => {
                match self.table.open(*session, *ttl_ms, opener, *at) {
                    Ok(()) => "open".to_owned(),
                    Err(why) => format!("refused, {why:?}"),
                }
            }
            Step::Write { session, sequence, first_unanswered, at } => {
                let (session, sequence, first_unanswered) = (*session, *sequence, *first_unanswered);
                self.write(SessionSlot { session, sequence, first_unanswered }, *at)
            }
            Step::Close(session) => {
                if self.table.close(*session) { "closed" } else { "there is none" }.to_owned()
            }
            Step::Expire(at) => {
                self.table.expire(*at);
                format!("{} open", self.table.len())
            }
            Step::List => {
                let told = |info: SessionInfo| {
                    let SessionInfo { session, used_ms, expires_ms, bytes, unsettled, .. } = info;
                    format!(
                        "{session}: used at {used_ms}, until {expires_ms}, {unsettled} answers, {bytes} bytes\n"
                    )
                };
                self.table.list(0, usize::MAX).into_iter().map(told).collect()
            }
        })
    }
}

#[test]
fn scripts_of_sessions() {
    scripts("sessions", Table::default);
}
