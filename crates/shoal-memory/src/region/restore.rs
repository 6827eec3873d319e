//! Bringing bytes back to the device, at the same addresses, in order of use.
//!
//! The order is: lease (one restore at a time asks for it), turn, device memory for all of it, copies. Whatever fails, what this wake brought is taken away
//! again and the lease given back; the copies off the device are touched only when all of it has succeeded (I6).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::extent::Extent;
use shoal_core::ids::ExtentIndex;
use shoal_core::page_table::{Backing, PlannedMove};
use shoal_core::residency::Move;
use shoal_core::tier::Tier;
use shoal_device::{Event, Mapping, Span};

use super::{Region, Report};
use crate::error::MemoryError;
use crate::lease::Grant;
use crate::manager::Resident;
use crate::transfer::{Shared, Transfer};

type Flight = (PlannedMove, Resident, Option<Event>);

impl Region {
    /// Starts bringing everything back, on a thread of its own.
    ///
    /// # Errors
    /// [`MemoryError::TooManyTransfers`], [`MemoryError::State`] if no thread can be had. All else is the transfer's
    /// outcome: [`Transfer::wait`].
    pub fn wake(&self, timeout: Duration) -> Result<Transfer, MemoryError> {
        self.restore(ByteCount(u64::MAX), timeout)
    }

