//! The hash of [`crate::hash`] on the device: a kernel a level, and where its answer lies until it is fetched.
//!
//! Apart because it is the one thing here that needs code on the device. The PTX is compiled from
//! `kernels/hash.cu` (see `kernels/regenerate.py`) and committed; the driver compiles it for its GPU. The last
//! kernel writes into a slot of page-locked memory; the host reads it when the job is known to be done.

#![expect(unsafe_code, reason = "launches a kernel; reads what it wrote into page-locked memory")]

use core::ffi::c_void;
use core::ptr;
use std::ffi::CString;
use std::mem;
use std::sync::Arc;

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;

use super::context::{Context, CudaFacts};
use super::result::{FunctionHandle, ModuleHandle, StreamHandle};
use super::vmm::Block;
use crate::device::{HashCell, RawSpan};
use crate::error::DeviceError;
use crate::hash::{DIGEST_BYTES, TILE_BYTES, finish};

const PTX: &str = include_str!("kernels/hash.ptx");
/// Threads of a block, eight warps: what the kernel's launch bounds say.
const THREADS: u32 = 256;
const TILES_PER_BLOCK: u64 = 8;
/// Blocks that a multiprocessor holds at once (64 registers a thread).
const BLOCKS_PER_MULTIPROCESSOR: u32 = 4;
/// Hashes of all streams that wait to be fetched.
const SLOTS: u16 = 8192;
const TILE: u64 = TILE_BYTES as u64;
const DIGEST: u64 = DIGEST_BYTES as u64;

/// Page-locked words into which kernels write.
#[derive(Debug)]
struct Slots {
    context: Arc<Context>,
    at: u64,
    free: Mutex<Vec<u16>>,
}

impl Slots {
    fn new(context: &Arc<Context>) -> Result<Arc<Self>, DeviceError> {
        let _bound = context.bind()?;
        let at = context.driver().host_allocate(u64::from(SLOTS) * DIGEST)?;
        Ok(Arc::new(Self { context: Arc::clone(context), at, free: Mutex::new((0..SLOTS).collect()) }))
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        let outcome = self.context.bind().and_then(|_bound| {
            // SAFETY: from `host_allocate`; every job that writes there holds a `Slot`, which holds this object.
            unsafe { self.context.driver().host_free(self.at) }
        });
        if let Err(error) = outcome {
            tracing::debug!(%error, "page-locked slots could not be given back");
        }
    }
}

/// One word, of one job at a time.
#[derive(Debug)]
struct Slot {
    slots: Arc<Slots>,
    index: u16,
}

impl Slot {
    fn at(&self) -> u64 {
        self.slots.at + u64::from(self.index) * DIGEST
    }

    fn read(&self) -> u64 {
        let word = ptr::with_exposed_provenance::<u64>(usize::try_from(self.at()).expect("64-bit addresses"));
        // SAFETY: inside the live, aligned, zeroed or written slots; the job that wrote it is done.
        unsafe { word.read_volatile() }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.free.lock().push(self.index);
    }
}

/// A hash that a stream is computing, with all that its kernels use.
#[derive(Debug)]
pub(super) struct PendingHash {
    slot: Slot,
    length: ByteCount,
    cell: Arc<HashCell>,
    /// What the kernels between the first and the last write to.
    scratch: Option<Arc<Block>>,
}

impl PendingHash {
    /// Fetches the answer. Only when the job is done.
    pub(super) fn settle(self) {
        self.cell.set(finish(self.slot.read(), self.length.0));
    }
}

/// The loaded kernel.
#[derive(Debug)]
pub(super) struct HashKernel {
    context: Arc<Context>,
    module: Option<ModuleHandle>,
    function: FunctionHandle,
    blocks_max: u64,
    slots: Arc<Slots>,
}

fn tiles_of(bytes: u64) -> u64 {
    bytes.div_ceil(TILE).max(1)
}

/// Bytes of the digests of all levels but the last, for `bytes` of input.
fn scratch_bytes(bytes: u64) -> u64 {
    let (mut level, mut total) = (bytes, 0);
    while tiles_of(level) > 1 {
        level = tiles_of(level) * DIGEST;
        total += level.next_multiple_of(TILE);
    }
    total
}

impl HashKernel {
    pub(super) fn new(context: &Arc<Context>, facts: &CudaFacts) -> Result<Self, DeviceError> {
        let slots = Slots::new(context)?;
        let _bound = context.bind()?;
        let ptx = CString::new(PTX).expect("text without a zero");
        let module = context.driver().module_load(&ptx)?;
        let mut hasher = Self {
            context: Arc::clone(context),
            module: None,
            function: context.driver().module_function(&module, c"shoal_hash_tiles")?,
            blocks_max: u64::from(facts.multiprocessors * BLOCKS_PER_MULTIPROCESSOR),
            slots,
        };
        hasher.module = Some(module);
        Ok(hasher)
    }

