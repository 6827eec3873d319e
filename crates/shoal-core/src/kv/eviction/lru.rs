//! Least recently used: the plain policy, and the measure of the others.
//!
//! A sequence that is given up enters from its end, and who uses a block uses those before it too, so blocks leave the
//! list from the ends of sequences inwards.

use super::list::{Links, List};
use super::{About, EvictionPolicy};

/// Least recently used first.
#[derive(Clone, Debug)]
pub struct Lru {
    links: Links,
    list: List,
    cached: Vec<bool>,
}

impl Lru {
    /// For blocks with ids below `blocks`.
    #[must_use]
    pub fn new(blocks: u32) -> Self {
        Self { links: Links::new(blocks), list: List::EMPTY, cached: vec![false; blocks as usize] }
    }

    fn leave(&mut self, block: u32) {
        if let Some(cached) = self.cached.get_mut(block as usize)
            && std::mem::take(cached)
        {
            self.links.remove(&mut self.list, block);
        }
    }
}

impl EvictionPolicy for Lru {
    fn cached(&mut self, block: u32, about: &About) {
        let Some(cached) = self.cached.get_mut(block as usize) else { return };
        if std::mem::replace(cached, true) {
            return;
        }
        if about.reachable {
            self.links.push_back(&mut self.list, block);
        } else {
            self.links.push_front(&mut self.list, block);
        }
    }

    fn used(&mut self, block: u32) {
        self.leave(block);
    }

    fn gone(&mut self, block: u32) {
        self.leave(block);
    }

    fn renumbered(&mut self, from: u32, to: u32) {
        let both = self.cached.get(from as usize).copied().zip(self.cached.get(to as usize).copied());
        if both == Some((true, false)) {
            self.links.replace(&mut self.list, from, to);
            self.cached.swap(from as usize, to as usize);
        }
    }

    fn victim(&mut self) -> Option<u32> {
        self.list.first()
    }

    fn weight(&self, _block: u32) -> u64 {
        1
    }

    fn loss(&self, cached: u32, _weight: u64) -> u64 {
        u64::from(cached)
    }

    fn check_invariants(&self) -> Result<(), String> {
        let listed: Vec<u32> = self.links.iter(&self.list).collect();
        let cached = self.cached.iter().filter(|cached| **cached).count();
        let known = listed.iter().all(|block| self.cached[*block as usize]);
        if !known || listed.len() != cached || self.list.len as usize != cached {
            return Err(format!("{} blocks listed, {cached} cached", listed.len()));
        }
        Ok(())
    }
}
