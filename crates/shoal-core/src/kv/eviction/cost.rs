//! Cost-aware: a block is worth its hits times what it costs to compute again, and ages by what has been evicted since.
//!
//! Greedy-Dual-Size-Frequency: Ludmila Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency
//! caching policy", HP Laboratories 1998, after Pei Cao and Sandy Irani, "Cost-aware WWW proxy caching algorithms",
//! USITS 1997. A block's priority when it becomes cached is `L + hits * cost / size`; the lowest goes, and `L` becomes
//! its priority, so that what is not used any more is overtaken. The size is the same for all blocks of a group and drops
//! out. The cost is what prefill pays for a block: one part for weights, the same everywhere, and one for attention, which
//! grows with the tokens before it (Pan et al., "Marconi: prefix caching for the era of hybrid LLMs", `MLSys` 2025, weighs
//! saved operations against bytes in the same way).
//!
//! Priorities are whole numbers at most [`SPAN`] above `L`, so a ring of lists, one a priority, takes the place of the
//! heap: O(1), and least recently used among equals.

use super::list::{Links, List};
use super::{About, EvictionPolicy};

/// Priorities that can occur at one time.
const SPAN: u64 = 1024;
/// A block's cost where attention is free, so that fractions can be told apart.
const COST_UNIT: u64 = 16;
/// Hits counted at most.
const HITS_MAX: u32 = 15;
const WORDS: usize = (SPAN / 64) as usize;
const _: () = assert!(SPAN.is_multiple_of(64));

/// What it costs to compute a block again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CostModel {
    /// How many tokens must come before a token so that attention to them costs as much as all the rest: about
    /// parameters / (2 x layers x hidden size); some 30,000 for an 8B model.
    pub attention_tokens_equal: u32,
}

impl Default for CostModel {
    fn default() -> Self {
        Self { attention_tokens_equal: 30_000 }
    }
}

#[derive(Clone, Copy, Debug)]
struct Block {
    priority: u64,
    hits: u32,
    known: bool,
    cached: bool,
}

/// Least worth keeping first.
#[derive(Clone, Debug)]
pub struct CostAware {
    model: CostModel,
    links: Links,
    /// By priority, modulo [`SPAN`].
    lists: Vec<List>,
    /// A bit for each list that is not empty.
    filled: [u64; WORDS],
    blocks: Vec<Block>,
    /// No cached block's priority is below it: L.
    floor: u64,
}

impl CostAware {
    /// For blocks with ids below `blocks`.
    #[must_use]
    pub fn new(blocks: u32, model: CostModel) -> Self {
        let none = Block { priority: 0, hits: 0, known: false, cached: false };
        Self {
            model,
            links: Links::new(blocks),
            lists: vec![List::EMPTY; place(SPAN - 1) + 1],
            filled: [0; WORDS],
            blocks: vec![none; blocks as usize],
            floor: 0,
        }
    }

    fn leave(&mut self, block: u32) -> Option<&mut Block> {
        let state = self.blocks.get_mut(block as usize).filter(|state| state.known)?;
        if std::mem::take(&mut state.cached) {
            let at = place(state.priority);
            self.links.remove(&mut self.lists[at], block);
            if self.lists[at].len == 0 {
                self.filled[at / 64] &= !(1 << (at % 64));
            }
        }
        Some(state)
    }

    /// The first list that is not empty, from the floor upwards and round.
    fn lowest(&self) -> Option<usize> {
        let start = place(self.floor);
        let (word, bit) = (start / 64, start % 64);
        let above = self.filled[word] & (u64::MAX << bit);
        if above != 0 {
            return Some(word * 64 + above.trailing_zeros() as usize);
        }
        (1..=WORDS).map(|step| (word + step) % WORDS).find_map(|word| {
            let bits = self.filled[word];
            (bits != 0).then(|| word * 64 + bits.trailing_zeros() as usize)
        })
    }
}

/// Where a priority's list is.
const fn place(priority: u64) -> usize {
    (priority % SPAN) as usize
}

impl EvictionPolicy for CostAware {
    fn cached(&mut self, block: u32, about: &About) {
        let successor = about.successor.and_then(|next| self.blocks.get(next as usize));
        let outlives = successor.filter(|next| next.cached).map_or(0, |next| next.priority);
        let Some(state) = self.blocks.get_mut(block as usize) else { return };
        if state.cached {
            return;
        }
        if !state.known {
            *state = Block { priority: 0, hits: 0, known: true, cached: false };
        }
        let attention =
            u64::from(about.tokens) * COST_UNIT / u64::from(self.model.attention_tokens_equal.max(1));
        let worth = (COST_UNIT + attention).saturating_mul(u64::from(state.hits) + 1).min(SPAN - 1);
        state.priority = if about.reachable { (self.floor + worth).max(outlives) } else { self.floor };
        state.cached = true;
        let at = place(state.priority);
        self.links.push_back(&mut self.lists[at], block);
        self.filled[at / 64] |= 1 << (at % 64);
    }

    fn used(&mut self, block: u32) {
        if let Some(state) = self.leave(block) {
            state.hits = (state.hits + 1).min(HITS_MAX);
        }
    }

    fn gone(&mut self, block: u32) {
        if let Some(state) = self.leave(block) {
            state.known = false;
        }
    }

    fn renumbered(&mut self, from: u32, to: u32) {
        let both = self.blocks.get(from as usize).copied().zip(self.blocks.get(to as usize).copied());
        let Some((state, Block { known: false, .. })) = both.filter(|both| both.0.known) else { return };
        if state.cached {
            self.links.replace(&mut self.lists[place(state.priority)], from, to);
        }
        self.blocks.swap(from as usize, to as usize);
    }

    fn victim(&mut self) -> Option<u32> {
        let block = self.lists[self.lowest()?].first()?;
        // Raised when a victim is named: nothing cached is below it.
        self.floor = self.blocks[block as usize].priority;
        Some(block)
    }

    fn weight(&self, block: u32) -> u64 {
        self.blocks.get(block as usize).map_or(0, |state| state.priority)
    }

    fn loss(&self, cached: u32, weight: u64) -> u64 {
        weight.saturating_sub(self.floor.saturating_mul(u64::from(cached)))
    }

    fn check_invariants(&self) -> Result<(), String> {
        let mut listed = 0;
        for (at, list) in self.lists.iter().enumerate() {
            let mut count = 0;
            for block in self.links.iter(list) {
                let state = self.blocks[block as usize];
                count += 1;
                if !state.cached || !state.known || place(state.priority) != at {
                    return Err(format!("block {block} is in the list of priority {at}"));
                }
                if !(self.floor..self.floor + SPAN).contains(&state.priority) {
                    return Err(format!(
                        "block {block} has priority {}, floor {}",
                        state.priority, self.floor
                    ));
                }
            }
            if count != list.len || (count > 0) != (self.filled[at / 64] >> (at % 64) & 1 == 1) {
                return Err(format!("list {at} counts {}, has {count}", list.len));
            }
            listed += count as usize;
        }
        let cached = self.blocks.iter().filter(|state| state.cached).count();
        if listed != cached {
            return Err(format!("{listed} blocks listed, {cached} cached"));
        }
        Ok(())
    }
}
