//! Bringing bytes back to the device, at the same addresses, in order of use.
//!
//! The order is: lease (one restore at a time asks for it), turn, then device memory and copies hand in hand
//! ([`super::incoming`]). What KV was evicted comes back beside a wake of weights that has all of its memory. Until there is device memory for all of it, whatever fails, what this wake brought is taken away
//! again and the lease given back. The copies off the device are touched only when all of it has succeeded (I6).
//!
//! A step may run beside a wake that has all of its memory ([`Region::guard_in_order`]): it uses what has arrived, so from
//! then on nothing is taken away again, and if a copy fails, what came stays and the rest is still where it was.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::extent::PageRun;
use shoal_core::ids::ExtentIndex;
use shoal_core::page_table::{Backing, PlannedMove};
use shoal_core::protocol::LeaseKind;
use shoal_core::residency::Move;

use super::commit::{NAP, NAP_MAX};
use super::incoming::{Arrived, Incoming};
use super::{Region, Report};
use crate::error::MemoryError;
use crate::retire::Lingering;
use crate::supply::{Content, Supply};
use crate::transfer::{Shared, Transfer};
use crate::turn::Taken;

impl Region {
    /// Starts bringing everything back, on a thread of its own.
    ///
    /// # Errors
    /// [`MemoryError::TooManyTransfers`], [`MemoryError::State`] if no thread can be had. All else is the transfer's
    /// outcome: [`Transfer::wait`].
    pub fn wake(&self, timeout: Duration) -> Result<Transfer, MemoryError> {
        self.restore(ByteCount(u64::MAX), timeout)
    }

    /// The wake that is under way, if one was started by [`wake`](Self::wake) or [`restore`](Self::restore).
    #[must_use]
    pub fn waking(&self) -> Option<Transfer> {
        let waking = self.inner.waking.lock().clone();
        waking.filter(|transfer| !transfer.progress().is_finished)
    }

    /// Starts bringing back what is used first, as many whole extents as fit into `bytes`.
    ///
    /// # Errors
    /// As [`wake`](Self::wake).
    pub fn restore(&self, bytes: ByteCount, timeout: Duration) -> Result<Transfer, MemoryError> {
        self.begin_restore(bytes, Instant::now() + timeout, "a wake")
    }

    /// Brings everything back by `deadline`, and calls `backed` once all device memory for it is there and the bytes are
    /// still coming. A wake of this region that is under way is joined; where that one fails, another is tried.
    pub(crate) fn wake_telling(
        &self,
        deadline: Instant,
        reason: &str,
        mut backed: impl FnMut(),
    ) -> Result<Report, MemoryError> {
        if let Some(wake) = self.waking().filter(Transfer::is_whole)
            && let Ok(report) = wake.follow(deadline, &mut backed)
        {
            return Ok(report);
        }
        self.begin_restore(ByteCount(u64::MAX), deadline, reason)?.follow(deadline, &mut backed)
    }

    pub(crate) fn begin_restore(
        &self,
        bytes: ByteCount,
        deadline: Instant,
        reason: &str,
    ) -> Result<Transfer, MemoryError> {
        let manager = Arc::clone(self.manager());
        manager.claim_transfer()?;
        let shared = Arc::new(Shared::default());
        let (weak, is_whole) = (Arc::downgrade(&self.inner), bytes == ByteCount(u64::MAX));
        let transfer = Transfer::new(manager.next_transfer(), weak, is_whole, Arc::clone(&shared));
        let (region, reason) = (self.clone(), reason.to_owned());
        let work = move || {
            let outcome = region.restore_now(bytes, deadline, &shared, &reason);
            region.manager().transfers.fetch_sub(1, Ordering::Relaxed);
            // The last holder of a region frees its memory: before anyone hears that the wake has ended.
            drop(region);
            shared.finish(outcome);
        };
        if thread::Builder::new().name("shoal-wake".to_owned()).spawn(work).is_err() {
            manager.transfers.fetch_sub(1, Ordering::Relaxed);
            return Err(self.refuse("wake", "no thread can be started"));
        }
        let mut waking = self.inner.waking.lock();
        if waking.as_ref().is_none_or(|before| before.progress().is_finished) {
            *waking = Some(transfer.clone());
        }
        Ok(transfer)
    }

