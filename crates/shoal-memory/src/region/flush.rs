//! Freezing: the checksums are recorded at once, the bytes copied to the host in the background, so that the first sleep
//! copies nothing.
//!
//! Apart because it takes nothing away and may stop anywhere. The copy goes on beside steps, a chunk at a time, each in turn
//! and only while nobody else wants the turn: stores yield to loads, and to all else. Steps may write meanwhile. So a copy
//! counts only when the hash of what arrived is the one recorded of the device (I8); whatever is written after that is
//! found by the comparison before an eviction (I6). One region is copied at a time, so that at most one extent's host
//! memory is taken by a copy that is not whole yet; whoever needs that memory takes it ([`Region::drop_unfinished`]).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use shoal_core::bytes::ByteCount;
use shoal_core::extent::Extent;
use shoal_core::ids::ExtentIndex;
use shoal_core::residency::TierSet;
use shoal_core::tier::Tier;
use shoal_device::{DeviceError, Event, Hasher, HostBuffer, Mapping, Span};

use super::{Region, RegionInner, SealReport};
use crate::arena::Filled;
use crate::error::MemoryError;
use crate::transfer::Progress;
use crate::turn::{Taken, Turn};

/// Copied and hashed at a time.
const CHUNK_BYTES: ByteCount = ByteCount::mib(8);
/// Chunks queued at once: one is copied while the one before it is hashed.
const CHUNKS_FLYING: usize = 2;
/// How often an extent is copied that is written meanwhile.
const ATTEMPTS_MAX: u32 = 2;
/// How long it waits for another freeze before it looks whether its own is still wanted.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What became of a freeze.
#[derive(Clone, Debug, Default)]
pub struct FlushReport {
    /// What was sealed.
    pub sealed: SealReport,
    /// Bytes copied to the host that count from now on.
    pub copied: ByteCount,
    /// Bytes that still have no copy but the device's: an eviction copies them.
    pub dirty: ByteCount,
    /// How long it took from the sealing on.
    pub duration: Duration,
    /// Why bytes stayed dirty: [`MemoryError::HostBudget`]. Without it they are being written.
    pub error: Option<Box<MemoryError>>,
}

#[derive(Debug, Default)]
struct Shared {
    done: AtomicU64,
    total: AtomicU64,
    is_cancelled: AtomicBool,
    outcome: Mutex<Option<Result<FlushReport, MemoryError>>>,
    changed: Condvar,
}

/// The background part of a freeze. Dropping it stops nothing.
#[derive(Clone, Debug)]
pub struct Flush {
    sealed: SealReport,
    shared: Arc<Shared>,
}

impl Flush {
    /// What was sealed before it began.
    #[must_use]
    pub const fn sealed(&self) -> SealReport {
        self.sealed
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress {
            done: ByteCount(self.shared.done.load(Ordering::Relaxed)),
            total: ByteCount(self.shared.total.load(Ordering::Relaxed)),
            is_finished: self.shared.outcome.lock().is_some(),
        }
    }

    /// Asks it to stop before the next chunk. What was copied until then counts.
    pub fn cancel(&self) {
        self.shared.is_cancelled.store(true, Ordering::Relaxed);
    }

    /// Waits for its end, at most `timeout`.
    ///
    /// # Errors
    /// [`MemoryError::Device`], [`MemoryError::Cancelled`]: what was copied before counts, all else stays dirty and is
    /// where it was. [`MemoryError::Deadline`] if it has not ended (it goes on). A host budget that is too small is no
    /// error: see the report.
    pub fn wait(&self, timeout: Duration) -> Result<FlushReport, MemoryError> {
        let deadline = Instant::now() + timeout;
        let mut outcome = self.shared.outcome.lock();
        loop {
            if let Some(outcome) = outcome.as_ref() {
                return outcome.clone();
            }
            if self.shared.changed.wait_until(&mut outcome, deadline).timed_out() && outcome.is_none() {
                return Err(MemoryError::Deadline { doing: "a copy in the background", waited: timeout });
            }
        }
    }
}

/// How a chunk's worth of work ended.
enum Pace {
    /// There is more to do.
    More,
    /// All is done.
    Done,
}

