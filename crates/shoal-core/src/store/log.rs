//! Which segment of a disk's log is written, what lies where, and which segment makes room.
//!
//! Apart because it decides without doing: whoever drives it (shoal-memory, `disk`) writes what it places, tells it what
//! became of that, and reads what it says is hot. A segment is written from front to end, finished with a footer, and taken
//! back whole. Which one is taken back follows cost and benefit of log-structured file systems (Rosenblum and Ousterhout,
//! 1992): age, and how little would have to be copied; blocks that were used since they were written are copied on, as in a
//! second-chance queue. One segment is kept free ahead of need, so that writes never wait for that.

use std::collections::HashMap;

use super::format::{ENTRIES_MAX, Entry, NONCE_BYTES, SegmentHeader, UNIT, footer_bytes, padded};
use super::key::StoreKey;

/// Uses that are remembered of a block.
const USES_MAX: u8 = 3;

/// How a log is laid out and bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// Length of a segment.
    pub segment_bytes: u64,
    /// Most segments: the cap on bytes.
    pub segments_max: u32,
    /// Most payload of a record that holds more than one block.
    pub record_bytes: u64,
    /// Most blocks: the index in memory takes some 200 bytes for each.
    pub entries_max: usize,
}

impl LogOptions {
    /// The longest block that fits.
    #[must_use]
    pub fn block_bytes_max(&self) -> u64 {
        let room = self.segment_bytes.saturating_sub(2 * UNIT + footer_bytes(1));
        room.min(u64::from(u32::MAX)) / UNIT * UNIT
    }
}

/// A record that has a place, and whose bytes are to be written there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Which segment of the file.
    pub slot: u32,
    /// What the segment's header says.
    pub header: SegmentHeader,
    /// Where the record begins in the segment.
    pub offset: u64,
    /// Its length with header and padding.
    pub bytes: u64,
    /// Where each block goes; checksums and nonces are for the writer to fill in.
    pub entries: Vec<Entry>,
}

/// A segment that is written from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Which segment of the file.
    pub slot: u32,
    /// What the segment's header says.
    pub header: SegmentHeader,
}

/// A segment that is complete but for its footer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsealed {
    /// Which segment of the file.
    pub slot: u32,
    /// What the segment's header says.
    pub header: SegmentHeader,
    /// What its footer says.
    pub entries: Vec<Entry>,
}

/// A segment that makes room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Victim {
    /// Which segment of the file.
    pub slot: u32,
    /// What is written again elsewhere, the hottest first. All else is gone.
    pub hot: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Open,
    /// Full, and records of it are still being written.
    Closing,
    /// Its footer is being written.
    Sealing,
    Sealed,
    Cleaning,
    /// Cleaned, and still being read.
    Draining,
    /// It could not be read: left alone until the next start.
    Lost,
}

#[derive(Clone, Debug)]
struct Segment {
    state: State,
    header: SegmentHeader,
    /// Where the next record goes.
    next: u64,
    writing: u32,
    readers: u32,
    /// All blocks that were ever written to it; the index says which are still here.
    entries: Vec<Entry>,
    /// Blocks that are placed and neither written nor given up.
    reserved: usize,
    live_bytes: u64,
    hot_bytes: u64,
    /// Its footer names blocks that were removed.
    is_stale: bool,
}

impl Segment {
    fn free() -> Self {
        let (header, next) = (SegmentHeader { seq: 0, stamp: 0 }, UNIT);
        let (writing, readers, reserved) = (0, 0, 0);
        let (state, entries, live_bytes, hot_bytes, is_stale) = (State::Free, Vec::new(), 0, 0, false);
        Self { state, header, next, writing, readers, entries, reserved, live_bytes, hot_bytes, is_stale }
    }
}

#[derive(Clone, Copy, Debug)]
struct Home {
    slot: u32,
    uses: u8,
    entry: Entry,
}

/// What a log holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogUsage {
    /// Blocks that can be read.
    pub blocks: u64,
    /// Their bytes, with padding.
    pub live_bytes: u64,
    /// Of those, the ones used since they were written.
    pub hot_bytes: u64,
    /// Segments that the file has.
    pub segments: u32,
    /// Those that hold nothing.
    pub segments_free: u32,
    /// Blocks that made room for others.
    pub evicted: u64,
    /// Blocks that were written again because they were hot.
    pub reinserted: u64,
}

