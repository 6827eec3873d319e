//! Random histories of the prefix index and the prefix cache against plain maps.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use shoal_core::kv::eviction::{CostModel, EvictionKind, ExtentSpan};
use shoal_core::kv::prefix::{
    BlockKey, EventKind, Found, GroupOptions, GroupRule, KeyChain, NO_BLOCK, PrefixCache, PrefixError,
    PrefixIndex, PrefixOptions, Sealed, Start,
};

const BLOCK_TOKENS: u32 = 2;
const BLOCKS: u32 = 24;
const EXTENT_BLOCKS: u32 = 5;

fn options(rules: &[GroupRule]) -> PrefixOptions {
    PrefixOptions {
        block_tokens: BLOCK_TOKENS,
        groups: rules.iter().map(|rule| GroupOptions { rule: *rule, blocks: BLOCKS }).collect(),
        seed: 3,
        events_max: 1 << 20,
        nodes_max: None,
    }
}

/// Content is a tenant and all tokens up to the end of the block.
type Content = (u8, Vec<u32>);

/// The plain model: what each group holds for each content.
#[derive(Clone, Debug, Default)]
struct Plain {
    rules: Vec<GroupRule>,
    held: BTreeMap<Content, Vec<Option<u32>>>,
}

impl Plain {
    fn content_of(&self, group: usize, block: u32) -> Option<Content> {
        self.held.iter().find(|(_, held)| held[group] == Some(block)).map(|(content, _)| content.clone())
    }

    fn forget(&mut self, group: usize, block: u32) -> bool {
        let Some(content) = self.content_of(group, block) else { return false };
        let held = self.held.get_mut(&content).expect("found just now");
        held[group] = None;
        if held.iter().all(Option::is_none) {
            self.held.remove(&content);
        }
        true
    }

    fn get(&self, salt: u8, tokens: &[u32], group: usize) -> Option<u32> {
        self.held.get(&(salt, tokens.to_vec())).and_then(|held| held[group])
    }

    /// By definition: the longest length at which every group has what it needs, looked at one by one.
    fn longest(&self, salt: u8, tokens: &[u32]) -> usize {
        self.longest_from(salt, tokens, 0)
    }

    /// The same where everything before `from` counts as there.
    fn longest_from(&self, salt: u8, tokens: &[u32], from: usize) -> usize {
        let per = BLOCK_TOKENS as usize;
        let has = |group, block: usize| self.get(salt, &tokens[..block * per], group).is_some();
        (from..=tokens.len() / per)
            .rev()
            .find(|length| {
                self.rules.iter().enumerate().all(|(group, rule)| {
                    let needed = rule.blocks_needed(BLOCK_TOKENS).map_or(*length, |needed| needed as usize);
                    (length.saturating_sub(needed).max(from) + 1..=*length).all(|block| has(group, block))
                })
            })
            .unwrap_or(from)
    }

    fn check_found(&self, salt: u8, tokens: &[u32], found: &Found) -> Result<(), TestCaseError> {
        let per = BLOCK_TOKENS as usize;
        // Without a group that needs everything the walk goes through holes; it ends where nothing at all follows.
        prop_assert_eq!(found.blocks, self.longest(salt, tokens), "{:?} {:?}", salt, tokens);
        prop_assert_eq!(found.tokens, found.blocks * per);
        for (group, part) in found.groups.iter().enumerate() {
            prop_assert_eq!(part.first + part.blocks.len(), found.blocks);
            for (at, block) in part.blocks.iter().enumerate() {
                let content = &tokens[..(part.first + at + 1) * per];
                prop_assert_eq!(Some(*block), self.get(salt, content, group));
            }
        }
        Ok(())
    }

    /// What the same history of events says is stored, by group and key.
    fn keys(&self) -> BTreeSet<(usize, u128)> {
        let key = |content: &Content| {
            *KeyChain::keys(3, &[content.0], &content.1, BLOCK_TOKENS).last().expect("no content is empty")
        };
        self.held
            .iter()
            .flat_map(|(content, held)| {
                held.iter()
                    .enumerate()
                    .filter(|(_, block)| block.is_some())
                    .map(move |(group, _)| (group, key(content)))
            })
            .collect()
    }
}

