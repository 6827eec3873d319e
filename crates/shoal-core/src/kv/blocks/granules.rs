//! Granules of a group: how memory comes and goes under its blocks.
//!
//! Apart because this is the slow side: whoever maps says what is under way, so that several may do so at once and nothing
//! is handed out before it is there.

use core::ops::Range;

use super::super::fill::{EMPTY, NONE, PARTS, USELESS};
use super::{BlockPool, BlockState, Granule, Stage};

/// Why a granule cannot come or go. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GranuleError {
    /// The units are outside the group, no power of two, or belong to a granule.
    #[error("units {first}..{} cannot become a granule", first + units)]
    NotOpen {
        /// First unit.
        first: u32,
        /// How many.
        units: u32,
    },
    /// It is not at the stage that it would have to be at.
    #[error("granule {slot} is not {wanted}")]
    Stage {
        /// Which.
        slot: u32,
        /// What it would have to be.
        wanted: &'static str,
    },
    /// Blocks lie in it, or reach into it.
    #[error("granule {slot} holds {used} blocks")]
    InUse {
        /// Which.
        slot: u32,
        /// Blocks that lie in it.
        used: u32,
    },
}

impl BlockPool {
    /// Units of each plane.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "a layout has fewer than u32::MAX pages")]
    pub fn units(&self) -> u32 {
        self.units.len() as u32
    }

    /// Counts the moments at which a granule became empty. What was empty at one moment and has not been used since is in
    /// [`empty`](Self::empty) of it.
    #[must_use]
    pub const fn clock(&self) -> u64 {
        self.clock
    }

    /// The lowest place for a granule of so many units (a power of two) that no granule covers.
    #[must_use]
    pub fn open_run(&mut self, units: u32) -> Option<u32> {
        while self.units.get(self.first_open as usize).is_some_and(|slot| *slot != NONE) {
            self.first_open += 1;
        }
        let mut first = self.first_open.next_multiple_of(units.max(1));
        while first.checked_add(units)? <= self.units() {
            let run = &self.units[first as usize..(first + units) as usize];
            if run.iter().all(|slot| *slot == NONE) {
                return Some(first);
            }
            first += units;
        }
        None
    }

    /// Blocks that can be had once a granule of `units` units at `first` is there, and with it all that is coming.
    #[must_use]
    pub fn yields(&self, first: u32, units: u32) -> u32 {
        let will_be_there = |slot: Option<u32>| {
            slot.map(|slot| self.granules[slot as usize]).filter(|granule| granule.stage != Stage::Leaving)
        };
        let blocks = self.blocks_of(first, units);
        let mut count = blocks.end - blocks.start;
        if self.straddles(&blocks, first + units) && will_be_there(self.granule_at(first + units)).is_none() {
            count -= 1;
        }
        let before = first.checked_sub(1).and_then(|unit| will_be_there(self.granule_at(unit)));
        count + u32::from(before.is_some_and(|granule| granule.straddles))
    }

    /// A granule of `units` units at `first` is being mapped. Returns its slot.
    ///
    /// # Errors
    /// [`GranuleError::NotOpen`].
    pub fn coming(&mut self, first: u32, units: u32) -> Result<u32, GranuleError> {
        let not_open = GranuleError::NotOpen { first, units };
        let end = first.checked_add(units).filter(|end| *end <= self.units()).ok_or(not_open)?;
        let range = first as usize..end as usize;
        if !units.is_power_of_two() || self.units[range.clone()].iter().any(|slot| *slot != NONE) {
            return Err(not_open);
        }
        let blocks = self.blocks_of(first, units);
        let granule = Granule {
            first_unit: first,
            units,
            first_block: blocks.start,
            end_block: blocks.end,
            straddles: self.straddles(&blocks, end),
            pinned: false,
            stage: Stage::Coming,
            used: 0,
            cached: 0,
            free: 0,
            scale: (u64::from(PARTS - 1) << 32) / u64::from((blocks.end - blocks.start).max(1)),
            counts_empty: false,
            emptied: 0,
        };
        let slot = if let Some(slot) = self.slots_free.pop() {
            self.granules[slot as usize] = granule;
            slot
        } else {
            self.granules.push(granule);
            u32::try_from(self.granules.len() - 1).map_err(|_| not_open)?
        };
        self.units[range].fill(slot);
        self.fill.reach(slot);
        self.figures.units += units;
        Ok(slot)
    }

    /// The granule has memory now: its blocks can be had.
    ///
    /// # Errors
    /// [`GranuleError::Stage`].
    pub fn mapped(&mut self, slot: u32) -> Result<(), GranuleError> {
        let granule = *self.at(slot, Stage::Coming, "being mapped")?;
        self.granules[slot as usize].stage = Stage::Mapped;
        let mut end_block = granule.end_block;
        if granule.straddles && !self.is_mapped(granule.first_unit + granule.units) {
            end_block -= 1;
        }
        for block in granule.first_block..end_block {
            debug_assert_eq!(self.owners.state(block), BlockState::Free);
            self.free.set(block);
        }
        let free = end_block - granule.first_block;
        self.granules[slot as usize].free = free;
        self.figures.available += free;
        self.relist(slot);
        if let Some(before) = self.straddling_into(granule.first_unit) {
            self.free.set(self.granules[before as usize].end_block - 1);
            self.granules[before as usize].free += 1;
            self.figures.available += 1;
            self.relist(before);
        }
        Ok(())
    }

