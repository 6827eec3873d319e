//! A policy together with the counts of extents: what a block manager holds one of for each group of layers.

use super::extents::{ExtentSpan, Extents};
use super::{About, EvictionKind, EvictionPolicy};

#[derive(Clone, Copy, Debug)]
struct Cached {
    span: ExtentSpan,
    weight: u64,
}

/// Names victims: single blocks, or whole extents.
#[derive(Debug)]
pub struct Evictor {
    policy: Box<dyn EvictionPolicy>,
    extents: Extents,
    blocks: Vec<Option<Cached>>,
    cached: u32,
    now: u64,
}

impl Evictor {
    /// For blocks with ids below `blocks`.
    #[must_use]
    pub fn new(kind: EvictionKind, blocks: u32) -> Self {
        Self {
            policy: kind.policy(blocks),
            extents: Extents::new(),
            blocks: vec![None; blocks as usize],
            cached: 0,
            now: 0,
        }
    }

    /// Blocks that are cached.
    #[must_use]
    pub const fn cached_count(&self) -> u32 {
        self.cached
    }

    /// Whether a block is cached.
    #[must_use]
    pub fn is_cached(&self, block: u32) -> bool {
        self.blocks.get(block as usize).is_some_and(Option::is_some)
    }

    /// Nobody refers to the block any more; it lies in these extents. Of several that are given up at once, the one
    /// furthest from the start of its sequence comes first.
    pub fn cached(&mut self, block: u32, span: ExtentSpan, about: &About) {
        let Some(place) = self.blocks.get_mut(block as usize).filter(|place| place.is_none()) else { return };
        self.policy.cached(block, about);
        let weight = self.policy.weight(block);
        *place = Some(Cached { span, weight });
        self.cached += 1;
        self.extents.cached(span, weight, self.now);
        self.check_in_debug();
    }

    /// What is given up from here on is given up at `now`, a number that never falls: what evictors of several groups hold
    /// can be compared by it ([`oldest_extent`](Self::oldest_extent)).
    pub const fn set_now(&mut self, now: u64) {
        self.now = now;
    }

    /// The block was found again and is referred to.
    pub fn used(&mut self, block: u32) {
        self.leave(block);
        self.policy.used(block);
        self.check_in_debug();
    }

    /// A cached block is not to go yet although its turn has come: it is the newest then.
    pub fn spared(&mut self, block: u32, about: &About) {
        if let Some(Cached { span, .. }) = self.blocks.get(block as usize).copied().flatten() {
            self.used(block);
            self.cached(block, span, about);
        }
    }

    /// The block's content is gone.
    pub fn gone(&mut self, block: u32) {
        self.leave(block);
        self.policy.gone(block);
        self.check_in_debug();
    }

    /// The block's content was moved to another, which lies in these extents and is neither cached nor known.
    pub fn renumber(&mut self, from: u32, to: u32, span: ExtentSpan) {
        self.policy.renumbered(from, to);
        if let Some(Cached { span: before, weight }) =
            self.blocks.get_mut(from as usize).and_then(Option::take)
        {
            self.extents.uncached(before, weight);
            self.extents.cached(span, weight, self.now);
            self.blocks[to as usize] = Some(Cached { span, weight });
        }
        self.check_in_debug();
    }

    /// How many blocks of an extent are allocated, cached ones included: an extent is a victim only if all of them are
    /// cached. A block manager tells it after each change, or of all extents before it asks for a victim.
    pub fn set_allocated(&mut self, extent: u32, blocks: u32) {
        self.extents.set_allocated(extent, blocks);
        self.check_in_debug();
    }

    /// The block that should go next.
    pub fn victim(&mut self) -> Option<u32> {
        self.policy.victim()
    }

    /// The extent that should go next: all its allocated blocks are cached, it is among those given up longest ago, and
    /// its blocks are missed least. None if there is no such extent.
    #[must_use]
    pub fn victim_extent(&self) -> Option<u32> {
        self.extents.victim(self.policy.as_ref())
    }

    /// When that extent of which all allocated blocks are cached and which was given up longest ago was given up.
    #[must_use]
    pub fn oldest_extent(&self) -> Option<u64> {
        self.extents.oldest()
    }

    /// Extents whose allocated blocks are all cached.
    #[must_use]
    pub const fn drainable_extents(&self) -> u32 {
        self.extents.drainable_count()
    }

    /// Allocated and cached blocks of an extent.
    #[must_use]
    pub fn extent_counts(&self, extent: u32) -> (u32, u32) {
        self.extents.counts(extent)
    }

    fn leave(&mut self, block: u32) {
        if let Some(Cached { span, weight }) = self.blocks.get_mut(block as usize).and_then(Option::take) {
            self.cached -= 1;
            self.extents.uncached(span, weight);
        }
    }

    /// Says what is wrong with the counts, if anything is.
    ///
    /// # Errors
    /// A sentence that names the first contradiction.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.policy.check_invariants()?;
        self.extents.check_invariants()?;
        let cached = self.blocks.iter().flatten().count();
        if cached != self.cached as usize {
            return Err(format!("{} blocks counted, {cached} cached", self.cached));
        }
        Ok(())
    }

    fn check_in_debug(&self) {
        if cfg!(debug_assertions)
            && self.blocks.len() <= 256
            && let Err(wrong) = self.check_invariants()
        {
            unreachable!("{wrong}");
        }
    }
}
