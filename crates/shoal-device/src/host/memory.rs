//! Host memory by address: mapped, filled, and given back; and which of it is page-locked.
//!
//! Apart because this is where the time goes: the driver's own allocation fills pages with one thread at about
//! 1 GiB/s, so the pages are ours, huge where the kernel has such, and several threads fill them. Locking is one
//! call of the device on memory that is there already. After a fork a child has none of it.

#![expect(unsafe_code, reason = "maps, fills and unmaps memory")]

use core::ffi::c_void;
use core::num::NonZero;
use core::ptr;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use shoal_core::bytes::ByteCount;
use shoal_core::ids::DeviceId;

use crate::device::{HostBacking, RawHost};
use crate::error::DeviceError;
use crate::host::HostFile;
use crate::sim::ram::{check_available, shortage};

const SMALL_PAGE_BYTES: u64 = 4096;
pub(crate) const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// Below this a second thread costs more than it saves.
const BYTES_PER_THREAD_MIN: u64 = 32 << 20;
/// So much is made with one call: the kernel holds the lock of the process's addresses for as long as that takes, and whoever
/// maps memory, starts a thread or touches a new page waits for it.
const FILL_BYTES: u64 = 4 << 20;
/// More threads than this wait for one another in the kernel.
const THREADS_MAX: u64 = 16;
const CALL: &str = "allocating host memory";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lock {
    None,
    /// The device is at it.
    UnderWay,
    Done,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    bytes: u64,
    lock: Lock,
}

/// The host memory of one device object: address to piece.
#[derive(Debug, Default)]
pub(crate) struct HostMemory {
    live: Mutex<BTreeMap<u64, Piece>>,
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64-bit sizes")
}

fn pointer(at: u64) -> *mut c_void {
    ptr::with_exposed_provenance_mut(length(at))
}

fn unknown(device: DeviceId, host: RawHost) -> DeviceError {
    DeviceError::UnknownHandle { device, what: "host memory", handle: host.0 }
}

impl HostMemory {
    /// Pieces that exist.
    pub(crate) fn count(&self) -> usize {
        self.live.lock().len()
    }

    /// True if this range lies in one page-locked piece.
    #[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "the CUDA device asks"))]
    pub(crate) fn is_locked(&self, at: u64, bytes: u64) -> bool {
        let live = self.live.lock();
        live.range(..=at)
            .next_back()
            .is_some_and(|(start, piece)| piece.lock == Lock::Done && at + bytes <= start + piece.bytes)
    }

    /// The page-locked piece that an address lies in: its first byte and the one after its last.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "the CUDA device asks"))]
    pub(crate) fn locked_piece_of(&self, at: u64) -> Option<(u64, u64)> {
        let live = self.live.lock();
        let (start, piece) = live.range(..=at).next_back()?;
        (piece.lock == Lock::Done && at < start + piece.bytes).then_some((*start, start + piece.bytes))
    }

    /// Maps memory and fills it with zeroes.
    pub(crate) fn allocate(&self, bytes: ByteCount, backing: HostBacking) -> Result<RawHost, DeviceError> {
        if bytes.is_zero() {
            let granularity = ByteCount(1);
            return Err(DeviceError::Misaligned { what: "host memory of bytes", value: 0, granularity });
        }
        if backing != HostBacking::ReservedHugePages {
            check_available(CALL, bytes)?;
        }
        let unit = if backing == HostBacking::SmallPages { SMALL_PAGE_BYTES } else { HUGE_PAGE_BYTES };
        let rounded = bytes.0.checked_next_multiple_of(unit).ok_or_else(|| shortage(CALL, bytes))?;
        let file = match backing {
            HostBacking::ReservedHugePages | HostBacking::SharedHugePages => {
                Some(HostFile::create(ByteCount(rounded), backing)?)
            }
            HostBacking::HugePages | HostBacking::SmallPages => None,
        };
        let source = match &file {
            Some(file) => Source::Shared(file),
            None => Source::Private { is_huge: backing == HostBacking::HugePages },
        };
        let at = map(rounded, unit, source).map_err(|(call, source)| match source {
            Errno::NOMEM | Errno::AGAIN => shortage(CALL, bytes),
            other => DeviceError::system(call, other),
        })?;
        if !fill(at, rounded) {
            unmap(at, rounded).map_err(|source| DeviceError::system("munmap", source))?;
            return Err(shortage(CALL, bytes));
        }
        self.live.lock().insert(at, Piece { bytes: rounded, lock: Lock::None });
        Ok(RawHost(at))
    }

