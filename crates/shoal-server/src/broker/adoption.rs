//! Workers of a server before this one: found by its journal, and taken on with what they hold.
//!
//! Apart because it is a moment of its own: until every such worker has said what it holds or is seen to be gone, the
//! ledger is not known, and nothing is granted and nobody started (I1). That lasts `adopt_ms_max` and the time that an end
//! takes, at most; requests are parked meanwhile as ever.

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{LeaseKind, WorkerHolds};

use super::{Core, Life, LifeEvent};
use crate::state::EventKind;
use crate::supervisor::Entry;

impl Core {
    /// The worker of this entry lives, and is the one that the model at `place` would have.
    pub(crate) fn expect_worker(&mut self, place: usize, entry: &Entry, now_ms: u64) {
        let until_ms = now_ms + self.timing.adopt_ms_max;
        let model = &mut self.models[place];
        model.pid = Some(entry.pid);
        model.starts = entry.starts;
        model.listen_at(entry.socket.clone());
        model.is_unaccounted = true;
        model.cycle.note("the worker of the server before lives and is to say what it holds");
        self.advance(place, LifeEvent::Found { until_ms });
    }

    /// The worker of this entry lives, and cannot go on: it is being ended.
    pub(crate) fn expect_end(&mut self, entry: &Entry, reason: &str, now_ms: u64) {
        self.strangers.insert(entry.pid);
        let place = self.by_name.get(&entry.model).copied();
        self.tell(now_ms, place, EventKind::WorkerLeft { pid: entry.pid, reason: reason.to_owned() });
    }

    /// It is gone, and its memory with it.
    pub(crate) fn handle_stranger_gone(&mut self, pid: u32, now_ms: u64) {
        self.strangers.remove(&pid);
        self.settled(now_ms);
        self.settle(now_ms);
        self.process_gone.notify_waiters();
    }

    /// Some worker's holdings are not known yet.
    pub(super) fn is_settling(&self) -> bool {
        !self.strangers.is_empty() || self.models.lively().any(|model| model.is_unaccounted)
    }

    /// Takes the worker on that has just greeted; `share` is what it may use of the host where it holds nothing.
    ///
    /// # Errors
    /// Why not; it is ended.
    pub(super) fn adopt(
        &mut self,
        place: usize,
        holds: Option<&WorkerHolds>,
        share: ByteCount,
        now_ms: u64,
    ) -> Result<(), String> {
        let none = WorkerHolds { host_budget: share, ..WorkerHolds::default() };
        let holds = holds.unwrap_or(&none);
        let id = self.models[place].id;
        let held = [
            (LeaseKind::Weights, holds.weights),
            (LeaseKind::Kv, holds.kv),
            (LeaseKind::Overhead, holds.overhead),
        ];
        if let Err(error) = self.book.adopt(id, held) {
            let reason = format!("what it holds does not fit: {error}");
            let model = &mut self.models[place];
            let pid = model.pid.unwrap_or_default();
            model.connection = None;
            model.last_words = Some(reason.clone());
            model.cycle.note(reason.clone());
            model.end.notify_one();
            self.advance(place, LifeEvent::Lost);
            self.tell(now_ms, Some(place), EventKind::WorkerLeft { pid, reason: reason.clone() });
            return Err(reason);
        }
        let leased = self.book.total(id);
        let Life::Awaited { until_ms } = *self.models[place].life() else {
            return Err("it is not waited for".to_owned());
        };
        let after_ms = self.timing.adopt_ms_max.saturating_sub(until_ms.saturating_sub(now_ms));
        self.note_weights_store(holds.usage.weights_at_rest.as_ref());
        let model = &mut self.models[place];
        model.is_unaccounted = false;
        model.host_share = holds.host_budget;
        model.usage = holds.usage.clone();
        model.overhead_said.note(holds.usage.overhead_device, now_ms);
        model.cycle.note("its worker goes on from the server before");
        if let Some(capabilities) = &holds.capabilities {
            model.weights_total = capabilities.weights_bytes;
            model.host_need = Some(super::record::host_need(capabilities.weights_bytes));
            model.capabilities = Some(capabilities.clone());
            model.was_ready = true;
            let total = capabilities.weights_bytes;
            let is_there = !total.is_zero() && holds.weights >= total && model.usage.weights_device >= total;
            if is_there {
                model.weights_total = holds.weights;
            }
            model.habits.preload = model.config.preload && !is_there;
            self.advance(place, LifeEvent::Adopted);
            if is_there {
                self.advance(place, LifeEvent::AllThere);
            }
        } else {
            self.advance(place, LifeEvent::Greeted { now_ms });
        }
        let model = &self.models[place];
        let (pid, host) = (model.pid.unwrap_or_default(), model.host_share);
        let leased_in_all = self.book.leased();
        let what = EventKind::WorkerAdopted { pid, leased, leased_in_all, host, after_ms };
        self.tell(now_ms, Some(place), what);
        self.settled(now_ms);
        Ok(())
    }

    /// Once all is known, what was measured beyond leases is covered as far as it goes.
    pub(super) fn settled(&mut self, now_ms: u64) {
        if self.is_settling() {
            return;
        }
        for place in 0..self.models.len() {
            self.follow_overhead(place, now_ms);
        }
    }

    /// One that did not come in time is ended.
    pub(super) fn expire_awaited(&mut self, place: usize, now_ms: u64) {
        let Life::Awaited { until_ms } = *self.models[place].life() else { return };
        if now_ms < until_ms {
            return;
        }
        let waited_s = self.timing.adopt_ms_max / 1_000;
        let reason = format!("it did not say what it holds for {waited_s} s");
        let model = &mut self.models[place];
        let pid = model.pid.unwrap_or_default();
        model.last_words = Some(reason.clone());
        model.cycle.note(reason.clone());
        model.end.notify_one();
        self.advance(place, LifeEvent::Lost);
        self.tell(now_ms, Some(place), EventKind::WorkerLeft { pid, reason });
    }
}
