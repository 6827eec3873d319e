//! A host tier in page-locked memory below a KV cache: blocks are copied from and to where they lie and verified beside the
//! copies; what is damaged there comes from the disk or is computed again.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::passing::passes_on;
use common::talks::{Dice, cache, options, serve, tier};
use common::{WAIT, World, open, world, world_on};
use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::PlaneOrder;
use shoal_core::kv::prefix::Found;
use shoal_device::{Device, FaultDevice, HostBuffer};
use shoal_memory::disk::{DiskOptions, DiskTier, FaultRates, SimDisk};
use shoal_memory::store::{
    AdmissionRule, Buffer, Fetched, Held, HostOptions, HostTier, Lent, Offer, Stack, StackOptions, Store,
    StoreKey, Stored, Ticket, Verdict,
};

fn locked(world: &World, mib: u64) -> Arc<HostTier> {
    Arc::new(HostTier::in_arena(HostOptions::new(ByteCount::mib(mib)), &world.manager))
}

fn disk_tier(disk: &SimDisk) -> Arc<DiskTier> {
    let options = DiskOptions {
        segment_bytes: ByteCount::mib(1),
        record_bytes: ByteCount(256 << 10),
        linger: Duration::from_micros(100),
        admission: AdmissionRule { uses_min: 1 },
        ..DiskOptions::default()
    };
    Arc::new(DiskTier::on_simulated(&[(disk.clone(), ByteCount::mib(16))], options).expect("options"))
}

fn stack(host: &Arc<HostTier>, disk: &Arc<DiskTier>) -> Arc<Stack> {
    let tiers: Vec<Arc<dyn Store>> = vec![Arc::clone(host) as _, Arc::clone(disk) as _];
    Arc::new(Stack::new(tiers, StackOptions::default()).expect("threads"))
}

/// Notes what is asked of a store.
#[derive(Debug)]
struct Spy<S> {
    store: Arc<S>,
    keys: Mutex<Vec<StoreKey>>,
    gets: Mutex<usize>,
    /// Puts of memory that was the store's own already.
    own_puts: Mutex<usize>,
}

impl<S: Store> Spy<S> {
    fn new(store: &Arc<S>) -> Arc<Self> {
        let (keys, gets, own_puts) = (Mutex::default(), Mutex::default(), Mutex::default());
        Arc::new(Self { store: Arc::clone(store), keys, gets, own_puts })
    }
}

impl<S: Store> Store for Spy<S> {
    passes_on!(contains, is_kept, would_rise, offer, hold, lend, room, is_own, remove, flush);

    fn name(&self) -> &str {
        self.store.name()
    }

    fn put(&self, key: StoreKey, source: Buffer, bytes: usize, deadline: Duration) -> Ticket<Stored> {
        self.keys.lock().push(key);
        if let Buffer::HostMut(view) = &source {
            *self.own_puts.lock() += usize::from(self.store.is_own(view.buffer()));
        }
        self.store.put(key, source, bytes, deadline)
    }

    fn get(&self, key: StoreKey, target: Buffer, deadline: Duration) -> Ticket<Fetched> {
        *self.gets.lock() += 1;
        self.store.get(key, target, deadline)
    }
}

#[test]
fn blocks_go_to_where_they_stay_and_come_from_there() {
    for (order, kib) in
        [(PlaneOrder::BlockMajor, 128), (PlaneOrder::LayerMajor, 128), (PlaneOrder::BlockMajor, 8)]
    {
        let world = world(64, 64);
        let (host, tokens) = (locked(&world, 16), (0..62).collect::<Vec<u32>>());
        let spy = Spy::new(&host);
        let cache = cache(&world, order, 16, kib);
        let tier = tier(&cache, Arc::clone(&spy) as _, "a");
        assert_eq!(serve(&cache, &tier, b"x", &tokens), Some((0, 0)));
        assert!(tier.flush(WAIT));
        assert_eq!(*spy.own_puts.lock(), 15, "the device copied them to where they stay");
        for _ in 0..3 {
            cache.forget_all().expect("an index");
            assert_eq!(serve(&cache, &tier, b"x", &tokens), Some((0, 15)));
        }
        assert_eq!(*spy.gets.lock(), 0, "nothing was copied in between");
        let (usage, counts) = (host.usage(), tier.counts());
        assert_eq!((usage.blocks, usage.hits, usage.corrupt), (15, 45, 0));
        assert_eq!((counts.saved, counts.loaded, counts.corrupt, counts.failed), (15, 45, 0, 0));
        assert!(counts.lookup_us + counts.read_us + counts.copy_us + counts.verify_us <= counts.load_us);
        // A slot is a block with its tokens, in whole units of a disk.
        assert_eq!(usage.bytes, 15 * u64::from(kib + 4) * 1024);
        for key in spy.keys.lock().iter() {
            assert_eq!(host.remove(*key, WAIT).wait(), Ok(true));
        }
        assert_eq!(host.usage().bytes, 0, "nobody has any of it");
        assert_eq!(cache.usage().live, ByteCount::ZERO);
        cache.check_invariants().expect("invariants");
        world.check();
    }
}

