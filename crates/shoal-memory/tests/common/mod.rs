//! What the tests of this crate share.
#![allow(dead_code, reason = "each test binary uses some of it")]

pub(crate) mod history;
pub(crate) mod killer;
pub(crate) mod passing;
pub(crate) mod talks;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::extent::ExtentRule;
use shoal_core::protocol::LeaseKind;
use shoal_device::{Device, SimDevice, SimOptions};
use shoal_memory::kv_cache::Attempt;
use shoal_memory::{
    Backing, Conversion, LocalBudget, ManagerOptions, MemoryError, MemoryManager, PoolOptions, Region,
    RegionSpec, SourcePiece,
};

pub(crate) const WAIT: Duration = Duration::from_secs(30);
pub(crate) const PAGE: u64 = PAGE_BYTES.0;

/// Waits until something is so, and says what was not.
pub(crate) fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// What an attempt comes to once nobody has the lock for a moment: the cache's own thread takes it now and then.
pub(crate) fn unless_busy(mut attempt: impl FnMut() -> Result<Attempt, MemoryError>) -> Attempt {
    let deadline = Instant::now() + WAIT;
    loop {
        match attempt().expect("owned, of a group") {
            Attempt::Busy => assert!(Instant::now() < deadline, "somebody has the lock for ever"),
            outcome => return outcome,
        }
        thread::yield_now();
    }
}

pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) budget: Arc<LocalBudget>,
    pub(crate) manager: Arc<MemoryManager>,
}

/// A simulated device, or, with `$SHOAL_TEST_GPU`, the GPU: these tests hold for both.
pub(crate) fn open(dir: &Path, capacity_mib: u64) -> Arc<dyn Device> {
    #[cfg(feature = "cuda")]
    if std::env::var_os("SHOAL_TEST_GPU").is_some() {
        // Kept for good: making the context anew for every case would take most of the time.
        static KEPT: std::sync::OnceLock<Arc<dyn Device>> = std::sync::OnceLock::new();
        KEPT.get_or_init(|| shoal_device::CudaDevice::open_dyn(0).expect("a GPU"));
        return shoal_device::CudaDevice::open_dyn(0).expect("a GPU");
    }
    SimDevice::open_dyn(SimOptions::new(ByteCount::mib(capacity_mib), dir)).expect("a simulated device")
}

/// The same with a link of so many bytes a second; a GPU's is as fast as it is.
pub(crate) fn open_slow(dir: &Path, capacity_mib: u64, copy_bandwidth: ByteCount) -> Arc<dyn Device> {
    #[cfg(feature = "cuda")]
    if std::env::var_os("SHOAL_TEST_GPU").is_some() {
        return open(dir, capacity_mib);
    }
    let options = SimOptions::new(ByteCount::mib(capacity_mib), dir);
    SimDevice::open_dyn(SimOptions { copy_bandwidth: Some(copy_bandwidth), ..options })
        .expect("a simulated device")
}

pub(crate) fn world(device_mib: u64, host_mib: u64) -> World {
    let dir = tempfile::tempdir().expect("a directory");
    let device = open(dir.path(), device_mib.max(64));
    world_on(dir, device, device_mib, host_mib)
}

pub(crate) fn world_on(
    dir: tempfile::TempDir,
    device: Arc<dyn Device>,
    device_mib: u64,
    host_mib: u64,
) -> World {
    pooled_world_on(dir, device, device_mib, host_mib, PoolOptions::off())
}

/// Frames of so many MiB are kept, until somebody takes them.
pub(crate) fn keeping(mib: u64) -> PoolOptions {
    PoolOptions { bytes_max: ByteCount::mib(mib), idle: Duration::from_hours(1) }
}

/// With a pool of frames. (Elsewhere there is none, so that what is given up is gone.)
pub(crate) fn pooled_world_on(
    dir: tempfile::TempDir,
    device: Arc<dyn Device>,
    device_mib: u64,
    host_mib: u64,
    pool: PoolOptions,
) -> World {
    let budget = LocalBudget::new(ByteCount::mib(device_mib));
    let mut options = ManagerOptions::new(ByteCount::mib(host_mib), Arc::clone(&budget) as _);
    options.operation_wait = Duration::from_secs(10);
    options.pool = Some(pool);
    let manager = MemoryManager::new(Arc::clone(&device), options).expect("a manager");
    World { dir, device, budget, manager }
}

impl World {
    pub(crate) fn region(&self, name: &str, pages: u64, kind: LeaseKind) -> Region {
        let spec = RegionSpec {
            name: name.to_owned(),
            bytes: ByteCount(pages * PAGE),
            kind,
            extent_rule: ExtentRule { pieces_min: 4, ..ExtentRule::default() },
            backing: Backing::Keep,
        };
        self.manager.region(spec).expect("addresses")
    }

    pub(crate) fn weights(&self, pages: u64, bytes: &[u8]) -> Region {
        let region = self.region("weights", pages, LeaseKind::Weights);
        region.stage(ByteCount::ZERO, bytes, None).expect("host room");
        region.seal().expect("sealed");
        region
    }

    pub(crate) fn device_used(&self) -> ByteCount {
        self.device.memory().expect("asked").used_by_this_process
    }

    pub(crate) fn check(&self) {
        self.manager.check_invariants().expect("invariants");
        // A cache's own thread may be at it: it has leased, and not mapped yet.
        let deadline = Instant::now() + WAIT;
        loop {
            let (used, leased) = (self.device_used(), self.leased());
            if used == leased {
                return;
            }
            assert!(Instant::now() < deadline, "{used} are mapped and {leased} leased (I1)");
            thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn leased(&self) -> ByteCount {
        LeaseKind::ALL.into_iter().map(|kind| lease_held(self, kind)).sum()
    }
}

fn lease_held(world: &World, kind: LeaseKind) -> ByteCount {
    world.manager.lease().held(kind)
}

/// Bytes of which no two runs of 4 KiB are alike.
pub(crate) fn noise(bytes: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut block = Vec::with_capacity(4096);
    while block.len() < 4096 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        block.extend_from_slice(&state.to_le_bytes());
    }
    let mut out = Vec::with_capacity(usize::try_from(bytes + 4096).expect("small"));
    while (out.len() as u64) < bytes {
        let stamp = (out.len() as u64).to_le_bytes();
        block[..8].copy_from_slice(&stamp);
        out.extend_from_slice(&block);
    }
    out.truncate(usize::try_from(bytes).expect("small"));
    out
}

pub(crate) fn source_file(dir: &Path, bytes: &[u8]) -> Arc<PathBuf> {
    let path = dir.join("model.safetensors");
    std::fs::write(&path, bytes).expect("written");
    Arc::new(path)
}

pub(crate) fn piece(path: &Arc<PathBuf>, offset: u64, bytes: u64) -> SourcePiece {
    SourcePiece { path: Arc::clone(path), offset, bytes: ByteCount(bytes), conversion: Conversion::None }
}
