//! A file or a function that is too long wants splitting by concept.

use std::collections::BTreeMap;

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use super::names::in_tests_only;
use super::rooms::Violation;
use super::rust_files;
use super::source::is_test_file;

/// Most lines of a file, tests included.
const FILE_LINES: usize = 600;
/// Most lines of a function, from its signature to its closing brace. The rule is for what is shipped: a test may be a long table of
/// cases.
const FUNCTION_LINES: usize = 70;

fn long_file(file: &str, text: &str) -> Option<Violation> {
    let lines = text.lines().count();
    (lines > FILE_LINES).then(|| Violation {
        file: file.to_owned(),
        line: FILE_LINES,
        rule: format!("{lines} lines, more than {FILE_LINES}: split it by concept"),
    })
}

/// The functions of one file, by name: the line of the signature, and how many lines there are.
#[derive(Default)]
struct Functions(Vec<(String, usize, usize)>);

impl Functions {
    fn add(&mut self, signature: &syn::Signature, block: &syn::Block) {
        let (first, last) = (signature.span().start().line, block.span().end().line);
        self.0.push((signature.ident.to_string(), first, last + 1 - first));
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.add(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.add(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !in_tests_only(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.add(&item.sig, block);
        }
        visit::visit_trait_item_fn(self, item);
    }
}

fn long_functions(file: &str, text: &str) -> Vec<Violation> {
    let mut functions = Functions::default();
    functions.visit_file(&syn::parse_file(text).unwrap_or_else(|error| panic!("{file}: {error}")));
    let is_long = |(_, _, lines): &(String, usize, usize)| *lines > FUNCTION_LINES;
    let told = |(name, line, lines)| {
        let rule = format!("{name} has {lines} lines, more than {FUNCTION_LINES}: split it by concept");
        Violation { file: file.to_owned(), line, rule }
    };
    functions.0.into_iter().filter(is_long).map(told).collect()
}

#[test]
fn no_file_and_no_function_is_too_long() {
    let files: BTreeMap<String, String> = rust_files(&["src", "tests", "cluster", "jepsen", "docs"]);
    assert!(files.len() > 100, "the sources are not where this test looks for them");
    let mut broken = Vec::new();
    for (file, text) in &files {
        broken.extend(long_file(file, text));
        let is_shipped = ["src/", "cluster/src/", "jepsen/"].iter().any(|dir| file.starts_with(dir));
        if is_shipped && !is_test_file(file) {
            broken.extend(long_functions(file, text));
        }
    }
    let lines: Vec<_> = broken.iter().map(Violation::to_string).collect();
    assert!(lines.is_empty(), "\n{}\n", lines.join("\n"));
}

#[test]
fn a_long_file_is_found() {
    assert!(long_file("src/x.rs", &"\n".repeat(FILE_LINES)).is_none());
    assert!(long_file("src/x.rs", &"\n".repeat(FILE_LINES + 1)).is_some());
}

#[test]
fn a_long_function_is_found_wherever_it_stands() {
    let body = |lines: usize| format!("{{\n{}}}", "f();\n".repeat(lines - 2));
    let (fits, long) = (body(FUNCTION_LINES), body(FUNCTION_LINES + 1));
    let lines =
        |text: &str| long_functions("src/x.rs", text).iter().map(|found| found.line).collect::<Vec<_>>();
    assert_eq!(lines(&format!("/// Docs.\n#[inline]\nfn g() {fits}")), [0; 0]);
    assert_eq!(lines(&format!("/// Docs.\n#[inline]\nfn g() {long}")), [3]);
    assert_eq!(
        lines(&format!("impl X {{\nasync fn g() {long}\n}}\ntrait Y {{\nfn g();\nfn h() {fits}\n}}")),
        [2]
    );
    assert_eq!(
        lines(&format!("mod m {{\nfn g() {long}\n}}\n#[cfg(test)]\nmod tests {{\nfn g() {long}\n}}")),
        [2]
    );
}
