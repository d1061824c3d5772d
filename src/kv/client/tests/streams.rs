//! Range streams and watches.

use std::sync::{Arc, Mutex};

use futures::StreamExt;
use tonic::{Code, Status};

use super::fake::failure;
use super::*;
use crate::proto::v1::{
    Event, Header as WireHeader, Item as WireItem, Position, RangeResponse, WatchRequest, WatchResponse,
    event, tagged_response,
};

fn broken() -> Status {
    Status::unavailable("the script says so")
}

fn compacted(first_revision: u64) -> Status {
    let failure = Failure { first_revision, ..failure(Reason::Compacted, false) };
    Status::with_details(Code::OutOfRange, "compacted", crate::proto::details::of_failure(&failure))
}

/// Puts at these revisions, in one message.
fn events(revisions: &[u64]) -> Result<WatchResponse, Status> {
    let event = |revision: &u64| Event {
        kind: event::Kind::Put.into(),
        revision: *revision,
        item: Some(WireItem { key: "k".into(), ..Default::default() }),
        ..Default::default()
    };
    let next_revision = revisions.last().map_or(0, |last| last + 1);
    Ok(WatchResponse { events: revisions.iter().map(event).collect(), next_revision, ..Default::default() })
}

/// From where each watch began.
type Notes = Arc<Mutex<Vec<u64>>>;

/// Notes from where each watch begins, and sends what the list says, one entry per watch.
fn noting(
    mut sent: Vec<Vec<Result<WatchResponse, Status>>>,
) -> (impl FnMut(WatchRequest) -> Vec<Result<WatchResponse, Status>> + Send + 'static, Notes) {
    let notes = Arc::new(Mutex::new(Vec::new()));
    let noted = notes.clone();
    let script = move |request: WatchRequest| {
        noted.lock().unwrap().push(request.from_revision);
        if sent.is_empty() { vec![] } else { sent.remove(0) }
    };
    (script, notes)
}

async fn revisions(watch: &mut Watch, count: usize) -> Vec<u64> {
    let mut revisions = Vec::new();
    while revisions.len() < count {
        let event = timeout(PATIENCE, watch.next()).await.expect("the watch hangs").unwrap();
        revisions.push(event.unwrap().revision);
    }
    revisions
}

#[tokio::test]
async fn a_watch_goes_on_after_breaks_without_gap_or_duplicate() {
    let node = Fake::start(leader);
    let progress = Ok(WatchResponse { next_revision: 20, ..Default::default() });
    let (script, notes) = noting(vec![
        vec![events(&[5, 5, 6]), Err(broken())],
        // Asked from 7, it repeats 6.
        vec![events(&[6, 7]), events(&[8]), progress, Err(broken())],
        vec![Err(broken())],
        vec![events(&[20, 21])],
    ]);
    node.set_watch(script);
    let client = client_of(&[&node]);
    let mut watch = client.watch(&Scope::default(), Range::key("k"), Some(5.into())).await.unwrap();
    assert_eq!(revisions(&mut watch, 1).await, [5]);
    assert_eq!(watch.resume_from().index, 5, "the other change of revision 5 has not been delivered");
    assert_eq!(revisions(&mut watch, 6).await, [5, 6, 7, 8, 20, 21]);
    assert_eq!(watch.resume_from().index, 22);
    assert_eq!(*notes.lock().unwrap(), [5, 7, 20, 20]);
    assert!(client.metrics().watch_reconnects >= 2);
}