fn check_events(index: &PrefixIndex, plain: &Plain) -> Result<(), TestCaseError> {
    let mut known = BTreeSet::new();
    let (mut next, mut batch) = (0, index.events_since(0, 7));
    while !batch.events.is_empty() {
        prop_assert_eq!(batch.lost, 0);
        for event in &batch.events {
            prop_assert_eq!(event.sequence, next);
            next += 1;
            match &event.kind {
                EventKind::Stored { key: BlockKey::Tokens(key), .. } => {
                    prop_assert!(known.insert((event.group, *key)));
                }
                EventKind::Removed { key: BlockKey::Tokens(key) } => {
                    prop_assert!(known.remove(&(event.group, *key)));
                }
                EventKind::Cleared => known.clear(),
                other => prop_assert!(false, "{:?}", other),
            }
        }
        batch = index.events_since(next, 7);
    }
    prop_assert_eq!(known, plain.keys());
    Ok(())
}

fn sequence() -> impl Strategy<Value = (u8, Vec<u32>)> {
    // Few tokens, so that sequences share much.
    (0_u8..2, proptest::collection::vec(0_u32..2, 0..13))
}

#[derive(Clone, Debug)]
enum IndexOp {
    /// Seal with these blocks; `holes` has a bit for each block that is not given.
    Seal {
        group_blocks: [Vec<u32>; 2],
        sequence: (u8, Vec<u32>),
        holes: u8,
        from_found: bool,
    },
    Forget {
        group: usize,
        block: u32,
    },
    Find((u8, Vec<u32>)),
    Clear,
}

fn index_op() -> impl Strategy<Value = IndexOp> {
    let ids = || proptest::collection::vec(0..BLOCKS, 6);
    prop_oneof![
        6 => (ids(), ids(), sequence(), any::<u8>(), any::<u8>(), any::<bool>()).prop_map(
            |(first, second, sequence, holes, more, from_found)| IndexOp::Seal {
                group_blocks: [first, second], sequence, holes: holes & more, from_found
            }
        ),
        5 => (0_usize..2, 0..BLOCKS).prop_map(|(group, block)| IndexOp::Forget { group, block }),
        6 => sequence().prop_map(IndexOp::Find),
        1 => Just(IndexOp::Clear),
    ]
}

fn rules() -> impl Strategy<Value = [GroupRule; 2]> {
    let rule = || {
        prop_oneof![
            3 => Just(GroupRule::Full),
            2 => (1_u32..8).prop_map(|tokens| GroupRule::Window { tokens }),
            1 => Just(GroupRule::Last),
        ]
    };
    [rule(), rule()]
}

