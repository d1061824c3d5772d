//! The snapshot of a key-value machine.
//!
//! ```text
//! version  u32 = 2
//! next     u64   the revision that follows the last command applied; 0 if there was none or it is not known
//! count    u64
//! count ×  key length u32 · composite key · record length u32 · record
//! seal     u64   XXH3 of the 8 bytes of `next`, seeded with the state hash
//! ```
//!
//! Version 1, which is still read, has records without expiry, no `next`, and the sum of its records' hashes
//! in place of the seal.
//!
//! Numbers are little-endian; keys ascend strictly. `next` was where the history of older versions went
//! on, and is kept for them to read. Whoever stores the snapshot adds checksums; the checks
//! here catch a snapshot of something else, and no length is believed before it was compared with its limit.

use std::io::{self, BufReader, BufWriter, Read, Write};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::KvView;
use super::composite::CompositeKey;
use super::items::Items;
use super::key::{MAX_COMPOSITE_BYTES, is_composite};
use super::record::{ItemRecord, MAX_RECORD_BYTES, item_hash};

/// What this build writes.
const VERSION: u32 = 2;

/// Size of the buffer between items and the file, in bytes.
const BUFFER_BYTES: usize = 64 * 1024;

pub(super) fn write(view: &KvView, out: &mut dyn Write) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, out);
    let next_revision = view.next_revision;
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&next_revision.to_le_bytes())?;
    out.write_all(&(view.items.len() as u64).to_le_bytes())?;
    for (key, record) in view.items.iter() {
        write_part(&mut out, key)?;
        write_part(&mut out, record.as_bytes())?;
    }
    out.write_all(&seal(next_revision, view.items.hash()).to_le_bytes())?;
    out.flush()
}

fn seal(next_revision: u64, state_hash: u64) -> u64 {
    xxh3_64_with_seed(&next_revision.to_le_bytes(), state_hash)
}

fn write_part(out: &mut impl Write, part: &[u8]) -> io::Result<()> {
    let length = u32::try_from(part.len()).expect("invariant: keys and records keep to their limits");
    out.write_all(&length.to_le_bytes())?;
    out.write_all(part)
}

pub(super) fn read(input: &mut dyn Read) -> io::Result<KvView> {
    let mut input = BufReader::with_capacity(BUFFER_BYTES, input);
    let view = match u32::from_le_bytes(read_array(&mut input)?) {
        1 => read_v1(&mut input)?,
        VERSION => read_v2(&mut input)?,
        version => {
            return Err(invalid(format!("has version {version}, this build reads up to version {VERSION}")));
        }
    };
    match input.read(&mut [0])? {
        0 => Ok(view),
        _ => Err(invalid("goes on after its end".to_owned())),
    }
}

fn read_v2(input: &mut impl Read) -> io::Result<KvView> {
    let next_revision = u64::from_le_bytes(read_array(input)?);
    let items = read_items(input, |_, record| ItemRecord::from_bytes(record))?;
    if u64::from_le_bytes(read_array(input)?) != seal(next_revision, items.hash()) {
        return Err(invalid("does not add up to its seal".to_owned()));
    }
    Ok(KvView { items, next_revision, changes: Vec::new() })
}

fn read_v1(input: &mut impl Read) -> io::Result<KvView> {
    let mut hash = 0_u64;
    let items = read_items(input, |key, record| {
        hash = hash.wrapping_add(item_hash(key, record));
        ItemRecord::from_bytes_v1(record)
    })?;
    if u64::from_le_bytes(read_array(input)?) != hash {
        return Err(invalid("items do not add up to the state hash".to_owned()));
    }
    Ok(KvView { items, next_revision: 0, changes: Vec::new() })
}

/// Reads count and items; `decode` takes the key and the bytes of a record.
fn read_items(
    input: &mut impl Read,
    mut decode: impl FnMut(&[u8], &[u8]) -> Option<ItemRecord>,
) -> io::Result<Items> {
    let count = u64::from_le_bytes(read_array(input)?);
    let mut items = Items::default();
    let (mut key, mut previous, mut record) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..count {
        read_part(input, &mut key, MAX_COMPOSITE_BYTES)?;
        read_part(input, &mut record, MAX_RECORD_BYTES)?;
        if !is_composite(&key) || (number > 0 && key <= previous) {
            return Err(invalid(format!("key {number} is malformed or out of order")));
        }
        let record = decode(&key, &record)
            .ok_or_else(|| invalid(format!("record {number} has {} bytes", record.len())))?;
        items.restore(CompositeKey::concat(&[&key]), record);
        std::mem::swap(&mut key, &mut previous);
    }
    Ok(items)
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
