//! A worker as numbers: what it holds, what it was told, and what it does of that.

use std::collections::VecDeque;

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, WorkerCapabilities, WorkerHolds, WorkerUsage};
use tokio::sync::mpsc;

use super::kv::KV_OF_REQUEST;
use super::shelf::{Beside, answers, beside, has_kv};
use super::world::World;
use super::{DEVICE, WEIGHTS};
use crate::broker::dice::Dice;

/// Messages that a worker may have to read.
const MESSAGES_MAX: usize = 64;

/// A worker process: what it holds, and what it was told and has not done.
#[expect(clippy::struct_excessive_bools, reason = "facts that do not exclude one another")]
pub(super) struct Worker {
    pub(super) name: String,
    /// Of the configuration that it was started with.
    pub(super) fingerprint: String,
    pub(super) pid: u32,
    pub(super) heard: Option<mpsc::Receiver<FromServer>>,
    pub(super) is_ready: bool,
    pub(super) held: ByteCount,
    /// What it holds of KV, and its request for more that waits.
    pub(super) kv: ByteCount,
    pub(super) asks_kv: Option<u64>,
    /// What it has beside weights and KV, and what it says of that: the most that it knows of, or what it knows of now.
    pub(super) beside: ByteCount,
    pub(super) said: ByteCount,
    /// What of it stays without weights, what steps may take without a question, and whether that was leased since it could.
    pub(super) base: ByteCount,
    pub(super) may_take: ByteCount,
    pub(super) is_covered: bool,
    /// What it was granted for that, and its request for it that waits.
    pub(super) overhead: ByteCount,
    pub(super) asks_overhead: Option<(u64, ByteCount)>,
    pub(super) requests: u64,
    /// The wake under way, and the lease request that it waits for.
    pub(super) wake: Option<(u64, u64)>,
    /// A wake whose bytes are coming: its order, how many, and what it will fail with.
    pub(super) coming: Option<(u64, ByteCount, Option<String>)>,
    /// It had another server before.
    pub(super) had_server: bool,
    /// It asked that one for so many bytes in this request.
    pub(super) open: Option<(u64, LeaseKind, ByteCount)>,
    /// It will not say what it holds.
    pub(super) is_silent: bool,
    /// Its request for weights that another server was asked again, for a wake of the one before.
    pub(super) waits: Option<u64>,
    /// Its process does not run.
    pub(super) is_stopped: bool,
    /// Its engine does nothing more; other threads of it tell what it has.
    pub(super) is_hung: bool,
    pub(super) orders: VecDeque<FromServer>,
}

impl Worker {
    pub(super) fn new(name: String, fingerprint: String, pid: u32) -> Self {
        Self {
            name,
            fingerprint,
            pid,
            heard: None,
            is_ready: false,
            held: ByteCount::ZERO,
            kv: ByteCount::ZERO,
            asks_kv: None,
            beside: ByteCount::ZERO,
            said: ByteCount::ZERO,
            base: ByteCount::ZERO,
            may_take: ByteCount::ZERO,
            is_covered: true,
            overhead: ByteCount::ZERO,
            asks_overhead: None,
            requests: 0,
            wake: None,
            coming: None,
            had_server: false,
            open: None,
            is_silent: false,
            waits: None,
            is_stopped: false,
            is_hung: false,
            orders: VecDeque::new(),
        }
    }

    /// All that its process has of the device.
    pub(super) fn has(&self) -> ByteCount {
        self.held + self.kv + self.beside
    }

    /// A step has so much beside weights and KV, and may have it again.
    pub(super) fn take_unasked(&mut self, taken: ByteCount) {
        (self.beside, self.said) = (taken, taken);
        if taken > self.may_take {
            (self.may_take, self.is_covered) = (taken, false);
        }
    }

    /// Without all of its weights it runs no step, and has what it always has.
    pub(super) fn leave_steps(&mut self) {
        if !self.may_take.is_zero() {
            (self.beside, self.said) = (self.beside.min(self.base), self.base);
        }
    }

    /// Its request was answered.
    pub(super) fn has_heard_of(&self, asked: u64) -> bool {
        self.orders.iter().any(|message| {
            matches!(message, FromServer::LeaseGrant { request, .. } | FromServer::LeaseDeny { request, .. } if *request == asked)
        })
    }

    /// What it does next: one wake after another, and all else at once.
    fn next_order(&mut self) -> Option<FromServer> {
        let is_waking = self.wake.is_some() || self.waits.is_some();
        let may_be = |order: &FromServer| !is_waking || !matches!(order, FromServer::Wake { .. });
        let next = self.orders.iter().position(may_be)?;
        self.orders.remove(next)
    }

