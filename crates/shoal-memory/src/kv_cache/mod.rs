//! [`KvCache`]: KV blocks with memory behind them, for engines.
//!
//! Apart from [`crate::kv`], whose blocks an engine numbers itself: here the cache chooses the blocks, so that memory can
//! follow use. [`KvState`] decides; this drives. Taking and giving back blocks that have memory is a lock that nobody holds
//! for long and a few words of bits ([`KvCache::try_alloc`] and [`KvCache::try_free`] do not even wait for that lock).
//! Where memory has to come first, the caller's thread maps it ([`grow`]); mostly it need not, because a thread of the
//! cache's own maps ahead of need and gives back what is empty ([`ahead`]).
//!
//! "Not now" is an answer, not an error: when neither the limit nor the lease has room, nothing has changed and the engine
//! goes on with what it has. Keeps I7 through the state, I1 and I5 through [`Region`]: memory goes only after the events
//! that engines recorded, or, where they recorded none, after everything queued on the device.

mod ahead;
mod debug;
mod grow;
#[cfg(test)]
mod grow_tests;
mod keeper;
mod meeting;
mod moves;
mod reuse;
mod signal;
mod tier;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::extent::{EXTENT_PAGES_MAX, ExtentRule};
use shoal_core::ids::RegionId;
use shoal_core::kv::blocks::{BlockState, Freed};
use shoal_core::kv::ids::BlockId;
use shoal_core::kv::layout::{CacheLayout, CacheSpec, GroupLayout};
use shoal_core::kv::reuse::ReuseOptions;
use shoal_core::kv::state::{GranuleId, KvError, KvState, KvUsage};
use shoal_core::page_table::Backing;
use shoal_core::protocol::LeaseKind;
use shoal_device::{Event, ForeignStream, ForeignWork};

use crate::error::MemoryError;
use crate::manager::MemoryManager;
use crate::region::{Region, RegionSpec, Report};
use crate::turn::Turn;
use ahead::Ahead;
use debug::Debug;
pub use debug::Stray;
use meeting::Meeting;
use signal::Signal;
pub use tier::{KvTier, KvTierOptions, Loading, Prefetch};

/// Streams of an engine whose steps are remembered.
const STREAMS_MAX: usize = 64;

/// What a new cache shall be.
#[derive(Clone, Debug)]
pub struct KvCacheSpec {
    /// Its name, for people.
    pub name: String,
    /// Its groups, their order, and the most memory it may ever have.
    pub cache: CacheSpec,
    /// The most memory that is kept mapped ahead of need.
    pub spare_bytes_max: ByteCount,
    /// How long an allocation waits for a lease and for its turn to map.
    pub patience: Duration,
    /// How what blocks hold is found again; `None`: not at all.
    pub reuse: Option<ReuseOptions>,
    /// Fill what is freed with NaN and look for writes to what nobody owns ([`KvCache::strays`]): slow, for finding an
    /// engine's mistakes.
    pub is_debug: bool,
    /// The byte that it is filled with, by group; 0xFF where none is given, which is NaN in all types of KV but `fnuz` ones.
    pub fills: Vec<u8>,
}

impl KvCacheSpec {
    /// The usual values.
    #[must_use]
    pub fn new(name: &str, cache: CacheSpec) -> Self {
        let spare_bytes_max = ByteCount((cache.bytes.0 / 8).min(ByteCount::gib(2).0));
        let (patience, reuse) = (Duration::from_millis(100), Some(ReuseOptions::default()));
        Self {
            name: name.to_owned(),
            cache,
            spare_bytes_max,
            patience,
            reuse,
            is_debug: false,
            fills: Vec::new(),
        }
    }
}

/// What became of an attempt that waits for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// It is done.
    Done,
    /// Somebody has the lock at this moment.
    Busy,
    /// Memory would have to be mapped first.
    Unmapped,
}