/// A revision that exceeds a message comes in pieces, and from its beginning again after a break.
#[tokio::test]
async fn a_revision_in_pieces_is_delivered_once() {
    let node = Fake::start(leader);
    let piece = |revisions: &[u64], more: bool| {
        let message = events(revisions).unwrap();
        let next_revision = if more { message.next_revision - 1 } else { message.next_revision };
        Ok(WatchResponse { next_revision, more, ..message })
    };
    let (script, notes) = noting(vec![
        vec![piece(&[4, 5], true), piece(&[5, 5], true), Err(broken())],
        vec![piece(&[5, 5], true), Err(broken())],
        vec![piece(&[5, 5], true), piece(&[5, 5, 5], false), piece(&[6], false)],
    ]);
    node.set_watch(script);
    let client = client_of(&[&node]);
    let mut watch = client.watch(&Scope::default(), Range::key("k"), Some(4.into())).await.unwrap();
    assert_eq!(revisions(&mut watch, 4).await, [4, 5, 5, 5]);
    assert_eq!(watch.resume_from(), 5.into(), "another watch would have to begin with the whole of it");
    assert_eq!(revisions(&mut watch, 3).await, [5, 5, 6]);
    assert_eq!(*notes.lock().unwrap(), [4, 5, 5]);
    assert_eq!(watch.resume_from(), 7.into());
}

#[tokio::test]
async fn several_ranges_and_kinds_are_asked_for_on_one_watch() {
    let node = Fake::start(leader);
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noted = asked.clone();
    node.set_watch(move |request| {
        noted.lock().unwrap().push(request);
        vec![events(&[5])]
    });
    let client = client_of(&[&node]);
    for options in [
        WatchOptions::of(Range::prefix("a")).and(Range::key("b")).kinds([EventKind::Expire]).from(5),
        WatchOptions::of(Range::prefix("a")).from(5),
        WatchOptions::default().from(5),
    ] {
        let mut watch = client.watch_with(&Scope::default(), options).await.unwrap();
        assert_eq!(revisions(&mut watch, 1).await, [5]);
    }
    let asked = asked.lock().unwrap();
    let shapes: Vec<_> = asked
        .iter()
        .map(|request| {
            let ranges: Vec<_> =
                request.ranges.iter().map(|range| (&range.start[..], &range.end[..])).collect();
            (&request.start[..], &request.end[..], ranges, &request.kinds[..])
        })
        .collect();
    let several = vec![(&b"a"[..], &b"b"[..]), (b"b", b"b\0")];
    let none = b"".as_slice();
    assert_eq!(
        shapes,
        [(none, none, several, &[2][..]), (b"a", b"b", vec![], &[]), (none, none, vec![], &[]),]
    );
}

#[tokio::test]
async fn a_watch_goes_on_at_another_node_when_one_dies() {
    let (mut first, second) = (Fake::start(leader), Fake::start(leader));
    let (script, notes) = noting(vec![vec![events(&[1, 2])]]);
    first.set_watch(script);
    let (other_script, other_notes) = noting(vec![vec![events(&[3])]]);
    second.set_watch(other_script);
    let weights = [(Endpoint::parse(&first.endpoint()).unwrap(), 1)];
    let client = client_of(&[&first, &second]).preferring(ReadPreference::weighted(weights));
    let mut watch = client.watch(&Scope::default(), Range::prefix(""), Some(1.into())).await.unwrap();
    assert_eq!(revisions(&mut watch, 2).await, [1, 2]);
    first.kill();
    assert_eq!(revisions(&mut watch, 1).await, [3]);
    assert_eq!((notes.lock().unwrap().clone(), other_notes.lock().unwrap().clone()), (vec![1], vec![3]));
}

#[tokio::test]
async fn a_watch_leaves_a_node_that_is_silent_and_not_healthy() {
    let (first, second) = (Fake::start(leader), Fake::start(leader));
    first.set_watch(noting(vec![vec![events(&[1])]]).0);
    second.set_watch(noting(vec![vec![events(&[2])]]).0);
    first.set_status(status_of(1, Role::Follower, 1, None));
    second.set_status(status_of(2, Role::Follower, 1, None));
    let weights = [(Endpoint::parse(&first.endpoint()).unwrap(), 1)];
    let client = client_with(&[&first, &second], |config| config.health_interval = Duration::from_millis(10));
    let client = client.preferring(ReadPreference::weighted(weights));
    let mut watch = client.watch(&Scope::default(), Range::prefix(""), Some(1.into())).await.unwrap();
    assert_eq!(revisions(&mut watch, 1).await, [1]);
    first.set_status(StatusResponse { ready: false, ..status_of(1, Role::Follower, 1, None) });
    assert_eq!(revisions(&mut watch, 1).await, [2]);
}

