//! Blocks that are found again, over random histories: whatever is evicted, moved, shared or forgotten, a block that is
//! found holds exactly the tokens that were asked for, and nobody else writes to it.

#![expect(clippy::print_stdout, reason = "it reports what was lost")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use shoal_core::bytes::ByteCount;
use shoal_core::kv::blocks::BlockState;
use shoal_core::kv::eviction::{CostModel, EvictionKind};
use shoal_core::kv::layout::{BlockShape, CacheLayout, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::{Found, Start};
use shoal_core::kv::reuse::ReuseOptions;
use shoal_core::kv::state::{KvError, KvState};

const BLOCK_TOKENS: usize = 2;

/// 24 blocks of 700 KiB.
fn state(eviction: EvictionKind) -> KvState {
    state_of(eviction, 350)
}

/// Blocks of so many KiB for each token, in 17 MiB.
fn state_of(eviction: EvictionKind, kib: u32) -> KvState {
    let group = GroupSpec {
        name: "full".to_owned(),
        layers: 1,
        shape: BlockShape::Latent { tokens: 2, dim: kib << 10 },
        element_bytes: 1,
    };
    let spec = CacheSpec {
        groups: vec![group],
        order: PlaneOrder::BlockMajor,
        bytes: ByteCount::mib(17),
        granule_bytes_max: ByteCount::mib(4),
    };
    let reuse = ReuseOptions { eviction, ..ReuseOptions::default() };
    KvState::new(CacheLayout::new(&spec).expect("a layout"), ByteCount::ZERO, Some(reuse)).expect("an index")
}

/// As whoever maps does, and evicts where nothing else helps.
fn alloc(state: &mut KvState, count: usize) -> Option<Vec<u32>> {
    let mut ids = vec![0; count];
    let wanted = u32::try_from(count).expect("few");
    for _ in 0..3 {
        if state.alloc(0, &mut ids).expect("a group") {
            return Some(ids);
        }
        match state.plan_growth(0, wanted).expect("a group") {
            Some(planned) if !planned.is_empty() => {
                for granule in planned {
                    state.mapped(granule).expect("coming");
                }
            }
            _ => {
                let missing = wanted.saturating_sub(state.pool(0).expect("a group").available());
                if state.evict(0, missing).expect("a group") == 0 {
                    return None;
                }
            }
        }
    }
    None
}

/// Seals a sequence of so many blocks and gives it up.
fn pass(state: &mut KvState, tokens: &[u32]) -> Vec<u32> {
    let blocks = alloc(state, tokens.len() / BLOCK_TOKENS).expect("room");
    state.seal(Start::Salt(b""), tokens, &[&blocks]).expect("owned");
    state.free(0, &blocks).expect("owned");
    blocks
}

fn found(state: &mut KvState, tokens: &[u32]) -> usize {
    let mut found = Found::default();
    state.find(b"", tokens, &mut found).expect("an index");
    state.free(0, &found.groups[0].blocks).expect("owned");
    found.blocks
}

#[test]
fn what_has_a_copy_goes_before_what_waits_for_one() {
    for eviction in [EvictionKind::Lru, EvictionKind::S3Fifo, EvictionKind::CostAware(CostModel::default())] {
        let mut state = state(eviction);
        state.copy_sealed(true).expect("an index");
        let sequences: Vec<Vec<u32>> = (0..3).map(|at| vec![at; 16]).collect();
        let blocks: Vec<_> = sequences.iter().map(|tokens| pass(&mut state, tokens)).collect();
        // The last one has its copy, and so has the front of the second.
        state.copied(0, &blocks[2]).expect("an index");
        state.copied_sequence(b"", &sequences[1][..6], 0).expect("an index");
        assert_eq!(state.evict(0, 8), Ok(8), "{eviction:?}");
        let mut left = |at: usize| found(&mut state, &sequences[at]);
        assert_eq!([left(0), left(1), left(2)], [8, 8, 0], "{eviction:?}: nothing that waits has gone");
        assert_eq!(
            state.evict(0, 16),
            Ok(16),
            "{eviction:?}: but all of it goes where there is nothing else"
        );
        state.check_invariants().expect("invariants");

        // Chances end, and so does what gives them.
        state.copy_sealed(false).expect("an index");
        pass(&mut state, &sequences[0]);
        pass(&mut state, &sequences[1]);
        assert_eq!(state.evict(0, 8), Ok(8));
        assert_eq!(found(&mut state, &sequences[0]) + found(&mut state, &sequences[1]), 8, "{eviction:?}");
        state.check_invariants().expect("invariants");
    }
}

/// Of each 80 turns, those in which nothing is copied.
const STALLED_TURNS: usize = 36;

/// Conversations on a cache that is too small for them, while somebody copies what is sealed, oldest first, fast enough but
/// for times in which nothing is copied. How many blocks were sealed, and how many had gone when their turn came.
fn lost(seed: u64, is_told: bool) -> (usize, usize) {
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = |end: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random % end as u64).expect("small")
    };
    let mut state = state_of(EvictionKind::Lru, 32);
    state.copy_sealed(is_told).expect("an index");
    let (mut talks, mut queue) = (vec![Vec::new(); 40], std::collections::VecDeque::new());
    let (mut sealed, mut lost) = (0, 0);
    for turn in 0..600 {
        // One goes on, from where the cache still knows it; now and then a new one takes its place.
        let talk = below(40);
        let said = u32::try_from(below(1 << 20)).expect("small");
        let tokens: &mut Vec<u32> = &mut talks[talk];
        if tokens.len() > 24 || tokens.is_empty() {
            *tokens = vec![said];
        }
        let more = 2 * (1 + below(5)) + tokens.len() % 2;
        tokens.extend((0..more).map(|at| said + u32::try_from(at).expect("small")));
        let mut known = Found::default();
        state.find(b"", tokens, &mut known).expect("an index");
        let mut blocks = known.groups[0].blocks.clone();
        let first = blocks.len();
        let Some(rest) = alloc(&mut state, tokens.len() / BLOCK_TOKENS - first) else {
            state.free(0, &blocks).expect("owned");
            continue;
        };
        blocks.extend(rest);
        state.seal(Start::Salt(b""), tokens, &[&blocks]).expect("owned");
        state.free(0, &blocks).expect("owned");
        queue.extend((first..blocks.len()).map(|at| tokens[..(at + 1) * BLOCK_TOKENS].to_vec()));
        sealed += blocks.len() - first;
        let pace = if turn % 80 < STALLED_TURNS { 0 } else { 12 };
        for _ in 0..pace {
            let Some(wanted) = queue.pop_front() else { break };
            let at = wanted.len() / BLOCK_TOKENS - 1;
            let mut found = Found::default();
            state.find_from(b"", &wanted, at, &mut found).expect("an index");
            lost += usize::from(found.blocks <= at);
            state.copied(0, &found.groups[0].blocks).expect("an index");
            state.free(0, &found.groups[0].blocks).expect("owned");
        }
    }
    state.check_invariants().expect("invariants");
    (sealed, lost)
}

