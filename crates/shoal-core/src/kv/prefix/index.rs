//! The index: sealing blocks, forgetting them, and what must hold in between.

use std::collections::HashMap;

use super::events::{EventBatch, EventKind, Events};
use super::find::Reach;
use super::key::{BlockKey, block_key, engine_key, root_key};
use super::nodes::{Content, Nodes};
use super::options::{PrefixError, PrefixOptions};
use super::table::KeyTable;
use super::{ENGINE_KEY_BYTES_MAX, NO_BLOCK, NO_NODE};

/// Up to how many nodes debug builds check everything after every change.
const NODES_CHECKED_MAX: usize = 512;

/// A place in the tree, so that a growing sequence need not be walked again from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    node: u32,
    generation: u32,
}

/// Where tokens begin.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// At the start of a sequence of this tenant; empty for the only one.
    Salt(&'a [u8]),
    /// After what an earlier call ended with.
    After(Position),
}

/// A block that was not sealed because another holds the same content already. The first is kept; the caller may use it
/// instead and free its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Duplicate {
    /// The group.
    pub group: usize,
    /// Which of the call's blocks.
    pub at: usize,
    /// The caller's.
    pub given: u32,
    /// The one that is found.
    pub kept: u32,
}

/// What a call to seal did. Reuse it: its lists keep their memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sealed {
    /// Blocks of the sequence that can be found now, from where the call began: up to the last one where every group has
    /// what it needs, as [`PrefixIndex::find`] counts.
    pub blocks: usize,
    /// Blocks that can be found from now on and could not before, as (group, block).
    pub stored: Vec<(usize, u32)>,
    /// Blocks whose content was there already.
    pub duplicates: Vec<Duplicate>,
    /// Full blocks left out, because the tree is full or a key stands for other content.
    pub refused: usize,
    /// The end of what is in the tree; none if it is the start of a sequence.
    pub position: Option<Position>,
}

impl Sealed {
    fn reset(&mut self) {
        self.blocks = 0;
        self.stored.clear();
        self.duplicates.clear();
        self.refused = 0;
        self.position = None;
    }
}

/// Counts since the index was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixStats {
    /// Blocks stored.
    pub stored: u64,
    /// Blocks removed.
    pub removed: u64,
    /// Blocks whose content was there already.
    pub duplicates: u64,
    /// Contents that met another content's key.
    pub collisions: u64,
    /// Blocks left out because the tree was full.
    pub full: u64,
}

#[derive(Clone, Debug)]
pub(super) struct GroupBlocks {
    /// The node of each block.
    pub(super) nodes: Vec<u32>,
    /// The last call that named each block.
    named: Vec<u32>,
    pub(super) sealed: u32,
}

/// What a step down from a node found.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Node(u32),
    Missing(u128),
    Collision,
}

/// Sealed blocks by content. See the [module](super) for what is promised.
#[derive(Clone, Debug)]
pub struct PrefixIndex {
    pub(super) options: PrefixOptions,
    pub(super) nodes: Nodes,
    pub(super) by_key: KeyTable,
    /// Roots by salt: of tokens, and of engines' keys.
    pub(super) roots: [HashMap<Box<[u8]>, u32>; 2],
    /// The salts of roots.
    pub(super) salts: HashMap<u32, (Kind, Box<[u8]>)>,
    pub(super) groups: Vec<GroupBlocks>,
    events: Events,
    stats: PrefixStats,
    call: u32,
    nodes_max: usize,
    /// All ones; tests take bits away so that keys collide.
    pub(super) key_mask: u128,
    scratch: Vec<u8>,
    pub(super) path: Vec<u32>,
}

/// Which of the two kinds of roots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Tokens,
    Engine,
}

