use serde::de::DeserializeOwned;

use super::*;
use crate::machine;

fn seal<C: Serialize>(
    reading: Reading,
    command: &C,
    slot: Option<SessionSlot>,
) -> Result<Bytes, bincode::error::EncodeError> {
    seal_as(MachineVersion::FIRST, reading, command, slot)
}

/// Opens an envelope with a command of the first version in it.
fn open<C: DeserializeOwned>(bytes: &[u8]) -> Result<OpenedEnvelope<C>, EnvelopeError> {
    open_with(bytes, |wrote, command| {
        assert_eq!(wrote, MachineVersion::FIRST);
        Ok(machine::decode(command)?)
    })
}

type Command = (String, Vec<u8>);

const READING: Reading = Reading { wall_ms: 7, term: 3, counted_ms: 90 };

#[test]
fn what_is_sealed_can_be_opened() {
    let command: Command = ("put".to_owned(), vec![1, 2, 3]);
    let expect = |sealed: &[u8], content| {
        let opened = open::<Command>(sealed).unwrap();
        assert_eq!(opened, OpenedEnvelope { stamp: Stamp::Reading(READING), content });
    };
    for slot in [None, Some(SessionSlot { session: 8, sequence: 9, first_unanswered: 4 })] {
        let sealed = seal(READING, &command, slot).unwrap();
        expect(&sealed, Content::Command(command.clone(), slot));
    }
    for opener in ["", "192.0.2.1:50000"] {
        let content = Content::OpenSession { session: 8, ttl_ms: 60, opener: opener.to_owned() };
        expect(&seal_open_session(READING, 8, 60, opener), content);
    }
    let long = "\u{e4}".repeat(MAX_OPENER_BYTES);
    let content = Content::OpenSession { session: 8, ttl_ms: 0, opener: "\u{e4}".repeat(32) };
    expect(&seal_open_session(READING, 8, 0, &long), content);
    expect(&seal_close_session(READING, 60), Content::CloseSession { session: 60 });
    expect(&seal_clock(READING), Content::Clock);
    for change in [QuotaChange::Follow(5), QuotaChange::Set(6), QuotaChange::Release] {
        expect(&seal_quota(READING, change), Content::Quota(change));
    }
}

/// Logs in use hold these bytes.
#[test]
fn the_bytes_are_as_documented() {
    let slot = SessionSlot { session: 2, sequence: 3, first_unanswered: 4 };
    let numbers = |numbers: &[u64]| -> Vec<u8> { numbers.iter().flat_map(|n| n.to_le_bytes()).collect() };
    let expect = |kind: u8, rest: &[u64], command: &[u8]| {
        [&[3, kind][..], &numbers(&[7, 3, 90]), &numbers(rest), command].concat()
    };
    assert_eq!(seal(READING, &9_u8, None).unwrap(), expect(0, &[], &[9]));
    assert_eq!(seal(READING, &9_u8, Some(slot)).unwrap(), expect(1, &[2, 3, 4], &[9]));
    assert_eq!(seal_open_session(READING, 4, 5, "a:1"), expect(2, &[4, 5], b"a:1"));
    assert_eq!(seal_close_session(READING, 5), expect(3, &[5], &[]));
    assert_eq!(seal_clock(READING), expect(4, &[], &[]));
    let quota = |how: u8, bytes: u64| expect(5, &[], &[&[how], &numbers(&[bytes])[..]].concat());
    assert_eq!(seal_quota(READING, QuotaChange::Follow(9)), quota(0, 9));
    assert_eq!(seal_quota(READING, QuotaChange::Set(9)), quota(1, 9));
    assert_eq!(seal_quota(READING, QuotaChange::Release), quota(2, 0));
    assert!(matches!(open::<u8>(&quota(3, 9)), Err(EnvelopeError::Quota { found: 3 })));

    // Of earlier versions.
    let earlier = |bytes: &[u8], content| {
        let opened = open::<u8>(bytes).unwrap();
        assert_eq!(opened, OpenedEnvelope { stamp: Stamp::LogTime(1), content });
    };
    let version_2 = |kind: u8, rest: &[u64], command: &[u8]| {
        [&[2, kind][..], &numbers(&[1]), &numbers(rest), command].concat()
    };
    earlier(&version_2(0, &[], &[9]), Content::Command(9, None));
    earlier(&version_2(1, &[2, 3, 4], &[9]), Content::Command(9, Some(slot)));
    let opened = Content::OpenSession { session: 4, ttl_ms: 5, opener: String::new() };
    earlier(&version_2(2, &[4, 5], &[]), opened);
    earlier(&version_2(3, &[5], &[]), Content::CloseSession { session: 5 });
    assert!(matches!(open::<u8>(&version_2(4, &[], &[])), Err(EnvelopeError::Kind { found: 4 })));
    let version_1 = [&[1][..], &numbers(&[1, 0, 0]), &[9]].concat();
    earlier(&version_1, Content::Command(9, None));
}

