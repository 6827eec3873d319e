//! [`Segments`]: a region that grows by what torch's allocator asks for.
//!
//! torch asks for *segments* (its word: what it cuts its blocks from) and gives them back long after. They are carved one
//! after another from one range of addresses, and extents span them: memory is committed in few long extents, some of it
//! ahead of need, because the driver's price is per extent. A segment that is given back is *retired*: its addresses and
//! its memory are used again only after the work that was queued on its stream (I5). Giving back never waits: where that
//! work still runs, a thread of ours waits for it.
//!
//! Callers are torch's allocator hooks: they hold torch's lock and perhaps the GIL. So nothing here waits for a thread
//! that may want either: running steps (guards) are never waited for, and every other wait is for our own threads or for
//! the device, and has a deadline.

mod ranges;
mod room;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::extent::{ExtentRule, PageRun};
use shoal_core::page_table::Backing;
use shoal_core::protocol::LeaseKind;
use shoal_device::device::{ForeignStream, ForeignWork};
use shoal_device::{DeviceError, Event, VirtAddr};

use crate::error::MemoryError;
use crate::manager::MemoryManager;
use crate::region::{Flush, Region, RegionSpec};
use ranges::Ranges;

/// Addresses are cheap: room for holes between segments that live long.
const RESERVED_PER_CAPACITY: u64 = 2;
/// How long an allocation that is short of memory waits for work on what torch gave back.
const FREE_WAIT: Duration = Duration::from_secs(1);
/// How long the thread that frees what is retired waits at a time.
const REAP_WAIT: Duration = Duration::from_millis(50);
/// How often a freeze looks whether another thread is done with what it frees.
const IN_HAND_NAP: Duration = Duration::from_micros(200);

/// What a region of segments holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentsUsage {
    /// Segments that torch has.
    pub segments: usize,
    /// Their bytes.
    pub segment_bytes: ByteCount,
    /// Of these, bytes of segments in which nothing lived when the region was frozen, or that were discarded: they have no
    /// memory any more.
    pub dropped: ByteCount,
    /// Bytes given back whose last work may still run.
    pub retired: ByteCount,
    /// Bytes of all extents, on whatever tier.
    pub committed: ByteCount,
    /// Allocations so far.
    pub allocations: u64,
    /// Segments given back so far.
    pub frees: u64,
    /// Allocations that could not be had.
    pub refusals: u64,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    bytes: ByteCount,
    /// Tells it from whatever has the same addresses before or after it.
    serial: u64,
    /// Nothing lived in it when the region was frozen: torch still has it in its books, but its memory is gone.
    is_dropped: bool,
    /// torch gave it back; its addresses stay taken until its last work is done.
    is_retired: bool,
}

/// A segment that torch gave back, or will never use again, until its last work is done.
#[derive(Debug)]
struct Retired {
    offset: u64,
    serial: u64,
    /// torch still has it in its books: only its memory goes.
    keeps_addresses: bool,
    /// What its users had queued, each until it is done.
    fences: Vec<Fence>,
}

#[derive(Debug)]
struct Fence {
    work: ForeignWork,
    /// Where none could be recorded (a capture was under way there), it is later, which is never too early.
    event: Option<Event>,
}

#[derive(Debug, Default)]
struct State {
    /// Segments by offset, and which addresses below the frontier are free.
    ranges: Ranges<Segment>,
    retired: Vec<Retired>,
    /// Segments are gone whose memory is still there: somebody else had the turn.
    is_unreleased: bool,
    /// What some thread is freeing at this moment.
    in_hand: usize,
    /// A thread frees what is retired.
    is_reaped: bool,
    /// Every stream that a segment was asked for on.
    streams: BTreeSet<ForeignStream>,
    /// Segments so far.
    serials: u64,
}

impl MemoryManager {
    /// Frees what torch gave back, as soon as its last work is done, within bounds. Whether something was freed. Hold
    /// neither turn nor data lock.
    pub(crate) fn free_segments(&self, wait: Duration) -> bool {
        let growing: Vec<_> = self.growing.lock().iter().filter_map(Weak::upgrade).collect();
        let deadline = Instant::now() + wait.min(FREE_WAIT);
        let mut any = false;
        for segments in growing {
            let leftovers = || segments.state.lock().leftovers();
            let before = leftovers();
            while leftovers() > 0 && Instant::now() < deadline {
                segments.sweep(deadline.saturating_duration_since(Instant::now()).min(REAP_WAIT));
                if leftovers() > 0 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            any |= leftovers() < before;
        }
        any
    }
}

impl State {
    /// Whether something waits to be freed.
    const fn has_leftovers(&self) -> bool {
        self.leftovers() > 0
    }

