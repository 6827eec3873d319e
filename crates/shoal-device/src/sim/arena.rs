//! Address space and frames of one process.
//!
//! Apart because here are the calls that change what an address means. A reservation is `PROT_NONE`; a frame is a
//! run of one memory file of this process; mapping puts the run over the reservation, unmapping puts `PROT_NONE`
//! back, atomically, so the address never belongs to anyone else (I3). A destroyed frame's run is punched out of
//! the file and its offset never used again, so every frame starts as zeroes (I12), and one mapping is one whole
//! frame (I4). The kernel frees the file with the process, however that ends.

#![expect(unsafe_code, reason = "reserves, maps and unmaps address space")]

use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::fd::OwnedFd;
use std::process;

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::ids::DeviceId;

use crate::device::{RawFrame, VirtAddr};
use crate::error::DeviceError;

/// Mappings left to everything else in the process (libraries, threads, allocators).
const MAP_COUNT_HEADROOM: u64 = 8192;
const MAP_COUNT_DEFAULT: u64 = 65_530;

#[derive(Debug)]
pub(super) struct Arena {
    id: DeviceId,
    process: u32,
    file: OwnedFd,
    /// Where the next frame begins in the file. Never goes back.
    next_offset: AtomicU64,
    map_count_limit: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    reservations: BTreeMap<u64, u64>,
    mappings: BTreeMap<u64, Mapped>,
    frames: HashMap<u64, FrameState>,
}

#[derive(Debug, Clone, Copy)]
struct Mapped {
    bytes: u64,
    frame: u64,
}

#[derive(Debug, Clone, Copy)]
struct FrameState {
    offset: u64,
    bytes: u64,
    mappings: u32,
}

fn pointer(at: u64) -> *mut c_void {
    ptr::with_exposed_provenance_mut(usize::try_from(at).expect("64-bit addresses"))
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64-bit sizes")
}

impl State {
    fn reservation_around(&self, at: u64, bytes: u64) -> Option<u64> {
        let (start, reserved) = self.reservations.range(..=at).next_back()?;
        let end = at.checked_add(bytes)?;
        (end <= start + reserved).then_some(*start)
    }

    fn mapping_meeting(&self, at: u64, bytes: u64) -> Option<(u64, Mapped)> {
        let (start, mapped) = self.mappings.range(..at.saturating_add(bytes)).next_back()?;
        (start + mapped.bytes > at).then_some((*start, *mapped))
    }
}

impl Arena {
    pub(super) fn open(id: DeviceId) -> Result<Self, DeviceError> {
        let file = memfd_create(format!("shoal-sim-{}", id.0), MemfdFlags::CLOEXEC)
            .map_err(|source| DeviceError::system("memfd_create", source))?;
        let map_count_limit = fs::read_to_string("/proc/sys/vm/max_map_count")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(MAP_COUNT_DEFAULT);
        Ok(Self {
            id,
            process: process::id(),
            file,
            next_offset: AtomicU64::new(0),
            map_count_limit,
            state: Mutex::default(),
        })
    }

    /// Reservations, frames, mappings.
    pub(super) fn count(&self) -> (usize, usize, usize) {
        let state = self.state.lock();
        (state.reservations.len(), state.frames.len(), state.mappings.len())
    }

    pub(super) fn reserve(&self, bytes: ByteCount) -> Result<VirtAddr, DeviceError> {
        let refuse = || DeviceError::AddressSpace {
            requested: bytes,
            remedy: "raise the limit on address space (ulimit -v) or reserve less",
        };
        // One page more than asked for, so that an aligned run lies inside; the ends go back at once.
        let wide = bytes.checked_add(PAGE_BYTES).ok_or_else(refuse)?;
        let wide_length = usize::try_from(wide.0).map_err(|_| refuse())?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel picks unused addresses, so no one else's memory changes.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), wide_length, ProtFlags::empty(), flags) };
        let start = start.map_err(|source| match source {
            Errno::NOMEM | Errno::AGAIN => refuse(),
            other => DeviceError::system("mmap", other),
        })?;
        let start = start.expose_provenance() as u64;
        let at = start.next_multiple_of(PAGE_BYTES.0);
        let (before, after) = (at - start, (start + wide.0) - (at + bytes.0));
        let trimmed = Self::discard(start, before).and_then(|()| Self::discard(at + bytes.0, after));
        if let Err(error) = trimmed {
            Self::discard(start, wide.0)?;
            return Err(error);
        }
        self.state.lock().reservations.insert(at, bytes.0);
        Ok(VirtAddr(at))
    }