    /// Starts bringing back what is used first, as many whole extents as fit into `bytes`.
    ///
    /// # Errors
    /// As [`wake`](Self::wake).
    pub fn restore(&self, bytes: ByteCount, timeout: Duration) -> Result<Transfer, MemoryError> {
        let manager = Arc::clone(self.manager());
        let limit = manager.options.transfers_max;
        let claimed = manager
            .transfers
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| (count < limit).then_some(count + 1));
        if claimed.is_err() {
            return Err(MemoryError::TooManyTransfers { limit });
        }
        let shared = Arc::new(Shared::default());
        let transfer = Transfer::new(manager.next_transfer(), Arc::clone(&shared));
        let (region, deadline) = (self.clone(), Instant::now() + timeout);
        let work = move || {
            let outcome = region.restore_now(bytes, deadline, &shared, "a wake");
            region.manager().transfers.fetch_sub(1, Ordering::Relaxed);
            // The last holder of a region frees its memory: before anyone hears that the wake has ended.
            drop(region);
            shared.finish(outcome);
        };
        if thread::Builder::new().name("shoal-wake".to_owned()).spawn(work).is_err() {
            manager.transfers.fetch_sub(1, Ordering::Relaxed);
            return Err(self.refuse("wake", "no thread can be started"));
        }
        Ok(transfer)
    }

    pub(crate) fn restore_now(
        &self,
        bytes: ByteCount,
        deadline: Instant,
        shared: &Shared,
        reason: &str,
    ) -> Result<Report, MemoryError> {
        let start = Instant::now();
        let _restoring = self.manager().take_restore(deadline)?;
        let planned_bytes = {
            // In turn: in the middle of an eviction bytes are missing whose lease is not given back yet.
            let _turn = self.manager().take_turn(deadline)?;
            self.manager().drop_idle_copies();
            self.inner.state.lock().table.plan_restore(bytes).bytes
        };
        let mut report = Report::new(planned_bytes);
        if planned_bytes.is_zero() {
            return Ok(report);
        }
        shared.set_total(planned_bytes);
        let mut grant = self.ask(planned_bytes, deadline.saturating_duration_since(start), reason)?;
        let _turn = self.manager().take_turn(deadline)?;
        let brought = self.restore_in_turn(&mut grant, deadline, shared)?;
        (report.requested, report.copied) = (brought.requested, brought.copied);
        report.duration = start.elapsed();
        Ok(report)
    }

    /// Brings back what `grant` suffices for. Needs the turn.
    pub(crate) fn restore_in_turn(
        &self,
        grant: &mut Grant,
        deadline: Instant,
        shared: &Shared,
    ) -> Result<Report, MemoryError> {
        // Since the lease was asked for, others may have brought back some of it; none of it can be more.
        let plan = self.inner.state.lock().table.plan_restore(grant.bytes());
        let mut report = Report::new(plan.bytes);
        let mut brought = Vec::new();
        let outcome = self.restore_all(&plan.moves, grant, deadline, shared, &mut brought);
        let is_stopped = matches!(outcome, Err(MemoryError::Cancelled { .. } | MemoryError::Deadline { .. }));
        if outcome.is_err() && !is_stopped {
            self.roll_back(&brought);
        } else {
            self.drop_writable_copies(&brought);
            report.copied = brought.iter().map(|planned| planned.bytes).sum();
            self.manager().count_onboarded(report.copied);
        }
        outcome.map(|()| report)
    }

    fn restore_all(
        &self,
        moves: &[PlannedMove],
        grant: &mut Grant,
        deadline: Instant,
        shared: &Shared,
        brought: &mut Vec<PlannedMove>,
    ) -> Result<(), MemoryError> {
        let mut mapped: VecDeque<(PlannedMove, Resident)> = VecDeque::with_capacity(moves.len());
        let mut flying: VecDeque<Flight> = VecDeque::new();
        let mut failed = None;
        for planned in moves {
            let extent = self.inner.state.lock().table.extent(planned.extent).map_err(self.table_error());
            match extent.and_then(|(extent, _)| self.map_extent(extent, grant)) {
                Ok(resident) => mapped.push_back((*planned, resident)),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        while failed.is_none()
            && let Some((planned, resident)) = mapped.pop_front()
        {
            let stopped = if shared.is_cancelled() {
                Some(shared.cancelled())
            } else if Instant::now() >= deadline {
                Some(MemoryError::Deadline { doing: "a wake", waited: Duration::ZERO })
            } else {
                None
            };
            if let Some(error) = stopped {
                mapped.push_front((planned, resident));
                failed = Some(error);
                break;
            }
            match self.start_restore(planned, &resident) {
                Ok(event) => flying.push_back((planned, resident, event)),
                Err(error) => {
                    mapped.push_front((planned, resident));
                    failed = Some(error);
                }
            }
            if flying.len() >= self.manager().options.in_flight_max
                && let Some(first) = flying.pop_front()
                && let Err((error, resident)) = self.end_restore(first, shared, brought)
            {
                mapped.push_front((planned, resident));
                failed.get_or_insert(error);
            }
        }
        let mut leaving: Vec<Resident> = mapped.into_iter().map(|(_, resident)| resident).collect();
        for flight in flying {
            if let Err((error, resident)) = self.end_restore(flight, shared, brought) {
                leaving.push(resident);
                failed.get_or_insert(error);
            }
        }
        let Some(error) = failed else { return Ok(()) };
        self.manager().settle();
        self.manager().release_unused(leaving);
        Err(error)
    }

    /// Queues what fills an extent's memory. Reading from a file is done here, whole.
    fn start_restore(&self, planned: PlannedMove, resident: &Resident) -> Result<Option<Event>, MemoryError> {
        let manager = self.manager();
        let (extent, host, hash) = {
            let mut state = self.inner.state.lock();
            let extent = state.table.begin(planned).map_err(self.table_error())?;
            let slot = state.slot(planned.extent);
            (extent, slot.host.as_ref().map(|copy| Arc::clone(copy.buffer())), slot.hash)
        };
        let started = match (planned.step, host) {
            (Move::Zero, _) => Ok(None),
            (Move::Restore(Tier::Host), Some(buffer)) => manager
                .up
                .copy(Span::host(&buffer, ByteCount::ZERO, extent.bytes()), Span::mapping(&resident.mapping))
                .and_then(|()| manager.up.record())
                .map(Some)
                .map_err(MemoryError::device("copy to the device")),
            (Move::Restore(Tier::Source), _) if hash.is_none() => {
                Err(self
                    .refuse("wake from a file", "it is not sealed, so what is read cannot be verified (I8)"))
            }
            (Move::Restore(Tier::Source), _) => {
                self.read_from_source(extent, hash, &resident.mapping).map(Some)
            }
            _ => Err(self.refuse("restore", "a copy is not where the page table has it")),
        };
        if started.is_err() {
            self.inner.state.lock().table.abort(planned.extent).map_err(self.table_error())?;
        }
        started
    }

    fn end_restore(
        &self,
        (planned, resident, event): Flight,
        shared: &Shared,
        brought: &mut Vec<PlannedMove>,
    ) -> Result<(), (MemoryError, Resident)> {
        let wait = self.manager().options.operation_wait;
        let done = event
            .map_or(Ok(true), |event| event.wait(wait))
            .map_err(MemoryError::device("copy to the device"));
        let done = done.and_then(|is_done| {
            is_done.then_some(()).ok_or(MemoryError::Device {
                doing: "copy to the device",
                source: shoal_device::DeviceError::Timeout { what: "a copy", waited: wait },
            })
        });
        let mut state = self.inner.state.lock();
        if let Err(error) = done {
            let _ = state.table.abort(planned.extent);
            return Err((error, resident));
        }
        if let Err(source) = state.table.finish(planned.extent) {
            return Err((self.table_error()(source), resident));
        }
        state.slot(planned.extent).resident = Some(resident);
        drop(state);
        brought.push(planned);
        shared.add_done(planned.bytes);
        Ok(())
    }

    /// Reads an extent from its files through two small buffers and compares its checksum (I8).
    fn read_from_source(
        &self,
        extent: Extent,
        expected: Option<u64>,
        mapping: &Arc<Mapping>,
    ) -> Result<Event, MemoryError> {
        let manager = self.manager();
        let pieces = self.pieces_of(extent);
        let scratch = manager.scratch()?;
        let mut events: [Option<Event>; 2] = [None, None];
        let mut hasher = shoal_device::Hasher::new();
        let mut done = ByteCount::ZERO;
        let mut turn = 0;
        while done < extent.bytes() {
            let buffer = &scratch.buffers[turn];
            if let Some(event) = events[turn].take() {
                event
                    .wait(manager.options.operation_wait)
                    .map_err(MemoryError::device("copy to the device"))?;
            }
            let bytes = buffer.bytes().min(extent.bytes() - done);
            let from = extent.offset() + done;
            buffer
                .access_mut(ByteCount::ZERO, bytes, |target| {
                    manager.files.read(&pieces, from.0, target).map(|()| hasher.update(target))
                })
                .map_err(MemoryError::device("read into host memory"))??;
            let target = Span::Device { mapping: Arc::clone(mapping), offset: done, bytes };
            let event = manager
                .up
                .copy(Span::host(buffer, ByteCount::ZERO, bytes), target)
                .and_then(|()| manager.up.record())
                .map_err(MemoryError::device("copy to the device"))?;
            events[turn] = Some(event);
            turn = 1 - turn;
            done += bytes;
        }
        let found = hasher.finish();
        if expected.is_some_and(|expected| expected != found) {
            let first = pieces.first().map(|placed| (Arc::clone(&placed.piece.path), placed.piece.offset));
            let (path, offset) = first.unwrap_or_default();
            let what = format!(
                "{} at offset {} of region {:?} read with hash {found:016x}, recorded {:016x}",
                extent.bytes(),
                extent.offset().0,
                self.name(),
                expected.unwrap_or_default()
            );
            return Err(MemoryError::SourceMismatch { path, offset, what });
        }
        for event in events.into_iter().flatten() {
            event.wait(manager.options.operation_wait).map_err(MemoryError::device("copy to the device"))?;
        }
        manager.up.record().map_err(MemoryError::device("copy to the device"))
    }

    /// Takes away what a failed wake brought. The copies it came from are still there.
    fn roll_back(&self, brought: &[PlannedMove]) {
        let mut leaving = Vec::new();
        {
            let mut state = self.inner.state.lock();
            for planned in brought {
                let step = if planned.step == Move::Zero { Move::Discard } else { Move::Drop };
                let back = PlannedMove { step, ..*planned };
                if let Err(error) = state.table.begin(back).and_then(|_| state.table.finish(planned.extent)) {
                    tracing::error!(%error, region = self.name(), "cannot roll back; it stays on the device");
                    continue;
                }
                leaving.extend(state.slot(planned.extent).resident.take());
            }
        }
        self.manager().release(leaving);
    }

    /// What may be written on the device and has no checksum to find that out by: its other copies are stale from now on.
    fn drop_writable_copies(&self, brought: &[PlannedMove]) {
        let mut freed = Vec::new();
        let mut state = self.inner.state.lock();
        if state.sealed || self.backing() == Backing::Discard {
            return;
        }
        for planned in brought {
            let index: ExtentIndex = planned.extent;
            if let Ok((extent, _)) = state.table.extent(index)
                && state.table.written(index).is_ok()
            {
                // No file speaks for what may be written from now on, not even after it was copied down again.
                state.sources.write(extent.offset().0, extent.bytes().0, None);
                freed.extend(state.slot(index).host.take());
            }
        }
        drop(state);
        drop(freed);
    }
}
