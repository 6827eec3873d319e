//! The decision itself.

use std::collections::BTreeMap;

use super::reason;
use super::state::{Action, ModelState, PendingRequest, Plan, ShelfState};
use super::victims::{Candidate, Choice, Class, Field, Part, in_use, kept, kept_until, owed};
use crate::bytes::ByteCount;
use crate::ids::ModelId;
use crate::protocol::LeaseKind;

/// Decides what to do at `now_ms`. See the [module](super) for the rules.
#[must_use]
pub fn plan(state: &ShelfState, now_ms: u64) -> Plan {
    plan_by(state, now_ms, Choice::Worth)
}

/// [`plan`] with victims chosen in another way.
pub(super) fn plan_by(state: &ShelfState, now_ms: u64, choice: Choice) -> Plan {
    let mut decision = Decision {
        field: Field::new(state, now_ms, choice),
        plan: Plan::default(),
        spare: None,
        in_line: Vec::new(),
        granted: BTreeMap::new(),
        granted_weights: BTreeMap::new(),
    };
    decision.make_room();
    let mut requests: Vec<_> = state.requests.iter().collect();
    requests.sort_by_cached_key(|request| decision.field.seniority(request));
    for request in requests {
        decision.answer(request);
    }
    decision.part_those_together();
    decision.put_idle_to_sleep();
    decision.wake_the_wanted();
    decision.preload();
    decision.plan
}

struct Decision<'a> {
    field: Field<'a>,
    plan: Plan,
    /// What younger requests may have, once an older one had to be let wait.
    spare: Option<ByteCount>,
    /// Whose requests wait until they can be met.
    in_line: Vec<ModelId>,
    /// What this plan granted already.
    granted: BTreeMap<ModelId, ByteCount>,
    /// And of that for weights.
    granted_weights: BTreeMap<ModelId, ByteCount>,
}

impl<'a> Decision<'a> {
    fn answer(&mut self, request: &PendingRequest) {
        let Some(model) = self.field.model(request.model) else {
            return self.deny(request, true, format!("there is no {}", request.model));
        };
        // Whoever has no patience (left) may have what is free, and disturbs nobody.
        let is_late = request.deadline_ms <= self.field.now_ms;
        let granted = self.granted.get(&model.id).copied().unwrap_or_default();
        let granted_weights = self.granted_weights.get(&model.id).copied().unwrap_or_default();
        // What else it was granted just now, and beside KV the weights that it lacks, whether they were granted or not.
        let granted_besides = granted.saturating_sub(granted_weights);
        let beside = granted_besides + granted_weights.max(owed(model, request));
        let room = model.max.map_or(request.bytes, |max| max.saturating_sub(model.held() + beside));
        if request.bytes_min > room {
            return self.over_max(model, request, request.bytes_min - room);
        }
        let most = self.field.most(request).saturating_sub(if request.kind == LeaseKind::Kv {
            granted_besides
        } else {
            ByteCount::ZERO
        });
        // Others may leave the device again, overhead may fall, and what the model's own requests use comes back as they end,
        // or as its engine puts one of them off. KV is asked for anew before long by one that serves; one that still starts
        // would start anew.
        let patience = if request.kind == LeaseKind::Kv && model.ready {
            ByteCount::ZERO
        } else {
            self.field.state.taken + self.field.state.falling + in_use(model, request)
        };
        if request.bytes_min > most + patience {
            return self.deny(request, true, reason::never(&self.field, model, request, most));
        }
        if request.bytes_min > most {
            // Nobody else is held up for it.
            let reason = reason::never(&self.field, model, request, most);
            return if is_late { self.deny(request, false, reason) } else { self.wait(request, reason) };
        }
        // What a process takes beside weights and KV it takes wherever its model is.
        let stands_apart = request.kind != LeaseKind::Overhead;
        if let Some(rival) = self.lasting_rival(model).filter(|_| stands_apart) {
            return self.deny(request, true, reason::apart_for_ever(model, rival));
        }
        let wanted = request.bytes.min(room).min(most).max(request.bytes_min);
        let allowed = match self.spare {
            Some(spare) if !self.field.in_turn(model) => spare,
            _ => ByteCount(u64::MAX),
        };
        let elder = self.elder_rival(model).filter(|_| stands_apart);
        let is_to_be_had =
            request.bytes_min <= allowed.min(self.field.free) && !self.has_rivals(model) && elder.is_none();
        if is_late && !is_to_be_had {
            return self.deny(request, false, reason::too_late(&self.field, model, request));
        }
        if let Some(elder) = elder {
            return self.wait_in_line(request, reason::behind_rival(model, elder));
        }
        if request.bytes_min > allowed {
            return self.wait_in_line(request, reason::behind(model, request, allowed));
        }
        let wanted = wanted.min(allowed);

        let rivals = if stands_apart { self.part_from_rivals(model, request) } else { None };
        if let Some(reason) = rivals {
            // What it will need is left to it by younger ones; whoever is in its turn may still grow.
            let left = self.field.eventual(request).saturating_sub(request.bytes_min);
            self.spare = Some(self.spare.map_or(left, |spare| spare.min(left)));
            return self.wait_in_line(request, reason);
        }
        if self.asks_for_what_leaves(request) {
            let left = self.field.eventual(request).saturating_sub(request.bytes_min);
            self.spare = Some(self.spare.map_or(left, |spare| spare.min(left)));
            return self.wait_in_line(request, reason::leaving(model, request));
        }
        let free = self.field.free;
        if free >= request.bytes_min {
            let bytes = wanted.min(free);
            let reason = reason::grant(model, request, bytes, free);
            self.field.free -= bytes;
            self.spend(bytes);
            self.field.meet(request);
            *self.granted.entry(model.id).or_default() += bytes;
            if request.kind == LeaseKind::Weights {
                *self.granted_weights.entry(model.id).or_default() += bytes;
            }
            self.act(Action::Grant { model: request.model, request: request.request, bytes, reason });
            return;
        }

        let (found, picks) = self.gather(request, wanted);
        if found < request.bytes_min {
            let reason = reason::wait(&self.field, model, request, found);
            let left = self.field.eventual(request).saturating_sub(request.bytes_min);
            self.spare = Some(self.spare.map_or(left, |spare| spare.min(left)));
            return self.wait_in_line(request, reason);
        }
        let target = found.min(wanted);
        for (candidate, bytes) in picks {
            let victim = &self.field.state.models[candidate.model];
            let reason = reason::evict(&self.field, candidate, victim, model, request, free);
            self.evict(candidate.model, Some(model.id), bytes, reason);
        }
        // What is free and on its way now belongs to this request.
        let rest = target.saturating_sub(free);
        self.field.free = ByteCount::ZERO;
        self.field.incoming = self.field.incoming.saturating_sub(rest);
        self.spend(target);
        self.field.meet(request);
        let reason = reason::coming(&self.field, model, rest);
        self.wait_in_line(request, reason);
    }