    /// Maps a file in memory, and makes all of it be there; its content stays.
    pub(crate) fn adopt(&self, file: &HostFile) -> Result<RawHost, DeviceError> {
        let bytes = file.bytes();
        let at =
            map(bytes.0, HUGE_PAGE_BYTES, Source::Shared(file)).map_err(|(call, source)| match source {
                Errno::NOMEM | Errno::AGAIN => shortage(CALL, bytes),
                other => DeviceError::system(call, other),
            })?;
        if !fill(at, bytes.0) {
            unmap(at, bytes.0).map_err(|source| DeviceError::system("munmap", source))?;
            return Err(shortage(CALL, bytes));
        }
        self.live.lock().insert(at, Piece { bytes: bytes.0, lock: Lock::None });
        Ok(RawHost(at))
    }

    /// Page-locks a whole piece by `register(at, bytes)`, unless all that is locked would then exceed `limit`.
    pub(crate) fn lock(
        &self,
        device: DeviceId,
        host: RawHost,
        limit: Option<ByteCount>,
        register: impl FnOnce(u64, u64) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let bytes = {
            let mut live = self.live.lock();
            let locked =
                live.values().filter(|piece| piece.lock != Lock::None).map(|piece| piece.bytes).sum();
            let piece = live.get_mut(&host.0).ok_or_else(|| unknown(device, host))?;
            if piece.lock != Lock::None {
                return Err(DeviceError::InUse { what: "page-locked host memory", handle: host.0 });
            }
            let (requested, locked) = (ByteCount(piece.bytes), ByteCount(locked));
            if let Some(limit) = limit.filter(|limit| locked + requested > *limit) {
                return Err(DeviceError::LockLimit { requested, locked, limit });
            }
            piece.lock = Lock::UnderWay;
            piece.bytes
        };
        let outcome = register(host.0, bytes);
        if let Some(piece) = self.live.lock().get_mut(&host.0) {
            piece.lock = if outcome.is_ok() { Lock::Done } else { Lock::None };
        }
        outcome
    }

    /// Unlocks a piece by `unregister(at)` if it is locked, then unmaps it.
    ///
    /// # Safety
    /// No reference into it and no queued job that touches it is left, and no other call is about it.
    pub(crate) unsafe fn free(
        &self,
        device: DeviceId,
        host: RawHost,
        unregister: impl FnOnce(u64) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Some(piece) = self.live.lock().remove(&host.0) else { return Err(unknown(device, host)) };
        // Pages are unlocked before they are unmapped, or a device could still reach what is no longer ours.
        let unlocked = if piece.lock == Lock::None { Ok(()) } else { unregister(host.0) };
        if let Err(error) = unlocked {
            self.live.lock().insert(host.0, piece);
            return Err(error);
        }
        unmap(host.0, piece.bytes).map_err(|source| {
            let piece = Piece { lock: Lock::None, ..piece };
            self.live.lock().insert(host.0, piece);
            DeviceError::system("munmap", source)
        })
    }
}

/// Where a mapping's memory comes from.
#[derive(Clone, Copy)]
enum Source<'a> {
    Private {
        is_huge: bool,
    },
    /// A file, which lives as long as it is mapped or somebody holds it.
    Shared(&'a HostFile),
}

