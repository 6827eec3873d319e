//! The way down: from sealed blocks to the tier.
//!
//! Apart because nobody waits for it. Its thread takes one sequence after another, copies what the tier lacks to host memory
//! a few blocks at a time, and hands it on; bytes that the tier has not written yet are bounded. Until a block is copied the
//! cache lets others go before it, for a few rounds; where nothing can be copied for now it waits a while, and then gives up.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::kv::prefix::Found;
use shoal_device::{DeviceError, HostBuffer};

use super::{Inner, Sequence};
use crate::error::MemoryError;
use crate::store::{Aligned, Buffer, Offer, StoreKey, Stored, Ticket};

/// Bytes that may be on their way to the tier.
const UNDER_WAY_BYTES_MAX: usize = 64 << 20;
/// Bytes that are copied to where they stay with one turn.
const ROOM_BYTES: usize = 64 << 20;
/// How often the thread looks whether what it waits for is done.
const LOOK: Duration = Duration::from_millis(1);

/// How often it looks whether blocks can be copied again.
const AGAIN: Duration = Duration::from_millis(5);
/// How long it waits for its turn at a time.
const TURN_WAIT: Duration = Duration::from_millis(200);
/// So many sequences that wait, the newest ones, are looked at for one that another goes on from.
const MERGED: usize = 16;

/// Where a block is copied to.
enum Down {
    /// Where the tier keeps it.
    Room(Arc<HostBuffer>),
    /// A place in a piece of host memory.
    Staged(Arc<HostBuffer>, ByteCount),
}

impl Down {
    fn place(&self) -> (&Arc<HostBuffer>, ByteCount) {
        match self {
            Self::Room(room) => (room, ByteCount::ZERO),
            Self::Staged(stage, offset) => (stage, *offset),
        }
    }
}

/// What was handed to the tier, oldest first.
type UnderWay = VecDeque<(Instant, Ticket<Stored>)>;

impl Inner {
    pub(super) fn push(&self, salt: &[u8], tokens: &[u32], first: usize) {
        let full = tokens.len() / self.block_tokens;
        if first >= full {
            return;
        }
        let tokens = &tokens[..full * self.block_tokens];
        let mut queue = self.queue.lock();
        // A conversation that goes on while its last words still wait takes their place, or each of its blocks would cost all
        // of its tokens.
        let goes_on = |waiting: &Sequence| {
            *waiting.salt == *salt
                && first * self.block_tokens <= waiting.tokens.len()
                && tokens.starts_with(&waiting.tokens)
        };
        let merged =
            queue.waiting.iter().enumerate().rev().take(MERGED).find(|(_, waiting)| goes_on(waiting));
        let merged = merged.map(|(at, waiting)| (at, waiting.tokens.len()));
        let more = tokens.len() - merged.map_or(0, |(_, tokens)| tokens);
        if queue.tokens + more > self.options.queued_tokens_max {
            drop(queue);
            self.count(|counts| counts.unsaved += (full - first) as u64);
            self.are_copied(|cache| cache.copied_sequence(salt, tokens, first));
            return;
        }
        queue.tokens += more;
        if let Some((at, _)) = merged {
            let waiting = &mut queue.waiting[at];
            waiting.tokens = tokens.to_vec();
            waiting.first = waiting.first.min(first);
            waiting.is_again = false;
        } else {
            let discards = queue.discards;
            let (salt, tokens) = (salt.into(), tokens.to_vec());
            queue.waiting.push_back(Sequence { salt, tokens, first, discards, is_again: false });
        }
        drop(queue);
        self.changed.notify_all();
    }

    pub(super) fn run(&self, stage: &Arc<HostBuffer>) {
        let (mut under_way, mut stuck_since) = (UnderWay::new(), None);
        while let Some(sequence) = self.next(&mut under_way) {
            self.is_in_use(&sequence);
            self.save(&sequence, stage, &mut under_way, &mut stuck_since);
            let Sequence { salt, tokens, first, .. } = &sequence;
            self.are_copied(|cache| cache.copied_sequence(salt, tokens, *first));
            if self.queue.lock().waiting.is_empty() {
                // What comes later has its own time.
                stuck_since = None;
            }
        }
    }

