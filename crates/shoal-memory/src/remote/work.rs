//! One request of a remote, with its tries.
//!
//! Apart because here is where time goes: each try has its own, all of them have the caller's deadline, and between them is
//! a wait. A thread does one request at a time; what it learns is noted for the next.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::envelope::{HEAD_BYTES, VERSION};
use super::wire::{Wire, WireError};
use super::{Shared, State};
use crate::store::{Buffer, Fetched, Miss, Promise, StoreKey, Stored};

/// How long a request that nobody waits for may take: looking, and undoing a put.
const OWN_DEADLINE: Duration = Duration::from_secs(5);

/// This part of a try's time is enough for a remote that is well: callers wait less than a whole one, and what is late for
/// all of them is out.
const ENOUGH: u32 = 8;

/// What a thread is asked to do.
pub(super) enum Job {
    Get {
        key: StoreKey,
        target: Buffer,
        promise: Promise<Fetched>,
    },
    Put {
        key: StoreKey,
        source: Buffer,
        bytes: usize,
        number: u64,
        promise: Promise<Stored>,
    },
    Remove {
        key: StoreKey,
        was_there: bool,
        number: u64,
        promise: Promise<bool>,
    },
    /// Without a promise only what is known of presence is mended.
    Look {
        key: StoreKey,
        promise: Option<Promise<bool>>,
    },
}

impl Job {
    /// Answers without doing it.
    pub(super) fn refuse(self, miss: Miss, shared: &Shared) {
        match self {
            Self::Get { target, promise, .. } => {
                // Before its owner hears of it.
                drop(target);
                promise.answer(Err(miss));
            }
            Self::Put { key, source, bytes, number, promise } => {
                drop(source);
                shared.put_is_over(&key, number, bytes as u64);
                promise.answer(Err(miss));
            }
            Self::Remove { key, number, promise, .. } => {
                shared.removal_is_over(&key, number);
                promise.answer(Err(miss));
            }
            Self::Look { key, promise } => {
                let mut state = shared.state.lock();
                state.presence.forget(&key);
                state.looking -= usize::from(promise.is_none());
                drop(state);
                if let Some(promise) = promise {
                    promise.answer(Err(miss));
                }
            }
        }
    }
}

impl State {
    fn settle(&mut self, key: &StoreKey) {
        let Self { putting, presence, .. } = self;
        presence
            .settle(key, |removed| putting.iter().any(|(number, other)| *number < removed && other == key));
    }
}

impl Shared {
    fn put_is_over(&self, key: &StoreKey, number: u64, bytes: u64) {
        let mut state = self.state.lock();
        let flushed = state.end_put(number, bytes);
        state.settle(key);
        drop(state);
        for promise in flushed {
            promise.answer(Ok(()));
        }
    }

    fn removal_is_over(&self, key: &StoreKey, number: u64) {
        let mut state = self.state.lock();
        state.presence.removal_ended(key, number);
        state.settle(key);
    }
}

/// The name of a block's object. The format's version is in it, so that versions do not read each other's.
fn name(key: &StoreKey) -> String {
    format!("v{VERSION}/{:032x}/{:032x}/{:032x}", key.fingerprint.0, key.tenant, key.block)
}