/// The extent that is being copied. Its host memory is its slot's.
struct Current {
    index: ExtentIndex,
    extent: Extent,
    hasher: Hasher,
    queued: ByteCount,
    hashed: ByteCount,
    attempts: u32,
}

impl Current {
    fn new(index: ExtentIndex, extent: Extent, attempts: u32) -> Self {
        let (queued, hashed) = (ByteCount::ZERO, ByteCount::ZERO);
        Self { index, extent, hasher: Hasher::new(), queued, hashed, attempts }
    }
}

struct Worker {
    region: Weak<RegionInner>,
    turn: Arc<Turn>,
    flushing: Arc<Turn>,
    turn_wait: Duration,
    shared: Arc<Shared>,
    left: VecDeque<(ExtentIndex, Extent)>,
    current: Option<Current>,
    report: FlushReport,
}

impl Region {
    /// Declares that all bytes are in place ([`seal`](Self::seal), also of what came since it was sealed) and begins to
    /// copy what lies only on the device to the host, in the background: once that has ended, a sleep only unmaps. Waits at
    /// most `timeout` for what is queued on the device before it seals. What finds no room within the host budget stays as
    /// it is, and no copy of another extent is dropped for it.
    ///
    /// # Errors
    /// [`MemoryError::State`] while somebody fills it, [`MemoryError::Deadline`], [`MemoryError::TooManyTransfers`], and
    /// what sealing fails with. Where the copying cannot begin the region is sealed all the same.
    pub fn freeze(&self, timeout: Duration) -> Result<Flush, MemoryError> {
        if self.is_in_use() {
            return Err(self.refuse("freeze", "somebody fills it right now (use_region)"));
        }
        self.manager().fence(Instant::now() + timeout)?;
        let sealed = self.seal_more()?;
        self.flush(sealed)
    }

    /// Begins the part in the background.
    pub(crate) fn flush(&self, sealed: SealReport) -> Result<Flush, MemoryError> {
        let manager = Arc::clone(self.manager());
        let left: VecDeque<_> = self.inner.state.lock().table.plan_flush().into();
        let shared = Arc::new(Shared::default());
        let flush = Flush { sealed, shared: Arc::clone(&shared) };
        let total: ByteCount = left.iter().map(|(_, extent)| extent.bytes()).sum();
        shared.total.store(total.0, Ordering::Relaxed);
        let report = FlushReport { sealed, ..FlushReport::default() };
        if left.is_empty() {
            *shared.outcome.lock() = Some(Ok(report));
            return Ok(flush);
        }
        manager.claim_transfer()?;
        manager.arena.expect(total);
        let worker = Worker {
            region: Arc::downgrade(&self.inner),
            turn: Arc::clone(manager.turn()),
            flushing: Arc::clone(manager.flushing()),
            turn_wait: manager.options.operation_wait,
            shared,
            left,
            current: None,
            report,
        };
        let counted = Arc::downgrade(&manager);
        let work = move || {
            let shared = Arc::clone(&worker.shared);
            let outcome = worker.run();
            if let Some(manager) = counted.upgrade() {
                manager.transfers.fetch_sub(1, Ordering::Relaxed);
            }
            *shared.outcome.lock() = Some(outcome);
            shared.changed.notify_all();
        };
        if thread::Builder::new().name("shoal-freeze".to_owned()).spawn(work).is_err() {
            manager.transfers.fetch_sub(1, Ordering::Relaxed);
            return Err(self.refuse("copy it in the background", "no thread can be started"));
        }
        Ok(flush)
    }

    /// Gives up the host memory of a copy in the background that is not whole. Call it in turn: then nothing touches it.
    pub(crate) fn drop_unfinished(&self) {
        let dropped: Vec<_> = {
            let mut state = self.inner.state.lock();
            state.slots.values_mut().filter_map(|slot| slot.unfinished.take()).collect()
        };
        drop(dropped);
    }
}

impl Worker {
    fn run(mut self) -> Result<FlushReport, MemoryError> {
        let start = Instant::now();
        // Held until what is not whole is gone: the next flush may begin with the same extent.
        let (outcome, _flushing) = match self.take_flushing() {
            Ok(flushing) => (self.run_to_end(), Some(flushing)),
            Err(error) => (Err(error), None),
        };
        if let (Some(current), Some(inner)) = (self.current.take(), self.region.upgrade()) {
            // Not in turn, but nothing of ours touches it between two chunks.
            let unfinished = inner.state.lock().slot(current.index).unfinished.take();
            drop(unfinished);
        }
        let mut report = self.report;
        report.duration = start.elapsed();
        tracing::debug!(copied = %report.copied, dirty = %report.dirty, "copied in the background");
        outcome.map(|()| report)
    }

