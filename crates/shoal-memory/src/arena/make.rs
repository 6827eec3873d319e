//! Making slabs, and making room in them.
//!
//! Apart because these calls take long: each is made by one thread at a time (`is_making`), with no lock held.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::ids::SlabId;
use shoal_core::slabs::{Order, Part, RoomPlan, bytes_of};
use shoal_device::host::survey;
use shoal_device::{DeviceError, HostSlab};

use super::{Core, Going, Lock, Slab, State, index_of};
use crate::error::MemoryError;
use crate::slab_source::LentSlab;

/// Memory is made ahead only while so many times as much is left on the machine.
const AVAILABLE_TIMES: u64 = 4;

/// How long a slab is waited for that somebody may lend.
const LEND_WAIT: Duration = Duration::from_secs(2);

/// Memory for a slab.
struct Made {
    memory: Arc<HostSlab>,
    lent: Option<u64>,
    is_zeroed: bool,
}

impl Core {
    /// Makes a part of this length possible, or a step towards it: a new slab, or copies moved together. On an error what
    /// there was is there still.
    pub(super) fn make_room(self: &Arc<Self>, order: Order, bytes: ByteCount) -> Result<(), MemoryError> {
        let left = self.state.lock().left_pages(self.budget_pages());
        if left >> order > 0 {
            return self.make_slab_for(order, left);
        }
        let (space, places) = {
            let state = self.state.lock();
            let places = state.copies.iter().filter_map(|(part, place)| Some((*part, place.upgrade()?)));
            (state.space.clone(), places.collect::<Vec<_>>())
        };
        // Not under the lock: what is dropped here may be the last that holds a copy, whose claim takes that lock.
        let idle = places.into_iter().filter(|(_, place)| place.is_idle());
        let movable: BTreeSet<Part> = idle.map(|(part, _)| part).collect();
        let Some(plan) = space.plan_room(order, left, |part| movable.contains(&part)) else {
            return Err(self.no_room(&self.state.lock(), bytes));
        };
        let RoomPlan { moves, slabs_given_back, slab_made } = plan;
        tracing::debug!(moves = moves.len(), slabs = slabs_given_back.len(), "making room in host memory");
        if !moves.into_iter().all(|step| self.relocate(step)) {
            // Somebody took hold of what was idle a moment ago, or of a place: the next plan knows of it.
            return Ok(());
        }
        self.wait_at_rest(&slabs_given_back);
        self.give_slabs_back(&slabs_given_back);
        let left = self.state.lock().left_pages(self.budget_pages());
        match slab_made {
            // One that is being locked did not go yet: once more.
            Some(order) if left >> order > 0 => self.make_slab(order, false),
            _ => Ok(()),
        }
    }

    /// A slab for somebody who waits for it: longer than needed if that is cheap, so that slabs stay few.
    fn make_slab_for(self: &Arc<Self>, needed: Order, left: u64) -> Result<(), MemoryError> {
        let pages = self.state.lock().space.pages().max(1);
        let wanted = pages.ilog2().clamp(self.steps.first, self.steps.waiting_max.max(self.steps.first));
        let order = wanted.min(left.ilog2()).max(needed);
        if order > needed && has_ram_for(order) && self.make_slab(order, false).is_ok() {
            return Ok(());
        }
        self.make_slab(needed, false)
    }

    /// Makes a slab and, unless it is long, locks it. `is_ahead`: nobody waits, so a failure only has a reason.
    pub(super) fn make_slab(self: &Arc<Self>, order: Order, is_ahead: bool) -> Result<(), MemoryError> {
        self.state.lock().outside_pages += 1 << order;
        let made = self.allocate_slab(order);
        let lock = match &made {
            Ok(made) if order < self.steps.keeper_min => self.lock_memory(&made.memory),
            _ => Lock::Wanted,
        };
        let mut state = self.state.lock();
        state.outside_pages -= 1 << order;
        let Made { memory, lent, is_zeroed } = match made {
            Ok(made) => made,
            Err(source) => {
                if is_ahead {
                    state.give_reason(format!("memory is not made ahead of use: {source}"));
                }
                return Err(MemoryError::Device { doing: "allocate host memory", source });
            }
        };
        state.slabs_made += 1;
        let id = SlabId(state.slabs_made);
        let touched = vec![!is_zeroed; index_of(1 << order)];
        // Its time runs from when it was made: what was expected may never come.
        let empty_since = Some(Instant::now());
        state.slabs.insert(id, Slab { memory, order, lock, lent, touched, empty_since });
        state.space.add(id, order);
        self.call_keeper(state);
        Ok(())
    }

