//! What sealed blocks hold, put together with who owns them.
//!
//! Apart from [`super::state`] because a cache does without it. A sealed block that nobody owns is cached: it can be found
//! until it is evicted, by the policy's choice when blocks are wanted, by whole granules when memory is. The index knows
//! content, the policy knows order, [`super::blocks`] knows owners; here each change of one is told to the others.

use super::blocks::{BlockPool, BlockState, Freed};
use super::compact::BlockMove;
use super::eviction::{EvictionKind, ExtentSpan};
use super::layout::{BlockShape, CacheLayout, GroupLayout};
use super::prefix::{
    EventBatch, Found, GroupOptions, GroupRule, NO_BLOCK, PrefixCache, PrefixOptions, PrefixStats, Sealed,
    Start,
};
use super::state::{GranuleId, Group, KvError, KvState};
use crate::bytes::ByteCount;
use crate::extent::PageRun;

/// How what blocks hold is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReuseOptions {
    /// Which cached blocks go first.
    pub eviction: EvictionKind,
    /// Seed of the keys that events name ([`PrefixOptions::seed`]).
    pub seed: u64,
    /// Events kept for readers; 0 for none.
    pub events_max: usize,
}

impl Default for ReuseOptions {
    fn default() -> Self {
        Self { eviction: EvictionKind::default(), seed: 0, events_max: 4096 }
    }
}

/// The granules that a cached block lies in.
fn span_of(pool: &BlockPool, block: u32) -> ExtentSpan {
    let (first, last) = pool.granules_of(block).unwrap_or((0, 0));
    ExtentSpan { first, last }
}

#[derive(Debug)]
pub(super) struct Reuse {
    prefix: PrefixCache,
    evicted: Vec<u32>,
    sealed: Sealed,
    /// Tiers below that get a copy of each block that is sealed.
    copiers: u32,
}

impl Reuse {
    /// Refused where the groups' blocks do not stand for the same tokens, so that no list of tokens means blocks of all:
    /// better at once than a cache in which nothing is ever found. `None` where there are only states: nothing says how many
    /// tokens lie between two of a sequence.
    pub(super) fn new(layout: &CacheLayout, options: ReuseOptions) -> Result<Option<Self>, KvError> {
        let mut tokens = layout.groups().iter().filter_map(|group| group.spec().shape.tokens());
        let Some(block_tokens) = tokens.next() else { return Ok(None) };
        if let Some(other) = tokens.find(|other| *other != block_tokens) {
            return Err(KvError::MixedTokens { first: block_tokens, other });
        }
        let group = |group: &GroupLayout| GroupOptions {
            rule: match group.spec().shape {
                BlockShape::Attention { window: Some(tokens), .. } => GroupRule::Window { tokens },
                BlockShape::Attention { window: None, .. } | BlockShape::Latent { .. } => GroupRule::Full,
                BlockShape::State { .. } => GroupRule::Last,
            },
            blocks: group.blocks(),
        };
        let groups = layout.groups().iter().map(group).collect();
        let ReuseOptions { eviction, seed, events_max } = options;
        let options = PrefixOptions { block_tokens, groups, seed, events_max, nodes_max: None };
        let prefix = PrefixCache::new(options, eviction)?;
        Ok(Some(Self { prefix, evicted: Vec::new(), sealed: Sealed::default(), copiers: 0 }))
    }

    /// What is sealed and what is cached is the same everywhere.
    pub(super) fn check_invariants(&self, groups: &[Group]) -> Result<(), String> {
        self.prefix.check_invariants()?;
        for (number, group) in groups.iter().enumerate() {
            for block in 0..group.pool.blocks() {
                let (here, there) =
                    (group.pool.is_sealed(block), self.prefix.index().is_sealed(number, block));
                if here != there {
                    return Err(format!(
                        "group {number}: block {block} is sealed: {here}, in the index: {there}"
                    ));
                }
                let here = group.pool.state(block) == Ok(BlockState::Cached);
                if here && !self.prefix.is_cached(number, block) {
                    return Err(format!("group {number}: block {block} is cached and no policy knows it"));
                }
            }
        }
        Ok(())
    }
}

