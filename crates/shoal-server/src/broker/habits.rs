//! What a model's requests and moves tell of it: how often it is used, what bringing it back costs, how much of that was
//! for nothing. The policy's currency is made from this ([`shoal_core::policy::worth`]).
//!
//! Apart from the record, which says how a model stands now; nothing here decides anything.

use shoal_core::bytes::ByteCount;
use shoal_core::policy::thrash::{Thrash, ThrashFigures};
use shoal_core::policy::worth::of_weights;
use shoal_core::policy::{
    LinkSpeeds, PendingRequest, Plan, Policy, Rhythm, Shadow, ShelfState, Turns, UseRate, Value, builtin,
    check,
};
use shoal_core::protocol::LeaseKind;

use super::outside::Outside;
use super::{Core, millis};
use crate::config::is_outside;
use crate::state::{EventKind, ShadowSnapshot, SharingSnapshot, ThrashSnapshot};

/// From this on the shelf thrashes: of two requests one has paid for bringing a whole model back that had just left. Told
/// only once that was as much as the whole budget: a sleep and a wake by hand are nothing to complain of.
const THRASHES: f64 = 0.5;
/// Below this it does so no more.
const RESTS: f64 = 0.25;

/// What is remembered of one model.
#[derive(Clone, Debug, Default)]
pub(crate) struct Habits {
    pub(crate) uses: UseRate,
    rhythm: Rhythm,
    pub(crate) links: LinkSpeeds,
    pub(crate) thrash: Thrash,
    /// When it was last wholly brought back.
    pub(crate) restored_ms: Option<u64>,
    /// It is to be brought back without anybody asking.
    pub(crate) preload: bool,
    /// When the newest wake was ordered, and how long its leases were waited for since, all together.
    wake_ordered_ms: u64,
    lease_waited_ms: u64,
}

/// What is remembered of the shelf.
#[derive(Debug, Default)]
pub(crate) struct Remembered {
    turns: Turns,
    links: LinkSpeeds,
    thrashes: bool,
    /// Why a plan was last not obeyed.
    refused: Option<String>,
    /// What the shadow last said.
    shadow_said: Option<String>,
}

impl Core {
    /// A request begins. A use is one that came after a pause in which the model could have gone and come back.
    pub(super) fn note_request(&mut self, place: usize, was_idle: bool, was_asleep: bool, now_ms: u64) {
        let restore_ms = (self.models[place].weights_total.0 >> 20) * self.restore_cost(place) / 1_000;
        let model = &mut self.models[place];
        let pause_ms = model.idle_since_ms.map_or(u64::MAX, |since| now_ms.saturating_sub(since));
        if was_idle && (was_asleep || pause_ms > restore_ms) {
            model.habits.uses.note(now_ms);
            self.remembered.turns.note(model.id);
            model.habits.rhythm.note(&self.remembered.turns, now_ms);
        }
        let weights = model.weights_total;
        model.habits.thrash.served(weights, now_ms);
    }

    /// Device bytes were leased to a model or came back from it.
    pub(super) fn note_moved(
        &mut self,
        place: usize,
        kind: LeaseKind,
        came: bool,
        bytes: ByteCount,
        now_ms: u64,
    ) {
        let model = &mut self.models[place];
        if kind != LeaseKind::Weights {
            return;
        }
        if !came {
            return model.habits.thrash.left(bytes, now_ms);
        }
        model.habits.thrash.came_back(bytes, now_ms);
        let figures: ThrashFigures =
            self.models.iter().map(|model| model.habits.thrash.figures(now_ms)).sum();
        let index = figures.index();
        if index < RESTS {
            self.remembered.thrashes = false;
        } else if index >= THRASHES && figures.thrashed >= self.book.budget() && !self.remembered.thrashes {
            self.remembered.thrashes = true;
            let (thrashed, served) = (figures.thrashed, figures.served);
            self.tell(now_ms, None, EventKind::Thrashing { thrashed, served });
        }
    }