    /// Answers a request for `short` bytes more than the model's `max` leaves. Its own KV may be what is in the way: what
    /// nobody uses of it goes, what its requests use comes back as they end or are put off.
    fn over_max(&mut self, model: &ModelState, request: &PendingRequest, short: ByteCount) {
        let reason = reason::over_max(model, request);
        let own = if request.kind == LeaseKind::Kv || !model.ready { ByteCount::ZERO } else { model.kv_held };
        if short > own {
            return self.deny(request, true, reason);
        }
        let Some(place) = self.field.place(model.id) else { return self.deny(request, true, reason) };
        if request.deadline_ms <= self.field.now_ms {
            return self.deny(request, false, reason);
        }
        let extent = self.field.state.extent.max(ByteCount(1));
        let missing = short.saturating_sub(self.field.ordered_at(place)).round_up_to(extent);
        let bytes = missing.min(self.field.spare_at(place));
        if !bytes.is_zero() {
            self.evict(place, Some(model.id), bytes, reason::own_kv(model));
        }
        self.wait(request, reason);
    }

    /// Has that come back which is leased and which others have taken of the device, in the same order as for anybody.
    fn make_room(&mut self) {
        let extent = self.field.state.extent.max(ByteCount(1));
        let mut missing = self.field.owed;
        let mut picks: Vec<(Candidate, ByteCount)> = Vec::new();
        for &candidate in self.field.candidates() {
            if missing.is_zero() {
                break;
            }
            let taken: ByteCount =
                picks.iter().filter(|(pick, _)| pick.model == candidate.model).map(|(_, bytes)| *bytes).sum();
            let offer = self.field.offer_for_room(candidate).saturating_sub(taken);
            let is_whole = candidate.part == Part::All
                && (self.field.choice == Choice::WholeLru
                    || self.field.state.models[candidate.model].is_rigid);
            let bytes = if is_whole { offer } else { missing.round_up_to(extent).min(offer) };
            if !bytes.is_zero() {
                let leaves = self.field.leaves_with(candidate.model, taken + bytes);
                missing = missing.saturating_sub(bytes + leaves);
                picks.push((candidate, bytes));
            }
        }
        for (candidate, bytes) in one_order_each(picks) {
            let victim = &self.field.state.models[candidate.model];
            let reason = reason::make_room(&self.field, candidate, victim);
            self.evict(candidate.model, None, bytes, reason);
        }
    }

