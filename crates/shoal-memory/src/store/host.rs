//! The host tier: blocks in this process's memory, up to a number of bytes.
//!
//! Apart because it is the fastest tier and the smallest, and keeps nothing that a disk would not: memory errs too, so a
//! block carries a checksum that knows its name, and one that is damaged is dropped (I8). What goes when room is wanted is
//! the choice of shoal-core's eviction (`kv::eviction`). All is done by the caller's thread: a copy and a checksum, a tenth
//! of a millisecond for a MiB. Of a manager ([`HostTier::in_arena`]) its memory is page-locked: blocks come
//! from the device to where they stay ([`Store::room`]) and go there from where they lie ([`Store::lend`]); more of that is
//! taken piece by piece, which may wait for two seconds.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::rand::{GetRandomFlags, getrandom};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::eviction::{About, EvictionKind, EvictionPolicy};
use shoal_core::store::format::Secret;
use shoal_device::{HostBuffer, HostView};

use super::slots::SlotPool;
use super::{Aligned, Buffer, Fetched, Held, Lent, Miss, Offer, Store, StoreKey, Stored, Ticket, Verdict};
use crate::manager::MemoryManager;

/// Most blocks, whatever the bytes: the order in which they go is kept in tables of this length.
const BLOCKS_MAX: u64 = 1 << 22;
/// Page-locked memory comes in pieces of 2 MiB and more: a tier that is shorter than this would hold next to nothing.
const ARENA_BYTES_MIN: ByteCount = ByteCount::mib(8);
/// Blocks that are looked up without letting others do so in between.
const LOOKED_UP_AT_ONCE: usize = 512;
/// So many blocks that somebody holds are passed over in a look for one that makes room.
const HELD_MAX: usize = 256;

/// How much it may take, and what goes first.
#[derive(Clone, Copy, Debug)]
pub struct HostOptions {
    /// Memory of blocks, with what each takes beside its bytes (4 to 8 KiB).
    pub bytes_max: ByteCount,
    /// Most blocks; none for one for each 16 KiB.
    pub blocks_max: Option<u32>,
    /// What goes when there is no room.
    pub eviction: EvictionKind,
}

impl HostOptions {
    /// Of so many bytes; what is found again stays (S3-FIFO).
    #[must_use]
    pub const fn new(bytes_max: ByteCount) -> Self {
        Self { bytes_max, blocks_max: None, eviction: EvictionKind::S3Fifo }
    }
}

/// A host tier's figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostTierUsage {
    /// Blocks it has.
    pub blocks: u64,
    /// Memory of blocks, those included that it forgot and that somebody still holds.
    pub bytes: u64,
    /// The cap on it.
    pub bytes_max: u64,
    /// Blocks served.
    pub hits: u64,
    /// Blocks asked for that were not there.
    pub absent: u64,
    /// Blocks put.
    pub written: u64,
    /// Blocks that made room.
    pub evicted: u64,
    /// Blocks that were damaged: dropped, not served.
    pub corrupt: u64,
}

/// Where blocks lie.
enum Memory {
    /// In memory of their own. The bytes of all, for as long as somebody has them.
    Own(Arc<AtomicU64>),
    /// In slots of page-locked memory.
    Locked(SlotPool),
}

impl Memory {
    /// Bytes that somebody has.
    fn taken_bytes(&self) -> u64 {
        match self {
            Self::Own(bytes) => bytes.load(Ordering::Relaxed),
            Self::Locked(pool) => pool.taken_bytes(),
        }
    }
}

/// Memory of one block.
enum Place {
    Own(Aligned, Arc<AtomicU64>),
    Slot(HostView),
}

impl Place {
    fn own(memory: Aligned, all_bytes: &Arc<AtomicU64>) -> Self {
        all_bytes.fetch_add(memory.taken_bytes(), Ordering::Relaxed);
        Self::Own(memory, Arc::clone(all_bytes))
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Own(memory, _) => memory.as_slice(),
            Self::Slot(view) => view.as_slice(),
        }
    }

    fn taken_bytes(&self) -> u64 {
        match self {
            Self::Own(memory, _) => memory.taken_bytes(),
            Self::Slot(view) => view.buffer().bytes().0,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Self::Own(memory, all_bytes) = self {
            all_bytes.fetch_sub(memory.taken_bytes(), Ordering::Relaxed);
        }
    }
}

