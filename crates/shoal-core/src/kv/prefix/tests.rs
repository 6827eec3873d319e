use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::kv::eviction::{EvictionKind, ExtentSpan};

fn index(blocks: u32) -> PrefixIndex {
    PrefixIndex::new(PrefixOptions::full(2, blocks)).expect("good options")
}

fn seal(index: &mut PrefixIndex, salt: &[u8], tokens: &[u32], blocks: &[u32]) -> Sealed {
    let mut sealed = Sealed::default();
    index.seal(Start::Salt(salt), tokens, &[blocks], &mut sealed).expect("free blocks");
    sealed
}

fn find(index: &mut PrefixIndex, salt: &[u8], tokens: &[u32]) -> Vec<u32> {
    let mut found = Found::default();
    index.find(salt, tokens, &mut found);
    found.groups.swap_remove(0).blocks
}

#[test]
fn partial_blocks_are_left_out() {
    let mut index = index(8);
    assert_eq!(seal(&mut index, b"", &[1, 2, 3], &[5, 6]).blocks, 1);
    assert_eq!(find(&mut index, b"", &[1, 2, 3]), [5]);
    assert!(find(&mut index, b"", &[1]).is_empty());
    assert!(!index.is_sealed(0, 6));
    let sealed = seal(&mut index, b"", &[1, 2, 3, 4], &[5, 6]);
    assert_eq!((sealed.blocks, sealed.stored.as_slice()), (2, &[(0, 6)][..]), "the first is known");
}

#[test]
fn tenants_do_not_meet() {
    let mut index = index(8);
    seal(&mut index, b"one", &[1, 2], &[0]);
    assert!(find(&mut index, b"two", &[1, 2]).is_empty());
    assert!(find(&mut index, b"", &[1, 2]).is_empty());
    seal(&mut index, b"two", &[1, 2], &[1]);
    assert_eq!(find(&mut index, b"one", &[1, 2]), [0]);
    assert_eq!(find(&mut index, b"two", &[1, 2]), [1]);
    assert_ne!(index.key_of(0, 0), index.key_of(0, 1));
}

#[test]
fn a_hole_ends_a_match_until_it_is_filled() {
    let mut index = index(8);
    seal(&mut index, b"", &[1, 1, 2, 2, 3, 3], &[0, 1, 2]);
    assert!(index.forget(0, 1));
    assert!(!index.forget(0, 1), "it is gone already");
    assert_eq!(find(&mut index, b"", &[1, 1, 2, 2, 3, 3]), [0]);
    let sealed = seal(&mut index, b"", &[1, 1, 2, 2], &[0, 7]);
    assert_eq!(sealed.stored, [(0, 7)]);
    assert_eq!(find(&mut index, b"", &[1, 1, 2, 2, 3, 3]), [0, 7, 2]);
    for block in [0, 7] {
        index.forget(0, block);
    }
    assert_eq!(index.node_count(), 4, "the holes stay for the last block, and the root");
    index.forget(0, 2);
    assert_eq!(index.node_count(), 0);
}

#[test]
fn the_first_of_two_is_kept() {
    let mut index = index(8);
    seal(&mut index, b"", &[1, 1, 2, 2], &[0, 1]);
    let sealed = seal(&mut index, b"", &[1, 1, 2, 2, 3, 3], &[0, 4, 5]);
    assert_eq!(sealed.duplicates, [Duplicate { group: 0, at: 1, given: 4, kept: 1 }]);
    assert_eq!(find(&mut index, b"", &[1, 1, 2, 2, 3, 3]), [0, 1, 5]);
    assert!(!index.is_sealed(0, 4));
    assert_eq!(index.stats().duplicates, 1);
}

