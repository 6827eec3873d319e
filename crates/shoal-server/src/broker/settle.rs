//! What follows from a change: the policy is asked, its plan carried out and written down.

use std::collections::BTreeSet;

use serde::Serialize;
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::ids::ModelId;
use shoal_core::policy::{Action, ModelState, Plan, ShelfState};
use shoal_core::protocol::LeaseKind;

use super::lifecycle::{Life, Transition};
use super::orders::Reclaim;
use super::pulse::is_watched;
use super::{Core, Record, millis};
use crate::config::SleepDepth;
use crate::state::EventKind;

/// How long a model that has its lease is protected while its bytes are copied, where no order says it.
const RISING_MS_MAX: u64 = 30_000;
/// Version of a line of the decision log. 1 had neither this number nor a policy's name, and fewer figures in its state,
/// which are read as none.
const DECISION_VERSION: u32 = 2;
/// Plans made after one change. Carrying a plan out changes little that calls for another one.
const PLANS_PER_CHANGE_MAX: usize = 4;

/// A line of the decision log, which is made of it where it is written.
#[derive(Debug, Serialize)]
pub(crate) struct Decision {
    #[serde(rename = "decision")]
    number: u64,
    version: u32,
    policy: String,
    at_ms: u64,
    now_ms: u64,
    state: ShelfState,
    plan: Plan,
}

impl Core {
    /// Time went by.
    pub(crate) fn handle_timer(&mut self, now_ms: u64) {
        self.expire_orders(now_ms);
        self.expire_lives(now_ms);
        self.take_pulses(now_ms);
        self.lower_overheads(now_ms);
        self.settle(now_ms);
    }

    /// Brings everything in line after a change.
    pub(super) fn settle(&mut self, now_ms: u64) {
        let mut again_at = None;
        let mut touched = BTreeSet::new();
        for _ in 0..PLANS_PER_CHANGE_MAX {
            let marked = self.take_marked();
            for place in &marked {
                self.refresh(*place, now_ms);
            }
            touched.extend(marked);
            if !self.needs_plan() {
                again_at = None;
                break;
            }
            let state = self.policy_state(now_ms);
            let (plan, policy) = match self.decide(&state, now_ms) {
                Ok(decided) => decided,
                Err(until_ms) => {
                    again_at = Some(until_ms);
                    break;
                }
            };
            self.watch(&state, &plan, now_ms);
            again_at = plan.again_at_ms;
            if !self.carry_out(state, plan, policy, now_ms) {
                break;
            }
        }
        self.end_retiring(now_ms);
        self.start_next(now_ms);
        touched.extend(self.models.marked());
        for place in touched {
            self.show_status(place, now_ms);
        }
        self.book.check_invariants();
        let fresh = self.models.lively().filter_map(|model| model.fresh_kv.until_ms(now_ms)).min();
        let retry = self.models.lively().filter(|model| !model.queue.is_empty());
        let retry = retry.map(|model| model.wake_not_before_ms).filter(|at| *at > now_ms).min();
        let waits = (!self.asked.is_empty()).then_some(fresh).flatten();
        let timer = [
            again_at,
            waits,
            retry,
            self.next_order_deadline(),
            self.next_life_deadline(now_ms),
            self.next_retiring(),
            self.next_pulse(),
            self.next_overhead_fall(),
            self.next_long_end(now_ms),
        ];
        // A moment later than planned: a timer that rings early would find nothing due.
        let timer = timer.into_iter().flatten().min().map(|at| at.max(now_ms + 1));
        if timer != self.timer_ms {
            self.timer_ms = timer;
            self.timer_moved.notify_one();
        }
        #[cfg(test)]
        self.check_unmarked(now_ms);
    }

    /// Those that something has happened to since they were last looked at: to their records, leases or requests.
    fn take_marked(&mut self) -> BTreeSet<usize> {
        let asking: Vec<ModelId> = self.asked.iter().map(|asked| asked.pending.model).collect();
        let asked_then = std::mem::replace(&mut self.asked_then, asking.clone());
        for id in self.book.take_changed().into_iter().chain(asking).chain(asked_then) {
            self.models.mark(id.0 as usize);
        }
        self.models.take_marked()
    }

