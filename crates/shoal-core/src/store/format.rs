//! How blocks lie on a disk: the bytes of segment headers, records and footers, made and read.
//!
//! Apart because it is a format that outlives processes, and because a parser of what a disk gives back must take any
//! bytes at all (`fuzz/`, target `disk`). All numbers are little endian; all offsets are multiples of [`UNIT`].
//!
//! ```text
//! log file   = segments of equal length, one after another
//! segment    = header (1 unit) | records .. | free | footer
//! record     = record header (1 unit) | payloads, each from a unit on, the last unit padded with zeroes
//! footer     = entries of all records | zeroes | tail (64 bytes, the segment's last)
//! ```
//!
//! Every checksum is xxh3-128 seeded from the directory's random secret and from what the bytes are meant to be: a header's
//! knows its segment and place, a payload's knows its name. So bytes of an older use of the same place, of another place,
//! of another directory, or payload that looks like a header are no headers, and right bytes in the wrong place are wrong.
//! They find damage, not malice; sealed payloads (a nonce is set) are for that.

use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128_with_seed};

use super::key::StoreKey;

/// The format's version. A directory of another one is left untouched.
pub const VERSION: u32 = 1;
/// Bytes that everything on disk starts at a multiple of: what direct I/O asks for on every disk in use.
pub const UNIT: u64 = 4096;
/// The same, as a length in memory.
pub const UNIT_LEN: usize = 4096;
/// Most entries of one record, so that its header is one unit.
pub const ENTRIES_MAX: usize = (UNIT_LEN - RECORD_HEAD - CHECKSUM) / ENTRY_BYTES;
/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 12;

const SEGMENT_MAGIC: [u8; 8] = *b"SHOALSEG";
const RECORD_MAGIC: [u8; 8] = *b"SHOALREC";
const TAIL_MAGIC: [u8; 8] = *b"SHOALEND";
const REMOVED_MAGIC: [u8; 8] = *b"SHOALOUT";
const CHECKSUM: usize = 16;
const RECORD_HEAD: usize = 64;
const ENTRY_BYTES: usize = StoreKey::BYTES + 4 + 4 + CHECKSUM + NONCE_BYTES + 4;
const TAIL_BYTES: usize = 64;

/// What checksums of one directory are seeded with. Random, made with the directory, stored beside the log.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret(pub u128);

impl core::fmt::Debug for Secret {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// The seed for bytes that stand for `what`.
    fn seed(self, what: &[u8]) -> u64 {
        let half = |at: u32| u64::try_from((self.0 >> at) & u128::from(u64::MAX)).unwrap_or(0);
        xxh3_64_with_seed(what, half(0)) ^ half(64)
    }

    fn of_header(self, magic: [u8; 8], stamp: u64, offset: u64, bytes: &[u8]) -> u128 {
        let mut what = [0; 24];
        what[..8].copy_from_slice(&magic);
        what[8..16].copy_from_slice(&stamp.to_le_bytes());
        what[16..].copy_from_slice(&offset.to_le_bytes());
        xxh3_128_with_seed(bytes, self.seed(&what))
    }

    /// The checksum of a block's bytes as they lie on disk, without padding.
    #[must_use]
    pub fn of_payload(self, key: &StoreKey, bytes: &[u8]) -> u128 {
        // At once, which is a fifth faster than in parts.
        xxh3_128_with_seed(bytes, self.seed(&key.to_bytes()))
    }
}

/// `bytes` up to the next multiple of [`UNIT`].
#[must_use]
pub const fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(UNIT)
}

/// One block in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub key: StoreKey,
    /// Where its bytes begin, from the segment's start.
    pub offset: u64,
    /// How many they are, without padding.
    pub bytes: u32,
    /// Checksum of what lies on disk, or the tag of what was sealed.
    pub checksum: u128,
    /// The nonce it was sealed with; zero if it lies there as it is.
    pub nonce: [u8; NONCE_BYTES],
}

