//! What the server knows of one model.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::drift::{Agreed, Recent};
use shoal_core::ids::ModelId;
use shoal_core::protocol::{FromServer, WorkerCapabilities, WorkerUsage};
use tokio::sync::{Notify, mpsc, oneshot};

use super::fresh::FreshKv;
use super::habits::Habits;
use super::lifecycle::{Facts, Life, Lifecycle};
use super::orders::Order;
use super::pulse::Pulse;
use super::queue::Queue;
use super::reload::Retiring;
use crate::config::{Engine, ModelConfig, ServerConfig};
use crate::shelf::Target;
use crate::state::LatencySnapshot;
use crate::supervisor::Backoff;

/// What a worker's copies need beside the weights' own bytes: the scratch of its transfers, the ends of extents.
const HOST_SPARE: ByteCount = ByteCount::mib(16);
const HOST_SPARE_PART: u64 = 64;
/// Requests that wait inside a worker so that it never lacks one to begin.
const WAITING_INSIDE_MAX: u64 = 4;
/// How many times a distribution keeps.
const LATENCIES_KEPT: usize = 512;

/// Counters since the server started.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) requests: u64,
    pub(crate) refused: u64,
    pub(crate) tokens_routed: u64,
    pub(crate) tokens_before: u64,
    pub(crate) wakes: u64,
    pub(crate) evictions: u64,
    pub(crate) evicted: ByteCount,
    pub(crate) restored: ByteCount,
    pub(crate) granted: u64,
    pub(crate) denied: u64,
}

/// The newest times of something.
#[derive(Clone, Debug, Default)]
pub(crate) struct Latencies {
    count: u64,
    newest_ms: VecDeque<f64>,
}

impl Latencies {
    pub(crate) fn push(&mut self, ms: f64) {
        self.count += 1;
        if self.newest_ms.len() == LATENCIES_KEPT {
            self.newest_ms.pop_front();
        }
        self.newest_ms.push_back(ms);
    }

    pub(crate) fn snapshot(&self) -> LatencySnapshot {
        let mut sorted: Vec<f64> = self.newest_ms.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let at =
            |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        LatencySnapshot {
            count: self.count,
            last_ms: self.newest_ms.back().copied(),
            p50_ms: at(50),
            p99_ms: at(99),
        }
    }
}

/// Host bytes that a worker needs so that none of its weights have to be read from their files again.
pub(crate) fn host_need(weights: ByteCount) -> ByteCount {
    weights.round_up_to(PAGE_BYTES) + ByteCount(weights.0 / HOST_SPARE_PART) + HOST_SPARE
}

/// One model.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "facts that do not exclude one another")]
pub(crate) struct Record {
    pub(crate) id: ModelId,
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    /// Where a worker of ours listens.
    pub(crate) socket: PathBuf,
    /// Where requests go.
    pub(crate) target: Target,
    /// The program that runs for it now, where its engine is a command.
    pub(crate) child: Option<u32>,
    /// The one that has just ended, until its lease was given back.
    pub(crate) child_before: Option<u32>,
    /// Since when its program has ended, while what it started may have its memory still and its lease is not back.
    pub(crate) ends_since_ms: Option<u64>,
    pub(crate) log: PathBuf,
    /// What the driver shows of its process; none where it shows nothing.
    pub(crate) seen: Option<ByteCount>,
    /// And what it has shown of it at most.
    pub(crate) seen_most: ByteCount,
    /// The driver has shown that its process, or its program, has something.
    pub(crate) was_shown: bool,
    /// Its lease when the driver was last asked.
    pub(crate) leased_then: ByteCount,
    /// And what its process had said by then that it has.
    pub(crate) said_then: ByteCount,
    /// What it was seen to have beyond its lease, lately.
    pub(crate) drift: Agreed,
    /// What it was seen to have beside weights and KV, lately.
    pub(crate) beside: Agreed,
    /// What it takes beside weights and KV: by its own word, and by the driver's where that was more than was leased.
    pub(crate) overhead_said: Recent,
    pub(crate) overhead_seen: Recent,
    /// What it had of that when it last had no weights, once that is known; and since when it has none, if it had some.
    pub(crate) overhead_without_weights: Option<ByteCount>,
    pub(crate) weights_left_ms: Option<u64>,
    /// It has said its figures since.
    pub(crate) is_said_without_weights: bool,
    /// What was told last: what is leased of it, and what could not be covered.
    pub(crate) overhead_told: (ByteCount, ByteCount),
    /// Host bytes that its worker would use: by its files' headers, then by its worker's word. None: not known yet.
    pub(crate) host_need: Option<ByteCount>,
    /// Host bytes that its present process may use.
    pub(crate) host_share: ByteCount,
    pub(crate) pinned: bool,
    /// It is being brought back because it was pinned; dropped when that is no longer wanted.
    pub(crate) pin_wake: Option<oneshot::Sender<()>>,