#[tokio::test]
async fn a_watch_from_the_present_begins_after_what_is_known() {
    let node = Fake::start(|requests| {
        let header = WireHeader {
            position: Some(Position { term: 1, index: 41, history: 0xabc }),
            ..Default::default()
        };
        let range = RangeResponse { header: Some(header), ..Default::default() };
        let response = Some(tagged_response::Response::Range(range));
        Step::Answer(vec![TaggedResponse { tag: requests[0].tag, response }])
    });
    let (script, notes) = noting(vec![vec![Err(broken())], vec![events(&[42])]]);
    node.set_watch(script);
    let mut watch = client_of(&[&node]).watch(&Scope::default(), Range::prefix(""), None).await.unwrap();
    assert_eq!(revisions(&mut watch, 1).await, [42]);
    assert_eq!(*notes.lock().unwrap(), [42, 42]);
}

#[tokio::test]
async fn a_watch_ends_when_the_history_does_not_reach_back() {
    let node = Fake::start(leader);
    node.set_watch(noting(vec![vec![events(&[3]), Err(broken())], vec![Err(compacted(9))]]).0);
    let client = client_of(&[&node]);
    let mut watch = client.watch(&Scope::default(), Range::prefix(""), Some(3.into())).await.unwrap();
    assert_eq!(revisions(&mut watch, 1).await, [3]);
    assert_eq!((client.metrics().watches.opened, client.metrics().watches.failed), (1, 0));
    let end = timeout(PATIENCE, watch.next()).await.expect("the watch hangs").unwrap();
    assert_eq!(end, Err(ClientError::Compacted { first_revision: 9 }));
    assert_eq!((client.metrics().watches.opened, client.metrics().watches.failed), (1, 1));
    assert!(watch.next().await.is_none());
}

/// The history of one node begins late, because it was restarted from a snapshot: the others are asked, those too that only
/// this one knows of, before the watch is given up.
#[tokio::test]
async fn a_watch_asks_every_node_before_it_says_that_the_history_is_gone() {
    let [first, second, third] = [(); 3].map(|()| Fake::start(leader));
    let all = [(1, &first), (2, &second), (3, &third)];
    let info =
        |(node_id, fake): (u64, &Fake)| MemberInfo { node_id, client: fake.endpoint(), ..Default::default() };
    for (node_id, fake) in all {
        let members = all.map(info).to_vec();
        fake.set_status(StatusResponse { members, ..status_of(node_id, Role::Follower, 1, None) });
    }
    first.set_watch(|_| vec![Err(compacted(9))]);
    // A node may say so only after it has taken the call.
    second.set_watch(|_| vec![Ok(WatchResponse::default()), Err(compacted(7))]);
    third.set_watch(|_| vec![events(&[3, 4])]);
    let watch = |fakes: &[&Fake]| {
        let client = client_of(fakes);
        async move { client.watch(&Scope::default(), Range::all(), Some(3.into())).await.unwrap() }
    };
    assert_eq!(revisions(&mut watch(&[&first]).await, 2).await, [3, 4], "the others are found through it");

    third.set_watch(|_| vec![Err(compacted(8))]);
    let end =
        timeout(PATIENCE, watch(&[&first, &second, &third]).await.next()).await.expect("the watch hangs");
    assert_eq!(end, Some(Err(ClientError::Compacted { first_revision: 7 })), "the earliest that any has");
    // One that cannot be reached has been asked as well.
    let nobody = address_of_nobody();
    let client = Client::new([first.endpoint(), nobody], ClientConfig::default()).unwrap();
    second.set_watch(|_| vec![Err(compacted(8))]);
    let mut last = client.watch(&Scope::default(), Range::all(), Some(3.into())).await.unwrap();
    let end = timeout(PATIENCE, last.next()).await.expect("the watch hangs");
    assert_eq!(end, Some(Err(ClientError::Compacted { first_revision: 8 })));
}

