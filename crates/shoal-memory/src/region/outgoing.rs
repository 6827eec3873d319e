//! Extents on their way off the device: copies to the host run while those before give their memory up.
//!
//! Apart because a swap drives it hand in hand with [`super::incoming`]: what leaves makes room for what comes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::ids::ExtentIndex;
use shoal_core::page_table::PlannedMove;
use shoal_core::residency::Move;
use shoal_core::tier::Tier;
use shoal_device::{DeviceError, Event, Span};

use super::Region;
use super::checks::{Checked, Checks};
use super::incoming::{IN_FLIGHT_BYTES, IN_FLIGHT_MAX};
use super::owned::reusable;
use crate::arena::{Filled, HostCopy};
use crate::error::MemoryError;
use crate::retire::Resident;

#[derive(Debug)]
struct Entry {
    planned: PlannedMove,
    copy: HostCopy,
    event: Event,
}

/// What became of the next extent.
#[derive(Debug)]
pub(crate) enum Started {
    /// Its memory is free at once.
    Free(Resident),
    /// Its copy is queued.
    Queued,
    /// The host has no room for its copy now.
    NoRoom(ByteCount),
    /// Enough is on its way.
    Full,
    /// Whether it was written is not known yet.
    Unchecked,
    /// There is none.
    Nothing,
}

/// See the module's text. Needs the gate alone and the turn from beginning to end.
#[derive(Debug)]
pub(crate) struct Outgoing<'a> {
    region: &'a Region,
    planned: VecDeque<PlannedMove>,
    flying: VecDeque<Entry>,
    flying_bytes: ByteCount,
    copied: ByteCount,
    /// Memory of what has left.
    left: Vec<Resident>,
    checks: Checks<'a>,
}

impl<'a> Outgoing<'a> {
    pub(crate) fn new(region: &'a Region, moves: Vec<PlannedMove>) -> Self {
        Self::checked(region, moves, Vec::new())
    }

    /// What is `unchecked` of these moves, in their order, is compared with its checksum before it is dropped, and copied
    /// where it was written.
    pub(crate) fn checked(region: &'a Region, moves: Vec<PlannedMove>, unchecked: Vec<ExtentIndex>) -> Self {
        let offloads = moves.iter().filter(|planned| matches!(planned.step, Move::Offload(_)));
        region.manager().arena.expect(offloads.map(|planned| planned.bytes).sum());
        let (planned, flying) = (moves.into(), VecDeque::new());
        let (flying_bytes, copied, left) = (ByteCount::ZERO, ByteCount::ZERO, Vec::new());
        let checks = Checks::new(region, unchecked);
        Self { region, planned, flying, flying_bytes, copied, left, checks }
    }

    /// Takes everything off the device. `release` gets the memory of what has left, in as few parts as cost no time: while
    /// there are copies to wait for. The rest of it is in the answer of [`end`](Self::end).
    pub(crate) fn run(
        &mut self,
        deadline: Instant,
        mut release: impl FnMut(Vec<Resident>),
    ) -> Result<(), MemoryError> {
        let start = Instant::now();
        while !self.is_done() {
            if Instant::now() >= deadline {
                return Err(MemoryError::Deadline { doing: "an eviction", waited: start.elapsed() });
            }
            while let Some(resident) = self.reap(Duration::ZERO)? {
                self.left.push(resident);
            }
            match self.start_next()? {
                Started::Free(resident) => self.left.push(resident),
                Started::Queued => {}
                Started::NoRoom(needed) if !self.is_flying() => {
                    let manager = self.region.manager();
                    let (free, budget) = (manager.arena.free(), manager.options.host_budget);
                    return Err(MemoryError::HostBudget { needed, free, budget });
                }
                Started::Unchecked => {
                    let started = self.start_checked()?;
                    if let Started::Free(resident) = started {
                        self.left.push(resident);
                    }
                }
                Started::NoRoom(_) | Started::Full | Started::Nothing if self.left.is_empty() => {
                    let resident = self.reap_one()?;
                    self.left.extend(resident);
                }
                Started::NoRoom(_) | Started::Full | Started::Nothing => {
                    if self.is_flying() {
                        release(std::mem::take(&mut self.left));
                    }
                }
            }
        }
        Ok(())
    }

    pub(crate) fn is_done(&self) -> bool {
        self.planned.is_empty() && self.flying.is_empty()
    }

    pub(crate) fn is_flying(&self) -> bool {
        !self.flying.is_empty()
    }

    /// Begins with the next extent.
    pub(crate) fn start_next(&mut self) -> Result<Started, MemoryError> {
        self.start_within(Duration::ZERO)
    }

    /// [`start_next`](Self::start_next), and waits to know whether it was written.
    pub(crate) fn start_checked(&mut self) -> Result<Started, MemoryError> {
        self.start_within(self.region.manager().options.operation_wait)
    }

