//! Requests to packs, many at a time and answered in order.
//!
//! Apart because a reader hashes and hands on bytes in their order, while a disk answers in its own. Every wait has a deadline
//! (I10); a request that never ends keeps its memory to itself, as the medium promises.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::WeightsError;
use crate::disk::{Done, Medium, Op, Verb};
use crate::store::Buffer;

/// Bytes of one request.
pub(super) const PART_BYTES: u64 = 1 << 20;
/// How long a read that failed waits for what is still on its way.
const GIVEN_UP_WAIT: Duration = Duration::from_secs(1);
/// How long a fill sleeps at most before it looks whether it shall stop.
const SLICE: Duration = Duration::from_millis(50);

/// Bytes of a region that one request reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Where in the region.
    pub(super) offset: u64,
    pub(super) bytes: usize,
    /// By its index among the media.
    pub(super) pack: usize,
    pub(super) at: u64,
}

/// Packs that are open.
#[derive(Debug, Default)]
pub(super) struct Media {
    pub(super) packs: Vec<(PathBuf, Box<dyn Medium>)>,
    /// What was given up may still end: its name is not used again.
    next_token: u64,
}

#[derive(Debug)]
struct Flying {
    part: Part,
    token: u64,
    answer: Option<(io::Result<usize>, Option<Buffer>)>,
}

impl Media {
    /// Reads parts. `target` gives the memory of each, `done` gets it back, filled, in the order of the parts; at most `window`
    /// are on their way at a time.
    ///
    /// # Errors
    /// The first failure, of the disk, of `target` or of `done`.
    pub(super) fn read(
        &mut self,
        parts: impl IntoIterator<Item = Part>,
        window: usize,
        io_deadline: Duration,
        target: impl FnMut(&Part) -> Result<Buffer, WeightsError>,
        done: impl FnMut(&Part, Buffer) -> Result<(), WeightsError>,
    ) -> Result<(), WeightsError> {
        let mut flying = VecDeque::new();
        let outcome = self.read_all(&mut flying, parts, window, io_deadline, target, done);
        // Whose memory is lent gets it back before it hears of a failure, unless a request hangs.
        let since = Instant::now();
        while let Some(first) = flying.iter().find(|one| one.answer.is_none()).map(|one| one.part.pack)
            && since.elapsed() < GIVEN_UP_WAIT
        {
            self.collect(&mut flying, first, GIVEN_UP_WAIT);
        }
        outcome
    }

    fn read_all(
        &mut self,
        flying: &mut VecDeque<Flying>,
        parts: impl IntoIterator<Item = Part>,
        window: usize,
        io_deadline: Duration,
        mut target: impl FnMut(&Part) -> Result<Buffer, WeightsError>,
        mut done: impl FnMut(&Part, Buffer) -> Result<(), WeightsError>,
    ) -> Result<(), WeightsError> {
        let mut parts = parts.into_iter();
        let mut refused: Option<(Part, Op)> = None;
        let mut moved = Instant::now();
        loop {
            while flying.len() < window.max(1) {
                let (part, op) = if let Some(refused) = refused.take() {
                    refused
                } else {
                    let Some(part) = parts.next() else { break };
                    let buffer = target(&part)?;
                    let op = Op {
                        token: self.token(),
                        verb: Verb::Read,
                        offset: part.at,
                        buffer: Some(buffer),
                        bytes: part.bytes,
                    };
                    (part, op)
                };
                let token = op.token;
                if let Err(op) = self.packs[part.pack].1.submit(op) {
                    refused = Some((part, op));
                    break;
                }
                flying.push_back(Flying { part, token, answer: None });
            }
            let Some(first) = flying.front().map(|first| first.part.pack) else {
                return match refused {
                    None => Ok(()),
                    Some((part, _)) => {
                        Err(self.failed(part.pack, "cannot read", &"the disk takes no request"))
                    }
                };
            };
            self.collect(flying, first, io_deadline.saturating_sub(moved.elapsed()));
            let mut has_moved = false;
            while let Some(answered) = flying.pop_front_if(|first| first.answer.is_some()) {
                has_moved = true;
                let Flying { part, answer, .. } = answered;
                match answer {
                    Some((Ok(read), Some(buffer))) if read == part.bytes => done(&part, buffer)?,
                    Some((Ok(read), _)) => {
                        let reason = format!("{read} of {} bytes at {}", part.bytes, part.at);
                        return Err(self.failed(part.pack, "cannot read", &reason));
                    }
                    Some((Err(error), _)) => return Err(self.failed(part.pack, "cannot read", &error)),
                    None => {}
                }
            }
            if has_moved {
                moved = Instant::now();
            } else if moved.elapsed() >= io_deadline {
                return Err(self.failed(first, "cannot read", &"a request hangs"));
            }
        }
    }

