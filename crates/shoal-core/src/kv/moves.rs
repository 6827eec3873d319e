//! Moving blocks in a cache: begun, copied by somebody, ended.
//!
//! Apart from the plan ([`super::compact`]) because between beginning and end others go on: the owners of a block that moves
//! may give it back, and others may find it. While it moves it has one owner more, so its place is nobody else's.

use super::compact::{self, BlockMove};
use super::state::{GranuleId, KvError, KvState};

/// A granule that is mostly empty, and shorter ones on their way that together hold what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repack {
    /// What shall be empty.
    pub source: GranuleId,
    /// What is on its way: say of each that it is mapped or gone.
    pub planned: Vec<GranuleId>,
}

/// A granule is not worth repacking for less than this part of it.
const WORTH: u64 = 16;

impl KvState {
    /// Where a part-filled granule could be given up for shorter ones: what moves within granules cannot gain, as the last
    /// one is as long as it was when much was asked for. The one that wastes the most, of at most `moves_max` blocks. `None`
    /// where that would gain little, or there is no room for both for a moment.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn plan_repack(&mut self, group: usize, moves_max: usize) -> Result<Option<Repack>, KvError> {
        let pool = self.pool(group)?;
        let layout = &self.layout().groups()[group];
        let (unit_bytes, block_bytes) = (layout.unit_bytes().0, layout.block_bytes().0);
        // The one that reaches into the source itself would be of no use.
        let spared =
            u32::from(!unit_bytes.is_multiple_of(block_bytes) && !block_bytes.is_multiple_of(unit_bytes));
        let found = pool.by_fill().into_iter().filter(|granule| !granule.is_pinned);
        let found = found.filter(|granule| granule.used as usize <= moves_max).filter_map(|granule| {
            let (_, units) = pool.units_of(granule.slot)?;
            let needed = (u64::from(granule.used + spared) * block_bytes).div_ceil(unit_bytes);
            let gained = u64::from(units).checked_sub(needed)?;
            (gained > 0 && gained >= u64::from(units) / WORTH).then_some((gained, granule, units))
        });
        let Some((_, granule, units)) = found.max_by_key(|(gained, ..)| *gained) else { return Ok(None) };
        let (planned, yielded) = self.plan(group, granule.used + spared)?;
        let planned_units: u32 = planned
            .iter()
            .filter_map(|planned| self.pool(group).ok()?.units_of(planned.slot))
            .map(|(_, units)| units)
            .sum();
        if yielded < granule.used + spared || planned_units >= units {
            for granule in planned {
                self.gone(granule)?;
            }
            return Ok(None);
        }
        Ok(Some(Repack { source: GranuleId { group, slot: granule.slot }, planned }))
    }

    /// The moves of a repack whose granules are mapped; none if others have taken blocks of them meanwhile.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn repack_moves(&self, repack: &Repack) -> Result<Vec<BlockMove>, KvError> {
        let pool = self.pool(repack.source.group)?;
        let from = pool.used_in(repack.source.slot);
        let free = repack.planned.iter().flat_map(|granule| pool.free_in(granule.slot));
        // One that reaches into the source would keep it.
        let is_apart =
            |block: &u32| pool.granules_of(*block).is_some_and(|(_, last)| last != repack.source.slot);
        let to: Vec<u32> = free.filter(is_apart).take(from.len()).collect();
        if to.len() < from.len() {
            return Ok(Vec::new());
        }
        Ok(from.into_iter().zip(to).map(|(from, to)| BlockMove { from, to }).collect())
    }

    /// Moves of a group's blocks that empty granules, at most `moves_max`.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn plan_compaction(&self, group: usize, moves_max: usize) -> Result<Vec<BlockMove>, KvError> {
        Ok(compact::plan(self.pool(group)?, moves_max))
    }

    /// Begins moves: the targets are taken, and the sources stay whatever their owners do meanwhile. All or none.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`], [`KvError::Blocks`]; nothing is changed.
    pub fn begin_moves(&mut self, group: usize, moves: &[BlockMove]) -> Result<(), KvError> {
        for (at, planned) in moves.iter().enumerate() {
            let pool = &mut self.group_mut(group)?.pool;
            let shared = pool.share(planned.from);
            let taken = shared.and_then(|_| pool.take(planned.to));
            let Err(error) = taken else { continue };
            if shared.is_ok() {
                self.free(group, &[planned.from])?;
            }
            self.end_moves(group, &moves[..at], false)?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Ends moves that were begun: with `is_done` the targets hold what the sources held and are what they were, and the
    /// sources are free; without, all is as before. What nobody owns any more is free or cached then.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`], [`KvError::Blocks`] for moves that were not begun.
    pub fn end_moves(&mut self, group: usize, moves: &[BlockMove], is_done: bool) -> Result<(), KvError> {
        for planned in moves {
            if is_done {
                let pool = &mut self.group_mut(group)?.pool;
                let is_sealed = pool.is_sealed(planned.from);
                pool.renumber(planned.from, planned.to)?;
                if is_sealed {
                    self.renumbered(group, *planned)?;
                }
                self.free(group, &[planned.to])?;
            } else {
                self.free(group, &[planned.to])?;
                self.free(group, &[planned.from])?;
            }
        }
        Ok(())
    }
}