#[tokio::test]
async fn a_watch_that_finds_nobody_says_so_in_time() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for endpoint in [address_of_nobody(), silent.local_addr().unwrap().to_string()] {
        let config = ClientConfig {
            timeout: Duration::from_millis(300),
            unavailable_after: Duration::ZERO,
            ..ClientConfig::default()
        };
        let client = Client::new([endpoint.clone()], config).unwrap();
        let mut watch = client.watch(&Scope::default(), Range::key("k"), Some(1.into())).await.unwrap();
        let mut contacts = watch.contacts();
        assert_eq!(contacts.now(), Contact::Seeking);
        let end = timeout(PATIENCE, watch.next()).await.expect("the watch hangs").unwrap();
        let Err(ClientError::Unavailable { tried }) = end else { panic!("{end:?}") };
        assert!(tried.len() == 1 && tried[0].0.as_str() == endpoint, "{tried:?}");
        assert!(watch.next().await.is_none());
        drop(watch);
        while contacts.changed().await.is_some() {}
    }
    // A node that answers and refuses for so long is no reason to say that it cannot be reached.
    let node = Fake::start(leader);
    node.set_watch(|_| vec![Err(broken())]);
    let client = client_with(&[&node], |config| config.timeout = Duration::from_millis(100));
    let mut watch = client.watch(&Scope::default(), Range::key("k"), Some(1.into())).await.unwrap();
    let end = timeout(PATIENCE, watch.next()).await.expect("the watch hangs").unwrap();
    assert!(matches!(&end, Err(ClientError::DeadlineExceeded { last: Some(_), .. })), "{end:?}");
}

#[tokio::test]
async fn a_watch_tells_when_it_loses_its_cluster_and_has_it_back() {
    let mut node = Fake::start(leader);
    node.set_watch(noting(vec![vec![events(&[1])]]).0);
    let client = client_with(&[&node], |config| config.health_interval = Duration::from_millis(10));
    let mut watch = client.watch(&Scope::default(), Range::key("k"), Some(1.into())).await.unwrap();
    let (mut contacts, mut all) = (watch.contacts(), client.contacts());
    let endpoint = Endpoint::parse(&node.endpoint()).unwrap();
    assert_eq!(revisions(&mut watch, 1).await, [1]);
    assert_eq!(contacts.changed().await, Some(Contact::Heard { endpoint: endpoint.clone() }));
    node.kill();
    let address = node.address;
    let lost = async {
        let lost = contacts.wait_for(|contact| matches!(contact, Contact::Lost { .. })).await;
        let Some(Contact::Lost { why }) = lost else { panic!("{lost:?}") };
        assert!(why.contains(endpoint.as_str()), "{why}");
        let all_lost = all.wait_for(|contact| matches!(contact, Contact::Lost { .. })).await;
        assert!(
            matches!(&all_lost, Some(Contact::Lost { why }) if why.contains(endpoint.as_str())),
            "{all_lost:?}"
        );
        let again = crate::runtime::offload(move || Fake::start_at(address, leader)).await;
        again.set_watch(noting(vec![vec![events(&[2])]]).0);
        again
    };
    let next = async { timeout(PATIENCE, watch.next()).await.expect("the watch hangs") };
    let (event, again) = tokio::join!(next, lost);
    assert_eq!(event.unwrap().unwrap().revision, 2);
    assert_eq!(contacts.now(), Contact::Heard { endpoint: endpoint.clone() });
    let heard = timeout(PATIENCE, all.wait_for(|contact| matches!(contact, Contact::Heard { .. }))).await;
    assert!(heard.expect("the client does not notice").is_some());
    drop(again);
}

