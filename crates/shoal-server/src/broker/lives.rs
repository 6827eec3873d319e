//! The lives of workers: started in turn, greeted, failed, ended, started again.

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::protocol::{FromServer, LeaseKind, VERSION, WorkerCapabilities, WorkerHolds};
use shoal_core::shares::fair_shares;
use tokio::sync::mpsc;

use super::record::host_need;
use super::{Core, Life, LifeEvent, Record, STARTING_MAX};
use crate::config::{Engine, SleepDepth, with_parts};
use crate::state::EventKind;
use crate::supervisor::Exit;

/// Failures in a row after which requests are no longer parked while the worker is started again.
const FAILURES_PATIENT_MAX: u32 = 3;
/// Quick ends in a row, none of them of a worker that was ready, after which it is not started again by itself.
const QUICK_ENDS_MAX: u32 = 5;
/// A worker that ended sooner than this and was never ready ended quickly.
const QUICK: std::time::Duration = std::time::Duration::from_mins(1);

/// A worker may speak: which model it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Greeting {
    pub(crate) place: usize,
    pub(crate) pid: u32,
}

impl Core {
    pub(super) fn refuse_unknown_engines(&mut self) {
        for place in 0..self.models.len() {
            let model = &self.models[place];
            // Once is enough.
            if model.is_removed || matches!(model.life(), Life::Failed { .. }) {
                continue;
            }
            if let Some(reason) = model.engine_missing() {
                self.fail(place, "engine", &reason, true, 0);
            }
        }
    }

    /// Tells process tasks to start workers: those with requests first, then in the configuration's order.
    pub(super) fn start_next(&mut self, now_ms: u64) {
        loop {
            let starting = |model: &&Record| matches!(model.life(), Life::Starting { .. });
            if self.stopping
                || self.is_settling()
                || self.models.lively().filter(starting).count() >= STARTING_MAX
            {
                return;
            }
            let due = |model: &Record| {
                matches!(model.life(), Life::Waiting { at_ms, .. } if *at_ms <= now_ms) && model.pid.is_none()
            };
            let next = self
                .models
                .lively_places()
                .filter(|place| due(&self.models[*place]))
                .min_by_key(|place| (self.models[*place].queue.is_empty(), *place));
            let Some(place) = next else { return };
            self.advance(place, LifeEvent::StartOrdered { now_ms });
            self.models[place].start.notify_one();
        }
    }

    /// A process runs. False where it is to end at once: what it was started for has gone meanwhile.
    pub(crate) fn handle_started(&mut self, place: usize, pid: u32, now_ms: u64) -> bool {
        let model = &mut self.models[place];
        model.pid = Some(pid);
        model.last_words = None;
        model.hung = None;
        (model.was_ready, model.was_shown) = (false, false);
        let id = model.id;
        if let Err(error) = self.book.open(id) {
            tracing::error!(model = self.models[place].name, %error, "a worker began before the last one was gone");
        }
        // A command is started when it is needed, and told of then.
        if !self.models[place].is_rigid() {
            self.models[place].starts += 1;
            let starts = self.models[place].starts;
            let reason = match starts {
                1 => "the server starts its models' workers".to_owned(),
                _ => "its worker before has ended".to_owned(),
            };
            self.tell(now_ms, Some(place), EventKind::WorkerStarted { pid, starts, reason });
        }
        // Its patience begins now: until there was a process to fork it from, it could not say anything.
        self.advance(place, LifeEvent::Heard { now_ms });
        if self.stopping || !matches!(self.models[place].life(), Life::Starting { .. }) {
            self.models[place].end.notify_one();
        }
        self.settle(now_ms);
        !self.stopping && matches!(self.models[place].life(), Life::Starting { .. })
    }

    /// Whether the start that was ordered is still wanted; there is no process yet.
    pub(crate) fn wants_start(&self, place: usize) -> bool {
        let model = &self.models[place];
        !self.stopping && model.retiring.is_none() && matches!(model.life(), Life::Starting { .. })
    }

    /// No process was made, because what it was to be made for has gone meanwhile.
    pub(crate) fn handle_unwanted(&mut self, place: usize, now_ms: u64) {
        // One that cannot be served, or a server that ends, is where it belongs already.
        if !self.stopping {
            self.retired(place, now_ms);
        }
        self.settle(now_ms);
    }