#[derive(Debug)]
pub(crate) struct Shared {
    region: Region,
    state: Mutex<KvState>,
    /// Granules that are on their way out, or did not come, whose memory could not be unmapped yet.
    lingering: Mutex<Vec<GranuleId>>,
    /// One at a time maps, so that two who lack the same do not both bring it.
    growing: Arc<Turn>,
    /// The newest step of each stream that an engine told of.
    steps: Mutex<BTreeMap<ForeignStream, Arc<Event>>>,
    /// The same of a stream of ours, where a test or a Rust engine has one.
    step: Mutex<Option<Arc<Event>>>,
    /// Loads beside the engine's thread whose blocks are in no table of its yet: no block is moved meanwhile.
    loads: AtomicUsize,
    signal: Signal,
    keeper: Meeting,
    started: Instant,
    patience: Duration,
    debug: Option<Debug>,
}

/// KV blocks with memory behind them. Dropping it ends its thread; its addresses stay until the last buffer over them is
/// gone (I3).
#[derive(Debug)]
pub struct KvCache {
    shared: Arc<Shared>,
    /// Dropped first.
    _ahead: Ahead,
}

impl MemoryManager {
    /// Reserves addresses for a cache of KV blocks. It takes no memory yet.
    ///
    /// # Errors
    /// [`MemoryError::KvLayout`], [`MemoryError::Device`].
    pub fn kv_cache(self: &Arc<Self>, spec: KvCacheSpec) -> Result<KvCache, MemoryError> {
        let layout = CacheLayout::new(&spec.cache)?;
        let groups = layout.groups().len();
        let state = KvState::new(layout, spec.spare_bytes_max, spec.reuse)?;
        let rule = ExtentRule { pages_min: 1, pages_max: EXTENT_PAGES_MAX, pieces_min: 1 };
        let region = self.growing_region(RegionSpec {
            name: spec.name,
            bytes: state.layout().reservation(),
            kind: LeaseKind::Kv,
            extent_rule: rule,
            backing: Backing::Keep,
        })?;
        region.become_cache();
        let shared = Arc::new(Shared {
            region,
            state: Mutex::new(state),
            lingering: Mutex::default(),
            growing: Arc::default(),
            steps: Mutex::default(),
            step: Mutex::default(),
            loads: AtomicUsize::new(0),
            signal: Signal::default(),
            keeper: Meeting::default(),
            started: Instant::now(),
            patience: spec.patience,
            debug: spec.is_debug.then(|| Debug::new(&self.device, spec.fills, groups)).transpose()?,
        });
        self.register_cache(&shared);
        Ok(KvCache { _ahead: Ahead::start(&shared), shared })
    }

    /// Frees memory of KV caches in which nothing is owned, without a gate: after the steps that were recorded. Hold neither
    /// turn nor data lock.
    pub(crate) fn release_cached(&self, bytes: ByteCount, deadline: Instant) -> ByteCount {
        release_from(self.caches(), true, bytes, deadline)
    }

    /// The same of memory in which nothing lies, as what was mapped ahead, from other caches than the one in `own`. Nothing
    /// for whoever does not wait: nobody maps ahead what another has mapped ahead.
    pub(crate) fn release_empty(&self, own: RegionId, bytes: ByteCount, deadline: Instant) -> ByteCount {
        if Instant::now() >= deadline {
            return ByteCount::ZERO;
        }
        let mut others = self.caches();
        others.retain(|cache| cache.region.id() != own);
        release_from(others, false, bytes, deadline)
    }
}

/// Trims caches, one after another, until `bytes` are free.
fn release_from(caches: Vec<Arc<Shared>>, may_evict: bool, bytes: ByteCount, deadline: Instant) -> ByteCount {
    let mut freed = ByteCount::ZERO;
    for cache in caches {
        let unused = if may_evict { cache.unowned_bytes() } else { cache.state.lock().usage().empty };
        if freed >= bytes || unused.is_zero() {
            continue;
        }
        match cache.trim(bytes - freed, may_evict, deadline) {
            Ok(report) => freed += report.freed,
            Err(error) => tracing::debug!(%error, "what KV caches do not use stays for now"),
        }
    }
    freed
}

