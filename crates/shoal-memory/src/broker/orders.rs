//! Orders of the server, carried out on threads of their own, each answered exactly once; and the figures.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{FromWorker, WorkerUsage};

use super::{BrokerClient, Queued};
use crate::error::MemoryError;
use crate::manager::MemoryManager;
use crate::region::Report;

/// Figures are said at most this often,
const USAGE_EVERY: Duration = Duration::from_millis(200);
/// or this often where the last request has ended: by what was said while it ran, the server would take the model to be busy
/// and its prefixes to be in use, and others would wait for it, or take from it what it could least do without.
const USAGE_ENDED_EVERY: Duration = Duration::from_millis(20);

/// What an order is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    /// So many bytes of whatever there is.
    Reclaim(ByteCount),
    /// The same, what is only cached after weights.
    ReclaimCachedLast(ByteCount),
    /// So many bytes that nobody here misses.
    ReclaimSpare(ByteCount),
    Wake,
}

/// An order; dropping it unanswered says that it was not carried out.
#[derive(Debug)]
pub(super) struct Order {
    client: Weak<BrokerClient>,
    /// The server that gave it: no other hears the answer.
    epoch: u64,
    number: u64,
    work: Work,
    received: Instant,
    deadline: Instant,
    reason: String,
    is_answered: bool,
}

impl Order {
    pub(super) fn new(
        client: &Arc<BrokerClient>,
        number: u64,
        work: Work,
        deadline_ms: u64,
        reason: String,
    ) -> Self {
        let received = Instant::now();
        // A day is as good as for ever, and does not overflow.
        let deadline = received + Duration::from_millis(deadline_ms.min(86_400_000));
        let epoch = client.epoch();
        Self {
            client: Arc::downgrade(client),
            epoch,
            number,
            work,
            received,
            deadline,
            reason,
            is_answered: false,
        }
    }

    fn carry_out(mut self, manager: &Weak<MemoryManager>) {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let Some(manager) = manager.upgrade() else {
            self.answer(ByteCount::ZERO, ByteCount::ZERO, Some("the memory manager is gone".to_owned()));
            return;
        };
        let outcome = match self.work {
            Work::Reclaim(bytes) => manager.reclaim(bytes, left, &self.reason),
            Work::ReclaimCachedLast(bytes) => manager.reclaim_cached_last(bytes, left, &self.reason),
            Work::ReclaimSpare(bytes) => manager.reclaim_spare(bytes, left, &self.reason),
            Work::Wake => {
                let awake = manager.wake_weights_telling(left, &self.reason, || self.say_backed());
                awake.map(|report| Report { freed: report.requested, ..report })
            }
        };
        match outcome {
            Ok(report) => {
                let error = report.error.map(|error| error.to_string());
                self.answer(report.freed, report.copied, error);
            }
            Err(error) => self.fail(&error),
        }
    }

    /// Says that the memory is there and the bytes are coming, to a server that makes use of it.
    fn say_backed(&self) {
        let Some(client) = self.client.upgrade() else { return };
        let is_of_use = {
            let state = client.state.lock();
            state.forwards_when_backed && state.steps_in_order
        };
        if is_of_use {
            client.say(self.epoch, &FromWorker::WakeBacked { order: self.number });
        }
    }

    fn fail(&mut self, error: &MemoryError) {
        self.answer(ByteCount::ZERO, ByteCount::ZERO, Some(error.to_string()));
    }

    fn answer(&mut self, bytes: ByteCount, copied: ByteCount, error: Option<String>) {
        if std::mem::replace(&mut self.is_answered, true) {
            return;
        }
        let duration_us = u64::try_from(self.received.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let Some(client) = self.client.upgrade() {
            client.say(
                self.epoch,
                &FromWorker::OrderDone { order: self.number, bytes, copied, duration_us, error },
            );
        }
    }
}

impl Drop for Order {
    fn drop(&mut self) {
        self.answer(ByteCount::ZERO, ByteCount::ZERO, Some("the order was not carried out".to_owned()));
    }
}

/// Queues an order, or answers at once that it cannot be.
pub(super) fn queue(queue: &SyncSender<Order>, order: Order) {
    if let Err(TrySendError::Full(mut order) | TrySendError::Disconnected(mut order)) = queue.try_send(order)
    {
        order.answer(ByteCount::ZERO, ByteCount::ZERO, Some("too many orders are waiting".to_owned()));
    }
}

pub(super) fn start(
    client: &Arc<BrokerClient>,
    manager: &Arc<MemoryManager>,
    Queued { reclaims, wakes, ended }: Queued,
) -> io::Result<()> {
    for (name, orders) in [("shoal-reclaim", reclaims), ("shoal-restore", wakes)] {
        let manager = Arc::downgrade(manager);
        // Ends when the client is dropped, and with it the sending end.
        let work = move || orders.into_iter().for_each(|order| order.carry_out(&manager));
        thread::Builder::new().name(name.to_owned()).spawn(work)?;
    }
    let (client, manager) = (Arc::downgrade(client), Arc::downgrade(manager));
    thread::Builder::new()
        .name("shoal-usage".to_owned())
        .spawn(move || say_usage(&client, &manager, &ended))?;
    Ok(())
}

fn say_usage(client: &Weak<BrokerClient>, manager: &Weak<MemoryManager>, ended: &Receiver<()>) {
    let mut said: Option<(u64, WorkerUsage)> = None;
    loop {
        {
            let (Some(client), Some(manager)) = (client.upgrade(), manager.upgrade()) else { return };
            if client.closed().is_some() {
                return;
            }
            let mut usage = manager.usage();
            let (figures, epoch) = {
                let state = client.state.lock();
                (state.figures.clone(), state.epoch)
            };
            usage.requests_running = figures.requests_running;
            usage.requests_waiting = figures.requests_waiting;
            usage.tokens_out = figures.tokens_out;
            usage.tokens_embedded = figures.tokens_embedded;
            usage.kv_back_us_per_mib = figures.kv_back_us_per_mib;
            usage.kv_found_milli = figures.kv_found_milli;
            usage.tiers = figures.tiers;
            usage.weights_at_rest = figures.weights_at_rest;
            usage.overhead_device = figures.overhead.unwrap_or(usage.overhead_device);
            usage.overhead_peak = figures.overhead_peak;
            if said.as_ref().is_none_or(|(to, before)| *to != epoch || *before != usage) {
                client.state.lock().usage = usage.clone();
                client.say(epoch, &FromWorker::Usage { usage: usage.clone() });
                said = Some((epoch, usage));
            }
        }
        thread::sleep(USAGE_ENDED_EVERY);
        if ended.recv_timeout(USAGE_EVERY.saturating_sub(USAGE_ENDED_EVERY))
            == Err(RecvTimeoutError::Disconnected)
        {
            return;
        }
    }
}