    /// Gives addresses back to the kernel. Only for ranges of a reservation that nobody knows (any more).
    fn discard(at: u64, bytes: u64) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range was reserved by this arena and is known to nobody else: it was never handed out, or
        // its reservation is being released and holds no mapping (I3).
        unsafe { munmap(pointer(at), length(bytes)) }.map_err(|source| DeviceError::system("munmap", source))
    }

    pub(super) fn release(&self, at: VirtAddr, bytes: ByteCount) -> Result<(), DeviceError> {
        let mut state = self.state.lock();
        if state.reservations.get(&at.0) != Some(&bytes.0) {
            return Err(DeviceError::NotReserved { at, bytes });
        }
        if state.mapping_meeting(at.0, bytes.0).is_some() {
            return Err(DeviceError::InUse { what: "reservation", handle: at.0 });
        }
        Self::discard(at.0, bytes.0)?;
        state.reservations.remove(&at.0);
        Ok(())
    }

    pub(super) fn create(&self, bytes: ByteCount) -> Result<RawFrame, DeviceError> {
        let offset = self.next_offset.fetch_add(bytes.0, Ordering::Relaxed);
        // Allocates the memory now: a shortage is an error here and never a SIGBUS at a touch.
        if let Err(source) = fallocate(&self.file, FallocateFlags::empty(), offset, bytes.0) {
            self.punch(offset, bytes.0).ok();
            return Err(match source {
                Errno::NOSPC | Errno::NOMEM => {
                    super::ram::shortage("fallocate of the simulated device's memory", bytes)
                }
                other => DeviceError::system("fallocate", other),
            });
        }
        // Offsets are never used twice, so the offset names the frame; plus one, so that no handle is zero.
        let raw = offset + 1;
        let frame = FrameState { offset, bytes: bytes.0, mappings: 0 };
        self.state.lock().frames.insert(raw, frame);
        Ok(RawFrame(raw))
    }

    fn punch(&self, offset: u64, bytes: u64) -> Result<(), DeviceError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, offset, bytes)
            .map_err(|source| DeviceError::system("fallocate(PUNCH_HOLE)", source))
    }

    pub(super) fn destroy(&self, raw: RawFrame) -> Result<ByteCount, DeviceError> {
        let frame = {
            let mut state = self.state.lock();
            let frame = *state.frames.get(&raw.0).ok_or_else(|| self.unknown(raw))?;
            if frame.mappings > 0 {
                return Err(DeviceError::InUse { what: "frame", handle: raw.0 });
            }
            state.frames.remove(&raw.0);
            frame
        };
        if let Err(error) = self.punch(frame.offset, frame.bytes) {
            self.state.lock().frames.insert(raw.0, frame);
            return Err(error);
        }
        Ok(ByteCount(frame.bytes))
    }

    fn unknown(&self, raw: RawFrame) -> DeviceError {
        DeviceError::UnknownHandle { device: self.id, what: "frame", handle: raw.0 }
    }

    pub(super) fn map(&self, at: VirtAddr, raw: RawFrame) -> Result<(), DeviceError> {
        let mut state = self.state.lock();
        let frame = *state.frames.get(&raw.0).ok_or_else(|| self.unknown(raw))?;
        let bytes = ByteCount(frame.bytes);
        if state.reservation_around(at.0, frame.bytes).is_none() {
            return Err(DeviceError::NotReserved { at, bytes });
        }
        if let Some((mapped_at, _)) = state.mapping_meeting(at.0, frame.bytes) {
            return Err(DeviceError::AlreadyMapped { at, bytes, mapped_at: VirtAddr(mapped_at) });
        }
        // Each mapping may split a reservation in two. Checked ahead, because at the limit an unmap fails too.
        let mappings = state.mappings.len() as u64;
        let kernel_mappings_max = 2 * (mappings + 1) + state.reservations.len() as u64;
        if kernel_mappings_max + MAP_COUNT_HEADROOM.min(self.map_count_limit / 4) > self.map_count_limit {
            return Err(self.map_limit(mappings));
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the range lies in a live reservation of this arena and nothing is mapped in it (checked above,
        // under the lock; I3), and it is exactly as long as the frame's run of the file (I4).
        let mapped =
            unsafe { mmap(pointer(at.0), length(frame.bytes), protection, flags, &self.file, frame.offset) };
        mapped.map_err(|source| match source {
            Errno::NOMEM => self.map_limit(mappings),
            other => DeviceError::system("mmap", other),
        })?;
        // SAFETY: the range was mapped just above; a child made by fork shall fault on it, as on a GPU's.
        let advised = unsafe { madvise(pointer(at.0), length(frame.bytes), Advice::LinuxDontFork) };
        if let Err(source) = advised {
            Self::cover(at.0, frame.bytes)?;
            return Err(DeviceError::system("madvise(MADV_DONTFORK)", source));
        }
        state.mappings.insert(at.0, Mapped { bytes: frame.bytes, frame: raw.0 });
        if let Some(frame) = state.frames.get_mut(&raw.0) {
            frame.mappings += 1;
        }
        Ok(())
    }

    fn map_limit(&self, mappings: u64) -> DeviceError {
        let limit = self.map_count_limit;
        DeviceError::MapLimit { mappings, limit, suggested: limit.saturating_mul(4).max(262_144) }
    }

    /// Puts `PROT_NONE` over a range: unmapped for us, still reserved for everyone else.
    fn cover(at: u64, bytes: u64) -> Result<(), DeviceError> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range is a whole mapping inside a live reservation of this arena (I3, I4); that no job and
        // no kernel uses it is the caller's fence (I5), and a touch after it faults, which is the promise.
        let covered = unsafe { mmap_anonymous(pointer(at), length(bytes), ProtFlags::empty(), flags) };
        covered.map(|_| ()).map_err(|source| DeviceError::system("mmap(PROT_NONE)", source))
    }

    pub(super) fn unmap(&self, at: VirtAddr, bytes: ByteCount) -> Result<(), DeviceError> {
        let mut state = self.state.lock();
        let Some((mapped_at, mapped)) = state.mapping_meeting(at.0, bytes.0) else {
            return Err(DeviceError::NotMapped { at, bytes });
        };
        if (mapped_at, mapped.bytes) != (at.0, bytes.0) {
            let (mapped_at, mapped_bytes) = (VirtAddr(mapped_at), ByteCount(mapped.bytes));
            return Err(DeviceError::PartialMapping { at, bytes, mapped_at, mapped_bytes });
        }
        Self::cover(at.0, bytes.0)?;
        state.mappings.remove(&at.0);
        if let Some(frame) = state.frames.get_mut(&mapped.frame) {
            frame.mappings -= 1;
        }
        Ok(())
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // A child made by fork has its own copy of the address space, in which nobody expects a change.
        if process::id() != self.process {
            return;
        }
        // What is still reserved was leaked by raw callers; the owned layer holds the device until it is done.
        for (at, bytes) in core::mem::take(&mut self.state.get_mut().reservations) {
            if let Err(error) = Self::discard(at, bytes) {
                tracing::error!(%error, at, bytes, "a leaked reservation could not be given back");
            }
        }
    }
}
