//! What a process takes beside weights and KV: its lease follows what is measured of it, up at once and down late.
//!
//! A worker declares what it will take (a lease that it asks for and gives back itself), and what is measured beyond that is
//! a *correction*, the server's own entry in the book. Measured is what the worker says that it has now, and what the driver
//! shows of its process. The correction is the most of the last [`KEPT_MS`]: memory that a single long prompt took is
//! others' half a minute after its process has given it back, and a figure that goes up and down moves no lease.
//!
//! **What may come back without a question.** An engine whose steps take memory that they did not ask for
//! (`overhead_peak`: vLLM, which profiles that once and then relies on it, and any program that is run by a command) keeps it
//! while any of its weights are on the device. Without them no step runs. It is asked for again with its weights, as one
//! request: were it granted before them, several engines could each have that and none its weights.

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::policy::PendingRequest;
use shoal_core::protocol::LeaseKind;

use super::{Asked, Core, OVERHEAD_REQUEST, Record};
use crate::state::EventKind;

/// How long what was measured counts after it was last so.
pub(super) const KEPT_MS: u64 = 30_000;
/// How long after its last weights an engine has given up what its steps took.
pub(super) const LEAVES_MS: u64 = 5_000;
/// A correction is lowered by no less than this part of what is due: less is worth nobody's while.
const SLACK_PART: u64 = 16;
/// How long measured overhead may stay uncovered before it is asked for anew.
const WAIT_MS: u64 = 60_000;

impl Core {
    /// What the lease for overhead of the model at `place` is to be: no less than what was measured lately.
    pub(super) fn overhead_due(&mut self, place: usize, now_ms: u64) -> ByteCount {
        let (kept, kept_ms) = (self.peak_kept(place), self.kept_ms(place));
        let model = self.models.quietly(place);
        let seen = model.overhead_seen.most(now_ms, kept_ms);
        model.overhead_said.most(now_ms, kept_ms).max(seen).max(kept)
    }

    /// How long what was measured counts. Of an engine that says what its steps take, none run without weights: what it has
    /// given up by then, and said so since they left, it does not take again before it has them.
    fn kept_ms(&self, place: usize) -> u64 {
        let model = &self.models[place];
        let has_weights = !self.book.held(model.id, LeaseKind::Weights).is_zero();
        let falls_at_once =
            !model.usage.overhead_peak.is_zero() && !has_weights && model.is_said_without_weights;
        if falls_at_once { 0 } else { KEPT_MS }
    }

    /// What of the lease for overhead is free again once it has no weights: what goes beyond what it had without them. As long as
    /// that is not known all that was measured, so that somebody is sent away once in vain rather than never.
    pub(super) fn overhead_leaves(&self, place: usize, now_ms: u64) -> ByteCount {
        let model = &self.models[place];
        if model.usage.overhead_peak.is_zero() {
            return ByteCount::ZERO;
        }
        let (without, now) = (model.overhead_without_weights, model.overhead_now());
        let has_weights = !self.book.held(model.id, LeaseKind::Weights).is_zero();
        let rest = if has_weights {
            without.unwrap_or_default()
        } else if self.is_leaving(place, now_ms) {
            without.unwrap_or_default().min(now)
        } else {
            // What it has by now it keeps.
            return ByteCount::ZERO;
        };
        let held = self.book.held(model.id, LeaseKind::Overhead);
        held.saturating_sub(rest).min(self.book.corrected(model.id))
    }

    /// Its last weights left so lately that it may not have given up yet what its steps took: that is done after them.
    fn is_leaving(&self, place: usize, now_ms: u64) -> bool {
        let left_ms = self.models[place].weights_left_ms;
        left_ms.is_some_and(|left_ms| now_ms < left_ms.saturating_add(LEAVES_MS))
    }

    /// Notes what it has without weights when they come, and when they have left.
    pub(super) fn note_weights(&mut self, place: usize, before: ByteCount, now_ms: u64) {
        let after = self.book.held(self.models[place].id, LeaseKind::Weights);
        let is_leaving = self.is_leaving(place, now_ms);
        let model = self.models.quietly(place);
        if before.is_zero() && !after.is_zero() {
            let now = model.overhead_now();
            model.overhead_without_weights = match model.overhead_without_weights {
                // It has hardly been without.
                known if is_leaving => known.map(|known| known.min(now)),
                // Before it has said what its steps take, it says what it declared.
                _ => Some(now).filter(|_| !model.usage.overhead_peak.is_zero()),
            };
            model.weights_left_ms = None;
        } else if after.is_zero() && !before.is_zero() {
            model.weights_left_ms = Some(now_ms);
            model.is_said_without_weights = false;
        }
    }

