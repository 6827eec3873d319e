//! Threads that do everything to one KV cache at once, many seeds: nobody is given another's block, nobody waits for ever,
//! and when all are done the figures add up.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{WAIT, World, keeping, open, pooled_world_on};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::{Found, Start};
use shoal_core::kv::reuse::ReuseOptions;
use shoal_memory::{ErrorKind, KvCache, KvCacheSpec, MemoryError};

const ALL: ByteCount = ByteCount(u64::MAX);
const SEEDS: u64 = 30;
const ROUNDS: usize = 120;
const BLOCKS: usize = 96;
const BLOCK_BYTES: u64 = 256 << 10;

struct Random(u64);

impl Random {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % most
    }
}

/// Groups that share the memory of one group's blocks: each may take all of it from the others.
fn scene(groups: usize) -> (World, Arc<KvCache>) {
    let dir = tempfile::tempdir().expect("a directory");
    let device = open(dir.path(), 64);
    let world = pooled_world_on(dir, device, 20, 64, keeping(4));
    let shape = BlockShape::Latent { tokens: 2, dim: 64 << 10 };
    let group = |name: usize| GroupSpec { name: name.to_string(), layers: 2, shape, element_bytes: 1 };
    let bytes = ByteCount(BLOCKS as u64 * BLOCK_BYTES);
    let (order, granule_bytes_max) = (PlaneOrder::BlockMajor, ByteCount::mib(4));
    let spec = CacheSpec { groups: (0..groups).map(group).collect(), order, bytes, granule_bytes_max };
    let mut spec = KvCacheSpec::new("kv", spec);
    spec.reuse = Some(ReuseOptions::default());
    spec.patience = Duration::from_millis(20);
    let cache = Arc::new(world.manager.kv_cache(spec).expect("addresses"));
    (world, cache)
}

/// What may be in the way of an operation here, where no device call fails.
fn may_be_busy<T>(outcome: Result<T, MemoryError>) {
    if let Err(error) = outcome {
        let may = matches!(error.kind(), ErrorKind::Lease | ErrorKind::Transfer | ErrorKind::HostBudget)
            || error.to_string().contains("on the host");
        assert!(may, "{error} ({error:?})");
    }
}

/// Who owns which block of which group alone.
struct Marks(Vec<Vec<AtomicU32>>);

impl Marks {
    fn new(groups: usize) -> Self {
        Self((0..groups).map(|_| (0..BLOCKS).map(|_| AtomicU32::new(0)).collect()).collect())
    }

    fn mark(&self, me: u32, held: &Held) {
        for (group, id) in held.all() {
            let before = self.0[group][id as usize].swap(me, Ordering::AcqRel);
            assert_eq!(before, 0, "block {id} of group {group} is {before}'s, and was given to {me}");
        }
    }

    fn unmark(&self, held: &Held) {
        for (group, id) in held.all() {
            self.0[group][id as usize].store(0, Ordering::Release);
        }
    }
}

/// As many blocks of each group.
struct Held(Vec<Vec<u32>>);

impl Held {
    fn all(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        self.0.iter().enumerate().flat_map(|(group, ids)| ids.iter().map(move |id| (group, *id)))
    }

    /// Of every group, or of none. That is never an error where no device call fails.
    fn take(cache: &KvCache, groups: usize, count: usize) -> Option<Self> {
        let mut held = Self(vec![Vec::new(); groups]);
        for group in 0..groups {
            let mut ids = vec![0; count];
            if !cache.alloc(group, &mut ids).expect("not now is no error") {
                held.free(cache);
                return None;
            }
            held.0[group] = ids;
        }
        Some(held)
    }

    fn free(&self, cache: &KvCache) {
        for (group, ids) in self.0.iter().enumerate() {
            cache.free(group, ids).expect("owned");
        }
    }
}

