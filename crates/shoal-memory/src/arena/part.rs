//! Memory of an arena that whoever has it divides by himself.
//!
//! Apart from [`HostCopy`](super::HostCopy), which is one thing that may be moved to make room: what is divided stays where
//! it is, and goes back whole, when whoever has it drops it and every buffer of it is gone.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_device::{DeviceError, HostBuffer, HostSlab};

use super::copy::Claim;
use super::{Core, Filled, HostArena};
use crate::error::MemoryError;

/// How long an arena that is divided waits for memory: whoever asks goes on without.
const PART_WAIT: Duration = Duration::from_secs(2);

/// A piece of one slab. Dropping it gives the piece back: not before its buffers are gone.
#[derive(Debug)]
pub(crate) struct ArenaPart {
    claim: Claim,
    memory: Arc<HostSlab>,
}

impl ArenaPart {
    /// Its length: at least what was asked for.
    pub(crate) fn bytes(&self) -> ByteCount {
        self.claim.part().bytes()
    }

    /// A buffer in it; `claim` is dropped when that and all jobs that touch it are gone.
    pub(crate) fn buffer(
        &self,
        offset: ByteCount,
        bytes: ByteCount,
        claim: impl Any + Send + Sync,
    ) -> Result<Arc<HostBuffer>, DeviceError> {
        self.memory.buffer(self.claim.part().offset() + offset, bytes, claim)
    }
}

impl HostArena {
    /// Another arena of the same device, with a budget of its own, that waits no longer for memory than a step can.
    pub(crate) fn another(&self, budget: ByteCount) -> Arc<Self> {
        let Core { device, wait, source, .. } = &*self.core;
        Self::new(Arc::clone(device), budget, (*wait).min(PART_WAIT), source.clone())
    }

    /// Memory to be divided, page-locked if that is allowed; it may hold anything.
    ///
    /// # Errors
    /// As [`HostArena::allocate`].
    pub(crate) fn take(&self, bytes: ByteCount) -> Result<ArenaPart, MemoryError> {
        let deadline = Instant::now() + self.core.wait;
        let (claim, memory, _) = self.obtain_memory(bytes, Filled::ByDevice, deadline)?;
        Ok(ArenaPart { claim, memory })
    }
}
