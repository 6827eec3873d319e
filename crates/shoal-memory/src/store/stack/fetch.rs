//! One block on its way up, and all who wait for it.
//!
//! Apart because it is the stack's one state machine. A flight has one leader, to whose memory a tier reads; when the block
//! is there it is copied to the others. When a tier fails, the leader's memory comes back and the next tier is asked; when
//! the leader gives up or its memory is too short, the next one leads.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::buffer::{Home, OnLoan};
use super::super::crew::Desk;
use super::super::{Buffer, Fetched, Miss, Offer, Promise, StoreKey};
use super::{Job, Shared};

/// How long memory may take to come back from a transfer that has failed.
const HOME_WAIT: Duration = Duration::from_millis(50);

/// Somebody who wants a block.
pub(super) struct Asker {
    pub(super) target: Buffer,
    pub(super) promise: Promise<Fetched>,
}

impl Asker {
    pub(super) fn refuse(self, miss: Miss) {
        let Self { target, promise } = self;
        // Before its owner hears of it, who may want to use it at once.
        drop(target);
        promise.answer(Err(miss));
    }

    /// Why nothing more is to be done for it, if so.
    fn is_over(&self) -> Option<Miss> {
        if self.promise.is_cancelled() {
            Some(Miss::Cancelled)
        } else {
            (self.promise.deadline() <= Instant::now()).then_some(Miss::Deadline)
        }
    }

    /// Copies the block to its memory and answers.
    fn serve(mut self, block: &[u8]) {
        let memory = self.target.as_mut_slice().unwrap_or_default();
        let (bytes, bytes_max) = (block.len(), memory.len() as u64);
        match memory.get_mut(..bytes) {
            Some(place) => place.copy_from_slice(block),
            None => return self.refuse(Miss::TooLong { bytes: bytes as u64, bytes_max }),
        }
        self.promise.answer(Ok(Fetched { buffer: self.target, bytes }));
    }
}

/// A block on its way.
#[derive(Default)]
pub(super) struct Flight {
    /// All but the leader.
    pub(super) waiting: VecDeque<Asker>,
    /// It was removed meanwhile: whoever waits is served, but no tier gets it again.
    pub(super) is_removed: bool,
}

/// What a tier answered.
pub(super) struct Arrival {
    key: StoreKey,
    tier: usize,
    promise: Promise<Fetched>,
    home: Arc<Home>,
    answer: Result<Fetched, Miss>,
}

impl Shared {
    /// Looks for the block from the fastest tier on.
    pub(super) fn begin(&self, desk: &Desk<Job>, key: StoreKey, asker: Asker) {
        self.advance(desk, key, asker, 0, &Miss::Absent);
    }

    /// Asks the tiers from `first` on. `miss` is the answer if none has it.
    fn advance(&self, desk: &Desk<Job>, key: StoreKey, asker: Asker, first: usize, miss: &Miss) {
        if let Some(over) = asker.is_over() {
            return self.next_leader(desk, key, asker, over);
        }
        for (index, tier) in self.tiers.iter().enumerate().skip(first) {
            if !tier.contains(&key) {
                continue;
            }
            if let Some(held) = tier.hold(&key) {
                self.count_hit(index, held.as_slice().len());
                self.promote(key, index, held.as_slice(), None);
                return self.serve_all(key, Some(asker), held.as_slice());
            }
            let Asker { target, promise } = asker;
            let (target, home) = OnLoan::lend(target);
            let left = promise.deadline().saturating_duration_since(Instant::now());
            let desk = desk.clone();
            tier.get(key, target, left).then(move |answer| {
                // Somebody else's thread: the copies are made on one of ours.
                desk.go_on(Job::Arrived(Arrival { key, tier: index, promise, home, answer }));
            });
            return;
        }
        // For the others it would end the same way.
        self.end(key, asker, miss);
    }

