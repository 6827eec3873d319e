//! What a slow tier has comes up while its request waits, once for all who want it, and no further when it is taken back.

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
use shoal_core::kv::prefix::{Found, Start};
use shoal_memory::store::{
    Buffer, Fetched, HostOptions, HostTier, Offer, Promise, Stack, StackOptions, Store, StoreKey, Stored,
    Ticket, Verdict,
};
use shoal_memory::{KvCache, KvTier, KvTierOptions};

const BLOCKS: usize = 12;

/// A tier whose reads wait while it is closed.
#[derive(Debug, Default)]
struct Gated {
    kept: Mutex<HashMap<StoreKey, Vec<u8>>>,
    is_closed: Mutex<bool>,
    waiting: Mutex<Vec<(StoreKey, Buffer, Promise<Fetched>)>>,
    reads: Mutex<usize>,
}

impl Gated {
    fn read(&self, key: &StoreKey, mut target: Buffer) -> Fetched {
        let block = self.kept.lock()[key].clone();
        target.as_mut_slice().expect("its own")[..block.len()].copy_from_slice(&block);
        Fetched { buffer: target, bytes: block.len() }
    }

    fn open(&self) {
        let mut is_closed = self.is_closed.lock();
        *is_closed = false;
        for (key, target, promise) in self.waiting.lock().drain(..) {
            promise.answer(Ok(self.read(&key, target)));
        }
    }
}

impl Store for Gated {
    fn name(&self) -> &'static str {
        "gated"
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

    fn get(&self, key: StoreKey, target: Buffer, deadline: Duration) -> Ticket<Fetched> {
        *self.reads.lock() += 1;
        let is_closed = self.is_closed.lock();
        if *is_closed {
            let (ticket, promise) = Ticket::new(deadline);
            self.waiting.lock().push((key, target, promise));
            return ticket;
        }
        Ticket::ready(Ok(self.read(&key, target)))
    }

    fn remove(&self, key: StoreKey, _: Duration) -> Ticket<bool> {
        Ticket::ready(Ok(self.kept.lock().remove(&key).is_some()))
    }

    fn flush(&self, _: Duration) -> Ticket<()> {
        Ticket::ready(Ok(()))
    }
}

fn options() -> KvTierOptions {
    KvTierOptions { load_wait: WAIT, ..KvTierOptions::new(vec![("model".to_owned(), "a".to_owned())]) }
}

fn stack(host: &Arc<HostTier>, slow: &Arc<Gated>) -> Arc<Stack> {
    let tiers: Vec<Arc<dyn Store>> = vec![Arc::clone(host) as _, Arc::clone(slow) as _];
    Arc::new(Stack::new(tiers, StackOptions::default()).expect("threads"))
}

fn host() -> Arc<HostTier> {
    Arc::new(HostTier::new(HostOptions::new(ByteCount::mib(64))))
}

/// A cache that has forgotten a conversation of [`BLOCKS`] blocks, which the slow tier has.
fn forgotten(world: &common::World) -> (Arc<KvCache>, Arc<Gated>, Vec<u32>) {
    let cache = cache(world, PlaneOrder::BlockMajor, 16, 64);
    let (slow, tokens) =
        (Arc::new(Gated::default()), (0..62).collect::<Vec<u32>>()[..BLOCKS * TOKENS].to_vec());
    let tier = KvTier::new(&cache, stack(&host(), &slow), options()).expect("one group");
    let mut blocks = vec![0_u32; BLOCKS];
    assert!(cache.alloc(0, &mut blocks).expect("memory"));
    cache.seal(Start::Salt(b""), &tokens, &[&blocks]).expect("owned");
    tier.save(b"", &tokens, 0);
    assert!(tier.flush(WAIT));
    cache.free(0, &blocks).expect("owned");
    until("the slow tier has it", || slow.kept.lock().len() == BLOCKS);
    cache.forget_all().expect("an index");
    (cache, slow, tokens)
}

