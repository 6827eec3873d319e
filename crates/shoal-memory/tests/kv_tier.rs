//! What a KV cache forgets comes back from a tier, right or not at all: histories with faults of disk and device, tiers that
//! hang or lie, and whose blocks are whose.

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use common::talks::{Dice, cache, content, options, serve, tier};
use common::{WAIT, World, open, world, world_on};
use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::PlaneOrder;
use shoal_core::kv::prefix::Found;
use shoal_core::protocol::KvTierCounts;
use shoal_device::{Device, FaultDevice};
use shoal_memory::disk::{DiskOptions, DiskTier, FaultRates, SimDisk};
use shoal_memory::store::{
    AdmissionRule, Buffer, Fetched, Miss, Offer, Promise, Store, StoreKey, Stored, Ticket, Verdict,
};
use shoal_memory::{KvCache, KvTier, KvTierOptions};

const ALL: ByteCount = ByteCount(u64::MAX);

fn disk_options() -> DiskOptions {
    DiskOptions {
        segment_bytes: ByteCount::mib(1),
        record_bytes: ByteCount(256 << 10),
        linger: Duration::from_micros(100),
        admission: AdmissionRule { uses_min: 1 },
        ..DiskOptions::default()
    }
}

fn disk_tier(disk: &SimDisk) -> Arc<DiskTier> {
    Arc::new(DiskTier::on_simulated(&[(disk.clone(), ByteCount::mib(16))], disk_options()).expect("options"))
}

#[test]
fn what_was_forgotten_comes_back_for_its_own_tenant_and_model() {
    for (order, kib) in
        [(PlaneOrder::BlockMajor, 128), (PlaneOrder::LayerMajor, 128), (PlaneOrder::BlockMajor, 8)]
    {
        let world = world(64, 64);
        let (disk, tokens) = (SimDisk::new(32 << 20, 1), (0..62).collect::<Vec<u32>>());
        let cache = cache(&world, order, 16, kib);
        let store = disk_tier(&disk);
        let first = tier(&cache, Arc::clone(&store) as _, "a");
        assert_eq!(serve(&cache, &first, b"x", &tokens), Some((0, 0)));
        assert!(first.flush(WAIT));
        assert_eq!(serve(&cache, &first, b"x", &tokens), Some((15, 0)), "the device still has it");
        cache.forget_all().expect("an index");
        assert_eq!(serve(&cache, &first, b"x", &tokens), Some((0, 15)));
        assert_eq!(serve(&cache, &first, b"x", &tokens), Some((15, 0)), "it is sealed again");
        let counts = first.counts();
        assert_eq!((counts.saved, counts.loaded, counts.looked_up), (15, 15, 30));
        assert_eq!(counts.loaded_bytes, ByteCount(cache.layout(0).expect("a group").block_bytes().0 * 15));

        cache.forget_all().expect("an index");
        assert_eq!(serve(&cache, &first, b"y", &tokens), Some((0, 0)), "another tenant's");
        let other = tier(&cache, Arc::clone(&store) as _, "b");
        cache.forget_all().expect("an index");
        assert_eq!(serve(&cache, &other, b"x", &tokens), Some((0, 0)), "another model's");
        cache.forget_all().expect("an index");
        // What branches off has the blocks before in common.
        let branch: Vec<u32> =
            tokens.iter().map(|token| if *token < 30 { *token } else { 100 + token }).collect();
        assert_eq!(serve(&cache, &first, b"x", &branch), Some((0, 7)));
        drop((first, other));
        assert!(store.close(WAIT));
        drop(store);

        // After a restart.
        let again = tier(&cache, disk_tier(&disk), "a");
        cache.forget_all().expect("an index");
        assert_eq!(serve(&cache, &again, b"x", &tokens), Some((0, 15)));
        assert_eq!(cache.usage().live, ByteCount::ZERO, "nobody owns anything");
        cache.check_invariants().expect("invariants");
        world.check();
    }
}

/// As when a model is put to sleep a moment after an answer, and asked again: somebody's block went to host memory then.
#[test]
fn a_cache_that_was_evicted_with_owned_blocks_is_loaded_to() {
    let world = world(64, 64);
    let tokens = (0..62).collect::<Vec<u32>>();
    let cache = cache(&world, PlaneOrder::BlockMajor, 16, 128);
    let tier = tier(&cache, disk_tier(&SimDisk::new(32 << 20, 1)), "a");
    assert_eq!(serve(&cache, &tier, b"x", &tokens), Some((0, 0)));
    assert!(tier.flush(WAIT));
    cache.forget_all().expect("an index");
    let mut owned = [0; 2];
    assert!(cache.alloc(0, &mut owned).expect("memory"));
    world.manager.reclaim(ALL, WAIT, "a sleep").expect("room on the host");
    assert!(!cache.region().missing_bytes().is_zero(), "nothing is tested");
    assert_eq!(serve(&cache, &tier, b"x", &tokens), Some((0, 15)));
    assert_eq!(tier.counts().failed, 0);
    cache.free(0, &owned).expect("owned");
}

