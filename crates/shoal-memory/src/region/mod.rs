//! [`Region`]: a range of addresses that never changes, and memory behind it that comes and goes.
//!
//! This file: what a region is and its figures. [`stage`] fills it without device memory, [`commit`] gives and takes
//! device memory by range, [`evict`] and [`restore`] move it down and up, [`flush`] copies it down before anybody asks,
//! [`blocks`] copies small ranges of it, [`stored`] reads it from a store of weights, [`owned`] is for an owner who says himself when it sleeps.

mod access;
mod blocks;
mod checks;
mod commit;
#[cfg(test)]
mod commit_tests;
mod evict;
mod fill;
mod flush;
pub(crate) mod incoming;
pub(crate) mod outgoing;
mod owned;
mod restore;
mod stage;
mod stored;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::extent::{ExtentRule, PageRun};
use shoal_core::ids::{ExtentIndex, RegionId};
use shoal_core::page_table::{Backing, RegionTable, TableError, UseOrder};
use shoal_core::protocol::LeaseKind;
use shoal_core::source::SourceMap;
use shoal_core::tier::Tier;
use shoal_device::{ForeignStream, Mapping, Reservation};

use crate::arena::HostCopy;
use crate::error::MemoryError;
use crate::lease::Grant;
use crate::manager::MemoryManager;
use crate::retire::{Released, Resident};
use crate::supply::Supply;
use crate::transfer::Transfer;
use crate::weights::Stored;
pub use blocks::BlockCopy;
pub use flush::{Flush, FlushReport};
pub use stage::SealReport;
pub use stored::StoredTensor;

/// What a new region shall be.
#[derive(Clone, Debug)]
pub struct RegionSpec {
    /// Its name, for people.
    pub name: String,
    /// Its length; rounded up to whole pages.
    pub bytes: ByteCount,
    /// What its lease is for. Weights are cut into extents at once, in order of use; other regions grow by commit.
    pub kind: LeaseKind,
    /// How extents are cut.
    pub extent_rule: ExtentRule,
    /// What happens to bytes whose device memory is taken.
    pub backing: Backing,
}

/// What an eviction or a restore did.
#[derive(Clone, Debug)]
pub struct Report {
    /// Bytes that were asked for (restore: bytes brought back).
    pub requested: ByteCount,
    /// Device bytes freed and given back.
    pub freed: ByteCount,
    /// Bytes copied between tiers.
    pub copied: ByteCount,
    /// How long it took.
    pub duration: Duration,
    /// What stood in the way, if it was not done in full.
    pub error: Option<Box<MemoryError>>,
}

impl Report {
    pub(crate) const fn new(requested: ByteCount) -> Self {
        Self {
            requested,
            freed: ByteCount::ZERO,
            copied: ByteCount::ZERO,
            duration: Duration::ZERO,
            error: None,
        }
    }

    pub(crate) fn absorb(&mut self, part: Self) {
        self.freed += part.freed;
        self.copied += part.copied;
        if self.error.is_none() {
            self.error = part.error;
        }
    }

    pub(crate) fn absorb_released(&mut self, released: Released) {
        self.freed += released.freed;
        released.error.into_iter().for_each(|error| self.fail(error));
    }

    pub(crate) fn fail(&mut self, error: MemoryError) {
        if self.error.is_none() {
            self.error = Some(Box::new(error));
        }
    }
}

/// Bytes of a region by place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionUsage {
    /// All extents.
    pub total: ByteCount,
    /// On the device.
    pub device: ByteCount,
    /// With a copy in the host tier.
    pub host: ByteCount,
    /// Only in the file they came from.
    pub source_only: ByteCount,
    /// What a full wake would bring to the device.
    pub missing: ByteCount,
    /// That have left the device since the region was made, each time counted: whoever finds more than before, and
    /// nothing missing, knows that it was woken.
    pub left: ByteCount,
    /// Whether checksums are recorded.
    pub sealed: bool,
}

