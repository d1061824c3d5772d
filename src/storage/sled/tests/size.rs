//! How much of the disk the log takes, and how fast it is. The ignored ones are measurements:
//! `cargo test --release --lib storage::sled::tests::size -- --ignored --nocapture --test-threads 1`.

use std::sync::mpsc;
use std::time::Instant;

use super::*;

const MIB: u64 = 1024 * 1024;

/// Writes so many entries with a rolling purge, and returns the most the disk held at any time.
fn rolling(store: &SledStore, entries: u64, bytes: usize, batch: u64, keep: u64) -> u64 {
    let mut peak = 0;
    let in_flight = 4;
    let (sender, done) = mpsc::channel();
    for begin in (0..entries).step_by(batch as usize) {
        let sender = sender.clone();
        let entries = (begin..begin + batch).map(|index| command(1, index, bytes)).collect();
        store.append(entries, Box::new(move |outcome| sender.send(outcome).unwrap()));
        if begin / batch >= in_flight {
            done.recv().unwrap().unwrap();
        }
        if begin / batch % 16 == 15 && begin > keep {
            store.purge(LogId::new(1, begin - keep), completion().0);
            peak = peak.max(store.disk_bytes().unwrap());
        }
    }
    save_vote(store, 1).unwrap();
    peak
}

#[test]
fn a_rolling_purge_bounds_the_disk() {
    let home = Home::new();
    let store =
        SledStore::open(&home.log(), SledOptions { tail_bytes: 1 << 20, ..SledOptions::default() }).unwrap();
    // 80 MiB of entries, 4 MiB of them kept.
    let peak = rolling(&store, 20_480, 4096, 64, 1024);
    assert!(peak < 96 * MIB, "{} MiB", peak / MIB);
    drop(store);
    let store = open(&home.log()).unwrap();
    assert!(all(&store).unwrap().len() >= 1024);
    assert!(store.disk_bytes().unwrap() < 96 * MIB);
}

#[test]
#[ignore = "a measurement"]
fn a_gibibyte() {
    let home = Home::new();
    let store = open(&home.log()).unwrap();
    let start = Instant::now();
    let peak = rolling(&store, (1 << 30) / 1024, 1024, 256, 20_000);
    let stats = store.stats().unwrap();
    println!(
        "1 GiB in entries of 1 KiB, 20 MiB kept: {:.1} s, peak {} MiB on disk, {} flushes, longest {} us",
        start.elapsed().as_secs_f64(),
        peak / MIB,
        stats.flushes.load(Relaxed),
        stats.flush_us_max.load(Relaxed),
    );
    drop(store);
    let start = Instant::now();
    let store = open(&home.log()).unwrap();
    println!(
        "re-open: {} ms, {} MiB on disk",
        start.elapsed().as_millis(),
        store.disk_bytes().unwrap() / MIB
    );
}

#[test]
#[ignore = "a measurement"]
fn entries_per_second() {
    println!("a write of 330 bytes and fdatasync, for comparison: p50 {} us", raw_sync_us());
    for keep in [50_000, 500_000] {
        println!("with the newest {keep} entries kept:");
        for batch in [1, 64, 256, 1024] {
            measure(batch, keep);
        }
    }
}

/// Writes batches of entries of 256 bytes one after the other for some seconds.
fn measure(batch: u64, keep: u64) {
    let home = Home::new();
    let store = open(&home.log()).unwrap();
    let mut latencies = Vec::new();
    let written = io_bytes();
    let start = Instant::now();
    let mut next = 0;
    while start.elapsed() < Duration::from_secs(4) {
        let began = Instant::now();
        append(&store, (next..next + batch).map(|index| command(1, index, 256)).collect()).unwrap();
        latencies.push(began.elapsed());
        next += batch;
        if next % 8192 == 0 && next > keep {
            store.purge(LogId::new(1, next - keep), completion().0);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    latencies.sort();
    println!(
        "{batch:>5} a flush: {:>9.0} entries/s, p50 {:>5} us, p99 {:>6} us, {:.2} bytes written a byte, {} MiB on disk",
        next as f64 / seconds,
        latencies[latencies.len() / 2].as_micros(),
        latencies[latencies.len() * 99 / 100].as_micros(),
        (io_bytes() - written) as f64 / (next * 256) as f64,
        store.disk_bytes().unwrap() / MIB,
    );
}

fn raw_sync_us() -> u128 {
    use std::io::Write;
    let home = Home::new();
    let mut file = fs::File::create(home.0.path().join("raw")).unwrap();
    let mut latencies: Vec<_> = (0..2000)
        .map(|_| {
            let began = Instant::now();
            file.write_all(&[7; 330]).unwrap();
            file.sync_data().unwrap();
            began.elapsed().as_micros()
        })
        .collect();
    latencies.sort();
    latencies[latencies.len() / 2]
}

/// Bytes this process has given to the kernel to write.
fn io_bytes() -> u64 {
    let io = fs::read_to_string("/proc/self/io").unwrap();
    let line = io.lines().find(|line| line.starts_with("wchar")).unwrap();
    line.split(' ').nth(1).unwrap().parse().unwrap()
}