impl KvState {
    fn reuse_mut(&mut self) -> Result<&mut Reuse, KvError> {
        self.reuse.as_mut().ok_or(KvError::NoReuse)
    }

    /// Tokens of a block, where what blocks hold is remembered.
    #[must_use]
    pub fn block_tokens(&self) -> Option<u32> {
        Some(self.reuse.as_ref()?.prefix.index().options().block_tokens)
    }

    /// Lets the full blocks of `tokens` be found from now on. `blocks` has a list for each group, with [`NO_BLOCK`] where a
    /// group has none; each block must be owned. What was there already is kept and told ([`Sealed::duplicates`]).
    ///
    /// # Errors
    /// [`KvError::NoReuse`], [`KvError::Prefix`], [`KvError::Blocks`] for a block that nobody owns; nothing is changed.
    pub fn seal(&mut self, start: Start<'_>, tokens: &[u32], blocks: &[&[u32]]) -> Result<&Sealed, KvError> {
        let full = tokens.len() / self.block_tokens().ok_or(KvError::NoReuse)?.max(1) as usize;
        self.check_owned(blocks, full)?;
        self.seal_with(|prefix, sealed| prefix.seal(start, tokens, blocks, sealed))
    }

    /// The same by keys that the engine brings, one a block; `after` is the key of the block before the first.
    ///
    /// # Errors
    /// As [`seal`](Self::seal).
    pub fn seal_keys(
        &mut self,
        salt: &[u8],
        after: Option<&[u8]>,
        keys: &[&[u8]],
        blocks: &[&[u32]],
    ) -> Result<&Sealed, KvError> {
        self.check_owned(blocks, keys.len())?;
        self.seal_with(|prefix, sealed| prefix.seal_keys(salt, after, keys, blocks, sealed))
    }

    fn check_owned(&self, blocks: &[&[u32]], full: usize) -> Result<(), KvError> {
        for (group, blocks) in self.groups.iter().zip(blocks) {
            for block in blocks.iter().take(full).filter(|block| **block != NO_BLOCK) {
                group.pool.check_owned(*block)?;
            }
        }
        Ok(())
    }

    fn seal_with(
        &mut self,
        seal: impl FnOnce(&mut PrefixCache, &mut Sealed) -> Result<(), super::prefix::PrefixError>,
    ) -> Result<&Sealed, KvError> {
        let Some(reuse) = &mut self.reuse else { return Err(KvError::NoReuse) };
        seal(&mut reuse.prefix, &mut reuse.sealed)?;
        for (group, block) in &reuse.sealed.stored {
            self.groups[*group].pool.seal(*block)?;
            if reuse.copiers > 0 {
                reuse.prefix.await_copy(*group, *block, true);
            }
        }
        Ok(&reuse.sealed)
    }

    /// Somebody copies what is sealed from now on elsewhere (or one does so no longer): a block whose copy is not there yet
    /// goes after others, where there is a choice and for a few rounds ([`PrefixCache::await_copy`]).
    ///
    /// # Errors
    /// [`KvError::NoReuse`].
    pub fn copy_sealed(&mut self, is_copied: bool) -> Result<(), KvError> {
        let reuse = self.reuse_mut()?;
        reuse.copiers =
            if is_copied { reuse.copiers.saturating_add(1) } else { reuse.copiers.saturating_sub(1) };
        Ok(())
    }

    /// These blocks are copied, or will not be: they go when their turn comes.
    ///
    /// # Errors
    /// [`KvError::NoReuse`].
    pub fn copied(&mut self, group: usize, blocks: &[u32]) -> Result<(), KvError> {
        let reuse = self.reuse_mut()?;
        for block in blocks {
            reuse.prefix.await_copy(group, *block, false);
        }
        Ok(())
    }

