//! One owner of everything that can change: leases, orders, parked requests, the workers' lives, and the decisions.
//!
//! [`Core`] is a state machine without I/O: what happens comes in by `handle_*` and the time with it; what follows goes
//! out as messages on the workers' bounded queues, as answers to those who wait, and as notices to the tasks that start
//! and end processes. Nothing in it waits, so one short lock around it serves both the tasks and the fast way of a
//! request for a model that is awake. Every change ends in [`Core::settle`], which asks the policy and carries its plan
//! out.
//!
//! Keeps I1 (through the [`LeaseBook`]; what a dead worker held counts until its process is gone), I10 and I11.

mod adoption;
#[cfg(test)]
mod apart_tests;
#[cfg(test)]
mod backed_tests;
mod commands;
#[cfg(test)]
mod commands_tests;
mod departed;
#[cfg(test)]
mod departed_tests;
#[cfg(test)]
mod dice;
mod driver;
mod fresh;
mod habits;
#[cfg(test)]
mod histories;
mod leases;
mod lifecycle;
mod lives;
mod orders;
#[cfg(test)]
mod orders_tests;
pub(crate) mod outside;
mod overhead;
#[cfg(test)]
mod overhead_tests;
#[cfg(test)]
mod price_tests;
mod pulse;
#[cfg(test)]
mod pulse_tests;
mod queue;
mod record;
mod records;
mod reload;
#[cfg(test)]
mod reload_tests;
mod requests;
mod settle;
mod show;
#[cfg(test)]
mod turn_tests;
mod why;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shoal_core::ids::ModelId;
use shoal_core::lease::LeaseBook;
use shoal_core::policy::{PendingRequest, Policy, Shadow, Value};
use tokio::sync::{Notify, mpsc};

use crate::config::ServerConfig;
use crate::state::{EventKind, EventLog, WeightStoreSnapshot};

pub(crate) use driver::Looked;
pub(crate) use lifecycle::{Life, LifeEvent};
#[cfg(test)]
pub(crate) use lives::Greeting;
pub(crate) use record::{Record, host_need};
pub(crate) use reload::Follow;
pub(crate) use requests::{Begun, Reached, Wanted};
pub(crate) use settle::Decision;

/// How many workers may be starting at the same time: loading is the heaviest moment of a small machine.
const STARTING_MAX: usize = 2;
/// Requests that may wait in all.
const PARKED_TOTAL_MAX: usize = 4_096;
/// Lease requests that one worker may have open.
const REQUESTS_PER_MODEL_MAX: usize = 64;
/// Events kept for those who come later.
const EVENTS_KEPT: usize = 4_096;
/// How long the requests of a command are waited for before it is ended, so that none is cut off.
pub(crate) const DRAIN_MS_MAX: u64 = 30_000;
/// Marks the server's own request for overhead that was measured and not leased.
const OVERHEAD_REQUEST: u64 = u64::MAX;

pub(crate) fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Times that are not the user's to set. All in milliseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// A busy model's turn.
    pub(crate) quantum_ms: u64,
    /// What an order to give memory up may take, besides its bytes.
    pub(crate) reclaim_ms: u64,
    /// How long a model that gave nothing is passed over.
    pub(crate) skip_ms: u64,
    /// From a worker's start to its hello.
    pub(crate) hello_ms_max: u64,
    /// The longest silence of a worker that loads.
    pub(crate) silence_ms_max: u64,
    /// How long a worker that was told to end may take before it is killed.
    pub(crate) end_ms_max: u64,
    /// How long the worker of a server before may take to say what it holds.
    pub(crate) adopt_ms_max: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            quantum_ms: 3_000,
            reclaim_ms: 2_000,
            skip_ms: 10_000,
            hello_ms_max: 120_000,
            silence_ms_max: 900_000,
            end_ms_max: 3_000,
            adopt_ms_max: 10_000,
        }
    }
}

/// A lease request that was not answered yet.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) pending: PendingRequest,
    /// The worker's words.
    pub(crate) reason: String,
    /// What the policy said last.
    pub(crate) waits_for: String,
}