#[test]
fn damage_is_told_apart() {
    let slot = SessionSlot { session: 2, sequence: 3, first_unanswered: 4 };
    let bytes = seal(READING, &1234u64, Some(slot)).unwrap();
    assert!(matches!(open::<u64>(&[]), Err(EnvelopeError::Truncated { bytes: 0 })));
    assert!(matches!(open::<u64>(&bytes[..25]), Err(EnvelopeError::Truncated { bytes: 25 })));
    assert!(matches!(open::<u64>(&bytes[..49]), Err(EnvelopeError::Truncated { bytes: 49 })));
    assert!(matches!(open::<u64>(&bytes[..50]), Err(EnvelopeError::Command(_))));
    assert!(matches!(open::<u64>(&[1; 24]), Err(EnvelopeError::Truncated { bytes: 24 })));
    assert!(matches!(open::<u64>(&[2; 9]), Err(EnvelopeError::Truncated { bytes: 9 })));
    let changed = |at: usize, byte: u8| {
        let mut changed = bytes.to_vec();
        changed[at] = byte;
        open::<u64>(&changed)
    };
    assert!(matches!(changed(0, 4), Err(EnvelopeError::Version { found: 4 })));
    assert!(matches!(changed(1, 99), Err(EnvelopeError::Kind { found: 99 })));
    let opened = |opener: &[u8]| open::<u64>(&[&seal_open_session(READING, 1, 0, "")[..], opener].concat());
    assert!(matches!(opened(&[0xff]), Err(EnvelopeError::Opener)));
    assert!(matches!(opened(&[b'a'; MAX_OPENER_BYTES + 1]), Err(EnvelopeError::Opener)));
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(open::<u64>(&longer), Err(EnvelopeError::Command(_))));
    for sealed in [
        seal_close_session(READING, 1),
        seal_clock(READING),
        seal_quota(READING, QuotaChange::Release),
        seal_agreement(READING, MachineVersion::FIRST),
    ] {
        let longer = [&sealed[..], &[0]].concat();
        assert!(matches!(open::<u64>(&longer), Err(EnvelopeError::Trailing { bytes: 1 })));
    }
}

/// Adds what it is given; version 2 of it. Version 1 was given half as many bits.
#[derive(Debug, Default)]
struct Sum;

impl StateMachine for Sum {
    type Command = u64;
    type Reply = ();
    type Query = ();
    type Answer = ();
    type View = ();

    const VERSION: u32 = 2;
    const OLDEST_VERSION: u32 = 1;

    fn command_version(command: &u64) -> u32 {
        if *command < 100 { 1 } else { 2 }
    }

    fn decode_command(version: u32, encoded: &[u8]) -> Result<u64, DecodeError> {
        let number: u64 = machine::decode(encoded)?;
        match version {
            1 if number >= 100 => Err(DecodeError::new("version 1 has no such numbers")),
            _ => Ok(number),
        }
    }

    fn apply(&mut self, _: &machine::ApplyContext, _: u64) {}

    fn view(&self) {}

    fn query((): &(), (): ()) {}

    fn write_snapshot((): &(), _: &mut dyn std::io::Write) -> std::io::Result<()> {
        Ok(())
    }

    fn read_snapshot(_: u32, _: &mut dyn std::io::Read) -> std::io::Result<Self> {
        Ok(Self)
    }
}