    /// Nothing can come of it, or be asked of it, until something happens to it.
    fn rests(&self, place: usize, now_ms: u64) -> bool {
        let model = &self.models[place];
        !self.may_matter(place)
            && matches!(model.life(), Life::Ready | Life::Failed { .. } | Life::Stopped)
            && model.config.keep_alive_s.is_none()
            && model.fresh_kv.until_ms(now_ms).is_none()
            && model.retiring.is_none()
            && !model.is_unaccounted
            && !is_watched(model)
    }

    /// Whoever was not looked at rests or is known not to, and another look would change nothing.
    #[cfg(test)]
    fn check_unmarked(&mut self, now_ms: u64) {
        let marked: BTreeSet<usize> = self.models.marked().clone();
        let lively: BTreeSet<usize> = self.models.lively_places().collect();
        let changed = self.book.take_changed();
        for id in &changed {
            self.models.mark(id.0 as usize);
        }
        for place in (0..self.models.len()).filter(|place| !marked.contains(place)) {
            let name = self.models[place].name.clone();
            assert!(lively.contains(&place) || self.rests(place, now_ms), "{name} does not rest");
            if changed.contains(&self.models[place].id) || self.asks(self.models[place].id) {
                continue;
            }
            let facts = |core: &Self| {
                let model = &core.models[place];
                let turn = (model.turn_since_ms, model.turn_had_kv, model.could_run, model.ran_until_ms);
                let wants = (model.wanting_since_ms, model.wanted_before_ms, model.rising_until_ms);
                (turn, wants, model.queue.len(), model.queue.active())
            };
            let before = facts(self);
            self.refresh(place, now_ms);
            assert_eq!(facts(self), before, "{name} was to be looked at");
        }
    }

    fn needs_plan(&self) -> bool {
        // What unaccounted workers hold cannot be granted to others (I1).
        !self.stopping
            && !self.is_settling()
            && (!self.asked.is_empty()
                || !self.book.owed().is_zero()
                || self.are_any_together()
                || self.models.lively().any(|model| {
                    (!model.queue.is_empty() && !model.is_up())
                        || model.config.keep_alive_s.is_some()
                        || model.habits.preload
                }))
    }

    /// Two that are configured apart have memory beside each other.
    fn are_any_together(&self) -> bool {
        let stands =
            |model: &Record| self.book.total(model.id) > self.book.held(model.id, LeaseKind::Overhead);
        let is_there =
            |name: &String| self.by_name.get(name).is_some_and(|place| stands(&self.models[*place]));
        self.config.sharing.evicts
            && self.models.lively().any(|model| model.config.apart.iter().any(is_there) && stands(model))
    }

    /// Derives what follows for one model: whether it is up, wants to be, and since when.
    fn refresh(&mut self, place: usize, now_ms: u64) {
        let asks = self.asks(self.models[place].id);
        let held = self.book.held(self.models[place].id, LeaseKind::Weights);
        let kv_held = self.book.held(self.models[place].id, LeaseKind::Kv);
        let model = self.models.quietly(place);
        let whole = held >= model.weights_total && !held.is_zero();
        let has_kv = kv_held >= model.kv_min();
        if !whole {
            model.turn_since_ms = None;
        } else if model.cycle.loaded() && model.is_busy() {
            // Waiting for the first KV is no part of a turn; one that runs and never asks for any has its turn too.
            match model.turn_since_ms {
                None if has_kv || !asks => (model.turn_since_ms, model.turn_had_kv) = (Some(now_ms), has_kv),
                Some(_) if !model.turn_had_kv && has_kv => {
                    (model.turn_since_ms, model.turn_had_kv) = (Some(now_ms), true);
                }
                Some(_) if !model.turn_had_kv && asks => model.turn_since_ms = None,
                _ => {}
            }
        }
        let can_run = whole && (has_kv || model.turn_since_ms.is_some());
        let wants = model.is_ready() && !can_run && (asks || model.is_busy());
        if std::mem::replace(&mut model.could_run, can_run) && !can_run {
            model.ran_until_ms = now_ms;
        }
        if wants {
            // After a turn without KV, which was none, it is as old as before: else whoever began to want after it would
            // take what it was just given.
            let before = model.wanted_before_ms.take().filter(|_| whole);
            if model.wanting_since_ms.is_none() {
                // Requests that waited in line while it ran do not make it older than those that could not run at all.
                let oldest = model.queue.oldest().map(|parked| parked.since_ms.max(model.ran_until_ms));
                model.wanting_since_ms = before.or(oldest).or(Some(now_ms));
            }
        } else {
            let is_open = model.turn_since_ms.is_some() && !model.turn_had_kv && model.is_busy();
            let since = model.wanting_since_ms.take().or(model.wanted_before_ms);
            model.wanted_before_ms = since.filter(|_| is_open);
        }
        if !whole || model.cycle.loaded() || !model.is_ready() {
            model.rising_until_ms = None;
        } else if model.rising_until_ms.is_none() {
            let order = model.orders.values().find(|order| order.is_wake()).map(|order| order.deadline_ms);
            // A program that is starting has not run yet, however long it takes: to end it would be for nothing.
            let starts = model.config.command.as_ref().map_or(0, |command| millis(command.ready_max));
            let latest = now_ms + starts.max(RISING_MS_MAX);
            model.rising_until_ms = Some(order.unwrap_or(latest).min(latest));
        }
        self.unpark(place, now_ms);
        let rests = self.rests(place, now_ms);
        self.models.set_active(place, !rests);
    }

