//! The rules of `docs/ARCHITECTURE.md` that a reader of imports can check, checked.
//!
//! Source is read as tokens, so a rule is neither broken by a comment nor evaded by a line break. What is
//! found is a path: `crate::room`, `super::…::room` that climbs to the crate's root, a re-export of the
//! root, or a vendor crate. The tests at the end show the checker failing on bad samples.

#![allow(clippy::unwrap_used)] // a test file: clippy exempts only the functions marked as tests

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// A file longer than this wants splitting by concept.
const FILE_LINES: usize = 700;

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
    ("incoming", &["error"]),
    ("session", &["types"]),
    ("call", &["types", "reason", "proto"]),
    // What a node tells of itself, whoever makes it and whoever reads it.
    ("report", &["types", "proto", "call"]),
    // Pure: no IO, no clock, no randomness, so not even `runtime`.
    ("machine", &["types", "error"]),
    ("storage", &["types", "error", "runtime", "logging"]),
    ("raft", &["types", "shown", "error", "runtime", "incoming", "proto", "report", "machine", "storage"]),
    ("stream", &["types", "error", "runtime", "proto", "machine", "storage"]),
    ("engine", &["types", "reason", "address", "error", "session", "runtime", "report", "machine",
        "storage", "raft", "stream"]),
    ("door", &["types", "reason", "shown", "error", "runtime", "incoming", "proto", "call", "machine",
        "engine"]),
    ("node", &["types", "reason", "shown", "error", "runtime", "incoming", "logging", "signals", "proto",
        "report", "machine", "storage", "engine", "door"]),
    // A client shares nothing with the server but the protocol, and the machine that both know.
    ("client", &["types", "reason", "shown", "session", "runtime", "proto", "call", "report", "machine"]),
    ("kv", &["types", "reason", "error", "runtime", "incoming", "proto", "call", "machine", "engine",
        "door", "node", "client"]),
    // Settings of a whole process, so above what they are the settings of.
    ("config", &["types", "address", "shown", "error", "runtime", "duration", "engine", "door", "node",
        "kv"]),
    ("cli", &["types", "reason", "shown", "error", "runtime", "incoming", "logging", "signals", "duration",
        "config", "machine", "storage", "engine", "stream", "node", "kv"]),
    // The program's alone: what embeds the library has its own.
    ("allocator", &[]),
    ("main", &["cli", "config", "error", "allocator"]),
];

/// Which rooms the parts of a guest may name, beside each other: a guest is not one knot.
const PARTS: &[(&str, &[&str])] = &[
    ("kv/api", &["types", "call"]),
    ("kv/codec", &["types", "reason", "call", "proto"]),
    ("kv/machine", &["types", "machine"]),
    ("kv/calls", &["types", "reason", "call", "proto", "door"]),
    ("kv/client", &["types", "reason", "runtime", "proto", "call", "client"]),
    (
        "kv/service",
        &[
            "types", "reason", "error", "runtime", "incoming", "proto", "call", "machine", "engine", "door",
            "node",
        ],
    ),
    ("kv/settings", &["engine"]),
];

/// Parts of one guest that a part may name; the others name none.
const NEIGHBOURS: &[(&str, &[&str])] = &[
    ("kv/codec", &["api", "machine"]),
    ("kv/calls", &["api", "codec", "machine"]),
    ("kv/client", &["api", "codec"]),
    ("kv/service", &["api", "codec", "calls", "machine"]),
    ("kv/settings", &["machine"]),
];

/// What tests may name beyond that: a fake server, and the machine that is at hand.
#[rustfmt::skip]
const IN_TESTS: &[(&str, &str)] = &[
    ("cli", "proto"), ("cli", "golden"), ("config", "golden"), ("kv", "golden"), ("reason", "proto"),
    ("raft", "golden"), ("machine", "golden"), ("storage", "golden"), ("engine", "golden"), ("client", "golden"),
    ("engine", "kv"), ("raft", "kv"), ("kv", "report"), ("kv", "raft"), ("kv", "storage"),
];

/// Files that are nothing but tests, and are not called so.
const TEST_FILES: &[&str] = &["src/engine/lone.rs", "src/golden.rs", "src/raft/apply/quota_tests.rs"];

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
];

