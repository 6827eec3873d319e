//! A cache whose limit was lowered: what is owned stays, what was freed is gone, and whoever mixes them up is told.

mod common;

use common::{unless_busy, until, world};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::blocks::{BlockError, BlockState};
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::Start;
use shoal_core::kv::state::KvError;
use shoal_memory::kv_cache::Attempt;
use shoal_memory::{KvCache, KvCacheSpec, MemoryError};

/// 64 blocks of 512 KiB, 16 tokens each.
fn spec() -> KvCacheSpec {
    let shape = BlockShape::Latent { tokens: 16, dim: 16 << 10 };
    let groups = vec![GroupSpec { name: "full".to_owned(), layers: 2, shape, element_bytes: 1 }];
    let (bytes, granule_bytes_max) = (ByteCount::mib(32), ByteCount::mib(4));
    let cache = CacheSpec { groups, order: PlaneOrder::BlockMajor, bytes, granule_bytes_max };
    KvCacheSpec::new("kv", cache)
}

fn alloc(cache: &KvCache, count: usize) -> Option<Vec<u32>> {
    let mut ids = vec![u32::MAX; count];
    cache.alloc(0, &mut ids).expect("the device works").then_some(ids)
}

#[test]
fn use_after_a_limit_is_refused_and_changes_nothing() {
    let world = world(64, 64);
    let cache = world.manager.kv_cache(spec()).expect("addresses");
    let ids = alloc(&cache, 64).expect("all");
    cache.set_limit(ByteCount::mib(8), None).expect("newer");
    // What is owned stays so above the limit, and no more is given out.
    let (mut more, usage) = (vec![-7_i32; 3], cache.usage());
    assert!(!cache.alloc(0, &mut more).expect("an answer"));
    assert_eq!(unless_busy(|| cache.try_alloc(0, &mut more)), Attempt::Unmapped);
    assert_eq!((more, &cache.usage()), (vec![-7; 3], &usage));
    cache.fork(0, &ids[..1]).expect("owned");
    cache.free(0, &ids[..1]).expect("owned twice");
    // What was freed has lost its memory to the limit: whoever goes on using it is told.
    cache.free(0, &ids[8..]).expect("owned");
    until("it is under its limit", || cache.usage().mapped <= ByteCount::mib(8));
    let usage = cache.usage();
    let not_owned = |block: u32| MemoryError::Kv(KvError::Blocks(BlockError::NotOwned { block })).to_string();
    for block in [ids[8], ids[63]] {
        let late = [ids[0], ids[1], block];
        let refused = [
            cache.free(0, &late).expect_err("freed"),
            cache.try_free(0, &late).expect_err("freed"),
            cache.fork(0, &late).expect_err("freed"),
        ];
        assert!(refused.iter().all(|error| error.to_string() == not_owned(block)), "{refused:?}");
        let tokens: Vec<u32> = (0..48).collect();
        let sealed = cache.seal(Start::Salt(b""), &tokens, &[&late]).expect_err("freed");
        assert_eq!(sealed.to_string(), not_owned(block));
        assert_eq!(cache.usage(), usage);
        assert_eq!(cache.state_of(0, ids[0]).expect("a block"), BlockState::Owned(1));
    }
    cache.free(0, &ids[..8]).expect("owned once each");
    cache.set_limit(ByteCount::mib(32), None).expect("newer");
    assert_eq!(alloc(&cache, 64).map(|ids| ids.len()), Some(64));
    cache.check_invariants().expect("invariants");
    world.check();
}
