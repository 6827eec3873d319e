//! One region leaves the device while another comes, in the room of one.
//!
//! Apart because it moves both ways at once: an extent that has left hands its memory over to one that comes, and while
//! that is copied up the next one is copied down, so that both directions of the link are busy. Frames of equal size change
//! regions without being made anew.
//!
//! Who comes first: the lock of restores, a lease for what the one region lacks beyond the other's room, both regions' gate
//! alone, the turn. Until then nothing has changed. If something fails later, what has left is on the host and what has
//! come is on the device: every extent has a valid copy (I6), leases agree with what is mapped (I1), and the same swap
//! goes on where it stopped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::ids::ExtentIndex;
use shoal_core::page_table::PlannedMove;

use crate::error::MemoryError;
use crate::gate::{Pass, Scope};
use crate::manager::MemoryManager;
use crate::region::incoming::{Arrived, Incoming};
use crate::region::outgoing::{Outgoing, Started};
use crate::region::{Region, Report};
use crate::retire::{Released, Resident};
use crate::supply::Supply;
use crate::transfer::Shared;
use crate::turn::Taken;

const ALL: ByteCount = ByteCount(u64::MAX);

/// What a swap did.
#[derive(Clone, Debug)]
pub struct SwapReport {
    /// What left the device.
    pub out: Report,
    /// What came.
    pub into: Report,
}

/// What leaves and what comes.
#[derive(Debug)]
struct Plan {
    leaving: Vec<PlannedMove>,
    /// What of it is compared with its checksum as it leaves.
    unchecked: Vec<ExtentIndex>,
    coming: Vec<PlannedMove>,
    coming_bytes: ByteCount,
}

/// Room that has become free, and what of it still has frames behind it.
#[derive(Debug)]
struct Room<'a> {
    manager: &'a MemoryManager,
    supply: Supply,
    freed: ByteCount,
}

impl Room<'_> {
    /// Takes over what an extent lay on.
    fn take(&mut self, resident: Resident) -> Result<(), MemoryError> {
        match resident.unmap() {
            Ok(bare) => {
                self.freed += bare.lease.bytes();
                // Of another kind, which the caller excludes: it goes back.
                drop(self.supply.push(bare));
                Ok(())
            }
            // Somebody still reads it, or the device refused: it is freed later, with its lease.
            Err(retired) => {
                let error = retired.error();
                self.manager.retire(retired);
                error.map_or(Ok(()), Err)
            }
        }
    }

    /// Gives back what nobody took: memory first, then its lease (I1).
    fn close(mut self) -> Released {
        let error = self.manager.destroy(self.supply.take_frames()).error;
        Released { freed: self.freed, error }
    }
}

impl MemoryManager {
    /// Takes `out` off the device and brings `into` there, both ways at once, in the room of `out`. Waits for the guards of
    /// both. `trust_clean` as for [`Region::sleep`].
    ///
    /// # Errors
    /// [`MemoryError::State`] for regions that cannot be swapped, [`MemoryError::Lease`] if `into` needs more than `out`
    /// has, [`MemoryError::HostBudget`], [`MemoryError::Deadline`], [`MemoryError::Device`]. What had left by then is on the
    /// host, what had come is on the device; the same swap, again, goes on from there. [`MemoryError::StillMapped`] at once
    /// where `into` gave memory up that is mapped still; nothing is changed then.
    pub fn swap(
        self: &Arc<Self>,
        out: &Region,
        into: &Region,
        trust_clean: bool,
        timeout: Duration,
    ) -> Result<SwapReport, MemoryError> {
        let start = Instant::now();
        let deadline = start + timeout;
        self.check_swap(out, into)?;
        let _restoring = self.take_restore(deadline)?;
        let (supply, _gate, _turn) = self.enter_swap(out, into, deadline, timeout)?;
        if out.is_in_use() {
            return Err(out.refuse("swap", "somebody fills it right now (use_region)"));
        }
        let plan = self.plan_swap(out, into, trust_clean, deadline)?;
        let mut report =
            SwapReport { out: Report::new(out.usage().device), into: Report::new(plan.coming_bytes) };
        let outcome = self.run_swap((out, into), plan, supply, deadline, &mut report);
        (report.out.duration, report.into.duration) = (start.elapsed(), start.elapsed());
        self.count_evicted(report.out.freed);
        self.count_onboarded(report.into.copied);
        outcome.map(|()| report)
    }

    fn check_swap(self: &Arc<Self>, out: &Region, into: &Region) -> Result<(), MemoryError> {
        let is_ours = |region: &Region| Arc::ptr_eq(region.manager(), self);
        if out.id() == into.id() {
            return Err(out.refuse("swap", "it cannot take its own place"));
        }
        if !is_ours(out) || !is_ours(into) {
            return Err(out.refuse("swap", "both regions have to be of this manager"));
        }
        if out.kind() != into.kind() {
            return Err(out.refuse("swap", "the other is of another kind, so that another lease pays for it"));
        }
        Ok(())
    }

