//! A large piece of host memory, and its parts.
//!
//! Apart because making and page-locking memory is slow and per piece, while buffers are many: a slab is made and
//! locked once, whole, and [`HostBuffer`]s are parts of it that never overlap. A buffer lies in one slab, so in one
//! registration. The slab goes back when it and all its buffers are dropped.

#![expect(unsafe_code, reason = "gives back memory that nothing refers to any more")]

use core::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;

use super::{HostBuffer, check_range, record_leak};
use crate::device::{Device, HostBacking, RawHost};
use crate::error::DeviceError;
use crate::host::HostFile;

/// Host memory, of which buffers are parts.
#[derive(Debug)]
pub struct HostSlab {
    device: Arc<dyn Device>,
    raw: RawHost,
    bytes: ByteCount,
    backing: HostBacking,
    is_locked: AtomicBool,
    is_given_back: bool,
    /// Offset to length of each live buffer.
    parts: Mutex<BTreeMap<u64, u64>>,
}

impl HostSlab {
    /// Makes `bytes` of host memory, zeroed, not page-locked yet. It may take long: [`Device::allocate_host`].
    ///
    /// # Errors
    /// As [`Device::allocate_host`].
    pub fn allocate(
        device: &Arc<dyn Device>,
        bytes: ByteCount,
        backing: HostBacking,
    ) -> Result<Arc<Self>, DeviceError> {
        let raw = device.allocate_host(bytes, backing)?;
        Ok(Self::new(device, raw, bytes, backing))
    }

    /// Maps memory that another process may map too. It holds what it held; see [`Device::adopt_host`].
    ///
    /// # Errors
    /// As [`Device::adopt_host`].
    pub fn adopt(device: &Arc<dyn Device>, file: &HostFile) -> Result<Arc<Self>, DeviceError> {
        let raw = device.adopt_host(file)?;
        Ok(Self::new(device, raw, file.bytes(), file.backing()))
    }

    fn new(device: &Arc<dyn Device>, raw: RawHost, bytes: ByteCount, backing: HostBacking) -> Arc<Self> {
        let (is_locked, is_given_back, parts) = (AtomicBool::new(false), false, Mutex::default());
        Arc::new(Self { device: Arc::clone(device), raw, bytes, backing, is_locked, is_given_back, parts })
    }

    /// Page-locks all of it.
    ///
    /// # Errors
    /// As [`Device::lock_host`]; the memory can be used all the same.
    pub fn lock(&self) -> Result<(), DeviceError> {
        self.device.lock_host(self.raw)?;
        self.is_locked.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether it is page-locked.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.is_locked.load(Ordering::Acquire)
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> ByteCount {
        self.bytes
    }

    /// What it is made of.
    #[must_use]
    pub fn backing(&self) -> HostBacking {
        self.backing
    }

    /// Whose copies reach it.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// A part of it as a buffer. `claim` is dropped when the buffer and every job that touches it are gone, and the part
    /// is free again: whoever divides the slab hears of it by that. It must not wait.
    ///
    /// # Errors
    /// `OutOfRange`, `InUse` if a live buffer overlaps it.
    pub fn buffer(
        self: &Arc<Self>,
        offset: ByteCount,
        bytes: ByteCount,
        claim: impl Any + Send + Sync,
    ) -> Result<Arc<HostBuffer>, DeviceError> {
        check_range("host slab", offset, bytes, self.bytes)?;
        let (start, end) = (offset.0, offset.0 + bytes.0);
        let mut parts = self.parts.lock();
        let before = parts.range(..end).next_back();
        if before.is_some_and(|(at, length)| *at == start || at + length > start) {
            return Err(DeviceError::InUse { what: "a part of a host slab", handle: self.raw.0 + start });
        }
        parts.insert(start, bytes.0);
        drop(parts);
        Ok(Arc::new(HostBuffer::part(Arc::clone(self), offset, bytes, Box::new(claim))))
    }

    /// Unlocks it and gives it back. Dropping it does so too, but has nobody to tell what went wrong.
    ///
    /// # Errors
    /// The slab itself, and `InUse` while it has buffers or other holders, or as [`Device::free_host`]; it can be asked
    /// again.
    pub fn give_back(self: Arc<Self>) -> Result<(), (Arc<Self>, DeviceError)> {
        let mut slab = Arc::try_unwrap(self).map_err(|slab| {
            let held = DeviceError::InUse { what: "a host slab", handle: slab.raw.0 };
            (slab, held)
        })?;
        // SAFETY: every buffer holds the slab, slices borrow their buffer and queued jobs hold it, so none is left.
        match unsafe { slab.device.free_host(slab.raw) } {
            Ok(()) => {
                slab.is_given_back = true;
                Ok(())
            }
            Err(error) => Err((Arc::new(slab), error)),
        }
    }

    /// Where it lies in this process: what registers it elsewhere (`io_uring`) has to know, and to hold the slab meanwhile.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.raw.0
    }

    /// A buffer is gone.
    pub(super) fn part_is_free(&self, offset: ByteCount) {
        self.parts.lock().remove(&offset.0);
    }
}

impl Drop for HostSlab {
    fn drop(&mut self) {
        if self.is_given_back {
            return;
        }
        // SAFETY: every buffer holds the slab, slices borrow their buffer and queued jobs hold it, so none is left.
        let freed = unsafe { self.device.free_host(self.raw) };
        if let Err(cause) = freed {
            record_leak(&self.device, "host memory", self.raw.0, cause);
        }
    }
}