    /// Reserves what a hash of `bytes` needs; `scratch` is the stream's, replaced by a larger one where it must be.
    /// `None`: no slot is free.
    pub(super) fn prepare(
        &self,
        bytes: ByteCount,
        cell: Arc<HashCell>,
        scratch: &mut Option<Arc<Block>>,
    ) -> Result<Option<PendingHash>, DeviceError> {
        let Some(index) = self.slots.free.lock().pop() else { return Ok(None) };
        let slot = Slot { slots: Arc::clone(&self.slots), index };
        let needed = scratch_bytes(bytes.0);
        if needed > scratch.as_ref().map_or(0, |block| block.bytes()) {
            *scratch = Some(Arc::new(Block::take(&self.context, needed)?));
        }
        Ok(Some(PendingHash { slot, length: bytes, cell, scratch: scratch.clone() }))
    }

    /// Queues the kernels. The flag says that at least one was queued, also when a later one was refused.
    ///
    /// # Safety
    /// As for [`crate::Device::hash`]; `pending` lives until the job has finished, and is of this stream.
    pub(super) unsafe fn enqueue(
        &self,
        stream: &StreamHandle,
        span: RawSpan,
        pending: &PendingHash,
        is_queued: &mut bool,
    ) -> Result<(), DeviceError> {
        let (mut source, mut length) = (span.at, span.bytes.0);
        let mut next = pending.scratch.as_ref().map_or(0, |block| block.at());
        loop {
            let tiles = tiles_of(length);
            let is_last = tiles == 1;
            let target = if is_last { pending.slot.at() } else { next };
            // SAFETY: the source is the caller's span or the level before; the target is the job's own slot, or
            // scratch of the size that `scratch_bytes` says, in which levels do not overlap.
            unsafe { self.launch(stream, source, length, tiles, target) }?;
            *is_queued = true;
            if is_last {
                return Ok(());
            }
            (source, length) = (target, tiles * DIGEST);
            next += length.next_multiple_of(TILE);
        }
    }

    /// # Safety
    /// `source` has `length` readable bytes and `target` room for `tiles` digests until the kernel is done.
    unsafe fn launch(
        &self,
        stream: &StreamHandle,
        mut source: u64,
        mut length: u64,
        mut tiles: u64,
        mut target: u64,
    ) -> Result<(), DeviceError> {
        let blocks = tiles.div_ceil(TILES_PER_BLOCK).min(self.blocks_max);
        let blocks = u32::try_from(blocks).expect("bounded by the device's size");
        let mut arguments: [*mut c_void; 4] =
            [&raw mut source, &raw mut length, &raw mut tiles, &raw mut target].map(<*mut u64>::cast);
        // SAFETY: four 64-bit values, as the kernel declares; otherwise the caller's promise.
        unsafe { self.context.driver().launch_kernel(self.function, blocks, THREADS, stream, &mut arguments) }
    }
}

impl Drop for HashKernel {
    fn drop(&mut self) {
        let Some(module) = mem::take(&mut self.module) else { return };
        if Arc::strong_count(&self.slots) > 1 {
            // A hash is still under way (on a stream that was closed without waiting): its code must stay.
            return;
        }
        let outcome = self.context.bind().and_then(|_bound| {
            // SAFETY: no job holds a slot, so no kernel is queued; the function goes with this object.
            unsafe { self.context.driver().module_unload(module) }
        });
        if let Err(error) = outcome {
            tracing::debug!(%error, "a module could not be unloaded");
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const SOURCE: &[u8] = include_bytes!("kernels/hash.cu");

    fn fnv1a(data: &[u8]) -> u64 {
        data.iter().fold(0xcbf2_9ce4_8422_2325, |value, byte| {
            (value ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }

    fn stamped<'a>(ptx: &'a str, word: &str) -> &'a str {
        let prefix = format!("// {word} ");
        ptx.lines().find_map(|line| line.strip_prefix(prefix.as_str())).expect("a stamped header")
    }

    /// Panics where a kernel's PTX is not what its source was compiled to, or not for every driver and GPU.
    pub(in crate::cuda) fn check_ptx(name: &str, source: &[u8], ptx: &str) {
        let remedy = "run crates/shoal-device/src/cuda/kernels/regenerate.py and commit both";
        let (of_source, of_ptx) = (stamped(ptx, "source"), stamped(ptx, "ptx"));
        assert_eq!(of_source, format!("{:016x}", fnv1a(source)), "{name}.cu changed; {remedy}");
        let header: usize = ptx.split_inclusive('\n').take(3).map(str::len).sum();
        let body = &ptx.as_bytes()[header..];
        assert_eq!(of_ptx, format!("{:016x}", fnv1a(body)), "{name}.ptx was edited; {remedy}");
        assert!(ptx.contains("\n.version 7.4\n.target sm_75\n"), "PTX for another driver or GPU; {remedy}");
    }

    #[test]
    fn the_committed_ptx_is_of_this_source() {
        check_ptx("hash", SOURCE, PTX);
    }

    #[test]
    fn scratch_holds_every_level_but_the_last() {
        assert_eq!(scratch_bytes(0), 0);
        assert_eq!(scratch_bytes(4096), 0);
        assert_eq!(scratch_bytes(4097), 4096);
        assert_eq!(scratch_bytes(2 << 20), 4096);
        assert_eq!(scratch_bytes((2 << 20) + 1), 8192 + 4096);
        assert_eq!(scratch_bytes(1 << 30), (2 << 20) + 4096);
    }
}