#[test]
fn what_a_slow_tier_has_is_in_the_fast_one_when_its_turn_comes() {
    let world = world(64, 64);
    let (cache, slow, tokens) = forgotten(&world);
    let host = host();
    let stack = stack(&host, &slow);
    let tier = KvTier::new(&cache, Arc::clone(&stack) as _, options()).expect("one group");
    let wish = tier.prefetch(b"", &tokens).expect("room");
    until("all of it is in memory", || host.usage().blocks == BLOCKS as u64);
    until("it is counted", || tier.counts().prefetched == BLOCKS as u64);
    assert_eq!(cache.usage().live, ByteCount::ZERO, "no block of the device is taken for it");
    *slow.is_closed.lock() = true;
    let blocks = tier.load(b"", &tokens, &[]);
    assert_eq!(blocks.len(), BLOCKS, "the slow tier is not asked any more");
    assert_eq!((*slow.reads.lock(), host.usage().hits), (BLOCKS, BLOCKS as u64));
    cache.free(0, &blocks).expect("owned");
    drop(wish);

    // What the device has is left where it is, and another tenant's is not touched.
    slow.open();
    assert!(tier.prefetch(b"", &tokens[..TOKENS - 1]).is_none(), "less than a block");
    let again = tier.prefetch(b"", &tokens).expect("room");
    let other = tier.prefetch(b"x", &tokens).expect("room");
    let mut found = Found::default();
    cache.find(b"", &tokens, &mut found).expect("an index");
    assert_eq!(found.groups[0].blocks.len(), BLOCKS);
    cache.free(0, &found.groups[0].blocks).expect("owned");
    drop((again, other, tier));
    assert_eq!(*slow.reads.lock(), BLOCKS);
}

#[test]
fn several_who_want_a_block_share_one_transfer() {
    let world = world(64, 64);
    let (cache, slow, tokens) = forgotten(&world);
    let stack = stack(&host(), &slow);
    let tier = Arc::new(KvTier::new(&cache, Arc::clone(&stack) as _, options()).expect("one group"));
    *slow.is_closed.lock() = true;
    let wish = tier.prefetch(b"", &tokens).expect("room");
    until("it has begun", || slow.waiting.lock().len() == BLOCKS);
    let loading = {
        let (tier, tokens) = (Arc::clone(&tier), tokens.clone());
        thread::spawn(move || tier.load(b"", &tokens, &[]))
    };
    until("the load waits for the same transfers", || stack.counts().shared == BLOCKS as u64);
    // The first to ask gives up, and takes nobody along.
    wish.cancel();
    slow.open();
    let blocks = loading.join().expect("it ends");
    assert_eq!((blocks.len(), *slow.reads.lock()), (BLOCKS, BLOCKS));
    cache.free(0, &blocks).expect("owned");
}

#[test]
fn what_is_taken_back_goes_no_further_and_what_waits_has_a_bound() {
    let world = world(64, 64);
    let (cache, slow, tokens) = forgotten(&world);
    let stack = stack(&host(), &slow);
    // Two blocks for one request.
    let block = cache.layout(0).expect("a group").block_bytes().0;
    let most = usize::try_from(block).expect("small") * 5 / 2;
    let options = KvTierOptions { prefetch_bytes_max: most, ..options() };
    let tier = KvTier::new(&cache, Arc::clone(&stack) as _, options).expect("one group");
    *slow.is_closed.lock() = true;
    let first = tier.prefetch(b"", &tokens).expect("room");
    until("it has begun", || slow.waiting.lock().len() == 2);
    let mut wishes: Vec<_> = std::iter::from_fn(|| tier.prefetch(b"", &tokens)).take(1000).collect();
    assert!((100..1000).contains(&wishes.len()), "{} wait", wishes.len());
    wishes.pop();
    wishes.push(tier.prefetch(b"", &tokens).expect("the place of one that was taken back"));
    wishes.clear();
    first.cancel();
    let last = tier.prefetch(b"", &tokens[..TOKENS]).expect("room");
    slow.open();
    until("the last one is done", || tier.counts().prefetched == 1 || stack.counts().tiers[0].promoted > 0);
    drop((last, tier));
    assert_eq!(*slow.reads.lock(), 2, "nothing was read for those that were taken back");
}
