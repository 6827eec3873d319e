//! The state as others see it.

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{LeaseKind, WeightsAtRest};
use shoal_core::tier::Tier;

use super::{Core, Record};
use crate::config::{DeviceChoice, DiskTier};
use crate::shelf::Caller;
use crate::state::{
    DeviceSnapshot, KeySnapshot, LeaseSnapshot, ModelBytes, ModelCounts, ModelSnapshot, ModelStatus,
    SCHEMA_VERSION, ShelfSnapshot, StateSnapshot, TierSnapshot, WaitingSnapshot,
};

impl Core {
    pub(crate) fn snapshot(&self, now_ms: u64) -> ShelfSnapshot {
        let used = |bytes: fn(&Record) -> ByteCount| self.models.iter().map(bytes).sum();
        let tier = |tier, budget, used| TierSnapshot { tier, budget, used };
        let disk = |bytes: fn(&DiskTier) -> ByteCount| self.config.disk.iter().map(bytes).sum::<ByteCount>();
        let at_rest = self.weights_store.as_ref().map_or(ByteCount::ZERO, |store| store.bytes);
        ShelfSnapshot {
            version: SCHEMA_VERSION,
            at_ms: self.unix_ms(now_ms),
            started_at_ms: self.started_unix_ms,
            last_event_id: self.events.last_id(),
            device: DeviceSnapshot {
                name: self.config.device.to_string(),
                simulated: self.config.device == DeviceChoice::Sim,
                budget: self.config.device_budget,
                headroom: self.book.headroom(),
                taken: self.book.charged(),
                leased: self.book.leased(),
                returning: self.book.returning(),
                free: self.book.free(),
                driver: self.driver_snapshot(now_ms),
            },
            tiers: vec![
                tier(Tier::Device, Some(self.config.device_budget), self.book.leased()),
                tier(
                    Tier::Host,
                    Some(self.config.host_budget),
                    used(|model| model.usage.host + tier_bytes(model, "host")),
                ),
                tier(
                    Tier::Disk,
                    Some(disk(|disk| disk.bytes) + disk(|disk| disk.weights.unwrap_or_default())),
                    used(|model| tier_bytes(model, "disk")) + at_rest,
                ),
                tier(Tier::Source, None, used(|model| model.usage.source_only)),
            ],
            weights_store: self.weights_store.clone(),
            waiting: self
                .asked
                .iter()
                .map(|asked| WaitingSnapshot {
                    model: self.models[asked.pending.model.0 as usize].name.clone(),
                    kind: asked.pending.kind,
                    bytes: asked.pending.bytes,
                    waited_ms: now_ms.saturating_sub(asked.pending.asked_ms),
                    deadline_at_ms: self.unix_ms(asked.pending.deadline_ms),
                    reason: asked.reason.clone(),
                })
                .collect(),
            sharing: self.sharing_snapshot(now_ms),
            models: (0..self.models.len())
                .filter(|place| !self.is_off(*place))
                .map(|place| self.model_snapshot(place, now_ms))
                .collect(),
        }
    }

    /// Keeps what a worker saw of the store of weights: one directory, whoever looked, and there when no worker runs.
    pub(super) fn note_weights_store(&mut self, told: Option<&WeightsAtRest>) {
        let known = self.weights_store.as_ref().map_or(0, |store| store.looked_at_ms);
        if let Some(told) = told.filter(|told| told.looked_at_ms > known) {
            self.weights_store = Some(told.into());
        }
    }

    /// How far a model that somebody waits for is.
    pub(crate) fn progress_of(&self, place: usize, caller: &Caller) -> Option<String> {
        let model = &self.models[place];
        if model.is_up() && model.queue.requests() > 0 {
            let (own, _) = model.queue.share(caller, 0);
            let own = caller.name().map_or_else(String::new, |_| format!(", {own} of them with this key"));
            return Some(format!("awake, {} requests wait for their turn{own}", model.queue.requests()));
        }
        let status = self.status_of(place);
        let word = crate::state::status_word(status);
        match status {
            ModelStatus::Starting | ModelStatus::Restarting => Some(match &model.progress {
                Some(progress) => format!("{word}, {progress}"),
                None => word.to_owned(),
            }),
            ModelStatus::Waking if !model.weights_total.is_zero() && !model.is_rigid() => {
                let there = model.usage.weights_device.min(model.weights_total);
                Some(format!("{word}, {} %", there.0 * 100 / model.weights_total.0))
            }
            ModelStatus::Awake | ModelStatus::Failed | ModelStatus::Stopped => None,
            _ => Some(word.to_owned()),
        }
    }

    /// It was taken off the shelf, and nothing of it is left.
    fn is_off(&self, place: usize) -> bool {
        self.models[place].is_removed && self.models[place].pid.is_none()
    }

