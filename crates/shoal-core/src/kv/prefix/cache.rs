//! The index and an eviction policy for each group, as one thing: what a block manager composes with its owners' counts.
//!
//! The block manager says when a sealed block loses its last owner ([`released`](PrefixCache::released)) and when it is
//! found again ([`used`](PrefixCache::used)); it hears which blocks to free when it wants some
//! ([`evict`](PrefixCache::evict)) or a whole extent ([`victim_extent`](PrefixCache::victim_extent)).
//!
//! In a group of full attention a block goes only after all cached blocks that follow it: without it they could not be
//! found. Where a policy names a block that others follow, the last of those goes first. The way down to it is kept, so
//! that emptying a long sequence costs O(1) a block.
//!
//! A block of which a copy is awaited elsewhere (in a tier below) gets some more chances when its turn comes, as in the
//! clock of F. J. Corbato ("A paging experiment with the Multics system", 1968): what has a copy goes first. Chances are
//! few for each block and for each call, so a copy that never comes costs hardly any time.

use std::ops::Range;

use super::find::Found;
use super::index::{PrefixIndex, Sealed, Start};
use super::options::{GroupRule, PrefixError, PrefixOptions};
use super::{NO_BLOCK, NO_NODE};
use crate::kv::eviction::{About, EvictionKind, Evictor, ExtentSpan};

/// How often a block whose copy is awaited lets others go first.
const CHANCES: u8 = 4;
/// How many chances are given in one call at most.
const CHANCES_A_CALL: u32 = 512;

#[derive(Debug)]
struct Group {
    evictor: Evictor,
    /// Whether blocks are of use only with all those before them.
    ordered: bool,
    /// Cached blocks right below each node.
    cached_below: Vec<u32>,
    /// From a victim down to the last block that follows it; all of them cached.
    path: Vec<u32>,
    /// Whether a block's node is on the path.
    on_path: Vec<bool>,
    /// Chances that are left to blocks whose copies are awaited.
    chances: Vec<u8>,
}

impl Group {
    fn leave_path(&mut self, index: &PrefixIndex, number: usize) {
        for node in self.path.drain(..) {
            if let Some(place) = self.on_path.get_mut(index.nodes.block(node, number) as usize) {
                *place = false;
            }
        }
    }

    /// Whether a block has a chance left, which is one less then.
    fn takes_chance(&mut self, block: u32, in_call: &mut u32) -> bool {
        let left = &mut self.chances[block as usize];
        let has_one = *left > 0 && *in_call > 0 && self.evictor.cached_count() > 1;
        *left -= u8::from(has_one);
        *in_call -= u32::from(has_one);
        has_one
    }

    /// A node's block is the newest from now on for the policy, as if it had been used.
    fn spare(&mut self, index: &PrefixIndex, number: usize, node: u32) {
        let about = self.about(index, number, node, None);
        self.evictor.spared(index.nodes.block(node, number), &about);
    }

    /// The last block of the path is to stay for now, so the policy must name another victim. One that has chances of its own
    /// takes one and is spared alone, as it comes after those that follow it; else all of them are, by a chance of the last.
    /// False: there is no chance left in this call.
    fn spare_path(&mut self, index: &PrefixIndex, number: usize, in_call: &mut u32) -> bool {
        let (Some(victim), Some(last)) = (self.path.first().copied(), self.path.last().copied()) else {
            return false;
        };
        if self.takes_chance(index.nodes.block(victim, number), in_call) {
            self.leave_path(index, number);
            self.spare(index, number, victim);
            return true;
        }
        let nodes = u32::try_from(self.path.len()).unwrap_or(u32::MAX);
        if nodes > *in_call || !self.takes_chance(index.nodes.block(last, number), in_call) {
            return false;
        }
        *in_call = in_call.saturating_sub(nodes);
        let path = std::mem::take(&mut self.path);
        for node in path.iter().rev() {
            self.on_path[index.nodes.block(*node, number) as usize] = false;
            self.spare(index, number, *node);
        }
        true
    }

    /// What the policy is told of a block that is cached now. `before` is the one that was cached just before, with the node
    /// above it.
    fn about(&self, index: &PrefixIndex, number: usize, node: u32, before: Option<(u32, u32)>) -> About {
        let nodes = &index.nodes;
        let found = nodes.at(node);
        let above = found.parent;
        let is_first = nodes.at(above).parent == NO_NODE;
        // The one released just now, or else the one last found: not all children, of which there may be many.
        let successor = match before {
            Some((next, parent)) if parent == node => Some(next),
            _ if found.first_child != NO_NODE => {
                Some(nodes.block(found.first_child, number)).filter(|next| self.evictor.is_cached(*next))
            }
            _ => None,
        };
        #[expect(clippy::cast_possible_truncation, reason = "a hash of it")]
        let key = found.key as u64;
        About {
            key,
            tokens: found.depth.saturating_mul(index.options.block_tokens),
            reachable: !self.ordered || is_first || nodes.block(above, number) != NO_BLOCK,
            successor: successor.filter(|_| self.ordered),
        }
    }