    const fn leftovers(&self) -> usize {
        self.retired.len() + self.is_unreleased as usize + self.in_hand
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Segments {
    itself: Weak<Self>,
    region: Region,
    state: Mutex<State>,
    last_error: Mutex<Option<MemoryError>>,
    allocations: AtomicU64,
    frees: AtomicU64,
    refusals: AtomicU64,
}

impl Segments {
    /// A growing region: addresses for twice the device's memory, and no memory yet.
    ///
    /// # Errors
    /// [`MemoryError::Device`] if the addresses cannot be had.
    pub fn new(
        manager: &Arc<MemoryManager>,
        name: String,
        kind: LeaseKind,
        backing: Backing,
    ) -> Result<Arc<Self>, MemoryError> {
        let capacity = manager.device().info().capacity;
        let bytes = ByteCount(capacity.0 * RESERVED_PER_CAPACITY).round_up_to(PAGE_BYTES);
        let spec = RegionSpec { name, bytes, kind, extent_rule: ExtentRule::default(), backing };
        let region = manager.growing_region(spec)?;
        let made = Arc::new_cyclic(|itself| Self {
            itself: Weak::clone(itself),
            region,
            state: Mutex::default(),
            last_error: Mutex::default(),
            allocations: AtomicU64::new(0),
            frees: AtomicU64::new(0),
            refusals: AtomicU64::new(0),
        });
        let mut growing = manager.growing.lock();
        growing.retain(|segments| segments.strong_count() > 0);
        growing.push(Arc::downgrade(&made));
        drop(growing);
        Ok(made)
    }

    /// The region behind the segments.
    #[must_use]
    pub const fn region(&self) -> &Region {
        &self.region
    }

    /// A segment of at least `bytes`, with memory behind all of it. `stream` is the one it is asked for on: what is freed
    /// is used again only after the work of every such stream. Where memory is short, what was
    /// given back is waited for, then the manager's other regions that may yield give up theirs, unless a graph is captured
    /// on one of these streams: marking all work, which that takes, would end the capture.
    ///
    /// # Errors
    /// [`MemoryError::Lease`], [`MemoryError::Device`], [`MemoryError::State`] while the region is asleep; kept for
    /// [`last_error`](Self::last_error). Nothing is changed then.
    pub fn allocate(&self, bytes: ByteCount, stream: Option<ForeignStream>) -> Result<VirtAddr, MemoryError> {
        if let Some(stream) = stream {
            self.state.lock().streams.insert(stream);
            self.region.note_stream(stream);
        }
        let bytes = bytes.max(ByteCount(1)).round_up_to(PAGE_BYTES);
        self.sweep(Duration::ZERO);
        match self.carve_backed(bytes) {
            Ok(offset) => {
                self.allocations.fetch_add(1, Ordering::Relaxed);
                Ok(VirtAddr(self.region.address() + offset))
            }
            Err(error) => {
                self.refusals.fetch_add(1, Ordering::Relaxed);
                tracing::info!(region = self.region.name(), %bytes, %error, "no segment");
                *self.last_error.lock() = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Gives a segment back, without waiting for anything. What was queued on `stream`, and on every stream that segments
    /// were asked for on, may still use it; without one, what was queued on any. Until that is done it is retired.
    ///
    /// # Errors
    /// [`MemoryError::State`] for an address that is no segment's: nothing is changed (I7).
    pub fn free(&self, at: VirtAddr, stream: Option<ForeignStream>) -> Result<(), MemoryError> {
        let offset = at.0.wrapping_sub(self.region.address());
        let found = {
            let mut state = self.state.lock();
            let segment = state.ranges.get_mut(offset).filter(|segment| !segment.is_retired);
            segment.map(|segment| {
                segment.is_retired = true;
                segment.serial
            })
        };
        let Some(serial) = found else {
            let error = self.region.refuse("free a segment", "no segment starts there");
            self.set_last_error(error.clone());
            return Err(error);
        };
        self.frees.fetch_add(1, Ordering::Relaxed);
        let streams = stream.map(|stream| {
            let mut streams = self.state.lock().streams.clone();
            streams.insert(stream);
            streams
        });
        let fences = self.mark(streams);
        self.state.lock().retired.push(Retired { offset, serial, keeps_addresses: false, fences });
        self.sweep(Duration::ZERO);
        Ok(())
    }

    /// Takes the memory of segments that torch still has in its books, but in which nothing lives and which it will hand
    /// nothing out of any more, once all that is queued on the device now is done: a graph is replayed on streams that
    /// never asked for memory. Waits for nothing. Addresses that are no segment's are passed over: torch may have given
    /// it back meanwhile.
    pub fn discard(&self, dead: &[VirtAddr]) {
        for at in dead {
            let offset = at.0.wrapping_sub(self.region.address());
            let found = {
                let mut state = self.state.lock();
                let segment = state.ranges.get_mut(offset).filter(|one| !one.is_retired && !one.is_dropped);
                segment.map(|segment| segment.serial)
            };
            if let Some(serial) = found {
                let fences = self.mark(None);
                self.state.lock().retired.push(Retired { offset, serial, keeps_addresses: true, fences });
            }
        }
        self.sweep(Duration::ZERO);
    }

    /// Marks what is queued now on these streams; without any, on all.
    fn mark(&self, streams: Option<BTreeSet<ForeignStream>>) -> Vec<Fence> {
        let fence = |work| Fence { work, event: self.event_of(work) };
        match streams {
            None => vec![fence(ForeignWork::All)],
            Some(streams) => streams.into_iter().map(ForeignWork::Of).map(fence).collect(),
        }
    }

    /// Whether an address lies in the region.
    #[must_use]
    pub fn contains(&self, at: VirtAddr) -> bool {
        at.0.checked_sub(self.region.address()).is_some_and(|offset| offset < self.region.bytes().0)
    }

    /// Whether torch has no segment of it any more; some may still be retired.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state.lock().ranges.iter().all(|(_, segment)| segment.is_retired)
    }

    /// Says that all bytes are in place: segments in which nothing lives lose their memory, memory that was committed
    /// ahead goes back, and the rest is as [`Region::freeze`] says. Freezing again takes in what came since.
    ///
    /// # Errors
    /// [`MemoryError::State`] while it is asleep, [`MemoryError::Deadline`] if work queued before does not end,
    /// [`MemoryError::Device`]. Bytes that live are never touched.
    pub fn freeze(&self, dead: &[VirtAddr], timeout: Duration) -> Result<Flush, MemoryError> {
        let manager = self.region.manager();
        let deadline = Instant::now() + timeout;
        if self.region.is_in_use() {
            return Err(self.region.refuse("freeze", "somebody fills it right now (use_region)"));
        }
        if !self.region.missing_bytes().is_zero() {
            return Err(self.region.refuse("freeze", "it is asleep; wake it first"));
        }
        manager.fence(deadline)?;
        {
            let mut state = self.state.lock();
            for at in dead {
                if let Some(segment) = state.ranges.get_mut(at.0.wrapping_sub(self.region.address())) {
                    segment.is_dropped = true;
                }
            }
        }
        self.sweep_all(deadline);
        self.release_unused(deadline)?;
        // What it has too much is for others.
        manager.trim_pool(ByteCount(u64::MAX))?;
        let sealed = self.region.seal_more()?;
        self.region.flush(sealed)
    }

    /// What went wrong most lately.
    #[must_use]
    pub fn last_error(&self) -> Option<MemoryError> {
        self.last_error.lock().clone()
    }

    /// Keeps an error that has no other way to a person.
    pub fn set_last_error(&self, error: MemoryError) {
        *self.last_error.lock() = Some(error);
    }

    /// What it holds.
    #[must_use]
    pub fn usage(&self) -> SegmentsUsage {
        self.sweep(Duration::ZERO);
        let state = self.state.lock();
        let mut usage = SegmentsUsage {
            allocations: self.allocations.load(Ordering::Relaxed),
            frees: self.frees.load(Ordering::Relaxed),
            refusals: self.refusals.load(Ordering::Relaxed),
            ..SegmentsUsage::default()
        };
        for (_, segment) in state.ranges.iter() {
            if segment.is_retired {
                usage.retired += segment.bytes;
                continue;
            }
            usage.segments += 1;
            usage.segment_bytes += segment.bytes;
            if segment.is_dropped {
                usage.dropped += segment.bytes;
            }
        }
        drop(state);
        usage.committed = self.region.usage().total;
        usage
    }

    /// Says what is wrong, if anything is.
    ///
    /// # Errors
    /// A sentence that names the first contradiction.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.region.check_invariants()?;
        let state = self.state.lock();
        state.ranges.check()?;
        for (offset, segment) in state.ranges.iter() {
            let run = PageRun::covering(ByteCount(offset), segment.bytes);
            let bare = self.region.uncommitted(&[run]).map_err(|error| error.to_string())?;
            if !segment.is_dropped && !segment.is_retired && !bare.is_zero() {
                return Err(format!("{bare} of the segment at {offset:#x} have no bytes"));
            }
        }
        Ok(())
    }

    /// Frees what is retired and no longer used; waits at most `wait` for it, and as long again for the turn.
    fn sweep(&self, wait: Duration) {
        let (retired, was_unreleased, in_hand) = {
            let mut state = self.state.lock();
            let in_hand = state.retired.len() + usize::from(state.is_unreleased);
            state.in_hand += in_hand;
            (std::mem::take(&mut state.retired), std::mem::take(&mut state.is_unreleased), in_hand)
        };
        if retired.is_empty() && !was_unreleased {
            return;
        }
        let deadline = Instant::now() + wait;
        let (mut done, mut later) = (Vec::new(), Vec::new());
        for mut one in retired {
            one.fences.retain_mut(|fence| !self.is_done(fence, deadline));
            if one.fences.is_empty() { done.push(one) } else { later.push(one) }
        }
        let any = was_unreleased || !done.is_empty();
        {
            let mut state = self.state.lock();
            for one in done {
                // What has the addresses now may be another, where torch gave back what was discarded here.
                match state.ranges.get_mut(one.offset).filter(|segment| segment.serial == one.serial) {
                    Some(segment) if one.keeps_addresses => segment.is_dropped = true,
                    Some(_) => drop(state.ranges.remove(one.offset)),
                    None => {}
                }
            }
            state.retired.extend(later);
        }
        let released = if any { self.release_unused(Instant::now() + wait) } else { Ok(()) };
        {
            let mut state = self.state.lock();
            state.in_hand -= in_hand;
            if let Err(error) = released {
                tracing::debug!(%error, "memory of freed segments stays for now");
                state.is_unreleased = true;
            }
        }
        self.reap_later();
    }

    /// Frees all that is retired, also what another thread has in hand, which would be sealed otherwise; by a deadline.
    fn sweep_all(&self, deadline: Instant) {
        loop {
            self.sweep(deadline.saturating_duration_since(Instant::now()));
            let is_done = {
                let state = self.state.lock();
                state.in_hand == 0 && state.retired.is_empty()
            };
            if is_done || Instant::now() >= deadline {
                return;
            }
            thread::sleep(IN_HAND_NAP);
        }
    }

    /// Lets a thread free what could not be freed at once: torch holds its lock here, and waits for nothing.
    fn reap_later(&self) {
        {
            let mut state = self.state.lock();
            if state.is_reaped || !state.has_leftovers() {
                return;
            }
            state.is_reaped = true;
        }
        let itself = Weak::clone(&self.itself);
        let reap = move || {
            while let Some(segments) = itself.upgrade() {
                segments.sweep(REAP_WAIT);
                {
                    let mut state = segments.state.lock();
                    state.is_reaped = state.has_leftovers();
                    if !state.is_reaped {
                        return;
                    }
                }
                drop(segments);
                thread::sleep(REAP_WAIT / 10);
            }
        };
        if thread::Builder::new().name("shoal-retire".to_owned()).spawn(reap).is_err() {
            // Then whatever torch does next frees it.
            self.state.lock().is_reaped = false;
        }
    }

    /// None while a capture is in the way: marking all work would end one.
    fn event_of(&self, work: ForeignWork) -> Option<Event> {
        let manager = self.region.manager();
        if work == ForeignWork::All {
            manager.check_not_capturing().ok()?;
        }
        Event::of_foreign(manager.device(), work).ok()
    }

    /// Whether what a fence stands for is over; waits for it until `deadline`.
    fn is_done(&self, fence: &mut Fence, deadline: Instant) -> bool {
        if fence.event.is_none() {
            fence.event = self.event_of(fence.work);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = fence.event.as_ref().map_or(Ok(false), |event| event.wait(left));
        waited.unwrap_or_else(|source| {
            // A device that fails has nothing that could still be spoilt, but who knows: it stays taken.
            self.set_last_error(MemoryError::Device { doing: "fence a segment", source });
            false
        })
    }

    /// Whether a graph is being captured on a stream that a segment was asked for on.
    fn is_capturing(&self) -> bool {
        let streams = self.state.lock().streams.clone();
        let device = self.region.manager().device();
        streams.into_iter().any(|stream| {
            let marked = Event::of_foreign(device, ForeignWork::Of(stream));
            matches!(marked, Err(DeviceError::Capturing { .. }))
        })
    }

    /// Takes the memory of every extent in which no segment lies; the next segments may have it.
    fn release_unused(&self, deadline: Instant) -> Result<(), MemoryError> {
        let manager = self.region.manager();
        let _turn = manager.take_turn_only(deadline)?;
        if self.region.is_held() {
            return Err(self.region.refuse("free memory", "somebody copies to or from it"));
        }
        // In turn: a segment that is carved from here on commits what it needs after us.
        let taken: Vec<PageRun> = {
            let state = self.state.lock();
            let kept = state.ranges.iter().filter(|(_, segment)| !segment.is_dropped);
            kept.map(|(offset, segment)| PageRun::covering(ByteCount(offset), segment.bytes)).collect()
        };
        let mut from = 0;
        for run in taken.into_iter().chain([PageRun { first: self.region.bytes().pages(), count: 0 }]) {
            if run.first > from {
                let run = PageRun { first: from, count: run.first - from };
                // torch waits for nothing here, and wants no zeroes.
                self.region.decommit_to_pool(run, false)?;
            }
            from = run.end();
        }
        Ok(())
    }
}