proptest! {
    #[test]
    fn index_agrees_with_plain_maps(rules in rules(), ops in proptest::collection::vec(index_op(), 1..80)) {
        let mut index = PrefixIndex::new(options(&rules)).expect("good options");
        let mut plain = Plain { rules: rules.to_vec(), held: BTreeMap::new() };
        let (mut sealed, mut found) = (Sealed::default(), Found::default());
        for op in ops {
            match op {
                IndexOp::Seal { mut group_blocks, sequence: (salt, tokens), holes, from_found } => {
                    let full = tokens.len() / BLOCK_TOKENS as usize;
                    for blocks in &mut group_blocks {
                        for (at, block) in blocks.iter_mut().enumerate() {
                            if holes >> at & 1 == 1 {
                                *block = NO_BLOCK;
                            }
                        }
                    }
                    // A part may begin where a search ended.
                    let mut skip = 0;
                    let mut start = Start::Salt(std::slice::from_ref(&salt));
                    if from_found {
                        index.find(&[salt], &tokens, &mut found);
                        if let Some(position) = found.position {
                            start = Start::After(position);
                            skip = found.blocks;
                        }
                    }
                    let lists: Vec<&[u32]> = group_blocks.iter().map(|blocks| &blocks[skip..]).collect();
                    let before = plain.clone();
                    let mut legal = true;
                    for (group, blocks) in group_blocks.iter().enumerate() {
                        let mut named = BTreeSet::new();
                        for at in skip..full {
                            let content = (salt, tokens[..(at + 1) * BLOCK_TOKENS as usize].to_vec());
                            if blocks[at] == NO_BLOCK {
                                continue;
                            }
                            let elsewhere = before.content_of(group, blocks[at]);
                            legal &= named.insert(blocks[at]) && elsewhere.is_none_or(|other| other == content);
                        }
                    }
                    let answer = index.seal(start, &tokens[skip * BLOCK_TOKENS as usize..], &lists, &mut sealed);
                    if legal {
                        prop_assert_eq!(answer, Ok(()));
                        let (mut stored, mut duplicates) = (Vec::new(), Vec::new());
                        for at in skip..full {
                            for (group, blocks) in group_blocks.iter().enumerate() {
                                let content = (salt, tokens[..(at + 1) * BLOCK_TOKENS as usize].to_vec());
                                let given = blocks[at];
                                if given == NO_BLOCK {
                                    continue;
                                }
                                let held = plain.held.entry(content).or_insert(vec![None; 2]);
                                match held[group] {
                                    None => { held[group] = Some(given); stored.push((group, given)); }
                                    Some(kept) if kept != given => duplicates.push((group, at - skip, given, kept)),
                                    Some(_) => {}
                                }
                            }
                        }
                        prop_assert_eq!(&sealed.stored, &stored);
                        let told: Vec<_> = sealed.duplicates.iter().map(|one| (one.group, one.at, one.given, one.kept)).collect();
                        prop_assert_eq!(told, duplicates);
                        let found = plain.longest_from(salt, &tokens, skip) - skip;
                        prop_assert_eq!((sealed.blocks, sealed.refused), (found, 0));
                    } else {
                        prop_assert!(matches!(answer, Err(PrefixError::SealedAlready { .. })), "{:?}", answer);
                    }
                }
                IndexOp::Forget { group, block } => {
                    prop_assert_eq!(index.forget(group, block), plain.forget(group, block));
                }
                IndexOp::Find((salt, tokens)) => {
                    index.find(&[salt], &tokens, &mut found);
                    plain.check_found(salt, &tokens, &found)?;
                }
                IndexOp::Clear => {
                    index.clear();
                    plain.held.clear();
                }
            }
            index.check_invariants().map_err(TestCaseError::fail)?;
            let held = plain.held.values().flatten().flatten().count();
            prop_assert_eq!((0..2).map(|group| index.sealed_count(group) as usize).sum::<usize>(), held);
            if held == 0 {
                prop_assert_eq!(index.node_count(), 0, "an empty index holds nodes");
            }
        }
        check_events(&index, &plain)?;
    }
}

#[derive(Clone, Debug)]
enum CacheOp {
    /// A sequence comes: takes what is found, allocates and seals the rest.
    Begin((u8, Vec<u32>)),
    /// A running sequence ends.
    End(usize),
    Evict {
        group: usize,
        count: u32,
    },
    EvictExtent {
        group: usize,
    },
    Forget {
        group: usize,
        block: u32,
    },
    Renumber {
        group: usize,
        from: u32,
        to: u32,
    },
    AwaitCopy {
        group: usize,
        block: u32,
        is_awaited: bool,
    },
}

fn cache_op() -> impl Strategy<Value = CacheOp> {
    prop_oneof![
        8 => sequence().prop_map(CacheOp::Begin),
        8 => any::<usize>().prop_map(CacheOp::End),
        3 => (0_usize..2, 1_u32..4).prop_map(|(group, count)| CacheOp::Evict { group, count }),
        2 => (0_usize..2).prop_map(|group| CacheOp::EvictExtent { group }),
        1 => (0_usize..2, 0..BLOCKS).prop_map(|(group, block)| CacheOp::Forget { group, block }),
        1 => (0_usize..2, 0..BLOCKS, 0..BLOCKS).prop_map(|(group, from, to)| CacheOp::Renumber { group, from, to }),
        6 => (0_usize..2, 0..BLOCKS, any::<bool>())
            .prop_map(|(group, block, is_awaited)| CacheOp::AwaitCopy { group, block, is_awaited }),
    ]
}

/// Blocks with owners, as a block manager keeps them.
struct World {
    cache: PrefixCache,
    plain: Plain,
    owners: [Vec<u32>; 2],
    running: Vec<[Vec<u32>; 2]>,
}

impl World {
    fn span(block: u32) -> ExtentSpan {
        // Every fifth block lies across an edge.
        let first = block / EXTENT_BLOCKS;
        ExtentSpan { first, last: first + u32::from(block % EXTENT_BLOCKS == EXTENT_BLOCKS - 1) }
    }

    fn is_cached(&self, group: usize, block: u32) -> bool {
        self.owners[group][block as usize] == 0 && self.plain.content_of(group, block).is_some()
    }

    fn is_free(&self, group: usize, block: u32) -> bool {
        self.owners[group][block as usize] == 0 && self.plain.content_of(group, block).is_none()
    }

