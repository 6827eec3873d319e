//! One region out, another in, in the room of one: bytes, leases, guards, and every device call failing in turn.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{PAGE, WAIT, World, noise, open, world, world_on};
use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::extent::ExtentRule;
use shoal_core::protocol::LeaseKind;
use shoal_device::device::Verb;
use shoal_device::{Device, DeviceError, FaultDevice};
use shoal_memory::{Backing, ErrorKind, MemoryError, Region, RegionSpec};

const PAGES: u64 = 8;
const SOON: Duration = Duration::from_millis(30);
/// More calls than any swap here makes.
const CALLS_MAX: u64 = 600;

fn bytes(seed: u64) -> Vec<u8> {
    noise(PAGES * PAGE, seed)
}

/// How the first region's bytes came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// Sealed, unwritten since: nothing needs a copy.
    Clean,
    /// Sealed, written since on the device.
    Dirty,
    /// Written on the device, never sealed.
    Written,
}

fn wake(region: &Region) {
    region.wake(WAIT).expect("a thread").wait(WAIT).expect("room");
}

fn read(region: &Region) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(region.bytes().0).expect("small")];
    region.read(ByteCount::ZERO, &mut bytes).expect("on the device");
    bytes
}

/// A region with these bytes on the device.
fn resident(world: &World, origin: Origin, seed: u64) -> Region {
    let region = match origin {
        Origin::Clean => world.weights(PAGES, &bytes(seed)),
        Origin::Dirty => world.weights(PAGES, &bytes(seed + 1000)),
        Origin::Written => world.region("written", PAGES, LeaseKind::Weights),
    };
    match origin {
        Origin::Clean | Origin::Dirty => wake(&region),
        Origin::Written => drop(region.commit(ByteCount::ZERO, region.bytes()).expect("room")),
    }
    if origin != Origin::Clean {
        region.write(ByteCount::ZERO, &bytes(seed)).expect("resident");
    }
    region
}

fn holds(region: &Region, seed: u64, what: &str) {
    wake(region);
    assert!(read(region) == bytes(seed), "{what}: bytes of {}", region.name());
}

#[test]
fn two_regions_take_turns_in_the_room_of_one() {
    for origin in [Origin::Clean, Origin::Dirty, Origin::Written] {
        let what = format!("{origin:?}");
        let world = world(2 * PAGES, 128);
        let (one, two) = (resident(&world, origin, 1), world.weights(PAGES, &bytes(2)));
        let addresses = (one.address(), two.address());
        let report = world.manager.swap(&one, &two, false, WAIT).expect("room of one");
        assert_eq!(report.out.freed, one.bytes(), "{what}");
        let copied = if origin == Origin::Clean { ByteCount::ZERO } else { one.bytes() };
        assert_eq!((report.out.copied, report.into.copied), (copied, two.bytes()), "{what}");
        assert_eq!((one.usage().device, two.usage().device), (ByteCount::ZERO, two.bytes()));
        assert!(read(&two) == bytes(2), "{what}");
        world.check();
        for _ in 0..3 {
            world.manager.swap(&two, &one, false, WAIT).expect("back");
            assert!(read(&one) == bytes(1), "{what}");
            world.manager.swap(&one, &two, true, WAIT).expect("again");
            assert!(read(&two) == bytes(2), "{what}");
            world.check();
        }
        assert_eq!((one.address(), two.address()), addresses);
    }
}

#[test]
fn frames_change_regions_and_are_not_made_anew() {
    let dir = tempfile::tempdir().expect("a directory");
    let faults = FaultDevice::new(open(dir.path(), 64));
    let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 2 * PAGES, 64);
    let (one, two) = (resident(&world, Origin::Clean, 1), world.weights(PAGES, &bytes(2)));
    faults.clear_history();
    world.manager.swap(&one, &two, false, WAIT).expect("room of one");
    let count = |verb| faults.history().iter().filter(|call| call.verb == verb).count();
    assert_eq!((count(Verb::CreateFrame), count(Verb::DestroyFrame)), (0, 0));
    assert!(count(Verb::Map) > 2);
    world.check();
}

