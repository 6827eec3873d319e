//! Who could yield, in which order, and how much of each is left while a plan is made.

use std::collections::BTreeMap;

use super::state::{ModelState, PendingRequest, ShelfState};
use super::{PRIORITY_HEAD_START_MS, PRIORITY_STEPS_MAX};
use crate::bytes::ByteCount;
use crate::ids::ModelId;
use crate::protocol::LeaseKind;

/// How much longer than twice its usual pause an idle model in its turn is waited for.
const LINGER_SLACK_MS: u64 = 10;

/// Why a model may be asked, the first before the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    Surplus,
    Idle,
    IdleKept,
    WaitsBehind,
    TurnOver,
}

/// One entry of the order in which models are asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) class: Class,
    pub(super) model: usize,
    /// Compared within the class, least first.
    rank: (u64, u64),
}

/// An age: less is older.
pub(super) type Seniority = (i64, ModelId, u64, u64);

/// Working figures of one plan.
#[derive(Debug)]
pub(super) struct Field<'a> {
    pub(super) state: &'a ShelfState,
    pub(super) now_ms: u64,
    index: BTreeMap<ModelId, usize>,
    /// Bytes that can still be ordered of each model, and how many of them are surplus.
    left: Vec<(ByteCount, ByteCount)>,
    candidates: Vec<Candidate>,
    /// The oldest request of each model that waits.
    senior: Vec<Option<Seniority>>,
    pub(super) free: ByteCount,
    pub(super) incoming: ByteCount,
    /// When time alone may change something: a turn ends, or a model may be asked again.
    pub(super) next_change_ms: u64,
    kept_by_all: ByteCount,
}

impl<'a> Field<'a> {
    pub(super) fn new(state: &'a ShelfState, now_ms: u64) -> Self {
        let index: BTreeMap<_, _> =
            state.models.iter().enumerate().map(|(place, model)| (model.id, place)).collect();
        let held: ByteCount = state.models.iter().map(ModelState::held).sum();
        let mut field = Self {
            state,
            now_ms,
            left: state.models.iter().map(takeable).collect(),
            candidates: Vec::new(),
            senior: vec![None; state.models.len()],
            free: state.budget.saturating_sub(held),
            incoming: state.models.iter().map(|model| model.ordered.min(model.held())).sum(),
            next_change_ms: u64::MAX,
            kept_by_all: state.models.iter().map(kept).sum(),
            index,
        };
        let changes = state.models.iter().flat_map(|model| {
            let skip_until = Some(model.skip_until_ms).filter(|until| *until > now_ms);
            [field.protected_until(model), field.lingers_until(model), skip_until]
        });
        let next_change_ms = changes.flatten().min().unwrap_or(u64::MAX);
        field.next_change_ms = next_change_ms;
        for request in &state.requests {
            if let Some(&place) = field.index.get(&request.model) {
                let age = field.seniority(request);
                field.senior[place] = Some(field.senior[place].map_or(age, |old| old.min(age)));
            }
        }
        field.candidates = field.rank_all();
        field
    }

