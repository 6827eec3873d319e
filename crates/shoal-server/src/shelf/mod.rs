//! The shelf: the models, the device memory they share, and the requests that wait for them.
//!
//! [`Shelf`] is the handle that the gateway, the API and the command line hold. Behind it is one
//! [`Core`](crate::broker) and a handful of tasks that carry bytes and watch processes and decide nothing: one that
//! accepts workers, two for each connection, one for each model's process, one for the clock. A model whose engine is a
//! command has a steward in its worker's place; a policy in Python has a process with a task of its own, and so has what
//! workers are forked from (`templates`).
//!
//! When the last handle is dropped, the workers end with it. When the process dies, they wait for another server, which
//! finds them by the journal (`survivors`).

mod caller;
mod error;
mod host_pool;
mod look;
mod models;
mod policy_code;
mod policy_process;
mod processes;
mod reload;
mod route;
mod runtime_dir;
mod steward;
mod survivors;
mod tasks;
mod templates;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::policy::Policy;
use shoal_device::gauge::{Gauge, GaugeError};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::broker::{Begun, Core, Reached, Timing, Wanted, millis};
use crate::config::{Budgets, ServerConfig};
use crate::control::Listener;
use crate::state::{Event, Missed, ShelfSnapshot, Why};
use crate::supervisor::Journal;

pub use caller::Caller;
pub use error::{RouteError, ShelfError};
use host_pool::HostPool;
pub(crate) use policy_code::Code;
pub use reload::Reloaded;
pub use route::{Report, Route, RouteSink, Target};
use runtime_dir::{DiskDirs, RuntimeDir};
use templates::Templates;

/// All models and what they share. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Shelf {
    handle: Arc<Handle>,
}

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.cancel.cancel();
    }
}

/// What tasks and handles share.
#[derive(Debug)]
pub(crate) struct Shared {
    core: Mutex<Core>,
    /// Memory of the workers' host copies.
    pool: Mutex<HostPool>,
    /// Which workers there are, for a server after this one.
    journal: Mutex<Journal>,
    /// What workers are forked from.
    templates: Templates,
    base: tokio::time::Instant,
    cancel: CancellationToken,
    /// Held as long as anything of this server runs.
    _runtime_dir: RuntimeDir,
    _disk_dirs: DiskDirs,
}

impl Shared {
    fn now_ms(&self) -> u64 {
        millis(self.base.elapsed())
    }

    fn at_ms(&self, at: Instant) -> u64 {
        let base = self.base.into_std();
        millis(at.saturating_duration_since(base))
    }

    /// Hands the core the present moment. Short: nothing in it waits.
    fn with<T>(&self, act: impl FnOnce(&mut Core, u64) -> T) -> T {
        let mut core = self.core.lock();
        // Taken under the lock, so that time never runs backwards inside.
        let now_ms = self.now_ms();
        act(&mut core, now_ms)
    }

    /// Waits until `model` is there, as one who wants `wanted` of it.
    async fn reach(
        self: &Arc<Self>,
        model: &str,
        wanted: Wanted,
        deadline: Instant,
    ) -> Result<Reached, RouteError> {
        let deadline_ms = self.at_ms(deadline);
        let begun =
            self.with(|core, now_ms| core.handle_wanted(model, wanted.clone(), now_ms, deadline_ms))?;
        let asked = Instant::now();
        let (place, ticket, answer) = match begun {
            Begun::Reached(reached) => return Ok(reached),
            Begun::Parked { place, ticket, answer } => (place, ticket, answer),
        };
        // Gives the place up when this future is dropped; hands an answer that nobody took back.
        let mut waiting = tasks::Waiting { shared: Arc::clone(self), place, ticket, wanted, answer };
        match tokio::time::timeout_at(deadline.into(), &mut waiting.answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(RouteError::ShuttingDown),
            // An answer that crossed the deadline counts.
            Err(_) => {
                if let Ok(answer) = waiting.answer.try_recv() {
                    return answer;
                }
                let reason = waiting.give_up();
                Err(RouteError::Deadline { model: model.to_owned(), waited: asked.elapsed(), reason })
            }
        }
    }
}

