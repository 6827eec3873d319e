//! Loads beside an engine that goes on: what comes is right and whose it is, whatever runs, ends or moves meanwhile.

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::talks::{Dice, TOKENS, cache, content, options, pieces, read, serve, tier};
use common::{WAIT, World, until, world};
use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::PlaneOrder;
use shoal_core::kv::prefix::{Found, Start};
use shoal_device::{DeviceKind, Stream};
use shoal_memory::store::{Buffer, Fetched, Offer, Promise, Store, StoreKey, Stored, Ticket, Verdict};
use shoal_memory::{ErrorKind, KvCache, KvTier, KvTierOptions, Loading, MemoryError};

const ALL: ByteCount = ByteCount(u64::MAX);

/// A read that has not come.
type Held = (Promise<Fetched>, Buffer, Vec<u8>);

/// A tier in memory whose reads come when a test lets them.
#[derive(Debug, Default)]
struct Slow {
    kept: Mutex<HashMap<StoreKey, Vec<u8>>>,
    is_shut: AtomicBool,
    held: Mutex<Vec<Held>>,
    reads: AtomicUsize,
}

impl Slow {
    fn shut(&self) {
        self.is_shut.store(true, Ordering::SeqCst);
    }

    fn open(&self) {
        self.is_shut.store(false, Ordering::SeqCst);
        for (promise, buffer, block) in self.held.lock().drain(..) {
            promise.answer(Ok(filled(buffer, &block)));
        }
    }
}

fn filled(mut buffer: Buffer, block: &[u8]) -> Fetched {
    buffer.as_mut_slice().expect("its own")[..block.len()].copy_from_slice(block);
    Fetched { buffer, bytes: block.len() }
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

    fn get(&self, key: StoreKey, target: Buffer, deadline: Duration) -> Ticket<Fetched> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let block = self.kept.lock()[&key].clone();
        let mut held = self.held.lock();
        if !self.is_shut.load(Ordering::SeqCst) {
            return Ticket::ready(Ok(filled(target, &block)));
        }
        let (ticket, promise) = Ticket::new(deadline);
        held.push((promise, target, block));
        ticket
    }

    fn remove(&self, key: StoreKey, _: Duration) -> Ticket<bool> {
        Ticket::ready(Ok(self.kept.lock().remove(&key).is_some()))
    }

    fn flush(&self, _: Duration) -> Ticket<()> {
        Ticket::ready(Ok(()))
    }
}

struct Scene {
    tier: KvTier,
    slow: Arc<Slow>,
    cache: Arc<KvCache>,
    world: World,
}

/// Ten blocks of a talk are in the tier and not on the device; reads are held.
fn scene() -> (Scene, Vec<u32>) {
    let world = world(64, 64);
    let cache = cache(&world, PlaneOrder::BlockMajor, 16, 128);
    let slow = Arc::new(Slow::default());
    let tier = tier(&cache, Arc::clone(&slow) as _, "a");
    let tokens: Vec<u32> = (0..40).collect();
    assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 0)));
    assert!(tier.flush(WAIT));
    cache.forget_all().expect("an index");
    slow.shut();
    (Scene { tier, slow, cache, world }, tokens)
}

impl Scene {
    fn end(self) {
        drop(self.tier);
        assert_eq!(self.cache.usage().live, ByteCount::ZERO, "nobody owns anything");
        self.cache.check_invariants().expect("invariants");
        self.world.check();
    }
}

fn check(cache: &KvCache, salt: &[u8], tokens: &[u32], first: usize, blocks: &[u32], what: &str) {
    let bytes = usize::try_from(cache.layout(0).expect("a group").block_bytes().0).expect("small");
    for (at, block) in (first..).zip(blocks) {
        assert!(read(cache, *block) == content(salt, tokens, at, bytes), "block {at} {what}");
    }
}

fn soon() -> Instant {
    Instant::now() + WAIT
}

