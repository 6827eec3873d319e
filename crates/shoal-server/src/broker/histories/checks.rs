//! What holds after every event.
//!
//! I1 by the ledger and by what processes have, on the device and on the host; one process a model; nobody is sent to a
//! model whose bytes are neither there nor coming (the gateway's part of I13); no queue beyond its bound and nobody who
//! waits forgotten (I10); and every decision is made again from the line that would be logged of it (I11).

use std::collections::BTreeSet;

use serde_json::Value as Json;
use shoal_core::bytes::ByteCount;
use shoal_core::policy::{Plan, ShelfState, builtin, check};
use shoal_core::protocol::LeaseKind;

use super::WEIGHTS;
use super::world::World;

/// Requests that may wait for one model, by the shelf's configuration.
const PARKED_MAX: usize = 4;
/// Of so many decisions one is made again: writing its line takes longer than all else.
const REPLANNED_PART: u64 = 4;

impl World {
    pub(super) fn check(&mut self) {
        self.forget_together();
        self.check_ledger();
        self.check_models();
        self.check_beside();
        self.check_decisions();
        self.tell_story();
    }

    fn check_ledger(&self) {
        let core = &self.core;
        core.book.check_invariants();
        assert!(core.book.leased() <= core.config.device_budget + core.config.headroom, "I1");
        let shares: ByteCount = core.models.iter().map(|model| model.host_share).sum();
        assert!(shares <= core.config.host_budget, "I1: of the host, with what keeps KV in it");
        for (place, worker) in &self.workers {
            let model = &core.models[*place];
            let held = core.book.held(model.id, LeaseKind::Weights);
            assert!(model.is_unaccounted || worker.held <= held, "{} held, {held} leased", worker.held);
            let kv = core.book.held(model.id, LeaseKind::Kv);
            assert!(model.is_unaccounted || worker.kv <= kv, "{} of KV held, {kv} leased", worker.kv);
            assert!(worker.held <= WEIGHTS, "{} has weights twice: {}", worker.name, worker.held);
            assert_eq!(model.pid, Some(worker.pid), "two owners");
        }
        for (place, steward) in &self.stewards {
            let held = core.book.held(core.models[*place].id, LeaseKind::Weights);
            assert!(steward.held <= held, "{} held by a program, {held} leased", steward.held);
        }
        for pair in self.standing_together() {
            // Those that were set apart while both were there yield when they next may.
            assert!(self.together.contains(&pair), "{pair:?} are on the device together");
        }
    }

    /// Models that stand on the device side by side although they are configured apart. What the worker of a server before
    /// has counts before it has said so.
    pub(super) fn standing_together(&self) -> BTreeSet<(String, String)> {
        let core = &self.core;
        let unsaid = |place: &usize| {
            let worker = self.workers.get(place).filter(|_| core.models[*place].is_unaccounted);
            worker.map_or(ByteCount::ZERO, |worker| worker.held + worker.kv)
        };
        let held = |place: &usize, kind| core.book.held(core.models[*place].id, kind);
        let stands = |place: &usize| {
            let leased = held(place, LeaseKind::Weights) + held(place, LeaseKind::Kv);
            !(leased + unsaid(place)).is_zero()
        };
        let mut pairs = BTreeSet::new();
        for model in self.places().into_iter().filter(stands).map(|place| &core.models[place]) {
            let apart =
                model.config.apart.iter().filter(|other| core.by_name.get(*other).is_some_and(stands));
            pairs.extend(
                apart.filter(|other| model.name < **other).map(|other| (model.name.clone(), other.clone())),
            );
        }
        pairs
    }

    /// Those of which one has left since they were set apart may not stand together again.
    fn forget_together(&mut self) {
        if !self.together.is_empty() {
            let pairs = self.standing_together();
            self.together.retain(|pair| pairs.contains(pair));
        }
    }

    fn check_models(&mut self) {
        let core = &self.core;
        let parked: usize = core.models.iter().map(|model| model.queue.len()).sum();
        assert!(parked <= self.clients.len(), "somebody waits whom nobody knows");
        let most = |model: &crate::broker::Record| u64::from(model.config.parallel_max);
        self.narrowed.retain(|place| core.models[*place].queue.active() > most(&core.models[*place]));
        for (place, model) in core.models.iter().enumerate() {
            assert!(model.queue.len() <= PARKED_MAX, "I10");
            let active = model.queue.active();
            let routed = self.routed.iter().filter(|routed| routed.place == place).count() as u64;
            assert!(active <= most(model) || self.narrowed.contains(&place), "{} of {}", active, most(model));
            assert!(routed <= active, "a place was given twice");
            let is_line = model.takes_requests() && model.has_room() && model.queue.requests() > 0;
            assert!(!is_line, "a place is free and somebody waits for it");
            assert!(model.is_ready() || !model.cycle.loaded());
            if model.takes_requests() && !model.is_unaccounted {
                let worker = self.workers.get(&place);
                let is_there = worker.is_some_and(|worker| worker.held >= WEIGHTS)
                    || self.stewards.get(&place).is_some_and(super::programs::Steward::is_there);
                assert!(is_there, "I13: {} takes requests and is not there", model.name);
            }
        }
    }

    /// Decisions are reproducible from what is logged of them, and are what may be obeyed.
    fn check_decisions(&mut self) {
        while let Ok(decision) = self.decisions.try_recv() {
            self.seen.decisions += 1;
            if self.story.is_none() && !self.seen.decisions.is_multiple_of(REPLANNED_PART) {
                continue;
            }
            let line = serde_json::to_string(&decision).expect("it can be written");
            let read: Json = serde_json::from_str(&line).expect("what was written");
            let of = |key: &str| read[key].clone();
            let state: ShelfState = serde_json::from_value(of("state")).expect("a state");
            let plan: Plan = serde_json::from_value(of("plan")).expect("a plan");
            let policy = read["policy"].as_str().expect("a name");
            let now_ms = read["now_ms"].as_u64().expect("a time");
            if let Some(policy) = builtin(policy) {
                assert_eq!(policy.plan(&state, now_ms), plan, "I11: {line}");
                self.seen.replanned += 1;
            }
            assert_eq!(check(&state, &plan), Ok(()), "{line}");
            if let Some(story) = &mut self.story {
                story.push(line);
            }
        }
    }

    fn tell_story(&mut self) {
        let Some(story) = &mut self.story else { return };
        let newest = self.core.events.last_id();
        if newest < self.told {
            // Another server tells.
            self.told = 0;
        }
        let told = self.told;
        let news = self.core.events.kept().filter(|event| event.id > told);
        story.extend(news.map(|event| format!("{event:?}")));
        self.told = newest;
    }
}