    /// The same for those blocks of a sequence from `first` on that can be found.
    ///
    /// # Errors
    /// [`KvError::NoReuse`].
    pub fn copied_sequence(&mut self, salt: &[u8], tokens: &[u32], first: usize) -> Result<(), KvError> {
        let (reuse, mut found) = (self.reuse_mut()?, Found::default());
        reuse.prefix.find(salt, tokens, &mut found);
        for (group, part) in found.groups.iter().enumerate() {
            for block in part.blocks.iter().skip(first.saturating_sub(part.first)) {
                reuse.prefix.await_copy(group, *block, false);
            }
        }
        Ok(())
    }

    /// Evicts what is cached of a sequence from block `first` on, from its last one backwards, up to one that somebody owns
    /// or that another sequence goes on from. Nobody uses them by that. Returns how many, and whether an owner was in the way.
    ///
    /// # Errors
    /// [`KvError::NoReuse`].
    pub fn demote(&mut self, salt: &[u8], tokens: &[u32], first: usize) -> Result<(u32, bool), KvError> {
        let mut found = Found::default();
        self.reuse_mut()?.prefix.find(salt, tokens, &mut found);
        let (mut demoted, mut is_held) = (0, false);
        for (group, part) in found.groups.iter().enumerate() {
            let blocks = part.blocks.iter().skip(first.saturating_sub(part.first));
            for block in blocks.rev().filter(|block| **block != NO_BLOCK) {
                let is_owned = self.groups[group].pool.state(*block)? != BlockState::Cached;
                is_held |= is_owned;
                if is_owned || self.reuse_mut()?.prefix.is_followed(group, *block) {
                    break;
                }
                demoted += self.evict_with(group, |prefix, evicted| {
                    prefix.evict_blocks(group, *block..*block + 1, evicted);
                })?;
            }
        }
        Ok((demoted, is_held))
    }

    /// Finds the longest prefix of `tokens` that was sealed for this salt, and makes the caller one more owner of its
    /// blocks: free them like others. An engine must compute at least one token itself, so it gives all but the last.
    ///
    /// # Errors
    /// [`KvError::NoReuse`]; [`KvError::Blocks`] for a block that has as many owners as can be counted. Nothing is changed.
    pub fn find(&mut self, salt: &[u8], tokens: &[u32], found: &mut Found) -> Result<(), KvError> {
        self.reuse_mut()?.prefix.find(salt, tokens, found);
        self.share_found(found)
    }

