//! Who maps beside a thread that gives surplus back: only here can the turn be lent without a wake.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_device::{SimDevice, SimOptions};

use super::KvCacheSpec;
use crate::{LocalBudget, ManagerOptions, MemoryManager};

/// Less than who gives surplus back waits for the turn.
const SOON: Duration = Duration::from_millis(25);
const WAIT: Duration = Duration::from_secs(30);

#[test]
fn who_gives_surplus_back_keeps_nobody_from_mapping_with_a_lent_turn() {
    let dir = tempfile::tempdir().expect("a directory");
    let device =
        SimDevice::open_dyn(SimOptions::new(ByteCount::mib(64), dir.path().to_owned())).expect("a device");
    let options = ManagerOptions::new(ByteCount::mib(16), LocalBudget::new(ByteCount::mib(64)));
    let manager = MemoryManager::new(device, options).expect("a manager");
    let shape = BlockShape::Latent { tokens: 4, dim: 64 << 10 };
    let groups = vec![GroupSpec { name: "kv".to_owned(), layers: 1, shape, element_bytes: 1 }];
    let cache = CacheSpec {
        groups,
        order: PlaneOrder::BlockMajor,
        bytes: ByteCount::mib(8),
        granule_bytes_max: ByteCount::mib(2),
    };
    let spec = KvCacheSpec { spare_bytes_max: ByteCount::ZERO, ..KvCacheSpec::new("kv", cache) };
    let cache = manager.kv_cache(spec).expect("addresses");
    let mut ids = [0_u32; 8];
    assert!(cache.alloc(0, &mut ids).expect("blocks"));
    cache.free(0, &ids).expect("owned");
    // Without the cache's own thread, nobody but the one below waits for the turn.
    let shared = Arc::clone(&cache.shared);
    drop(cache);
    // As a wake that waits for its copies.
    let turn = manager.take_turn_only(Instant::now() + Duration::from_secs(10)).expect("nobody has it");
    let lent = turn.lend();
    // In each round it waits for the turn in vain, and somebody maps meanwhile; it may give up before a busy machine gets to it.
    let (mut is_had, deadline) = (false, Instant::now() + WAIT);
    while !is_had && Instant::now() < deadline {
        let (own, clocks) = (Arc::clone(&shared), shared.state.lock().clocks());
        let beside = thread::spawn(move || own.release_surplus(&clocks));
        while !turn.is_wanted() && !beside.is_finished() {
            thread::yield_now();
        }
        let growing = shared.growing.take(Instant::now() + SOON);
        // It waits still, so it has not given up what it kept from others.
        is_had = growing.is_some() && turn.is_wanted();
        drop(growing);
        let _ = beside.join().expect("no panic");
    }
    assert!(is_had, "whoever maps waits for one that waits for the turn");
    drop(lent);
    drop(turn);
}
