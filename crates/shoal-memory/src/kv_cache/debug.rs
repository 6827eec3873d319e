//! Debug mode: what nobody owns is NaN or what it was left with, and a write to it is found.
//!
//! Apart because it trades all speed for it: each free fills blocks on the device and each allocation reads them back, one
//! at a time. A block that an engine reads without owning it is NaN, in every floating type, and spreads; a block that was
//! written without an owner is told when it is next allocated, or when somebody asks ([`KvCache::strays`]). Where a block
//! has no memory, the access itself faults, in this mode and without it.
//!
//! Filled is what is freed, not what is evicted from the cache or was just mapped. What is only cached is to stay as it is, so
//! a hash of it is kept, also beyond its eviction, until its memory goes or it is given to somebody. Either comes after the
//! steps that were recorded, or else after everything queued on the device; where a step holds a guard and none was recorded,
//! neither is done, as nobody can tell when it may be.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::kv::blocks::BlockState;
use shoal_core::kv::compact::BlockMove;
use shoal_core::kv::ids::BlockId;
use shoal_core::kv::prefix::{Found, NO_BLOCK};
use shoal_core::kv::state::{GranuleId, KvError, KvState};
use shoal_device::{Device, Event, ForeignWork, HostBuffer};

use super::{KvCache, Shared};
use crate::error::MemoryError;
use crate::region::BlockCopy;
use crate::turn::{Taken, Turn};
use xxhash_rust::xxh3::Xxh3;

/// What blocks are filled with where nothing else is said ([`super::KvCacheSpec::fills`]): NaN in every floating type that is
/// a power of two of bytes long, and in those of one byte but the two `fnuz` ones, whose only NaN is 0x80.
const FILL: u8 = 0xFF;
/// What is copied at a time.
const FILLER_BYTES: ByteCount = ByteCount::mib(1);
/// Strays that are remembered; later ones are only logged.
const STRAYS_MAX: usize = 1024;

/// A write to a block that nobody owned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stray {
    /// Its group.
    pub group: usize,
    /// The block.
    pub block: u32,
    /// The first wrong byte, from the start of the cache's region; of a block that was cached, where it begins.
    pub offset: ByteCount,
}

/// What a block that nobody owns was left with.
#[derive(Clone, Copy, Debug)]
enum Left {
    Filled,
    /// What its last owner wrote, by its hash.
    Held(u64),
}

/// Blocks that move with what they were left with: where to, and the hash.
pub(super) type Carried = Vec<(u32, u64)>;

#[derive(Debug)]
pub(super) struct Debug {
    /// The byte of each group.
    fills: Vec<u8>,
    /// Memory full of each of these bytes.
    fillers: BTreeMap<u8, Arc<HostBuffer>>,
    /// One call at a time, from the first change to the last check.
    calls: Arc<Turn>,
    left: Mutex<BTreeMap<(usize, u32), Left>>,
    strays: Mutex<VecDeque<Stray>>,
}

impl Debug {
    /// `fills` may be shorter than there are groups.
    pub(super) fn new(
        device: &Arc<dyn Device>,
        mut fills: Vec<u8>,
        groups: usize,
    ) -> Result<Self, MemoryError> {
        fills.resize(groups, FILL);
        let mut fillers = BTreeMap::new();
        for fill in &fills {
            if !fillers.contains_key(fill) {
                fillers.insert(*fill, filler(device, *fill)?);
            }
        }
        let (left, strays) = (Mutex::default(), Mutex::default());
        Ok(Self { fills, fillers, calls: Arc::default(), left, strays })
    }

    fn fill_of(&self, group: usize) -> u8 {
        self.fills.get(group).copied().unwrap_or(FILL)
    }
}

fn filler(device: &Arc<dyn Device>, fill: u8) -> Result<Arc<HostBuffer>, MemoryError> {
    let filler = HostBuffer::allocate(device, FILLER_BYTES)
        .map_err(MemoryError::device("allocate what freed blocks are filled with"))?;
    let bytes = vec![fill; usize::try_from(FILLER_BYTES.0).unwrap_or(0)];
    filler.write(ByteCount::ZERO, &bytes).map_err(MemoryError::device("write host memory"))?;
    Ok(filler)
}

