//! The way up: from the tier to blocks of the device.
//!
//! Apart because it is what a request waits for. Reads are asked for ahead of the copies; the first miss, or the deadline,
//! ends it, and what arrived before in a row is used.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::kv::prefix::Start;
use shoal_device::HostBuffer;

use super::Inner;
use super::choice::Watch;
use crate::error::MemoryError;
use crate::store::{Buffer, Fetched, Miss, StoreKey, Ticket};
use crate::transfer::Shared;

/// Bytes that are asked of the tier ahead of what is done with them.
const AHEAD_BYTES: usize = 32 << 20;

/// The least that a load waits for its turn with what has come.
const TURN_WAIT: Duration = Duration::from_millis(20);

/// Blocks of one sequence on their way.
struct Wanted<'a> {
    tokens: &'a [u32],
    /// The number of the first in the sequence.
    first: usize,
    keys: &'a [StoreKey],
    ids: &'a [u32],
    deadline: Instant,
}

impl Inner {
    pub(super) fn load(&self, salt: &[u8], tokens: &[u32], held: &[u32]) -> Vec<u32> {
        let full = tokens.len() / self.block_tokens;
        let Some(looked_up) = full.checked_sub(held.len()).filter(|blocks| *blocks > 0) else {
            return Vec::new();
        };
        self.count(|counts| counts.looked_up += looked_up as u64);
        let begun = Instant::now();
        let mut keys = self.keys(salt, tokens);
        keys.drain(..held.len());
        let mut parts: Vec<usize> = keys.iter().map_while(|key| self.store.part_of(key)).collect();
        let there = if parts.is_empty() { 0 } else { self.choose(tokens.len(), held.len(), &parts) };
        if there == 0 {
            return Vec::new();
        }
        parts.truncate(there);
        let deadline = begun + self.options.load_wait;
        if !self.bring_rest_back(deadline) {
            return Vec::new();
        }
        let mut ids = vec![0_u32; there];
        if !self.cache.alloc(0, &mut ids).unwrap_or_else(|error| {
            tracing::warn!(%error, "no blocks for what a tier has");
            false
        }) {
            self.count(|counts| counts.failed += 1);
            return Vec::new();
        }
        let wanted = Wanted { tokens, first: held.len(), keys: &keys[..there], ids: &ids, deadline };
        let loaded = self.bring(&wanted, Watch::new(parts));
        self.give_back(&ids.split_off(loaded));
        if !ids.is_empty() {
            let blocks = [held, &ids].concat();
            let sealed = &tokens[..blocks.len() * self.block_tokens];
            if let Err(error) = self.cache.seal(Start::Salt(salt), sealed, &[&blocks]) {
                tracing::warn!(%error, "blocks from a tier cannot be used");
                self.give_back(&std::mem::take(&mut ids));
            }
            // They came from where copies go.
            self.are_copied(|cache| cache.copied(&ids));
        }
        let (blocks, took) = (ids.len() as u64, begun.elapsed());
        self.count(|counts| {
            counts.loaded += blocks;
            counts.loaded_bytes += ByteCount(blocks * self.block_bytes as u64);
            counts.load_us += u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        });
        tracing::debug!(looked_up, there, blocks, ?took, "loaded KV blocks from a tier");
        ids
    }

    /// Brings back what of the cache itself was evicted, as the next step would: it may be what somebody owned as the model
    /// was put to sleep. Copies between blocks and host memory need the whole cache on the device.
    fn bring_rest_back(&self, deadline: Instant) -> bool {
        let region = self.cache.region();
        if region.missing_bytes().is_zero() {
            return true;
        }
        match region.restore_now(
            ByteCount(u64::MAX),
            deadline,
            &Shared::default(),
            "a prefix that a tier has",
        ) {
            Ok(_) => true,
            Err(error) => {
                tracing::debug!(%error, "the cache is not on the device, so nothing is loaded to it");
                self.count(|counts| counts.failed += 1);
                false
            }
        }
    }

