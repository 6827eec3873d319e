//! The frame pool: who fills it, who empties it, that nothing of before is read, and that nothing is lost in it.

mod common;

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::{PAGE, WAIT, World, keeping, noise, open, pooled_world_on, until};
use proptest::prelude::*;
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_device::device::Verb;
use shoal_device::{Device, DeviceError, FaultDevice};
use shoal_memory::{Backing, ErrorKind, KvBacking, MemoryError, PoolOptions, Region, Segments};

const ALL: ByteCount = ByteCount(u64::MAX);
const DEVICE_MIB: u64 = 64;

fn pages(count: u64) -> ByteCount {
    ByteCount(count * PAGE)
}

struct Scene {
    world: World,
    faults: Arc<FaultDevice>,
}

fn scene(budget_mib: u64, pool: PoolOptions) -> Scene {
    let dir = tempfile::tempdir().expect("a directory");
    let faults = FaultDevice::new(open(dir.path(), DEVICE_MIB));
    let world = pooled_world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, budget_mib, 64, pool);
    Scene { world, faults }
}

impl Scene {
    fn count(&self, verb: Verb) -> usize {
        self.faults.history().iter().filter(|call| call.verb == verb).count()
    }

    fn pooled(&self) -> ByteCount {
        let pooled = self.world.manager.pool_usage().bytes;
        assert_eq!(pooled, self.world.manager.usage().pooled);
        pooled
    }

    fn workspace(&self, name: &str, count: u64) -> Region {
        self.world.region(name, count, LeaseKind::Overhead)
    }
}

/// Commits, writes all of it, gives it up: frames of before lie in the pool.
fn soil(region: &Region, count: u64) {
    region.commit(ByteCount::ZERO, pages(count)).expect("room");
    region.write(ByteCount::ZERO, &noise(count * PAGE, 7)).expect("there");
    assert_eq!(region.decommit(ByteCount::ZERO, pages(count)).expect("whole extents"), pages(count));
}

fn is_zero(region: &Region, count: u64) -> bool {
    let mut bytes = vec![1; usize::try_from(count * PAGE).expect("small")];
    region.read(ByteCount::ZERO, &mut bytes).expect("there");
    bytes.iter().all(|byte| *byte == 0)
}

#[test]
fn what_was_given_up_is_taken_again_and_zero() {
    let scene = scene(32, keeping(32));
    let (first, second) = (scene.workspace("first", 8), scene.workspace("second", 8));
    scene.faults.clear_history();
    soil(&first, 8);
    assert!(scene.count(Verb::Zero) > 0);
    assert_eq!((scene.pooled(), first.usage().total), (pages(8), ByteCount::ZERO));
    // Leased as before, and nobody's.
    assert_eq!(scene.world.device_used(), pages(8));
    scene.world.check();
    scene.faults.clear_history();
    // Another region of that kind, beyond what is left of the lease.
    second.commit(ByteCount::ZERO, pages(8)).expect("from the pool");
    assert_eq!((scene.count(Verb::CreateFrame), scene.count(Verb::DestroyFrame)), (0, 0));
    assert_eq!(scene.count(Verb::Zero), 0, "it was zeroed when it came");
    assert_eq!((scene.pooled(), scene.world.device_used()), (ByteCount::ZERO, pages(8)));
    assert!(is_zero(&second, 8), "bytes of before can be read");
    assert_eq!(scene.world.manager.pool_usage().frames, 0);
    assert!(scene.world.manager.pool_usage().taken > 0);
    scene.world.check();
}

/// Where frames could not be zeroed when they came, or came from torch, whoever takes them zeroes them.
#[test]
fn what_could_not_be_zeroed_in_time_is_zeroed_when_it_is_taken() {
    for verb in [Verb::Zero, Verb::Record] {
        let scene = scene(32, keeping(32));
        let region = scene.workspace("workspace", 8);
        region.commit(ByteCount::ZERO, pages(8)).expect("room");
        region.write(ByteCount::ZERO, &noise(8 * PAGE, 7)).expect("there");
        // Where nothing can be marked at all, what is being zeroed stays mapped until that has ended.
        scene.faults.fail_nth_matching(1, move |call| call.verb == verb);
        region.decommit(ByteCount::ZERO, pages(8)).expect("it is given up all the same");
        scene.faults.heal();
        scene.faults.clear_history();
        region.commit(ByteCount::ZERO, pages(8)).expect("room");
        assert!(is_zero(&region, 8), "{verb}: bytes of before can be read");
        assert!(scene.count(Verb::Zero) > 0 || scene.count(Verb::CreateFrame) > 0);
        scene.world.check();
    }
}

