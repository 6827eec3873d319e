//! How long a request for bytes may wait, as the policy documents it.

use shoal_core::ids::ModelId;
use shoal_core::policy::{PRIORITY_HEAD_START_MS, PRIORITY_STEPS_MAX, PendingRequest, ShelfState, turn_ms};

use super::{ANSWER_MS_MAX, Asked, Sim, restore_ms};

impl Sim<'_> {
    /// The bound that the policy states: a turn for each request before this one and each model that was resident when
    /// it was asked, and one more.
    pub(super) fn check_wait(&mut self, asked: &Asked) -> Result<(), String> {
        let largest = self.workers.iter().map(|worker| worker.state.weights_total).max();
        let state = self.shelf();
        let turn = state.models.iter().map(|model| turn_ms(&state, model)).max().unwrap_or_default();
        let turn_ms = turn + restore_ms(largest.unwrap_or_default()) + ANSWER_MS_MAX;
        let before = asked.older.len() as u64;
        let bound_ms = (before + asked.resident + 1) * turn_ms;
        let waited_ms = self.now_ms.saturating_sub(asked.since_ms);
        self.seen.worst_permille = self.seen.worst_permille.max(waited_ms * 1_000 / bound_ms);
        if waited_ms > bound_ms {
            return Err(format!(
                "{} waited {waited_ms} ms for {} ({:?}) behind {before} requests, the bound is {bound_ms} ms",
                asked.pending.model, asked.pending.bytes, asked.pending.kind
            ));
        }
        Ok(())
    }
}

/// As the policy documents it; less is older.
pub(super) fn age(state: &ShelfState, request: &PendingRequest) -> (i64, ModelId, u64, u64) {
    let model = &state.models[request.model.0 as usize];
    let since = if model.can_run() { None } else { model.wanting_since_ms };
    let since = since.unwrap_or(request.asked_ms).min(request.asked_ms);
    let steps = i64::from(model.priority.clamp(-PRIORITY_STEPS_MAX, PRIORITY_STEPS_MAX));
    let age = i64::try_from(since).unwrap_or(i64::MAX) - steps * PRIORITY_HEAD_START_MS;
    (age, request.model, request.asked_ms, request.request)
}
