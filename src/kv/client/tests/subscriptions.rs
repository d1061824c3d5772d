//! Subscriptions to what is applied.

use std::collections::BTreeSet;

use futures::{FutureExt, StreamExt};

use super::replica::{batch, beat, because, broken, entry, entry_of};
use super::*;
use crate::client::{EntryCompression, EntryFilter, FollowedChange, SubscribeOptions, Subscription};
use crate::proto::replication::{Compression, EntriesResponse, Filter, WalEntryProto};
use crate::types::{Bookmark, HistoryEpoch};

const HISTORY: HistoryEpoch = HistoryEpoch(0xabc);

fn at(index: u64) -> Bookmark {
    Bookmark { index, history: HISTORY }
}

async fn next(subscription: &mut Subscription) -> Result<(u64, String), ClientError> {
    let entry = timeout(PATIENCE, subscription.next()).await.expect("the subscription hangs").unwrap()?;
    match entry.change {
        FollowedChange::Event { collection, .. } => Ok((entry.seq, collection)),
        FollowedChange::Command { .. } => Ok((entry.seq, "a command".to_owned())),
        FollowedChange::Nothing => Ok((entry.seq, "nothing".to_owned())),
    }
}

async fn seqs(subscription: &mut Subscription, count: usize) -> Vec<u64> {
    let mut seqs = Vec::new();
    while seqs.len() < count {
        seqs.push(next(subscription).await.unwrap().0);
    }
    seqs
}

/// Reads on, which is what takes what was delivered, until `condition` holds.
async fn until_reading(subscription: &mut Subscription, what: &str, condition: impl FnMut() -> bool) {
    tokio::select! {
        entry = subscription.next() => panic!("{entry:?} instead of {what}"),
        () = until(what, condition) => {}
    }
}

/// A client that prefers the first of them.
fn preferring_first(fakes: &[&Fake]) -> Client {
    let weights = [(Endpoint::parse(&fakes[0].endpoint()).unwrap(), 1)];
    client_of(fakes).preferring(ReadPreference::weighted(weights))
}

/// Nothing of position 5 is repeated or left out although breaks cut it, at one node and at another.
#[tokio::test]
async fn a_position_in_pieces_is_delivered_once_across_nodes() {
    let (mut first, second) = (Fake::start(leader), Fake::start(leader));
    let piece = |name: &str| Ok(entry_of(name, 5, name != "c"));
    first
        .replica()
        .set([vec![Ok(beat(3)), Ok(entry(4)), piece("a"), Err(broken())], vec![piece("a"), piece("b")]]);
    second.replica().set([vec![
        Ok(batch(vec![entry_of("a", 5, true), entry_of("b", 5, true)], Compression::None)),
        piece("c"),
        Ok(entry(6)),
    ]]);
    let client = client_of(&[&first]);
    let mut subscription = client.subscribe(SubscribeOptions::after(at(3))).await.unwrap();
    let name = |seq, name: &str| Ok((seq, name.to_owned()));
    assert_eq!(next(&mut subscription).await, name(4, "default"));
    assert_eq!(next(&mut subscription).await, name(5, "a"));
    assert_eq!(next(&mut subscription).await, name(5, "b"));
    assert_eq!(subscription.position(), at(4), "another one would have to begin with the whole of 5");
    // The other node is found as clients find nodes: by its address.
    client.router.at(&Endpoint::parse(&second.endpoint()).unwrap());
    client.status(&Endpoint::parse(&second.endpoint()).unwrap()).await.unwrap_err();
    first.kill();
    assert_eq!(next(&mut subscription).await, name(5, "c"));
    assert_eq!(subscription.position(), at(4), "nothing after it has been asked for");
    assert_eq!(next(&mut subscription).await, name(6, "default"));
    assert_eq!(subscription.position(), at(5));
    assert_eq!((first.replica().begun(), second.replica().begun()), (vec![3, 4], vec![4]));
    assert_eq!(second.replica().opened()[0].history, 0xabc);
    let metrics = client.metrics();
    assert_eq!((metrics.subscriptions.opened, metrics.subscriptions.failed), (1, 0));
    assert_eq!(metrics.subscription_reconnects, 2);
    assert_eq!(subscription.close().await, at(6));
}

