//! Programs of `engine = "command"`: what their stewards tell of them.
//!
//! A steward takes a worker's place ([`crate::shelf`]): it asks for leases, takes orders and answers them with the same
//! messages. Here is only what a worker has no words for: a program that runs or has ended, and where it listens.

use shoal_core::bytes::ByteCount;

use super::{Core, LifeEvent};
use crate::shelf::Target;
use crate::state::EventKind;

impl Core {
    /// The program runs.
    pub(crate) fn handle_command_started(&mut self, place: usize, pid: u32, target: Target, now_ms: u64) {
        let model = &mut self.models[place];
        model.child = Some(pid);
        (model.child_before, model.was_shown) = (None, false);
        model.target = target;
        model.starts += 1;
        let (starts, reason) = (model.starts, "its command is needed".to_owned());
        self.tell(now_ms, Some(place), EventKind::WorkerStarted { pid, starts, reason });
    }

    /// The program ended by itself, and what it started may still live: nobody is sent to it any more.
    pub(crate) fn handle_command_broke(&mut self, place: usize, now_ms: u64) {
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

    /// Requests that the program answers now.
    pub(crate) fn requests_of(&self, place: usize) -> u64 {
        self.models[place].queue.active()
    }
}