impl Entry {
    /// Whether it was encrypted.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.nonce != [0; NONCE_BYTES]
    }

    fn write(&self, out: &mut [u8]) {
        let (key, rest) = out.split_at_mut(StoreKey::BYTES);
        key.copy_from_slice(&self.key.to_bytes());
        let units = u32::try_from(self.offset / UNIT).unwrap_or(u32::MAX);
        rest[..4].copy_from_slice(&units.to_le_bytes());
        rest[4..8].copy_from_slice(&self.bytes.to_le_bytes());
        rest[8..24].copy_from_slice(&self.checksum.to_le_bytes());
        rest[24..36].copy_from_slice(&self.nonce);
        rest[36..40].fill(0);
    }

    /// An entry whose bytes lie between `from` and `to`, or none.
    fn read(bytes: &[u8], from: u64, to: u64) -> Option<Self> {
        let key = StoreKey::from_bytes(bytes.first_chunk()?);
        let rest = &bytes[StoreKey::BYTES..];
        let offset = u64::from(u32_at(rest, 0)?) * UNIT;
        let length = u32_at(rest, 4)?;
        let end = offset + padded(u64::from(length));
        let nonce = *rest.get(24..)?.first_chunk()?;
        (length > 0 && offset >= from && end <= to).then_some(Self {
            key,
            offset,
            bytes: length,
            checksum: u128_at(rest, 8)?,
            nonce,
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u128_at(bytes: &[u8], at: usize) -> Option<u128> {
    Some(u128::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// What a segment's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Its number in the order of writing.
    pub seq: u64,
    /// Made up for each segment that is begun, so that a record or a footer of an earlier use of the place is none of this
    /// one's, also where a lost header made a number come twice.
    pub stamp: u64,
}

/// Writes a segment's header.
pub fn write_segment_header(
    secret: Secret,
    header: SegmentHeader,
    segment_bytes: u64,
    out: &mut [u8; UNIT_LEN],
) {
    out.fill(0);
    out[..8].copy_from_slice(&SEGMENT_MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[16..24].copy_from_slice(&header.seq.to_le_bytes());
    out[24..32].copy_from_slice(&header.stamp.to_le_bytes());
    out[32..40].copy_from_slice(&segment_bytes.to_le_bytes());
    let checksum = secret.of_header(SEGMENT_MAGIC, header.stamp, 0, &out[..UNIT_LEN - CHECKSUM]);
    out[UNIT_LEN - CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
}

/// The header that this is, or none.
#[must_use]
pub fn read_segment_header(secret: Secret, segment_bytes: u64, bytes: &[u8]) -> Option<SegmentHeader> {
    let bytes: &[u8; UNIT_LEN] = bytes.first_chunk()?;
    let header = SegmentHeader { seq: u64_at(bytes, 16)?, stamp: u64_at(bytes, 24)? };
    let is_ours = bytes[..8] == SEGMENT_MAGIC
        && u32_at(bytes, 8)? == VERSION
        && u64_at(bytes, 32)? == segment_bytes
        && u128_at(bytes, UNIT_LEN - CHECKSUM)?
            == secret.of_header(SEGMENT_MAGIC, header.stamp, 0, &bytes[..UNIT_LEN - CHECKSUM]);
    // The last number there is would leave none for the next segment.
    (is_ours && header.seq < u64::MAX).then_some(header)
}

/// A record's header, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its length with header and padding.
    pub bytes: u64,
    /// What it holds.
    pub entries: Vec<Entry>,
}

/// Writes the header of a record at `offset` of segment `stamp`. At most [`ENTRIES_MAX`] entries; more are left out.
pub fn write_record_header(
    secret: Secret,
    stamp: u64,
    offset: u64,
    record_bytes: u64,
    entries: &[Entry],
    out: &mut [u8; UNIT_LEN],
) {
    out.fill(0);
    out[..8].copy_from_slice(&RECORD_MAGIC);
    out[8..16].copy_from_slice(&stamp.to_le_bytes());
    out[16..24].copy_from_slice(&offset.to_le_bytes());
    out[24..32].copy_from_slice(&record_bytes.to_le_bytes());
    let count = entries.len().min(ENTRIES_MAX);
    out[32..36].copy_from_slice(&u32::try_from(count).unwrap_or(0).to_le_bytes());
    for (entry, place) in entries.iter().zip(out[RECORD_HEAD..].chunks_exact_mut(ENTRY_BYTES)).take(count) {
        entry.write(place);
    }
    let checksum = secret.of_header(RECORD_MAGIC, stamp, offset, &out[..UNIT_LEN - CHECKSUM]);
    out[UNIT_LEN - CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
}

/// The record at `offset` of segment `stamp` whose header this is, or none. Everything in it lies inside the segment.
#[must_use]
pub fn read_record_header(
    secret: Secret,
    stamp: u64,
    offset: u64,
    segment_bytes: u64,
    bytes: &[u8],
) -> Option<Record> {
    let bytes: &[u8; UNIT_LEN] = bytes.first_chunk()?;
    let is_ours = bytes[..8] == RECORD_MAGIC
        && u64_at(bytes, 8)? == stamp
        && u64_at(bytes, 16)? == offset
        && u128_at(bytes, UNIT_LEN - CHECKSUM)?
            == secret.of_header(RECORD_MAGIC, stamp, offset, &bytes[..UNIT_LEN - CHECKSUM]);
    if !is_ours {
        return None;
    }
    let record_bytes = u64_at(bytes, 24)?;
    let end = offset.checked_add(record_bytes)?;
    let count = usize::try_from(u32_at(bytes, 32)?).ok()?;
    if record_bytes % UNIT != 0 || record_bytes <= UNIT || end > segment_bytes || count > ENTRIES_MAX {
        return None;
    }
    let places = bytes[RECORD_HEAD..].chunks_exact(ENTRY_BYTES).take(count);
    let entries = places.map(|place| Entry::read(place, offset + UNIT, end)).collect::<Option<_>>()?;
    Some(Record { bytes: record_bytes, entries })
}

/// Writes what takes the place of the first unit of a block that was removed: its checksum is wrong from then on.
pub fn write_removed(secret: Secret, key: &StoreKey, out: &mut [u8; UNIT_LEN]) {
    out.fill(0);
    out[..8].copy_from_slice(&REMOVED_MAGIC);
    out[8..8 + StoreKey::BYTES].copy_from_slice(&key.to_bytes());
    let checksum = secret.of_header(REMOVED_MAGIC, 0, 0, &out[..UNIT_LEN - CHECKSUM]);
    out[UNIT_LEN - CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
}

/// Whether the block of this name was removed from the place that these bytes are from: it is absent, not damaged.
#[must_use]
pub fn is_removed(secret: Secret, key: &StoreKey, bytes: &[u8]) -> bool {
    let mut removed = [0; UNIT_LEN];
    write_removed(secret, key, &mut removed);
    bytes.first_chunk() == Some(&removed)
}

/// Gives bytes that look like a header or a footer the checksum that is right for what they say. For tests only: what tries
/// parsers with random bytes would hardly ever get past the checksum otherwise. Whether they look like one.
pub fn reseal(secret: Secret, bytes: &mut [u8]) -> bool {
    let Some(body) = bytes.len().checked_sub(CHECKSUM) else { return false };
    let front: Option<[u8; 8]> = bytes.first_chunk().copied();
    let tail = bytes.len().checked_sub(TAIL_BYTES);
    let (magic, stamp, offset) = match front {
        Some(SEGMENT_MAGIC) => (SEGMENT_MAGIC, u64_at(bytes, 24), Some(0)),
        Some(RECORD_MAGIC) => (RECORD_MAGIC, u64_at(bytes, 8), u64_at(bytes, 16)),
        _ => (TAIL_MAGIC, tail.and_then(|tail| u64_at(bytes, tail + 8)), Some(bytes.len() as u64)),
    };
    let (Some(stamp), Some(offset)) = (stamp, offset) else { return false };
    let checksum = secret.of_header(magic, stamp, offset, &bytes[..body]);
    bytes[body..].copy_from_slice(&checksum.to_le_bytes());
    true
}

/// Bytes of the footer of a segment with so many entries.
#[must_use]
pub const fn footer_bytes(entries: usize) -> u64 {
    padded((entries * ENTRY_BYTES + TAIL_BYTES) as u64)
}

/// A segment's footer, whole: it ends where the segment ends.
#[must_use]
pub fn write_footer(secret: Secret, stamp: u64, entries: &[Entry]) -> Vec<u8> {
    let length = usize::try_from(footer_bytes(entries.len())).unwrap_or(usize::MAX);
    let mut out = vec![0; length];
    for (entry, place) in entries.iter().zip(out.chunks_exact_mut(ENTRY_BYTES)) {
        entry.write(place);
    }
    let tail = length - TAIL_BYTES;
    out[tail..tail + 8].copy_from_slice(&TAIL_MAGIC);
    out[tail + 8..tail + 16].copy_from_slice(&stamp.to_le_bytes());
    out[tail + 16..tail + 24].copy_from_slice(&(entries.len() as u64).to_le_bytes());
    let checksum = secret.of_header(TAIL_MAGIC, stamp, length as u64, &out[..length - CHECKSUM]);
    out[length - CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
    out
}

/// What the end of a segment says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Footer {
    /// No footer of this segment: it was never finished, or the footer is damaged.
    None,
    /// It is longer than what was read: read this much from the segment's end.
    Longer(u64),
    /// What the segment holds.
    Entries(Vec<Entry>),
}

/// Reads a footer from the last bytes of segment `stamp`. Everything in it lies inside the segment.
#[must_use]
pub fn read_footer(secret: Secret, stamp: u64, segment_bytes: u64, end: &[u8]) -> Footer {
    footer_of(secret, stamp, segment_bytes, end).unwrap_or(Footer::None)
}

fn footer_of(secret: Secret, stamp: u64, segment_bytes: u64, end: &[u8]) -> Option<Footer> {
    let tail = &end[end.len().checked_sub(TAIL_BYTES)?..];
    let count = u64_at(tail, 16)?;
    if tail[..8] != TAIL_MAGIC || u64_at(tail, 8)? != stamp || count > segment_bytes / UNIT {
        return None;
    }
    let count = usize::try_from(count).ok()?;
    let length = footer_bytes(count);
    if length > segment_bytes - UNIT {
        return None;
    }
    let footer = match usize::try_from(length).ok()? {
        length if length <= end.len() => &end[end.len() - length..],
        _ => return Some(Footer::Longer(length)),
    };
    let body = footer.len() - CHECKSUM;
    if u128_at(footer, body)? != secret.of_header(TAIL_MAGIC, stamp, length, &footer[..body]) {
        return None;
    }
    let places = footer.chunks_exact(ENTRY_BYTES).take(count);
    let entries = places.map(|place| Entry::read(place, 2 * UNIT, segment_bytes - length));
    entries.collect::<Option<_>>().map(Footer::Entries)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::key::Fingerprint;
    use super::*;

    const SECRET: Secret = Secret(0x1234_5678_9abc_def0_0fed_cba9_8765_4321);
    const SEGMENT: u64 = 1 << 20;
    const HEADER: SegmentHeader = SegmentHeader { seq: 9, stamp: 77 };

    fn entry(at: u64) -> Entry {
        let key = StoreKey { fingerprint: Fingerprint(1), tenant: 2, block: u128::from(at) };
        Entry { key, offset: at * UNIT, bytes: 100, checksum: 77, nonce: [0; NONCE_BYTES] }
    }

    fn record(count: u64) -> ([u8; UNIT_LEN], Vec<Entry>) {
        let entries: Vec<_> = (0..count).map(|i| entry(3 + i)).collect();
        let mut header = [0; UNIT_LEN];
        write_record_header(SECRET, 9, 2 * UNIT, (1 + count) * UNIT, &entries, &mut header);
        (header, entries)
    }

    #[test]
    fn what_is_written_is_read() {
        let mut header = [0; UNIT_LEN];
        write_segment_header(SECRET, HEADER, SEGMENT, &mut header);
        assert_eq!(read_segment_header(SECRET, SEGMENT, &header), Some(HEADER));
        assert_eq!(read_segment_header(SECRET, 2 * SEGMENT, &header), None);
        assert_eq!(read_segment_header(Secret(1), SEGMENT, &header), None, "another directory's");

        let (header, entries) = record(ENTRIES_MAX as u64);
        let found = read_record_header(SECRET, 9, 2 * UNIT, SEGMENT, &header).expect("a record");
        assert_eq!(found.entries, entries);
        assert_eq!(
            read_record_header(SECRET, 8, 2 * UNIT, SEGMENT, &header),
            None,
            "an older use of the place"
        );
        assert_eq!(read_record_header(SECRET, 9, 3 * UNIT, SEGMENT, &header), None, "another place");

        for count in [0, 1, 44, 100] {
            let entries: Vec<_> = (0..count).map(|i| entry(2 + i)).collect();
            let footer = write_footer(SECRET, 9, &entries);
            assert_eq!(footer.len() as u64, footer_bytes(entries.len()));
            assert_eq!(read_footer(SECRET, 9, SEGMENT, &footer), Footer::Entries(entries));
            if footer.len() > UNIT_LEN {
                let end = &footer[footer.len() - UNIT_LEN..];
                assert_eq!(read_footer(SECRET, 9, SEGMENT, end), Footer::Longer(footer.len() as u64));
            }
            assert_eq!(read_footer(SECRET, 8, SEGMENT, &footer), Footer::None);
        }
    }

    proptest! {
        #[test]
        fn every_flipped_bit_is_found(bit in 0..8 * UNIT_LEN) {
            let (mut header, _) = record(3);
            header[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(read_record_header(SECRET, 9, 2 * UNIT, SEGMENT, &header), None);
            let mut header = [0; UNIT_LEN];
            write_segment_header(SECRET, HEADER, SEGMENT, &mut header);
            header[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(read_segment_header(SECRET, SEGMENT, &header), None);
            let mut footer = write_footer(SECRET, 9, &[entry(2), entry(3)]);
            footer[bit / 8] ^= 1 << (bit % 8);
            let found = read_footer(SECRET, 9, SEGMENT, &footer);
            prop_assert!(!matches!(found, Footer::Entries(_)), "{:?}", found);
        }
    }

    #[test]
    fn a_payload_knows_its_name() {
        let (one, other) = (entry(2).key, entry(3).key);
        assert_ne!(SECRET.of_payload(&one, b"same"), SECRET.of_payload(&other, b"same"));
        assert_ne!(SECRET.of_payload(&one, b"same"), Secret(5).of_payload(&one, b"same"));
    }
}