    /// A process could not be started.
    pub(crate) fn handle_not_started(&mut self, place: usize, reason: String, now_ms: u64) {
        let model = &mut self.models[place];
        (model.was_ready, model.last_words) = (false, None);
        self.after_end(place, reason, std::time::Duration::ZERO, now_ms);
        self.settle(now_ms);
    }

    /// A worker said hello.
    ///
    /// # Errors
    /// Why it may not speak.
    pub(crate) fn handle_greeted(
        &mut self,
        name: &str,
        pid: u32,
        connection: mpsc::Sender<FromServer>,
        holds: Option<&WorkerHolds>,
        now_ms: u64,
    ) -> Result<Greeting, String> {
        let place = *self.by_name.get(name).ok_or_else(|| format!("there is no model {name:?}"))?;
        let config = self.config.clone();
        let share = self.share_host(place);
        let model = &mut self.models[place];
        if model.pid != Some(pid) {
            return Err(format!("process {pid} was not started for model {name:?}"));
        }
        if !matches!(model.life(), Life::Starting { greeted: false, .. } | Life::Awaited { .. }) {
            return Err(format!("model {name:?} has greeted already"));
        }
        let mut spec = config.spec_of(&model.config);
        // Within its share: the worker's copies have the rest (I1).
        spec["host_tier_bytes"] = config.host_tier_of(&model.config, share, model.host_need).0.into();
        let welcome = FromServer::Welcome {
            version: VERSION,
            spec,
            device: config.device.to_string(),
            device_bytes: config.device_budget + config.headroom,
            host_budget: share,
            data_socket: model.socket.to_string_lossy().into_owned(),
            lends_slabs: config.host_memory.is_some(),
            server_wait_ms: if self.is_journaled { super::millis(config.orphan_wait) } else { 0 },
            forwards_when_backed: true,
        };
        if connection.try_send(welcome).is_err() {
            return Err("its connection closed at once".to_owned());
        }
        model.connection = Some(connection);
        if matches!(model.life(), Life::Awaited { .. }) {
            if let Err(reason) = self.adopt(place, holds, share, now_ms) {
                // It is on its way out now.
                self.settle(now_ms);
                return Err(reason);
            }
        } else {
            model.host_share = share;
            self.advance(place, LifeEvent::Greeted { now_ms });
        }
        self.settle(now_ms);
        Ok(Greeting { place, pid })
    }

