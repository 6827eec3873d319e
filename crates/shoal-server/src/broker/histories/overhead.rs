//! What workers take beside weights and KV, what they say and ask of it, and what of that is seen and checked.
//!
//! By seed they say the most that it was, or what it is now; some beside that what their steps may take without a question
//! while all weights are there (`overhead_peak`), and some ask before a step takes more than is leased.

use std::collections::BTreeMap;

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::protocol::{FromWorker, LeaseKind};

use super::shelf::{Beside, beside, hides};
use super::world::World;
use super::{DEVICE, WEIGHTS};

/// Figures go up and down by so many pages, from none on.
const SIZES: u64 = 5;
/// The most that steps take by what an engine was profiled to.
const PROFILED_MAX: ByteCount = ByteCount::mib(16);

/// What was leased for the steps of one process, when that was last looked at.
#[derive(Clone, Copy)]
pub(super) struct BesideWeights {
    pid: u32,
    leased: ByteCount,
    has_weights: bool,
}

/// So much or less, by chance, in whole pages.
fn up_to(world: &mut World, most: ByteCount) -> ByteCount {
    ByteCount(PAGE_BYTES.0 * world.dice.roll(most.0 / PAGE_BYTES.0 + 1))
}

impl World {
    /// What it has beside weights is more or less than before. It says so, or does not know, and the driver shows it.
    pub(super) fn take_beside(&mut self, place: usize) {
        let room = DEVICE.saturating_sub(self.used());
        let (taken, does_tell) = (ByteCount::mib(2 * self.dice.roll(SIZES)), self.dice.chance(60));
        let (hides, says) = (hides(self.seed), beside(self.seed));
        let Some(worker) = self.workers.get_mut(&place).filter(|worker| worker.is_ready) else { return };
        if worker.heard.is_none() || worker.is_stopped {
            return;
        }
        if says == Beside::Peak {
            if worker.held >= WEIGHTS {
                // A step takes more than any before it, which the engine counts: it may do so again.
                worker.take_unasked(taken.max(worker.base).min(worker.beside + room));
                self.usage(place);
            }
            return;
        }
        worker.beside = taken.min(worker.beside + room);
        if !does_tell && !hides {
            self.seen.drifts += u64::from(worker.beside > worker.said);
            return;
        }
        self.seen.overhead_up += u64::from(worker.beside > worker.said.max(worker.overhead));
        if worker.beside < worker.overhead && worker.asks_overhead.is_none() {
            // Declared too high: it gives back what it does not take.
            let bytes = worker.overhead - worker.beside;
            (worker.overhead, worker.said) = (worker.beside, worker.beside);
            self.seen.overhead_down += 1;
            self.say(place, FromWorker::LeaseReturn { kind: LeaseKind::Overhead, bytes });
        } else if says == Beside::Most {
            worker.said = worker.said.max(worker.beside);
        } else {
            worker.said = worker.beside;
        }
        self.usage(place);
    }

    /// It was profiled: steps may take so much. What it declared beyond what it has now is the server's to lease from now on.
    pub(super) fn profile(&mut self, place: usize) {
        let Some(base) = self.workers.get(&place).map(|worker| worker.beside) else { return };
        let more = up_to(self, PROFILED_MAX.saturating_sub(base));
        let Some(worker) = self.workers.get_mut(&place) else { return };
        (worker.base, worker.may_take) = (base, base + more);
        self.usage(place);
        let Some(worker) = self.workers.get_mut(&place) else { return };
        let bytes = worker.overhead.saturating_sub(base);
        if !bytes.is_zero() {
            worker.overhead -= bytes;
            self.say(place, FromWorker::LeaseReturn { kind: LeaseKind::Overhead, bytes });
        }
    }

    /// An engine's steps take memory beside weights and KV while requests are at it, and leave it.
    pub(super) fn step_beside(&mut self, place: usize) {
        match beside(self.seed) {
            Beside::Most => {}
            Beside::Now => self.step_told(place),
            Beside::Peak => {
                self.cancel_wake(place);
                self.step_unasked(place);
            }
            Beside::Asks => self.step_asked(place),
        }
    }

    /// What it has now it says now; while nobody may go beyond leases it is less each time.
    fn step_told(&mut self, place: usize) {
        if self.is_calm || self.dice.roll(150) != 0 {
            return;
        }
        let taken = ByteCount(PAGE_BYTES.0 * self.dice.roll(SIZES));
        let room = if self.is_still { ByteCount::ZERO } else { DEVICE.saturating_sub(self.used()) };
        let Some(worker) = self.workers.get_mut(&place) else { return };
        worker.beside = taken.min(worker.beside + room);
        worker.said = worker.beside;
        self.usage(place);
    }

    /// A wake whose memory does not come in its time is given up, with the request for it.
    fn cancel_wake(&mut self, place: usize) {
        if self.is_steady() || !self.dice.chance(15) {
            return;
        }
        let Some(worker) = self.workers.get_mut(&place) else { return };
        // One that was answered already takes what it was given.
        if let Some((order, request)) = worker.wake
            && !worker.has_heard_of(request)
        {
            worker.wake = None;
            self.say(place, FromWorker::LeaseCancel { request });
            self.done(place, order, ByteCount::ZERO, Some("its memory did not come in time".to_owned()));
        }
    }