    fn collect(&mut self, flying: &mut VecDeque<Flying>, first: usize, patience: Duration) {
        for (index, (_, medium)) in self.packs.iter_mut().enumerate() {
            if index != first && medium.in_flight() > 0 {
                // Starts what was taken.
                medium.wait(Duration::ZERO);
            }
        }
        self.packs[first].1.wait(patience);
        let mut answers = Vec::new();
        for (_, medium) in &mut self.packs {
            medium.reap(&mut answers);
        }
        for Done { token, result, buffer } in answers {
            // What is not found was given up.
            if let Some(one) = flying.iter_mut().find(|one| one.token == token) {
                one.answer = Some((result, buffer));
            }
        }
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    fn failed(&self, pack: usize, doing: &'static str, reason: &dyn ToString) -> WeightsError {
        WeightsError::Failed { doing, path: self.packs[pack].0.clone(), reason: reason.to_string() }
    }
}

/// How a pack is written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace<'a> {
    pub(super) depth: usize,
    pub(super) bytes_per_s: u64,
    pub(super) io_deadline: Duration,
    pub(super) stop: &'a AtomicBool,
}

/// Writes a whole pack, each part as `source` gives it, and has the disk keep it.
///
/// # Errors
/// The first failure, of the disk or of `source`; `Stopped`.
pub(super) fn write(
    path: &Path,
    medium: &mut dyn Medium,
    parts: impl IntoIterator<Item = Part>,
    pace: Pace<'_>,
    mut source: impl FnMut(&Part, &mut [u8]) -> Result<(), WeightsError>,
) -> Result<(), WeightsError> {
    let failed =
        |reason: String| WeightsError::Failed { doing: "cannot write", path: path.to_owned(), reason };
    let begun = Instant::now();
    let (mut written, mut token) = (0_u64, 0_u64);
    let mut spare: Vec<Buffer> = Vec::new();
    let await_one = |medium: &mut dyn Medium, spare: &mut Vec<Buffer>| -> Result<(), WeightsError> {
        let since = Instant::now();
        loop {
            medium.wait(pace.io_deadline.saturating_sub(since.elapsed()));
            let mut answers = Vec::new();
            medium.reap(&mut answers);
            let has_any = !answers.is_empty();
            for Done { result, buffer, .. } in answers {
                // Each request is of whole units, so a part of one is a failure.
                let wanted = buffer.as_ref().map_or(0, |buffer| buffer.as_slice().len());
                let moved = result.map_err(|error| failed(error.to_string()))?;
                if moved != wanted {
                    return Err(failed(format!("{moved} of {wanted} bytes")));
                }
                spare.extend(buffer);
            }
            if has_any {
                return Ok(());
            }
            if since.elapsed() >= pace.io_deadline {
                return Err(failed("a request hangs".to_owned()));
            }
        }
    };
    for part in parts {
        loop {
            if pace.stop.load(Ordering::Relaxed) {
                return Err(WeightsError::Stopped);
            }
            let due_us = u128::from(written) * 1_000_000 / u128::from(pace.bytes_per_s.max(1));
            let due = Duration::from_micros(u64::try_from(due_us).unwrap_or(u64::MAX));
            match due.checked_sub(begun.elapsed()) {
                Some(early) if !early.is_zero() => thread::sleep(early.min(SLICE)),
                _ => break,
            }
        }
        while medium.in_flight() >= pace.depth.clamp(1, medium.depth()) {
            await_one(medium, &mut spare)?;
        }
        // Of the part's own length, so that what a disk says it wrote can be compared with it.
        let reused = spare.iter().position(|buffer| buffer.as_slice().len() == part.bytes);
        let mut buffer = reused.map_or_else(|| Buffer::zeroed(part.bytes), |index| spare.swap_remove(index));
        spare.truncate(pace.depth);
        if let Some(memory) = buffer.as_mut_slice() {
            source(&part, &mut memory[..part.bytes])?;
        }
        token += 1;
        let op = Op { token, verb: Verb::Write, offset: part.at, buffer: Some(buffer), bytes: part.bytes };
        medium.submit(op).map_err(|_| failed("the disk takes no request".to_owned()))?;
        // It is under way from here on.
        medium.wait(Duration::ZERO);
        written += part.bytes as u64;
    }
    while medium.in_flight() > 0 {
        await_one(medium, &mut spare)?;
    }
    let op = Op { token: token + 1, verb: Verb::Sync, offset: 0, buffer: None, bytes: 0 };
    medium.submit(op).map_err(|_| failed("the disk takes no request".to_owned()))?;
    await_one(medium, &mut spare)
}
