//! A wake under way: progress, what of it has arrived, cancelling, waiting with a deadline.
//!
//! Apart from [`crate::region`] because those who wait hold no region: a wake that nobody else wants any more goes on
//! to its end, and its outcome can still be asked for.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use shoal_core::bytes::ByteCount;
use shoal_core::extent::Extent;
use shoal_core::ids::TransferId;
use shoal_device::{Event, ForeignStream};

use crate::error::MemoryError;
use crate::region::{Region, RegionInner, Report};

/// How long after its deadline a wake may take to end what it has under way.
const END_WAIT: Duration = Duration::from_secs(10);

/// How far a transfer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: ByteCount,
    /// Bytes in all (known once the transfer has its lease).
    pub total: ByteCount,
    /// True when it has ended, in whatever way.
    pub is_finished: bool,
}

/// How far one extent of a wake is.
#[derive(Clone, Debug)]
enum Arrival {
    /// Its turn has not come.
    Awaited,
    /// Its copy is queued; the event stands for its last byte.
    Queued(Arc<Event>),
    /// Its bytes are there.
    There,
}

#[derive(Debug, Default)]
struct State {
    outcome: Option<Result<Report, MemoryError>>,
    /// What it brings: first byte of an extent -> byte after its last, and how far it is. Known once the wake has all
    /// of its device memory: from then on nothing but a copy can fail.
    arrivals: Option<BTreeMap<u64, (u64, Arrival)>>,
    /// A step runs beside it, on what has arrived: that is not taken away again.
    has_guests: bool,
}

/// What a wake says of a range.
enum Answer {
    /// All that it brings of the range is there once these events are complete.
    After(Vec<Arc<Event>>),
    /// Its turn has not come.
    NotYet,
    /// It brings nothing of the range, or has ended: look where the bytes are.
    Elsewhere,
}

impl State {
    fn answer(&self, from: u64, to: u64) -> Answer {
        if self.outcome.is_some() {
            return Answer::Elsewhere;
        }
        let Some(arrivals) = &self.arrivals else { return Answer::NotYet };
        let (mut events, mut is_touched) = (Vec::new(), false);
        for (_, (end, arrival)) in arrivals.range(..to) {
            if *end <= from {
                continue;
            }
            is_touched = true;
            match arrival {
                Arrival::Awaited => return Answer::NotYet,
                Arrival::Queued(event) => events.push(Arc::clone(event)),
                Arrival::There => {}
            }
        }
        if is_touched { Answer::After(events) } else { Answer::Elsewhere }
    }
}

