//! Conversations of an engine on a KV cache with a tier below it: what a block holds is decided by the tokens before it.

use std::sync::Arc;
use std::time::Duration;

use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::{Found, Start};
use shoal_memory::store::Store;
use shoal_memory::{KvCache, KvCacheSpec, KvTier, KvTierOptions};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::World;

/// Tokens of a block.
pub(crate) const TOKENS: usize = 4;

/// Blocks of four tokens in two layers, `kib` in all.
pub(crate) fn cache(world: &World, order: PlaneOrder, mib: u64, kib: u32) -> Arc<KvCache> {
    let shape = BlockShape::Latent { tokens: 4, dim: kib << 7 };
    let groups = vec![GroupSpec { name: "kv".to_owned(), layers: 2, shape, element_bytes: 1 }];
    let cache = CacheSpec { groups, order, bytes: ByteCount::mib(mib), granule_bytes_max: ByteCount::mib(2) };
    // Long enough for a busy machine: what is refused then is refused for a reason.
    let patience = Duration::from_secs(5);
    let spec = KvCacheSpec { spare_bytes_max: ByteCount::ZERO, patience, ..KvCacheSpec::new("kv", cache) };
    Arc::new(world.manager.kv_cache(spec).expect("addresses"))
}

pub(crate) fn options(model: &str) -> KvTierOptions {
    let load_wait = Duration::from_secs(10);
    KvTierOptions { load_wait, ..KvTierOptions::new(vec![("model".to_owned(), model.to_owned())]) }
}

pub(crate) fn tier(cache: &Arc<KvCache>, store: Arc<dyn Store>, model: &str) -> KvTier {
    KvTier::new(cache, store, options(model)).expect("a cache of one group")
}

/// What a model would compute for a block: of all tokens up to its end.
pub(crate) fn content(salt: &[u8], tokens: &[u32], block: usize, bytes: usize) -> Vec<u8> {
    let before: Vec<u8> =
        tokens[..(block + 1) * TOKENS].iter().flat_map(|token| token.to_le_bytes()).collect();
    let seed = xxh3_64_with_seed(&[salt, &before].concat(), 1);
    seed.to_le_bytes().repeat(bytes.div_ceil(8))[..bytes].to_vec()
}

pub(crate) fn pieces(cache: &KvCache, block: u32) -> Vec<(ByteCount, ByteCount)> {
    cache.layout(0).expect("a group").pieces(block).collect()
}

pub(crate) fn read(cache: &KvCache, block: u32) -> Vec<u8> {
    let mut all = Vec::new();
    for (at, bytes) in pieces(cache, block) {
        let mut piece = vec![0; usize::try_from(bytes.0).expect("small")];
        cache.region().read(at, &mut piece).expect("it has memory");
        all.extend(piece);
    }
    all
}

/// What an engine does with a request: finds, loads, computes the rest, seals, saves, frees. How many blocks were found on
/// the device, and how many came from the tier; none where there was no memory.
pub(crate) fn serve(cache: &KvCache, tier: &KvTier, salt: &[u8], tokens: &[u32]) -> Option<(usize, usize)> {
    let full = tokens.len() / TOKENS;
    let block_bytes = usize::try_from(cache.layout(0).expect("a group").block_bytes().0).expect("small");
    let mut found = Found::default();
    cache.find(salt, tokens, &mut found).expect("an index");
    let mut blocks = found.groups[0].blocks.clone();
    let loaded = tier.load(salt, tokens, &blocks);
    let counts = (blocks.len(), loaded.len());
    blocks.extend(loaded);
    for (at, block) in blocks.iter().enumerate() {
        assert!(read(cache, *block) == content(salt, tokens, at, block_bytes), "block {at} of {counts:?}");
    }
    let first = blocks.len();
    let mut rest = vec![0_u32; full - first];
    if !cache.alloc(0, &mut rest).unwrap_or(false) {
        cache.free(0, &blocks).expect("owned");
        return None;
    }
    for (at, block) in (first..).zip(&rest) {
        let (mut from, computed) = (0, content(salt, tokens, at, block_bytes));
        for (offset, bytes) in pieces(cache, *block) {
            let bytes = usize::try_from(bytes.0).expect("small");
            cache.region().write(offset, &computed[from..from + bytes]).expect("it has memory");
            from += bytes;
        }
    }
    blocks.extend(rest);
    cache.seal(Start::Salt(salt), tokens, &[&blocks]).expect("owned");
    tier.save(salt, tokens, first);
    cache.free(0, &blocks).expect("owned");
    Some(counts)
}

/// A number from a seed.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}
