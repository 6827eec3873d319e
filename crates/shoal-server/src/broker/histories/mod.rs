//! Seeded histories of the core in virtual time: requests, kills of workers and of the server, failures, orders that are
//! refused or ignored, workers that stop and answer nothing, others that come to the device and leave it, a driver that
//! answers late, hides processes or is silent, against the production policy, with workers that are numbers. After every
//! step I1 holds and nobody who waits is forgotten; when the disorder ends, every model serves again. A seed replays exactly.

mod long;
mod shelf;
mod wakes;

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use shoal_core::bytes::ByteCount;
use shoal_core::drift::{ProcessReading, Reading};
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, WorkerCapabilities, WorkerHolds, WorkerUsage};
use tokio::sync::{mpsc, oneshot};

use super::dice::Dice;
use super::{Begun, Core, Greeting, Life, Looked, Reached, Timing, Wanted};
use crate::shelf::{Caller, RouteError};
use crate::supervisor::{Entry, Exit};
pub(super) use shelf::config;
use shelf::{answers, hides};

const MODELS: usize = 3;
const WEIGHTS: ByteCount = ByteCount::mib(40);
const BUDGET: ByteCount = ByteCount::mib(100);
const STEPS: usize = 200;
/// As long as a model can be kept waiting by two others that use their whole turns, and by retries of wakes.
const CALM_MS: u64 = 60_000;

/// A worker process: what it holds, and what it was told and has not done.
#[expect(clippy::struct_excessive_bools, reason = "facts that do not exclude one another")]
struct Worker {
    pid: u32,
    heard: Option<mpsc::Receiver<FromServer>>,
    is_ready: bool,
    held: ByteCount,
    requests: u64,
    /// The wake under way, and the lease request that it waits for.
    wake: Option<(u64, u64)>,
    /// A wake whose bytes are coming: its order, how many, and what it will fail with.
    coming: Option<(u64, ByteCount, Option<String>)>,
    /// It had another server before.
    had_server: bool,
    /// It asked that one for so many bytes in this request.
    open: Option<(u64, ByteCount)>,
    /// It will not say what it holds.
    is_silent: bool,
    /// Its process does not run.
    is_stopped: bool,
    orders: VecDeque<FromServer>,
}

fn entry(place: usize, pid: u32) -> Entry {
    Entry {
        model: format!("m{place}"),
        pid,
        start: 1,
        socket: PathBuf::from("/none/worker-0.sock"),
        fingerprint: String::new(),
        log: PathBuf::from("/none"),
        log_from: 0,
        starts: 1,
        at_ms: 0,
    }
}

struct Client {
    place: usize,
    wanted: Wanted,
    ticket: u64,
    deadline_ms: u64,
    answer: oneshot::Receiver<Result<Reached, RouteError>>,
}