    pub(super) fn arrived(&self, desk: &Desk<Job>, arrival: Arrival) {
        let Arrival { key, tier, promise, home, answer } = arrival;
        match answer {
            Ok(fetched) => {
                let Fetched { buffer, bytes } = fetched;
                let (buffer, is_shared) = self.shared(buffer.kept());
                let fetched = Fetched { buffer, bytes };
                self.count_hit(tier, bytes);
                self.promote(key, tier, fetched.as_slice(), is_shared.then_some(&fetched.buffer));
                self.serve_all(key, None, fetched.as_slice());
                self.state.lock().waiting -= 1;
                promise.answer(Ok(fetched));
            }
            Err(miss) => {
                if !matches!(miss, Miss::Cancelled | Miss::Deadline | Miss::TooLong { .. }) {
                    self.state.lock().counts.tiers[tier].missed += 1;
                }
                let until = promise.deadline().min(Instant::now() + HOME_WAIT);
                let target = home.wait(until.max(Instant::now()));
                match target {
                    Some(target) if matches!(miss, Miss::TooLong { .. }) => {
                        self.next_leader(desk, key, Asker { target, promise }, miss);
                    }
                    Some(target) => self.advance(desk, key, Asker { target, promise }, tier + 1, &miss),
                    // The transfer hangs and has the memory: nothing can be read to it.
                    None => {
                        let asker = Asker { target: Buffer::zeroed(0), promise };
                        self.next_leader(desk, key, asker, miss);
                    }
                }
            }
        }
    }

    pub(super) fn count_hit(&self, tier: usize, bytes: usize) {
        let counts = &mut self.state.lock().counts.tiers[tier];
        counts.hits += 1;
        counts.hit_bytes += bytes as u64;
    }

    /// The leader hears why it gets nothing, and the next one leads, from the fastest tier on.
    fn next_leader(&self, desk: &Desk<Job>, key: StoreKey, asker: Asker, miss: Miss) {
        let mut state = self.state.lock();
        state.waiting -= 1;
        state.counts.misses += 1;
        let next = state.flights.get_mut(&key).and_then(|flight| flight.waiting.pop_front());
        if next.is_none() {
            state.flights.remove(&key);
        }
        drop(state);
        asker.refuse(miss);
        if let Some(asker) = next {
            desk.go_on(Job::Begin { key, asker });
        }
    }

    /// Nobody has it.
    fn end(&self, key: StoreKey, leader: Asker, miss: &Miss) {
        let mut state = self.state.lock();
        let flight = state.flights.remove(&key).unwrap_or_default();
        state.waiting -= 1 + flight.waiting.len();
        state.counts.misses += 1 + flight.waiting.len() as u64;
        drop(state);
        for asker in flight.waiting.into_iter().chain([leader]) {
            asker.refuse(miss.clone());
        }
    }

    /// Copies the block to all who wait, until nobody does.
    fn serve_all(&self, key: StoreKey, leader: Option<Asker>, block: &[u8]) {
        let mut askers: VecDeque<Asker> = leader.into_iter().collect();
        loop {
            for asker in askers.drain(..) {
                self.state.lock().waiting -= 1;
                match asker.is_over() {
                    Some(miss) => asker.refuse(miss),
                    None => asker.serve(block),
                }
            }
            let mut state = self.state.lock();
            let Some(flight) = state.flights.get_mut(&key) else { return };
            if flight.waiting.is_empty() {
                state.flights.remove(&key);
                return;
            }
            askers = std::mem::take(&mut flight.waiting);
        }
    }

    /// Puts a block that tier `from` served into the faster ones that want it, as it lies if its memory can be shared.
    fn promote(&self, key: StoreKey, from: usize, block: &[u8], memory: Option<&Buffer>) {
        let offer = Offer { bytes: block.len() as u64, recompute_us: None };
        let is_removed = || self.state.lock().flights.get(&key).is_some_and(|flight| flight.is_removed);
        for (index, tier) in self.tiers.iter().enumerate().take(from) {
            if is_removed() || tier.contains(&key) || !tier.offer(&key, &offer).is_admitted() {
                continue;
            }
            if let Some(copy) = self.copy(block, memory) {
                self.put_to(index, key, copy, self.options.promote_deadline, true, |_| {});
            }
        }
        // What is removed later than this goes by itself: it is asked of each tier after the put.
        if is_removed() {
            self.take_back(key);
        }
    }
}