    /// Steps take what they like of what is kept for them.
    fn step_unasked(&mut self, place: usize) {
        if !self.dice.chance(40) {
            return;
        }
        let runs = self.requests_at(place) > 0;
        let room = DEVICE.saturating_sub(self.used());
        let Some(worker) = self.workers.get(&place) else { return };
        let (base, may_take, before) = (worker.base, worker.may_take, worker.beside);
        let more = if runs && worker.held >= WEIGHTS { may_take - base } else { ByteCount::ZERO };
        let taken = (base + up_to(self, more)).min(before + room);
        let tells = self.dice.chance(50) || hides(self.seed);
        let Some(worker) = self.workers.get_mut(&place).filter(|_| taken != before) else { return };
        worker.take_unasked(taken);
        self.seen.steps_unasked += u64::from(taken > before);
        self.check_promised();
        if tells {
            self.usage(place);
        }
    }

    /// A step of a size that is known asks for what it will take; later that is given back.
    fn step_asked(&mut self, place: usize) {
        if !self.dice.chance(30) {
            return;
        }
        let runs = self.requests_at(place) > 0;
        let needed = ByteCount(PAGE_BYTES.0 * self.dice.roll(SIZES));
        let room = DEVICE.saturating_sub(self.used());
        let id = self.core.models[place].id;
        let Some(worker) = self.workers.get_mut(&place).filter(|worker| worker.asks_overhead.is_none())
        else {
            return;
        };
        if runs && worker.held >= WEIGHTS {
            if needed > worker.overhead {
                let bytes = needed - worker.overhead;
                worker.requests += 1;
                let request = worker.requests;
                worker.asks_overhead = Some((request, bytes));
                let is_measured = bytes <= self.core.book.corrected(id);
                self.request(place, request, LeaseKind::Overhead, bytes);
                if is_measured {
                    self.seen.overhead_known += 1;
                    let is_it = |asked: &crate::broker::Asked| {
                        (asked.pending.model, asked.pending.request) == (id, request)
                    };
                    assert!(!self.core.asked.iter().any(is_it), "it was measured, and is asked of others");
                }
                return;
            }
            worker.beside = needed.min(worker.beside + room);
            worker.said = worker.beside;
            return self.usage(place);
        }
        if !runs && !worker.overhead.is_zero() && self.dice.chance(30) {
            let Some(worker) = self.workers.get_mut(&place) else { return };
            worker.beside = worker.beside.min(PAGE_BYTES).min(worker.overhead);
            worker.said = worker.beside;
            let bytes = worker.overhead - worker.beside;
            worker.overhead = worker.beside;
            self.say(place, FromWorker::LeaseReturn { kind: LeaseKind::Overhead, bytes });
            self.usage(place);
        }
    }

    /// The lease for a step is there: all of it, and the memory with it.
    pub(super) fn overhead_granted(&mut self, place: usize, request: u64, bytes: ByteCount) {
        let room = DEVICE.saturating_sub(self.used());
        let Some(worker) = self.workers.get_mut(&place) else { return };
        worker.overhead += bytes;
        if let Some((_, asked)) = worker.asks_overhead.take_if(|(asked, _)| *asked == request) {
            assert_eq!(bytes, asked, "{} runs no step with a part of what it takes", worker.name);
            worker.beside = worker.overhead.min(worker.beside + room);
            worker.said = worker.beside;
            self.seen.overhead_asked += 1;
        }
        self.check_promised();
        self.usage(place);
    }

    /// What an engine's steps, or a program, may take without a question stays leased while they can run.
    pub(super) fn check_beside(&mut self) {
        self.watch_beside_weights();
        if self.core.is_settling() {
            return;
        }
        self.check_programs();
        let core = &self.core;
        for (place, worker) in &mut self.workers {
            let model = &core.models[*place];
            if model.connection.is_none() || worker.held.is_zero() {
                worker.is_covered = true;
                continue;
            }
            let leased = core.book.held(model.id, LeaseKind::Overhead);
            assert!(
                leased >= worker.may_take || !worker.is_covered,
                "{} may take {} in a step, and {leased} are leased",
                worker.name,
                worker.may_take
            );
            worker.is_covered |= leased >= worker.may_take;
        }
    }

    /// Counts what was leased for steps together with weights, and what went with them.
    fn watch_beside_weights(&mut self) {
        if beside(self.seed) != Beside::Peak {
            return;
        }
        let core = &self.core;
        let mut now = BTreeMap::new();
        for (place, worker) in &self.workers {
            let id = core.models[*place].id;
            let held = BesideWeights {
                pid: worker.pid,
                leased: core.book.held(id, LeaseKind::Overhead),
                has_weights: !core.book.held(id, LeaseKind::Weights).is_zero(),
            };
            if let Some(before) = self.beside_weights.get(place).filter(|before| before.pid == worker.pid) {
                let came = held.has_weights && !before.has_weights;
                self.seen.came_with_weights += u64::from(came && held.leased > before.leased);
                let went = before.has_weights && !held.has_weights;
                self.seen.went_with_weights += u64::from(went && held.leased < before.leased);
            }
            now.insert(*place, held);
        }
        self.beside_weights = now;
    }

    /// A timer rings; counts the leases for overhead that fell because it was their time.
    pub(super) fn ring(&mut self) {
        let due = self.core.overhead_falls.iter().filter(|(_, at_ms)| **at_ms <= self.now_ms);
        let ids = due.map(|(place, _)| self.core.models[*place].id);
        let before: Vec<_> = ids.map(|id| (id, self.core.book.corrected(id))).collect();
        self.core.handle_timer(self.now_ms);
        let fell = before.iter().filter(|(id, bytes)| self.core.book.corrected(*id) < *bytes);
        self.seen.overhead_fell += fell.count() as u64;
    }
}
