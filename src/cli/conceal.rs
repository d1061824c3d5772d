//! A secret that was given on the command line does not stay there: every user of the machine may read the arguments of every process.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

const FLAG: &str = "--peer-secret";
const VARIABLE: &str = "QUORATE_PEER_SECRET";

/// Replaces this process by the same program, with the secret in its environment instead. Returns where there is none among the
/// arguments. To be called before any thread is started, with arguments that can be parsed, the program's name first.
///
/// # Errors
/// When the process cannot be replaced.
pub fn conceal(args: &[OsString]) -> io::Result<()> {
    let Some((rest, secret)) = without_secret(args) else { return Ok(()) };
    let mut program = Command::new(std::env::current_exe()?);
    if let Some(name) = args.first() {
        program.arg0(name);
    }
    Err(program.args(&rest).env(VARIABLE, secret).exec())
}

/// The arguments behind the program's name without the secret, and the secret.
fn without_secret(args: &[OsString]) -> Option<(Vec<OsString>, OsString)> {
    let joined = [FLAG.as_bytes(), b"="].concat();
    let (mut rest, mut secret) = (Vec::new(), None);
    let mut left = args.iter().skip(1);
    while let Some(arg) = left.next() {
        if arg == OsStr::new("--") {
            rest.push(arg.clone());
            break;
        } else if arg == OsStr::new(FLAG) {
            secret = left.next().cloned().or(secret);
        } else if let Some(value) = arg.as_bytes().strip_prefix(&joined[..]) {
            secret = Some(OsString::from_vec(value.to_vec()));
        } else {
            rest.push(arg.clone());
        }
    }
    rest.extend(left.cloned());
    secret.map(|secret| (rest, secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(args: &[&str]) -> Option<(Vec<String>, String)> {
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        let text = |text: OsString| text.into_string().unwrap();
        without_secret(&args).map(|(rest, secret)| (rest.into_iter().map(text).collect(), text(secret)))
    }

    #[test]
    fn the_secret_is_cut_out_and_nothing_else() {
        let rest = || vec!["serve".to_owned(), "--single".to_owned()];
        let expected = Some((rest(), "s3cret".to_owned()));
        assert_eq!(cut(&["quorate", "serve", "--peer-secret", "s3cret", "--single"]), expected);
        assert_eq!(cut(&["quorate", "serve", "--single", "--peer-secret=s3cret"]), expected);
        assert_eq!(cut(&["quorate", "serve", "--peer-secret-file", "f"]), None);
        assert_eq!(cut(&["quorate", "put", "--", "--peer-secret", "v"]), None);
        assert_eq!(cut(&["quorate", "serve"]), None);
    }
}