#[tokio::test]
async fn batches_come_compressed_or_not_and_options_are_sent() {
    let node = Fake::start(leader);
    node.replica().set([vec![
        Ok(batch(vec![entry(1), entry(2)], Compression::Zstd)),
        Ok(batch(vec![entry(3)], Compression::None)),
        Ok(entry(4)),
    ]]);
    let mut options = SubscribeOptions::from_beginning();
    options.compression = EntryCompression::Zstd;
    options.window_bytes = 1000;
    options.heartbeat = Duration::from_secs(7);
    options.id = "mirror".to_owned();
    options.filters = vec![EntryFilter::tenant("t"), EntryFilter::collection("u", "c")];
    let mut subscription = client_of(&[&node]).subscribe(options).await.unwrap();
    assert_eq!(seqs(&mut subscription, 4).await, [1, 2, 3, 4]);
    let [opened] = &node.replica().opened()[..] else { panic!("one stream") };
    let filter =
        |tenant: &str, collection: &str| Filter { tenant_id: tenant.into(), collection: collection.into() };
    assert_eq!(opened.filters, [filter("t", ""), filter("u", "c")]);
    assert_eq!((opened.window_bytes, opened.heartbeat_ms, opened.id.as_str()), (1000, 7000, "mirror"));
    assert!(opened.batched && !opened.from_now && !opened.accept_snapshot);
    assert_eq!(opened.compression(), Compression::Zstd);
    let mut bad = SubscribeOptions::from_now();
    bad.heartbeat = Duration::ZERO;
    let error = client_of(&[&node]).subscribe(bad).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Invalid);
}

#[tokio::test]
async fn every_node_is_asked_before_the_history_is_said_to_be_gone() {
    let (first, second) = (Fake::start(leader), Fake::start(leader));
    first.replica().set([vec![Err(because(Reason::Compacted, 9))]]);
    second.replica().set([vec![Ok(entry(4))]]);
    let client = preferring_first(&[&first, &second]);
    let mut subscription = client.subscribe(SubscribeOptions::after(3)).await.unwrap();
    assert_eq!(seqs(&mut subscription, 1).await, [4]);
    assert_eq!((first.replica().begun(), second.replica().begun()), (vec![3], vec![3]));

    first.replica().set([vec![Err(because(Reason::Compacted, 9))]]);
    // A node may say so only after it has taken the call.
    second.replica().set([vec![Ok(beat(3)), Err(because(Reason::Compacted, 7))]]);
    let mut subscription = client.subscribe(SubscribeOptions::after(3)).await.unwrap();
    assert_eq!(next(&mut subscription).await, Err(ClientError::Compacted { first_revision: 7 }));
    assert!(subscription.next().await.is_none());

    for reason in [Reason::OtherHistory, Reason::Ahead] {
        first.replica().set([vec![Err(because(reason, 0))]]);
        second.replica().set([vec![Err(because(reason, 0))]]);
        let mut subscription = client.subscribe(SubscribeOptions::after(3)).await.unwrap();
        let error = next(&mut subscription).await.unwrap_err();
        assert_eq!(error.reason(), reason);
        let names_it = error.to_string().contains("cannot begin after position 3: it says why");
        assert_eq!(names_it, reason == Reason::Ahead, "{error}");
    }
    assert_eq!(client.metrics().subscriptions.failed, 3);
}