impl Shelf {
    /// Makes the runtime directory this server's own, listens for workers and starts one for each model. Gives at once:
    /// workers come up one after another, and nothing is on the device until a model is used.
    ///
    /// Must be called inside a tokio runtime (it panics outside of one).
    ///
    /// # Errors
    /// [`ShelfError`]: another server has the directory, a directory cannot be written, minimums that do not fit.
    pub fn start(config: Arc<ServerConfig>) -> Result<Self, ShelfError> {
        Self::start_with(config, None)
    }

    /// [`Shelf::start`] with a policy that is not among ours. Each of its plans is checked before it is obeyed
    /// ([`shoal_core::policy::check`]); in place of one that must not be, the configured policy decides, and an event says so.
    ///
    /// # Errors
    /// As [`Shelf::start`].
    pub fn start_with(
        config: Arc<ServerConfig>,
        policy: Option<Box<dyn Policy>>,
    ) -> Result<Self, ShelfError> {
        let opener = look::opener(&config);
        Self::start_by(config, policy, opener)
    }

    /// [`Shelf::start_with`], with another gauge of the device than the configured device's. `open` is called on the
    /// thread that reads it, at first and after each reading that failed.
    ///
    /// # Errors
    /// As [`Shelf::start`].
    pub fn start_measured(
        config: Arc<ServerConfig>,
        policy: Option<Box<dyn Policy>>,
        open: impl FnMut() -> Result<Box<dyn Gauge>, GaugeError> + Send + 'static,
    ) -> Result<Self, ShelfError> {
        Self::start_by(config, policy, Some(Box::new(open)))
    }

    fn start_by(
        config: Arc<ServerConfig>,
        policy: Option<Box<dyn Policy>>,
        opener: Option<look::Opener>,
    ) -> Result<Self, ShelfError> {
        let sum: ByteCount = config.models.iter().filter_map(|model| model.min).sum();
        if sum > config.device_budget {
            return Err(ShelfError::Minimums { sum, budget: config.device_budget });
        }
        let runtime_dir = RuntimeDir::take(&config)?;
        let disk_dirs = DiskDirs::take(&config)?;
        let path = config.control_socket();
        let listener = Listener::bind(&path).map_err(|error| ShelfError::Io {
            what: "cannot listen at",
            path,
            source: std::io::Error::other(error),
        })?;
        let decisions = tasks::decision_log(&config.log_dir);
        let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let timing = Timing { quantum_ms: millis(config.quantum), ..Timing::default() };
        let host_memory = config.host_memory;
        let found = survivors::find(&config, Journal::read(&config.journal()).workers, millis(unix));
        survivors::tidy(&config, &found);
        let budgets = Budgets { device: config.device_budget, host: config.host_budget };
        let entries = found.iter().map(|found| found.entry.clone()).collect();
        let journal = Journal::begin(config.journal(), budgets, entries);
        let sockets = survivors::sockets(&config, &found);
        let mut core = Core::new(config, timing, millis(unix), Some(decisions));
        core.brought = policy;
        for (model, socket) in core.models.iter_mut().zip(sockets) {
            model.listen_at(socket);
        }
        for found in &found {
            match &found.model {
                Ok(place) => core.expect_worker(*place, &found.entry, 0),
                Err(reason) => core.expect_end(&found.entry, reason, 0),
            }
        }
        core.is_journaled = journal.is_kept();
        let shared = Arc::new(Shared {
            pool: Mutex::new(HostPool::new(host_memory, core.models.len())),
            journal: Mutex::new(journal),
            templates: Templates::default(),
            core: Mutex::new(core),
            base: tokio::time::Instant::now(),
            cancel: CancellationToken::new(),
            _runtime_dir: runtime_dir,
            _disk_dirs: disk_dirs,
        });
        tasks::start(&shared, listener, found);
        if let Some(opener) = opener {
            tokio::spawn(look::keep(Arc::clone(&shared), opener));
        }
        policy_process::keep_all(&shared);
        shared.with(Core::handle_timer);
        Ok(Self { handle: Arc::new(Handle { shared }) })
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    /// Everything, at this moment.
    #[must_use]
    pub fn snapshot(&self) -> ShelfSnapshot {
        self.shared().with(|core, now_ms| core.snapshot(now_ms))
    }

    /// Why a model is as it is, with the newest `last` decisions about it.
    ///
    /// # Errors
    /// [`ShelfError::UnknownModel`].
    pub fn why(&self, model: &str, last: usize) -> Result<Why, ShelfError> {
        self.shared().with(|core, now_ms| Ok(core.why(core.shelf_place(model)?, last, now_ms)))
    }

    /// Whether there is a model of that name whose requests must be of OpenAI's form. What a command accepts is its own
    /// business.
    #[must_use]
    pub fn is_strict(&self, model: &str) -> bool {
        self.shared()
            .with(|core, _| core.by_name.get(model).is_some_and(|place| !core.models[*place].is_rigid()))
    }

    /// Whether a model of that name is awake now.
    #[must_use]
    pub fn is_awake(&self, model: &str) -> bool {
        self.shared().with(|core, _| core.by_name.get(model).is_some_and(|place| core.models[*place].is_up()))
    }

    /// Why the newest worker of a model was ended, where it had to be.
    #[must_use]
    pub fn trouble(&self, model: &str) -> Option<String> {
        self.shared().with(|core, _| core.trouble_of(model))
    }

    /// How far a model that `caller` waits for is, in a few words; none where there is nothing to say.
    #[must_use]
    pub fn progress(&self, model: &str, caller: &Caller) -> Option<String> {
        self.shared().with(|core, _| core.progress_of(*core.by_name.get(model)?, caller))
    }

    /// Events from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<Event>> {
        self.shared().with(|core, _| core.events.subscribe())
    }

