//! The seam to the hardware: one trait of raw verbs, in the style of the driver.
//!
//! Apart because everything above must be the same code on a simulated device and on a GPU. The verbs take and
//! return plain numbers; ownership, lifetimes and Drop are the business of [`crate::owned`], which nearly every
//! caller wants instead. What each verb promises is tested by [`crate::conformance`].
//!
//! How a CUDA device fulfils it:
//!
//! | verb | driver |
//! |---|---|
//! | `reserve`, `release` | `cuMemAddressReserve`, `cuMemAddressFree` |
//! | `create_frame`, `destroy_frame` | `cuMemCreate`, `cuMemRelease` |
//! | `map`, `unmap` | `cuMemMap` + `cuMemSetAccess`, `cuMemUnmap` |
//! | `allocate_host`, `adopt_host`, `free_host` | our own pages, or a file's (`mmap`) |
//! | `lock_host` | `cuMemHostRegister`, undone by `free_host` |
//! | `create_stream`, `destroy_stream` | `cuStreamCreate` (non-blocking), `cuStreamDestroy` |
//! | `copy` | `cuMemcpyAsync` |
//! | `copy_many` | the same in a loop, `cuMemcpyBatchAsync`, or a kernel, by what each costs |
//! | `zero` | `cuMemsetD8Async` |
//! | `hash` | a kernel; the result goes to a page-locked slot and from there to the [`HashCell`] |
//! | `launch_host` | `cuLaunchHostFunc` |
//! | `record_foreign` | `cuEventRecord` on the other's stream; for all of them `cuCtxRecordEvent` |
//! | `foreign_wait` | `cuStreamWaitEvent` on the other's stream |
//! | `create_event`, `record`, `query_event`, `wait_event`, `stream_wait` | `cuEventCreate`, `cuEventRecord`, `cuEventQuery`, polling `cuEventQuery` until the deadline, `cuStreamWaitEvent` |
//!
//! Rules for every implementation:
//! - **Nothing fences by itself.** `unmap`, `destroy_frame` and `free_host` wait for no stream (I5 is the caller's).
//! - **A handle is indivisible**: a frame is mapped whole and unmapped whole (I4).
//! - **A refused call changes nothing.**
//! - **No lock is held while a call can block** (I9), so any verb may be called from any thread, and from the
//!   place where an implementation drops a [`Keep`].
//! - **A [`Keep`] is dropped after its job has finished and before any event recorded later on that stream is
//!   reported complete.** The simulated device drops it on the stream's thread; a CUDA device keeps a list per
//!   stream and drops what is done inside `query_event`, `wait_event` and the next submission (never in a host
//!   function, where the driver forbids calls).
//! - Handles are never reused within one device object, so a stale one is recognised.

#![expect(unsafe_code, reason = "the raw copy verbs are declared unsafe here; nothing unsafe is done")]

use core::any::Any;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::sync::Arc;

use shoal_core::bytes::ByteCount;
use shoal_core::ids::DeviceId;

use crate::error::DeviceError;
use crate::host::HostFile;

/// An address as the device sees it. On the simulated device it is an address of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VirtAddr(pub u64);

impl VirtAddr {
    /// The address `bytes` further on.
    #[must_use]
    pub const fn offset(self, bytes: ByteCount) -> Self {
        Self(self.0 + bytes.0)
    }
}

impl fmt::Display for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);
    };
}
handle!(
    /// A frame: device memory behind one extent, one handle of the driver.
    RawFrame
);
handle!(
    /// A stream: jobs done in order.
    RawStream
);
handle!(
    /// An event: a mark in a stream that can be asked about and waited for.
    RawEvent
);
handle!(
    /// Host memory, by its address in this process.
    RawHost
);

/// Which kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceKind {
    /// Simulated in RAM.
    Sim,
    /// An NVIDIA GPU through the driver.
    Cuda,
}

/// What a device is. Never changes while it is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Which device of this machine.
    pub id: DeviceId,
    /// Its name, for people.
    pub name: String,
    /// Its kind.
    pub kind: DeviceKind,
    /// Sizes and offsets of reservations, frames and mappings are multiples of this.
    pub granularity: ByteCount,
    /// Its memory in all.
    pub capacity: ByteCount,
}

/// How full a device is, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In all.
    pub total: ByteCount,
    /// Not held by any process.
    pub free: ByteCount,
    /// Held by frames of this process's device object.
    pub used_by_this_process: ByteCount,
}

