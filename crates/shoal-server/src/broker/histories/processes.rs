//! What the tasks around the core do: processes start and end, of workers, of stewards and of the server itself.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;

use super::WEIGHTS;
use super::kv::KV_OF_REQUEST;
use super::worker::Worker;
use super::world::World;
use crate::broker::Greeting;
use crate::supervisor::{Entry, Exit};

/// A worker of a server before that is being ended.
pub(super) struct Stranger {
    pid: u32,
    pub(super) has: ByteCount,
}

/// The longest that the device has something of a process that is gone: for some it is given up waiting before.
pub(super) const LINGERS_MS_MAX: u64 = 6_000;

/// A process that is gone, and what the device still has of it until then.
pub(super) struct Lingering {
    pub(super) pid: u32,
    pub(super) has: ByteCount,
    pub(super) until_ms: u64,
}

fn entry(model: &str, pid: u32) -> Entry {
    Entry {
        model: model.to_owned(),
        pid,
        start: 1,
        socket: PathBuf::from(format!("/none/worker-of-{pid}.sock")),
        fingerprint: String::new(),
        log: PathBuf::from("/none"),
        log_from: 0,
        starts: 1,
        at_ms: 0,
    }
}

impl World {
    pub(super) fn keep_processes(&mut self) {
        if !self.strangers.is_empty() && (self.is_calm || self.dice.chance(20)) {
            let stranger = self.strangers.remove(0);
            self.core.handle_stranger_gone(stranger.pid, self.now_ms);
        }
        for place in 0..self.core.models.len() {
            let model = &self.core.models[place];
            let (start, end, is_rigid) = (Arc::clone(&model.start), Arc::clone(&model.end), model.is_rigid());
            let runs = self.workers.contains_key(&place) || self.stewards.contains_key(&place);
            if !runs && start.notified().now_or_never().is_some() {
                let _stale = end.notified().now_or_never();
                if is_rigid {
                    self.start_steward(place);
                } else {
                    self.start_worker(place);
                }
            } else if self.workers.contains_key(&place) && end.notified().now_or_never().is_some() {
                self.exit(place);
            }
        }
    }

    fn start_worker(&mut self, place: usize) {
        if !self.is_steady() && self.dice.chance(5) {
            return self.core.handle_not_started(place, "no such program".to_owned(), self.now_ms);
        }
        self.pids += 1;
        let model = &self.core.models[place];
        let fingerprint = self.core.config.fingerprint(&model.config);
        self.workers.insert(place, Worker::new(model.name.clone(), fingerprint, self.pids));
        self.core.handle_started(place, self.pids, self.now_ms);
    }

    /// A worker's process is gone.
    pub(super) fn exit(&mut self, place: usize) {
        let Some(worker) = self.workers.remove(&place) else { return };
        self.seen.kills += 1;
        let model = &self.core.models[place];
        // What one held that had not said so yet is known to nobody; it counts as others' once it is seen.
        let is_known = !model.is_unaccounted && self.core.driver.is_heard();
        let has = self.within(place, &worker);
        if is_known && !self.is_calm && self.dice.chance(60) && !has.is_zero() {
            let until_ms = self.now_ms + self.dice.roll(LINGERS_MS_MAX);
            self.lingering.push(Lingering { pid: worker.pid, has, until_ms });
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
        self.end_routes_of(place);
    }

    /// The server is killed, and another begins, with what the file says by now: clients are lost, workers are not, but for
    /// those that die meanwhile or that the file has otherwise.
    pub(super) fn restart(&mut self) {
        self.seen.restarts += 1;
        (self.core, self.decisions) = World::core(&self.file);
        self.told = 0;
        self.clients.clear();
        self.routed.clear();
        self.narrowed.clear();
        self.beside_weights.clear();
        self.policies.clear();
        // A program ends with the server that started it.
        self.stewards.clear();
        // Of these no server knows any more; they are others'.
        let lost: ByteCount = self.lingering.drain(..).map(|gone| gone.has).sum();
        self.others += lost;
        self.looked = None;
        // The journal has those that the server before still waited to be rid of, too.
        for stranger in &self.strangers {
            self.core.expect_end(&entry("m0", stranger.pid), "a test", self.now_ms);
        }
        for (_, mut worker) in std::mem::take(&mut self.workers) {
            let was_greeted = worker.heard.take().is_some() || worker.had_server;
            worker.orders.clear();
            worker.coming = None;
            let missing = WEIGHTS.saturating_sub(worker.held);
            let waits = worker.wake.take().map(|(_, request)| request).or(worker.waits.take());
            let wake = waits.map(|request| (request, LeaseKind::Weights, missing));
            let declared = worker.asks_overhead.map(|(request, bytes)| (request, LeaseKind::Overhead, bytes));
            worker.had_server = was_greeted;
            let kv = worker.asks_kv.map(|request| (request, LeaseKind::Kv, KV_OF_REQUEST));
            worker.open = worker.open.or(wake).or(declared).or(kv);
            let open = worker.open.map(|(request, ..)| request);
            worker.asks_kv = worker.asks_kv.filter(|asked| open == Some(*asked));
            worker.asks_overhead = worker.asks_overhead.filter(|(asked, _)| open == Some(*asked));
            let entry = entry(&worker.name, worker.pid);
            let place = self.core.by_name.get(&worker.name).copied();
            let place = place.filter(|place| {
                let model = &self.core.models[*place];
                !self.workers.contains_key(place)
                    && !model.is_rigid()
                    && self.core.config.fingerprint(&model.config) == worker.fingerprint
            });
            match (self.dice.roll(10), place) {
                // One that was not welcome yet ends with its server.
                (0, _) => {}
                _ if !was_greeted => {}
                (2.., Some(place)) => {
                    worker.is_silent = self.dice.chance(10);
                    self.core.expect_worker(place, &entry, self.now_ms);
                    self.workers.insert(place, worker);
                }
                _ => {
                    self.core.expect_end(&entry, "a test", self.now_ms);
                    self.strangers.push(Stranger { pid: worker.pid, has: worker.has() });
                }
            }
        }
        self.core.handle_timer(self.now_ms);
    }
}
