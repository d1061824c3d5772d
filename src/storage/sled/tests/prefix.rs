//! Every crash point. sled recovers a prefix of what was done to it; here each such prefix is made by hand,
//! opened, and compared with what the log was at some moment between the last confirmed write and the crash.

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::storage::conformance::RandomStep;
use crate::storage::conformance::tests::steps;
use hard_state::HardState;

/// A [`DiskEvent`] to keep.
#[derive(Debug, Clone)]
enum Event {
    Insert(Vec<u8>, Vec<u8>),
    Remove(Vec<u8>),
    Ledger(Vec<u8>),
    Flush,
}

/// The log at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
struct Moment {
    entries: Vec<Entry>,
    purged: Option<LogId>,
    vote: Option<Vote>,
}

impl Moment {
    fn last(&self) -> Option<LogId> {
        self.entries.last().map(|entry| entry.log_id).or(self.purged)
    }

    fn next(&self) -> u64 {
        first_index(self.last())
    }
}

/// What happened in a run.
struct Run {
    events: Vec<Event>,
    moments: Vec<Moment>,
    /// After this many events, the moment with this number was confirmed.
    confirmed: Vec<(usize, usize)>,
}

fn record(steps: &[RandomStep]) -> Run {
    let home = Home::new();
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = events.clone();
    let options = SledOptions {
        tail_bytes: 0,
        observer: Some(Arc::new(move |event| {
            seen.lock().unwrap().push(match event {
                DiskEvent::Insert(key, record) => Event::Insert(key.to_vec(), record.to_vec()),
                DiskEvent::Remove(key) => Event::Remove(key.to_vec()),
                DiskEvent::HardState(hard_state) => Event::Ledger(hard_state.to_vec()),
                DiskEvent::Flush => Event::Flush,
            });
            Ok(())
        })),
        ..SledOptions::default()
    };
    let store = SledStore::open(&home.log(), options).unwrap();
    let confirmed = Arc::new(Mutex::new(Vec::new()));
    let mut moments = vec![Moment::default()];
    let mut moment = Moment::default();
    let mut term = 1;
    for step in steps {
        // What `done` confirms is known only once the moments of this step are.
        let number = Arc::new(Mutex::new(0));
        let mut number_guard = number.lock().unwrap();
        let done: Completion = {
            let (number, events, confirmed) = (number.clone(), events.clone(), confirmed.clone());
            Box::new(move |outcome| {
                outcome.unwrap();
                let number = *number.lock().unwrap();
                confirmed.lock().unwrap().push((events.lock().unwrap().len(), number));
            })
        };
        match step {
            RandomStep::Append(sizes, raise) => {
                term += raise;
                let entries: Vec<_> = sizes
                    .iter()
                    .zip(moment.next()..)
                    .map(|(size, index)| command(term, index, *size))
                    .collect();
                for entry in &entries {
                    moment.entries.push(entry.clone());
                    moments.push(moment.clone());
                }
                store.append(entries, done);
            }
            RandomStep::Vote(vote_term, node_id, committed) => {
                let vote = Vote { term: *vote_term, node_id: *node_id, committed: *committed };
                moment.vote = Some(vote);
                moments.push(moment.clone());
                store.save_vote(vote, done);
            }
            RandomStep::Truncate(count) => {
                let count = usize::from(*count).min(moment.entries.len());
                for _ in 0..count {
                    moment.entries.pop();
                    moments.push(moment.clone());
                }
                term += 1;
                store.truncate(moment.last(), done);
            }
            RandomStep::Purge(fraction) => {
                let count = moment.entries.len() * usize::from(*fraction) / 255;
                let purged: Vec<_> = moment.entries.drain(..count).collect();
                if let Some(upto) = purged.last().map(|entry| entry.log_id) {
                    moment.purged = Some(upto);
                    moments.push(moment.clone());
                    store.purge(upto, done);
                }
            }
            RandomStep::PurgeBeyond(count) => {
                let upto = LogId::new(term, moment.next() + u64::from(*count));
                moment = Moment { entries: Vec::new(), purged: Some(upto), vote: moment.vote };
                moments.push(moment.clone());
                store.purge(upto, done);
            }
            RandomStep::Sync => {
                let (done, outcome) = completion();
                store.append(Vec::new(), done);
                *number_guard = moments.len() - 1;
                drop(number_guard);
                outcome.recv().unwrap().unwrap();
                continue;
            }
            _ => continue,
        }
        *number_guard = moments.len() - 1;
    }
    drop(store);
    let events = std::mem::take(&mut *events.lock().unwrap());
    let confirmed = std::mem::take(&mut *confirmed.lock().unwrap());
    Run { events, moments, confirmed }
}

