//! Which room may name which, and which vendor crate.

use std::collections::BTreeMap;
use std::fmt;

use super::source::{Source, is_test_file};

/// Which rooms a room may name. Imports point down; siblings do not import each other.
/// No room of the core names a guest: `cli` and `config` say what is served.
#[rustfmt::skip]
const ROOMS: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("runtime", &[]),
    // What failures are on every interface, and how their messages repeat what they were given.
    ("reason", &[]),
    ("shown", &[]),
    ("proto", &["reason"]),
    ("duration", &[]),
    // For tests alone.
    ("golden", &[]),
    // How people write where somebody listens.
    ("address", &[]),
    ("logging", &[]),
    // What asks a process to stop.
    ("signals", &[]),
    ("error", &["types", "reason", "shown"]),
    ("wire", &[]),
    // Who is at the other end of a connection; above nothing but what carries it.
    ("trust", &["types", "runtime", "wire"]),
    ("incoming", &["error", "wire", "trust"]),
    ("session", &["types"]),
    ("call", &["types", "reason", "proto"]),
    // What a node tells of itself, whoever makes it and whoever reads it.
    ("report", &["types", "proto", "call"]),
    // Pure: no IO, no clock, no randomness, so not even `runtime`.
    ("machine", &["types", "error"]),
    ("storage", &["types", "error", "runtime", "logging"]),
    ("feed", &["types", "error", "runtime", "machine", "storage"]),
    ("raft", &["types", "shown", "error", "runtime", "incoming", "proto", "report", "machine", "storage",
        "feed", "trust", "wire"]),
    ("engine", &["types", "reason", "address", "error", "session", "runtime", "report", "machine",
        "storage", "feed", "raft", "trust"]),
    ("door", &["types", "reason", "shown", "error", "runtime", "incoming", "proto", "call", "machine",
        "feed", "engine"]),
    ("node", &["types", "reason", "address", "shown", "error", "runtime", "incoming", "logging", "signals",
        "proto", "call", "report", "machine", "storage", "feed", "engine", "door", "trust"]),
    // Outside the quorum: what is told it comes by a client, and is asked for at a port.
    ("replica", &["types", "reason", "error", "runtime", "proto", "report", "machine", "storage", "feed", "raft",
        "engine", "door", "node", "client"]),
    // A client shares nothing with the server but the protocol, and the machine that both know.
    ("client", &["types", "reason", "shown", "session", "runtime", "wire", "proto", "call", "report",
        "machine", "trust"]),
    ("kv", &["types", "reason", "error", "runtime", "incoming", "proto", "call", "machine", "feed",
        "engine", "door", "node", "client"]),
    // Settings of a whole process, so above what they are the settings of.
    ("config", &["types", "address", "shown", "error", "runtime", "duration", "feed", "engine", "door", "node",
        "trust"]),
    ("cli", &["types", "reason", "shown", "error", "runtime", "incoming", "logging", "signals", "duration",
        "config", "machine", "storage", "report", "engine", "door", "node", "replica", "kv", "trust"]),
    // Decoders of all rooms, for libFuzzer.
    ("fuzzing", &["config", "feed", "kv", "machine", "node", "raft", "storage"]),
    // The program's alone: what embeds the library has its own.
    ("allocator", &[]),
    ("main", &["cli", "config", "error", "allocator"]),
];

/// Which rooms the parts of a guest may name, beside each other: a guest is not one knot.
const PARTS: &[(&str, &[&str])] = &[
    ("kv/api", &["types", "call"]),
    ("kv/codec", &["types", "reason", "call", "proto"]),
    ("kv/machine", &["types", "machine"]),
    ("kv/calls", &["types", "reason", "call", "proto", "machine", "door"]),
    ("kv/client", &["types", "reason", "runtime", "proto", "call", "client"]),
    ("kv/fuzzed", &["door", "machine"]),
    (
        "kv/service",
        &[
            "types", "reason", "error", "runtime", "incoming", "proto", "call", "machine", "feed", "engine",
            "door", "node",
        ],
    ),
];

/// Parts of one guest that a part may name; the others name none.
const NEIGHBOURS: &[(&str, &[&str])] = &[
    ("kv/codec", &["api", "machine"]),
    ("kv/calls", &["api", "codec", "machine"]),
    ("kv/client", &["api", "codec"]),
    ("kv/fuzzed", &["api", "calls", "codec", "machine"]),
    ("kv/service", &["api", "codec", "calls", "machine"]),
];

