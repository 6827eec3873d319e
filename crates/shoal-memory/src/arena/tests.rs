//! The arena on a simulated device: its budget, its faults, its thread.

use std::thread;

use proptest::prelude::*;
use shoal_device::device::Verb;
use shoal_device::host::HostFile;
use shoal_device::{FaultDevice, SimDevice, SimOptions, Span, Stream};

use super::*;
use crate::slab_source::LentSlab;

const PAGE: ByteCount = PAGE_BYTES;
const WAIT: Duration = Duration::from_secs(20);

struct Scene {
    _dir: tempfile::TempDir,
    sim: Arc<SimDevice>,
    faults: Arc<FaultDevice>,
    arena: Arc<HostArena>,
}

/// All by the caller: the order of the device's calls is known.
const ALONE: Steps =
    Steps { first: 0, waiting_max: 2, ahead_max: 3, keeper_min: 40, idle: Duration::from_mins(10) };
/// The keeper does what it can.
const KEPT: Steps = Steps { keeper_min: 1, ..ALONE };

fn scene_with(budget_pages: u64, steps: Steps, lock_limit: Option<ByteCount>) -> Scene {
    scene_from(budget_pages, steps, lock_limit, None)
}

fn scene_from(
    budget_pages: u64,
    steps: Steps,
    lock_limit: Option<ByteCount>,
    source: Option<Arc<dyn SlabSource>>,
) -> Scene {
    let dir = tempfile::tempdir().expect("a directory");
    let options = SimOptions { lock_limit, ..SimOptions::new(ByteCount::mib(16), dir.path()) };
    let sim = SimDevice::open(options).expect("a simulated device");
    let faults = FaultDevice::new(Arc::clone(&sim) as _);
    let budget = ByteCount(budget_pages * PAGE.0 + 77);
    let arena = HostArena::with_steps(Arc::clone(&faults) as _, budget, WAIT, source, steps);
    Scene { _dir: dir, sim, faults, arena }
}

impl Scene {
    /// Memory is within the budget, and what is made is what the device has.
    fn check(&self, copies: &[HostCopy]) {
        let usage = self.arena.usage();
        let used: ByteCount = copies.iter().map(|copy| copy.buffer().bytes()).sum();
        assert_eq!(usage.used, used);
        assert!(usage.made <= usage.budget, "{usage:?}");
        assert!(usage.used + usage.spare <= usage.made, "{usage:?}");
    }

    fn until(&self, what: &str, is_so: impl Fn(&HostUsage) -> bool) {
        let deadline = Instant::now() + WAIT;
        while !is_so(&self.arena.usage()) {
            assert!(Instant::now() < deadline, "{what}: {:?}", self.arena.usage());
            thread::sleep(Duration::from_millis(2));
        }
    }
}

fn fill(copy: &HostCopy, with: u8) {
    let bytes = copy.buffer().bytes();
    copy.buffer().access_mut(ByteCount::ZERO, bytes, |slice| slice.fill(with)).expect("nobody uses it");
}

fn is_all(copy: &HostCopy, with: u8) -> bool {
    let bytes = copy.buffer().bytes();
    let reads = |slice: &[u8]| slice.chunks(512).all(|part| part[0] == with && part[part.len() - 1] == with);
    copy.buffer().access(ByteCount::ZERO, bytes, reads).expect("nobody uses it")
}

#[test]
fn few_slabs_hold_many_copies_and_are_used_again() {
    let scene = scene_with(64, ALONE, None);
    let copies: Vec<_> =
        (0..16).map(|_| scene.arena.allocate(PAGE, Filled::ByDevice).expect("room")).collect();
    scene.check(&copies);
    let slabs = scene.sim.live_objects().host_buffers;
    assert!(slabs <= 7, "{slabs} slabs for 16 copies");
    copies.iter().zip(1..).for_each(|(copy, with)| fill(copy, with));
    assert!(copies.iter().zip(1..).all(|(copy, with)| is_all(copy, with)), "copies overlap");
    drop(copies);
    let again = scene.arena.allocate(PAGE, Filled::ByHost).expect("room");
    assert!(is_all(&again, 0), "what the host fills begins with zeroes");
    assert_eq!(scene.sim.live_objects().host_buffers, slabs, "no new memory");
    let Scene { sim, arena, faults, _dir } = scene;
    drop((again, arena, faults));
    assert_eq!(sim.live_objects().host_buffers, 0);
}

