//! Who waits for one model, and who has a place at it.
//!
//! Two kinds wait: requests, which take a place at the model when their turn comes ([`FairQueue`]: fair to their keys), and
//! people's orders to have it awake, which take none and are answered as soon as it is.

use std::collections::VecDeque;

use shoal_core::fair::{FairQueue, Standing};

use super::requests::{Parked, Wanted};
use crate::shelf::Caller;

/// The queue of one model.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    requests: FairQueue<Caller, Parked>,
    orders: VecDeque<Parked>,
}

impl Queue {
    /// Nobody waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.requests.waiting() + self.orders.len()
    }

    /// How many requests wait.
    pub(crate) const fn requests(&self) -> usize {
        self.requests.waiting()
    }

    /// Requests that are at the model.
    pub(crate) const fn active(&self) -> u64 {
        self.requests.active()
    }

    fn iter(&self) -> impl Iterator<Item = &Parked> {
        self.requests.iter().chain(&self.orders)
    }

    /// The one that has waited for longest.
    pub(crate) fn oldest(&self) -> Option<&Parked> {
        self.iter().min_by_key(|parked| parked.since_ms)
    }

    /// Until when somebody waits.
    pub(crate) fn latest_deadline_ms(&self) -> Option<u64> {
        self.iter().map(|parked| parked.deadline_ms).max()
    }

    /// How many requests of this caller wait, and how many may, of a queue of `limit`.
    pub(crate) fn share(&self, caller: &Caller, limit: usize) -> (usize, usize) {
        (self.requests.waiting_of(caller), self.requests.share(limit))
    }

    /// Those who have requests here.
    pub(crate) fn standings(&self, now_ms: u64) -> impl Iterator<Item = Standing<'_, Caller, Parked>> {
        self.requests.standings(now_ms)
    }

    /// One more waits.
    pub(crate) fn push(&mut self, parked: Parked, now_ms: u64) {
        match parked.wanted.clone() {
            Wanted::Route(caller) => self.requests.push(&caller, parked, now_ms),
            Wanted::Wake => self.orders.push_back(parked),
        }
    }

    /// The next one to be answered; a request only where there is a place for it, which it has from now on, and an order
    /// only where all of the model is there.
    pub(crate) fn next(&mut self, has_room: bool, is_up: bool, now_ms: u64) -> Option<Parked> {
        if is_up && let Some(order) = self.orders.pop_front() {
            return Some(order);
        }
        if !has_room {
            return None;
        }
        self.requests.begin_next(now_ms).map(|(_, parked)| parked)
    }

    /// A request takes a place without waiting.
    pub(crate) fn begin(&mut self, caller: &Caller, now_ms: u64) {
        self.requests.begin(caller, now_ms);
    }

    /// A request leaves its place.
    pub(crate) fn end(&mut self, caller: &Caller, now_ms: u64) {
        if !self.requests.end(caller, now_ms) {
            tracing::error!(%caller, "a request ended that had no place");
        }
    }

    /// Somebody does not wait any longer. False where it did not.
    pub(crate) fn remove(&mut self, ticket: u64) -> bool {
        let before = self.len();
        self.requests.retain(|parked| parked.ticket != ticket);
        self.orders.retain(|parked| parked.ticket != ticket);
        self.len() != before
    }

    /// Nobody waits any longer; gives those who did.
    pub(crate) fn drain(&mut self) -> Vec<Parked> {
        let mut drained = self.requests.drain();
        drained.extend(self.orders.drain(..));
        drained
    }
}