    /// The next sequence; none when it is over. Nothing is under way any more when it waits for one.
    fn next(&self, under_way: &mut UnderWay) -> Option<Sequence> {
        loop {
            {
                let mut queue = self.queue.lock();
                if queue.is_over {
                    return None;
                }
                if let Some(sequence) = queue.waiting.pop_front() {
                    queue.tokens -= sequence.tokens.len();
                    queue.is_busy = true;
                    return Some(sequence);
                }
                if under_way.is_empty() {
                    queue.is_busy = false;
                    self.changed.notify_all();
                    if let Some(wait) = self.until_idle(Duration::from_mins(1)) {
                        self.changed.wait_for(&mut queue, wait);
                        continue;
                    }
                }
            }
            if under_way.is_empty() {
                self.demote_idle();
            } else {
                self.wait_for_one(under_way);
            }
        }
    }

    /// `stuck_since`: since when nothing can be copied, whatever the sequence.
    fn save(
        &self,
        sequence: &Sequence,
        stage: &Arc<HostBuffer>,
        under_way: &mut UnderWay,
        stuck_since: &mut Option<Instant>,
    ) {
        let keys = self.keys(&sequence.salt, &sequence.tokens);
        let offer = Offer { bytes: self.payload_bytes as u64, recompute_us: None };
        let lacking = (sequence.first..keys.len()).filter(|at| !self.store.is_kept(&keys[*at]));
        let lacking: Vec<usize> = lacking.collect();
        let is_wanted = |at: &usize| self.store.offer(&keys[*at], &offer).is_admitted();
        let wanted: Vec<usize> = lacking.iter().copied().filter(is_wanted).collect();
        self.count(|counts| counts.unsaved += (lacking.len() - wanted.len()) as u64);
        let mut left = wanted.len();
        let mut rest = &wanted[..];
        while !rest.is_empty() {
            let memory = self.memory_down(rest, &keys, stage);
            let (part, later) = rest.split_at(memory.len().min(rest.len()));
            let copied = self.copy_down_in_time(sequence, part, &memory, stuck_since);
            for (at, place) in part[..copied].iter().zip(memory) {
                self.hand_on(sequence, *at, keys[*at], place, under_way);
            }
            left -= copied;
            if copied < part.len() {
                // What comes after it has gone as well.
                break;
            }
            rest = later;
        }
        self.count(|counts| counts.unsaved += left as u64);
    }

    /// Where the next blocks are copied to: where the fastest tier will keep them, as far as it lacks them and has such
    /// memory, or else a piece of host memory that they are taken out of again. At least one.
    fn memory_down(&self, blocks: &[usize], keys: &[StoreKey], stage: &Arc<HostBuffer>) -> Vec<Down> {
        let at_once = (ROOM_BYTES / self.payload_bytes).max(1);
        let lacking = blocks.iter().take(at_once).take_while(|at| !self.store.contains(&keys[**at]));
        let rooms: Vec<Down> = lacking.map_while(|_| self.room().map(Down::Room)).collect();
        if !rooms.is_empty() {
            return rooms;
        }
        let staged =
            |place: usize| Down::Staged(Arc::clone(stage), ByteCount((place * self.block_bytes) as u64));
        (0..self.stage_blocks(stage)).map(staged).collect()
    }

    /// Copies as soon as that can be done, if it can be within [`KvTierOptions::save_wait`](super::KvTierOptions); how many
    /// blocks.
    fn copy_down_in_time(
        &self,
        sequence: &Sequence,
        part: &[usize],
        memory: &[Down],
        stuck_since: &mut Option<Instant>,
    ) -> usize {
        while !self.is_over() && !self.is_discarded(sequence) {
            match self.copy_down(sequence, part, memory) {
                Ok(Some(copied)) => {
                    *stuck_since = None;
                    // Meanwhile too: then nobody knows what was copied.
                    return if self.is_discarded(sequence) { 0 } else { copied };
                }
                Ok(None)
                    if stuck_since.get_or_insert_with(Instant::now).elapsed() < self.options.save_wait =>
                {
                    thread::sleep(AGAIN);
                }
                Ok(None) => {
                    tracing::debug!(
                        "blocks are not saved: the cache is in use, or off the device, for too long"
                    );
                    break;
                }
                Err(error) => {
                    tracing::debug!(%error, "blocks are not saved");
                    self.cache.shared.manager().settle();
                    break;
                }
            }
        }
        0
    }

    fn is_discarded(&self, sequence: &Sequence) -> bool {
        self.queue.lock().discards != sequence.discards
    }

