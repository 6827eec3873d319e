//! For every n: the n-th device call of an operation fails. The error is typed, leases and device memory still agree,
//! host memory does not leak, and when the fault is gone the bytes are all there.

mod common;

use std::sync::Arc;
use std::time::Instant;

use common::{PAGE, WAIT, World, keeping, noise, open, piece, pooled_world_on, source_file, until};
use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_device::device::Verb;
use shoal_device::{Device, DeviceError, FaultDevice, ForeignStream};
use shoal_memory::{Backing, ErrorKind, KvBacking, MemoryError, Region, Segments};

const ALL: ByteCount = ByteCount(u64::MAX);
const PAGES: u64 = 3;
/// What the pool keeps.
const POOL: ByteCount = ByteCount::mib(16);
/// More calls than any operation here makes.
const CALLS_MAX: u64 = 400;

struct Scene {
    world: World,
    faults: Arc<FaultDevice>,
    failed: Arc<Mutex<Option<Verb>>>,
}

impl Scene {
    fn new(host_mib: u64) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let faults = FaultDevice::new(open(dir.path(), 64));
        // What gives memory up in the middle of an operation puts it into the pool.
        let device = Arc::clone(&faults) as Arc<dyn Device>;
        let world = pooled_world_on(dir, device, 32, host_mib, keeping(POOL.0 >> 20));
        Self { world, faults, failed: Arc::default() }
    }

    fn arm(&self, n: u64, is_full: bool) {
        let (mut left, failed) = (n, Arc::clone(&self.failed));
        let device = self.world.device.info().id;
        self.faults.fail_when(move |call| {
            left = left.checked_sub(1)?;
            (left == 0).then(|| {
                *failed.lock() = Some(call.verb);
                let (free, capacity) = (ByteCount::ZERO, ByteCount(PAGE));
                if is_full {
                    DeviceError::OutOfMemory { device, requested: call.bytes, free, capacity }
                } else {
                    DeviceError::Injected { call: call.number, verb: call.verb }
                }
            })
        });
    }

    fn check(&self) {
        self.world.manager.check_invariants().expect("invariants");
        let held: ByteCount =
            LeaseKind::ALL.into_iter().map(|kind| self.world.manager.lease().held(kind)).sum();
        assert_eq!(self.world.device_used(), held, "mapped and leased differ (I1)");
        let copies: ByteCount = self.world.manager.usage().host;
        assert!(copies <= ByteCount::mib(64), "{copies}");
    }
}

fn read(region: &Region) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(region.bytes().0).expect("small")];
    region.read(ByteCount::ZERO, &mut bytes).expect("on the device");
    bytes
}

fn wake(region: &Region) -> Result<(), MemoryError> {
    region.wake(WAIT)?.wait(WAIT).map(drop)
}

/// Fails each call of `act` in turn. `prepare` builds the state; `verify` is called once the fault is gone, after a
/// second `act` where the first failed.
fn sweep<S>(
    what: &str,
    host_mib: u64,
    prepare: impl Fn(&Scene) -> S,
    act: impl Fn(&Scene, &S) -> Result<(), MemoryError>,
    verify: impl Fn(&Scene, &S),
) {
    sweep_as(what, host_mib, false, prepare, |scene, state| act(scene, state).map(|()| true), |_| (), verify);
}

/// As [`sweep`], with errors of their own and as if the device were full; and after a failure all is as before, by what
/// `shape` says of it.
fn sweep_both<S, T: PartialEq + std::fmt::Debug>(
    what: &str,
    prepare: impl Fn(&Scene) -> S,
    act: impl Fn(&Scene, &S) -> Result<bool, MemoryError>,
    shape: impl Fn(&S) -> T,
    verify: impl Fn(&Scene, &S),
) {
    for is_full in [false, true] {
        sweep_as(what, 64, is_full, &prepare, &act, &shape, &verify);
    }
}

