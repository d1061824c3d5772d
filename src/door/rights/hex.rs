//! Hashes as people write them.

/// The bytes that 64 hexadecimal digits stand for.
pub(super) fn decode(text: &str) -> Option<[u8; 32]> {
    let text = text.as_bytes();
    let mut bytes = [0; 32];
    if text.len() != 2 * bytes.len() {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    for (byte, digits) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        let value = digit(digits[0])? * 16 + digit(digits[1])?;
        *byte = u8::try_from(value).ok()?;
    }
    Some(bytes)
}

/// The digits of `bytes`.
pub(super) fn encode(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}
