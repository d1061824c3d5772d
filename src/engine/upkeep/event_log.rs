//! Writes what was applied into the event log, behind whoever applies it.

use std::sync::Arc;
use std::time::Duration;

use crate::feed::Feed;
use crate::runtime::offload;
use crate::storage::DiskWatch;

/// How long to let gather what is written at once.
const GATHER: Duration = Duration::from_millis(10);
/// How often to look whether a write that failed can be done, or something has become too old, while nothing is applied.
const LOOK: Duration = Duration::from_secs(10);

/// Runs for as long as the node does. What the event log fails with is no reason to stop. While the disk has no room for the log of the
/// cluster, this one does not grow.
pub(in crate::engine) async fn run(feed: Arc<Feed>, disk: DiskWatch) {
    let mut progress = feed.progress();
    loop {
        let again = feed.reach().is_log_failing || feed.log().is_some_and(|log| log.limits().age_ms > 0);
        let changed = async {
            match again {
                true => tokio::time::timeout(LOOK, progress.changed()).await.unwrap_or(Ok(())),
                false => progress.changed().await,
            }
        };
        if changed.await.is_err() {
            // The feed is gone, and it is held here.
            return std::future::pending().await;
        }
        tokio::time::sleep(GATHER).await;
        if !disk.status().state.takes_writes() {
            tokio::time::sleep(LOOK).await;
            continue;
        }
        let feed = feed.clone();
        offload(move || feed.write_log()).await;
    }
}
