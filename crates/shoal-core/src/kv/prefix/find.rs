//! The longest prefix of a sequence that every group of layers can go on from.
//!
//! Apart from the tree because the groups differ: full attention needs every block, a sliding window the last few,
//! recurrent state the last one ([`GroupRule`](super::GroupRule)). A prefix counts if all groups have what they need.

use super::index::{Kind, Position, PrefixIndex, Start, Step, check_key};
use super::options::PrefixError;
use super::{NO_BLOCK, NO_NODE};

/// What one group holds of a prefix.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupFound {
    /// The first block of the sequence that `blocks` names: 0 for full attention.
    pub first: usize,
    /// The blocks from there to the end of the prefix.
    pub blocks: Vec<u32>,
}

/// A prefix that was found. Reuse it: its lists keep their memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Its length in blocks.
    pub blocks: usize,
    /// Its length in tokens.
    pub tokens: usize,
    /// The blocks of each group.
    pub groups: Vec<GroupFound>,
    /// Its end, for sealing what comes after it; none at the start of a sequence.
    pub position: Option<Position>,
}

impl PrefixIndex {
    /// Finds the longest prefix of `tokens`, sealed for this salt, that all groups can go on from. Only full blocks
    /// count. An engine must compute at least one token itself: it gives all but the last.
    pub fn find(&mut self, salt: &[u8], tokens: &[u32], found: &mut Found) {
        let block_tokens = self.options.block_tokens as usize;
        let mut walk = Walk::new(self);
        if let Ok(Some(root)) = self.start_node(Start::Salt(salt), Kind::Tokens) {
            let mut node = root;
            for block in tokens.chunks_exact(block_tokens) {
                let Step::Node(child) = self.step(node, block) else { break };
                node = child;
                if !walk.goes_on(self, node) {
                    break;
                }
            }
        }
        walk.end(self, found);
    }

    /// The same for a sequence of keys that an engine sealed.
    ///
    /// # Errors
    /// [`PrefixError::KeyLength`].
    pub fn find_keys(&mut self, salt: &[u8], keys: &[&[u8]], found: &mut Found) -> Result<(), PrefixError> {
        keys.iter().copied().try_for_each(check_key)?;
        let mut walk = Walk::new(self);
        if let Some(root) = self.start_node(Start::Salt(salt), Kind::Engine)? {
            for key in keys {
                let Step::Node(node) = self.step_by_key(root, key) else { break };
                if !walk.goes_on(self, node) {
                    break;
                }
            }
        }
        walk.end(self, found);
        Ok(())
    }
}

/// How much of a way down the tree can be found: up to the last node where every group has what it needs.
pub(super) struct Reach {
    /// Blocks in a row that each group had, up to here. 64 groups at most.
    runs: [u32; 64],
    length: u32,
    /// Blocks that can be found.
    pub(super) best: usize,
}

impl Reach {
    pub(super) const fn new() -> Self {
        Self { runs: [0; 64], length: 0, best: 0 }
    }

    /// Takes the next node; false when nothing further can count.
    pub(super) fn goes_on(&mut self, index: &PrefixIndex, node: u32) -> bool {
        self.length += 1;
        let mut all = true;
        for (group, options) in index.options.groups.iter().enumerate() {
            let run = &mut self.runs[group];
            *run = if index.nodes.block(node, group) == NO_BLOCK { 0 } else { *run + 1 };
            let needed = options.rule.blocks_needed(index.options.block_tokens);
            if needed.is_none() && *run < self.length {
                return false;
            }
            all &= *run >= needed.unwrap_or(self.length).min(self.length);
        }
        if all {
            self.best = self.length as usize;
        }
        true
    }
}

/// How far a walk has come.
struct Walk {
    path: Vec<u32>,
    reach: Reach,
}

impl Walk {
    fn new(index: &mut PrefixIndex) -> Self {
        let mut path = std::mem::take(&mut index.path);
        path.clear();
        Self { path, reach: Reach::new() }
    }

    /// Takes the next node; false when nothing further can count.
    fn goes_on(&mut self, index: &PrefixIndex, node: u32) -> bool {
        self.path.push(node);
        self.reach.goes_on(index, node)
    }

    fn end(self, index: &mut PrefixIndex, found: &mut Found) {
        found.blocks = self.reach.best;
        found.tokens = self.reach.best * index.options.block_tokens as usize;
        found.groups.resize_with(index.options.groups.len(), GroupFound::default);
        for (group, (found, options)) in found.groups.iter_mut().zip(&index.options.groups).enumerate() {
            let needed = options.rule.blocks_needed(index.options.block_tokens);
            let needed = needed.map_or(self.reach.best, |needed| self.reach.best.min(needed as usize));
            found.first = self.reach.best - needed;
            found.blocks.clear();
            let path = &self.path[found.first..self.reach.best];
            found.blocks.extend(path.iter().map(|node| index.nodes.block(*node, group)));
        }
        let last = self.reach.best.checked_sub(1).map_or(NO_NODE, |last| self.path[last]);
        found.position = (last != NO_NODE).then(|| index.position(last));
        index.path = self.path;
    }
}