    /// Long slabs are borrowed where somebody lends them. Where that fails, the process makes its own.
    fn borrow_slab(&self, order: Order) -> Option<Made> {
        let source = self.source.as_ref().filter(|_| order >= self.steps.keeper_min)?;
        let borrowed = source.borrow_slab(bytes_of(order), LEND_WAIT).and_then(|lent| {
            let LentSlab { slab, file, is_zeroed } = lent;
            let adopted = HostSlab::adopt(&self.device, &file).map_err(|error| {
                source.return_slab(slab);
                error.to_string()
            });
            adopted.map(|memory| Made { memory, lent: Some(slab), is_zeroed })
        });
        let reason = match &borrowed {
            Ok(_) => "it is lent by the server, by descriptor".to_owned(),
            Err(why) => format!("it is this process's own, since none was lent: {why}"),
        };
        self.state.lock().give_reason(reason);
        borrowed.ok()
    }

    /// Tells whoever lent a slab that it is not needed any more.
    pub(super) fn return_lent(&self, lent: Option<u64>) {
        if let (Some(slab), Some(source)) = (lent, &self.source) {
            source.return_slab(slab);
        }
    }

    fn allocate_slab(&self, order: Order) -> Result<Made, DeviceError> {
        if let Some(made) = self.borrow_slab(order) {
            return Ok(made);
        }
        let bytes = bytes_of(order);
        // What this machine has, the fastest first; what it refused once is not tried again.
        let candidates = survey().backings(bytes);
        let skipped = self.state.lock().backings_refused.min(candidates.len() - 1);
        let last = candidates.len() - 1;
        for (index, (backing, reason)) in candidates.into_iter().enumerate().skip(skipped) {
            match HostSlab::allocate(&self.device, bytes, backing) {
                Ok(memory) => {
                    self.state.lock().give_reason(format!("it is made of {reason}"));
                    return Ok(Made { memory, lent: None, is_zeroed: true });
                }
                // The machine has no such memory, whatever its settings say.
                Err(error @ DeviceError::System { .. }) if index < last => {
                    let mut state = self.state.lock();
                    state.backings_refused = index + 1;
                    state.give_reason(format!("{backing:?} cannot be had: {error}"));
                }
                Err(error) => return Err(error),
            }
        }
        // The last one returns above.
        Err(DeviceError::Misaligned { what: "host memory of bytes", value: bytes.0, granularity: PAGE_BYTES })
    }

    /// Waits until nobody locks these slabs.
    pub(super) fn wait_at_rest(&self, slabs: &[SlabId]) {
        let deadline = Instant::now() + self.wait;
        let mut state = self.state.lock();
        let is_at_rest = |state: &State| {
            let mut locks = slabs.iter().filter_map(|id| state.slabs.get(id)).map(|slab| slab.lock);
            locks.all(|lock| lock != Lock::UnderWay)
        };
        while !is_at_rest(&state) && !self.changed.wait_until(&mut state, deadline).timed_out() {}
    }

    /// Gives slabs back of which nobody has anything; the others stay.
    pub(super) fn give_slabs_back(&self, slabs: &[SlabId]) {
        let gone: Vec<Going> = {
            let mut state = self.state.lock();
            let mut gone = Vec::new();
            for id in slabs {
                // One that is being locked is left alone until that is done.
                let is_at_rest = state.slabs.get(id).is_some_and(|slab| slab.lock != Lock::UnderWay);
                if is_at_rest && state.space.remove(*id) {
                    gone.extend(state.slabs.remove(id).map(|slab| {
                        let Slab { memory, order, lent, .. } = slab;
                        Going { memory, order, lent }
                    }));
                }
            }
            state.outside_pages += gone.iter().map(|going| 1 << going.order).sum::<u64>();
            gone
        };
        self.free_slabs(gone);
    }

    /// Asks the device again to take back what it refused.
    pub(super) fn ask_again(&self) {
        let refused = {
            let mut state = self.state.lock();
            if state.refused.is_empty() {
                return;
            }
            state.outside_pages += state.refused_pages();
            std::mem::take(&mut state.refused)
        };
        self.free_slabs(refused);
    }

    /// Gives memory back that counts as outside.
    fn free_slabs(&self, slabs: Vec<Going>) {
        for Going { memory, order, lent } in slabs {
            let freed = memory.give_back();
            let mut state = self.state.lock();
            state.outside_pages -= 1 << order;
            match freed {
                // Held: by a buffer on its way out, which takes the slab with it.
                Ok(()) | Err((_, DeviceError::InUse { .. })) => {
                    drop(state);
                    self.return_lent(lent);
                }
                Err((memory, error)) => {
                    tracing::error!(%error, "the device does not give host memory back; it is asked again");
                    state.refused.push(Going { memory, order, lent });
                }
            }
        }
    }
}

/// Whether the machine has so much more that making it ahead takes nothing from anybody.
pub(super) fn has_ram_for(order: Order) -> bool {
    let wanted = ByteCount(bytes_of(order).0.saturating_mul(AVAILABLE_TIMES));
    survey().available.is_none_or(|available| available >= wanted)
}