    /// Whether a model can make a difference at all; cheap, and true rather than false.
    fn may_matter(&self, place: usize) -> bool {
        let model = &self.models[place];
        let rests = self.book.total(model.id).is_zero()
            && !model.is_busy()
            && !model.is_up()
            && !model.habits.preload
            && model.orders.is_empty()
            && model.skip_until_ms == 0
            && model.wake_not_before_ms == 0;
        !rests || self.asks(model.id)
    }

    fn asks(&self, id: ModelId) -> bool {
        self.asked.iter().any(|asked| asked.pending.model == id)
    }

    fn policy_state(&self, now_ms: u64) -> ShelfState {
        // What the dead held is leased to nobody who could be asked, and will come back; what has not for long is others'.
        let (returning, stuck) = self.departed_bytes();
        ShelfState {
            budget: self.book.leasable().saturating_sub(stuck),
            taken: self.book.charged() + stuck,
            returning,
            falling: self.overhead_falling(),
            extent: PAGE_BYTES,
            quantum_ms: self.timing.quantum_ms,
            is_manual: !self.config.sharing.evicts,
            // Those that sleep and that nobody wants are left out: nobody would miss them.
            models: self
                .models
                .lively_places()
                .filter(|place| self.may_matter(*place))
                .map(|place| self.policy_model(place, now_ms))
                .filter(|model| model.matters(now_ms) || self.asks(model.id))
                .collect(),
            requests: self.requests_to_meet(),
        }
    }

    pub(super) fn policy_model(&self, place: usize, now_ms: u64) -> ModelState {
        let model = &self.models[place];
        let held = |kind| self.book.held(model.id, kind);
        let narrow = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        let inside = u64::from(model.usage.requests_running) + u64::from(model.usage.requests_waiting);
        let (ready, ordered) = self.serving_and_leaving(place, held(LeaseKind::Weights), now_ms);
        ModelState {
            id: model.id,
            name: model.name.clone(),
            ready,
            weights_total: model.weights_total,
            weights_held: held(LeaseKind::Weights),
            kv_held: held(LeaseKind::Kv),
            kv_live: (model.usage.kv_live + model.fresh_kv.bytes(now_ms)).min(held(LeaseKind::Kv)),
            kv_cached: model.usage.kv_cached.min(held(LeaseKind::Kv)),
            kv_min: model.kv_min(),
            overhead_held: held(LeaseKind::Overhead),
            overhead_lacking: self.overhead_lacking(place),
            overhead_leaves: self.overhead_leaves(place, now_ms),
            ordered,
            ordered_cached_last: model.ordered_cached_last(),
            pinned: model.pinned,
            is_rigid: model.is_rigid(),
            keeps_weights: model.config.sleep == SleepDepth::None,
            min: model.config.min.unwrap_or(ByteCount::ZERO),
            max: model.config.max,
            priority: model.config.priority,
            active: narrow(model.queue.active().max(inside)),
            parked: narrow(model.queue.len() as u64),
            last_used_ms: model.last_used_ms.unwrap_or(0),
            turn_since_ms: model.turn_since_ms,
            wanting_since_ms: model.wanting_since_ms,
            rising_until_ms: model.rising_until_ms,
            pause_ms: model.pause_ms,
            up: model.is_up(),
            wake_ordered: model.will_wake(now_ms),
            keep_alive_ms: model.config.keep_alive_s.map(|seconds| seconds.saturating_mul(1_000)),
            skip_until_ms: model.skip_until_ms,
            restore_us_per_mib: self.restore_cost(place),
            kv_back_us_per_mib: model.usage.kv_back_us_per_mib,
            kv_found_milli: model.usage.kv_found_milli,
            uses_milli: model.habits.uses.uses_milli,
            uses_window_ms: model.habits.uses.window_ms,
            expected_ms: self.expected_ms(place, now_ms),
            restored_ms: model.habits.restored_ms,
            apart: model
                .config
                .apart
                .iter()
                .filter_map(|name| self.by_name.get(name))
                .map(|place| self.models[*place].id)
                .collect(),
            preload: model.habits.preload,
        }
    }