#[test]
fn what_is_damaged_in_memory_is_computed_again_and_no_more_than_that() {
    let world = world(64, 64);
    let (host, tokens) = (locked(&world, 16), (0..62).collect::<Vec<u32>>());
    let spy = Spy::new(&host);
    let cache = cache(&world, PlaneOrder::BlockMajor, 16, 128);
    let tier = tier(&cache, Arc::clone(&spy) as _, "a");
    assert_eq!(serve(&cache, &tier, b"x", &tokens), Some((0, 0)));
    assert!(tier.flush(WAIT));
    let keys = spy.keys.lock().clone();
    for (damaged, bit) in [(6, 77_777), (0, 0), (14, 128 * 1024 * 8 - 1)] {
        assert!(host.damage(&keys[damaged], bit));
        cache.forget_all().expect("an index");
        assert_eq!(serve(&cache, &tier, b"x", &tokens), Some((0, damaged)), "what comes before it");
        assert!(tier.flush(WAIT));
        cache.forget_all().expect("an index");
        assert_eq!(serve(&cache, &tier, b"x", &tokens), Some((0, 15)), "it was saved again");
    }
    assert_eq!((host.usage().corrupt, tier.counts().corrupt), (3, 3));
    assert_eq!(cache.usage().live, ByteCount::ZERO);
}

#[test]
fn what_is_damaged_in_memory_comes_from_the_disk() {
    let world = world(64, 64);
    let (host, disk) = (locked(&world, 16), disk_tier(&SimDisk::new(32 << 20, 1)));
    let (stack, tokens) = (stack(&host, &disk), (0..62).collect::<Vec<u32>>());
    let spy = Spy::new(&stack);
    let cache = cache(&world, PlaneOrder::BlockMajor, 16, 128);
    let tier = tier(&cache, Arc::clone(&spy) as _, "a");
    assert_eq!(serve(&cache, &tier, b"x", &tokens), Some((0, 0)));
    assert!(tier.flush(WAIT));
    let keys = spy.keys.lock().clone();
    for damaged in [6, 9] {
        assert!(host.damage(&keys[damaged], 4242));
    }
    cache.forget_all().expect("an index");
    assert_eq!(serve(&cache, &tier, b"x", &tokens), Some((0, 15)));
    assert_eq!((host.usage().corrupt, tier.counts().corrupt), (2, 0));
    let counts = stack.counts();
    assert_eq!((counts.tiers[0].hits, counts.tiers[1].hits), (13, 2));
}

#[test]
fn what_a_disk_gives_stays_in_memory_where_it_was_read_to() {
    let world = world(64, 64);
    let (disk, tokens) = (disk_tier(&SimDisk::new(32 << 20, 1)), (0..62).collect::<Vec<u32>>());
    let cache = cache(&world, PlaneOrder::BlockMajor, 16, 128);
    let first = tier(&cache, Arc::clone(&disk) as _, "a");
    assert_eq!(serve(&cache, &first, b"x", &tokens), Some((0, 0)));
    assert!(first.flush(WAIT));
    drop(first);
    let host = locked(&world, 16);
    let stack = stack(&host, &disk);
    let tier = tier(&cache, Arc::clone(&stack) as _, "a");
    for from_disk in [15, 0, 0] {
        let before = stack.counts().tiers[1].hits;
        cache.forget_all().expect("an index");
        assert_eq!(serve(&cache, &tier, b"x", &tokens), Some((0, 15)));
        assert_eq!(stack.counts().tiers[1].hits - before, from_disk);
        assert_eq!(host.usage().bytes, 15 * (132 << 10), "each once");
    }
    assert_eq!(stack.counts().tiers[0].promoted, 15);
    assert!(tier.counts().read_us > 0);
}

/// Two caches whose blocks are of other lengths share one tier.
#[test]
fn blocks_of_several_lengths_make_room_for_one_another() {
    let world = world(64, 64);
    let host = locked(&world, 8);
    let long = cache(&world, PlaneOrder::BlockMajor, 16, 512);
    let short = cache(&world, PlaneOrder::BlockMajor, 16, 8);
    let (of_long, of_short) =
        (tier(&long, Arc::clone(&host) as _, "a"), tier(&short, Arc::clone(&host) as _, "a"));
    for round in 0..4_u32 {
        let tokens: Vec<u32> = (0..40).map(|token| 1000 * round + token).collect();
        for (cache, tier) in [(&long, &of_long), (&short, &of_short)] {
            assert_eq!(serve(cache, tier, b"", &tokens), Some((0, 0)));
            assert!(tier.flush(WAIT));
            cache.forget_all().expect("an index");
            assert_eq!(serve(cache, tier, b"", &tokens), Some((0, 10)), "the newest are there");
            assert!(host.usage().bytes <= host.usage().bytes_max);
        }
    }
    assert_eq!((of_long.counts().unsaved, of_short.counts().unsaved), (0, 0));
    assert!(host.usage().evicted > 0);
}