    /// Gets the lease of what is lacking, then keeps steps and operations out. Neither gate nor turn is held while asking.
    fn enter_swap(
        &self,
        out: &Region,
        into: &Region,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<(Supply, Pass, Taken), MemoryError> {
        let lacking = || into.missing_bytes().saturating_sub(out.usage().device);
        loop {
            let needed = {
                // In turn: in the middle of an eviction bytes are missing whose lease is not given back yet.
                let _turn = self.take_turn(deadline)?;
                self.drop_idle_copies();
                lacking()
            };
            let wait = deadline.saturating_duration_since(Instant::now());
            let supply = into.ask(needed, wait, "a swap")?;
            let gate = self.take_gate(Scope::Pair(out.id(), into.id()), deadline, timeout)?;
            let turn = self.take_turn(deadline)?;
            if lacking() <= supply.bytes() {
                return Ok((supply, gate, turn));
            }
            if Instant::now() >= deadline {
                return Err(late(timeout));
            }
        }
    }

    /// Nothing has changed if there is no host room for it.
    fn plan_swap(
        &self,
        out: &Region,
        into: &Region,
        trust_clean: bool,
        deadline: Instant,
    ) -> Result<Plan, MemoryError> {
        into.check_missing_unmapped(ALL)?;
        // Copies of what may be written on the device go as it comes, and make room for those of what leaves.
        let recycled = into.writable_copies();
        let plan = |free| out.inner.state.lock().table.plan_evict(ALL, free);
        let mut leaving = plan(self.arena.free() + recycled);
        let mut unchecked = Vec::new();
        if !trust_clean {
            let checked_later = out.checked_as_they_leave(&leaving.moves);
            if let (None, Some(checked_later)) = (leaving.host_room_lacking(), checked_later) {
                unchecked = checked_later;
            } else {
                out.find_written(deadline)?;
                leaving = plan(self.arena.free() + recycled);
            }
        }
        if let Some(needed) = leaving.host_room_lacking() {
            self.make_host_room(leaving.copied + needed);
            leaving = plan(self.arena.free() + recycled);
        }
        if let Some(needed) = leaving.host_room_lacking() {
            let (free, budget) = (self.arena.free(), self.options.host_budget);
            return Err(MemoryError::HostBudget { needed: leaving.copied + needed, free, budget });
        }
        let coming = into.inner.state.lock().table.plan_restore(ALL);
        Ok(Plan { leaving: leaving.moves, unchecked, coming: coming.moves, coming_bytes: coming.bytes })
    }

    fn run_swap(
        &self,
        (out, into): (&Region, &Region),
        plan: Plan,
        supply: Supply,
        deadline: Instant,
        report: &mut SwapReport,
    ) -> Result<(), MemoryError> {
        let shared = Shared::default();
        let mut room = Room { manager: self, supply, freed: ByteCount::ZERO };
        let mut outgoing = Outgoing::checked(out, plan.leaving, plan.unchecked);
        let mut incoming = Incoming::new(into, plan.coming, &shared);
        let outcome = self.drive(into, &mut outgoing, &mut incoming, &mut room, deadline);
        let (left, copied) = outgoing.end(outcome.is_err());
        let Arrived { brought, leaving } = incoming.end();
        let mut refused = None;
        for resident in left {
            refused = refused.or(room.take(resident).err());
        }
        refused = refused.or(self.release_unused(leaving).error);
        into.drop_writable_copies(&brought);
        report.into.copied = brought.iter().map(|planned| planned.bytes).sum();
        let Released { freed, error } = room.close();
        (report.out.copied, report.out.freed) = (copied, freed);
        outcome.and(refused.or(error).map_or(Ok(()), Err))
    }

    fn drive(
        &self,
        into: &Region,
        outgoing: &mut Outgoing<'_>,
        incoming: &mut Incoming<'_>,
        room: &mut Room<'_>,
        deadline: Instant,
    ) -> Result<(), MemoryError> {
        let mut settled = 0;
        let start = Instant::now();
        while !(outgoing.is_done() && incoming.is_done()) {
            if Instant::now() >= deadline {
                return Err(late(start.elapsed()));
            }
            let mut has_moved = false;
            while let Some(resident) = outgoing.reap(Duration::ZERO)? {
                room.take(resident)?;
                has_moved = true;
            }
            while incoming.reap(Duration::ZERO)? {
                has_moved = true;
            }
            into.drop_writable_copies(&incoming.brought()[settled..]);
            settled = incoming.brought().len();
            let mut started = outgoing.start_next()?;
            if matches!(started, Started::Unchecked) && !outgoing.is_flying() && !incoming.is_flying() {
                started = outgoing.start_checked()?;
            }
            let lacking = if let Started::NoRoom(bytes) = started { bytes } else { ByteCount::ZERO };
            match started {
                Started::Free(resident) => {
                    room.take(resident)?;
                    has_moved = true;
                }
                Started::Queued => has_moved = true,
                Started::NoRoom(_) | Started::Full | Started::Unchecked | Started::Nothing => {}
            }
            has_moved |= incoming.start_next()?;
            if let Some(next) = incoming.next()
                && room.supply.bytes() >= next.bytes
            {
                let make = |extent, content| room.supply.map_settled(into, extent, content, deadline);
                has_moved |= incoming.map_next(make)?;
            }
            if has_moved {
                continue;
            }
            if outgoing.is_flying() {
                if let Some(resident) = outgoing.reap_one()? {
                    room.take(resident)?;
                }
            } else if incoming.is_flying() {
                incoming.reap_one()?;
            } else if !lacking.is_zero() {
                let (free, budget) = (self.arena.free(), self.options.host_budget);
                return Err(MemoryError::HostBudget { needed: lacking, free, budget });
            } else {
                return Err(into.refuse("swap", "the memory of what left is still held by somebody"));
            }
        }
        Ok(())
    }
}

fn late(waited: Duration) -> MemoryError {
    MemoryError::Deadline { doing: "a swap", waited }
}
