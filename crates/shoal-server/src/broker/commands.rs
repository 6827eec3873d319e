//! Programs of `engine = "command"`: what their stewards tell of them.
//!
//! A steward takes a worker's place ([`crate::shelf`]): it asks for leases, takes orders and answers them with the same
//! messages. Here is only what a worker has no words for: a program that runs or has ended, and where it listens.

use shoal_core::bytes::ByteCount;

use super::departed::STUCK_MS;
use super::{Core, LifeEvent};
use crate::shelf::Target;
use crate::state::EventKind;

impl Core {
    /// The program runs.
    pub(crate) fn handle_command_started(&mut self, place: usize, pid: u32, target: Target, now_ms: u64) {
        let model = &mut self.models[place];
        model.child = Some(pid);
        (model.child_before, model.was_shown, model.ends_since_ms) = (None, false, None);
        (model.seen, model.seen_most) = (None, ByteCount::ZERO);
        model.target = target;
        model.starts += 1;
        let (starts, reason) = (model.starts, "its command is needed".to_owned());
        self.tell(now_ms, Some(place), EventKind::WorkerStarted { pid, starts, reason });
    }

    /// The program ended by itself, as `status` says, and what it started may still live: nobody is sent to it any more, and
    /// what it had is on its way back without an order.
    pub(crate) fn handle_command_broke(&mut self, place: usize, status: &str, now_ms: u64) {
        let model = &mut self.models[place];
        model.ends_since_ms = Some(now_ms);
        model.cycle.note(format!("its command {status}, and what it started is ended as well"));
        self.advance(place, LifeEvent::SomeLeft);
        self.settle(now_ms);
    }

    /// The program is gone: what was measured of it goes too, and what it had comes back once it is seen to be free. `status` says
    /// how it ended; `trouble`, where nobody told it to. Its steward gives the lease back next.
    pub(crate) fn handle_command_ended(
        &mut self,
        place: usize,
        status: String,
        trouble: Option<String>,
        now_ms: u64,
    ) {
        let model = &mut self.models[place];
        let id = model.id;
        model.child_before = model.child.take();
        model.ends_since_ms.get_or_insert(now_ms);
        model.seen = None;
        let pid = model.child_before.unwrap_or_default();
        (model.usage.overhead_device, model.usage.overhead_peak) = (ByteCount::ZERO, ByteCount::ZERO);
        model.forget_overhead();
        // Where it was ended because it hung, that says more than that it was told to end.
        model.error = trouble.or_else(|| model.hung.clone());
        let asked = model.error.is_none();
        let (returned, beside) = (self.book.total(id), self.book.corrected(id));
        self.forget_overhead_request(place);
        if let Err(error) = self.book.measure_overhead(id, ByteCount::ZERO) {
            tracing::debug!(%error, "a program without an account ended");
        }
        self.hold_returning(place, pid, beside, now_ms);
        let returning = if self.sees_returns() { returned } else { ByteCount::ZERO };
        self.tell(now_ms, Some(place), EventKind::WorkerExited { pid, status, returned, returning, asked });
    }

    /// What the driver shows of the program with all that it started: now, and at most since it was started. None where it
    /// shows nothing of them, or is not heard.
    pub(crate) fn program_seen(&self, place: usize) -> Option<(ByteCount, ByteCount)> {
        let model = &self.models[place];
        model.seen.filter(|_| self.driver.is_read).map(|now| (now, model.seen_most))
    }

    /// The most that the driver has shown of the program with all that it started, since it was started; also after its end.
    pub(crate) fn program_had(&self, place: usize) -> ByteCount {
        self.models[place].seen_most
    }

    /// What the policy is to know of a model of which `weights` are leased: whether it counts as one that serves, and what of it
    /// is on its way back. What a program had that has ended comes back without an order, once what it started has ended too.
    /// If that takes long, idle models are asked in its place, as while a worker ends.
    pub(super) fn serving_and_leaving(
        &self,
        place: usize,
        weights: ByteCount,
        now_ms: u64,
    ) -> (bool, ByteCount) {
        let model = &self.models[place];
        let is_serving = model.is_ready() && model.retiring.is_none();
        match model.ends_since_ms.filter(|_| model.is_ending(weights)) {
            None => (is_serving, model.ordered()),
            Some(since_ms) if now_ms < since_ms + STUCK_MS => (is_serving, model.ordered().max(weights)),
            Some(_) => (false, ByteCount::ZERO),
        }
    }

    /// When a program that has ended is not waited for any more.
    pub(super) fn next_long_end(&self, now_ms: u64) -> Option<u64> {
        let ends = self.models.lively().filter_map(|model| model.ends_since_ms);
        ends.map(|since_ms| since_ms + STUCK_MS).filter(|at_ms| *at_ms > now_ms).min()
    }

    /// Requests that the program answers now.
    pub(crate) fn requests_of(&self, place: usize) -> u64 {
        self.models[place].queue.active()
    }
}
