//! Blocks on their way down: gathered to records, written, and only then in the index.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::store::format::{ENTRIES_MAX, Entry, UNIT, UNIT_LEN, padded, write_record_header};
use shoal_core::store::key::StoreKey;
use shoal_core::store::log::Placed;

use super::super::medium::Verb;
use super::super::queue::Shared;
use super::{Flight, Worker};
use crate::store::{Aligned, Buffer, Miss, Promise, Stored};

/// From this length on a block is written from where it lies; shorter ones are copied together.
const DIRECT_BYTES_MIN: u64 = 64 << 10;

/// A block that waits to be written.
pub(super) struct PendingPut {
    pub(super) key: StoreKey,
    source: Buffer,
    bytes: u32,
    pub(super) since: Instant,
    pub(super) number: u64,
    kind: Kind,
}

enum Kind {
    /// Somebody put it, or several did; none is left where all waited too long.
    Asked(Vec<Promise<Stored>>),
    /// A hot block of a segment that makes room.
    Again { slot: u32, entry: Entry },
    /// It was removed while it was written.
    Forgotten,
}

impl Kind {
    /// Answers everybody; of several who put the same the first wrote it.
    fn answer(self, answer: &Result<Stored, Miss>) {
        if let Self::Asked(promises) = self {
            for (index, promise) in promises.into_iter().enumerate() {
                let is_later = index > 0 && answer.is_ok();
                promise.answer(if is_later { Ok(Stored::Already) } else { answer.clone() });
            }
        }
    }

    /// Answers those who waited too long.
    fn expire(&mut self, now: Instant) {
        if let Self::Asked(promises) = self {
            promises
                .extract_if(.., |promise| promise.deadline() <= now)
                .for_each(|promise| promise.answer(Err(Miss::Deadline)));
        }
    }
}

impl PendingPut {
    pub(super) fn again(slot: u32, entry: Entry, source: Buffer, since: Instant) -> Self {
        let kind = Kind::Again { slot, entry };
        Self { key: entry.key, source, bytes: entry.bytes, since, number: u64::MAX, kind }
    }

    pub(super) fn is_asked(&self) -> bool {
        !matches!(self.kind, Kind::Again { .. })
    }

    pub(super) fn refuse(self, miss: Miss, shared: &Arc<Shared>) {
        if self.is_asked() {
            shared.put_is_over(u64::from(self.bytes));
        }
        self.kind.answer(&Err(miss));
    }
}

/// A block of a record, while that is written.
struct InRecord {
    key: StoreKey,
    bytes: u32,
    kind: Kind,
}

/// A record that is being written.
pub(super) struct RecordFlight {
    placed: Placed,
    blocks: Vec<InRecord>,
    parts_left: usize,
    failed: Option<String>,
    pub(super) oldest: u64,
}

impl RecordFlight {
    pub(super) fn refuse(self, miss: &Miss, shared: &Arc<Shared>) {
        for block in self.blocks {
            if !matches!(block.kind, Kind::Again { .. }) {
                shared.put_is_over(u64::from(block.bytes));
            }
            block.kind.answer(&Err(miss.clone()));
        }
    }

    /// Answers everybody; the record goes on.
    pub(super) fn give_up(&mut self, miss: &Miss) {
        for block in &mut self.blocks {
            if let Kind::Asked(promises) = &mut block.kind {
                promises.drain(..).for_each(|promise| promise.answer(Err(miss.clone())));
            }
        }
    }

    /// Answers whoever waited too long; the record goes on.
    pub(super) fn look(&mut self, now: Instant) {
        for block in &mut self.blocks {
            block.kind.expire(now);
        }
    }
}

