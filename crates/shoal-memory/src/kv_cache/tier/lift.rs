//! Copies to the device in several jobs, each prepared while the ones before it are under way.
//!
//! Apart because a job's preparing takes a thread as long as the link takes for the bytes, where those come in small pieces: one
//! after the other they would take twice as long. The first job is short, so that the device begins soon. The turn is kept
//! for as long as nobody else wants it, but for some milliseconds in any case.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_device::{Event, HostBuffer};

use super::Inner;
use super::bring::Wanted;
use crate::error::MemoryError;
use crate::turn::Taken;

/// The first job, and the longest: its copies are done by the time that the next but one is prepared.
const JOB_BYTES_MIN: usize = 2 << 20;
const JOB_BYTES_MAX: usize = 32 << 20;
/// Jobs under way at a time: one is copied while the next is prepared and waits for it.
const JOBS_MAX: usize = 2;
/// What is copied with one turn though others wait for it: nothing else of the device's memory changes meanwhile, some
/// milliseconds on a real link.
const TURN_BYTES: usize = 256 << 20;
/// The least that a load waits for its turn with what has come.
const TURN_WAIT: Duration = Duration::from_millis(20);
/// How often it looks whether it is known when the steps end that run.
const AGAIN: Duration = Duration::from_millis(2);

/// A row of blocks on its way from host memory to the device.
pub(super) struct Lift<'a> {
    pub(super) ids: &'a [u32],
    pub(super) memory: &'a [(&'a Arc<HostBuffer>, ByteCount)],
    /// So many, from the first on, are there.
    pub(super) copied: usize,
    /// What the next job may bring.
    job_bytes: usize,
}

impl<'a> Lift<'a> {
    /// A long one, copied in several jobs.
    pub(super) fn new(ids: &'a [u32], memory: &'a [(&'a Arc<HostBuffer>, ByteCount)]) -> Self {
        Self { ids, memory, copied: 0, job_bytes: JOB_BYTES_MIN }
    }

    /// A short one, whose first job is as long as one may be.
    pub(super) fn at_once(ids: &'a [u32], memory: &'a [(&'a Arc<HostBuffer>, ByteCount)]) -> Self {
        Self { job_bytes: JOB_BYTES_MAX, ..Self::new(ids, memory) }
    }
}

impl Inner {
    /// Copies blocks to the device with one turn, up to block `until()` of the row, and waits for them. Whether that could be
    /// begun; if not, it is counted. `meanwhile` is called while the device copies, until it has no more to do.
    pub(super) fn lift(
        &self,
        wanted: &Wanted<'_>,
        row: &mut Lift<'_>,
        until: impl Fn() -> usize,
        meanwhile: impl FnMut() -> bool,
    ) -> bool {
        match self.try_lift(wanted, row, until, meanwhile) {
            Ok(is_begun) => {
                if !is_begun && !wanted.is_over() {
                    self.count(|counts| counts.failed += 1);
                }
                is_begun
            }
            Err(error) => {
                tracing::warn!(%error, "cannot copy blocks of a tier to the device");
                self.count(|counts| counts.failed += 1);
                false
            }
        }
    }

    fn try_lift(
        &self,
        wanted: &Wanted<'_>,
        row: &mut Lift<'_>,
        until: impl Fn() -> usize,
        meanwhile: impl FnMut() -> bool,
    ) -> Result<bool, MemoryError> {
        let region = self.cache.region();
        let manager = region.manager();
        // In turn, so that nothing is evicted meanwhile. Who has it may keep it for longer than a step can wait; a wake of
        // the weights lends it, and these copies come after those that it has queued by now.
        let turn = loop {
            let turn = match manager.take_or_borrow_turn(wanted.deadline.max(Instant::now() + TURN_WAIT)) {
                Err(MemoryError::Deadline { .. }) => return Ok(false),
                turn => turn?,
            };
            if !region.missing_bytes().is_zero() {
                return Ok(false);
            }
            if self.after_steps(&manager.up)? {
                break turn;
            }
            // Beside an engine that has told of no step yet: it does when it has launched the one that runs.
            drop(turn);
            if !wanted.call.is_beside || wanted.is_over() || Instant::now() >= wanted.deadline {
                return Ok(false);
            }
            thread::sleep(AGAIN);
        };
        let lifted = self.lift_in_turn(wanted, row, &turn, until, meanwhile);
        if lifted.is_err() {
            // The blocks are given back, and their memory may go as soon as the turn does: a job that was queued before the
            // one that failed must not write there any more.
            manager.settle();
        }
        lifted.map(|()| true)
    }

    fn lift_in_turn(
        &self,
        wanted: &Wanted<'_>,
        row: &mut Lift<'_>,
        turn: &Taken,
        until: impl Fn() -> usize,
        mut meanwhile: impl FnMut() -> bool,
    ) -> Result<(), MemoryError> {
        let region = self.cache.region();
        let (first, mut queued, mut is_ending) = (row.copied, row.copied, false);
        let mut jobs: VecDeque<(usize, Event)> = VecDeque::new();
        loop {
            while jobs.len() < JOBS_MAX && !is_ending {
                let next = (queued + (row.job_bytes / self.payload_bytes).max(1)).min(until());
                if next <= queued {
                    break;
                }
                let memory = row.memory[queued..next].iter().copied();
                let done = region.load_blocks(&self.copies(&row.ids[queued..next], memory), None)?;
                jobs.push_back((next, done));
                row.job_bytes = (2 * row.job_bytes).min(JOB_BYTES_MAX);
                queued = next;
                is_ending = Instant::now() >= wanted.deadline
                    || wanted.is_over()
                    || self.is_turn_over(turn, queued - first);
            }
            let Some((end, done)) = jobs.pop_front() else { break };
            wait_for(&done, region.manager().operation_deadline(), &mut meanwhile)?;
            row.copied = end;
        }
        Ok(())
    }

    /// Whether a turn with which so many blocks were copied is to be given back before it is done.
    fn is_turn_over(&self, turn: &Taken, blocks: usize) -> bool {
        blocks * self.payload_bytes >= TURN_BYTES && (turn.is_borrowed() || turn.is_wanted())
    }
}

/// Waits for a job; `meanwhile` is called until it has no more to do.
fn wait_for(
    done: &Event,
    deadline: Instant,
    meanwhile: &mut impl FnMut() -> bool,
) -> Result<(), MemoryError> {
    let failed = || MemoryError::device("copy blocks to the device");
    while !done.is_complete().map_err(failed())? && meanwhile() {}
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    if done.wait(left).map_err(failed())? {
        return Ok(());
    }
    Err(MemoryError::Deadline { doing: "copying blocks to the device", waited: left })
}