/// A block, counted for as long as somebody has it.
struct Block {
    memory: Place,
    bytes: usize,
    checksum: u128,
}

impl Block {
    /// Whether somebody beside the tier has it, or a copy under way: it would be there still if the tier forgot it.
    fn is_held(self: &Arc<Self>) -> bool {
        let is_copied = match &self.memory {
            Place::Own(..) => false,
            Place::Slot(view) => Arc::strong_count(view.buffer()) > 1,
        };
        is_copied || Arc::strong_count(self) > 1
    }
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        &self.memory.as_slice()[..self.bytes]
    }
}

/// A block that is in the tier, and its number there.
struct Kept {
    block: Arc<Block>,
    id: u32,
}

struct State {
    places: HashMap<StoreKey, Kept>,
    /// Whose a number is, of those that the policy knows.
    names: Vec<Option<StoreKey>>,
    free: Vec<u32>,
    /// Memory of the blocks in `places`.
    kept_bytes: u64,
    policy: Box<dyn EvictionPolicy>,
    counts: HostTierUsage,
}

impl State {
    fn forget(&mut self, key: &StoreKey) -> bool {
        let Some(place) = self.places.remove(key) else { return false };
        self.kept_bytes -= place.block.memory.taken_bytes();
        self.policy.gone(place.id);
        self.names[place.id as usize] = None;
        self.free.push(place.id);
        true
    }

    /// Forgets the block that should go next, of those that nobody holds: what is held gives no room. Whether there was one.
    fn evict(&mut self) -> bool {
        let mut held = Vec::new();
        let victim = loop {
            let Some((id, key)) = self.policy.victim().and_then(|id| Some((id, self.names[id as usize]?)))
            else {
                break None;
            };
            if !self.places.get(&key).is_some_and(|kept| kept.block.is_held()) {
                break Some(key);
            }
            // No victim, until the look for one is over.
            self.policy.used(id);
            held.push((id, key));
            if held.len() >= HELD_MAX {
                break None;
            }
        };
        for (id, key) in held {
            self.policy.cached(id, &about(&key));
        }
        let is_gone = victim.is_some_and(|key| self.forget(&key));
        self.counts.evicted += u64::from(is_gone);
        is_gone
    }
}

/// A tier of blocks in memory.
pub struct HostTier {
    options: HostOptions,
    secret: Secret,
    memory: Memory,
    state: Mutex<State>,
}

impl fmt::Debug for HostTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostTier").field("usage", &self.usage()).finish_non_exhaustive()
    }
}

/// What a policy tells blocks apart by.
fn about(key: &StoreKey) -> About {
    let half = |at: u32| u64::try_from((key.block >> at) & u128::from(u64::MAX)).unwrap_or(0);
    About::new(half(0) ^ half(64).rotate_left(32), 1)
}

impl HostTier {
    /// An empty one. Memory is taken block by block.
    #[must_use]
    pub fn new(options: HostOptions) -> Self {
        Self::with_memory(options, Memory::Own(Arc::default()))
    }

    /// An empty one of page-locked memory, from which a manager's device copies at the speed of its link. It lies beside
    /// the manager's host budget. Blocks of one length share pieces of memory, so a tier is best for one length of them; one
    /// of less than 8 MiB has ordinary memory all the same.
    #[must_use]
    pub fn in_arena(options: HostOptions, manager: &MemoryManager) -> Self {
        if options.bytes_max < ARENA_BYTES_MIN {
            return Self::new(options);
        }
        let arena = manager.arena.another(options.bytes_max);
        Self::with_memory(options, Memory::Locked(SlotPool::new(arena, options.bytes_max)))
    }