    /// The granule's memory is about to go: none of its blocks can be had any more.
    ///
    /// # Errors
    /// [`GranuleError::Stage`], [`GranuleError::InUse`].
    pub fn leaving(&mut self, slot: u32) -> Result<(), GranuleError> {
        let granule = *self.at(slot, Stage::Mapped, "mapped")?;
        if !granule.is_empty() {
            return Err(GranuleError::InUse { slot, used: granule.used });
        }
        if let Some(before) = self.straddling_into(granule.first_unit) {
            self.free.clear(self.granules[before as usize].end_block - 1);
            self.granules[before as usize].free -= 1;
            self.figures.available -= 1;
            self.relist(before);
        }
        self.granules[slot as usize].stage = Stage::Leaving;
        self.free.take(granule.first_block, granule.end_block, u32::MAX, |_, _, _| ());
        self.figures.available -= granule.free;
        self.granules[slot as usize].free = 0;
        self.relist(slot);
        Ok(())
    }

    /// The granule has no memory (any more): it did not come, or it has gone.
    ///
    /// # Errors
    /// [`GranuleError::Stage`] unless it was coming or leaving.
    pub fn gone(&mut self, slot: u32) -> Result<(), GranuleError> {
        let granule = match self.granules.get(slot as usize) {
            Some(granule) if granule.stage != Stage::Mapped && self.is_at(slot) => *granule,
            _ => return Err(GranuleError::Stage { slot, wanted: "coming or leaving" }),
        };
        let range = granule.first_unit as usize..(granule.first_unit + granule.units) as usize;
        self.units[range].fill(NONE);
        self.fill.put(slot, None);
        self.slots_free.push(slot);
        self.figures.units -= granule.units;
        self.first_open = self.first_open.min(granule.first_unit);
        Ok(())
    }

