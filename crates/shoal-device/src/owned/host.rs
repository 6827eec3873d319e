//! Buffers of host memory, and who may touch which bytes of them when.
//!
//! Apart because it is the one kind of memory that both the host (through references) and queued jobs (through
//! addresses) reach. Each access of the host and each queued job is entered in a small table by its range; an
//! access that would race with a job or with another thread's access is answered [`DeviceError::Busy`]. Jobs
//! among themselves are ordered by their streams and events, which is their caller's business.

#![expect(unsafe_code, reason = "turns owned, range-checked and exclusively held host memory into slices")]

use core::any::Any;
use core::fmt;
use core::ptr;
use core::slice;
use std::sync::Arc;

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;

use super::{HostSlab, check_range};
use crate::device::{Device, HostBacking};
use crate::error::DeviceError;

/// Below this, huge pages would be mostly waste.
const HUGE_BYTES_MIN: ByteCount = ByteCount::mib(2);

/// A part of a [`HostSlab`] for one thing at a time.
pub struct HostBuffer {
    offset: ByteCount,
    bytes: ByteCount,
    in_use: Mutex<Uses>,
    // Dropped in this order: who gave the part away hears that it is free while the slab is still there.
    claim: Box<dyn Any + Send + Sync>,
    slab: Arc<HostSlab>,
}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostBuffer")
            .field("offset", &self.offset)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

/// A range that somebody reads or writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Use {
    start: u64,
    end: u64,
    writes: bool,
}

impl Use {
    /// Two uses exclude one another when they meet and one of them writes.
    fn excludes(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end && (self.writes || other.writes)
    }

    /// Whether another begins where this one ends, and is of its kind.
    const fn goes_on_as(self, next: Self) -> bool {
        self.end == next.start && self.writes == next.writes
    }
}

/// Who uses a buffer now. Jobs do not exclude one another, so theirs are looked through only when the host comes.
#[derive(Default)]
struct Uses {
    by_host: Vec<Use>,
    by_jobs: Vec<JobUses>,
    job_next: u64,
}

/// Ranges of a buffer that one job uses. Of most buffers that is one range, however many copies it comes in: a block is
/// copied plane by plane, each where the one before ended.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// From the first to the last byte of all of them, written if any is; none where there is none.
    hull: Option<Use>,
    /// Empty where the hull is the only one.
    ranges: Vec<Use>,
}

impl Ranges {
    /// One range more.
    pub(super) fn add(&mut self, range: Use) {
        let Some(hull) = &mut self.hull else {
            self.hull = Some(range);
            return;
        };
        match self.ranges.last_mut() {
            None if hull.goes_on_as(range) => {
                hull.end = range.end;
                return;
            }
            Some(last) if last.goes_on_as(range) => last.end = range.end,
            Some(_) => self.ranges.push(range),
            None => self.ranges.extend([*hull, range]),
        }
        *hull = Use {
            start: hull.start.min(range.start),
            end: hull.end.max(range.end),
            writes: hull.writes || range.writes,
        };
    }

    fn excludes(&self, other: Use) -> bool {
        self.hull.is_some_and(|hull| hull.excludes(other))
            && (self.ranges.is_empty() || self.ranges.iter().any(|range| range.excludes(other)))
    }
}

/// What one job uses of a buffer.
struct JobUses {
    job: u64,
    ranges: Ranges,
}

/// An entered use; dropping it takes it out again.
struct UseGuard<'a> {
    buffer: &'a HostBuffer,
    entry: Use,
}

impl Drop for UseGuard<'_> {
    fn drop(&mut self) {
        self.buffer.leave(self.entry);
    }
}

/// The use of a range by a queued job: holds the buffer until the job has finished.
pub(super) struct JobUse {
    buffer: Arc<HostBuffer>,
    job: u64,
}

impl fmt::Debug for JobUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobUse").field("job", &self.job).finish_non_exhaustive()
    }
}

impl Drop for JobUse {
    fn drop(&mut self) {
        let left = {
            let by_jobs = &mut self.buffer.in_use.lock().by_jobs;
            let index = by_jobs.iter().position(|uses| uses.job == self.job);
            index.map(|index| by_jobs.swap_remove(index))
        };
        drop(left);
    }
}

/// A range of a buffer that is read for as long as this lives. Meanwhile every writer is answered [`DeviceError::Busy`].
pub struct HostView {
    buffer: Arc<HostBuffer>,
    entry: Use,
}

impl fmt::Debug for HostView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostView").field("range", &self.entry).finish_non_exhaustive()
    }
}