    fn with_memory(options: HostOptions, memory: Memory) -> Self {
        let by_bytes = (options.bytes_max.0 / (16 << 10)).clamp(64, BLOCKS_MAX);
        let blocks = options.blocks_max.map_or(by_bytes, |blocks| u64::from(blocks.max(1)).min(BLOCKS_MAX));
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        let mut random = [0; 16];
        if getrandom(&mut random, GetRandomFlags::empty()).is_err() {
            // Nobody else sees these checksums; any number finds damage.
            random = [7; 16];
        }
        let state = State {
            places: HashMap::new(),
            names: vec![None; blocks as usize],
            free: (0..blocks).rev().collect(),
            kept_bytes: 0,
            policy: options.eviction.policy(blocks),
            counts: HostTierUsage::default(),
        };
        Self { options, secret: Secret(u128::from_le_bytes(random)), memory, state: Mutex::new(state) }
    }

    /// What it has and did.
    #[must_use]
    pub fn usage(&self) -> HostTierUsage {
        let state = self.state.lock();
        HostTierUsage {
            blocks: state.places.len() as u64,
            bytes: self.memory.taken_bytes(),
            bytes_max: self.options.bytes_max.0,
            ..state.counts
        }
    }

    /// Flips a bit of a block where it lies. For tests: whether it is there and nobody holds it.
    #[doc(hidden)]
    pub fn damage(&self, key: &StoreKey, bit: usize) -> bool {
        let mut state = self.state.lock();
        let block = state.places.get_mut(key).and_then(|place| Arc::get_mut(&mut place.block));
        block.is_some_and(|block| {
            let at = bit / 8 % block.bytes;
            let mask = 1 << (bit % 8);
            let buffer = match &mut block.memory {
                Place::Own(memory, _) => {
                    memory.as_mut_slice()[at] ^= mask;
                    return true;
                }
                Place::Slot(view) => Arc::clone(view.buffer()),
            };
            // Nobody writes to what is viewed, so the view goes for a moment.
            block.memory = Place::own(Aligned::zeroed(0), &Arc::default());
            let flip = |bytes: &mut [u8]| bytes.iter_mut().for_each(|byte| *byte ^= mask);
            let flipped = buffer.access_mut(ByteCount(at as u64), ByteCount(1), flip);
            let Ok(view) = buffer.view(ByteCount::ZERO, buffer.bytes()) else { return false };
            block.memory = Place::Slot(view);
            flipped.is_ok()
        })
    }

    /// The block, not verified yet, and its number.
    fn look_up(&self, key: &StoreKey) -> Option<(Arc<Block>, u32)> {
        self.state.lock().places.get(key).map(|kept| (Arc::clone(&kept.block), kept.id))
    }