/// What was written is found and copied, what was not is only dropped, and the first copy waits for no hash of the last.
#[test]
fn what_leaves_is_compared_while_others_are_copied() {
    const MANY: u64 = 24;
    let dir = tempfile::tempdir().expect("a directory");
    let faults = FaultDevice::new(open(dir.path(), 64));
    let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 2 * MANY, 128);
    let made = |name: &str, seed| {
        let spec = RegionSpec {
            name: name.to_owned(),
            bytes: ByteCount(MANY * PAGE),
            kind: LeaseKind::Weights,
            extent_rule: ExtentRule { pieces_min: MANY, ..ExtentRule::default() },
            backing: Backing::Keep,
        };
        let region = world.manager.region(spec).expect("addresses");
        region.stage(ByteCount::ZERO, &noise(MANY * PAGE, seed), None).expect("host room");
        region.seal().expect("sealed");
        region
    };
    let (one, two) = (made("one", 1), made("two", 2));
    wake(&one);
    let mut expected = noise(MANY * PAGE, 1);
    for page in (0..MANY).filter(|page| page % 3 != 1) {
        let at = page * PAGE + 77;
        one.write(ByteCount(at), b"written").expect("on the device");
        let at = usize::try_from(at).expect("small");
        expected[at..at + 7].copy_from_slice(b"written");
    }
    faults.clear_history();
    let report = world.manager.swap(&one, &two, false, WAIT).expect("room of one");
    assert_eq!(report.out.copied, ByteCount(MANY / 3 * 2 * PAGE), "what was written, and no more");
    let verbs: Vec<Verb> = faults.history().iter().map(|call| call.verb).collect();
    let first_copy = verbs.iter().position(|verb| *verb == Verb::Copy).expect("copies");
    let hashes_before = verbs[..first_copy].iter().filter(|verb| **verb == Verb::Hash).count();
    assert!(hashes_before < 12, "{hashes_before} of {MANY} were hashed before the first copy");
    assert_eq!(verbs.iter().filter(|verb| **verb == Verb::Hash).count() as u64, MANY);
    assert!(read(&two) == noise(MANY * PAGE, 2));
    world.manager.swap(&two, &one, false, WAIT).expect("back");
    assert!(read(&one) == expected, "what was written came back");
    world.check();
}

#[test]
fn extents_of_other_sizes_and_more_or_fewer_bytes() {
    let world = world(2 * PAGES + 8, 128);
    let spec = |name: &str, pages: u64, pieces_min: u64| RegionSpec {
        name: name.to_owned(),
        bytes: ByteCount(pages * PAGE),
        kind: LeaseKind::Weights,
        extent_rule: ExtentRule { pieces_min, ..ExtentRule::default() },
        backing: Backing::Keep,
    };
    let made = |name, pages, pieces, seed| {
        let region = world.manager.region(spec(name, pages, pieces)).expect("addresses");
        region.stage(ByteCount::ZERO, &noise(pages * PAGE, seed), None).expect("host room");
        region.seal().expect("sealed");
        region
    };
    let (long, short) = (made("long", PAGES + 3, 2, 1), made("short", PAGES, 8, 2));
    wake(&long);
    world.manager.swap(&long, &short, false, WAIT).expect("less room is needed");
    assert!(read(&short) == noise(PAGES * PAGE, 2));
    world.check();
    world.manager.swap(&short, &long, false, WAIT).expect("the budget has the rest");
    assert!(read(&long) == noise((PAGES + 3) * PAGE, 1));
    world.check();
    // Half of it is there already.
    long.sleep(0.5, false, WAIT).expect("clean");
    world.manager.swap(&short, &long, false, WAIT).expect("short is not on the device");
    assert!(read(&long) == noise((PAGES + 3) * PAGE, 1));
    world.check();
    let huge = made("huge", 2 * PAGES, 4, 3);
    let error = world.manager.swap(&long, &huge, false, WAIT).expect_err("more than the budget has");
    assert_eq!(error.kind(), ErrorKind::Lease, "{error}");
    assert_eq!(long.usage().device, long.bytes(), "nothing has changed");
    world.check();
}

#[test]
fn discarded_bytes_come_back_zeroed_on_frames_that_were_used() {
    let world = world(2 * PAGES, 64);
    let spec = RegionSpec {
        name: "scratch".to_owned(),
        bytes: ByteCount(PAGES * PAGE),
        kind: LeaseKind::Weights,
        extent_rule: ExtentRule { pieces_min: 4, ..ExtentRule::default() },
        backing: Backing::Discard,
    };
    let scratch = world.manager.region(spec).expect("addresses");
    scratch.commit(ByteCount::ZERO, scratch.bytes()).expect("room");
    scratch.write(ByteCount::ZERO, &bytes(9)).expect("resident");
    let region = world.weights(PAGES, &bytes(1));
    world.manager.swap(&scratch, &region, false, WAIT).expect("room of one");
    assert!(read(&region) == bytes(1));
    world.manager.swap(&region, &scratch, false, WAIT).expect("room of one");
    assert!(read(&scratch).iter().all(|byte| *byte == 0), "another region's bytes are seen");
    world.check();
}