/// Logs in use hold these bytes.
#[test]
fn a_command_carries_its_machine_and_version() {
    let slot = SessionSlot { session: 2, sequence: 3, first_unanswered: 4 };
    let numbers = |numbers: &[u64]| -> Vec<u8> { numbers.iter().flat_map(|n| n.to_le_bytes()).collect() };
    let head = |kind: u8| [&[3, kind][..], &numbers(&[7, 3, 90])].concat();
    let (alone, in_session) = (head(6), [head(7), numbers(&[2, 3, 4])].concat());
    assert_eq!(super::seal::<Sum>(READING, &9, None).unwrap(), [&alone[..], &[0, 0, 1, 0, 0, 0, 9]].concat());
    let sealed = super::seal::<Sum>(READING, &200, Some(slot)).unwrap();
    assert_eq!(sealed, [&in_session[..], &[0, 0, 2, 0, 0, 0, 200]].concat());
    let version = MachineVersion { machine: 0x0102, version: 0x0304_0506 };
    let agreement = seal_agreement(READING, version);
    assert_eq!(agreement, [&head(8)[..], &[2, 1, 6, 5, 4, 3]].concat());

    for (command, slot) in [(9, None), (9, Some(slot)), (200, None), (200, Some(slot))] {
        let sealed = super::seal::<Sum>(READING, &command, slot).unwrap();
        let opened = super::open::<Sum>(&sealed).unwrap();
        assert_eq!(
            opened,
            OpenedEnvelope { stamp: Stamp::Reading(READING), content: Content::Command(command, slot) }
        );
        assert_eq!(check::<Sum>(&sealed), Ok(Stamp::Reading(READING)));
        for length in 0..sealed.len() {
            assert!(check::<Sum>(&sealed[..length]).is_err(), "{length} bytes");
        }
        assert!(check::<Sum>(&[&sealed[..], &[0]].concat()).is_err());
    }
    let agreed = seal_agreement(READING, MachineVersion { machine: 0, version: 2 });
    let content = Content::Agreement(MachineVersion { machine: 0, version: 2 });
    assert_eq!(super::open::<Sum>(&agreed).unwrap().content, content);
    assert!(check::<Sum>(&agreed[..agreed.len() - 1]).is_err());
}

#[test]
fn what_a_build_does_not_read_is_named_and_never_taken_for_something_else() {
    let refused = |sealed: &[u8]| {
        let unusable = check::<Sum>(sealed).unwrap_err();
        assert!(unusable.unsupported.is_some(), "{unusable}");
        unusable.reason
    };
    let of = |machine, version| seal_as(MachineVersion { machine, version }, READING, &9_u64, None).unwrap();
    let upgrade = "written by version 3 of the machine, this build reads 1 to 2: upgrade this node";
    assert_eq!(refused(&of(0, 3)), upgrade);
    assert_eq!(refused(&seal_agreement(READING, MachineVersion { machine: 0, version: 3 })), upgrade);
    assert!(refused(&of(5, 1)).contains("machine 5, which this build does not have"));
    assert!(refused(&seal(READING, &9_u64, None).unwrap()).contains("written by version 0"), "it is too old");
    let wrong = seal_as(MachineVersion { machine: 0, version: 1 }, READING, &200_u64, None).unwrap();
    let unusable = check::<Sum>(&wrong).unwrap_err();
    assert_eq!(unusable.unsupported, None, "it is read, and no command of that version");
}

#[test]
fn what_another_node_has_sealed_is_stamped_anew_and_not_encoded_again() {
    let slot = SessionSlot { session: 2, sequence: 3, first_unanswered: 1 };
    let later = SessionSlot { first_unanswered: 3, ..slot };
    for (unstamped, stamped) in [
        (seal(UNSTAMPED, &9_u8, None).unwrap(), seal(READING, &9_u8, None).unwrap()),
        (seal(UNSTAMPED, &9_u8, Some(slot)).unwrap(), seal(READING, &9_u8, Some(slot)).unwrap()),
        (seal_open_session(UNSTAMPED, 8, 60, "o"), seal_open_session(READING, 8, 60, "o")),
        (seal_close_session(UNSTAMPED, 8), seal_close_session(READING, 8)),
        (seal_quota(UNSTAMPED, QuotaChange::Release), seal_quota(READING, QuotaChange::Release)),
    ] {
        assert_eq!(restamp(&unstamped, READING).unwrap(), stamped);
        assert_eq!(restamp(&stamped, UNSTAMPED).unwrap(), unstamped, "whatever was there");
    }
    // One whose command this build would encode in another way stays what it is.
    let mut strange = seal(UNSTAMPED, &9_u8, None).unwrap().to_vec();
    strange.push(77);
    assert_eq!(restamp(&strange, READING).unwrap().last(), Some(&77));
    assert!(matches!(restamp(&[], READING), Err(EnvelopeError::Truncated { bytes: 0 })));
    assert!(matches!(restamp(&[VERSION, 0], READING), Err(EnvelopeError::Truncated { bytes: 2 })));
    for found in [OLDEST_VERSION, LOG_TIME_VERSION, VERSION + 1] {
        strange[0] = found;
        assert!(matches!(restamp(&strange, READING), Err(EnvelopeError::Version { found: f }) if f == found));
    }

    for wrote in [MachineVersion::FIRST, MachineVersion { machine: 4, version: 2 }] {
        let sealed = |slot| seal_as(wrote, READING, &"command", Some(slot)).unwrap();
        assert_eq!(in_place(&sealed(slot), later), sealed(later));
    }
}