/// On which side of the link bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Device memory, at an address from [`Device::reserve`].
    Device,
    /// Host memory, at an address from [`Device::allocate_host`].
    Host,
}

/// A run of bytes on one side, by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawSpan {
    /// Which side.
    pub space: Space,
    /// Where it begins.
    pub at: u64,
    /// Its length.
    pub bytes: ByteCount,
}

/// One of many copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawCopy {
    /// What is read.
    pub source: RawSpan,
    /// What is written, as long.
    pub target: RawSpan,
}

/// A stream that others made, such as torch, by the driver's handle (0 is the default stream).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForeignStream(u64);

impl ForeignStream {
    /// The default stream, which is always there.
    pub const DEFAULT: Self = Self(0);

    /// Names a stream of others.
    ///
    /// # Safety
    /// `handle` is a stream of this process's context on the device, and it lives for as long as this value or a
    /// copy of it is used. (torch never destroys its streams.)
    #[must_use]
    pub const unsafe fn new(handle: u64) -> Self {
        Self(handle)
    }

    /// The driver's handle.
    #[must_use]
    pub const fn handle(self) -> u64 {
        self.0
    }
}

/// Work that is queued on the device by others than us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForeignWork {
    /// Of one stream.
    Of(ForeignStream),
    /// Of every stream of this process.
    All,
}

/// What host memory is made of. The first are the fastest to make; each wants something of the machine that the next
/// does not ([`crate::host::survey`] says what it has).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum HostBacking {
    /// A memory file of huge pages that an administrator set aside (`vm.nr_hugepages`).
    ReservedHugePages,
    /// A memory file with huge pages as the kernel finds them (`shmem_enabled`).
    SharedHugePages,
    /// Private memory with huge pages as the kernel finds them.
    HugePages,
    /// Private memory with small pages.
    SmallPages,
}

/// What a queued job keeps alive until it has finished.
pub type Keep = Box<dyn Any + Send>;

/// Work of the host, in a stream's order. It must not call the device.
pub type HostFunction = Box<dyn FnOnce() + Send>;

/// Where a device puts a hash once its job has finished.
#[derive(Debug, Default)]
pub struct HashCell {
    value: AtomicU64,
    is_set: AtomicBool,
}

impl HashCell {
    /// Called once by the device, before an event recorded after the job completes.
    pub fn set(&self, value: u64) {
        self.value.store(value, Ordering::Relaxed);
        self.is_set.store(true, Ordering::Release);
    }

    /// The hash, once there.
    #[must_use]
    pub fn get(&self) -> Option<u64> {
        self.is_set.load(Ordering::Acquire).then(|| self.value.load(Ordering::Relaxed))
    }
}