/// All state.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) config: Arc<ServerConfig>,
    pub(crate) timing: Timing,
    pub(crate) book: LeaseBook,
    pub(crate) driver: driver::Driver,
    pub(crate) models: records::Records,
    pub(crate) by_name: BTreeMap<String, usize>,
    pub(crate) asked: Vec<Asked>,
    /// Those who asked when that was last looked at.
    asked_then: Vec<ModelId>,
    pub(crate) events: EventLog,
    pub(crate) started_unix_ms: u64,
    pub(crate) stopping: bool,
    pub(crate) policy: Box<dyn Policy>,
    /// One that is not ours and decides in its place, as far as its plans may be obeyed.
    pub(crate) brought: Option<Box<dyn Policy>>,
    pub(crate) shadow: Option<Shadow>,
    /// Policies in processes of their own: the one that decides, and the one that watches.
    pub(crate) outside: Option<outside::Outside>,
    pub(crate) outside_shadow: Option<outside::Outside>,
    remembered: habits::Remembered,
    /// Workers of a server before that are being ended, and what they hold is not known.
    pub(crate) strangers: BTreeSet<u32>,
    /// Workers may outlive this server.
    pub(crate) is_journaled: bool,
    decisions: u64,
    decision_log: Option<mpsc::Sender<Decision>>,
    next_number: u64,
    /// When leases for overhead may fall, by place.
    overhead_falls: BTreeMap<usize, u64>,
    /// What workers saw of the weights at rest.
    weights_store: Option<WeightStoreSnapshot>,
    /// When workers are next looked after that say nothing.
    pulse_at_ms: u64,
    /// When [`Core::handle_timer`] wants to be called.
    pub(crate) timer_ms: Option<u64>,
    /// Told when `timer_ms` moved.
    pub(crate) timer_moved: Arc<Notify>,
    /// Told when a process is gone.
    pub(crate) process_gone: Arc<Notify>,
    /// Told when the driver is to be asked before its time.
    pub(crate) look_soon: Arc<Notify>,
}

impl Core {
    pub(crate) fn new(
        config: Arc<ServerConfig>,
        timing: Timing,
        started_unix_ms: u64,
        decision_log: Option<mpsc::Sender<Decision>>,
    ) -> Self {
        let models: records::Records = config
            .models
            .iter()
            .enumerate()
            .map(|(place, model)| Record::new(place, model, &config))
            .collect();
        let by_name = models.iter().enumerate().map(|(place, model)| (model.name.clone(), place)).collect();
        let mut core = Self {
            book: LeaseBook::new(config.device_budget + config.headroom, config.headroom),
            driver: driver::Driver::default(),
            timing,
            models,
            by_name,
            asked: Vec::new(),
            asked_then: Vec::new(),
            events: EventLog::new(EVENTS_KEPT),
            started_unix_ms,
            stopping: false,
            policy: Box::new(Value),
            brought: None,
            shadow: None,
            outside: None,
            outside_shadow: None,
            remembered: habits::Remembered::default(),
            strangers: BTreeSet::new(),
            is_journaled: false,
            decisions: 0,
            decision_log,
            next_number: 0,
            overhead_falls: BTreeMap::new(),
            weights_store: None,
            pulse_at_ms: 0,
            timer_ms: None,
            timer_moved: Arc::new(Notify::new()),
            process_gone: Arc::new(Notify::new()),
            look_soon: Arc::new(Notify::new()),
            config,
        };
        let what = EventKind::ServerStarted {
            device: core.config.device.to_string(),
            budget: core.config.device_budget,
        };
        core.tell(0, None, what);
        core.choose_policies();
        core.refuse_unknown_engines();
        core
    }

    /// A number for an order or a place in a queue; never used twice.
    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// The only way a model's life changes. False where the event cannot happen there, which changes nothing.
    fn advance(&mut self, place: usize, event: LifeEvent) -> bool {
        let model = &mut self.models[place];
        let done = model.cycle.apply(event);
        if let Err(unexpected) = &done {
            tracing::error!(model = model.name, %unexpected, "a change of a model's life was refused");
        }
        done.is_ok()
    }

    pub(crate) const fn unix_ms(&self, now_ms: u64) -> u64 {
        self.started_unix_ms + now_ms
    }

    pub(crate) fn tell(&mut self, now_ms: u64, place: Option<usize>, what: EventKind) {
        let at_ms = self.unix_ms(now_ms);
        let model = place.map(|place| self.models[place].name.as_str());
        let event = self.events.push(at_ms, model, what);
        let (id, name, what) = (event.id, event.what.name(), &event.what);
        let subject = model.map_or_else(String::new, |model| format!("{model}: "));
        if what.is_trouble() {
            tracing::warn!(model, event = name, id, "{subject}{what}");
        } else {
            tracing::info!(model, event = name, id, "{subject}{what}");
        }
    }
}
