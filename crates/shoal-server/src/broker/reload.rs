//! Another configuration under a running server: only what changed is touched.
//!
//! Apart because a place on the shelf outlives what stands there: models are added behind the others or where one was
//! taken off before, one that is taken off keeps its place until its process is gone, and one that was configured otherwise
//! goes through the same end as any worker before the next one starts (no two owners of a lease). Keys that only the server
//! needs (`min`, `priority`, `pin`, ...) are new from the next decision on.

use std::sync::Arc;

use shoal_core::protocol::FromServer;

use super::{Core, Life, LifeEvent, Record, millis};
use crate::config::{Limits, ModelConfig, ServerConfig};
use crate::shelf::Reloaded;
use crate::state::EventKind;

/// How long requests of a worker that is to go may take.
const DRAIN_MS: u64 = 30_000;

/// A worker is to go once its requests are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Retiring {
    /// They are not waited for any longer.
    pub(crate) until_ms: u64,
}

/// What the tasks around the core have to do after a reload.
#[derive(Debug, Default)]
pub(crate) struct Follow {
    /// Places that need a task of their own.
    pub(crate) places: Vec<usize>,
    /// Places where another model stands now: what the one before left is nobody's (I12).
    pub(crate) reused: Vec<usize>,
    /// Models whose pin was changed, and to what.
    pub(crate) pins: Vec<(String, bool)>,
}

impl Core {
    /// Puts a configuration in place of the present one. `rewritten` are policies whose code is not what it was.
    pub(crate) fn handle_reload(
        &mut self,
        config: ServerConfig,
        rewritten: &[u64],
        now_ms: u64,
    ) -> (Reloaded, Follow) {
        let old = Arc::clone(&self.config);
        let mut said = Reloaded { needs_restart: fixed_keys(&old, &config), ..Reloaded::default() };
        let config = Arc::new(ServerConfig {
            listen: old.listen,
            api_key_file: old.api_key_file.clone(),
            allowed_hosts: old.allowed_hosts.clone(),
            separate_keys: old.separate_keys,
            device: old.device,
            device_uuid: old.device_uuid.clone(),
            device_budget: old.device_budget,
            headroom: old.headroom,
            host_budget: old.host_budget,
            host_memory: old.host_memory,
            host_tier: old.host_tier,
            disk: old.disk.clone(),
            disk_key_file: old.disk_key_file.clone(),
            disk_wait: old.disk_wait,
            tiers: old.tiers.clone(),
            runtime_dir: old.runtime_dir.clone(),
            state_dir: old.state_dir.clone(),
            cache_dir: old.cache_dir.clone(),
            log_dir: old.log_dir.clone(),
            limits: Limits { parked_max: config.limits.parked_max, ..old.limits },
            ..config
        });
        self.config = Arc::clone(&config);
        self.timing.quantum_ms = millis(config.quantum);
        if old.sharing == config.sharing {
            said.policies = self.renew_policies(rewritten);
        } else {
            self.choose_policies();
        }
        let mut follow = Follow::default();
        for place in 0..self.models.len() {
            let name = &self.models[place].name;
            if !self.models[place].is_removed && config.model(name).is_none() {
                said.removed.push(name.clone());
                self.take_off(place, now_ms);
            }
        }
        for model in &config.models {
            let known = self.by_name.get(&model.name).copied();
            match known {
                Some(place) if self.models[place].is_same_kind(model) => {
                    self.change(place, model, (&old, &config), &mut said, &mut follow, now_ms);
                }
                Some(place) => {
                    self.take_off(place, now_ms);
                    self.add(model, &config, &mut follow);
                    said.restarted.push(model.name.clone());
                }
                None => {
                    self.add(model, &config, &mut follow);
                    said.added.push(model.name.clone());
                }
            }
        }
        self.refuse_unknown_engines();
        self.tell(
            now_ms,
            None,
            EventKind::Reloaded {
                added: said.added.clone(),
                removed: said.removed.clone(),
                restarted: said.restarted.clone(),
                changed: said.changed.clone(),
                policies: said.policies.clone(),
                needs_restart: said.needs_restart.clone(),
            },
        );
        self.settle(now_ms);
        (said, follow)
    }

    /// A model leaves the shelf: nobody is routed to it any more, and its worker ends once its requests are answered.
    fn take_off(&mut self, place: usize, now_ms: u64) {
        const REASON: &str = "it was taken off the shelf";
        self.by_name.retain(|_, known| *known != place);
        self.models[place].is_removed = true;
        self.refuse_parked(place, REASON, None, now_ms);
        self.retire(place, "it was configured otherwise", now_ms);
        if self.models[place].retiring.is_none() {
            self.advance(place, LifeEvent::GoneForGood);
        }
    }

    fn add(&mut self, model: &ModelConfig, config: &ServerConfig, follow: &mut Follow) {
        let is_free = |record: &Record| {
            record.is_removed
                && *record.life() == Life::Stopped
                && record.pid.is_none()
                && record.queue.active() == 0
                && record.is_same_kind(model)
        };
        let free = self.models.iter().position(is_free);
        let place = free.unwrap_or(self.models.len());
        let mut record = Record::new(place, model, config);
        let taken = |path: &std::path::Path| self.models.iter().any(|model| model.socket == path);
        let paths = (0..).map(|number| config.runtime_dir.join(format!("worker-{number}.sock")));
        if let Some(path) = paths.into_iter().find(|path| !taken(path)) {
            record.listen_at(path);
        }
        if free.is_some() {
            // Its task listens to these.
            record.start = Arc::clone(&self.models[place].start);
            record.end = Arc::clone(&self.models[place].end);
            self.models[place] = record;
            follow.reused.push(place);
        } else {
            self.models.push(record);
            follow.places.push(place);
        }
        self.by_name.insert(model.name.clone(), place);
    }