struct World {
    seed: u64,
    core: Core,
    dice: Dice,
    now_ms: u64,
    workers: BTreeMap<usize, Worker>,
    clients: Vec<Client>,
    routed: Vec<(usize, Caller)>,
    /// Workers of a server before that are being ended, and what they hold.
    strangers: Vec<(u32, ByteCount)>,
    pids: u32,
    is_calm: bool,
    /// The server is never killed.
    lives_on: bool,
    /// Nothing fails, and nobody has to be served yet.
    is_still: bool,
    /// What others have of the device.
    others: ByteCount,
    /// What the device still has of processes that are gone, and until when.
    lingering: Vec<(u32, ByteCount, u64)>,
    /// A reading on its way.
    looked: Option<Looked>,
    /// Readings that counted.
    looks: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut core = Self::core(seed);
        core.handle_timer(0);
        Self {
            seed,
            core,
            dice: Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
            now_ms: 0,
            workers: BTreeMap::new(),
            clients: Vec::new(),
            routed: Vec::new(),
            strangers: Vec::new(),
            pids: 100,
            is_calm: false,
            is_still: false,
            lives_on: false,
            others: ByteCount::ZERO,
            lingering: Vec::new(),
            looked: None,
            looks: 0,
        }
    }

    /// Time goes by, up to `ms`; timers ring when they want to, deadlines pass.
    fn pass(&mut self, ms: u64) {
        let until = self.now_ms + ms;
        loop {
            let timer = self.core.timer_ms.filter(|at| *at <= until);
            let late = self.clients.iter().map(|client| client.deadline_ms).min().filter(|at| *at <= until);
            let Some(at) = timer.into_iter().chain(late).min() else { break };
            self.now_ms = self.now_ms.max(at);
            if timer == Some(at) {
                self.core.handle_timer(self.now_ms);
            }
            self.expire();
            self.check();
        }
        self.now_ms = until;
    }

    fn expire(&mut self) {
        let now_ms = self.now_ms;
        let mut left = Vec::new();
        for mut client in std::mem::take(&mut self.clients) {
            match client.answer.try_recv() {
                Ok(Ok(reached)) => self.begun(&client.wanted, reached.place),
                Ok(Err(_)) => {}
                Err(oneshot::error::TryRecvError::Closed) => {
                    panic!("seed {}: a request was forgotten", self.seed)
                }
                Err(oneshot::error::TryRecvError::Empty) if client.deadline_ms <= now_ms => {
                    let reason = self.core.handle_too_late(client.place, client.ticket, now_ms);
                    assert!(!self.is_calm, "seed {}: {reason}", self.seed);
                }
                Err(oneshot::error::TryRecvError::Empty) => left.push(client),
            }
        }
        self.clients.extend(left);
    }

    fn say(&mut self, place: usize, message: FromWorker) {
        let Some(pid) = self.workers.get(&place).map(|worker| worker.pid) else { return };
        self.core.handle_message(place, pid, message, self.now_ms);
    }

    fn check(&self) {
        self.core.book.check_invariants();
        assert!(self.core.book.leased() <= BUDGET, "I1");
        let shares: ByteCount = self.core.models.iter().map(|model| model.host_share).sum();
        assert!(shares <= self.core.config.host_budget, "I1: of the host, with what keeps KV in it");
        let mut held_in_all: ByteCount = self.strangers.iter().map(|(_, held)| *held).sum();
        for (place, worker) in &self.workers {
            let held = self.core.book.held(self.core.models[*place].id, LeaseKind::Weights);
            let is_known = !self.core.models[*place].is_unaccounted;
            assert!(
                !is_known || worker.held <= held,
                "seed {}: {} held, {held} leased",
                self.seed,
                worker.held
            );
            assert_eq!(self.core.models[*place].pid, Some(worker.pid), "seed {}: two owners", self.seed);
            held_in_all += worker.held;
        }
        assert!(held_in_all <= BUDGET, "I1: by what workers hold");
        let held = |place: usize| self.core.book.held(self.core.models[place].id, LeaseKind::Weights);
        assert!(
            self.core.models[0].config.apart.is_empty() || held(0).is_zero() || held(1).is_zero(),
            "seed {}: m0 and m1 are on the device together",
            self.seed
        );
        let parked: usize = self.core.models.iter().map(|model| model.queue.len()).sum();
        assert!(parked <= self.clients.len(), "seed {}: somebody waits whom nobody knows", self.seed);
        for model in &self.core.models {
            assert!(model.queue.len() <= 4, "I10");
            let active = model.queue.active();
            let routed = self.routed.iter().filter(|(place, _)| self.core.models[*place].name == model.name);
            assert!(active <= u64::from(model.config.parallel_max), "seed {}", self.seed);
            assert!(routed.count() as u64 <= active, "seed {}: a place was given twice", self.seed);
            let is_line = model.takes_requests() && model.has_room() && model.queue.requests() > 0;
            assert!(!is_line, "seed {}: a place is free and somebody waits for it", self.seed);
            assert!(model.is_ready() || !model.cycle.loaded());
        }
    }

    /// What the tasks around the core do: processes start and end.
    fn keep_processes(&mut self) {
        if !self.strangers.is_empty() && (self.is_calm || self.dice.chance(20)) {
            let (pid, _) = self.strangers.remove(0);
            self.core.handle_stranger_gone(pid, self.now_ms);
        }
        for place in 0..MODELS {
            let (start, end) = {
                let model = &self.core.models[place];
                (Arc::clone(&model.start), Arc::clone(&model.end))
            };
            if !self.workers.contains_key(&place) && start.notified().now_or_never().is_some() {
                let _stale = end.notified().now_or_never();
                if !self.is_steady() && self.dice.chance(5) {
                    self.core.handle_not_started(place, "no such program".to_owned(), self.now_ms);
                    continue;
                }
                self.pids += 1;
                let worker = Worker {
                    pid: self.pids,
                    heard: None,
                    is_ready: false,
                    held: ByteCount::ZERO,
                    requests: 0,
                    wake: None,
                    coming: None,
                    had_server: false,
                    open: None,
                    is_silent: false,
                    is_stopped: false,
                    orders: VecDeque::new(),
                };
                self.workers.insert(place, worker);
                self.core.handle_started(place, self.pids, self.now_ms);
            } else if self.workers.contains_key(&place) && end.notified().now_or_never().is_some() {
                self.exit(place);
            }
        }
    }

    fn exit(&mut self, place: usize) {
        let Some(worker) = self.workers.remove(&place) else { return };
        // What one held that had not said so yet is known to nobody; it counts as others' once it is seen.
        let is_known = !self.core.models[place].is_unaccounted && self.core.driver.is_heard();
        if is_known && !self.is_calm && self.dice.chance(60) && !worker.held.is_zero() {
            let until_ms = self.now_ms + self.dice.roll(3_000);
            self.lingering.push((worker.pid, worker.held, until_ms));
        }
        if worker.heard.is_some() && self.dice.chance(50) {
            let greeting = Greeting { place, pid: worker.pid };
            self.core.handle_disconnected(greeting, None, self.now_ms);
        }
        let exit = Exit {
            status: Some(ExitStatus::from_raw(9)),
            lived: Duration::from_millis(self.dice.roll(90_000)),
        };
        self.core.handle_exited(place, &exit, None, self.now_ms);
        // It answered nobody: its requests are over.
        while let Some(index) = self.routed.iter().position(|routed| routed.0 == place) {
            let (place, caller) = self.routed.remove(index);
            self.core.handle_route_ended(place, &caller, self.now_ms);
        }
    }

    /// A worker takes what it was told, and shows that it lives where it is asked.
    fn hear(&mut self, place: usize) {
        let Some(worker) = self.workers.get_mut(&place) else { return };
        let mut pings = Vec::new();
        while let Some(message) = worker.heard.as_mut().and_then(|heard| heard.try_recv().ok()) {
            match message {
                FromServer::Ping { ping } => pings.push(ping),
                other => worker.orders.push_back(other),
            }
        }
        for ping in pings {
            self.say(place, FromWorker::Pong { ping });
        }
    }

    /// One worker does the next thing that it has to.
    fn work(&mut self, place: usize) {
        let (now_ms, is_steady) = (self.now_ms, self.is_steady());
        let Some(worker) = self.workers.get_mut(&place) else { return };
        if worker.is_stopped {
            worker.is_stopped = is_steady || !self.dice.chance(2);
            return;
        }
        if worker.heard.is_none() {
            if worker.is_silent {
                return;
            }
            let (sender, receiver) = mpsc::channel(64);
            let pid = worker.pid;
            let can = WorkerCapabilities { weights_bytes: WEIGHTS, ..WorkerCapabilities::default() };
            let usage = WorkerUsage { weights_device: worker.held, ..WorkerUsage::default() };
            let holds = worker.had_server.then(|| WorkerHolds {
                weights: worker.held,
                host_budget: ByteCount::mib(1),
                capabilities: worker.is_ready.then_some(can),
                usage,
                ..WorkerHolds::default()
            });
            let open = worker.open.take();
            worker.heard = Some(receiver);
            let name = self.core.models[place].name.clone();
            if self.core.handle_greeted(&name, pid, sender, holds.as_ref(), now_ms).is_err() {
                return self.exit(place);
            }
            if answers(self.seed) {
                self.core.handle_answers(place, now_ms);
            }
            if let Some((request, bytes)) = open {
                self.request(place, request, bytes);
            }
            return;
        }
        self.hear(place);
        let Some(worker) = self.workers.get_mut(&place) else { return };
        if !worker.is_ready {
            worker.is_ready = true;
            if !is_steady && self.dice.chance(4) {
                let code = if self.dice.chance(50) { "internal" } else { "device" }.to_owned();
                return self.say(place, FromWorker::Failed { code, message: "a test".to_owned() });
            }
            let capabilities = WorkerCapabilities { weights_bytes: WEIGHTS, ..WorkerCapabilities::default() };
            return self.say(place, FromWorker::Ready { capabilities });
        }
        if let Some(coming) = worker.coming.take() {
            return self.end_coming(place, coming);
        }
        match worker.orders.pop_front() {
            Some(FromServer::Wake { order, .. }) => {
                let missing = WEIGHTS.saturating_sub(worker.held);
                if missing.is_zero() {
                    return self.done(place, order, ByteCount::ZERO, None);
                }
                worker.requests += 1;
                let request = worker.requests;
                worker.wake = Some((order, request));
                self.request(place, request, missing);
            }
            Some(FromServer::LeaseGrant { request, bytes, .. }) => self.granted(place, request, bytes),
            Some(FromServer::LeaseDeny { request, reason }) => {
                let Some((order, _)) = worker.wake.take_if(|(_, waits)| *waits == request) else { return };
                self.done(place, order, ByteCount::ZERO, Some(reason));
            }
            Some(FromServer::Reclaim { order, bytes, .. }) => {
                if !is_steady && self.dice.chance(10) {
                    return; // it never answers
                }
                let some = if !is_steady && self.dice.chance(20) { ByteCount(bytes.0 / 2) } else { bytes };
                let some = some.min(worker.held);
                worker.held -= some;
                if !some.is_zero() {
                    self.say(place, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: some });
                }
                self.usage(place);
                self.done(place, order, some, None);
            }
            Some(FromServer::Shutdown { .. }) => self.exit(place),
            _ => {}
        }
    }

    fn request(&mut self, place: usize, request: u64, bytes: ByteCount) {
        let said = FromWorker::LeaseRequest {
            request,
            kind: LeaseKind::Weights,
            bytes,
            bytes_min: bytes,
            deadline_ms: 5_000,
            reason: "its weights".to_owned(),
        };
        self.say(place, said);
    }

    const fn is_steady(&self) -> bool {
        self.is_calm || self.is_still
    }

    /// What everybody has of the device.
    fn used(&self) -> ByteCount {
        let workers = self.workers.values().map(|worker| worker.held);
        let lingering = self.lingering.iter().map(|(_, bytes, _)| *bytes);
        let strangers = self.strangers.iter().map(|(_, held)| *held);
        self.others + workers.chain(lingering).chain(strangers).sum()
    }

    /// The driver is asked; its answer counts when it comes.
    fn look(&mut self) {
        self.lingering.retain(|(_, _, until_ms)| *until_ms > self.now_ms);
        let begun_ms = self.core.begin_look(self.now_ms);
        let of = |process, bytes| ProcessReading { process, bytes: Some(bytes) };
        let workers = self.workers.values().map(|worker| of(worker.pid, worker.held));
        let lingering = self.lingering.iter().map(|(pid, bytes, _)| of(*pid, *bytes));
        let others = [of(1, self.others)].into_iter();
        let hides = hides(self.seed);
        let processes = workers.chain(lingering).chain(others).filter(|_| !hides).collect();
        let reading = Reading { total: BUDGET, free: BUDGET.saturating_sub(self.used()), processes };
        self.looked = Some(Looked { reading, begun_ms, ..Looked::default() });
    }

    fn see(&mut self) {
        if let Some(looked) = self.looked.take() {
            self.looks += 1;
            self.core.handle_looked(looked, self.now_ms);
        }
    }

    /// The server is killed, and another begins: clients are lost, workers are not, but for those that die meanwhile.
    fn restart(&mut self) {
        self.core = World::core(self.seed);
        // The journal has those that the server before still waited to be rid of, too.
        for (pid, _) in &self.strangers {
            self.core.expect_end(&entry(0, *pid), "a test", self.now_ms);
        }
        self.clients.clear();
        self.routed.clear();
        // Of these no server knows any more; they are others'.
        let lost: ByteCount = self.lingering.drain(..).map(|(_, bytes, _)| bytes).sum();
        self.others += lost;
        self.looked = None;
        let mut gone = Vec::new();
        for (place, worker) in &mut self.workers {
            let was_greeted = worker.heard.take().is_some() || worker.had_server;
            worker.orders.clear();
            worker.coming = None;
            let open = worker.wake.take().map(|(_, request)| (request, WEIGHTS.saturating_sub(worker.held)));
            worker.had_server = was_greeted;
            worker.open = worker.open.or(open);
            let entry = entry(*place, worker.pid);
            match self.dice.roll(10) {
                // One that was not welcome yet ends with its server.
                0 => gone.push(*place),
                _ if !was_greeted => gone.push(*place),
                1 => {
                    self.core.expect_end(&entry, "a test", self.now_ms);
                    self.strangers.push((worker.pid, worker.held));
                    gone.push(*place);
                }
                sides => {
                    worker.is_silent = sides == 2;
                    self.core.expect_worker(*place, &entry, self.now_ms);
                }
            }
        }
        for place in gone {
            self.workers.remove(&place);
        }
        self.core.handle_timer(self.now_ms);
    }

    fn core(seed: u64) -> Core {
        let timing = Timing { quantum_ms: 300, ..Timing::default() };
        Core::new(Arc::new(config(seed)), timing, 1_000_000, None)
    }

    fn done(&mut self, place: usize, order: u64, bytes: ByteCount, error: Option<String>) {
        let said = FromWorker::OrderDone { order, bytes, copied: ByteCount::ZERO, duration_us: 1, error };
        self.say(place, said);
    }

    fn usage(&mut self, place: usize) {
        let Some(worker) = self.workers.get(&place) else { return };
        let usage =
            WorkerUsage { weights_device: worker.held, weights_total: WEIGHTS, ..WorkerUsage::default() };
        self.say(place, FromWorker::Usage { usage });
    }

    fn ask(&mut self, place: usize, wanted: Wanted, wait_ms: u64) {
        let deadline_ms = self.now_ms + wait_ms;
        let name = self.core.models[place].name.clone();
        match self.core.handle_wanted(&name, wanted.clone(), self.now_ms, deadline_ms) {
            Ok(Begun::Reached(reached)) => self.begun(&wanted, reached.place),
            Ok(Begun::Parked { place, ticket, answer }) => {
                self.clients.push(Client { place, wanted, ticket, deadline_ms, answer });
            }
            Err(error) => assert!(!self.is_calm, "seed {}: {error}", self.seed),
        }
    }

    /// Somebody goes away, and may have been answered in the same moment.
    fn leave(&mut self, mut client: Client) {
        client.answer.close();
        match client.answer.try_recv() {
            Ok(Ok(reached)) => self.begun(&client.wanted, reached.place),
            Ok(Err(_)) => {}
            Err(_) => self.core.handle_left(client.place, client.ticket, self.now_ms),
        }
    }

    fn caller(&mut self) -> Caller {
        Caller::new(["alice", "bob", "carol"][self.dice.index(3)], true)
    }

    fn begun(&mut self, wanted: &Wanted, place: usize) {
        if let Wanted::Route(caller) = wanted {
            self.routed.push((place, caller.clone()));
        }
    }

    /// One thing happens that nobody asked for.
    fn disturb(&mut self) {
        let place = self.dice.index(MODELS);
        let name = self.core.models[place].name.clone();
        match self.dice.roll(100) {
            0..40 => {
                let wait_ms = 100 + self.dice.roll(20_000);
                let caller = self.caller();
                self.ask(place, Wanted::Route(caller), wait_ms);
            }
            40..60 if !self.routed.is_empty() => {
                let index = self.dice.index(self.routed.len());
                let (place, caller) = self.routed.swap_remove(index);
                self.core.handle_route_ended(place, &caller, self.now_ms);
            }
            60..68 => self.exit(place),
            68..75 if !self.clients.is_empty() => {
                let index = self.dice.index(self.clients.len());
                let client = self.clients.swap_remove(index);
                self.leave(client);
            }
            75..85 => {
                let keep = self.dice.roll(11) as f64 / 10.0;
                let _ = self.core.handle_sleep(&name, keep, self.now_ms);
            }
            85..90 => {
                let pinned = self.dice.chance(30);
                let _ = self.core.handle_pin(&name, pinned, self.now_ms);
            }
            90..93 => self.usage(place),
            93..95 if !self.lives_on => self.restart(),
            95..98 => {
                // Others take what is free, or leave.
                let free = BUDGET.saturating_sub(self.used() - self.others);
                let most = ByteCount::mib(2 * self.dice.roll(30));
                self.others = if self.dice.chance(40) { ByteCount::ZERO } else { most.min(free) };
            }
            98 => {
                self.looked = None;
                self.core.handle_driver_lost("a test".to_owned(), self.now_ms);
                self.lingering.clear();
            }
            _ if answers(self.seed) => {
                if let Some(worker) = self.workers.get_mut(&place) {
                    worker.is_stopped = true;
                }
            }
            _ => {}
        }
    }

    fn play(&mut self) {
        for _ in 0..STEPS {
            self.disturb();
            self.keep_processes();
            let place = self.dice.index(MODELS);
            self.work(place);
            if self.looked.is_none() && self.dice.chance(60) {
                self.look();
            } else if self.dice.chance(70) {
                self.see();
            }
            self.expire();
            self.check();
            let ms = self.dice.roll(200);
            self.pass(ms);
        }
    }

    /// Others came to stay: what they have comes off, and what was leased beyond is back, as far as anybody may be asked.
    fn crowd(&mut self) {
        for place in 0..MODELS {
            let name = self.core.models[place].name.clone();
            let _ = self.core.handle_pin(&name, false, self.now_ms);
        }
        self.is_still = true;
        self.run(30_000);
        let others = ByteCount::mib(24).min(BUDGET.saturating_sub(self.used() - self.others));
        self.others = others;
        self.run(20_000);
        let charged = self.core.book.charged();
        let off = charged.saturating_sub(others).max(others.saturating_sub(charged));
        assert!(off <= ByteCount::mib(4), "seed {}: {charged} are charged, others have {others}", self.seed);
        assert!(self.used() <= BUDGET, "seed {}: more than there is", self.seed);
        assert!(self.core.book.owed().is_zero(), "seed {}: {} are owed", self.seed, self.core.book.owed());
        self.is_still = false;
        self.others = ByteCount::ZERO;
    }

    /// Nothing goes wrong any more: whoever asks is served.
    fn calm(&mut self) {
        for place in 0..MODELS {
            let name = self.core.models[place].name.clone();
            let _ = self.core.handle_pin(&name, false, self.now_ms);
        }
        // What is left of the disorder runs out first.
        self.run(40_000);
        self.is_calm = true;
        self.run(4_000);
        assert!(self.core.book.charged().is_zero(), "seed {}: others have left", self.seed);
        assert!(self.core.book.departed().next().is_none(), "seed {}: all the dead are gone", self.seed);
        for client in std::mem::take(&mut self.clients) {
            self.leave(client);
        }
        for place in 0..MODELS {
            self.ask(place, Wanted::Wake, CALM_MS);
            self.run(CALM_MS);
            let caller = self.caller();
            self.ask(place, Wanted::Route(caller), CALM_MS);
            self.run(5_000);
            assert!(self.clients.is_empty(), "seed {}: {:?}", self.seed, self.core.models[place].life());
        }
        assert!(self.core.models.iter().all(|model| *model.life() == Life::Ready), "seed {}", self.seed);
    }

    fn run(&mut self, ms: u64) {
        for step in 0..ms / 20 {
            match step % 25 {
                0 => self.look(),
                5 => self.see(),
                _ => {}
            }
            self.keep_processes();
            for place in 0..MODELS {
                self.work(place);
            }
            self.pass(20);
            self.expire();
            self.check();
            while let Some((place, caller)) = self.routed.pop() {
                self.core.handle_route_ended(place, &caller, self.now_ms);
            }
        }
    }
}

/// More of them with `SHOAL_HISTORIES`, one with `SHOAL_SEED`.
#[test]
fn whatever_happens_leases_hold_and_all_models_serve_again() {
    let number = |name: &str| std::env::var(name).ok().and_then(|count| count.parse().ok());
    let seeds = match number("SHOAL_SEED") {
        Some(seed) => seed..=seed,
        None => 1..=number("SHOAL_HISTORIES").unwrap_or(60),
    };
    let mut looks = 0;
    for seed in seeds {
        let mut world = World::new(seed);
        world.play();
        world.crowd();
        world.calm();
        looks += world.looks;
    }
    assert!(looks > 100, "the driver was hardly heard");
}

#[test]
fn a_seed_replays_exactly() {
    let story = |seed| {
        let mut world = World::new(seed);
        world.play();
        let kept: Vec<String> = world.core.events.kept().map(|event| format!("{event:?}")).collect();
        kept
    };
    assert_eq!(story(7), story(7));
    assert_ne!(story(7), story(8));
}