    /// A worker does not wait any more for what it had asked for, whatever came of it. Gives how long it did.
    pub(super) fn note_lease_wait(&mut self, place: usize, asked: &PendingRequest, now_ms: u64) -> u64 {
        if asked.kind == LeaseKind::Weights {
            let habits = &mut self.models[place].habits;
            // What it may have waited before is not in what the wake takes.
            let in_wake_ms = now_ms.saturating_sub(asked.asked_ms.max(habits.wake_ordered_ms));
            habits.lease_waited_ms = habits.lease_waited_ms.saturating_add(in_wake_ms);
        }
        now_ms.saturating_sub(asked.asked_ms)
    }

    /// A wake is ordered.
    pub(super) fn note_wake_ordered(&mut self, place: usize, now_ms: u64) {
        let habits = &mut self.models[place].habits;
        (habits.wake_ordered_ms, habits.lease_waited_ms) = (now_ms, 0);
    }

    /// A wake succeeded. `took_us` is what its worker says that it took, the waits for its leases included.
    pub(super) fn note_woke(&mut self, place: usize, bytes: ByteCount, took_us: u64, now_ms: u64) {
        let model = &mut self.models[place];
        let waited_ms = std::mem::take(&mut model.habits.lease_waited_ms);
        model.habits.restored_ms = Some(now_ms);
        model.habits.preload = false;
        let took_us = took_us.saturating_sub(waited_ms.saturating_mul(1_000));
        // Nothing came, or it does not say how long that took.
        if bytes.is_zero() || took_us == 0 {
            return;
        }
        // What it has no copy of has come from its source.
        let source = model.usage.source_only.min(bytes);
        model.habits.links.note(bytes - source, source, took_us);
        // How long a program starts says nothing of the links.
        if !model.is_rigid() {
            self.remembered.links.note(bytes - source, source, took_us);
        }
    }

    /// A model was ordered away, for somebody or not. One that is preloaded comes back by itself if it was for somebody.
    pub(super) fn note_sent_away(&mut self, place: usize, for_somebody: bool) {
        let model = &mut self.models[place];
        model.habits.preload = for_somebody && model.config.preload;
    }

    /// What bringing a MiB of a model back costs (microseconds), as measured; by what was measured of others, as long as
    /// it was not brought back itself.
    pub(super) fn restore_cost(&self, place: usize) -> u64 {
        let model = &self.models[place];
        let own = &model.habits.links;
        let links = if own.is_measured() { own } else { &self.remembered.links };
        links.restore_us_per_mib(model.weights_total, model.usage.source_only)
    }

    /// When a model is expected to be used next, where its uses come in rounds.
    pub(super) fn expected_ms(&self, place: usize, now_ms: u64) -> Option<u64> {
        self.models[place].habits.rhythm.next_ms(&self.remembered.turns, now_ms)
    }

    /// Who decides.
    pub(super) fn deciding(&self) -> &dyn Policy {
        self.brought.as_ref().unwrap_or(&self.policy).as_ref()
    }

    /// Makes the configured policies those that decide and watch.
    pub(super) fn choose_policies(&mut self) {
        let sharing = self.config.sharing.clone();
        self.outside = self.outside_named(Some(&sharing.policy));
        self.policy = builtin(&sharing.policy).unwrap_or_else(|| Box::new(Value));
        self.choose_shadow(sharing.shadow.as_deref());
    }

    fn choose_shadow(&mut self, name: Option<&str>) {
        self.outside_shadow = self.outside_named(name);
        self.shadow = name.map(|name| builtin(name).map_or_else(|| Shadow::told(name), Shadow::new));
    }

    fn outside_named(&mut self, name: Option<&str>) -> Option<Outside> {
        let name = name.filter(|name| is_outside(name))?;
        Some(Outside::new(self.number(), name, millis(self.config.sharing.policy_wait)))
    }

    /// Puts others of the same names in the place of these policies outside, whose code is not what it was. Gives the names.
    pub(super) fn renew_policies(&mut self, changed: &[u64]) -> Vec<String> {
        let name = |outside: &Option<Outside>| {
            outside
                .as_ref()
                .filter(|outside| changed.contains(&outside.id))
                .map(|outside| outside.name.clone())
        };
        let (decides, watches) = (name(&self.outside), name(&self.outside_shadow));
        if decides.is_some() {
            self.outside = self.outside_named(decides.as_deref());
        }
        if watches.is_some() {
            self.choose_shadow(watches.as_deref());
        }
        decides.into_iter().chain(watches).collect()
    }