/// Conversations over a memory that is too small for them and errs, and a disk that fails in every way.
#[test]
fn histories_give_right_blocks_only() {
    let histories = std::env::var("SHOAL_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let (mut lent, mut damaged, mut found) = (0, 0, 0);
    for seed in 0..histories {
        let mut dice = Dice(seed);
        let world = world(16, 64);
        let cache = cache(&world, PlaneOrder::BlockMajor, 4, 128);
        let disk = SimDisk::new(32 << 20, seed);
        if seed % 2 != 0 {
            let rate = u32::try_from(dice.below(60)).expect("small");
            let rates =
                FaultRates { read_error: rate, read_flip: rate, write_torn: rate, ..FaultRates::default() };
            disk.set_rates(rates);
        }
        let (host, below) = (locked(&world, 8), disk_tier(&disk));
        let spy = Spy::new(&stack(&host, &below));
        let tier = tier(&cache, Arc::clone(&spy) as _, "a");
        let mut talks: Vec<Vec<u32>> = Vec::new();
        for _ in 0..60 {
            match dice.below(12) {
                0 => cache.forget_all().expect("an index"),
                1 => {
                    // Not in time where the disk is set aside.
                    let _ = tier.flush(Duration::from_millis(100));
                }
                2 => {
                    let keys = spy.keys.lock();
                    if !keys.is_empty() {
                        let key = keys[usize::try_from(dice.below(keys.len() as u64)).expect("small")];
                        let bit = usize::try_from(dice.below(1 << 20)).expect("small");
                        damaged += u64::from(host.damage(&key, bit));
                    }
                }
                _ => {
                    if talks.is_empty() || dice.below(3) == 0 {
                        talks.push(vec![]);
                    }
                    let talk = usize::try_from(dice.below(talks.len() as u64)).expect("small");
                    let tokens = &mut talks[talk];
                    let more = dice.below(40);
                    tokens.extend((0..more).map(|_| u32::try_from(dice.below(3)).expect("small")));
                    tokens.truncate(100);
                    serve(&cache, &tier, b"", tokens);
                }
            }
            assert!(host.usage().bytes <= host.usage().bytes_max);
            cache.check_invariants().expect("invariants");
        }
        lent += spy.store.counts().tiers[0].hits;
        found += host.usage().corrupt;
        drop(tier);
        assert_eq!(cache.usage().live, ByteCount::ZERO, "history {seed}: nobody owns anything");
        world.check();
    }
    assert!(lent > 100 && found > 0 && found <= damaged, "{lent} from memory, {found} of {damaged} found");
}

/// The n-th call of the device fails while blocks are saved to page-locked memory and loaded from there, for every n.
#[test]
fn a_device_that_fails_at_any_call_costs_a_recompute() {
    let mut failures = 0;
    for n in 1..100_u64 {
        let dir = tempfile::tempdir().expect("a directory");
        let faults = FaultDevice::new(open(dir.path(), 64));
        let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 32, 64);
        let cache = cache(&world, PlaneOrder::LayerMajor, 16, 128);
        let host = locked(&world, 16);
        let tier = tier(&cache, Arc::clone(&host) as _, "a");
        let tokens: Vec<u32> = (0..40).collect();
        let before = faults.injected();
        // While a step runs nothing is copied, so the first call to fail is one of the copies'.
        let step = cache.region().guard(WAIT).expect("nothing is in its way");
        assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 0)));
        faults.fail_nth(n);
        drop(step);
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
        cache.trim(ByteCount(u64::MAX)).expect("the device works again");
        cache.check_invariants().expect("invariants");
        world.check();
        if !failed {
            break;
        }
        failures = n;
    }
    assert!(failures > 6, "only {failures} calls were ever failed");
}

#[test]
fn options_of_a_short_tier_give_ordinary_memory() {
    let world = world(64, 64);
    let host = locked(&world, 7);
    assert!(host.room(4096).is_none());
    let cache = cache(&world, PlaneOrder::BlockMajor, 16, 128);
    let tier = shoal_memory::KvTier::new(&cache, Arc::clone(&host) as _, options("a")).expect("one group");
    let tokens: Vec<u32> = (0..40).collect();
    assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 0)));
    assert!(tier.flush(WAIT));
    cache.forget_all().expect("an index");
    assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 10)));
}