#[test]
fn only_what_lacks_a_block_in_between_is_computed_again() {
    let world = world(64, 64);
    let (cache, disk) = (cache(&world, PlaneOrder::BlockMajor, 16, 128), SimDisk::new(32 << 20, 1));
    let (tier, tokens) = (tier(&cache, disk_tier(&disk), "a"), (0..40).collect::<Vec<u32>>());
    assert_eq!(serve(&cache, &tier, b"", &tokens[..20]), Some((0, 0)));
    assert!(tier.flush(WAIT));
    // The second half of it is damaged where it lies.
    disk.with_bytes(|bytes| {
        let marks: Vec<u8> = content(b"", &tokens, 2, 64);
        let at = bytes.chunks(4096).position(|unit| unit.starts_with(&marks)).expect("it lies there");
        bytes[4096 * at + 100] ^= 1;
    });
    cache.forget_all().expect("an index");
    assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 2)));
    assert_eq!((tier.counts().corrupt, tier.counts().loaded), (1, 2));
    // And saved again.
    assert!(tier.flush(WAIT));
    cache.forget_all().expect("an index");
    assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 10)));
}

/// A tier that does with reads what a test wants.
#[derive(Debug)]
struct Odd {
    kept: Mutex<HashMap<StoreKey, Vec<u8>>>,
    /// From this read on.
    from: usize,
    reads: Mutex<usize>,
    kind: Kind,
    /// Never kept.
    promises: Mutex<Vec<Promise<Fetched>>>,
}

impl Odd {
    fn new(kind: Kind, from: usize) -> Self {
        Self { kept: Mutex::default(), from, reads: Mutex::default(), kind, promises: Mutex::default() }
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Hangs,
    Fails,
    IsOfAnotherLength,
    GivesAnotherBlock,
}

impl Store for Odd {
    fn name(&self) -> &'static str {
        "odd"
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

    fn get(&self, key: StoreKey, mut target: Buffer, deadline: Duration) -> Ticket<Fetched> {
        let kept = self.kept.lock();
        let mut block = kept[&key].clone();
        let mut reads = self.reads.lock();
        *reads += 1;
        if *reads > self.from {
            match self.kind {
                Kind::Hangs => {
                    let (ticket, promise) = Ticket::new(deadline);
                    self.promises.lock().push(promise);
                    return ticket;
                }
                Kind::Fails => {
                    return Ticket::ready(Err(Miss::Failed {
                        doing: "reading",
                        reason: "it is broken".to_owned(),
                    }));
                }
                Kind::IsOfAnotherLength => {
                    block.truncate(block.len() / 2);
                }
                Kind::GivesAnotherBlock => {
                    let (_, another) = kept.iter().find(|(other, _)| **other != key).expect("another");
                    block.clone_from(another);
                }
            }
        }
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

#[test]
fn a_tier_that_hangs_fails_or_lies_costs_a_recompute() {
    for (kind, from) in [Kind::Hangs, Kind::Fails, Kind::IsOfAnotherLength, Kind::GivesAnotherBlock]
        .into_iter()
        .flat_map(|kind| [(kind, 0), (kind, 3)])
    {
        let world = world(64, 64);
        let cache = cache(&world, PlaneOrder::BlockMajor, 16, 128);
        let odd = Odd::new(kind, from);
        // What never comes costs all of it; what does is not to be late on a busy machine.
        let load_wait = if matches!(kind, Kind::Hangs) { Duration::from_secs(5) } else { WAIT };
        let tier = KvTier::new(&cache, Arc::new(odd), KvTierOptions { load_wait, ..options("a") })
            .expect("one group");
        let tokens: Vec<u32> = (0..40).collect();
        assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 0)));
        assert!(tier.flush(WAIT));
        cache.forget_all().expect("an index");
        assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, from)), "{kind:?}");
        let KvTierCounts { late, failed, corrupt, loaded, .. } = tier.counts();
        let expected = match kind {
            Kind::Hangs => (1, 0, 0),
            Kind::Fails => (0, 1, 0),
            Kind::IsOfAnotherLength | Kind::GivesAnotherBlock => (0, 0, 1),
        };
        assert_eq!(
            (late, failed, corrupt, loaded),
            (expected.0, expected.1, expected.2, from as u64),
            "{kind:?}"
        );
        assert_eq!(cache.usage().live, ByteCount::ZERO);
        cache.check_invariants().expect("invariants");
    }
}