/// `act` gives false where it was refused for want of memory.
fn sweep_as<S, T: PartialEq + std::fmt::Debug>(
    what: &str,
    host_mib: u64,
    is_full: bool,
    prepare: impl Fn(&Scene) -> S,
    act: impl Fn(&Scene, &S) -> Result<bool, MemoryError>,
    shape: impl Fn(&S) -> T,
    verify: impl Fn(&Scene, &S),
) {
    for n in 1..CALLS_MAX {
        let scene = Scene::new(host_mib);
        let state = prepare(&scene);
        scene.check();
        let host_before = scene.world.manager.usage().host;
        let shape_before = shape(&state);
        scene.arm(n, is_full);
        let outcome = act(&scene, &state);
        scene.faults.heal();
        let failed = *scene.failed.lock();
        let Some(verb) = failed else {
            assert!(outcome.unwrap_or_else(|error| panic!("{what}: no fault, but {error}")));
            verify(&scene, &state);
            scene.check();
            assert!(n > 3, "{what} made only {n} calls");
            return;
        };
        scene.check();
        let has_failed = match &outcome {
            Err(error) => {
                let kinds: &[ErrorKind] =
                    if is_full { &[ErrorKind::OutOfMemory] } else { &[ErrorKind::Device, ErrorKind::Region] };
                assert!(kinds.contains(&error.kind()), "{what} {n} {verb}: {error}");
                true
            }
            Ok(false) => {
                assert!(is_full, "{what} {n} {verb}: refused");
                true
            }
            Ok(true) => {
                // Memory that may not be locked is used unlocked; where there is none for more than is needed, just that
                // much is made.
                let is_borne =
                    matches!(verb, Verb::WaitEvent | Verb::Memory | Verb::LockHost | Verb::AllocateHost);
                // Frames that could not be zeroed when they were given up are zeroed when they are taken.
                let is_put_off =
                    what == "commit" && matches!(verb, Verb::Zero | Verb::CreateEvent | Verb::Record);
                assert!(verb.is_teardown() || is_borne || is_put_off, "{what} {n} {verb}: no error");
                false
            }
        };
        if has_failed && !verb.is_teardown() {
            assert_eq!(shape(&state), shape_before, "{what} {n} {verb}: not as before");
        }
        assert!(scene.world.manager.usage().host <= host_before + ByteCount(16 * PAGE), "{what} {n} {verb}");
        if has_failed {
            let again = act(&scene, &state);
            assert!(again.unwrap_or_else(|error| panic!("{what} {n} {verb}: again, {error}")), "{what} {n}");
        }
        verify(&scene, &state);
        scene.check();
        drop(state);
        scene.world.manager.trim_pool(ALL).expect("healed");
        assert_eq!(scene.world.manager.leaked_bytes(), ByteCount::ZERO, "{what} {n} {verb}: forgotten");
        assert_eq!(
            scene.world.device_used(),
            ByteCount::ZERO,
            "{what} {n} {verb}: memory outlives its regions"
        );
        assert_eq!(scene.world.manager.usage().host, ByteCount::ZERO, "{what} {n} {verb}: host memory leaks");
    }
    panic!("{what} makes more than {CALLS_MAX} calls");
}

/// Regions that gave all of their memory up, of which so much lies in the pool. What a busy machine has not zeroed in time does
/// not come there, and the calls that follow are others: then it is tried again.
fn pooled(scene: &Scene, kind: LeaseKind, pages: &[u64], kept: ByteCount) -> Vec<Region> {
    let deadline = Instant::now() + WAIT;
    loop {
        let others: Vec<Region> =
            pages.iter().map(|pages| scene.world.region("other", *pages, kind)).collect();
        for other in &others {
            other.commit(ByteCount::ZERO, other.bytes()).expect("room");
            other.write(ByteCount::ZERO, &noise(2 * PAGE, 1)).expect("there");
            other.decommit(ByteCount::ZERO, other.bytes()).expect("whole extents");
        }
        if scene.world.manager.pool_usage().bytes == kept {
            return others;
        }
        assert!(Instant::now() < deadline, "{:?} and not {kept}", scene.world.manager.pool_usage());
        drop(others);
        scene.world.manager.trim_pool(ALL).expect("nothing holds it");
        let other = scene.world.region("other", 1, LeaseKind::Weights);
        until("what was zeroed late is free", || {
            // Whoever changes memory frees what was not to be freed before.
            other.stage(ByteCount::ZERO, b"any", None).expect("room");
            scene.world.device_used().is_zero()
        });
    }
}

fn staged(scene: &Scene, seed: u64) -> Region {
    scene.world.weights(PAGES, &noise(PAGES * PAGE, seed))
}

fn awake(scene: &Scene, seed: u64) -> Region {
    let region = staged(scene, seed);
    wake(&region).expect("room");
    region
}

fn holds(region: &Region, seed: u64) {
    wake(region).expect("room");
    assert_eq!(read(region), noise(PAGES * PAGE, seed));
}