    /// Events after `id`, oldest first.
    ///
    /// # Errors
    /// [`Missed`] where some are no longer kept.
    pub fn events_since(&self, id: u64) -> Result<Vec<Arc<Event>>, Missed> {
        self.shared().with(|core, _| core.events.since(id))
    }

    /// [`Shelf::route_for`] one who shows no key.
    ///
    /// # Errors
    /// [`RouteError`].
    pub async fn route(&self, model: &str, deadline: Instant) -> Result<Route, RouteError> {
        self.route_for(model, &Caller::default(), deadline).await
    }

    /// The way of one request of `caller` to `model`. At once where it is awake and has a place for it; else the request
    /// is parked, one wake for all of them, and its turn comes as is fair to all callers. Dropping the future gives the place
    /// in the queue up.
    ///
    /// # Errors
    /// [`RouteError`].
    pub async fn route_for(
        &self,
        model: &str,
        caller: &Caller,
        deadline: Instant,
    ) -> Result<Route, RouteError> {
        let reached = self.reach(model, Wanted::Route(caller.clone()), deadline).await?;
        let waited = Duration::from_millis(reached.waited_ms);
        let sink = Arc::new(tasks::Sink::new(Arc::clone(self.shared()), reached.place, caller.clone()));
        Ok(Route::new(reached.target, waited, reached.was_asleep, Some(sink)))
    }

    async fn reach(&self, model: &str, wanted: Wanted, deadline: Instant) -> Result<Reached, RouteError> {
        self.shared().reach(model, wanted, deadline).await
    }

    /// Brings a model's weights to the device. A failed model's worker is given another try.
    ///
    /// # Errors
    /// [`ShelfError`].
    pub async fn wake(&self, model: &str, deadline: Instant) -> Result<Report, ShelfError> {
        let began = Instant::now();
        let refused = |reason: String| ShelfError::Refused { model: model.to_owned(), reason };
        let reached = self.reach(model, Wanted::Wake, deadline).await.map_err(|error| match error {
            RouteError::UnknownModel { name, known } => ShelfError::UnknownModel { name, known },
            RouteError::Failed { reason, .. } => refused(reason),
            RouteError::Deadline { model, waited, reason } => ShelfError::Deadline { model, waited, reason },
            RouteError::ShuttingDown => ShelfError::ShuttingDown,
            full @ (RouteError::Full { .. } | RouteError::KeyFull { .. }) => refused(full.to_string()),
        })?;
        let summary = if reached.was_asleep { "it was woken" } else { "it was awake" }.to_owned();
        let (bytes, copied) = reached.brought;
        Ok(self.report(reached.place, bytes, copied, began, summary))
    }

