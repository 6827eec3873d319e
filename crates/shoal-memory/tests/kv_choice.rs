//! What is loaded from a tier and what is left to be computed, by what both took: a slow tier is left alone, a fast one is not.

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::talks::{TOKENS, cache};
use common::{WAIT, until, world};
use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::PlaneOrder;
use shoal_core::kv::prefix::Start;
use shoal_memory::store::{
    Buffer, Fetched, HostOptions, HostTier, Miss, Offer, Stack, StackOptions, Store, StoreKey, Stored,
    Ticket, Verdict,
};
use shoal_memory::{KvCache, KvTier, KvTierOptions};

const BLOCKS: usize = 12;
/// Longer than computing has to save at least, for a block.
const SLOW: Duration = Duration::from_millis(10);

/// A tier that takes its time for each read.
#[derive(Debug, Default)]
struct Slow {
    kept: Mutex<HashMap<StoreKey, Vec<u8>>>,
    reads: Mutex<usize>,
    takes: Duration,
}

impl Store for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn contains(&self, key: &StoreKey) -> bool {
        self.kept.lock().contains_key(key)
    }

    fn offer(&self, _: &StoreKey, _: &Offer) -> Verdict {
        Verdict::Admit
    }

    fn put(&self, key: StoreKey, source: Buffer, bytes: usize, _: Duration) -> Ticket<Stored> {
        self.kept.lock().insert(key, source.as_slice()[..bytes].to_vec());
        Ticket::ready(Ok(Stored::Written))
    }

    fn get(&self, key: StoreKey, mut target: Buffer, _: Duration) -> Ticket<Fetched> {
        *self.reads.lock() += 1;
        thread::sleep(self.takes);
        let Some(block) = self.kept.lock().get(&key).cloned() else {
            return Ticket::ready(Err(Miss::Absent));
        };
        target.as_mut_slice().expect("its own")[..block.len()].copy_from_slice(&block);
        Ticket::ready(Ok(Fetched { buffer: target, bytes: block.len() }))
    }

    fn remove(&self, key: StoreKey, _: Duration) -> Ticket<bool> {
        Ticket::ready(Ok(self.kept.lock().remove(&key).is_some()))
    }

    fn flush(&self, _: Duration) -> Ticket<()> {
        Ticket::ready(Ok(()))
    }
}

fn tier(cache: &Arc<KvCache>, store: Arc<dyn Store>, is_choosing: bool) -> KvTier {
    let facts = vec![("model".to_owned(), "a".to_owned())];
    let options = KvTierOptions { load_wait: WAIT, is_choosing, ..KvTierOptions::new(facts) };
    KvTier::new(cache, store, options).expect("one group")
}

/// Saves a conversation and lets the device forget it.
fn save(cache: &Arc<KvCache>, tier: &KvTier) -> Vec<u32> {
    let tokens: Vec<u32> = (0..62).collect::<Vec<u32>>()[..BLOCKS * TOKENS].to_vec();
    let mut blocks = vec![0_u32; BLOCKS];
    assert!(cache.alloc(0, &mut blocks).expect("memory"));
    cache.seal(Start::Salt(b""), &tokens, &[&blocks]).expect("owned");
    tier.save(b"", &tokens, 0);
    assert!(tier.flush(WAIT));
    cache.free(0, &blocks).expect("owned");
    cache.forget_all().expect("an index");
    tokens
}

fn load(cache: &Arc<KvCache>, tier: &KvTier, tokens: &[u32]) -> usize {
    let blocks = tier.load(b"", tokens, &[]);
    let count = blocks.len();
    cache.free(0, &blocks).expect("owned");
    cache.forget_all().expect("an index");
    count
}

/// Tells of an engine that computes the whole conversation in that time.
fn computes_in(tier: &KvTier, took: Duration) {
    for _ in 0..16 {
        tier.computed((BLOCKS * TOKENS) as u64, took);
    }
}