    fn take_flushing(&self) -> Result<Taken, MemoryError> {
        loop {
            self.check_cancelled()?;
            if let Some(flushing) = self.flushing.take(Instant::now() + LOOK_AGAIN) {
                return Ok(flushing);
            }
        }
    }

    fn run_to_end(&mut self) -> Result<(), MemoryError> {
        loop {
            self.check_cancelled()?;
            let Some(taken) = self.turn.take(Instant::now() + self.turn_wait) else {
                let doing = "waiting for another operation";
                return Err(MemoryError::Deadline { doing, waited: self.turn_wait });
            };
            let Some(inner) = self.region.upgrade() else { return Ok(()) };
            let region = Region { inner };
            let pace = self.work(&region, &taken);
            // The last holder of a region frees its memory, which waits for kernels.
            drop(taken);
            drop(region);
            match pace? {
                Pace::More => {}
                Pace::Done => return Ok(()),
            }
        }
    }

    fn check_cancelled(&self) -> Result<(), MemoryError> {
        if !self.shared.is_cancelled.load(Ordering::Relaxed) {
            return Ok(());
        }
        let done = ByteCount(self.shared.done.load(Ordering::Relaxed));
        Err(MemoryError::Cancelled { done, total: ByteCount(self.shared.total.load(Ordering::Relaxed)) })
    }

    /// Goes on in turn until somebody else wants the turn.
    fn work(&mut self, region: &Region, taken: &Taken) -> Result<Pace, MemoryError> {
        loop {
            if self.current.is_none() && !self.begin(region)? {
                return Ok(Pace::Done);
            }
            let Some(mut current) = self.current.take() else { continue };
            match self.copy(region, taken, &mut current) {
                Ok(true) => self.end(region, current)?,
                Ok(false) => {
                    self.current = Some(current);
                    return Ok(Pace::More);
                }
                Err(error) => {
                    // A chunk may still be on its way into that memory (I5).
                    region.manager().settle();
                    region.drop_unfinished();
                    return Err(error);
                }
            }
            if taken.is_wanted() || self.check_cancelled().is_err() {
                return Ok(Pace::More);
            }
        }
    }