/// What tests may name beyond that: a fake server, and the machine that is at hand.
#[rustfmt::skip]
const IN_TESTS: &[(&str, &str)] = &[
    ("cli", "proto"), ("cli", "golden"), ("config", "golden"), ("kv", "golden"), ("node", "golden"), ("reason", "proto"),
    ("raft", "golden"), ("machine", "golden"), ("storage", "golden"), ("engine", "golden"), ("client", "golden"),
    ("engine", "kv"), ("raft", "kv"), ("kv", "report"), ("kv", "raft"), ("kv", "storage"), ("kv", "feed"), ("replica", "kv"),
];

/// Which files may name a vendor crate, or another one whose name begins with it and `_`.
const VENDORS: &[(&str, &[&str])] = &[
    ("openraft", &["src/raft/", "src/raft.rs"]),
    ("sled", &["src/storage/sled/"]),
    (
        "tonic",
        &[
            "src/node/",
            "src/door/",
            "src/client/",
            "src/kv/client/",
            "src/kv/service/",
            "src/raft/network",
            "src/proto.rs",
            "src/incoming.rs",
            "src/incoming/",
            "src/proto/",
        ],
    ),
    ("anyhow", &["src/main.rs"]),
    ("rustls", &["src/trust/"]),
    ("tokio_rustls", &["src/trust/"]),
    ("webpki", &["src/trust/"]),
    ("rcgen", &["src/trust/"]),
    ("x509_parser", &["src/trust/"]),
];

/// Which files may define a symbol for the whole process, such as a function of the C library anew.
const SYMBOLS: &[&str] =
    &["src/storage/sled/power.rs", "src/storage/sled/read_watch.rs", "src/storage/tests/syncs.rs"];

/// A rule broken at a place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) file: String,
    pub(crate) line: usize,
    pub(crate) rule: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.rule)
    }
}

/// The part of a guest that a file belongs to, such as `kv/codec`; none for its root and for what is no guest's.
fn part(file: &str) -> Option<&str> {
    let path = file.strip_prefix("src/")?.trim_end_matches(".rs");
    let (room, rest) = path.split_once('/')?;
    let name = rest.split('/').next().filter(|name| *name != "mod")?;
    PARTS
        .iter()
        .any(|(known, _)| known.starts_with(&format!("{room}/")))
        .then(|| &path[..room.len() + 1 + name.len()])
}

/// The room that a file of `src/` belongs to.
fn room(file: &str) -> &str {
    let path = file.trim_start_matches("src/");
    path.split('/').next().unwrap_or(path).trim_end_matches(".rs")
}

/// Everything that one file of `src/` names against the rules. `reexports` maps names at the crate's root to their rooms.
pub(crate) fn violations(file: &str, text: &str, reexports: &BTreeMap<String, String>) -> Vec<Violation> {
    let source = Source::of(file, text);
    let mut broken = vendors(&source);
    if !SYMBOLS.contains(&file) {
        let rule = format!("defines a symbol for the whole process, which only {} may", SYMBOLS.join(", "));
        broken.extend(source.symbols().map(|line| (line, rule.clone())));
    }
    // Where a path leads that begins at the root: to a room, also by what the root re-exports of it.
    let mut named: Vec<(usize, &str, Option<&str>)> = Vec::new();
    let paths = source.absolute_paths();
    for (line, path) in &paths {
        let target = reexports.get(path[0]).map_or(path[0], String::as_str);
        named.push((*line, target, path.get(1).copied()));
    }
    named.dedup();
    let tests_line = match is_test_file(file) {
        true => 0,
        false => source.tests_line().unwrap_or(usize::MAX),
    };
    broken.extend(rooms(file, &named, tests_line));
    if !is_test_file(file) {
        named.retain(|(line, ..)| *line < tests_line);
        broken.extend(parts(file, &named));
    }
    broken.dedup();
    broken.into_iter().map(|(line, rule)| Violation { file: file.to_owned(), line, rule }).collect()
}

type Broken = Vec<(usize, String)>;

fn vendors(source: &Source<'_>) -> Broken {
    let mut broken = Vec::new();
    for (line, name) in source.crates() {
        for (vendor, allowed) in VENDORS {
            let is_vendor =
                name == *vendor || name.strip_prefix(vendor).is_some_and(|rest| rest.starts_with('_'));
            if is_vendor && !allowed.iter().any(|path| source.file.starts_with(path)) {
                broken.push((line, format!("names {name}, which only {} may", allowed.join(", "))));
            }
        }
    }
    broken
}