    /// What its prefixes cost, and what a use finds again of them: of every third process nobody knows. By `seed` and not by
    /// the history's dice, so that it throws as before.
    fn kv_back(&self, seed: u64) -> (u64, u64) {
        let mut dice = Dice((seed << 32) | u64::from(self.pid));
        if dice.roll(3) == 0 { (0, 0) } else { (1 << dice.roll(20), 1 + dice.roll(1_000)) }
    }

    /// What of its KV holds prefixes, where requests use so much.
    pub(super) fn kv_cached(&self, kv_live: ByteCount) -> ByteCount {
        ByteCount((self.kv - kv_live).0 / 2)
    }

    fn usage(&self, kv_live: ByteCount, seed: u64) -> WorkerUsage {
        let (kv_back_us_per_mib, kv_found_milli) = self.kv_back(seed);
        WorkerUsage {
            weights_device: self.held,
            weights_total: WEIGHTS,
            kv_device: self.kv,
            kv_live,
            kv_cached: self.kv_cached(kv_live),
            kv_back_us_per_mib,
            kv_found_milli,
            overhead_device: self.said,
            overhead_peak: self.may_take,
            ..WorkerUsage::default()
        }
    }
}

fn capabilities(seed: u64) -> WorkerCapabilities {
    let kv_bytes_min = if has_kv(seed) { KV_OF_REQUEST } else { ByteCount::ZERO };
    WorkerCapabilities { weights_bytes: WEIGHTS, kv_bytes_min, ..WorkerCapabilities::default() }
}