    fn start_within(&mut self, patience: Duration) -> Result<Started, MemoryError> {
        let Some(mut planned) = self.planned.front().copied() else { return Ok(Started::Nothing) };
        let region = self.region;
        if planned.step == Move::Drop {
            match self.checks.next(planned.extent, patience)? {
                Checked::Pending => return Ok(Started::Unchecked),
                Checked::Clean => {}
                Checked::Written => {
                    planned.step = Move::Offload(Tier::Host);
                    if let Some(front) = self.planned.front_mut() {
                        *front = planned;
                    }
                }
            }
        }
        if !matches!(planned.step, Move::Offload(_)) {
            let mut state = region.inner.state.lock();
            state.table.begin(planned).map_err(region.table_error())?;
            state.table.finish(planned.extent).map_err(region.table_error())?;
            self.planned.pop_front();
            let resident = state.slot(planned.extent).resident.take();
            return resident.map(Started::Free).ok_or_else(|| region.refuse("evict", LOST));
        }
        let count = self.flying.len();
        if count > 0 && (self.flying_bytes + planned.bytes > IN_FLIGHT_BYTES || count >= IN_FLIGHT_MAX) {
            return Ok(Started::Full);
        }
        // A copy in the background that has not got to its end, or a stale one: in turn nobody writes it.
        let unfinished = region.inner.state.lock().slot(planned.extent).unfinished.take();
        let ready = reusable(unfinished, planned.bytes);
        if ready.is_none() && region.manager().arena.free() < planned.bytes {
            return Ok(Started::NoRoom(planned.bytes));
        }
        let (copy, event) = match self.start_offload(planned, ready) {
            // Copies that are in use hold what is free apart.
            Err(MemoryError::HostBudget { needed, .. }) => return Ok(Started::NoRoom(needed)),
            started => started?,
        };
        self.planned.pop_front();
        self.flying_bytes += planned.bytes;
        self.flying.push_back(Entry { planned, copy, event });
        Ok(Started::Queued)
    }

    fn start_offload(
        &self,
        planned: PlannedMove,
        ready: Option<HostCopy>,
    ) -> Result<(HostCopy, Event), MemoryError> {
        let (region, manager) = (self.region, self.region.manager());
        let copy = ready.map_or_else(|| manager.arena.allocate(planned.bytes, Filled::ByDevice), Ok)?;
        let mapping = {
            let mut state = region.inner.state.lock();
            state.table.begin(planned).map_err(region.table_error())?;
            state.mapping(planned.extent)
        };
        let queued = match mapping {
            None => Err(region.refuse("evict", LOST)),
            Some(mapping) => manager
                .down
                .copy(Span::mapping(&mapping), Span::host(&copy.buffer(), ByteCount::ZERO, planned.bytes))
                .and_then(|()| manager.down.record())
                .map_err(MemoryError::device("copy to the host")),
        };
        match queued {
            Ok(event) => Ok((copy, event)),
            Err(error) => {
                region.inner.state.lock().table.abort(planned.extent).map_err(region.table_error())?;
                Err(error)
            }
        }
    }

    /// Ends the first copy under way and gives the memory that it was made of. Nothing: none has ended within
    /// `patience`.
    pub(crate) fn reap(&mut self, patience: Duration) -> Result<Option<Resident>, MemoryError> {
        let Some(first) = self.flying.front() else { return Ok(None) };
        let ended = first.event.wait(patience);
        if matches!(ended, Ok(false)) {
            return Ok(None);
        }
        self.settle_first(ended.map(drop).map_err(MemoryError::device("copy to the host")))
    }

    /// [`reap`](Self::reap), or fails: it takes longer than any copy should.
    pub(crate) fn reap_one(&mut self) -> Result<Option<Resident>, MemoryError> {
        let wait = self.region.manager().options.operation_wait;
        if let Some(resident) = self.reap(wait)? {
            return Ok(Some(resident));
        }
        let source = DeviceError::Timeout { what: "a copy", waited: wait };
        self.settle_first(Err(MemoryError::Device { doing: "copy to the host", source }))
    }

    fn settle_first(&mut self, outcome: Result<(), MemoryError>) -> Result<Option<Resident>, MemoryError> {
        let Some(Entry { planned, copy, .. }) = self.flying.pop_front() else { return Ok(None) };
        self.flying_bytes -= planned.bytes;
        let region = self.region;
        let mut state = region.inner.state.lock();
        if let Err(error) = outcome {
            let _ = state.table.abort(planned.extent);
            return Err(error);
        }
        state.table.finish(planned.extent).map_err(region.table_error())?;
        let slot = state.slot(planned.extent);
        slot.host = Some(copy);
        let resident = slot.resident.take();
        drop(state);
        self.copied += planned.bytes;
        Ok(resident)
    }

    /// Ends what is under way, well or not; gives the memory of what left and the bytes copied. Nothing of ours touches that memory
    /// any more.
    pub(crate) fn end(mut self, has_failed: bool) -> (Vec<Resident>, ByteCount) {
        let (mut leaving, mut has_failed) = (std::mem::take(&mut self.left), has_failed);
        while self.is_flying() {
            match self.reap_one() {
                Ok(resident) => leaving.extend(resident),
                Err(_) => has_failed = true,
            }
        }
        if has_failed {
            self.region.manager().settle();
        }
        (leaving, self.copied)
    }
}

const LOST: &str = "an extent lost its memory";