    /// Host bytes for a worker that starts: what it needs where that fits, else as much as the others that lack some. A
    /// share is its worker's until that ends, so what was given away before is not given again (I1).
    fn share_host(&self, place: usize) -> ByteCount {
        let is_lost =
            |model: &Record| model.is_removed || matches!(model.life(), Life::Failed { permanent: true, .. });
        let needs: Vec<_> = self
            .models
            .iter()
            .map(|model| if is_lost(model) { Some(model.host_share) } else { model.host_need })
            .collect();
        let given: ByteCount = self
            .models
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != place)
            .map(|(_, model)| model.host_share)
            .sum();
        // Whose copies are to stay in host memory gets what that takes, before the rest is divided.
        let stays = |model: &Record| {
            model.config.sleep == SleepDepth::Host && model.host_need.is_some() && !is_lost(model)
        };
        let promised =
            |model: &Record| if stays(model) { model.host_need.unwrap_or_default() } else { ByteCount::ZERO };
        let reserved: ByteCount = self.models.iter().map(promised).sum();
        let to_come: ByteCount = self
            .models
            .iter()
            .enumerate()
            .filter(|(other, model)| *other != place && model.host_share.is_zero())
            .map(|(_, model)| promised(model))
            .sum();
        let needs: Vec<_> = needs
            .into_iter()
            .zip(&self.models)
            .map(|(need, model)| {
                let part =
                    if is_lost(model) { ByteCount::ZERO } else { self.config.host_tier_part(&model.config) };
                (if stays(model) { Some(ByteCount::ZERO) } else { need }, part)
            })
            // What nobody needs is divided among all, and one that may be added while these run.
            .chain([(Some(ByteCount::ZERO), ByteCount::ZERO)])
            .collect();
        let budget = self.config.host_budget.saturating_sub(reserved);
        let shares = fair_shares(budget, &with_parts(budget, &needs));
        let share = shares[place] + promised(&self.models[place]);
        share.min(self.config.host_budget.saturating_sub(given).saturating_sub(to_come))
    }

    pub(super) fn ready(&mut self, place: usize, capabilities: WorkerCapabilities, now_ms: u64) {
        let model = &mut self.models[place];
        let Life::Starting { .. } = model.life() else {
            return self.break_off(place, "it was ready twice".to_owned(), now_ms);
        };
        let weights = capabilities.weights_bytes.round_up_to(PAGE_BYTES);
        let kv = capabilities.kv_bytes_min;
        let overhead = self.book.held(model.id, LeaseKind::Overhead);
        let needed = weights + kv + overhead;
        let pid = model.pid.unwrap_or_default();
        model.weights_total = capabilities.weights_bytes;
        if !model.is_rigid() {
            model.host_need = Some(host_need(capabilities.weights_bytes));
        }
        model.capabilities = Some(capabilities);
        model.progress = None;
        let (what, allowed) = match model.config.max {
            Some(max) if max < self.config.device_budget => ("its max", max),
            _ => ("the device budget", self.config.device_budget),
        };
        if needed > allowed {
            let reason = if self.models[place].is_rigid() {
                format!("its device_bytes are {weights}, and {what} is {allowed}")
            } else {
                format!(
                    "it needs {needed} of device memory ({weights} of weights, {kv} of KV for one request, {overhead} of \
                 overhead), and {what} is {allowed}"
                )
            };
            return self.fail(place, "budget", &reason, true, now_ms);
        }
        let model = &mut self.models[place];
        model.error = None;
        model.was_ready = true;
        model.quick_ends = 0;
        model.habits.preload = model.config.preload;
        model.cycle.note("its worker is ready");
        self.advance(place, LifeEvent::Ready);
        let model = &self.models[place];
        if !model.is_rigid() {
            self.tell(now_ms, Some(place), EventKind::WorkerReady { pid, weights });
        }
    }

    /// Its worker says that it cannot serve it.
    pub(super) fn worker_failed(&mut self, place: usize, code: &str, reason: &str, now_ms: u64) {
        let permanent = code != "internal";
        let model = &mut self.models[place];
        if permanent && model.is_forked && !model.was_ready {
            // What was imported for it may be all that is wrong. The next one imports by itself, and what that says counts.
            model.error = Some(reason.to_owned());
            model.last_words = Some(reason.to_owned());
            return self.end_connection(place, now_ms);
        }
        self.fail(place, code, reason, permanent, now_ms);
    }

    /// The model cannot be served: its worker is ended and, if that is `permanent`, not started again.
    pub(super) fn fail(&mut self, place: usize, code: &str, reason: &str, permanent: bool, now_ms: u64) {
        let model = &mut self.models[place];
        let is_starting = matches!(model.life(), Life::Starting { .. });
        model.error = Some(reason.to_owned());
        model.last_words = Some(reason.to_owned());
        model.say(FromServer::Shutdown { deadline_ms: self.timing.end_ms_max, reason: reason.to_owned() });
        model.cycle.note(reason);
        self.advance(place, LifeEvent::Failed { reason: reason.to_owned(), permanent });
        let model = &self.models[place];
        if model.pid.is_some() || is_starting {
            model.end.notify_one();
        }
        self.tell(
            now_ms,
            Some(place),
            EventKind::ModelFailed { code: code.to_owned(), reason: reason.to_owned() },
        );
        if permanent {
            self.refuse_parked(place, reason, None, now_ms);
        }
    }

    /// The worker broke the protocol or stopped reading: it is ended.
    pub(super) fn break_off(&mut self, place: usize, reason: String, now_ms: u64) {
        self.tell(now_ms, Some(place), EventKind::ProtocolError { reason: reason.clone() });
        let model = &mut self.models[place];
        // What it said itself explains more than how its connection ended.
        if model.last_words.is_none() {
            model.error = Some(reason.clone());
            model.last_words = Some(reason);
        }
        self.connection_over(place, now_ms);
    }

    /// The worker's connection closed.
    pub(crate) fn handle_disconnected(&mut self, greeting: Greeting, reason: Option<String>, now_ms: u64) {
        let model = &self.models[greeting.place];
        if model.pid != Some(greeting.pid) || model.connection.is_none() {
            return;
        }
        match reason {
            Some(reason) => self.break_off(greeting.place, reason, now_ms),
            None => self.connection_over(greeting.place, now_ms),
        }
        self.settle(now_ms);
    }

    /// Its worker was told to end.
    pub(super) fn end_connection(&mut self, place: usize, now_ms: u64) {
        self.connection_over(place, now_ms);
    }

    fn connection_over(&mut self, place: usize, now_ms: u64) {
        let model = &mut self.models[place];
        let id = model.id;
        model.connection = None;
        model.orders.clear();
        model.last_used_ms = model.last_used_ms.max(Some(now_ms).filter(|_| model.queue.active() > 0));
        if let Some(words) = &model.last_words {
            model.cycle.note(words.clone());
        }
        self.advance(place, LifeEvent::Lost);
        let model = &self.models[place];
        if model.pid.is_some() {
            model.end.notify_one();
        }
        self.asked.retain(|asked| asked.pending.model != id);
        // What it holds counts as held until the process is gone.
        if let Err(error) = self.book.begin_closing(id) {
            tracing::debug!(%error, "a connection without an account ended");
        }
    }

    /// The process is gone, and what it had comes back. `last_line` is the last one that it wrote to its log.
    pub(crate) fn handle_exited(
        &mut self,
        place: usize,
        exit: &Exit,
        last_line: Option<String>,
        now_ms: u64,
    ) {
        if self.models[place].connection.is_some() {
            self.connection_over(place, now_ms);
        }
        let model = &mut self.models[place];
        let id = model.id;
        let pid = model.pid.take().unwrap_or_default();
        // What a program had comes back as a worker's memory does, also where its steward ended with it.
        let child = model.child_before.take().or(model.child.take());
        model.orders.clear();
        model.forget_process();
        self.asked.retain(|asked| asked.pending.model != id);
        let (returned, returning) = match child {
            _ if !self.models[place].is_rigid() => self.depart(place, pid, now_ms),
            Some(child) => self.depart(place, child, now_ms),
            // It had a lease, and nothing was started yet.
            None => (self.book.close(id), ByteCount::ZERO),
        };
        self.models[place].is_unaccounted = false;
        if !self.models[place].is_rigid() {
            let (status, asked) = (exit.to_string(), self.stopping);
            let what = EventKind::WorkerExited { pid, status, returned, returning, asked };
            self.tell(now_ms, Some(place), what);
        }
        let model = &mut self.models[place];
        // What it said of itself, or what was wrong with it, before what it happened to print last.
        let words = model.last_words.take().or(last_line);
        let words = words.map(|words| format!(": {words}")).unwrap_or_default();
        let reason = format!("its worker {exit}{words} (its output is in {})", model.log.display());
        self.after_end(place, reason, exit.lived, now_ms);
        self.settled(now_ms);
        self.settle(now_ms);
        self.process_gone.notify_waiters();
    }

    /// What follows an end: `reason` is the one sentence that everybody hears of it, and says nothing of ends before.
    fn after_end(&mut self, place: usize, reason: String, lived: std::time::Duration, now_ms: u64) {
        let stopping = self.stopping;
        let model = &mut self.models[place];
        model.cycle.note(reason.clone());
        if stopping {
            self.advance(place, LifeEvent::GoneForGood);
            return;
        }
        if self.retired(place, now_ms) {
            return;
        }
        let model = &mut self.models[place];
        if matches!(model.life(), Life::Failed { permanent: true, .. }) {
            return;
        }
        model.quick_ends = if model.was_ready || lived >= QUICK { 0 } else { model.quick_ends + 1 };
        if model.quick_ends >= QUICK_ENDS_MAX {
            let reason = format!(
                "{reason}; it ended so {QUICK_ENDS_MAX} times in a row and is started again only when it is woken by hand"
            );
            return self.fail(place, "crash_loop", &reason, true, now_ms);
        }
        let wait = model.backoff.ended(lived);
        let delay_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let failures = model.backoff.failures();
        self.advance(place, LifeEvent::Gone { at_ms: now_ms + delay_ms, reason: reason.clone() });
        self.tell(now_ms, Some(place), EventKind::RestartScheduled { delay_ms, reason: reason.clone() });
        if failures >= FAILURES_PATIENT_MAX {
            self.refuse_parked(place, &reason, Some(wait), now_ms);
        }
        self.models[place].error = Some(reason);
    }

    /// Why requests for the model are not parked now, where they are not.
    pub(super) fn unavailable(&self, place: usize, now_ms: u64) -> Option<(String, Option<u64>)> {
        let model = &self.models[place];
        match model.life() {
            Life::Failed { reason, permanent: true } => Some((reason.clone(), None)),
            Life::Waiting { at_ms, reason } if model.backoff.failures() >= FAILURES_PATIENT_MAX => {
                Some((reason.clone(), Some(at_ms.saturating_sub(now_ms).max(1_000))))
            }
            _ => None,
        }
    }

    /// A failed model is given another try, because a person asks for it.
    pub(super) fn try_again(&mut self, place: usize, now_ms: u64) {
        let model = &mut self.models[place];
        let waits = match model.life() {
            Life::Waiting { .. } => true,
            Life::Failed { .. } => model.pid.is_none() && model.engine_missing().is_none(),
            _ => false,
        };
        if waits {
            model.backoff = crate::supervisor::Backoff::default();
            model.quick_ends = 0;
            self.advance(place, LifeEvent::AskedAgain { now_ms });
        }
    }

    /// Workers that do not say hello, or go silent while they load.
    pub(super) fn expire_lives(&mut self, now_ms: u64) {
        for place in 0..self.models.len() {
            self.expire_awaited(place, now_ms);
            let Life::Starting { heard_ms, greeted } = *self.models[place].life() else { continue };
            let allowed_ms = self.patience_ms(place, greeted);
            if self.models[place].pid.is_some() && now_ms >= heard_ms + allowed_ms {
                let what = if greeted { "it said nothing while loading" } else { "it did not say hello" };
                self.break_off(place, format!("{what} for {} s", allowed_ms / 1_000), now_ms);
            }
        }
    }

    /// How long a worker that starts may say nothing. vLLM imports and configures for long before its engine greets.
    fn patience_ms(&self, place: usize, greeted: bool) -> u64 {
        let is_vllm = self.models[place].config.engine == Engine::Vllm;
        if greeted || is_vllm { self.timing.silence_ms_max } else { self.timing.hello_ms_max }
    }

    /// When the next life may have to be acted on.
    pub(super) fn next_life_deadline(&self, now_ms: u64) -> Option<u64> {
        self.models
            .lively_places()
            .filter_map(|place| match self.models[place].life() {
                Life::Waiting { at_ms, .. } if *at_ms > now_ms => Some(*at_ms),
                Life::Awaited { until_ms } => Some(*until_ms),
                Life::Starting { heard_ms, greeted } if self.models[place].pid.is_some() => {
                    Some(heard_ms + self.patience_ms(place, *greeted))
                }
                _ => None,
            })
            .min()
    }

    /// The server is ending: workers are told, nobody is routed any more.
    pub(crate) fn handle_stop(&mut self, allowed_ms: u64, now_ms: u64) {
        if self.stopping {
            return;
        }
        self.stopping = true;
        let reason = "the server is shutting down".to_owned();
        self.tell(now_ms, None, EventKind::ServerStopping { reason: reason.clone() });
        for place in 0..self.models.len() {
            self.refuse_parked(place, &reason, None, now_ms);
            let model = &mut self.models[place];
            model.say(FromServer::Shutdown { deadline_ms: allowed_ms, reason: reason.clone() });
            model.cycle.note(reason.clone());
            if model.pid.is_some() && model.connection.is_none() {
                model.end.notify_one();
            }
            if model.pid.is_none() {
                self.advance(place, LifeEvent::GoneForGood);
            }
        }
        self.settle(now_ms);
    }

    /// Processes that are not gone yet.
    pub(crate) fn processes(&self) -> usize {
        self.models.iter().filter(|model| model.pid.is_some()).count() + self.strangers.len()
    }
}