impl KvCache {
    /// The region it lies in: its address, for tensors, and its manager. Only the cache gives and takes its memory: `commit`,
    /// `decommit` and `stage` are refused there.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.shared.region
    }

    /// Where the blocks of a group lie.
    ///
    /// # Errors
    /// [`MemoryError::Kv`] if there is no such group.
    pub fn layout(&self, group: usize) -> Result<GroupLayout, MemoryError> {
        let state = self.shared.state.lock();
        let groups = state.layout().groups();
        let unknown = KvError::UnknownGroup { group, groups: groups.len() };
        Ok(groups.get(group).cloned().ok_or(unknown)?)
    }

    /// How many groups it has.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.shared.state.lock().layout().groups().len()
    }

    /// Fills `ids` with blocks of a group if that can be done at once: no thread is waited for and nothing is mapped.
    ///
    /// # Errors
    /// [`MemoryError::Kv`]; nothing is changed.
    #[inline]
    pub fn try_alloc<T: BlockId>(&self, group: usize, ids: &mut [T]) -> Result<Attempt, MemoryError> {
        if self.shared.debug.is_some() {
            return Ok(Attempt::Busy);
        }
        let Some(mut state) = self.shared.state.try_lock() else { return Ok(Attempt::Busy) };
        let is_done = state.alloc(group, ids)?;
        let wants_attention = is_done && state.wants_attention(group);
        drop(state);
        if wants_attention {
            self.shared.call();
        }
        Ok(if is_done { Attempt::Done } else { Attempt::Unmapped })
    }

    /// Fills `ids` with blocks of a group, and maps memory for them where it has to come first: new memory is zero, memory
    /// that was used before is as it was left. False, and none is taken: so many cannot be had now. Nothing is evicted then either,
    /// unless it could not be known beforehand that this is not enough: where blocks straddle granules, or where memory of other
    /// groups that was evicted cannot leave or is taken by others.
    ///
    /// It may wait for a lease, for the cache's patience; so call it outside of guards, as whoever gives memory up may wait
    /// for them.
    ///
    /// # Errors
    /// [`MemoryError::Kv`], [`MemoryError::Device`] if the device fails; nothing is changed.
    pub fn alloc<T: BlockId>(&self, group: usize, ids: &mut [T]) -> Result<bool, MemoryError> {
        self.shared.alloc(group, ids)
    }

    /// [`free`](Self::free) if the lock can be had at once.
    ///
    /// # Errors
    /// [`MemoryError::Kv`]; nothing is changed.
    #[inline]
    pub fn try_free<T: BlockId>(&self, group: usize, ids: &[T]) -> Result<Attempt, MemoryError> {
        if self.shared.debug.is_some() {
            return Ok(Attempt::Busy);
        }
        let Some(mut state) = self.shared.state.try_lock() else { return Ok(Attempt::Busy) };
        let freed = state.free(group, ids)?;
        self.shared.after_free(state, group, freed);
        Ok(Attempt::Done)
    }

    /// Takes one owner from each of these blocks. What nobody owns any more can be allocated at once; its memory goes back
    /// when all of its granule is free and nothing is expected for it, after the last recorded step
    /// ([`record_step`](Self::record_step)).
    ///
    /// # Errors
    /// [`MemoryError::Kv`] for an id that is owned by nobody, or named more often than it is owned; nothing is changed.
    pub fn free<T: BlockId>(&self, group: usize, ids: &[T]) -> Result<(), MemoryError> {
        if let Some(debug) = &self.shared.debug {
            return self.shared.free_filling(debug, group, ids);
        }
        let mut state = self.shared.state.lock();
        let freed = state.free(group, ids)?;
        self.shared.after_free(state, group, freed);
        Ok(())
    }

    /// One owner more for each of these blocks; each is given back as often as it is owned.
    ///
    /// # Errors
    /// [`MemoryError::Kv`]; nothing is changed.
    pub fn fork<T: BlockId>(&self, group: usize, ids: &[T]) -> Result<(), MemoryError> {
        Ok(self.shared.state.lock().fork(group, ids)?)
    }

    /// [`fork`](Self::fork) if the lock can be had at once.
    ///
    /// # Errors
    /// [`MemoryError::Kv`]; nothing is changed.
    pub fn try_fork<T: BlockId>(&self, group: usize, ids: &[T]) -> Result<Attempt, MemoryError> {
        let Some(mut state) = self.shared.state.try_lock() else { return Ok(Attempt::Busy) };
        state.fork(group, ids)?;
        Ok(Attempt::Done)
    }

    /// What one block is.
    ///
    /// # Errors
    /// [`MemoryError::Kv`].
    pub fn state_of(&self, group: usize, block: u32) -> Result<BlockState, MemoryError> {
        let state = self.shared.state.lock();
        Ok(state.pool(group)?.state(block).map_err(KvError::from)?)
    }

    /// How many blocks of a group could be had, as far as the limit and the addresses go: the lease is asked when memory is
    /// needed.
    ///
    /// # Errors
    /// [`MemoryError::Kv`].
    pub fn available(&self, group: usize) -> Result<u32, MemoryError> {
        Ok(self.shared.state.lock().allocatable(group)?)
    }

    /// [`available`](Self::available) if the lock can be had at once and nothing has to be counted for it: with several groups
    /// it is, as what others would give up is among it.
    ///
    /// # Errors
    /// [`MemoryError::Kv`].
    pub fn try_available(&self, group: usize) -> Result<Option<u32>, MemoryError> {
        let Some(state) = self.shared.state.try_lock() else { return Ok(None) };
        if state.layout().groups().len() > 1 {
            return Ok(None);
        }
        Ok(Some(state.allocatable(group)?))
    }

    /// Sets the most memory that the cache may have, over all groups. Memory above it goes as blocks become free; raised
    /// again, everything is as it was. An older revision, or another number under the same one, is refused.
    ///
    /// # Errors
    /// [`MemoryError::Kv`]; nothing is changed.
    pub fn set_limit(&self, limit: ByteCount, revision: Option<u64>) -> Result<(), MemoryError> {
        self.shared.state.lock().set_limit(limit, revision)?;
        self.shared.call();
        Ok(())
    }

    /// Says that the next step will take so many blocks, so that they are mapped before it asks.
    ///
    /// # Errors
    /// [`MemoryError::Kv`].
    pub fn hint(&self, group: usize, blocks: u32) -> Result<(), MemoryError> {
        self.shared.state.lock().hint(group, blocks, self.shared.started.elapsed())?;
        self.shared.call();
        Ok(())
    }

    /// [`hint`](Self::hint) if the lock can be had at once.
    ///
    /// # Errors
    /// [`MemoryError::Kv`].
    pub fn try_hint(&self, group: usize, blocks: u32) -> Result<Attempt, MemoryError> {
        let Some(mut state) = self.shared.state.try_lock() else { return Ok(Attempt::Busy) };
        state.hint(group, blocks, self.shared.started.elapsed())?;
        drop(state);
        self.shared.call();
        Ok(Attempt::Done)
    }

    /// Marks what a stream of others has queued until now as a step. Say it after launching each step, on each stream that
    /// steps run on: memory of blocks that are free goes only after the newest steps. An engine that never says it has its
    /// memory go after everything queued on the device, and only while it holds no guard.
    ///
    /// # Errors
    /// [`MemoryError::Device`], as while a graph is captured on the stream.
    pub fn record_step(&self, stream: ForeignStream) -> Result<(), MemoryError> {
        let device = self.shared.region.manager().device();
        let event =
            Event::of_foreign(device, ForeignWork::Of(stream)).map_err(MemoryError::device("mark a step"))?;
        let mut steps = self.shared.steps.lock();
        if steps.len() >= STREAMS_MAX && !steps.contains_key(&stream) {
            // An engine may make streams as it goes: those whose steps have ended are nothing to wait for.
            steps.retain(|_, event| !event.wait(Duration::ZERO).unwrap_or(false));
        }
        if steps.len() >= STREAMS_MAX && !steps.contains_key(&stream) {
            return Err(self
                .shared
                .region
                .refuse("mark a step", "steps run on more than 64 streams at once"));
        }
        let old = steps.insert(stream, Arc::new(event));
        drop(steps);
        drop(old);
        self.shared.region.note_stream(stream);
        Ok(())
    }

    /// The same for a step that an event of the caller's own stands for.
    pub fn record_step_event(&self, event: Event) {
        let old = self.shared.step.lock().replace(Arc::new(event));
        drop(old);
    }

    /// Gives back memory in which nothing lies, whatever is expected, at least `bytes` as far as there is any. Waits for the
    /// steps that were recorded, or for everything queued on the device.
    ///
    /// # Errors
    /// [`MemoryError::Deadline`] while another operation or a step runs, [`MemoryError::Device`].
    pub fn trim(&self, bytes: ByteCount) -> Result<Report, MemoryError> {
        self.shared.trim(bytes, false, self.shared.manager().operation_deadline())
    }

    /// [`trim`](Self::trim), and what is only cached is evicted where that gives memory back.
    ///
    /// # Errors
    /// As [`trim`](Self::trim). What was evicted stays so.
    pub fn trim_cached(&self, bytes: ByteCount) -> Result<Report, MemoryError> {
        self.shared.trim(bytes, true, self.shared.manager().operation_deadline())
    }

    /// Figures.
    #[must_use]
    pub fn usage(&self) -> KvUsage {
        self.shared.state.lock().usage()
    }

    /// Says what is wrong, if anything is.
    ///
    /// # Errors
    /// A sentence that names the first contradiction.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.shared.check_invariants()
    }
}