    /// Whether a cached block of the group follows this one.
    fn is_followed(&self, group: usize, content: &Content) -> bool {
        self.plain.held.iter().any(|((salt, tokens), held)| {
            *salt == content.0
                && tokens.len() > content.1.len()
                && tokens.starts_with(&content.1)
                && held[group].is_some_and(|block| self.owners[group][block as usize] == 0)
                // Only with no hole between is it found by way of this block.
                && (content.1.len() + 2..tokens.len())
                    .step_by(2)
                    .all(|end| self.plain.get(*salt, &tokens[..end], group).is_some_and(|block| self.owners[group][block as usize] == 0))
        })
    }

    fn sync_extents(&mut self, group: usize) {
        for extent in 0..=BLOCKS / EXTENT_BLOCKS {
            let allocated = (0..BLOCKS)
                .filter(|block| (Self::span(*block).first..=Self::span(*block).last).contains(&extent))
                .filter(|block| !self.is_free(group, *block))
                .count();
            self.cache.set_allocated(group, extent, u32::try_from(allocated).expect("few"));
        }
    }

    fn took_out(&mut self, group: usize, evicted: &[u32]) -> Result<(), TestCaseError> {
        let ordered = self.plain.rules[group] == GroupRule::Full;
        for block in evicted {
            prop_assert!(self.is_cached(group, *block), "block {} was evicted and not cached", block);
            let content = self.plain.content_of(group, *block).expect("cached");
            prop_assert!(
                !ordered || !self.is_followed(group, &content),
                "block {} went before what follows it",
                block
            );
            self.plain.forget(group, *block);
        }
        Ok(())
    }

    fn begin(&mut self, salt: u8, tokens: &[u32]) -> Result<(), TestCaseError> {
        let full = tokens.len() / BLOCK_TOKENS as usize;
        let mut found = Found::default();
        self.cache.find(&[salt], tokens, &mut found);
        self.plain.check_found(salt, tokens, &found)?;
        let mut blocks = [Vec::new(), Vec::new()];
        for (group, part) in found.groups.iter().enumerate() {
            blocks[group] = vec![NO_BLOCK; part.first];
            for block in &part.blocks {
                blocks[group].push(*block);
                let cached = self.is_cached(group, *block);
                prop_assert_eq!(self.cache.is_cached(group, *block), cached);
                self.cache.used(group, *block);
                self.owners[group][*block as usize] += 1;
            }
        }
        for group in 0..2 {
            let free =
                |world: &Self| (0..BLOCKS).filter(|block| world.is_free(group, *block)).collect::<Vec<_>>();
            let missing = full - blocks[group].len();
            let mut ids = free(self);
            if ids.len() < missing {
                let mut evicted = Vec::new();
                let wanted = u32::try_from(missing - ids.len()).expect("few");
                let cached = (0..BLOCKS).filter(|block| self.is_cached(group, *block)).count();
                self.cache.evict(group, wanted, &mut evicted);
                prop_assert_eq!(evicted.len(), cached.min(wanted as usize));
                self.took_out(group, &evicted)?;
                ids = free(self);
            }
            if ids.len() < missing {
                // Memory is out: the sequence does not run.
                self.running.push(blocks);
                return self.end(self.running.len() - 1);
            }
            for block in &ids[..missing] {
                blocks[group].push(*block);
                self.owners[group][*block as usize] = 1;
            }
        }
        let mut sealed = Sealed::default();
        let lists = [blocks[0].as_slice(), blocks[1].as_slice()];
        self.cache
            .seal(Start::Salt(&[salt]), tokens, &lists, &mut sealed)
            .map_err(|error| TestCaseError::fail(error.to_string()))?;
        for at in 0..full {
            let held =
                self.plain.held.entry((salt, tokens[..(at + 1) * 2].to_vec())).or_insert(vec![None; 2]);
            for (group, list) in lists.iter().enumerate() {
                if held[group].is_none() && list[at] != NO_BLOCK {
                    held[group] = Some(list[at]);
                }
            }
        }
        self.plain.held.retain(|_, held| held.iter().any(Option::is_some));
        self.running.push(blocks);
        Ok(())
    }

    fn end(&mut self, at: usize) -> Result<(), TestCaseError> {
        let blocks = self.running.swap_remove(at);
        for (group, list) in blocks.iter().enumerate() {
            let mut without = Vec::new();
            for block in list.iter().filter(|block| **block != NO_BLOCK) {
                let owners = &mut self.owners[group][*block as usize];
                *owners -= 1;
                if *owners == 0 {
                    without.push(*block);
                }
            }
            self.cache.released(group, &without, Self::span);
            for block in without {
                prop_assert_eq!(self.cache.is_cached(group, block), self.is_cached(group, block));
            }
        }
        Ok(())
    }

