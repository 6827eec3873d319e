//! One disk at work: requests in, reads and writes out, answers when they are done.
//!
//! Apart from the thread that drives it, so that tests can drive it step by step in a time of their own. A step takes what
//! is done, then what was asked, and starts what can start: reads first (stores yield to loads), then records, then the
//! log's own work (footers, and making room). Nothing here waits.
//!
//! A block is in the index only once its whole record is written, and is served only if its checksum is right (I8).

mod cleaning;
mod reads;
mod records;
mod removal;
mod segments;

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::store::format::{Entry, Secret, UNIT};
use shoal_core::store::health::Health;
use shoal_core::store::key::StoreKey;
use shoal_core::store::log::Log;

use self::cleaning::Cleaning;
use self::reads::Reading;
use self::records::{PendingPut, RecordFlight};
use super::medium::{Done, Medium, Op, Verb};
use super::options::DiskOptions;
use super::queue::{Request, Shared, nothing};
use super::seal::Codec;
use crate::store::{Aligned, Buffer, Miss, Promise};

/// How often deadlines are looked at while something is under way.
const LOOK: Duration = Duration::from_millis(20);
/// How long a disk without work sleeps at most.
const IDLE: Duration = Duration::from_secs(1);
/// When a full disk is tried again.
const GROW_AGAIN: Duration = Duration::from_mins(1);

/// A request to the medium, by its token.
enum Flight {
    Get(Reading),
    Part {
        record: u64,
        bytes: usize,
    },
    /// A whole record, copied together.
    Staged {
        record: u64,
        bytes: usize,
    },
    Header {
        slot: u32,
    },
    BeforeFooter {
        slot: u32,
        footer: Vec<u8>,
    },
    Footer {
        slot: u32,
    },
    FooterSync {
        slot: u32,
    },
    Sync {
        promises: Vec<Promise<()>>,
    },
    Scratch {
        slot: u32,
        promise: Option<Promise<bool>>,
    },
    CleanRead {
        slot: u32,
        entry: Entry,
    },
    /// The header of a segment that makes room is overwritten, so that nothing of it comes back.
    Erase {
        slot: u32,
    },
    /// A read that hangs, and that nobody waits for any more.
    Abandoned,
}

struct Flown {
    flight: Flight,
    since: Instant,
    is_late: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    No,
    Closing,
    Closed,
}

/// Somebody who waits until what was put before is on the disk.
struct Flush {
    before: u64,
    promise: Promise<()>,
}

/// See the module.
pub(super) struct Worker {
    medium: Box<dyn Medium>,
    shared: Arc<Shared>,
    options: DiskOptions,
    codec: Arc<Codec>,
    secret: Secret,
    segment_bytes: u64,
    record_bytes: u64,
    health: Health,
    begun: Instant,
    looked: Instant,
    token_next: u64,
    flights: HashMap<u64, Flown>,
    reads: VecDeque<Op>,
    writes: VecDeque<Op>,
    /// Writes to a segment whose header is on its way.
    held: VecDeque<Op>,
    header: Option<u32>,
    writes_in_flight: usize,
    puts: VecDeque<PendingPut>,
    put_next: u64,
    records: HashMap<u64, RecordFlight>,
    /// Memory that records were copied together in, to be used again.
    staging: Vec<Aligned>,
    record_next: u64,
    /// Names that are on their way to the disk.
    writing: HashSet<StoreKey>,
    flushes: Vec<Flush>,
    cleaning: Option<Cleaning>,
    /// Removals that wait until footers say so too.
    removed: Vec<Promise<bool>>,
    erasing: usize,
    /// A write failed that removals rely on.
    is_unsure: bool,
    grow_again: Option<Instant>,
    done: Vec<Done>,
    failure: Option<String>,
    has_served: bool,
    ending: Ending,
}