impl Shared {
    fn debug_call(&self, debug: &Debug) -> Result<Taken, MemoryError> {
        let waited = self.manager().options.operation_wait;
        let late = || MemoryError::Deadline { doing: "waiting for another call in debug mode", waited };
        debug.calls.take(self.manager().operation_deadline()).ok_or_else(late)
    }

    /// An allocation whose blocks are looked at before they are given out.
    pub(super) fn alloc_checked<T: BlockId>(
        &self,
        debug: &Debug,
        group: usize,
        ids: &mut [T],
    ) -> Result<bool, MemoryError> {
        let _call = self.debug_call(debug)?;
        if !self.alloc_plainly(group, ids)? {
            return Ok(false);
        }
        for id in ids.iter() {
            if let Some(block) = id.block() {
                if let Err(error) = self.look_at(debug, group, block) {
                    // Nobody is given them then.
                    self.state.lock().free(group, ids)?;
                    return Err(error);
                }
                debug.left.lock().remove(&(group, block));
            }
        }
        Ok(true)
    }

    /// A search whose blocks are looked at before they are given out.
    pub(super) fn find_checked(
        &self,
        debug: &Debug,
        found: &mut Found,
        find: impl FnOnce(&mut KvState, &mut Found) -> Result<(), KvError>,
    ) -> Result<(), MemoryError> {
        let _call = self.debug_call(debug)?;
        find(&mut self.state.lock(), found)?;
        for (group, blocks) in found.groups.iter().enumerate() {
            for block in blocks.blocks.iter().filter(|block| **block != NO_BLOCK) {
                // They are found whatever comes of it.
                if let Err(error) = self.look_at(debug, group, *block) {
                    tracing::warn!(%error, "blocks that were found are not looked at");
                }
                debug.left.lock().remove(&(group, *block));
            }
        }
        Ok(())
    }

    /// A free that fills what nobody owns any more, and takes note of what is only cached now.
    pub(super) fn free_filling<T: BlockId>(
        &self,
        debug: &Debug,
        group: usize,
        ids: &[T],
    ) -> Result<(), MemoryError> {
        let _call = self.debug_call(debug)?;
        let (freed, cached): (BTreeSet<u32>, BTreeSet<u32>) = {
            let mut state = self.state.lock();
            let freed = state.free(group, ids)?;
            let pool = state.pool(group)?;
            let of = |what: BlockState| {
                ids.iter()
                    .filter_map(|id| id.block())
                    .filter(|block| pool.state(*block) == Ok(what))
                    .collect()
            };
            let blocks = (of(BlockState::Free), of(BlockState::Cached));
            self.after_free(state, group, freed);
            blocks
        };
        // They are free whatever comes of it.
        if let Err(error) = self.fill(debug, group, &freed) {
            tracing::warn!(%error, "freed blocks are not filled");
        }
        if let Err(error) = self.note(debug, group, &cached) {
            tracing::warn!(%error, "writes to blocks that are cached now are not found");
        }
        Ok(())
    }

    /// What has to be over before a block that was freed may be touched; none where nobody can tell.
    fn before(&self) -> Result<Option<Vec<Arc<Event>>>, MemoryError> {
        let manager = self.manager();
        let mut events: Vec<Arc<Event>> = self.steps.lock().values().cloned().collect();
        events.extend(self.step.lock().clone());
        if events.is_empty() {
            if manager.gate().is_shared() {
                return Ok(None);
            }
            let all = Event::of_foreign(manager.device(), ForeignWork::All);
            events.push(Arc::new(all.map_err(MemoryError::device("mark what is queued"))?));
        }
        Ok(Some(events))
    }

