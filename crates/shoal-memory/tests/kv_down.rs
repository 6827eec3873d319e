//! Blocks on their way down: handed to a tier while the next ones are copied, whatever the tier and the device do meanwhile.

mod common;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use common::passing::passes_on;
use common::talks::{cache, options, serve, tier};
use common::{WAIT, World, open, until, world, world_on};
use parking_lot::{Condvar, Mutex};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::PlaneOrder;
use shoal_device::{Device, FaultDevice, HostBuffer};
use shoal_memory::store::{
    Buffer, Fetched, HostOptions, HostTier, Lent, Offer, Store, StoreKey, Stored, Ticket, Verdict,
};
use shoal_memory::{KvTier, KvTierOptions};

/// Blocks of half a MiB: a piece of host memory takes 16, and each is handed on by itself.
const KIB: u32 = 512;
const AT_ONCE: usize = 16;
/// No more threads put blocks of one cache.
const THREADS_MAX: usize = 8;

/// Called by whoever puts the n-th block, before it is put.
type OnPut = Box<dyn Fn(usize) + Send + Sync>;

/// A host tier that is watched, and held up.
struct Watched {
    store: Arc<HostTier>,
    on_put: OnPut,
    /// Blocks that were given to it, in order, and whether in its own memory.
    puts: Mutex<Vec<(StoreKey, bool)>>,
    /// How often it was asked for memory of its own.
    asked: AtomicUsize,
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Watched {
    fn new(store: &Arc<HostTier>, on_put: impl Fn(usize) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            store: Arc::clone(store),
            on_put: Box::new(on_put),
            puts: Mutex::default(),
            asked: AtomicUsize::new(0),
        })
    }

    fn count(&self) -> usize {
        self.puts.lock().len()
    }
}

impl Store for Watched {
    passes_on!(contains, offer, get, lend, is_own, remove, flush);

    fn name(&self) -> &'static str {
        "watched"
    }

    fn put(&self, key: StoreKey, source: Buffer, bytes: usize, deadline: Duration) -> Ticket<Stored> {
        let is_own = matches!(&source, Buffer::HostMut(view) if self.store.is_own(view.buffer()));
        let number = {
            let mut puts = self.puts.lock();
            puts.push((key, is_own));
            puts.len() - 1
        };
        (self.on_put)(number);
        self.store.put(key, source, bytes, deadline)
    }

    fn room(&self, bytes: usize) -> Option<Arc<HostBuffer>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.store.room(bytes)
    }
}

/// Something that whoever puts waits for.
#[derive(Default)]
struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
    /// Somebody is or was before it.
    is_reached: AtomicBool,
}

impl Gate {
    fn pass(&self) {
        self.is_reached.store(true, Ordering::SeqCst);
        let mut is_open = self.is_open.lock();
        while !*is_open {
            assert!(!self.opened.wait_for(&mut is_open, WAIT).timed_out(), "nobody opens the gate");
        }
    }

    fn open(&self) {
        *self.is_open.lock() = true;
        self.opened.notify_all();
    }

    fn wait_reached(&self) {
        until("somebody comes to the gate", || self.is_reached.load(Ordering::SeqCst));
    }
}

fn locked(world: &World, mib: u64) -> Arc<HostTier> {
    Arc::new(HostTier::in_arena(HostOptions::new(ByteCount::mib(mib)), &world.manager))
}

/// Memory of no manager's: everything passes through a piece of host memory that is used again and again.
fn ordinary(mib: u64) -> Arc<HostTier> {
    Arc::new(HostTier::new(HostOptions::new(ByteCount::mib(mib))))
}

/// Of so many full blocks.
fn tokens(blocks: usize) -> Vec<u32> {
    (0..u32::try_from(4 * blocks).expect("few")).collect()
}

