//! The first failure is the last word.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc;

use super::*;

/// Options with an observer, and where the failure is reported.
fn observed(
    observer: impl Fn(DiskEvent<'_>) -> io::Result<()> + Send + Sync + 'static,
) -> (SledOptions, mpsc::Receiver<Failure>) {
    let (sender, failures) = mpsc::channel();
    let sender = Mutex::new(sender);
    let options = SledOptions {
        observer: Some(Arc::new(observer)),
        on_failure: Arc::new(move |failure| sender.lock().unwrap().send(failure.clone()).unwrap()),
        ..SledOptions::default()
    };
    (options, failures)
}

/// Fails the third flush with what `fail` does, and checks that everything later fails too.
fn fails_for_good(fail: impl Fn() -> io::Result<()> + Send + Sync + 'static, message: &str) {
    let home = Home::new();
    let flushes = Mutex::new(0);
    let (options, failures) = observed(move |event| {
        if event == DiskEvent::Flush {
            let mut flushes = flushes.lock().unwrap();
            *flushes += 1;
            if *flushes == 3 {
                drop(flushes);
                return fail();
            }
        }
        Ok(())
    });
    let store = SledStore::open(&home.log(), options).unwrap();
    append(&store, vec![command(1, 0, 1)]).unwrap();
    save_vote(&store, 1).unwrap();
    let error = append(&store, vec![command(1, 1, 1)]).unwrap_err();
    assert!(error.to_string().contains(message), "{error}");
    assert!(store.stats().unwrap().failed.load(SeqCst));
    assert!(append(&store, vec![command(1, 2, 1)]).unwrap_err().to_string().contains(message));
    assert!(save_vote(&store, 2).unwrap_err().to_string().contains(message));
    assert!(purge(&store, LogId::new(1, 0)).unwrap_err().to_string().contains(message));
    assert_eq!(store.bounds().last, Some(LogId::new(1, 1)), "nothing new is accepted");
    assert_eq!(store.vote().unwrap().term, 1);
    let failure = failures.recv().unwrap();
    assert!(!failure.hung);
    assert!(failures.try_recv().is_err(), "reported once");
    let copy = home.copy();
    drop(store);
    let store = open(&copy.log()).unwrap();
    assert_eq!(store.read(0, 1, 100).unwrap(), [command(1, 0, 1)], "what was confirmed is there");
}

#[test]
fn a_failed_flush_is_final() {
    fails_for_good(|| Err(io::Error::other("EIO")), "EIO");
}

#[test]
fn a_panic_in_the_writer_is_final() {
    fails_for_good(|| panic!("broken"), "the writer panicked: broken");
}

#[test]
fn a_completion_that_panics_is_final_and_does_not_silence_the_others() {
    let home = Home::new();
    let (go, gate) = mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let (options, _failures) = observed(move |event| {
        if event == DiskEvent::Flush {
            let _ = gate.lock().unwrap().recv();
        }
        Ok(())
    });
    let store = SledStore::open(&home.log(), options).unwrap();
    // The first holds up the writer until the next two share a batch.
    let (first, first_outcome) = completion();
    store.append(vec![command(1, 0, 1)], first);
    store.append(vec![command(1, 1, 1)], Box::new(|_| panic!("in a completion")));
    let (third, third_outcome) = completion();
    store.append(vec![command(1, 2, 1)], third);
    drop(go);
    first_outcome.recv().unwrap().unwrap();
    third_outcome.recv().unwrap().unwrap();
    append(&store, vec![command(1, 3, 1)]).unwrap_err();
}

#[test]
fn a_flush_that_hangs_is_noticed() {
    let home = Home::new();
    let (release, gate) = mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let hang = Arc::new(AtomicBool::new(false));
    let hangs = hang.clone();
    let (options, failures) = observed(move |event| {
        if event == DiskEvent::Flush && hangs.load(SeqCst) {
            let _ = gate.lock().unwrap().recv();
        }
        Ok(())
    });
    let options = SledOptions { flush_watchdog: Duration::from_millis(50), ..options };
    let store = SledStore::open(&home.log(), options).unwrap();
    append(&store, vec![command(1, 0, 1)]).unwrap();
    hang.store(true, SeqCst);
    assert!(append(&store, vec![command(1, 1, 1)]).unwrap_err().to_string().contains("has not come back"));
    append(&store, vec![command(1, 2, 1)]).unwrap_err();
    assert!(failures.recv().unwrap().hung);
    drop(store); // does not wait for the writer
    drop(release);
}

/// A store of which the flush hangs once one entry is written, until what comes with it is dropped.
fn hanging(home: &Home) -> (SledStore, mpsc::Receiver<Failure>, mpsc::Sender<()>, Arc<AtomicBool>) {
    let (release, gate) = mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let hang = Arc::new(AtomicBool::new(false));
    let hangs = hang.clone();
    let (options, failures) = observed(move |event| {
        if event == DiskEvent::Flush && hangs.load(SeqCst) {
            let _ = gate.lock().unwrap().recv();
        }
        Ok(())
    });
    let options = SledOptions { flush_watchdog: Duration::from_millis(50), ..options };
    let store = SledStore::open(&home.log(), options).unwrap();
    append(&store, vec![command(1, 0, 1)]).unwrap();
    (store, failures, release, hang)
}

#[test]
fn a_writer_that_comes_back_too_late_completes_nothing() {
    let home = Home::new();
    let (store, failures, release, hang) = hanging(&home);
    hang.store(true, SeqCst);
    let (sender, outcomes) = mpsc::channel();
    for index in 1..20 {
        let sender = sender.clone();
        store.append(vec![command(1, index, 1)], Box::new(move |outcome| sender.send(outcome).unwrap()));
    }
    drop(sender);
    assert!(failures.recv_timeout(Duration::from_secs(5)).unwrap().hung);
    drop(release);
    for index in 20..40 {
        append(&store, vec![command(1, index, 1)]).unwrap_err();
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(outcomes.iter().filter(Result::is_err).count(), 19, "all have failed, and once");
    assert!(failures.try_recv().is_err(), "reported once");
    drop(store);
}

#[test]
fn a_close_that_hangs_is_noticed() {
    let home = Home::new();
    let (store, failures, release, hang) = hanging(&home);
    hang.store(true, SeqCst);
    drop(store); // does not wait for ever
    assert!(failures.recv_timeout(Duration::from_secs(5)).unwrap().hung);
    drop(release);
}

#[test]
fn an_open_that_hangs_is_noticed() {
    let home = Home::new();
    drop(open(&home.log()).unwrap());
    // Opening it waits for a writer.
    let pipe = home.log().join("snap.pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let (options, failures) = observed(|_| Ok(()));
    let options = SledOptions { flush_watchdog: Duration::from_millis(50), ..options };
    std::thread::scope(|scope| {
        let opening = scope.spawn(|| SledStore::open(&home.log(), options).map(drop));
        let failure = failures.recv_timeout(Duration::from_secs(10));
        drop(fs::OpenOptions::new().write(true).open(&pipe).unwrap());
        opening.join().unwrap().unwrap_err();
        assert!(failure.unwrap().hung);
    });
    fs::remove_file(&pipe).unwrap();
    open(&home.log()).unwrap();
}

#[test]
fn a_long_queue_is_written_in_several_flushes() {
    let home = Home::new();
    append(&open(&home.log()).unwrap(), vec![command(1, 0, 1)]).unwrap();
    let (go, gate) = mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let (options, _failures) = observed(move |event| {
        if event == DiskEvent::Flush {
            let _ = gate.lock().unwrap().recv();
        }
        Ok(())
    });
    let store = SledStore::open(&home.log(), options).unwrap();
    let (sender, outcomes) = mpsc::channel();
    let submit = |entries: Vec<Entry>| {
        let sender = sender.clone();
        store.append(entries, Box::new(move |outcome| sender.send(outcome).unwrap()));
    };
    let flushes = || store.stats().unwrap().flushes.load(SeqCst);
    submit(vec![command(1, 1, 1)]); // holds up the writer
    std::thread::sleep(Duration::from_millis(50));
    // 32 MiB in large writes, then many small ones.
    (2..34).for_each(|index| submit(vec![command(1, index, 1024 * 1024)]));
    (34..10_034).for_each(|index| submit(vec![command(1, index, 1)]));
    drop((go, sender));
    assert_eq!(outcomes.iter().filter(Result::is_ok).count(), 1 + 32 + 10_000);
    assert!((1 + 4 + 2..20).contains(&flushes()), "{} flushes", flushes());
}

#[test]
fn a_truncation_that_names_another_entry_is_refused_without_memory_of_it() {
    let home = Home::new();
    let store = open_without_tail(&home.log()).unwrap();
    append(&store, (0..9).map(|index| command(1, index, 10)).collect()).unwrap();
    let (done, outcome) = completion();
    store.truncate(Some(LogId::new(2, 4)), done);
    assert!(outcome.recv().unwrap().unwrap_err().to_string().contains("holds"));
    let copy = home.copy();
    drop(store);
    assert_eq!(all(&open(&copy.log()).unwrap()).unwrap().len(), 9);
}

#[test]
fn closing_writes_what_is_queued() {
    let home = Home::new();
    let store = open(&home.log()).unwrap();
    let (sender, outcomes) = mpsc::channel();
    for index in 0..500 {
        let sender = sender.clone();
        store.append(vec![command(1, index, 1000)], Box::new(move |outcome| sender.send(outcome).unwrap()));
    }
    drop((store, sender));
    assert_eq!(outcomes.iter().filter(Result::is_ok).count(), 500);
    assert_eq!(all(&open(&home.log()).unwrap()).unwrap().len(), 500);
}

#[test]
fn readers_and_the_writer_do_not_disturb_each_other() {
    let home = Home::new();
    let store = open_without_tail(&home.log()).unwrap();
    append(&store, (0..200).map(|index| command(1, index, 3000)).collect()).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(SeqCst) {
                    let entries = store.read(0, u64::MAX, 200_000).unwrap();
                    let first = entries[0].log_id.index;
                    for (entry, index) in entries.iter().zip(first..) {
                        assert_eq!(*entry, command(entry.log_id.term, index, 3000));
                    }
                    assert!(entries.is_sorted_by_key(|entry| entry.log_id), "a mixture of two logs");
                }
            });
        }
        for term in 2..150 {
            let bounds = store.bounds();
            let (first, last) =
                (bounds.purged.map_or(0, |purged| purged.index + 1), bounds.last.unwrap().index);
            let kept = last - term % 40 - 1;
            let kept = store.read(kept, kept + 1, 0).unwrap().first().map(|entry| entry.log_id);
            store.truncate(kept.or(bounds.purged), completion().0);
            let from = store.bounds().last.unwrap().index + 1;
            let entries = (from..from + 40 + term % 7).map(|index| command(term, index, 3000)).collect();
            append(&store, entries).unwrap();
            if term % 3 == 0 {
                let upto = store.read(first, first + 20, usize::MAX).unwrap().last().unwrap().log_id;
                purge(&store, upto).unwrap();
            }
        }
        done.store(true, SeqCst);
    });
}
