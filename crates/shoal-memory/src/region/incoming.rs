//! Extents on their way to the device: memory is made and mapped for the next ones while the copies of those before run.
//!
//! Apart because a wake and a swap drive it differently, and because it is what keeps the link busy: the stream has up to
//! [`IN_FLIGHT_BYTES`] before it, and nothing that the host does for the next extent happens while it is idle.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::extent::Extent;
use shoal_core::page_table::PlannedMove;
use shoal_core::residency::Move;
use shoal_device::{DeviceError, Event};

use super::Region;
use crate::error::MemoryError;
use crate::retire::Resident;
use crate::supply::{Content, Supply};
use crate::transfer::Shared;
use crate::turn::Taken;

/// Bytes that one direction of the link has before it.
pub(crate) const IN_FLIGHT_BYTES: ByteCount = ByteCount::gib(1);
/// Extents that one direction has before it, if they are small.
pub(crate) const IN_FLIGHT_MAX: usize = 64;

#[derive(Debug)]
struct Entry {
    planned: PlannedMove,
    extent: Extent,
    resident: Resident,
    /// Of its copy, once queued; none where there is nothing to copy.
    event: Option<Arc<Event>>,
}

/// See the module's text. Needs the turn from beginning to end.
#[derive(Debug)]
pub(crate) struct Incoming<'a> {
    region: &'a Region,
    shared: &'a Shared,
    planned: VecDeque<PlannedMove>,
    mapped: VecDeque<Entry>,
    flying: VecDeque<Entry>,
    flying_bytes: ByteCount,
    brought: Vec<PlannedMove>,
    /// Memory whose bytes did not come.
    leaving: Vec<Resident>,
    has_begun: bool,
    /// Keeps other restores from asking for what this one has asked for, until all of its memory is there.
    restoring: Option<Taken>,
    started: Instant,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Arrived {
    /// What is on the device now, in the order it came.
    pub(crate) brought: Vec<PlannedMove>,
    /// Memory whose bytes did not come. Nothing of ours touches it any more.
    pub(crate) leaving: Vec<Resident>,
}

impl<'a> Incoming<'a> {
    pub(crate) fn new(region: &'a Region, moves: Vec<PlannedMove>, shared: &'a Shared) -> Self {
        let brought = Vec::with_capacity(moves.len());
        let (mapped, flying) = (VecDeque::new(), VecDeque::new());
        let (planned, flying_bytes, leaving) = (moves.into(), ByteCount::ZERO, Vec::new());
        let (has_begun, restoring, started) = (false, None, Instant::now());
        Self {
            region,
            shared,
            planned,
            mapped,
            flying,
            flying_bytes,
            brought,
            leaving,
            has_begun,
            restoring,
            started,
        }
    }

    /// Lets others ask for what they lack once all memory of this is there, rather than when it ends.
    pub(crate) fn until_backed(self, restoring: Option<Taken>) -> Self {
        Self { restoring, ..self }
    }

    /// The next extent that has no memory yet.
    pub(crate) fn next(&self) -> Option<PlannedMove> {
        self.planned.front().copied()
    }

    pub(crate) fn is_flying(&self) -> bool {
        !self.flying.is_empty()
    }

    /// What is on the device by now, in the order it came.
    pub(crate) fn brought(&self) -> &[PlannedMove] {
        &self.brought
    }

    pub(crate) fn is_done(&self) -> bool {
        self.planned.is_empty() && self.mapped.is_empty() && self.flying.is_empty()
    }

    /// Brings everything, on `supply`. `turn` is lent while there is nothing to do but copies.
    pub(crate) fn run(
        &mut self,
        supply: &mut Supply,
        deadline: Instant,
        turn: Option<&Taken>,
    ) -> Result<(), MemoryError> {
        let region = self.region;
        let mut lent = None;
        while !self.is_done() {
            if self.has_begun && lent.is_none() {
                lent = turn.and_then(Taken::lend);
            }
            self.check_stopped(deadline)?;
            while self.reap(Duration::ZERO)? {}
            let make = |extent, content| supply.map_settled(region, extent, content, deadline);
            if self.start_next()? || self.map_next(make)? {
                continue;
            }
            self.reap_one()?;
        }
        Ok(())
    }

    pub(crate) fn check_stopped(&self, deadline: Instant) -> Result<(), MemoryError> {
        if self.shared.is_cancelled() {
            return Err(self.shared.cancelled());
        }
        if Instant::now() >= deadline {
            return Err(MemoryError::Deadline { doing: "a wake", waited: self.started.elapsed() });
        }
        Ok(())
    }

