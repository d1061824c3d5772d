//! Places in sessions: what they are worth after errors, and what they cost other writes.

use super::fake::{Next, failure, steps};
use super::*;
use crate::types::HistoryEpoch;

/// Only the caller's revision is of another history: the session is as good as before.
#[tokio::test]
async fn a_revision_of_another_history_costs_no_session() {
    let node = Fake::start(leader);
    let client = client_of(&[&node]);
    put(&client, "k", "v").await.unwrap();
    node.set_script(steps([Next::Refuse(failure(Reason::OtherHistory, false))]));
    let options = WriteOptions::default().with_history(HistoryEpoch(9));
    let error = client.put_with(&Scope::default(), "k", "v", options).await.unwrap_err();
    assert_eq!(error.reason(), Reason::OtherHistory, "{error}");
    put(&client, "k", "v").await.unwrap();
    assert_eq!(node.sessions().0, 1);
}
