//! Workers that say nothing: they are asked, waited for within a bound, and ended.
//!
//! Apart from [`super::lives`], whose workers come and go by themselves, because here the server decides that one lives no
//! more. There are two ways to be silent. A process that does not run at all (stopped, frozen, stuck in the kernel) answers
//! no [`FromServer::Ping`]; after `silent_s_max` it is ended. One whose engine hangs answers, since other threads of it do;
//! so where a request waits for bytes and nothing whatever came of that worker's work for `stuck_s_max`, it is ended too.
//! So is a program of others, which is asked nothing: of its work the bytes are seen that it answers with, and no more.
//! What it holds counts as held until it is gone, and as returning until the driver shows it free (I1).
//!
//! A server that did not run itself (stopped, starved) holds nobody's silence against them: whoever looks later than
//! planned begins to count anew.

use shoal_core::policy::PendingRequest;
use shoal_core::protocol::{FromServer, FromWorker, WorkerUsage};

use super::{Core, OVERHEAD_REQUEST, Record, millis};
use crate::state::EventKind;

/// How often a quiet worker is asked.
const PING_MS: u64 = 5_000;
/// Of the longest silence, the part after which it is told of, and the most of that.
const TOLD_PART: u64 = 2;
const TOLD_MS_MAX: u64 = 10_000;
/// How many times one is asked within the longest silence, at least.
const PINGS_MIN: u64 = 4;

/// The signs of life of one process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pulse {
    /// It answers pings.
    answers: bool,
    /// When it last said anything.
    heard_ms: u64,
    /// When something last came of its work.
    worked_ms: u64,
    /// Since when it has been asked without an answer.
    asked_ms: Option<u64>,
    /// Others were told of that.
    is_told: bool,
}

impl Pulse {
    /// Something came of its work: bytes of an answer.
    pub(crate) const fn worked(&mut self, now_ms: u64) {
        self.worked_ms = now_ms;
    }

    /// How long it has not answered, where others know.
    pub(crate) fn silent_ms(&self, now_ms: u64) -> Option<u64> {
        self.asked_ms.filter(|_| self.is_told).map(|asked_ms| now_ms.saturating_sub(asked_ms))
    }
}

/// Whether something came of a worker's work, by what it says; its figures were `before`. That requests came to it, or that
/// an order failed, is told by threads that live while its engine hangs.
pub(super) fn is_work(message: &FromWorker, before: &WorkerUsage) -> bool {
    let of = |usage: &WorkerUsage| {
        let held = (usage.weights_device, usage.kv_device, usage.kv_live, usage.kv_cached);
        (held, usage.tokens_out, usage.tokens_embedded, usage.onboarded, usage.evicted)
    };
    match message {
        FromWorker::Pong { .. } => false,
        FromWorker::OrderDone { bytes, error, .. } => error.is_none() || !bytes.is_zero(),
        FromWorker::Usage { usage } => of(usage) != of(before),
        _ => true,
    }
}

/// Whether somebody would see that nothing comes of its work: it answers pings, or is a program that runs.
pub(super) fn is_watched(model: &Record) -> bool {
    model.connection.is_some() && (model.pulse.answers || model.child.is_some())
}

impl Core {
    /// The worker that just greeted says that it answers when it is asked.
    pub(crate) fn handle_answers(&mut self, place: usize, now_ms: u64) {
        self.models[place].pulse =
            Pulse { answers: true, heard_ms: now_ms, worked_ms: now_ms, ..Pulse::default() };
        self.settle(now_ms);
    }

    /// It said something. `works`: not just that it lives.
    pub(super) fn hear_sign(&mut self, place: usize, works: bool, now_ms: u64) {
        let model = &mut self.models[place];
        let was_silent = model.pulse.silent_ms(now_ms);
        model.pulse.heard_ms = now_ms;
        if works {
            model.pulse.worked_ms = now_ms;
        }
        (model.pulse.asked_ms, model.pulse.is_told) = (None, false);
        if let (Some(after_ms), Some(pid)) = (was_silent, model.pid) {
            self.tell(now_ms, Some(place), EventKind::WorkerHeard { pid, after_ms });
        }
    }

    fn silent_ms_max(&self) -> Option<u64> {
        self.config.patience.silent_max.map(millis)
    }

    /// Between one look and the next. Where nobody is to be asked, it is looked only whether this server runs itself.
    fn pulse_ms(&self) -> Option<u64> {
        match self.silent_ms_max() {
            Some(silent_ms) => Some(PING_MS.min(silent_ms / PINGS_MIN).max(1)),
            None => self.config.patience.stuck_max.map(|_| PING_MS),
        }
    }

