//! Who has done what to the cluster, and who was refused: lines of the log with the target `quorate::audit`.
//!
//! A flood of refusals would fill a disk. So of refusals no more than [`MOST_REFUSALS`] are written in [`REFUSALS_IN`], and how many
//! others there were is told with the next one.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::in_force::Unidentified;
use crate::door::failure;
use crate::proto::details;
use crate::proto::v1::Failure;
use crate::shown::Shown;

/// Refusals that are written in each period.
const MOST_REFUSALS: u64 = 32;
const REFUSALS_IN: Duration = Duration::from_secs(10);

/// A call, for the log.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AuditedCall<'a> {
    pub(crate) path: &'a str,
    pub(crate) address: Option<SocketAddr>,
}

impl AuditedCall<'_> {
    fn address(&self) -> String {
        self.address.map(|address| address.to_string()).unwrap_or_default()
    }
}

/// Callers that were refused since the process started: for want of a credential, and of a right.
#[derive(Debug, Default)]
pub(crate) struct RefusedCallers {
    pub(crate) unidentified: AtomicU64,
    pub(crate) denied: AtomicU64,
    pace: Mutex<Option<Pace>>,
}

#[derive(Debug)]
struct Pace {
    since: Instant,
    written: u64,
    left_out: u64,
}

impl RefusedCallers {
    /// How many refusals were left out before this one; none if it is to be left out itself.
    fn turn(&self) -> Option<u64> {
        let mut pace = self.pace.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let new = || Pace { since: Instant::now(), written: 0, left_out: 0 };
        let pace = pace.get_or_insert_with(new);
        if pace.since.elapsed() >= REFUSALS_IN {
            *pace = Pace { left_out: pace.left_out, ..new() };
        }
        if pace.written >= MOST_REFUSALS {
            pace.left_out += 1;
            return None;
        }
        pace.written += 1;
        Some(std::mem::take(&mut pace.left_out))
    }

    /// A caller that is not identified has asked for `call`. What it is told.
    pub(crate) fn unidentified(&self, call: &AuditedCall<'_>, why: Unidentified) -> Failure {
        self.unidentified.fetch_add(1, Ordering::Relaxed);
        if let Some(left_out) = self.turn() {
            tracing::warn!(
                target: "quorate::audit",
                call = %Shown(call.path),
                address = call.address(),
                credential = why.name(),
                outcome = "unauthenticated",
                left_out,
                "refused"
            );
        }
        failure::unauthenticated()
    }

    /// The caller called `name`, which has shown a `credential` of this kind, has asked for `call`, which is not granted to it. What it
    /// is told.
    pub(super) fn denied(&self, call: &AuditedCall<'_>, name: &str, credential: &'static str) -> Failure {
        self.denied.fetch_add(1, Ordering::Relaxed);
        if let Some(left_out) = self.turn() {
            tracing::warn!(
                target: "quorate::audit",
                principal = %Shown(name),
                credential,
                call = %Shown(call.path),
                address = call.address(),
                outcome = "permission_denied",
                left_out,
                "refused"
            );
        }
        failure::permission_denied()
    }
}

/// What stands for the outcome of a call before it is carried out.
pub(crate) const ASKED: &str = "asked";

/// What came of a call, as it is logged.
pub(crate) fn outcome(status: Option<&tonic::Status>) -> &'static str {
    let failed = status.filter(|status| status.code() != tonic::Code::Ok);
    let Some(failed) = failed else { return "ok" };
    details::failure(failed.details()).map_or("failed", |failure| failure.reason().name())
}

/// The caller called `name`, which has shown a `credential` of this kind, has asked for `call`, which changes how the cluster is.
pub(super) fn operated(call: &AuditedCall<'_>, name: &str, credential: &'static str, outcome: &str) {
    tracing::info!(
        target: "quorate::audit",
        principal = %Shown(name),
        credential,
        call = %Shown(call.path),
        address = call.address(),
        outcome,
        "operated"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_refusals_is_counted_and_not_written() {
        let refused = RefusedCallers::default();
        let call = AuditedCall { path: "/quorate.v1.Kv/Get", address: None };
        let written = (0..1000).filter(|_| refused.turn().is_some()).count() as u64;
        assert_eq!(written, MOST_REFUSALS);
        tokio::time::advance(REFUSALS_IN).await;
        assert_eq!(refused.turn(), Some(1000 - MOST_REFUSALS));
        assert_eq!(refused.turn(), Some(0));
        let told = refused.unidentified(&call, Unidentified::Expired);
        assert_eq!(told, refused.unidentified(&call, Unidentified::Unknown), "all are alike");
        assert_eq!(refused.unidentified.load(Ordering::Relaxed), 2);
    }
}
