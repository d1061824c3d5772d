//! What the guides show of code is code that is run: each block is a piece of an example, or of these tests.

use std::fs;
use std::path::Path;

/// The lines of a text, without those that are empty and without what they are indented by.
fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect()
}

/// The blocks of Rust in a guide.
fn blocks(guide: &str) -> Vec<Vec<&str>> {
    let begun = guide.split("```rust\n").skip(1);
    begun.map(|rest| lines(rest.split("```").next().unwrap())).collect()
}

fn is_part_of(block: &[&str], code: &[&str]) -> bool {
    !block.is_empty() && code.windows(block.len()).any(|window| window == block)
}

#[test]
fn guides_show_pieces_of_what_is_run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut code = Vec::new();
    for dir in ["docs/examples", "tests/examples", "tests/simulation"] {
        let files = fs::read_dir(root.join(dir)).unwrap().map(|entry| entry.unwrap().path());
        let sources = files.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
        code.extend(sources.map(|path| fs::read_to_string(path).unwrap()));
    }
    let guide = "docs/EMBEDDING.md";
    let text = fs::read_to_string(root.join(guide)).unwrap();
    let blocks = blocks(&text);
    assert!(blocks.len() >= 10, "{guide} has {} blocks of code", blocks.len());
    for block in blocks {
        let is_run = code.iter().any(|code| is_part_of(&block, &lines(code)));
        assert!(is_run, "{guide} shows what is run nowhere:\n{}", block.join("\n"));
    }
}

#[test]
fn what_is_run_nowhere_is_found() {
    let guide =
        "A\n```rust\nlet a = 1;\n\n    let b = 2;\n```\nB\n```sh\nls\n```\n```rust\nlet c = 3;\n```\n";
    let blocks = blocks(guide);
    assert_eq!(blocks, [vec!["let a = 1;", "let b = 2;"], vec!["let c = 3;"]]);
    let code = lines("fn f() {\n    let a = 1;\n    let b = 2;\n}\n");
    assert!(is_part_of(&blocks[0], &code) && !is_part_of(&blocks[1], &code));
    assert!(!is_part_of(&[], &code), "nothing is no piece of code");
}
