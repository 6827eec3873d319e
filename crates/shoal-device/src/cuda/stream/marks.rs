//! Points of a stream, and the driver's events that stand for them.

use core::sync::atomic::{AtomicBool, Ordering};
use std::mem;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::cuda::context::Context;
use crate::cuda::result::{Driver, EventHandle};
use crate::error::DeviceError;

/// Driver events kept for the next marks.
const SPARES_MAX: usize = 256;

/// Events of the driver's that no mark uses now.
#[derive(Debug)]
pub(super) struct Spares {
    pub(super) context: Arc<Context>,
    events: Mutex<Vec<EventHandle>>,
}

impl Spares {
    pub(super) fn new(context: &Arc<Context>) -> Arc<Self> {
        Arc::new(Self { context: Arc::clone(context), events: Mutex::default() })
    }

    pub(super) fn take(&self) -> Result<EventHandle, DeviceError> {
        let spare = self.events.lock().pop();
        spare.map_or_else(|| self.context.driver().event_create(), Ok)
    }

    pub(super) fn put(&self, event: EventHandle) {
        let mut events = self.events.lock();
        if events.len() < SPARES_MAX {
            events.push(event);
            return;
        }
        drop(events);
        self.destroy(vec![event]);
    }

    fn destroy(&self, events: Vec<EventHandle>) {
        let outcome = self.context.bind().and_then(|_bound| {
            events.into_iter().try_for_each(|event| self.context.driver().event_destroy(event))
        });
        if let Err(error) = outcome {
            tracing::debug!(%error, "an event could not be given back");
        }
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        let events = mem::take(self.events.get_mut());
        self.destroy(events);
    }
}

/// A point of a stream: everything up to job number `sequence`.
#[derive(Debug)]
pub(super) struct Mark {
    pub(super) event: Option<EventHandle>,
    pub(super) sequence: u64,
    is_done: AtomicBool,
    pub(super) spares: Arc<Spares>,
}

impl Mark {
    /// An event that was recorded behind job number `sequence`.
    pub(super) fn new(event: EventHandle, sequence: u64, spares: &Arc<Spares>) -> Arc<Self> {
        let (is_done, spares) = (AtomicBool::new(false), Arc::clone(spares));
        Arc::new(Self { event: Some(event), sequence, is_done, spares })
    }

    /// Whether the stream has passed it. Needs a bound thread.
    pub(super) fn is_passed(&self, driver: Driver) -> Result<bool, DeviceError> {
        if self.is_done.load(Ordering::Acquire) {
            return Ok(true);
        }
        let Some(event) = &self.event else { return Ok(true) };
        let is_passed = driver.event_query(event)?;
        if is_passed {
            self.is_done.store(true, Ordering::Release);
        }
        Ok(is_passed)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // It may be recorded again while a stream still waits for it: that wait is for the old record.
        if let Some(event) = self.event.take() {
            self.spares.put(event);
        }
    }
}