#[test]
fn refusals_say_why_and_change_nothing() {
    let mut index = index(8);
    seal(&mut index, b"", &[1, 1], &[0]);
    let mut sealed = Sealed::default();
    let mut refused = |blocks: &[&[u32]], tokens: &[u32]| {
        let error = index.seal(Start::Salt(b""), tokens, blocks, &mut sealed).expect_err("refused");
        assert_eq!((index.sealed_count(0), index.node_count()), (1, 2));
        error
    };
    assert_eq!(refused(&[&[0, 1]], &[1, 1, 2, 2, 3, 3]), PrefixError::Blocks { group: 0, given: 2, full: 3 });
    assert_eq!(refused(&[], &[1, 1]), PrefixError::Groups { given: 0, groups: 1 });
    assert_eq!(
        refused(&[&[0, 8]], &[1, 1, 2, 2]),
        PrefixError::UnknownBlock { group: 0, block: 8, blocks: 8 }
    );
    assert_eq!(refused(&[&[1, 0]], &[1, 1, 2, 2]), PrefixError::SealedAlready { group: 0, block: 0 });
    assert_eq!(
        refused(&[&[0, 3, 3]], &[1, 1, 2, 2, 3, 3]),
        PrefixError::SealedAlready { group: 0, block: 3 }
    );
    for options in [PrefixOptions::full(0, 8), PrefixOptions { groups: vec![], ..PrefixOptions::full(2, 8) }]
    {
        assert!(matches!(PrefixIndex::new(options), Err(PrefixError::Options { .. })));
    }
}

#[test]
fn a_position_saves_the_way_and_goes_stale() {
    let mut index = index(8);
    let position = seal(&mut index, b"", &[1, 1, 2, 2], &[0, 1]).position.expect("an end");
    let mut sealed = Sealed::default();
    index.seal(Start::After(position), &[3, 3], &[&[2]], &mut sealed).expect("fresh");
    assert_eq!(find(&mut index, b"", &[1, 1, 2, 2, 3, 3]), [0, 1, 2]);
    index.clear();
    assert!(find(&mut index, b"", &[1, 1]).is_empty());
    seal(&mut index, b"", &[7, 7, 8, 8], &[0, 1]);
    let stale = index.seal(Start::After(position), &[3, 3], &[&[2]], &mut sealed);
    assert_eq!(stale, Err(PrefixError::StalePosition), "another node lives there now");
}

#[test]
fn what_was_sealed_counts_up_to_the_first_hole() {
    let mut index = index(8);
    let tokens = [1, 1, 2, 2, 3, 3, 4, 4];
    assert_eq!(seal(&mut index, b"", &tokens, &[NO_BLOCK; 4]).blocks, 0, "nothing can be found");
    assert_eq!(seal(&mut index, b"", &tokens, &[0, NO_BLOCK, 2, 3]).blocks, 1);
    assert_eq!(find(&mut index, b"", &tokens), [0]);
    assert_eq!(
        seal(&mut index, b"", &tokens, &[NO_BLOCK, 1, NO_BLOCK, NO_BLOCK]).blocks,
        4,
        "the hole is filled"
    );
    assert_eq!(find(&mut index, b"", &tokens), [0, 1, 2, 3]);
    let (mut sealed, keys) = (Sealed::default(), [&[1_u8; 16][..], &[2; 16], &[3; 16]]);
    index.seal_keys(b"", None, &keys, &[&[4, NO_BLOCK, 5]], &mut sealed).expect("free blocks");
    assert_eq!(sealed.blocks, 1);
}

#[test]
fn a_full_tree_tells() {
    let mut index = PrefixIndex::new(PrefixOptions { nodes_max: Some(3), ..PrefixOptions::full(2, 8) })
        .expect("good options");
    let sealed = seal(&mut index, b"", &[1, 1, 2, 2, 3, 3, 4, 4], &[0, 1, 2, 3]);
    assert_eq!((sealed.blocks, sealed.refused), (2, 2));
    assert_eq!(index.stats().full, 2);
    let mut found = Found::default();
    index.find(b"", &[1, 1, 2, 2, 3, 3], &mut found);
    assert_eq!((found.blocks, found.tokens), (2, 4));
    index.forget(0, 1);
    assert_eq!(seal(&mut index, b"", &[1, 1, 9, 9], &[0, 5]).refused, 0);
}

