//! Everything that a network or a disk hands to this program and that has to be decoded, as functions of bytes. `tests/fuzz` has them called by
//! libFuzzer, and this module's tests with what it has found and with small changes of it.
//!
//! A function returns, or it panics: by an assertion of its own where what was decoded contradicts itself, or by a fault of the decoder. What
//! is behind a checksum is given one that matches.
//!
//! What it does not do: look for what takes long, or much memory. The limits of libFuzzer do.

use crate::kv::machine::KvMachine;
use crate::{config, feed, kv, machine, node, raft, storage};

macro_rules! targets {
    ($( $(#[doc = $text:literal])+ $name:ident: $target:expr; )+) => {
        $( $(#[doc = $text])+ pub fn $name(bytes: &[u8]) { $target(bytes) } )+

        /// All of them, by name.
        pub const TARGETS: &[(&str, fn(&[u8]))] = &[ $( (stringify!($name), $name) ),+ ];
    };
}

targets! {
    /// A request of a member, or of who says that it is one.
    peer_request: raft::network::fuzzed::request::<KvMachine>;
    /// The answer of a member.
    peer_response: raft::network::fuzzed::response;
    /// Frames of a follower.
    frames: node::fuzzed::frames;
    /// A subscription by gRPC.
    subscribe: node::fuzzed::subscribe;
    /// The body of `POST /replication/configure`.
    http_configure: node::fuzzed::configure;
    /// A request of the pipeline.
    kv_call: kv::fuzzed::call;
    /// A command as the log stores it.
    kv_command: kv::fuzzed::command;
    /// The machine's part of a snapshot.
    kv_snapshot: kv::fuzzed::snapshot;
    /// What an entry of the log carries.
    envelope: raft::fuzzed::envelope::<KvMachine>;
    /// The file of a snapshot.
    snapshot: raft::fuzzed::snapshot::<KvMachine>;
    /// A record of the log in sled.
    log_record: storage::fuzzed::log_record;
    /// Vote and positions in sled.
    hard_state: storage::fuzzed::hard_state;
    /// A file of the event log.
    segments: storage::fuzzed::segments;
    /// What the event log stores of what was applied.
    feed_piece: feed::fuzzed::piece;
    /// `identity.json`.
    identity: storage::fuzzed::identity;
    /// The table of sessions in a snapshot.
    sessions: |mut bytes: &[u8]| _ = machine::sessions::SessionTable::read(&mut bytes);
    /// A recording of commands.
    recording: |bytes: &[u8]| _ = machine::Recording::from_bytes(bytes);
    /// A configuration file.
    config_file: config::fuzzed::file;
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    use super::*;

    /// What libFuzzer has found to take different ways, and what once was a fault.
    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
        let files = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        files.map(|file| std::fs::read(file.unwrap().path()).unwrap()).collect()
    }

    #[test]
    fn each_target_has_a_program_and_a_corpus() {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
        let listed = std::fs::read_to_string(manifest.join("Cargo.toml")).unwrap();
        for (name, _) in TARGETS {
            assert!(listed.contains(&format!("name = \"{name}\"")), "{name} is not in tests/fuzz/Cargo.toml");
            let program = std::fs::read_to_string(manifest.join(format!("targets/{name}.rs"))).unwrap();
            assert!(program.contains(&format!("quorate::fuzzing::{name}(")), "{name}");
            assert!(corpus(name).len() > 1, "{name} has no corpus");
        }
        assert_eq!(listed.matches("[[bin]]").count(), TARGETS.len());
    }

    #[test]
    fn nothing_that_was_found_and_no_small_change_of_it_makes_a_decoder_panic() {
        for (name, target) in TARGETS {
            let corpus = corpus(name);
            corpus.iter().for_each(|bytes| target(bytes));
            let changed = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>(), 0..4u8);
            let mut runner = TestRunner::new(ProptestConfig { cases: 256, ..ProptestConfig::default() });
            let ran = runner.run(&changed, |(which, place, byte, how)| {
                let mut bytes = corpus[which.index(corpus.len())].clone();
                if !bytes.is_empty() {
                    let place = place.index(bytes.len());
                    match how {
                        0 => bytes[place] = byte,
                        1 => bytes[place] ^= 1 << (byte % 8),
                        2 => bytes.truncate(place),
                        _ => bytes.insert(place, byte),
                    }
                }
                target(&bytes);
                Ok(())
            });
            ran.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}
