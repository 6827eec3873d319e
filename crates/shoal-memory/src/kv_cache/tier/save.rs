//! The way down: from sealed blocks to the tier.
//!
//! Apart because nobody waits for it. Its thread takes one sequence after another, copies what the tier lacks to host memory
//! a few blocks at a time, and has others hand it on meanwhile ([`Hands`]). Until a block is copied the cache lets others go
//! before it, for a few rounds; where nothing can be copied for now it waits a while, and then gives up.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::kv::prefix::Found;
use shoal_device::{DeviceError, HostBuffer};

use super::hands::{Copied, Hands};
use super::{Inner, Sequence};
use crate::error::MemoryError;
use crate::store::{Aligned, Buffer, Offer, StoreKey};

/// Bytes that are copied to where they stay with one turn.
const ROOM_BYTES: usize = 64 << 20;
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

/// What the thread has and knows from one sequence to the next.
struct Saver {
    /// Host memory for blocks that the tier has no place of its own for.
    stage: Arc<HostBuffer>,
    hands: Hands,
    /// The tier has given memory of its own.
    has_rooms: bool,
    /// Since when nothing can be copied, whatever the sequence.
    stuck_since: Option<Instant>,
}

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

    pub(super) fn run(self: &Arc<Self>, stage: Arc<HostBuffer>) {
        let mut saver = Saver { stage, hands: Hands::new(self), has_rooms: false, stuck_since: None };
        while let Some(sequence) = self.next(&mut saver.hands) {
            self.is_in_use(&sequence);
            self.save(&sequence, &mut saver);
            let Sequence { salt, tokens, first, .. } = &sequence;
            self.are_copied(|cache| cache.copied_sequence(salt, tokens, *first));
            if self.queue.lock().waiting.is_empty() {
                // What comes later has its own time.
                saver.stuck_since = None;
            }
        }
    }

    /// The next sequence; none when it is over. Nothing is under way any more when it waits for one.
    fn next(&self, hands: &mut Hands) -> Option<Sequence> {
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
                if hands.is_idle() {
                    queue.is_busy = false;
                    self.changed.notify_all();
                    if let Some(wait) = self.until_idle(Duration::from_mins(1)) {
                        self.changed.wait_for(&mut queue, wait);
                        continue;
                    }
                }
            }
            if hands.is_idle() {
                self.demote_idle();
            } else {
                hands.wait_for_one();
            }
        }
    }

    fn save(&self, sequence: &Sequence, saver: &mut Saver) {
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
            let memory = self.memory_down(rest, &keys, saver);
            let (part, later) = rest.split_at(memory.len().min(rest.len()));
            let copied = self.copy_down_in_time(sequence, part, &memory, &mut saver.stuck_since);
            let there = part[..copied].iter().zip(memory);
            let there = there.filter_map(|(at, place)| self.copied(sequence, *at, keys[*at], place));
            saver.hands.hand_on(there, sequence.discards);
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
    fn memory_down(&self, blocks: &[usize], keys: &[StoreKey], saver: &mut Saver) -> Vec<Down> {
        let mut rooms = self.rooms_down(blocks, keys);
        if rooms.is_empty() && saver.has_rooms {
            // What has them all may be on its way there itself, and make room as soon as it has come.
            saver.hands.wait_for_rooms();
            rooms = self.rooms_down(blocks, keys);
        }
        if !rooms.is_empty() {
            saver.has_rooms = true;
            return rooms;
        }
        let stage = &saver.stage;
        let staged =
            |place: usize| Down::Staged(Arc::clone(stage), ByteCount((place * self.block_bytes) as u64));
        (0..self.stage_blocks(stage)).map(staged).collect()
    }

    /// Memory of a tier for the first of these blocks.
    fn rooms_down(&self, blocks: &[usize], keys: &[StoreKey]) -> Vec<Down> {
        let at_once = (ROOM_BYTES / self.payload_bytes).max(1);
        let lacking = blocks.iter().take(at_once).take_while(|at| !self.store.contains(&keys[**at]));
        lacking.map_while(|_| self.room().map(Down::Room)).collect()
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

    /// A copied block, to be handed on. What was copied to the stage is taken out of it now: the next ones come there.
    fn copied(&self, sequence: &Sequence, at: usize, key: StoreKey, place: Down) -> Option<Copied> {
        let is_room = matches!(place, Down::Room(_));
        match self.payload(place, &self.trailer(&sequence.tokens, at)) {
            Ok(payload) => Some(Copied { key, payload, is_room }),
            Err(error) => {
                tracing::warn!(%error, "cannot read host memory");
                self.count(|counts| counts.unsaved += 1);
                None
            }
        }
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
}
