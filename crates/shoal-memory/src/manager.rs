//! [`MemoryManager`]: the regions of one device, who may touch them when, and how memory is given up on request.
//!
//! Apart from [`crate::region`] because it speaks of all regions: the gate (I13), the turn, the figures; and, in a file of
//! its own, the order of a reclaim.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::ids::{RegionId, TransferId};
use shoal_core::protocol::{LeaseKind, WorkerUsage};
use shoal_device::{Device, DeviceError, Event, ForeignStream, ForeignWork, HostBuffer, Stream};

use crate::arena::{HostArena, HostUsage};
use crate::error::MemoryError;
use crate::gate::{Gate, Pass, Scope};
use crate::kv::KvBacking;
use crate::kv_cache;
use crate::lease::LeaseSource;
use crate::pool::{FramePool, PoolOptions};
use crate::region::{Region, RegionInner, RegionSpec, Report};
use crate::retire::Retired;
use crate::segments::Segments;
use crate::slab_source::SlabSource;
use crate::source::SourceFiles;
use crate::turn::{Taken, Turn};

mod reclaim;

/// How a manager behaves.
#[derive(Clone, Debug)]
pub struct ManagerOptions {
    /// The most host memory for copies.
    pub host_budget: ByteCount,
    /// Who grants device bytes.
    pub lease: Arc<dyn LeaseSource>,
    /// Who lends memory for host copies; `None`: it is this process's own.
    pub slabs: Option<Arc<dyn SlabSource>>,
    /// How long `commit` and `KvBacking::back` wait for a lease.
    pub lease_wait: Duration,
    /// How long an operation waits for its turn and for one extent's copy.
    pub operation_wait: Duration,
    /// Transfers at once, waiting ones included.
    pub transfers_max: usize,
    /// Frames kept for the next growth; none: [`PoolOptions::of`] the device's capacity.
    pub pool: Option<PoolOptions>,
}

impl ManagerOptions {
    /// The usual values.
    #[must_use]
    pub fn new(host_budget: ByteCount, lease: Arc<dyn LeaseSource>) -> Self {
        Self {
            host_budget,
            lease,
            slabs: None,
            lease_wait: Duration::from_secs(2),
            operation_wait: Duration::from_mins(1),
            transfers_max: 16,
            pool: None,
        }
    }
}

/// Two buffers through which files are read to the device.
#[derive(Debug)]
pub(crate) struct Scratch {
    pub(crate) buffers: [Arc<HostBuffer>; 2],
}

const SCRATCH_BYTES_MAX: ByteCount = ByteCount::mib(4);
const SCRATCH_UNIT: ByteCount = ByteCount(4096);
/// Streams of others that are remembered; torch has about a hundred.
const FOREIGN_MAX: usize = 1024;

/// The regions of one device in this process.
#[derive(Debug)]
pub struct MemoryManager {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) options: ManagerOptions,
    pub(crate) arena: Arc<HostArena>,
    pub(crate) files: SourceFiles,
    pub(crate) up: Arc<Stream>,
    pub(crate) down: Arc<Stream>,
    /// For what kernels do beside copies: zeroing what is used again, hashing what leaves next.
    beside: Arc<Stream>,
    pool: Arc<FramePool>,
    gate: Arc<Gate>,
    turn: Arc<Turn>,
    restoring: Arc<Turn>,
    flushing: Arc<Turn>,
    regions: Mutex<BTreeMap<RegionId, Weak<RegionInner>>>,
    backings: Mutex<Vec<Weak<KvBacking>>>,
    caches: Mutex<Vec<Weak<kv_cache::Shared>>>,
    pub(crate) growing: Mutex<Vec<Weak<Segments>>>,
    /// Gone as far as the page table goes, but something queued may still touch it (I5).
    pub(crate) retired: Mutex<Vec<Retired>>,
    /// Streams of others that we were told of: a graph that is captured on one must not be ended by a fence.
    foreign: Mutex<BTreeSet<ForeignStream>>,
    pub(crate) scratch: Mutex<Option<Arc<Scratch>>>,
    scratch_bytes: ByteCount,
    next_id: AtomicU64,
    /// Device bytes that torch's allocations leave free.
    margin: AtomicU64,
    pub(crate) transfers: AtomicUsize,
    onboarded: AtomicU64,
    evicted: AtomicU64,
}