impl Worker {
    pub(super) fn take_put(
        &mut self,
        key: StoreKey,
        source: Buffer,
        bytes: u32,
        promise: Promise<Stored>,
        now: Instant,
    ) {
        let bytes_max = self.with_log(|log| log.options().block_bytes_max());
        let is_there = self.with_log(|log| log.contains(&key));
        let answer = if promise.is_cancelled() {
            Some(Err(Miss::Cancelled))
        } else if promise.deadline() <= now {
            Some(Err(Miss::Deadline))
        } else if is_there {
            Some(Ok(Stored::Already))
        } else if u64::from(bytes) > bytes_max {
            Some(Err(Miss::TooLong { bytes: bytes.into(), bytes_max }))
        } else {
            None
        };
        if let Some(answer) = answer {
            self.shared.put_is_over(u64::from(bytes));
            return promise.answer(answer);
        }
        if self.writing.contains(&key) {
            // It is there when the one that came before is.
            self.shared.put_is_over(u64::from(bytes));
            if let Some(Kind::Asked(promises)) = self.coming(&key).find(|kind| matches!(kind, Kind::Asked(_)))
            {
                promises.push(promise);
            }
            return;
        }
        self.writing.insert(key);
        let number = self.put_next;
        self.put_next += 1;
        self.puts.push_back(PendingPut {
            key,
            source,
            bytes,
            since: now,
            number,
            kind: Kind::Asked(vec![promise]),
        });
    }

    /// Blocks of a name that wait or are being written.
    fn coming(&mut self, key: &StoreKey) -> impl Iterator<Item = &mut Kind> {
        let waiting = self.puts.iter_mut().filter(|put| put.key == *key).map(|put| &mut put.kind);
        let written = self.records.values_mut().flat_map(|record| &mut record.blocks);
        waiting.chain(written.filter(|block| block.key == *key).map(|block| &mut block.kind))
    }

    /// Forgets a block that waits or is being written. Whether there was one.
    pub(super) fn forget_coming(&mut self, key: &StoreKey) -> bool {
        let mut was_coming = false;
        for kind in self.coming(key).filter(|kind| matches!(kind, Kind::Asked(_))) {
            was_coming = true;
            std::mem::replace(kind, Kind::Forgotten).answer(&Err(Miss::Cancelled));
        }
        // It may be put anew while the old one is still under way.
        self.writing.remove(key);
        was_coming
    }

    pub(super) fn look_at_puts(&mut self, now: Instant) {
        for put in &mut self.puts {
            put.kind.expire(now);
        }
        let is_over = |put: &PendingPut| match &put.kind {
            Kind::Asked(promises) => promises.iter().all(Promise::is_cancelled),
            Kind::Forgotten => true,
            Kind::Again { .. } => false,
        };
        if !self.puts.iter().any(is_over) {
            return;
        }
        let (over, left): (Vec<_>, Vec<_>) = std::mem::take(&mut self.puts).into_iter().partition(is_over);
        self.puts = left.into();
        for put in over {
            if matches!(put.kind, Kind::Asked(_)) {
                self.writing.remove(&put.key);
            }
            put.refuse(Miss::Cancelled, &self.shared);
        }
    }

    /// Whether a record should be written now: it is full, its first block waited long enough, or somebody waits for all.
    fn has_record(&self, now: Instant) -> bool {
        let Some(first) = self.puts.front() else { return false };
        if self.is_closing() || !self.flushes.is_empty() || !first.is_asked() {
            return true;
        }
        let payload: u64 = self.puts.iter().take(ENTRIES_MAX).map(|put| padded(put.bytes.into())).sum();
        payload >= self.record_bytes
            || self.puts.len() >= ENTRIES_MAX
            || now.saturating_duration_since(first.since) >= self.options.linger
    }

    pub(super) fn form_records(&mut self, now: Instant) {
        // Twice what the disk takes at a time is ready; more would only wait elsewhere.
        while self.writes.len() + self.held.len() < self.medium.depth() && self.has_record(now) {
            let (mut payload, mut count) = (0, 0);
            for put in self.puts.iter().take(ENTRIES_MAX) {
                let bytes = padded(put.bytes.into());
                if count > 0 && payload + bytes > self.record_bytes {
                    break;
                }
                payload += bytes;
                count += 1;
            }
            let items: Vec<_> = self.puts.iter().take(count).map(|put| (put.key, put.bytes)).collect();
            let mut placed = self.with_log(|log| log.place(&items));
            if placed.is_none() && self.open_segment(now) {
                placed = self.with_log(|log| log.place(&items));
            }
            let Some(placed) = placed else {
                if !self.cannot_place() {
                    return;
                }
                continue;
            };
            let puts: Vec<_> = self.puts.drain(..count).collect();
            self.write_record(placed, puts, now);
            // The disk has work while the next one is hashed.
            self.pump(now);
            self.medium.wait(Duration::ZERO);
        }
    }

