//! Page-locking host memory for the device, and undoing it.
//!
//! Apart because it is the driver's part of host memory; the pages themselves are everybody's ([`crate::host`]).
//! Memory that may not be locked is still copied from and to, slower and holding up the caller;
//! [`LockedMemory::fallback`] says why.

#![expect(unsafe_code, reason = "registers and unregisters memory that this process mapped")]

use std::sync::Arc;

use parking_lot::Mutex;

use super::context::Context;
use crate::device::RawHost;
use crate::error::DeviceError;
use crate::host::memory::HostMemory;

/// The host memory of one device object.
#[derive(Debug)]
pub(super) struct LockedMemory {
    context: Arc<Context>,
    pages: HostMemory,
    fallback: Mutex<Option<DeviceError>>,
}

impl LockedMemory {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self { context, pages: HostMemory::default(), fallback: Mutex::default() }
    }

    pub(super) fn pages(&self) -> &HostMemory {
        &self.pages
    }

    /// Why the newest piece that is not page-locked is not.
    pub(super) fn fallback(&self) -> Option<DeviceError> {
        self.fallback.lock().clone()
    }

    pub(super) fn lock(&self, host: RawHost) -> Result<(), DeviceError> {
        let _bound = self.context.bind()?;
        let driver = self.context.driver();
        let outcome = self.pages.lock(self.context.id(), host, None, |at, bytes| {
            // SAFETY: a mapping of ours, which stays until it is unregistered in `free`.
            unsafe { driver.host_register(at, bytes) }
        });
        if let Err(error @ DeviceError::Driver { .. }) = &outcome {
            *self.fallback.lock() = Some(error.clone());
        }
        outcome
    }

    /// # Safety
    /// No reference into it and no queued job that touches it is left, and no other call is about it.
    pub(super) unsafe fn free(&self, host: RawHost) -> Result<(), DeviceError> {
        let _bound = self.context.bind()?;
        let driver = self.context.driver();
        let unregister = |at| {
            // SAFETY: registered in `lock`; by the caller's promise nothing uses it.
            unsafe { driver.host_unregister(at) }
        };
        // SAFETY: the caller's promise, word for word.
        unsafe { self.pages.free(self.context.id(), host, unregister) }
    }
}
