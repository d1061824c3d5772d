//! Files of a folder import each other in one direction only.

use std::collections::{BTreeMap, BTreeSet};

use super::source::{Source, is_test_file, module_of};
use super::{root, rust_files};

/// Folders whose files, and folders below, import each other in one direction only. The folder's own file is left out: it says
/// what there is.
const WITHOUT_CIRCLES: &[&str] = &[
    "door",
    "client",
    "engine",
    "engine/anywhere",
    "engine/cluster",
    "engine/cluster/membership",
    "engine/config",
    "engine/open",
    "engine/report",
    "engine/stop",
    "engine/upkeep",
    "engine/write",
];

/// What each module of `folder` imports of the others. `files` are paths below `src/`, and texts.
fn imports(folder: &str, files: &BTreeMap<String, String>) -> BTreeMap<String, BTreeSet<String>> {
    let above: Vec<&str> = folder.split('/').collect();
    let mut imports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let within = |path: &[&str]| {
        path.starts_with(&above).then(|| path.get(above.len()).map(|n| (*n).to_owned())).flatten()
    };
    for file in files.keys() {
        imports.extend(within(&module_of(file)).map(|module| (module, BTreeSet::new())));
    }
    for (file, text) in files.iter().filter(|(file, _)| !is_test_file(file)) {
        let Some(module) = within(&module_of(file)) else { continue };
        let source = Source::of(file, text);
        let tests_line = source.tests_line().unwrap_or(usize::MAX);
        let named = source.absolute_paths().into_iter().filter(|(line, _)| *line < tests_line);
        let named = named.filter_map(|(_, path)| within(&path)).filter(|named| *named != module);
        let known: Vec<_> = named.filter(|named| imports.contains_key(named)).collect();
        imports.entry(module).or_default().extend(known);
    }
    imports
}

/// A circle of imports between the modules of a folder, if there is one.
fn circle(folder: &str, files: &BTreeMap<String, String>) -> Option<Vec<String>> {
    let mut imports = imports(folder, files);
    // What imports nothing that is left is in no circle.
    loop {
        let is_free = |named: &BTreeSet<String>| named.iter().all(|named| !imports.contains_key(named));
        let free: Vec<_> =
            imports.iter().filter(|(_, named)| is_free(named)).map(|(name, _)| name.clone()).collect();
        if free.is_empty() {
            break;
        }
        free.iter().for_each(|name| drop(imports.remove(name)));
    }
    let mut path = vec![imports.keys().next()?.clone()];
    loop {
        let last = &imports[path.last()?];
        let next = last.iter().find(|named| imports.contains_key(*named))?.clone();
        let begins = path.iter().position(|seen| *seen == next);
        path.push(next);
        if let Some(begins) = begins {
            return Some(path.split_off(begins));
        }
    }
}

#[test]
fn files_of_a_folder_do_not_import_each_other_in_circles() {
    let files = rust_files(&["src"]);
    assert!(files.len() > 100, "the sources are not where this test looks for them");
    for folder in WITHOUT_CIRCLES {
        assert!(root().join("src").join(folder).is_dir(), "there is no folder {folder}");
        assert!(!imports(folder, &files).is_empty(), "{folder} has no files");
        assert_eq!(circle(folder, &files), None, "in {folder}");
    }
}

#[test]
fn a_circle_of_imports_is_found() {
    let files = |texts: &[(&str, &str)]| -> BTreeMap<String, String> {
        texts.iter().map(|(name, text)| (format!("src/door/{name}.rs"), (*text).to_owned())).collect()
    };
    let straight =
        files(&[("a", "use super::b::X;"), ("b", "use crate::door::c;"), ("c", ""), ("mod", "use a::Y;")]);
    assert_eq!(circle("door", &straight), None);
    let round =
        files(&[("a", "use super::{b, c};"), ("b", "use super::c::X;"), ("c", "use crate::door::{b};")]);
    assert_eq!(circle("door", &round).unwrap(), ["b", "c", "b"]);
    let below = files(&[("a/mod", ""), ("a/x", "use crate::door::{b::Y, self};"), ("b", "use super::a::Z;")]);
    assert_eq!(circle("door", &below).unwrap(), ["a", "b", "a"]);
    let inside = files(&[("a/x", "use super::y::Z;"), ("a/y", "fn f() { crate::door::a::x::g() }")]);
    assert_eq!(circle("door", &inside), None);
    assert_eq!(circle("door/a", &inside).unwrap(), ["x", "y", "x"]);
    let tests = files(&[("a", "use super::b::X;"), ("b", "mod tests {\nuse super::super::a::X;\n}")]);
    assert_eq!(circle("door", &tests), None);
}
