//! The blocks of one group: who owns them, which are free, and in which granules they lie.
//!
//! Apart because it is the part that engines call thousands of times a second, and because it knows nothing of bytes,
//! limits or contents: granules come and go by [`coming`](BlockPool::coming), [`mapped`](BlockPool::mapped),
//! [`leaving`](BlockPool::leaving) and [`gone`](BlockPool::gone), whoever maps them. Keeps I7: a block has one owner or is
//! shared by count; every refused call has changed nothing.
//!
//! A block belongs to the granule of its first byte. One that reaches into the next granule can be had only while both are
//! mapped, and keeps both. Allocating takes from the fullest granule that has room, so that the others drain; what it costs
//! depends neither on how many granules there are nor on how they are filled.

use super::bits::Bits;
use super::fill::{EMPTY, Fill, NONE, USELESS};
use super::ids::BlockId;
use super::layout::GroupLayout;
use crate::bytes::PAGE_BYTES;

mod checks;
mod granules;

pub use granules::GranuleError;

/// Why a call on blocks was refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// There is no such block.
    #[error("block {block} does not exist: ids are 0 to {}", blocks.saturating_sub(1))]
    Unknown {
        /// The id given.
        block: i64,
        /// How many there are.
        blocks: u32,
    },
    /// Nobody owns the block: it was never allocated, or freed before, or is named more often than it is owned.
    #[error("block {block} is not owned: it was never allocated, or was freed already")]
    NotOwned {
        /// The id given.
        block: u32,
    },
    /// It is owned already, or holds nothing that could be found again.
    #[error("block {block} is not a cached one")]
    NotCached {
        /// The id given.
        block: u32,
    },
    /// It cannot be taken: somebody has it, or it has no memory.
    #[error("block {block} is not free")]
    NotFree {
        /// The id given.
        block: u32,
    },
    /// More owners than can be counted.
    #[error("block {block} has as many owners as can be counted")]
    TooManyOwners {
        /// The id given.
        block: u32,
    },
}

/// What a block is, in its word of `counts`; any other number is how many own it.
const FREE: u32 = u32::MAX;
const CACHED: u32 = u32::MAX - 1;
const OWNERS_MAX: u32 = u32::MAX - 2;

/// What somebody may ask of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Nobody's, and holding nothing.
    Free,
    /// Nobody's, but what it holds can be found again until it is evicted.
    Cached,
    /// Owned by so many.
    Owned(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Being mapped.
    Coming,
    Mapped,
    /// Being unmapped.
    Leaving,
}

#[derive(Clone, Copy, Debug)]
struct Granule {
    first_unit: u32,
    units: u32,
    /// The blocks whose first byte lies in it.
    first_block: u32,
    end_block: u32,
    /// Whether the last of them reaches into the next granule.
    straddles: bool,
    /// Whether a block of the granule before that is not free reaches into this one.
    pinned: bool,
    stage: Stage,
    /// Blocks of it that are owned or cached.
    used: u32,
    /// Those of them that are cached.
    cached: u32,
    /// Blocks of it that can be had now.
    free: u32,
    /// For its place among the lists: `used * scale >> 32` is which of the lists between empty and full.
    scale: u64,
    /// Whether it is counted as empty.
    counts_empty: bool,
    /// When it became empty most lately ([`BlockPool::clock`]).
    emptied: u64,
}

impl Granule {
    const fn is_empty(&self) -> bool {
        self.used == 0 && !self.pinned
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "less than the number of lists")]
    fn list(&self) -> Option<u8> {
        if self.stage != Stage::Mapped {
            None
        } else if self.is_empty() {
            Some(if self.free > 0 { EMPTY } else { USELESS })
        } else if self.free == 0 {
            None
        } else {
            Some(1 + ((u64::from(self.used) * self.scale) >> 32) as u8)
        }
    }
}

/// How many blocks are what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockFigures {
    /// Owned by somebody.
    pub owned: u32,
    /// Cached.
    pub cached: u32,
    /// Free and with memory.
    pub available: u32,
    /// Units that are mapped or are being mapped or unmapped.
    pub units: u32,
    /// Units in granules that hold nothing.
    pub units_empty: u32,
}

/// What a free did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Blocks that are free now.
    pub free: u32,
    /// Blocks that are cached now.
    pub cached: u32,
    /// Whether a granule became empty.
    pub has_emptied: bool,
}