/// The state of one disk's log.
#[derive(Clone, Debug)]
pub struct Log {
    options: LogOptions,
    segments: Vec<Segment>,
    index: HashMap<StoreKey, Home>,
    open: Option<u32>,
    /// Somebody found no segment to write to.
    is_wanted: bool,
    seq_next: u64,
    boot: u64,
    /// Most segments for now: fewer than the cap while the disk is full.
    slots_max: u32,
    evicted: u64,
    reinserted: u64,
    /// Sum over segments, kept along.
    live_bytes: u64,
}

impl Log {
    /// A log of which the file already has `slots` segments, all taken as free until [`Log::restore`] says otherwise.
    /// `boot`: a random number, another one each time a directory is opened.
    #[must_use]
    pub fn new(options: LogOptions, slots: u32, boot: u64) -> Self {
        Self {
            options,
            segments: (0..slots.min(options.segments_max)).map(|_| Segment::free()).collect(),
            index: HashMap::new(),
            open: None,
            is_wanted: false,
            seq_next: 1,
            boot,
            slots_max: options.segments_max,
            evicted: 0,
            reinserted: 0,
            live_bytes: 0,
        }
    }

    /// How it is laid out.
    #[must_use]
    pub fn options(&self) -> &LogOptions {
        &self.options
    }

    /// What a segment of an earlier run holds, as found on the disk. To be called in the order of `seq`: of two blocks of
    /// one name the later counts. `is_sealed`: it has a footer.
    pub fn restore(&mut self, slot: u32, header: SegmentHeader, entries: Vec<Entry>, is_sealed: bool) {
        self.seq_next = self.seq_next.max(header.seq.saturating_add(1));
        let Some(segment) = self.segments.get_mut(slot as usize) else { return };
        if entries.is_empty() {
            return;
        }
        segment.state = if is_sealed { State::Sealed } else { State::Closing };
        segment.header = header;
        segment.next =
            entries.iter().map(|entry| entry.offset + padded(entry.bytes.into())).max().unwrap_or(UNIT);
        segment.entries.clone_from(&entries);
        for entry in entries {
            if self.contains(&entry.key) {
                // Written again and not yet cleaned up when the process ended. The older copy must not come back once the
                // newer is removed.
                self.forget(&entry.key);
            }
            if self.index.len() < self.options.entries_max {
                self.insert(slot, entry, 0);
            }
        }
    }

    /// A segment of an earlier run could not be read: it is left alone, as it may be readable another time.
    pub fn leave_alone(&mut self, slot: u32) {
        if let Some(segment) = self.segments.get_mut(slot as usize) {
            segment.state = State::Lost;
        }
    }

    /// Whether any segment is more than left alone.
    #[must_use]
    pub fn can_read(&self) -> bool {
        self.segments.iter().any(|segment| segment.state != State::Lost)
    }

    /// Whether a block can be read.
    #[must_use]
    pub fn contains(&self, key: &StoreKey) -> bool {
        self.index.contains_key(key)
    }

    /// Where a block lies, which counts as a use; its segment stays as it is until [`Log::unpin`].
    pub fn find(&mut self, key: &StoreKey) -> Option<(u32, Entry)> {
        let home = self.index.get_mut(key)?;
        let (slot, entry) = (home.slot, home.entry);
        home.uses = home.uses.saturating_add(1).min(USES_MAX);
        let is_newly_hot = home.uses == 1;
        let segment = &mut self.segments[slot as usize];
        if is_newly_hot {
            segment.hot_bytes += padded(entry.bytes.into());
        }
        segment.readers += 1;
        Some((slot, entry))
    }

    /// Keeps a segment from being written over, as [`Log::find`] does.
    pub fn pin(&mut self, slot: u32) {
        if let Some(segment) = self.segments.get_mut(slot as usize) {
            segment.readers += 1;
        }
    }

    /// The read of a segment is over.
    pub fn unpin(&mut self, slot: u32) {
        let Some(segment) = self.segments.get_mut(slot as usize) else { return };
        segment.readers = segment.readers.saturating_sub(1);
        if segment.state == State::Draining && segment.readers == 0 {
            *segment = Segment::free();
        }
    }

    /// Whether the block still lies where it was found.
    #[must_use]
    pub fn is_at(&self, slot: u32, entry: &Entry) -> bool {
        self.index.get(&entry.key).is_some_and(|home| home.slot == slot && home.entry.offset == entry.offset)
    }

