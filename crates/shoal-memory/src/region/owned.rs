//! A region that sleeps and wakes by its owner's word alone, and grows between: what an owner outside says and asks.
//!
//! Apart because nothing else needs it: who uses such a region holds no guards, so it must never yield by itself, and it
//! is never declared whole, so its copies off the device are kept or forgotten as its owner says.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::tier::Tier;
use shoal_device::HostView;

use super::{Region, RegionUse, SealReport};
use crate::arena::HostCopy;
use crate::error::MemoryError;

impl Region {
    /// Whether it may lose memory without its owner's word. It may, unless somebody says no.
    pub fn set_yields(&self, yields: bool) {
        self.inner.stays.store(!yields, Ordering::Release);
    }

    /// Keeps the memory of what is freed until the answer is dropped: for whoever copies to or from addresses of it,
    /// beside threads that free.
    ///
    /// # Errors
    /// [`MemoryError::Deadline`].
    pub fn hold_memory(&self, timeout: Duration) -> Result<RegionUse, MemoryError> {
        // In turn, so that nobody is in the middle of freeing.
        let _turn = self.manager().take_turn(Instant::now() + timeout)?;
        self.inner.holds.fetch_add(1, Ordering::AcqRel);
        Ok(RegionUse { region: self.clone(), is_hold: true })
    }

    pub(crate) fn is_held(&self) -> bool {
        self.inner.holds.load(Ordering::Acquire) > 0
    }

    /// Records the checksums of what has none yet, after what is queued on the device: a sleep then keeps the copies that
    /// are as the device has it, and copies the rest. Unlike a freeze it copies nothing and ends nothing: the region may
    /// grow afterwards.
    ///
    /// # Errors
    /// [`MemoryError::State`] while somebody fills it or it is asleep, [`MemoryError::Deadline`], and what reading the
    /// bytes fails with.
    pub fn record_checksums(&self, timeout: Duration) -> Result<SealReport, MemoryError> {
        if self.is_in_use() {
            return Err(self.refuse("record checksums", "somebody fills it right now (use_region)"));
        }
        if !self.missing_bytes().is_zero() {
            return Err(self.refuse("record checksums", "it is asleep; wake it first"));
        }
        self.manager().fence(Instant::now() + timeout)?;
        self.seal_more()
    }

    /// Forgets checksums and every copy off the device: from here on only the device has the bytes. Returns the bytes of
    /// host memory that became free.
    ///
    /// # Errors
    /// [`MemoryError::State`] while bytes of it are not on the device: nothing is changed (I6).
    pub fn forget_copies(&self) -> Result<ByteCount, MemoryError> {
        let _turn = self.manager().take_turn(self.manager().operation_deadline())?;
        let mut freed = Vec::new();
        let mut state = self.inner.state.lock();
        if !state.table.missing_bytes().is_zero() {
            drop(state);
            return Err(self.refuse("forget copies", "it is asleep, and its bytes are nowhere else"));
        }
        let extents: Vec<_> = state.table.extents().collect();
        for (index, extent, residency) in extents {
            if residency.valid().has(Tier::Device) && !residency.valid().without(Tier::Device).is_empty() {
                state.table.written(index).map_err(self.table_error())?;
                state.sources.write(extent.offset().0, extent.bytes().0, None);
            }
            let slot = state.slot(index);
            slot.hash = None;
            freed.extend(slot.host.take());
            freed.extend(slot.unfinished.take());
        }
        state.sealed = false;
        drop(state);
        Ok(freed.iter().map(|copy: &HostCopy| copy.buffer().bytes()).sum())
    }

    /// The bytes from `offset` on as the host copy of their extent has them, at most `bytes_max`; `None` where there is
    /// no such copy. While the answer lives these bytes stay as they are, also if the region lets go of them.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::Device`] while something writes them.
    pub fn host_view(
        &self,
        offset: ByteCount,
        bytes_max: ByteCount,
    ) -> Result<Option<HostView>, MemoryError> {
        self.check_range(offset, bytes_max)?;
        let found = {
            let state = self.inner.state.lock();
            state.table.extent_at(offset.0 / PAGE_BYTES.0).and_then(|index| {
                let (extent, residency) = state.table.extent(index).ok()?;
                let host = state.slots.get(&index)?.host.as_ref()?;
                residency.valid().has(Tier::Host).then(|| (extent, host.buffer()))
            })
        };
        let Some((extent, buffer)) = found else { return Ok(None) };
        let within = offset - extent.offset();
        let bytes = (extent.bytes() - within).min(bytes_max);
        buffer.view(within, bytes).map(Some).map_err(MemoryError::device("read host memory"))
    }

    /// Offset and length of what lies on the device, extent by extent, by address.
    #[must_use]
    pub fn resident_ranges(&self) -> Vec<(ByteCount, ByteCount)> {
        let state = self.inner.state.lock();
        let extents = state.table.extents().filter(|(_, _, residency)| residency.valid().has(Tier::Device));
        let mut ranges: Vec<_> = extents.map(|(_, extent, _)| (extent.offset(), extent.bytes())).collect();
        ranges.sort_unstable();
        ranges
    }
}

/// Host memory of a copy that is stale, for the next copy of the same extent; nothing if somebody still reads it.
pub(super) fn reusable(copy: Option<HostCopy>, bytes: ByteCount) -> Option<HostCopy> {
    copy.filter(|copy| copy.buffer().bytes() == bytes && copy.is_idle())
}
