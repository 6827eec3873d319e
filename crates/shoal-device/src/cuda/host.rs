//! Host memory that the device copies from and to at the speed of the link.
//!
//! Apart because page-locking is where the time goes: the driver's own allocation fills pages with one thread at
//! about 1 GiB/s, so the pages here are ours, huge where the kernel allows, filled by several threads, and then
//! registered. Without the right to lock memory (or with too little of it) the buffer is given all the same,
//! unlocked: copies are then slower and hold up their caller, and [`HostMemory::fallback`] says why.

#![expect(unsafe_code, reason = "allocates, fills, registers and frees anonymous memory")]

use core::ffi::c_void;
use core::num::NonZero;
use core::ptr;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use shoal_core::bytes::ByteCount;

use super::context::Context;
use crate::device::RawHost;
use crate::error::DeviceError;
use crate::sim::ram::{check_available, shortage};

const SMALL_PAGE_BYTES: u64 = 4096;
const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// Below this a second thread costs more than it saves.
const BYTES_PER_THREAD_MIN: u64 = 32 << 20;
/// More threads than this wait for one another in the kernel.
const THREADS_MAX: u64 = 16;
const CALL: &str = "allocating a host buffer";

#[derive(Debug, Clone, Copy)]
struct Buffer {
    bytes: u64,
    is_locked: bool,
}

/// The live host buffers of one device object.
#[derive(Debug)]
pub(super) struct HostMemory {
    context: Arc<Context>,
    live: Mutex<BTreeMap<u64, Buffer>>,
    fallback: Mutex<Option<DeviceError>>,
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64-bit sizes")
}

fn pointer(at: u64) -> *mut c_void {
    ptr::with_exposed_provenance_mut(length(at))
}

/// Writes one byte a page, so that the memory is there, from as many threads as help. Zeroes stay zeroes.
fn fill(at: u64, bytes: u64) {
    let cores = thread::available_parallelism().map_or(1, NonZero::get) as u64;
    let threads = (bytes / BYTES_PER_THREAD_MIN).clamp(1, THREADS_MAX.min(cores));
    let share = bytes.div_ceil(threads).next_multiple_of(HUGE_PAGE_BYTES);
    let fill_share = |index: u64| {
        let (start, end) = ((index * share).min(bytes), ((index + 1) * share).min(bytes));
        for offset in (start..end).step_by(length(SMALL_PAGE_BYTES)) {
            let byte = pointer(at + offset).cast::<u8>();
            // SAFETY: inside a mapping that only this call knows; each thread has its own share.
            unsafe { byte.write_volatile(0) };
        }
    };
    thread::scope(|scope| {
        for index in 1..threads {
            scope.spawn(move || fill_share(index));
        }
        fill_share(0);
    });
}

impl HostMemory {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self { context, live: Mutex::default(), fallback: Mutex::default() }
    }

    pub(super) fn count(&self) -> usize {
        self.live.lock().len()
    }

    /// Why the newest buffer that is not page-locked is not.
    pub(super) fn fallback(&self) -> Option<DeviceError> {
        self.fallback.lock().clone()
    }

    /// True if this range lies in one page-locked buffer.
    pub(super) fn is_locked(&self, at: u64, bytes: u64) -> bool {
        let live = self.live.lock();
        live.range(..=at)
            .next_back()
            .is_some_and(|(start, buffer)| buffer.is_locked && at + bytes <= start + buffer.bytes)
    }

    pub(super) fn allocate(&self, bytes: ByteCount) -> Result<RawHost, DeviceError> {
        if bytes.is_zero() {
            let granularity = ByteCount(1);
            return Err(DeviceError::Misaligned { what: "a host buffer of bytes", value: 0, granularity });
        }
        check_available(CALL, bytes)?;
        let unit = if bytes.0 < HUGE_PAGE_BYTES { SMALL_PAGE_BYTES } else { HUGE_PAGE_BYTES };
        let rounded = bytes.0.checked_next_multiple_of(unit).ok_or_else(|| shortage(CALL, bytes))?;
        let at = Self::map(rounded, unit).map_err(|source| match source {
            Errno::NOMEM | Errno::AGAIN => shortage(CALL, bytes),
            other => DeviceError::system("mmap", other),
        })?;
        fill(at, rounded);
        let is_locked = match self.register(at, rounded) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, %bytes, "host memory is not page-locked, so copies are slower");
                *self.fallback.lock() = Some(error);
                false
            }
        };
        self.live.lock().insert(at, Buffer { bytes: rounded, is_locked });
        Ok(RawHost(at))
    }

    /// Fresh anonymous memory, aligned to `unit`.
    fn map(bytes: u64, unit: u64) -> Result<u64, Errno> {
        let wide = bytes.checked_add(unit).ok_or(Errno::NOMEM)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel picks unused addresses, so no one else's memory changes.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), length(wide), protection, MapFlags::PRIVATE) }?;
        let start = start.expose_provenance() as u64;
        let at = start.next_multiple_of(unit);
        Self::unmap(start, at - start)?;
        Self::unmap(at + bytes, start + wide - (at + bytes))?;
        // SAFETY: mapped just above; a child made by fork has no use for it, and its copy would break the pinning.
        unsafe { madvise(pointer(at), length(bytes), Advice::LinuxDontFork) }?;
        if unit == HUGE_PAGE_BYTES {
            // Where huge pages are switched off this is refused, and small ones do.
            // SAFETY: mapped just above.
            let _ = unsafe { madvise(pointer(at), length(bytes), Advice::LinuxHugepage) };
        }
        Ok(at)
    }

    fn unmap(at: u64, bytes: u64) -> Result<(), Errno> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: mapped by `map`, and either never handed out or given back by its one owner.
        unsafe { munmap(pointer(at), length(bytes)) }
    }

    fn register(&self, at: u64, bytes: u64) -> Result<(), DeviceError> {
        let _bound = self.context.bind()?;
        // SAFETY: a mapping of ours, which stays until it is unregistered in `free`.
        unsafe { self.context.driver().host_register(at, bytes) }
    }

    /// # Safety
    /// No reference into the buffer and no queued job that touches it is left.
    pub(super) unsafe fn free(&self, host: RawHost) -> Result<(), DeviceError> {
        let _bound = self.context.bind()?;
        let Some(buffer) = self.live.lock().remove(&host.0) else {
            let device = self.context.id();
            return Err(DeviceError::UnknownHandle { device, what: "host buffer", handle: host.0 });
        };
        if buffer.is_locked {
            // SAFETY: registered in `allocate`; by the caller's promise nothing uses it.
            let freed = unsafe { self.context.driver().host_unregister(host.0) };
            if freed.is_err() {
                self.live.lock().insert(host.0, buffer);
                return freed;
            }
        }
        Self::unmap(host.0, buffer.bytes).map_err(|source| DeviceError::system("munmap", source))
    }
}