/// What the first node has said counts, whoever brings the first entry, and whenever.
#[tokio::test]
async fn the_present_is_what_the_first_node_has_said() {
    let (mut first, second) = (Fake::start(leader), Fake::start(leader));
    first.replica().set([vec![Ok(beat(10))]]);
    second.replica().set([vec![Ok(entry(11)), Ok(entry(12))]]);
    let client = preferring_first(&[&first, &second]);
    let mut subscription = client.subscribe(SubscribeOptions::from_now()).await.unwrap();
    assert_eq!(subscription.position(), at(10));
    assert!(first.replica().opened()[0].from_now);
    first.kill();
    assert_eq!(seqs(&mut subscription, 2).await, [11, 12]);
    let [opened] = &second.replica().opened()[..] else { panic!("one stream") };
    assert_eq!((opened.from_now, opened.from_seq, opened.history), (false, 10, 0xabc));
}

#[tokio::test]
async fn a_heartbeat_moves_on_past_what_the_filter_leaves_out() {
    let node = Fake::start(leader);
    node.replica().set([vec![Ok(beat(3)), Ok(entry(4)), Ok(beat(90))]]);
    let mut options = SubscribeOptions::after(at(3));
    options.filters = vec![EntryFilter::tenant("t")];
    let mut subscription = client_of(&[&node]).subscribe(options).await.unwrap();
    assert_eq!(seqs(&mut subscription, 1).await, [4]);
    until_reading(&mut subscription, "90 is acknowledged", || node.replica().acks().contains(&90)).await;
    assert_eq!(subscription.position(), at(90));
    node.replica().push(entry(91));
    assert_eq!(seqs(&mut subscription, 1).await, [91]);
    assert!(node.replica().acks().iter().all(|ack| [3, 4, 90].contains(ack)), "{:?}", node.replica().acks());
}

#[tokio::test]
async fn nothing_is_acknowledged_before_what_follows_it_is_asked_for() {
    let node = Fake::start(leader);
    let first = vec![entry(1), entry_of("a", 2, true), entry_of("b", 2, false), entry(3)];
    node.replica().set([vec![Ok(batch(first, Compression::None)), Ok(entry(4))]]);
    let mut options = SubscribeOptions::from_beginning();
    // Every entry is more than a step of it.
    options.window_bytes = 4;
    let mut subscription = client_of(&[&node]).subscribe(options).await.unwrap();
    let mut most_allowed = BTreeSet::new();
    for (expected, taken) in [(1, 0), (2, 1), (2, 1), (3, 2)] {
        assert_eq!(seqs(&mut subscription, 1).await, [expected]);
        assert_eq!(subscription.position().index, taken);
        most_allowed.insert(taken);
        let acked = node.replica().acks().into_iter().max().unwrap_or(0);
        assert!(acked <= taken, "{acked} is acknowledged, {taken} is taken");
    }
    assert_eq!(seqs(&mut subscription, 1).await, [4]);
    assert_eq!(subscription.position().index, 3);
    until("3 is acknowledged", || node.replica().acks().contains(&3)).await;
    assert!(!node.replica().acks().contains(&4));
    assert_eq!(subscription.close().await, at(4));
    until("4 is acknowledged", || node.replica().acks().contains(&4)).await;
}

/// One of which nothing was read yet has taken nothing.
#[tokio::test]
async fn what_is_closed_before_it_is_read_stands_where_it_began() {
    let node = Fake::start(leader);
    let subscription = client_of(&[&node]).subscribe(SubscribeOptions::after(at(7))).await.unwrap();
    assert_eq!(subscription.close().await, at(7));
    assert!(node.replica().opened().is_empty());
}

/// Though it is little, and the window far from full: where a node counts otherwise it might wait for it.
#[tokio::test]
async fn what_was_taken_is_acknowledged_once_nothing_more_comes() {
    let node = Fake::start(leader);
    node.replica().set([vec![Ok(entry(1)), Ok(entry(2))]]);
    let mut subscription = client_of(&[&node]).subscribe(SubscribeOptions::from_beginning()).await.unwrap();
    assert_eq!(seqs(&mut subscription, 2).await, [1, 2]);
    until_reading(&mut subscription, "2 is acknowledged", || node.replica().acks().contains(&2)).await;
}

