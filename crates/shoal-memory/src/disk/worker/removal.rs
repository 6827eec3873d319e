//! Blocks that are forgotten, on the disk too.
//!
//! Out of the index at once; then the block's first bytes are overwritten, so that its checksum is wrong for ever, its
//! segment's footer is written without it, and older copies of it are made unreadable. Then it is gone for good.

use shoal_core::store::format::{Entry, UNIT_LEN, write_removed};
use shoal_core::store::key::StoreKey;

use super::super::medium::Verb;
use super::{Flight, Worker};
use crate::store::{Aligned, Buffer, Miss, Promise};

impl Worker {
    /// Forgets a block: out of the index at once, and on the disk its first bytes are overwritten, so that its checksum is
    /// wrong for ever.
    pub(super) fn take_remove(&mut self, key: &StoreKey, promise: Promise<bool>) {
        // One that is being written is forgotten as soon as it is there.
        let is_coming = self.forget_coming(key);
        let removed = self.with_log(|log| log.forget(key));
        // What makes room has an older copy of what was written again.
        if let Some(slot) = self.cleaning.as_ref().map(|cleaning| cleaning.slot) {
            self.erase(slot);
        }
        match removed {
            Some((slot, entry)) => self.scratch(slot, &entry, Some(promise)),
            None => promise.answer(Ok(is_coming)),
        }
    }

    /// Makes a block on the disk unreadable.
    pub(super) fn scratch(&mut self, slot: u32, entry: &Entry, promise: Option<Promise<bool>>) {
        self.with_log(|log| log.pin(slot));
        let mut removed = Box::new([0; UNIT_LEN]);
        write_removed(self.secret, &entry.key, &mut removed);
        let buffer = Some(Buffer::Own(Aligned::copy_of(&*removed)));
        let offset = u64::from(slot) * self.segment_bytes + entry.offset;
        self.start(Flight::Scratch { slot, promise }, Verb::Write, offset, buffer, UNIT_LEN);
    }

    /// Makes a segment on the disk unreadable.
    pub(super) fn erase(&mut self, slot: u32) {
        self.with_log(|log| log.pin(slot));
        self.erasing += 1;
        let zeroes = Some(Buffer::Own(Aligned::zeroed(UNIT_LEN)));
        let offset = u64::from(slot) * self.segment_bytes;
        self.start(Flight::Erase { slot }, Verb::Write, offset, zeroes, UNIT_LEN);
    }

    /// Tells those whose block is gone for good: no footer names it any more, and no older copy is left.
    pub(super) fn answer_removals(&mut self) {
        if self.removed.is_empty() {
            return;
        }
        let is_needed = |flight: &Flight| {
            matches!(
                flight,
                Flight::Erase { .. }
                    | Flight::BeforeFooter { .. }
                    | Flight::Footer { .. }
                    | Flight::FooterSync { .. }
            )
        };
        let hangs = self.flights.values().any(|flown| flown.is_late && is_needed(&flown.flight));
        if !hangs && (self.erasing > 0 || self.with_log(|log| log.has_stale())) {
            return;
        }
        let is_unsure = std::mem::take(&mut self.is_unsure) || hangs;
        for promise in self.removed.drain(..) {
            let reason = "it is not served, but may be again after a restart".to_owned();
            let miss = Miss::Failed { doing: "cannot remove a block from the disk", reason };
            promise.answer(if is_unsure { Err(miss) } else { Ok(true) });
        }
    }
}