    pub(crate) cycle: Lifecycle,
    pub(crate) backoff: Backoff,
    pub(crate) starts: u32,
    pub(crate) pid: Option<u32>,
    pub(crate) connection: Option<mpsc::Sender<FromServer>>,
    pub(crate) pulse: Pulse,
    pub(crate) capabilities: Option<WorkerCapabilities>,
    pub(crate) usage: WorkerUsage,
    pub(crate) progress: Option<String>,
    pub(crate) error: Option<String>,
    /// What this process said of its failure, or what was found wrong with it.
    pub(crate) last_words: Option<String>,
    /// Why its newest process was ended, where it was silent.
    pub(crate) hung: Option<String>,
    /// It was taken off the shelf; the place is another's once its process is gone.
    pub(crate) is_removed: bool,
    /// Its worker is to go once its requests are answered.
    pub(crate) retiring: Option<Retiring>,
    /// Its process was started by a server before and has not said what it holds.
    pub(crate) is_unaccounted: bool,
    /// This process was ready once.
    pub(crate) was_ready: bool,
    /// It was forked: what it runs was imported by another process, maybe long ago.
    pub(crate) is_forked: bool,
    /// Ends in a row that came soon and of processes that were never ready.
    pub(crate) quick_ends: u32,
    /// Tells the process's task to start one.
    pub(crate) start: Arc<Notify>,
    /// Tells the process's task to end it.
    pub(crate) end: Arc<Notify>,

    pub(crate) orders: BTreeMap<u64, Order>,
    /// Who waits for it, and who has a place at it.
    pub(crate) queue: Queue,
    /// Requests that wait inside its worker for others of it: what the worker said last, less those that ended since.
    pub(crate) waiting_inside: u64,
    pub(crate) counts: Counts,
    pub(crate) first_byte_awake: Latencies,
    pub(crate) first_byte_asleep: Latencies,
    pub(crate) wake_time: Latencies,

    /// What its lease for weights is when all are there.
    pub(crate) weights_total: ByteCount,
    pub(crate) last_used_ms: Option<u64>,
    pub(crate) turn_since_ms: Option<u64>,
    /// That turn had the KV of a request from its beginning.
    pub(crate) turn_had_kv: bool,
    pub(crate) wanting_since_ms: Option<u64>,
    /// It could run a request when that was last looked at.
    pub(crate) could_run: bool,
    /// When it could last run one and then could not any more.
    pub(crate) ran_until_ms: u64,
    /// What that was before a turn began without KV, which ends if it asks for some after all.
    pub(crate) wanted_before_ms: Option<u64>,
    pub(crate) rising_until_ms: Option<u64>,
    /// How soon a request has lately followed the end of the one before.
    pub(crate) pause_ms: Option<u64>,
    /// When it last became idle.
    pub(crate) idle_since_ms: Option<u64>,
    pub(crate) skip_until_ms: u64,
    pub(super) fresh_kv: FreshKv,
    /// What its wakes brought to the device in all, also those that failed in the end, and what they copied.
    pub(crate) brought: (ByteCount, ByteCount),
    pub(crate) wake_failures: u32,
    pub(crate) wake_not_before_ms: u64,
    /// Its last wake found that what is missing is about to leave: the next comes when that has, or does not in time.
    pub(crate) wakes_after_leaving: bool,
    pub(crate) habits: Habits,
    /// Why the newest request of the present wake can never be met.
    pub(crate) never: Option<String>,
    /// What its newest lease request waits for.
    pub(crate) waits_for: Option<String>,
}

