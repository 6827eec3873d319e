//! The blocks of one group: who owns them, which are free, and in which granules they lie.
//!
//! Apart because it is the part that engines call thousands of times a second, and because it knows nothing of bytes,
//! limits or contents: granules come and go by [`coming`](BlockPool::coming), [`mapped`](BlockPool::mapped),
//! [`leaving`](BlockPool::leaving) and [`gone`](BlockPool::gone), whoever maps them. Keeps I7: a block has one owner or is
//! shared by count; every refused call has changed nothing.
//!
//! A block belongs to the granule of its first byte. One that reaches into the next granule can be had only while both are
//! mapped, and keeps both. Allocating takes from the fullest granule that has room, so that the others drain; a batch looks
//! past those with less room than it wants, or than half a word, while there are others. So what it costs does not depend on
//! how many granules there are, and on how they are filled as far as they have such room.

use super::bits::Bits;
use super::fill::{EMPTY, Fill, NONE, USELESS};
use super::ids::BlockId;
use super::layout::GroupLayout;
use super::runs;
use crate::bytes::PAGE_BYTES;

mod checks;
mod granules;
mod owners;
mod pick;

pub use granules::GranuleError;
use owners::Owners;
use pick::Pick;

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

/// Room for what a free names that is kept for the next one.
const NAMED_KEPT: usize = 4096;

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
}

/// Blocks of one word that a call names one after another, each once.
#[derive(Clone, Copy, Debug)]
struct Named {
    word: usize,
    bits: u64,
    /// How many they are.
    count: u32,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct BlockPool {
    piece_bytes: u64,
    /// Bytes of a unit are a power of two.
    unit_shift: u32,
    blocks: u32,
    owners: Owners,
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
    /// What a free names, while it runs.
    named: Vec<Named>,
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
            owners: Owners::new(blocks),
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
            named: Vec::new(),
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
        Ok(self.owners.state(self.known(block)?))
    }

