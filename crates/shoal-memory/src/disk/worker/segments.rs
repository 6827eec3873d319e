//! Segments begun and finished: room, header, footer, in an order that a crash cannot mistake.

use std::io;
use std::time::Instant;

use shoal_core::store::format::{UNIT_LEN, write_footer, write_segment_header};
use shoal_core::store::log::{Log, Unsealed};

use super::super::medium::Verb;
use super::{Flight, GROW_AGAIN, Worker};
use crate::store::{Aligned, Buffer};

impl Worker {
    /// Gives segments their footers.
    pub(super) fn seal(&mut self) {
        let is_last = self.is_closing() && self.puts.is_empty() && self.records.is_empty();
        if is_last {
            self.with_log(Log::close);
        }
        while let Some(Unsealed { slot, header, entries }) = self.with_log(Log::next_unsealed) {
            // What a footer names has to be on the disk before it.
            let footer = write_footer(self.secret, header.stamp, &entries);
            self.start(Flight::BeforeFooter { slot, footer }, Verb::Sync, 0, None, 0);
        }
    }

    /// Opens the next segment, making the file longer if it may be. Whether there is one.
    pub(super) fn open_segment(&mut self, now: Instant) -> bool {
        if self.with_log(|log| log.needs_growth()) {
            let slots = self.with_log(|log| u64::from(log.usage().segments));
            match self.medium.grow((slots + 1) * self.segment_bytes) {
                Ok(()) => self.with_log(Log::grown),
                Err(error) => {
                    tracing::warn!(%error, "the disk tier cannot grow, and goes on with what it has");
                    self.with_log(Log::stop_growing);
                    self.grow_again = Some(now + GROW_AGAIN);
                    let is_full =
                        matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
                    if !is_full {
                        self.failed("cannot make room on the disk", &error, now);
                    }
                }
            }
        }
        let Some(opened) = self.with_log(Log::open_next) else { return false };
        let mut header = Box::new([0; UNIT_LEN]);
        write_segment_header(self.secret, opened.header, self.segment_bytes, &mut header);
        let buffer = Some(Buffer::Own(Aligned::copy_of(&*header)));
        // A header that comes late must not meet a later one of the same place.
        self.with_log(|log| log.pin(opened.slot));
        let at = u64::from(opened.slot) * self.segment_bytes;
        self.start(Flight::Header { slot: opened.slot }, Verb::Write, at, buffer, UNIT_LEN);
        self.header = Some(opened.slot);
        true
    }

    /// The open segment has its header, or it cannot be used. Until then nothing is written to it: whoever finds the old
    /// header after a crash must find what it stood for.
    pub(super) fn header_is_done(&mut self, slot: u32, is_written: bool, now: Instant) {
        if self.header != Some(slot) {
            return;
        }
        self.header = None;
        let held = std::mem::take(&mut self.held);
        if is_written {
            self.writes.extend(held);
            return;
        }
        self.with_log(Log::close);
        for op in held {
            let flown = self.flights.remove(&op.token);
            if let Some(Flight::Part { record, bytes } | Flight::Staged { record, bytes }) =
                flown.map(|flown| flown.flight)
            {
                let error = io::Error::other("its segment's header could not be written");
                self.part_is_done(record, bytes, Err(error), now);
            }
        }
    }
}