/// Which files may define a symbol for the whole process, such as a function of the C library anew.
const SYMBOLS: &[&str] =
    &["src/storage/sled/power.rs", "src/storage/sled/read_watch.rs", "src/storage/tests/syncs.rs"];

/// A rule broken at a place.
#[derive(Debug, PartialEq, Eq)]
struct Violation {
    file: String,
    line: usize,
    rule: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.rule)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(String),
    Mark(char),
}

/// Words and marks of Rust source with their lines, without comments, strings and characters.
fn tokens(source: &str) -> Vec<(usize, Token)> {
    let text: Vec<char> = source.chars().collect();
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    let peek = |at: usize| text.get(at).copied().unwrap_or('\0');
    let word_char = |c: char| c.is_alphanumeric() || c == '_';
    while at < text.len() {
        let start = at;
        let first = text[at];
        if first == '/' && peek(at + 1) == '/' {
            while at < text.len() && text[at] != '\n' {
                at += 1;
            }
        } else if first == '/' && peek(at + 1) == '*' {
            let mut depth = 0;
            loop {
                match (peek(at), peek(at + 1)) {
                    ('/', '*') => (depth, at) = (depth + 1, at + 2),
                    ('*', '/') => (depth, at) = (depth - 1, at + 2),
                    _ => at += 1,
                }
                if depth == 0 || at >= text.len() {
                    break;
                }
            }
        } else if first == '"' {
            at += 1;
            while at < text.len() && text[at] != '"' {
                at += if text[at] == '\\' { 2 } else { 1 };
            }
            at += 1;
        } else if first == '\'' && (peek(at + 1) == '\\' || peek(at + 2) == '\'') {
            // A character; a lifetime has no closing quote.
            at += if peek(at + 1) == '\\' { 3 } else { 2 };
            while at < text.len() && text[at] != '\'' {
                at += 1;
            }
            at += 1;
        } else if word_char(first) {
            while word_char(peek(at)) {
                at += 1;
            }
            let word: String = text[start..at].iter().collect();
            let hashes = text[at..].iter().take_while(|c| **c == '#').count();
            if matches!(word.as_str(), "r" | "br" | "cr") && peek(at + hashes) == '"' {
                let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
                at += hashes + 1;
                while at < text.len() && !text[at..].starts_with(&end) {
                    at += 1;
                }
                at += end.len();
            } else {
                found.push((line, Token::Word(word)));
            }
        } else {
            if !first.is_whitespace() {
                found.push((line, Token::Mark(first)));
            }
            at += 1;
        }
        line += text[start..at.min(text.len())].iter().filter(|c| **c == '\n').count();
    }
    found
}

/// The tokens of one file, asked for the words that begin paths.
struct Source<'a> {
    file: &'a str,
    tokens: Vec<(usize, Token)>,
}