#[test]
fn the_budget_is_whole_pages_and_a_refusal_names_what_is_left() {
    let scene = scene_with(5, ALONE, None);
    assert_eq!(scene.arena.free(), ByteCount(5 * PAGE.0));
    let four = scene.arena.allocate(ByteCount(4 * PAGE.0), Filled::ByDevice).expect("room");
    let refused = scene.arena.allocate(ByteCount(2 * PAGE.0), Filled::ByDevice).expect_err("too much");
    assert!(matches!(refused, MemoryError::HostBudget { free: PAGE_BYTES, .. }), "{refused}");
    let one = scene.arena.allocate(PAGE, Filled::ByDevice).expect("room");
    assert_eq!((scene.arena.free(), scene.arena.used()), (ByteCount::ZERO, ByteCount(5 * PAGE.0)));
    scene.check(&[four, one]);
}

#[test]
fn copies_move_together_for_a_long_one_and_keep_their_bytes() {
    let scene = scene_with(8, ALONE, None);
    let mut copies: Vec<_> =
        (0..8).map(|_| scene.arena.allocate(PAGE, Filled::ByDevice).expect("room")).collect();
    copies.iter().zip(1..).for_each(|(copy, with)| fill(copy, with));
    let kept: Vec<_> = [6, 4, 2, 0].map(|index| copies.swap_remove(index)).into();
    let kept: Vec<_> = kept.into_iter().map(|copy| (copy.buffer().read_first(), copy)).collect();
    drop(copies);
    let long =
        scene.arena.allocate(ByteCount(4 * PAGE.0), Filled::ByHost).expect("four of eight pages are free");
    fill(&long, 0xEE);
    for (with, copy) in &kept {
        assert!(is_all(copy, *with));
    }
}

trait ReadFirst {
    fn read_first(&self) -> u8;
}

impl ReadFirst for Arc<shoal_device::HostBuffer> {
    fn read_first(&self) -> u8 {
        let mut first = [0];
        self.read(ByteCount::ZERO, &mut first).expect("nobody uses it");
        first[0]
    }
}

#[test]
fn what_somebody_holds_does_not_move_and_is_not_free_until_it_is_let_go() {
    let scene = scene_with(2, ALONE, None);
    let first = scene.arena.allocate(PAGE, Filled::ByDevice).expect("room");
    let second = scene.arena.allocate(PAGE, Filled::ByDevice).expect("room");
    let held = second.buffer();
    drop((first, second));
    assert_eq!((scene.arena.used(), scene.arena.free()), (ByteCount::ZERO, PAGE));
    let refused = scene.arena.allocate(ByteCount(2 * PAGE.0), Filled::ByDevice).expect_err("one is held");
    assert!(matches!(refused, MemoryError::HostBudget { .. }), "{refused}");
    drop(held);
    scene.arena.allocate(ByteCount(2 * PAGE.0), Filled::ByDevice).expect("slabs make way for a longer one");
    scene.check(&[]);
}

#[test]
fn a_job_keeps_its_memory_after_its_copy_is_gone() {
    let scene = scene_with(2, ALONE, None);
    let device: Arc<dyn Device> = Arc::clone(&scene.faults) as _;
    let stream = Stream::create(&device).expect("a stream");
    let copy = scene.arena.allocate(ByteCount(2 * PAGE.0), Filled::ByHost).expect("room");
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let wait = move || {
        let _ = gone.recv_timeout(WAIT);
    };
    stream.launch_host((), wait).expect("queued");
    let ticket = stream.hash(Span::host(&copy.buffer(), ByteCount::ZERO, PAGE)).expect("queued");
    drop(copy);
    assert_eq!(scene.arena.free(), ByteCount::ZERO, "the job has it still (I5)");
    go.send(()).expect("it waits");
    ticket.wait(WAIT).expect("hashed");
    scene.until("free", |usage| usage.spare == ByteCount(2 * PAGE.0));
}

#[test]
fn without_the_right_to_lock_memory_copies_are_unlocked_and_it_is_said_why() {
    let scene = scene_with(8, ALONE, Some(ByteCount(3 * PAGE.0)));
    let copies: Vec<_> =
        (0..6).map(|_| scene.arena.allocate(PAGE, Filled::ByDevice).expect("room")).collect();
    let usage = scene.arena.usage();
    assert!(usage.locked > ByteCount::ZERO && usage.locked <= ByteCount(3 * PAGE.0), "{usage:?}");
    assert!(copies.iter().any(|copy| !copy.buffer().is_locked()));
    let said = usage.reasons.iter().filter(|reason| reason.contains("not page-locked")).count();
    assert!(said >= 1, "{usage:?}");
    scene.check(&copies);
}

