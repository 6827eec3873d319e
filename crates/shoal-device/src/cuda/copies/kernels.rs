//! The kernels that gather small blocks from the host and scatter them to it.
//!
//! Apart because it is code on the device. The PTX is compiled from `kernels/copy.cu` (see `kernels/regenerate.py`) and
//! committed; the driver compiles it for its GPU.

#![expect(unsafe_code, reason = "launches kernels")]

use core::ffi::c_void;
use std::ffi::CString;
use std::sync::Arc;

use super::Direction;
use super::pieces::{Pieces, PiecesPool};
use crate::cuda::context::Context;
use crate::cuda::result::{FunctionHandle, ModuleHandle, StreamHandle};
use crate::error::DeviceError;

pub(in crate::cuda) const PTX: &str = include_str!("../kernels/copy.ptx");
const WARP: u32 = 32;
/// Threads of a full block: what the kernels' launch bounds say.
const THREADS_MAX: u32 = 1024;

/// The loaded kernels, and the memory in which they are told what to copy.
#[derive(Debug)]
pub(super) struct CopyKernels {
    context: Arc<Context>,
    module: Option<ModuleHandle>,
    gather: FunctionHandle,
    scatter: FunctionHandle,
    pub(super) pool: Arc<PiecesPool>,
}

impl CopyKernels {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let _bound = context.bind()?;
        let driver = context.driver();
        let ptx = CString::new(PTX).expect("text without a zero");
        let module = driver.module_load(&ptx)?;
        let gather = driver.module_function(&module, c"shoal_gather")?;
        let scatter = driver.module_function(&module, c"shoal_scatter")?;
        let (context, pool) = (Arc::clone(context), PiecesPool::new(context));
        Ok(Self { context, module: Some(module), gather, scatter, pool })
    }

    /// Queues the copies of all pieces.
    ///
    /// # Safety
    /// As for [`crate::Device::copy`], for each piece; `pieces` stays until the kernel is done.
    pub(super) unsafe fn launch(
        &self,
        stream: &StreamHandle,
        direction: Direction,
        pieces: &Pieces,
        blocks_max: u32,
    ) -> Result<(), DeviceError> {
        let (function, count) = match direction {
            Direction::Up => (self.gather, pieces.count()),
            Direction::Down => (self.scatter, pieces.count()),
        };
        // As many multiprocessors as are allowed before a second warp for any of them.
        let warps = u32::try_from(count).unwrap_or(u32::MAX);
        let blocks = warps.clamp(1, blocks_max);
        let threads = warps.div_ceil(blocks).saturating_mul(WARP).clamp(WARP, THREADS_MAX);
        let (mut at, mut count) = (pieces.at(), count);
        let mut arguments: [*mut c_void; 2] = [&raw mut at, &raw mut count].map(<*mut u64>::cast);
        // SAFETY: two 64-bit values, as the kernels declare; otherwise the caller's promise.
        unsafe { self.context.driver().launch_kernel(function, blocks, threads, stream, &mut arguments) }
    }
}

impl Drop for CopyKernels {
    fn drop(&mut self) {
        let Some(module) = self.module.take() else { return };
        if Arc::strong_count(&self.pool) > 1 {
            // A kernel is still under way (on a stream that was closed without waiting): its code must stay.
            return;
        }
        let outcome = self.context.bind().and_then(|_bound| {
            // SAFETY: no job holds pieces, so no kernel is queued; the functions go with this object.
            unsafe { self.context.driver().module_unload(module) }
        });
        if let Err(error) = outcome {
            tracing::debug!(%error, "a module could not be unloaded");
        }
    }
}
