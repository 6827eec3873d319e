//! Device memory by range: zeroed now, or gone. For KV, for workspaces, and for weights that an engine writes itself.

use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::extent::{Extent, PageRun};
use shoal_core::ids::ExtentIndex;
use shoal_core::page_table::PlannedMove;
use shoal_core::residency::Move;
use shoal_core::tier::Tier;

use super::Region;
use crate::error::MemoryError;
use crate::retire::{Lingering, Released, Resident};
use crate::supply::{Content, Supply};
use crate::turn::Taken;

/// How soon it is looked again whether what was given up is unmapped, at first and at most.
pub(super) const NAP: Duration = Duration::from_millis(1);
pub(super) const NAP_MAX: Duration = Duration::from_millis(50);

impl Region {
    /// Gives the pages that the range touches zeroed device memory, where they have none. All or nothing. What was given up
    /// there and is held still, as by a copy or by being zeroed, is waited for as a lease is: as long as that may take, both
    /// together.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::State`] where a KV cache lies in it, [`MemoryError::Lease`],
    /// [`MemoryError::StillMapped`], [`MemoryError::Device`]; nothing is changed.
    pub fn commit(&self, offset: ByteCount, bytes: ByteCount) -> Result<ByteCount, MemoryError> {
        self.check_range(offset, bytes)?;
        self.check_no_cache("commit")?;
        let run = PageRun::covering(offset, bytes);
        let deadline = Instant::now() + self.manager().options.lease_wait;
        let wanted = {
            let _turn = self.take_turn_to_map(&[run], deadline)?;
            self.wanted_extents(&[run])?
        };
        let mut supply = self.supply(wanted, Content::Zeroed, deadline, "memory for a range")?;
        let _turn = self.take_turn_to_map(&[run], deadline)?;
        self.commit_in_turn(&[run], &mut supply)
    }

    /// [`commit`](Self::commit) of whole pages by a deadline, and only while nothing of the region is off the device. It
    /// fences nothing, since a graph may be captured, and zeroes nothing: torch, like the driver, promises nothing about
    /// the bytes of new memory, and the frames of a pool are this process's own (I12). What was given up there is not waited
    /// for: torch may have other addresses.
    pub(crate) fn commit_by(&self, run: PageRun, deadline: Instant) -> Result<(), MemoryError> {
        let wanted = {
            let _turn = self.manager().take_turn_only(deadline)?;
            if !self.missing_bytes().is_zero() {
                return Err(self.refuse("take memory for torch", "the region is asleep; wake it first"));
            }
            self.check_unmapped(&[run])?;
            self.wanted_extents(&[run])?
        };
        if wanted.is_empty() {
            return Ok(());
        }
        let until = deadline.min(Instant::now() + self.manager().options.lease_wait);
        let mut supply = self.supply(wanted, Content::Any, until, "torch's memory")?;
        let _turn = self.manager().take_turn_only(deadline)?;
        self.commit_in_turn_as(&[run], &mut supply, Content::Any).map(drop)
    }

    /// Takes the device memory and the bytes of every extent that lies wholly within the range. The memory is kept for the
    /// next growth, leased as before, for a while and within bounds ([`crate::pool`]). Returns how many device bytes the
    /// region gave up.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::State`] for sealed weights and where a KV cache lies in it; nothing is
    /// changed. [`MemoryError::Device`]
    /// where the device refuses to give memory up: the bytes are gone, and the next operation asks for the memory again.
    pub fn decommit(&self, offset: ByteCount, bytes: ByteCount) -> Result<ByteCount, MemoryError> {
        self.check_range(offset, bytes)?;
        self.check_no_cache("decommit")?;
        if self.inner.state.lock().sealed {
            return Err(self.refuse("decommit", "it is sealed; put it to sleep instead"));
        }
        let _turn = self.manager().take_turn(self.manager().operation_deadline())?;
        self.manager().fence(self.manager().operation_deadline())?;
        self.decommit_to_pool(PageRun::covering(offset, bytes), true)
    }

