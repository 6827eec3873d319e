//! Orders to workers: give memory up, come back.

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{FromServer, LeaseKind};
use tokio::sync::oneshot;

use super::requests::Told;
use super::{Core, DRAIN_MS_MAX, LifeEvent, Record, millis};
use crate::state::EventKind;

/// Bytes that a worker is expected to give up in a millisecond, at the least (256 MiB/s).
const RECLAIM_BYTES_PER_MS: u64 = 256 << 10;
/// Wakes that fail are tried again after this, doubled each time.
const WAKE_RETRY_MS: u64 = 100;
const WAKE_RETRY_MS_MAX: u64 = 3_000;
/// A wake that brought nothing, because what is missing is just leaving, is ordered again after this.
const WAKE_AGAIN_MS: u64 = 10;
/// How long a model that could not give all is passed over.
const SHORT_SKIP_MS: u64 = 1_000;

/// Orders of a worker that are kept after their time. What it gives up late counts for the oldest of them.
pub(super) const OVERDUE_MAX: usize = 16;

/// What a worker was told to do.
#[derive(Debug)]
pub(crate) enum Doing {
    Reclaim {
        /// What is missing of it.
        left: ByteCount,
        takes_weights: bool,
        /// Weights go before what is cached.
        cached_last: bool,
        waiter: Option<oneshot::Sender<Told>>,
    },
    Wake {
        /// All device memory is there, and the bytes are coming.
        is_backed: bool,
    },
}

/// What a model is to give up, and for whom.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reclaim {
    pub(super) bytes: ByteCount,
    /// Weights go before what is cached.
    pub(super) cached_last: bool,
    /// Whose request it is for; itself, where that needs room for its own weights.
    pub(super) requester: Option<usize>,
    /// Which decision.
    pub(super) decision: Option<u64>,
}

/// An order that was not answered yet.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) doing: Doing,
    pub(crate) bytes: ByteCount,
    pub(crate) sent_ms: u64,
    pub(crate) deadline_ms: u64,
    pub(crate) overdue: bool,
}

impl Order {
    pub(crate) fn reclaim_left(&self) -> ByteCount {
        if let Doing::Reclaim { left, .. } = &self.doing { *left } else { ByteCount::ZERO }
    }

    pub(crate) const fn is_wake(&self) -> bool {
        matches!(self.doing, Doing::Wake { .. })
    }

    /// A wake whose bytes are coming, in the order in which a request needs them.
    pub(crate) const fn is_backed_wake(&self) -> bool {
        matches!(self.doing, Doing::Wake { is_backed: true })
    }

    /// Weights left the device.
    pub(crate) const fn lost_some(&mut self) {
        if let Doing::Wake { is_backed } = &mut self.doing {
            *is_backed = false;
        }
    }

    pub(crate) const fn takes_weights(&self) -> bool {
        matches!(self.doing, Doing::Reclaim { takes_weights: true, .. }) && !self.overdue
    }

    /// Weights go before what is cached.
    pub(crate) const fn takes_cached_last(&self) -> bool {
        matches!(self.doing, Doing::Reclaim { cached_last: true, .. })
    }

    /// Bytes came back; the oldest order counts them first.
    pub(crate) fn returned(&mut self, bytes: &mut ByteCount) {
        if let Doing::Reclaim { left, .. } = &mut self.doing {
            let counted = (*left).min(*bytes);
            *left -= counted;
            *bytes -= counted;
        }
    }
}

impl Core {
    /// Orders a model to give something up.
    pub(super) fn order_reclaim(
        &mut self,
        place: usize,
        reclaim: Reclaim,
        reason: String,
        waiter: Option<oneshot::Sender<Told>>,
        now_ms: u64,
    ) {
        let Reclaim { bytes, cached_last, requester, decision } = reclaim;
        let number = self.number();
        let mut allowed_ms = self.timing.reclaim_ms + bytes.0 / RECLAIM_BYTES_PER_MS;
        if let Some(command) = &self.models[place].config.command {
            allowed_ms = self.timing.reclaim_ms + DRAIN_MS_MAX + millis(command.stop_max);
        }
        let model = &mut self.models[place];
        let kept = model.usage.kv_live + if cached_last { model.usage.kv_cached } else { ByteCount::ZERO };
        let surplus = self.book.held(model.id, LeaseKind::Kv).saturating_sub(kept);
        let is_own = requester == Some(place);
        let said = model.say(FromServer::Reclaim {
            order: number,
            bytes,
            is_own,
            cached_last,
            deadline_ms: allowed_ms,
            reason: reason.clone(),
        });
        if !said {
            return self.break_off(place, "it does not read its messages".to_owned(), now_ms);
        }
        let takes_weights = !is_own && bytes > surplus;
        if takes_weights {
            model.turn_since_ms = None;
        }
        let doing = Doing::Reclaim { left: bytes, takes_weights, cached_last, waiter };
        model.cycle.note(reason.clone());
        let order = Order { doing, bytes, sent_ms: now_ms, deadline_ms: now_ms + allowed_ms, overdue: false };
        model.orders.insert(number, order);
        self.note_sent_away(place, requester.is_some());
        let requester = requester.map(|place| self.models[place].name.clone());
        self.tell(now_ms, Some(place), EventKind::EvictStarted { bytes, reason, requester, decision });
    }