    /// There is no room for the first block. Whether it was given up, so that the next may be tried.
    fn cannot_place(&mut self) -> bool {
        let Some(first) = self.puts.front() else { return false };
        let is_again = !first.is_asked();
        if !is_again && self.with_log(|log| log.can_write()) {
            // Room is being made.
            return false;
        }
        let Some(put) = self.puts.pop_front() else { return false };
        if is_again {
            // It would make room by needing room: it is lost with its segment.
            self.again_is_over(false);
        } else {
            if matches!(put.kind, Kind::Asked(_)) {
                self.writing.remove(&put.key);
            }
            let reason = "the disk is full and holds nothing of this tier".to_owned();
            put.refuse(Miss::NoRoom { reason }, &self.shared);
        }
        true
    }

    fn write_record(&mut self, placed: Placed, puts: Vec<PendingPut>, now: Instant) {
        let is_direct = puts.iter().all(|put| {
            u64::from(put.bytes) >= DIRECT_BYTES_MIN && put.source.is_direct_source(put.bytes as usize)
        });
        // What is encrypted is another block's bytes than those that somebody lent for reading.
        if is_direct && !self.codec.is_sealing() {
            self.write_parts(placed, puts);
        } else {
            self.write_together(placed, puts, now);
        }
    }

    /// Each block from where it lies.
    fn write_parts(&mut self, mut placed: Placed, puts: Vec<PendingPut>) {
        for (entry, put) in placed.entries.iter_mut().zip(&puts) {
            let payload = put.source.as_slice().get(..put.bytes as usize).unwrap_or_default();
            self.codec.note(entry, payload);
        }
        let header = Some(Buffer::Own(Aligned::copy_of(&*self.header_of(&placed))));
        let record = self.next_record();
        let base = u64::from(placed.slot) * self.segment_bytes;
        let flight = Flight::Part { record, bytes: UNIT_LEN };
        self.start(flight, Verb::Write, base + placed.offset, header, UNIT_LEN);
        let mut oldest = u64::MAX;
        let mut blocks = Vec::with_capacity(puts.len());
        let mut parts_left = 1;
        for (put, entry) in puts.into_iter().zip(&placed.entries) {
            let PendingPut { key, source, bytes, number, kind, .. } = put;
            oldest = oldest.min(number);
            blocks.push(InRecord { key, bytes, kind });
            let at = base + entry.offset;
            let bytes = bytes as usize;
            self.start(Flight::Part { record, bytes }, Verb::Write, at, Some(source), bytes);
            parts_left += 1;
        }
        self.records.insert(record, RecordFlight { placed, blocks, parts_left, failed: None, oldest });
    }

    /// All blocks copied together, and encrypted where there is a key.
    fn write_together(&mut self, mut placed: Placed, puts: Vec<PendingPut>, now: Instant) {
        let length = usize::try_from(placed.bytes).unwrap_or(usize::MAX);
        let mut all = self.take_staging(length);
        let mut oldest = u64::MAX;
        let mut blocks = Vec::with_capacity(puts.len());
        let mut is_closed = true;
        for (put, entry) in puts.into_iter().zip(&mut placed.entries) {
            let PendingPut { key, source, bytes, number, kind, .. } = put;
            let at = usize::try_from(entry.offset - placed.offset).unwrap_or(usize::MAX);
            let payload = source.as_slice().get(..bytes as usize).unwrap_or_default();
            let end = at + payload.len();
            let memory = all.as_mut_slice();
            memory[at..end].copy_from_slice(payload);
            is_closed &= self.codec.close(entry, &mut memory[at..end]);
            memory[end..end.next_multiple_of(UNIT_LEN)].fill(0);
            oldest = oldest.min(number);
            blocks.push(InRecord { key, bytes, kind });
        }
        let mut flight = RecordFlight { placed, blocks, parts_left: 1, failed: None, oldest };
        if !is_closed {
            // Nothing of it reaches the disk.
            flight.failed = Some("it cannot be encrypted: the system gives no random numbers".to_owned());
            self.keep_staging(all);
            return self.record_is_done(flight, now);
        }
        all.as_mut_slice()[..UNIT_LEN].copy_from_slice(&*self.header_of(&flight.placed));
        let record = self.next_record();
        let at = u64::from(flight.placed.slot) * self.segment_bytes + flight.placed.offset;
        self.start(Flight::Staged { record, bytes: length }, Verb::Write, at, Some(Buffer::Own(all)), length);
        self.records.insert(record, flight);
    }