/// Takes, shares, seals, finds and gives back. Who owns a block alone marks it; nobody else may own it then.
fn use_blocks(me: u32, seed: u64, cache: &KvCache, marks: &Marks) {
    let (mut random, groups) = (Random(seed ^ u64::from(me)), marks.0.len());
    let mut held: Vec<Held> = Vec::new();
    for round in 0..ROUNDS {
        match random.below(6) {
            0..=2 => {
                let count = 1 + random.below(12 / groups);
                if let Some(taken) = Held::take(cache, groups, count) {
                    marks.mark(me, &taken);
                    held.push(taken);
                }
            }
            3 if !held.is_empty() => {
                let one = held.swap_remove(random.below(held.len()));
                let tokens: Vec<u32> = (0..2 * u32::try_from(one.0[0].len()).expect("few")).collect();
                let salt = [u8::try_from(me).expect("few"), u8::try_from(round % 3).expect("few")];
                // From here on others may find them: they are nobody's alone.
                marks.unmark(&one);
                let lists: Vec<&[u32]> = one.0.iter().map(Vec::as_slice).collect();
                cache.seal(Start::Salt(&salt), &tokens, &lists).expect("owned");
                one.free(cache);
            }
            4 => {
                let (salt, mut found) = ([u8::try_from(me).expect("few"), 0], Found::default());
                cache.find(&salt, &[0, 1, 2, 3, 4, 5], &mut found).expect("an index");
                for (group, part) in found.groups.iter().enumerate() {
                    cache.fork(group, &part.blocks).expect("just found");
                    cache.free(group, &part.blocks).expect("owned twice");
                    cache.free(group, &part.blocks).expect("owned");
                }
            }
            _ if !held.is_empty() => {
                let one = held.swap_remove(random.below(held.len()));
                marks.unmark(&one);
                one.free(cache);
            }
            _ => {}
        }
    }
    for one in held {
        marks.unmark(&one);
        one.free(cache);
    }
}

/// Takes memory away and gives it back, until the others are done.
fn disturb(seed: u64, groups: usize, world: &World, cache: &KvCache, running: &AtomicUsize) {
    let mut random = Random(seed);
    while running.load(Ordering::Acquire) > 0 {
        match random.below(6) {
            0 => may_be_busy(cache.trim(ALL)),
            1 => may_be_busy(world.manager.reclaim(ByteCount::mib(4), WAIT, "a test")),
            2 => cache
                .hint(random.below(groups), u32::try_from(random.below(40)).expect("few"))
                .expect("a group"),
            3 => {
                let mib = 4 + u64::try_from(random.below(20)).expect("few");
                cache.set_limit(ByteCount::mib(mib), None).expect("below the reservation");
            }
            4 => may_be_busy(world.manager.guard(Duration::from_millis(50)).map(drop)),
            _ => drop(cache.usage()),
        }
    }
}

fn all_at_once(groups: usize) {
    for seed in 1..=SEEDS {
        let (world, cache) = scene(groups);
        let world = Arc::new(world);
        let marks = Arc::new(Marks::new(groups));
        let running = Arc::new(AtomicUsize::new(4));
        let users = (1..=4_u32).map(|me| {
            let (cache, marks, running) = (Arc::clone(&cache), Arc::clone(&marks), Arc::clone(&running));
            thread::spawn(move || {
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    use_blocks(me, seed * 1000, &cache, &marks);
                }));
                running.fetch_sub(1, Ordering::AcqRel);
                if let Err(panic) = outcome {
                    std::panic::resume_unwind(panic);
                }
            })
        });
        let mut threads: Vec<_> = users.collect();
        threads.push({
            let (world, cache, running) = (Arc::clone(&world), Arc::clone(&cache), Arc::clone(&running));
            thread::spawn(move || disturb(seed, groups, &world, &cache, &running))
        });
        for thread in threads {
            thread.join().unwrap_or_else(|_| panic!("seed {seed}"));
        }
        let deadline = Instant::now() + WAIT;
        while let Err(wrong) = cache.check_invariants() {
            assert!(Instant::now() < deadline, "seed {seed}: {wrong}");
            thread::sleep(Duration::from_millis(1));
        }
        cache.set_limit(ByteCount(BLOCKS as u64 * BLOCK_BYTES), None).expect("all of it");
        let usage = cache.usage();
        assert_eq!(usage.live, ByteCount::ZERO, "seed {seed}");
        cache.forget_all().expect("an index");
        while !cache.usage().mapped.is_zero() {
            assert!(Instant::now() < deadline, "seed {seed}: {:?} stays", cache.usage());
            may_be_busy(cache.trim(ALL));
        }
        drop(cache);
        world.manager.reclaim(ALL, WAIT, "the end").expect("no step runs");
        world.check();
        assert_eq!(world.device_used(), ByteCount::ZERO, "seed {seed}");
    }
}

#[test]
fn threads_that_do_everything_at_once_end_with_figures_that_add_up() {
    all_at_once(1);
}

#[test]
fn so_do_those_whose_groups_take_memory_from_one_another() {
    all_at_once(2);
}