/// A node that is cut off from its cluster goes on telling its watches how far it is.
#[tokio::test]
async fn a_message_of_a_node_that_is_cut_off_is_no_word_of_the_cluster() {
    let node = Fake::start(leader);
    let status = |ready| StatusResponse { ready, ..status_of(1, Role::Leader, 1, None) };
    node.set_status(status(true));
    node.set_watch(noting(vec![vec![events(&[1])]]).0);
    let client = client_with(&[&node], |config| config.health_interval = Duration::from_millis(10));
    let mut watch = client.watch(&Scope::default(), Range::key("k"), Some(1.into())).await.unwrap();
    assert_eq!(revisions(&mut watch, 1).await, [1]);
    let mut contacts = watch.contacts();
    assert!(matches!(contacts.now(), Contact::Heard { .. }));
    node.set_status(status(false));
    let cut_off = async {
        contacts.wait_for(|contact| matches!(contact, Contact::Lost { .. })).await.unwrap();
        node.push(events(&[2]).unwrap());
    };
    assert_eq!(tokio::join!(revisions(&mut watch, 1), cut_off).0, [2]);
    assert!(matches!(contacts.now(), Contact::Lost { .. }), "{:?}", contacts.now());
    node.set_status(status(true));
    let found = async {
        contacts.wait_for(|contact| matches!(contact, Contact::Heard { .. })).await.unwrap();
        node.push(events(&[3]).unwrap());
    };
    assert_eq!(tokio::join!(revisions(&mut watch, 1), found).0, [3]);
}

#[tokio::test]
async fn a_watch_that_begins_too_far_ahead_names_the_revision_that_was_asked_for() {
    let node = Fake::start(leader);
    let (code, message) = (Code::OutOfRange.into(), "position 99 is ahead".to_owned());
    let ahead = Failure { code, message, ..failure(Reason::Ahead, false) };
    node.set_watch(move |_| vec![Err(Status::from(ahead.clone()))]);
    let client = client_of(&[&node]);
    let mut watch = client.watch(&Scope::default(), Range::key("k"), Some(100.into())).await.unwrap();
    let error = timeout(PATIENCE, watch.next()).await.expect("the watch hangs").unwrap().unwrap_err();
    assert_eq!(error.reason(), Reason::Ahead);
    assert!(error.to_string().contains("at revision 100: position 99"), "{error}");
}

fn piece(keys: &[&'static str]) -> Result<RangeResponse, Status> {
    let items = keys.iter().map(|key| WireItem { key: (*key).into(), ..Default::default() }).collect();
    Ok(RangeResponse { items, ..Default::default() })
}

async fn keys(node: &Fake) -> Vec<Result<Item, ClientError>> {
    keys_by(&client_of(&[node])).await
}

async fn keys_by(client: &Client) -> Vec<Result<Item, ClientError>> {
    let stream = client.range_stream(&Scope::default(), Range::prefix(""), ReadLevel::Local).await;
    timeout(PATIENCE, stream.unwrap().collect()).await.expect("the stream hangs")
}

#[tokio::test]
async fn a_range_stream_brings_all_pieces() {
    let node = Fake::start(leader);
    node.set_pieces(vec![piece(&["a", "b"]), piece(&[]), piece(&["c"])]);
    let found: Vec<_> = keys(&node).await.into_iter().map(|item| item.unwrap().key).collect();
    assert_eq!(found, ["a", "b", "c"]);
    node.set_pieces(vec![piece(&[])]);
    assert!(keys(&node).await.is_empty());
}

/// A server that gives up on a reader, or a proxy that ends calls in good order, must not pass for the end of the range.
#[tokio::test]
async fn a_range_stream_that_ends_before_its_end_is_an_error() {
    let node = Fake::start(leader);
    let unfinished = |keys| piece(keys).map(|piece| RangeResponse { next: "b".into(), ..piece });
    node.set_pieces(vec![unfinished(&["a"])]);
    let found = keys(&node).await;
    assert_eq!(found.len(), 2, "{found:?}");
    let error = found[1].as_ref().unwrap_err().to_string();
    assert!(error.contains("ended it too early"), "{error}");

    // There is more, but no more was asked for.
    node.set_pieces(vec![unfinished(&["a"])]);
    let one = Range::prefix("").with_limit(1);
    let stream = client_of(&[&node]).range_stream(&Scope::default(), one, ReadLevel::Local).await.unwrap();
    let items: Vec<_> = timeout(PATIENCE, stream.collect()).await.expect("the stream hangs");
    assert!(matches!(&items[..], [Ok(item)] if item.key == "a"), "{items:?}");
}

#[tokio::test]
async fn a_range_stream_that_breaks_midway_ends_with_an_error() {
    let node = Fake::start(leader);
    node.set_pieces(vec![piece(&["a"]), Err(broken()), piece(&["b"])]);
    let client = client_of(&[&node]);
    let found = keys_by(&client).await;
    assert_eq!((client.metrics().range_streams.opened, client.metrics().range_streams.failed), (1, 1));
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].as_ref().unwrap().key, "a");
    let error = found[1].as_ref().unwrap_err();
    assert!(matches!(error, ClientError::Failed { maybe_applied: false, .. }), "{error}");
}

