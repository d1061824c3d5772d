//! For tests: compares a text with a file in `tests/golden`.
//!
//! What such files hold is known to programs that other people wrote. Whoever means to change it sets `QUORATE_GOLDEN=write`,
//! and looks at the difference.

/// # Panics
/// When `text` is not what the file holds.
pub(crate) fn golden(name: &str, text: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("QUORATE_GOLDEN").is_some() {
        std::fs::write(&path, text).expect("a file that can be written");
    }
    let expected = std::fs::read_to_string(&path).expect("a file that can be read");
    assert!(text == expected, "{name} is not as it was:\n{text}");
}

/// Runs the scripts of `tests/golden/scripts/<room>`, each on what `begin` makes. What a script's commands answer stands below
/// them, and is compared; `UPDATE_GOLDENFILES=1` writes it.
///
/// # Panics
/// When an answer is another one, or there is no script.
pub(crate) fn scripts<R: goldenscript::Runner>(room: &str, begin: impl Fn() -> R) {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/scripts").join(room);
    let entries = std::fs::read_dir(&dir).expect("a directory of scripts");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("a readable directory").path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} holds no script", dir.display());
    for path in paths {
        if let Err(error) = goldenscript::run(&mut begin(), &path) {
            panic!("{}: {error}", path.display());
        }
    }
}

/// The outcome of a command of a script.
pub(crate) type Told = Result<String, Box<dyn std::error::Error>>;