impl Record {
    pub(crate) fn new(place: usize, model: &ModelConfig, config: &ServerConfig) -> Self {
        Self {
            id: ModelId(u32::try_from(place).unwrap_or(u32::MAX)),
            name: model.name.clone(),
            target: Target::Unix(config.runtime_dir.join(format!("worker-{place}.sock"))),
            socket: config.runtime_dir.join(format!("worker-{place}.sock")),
            child: None,
            child_before: None,
            ends_since_ms: None,
            seen: None,
            seen_most: ByteCount::ZERO,
            was_shown: false,
            leased_then: ByteCount::ZERO,
            said_then: ByteCount::ZERO,
            drift: Agreed::default(),
            beside: Agreed::default(),
            overhead_said: Recent::default(),
            overhead_seen: Recent::default(),
            overhead_without_weights: None,
            weights_left_ms: None,
            is_said_without_weights: false,
            overhead_told: (ByteCount::ZERO, ByteCount::ZERO),
            log: config.log_dir.join(format!("{}.log", model.name)),
            // A command's memory is its own business.
            host_need: if model.engine == Engine::Command {
                Some(ByteCount::ZERO)
            } else {
                model.weights.map(host_need)
            },
            host_share: ByteCount::ZERO,
            pinned: model.pin,
            pin_wake: None,
            cycle: Lifecycle::new(
                Life::Waiting { at_ms: 0, reason: "the server starts".to_owned() },
                "the server starts",
            ),
            backoff: Backoff::default(),
            starts: 0,
            pid: None,
            connection: None,
            pulse: Pulse::default(),
            capabilities: None,
            usage: WorkerUsage::default(),
            progress: None,
            error: None,
            last_words: None,
            hung: None,
            is_removed: false,
            retiring: None,
            is_unaccounted: false,
            was_ready: false,
            is_forked: false,
            quick_ends: 0,
            start: Arc::new(Notify::new()),
            end: Arc::new(Notify::new()),
            orders: BTreeMap::new(),
            queue: Queue::default(),
            waiting_inside: 0,
            counts: Counts::default(),
            first_byte_awake: Latencies::default(),
            first_byte_asleep: Latencies::default(),
            wake_time: Latencies::default(),
            weights_total: ByteCount::ZERO,
            last_used_ms: None,
            turn_since_ms: None,
            turn_had_kv: false,
            wanting_since_ms: None,
            could_run: false,
            ran_until_ms: 0,
            wanted_before_ms: None,
            rising_until_ms: None,
            pause_ms: None,
            idle_since_ms: None,
            skip_until_ms: 0,
            fresh_kv: FreshKv::default(),
            brought: (ByteCount::ZERO, ByteCount::ZERO),
            wake_failures: 0,
            wake_not_before_ms: 0,
            wakes_after_leaving: false,
            habits: Habits::default(),
            never: None,
            waits_for: None,
            config: model.clone(),
        }
    }

    /// The engine's reason for not being there, where it is not.
    pub(crate) fn engine_missing(&self) -> Option<String> {
        match self.config.engine {
            Engine::Worker if self.config.args.is_empty() => {
                Some("engine = \"worker\" needs the command in args".to_owned())
            }
            Engine::Command if self.config.command.is_none() => {
                Some("engine = \"command\" needs a command".to_owned())
            }
            Engine::Transformers | Engine::Vllm | Engine::Worker | Engine::Command => None,
        }
    }

    /// A model of this configuration is kept in the same way: by a worker, or as a command.
    pub(crate) fn is_same_kind(&self, model: &ModelConfig) -> bool {
        self.is_rigid() == (model.engine == Engine::Command)
    }

    /// What its worker told of a model that it is no more.
    pub(crate) fn forget_needs(&mut self, model: &ModelConfig) {
        self.host_need = if self.is_rigid() { Some(ByteCount::ZERO) } else { model.weights.map(host_need) };
    }

    /// It gives up all that it holds or nothing.
    pub(crate) fn is_rigid(&self) -> bool {
        self.config.engine == Engine::Command
    }

    /// Bytes it was ordered to give back in time and has not yet.
    pub(crate) fn ordered(&self) -> ByteCount {
        self.orders.values().filter(|order| !order.overdue).map(Order::reclaim_left).sum()
    }

    /// Of what it was ordered to give up, weights go before what is cached.
    pub(crate) fn ordered_cached_last(&self) -> bool {
        self.orders.values().any(|order| !order.overdue && order.takes_cached_last())
    }

    /// Its program has ended, and the `weights` that are leased of it come back once what it started has ended too.
    pub(crate) const fn is_ending(&self, weights: ByteCount) -> bool {
        self.ends_since_ms.is_some() && !weights.is_zero()
    }

    pub(crate) fn wake_ordered(&self) -> bool {
        self.orders.values().any(Order::is_wake)
    }

    /// All its weights are on the device and none of them were ordered away.
    pub(crate) fn is_up(&self) -> bool {
        self.cycle.loaded() && self.retiring.is_none() && !self.orders.values().any(Order::takes_weights)
    }