#[tokio::test]
async fn what_cannot_be_used_is_told_and_another_node_asked() {
    let packed = || batch(vec![entry(4), entry(5)], Compression::Zstd);
    let spoilt = |spoil: fn(&mut crate::proto::replication::Batch)| {
        let mut message = packed();
        spoil(message.batch.as_mut().unwrap());
        message
    };
    let other = WalEntryProto { history: 0xdef, ..beat(5) };
    for (sent, why) in [
        (vec![beat(3), spoilt(|batch| batch.entries = batch.entries.slice(1..))], "cannot be decompressed"),
        (vec![beat(3), spoilt(|batch| batch.count = 9)], "should have 9 entries, and has 2"),
        (vec![beat(3), spoilt(|batch| batch.raw_bytes = 1 << 40)], "it may have"),
        (vec![entry(4), entry(4)], "it goes back: position 4 after everything up to 4"),
        (vec![entry(3)], "it goes back: position 3 after everything up to 3"),
        (vec![beat(3), entry(5), entry(4)], "it goes back: position 4"),
        (vec![beat(9), beat(8)], "it goes back: a heartbeat up to 8 after 9"),
        (vec![WalEntryProto { operation: 77, ..entry(4) }], "which is not known here"),
        (vec![beat(3), other], "another history"),
    ] {
        let (first, second) = (Fake::start(leader), Fake::start(leader));
        first.replica().set([sent.into_iter().map(Ok).collect()]);
        second.replica().set([vec![Ok(entry(20))]]);
        let client = preferring_first(&[&first, &second]);
        let mut subscription = client.subscribe(SubscribeOptions::after(at(3))).await.unwrap();
        let mut last = 0;
        while last != 20 {
            let (seq, _) = next(&mut subscription).await.unwrap();
            assert!(seq > last, "{why}: {seq} after {last}");
            last = seq;
        }
        assert_eq!(client.metrics().subscription_reconnects, 1, "{why}");

        // Where there is no other, it says so.
        let alone = Fake::start(leader);
        let bad = WalEntryProto { operation: 77, ..entry(4) };
        alone.replica().set(std::iter::repeat_n(vec![Ok(bad)], 100));
        let client = client_with(&[&alone], |config| config.timeout = Duration::from_millis(50));
        let mut subscription = client.subscribe(SubscribeOptions::after(at(3))).await.unwrap();
        let error = next(&mut subscription).await.unwrap_err().to_string();
        assert!(error.contains("cannot be used: position 4"), "{error}");
    }
}

/// One that is reached, and healthy as far as is known.
#[tokio::test]
async fn a_node_that_sends_nothing_is_left() {
    let (first, second) = (Fake::start(leader), Fake::start(leader));
    for (node_id, fake) in [(1, &first), (2, &second)] {
        fake.set_status(StatusResponse { ready: true, ..status_of(node_id, Role::Follower, 1, None) });
    }
    first.replica().set([vec![Ok(beat(3))]]);
    second.replica().set([vec![Ok(entry(4))]]);
    let mut options = SubscribeOptions::after(at(3));
    options.heartbeat = Duration::from_millis(20);
    let weights = [(Endpoint::parse(&first.endpoint()).unwrap(), 1)];
    options.preference = Some(ReadPreference::weighted(weights));
    let mut subscription = client_of(&[&first, &second]).subscribe(options).await.unwrap();
    assert_eq!(seqs(&mut subscription, 1).await, [4]);
    assert_eq!((first.replica().begun(), second.replica().begun()), (vec![3], vec![3]));
}