impl Worker {
    /// At work on a log that was recovered; it is in `shared` from now on.
    pub(super) fn new(
        medium: Box<dyn Medium>,
        shared: Arc<Shared>,
        options: DiskOptions,
        codec: Arc<Codec>,
        health: Health,
        log: Log,
        now: Instant,
    ) -> Self {
        let (segment_bytes, record_bytes) = (log.options().segment_bytes, log.options().record_bytes);
        shared.notes.lock().means = medium.means();
        *shared.log.lock() = log;
        Self {
            medium,
            shared,
            options,
            secret: codec.secret(),
            codec,
            segment_bytes,
            record_bytes,
            health,
            begun: now,
            looked: now,
            token_next: 0,
            flights: HashMap::new(),
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            held: VecDeque::new(),
            header: None,
            writes_in_flight: 0,
            puts: VecDeque::new(),
            put_next: 0,
            records: HashMap::new(),
            staging: Vec::new(),
            record_next: 0,
            writing: HashSet::new(),
            flushes: Vec::new(),
            cleaning: None,
            removed: Vec::new(),
            erasing: 0,
            is_unsure: false,
            grow_again: None,
            done: Vec::new(),
            failure: None,
            has_served: false,
            ending: Ending::No,
        }
    }

    /// One step. In how long the next is due if nothing is done and nobody asks before, or why the disk is set aside.
    ///
    /// # Errors
    /// The reason.
    pub(super) fn step(&mut self, now: Instant) -> Result<Duration, String> {
        let mut done = std::mem::take(&mut self.done);
        self.medium.reap(&mut done);
        let has_work = !self.reads.is_empty() || !self.writes.is_empty();
        if has_work && !done.is_empty() {
            // The disk has work while what it gave is verified.
            self.pump(now);
            self.medium.wait(Duration::ZERO);
        }
        for done in done.drain(..) {
            self.handle_done(done, now);
        }
        self.done = done;
        // What is taken waits here; while that is much, the rest waits in the queue, which has a bound.
        if self.reads.len() + self.puts.len() < self.options.requests_max {
            for request in self.shared.take_requests() {
                self.handle_request(request, now);
            }
        }
        if now.saturating_duration_since(self.looked) >= LOOK / 4 {
            self.looked = now;
            self.look_at_deadlines(now);
        }
        self.form_records(now);
        self.clean();
        self.seal();
        self.answer_flushes();
        self.answer_removals();
        self.pump(now);
        if let Some(reason) = self.failure.take() {
            return Err(reason);
        }
        if self.ending == Ending::Closing && self.is_idle() {
            self.ending = Ending::Closed;
        }
        Ok(self.due(now))
    }

    /// Waits for news from the disk or from callers.
    pub(super) fn wait(&mut self, timeout: Duration) {
        self.medium.wait(timeout);
    }