    /// A block where it lies, if that is in a slot.
    fn lent(&self, key: &StoreKey, block: Arc<Block>, id: u32) -> Option<Lent<'_>> {
        let Place::Slot(view) = &block.memory else { return None };
        let buffer = Arc::clone(view.buffer());
        let (key, held) = (*key, Held::new(Arc::clone(&block) as _));
        Some(Lent::new(held, buffer, move || self.verify(&key, &block, id)))
    }

    /// The block, verified.
    fn find(&self, key: &StoreKey) -> Result<Arc<Block>, Miss> {
        let Some((block, id)) = self.look_up(key) else {
            self.state.lock().counts.absent += 1;
            return Err(Miss::Absent);
        };
        self.verify(key, &block, id)?;
        Ok(block)
    }

    /// Compares a block with what was put; one that is damaged is dropped.
    fn verify(&self, key: &StoreKey, block: &Arc<Block>, id: u32) -> Result<(), Miss> {
        let is_right = self.secret.of_payload(key, (**block).as_ref()) == block.checksum;
        let mut state = self.state.lock();
        let is_same = state.places.get(key).is_some_and(|kept| Arc::ptr_eq(&kept.block, block));
        if is_right {
            state.counts.hits += 1;
            if is_same {
                state.policy.used(id);
                state.policy.cached(id, &about(key));
            }
            return Ok(());
        }
        state.counts.corrupt += 1;
        if is_same {
            state.forget(key);
        }
        tracing::warn!(%key, "a block in host memory is damaged, and dropped");
        Err(Miss::Corrupt)
    }

    fn keep(&self, key: StoreKey, source: Buffer, bytes: usize) -> Result<Stored, Miss> {
        let room = source.as_slice().len();
        if bytes == 0 || bytes > room {
            return Err(Miss::TooLong { bytes: bytes as u64, bytes_max: room as u64 });
        }
        if self.contains(&key) {
            return Ok(Stored::Already);
        }
        let checksum = self.secret.of_payload(&key, &source.as_slice()[..bytes]);
        let memory = self.place(source.kept(), bytes)?;
        let (length, bytes_max) = (memory.taken_bytes(), self.options.bytes_max.0);
        if length > bytes_max {
            return Err(Miss::TooLong { bytes: bytes as u64, bytes_max });
        }
        let block = Arc::new(Block { memory, bytes, checksum });
        let mut state = self.state.lock();
        if state.places.contains_key(&key) {
            return Ok(Stored::Already);
        }
        // Where the rest is too much already, nothing that goes would make room.
        if self.memory.taken_bytes().saturating_sub(state.kept_bytes) > bytes_max {
            return Err(no_room());
        }
        while state.free.is_empty() || self.memory.taken_bytes() > bytes_max {
            if !state.evict() {
                return Err(no_room());
            }
        }
        let Some(id) = state.free.pop() else { return Err(Miss::Closed) };
        state.names[id as usize] = Some(key);
        state.policy.cached(id, &about(&key));
        state.kept_bytes += length;
        state.places.insert(key, Kept { block, id });
        state.counts.written += 1;
        Ok(Stored::Written)
    }

    /// Where a block stays: where it lies, if that is memory of this tier's own, or else a copy of it.
    fn place(&self, source: Buffer, bytes: usize) -> Result<Place, Miss> {
        match (&self.memory, source) {
            // Its own memory, and no more than that.
            (Memory::Own(all_bytes), Buffer::Own(memory)) if memory.as_slice().len() < bytes + 4096 => {
                Ok(Place::own(memory, all_bytes))
            }
            (Memory::Own(all_bytes), source) => {
                Ok(Place::own(Aligned::copy_of(&source.as_slice()[..bytes]), all_bytes))
            }
            (Memory::Locked(pool), source) => {
                let source = source.shared();
                if let Buffer::Host(view) = &source
                    && pool.owns(view.buffer())
                    && (view.offset(), view.as_slice().len() as u64)
                        == (ByteCount::ZERO, SlotPool::slot_bytes(bytes))
                {
                    return Ok(Place::Slot(view.again()));
                }
                let slot = self.slot(pool, bytes)?;
                let view = slot.view_mut(ByteCount::ZERO, slot.bytes());
                let mut view = view.map_err(|error| failed(&error))?;
                let (block, rest) = view.as_mut_slice().split_at_mut(bytes);
                block.copy_from_slice(&source.as_slice()[..bytes]);
                rest.fill(0);
                Ok(Place::Slot(view.shared()))
            }
        }
    }

    /// A slot for a block, for which others make room.
    fn slot(&self, pool: &SlotPool, bytes: usize) -> Result<Arc<HostBuffer>, Miss> {
        let (length, bytes_max) = (SlotPool::slot_bytes(bytes), self.options.bytes_max.0);
        if !pool.fits(bytes) {
            return Err(Miss::TooLong { bytes: bytes as u64, bytes_max });
        }
        loop {
            if let Some(slot) = pool.take(bytes).map_err(|error| failed(&error))? {
                return Ok(slot);
            }
            let mut state = self.state.lock();
            // Where the rest is too much already, nothing that goes would make room.
            let is_in_vain = pool.taken_bytes().saturating_sub(state.kept_bytes) + length > bytes_max;
            if is_in_vain || !state.evict() {
                return Err(no_room());
            }
        }
    }
}