/// What holds the copies of one extent.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    pub(crate) resident: Option<Resident>,
    pub(crate) host: Option<HostCopy>,
    /// A copy in the background that is not whole yet, and counts for nothing.
    pub(crate) unfinished: Option<HostCopy>,
    /// The hash of its bytes ([`shoal_device::hash_bytes`]), once sealed.
    pub(crate) hash: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) table: RegionTable,
    pub(crate) slots: HashMap<ExtentIndex, Slot>,
    pub(crate) sources: SourceMap,
    /// Where all of it can be read faster than from its files. What is read is verified all the same.
    pub(crate) stored: Option<Arc<Stored>>,
    pub(crate) sealed: bool,
}

impl State {
    pub(crate) fn slot(&mut self, index: ExtentIndex) -> &mut Slot {
        self.slots.entry(index).or_default()
    }

    /// The mapping of an extent that lies on the device.
    pub(crate) fn mapping(&self, index: ExtentIndex) -> Option<Arc<Mapping>> {
        Some(Arc::clone(&self.slots.get(&index)?.resident.as_ref()?.mapping))
    }
}

#[derive(Debug)]
pub(crate) struct RegionInner {
    id: RegionId,
    name: Arc<str>,
    kind: LeaseKind,
    backing: Backing,
    /// Extents come and go by commit; else weights are cut into extents at once.
    is_growing: bool,
    /// Who fills it right now; it does not yield meanwhile.
    users: AtomicUsize,
    /// Who copies to or from it by addresses: what is freed meanwhile keeps its memory until they are done.
    pub(crate) holds: AtomicUsize,
    /// It yields by its owner's word alone.
    pub(crate) stays: AtomicBool,
    /// A KV cache lies in it, which alone says what of it has memory.
    is_cache: AtomicBool,
    reservation: Arc<Reservation>,
    /// Streams that use it, as far as we know, and whether somebody vouched that there are no others.
    streams: Mutex<(BTreeSet<ForeignStream>, bool)>,
    /// The wake that was started most lately, or one before it that has not ended.
    waking: Mutex<Option<Transfer>>,
    pub(crate) manager: Arc<MemoryManager>,
    pub(crate) state: Mutex<State>,
}

/// A region. Clones name the same one; dropping the last frees its memory and then its addresses (I3).
#[derive(Clone, Debug)]
pub struct Region {
    pub(crate) inner: Arc<RegionInner>,
}

/// Somebody fills a region, or holds its memory; made by [`Region::begin_use`] and [`Region::hold_memory`].
#[derive(Debug)]
pub struct RegionUse {
    region: Region,
    is_hold: bool,
}

impl Drop for RegionUse {
    fn drop(&mut self) {
        let inner = &self.region.inner;
        let count = if self.is_hold { &inner.holds } else { &inner.users };
        count.fetch_sub(1, Ordering::AcqRel);
    }
}

impl RegionInner {
    #[expect(clippy::new_ret_no_self, reason = "the handle is what everybody holds")]
    pub(crate) fn new(
        manager: Arc<MemoryManager>,
        id: RegionId,
        spec: RegionSpec,
        is_growing: bool,
    ) -> Result<Region, MemoryError> {
        let RegionSpec { name, bytes, kind, extent_rule, backing } = spec;
        let granularity = manager.device.info().granularity;
        if bytes.is_zero() || !PAGE_BYTES.0.is_multiple_of(granularity.0) {
            let why = "it has no bytes, or pages are no multiple of the device's granularity";
            return Err(MemoryError::State { region: name, doing: "make it", why });
        }
        let reservation = Reservation::new(&manager.device, bytes.round_up_to(PAGE_BYTES))
            .map_err(MemoryError::device("reserve addresses"))?;
        let is_growing = is_growing || kind != LeaseKind::Weights;
        let make = if is_growing { RegionTable::empty } else { RegionTable::carved };
        let table = make(bytes.pages(), extent_rule, backing);
        let (slots, sources) = (HashMap::new(), SourceMap::default());
        let state = State { table, slots, sources, stored: None, sealed: false };
        let (users, holds) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (stays, is_cache) = (AtomicBool::new(false), AtomicBool::new(false));
        let (waking, state) = (Mutex::default(), Mutex::new(state));
        let (streams, name) = (Mutex::default(), name.into());
        let inner = Self {
            id,
            name,
            kind,
            backing,
            is_growing,
            users,
            holds,
            stays,
            is_cache,
            reservation,
            streams,
            waking,
            manager,
            state,
        };
        Ok(Region { inner: Arc::new(inner) })
    }
}