    /// Takes note of what blocks hold that are to stay as they are.
    fn note(&self, debug: &Debug, group: usize, blocks: &BTreeSet<u32>) -> Result<(), MemoryError> {
        if blocks.is_empty() {
            return Ok(());
        }
        let (manager, deadline) = (self.manager(), self.manager().operation_deadline());
        let Some(events) = self.before()? else { return Ok(()) };
        for event in &events {
            let left = deadline.saturating_duration_since(Instant::now());
            if !event.wait(left).map_err(MemoryError::device("wait for a step"))? {
                let waited = manager.options.operation_wait;
                return Err(MemoryError::Deadline { doing: "waiting for steps in debug mode", waited });
            }
        }
        let _turn = manager.take_turn_only(deadline)?;
        if !self.region.missing_bytes().is_zero() {
            return Ok(());
        }
        for block in blocks {
            let (is_cached, pieces) = self.pieces(group, *block)?;
            if is_cached {
                let mut hash = Xxh3::new();
                self.read_all(&pieces, |_, part| {
                    hash.update(part);
                    true
                })?;
                debug.left.lock().insert((group, *block), Left::Held(hash.digest()));
            }
        }
        Ok(())
    }

    /// Whether a block is cached still, with its memory, and where it lies.
    fn pieces(&self, group: usize, block: u32) -> Result<(bool, Vec<(ByteCount, ByteCount)>), MemoryError> {
        let state = self.state.lock();
        let is_cached = state.pool(group)?.state(block) == Ok(BlockState::Cached);
        Ok((is_cached, state.layout().groups()[group].pieces(block).collect()))
    }

    /// Reads pages until `take` has enough: it is given where each begins.
    fn read_all(
        &self,
        pieces: &[(ByteCount, ByteCount)],
        mut take: impl FnMut(ByteCount, &[u8]) -> bool,
    ) -> Result<(), MemoryError> {
        for (at, bytes) in pieces {
            let mut read = vec![0; usize::try_from(bytes.0.min(PAGE_BYTES.0)).unwrap_or(0)];
            let mut done = 0;
            while done < bytes.0 {
                let length = (bytes.0 - done).min(read.len() as u64);
                let part = &mut read[..usize::try_from(length).unwrap_or(0)];
                self.region.read(*at + ByteCount(done), part)?;
                if !take(*at + ByteCount(done), part) {
                    return Ok(());
                }
                done += length;
            }
        }
        Ok(())
    }

    fn fill(&self, debug: &Debug, group: usize, blocks: &BTreeSet<u32>) -> Result<(), MemoryError> {
        let (manager, deadline) = (self.manager(), self.manager().operation_deadline());
        let Some(events) = self.before()? else { return Ok(()) };
        for event in &events {
            manager.up.wait_for(event).map_err(MemoryError::device("order a fill"))?;
        }
        // In turn, so that nothing is unmapped or evicted meanwhile.
        let _turn = manager.take_turn_only(deadline)?;
        if !self.region.missing_bytes().is_zero() {
            return Ok(());
        }
        let Some(filler) = debug.fillers.get(&debug.fill_of(group)) else { return Ok(()) };
        let (blocks, copies) = {
            let state = self.state.lock();
            let pool = state.pool(group)?;
            // The others have lost their memory already.
            let blocks: Vec<u32> = blocks.iter().copied().filter(|block| pool.is_available(*block)).collect();
            let layout = &state.layout().groups()[group];
            let pieces = blocks.iter().flat_map(|block| layout.pieces(*block));
            let copies: Vec<BlockCopy> = pieces.flat_map(|(at, bytes)| filling(filler, at, bytes)).collect();
            (blocks, copies)
        };
        let done = self.region.load_blocks(&copies, None)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if done.wait(left).map_err(MemoryError::device("fill blocks"))? {
            debug.left.lock().extend(blocks.into_iter().map(|block| ((group, block), Left::Filled)));
            return Ok(());
        }
        Err(MemoryError::Deadline { doing: "filling freed blocks", waited: manager.options.operation_wait })
    }

