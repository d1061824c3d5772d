//! What the pages in `docs/` name is there: pages and headings that they link to, files, tests, constants. A page that tells of a
//! protocol says where the code keeps it, and is wrong as soon as that has gone elsewhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The map of the code is to be read at once.
const MAP_LINES: usize = 130;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `dir` with this extension, by their paths from the root.
fn files(dir: &str, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(root().join(dir)).unwrap() {
        let path = entry.unwrap().path();
        let inside = path.strip_prefix(root()).unwrap().to_path_buf();
        if path.is_dir() {
            files(inside.to_str().unwrap(), extension, found);
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(inside);
        }
    }
}

/// The name by which a heading can be linked to.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn anchors(page: &str) -> BTreeSet<String> {
    let mut is_code = false;
    let mut found = BTreeSet::new();
    for line in page.lines() {
        is_code ^= line.starts_with("```");
        if !is_code && line.starts_with('#') {
            found.insert(anchor(line.trim_start_matches('#').trim()));
        }
    }
    found
}

/// Where the links of a page lead, but for those to other places.
fn links(page: &str) -> impl Iterator<Item = &str> {
    let targets = page.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets.filter(|target| !target.starts_with("http") && !target.contains(char::is_whitespace))
}

/// What stands between backticks on one line.
fn names(page: &str) -> impl Iterator<Item = &str> {
    let lines = page.lines().filter(|line| !line.starts_with("```"));
    lines.flat_map(|line| line.split('`').skip(1).step_by(2))
}

fn is_file(name: &str) -> bool {
    let extensions = [".rs", ".proto", ".toml", ".md", ".txt", ".recording"];
    name.contains('/')
        && extensions.iter().any(|extension| name.ends_with(extension))
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
}

/// A name of a test says what it tests, in words.
fn is_test(name: &str) -> bool {
    const WORDS: usize = 5;
    name.split('_').count() >= WORDS
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn is_constant(name: &str) -> bool {
    name.contains('_') && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
}

/// What `name` is not, if it is to be something in the code.
fn missing(name: &str, code: &str) -> Option<&'static str> {
    let exists = |path: &str| root().join(path).exists() || root().join("src").join(path).exists();
    if is_file(name) {
        return (!exists(name)).then_some("no such file");
    }
    if is_test(name) {
        return (!code.contains(&format!("fn {name}("))).then_some("no such test");
    }
    (is_constant(name) && !code.contains(name)).then_some("no such constant or reason")
}

#[test]
fn links_lead_somewhere() {
    let mut pages = Vec::new();
    files("docs", "md", &mut pages);
    pages.extend(["README.md", "CHANGELOG.md"].map(PathBuf::from));
    assert!(pages.len() > 20, "the pages are not where this test looks for them");
    let mut dead = Vec::new();
    for page in &pages {
        let text = fs::read_to_string(root().join(page)).unwrap();
        for link in links(&text) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => root().join(page),
                file => root().join(page).parent().unwrap().join(file),
            };
            let is_alive = match (target.exists(), heading) {
                (exists, "") => exists,
                (exists, heading) => {
                    exists && anchors(&fs::read_to_string(&target).unwrap()).contains(heading)
                }
            };
            if !is_alive {
                dead.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(dead.is_empty(), "links that lead nowhere:\n{}", dead.join("\n"));
}

#[test]
fn pages_of_protocols_name_what_is_there() {
    let mut sources = Vec::new();
    for dir in ["src", "tests", "jepsen"] {
        files(dir, "rs", &mut sources);
    }
    let code: String = sources.iter().map(|file| fs::read_to_string(root().join(file)).unwrap()).collect();
    let mut pages = vec![PathBuf::from("docs/ARCHITECTURE.md")];
    files("docs/design", "md", &mut pages);
    assert!(pages.len() > 10, "the pages are not where this test looks for them");
    let mut wrong = Vec::new();
    for page in pages {
        let text = fs::read_to_string(root().join(&page)).unwrap();
        let found = names(&text).filter_map(|name| missing(name, &code).map(|why| (name, why)));
        wrong.extend(found.map(|(name, why)| format!("{}: {name}: {why}", page.display())));
    }
    assert!(wrong.is_empty(), "what pages name and is not there:\n{}", wrong.join("\n"));
}

#[test]
fn the_map_is_short() {
    let map = fs::read_to_string(root().join("docs/ARCHITECTURE.md")).unwrap();
    let lines = map.lines().count();
    assert!(
        lines <= MAP_LINES,
        "docs/ARCHITECTURE.md has {lines} lines: what it tells of one protocol is that protocol's page"
    );
}

#[test]
fn what_is_not_there_is_found() {
    let page = "# A `b/c` of D\nSee [x](y.md#z), [w](https://example.com) and `src/gone.rs`.\n```text\n# no heading\n```\n";
    assert_eq!(links(page).collect::<Vec<_>>(), ["y.md#z"]);
    assert_eq!(anchors(page), BTreeSet::from(["a-bc-of-d".to_owned()]));
    assert_eq!(names(page).collect::<Vec<_>>(), ["b/c", "src/gone.rs"]);
    let code = "const MOST_CALLS: usize = 1;\nfn a_test_with_many_words() {}";
    assert_eq!(missing("src/gone.rs", code), Some("no such file"));
    assert_eq!(missing("engine/mod.rs", code), None);
    assert_eq!(missing("a_test_with_many_words", code), None);
    assert_eq!(missing("a_test_with_other_words", code), Some("no such test"));
    assert_eq!(missing("MOST_CALLS", code), None);
    assert_eq!(missing("LEAST_CALLS", code), Some("no such constant or reason"));
    assert_eq!(missing("max_connection_unsent_bytes", code), None, "a setting");
}