    fn change(
        &mut self,
        place: usize,
        model: &ModelConfig,
        (old, new): (&ServerConfig, &ServerConfig),
        said: &mut Reloaded,
        follow: &mut Follow,
        now_ms: u64,
    ) {
        let record = &mut self.models[place];
        if record.config == *model && old.python_of(&record.config) == new.python_of(model) {
            return;
        }
        let is_anew = old.fingerprint(&record.config) != new.fingerprint(model);
        if record.config.pin != model.pin {
            follow.pins.push((model.name.clone(), model.pin));
        }
        record.config = model.clone();
        if !is_anew {
            said.changed.push(model.name.clone());
            return;
        }
        said.restarted.push(model.name.clone());
        record.forget_needs(model);
        self.retire(place, "it was configured otherwise", now_ms);
        if self.models[place].retiring.is_none() && matches!(self.models[place].life(), Life::Failed { .. }) {
            self.models[place].quick_ends = 0;
            self.models[place].error = None;
            self.advance(place, LifeEvent::AskedAgain { now_ms });
        }
    }

    fn retire(&mut self, place: usize, reason: &str, now_ms: u64) {
        let model = &mut self.models[place];
        if model.pid.is_some() || matches!(model.life(), Life::Starting { .. }) {
            model.cycle.note(reason);
            model.retiring = Some(Retiring { until_ms: now_ms + DRAIN_MS });
            if model.pid.is_none() {
                // Whoever waits for what its process is made of need not wait any longer.
                model.end.notify_one();
            }
        }
    }

    /// Ends workers that are to go and have no requests left, or have had time enough for them.
    pub(super) fn end_retiring(&mut self, now_ms: u64) {
        let lively: Vec<usize> = self.models.lively_places().collect();
        for place in lively {
            let model = &self.models[place];
            let Some(Retiring { until_ms }) = model.retiring else { continue };
            let is_at_work = model.is_ready() && model.queue.active() > 0;
            // One that is being started has no process yet: its task leaves the start, or ends what it has started.
            if model.pid.is_none() || matches!(model.life(), Life::Ending) || is_at_work && now_ms < until_ms
            {
                continue;
            }
            let deadline_ms = self.timing.end_ms_max;
            let reason = "its model is served by another worker, or not at all, from now on".to_owned();
            model.say(FromServer::Shutdown { deadline_ms, reason });
            self.end_connection(place, now_ms);
        }
    }

    /// The worker that was to go is gone. False where none was.
    pub(super) fn retired(&mut self, place: usize, now_ms: u64) -> bool {
        let model = &mut self.models[place];
        if model.retiring.take().is_none() && !model.is_removed {
            return false;
        }
        if model.is_removed {
            self.advance(place, LifeEvent::GoneForGood);
            return true;
        }
        model.backoff = crate::supervisor::Backoff::default();
        model.quick_ends = 0;
        model.error = None;
        let failed = matches!(model.life(), Life::Failed { permanent: true, .. });
        let reason = "it was configured otherwise".to_owned();
        model.cycle.note(reason.clone());
        let event =
            if failed { LifeEvent::AskedAgain { now_ms } } else { LifeEvent::Gone { at_ms: now_ms, reason } };
        self.advance(place, event);
        true
    }

    /// When the next one is not waited for any longer. Only what answers requests still is.
    pub(super) fn next_retiring(&self) -> Option<u64> {
        let waiting = self.models.lively().filter(|model| model.is_ready() && model.pid.is_some());
        waiting.filter_map(|model| model.retiring.map(|retiring| retiring.until_ms)).min()
    }
}

/// The keys of `[server]` that differ and stay as they were.
fn fixed_keys(old: &ServerConfig, new: &ServerConfig) -> Vec<String> {
    let keys = [
        ("listen", old.listen != new.listen),
        ("api_key_file", old.api_key_file != new.api_key_file),
        ("allowed_hosts", old.allowed_hosts != new.allowed_hosts),
        ("separate_keys", old.separate_keys != new.separate_keys),
        ("device", old.device != new.device),
        ("device_budget", old.device_budget != new.device_budget),
        ("headroom", old.headroom != new.headroom),
        ("host_budget", old.host_budget != new.host_budget),
        ("host_memory", old.host_memory != new.host_memory),
        ("host_tier", old.host_tier != new.host_tier),
        ("disk", old.disk != new.disk),
        ("disk_key_file", old.disk_key_file != new.disk_key_file),
        ("disk_wait", old.disk_wait != new.disk_wait),
        ("tier_load", old.tiers.always_loads != new.tiers.always_loads),
        ("tier_idle", old.tiers.idle != new.tiers.idle),
        ("tier_remote", old.tiers.remote() != new.tiers.remote()),
        ("request_bytes_max", old.limits.request_bytes_max != new.limits.request_bytes_max),
        ("wait_s_max", old.limits.wait_max != new.limits.wait_max),
    ];
    keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key.to_owned()).collect()
}