#[test]
fn an_engine_goes_on_while_a_tier_reads() {
    let (scene, tokens) = scene();
    let Scene { tier, slow, cache, .. } = &scene;
    let begun = Instant::now();
    let loading = tier.begin_load(b"", &tokens, 0).expect("it is there");
    until("it reads", || !slow.held.lock().is_empty());
    assert!(!loading.is_done() && loading.take().is_none());
    assert!(!loading.wait(Instant::now() + Duration::from_millis(20)));
    assert!(tier.begin_load(b"other", &tokens, 0).is_none(), "nothing of it is there");
    let others: Vec<u32> = (100..140).collect();
    let mut ids = [0; 10];
    assert!(cache.alloc(0, &mut ids).expect("memory"));
    cache.seal(Start::Salt(b"other"), &others, &[&ids]).expect("owned");
    let mut found = Found::default();
    cache.find(b"other", &others, &mut found).expect("an index");
    assert_eq!(found.groups[0].blocks, ids);
    cache.free(0, &found.groups[0].blocks).expect("owned");
    assert!(!loading.is_done() && begun.elapsed() < options("a").load_wait, "too slow to tell");
    slow.open();
    assert!(loading.wait(soon()));
    let loaded = loading.take().expect("done");
    assert_eq!(loaded.len(), 10);
    assert!(loaded.iter().all(|block| !ids.contains(block)), "they are another's");
    check(cache, b"", &tokens, 0, &loaded, "is not what was saved");
    assert_eq!(loading.take(), Some(vec![]), "once");
    drop(loading);
    let counts = tier.counts();
    assert_eq!((counts.looked_up, counts.loaded, counts.failed, counts.late), (30, 10, 0, 0));
    assert!(counts.load_us > 0);
    cache.free(0, &loaded).expect("they are the caller's");
    cache.free(0, &ids).expect("owned");
    assert_eq!(serve(cache, tier, b"", &tokens), Some((10, 0)), "and sealed");
    scene.end();
}

#[test]
fn what_is_not_taken_is_given_back() {
    let (scene, tokens) = scene();
    let Scene { tier, slow, cache, .. } = &scene;
    let begun = Instant::now();
    let loading = tier.begin_load(b"", &tokens, 0).expect("it is there");
    let second = tier.begin_load(b"", &tokens, 0).expect("it is there");
    until("it reads", || !slow.held.lock().is_empty());
    loading.cancel();
    assert_eq!(loading.take(), Some(vec![]));
    until("the second one reads", || slow.reads.load(Ordering::SeqCst) == 20);
    assert!(begun.elapsed() < options("a").load_wait, "it has waited for what nobody wants");
    drop(second);
    until("all is given back", || cache.usage().live.is_zero());
    slow.open();
    let third = tier.begin_load(b"", &tokens, 0).expect("it is there");
    assert!(third.wait(soon()));
    assert_eq!(cache.usage().live, ByteCount(10 * (128 << 10)));
    drop(third);
    assert!(cache.usage().live.is_zero());
    assert_eq!(serve(cache, tier, b"", &tokens), Some((10, 0)), "it was sealed, and stays cached");
    let counts = tier.counts();
    assert_eq!((counts.failed, counts.late, counts.corrupt), (0, 0, 0), "nothing went wrong");
    scene.end();
}

/// The end of a connection is not held up by a tier that hangs, and leaves no thread and no block behind.
#[test]
fn a_connection_that_ends_takes_its_loads_along() {
    let (scene, tokens) = scene();
    let Scene { tier, slow, cache, world } = scene;
    let loads: Vec<_> = (0..3).map(|_| tier.begin_load(b"", &tokens, 0).expect("it is there")).collect();
    until("it reads", || !slow.held.lock().is_empty());
    let begun = Instant::now();
    drop(tier);
    assert!(begun.elapsed() < options("a").load_wait, "it has waited for the tier");
    for loading in &loads {
        assert_eq!(loading.take(), Some(vec![]), "it is done, with nothing");
    }
    assert!(cache.usage().live.is_zero());
    drop(loads);
    cache.check_invariants().expect("invariants");
    world.check();
}

#[test]
fn the_next_one_has_what_the_one_before_brought() {
    let (scene, tokens) = scene();
    let Scene { tier, slow, cache, .. } = &scene;
    let longer: Vec<u32> = tokens.iter().copied().chain(40..56).collect();
    slow.open();
    let mut ids = [0; 4];
    assert_eq!(serve(cache, tier, b"", &longer), Some((0, 10)));
    assert!(tier.flush(WAIT));
    cache.forget_all().expect("an index");
    slow.shut();
    slow.reads.store(0, Ordering::SeqCst);
    let first = tier.begin_load(b"", &tokens, 0).expect("it is there");
    let second = tier.begin_load(b"", &longer, 0).expect("it is there");
    until("it reads", || !slow.held.lock().is_empty());
    slow.open();
    assert!(first.wait(soon()) && second.wait(soon()));
    let (first, second) = (first.take().expect("done"), second.take().expect("done"));
    assert_eq!((first.len(), second.len()), (10, 14));
    assert_eq!(first, second[..10], "the same blocks, owned twice");
    assert_eq!(slow.reads.load(Ordering::SeqCst), 14, "each was read once");
    check(cache, b"", &longer, 0, &second, "is not what was saved");
    assert!(cache.alloc(0, &mut ids).expect("memory"));
    for blocks in [&first[..], &second[..], &ids[..]] {
        cache.free(0, blocks).expect("owned");
    }
    scene.end();
}