    /// Makes memory for the next extent. False: all have theirs.
    pub(crate) fn map_next(
        &mut self,
        make: impl FnOnce(Extent, Content) -> Result<Resident, MemoryError>,
    ) -> Result<bool, MemoryError> {
        let Some(planned) = self.planned.front().copied() else { return Ok(false) };
        let region = self.region;
        let (extent, _) =
            region.inner.state.lock().table.extent(planned.extent).map_err(region.table_error())?;
        // A copy writes all of it.
        let content = if planned.step == Move::Zero { Content::Zeroed } else { Content::Any };
        let resident = make(extent, content)?;
        self.planned.pop_front();
        self.mapped.push_back(Entry { planned, extent, resident, event: None });
        if self.planned.is_empty() {
            self.begin();
        }
        Ok(true)
    }

    /// Says that all memory is there.
    fn begin(&mut self) {
        if std::mem::replace(&mut self.has_begun, true) {
            return;
        }
        let entries = self.flying.iter().chain(&self.mapped);
        self.shared.begun(entries.map(|entry| (entry.extent, entry.event.clone())));
        self.restoring = None;
    }

    /// Queues what fills the next extent. False: none has memory, or enough is on its way.
    pub(crate) fn start_next(&mut self) -> Result<bool, MemoryError> {
        let Some(next) = self.mapped.front() else { return Ok(false) };
        let count = self.flying.len();
        let is_full = self.flying_bytes + next.planned.bytes > IN_FLIGHT_BYTES || count >= IN_FLIGHT_MAX;
        if count > 0 && is_full {
            return Ok(false);
        }
        let event = self.region.start_restore(next.planned, &next.resident)?.map(Arc::new);
        if let Some(mut entry) = self.mapped.pop_front() {
            if let Some(event) = &event {
                self.shared.queued(entry.extent, event);
            }
            entry.event = event;
            self.flying_bytes += entry.planned.bytes;
            self.flying.push_back(entry);
        }
        Ok(true)
    }

    /// Ends the first copy under way. False: there is none, or it has not ended within `patience`.
    pub(crate) fn reap(&mut self, patience: Duration) -> Result<bool, MemoryError> {
        let Some(first) = self.flying.front() else { return Ok(false) };
        let ended = first.event.as_ref().map_or(Ok(true), |event| event.wait(patience));
        if matches!(ended, Ok(false)) {
            return Ok(false);
        }
        self.settle_first(ended.map(drop).map_err(MemoryError::device("copy to the device")))?;
        Ok(true)
    }

    /// Ends the first copy under way, or fails: it takes longer than any copy should.
    pub(crate) fn reap_one(&mut self) -> Result<(), MemoryError> {
        let wait = self.region.manager().options.operation_wait;
        if self.flying.is_empty() || self.reap(wait)? {
            return Ok(());
        }
        let source = DeviceError::Timeout { what: "a copy", waited: wait };
        self.settle_first(Err(MemoryError::Device { doing: "copy to the device", source }))
    }

    fn settle_first(&mut self, outcome: Result<(), MemoryError>) -> Result<(), MemoryError> {
        let Some(Entry { planned, extent, resident, .. }) = self.flying.pop_front() else { return Ok(()) };
        self.flying_bytes -= planned.bytes;
        let mut state = self.region.inner.state.lock();
        let finished = match outcome {
            Ok(()) => state.table.finish(planned.extent).map(drop).map_err(self.region.table_error()),
            Err(error) => {
                let _ = state.table.abort(planned.extent);
                Err(error)
            }
        };
        if let Err(error) = finished {
            drop(state);
            self.leaving.push(resident);
            return Err(error);
        }
        state.slot(planned.extent).resident = Some(resident);
        drop(state);
        self.brought.push(planned);
        self.shared.arrived(extent);
        Ok(())
    }

    /// Ends what is under way, well or not. What has memory and no bytes gives it up.
    pub(crate) fn end(mut self) -> Arrived {
        let mut has_failed = !self.leaving.is_empty();
        while !self.flying.is_empty() {
            has_failed |= self.reap_one().is_err();
        }
        if has_failed || !self.mapped.is_empty() {
            // A copy that failed may still touch its memory (I5).
            self.region.manager().settle();
        }
        let Self { brought, mut leaving, mapped, .. } = self;
        leaving.extend(mapped.into_iter().map(|entry| entry.resident));
        Arrived { brought, leaving }
    }
}