    /// Whether any granule is leaving: its memory is about to be room for others.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        let slots = (0_u32..).zip(&self.granules);
        slots.into_iter().any(|(slot, granule)| granule.stage == Stage::Leaving && self.is_at(slot))
    }

    /// The units of a granule: first and how many.
    #[must_use]
    pub fn units_of(&self, slot: u32) -> Option<(u32, u32)> {
        let granule = self.granules.get(slot as usize).filter(|_| self.is_at(slot))?;
        Some((granule.first_unit, granule.units))
    }

    /// The granule that covers a unit.
    #[must_use]
    pub fn granule_at(&self, unit: u32) -> Option<u32> {
        self.units.get(unit as usize).copied().filter(|slot| *slot != NONE)
    }

    /// Granules in which nothing lies and into which nothing reaches, empty since `clock` or before; those that are of no
    /// use first.
    pub fn empty(&self, clock: u64) -> impl Iterator<Item = u32> + '_ {
        let lists = self.fill.list(USELESS).chain(self.fill.list(EMPTY));
        lists.filter(move |slot| self.granules[*slot as usize].emptied <= clock)
    }

    /// Granules that would be empty if what is cached were evicted, each with how many blocks that takes; the cheapest last.
    #[must_use]
    pub fn evictable(&self) -> Vec<(u32, u32)> {
        let mut found: Vec<(u32, u32)> = Vec::new();
        for slot in self.slots() {
            let granule = self.granules[slot as usize];
            let is_cached = granule.stage == Stage::Mapped && granule.used == granule.cached;
            let before = u32::from(granule.pinned);
            let may_go = !granule.pinned || self.owners.state(granule.first_block - 1) == BlockState::Cached;
            if is_cached && may_go && granule.used + before > 0 {
                found.push((slot, granule.cached + before));
            }
        }
        found.sort_unstable_by_key(|(_, cached)| core::cmp::Reverse(*cached));
        found
    }

    /// The granules in which a block begins and ends.
    #[must_use]
    pub fn granules_of(&self, block: u32) -> Option<(u32, u32)> {
        let first = self.granule_of(block)?;
        let granule = self.granules[first as usize];
        let is_across = granule.straddles && block + 1 == granule.end_block;
        let next = (granule.first_unit + granule.units) as usize;
        let last = self.units.get(next).copied().filter(|slot| is_across && *slot != NONE);
        Some((first, last.unwrap_or(first)))
    }

    /// Whether a block that is owned or cached reaches into a granule from the one before.
    #[must_use]
    pub fn is_pinned(&self, slot: u32) -> bool {
        self.granules.get(slot as usize).is_some_and(|granule| granule.pinned)
    }

    /// Granules with how many blocks keep them from being empty: those in them that are owned or cached, and one that
    /// reaches in from the granule before.
    pub fn loads(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.slots().map(|slot| (slot, self.load(slot)))
    }

    /// The same for one granule.
    #[must_use]
    pub fn load(&self, slot: u32) -> u32 {
        self.granules.get(slot as usize).map_or(0, |granule| granule.used + u32::from(granule.pinned))
    }

    /// The blocks that begin in a granule, and its units.
    #[must_use]
    pub fn blocks_and_units(&self, slot: u32) -> Option<(Range<u32>, u32)> {
        let granule = self.granules.get(slot as usize).filter(|_| self.is_at(slot))?;
        Some((granule.first_block..granule.end_block, granule.units))
    }

    /// The blocks of a granule that are owned or cached.
    #[must_use]
    pub fn used_in(&self, slot: u32) -> Vec<u32> {
        let blocks = self.blocks_and_units(slot).map_or(0..0, |(blocks, _)| blocks);
        blocks.filter(|block| self.state(*block).is_ok_and(|state| state != BlockState::Free)).collect()
    }

    /// How many blocks of a granule can be had.
    #[must_use]
    pub fn free_count(&self, slot: u32) -> u32 {
        self.granules.get(slot as usize).map_or(0, |granule| granule.free)
    }

    /// The free blocks of a granule that can be had.
    #[must_use]
    pub fn free_in(&self, slot: u32) -> Vec<u32> {
        let mut found = Vec::new();
        if let Some(granule) = self.granules.get(slot as usize) {
            self.free.each(granule.first_block, granule.end_block, |block| found.push(block));
        }
        found
    }

    /// Whether a block reaches into the granule after its own.
    #[must_use]
    pub fn reaches_over(&self, block: u32) -> bool {
        self.granule_of(block).is_some_and(|slot| {
            let granule = &self.granules[slot as usize];
            granule.straddles && block == granule.end_block - 1
        })
    }

    /// The granule in which a block begins.
    #[must_use]
    pub fn granule_of(&self, block: u32) -> Option<u32> {
        self.units.get(self.unit_of(block)).copied().filter(|slot| *slot != NONE)
    }

    /// Mapped granules in which something lies, with how many blocks of how many, the emptiest first.
    #[must_use]
    pub fn by_fill(&self) -> Vec<GranuleFill> {
        let mapped = self.slots().map(|slot| (slot, self.granules[slot as usize]));
        let mut found: Vec<GranuleFill> = mapped
            .filter(|(_, granule)| granule.stage == Stage::Mapped && granule.used > 0)
            .map(|(slot, granule)| GranuleFill {
                slot,
                used: granule.used,
                free: granule.free,
                is_pinned: granule.pinned,
            })
            .collect();
        found.sort_unstable_by_key(|granule| (granule.used, core::cmp::Reverse(granule.free)));
        found
    }

    /// Granules that exist, at whatever stage.
    pub(super) fn slots(&self) -> impl Iterator<Item = u32> + '_ {
        let mut unit = 0;
        core::iter::from_fn(move || {
            while let Some(slot) = self.units.get(unit as usize) {
                if *slot == NONE {
                    unit += 1;
                } else {
                    unit += self.granules[*slot as usize].units;
                    return Some(*slot);
                }
            }
            None
        })
    }

    fn at(&self, slot: u32, stage: Stage, wanted: &'static str) -> Result<&Granule, GranuleError> {
        let granule = self.granules.get(slot as usize).filter(|granule| granule.stage == stage);
        granule.filter(|_| self.is_at(slot)).ok_or(GranuleError::Stage { slot, wanted })
    }

    /// Whether the slot is in use.
    fn is_at(&self, slot: u32) -> bool {
        self.granules
            .get(slot as usize)
            .is_some_and(|granule| self.units[granule.first_unit as usize] == slot)
    }

    pub(super) fn is_mapped(&self, unit: u32) -> bool {
        self.granule_at(unit).is_some_and(|slot| self.granules[slot as usize].stage == Stage::Mapped)
    }

    /// The mapped granule before `unit`, if its last block reaches into it.
    fn straddling_into(&self, unit: u32) -> Option<u32> {
        let slot = self.granule_at(unit.checked_sub(1)?)?;
        let granule = &self.granules[slot as usize];
        (granule.stage == Stage::Mapped && granule.straddles).then_some(slot)
    }

    /// The blocks whose first byte lies in these units.
    pub(super) fn blocks_of(&self, first: u32, units: u32) -> Range<u32> {
        let block_from = |unit: u32| {
            let byte = u64::from(unit) << self.unit_shift;
            u32::try_from(byte.div_ceil(self.piece_bytes)).unwrap_or(u32::MAX).min(self.blocks)
        };
        block_from(first)..block_from(first + units)
    }

    pub(super) fn straddles(&self, blocks: &Range<u32>, end_unit: u32) -> bool {
        !blocks.is_empty()
            && u64::from(blocks.end) * self.piece_bytes > u64::from(end_unit) << self.unit_shift
    }
}

/// How full a granule is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GranuleFill {
    /// Which.
    pub slot: u32,
    /// Blocks of it that are owned or cached.
    pub used: u32,
    /// Blocks of it that can be had.
    pub free: u32,
    /// Whether a block of the granule before that is not free reaches into it.
    pub is_pinned: bool,
}