#[test]
fn less_is_lost_before_it_is_copied() {
    let (mut all, mut before, mut after) = (0, 0, 0);
    for seed in 0..6 {
        let (sealed, without) = lost(seed, false);
        let (_, with) = lost(seed, true);
        all += sealed;
        before += without;
        after += with;
    }
    println!("of {all} blocks {before} had gone before they were copied; {after} where they may wait for it");
    assert!(before > 50 && after * 3 < before * 2, "{before} and {after} of {all}");
}

#[test]
fn what_leaves_goes_from_its_end_and_no_further_than_others_allow() {
    let mut state = state_of(EvictionKind::default(), 100);
    let (stem, one, other) = ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 10]);
    pass(&mut state, &one);
    pass(&mut state, &other);
    assert_eq!(state.demote(b"x", &one, 0).expect("an index"), (0, false), "another tenant's");
    assert_eq!(state.demote(b"", &one, 3).expect("an index"), (1, false), "from the third on");
    assert_eq!(found(&mut state, &one), 3);
    assert_eq!(
        state.demote(b"", &one, 0).expect("an index"),
        (1, false),
        "the other one goes on from the stem"
    );
    assert_eq!((found(&mut state, &one), found(&mut state, &other)), (2, 3));
    // What somebody owns stays, and all that comes before it.
    let mut held = Found::default();
    state.find(b"", &other, &mut held).expect("an index");
    assert_eq!(state.demote(b"", &other, 0).expect("an index"), (0, true));
    state.free(0, &held.groups[0].blocks).expect("owned");
    assert_eq!(state.demote(b"", &other, 0).expect("an index"), (3, false));
    assert_eq!((found(&mut state, &stem), state.demote(b"", &stem, 0).expect("an index").0), (0, 0));
    state.check_invariants().expect("invariants");
}