    /// Reads blocks and copies them to the device; how many in a row are there.
    fn bring(&self, wanted: &Wanted<'_>, mut watch: Watch) -> usize {
        let Some(stage) = self.up.try_lock_until(wanted.deadline) else {
            self.count(|counts| counts.late += 1);
            return 0;
        };
        let stage_blocks = self.stage_blocks(&stage);
        let ahead = self.blocks_ahead();
        let mut tickets: VecDeque<Ticket<Fetched>> = VecDeque::new();
        let mut spare: Vec<Buffer> = Vec::new();
        let (mut asked, mut staged, mut loaded, mut is_late) = (0, 0, 0, false);
        loop {
            while asked < wanted.keys.len() && tickets.len() < ahead {
                let target = spare.pop().unwrap_or_else(|| Buffer::zeroed(self.payload_bytes));
                let left = wanted.deadline.saturating_duration_since(Instant::now());
                tickets.push_back(self.store.get(wanted.keys[asked], target, left));
                asked += 1;
            }
            let Some(ticket) = tickets.pop_front() else { break };
            match ticket.wait() {
                Ok(fetched) if self.is_right(wanted, loaded + staged, fetched.as_slice()) => {
                    let (at, bytes) = (staged * self.block_bytes, &fetched.as_slice()[..self.block_bytes]);
                    if let Err(error) = stage.write(ByteCount(at as u64), bytes) {
                        tracing::warn!(%error, "cannot write host memory");
                        self.count(|counts| counts.failed += 1);
                        break;
                    }
                    staged += 1;
                    spare.push(fetched.buffer);
                }
                Ok(_) => {
                    // Another content of the same hash, or a program that puts other things.
                    self.count(|counts| counts.corrupt += 1);
                    break;
                }
                Err(miss) => {
                    tracing::debug!(%miss, "a block of a tier does not come");
                    is_late = miss == Miss::Deadline;
                    self.count(|counts| super::count_miss(counts, &miss));
                    break;
                }
            }
            if staged == stage_blocks {
                if !self.copy_up(wanted, loaded, staged, &stage) {
                    staged = 0;
                    break;
                }
                self.have_arrived(&mut watch, staged);
                (loaded, staged) = (loaded + staged, 0);
            }
        }
        for ticket in tickets {
            ticket.cancel();
        }
        if staged > 0 && self.copy_up(wanted, loaded, staged, &stage) {
            self.have_arrived(&mut watch, staged);
            loaded += staged;
        }
        self.have_ended(watch, is_late);
        loaded
    }

    /// Whether what was read is that block of the sequence.
    fn is_right(&self, wanted: &Wanted<'_>, block: usize, read: &[u8]) -> bool {
        let trailer = self.trailer(wanted.tokens, wanted.first + block);
        read.len() == self.payload_bytes && read[self.block_bytes..].starts_with(&trailer)
    }

    /// Copies staged blocks to the device and waits for it.
    fn copy_up(&self, wanted: &Wanted<'_>, from: usize, blocks: usize, stage: &Arc<HostBuffer>) -> bool {
        match self.try_copy_up(&wanted.ids[from..from + blocks], stage, wanted.deadline) {
            Ok(is_done) => {
                if !is_done {
                    self.count(|counts| counts.failed += 1);
                }
                is_done
            }
            Err(error) => {
                tracing::warn!(%error, "cannot copy blocks of a tier to the device");
                self.count(|counts| counts.failed += 1);
                // They are given back, and nothing may be written to them any more then.
                self.cache.shared.manager().settle();
                false
            }
        }
    }

    fn try_copy_up(&self, ids: &[u32], stage: &Arc<HostBuffer>, by: Instant) -> Result<bool, MemoryError> {
        let region = self.cache.region();
        let manager = region.manager();
        let deadline = manager.operation_deadline();
        // In turn, so that nothing is evicted meanwhile. Who has it may keep it for longer than a step can wait; a wake of
        // the weights lends it, and these copies come after those that it has queued by now.
        let _turn = match manager.take_or_borrow_turn(by.max(Instant::now() + TURN_WAIT)) {
            Err(MemoryError::Deadline { .. }) => return Ok(false),
            turn => turn?,
        };
        if !region.missing_bytes().is_zero() || !self.after_steps(&manager.up)? {
            return Ok(false);
        }
        let done = region.load_blocks(&self.copies(ids, stage), None)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if done
            .wait(left.max(Duration::from_millis(1)))
            .map_err(MemoryError::device("copy blocks to the device"))?
        {
            return Ok(true);
        }
        Err(MemoryError::Deadline { doing: "copying blocks to the device", waited: left })
    }

    /// Blocks that are asked of the tier ahead of what is done with them.
    pub(super) fn blocks_ahead(&self) -> usize {
        (AHEAD_BYTES / self.payload_bytes).clamp(1, 256)
    }

    pub(super) fn give_back(&self, ids: &[u32]) {
        if ids.is_empty() {
            return;
        }
        if let Err(error) = self.cache.free(0, ids) {
            tracing::error!(%error, "blocks that a tier did not fill cannot be freed");
        }
    }
}