/// Somebody computes meanwhile what a load brings: one of both is kept, and both callers have blocks.
#[test]
fn what_was_sealed_meanwhile_takes_the_place_of_what_came() {
    let (scene, tokens) = scene();
    let Scene { tier, slow, cache, .. } = &scene;
    let loading = tier.begin_load(b"", &tokens, 0).expect("it is there");
    until("it reads", || slow.held.lock().len() == 10);
    let mut ids = [0; 3];
    assert!(cache.alloc(0, &mut ids).expect("memory"));
    let bytes = 128 << 10;
    for (at, block) in ids.iter().enumerate() {
        let (all, mut from) = (content(b"", &tokens, at, bytes), 0);
        for (offset, length) in pieces(cache, *block) {
            let end = from + usize::try_from(length.0).expect("small");
            cache.region().write(offset, &all[from..end]).expect("it has memory");
            from = end;
        }
    }
    cache.seal(Start::Salt(b""), &tokens[..3 * TOKENS], &[&ids]).expect("owned");
    slow.open();
    assert!(loading.wait(soon()));
    let loaded = loading.take().expect("done");
    assert_eq!(loaded[..3], ids, "no copy is kept");
    check(cache, b"", &tokens, 0, &loaded, "is not what was saved");
    assert_eq!(cache.usage().live, ByteCount(10 * bytes as u64));
    cache.free(0, &loaded).expect("owned");
    cache.free(0, &ids).expect("owned as well");
    scene.end();
}

#[test]
fn nothing_is_given_of_what_was_discarded_meanwhile() {
    let (scene, tokens) = scene();
    let Scene { tier, slow, cache, .. } = &scene;
    let loading = tier.begin_load(b"", &tokens, 0).expect("it is there");
    until("it reads", || !slow.held.lock().is_empty());
    tier.discard_queued();
    cache.forget_all().expect("an index");
    slow.open();
    assert!(loading.wait(soon()));
    assert_eq!(loading.take(), Some(vec![]));
    let mut found = Found::default();
    cache.find(b"", &tokens, &mut found).expect("an index");
    assert_eq!(found.blocks, 0, "nor is it found");
    scene.end();
}

#[test]
fn no_block_moves_until_a_load_is_taken() {
    let (scene, tokens) = scene();
    let Scene { tier, slow, cache, .. } = &scene;
    // Every fourth of four granules' blocks: as good as empty.
    let mut ids = [0; 64];
    assert!(cache.alloc(0, &mut ids).expect("memory"));
    let (kept, freed): (Vec<u32>, Vec<u32>) = ids.iter().partition(|id| **id % 16 == 0);
    cache.free(0, &freed).expect("owned");
    assert!(!cache.plan_compaction(0, 64).expect("a group").is_empty(), "nothing is tested");
    let loading = tier.begin_load(b"", &tokens, 0).expect("it is there");
    until("it reads", || !slow.held.lock().is_empty());
    for is_done in [false, true] {
        assert_eq!(loading.is_done(), is_done);
        assert!(cache.compact(0, 64, WAIT).expect("not now").is_empty(), "done: {is_done}");
        assert!(cache.plan_compaction(0, 64).expect("a group").is_empty());
        assert_eq!(cache.moved(0, &[]).expect_err("a load has blocks").kind(), ErrorKind::Region);
        slow.open();
        assert!(loading.wait(soon()));
    }
    let loaded = loading.take().expect("done");
    let moves = cache.compact(0, 64, WAIT).expect("nothing is in the way");
    assert!(!moves.is_empty());
    let place = |id: &u32| moves.iter().find(|moved| moved.from == *id).map_or(*id, |moved| moved.to);
    let loaded: Vec<u32> = loaded.iter().map(place).collect();
    check(cache, b"", &tokens, 0, &loaded, "is not what was saved");
    cache.free(0, &loaded).expect("owned");
    cache.free(0, &kept.iter().map(place).collect::<Vec<_>>()).expect("owned");
    scene.end();
}