    /// When to look again.
    pub(super) fn next_pulse(&self) -> Option<u64> {
        let is_any = self.models.lively().any(is_watched);
        (is_any && self.pulse_ms().is_some() && !self.stopping).then_some(self.pulse_at_ms)
    }

    /// Asks those who are quiet, and ends who has been for too long.
    pub(super) fn take_pulses(&mut self, now_ms: u64) {
        let Some(every_ms) = self.pulse_ms() else { return };
        if now_ms < self.pulse_at_ms || self.stopping {
            return;
        }
        if now_ms - self.pulse_at_ms > every_ms {
            for model in &mut self.models {
                model.pulse.worked_ms = now_ms;
                model.pulse.asked_ms = model.pulse.asked_ms.map(|_| now_ms);
            }
        }
        self.pulse_at_ms = now_ms + every_ms;
        let Some(silent_ms_max) = self.silent_ms_max() else { return };
        let told_ms = TOLD_MS_MAX.min(silent_ms_max / TOLD_PART);
        for place in 0..self.models.len() {
            let ping = self.number();
            let model = &mut self.models[place];
            if model.connection.is_none() || !model.pulse.answers {
                continue;
            }
            let Some(asked_ms) = model.pulse.asked_ms else {
                if now_ms.saturating_sub(model.pulse.heard_ms) >= every_ms {
                    // Where there is no room for a line, it has not read those before.
                    model.say(FromServer::Ping { ping });
                    model.pulse.asked_ms = Some(now_ms);
                }
                continue;
            };
            let silent_ms = now_ms - asked_ms;
            let pid = model.pid.unwrap_or_default();
            if silent_ms >= silent_ms_max {
                let reason = format!("it has answered nothing for {} s", silent_ms / 1_000);
                self.end_silent(place, reason, now_ms);
            } else if silent_ms >= told_ms && !model.pulse.is_told {
                model.pulse.is_told = true;
                let leased = self.book.total(self.models[place].id);
                let what = EventKind::WorkerSilent { pid, silent_ms, silent_ms_max, leased };
                self.tell(now_ms, Some(place), what);
            }
        }
    }

    /// A request has waited `waited_ms` for a byte of its worker, which may be ended for it.
    pub(crate) fn handle_no_byte(&mut self, place: usize, waited_ms: u64, now_ms: u64) {
        let Some(stuck_ms_max) = self.config.patience.stuck_max.map(millis) else { return };
        // Those who tell of it may wake up before the timer does, where this server did not run.
        self.take_pulses(now_ms);
        let model = &self.models[place];
        let id = model.id;
        // Who waits for an answer of ours, or is at an order that it still has time for, is not stuck. What is asked for in its
        // name it does not wait for.
        let asks = |pending: &PendingRequest| pending.model == id && pending.request != OVERHEAD_REQUEST;
        let waits = self.asked.iter().any(|asked| asks(&asked.pending))
            || model.orders.values().any(|order| !order.overdue);
        let quiet_ms = now_ms.saturating_sub(model.pulse.worked_ms).min(waited_ms);
        if self.stopping || waits || !is_watched(model) || quiet_ms < stuck_ms_max {
            return;
        }
        let (seconds, requests) = (quiet_ms / 1_000, model.queue.active());
        let reason = if requests == 1 {
            format!("it has 1 request, and nothing came of it for {seconds} s")
        } else {
            format!("it has {requests} requests, and nothing came of them for {seconds} s")
        };
        self.end_silent(place, reason, now_ms);
        self.settle(now_ms);
    }

    fn end_silent(&mut self, place: usize, reason: String, now_ms: u64) {
        let model = &mut self.models[place];
        let pid = model.child.or(model.pid).unwrap_or_default();
        let leased = self.book.total(model.id);
        let why = format!("{reason}, and was ended");
        model.error = Some(why.clone());
        model.hung = Some(why);
        model.last_words = Some(reason.clone());
        self.tell(now_ms, Some(place), EventKind::WorkerHung { pid, leased, reason });
        self.end_connection(place, now_ms);
    }

    /// Why the newest worker of a model was ended, where it was silent.
    pub(crate) fn trouble_of(&self, name: &str) -> Option<String> {
        self.by_name.get(name).and_then(|place| self.models[*place].hung.clone())
    }
}
