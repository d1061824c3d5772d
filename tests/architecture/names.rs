//! A noun belongs to one thing: no type is called like another one.

use std::collections::{BTreeMap, BTreeSet};

use syn::{Attribute, Item};

use super::rust_files;
use super::source::is_test_file;

/// Names that several types have, each with why. Generated code is not read: its names are the protocol's.
const SHARED: &[(&str, &str)] = &[
    ("Entry", OPENRAFTS),
    ("LogId", OPENRAFTS),
    ("Membership", OPENRAFTS),
    ("Payload", OPENRAFTS),
    ("SnapshotMeta", OPENRAFTS),
    ("Vote", OPENRAFTS),
    ("Client", A_GUESTS),
    ("Compare", A_GUESTS),
    ("Comparison", A_GUESTS),
    ("Item", A_GUESTS),
    ("Method", A_GUESTS),
    ("Once", A_GUESTS),
    ("TxnOp", A_GUESTS),
    ("TxnResult", A_GUESTS),
    ("WriteOptions", A_GUESTS),
    ("Call", A_CLIENTS),
    ("Connection", A_CLIENTS),
    ("Failure", A_CLIENTS),
    ("InFlight", A_CLIENTS),
    ("Leader", A_CLIENTS),
    ("Methods", A_CLIENTS),
    ("SessionInfo", A_CLIENTS),
    ("UnderWay", A_CLIENTS),
    ("Written", A_CLIENTS),
];

const OPENRAFTS: &str = "ours, and in raft/type_config.rs what it is translated to for openraft";
const A_GUESTS: &str =
    "one thing as its callers have it, for any machine, and as the key-value machine has it";
const A_CLIENTS: &str =
    "a node's and a client's: two programs, which share vocabulary, protocol and machine alone";

/// Whether an item is there for tests only.
pub(crate) fn in_tests_only(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let syn::Meta::List(list) = &attribute.meta else { return false };
        list.path.is_ident("cfg") && list.tokens.to_string() == "test"
    })
}

/// The types that `items` define, those in modules within them included.
fn types(items: &[Item], found: &mut Vec<String>) {
    for item in items {
        let (name, attributes) = match item {
            Item::Enum(item) => (&item.ident, &item.attrs),
            Item::Struct(item) => (&item.ident, &item.attrs),
            Item::Trait(item) => (&item.ident, &item.attrs),
            Item::Type(item) => (&item.ident, &item.attrs),
            Item::Union(item) => (&item.ident, &item.attrs),
            Item::Mod(item) if !in_tests_only(&item.attrs) => {
                types(item.content.as_ref().map_or(&[], |(_, items)| items), found);
                continue;
            }
            _ => continue,
        };
        if !in_tests_only(attributes) {
            found.push(name.to_string());
        }
    }
}

/// Names of more than one type, and in which files.
fn shared(files: &BTreeMap<String, String>) -> BTreeMap<String, Vec<String>> {
    // A file may define a type twice, each for another set of features.
    let mut owners: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (file, text) in files.iter().filter(|(file, _)| !is_test_file(file)) {
        let parsed = syn::parse_file(text).unwrap_or_else(|error| panic!("{file}: {error}"));
        let mut names = Vec::new();
        types(&parsed.items, &mut names);
        for name in names {
            owners.entry(name).or_default().insert(file.clone());
        }
    }
    owners.retain(|_, files| files.len() > 1);
    owners.into_iter().map(|(name, files)| (name, files.into_iter().collect())).collect()
}

#[test]
fn no_two_types_have_one_name() {
    let files = rust_files(&["src"]);
    assert!(files.len() > 100, "the sources are not where this test looks for them");
    let mut shared = shared(&files);
    for (name, why) in SHARED {
        assert!(
            shared.remove(name.to_owned()).is_some(),
            "{name} is one thing's by now; it was not because: {why}"
        );
    }
    let lines: Vec<_> = shared.iter().map(|(name, files)| format!("{name}: {}", files.join(", "))).collect();
    assert!(lines.is_empty(), "names of several types:\n{}\n", lines.join("\n"));
}

#[test]
fn two_types_of_one_name_are_found() {
    let files = |texts: &[(&str, &str)]| -> BTreeMap<String, String> {
        texts.iter().map(|(name, text)| (format!("src/{name}.rs"), (*text).to_owned())).collect()
    };
    let two = files(&[("a", "pub struct Held;"), ("b/c", "mod d { type Held = u8; }")]);
    assert_eq!(
        shared(&two),
        BTreeMap::from([("Held".to_owned(), vec!["src/a.rs".into(), "src/b/c.rs".into()])])
    );
    // `Item` is no type of its own where a trait asks for it.
    let one = [
        ("a", "enum Held { Room }\nimpl Iterator for Held { type Item = u8; }"),
        ("b", "struct Item;\nstruct Room;\n#[cfg(test)]\nmod tests { struct Held; }"),
        ("c/tests", "trait Held {}"),
    ];
    assert_eq!(shared(&files(&one)), BTreeMap::new());
}
