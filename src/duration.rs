//! Times as people write them: `500ms`, `10s`, `1h30m`, `7d`. One grammar for every flag and setting.
//!
//! A time is one or more numbers, each with its unit, and is their sum. A single number may go without: then it is in
//! the unit that the flag is documented in. Nothing is rounded but what is below a nanosecond.

use std::time::Duration;

/// What a time may be made of, the longest first.
const FORM: &str = "write a time with its unit, such as 500ms, 10s, 2m, 1h30m, 7d or 2w";

const SECOND_NS: u128 = 1_000_000_000;

/// Units by their names, in nanoseconds.
const UNITS: [(&str, u128); 6] = [
    ("ms", 1_000_000),
    ("s", SECOND_NS),
    ("m", 60 * SECOND_NS),
    ("h", 3600 * SECOND_NS),
    ("d", 24 * 3600 * SECOND_NS),
    ("w", 7 * 24 * 3600 * SECOND_NS),
];

/// The longest time: as many milliseconds as the store, and the protocol, can hold.
const LONGEST_NS: u128 = u64::MAX as u128 * 1_000_000;

/// A time longer than zero; a bare number is seconds.
///
/// # Errors
/// In words, when it is none.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    match parse_in(text, SECOND_NS)? {
        Duration::ZERO => Err("the time must be longer than zero".to_owned()),
        time => Ok(time),
    }
}

/// A time in whole seconds, at most `u32::MAX` of them; a bare number is seconds.
///
/// # Errors
/// In words, when it is none.
pub(crate) fn parse_seconds(text: &str) -> Result<u32, String> {
    let time = parse_in(text, SECOND_NS)?;
    match (u32::try_from(time.as_secs()), time.subsec_nanos()) {
        (Ok(seconds), 0) => Ok(seconds),
        (_, 0) => Err(format!("at most {} seconds can be given", u32::MAX)),
        _ => Err("only whole seconds can be given".to_owned()),
    }
}

/// A time in whole milliseconds; a bare number is milliseconds.
///
/// # Errors
/// In words, when it is none.
pub(crate) fn parse_ms(text: &str) -> Result<u64, String> {
    let time = parse_in(text, 1_000_000)?;
    match time.subsec_nanos() % 1_000_000 {
        0 => u64::try_from(time.as_millis()).map_err(|_| too_long()),
        _ => Err("only whole milliseconds can be given".to_owned()),
    }
}

/// The sum of the parts of `text`; a single number without a unit is in units of `bare_ns`.
fn parse_in(text: &str, bare_ns: u128) -> Result<Duration, String> {
    let mut rest = text.trim();
    let mut total_ns: u128 = 0;
    let mut parts = 0;
    while !rest.is_empty() {
        let (number, after) = rest.split_at(end_of(rest, |c| c.is_ascii_digit() || c == '.'));
        let (unit, after) = after.split_at(end_of(after, |c| c.is_ascii_alphabetic()));
        parts += 1;
        let unit_ns = match UNITS.iter().find(|(name, _)| *name == unit) {
            Some((_, unit_ns)) => *unit_ns,
            None if unit.is_empty() && after.is_empty() && parts == 1 => bare_ns,
            None => return Err(FORM.to_owned()),
        };
        total_ns = total_ns.checked_add(nanoseconds(number, unit_ns)?).ok_or_else(too_long)?;
        rest = after.trim_start();
    }
    if parts == 0 {
        return Err(FORM.to_owned());
    }
    if total_ns > LONGEST_NS {
        return Err(too_long());
    }
    let (seconds, nanoseconds) = (total_ns / SECOND_NS, total_ns % SECOND_NS);
    Ok(Duration::new(u64::try_from(seconds).map_err(|_| too_long())?, nanoseconds as u32))
}

/// Where what `belongs` at the beginning of `text` ends.
fn end_of(text: &str, belongs: impl Fn(char) -> bool) -> usize {
    text.find(|c| !belongs(c)).unwrap_or(text.len())
}

/// `number`, which may have a fraction, times `unit_ns`.
fn nanoseconds(number: &str, unit_ns: u128) -> Result<u128, String> {
    /// More digits of a fraction say nothing about a nanosecond of the longest unit.
    const FRACTION_DIGITS: usize = 18;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || number.ends_with('.') {
        return Err(FORM.to_owned());
    }
    let whole: u128 = whole.parse().map_err(|_| too_long())?;
    let mut total_ns = whole.checked_mul(unit_ns).ok_or_else(too_long)?;
    let mut tenth_ns = unit_ns * 10_u128.pow(17);
    let mut fraction_ns = 0;
    for digit in fraction.chars().take(FRACTION_DIGITS) {
        fraction_ns += u128::from(digit.to_digit(10).unwrap_or(0)) * tenth_ns;
        tenth_ns /= 10;
    }
    total_ns = total_ns.checked_add(fraction_ns / 10_u128.pow(18)).ok_or_else(too_long)?;
    Ok(total_ns)
}

fn too_long() -> String {
    format!("the time is longer than {} ms, the longest that can be kept", u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_the_usual_units_and_add_up() {
        for (text, ms) in [
            ("500ms", 500),
            ("10s", 10_000),
            ("10", 10_000),
            ("1.5", 1_500),
            ("0.25s", 250),
            ("2m", 120_000),
            ("2h", 7_200_000),
            ("1h30m", 5_400_000),
            ("1h 30m", 5_400_000),
            ("7d", 604_800_000),
            ("2w", 1_209_600_000),
            ("1w2d3h4m5s6ms", 604_800_000 + 172_800_000 + 10_800_000 + 240_000 + 5_006),
            ("1.5d", 129_600_000),
            ("400d", 34_560_000_000),
            (" 3s ", 3_000),
            ("18446744073709551615ms", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        assert_eq!(parse("0.0015ms"), Ok(Duration::from_nanos(1_500)));
        assert_eq!(parse("0.1s").unwrap() * 3, Duration::from_millis(300), "no binary fractions");
    }

    #[test]
    fn what_is_no_time_is_refused_in_words() {
        for text in [
            "",
            " ",
            "s",
            "ms",
            "1x",
            "1hm",
            "h1",
            "1h30",
            "30 1h",
            "-1s",
            "+1s",
            "1.s",
            ".5s",
            "1.2.3s",
            "1e3s",
            "5 parsecs",
            "inf",
            "NaN",
            "1S",
            "١s",
            "1h,30m",
        ] {
            assert_eq!(parse(text), Err(FORM.to_owned()), "{text}");
        }
        assert_eq!(parse("0s").unwrap_err(), "the time must be longer than zero");
        for text in ["18446744073709551616ms", "99999999999999999999999999999999999999999w", "30500568905w"] {
            assert!(parse(text).unwrap_err().contains("longer than 18446744073709551615 ms"), "{text}");
        }
    }

    #[test]
    fn a_bare_number_is_in_the_unit_of_its_flag() {
        assert_eq!((parse_ms("250"), parse_ms("2s"), parse_ms("0")), (Ok(250), Ok(2_000), Ok(0)));
        assert_eq!(parse_ms("1.5s"), Ok(1_500));
        assert!(parse_ms("0.5").is_err() && parse_ms("-1").is_err());
        assert_eq!(
            (parse_seconds("90"), parse_seconds("1m30s"), parse_seconds("0")),
            (Ok(90), Ok(90), Ok(0))
        );
        assert!(parse_seconds("1500ms").is_err() && parse_seconds("200000w").is_err());
    }
}