    /// Waits for what something still holds at the addresses of what is missing; where the device refused to unmap it, waiting
    /// is no use.
    pub(crate) fn restore_now(
        &self,
        bytes: ByteCount,
        deadline: Instant,
        shared: &Shared,
        reason: &str,
    ) -> Result<Report, MemoryError> {
        let (start, mut nap) = (Instant::now(), NAP);
        loop {
            let outcome = self.restore_once(bytes, deadline, shared, reason);
            if !matches!(outcome, Err(MemoryError::StillMapped { .. })) {
                return outcome.map(|report| Report { duration: start.elapsed(), ..report });
            }
            let is_refused = self.missing_lingers(bytes) == Some(Lingering::Refused);
            if is_refused || Instant::now() >= deadline {
                return Err(self.still_mapped(start.elapsed()));
            }
            if shared.is_cancelled() {
                return Err(shared.cancelled());
            }
            // Nothing is held meanwhile: what holds the memory may be a step that waits for what another restore brings.
            thread::sleep(nap);
            nap = (nap * 2).min(NAP_MAX);
        }
    }

    fn restore_once(
        &self,
        bytes: ByteCount,
        deadline: Instant,
        shared: &Shared,
        reason: &str,
    ) -> Result<Report, MemoryError> {
        let restoring = self.manager().take_restore(deadline)?;
        let wanted = {
            // In turn: in the middle of an eviction bytes are missing whose lease is not given back yet.
            let _turn = self.take_turn_to_restore(deadline)?;
            self.manager().drop_idle_copies();
            self.check_missing_unmapped(bytes)?;
            self.missing_extents(bytes)
        };
        let planned_bytes = wanted.iter().copied().sum();
        let mut report = Report::new(planned_bytes);
        if wanted.is_empty() {
            return Ok(report);
        }
        shared.set_total(planned_bytes);
        let mut supply = self.supply(wanted, Content::Any, deadline, reason)?;
        let turn = self.take_turn_to_restore(deadline)?;
        // Who borrows the turn of this may restore KV. Were this KV, it would find missing what is on its way.
        let brought = if self.comes_beside_wakes() {
            let brought = self.restore_in_turn(&mut supply, deadline, shared);
            drop(restoring);
            brought?
        } else {
            self.restore_lending(&mut supply, deadline, shared, Some(&turn), Some(restoring))?
        };
        (report.requested, report.copied) = (brought.requested, brought.copied);
        Ok(report)
    }

    /// Why memory is mapped still where a restore of `bytes` would map: see [`lingering`](Self::lingering).
    fn missing_lingers(&self, bytes: ByteCount) -> Option<Lingering> {
        if self.manager().has_retired() { self.lingering(&self.missing_runs(bytes)) } else { None }
    }

    fn missing_runs(&self, bytes: ByteCount) -> Vec<PageRun> {
        let state = self.inner.state.lock();
        let moves = state.table.plan_restore(bytes).moves;
        let run = |planned: &PlannedMove| state.table.extent(planned.extent).map(|(extent, _)| extent.run());
        moves.iter().filter_map(|planned| run(planned).ok()).collect()
    }

    /// Needs the turn.
    pub(crate) fn check_missing_unmapped(&self, bytes: ByteCount) -> Result<(), MemoryError> {
        self.missing_lingers(bytes).map_or(Ok(()), |_| Err(self.still_mapped(Duration::ZERO)))
    }

    /// The sizes of what a restore of `bytes` would map.
    pub(crate) fn missing_extents(&self, bytes: ByteCount) -> Vec<ByteCount> {
        let plan = self.inner.state.lock().table.plan_restore(bytes);
        plan.moves.into_iter().map(|planned| planned.bytes).collect()
    }

