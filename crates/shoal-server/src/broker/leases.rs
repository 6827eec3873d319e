//! What workers say of leases and figures.

use shoal_core::bytes::ByteCount;
use shoal_core::policy::PendingRequest;
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, WorkerUsage};

use super::orders::Order;
use super::pulse::is_work;
use super::{Asked, Core, LifeEvent, OVERHEAD_REQUEST, REQUESTS_PER_MODEL_MAX};
use crate::bounded::bounded;
use crate::state::EventKind;

/// Characters that are kept of what a worker says in words: thousands of such sentences are.
const WORDS_MAX: usize = 1_000;

fn kept(words: &str) -> String {
    bounded(words, WORDS_MAX)
}

impl Core {
    /// One message of the worker with this process id.
    pub(crate) fn handle_message(&mut self, place: usize, pid: u32, message: FromWorker, now_ms: u64) {
        let model = &mut self.models[place];
        if model.pid != Some(pid) || model.connection.is_none() {
            return;
        }
        let works = is_work(&message, &model.usage);
        self.hear_sign(place, works, now_ms);
        if matches!(message, FromWorker::Pong { .. }) {
            // Of how far it is it says nothing.
            return;
        }
        self.advance(place, LifeEvent::Heard { now_ms });
        let model = &mut self.models[place];
        match message {
            FromWorker::Hello { .. } => self.break_off(place, "a second hello".to_owned(), now_ms),
            FromWorker::Loading { phase, done, total } => {
                let phase = kept(&phase);
                model.progress = Some(format!("{phase}: {done} of {total}"));
                self.tell(now_ms, Some(place), EventKind::WorkerLoading { phase, done, total });
            }
            FromWorker::Ready { capabilities } => self.ready(place, capabilities, now_ms),
            FromWorker::Failed { code, message } => {
                self.worker_failed(place, &kept(&code), &kept(&message), now_ms);
            }
            FromWorker::LeaseRequest { request, kind, bytes, bytes_min, deadline_ms, reason } => {
                let pending = PendingRequest {
                    model: model.id,
                    request,
                    kind,
                    bytes,
                    bytes_min: bytes_min.min(bytes),
                    asked_ms: now_ms,
                    deadline_ms: now_ms.saturating_add(deadline_ms),
                };
                self.ask(place, pending, kept(&reason), now_ms);
            }
            FromWorker::LeaseCancel { request } => {
                let id = model.id;
                let is_it = |asked: &Asked| asked.pending.model == id && asked.pending.request == request;
                // Its time was up a moment before ours: what it waited for in vain is what others are to hear.
                if let Some(asked) =
                    self.asked.iter().find(|asked| is_it(asked) && !asked.waits_for.is_empty())
                {
                    model.waits_for = Some(asked.waits_for.clone());
                }
                if let Some(asked) = self.take_asked(place, request) {
                    self.note_lease_wait(place, &asked.pending, now_ms);
                }
            }
            FromWorker::LeaseReturn { kind, bytes } => self.lease_returned(place, kind, bytes, now_ms),
            FromWorker::OrderDone { order, bytes, copied, duration_us, error } => {
                self.order_done(
                    place,
                    order,
                    (bytes, copied),
                    duration_us,
                    error.as_deref().map(kept),
                    now_ms,
                );
            }
            FromWorker::WakeBacked { order } => self.wake_backed(place, order, now_ms),
            FromWorker::Usage { usage } => self.usage(place, usage, now_ms),
            // Memory of this machine: whoever holds descriptors answers. What only shows that it lives is heard above.
            FromWorker::SlabRequest { .. }
            | FromWorker::SlabHeld { .. }
            | FromWorker::SlabReturn { .. }
            | FromWorker::Pong { .. } => {}
        }
        self.settle(now_ms);
    }