    /// What its steps may take without a question. They may run while it has weights.
    fn peak_kept(&self, place: usize) -> ByteCount {
        let model = &self.models[place];
        let has_weights = !self.book.held(model.id, LeaseKind::Weights).is_zero();
        if has_weights { model.usage.overhead_peak } else { ByteCount::ZERO }
    }

    /// What its steps may take once it has weights, beyond what is leased of it.
    pub(super) fn overhead_lacking(&self, place: usize) -> ByteCount {
        let model = &self.models[place];
        if self.book.held(model.id, LeaseKind::Weights).is_zero() {
            model.usage.overhead_peak.saturating_sub(self.book.held(model.id, LeaseKind::Overhead))
        } else {
            ByteCount::ZERO
        }
    }

    /// Brings the lease for overhead in line with what was measured.
    pub(super) fn follow_overhead(&mut self, place: usize, now_ms: u64) {
        if self.is_settling() {
            // Covered once all is known.
            return;
        }
        let (id, due) = (self.models[place].id, self.overhead_due(place, now_ms));
        let (held, corrected) = (self.book.held(id, LeaseKind::Overhead), self.book.corrected(id));
        let slack = ByteCount(due.0 / SLACK_PART).max(PAGE_BYTES);
        let lower = held.saturating_sub(due).min(corrected);
        // Of what has left for good nothing stays: others count on it.
        let slack = if self.kept_ms(place) == 0 { ByteCount(1) } else { slack };
        if (due > held || lower >= slack)
            && let Ok(uncovered) = self.book.measure_overhead(id, due)
        {
            self.cover_overhead(place, uncovered, now_ms);
        }
        self.note_fall(place, now_ms);
    }

    /// When the correction of the model at `place` may fall by time alone.
    fn note_fall(&mut self, place: usize, now_ms: u64) {
        let model = &self.models[place];
        // And when what is counted as leaving has to have left.
        let leaving = self.is_leaving(place, now_ms) && !model.usage.overhead_peak.is_zero();
        let leaves_ms = model.weights_left_ms.filter(|_| leaving).map(|left_ms| left_ms + LEAVES_MS);
        let kept_ms = self.kept_ms(place);
        let falls = [&model.overhead_said, &model.overhead_seen].map(|recent| recent.falls_at_ms(kept_ms));
        match falls.into_iter().chain([leaves_ms]).flatten().min() {
            Some(at_ms) if !self.book.corrected(model.id).is_zero() => {
                self.overhead_falls.insert(place, at_ms);
            }
            _ => {
                self.overhead_falls.remove(&place);
            }
        }
    }

    /// Lowers what is due to fall by now.
    pub(super) fn lower_overheads(&mut self, now_ms: u64) {
        let due = self.overhead_falls.iter().filter(|(_, at_ms)| **at_ms <= now_ms);
        let due: Vec<usize> = due.map(|(place, _)| *place).collect();
        for place in due {
            self.overhead_falls.remove(&place);
            self.follow_overhead(place, now_ms);
        }
    }

    /// What is leased for overhead of which less is measured by now.
    pub(super) fn overhead_falling(&self) -> ByteCount {
        let of = |place: &usize| {
            let (model, kept) = (&self.models[*place], self.peak_kept(*place));
            let now = model.overhead_now().max(kept);
            let held = self.book.held(model.id, LeaseKind::Overhead);
            held.saturating_sub(now).min(self.book.corrected(model.id))
        };
        self.overhead_falls.keys().map(of).sum()
    }

    pub(super) fn next_overhead_fall(&self) -> Option<u64> {
        self.overhead_falls.values().min().copied()
    }