/// Conversations that grow and branch, on a small device and a disk that fails in every way, with restarts in between.
#[test]
fn histories_give_right_blocks_only() {
    let histories = std::env::var("SHOAL_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    let (mut loaded, mut corrupt) = (0, 0);
    for seed in 0..histories {
        let mut dice = Dice(seed);
        let world = world(16, 64);
        let cache = cache(&world, PlaneOrder::BlockMajor, 4, 128);
        let disk = SimDisk::new(32 << 20, seed);
        if seed % 3 != 0 {
            let rate = u32::try_from(dice.below(60)).expect("small");
            disk.set_rates(FaultRates {
                read_error: rate,
                read_short: rate,
                read_flip: rate,
                write_error: rate / 2,
                write_short: rate / 2,
                write_torn: rate,
                write_astray: rate / 4,
                write_flip: rate,
                sync_error: rate / 4,
                ..FaultRates::default()
            });
        }
        let mut store = disk_tier(&disk);
        let mut now = tier(&cache, Arc::clone(&store) as _, "a");
        let mut talks: Vec<(u8, Vec<u32>)> = Vec::new();
        for _ in 0..40 {
            match dice.below(12) {
                0 => {
                    cache.trim_cached(ALL).expect("no step runs");
                }
                1 => {
                    let (before, was) = (store.clone(), now.counts());
                    loaded += was.loaded;
                    corrupt += was.corrupt;
                    drop(now);
                    drop(store);
                    before.close(WAIT);
                    drop(before);
                    store = disk_tier(&disk);
                    now = tier(&cache, Arc::clone(&store) as _, "a");
                }
                2 => cache.forget_all().expect("an index"),
                3 => {
                    // Not in time where the disk is set aside.
                    let _ = now.flush(Duration::from_millis(100));
                }
                _ => {
                    if talks.is_empty() || dice.below(4) == 0 {
                        talks.push((u8::try_from(dice.below(2)).expect("small"), vec![]));
                    }
                    let talk = usize::try_from(dice.below(talks.len() as u64)).expect("small");
                    let (salt, tokens) = &mut talks[talk];
                    let more = dice.below(30);
                    tokens.extend((0..more).map(|_| u32::try_from(dice.below(3)).expect("small")));
                    tokens.truncate(100);
                    serve(&cache, &now, &[*salt], tokens);
                }
            }
            cache.check_invariants().expect("invariants");
        }
        let was = now.counts();
        loaded += was.loaded;
        corrupt += was.corrupt;
        drop(now);
        assert_eq!(cache.usage().live, ByteCount::ZERO, "history {seed}: nobody owns anything");
        world.check();
    }
    assert!(loaded > 100 && corrupt > 0, "{loaded} loaded, {corrupt} damaged");
}

/// The n-th call of the device fails while blocks are saved and loaded, for every n.
#[test]
fn a_device_that_fails_at_any_call_costs_a_recompute() {
    let mut failures = 0;
    for n in 1..100_u64 {
        let dir = tempfile::tempdir().expect("a directory");
        let faults = FaultDevice::new(open(dir.path(), 64));
        let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 32, 64);
        let cache = cache(&world, PlaneOrder::LayerMajor, 16, 128);
        let odd = Odd::new(Kind::Fails, usize::MAX);
        let tier = tier(&cache, Arc::new(odd), "a");
        let tokens: Vec<u32> = (0..40).collect();
        assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 0)));
        let before = faults.injected();
        faults.fail_nth(n);
        assert!(tier.flush(WAIT));
        cache.forget_all().expect("an index");
        let mut found = Found::default();
        cache.find(b"", &tokens, &mut found).expect("an index");
        let loaded = tier.load(b"", &tokens, &[]);
        let failed = faults.injected() > before;
        faults.heal();
        cache.free(0, &loaded).expect("owned");
        cache.forget_all().expect("an index");
        assert!(serve(&cache, &tier, b"", &tokens).is_some(), "call {n}");
        assert!(tier.flush(WAIT));
        cache.forget_all().expect("an index");
        assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 10)), "call {n}");
        assert_eq!(cache.usage().live, ByteCount::ZERO);
        cache.trim(ALL).expect("the device works again");
        cache.check_invariants().expect("invariants");
        world.check();
        if !failed {
            break;
        }
        failures = n;
    }
    assert!(failures > 3, "only {failures} calls were ever failed");
}

/// A cache of blocks of half a MiB, and a tier that keeps what it is given.
fn saving(world: &World, save_wait: Duration) -> (Arc<KvCache>, Arc<KvTier>) {
    let cache = cache(world, PlaneOrder::BlockMajor, 16, 512);
    let options = KvTierOptions { save_wait, ..options("a") };
    let tier = KvTier::new(&cache, Arc::new(Odd::new(Kind::Fails, usize::MAX)), options).expect("one group");
    (cache, Arc::new(tier))
}