#[test]
fn a_pool_is_bounded() {
    let scene = scene(32, keeping(8));
    let region = scene.workspace("workspace", 8);
    soil(&region, 8);
    assert_eq!(scene.pooled(), pages(4));
    assert_eq!(scene.world.device_used(), pages(4), "the rest went back to the device");
    scene.world.check();
}

#[test]
fn a_reclaim_takes_it_first_and_waits_for_no_step() {
    let scene = scene(64, keeping(32));
    let region = scene.workspace("workspace", 8);
    soil(&region, 8);
    region.commit(ByteCount::ZERO, pages(2)).expect("room");
    let _guard = scene.world.manager.guard(WAIT).expect("nothing is missing");
    let report = scene.world.manager.reclaim(pages(4), WAIT, "a test").expect("no step is waited for");
    assert!(report.freed >= pages(4) && report.error.is_none(), "{report:?}");
    assert_eq!(region.usage().device, pages(2), "no region lost anything");
    scene.world.check();
}

#[test]
fn a_sleep_empties_it() {
    let scene = scene(64, keeping(32));
    let region = scene.workspace("workspace", 8);
    let weights = scene.world.weights(4, &noise(4 * PAGE, 1));
    weights.wake(WAIT).expect("begun").wait(WAIT).expect("room");
    soil(&region, 8);
    weights.sleep(0.0, false, WAIT).expect("clean");
    assert_eq!((scene.pooled(), scene.world.device_used()), (ByteCount::ZERO, ByteCount::ZERO));
    scene.world.check();
}

#[test]
fn a_lease_that_is_denied_is_paid_for_by_it() {
    let scene = scene(16, keeping(32));
    soil(&scene.workspace("workspace", 8), 8);
    assert_eq!(scene.pooled(), pages(8));
    // Of another kind, and of other sizes.
    let weights = scene.world.weights(7, &noise(7 * PAGE, 2));
    weights.wake(WAIT).expect("begun").wait(WAIT).expect("the pool gives way");
    let mut read = vec![0; usize::try_from(7 * PAGE).expect("small")];
    weights.read(ByteCount::ZERO, &mut read).expect("awake");
    assert!(read == noise(7 * PAGE, 2));
    scene.world.check();
    // The same of the same kind, where the sizes differ.
    drop(weights);
    let (long, short) = (scene.workspace("long", 32), scene.workspace("short", 8));
    long.commit(ByteCount::ZERO, pages(8)).expect("room");
    long.decommit(ByteCount::ZERO, pages(8)).expect("whole");
    for page in 0..8 {
        // What a busy machine still zeroes of it is the pool's a moment later.
        until("the pool gives way", || match short.commit(pages(page), pages(1)) {
            Ok(_) => true,
            Err(MemoryError::Lease { .. }) => false,
            Err(error) => panic!("{error}"),
        });
    }
    assert!(is_zero(&short, 8));
    scene.world.check();
}

/// Its lease is neither free nor the pool's as long as the device takes it back.
#[test]
fn what_leaves_the_pool_already_is_waited_for() {
    let scene = scene(16, keeping(32));
    soil(&scene.workspace("workspace", 8), 8);
    let (began, has_begun) = mpsc::channel();
    scene.faults.fail_when(move |call| {
        if call.verb == Verb::DestroyFrame {
            // Nobody listens for those that follow.
            let _ = began.send(());
            thread::sleep(Duration::from_millis(50));
        }
        None
    });
    thread::scope(|scope| {
        let trimming = scope.spawn(|| scene.world.manager.trim_pool(ALL).expect("nothing refuses"));
        has_begun.recv_timeout(WAIT).expect("it destroys");
        let next = scene.workspace("next", 8);
        next.commit(ByteCount::ZERO, pages(8)).expect("what leaves makes room");
        assert_eq!(trimming.join().expect("no panic"), pages(8));
    });
    scene.world.check();
}