impl HostView {
    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        let (start, length) =
            self.buffer.locate(ByteCount(self.entry.start), ByteCount(self.entry.end - self.entry.start));
        // SAFETY: the range lies in this part of a live slab (checked when it was entered), which no other buffer has,
        // and the entered use keeps every writer away from it until the view drops.
        unsafe { slice::from_raw_parts(start, length) }
    }

    /// The buffer that it is of: jobs may read these bytes meanwhile.
    #[must_use]
    pub const fn buffer(&self) -> &Arc<HostBuffer> {
        &self.buffer
    }

    /// Where it begins in its buffer.
    #[must_use]
    pub const fn offset(&self) -> ByteCount {
        ByteCount(self.entry.start)
    }

    /// Another view of the same bytes.
    #[must_use]
    pub fn again(&self) -> Self {
        // Readers do not exclude one another.
        self.buffer.in_use.lock().by_host.push(self.entry);
        Self { buffer: Arc::clone(&self.buffer), entry: self.entry }
    }
}

impl Drop for HostView {
    fn drop(&mut self) {
        self.buffer.leave(self.entry);
    }
}

/// A range of a buffer that is written by whoever has this. Meanwhile everybody else is answered [`DeviceError::Busy`].
pub struct HostViewMut {
    buffer: Arc<HostBuffer>,
    entry: Use,
}

impl fmt::Debug for HostViewMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostViewMut").field("range", &self.entry).finish_non_exhaustive()
    }
}

impl HostViewMut {
    /// The bytes. They stay at their address for as long as this lives, wherever it moves.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        let (start, length) =
            self.buffer.locate(ByteCount(self.entry.start), ByteCount(self.entry.end - self.entry.start));
        // SAFETY: the range lies in this part of a live slab (checked when it was entered), which no other buffer has,
        // and the entered use keeps everybody else away from it until the view drops.
        unsafe { slice::from_raw_parts(start, length) }
    }

    /// The bytes, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let (start, length) =
            self.buffer.locate(ByteCount(self.entry.start), ByteCount(self.entry.end - self.entry.start));
        // SAFETY: as in `as_slice`; this borrow of the view is the only one.
        unsafe { slice::from_raw_parts_mut(start, length) }
    }

    /// The buffer that it is of.
    #[must_use]
    pub const fn buffer(&self) -> &Arc<HostBuffer> {
        &self.buffer
    }

    /// The bytes as they are now, lent for reading: nobody else writes to them in between.
    #[must_use]
    pub fn shared(mut self) -> HostView {
        let (written, entry) = (self.entry, Use { writes: false, ..self.entry });
        let by_host = &mut self.buffer.in_use.lock().by_host;
        if let Some(own) = by_host.iter_mut().find(|other| **other == written) {
            *own = entry;
        }
        // One for the answer, and one that goes with what this was.
        by_host.push(entry);
        let view = HostView { buffer: Arc::clone(&self.buffer), entry };
        self.entry = entry;
        view
    }
}

impl Drop for HostViewMut {
    fn drop(&mut self) {
        self.buffer.leave(self.entry);
    }
}

impl HostBuffer {
    /// Host memory of its own, zeroed, that the device can copy from and to; page-locked if that is allowed.
    ///
    /// # Errors
    /// As [`Device::allocate_host`].
    pub fn allocate(device: &Arc<dyn Device>, bytes: ByteCount) -> Result<Arc<Self>, DeviceError> {
        let backing = if bytes < HUGE_BYTES_MIN { HostBacking::SmallPages } else { HostBacking::HugePages };
        let slab = HostSlab::allocate(device, bytes, backing)?;
        if let Err(error) = slab.lock() {
            tracing::warn!(%error, %bytes, "host memory is not page-locked, so copies are slower");
        }
        slab.buffer(ByteCount::ZERO, bytes, ())
    }

    pub(super) fn part(
        slab: Arc<HostSlab>,
        offset: ByteCount,
        bytes: ByteCount,
        claim: Box<dyn Any + Send + Sync>,
    ) -> Self {
        Self { offset, bytes, in_use: Mutex::default(), claim, slab }
    }

    /// Whether it is page-locked: without that, copies are slower and kernels do not reach it.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.slab.is_locked()
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> ByteCount {
        self.bytes
    }

    /// What [`HostSlab::buffer`] was given along: by it whoever divides a slab knows its own.
    #[must_use]
    pub fn claim(&self) -> &(dyn Any + Send + Sync) {
        &*self.claim
    }