/// Evicted while it is loaded to, as when its model is put to sleep: it comes, or is a miss, and the rest is as always.
#[test]
fn a_cache_that_is_evicted_meanwhile_loses_nothing() {
    let (scene, tokens) = scene();
    let Scene { tier, slow, cache, world } = &scene;
    let loading = tier.begin_load(b"", &tokens, 0).expect("it is there");
    until("it reads", || !slow.held.lock().is_empty());
    world.manager.reclaim(ALL, WAIT, "a sleep").expect("room on the host");
    assert!(!cache.region().missing_bytes().is_zero(), "what the load has goes along");
    slow.open();
    assert!(loading.wait(soon()));
    let loaded = loading.take().expect("done");
    drop(world.manager.guard(WAIT).expect("it comes back"));
    check(cache, b"", &tokens, 0, &loaded, "is not what was saved");
    cache.free(0, &loaded).expect("owned");
    assert_eq!(serve(cache, tier, b"", &tokens).map(|(found, came)| found + came), Some(10));
    scene.end();
}

/// A kernel on a stream of the engine's own, which writes to blocks when it is let.
fn launch(cache: &KvCache, engine: &Stream, blocks: &[u32], go: &Arc<AtomicBool>) {
    let region = cache.region().clone();
    let places: Vec<_> = blocks.iter().flat_map(|block| pieces(cache, *block)).collect();
    let go = Arc::clone(go);
    let kernel = move || {
        while !go.load(Ordering::Acquire) {
            thread::sleep(Duration::from_micros(200));
        }
        for (at, bytes) in places {
            let bytes = vec![0xEE; usize::try_from(bytes.0).expect("small")];
            region.write(at, &bytes).expect("mapped while the kernel runs");
        }
    };
    engine.launch_host((), kernel).expect("launched");
}

/// Lets what runs beside a test end although that fails.
struct Ends(Arc<AtomicBool>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// I5: a block that is freed while a step still writes to it is loaded to after that step.
#[test]
fn a_step_that_writes_to_what_was_freed_ends_first() {
    let (scene, tokens) = scene();
    let Scene { tier, slow, cache, world } = &scene;
    if world.device.info().kind != DeviceKind::Sim {
        return; // A GPU's host functions may not call the driver.
    }
    let engine = Stream::create(&world.device).expect("a stream");
    slow.open();
    let mut all = vec![0; 128];
    assert!(cache.alloc(0, &mut all).expect("all there are"));
    let (go, freed) = (Arc::new(AtomicBool::new(false)), &all[..10]);
    launch(cache, &engine, freed, &go);
    let _ends = Ends(Arc::clone(&go));
    cache.record_step_event(engine.record().expect("marked"));
    cache.free(0, freed).expect("owned");
    let loading = tier.begin_load(b"", &tokens, 0).expect("it is there");
    assert!(!loading.wait(Instant::now() + Duration::from_millis(100)), "beside a step that writes there");
    go.store(true, Ordering::Release);
    assert!(loading.wait(soon()));
    let loaded = loading.take().expect("done");
    assert_eq!(loaded.len(), 10);
    assert!(loaded.iter().all(|block| freed.contains(block)), "nothing is tested");
    check(cache, b"", &tokens, 0, &loaded, "was written to by the step");
    cache.free(0, &loaded).expect("owned");
    cache.free(0, &all[10..]).expect("owned");
    scene.end();
}

/// The first step ever runs, and its engine tells of it when it has launched it.
#[test]
fn a_load_beside_the_first_step_waits_until_it_is_told_of() {
    let (scene, tokens) = scene();
    let Scene { tier, slow, cache, world } = &scene;
    slow.open();
    let guard = world.manager.guard(WAIT).expect("nothing is missing");
    assert_eq!(
        tier.load(b"", &tokens, &[]),
        Vec::<u32>::new(),
        "whoever holds the guard itself gets nothing"
    );
    let loading = tier.begin_load(b"", &tokens, 0).expect("it is there");
    assert!(!loading.wait(Instant::now() + Duration::from_millis(100)), "nobody knows when the step ends");
    let engine = Stream::create(&world.device).expect("a stream");
    cache.record_step_event(engine.record().expect("marked"));
    assert!(loading.wait(soon()));
    drop(guard);
    assert_eq!(loading.take().map(|ids| cache.free(0, &ids).map(|()| ids.len()).expect("owned")), Some(10));
    scene.end();
}

#[test]
fn a_tier_that_hangs_is_given_up_and_the_next_has_its_own_time() {
    let (scene, tokens) = scene();
    let Scene { slow, cache, .. } = &scene;
    let load_wait = Duration::from_millis(200);
    let tier = KvTier::new(cache, Arc::clone(slow) as _, KvTierOptions { load_wait, ..options("a") });
    let tier = tier.expect("one group");
    let loads: Vec<_> = (0..3).map(|_| tier.begin_load(b"", &tokens, 0).expect("it is there")).collect();
    for loading in &loads {
        assert!(loading.wait(soon()));
        assert_eq!(loading.take(), Some(vec![]));
    }
    assert_eq!(tier.counts().late, 3);
    slow.open();
    let last = tier.begin_load(b"", &tokens, 0).expect("it is there");
    assert!(last.wait(soon()));
    assert_eq!(last.take().map(|ids| cache.free(0, &ids).map(|()| ids.len()).expect("owned")), Some(10));
    drop((loads, last, tier));
    scene.end();
}

/// What may be in the way of an operation here, where no device call fails.
fn may_be_busy<T>(outcome: Result<T, MemoryError>) {
    if let Err(error) = outcome {
        let may = matches!(error.kind(), ErrorKind::Lease | ErrorKind::Transfer | ErrorKind::HostBudget)
            || error.to_string().contains("on the host");
        assert!(may, "{error} ({error:?})");
    }
}

/// An engine of which a history is played: its steps are still running when it frees what they write to.
struct Engine<'a> {
    cache: &'a KvCache,
    world: &'a World,
    stream: Arc<Stream>,
    talks: Vec<Vec<u32>>,
    /// Of each load its talk, and the blocks that were found before.
    loads: Vec<(usize, Vec<u32>, Option<Loading>)>,
    /// Blocks of talks.
    taken: Vec<(usize, Vec<u32>)>,
    /// Blocks that steps write to, of requests that go on.
    kept: Vec<u32>,
    /// How many blocks came, and how many moved.
    loaded: u64,
    moved: u64,
}

