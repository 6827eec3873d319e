//! Many copies as one job: by the copy engine one by one, by the copy engine handed over together, or by a kernel.
//!
//! Apart because the driver moves small blocks at a tenth of the link's speed, and which way is fastest for which size is
//! the device's own. What each way costs is measured when the first list comes ([`measure`]) and kept in a file; which run
//! goes which way is decided by [`shoal_core::copy_plan`]. Memory that is not page-locked goes by the copy engine, one by
//! one: a kernel does not reach it.
//!
//! A list is done in windows, a small one first, so that the device works on one while the next is planned; none of them
//! is long, so that what others queue is not held up. Stores yield to loads: while bytes are on their way to the device,
//! kernels that take bytes off it run on fewer multiprocessors, since both want the same link.

#![expect(unsafe_code, reason = "queues copies and kernels by address")]

pub(super) mod calls;
mod kernels;
mod measure;
mod pieces;

use core::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kernels::CopyKernels;
pub(super) use kernels::PTX;
use parking_lot::Mutex;
use pieces::{PIECES_MAX, Pieces};
use shoal_core::copy_plan::costs::{CopyCosts, Costs};
use shoal_core::copy_plan::{CopyPlan, Run};

use super::context::{Context, CudaFacts};
use super::copy;
use super::host::LockedMemory;
use super::stream::Engine;
use super::vmm::Vmm;
use crate::device::{Keep, RawCopy, RawStream, Space};
use crate::error::DeviceError;

/// Copies of the first window of a list that nothing is before, so that the device begins soon; and of a long one.
const WINDOW_MIN: usize = 512;
const WINDOW_MAX: usize = 8192;
/// How much longer each window is than the one before, which is copied while it is planned.
const WINDOW_GROWTH: usize = 4;
/// What one warp copies at a time.
const UNIT_BYTES: u64 = 8 << 10;
/// Copies of the engine's that are queued in one go: a stream takes nothing else meanwhile.
const CALLS_MAX: usize = 256;
/// Copies that are handed over together.
const BATCH_MAX: usize = 1024;
/// Blocks of threads, so multiprocessors, of a kernel: enough for the link.
const BLOCKS_UP: u32 = 8;
const BLOCKS_DOWN: u32 = 4;
/// Both, for those who ask.
pub(super) const MULTIPROCESSORS: (u32, u32) = (BLOCKS_UP, BLOCKS_DOWN);
/// The same while loads are under way.
const BLOCKS_DOWN_YIELDING: u32 = 2;
/// How long a list waits for a table.
const TABLE_WAIT_MAX: Duration = Duration::from_secs(30);
const TABLE_NAP: Duration = Duration::from_micros(50);

/// Which way bytes go over the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// To the device.
    Up,
    /// To the host.
    Down,
}

/// What a list keeps alive, until the last part of it has ended.
type SharedKeep = Arc<Mutex<Keep>>;

/// Copies that are queued in one way.
#[derive(Clone, Copy, Debug)]
enum Part<'a> {
    Dma(&'a [Run]),
    Batch(&'a [Run]),
    Units(&'a [Run]),
}

/// Where the addresses of a list belong to; the last answer is tried first, since blocks come from few places.
struct Places<'a> {
    vmm: &'a Vmm,
    host: &'a LockedMemory,
    on_device: Option<(u64, u64)>,
    in_host: Option<(u64, u64)>,
}

impl Places<'_> {
    fn find(
        known: &mut Option<(u64, u64)>,
        at: u64,
        bytes: u64,
        ask: impl FnOnce() -> Option<(u64, u64)>,
    ) -> Option<u64> {
        let holds = |(start, end): (u64, u64)| at >= start && at + bytes <= end;
        if !known.is_some_and(holds) {
            *known = ask();
        }
        known.filter(|place| holds(*place)).map(|(start, _)| start)
    }

    /// The run of a copy; `None` where an end is of no one piece of page-locked memory.
    fn run(&mut self, copy: &RawCopy, direction: Direction) -> Option<Run> {
        let (source, target, bytes) = (copy.source.at, copy.target.at, copy.source.bytes.0);
        let (on_device, in_host) = match direction {
            Direction::Up => (target, source),
            Direction::Down => (source, target),
        };
        let (vmm, host) = (self.vmm, self.host);
        let reserved = Self::find(&mut self.on_device, on_device, bytes, || vmm.reservation_of(on_device))?;
        let locked = Self::find(&mut self.in_host, in_host, bytes, || host.pages().locked_piece_of(in_host))?;
        // Pieces begin at pages: two pairs with one seam would lie terabytes apart, and be no neighbours.
        Some(Run { source, target, bytes, seam: reserved ^ locked.rotate_left(32) })
    }
}

/// What a list of copies needs of the device.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    pub(super) engine: &'a Engine,
    pub(super) vmm: &'a Vmm,
    pub(super) host: &'a LockedMemory,
    pub(super) facts: &'a CudaFacts,
    pub(super) key: &'a str,
}