    /// Orders a model to bring its weights back.
    pub(super) fn order_wake(&mut self, place: usize, bytes: ByteCount, reason: String, now_ms: u64) {
        let number = self.number();
        let model = &mut self.models[place];
        // One that nobody waits for has the time that somebody would have.
        let unasked_ms = now_ms + millis(self.config.limits.wait_max);
        let deadline_ms = model.queue.latest_deadline_ms().unwrap_or(unasked_ms);
        let allowed_ms = deadline_ms.saturating_sub(now_ms).max(1_000);
        model.never = None;
        model.wakes_after_leaving = false;
        let said =
            model.say(FromServer::Wake { order: number, deadline_ms: allowed_ms, reason: reason.clone() });
        if !said {
            return self.break_off(place, "it does not read its messages".to_owned(), now_ms);
        }
        let order = Order {
            doing: Doing::Wake { is_backed: false },
            bytes,
            sent_ms: now_ms,
            // The worker is to answer by its own deadline; this is when it is believed to be silent.
            deadline_ms: now_ms + allowed_ms + self.timing.reclaim_ms,
            overdue: false,
        };
        model.cycle.note(reason.clone());
        model.orders.insert(number, order);
        self.note_wake_ordered(place, now_ms);
        self.tell(now_ms, Some(place), EventKind::WakeStarted { bytes, reason });
    }

    pub(super) fn order_done(
        &mut self,
        place: usize,
        number: u64,
        (bytes, copied): (ByteCount, ByteCount),
        took_us: u64,
        error: Option<String>,
        now_ms: u64,
    ) {
        let model = &mut self.models[place];
        let Some(order) = model.orders.remove(&number) else {
            if number <= self.next_number {
                // Its time was up and it was given up already.
                return;
            }
            return self.break_off(place, format!("it answered order {number}, which is not open"), now_ms);
        };
        let duration_ms = now_ms.saturating_sub(order.sent_ms);
        match order.doing {
            Doing::Reclaim { left, waiter, .. } => {
                // A program that ended meanwhile had given back all of it before its steward read the order.
                let came = if model.is_rigid() { order.bytes.saturating_sub(left) } else { ByteCount::ZERO };
                let bytes = bytes.max(came);
                model.wakes_after_leaving = false;
                model.counts.evictions += 1;
                model.counts.evicted += bytes;
                if left.is_zero() {
                    model.skip_until_ms = 0;
                } else {
                    model.skip_until_ms = now_ms + SHORT_SKIP_MS;
                }
                if let Some(waiter) = waiter {
                    let told = Told { bytes, copied, duration_ms, error: error.clone() };
                    // Whoever asked may have gone.
                    let _ = waiter.send(told);
                }
                self.tell(now_ms, Some(place), EventKind::EvictDone { bytes, copied, duration_ms, error });
            }
            Doing::Wake { .. } => {
                model.brought.0 += bytes;
                model.brought.1 += copied;
                if error.is_none() {
                    self.note_woke(place, bytes, took_us, now_ms);
                }
                self.wake_answered(place, bytes, duration_ms, error, now_ms);
            }
        }
    }

    /// All memory of a wake is there: who waits for the model may go to its worker, which computes as the bytes arrive.
    pub(super) fn wake_backed(&mut self, place: usize, number: u64, now_ms: u64) {
        let model = &mut self.models[place];
        let held = self.book.held(model.id, LeaseKind::Weights);
        let Some(order) = model.orders.get_mut(&number) else {
            if number <= self.next_number {
                // Its time was up and it was given up already.
                return;
            }
            return self.break_off(
                place,
                format!("it has the memory of order {number}, which is not open"),
                now_ms,
            );
        };
        let Doing::Wake { is_backed } = &mut order.doing else {
            return self.break_off(place, format!("order {number} is no wake"), now_ms);
        };
        let declared = model.capabilities.as_ref().map_or(ByteCount::ZERO, |can| can.weights_bytes);
        if held.is_zero() || held < declared.max(model.weights_total) {
            // Some of it was given back while this was on its way; the answer to the order comes next.
            return;
        }
        *is_backed = true;
        let (bytes, after_ms) = (order.bytes, now_ms.saturating_sub(order.sent_ms));
        let parked = model.queue.requests() as u64;
        self.tell(now_ms, Some(place), EventKind::WakeBacked { bytes, after_ms, parked });
    }