/// One device, by raw verbs. See the module's text for the rules.
///
/// Every verb can answer [`DeviceError::Forked`] in a child made by `fork`, and what a driver may say
/// ([`DeviceError::Driver`], [`DeviceError::System`]); only further errors are listed per verb.
pub trait Device: fmt::Debug + Send + Sync + 'static {
    /// What this device is.
    fn info(&self) -> &DeviceInfo;

    /// How full it is now.
    ///
    /// # Errors
    /// The device or its ledger cannot be asked.
    fn memory(&self) -> Result<DeviceMemory, DeviceError>;

    /// Reserves addresses without memory. A touch faults until something is mapped there.
    ///
    /// # Errors
    /// `Misaligned`, `AddressSpace`.
    fn reserve(&self, bytes: ByteCount) -> Result<VirtAddr, DeviceError>;

    /// Gives a reservation back, whole.
    ///
    /// # Errors
    /// `NotReserved` (it must be named exactly), `InUse` while something is mapped in it.
    fn release(&self, at: VirtAddr, bytes: ByteCount) -> Result<(), DeviceError>;

    /// Takes device memory, zeroed (I12: nobody reads what another left; the driver scrubs it too).
    ///
    /// # Errors
    /// `Misaligned`, `OutOfMemory`; on the simulated device also `HostMemory`.
    fn create_frame(&self, bytes: ByteCount) -> Result<RawFrame, DeviceError>;

    /// Gives device memory back at once. Waits for nobody.
    ///
    /// # Errors
    /// `UnknownHandle`, `InUse` while it is mapped.
    fn destroy_frame(&self, frame: RawFrame) -> Result<(), DeviceError>;

    /// Maps a whole frame, readable and writable. A frame may be mapped at several addresses (I2: only to share
    /// what is read).
    ///
    /// # Errors
    /// `Misaligned`, `UnknownHandle`, `NotReserved`, `AlreadyMapped`, `MapLimit`.
    fn map(&self, at: VirtAddr, frame: RawFrame) -> Result<(), DeviceError>;

    /// Takes one mapping away, whole. The addresses stay reserved and fault from now on. Waits for nobody.
    ///
    /// # Errors
    /// `NotMapped`, `PartialMapping`.
    fn unmap(&self, at: VirtAddr, bytes: ByteCount) -> Result<(), DeviceError>;

    /// Host memory, zeroed and there from the start, at an address of this process aligned to at least 4 KiB. Made by
    /// several threads: a gibibyte takes from 40 ms on. It is not page-locked yet.
    ///
    /// # Errors
    /// `Misaligned` for zero bytes, `HostMemory`, `System` where the machine has no such backing.
    fn allocate_host(&self, bytes: ByteCount, backing: HostBacking) -> Result<RawHost, DeviceError>;

    /// Maps memory that another process may map too; what is in it stays. It is given back like memory of our own
    /// ([`Device::free_host`]), and lives on as long as anybody maps it or holds the file. It is not page-locked yet.
    ///
    /// # Errors
    /// `HostMemory`, `System`.
    fn adopt_host(&self, file: &HostFile) -> Result<RawHost, DeviceError>;

    /// Page-locks a whole piece of host memory, so that copies run at the speed of the link, beside their caller, and
    /// kernels reach it. Without it copies work, slower.
    ///
    /// # Errors
    /// `UnknownHandle`, `InUse` when it is locked, `LockLimit`, what the driver says.
    fn lock_host(&self, host: RawHost) -> Result<(), DeviceError>;

    /// Unlocks host memory and gives it back. Waits for nobody.
    ///
    /// # Errors
    /// `UnknownHandle`.
    ///
    /// # Safety
    /// No reference into the buffer and no queued job that touches it is left.
    unsafe fn free_host(&self, host: RawHost) -> Result<(), DeviceError>;

    /// A new stream, which waits for no other.
    ///
    /// # Errors
    /// No thread or driver object can be had.
    fn create_stream(&self) -> Result<RawStream, DeviceError>;

    /// Closes a stream. Returns at once; what is queued is still done.
    ///
    /// # Errors
    /// `UnknownHandle`.
    fn destroy_stream(&self, stream: RawStream) -> Result<(), DeviceError>;

    /// Queues a copy of `source` to `target` (equal lengths, not overlapping). On an error `keep` is dropped and nothing is
    /// queued; where a long copy is several jobs, some may be, and `keep` is dropped once those have finished.
    ///
    /// # Errors
    /// `UnknownHandle`, `LengthMismatch`, `QueueFull`.
    ///
    /// # Safety
    /// Both ranges must be mapped (device) or allocated (host) when the job runs and stay so until it has
    /// finished; `keep` is the usual way to see to it. No Rust reference to the target's bytes, and no
    /// `&mut` to the source's, may exist meanwhile.
    unsafe fn copy(
        &self,
        stream: RawStream,
        source: RawSpan,
        target: RawSpan,
        keep: Keep,
    ) -> Result<(), DeviceError>;

    /// Queues many copies at once, of any sizes and directions. They are done in any order, all of them after what is
    /// queued before and before what is queued later. The first list may take a moment longer: how the device copies
    /// blocks of each size best is measured then. On an error some of the copies may be queued; `keep` is dropped once
    /// those have finished.
    ///
    /// # Errors
    /// `UnknownHandle`, `LengthMismatch` (before anything is queued), `QueueFull`.
    ///
    /// # Safety
    /// As for `copy`, for each of them.
    unsafe fn copy_many(&self, stream: RawStream, copies: &[RawCopy], keep: Keep) -> Result<(), DeviceError>;

    /// Queues writing zeroes over device memory: what a frame that was used before needs to be as good as a new one. On an
    /// error `keep` is dropped and nothing is queued.
    ///
    /// # Errors
    /// `UnknownHandle`, `QueueFull`.
    ///
    /// # Safety
    /// As for `copy`, with `at..at + bytes` as the target.
    unsafe fn zero(
        &self,
        stream: RawStream,
        at: VirtAddr,
        bytes: ByteCount,
        keep: Keep,
    ) -> Result<(), DeviceError>;

    /// Queues a hash of `span` (see [`crate::hash_bytes`] for which), put into `result`. On an error `keep` is dropped and nothing is queued.
    ///
    /// # Errors
    /// `UnknownHandle`, `QueueFull`.
    ///
    /// # Safety
    /// As for `copy`, with `span` as the source.
    unsafe fn hash(
        &self,
        stream: RawStream,
        span: RawSpan,
        result: Arc<HashCell>,
        keep: Keep,
    ) -> Result<(), DeviceError>;

    /// Queues a function of the host. It must be short, must not panic and must not call the device (what it
    /// needs is held by `keep`, not by its captures). A panic is recorded ([`Device::take_errors`]) and the
    /// stream goes on.
    ///
    /// # Errors
    /// `UnknownHandle`, `QueueFull`.
    fn launch_host(&self, stream: RawStream, function: HostFunction, keep: Keep) -> Result<(), DeviceError>;

    /// A new event, complete until it is first recorded.
    ///
    /// # Errors
    /// No driver object can be had.
    fn create_event(&self) -> Result<RawEvent, DeviceError>;

    /// Gives an event back. Waits for nobody; whoever waits for it already goes on doing so.
    ///
    /// # Errors
    /// `UnknownHandle`.
    fn destroy_event(&self, event: RawEvent) -> Result<(), DeviceError>;

    /// Marks this point of a stream; from now on the event stands for it (and no longer for an earlier one).
    ///
    /// # Errors
    /// `UnknownHandle`, `QueueFull`.
    fn record(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError>;

    /// Marks what others have queued until now (torch, on streams of its own). Where nobody but us can queue
    /// anything, as on the simulated device, that is nothing, and the event is complete. Some drivers can only wait
    /// for [`ForeignWork::All`]; then this waits.
    ///
    /// # Errors
    /// `UnknownHandle`, `Capturing` while a graph is being captured there.
    fn record_foreign(&self, work: ForeignWork, event: RawEvent) -> Result<(), DeviceError>;

    /// Makes what others queue on `stream` from now on wait for the event's mark of this moment. The host does not wait.
    /// False: others have no streams here, as on the simulated device, where their work is done by whoever calls it; then
    /// the caller has to wait itself.
    ///
    /// # Errors
    /// `UnknownHandle`, `Capturing` while a graph is being captured there.
    fn foreign_wait(&self, stream: ForeignStream, event: RawEvent) -> Result<bool, DeviceError>;

    /// Whether everything before the mark is done. Never waits.
    ///
    /// # Errors
    /// `UnknownHandle`.
    fn query_event(&self, event: RawEvent) -> Result<bool, DeviceError>;

    /// Waits until everything before the mark is done, at most `timeout`. False: not yet.
    ///
    /// # Errors
    /// `UnknownHandle`.
    fn wait_event(&self, event: RawEvent, timeout: Duration) -> Result<bool, DeviceError>;

    /// Makes what is queued on `stream` from now on wait for the event's mark of this moment. The host does not wait.
    ///
    /// # Errors
    /// `UnknownHandle`, `QueueFull`.
    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError>;

    /// Keeps an error that has no caller to go to (a failed Drop, a panic on a stream). Bounded: past the bound the newest are counted, not kept.
    fn record_error(&self, error: DeviceError);

    /// The errors recorded since the last call, oldest first.
    fn take_errors(&self) -> Vec<DeviceError>;
}

/// The verbs of [`Device`], for counting, recording and failing them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "each is the verb of that name")]
pub enum Verb {
    Memory,
    Reserve,
    Release,
    CreateFrame,
    DestroyFrame,
    Map,
    Unmap,
    AllocateHost,
    AdoptHost,
    LockHost,
    FreeHost,
    CreateStream,
    DestroyStream,
    Copy,
    CopyMany,
    Zero,
    Hash,
    LaunchHost,
    CreateEvent,
    DestroyEvent,
    Record,
    RecordForeign,
    ForeignWait,
    QueryEvent,
    WaitEvent,
    StreamWait,
}

impl Verb {
    /// True for the verbs that take something away: a Drop calls them and has nobody to tell of a failure.
    #[must_use]
    pub const fn is_teardown(self) -> bool {
        matches!(
            self,
            Self::Release
                | Self::DestroyFrame
                | Self::Unmap
                | Self::FreeHost
                | Self::DestroyStream
                | Self::DestroyEvent
        )
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