/// Blocks of one granule that become free one after another.
#[derive(Clone, Copy, Debug, Default)]
struct FreeRun {
    slot: u32,
    first_block: u32,
    end_block: u32,
    count: u32,
    /// Whether the granule's last block is among them.
    has_last: bool,
    /// Bits that are not in the set yet.
    word: usize,
    bits: u64,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct BlockPool {
    piece_bytes: u64,
    /// Bytes of a unit are a power of two.
    unit_shift: u32,
    blocks: u32,
    counts: Vec<u32>,
    free: Bits,
    sealed: Bits,
    /// Blocks in `sealed`.
    seals: u32,
    /// Unit -> slot in `granules`.
    units: Vec<u32>,
    granules: Vec<Granule>,
    slots_free: Vec<u32>,
    fill: Fill,
    figures: BlockFigures,
    clock: u64,
    /// No unit before it is open.
    first_open: u32,
}

impl BlockPool {
    /// The blocks of a group; none has memory yet.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "a layout has fewer than u32::MAX pages")]
    pub fn new(layout: &GroupLayout) -> Self {
        let blocks = layout.blocks();
        Self {
            piece_bytes: layout.piece_bytes().0,
            unit_shift: (layout.unit_pages() * PAGE_BYTES.0).ilog2(),
            blocks,
            counts: vec![FREE; blocks as usize],
            free: Bits::new(blocks),
            sealed: Bits::new(blocks),
            seals: 0,
            units: vec![NONE; layout.units() as usize],
            granules: Vec::new(),
            slots_free: Vec::new(),
            fill: Fill::new(),
            figures: BlockFigures::default(),
            clock: 0,
            first_open: 0,
        }
    }

    /// How many blocks there are.
    #[must_use]
    pub const fn blocks(&self) -> u32 {
        self.blocks
    }

    /// How many are what.
    #[must_use]
    pub const fn figures(&self) -> BlockFigures {
        self.figures
    }

    /// Blocks that can be had now.
    #[must_use]
    pub const fn available(&self) -> u32 {
        self.figures.available
    }

    /// Whether a block can be had now.
    #[must_use]
    pub fn is_available(&self, block: u32) -> bool {
        self.free.has(block)
    }

    /// Blocks that are owned or cached.
    #[must_use]
    pub const fn used(&self) -> u32 {
        self.figures.owned + self.figures.cached
    }

    /// What one block is.
    ///
    /// # Errors
    /// [`BlockError::Unknown`].
    pub fn state(&self, block: u32) -> Result<BlockState, BlockError> {
        let unknown = BlockError::Unknown { block: i64::from(block), blocks: self.blocks };
        Ok(match *self.counts.get(block as usize).ok_or(unknown)? {
            FREE => BlockState::Free,
            CACHED => BlockState::Cached,
            owners => BlockState::Owned(owners),
        })
    }

    /// Fills `ids` with blocks, one owner each. False, and nothing is changed, if fewer can be had now.
    #[inline]
    pub fn alloc<T: BlockId>(&mut self, ids: &mut [T]) -> bool {
        if ids.len() > self.figures.available as usize {
            return false;
        }
        let mut filled = 0;
        while filled < ids.len() {
            // There is one, or `available` would be less.
            let Some(slot) = self.fill.fullest() else { break };
            let granule = &mut self.granules[slot as usize];
            let open = &mut ids[filled..];
            let wanted = granule.free.min(u32::try_from(open.len()).unwrap_or(u32::MAX));
            let (counts, mut at, mut last) = (&mut self.counts, 0, NONE);
            let taken = self.free.take(granule.first_block, granule.end_block, wanted, |block| {
                counts[block as usize] = 1;
                open[at] = T::of(block);
                at += 1;
                last = block;
            });
            debug_assert_eq!(taken, wanted, "granule {slot} counts more free blocks than it has");
            granule.free -= taken;
            granule.used += taken;
            let is_pinning = granule.straddles && last == granule.end_block - 1;
            let next_unit = granule.first_unit + granule.units;
            self.relist(slot);
            if is_pinning {
                self.set_pinned(next_unit, true);
            }
            self.figures.available -= taken;
            self.figures.owned += taken;
            filled += at;
        }
        debug_assert_eq!(filled, ids.len());
        true
    }

    /// Takes one owner from each; an id named twice is taken from twice. What nobody owns any more is free, or cached if it
    /// was sealed: `cached` hears of those.
    ///
    /// # Errors
    /// [`BlockError::Unknown`], [`BlockError::NotOwned`]; nothing is changed.
    #[inline]
    pub fn free<T: BlockId>(&mut self, ids: &[T], cached: impl FnMut(u32)) -> Result<Freed, BlockError> {
        for (at, id) in ids.iter().enumerate() {
            match self.owned_place(*id) {
                Ok(place) => self.counts[place] -= 1,
                Err(error) => {
                    self.give_back_counts(&ids[..at]);
                    return Err(error);
                }
            }
        }
        Ok(self.settle(ids, cached))
    }