    /// Bytes that committing these runs would take.
    pub(crate) fn uncommitted(&self, runs: &[PageRun]) -> Result<ByteCount, MemoryError> {
        Ok(self.wanted_extents(runs)?.into_iter().sum())
    }

    /// The sizes of the extents that committing these runs would map.
    pub(crate) fn wanted_extents(&self, runs: &[PageRun]) -> Result<Vec<ByteCount>, MemoryError> {
        let state = self.inner.state.lock();
        let mut wanted = Vec::new();
        for run in runs {
            for free in state.table.uncovered(*run).map_err(self.table_error())? {
                wanted.extend(state.table.cut(free).into_iter().map(Extent::bytes));
            }
            for index in state.table.extents_touching(*run).map_err(self.table_error())? {
                let (extent, residency) = state.table.extent(index).map_err(self.table_error())?;
                if residency.valid().is_empty() {
                    wanted.push(extent.bytes());
                }
            }
        }
        Ok(wanted)
    }

    pub(crate) fn commit_in_turn(
        &self,
        runs: &[PageRun],
        supply: &mut Supply,
    ) -> Result<ByteCount, MemoryError> {
        self.commit_in_turn_as(runs, supply, Content::Zeroed)
    }

    fn commit_in_turn_as(
        &self,
        runs: &[PageRun],
        supply: &mut Supply,
        content: Content,
    ) -> Result<ByteCount, MemoryError> {
        self.check_unmapped(runs)?;
        let (inserted, empty) = self.enter_extents(runs)?;
        let mut committed: Vec<ExtentIndex> = Vec::new();
        let mut bytes = ByteCount::ZERO;
        let mut failed = None;
        for index in &empty {
            match self.commit_extent(*index, supply, content) {
                Ok(more) => {
                    bytes += more;
                    committed.push(*index);
                }
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        // What is mapped next is mapped while the last is zeroed; all of it is zero when this returns.
        let settled = supply.settle(self.manager().operation_deadline());
        let Some(error) = failed.or(settled.err()) else { return Ok(bytes) };
        let mut residents = Vec::new();
        let mut state = self.inner.state.lock();
        for index in committed.iter().chain(&inserted) {
            let Ok((extent, _)) = state.table.extent(*index) else { continue };
            if state.table.take_out(*index).is_ok() {
                residents.extend(state.slots.remove(index).and_then(|slot| slot.resident));
                if !inserted.contains(index) {
                    // It was there without bytes before; the run is one extent long, so it comes back the same.
                    state.table.insert(extent.run()).map_err(self.table_error())?;
                }
            }
        }
        drop(state);
        // What the device refused is told already, and kept.
        let _ = self.manager().release_unused(residents);
        Err(error)
    }

    /// Gives the memory back to the device. Needs the turn, and that what steps have queued is done.
    pub(crate) fn decommit_in_turn(&self, run: PageRun) -> Result<ByteCount, MemoryError> {
        let released = self.manager().release_unused(self.take_residents(run)?);
        released.error.map_or(Ok(released.freed), Err)
    }

    /// As [`decommit_in_turn`](Self::decommit_in_turn), and keeps the memory for the next growth, zeroed if `is_zeroed`:
    /// that waits for the device.
    pub(crate) fn decommit_to_pool(&self, run: PageRun, is_zeroed: bool) -> Result<ByteCount, MemoryError> {
        let residents = self.take_residents(run)?;
        let Released { freed, error } = self.manager().pool_unused(residents, is_zeroed);
        error.map_or(Ok(freed), Err)
    }

    /// Takes the turn when nothing is mapped in these runs that the region has given up. It is waited for where something
    /// holds it, without the turn; where the device refused to unmap it, waiting is no use.
    ///
    /// # Errors
    /// [`MemoryError::StillMapped`], [`MemoryError::Deadline`].
    pub(crate) fn take_turn_to_map(&self, runs: &[PageRun], deadline: Instant) -> Result<Taken, MemoryError> {
        let (start, mut nap) = (Instant::now(), NAP);
        loop {
            let turn = self.manager().take_turn(self.manager().operation_deadline())?;
            match self.lingering(runs) {
                None => return Ok(turn),
                Some(Lingering::Held) if Instant::now() < deadline => {}
                Some(_) => return Err(self.still_mapped(start.elapsed())),
            }
            drop(turn);
            thread::sleep(nap);
            nap = (nap * 2).min(NAP_MAX);
        }
    }

    fn check_unmapped(&self, runs: &[PageRun]) -> Result<(), MemoryError> {
        self.lingering(runs).map_or(Ok(()), |_| Err(self.still_mapped(Duration::ZERO)))
    }

    pub(super) fn still_mapped(&self, waited: Duration) -> MemoryError {
        MemoryError::StillMapped { region: self.name().to_owned(), waited }
    }

    /// Why pages of these runs are mapped although the region has given them up: something holds them still, or the device
    /// does. `None`: none are. Needs the turn.
    pub(crate) fn lingering(&self, runs: &[PageRun]) -> Option<Lingering> {
        let why = |run: &PageRun| {
            let offset = ByteCount(run.first * PAGE_BYTES.0);
            self.manager().lingering_within(self.reservation(), offset, run.bytes())
        };
        runs.iter().filter_map(why).max()
    }

    fn take_residents(&self, run: PageRun) -> Result<Vec<Resident>, MemoryError> {
        let is_carved = !self.inner.is_growing;
        let mut slots = Vec::new();
        {
            let mut state = self.inner.state.lock();
            for index in state.table.extents_within(run).map_err(self.table_error())? {
                let (extent, _) = state.table.take_out(index).map_err(self.table_error())?;
                slots.extend(state.slots.remove(&index));
                if is_carved {
                    state.table.insert(extent.run()).map_err(self.table_error())?;
                }
            }
        }
        Ok(slots.into_iter().filter_map(|slot| slot.resident).collect())
    }

    /// The extents of these runs that have no bytes, and those of them that are new in the table.
    fn enter_extents(&self, runs: &[PageRun]) -> Result<(Vec<ExtentIndex>, Vec<ExtentIndex>), MemoryError> {
        let mut state = self.inner.state.lock();
        let (mut inserted, mut empty) = (Vec::new(), Vec::new());
        for run in runs {
            for free in state.table.uncovered(*run).map_err(self.table_error())? {
                inserted.extend(state.table.insert(free).map_err(self.table_error())?);
            }
            for index in state.table.extents_touching(*run).map_err(self.table_error())? {
                if state.table.extent(index).is_ok_and(|(_, residency)| residency.valid().is_empty()) {
                    empty.push(index);
                }
            }
        }
        Ok((inserted, empty))
    }

    fn commit_extent(
        &self,
        index: ExtentIndex,
        supply: &mut Supply,
        content: Content,
    ) -> Result<ByteCount, MemoryError> {
        let extent = {
            let mut state = self.inner.state.lock();
            let (extent, _) = state.table.extent(index).map_err(self.table_error())?;
            let zero = PlannedMove { extent: index, step: Move::Zero, bytes: extent.bytes() };
            state.table.begin(zero).map_err(self.table_error())?
        };
        let mapped = supply.map(self, extent, content);
        let mut state = self.inner.state.lock();
        match mapped {
            Ok(resident) => {
                state.slot(index).resident = Some(resident);
                // Whatever a file said of these bytes, they will be written on the device.
                state.sources.write(extent.offset().0, extent.bytes().0, None);
                state.table.finish(index).map_err(self.table_error())?;
                debug_assert!(state.table.extent(index).is_ok_and(|(_, now)| now.valid().has(Tier::Device)));
                Ok(extent.bytes())
            }
            Err(error) => {
                state.table.abort(index).map_err(self.table_error())?;
                Err(error)
            }
        }
    }
}