    /// Fills `ids` with blocks, one owner each. False, and nothing is changed, if fewer can be had now.
    #[inline]
    pub fn alloc<T: BlockId>(&mut self, ids: &mut [T]) -> bool {
        if ids.len() > self.figures.available as usize {
            return false;
        }
        let mut filled = 0;
        let mut pick = Pick::default();
        while filled < ids.len() {
            // There is one, or `available` would be less.
            let Some(slot) = self.pick(ids.len() - filled, &mut pick) else { break };
            let granule = &mut self.granules[slot as usize];
            let open = &mut ids[filled..];
            let wanted = granule.free.min(u32::try_from(open.len()).unwrap_or(u32::MAX));
            let (owners, mut at, mut last) = (&mut self.owners, 0, NONE);
            let taken =
                self.free.take(granule.first_block, granule.end_block, wanted, |word, bits, count| {
                    owners.own(word, bits);
                    runs::write(&mut open[at..], word, bits, count as usize);
                    at += count as usize;
                    last = Bits::last(word, bits);
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
        let mut named = core::mem::take(&mut self.named);
        named.clear();
        let taken = self.disown(ids, &mut named);
        let freed = taken.map(|()| self.settle(&named, cached));
        named.shrink_to(NAMED_KEPT);
        self.named = named;
        freed
    }

    /// The first half of [`free`](Self::free): all lose an owner, or none does. What is named is left in `named`.
    #[inline]
    fn disown<T: BlockId>(&mut self, ids: &[T], named: &mut Vec<Named>) -> Result<(), BlockError> {
        // Who is cached hears of it in the order of the ids.
        let is_rising = self.seals > 0;
        let mut at = 0;
        while let Some(left) = ids.get(at..).filter(|left| !left.is_empty()) {
            let (word, bits, count) = runs::read(left, is_rising);
            if !self.owners.disown(word, bits) {
                // Some are shared, or one of them is wrong: which is said by looking at one after another.
                for (after, id) in left[..count as usize].iter().enumerate() {
                    let known = self.known_id(*id);
                    if let Err(error) = known.and_then(|block| self.owners.leave(block)) {
                        for block in ids[..at + after].iter().filter_map(|id| id.block()) {
                            self.owners.rejoin(block);
                        }
                        return Err(error);
                    }
                }
            }
            named.push(Named { word, bits, count });
            at += count as usize;
        }
        Ok(())
    }

    /// The second half: what nobody owns any more changes state.
    #[inline]
    fn settle(&mut self, named: &[Named], mut cached: impl FnMut(u32)) -> Freed {
        let mut freed = Freed::default();
        let mut run = FreeRun::default();
        for Named { word, bits, count } in named {
            // Not what others own still, nor what was settled a moment ago because it is named twice.
            let mut left = self.owners.unowned(*word, *bits) & !self.free.word(*word);
            let mut sealed = if self.seals > 0 { left & self.sealed.word(*word) } else { 0 };
            left &= !sealed;
            while sealed != 0 {
                let block = Bits::id(*word, sealed.trailing_zeros());
                self.owners.put(block, BlockState::Cached);
                self.granule_mut(block).cached += 1;
                freed.cached += 1;
                cached(block);
                sealed &= sealed - 1;
            }
            if left == 0 {
                continue;
            }
            // Counting bits is slow, and mostly all that were named are free now, and of one granule.
            let mut many = if left == *bits { *count } else { left.count_ones() };
            self.free.set_word(*word, left);
            freed.free += many;
            while left != 0 {
                let block = Bits::id(*word, left.trailing_zeros());
                if block < run.first_block || block >= run.end_block {
                    freed.has_emptied |= self.end_run(&run);
                    let slot = self.units[self.unit_of(block)];
                    let granule = &self.granules[slot as usize];
                    let (first_block, end_block) = (granule.first_block, granule.end_block);
                    run = FreeRun { slot, first_block, end_block, count: 0, has_last: false };
                }
                let within = left & Bits::below(*word, run.end_block);
                let here = if within == left { many } else { within.count_ones() };
                run.count += here;
                run.has_last |= Bits::last(*word, within) == run.end_block - 1;
                left &= !within;
                many -= here;
            }
        }
        freed.has_emptied |= self.end_run(&run);
        self.figures.owned -= freed.free + freed.cached;
        self.figures.cached += freed.cached;
        self.figures.available += freed.free;
        freed
    }

    /// One block that nobody owns any more.
    fn settle_one(&mut self, block: u32) -> Freed {
        let (word, bits) = Bits::split(block);
        self.settle(&[Named { word, bits, count: 1 }], |_| ())
    }

    /// So many blocks of one granule became free. True if a granule is empty by that.
    #[inline]
    fn end_run(&mut self, run: &FreeRun) -> bool {
        if run.count == 0 {
            return false;
        }
        let granule = &mut self.granules[run.slot as usize];
        granule.used -= run.count;
        granule.free += run.count;
        let (is_over, next_unit) = (granule.straddles && run.has_last, granule.first_unit + granule.units);
        let mut has_emptied = self.relist(run.slot);
        if is_over {
            has_emptied |= self.set_pinned(next_unit, false);
        }
        has_emptied
    }

    /// One owner more for each.
    ///
    /// # Errors
    /// [`BlockError::Unknown`], [`BlockError::NotOwned`], [`BlockError::TooManyOwners`]; nothing is changed.
    pub fn fork<T: BlockId>(&mut self, ids: &[T]) -> Result<(), BlockError> {
        for (at, id) in ids.iter().enumerate() {
            let known = self.known_id(*id);
            if let Err(error) = known.and_then(|block| self.owners.join(block)) {
                for id in &ids[..at] {
                    if let Some(block) = id.block() {
                        self.owners.leave(block)?;
                    }
                }
                return Err(error);
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
            BlockState::Owned(_) => self.owners.join(block).map(|()| false),
            BlockState::Cached => {
                self.owners.put(block, BlockState::Owned(1));
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
        self.check_owned(block)?;
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
        self.owners.put(block, BlockState::Free);
        Ok(self.settle_one(block))
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
        self.owners.put(block, BlockState::Owned(1));
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
            }
            BlockState::Owned(_) => {}
        }
        self.owners.put(to, state);
        if is_sealed {
            self.sealed.clear(from);
            self.sealed.set(to);
        }
        self.owners.put(from, BlockState::Free);
        Ok(self.settle_one(from))
    }

    /// Whether somebody owns it.
    ///
    /// # Errors
    /// [`BlockError::Unknown`], [`BlockError::NotOwned`].
    pub fn check_owned<T: BlockId>(&self, id: T) -> Result<(), BlockError> {
        let block = self.known_id(id)?;
        match self.owners.state(block) {
            BlockState::Owned(_) => Ok(()),
            BlockState::Free | BlockState::Cached => Err(BlockError::NotOwned { block }),
        }
    }

    const fn known(&self, block: u32) -> Result<u32, BlockError> {
        if block < self.blocks {
            return Ok(block);
        }
        Err(BlockError::Unknown { block: block as i64, blocks: self.blocks })
    }

    fn known_id<T: BlockId>(&self, id: T) -> Result<u32, BlockError> {
        let unknown = BlockError::Unknown { block: id.shown(), blocks: self.blocks };
        id.block().filter(|block| *block < self.blocks).ok_or(unknown)
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