#[test]
fn every_failing_call_leaves_the_budget_as_it_was() {
    for verb in [Verb::AllocateHost, Verb::LockHost, Verb::FreeHost] {
        let mut has_failed = false;
        for n in 1..20 {
            let scene = scene_with(6, ALONE, None);
            let first = scene.arena.allocate(PAGE, Filled::ByHost).expect("room");
            fill(&first, 7);
            scene.faults.fail_nth_matching(n, move |call| call.verb == verb);
            let mut copies = vec![first];
            // Two, and then a long one, for which slabs have to make way.
            let mut errors = Vec::new();
            for pages in [1, 2, 4, 1] {
                match scene.arena.allocate(ByteCount(pages * PAGE.0), Filled::ByDevice) {
                    Ok(copy) => copies.push(copy),
                    Err(error) => errors.push(error),
                }
                scene.check(&copies);
                if pages == 2 {
                    copies.truncate(1);
                }
            }
            let has_hit = scene.faults.injected() > 0;
            has_failed |= has_hit;
            scene.faults.heal();
            if verb == Verb::LockHost {
                assert!(errors.is_empty(), "{errors:?}");
            }
            assert!(is_all(&copies[0], 7));
            copies.truncate(1);
            let all = scene.arena.allocate(ByteCount(4 * PAGE.0), Filled::ByDevice).expect("it works again");
            scene.check(&[copies.remove(0), all]);
            if !has_hit {
                break;
            }
        }
        assert!(has_failed, "{verb} never failed");
    }
}

#[test]
fn memory_that_the_device_keeps_stays_in_the_budget() {
    let scene = scene_with(4, ALONE, None);
    let small: Vec<_> = (0..4).map(|_| scene.arena.allocate(PAGE, Filled::ByDevice).expect("room")).collect();
    drop(small);
    let error = DeviceError::Injected { call: 0, verb: Verb::FreeHost };
    scene.faults.fail_all(Verb::FreeHost, error);
    let refused = scene.arena.allocate(ByteCount(4 * PAGE.0), Filled::ByDevice).expect_err("none went");
    assert!(matches!(refused, MemoryError::HostBudget { .. }), "{refused}");
    assert!(scene.arena.usage().made <= ByteCount(4 * PAGE.0));
    assert!(scene.arena.free() < ByteCount(4 * PAGE.0), "it is there, so it counts");
    scene.faults.heal();
    assert_eq!(scene.arena.free(), ByteCount(4 * PAGE.0), "it is asked again");
    scene.arena.allocate(ByteCount(4 * PAGE.0), Filled::ByDevice).expect("all went");
}

#[test]
fn the_keeper_makes_and_locks_what_is_expected_within_the_budget() {
    let scene = scene_with(21, KEPT, None);
    scene.arena.expect(ByteCount::gib(1));
    scene.until("made", |usage| usage.made == ByteCount(20 * PAGE.0) && usage.locked == usage.made);
    scene.faults.clear_history();
    let copies: Vec<_> = (0..10)
        .map(|_| scene.arena.allocate(ByteCount(2 * PAGE.0), Filled::ByDevice).expect("made"))
        .collect();
    assert!(scene.faults.history().iter().all(|call| call.verb != Verb::AllocateHost), "all was there");
    assert!(copies.iter().all(|copy| copy.buffer().is_locked()));
    scene.check(&copies);
}

#[test]
fn the_keeper_locks_what_was_filled_before() {
    let scene = scene_with(32, KEPT, None);
    let copy = scene.arena.allocate(ByteCount(8 * PAGE.0), Filled::ByHost).expect("room");
    fill(&copy, 9);
    scene.until("locked", |usage| usage.locked >= ByteCount(8 * PAGE.0));
    assert!(copy.buffer().is_locked() && is_all(&copy, 9));
}