    /// What to do, and who decided it; where a policy outside has been asked, until when it is waited for. A plan of a
    /// policy that is not ours is obeyed only if it may be; where not, ours decides, and that is told once for each thing
    /// that is wrong.
    pub(super) fn decide(&mut self, state: &ShelfState, now_ms: u64) -> Result<(Plan, String), u64> {
        if self.brought.is_none()
            && let Some(decided) = self.decide_outside(state, now_ms)
        {
            return decided;
        }
        let (plan, name) = (self.deciding().plan(state, now_ms), self.deciding().name().to_owned());
        let wrong = if self.brought.is_some() { check(state, &plan).err() } else { None };
        let Some(reason) = wrong else { return Ok((plan, name)) };
        let instead = self.policy.name().to_owned();
        if self.remembered.refused.as_ref() != Some(&reason) {
            self.remembered.refused = Some(reason.clone());
            let what = EventKind::PolicyRefused { policy: name, instead: instead.clone(), reason };
            self.tell(now_ms, None, what);
        }
        Ok((self.policy.plan(state, now_ms), instead))
    }

    /// What the shadow said of the newest decision.
    pub(super) fn watch(&mut self, state: &ShelfState, plan: &Plan, now_ms: u64) {
        self.watch_outside(state, plan, now_ms);
        if let Some(said) = self.shadow.as_mut().and_then(|shadow| shadow.watch(state, plan, now_ms)) {
            self.shadow_said(said);
        }
    }

    pub(super) fn shadow_said(&mut self, said: String) {
        tracing::debug!("{said}");
        self.remembered.shadow_said = Some(said);
    }

    /// The name of the policy that is to decide.
    pub(super) fn policy_name(&self) -> &str {
        match &self.outside {
            Some(outside) if self.brought.is_none() => &outside.name,
            _ => self.deciding().name(),
        }
    }

    /// How memory is shared, for others to see.
    pub(super) fn sharing_snapshot(&self, now_ms: u64) -> SharingSnapshot {
        let figures = self.models.iter().map(|model| model.habits.thrash.figures(now_ms)).sum();
        let total = self.models.iter().map(|model| model.habits.thrash.total()).sum();
        let shadow = |shadow: &Shadow| {
            let counts = shadow.counts();
            ShadowSnapshot {
                policy: shadow.name().to_owned(),
                decisions: counts.decisions,
                differing: counts.differing,
                evicted_live: counts.evicted_live,
                evicted_shadow: counts.evicted_shadow,
                last: self.remembered.shadow_said.clone(),
                missed: self.outside_shadow.as_ref().map_or(0, |watcher| watcher.missed),
                trouble: self.outside_shadow.as_ref().and_then(|watcher| watcher.instead.clone()),
            }
        };
        SharingSnapshot {
            policy: self.policy_name().to_owned(),
            instead: self.outside.as_ref().and_then(|outside| outside.instead.clone()),
            evicts: self.config.sharing.evicts,
            quantum_ms: self.timing.quantum_ms,
            thrash: thrash_snapshot(figures, total),
            shadow: self.shadow.as_ref().map(shadow),
        }
    }

    /// What a MiB of a model is worth: microseconds of waiting saved for each second that it is kept.
    pub(super) fn worth_snapshot(&self, place: usize, now_ms: u64) -> f64 {
        of_weights(&self.policy_model(place, now_ms), now_ms).0 as f64 / 256.0
    }

    pub(super) fn model_thrash(&self, place: usize, now_ms: u64) -> ThrashSnapshot {
        let thrash = &self.models[place].habits.thrash;
        thrash_snapshot(thrash.figures(now_ms), thrash.total())
    }
}

fn thrash_snapshot(figures: ThrashFigures, total: ByteCount) -> ThrashSnapshot {
    ThrashSnapshot { index: figures.index(), thrashed: figures.thrashed, served: figures.served, total }
}