#[test]
fn what_was_given_up_longest_ago_goes_first_in_whatever_group() {
    let group = |name: &str| GroupSpec {
        name: name.to_owned(),
        layers: 1,
        shape: BlockShape::Latent { tokens: 2, dim: 512 << 10 },
        element_bytes: 1,
    };
    let spec = CacheSpec {
        groups: vec![group("one"), group("two")],
        order: PlaneOrder::BlockMajor,
        bytes: ByteCount::mib(64),
        granule_bytes_max: ByteCount::mib(2),
    };
    let reuse = Some(ReuseOptions::default());
    let layout = CacheLayout::new(&spec).expect("a layout");
    let mut state = KvState::new(layout, ByteCount::ZERO, reuse).expect("an index");
    let mut given_up = Vec::new();
    // Sequences of two blocks in each group; each block of 1 MiB, so that each has a granule there.
    for sequence in 0..4_u32 {
        let mut lists = Vec::new();
        for group in 0..2 {
            for granule in state.plan_growth(group, 2).expect("a group").expect("room") {
                state.mapped(granule).expect("coming");
            }
            let mut ids = [0_u32; 2];
            assert!(state.alloc(group, &mut ids).expect("a group"));
            lists.push(ids);
        }
        let tokens = [sequence, 1, sequence, 2];
        state.seal(Start::Salt(b""), &tokens, &[&lists[0], &lists[1]]).expect("owned");
        given_up.push(lists);
    }
    // The second group gives its blocks up in order, the first only then, and backwards.
    let order = [(1, 0), (1, 1), (0, 3), (1, 2), (0, 2), (0, 1), (1, 3), (0, 0)];
    for (group, sequence) in order {
        state.free(group, &given_up[sequence][group]).expect("owned");
    }
    let cached = |state: &KvState, (group, sequence): (usize, usize)| {
        let block = given_up[sequence][group][0];
        state.pool(group).expect("a group").state(block) == Ok(BlockState::Cached)
    };
    for gone in 0..order.len() {
        let standing: Vec<bool> = order.iter().map(|one| cached(&state, *one)).collect();
        assert_eq!(standing.iter().filter(|stands| !**stands).count(), gone);
        assert!(standing[gone..].iter().all(|stands| *stands), "{standing:?}");
        assert_eq!(state.evict_granules(ByteCount::mib(1)).expect("an index"), ByteCount::mib(2));
    }
    assert_eq!(state.evict_granules(ByteCount::mib(1)).expect("an index"), ByteCount::ZERO);
    state.check_invariants().expect("counts");
}

#[test]
fn a_block_that_does_not_exist_cannot_be_forgotten() {
    let mut state = state(EvictionKind::Lru);
    assert!(matches!(state.forget(0, 1_000_000), Err(KvError::Blocks(_))));
    assert!(matches!(state.forget(7, 0), Err(KvError::UnknownGroup { group: 7, groups: 1 })));
    assert_eq!(state.forget(0, 0), Ok(false));
}

#[derive(Debug)]
struct Sequence {
    salt: u8,
    tokens: Vec<u32>,
    blocks: Vec<u32>,
}

#[derive(Clone, Debug)]
enum Op {
    Start(u8, Vec<u32>),
    End(usize),
    Fork(usize),
    Evict(u32),
    EvictGranules(u64),
    Release,
    Compact,
    Forget(usize, usize),
    ForgetAll,
}