/// One that goes on saying that it lives, but has lost its cluster.
#[tokio::test]
async fn a_node_that_is_cut_off_is_left_whatever_it_says() {
    let (first, second) = (Fake::start(leader), Fake::start(leader));
    let status = |node_id, ready| StatusResponse { ready, ..status_of(node_id, Role::Follower, 1, None) };
    first.set_status(status(1, true));
    second.set_status(status(2, true));
    first.replica().set([vec![Ok(beat(3)), Ok(entry(4))]]);
    second.replica().set([vec![Ok(entry(5))]]);
    let weights = [(Endpoint::parse(&first.endpoint()).unwrap(), 1)];
    let client = client_with(&[&first, &second], |config| config.health_interval = Duration::from_millis(20));
    let client = client.preferring(ReadPreference::weighted(weights));
    let mut subscription = client.subscribe(SubscribeOptions::after(at(3))).await.unwrap();
    assert_eq!(seqs(&mut subscription, 1).await, [4]);
    first.set_status(status(1, false));
    let beating = async {
        while second.replica().opened().is_empty() {
            first.replica().push(beat(4));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert_eq!(tokio::join!(seqs(&mut subscription, 1), beating).0, [5]);
}

#[tokio::test]
async fn a_follower_that_was_let_go_of_goes_on() {
    let node = Fake::start(leader);
    node.replica().set([
        vec![Ok(entry(1)), Err(because(Reason::Lagged, 0))],
        vec![Ok(entry(2)), Err(because(Reason::Stopped, 0))],
        vec![Ok(entry(3))],
    ]);
    let client = client_of(&[&node]);
    let mut subscription = client.subscribe(SubscribeOptions::from_beginning()).await.unwrap();
    assert_eq!(seqs(&mut subscription, 3).await, [1, 2, 3]);
    assert_eq!(node.replica().begun(), [0, 1, 2]);
    assert!(subscription.next().now_or_never().is_none(), "it waits");
}

#[tokio::test]
async fn entries_and_status_are_asked_for_once() {
    let (first, second) = (Fake::start(leader), Fake::start(leader));
    let page = |entries: Vec<WalEntryProto>, upto_seq, more| {
        Ok(EntriesResponse { entries, upto_seq, more, history: 0xabc })
    };
    first.replica().set_looks([
        (1, Err(because(Reason::Compacted, 9))),
        (2, Err(because(Reason::Compacted, 9))),
        (3, page(vec![entry(3)], 3, false)),
        (4, page(vec![], 4, true)),
        (5, page(vec![], 8, true)),
    ]);
    second.replica().set_looks([
        (1, page(vec![entry_of("a", 2, true), entry_of("b", 2, false)], 6, true)),
        (2, Err(because(Reason::Compacted, 7))),
    ]);
    let client = preferring_first(&[&first, &second]);
    let filters = [EntryFilter::collection("t", "c")];
    let found = client.entries_after(at(1), 10, &filters).await.unwrap();
    assert_eq!((found.entries.len(), found.upto, found.more), (2, at(6), true));
    let [asked] = &second.replica().looked()[..] else { panic!("one question") };
    assert_eq!((asked.after_seq, asked.limit, asked.history, asked.filters.len()), (1, 10, 0xabc, 1));
    let gone = client.entries_after(2, 0, &[]).await;
    assert_eq!(gone, Err(ClientError::Compacted { first_revision: 7 }));
    for after in [3, 4] {
        let error = client.entries_after(after, 0, &[]).await.unwrap_err();
        assert!(error.to_string().contains("cannot be used"), "{error}");
    }
    let empty = client.entries_after(5, 0, &[]).await.unwrap();
    assert_eq!((empty.entries.len(), empty.upto, empty.more), (0, at(8), true));

    let status = client.replication_status(&Endpoint::parse(&first.endpoint()).unwrap()).await.unwrap();
    assert_eq!((status.node_id, status.first_seq, status.current, status.leader), (2, 3, at(9), None));
    let nobody = Endpoint::parse(&address_of_nobody()).unwrap();
    let error = client.replication_status(&nobody).await.unwrap_err();
    assert!(matches!(&error, ClientError::Unavailable { tried } if tried[0].0 == nobody), "{error}");
}