    fn header_of(&self, placed: &Placed) -> Box<[u8; UNIT_LEN]> {
        let mut header = Box::new([0; UNIT_LEN]);
        let Placed { header: segment, offset, bytes, entries, .. } = placed;
        write_record_header(self.secret, segment.stamp, *offset, *bytes, entries, &mut header);
        header
    }

    fn next_record(&mut self) -> u64 {
        let record = self.record_next;
        self.record_next += 1;
        record
    }

    /// Memory for a record of so many bytes; what is in it is of an earlier one.
    fn take_staging(&mut self, bytes: usize) -> Aligned {
        let fits = |memory: &Aligned| memory.as_slice().len() >= bytes;
        match self.staging.iter().position(fits) {
            Some(at) => self.staging.swap_remove(at),
            None => Aligned::zeroed(bytes.max(self.staging_bytes())),
        }
    }

    pub(super) fn keep_staging(&mut self, memory: Aligned) {
        if self.staging.len() < self.medium.depth() && memory.as_slice().len() == self.staging_bytes() {
            self.staging.push(memory);
        }
    }

    /// The longest record of several blocks.
    fn staging_bytes(&self) -> usize {
        usize::try_from(UNIT + padded(self.record_bytes)).unwrap_or(usize::MAX)
    }

    pub(super) fn part_is_done(
        &mut self,
        record: u64,
        bytes: usize,
        result: io::Result<usize>,
        now: Instant,
    ) {
        let Some(flight) = self.records.get_mut(&record) else { return };
        flight.parts_left -= 1;
        let error = match result {
            Ok(written) if written == bytes => None,
            Ok(written) => Some(format!("stopped after {written} of {bytes} bytes")),
            Err(error) => Some(error.to_string()),
        };
        if let Some(error) = error {
            flight.failed.get_or_insert(error);
        }
        if flight.parts_left > 0 {
            return;
        }
        let Some(flight) = self.records.remove(&record) else { return };
        self.record_is_done(flight, now);
    }

    fn record_is_done(&mut self, flight: RecordFlight, now: Instant) {
        let RecordFlight { placed, blocks, failed, .. } = flight;
        let doing = "cannot write a record";
        if let Some(reason) = &failed {
            self.with_log(|log| log.abandon(&placed));
            self.failed(doing, reason, now);
        } else {
            self.shared.notes.lock().counts.blocks_written += blocks.len() as u64;
            let uses: Vec<_> = self.with_log(|log| {
                let uses_of = |block: &InRecord| match &block.kind {
                    Kind::Asked(_) => Some(0),
                    // Removed meanwhile, it does not come back.
                    Kind::Again { slot, entry } => log.is_at(*slot, entry).then(|| log.uses_left(&block.key)),
                    Kind::Forgotten => None,
                };
                let uses: Vec<_> = blocks.iter().map(uses_of).collect();
                log.commit(&placed, &uses);
                uses
            });
            for (entry, _) in placed.entries.iter().zip(uses).filter(|(_, uses)| uses.is_none()) {
                self.scratch(placed.slot, entry, None);
            }
        }
        for block in blocks {
            match block.kind {
                Kind::Again { .. } => self.again_is_over(failed.is_none()),
                Kind::Asked(_) => {
                    self.writing.remove(&block.key);
                    self.shared.put_is_over(u64::from(block.bytes));
                    block.kind.answer(&match &failed {
                        None => Ok(Stored::Written),
                        Some(reason) => Err(Miss::Failed { doing, reason: reason.clone() }),
                    });
                }
                Kind::Forgotten => self.shared.put_is_over(u64::from(block.bytes)),
            }
        }
    }
}