    /// Takes a model's weights off the device, but for the part `keep` (0 to 1), and its KV.
    ///
    /// # Errors
    /// [`ShelfError`].
    pub async fn sleep(&self, model: &str, keep: f64, deadline: Instant) -> Result<Report, ShelfError> {
        let began = Instant::now();
        let (place, told) = self.shared().with(|core, now_ms| core.handle_sleep(model, keep, now_ms))?;
        let Some(told) = told else {
            let summary = "it held no more than that".to_owned();
            return Ok(self.report(place, ByteCount::ZERO, ByteCount::ZERO, began, summary));
        };
        match tokio::time::timeout_at(deadline.into(), told).await {
            Ok(Ok(told)) => {
                let summary = told
                    .error
                    .unwrap_or_else(|| format!("it gave {} up in {} ms", told.bytes, told.duration_ms));
                Ok(self.report(place, told.bytes, told.copied, began, summary))
            }
            Ok(Err(_)) => Err(ShelfError::Refused {
                model: model.to_owned(),
                reason: "its worker ended meanwhile".to_owned(),
            }),
            Err(_) => Err(ShelfError::Deadline {
                model: model.to_owned(),
                waited: began.elapsed(),
                reason: "its worker has not answered the order".to_owned(),
            }),
        }
    }

    /// Makes a model stay on the device, or lets it go again. One that is not there is brought back meanwhile, within
    /// the longest wait of requests; if that fails, an event and the model's `error` say why, and the pin stays. Must be
    /// called inside a tokio runtime.
    ///
    /// # Errors
    /// [`ShelfError::UnknownModel`].
    pub fn pin(&self, model: &str, pinned: bool) -> Result<Report, ShelfError> {
        let began = Instant::now();
        let (place, wake) = self.shared().with(|core, now_ms| core.handle_pin(model, pinned, now_ms))?;
        let summary = match (pinned, &wake) {
            (true, None) => "it stays on the device",
            (true, Some(_)) => {
                "it is pinned and is being brought to the device; its status tells when it is there"
            }
            (false, _) => "it may be evicted",
        };
        if let Some(unwanted) = wake {
            let (shared, name) = (Arc::clone(self.shared()), model.to_owned());
            tokio::spawn(tasks::bring_pinned(shared, place, name, unwanted));
        }
        Ok(self.report(place, ByteCount::ZERO, ByteCount::ZERO, began, summary.to_owned()))
    }

    fn report(
        &self,
        place: usize,
        bytes: ByteCount,
        copied: ByteCount,
        began: Instant,
        summary: String,
    ) -> Report {
        let (model, status) =
            self.shared().with(|core, _| (core.models[place].name.clone(), core.status_of(place)));
        Report { model, status, bytes, copied, duration_ms: began.elapsed().as_secs_f64() * 1_000.0, summary }
    }

    /// Tells every worker to finish, waits for them until `deadline`, and kills those that are left.
    pub async fn shutdown(&self, deadline: Instant) {
        let shared = self.shared();
        let allowed = deadline.saturating_duration_since(Instant::now());
        let gone = shared.with(|core, now_ms| {
            core.handle_stop(millis(allowed), now_ms);
            Arc::clone(&core.process_gone)
        });
        let all_gone = || async {
            loop {
                let notified = gone.notified();
                tokio::pin!(notified);
                notified.as_mut().enable();
                if shared.with(|core, _| core.processes()) == 0 {
                    return;
                }
                notified.await;
            }
        };
        if tokio::time::timeout_at(deadline.into(), all_gone()).await.is_err() {
            let left = shared.with(|core, _| core.processes());
            tracing::warn!(left, "workers did not end in time and are killed");
        }
        // Whatever is left is killed by its task. The journal goes once nothing is left to be found.
        shared.cancel.cancel();
        let _in_time = tokio::time::timeout(tasks::KILLED_WAIT_MAX, all_gone()).await;
        shared.templates.close().await;
        shared.journal.lock().close();
    }
}
