//! The snapshot of a key-value machine.
//!
//! ```text
//! version  u32 = 1
//! count    u64
//! count ×  key length u32 · composite key · record length u32 · record
//! hash     u64   the state hash
//! ```
//!
//! Numbers are little-endian; keys ascend strictly. Whoever stores the snapshot adds checksums; the checks
//! here catch a snapshot of something else, and no length is believed before it was compared with its limit.

use std::io::{self, BufReader, BufWriter, Read, Write};

use super::KvView;
use super::key::{MAX_COMPOSITE_BYTES, is_composite};
use super::record::{MAX_RECORD_BYTES, Record, item_hash};

const VERSION: u32 = 1;

/// Size of the buffer between items and the file, in bytes.
const BUFFER_BYTES: usize = 64 * 1024;

pub(super) fn write(view: &KvView, out: &mut dyn Write) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, out);
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&(view.items.len() as u64).to_le_bytes())?;
    for (key, record) in view.items.iter() {
        write_part(&mut out, key)?;
        write_part(&mut out, record.as_bytes())?;
    }
    out.write_all(&view.hash.to_le_bytes())?;
    out.flush()
}

fn write_part(out: &mut impl Write, part: &[u8]) -> io::Result<()> {
    let length = u32::try_from(part.len()).expect("invariant: keys and records keep to their limits");
    out.write_all(&length.to_le_bytes())?;
    out.write_all(part)
}

pub(super) fn read(input: &mut dyn Read) -> io::Result<KvView> {
    let mut input = BufReader::with_capacity(BUFFER_BYTES, input);
    let version = u32::from_le_bytes(read_array(&mut input)?);
    if version != VERSION {
        return Err(invalid(format!("has version {version}, this build reads version {VERSION}")));
    }
    let count = u64::from_le_bytes(read_array(&mut input)?);
    let mut view = KvView::default();
    let (mut key, mut previous, mut record) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..count {
        read_part(&mut input, &mut key, MAX_COMPOSITE_BYTES)?;
        read_part(&mut input, &mut record, MAX_RECORD_BYTES)?;
        if !is_composite(&key) || (number > 0 && key <= previous) {
            return Err(invalid(format!("key {number} is malformed or out of order")));
        }
        let record = Record::from_bytes(&record)
            .ok_or_else(|| invalid(format!("record {number} has {} bytes", record.len())))?;
        view.hash = view.hash.wrapping_add(item_hash(&key, &record));
        view.items.insert(key.as_slice().into(), record);
        std::mem::swap(&mut key, &mut previous);
    }
    if u64::from_le_bytes(read_array(&mut input)?) != view.hash {
        return Err(invalid("items do not add up to the state hash".to_owned()));
    }
    match input.read(&mut [0])? {
        0 => Ok(view),
        _ => Err(invalid("goes on after its end".to_owned())),
    }
}

fn read_part(input: &mut impl Read, part: &mut Vec<u8>, limit: usize) -> io::Result<()> {
    let length = u32::from_le_bytes(read_array(input)?) as usize;
    if length > limit {
        return Err(invalid(format!("holds a part of {length} bytes, more than the limit of {limit}")));
    }
    part.resize(length, 0);
    input.read_exact(part).map_err(end_is_invalid)
}

fn read_array<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes).map_err(end_is_invalid)?;
    Ok(bytes)
}

/// An early end is as invalid as any other wrong byte; real IO errors stay what they are.
fn end_is_invalid(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => invalid("ends early".to_owned()),
        _ => error,
    }
}

fn invalid(detail: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the key-value snapshot {detail}"))
}
