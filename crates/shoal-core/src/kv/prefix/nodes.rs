//! The tree itself: nodes in an arena, children in lists, contents in one slab.
//!
//! Apart from what nodes mean ([`PrefixIndex`](super::PrefixIndex)): here are only links. A node's number is used again
//! after it was freed; its generation tells the two lives apart.

use super::{NO_BLOCK, NO_NODE};

/// One block of a sequence, or the root of a tenant.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) key: u128,
    /// [`NO_NODE`] for roots.
    pub(super) parent: u32,
    /// Newest or last found first.
    pub(super) first_child: u32,
    next: u32,
    previous: u32,
    /// The root of its tree; itself for roots.
    pub(super) root: u32,
    pub(super) generation: u32,
    /// Blocks before it and itself: 0 for roots.
    pub(super) depth: u32,
    /// Groups that hold a block here.
    pub(super) resident: u8,
    /// Bytes of the key that an engine brought; 0 for tokens.
    pub(super) engine_bytes: u8,
    pub(super) live: bool,
}

/// All nodes.
#[derive(Clone, Debug)]
pub(super) struct Nodes {
    list: Vec<Node>,
    free: Vec<u32>,
    /// `stride` words a node: its tokens, or the engine's key.
    contents: Vec<u32>,
    stride: usize,
    /// One block a group and node.
    blocks: Vec<u32>,
    groups: usize,
}

/// What a node is about.
#[derive(Clone, Copy, Debug)]
pub(super) enum Content<'a> {
    Root,
    Tokens(&'a [u32]),
    Engine(&'a [u8]),
}

impl Nodes {
    pub(super) const fn new(stride: usize, groups: usize) -> Self {
        Self { list: Vec::new(), free: Vec::new(), contents: Vec::new(), stride, blocks: Vec::new(), groups }
    }

    /// Nodes in use, roots included.
    pub(super) fn len(&self) -> usize {
        self.list.len() - self.free.len()
    }

    pub(super) fn at(&self, node: u32) -> &Node {
        &self.list[node as usize]
    }

    pub(super) fn at_mut(&mut self, node: u32) -> &mut Node {
        &mut self.list[node as usize]
    }

    pub(super) fn is_live(&self, node: u32, generation: u32) -> bool {
        self.list.get(node as usize).is_some_and(|found| found.live && found.generation == generation)
    }

    pub(super) fn block(&self, node: u32, group: usize) -> u32 {
        self.blocks[node as usize * self.groups + group]
    }

    pub(super) fn set_block(&mut self, node: u32, group: usize, block: u32) {
        let place = &mut self.blocks[node as usize * self.groups + group];
        let resident = &mut self.list[node as usize].resident;
        match (*place == NO_BLOCK, block == NO_BLOCK) {
            (true, false) => *resident += 1,
            (false, true) => *resident -= 1,
            _ => {}
        }
        *place = block;
    }

    pub(super) fn has_tokens(&self, node: u32, tokens: &[u32]) -> bool {
        let start = node as usize * self.stride;
        self.list[node as usize].engine_bytes == 0
            && self.contents.get(start..start + tokens.len()).is_some_and(|held| held == tokens)
    }

    pub(super) fn has_engine_key(&self, node: u32, bytes: &[u8]) -> bool {
        let start = node as usize * self.stride;
        usize::from(self.list[node as usize].engine_bytes) == bytes.len()
            && words(bytes).zip(&self.contents[start..]).all(|(word, held)| word == *held)
    }

    /// The bytes of the engine's key; empty for tokens.
    pub(super) fn engine_key(&self, node: u32) -> Box<[u8]> {
        let start = node as usize * self.stride;
        let bytes = usize::from(self.list[node as usize].engine_bytes);
        self.contents[start..start + bytes.div_ceil(4)]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .take(bytes)
            .collect()
    }

    /// A new node without blocks, the first child of `parent` (a root for [`NO_NODE`]).
    pub(super) fn insert(&mut self, key: u128, parent: u32, content: Content<'_>) -> u32 {
        let id = self.free.pop().unwrap_or_else(|| {
            let id = u32::try_from(self.list.len()).unwrap_or(NO_NODE);
            self.list.push(Node {
                key,
                parent,
                first_child: NO_NODE,
                next: NO_NODE,
                previous: NO_NODE,
                root: id,
                generation: 0,
                depth: 0,
                resident: 0,
                engine_bytes: 0,
                live: false,
            });
            self.contents.resize(self.contents.len() + self.stride, 0);
            self.blocks.resize(self.blocks.len() + self.groups, NO_BLOCK);
            id
        });
        let start = id as usize * self.stride;
        let engine_bytes = match content {
            Content::Root => 0,
            Content::Tokens(tokens) => {
                self.contents[start..start + tokens.len()].copy_from_slice(tokens);
                0
            }
            Content::Engine(bytes) => {
                for (word, place) in words(bytes).zip(&mut self.contents[start..]) {
                    *place = word;
                }
                u8::try_from(bytes.len()).unwrap_or(u8::MAX)
            }
        };
        let (root, depth) = if parent == NO_NODE {
            (id, 0)
        } else {
            let above = self.at(parent);
            (above.root, above.depth + 1)
        };
        let generation = self.at(id).generation;
        *self.at_mut(id) = Node {
            key,
            parent,
            first_child: NO_NODE,
            next: NO_NODE,
            previous: NO_NODE,
            root,
            generation,
            depth,
            resident: 0,
            engine_bytes,
            live: true,
        };
        if parent != NO_NODE {
            self.link_first(id, parent);
        }
        id
    }

    /// Frees a node without children and without blocks.
    pub(super) fn remove(&mut self, node: u32) {
        let found = self.at(node);
        debug_assert!(found.live && found.first_child == NO_NODE && found.resident == 0);
        if found.parent != NO_NODE {
            self.unlink(node);
        }
        let freed = self.at_mut(node);
        freed.live = false;
        freed.generation = freed.generation.wrapping_add(1);
        self.free.push(node);
    }

    /// Makes a child the first that is looked at.
    pub(super) fn bring_first(&mut self, child: u32) {
        let parent = self.at(child).parent;
        if parent != NO_NODE && self.at(parent).first_child != child {
            self.unlink(child);
            self.link_first(child, parent);
        }
    }

    pub(super) fn children(&self, node: u32) -> impl Iterator<Item = u32> + '_ {
        let first = self.at(node).first_child;
        std::iter::successors((first != NO_NODE).then_some(first), |child| {
            let next = self.at(*child).next;
            (next != NO_NODE).then_some(next)
        })
    }

    /// All nodes in use.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.list).filter(|(_, node)| node.live).map(|(id, _)| id)
    }

    fn link_first(&mut self, child: u32, parent: u32) {
        let second = std::mem::replace(&mut self.at_mut(parent).first_child, child);
        let first = self.at_mut(child);
        first.previous = NO_NODE;
        first.next = second;
        if second != NO_NODE {
            self.at_mut(second).previous = child;
        }
    }

    fn unlink(&mut self, child: u32) {
        let Node { parent, previous, next, .. } = *self.at(child);
        if previous == NO_NODE {
            self.at_mut(parent).first_child = next;
        } else {
            self.at_mut(previous).next = next;
        }
        if next != NO_NODE {
            self.at_mut(next).previous = previous;
        }
    }
}

/// Bytes as words, the last one filled up with zeros.
fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    })
}