    fn ask(&mut self, place: usize, pending: PendingRequest, reason: String, now_ms: u64) {
        let id = pending.model;
        let open = self.asked.iter().filter(|asked| asked.pending.model == id).count();
        let twice = self
            .asked
            .iter()
            .any(|asked| asked.pending.model == id && asked.pending.request == pending.request);
        let number = pending.request;
        if number == OVERHEAD_REQUEST {
            let why = format!(
                "lease request {number} has a number of the server's own: the highest is {}",
                OVERHEAD_REQUEST - 1
            );
            return self.break_off(place, why, now_ms);
        }
        if twice {
            return self.break_off(place, format!("lease request {number} was made twice"), now_ms);
        }
        if open >= REQUESTS_PER_MODEL_MAX {
            let reason = format!("{open} lease requests of this worker are open already");
            self.models[place].say(FromServer::LeaseDeny { request: pending.request, reason });
            return;
        }
        let (kind, request, bytes) = (pending.kind, pending.request, pending.bytes);
        self.asked.push(Asked { pending, reason, waits_for: String::new() });
        if kind == LeaseKind::Overhead && bytes <= self.book.corrected(id) {
            // All of it was measured, so it is leased already: nobody has to give anything up for it once more.
            let reason = format!("{} asks for {bytes} that it was measured to take", self.models[place].name);
            self.grant(place, request, bytes, reason, None, now_ms);
        }
    }

    fn lease_returned(&mut self, place: usize, kind: LeaseKind, bytes: ByteCount, now_ms: u64) {
        if bytes.is_zero() {
            return;
        }
        let id = self.models[place].id;
        let before = self.book.held(id, LeaseKind::Weights);
        if let Err(error) = self.book.give_back(id, kind, bytes) {
            return self.break_off(place, error.to_string(), now_ms);
        }
        self.note_weights(place, before, now_ms);
        if let Some(child) = self.models[place].child_before.take() {
            self.models[place].ends_since_ms = None;
            self.hold_returning(place, child, bytes, now_ms);
        }
        self.note_moved(place, kind, false, bytes, now_ms);
        let model = &mut self.models[place];
        let mut left = bytes;
        for order in model.orders.values_mut() {
            order.returned(&mut left);
        }
        if kind == LeaseKind::Weights {
            self.advance(place, LifeEvent::SomeLeft);
            self.ask_for_what_left(place, bytes);
            self.models[place].orders.values_mut().for_each(Order::lost_some);
        }
        let model = &mut self.models[place];
        if kind == LeaseKind::Kv {
            model.fresh_kv.returned(bytes, now_ms);
        } else {
            // What it declared and has all the same stays leased; without weights its steps take nothing.
            self.follow_overhead(place, now_ms);
        }
        let leased = self.book.leased();
        self.tell(now_ms, Some(place), EventKind::LeaseReturned { lease: kind, bytes, leased });
    }

    /// A wake that still waits for its lease lacks what just left as well: it is given all of it at once. A part would be
    /// brought to the device for nothing, for a model that cannot run with it.
    fn ask_for_what_left(&mut self, place: usize, bytes: ByteCount) {
        let model = &self.models[place];
        let lacks = model.weights_total.saturating_sub(self.book.held(model.id, LeaseKind::Weights));
        let (id, kind) = (model.id, LeaseKind::Weights);
        let mut open =
            self.asked.iter_mut().filter(|asked| (asked.pending.model, asked.pending.kind) == (id, kind));
        // With more than one it is not known which of them lacks what.
        if let (Some(asked), None) = (open.next(), open.next()) {
            let more = lacks.saturating_sub(asked.pending.bytes).min(bytes);
            asked.pending.bytes += more;
            asked.pending.bytes_min += more;
        }
    }