#[test]
fn what_is_faster_computed_is_not_loaded() {
    let world = world(64, 64);
    let cache = cache(&world, PlaneOrder::BlockMajor, 16, 64);
    let slow = Arc::new(Slow { takes: SLOW, ..Slow::default() });
    let tier = tier(&cache, Arc::clone(&slow) as _, true);
    let tokens = save(&cache, &tier);
    assert_eq!((tier.last_choice(), tier.load_us_per_mib()), (None, None));
    assert_eq!(load(&cache, &tier, &tokens), BLOCKS, "what computing costs is not known yet");
    assert!(tier.load_us_per_mib().is_some_and(|us| us > 0.0), "it was read");
    assert!(tier.last_choice().is_some_and(|why| why.contains("nobody knows yet")));

    computes_in(&tier, Duration::from_nanos(1));
    assert_eq!(load(&cache, &tier, &tokens), 0);
    assert_eq!(*slow.reads.lock(), BLOCKS, "it was not asked again");
    let counts = tier.counts();
    assert_eq!((counts.looked_up, counts.loaded, counts.recomputed), (24, 12, 12));
    let why = tier.last_choice().expect("it was asked");
    assert!(why.contains("49 tokens are computed"), "{why}");

    // An engine that takes an hour for it has all of it loaded, however slow that is.
    computes_in(&tier, Duration::from_hours(1));
    assert_eq!(load(&cache, &tier, &tokens), BLOCKS);
    assert_eq!(tier.counts().recomputed, 12);
}

/// A disk joins as it is open at last: what was seen until then is not seen again for nothing.
#[test]
fn a_connection_that_takes_another_ones_place_knows_what_that_knew() {
    let world = world(64, 64);
    let cache = cache(&world, PlaneOrder::BlockMajor, 16, 64);
    let slow = Arc::new(Slow { takes: SLOW, ..Slow::default() });
    let before = tier(&cache, Arc::clone(&slow) as _, true);
    let tokens = save(&cache, &before);
    assert_eq!(load(&cache, &before, &tokens), BLOCKS);
    computes_in(&before, Duration::from_nanos(1));
    let host = Arc::new(HostTier::new(HostOptions::new(ByteCount::mib(64))));
    let tiers: Vec<Arc<dyn Store>> = vec![host as _, Arc::clone(&slow) as _];
    let stack: Arc<dyn Store> = Arc::new(Stack::new(tiers, StackOptions::default()).expect("threads"));
    let after = tier(&cache, stack, true);
    after.learn_from(&before);
    drop(before);
    let read = *slow.reads.lock();
    assert_eq!(load(&cache, &after, &tokens), 0, "{:?}", after.last_choice());
    assert_eq!(*slow.reads.lock(), read, "the slow one is not asked");
}

#[test]
fn who_does_not_choose_loads_all() {
    let world = world(64, 64);
    let cache = cache(&world, PlaneOrder::BlockMajor, 16, 64);
    let slow = Arc::new(Slow { takes: SLOW, ..Slow::default() });
    let tier = tier(&cache, slow, false);
    let tokens = save(&cache, &tier);
    computes_in(&tier, Duration::from_nanos(1));
    for _ in 0..2 {
        assert_eq!(load(&cache, &tier, &tokens), BLOCKS);
    }
    assert_eq!((tier.counts().recomputed, tier.last_choice()), (0, None));
}

#[test]
fn a_sequence_is_split_where_the_fast_tier_ends() {
    let world = world(64, 64);
    let cache = cache(&world, PlaneOrder::BlockMajor, 16, 64);
    let slow = Arc::new(Slow { takes: 10 * SLOW, ..Slow::default() });
    let learning = tier(&cache, Arc::clone(&slow) as _, false);
    let tokens = save(&cache, &learning);
    drop(learning);
    // Memory gets the first half as it is loaded.
    let host = Arc::new(HostTier::new(HostOptions::new(ByteCount::mib(64))));
    let tiers: Vec<Arc<dyn Store>> = vec![Arc::clone(&host) as _, Arc::clone(&slow) as _];
    let stack: Arc<dyn Store> = Arc::new(Stack::new(tiers, StackOptions::default()).expect("threads"));
    let tier = tier(&cache, stack, true);
    assert_eq!(load(&cache, &tier, &tokens[..BLOCKS / 2 * TOKENS]), BLOCKS / 2);
    until("memory has it", || host.usage().blocks == BLOCKS as u64 / 2);
    // Two threads read, so a block of the slow one takes 50 ms at least, of which half is believed at first; the engine takes 6.
    computes_in(&tier, Duration::from_millis(6 * BLOCKS as u64));
    let read = *slow.reads.lock();
    assert_eq!(load(&cache, &tier, &tokens), BLOCKS / 2, "{:?}", tier.last_choice());
    assert_eq!(*slow.reads.lock(), read, "the slow one is not asked");
    assert_eq!(tier.counts().recomputed, BLOCKS as u64 / 2);
}
