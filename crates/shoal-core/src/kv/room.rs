//! What one group could have of the memory of the others.
//!
//! Apart from [`super::state`] because an allocation that cannot be served shall not cost what is cached. Whoever maps asks
//! first what all of it would come to ([`KvState::lease_beside`]), then evicts ([`KvState::evict_beside`]) and takes
//! what is empty by that ([`KvState::plan_beside`]).

use super::state::{GranuleId, KvError, KvState};
use crate::bytes::ByteCount;

/// What a group shall grow by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    /// Which group.
    pub group: usize,
    /// Blocks that are to be had then, with those that are now.
    pub blocks: u32,
    /// Memory that is leased together with that for the blocks: for what of the cache lies elsewhere.
    pub also: ByteCount,
}

impl KvState {
    /// Memory in other groups in which nothing is owned.
    pub(super) fn unowned_beside(&self, group: usize) -> ByteCount {
        let others = self.groups.iter().enumerate().filter(|(at, _)| *at != group);
        ByteCount(others.map(|(_, other)| other.unowned_units() * other.unit_bytes).sum())
    }

    /// Memory for so many blocks, in whole units.
    fn memory_for(&self, group: usize, blocks: u32) -> ByteCount {
        let group = &self.groups[group];
        ByteCount(group.block_bytes * u64::from(blocks)).round_up_to(ByteCount(group.unit_bytes))
    }

    /// What has to be leased for a growth where this group evicts all that it has cached and the others give up all in which
    /// nothing is owned. `None`: they have no such memory, or the limit or the addresses are in the way all the same. Where
    /// blocks straddle granules a growth may need a unit more; what is on its way from or to a group counts as memory that
    /// cannot be had.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn lease_beside(&self, growth: Growth) -> Result<Option<ByteCount>, KvError> {
        let Growth { group, blocks, also } = growth;
        let figures = self.pool(group)?.figures();
        let others = self.unowned_beside(group);
        if others.is_zero() || !self.fits_limit(group, blocks)? {
            return Ok(None);
        }
        let grows = self.memory_for(group, blocks.saturating_sub(figures.available + figures.cached));
        let units = u64::from(figures.units) + grows.0 / self.groups[group].unit_bytes;
        let is_room = self.mapped_bytes() + grows <= self.limit().bytes() + others;
        let has_addresses = units <= self.layout().groups()[group].units();
        Ok((is_room && has_addresses).then(|| (grows + also).saturating_sub(others)))
    }

    /// What other groups have to give up for a growth for which `leased` is leased.
    fn lacks(&self, growth: Growth, leased: ByteCount) -> ByteCount {
        let available = self.groups[growth.group].pool.available();
        let grows = self.memory_for(growth.group, growth.blocks.saturating_sub(available));
        let by_limit = (self.mapped_bytes() + grows).saturating_sub(self.limit().bytes());
        by_limit.max((grows + growth.also).saturating_sub(leased))
    }

    /// Evicts what is cached, in the order of [`evict_granules`](Self::evict_granules), so that other groups can give up what
    /// a growth lacks for which `leased` is leased. Whole granules of the group itself go too, in their turn.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn evict_beside(&mut self, growth: Growth, leased: ByteCount) -> Result<(), KvError> {
        self.pool(growth.group)?;
        let others = self.groups.iter().enumerate().filter(|(at, _)| *at != growth.group);
        let empty = others.map(|(_, other)| u64::from(other.pool.figures().units_empty) * other.unit_bytes);
        let empty = ByteCount(empty.sum());
        self.evict_granules(self.lacks(growth, leased).saturating_sub(empty)).map(drop)
    }

    /// Granules of other groups in which nothing lies since `clocks`, of at least what the growth lacks, as far as there are
    /// any. They are leaving from now on.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn plan_beside(
        &mut self,
        growth: Growth,
        leased: ByteCount,
        clocks: &[u64],
    ) -> Result<Vec<GranuleId>, KvError> {
        self.pool(growth.group)?;
        self.plan_empty(self.lacks(growth, leased), clocks, |at| at != growth.group)
    }

    /// Granules in which nothing lies since `clocks`, of at least `bytes` as far as there are any, of the groups that `is_asked`
    /// takes.
    pub(super) fn plan_empty(
        &mut self,
        bytes: ByteCount,
        clocks: &[u64],
        is_asked: impl Fn(usize) -> bool,
    ) -> Result<Vec<GranuleId>, KvError> {
        let (mut planned, mut found) = (Vec::new(), 0);
        for (at, clock) in (0..self.groups.len()).zip(clocks).filter(|(at, _)| is_asked(*at)) {
            let group = &mut self.groups[at];
            let slots: Vec<u32> = group.pool.empty(*clock).collect();
            for slot in slots {
                if found >= bytes.0 {
                    return Ok(planned);
                }
                let units = group.pool.units_of(slot).map_or(0, |(_, units)| u64::from(units));
                group.pool.leaving(slot)?;
                found += units * group.unit_bytes;
                planned.push(GranuleId { group: at, slot });
            }
        }
        Ok(planned)
    }
}