#[test]
fn the_next_blocks_are_copied_while_those_before_them_are_put() {
    let world = world(64, 64);
    let (host, gate) = (ordinary(64), Arc::new(Gate::default()));
    let before = Arc::clone(&gate);
    let store = Watched::new(&host, move |number| {
        if number == 0 {
            before.pass();
        }
    });
    let cache = cache(&world, PlaneOrder::BlockMajor, 32, KIB);
    let tier = tier(&cache, Arc::clone(&store) as _, "a");
    let tokens = tokens(3 * AT_ONCE);
    assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 0)));
    gate.wait_reached();
    // It asks before each piece of 16, the third time when it has copied the second one.
    until("two more pieces are begun", || store.asked.load(Ordering::SeqCst) >= 3);
    assert!(!host.contains(&store.puts.lock()[0].0), "the first block is being put");
    gate.open();
    assert!(tier.flush(WAIT));
    assert_eq!(tier.counts().saved, tokens.len() as u64 / 4);
    for order in 0..2 {
        cache.forget_all().expect("an index");
        assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 3 * AT_ONCE)), "the {order}. time");
    }
    world.check();
}

/// Memory that blocks go to is all on its way to a small tier: it is waited for, and none is put from elsewhere.
#[test]
fn blocks_that_are_being_put_make_room_for_those_after_them() {
    let world = world(64, 64);
    let host = locked(&world, 8);
    let store = Watched::new(&host, |_| thread::sleep(Duration::from_millis(2)));
    let cache = cache(&world, PlaneOrder::BlockMajor, 32, KIB);
    let tier = tier(&cache, Arc::clone(&store) as _, "a");
    let tokens = tokens(50);
    assert_eq!(serve(&cache, &tier, b"", &tokens), Some((0, 0)));
    assert!(tier.flush(WAIT));
    let counts = tier.counts();
    assert_eq!((counts.saved, counts.unsaved), (50, 0));
    assert!(store.puts.lock().iter().all(|(_, is_own)| *is_own), "each where it stays");
    assert!(host.usage().bytes <= host.usage().bytes_max);
    assert_eq!(cache.usage().live, ByteCount::ZERO);
    world.check();
}

#[test]
fn what_is_discarded_while_it_waits_to_be_put_is_not() {
    for is_locked in [false, true] {
        let world = world(64, 64);
        let host = if is_locked { locked(&world, 48) } else { ordinary(64) };
        let gate = Arc::new(Gate::default());
        let before = Arc::clone(&gate);
        let store = Watched::new(&host, move |_| before.pass());
        let cache = cache(&world, PlaneOrder::BlockMajor, 32, KIB);
        let tier = tier(&cache, Arc::clone(&store) as _, "a");
        let blocks = 3 * AT_ONCE;
        assert_eq!(serve(&cache, &tier, b"", &tokens(blocks)), Some((0, 0)));
        gate.wait_reached();
        tier.discard_queued();
        gate.open();
        assert!(tier.flush(WAIT));
        // Each thread was at a block.
        assert!(store.count() <= THREADS_MAX, "{} were put", store.count());
        let counts = tier.counts();
        assert_eq!(counts.saved + counts.unsaved, blocks as u64);
        assert_eq!(counts.saved, store.count() as u64);
        // What comes after that is saved again.
        cache.forget_all().expect("an index");
        assert!(serve(&cache, &tier, b"", &tokens(blocks)).is_some());
        assert!(tier.flush(WAIT));
        cache.forget_all().expect("an index");
        assert_eq!(serve(&cache, &tier, b"", &tokens(blocks)), Some((0, blocks)));
        world.check();
    }
}

#[test]
fn what_waits_to_be_put_at_the_end_is_given_up_and_nothing_is_held() {
    let world = world(64, 64);
    let (host, gate) = (locked(&world, 48), Arc::new(Gate::default()));
    let before = Arc::clone(&gate);
    let store = Watched::new(&host, move |_| before.pass());
    let cache = cache(&world, PlaneOrder::BlockMajor, 32, KIB);
    let tier = tier(&cache, Arc::clone(&store) as _, "a");
    let slot = u64::from(KIB + 4) * 1024;
    assert_eq!(serve(&cache, &tier, b"", &tokens(40)), Some((0, 0)));
    gate.wait_reached();
    until("all of them lie where they would stay", || host.usage().bytes == 40 * slot);
    let ending = thread::spawn(move || drop(tier));
    until("what waits is given up", || host.usage().bytes <= THREADS_MAX as u64 * slot);
    gate.open();
    ending.join().expect("it ends");
    let kept = host.usage();
    assert!(kept.blocks == store.count() as u64 && store.count() <= THREADS_MAX, "{kept:?}");
    assert_eq!(kept.bytes, kept.blocks * slot, "nobody has what was not put");
    assert_eq!(cache.usage().live, ByteCount::ZERO);
    world.check();
}