impl World {
    /// A worker says something; none of one whose process does not run is heard.
    pub(super) fn say(&mut self, place: usize, message: FromWorker) {
        let running = self.workers.get(&place).filter(|worker| !worker.is_stopped);
        let Some(pid) = running.map(|worker| worker.pid) else { return };
        self.core.handle_message(place, pid, message, self.now_ms);
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
    pub(super) fn work(&mut self, place: usize) {
        let is_steady = self.is_steady();
        let Some(worker) = self.workers.get_mut(&place) else { return };
        if worker.is_stopped {
            worker.is_stopped = is_steady || !self.dice.chance(2);
            return;
        }
        if worker.is_hung && worker.heard.is_some() {
            worker.is_hung = is_steady || !self.dice.chance(2);
            return self.hear(place);
        }
        if worker.heard.is_none() {
            return self.greet(place);
        }
        self.hear(place);
        let Some(worker) = self.workers.get_mut(&place) else { return };
        if !worker.is_ready {
            return self.begin(place);
        }
        if let Some(coming) = worker.coming.take() {
            return self.end_coming(place, coming);
        }
        self.keep_kv(place);
        self.step_beside(place);
        let Some(worker) = self.workers.get_mut(&place) else { return };
        match worker.next_order() {
            Some(FromServer::Wake { order, .. }) => {
                let missing = WEIGHTS.saturating_sub(worker.held);
                if missing.is_zero() {
                    return self.done(place, order, ByteCount::ZERO, None);
                }
                worker.requests += 1;
                let request = worker.requests;
                worker.wake = Some((order, request));
                self.request(place, request, LeaseKind::Weights, missing);
            }
            Some(FromServer::LeaseGrant { request, kind: LeaseKind::Kv, bytes }) => {
                self.kv_granted(place, request, bytes);
            }
            Some(FromServer::LeaseGrant { request, kind: LeaseKind::Overhead, bytes }) => {
                self.overhead_granted(place, request, bytes);
            }
            Some(FromServer::LeaseGrant { request, bytes, .. }) => self.granted(place, request, bytes),
            Some(FromServer::LeaseDeny { request, reason }) => {
                worker.waits.take_if(|waits| *waits == request);
                worker.asks_overhead.take_if(|(asked, _)| *asked == request);
                self.seen.kv_denied += u64::from(worker.asks_kv.take_if(|asked| *asked == request).is_some());
                let Some((order, _)) = worker.wake.take_if(|(_, waits)| *waits == request) else { return };
                self.done(place, order, ByteCount::ZERO, Some(reason));
            }
            Some(FromServer::Reclaim { order, bytes, is_own, cached_last, .. }) => {
                if !is_steady && self.dice.chance(10) {
                    return; // it never answers
                }
                let some = if !is_steady && self.dice.chance(20) { ByteCount(bytes.0 / 2) } else { bytes };
                let given = self.give_up(place, some, is_own, cached_last);
                self.usage(place);
                self.done(place, order, given, None);
            }
            Some(FromServer::Shutdown { .. }) => self.exit(place),
            _ => {}
        }
    }

    /// It says hello, and what it holds where it had a server before.
    fn greet(&mut self, place: usize) {
        let now_ms = self.now_ms;
        let Some(worker) = self.workers.get_mut(&place) else { return };
        if worker.is_silent {
            return;
        }
        let (sender, receiver) = mpsc::channel(MESSAGES_MAX);
        let (pid, name) = (worker.pid, worker.name.clone());
        let can = capabilities(self.seed);
        let holds = worker.had_server.then(|| WorkerHolds {
            weights: worker.held,
            kv: worker.kv,
            overhead: worker.overhead,
            host_budget: ByteCount::mib(1),
            capabilities: worker.is_ready.then_some(can),
            // Its requests ended with their server.
            usage: worker.usage(ByteCount::ZERO, self.seed),
        });
        let open = worker.open.take();
        worker.heard = Some(receiver);
        let Ok(greeting) = self.core.handle_greeted(&name, pid, sender, holds.as_ref(), now_ms) else {
            return self.exit(place);
        };
        assert_eq!(greeting.place, place, "it was taken for another");
        if answers(self.seed) {
            self.core.handle_answers(place, now_ms);
        }
        if let Some((request, kind, bytes)) = open {
            if let Some(worker) = self.workers.get_mut(&place) {
                worker.waits = (kind == LeaseKind::Weights).then_some(request);
            }
            self.request(place, request, kind, bytes);
        }
    }

    /// It declares what it will take beside weights and KV, takes it, and is ready.
    fn begin(&mut self, place: usize) {
        let is_steady = self.is_steady();
        let Some(worker) = self.workers.get_mut(&place) else { return };
        if let Some((asked, _)) = worker.asks_overhead {
            let is_answer = |message: &FromServer| matches!(message, FromServer::LeaseGrant { request, .. } | FromServer::LeaseDeny { request, .. } if *request == asked);
            let Some(index) = worker.orders.iter().position(is_answer) else {
                // Told to end before it was ready.
                if worker.orders.iter().any(|order| matches!(order, FromServer::Shutdown { .. })) {
                    self.exit(place);
                }
                return;
            };
            if let Some(FromServer::LeaseGrant { bytes, .. }) = worker.orders.remove(index) {
                worker.overhead += bytes;
            }
            worker.asks_overhead = None;
        } else if worker.overhead.is_zero() && self.dice.chance(60) {
            worker.requests += 1;
            let (request, declared) = (worker.requests, ByteCount::mib(2 * (1 + self.dice.roll(3))));
            worker.asks_overhead = Some((request, declared));
            return self.request(place, request, LeaseKind::Overhead, declared);
        }
        let room = DEVICE.saturating_sub(self.used());
        let Some(worker) = self.workers.get_mut(&place) else { return };
        worker.is_ready = true;
        // It takes what it declared, or less; another takes more.
        let most = if worker.overhead.is_zero() { ByteCount::ZERO } else { worker.overhead };
        worker.beside = ByteCount::mib(2 * self.dice.roll(most.0 / ByteCount::mib(2).0 + 1)).min(room);
        worker.said = worker.beside;
        if !is_steady && self.dice.chance(4) {
            let code = if self.dice.chance(50) { "internal" } else { "device" }.to_owned();
            return self.say(place, FromWorker::Failed { code, message: "a test".to_owned() });
        }
        self.say(place, FromWorker::Ready { capabilities: capabilities(self.seed) });
        if beside(self.seed) == Beside::Peak {
            return self.profile(place);
        }
        self.usage(place);
    }

    pub(super) fn request(&mut self, place: usize, request: u64, kind: LeaseKind, bytes: ByteCount) {
        self.request_some(place, request, kind, bytes, bytes);
    }

    pub(super) fn request_some(
        &mut self,
        place: usize,
        request: u64,
        kind: LeaseKind,
        bytes: ByteCount,
        bytes_min: ByteCount,
    ) {
        let said = FromWorker::LeaseRequest {
            request,
            kind,
            bytes,
            bytes_min,
            deadline_ms: 5_000,
            reason: "what it needs".to_owned(),
        };
        self.say(place, said);
    }

    pub(super) fn done(&mut self, place: usize, order: u64, bytes: ByteCount, error: Option<String>) {
        let said = FromWorker::OrderDone { order, bytes, copied: ByteCount::ZERO, duration_us: 1, error };
        self.say(place, said);
    }

    pub(super) fn usage(&mut self, place: usize) {
        let Some(worker) = self.workers.get(&place) else { return };
        let usage = worker.usage(self.kv_live(place, worker), self.seed);
        self.say(place, FromWorker::Usage { usage });
    }
}
