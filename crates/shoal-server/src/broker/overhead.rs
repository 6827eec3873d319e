//! What a process takes beside weights and KV: its lease follows what is measured of it, up at once and down late.
//!
//! A worker declares what it will take (a lease that it asks for and gives back itself), and what is measured beyond that is
//! a *correction*, the server's own entry in the book. Measured is what the worker says that it has now, and what the driver
//! shows of its process. The correction is the most of the last [`KEPT_MS`]: memory that a single long prompt took is
//! others' half a minute after its process has given it back, and a figure that goes up and down moves no lease.
//!
//! **What may come back without a question.** An engine whose steps take memory that they did not ask for
//! (`overhead_peak`: vLLM, which profiles that once and then relies on it, and any program that is run by a command) keeps it
//! while any of its weights are on the device. Without them no step runs. Before it gets weights again, that memory is asked
//! for in its name, in the queue like anybody's; if the weights are not wanted any more before they are there, neither is
//! what was foreseen for them.

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::policy::PendingRequest;
use shoal_core::protocol::LeaseKind;

use super::{Asked, Core, FORESEEN_REQUEST, OVERHEAD_REQUEST, Record};
use crate::state::EventKind;

/// How long what was measured counts after it was last so.
pub(super) const KEPT_MS: u64 = 30_000;
/// A correction is lowered by no less than this part of what is due: less is worth nobody's while.
const SLACK_PART: u64 = 16;
/// How long measured overhead may stay uncovered before it is asked for anew.
const WAIT_MS: u64 = 60_000;

impl Core {
    /// What the lease for overhead of the model at `place` is to be: no less than what was measured lately.
    pub(super) fn overhead_due(&mut self, place: usize, now_ms: u64) -> ByteCount {
        let kept = self.peak_kept(place);
        let model = self.models.quietly(place);
        let seen = model.overhead_seen.most(now_ms, KEPT_MS);
        model.overhead_said.most(now_ms, KEPT_MS).max(seen).max(kept)
    }

    /// What its steps may take without a question. They may run while it has weights; before, it is what was granted for them.
    fn peak_kept(&self, place: usize) -> ByteCount {
        let model = &self.models[place];
        if self.book.held(model.id, LeaseKind::Weights).is_zero() {
            model.overhead_foreseen.min(model.usage.overhead_peak)
        } else {
            model.usage.overhead_peak
        }
    }

    fn wants_weights(&self, place: usize) -> bool {
        let model = &self.models[place];
        let asks =
            |asked: &Asked| (asked.pending.model, asked.pending.kind) == (model.id, LeaseKind::Weights);
        model.wake_ordered() || self.asked.iter().any(asks)
    }

    /// Since when it asks for weights.
    pub(super) fn weights_asked_ms(&self, place: usize) -> Option<u64> {
        let id = self.models[place].id;
        let is_it = |asked: &&Asked| (asked.pending.model, asked.pending.kind) == (id, LeaseKind::Weights);
        self.asked.iter().filter(is_it).map(|asked| asked.pending.asked_ms).min()
    }