    /// Takes a block out of the index; where it lay.
    pub fn remove(&mut self, key: &StoreKey) -> Option<(u32, Entry)> {
        let home = self.index.remove(key)?;
        let bytes = padded(home.entry.bytes.into());
        let segment = &mut self.segments[home.slot as usize];
        segment.live_bytes -= bytes;
        self.live_bytes -= bytes;
        if home.uses > 0 {
            segment.hot_bytes -= bytes;
        }
        Some((home.slot, home.entry))
    }

    /// Takes a block out of the index for good: out of the footer of its segment too, which is written anew where it was
    /// written already ([`Log::next_unsealed`]). Where the block lay.
    pub fn forget(&mut self, key: &StoreKey) -> Option<(u32, Entry)> {
        let (slot, entry) = self.remove(key)?;
        let segment = &mut self.segments[slot as usize];
        segment.entries.retain(|other| other.offset != entry.offset);
        segment.is_stale |= matches!(segment.state, State::Sealing | State::Sealed);
        Some((slot, entry))
    }

    /// Whether a footer on the disk names blocks that were forgotten, or is being written.
    #[must_use]
    pub fn has_stale(&self) -> bool {
        self.segments.iter().any(|segment| segment.is_stale || segment.state == State::Sealing)
    }

    fn insert(&mut self, slot: u32, entry: Entry, uses: u8) {
        self.remove(&entry.key);
        let bytes = padded(entry.bytes.into());
        self.index.insert(entry.key, Home { slot, uses, entry });
        let segment = &mut self.segments[slot as usize];
        segment.live_bytes += bytes;
        self.live_bytes += bytes;
        if uses > 0 {
            segment.hot_bytes += bytes;
        }
    }

    /// Whether anything can ever be written: false on a disk that was full before there was a segment.
    #[must_use]
    pub fn can_write(&self) -> bool {
        let is_usable = |segment: &Segment| segment.state != State::Lost;
        self.segments.iter().any(is_usable) || self.segments.len() < self.slots_max as usize
    }

    /// A place for a record of these blocks (name and length), or none in the segment that is open.
    pub fn place(&mut self, blocks: &[(StoreKey, u32)]) -> Option<Placed> {
        let slot = self.open?;
        let segment_bytes = self.options.segment_bytes;
        let segment = &mut self.segments[slot as usize];
        let payload: u64 = blocks.iter().map(|(_, bytes)| padded((*bytes).into())).sum();
        let bytes = UNIT + payload;
        let entries_after = segment.entries.len() + segment.reserved + blocks.len();
        let has_room = segment.next + bytes + footer_bytes(entries_after) <= segment_bytes;
        if blocks.is_empty() || blocks.len() > ENTRIES_MAX || !has_room {
            return None;
        }
        let offset = segment.next;
        let mut at = offset + UNIT;
        let place_of = |(key, bytes): &(StoreKey, u32)| {
            let entry = Entry { key: *key, offset: at, bytes: *bytes, checksum: 0, nonce: [0; NONCE_BYTES] };
            at += padded((*bytes).into());
            entry
        };
        let entries = blocks.iter().map(place_of).collect();
        segment.next += bytes;
        segment.writing += 1;
        segment.reserved += blocks.len();
        Some(Placed { slot, header: segment.header, offset, bytes, entries })
    }

    /// A record is written: its blocks can be read from now on. `uses`: what each block has left of uses that it had
    /// elsewhere; none for one that nobody wants any more, which stays out of the index and of the footer.
    pub fn commit(&mut self, placed: &Placed, uses: &[Option<u8>]) {
        if !self.finish(placed) {
            return;
        }
        for (entry, uses) in placed.entries.iter().zip(uses) {
            if let Some(uses) = uses {
                self.segments[placed.slot as usize].entries.push(*entry);
                self.insert(placed.slot, *entry, *uses);
            }
        }
    }

    /// A record was not written; its place stays empty.
    pub fn abandon(&mut self, placed: &Placed) {
        self.finish(placed);
    }

    fn finish(&mut self, placed: &Placed) -> bool {
        let segment = &mut self.segments[placed.slot as usize];
        if segment.header != placed.header {
            return false;
        }
        segment.writing = segment.writing.saturating_sub(1);
        segment.reserved = segment.reserved.saturating_sub(placed.entries.len());
        true
    }

    /// Whether a new segment would have to be made at the end of the file before [`Log::open_next`] finds one.
    #[must_use]
    pub fn needs_growth(&self) -> bool {
        !self.segments.iter().any(|segment| segment.state == State::Free && segment.readers == 0)
            && self.segments.len() < self.slots_max as usize
    }

    /// The file has one more segment.
    pub fn grown(&mut self) {
        self.segments.push(Segment::free());
    }

