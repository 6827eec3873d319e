//! The CUDA device: an NVIDIA GPU through its driver, with nothing of CUDA needed to build.
//!
//! | module | subject |
//! |---|---|
//! | `symbols` | the driver's functions, found by name at run time |
//! | `result` | one function with a `Result` for each call |
//! | `context` | the primary context, and a thread's state for a call |
//! | `vmm` | address space, frames, mappings |
//! | `host` | page-locked host memory |
//! | `stream` | streams, events, what jobs hold |
//! | `copy`, `copies`, `hash` | what is queued on streams |
//!
//! Three levels, as cudarc has them for the rest of CUDA: the driver's functions, the same with results, and the
//! objects. Where there is no usable driver or device, opening answers [`DeviceError::Unavailable`] with the
//! reason and the remedy. The least driver is 470 (CUDA 11.4), the least GPU of compute capability 7.5.

mod context;
mod copies;
mod copy;
mod hash;
mod host;
mod result;
mod stream;
mod symbols;
mod vmm;

use std::process;
use std::sync::Arc;
use std::time::Duration;

use context::Context;
pub use context::{CudaFacts, device_count};
use copies::{Copies, Parts};
use hash::HashKernel;
use host::LockedMemory;
use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::copy_plan::costs::CopyCosts;
use stream::Engine;
use vmm::Vmm;

use crate::device::{
    Device, DeviceInfo, DeviceMemory, ForeignStream, ForeignWork, HashCell, HostBacking, HostFunction, Keep,
    RawCopy, RawEvent, RawFrame, RawHost, RawSpan, RawStream, Space, VirtAddr,
};
use crate::error::DeviceError;
use crate::host::HostFile;
use crate::sim::LiveObjects;

/// How many recorded errors are kept until somebody takes them; later ones are logged only.
const ERRORS_KEPT_MAX: usize = 256;
/// How long the hash of a few bytes may take when the device is opened (the GPU may be busy with others' work).
const SELF_TEST_WAIT_MAX: Duration = Duration::from_mins(1);

type SharedErrorLog = Arc<Mutex<Vec<DeviceError>>>;

/// Keeps `error` for [`Device::take_errors`].
fn record(log: &SharedErrorLog, error: DeviceError) {
    tracing::error!(%error, "device error without a caller");
    let mut kept = log.lock();
    if kept.len() < ERRORS_KEPT_MAX {
        kept.push(error);
    }
}

/// An NVIDIA GPU.
// Fields are dropped in this order: what may still be used by queued work first, the context last.
#[derive(Debug)]
pub struct CudaDevice {
    info: DeviceInfo,
    facts: CudaFacts,
    /// This device with this driver, in a line.
    key: String,
    process: u32,
    engine: Engine,
    hasher: HashKernel,
    copies: Copies,
    vmm: Vmm,
    host: LockedMemory,
    errors: SharedErrorLog,
    context: Arc<Context>,
}

impl CudaDevice {
    /// Opens the device with this number, as this process sees them, in its primary context (which every other
    /// CUDA user of the process shares; made now if nobody has).
    ///
    /// # Errors
    /// `Unavailable` without a driver or device that will do, otherwise what the driver says.
    pub fn open(ordinal: u32) -> Result<Arc<Self>, DeviceError> {
        let (context, info, facts) = Context::open(ordinal)?;
        let context = Arc::new(context);
        let errors = SharedErrorLog::default();
        let device = Self {
            key: context.key(&info, &facts)?,
            facts,
            process: process::id(),
            engine: Engine::new(Arc::clone(&context), Arc::clone(&errors)),
            hasher: HashKernel::new(&context, &facts)?,
            copies: Copies::new(&context, &facts)?,
            vmm: Vmm::new(Arc::clone(&context), info.granularity, info.capacity),
            host: LockedMemory::new(Arc::clone(&context)),
            errors,
            context,
            info,
        };
        device.test_hash()?;
        Ok(Arc::new(device))
    }

