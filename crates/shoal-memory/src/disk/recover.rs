//! What a log holds, read from the disk at start.
//!
//! Apart because it runs before anything is served. Two reads a segment, many at a time: its header, and its end, where a
//! footer says what is in it. A segment without one (the process was killed while it was written) is read through: record
//! after record, and past what is torn from unit to unit; of what is found there every block is verified now. Whatever
//! cannot be read is left alone; nothing is written.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::store::format::{
    Entry, Footer, SegmentHeader, UNIT, padded, read_footer, read_record_header, read_segment_header,
};
use shoal_core::store::log::{Log, LogOptions};

use super::medium::{Done, Medium, Op, Verb};
use super::seal::Codec;
use crate::store::Buffer;

/// How much of a segment's end is read at first: the footer of some 700 blocks.
const END_BYTES: u64 = 64 << 10;
/// How much is read at a time where a segment is read through.
const WINDOW_BYTES: u64 = 4 << 20;

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Segments with a footer.
    pub sealed: u32,
    /// Segments that were read through.
    pub scanned: u32,
    /// Blocks that can be read.
    pub blocks: u64,
    /// Blocks of unfinished segments that were torn.
    pub torn: u64,
    /// Reads that failed.
    pub failed: u32,
    /// How long it took.
    pub took: Duration,
}

struct Found {
    slot: u32,
    header: SegmentHeader,
    entries: Vec<Entry>,
    is_sealed: bool,
}

pub(super) struct Reader<'a> {
    medium: &'a mut dyn Medium,
    until: Instant,
    failed: u32,
    failures_max: u32,
}

impl Reader<'_> {
    fn failed(&mut self, error: &io::Error) -> io::Result<()> {
        self.failed += 1;
        tracing::warn!(%error, "a read of the disk tier failed at its start");
        if self.failed < self.failures_max {
            Ok(())
        } else {
            Err(io::Error::new(error.kind(), error.to_string()))
        }
    }

    /// Reads all of these ranges, many at a time; none for one that cannot be read.
    fn read_all(&mut self, ranges: &[(u64, u64)]) -> io::Result<Vec<Option<Buffer>>> {
        let mut found: Vec<Option<Buffer>> = ranges.iter().map(|_| None).collect();
        let (mut next, mut left, mut done) = (0, ranges.len(), Vec::<Done>::new());
        while left > 0 {
            while next < ranges.len() {
                let (offset, bytes) = ranges[next];
                let bytes = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
                let buffer = Some(Buffer::zeroed(bytes));
                let op = Op { token: next as u64, verb: Verb::Read, offset, buffer, bytes };
                if self.medium.in_flight() >= self.medium.depth() || self.medium.submit(op).is_err() {
                    break;
                }
                next += 1;
            }
            self.medium.wait(Duration::from_millis(100));
            self.medium.reap(&mut done);
            for Done { token, result, buffer } in done.drain(..) {
                let Some(place) = usize::try_from(token).ok().filter(|at| *at < ranges.len()) else {
                    continue;
                };
                left -= 1;
                match result {
                    Ok(read) if read as u64 == ranges[place].1 => found[place] = buffer,
                    Ok(_) => self.failed(&io::ErrorKind::UnexpectedEof.into())?,
                    Err(error) => self.failed(&error)?,
                }
            }
            if left > 0 && Instant::now() >= self.until {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the disk does not answer"));
            }
        }
        Ok(found)
    }

    /// Reads a segment without a footer from front to end, and verifies what is in it; none if not all can be read.
    fn scan(
        &mut self,
        codec: &Codec,
        base: u64,
        stamp: u64,
        segment_bytes: u64,
    ) -> io::Result<Option<(Vec<Entry>, u64)>> {
        let (mut entries, mut torn) = (Vec::new(), 0);
        let (mut window_at, mut window) = (0, None::<Buffer>);
        let mut at = UNIT;
        while at < segment_bytes {
            let is_inside = window.is_some() && at >= window_at && at < window_at + WINDOW_BYTES;
            if !is_inside {
                window_at = at;
                let bytes = WINDOW_BYTES.min(segment_bytes - at);
                window = self.read_all(&[(base + at, bytes)])?.pop().flatten();
            }
            let Some(bytes) = window.as_ref().map(Buffer::as_slice) else { return Ok(None) };
            let from = usize::try_from(at - window_at).unwrap_or(usize::MAX);
            let header = bytes.get(from..).unwrap_or_default();
            let Some(record) = read_record_header(codec.secret(), stamp, at, segment_bytes, header) else {
                at += UNIT;
                continue;
            };
            let mut good = 0;
            for entry in &record.entries {
                let in_window = usize::try_from(entry.offset - window_at).ok();
                let here = in_window.and_then(|start| bytes.get(start..start + entry.bytes as usize));
                let is_good = if let Some(payload) = here {
                    codec.is_right(entry, payload)
                } else {
                    let range = (base + entry.offset, padded(entry.bytes.into()));
                    let Some(read) = self.read_all(&[range])?.pop().flatten() else { return Ok(None) };
                    codec.is_right(entry, &read.as_slice()[..entry.bytes as usize])
                };
                if is_good {
                    entries.push(*entry);
                    good += 1;
                } else {
                    torn += 1;
                }
            }
            // What is torn may hide the records of an older writer's plan; what is whole does not.
            at += if good == record.entries.len() { record.bytes } else { UNIT };
        }
        Ok(Some((entries, torn)))
    }
}