    /// Weights or KV for a model that still gives weights up, in this plan or since one before: what it asks for does not
    /// make it whole any more, and would be one more part that nobody can use. It asks for all that it lacks once they are
    /// gone. For KV it would else take from who comes next what that has been left.
    fn asks_for_what_leaves(&self, request: &PendingRequest) -> bool {
        let place = self.field.place(request.model);
        request.kind != LeaseKind::Overhead
            && place.is_some_and(|place| !self.field.leaving_at(place).is_zero())
    }

    /// What can be had for `request` now, and of whom.
    fn gather(
        &self,
        request: &PendingRequest,
        wanted: ByteCount,
    ) -> (ByteCount, Vec<(Candidate, ByteCount)>) {
        // Nobody is disturbed for what the model has itself and does not use. Its prefixes are about to be used: they go when
        // it is their turn, where prefixes have one.
        let goes_first = |part| part == Part::Unused || self.field.choice == Choice::WholeLru;
        let own = |candidate: &&Candidate| {
            self.field.state.models[candidate.model].id == request.model && goes_first(candidate.part)
        };
        let candidates = self.field.candidates();
        let in_order: Vec<Candidate> = candidates
            .iter()
            .filter(own)
            .chain(candidates.iter().filter(|other| !own(other)))
            .copied()
            .collect();
        let (found, picks) = self.gather_in(in_order.iter().copied(), request, wanted);
        let stops = |candidate: &Candidate| {
            candidate.class == Class::TurnOver && picks.iter().any(|(pick, _)| pick.model == candidate.model)
        };
        let waits = |candidate: &Candidate| candidate.class == Class::WaitsBehind;
        if self.field.choice != Choice::Worth
            || !picks.iter().any(|(pick, _)| stops(pick))
            || !picks.iter().any(|(pick, _)| waits(pick))
        {
            return (found, one_order_each(picks));
        }
        // Whoever has to stop anyway comes back after all who wait, so what those hold is used sooner.
        let before = in_order.iter().filter(|other| other.class < Class::WaitsBehind);
        let after =
            in_order.iter().filter(|other| stops(other)).chain(in_order.iter().filter(|one| waits(one)));
        let (found, picks) = self.gather_in(before.chain(after).copied(), request, request.bytes_min);
        (found, one_order_each(picks))
    }

    /// [`gather`](Self::gather), from these candidates in this order.
    fn gather_in(
        &self,
        candidates: impl Iterator<Item = Candidate>,
        request: &PendingRequest,
        wanted: ByteCount,
    ) -> (ByteCount, Vec<(Candidate, ByteCount)>) {
        let age = self.field.seniority(request);
        let mut found = self.field.free + self.field.incoming_for(request);
        let mut picks: Vec<(Candidate, ByteCount)> = Vec::new();
        for candidate in candidates {
            // Running models are disturbed only for the least that is of use.
            let goal = if candidate.class == Class::TurnOver { request.bytes_min } else { wanted };
            if found >= goal {
                if found >= wanted || candidate.class == Class::TurnOver {
                    break;
                }
                continue;
            }
            let taken: ByteCount =
                picks.iter().filter(|(pick, _)| pick.model == candidate.model).map(|(_, bytes)| *bytes).sum();
            let offer = self.field.offer(candidate, request, age).saturating_sub(taken);
            let part = (goal - found).round_up_to(self.field.state.extent.max(ByteCount(1))).min(offer);
            let is_whole = candidate.part == Part::All
                && (self.field.choice == Choice::WholeLru
                    || self.field.state.models[candidate.model].is_rigid);
            let bytes = if is_whole { offer } else { part };
            if !bytes.is_zero() {
                found += bytes;
                // What its own steps take it will need again.
                if self.field.state.models[candidate.model].id != request.model {
                    found += self.field.leaves_with(candidate.model, taken + bytes);
                }
                picks.push((candidate, bytes));
            }
        }
        (found, picks)
    }

    /// One that `model` may not stand beside, and that cannot be made to leave.
    fn lasting_rival(&self, model: &ModelState) -> Option<&ModelState> {
        let rivals = model.apart.iter().filter_map(|rival| self.field.model(*rival));
        let mut standing = rivals.filter(|rival| rival.ready && !rival.stands().is_zero());
        standing.find(|rival| kept(rival) > rival.overhead_held)
    }