    fn evict_extent(&mut self, group: usize) -> Result<(), TestCaseError> {
        let inside = |extent: u32| {
            (0..BLOCKS)
                .filter(move |block| (World::span(*block).first..=World::span(*block).last).contains(&extent))
        };
        let drainable: Vec<u32> = (0..=BLOCKS / EXTENT_BLOCKS)
            .filter(|extent| {
                inside(*extent).all(|block| self.owners[group][block as usize] == 0)
                    && inside(*extent).any(|block| self.is_cached(group, block))
            })
            .collect();
        let victim = self.cache.victim_extent(group);
        prop_assert_eq!(victim.is_some(), !drainable.is_empty());
        let Some(extent) = victim else { return Ok(()) };
        prop_assert!(drainable.contains(&extent));
        let blocks: Vec<u32> = inside(extent).collect();
        let mut evicted = Vec::new();
        self.cache.evict_blocks(group, blocks[0]..blocks[blocks.len() - 1] + 1, &mut evicted);
        self.took_out(group, &evicted)?;
        prop_assert!(blocks.iter().all(|block| self.is_free(group, *block)), "the extent is not empty");
        Ok(())
    }
}

proptest! {
    #[test]
    fn cache_agrees_with_plain_owners(
        rules in rules(),
        kind in prop_oneof![
            Just(EvictionKind::Lru),
            Just(EvictionKind::S3Fifo),
            Just(EvictionKind::CostAware(CostModel { attention_tokens_equal: 4 })),
        ],
        ops in proptest::collection::vec(cache_op(), 1..120),
    ) {
        let mut world = World {
            cache: PrefixCache::new(options(&rules), kind).expect("good options"),
            plain: Plain { rules: rules.to_vec(), held: BTreeMap::new() },
            owners: [vec![0; BLOCKS as usize], vec![0; BLOCKS as usize]],
            running: Vec::new(),
        };
        for op in ops {
            match op {
                CacheOp::Begin((salt, tokens)) => world.begin(salt, &tokens)?,
                CacheOp::End(which) if !world.running.is_empty() => {
                    let at = which % world.running.len();
                    world.end(at)?;
                }
                CacheOp::End(_) => {}
                CacheOp::Evict { group, count } => {
                    let cached = (0..BLOCKS).filter(|block| world.is_cached(group, *block)).count();
                    let mut evicted = Vec::new();
                    world.cache.evict(group, count, &mut evicted);
                    prop_assert_eq!(evicted.len(), cached.min(count as usize));
                    world.took_out(group, &evicted)?;
                }
                CacheOp::EvictExtent { group } => {
                    world.sync_extents(group);
                    world.evict_extent(group)?;
                }
                CacheOp::Forget { group, block } => {
                    prop_assert_eq!(world.cache.forget(group, block), world.plain.forget(group, block));
                }
                CacheOp::AwaitCopy { group, block, is_awaited } => {
                    // Changes only which of them go first.
                    world.cache.await_copy(group, block, is_awaited);
                }
                CacheOp::Renumber { group, from, to } => {
                    let content = world.plain.content_of(group, from);
                    let legal = content.is_some() && world.plain.content_of(group, to).is_none();
                    // A block manager moves to free blocks only.
                    if legal && !world.is_free(group, to) {
                        continue;
                    }
                    let answer = world.cache.renumber(group, from, to, World::span(to));
                    prop_assert_eq!(answer.is_ok(), legal);
                    if legal {
                        world.plain.held.get_mut(&content.expect("legal")).expect("held")[group] = Some(to);
                        world.owners[group].swap(from as usize, to as usize);
                        for block in world.running.iter_mut().flat_map(|blocks| &mut blocks[group]) {
                            if *block == from {
                                *block = to;
                            }
                        }
                    }
                }
            }
            world.cache.check_invariants().map_err(TestCaseError::fail)?;
            for group in 0..2 {
                let cached = (0..BLOCKS).filter(|block| world.is_cached(group, *block)).count();
                prop_assert_eq!(world.cache.cached_count(group) as usize, cached);
            }
        }
        check_events(world.cache.index(), &world.plain)?;
    }
}