    /// Whose copies reach it.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        self.slab.device()
    }

    pub(super) fn address(&self) -> u64 {
        self.slab.address() + self.offset.0
    }

    /// Copies `from` into the buffer at `offset`.
    ///
    /// # Errors
    /// `OutOfRange`, `Busy` while a queued job or another thread uses these bytes.
    pub fn write(&self, offset: ByteCount, from: &[u8]) -> Result<(), DeviceError> {
        self.access_mut(offset, ByteCount(from.len() as u64), |bytes| bytes.copy_from_slice(from))
    }

    /// Copies bytes from `offset` on out of the buffer.
    ///
    /// # Errors
    /// As [`HostBuffer::write`]; `Busy` only against writers.
    pub fn read(&self, offset: ByteCount, into: &mut [u8]) -> Result<(), DeviceError> {
        self.access(offset, ByteCount(into.len() as u64), |bytes| into.copy_from_slice(bytes))
    }

    /// Lends a range for reading, without a copy (to hash it, to write it to a file).
    ///
    /// # Errors
    /// As [`HostBuffer::read`].
    pub fn access<R>(
        &self,
        offset: ByteCount,
        bytes: ByteCount,
        reader: impl FnOnce(&[u8]) -> R,
    ) -> Result<R, DeviceError> {
        let _guard = self.enter_host(offset, bytes, false)?;
        let (start, length) = self.locate(offset, bytes);
        // SAFETY: the range lies in this part of a live slab (checked in `enter_host`), which no other buffer has, and
        // the entered use keeps every writer away from it until the guard drops.
        let slice = unsafe { slice::from_raw_parts(start, length) };
        Ok(reader(slice))
    }

    /// Lends a range for reading for as long as the answer lives.
    ///
    /// # Errors
    /// As [`HostBuffer::read`].
    pub fn view(self: &Arc<Self>, offset: ByteCount, bytes: ByteCount) -> Result<HostView, DeviceError> {
        let entry = self.enter(offset, bytes, false)?;
        Ok(HostView { buffer: Arc::clone(self), entry })
    }

    /// Lends a range for writing for as long as the answer lives (a disk fills it meanwhile).
    ///
    /// # Errors
    /// As [`HostBuffer::write`].
    pub fn view_mut(
        self: &Arc<Self>,
        offset: ByteCount,
        bytes: ByteCount,
    ) -> Result<HostViewMut, DeviceError> {
        let entry = self.enter(offset, bytes, true)?;
        Ok(HostViewMut { buffer: Arc::clone(self), entry })
    }

    /// Lends a range for writing, without a copy (to read a file into it).
    ///
    /// # Errors
    /// As [`HostBuffer::write`].
    pub fn access_mut<R>(
        &self,
        offset: ByteCount,
        bytes: ByteCount,
        writer: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<R, DeviceError> {
        let _guard = self.enter_host(offset, bytes, true)?;
        let (start, length) = self.locate(offset, bytes);
        // SAFETY: the range lies in this part of a live slab (checked in `enter_host`), which no other buffer has, and
        // the entered use keeps every other reader and writer away from it until the guard drops.
        let slice = unsafe { slice::from_raw_parts_mut(start, length) };
        Ok(writer(slice))
    }

    /// The use of a range of it, which is checked.
    pub(super) fn use_of(
        &self,
        offset: ByteCount,
        bytes: ByteCount,
        writes: bool,
    ) -> Result<Use, DeviceError> {
        check_range("host buffer", offset, bytes, self.bytes)?;
        Ok(Use { start: offset.0, end: offset.0 + bytes.0, writes })
    }

    /// Enters the use of a range by a job that is about to be queued.
    pub(super) fn enter_job(
        self: &Arc<Self>,
        offset: ByteCount,
        bytes: ByteCount,
        writes: bool,
    ) -> Result<JobUse, DeviceError> {
        let mut ranges = Ranges::default();
        ranges.add(self.use_of(offset, bytes, writes)?);
        self.enter_job_many(ranges)
    }

    /// Enters the use of many ranges by a job that is about to be queued: of all, or on an error of none.
    pub(super) fn enter_job_many(self: &Arc<Self>, ranges: Ranges) -> Result<JobUse, DeviceError> {
        let mut in_use = self.in_use.lock();
        if in_use.by_host.iter().any(|other| ranges.excludes(*other)) {
            return Err(busy(ranges.hull.unwrap_or(Use { start: 0, end: 0, writes: false })));
        }
        let job = in_use.job_next;
        in_use.job_next += 1;
        in_use.by_jobs.push(JobUses { job, ranges });
        drop(in_use);
        Ok(JobUse { buffer: Arc::clone(self), job })
    }

    fn enter_host(
        &self,
        offset: ByteCount,
        bytes: ByteCount,
        writes: bool,
    ) -> Result<UseGuard<'_>, DeviceError> {
        Ok(UseGuard { entry: self.enter(offset, bytes, writes)?, buffer: self })
    }

    /// Enters a use of the host's, which somebody has to take out again.
    fn enter(&self, offset: ByteCount, bytes: ByteCount, writes: bool) -> Result<Use, DeviceError> {
        let entry = self.use_of(offset, bytes, writes)?;
        let mut in_use = self.in_use.lock();
        if in_use.by_host.iter().any(|other| other.excludes(entry))
            || in_use.by_jobs.iter().any(|uses| uses.ranges.excludes(entry))
        {
            return Err(busy(entry));
        }
        in_use.by_host.push(entry);
        drop(in_use);
        Ok(entry)
    }

    fn leave(&self, entry: Use) {
        let by_host = &mut self.in_use.lock().by_host;
        if let Some(index) = by_host.iter().position(|other| *other == entry) {
            by_host.swap_remove(index);
        }
    }

    fn locate(&self, offset: ByteCount, bytes: ByteCount) -> (*mut u8, usize) {
        let address = usize::try_from(self.address() + offset.0).expect("an address of this process");
        let length = usize::try_from(bytes.0).expect("no longer than the buffer");
        (ptr::with_exposed_provenance_mut(address), length)
    }
}