    pub(super) fn model(&self, id: ModelId) -> Option<&'a ModelState> {
        self.index.get(&id).map(|place| &self.state.models[*place])
    }

    pub(super) fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    /// Less is older; age, head start of the priority, then names, so that the order is total.
    pub(super) fn seniority(&self, request: &PendingRequest) -> Seniority {
        let asked = request.asked_ms;
        let (since, priority) = self.model(request.model).map_or((asked, 0), |model| {
            let since = if model.can_run() { None } else { model.wanting_since_ms };
            (since.unwrap_or(asked).min(asked), model.priority)
        });
        (head_start(since, priority), request.model, asked, request.request)
    }

    fn rank_all(&self) -> Vec<Candidate> {
        let mut candidates = Vec::with_capacity(2 * self.state.models.len());
        for (place, model) in self.state.models.iter().enumerate() {
            let (takeable, surplus) = self.left[place];
            if takeable.is_zero() || self.skipped(model) {
                continue;
            }
            let value = value_per_byte(model, self.now_ms);
            if !surplus.is_zero() {
                let rank = (u64::from(model.is_busy()), model.last_used_ms);
                candidates.push(Candidate { class: Class::Surplus, model: place, rank });
            }
            let demand = model.is_busy()
                || self.senior[place].is_some()
                || model.wake_ordered
                || self.lingers_until(model).is_some();
            let (class, rank) = if !demand {
                let kept = kept_until(model).is_some_and(|until| until > self.now_ms);
                (if kept { Class::IdleKept } else { Class::Idle }, (value, model.last_used_ms))
            } else if model.can_run() || self.protected_until(model).is_some() {
                (Class::TurnOver, (model.turn_since_ms.unwrap_or(0), value))
            } else {
                // The youngest first: it would come back last.
                (Class::WaitsBehind, (u64::MAX - self.waits_since(place), value))
            };
            candidates.push(Candidate { class, model: place, rank });
        }
        candidates.sort_by_key(|candidate| (candidate.class, candidate.rank, candidate.model));
        candidates
    }

    fn waits_since(&self, place: usize) -> u64 {
        let asked = self.senior[place].map_or(self.now_ms, |(_, _, asked, _)| asked);
        self.state.models[place].wanting_since_ms.unwrap_or(asked).min(asked)
    }

    fn skipped(&self, model: &ModelState) -> bool {
        !model.ready || model.skip_until_ms > self.now_ms
    }

    /// Since when `request`, or the wake that it belongs to, has waited.
    fn since(&self, request: &PendingRequest) -> u64 {
        let wanting = self
            .model(request.model)
            .filter(|model| !model.can_run())
            .and_then(|model| model.wanting_since_ms);
        wanting.unwrap_or(request.asked_ms).min(request.asked_ms)
    }

    /// The seniority of a model that wants to come back, whether or not it asks for something now.
    fn standing(&self, model: &ModelState) -> Seniority {
        let since = model.wanting_since_ms.unwrap_or(self.now_ms);
        (head_start(since, model.priority), model.id, u64::MAX, u64::MAX)
    }

    /// How much `candidate` may give for `request`, which is so old, now.
    pub(super) fn offer(&self, candidate: Candidate, request: &PendingRequest, age: Seniority) -> ByteCount {
        let model = &self.state.models[candidate.model];
        let (takeable, surplus) = self.left[candidate.model];
        if candidate.class == Class::Surplus {
            // A model that asks for KV is about to use its own surplus.
            let own_kv = model.id == request.model && request.kind == LeaseKind::Kv;
            return if own_kv { ByteCount::ZERO } else { surplus };
        }
        if model.id == request.model {
            return ByteCount::ZERO;
        }
        let younger = self.senior[candidate.model].is_none_or(|senior| senior > age);
        let now = match candidate.class {
            Class::Surplus | Class::Idle | Class::IdleKept => true,
            // Between two requests of one wake it waits as well.
            Class::WaitsBehind => younger && self.standing(model) > age,
            Class::TurnOver => younger && self.protected_until(model).is_none(),
        };
        if now { takeable } else { ByteCount::ZERO }
    }

    /// Until when a busy, whole model cannot be taken; none once it can.
    pub(super) fn protected_until(&self, model: &ModelState) -> Option<u64> {
        let turn = model.turn_since_ms.map(|since| since.saturating_add(self.state.quantum_ms));
        [turn, model.rising_until_ms].into_iter().flatten().max().filter(|until| *until > self.now_ms)
    }

    /// Until when an idle model in its turn counts as busy, because its requests have followed each other sooner than
    /// it could be brought back; none where it does not.
    pub(super) fn lingers_until(&self, model: &ModelState) -> Option<u64> {
        let pause_ms = model.pause_ms.filter(|pause| pause.saturating_mul(2) <= model.restore_ms())?;
        if model.is_busy() || !model.up {
            return None;
        }
        let turn_ends = model.turn_since_ms?.saturating_add(self.state.quantum_ms);
        let linger_ms = (2 * pause_ms + LINGER_SLACK_MS).min(model.restore_ms());
        Some(model.last_used_ms.saturating_add(linger_ms).min(turn_ends)).filter(|until| *until > self.now_ms)
    }

    /// The model at `place` asks for bytes.
    pub(super) fn asks(&self, place: usize) -> bool {
        self.senior[place].is_some()
    }

    /// The most that `request` could ever be given: the budget less what others cannot be made to yield and what the
    /// asking model holds itself.
    pub(super) fn most(&self, request: &PendingRequest) -> ByteCount {
        let own = self.model(request.model).map_or(ByteCount::ZERO, |model| {
            let kept = self.kept_by_all.saturating_sub(kept(model));
            let surplus = model.kv_held.saturating_sub(model.kv_live);
            let yields = request.kind != LeaseKind::Kv && model.ready && !model.pinned;
            kept + if yields { model.held().saturating_sub(surplus) } else { model.held() }
        });
        self.state.budget.saturating_sub(own)
    }

    /// Everything that could be taken for `request` beyond what this plan gave away already, if all turns were over that
    /// had begun when it was asked, and everybody answered. A turn that began since does not count: were younger models
    /// let in on the strength of one another, some turn would always be running, and `request` would wait for ever.
    pub(super) fn eventual(&self, request: &PendingRequest) -> ByteCount {
        let asked_ms = self.since(request);
        let others = self.state.models.iter().zip(&self.left).map(|(model, (takeable, surplus))| {
            if !model.ready {
                // Its process is ending: all it holds comes back.
                model.held().saturating_sub(model.ordered)
            } else if model.id == request.model {
                if request.kind == LeaseKind::Kv { ByteCount::ZERO } else { *surplus }
            } else if self.in_turn(model) && model.turn_since_ms.is_none_or(|since| since >= asked_ms) {
                *surplus
            } else {
                *takeable
            }
        });
        self.free + self.incoming + others.sum()
    }

    /// Marks bytes of a candidate as taken.
    pub(super) fn take(&mut self, candidate: Candidate, bytes: ByteCount) {
        let (takeable, surplus) = &mut self.left[candidate.model];
        *takeable = takeable.saturating_sub(bytes);
        // Workers give surplus up first, whatever the order was for.
        *surplus = surplus.saturating_sub(bytes);
    }

    /// What could still be ordered of the model at `place`.
    pub(super) fn takeable_at(&self, place: usize) -> ByteCount {
        self.left[place].0
    }

    /// True where the model is running in its turn.
    pub(super) fn in_turn(&self, model: &ModelState) -> bool {
        model.is_whole()
            && (model.is_busy() || self.lingers_until(model).is_some())
            && self.protected_until(model).is_some()
    }
}