    /// Tells if a block was written since nobody owns it.
    fn look_at(&self, debug: &Debug, group: usize, block: u32) -> Result<(), MemoryError> {
        // In turn: nothing that is filled loses its memory meanwhile.
        let _turn = self.manager().take_turn_only(self.manager().operation_deadline())?;
        let Some(left) = debug.left.lock().get(&(group, block)).copied() else { return Ok(()) };
        if !self.region.missing_bytes().is_zero() {
            return Ok(());
        }
        let (_, pieces) = self.pieces(group, block)?;
        let wrong = match left {
            Left::Filled => {
                let (fill, mut wrong) = (debug.fill_of(group), None);
                self.read_all(&pieces, |at, part| {
                    let place = part.iter().position(|byte| *byte != fill);
                    wrong = place.map(|place| at + ByteCount(place as u64));
                    wrong.is_none()
                })?;
                wrong
            }
            Left::Held(before) => {
                let mut hash = Xxh3::new();
                self.read_all(&pieces, |_, part| {
                    hash.update(part);
                    true
                })?;
                pieces.first().map(|(at, _)| *at).filter(|_| hash.digest() != before)
            }
        };
        if let Some(offset) = wrong {
            let cache = self.region.name();
            tracing::error!(cache, group, block, offset = offset.0, "a block was written that nobody owned");
            let mut strays = debug.strays.lock();
            if strays.len() < STRAYS_MAX {
                strays.push_back(Stray { group, block, offset });
            }
        }
        Ok(())
    }

    /// A granule loses its memory: what was filled there is no more, nor what reached into it.
    pub(super) fn unfill(&self, granule: GranuleId) {
        let Some(debug) = &self.debug else { return };
        let blocks =
            self.state.lock().pool(granule.group).ok().and_then(|pool| pool.blocks_and_units(granule.slot));
        if let Some((blocks, _)) = blocks {
            let from = blocks.start.saturating_sub(1);
            debug
                .left
                .lock()
                .retain(|(group, block), _| *group != granule.group || !(from..blocks.end).contains(block));
        }
    }

    /// Blocks are about to be written by a move: gives what comes with them.
    pub(super) fn unfill_moved(&self, group: usize, moves: &[BlockMove]) -> Carried {
        let Some(debug) = &self.debug else { return Carried::new() };
        let mut left = debug.left.lock();
        let carried = moves.iter().filter_map(|planned| match left.remove(&(group, planned.from)) {
            Some(Left::Held(hash)) => Some((planned.to, hash)),
            _ => None,
        });
        let carried = carried.collect();
        for planned in moves {
            left.remove(&(group, planned.to));
        }
        carried
    }

    /// They were moved.
    pub(super) fn moved_with(&self, group: usize, carried: Carried) {
        if let Some(debug) = &self.debug {
            debug.left.lock().extend(carried.into_iter().map(|(to, hash)| ((group, to), Left::Held(hash))));
        }
    }
}

fn filling(filler: &Arc<HostBuffer>, at: ByteCount, bytes: ByteCount) -> Vec<BlockCopy> {
    let parts = (0..bytes.0).step_by(usize::try_from(FILLER_BYTES.0).unwrap_or(usize::MAX));
    let part = |from: u64| BlockCopy {
        offset: at + ByteCount(from),
        bytes: ByteCount((bytes.0 - from).min(FILLER_BYTES.0)),
        host: Arc::clone(filler),
        host_offset: ByteCount::ZERO,
    };
    parts.map(part).collect()
}

impl KvCache {
    /// In debug mode: writes to blocks that nobody owned, found since it was asked last. Looks first at all blocks that were
    /// filled when they were freed, and at those that were cached then.
    ///
    /// # Errors
    /// [`MemoryError::Kv`] without debug mode, [`MemoryError::Deadline`], [`MemoryError::Device`].
    pub fn strays(&self) -> Result<Vec<Stray>, MemoryError> {
        let Some(debug) = &self.shared.debug else { return Err(KvError::NoDebug.into()) };
        let _call = self.shared.debug_call(debug)?;
        let left: Vec<(usize, u32)> = debug.left.lock().keys().copied().collect();
        for (group, block) in left {
            let before = debug.strays.lock().len();
            self.shared.look_at(debug, group, block)?;
            if debug.strays.lock().len() > before {
                // Told once.
                debug.left.lock().remove(&(group, block));
            }
        }
        Ok(debug.strays.lock().drain(..).collect())
    }
}