    /// A request may be sent to it now: it is up, or its bytes are coming and its worker computes as they arrive.
    pub(crate) fn takes_requests(&self) -> bool {
        let is_coming = self.is_ready()
            && self.retiring.is_none()
            && self.orders.values().any(Order::is_backed_wake)
            && !self.orders.values().any(Order::takes_weights);
        is_coming || self.is_up()
    }

    /// It was told to wake, or will be once the reason why it could not is over.
    pub(crate) fn will_wake(&self, now_ms: u64) -> bool {
        let waits = self.wakes_after_leaving && self.orders.values().any(Order::takes_weights);
        waits || self.wake_ordered() || self.wake_not_before_ms > now_ms
    }

    /// Its workers listen there from now on.
    pub(crate) fn listen_at(&mut self, socket: PathBuf) {
        self.target = Target::Unix(socket.clone());
        self.socket = socket;
    }

    pub(crate) fn life(&self) -> &Life {
        self.cycle.life()
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.cycle.is_ready()
    }

    /// What names its state; `weights` are those on the device.
    pub(crate) fn facts(&self, weights: ByteCount, stopping: bool) -> Facts {
        Facts {
            weights,
            weights_ordered: self.orders.values().any(Order::takes_weights),
            wake_ordered: self.wake_ordered(),
            reclaiming: !self.ordered().is_zero() || self.is_ending(weights),
            retiring: self.retiring.is_some(),
            is_rigid: self.is_rigid(),
            was_started: self.starts > 0,
            stopping,
        }
    }

    /// One more request may be sent to it now. What its worker could not begin yet waits here rather than there, where
    /// nobody takes turns.
    pub(crate) fn has_room(&self) -> bool {
        let active = self.queue.active();
        active < u64::from(self.config.parallel_max)
            && (active == 0 || self.waiting_inside <= WAITING_INSIDE_MAX)
    }

    /// No request is at it, and none inside its worker.
    pub(crate) fn is_idle_inside(&self) -> bool {
        self.queue.active() == 0 && self.usage.requests_running + self.usage.requests_waiting == 0
    }

    pub(crate) fn is_busy(&self) -> bool {
        !self.queue.is_empty() || !self.is_idle_inside()
    }

    /// KV without which it cannot run any request, in whole pages.
    pub(crate) fn kv_min(&self) -> ByteCount {
        let declared = self.capabilities.as_ref().map_or(ByteCount::ZERO, |can| can.kv_bytes_min);
        declared.round_up_to(PAGE_BYTES)
    }

    /// A request came: notes how soon after the one before, where none was left.
    pub(crate) fn note_pause(&mut self, now_ms: u64) {
        if let Some(since_ms) = self.idle_since_ms.take() {
            let newest = now_ms.saturating_sub(since_ms);
            // What was long ago counts half with each pause.
            self.pause_ms = Some(self.pause_ms.map_or(newest, |known| known.midpoint(newest)));
        }
    }

    /// Sends a message; false where the worker does not read or is gone.
    pub(crate) fn say(&self, message: FromServer) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.try_send(message).is_ok())
    }

    /// Forgets what was measured of one process beside weights and KV, and what the driver showed of it.
    pub(crate) fn forget_overhead(&mut self) {
        self.seen = None;
        (self.leased_then, self.said_then) = (ByteCount::ZERO, ByteCount::ZERO);
        self.drift.clear();
        self.beside.clear();
        self.overhead_said = Recent::default();
        self.overhead_seen = Recent::default();
        (self.overhead_without_weights, self.weights_left_ms) = (None, None);
        self.is_said_without_weights = false;
        self.overhead_told = (ByteCount::ZERO, ByteCount::ZERO);
    }

    /// Forgets what belonged to one process.
    pub(crate) fn forget_process(&mut self) {
        self.connection = None;
        self.ends_since_ms = None;
        self.pulse = Pulse::default();
        self.host_share = ByteCount::ZERO;
        self.forget_overhead();
        self.counts.tokens_before += self.usage.tokens_out;
        self.usage = WorkerUsage { weights_total: self.usage.weights_total, ..WorkerUsage::default() };
        self.turn_since_ms = None;
        self.rising_until_ms = None;
        self.skip_until_ms = 0;
        self.fresh_kv = FreshKv::default();
        self.wake_failures = 0;
        self.wake_not_before_ms = 0;
        self.wakes_after_leaving = false;
        self.waits_for = None;
        self.waiting_inside = 0;
        self.progress = None;
    }
}
