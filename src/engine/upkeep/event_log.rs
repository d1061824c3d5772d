//! Writes what was applied into the event log, behind whoever applies it.

use std::sync::Arc;
use std::time::Duration;

use crate::feed::Feed;
use crate::runtime::offload;

/// How long to let gather what is written at once.
const GATHER: Duration = Duration::from_millis(10);
/// How often to look whether a write that failed can be done, or something has become too old, while nothing is applied.
const LOOK: Duration = Duration::from_secs(10);

/// Runs for as long as the node does. What the event log fails with is no reason to stop.
pub(in crate::engine) async fn run(feed: Arc<Feed>) {
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
        let feed = feed.clone();
        offload(move || feed.write_log()).await;
    }
}