    /// Tells of corrected overhead and asks in the model's name for what is not covered.
    pub(super) fn cover_overhead(&mut self, place: usize, uncovered: ByteCount, now_ms: u64) {
        let overhead = self.book.held(self.models[place].id, LeaseKind::Overhead);
        // Figures come several times a second, and say the same until somebody has yielded.
        let told = std::mem::replace(&mut self.models.quietly(place).overhead_told, (overhead, uncovered));
        if told != (overhead, uncovered) {
            self.tell(now_ms, Some(place), EventKind::OverheadCorrected { overhead, uncovered });
        }
        self.ask_for_overhead(place, uncovered, now_ms);
    }

    fn ask_for_overhead(&mut self, place: usize, bytes: ByteCount, now_ms: u64) {
        let id = self.models[place].id;
        let is_it = |asked: &Asked| (asked.pending.model, asked.pending.request) == (id, OVERHEAD_REQUEST);
        if bytes.is_zero() {
            self.asked.retain(|asked| !is_it(asked));
            return;
        }
        if let Some(open) = self.asked.iter_mut().find(|asked| is_it(asked)) {
            // It has waited for as long as it has.
            open.pending.bytes = bytes;
            return;
        }
        self.asked.push(Asked {
            pending: PendingRequest {
                model: id,
                request: OVERHEAD_REQUEST,
                kind: LeaseKind::Overhead,
                bytes,
                bytes_min: ByteCount(1),
                asked_ms: now_ms,
                deadline_ms: now_ms + WAIT_MS,
            },
            reason: "its process was measured to take more than it declared".to_owned(),
            waits_for: String::new(),
        });
    }

    /// What the policy is to see of the requests. Of overhead that a worker asks for, what was measured of it is leased
    /// already: nobody has to give anything up for that once more. Whoever asks for weights asks for what its steps lack too.
    pub(super) fn requests_to_meet(&self) -> Vec<PendingRequest> {
        let mut requests: Vec<PendingRequest> =
            self.asked.iter().map(|asked| asked.pending.clone()).collect();
        for pending in &mut requests {
            let (covered, lacking) = self.covered_and_lacking(pending);
            let to_meet = |bytes: ByteCount| bytes.saturating_sub(covered).max(ByteCount(1)) + lacking;
            (pending.bytes, pending.bytes_min) = (to_meet(pending.bytes), to_meet(pending.bytes_min));
        }
        requests
    }

    /// How much of a request is leased as measured overhead, and what comes with it for steps.
    fn covered_and_lacking(&self, pending: &PendingRequest) -> (ByteCount, ByteCount) {
        match pending.kind {
            LeaseKind::Overhead if pending.request != OVERHEAD_REQUEST => {
                (self.book.corrected(pending.model), ByteCount::ZERO)
            }
            LeaseKind::Weights => (ByteCount::ZERO, self.overhead_lacking(pending.model.0 as usize)),
            LeaseKind::Overhead | LeaseKind::Kv => (ByteCount::ZERO, ByteCount::ZERO),
        }
    }

    /// What its worker is granted where the policy granted `bytes` of [what was to be met](Self::requests_to_meet).
    pub(super) fn of_what_was_met(&self, pending: &PendingRequest, bytes: ByteCount) -> ByteCount {
        let (covered, lacking) = self.covered_and_lacking(pending);
        (bytes + covered).saturating_sub(lacking).min(pending.bytes).max(pending.bytes_min)
    }

    /// Nothing is asked for in its name any more.
    pub(super) fn forget_overhead_request(&mut self, place: usize) {
        let id = self.models[place].id;
        self.asked.retain(|asked| asked.pending.model != id || asked.pending.request != OVERHEAD_REQUEST);
    }
}

impl Record {
    /// What it has beside weights and KV by now, by its own word or the driver's.
    fn overhead_now(&self) -> ByteCount {
        self.overhead_said.now().max(self.overhead_seen.now())
    }

    /// The driver shows `seen` of its process, which may be less beside weights and KV than it was. That is believed only when
    /// it stays, as drift is: a reading and the worker's word are not of one moment.
    pub(super) fn see_less_overhead(&mut self, seen: ByteCount, now_ms: u64) {
        let usage = &self.usage;
        let mapped: ByteCount = [usage.weights_device, usage.kv_device, usage.pooled].into_iter().sum();
        self.beside.note(seen.saturating_sub(mapped));
        if let Some(beside) = self.beside.at_most()
            && beside < self.overhead_seen.now()
        {
            self.overhead_seen.note(beside, now_ms);
        }
    }
}