impl PrefixIndex {
    /// An empty index.
    ///
    /// # Errors
    /// [`PrefixError::Options`].
    pub fn new(options: PrefixOptions) -> Result<Self, PrefixError> {
        let (block_tokens, groups) = (options.block_tokens, options.groups.len());
        if !(1..=1 << 16).contains(&block_tokens) || !(1..=64).contains(&groups) {
            return Err(PrefixError::Options { block_tokens, groups });
        }
        let all: u64 = options.groups.iter().map(|group| u64::from(group.blocks)).sum();
        let nodes_max = options.nodes_max.map_or((all * 4).max(64), u64::from).min(u64::from(NO_NODE));
        let stride = (block_tokens as usize).max(ENGINE_KEY_BYTES_MAX / 4);
        let blocks = |blocks: u32| GroupBlocks {
            nodes: vec![NO_NODE; blocks as usize],
            named: vec![0; blocks as usize],
            sealed: 0,
        };
        Ok(Self {
            nodes: Nodes::new(stride, groups),
            by_key: KeyTable::new(),
            roots: Default::default(),
            salts: HashMap::new(),
            groups: options.groups.iter().map(|group| blocks(group.blocks)).collect(),
            events: Events::new(options.events_max),
            stats: PrefixStats::default(),
            call: 0,
            nodes_max: usize::try_from(nodes_max).unwrap_or(usize::MAX),
            key_mask: u128::MAX,
            scratch: Vec::new(),
            path: Vec::new(),
            options,
        })
    }

    /// How it was set up.
    #[must_use]
    pub const fn options(&self) -> &PrefixOptions {
        &self.options
    }

    /// Counts since it was made.
    #[must_use]
    pub const fn stats(&self) -> PrefixStats {
        self.stats
    }

    /// Nodes in use, holes and roots included.
    #[must_use]
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// How many blocks of a group can be found.
    #[must_use]
    pub fn sealed_count(&self, group: usize) -> u32 {
        self.groups.get(group).map_or(0, |blocks| blocks.sealed)
    }

    /// Whether a block can be found.
    #[must_use]
    pub fn is_sealed(&self, group: usize, block: u32) -> bool {
        self.node_of(group, block).is_some()
    }

    /// The key of a sealed block.
    #[must_use]
    pub fn key_of(&self, group: usize, block: u32) -> Option<BlockKey> {
        self.node_of(group, block).map(|node| self.name_of(node))
    }

    /// Events from number `sequence`, at most `max`.
    #[must_use]
    pub fn events_since(&self, sequence: u64, max: usize) -> EventBatch {
        self.events.since(sequence, max)
    }

    /// Seals the full blocks of `tokens`, which begin at `start`, so that they are found from now on. `blocks` holds a
    /// list for each group with the ids of its blocks in order, [`NO_BLOCK`] where it has none; a partial last block is
    /// left out, and ids beyond the full blocks are not looked at. Sealing again what is sealed changes nothing.
    ///
    /// # Errors
    /// Anything but [`PrefixError::Options`] and [`PrefixError::KeyLength`]. Nothing is changed.
    pub fn seal(
        &mut self,
        start: Start<'_>,
        tokens: &[u32],
        blocks: &[&[u32]],
        sealed: &mut Sealed,
    ) -> Result<(), PrefixError> {
        let block_tokens = self.options.block_tokens as usize;
        let full = tokens.len() / block_tokens;
        self.check_lists(blocks, full)?;
        let at = self.start_node(start, Kind::Tokens)?;
        self.path.clear();
        let mut node = at.unwrap_or(NO_NODE);
        for block in tokens.chunks_exact(block_tokens) {
            if node == NO_NODE {
                break;
            }
            let Step::Node(child) = self.step(node, block) else { break };
            self.path.push(child);
            node = child;
        }
        self.check_blocks(blocks, full)?;
        sealed.reset();
        let mut node = match (at, start) {
            (Some(node), _) => node,
            (None, Start::Salt(salt)) if full > 0 => self.new_root(Kind::Tokens, salt),
            _ => return Ok(()),
        };
        let (mut reach, mut reaches) = (Reach::new(), true);
        for (at, block) in tokens.chunks_exact(block_tokens).enumerate() {
            let next = match self.path.get(at) {
                Some(known) => Step::Node(*known),
                None => self.grow(node, block),
            };
            let Step::Node(child) = next else {
                self.refuse(next, full - at, sealed);
                break;
            };
            node = child;
            self.hold(node, at, blocks, sealed);
            reaches = reaches && reach.goes_on(self, node);
        }
        sealed.blocks = reach.best;
        self.end(node, sealed);
        Ok(())
    }

