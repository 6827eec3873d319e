//! Random histories of each eviction policy against a plain model of what its source says.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;
use shoal_core::kv::eviction::{About, CostModel, EvictionKind, Evictor, ExtentSpan};

const BLOCKS: u32 = 12;

/// What the policies promise, in the plainest code.
trait Model {
    fn cached(&mut self, block: u32, about: &About);
    fn used(&mut self, block: u32);
    fn gone(&mut self, block: u32);
    fn victim(&mut self) -> Option<u32>;
}

#[derive(Default)]
struct PlainLru(VecDeque<u32>);

impl Model for PlainLru {
    fn cached(&mut self, block: u32, about: &About) {
        if about.reachable {
            self.0.push_back(block);
        } else {
            self.0.push_front(block);
        }
    }
    fn used(&mut self, block: u32) {
        self.0.retain(|other| *other != block);
    }
    fn gone(&mut self, block: u32) {
        self.used(block);
    }
    fn victim(&mut self) -> Option<u32> {
        self.0.front().copied()
    }
}

#[derive(Default)]
struct PlainS3Fifo {
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    ghosts: VecDeque<u64>,
    /// (key, hits, in main) of every block that was heard of.
    known: BTreeMap<u32, (u64, u8, bool)>,
}

impl PlainS3Fifo {
    fn leave(&mut self, block: u32) {
        self.small.retain(|other| *other != block);
        self.main.retain(|other| *other != block);
    }
}

impl Model for PlainS3Fifo {
    fn cached(&mut self, block: u32, about: &About) {
        let ghosts = &mut self.ghosts;
        let state = self.known.entry(block).or_insert_with(|| {
            let back = ghosts.contains(&about.key);
            ghosts.retain(|key| *key != about.key);
            (about.key, 0, back)
        });
        if !about.reachable {
            (state.1, state.2) = (0, false);
            self.small.push_front(block);
        } else if state.2 {
            self.main.push_back(block);
        } else {
            self.small.push_back(block);
        }
    }
    fn used(&mut self, block: u32) {
        self.leave(block);
        if let Some(state) = self.known.get_mut(&block) {
            state.1 = (state.1 + 1).min(3);
        }
    }
    fn gone(&mut self, block: u32) {
        self.leave(block);
        if let Some((key, _, false)) = self.known.remove(&block) {
            self.ghosts.retain(|other| *other != key);
            self.ghosts.push_back(key);
        }
    }
    fn victim(&mut self) -> Option<u32> {
        loop {
            let tenth = (self.small.len() + self.main.len()) / 10;
            if !self.small.is_empty() && (self.main.is_empty() || self.small.len() >= tenth) {
                let block = self.small[0];
                let state = self.known.get_mut(&block)?;
                if state.1 < 2 {
                    return Some(block);
                }
                (state.1, state.2) = (0, true);
                self.small.pop_front();
                self.main.push_back(block);
            } else {
                let block = *self.main.front()?;
                let state = self.known.get_mut(&block)?;
                if state.1 == 0 {
                    return Some(block);
                }
                state.1 -= 1;
                self.main.rotate_left(1);
            }
        }
    }
}

#[derive(Default)]
struct PlainCost {
    /// (priority, when cached) of cached blocks.
    queue: BTreeMap<u32, (u64, u64)>,
    hits: BTreeMap<u32, u64>,
    floor: u64,
    clock: u64,
    equal: u64,
}