    /// One that asked before `model`, still waits and may not stand beside it. Of two that it may not stand beside, one would
    /// always be there, if they came back in turn while it waits for both to be gone; whoever is in its turn may still grow.
    fn elder_rival(&self, model: &ModelState) -> Option<&ModelState> {
        if self.field.state.is_manual || self.field.in_turn(model) {
            return None;
        }
        let elder = model.apart.iter().find(|rival| self.in_line.contains(rival));
        elder.and_then(|elder| self.field.model(*elder))
    }

    /// Whether anybody has memory that `model` may not stand beside.
    fn has_rivals(&self, model: &ModelState) -> bool {
        let mut rivals = model.apart.iter().filter_map(|rival| self.field.model(*rival));
        rivals.any(|rival| !rival.stands().is_zero() || self.granted.contains_key(&rival.id))
    }

    /// Sends those away that `model` may not stand beside. Why it has to wait for them, where it has to.
    fn part_from_rivals(&mut self, model: &ModelState, request: &PendingRequest) -> Option<String> {
        let age = self.field.seniority(request);
        let mut waits = None;
        for rival in &model.apart {
            let Some(place) = self.field.place(*rival) else { continue };
            let rival = &self.field.state.models[place];
            let granted = self.granted.get(&rival.id).is_some_and(|bytes| !bytes.is_zero());
            if rival.stands().is_zero() && !granted {
                continue;
            }
            waits = Some(reason::apart(model, rival));
            if self.field.state.is_manual || granted {
                continue;
            }
            let Some(candidate) = self.field.whole(place) else { continue };
            let bytes = self.field.offer(candidate, request, age);
            if bytes.is_zero() {
                continue;
            }
            let reason = reason::evict_apart(&self.field, model, rival);
            self.field.incoming += bytes + self.field.leaves_with(place, bytes);
            self.evict(place, Some(model.id), bytes, reason);
        }
        waits
    }

    /// Has one of two leave that stand beside each other and may not, because they were set apart while both were there. It
    /// goes for the other's sake, so it comes back as it would after any request.
    fn part_those_together(&mut self) {
        let state = self.field.state;
        if state.is_manual || !state.models.iter().any(|model| self.rival_beside(model).is_some()) {
            return;
        }
        for candidate in self.field.candidates().to_vec() {
            let model = &state.models[candidate.model];
            let Some(rival) = self.rival_beside(model) else { continue };
            let bytes = self.field.offer_to_part(candidate);
            // With a part of it left nothing would be won.
            if bytes.is_zero() || kept(model) > model.overhead_held {
                continue;
            }
            let reason = reason::evict_apart(&self.field, rival, model);
            self.evict(candidate.model, Some(rival.id), bytes, reason);
        }
        if self.field.next_change_ms < u64::MAX
            && state.models.iter().any(|model| self.rival_beside(model).is_some())
        {
            self.again_at(self.field.next_change_ms);
        }
    }