#[test]
fn a_keeper_that_fails_costs_nothing_but_time() {
    let scene = scene_with(32, KEPT, None);
    scene.faults.fail_nth_matching(1, |call| call.verb == Verb::AllocateHost);
    scene.arena.expect(ByteCount(16 * PAGE.0));
    scene.until("said", |usage| usage.reasons.iter().any(|reason| reason.contains("ahead of use")));
    let copy = scene.arena.allocate(ByteCount(16 * PAGE.0), Filled::ByDevice).expect("made by the caller");
    assert!(copy.buffer().is_locked());
    scene.check(&[copy]);
}

#[test]
fn idle_slabs_go_back_and_those_in_use_stay() {
    let steps = Steps { idle: Duration::from_millis(30), ..KEPT };
    let scene = scene_with(32, steps, None);
    let kept = scene.arena.allocate(ByteCount(2 * PAGE.0), Filled::ByDevice).expect("room");
    fill(&kept, 3);
    scene.arena.expect(ByteCount(16 * PAGE.0));
    let used: Vec<_> = (0..3)
        .map(|_| scene.arena.allocate(ByteCount(8 * PAGE.0), Filled::ByDevice).expect("room"))
        .collect();
    drop(used);
    scene.until("given back", |usage| usage.made < ByteCount(8 * PAGE.0));
    assert!(is_all(&kept, 3));
    scene.check(&[kept]);
}