    /// Gives up what was foreseen of a model that has its weights by now, or will not have them.
    pub(super) fn drop_foresight(&mut self, place: usize, now_ms: u64) {
        if self.wants_weights(place) {
            return;
        }
        let id = self.models[place].id;
        let is_it = |asked: &Asked| (asked.pending.model, asked.pending.request) == (id, FORESEEN_REQUEST);
        self.asked.retain(|asked| !is_it(asked));
        let model = self.models.quietly(place);
        if !std::mem::take(&mut model.overhead_foreseen).is_zero() {
            self.follow_overhead(place, now_ms);
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
        if (due > held || lower >= slack)
            && let Ok(uncovered) = self.book.measure_overhead(id, due)
        {
            self.cover_overhead(place, uncovered, now_ms);
        }
        self.note_fall(place);
    }

    /// When the correction of the model at `place` may fall by time alone.
    fn note_fall(&mut self, place: usize) {
        let model = &self.models[place];
        let falls = [&model.overhead_said, &model.overhead_seen].map(|recent| recent.falls_at_ms(KEPT_MS));
        match falls.into_iter().flatten().min() {
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
            let now = model.overhead_said.now().max(model.overhead_seen.now()).max(kept);
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
        let reason = "its process was measured to take more than it declared";
        self.ask_for_overhead(place, OVERHEAD_REQUEST, (uncovered, ByteCount(1)), reason, now_ms);
    }

    /// Who asks for weights, since `asked_ms`, will take as much again as its steps took at most: that is asked for in its
    /// name, and before.
    pub(super) fn foresee_overhead(&mut self, place: usize, asked_ms: u64) {
        let model = &self.models[place];
        let held = self.book.held(model.id, LeaseKind::Overhead);
        let (peak, has_weights) =
            (model.usage.overhead_peak, !self.book.held(model.id, LeaseKind::Weights).is_zero());
        if peak.is_zero() || has_weights || self.is_settling() {
            return;
        }
        let lacking = peak.saturating_sub(held);
        if lacking.is_zero() {
            // It has not fallen yet, and is not to.
            self.models.quietly(place).overhead_foreseen = peak;
        }
        let reason = "its steps will take as much again as they did before it slept";
        // Older than the request that is to wait for it.
        self.ask_for_overhead(
            place,
            FORESEEN_REQUEST,
            (lacking, lacking),
            reason,
            asked_ms.saturating_sub(1),
        );
    }

    fn ask_for_overhead(
        &mut self,
        place: usize,
        request: u64,
        (bytes, bytes_min): (ByteCount, ByteCount),
        reason: &str,
        asked_ms: u64,
    ) {
        let id = self.models[place].id;
        let is_it = |asked: &Asked| (asked.pending.model, asked.pending.request) == (id, request);
        if bytes.is_zero() {
            self.asked.retain(|asked| !is_it(asked));
            return;
        }
        if let Some(open) = self.asked.iter_mut().find(|asked| is_it(asked)) {
            // It has waited for as long as it has.
            (open.pending.bytes, open.pending.bytes_min) = (bytes, bytes_min);
            return;
        }
        self.asked.push(Asked {
            pending: PendingRequest {
                model: id,
                request,
                kind: LeaseKind::Overhead,
                bytes,
                bytes_min,
                asked_ms,
                deadline_ms: asked_ms + WAIT_MS,
            },
            reason: reason.to_owned(),
            waits_for: String::new(),
        });
    }

    /// What the policy is to see of the requests. Of overhead that a worker asks for, what was measured of it is leased
    /// already: nobody has to give anything up for that once more.
    pub(super) fn requests_to_meet(&self) -> Vec<PendingRequest> {
        let mut requests: Vec<PendingRequest> =
            self.asked.iter().map(|asked| asked.pending.clone()).collect();
        for pending in &mut requests {
            let covered = self.covered_already(pending);
            pending.bytes = pending.bytes.saturating_sub(covered).max(ByteCount(1));
            pending.bytes_min = pending.bytes_min.saturating_sub(covered).max(ByteCount(1));
        }
        requests
    }

    /// How much of a request is leased as measured overhead.
    fn covered_already(&self, pending: &PendingRequest) -> ByteCount {
        if pending.kind == LeaseKind::Overhead && pending.request < FORESEEN_REQUEST {
            self.book.corrected(pending.model)
        } else {
            ByteCount::ZERO
        }
    }

    /// What its worker is granted where the policy granted `bytes` of [what was to be met](Self::requests_to_meet).
    pub(super) fn with_covered(&self, pending: &PendingRequest, bytes: ByteCount) -> ByteCount {
        match self.covered_already(pending) {
            ByteCount::ZERO => bytes,
            covered => (bytes + covered).min(pending.bytes).max(pending.bytes_min),
        }
    }

    /// Nothing is asked for in its name any more.
    pub(super) fn forget_overhead_request(&mut self, place: usize) {
        let id = self.models[place].id;
        self.asked.retain(|asked| asked.pending.model != id || asked.pending.request < FORESEEN_REQUEST);
    }
}

impl Record {
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