fn is_room(name: &str) -> bool {
    ROOMS.iter().any(|(room, _)| *room == name)
}

/// What a file names that its room may not name.
fn rooms(file: &str, named: &[(usize, &str, Option<&str>)], tests_line: usize) -> Broken {
    let own = room(file);
    // The root says what there is; it has no code.
    if own == "lib" {
        return Vec::new();
    }
    let Some((_, allowed)) = ROOMS.iter().find(|(room, _)| *room == own) else {
        return vec![(1, format!("room {own} is not in the table of tests/architecture"))];
    };
    let is_broken = |(line, target): &(usize, &str)| {
        let in_tests = *line > tests_line && IN_TESTS.contains(&(own, target));
        is_room(target) && *target != own && !allowed.contains(target) && !in_tests
    };
    let said = if allowed.is_empty() { "no room".to_owned() } else { allowed.join(", ") };
    let named = named.iter().map(|(line, target, _)| (*line, *target)).filter(is_broken);
    named.map(|(line, target)| (line, format!("{own} names {target}; it may name {said}"))).collect()
}

/// What a part of a guest names that it may not name.
fn parts(file: &str, named: &[(usize, &str, Option<&str>)]) -> Broken {
    let (own, Some(part)) = (room(file), part(file)) else { return Vec::new() };
    let listed = |table: &[(&str, &'static [&'static str])]| {
        table.iter().find(|(known, _)| *known == part).map(|(_, allowed)| *allowed)
    };
    let (Some(rooms), neighbours) = (listed(PARTS), listed(NEIGHBOURS).unwrap_or_default()) else {
        return vec![(1, format!("part {part} is not in the tables of tests/architecture"))];
    };
    let mut broken = Vec::new();
    for (line, target, within) in named {
        if is_room(target) && *target != own && !rooms.contains(target) {
            broken.push((*line, format!("{part} names {target}; it may name {}", rooms.join(", "))));
        }
        let Some(name) = within.filter(|_| *target == own) else { continue };
        let is_part = PARTS.iter().any(|(known, _)| *known == format!("{own}/{name}"));
        if is_part && part != format!("{own}/{name}") && !neighbours.contains(&name) {
            broken.push((*line, format!("{part} names {own}/{name}; it may name {}", neighbours.join(", "))));
        }
    }
    broken
}

/// What the crate's root re-exports, and from which room.
pub(crate) fn reexports(root: &str) -> BTreeMap<String, String> {
    let source = Source::of("src/lib.rs", root);
    let mut found = BTreeMap::new();
    for at in 1..source.len() {
        let reexport = source.word(at - 1) == Some("pub") && source.word(at) == Some("use");
        let Some(room) = source.word(at + 1).filter(|_| reexport && source.joined(at + 2)) else { continue };
        for (_, name) in source.branches(at + 4) {
            found.insert(name.to_owned(), room.to_owned());
        }
    }
    found
}

/// Lines of the violations in a sample.
fn broken_lines(file: &str, sample: &str) -> Vec<usize> {
    let reexports = reexports("pub use engine::{Engine, EngineConfig};\npub use types::LogId;");
    violations(file, sample, &reexports).iter().map(|violation| violation.line).collect()
}

#[test]
fn a_vendor_crate_outside_its_room_is_found() {
    let sample = "//! No sled:: here.\nuse openraft::Raft;\nfn f() -> sled::Db { todo!(\"sled::\") }\n";
    let found = violations("src/engine/mod.rs", sample, &BTreeMap::new());
    let lines: Vec<_> = found.iter().map(Violation::to_string).collect();
    assert_eq!(
        lines,
        [
            "src/engine/mod.rs:2: names openraft, which only src/raft/, src/raft.rs may",
            "src/engine/mod.rs:3: names sled, which only src/storage/sled/ may",
        ]
    );
    assert_eq!(broken_lines("src/raft/log.rs", sample), [3]);
    assert_eq!(broken_lines("src/raft/log.rs", "use openraft_rt::X;\nuse tonic_prost::Y;"), [2]);
    assert_eq!(broken_lines("src/raft/network/mod.rs", "use tonic::Status;"), []);
    assert_eq!(broken_lines("src/cli/put.rs", "use anyhow as a;"), [1]);
    // A module of ours may be called like a vendor's crate.
    assert_eq!(broken_lines("src/engine/mod.rs", "use crate::storage::sled::Store;"), []);
    assert_eq!(
        broken_lines("src/storage/mod.rs", "use self::sled::Store;\nfn f() { Vec::<u8>::sled() }"),
        []
    );
    let global = "use ::sled::Db;\nfn f() -> ::sled::Db {\ng(::sled::open()) }";
    assert_eq!(broken_lines("src/storage/memory.rs", global), [1, 2, 3]);
    assert_eq!(broken_lines("src/storage/sled/disk.rs", global), []);
}