    /// The second half of [`free`](Self::free): the counts are taken, and what has none left changes state.
    #[inline]
    fn settle<T: BlockId>(&mut self, ids: &[T], mut cached: impl FnMut(u32)) -> Freed {
        let mut freed = Freed::default();
        let mut run = FreeRun::default();
        for id in ids {
            let Some(block) = id.block() else { continue };
            // Named twice, or shared.
            let count = &mut self.counts[block as usize];
            if *count != 0 {
                continue;
            }
            if self.seals > 0 && self.sealed.has(block) {
                *count = CACHED;
                self.granule_mut(block).cached += 1;
                freed.cached += 1;
                cached(block);
                continue;
            }
            *count = FREE;
            if block < run.first_block || block >= run.end_block {
                freed.has_emptied |= self.end_run(&mut run);
                let slot = self.units[self.unit_of(block)];
                let granule = &self.granules[slot as usize];
                run = FreeRun { slot, first_block: granule.first_block, end_block: granule.end_block, ..run };
            }
            // Neighbours share a word, and mostly come together.
            let (word, bit) = Bits::split(block);
            if word != run.word {
                if run.bits != 0 {
                    self.free.set_word(run.word, run.bits);
                }
                (run.word, run.bits) = (word, 0);
            }
            run.bits |= bit;
            run.count += 1;
            freed.free += 1;
            if block + 1 == run.end_block {
                run.has_last = true;
            }
        }
        freed.has_emptied |= self.end_run(&mut run);
        self.figures.owned -= freed.free + freed.cached;
        self.figures.cached += freed.cached;
        self.figures.available += freed.free;
        freed
    }

    /// So many blocks of one granule became free. True if a granule is empty by that.
    #[inline]
    fn end_run(&mut self, run: &mut FreeRun) -> bool {
        if run.count == 0 {
            return false;
        }
        self.free.set_word(run.word, run.bits);
        let granule = &mut self.granules[run.slot as usize];
        granule.used -= run.count;
        granule.free += run.count;
        let (is_over, next_unit) = (granule.straddles && run.has_last, granule.first_unit + granule.units);
        let mut has_emptied = self.relist(run.slot);
        if is_over {
            has_emptied |= self.set_pinned(next_unit, false);
        }
        *run = FreeRun { word: run.word, ..FreeRun::default() };
        has_emptied
    }

    fn give_back_counts<T: BlockId>(&mut self, ids: &[T]) {
        for id in ids {
            if let Some(block) = id.block() {
                self.counts[block as usize] += 1;
            }
        }
    }