    /// Does what the plan says. True where that may call for another plan.
    fn carry_out(&mut self, state: ShelfState, plan: Plan, policy: String, now_ms: u64) -> bool {
        let acts = plan.actions.iter().any(|action| !matches!(action, Action::Wait { .. }));
        if acts {
            self.decisions += 1;
        }
        let decision = if acts { self.decisions } else { 0 };
        let mut changed = false;
        for action in plan.actions.iter().cloned() {
            match action {
                Action::Evict { model, bytes, reason, requester, cached_last } => {
                    let requester = requester.map(|model| model.0 as usize);
                    let wanted = Reclaim { bytes, cached_last, requester, decision: Some(decision) };
                    self.order_reclaim(model.0 as usize, wanted, reason, None, now_ms);
                    // What left for the sake of others comes back like what left for a model.
                    let is_over = state.models.iter().any(|known| {
                        let kept = known.keep_alive_ms.map(|kept| known.last_used_ms.saturating_add(kept));
                        known.id == model && kept.is_some_and(|until| until <= now_ms)
                    });
                    if requester.is_none() && !state.taken.is_zero() && !is_over {
                        self.note_sent_away(model.0 as usize, true);
                    }
                    changed = true;
                }
                Action::Restore { model, bytes, reason } => {
                    self.order_wake(model.0 as usize, bytes, reason, now_ms);
                    changed = true;
                }
                Action::Grant { model, request, bytes, reason } => {
                    self.grant(model.0 as usize, request, bytes, reason, Some(decision), now_ms);
                    changed = true;
                }
                Action::Deny { model, request, never, reason } => {
                    self.deny(model.0 as usize, request, never, reason, decision, now_ms);
                    changed = true;
                }
                Action::Wait { model, request, reason, .. } => {
                    let asked = self
                        .asked
                        .iter_mut()
                        .find(|asked| asked.pending.model == model && asked.pending.request == request);
                    if let Some(asked) = asked {
                        asked.waits_for = reason;
                    }
                }
            }
        }
        if acts {
            // Whoever waits for it has its answer by now.
            self.write_down(decision, state, plan, policy, now_ms);
        }
        changed
    }

    /// Has a decision written down with the state it was made from (I11).
    fn write_down(&self, number: u64, state: ShelfState, plan: Plan, policy: String, now_ms: u64) {
        let Some(log) = &self.decision_log else { return };
        let (version, at_ms) = (DECISION_VERSION, self.unix_ms(now_ms));
        if log.try_send(Decision { number, version, policy, at_ms, now_ms, state, plan }).is_err() {
            tracing::warn!(decision = number, "the decision log does not keep up; a decision is not in it");
        }
    }

    fn show_status(&mut self, place: usize, now_ms: u64) {
        let bytes = self.book.held(self.models[place].id, LeaseKind::Weights);
        let facts = self.models[place].facts(bytes, self.stopping);
        if let Some(Transition { from, to, after_ms, reason }) =
            self.models.quietly(place).cycle.observe(&facts, now_ms)
        {
            self.tell(now_ms, Some(place), EventKind::StatusChanged { from, to, after_ms, bytes, reason });
        }
    }
}