    fn below(&mut self, node: u32) -> &mut u32 {
        let node = node as usize;
        if self.cached_below.len() <= node {
            self.cached_below.resize(node + 1, 0);
        }
        &mut self.cached_below[node]
    }
}

/// Sealed blocks, by content, and the order in which those without an owner go.
#[derive(Debug)]
pub struct PrefixCache {
    index: PrefixIndex,
    groups: Vec<Group>,
    scratch: Vec<u32>,
    /// How often blocks were released: the time of all groups.
    now: u64,
}

impl PrefixCache {
    /// Nothing is sealed.
    ///
    /// # Errors
    /// [`PrefixError::Options`].
    pub fn new(options: PrefixOptions, kind: EvictionKind) -> Result<Self, PrefixError> {
        let groups = options.groups.iter().map(|group| Group {
            evictor: Evictor::new(kind, group.blocks),
            ordered: group.rule == GroupRule::Full,
            cached_below: Vec::new(),
            path: Vec::new(),
            on_path: vec![false; group.blocks as usize],
            chances: vec![0; group.blocks as usize],
        });
        Ok(Self { groups: groups.collect(), index: PrefixIndex::new(options)?, scratch: Vec::new(), now: 0 })
    }

    /// What is sealed.
    #[must_use]
    pub const fn index(&self) -> &PrefixIndex {
        &self.index
    }

    /// Sealed blocks of a group without an owner.
    #[must_use]
    pub fn cached_count(&self, group: usize) -> u32 {
        self.groups.get(group).map_or(0, |group| group.evictor.cached_count())
    }

    /// Whether a block is sealed and without an owner.
    #[must_use]
    pub fn is_cached(&self, group: usize, block: u32) -> bool {
        self.groups.get(group).is_some_and(|group| group.evictor.is_cached(block))
    }

    /// [`PrefixIndex::find`]. It changes nobody's place: say [`used`](Self::used) of what is taken.
    pub fn find(&mut self, salt: &[u8], tokens: &[u32], found: &mut Found) {
        self.index.find(salt, tokens, found);
    }

    /// [`PrefixIndex::find_keys`].
    ///
    /// # Errors
    /// [`PrefixError::KeyLength`].
    pub fn find_keys(&mut self, salt: &[u8], keys: &[&[u8]], found: &mut Found) -> Result<(), PrefixError> {
        self.index.find_keys(salt, keys, found)
    }

    /// [`PrefixIndex::seal`], for blocks that have an owner.
    ///
    /// # Errors
    /// As there.
    pub fn seal(
        &mut self,
        start: Start<'_>,
        tokens: &[u32],
        blocks: &[&[u32]],
        sealed: &mut Sealed,
    ) -> Result<(), PrefixError> {
        self.index.seal(start, tokens, blocks, sealed)
    }

    /// [`PrefixIndex::seal_keys`], for blocks that have an owner.
    ///
    /// # Errors
    /// As there.
    pub fn seal_keys(
        &mut self,
        salt: &[u8],
        after: Option<&[u8]>,
        keys: &[&[u8]],
        blocks: &[&[u32]],
        sealed: &mut Sealed,
    ) -> Result<(), PrefixError> {
        self.index.seal_keys(salt, after, keys, blocks, sealed)
    }

    /// These sealed blocks of one sequence, in its order, have no owner any more: they can be found until they are
    /// evicted. `span` tells which extents a block lies in. Blocks that are not sealed, or cached already, are passed over.
    pub fn released(&mut self, group: usize, blocks: &[u32], span: impl Fn(u32) -> ExtentSpan) {
        let Some(state) = self.groups.get_mut(group) else { return };
        self.now += 1;
        state.evictor.set_now(self.now);
        let mut before: Option<(u32, u32)> = None;
        for block in blocks.iter().rev().copied() {
            let Some(node) = self.index.node_of(group, block) else { continue };
            if state.evictor.is_cached(block) {
                continue;
            }
            let about = state.about(&self.index, group, node, before);
            let above = self.index.nodes.at(node).parent;
            *state.below(above) += 1;
            state.evictor.cached(block, span(block), &about);
            before = Some((block, above));
        }
        self.check_in_debug();
    }