    fn usage(&mut self, place: usize, usage: WorkerUsage, now_ms: u64) {
        self.note_weights_store(usage.weights_at_rest.as_ref());
        let model = &mut self.models[place];
        let was_running = model.usage.requests_running + model.usage.requests_waiting > 0;
        let runs = usage.requests_running + usage.requests_waiting > 0;
        if was_running || runs {
            model.last_used_ms = Some(now_ms);
        }
        model.waiting_inside = u64::from(usage.requests_waiting);
        model.overhead_said.note(usage.overhead_device, now_ms);
        model.usage = usage;
        let held = self.book.held(model.id, LeaseKind::Weights);
        model.is_said_without_weights = held.is_zero();
        let total = model.weights_total;
        if model.is_ready()
            && !total.is_zero()
            && held >= total
            && model.usage.weights_device >= total
            && !model.wake_ordered()
        {
            // It came back by itself: a request inside it needed it.
            self.advance(place, LifeEvent::AllThere);
        }
        self.follow_overhead(place, now_ms);
    }

    /// Carries a grant of the policy out.
    pub(super) fn grant(
        &mut self,
        place: usize,
        request: u64,
        bytes: ByteCount,
        reason: String,
        decision: Option<u64>,
        now_ms: u64,
    ) {
        let id = self.models[place].id;
        let Some(asked) = self.take_asked(place, request) else { return };
        let kind = asked.pending.kind;
        if request == OVERHEAD_REQUEST {
            let due = self.overhead_due(place, now_ms);
            if let Ok(uncovered) = self.book.measure_overhead(id, due) {
                self.cover_overhead(place, uncovered, now_ms);
            }
            return;
        }
        let before = self.book.held(id, LeaseKind::Weights);
        let brings_more = kind == LeaseKind::Weights && !self.overhead_lacking(place).is_zero();
        let bytes = self.of_what_was_met(&asked.pending, bytes);
        if let Err(error) = self.book.grant(id, kind, bytes) {
            // The policy counts as the book does; if it ever does not, the book is right.
            tracing::error!(model = self.models[place].name, %error, "a grant was refused by the book");
            self.models[place].say(FromServer::LeaseDeny { request, reason: error.to_string() });
            return;
        }
        self.note_weights(place, before, now_ms);
        self.note_moved(place, kind, true, bytes, now_ms);
        let waited_ms = self.note_lease_wait(place, &asked.pending, now_ms);
        if brings_more {
            // What its steps may take came with them.
            self.follow_overhead(place, now_ms);
        }
        let model = &mut self.models[place];
        model.counts.granted += 1;
        model.waits_for = None;
        if kind == LeaseKind::Kv {
            model.fresh_kv.granted(bytes, now_ms);
        }
        if !model.say(FromServer::LeaseGrant { request, kind, bytes }) {
            self.break_off(place, "it does not read its messages".to_owned(), now_ms);
        }
        let leased = self.book.leased();
        let what = EventKind::LeaseGranted { lease: kind, bytes, leased, reason, waited_ms, decision };
        self.tell(now_ms, Some(place), what);
    }

    /// Carries a denial of the policy out.
    pub(super) fn deny(
        &mut self,
        place: usize,
        request: u64,
        never: bool,
        reason: String,
        decision: u64,
        now_ms: u64,
    ) {
        let Some(asked) = self.take_asked(place, request) else { return };
        self.note_lease_wait(place, &asked.pending, now_ms);
        let model = &mut self.models[place];
        model.counts.denied += 1;
        if never && asked.pending.kind == LeaseKind::Weights {
            model.never = Some(reason.clone());
            model.habits.preload = false;
        }
        model.waits_for = Some(reason.clone());
        if request != OVERHEAD_REQUEST {
            model.say(FromServer::LeaseDeny { request, reason: reason.clone() });
        }
        let (lease, bytes) = (asked.pending.kind, asked.pending.bytes);
        self.tell(
            now_ms,
            Some(place),
            EventKind::LeaseDenied { lease, bytes, reason, decision: Some(decision) },
        );
    }

    fn take_asked(&mut self, place: usize, request: u64) -> Option<Asked> {
        let id = self.models[place].id;
        let found = self
            .asked
            .iter()
            .position(|asked| asked.pending.model == id && asked.pending.request == request)?;
        Some(self.asked.remove(found))
    }
}