    /// Writes out all that there is, closes the log and ends; [`Worker::is_closed`] says when.
    pub(super) fn close(&mut self) {
        if self.ending == Ending::No {
            self.ending = Ending::Closing;
            let (promise_is_nobodys, before) = (crate::store::Ticket::new(IDLE).1, self.put_next);
            self.flushes.push(Flush { before, promise: promise_is_nobodys });
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.ending == Ending::Closed
    }

    fn is_closing(&self) -> bool {
        self.ending != Ending::No
    }

    /// Ends at once: everybody who waits hears why. The disk's health goes on to whoever tries it again.
    pub(super) fn end(mut self, miss: &Miss) -> Health {
        *self.shared.log.lock() = nothing();
        for (_, flown) in self.flights.drain() {
            match flown.flight {
                Flight::Get(reading) => reading.refuse(miss.clone()),
                Flight::Sync { promises } => {
                    for promise in promises {
                        promise.answer(Err(miss.clone()));
                    }
                }
                Flight::Scratch { promise: Some(promise), .. } => promise.answer(Err(miss.clone())),
                _ => {}
            }
        }
        for (_, record) in self.records.drain() {
            record.refuse(miss, &self.shared);
        }
        for promise in self.removed.drain(..) {
            promise.answer(Err(miss.clone()));
        }
        for put in self.puts.drain(..) {
            put.refuse(miss.clone(), &self.shared);
        }
        for flush in self.flushes.drain(..) {
            flush.promise.answer(Err(miss.clone()));
        }
        self.shared.refuse_all(miss);
        self.health
    }

    fn is_idle(&self) -> bool {
        self.flights.is_empty()
            && self.puts.is_empty()
            && self.records.is_empty()
            && self.flushes.is_empty()
            && self.removed.is_empty()
    }

    fn due(&self, now: Instant) -> Duration {
        if !self.puts.is_empty() {
            let first = self.puts.front().map_or(LOOK, |put| (put.since + self.options.linger) - now);
            return first.clamp(Duration::from_micros(200), LOOK);
        }
        if self.flights.is_empty() && self.cleaning.is_none() { IDLE } else { LOOK }
    }

    fn handle_request(&mut self, request: Request, now: Instant) {
        match request {
            Request::Put { key, source, bytes, promise } => self.take_put(key, source, bytes, promise, now),
            Request::Get { key, target, promise } => self.take_get(&key, target, promise, now),
            Request::Remove { key, promise } => self.take_remove(&key, promise),
            Request::Flush { promise } => self.flushes.push(Flush { before: self.put_next, promise }),
            Request::Register(slab) => {
                self.medium.register(&slab);
            }
            Request::Unregister { slab, promise } => {
                self.medium.unregister(&slab);
                promise.answer(Ok(()));
            }
        }
    }

    fn handle_done(&mut self, done: Done, now: Instant) {
        let Some(flown) = self.flights.remove(&done.token) else { return };
        let Done { result, buffer, .. } = done;
        match flown.flight {
            Flight::Get(reading) => self.got(reading, result, buffer, flown.since, now),
            Flight::Part { record, bytes } => {
                self.writes_in_flight -= 1;
                // Before its owner hears of it, who may want to write to it at once.
                drop(buffer);
                self.part_is_done(record, bytes, result, now);
            }
            Flight::Staged { record, bytes } => {
                self.writes_in_flight -= 1;
                self.part_is_done(record, bytes, result, now);
                if let Some(Buffer::Own(memory)) = buffer {
                    self.keep_staging(memory);
                }
            }
            Flight::Header { slot } => {
                self.writes_in_flight -= 1;
                self.with_log(|log| log.unpin(slot));
                let is_written = self.check_written(result, UNIT, "cannot write a segment's header", now);
                self.header_is_done(slot, is_written, now);
            }
            Flight::Abandoned => {}
            Flight::BeforeFooter { slot, footer } => {
                self.writes_in_flight -= 1;
                if let Err(error) = &result {
                    // Without a footer the segment is read through at the next start, and verified.
                    self.is_unsure = true;
                    self.failed("cannot write out a segment", error, now);
                    self.with_log(|log| log.sealed(slot));
                    return;
                }
                let end = (u64::from(slot) + 1) * self.segment_bytes;
                let (bytes, offset) = (footer.len(), end - footer.len() as u64);
                let buffer = Some(Buffer::Own(Aligned::copy_of(&footer)));
                self.start(Flight::Footer { slot }, Verb::Write, offset, buffer, bytes);
            }
            Flight::Footer { slot } => {
                self.writes_in_flight -= 1;
                let bytes = buffer.as_ref().map_or(0, |buffer| buffer.as_slice().len() as u64);
                if self.check_written(result, bytes, "cannot write a segment's footer", now) {
                    self.start(Flight::FooterSync { slot }, Verb::Sync, 0, None, 0);
                } else {
                    self.is_unsure = true;
                    self.with_log(|log| log.sealed(slot));
                }
            }
            Flight::FooterSync { slot } => {
                self.writes_in_flight -= 1;
                if let Err(error) = &result {
                    self.is_unsure = true;
                    self.failed("cannot write out a segment", error, now);
                }
                self.with_log(|log| log.sealed(slot));
            }
            Flight::Sync { promises } => {
                self.writes_in_flight -= 1;
                let failed = result.err().map(|error| {
                    self.failed("cannot write out", &error, now);
                    Miss::Failed { doing: "cannot write out", reason: error.to_string() }
                });
                for promise in promises {
                    promise.answer(failed.clone().map_or(Ok(()), Err));
                }
            }
            Flight::Scratch { slot, promise } => {
                self.writes_in_flight -= 1;
                self.with_log(|log| log.unpin(slot));
                self.is_unsure |= !self.check_written(result, UNIT, "cannot make a block unreadable", now);
                self.removed.extend(promise);
            }
            Flight::CleanRead { slot, entry } => self.clean_read(slot, entry, result, buffer, now),
            Flight::Erase { slot } => {
                self.writes_in_flight -= 1;
                self.erasing -= 1;
                self.with_log(|log| log.unpin(slot));
                self.is_unsure |= !self.check_written(result, UNIT, "cannot give a segment up", now);
            }
        }
    }

    /// A request hangs: whoever waits for it hears so, and what it holds stays held until it is done after all.
    fn is_late(&mut self, token: u64, now: Instant) {
        let doing = "the disk hangs";
        let miss = || Miss::Failed { doing, reason: "no answer".to_owned() };
        self.shared.notes.lock().counts.hung += 1;
        let Some(flown) = self.flights.get_mut(&token) else { return };
        match &mut flown.flight {
            Flight::Get(reading) => reading.look(now, true),
            Flight::Part { record, .. } | Flight::Staged { record, .. } => {
                if let Some(record) = self.records.get_mut(record) {
                    record.give_up(&miss());
                }
            }
            Flight::Sync { promises } => promises.drain(..).for_each(|promise| promise.answer(Err(miss()))),
            Flight::Scratch { promise, .. } => {
                if let Some(promise) = promise.take() {
                    promise.answer(Err(miss()));
                }
            }
            Flight::CleanRead { .. } => {
                flown.flight = Flight::Abandoned;
                self.again_is_over(false);
            }
            Flight::Header { slot } => {
                let slot = *slot;
                self.header_is_done(slot, false, now);
            }
            Flight::BeforeFooter { .. }
            | Flight::Footer { .. }
            | Flight::FooterSync { .. }
            | Flight::Erase { .. }
            | Flight::Abandoned => {}
        }
        self.failed(doing, &"no answer", now);
    }

    fn answer_flushes(&mut self) {
        if self.flushes.is_empty() {
            return;
        }
        let oldest_put = self.puts.iter().filter(|put| put.is_asked()).map(|put| put.number).min();
        let oldest_record = self.records.values().map(|record| record.oldest).min();
        let oldest = oldest_put.into_iter().chain(oldest_record).min().unwrap_or(u64::MAX);
        let (ready, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.flushes).into_iter().partition(|flush| oldest >= flush.before);
        self.flushes = waiting;
        if !ready.is_empty() {
            let promises = ready.into_iter().map(|flush| flush.promise).collect();
            self.start(Flight::Sync { promises }, Verb::Sync, 0, None, 0);
        }
    }

    fn look_at_deadlines(&mut self, now: Instant) {
        let begun_by = now.checked_sub(self.options.io_deadline);
        let mut late = Vec::new();
        for (token, flown) in &mut self.flights {
            if !flown.is_late && begun_by.is_some_and(|by| flown.since <= by) {
                flown.is_late = true;
                late.push(*token);
            }
            if let Flight::Get(reading) = &mut flown.flight {
                reading.look(now, flown.is_late);
            }
        }
        for token in late {
            self.is_late(token, now);
        }
        for record in self.records.values_mut() {
            record.look(now);
        }
        self.look_at_puts(now);
        self.removed.retain(|promise| promise.deadline() > now);
        let is_closing = self.is_closing();
        self.flushes.retain(|flush| is_closing || flush.promise.deadline() > now);
        if self.grow_again.is_some_and(|at| at <= now) {
            self.grow_again = None;
            self.with_log(Log::resume_growing);
        }
        // All that the disk takes at a time is stuck: nothing would ever be served.
        if self.medium.in_flight() >= self.medium.depth()
            && !self.flights.is_empty()
            && self.flights.values().filter(|flown| flown.is_late).count() >= self.medium.depth()
        {
            self.failure = Some("every request to the disk hangs".to_owned());
        }
    }

    /// Queues a request to the medium.
    fn start(&mut self, flight: Flight, verb: Verb, offset: u64, buffer: Option<Buffer>, bytes: usize) {
        let token = self.token_next;
        self.token_next += 1;
        let queue = match (verb, &flight) {
            (Verb::Read, _) => &mut self.reads,
            (_, Flight::Part { .. } | Flight::Staged { .. }) if self.header.is_some() => &mut self.held,
            _ => &mut self.writes,
        };
        queue.push_back(Op { token, verb, offset, buffer, bytes });
        // Its time begins when the medium takes it; until then it is not late.
        let since = Instant::now() + Duration::from_hours(24);
        self.flights.insert(token, Flown { flight, since, is_late: false });
    }

    /// Hands to the medium what it takes: reads first; writes get a quarter of the depth while there are reads.
    fn pump(&mut self, now: Instant) {
        while let Some(op) = self.reads.pop_front() {
            let token = op.token;
            if let Err(op) = self.medium.submit(op) {
                self.reads.push_front(op);
                break;
            }
            self.is_flying(token, now);
        }
        let has_reads = self.medium.in_flight() > self.writes_in_flight;
        let depth = self.medium.depth();
        let writes_max = if has_reads { (depth / 4).max(1) } else { depth };
        while self.writes_in_flight < writes_max {
            let Some(op) = self.writes.pop_front() else { break };
            let (token, verb, bytes) = (op.token, op.verb, op.bytes as u64);
            if let Err(op) = self.medium.submit(op) {
                self.writes.push_front(op);
                break;
            }
            self.writes_in_flight += 1;
            if verb == Verb::Write {
                let mut notes = self.shared.notes.lock();
                notes.counts.bytes_written += bytes;
                notes.allowance.wrote(bytes);
            }
            self.is_flying(token, now);
        }
    }

    fn is_flying(&mut self, token: u64, now: Instant) {
        if let Some(flown) = self.flights.get_mut(&token) {
            flown.since = now;
        }
    }

    /// Whether all of a write was written; else counts a failure.
    fn check_written(
        &mut self,
        result: io::Result<usize>,
        bytes: u64,
        doing: &'static str,
        now: Instant,
    ) -> bool {
        match result {
            Ok(written) if written as u64 == bytes => return true,
            Ok(written) => {
                let error = io::Error::new(io::ErrorKind::WriteZero, format!("{written} of {bytes} bytes"));
                self.failed(doing, &error, now);
            }
            Err(error) => self.failed(doing, &error, now),
        }
        false
    }

    /// Counts a failure of the disk, which may be the one too many.
    fn failed(&mut self, doing: &'static str, error: &dyn std::fmt::Display, now: Instant) {
        self.shared.notes.lock().counts.failed += 1;
        tracing::warn!(%error, "disk tier: {doing}");
        let now_ms = u64::try_from(now.saturating_duration_since(self.begun).as_millis()).unwrap_or(u64::MAX);
        if self.health.failed(now_ms) {
            self.failure = Some(format!("it failed too often, the last time: {doing}: {error}"));
        }
    }

    fn with_log<R>(&self, look: impl FnOnce(&mut Log) -> R) -> R {
        look(&mut self.shared.log.lock())
    }
}