#[test]
fn an_arena_that_goes_takes_its_keeper_along() {
    let scene = scene_with(32, KEPT, None);
    scene.arena.expect(ByteCount(32 * PAGE.0));
    let Scene { sim, arena, faults, _dir } = scene;
    drop(arena);
    let deadline = Instant::now() + WAIT;
    while sim.live_objects().host_buffers > 0 || Arc::strong_count(&faults) > 1 {
        assert!(Instant::now() < deadline, "the keeper goes on");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn many_threads_share_one_budget() {
    let scene = scene_with(24, KEPT, None);
    thread::scope(|scope| {
        for seed in 0_u64..4 {
            let arena = &scene.arena;
            scope.spawn(move || {
                let mut copies: Vec<(u8, HostCopy)> = Vec::new();
                let mut state = seed + 1;
                for with in 1..=80_u8 {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let pages = 1 << (state >> 60 & 3);
                    match arena.allocate(ByteCount(pages * PAGE.0), Filled::ByDevice) {
                        Ok(copy) => {
                            fill(&copy, with);
                            copies.push((with, copy));
                        }
                        Err(error) => assert!(matches!(error, MemoryError::HostBudget { .. }), "{error}"),
                    }
                    if !copies.is_empty() && (state >> 33 & 1 == 0 || copies.len() > 3) {
                        let index = (state >> 40) as usize % copies.len();
                        let (with, copy) = copies.swap_remove(index);
                        assert!(is_all(&copy, with), "somebody else wrote there");
                    }
                    assert!(arena.usage().made <= arena.usage().budget);
                }
            });
        }
    });
    scene.check(&[]);
    assert_eq!(scene.arena.free(), ByteCount(24 * PAGE.0));
}

/// Lends memory full of what somebody left there.
#[derive(Debug, Default)]
struct Lender {
    lent: Mutex<BTreeMap<u64, HostFile>>,
    count: Mutex<u64>,
    is_empty: bool,
}

impl SlabSource for Lender {
    fn borrow_slab(&self, bytes: ByteCount, _deadline: Duration) -> Result<LentSlab, String> {
        if self.is_empty {
            return Err("nothing left".to_owned());
        }
        let file =
            HostFile::create(bytes, HostBacking::SharedHugePages).map_err(|error| error.to_string())?;
        let clone = || file.try_clone().expect("a descriptor");
        let mut content = std::fs::File::from(std::os::fd::OwnedFd::from(clone()));
        std::io::Write::write_all(&mut content, &vec![0xAB; index_of(bytes.0)]).expect("memory");
        *self.count.lock() += 1;
        let slab = *self.count.lock();
        self.lent.lock().insert(slab, clone());
        Ok(LentSlab { slab, file, is_zeroed: false })
    }

    fn return_slab(&self, slab: u64) {
        assert!(self.lent.lock().remove(&slab).is_some(), "returned twice, or never lent");
    }
}

impl Lender {
    fn lent_bytes(&self) -> ByteCount {
        self.lent.lock().values().map(HostFile::bytes).sum()
    }
}

#[test]
fn long_slabs_are_borrowed_and_returned_and_what_was_left_in_them_is_not_seen() {
    let lender = Arc::new(Lender::default());
    let steps = Steps { idle: Duration::from_millis(50), waiting_max: 0, ..KEPT };
    let scene = scene_from(16, steps, None, Some(Arc::clone(&lender) as _));
    let staged = scene.arena.allocate(ByteCount(8 * PAGE.0), Filled::ByHost).expect("room");
    assert!(is_all(&staged, 0), "the host fills zeroed memory");
    assert_eq!(lender.lent_bytes(), ByteCount(8 * PAGE.0));
    let short = scene.arena.allocate(PAGE, Filled::ByDevice).expect("room");
    assert_eq!(lender.lent_bytes(), ByteCount(8 * PAGE.0), "what is short is the process's own");
    scene.check(&[staged, short]);
    scene.until("given back", |usage| usage.made < ByteCount(8 * PAGE.0));
    let deadline = Instant::now() + WAIT;
    while !lender.lent.lock().is_empty() {
        assert!(Instant::now() < deadline, "not returned");
        thread::sleep(Duration::from_millis(2));
    }
    let again = scene.arena.allocate(ByteCount(4 * PAGE.0), Filled::ByDevice).expect("room");
    assert_eq!(lender.lent_bytes(), ByteCount(4 * PAGE.0));
    drop(again);
    let Scene { sim, arena, faults, _dir } = scene;
    drop((arena, faults));
    let deadline = Instant::now() + WAIT;
    while !lender.lent.lock().is_empty() || sim.live_objects().host_buffers > 0 {
        assert!(Instant::now() < deadline, "the arena went and kept {:?}", lender.lent.lock());
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn where_nobody_lends_memory_is_the_processs_own_and_it_is_said_why() {
    let refuses = Arc::new(Lender { is_empty: true, ..Lender::default() });
    let scene = scene_from(16, KEPT, None, Some(refuses as _));
    let copy = scene.arena.allocate(ByteCount(8 * PAGE.0), Filled::ByHost).expect("its own");
    assert!(scene.arena.usage().reasons.iter().any(|reason| reason.contains("nothing left")));
    scene.check(&[copy]);
    let lender = Arc::new(Lender::default());
    let scene = scene_from(16, KEPT, None, Some(Arc::clone(&lender) as _));
    scene.faults.fail_nth_matching(1, |call| call.verb == Verb::AdoptHost);
    let copy = scene.arena.allocate(ByteCount(8 * PAGE.0), Filled::ByHost).expect("its own");
    assert_eq!((scene.faults.injected(), lender.lent_bytes()), (1, ByteCount::ZERO), "returned");
    scene.check(&[copy]);
}

#[derive(Clone, Debug)]
enum Step {
    Take(u32),
    Drop(usize),
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Against a plain sum: whatever fits by counting is had, whatever does not is refused, and no byte changes.
    #[test]
    fn what_fits_is_had_and_bytes_stay(
        budget in 1_u64..24,
        steps in prop::collection::vec(
            prop_oneof![(0_u32..4).prop_map(Step::Take), any::<usize>().prop_map(Step::Drop)], 1..40),
    ) {
        let scene = scene_with(budget, ALONE, None);
        let mut copies: Vec<(u8, HostCopy)> = Vec::new();
        for (with, step) in (1_u8..).zip(steps) {
            match step {
                Step::Take(order) => {
                    let used: u64 = copies.iter().map(|(_, copy)| copy.buffer().bytes().pages()).sum();
                    let fits = used + (1 << order) <= budget;
                    match scene.arena.allocate(ByteCount(PAGE.0 << order), Filled::ByDevice) {
                        Ok(copy) => {
                            prop_assert!(fits, "more than the budget");
                            fill(&copy, with);
                            copies.push((with, copy));
                        }
                        Err(error) => {
                            prop_assert!(!fits, "{} of {} used, and {} pages: {}", used, budget, 1 << order, error);
                        }
                    }
                }
                Step::Drop(index) if !copies.is_empty() => {
                    let (with, copy) = copies.swap_remove(index % copies.len());
                    prop_assert!(is_all(&copy, with));
                }
                Step::Drop(_) => {}
            }
            let usage = scene.arena.usage();
            prop_assert!(usage.made <= usage.budget, "{:?}", usage);
        }
        for (with, copy) in &copies {
            prop_assert!(is_all(copy, *with));
        }
    }
}
