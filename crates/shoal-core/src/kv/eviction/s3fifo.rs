//! S3-FIFO: a small queue for what is new, a main queue for what was found again, and a memory of what left the small one.
//!
//! Juncheng Yang, Yazhuo Zhang, Ziyue Qiu, Yao Yue, K. V. Rashmi: "FIFO queues are all you need for cache eviction",
//! SOSP 2023. Most blocks are never found again (the tails of one-off prompts): they pass through a tenth of the cache
//! and leave the rest to what is. Two things differ here. A block in use is in no queue, because it cannot be a victim;
//! it comes back to the end of the one it left, counted one hit richer. And the cache has no fixed size: the small
//! queue's tenth is a tenth of what is cached at the moment.

use std::collections::{HashMap, VecDeque};

use super::list::{Links, List};
use super::{About, EvictionPolicy};

/// Hits counted at most; how often a block of the main queue may come round again.
const HITS_MAX: u8 = 3;
/// Hits with which a block leaves the small queue for the main one.
const HITS_TO_MAIN: u8 = 2;
/// The small queue's part of what is cached: one in this many.
const SMALL_PART: u32 = 10;
/// Evicted contents remembered at least.
const GHOSTS_MIN: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    Small,
    Main,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    key: u64,
    queue: Queue,
    hits: u8,
    /// Whether the policy has heard of this content.
    known: bool,
    cached: bool,
}

/// Three queues.
#[derive(Clone, Debug)]
pub struct S3Fifo {
    links: Links,
    small: List,
    main: List,
    blocks: Vec<Block>,
    ghosts: VecDeque<(u64, u64)>,
    ghost_of: HashMap<u64, u64>,
    ghosts_made: u64,
}

impl S3Fifo {
    /// For blocks with ids below `blocks`.
    #[must_use]
    pub fn new(blocks: u32) -> Self {
        let none = Block { key: 0, queue: Queue::Small, hits: 0, known: false, cached: false };
        Self {
            links: Links::new(blocks),
            small: List::EMPTY,
            main: List::EMPTY,
            blocks: vec![none; blocks as usize],
            ghosts: VecDeque::new(),
            ghost_of: HashMap::new(),
            ghosts_made: 0,
        }
    }

    fn leave(&mut self, block: u32) -> Option<&mut Block> {
        let state = self.blocks.get_mut(block as usize).filter(|state| state.known)?;
        if std::mem::take(&mut state.cached) {
            let list = if state.queue == Queue::Small { &mut self.small } else { &mut self.main };
            self.links.remove(list, block);
        }
        Some(state)
    }

    fn remember(&mut self, key: u64) {
        self.ghosts_made += 1;
        self.ghosts.push_back((key, self.ghosts_made));
        self.ghost_of.insert(key, self.ghosts_made);
        let max = (self.main.len as usize).max(GHOSTS_MIN);
        while self.ghosts.len() > max {
            if let Some((key, made)) = self.ghosts.pop_front()
                && self.ghost_of.get(&key) == Some(&made)
            {
                self.ghost_of.remove(&key);
            }
        }
    }

    /// Sends the first of a queue to the end of the main one.
    fn move_to_main(&mut self, from: Queue, block: u32, hits: u8) {
        let list = if from == Queue::Small { &mut self.small } else { &mut self.main };
        self.links.remove(list, block);
        self.links.push_back(&mut self.main, block);
        let state = &mut self.blocks[block as usize];
        state.queue = Queue::Main;
        state.hits = hits;
    }
}

impl EvictionPolicy for S3Fifo {
    fn cached(&mut self, block: u32, about: &About) {
        let Some(state) = self.blocks.get_mut(block as usize) else { return };
        if state.cached {
            return;
        }
        if !state.known {
            let back = self.ghost_of.remove(&about.key).is_some();
            let queue = if back { Queue::Main } else { Queue::Small };
            *state = Block { key: about.key, queue, hits: 0, known: true, cached: false };
        }
        state.cached = true;
        if about.reachable {
            let list = if state.queue == Queue::Small { &mut self.small } else { &mut self.main };
            self.links.push_back(list, block);
        } else {
            state.queue = Queue::Small;
            state.hits = 0;
            self.links.push_front(&mut self.small, block);
        }
    }

    fn used(&mut self, block: u32) {
        if let Some(state) = self.leave(block) {
            state.hits = (state.hits + 1).min(HITS_MAX);
        }
    }

    fn gone(&mut self, block: u32) {
        if let Some(state) = self.leave(block) {
            state.known = false;
            let (key, queue) = (state.key, state.queue);
            if queue == Queue::Small {
                self.remember(key);
            }
        }
    }

    fn renumbered(&mut self, from: u32, to: u32) {
        let both = self.blocks.get(from as usize).copied().zip(self.blocks.get(to as usize).copied());
        let Some((state, Block { known: false, .. })) = both.filter(|both| both.0.known) else { return };
        if state.cached {
            let list = if state.queue == Queue::Small { &mut self.small } else { &mut self.main };
            self.links.replace(list, from, to);
        }
        self.blocks.swap(from as usize, to as usize);
    }

    fn victim(&mut self) -> Option<u32> {
        // Each round moves a block and takes hits from it that a use has paid for.
        loop {
            let all = self.small.len + self.main.len;
            let from_small = self.small.len > 0 && (self.main.len == 0 || self.small.len >= all / SMALL_PART);
            let block = if from_small { self.small.first() } else { self.main.first() }?;
            let hits = self.blocks[block as usize].hits;
            if from_small && hits >= HITS_TO_MAIN {
                self.move_to_main(Queue::Small, block, 0);
            } else if !from_small && hits > 0 {
                self.move_to_main(Queue::Main, block, hits - 1);
            } else {
                return Some(block);
            }
        }
    }

    fn weight(&self, block: u32) -> u64 {
        self.blocks.get(block as usize).map_or(1, |state| {
            1 + u64::from(state.hits) + if state.queue == Queue::Main { u64::from(HITS_TO_MAIN) } else { 0 }
        })
    }

    fn loss(&self, _cached: u32, weight: u64) -> u64 {
        weight
    }

    fn check_invariants(&self) -> Result<(), String> {
        for (queue, list) in [(Queue::Small, &self.small), (Queue::Main, &self.main)] {
            let listed: Vec<u32> = self.links.iter(list).collect();
            let is = |state: &&Block| state.cached && state.queue == queue;
            let cached = self.blocks.iter().filter(is).count();
            let known = listed.iter().all(|block| is(&&self.blocks[*block as usize]));
            if !known || listed.len() != cached || list.len as usize != cached {
                return Err(format!("{queue:?}: {} blocks listed, {cached} cached", listed.len()));
            }
        }
        if self.blocks.iter().any(|state| state.cached && !state.known) {
            return Err("a block is cached that the policy does not know".into());
        }
        let live = self.ghosts.iter().filter(|(key, made)| self.ghost_of.get(key) == Some(made)).count();
        if live != self.ghost_of.len() {
            return Err(format!("{} ghosts found, {live} queued", self.ghost_of.len()));
        }
        Ok(())
    }
}
