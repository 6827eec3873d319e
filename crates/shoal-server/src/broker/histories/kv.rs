//! Engines with KV: their leases for it grow with the requests that they have and shrink by order, and by themselves.
//!
//! A request runs once there is KV for it. What requests used stays as KV that nobody uses, half of it with prefixes that
//! may come again. On an order that goes first, then weights, then what is in use: those requests wait for it anew. The
//! prefixes go after the weights where the order says so.

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{FromWorker, LeaseKind};

use super::DEVICE;
use super::shelf::has_kv;
use super::worker::Worker;
use super::world::World;

/// What one request uses, and the least with which an engine runs.
pub(super) const KV_OF_REQUEST: ByteCount = ByteCount::mib(4);
/// The least by which it grows.
const KV_STEP: ByteCount = ByteCount::mib(2);

impl World {
    pub(super) fn requests_at(&self, place: usize) -> u64 {
        self.routed.iter().filter(|routed| routed.place == place).count() as u64
    }

    /// KV that the requests at a worker use: as much as there is for them.
    pub(super) fn kv_live(&self, place: usize, worker: &Worker) -> ByteCount {
        worker.kv.min(ByteCount(KV_OF_REQUEST.0 * self.requests_at(place)))
    }

    /// How many of the requests at a model run.
    pub(super) fn running(&self, place: usize) -> u64 {
        match self.workers.get(&place) {
            Some(worker) if has_kv(self.seed) => worker.kv.0 / KV_OF_REQUEST.0,
            _ => u64::MAX,
        }
    }

    /// One engine asks for KV that its requests lack, or gives some back that none uses.
    pub(super) fn keep_kv(&mut self, place: usize) {
        let wanted = ByteCount(KV_OF_REQUEST.0 * self.requests_at(place));
        let is_steady = self.is_steady();
        let Some(worker) = self.workers.get_mut(&place).filter(|_| has_kv(self.seed)) else { return };
        if wanted > worker.kv && worker.asks_kv.is_none() && (is_steady || self.dice.chance(60)) {
            let bytes = wanted - worker.kv + if self.dice.chance(30) { KV_STEP } else { ByteCount::ZERO };
            let least = if worker.kv < KV_OF_REQUEST { KV_OF_REQUEST - worker.kv } else { KV_STEP };
            worker.requests += 1;
            let request = worker.requests;
            worker.asks_kv = Some(request);
            return self.request_some(place, request, LeaseKind::Kv, bytes, least);
        }
        let spare = worker.kv.saturating_sub(wanted);
        if !is_steady && !spare.is_zero() && self.dice.chance(5) {
            self.seen.kv_returned += 1;
            self.return_kv(place, spare.min(KV_STEP));
            self.usage(place);
        }
    }

    pub(super) fn return_kv(&mut self, place: usize, bytes: ByteCount) {
        let Some(worker) = self.workers.get_mut(&place).filter(|_| !bytes.is_zero()) else { return };
        worker.kv -= bytes;
        self.say(place, FromWorker::LeaseReturn { kind: LeaseKind::Kv, bytes });
    }

    /// The memory for KV is there, unless somebody took it who has no lease.
    pub(super) fn kv_granted(&mut self, place: usize, request: u64, bytes: ByteCount) {
        let Some(worker) = self.workers.get_mut(&place) else { return };
        worker.kv += bytes;
        worker.asks_kv.take_if(|asked| *asked == request);
        self.seen.kv_granted += 1;
        self.check_promised();
        if self.used() > DEVICE {
            self.return_kv(place, bytes);
        }
        self.usage(place);
    }

    /// Gives up so much as it was ordered to, or less: of what it has, what is missed least first.
    pub(super) fn give_up(
        &mut self,
        place: usize,
        bytes: ByteCount,
        is_own: bool,
        cached_last: bool,
    ) -> ByteCount {
        let Some(worker) = self.workers.get(&place) else { return ByteCount::ZERO };
        let live = self.kv_live(place, worker);
        let idle = worker.kv - live;
        let cached = if cached_last { worker.kv_cached(live) } else { ByteCount::ZERO };
        let mut spare = (idle - cached).min(bytes);
        let weights = if is_own { ByteCount::ZERO } else { (bytes - spare).min(worker.held) };
        spare += (idle - spare).min(bytes - spare - weights);
        let used = if is_own { ByteCount::ZERO } else { (bytes - spare - weights).min(live) };
        self.seen.cached_outlasted += u64::from(cached_last && !weights.is_zero());
        if let Some(worker) = self.workers.get_mut(&place).filter(|_| !weights.is_zero()) {
            worker.held -= weights;
            worker.leave_steps();
            self.say(place, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: weights });
        }
        self.seen.kv_ordered += u64::from(!(spare + used).is_zero());
        self.return_kv(place, spare + used);
        spare + weights + used
    }
}
