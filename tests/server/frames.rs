//! Followers of a node that speak frames: the same stream as over gRPC, read by a decoder of its own.

mod follower;
mod rights;

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use quorate::EngineConfig;
use quorate::client::MachineClient;
use quorate::kv::Kv;
use quorate::server::{DoorLimits, MachineGuest, Server};
use quorate::testkit::proto::replication::{WalEntryProto, WalOperation};
use quorate::testkit::proto::v1::SnapshotRequest;
use quorate::testkit::proto::v1::admin_client::AdminClient;
use quorate::testkit::proto::v1::kv_client::KvClient;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::oneshot;
use tokio::time::timeout;

use self::follower::{Compression, Follower, Said, Subscribe, Sync, Told, entries, frame};
use crate::machine_guest::{Change as SumChange, Sum, served_on};
use crate::replication::{http, json_of, metric};
use crate::subscribe::{pages, plain, put_one, write_much};
use crate::{DEADLINE, channel, put_many, with_server};

/// Runs `test` against a node in `dir`, with its client port and the port for frames.
async fn followed<T>(dir: &Path, test: impl AsyncFnOnce(SocketAddr, SocketAddr) -> T) -> T {
    let (server, frames) = bind().await;
    with_server(dir, server, async move |client| test(client, frames).await).await
}