#[test]
fn a_device_without_memory_gets_it_back() {
    let scene = scene(64, keeping(32));
    let (first, second) = (scene.workspace("first", 8), scene.workspace("second", 32));
    soil(&first, 2);
    // Somebody else took the rest of the device.
    let (mut left, device) = (1, scene.world.device.info().id);
    scene.faults.fail_when(move |call| {
        let is_first = call.verb == Verb::CreateFrame && left > 0;
        left -= i32::from(is_first);
        let (free, capacity) = (ByteCount::ZERO, pages(8));
        is_first.then_some(DeviceError::OutOfMemory { device, requested: call.bytes, free, capacity })
    });
    second.commit(ByteCount::ZERO, pages(16)).expect("the pool gave way");
    assert_eq!(scene.pooled(), ByteCount::ZERO);
    assert!(is_zero(&second, 16));
    scene.world.check();
}

#[test]
fn a_wake_takes_frames_and_zeroes_none() {
    let scene = scene(32, keeping(32));
    let segments = Segments::new(&scene.world.manager, "torch".to_owned(), LeaseKind::Weights, Backing::Keep);
    let segments = segments.expect("addresses");
    // Extents of the sizes that the weights have.
    let weights = scene.world.weights(8, &noise(8 * PAGE, 3));
    let taken: Vec<_> = (0..4).map(|_| segments.allocate(ByteCount(2 * PAGE), None).expect("room")).collect();
    for at in taken {
        segments.free(at, None).expect("a segment");
    }
    let deadline = Instant::now() + WAIT;
    while scene.pooled() < pages(8) {
        assert!(Instant::now() < deadline, "{} in the pool", scene.pooled());
        thread::sleep(Duration::from_millis(1));
    }
    let before = scene.world.manager.pool_usage().taken;
    scene.faults.clear_history();
    weights.wake(WAIT).expect("begun").wait(WAIT).expect("room");
    assert!(scene.world.manager.pool_usage().taken > before);
    assert_eq!(scene.count(Verb::Zero), 0);
    let mut read = vec![0; usize::try_from(8 * PAGE).expect("small")];
    weights.read(ByteCount::ZERO, &mut read).expect("awake");
    assert!(read == noise(8 * PAGE, 3));
    scene.world.check();
}

#[test]
fn what_torch_gives_back_is_what_it_gets_next() {
    let scene = scene(64, keeping(64));
    let segments = Segments::new(&scene.world.manager, "torch".to_owned(), LeaseKind::Weights, Backing::Keep);
    let segments = segments.expect("addresses");
    let churn = || {
        let at = segments.allocate(ByteCount::mib(16), None).expect("room");
        segments.free(at, None).expect("a segment");
        let deadline = Instant::now() + WAIT;
        while segments.usage().committed > ByteCount::ZERO {
            assert!(Instant::now() < deadline, "it is not given up");
            thread::sleep(Duration::from_millis(1));
        }
    };
    churn();
    scene.faults.clear_history();
    for _ in 0..4 {
        churn();
    }
    assert_eq!((scene.count(Verb::CreateFrame), scene.count(Verb::DestroyFrame)), (0, 0));
    scene.world.check();
}