    /// Brings back what `supply` suffices for. Needs the turn.
    pub(crate) fn restore_in_turn(
        &self,
        supply: &mut Supply,
        deadline: Instant,
        shared: &Shared,
    ) -> Result<Report, MemoryError> {
        self.restore_lending(supply, deadline, shared, None, None)
    }

    /// Whether it comes back beside a wake of weights whose memory is there, on the turn that this lends: what a step needs
    /// beside its weights. Nothing of KV comes from files, whose buffers the wake may be using.
    pub(crate) fn comes_beside_wakes(&self) -> bool {
        self.kind() == LeaseKind::Kv
    }

    fn take_turn_to_restore(&self, deadline: Instant) -> Result<Taken, MemoryError> {
        if !self.comes_beside_wakes() {
            return self.manager().take_turn(deadline);
        }
        let turn = self.manager().take_or_borrow_turn(deadline)?;
        if !turn.is_borrowed() {
            self.manager().sweep(true);
        }
        Ok(turn)
    }

    /// [`restore_in_turn`](Self::restore_in_turn); once all memory is there, that turn is lent to those who map, and
    /// `restoring` given back.
    fn restore_lending(
        &self,
        supply: &mut Supply,
        deadline: Instant,
        shared: &Shared,
        turn: Option<&Taken>,
        restoring: Option<Taken>,
    ) -> Result<Report, MemoryError> {
        self.check_missing_unmapped(supply.bytes())?;
        // Since the lease was asked for, others may have brought back some of it, and some more may have been evicted, with
        // which a server grants the lease.
        let (plan, missing) = {
            let state = self.inner.state.lock();
            (state.table.plan_restore(supply.bytes()), state.table.missing_bytes())
        };
        if plan.bytes < missing {
            // Or something was evicted: who steps in beside this wake would miss it.
            shared.set_short();
        }
        let mut report = Report::new(plan.bytes);
        shared.set_total(plan.bytes);
        let mut incoming = Incoming::new(self, plan.moves, shared).until_backed(restoring);
        let outcome = incoming.run(supply, deadline, turn);
        let has_guests = shared.close();
        let Arrived { brought, leaving } = incoming.end();
        if has_guests {
            self.manager().release_dropped(leaving);
        } else {
            // What the device refuses is told, and kept.
            let _ = self.manager().release_unused(leaving);
        }
        let is_stopped = matches!(outcome, Err(MemoryError::Cancelled { .. } | MemoryError::Deadline { .. }));
        if outcome.is_err() && !is_stopped && !has_guests {
            self.roll_back(&brought);
        } else {
            self.drop_writable_copies(&brought);
            report.copied = brought.iter().map(|planned| planned.bytes).sum();
            self.manager().count_onboarded(report.copied);
        }
        outcome.map(|()| report)
    }

    /// Whether all of a range lies on the device.
    pub(crate) fn is_there(&self, offset: ByteCount, bytes: ByteCount) -> bool {
        let run = PageRun::covering(offset, bytes);
        let state = self.inner.state.lock();
        let is_on_device = |index: &ExtentIndex| state.mapping(*index).is_some();
        state.table.uncovered(run).is_ok_and(|free| free.is_empty())
            && state.table.extents_touching(run).is_ok_and(|extents| extents.iter().all(is_on_device))
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
        let _ = self.manager().release(leaving);
    }

    /// Host bytes that [`drop_writable_copies`](Self::drop_writable_copies) frees when all of it has come.
    pub(crate) fn writable_copies(&self) -> ByteCount {
        let usage = self.usage();
        if usage.sealed || self.backing() == Backing::Discard { ByteCount::ZERO } else { usage.host }
    }

    /// What may be written on the device and has no checksum to find that out by: its other copies are stale from now on.
    pub(crate) fn drop_writable_copies(&self, brought: &[PlannedMove]) {
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
