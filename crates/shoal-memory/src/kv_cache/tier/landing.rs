//! Memory that tiers read to on the way up, from which the device copies.
//!
//! Apart because a transfer that hangs keeps its memory for as long as it likes: each block has a buffer of its own, and one
//! that somebody still has is not used again, nor waited for. Nothing is taken before the first load that needs it.

use std::sync::Arc;

use shoal_core::bytes::ByteCount;
use shoal_core::store::format::padded;
use shoal_device::{Device, HostBacking, HostBuffer, HostSlab};

use crate::error::MemoryError;
use crate::store::Buffer;

/// Below this, huge pages would be mostly waste.
const HUGE_BYTES_MIN: ByteCount = ByteCount::mib(2);

/// Buffers of one length.
#[derive(Debug)]
pub(super) struct Landing {
    device: Arc<dyn Device>,
    slot_bytes: ByteCount,
    count: usize,
    free: Vec<Arc<HostBuffer>>,
}

impl Landing {
    /// For so many blocks at a time.
    pub(super) fn new(device: &Arc<dyn Device>, block_bytes: usize, count: usize) -> Self {
        let slot_bytes = ByteCount(padded(block_bytes as u64));
        Self { device: Arc::clone(device), slot_bytes, count, free: Vec::new() }
    }

    /// Memory for a block, to be written, and what to [`give`](Self::give) back.
    ///
    /// # Errors
    /// `Device`: there is no host memory.
    pub(super) fn take(&mut self) -> Result<(Arc<HostBuffer>, Buffer), MemoryError> {
        loop {
            let Some(slot) = self.free.pop() else {
                self.make()?;
                continue;
            };
            // Else it is a transfer's that does not end: it goes when that does.
            if let Ok(view) = slot.view_mut(ByteCount::ZERO, slot.bytes()) {
                return Ok((slot, Buffer::HostMut(view)));
            }
        }
    }

    /// Takes memory back. It may be somebody's still.
    pub(super) fn give(&mut self, slot: Arc<HostBuffer>) {
        if self.free.len() < self.count {
            // Behind the others, so that it is used last.
            self.free.insert(0, slot);
        }
    }

    /// The same, where there is one.
    pub(super) fn give_all(&mut self, slot: Option<Arc<HostBuffer>>) {
        if let Some(slot) = slot {
            self.give(slot);
        }
    }

    fn make(&mut self) -> Result<(), MemoryError> {
        let failed = |source| MemoryError::Device { doing: "allocate host memory for blocks", source };
        let bytes = ByteCount(self.slot_bytes.0 * self.count as u64);
        let backing = if bytes < HUGE_BYTES_MIN { HostBacking::SmallPages } else { HostBacking::HugePages };
        let slab = HostSlab::allocate(&self.device, bytes, backing).map_err(failed)?;
        if let Err(error) = slab.lock() {
            tracing::warn!(%error, "host memory is not page-locked, so blocks come up slower");
        }
        for number in 0..self.count as u64 {
            let slot = slab.buffer(ByteCount(number * self.slot_bytes.0), self.slot_bytes, ());
            self.free.push(slot.map_err(failed)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use shoal_device::{SimDevice, SimOptions};

    use super::*;

    #[test]
    fn what_somebody_keeps_is_not_used_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let options = SimOptions::new(ByteCount::mib(16), dir.path());
        let device: Arc<dyn Device> = SimDevice::open(options).expect("a device");
        let mut landing = Landing::new(&device, 5000, 2);
        let (hung, memory) = landing.take().expect("memory");
        let (other, fine) = landing.take().expect("memory");
        assert_eq!(hung.bytes(), ByteCount(8192));
        landing.give(Arc::clone(&hung));
        drop(fine);
        landing.give(Arc::clone(&other));
        // The one that is free, and a new one.
        let again: Vec<_> = (0..2).map(|_| landing.take().expect("memory")).collect();
        assert!(again.iter().all(|(slot, _)| !Arc::ptr_eq(slot, &hung)));
        drop(memory);
    }
}
