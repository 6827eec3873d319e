//! Which extents could be emptied by evicting, and which of those first.
//!
//! Apart from the policies because it is counting: memory goes back by whole extents, and an extent is free only when
//! none of its blocks is allocated. An extent is *drainable* when all of its allocated blocks are cached.

use super::EvictionPolicy;
use super::list::{Links, List};

/// At most how many drainable extents are compared, of those that were given up longest ago.
const COMPARED_MAX: u32 = 8;
/// Of how many drainable extents one is compared: what was used lately shall not go because it is small.
const COMPARED_OF: u32 = 4;

/// The extents that a block lies in: one, or two if it lies across their edge. Extents have small numbers, in any order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentSpan {
    /// Where it begins.
    pub first: u32,
    /// Where it ends.
    pub last: u32,
}

impl ExtentSpan {
    /// One extent.
    #[must_use]
    pub const fn one(extent: u32) -> Self {
        Self { first: extent, last: extent }
    }

    fn extents(self) -> impl Iterator<Item = u32> {
        std::iter::once(self.first).chain((self.last != self.first).then_some(self.last))
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Extent {
    allocated: u32,
    cached: u32,
    weight: u64,
    drainable: bool,
    /// When a block of it was given up last.
    at: u64,
}

/// Counts of all extents.
#[derive(Clone, Debug)]
pub(super) struct Extents {
    counts: Vec<Extent>,
    links: Links,
    /// Drainable ones; those whose blocks were last given up longest ago first.
    drainable: List,
}

impl Extents {
    pub(super) fn new() -> Self {
        Self { counts: Vec::new(), links: Links::new(0), drainable: List::EMPTY }
    }

    pub(super) fn cached(&mut self, span: ExtentSpan, weight: u64, now: u64) {
        for extent in span.extents() {
            let counts = self.reach(extent);
            counts.at = now;
            counts.cached += 1;
            counts.weight = counts.weight.saturating_add(weight);
            self.place(extent, true);
        }
    }

    pub(super) fn uncached(&mut self, span: ExtentSpan, weight: u64) {
        for extent in span.extents() {
            let counts = self.reach(extent);
            counts.cached = counts.cached.saturating_sub(1);
            counts.weight = counts.weight.saturating_sub(weight);
            self.place(extent, false);
        }
    }

    pub(super) fn set_allocated(&mut self, extent: u32, blocks: u32) {
        self.reach(extent).allocated = blocks;
        self.place(extent, false);
    }

    pub(super) fn counts(&self, extent: u32) -> (u32, u32) {
        self.counts.get(extent as usize).map_or((0, 0), |counts| (counts.allocated, counts.cached))
    }

    pub(super) const fn drainable_count(&self) -> u32 {
        self.drainable.len
    }

    /// When the drainable extent that was given up longest ago was given up.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.drainable.first().map(|extent| self.counts[extent as usize].at)
    }

    /// Of the coldest drainable extents the one whose blocks are missed least.
    pub(super) fn victim(&self, policy: &dyn EvictionPolicy) -> Option<u32> {
        let compared = (self.drainable.len / COMPARED_OF).clamp(1, COMPARED_MAX) as usize;
        self.links.iter(&self.drainable).take(compared).min_by_key(|extent| {
            let counts = self.counts[*extent as usize];
            policy.loss(counts.cached, counts.weight)
        })
    }

    fn reach(&mut self, extent: u32) -> &mut Extent {
        if self.counts.len() <= extent as usize {
            self.counts.resize(extent as usize + 1, Extent::default());
            self.links.reach(extent);
        }
        &mut self.counts[extent as usize]
    }

    /// Puts an extent where its counts say; `fresh` if a block of it was just given up.
    fn place(&mut self, extent: u32, fresh: bool) {
        let counts = &mut self.counts[extent as usize];
        let drainable = counts.cached > 0 && counts.cached >= counts.allocated;
        let was = std::mem::replace(&mut counts.drainable, drainable);
        if was && (!drainable || fresh) {
            self.links.remove(&mut self.drainable, extent);
        }
        if drainable && (!was || fresh) {
            self.links.push_back(&mut self.drainable, extent);
        }
    }

    pub(super) fn check_invariants(&self) -> Result<(), String> {
        let listed: Vec<u32> = self.links.iter(&self.drainable).collect();
        let drainable = self.counts.iter().filter(|counts| counts.drainable).count();
        if listed.len() != drainable || self.drainable.len as usize != drainable {
            return Err(format!("{} extents listed, {drainable} drainable", listed.len()));
        }
        for (extent, counts) in self.counts.iter().enumerate() {
            if counts.drainable != (counts.cached > 0 && counts.cached >= counts.allocated) {
                return Err(format!("extent {extent}: {counts:?}"));
            }
            if counts.cached == 0 && counts.weight > 0 {
                return Err(format!("extent {extent} weighs {} without cached blocks", counts.weight));
            }
        }
        Ok(())
    }
}