impl Source<'_> {
    fn word(&self, at: usize) -> Option<&str> {
        match self.tokens.get(at) {
            Some((_, Token::Word(word))) => Some(word),
            _ => None,
        }
    }

    fn mark(&self, at: usize, mark: char) -> bool {
        self.tokens.get(at).is_some_and(|(_, token)| *token == Token::Mark(mark))
    }

    /// Whether `::` stands at `at`.
    fn joined(&self, at: usize) -> bool {
        self.mark(at, ':') && self.mark(at + 1, ':')
    }

    /// The words at `at`: one, or the first of each branch of a group in braces.
    fn branches(&self, at: usize) -> Vec<(usize, &str)> {
        if !self.mark(at, '{') {
            return self.word(at).map(|word| (self.tokens[at].0, word)).into_iter().collect();
        }
        let mut words = Vec::new();
        let mut depth = 0;
        for here in at..self.tokens.len() {
            match &self.tokens[here].1 {
                Token::Mark('{') => depth += 1,
                Token::Mark('}') => depth -= 1,
                Token::Word(word) if depth == 1 && (self.mark(here - 1, '{') || self.mark(here - 1, ',')) => {
                    words.push((self.tokens[here].0, word.as_str()));
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
        words
    }

    /// Words that follow the crate's root in a path.
    fn names_at_root(&self) -> Vec<(usize, &str)> {
        let depth = module_depth(self.file);
        let mut names = Vec::new();
        for at in 0..self.tokens.len() {
            let begins_path = at < 2 || !self.joined(at - 2);
            match self.word(at) {
                Some("crate") if self.joined(at + 1) => names.extend(self.branches(at + 3)),
                Some("quorate") if self.file == "src/main.rs" && self.joined(at + 1) => {
                    names.extend(self.branches(at + 3));
                }
                Some("super") if begins_path && self.joined(at + 1) => {
                    let mut supers = 1;
                    let mut end = at + 3;
                    while self.word(end) == Some("super") && self.joined(end + 1) {
                        (supers, end) = (supers + 1, end + 3);
                    }
                    if supers >= depth {
                        names.extend(self.branches(end));
                    }
                }
                _ => {}
            }
        }
        names
    }

    /// Words that follow the room of the file in a path: the modules of the room that it names.
    fn names_in_room(&self) -> Vec<(usize, &str)> {
        let (depth, own) = (module_depth(self.file), room(self.file));
        let mut names = Vec::new();
        for at in 0..self.tokens.len() {
            let begins_path = at < 2 || !self.joined(at - 2);
            match self.word(at) {
                Some("crate")
                    if self.joined(at + 1) && self.word(at + 3) == Some(own) && self.joined(at + 4) =>
                {
                    names.extend(self.branches(at + 6));
                }
                Some("super") if begins_path && self.joined(at + 1) => {
                    let mut supers = 1;
                    let mut end = at + 3;
                    while self.word(end) == Some("super") && self.joined(end + 1) {
                        (supers, end) = (supers + 1, end + 3);
                    }
                    if supers + 1 == depth {
                        names.extend(self.branches(end));
                    }
                }
                _ => {}
            }
        }
        names
    }

    /// The line on which the tests begin that end the file.
    fn tests_line(&self) -> Option<usize> {
        let begins = |at: &usize| {
            self.word(*at) == Some("mod") && self.word(*at + 1) == Some("tests") && self.mark(*at + 2, '{')
        };
        (0..self.tokens.len()).find(begins).map(|at| self.tokens[at].0)
    }

    /// Whether the `::` before the word at `at` begins a path, as in `::vendor::Type`.
    fn is_global(&self, at: usize) -> bool {
        const KEYWORDS: [&str; 7] = ["use", "as", "dyn", "impl", "in", "mut", "return"];
        let Some(colons) = at.checked_sub(2).filter(|colons| self.joined(*colons)) else { return false };
        match colons.checked_sub(1).map(|before| (before, &self.tokens[before].1)) {
            None => true,
            Some((_, Token::Word(word))) => KEYWORDS.contains(&word.as_str()),
            // The end of an arrow, or of the arguments of a type.
            Some((before, Token::Mark('>'))) => before > 0 && self.mark(before - 1, '-'),
            Some((_, Token::Mark(_))) => true,
        }
    }

    /// The lines that give a symbol its name in the whole process.
    fn symbols(&self) -> impl Iterator<Item = usize> {
        let names = |token: &Token| matches!(token, Token::Word(word) if ["no_mangle", "export_name"].contains(&word.as_str()));
        self.tokens.iter().filter(move |(_, token)| names(token)).map(|(line, _)| *line)
    }

    /// Names of other crates: the first word of a path, or of an import.
    fn crates(&self) -> Vec<(usize, &str)> {
        let begins_path = |at: usize| at < 2 || !self.joined(at - 2) || self.is_global(at);
        let imported = |at: usize| at > 0 && matches!(self.word(at - 1), Some("use" | "crate"));
        (0..self.tokens.len())
            .filter(|at| begins_path(*at) && (self.joined(at + 1) || imported(*at)))
            .filter_map(|at| self.word(at).map(|word| (self.tokens[at].0, word)))
            .collect()
    }
}

/// How many `super` lead from a file's module to the crate's root.
fn module_depth(file: &str) -> usize {
    let path = file.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    path.split('/').count()
}

/// Whether a file is nothing but tests.
fn is_test_file(file: &str) -> bool {
    file.contains("/tests/") || file.ends_with("/tests.rs") || TEST_FILES.contains(&file)
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

/// Everything that one file of `src/` does against the rules. `reexports` maps names at the crate's root
/// to their rooms.
fn violations(file: &str, text: &str, reexports: &BTreeMap<String, String>) -> Vec<Violation> {
    let mut broken = Vec::new();
    let mut report = |line, rule| broken.push(Violation { file: file.to_owned(), line, rule });
    let source = Source { file, tokens: tokens(text) };

    for (line, name) in source.crates() {
        for (vendor, allowed) in VENDORS {
            let is_vendor =
                name == *vendor || name.strip_prefix(vendor).is_some_and(|rest| rest.starts_with('_'));
            if is_vendor && !allowed.iter().any(|path| file.starts_with(path)) {
                report(line, format!("names {name}, which only {} may", allowed.join(", ")));
            }
        }
    }
    if !SYMBOLS.contains(&file) {
        for line in source.symbols() {
            report(
                line,
                format!("defines a symbol for the whole process, which only {} may", SYMBOLS.join(", ")),
            );
        }
    }

    let own = room(file);
    // The root says what there is; it has no code.
    if own != "lib" {
        match ROOMS.iter().find(|(room, _)| *room == own) {
            None => report(1, format!("room {own} is not in the table of tests/architecture.rs")),
            Some((_, allowed)) => {
                let tests_line = match is_test_file(file) {
                    true => 0,
                    false => source.tests_line().unwrap_or(usize::MAX),
                };
                for (line, name) in source.names_at_root() {
                    let target = reexports.get(name).map_or(name, String::as_str);
                    let is_room = ROOMS.iter().any(|(room, _)| *room == target);
                    let in_tests = line > tests_line && IN_TESTS.contains(&(own, target));
                    if is_room && target != own && !allowed.contains(&target) && !in_tests {
                        let allowed =
                            if allowed.is_empty() { "no room".to_owned() } else { allowed.join(", ") };
                        report(line, format!("{own} names {target}; it may name {allowed}"));
                    }
                }
            }
        }
    }
    if let Some(part) = part(file).filter(|_| !is_test_file(file)) {
        let tests_line = source.tests_line().unwrap_or(usize::MAX);
        let listed = |table: &[(&str, &'static [&'static str])]| {
            table.iter().find(|(known, _)| *known == part).map(|(_, allowed)| *allowed)
        };
        let (Some(rooms), neighbours) = (listed(PARTS), listed(NEIGHBOURS).unwrap_or_default()) else {
            report(1, format!("part {part} is not in the tables of tests/architecture.rs"));
            return broken;
        };
        for (line, name) in source.names_at_root().into_iter().filter(|(line, _)| *line < tests_line) {
            let target = reexports.get(name).map_or(name, String::as_str);
            let is_room = ROOMS.iter().any(|(room, _)| *room == target);
            if is_room && target != own && !rooms.contains(&target) {
                report(line, format!("{part} names {target}; it may name {}", rooms.join(", ")));
            }
        }
        for (line, name) in source.names_in_room().into_iter().filter(|(line, _)| *line < tests_line) {
            let is_part = PARTS.iter().any(|(known, _)| *known == format!("{own}/{name}"));
            if is_part && part != format!("{own}/{name}") && !neighbours.contains(&name) {
                report(line, format!("{part} names {own}/{name}; it may name {}", neighbours.join(", ")));
            }
        }
    }
    broken
}

/// Rooms whose files import each other in one direction only.
const WITHOUT_CIRCLES: &[&str] = &["door", "client"];

/// A circle of imports between the files of a room, if there is one. `files` are the names of its modules, and their texts.
fn circle(room: &str, files: &BTreeMap<String, String>) -> Option<Vec<String>> {
    let mut imports: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, text) in files.iter().filter(|(name, _)| *name != "mod") {
        let file = format!("src/{room}/{name}.rs");
        let source = Source { file: &file, tokens: tokens(text) };
        let tests_line = source.tests_line().unwrap_or(usize::MAX);
        let named = source.names_in_room().into_iter().filter(|(line, _)| *line < tests_line);
        let named = named.filter_map(|(_, named)| files.keys().find(|file| *file == named));
        imports.insert(name, named.filter(|named| *named != name).map(String::as_str).collect());
    }
    // What imports nothing that is left is in no circle.
    loop {
        let free: Vec<_> = (imports.iter())
            .filter(|(_, named)| named.iter().all(|named| !imports.contains_key(named)))
            .map(|(name, _)| *name)
            .collect();
        if free.is_empty() {
            break;
        }
        free.into_iter().for_each(|name| drop(imports.remove(name)));
    }
    let mut at = *imports.keys().next()?;
    let mut path = vec![at];
    loop {
        at = imports[at].iter().copied().find(|named| imports.contains_key(named))?;
        path.push(at);
        if let Some(begins) = path[..path.len() - 1].iter().position(|seen| *seen == at) {
            return Some(path[begins..].iter().map(|name| (*name).to_owned()).collect());
        }
    }
}

fn modules_of(room: &str) -> BTreeMap<String, String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(room);
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let name = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
    files.map(|path| (name(&path), fs::read_to_string(&path).unwrap())).collect()
}