fn op() -> impl Strategy<Value = Op> {
    let tokens = proptest::collection::vec(0_u32..3, 1..12);
    prop_oneof![
        8 => (0_u8..2, tokens).prop_map(|(salt, tokens)| Op::Start(salt, tokens)),
        6 => (0_usize..9).prop_map(Op::End),
        1 => (0_usize..9).prop_map(Op::Fork),
        1 => (0_u32..6).prop_map(Op::Evict),
        1 => (0_u64..9).prop_map(Op::EvictGranules),
        1 => Just(Op::Release),
        1 => Just(Op::Compact),
        1 => (0_usize..9, 0_usize..6).prop_map(|(at, place)| Op::Forget(at, place)),
        1 => Just(Op::ForgetAll),
    ]
}

#[expect(clippy::too_many_lines, reason = "one arm for each operation")]
fn play(eviction: EvictionKind, ops: Vec<Op>) -> Result<(), TestCaseError> {
    let mut state = state(eviction);
    // What was written to each block most lately: a salt and all tokens up to its end.
    let mut content: BTreeMap<u32, (u8, Vec<u32>)> = BTreeMap::new();
    let mut running: Vec<Sequence> = Vec::new();
    let mut found = Found::default();
    for op in ops {
        match op {
            Op::Start(salt, tokens) => {
                state.find(&[salt], &tokens, &mut found).expect("an index");
                let mut blocks = found.groups[0].blocks.clone();
                for (place, block) in blocks.iter().enumerate() {
                    let wanted = (salt, tokens[..(place + 1) * BLOCK_TOKENS].to_vec());
                    prop_assert_eq!(
                        content.get(block),
                        Some(&wanted),
                        "block {} holds something else",
                        block
                    );
                }
                let full = tokens.len() / BLOCK_TOKENS;
                let Some(new) = alloc(&mut state, full - blocks.len()) else {
                    state.free(0, &blocks).expect("owned");
                    continue;
                };
                for (place, block) in (blocks.len()..).zip(&new) {
                    let is_owned = running.iter().any(|other| other.blocks.contains(block));
                    prop_assert!(!is_owned, "block {} has an owner", block);
                    content.insert(*block, (salt, tokens[..(place + 1) * BLOCK_TOKENS].to_vec()));
                }
                blocks.extend(new);
                state.seal(Start::Salt(&[salt]), &tokens, &[&blocks]).expect("each is owned");
                running.push(Sequence { salt, tokens, blocks });
            }
            Op::End(at) => {
                if at < running.len() {
                    state.free(0, &running.swap_remove(at).blocks).expect("owned");
                }
            }
            Op::Fork(at) => {
                if let Some(Sequence { salt, tokens, blocks }) = running.get(at) {
                    state.fork(0, blocks).expect("owned");
                    running.push(Sequence { salt: *salt, tokens: tokens.clone(), blocks: blocks.clone() });
                }
            }
            Op::Evict(count) => {
                let cached = state.pool(0).expect("a group").figures().cached;
                prop_assert_eq!(state.evict(0, count), Ok(count.min(cached)));
            }
            Op::EvictGranules(mib) => {
                let (empty, all) = (state.usage().empty, state.evictable_bytes());
                let emptied = state.evict_granules(ByteCount::mib(mib)).expect("planned");
                prop_assert!(emptied >= ByteCount::mib(mib).min(all));
                prop_assert!(state.usage().empty >= empty + emptied);
            }
            Op::Release => {
                for granule in state.plan_release(&state.clocks()).expect("planned") {
                    state.gone(granule).expect("leaving");
                }
            }
            Op::Compact => {
                let moves = state.plan_compaction(0, 100).expect("a group");
                state.begin_moves(0, &moves).expect("planned just now");
                // Somebody finds what moves, and lets it go again.
                for running in &running {
                    state.find(&[running.salt], &running.tokens, &mut found).expect("an index");
                    state.free(0, &found.groups[0].blocks).expect("owned");
                }
                state.end_moves(0, &moves, true).expect("begun");
                for planned in moves {
                    if let Some(held) = content.remove(&planned.from) {
                        content.insert(planned.to, held);
                    }
                    for block in running.iter_mut().flat_map(|running| &mut running.blocks) {
                        if *block == planned.from {
                            *block = planned.to;
                        }
                    }
                }
            }
            Op::Forget(at, place) => {
                if let Some(block) = running.get(at).and_then(|running| running.blocks.get(place)) {
                    state.forget(0, *block).expect("a group");
                    prop_assert_eq!(state.forget(0, *block), Ok(false));
                }
            }
            Op::ForgetAll => {
                state.forget_all().expect("an index");
                prop_assert_eq!(state.pool(0).expect("a group").figures().cached, 0);
            }
        }
        state.check_invariants().map_err(TestCaseError::fail)?;
        let mut owners: BTreeMap<u32, u32> = BTreeMap::new();
        for block in running.iter().flat_map(|running| &running.blocks) {
            *owners.entry(*block).or_default() += 1;
        }
        for block in 0..state.pool(0).expect("a group").blocks() {
            let is = match state.pool(0).expect("a group").state(block) {
                Ok(BlockState::Owned(count)) => count,
                _ => 0,
            };
            prop_assert_eq!(is, owners.get(&block).copied().unwrap_or(0), "owners of block {}", block);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn what_is_found_is_what_was_asked_for(
        kind in 0_u8..3, ops in proptest::collection::vec(op(), 1..80),
    ) {
        let eviction = match kind {
            0 => EvictionKind::Lru,
            1 => EvictionKind::S3Fifo,
            _ => EvictionKind::CostAware(CostModel::default()),
        };
        play(eviction, ops)?;
    }
}

#[test]
fn what_cannot_be_sealed_changes_nothing() {
    let mut state = state(EvictionKind::Lru);
    let ids = alloc(&mut state, 3).expect("room");
    state.free(0, &ids[2..]).expect("owned");
    let sealed = state.seal(Start::Salt(b""), &[1, 2, 3, 4], &[&[ids[0], ids[2]]]).map(drop);
    assert!(matches!(sealed, Err(KvError::Blocks(_))), "{sealed:?}");
    let mut found = Found::default();
    state.find(b"", &[1, 2, 3, 4], &mut found).expect("an index");
    assert_eq!(found.tokens, 0);
    state.seal(Start::Salt(b""), &[1, 2, 3, 4], &[&ids[..2]]).expect("owned");
    state.find(b"other", &[1, 2, 3, 4], &mut found).expect("an index");
    assert_eq!(found.tokens, 0, "another tenant's");
    state.find(b"", &[1, 2, 3], &mut found).expect("an index");
    assert_eq!((found.tokens, found.groups[0].blocks.as_slice()), (2, &ids[..1]));
    assert_eq!(state.events_since(0, 9).expect("an index").events.len(), 2);
}

#[test]
fn memory_is_taken_from_what_was_used_longest_ago() {
    let mut state = state(EvictionKind::Lru);
    let mut found = Found::default();
    // A sequence of one block each, until all granules hold some; given up in this order, and the first used once more.
    let mut held = Vec::new();
    while let Some(block) = alloc(&mut state, 1).filter(|_| held.len() < 24) {
        let token = u32::try_from(held.len()).expect("few");
        state.seal(Start::Salt(b""), &[token, token], &[&block]).expect("owned");
        held.push((token, block[0]));
    }
    for (_, block) in &held {
        state.free(0, &[*block]).expect("owned");
    }
    state.find(b"", &[0, 0], &mut found).expect("an index");
    assert_eq!(found.tokens, 2);
    state.free(0, &found.groups[0].blocks).expect("owned");
    let granules =
        |state: &KvState, block| state.pool(0).expect("a group").granules_of(block).expect("mapped");
    let hot = granules(&state, held[0].1).0;
    let cold =
        held.iter().map(|(_, block)| granules(&state, *block).0).find(|slot| *slot != hot).expect("several");
    assert!(state.evict_granules(ByteCount(1)).expect("planned") > ByteCount::ZERO);
    for (token, block) in held {
        let (first, last) = granules(&state, block);
        state.find(b"", &[token, token], &mut found).expect("an index");
        let is_found = found.tokens > 0;
        state.free(0, &found.groups[0].blocks).expect("owned");
        assert_eq!(
            is_found,
            first != cold && last != cold,
            "block {block} in {first} and {last}, cold is {cold}"
        );
    }
}