    /// A cached block was found and has an owner again. One that is not cached is left as it is.
    pub fn used(&mut self, group: usize, block: u32) {
        if !self.is_cached(group, block) {
            return;
        }
        if let Some(node) = self.leave(group, block) {
            let above = self.index.nodes.at(node).parent;
            let state = &mut self.groups[group];
            *state.below(above) -= 1;
            state.evictor.used(block);
        }
    }

    /// A block's content is gone: it is found no more. Returns whether it was sealed.
    pub fn forget(&mut self, group: usize, block: u32) -> bool {
        let Some(node) = self.leave(group, block) else { return false };
        let above = self.index.nodes.at(node).parent;
        let state = &mut self.groups[group];
        if state.evictor.is_cached(block) {
            *state.below(above) -= 1;
        }
        state.evictor.gone(block);
        state.chances[block as usize] = 0;
        self.index.forget(group, block)
    }

    /// A copy of a sealed block is awaited elsewhere, or is not any more: until then others go first, where there are any.
    pub fn await_copy(&mut self, group: usize, block: u32, is_awaited: bool) {
        let is_sealed = self.index.node_of(group, block).is_some();
        if let Some(chances) =
            self.groups.get_mut(group).and_then(|state| state.chances.get_mut(block as usize))
        {
            *chances = if is_awaited && is_sealed { CHANCES } else { 0 };
        }
    }

    /// Chooses up to `count` cached blocks of a group, forgets them and adds them to `evicted`, in the order in which they
    /// went. Fewer only if no more are cached.
    pub fn evict(&mut self, group: usize, count: u32, evicted: &mut Vec<u32>) {
        if group >= self.groups.len() {
            return;
        }
        let mut chances = CHANCES_A_CALL;
        for _ in 0..count {
            let Some(block) = self.last_in_line(group, &mut chances) else { break };
            self.forget_cached(group, block, evicted);
        }
        self.check_in_debug();
    }

    /// Whether a sequence goes on after what this block holds.
    #[must_use]
    pub fn is_followed(&self, group: usize, block: u32) -> bool {
        let node = self.index.node_of(group, block);
        node.is_some_and(|node| self.index.nodes.at(node).first_child != NO_NODE)
    }

    /// Forgets the cached blocks among `blocks`, and those that could not be found without them wherever they lie; adds
    /// them to `evicted`. To empty an extent, give its range of blocks.
    pub fn evict_blocks(&mut self, group: usize, blocks: Range<u32>, evicted: &mut Vec<u32>) {
        if group >= self.groups.len() {
            return;
        }
        for block in blocks {
            if !self.is_cached(group, block) {
                continue;
            }
            let Some(node) = self.index.node_of(group, block) else { continue };
            if self.groups[group].ordered && self.index.nodes.at(node).first_child != NO_NODE {
                self.evict_followers(group, node, evicted);
            }
            self.forget_cached(group, block, evicted);
        }
        self.check_in_debug();
    }

    /// The extent that is emptied at the least loss, if one can be: all of its allocated blocks are cached.
    #[must_use]
    pub fn victim_extent(&self, group: usize) -> Option<u32> {
        self.groups.get(group)?.evictor.victim_extent()
    }

    /// Of the groups that `may_give` takes and of which an extent can be emptied: the one where such an extent has been
    /// given up for longest.
    pub fn coldest_group(&self, may_give: impl Fn(usize) -> bool) -> Option<usize> {
        let groups = self.groups.iter().enumerate().filter(|(group, _)| may_give(*group));
        let oldest = groups.filter_map(|(group, state)| Some((state.evictor.oldest_extent()?, group)));
        oldest.min().map(|(_, group)| group)
    }

    /// How many blocks of an extent are allocated, cached ones included. See [`Evictor::set_allocated`].
    pub fn set_allocated(&mut self, group: usize, extent: u32, blocks: u32) {
        if let Some(state) = self.groups.get_mut(group) {
            state.evictor.set_allocated(extent, blocks);
        }
    }

    /// What a sealed block holds was moved to another block, which lies in these extents.
    ///
    /// # Errors
    /// [`PrefixError::UnknownBlock`], [`PrefixError::BlockState`]; nothing is changed.
    pub fn renumber(
        &mut self,
        group: usize,
        from: u32,
        to: u32,
        span: ExtentSpan,
    ) -> Result<(), PrefixError> {
        self.index.check_renumber(group, from, to)?;
        self.leave(group, from);
        self.index.renumber(group, from, to);
        let state = &mut self.groups[group];
        state.evictor.renumber(from, to, span);
        state.chances[to as usize] = std::mem::take(&mut state.chances[from as usize]);
        self.check_in_debug();
        Ok(())
    }