#[test]
fn what_cannot_be_copied_now_is_copied_later() {
    let world = world(64, 64);
    let (cache, tier) = saving(&world, WAIT);
    let tokens: Vec<u32> = (0..80).collect();
    // A step runs, and nobody has told when it ends.
    let step = cache.region().guard(WAIT).expect("nothing is in its way");
    assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 0)));
    assert!(!tier.flush(Duration::from_millis(200)), "it waits for the step");
    drop(step);
    assert!(tier.flush(WAIT));
    assert_eq!((tier.counts().saved, tier.counts().unsaved), (20, 0));
}

#[test]
fn what_is_discarded_is_not_saved_although_its_turn_had_come() {
    let world = world(64, 64);
    let (cache, tier) = saving(&world, WAIT);
    let tokens: Vec<u32> = (0..80).collect();
    let step = cache.region().guard(WAIT).expect("nothing is in its way");
    assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 0)));
    assert!(!tier.flush(Duration::from_millis(200)), "it waits for the step");
    tier.discard_queued();
    drop(step);
    assert!(tier.flush(WAIT));
    assert_eq!(tier.counts().saved, 0);
    tier.save(b"", &tokens, 0);
    assert!(tier.flush(WAIT));
    assert_eq!(tier.counts().saved, 20, "what is queued later is");
}

#[test]
fn all_that_is_given_up_is_counted() {
    let world = world(64, 64);
    let (cache, tier) = saving(&world, Duration::ZERO);
    let tokens: Vec<u32> = (0..80).collect();
    let step = cache.region().guard(WAIT).expect("nothing is in its way");
    assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 0)));
    // More than what is copied at a time.
    assert!(tier.flush(WAIT));
    assert_eq!((tier.counts().saved, tier.counts().unsaved), (0, 20));
    drop(step);
    tier.save(b"", &tokens, 0);
    assert!(tier.flush(WAIT));
    assert_eq!(tier.counts().saved, 20, "nothing is wrong with it any more");
}

#[test]
fn what_is_saved_goes_before_what_is_not() {
    let world = world(64, 64);
    let (cache, tier) = saving(&world, WAIT);
    let [old, new, more] = [0, 100, 200].map(|from| (from..from + 40).collect::<Vec<u32>>());
    assert_eq!(serve(&cache, &tier, b"", &old), Some((0, 0)));
    assert!(tier.flush(WAIT));
    let step = cache.region().guard(WAIT).expect("nothing is in its way");
    assert_eq!(serve(&cache, &tier, b"", &new), Some((0, 0)));
    assert_eq!(serve(&cache, &tier, b"", &old), Some((10, 0)), "it was used last");
    // As long as something is cached, that goes before more memory is asked for.
    let mut others = vec![0_u32; 8];
    assert!(cache.alloc(0, &mut others).expect("room is made"));
    cache.free(0, &others).expect("owned");
    drop(step);
    assert!(tier.flush(WAIT));
    assert_eq!(
        (tier.counts().saved, tier.counts().unsaved),
        (20, 0),
        "what was not saved yet has waited for it"
    );
    // Once it is saved it goes like others.
    assert_eq!(serve(&cache, &tier, b"", &more), Some((0, 0)));
    assert!(tier.flush(WAIT));
    assert!(cache.alloc(0, &mut [0_u32; 20]).expect("room is made"));
    cache.check_invariants().expect("invariants");
}

#[test]
fn a_conversation_that_goes_on_waits_once() {
    let world = world(64, 64);
    let cache = cache(&world, PlaneOrder::BlockMajor, 16, 8);
    // Room for the longest of them, and for one more.
    let options = KvTierOptions { save_wait: WAIT, queued_tokens_max: 104, ..options("a") };
    let tier = KvTier::new(&cache, Arc::new(Odd::new(Kind::Fails, usize::MAX)), options).expect("one group");
    let tokens: Vec<u32> = (0..100).collect();
    let step = cache.region().guard(WAIT).expect("nothing is in its way");
    // The first one is at its turn and waits for the step.
    assert_eq!(serve(&cache, &tier, b"", &[7; 4]), Some((0, 0)));
    for end in (4..=100).step_by(4) {
        assert_eq!(serve(&cache, &tier, b"", &tokens[..end]), Some((end / 4 - 1, 0)));
    }
    drop(step);
    assert!(tier.flush(WAIT));
    assert_eq!((tier.counts().saved, tier.counts().unsaved), (26, 0));
}
