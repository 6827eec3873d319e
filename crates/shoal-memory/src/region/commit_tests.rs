//! Memory that something holds when it is given up: only here can it be held without a device that waits.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::extent::ExtentRule;
use shoal_core::page_table::Backing;
use shoal_core::protocol::LeaseKind;
use shoal_device::{SimDevice, SimOptions, Span};

use crate::error::MemoryError;
use crate::{
    KvBacking, LeaseError, LeaseSource, LocalBudget, ManagerOptions, MemoryManager, PoolOptions, Region,
    RegionSpec,
};

const PAGES: u64 = 4;
const HELD: Duration = Duration::from_millis(60);

struct World {
    _dir: tempfile::TempDir,
    manager: Arc<MemoryManager>,
}

/// A budget that notes how long it may let the newest request wait.
#[derive(Debug)]
struct Noting {
    budget: Arc<LocalBudget>,
    allowed: Mutex<Duration>,
}

impl LeaseSource for Noting {
    fn acquire(
        &self,
        kind: LeaseKind,
        bytes: ByteCount,
        bytes_min: ByteCount,
        deadline: Duration,
        reason: &str,
    ) -> Result<ByteCount, LeaseError> {
        *self.allowed.lock() = deadline;
        self.budget.acquire(kind, bytes, bytes_min, deadline, reason)
    }

    fn give_back(&self, kind: LeaseKind, bytes: ByteCount) {
        self.budget.give_back(kind, bytes);
    }

    fn held(&self, kind: LeaseKind) -> ByteCount {
        self.budget.held(kind)
    }
}

impl World {
    fn new(lease_wait: Duration) -> Self {
        Self::on(LocalBudget::new(ByteCount::mib(64)), lease_wait)
    }

    fn on(budget: Arc<dyn LeaseSource>, lease_wait: Duration) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let options = SimOptions::new(ByteCount::mib(64), dir.path().to_owned());
        let device = SimDevice::open_dyn(options).expect("a device");
        let options = ManagerOptions {
            lease_wait,
            pool: Some(PoolOptions::off()),
            ..ManagerOptions::new(ByteCount::mib(64), budget)
        };
        Self { _dir: dir, manager: MemoryManager::new(device, options).expect("a manager") }
    }

    fn region(&self, kind: LeaseKind) -> Region {
        let spec = RegionSpec {
            name: "range".to_owned(),
            bytes: all(),
            kind,
            extent_rule: ExtentRule::default(),
            backing: Backing::Keep,
        };
        self.manager.region(spec).expect("addresses")
    }
}

const fn all() -> ByteCount {
    ByteCount(PAGES * PAGE_BYTES.0)
}

/// As a copy of ours would.
fn hold(region: &Region) -> Span {
    region.span_now(ByteCount::ZERO, all()).expect("committed").0
}

fn release_soon(held: Span) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        thread::sleep(HELD);
        drop(held);
    })
}

#[test]
fn a_commit_waits_for_what_is_held_at_its_addresses() {
    let world = World::new(Duration::from_secs(20));
    let region = world.region(LeaseKind::Overhead);
    region.commit(ByteCount::ZERO, all()).expect("room");
    let held = hold(&region);
    region.decommit(ByteCount::ZERO, all()).expect("it goes later");
    assert_eq!(world.manager.lease().held(LeaseKind::Overhead), PAGE_BYTES, "leased still, and no more (I1)");
    let (start, release) = (Instant::now(), release_soon(held));
    assert_eq!(region.commit(ByteCount::ZERO, all()).expect("unmapped in time"), all());
    assert!(start.elapsed() >= HELD);
    release.join().expect("no panic");
    world.manager.check_invariants().expect("invariants");
}

#[test]
fn a_commit_waits_for_what_is_held_no_longer_than_for_a_lease() {
    let patience = Duration::from_millis(30);
    let world = World::new(patience);
    let region = world.region(LeaseKind::Overhead);
    region.commit(ByteCount::ZERO, all()).expect("room");
    let held = hold(&region);
    region.decommit(ByteCount::ZERO, all()).expect("it goes later");
    let error = region.commit(ByteCount::ZERO, all()).expect_err("it is held");
    assert!(matches!(error, MemoryError::StillMapped { waited, .. } if waited >= patience), "{error}");
    assert!(region.usage().device.is_zero());
    // Others map meanwhile.
    world.region(LeaseKind::Overhead).commit(ByteCount::ZERO, all()).expect("room");
    drop(held);
    region.commit(ByteCount::ZERO, all()).expect("unmapped");
    world.manager.check_invariants().expect("invariants");
}

/// As long as a lease may take, both together: it was twice that.
#[test]
fn a_commit_waits_for_what_is_held_and_for_its_lease_by_one_deadline() {
    let patience = Duration::from_secs(20);
    let lease = Arc::new(Noting { budget: LocalBudget::new(ByteCount::mib(64)), allowed: Mutex::default() });
    let world = World::on(Arc::clone(&lease) as _, patience);
    let region = world.region(LeaseKind::Overhead);
    region.commit(ByteCount::ZERO, all()).expect("room");
    let held = hold(&region);
    region.decommit(ByteCount::ZERO, all()).expect("it goes later");
    let release = release_soon(held);
    assert_eq!(region.commit(ByteCount::ZERO, all()).expect("unmapped in time"), all());
    release.join().expect("no panic");
    let allowed = *lease.allowed.lock();
    assert!(allowed + HELD / 2 <= patience, "{allowed:?} after it had waited");
}

#[test]
fn blocks_wait_for_what_is_held_at_their_addresses() {
    let world = World::new(Duration::from_millis(30));
    let region = world.region(LeaseKind::Kv);
    let kv = KvBacking::new(&region, PAGE_BYTES, 4).expect("fits");
    assert!(kv.back(&[0]).expect("room"));
    let held = hold(&region);
    kv.unback(&[0]).expect("backed");
    kv.trim(ByteCount(u64::MAX)).expect("nothing runs");
    assert!(!kv.back(&[0]).expect("not now is no error"));
    let release = release_soon(held);
    assert!(kv.back_within(&[0], Duration::from_secs(20)).expect("a device"), "unmapped in time");
    release.join().expect("no panic");
    world.manager.check_invariants().expect("invariants");
}
