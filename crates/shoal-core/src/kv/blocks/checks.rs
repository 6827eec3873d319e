//! Whether a pool's figures agree with one another, counted anew.

use super::super::fill::NONE;
use super::{BlockFigures, BlockPool, BlockState, Stage};

impl BlockPool {
    /// Says what is wrong, if anything is.
    ///
    /// # Errors
    /// A sentence that names the first contradiction.
    pub fn check_invariants(&self) -> Result<(), String> {
        let mut counted = BlockFigures::default();
        let mut has_granule = vec![false; self.blocks as usize];
        for slot in self.slots() {
            let granule = self.granules[slot as usize];
            let range = granule.first_unit..granule.first_unit + granule.units;
            if let Some(unit) = range.clone().find(|unit| self.units[*unit as usize] != slot) {
                return Err(format!(
                    "unit {unit} of granule {slot} is of granule {}",
                    self.units[unit as usize]
                ));
            }
            let (mut used, mut cached, mut free) = (0, 0, 0);
            for block in self.blocks_of(granule.first_unit, granule.units) {
                has_granule[block as usize] = true;
                match self.owners.state(block) {
                    BlockState::Free => free += u32::from(self.free.has(block)),
                    BlockState::Cached => cached += 1,
                    BlockState::Owned(_) => used += 1,
                }
            }
            used += cached;
            if (used, cached, free) != (granule.used, granule.cached, granule.free) {
                return Err(format!("granule {slot} counts {granule:?}, has {used}, {cached} and {free}"));
            }
            let blocks = self.blocks_of(granule.first_unit, granule.units);
            let mut usable = blocks.end - blocks.start;
            if self.straddles(&blocks, range.end) && !self.is_mapped(range.end) {
                usable -= 1;
            }
            if granule.stage == Stage::Mapped && used + free != usable {
                return Err(format!("granule {slot}: {used} used, {free} free of {usable} that have memory"));
            }
            if granule.stage != Stage::Mapped && used + free > 0 {
                return Err(format!(
                    "granule {slot} is {:?} and has {used} used, {free} free",
                    granule.stage
                ));
            }
            let before = range.start.checked_sub(1).map_or(NONE, |unit| self.units[unit as usize]);
            let pins = self.granules.get(before as usize).is_some_and(|granule| {
                granule.straddles && self.owners.state(granule.end_block - 1) != BlockState::Free
            });
            if pins != granule.pinned {
                return Err(format!("granule {slot} pinned: {}, should be {pins} (I7)", granule.pinned));
            }
            counted.units += granule.units;
            if granule.stage == Stage::Mapped && granule.is_empty() {
                counted.units_empty += granule.units;
            }
            let is_listed = granule.list().is_none_or(|list| self.fill.list(list).any(|other| other == slot));
            if !is_listed {
                return Err(format!("granule {slot} is not in list {:?}", granule.list()));
            }
        }
        for block in 0..self.blocks {
            let state = self.owners.state(block);
            self.owners.check(block)?;
            match state {
                BlockState::Owned(_) => counted.owned += 1,
                BlockState::Cached => counted.cached += 1,
                BlockState::Free => counted.available += u32::from(self.free.has(block)),
            }
            let is_used = state != BlockState::Free;
            if is_used && (!has_granule[block as usize] || self.free.has(block)) {
                return Err(format!("block {block} is used, and free or without memory (I7)"));
            }
            if self.sealed.has(block) && !is_used {
                return Err(format!("block {block} is free and sealed"));
            }
        }
        let seals = (0..self.blocks).filter(|block| self.sealed.has(*block)).count();
        if seals != self.seals as usize {
            return Err(format!("{seals} blocks are sealed, {} counted", self.seals));
        }
        if counted != self.figures {
            return Err(format!("counted {:?}, are {counted:?}", self.figures));
        }
        Ok(())
    }
}