    /// Opens it as the trait object that the owned layer takes.
    ///
    /// # Errors
    /// As [`CudaDevice::open`].
    pub fn open_dyn(ordinal: u32) -> Result<Arc<dyn Device>, DeviceError> {
        Ok(Self::open(ordinal)?)
    }

    /// What driver and device this is.
    #[must_use]
    pub fn facts(&self) -> &CudaFacts {
        &self.facts
    }

    /// Why the newest host memory that could not be page-locked could not; `None` while all could.
    #[must_use]
    pub fn host_fallback(&self) -> Option<DeviceError> {
        self.host.fallback()
    }

    /// What exists now; all zero when nothing leaked.
    #[must_use]
    pub fn live_objects(&self) -> LiveObjects {
        let (reservations, frames, mappings) = self.vmm.count();
        let (streams, events) = self.engine.count();
        LiveObjects {
            reservations,
            frames,
            mappings,
            host_buffers: self.host.pages().count(),
            streams,
            events,
        }
    }

    /// What copies cost on this device, by size and way; measured now if no earlier process has.
    #[must_use]
    pub fn copy_costs(&self) -> Arc<CopyCosts> {
        self.copies.costs(self.parts())
    }

    /// The most multiprocessors that a list of copies takes from others: onto the device, and off it.
    #[must_use]
    pub const fn copy_multiprocessors(&self) -> (u32, u32) {
        copies::MULTIPROCESSORS
    }

    /// Goes by these costs from now on, whatever was measured: for those who want to try a way of copying.
    pub fn set_copy_costs(&self, costs: CopyCosts) {
        self.copies.set_costs(costs);
    }

    fn parts(&self) -> Parts<'_> {
        let (engine, vmm, host, facts) = (&self.engine, &self.vmm, &self.host, &self.facts);
        Parts { engine, vmm, host, facts, key: &self.key }
    }

    /// In a child made by `fork` the driver does not work.
    fn check_process(&self) -> Result<(), DeviceError> {
        let process = process::id();
        if process == self.process {
            return Ok(());
        }
        Err(DeviceError::Forked { device: self.info.id, opened_by: self.process, process })
    }

    /// Hashes a fresh frame. Finds kernels that compute something else, and makes the driver load them now: the
    /// first launch of a kernel can wait for everything on the device.
    #[expect(unsafe_code, reason = "hashes a range that it maps itself")]
    fn test_hash(&self) -> Result<(), DeviceError> {
        let bytes = self.info.granularity;
        let (at, frame) = (self.vmm.reserve(bytes)?, self.vmm.create(bytes)?);
        self.vmm.map(at, frame)?;
        let (stream, event) = (self.engine.create_stream()?, self.engine.create_event()?);
        // Not a multiple of the tile, so that its end is tested too.
        let length = ByteCount(3 * 4096 + 77);
        let span = RawSpan { space: Space::Device, at: at.0, bytes: length };
        let cell = Arc::new(HashCell::default());
        // SAFETY: mapped above, and unmapped only when an event after the job is complete.
        unsafe { self.queue_hash(stream, span, Arc::clone(&cell), Box::new(())) }?;
        self.engine.record(stream, event)?;
        if !self.engine.wait_event(event, SELF_TEST_WAIT_MAX)? {
            // Still queued, so nothing is given back (I5).
            return Err(DeviceError::Timeout { what: "the first kernel", waited: SELF_TEST_WAIT_MAX });
        }
        self.engine.destroy_event(event)?;
        self.engine.destroy_stream(stream)?;
        self.vmm.unmap(at, bytes)?;
        self.vmm.destroy(frame)?;
        self.vmm.release(at, bytes)?;
        if cell.get() == Some(crate::hash_bytes(&[0; 3 * 4096 + 77])) {
            return Ok(());
        }
        let reason = format!("{} computes hashes that differ from the host's", self.info.name);
        let remedy = "report this with the output of nvidia-smi";
        Err(DeviceError::Unavailable { device: self.info.id, reason, remedy })
    }

    /// # Safety
    /// As for [`Device::hash`].
    #[expect(unsafe_code, reason = "queues kernels on a range that the caller vouches for")]
    unsafe fn queue_hash(
        &self,
        stream: RawStream,
        span: RawSpan,
        result: Arc<HashCell>,
        keep: Keep,
    ) -> Result<(), DeviceError> {
        self.engine.submit(stream, keep, |submission| {
            let prepared = self.hasher.prepare(span.bytes, result, submission.scratch)?;
            let depth = usize::from(u16::MAX);
            let full = DeviceError::QueueFull { stream: stream.0, depth, waited: Duration::ZERO };
            let pending = submission.hash.insert(prepared.ok_or(full)?);
            // SAFETY: the range is as the caller promised; `pending` goes into the job.
            unsafe { self.hasher.enqueue(submission.stream, span, pending, &mut submission.is_queued) }
        })
    }
}