    fn model_snapshot(&self, place: usize, now_ms: u64) -> ModelSnapshot {
        let model = &self.models[place];
        let held = |kind| self.book.held(model.id, kind);
        let usage = &model.usage;
        let counts = &model.counts;
        ModelSnapshot {
            name: model.name.clone(),
            source: model.config.source.clone(),
            engine: model.config.engine.name().to_owned(),
            status: self.status_of(place),
            state: StateSnapshot {
                since_at_ms: self.unix_ms(model.cycle.since_ms()),
                reason: model.cycle.reason().to_owned(),
                before: model.cycle.before().map(|(status, _)| status),
                before_ms: model.cycle.before().map_or(0, |(_, ms)| ms),
                asleep_in: (self.status_of(place) == ModelStatus::Asleep && !model.is_rigid())
                    .then_some(if usage.source_only.is_zero() { Tier::Host } else { Tier::Source }),
            },
            progress: model.progress.clone(),
            error: model.error.clone(),
            // A worker's figures come a few times a second; its leases are known to the byte. What was given back
            // since is not shown as if it were still there.
            bytes: ModelBytes {
                weights_device: if model.is_up() {
                    held(LeaseKind::Weights)
                } else {
                    usage.weights_device.min(held(LeaseKind::Weights))
                },
                weights_total: usage.weights_total.max(model.weights_total),
                kv_device: usage.kv_device.min(held(LeaseKind::Kv)),
                kv_live: usage.kv_live.min(held(LeaseKind::Kv)),
                overhead_device: usage.overhead_device,
                overhead_peak: usage.overhead_peak,
                host: usage.host,
                source_only: usage.source_only,
            },
            lease: LeaseSnapshot {
                weights: held(LeaseKind::Weights),
                kv: held(LeaseKind::Kv),
                overhead: held(LeaseKind::Overhead),
                total: self.book.total(model.id),
                reclaiming: model.ordered(),
                seen: model.seen,
                drift: self.drift_of(place),
                host: model.host_share,
            },
            pinned: model.pinned,
            priority: model.config.priority,
            min: model.config.min.unwrap_or(ByteCount::ZERO),
            max: model.config.max,
            keep_alive_ms: model.config.keep_alive_s.map(|seconds| seconds.saturating_mul(1_000)),
            preload: model.config.preload,
            sleep: model.config.sleep.name().to_owned(),
            apart: model.config.apart.clone(),
            worth_us: self.worth_snapshot(place, now_ms),
            restore_us_per_mib: self.restore_cost(place),
            thrash: self.model_thrash(place, now_ms),
            counts: ModelCounts {
                requests_active: model.queue.active(),
                requests_parked: model.queue.len() as u64,
                requests_total: counts.requests,
                requests_refused: counts.refused,
                tokens_out: (counts.tokens_before + usage.tokens_out).max(counts.tokens_routed),
                wakes: counts.wakes,
                evictions: counts.evictions,
                evicted: counts.evicted,
                restored: counts.restored,
                leases_granted: counts.granted,
                leases_denied: counts.denied,
            },
            tiers: usage.tiers.clone(),
            weights_at_rest: usage.weights_at_rest.clone(),
            parallel_max: model.config.parallel_max,
            keys: model
                .queue
                .standings(now_ms)
                .map(|stands| KeySnapshot {
                    key: stands.key.name().map(str::to_owned),
                    active: stands.active.into(),
                    parked: stands.waiting as u64,
                    waited_ms: stands.first.map_or(0, |first| now_ms.saturating_sub(first.since_ms)),
                    used_ms: stands.used_ms,
                })
                .collect(),
            first_byte_awake: model.first_byte_awake.snapshot(),
            first_byte_asleep: model.first_byte_asleep.snapshot(),
            wake_time: model.wake_time.snapshot(),
            last_used_at_ms: model.last_used_ms.map(|at| self.unix_ms(at)),
            pid: if model.is_rigid() { model.child } else { model.pid },
            is_elastic: !model.is_rigid(),
            silent_ms: model.pulse.silent_ms(now_ms),
            starts: model.starts,
            log: model.log.display().to_string(),
            capabilities: model.capabilities.clone(),
        }
    }
}

/// What a model's worker keeps in a tier of that name.
fn tier_bytes(model: &Record, name: &str) -> ByteCount {
    model.usage.tiers.iter().filter(|tier| tier.tier == name).map(|tier| tier.bytes).sum()
}

#[cfg(test)]
mod tests {
    use shoal_core::protocol::{FromWorker, WorkerUsage};

    use super::super::pulse_tests::exits;
    use super::super::turn_tests::Bench;
    use super::*;

    /// A worker has looked at the store of weights, which has so many MiB then.
    fn look(bench: &mut Bench, place: usize, looked_at_ms: u64, mib: u64) {
        let (path, bytes) = ("/mnt/weights".to_owned(), ByteCount::mib(mib));
        let told = WeightsAtRest { path, models: 1, bytes, looked_at_ms, ..WeightsAtRest::default() };
        let usage = WorkerUsage { weights_at_rest: Some(told), ..WorkerUsage::default() };
        bench.say(place, FromWorker::Usage { usage }, 10);
    }

    #[test]
    fn what_was_seen_of_the_store_of_weights_last_is_shown_when_no_worker_runs() {
        let mut bench = Bench::new();
        assert_eq!(bench.core.snapshot(10).weights_store, None);
        look(&mut bench, 0, 0, 0);
        assert_eq!(bench.core.snapshot(10).weights_store, None, "nobody has looked yet");
        look(&mut bench, 0, 7, 48);
        look(&mut bench, 1, 5, 16);
        exits(&mut bench.core, 0, 20);
        exits(&mut bench.core, 1, 20);
        let shelf = bench.core.snapshot(20);
        assert!(shelf.models.iter().all(|model| model.weights_at_rest.is_none()));
        let store = shelf.weights_store.expect("it was looked at");
        assert_eq!((&*store.path, store.models, store.bytes), ("/mnt/weights", 1, ByteCount::mib(48)));
        let disk = shelf.tiers.iter().find(|tier| tier.tier == Tier::Disk).expect("it is there");
        assert_eq!(disk.used, store.bytes);
    }
}
