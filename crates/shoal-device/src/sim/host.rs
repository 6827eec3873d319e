//! Host buffers of the simulated device: anonymous memory, there from the start as page-locked memory is.
//!
//! Apart because they are RAM of this process and no part of the device: no ledger counts them.

#![expect(unsafe_code, reason = "allocates and frees anonymous memory")]

use core::ffi::c_void;
use core::ptr;
use std::collections::HashMap;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use shoal_core::bytes::ByteCount;
use shoal_core::ids::DeviceId;

use super::ram::{check_available, shortage};
use crate::device::RawHost;
use crate::error::DeviceError;

const SMALL_PAGE_BYTES: u64 = 4096;

/// The live host buffers: address to length.
#[derive(Debug, Default)]
pub(super) struct HostMemory {
    live: Mutex<HashMap<u64, u64>>,
}

impl HostMemory {
    pub(super) fn count(&self) -> usize {
        self.live.lock().len()
    }

    pub(super) fn allocate(&self, bytes: ByteCount) -> Result<RawHost, DeviceError> {
        const CALL: &str = "allocating a host buffer";
        if bytes.is_zero() {
            let granularity = ByteCount(1);
            return Err(DeviceError::Misaligned { what: "a host buffer of bytes", value: 0, granularity });
        }
        check_available(CALL, bytes)?;
        let rounded = bytes.0.checked_next_multiple_of(SMALL_PAGE_BYTES);
        let length = rounded.and_then(|rounded| usize::try_from(rounded).ok());
        let length = length.ok_or_else(|| shortage(CALL, bytes))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel picks unused addresses, so no one else's memory changes.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), length, protection, MapFlags::PRIVATE) };
        let start = start.map_err(|source| match source {
            Errno::NOMEM | Errno::AGAIN => shortage(CALL, bytes),
            other => DeviceError::system("mmap", other),
        })?;
        // Page-locked memory is there from the start, so this is too: a shortage shows now, not at a touch.
        // SAFETY: the range was mapped just above and is known to nobody else.
        let populated = unsafe { madvise(start, length, Advice::LinuxPopulateWrite) };
        match populated {
            // Kernels before 5.14 do not know the advice; there the pages come at the first touch.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(_) => {
                Self::unmap(start, length)?;
                return Err(shortage(CALL, bytes));
            }
        }
        let at = start.expose_provenance() as u64;
        self.live.lock().insert(at, length as u64);
        Ok(RawHost(at))
    }

    /// # Safety
    /// No reference into the buffer and no queued job that touches it is left.
    pub(super) unsafe fn free(&self, id: DeviceId, host: RawHost) -> Result<(), DeviceError> {
        let mut live = self.live.lock();
        let Some(bytes) = live.get(&host.0).copied() else {
            return Err(DeviceError::UnknownHandle { device: id, what: "host buffer", handle: host.0 });
        };
        let at = usize::try_from(host.0).expect("64-bit addresses");
        let length = usize::try_from(bytes).expect("64-bit sizes");
        Self::unmap(ptr::with_exposed_provenance_mut(at), length)?;
        live.remove(&host.0);
        Ok(())
    }

    fn unmap(start: *mut c_void, length: usize) -> Result<(), DeviceError> {
        // SAFETY: a whole live allocation of this table, which by the caller's promise nobody uses any more.
        unsafe { munmap(start, length) }.map_err(|source| DeviceError::system("munmap", source))
    }
}