    /// The same for keys that the engine brings, one a block, each standing for all tokens up to the end of its block:
    /// they are taken as they are and compared in full. `after` is the key of the block before the first. What an
    /// engine seals by key is found by key only.
    ///
    /// # Errors
    /// As [`seal`](Self::seal), and [`PrefixError::KeyLength`]. Nothing is changed.
    pub fn seal_keys(
        &mut self,
        salt: &[u8],
        after: Option<&[u8]>,
        keys: &[&[u8]],
        blocks: &[&[u32]],
        sealed: &mut Sealed,
    ) -> Result<(), PrefixError> {
        self.check_lists(blocks, keys.len())?;
        after.into_iter().chain(keys.iter().copied()).try_for_each(check_key)?;
        let root = self.start_node(Start::Salt(salt), Kind::Engine)?;
        self.path.clear();
        for key in keys {
            let found = root.map(|root| self.step_by_key(root, key));
            self.path.push(if let Some(Step::Node(node)) = found { node } else { NO_NODE });
        }
        self.check_blocks(blocks, keys.len())?;
        sealed.reset();
        if keys.is_empty() {
            return Ok(());
        }
        let root = root.unwrap_or_else(|| self.new_root(Kind::Engine, salt));
        let mut node = root;
        if let Some(key) = after {
            match self.node_by_key(root, root, key) {
                Ok(found) => node = found,
                Err(step) => {
                    self.refuse(step, keys.len(), sealed);
                    self.end(root, sealed);
                    return Ok(());
                }
            }
        }
        // Nodes that the next key was not put below, because it lies elsewhere already.
        let mut left: Vec<Position> = Vec::new();
        let (mut reach, mut reaches) = (Reach::new(), true);
        for (at, key) in keys.iter().enumerate() {
            match self.node_by_key(root, node, key) {
                Ok(found) => {
                    if found != node && self.nodes.at(found).parent != node {
                        left.push(self.position(node));
                    }
                    node = found;
                }
                Err(step) => {
                    self.refuse(step, keys.len() - at, sealed);
                    break;
                }
            }
            self.hold(node, at, blocks, sealed);
            reaches = reaches && reach.goes_on(self, node);
        }
        sealed.blocks = reach.best;
        let last = self.position(node);
        for Position { node, generation } in left {
            if self.nodes.is_live(node, generation) {
                self.prune(node);
            }
        }
        self.end(if self.nodes.is_live(last.node, last.generation) { node } else { NO_NODE }, sealed);
        Ok(())
    }

    /// A block's content is gone: it is not found from now on. Returns whether it was.
    pub fn forget(&mut self, group: usize, block: u32) -> bool {
        let Some(node) = self.node_of(group, block) else { return false };
        let blocks = &mut self.groups[group];
        blocks.nodes[block as usize] = NO_NODE;
        blocks.sealed -= 1;
        self.nodes.set_block(node, group, NO_BLOCK);
        self.stats.removed += 1;
        if self.events.wanted() {
            let key = self.name_of(node);
            self.events.push(group, EventKind::Removed { key });
        }
        self.prune(node);
        self.check_in_debug();
        true
    }

    /// Whether what a sealed block holds may become another block's.
    pub(super) fn check_renumber(&self, group: usize, from: u32, to: u32) -> Result<(), PrefixError> {
        let groups = self.groups.len();
        let known = self.groups.get(group).ok_or(PrefixError::UnknownGroup { group, groups })?;
        let blocks = self.options.groups[group].blocks;
        if let Some(block) = [from, to].into_iter().find(|block| *block >= blocks) {
            return Err(PrefixError::UnknownBlock { group, block, blocks });
        }
        if known.nodes[from as usize] == NO_NODE {
            return Err(PrefixError::BlockState { group, block: from, is: "not sealed", needed: "sealed" });
        }
        if known.nodes[to as usize] != NO_NODE {
            return Err(PrefixError::BlockState { group, block: to, is: "sealed", needed: "not sealed" });
        }
        Ok(())
    }

    /// What `from` holds was moved to `to`, which was checked.
    pub(super) fn renumber(&mut self, group: usize, from: u32, to: u32) {
        let known = &mut self.groups[group].nodes;
        let node = std::mem::replace(&mut known[from as usize], NO_NODE);
        known[to as usize] = node;
        self.nodes.set_block(node, group, to);
        self.check_in_debug();
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for blocks in &mut self.groups {
            blocks.nodes.fill(NO_NODE);
            self.stats.removed += u64::from(std::mem::take(&mut blocks.sealed));
        }
        for node in self.nodes.iter().collect::<Vec<_>>() {
            for group in 0..self.groups.len() {
                self.nodes.set_block(node, group, NO_BLOCK);
            }
        }
        // Children have higher depths than their parents.
        let mut all: Vec<u32> = self.nodes.iter().collect();
        all.sort_unstable_by_key(|node| std::cmp::Reverse(self.nodes.at(*node).depth));
        for node in all {
            self.nodes.remove(node);
        }
        self.by_key.clear();
        self.roots = Default::default();
        self.salts.clear();
        self.events.push(0, EventKind::Cleared);
        self.check_in_debug();
    }