#[test]
fn keys_of_an_engine_are_taken_as_they_are() {
    let mut index = index(8);
    let (mut sealed, mut found) = (Sealed::default(), Found::default());
    let keys: [&[u8]; 3] = [&[1; 32], &[2; 32], &[3; 32]];
    index.seal_keys(b"a", None, &keys, &[&[0, 1, 2]], &mut sealed).expect("free blocks");
    assert_eq!(sealed.blocks, 3);
    index.find_keys(b"a", &keys, &mut found).expect("good keys");
    assert_eq!(found.groups[0].blocks, [0, 1, 2]);
    assert_eq!(index.key_of(0, 1), Some(BlockKey::Engine([2; 32].into())));
    for (salt, keys) in [(&b"b"[..], [keys[0]]), (b"a", [&[1; 31]]), (b"a", [&[1; 33]]), (b"a", [&[9; 32]])] {
        index.find_keys(salt, &keys, &mut found).expect("good keys");
        assert_eq!(found.blocks, 0);
    }
    // A part that begins after a block that was never sealed.
    index.seal_keys(b"a", Some(&[8]), &[&[9]], &[&[5]], &mut sealed).expect("free block");
    let batch = index.events_since(3, 9);
    let parent = Some(BlockKey::Engine([8].into()));
    assert_eq!(batch.events[0].kind, EventKind::Stored { key: BlockKey::Engine([9].into()), parent });
    index.find_keys(b"a", &[&[8], &[9]], &mut found).expect("good keys");
    assert_eq!(found.blocks, 0, "the first is a hole");
    index.find_keys(b"a", &[&[9]], &mut found).expect("good keys");
    assert_eq!(found.groups[0].blocks, [5]);
    let long = [0; 65];
    for key in [&[][..], &long] {
        let wrong = PrefixError::KeyLength { bytes: key.len(), max: 64 };
        assert_eq!(index.find_keys(b"a", &[key], &mut found), Err(wrong));
        assert_eq!(index.seal_keys(b"a", None, &[key], &[&[6]], &mut sealed), Err(wrong));
    }
    let same = index.seal_keys(b"a", None, &[&[1; 32]], &[&[7]], &mut sealed);
    assert_eq!((same, sealed.duplicates.len()), (Ok(()), 1));
    for block in [0, 1, 2, 5] {
        assert!(index.forget(0, block));
    }
    assert_eq!(index.node_count(), 0);
}

#[test]
fn tokens_and_keys_are_two_worlds() {
    let mut index = index(8);
    let mut sealed = Sealed::default();
    seal(&mut index, b"", &[1, 1], &[0]);
    let bytes: Vec<u8> = [1_u32, 1].iter().flat_map(|token| token.to_le_bytes()).collect();
    let mut found = Found::default();
    index.find_keys(b"", &[&bytes], &mut found).expect("good key");
    assert_eq!(found.blocks, 0);
    index.seal_keys(b"", None, &[&bytes], &[&[1]], &mut sealed).expect("free block");
    assert_eq!(find(&mut index, b"", &[1, 1]), [0]);
}

#[test]
fn a_window_needs_its_last_blocks_only() {
    let groups = [GroupRule::Full, GroupRule::Window { tokens: 4 }, GroupRule::Last];
    let groups = groups.map(|rule| GroupOptions { rule, blocks: 16 });
    let options = PrefixOptions { groups: groups.into(), ..PrefixOptions::full(2, 0) };
    let mut index = PrefixIndex::new(options).expect("good options");
    let mut sealed = Sealed::default();
    let tokens = [1, 1, 2, 2, 3, 3, 4, 4];
    let lists: [&[u32]; 3] = [&[0, 1, 2, 3], &[NO_BLOCK, 1, 2, 3], &[NO_BLOCK, NO_BLOCK, 2, NO_BLOCK]];
    index.seal(Start::Salt(b""), &tokens, &lists, &mut sealed).expect("free blocks");
    let mut found = Found::default();
    index.find(b"", &tokens, &mut found);
    assert_eq!(found.blocks, 3, "the state is kept after the third block only");
    let parts: Vec<(usize, &[u32])> =
        found.groups.iter().map(|part| (part.first, &part.blocks[..])).collect();
    assert_eq!(parts, [(0, &[0, 1, 2][..]), (1, &[1, 2]), (2, &[2])]);
    index.forget(1, 1);
    index.find(b"", &tokens, &mut found);
    assert_eq!(found.blocks, 0);
}