/// It asks for the same state again, from the first key that it lacks, and only for what is left.
#[tokio::test]
async fn a_range_stream_that_breaks_goes_on_at_the_same_state() {
    let at = Position { term: 2, index: 7, history: 9 };
    let header = Some(WireHeader { position: Some(at), ..Default::default() });
    let part = |keys: &[&'static str], next: &'static str| {
        piece(keys).map(|piece| RangeResponse { header: header.clone(), next: next.into(), ..piece })
    };
    let node = Fake::start(leader);
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noted = asked.clone();
    let mut answers = vec![
        vec![part(&["a", "b"], "c"), Err(broken())],
        vec![Err(broken())],
        // Ended in good order, and too early.
        vec![part(&["c"], "d")],
        vec![part(&["d"], "")],
    ];
    node.set_ranges(move |request| {
        noted.lock().unwrap().push((request.start.clone(), request.limit, request.at));
        answers.remove(0)
    });
    let client = client_of(&[&node]);
    let range = Range::prefix("").with_limit(9);
    let stream = client.range_stream(&Scope::default(), range, ReadLevel::Local).await.unwrap();
    let items: Vec<_> = timeout(PATIENCE, stream.collect()).await.expect("the stream hangs");
    let keys: Vec<_> = items.into_iter().map(|item| item.unwrap().key).collect();
    assert_eq!(keys, ["a", "b", "c", "d"]);
    let again = |start: &'static str, limit| (start.into(), limit, Some(at));
    let expected = [("".into(), 9, None), again("c", 7), again("c", 7), again("d", 6)];
    assert_eq!(*asked.lock().unwrap(), expected);
    assert_eq!(client.metrics().range_streams.failed, 0);
}

/// It tells why the node never goes on, and not only that it broke off.
#[tokio::test]
async fn a_range_stream_whose_state_is_gone_says_so() {
    let at = Position { term: 2, index: 7, history: 9 };
    let header = Some(WireHeader { position: Some(at), ..Default::default() });
    let first =
        || piece(&["a"]).map(|piece| RangeResponse { header: header.clone(), next: "b".into(), ..piece });
    for reason in [Reason::Compacted, Reason::Diverged, Reason::OtherHistory, Reason::Ahead] {
        let refusal = || {
            let (code, message) = (Code::OutOfRange.into(), "read it anew".to_owned());
            Status::from(Failure { code, message, ..failure(reason, false) })
        };
        for broken_by in [broken(), refusal()] {
            let node = Fake::start(leader);
            let mut answers = vec![vec![first(), Err(broken_by)], vec![Err(refusal())]];
            node.set_ranges(move |_| answers.remove(0));
            let client = client_of(&[&node]);
            let found = keys_by(&client).await;
            assert_eq!((found.len(), client.metrics().range_streams.failed), (2, 1), "{found:?}");
            let error = found[1].as_ref().unwrap_err();
            assert_eq!((error.reason(), error.maybe_applied()), (reason, false), "{error}");
            assert!(error.to_string().contains("midway: read it anew"), "{error}");
        }
    }
}

#[tokio::test]
async fn a_range_stream_is_opened_at_a_node_that_can_answer() {
    let first = Fake::start(leader);
    first.set_pieces(vec![Err(broken())]);
    let second = Fake::start(leader);
    second.set_pieces(vec![piece(&["a"])]);
    let client = client_of(&[&first, &second]);
    for _ in 0..4 {
        let stream =
            client.range_stream(&Scope::default(), Range::prefix(""), ReadLevel::Local).await.unwrap();
        let items: Vec<_> = timeout(PATIENCE, stream.collect::<Vec<_>>()).await.expect("the stream hangs");
        assert_eq!(items.len(), 1);
    }
    let metrics = client.metrics();
    assert_eq!((metrics.range_streams.opened, metrics.range_streams.failed), (4, 0));
    let counts = |node: &Fake| {
        let endpoint = node.endpoint();
        let node = metrics.nodes.iter().find(|known| known.endpoint.as_str() == endpoint).unwrap();
        (node.attempts, node.failures)
    };
    let (asked_in_vain, failures) = counts(&first);
    assert_eq!(asked_in_vain, failures);
    assert_eq!(counts(&second), (4, 0));
}

#[tokio::test]
async fn what_is_known_of_each_node_is_told() {
    let (healthy, unready) = (Fake::start(leader), Fake::start(silent));
    healthy.set_status(status_of(1, Role::Leader, 1, Some((1, &healthy))));
    unready.set_status(StatusResponse { ready: false, ..status_of(2, Role::Follower, 1, None) });
    let client = client_of(&[&healthy, &unready]);
    let of = |node: &Fake| {
        let nodes = client.metrics().nodes;
        nodes.into_iter().find(|known| known.endpoint.as_str() == node.endpoint()).unwrap()
    };
    let before = of(&unready);
    assert_eq!((before.healthy, before.attempts, before.round_trip), (true, 0, None), "nothing was asked");
    client.status_all().await;
    put(&client, "k", "v").await.unwrap();
    let (healthy, after) = (of(&healthy), of(&unready));
    assert!(healthy.healthy && healthy.round_trip.is_some() && healthy.attempts > 0, "{healthy:?}");
    assert_eq!((healthy.failures, healthy.in_flight), (0, 0));
    assert!(!after.healthy && after.round_trip.is_some(), "{after:?}");

    unready.set_status(status_of(2, Role::Follower, 1, None));
    client.status_all().await;
    let elsewhere = client.preferring(ReadPreference::weighted([(after.endpoint.clone(), 1)]));
    let waiting = crate::runtime::spawn(async move { get(&elsewhere, "k", ReadLevel::Local).await });
    timeout(PATIENCE, async {
        while of(&unready).in_flight == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("the read waits for its node");
    assert_eq!(of(&unready).attempts, after.attempts + 1);
    waiting.abort();
}

#[tokio::test]
async fn a_watch_says_that_its_cluster_was_made_anew() {
    for reason in [Reason::OtherHistory, Reason::Ahead] {
        let node = Fake::start(leader);
        let refused = Failure { code: Code::OutOfRange.into(), ..failure(reason, false) };
        let refused = Status::from(refused);
        node.set_watch(noting(vec![vec![events(&[3]), Err(broken())], vec![Err(refused)]]).0);
        let client = client_of(&[&node]);
        let mut watch = client.watch(&Scope::default(), Range::prefix(""), Some(3.into())).await.unwrap();
        assert_eq!(revisions(&mut watch, 1).await, [3]);
        let error = timeout(PATIENCE, watch.next()).await.expect("the watch hangs").unwrap().unwrap_err();
        assert_eq!(error.reason(), reason);
        assert!(timeout(PATIENCE, watch.next()).await.expect("the watch hangs").is_none());
    }
}

/// All nodes restart, and the first that is back has the shortest history.
#[tokio::test]
async fn a_watch_asks_those_again_that_failed_before_one_refused() {
    let [first, second] = [(); 2].map(|()| Fake::start(leader));
    first.set_watch(noting(vec![vec![events(&[3]), Err(broken())], vec![Err(compacted(9))]]).0);
    let mut down = 2;
    second.set_watch(move |_| {
        if down > 0 {
            down -= 1;
            return vec![Err(broken())];
        }
        vec![events(&[4])]
    });
    let nearest = ReadPreference::weighted([(Endpoint::parse(&first.endpoint()).unwrap(), 1)]);
    let client = client_of(&[&first, &second]).preferring(nearest);
    let mut watch = client.watch(&Scope::default(), Range::all(), Some(3.into())).await.unwrap();
    assert_eq!(revisions(&mut watch, 2).await, [3, 4]);
}
