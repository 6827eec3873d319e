//! The driver's copies, each a function with a `Result`: the part of [`crate::cuda::result`] that is about copies.

#![expect(unsafe_code, reason = "calls the driver")]

use core::ffi::{c_int, c_uint};

use crate::cuda::result::{Driver, StreamHandle, length, pointer};
use crate::cuda::symbols::{Code, CopyAttributes};
use crate::error::DeviceError;

const NOT_SUPPORTED: Code = 801;
/// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`, `CU_MEM_LOCATION_TYPE_DEVICE` and `CU_MEM_LOCATION_TYPE_HOST`.
const IN_STREAM_ORDER: c_uint = 1;
const LOCATION_DEVICE: c_int = 1;
const LOCATION_HOST: c_int = 2;

impl Driver {
    /// # Safety
    /// As for [`crate::Device::copy`]: both ranges stay, and unreferenced, until the job has finished.
    pub(in crate::cuda) unsafe fn copy_up(
        self,
        source: u64,
        target: u64,
        bytes: u64,
        stream: &StreamHandle,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.copy_up)(target, pointer(source), length(bytes), stream.0) };
        self.check("cuMemcpyHtoDAsync", code)
    }

    /// # Safety
    /// As for [`Driver::copy_up`].
    pub(in crate::cuda) unsafe fn copy_down(
        self,
        source: u64,
        target: u64,
        bytes: u64,
        stream: &StreamHandle,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.copy_down)(pointer(target), source, length(bytes), stream.0) };
        self.check("cuMemcpyDtoHAsync", code)
    }

    /// # Safety
    /// As for [`Driver::copy_up`].
    pub(in crate::cuda) unsafe fn copy_inside(
        self,
        source: u64,
        target: u64,
        bytes: u64,
        stream: &StreamHandle,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.copy_inside)(target, source, length(bytes), stream.0) };
        self.check("cuMemcpyDtoDAsync", code)
    }

    /// Between any two places that unified addressing knows (here: two of the host).
    ///
    /// # Safety
    /// As for [`Driver::copy_up`].
    pub(in crate::cuda) unsafe fn copy_anywhere(
        self,
        source: u64,
        target: u64,
        bytes: u64,
        stream: &StreamHandle,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.copy)(target, source, length(bytes), stream.0) };
        self.check("cuMemcpyAsync", code)
    }

    /// Zeroes over device memory. Nothing is queued for no bytes.
    ///
    /// # Safety
    /// As for [`Driver::copy_up`], with the range as the target.
    pub(in crate::cuda) unsafe fn fill_zero(
        self,
        at: u64,
        bytes: u64,
        stream: &StreamHandle,
    ) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.fill)(at, 0, length(bytes), stream.0) };
        self.check("cuMemsetD8Async", code)
    }

    /// Whether [`Driver::copy_batch`] can be called.
    pub(in crate::cuda) fn has_copy_batch(self) -> bool {
        self.symbols.copy_batch.is_some()
    }

    /// Many copies in one direction between page-locked memory and device `ordinal`, in any order. Whether some of them
    /// are queued when it fails is not known.
    ///
    /// # Safety
    /// As for [`Driver::copy_up`], for each of them; the slices are equally long.
    pub(in crate::cuda) unsafe fn copy_batch(
        self,
        ordinal: c_int,
        is_up: bool,
        (sources, targets, lengths): (&[u64], &[u64], &[usize]),
        stream: &StreamHandle,
    ) -> Result<(), DeviceError> {
        let Some(copy_batch) = self.symbols.copy_batch else {
            return self.check("cuMemcpyBatchAsync", NOT_SUPPORTED);
        };
        let (device, host) = ([LOCATION_DEVICE, ordinal], [LOCATION_HOST, 0]);
        let (source_at, target_at) = if is_up { (host, device) } else { (device, host) };
        let attributes = CopyAttributes { source_order: IN_STREAM_ORDER, source_at, target_at, flags: 0 };
        let (first, mut failed) = (0_usize, 0_usize);
        // SAFETY: the caller's promise; one set of attributes for all, from the first copy on, and a number that is
        // written; the driver has read it all when it returns.
        let code = unsafe {
            copy_batch(
                targets.as_ptr(),
                sources.as_ptr(),
                lengths.as_ptr(),
                lengths.len(),
                &raw const attributes,
                &raw const first,
                1,
                &raw mut failed,
                stream.0,
            )
        };
        self.check("cuMemcpyBatchAsync", code)
    }
}