fn busy(range: Use) -> DeviceError {
    DeviceError::Busy { offset: ByteCount(range.start), bytes: ByteCount(range.end - range.start) }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        // Slices borrow `self` and queued jobs hold an `Arc` of it, so neither is left.
        self.slab.part_is_free(self.offset);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;
    use crate::sim::{SimDevice, SimOptions};

    #[test]
    fn ranges_of_a_job_are_joined_where_they_go_on_and_exclude_what_they_meet() {
        let of = |start, end, writes| Use { start, end, writes };
        let mut ranges = Ranges::default();
        for start in (0..4096).step_by(64) {
            ranges.add(of(start, start + 64, false));
        }
        assert_eq!((ranges.hull, ranges.ranges.len()), (Some(of(0, 4096, false)), 0), "one range");
        ranges.add(of(8192, 8256, true));
        ranges.add(of(8256, 8320, true));
        ranges.add(of(8320, 8384, false));
        assert_eq!(ranges.hull, Some(of(0, 8384, true)));
        assert_eq!(ranges.ranges, [of(0, 4096, false), of(8192, 8320, true), of(8320, 8384, false)]);
        assert!(!ranges.excludes(of(4096, 8192, true)), "nobody uses what is between");
        assert!(!ranges.excludes(of(0, 4096, false)), "both read");
        assert!(ranges.excludes(of(4000, 4001, true)) && ranges.excludes(of(8319, 8400, false)));
        assert!(!ranges.excludes(of(8320, 8400, false)));
        assert!(!Ranges::default().excludes(of(0, 1, true)));
    }

    #[test]
    fn what_was_written_is_shared_without_a_gap_and_free_when_all_views_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let device = SimDevice::open_dyn(SimOptions::new(ByteCount::mib(4), dir.path())).unwrap();
        let buffer = HostBuffer::allocate(&device, ByteCount(4096)).unwrap();
        let (start, rest) = (ByteCount(1024), ByteCount(1024));
        let mut written = buffer.view_mut(start, rest).unwrap();
        let other = buffer.view_mut(ByteCount::ZERO, start).unwrap();
        written.as_mut_slice().fill(7);
        assert!(matches!(buffer.view(start, rest), Err(DeviceError::Busy { .. })));
        let first = written.shared();
        assert_eq!((first.offset(), first.buffer().bytes()), (start, ByteCount(4096)));
        let second = first.again();
        assert!(buffer.view_mut(start, rest).is_err(), "it is read");
        assert!(buffer.view(ByteCount::ZERO, start).is_err(), "the other part is written as before");
        drop(first);
        assert!(second.as_slice().iter().all(|byte| *byte == 7));
        assert!(buffer.view_mut(start, rest).is_err(), "it is read still");
        drop((second, other));
        assert!(buffer.view_mut(ByteCount::ZERO, ByteCount(4096)).is_ok(), "nobody has any of it");
    }
}
