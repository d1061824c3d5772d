//! What other threads than the writer ask of sled.

use std::io::{self, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use crate::runtime::panic_message;
use crate::storage::durable_log::{Collected, LogReader, Scanned};

use super::disk::{Trees, blobs};
use super::scan::{Scan, ScanError};
use super::words;

/// Reads what the writer has flushed.
pub(crate) struct Reader {
    pub(crate) trees: Trees,
    pub(crate) directory: PathBuf,
}

impl LogReader for Reader {
    fn read(&self, (start, end): (u64, u64), collected: &mut Collected) -> io::Result<Scanned> {
        let directory = self.directory.display();
        let invalid = |detail: String| {
            io::Error::new(ErrorKind::InvalidData, format!("the log in {directory}: {detail}"))
        };
        let mut next = start;
        let mut walk = || -> Result<Scanned, ScanError> {
            for run in Scan::from(&self.trees.log, start)? {
                for entry in run?.entries.into_iter().skip_while(|entry| entry.log_id.index < start) {
                    if entry.log_id.index != next {
                        return Ok(Scanned::All);
                    }
                    if !collected.push(entry) {
                        return Ok(Scanned::Full);
                    }
                    next += 1;
                    if next == end {
                        return Ok(Scanned::All);
                    }
                }
            }
            Ok(Scanned::All)
        };
        match catch_unwind(AssertUnwindSafe(&mut walk)) {
            Ok(Ok(Scanned::All)) if next < end => Err(invalid(format!("entry {next} is missing"))),
            Ok(Ok(scanned)) => Ok(scanned),
            Ok(Err(ScanError::Sled(sled::Error::Io(error)))) => {
                let error = words::io_error(error);
                let message = format!("the log in {directory} cannot be read: {error}");
                Err(io::Error::new(error.kind(), message))
            }
            Ok(Err(error)) => Err(invalid(error.to_string())),
            Err(panic) => Err(invalid(format!("sled panicked: {}", panic_message(&*panic)))),
        }
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        /// What `st_blocks` counts, whatever the file system's own blocks are.
        const BLOCK_BYTES: u64 = 512;
        let mut bytes = 0;
        for directory in [self.directory.clone(), blobs(&self.directory)] {
            for file in std::fs::read_dir(directory)? {
                match file?.metadata() {
                    Ok(metadata) => bytes += metadata.blocks() * BLOCK_BYTES,
                    Err(error) if error.kind() == ErrorKind::NotFound => {} // sled removed it meanwhile
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(bytes)
    }
}
