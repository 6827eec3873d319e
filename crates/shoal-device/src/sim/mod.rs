//! The simulated device: GPU memory played by RAM, with a GPU's limits.
//!
//! Shipped, not a mock: it is the embedded default where there is no GPU, and models run on it. Addresses are
//! really reserved, a touch of unmapped memory really faults, frames are indivisible and zeroed, nothing fences
//! by itself, and the capacity is shared by all processes of a runtime directory. It saves no memory and its
//! times say nothing about a GPU.
//!
//! | module | subject |
//! |---|---|
//! | `arena` | address space and frames of this process |
//! | `ledger` | how much each live process holds |
//! | `copies` | lists of copies |
//! | `stream` | queues, threads, events |
//! | `ram` | how much RAM is left for all of it |
//!
//! No lock of one part is held while another is called, and none while a call blocks (I9).

mod arena;
mod copies;
mod ledger;
pub(crate) mod ram;
mod stream;

use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::time::Duration;

use arena::Arena;
use ledger::Ledger;
pub use ledger::{Holder, holders};
use parking_lot::Mutex;
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::ids::DeviceId;
use stream::{Engine, Job};

use crate::device::{
    Device, DeviceInfo, DeviceKind, DeviceMemory, ForeignStream, ForeignWork, HashCell, HostBacking,
    HostFunction, Keep, RawCopy, RawEvent, RawFrame, RawHost, RawSpan, RawStream, VirtAddr,
};
use crate::error::DeviceError;
use crate::host::HostFile;
use crate::host::memory::HostMemory;

/// How many recorded errors are kept until somebody takes them.
const ERRORS_KEPT_MAX: usize = 256;

/// How to open a [`SimDevice`].
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Which simulated device.
    pub ordinal: u32,
    /// Its memory, for all processes of `runtime_dir` together.
    pub capacity: ByteCount,
    /// Where the processes that share it meet (created with mode 0700 if missing).
    pub runtime_dir: PathBuf,
    /// Bytes per second that each direction of the link moves; `None`: as fast as memory allows.
    pub copy_bandwidth: Option<ByteCount>,
    /// How much host memory this device object may lock; `None`: any amount.
    pub lock_limit: Option<ByteCount>,
}

impl SimOptions {
    /// Device 0 with this capacity and an unlimited link.
    #[must_use]
    pub fn new(capacity: ByteCount, runtime_dir: impl Into<PathBuf>) -> Self {
        Self { ordinal: 0, capacity, runtime_dir: runtime_dir.into(), copy_bandwidth: None, lock_limit: None }
    }
}

/// Errors that had no caller to go to.
#[derive(Debug, Default)]
struct ErrorLog {
    kept: Vec<DeviceError>,
}

type SharedErrorLog = Arc<Mutex<ErrorLog>>;

/// Keeps `error` for [`Device::take_errors`].
fn record(log: &SharedErrorLog, error: DeviceError) {
    tracing::error!(%error, "device error without a caller");
    let mut log = log.lock();
    if log.kept.len() < ERRORS_KEPT_MAX {
        log.kept.push(error);
    }
}

/// A device simulated in RAM.
#[derive(Debug)]
pub struct SimDevice {
    info: DeviceInfo,
    process: u32,
    arena: Arena,
    ledger: Ledger,
    engine: Engine,
    host: HostMemory,
    lock_limit: Option<ByteCount>,
    errors: SharedErrorLog,
}

impl SimDevice {
    /// Opens a simulated device, joining the other processes of the runtime directory that have it open.
    ///
    /// # Errors
    /// `Ledger`, `CapacityMismatch`, `System` when no memory file can be made.
    pub fn open(options: SimOptions) -> Result<Arc<Self>, DeviceError> {
        let SimOptions { ordinal, capacity, runtime_dir, copy_bandwidth, lock_limit } = options;
        let id = DeviceId(ordinal);
        let errors = SharedErrorLog::default();
        let arena = Arena::open(id)?;
        let ledger = Ledger::open(id, capacity, &runtime_dir)?;
        let engine = Engine::new(id, copy_bandwidth, Arc::clone(&errors));
        let info = DeviceInfo {
            id,
            name: format!("simulated device {ordinal}"),
            kind: DeviceKind::Sim,
            granularity: PAGE_BYTES,
            capacity,
        };
        let host = HostMemory::default();
        let process = process::id();
        Ok(Arc::new(Self { info, process, arena, ledger, engine, host, lock_limit, errors }))
    }

    /// Opens it as the trait object that the owned layer takes.
    ///
    /// # Errors
    /// As [`SimDevice::open`].
    pub fn open_dyn(options: SimOptions) -> Result<Arc<dyn Device>, DeviceError> {
        Ok(Self::open(options)?)
    }

    /// How many frames and mappings of this process exist now: zero and zero when nothing leaked.
    #[must_use]
    pub fn live_objects(&self) -> LiveObjects {
        let (reservations, frames, mappings) = self.arena.count();
        let (streams, events) = self.engine.count();
        LiveObjects { reservations, frames, mappings, host_buffers: self.host.count(), streams, events }
    }

