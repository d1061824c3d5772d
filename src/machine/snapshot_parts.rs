//! The parts of a snapshot, one for each machine.
//!
//! The part of a machine that is alone is the snapshot as that machine writes it. Where there are several, each is cut into pieces, so that a
//! machine may read to the end of its part and no further:
//!
//! | bytes | |
//! |---|---|
//! | 4 | length of a piece, 1 to 65 536, little-endian |
//! | | the piece; any number of those |
//! | 4 | zero: the end of the part |

use std::io::{self, ErrorKind, Read, Write};

use crate::types::MachineVersion;

/// No piece is longer.
const PIECE_BYTES: usize = 64 * 1024;

/// Writes one part of several with `write`.
///
/// # Errors
/// What `out` and `write` return.
pub(super) fn write_part(
    out: &mut dyn Write,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut pieces = PieceWriter { out, piece: Vec::with_capacity(PIECE_BYTES) };
    write(&mut pieces)?;
    pieces.end_piece()?;
    pieces.out.write_all(&0_u32.to_le_bytes())
}

/// Cuts what is written into pieces.
struct PieceWriter<'a> {
    out: &'a mut dyn Write,
    piece: Vec<u8>,
}

impl PieceWriter<'_> {
    fn end_piece(&mut self) -> io::Result<()> {
        if !self.piece.is_empty() {
            let length = u32::try_from(self.piece.len()).expect("invariant: a piece is at most 64 KiB");
            self.out.write_all(&length.to_le_bytes())?;
            self.out.write_all(&self.piece)?;
            self.piece.clear();
        }
        Ok(())
    }
}

impl Write for PieceWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(PIECE_BYTES - self.piece.len());
        self.piece.extend_from_slice(&bytes[..taken]);
        if self.piece.len() == PIECE_BYTES {
            self.end_piece()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A snapshot that is read part by part, in the order of their numbers.
pub struct SnapshotParts<'a> {
    input: &'a mut dyn Read,
    /// Those that follow.
    parts: &'a [MachineVersion],
    /// Whether they are cut into pieces.
    are_cut: bool,
}

impl std::fmt::Debug for SnapshotParts<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnapshotParts").field("parts", &self.parts).finish_non_exhaustive()
    }
}

impl<'a> SnapshotParts<'a> {
    /// What `parts` have written, as the snapshot says; none of them for [one that is alone](MachineVersion::FIRST).
    pub fn new(parts: &'a [MachineVersion], input: &'a mut dyn Read) -> Self {
        const ALONE: &[MachineVersion] = &[MachineVersion::FIRST];
        let parts = if parts.is_empty() { ALONE } else { parts };
        Self { input, are_cut: parts.len() > 1, parts }
    }

    /// Reads the part of the machine with this `number` with `read`, which is given the version that wrote it; `None` if the
    /// snapshot was taken before there was such a machine.
    ///
    /// # Errors
    /// What `read` returns; [`ErrorKind::InvalidData`] if the part is not whole.
    pub fn read<T>(
        &mut self,
        number: u16,
        read: impl FnOnce(u32, &mut dyn Read) -> io::Result<T>,
    ) -> io::Result<Option<T>> {
        let Some((part, rest)) = self.parts.split_first().filter(|(part, _)| part.machine == number) else {
            return Ok(None);
        };
        self.parts = rest;
        if !self.are_cut {
            return read(part.version, &mut *self.input).map(Some);
        }
        let mut input = Part { input: &mut *self.input, left: 0, is_at_end: false };
        let value = read(part.version, &mut input)?;
        // What it left unread is not the next one's.
        io::copy(&mut input, &mut io::sink())?;
        Ok(Some(value))
    }

    /// Whether all of them were read.
    pub fn are_read(&self) -> bool {
        self.parts.is_empty()
    }
}

/// Puts the pieces of one part together.
struct Part<'a> {
    input: &'a mut dyn Read,
    /// What is left of the present piece.
    left: usize,
    is_at_end: bool,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || self.is_at_end {
            return Ok(0);
        }
        if self.left == 0 {
            let mut length = [0; 4];
            self.input.read_exact(&mut length)?;
            self.left = u32::from_le_bytes(length) as usize;
            if self.left > PIECE_BYTES {
                return Err(io::Error::new(ErrorKind::InvalidData, "a piece of a part is too long"));
            }
            if self.left == 0 {
                self.is_at_end = true;
                return Ok(0);
            }
        }
        let wanted = self.left.min(buffer.len());
        let read = self.input.read(&mut buffer[..wanted])?;
        if read == 0 {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "a part of the snapshot ends too early"));
        }
        self.left -= read;
        Ok(read)
    }
}
