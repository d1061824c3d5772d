//! What is printed is what is stored and acknowledged, however it ends.

use std::cell::RefCell;
use std::rc::Rc;

use super::*;
use crate::cli::parse;
use crate::kv::client::tests::fake::{Fake, leader};
use crate::kv::client::tests::replica::{beat, broken, entry, entry_of};
use crate::kv::client::{Client, ClientConfig, Reason};
use crate::types::HistoryEpoch;

fn at(index: u64) -> Bookmark {
    Bookmark { index, history: HistoryEpoch(0xabc) }
}

fn args(args: &[&str]) -> SubscribeArgs {
    match parse([&["quorate", "subscribe"], args].concat()).unwrap().command {
        super::super::Command::Subscribe(args) => *args,
        other => panic!("{other:?}"),
    }
}

type Pages = Rc<RefCell<Vec<String>>>;

/// Runs it as the command does, until `stopped`; what it writes comes out there, each time that it writes.
async fn run_at(
    fake: &Fake,
    given: &[&str],
    path: &Path,
    write: impl FnMut(&[u8]) -> Result<(), CliError>,
    stopped: impl Future<Output = Result<(), CliError>>,
) -> Result<(), CliError> {
    let args = args(given);
    let state = StateFile::open(path.to_owned())?;
    let client = Client::new([fake.endpoint()], ClientConfig::default()).unwrap();
    let subscription = client.subscribe(args.options(state.stored)).await?;
    Printing::new(subscription, Format::Table, Some(state), write).run(args.count, stopped).await
}

fn noting() -> (Pages, impl FnMut(&[u8]) -> Result<(), CliError>) {
    let pages = Pages::default();
    let noted = pages.clone();
    (pages, move |bytes| {
        noted.borrow_mut().push(String::from_utf8(bytes.to_vec()).unwrap());
        Ok(())
    })
}

/// The positions of the lines.
fn printed(pages: &Pages) -> Vec<u64> {
    let text = pages.borrow().concat();
    text.lines().map(|line| line.split(' ').next().unwrap().parse().unwrap()).collect()
}

fn stored(path: &Path) -> Bookmark {
    StateFile::open(path.to_owned()).unwrap().stored.expect("it is there")
}

async fn until_acked(fake: &Fake, seq: u64) {
    while !fake.replica().acks().contains(&seq) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn it_goes_on_where_it_stopped_and_prints_positions_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("position");
    let node = Fake::start(leader);
    let whole = || [Ok(entry_of("a", 5, true)), Ok(entry_of("b", 5, false))];
    let [a, b] = whole();
    node.replica().set([vec![Ok(beat(3)), Ok(entry(4)), a, Err(broken())], whole().into(), vec![b]]);
    let (pages, write) = noting();
    let never = std::future::pending();
    run_at(&node, &["--after", "3", "--count", "2"], &path, write, never).await.unwrap();
    assert_eq!(printed(&pages), [4, 5, 5], "the position of the last is printed as a whole");
    assert_eq!(pages.borrow().len(), 2, "each position at once");
    assert_eq!(stored(&path), at(5));
    until_acked(&node, 5).await;
    assert!(!dir.path().join("position.unfinished").exists());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left there");

    node.replica().set([vec![Ok(entry(6))]]);
    let (pages, write) = noting();
    run_at(&node, &["--from-beginning", "--count", "1"], &path, write, std::future::pending()).await.unwrap();
    assert_eq!((printed(&pages), stored(&path)), (vec![6], at(6)));
    let last = node.replica().opened().pop().unwrap();
    assert_eq!((last.from_seq, last.history), (5, 0xabc), "what is stored goes before the flags");
}

#[tokio::test]
async fn a_stop_leaves_what_is_not_printed_as_a_whole_to_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("position");
    let node = Fake::start(leader);
    node.replica().set([vec![Ok(beat(3)), Ok(entry(4)), Ok(entry_of("a", 5, true))]]);
    let (pages, write) = noting();
    // Once the node has heard of 4, the piece of 5 has been read or waits.
    let stopped = async {
        until_acked(&node, 4).await;
        Ok(())
    };
    run_at(&node, &["--after", "3"], &path, write, stopped).await.unwrap();
    assert_eq!((printed(&pages), stored(&path)), (vec![4], at(4)));
    assert!(node.replica().acks().iter().all(|ack| *ack <= 4), "{:?}", node.replica().acks());
}