    /// The disk has no room for another segment: go on with those there are.
    pub fn stop_growing(&mut self) {
        self.slots_max = u32::try_from(self.segments.len()).unwrap_or(u32::MAX);
    }

    /// Try to grow again, up to the cap.
    pub fn resume_growing(&mut self) {
        self.slots_max = self.options.segments_max;
    }

    /// Whether it stopped growing below its cap.
    #[must_use]
    pub fn is_cut_short(&self) -> bool {
        self.slots_max < self.options.segments_max
    }

    /// Closes the open segment and opens a free one, whose header is to be written; none if none is free.
    pub fn open_next(&mut self) -> Option<Opened> {
        let free =
            self.segments.iter().position(|segment| segment.state == State::Free && segment.readers == 0);
        let is_on_its_way = |segment: &Segment| {
            !matches!(segment.state, State::Free | State::Open | State::Lost) || segment.readers > 0
        };
        self.is_wanted = free.is_none();
        let Some(slot) = free else {
            // Nobody else makes room on a disk this small: the open one has to.
            if !self.segments.iter().any(is_on_its_way) {
                self.close();
            }
            return None;
        };
        self.close();
        let seq = self.seq_next;
        self.seq_next += 1;
        let segment = &mut self.segments[slot];
        *segment = Segment::free();
        segment.state = State::Open;
        let header = SegmentHeader { seq, stamp: self.boot.wrapping_add(seq) };
        segment.header = header;
        let slot = u32::try_from(slot).unwrap_or(u32::MAX);
        self.open = Some(slot);
        Some(Opened { slot, header })
    }

    /// Writes no more to the open segment.
    pub fn close(&mut self) {
        if let Some(slot) = self.open.take() {
            let segment = &mut self.segments[slot as usize];
            segment.state =
                if segment.entries.is_empty() && segment.writing == 0 { State::Free } else { State::Closing };
        }
    }

    /// A segment that needs its footer now, or a new one.
    pub fn next_unsealed(&mut self) -> Option<Unsealed> {
        let waits = |segment: &Segment| match segment.state {
            State::Closing => segment.writing == 0,
            State::Sealed => segment.is_stale,
            _ => false,
        };
        let slot = self.segments.iter().position(waits)?;
        let segment = &mut self.segments[slot];
        segment.state = State::Sealing;
        segment.is_stale = false;
        let slot = u32::try_from(slot).unwrap_or(u32::MAX);
        Some(Unsealed { slot, header: segment.header, entries: segment.entries.clone() })
    }

    /// The footer is written, or could not be; without one the segment is read through at the next start.
    pub fn sealed(&mut self, slot: u32) {
        let segment = &mut self.segments[slot as usize];
        if segment.state == State::Sealing {
            segment.state = if segment.entries.is_empty() { State::Free } else { State::Sealed };
        }
    }

    /// Which segment makes room, if one has to: when none is free or to be made, or the index is full.
    pub fn next_victim(&mut self) -> Option<Victim> {
        let makes_room =
            |segment: &Segment| matches!(segment.state, State::Free | State::Cleaning | State::Draining);
        let has_room = self.segments.len() < self.slots_max as usize || self.segments.iter().any(makes_room);
        let is_full = self.index.len() >= self.options.entries_max
            && !self.segments.iter().any(|segment| segment.state == State::Cleaning);
        // As long as nobody writes, what is there may stay.
        let is_written = self.open.is_some() || self.is_wanted;
        if !is_written || (has_room && !is_full) {
            return None;
        }
        let now = self.seq_next;
        let sealed = self.segments.iter().enumerate().filter(|(_, segment)| segment.state == State::Sealed);
        let best = sealed.max_by(|(_, one), (_, other)| {
            let [one, other] =
                [one, other].map(|segment| worth_of_cleaning(segment, now, self.options.segment_bytes));
            one.total_cmp(&other)
        });
        let slot = best?.0;
        self.segments[slot].state = State::Cleaning;
        let slot = u32::try_from(slot).unwrap_or(u32::MAX);
        let mut hot: Vec<(u8, Entry)> = self.segments[slot as usize]
            .entries
            .iter()
            .filter_map(|entry| {
                let home = self.index.get(&entry.key)?;
                (home.slot == slot && home.entry.offset == entry.offset && home.uses > 0)
                    .then_some((home.uses, *entry))
            })
            .collect();
        hot.sort_by_key(|(uses, entry)| (core::cmp::Reverse(*uses), entry.offset));
        // At most half of it, so that room is made however hot it all is.
        let mut left = self.options.segment_bytes / 2;
        let fits = |(_, entry): &(u8, Entry)| {
            let bytes = padded(entry.bytes.into());
            let fits = bytes <= left;
            left -= if fits { bytes } else { 0 };
            fits
        };
        let hot = hot.into_iter().filter(fits).map(|(_, entry)| entry).collect();
        Some(Victim { slot, hot })
    }