/// The copies of one device object.
#[derive(Debug)]
pub(super) struct Copies {
    context: Arc<Context>,
    kernels: CopyKernels,
    costs: Mutex<Arc<CopyCosts>>,
    is_asked: AtomicBool,
}

impl Copies {
    pub(super) fn new(context: &Arc<Context>, facts: &CudaFacts) -> Result<Self, DeviceError> {
        let guess = Costs::guess(context.driver().has_copy_batch(), facts.reaches_host);
        Ok(Self {
            context: Arc::clone(context),
            kernels: CopyKernels::new(context)?,
            costs: Mutex::new(Arc::new(CopyCosts::new(guess.clone(), guess))),
            is_asked: AtomicBool::new(false),
        })
    }

    /// What copies cost here. Until that is known, which the first caller sees to, a guess.
    pub(super) fn costs(&self, parts: Parts<'_>) -> Arc<CopyCosts> {
        if !self.is_asked.swap(true, Ordering::AcqRel)
            && let Some(known) = measure::known(self, parts)
        {
            *self.costs.lock() = Arc::new(known);
        }
        Arc::clone(&self.costs.lock())
    }

    pub(super) fn set_costs(&self, costs: CopyCosts) {
        self.is_asked.store(true, Ordering::Release);
        *self.costs.lock() = Arc::new(costs);
    }

    /// Queues a list.
    ///
    /// # Safety
    /// As for [`crate::Device::copy_many`].
    pub(super) unsafe fn copy_many(
        &self,
        parts: Parts<'_>,
        stream: RawStream,
        copies: &[RawCopy],
        keep: Keep,
    ) -> Result<(), DeviceError> {
        for copy in copies {
            let (source_bytes, target_bytes) = (copy.source.bytes, copy.target.bytes);
            if source_bytes != target_bytes {
                return Err(DeviceError::LengthMismatch { source_bytes, target_bytes });
            }
        }
        let is_idle = parts.engine.is_idle(stream)?;
        let (keep, costs) = (Arc::new(Mutex::new(keep)), self.costs(parts));
        let (mut left, mut window) = (copies, if is_idle { WINDOW_MIN } else { WINDOW_MAX });
        while !left.is_empty() {
            let (now, later) = left.split_at(window.min(left.len()));
            // SAFETY: the caller's promise for the whole list; every job holds `keep`.
            unsafe { self.queue_window(parts, stream, now, &costs, &keep) }?;
            (left, window) = (later, (window * WINDOW_GROWTH).min(WINDOW_MAX));
        }
        Ok(())
    }