/// What a region has, without the count of what ever left the device: what came in vain has left it again.
fn held(region: &Region) -> shoal_memory::RegionUsage {
    shoal_memory::RegionUsage { left: ByteCount::ZERO, ..region.usage() }
}

#[test]
fn staging_and_sealing() {
    let act = |_: &Scene, region: &Region| {
        region.stage(ByteCount::ZERO, &noise(PAGES * PAGE, 1), None)?;
        if region.usage().sealed { Ok(()) } else { region.seal().map(drop) }
    };
    let prepare = |scene: &Scene| scene.world.region("weights", PAGES, LeaseKind::Weights);
    // Staging allocates host memory only, more than it needs at first and just that if there is not so much.
    let scene = Scene::new(64);
    let region = prepare(&scene);
    scene.faults.fail_nth_matching(1, |call| call.verb == Verb::AllocateHost);
    act(&scene, &region).expect("it makes less");
    assert_eq!(scene.faults.injected(), 1);
    holds(&region, 1);
    for n in 1..=PAGES {
        let scene = Scene::new(64);
        let region = prepare(&scene);
        // None longer than a page, and of those the n-th is one too many.
        let mut left = n;
        scene.faults.fail_when(move |call| {
            if call.verb != Verb::AllocateHost {
                return None;
            }
            left -= u64::from(call.bytes <= ByteCount(PAGE) && left > 0);
            let is_refused = left == 0 || call.bytes > ByteCount(PAGE);
            is_refused.then_some(DeviceError::Injected { call: call.number, verb: call.verb })
        });
        let error = act(&scene, &region).expect_err("injected");
        assert_eq!(error.kind(), ErrorKind::Device);
        scene.faults.heal();
        assert_eq!(scene.world.manager.usage().host, ByteCount::ZERO, "nothing is kept of a failed staging");
        act(&scene, &region).expect("no fault");
        holds(&region, 1);
        scene.check();
    }
}

#[test]
fn waking_from_the_host() {
    let act = |_: &Scene, region: &Region| wake(region).map(|()| true);
    let prepare = |scene: &Scene| staged(scene, 2);
    sweep_both("wake", prepare, act, held, |_, region| holds(region, 2));
    // What is there already stays there.
    let prepare = |scene: &Scene| {
        let region = awake(scene, 2);
        region.sleep(0.4, false, WAIT).expect("clean");
        assert!(!region.usage().device.is_zero());
        region
    };
    sweep_both("wake the rest", prepare, act, held, |_, region| holds(region, 2));
}

#[test]
fn a_step_beside_a_wake() {
    let act = |_: &Scene, region: &Region| {
        let (guard, wake) = region.guard_in_order(WAIT)?;
        if let Some(wake) = &wake {
            for page in 0..PAGES {
                wake.wait_stream(ByteCount(page * PAGE), ByteCount(PAGE), ForeignStream::DEFAULT, WAIT)?;
            }
            wake.wait(WAIT)?;
        }
        drop(guard);
        Ok(true)
    };
    // What came under a step stays, so not all is as before.
    sweep_both("step", |scene| staged(scene, 9), act, |_| (), |_, region| holds(region, 9));
}