/// How a log is read back.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) codec: Arc<Codec>,
    pub(super) log: LogOptions,
    /// A random number, another one each time.
    pub(super) boot: u64,
    pub(super) deadline: Duration,
    /// So many reads may fail; with more the disk is no good for now.
    pub(super) failures_max: u32,
}

/// Reads what there is. A segment of which something cannot be read is left alone: neither served nor written over.
///
/// # Errors
/// The disk does not answer in time, or too many reads failed, or its file cannot be looked at.
pub(super) fn recover(medium: &mut dyn Medium, plan: &Plan) -> io::Result<(Log, Recovered)> {
    let Plan { codec, log: options, boot, deadline, failures_max } = plan;
    let (secret, options, boot, deadline, failures_max) =
        (codec.secret(), *options, *boot, *deadline, *failures_max);
    let begun = Instant::now();
    let segment_bytes = options.segment_bytes;
    // A lower cap than last time: what lies beyond goes.
    medium.shrink(segment_bytes.saturating_mul(options.segments_max.into()))?;
    let slots = u32::try_from(medium.bytes()? / segment_bytes).unwrap_or(u32::MAX);
    // A segment whose making was cut short is made again.
    medium.shrink(segment_bytes * u64::from(slots))?;
    let mut log = Log::new(options, slots, boot);
    let mut reader = Reader { medium, until: begun + deadline, failed: 0, failures_max };
    let base = |slot: u32| u64::from(slot) * segment_bytes;

    let end_bytes = END_BYTES.min(segment_bytes - UNIT);
    let ranges: Vec<(u64, u64)> = (0..slots)
        .flat_map(|slot| [(base(slot), UNIT), (base(slot) + segment_bytes - end_bytes, end_bytes)])
        .collect();
    let mut found = Vec::new();
    let (mut longer, mut unfinished) = (Vec::new(), Vec::new());
    // A batch at a time, so that ends of thousands of segments are not all in memory.
    let mut slot = 0;
    for batch in ranges.chunks(512) {
        let read = reader.read_all(batch)?;
        for pair in read.chunks(2) {
            let this = slot;
            slot += 1;
            let [Some(unit), Some(end)] = pair else {
                log.leave_alone(this);
                continue;
            };
            let Some(header) = read_segment_header(secret, segment_bytes, unit.as_slice()) else { continue };
            match read_footer(secret, header.stamp, segment_bytes, end.as_slice()) {
                Footer::Entries(entries) => {
                    found.push(Found { slot: this, header, entries, is_sealed: true });
                }
                Footer::Longer(bytes) => longer.push((this, header, bytes)),
                Footer::None => unfinished.push((this, header)),
            }
        }
    }
    for batch in longer.chunks(32) {
        let ranges: Vec<_> =
            batch.iter().map(|(slot, _, bytes)| (base(*slot) + segment_bytes - bytes, *bytes)).collect();
        for ((slot, header, _), end) in batch.iter().zip(reader.read_all(&ranges)?) {
            let Some(end) = end else {
                log.leave_alone(*slot);
                continue;
            };
            match read_footer(secret, header.stamp, segment_bytes, end.as_slice()) {
                Footer::Entries(entries) => {
                    found.push(Found { slot: *slot, header: *header, entries, is_sealed: true });
                }
                _ => unfinished.push((*slot, *header)),
            }
        }
    }
    let mut recovered =
        Recovered { sealed: u32::try_from(found.len()).unwrap_or(u32::MAX), ..Recovered::default() };
    for (slot, header) in unfinished {
        let Some((entries, torn)) = reader.scan(codec, base(slot), header.stamp, segment_bytes)? else {
            log.leave_alone(slot);
            continue;
        };
        recovered.scanned += 1;
        recovered.torn += torn;
        found.push(Found { slot, header, entries, is_sealed: false });
    }
    found.sort_by_key(|found| found.header.seq);
    for Found { slot, header, entries, is_sealed } in found {
        log.restore(slot, header, entries, is_sealed);
    }
    if slots > 0 && !log.can_read() {
        return Err(io::Error::other("not one segment could be read"));
    }
    recovered.blocks = log.usage().blocks;
    recovered.failed = reader.failed;
    recovered.took = begun.elapsed();
    Ok((log, recovered))
}
