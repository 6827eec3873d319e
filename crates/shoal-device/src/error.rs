//! What a device call can answer instead of doing it.
//!
//! Apart because a caller decides by kind: only [`ErrorKind::OutOfMemory`] may start an eviction and a retry;
//! everything else goes up unchanged. Every variant carries fields, and where a person can help, the remedy.

use core::time::Duration;
use std::path::PathBuf;

use rustix::io::Errno;
use shoal_core::bytes::ByteCount;
use shoal_core::ids::DeviceId;

use crate::device::{Verb, VirtAddr};

/// Why a device call did not do what it was asked. A refused call has changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device has no room for a frame of this size. Evicting something may help.
    #[error("{device} is out of memory: {requested} requested, {free} free of {capacity}")]
    OutOfMemory {
        /// The device asked.
        device: DeviceId,
        /// The frame's size.
        requested: ByteCount,
        /// What was free at that moment, for all processes together.
        free: ByteCount,
        /// The device's size.
        capacity: ByteCount,
    },
    /// The machine's RAM is short (host buffers, and the simulated device's frames, live in it).
    #[error("{call}: {requested} of RAM could not be had ({available} available); {remedy}")]
    HostMemory {
        /// What was being done.
        call: &'static str,
        /// Bytes asked for.
        requested: ByteCount,
        /// Bytes that seemed available.
        available: ByteCount,
        /// What a person can do.
        remedy: &'static str,
    },
    /// The limit on locked memory leaves no room.
    #[error(
        "locking {requested} beside {locked} would pass the limit of {limit}; raise it (ulimit -l, LimitMEMLOCK=, docker run --ulimit memlock=-1)"
    )]
    LockLimit {
        /// Bytes to be locked.
        requested: ByteCount,
        /// Bytes locked already.
        locked: ByteCount,
        /// The limit.
        limit: ByteCount,
    },
    /// No run of virtual addresses of this length is left.
    #[error("{requested} of address space could not be reserved; {remedy}")]
    AddressSpace {
        /// Bytes asked for.
        requested: ByteCount,
        /// What a person can do.
        remedy: &'static str,
    },
    /// The kernel's limit on the mappings of one process is reached.
    #[error(
        "this process holds {mappings} frames mapped and vm.max_map_count is {limit}; raise it (sysctl -w vm.max_map_count={suggested}) or use larger extents"
    )]
    MapLimit {
        /// Frames mapped now.
        mappings: u64,
        /// `vm.max_map_count`.
        limit: u64,
        /// A value that would do.
        suggested: u64,
    },
    /// A size or an address is zero or not a multiple of the granularity.
    #[error("{what} {value:#x} is not a positive multiple of the granularity, {granularity}")]
    Misaligned {
        /// Which argument.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The device's granularity.
        granularity: ByteCount,
    },
    /// A range leaves the thing it lies in.
    #[error("{what}: offset {offset} + {bytes} is past the end, {limit}")]
    OutOfRange {
        /// Which thing.
        what: &'static str,
        /// Where the range begins.
        offset: ByteCount,
        /// Its length.
        bytes: ByteCount,
        /// The length of the thing it must lie in.
        limit: ByteCount,
    },
    /// Source and target of a copy differ in length.
    #[error("a copy's source is {source_bytes} long and its target {target_bytes}")]
    LengthMismatch {
        /// Source length.
        source_bytes: ByteCount,
        /// Target length.
        target_bytes: ByteCount,
    },
    /// A handle that this device did not give out, or that is gone.
    #[error("{what} {handle:#x} is not a live handle of {device}")]
    UnknownHandle {
        /// The device asked.
        device: DeviceId,
        /// Kind of handle.
        what: &'static str,
        /// Its number.
        handle: u64,
    },
    /// The address range is not inside one live reservation.
    #[error("{at}..+{bytes} is not inside one reservation")]
    NotReserved {
        /// Where it begins.
        at: VirtAddr,
        /// Its length.
        bytes: ByteCount,
    },
    /// Part of the range is mapped already.
    #[error("{at}..+{bytes} overlaps what is mapped at {mapped_at}")]
    AlreadyMapped {
        /// Where the refused mapping would begin.
        at: VirtAddr,
        /// Its length.
        bytes: ByteCount,
        /// Where the existing mapping begins.
        mapped_at: VirtAddr,
    },
    /// Nothing is mapped there.
    #[error("nothing is mapped at {at}..+{bytes}")]
    NotMapped {
        /// Where.
        at: VirtAddr,
        /// How much.
        bytes: ByteCount,
    },
    /// Handles are indivisible: a mapping is unmapped as it was mapped, whole (I4).
    #[error(
        "{at}..+{bytes} cuts the mapping {mapped_at}..+{mapped_bytes}; a frame is mapped and unmapped whole"
    )]
    PartialMapping {
        /// Where the refused range begins.
        at: VirtAddr,
        /// Its length.
        bytes: ByteCount,
        /// Where the mapping begins.
        mapped_at: VirtAddr,
        /// The mapping's length.
        mapped_bytes: ByteCount,
    },
    /// The thing is still used by something that must go first (a mapped frame, a reservation with mappings).
    #[error("{what} {handle:#x} is still in use")]
    InUse {
        /// Kind of thing.
        what: &'static str,
        /// Its handle or address.
        handle: u64,
    },
    /// A job on a stream, or another thread, is using these bytes of a host buffer.
    #[error("bytes {offset}..+{bytes} of a host buffer are in use by a queued job or another thread")]
    Busy {
        /// Where the refused access begins.
        offset: ByteCount,
        /// Its length.
        bytes: ByteCount,
    },
    /// A graph is being captured, and what was asked would spoil it.
    #[error("a CUDA graph is being captured on {device}; try again when the capture has ended")]
    Capturing {
        /// Where.
        device: DeviceId,
    },
    /// The stream's queue stayed full.
    #[error("stream {stream} had {depth} jobs queued for {waited:?}")]
    QueueFull {
        /// The stream.
        stream: u64,
        /// Its bound.
        depth: usize,
        /// How long the call waited for room.
        waited: Duration,
    },
    /// A deadline passed (the work goes on; nothing was freed).
    #[error("{what} was not done within {waited:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        waited: Duration,
    },
    /// The device was opened by another process: this one is its child after a fork.
    #[error(
        "{device} was opened by process {opened_by}; process {process} is a fork of it and must open its own"
    )]
    Forked {
        /// The device.
        device: DeviceId,
        /// Who opened it.
        opened_by: u32,
        /// Who asked.
        process: u32,
    },
    /// The device is there with another size than asked for.
    #[error(
        "{device} is in use with a capacity of {capacity}, not {requested}; all processes of one runtime directory open it alike"
    )]
    CapacityMismatch {
        /// The device.
        device: DeviceId,
        /// What its users agreed on.
        capacity: ByteCount,
        /// What was asked for.
        requested: ByteCount,
    },
    /// The file in which processes share a simulated device cannot be used.
    #[error("ledger {}: {reason}", path.display())]
    Ledger {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the remedy where there is one.
        reason: &'static str,
        /// What the system said, if it did.
        source: Option<Errno>,
    },
    /// The operating system refused.
    #[error("{call}: {source}")]
    System {
        /// The call.
        call: &'static str,
        /// What it answered.
        source: Errno,
    },
    /// The device's driver refused.
    #[error("{call}: {name} ({code})")]
    Driver {
        /// The driver's call.
        call: &'static str,
        /// Its code.
        code: i32,
        /// The code's name.
        name: String,
    },
    /// A host function on a stream panicked.
    #[error("a host function on stream {stream} panicked: {message}")]
    HostFunctionPanicked {
        /// The stream.
        stream: u64,
        /// The panic's message.
        message: String,
    },
    /// A fault that a test asked for.
    #[error("injected failure of call {call} ({verb})")]
    Injected {
        /// Which call of the device, counted from 1.
        call: u64,
        /// The verb.
        verb: Verb,
    },
    /// A failed teardown: the object was leaked on purpose, with what it holds. Recorded, never returned.
    #[error("{what} {handle:#x} could not be given back and was leaked: {cause}")]
    Leaked {
        /// Kind of object.
        what: &'static str,
        /// Its handle or address.
        handle: u64,
        /// Why.
        #[source]
        cause: Box<DeviceError>,
    },
    /// There is no such device here that this build and this driver can use.
    #[error("{device} cannot be used: {reason}; {remedy}")]
    Unavailable {
        /// The device asked for.
        device: DeviceId,
        /// Why not.
        reason: String,
        /// What a person can do.
        remedy: &'static str,
    },
    /// This device cannot do that.
    #[error("{device} does not support {what}")]
    Unsupported {
        /// The device.
        device: DeviceId,
        /// What was asked.
        what: &'static str,
    },
}

