//! What a program gets that embeds quorate: the items that it can name, and the crates that come with them.

#![allow(clippy::unwrap_used)] // a test file: clippy exempts only the functions marked as tests

mod crates;
mod source;
mod surface;

use std::fs;
use std::path::Path;

use source::Source;

/// Other crates whose types are part of the surface: what every program of this kind has.
const SHOWN: [&str; 5] = ["bytes", "futures", "serde", "serde_json", "tokio"];

/// What members say to each other is generated, for [`Transport`](quorate::transport::Transport)s to pass on.
const MESSAGES: [&str; 5] = ["Hello", "IdentifyRequest", "IdentifyResponse", "Request", "Response"];

/// The dependencies that the manifest names, as they are called in code.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut within = false;
    for line in manifest.lines() {
        if line.starts_with('[') {
            within = line == "[dependencies]";
        } else if within && let Some((name, _)) = line.split_once(" = ") {
            names.push(name.trim().replace('-', "_"));
        }
    }
    names
}

/// Whoever changes what is public sees it in the list, `public.txt`; `QUORATE_WRITE_SURFACE=1` writes it anew.
#[test]
fn the_public_surface_is_as_listed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let crates = dependencies(&fs::read_to_string(root.join("Cargo.toml")).unwrap());
    assert!(crates.len() > 20, "{crates:?}");
    let surface = surface::of(&Source::read(&root.join("src"), crates), &SHOWN);
    let file = root.join("tests/surface/public.txt");
    let now = surface.lines.join("\n") + "\n";
    if std::env::var_os("QUORATE_WRITE_SURFACE").is_some() {
        fs::write(&file, &now).unwrap();
    }
    let known = |leak: &String| leak.ends_with("prost") && MESSAGES.iter().any(|name| leak.contains(name));
    let leaks: Vec<_> = surface.leaks.into_iter().filter(|leak| !known(leak)).collect();
    assert!(leaks.is_empty(), "\n{}\n", leaks.join("\n"));
    let listed = fs::read_to_string(&file).unwrap_or_default();
    let changed = now.lines().zip(listed.lines()).position(|(now, listed)| now != listed);
    let at = changed.unwrap_or(now.lines().count().min(listed.lines().count()));
    assert!(
        now == listed,
        "line {} of public.txt: {:?} is now {:?}",
        at + 1,
        listed.lines().nth(at),
        now.lines().nth(at)
    );
}

const SAMPLE: &str = "
mod room {
    use vendor::Thing;
    pub struct Open { pub bytes: Vec<Known>, thing: Thing }
    pub struct Known;
    impl Open {
        pub fn new(known: &Known) -> Self { todo!() }
        fn private(&self) -> Thing { todo!() }
    }
    impl From<Thing> for Unseen { }
    pub struct Unseen;
}
pub use room::{Known, Open};
";

#[test]
fn what_is_private_is_not_shown() {
    let surface = surface::of(&Source::of(SAMPLE, &["vendor"]), &[]);
    assert_eq!(surface.leaks.len(), 0, "{:?}", surface.leaks);
    let expected = [
        "struct Known",
        "struct Open",
        "    bytes: Vec<Known>",
        "    ..",
        "impl Open",
        "    fn new(known: &Known) -> Self",
    ];
    assert_eq!(surface.lines, expected);
}

#[test]
fn a_vendor_is_found_wherever_it_is_shown() {
    for (from, to) in [
        ("thing: Thing }", "pub thing: Thing }"),
        ("fn private", "pub fn private"),
        ("for Unseen", "for Open"),
        ("known: &Known)", "known: impl Fn(vendor::Other))"),
        ("pub struct Known;", "pub enum Known { A(Option<Thing>) }"),
        ("pub struct Known;", "pub trait Known { type X: Into<Thing>; }"),
        ("pub struct Known;", "pub type Known = Thing;"),
        ("thing: Thing }", "#[from] thing: Thing }"),
    ] {
        let sample = SAMPLE.replace(from, to);
        let leaks = surface::of(&Source::of(&sample, &["vendor"]), &[]).leaks;
        assert!(leaks.iter().any(|leak| leak.ends_with("of vendor")), "{to}: {leaks:?}");
    }
}

#[test]
fn what_a_program_cannot_name_is_found() {
    let sample = SAMPLE.replace("{Known, Open}", "Open");
    let leaks = surface::of(&Source::of(&sample, &[]), &[]).leaks;
    assert!(leaks.iter().any(|leak| leak.ends_with("room::Known, which is not exported")), "{leaks:?}");
}
