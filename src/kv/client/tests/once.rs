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
    assert_eq!((error.reason(), error.is_final()), (Reason::OtherHistory, true), "{error}");
    put(&client, "k", "v").await.unwrap();
    assert_eq!(node.sessions().0, 1);
}

/// It has been applied: whatever comes of asking again does not say that nothing was.
#[tokio::test]
async fn what_was_applied_once_is_not_called_undone_when_it_is_asked_for_again() {
    let node = Fake::start(leader);
    let client = client_of(&[&node]);
    let scope = Scope::default();
    for reason in [Reason::SessionExpired, Reason::OtherHistory, Reason::QuotaExceeded] {
        let mut once = client.once().await.unwrap();
        node.set_script(leader);
        once.put(&scope, "k", "v").await.unwrap();
        once.put(&scope, "k", "v").await.unwrap();
        node.set_script(refusing(failure(reason, false)));
        let error = once.put(&scope, "k", "v").await.unwrap_err();
        assert!(error.maybe_applied(), "{reason:?}: {error}");
    }
    // Nothing but refusals: nothing was applied.
    let mut once = client.once().await.unwrap();
    let error = once.put(&scope, "k", "v").await.unwrap_err();
    assert!(!error.maybe_applied(), "{error}");
    // An answer that cannot be read leaves it open, and so does every later one.
    node.set_script(|requests| {
        let wrong = crate::proto::v1::tagged_response::Response::OpenSession(Default::default());
        Step::Answer(vec![TaggedResponse { tag: served(&requests[0]).tag, response: Some(wrong) }])
    });
    assert!(once.put(&scope, "k", "v").await.unwrap_err().maybe_applied());
    node.set_script(refusing(failure(Reason::QuotaExceeded, false)));
    assert!(once.put(&scope, "k", "v").await.unwrap_err().maybe_applied());
}

/// The cluster was restored: in this session nothing can be written any more, and the next place is in another.
#[tokio::test]
async fn a_place_in_another_history_is_lost_for_good() {
    let node = Fake::start(leader);
    let client = client_of(&[&node]);
    let mut once = client.once().await.unwrap();
    node.set_script(refusing(failure(Reason::OtherHistory, false)));
    let error = once.put(&Scope::default(), "k", "v").await.unwrap_err();
    assert!(error.is_final(), "{error}");
    node.set_script(leader);
    let mut next = client.once().await.unwrap();
    next.put(&Scope::default(), "k", "v").await.unwrap();
    assert_eq!(node.sessions().0, 2);
}

/// A place that is held, or a write that waits for a slow voter, keeps the window from moving on.
#[tokio::test]
async fn one_write_that_is_not_settled_does_not_stop_the_others() {
    let node = Fake::start(leader);
    node.set_window(4);
    let client = client_with(&[&node], |config| config.timeout = Duration::from_millis(500));
    let mut held = client.once().await.unwrap();
    for _ in 0..20 {
        put(&client, "k", "v").await.unwrap();
    }
    held.put(&Scope::default(), "k", "v").await.unwrap();
    assert_eq!(node.sessions(), (2, 0));
    // The next time that happens the first one is idle.
    drop(held);
    let held = client.once().await.unwrap();
    for _ in 0..20 {
        put(&client, "k", "v").await.unwrap();
    }
    until("it is closed", || node.sessions() == (3, 1)).await;
    client.close().await;
    until("all of them are closed", || node.sessions() == (3, 3)).await;
    drop(held);
}