/// `since_ms`, moved by what a priority counts.
fn head_start(since_ms: u64, priority: i32) -> i64 {
    let steps = i64::from(priority.clamp(-PRIORITY_STEPS_MAX, PRIORITY_STEPS_MAX));
    i64::try_from(since_ms).unwrap_or(i64::MAX) - steps * PRIORITY_HEAD_START_MS
}

/// When `keep_alive` ends for an idle model.
pub(super) fn kept_until(model: &ModelState) -> Option<u64> {
    model.keep_alive_ms.map(|kept| model.last_used_ms.saturating_add(kept))
}

/// What a model cannot be made to yield. The bytes of one that is ending all come back.
fn kept(model: &ModelState) -> ByteCount {
    if !model.ready {
        ByteCount::ZERO
    } else if model.pinned || keeps_all(model) {
        model.held()
    } else {
        model.min.max(model.overhead_held).min(model.held())
    }
}

/// It has a minimum, and cannot give up what is above it alone.
fn keeps_all(model: &ModelState) -> bool {
    model.is_rigid && !model.min.is_zero()
}

/// What may be ordered of a model at all, and how much of that is KV that nobody uses.
fn takeable(model: &ModelState) -> (ByteCount, ByteCount) {
    // Whoever is rigid and was ordered to go is on its way with all it has.
    let is_leaving = model.is_rigid && !model.ordered.is_zero();
    if model.pinned || !model.ready || keeps_all(model) || is_leaving {
        return (ByteCount::ZERO, ByteCount::ZERO);
    }
    let floor = model.min.max(model.overhead_held);
    let takeable = model.held().saturating_sub(floor).saturating_sub(model.ordered);
    let surplus = model.kv_held.saturating_sub(model.kv_live).saturating_sub(model.ordered);
    (takeable, surplus.min(takeable))
}

/// What keeping a byte is worth: the time to bring it back, weighted by priority, over the time it was not used.
fn value_per_byte(model: &ModelState, now_ms: u64) -> u64 {
    let steps = model.priority.clamp(-PRIORITY_STEPS_MAX, PRIORITY_STEPS_MAX) + PRIORITY_STEPS_MAX;
    let idle_ms = now_ms.saturating_sub(model.last_used_ms);
    let cost = model.restore_us_per_mib.clamp(1, 1 << 30);
    (cost << steps.unsigned_abs()).saturating_mul(1_000) / idle_ms.saturating_add(1_000)
}