    /// The same, but of what is found only from block `first` of the sequence on the caller becomes one more owner, and only
    /// that is named: for whoever copies a part of it.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn find_from(
        &mut self,
        salt: &[u8],
        tokens: &[u32],
        first: usize,
        found: &mut Found,
    ) -> Result<(), KvError> {
        self.reuse_mut()?.prefix.find(salt, tokens, found);
        for part in &mut found.groups {
            let before = first.saturating_sub(part.first).min(part.blocks.len());
            part.blocks.drain(..before);
            part.first += before;
        }
        self.share_found(found)
    }

    /// The same for keys that an engine sealed.
    ///
    /// # Errors
    /// As [`find`](Self::find), and [`KvError::Prefix`].
    pub fn find_keys(&mut self, salt: &[u8], keys: &[&[u8]], found: &mut Found) -> Result<(), KvError> {
        self.reuse_mut()?.prefix.find_keys(salt, keys, found)?;
        self.share_found(found)
    }

    fn share_found(&mut self, found: &Found) -> Result<(), KvError> {
        let all = found.groups.iter().enumerate().flat_map(|(group, found)| {
            found.blocks.iter().filter(|block| **block != NO_BLOCK).map(move |block| (group, *block))
        });
        let all: Vec<(usize, u32)> = all.collect();
        for (at, (group, block)) in all.iter().enumerate() {
            if let Err(error) = self.groups[*group].pool.share(*block) {
                for (group, block) in &all[..at] {
                    self.free(*group, &[*block])?;
                }
                return Err(error.into());
            }
            if let Some(reuse) = &mut self.reuse {
                reuse.prefix.used(*group, *block);
            }
        }
        for (at, _) in found.groups.iter().enumerate() {
            let group = &mut self.groups[at];
            group.demand.rose_to(group.pool.used());
        }
        Ok(())
    }

    /// The blocks in `scratch` are cached from now on.
    #[cold]
    pub(super) fn released(&mut self, group: usize) {
        if let Some(reuse) = &mut self.reuse {
            let pool = &self.groups[group].pool;
            reuse.prefix.released(group, &self.scratch, |block| span_of(pool, block));
        }
        self.scratch.clear();
    }

    /// A sealed block has moved.
    pub(super) fn renumbered(&mut self, group: usize, moved: BlockMove) -> Result<(), KvError> {
        let span = span_of(&self.groups[group].pool, moved.to);
        Ok(self.reuse_mut()?.prefix.renumber(group, moved.from, moved.to, span)?)
    }

    /// Evicts up to `count` cached blocks of a group, in the policy's order: they are free then. Returns how many.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn evict(&mut self, group: usize, count: u32) -> Result<u32, KvError> {
        self.pool(group)?;
        self.evict_with(group, |prefix, evicted| prefix.evict(group, count, evicted))
    }

    /// Evicts as many cached blocks of a group as an allocation of `blocks` lacks. False, and nothing is changed: it would
    /// not be enough, or the limit is in the way.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn evict_for(&mut self, group: usize, blocks: u32) -> Result<bool, KvError> {
        let figures = self.pool(group)?.figures();
        let missing = blocks.saturating_sub(figures.available);
        if missing > figures.cached || !self.fits_limit(group, blocks)? {
            return Ok(false);
        }
        Ok(self.evict(group, missing)? == missing)
    }

    /// Evicts cached blocks so that granules of at least `bytes` are empty, as far as there are any in which nothing is
    /// owned: those first that were given up longest ago, in whatever group, and there in the policy's order
    /// ([`PrefixCache::victim_extent`]). What could not be found without them goes too. Returns the memory of granules that
    /// are empty by that.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn evict_granules(&mut self, bytes: ByteCount) -> Result<ByteCount, KvError> {
        let mut emptied = ByteCount::ZERO;
        let Some(reuse) = &mut self.reuse else { return Ok(emptied) };
        for (at, group) in self.groups.iter().enumerate() {
            for (slot, blocks) in group.pool.loads() {
                reuse.prefix.set_allocated(at, slot, blocks);
            }
        }
        let mut is_spent = vec![false; self.groups.len()];
        while emptied < bytes {
            let prefix = &self.reuse_mut()?.prefix;
            let Some(at) = prefix.coldest_group(|group| !is_spent[group]) else { break };
            let gave = self.evict_granule(at)?;
            is_spent[at] = gave.is_none();
            emptied += gave.unwrap_or(ByteCount::ZERO);
        }
        Ok(emptied)
    }

    /// Empties one granule of a group; how much memory is empty by that. `None`: it has none that can be.
    fn evict_granule(&mut self, at: usize) -> Result<Option<ByteCount>, KvError> {
        let Some(slot) = self.reuse_mut()?.prefix.victim_extent(at) else { return Ok(None) };
        let pool = &self.groups[at].pool;
        let Some((mut blocks, _)) = pool.blocks_and_units(slot) else { return Ok(None) };
        if pool.is_pinned(slot) {
            blocks.start -= 1;
        }
        let before = pool.figures().units_empty;
        if self.evict_with(at, |prefix, evicted| prefix.evict_blocks(at, blocks, evicted))? == 0 {
            return Ok(None);
        }
        let units = self.groups[at].pool.figures().units_empty - before;
        // What went with them may have kept other granules: a sequence lies where it found room.
        if let Some(reuse) = &mut self.reuse {
            let pool = &self.groups[at].pool;
            for block in &reuse.evicted {
                for slot in pool.granules_of(*block).into_iter().flat_map(|(first, last)| [first, last]) {
                    reuse.prefix.set_allocated(at, slot, pool.load(slot));
                }
            }
        }
        Ok(Some(ByteCount(u64::from(units) * self.groups[at].unit_bytes)))
    }

    /// Evicts what is cached in granules in which nothing is owned and whose pages `is_had` takes.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn evict_where(&mut self, is_had: impl Fn(&[PageRun]) -> bool) -> Result<(), KvError> {
        for at in 0..self.groups.len() {
            if self.reuse.is_none() || self.groups[at].pool.figures().cached == 0 {
                continue;
            }
            for (slot, _) in self.groups[at].pool.evictable() {
                // Gone with one before it.
                let Some((mut blocks, _)) = self.groups[at].pool.blocks_and_units(slot) else { continue };
                if !is_had(&self.runs(GranuleId { group: at, slot })?) {
                    continue;
                }
                if self.groups[at].pool.is_pinned(slot) {
                    blocks.start -= 1;
                }
                self.evict_with(at, |prefix, evicted| prefix.evict_blocks(at, blocks, evicted))?;
            }
        }
        Ok(())
    }

    fn evict_with(
        &mut self,
        group: usize,
        evict: impl FnOnce(&mut PrefixCache, &mut Vec<u32>),
    ) -> Result<u32, KvError> {
        let Some(reuse) = &mut self.reuse else { return Ok(0) };
        reuse.evicted.clear();
        evict(&mut reuse.prefix, &mut reuse.evicted);
        let mut freed = Freed::default();
        let pool = &mut self.groups[group].pool;
        for block in &reuse.evicted {
            freed.free += pool.unseal(*block)?.free;
        }
        Ok(freed.free)
    }

    /// What a block holds is no longer what it was sealed as, or shall not be found. True if it was sealed.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`], [`KvError::Blocks`] for a block that does not exist.
    pub fn forget(&mut self, group: usize, block: u32) -> Result<bool, KvError> {
        let pool = self.pool(group)?;
        pool.state(block)?;
        if !pool.is_sealed(block) {
            return Ok(false);
        }
        self.reuse_mut()?.prefix.forget(group, block);
        self.groups[group].pool.unseal(block)?;
        Ok(true)
    }

    /// Forgets what all blocks hold. Those that are owned stay owned.
    ///
    /// # Errors
    /// [`KvError::NoReuse`].
    pub fn forget_all(&mut self) -> Result<(), KvError> {
        self.reuse_mut()?.prefix.clear(&mut Vec::new());
        for group in &mut self.groups {
            for block in 0..group.pool.blocks() {
                if group.pool.is_sealed(block) {
                    group.pool.unseal(block)?;
                }
            }
        }
        Ok(())
    }

    /// What was stored and removed, from number `sequence` on, for routers.
    ///
    /// # Errors
    /// [`KvError::NoReuse`].
    pub fn events_since(&self, sequence: u64, max: usize) -> Result<EventBatch, KvError> {
        Ok(self.reuse.as_ref().ok_or(KvError::NoReuse)?.prefix.index().events_since(sequence, max))
    }

    /// Counts since the cache was made.
    ///
    /// # Errors
    /// [`KvError::NoReuse`].
    pub fn prefix_stats(&self) -> Result<PrefixStats, KvError> {
        Ok(self.reuse.as_ref().ok_or(KvError::NoReuse)?.prefix.index().stats())
    }

    /// Memory that would be free if everything cached were evicted, and is not free without.
    #[must_use]
    pub fn evictable_bytes(&self) -> ByteCount {
        let bytes = |group: &Group| {
            let units = group.pool.evictable().into_iter().filter_map(|(slot, _)| group.pool.units_of(slot));
            units.map(|(_, units)| u64::from(units) * group.unit_bytes).sum::<u64>()
        };
        ByteCount(self.groups.iter().map(bytes).sum())
    }
}