    /// The uses that a block of a victim has left when it is written again.
    #[must_use]
    pub fn uses_left(&self, key: &StoreKey) -> u8 {
        self.index.get(key).map_or(0, |home| home.uses.saturating_sub(1))
    }

    /// A victim's hot blocks were written again, or given up: the rest is gone, and the segment is free once nobody reads
    /// it. How many blocks were lost.
    pub fn cleaned(&mut self, slot: u32, reinserted: u64) -> u64 {
        let entries = core::mem::take(&mut self.segments[slot as usize].entries);
        let mut lost = 0;
        for entry in entries {
            if self.is_at(slot, &entry) {
                self.remove(&entry.key);
                lost += 1;
            }
        }
        self.evicted += lost;
        self.reinserted += reinserted;
        let segment = &mut self.segments[slot as usize];
        segment.state = State::Draining;
        if segment.readers == 0 {
            *segment = Segment::free();
        }
        lost
    }

    /// What it holds.
    #[must_use]
    pub fn usage(&self) -> LogUsage {
        let free = self.segments.iter().filter(|segment| segment.state == State::Free).count();
        LogUsage {
            blocks: self.index.len() as u64,
            live_bytes: self.live_bytes,
            hot_bytes: self.segments.iter().map(|segment| segment.hot_bytes).sum(),
            segments: u32::try_from(self.segments.len()).unwrap_or(u32::MAX),
            segments_free: u32::try_from(free).unwrap_or(u32::MAX),
            evicted: self.evicted,
            reinserted: self.reinserted,
        }
    }

    /// Checks what must always hold.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self) -> Result<(), String> {
        let mut live = vec![(0, 0); self.segments.len()];
        let mut spans: Vec<(u32, u64, u64)> = Vec::new();
        for (key, home) in &self.index {
            let bytes = padded(home.entry.bytes.into());
            let segment = &self.segments[home.slot as usize];
            if *key != home.entry.key || matches!(segment.state, State::Free | State::Draining) {
                return Err(format!("{key} lies in a segment that is {:?}", segment.state));
            }
            if home.entry.offset + bytes > segment.next || segment.next > self.options.segment_bytes {
                return Err(format!("{key} lies beyond what was written"));
            }
            live[home.slot as usize].0 += bytes;
            live[home.slot as usize].1 += if home.uses > 0 { bytes } else { 0 };
            spans.push((home.slot, home.entry.offset, bytes));
        }
        spans.sort_unstable();
        if let Some(pair) =
            spans.windows(2).find(|pair| pair[0].0 == pair[1].0 && pair[0].1 + pair[0].2 > pair[1].1)
        {
            return Err(format!("two blocks overlap: {pair:?}"));
        }
        for (slot, (segment, live)) in self.segments.iter().zip(&live).enumerate() {
            if (segment.live_bytes, segment.hot_bytes) != *live {
                return Err(format!("segment {slot} counts {segment:?}, and holds {live:?}"));
            }
        }
        if self.live_bytes != live.iter().map(|(bytes, _)| bytes).sum::<u64>() {
            return Err("the sum of live bytes is wrong".to_owned());
        }
        let open = self.segments.iter().filter(|segment| segment.state == State::Open).count();
        if open != usize::from(self.open.is_some())
            || self.segments.len() > self.options.segments_max as usize
        {
            return Err(format!("{open} open segments of {}", self.segments.len()));
        }
        Ok(())
    }
}

/// How much there is to gain by cleaning a segment: the older and the emptier, the more. What is cold but still there
/// counts a quarter, because it is lost and not copied.
fn worth_of_cleaning(segment: &Segment, seq_now: u64, segment_bytes: u64) -> f64 {
    let cold = segment.live_bytes - segment.hot_bytes;
    let kept = (segment.hot_bytes as f64 + cold as f64 / 4.0) / segment_bytes as f64;
    let age = seq_now.saturating_sub(segment.header.seq) as f64;
    if segment.live_bytes == 0 { f64::MAX } else { (1.0 - kept) * age / (1.0 + kept) }
}

#[cfg(test)]
mod tests;