async fn bind() -> (Server<Kv>, SocketAddr) {
    let server = quorate::kv::bind("127.0.0.1:0").await.unwrap();
    assert_eq!(server.frames_addr(), None, "the port is shut unless it is asked for");
    let server = server.with_frames("127.0.0.1:0").await.unwrap();
    let frames = server.frames_addr().unwrap();
    (server, frames)
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_tell_once_and_in_order_what_grpc_tells() {
    let dir = tempfile::tempdir().unwrap();
    followed(dir.path(), async |client, frames| {
        let writing = write_much(client);
        let (mut live, begin) = Follower::begin(frames, Subscribe::default()).await;
        assert_eq!((begin.sync, begin.seq), (Sync::Partial, 0));
        let last = writing.await;
        let all = live.upto(last).await;
        assert!(
            all.windows(2).all(|two| two[0].more == (two[0].seq == two[1].seq) && two[0].seq <= two[1].seq)
        );
        assert_eq!(all, pages(client, 0).await);
        let ways = [(false, false), (true, false), (true, true)];
        for (batched, compressed) in ways {
            let first = Subscribe { batched, compressed, ..Subscribe::default() };
            let (mut follower, _) = Follower::begin(frames, first).await;
            assert_eq!(follower.upto(last).await, all, "{batched} {compressed}");
            assert_eq!(follower.compressed > 0, compressed);
        }
        let beat = live.heartbeat().await;
        assert!(beat.upto_seq >= last && beat.applied_seq >= last && beat.committed_seq >= beat.applied_seq);
        assert_eq!(beat.lag_operations, beat.committed_seq - beat.upto_seq);
        assert_eq!(beat.lag_ms, beat.applied_time_ms - beat.upto_time_ms);
        assert!(beat.applied_time_ms >= all.last().unwrap().time_ms && beat.applied_elapsed_ms > 0);

        // From the middle of it on, of one tenant, and of nothing.
        let middle = all[100].seq;
        let first =
            Subscribe { from_seq: middle, history: begin.history, batched: true, ..Subscribe::default() };
        let (mut follower, begin) = Follower::begin(frames, first).await;
        assert_eq!((begin.sync, begin.seq), (Sync::Partial, middle));
        let later: Vec<_> = all.iter().filter(|entry| entry.seq > middle).cloned().collect();
        assert_eq!(follower.upto(last).await, later);
        let filters = vec![("other".to_owned(), "c".to_owned())];
        let (mut follower, _) = Follower::begin(frames, Subscribe { filters, ..Subscribe::default() }).await;
        assert_eq!(follower.upto(last).await, all[all.len() - 1..]);
        let filters = vec![("t".to_owned(), "none".to_owned())];
        let (mut follower, _) = Follower::begin(frames, Subscribe { filters, ..Subscribe::default() }).await;
        while follower.heartbeat().await.upto_seq < last {}
        let (mut follower, begin) =
            Follower::begin(frames, Subscribe { from_now: true, ..Subscribe::default() }).await;
        assert!(begin.seq >= last);
        assert_eq!(follower.heartbeat().await.upto_seq, begin.seq);
        let next = put_one(&mut KvClient::new(channel(client).await), "t", "new", "z").await;
        assert_eq!(follower.upto(next).await.len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_holds_back_frames_that_are_not_acknowledged() {
    const WINDOW: u64 = 64 * 1024;
    let dir = tempfile::tempdir().unwrap();
    followed(dir.path(), async |client, frames| {
        let mut kv = KvClient::new(channel(client).await);
        let mut last = 0;
        for number in 0..32 {
            last = put_one(&mut kv, "t", &format!("k{number}"), vec![7; 8 * 1024]).await;
        }
        for batched in [false, true] {
            let first =
                Subscribe { window_bytes: WINDOW, heartbeat_ms: 100, batched, ..Subscribe::default() };
            let (mut follower, _) = Follower::begin(frames, first).await;
            let mut seen = 0;
            while seen < last {
                let entries = follower.entries().await;
                assert!(follower.unacked <= WINDOW, "{}", follower.unacked);
                if entries.is_empty() && follower.unacked > 0 {
                    follower.say(&Said::Alive).await;
                    follower.say(&Said::Ack { seq: seen }).await;
                    follower.unacked = 0;
                }
                seen = entries.last().map_or(seen, |entry| entry.seq);
            }
            follower.say(&Said::Ack { seq: last + 1_000 }).await;
            let end = follower.end().await;
            assert_eq!(end.name, "INVALID");
            assert!(end.message.contains("was sent nothing beyond"), "{}", end.message);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_comes_with_its_checksum_where_the_position_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    followed(dir.path(), async |client, _| {
        write_much(client).await;
        put_many(client, 5_000).await;
        AdminClient::new(channel(client).await).snapshot(SnapshotRequest {}).await.unwrap();
    })
    .await;
    std::fs::remove_dir_all(dir.path().join("events")).unwrap();
    followed(dir.path(), async |client, frames| {
        let mut gone = Follower::connect(frames).await;
        gone.say(&Said::Subscribe(Subscribe::default())).await;
        let end = gone.end().await;
        assert_eq!((end.reason, &end.name[..], &end.leader[..]), (15, "COMPACTED", ""));
        assert!(end.first_seq > 0 && end.message.contains(&end.first_seq.to_string()), "{end:?}");
        let mut states = Vec::new();
        for (batched, compressed) in [(false, false), (true, false), (true, true)] {
            let first = Subscribe { accept_snapshot: true, batched, compressed, ..Subscribe::default() };
            let (mut follower, begin) = Follower::begin(frames, first).await;
            assert_eq!(begin.sync, Sync::Full);
            assert!(begin.seq + 1 >= end.first_seq);
            let Some(Told::StateBegin { seq, term, time_ms, elapsed_ms }) = follower.told().await else {
                panic!("the state begins")
            };
            assert_eq!(seq, begin.seq);
            let (mut bytes, mut items, mut parts) = (Vec::new(), Vec::new(), 0);
            let (count, checksum) = loop {
                match follower.told().await.unwrap() {
                    Told::StatePart(part) => {
                        let raw = part.raw();
                        items.extend(entries(&raw, part.count, true));
                        bytes.extend(raw);
                        parts += 1;
                        follower.compressed += usize::from(part.compression == Compression::Zstd);
                    }
                    Told::Heartbeat(_) => {}
                    Told::StateEnd { seq: at, items, crc32 } => {
                        assert_eq!(at, seq);
                        break (items, crc32);
                    }
                    other => panic!("{other:?}"),
                }
            };
            assert_eq!((count, checksum), (items.len() as u64, crc32fast::hash(&bytes)));
            assert!(items.len() > 5_000 && parts > 1);
            assert_eq!(follower.compressed > 0, compressed);
            let at = |item: &WalEntryProto| (item.seq, item.term, item.time_ms, item.elapsed_ms, item.more);
            assert!(items.iter().all(|item| at(item) == (seq, term, time_ms, elapsed_ms, false)));
            let mut kv = KvClient::new(channel(client).await);
            let next = put_one(&mut kv, "t", "new", "z").await;
            assert_eq!(follower.upto(next).await.last().map(|entry| entry.seq), Some(next));
            states.push(items.iter().map(|item| item.entity.clone().unwrap().key).collect::<Vec<_>>());
            // The next state has the key that was written meanwhile.
            let old: Vec<_> = states[0].iter().filter(|key| &key[..] != b"new").collect();
            assert!(
                states
                    .iter()
                    .all(|keys| keys.iter().filter(|key| &key[..] != b"new").eq(old.iter().copied()))
            );
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_followed_ends_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    followed(dir.path(), async |client, frames| {
        put_many(client, 10).await;
        let filters = |count, name: &str| vec![(name.to_owned(), String::new()); count];
        let usual = Subscribe::default;
        let cases = [
            (Subscribe { from_seq: 3, history: 1, ..usual() }, 20, "OTHER_HISTORY", "history"),
            (Subscribe { from_now: true, history: 1, ..usual() }, 20, "OTHER_HISTORY", "history"),
            (Subscribe { from_seq: 1 << 40, ..usual() }, 21, "AHEAD", ""),
            (Subscribe { from_seq: 1, from_now: true, ..usual() }, 7, "INVALID", "say one"),
            (Subscribe { window_bytes: 1, ..usual() }, 7, "INVALID", "window_bytes (1)"),
            (Subscribe { heartbeat_ms: 1, ..usual() }, 7, "INVALID", "heartbeat_ms (1)"),
            (Subscribe { compressed: true, ..usual() }, 7, "INVALID", "batched"),
            (Subscribe { filters: filters(65, "t"), ..usual() }, 7, "INVALID", "65 filters"),
            (Subscribe { filters: filters(1, &"t".repeat(1025)), ..usual() }, 7, "INVALID", "1025 bytes"),
            (Subscribe { version: 2, ..usual() }, 7, "INVALID", "version 2"),
            (Subscribe { magic: *b"SOMEBODY", ..usual() }, 7, "INVALID", "the first frame"),
            (Subscribe { id: "i".repeat(300_000), ..usual() }, 2, "TOO_LARGE", "300"),
        ];
        for (first, number, name, words) in cases {
            let mut follower = Follower::connect(frames).await;
            follower.say(&Said::Subscribe(first)).await;
            let end = follower.end().await;
            assert_eq!((end.reason, &end.name[..]), (number, name), "{}", end.message);
            assert!(end.message.contains(words), "{}", end.message);
        }
        let (mut again, _) = Follower::begin(frames, usual()).await;
        again.say(&Said::Subscribe(usual())).await;
        assert!(again.end().await.message.contains("once"));
        let (_, text) = http(client, "GET", "/metrics", "").await;
        let refused = "quorate_server_requests_total{method=\"subscribe\",outcome=\"invalid\"}";
        assert_eq!(metric(&text, refused), 9.0);
        assert_eq!(metric(&text, "quorate_subscribers_open"), 0.0);
        assert_eq!(metric(&text, "quorate_server_unfinished_bytes"), 0.0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_at_the_port_are_told_so_and_cost_others_nothing() {
    let dir = tempfile::tempdir().unwrap();
    followed(dir.path(), async |client, frames| {
        let (mut silent, mut slow) = (Follower::connect(frames).await, Follower::connect(frames).await);
        slow.stream.write_all(&frame(&Said::Subscribe(Subscribe::default()))[..40]).await.unwrap();
        let begun = Instant::now();
        let mut kv = KvClient::new(channel(client).await);
        let (mut other, _) = Follower::begin(frames, Subscribe::default()).await;
        let noise: Vec<u8> =
            (0..100_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let mut torn = frame(&Said::Subscribe(Subscribe::default()));
        torn[20] ^= 1;
        let strange: [(&[u8], &str, &str); 5] = [
            (b"GET /replication/status HTTP/1.1\r\nHost: localhost\r\n\r\n", "INVALID", "this is HTTP,"),
            (b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "INVALID", "this is HTTP,"),
            (&noise, "TOO_LARGE", "a length is a u32"),
            (&[0xff; 64], "TOO_LARGE", "4294967295 bytes"),
            (&torn, "INVALID", "CRC-32"),
        ];
        for (bytes, name, words) in strange {
            let mut stranger = Follower::connect(frames).await;
            stranger.stream.write_all(bytes).await.unwrap();
            let end = stranger.end().await;
            assert_eq!(end.name, name);
            assert!(end.message.contains(words), "{}", end.message);
        }
        // Later, too.
        let (mut later, _) = Follower::begin(frames, Subscribe::default()).await;
        later.stream.write_all(&[7; 64]).await.unwrap();
        assert_eq!(later.end().await.name, "TOO_LARGE");
        // One that closes its side has gone, whether or not it has said anything.
        let (mut gone, _) = Follower::begin(frames, Subscribe::default()).await;
        gone.stream.shutdown().await.unwrap();
        while gone.told().await.is_some() {}
        drop(Follower::connect(frames).await);
        let next = put_one(&mut kv, "t", "k", "v").await;
        assert_eq!(other.upto(next).await.len(), 1);
        for stranger in [&mut silent, &mut slow] {
            let end = stranger.end().await;
            assert_eq!(end.name, "DEADLINE_EXCEEDED", "{}", end.message);
        }
        assert!(begun.elapsed() >= Duration::from_secs(9));
        let next = put_one(&mut kv, "t", "k", "v").await;
        assert_eq!(other.upto(next).await.len(), 1);
        let (_, text) = http(client, "GET", "/metrics", "").await;
        assert_eq!(metric(&text, "quorate_subscribers_open"), 1.0);
    })
    .await;
}

/// Followers take places of the client port. Strangers give theirs to the next caller; followers keep them.
#[tokio::test(flavor = "multi_thread")]
async fn followers_by_frames_take_places_and_strangers_give_way() {
    const PLACES: usize = 4;
    let dir = tempfile::tempdir().unwrap();
    let (server, frames) = bind().await;
    let limits = DoorLimits { connections: Some(PLACES), ..DoorLimits::default() };
    with_server(dir.path(), server.with_limits(limits), async |client| {
        put_many(client, 10).await;
        let mut strangers = Vec::new();
        for _ in 0..5 * PLACES {
            strangers.push(Follower::connect(frames).await);
        }
        let mut followers = Vec::new();
        for _ in 0..PLACES {
            let (mut follower, _) = Follower::begin(frames, Subscribe::default()).await;
            follower.heartbeat().await;
            followers.push(follower);
        }
        for stranger in &mut strangers {
            assert!(stranger.told().await.is_none(), "it gives way without a word");
        }
        let mut late = Follower::connect(frames).await;
        late.say(&Said::Subscribe(Subscribe::default())).await;
        let end = late.end().await;
        assert_eq!(end.name, "LIMIT_REACHED");
        assert!(end.message.contains("max_connections"), "{}", end.message);
        // Who looks after the node gets through, and who follows goes on.
        let (_, page) = json_of(client, "GET", "/replication/replicas", "").await;
        assert_eq!(page["count"], PLACES);
        followers.pop();
        let begins = async {
            loop {
                let mut next = Follower::connect(frames).await;
                next.say(&Said::Subscribe(Subscribe::default())).await;
                if let Some(Told::Begin(_)) = next.told().await {
                    return;
                }
            }
        };
        timeout(DEADLINE, begins).await.expect("a place that was left is taken again");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_does_not_read_its_frames_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    followed(dir.path(), async |client, frames| {
        let (mut unread, _) = Follower::begin(frames, Subscribe::default()).await;
        let mut kv = KvClient::new(channel(client).await);
        let mut last = 0;
        for number in 0..16 {
            last = put_one(&mut kv, "t", &format!("k{number}"), vec![7; 1024 * 1024]).await;
        }
        let (mut other, _) = Follower::begin(frames, Subscribe::default()).await;
        let all = other.upto(last).await;
        assert_eq!(all.len(), 16);
        let (_, text) = http(client, "GET", "/metrics", "").await;
        assert!(metric(&text, "quorate_server_unsent_bytes") < 6e6, "a few entries at most");
        // And when it reads after all, it has everything.
        assert_eq!(plain(unread.upto(last).await), plain(all));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_by_frames_show_on_pages_and_end_with_their_node() {
    let dir = tempfile::tempdir().unwrap();
    let (mut follower, mut silent, history, at) = followed(dir.path(), async |client, frames| {
        put_many(client, 10).await;
        let first = Subscribe { id: "mirror".to_owned(), heartbeat_ms: 100, ..Subscribe::default() };
        let (mut follower, begin) = Follower::begin(frames, first).await;
        let at = follower.heartbeat().await.upto_seq;
        let (_, page) = json_of(client, "GET", "/replication/replicas", "").await;
        let row = &page["replicas"][0];
        assert_eq!((&row["kind"], &row["id"]), (&"subscriber".into(), &"mirror".into()));
        assert_eq!((&row["transport"], &row["host"]), (&"frames".into(), &"127.0.0.1".into()));
        assert!(row["offset"].as_u64().unwrap() >= at && row["operations_synced"] == 10, "{row}");
        let (_, text) = http(client, "GET", "/metrics", "").await;
        assert_eq!(metric(&text, "quorate_subscribers_open"), 1.0);
        (follower, Follower::connect(frames).await, begin.history, at)
    })
    .await;
    for follower in [&mut follower, &mut silent] {
        let end = follower.end().await;
        assert_eq!((end.reason, &end.name[..]), (6, "STOPPED"), "{}", end.message);
    }
    // It goes on where it was, at the same history.
    followed(dir.path(), async |client, frames| {
        let next = put_one(&mut KvClient::new(channel(client).await), "t", "after", "z").await;
        let first = Subscribe { from_seq: at, history, ..Subscribe::default() };
        let (mut follower, begin) = Follower::begin(frames, first).await;
        assert_eq!((begin.history, begin.sync, begin.seq), (history, Sync::Partial, at));
        assert_eq!(follower.upto(next).await.iter().map(|entry| entry.seq).collect::<Vec<_>>(), [next]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_of_a_node_that_is_not_open_are_told_so() {
    let (server, frames) = bind().await;
    let (stop, stopped) = oneshot::channel::<()>();
    let opening = std::future::pending::<quorate::Engine<_>>();
    let progress = EngineConfig::new(1, "nowhere", "127.0.0.1:0").progress;
    let serving = server.serve_opening(opening, progress, async { drop(stopped.await) });
    let asking = async {
        let mut follower = Follower::connect(frames).await;
        follower.say(&Said::Subscribe(Subscribe::default())).await;
        let end = follower.end().await;
        assert_eq!(end.name, "STOPPED");
        assert!(end.message.contains("not open yet"), "{}", end.message);
        stop.send(()).unwrap();
    };
    let (served, ()) = tokio::join!(serving, asking);
    served.unwrap();
}

/// A machine that tells no events is followed by its commands.
#[tokio::test(flavor = "multi_thread")]
async fn frames_tell_commands_as_they_are_of_a_machine_without_events() {
    let server = Server::<MachineGuest<Sum<2>>>::bind("127.0.0.1:0").await.unwrap();
    let server = server.with_frames("127.0.0.1:0").await.unwrap();
    let frames = server.frames_addr().unwrap();
    served_on(server, Sum::default(), async move |client, calls| {
        let sum = MachineClient::<Sum<2>>::from(calls);
        let changes = [SumChange::Add(5), SumChange::Multiply(2), SumChange::Add(300)];
        for change in &changes {
            sum.write(change.clone()).await.unwrap();
        }
        let all = pages(client, 0).await;
        assert_eq!(all.len(), 3);
        for batched in [false, true] {
            let (mut follower, _) =
                Follower::begin(frames, Subscribe { batched, ..Subscribe::default() }).await;
            let told = follower.upto(all[2].seq).await;
            assert_eq!(told, all);
            assert!(told.iter().all(|entry| entry.operation() == WalOperation::Command));
        }
        let mut follower = Follower::connect(frames).await;
        let filters = vec![("t".to_owned(), String::new())];
        follower.say(&Said::Subscribe(Subscribe { filters, ..Subscribe::default() })).await;
        assert!(follower.end().await.message.contains("cannot be filtered"));
    })
    .await;
}

/// It waits for a minute, as every follower with a full window may.
#[ignore = "waits for a minute"]
#[tokio::test(flavor = "multi_thread")]
async fn a_follower_by_frames_that_acknowledges_nothing_is_told_that_it_lags() {
    const WINDOW: u64 = 64 * 1024;
    let dir = tempfile::tempdir().unwrap();
    followed(dir.path(), async |client, frames| {
        let mut kv = KvClient::new(channel(client).await);
        let mut written = Vec::new();
        for number in 0..16 {
            written.push(put_one(&mut kv, "t", &format!("k{number}"), vec![7; 8 * 1024]).await);
        }
        let last = written[written.len() - 1];
        let first = Subscribe { window_bytes: WINDOW, heartbeat_ms: 1_000, ..Subscribe::default() };
        let (mut follower, begin) = Follower::begin(frames, first).await;
        let (begun, mut taken) = (Instant::now(), 0);
        let end = loop {
            match follower.told().await.expect("it is told why nothing more comes") {
                Told::Entries(batch) => taken = entries(&batch.raw(), batch.count, false).last().unwrap().seq,
                Told::Heartbeat(beat) => {
                    assert!(beat.upto_seq < last);
                    // That it is alive is no acknowledgement.
                    follower.say(&Said::Alive).await;
                }
                Told::End(end) => break end,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((end.reason, &end.name[..]), (30, "LAGGED"), "{}", end.message);
        assert!(end.message.contains("nothing was acknowledged"), "{}", end.message);
        assert!(begun.elapsed() >= Duration::from_secs(59), "{:?}", begun.elapsed());
        // It has its place again, and goes on where it was.
        let again = Subscribe { from_seq: taken, history: begin.history, ..Subscribe::default() };
        let (mut follower, _) = Follower::begin(frames, again).await;
        let rest: Vec<_> = follower.upto(last).await.iter().map(|entry| entry.seq).collect();
        written.retain(|seq| *seq > taken);
        assert_eq!(rest, written);
    })
    .await;
}

/// What comes next for it was kept for long, and is gone: the stream that is open says so, with the first position that is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_follower_by_frames_that_is_overtaken_is_told_where_the_node_begins() {
    let dir = tempfile::tempdir().unwrap();
    followed(dir.path(), async |client, frames| {
        let limits = r#"{"event_log_operations": 1000, "event_log_bytes": 4194304}"#;
        let (code, answer) = json_of(client, "POST", "/replication/configure", limits).await;
        assert_eq!(code, 200, "{answer}");
        let mut kv = KvClient::new(channel(client).await);
        let value = vec![7; 1024 * 1024];
        let begins = put_one(&mut kv, "t", "k", value.clone()).await;
        let first = Subscribe { window_bytes: 64 * 1024, ..Subscribe::default() };
        let (mut follower, _) = Follower::begin(frames, first).await;
        assert_eq!(follower.upto(begins).await.len(), 1);
        let mut last = 0;
        for _ in 0..80 {
            last = put_one(&mut kv, "t", "k", value.clone()).await;
        }
        // One more has come; what follows that waits for an acknowledgement.
        let mut taken = begins;
        let end = loop {
            match follower.told().await.expect("it is told why nothing more comes") {
                Told::Entries(batch) => {
                    let told = entries(&batch.raw(), batch.count, false);
                    assert_eq!(told[0].seq, taken + 1, "nothing is left out before it is told so");
                    taken = told[told.len() - 1].seq;
                }
                Told::Heartbeat(_) => follower.say(&Said::Ack { seq: taken }).await,
                Told::End(end) => break end,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((end.reason, &end.name[..]), (15, "COMPACTED"), "{}", end.message);
        assert!(end.first_seq > taken + 1 && end.first_seq <= last, "{taken} {end:?}");
        let again = Subscribe { from_seq: end.first_seq - 1, ..Subscribe::default() };
        let (mut follower, _) = Follower::begin(frames, again).await;
        assert_eq!(follower.upto(last).await.len() as u64, last + 1 - end.first_seq);
    })
    .await;
}

/// Those that are sent a state and do not read it take the places of states, and not those of followers.
#[tokio::test(flavor = "multi_thread")]
async fn one_state_too_many_is_refused_by_frames_too() {
    const STATES: usize = 8;
    let dir = tempfile::tempdir().unwrap();
    followed(dir.path(), async |client, _| {
        let mut kv = KvClient::new(channel(client).await);
        for number in 0..32 {
            put_one(&mut kv, "t", &format!("k{number}"), vec![7; 1024 * 1024]).await;
        }
        AdminClient::new(channel(client).await).snapshot(SnapshotRequest {}).await.unwrap();
    })
    .await;
    std::fs::remove_dir_all(dir.path().join("events")).unwrap();
    followed(dir.path(), async |client, frames| {
        let first = || Subscribe { accept_snapshot: true, batched: true, ..Subscribe::default() };
        let mut unread = Vec::new();
        for _ in 0..STATES {
            unread.push(Follower::begin(frames, first()).await);
        }
        let mut late = Follower::connect(frames).await;
        late.say(&Said::Subscribe(first())).await;
        let end = late.end().await;
        assert_eq!(&end.name, "LIMIT_REACHED", "{}", end.message);
        assert!(end.message.contains("8 followers"), "{}", end.message);
        let next = put_one(&mut KvClient::new(channel(client).await), "t", "new", "z").await;
        let (mut other, _) =
            Follower::begin(frames, Subscribe { from_seq: next - 1, ..Subscribe::default() }).await;
        assert_eq!(other.upto(next).await.len(), 1);
    })
    .await;
}
