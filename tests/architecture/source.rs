//! Rust source as tokens, without comments and strings, and the paths in it.

/// One word or mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Token {
    Word(String),
    Mark(char),
}

/// Words and marks of Rust source with their lines, without comments, strings and characters.
pub(crate) fn tokens(source: &str) -> Vec<(usize, Token)> {
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

/// A path and the line on which its last word stands.
pub(crate) type Found<'a> = (usize, Vec<&'a str>);

/// The tokens of one file, asked for the paths in it.
pub(crate) struct Source<'a> {
    pub(crate) file: &'a str,
    tokens: Vec<(usize, Token)>,
}

impl<'a> Source<'a> {
    pub(crate) fn of(file: &'a str, text: &str) -> Self {
        Self { file, tokens: tokens(text) }
    }

    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(crate) fn word(&self, at: usize) -> Option<&str> {
        match self.tokens.get(at) {
            Some((_, Token::Word(word))) => Some(word),
            _ => None,
        }
    }

    fn mark(&self, at: usize, mark: char) -> bool {
        self.tokens.get(at).is_some_and(|(_, token)| *token == Token::Mark(mark))
    }

    /// Whether `::` stands at `at`.
    pub(crate) fn joined(&self, at: usize) -> bool {
        self.mark(at, ':') && self.mark(at + 1, ':')
    }

    /// Adds the paths that begin with `before` and go on at `at`: one, or one for each branch of a group in braces. Returns where
    /// they end.
    fn follow<'b>(&'b self, at: usize, before: &[&'b str], found: &mut Vec<Found<'b>>) -> usize {
        if self.mark(at, '{') {
            let mut at = at + 1;
            while at < self.tokens.len() && !self.mark(at, '}') {
                let end = self.follow(at, before, found);
                // What stands between two branches: a comma, a new name, or a star.
                at = end.max(at + 1);
            }
            return at + 1;
        }
        let Some(word) = self.word(at) else { return at };
        if word == "as" {
            return at + 2;
        }
        let path = [before, &[word]].concat();
        match self.joined(at + 1) {
            true if self.word(at + 3).is_some() || self.mark(at + 3, '{') => {
                self.follow(at + 3, &path, found)
            }
            // A star, or the arguments of a type.
            is_joined => {
                found.push((self.tokens[at].0, path));
                at + 1 + if is_joined { 2 } else { 0 }
            }
        }
    }

    /// The words that the paths at `at` begin with: one, or the first of each branch of a group in braces.
    pub(crate) fn branches(&self, at: usize) -> Vec<(usize, &str)> {
        let mut found = Vec::new();
        self.follow(at, &[], &mut found);
        found.into_iter().map(|(line, path)| (line, path[0])).collect()
    }

    /// Paths from the crate's root: those that begin with `crate` or `super`.
    pub(crate) fn absolute_paths(&self) -> Vec<Found<'_>> {
        let module = module_of(self.file);
        let mut found = Vec::new();
        for at in 0..self.tokens.len() {
            let begins_path = at < 2 || !self.joined(at - 2);
            match self.word(at) {
                Some("crate") if self.joined(at + 1) => drop(self.follow(at + 3, &[], &mut found)),
                Some("quorate") if self.file == "src/main.rs" && self.joined(at + 1) => {
                    self.follow(at + 3, &[], &mut found);
                }
                Some("super") if begins_path && self.joined(at + 1) => {
                    let mut supers = 1;
                    let mut end = at + 3;
                    while self.word(end) == Some("super") && self.joined(end + 1) {
                        (supers, end) = (supers + 1, end + 3);
                    }
                    let parent: Vec<_> = module[..module.len().saturating_sub(supers)].to_vec();
                    self.follow(end, &parent, &mut found);
                }
                _ => {}
            }
        }
        found
    }

    /// The line on which the tests begin that end the file.
    pub(crate) fn tests_line(&self) -> Option<usize> {
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
    pub(crate) fn symbols(&self) -> impl Iterator<Item = usize> {
        let names = |token: &Token| matches!(token, Token::Word(word) if ["no_mangle", "export_name"].contains(&word.as_str()));
        self.tokens.iter().filter(move |(_, token)| names(token)).map(|(line, _)| *line)
    }

    /// Names of other crates: the first word of a path, or of an import.
    pub(crate) fn crates(&self) -> Vec<(usize, &str)> {
        let begins_path = |at: usize| at < 2 || !self.joined(at - 2) || self.is_global(at);
        let imported = |at: usize| at > 0 && matches!(self.word(at - 1), Some("use" | "crate"));
        (0..self.tokens.len())
            .filter(|at| begins_path(*at) && (self.joined(at + 1) || imported(*at)))
            .filter_map(|at| self.word(at).map(|word| (self.tokens[at].0, word)))
            .collect()
    }
}

/// The path of the module that a file of `src/` is.
pub(crate) fn module_of(file: &str) -> Vec<&str> {
    let path = file.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    path.split('/').collect()
}

/// Files that are nothing but tests, and are not called so.
const TEST_FILES: &[&str] = &["src/golden.rs"];

/// Whether a file is nothing but tests.
pub(crate) fn is_test_file(file: &str) -> bool {
    file.contains("/tests/") || file.ends_with("/tests.rs") || TEST_FILES.contains(&file)
}

#[test]
fn the_branches_of_a_path_are_found_with_what_stands_before_them() {
    let source = Source::of(
        "src/door/pipeline/answers.rs",
        "use crate::engine::{self, stop::{fatal, hold as h}, write::*};\nuse super::{streams, super::X};\nfn f() { super::super::told::g::<u8>() }",
    );
    let paths: Vec<_> =
        source.absolute_paths().into_iter().map(|(line, path)| (line, path.join("::"))).collect();
    let expected = [
        (1, "engine::self"),
        (1, "engine::stop::fatal"),
        (1, "engine::stop::hold"),
        (1, "engine::write"),
        (2, "door::pipeline::streams"),
        (3, "door::told::g"),
    ];
    for (line, path) in expected {
        assert!(paths.contains(&(line, path.to_owned())), "{path} in {paths:?}");
    }
    assert_eq!(source.branches(0), [(1, "use")]);
}
