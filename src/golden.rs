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