impl MemoryManager {
    /// A manager on `device`.
    ///
    /// # Errors
    /// [`MemoryError::Device`] if streams cannot be made.
    pub fn new(device: Arc<dyn Device>, options: ManagerOptions) -> Result<Arc<Self>, MemoryError> {
        let stream = || Stream::create(&device).map_err(MemoryError::device("create a stream"));
        let (up, down, beside) = (stream()?, stream()?, stream()?);
        let pool = options.pool.unwrap_or_else(|| PoolOptions::of(device.info().capacity));
        let per_buffer = (options.host_budget.0 / 16).min(SCRATCH_BYTES_MAX.0);
        let scratch_bytes = ByteCount(per_buffer - per_buffer % SCRATCH_UNIT.0);
        let for_copies = options.host_budget - scratch_bytes - scratch_bytes;
        Ok(Arc::new_cyclic(|manager| Self {
            pool: FramePool::new(pool, Weak::clone(manager)),
            arena: HostArena::new(
                Arc::clone(&device),
                for_copies,
                options.operation_wait,
                options.slabs.clone(),
            ),
            device,
            options,
            files: SourceFiles::default(),
            up,
            down,
            beside,
            gate: Arc::default(),
            turn: Arc::default(),
            restoring: Arc::default(),
            flushing: Arc::default(),
            regions: Mutex::default(),
            backings: Mutex::default(),
            caches: Mutex::default(),
            growing: Mutex::default(),
            retired: Mutex::default(),
            foreign: Mutex::default(),
            scratch: Mutex::default(),
            scratch_bytes,
            next_id: AtomicU64::new(1),
            margin: AtomicU64::new(0),
            transfers: AtomicUsize::new(0),
            onboarded: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        }))
    }

    /// Says how many bytes of the device torch's allocations in regions leave free; 0 at first.
    pub fn set_margin(&self, bytes: ByteCount) {
        self.margin.store(bytes.0, Ordering::Relaxed);
    }

    pub(crate) fn margin(&self) -> ByteCount {
        ByteCount(self.margin.load(Ordering::Relaxed))
    }

    /// Gives host memory back to the system that is kept for the next copies; returns its bytes.
    pub fn trim_host(&self) -> ByteCount {
        self.arena.trim()
    }

    /// The device.
    #[must_use]
    pub const fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Who grants this manager device bytes.
    #[must_use]
    pub const fn lease(&self) -> &Arc<dyn LeaseSource> {
        &self.options.lease
    }

    /// Reserves addresses for a new region. It takes no memory yet.
    ///
    /// # Errors
    /// [`MemoryError::Device`], [`MemoryError::State`] for a region of no bytes.
    pub fn region(self: &Arc<Self>, spec: RegionSpec) -> Result<Region, MemoryError> {
        self.enter_region(spec, false)
    }

    /// A region whose extents come and go by commit, whatever it is for.
    ///
    /// # Errors
    /// As [`region`](Self::region).
    pub(crate) fn growing_region(self: &Arc<Self>, spec: RegionSpec) -> Result<Region, MemoryError> {
        self.enter_region(spec, true)
    }

    fn enter_region(self: &Arc<Self>, spec: RegionSpec, is_growing: bool) -> Result<Region, MemoryError> {
        let id = RegionId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let region = RegionInner::new(Arc::clone(self), id, spec, is_growing)?;
        self.regions.lock().insert(id, Arc::downgrade(&region.inner));
        Ok(region)
    }

    pub(crate) fn forget_region(&self, id: RegionId) {
        self.regions.lock().remove(&id);
    }

    pub(crate) fn register_backing(&self, backing: &Arc<KvBacking>) {
        let mut backings = self.backings.lock();
        backings.retain(|backing| backing.strong_count() > 0);
        backings.push(Arc::downgrade(backing));
    }

    pub(crate) fn register_cache(&self, cache: &Arc<kv_cache::Shared>) {
        let mut caches = self.caches.lock();
        caches.retain(|cache| cache.strong_count() > 0);
        caches.push(Arc::downgrade(cache));
    }

