//! Device memory by range: zeroed now, or gone. For KV, for workspaces, and for weights that an engine writes itself.

use std::time::Instant;

use shoal_core::bytes::ByteCount;
use shoal_core::extent::PageRun;
use shoal_core::ids::ExtentIndex;
use shoal_core::page_table::PlannedMove;
use shoal_core::residency::Move;
use shoal_core::tier::Tier;

use super::Region;
use crate::error::MemoryError;
use crate::lease::Grant;

impl Region {
    /// Gives the pages that the range touches zeroed device memory, where they have none. All or nothing.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::Lease`], [`MemoryError::Device`]; nothing is changed.
    pub fn commit(&self, offset: ByteCount, bytes: ByteCount) -> Result<ByteCount, MemoryError> {
        self.check_range(offset, bytes)?;
        let run = PageRun::covering(offset, bytes);
        let needed = {
            let _turn = self.manager().take_turn(self.manager().operation_deadline())?;
            self.uncommitted(&[run])?
        };
        let mut grant = self.ask(needed, self.manager().options.lease_wait, "memory for a range")?;
        let _turn = self.manager().take_turn(self.manager().operation_deadline())?;
        self.commit_in_turn(&[run], &mut grant)
    }

    /// [`commit`](Self::commit) of whole pages by a deadline, and only while nothing of the region is off the device. It
    /// fences nothing: a graph may be captured.
    pub(crate) fn commit_by(&self, run: PageRun, deadline: Instant) -> Result<(), MemoryError> {
        let needed = {
            let _turn = self.manager().take_turn_only(deadline)?;
            if !self.missing_bytes().is_zero() {
                return Err(self.refuse("take memory for torch", "the region is asleep; wake it first"));
            }
            self.uncommitted(&[run])?
        };
        if needed.is_zero() {
            return Ok(());
        }
        let wait = self.manager().options.lease_wait.min(deadline.saturating_duration_since(Instant::now()));
        let mut grant = self.ask(needed, wait, "torch's memory")?;
        let _turn = self.manager().take_turn_only(deadline)?;
        self.commit_in_turn(&[run], &mut grant).map(drop)
    }

    /// Takes the device memory and the bytes of every extent that lies wholly within the range. Returns the device
    /// bytes freed.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::State`] for sealed weights; nothing is changed. [`MemoryError::Device`]
    /// where the device refuses to give memory up: the bytes are gone, and the next operation asks for the memory again.
    pub fn decommit(&self, offset: ByteCount, bytes: ByteCount) -> Result<ByteCount, MemoryError> {
        self.check_range(offset, bytes)?;
        if self.inner.state.lock().sealed {
            return Err(self.refuse("decommit", "it is sealed; put it to sleep instead"));
        }
        let _turn = self.manager().take_turn(self.manager().operation_deadline())?;
        self.manager().fence(self.manager().operation_deadline())?;
        self.decommit_in_turn(PageRun::covering(offset, bytes))
    }

    /// Bytes that committing these runs would take.
    pub(crate) fn uncommitted(&self, runs: &[PageRun]) -> Result<ByteCount, MemoryError> {
        let state = self.inner.state.lock();
        let mut needed = ByteCount::ZERO;
        for run in runs {
            for free in state.table.uncovered(*run).map_err(self.table_error())? {
                needed += free.bytes();
            }
            for index in state.table.extents_touching(*run).map_err(self.table_error())? {
                let (extent, residency) = state.table.extent(index).map_err(self.table_error())?;
                if residency.valid().is_empty() {
                    needed += extent.bytes();
                }
            }
        }
        Ok(needed)
    }

    pub(crate) fn commit_in_turn(
        &self,
        runs: &[PageRun],
        grant: &mut Grant,
    ) -> Result<ByteCount, MemoryError> {
        let (inserted, empty) = self.enter_extents(runs)?;
        let mut committed: Vec<ExtentIndex> = Vec::new();
        let mut bytes = ByteCount::ZERO;
        let mut failed = None;
        for index in &empty {
            match self.commit_extent(*index, grant) {
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
        let Some(error) = failed else { return Ok(bytes) };
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

    /// Needs the turn, and that what steps have queued is done.
    pub(crate) fn decommit_in_turn(&self, run: PageRun) -> Result<ByteCount, MemoryError> {
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
        let released = self.manager().release_unused(slots.into_iter().filter_map(|slot| slot.resident));
        released.error.map_or(Ok(released.freed), Err)
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

    fn commit_extent(&self, index: ExtentIndex, grant: &mut Grant) -> Result<ByteCount, MemoryError> {
        let extent = {
            let mut state = self.inner.state.lock();
            let (extent, _) = state.table.extent(index).map_err(self.table_error())?;
            let zero = PlannedMove { extent: index, step: Move::Zero, bytes: extent.bytes() };
            state.table.begin(zero).map_err(self.table_error())?
        };
        let mapped = self.map_extent(extent, grant);
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