#[test]
fn what_was_written_needs_host_room_for_little_more_than_one() {
    // Two regions that were never sealed: the host holds one of them and a part.
    let world = world(2 * PAGES, 2 * PAGES + 10);
    let one = resident(&world, Origin::Written, 1);
    one.sleep(0.0, false, WAIT).expect("host room");
    let two = resident(&world, Origin::Written, 2);
    for _ in 0..3 {
        world.manager.swap(&two, &one, false, WAIT).expect("host room comes back as copies arrive");
        assert!(read(&one) == bytes(1));
        world.manager.swap(&one, &two, false, WAIT).expect("host room comes back as copies arrive");
        assert!(read(&two) == bytes(2));
        world.check();
    }
}

#[test]
fn without_host_room_nothing_moves() {
    let world = world(2 * PAGES, 2 * PAGES + 4);
    let one = resident(&world, Origin::Written, 1);
    let two = world.weights(PAGES, &bytes(2));
    let before = (one.usage(), two.usage());
    let error = world.manager.swap(&one, &two, false, WAIT).expect_err("no host room");
    assert_eq!(error.kind(), ErrorKind::HostBudget, "{error}");
    assert_eq!((one.usage(), two.usage()), before);
    world.check();
}

#[test]
fn regions_that_cannot_be_swapped_are_refused() {
    let (world, other) = (world(32, 64), world(32, 64));
    let region = world.weights(2, &noise(2 * PAGE, 1));
    let kv = world.region("kv", 2, LeaseKind::Kv);
    let foreign = other.weights(2, &noise(2 * PAGE, 1));
    for (out, into) in [(&region, &region), (&region, &kv), (&kv, &region), (&region, &foreign)] {
        let error = world.manager.swap(out, into, false, WAIT).expect_err("refused");
        assert!(matches!(error, MemoryError::State { .. }), "{error}");
    }
    wake(&region);
    let filler = region.begin_use(WAIT).expect("resident");
    let into = world.weights(2, &noise(2 * PAGE, 2));
    let error = world.manager.swap(&region, &into, false, WAIT).expect_err("somebody fills it");
    assert!(matches!(error, MemoryError::State { .. }), "{error}");
    drop(filler);
    world.manager.swap(&region, &into, false, WAIT).expect("now");
}

#[test]
fn guards_of_both_are_waited_for_and_those_of_others_are_not() {
    let world = world(2 * PAGES + 4, 128);
    let (one, two) = (resident(&world, Origin::Clean, 1), world.weights(PAGES, &bytes(2)));
    let third = world.weights(1, &noise(PAGE, 3));
    let beside = third.guard(WAIT).expect("room");
    let held = one.guard(WAIT).expect("resident");
    let error = world.manager.swap(&one, &two, false, SOON).expect_err("a step runs on it");
    assert!(matches!(error, MemoryError::Deadline { .. }), "{error}");
    assert_eq!(one.usage().device, one.bytes());
    drop(held);
    world.manager.swap(&one, &two, false, WAIT).expect("another region's step is no hindrance");
    let held = two.guard(WAIT).expect("resident");
    let error = world.manager.swap(&one, &two, false, SOON).expect_err("a step runs on what comes");
    assert!(matches!(error, MemoryError::Deadline { .. }), "{error}");
    drop((held, beside));
    world.check();
}

#[test]
fn swaps_both_ways_guards_and_evictions_do_not_lock_up() {
    let world = world(2 * PAGES + 2, 128);
    let (one, two) = (resident(&world, Origin::Clean, 1), world.weights(PAGES, &bytes(2)));
    thread::scope(|scope| {
        for turn in 0..4 {
            let (one, two, world) = (&one, &two, &world);
            scope.spawn(move || {
                for _ in 0..15 {
                    let swapped = match turn {
                        0 => world.manager.swap(one, two, false, WAIT).map(drop),
                        1 => world.manager.swap(two, one, false, WAIT).map(drop),
                        2 => one.guard(Duration::from_millis(200)).map(|guard| {
                            assert!(read(one) == bytes(1));
                            drop(guard);
                        }),
                        _ => two.sleep(0.0, false, WAIT).map(drop),
                    };
                    if let Err(error) = swapped {
                        // There is no room for both, and nobody makes some for a guard here.
                        let is_expected = matches!(error.kind(), ErrorKind::Lease)
                            || (turn == 2 && matches!(error, MemoryError::Deadline { .. }));
                        assert!(is_expected, "{turn}: {error}");
                    }
                }
            });
        }
    });
    two.sleep(0.0, false, WAIT).expect("clean");
    holds(&one, 1, "one");
    one.sleep(0.0, false, WAIT).expect("clean");
    holds(&two, 2, "two");
    world.check();
}