fn no_room() -> Miss {
    Miss::NoRoom { reason: "all of it is held by somebody".to_owned() }
}

fn failed(error: &dyn std::error::Error) -> Miss {
    Miss::Failed { doing: "cannot take host memory", reason: error.to_string() }
}

impl Store for HostTier {
    fn name(&self) -> &'static str {
        "host"
    }

    fn contains(&self, key: &StoreKey) -> bool {
        self.state.lock().places.contains_key(key)
    }

    fn offer(&self, _key: &StoreKey, offer: &Offer) -> Verdict {
        // Memory does not wear out, and no engine computes faster than it copies.
        let bytes_max = self.options.bytes_max.0;
        if offer.bytes <= bytes_max {
            Verdict::Admit
        } else {
            Verdict::WornOut { bytes: offer.bytes, writable_bytes: bytes_max }
        }
    }

    fn put(&self, key: StoreKey, source: Buffer, bytes: usize, _deadline: Duration) -> Ticket<Stored> {
        Ticket::ready(self.keep(key, source, bytes))
    }

    fn get(&self, key: StoreKey, mut target: Buffer, _deadline: Duration) -> Ticket<Fetched> {
        let copy = |block: Arc<Block>| {
            let memory = target.as_mut_slice().unwrap_or_default();
            let (bytes, bytes_max) = (block.bytes as u64, memory.len() as u64);
            let place = memory.get_mut(..block.bytes).ok_or(Miss::TooLong { bytes, bytes_max })?;
            place.copy_from_slice((*block).as_ref());
            Ok(block.bytes)
        };
        let copied = self.find(&key).and_then(copy);
        Ticket::ready(copied.map(|bytes| Fetched { buffer: target, bytes }))
    }

    fn hold(&self, key: &StoreKey) -> Option<Held> {
        self.find(key).ok().map(|block| Held::new(block))
    }

    fn parts_of(&self, keys: &[StoreKey]) -> Vec<usize> {
        self.contains_each(keys).into_iter().take_while(|is_there| *is_there).map(|_| 0).collect()
    }

    fn contains_each(&self, keys: &[StoreKey]) -> Vec<bool> {
        let mut found = Vec::with_capacity(keys.len());
        for some in keys.chunks(LOOKED_UP_AT_ONCE) {
            let state = self.state.lock();
            found.extend(some.iter().map(|key| state.places.contains_key(key)));
        }
        found
    }

    fn lend(&self, key: &StoreKey) -> Option<Lent<'_>> {
        let (block, id) = self.look_up(key)?;
        self.lent(key, block, id)
    }

    fn lend_each(&self, keys: &[StoreKey]) -> Vec<Option<Lent<'_>>> {
        let mut lent = Vec::with_capacity(keys.len());
        for some in keys.chunks(LOOKED_UP_AT_ONCE) {
            let state = self.state.lock();
            let found = some.iter().map(|key| state.places.get(key));
            let found: Vec<_> =
                found.map(|kept| kept.map(|kept| (Arc::clone(&kept.block), kept.id))).collect();
            drop(state);
            let found = some.iter().zip(found);
            lent.extend(found.map(|(key, found)| found.and_then(|(block, id)| self.lent(key, block, id))));
        }
        lent
    }

    fn is_own(&self, memory: &HostBuffer) -> bool {
        matches!(&self.memory, Memory::Locked(pool) if pool.owns(memory))
    }

    fn room(&self, bytes: usize) -> Option<Arc<HostBuffer>> {
        let Memory::Locked(pool) = &self.memory else { return None };
        self.slot(pool, bytes).inspect_err(|miss| tracing::debug!(%miss, "no memory for a block")).ok()
    }

    fn remove(&self, key: StoreKey, _deadline: Duration) -> Ticket<bool> {
        Ticket::ready(Ok(self.state.lock().forget(&key)))
    }

    fn flush(&self, _deadline: Duration) -> Ticket<()> {
        Ticket::ready(Ok(()))
    }
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