impl Model for PlainCost {
    fn cached(&mut self, block: u32, about: &About) {
        self.clock += 1;
        let hits = *self.hits.entry(block).or_insert(0);
        let worth = ((16 + u64::from(about.tokens) * 16 / self.equal) * (hits + 1)).min(1023);
        let outlives = about.successor.and_then(|next| self.queue.get(&next)).map_or(0, |next| next.0);
        let priority = if about.reachable { (self.floor + worth).max(outlives) } else { self.floor };
        self.queue.insert(block, (priority, self.clock));
    }
    fn used(&mut self, block: u32) {
        self.queue.remove(&block);
        if let Some(hits) = self.hits.get_mut(&block) {
            *hits = (*hits + 1).min(15);
        }
    }
    fn gone(&mut self, block: u32) {
        self.queue.remove(&block);
        self.hits.remove(&block);
    }
    fn victim(&mut self) -> Option<u32> {
        let (block, place) = self.queue.iter().min_by_key(|(_, place)| **place)?;
        self.floor = place.0;
        Some(*block)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Cached { block: u32, key: u64, tokens: u32, reachable: bool, successor: Option<u32> },
    Used(u32),
    Gone(u32),
    Evict,
    Renumber(u32, u32),
    Allocated { extent: u32, blocks: u32 },
}

fn op() -> impl Strategy<Value = Op> {
    let block = || 0..BLOCKS;
    prop_oneof![
        6 => (block(), 0_u64..20, 0_u32..4000, 0_u8..8, proptest::option::of(block())).prop_map(
            |(block, key, tokens, reachable, successor)| Op::Cached { block, key, tokens, reachable: reachable > 0, successor }
        ),
        4 => block().prop_map(Op::Used),
        1 => block().prop_map(Op::Gone),
        3 => Just(Op::Evict),
        1 => (block(), block()).prop_map(|(from, to)| Op::Renumber(from, to)),
        2 => (0_u32..4, 0_u32..5).prop_map(|(extent, blocks)| Op::Allocated { extent, blocks }),
    ]
}

fn span(block: u32) -> ExtentSpan {
    ExtentSpan { first: block / 4, last: block / 4 + u32::from(block % 4 == 3) }
}

/// Renaming in the model is renaming in the history: ids go through this map.
struct Names(Vec<u32>);

fn agrees(kind: EvictionKind, model: &mut dyn Model, ops: &[Op]) -> Result<(), TestCaseError> {
    let mut evictor = Evictor::new(kind, BLOCKS);
    let mut cached = [false; BLOCKS as usize];
    let mut known = [false; BLOCKS as usize];
    let mut allocated = [0_u32; 5];
    let mut names = Names((0..BLOCKS).collect());
    for op in ops {
        match *op {
            Op::Cached { block, key, tokens, reachable, successor } if !cached[block as usize] => {
                let about = About { key, tokens, reachable, successor };
                evictor.cached(block, span(block), &about);
                let successor = successor.map(|next| names.0[next as usize]);
                model.cached(names.0[block as usize], &About { successor, ..about });
                cached[block as usize] = true;
                known[block as usize] = true;
            }
            Op::Used(block) if cached[block as usize] => {
                evictor.used(block);
                model.used(names.0[block as usize]);
                cached[block as usize] = false;
            }
            Op::Gone(block) => {
                evictor.gone(block);
                model.gone(names.0[block as usize]);
                cached[block as usize] = false;
                known[block as usize] = false;
            }
            Op::Evict => {
                let victim = evictor.victim();
                prop_assert_eq!(victim.map(|block| names.0[block as usize]), model.victim());
                if let Some(block) = victim {
                    prop_assert!(cached[block as usize]);
                    evictor.gone(block);
                    model.gone(names.0[block as usize]);
                    cached[block as usize] = false;
                    known[block as usize] = false;
                }
            }
            Op::Renumber(from, to) if known[from as usize] && !known[to as usize] => {
                evictor.renumber(from, to, span(to));
                names.0.swap(from as usize, to as usize);
                cached.swap(from as usize, to as usize);
                known.swap(from as usize, to as usize);
            }
            Op::Cached { .. } | Op::Used(_) | Op::Renumber(..) => {}
            Op::Allocated { extent, blocks } => {
                evictor.set_allocated(extent, blocks);
                allocated[extent as usize] = blocks;
            }
        }
        evictor.check_invariants().map_err(TestCaseError::fail)?;
        prop_assert_eq!(evictor.cached_count() as usize, cached.iter().filter(|is| **is).count());
        let drainable: Vec<u32> = (0..5)
            .filter(|extent| {
                let inside = (0..BLOCKS).filter(|block| cached[*block as usize]);
                let inside =
                    inside.filter(|block| (span(*block).first..=span(*block).last).contains(extent)).count();
                inside > 0 && inside >= allocated[*extent as usize] as usize
            })
            .collect();
        prop_assert_eq!(evictor.drainable_extents() as usize, drainable.len());
        let victim = evictor.victim_extent();
        prop_assert_eq!(victim.is_some(), !drainable.is_empty());
        prop_assert!(victim.is_none_or(|extent| drainable.contains(&extent)));
    }
    Ok(())
}

proptest! {
    #[test]
    fn lru_agrees(ops in proptest::collection::vec(op(), 1..200)) {
        agrees(EvictionKind::Lru, &mut PlainLru::default(), &ops)?;
    }

    #[test]
    fn s3fifo_agrees(ops in proptest::collection::vec(op(), 1..200)) {
        agrees(EvictionKind::S3Fifo, &mut PlainS3Fifo::default(), &ops)?;
    }

    #[test]
    fn cost_aware_agrees(ops in proptest::collection::vec(op(), 1..200)) {
        let mut model = PlainCost { equal: 1000, ..PlainCost::default() };
        agrees(EvictionKind::CostAware(CostModel { attention_tokens_equal: 1000 }), &mut model, &ops)?;
    }
}

fn evicted(evictor: &mut Evictor, count: usize) -> Vec<u32> {
    let next = |evictor: &mut Evictor| {
        let block = evictor.victim()?;
        evictor.gone(block);
        Some(block)
    };
    std::iter::from_fn(|| next(evictor)).take(count).collect()
}

#[test]
fn a_scan_does_not_wash_out_what_is_found_again() {
    // Ten blocks found three times over, then a hundred that nobody asks for again, ten at a time.
    let kept = |kind| {
        let mut evictor = Evictor::new(kind, 20);
        for _ in 0..4 {
            for block in 0..10 {
                evictor.used(block);
                evictor.cached(block, ExtentSpan::one(0), &About::new(u64::from(block), 16));
            }
        }
        let mut content: Vec<u64> = (0..20).collect();
        for key in (100..200).step_by(10) {
            let free: Vec<u32> = (0..20).filter(|block| !evictor.is_cached(*block)).collect();
            assert_eq!(free.len(), 10);
            for (block, key) in free.iter().zip(key..) {
                content[*block as usize] = key;
                evictor.cached(*block, ExtentSpan::one(0), &About::new(key, 16));
            }
            evicted(&mut evictor, 10);
        }
        (0..20).filter(|block| evictor.is_cached(*block) && content[*block as usize] < 10).count()
    };
    assert_eq!(kept(EvictionKind::Lru), 0);
    assert_eq!(kept(EvictionKind::S3Fifo), 10);
}

#[test]
fn what_costs_more_stays_longer() {
    let mut evictor = Evictor::new(EvictionKind::CostAware(CostModel { attention_tokens_equal: 1000 }), 8);
    for (block, tokens) in [(0, 5000), (1, 100), (2, 3000)] {
        evictor.cached(block, ExtentSpan::one(0), &About::new(u64::from(block), tokens));
    }
    assert_eq!(evicted(&mut evictor, 3), [1, 2, 0]);
}

#[test]
fn of_the_coldest_extents_the_one_with_fewest_blocks_goes() {
    let mut evictor = Evictor::new(EvictionKind::Lru, 64);
    // Extents 0 to 11, given up in this order; three of them are compared.
    let held = [8, 1, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1];
    let mut block = 0;
    for (extent, count) in (0..).zip(held) {
        for _ in 0..count {
            evictor.cached(block, ExtentSpan::one(extent), &About::new(u64::from(block), 16));
            block += 1;
        }
        evictor.set_allocated(extent, count);
    }
    assert_eq!(evictor.victim_extent(), Some(1));
    evictor.set_allocated(1, 2);
    assert_eq!(evictor.victim_extent(), Some(0), "somebody owns a block of extent 1, and extent 3 is hotter");
    evictor.used(0);
    assert_eq!(evictor.victim_extent(), Some(3), "somebody owns a block of extent 0");
    evictor.cached(0, ExtentSpan::one(0), &About::new(0, 16));
    assert_eq!(evictor.victim_extent(), Some(3), "extent 0 is the hottest now");
}
