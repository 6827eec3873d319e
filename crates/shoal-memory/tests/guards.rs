//! Guards against those who evict: neither sees the other's work half done, and neither is kept out for ever.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use common::{PAGE, WAIT, World, noise, until, world};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_memory::{ErrorKind, KvBacking, MemoryError, Region};

const ALL: ByteCount = ByteCount(u64::MAX);
const WEIGHTS_PAGES: u64 = 4;

/// I13: while a step holds its guard everything is on the device, whatever evicts meanwhile.
#[test]
fn steps_and_evictions_take_turns() {
    // A budget that holds the weights once: two steps that wait for them must not ask for them twice.
    let world = world(WEIGHTS_PAGES * 2, 64);
    let bytes = noise(WEIGHTS_PAGES * PAGE, 3);
    let region = world.weights(WEIGHTS_PAGES, &bytes);
    let (stop, freed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let evictor = {
        let (manager, stop, freed) = (Arc::downgrade(&world.manager), Arc::clone(&stop), Arc::clone(&freed));
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let Some(manager) = Weak::upgrade(&manager) else { break };
                let report = manager.reclaim(ByteCount(2 * PAGE), WAIT, "a test").expect("steps are short");
                freed.fetch_add(report.freed.0, Ordering::Relaxed);
            }
        })
    };
    let steppers: Vec<_> = (0..2)
        .map(|seed: u64| {
            let (manager, region, bytes) = (Arc::clone(&world.manager), region.clone(), bytes.clone());
            let freed = Arc::clone(&freed);
            thread::spawn(move || {
                let deadline = Instant::now() + WAIT;
                // Until it has had its turn among them, however late its thread begins.
                for step in (0..).take_while(|step| *step < 15 || freed.load(Ordering::Relaxed) == 0) {
                    assert!(step < 15 || Instant::now() < deadline, "the one that evicts was starved");
                    let _guard = manager.guard(WAIT).expect("restored in time");
                    assert!(region.missing_bytes().is_zero(), "evicted under a guard (I13)");
                    let at = usize::try_from((step * 7 + seed) * 400_000 % (WEIGHTS_PAGES * PAGE - 64))
                        .expect("small");
                    let mut read = [0; 64];
                    region.read(ByteCount(at as u64), &mut read).expect("on the device");
                    assert_eq!(read, bytes[at..at + 64]);
                }
            })
        })
        .collect();
    for stepper in steppers {
        stepper.join().expect("no step saw a hole");
    }
    stop.store(true, Ordering::Relaxed);
    evictor.join().expect("no panic");
    world.check();
}

/// Runs `work` again and again on a thread, without a pause, until dropped.
struct Busy {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    worker: Option<thread::JoinHandle<()>>,
}

impl Busy {
    fn start(mut work: impl FnMut() + Send + 'static) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&rounds));
        let worker = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                work();
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { stop, rounds, worker: Some(worker) }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let worker = self.worker.take().expect("joined once");
        if !thread::panicking() {
            // On a busy machine its thread may not have begun.
            until("it has its turn", || self.rounds.load(Ordering::Relaxed) > 0 || worker.is_finished());
        }
        self.stop.store(true, Ordering::Relaxed);
        let ended = worker.join();
        assert!(ended.is_ok() || thread::panicking(), "a busy thread panicked");
        assert!(self.rounds.load(Ordering::Relaxed) > 0 || thread::panicking(), "it was starved");
    }
}

fn reclaiming(world: &World) -> Busy {
    let manager = Arc::clone(&world.manager);
    Busy::start(move || drop(manager.reclaim(ALL, WAIT, "a test").expect("steps are short")))
}

#[test]
fn reclaims_without_a_pause_starve_no_guard() {
    let world = world(32, 64);
    let weights = world.weights(WEIGHTS_PAGES, &noise(WEIGHTS_PAGES * PAGE, 1));
    let region = world.region("kv", 4, LeaseKind::Kv);
    let kv = KvBacking::new(&region, ByteCount(PAGE), 4).expect("fits");
    assert!(kv.back(&[0, 1, 2]).expect("room"));
    let busy = [reclaiming(&world), reclaiming(&world), reclaiming(&world)];
    for step in 0..20 {
        let begun = Instant::now();
        let guard = world.manager.guard(Duration::from_secs(20)).expect("its turn comes");
        assert!(weights.missing_bytes().is_zero() && region.missing_bytes().is_zero(), "I13");
        drop(guard);
        assert!(begun.elapsed() < Duration::from_secs(10), "step {step} waited {:?}", begun.elapsed());
    }
    drop(busy);
    world.check();
}