impl Shared {
    pub(crate) const fn region(&self) -> &Region {
        &self.region
    }

    fn manager(&self) -> &Arc<MemoryManager> {
        self.region.manager()
    }

    #[inline]
    fn after_free(&self, state: parking_lot::MutexGuard<'_, KvState>, group: usize, freed: Freed) {
        let wants_attention = freed.has_emptied && state.wants_attention(group);
        drop(state);
        if wants_attention {
            self.call();
        }
    }

    /// Bytes of memory that cannot be freed without taking it from somebody.
    pub(crate) fn held_bytes(&self) -> ByteCount {
        let state = self.state.lock();
        let usage = state.usage();
        let held = usage.mapped.saturating_sub(usage.empty).saturating_sub(state.evictable_bytes());
        drop(state);
        held.saturating_sub(self.kept())
    }

    /// Bytes of memory that hold nothing but prefixes which no request uses.
    pub(crate) fn cached_bytes(&self) -> ByteCount {
        let evictable = self.state.lock().evictable_bytes();
        evictable + self.kept()
    }

    /// Bytes of memory in which nothing is owned.
    pub(crate) fn unowned_bytes(&self) -> ByteCount {
        let state = self.state.lock();
        state.usage().empty + state.evictable_bytes()
    }

    fn check_invariants(&self) -> Result<(), String> {
        // What is on its way is in one and not in the other.
        let deadline = self.manager().operation_deadline();
        let _growing = self.growing.take(deadline).ok_or("somebody maps and does not end")?;
        let _turn = self.manager().take_turn_only(deadline).map_err(|error| error.to_string())?;
        self.settle_leaving().map_err(|error| error.to_string())?;
        let state = self.state.lock();
        state.check_invariants()?;
        // What could not be unmapped is out of the page table already.
        let lingering: ByteCount = self.lingering.lock().iter().map(|granule| state.bytes_of(*granule)).sum();
        let (mapped, region) = (state.mapped_bytes().saturating_sub(lingering), self.region.usage());
        drop(state);
        if mapped != region.total {
            return Err(format!("{mapped} counted as mapped, {} in the page table", region.total));
        }
        self.region.check_invariants()
    }
}