    /// In a child made by `fork` nothing of this device may be touched: its threads do not exist there.
    fn check_process(&self) -> Result<(), DeviceError> {
        let process = process::id();
        if process == self.process {
            return Ok(());
        }
        Err(DeviceError::Forked { device: self.info.id, opened_by: self.process, process })
    }
}

/// Sizes and addresses come in whole pages, and zero is none.
fn check_size(what: &'static str, value: u64) -> Result<(), DeviceError> {
    if value != 0 && value.is_multiple_of(PAGE_BYTES.0) {
        return Ok(());
    }
    Err(DeviceError::Misaligned { what, value, granularity: PAGE_BYTES })
}

/// What one device object of this process holds; all zero when nothing leaked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the number of live objects of that name")]
pub struct LiveObjects {
    pub reservations: usize,
    pub frames: usize,
    pub mappings: usize,
    pub host_buffers: usize,
    pub streams: usize,
    pub events: usize,
}

#[expect(unsafe_code, reason = "implements the unsafe verbs by handing them on under the same contract")]
impl Device for SimDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        self.check_process()?;
        let (used_by_all, used_by_this_process) = self.ledger.used()?;
        let total = self.info.capacity;
        Ok(DeviceMemory { total, free: total.saturating_sub(used_by_all), used_by_this_process })
    }

    fn reserve(&self, bytes: ByteCount) -> Result<VirtAddr, DeviceError> {
        self.check_process()?;
        check_size("a reservation of bytes", bytes.0)?;
        self.arena.reserve(bytes)
    }

    fn release(&self, at: VirtAddr, bytes: ByteCount) -> Result<(), DeviceError> {
        self.check_process()?;
        self.arena.release(at, bytes)
    }

    fn create_frame(&self, bytes: ByteCount) -> Result<RawFrame, DeviceError> {
        self.check_process()?;
        check_size("a frame of bytes", bytes.0)?;
        self.ledger.charge(bytes)?;
        // Charged first: the sum never exceeds the capacity, not even for a moment (I1).
        let created = ram::check_available("creating a frame", bytes).and_then(|()| self.arena.create(bytes));
        if created.is_err() {
            self.ledger.refund(bytes)?;
        }
        created
    }

    fn destroy_frame(&self, frame: RawFrame) -> Result<(), DeviceError> {
        self.check_process()?;
        let bytes = self.arena.destroy(frame)?;
        self.ledger.refund(bytes)
    }

    fn map(&self, at: VirtAddr, frame: RawFrame) -> Result<(), DeviceError> {
        self.check_process()?;
        check_size("address", at.0)?;
        self.arena.map(at, frame)
    }

    fn unmap(&self, at: VirtAddr, bytes: ByteCount) -> Result<(), DeviceError> {
        self.check_process()?;
        self.arena.unmap(at, bytes)
    }

    fn allocate_host(&self, bytes: ByteCount, backing: HostBacking) -> Result<RawHost, DeviceError> {
        self.check_process()?;
        self.host.allocate(bytes, backing)
    }

    fn adopt_host(&self, file: &HostFile) -> Result<RawHost, DeviceError> {
        self.check_process()?;
        self.host.adopt(file)
    }

    fn lock_host(&self, host: RawHost) -> Result<(), DeviceError> {
        self.check_process()?;
        // Only counted: whether a page may be swapped makes no difference to a copy in RAM.
        self.host.lock(self.info.id, host, self.lock_limit, |_, _| Ok(()))
    }

    unsafe fn free_host(&self, host: RawHost) -> Result<(), DeviceError> {
        self.check_process()?;
        // SAFETY: the caller promises that nothing refers to the buffer any more.
        unsafe { self.host.free(self.info.id, host, |_| Ok(())) }
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
        self.engine.submit(stream, Job::Copy { source, target, keep })
    }

    unsafe fn copy_many(&self, stream: RawStream, copies: &[RawCopy], keep: Keep) -> Result<(), DeviceError> {
        self.check_process()?;
        self.engine.submit(stream, Job::CopyMany { parts: copies::joined(copies)?, keep })
    }

    unsafe fn zero(
        &self,
        stream: RawStream,
        at: VirtAddr,
        bytes: ByteCount,
        keep: Keep,
    ) -> Result<(), DeviceError> {
        self.check_process()?;
        self.engine.submit(stream, Job::Zero { at, bytes, keep })
    }

    unsafe fn hash(
        &self,
        stream: RawStream,
        span: RawSpan,
        result: Arc<HashCell>,
        keep: Keep,
    ) -> Result<(), DeviceError> {
        self.check_process()?;
        self.engine.submit(stream, Job::Hash { span, result, keep })
    }

    fn launch_host(&self, stream: RawStream, function: HostFunction, keep: Keep) -> Result<(), DeviceError> {
        self.check_process()?;
        self.engine.submit(stream, Job::Host { function, keep })
    }

    fn create_event(&self) -> Result<RawEvent, DeviceError> {
        self.check_process()?;
        Ok(self.engine.create_event())
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
        self.engine.wait_event(event, Duration::ZERO)
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
        core::mem::take(&mut self.errors.lock().kept)
    }
}