#[test]
fn growing() {
    let prepare = |scene: &Scene| {
        let region = scene.world.region("workspace", 9, LeaseKind::Overhead);
        region.commit(ByteCount::ZERO, ByteCount(2 * PAGE)).expect("room");
        region.write(ByteCount(PAGE), b"kept").expect("there");
        region
    };
    let act = |_: &Scene, region: &Region| region.commit(ByteCount::ZERO, ByteCount(9 * PAGE)).map(|_| true);
    sweep_both("commit more", prepare, act, held, |_, region| {
        let bytes = read(region);
        let (from, to) = (usize::try_from(PAGE).expect("small"), usize::try_from(2 * PAGE).expect("small"));
        assert_eq!(&bytes[from..from + 4], b"kept");
        assert!(bytes[to..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn backing_more_blocks_while_others_lie_on_the_host() {
    let prepare = |scene: &Scene| {
        let region = scene.world.region("kv", 8, LeaseKind::Kv);
        let kv = KvBacking::new(&region, ByteCount(PAGE / 2), 16).expect("fits");
        assert!(kv.back(&[0, 1, 2, 9]).expect("room"));
        region.write(ByteCount(PAGE), b"kept").expect("backed");
        scene.world.manager.reclaim(ALL, WAIT, "a test").expect("no step runs");
        assert!(region.usage().device.is_zero());
        kv
    };
    let act = |_: &Scene, kv: &Arc<KvBacking>| {
        if kv.live_bytes() > ByteCount(2 * PAGE) { Ok(true) } else { kv.back(&[3, 4, 5]) }
    };
    let shape = |kv: &Arc<KvBacking>| {
        (kv.live_bytes(), kv.backed_bytes(), kv.idle_bytes(), kv.region().usage().total)
    };
    sweep_both("back", prepare, act, shape, |scene, kv| {
        let _guard = scene.world.manager.guard(WAIT).expect("all comes back");
        let mut kept = [0; 4];
        kv.region().read(ByteCount(PAGE), &mut kept).expect("backed");
        assert_eq!(&kept, b"kept");
        assert_eq!(kv.live_bytes(), ByteCount(7 * PAGE / 2));
    });
}

#[test]
fn waking_from_the_file() {
    let prepare = |scene: &Scene| {
        let bytes = noise(PAGES * PAGE, 3);
        let path = source_file(scene.world.dir.path(), &bytes);
        let region = scene.world.region("weights", PAGES, LeaseKind::Weights);
        region.stage(ByteCount::ZERO, &bytes, Some(piece(&path, 0, PAGES * PAGE))).expect("verified");
        region.seal().expect("sealed");
        assert!(!region.usage().source_only.is_zero());
        region
    };
    sweep("wake from source", 4, prepare, |_, region| wake(region), |_, region| holds(region, 3));
}

#[test]
fn sleeping_clean() {
    let act = |_: &Scene, region: &Region| region.sleep(0.0, false, WAIT).map(drop);
    sweep("sleep", 64, |scene| awake(scene, 4), act, |_, region| holds(region, 4));
}

#[test]
fn sleeping_dirty() {
    let prepare = |scene: &Scene| {
        let region = awake(scene, 5);
        region.write(ByteCount::ZERO, &noise(PAGES * PAGE, 6)).expect("on the device");
        region
    };
    let act = |_: &Scene, region: &Region| region.sleep(0.0, false, WAIT).map(drop);
    sweep("sleep dirty", 64, prepare, act, |_, region| holds(region, 6));
}

#[test]
fn freezing() {
    let prepare = |scene: &Scene| {
        let region = scene.world.region("weights", PAGES, LeaseKind::Overhead);
        region.commit(ByteCount::ZERO, ByteCount(PAGES * PAGE)).expect("room");
        region.write(ByteCount::ZERO, &noise(PAGES * PAGE, 8)).expect("on the device");
        region
    };
    let act = |_: &Scene, region: &Region| region.freeze(WAIT)?.wait(WAIT).map(|_| true);
    // What was copied counts, whatever came after.
    let shape = |region: &Region| (region.usage().device, region.usage().total);
    sweep_both("freeze", prepare, act, shape, |_, region| {
        assert!(region.usage().sealed);
        assert_eq!(region.sleep(0.0, false, WAIT).expect("clean").copied, ByteCount::ZERO);
        holds(region, 8);
    });
}

#[test]
fn committing_and_decommitting() {
    let prepare = |scene: &Scene| scene.world.region("workspace", 7, LeaseKind::Overhead);
    let act = |_: &Scene, region: &Region| {
        region.commit(ByteCount::ZERO, ByteCount(7 * PAGE))?;
        region.decommit(ByteCount::ZERO, ByteCount(2 * PAGE))?;
        region.commit(ByteCount::ZERO, ByteCount(7 * PAGE)).map(drop)
    };
    sweep("commit", 64, prepare, act, |_, region| {
        assert!(read(region).iter().all(|byte| *byte == 0));
    });
}

/// Frames of other regions lie in the pool, of sizes that fit and of sizes that do not.
#[test]
fn growing_from_the_pool() {
    struct Pooled {
        region: Region,
        _others: Vec<Region>,
    }
    let prepare = |scene: &Scene| {
        let others = pooled(scene, LeaseKind::Overhead, &[9, 4], POOL);
        let region = scene.world.region("workspace", 9, LeaseKind::Overhead);
        region.commit(ByteCount::ZERO, ByteCount(2 * PAGE)).expect("room");
        region.write(ByteCount(PAGE), b"kept").expect("there");
        Pooled { region, _others: others }
    };
    let act =
        |_: &Scene, pooled: &Pooled| pooled.region.commit(ByteCount::ZERO, ByteCount(9 * PAGE)).map(|_| true);
    let shape = |pooled: &Pooled| held(&pooled.region);
    sweep_both("commit from the pool", prepare, act, shape, |_, pooled| {
        let bytes = read(&pooled.region);
        let (from, to) = (usize::try_from(PAGE).expect("small"), usize::try_from(2 * PAGE).expect("small"));
        assert_eq!(&bytes[from..from + 4], b"kept");
        assert!(bytes[to..].iter().all(|byte| *byte == 0), "bytes of others");
    });
}

/// What a wake and a swap take from the pool, and put there when they fail.
#[test]
fn waking_from_the_pool() {
    let prepare = |scene: &Scene| {
        let region = staged(scene, 2);
        (region, pooled(scene, LeaseKind::Weights, &[PAGES], ByteCount(PAGES * PAGE)))
    };
    let act = |_: &Scene, regions: &(Region, Vec<Region>)| wake(&regions.0).map(|()| true);
    let shape = |regions: &(Region, Vec<Region>)| held(&regions.0);
    sweep_both("wake from the pool", prepare, act, shape, |_, regions| holds(&regions.0, 2));
}

#[test]
fn backing_blocks_and_reclaiming() {
    struct Shelf {
        weights: Region,
        region: Region,
        kv: Arc<KvBacking>,
    }
    let prepare = |scene: &Scene| {
        let region = scene.world.region("kv", 8, LeaseKind::Kv);
        let kv = KvBacking::new(&region, ByteCount(PAGE / 2), 16).expect("fits");
        assert!(kv.back(&[0, 1, 2]).expect("room"));
        region.write(ByteCount::ZERO, b"tokens").expect("backed");
        Shelf { weights: awake(scene, 7), region, kv }
    };
    let act = |scene: &Scene, shelf: &Shelf| {
        if shelf.kv.live_bytes() < ByteCount(2 * PAGE) {
            assert!(shelf.kv.back(&[9])?);
        }
        // The block stays in use by count only; its page becomes idle.
        shelf.kv.unback(&[9])?;
        let report = scene.world.manager.reclaim(ALL, WAIT, "a test")?;
        report.error.map_or(Ok(()), |error| Err(*error))
    };
    let verify = |scene: &Scene, shelf: &Shelf| {
        let _guard = scene.world.manager.guard(WAIT).expect("all comes back");
        assert_eq!(read(&shelf.weights), noise(PAGES * PAGE, 7));
        let mut tokens = [0; 6];
        shelf.region.read(ByteCount::ZERO, &mut tokens).expect("backed");
        assert_eq!(&tokens, b"tokens");
    };
    sweep("reclaim", 64, prepare, act, verify);
}

/// A growing region that is never frozen: paused with what was written, resumed with its copies kept, written, paused
/// again, resumed with its copies forgotten.
#[test]
fn pausing_and_resuming_what_grows() {
    let written = noise(4096, 5);
    sweep(
        "pausing",
        64,
        |scene| {
            let segments =
                Segments::new(&scene.world.manager, "tag".to_owned(), LeaseKind::Weights, Backing::Keep)
                    .expect("addresses");
            segments.region().set_yields(false);
            segments.allocate(ByteCount(PAGES * PAGE), None).expect("room");
            segments.region().write(ByteCount::ZERO, &noise(PAGES * PAGE, 4)).expect("there");
            segments
        },
        |_, segments| {
            let region = segments.region();
            if region.usage().host.is_zero() {
                region.record_checksums(WAIT)?;
                region.sleep(0.0, false, WAIT)?;
            }
            if !region.missing_bytes().is_zero() {
                wake(region)?;
            }
            region.write(ByteCount::ZERO, &written)?;
            region.record_checksums(WAIT)?;
            region.sleep(0.0, false, WAIT)?;
            wake(region)?;
            region.forget_copies().map(drop)
        },
        |_, segments| {
            let mut expected = noise(PAGES * PAGE, 4);
            expected[..written.len()].copy_from_slice(&written);
            let mut read = vec![0; expected.len()];
            segments.region().read(ByteCount::ZERO, &mut read).expect("on the device");
            assert!(read == expected);
            assert_eq!(segments.region().usage().host, ByteCount::ZERO);
        },
    );
}