    /// The node of a sealed block.
    pub(super) fn node_of(&self, group: usize, block: u32) -> Option<u32> {
        let node = *self.groups.get(group)?.nodes.get(block as usize)?;
        (node != NO_NODE).then_some(node)
    }

    pub(super) fn position(&self, node: u32) -> Position {
        Position { node, generation: self.nodes.at(node).generation }
    }

    pub(super) fn start_node(&self, start: Start<'_>, kind: Kind) -> Result<Option<u32>, PrefixError> {
        match start {
            Start::Salt(salt) => Ok(self.roots[kind as usize].get(salt).copied()),
            Start::After(Position { node, generation }) if self.nodes.is_live(node, generation) => {
                Ok(Some(node))
            }
            Start::After(_) => Err(PrefixError::StalePosition),
        }
    }

    /// The child of `parent` that holds these tokens: the one last found without hashing, another by its key.
    pub(super) fn step(&mut self, parent: u32, tokens: &[u32]) -> Step {
        let above = self.nodes.at(parent);
        let first = above.first_child;
        if first != NO_NODE && self.nodes.has_tokens(first, tokens) {
            return Step::Node(first);
        }
        let key = block_key(self.options.seed, above.key, tokens, &mut self.scratch) & self.key_mask;
        match self.find_key(key) {
            None => Step::Missing(key),
            Some(node) if self.nodes.at(node).parent == parent && self.nodes.has_tokens(node, tokens) => {
                self.nodes.bring_first(node);
                Step::Node(node)
            }
            Some(_) => Step::Collision,
        }
    }

    /// A new child of `parent` with these tokens, which has none with them yet.
    fn grow(&mut self, parent: u32, tokens: &[u32]) -> Step {
        let above = self.nodes.at(parent).key;
        let key = block_key(self.options.seed, above, tokens, &mut self.scratch) & self.key_mask;
        if self.find_key(key).is_some() {
            return Step::Collision;
        }
        if self.nodes.len() >= self.nodes_max {
            return Step::Missing(key);
        }
        let child = self.nodes.insert(key, parent, Content::Tokens(tokens));
        self.by_key.insert(key, child);
        Step::Node(child)
    }

    fn find_key(&self, key: u128) -> Option<u32> {
        self.by_key.get(key, |node| self.nodes.at(node).key)
    }

    pub(super) fn step_by_key(&mut self, root: u32, bytes: &[u8]) -> Step {
        let above = self.nodes.at(root).key;
        let key = engine_key(self.options.seed, above, bytes, &mut self.scratch) & self.key_mask;
        match self.find_key(key) {
            None => Step::Missing(key),
            Some(node) if self.nodes.at(node).root == root && self.nodes.has_engine_key(node, bytes) => {
                Step::Node(node)
            }
            Some(_) => Step::Collision,
        }
    }

    fn new_root(&mut self, kind: Kind, salt: &[u8]) -> u32 {
        let root = self.nodes.insert(root_key(self.options.seed, salt), NO_NODE, Content::Root);
        self.roots[kind as usize].insert(salt.into(), root);
        self.salts.insert(root, (kind, salt.into()));
        root
    }

    /// The node of an engine's key, a new child of `parent` if there is none.
    fn node_by_key(&mut self, root: u32, parent: u32, bytes: &[u8]) -> Result<u32, Step> {
        match self.step_by_key(root, bytes) {
            Step::Node(found) => Ok(found),
            Step::Missing(key) if self.nodes.len() < self.nodes_max => {
                let child = self.nodes.insert(key, parent, Content::Engine(bytes));
                self.by_key.insert(key, child);
                Ok(child)
            }
            step => Err(step),
        }
    }

    fn name_of(&self, node: u32) -> BlockKey {
        let found = self.nodes.at(node);
        if found.engine_bytes == 0 {
            BlockKey::Tokens(found.key)
        } else {
            BlockKey::Engine(self.nodes.engine_key(node))
        }
    }