    pub(crate) fn caches(&self) -> Vec<Arc<kv_cache::Shared>> {
        self.caches.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Forgets KV contents off the device that no block uses any more. Needs the turn.
    pub(crate) fn drop_idle_copies(&self) {
        for cache in self.caches() {
            cache.drop_idle_copies();
        }
        for backing in self.backings() {
            backing.drop_idle_copies();
        }
    }

    /// Counts one more transfer that goes on by itself; whoever ends it takes it off again.
    pub(crate) fn claim_transfer(&self) -> Result<(), MemoryError> {
        let limit = self.options.transfers_max;
        self.transfers
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| (count < limit).then_some(count + 1))
            .map(drop)
            .map_err(|_| MemoryError::TooManyTransfers { limit })
    }

    pub(crate) const fn pool(&self) -> &Arc<FramePool> {
        &self.pool
    }

    pub(crate) const fn beside(&self) -> &Arc<Stream> {
        &self.beside
    }

    pub(crate) const fn turn(&self) -> &Arc<Turn> {
        &self.turn
    }

    /// One copy in the background at a time: each holds host memory for an extent that is not whole yet.
    pub(crate) const fn flushing(&self) -> &Arc<Turn> {
        &self.flushing
    }

    pub(crate) fn next_transfer(&self) -> TransferId {
        TransferId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Regions in the order they were made.
    pub(crate) fn regions(&self) -> Vec<Region> {
        let regions = self.regions.lock();
        regions.values().filter_map(Weak::upgrade).map(|inner| Region { inner }).collect()
    }

    fn backings(&self) -> Vec<Arc<KvBacking>> {
        self.backings.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// One restore at a time: a second one would ask for a lease that the first has asked for already.
    pub(crate) fn take_restore(&self, deadline: Instant) -> Result<Taken, MemoryError> {
        let start = Instant::now();
        let late = || MemoryError::Deadline { doing: "waiting for another wake", waited: start.elapsed() };
        self.restoring.take(deadline).ok_or_else(late)
    }

    /// Waits for what has been queued on the device, on whoever's streams: engines leave a guard when they have launched
    /// their kernels, and nobody tells us which stream those are on (I5). Refused while a graph is captured on a stream
    /// that we know of: marking all work would end the capture.
    pub(crate) fn fence(&self, deadline: Instant) -> Result<(), MemoryError> {
        self.check_not_capturing()?;
        self.fence_work([ForeignWork::All], deadline)
    }

    /// Refuses while a graph is captured on a stream that we know of.
    pub(crate) fn check_not_capturing(&self) -> Result<(), MemoryError> {
        let known = self.foreign.lock().clone();
        for stream in known {
            if let Err(error @ DeviceError::Capturing { .. }) =
                Event::of_foreign(&self.device, ForeignWork::Of(stream))
            {
                return Err(MemoryError::device("wait for running kernels")(error));
            }
        }
        Ok(())
    }

    /// As [`fence`](Self::fence), for what regions are used by: where all of them were told of their streams
    /// ([`Region::record_use`]), only these count.
    fn fence_scope(&self, scope: Scope, deadline: Instant) -> Result<(), MemoryError> {
        let told: Option<BTreeSet<ForeignStream>> = match scope {
            Scope::All => None,
            Scope::Region(_) | Scope::Pair(..) => {
                let regions = self.regions().into_iter().filter(|region| scope.has(region.id()));
                regions.map(|region| region.told_streams()).try_fold(BTreeSet::new(), |mut all, told| {
                    all.extend(told?);
                    Some(all)
                })
            }
        };
        match told {
            None => self.fence(deadline),
            Some(streams) => self.fence_work(streams.into_iter().map(ForeignWork::Of), deadline),
        }
    }

    fn fence_work(
        &self,
        works: impl IntoIterator<Item = ForeignWork>,
        deadline: Instant,
    ) -> Result<(), MemoryError> {
        let start = Instant::now();
        let marked = works.into_iter().map(|work| Event::of_foreign(&self.device, work));
        let events = marked.collect::<Result<Vec<_>, _>>();
        let ended = events.and_then(|events| {
            events.iter().try_fold(true, |all, event| {
                Ok(all && event.wait(deadline.saturating_duration_since(Instant::now()))?)
            })
        });
        if ended.map_err(MemoryError::device("wait for running kernels"))? {
            return Ok(());
        }
        Err(MemoryError::Deadline { doing: "waiting for running kernels", waited: start.elapsed() })
    }

    /// Remembers a stream of others.
    pub(crate) fn note_stream(&self, stream: ForeignStream) {
        let mut foreign = self.foreign.lock();
        if foreign.len() < FOREIGN_MAX {
            foreign.insert(stream);
        }
    }

    pub(crate) const fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Waits until no step uses what `scope` speaks for, and keeps them out.
    pub(crate) fn take_gate(
        &self,
        scope: Scope,
        deadline: Instant,
        waited: Duration,
    ) -> Result<Pass, MemoryError> {
        let late = MemoryError::Deadline { doing: "waiting for running steps", waited };
        let pass = self.gate.alone(scope, deadline).ok_or(late)?;
        // The steps' calls have ended, not their kernels.
        self.fence_scope(scope, deadline)?;
        Ok(pass)
    }

    pub(crate) fn take_turn(&self, deadline: Instant) -> Result<Taken, MemoryError> {
        let turn = self.take_bare_turn(deadline)?;
        self.sweep(true);
        Ok(turn)
    }

    /// [`take_turn`](Self::take_turn) without freeing what steps may still touch, which may wait for kernels and marks all
    /// work.
    pub(crate) fn take_turn_only(&self, deadline: Instant) -> Result<Taken, MemoryError> {
        let turn = self.take_bare_turn(deadline)?;
        self.sweep(false);
        Ok(turn)
    }

    /// The turn, or that of a wake that waits for its copies and lends it meanwhile: for mapping memory and filling it, and
    /// nothing else. Nothing is evicted while it is borrowed, either.
    pub(crate) fn take_or_borrow_turn(&self, deadline: Instant) -> Result<Taken, MemoryError> {
        let start = Instant::now();
        let turn = self.turn.take_or_borrow(deadline).ok_or_else(|| MemoryError::Deadline {
            doing: "waiting for another operation",
            waited: start.elapsed(),
        })?;
        if !turn.is_borrowed() {
            self.sweep(false);
        }
        Ok(turn)
    }

    fn take_bare_turn(&self, deadline: Instant) -> Result<Taken, MemoryError> {
        let start = Instant::now();
        self.turn.take(deadline).ok_or_else(|| MemoryError::Deadline {
            doing: "waiting for another operation",
            waited: start.elapsed(),
        })
    }

    pub(crate) fn operation_deadline(&self) -> Instant {
        Instant::now() + self.options.operation_wait
    }

    /// Brings back the weights of all regions, whole.
    ///
    /// # Errors
    /// What the first failing region failed with; the regions before it stay awake.
    pub fn wake_weights(&self, timeout: Duration, reason: &str) -> Result<Report, MemoryError> {
        self.wake_weights_telling(timeout, reason, || {})
    }

    /// [`wake_weights`](Self::wake_weights), and calls `backed` once all device memory is there that the weights lacked,
    /// where their bytes are still coming: from then on a step may run beside the wake ([`Self::guard_in_order`]).
    ///
    /// # Errors
    /// As [`wake_weights`](Self::wake_weights).
    pub fn wake_weights_telling(
        &self,
        timeout: Duration,
        reason: &str,
        backed: impl FnOnce(),
    ) -> Result<Report, MemoryError> {
        let start = Instant::now();
        let mut backed = Some(backed);
        let mut report = Report::new(ByteCount::ZERO);
        let mut regions: Vec<_> =
            self.regions().into_iter().filter(|region| region.kind() == LeaseKind::Weights).collect();
        while let Some(region) = (!regions.is_empty()).then(|| regions.remove(0)) {
            let are_others_there = || regions.iter().all(|region| region.missing_bytes().is_zero());
            let brought = region.wake_telling(start + timeout, reason, || {
                if are_others_there()
                    && let Some(backed) = backed.take()
                {
                    backed();
                }
            })?;
            report.requested += brought.requested;
            report.copied += brought.copied;
        }
        report.duration = start.elapsed();
        Ok(report)
    }

    /// Where the bytes are. The figures of requests and of overhead are for others to add.
    #[must_use]
    pub fn usage(&self) -> WorkerUsage {
        let mut usage = WorkerUsage {
            host: self.arena.used(),
            onboarded: ByteCount(self.onboarded.load(Ordering::Relaxed)),
            evicted: ByteCount(self.evicted.load(Ordering::Relaxed)),
            overhead_device: self.options.lease.held(LeaseKind::Overhead),
            pooled: self.pool.usage().bytes,
            ..WorkerUsage::default()
        };
        for region in self.regions() {
            let figures = region.usage();
            match region.kind() {
                LeaseKind::Weights => {
                    usage.weights_device += figures.device;
                    usage.weights_total += figures.total;
                }
                LeaseKind::Kv => usage.kv_device += figures.device,
                LeaseKind::Overhead => {}
            }
            usage.source_only += figures.source_only;
        }
        usage.kv_live = self.backings().iter().map(|backing| backing.held_bytes()).sum();
        let caches = self.caches();
        usage.kv_live += caches.iter().map(|cache| cache.held_bytes()).sum::<ByteCount>();
        usage.kv_cached = caches.iter().map(|cache| cache.cached_bytes()).sum();
        usage
    }

    /// How much memory of the host tier there is, and why it is as it is. Buffers for reading files count apart.
    #[must_use]
    pub fn host_usage(&self) -> HostUsage {
        self.arena.usage()
    }

    /// Says what is wrong, if anything is: every page table, and leases against residents.
    ///
    /// # Errors
    /// A sentence that names the first contradiction.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.pool.check_invariants()?;
        self.regions().iter().try_for_each(Region::check_invariants)
    }

    pub(crate) fn count_onboarded(&self, bytes: ByteCount) {
        self.onboarded.fetch_add(bytes.0, Ordering::Relaxed);
    }

    pub(crate) fn count_evicted(&self, bytes: ByteCount) {
        self.evicted.fetch_add(bytes.0, Ordering::Relaxed);
    }

    /// Waits, within bounds, until no stream of ours touches anything: before memory of a failed copy is freed (I5).
    pub(crate) fn settle(&self) {
        for stream in [&self.up, &self.down, &self.beside] {
            for _ in 0..3 {
                match stream.synchronize(self.options.operation_wait) {
                    Ok(true) => break,
                    Ok(false) => {
                        tracing::warn!("copies still running after {:?}", self.options.operation_wait);
                    }
                    Err(error) => tracing::warn!(%error, "cannot fence a stream"),
                }
            }
        }
    }

    pub(crate) fn scratch(&self) -> Result<Arc<Scratch>, MemoryError> {
        if let Some(scratch) = self.scratch.lock().as_ref() {
            return Ok(Arc::clone(scratch));
        }
        if self.scratch_bytes.is_zero() {
            let (needed, free, budget) = (SCRATCH_UNIT, ByteCount::ZERO, self.options.host_budget);
            return Err(MemoryError::HostBudget { needed, free, budget });
        }
        let buffer = || {
            HostBuffer::allocate(&self.device, self.scratch_bytes)
                .map_err(MemoryError::device("allocate a read buffer"))
        };
        let scratch = Arc::new(Scratch { buffers: [buffer()?, buffer()?] });
        *self.scratch.lock() = Some(Arc::clone(&scratch));
        Ok(scratch)
    }

    /// Makes room in the host tier: by giving up copies in the background that are not whole, then by dropping copies that
    /// a file holds too, from the last extents backwards (what is used first comes back fastest). Returns whether `bytes` are free now. Call it in turn.
    pub(crate) fn make_host_room(&self, bytes: ByteCount) -> bool {
        let regions = self.regions();
        if self.arena.free() < bytes {
            regions.iter().for_each(Region::drop_unfinished);
        }
        for region in regions.into_iter().rev() {
            if self.arena.free() >= bytes {
                return true;
            }
            region.drop_host_copies(|| self.arena.free() >= bytes);
        }
        self.arena.free() >= bytes
    }
}

impl Drop for MemoryManager {
    fn drop(&mut self) {
        self.release_last();
    }
}