/// A tier whose puts never answer costs what they were for, within their deadline, and no more.
#[test]
fn puts_that_are_late_are_given_up() {
    let world = world(64, 64);
    let (host, gate) = (ordinary(64), Arc::new(Gate::default()));
    let before = Arc::clone(&gate);
    let store = Watched::new(&host, move |number| {
        if number == 3 {
            before.pass();
        }
    });
    let cache = cache(&world, PlaneOrder::BlockMajor, 32, KIB);
    let late = KvTierOptions { put_wait: Duration::from_millis(100), ..options("a") };
    let tier = KvTier::new(&cache, Arc::clone(&store) as _, late).expect("a cache of one group");
    let blocks = 2 * AT_ONCE;
    assert_eq!(serve(&cache, &tier, b"", &tokens(blocks)), Some((0, 0)));
    gate.wait_reached();
    assert!(tier.flush(WAIT), "it does not wait for what hangs");
    let counts = tier.counts();
    assert!(counts.unsaved > 0, "{counts:?}");
    assert_eq!(counts.saved + counts.unsaved, blocks as u64);
    gate.open();
    drop(tier);
    assert_eq!(cache.usage().live, ByteCount::ZERO);
}

/// The n-th call of the device fails while several pieces are copied and those before them are put, for every n.
#[test]
fn a_device_that_fails_between_pieces_costs_what_was_not_copied() {
    let (mut failures, mut partial) = (0, 0);
    for n in 1..100_u64 {
        let dir = tempfile::tempdir().expect("a directory");
        let faults = FaultDevice::new(open(dir.path(), 64));
        let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 32, 64);
        let cache = cache(&world, PlaneOrder::BlockMajor, 32, KIB);
        let host = ordinary(64);
        let tier = tier(&cache, Arc::clone(&host) as _, "a");
        let (blocks, before) = (3 * AT_ONCE, faults.injected());
        // While a step runs nothing is copied, so the first call to fail is one of the copies'.
        let step = cache.region().guard(WAIT).expect("nothing is in its way");
        assert_eq!(serve(&cache, &tier, b"", &tokens(blocks)), Some((0, 0)));
        faults.fail_nth(n);
        drop(step);
        assert!(tier.flush(WAIT));
        let failed = faults.injected() > before;
        faults.heal();
        let saved = usize::try_from(tier.counts().saved).expect("few");
        assert_eq!(tier.counts().unsaved + saved as u64, blocks as u64, "call {n}");
        partial += usize::from(0 < saved && saved < blocks);
        cache.forget_all().expect("an index");
        // What was saved is right, from the first block on, and the rest is computed.
        assert_eq!(serve(&cache, &tier, b"", &tokens(blocks)), Some((0, saved)), "call {n}");
        assert!(tier.flush(WAIT));
        cache.forget_all().expect("an index");
        assert_eq!(serve(&cache, &tier, b"", &tokens(blocks)), Some((0, blocks)), "call {n}");
        assert_eq!(cache.usage().live, ByteCount::ZERO);
        cache.check_invariants().expect("invariants");
        world.check();
        if !failed {
            break;
        }
        failures = n;
    }
    assert!(
        failures > 6 && partial > 0,
        "{failures} calls were failed, {partial} of them between two pieces"
    );
}

#[test]
fn no_more_is_on_its_way_than_may_be() {
    let world = world(176, 64);
    let (host, gate) = (ordinary(192), Arc::new(Gate::default()));
    let before = Arc::clone(&gate);
    let store = Watched::new(&host, move |_| before.pass());
    let cache = cache(&world, PlaneOrder::BlockMajor, 160, 4096);
    let tier = tier(&cache, Arc::clone(&store) as _, "a");
    assert_eq!(serve(&cache, &tier, b"", &tokens(40)), Some((0, 0)));
    // Two blocks of 4 MiB make a piece. 31 of them may be under way: that is one of the sixteenth piece.
    until("sixteen pieces are begun", || store.asked.load(Ordering::SeqCst) == 16);
    thread::sleep(Duration::from_millis(200));
    assert_eq!(store.asked.load(Ordering::SeqCst), 16, "and no more");
    gate.open();
    assert!(tier.flush(WAIT));
    assert_eq!(tier.counts().saved, 40);
}