    fn check_lists(&self, blocks: &[&[u32]], full: usize) -> Result<(), PrefixError> {
        let groups = self.groups.len();
        if blocks.len() != groups {
            return Err(PrefixError::Groups { given: blocks.len(), groups });
        }
        match blocks.iter().position(|list| list.len() < full) {
            Some(group) => Err(PrefixError::Blocks { group, given: blocks[group].len(), full }),
            None => Ok(()),
        }
    }

    /// Every block given is free of content, or holds this content already; `path` has the nodes known so far.
    fn check_blocks(&mut self, blocks: &[&[u32]], full: usize) -> Result<(), PrefixError> {
        self.call = self.call.wrapping_add(1);
        for (group, list) in blocks.iter().enumerate() {
            let known = &mut self.groups[group];
            for (at, block) in list[..full].iter().enumerate().filter(|(_, block)| **block != NO_BLOCK) {
                let block = *block;
                let Some(node) = known.nodes.get(block as usize).copied() else {
                    let blocks = self.options.groups[group].blocks;
                    return Err(PrefixError::UnknownBlock { group, block, blocks });
                };
                let named = std::mem::replace(&mut known.named[block as usize], self.call);
                if named == self.call || (node != NO_NODE && self.path.get(at) != Some(&node)) {
                    return Err(PrefixError::SealedAlready { group, block });
                }
            }
        }
        Ok(())
    }

    /// Puts the blocks that were given for a node where the node has none.
    fn hold(&mut self, node: u32, at: usize, blocks: &[&[u32]], sealed: &mut Sealed) {
        for (group, list) in blocks.iter().enumerate() {
            let (given, kept) = (list[at], self.nodes.block(node, group));
            if given == NO_BLOCK || given == kept {
                continue;
            }
            if kept != NO_BLOCK {
                self.stats.duplicates += 1;
                sealed.duplicates.push(Duplicate { group, at, given, kept });
                continue;
            }
            self.nodes.set_block(node, group, given);
            let known = &mut self.groups[group];
            known.nodes[given as usize] = node;
            known.sealed += 1;
            self.stats.stored += 1;
            sealed.stored.push((group, given));
            if self.events.wanted() {
                let above = self.nodes.at(node).parent;
                let parent = (self.nodes.at(above).parent != NO_NODE).then(|| self.name_of(above));
                self.events.push(group, EventKind::Stored { key: self.name_of(node), parent });
            }
        }
    }

    fn refuse(&mut self, step: Step, blocks: usize, sealed: &mut Sealed) {
        sealed.refused = blocks;
        match step {
            Step::Collision => self.stats.collisions += 1,
            _ => self.stats.full += blocks as u64,
        }
    }

    /// Ends a call at `node`, the last in the tree.
    fn end(&mut self, node: u32, sealed: &mut Sealed) {
        // Only blocks that no group gave, or a refusal, leave a node that nothing needs.
        let last = self.prune(node);
        let is_root = last == NO_NODE || self.nodes.at(last).parent == NO_NODE;
        sealed.position = (!is_root).then(|| self.position(last));
        self.check_in_debug();
    }

    /// Frees a node that nobody needs, and its parents if they needed it only. Returns the first that stays.
    fn prune(&mut self, mut node: u32) -> u32 {
        while node != NO_NODE {
            let found = self.nodes.at(node);
            if found.resident > 0 || found.first_child != NO_NODE {
                return node;
            }
            let parent = found.parent;
            if parent == NO_NODE {
                if let Some((kind, salt)) = self.salts.remove(&node) {
                    self.roots[kind as usize].remove(&salt);
                }
            } else {
                self.by_key.remove(found.key, node);
            }
            self.nodes.remove(node);
            node = parent;
        }
        NO_NODE
    }

    fn check_in_debug(&self) {
        if cfg!(debug_assertions)
            && self.nodes.len() <= NODES_CHECKED_MAX
            && let Err(wrong) = self.check_invariants()
        {
            unreachable!("{wrong}");
        }
    }
}

/// A key of a length that is taken.
pub(super) fn check_key(bytes: &[u8]) -> Result<(), PrefixError> {
    if (1..=ENGINE_KEY_BYTES_MAX).contains(&bytes.len()) {
        Ok(())
    } else {
        Err(PrefixError::KeyLength { bytes: bytes.len(), max: ENGINE_KEY_BYTES_MAX })
    }
}
