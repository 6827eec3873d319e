//! What nobody used for a while leaves the device once a tier has it, and comes back; what no tier has stays.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::talks::{TOKENS, cache};
use common::{WAIT, until, world};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::PlaneOrder;
use shoal_core::kv::prefix::{Found, Start};
use shoal_memory::store::{HostOptions, HostTier, Store};
use shoal_memory::{KvCache, KvTier, KvTierOptions};

const IDLE: Duration = Duration::from_millis(50);

fn tier(cache: &Arc<KvCache>, host: &Arc<HostTier>, idle: Option<Duration>) -> KvTier {
    let facts = vec![("model".to_owned(), "a".to_owned())];
    let options = KvTierOptions { load_wait: WAIT, idle, ..KvTierOptions::new(facts) };
    KvTier::new(cache, Arc::clone(host) as Arc<dyn Store>, options).expect("one group")
}

fn host(mib: u64) -> Arc<HostTier> {
    Arc::new(HostTier::new(HostOptions::new(ByteCount::mib(mib))))
}

/// Computes, seals, saves and lets go of a conversation.
fn converse(cache: &KvCache, tier: &KvTier, tokens: &[u32]) {
    let mut blocks = vec![0_u32; tokens.len() / TOKENS];
    assert!(cache.alloc(0, &mut blocks).expect("memory"));
    cache.seal(Start::Salt(b""), tokens, &[&blocks]).expect("owned");
    tier.save(b"", tokens, 0);
    cache.free(0, &blocks).expect("owned");
}

/// Blocks of it that the device has.
fn on_device(cache: &KvCache, tokens: &[u32]) -> usize {
    let mut found = Found::default();
    cache.find(b"", tokens, &mut found).expect("an index");
    cache.free(0, &found.groups[0].blocks).expect("owned");
    found.groups[0].blocks.len()
}

#[test]
fn what_is_idle_leaves_the_device_and_comes_back() {
    let world = world(64, 64);
    let (cache, host) = (cache(&world, PlaneOrder::BlockMajor, 32, 512), host(64));
    let tier = tier(&cache, &host, Some(IDLE));
    let tokens: Vec<u32> = (0..48).collect();
    converse(&cache, &tier, &tokens);
    until("it has left the device", || tier.counts().demoted == 12);
    until("its memory is given back", || cache.usage().mapped == ByteCount::ZERO);
    assert_eq!((on_device(&cache, &tokens), host.usage().blocks), (0, 12));
    let blocks = tier.load(b"", &tokens, &[]);
    assert_eq!(blocks.len(), 12);
    cache.free(0, &blocks).expect("owned");
    cache.check_invariants().expect("it holds");
}

#[test]
fn what_is_owned_or_has_no_copy_stays() {
    let world = world(64, 64);
    // Memory for two blocks of 512 KiB and what belongs to them: never for all of it.
    let (cache, host) = (cache(&world, PlaneOrder::BlockMajor, 32, 512), host(2));
    let tier = tier(&cache, &host, Some(IDLE));
    let tokens: Vec<u32> = (0..48).collect();
    converse(&cache, &tier, &tokens);
    // It was offered twice, so it was looked at after it was idle.
    until("it was offered again", || host.usage().written > 12);
    assert!(tier.flush(WAIT));
    assert_eq!((tier.counts().demoted, on_device(&cache, &tokens)), (0, 12));

    let large = self::host(64);
    let second = self::tier(&cache, &large, Some(IDLE));
    let mut found = Found::default();
    cache.find(b"", &tokens, &mut found).expect("an index");
    second.save(b"", &tokens, 0);
    until("all of it is in memory", || large.usage().blocks == 12);
    let other: Vec<u32> = (100..108).collect();
    converse(&cache, &second, &other);
    until("what nobody owns has left", || second.counts().demoted == 2);
    assert_eq!(on_device(&cache, &tokens), 12, "somebody owns it");
    // It was looked at while it had an owner, and is again.
    thread::sleep(2 * IDLE);
    cache.free(0, &found.groups[0].blocks).expect("owned");
    until("it leaves when nobody does", || second.counts().demoted == 14);
}

#[test]
fn no_time_at_all_is_a_short_one() {
    let world = world(64, 64);
    let (cache, host) = (cache(&world, PlaneOrder::BlockMajor, 32, 512), host(64));
    let tier = tier(&cache, &host, Some(Duration::ZERO));
    let tokens: Vec<u32> = (0..16).collect();
    let mut blocks = vec![0_u32; 4];
    assert!(cache.alloc(0, &mut blocks).expect("memory"));
    cache.seal(Start::Salt(b""), &tokens, &[&blocks]).expect("owned");
    tier.save(b"", &tokens, 0);
    until("it is saved", || host.usage().blocks == 4);
    // Somebody has them: that is asked now and then, and other work goes on.
    let other: Vec<u32> = (100..108).collect();
    converse(&cache, &tier, &other);
    until("the other one has left", || tier.counts().demoted == 2);
    cache.free(0, &blocks).expect("owned");
    until("it leaves when nobody has it", || tier.counts().demoted == 6);
}

#[test]
fn without_an_idle_time_nothing_leaves() {
    let world = world(64, 64);
    let (cache, host) = (cache(&world, PlaneOrder::BlockMajor, 32, 512), host(64));
    let (never, soon) = (tier(&cache, &host, None), tier(&cache, &host, Some(IDLE)));
    let (kept, gone): (Vec<u32>, Vec<u32>) = ((0..16).collect(), (100..116).collect());
    converse(&cache, &never, &kept);
    converse(&cache, &soon, &gone);
    until("the other one has left", || soon.counts().demoted == 4);
    assert_eq!((never.counts().demoted, on_device(&cache, &kept)), (0, 4));
}