#[test]
fn a_symbol_for_the_whole_process_is_found() {
    let sample = "// no_mangle\n#[unsafe(no_mangle)]\nextern \"C\" fn pread64() {}\n#[unsafe(export_name = \"f\")]\nfn g() {}";
    assert_eq!(broken_lines("src/storage/space/mod.rs", sample), [2, 4]);
    assert_eq!(broken_lines("src/storage/sled/power.rs", sample), []);
}

#[test]
fn an_import_that_points_up_or_aside_is_found() {
    assert_eq!(broken_lines("src/storage/mod.rs", "use crate::types::X;\nuse crate::machine::Y;"), [2]);
    assert_eq!(broken_lines("src/machine/mod.rs", "fn f() { crate::storage::g() }"), [1]);
    assert_eq!(
        broken_lines("src/client/mod.rs", "use crate::{\n    types::A,\n    engine::{B, C},\n};"),
        [3]
    );
    assert_eq!(broken_lines("src/raft/core.rs", "use crate::{LogId,\nEngine};"), [2]);
    assert_eq!(broken_lines("src/raft/log.rs", "use super::apply::X;\nuse super::super::engine::Y;"), [2]);
    assert_eq!(broken_lines("src/machine/mod.rs", "use super::runtime::random_u64;"), [1]);
    assert_eq!(broken_lines("src/main.rs", "use quorate::cli;\nuse quorate::engine::Engine;"), [2]);
    assert_eq!(
        broken_lines("src/cli/mod.rs", "use crate::proto::X;\nmod tests {\nuse crate::proto::X;\n}"),
        [1]
    );
    assert_eq!(broken_lines("src/shed/mod.rs", ""), [1]);
}

#[test]
fn a_guest_that_is_named_in_the_core_is_found() {
    for file in
        ["src/door/mod.rs", "src/node/mod.rs", "src/client/mod.rs", "src/engine/mod.rs", "src/machine/mod.rs"]
    {
        assert_eq!(broken_lines(file, "use crate::kv::api::Request;"), [1], "{file}");
    }
    assert_eq!(
        broken_lines("src/engine/writes.rs", "mod tests {\nuse crate::kv::machine::KvMachine;\n}"),
        []
    );
    assert_eq!(broken_lines("src/door/unary.rs", "mod tests {\nuse crate::kv::machine::KvMachine;\n}"), [2]);
}

#[test]
fn a_part_of_a_guest_that_names_what_it_has_nothing_to_do_with_is_found() {
    assert_eq!(
        broken_lines(
            "src/kv/api/mod.rs",
            "use crate::proto::v1;\nuse super::codec;\nuse crate::kv::machine::X;"
        ),
        [1, 2, 3]
    );
    assert_eq!(
        broken_lines("src/kv/api/txn.rs", "use super::request::Range;\nuse super::super::codec::X;"),
        [2]
    );
    assert_eq!(
        broken_lines("src/kv/client/streams.rs", "use crate::door::X;\nuse super::super::{api, service};"),
        [1, 2]
    );
    assert_eq!(
        broken_lines("src/kv/service/mod.rs", "use super::client::Client;\nuse super::{api, codec};"),
        [1]
    );
    assert_eq!(
        broken_lines("src/kv/machine/mod.rs", "use crate::storage::X;\nuse crate::machine::Y;"),
        [1, 1]
    );
    assert_eq!(broken_lines("src/kv/shed/mod.rs", ""), [1]);
}

#[test]
fn comments_strings_and_characters_hide_nothing_that_follows_them() {
    let sample = "/* crate::engine /* nested */ */ const A: &str = \"\\\"crate::engine\";\n\
                  const B: &str = r#\"\"crate::engine\"#; const C: char = '\"'; const D: char = '\\'';\n\
                  fn f<'a>(x: &'a u8) { crate::engine::g(x) }\n";
    assert_eq!(broken_lines("src/storage/mod.rs", sample), [3]);
}
