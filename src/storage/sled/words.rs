//! What sled's errors say, in words.
//!
//! sled hands its errors around as copies, and a copy of an IO error is the original's debug output, within that of another
//! copy perhaps. Here the error of the operating system is taken out of it again: its number decides what is said, and
//! what can be done about it.

use std::io;

/// The error of the operating system that `error` is, or is a copy of; itself if there is none.
pub(crate) fn io_error(error: io::Error) -> io::Error {
    match copied(&error.to_string()) {
        Some(number) if error.raw_os_error().is_none() => io::Error::from_raw_os_error(number),
        _ => error,
    }
}

/// `error` for people.
pub(crate) fn words(error: &sled::Error) -> String {
    match error {
        sled::Error::Io(error) => match copied(&error.to_string()) {
            Some(number) => io::Error::from_raw_os_error(number).to_string(),
            None => error.to_string(),
        },
        sled::Error::Corruption { .. } => "sled has read what it did not write".to_owned(),
        sled::Error::Unsupported(what) => format!("sled cannot do this: {what}"),
        sled::Error::ReportableBug(what) => format!("sled has met a defect of its own: {what}"),
        sled::Error::CollectionNotFound(name) => {
            format!("sled has no collection {}", String::from_utf8_lossy(name))
        }
    }
}

/// The number in the debug output of an error of the operating system.
fn copied(text: &str) -> Option<i32> {
    let (_, after) = text.split_once("Os { code: ")?;
    after.split_once(',')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_an_error_say_what_the_error_says() {
        let mut error = sled::Error::Io(io::Error::from_raw_os_error(libc::ENOSPC));
        let said = io::Error::from_raw_os_error(libc::ENOSPC).to_string();
        for copies in 0..4 {
            assert_eq!(words(&error), said, "{copies} copies");
            let sled::Error::Io(copy) = error.clone() else { unreachable!() };
            assert_eq!(io_error(copy).raw_os_error(), Some(libc::ENOSPC), "{copies} copies");
            error = error.clone();
        }
        let own = io::Error::new(io::ErrorKind::InvalidData, "not a log");
        assert_eq!(io_error(own).to_string(), "not a log");
        let corrupt = words(&sled::Error::Corruption { at: None, bt: () });
        assert!(!corrupt.contains("None") && !corrupt.contains("()"), "{corrupt}");
    }
}