#[tokio::test]
async fn what_cannot_be_printed_is_not_stored_as_printed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("position");
    let node = Fake::start(leader);
    node.replica().set([vec![Ok(beat(3)), Ok(entry(4)), Ok(entry(5)), Ok(entry(6))]]);
    let (pages, mut write) = noting();
    let write = move |bytes: &[u8]| match bytes.starts_with(b"6") {
        true => Err(CliError::Output(io::ErrorKind::BrokenPipe.into())),
        false => write(bytes),
    };
    let error = run_at(&node, &["--after", "3"], &path, write, std::future::pending()).await.unwrap_err();
    assert!(error.is_broken_pipe());
    assert_eq!((printed(&pages), stored(&path)), (vec![4, 5], at(5)));
    assert!(node.replica().acks().iter().all(|ack| *ack <= 5), "{:?}", node.replica().acks());
}

/// What is written between a stop and the next start is not missed, also if nothing came before the stop.
#[tokio::test]
async fn where_the_present_begins_is_stored_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("position");
    let node = Fake::start(leader);
    node.replica().set([vec![Ok(beat(10))]]);
    let (pages, write) = noting();
    run_at(&node, &[], &path, write, std::future::ready(Ok(()))).await.unwrap();
    assert_eq!((printed(&pages), stored(&path)), (vec![], at(10)));
}

/// Past what the filter leaves out, too.
#[tokio::test]
async fn a_heartbeat_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("position");
    let node = Fake::start(leader);
    node.replica().set([vec![Ok(beat(3)), Ok(entry(4)), Ok(beat(90))]]);
    let stopped = async {
        until_acked(&node, 90).await;
        Ok(())
    };
    let (pages, write) = noting();
    run_at(&node, &["--after", "3", "--tenant", "default"], &path, write, stopped).await.unwrap();
    assert_eq!((printed(&pages), stored(&path)), (vec![4], at(90)));
}

#[tokio::test]
async fn a_state_that_cannot_be_used_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("position");
    let open = |path: &Path| StateFile::open(path.to_owned());
    assert_eq!(open(&path).unwrap().stored, None);
    for text in ["", "soon", "-1", "42@", "{\"seq\":42}"] {
        std::fs::write(&path, text).unwrap();
        let error = open(&path).unwrap_err();
        assert!(error.to_string().contains("remove it to begin anew"), "{text}: {error}");
        assert_eq!(error.reason(), Reason::Invalid);
    }
    std::fs::write(&path, "42@abc\n").unwrap();
    assert_eq!(open(&path).unwrap().stored, Some(at(42)));
    let error = open(dir.path()).unwrap_err();
    assert!(matches!(error, CliError::Input { .. }), "{error:?}");

    let nowhere = dir.path().join("nowhere").join("position");
    let error = open(&nowhere).unwrap().store(at(7)).await.unwrap_err();
    assert!(error.to_string().contains("up to 7@0000000000000abc was printed"), "{error}");
    let mut state = open(&path).unwrap();
    state.store(at(43)).await.unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "43@0000000000000abc\n");
}

#[test]
fn where_to_begin_is_said_once() {
    for bad in [
        &["--after", "3", "--from-now"][..],
        &["--from-now", "--from-beginning"],
        &["--count", "0"],
        &["--after", "x"],
    ] {
        assert!(parse([&["quorate", "subscribe"], bad].concat()).is_err(), "{bad:?}");
    }
    assert_eq!(args(&[]).options(None), SubscribeOptions::from_now());
    assert_eq!(args(&["--from-beginning"]).options(None), SubscribeOptions::from_beginning());
    assert_eq!(args(&["--after", "3"]).options(None), SubscribeOptions::after(3));
    assert_eq!(args(&["--after", "3"]).options(Some(at(9))), SubscribeOptions::after(at(9)));
    let named = args(&["--id", "mirror", "--compress", "--tenant", "t"]).options(None);
    assert_eq!((named.id.as_str(), named.compression), ("mirror", EntryCompression::Zstd));
    assert_eq!(named.filters.len(), 1);
}
