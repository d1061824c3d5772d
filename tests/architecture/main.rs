//! The rules of `docs/ARCHITECTURE.md` that a reader of the source can check, checked.
//!
//! Imports are read as tokens, so a rule is neither broken by a comment nor evaded by a line break. What is found is a path:
//! `crate::room`, `super::…::room` that climbs to the crate's root, a re-export of the root, or a vendor crate. Each file's tests
//! at its end show its checker failing on bad samples.

#![allow(clippy::unwrap_used)] // a test file: clippy exempts only the functions marked as tests

mod circles;
mod names;
mod rooms;
mod sizes;
mod source;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rooms::Violation;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The texts of all sources below `dirs`, by their paths from the root.
fn rust_files(dirs: &[&str]) -> BTreeMap<String, String> {
    fn add(dir: &Path, found: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                add(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let inside = path.strip_prefix(root()).unwrap().display().to_string();
                found.insert(inside, fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    dirs.iter().map(|dir| root().join(dir)).filter(|dir| dir.is_dir()).for_each(|dir| add(&dir, &mut found));
    found
}

#[test]
fn rooms_name_only_what_they_may() {
    let reexports = rooms::reexports(&fs::read_to_string(root().join("src/lib.rs")).unwrap());
    let files = rust_files(&["src"]);
    assert!(files.len() > 100, "the sources are not where this test looks for them");
    let broken = files.iter().flat_map(|(file, text)| rooms::violations(file, text, &reexports));
    let lines: Vec<_> = broken.map(|broken| Violation::to_string(&broken)).collect();
    assert!(lines.is_empty(), "\n{}\n", lines.join("\n"));
}