impl Drop for RegionInner {
    fn drop(&mut self) {
        self.manager.forget_region(self.id);
        let residents: Vec<_> =
            self.state.get_mut().slots.drain().filter_map(|(_, slot)| slot.resident).collect();
        self.manager.release_dropped(residents);
    }
}

impl Region {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    pub(crate) fn reservation(&self) -> &Arc<Reservation> {
        &self.inner.reservation
    }

    pub(crate) fn id(&self) -> RegionId {
        self.inner.id
    }

    /// Where it starts: an address of the device, which never changes.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.inner.reservation.address().0
    }

    /// Its length in whole pages.
    #[must_use]
    pub fn bytes(&self) -> ByteCount {
        self.inner.reservation.bytes()
    }

    /// What its lease is for.
    #[must_use]
    pub fn kind(&self) -> LeaseKind {
        self.inner.kind
    }

    /// What happens to bytes whose device memory is taken.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.inner.backing
    }

    /// Says that somebody fills it until the answer is dropped: it does not yield meanwhile.
    ///
    /// # Errors
    /// [`MemoryError::State`] while bytes of it are not on the device, [`MemoryError::Deadline`].
    pub fn begin_use(&self, timeout: Duration) -> Result<RegionUse, MemoryError> {
        // In turn, so that no eviction is in the middle of it.
        let _turn = self.manager().take_turn(Instant::now() + timeout)?;
        if !self.missing_bytes().is_zero() {
            return Err(self.refuse("use", "it is asleep; wake it first"));
        }
        self.inner.users.fetch_add(1, Ordering::AcqRel);
        Ok(RegionUse { region: self.clone(), is_hold: false })
    }

    /// Whether somebody fills it right now.
    pub(crate) fn is_in_use(&self) -> bool {
        self.inner.users.load(Ordering::Acquire) > 0
    }

    /// From here on a KV cache alone gives and takes its memory.
    pub(crate) fn become_cache(&self) {
        self.inner.is_cache.store(true, Ordering::Relaxed);
    }

    /// Refuses what would give or take memory under a cache's blocks (I2).
    pub(crate) fn check_no_cache(&self, doing: &'static str) -> Result<(), MemoryError> {
        if self.inner.is_cache.load(Ordering::Relaxed) {
            return Err(self.refuse(doing, "a KV cache lies in it; take and free blocks, or trim the cache"));
        }
        Ok(())
    }

    pub(crate) fn stays(&self) -> bool {
        self.inner.stays.load(Ordering::Acquire)
    }

    /// Whether it may lose memory without its owner's word: nobody fills it, and what is filled from outside (through
    /// torch) was declared whole, so that whoever uses it holds a guard (I13).
    pub(crate) fn may_yield(&self) -> bool {
        !self.is_in_use()
            && !self.stays()
            && (self.kind() != LeaseKind::Weights || !self.inner.is_growing || self.inner.state.lock().sealed)
    }

    /// Vouches that what uses the region runs on streams that it was told of, by this or by torch asking for memory on
    /// one: from now on its own eviction waits for what is queued on these, not for all work on the device, and so may
    /// run beside a capture elsewhere. Reclaims of all regions still wait for all work.
    pub fn record_use(&self, stream: ForeignStream) {
        self.note_stream(stream);
        self.inner.streams.lock().1 = true;
    }

    /// Remembers a stream that uses the region, without a word on others.
    pub fn note_stream(&self, stream: ForeignStream) {
        self.manager().note_stream(stream);
        self.inner.streams.lock().0.insert(stream);
    }

    /// The streams that use it, if somebody vouched for them.
    pub(crate) fn told_streams(&self) -> Option<BTreeSet<ForeignStream>> {
        let streams = self.inner.streams.lock();
        streams.1.then(|| streams.0.clone())
    }

    /// Its manager.
    #[must_use]
    pub fn manager(&self) -> &Arc<MemoryManager> {
        &self.inner.manager
    }

    /// Sets the order in which its bytes are used, as ranges of offset and length: wakes bring back what is used first,
    /// evictions take what is used last. What is in no range comes last, by address. Without ranges: all by address.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; nothing is changed.
    pub fn set_order(&self, ranges: &[(ByteCount, ByteCount)]) -> Result<(), MemoryError> {
        ranges.iter().try_for_each(|(offset, bytes)| self.check_range(*offset, *bytes))?;
        let runs = ranges.iter().map(|(offset, bytes)| PageRun::covering(*offset, *bytes));
        let order = UseOrder::new(self.bytes().pages(), runs);
        self.inner.state.lock().table.set_order(order);
        Ok(())
    }

    /// Bytes by place.
    #[must_use]
    pub fn usage(&self) -> RegionUsage {
        let state = self.inner.state.lock();
        let usage = state.table.usage();
        RegionUsage {
            total: usage.total,
            device: usage.device,
            host: usage.host,
            source_only: usage.source_only,
            missing: state.table.missing_bytes(),
            left: usage.left,
            sealed: state.sealed,
        }
    }

    /// What a full restore would bring to the device.
    #[must_use]
    pub fn missing_bytes(&self) -> ByteCount {
        self.inner.state.lock().table.missing_bytes()
    }

    /// Says what is wrong with the region, if anything is.
    ///
    /// # Errors
    /// A sentence that names the first contradiction.
    pub fn check_invariants(&self) -> Result<(), String> {
        let state = self.inner.state.lock();
        state.table.check_invariants()?;
        for (index, extent, residency) in state.table.extents() {
            let slot = state.slots.get(&index);
            let resident = slot.and_then(|slot| slot.resident.as_ref());
            let host = slot.and_then(|slot| slot.host.as_ref());
            if residency.under_way().is_some() {
                continue;
            }
            if residency.valid().has(Tier::Device) != resident.is_some() {
                return Err(format!(
                    "{} {index}: device copy {:?}, {resident:?}",
                    self.name(),
                    residency.valid()
                ));
            }
            if residency.valid().has(Tier::Host) != host.is_some() {
                return Err(format!("{} {index}: host copy {:?}, {host:?}", self.name(), residency.valid()));
            }
            if resident.is_some_and(|resident| {
                resident.mapping.bytes() != extent.bytes() || resident.lease.bytes() != extent.bytes()
            }) {
                return Err(format!("{} {index}: {extent:?} but {resident:?} (I4, I1)", self.name()));
            }
        }
        Ok(())
    }

    pub(crate) fn table_error(&self) -> impl Fn(TableError) -> MemoryError + '_ {
        |source| MemoryError::Table { region: self.name().to_owned(), source }
    }

    pub(crate) fn refuse(&self, doing: &'static str, why: &'static str) -> MemoryError {
        MemoryError::State { region: self.name().to_owned(), doing, why }
    }

    /// Asks for device bytes. Hold neither turn nor data lock.
    pub(crate) fn ask(
        &self,
        bytes: ByteCount,
        timeout: Duration,
        reason: &str,
    ) -> Result<Supply, MemoryError> {
        let (manager, deadline) = (self.manager(), Instant::now() + timeout);
        let left = || deadline.saturating_duration_since(Instant::now());
        let acquire = || Grant::acquire(manager.lease(), self.kind(), bytes, left(), reason);
        let mut seen = manager.pool().departed();
        let mut granted = acquire();
        // What comes free another may take, and give to the pool again: then that is asked once more.
        while granted.is_err() && manager.pool_gives_way(bytes, seen, deadline) {
            seen = manager.pool().departed();
            granted = acquire();
            if left().is_zero() {
                break;
            }
        }
        let granted = granted
            .or_else(|error| {
                // What torch gave back just now may be on its way still, and then lies in the pool.
                if !manager.free_segments(left()) {
                    return Err(error);
                }
                manager.empty_pool(bytes);
                acquire()
            })
            .or_else(|error| {
                // What one KV cache only remembers does not go for blocks of another; what lies empty in it does.
                let freed = match self.kind() {
                    LeaseKind::Kv => manager.release_empty(self.id(), bytes, deadline),
                    _ => manager.release_cached(bytes, deadline),
                };
                if freed.is_zero() {
                    return Err(error);
                }
                manager.empty_pool(bytes);
                acquire()
            });
        let granted =
            granted.map_err(|source| MemoryError::Lease { region: self.name().to_owned(), source })?;
        Ok(Supply::new(Arc::clone(manager), granted))
    }

    pub(crate) fn resident(&self, mapping: Arc<Mapping>, lease: Grant) -> Resident {
        Resident { mapping, lease, region: Arc::clone(&self.inner.name) }
    }

    /// The page runs of the extents that lie wholly within `run`.
    pub(crate) fn extents_within(&self, run: PageRun) -> Vec<PageRun> {
        let state = self.inner.state.lock();
        let indices = state.table.extents_within(run).unwrap_or_default();
        indices
            .into_iter()
            .filter_map(|index| state.table.extent(index).ok())
            .map(|(extent, _)| extent.run())
            .collect()
    }

    /// The page runs of the extents wholly within `run` whose bytes lie only off the device.
    pub(crate) fn missing_within(&self, run: PageRun) -> Vec<PageRun> {
        let state = self.inner.state.lock();
        let indices = state.table.extents_within(run).unwrap_or_default();
        indices
            .into_iter()
            .filter_map(|index| state.table.extent(index).ok())
            .filter(|(_, residency)| !residency.valid().has(Tier::Device) && residency.under_way().is_none())
            .map(|(extent, _)| extent.run())
            .collect()
    }

    /// Drops host copies that a file holds too, from the last backwards, until `enough`. Call it in turn.
    pub(crate) fn drop_host_copies(&self, enough: impl Fn() -> bool) {
        let indices: Vec<_> = {
            let state = self.inner.state.lock();
            state.table.extents_by(state.table.order()).rev().map(|(index, ..)| index).collect()
        };
        for index in indices {
            if enough() {
                return;
            }
            let dropped = {
                let mut state = self.inner.state.lock();
                let Ok((extent, residency)) = state.table.extent(index) else { continue };
                let (from, to) = (extent.offset().0, (extent.offset() + extent.bytes()).0);
                // Unsealed: the files were compared when the bytes were staged, and nothing else was written.
                let in_source = residency.valid().has(Tier::Source)
                    || (!state.sealed
                        && !residency.valid().has(Tier::Device)
                        && state.sources.covers(from, to));
                let has_both = residency.valid().has(Tier::Host)
                    && residency.under_way().is_none()
                    && in_source
                    && state.table.add_copy(index, Tier::Source).is_ok();
                if has_both && state.table.remove_copy(index, Tier::Host).is_ok() {
                    state.slot(index).host.take()
                } else {
                    None
                }
            };
            drop(dropped);
        }
    }
}
