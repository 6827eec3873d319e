//! The host tier's memory: buffers that the device can copy from and to, within a budget (I1).
//!
//! Apart because a buffer outlives its copy twice: a job on a stream may still hold it (then it may not be reused, I5),
//! and freed buffers of common sizes are kept for the next copy of that size.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_device::{Device, HostBuffer};

use crate::error::MemoryError;

#[derive(Debug, Default)]
struct State {
    /// Bytes of buffers that hold copies.
    used: ByteCount,
    /// Freed buffers by size.
    spare: BTreeMap<u64, Vec<Arc<HostBuffer>>>,
    spare_bytes: ByteCount,
    /// Freed, but a job may still touch them.
    lingering: Vec<Arc<HostBuffer>>,
}

impl State {
    fn sweep(&mut self) {
        for buffer in std::mem::take(&mut self.lingering) {
            if Arc::strong_count(&buffer) == 1 {
                self.keep(buffer);
            } else {
                self.lingering.push(buffer);
            }
        }
    }

    fn keep(&mut self, buffer: Arc<HostBuffer>) {
        self.spare_bytes += buffer.bytes();
        self.spare.entry(buffer.bytes().0).or_default().push(buffer);
    }

    fn take_spare(&mut self, bytes: ByteCount) -> Option<Arc<HostBuffer>> {
        let buffer = self.spare.get_mut(&bytes.0)?.pop()?;
        self.spare_bytes -= bytes;
        Some(buffer)
    }

    fn lingering_bytes(&self) -> ByteCount {
        self.lingering.iter().map(|buffer| buffer.bytes()).sum()
    }

    fn free(&self, budget: ByteCount) -> ByteCount {
        budget.saturating_sub(self.used + self.lingering_bytes())
    }
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct HostArena {
    device: Arc<dyn Device>,
    budget: ByteCount,
    state: Mutex<State>,
}

impl HostArena {
    pub(crate) fn new(device: Arc<dyn Device>, budget: ByteCount) -> Arc<Self> {
        Arc::new(Self { device, budget, state: Mutex::default() })
    }

    /// Bytes that new copies may take.
    pub(crate) fn free(&self) -> ByteCount {
        let mut state = self.state.lock();
        state.sweep();
        state.free(self.budget)
    }

    /// Bytes that hold copies.
    pub(crate) fn used(&self) -> ByteCount {
        self.state.lock().used
    }

    /// A buffer for one copy. Its bytes are undefined unless `zeroed`.
    pub(crate) fn allocate(
        self: &Arc<Self>,
        bytes: ByteCount,
        zeroed: bool,
    ) -> Result<HostCopy, MemoryError> {
        let mut surplus = Vec::new();
        let reused = {
            let mut state = self.state.lock();
            state.sweep();
            let free = state.free(self.budget);
            if bytes > free {
                return Err(MemoryError::HostBudget { needed: bytes, free, budget: self.budget });
            }
            let reused = state.take_spare(bytes);
            state.used += bytes;
            while state.spare_bytes > state.free(self.budget) {
                let Some(size) =
                    state.spare.iter().rev().find(|(_, some)| !some.is_empty()).map(|(size, _)| *size)
                else {
                    break;
                };
                surplus.extend(state.take_spare(ByteCount(size)));
            }
            reused
        };
        drop(surplus);
        let was_reused = reused.is_some();
        let buffer = match reused {
            Some(buffer) => buffer,
            None => match HostBuffer::allocate(&self.device, bytes) {
                Ok(buffer) => buffer,
                Err(source) => {
                    self.state.lock().used -= bytes;
                    return Err(MemoryError::Device { doing: "allocate host memory", source });
                }
            },
        };
        let copy = HostCopy { arena: Arc::clone(self), buffer };
        if zeroed && was_reused {
            copy.buffer
                .access_mut(ByteCount::ZERO, bytes, |slice| slice.fill(0))
                .map_err(MemoryError::device("zero host memory"))?;
        }
        Ok(copy)
    }

    fn put_back(&self, buffer: &Arc<HostBuffer>) {
        let mut state = self.state.lock();
        state.used -= buffer.bytes();
        // One for the copy that is being dropped, one or more for jobs that still run.
        state.lingering.push(Arc::clone(buffer));
    }
}

/// Host memory of one copy of one extent; dropping it gives the buffer back to the arena.
#[derive(Debug)]
pub(crate) struct HostCopy {
    arena: Arc<HostArena>,
    buffer: Arc<HostBuffer>,
}

impl HostCopy {
    pub(crate) const fn buffer(&self) -> &Arc<HostBuffer> {
        &self.buffer
    }
}

impl Drop for HostCopy {
    fn drop(&mut self) {
        self.arena.put_back(&self.buffer);
    }
}