    /// Finds the next extent that lies only on the device and host memory for it. False: there is none.
    fn begin(&mut self, region: &Region) -> Result<bool, MemoryError> {
        let manager = region.manager();
        while let Some((index, extent)) = self.left.pop_front() {
            if !is_dirty(region, index, extent) {
                self.count(extent);
                continue;
            }
            match manager.arena.allocate(extent.bytes(), Filled::ByDevice) {
                Ok(copy) => {
                    region.inner.state.lock().slot(index).unfinished = Some(copy);
                    self.current = Some(Current::new(index, extent, 1));
                    return Ok(true);
                }
                Err(error @ MemoryError::HostBudget { .. }) => {
                    self.report.dirty += extent.bytes();
                    self.report.error.get_or_insert_with(|| Box::new(error));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Copies and hashes the extent, chunk by chunk. False: somebody wants the turn; nothing is on its way then.
    fn copy(&self, region: &Region, taken: &Taken, current: &mut Current) -> Result<bool, MemoryError> {
        let Some((mapping, buffer)) = ends_of(region, current.index) else {
            // It left the device, or others took its host memory: `end` finds out which.
            return Ok(true);
        };
        let manager = region.manager();
        let wait = manager.options.operation_wait;
        let mut flying: VecDeque<(ByteCount, ByteCount, Event)> = VecDeque::new();
        // One chunk goes whoever waits, so that it ends one day.
        let start = current.queued;
        let may_go_on = || !taken.is_wanted() && self.check_cancelled().is_ok();
        while current.hashed < current.extent.bytes() {
            while flying.len() < CHUNKS_FLYING
                && current.queued < current.extent.bytes()
                && (current.queued == start || may_go_on())
            {
                let (offset, bytes) =
                    (current.queued, CHUNK_BYTES.min(current.extent.bytes() - current.queued));
                let source = Span::Device { mapping: Arc::clone(&mapping), offset, bytes };
                let event = manager
                    .down
                    .copy(source, Span::host(&buffer, offset, bytes))
                    .and_then(|()| manager.down.record())
                    .map_err(MemoryError::device("copy to the host"))?;
                current.queued += bytes;
                flying.push_back((offset, bytes, event));
            }
            let Some((offset, bytes, event)) = flying.pop_front() else { return Ok(false) };
            if !event.wait(wait).map_err(MemoryError::device("copy to the host"))? {
                let source = DeviceError::Timeout { what: "a copy", waited: wait };
                return Err(MemoryError::Device { doing: "copy to the host", source });
            }
            buffer
                .access(offset, bytes, |bytes| current.hasher.update(bytes))
                .map_err(MemoryError::device("read host memory"))?;
            current.hashed += bytes;
        }
        Ok(true)
    }

    /// Lets the copy count if it is what the device holds, by what is recorded of it.
    fn end(&mut self, region: &Region, current: Current) -> Result<(), MemoryError> {
        let Current { index, extent, hasher, hashed, attempts, .. } = current;
        if !is_dirty(region, index, extent) {
            region.drop_unfinished();
            self.count(extent);
            return Ok(());
        }
        if region.inner.state.lock().slot(index).unfinished.is_none() {
            // Somebody needed the memory more.
            let manager = region.manager();
            let (free, budget) = (manager.arena.free(), manager.options.host_budget);
            let error = MemoryError::HostBudget { needed: extent.bytes(), free, budget };
            self.report.dirty += extent.bytes();
            self.report.error.get_or_insert_with(|| Box::new(error));
            return Ok(());
        }
        let found = hasher.finish();
        let is_whole = hashed == extent.bytes();
        if is_whole && (is_recorded(region, index, found) || rehash(region, index)? == Some(found)) {
            let mut state = region.inner.state.lock();
            let slot = state.slot(index);
            slot.hash = Some(found);
            slot.host = slot.unfinished.take();
            state.table.add_copy(index, Tier::Host).map_err(region.table_error())?;
            drop(state);
            self.report.copied += extent.bytes();
            self.count(extent);
        } else if attempts < ATTEMPTS_MAX {
            self.current = Some(Current::new(index, extent, attempts + 1));
        } else {
            tracing::info!(region = region.name(), %index, "written while it was copied");
            region.drop_unfinished();
            self.report.dirty += extent.bytes();
        }
        Ok(())
    }

    fn count(&self, extent: Extent) {
        self.shared.done.fetch_add(extent.bytes().0, Ordering::Relaxed);
    }
}

/// Whether the extent is still the one that was planned and lies only on the device.
fn is_dirty(region: &Region, index: ExtentIndex, extent: Extent) -> bool {
    region.inner.state.lock().table.extent(index).is_ok_and(|(now, residency)| {
        now == extent && residency.valid() == TierSet::of(Tier::Device) && residency.under_way().is_none()
    })
}

fn is_recorded(region: &Region, index: ExtentIndex, hash: u64) -> bool {
    region.inner.state.lock().slot(index).hash == Some(hash)
}

/// The memory that an extent is copied from and to.
fn ends_of(region: &Region, index: ExtentIndex) -> Option<(Arc<Mapping>, Arc<HostBuffer>)> {
    let state = region.inner.state.lock();
    let buffer = state.slots.get(&index)?.unfinished.as_ref()?.buffer();
    Some((state.mapping(index)?, buffer))
}

/// The hash of what the device holds now: it was written between the sealing and the copy, or while it was copied.
fn rehash(region: &Region, index: ExtentIndex) -> Result<Option<u64>, MemoryError> {
    let mapping = region.inner.state.lock().mapping(index);
    let Some(mapping) = mapping else { return Ok(None) };
    let manager = region.manager();
    let hash = manager
        .down
        .hash(Span::mapping(&mapping))
        .and_then(|ticket| ticket.wait(manager.options.operation_wait))
        .map_err(MemoryError::device("hash device memory"));
    if hash.is_err() {
        region.drop_unfinished();
    }
    hash.map(Some)
}