struct Scene {
    world: World,
    faults: Arc<FaultDevice>,
    failed: Arc<Mutex<Option<Verb>>>,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let faults = FaultDevice::new(open(dir.path(), 64));
        let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 2 * PAGES, 128);
        Self { world, faults, failed: Arc::default() }
    }

    fn arm(&self, n: u64, error: impl Fn(u64, Verb) -> DeviceError + Send + 'static) {
        let (mut left, failed) = (n, Arc::clone(&self.failed));
        self.faults.fail_when(move |call| {
            left = left.checked_sub(1)?;
            (left == 0).then(|| {
                *failed.lock() = Some(call.verb);
                error(call.number, call.verb)
            })
        });
    }
}

/// Fails each call of a swap in turn, with an error of its own or as if the device were full. `pieces_min` of the region
/// that comes decides whether it takes over frames or needs new ones.
fn sweep(origin: Origin, is_full: bool, pieces_min: u64) {
    for n in 1..CALLS_MAX {
        let scene = Scene::new();
        let manager = &scene.world.manager;
        let one = resident(&scene.world, origin, 1);
        let spec = RegionSpec {
            name: "two".to_owned(),
            bytes: ByteCount(PAGES * PAGE),
            kind: LeaseKind::Weights,
            extent_rule: ExtentRule { pieces_min, ..ExtentRule::default() },
            backing: Backing::Keep,
        };
        let two = manager.region(spec).expect("addresses");
        two.stage(ByteCount::ZERO, &bytes(2), None).expect("host room");
        two.seal().expect("sealed");
        let full = DeviceError::OutOfMemory {
            device: scene.world.device.info().id,
            requested: ByteCount(PAGE),
            free: ByteCount::ZERO,
            capacity: ByteCount(PAGE),
        };
        scene.arm(
            n,
            move |call, verb| {
                if is_full { full.clone() } else { DeviceError::Injected { call, verb } }
            },
        );
        let outcome = manager.swap(&one, &two, false, WAIT);
        scene.faults.heal();
        let Some(verb) = *scene.failed.lock() else {
            outcome.expect("no fault");
            assert!(n > 20, "a swap made only {n} calls");
            return;
        };
        let what = format!("{origin:?}, call {n}, {verb}");
        manager.check_invariants().unwrap_or_else(|error| panic!("{what}: {error}"));
        let held = manager.lease().held(LeaseKind::Weights);
        assert_eq!(scene.world.device_used(), held, "{what}: mapped and leased differ (I1)");
        assert!(held <= ByteCount(PAGES * PAGE), "{what}: {held} in the room of one");
        if let Err(error) = &outcome {
            let kinds = [ErrorKind::Device, ErrorKind::OutOfMemory, ErrorKind::Region];
            assert!(kinds.contains(&error.kind()), "{what}: {error}");
        }
        if outcome.is_err() {
            manager.swap(&one, &two, false, WAIT).unwrap_or_else(|error| panic!("{what}: again, {error}"));
        }
        assert_eq!(two.usage().device, two.bytes(), "{what}");
        holds(&two, 2, &what);
        manager.swap(&two, &one, false, WAIT).unwrap_or_else(|error| panic!("{what}: back, {error}"));
        holds(&one, 1, &what);
        assert_eq!(manager.leaked_bytes(), ByteCount::ZERO, "{what}: forgotten");
        scene.world.check();
        drop((one, two));
        assert_eq!(scene.world.device_used(), ByteCount::ZERO, "{what}: memory outlives its regions");
        assert_eq!(manager.usage().host, ByteCount::ZERO, "{what}: host memory leaks");
    }
    panic!("a swap makes more than {CALLS_MAX} calls");
}

#[test]
fn every_call_of_a_clean_swap_fails_once() {
    sweep(Origin::Clean, false, 4);
}

#[test]
fn every_call_of_a_dirty_swap_fails_once() {
    sweep(Origin::Dirty, false, 4);
}

#[test]
fn every_call_of_a_swap_of_what_was_written_fails_once() {
    sweep(Origin::Written, false, 4);
}

#[test]
fn the_device_is_full_at_every_call_of_a_swap_with_new_frames() {
    sweep(Origin::Dirty, true, 8);
}
