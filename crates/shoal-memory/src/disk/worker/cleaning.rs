//! Making room: what is hot in a segment is read, verified and written again; then the segment is free.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use shoal_core::store::format::{Entry, padded};
use shoal_core::store::log::{Log, Victim};

use super::super::medium::Verb;
use super::records::PendingPut;
use super::{Flight, Worker};
use crate::store::Buffer;

/// Blocks of a victim that are in memory at a time.
const UNDER_WAY_MAX: usize = 8;

/// A segment that makes room.
pub(super) struct Cleaning {
    pub(super) slot: u32,
    to_read: VecDeque<Entry>,
    /// Being read, waiting to be written, or being written.
    under_way: usize,
    written: u64,
}

impl Worker {
    pub(super) fn clean(&mut self) {
        if self.is_closing() {
            return;
        }
        if self.cleaning.is_none() {
            let Some(Victim { slot, hot }) = self.with_log(Log::next_victim) else { return };
            self.cleaning = Some(Cleaning { slot, to_read: hot.into(), under_way: 0, written: 0 });
        }
        let Some(cleaning) = &mut self.cleaning else { return };
        let slot = cleaning.slot;
        let mut entries = Vec::new();
        while cleaning.under_way < UNDER_WAY_MAX {
            let Some(entry) = cleaning.to_read.pop_front() else { break };
            cleaning.under_way += 1;
            entries.push(entry);
        }
        let is_over = cleaning.under_way == 0 && cleaning.to_read.is_empty();
        let written = cleaning.written;
        for entry in entries {
            let bytes = usize::try_from(padded(entry.bytes.into())).unwrap_or(usize::MAX);
            let offset = u64::from(slot) * self.segment_bytes + entry.offset;
            let flight = Flight::CleanRead { slot, entry };
            self.start(flight, Verb::Read, offset, Some(Buffer::zeroed(bytes)), bytes);
        }
        if is_over {
            self.cleaning = None;
            self.erase(slot);
            let lost = self.with_log(|log| log.cleaned(slot, written));
            tracing::debug!(slot, lost, written, "a segment of the disk tier made room");
        }
    }

    /// A hot block was read, or not.
    pub(super) fn clean_read(
        &mut self,
        slot: u32,
        entry: Entry,
        result: io::Result<usize>,
        buffer: Option<Buffer>,
        now: Instant,
    ) {
        match self.verify(slot, &entry, result, buffer, now) {
            // Before the others: those wait for the room that this makes.
            Ok(buffer) if self.with_log(|log| log.is_at(slot, &entry)) => {
                self.puts.push_front(PendingPut::again(slot, entry, buffer, now));
            }
            _ => self.again_is_over(false),
        }
    }

    /// A hot block was written again, or given up.
    pub(super) fn again_is_over(&mut self, is_written: bool) {
        if let Some(cleaning) = &mut self.cleaning {
            cleaning.under_way = cleaning.under_way.saturating_sub(1);
            cleaning.written += u64::from(is_written);
        }
    }
}
