//! The page table of one region: which extent covers a page, where each extent's bytes are, and what should move.
//!
//! Apart because it only decides: plans are values, and whoever carries them out says so with
//! [`begin`](RegionTable::begin), [`finish`](RegionTable::finish) and [`abort`](RegionTable::abort). Keeps I4 (extents
//! are whole, pages have at most one), I6 (the last valid copy stays; a failed move leaves the old copy valid). Every
//! mutation ends in [`check_invariants`](RegionTable::check_invariants) in debug builds.
//!
//! Methods are of four kinds: getters, `plan_*` (say what should move, change nothing), `begin`/`finish`/`abort` (one
//! move of one extent), and the mutators `insert`, `take_out`, `add_copy`, `remove_copy`, `written`.

mod order;
mod plan;

pub use order::UseOrder;
pub use plan::{Backing, EvictPlan, PlannedMove, RefusedReason, RestorePlan};

use crate::bytes::ByteCount;
use crate::extent::{Extent, ExtentRule, PageRun};
use crate::ids::ExtentIndex;
use crate::residency::{Move, Residency, ResidencyError, TierSet};
use crate::tier::Tier;

const NO_EXTENT: u32 = u32::MAX;

/// Why the table refused a change. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// There is no such extent (any more).
    #[error("{extent} does not exist")]
    UnknownExtent {
        /// The index given.
        extent: ExtentIndex,
    },
    /// Pages outside the region.
    #[error("pages {first}..{end} lie outside a region of {region_pages} pages")]
    OutOfRange {
        /// First page given.
        first: u64,
        /// The page after the last given.
        end: u64,
        /// Pages of the region.
        region_pages: u64,
    },
    /// A page already belongs to an extent.
    #[error("page {page} already belongs to {extent}")]
    Overlap {
        /// The page.
        page: u64,
        /// Its extent.
        extent: ExtentIndex,
    },
    /// The extent's residency does not allow it.
    #[error("{extent}: {source}")]
    Residency {
        /// The extent.
        extent: ExtentIndex,
        /// What stands in the way.
        source: ResidencyError,
    },
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    extent: Extent,
    residency: Residency,
}

/// Bytes of one region by where they are valid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableUsage {
    /// All extents.
    pub total: ByteCount,
    /// Valid on the device.
    pub device: ByteCount,
    /// Valid in the host tier.
    pub host: ByteCount,
    /// Valid only in the file they came from.
    pub source_only: ByteCount,
    /// That have left the device since the table was made, each time counted; what was discarded is not among them.
    pub left: ByteCount,
}

/// The page table of one region.
#[derive(Clone, Debug)]
pub struct RegionTable {
    backing: Backing,
    rule: ExtentRule,
    /// Page -> slot in `entries`.
    pages: Vec<u32>,
    /// A slab: index = [`ExtentIndex`]; order of use = ascending index for a region carved whole.
    entries: Vec<Option<Entry>>,
    slots_free: Vec<u32>,
    device_bytes: ByteCount,
    left_bytes: ByteCount,
    order: UseOrder,
}

impl RegionTable {
    /// A region of `region_pages` pages without extents: they come and go with [`insert`](Self::insert) and
    /// [`take_out`](Self::take_out).
    #[must_use]
    pub fn empty(region_pages: u64, rule: ExtentRule, backing: Backing) -> Self {
        let pages = usize::try_from(region_pages).map_or_else(|_| Vec::new(), |count| vec![NO_EXTENT; count]);
        Self {
            backing,
            rule,
            pages,
            entries: Vec::new(),
            slots_free: Vec::new(),
            device_bytes: ByteCount::ZERO,
            left_bytes: ByteCount::ZERO,
            order: UseOrder::default(),
        }
    }

    /// A region cut into extents at once, in order of use.
    #[must_use]
    pub fn carved(region_pages: u64, rule: ExtentRule, backing: Backing) -> Self {
        let mut table = Self::empty(region_pages, rule, backing);
        for extent in rule.carve(region_pages) {
            table.enter(extent);
        }
        table.check_in_debug();
        table
    }