#[test]
fn who_is_followed_stays() {
    let mut cache = PrefixCache::new(PrefixOptions::full(2, 8), EvictionKind::Lru).expect("good options");
    let mut sealed = Sealed::default();
    cache.seal(Start::Salt(b""), &[1, 1, 2, 2, 3, 3], &[&[0, 1, 2]], &mut sealed).expect("free blocks");
    let span = |_| ExtentSpan::one(0);
    // Given up one by one, the first block first: the oldest is the one that the others need.
    for block in 0..3 {
        cache.released(0, &[block], span);
    }
    let mut evicted = Vec::new();
    cache.evict(0, 1, &mut evicted);
    assert_eq!(evicted, [2]);
    cache.used(0, 0);
    cache.released(0, &[0], span);
    cache.evict(0, 9, &mut evicted);
    assert_eq!(evicted, [2, 1, 0]);
    assert_eq!(cache.index().node_count(), 0);
}

#[test]
fn an_extent_goes_with_what_needs_it() {
    let mut cache = PrefixCache::new(PrefixOptions::full(2, 8), EvictionKind::Lru).expect("good options");
    let mut sealed = Sealed::default();
    cache.seal(Start::Salt(b""), &[1, 1, 2, 2, 3, 3], &[&[0, 4, 1]], &mut sealed).expect("free blocks");
    let span = |block| ExtentSpan::one(block / 4);
    cache.released(0, &[0, 4, 1], span);
    cache.set_allocated(0, 0, 3);
    cache.set_allocated(0, 1, 1);
    assert_eq!(cache.victim_extent(0), Some(1), "somebody owns a block of extent 0");
    let mut evicted = Vec::new();
    cache.evict_blocks(0, 4..8, &mut evicted);
    assert_eq!(evicted, [1, 4], "block 1 cannot be found without block 4");
    assert_eq!(cache.victim_extent(0), None);
    cache.set_allocated(0, 0, 1);
    assert_eq!(cache.victim_extent(0), Some(0));
}

proptest! {
    /// With keys of two bits nearly all contents collide: a block may be missed, but never found for other content.
    #[test]
    fn no_hit_rests_on_a_hash(
        ops in proptest::collection::vec(
            (any::<bool>(), 0_u8..2, proptest::collection::vec(0_u32..3, 2..9), 0_u32..32), 1..60
        ),
    ) {
        let mut index = index(32);
        index.key_mask = 3;
        let mut content_of: HashMap<u32, (u8, Vec<u32>)> = HashMap::new();
        let (mut sealed, mut found) = (Sealed::default(), Found::default());
        for (seals, salt, tokens, block) in ops {
            if seals {
                let free: Vec<u32> = (0..32).filter(|block| !index.is_sealed(0, *block)).take(4).collect();
                if free.len() == 4 {
                    index.seal(Start::Salt(&[salt]), &tokens, &[&free], &mut sealed).expect("free blocks");
                    for (_, block) in &sealed.stored {
                        let at = free.iter().position(|free| free == block).expect("given");
                        content_of.insert(*block, (salt, tokens[..(at + 1) * 2].to_vec()));
                    }
                }
            } else {
                index.forget(0, block);
            }
            index.find(&[salt], &tokens, &mut found);
            for (at, block) in found.groups[0].blocks.iter().enumerate() {
                prop_assert_eq!(&content_of[block], &(salt, tokens[..(at + 1) * 2].to_vec()));
            }
            index.check_invariants().map_err(TestCaseError::fail)?;
        }
    }
}

#[test]
fn the_sizes_of_a_node_stay_small() {
    assert!(size_of::<nodes::Node>() <= 64, "{} bytes: more than a cache line", size_of::<nodes::Node>());
}