#[test]
fn files_of_a_room_do_not_import_each_other_in_circles() {
    for room in WITHOUT_CIRCLES {
        let modules = modules_of(room);
        assert!(modules.len() > 5, "the files of {room} are not where this test looks for them");
        assert_eq!(circle(room, &modules), None, "in {room}");
    }
}

#[test]
fn a_circle_of_imports_is_found() {
    let files = |texts: &[(&str, &str)]| -> BTreeMap<String, String> {
        texts.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    };
    let straight =
        files(&[("a", "use super::b::X;"), ("b", "use crate::door::c;"), ("c", ""), ("mod", "use a::Y;")]);
    assert_eq!(circle("door", &straight), None);
    let round =
        files(&[("a", "use super::{b, c};"), ("b", "use super::c::X;"), ("c", "use crate::door::{b};")]);
    assert_eq!(circle("door", &round).unwrap(), ["b", "c", "b"]);
}

fn too_long(file: &str, text: &str) -> Option<Violation> {
    let lines = text.lines().count();
    (lines > FILE_LINES).then(|| Violation {
        file: file.to_owned(),
        line: FILE_LINES,
        rule: format!("{lines} lines, more than {FILE_LINES}: split it by concept"),
    })
}

/// What the crate's root re-exports, and from which room.
fn reexports(root: &str) -> BTreeMap<String, String> {
    let source = Source { file: "src/lib.rs", tokens: tokens(root) };
    let mut found = BTreeMap::new();
    for at in 1..source.tokens.len() {
        let reexport = source.word(at - 1) == Some("pub") && source.word(at) == Some("use");
        let Some(room) = source.word(at + 1).filter(|_| reexport && source.joined(at + 2)) else { continue };
        for (_, name) in source.branches(at + 4) {
            found.insert(name.to_owned(), room.to_owned());
        }
    }
    found
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn the_code_keeps_the_rules() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let reexports = reexports(&fs::read_to_string(root.join("src/lib.rs")).unwrap());
    let mut files = Vec::new();
    for dir in ["src", "tests", "cluster", "jepsen", "docs"] {
        if root.join(dir).is_dir() {
            rust_files(&root.join(dir), &mut files);
        }
    }
    files.sort();
    assert!(files.len() > 10, "the sources are not where this test looks for them");

    let mut broken = Vec::new();
    for path in files {
        let file = path.strip_prefix(root).unwrap().display().to_string();
        let text = fs::read_to_string(&path).unwrap();
        broken.extend(too_long(&file, &text));
        if file.starts_with("src/") {
            broken.extend(violations(&file, &text, &reexports));
        }
    }
    let lines: Vec<_> = broken.iter().map(Violation::to_string).collect();
    assert!(lines.is_empty(), "\n{}\n", lines.join("\n"));
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

#[test]
fn a_long_file_is_found() {
    assert!(too_long("src/x.rs", &"\n".repeat(FILE_LINES)).is_none());
    assert!(too_long("src/x.rs", &"\n".repeat(FILE_LINES + 1)).is_some());
}