/// What to do about a [`DeviceError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Device memory is short: evict something and try again.
    OutOfMemory,
    /// RAM, address space, mappings or ledger slots are short: a person must raise a limit or lower a budget.
    Exhausted,
    /// The caller's arguments are wrong: a bug above the device.
    Usage,
    /// In use right now: wait for the event, then try again.
    Busy,
    /// A deadline passed.
    Timeout,
    /// The device cannot be used by this process, or as asked.
    Unavailable,
    /// The operating system or the driver failed.
    System,
    /// A test asked for it.
    Injected,
}

impl DeviceError {
    /// What to do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::OutOfMemory { .. } => ErrorKind::OutOfMemory,
            Self::HostMemory { .. }
            | Self::LockLimit { .. }
            | Self::AddressSpace { .. }
            | Self::MapLimit { .. } => ErrorKind::Exhausted,
            Self::Misaligned { .. }
            | Self::OutOfRange { .. }
            | Self::LengthMismatch { .. }
            | Self::UnknownHandle { .. }
            | Self::NotReserved { .. }
            | Self::AlreadyMapped { .. }
            | Self::NotMapped { .. }
            | Self::PartialMapping { .. }
            | Self::InUse { .. } => ErrorKind::Usage,
            Self::Busy { .. } | Self::Capturing { .. } => ErrorKind::Busy,
            Self::QueueFull { .. } | Self::Timeout { .. } => ErrorKind::Timeout,
            Self::Forked { .. }
            | Self::CapacityMismatch { .. }
            | Self::Ledger { .. }
            | Self::Unavailable { .. }
            | Self::Unsupported { .. } => ErrorKind::Unavailable,
            Self::System { .. } | Self::Driver { .. } | Self::HostFunctionPanicked { .. } => {
                ErrorKind::System
            }
            Self::Injected { .. } => ErrorKind::Injected,
            Self::Leaked { cause, .. } => cause.kind(),
        }
    }

    /// `call` failed with `source`.
    #[must_use]
    pub(crate) fn system(call: &'static str, source: Errno) -> Self {
        Self::System { call, source }
    }
}