impl Engine<'_> {
    fn small(dice: &mut Dice, end: usize) -> usize {
        usize::try_from(dice.below(end as u64)).expect("small")
    }

    fn begin(&mut self, dice: &mut Dice, tier: &KvTier) {
        let talk = Self::small(dice, self.talks.len());
        let mut found = Found::default();
        self.cache.find(b"", &self.talks[talk], &mut found).expect("an index");
        let held = found.groups[0].blocks.clone();
        let loading = tier.begin_load(b"", &self.talks[talk], held.len());
        self.loads.push((talk, held, loading));
    }

    /// Most of what a step writes to is freed while it runs. Whether it ends then: after what is given.
    fn step(&mut self, dice: &mut Dice) -> Option<(Arc<AtomicBool>, Duration)> {
        let mut ids = vec![0; 1 + Self::small(dice, 10)];
        if !self.cache.alloc(0, &mut ids).expect("not now is no error") {
            return None;
        }
        let go = Arc::new(AtomicBool::new(false));
        if let Ok(_guard) = self.world.manager.guard(WAIT) {
            launch(self.cache, &self.stream, &ids, &go);
            self.cache.record_step_event(self.stream.record().expect("marked"));
        }
        for id in ids {
            if dice.below(3) == 0 {
                self.kept.push(id);
            } else {
                self.cache.free(0, &[id]).expect("owned");
            }
        }
        Some((go, Duration::from_micros(100 * dice.below(30))))
    }

    fn take(&mut self, dice: &mut Dice) {
        for (talk, held, loading) in std::mem::take(&mut self.loads) {
            // Some are not waited for, and some are given up.
            match (&loading, dice.below(4)) {
                (Some(loading), 0) if !loading.is_done() => {}
                (Some(loading), 1..) => {
                    assert!(loading.wait(soon()), "for ever");
                    let ids = loading.take().expect("done");
                    self.loaded += ids.len() as u64;
                    self.taken.push((talk, [held, ids].concat()));
                    continue;
                }
                _ => {}
            }
            drop(loading);
            self.taken.push((talk, held));
        }
    }

    fn compact(&mut self) {
        let moves = self.cache.compact(0, 16, Duration::from_millis(50)).unwrap_or_default();
        self.moved += moves.len() as u64;
        let held = self.loads.iter_mut().flat_map(|(_, held, _)| held);
        for id in held.chain(self.taken.iter_mut().flat_map(|(_, ids)| ids)).chain(&mut self.kept) {
            if let Some(moved) = moves.iter().find(|moved| moved.from == *id) {
                *id = moved.to;
            }
        }
    }

    fn check(&mut self, what: &str) {
        assert!(self.stream.record().expect("marked").wait(WAIT).expect("it ends"));
        let Ok(_guard) = self.world.manager.guard(WAIT) else { return };
        for (talk, ids) in self.taken.drain(..) {
            check(self.cache, b"", &self.talks[talk], 0, &ids, what);
            self.cache.free(0, &ids).expect("owned");
        }
    }

    fn end(&mut self) {
        for (talk, held, loading) in self.loads.drain(..) {
            drop(loading);
            self.taken.push((talk, held));
        }
        for (_, ids) in self.taken.drain(..) {
            self.cache.free(0, &ids).expect("owned");
        }
        self.cache.free(0, &std::mem::take(&mut self.kept)).expect("owned");
        assert!(self.stream.record().expect("marked").wait(WAIT).expect("it ends"));
    }
}