/// What the thread that carries out a transfer and its watchers share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    /// More is missing than it has a lease for: something was evicted since it asked.
    is_short: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    pub(crate) fn set_total(&self, bytes: ByteCount) {
        self.total.store(bytes.0, Ordering::Relaxed);
    }

    pub(crate) fn set_short(&self) {
        self.is_short.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub(crate) fn cancelled(&self) -> MemoryError {
        let done = ByteCount(self.done.load(Ordering::Relaxed));
        MemoryError::Cancelled { done, total: ByteCount(self.total.load(Ordering::Relaxed)) }
    }

    /// The wake has its turn and all of its device memory: these extents will come, or its outcome says why not.
    pub(crate) fn begun(&self, queued: impl IntoIterator<Item = (Extent, Option<Arc<Event>>)>) {
        let span = |extent: Extent| (extent.offset().0, extent.offset().0 + extent.bytes().0);
        let arrivals = queued.into_iter().map(|(extent, event)| {
            let (from, to) = span(extent);
            (from, (to, event.map_or(Arrival::Awaited, Arrival::Queued)))
        });
        let arrivals = arrivals.collect();
        self.state.lock().arrivals = Some(arrivals);
        self.changed.notify_all();
    }

    pub(crate) fn queued(&self, extent: Extent, event: &Arc<Event>) {
        self.set_arrival(extent, Arrival::Queued(Arc::clone(event)));
    }

    pub(crate) fn arrived(&self, extent: Extent) {
        self.done.fetch_add(extent.bytes().0, Ordering::Relaxed);
        self.set_arrival(extent, Arrival::There);
    }

    fn set_arrival(&self, extent: Extent, arrival: Arrival) {
        let before = {
            let mut state = self.state.lock();
            let slot = state.arrivals.as_mut().and_then(|arrivals| arrivals.get_mut(&extent.offset().0));
            slot.map(|slot| std::mem::replace(&mut slot.1, arrival))
        };
        // Giving an event back is a call of the device, which no data lock is held across (I9).
        drop(before);
        self.changed.notify_all();
    }

    /// Nobody may step in any more. Whether a step runs beside it.
    pub(crate) fn close(&self) -> bool {
        let (arrivals, has_guests) = {
            let mut state = self.state.lock();
            (state.arrivals.take(), state.has_guests)
        };
        drop(arrivals);
        has_guests
    }

    pub(crate) fn finish(&self, outcome: Result<Report, MemoryError>) {
        let arrivals = {
            let mut state = self.state.lock();
            state.outcome = Some(outcome);
            state.arrivals.take()
        };
        drop(arrivals);
        self.changed.notify_all();
    }

    /// Waits until a step may run beside it (true) or it has ended, or will not bring everything (false). `None`: neither
    /// by the deadline.
    pub(crate) fn step_in(&self, deadline: Instant) -> Option<bool> {
        let mut state = self.state.lock();
        loop {
            if state.outcome.is_some() {
                return Some(false);
            }
            if state.arrivals.is_some() {
                let is_whole = !self.is_short.load(Ordering::Relaxed);
                state.has_guests |= is_whole;
                return Some(is_whole);
            }
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return None;
            }
        }
    }

    /// As [`step_in`](Self::step_in), for who only watches.
    pub(crate) fn is_backed_by(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        while state.outcome.is_none() && state.arrivals.is_none() {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        state.outcome.is_none() && state.arrivals.is_some() && !self.is_short.load(Ordering::Relaxed)
    }

    /// Waits until what of a range is on its way counts as being there, or the wake has ended. Returns at once where nothing
    /// of it is on its way, or some of it has not been queued.
    pub(crate) fn wait_counted(&self, from: u64, to: u64, deadline: Instant) {
        let mut state = self.state.lock();
        let mut was_queued = false;
        loop {
            match state.answer(from, to) {
                Answer::After(events) if !events.is_empty() => was_queued = true,
                // Queued before, and now nobody may step in: it is about to end.
                Answer::NotYet if was_queued => {}
                Answer::After(_) | Answer::NotYet | Answer::Elsewhere => return,
            }
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }

    /// Whether a step may run beside it at this moment.
    pub(crate) fn is_open(&self) -> bool {
        let state = self.state.lock();
        state.outcome.is_none() && state.arrivals.is_some() && !self.is_short.load(Ordering::Relaxed)
    }
}

/// A transfer under way. Dropping it stops nothing.
#[derive(Clone, Debug)]
pub struct Transfer {
    id: TransferId,
    region: Weak<RegionInner>,
    /// It brings all that is missing.
    is_whole: bool,
    shared: Arc<Shared>,
}

impl Transfer {
    pub(crate) const fn new(
        id: TransferId,
        region: Weak<RegionInner>,
        is_whole: bool,
        shared: Arc<Shared>,
    ) -> Self {
        Self { id, region, is_whole, shared }
    }

    pub(crate) const fn is_whole(&self) -> bool {
        self.is_whole
    }

    pub(crate) const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Its name.
    #[must_use]
    pub const fn id(&self) -> TransferId {
        self.id
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress {
            done: ByteCount(self.shared.done.load(Ordering::Relaxed)),
            total: ByteCount(self.shared.total.load(Ordering::Relaxed)),
            is_finished: self.shared.state.lock().outcome.is_some(),
        }
    }

    /// Asks it to stop before the next extent. What was brought back until then stays.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }

    /// Waits for its end, and calls `backed` once all of its memory is there, where it is not over by then.
    pub(crate) fn follow(&self, deadline: Instant, mut backed: impl FnMut()) -> Result<Report, MemoryError> {
        if self.shared.is_backed_by(deadline) {
            backed();
        }
        // It keeps its own deadline, which ends it; what it then still has under way takes a moment.
        self.wait(deadline.saturating_duration_since(Instant::now()) + END_WAIT)
    }

    /// Waits for its end, at most `timeout`.
    ///
    /// # Errors
    /// What the transfer failed with; [`MemoryError::Deadline`] if it has not ended (it goes on).
    pub fn wait(&self, timeout: Duration) -> Result<Report, MemoryError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.state.lock();
        loop {
            if let Some(outcome) = state.outcome.as_ref() {
                return outcome.clone();
            }
            if self.shared.changed.wait_until(&mut state, deadline).timed_out() && state.outcome.is_none() {
                return Err(MemoryError::Deadline { doing: "a wake", waited: timeout });
            }
        }
    }

    /// Waits until the copies of all that it brings of a range of its region are queued, at most `timeout`; before that
    /// there is nothing that a stream could wait for. After the wake has ended: until the range is there, at once.
    ///
    /// # Errors
    /// What the wake failed with, where the range is not on the device; [`MemoryError::State`] where it does not bring
    /// it, [`MemoryError::OutOfRange`], [`MemoryError::Deadline`].
    pub fn wait_host(
        &self,
        offset: ByteCount,
        bytes: ByteCount,
        timeout: Duration,
    ) -> Result<(), MemoryError> {
        self.events_of(offset, bytes, Instant::now() + timeout, timeout).map(drop)
    }

    /// Makes what is queued on `stream` from now on wait for a range of the region: first waits as
    /// [`wait_host`](Self::wait_host) does. Where streams of others do not exist (a simulated device), the caller's thread
    /// waits for the bytes.
    ///
    /// # Errors
    /// As [`wait_host`](Self::wait_host); [`MemoryError::Device`], also while a graph is captured on that stream.
    pub fn wait_stream(
        &self,
        offset: ByteCount,
        bytes: ByteCount,
        stream: ForeignStream,
        timeout: Duration,
    ) -> Result<(), MemoryError> {
        let deadline = Instant::now() + timeout;
        for event in self.events_of(offset, bytes, deadline, timeout)? {
            let is_ordered =
                event.foreign_wait(stream).map_err(MemoryError::device("make a stream wait for a copy"))?;
            if is_ordered {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !event.wait(left).map_err(MemoryError::device("copy to the device"))? {
                return Err(late(timeout));
            }
        }
        Ok(())
    }

    fn events_of(
        &self,
        offset: ByteCount,
        bytes: ByteCount,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<Vec<Arc<Event>>, MemoryError> {
        let (from, to) = (offset.0, offset.0.saturating_add(bytes.0));
        let mut state = self.shared.state.lock();
        loop {
            match state.answer(from, to) {
                Answer::After(events) => return Ok(events),
                Answer::Elsewhere => break,
                Answer::NotYet => {}
            }
            if self.shared.changed.wait_until(&mut state, deadline).timed_out()
                && matches!(state.answer(from, to), Answer::NotYet)
            {
                return Err(late(timeout));
            }
        }
        let error = state.outcome.as_ref().and_then(|outcome| outcome.as_ref().err().cloned());
        drop(state);
        let Some(inner) = self.region.upgrade() else { return Err(error.unwrap_or_else(gone)) };
        let region = Region { inner };
        region.check_range(offset, bytes)?;
        if region.is_there(offset, bytes) {
            return Ok(Vec::new());
        }
        let not_brought =
            || region.refuse("use a range of it", "this wake did not bring it, or it was evicted since");
        Err(error.unwrap_or_else(not_brought))
    }
}

fn late(waited: Duration) -> MemoryError {
    MemoryError::Deadline { doing: "a range's part of a wake", waited }
}

fn gone() -> MemoryError {
    MemoryError::State { region: String::new(), doing: "use a range of it", why: "the region is gone" }
}