    /// Forgets all blocks, also those with owners; adds those without to `evicted`, as (group, block).
    pub fn clear(&mut self, evicted: &mut Vec<(usize, u32)>) {
        for (number, state) in self.groups.iter_mut().enumerate() {
            state.leave_path(&self.index, number);
            state.cached_below.clear();
            for block in 0..self.index.options.groups[number].blocks {
                if self.index.node_of(number, block).is_none() {
                    continue;
                }
                if state.evictor.is_cached(block) {
                    evicted.push((number, block));
                }
                state.evictor.gone(block);
            }
            state.chances.fill(0);
        }
        self.index.clear();
    }

    /// The node of a sealed block, after the path is left if it is on it.
    fn leave(&mut self, group: usize, block: u32) -> Option<u32> {
        let node = self.index.node_of(group, block)?;
        let state = &mut self.groups[group];
        if state.on_path[block as usize] {
            state.leave_path(&self.index, group);
        }
        Some(node)
    }

    /// The policy's victim, or the last of the cached blocks that follow it. One whose copy is awaited has its chance first.
    fn last_in_line(&mut self, group: usize, chances: &mut u32) -> Option<u32> {
        let Self { index, groups, .. } = self;
        let state = &mut groups[group];
        loop {
            let top = if let Some(top) = state.path.last() {
                *top
            } else {
                let victim = state.evictor.victim()?;
                let node = index.node_of(group, victim)?;
                if !state.ordered {
                    if !state.takes_chance(victim, chances) {
                        return Some(victim);
                    }
                    state.spare(index, group, node);
                    continue;
                }
                state.path.push(node);
                node
            };
            let block = index.nodes.block(top, group);
            state.on_path[block as usize] = true;
            let next = if *state.below(top) == 0 {
                None
            } else {
                let is_cached = |child: &u32| state.evictor.is_cached(index.nodes.block(*child, group));
                index.nodes.children(top).find(is_cached)
            };
            let Some(child) = next else {
                if state.chances[block as usize] > 0 && state.spare_path(index, group, chances) {
                    continue;
                }
                state.path.pop();
                state.on_path[block as usize] = false;
                return Some(block);
            };
            state.path.push(child);
        }
    }

    /// Forgets all cached blocks below a node, children before parents.
    fn evict_followers(&mut self, group: usize, node: u32, evicted: &mut Vec<u32>) {
        let mut below = std::mem::take(&mut self.scratch);
        below.clear();
        below.extend(self.index.nodes.children(node));
        let mut at = 0;
        while let Some(node) = below.get(at).copied() {
            below.extend(self.index.nodes.children(node));
            at += 1;
        }
        for node in below.iter().rev() {
            // A hole is freed with its last child; it has no block then.
            let block = self.index.nodes.block(*node, group);
            if block != NO_BLOCK && self.is_cached(group, block) {
                self.forget_cached(group, block, evicted);
            }
        }
        self.scratch = below;
    }

    fn forget_cached(&mut self, group: usize, block: u32, evicted: &mut Vec<u32>) {
        if self.forget(group, block) {
            evicted.push(block);
        }
    }

    /// Says what is wrong inside, if anything is.
    ///
    /// # Errors
    /// A sentence that names the first contradiction.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.index.check_invariants()?;
        for (number, state) in self.groups.iter().enumerate() {
            state.evictor.check_invariants()?;
            let mut below = vec![0; state.cached_below.len()];
            for block in 0..self.index.options.groups[number].blocks {
                if state.chances[block as usize] > 0 && self.index.node_of(number, block).is_none() {
                    return Err(format!(
                        "group {number}: a copy of block {block} is awaited, which is not sealed"
                    ));
                }
                let is_on_path = state.path.iter().any(|node| self.index.nodes.block(*node, number) == block);
                if state.on_path[block as usize] != is_on_path {
                    return Err(format!("group {number}: block {block} is on the path: {is_on_path}"));
                }
                if !state.evictor.is_cached(block) {
                    if is_on_path {
                        return Err(format!("group {number}: block {block} is on the path and not cached"));
                    }
                    continue;
                }
                let Some(node) = self.index.node_of(number, block) else {
                    return Err(format!("group {number}: block {block} is cached and not sealed"));
                };
                below[self.index.nodes.at(node).parent as usize] += 1;
            }
            if below != state.cached_below {
                return Err(format!("group {number}: cached blocks below nodes are miscounted"));
            }
        }
        Ok(())
    }

    fn check_in_debug(&self) {
        if cfg!(debug_assertions)
            && self.index.node_count() <= 256
            && let Err(wrong) = self.check_invariants()
        {
            unreachable!("{wrong}");
        }
    }
}