/// A log of which a crash has left the first `count` events.
fn crashed(events: &[Event]) -> Home {
    let home = Home::new();
    drop(open(&home.log()).unwrap());
    fs::remove_file(Marker::path(&home.log())).unwrap();
    let trees = raw(&home.log());
    let (mut written, mut mark) = (1, 1);
    for event in events {
        match event {
            Event::Insert(key, record) => drop(trees.log.insert(key, record.as_slice()).unwrap()),
            Event::Remove(key) => drop(trees.log.remove(key).unwrap()),
            Event::Ledger(hard_state) => {
                written = HardState::decode(hard_state).unwrap().sequence;
                trees.meta.insert(hard_state::KEY, hard_state.as_slice()).unwrap();
            }
            Event::Flush => mark = written,
        }
    }
    // With the strictest mark there can be: the last flush before the crash.
    Marker::create(&Marker::path(&home.log()), mark).unwrap();
    home
}

fn check(run: &Run, count: usize) {
    let home = crashed(&run.events[..count]);
    let store =
        open_without_tail(&home.log()).unwrap_or_else(|error| panic!("crash after {count} events: {error}"));
    let found = Moment { entries: all(&store).unwrap(), purged: store.bounds().purged, vote: store.vote() };
    assert_eq!(store.bounds().last, found.last());
    let confirmed =
        run.confirmed.iter().filter(|(at, _)| *at <= count).map(|(_, number)| *number).max().unwrap_or(0);
    assert!(
        run.moments[confirmed..].contains(&found),
        "crash after {count} of {} events leaves {:?} to {:?}, {:?}, which the log never was after {:?}",
        run.events.len(),
        found.purged,
        found.last(),
        found.vote,
        run.moments[confirmed].last(),
    );
    // And the log goes on from there.
    append(&store, vec![command(1000, found.next(), 100_000)]).unwrap();
    drop(store);
    assert_eq!(open(&home.log()).unwrap().bounds().last, Some(LogId::new(1000, found.next())));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 8,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_prefix_is_a_log(steps in steps(14), cuts in prop::collection::vec(any::<prop::sample::Index>(), 12)) {
        let run = record(&steps);
        for cut in cuts {
            check(&run, cut.index(run.events.len() + 1));
        }
    }
}

/// The one that matters most, at every single point: truncating through records and large entries, and
/// appending others in their place, in one batch with a vote and a purge.
#[test]
fn every_prefix_of_a_rewrite_is_a_log() {
    let sizes = vec![10, 20_000, 30_000, 150_000, 5, 5];
    let run = record(&[
        RandomStep::Append(sizes.clone(), 0),
        RandomStep::Sync,
        RandomStep::Append(sizes.clone(), 0),
        RandomStep::Truncate(7),
        RandomStep::Append(vec![100_000, 7], 0),
        RandomStep::Vote(3, 1, true),
        RandomStep::Append(vec![7, 7], 1),
        RandomStep::Purge(128),
        RandomStep::Truncate(2),
        RandomStep::Append(sizes, 1),
        RandomStep::PurgeBeyond(3),
        RandomStep::Append(vec![1, 2], 0),
    ]);
    // Fences mean nothing: one crash after a row of them stands for those within.
    let fence = |event: Option<&Event>| matches!(event, Some(Event::Insert(_, record)) if record.is_empty());
    for count in (0..=run.events.len()).filter(|count| !fence(run.events.get(*count))) {
        check(&run, count);
    }
}