/// A mapping, aligned to `unit`; on an error nothing stays mapped.
fn map(bytes: u64, unit: u64, source: Source<'_>) -> Result<u64, (&'static str, Errno)> {
    let wide = bytes.checked_add(unit).ok_or(("mmap", Errno::NOMEM))?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel picks unused addresses, so no one else's memory changes.
    let start = unsafe { mmap_anonymous(ptr::null_mut(), length(wide), protection, MapFlags::PRIVATE) };
    let start = start.map_err(|source| ("mmap", source))?.expose_provenance() as u64;
    let at = start.next_multiple_of(unit);
    let trimmed = unmap(start, at - start).and_then(|()| unmap(at + bytes, start + wide - (at + bytes)));
    let replaced = trimmed.map_err(|source| ("munmap", source)).and_then(|()| match source {
        Source::Private { .. } => Ok(()),
        Source::Shared(file) => map_file(at, bytes, file),
    });
    if let Err(error) = replaced {
        // What was trimmed already is a hole; unmapping a hole is nothing.
        let _ = unmap(at, bytes);
        return Err(error);
    }
    // SAFETY: mapped just above; a child made by fork has no use for it, and its copy would break the pinning.
    let advised = unsafe { madvise(pointer(at), length(bytes), Advice::LinuxDontFork) };
    if let Err(source) = advised {
        let _ = unmap(at, bytes);
        return Err(("madvise", source));
    }
    let wants_advice = match source {
        Source::Private { is_huge } => is_huge,
        // Of what was set aside all pages are huge.
        Source::Shared(file) => file.backing() == HostBacking::SharedHugePages,
    };
    if wants_advice {
        // Where huge pages are switched off this is refused, and small ones do.
        // SAFETY: mapped just above.
        let _ = unsafe { madvise(pointer(at), length(bytes), Advice::LinuxHugepage) };
    }
    Ok(at)
}

/// Puts a file in memory in the place of what is mapped at `at`.
fn map_file(at: u64, bytes: u64, file: &HostFile) -> Result<(), (&'static str, Errno)> {
    let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
    // SAFETY: replaces a mapping that `map` made just now and that nobody else knows.
    let mapped = unsafe { mmap(pointer(at), length(bytes), protection, flags, file, 0) };
    mapped.map(|_| ()).map_err(|source| ("mmap", source))
}

fn unmap(at: u64, bytes: u64) -> Result<(), Errno> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: mapped by `map`, and either never handed out or given back by its one owner.
    unsafe { munmap(pointer(at), length(bytes)) }
}

