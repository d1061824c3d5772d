//! What the standard error of a node leads to.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, PipeReader, Write};
use std::process::Stdio;
use std::str::FromStr;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// What becomes of what a node writes to its standard error. All but the first are for tests: a node must not suffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Stderr {
    /// It is appended to the node's output.
    #[default]
    Output,
    /// It goes into a pipe that nobody reads any more: writing fails.
    NoReader,
    /// It goes into a full pipe whose reader does not read: writing does not come back.
    Unread,
    /// It goes to a disk without room: writing fails.
    FullDisk,
}

impl FromStr for Stderr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "output" => Ok(Self::Output),
            "no-reader" => Ok(Self::NoReader),
            "unread" => Ok(Self::Unread),
            "full-disk" => Ok(Self::FullDisk),
            _ => Err(format!("\"{text}\" is none of output, no-reader, unread, full-disk")),
        }
    }
}

/// For the process, and what must live as long as it.
pub(crate) struct Opened {
    pub(crate) stdio: Stdio,
    pub(crate) reader: Option<PipeReader>,
}

impl Stderr {
    /// Opens it; `output` is the node's.
    pub(crate) fn open(self, output: File) -> io::Result<Opened> {
        let without_reader = |stdio: Stdio| Opened { stdio, reader: None };
        match self {
            Self::Output => Ok(without_reader(output.into())),
            Self::FullDisk => Ok(without_reader(OpenOptions::new().write(true).open("/dev/full")?.into())),
            Self::NoReader => Ok(without_reader(io::pipe()?.1.into())),
            Self::Unread => {
                let (reader, mut writer) = io::pipe()?;
                let flags = fcntl_getfl(&writer)?;
                fcntl_setfl(&writer, flags | OFlags::NONBLOCK)?;
                // As much as it holds. What is left then may be less than a page.
                for bytes in [4096, 1] {
                    loop {
                        match writer.write(&vec![b'.'; bytes]) {
                            Ok(_) => {}
                            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                            Err(error) => return Err(error),
                        }
                    }
                }
                fcntl_setfl(&writer, flags)?;
                Ok(Opened { stdio: writer.into(), reader: Some(reader) })
            }
        }
    }
}