    /// # Safety
    /// As for [`crate::Device::copy_many`]; `keep` keeps what the copies touch.
    unsafe fn queue_window(
        &self,
        parts: Parts<'_>,
        stream: RawStream,
        copies: &[RawCopy],
        costs: &CopyCosts,
        keep: &SharedKeep,
    ) -> Result<(), DeviceError> {
        let mut places = Places { vmm: parts.vmm, host: parts.host, on_device: None, in_host: None };
        let (mut up, mut down, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for copy in copies {
            let direction = match (copy.source.space, copy.target.space) {
                (Space::Host, Space::Device) => Some((Direction::Up, &mut up)),
                (Space::Device, Space::Host) => Some((Direction::Down, &mut down)),
                _ => None,
            };
            match direction {
                Some((direction, runs)) => match places.run(copy, direction) {
                    Some(run) => {
                        if runs.is_empty() {
                            // Most lists go one way: memory that grows is moved, and touched anew.
                            runs.reserve_exact(copies.len());
                        }
                        runs.push(run);
                    }
                    None => others.push(*copy),
                },
                None => others.push(*copy),
            }
        }
        for (direction, runs, costs) in [(Direction::Up, up, &costs.up), (Direction::Down, down, &costs.down)]
        {
            if runs.is_empty() {
                continue;
            }
            let CopyPlan { dma, batch, units } = CopyPlan::new(runs, costs, UNIT_BYTES);
            for part in [Part::Units(&units), Part::Batch(&batch), Part::Dma(&dma)] {
                // SAFETY: the caller's promise; a plan copies what its list copies.
                unsafe { self.queue_part(parts.engine, stream, direction, part, keep) }?;
            }
        }
        for some in others.chunks(CALLS_MAX) {
            let driver = self.context.driver();
            parts.engine.submit(stream, Box::new(Arc::clone(keep)), |submission| {
                for copy in some {
                    // SAFETY: the caller's promise.
                    unsafe { copy::enqueue(driver, submission.stream, copy.source, copy.target) }?;
                    submission.is_queued = true;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Queues runs in one way, in as many jobs as it takes.
    ///
    /// # Safety
    /// As for [`crate::Device::copy_many`]; `keep` keeps what the runs touch. For a kernel and a batch, host memory is
    /// page-locked.
    unsafe fn queue_part(
        &self,
        engine: &Engine,
        stream: RawStream,
        direction: Direction,
        part: Part<'_>,
        keep: &SharedKeep,
    ) -> Result<(), DeviceError> {
        match part {
            Part::Dma(runs) => {
                // SAFETY: the caller's promise.
                runs.chunks(CALLS_MAX)
                    .try_for_each(|some| unsafe { self.queue_dma(engine, stream, direction, some, keep) })
            }
            Part::Batch(runs) => {
                // SAFETY: the caller's promise.
                runs.chunks(BATCH_MAX)
                    .try_for_each(|some| unsafe { self.queue_batch(engine, stream, direction, some, keep) })
            }
            Part::Units(units) => {
                // SAFETY: the caller's promise.
                units
                    .chunks(PIECES_MAX)
                    .try_for_each(|some| unsafe { self.queue_kernel(engine, stream, direction, some, keep) })
            }
        }
    }

    /// # Safety
    /// As for [`Copies::queue_part`].
    unsafe fn queue_dma(
        &self,
        engine: &Engine,
        stream: RawStream,
        direction: Direction,
        runs: &[Run],
        keep: &SharedKeep,
    ) -> Result<(), DeviceError> {
        let driver = self.context.driver();
        engine.submit(stream, Box::new(Arc::clone(keep)), |submission| {
            submission.is_load = direction == Direction::Up;
            submission.wants_mark = submission.is_load;
            for Run { source, target, bytes, .. } in runs.iter().copied() {
                match direction {
                    // SAFETY: the caller's promise.
                    Direction::Up => unsafe { driver.copy_up(source, target, bytes, submission.stream) },
                    // SAFETY: the caller's promise.
                    Direction::Down => unsafe { driver.copy_down(source, target, bytes, submission.stream) },
                }?;
                submission.is_queued = true;
            }
            Ok(())
        })
    }

    /// # Safety
    /// As for [`Copies::queue_part`].
    unsafe fn queue_batch(
        &self,
        engine: &Engine,
        stream: RawStream,
        direction: Direction,
        runs: &[Run],
        keep: &SharedKeep,
    ) -> Result<(), DeviceError> {
        let (driver, ordinal) = (self.context.driver(), self.context.ordinal());
        let sources: Vec<u64> = runs.iter().map(|run| run.source).collect();
        let targets: Vec<u64> = runs.iter().map(|run| run.target).collect();
        let lengths = runs.iter().map(|run| usize::try_from(run.bytes).expect("64-bit sizes"));
        let lengths: Vec<usize> = lengths.collect();
        engine.submit(stream, Box::new(Arc::clone(keep)), |submission| {
            let is_up = direction == Direction::Up;
            submission.is_load = is_up;
            submission.wants_mark = is_up;
            // Also when it fails: some of the copies may have been taken.
            submission.is_queued = true;
            let lists = (&sources[..], &targets[..], &lengths[..]);
            // SAFETY: the caller's promise; three lists of one length.
            unsafe { driver.copy_batch(ordinal, is_up, lists, submission.stream) }
        })
    }

    /// # Safety
    /// As for [`Copies::queue_part`].
    unsafe fn queue_kernel(
        &self,
        engine: &Engine,
        stream: RawStream,
        direction: Direction,
        units: &[Run],
        keep: &SharedKeep,
    ) -> Result<(), DeviceError> {
        let mut pieces = self.take_table(engine, stream)?;
        pieces.fill(units);
        let blocks = match direction {
            Direction::Up => BLOCKS_UP,
            Direction::Down if engine.has_loads()? => BLOCKS_DOWN_YIELDING,
            Direction::Down => BLOCKS_DOWN,
        };
        let pieces = Arc::new(pieces);
        let held = (Arc::clone(keep), Arc::clone(&pieces));
        engine.submit(stream, Box::new(held), |submission| {
            submission.is_load = direction == Direction::Up;
            // Somebody may be waiting for the table.
            submission.wants_mark = true;
            // SAFETY: the caller's promise; the job holds the pieces.
            unsafe { self.kernels.launch(submission.stream, direction, &pieces, blocks) }?;
            submission.is_queued = true;
            Ok(())
        })
    }

    /// A table for a kernel, waiting for jobs to end where all are in use.
    fn take_table(&self, engine: &Engine, stream: RawStream) -> Result<Pieces, DeviceError> {
        let start = Instant::now();
        loop {
            if let Some(pieces) = self.kernels.pool.take()? {
                return Ok(pieces);
            }
            engine.reap_all()?;
            if let Some(pieces) = self.kernels.pool.take()? {
                return Ok(pieces);
            }
            if start.elapsed() >= TABLE_WAIT_MAX {
                let depth = pieces::TABLES_MAX;
                return Err(DeviceError::QueueFull { stream: stream.0, depth, waited: TABLE_WAIT_MAX });
            }
            thread::sleep(TABLE_NAP);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::cuda::hash::tests::check_ptx;

    #[test]
    fn the_committed_ptx_is_of_this_source() {
        check_ptx("copy", include_bytes!("../kernels/copy.cu"), super::PTX);
    }
}
