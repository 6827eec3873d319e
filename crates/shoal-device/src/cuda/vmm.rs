//! Address space, frames and mappings of one device object.
//!
//! Apart because here is the book that turns the driver's bare numbers into answers: what is reserved, what is
//! mapped where, what a wrong range cuts. The driver is called outside the book's lock (I9): an entry is made or
//! marked first, so that two callers never act on one range, and taken back when the driver refuses.

#![expect(unsafe_code, reason = "maps and unmaps device memory")]

use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;

use super::context::Context;
use super::result::{MemoryHandle, is_out_of_memory};
use crate::device::{RawFrame, VirtAddr};
use crate::error::DeviceError;

#[derive(Debug)]
pub(super) struct Vmm {
    context: Arc<Context>,
    granularity: ByteCount,
    capacity: ByteCount,
    used: AtomicU64,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    reservations: BTreeMap<u64, u64>,
    mappings: BTreeMap<u64, Mapped>,
    frames: HashMap<u64, FrameState>,
    frames_made: u64,
}

#[derive(Debug, Clone, Copy)]
struct Mapped {
    bytes: u64,
    frame: u64,
    /// False while the driver is being asked to make or to end it.
    is_settled: bool,
}

#[derive(Debug, Clone, Copy)]
struct FrameState {
    memory: MemoryHandle,
    bytes: u64,
    mappings: u32,
}

impl Book {
    fn is_reserved(&self, at: u64, bytes: u64) -> bool {
        let Some(end) = at.checked_add(bytes) else { return false };
        self.reservations.range(..=at).next_back().is_some_and(|(start, reserved)| end <= start + reserved)
    }

    fn mapping_meeting(&self, at: u64, bytes: u64) -> Option<(u64, Mapped)> {
        let (start, mapped) = self.mappings.range(..at.saturating_add(bytes)).next_back()?;
        (start + mapped.bytes > at).then_some((*start, *mapped))
    }

    fn forget_mapping(&mut self, at: u64) {
        if let Some(mapped) = self.mappings.remove(&at)
            && let Some(frame) = self.frames.get_mut(&mapped.frame)
        {
            frame.mappings -= 1;
        }
    }
}

impl Vmm {
    pub(super) fn new(context: Arc<Context>, granularity: ByteCount, capacity: ByteCount) -> Self {
        Self { context, granularity, capacity, used: AtomicU64::new(0), book: Mutex::default() }
    }

    /// Bytes of all frames.
    pub(super) fn used(&self) -> ByteCount {
        ByteCount(self.used.load(Ordering::Relaxed))
    }

    /// Reservations, frames, mappings.
    pub(super) fn count(&self) -> (usize, usize, usize) {
        let book = self.book.lock();
        (book.reservations.len(), book.frames.len(), book.mappings.len())
    }

    fn check_size(&self, what: &'static str, value: u64) -> Result<(), DeviceError> {
        if value != 0 && value.is_multiple_of(self.granularity.0) {
            return Ok(());
        }
        Err(DeviceError::Misaligned { what, value, granularity: self.granularity })
    }

    fn unknown(&self, raw: RawFrame) -> DeviceError {
        DeviceError::UnknownHandle { device: self.context.id(), what: "frame", handle: raw.0 }
    }

    /// The reservation that an address lies in: its first byte and the one after its last.
    pub(super) fn reservation_of(&self, at: u64) -> Option<(u64, u64)> {
        let book = self.book.lock();
        let (start, bytes) = book.reservations.range(..=at).next_back()?;
        (at < start + bytes).then_some((*start, start + bytes))
    }

    pub(super) fn reserve(&self, bytes: ByteCount) -> Result<VirtAddr, DeviceError> {
        self.check_size("a reservation of bytes", bytes.0)?;
        let _bound = self.context.bind()?;
        let reserved = self.context.driver().address_reserve(bytes.0, self.granularity.0);
        let at = reserved.map_err(|error| {
            if is_out_of_memory(&error) {
                let remedy = "reserve less, or raise the limit on address space (ulimit -v)";
                return DeviceError::AddressSpace { requested: bytes, remedy };
            }
            error
        })?;
        self.book.lock().reservations.insert(at, bytes.0);
        Ok(VirtAddr(at))
    }