#[test]
fn what_nobody_takes_goes_back_by_itself() {
    let idle = Duration::from_millis(30);
    let scene = scene(64, PoolOptions { bytes_max: ByteCount::mib(64), idle });
    let region = scene.workspace("workspace", 8);
    for _ in 0..3 {
        soil(&region, 8);
        let deadline = Instant::now() + WAIT;
        while !scene.world.device_used().is_zero() {
            assert!(Instant::now() < deadline, "{} in the pool", scene.pooled());
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(scene.pooled(), ByteCount::ZERO);
    }
    assert!(scene.world.manager.pool_usage().trimmed >= 3);
}

#[test]
fn it_goes_with_its_manager() {
    let Scene { world, .. } = scene(64, keeping(64));
    let region = world.region("workspace", 8, LeaseKind::Overhead);
    soil(&region, 8);
    let (device, budget) = (Arc::clone(&world.device), Arc::clone(&world.budget));
    drop((region, world.manager));
    assert_eq!(device.memory().expect("asked").used_by_this_process, ByteCount::ZERO);
    let left = budget.budget();
    assert_eq!(
        LeaseKind::ALL
            .into_iter()
            .map(|kind| shoal_memory::LeaseSource::held(&*budget, kind))
            .sum::<ByteCount>(),
        ByteCount::ZERO,
        "of {left}"
    );
}

#[test]
fn blocks_of_kv_are_backed_by_it_and_zero() {
    let scene = scene(16, keeping(64));
    let scratch = scene.world.region("scratch", 8, LeaseKind::Kv);
    soil(&scratch, 4);
    let region = scene.world.region("kv", 8, LeaseKind::Kv);
    let kv = KvBacking::new(&region, ByteCount(PAGE), 8).expect("fits");
    scene.faults.clear_history();
    assert!(kv.back(&[0, 1, 2, 3]).expect("room"));
    assert!(scene.world.manager.pool_usage().taken > 0);
    assert!(is_zero(&region, 4));
    // A trim is meant: that memory is for others.
    kv.unback(&[0, 1, 2, 3]).expect("backed");
    kv.trim(ALL).expect("no step runs");
    assert_eq!(region.usage().device, ByteCount::ZERO);
    scene.world.check();
}

/// Threads that grow and shrink regions of their own while idle frames are given back all the time.
#[test]
fn many_threads_and_a_short_patience() {
    let scene = scene(32, PoolOptions { bytes_max: ByteCount::mib(16), idle: Duration::from_millis(1) });
    let manager = &scene.world.manager;
    thread::scope(|scope| {
        for number in 0..3_u64 {
            let region = scene.workspace("workspace", 8);
            scope.spawn(move || {
                for turn in 0..60 {
                    let count = 1 + (turn * 3 + number) % 4;
                    region.commit(ByteCount::ZERO, pages(count)).expect("room for all");
                    assert!(is_zero(&region, count), "bytes of another");
                    region.write(ByteCount::ZERO, &noise(count * PAGE, number)).expect("there");
                    if turn % 7 == number {
                        thread::sleep(Duration::from_millis(3));
                    }
                    region.decommit(ByteCount::ZERO, pages(8)).expect("whole extents");
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..30 {
                manager.trim_pool(pages(2)).expect("nothing refuses");
                thread::sleep(Duration::from_millis(1));
            }
        });
    });
    manager.trim_pool(ALL).expect("nothing refuses");
    manager.check_invariants().expect("invariants");
    let deadline = Instant::now() + WAIT;
    while !scene.world.device_used().is_zero() {
        assert!(Instant::now() < deadline, "{} left", scene.world.device_used());
        thread::sleep(Duration::from_millis(1));
    }
}

#[derive(Clone, Debug)]
enum Op {
    Commit { region: usize, from: u64, count: u64 },
    Decommit { region: usize, from: u64, count: u64 },
    Write { region: usize, page: u64, byte: u8 },
    Reclaim { count: u64 },
    Sleep { region: usize },
    Wake { region: usize },
    Trim { count: u64 },
}

const REGION_PAGES: u64 = 8;

fn op() -> impl Strategy<Value = Op> {
    let range = || (0_usize..3, 0_u64..REGION_PAGES, 1_u64..5);
    prop_oneof![
        4 => range().prop_map(|(region, from, count)| Op::Commit { region, from, count }),
        4 => range().prop_map(|(region, from, count)| Op::Decommit { region, from, count }),
        4 => (0_usize..3, 0_u64..REGION_PAGES, 1_u8..255).prop_map(|(region, page, byte)| Op::Write { region, page, byte }),
        1 => (0_u64..4).prop_map(|count| Op::Reclaim { count }),
        1 => (0_usize..3).prop_map(|region| Op::Sleep { region }),
        2 => (0_usize..3).prop_map(|region| Op::Wake { region }),
        1 => (0_u64..4).prop_map(|count| Op::Trim { count }),
    ]
}

/// What a page holds in the plain model: nothing, or a byte at its start and at its end.
type Plain = Vec<Vec<Option<u8>>>;

struct Model {
    scene: Scene,
    regions: Vec<Region>,
    plain: Plain,
}

impl Model {
    fn new() -> Self {
        let scene = scene(30, keeping(12));
        let kinds = [LeaseKind::Overhead, LeaseKind::Overhead, LeaseKind::Kv];
        let regions: Vec<_> =
            kinds.into_iter().map(|kind| scene.world.region("region", REGION_PAGES, kind)).collect();
        let plain = vec![vec![None; usize::try_from(REGION_PAGES).expect("small")]; 3];
        Self { scene, regions, plain }
    }

    fn is_there(&self, region: usize) -> bool {
        self.regions[region].missing_bytes().is_zero()
    }

    fn apply(&mut self, op: &Op) {
        let manager = Arc::clone(&self.scene.world.manager);
        match *op {
            Op::Commit { region, from, count } => {
                let count = count.min(REGION_PAGES - from);
                match self.regions[region].commit(pages(from), pages(count)) {
                    Ok(_) => {
                        for page in from..from + count {
                            let slot = &mut self.plain[region][usize::try_from(page).expect("small")];
                            *slot = Some(slot.unwrap_or(0));
                        }
                    }
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Lease, "{error}"),
                }
            }
            Op::Decommit { region, from, count } => {
                let count = count.min(REGION_PAGES - from);
                let before = self.regions[region].usage().total;
                self.regions[region].decommit(pages(from), pages(count)).expect("nothing fails");
                let gone = before - self.regions[region].usage().total;
                // Which extents lay wholly within is the table's business: those pages have no memory now.
                let mut bare = ByteCount::ZERO;
                for page in from..from + count {
                    let at = usize::try_from(page).expect("small");
                    if self.plain[region][at].is_some() && !self.has_bytes(region, page) {
                        self.plain[region][at] = None;
                        bare += pages(1);
                    }
                }
                assert_eq!(bare, gone);
            }
            Op::Write { region, page, byte } => {
                let at = usize::try_from(page).expect("small");
                if self.plain[region][at].is_some() && self.is_there(region) {
                    for offset in [0, PAGE - 1] {
                        let place = ByteCount(page * PAGE + offset);
                        self.regions[region].write(place, &[byte]).expect("on the device");
                    }
                    self.plain[region][at] = Some(byte);
                }
            }
            Op::Reclaim { count } => {
                manager.reclaim(pages(count), WAIT, "a test").expect("no step runs");
            }
            Op::Sleep { region } => {
                self.regions[region].sleep(0.0, false, WAIT).expect("host room");
                assert_eq!(self.scene.pooled(), ByteCount::ZERO, "a sleep empties it");
            }
            Op::Wake { region } => {
                let woken = self.regions[region].wake(WAIT).expect("begun").wait(WAIT);
                if let Err(error) = woken {
                    assert_eq!(error.kind(), ErrorKind::Lease, "{error}");
                }
            }
            Op::Trim { count } => {
                manager.trim_pool(pages(count)).expect("nothing refuses");
            }
        }
    }

    fn has_bytes(&self, region: usize, page: u64) -> bool {
        let mut byte = [0];
        let region = &self.regions[region];
        region.read(pages(page), &mut byte).is_ok()
            || region.read_host_copy(pages(page), &mut byte).is_ok_and(|found| found)
    }

    fn check(&self) {
        self.scene.world.check();
        assert!(self.scene.pooled() <= ByteCount::mib(12));
        let device: ByteCount = self.regions.iter().map(|region| region.usage().device).sum();
        assert_eq!(device + self.scene.pooled(), self.scene.world.device_used(), "I2");
        for (region, plain) in self.regions.iter().zip(&self.plain) {
            if !region.missing_bytes().is_zero() {
                continue;
            }
            for (page, expected) in (0..).zip(plain) {
                for offset in [0, PAGE - 1, PAGE / 2] {
                    let mut byte = [0];
                    let read = region.read(ByteCount(page * PAGE + offset), &mut byte);
                    let wanted = if offset == PAGE / 2 { expected.map(|_| 0) } else { *expected };
                    assert_eq!(read.is_ok().then_some(byte[0]), wanted, "page {page} at {offset}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn pages_are_zero_or_what_was_written_and_frames_are_in_one_place(ops in proptest::collection::vec(op(), 1..40)) {
        let mut model = Model::new();
        for op in &ops {
            model.apply(op);
            model.check();
        }
        let Model { scene, regions, .. } = model;
        drop(regions);
        scene.world.manager.trim_pool(ALL).expect("nothing refuses");
        prop_assert_eq!(scene.world.device_used(), ByteCount::ZERO);
    }
}