    /// What happens to bytes whose device memory is taken.
    #[must_use]
    pub const fn backing(&self) -> Backing {
        self.backing
    }

    /// Pages of the region.
    #[must_use]
    pub fn region_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Bytes valid on the device.
    #[must_use]
    pub const fn device_bytes(&self) -> ByteCount {
        self.device_bytes
    }

    /// Sets the order of use, by which restores bring back and (backwards) evictions take.
    pub fn set_order(&mut self, order: UseOrder) {
        self.order = order;
    }

    /// The order of use; empty where it is that of the extents' indices.
    #[must_use]
    pub const fn order(&self) -> &UseOrder {
        &self.order
    }

    /// The extents in an order of use.
    #[must_use]
    pub fn extents_by<'a>(
        &'a self,
        order: &UseOrder,
    ) -> Box<dyn DoubleEndedIterator<Item = (ExtentIndex, Extent, Residency)> + 'a> {
        if order.is_empty() {
            return Box::new(self.extents());
        }
        let mut extents: Vec<_> = self.extents().collect();
        extents.sort_by_cached_key(|(_, extent, _)| order.rank(*extent));
        Box::new(extents.into_iter())
    }

    /// The extents by index, which is the order of use of a region carved whole unless another was set.
    #[must_use]
    pub fn extents(&self) -> impl DoubleEndedIterator<Item = (ExtentIndex, Extent, Residency)> + '_ {
        self.entries.iter().enumerate().filter_map(|(slot, entry)| {
            let entry = entry.as_ref()?;
            Some((ExtentIndex(u32::try_from(slot).ok()?), entry.extent, entry.residency))
        })
    }

    /// One extent.
    ///
    /// # Errors
    /// [`TableError::UnknownExtent`].
    pub fn extent(&self, index: ExtentIndex) -> Result<(Extent, Residency), TableError> {
        self.entries
            .get(index.0 as usize)
            .and_then(Option::as_ref)
            .map(|entry| (entry.extent, entry.residency))
            .ok_or(TableError::UnknownExtent { extent: index })
    }

    /// The extent of a page.
    #[must_use]
    pub fn extent_at(&self, page: u64) -> Option<ExtentIndex> {
        let slot = *self.pages.get(usize::try_from(page).ok()?)?;
        (slot != NO_EXTENT).then_some(ExtentIndex(slot))
    }

    /// The extents that touch `run`, by address.
    ///
    /// # Errors
    /// [`TableError::OutOfRange`].
    pub fn extents_touching(&self, run: PageRun) -> Result<Vec<ExtentIndex>, TableError> {
        self.check_range(run)?;
        let mut found = Vec::new();
        let mut page = run.first;
        while page < run.end() {
            match self.extent_at(page).map(|index| (index, self.extent(index))) {
                Some((index, Ok((extent, _)))) => {
                    found.push(index);
                    page = extent.run().end();
                }
                _ => page += 1,
            }
        }
        Ok(found)
    }

    /// The extents that lie wholly within `run`, by address.
    ///
    /// # Errors
    /// [`TableError::OutOfRange`].
    pub fn extents_within(&self, run: PageRun) -> Result<Vec<ExtentIndex>, TableError> {
        let mut found = self.extents_touching(run)?;
        found.retain(|index| {
            self.extent(*index)
                .is_ok_and(|(extent, _)| extent.run().first >= run.first && extent.run().end() <= run.end())
        });
        Ok(found)
    }

    /// The pages of `run` that no extent covers.
    ///
    /// # Errors
    /// [`TableError::OutOfRange`].
    pub fn uncovered(&self, run: PageRun) -> Result<Vec<PageRun>, TableError> {
        self.check_range(run)?;
        Ok(PageRun::from_sorted((run.first..run.end()).filter(|page| self.extent_at(*page).is_none())))
    }

    /// The extents that [`insert`](Self::insert) would cut these pages into.
    #[must_use]
    pub fn cut(&self, run: PageRun) -> Vec<Extent> {
        self.rule.grow(run, self.region_pages())
    }

    /// Cuts pages that no extent covers into extents, as [`ExtentRule::grow`] says, and enters them without bytes.
    ///
    /// # Errors
    /// [`TableError::OutOfRange`], [`TableError::Overlap`]; nothing is changed.
    pub fn insert(&mut self, run: PageRun) -> Result<Vec<ExtentIndex>, TableError> {
        self.check_range(run)?;
        for page in run.first..run.end() {
            if let Some(extent) = self.extent_at(page) {
                return Err(TableError::Overlap { page, extent });
            }
        }
        let extents = self.cut(run);
        let indices = extents.into_iter().map(|extent| self.enter(extent)).collect();
        self.check_in_debug();
        Ok(indices)
    }

    /// Takes an extent and its bytes out of the table, on purpose. The caller frees what held the bytes.
    ///
    /// # Errors
    /// [`TableError::UnknownExtent`], or [`ResidencyError::Busy`] while it moves; nothing is changed.
    pub fn take_out(&mut self, index: ExtentIndex) -> Result<(Extent, Residency), TableError> {
        let (extent, residency) = self.extent(index)?;
        if let Some(under_way) = residency.under_way() {
            return Err(TableError::Residency { extent: index, source: ResidencyError::Busy { under_way } });
        }
        if residency.valid().has(Tier::Device) {
            self.device_bytes -= extent.bytes();
        }
        self.entries[index.0 as usize] = None;
        self.slots_free.push(index.0);
        self.paint(extent, NO_EXTENT);
        self.check_in_debug();
        Ok((extent, residency))
    }

    /// Begins one step of a plan.
    ///
    /// # Errors
    /// [`TableError::UnknownExtent`], [`TableError::Residency`]; nothing is changed.
    pub fn begin(&mut self, planned: PlannedMove) -> Result<Extent, TableError> {
        let backing = self.backing;
        let index = planned.extent;
        self.change(index, |residency| {
            if planned.step == Move::Discard && backing == Backing::Keep {
                let tier = residency.valid().fastest().unwrap_or(Tier::Device);
                return Err(ResidencyError::LastCopy { tier });
            }
            residency.begin(planned.step)
        })?;
        Ok(self.extent(index)?.0)
    }

    /// The step under way succeeded.
    ///
    /// # Errors
    /// [`TableError::UnknownExtent`], [`TableError::Residency`].
    pub fn finish(&mut self, index: ExtentIndex) -> Result<Move, TableError> {
        self.change(index, Residency::finish)
    }

    /// The step under way failed or was cancelled; the extent is as before (I6).
    ///
    /// # Errors
    /// [`TableError::UnknownExtent`], [`TableError::Residency`].
    pub fn abort(&mut self, index: ExtentIndex) -> Result<Move, TableError> {
        self.change(index, Residency::abort)
    }

    /// The extent's bytes are now (also) valid in `tier`.
    ///
    /// # Errors
    /// [`TableError::UnknownExtent`].
    pub fn add_copy(&mut self, index: ExtentIndex, tier: Tier) -> Result<(), TableError> {
        self.change(index, |residency| {
            residency.add(tier);
            Ok(())
        })
    }

    /// The extent's copy in `tier` is gone or no longer right.
    ///
    /// # Errors
    /// [`TableError::UnknownExtent`], [`TableError::Residency`] (the last copy stays, I6).
    pub fn remove_copy(&mut self, index: ExtentIndex, tier: Tier) -> Result<(), TableError> {
        self.change(index, |residency| residency.remove(tier))
    }

    /// The device copy was written: it is the only valid one.
    ///
    /// # Errors
    /// [`TableError::UnknownExtent`], [`TableError::Residency`].
    pub fn written(&mut self, index: ExtentIndex) -> Result<(), TableError> {
        self.change(index, Residency::written)
    }

    /// Bytes by place.
    #[must_use]
    pub fn usage(&self) -> TableUsage {
        let mut usage =
            TableUsage { device: self.device_bytes, left: self.left_bytes, ..TableUsage::default() };
        for (_, extent, residency) in self.extents() {
            usage.total += extent.bytes();
            if residency.valid().has(Tier::Host) {
                usage.host += extent.bytes();
            }
            if residency.valid() == TierSet::of(Tier::Source) {
                usage.source_only += extent.bytes();
            }
        }
        usage
    }

    /// Says what is wrong with the table, if anything is.
    ///
    /// # Errors
    /// A sentence that names the first contradiction.
    pub fn check_invariants(&self) -> Result<(), String> {
        let mut device_bytes = ByteCount::ZERO;
        let mut pages_covered = 0;
        for (index, extent, residency) in self.extents() {
            let run = extent.run();
            if run.end() > self.region_pages() || !run.count.is_power_of_two() {
                return Err(format!("{index} has pages {run:?} in a region of {} (I4)", self.region_pages()));
            }
            if let Some(page) = (run.first..run.end()).find(|page| self.extent_at(*page) != Some(index)) {
                return Err(format!("page {page} of {index} points to {:?} (I4)", self.extent_at(page)));
            }
            pages_covered += run.count;
            if residency.valid().has(Tier::Device) {
                device_bytes += extent.bytes();
            }
            if residency.is_discarded() && (!residency.valid().is_empty() || self.backing == Backing::Keep) {
                return Err(format!(
                    "{index} is discarded but {:?} under {:?} (I6)",
                    residency, self.backing
                ));
            }
        }
        let painted = self.pages.iter().filter(|slot| **slot != NO_EXTENT).count() as u64;
        if painted != pages_covered {
            return Err(format!("{painted} pages point to extents that cover {pages_covered} (I4)"));
        }
        if device_bytes != self.device_bytes {
            return Err(format!("{device_bytes} valid on the device, {} counted", self.device_bytes));
        }
        Ok(())
    }

    fn check_in_debug(&self) {
        if cfg!(debug_assertions)
            && let Err(wrong) = self.check_invariants()
        {
            unreachable!("{wrong}");
        }
    }

    fn check_range(&self, run: PageRun) -> Result<(), TableError> {
        if run.first.checked_add(run.count).is_none_or(|end| end > self.region_pages()) {
            let region_pages = self.region_pages();
            return Err(TableError::OutOfRange {
                first: run.first,
                end: run.first.saturating_add(run.count),
                region_pages,
            });
        }
        Ok(())
    }

    fn change<T>(
        &mut self,
        index: ExtentIndex,
        step: impl FnOnce(&mut Residency) -> Result<T, ResidencyError>,
    ) -> Result<T, TableError> {
        let entry = self
            .entries
            .get_mut(index.0 as usize)
            .and_then(Option::as_mut)
            .ok_or(TableError::UnknownExtent { extent: index })?;
        let bytes = entry.extent.bytes();
        let was_on_device = entry.residency.valid().has(Tier::Device);
        let done =
            step(&mut entry.residency).map_err(|source| TableError::Residency { extent: index, source })?;
        match (was_on_device, entry.residency.valid().has(Tier::Device)) {
            (false, true) => self.device_bytes += bytes,
            (true, false) => {
                self.device_bytes -= bytes;
                self.left_bytes += bytes;
            }
            _ => {}
        }
        self.check_in_debug();
        Ok(done)
    }

    /// Enters an extent whose pages are known to be free.
    fn enter(&mut self, extent: Extent) -> ExtentIndex {
        let entry = Some(Entry { extent, residency: Residency::default() });
        let slot = self.slots_free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            // At most one slot per page, and a region of 2^32 pages would span 8 EiB.
            u32::try_from(self.entries.len() - 1).unwrap_or(NO_EXTENT)
        });
        self.entries[slot as usize] = entry;
        self.paint(extent, slot);
        ExtentIndex(slot)
    }

    fn paint(&mut self, extent: Extent, slot: u32) {
        for page in extent.run().first..extent.run().end() {
            if let Some(entry) = usize::try_from(page).ok().and_then(|page| self.pages.get_mut(page)) {
                *entry = slot;
            }
        }
    }
}

#[cfg(test)]
mod tests;