#[test]
fn a_guard_inside_a_guard_does_not_wait_for_who_waits_for_the_outer_one() {
    let world = world(32, 64);
    let regions = [world.weights(2, &noise(2 * PAGE, 1)), world.weights(2, &noise(2 * PAGE, 2))];
    let outer = world.manager.guard(WAIT).expect("room");
    let busy = Busy::start({
        let manager = Arc::clone(&world.manager);
        move || drop(manager.reclaim(ALL, WAIT, "a test").expect("the guard ends"))
    });
    thread::sleep(Duration::from_millis(50));
    let begun = Instant::now();
    let inner = world.manager.guard(WAIT).expect("the outer one keeps everything there");
    let of_one = regions[0].guard(WAIT).expect("the same");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop((outer, of_one));
    assert!(regions.iter().all(|region| region.missing_bytes().is_zero()), "the inner one counts too");
    drop(inner);
    drop(busy);
    world.check();
}

#[test]
fn inside_a_guard_nothing_is_brought_back_and_that_is_said_at_once() {
    let world = world(32, 64);
    let (first, second) = (world.weights(2, &noise(2 * PAGE, 1)), world.weights(3, &noise(3 * PAGE, 2)));
    let guard = first.guard(WAIT).expect("room");
    let begun = Instant::now();
    for refused in [second.guard(WAIT), world.manager.guard(WAIT)] {
        let error = refused.expect_err("something is missing");
        assert_eq!(error.kind(), ErrorKind::Region);
        assert!(
            matches!(error, MemoryError::NestedGuard { missing, .. } if missing == ByteCount(3 * PAGE)),
            "{error}"
        );
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop(guard);
    drop(world.manager.guard(WAIT).expect("room"));
    let _outer = first.guard(WAIT).expect("there");
    let _inner = second.guard(WAIT).expect("there as well");
    let _all = world.manager.guard(WAIT).expect("all of it is there");
}

#[test]
fn a_guard_of_one_region_brings_back_and_keeps_only_that_one() {
    let world = world(32, 64);
    let bytes = noise(3 * PAGE, 1);
    let (first, second) = (world.weights(3, &bytes), world.weights(2, &noise(2 * PAGE, 2)));
    let guard = first.guard(WAIT).expect("room");
    assert_eq!((first.usage().device, second.usage().device), (ByteCount(3 * PAGE), ByteCount::ZERO));
    second.wake(WAIT).expect("started").wait(WAIT).expect("room");
    second.sleep(0.0, false, WAIT).expect("nobody holds it");
    second.wake(WAIT).expect("started").wait(WAIT).expect("room");
    let error = first.sleep(0.0, true, Duration::from_millis(50)).expect_err("a step runs");
    assert_eq!(error.kind(), ErrorKind::Transfer);

    // A reclaim takes what it can have at once, and says what it waited for in vain.
    let report = world.manager.reclaim(ALL, Duration::from_secs(5), "a test").expect("begun");
    assert_eq!(report.freed, ByteCount(2 * PAGE));
    assert!(matches!(report.error.as_deref(), Some(MemoryError::Deadline { .. })), "{:?}", report.error);
    assert!(first.missing_bytes().is_zero(), "I13");
    drop(guard);
    assert_eq!(world.manager.reclaim(ALL, WAIT, "a test").expect("free").freed, ByteCount(3 * PAGE));
    let _guard = first.guard(WAIT).expect("room");
    let mut read = vec![0; bytes.len()];
    first.read(ByteCount::ZERO, &mut read).expect("there");
    assert!(read == bytes);
    world.check();
}

#[test]
fn a_reclaim_gets_a_guarded_region_when_its_guard_ends() {
    let world = world(32, 64);
    let region: Region = world.weights(2, &noise(2 * PAGE, 1));
    let guard = region.guard(WAIT).expect("room");
    let reclaim = {
        let manager = Arc::clone(&world.manager);
        thread::spawn(move || manager.reclaim(ALL, WAIT, "a test").expect("begun"))
    };
    thread::sleep(Duration::from_millis(50));
    assert!(!reclaim.is_finished(), "nothing but the guarded region could be freed");
    drop(guard);
    let report = reclaim.join().expect("no panic");
    assert_eq!((report.freed, report.error.is_none()), (ByteCount(2 * PAGE), true));
    assert_eq!(world.manager.lease().held(LeaseKind::Weights), ByteCount::ZERO);
}