/// Makes the memory be there, from as many threads as help. False: there is not so much.
fn fill(at: u64, bytes: u64) -> bool {
    let cores = thread::available_parallelism().map_or(1, NonZero::get) as u64;
    let threads = (bytes / BYTES_PER_THREAD_MIN).clamp(1, THREADS_MAX.min(cores));
    let share = bytes.div_ceil(threads).next_multiple_of(HUGE_PAGE_BYTES);
    let is_there = AtomicBool::new(true);
    let fill_share = |index: u64| {
        let (start, end) = ((index * share).min(bytes), ((index + 1) * share).min(bytes));
        if !fill_part(at + start, end - start) {
            is_there.store(false, Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        for index in 1..threads {
            let spawned = thread::Builder::new().spawn_scoped(scope, move || fill_share(index));
            if spawned.is_err() {
                fill_share(index);
            }
        }
        fill_share(0);
    });
    is_there.into_inner()
}

fn fill_part(at: u64, bytes: u64) -> bool {
    let mut steps = (0..bytes).step_by(length(FILL_BYTES));
    steps.all(|offset| fill_step(at + offset, FILL_BYTES.min(bytes - offset)))
}

fn fill_step(at: u64, bytes: u64) -> bool {
    loop {
        // SAFETY: inside a mapping that only the caller knows; zeroes stay zeroes.
        match unsafe { madvise(pointer(at), length(bytes), Advice::LinuxPopulateWrite) } {
            Ok(()) => return true,
            Err(Errno::INTR | Errno::AGAIN) => {}
            // Kernels before 5.14, and those that only look like Linux, do not know the advice.
            Err(Errno::INVAL) => break,
            Err(_) => return false,
        }
    }
    for offset in (0..bytes).step_by(length(SMALL_PAGE_BYTES)) {
        let byte = pointer(at + offset).cast::<u8>();
        // SAFETY: inside a mapping that only the caller knows.
        unsafe { byte.write_volatile(0) };
    }
    true
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test")]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    const ID: DeviceId = DeviceId(0);

    fn free(memory: &HostMemory, host: RawHost) -> Result<(), DeviceError> {
        // SAFETY: a test that keeps no reference.
        unsafe { memory.free(ID, host, |_| Ok(())) }
    }

    /// How many of the steps that make this memory have begun: by the first page of each.
    fn steps_begun(at: u64, bytes: u64) -> usize {
        let pages = File::open("/proc/self/pagemap").unwrap();
        let is_there = |at: &u64| {
            let mut entry = [0; 8];
            pages.read_exact_at(&mut entry, at / SMALL_PAGE_BYTES * 8).unwrap();
            u64::from_ne_bytes(entry) >> 63 == 1
        };
        (at..at + bytes).step_by(length(FILL_BYTES)).filter(is_there).count()
    }

    /// Mapping needs the lock of the process's addresses, as a new thread does and a page that is touched first.
    #[test]
    fn others_map_memory_between_the_steps_in_which_memory_is_made() {
        let bytes = 512 << 20;
        let whole = usize::try_from(bytes / FILL_BYTES).unwrap();
        let mut seen = BTreeSet::new();
        // Where another thread hardly runs meanwhile, it sees nothing in between.
        for _ in 0..20 {
            let at = map(bytes, HUGE_PAGE_BYTES, Source::Private { is_huge: true }).unwrap();
            seen = thread::scope(|scope| {
                let made = scope.spawn(move || fill(at, bytes));
                let mut seen = BTreeSet::new();
                while !made.is_finished() {
                    seen.insert(steps_begun(at, bytes));
                    let own =
                        map(SMALL_PAGE_BYTES, SMALL_PAGE_BYTES, Source::Private { is_huge: false }).unwrap();
                    unmap(own, SMALL_PAGE_BYTES).unwrap();
                }
                assert!(made.join().unwrap());
                seen
            });
            unmap(at, bytes).unwrap();
            seen.retain(|steps| (1..whole).contains(steps));
            if seen.len() >= 4 {
                return;
            }
        }
        panic!("whoever maps waits for all of it: {seen:?} of {whole} steps seen");
    }

    #[test]
    fn every_backing_that_this_machine_has_is_zeroed_aligned_and_goes_back() {
        let memory = HostMemory::default();
        for backing in [HostBacking::SharedHugePages, HostBacking::HugePages, HostBacking::SmallPages] {
            let bytes = ByteCount::mib(70);
            let host = memory.allocate(bytes, backing).unwrap();
            assert!(backing == HostBacking::SmallPages || host.0.is_multiple_of(HUGE_PAGE_BYTES));
            let start = pointer(host.0).cast::<u8>();
            // SAFETY: just allocated, and freed below.
            let content = unsafe { core::slice::from_raw_parts_mut(start, length(bytes.0)) };
            assert!(content.iter().all(|byte| *byte == 0), "{backing:?}");
            content.fill(0xAB);
            free(&memory, host).unwrap();
            assert!(matches!(free(&memory, host), Err(DeviceError::UnknownHandle { .. })));
        }
        assert_eq!(memory.count(), 0);
    }

    #[test]
    fn a_file_mapped_twice_is_one_memory_and_reads_as_zeroes_once_it_is_discarded() {
        let file = HostFile::create(ByteCount::mib(3), HostBacking::SharedHugePages).unwrap();
        let bytes = file.bytes();
        assert_eq!(bytes, ByteCount::mib(4), "whole huge pages");
        let (one, other) = (HostMemory::default(), HostMemory::default());
        let first = one.adopt(&file).unwrap();
        let handed = HostFile::of(file.try_clone().unwrap().into(), bytes, file.backing()).unwrap();
        let second = other.adopt(&handed).unwrap();
        let slice = |at: RawHost| {
            // SAFETY: just mapped, and freed below; one reference at a time is used.
            unsafe { core::slice::from_raw_parts_mut(pointer(at.0).cast::<u8>(), length(bytes.0)) }
        };
        slice(first).fill(0xCD);
        assert!(slice(second).iter().all(|byte| *byte == 0xCD));
        free(&one, first).unwrap();
        assert!(slice(second).iter().all(|byte| *byte == 0xCD), "the other keeps it");
        file.discard().unwrap();
        assert!(slice(second).iter().all(|byte| *byte == 0));
        free(&other, second).unwrap();
        let short = HostFile::of(handed.try_clone().unwrap().into(), ByteCount::mib(2), file.backing());
        assert!(matches!(short, Err(DeviceError::LengthMismatch { .. })), "{short:?}");
        let plain = std::os::fd::OwnedFd::from(tempfile::tempfile().unwrap());
        assert!(HostFile::of(plain, bytes, file.backing()).is_err(), "a file on disk is no memory");
        assert!(HostFile::create(bytes, HostBacking::SmallPages).is_err());
    }

    #[test]
    fn huge_pages_that_nobody_set_aside_are_an_error_and_no_fault() {
        let memory = HostMemory::default();
        // No machine has sixty-four tebibytes set aside.
        let refused = memory.allocate(ByteCount::gib(1 << 16), HostBacking::ReservedHugePages).unwrap_err();
        let is_typed = matches!(refused, DeviceError::HostMemory { .. } | DeviceError::System { .. });
        assert!(is_typed, "{refused}");
        assert_eq!(memory.count(), 0);
    }

    #[test]
    fn locking_is_counted_bounded_and_undone_before_the_memory_goes() {
        let (memory, limit) = (HostMemory::default(), Some(ByteCount::mib(3)));
        let two = || memory.allocate(ByteCount::mib(2), HostBacking::SmallPages).unwrap();
        let (first, second) = (two(), two());
        let refusal = DeviceError::Injected { call: 1, verb: crate::device::Verb::LockHost };
        let refused = memory.lock(ID, first, limit, |_, _| Err(refusal.clone()));
        assert_eq!(refused, Err(refusal.clone()), "not counted as locked");
        memory.lock(ID, first, limit, |_, _| Ok(())).unwrap();
        assert!(memory.is_locked(first.0 + 4096, 4096) && !memory.is_locked(first.0, 3 << 20));
        assert!(matches!(memory.lock(ID, first, limit, |_, _| Ok(())), Err(DeviceError::InUse { .. })));
        let over = memory.lock(ID, second, limit, |_, _| Ok(())).unwrap_err();
        let expected = DeviceError::LockLimit {
            requested: ByteCount::mib(2),
            locked: ByteCount::mib(2),
            limit: ByteCount::mib(3),
        };
        assert_eq!(over, expected);
        // SAFETY: a test that keeps no reference.
        assert_eq!(unsafe { memory.free(ID, first, |_| Err(refusal.clone())) }, Err(refusal), "still there");
        assert!(memory.is_locked(first.0, 4096), "what could not be unlocked stays mapped and locked");
        free(&memory, first).unwrap();
        memory.lock(ID, second, limit, |_, _| Ok(())).unwrap();
        free(&memory, second).unwrap();
        assert_eq!(memory.count(), 0);
    }
}