    fn wake_answered(
        &mut self,
        place: usize,
        bytes: ByteCount,
        duration_ms: u64,
        error: Option<String>,
        now_ms: u64,
    ) {
        if let Some(reason) = error {
            return self.wake_failed(place, reason, now_ms);
        }
        let model = &mut self.models[place];
        let held = self.book.held(model.id, LeaseKind::Weights);
        // Given back again while the answer was on its way, or ordered away and not gone yet: then it is not up after all.
        // Its worker would answer another order at once in the same way, so that waits a moment.
        let partly = model.weights_total > held;
        let evicted_meanwhile = model.orders.values().any(Order::takes_weights);
        let declared = model.capabilities.as_ref().map_or(ByteCount::ZERO, |can| can.weights_bytes);
        let is_there = !held.is_zero() && held >= declared && !(partly && evicted_meanwhile);
        if is_there {
            model.weights_total = held;
        }
        if evicted_meanwhile {
            // Until that has left, every other wake would find nothing to bring either.
            model.wakes_after_leaving = true;
        } else if !is_there {
            model.wake_not_before_ms = now_ms + WAKE_AGAIN_MS;
        }
        model.wake_failures = 0;
        model.error = None;
        model.counts.wakes += 1;
        model.counts.restored += bytes;
        model.wake_time.push(duration_ms as f64);
        let parked = model.queue.len() as u64;
        if model.is_ready() {
            if !bytes.is_zero() {
                model.cycle.note(format!("{bytes} came back in {duration_ms} ms"));
            }
            self.advance(place, if is_there { LifeEvent::AllThere } else { LifeEvent::SomeLeft });
        }
        self.tell(now_ms, Some(place), EventKind::WakeDone { bytes, duration_ms, parked });
    }

    fn wake_failed(&mut self, place: usize, reason: String, now_ms: u64) {
        let model = &mut self.models[place];
        let wait_ms = (WAKE_RETRY_MS << model.wake_failures.min(10)).min(WAKE_RETRY_MS_MAX);
        model.wake_failures += 1;
        model.wake_not_before_ms = now_ms + wait_ms;
        model.cycle.note(format!("it did not wake: {reason}"));
        let never = model.never.take();
        self.tell(now_ms, Some(place), EventKind::WakeFailed { reason });
        if let Some(reason) = never {
            self.refuse_parked(place, &reason, None, now_ms);
        }
    }

    /// Orders whose time is up: others are asked, wakes are tried again.
    pub(super) fn expire_orders(&mut self, now_ms: u64) {
        for place in 0..self.models.len() {
            let skip_ms = self.timing.skip_ms;
            let model = &mut self.models[place];
            let mut timed_out = Vec::new();
            let mut wakes = Vec::new();
            for (number, order) in &mut model.orders {
                if order.overdue || order.deadline_ms > now_ms {
                    continue;
                }
                order.overdue = true;
                match &order.doing {
                    Doing::Reclaim { left, .. } => {
                        let after_ms = now_ms - order.sent_ms;
                        timed_out.push(EventKind::EvictTimedOut {
                            bytes: order.bytes,
                            missing: *left,
                            after_ms,
                        });
                    }
                    Doing::Wake { .. } => wakes.push(*number),
                }
            }
            if !timed_out.is_empty() {
                model.skip_until_ms = now_ms + skip_ms;
                model.wakes_after_leaving = false;
            }
            model.let_go_of_overdue(now_ms);
            for what in timed_out {
                self.tell(now_ms, Some(place), what);
            }
            for number in wakes {
                self.models[place].orders.remove(&number);
                self.wake_failed(place, "it did not answer the order to wake".to_owned(), now_ms);
            }
        }
    }

    /// The earliest deadline of an open order.
    pub(super) fn next_order_deadline(&self) -> Option<u64> {
        let orders = self.models.lively().filter(|model| model.is_ready()).flat_map(|m| m.orders.values());
        orders.filter(|order| !order.overdue).map(|order| order.deadline_ms).min()
    }
}

impl Record {
    /// Gives up the oldest orders that it did not carry out in time, where there are many: it is asked again and again, and may
    /// never answer. What still comes of them counts for those after them.
    fn let_go_of_overdue(&mut self, now_ms: u64) {
        let overdue = self.orders.iter().filter(|(_, order)| order.overdue).map(|(number, _)| *number);
        let overdue: Vec<u64> = overdue.collect();
        for number in &overdue[..overdue.len().saturating_sub(OVERDUE_MAX)] {
            let Some(Order {
                doing: Doing::Reclaim { left, waiter: Some(waiter), .. }, bytes, sent_ms, ..
            }) = self.orders.remove(number)
            else {
                continue;
            };
            let (duration_ms, copied) = (now_ms.saturating_sub(sent_ms), ByteCount::ZERO);
            let error = Some(format!("its worker never said that it gave up all of {bytes}"));
            // Whoever asked may have gone.
            let _ = waiter.send(Told { bytes: bytes - left, copied, duration_ms, error });
        }
    }
}