/// See the module.
pub(super) struct Worker {
    shared: Arc<Shared>,
    wire: Box<dyn Wire>,
    random: u64,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, wire: Box<dyn Wire>, seed: u64) -> Self {
        Self { shared, wire, random: seed | 1 }
    }

    pub(super) fn work(&mut self, job: Job) {
        match job {
            Job::Get { key, target, promise } => self.get(key, target, promise),
            Job::Put { key, source, bytes, number, promise } => self.put(key, source, bytes, number, promise),
            Job::Remove { key, was_there, number, promise } => {
                let name = name(&key);
                let is_over = || promise.is_cancelled();
                let done = self.tries(promise.deadline(), is_over, |wire, until| wire.delete(&name, until));
                self.shared.removal_is_over(&key, number);
                promise.answer(done.map(|()| was_there));
            }
            Job::Look { key, promise } => {
                let (name, asked) = (name(&key), Instant::now());
                let deadline =
                    promise.as_ref().map_or_else(|| Instant::now() + OWN_DEADLINE, Promise::deadline);
                let is_over = || promise.as_ref().is_some_and(Promise::is_cancelled);
                let found = self.tries(deadline, is_over, |wire, until| wire.has(&name, until));
                let mut state = self.shared.state.lock();
                state.looking -= usize::from(promise.is_none());
                match &found {
                    Ok(is_there) => state.presence.answered(&key, *is_there, asked, Instant::now()),
                    Err(_) => state.presence.forget(&key),
                }
                drop(state);
                if let Some(promise) = promise {
                    promise.answer(found);
                }
            }
        }
    }

    fn get(&mut self, key: StoreKey, mut target: Buffer, promise: Promise<Fetched>) {
        let is_known_absent = self.shared.state.lock().presence.find(&key, Instant::now()) == Some(false);
        let (name, begun) = (name(&key), Instant::now());
        let room = target.as_slice().len() as u64;
        let mut head = [0; HEAD_BYTES];
        let read = if is_known_absent {
            Ok(None)
        } else {
            let memory = target.as_mut_slice().unwrap_or_default();
            let is_over = || promise.is_cancelled();
            self.tries(promise.deadline(), is_over, |wire, until| wire.get(&name, &mut head, memory, until))
        };
        let answer = match read {
            Ok(Some(bytes)) => self.believe(&key, &head, target, bytes, begun),
            Ok(None) => {
                drop(target);
                let mut state = self.shared.state.lock();
                state.counts.absent += 1;
                if !is_known_absent {
                    state.presence.note(&key, false, Instant::now());
                }
                Err(Miss::Absent)
            }
            Err(miss) => {
                drop(target);
                Err(match miss {
                    Miss::TooLong { bytes, .. } => Miss::TooLong { bytes, bytes_max: room },
                    miss => miss,
                })
            }
        };
        promise.answer(answer);
    }

    /// The block of an object of `bytes`, if it is the one that was put.
    fn believe(
        &self,
        key: &StoreKey,
        head: &[u8; HEAD_BYTES],
        target: Buffer,
        bytes: u64,
        begun: Instant,
    ) -> Result<Fetched, Miss> {
        let length = usize::try_from(bytes).unwrap_or(usize::MAX).saturating_sub(HEAD_BYTES);
        let body = target.as_slice().get(..length).unwrap_or_default();
        let is_right = length > 0 && self.shared.options.key.believes(key, head, body);
        let took = begun.elapsed();
        let mut state = self.shared.state.lock();
        // A removal that came meanwhile is kept apart from this.
        state.presence.note(key, is_right, Instant::now());
        if is_right {
            state.counts.hits += 1;
            state.counts.bytes_read += length as u64;
            state.read.saw(length as u64, took.as_secs_f64() * 1e6);
            return Ok(Fetched { buffer: target, bytes: length });
        }
        state.counts.corrupt += 1;
        drop(state);
        drop(target);
        tracing::warn!(%key, bytes, "an object of the remote tier is not what was put, or was put with another key");
        self.shared
            .breaker
            .failed("its objects are not what was put, or were put with another key", Instant::now());
        Err(Miss::Corrupt)
    }

    fn put(&mut self, key: StoreKey, source: Buffer, bytes: usize, number: u64, promise: Promise<Stored>) {
        let name = name(&key);
        let body = source.as_slice().get(..bytes).unwrap_or_default();
        let shared = Arc::clone(&self.shared);
        let is_over = || promise.is_cancelled() || shared.state.lock().presence.is_removed(&key, number);
        let is_there = shared.state.lock().presence.find(&key, Instant::now()) == Some(true);
        let written = if is_there {
            Ok(Stored::Already)
        } else {
            let head = shared.options.key.seal(&key, body);
            let written =
                self.tries(promise.deadline(), is_over, |wire, until| wire.put(&name, &head, body, until));
            written.map(|()| Stored::Written)
        };
        drop(source);
        let mut state = shared.state.lock();
        if written == Ok(Stored::Written) {
            state.counts.written += 1;
            state.counts.bytes_written += bytes as u64;
            state.presence.note(&key, true, Instant::now());
        }
        let is_removed = state.presence.is_removed(&key, number);
        drop(state);
        if is_removed {
            // It may have been written after it was deleted, also by a try of which nothing was heard.
            let until = Instant::now() + OWN_DEADLINE;
            let undone = self.tries(until, || false, |wire, until| wire.delete(&name, until));
            if let Err(miss) = undone {
                tracing::warn!(%key, %miss, "a block that was removed while it was written may be on the remote tier");
            }
        }
        shared.put_is_over(&key, number, bytes as u64);
        promise.answer(written);
    }

    /// A part of a time, whichever.
    fn part_of(&mut self, time: Duration) -> Duration {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        time.mul_f64((self.random >> 11) as f64 / (1_u64 << 53) as f64)
    }

    /// Tries until it is done, given up, or the deadline would pass.
    fn tries<T>(
        &mut self,
        deadline: Instant,
        is_over: impl Fn() -> bool,
        mut once: impl FnMut(&mut dyn Wire, Instant) -> Result<T, WireError>,
    ) -> Result<T, Miss> {
        let (try_deadline, tries_max) =
            (self.shared.options.try_deadline, self.shared.options.tries_max.max(1));
        let mut backoff = self.shared.options.backoff;
        let mut number = 1;
        loop {
            let begun = Instant::now();
            if is_over() {
                return Err(Miss::Cancelled);
            }
            if begun >= deadline {
                return Err(Miss::Deadline);
            }
            let finds_out = self.shared.breaker.may_ask(begun)?;
            let error = match once(&mut *self.wire, deadline.min(begun + try_deadline)) {
                Ok(done) => {
                    self.shared.breaker.served();
                    return Ok(done);
                }
                Err(WireError::TooLong(bytes)) => {
                    self.shared.breaker.served();
                    return Err(Miss::TooLong { bytes, bytes_max: 0 });
                }
                Err(error) => error,
            };
            self.shared.state.lock().counts.failed += 1;
            // What had hardly any time says nothing of the remote.
            let now = Instant::now();
            let had_time = now.saturating_duration_since(begun) >= try_deadline / ENOUGH;
            if !matches!(error, WireError::Late) || had_time {
                self.shared.breaker.failed(&error.to_string(), now);
            } else if finds_out {
                self.shared.breaker.undecided(now);
            }
            let is_final = matches!(error, WireError::Refused(_));
            let miss = match error {
                WireError::Late if deadline <= begun + try_deadline => Miss::Deadline,
                error => Miss::Failed { doing: "the remote tier", reason: error.to_string() },
            };
            let wait = self.part_of(backoff);
            if number >= tries_max || is_final || miss == Miss::Deadline || now + wait >= deadline {
                return Err(miss);
            }
            number += 1;
            backoff = backoff.saturating_mul(2).min(try_deadline);
            self.shared.state.lock().counts.retries += 1;
            std::thread::sleep(wait);
        }
    }
}