    /// Copies these blocks of a sequence to host memory, as far as they are still there: how many. None: not now.
    fn copy_down(
        &self,
        sequence: &Sequence,
        part: &[usize],
        memory: &[Down],
    ) -> Result<Option<usize>, MemoryError> {
        let (Some(first), Some(last)) = (part.first(), part.last()) else { return Ok(Some(0)) };
        let region = self.cache.region();
        let manager = region.manager();
        let deadline = manager.operation_deadline();
        // In turn, so that nothing is evicted or moved while it is ours. Asked for again and again, as this may end meanwhile.
        let _turn = match manager.take_turn_only(Instant::now() + TURN_WAIT) {
            Err(MemoryError::Deadline { .. }) => return Ok(None),
            turn => turn?,
        };
        if !region.missing_bytes().is_zero() || !self.after_steps(&manager.down)? {
            return Ok(None);
        }
        let mut found = Found::default();
        let tokens = &sequence.tokens[..(last + 1) * self.block_tokens];
        self.cache.find_from(&sequence.salt, tokens, *first, &mut found)?;
        let Some(group) = found.groups.into_iter().next() else { return Ok(Some(0)) };
        let there = part.iter().filter_map(|at| group.blocks.get(at - group.first)).copied();
        let there: Vec<u32> = there.collect();
        let done = self.copy_and_wait(&there, memory, deadline);
        if done.is_err() {
            manager.settle();
        } else {
            self.are_copied(|cache| cache.copied(&there));
        }
        self.cache.free(0, &group.blocks)?;
        done?;
        Ok(Some(there.len()))
    }

    fn copy_and_wait(&self, blocks: &[u32], memory: &[Down], deadline: Instant) -> Result<(), MemoryError> {
        if blocks.is_empty() {
            return Ok(());
        }
        let copies = self.copies(blocks, memory.iter().map(Down::place));
        let done = self.cache.region().store_blocks(&copies, None)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if done.wait(left).map_err(MemoryError::device("copy blocks to the host"))? {
            return Ok(());
        }
        Err(MemoryError::Deadline { doing: "copying blocks to the host", waited: left })
    }

    /// Gives a copied block to the tier.
    fn hand_on(&self, sequence: &Sequence, at: usize, key: StoreKey, place: Down, under_way: &mut UnderWay) {
        let trailer = self.trailer(&sequence.tokens, at);
        let payload = match self.payload(place, &trailer) {
            Ok(payload) => payload,
            Err(error) => {
                tracing::warn!(%error, "cannot read host memory");
                self.count(|counts| counts.unsaved += 1);
                return;
            }
        };
        while under_way.len() * self.payload_bytes >= UNDER_WAY_BYTES_MAX.max(self.payload_bytes) {
            self.wait_for_one(under_way);
        }
        let wait = self.options.put_wait;
        let ticket = self.store.put(key, payload, self.payload_bytes, wait);
        under_way.push_back((Instant::now() + wait, ticket));
    }

    /// What is put of a block that was copied: its bytes, its tokens, and zeroes.
    fn payload(&self, place: Down, trailer: &[u8]) -> Result<Buffer, DeviceError> {
        let finish = |rest: &mut [u8]| {
            let (tokens, zeroes) = rest.split_at_mut(trailer.len());
            tokens.copy_from_slice(trailer);
            zeroes.fill(0);
        };
        match place {
            Down::Room(room) => {
                let mut memory = room.view_mut(ByteCount::ZERO, room.bytes())?;
                finish(&mut memory.as_mut_slice()[self.block_bytes..]);
                Ok(Buffer::HostMut(memory))
            }
            Down::Staged(stage, offset) => {
                let mut payload = Aligned::zeroed(self.payload_bytes);
                let (block, rest) = payload.as_mut_slice().split_at_mut(self.block_bytes);
                stage.read(offset, block)?;
                finish(rest);
                Ok(Buffer::Own(payload))
            }
        }
    }

    /// Waits for the oldest that is under way, unless it is over.
    fn wait_for_one(&self, under_way: &mut UnderWay) {
        let Some((deadline, ticket)) = under_way.pop_front() else { return };
        while !ticket.is_done() && !self.is_over() && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
        if self.is_over() && !ticket.is_done() {
            return;
        }
        let bytes = self.block_bytes as u64;
        match ticket.wait() {
            Ok(Stored::Written) => self.count(|counts| {
                counts.saved += 1;
                counts.saved_bytes += ByteCount(bytes);
            }),
            Ok(Stored::Already) => {}
            Err(miss) => {
                tracing::debug!(%miss, "a block is not saved");
                self.count(|counts| counts.unsaved += 1);
            }
        }
    }
}