    pub(super) fn release(&self, at: VirtAddr, bytes: ByteCount) -> Result<(), DeviceError> {
        let _bound = self.context.bind()?;
        {
            let mut book = self.book.lock();
            if book.reservations.get(&at.0) != Some(&bytes.0) {
                return Err(DeviceError::NotReserved { at, bytes });
            }
            if book.mapping_meeting(at.0, bytes.0).is_some() {
                return Err(DeviceError::InUse { what: "reservation", handle: at.0 });
            }
            book.reservations.remove(&at.0);
        }
        // SAFETY: a whole reservation of this book, without mappings; it left the book, so nobody maps into it now.
        let freed = unsafe { self.context.driver().address_free(at.0, bytes.0) };
        if freed.is_err() {
            self.book.lock().reservations.insert(at.0, bytes.0);
        }
        freed
    }

    pub(super) fn create(&self, bytes: ByteCount) -> Result<RawFrame, DeviceError> {
        self.check_size("a frame of bytes", bytes.0)?;
        let bound = self.context.bind()?;
        let created = self.context.driver().memory_create(self.context.ordinal(), bytes.0);
        let memory = match created {
            Ok(memory) => memory,
            Err(error) if is_out_of_memory(&error) => {
                let (free, _) = self.context.driver().memory_info()?;
                return Err(DeviceError::OutOfMemory {
                    device: self.context.id(),
                    requested: bytes,
                    free: ByteCount(free),
                    capacity: self.capacity,
                });
            }
            Err(error) => return Err(error),
        };
        drop(bound);
        self.used.fetch_add(bytes.0, Ordering::Relaxed);
        let mut book = self.book.lock();
        book.frames_made += 1;
        let raw = book.frames_made;
        book.frames.insert(raw, FrameState { memory, bytes: bytes.0, mappings: 0 });
        Ok(RawFrame(raw))
    }