    /// One owner more for each.
    ///
    /// # Errors
    /// [`BlockError::Unknown`], [`BlockError::NotOwned`], [`BlockError::TooManyOwners`]; nothing is changed.
    pub fn fork<T: BlockId>(&mut self, ids: &[T]) -> Result<(), BlockError> {
        for (at, id) in ids.iter().enumerate() {
            let place = self.owned_place(*id).and_then(|place| {
                let block = id.block().unwrap_or(NONE);
                if self.counts[place] < OWNERS_MAX {
                    Ok(place)
                } else {
                    Err(BlockError::TooManyOwners { block })
                }
            });
            match place {
                Ok(place) => self.counts[place] += 1,
                Err(error) => {
                    for id in &ids[..at] {
                        if let Some(block) = id.block() {
                            self.counts[block as usize] -= 1;
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// One owner more for a block that is owned or cached: what it holds was found again. True if it was cached.
    ///
    /// # Errors
    /// [`BlockError::Unknown`], [`BlockError::NotCached`] for a free one, [`BlockError::TooManyOwners`]; nothing is changed.
    pub fn share(&mut self, block: u32) -> Result<bool, BlockError> {
        match self.state(block)? {
            BlockState::Free => Err(BlockError::NotCached { block }),
            BlockState::Owned(OWNERS_MAX) => Err(BlockError::TooManyOwners { block }),
            BlockState::Owned(_) => {
                self.counts[block as usize] += 1;
                Ok(false)
            }
            BlockState::Cached => {
                self.counts[block as usize] = 1;
                self.granule_mut(block).cached -= 1;
                self.figures.cached -= 1;
                self.figures.owned += 1;
                Ok(true)
            }
        }
    }

    /// From now on what an owned block holds can be found again: it becomes cached, not free, when nobody owns it.
    ///
    /// # Errors
    /// [`BlockError::Unknown`], [`BlockError::NotOwned`]; nothing is changed.
    pub fn seal(&mut self, block: u32) -> Result<(), BlockError> {
        self.owned_place(block)?;
        if !self.sealed.has(block) {
            self.sealed.set(block);
            self.seals += 1;
        }
        Ok(())
    }

    /// Whether it is sealed.
    #[must_use]
    pub fn is_sealed(&self, block: u32) -> bool {
        self.sealed.has(block)
    }

    /// What it holds can no longer be found: a cached block becomes free, an owned one will. Whether a granule became empty
    /// is in the answer.
    ///
    /// # Errors
    /// [`BlockError::Unknown`], [`BlockError::NotCached`] if it is not sealed; nothing is changed.
    pub fn unseal(&mut self, block: u32) -> Result<Freed, BlockError> {
        let state = self.state(block)?;
        if !self.sealed.has(block) {
            return Err(BlockError::NotCached { block });
        }
        self.sealed.clear(block);
        self.seals -= 1;
        if state != BlockState::Cached {
            return Ok(Freed::default());
        }
        self.granule_mut(block).cached -= 1;
        self.figures.cached -= 1;
        self.figures.owned += 1;
        self.counts[block as usize] = 0;
        Ok(self.settle(&[block], |_| ()))
    }

    /// Takes one certain block, as the target of a move.
    ///
    /// # Errors
    /// [`BlockError::Unknown`], [`BlockError::NotFree`]; nothing is changed.
    pub fn take(&mut self, block: u32) -> Result<(), BlockError> {
        if self.state(block)? != BlockState::Free || !self.free.has(block) {
            return Err(BlockError::NotFree { block });
        }
        self.free.clear(block);
        self.counts[block as usize] = 1;
        let slot = self.units[self.unit_of(block)];
        let granule = &mut self.granules[slot as usize];
        granule.free -= 1;
        granule.used += 1;
        let next_unit = granule.first_unit + granule.units;
        let is_pinning = granule.straddles && block == granule.end_block - 1;
        self.relist(slot);
        if is_pinning {
            self.set_pinned(next_unit, true);
        }
        self.figures.available -= 1;
        self.figures.owned += 1;
        Ok(())
    }

    /// Gives all that `from` is (owners, seal, being cached) to `to`, which was [taken](Self::take) for it; `from` is free
    /// then.
    ///
    /// # Errors
    /// [`BlockError`]; nothing is changed.
    pub fn renumber(&mut self, from: u32, to: u32) -> Result<Freed, BlockError> {
        if self.state(to)? != BlockState::Owned(1) || self.sealed.has(to) {
            return Err(BlockError::NotFree { block: to });
        }
        let state = self.state(from)?;
        let is_sealed = self.sealed.has(from);
        match state {
            BlockState::Free => return Err(BlockError::NotOwned { block: from }),
            BlockState::Cached => {
                self.granule_mut(from).cached -= 1;
                self.granule_mut(to).cached += 1;
                self.counts[to as usize] = CACHED;
            }
            BlockState::Owned(owners) => self.counts[to as usize] = owners,
        }
        if is_sealed {
            self.sealed.clear(from);
            self.sealed.set(to);
        }
        self.counts[from as usize] = 0;
        Ok(self.settle(&[from], |_| ()))
    }

    /// Whether somebody owns it.
    ///
    /// # Errors
    /// [`BlockError::Unknown`], [`BlockError::NotOwned`].
    pub fn check_owned<T: BlockId>(&self, id: T) -> Result<(), BlockError> {
        self.owned_place(id).map(drop)
    }

    /// Where an owned block's word is.
    #[inline]
    fn owned_place<T: BlockId>(&self, id: T) -> Result<usize, BlockError> {
        let Some(block) = id.block().filter(|block| *block < self.blocks) else {
            return Err(BlockError::Unknown { block: id.shown(), blocks: self.blocks });
        };
        match self.counts[block as usize] {
            0 | FREE | CACHED => Err(BlockError::NotOwned { block }),
            _ => Ok(block as usize),
        }
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "a layout has fewer than u32::MAX units")]
    const fn unit_of(&self, block: u32) -> usize {
        ((block as u64 * self.piece_bytes) >> self.unit_shift) as usize
    }

    fn granule_mut(&mut self, block: u32) -> &mut Granule {
        let slot = self.units[self.unit_of(block)];
        &mut self.granules[slot as usize]
    }

    /// Says whether a block of the granule before reaches into the one at `unit`. True if it is empty by that.
    fn set_pinned(&mut self, unit: u32, pinned: bool) -> bool {
        let Some(slot) = self.units.get(unit as usize).copied().filter(|slot| *slot != NONE) else {
            return false;
        };
        self.granules[slot as usize].pinned = pinned;
        self.relist(slot)
    }

    /// Puts a granule where it belongs. True if it became empty.
    #[inline]
    fn relist(&mut self, slot: u32) -> bool {
        let granule = &mut self.granules[slot as usize];
        let is_empty = granule.stage == Stage::Mapped && granule.is_empty();
        let was_empty = core::mem::replace(&mut granule.counts_empty, is_empty);
        if is_empty && !was_empty {
            self.clock += 1;
            granule.emptied = self.clock;
            self.figures.units_empty += granule.units;
        } else if was_empty && !is_empty {
            self.figures.units_empty -= granule.units;
        }
        let list = granule.list();
        self.fill.put(slot, list);
        is_empty && !was_empty
    }
}