    /// One that `model` may not stand beside, where both are there and neither is about to have left.
    fn rival_beside(&self, model: &ModelState) -> Option<&'a ModelState> {
        let stays = |model: &ModelState| {
            let place = self.field.place(model.id);
            model.ready && place.is_some_and(|place| self.field.ordered_at(place) < model.stands())
        };
        if model.apart.is_empty() || !stays(model) {
            return None;
        }
        model.apart.iter().filter_map(|rival| self.field.model(*rival)).find(|rival| stays(rival))
    }

    fn spend(&mut self, bytes: ByteCount) {
        self.spare = self.spare.map(|spare| spare.saturating_sub(bytes));
    }

    fn deny(&mut self, request: &PendingRequest, never: bool, reason: String) {
        self.act(Action::Deny { model: request.model, request: request.request, never, reason });
    }

    /// It waits until it can be met, and is met before those that came later.
    fn wait_in_line(&mut self, request: &PendingRequest, reason: String) {
        if request.kind != LeaseKind::Overhead {
            self.in_line.push(request.model);
        }
        self.wait(request, reason);
    }

    fn wait(&mut self, request: &PendingRequest, reason: String) {
        let until_ms = self.field.next_change_ms.min(request.deadline_ms);
        self.again_at(until_ms);
        self.act(Action::Wait { model: request.model, request: request.request, until_ms, reason });
    }

    fn again_at(&mut self, at_ms: u64) {
        self.plan.again_at_ms = Some(self.plan.again_at_ms.map_or(at_ms, |known| known.min(at_ms)));
    }

    /// Has the model at `place` give up `bytes`.
    fn evict(&mut self, place: usize, requester: Option<ModelId>, bytes: ByteCount, reason: String) {
        let model = self.field.state.models[place].id;
        // For its own sake it gives up only what no request uses.
        let cached_last = requester != Some(model) && self.field.cached_last(place);
        self.field.take(place, bytes);
        self.act(Action::Evict { model, requester, bytes, cached_last, reason });
    }

    fn act(&mut self, action: Action) {
        self.plan.actions.push(action);
    }

    fn put_idle_to_sleep(&mut self) {
        let state = self.field.state;
        for (place, model) in state.models.iter().enumerate() {
            let Some(until) = kept_until(model) else { continue };
            // Whoever says how long a model is kept has said that it is to go after that.
            let bytes = if state.is_manual {
                self.field.takeable_by_hand_at(place)
            } else {
                self.field.takeable_at(place)
            };
            if model.is_busy() || model.wake_ordered || self.field.asks(place) || bytes.is_zero() {
                continue;
            }
            let due = until.max(model.skip_until_ms);
            if due > self.field.now_ms {
                self.again_at(due);
                continue;
            }
            let reason = reason::keep_alive_over(model, self.field.now_ms);
            let cached_last = self.field.cached_last(place);
            self.act(Action::Evict { model: model.id, requester: None, bytes, cached_last, reason });
        }
    }

    fn wake_the_wanted(&mut self) {
        let mut wanted: Vec<&ModelState> = self
            .field
            .state
            .models
            .iter()
            .filter(|model| model.ready && model.parked > 0 && !model.up && !model.wake_ordered)
            .collect();
        wanted.sort_by_key(|model| (model.wanting_since_ms, model.id));
        for model in wanted {
            // What was ordered away, by this plan too, and is not gone yet will be missing too.
            let leaving =
                self.field.place(model.id).map_or(ByteCount::ZERO, |place| self.field.leaving_at(place));
            let bytes = model.weights_total.saturating_sub(model.weights_held.saturating_sub(leaving));
            let reason = reason::restore(model, bytes, leaving);
            self.act(Action::Restore { model: model.id, bytes, reason });
        }
    }

    /// Brings models back that nobody waits for, as far as nobody has to give anything up for it.
    fn preload(&mut self) {
        let state = self.field.state;
        if !state.requests.is_empty() || state.models.iter().any(|model| model.parked > 0 && !model.up) {
            return;
        }
        // What is on its way up already will take its part.
        let missing = |model: &ModelState| {
            (model.weights_total + model.kv_min).saturating_sub(model.weights_held + model.kv_held)
                + model.overhead_lacking
        };
        let promised: ByteCount =
            state.models.iter().filter(|model| model.wake_ordered && !model.up).map(missing).sum();
        let mut free = self.field.free.saturating_sub(promised);
        let mut wanted: Vec<&ModelState> = state
            .models
            .iter()
            .filter(|model| model.preload && model.ready && !model.up && !model.wake_ordered)
            .filter(|model| model.ordered.is_zero())
            .collect();
        wanted.sort_by_key(|model| (core::cmp::Reverse(model.priority), model.id));
        let mut coming: Vec<ModelId> = Vec::new();
        for model in wanted {
            let bytes = missing(model);
            let stands = |rival: &ModelId| {
                coming.contains(rival)
                    || self
                        .field
                        .model(*rival)
                        .is_some_and(|rival| !rival.stands().is_zero() || rival.wake_ordered)
            };
            let is_over = model.max.is_some_and(|max| model.held() + bytes > max);
            if bytes > free || is_over || model.apart.iter().any(stands) {
                continue;
            }
            free -= bytes;
            coming.push(model.id);
            let bytes = model.weights_total.saturating_sub(model.weights_held);
            let reason = reason::preload(model, bytes, free + bytes);
            self.act(Action::Restore { model: model.id, bytes, reason });
        }
    }
}

/// One order a model.
fn one_order_each(picks: Vec<(Candidate, ByteCount)>) -> Vec<(Candidate, ByteCount)> {
    let mut merged: Vec<(Candidate, ByteCount)> = Vec::with_capacity(picks.len());
    for (candidate, bytes) in picks {
        match merged.iter_mut().find(|(known, _)| known.model == candidate.model) {
            Some((known, sum)) => {
                *known = candidate;
                *sum += bytes;
            }
            None => merged.push((candidate, bytes)),
        }
    }
    merged
}