#[expect(unsafe_code, reason = "implements the unsafe verbs by handing them on under the same contract")]
impl Device for CudaDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        self.check_process()?;
        let _bound = self.context.bind()?;
        let (free, _) = self.context.driver().memory_info()?;
        let total = self.info.capacity;
        let used_by_this_process = self.vmm.used();
        Ok(DeviceMemory { total, free: ByteCount(free).min(total), used_by_this_process })
    }

    fn reserve(&self, bytes: ByteCount) -> Result<VirtAddr, DeviceError> {
        self.check_process()?;
        self.vmm.reserve(bytes)
    }

    fn release(&self, at: VirtAddr, bytes: ByteCount) -> Result<(), DeviceError> {
        self.check_process()?;
        self.vmm.release(at, bytes)
    }

    fn create_frame(&self, bytes: ByteCount) -> Result<RawFrame, DeviceError> {
        self.check_process()?;
        self.vmm.create(bytes)
    }

    fn destroy_frame(&self, frame: RawFrame) -> Result<(), DeviceError> {
        self.check_process()?;
        self.vmm.destroy(frame)
    }

    fn map(&self, at: VirtAddr, frame: RawFrame) -> Result<(), DeviceError> {
        self.check_process()?;
        self.vmm.map(at, frame)
    }

    fn unmap(&self, at: VirtAddr, bytes: ByteCount) -> Result<(), DeviceError> {
        self.check_process()?;
        self.vmm.unmap(at, bytes)
    }

    fn allocate_host(&self, bytes: ByteCount, backing: HostBacking) -> Result<RawHost, DeviceError> {
        self.check_process()?;
        self.host.pages().allocate(bytes, backing)
    }

    fn adopt_host(&self, file: &HostFile) -> Result<RawHost, DeviceError> {
        self.check_process()?;
        self.host.pages().adopt(file)
    }

    fn lock_host(&self, host: RawHost) -> Result<(), DeviceError> {
        self.check_process()?;
        self.host.lock(host)
    }

    unsafe fn free_host(&self, host: RawHost) -> Result<(), DeviceError> {
        self.check_process()?;
        // SAFETY: the caller promises that nothing refers to the buffer any more.
        unsafe { self.host.free(host) }
    }

    fn create_stream(&self) -> Result<RawStream, DeviceError> {
        self.check_process()?;
        self.engine.create_stream()
    }

    fn destroy_stream(&self, stream: RawStream) -> Result<(), DeviceError> {
        self.check_process()?;
        self.engine.destroy_stream(stream)
    }

    unsafe fn copy(
        &self,
        stream: RawStream,
        source: RawSpan,
        target: RawSpan,
        keep: Keep,
    ) -> Result<(), DeviceError> {
        self.check_process()?;
        let (source_bytes, target_bytes) = (source.bytes, target.bytes);
        if source_bytes != target_bytes {
            return Err(DeviceError::LengthMismatch { source_bytes, target_bytes });
        }
        let driver = self.context.driver();
        self.engine.submit(stream, keep, |submission| {
            // SAFETY: the caller's promise, word for word.
            unsafe { copy::enqueue(driver, submission.stream, source, target) }
        })
    }

    unsafe fn copy_many(&self, stream: RawStream, copies: &[RawCopy], keep: Keep) -> Result<(), DeviceError> {
        self.check_process()?;
        // SAFETY: the caller's promise, word for word.
        unsafe { self.copies.copy_many(self.parts(), stream, copies, keep) }
    }

    unsafe fn zero(
        &self,
        stream: RawStream,
        at: VirtAddr,
        bytes: ByteCount,
        keep: Keep,
    ) -> Result<(), DeviceError> {
        self.check_process()?;
        let driver = self.context.driver();
        self.engine.submit(stream, keep, |submission| {
            // SAFETY: the caller's promise, word for word.
            unsafe { driver.fill_zero(at.0, bytes.0, submission.stream) }
        })
    }

    unsafe fn hash(
        &self,
        stream: RawStream,
        span: RawSpan,
        result: Arc<HashCell>,
        keep: Keep,
    ) -> Result<(), DeviceError> {
        self.check_process()?;
        let is_in_reach = match span.space {
            Space::Device => true,
            Space::Host => self.facts.reaches_host && self.host.pages().is_locked(span.at, span.bytes.0),
        };
        if is_in_reach {
            // SAFETY: the caller's promise, word for word.
            return unsafe { self.queue_hash(stream, span, result, keep) };
        }
        let hash = move || {
            let start =
                core::ptr::with_exposed_provenance(usize::try_from(span.at).expect("64-bit addresses"));
            let length = usize::try_from(span.bytes.0).expect("64-bit sizes");
            // SAFETY: host memory that by the caller's promise stays, and that nobody writes, until this is done.
            result.set(crate::hash_bytes(unsafe { core::slice::from_raw_parts(start, length) }));
        };
        self.engine.launch_host(stream, Box::new(hash), keep)
    }

    fn launch_host(&self, stream: RawStream, function: HostFunction, keep: Keep) -> Result<(), DeviceError> {
        self.check_process()?;
        self.engine.launch_host(stream, function, keep)
    }

    fn create_event(&self) -> Result<RawEvent, DeviceError> {
        self.check_process()?;
        self.engine.create_event()
    }

    fn destroy_event(&self, event: RawEvent) -> Result<(), DeviceError> {
        self.check_process()?;
        self.engine.destroy_event(event)
    }

    fn record(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
        self.check_process()?;
        self.engine.record(stream, event)
    }

    fn record_foreign(&self, work: ForeignWork, event: RawEvent) -> Result<(), DeviceError> {
        self.check_process()?;
        self.engine.record_foreign(work, event)
    }

    fn foreign_wait(&self, stream: ForeignStream, event: RawEvent) -> Result<bool, DeviceError> {
        self.check_process()?;
        self.engine.foreign_wait(stream, event)
    }

    fn query_event(&self, event: RawEvent) -> Result<bool, DeviceError> {
        self.check_process()?;
        self.engine.query_event(event)
    }

    fn wait_event(&self, event: RawEvent, timeout: Duration) -> Result<bool, DeviceError> {
        self.check_process()?;
        self.engine.wait_event(event, timeout)
    }

    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
        self.check_process()?;
        self.engine.stream_wait(stream, event)
    }

    fn record_error(&self, error: DeviceError) {
        // After a fork another thread may hold the lock for ever.
        if self.check_process().is_ok() {
            record(&self.errors, error);
        }
    }

    fn take_errors(&self) -> Vec<DeviceError> {
        if self.check_process().is_err() {
            return Vec::new();
        }
        core::mem::take(&mut self.errors.lock())
    }
}
