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
pub(crate) const PART_BYTES: u64 = 1 << 20;
/// How long a read that failed waits for what is still on its way.
const GIVEN_UP_WAIT: Duration = Duration::from_secs(1);
/// How long a fill sleeps or waits at most before it looks whether it shall stop.
const SLICE: Duration = Duration::from_millis(50);
/// A disk that keeps bytes slower than this hangs.
const SYNC_BYTES_PER_S: u64 = 50_000_000;

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
        // For the disk alone: making memory, and handing on what was read, take what they take.
        let mut waited = Duration::ZERO;
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
            // Looked at once more after the deadline: a thread that was held up is no disk that hangs.
            let (since, is_late) = (Instant::now(), waited >= io_deadline);
            self.collect(flying, first, io_deadline.saturating_sub(waited));
            waited += since.elapsed();
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
                waited = Duration::ZERO;
            } else if is_late {
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
    /// After so many bytes the disk has to keep them: what it may hold back until then is what one sync waits for.
    pub(super) sync_bytes: u64,
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
    let (mut written, mut kept, mut token) = (0_u64, 0_u64, 0_u64);
    let mut spare: Vec<Buffer> = Vec::new();
    let await_one = |medium: &mut dyn Medium, spare: &mut Vec<Buffer>, deadline: Duration| {
        let since = Instant::now();
        loop {
            // Looked at once more after the deadline: a thread that was held up is no disk that hangs.
            let left = deadline.saturating_sub(since.elapsed());
            medium.wait(SLICE.min(left));
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
            if left.is_zero() {
                return Err(failed("a request hangs".to_owned()));
            }
            if pace.stop.load(Ordering::Relaxed) {
                return Err(WeightsError::Stopped);
            }
        }
    };
    let keep = |medium: &mut dyn Medium, spare: &mut Vec<Buffer>, token: u64, bytes: u64| {
        while medium.in_flight() > 0 {
            await_one(medium, spare, pace.io_deadline)?;
        }
        let op = Op { token, verb: Verb::Sync, offset: 0, buffer: None, bytes: 0 };
        medium.submit(op).map_err(|_| failed("the disk takes no request".to_owned()))?;
        let allowed = Duration::from_millis(bytes.saturating_mul(1000) / SYNC_BYTES_PER_S);
        await_one(medium, spare, pace.io_deadline.saturating_add(allowed))
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
            await_one(medium, &mut spare, pace.io_deadline)?;
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
        if written - kept >= pace.sync_bytes {
            token += 1;
            keep(medium, &mut spare, token, written - kept)?;
            kept = written;
        }
    }
    keep(medium, &mut spare, token + 1, written - kept)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::disk::{Means, Waker};

    /// A disk that writes at once, and takes its time to keep it and to read.
    #[derive(Debug, Default)]
    struct Slow {
        sync: Duration,
        /// For how long whoever found nothing done is held up then, as a busy machine holds up a thread.
        held_up: Duration,
        done: Vec<Done>,
        syncing: Option<(Instant, Done)>,
        held: u64,
        held_max: u64,
        syncs: u32,
    }

    impl Medium for Slow {
        fn bytes(&mut self) -> io::Result<u64> {
            Ok(0)
        }
        fn grow(&mut self, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn shrink(&mut self, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn submit(&mut self, op: Op) -> Result<(), Op> {
            let done = Done { token: op.token, result: Ok(op.bytes), buffer: op.buffer };
            if op.verb == Verb::Write {
                self.held += op.bytes as u64;
                self.held_max = self.held_max.max(self.held);
                self.done.push(done);
            } else {
                self.held = 0;
                self.syncs += u32::from(op.verb == Verb::Sync);
                self.syncing = Some((Instant::now() + self.sync, done));
            }
            Ok(())
        }
        fn wait(&mut self, timeout: Duration) {
            if let (true, Some((due, _))) = (self.done.is_empty(), &self.syncing) {
                thread::sleep(timeout.min(due.saturating_duration_since(Instant::now())));
            }
        }
        fn reap(&mut self, done: &mut Vec<Done>) {
            done.append(&mut self.done);
            let is_kept = self.syncing.as_ref().is_some_and(|(due, _)| Instant::now() >= *due);
            done.extend(self.syncing.take_if(|_| is_kept).map(|(_, done)| done));
            if done.is_empty() {
                thread::sleep(self.held_up);
            }
        }
        fn in_flight(&self) -> usize {
            self.done.len() + usize::from(self.syncing.is_some())
        }
        fn depth(&self) -> usize {
            8
        }
        fn waker(&self) -> Waker {
            std::sync::Arc::new(|| {})
        }
        fn means(&self) -> Means {
            Means::default()
        }
    }

    const PARTS: u64 = 16;
    const BYTES: usize = 1 << 20;

    fn write_to(
        disk: &mut Slow,
        sync_bytes: u64,
        deadline: Duration,
        stop: &AtomicBool,
    ) -> Result<(), WeightsError> {
        let pace = Pace { depth: 4, bytes_per_s: u64::MAX, sync_bytes, io_deadline: deadline, stop };
        let part = |at| Part { offset: at, bytes: BYTES, pack: 0, at };
        write(Path::new("pack"), disk, (0..PARTS).map(|at| part(at * BYTES as u64)), pace, |_, _| Ok(()))
    }

    #[test]
    fn a_sync_has_time_for_all_that_it_waits_for_and_no_more() {
        let (going, deadline) = (AtomicBool::new(false), Duration::from_millis(50));
        // 16 MiB at 50 MB/s: a third of a second.
        let mut disk = Slow { sync: Duration::from_millis(200), ..Slow::default() };
        write_to(&mut disk, u64::MAX, deadline, &going).unwrap();
        let mut disk = Slow { sync: Duration::from_mins(1), ..Slow::default() };
        let since = Instant::now();
        let error = write_to(&mut disk, u64::MAX, deadline, &going).unwrap_err();
        assert!(error.to_string().contains("a request hangs"), "{error}");
        assert!(since.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn the_time_that_others_take_is_not_the_disks() {
        let disk = Slow { sync: Duration::from_millis(20), ..Slow::default() };
        let mut media = Media { packs: vec![("pack".into(), Box::new(disk))], ..Media::default() };
        let part = |at| Part { offset: at, bytes: 4096, pack: 0, at };
        let mut read = 0;
        let target = |_: &Part| {
            thread::sleep(Duration::from_millis(300));
            Ok(Buffer::zeroed(4096))
        };
        let done = |_: &Part, _| {
            read += 1;
            Ok(())
        };
        media.read([part(0), part(4096)], 1, Duration::from_millis(200), target, done).unwrap();
        assert_eq!(read, 2);
    }

    #[test]
    fn a_thread_that_is_held_up_beyond_the_deadline_sees_what_is_done_by_then() {
        let (held_up, deadline) = (Duration::from_millis(500), Duration::from_millis(100));
        // Not done when the first slice is over, and long done when the thread goes on.
        let slow = |sync| Slow { sync: Duration::from_millis(sync), held_up, ..Slow::default() };
        let pace = Pace {
            depth: 4,
            bytes_per_s: u64::MAX,
            sync_bytes: u64::MAX,
            io_deadline: deadline,
            stop: &AtomicBool::new(false),
        };
        write(Path::new("pack"), &mut slow(90), [], pace, |_, _| Ok(())).unwrap();

        // A read waits for its whole deadline at once: it is not done then, and a little later it is.
        let mut media = Media { packs: vec![("pack".into(), Box::new(slow(120)))], ..Media::default() };
        let part = Part { offset: 0, bytes: 4096, pack: 0, at: 0 };
        media.read([part], 1, deadline, |_| Ok(Buffer::zeroed(4096)), |_, _| Ok(())).unwrap();
    }

    #[test]
    fn the_disk_keeps_what_was_written_every_so_many_bytes() {
        let mut disk = Slow::default();
        write_to(&mut disk, 3 << 20, Duration::from_secs(10), &AtomicBool::new(false)).unwrap();
        assert_eq!((disk.held_max, disk.syncs), (3 << 20, 6));
    }

    #[test]
    fn a_fill_that_shall_stop_waits_for_no_disk() {
        let (stop, since) = (AtomicBool::new(false), Instant::now());
        let mut disk = Slow { sync: Duration::from_mins(1), ..Slow::default() };
        let outcome = thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(100));
                stop.store(true, Ordering::Relaxed);
            });
            write_to(&mut disk, u64::MAX, Duration::from_mins(1), &stop)
        });
        assert!(matches!(outcome, Err(WeightsError::Stopped)), "{outcome:?}");
        assert!(since.elapsed() < Duration::from_secs(20));
    }
}