    pub(super) fn destroy(&self, raw: RawFrame) -> Result<(), DeviceError> {
        let _bound = self.context.bind()?;
        let frame = {
            let mut book = self.book.lock();
            let frame = *book.frames.get(&raw.0).ok_or_else(|| self.unknown(raw))?;
            if frame.mappings > 0 {
                return Err(DeviceError::InUse { what: "frame", handle: raw.0 });
            }
            book.frames.remove(&raw.0);
            frame
        };
        if let Err(error) = self.context.driver().memory_release(frame.memory) {
            self.book.lock().frames.insert(raw.0, frame);
            return Err(error);
        }
        self.used.fetch_sub(frame.bytes, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn map(&self, at: VirtAddr, raw: RawFrame) -> Result<(), DeviceError> {
        self.check_size("address", at.0)?;
        let _bound = self.context.bind()?;
        let frame = {
            let mut book = self.book.lock();
            let frame = *book.frames.get(&raw.0).ok_or_else(|| self.unknown(raw))?;
            let bytes = ByteCount(frame.bytes);
            if !book.is_reserved(at.0, frame.bytes) {
                return Err(DeviceError::NotReserved { at, bytes });
            }
            if let Some((mapped_at, _)) = book.mapping_meeting(at.0, frame.bytes) {
                return Err(DeviceError::AlreadyMapped { at, bytes, mapped_at: VirtAddr(mapped_at) });
            }
            book.mappings.insert(at.0, Mapped { bytes: frame.bytes, frame: raw.0, is_settled: false });
            if let Some(frame) = book.frames.get_mut(&raw.0) {
                frame.mappings += 1;
            }
            frame
        };
        let outcome = self.map_now(at.0, frame);
        let mut book = self.book.lock();
        match &outcome {
            Ok(()) => {
                if let Some(mapped) = book.mappings.get_mut(&at.0) {
                    mapped.is_settled = true;
                }
            }
            Err(_) => book.forget_mapping(at.0),
        }
        outcome
    }

    /// Asks the driver; a refusal leaves nothing mapped.
    fn map_now(&self, at: u64, frame: FrameState) -> Result<(), DeviceError> {
        let driver = self.context.driver();
        // SAFETY: inside a reservation of the book, and the book's new entry keeps the range ours and empty.
        unsafe { driver.memory_map(at, frame.bytes, frame.memory) }?;
        let set = driver.set_access(self.context.ordinal(), at, frame.bytes);
        if set.is_err() {
            // SAFETY: mapped just above, not told to anybody yet.
            unsafe { driver.memory_unmap(at, frame.bytes) }?;
        }
        set
    }

    pub(super) fn unmap(&self, at: VirtAddr, bytes: ByteCount) -> Result<(), DeviceError> {
        let _bound = self.context.bind()?;
        {
            let mut book = self.book.lock();
            let Some((mapped_at, mapped)) = book.mapping_meeting(at.0, bytes.0) else {
                return Err(DeviceError::NotMapped { at, bytes });
            };
            if (mapped_at, mapped.bytes) != (at.0, bytes.0) {
                let (mapped_at, mapped_bytes) = (VirtAddr(mapped_at), ByteCount(mapped.bytes));
                return Err(DeviceError::PartialMapping { at, bytes, mapped_at, mapped_bytes });
            }
            if !mapped.is_settled {
                return Err(DeviceError::NotMapped { at, bytes });
            }
            book.mappings.insert(at.0, Mapped { is_settled: false, ..mapped });
        }
        // SAFETY: one whole mapping of the book (I4), marked so that nobody else ends it; that no queued work uses
        // it is the caller's fence (I5), and a touch after it faults, which is the promise.
        let unmapped = unsafe { self.context.driver().memory_unmap(at.0, bytes.0) };
        let mut book = self.book.lock();
        if unmapped.is_ok() {
            book.forget_mapping(at.0);
        } else if let Some(mapped) = book.mappings.get_mut(&at.0) {
            mapped.is_settled = true;
        }
        unmapped
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Raw callers may leave things behind; the owned layer holds the device until it is done.
        let (reservations, frames, mappings) = self.count();
        if (reservations, frames, mappings) != (0, 0, 0) {
            tracing::error!(
                reservations,
                frames,
                mappings,
                "a device was closed with memory of its own left"
            );
        }
    }
}

/// Device memory of our own (scratch of kernels), outside the book. Mapped while it lives.
///
/// From the same calls as frames, because freeing what `cuMemAlloc` gave waits for the whole device.
#[derive(Debug)]
pub(super) struct Block {
    context: Arc<Context>,
    memory: MemoryHandle,
    at: u64,
    bytes: u64,
}

impl Block {
    /// Takes at least `bytes`.
    pub(super) fn take(context: &Arc<Context>, bytes: u64) -> Result<Self, DeviceError> {
        let _bound = context.bind()?;
        let driver = context.driver();
        let granularity = driver.granularity(context.ordinal())?;
        let bytes = bytes.max(1).next_multiple_of(granularity);
        let memory = driver.memory_create(context.ordinal(), bytes)?;
        let placed = driver.address_reserve(bytes, granularity).and_then(|at| {
            // SAFETY: reserved just above, for this alone.
            let mapped = unsafe { driver.memory_map(at, bytes, memory) };
            let outcome = mapped.and_then(|()| {
                driver.set_access(context.ordinal(), at, bytes).inspect_err(|_| {
                    // SAFETY: mapped just above, used by nobody.
                    let _ = unsafe { driver.memory_unmap(at, bytes) };
                })
            });
            if outcome.is_err() {
                // SAFETY: reserved just above; nothing is mapped there.
                let _ = unsafe { driver.address_free(at, bytes) };
            }
            outcome.map(|()| at)
        });
        match placed {
            Ok(at) => Ok(Self { context: Arc::clone(context), memory, at, bytes }),
            Err(error) => {
                driver.memory_release(memory)?;
                Err(error)
            }
        }
    }

    pub(super) fn at(&self) -> u64 {
        self.at
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let driver = self.context.driver();
        let outcome = self.context.bind().and_then(|_bound| {
            // SAFETY: our own mapping; jobs that use it hold an `Arc` of this object (I5).
            unsafe { driver.memory_unmap(self.at, self.bytes) }?;
            // SAFETY: our own reservation, unmapped just above.
            unsafe { driver.address_free(self.at, self.bytes) }?;
            driver.memory_release(self.memory)
        });
        if let Err(error) = outcome {
            tracing::error!(%error, "scratch memory could not be given back");
        }
    }
}