/// Takes memory away, and holds up the tier, until the engine is done.
fn disturb(seed: u64, world: &World, cache: &KvCache, slow: &Slow, is_over: &AtomicBool) {
    let mut dice = Dice(seed ^ 0xFF);
    while !is_over.load(Ordering::Acquire) {
        match dice.below(8) {
            0 => may_be_busy(cache.trim_cached(ALL)),
            1 => may_be_busy(world.manager.reclaim(ByteCount::mib(2), WAIT, "a test")),
            2..=4 => slow.shut(),
            _ => slow.open(),
        }
        thread::sleep(Duration::from_micros(100 * dice.below(20)));
    }
    slow.open();
}

/// Steps, loads, evictions, reclaims and moves, many seeds: what is loaded is right when all steps have ended, and what nobody
/// takes is nobody's.
#[test]
fn histories_of_steps_and_loads_give_right_blocks_only() {
    let histories = std::env::var("SHOAL_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    let (mut loaded, mut moved) = (0, 0);
    for seed in 0..histories {
        let (mut dice, world) = (Dice(seed), world(16, 64));
        if world.device.info().kind != DeviceKind::Sim {
            return; // A GPU's host functions may not call the driver.
        }
        let (cache, slow) = (cache(&world, PlaneOrder::BlockMajor, 8, 128), Arc::new(Slow::default()));
        let tier = tier(&cache, Arc::clone(&slow) as _, "a");
        let stream = Stream::create(&world.device).expect("a stream");
        cache.record_step_event(stream.record().expect("marked"));
        let talks: Vec<Vec<u32>> = (0..6).map(|talk| (100 * talk..100 * talk + 32).collect()).collect();
        for talk in &talks {
            assert_eq!(serve(&cache, &tier, b"", talk), Some((0, 0)));
            assert!(tier.flush(WAIT));
        }
        let is_over = Arc::new(AtomicBool::new(false));
        thread::scope(|scope| {
            let ends = Ends(Arc::clone(&is_over));
            scope.spawn(|| disturb(seed, &world, &cache, &slow, &is_over));
            let (loads, taken, kept) = (vec![], vec![], vec![]);
            let (cache, world) = (&*cache, &world);
            let mut engine = Engine { cache, world, stream, talks, loads, taken, kept, loaded: 0, moved: 0 };
            for _ in 0..150 {
                match dice.below(10) {
                    0..=2 => engine.begin(&mut dice, &tier),
                    3..=5 => {
                        if let Some((go, wait)) = engine.step(&mut dice) {
                            scope.spawn(move || {
                                thread::sleep(wait);
                                go.store(true, Ordering::Release);
                            });
                        }
                    }
                    6 => engine.take(&mut dice),
                    7 => engine.compact(),
                    8 => {
                        let kept = engine.kept.split_off(engine.kept.len() / 2);
                        cache.free(0, &kept).expect("owned");
                    }
                    _ => engine.check(&format!("in history {seed}")),
                }
            }
            drop(ends);
            engine.end();
            (loaded, moved) = (loaded + engine.loaded, moved + engine.moved);
        });
        drop(tier);
        assert_eq!(cache.usage().live, ByteCount::ZERO, "history {seed}: nobody owns anything");
        cache.check_invariants().expect("invariants");
    }
    assert!(loaded > 20 * histories && moved > 0, "{loaded} loaded, {moved} moved");
}
