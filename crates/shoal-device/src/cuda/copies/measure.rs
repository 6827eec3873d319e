//! What copies cost on this device: read from a file of an earlier process, else measured.
//!
//! Apart because it is done once and has a budget: a device that is busy, or has no memory to spare, is not held up, and
//! the guess stays. It uses 16 MiB on both sides for a fraction of a second, outside of any lease.

#![expect(unsafe_code, reason = "queues copies between two blocks of its own")]

use std::hint::spin_loop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::copy_plan::Run;
use shoal_core::copy_plan::costs::{CopyCosts, Costs, Method, MethodCosts, SIZES};

use super::{Copies, Direction, Part, Parts, SharedKeep};
use crate::copy_cache;
use crate::cuda::context::Context;
use crate::cuda::vmm::Block;
use crate::device::{RawEvent, RawStream};
use crate::error::DeviceError;

/// Bytes of each side's block, and at most of one sample.
const SPAN_BYTES: u64 = 16 << 20;
/// Copies of one sample by the copy engine: enough to see what one costs.
const CALLS_MAX: u64 = 256;
const SAMPLES: usize = 3;
/// After this long the guess stays.
const BUDGET: Duration = Duration::from_millis(1500);

/// Page-locked memory of the host.
#[derive(Debug)]
struct HostBlock {
    context: Arc<Context>,
    at: u64,
}

impl Drop for HostBlock {
    fn drop(&mut self) {
        let outcome = self.context.bind().and_then(|_bound| {
            // SAFETY: from `host_allocate`; every job that uses it holds this object.
            unsafe { self.context.driver().host_free(self.at) }
        });
        if let Err(error) = outcome {
            tracing::debug!(%error, "page-locked memory could not be given back");
        }
    }
}

/// The table of this device and driver; `None` where it could not be measured now.
pub(super) fn known(copies: &Copies, parts: Parts<'_>) -> Option<CopyCosts> {
    let directory = copy_cache::directory();
    if let Some(costs) = directory.as_deref().and_then(|place| copy_cache::load(place, parts.key)) {
        return Some(costs);
    }
    let start = Instant::now();
    match measure(copies, parts) {
        Ok(costs) => {
            tracing::debug!(took = ?start.elapsed(), "measured what copies cost");
            if let Some(place) = directory
                && let Err(error) = copy_cache::store(&place, parts.key, &costs)
            {
                tracing::debug!(%error, "what copies cost could not be kept for the next process");
            }
            Some(costs)
        }
        Err(error) => {
            tracing::info!(%error, "what copies cost could not be measured; a guess will do");
            None
        }
    }
}

/// What measuring needs.
struct Bench<'a> {
    copies: &'a Copies,
    parts: Parts<'a>,
    stream: RawStream,
    event: RawEvent,
    on_device: u64,
    in_host: u64,
    keep: SharedKeep,
    until: Instant,
}

fn measure(copies: &Copies, parts: Parts<'_>) -> Result<CopyCosts, DeviceError> {
    let context = &copies.context;
    let until = Instant::now() + BUDGET;
    let on_device = Block::take(context, SPAN_BYTES)?;
    let in_host = {
        let _bound = context.bind()?;
        let at = context.driver().host_allocate(SPAN_BYTES)?;
        HostBlock { context: Arc::clone(context), at }
    };
    let (device_at, host_at) = (on_device.at(), in_host.at);
    // Whatever happens, both stay until the last job that uses them has ended.
    let keep: SharedKeep = Arc::new(Mutex::new(Box::new((on_device, in_host))));
    let stream = parts.engine.create_stream()?;
    let outcome = parts.engine.create_event().and_then(|event| {
        let bench =
            Bench { copies, parts, stream, event, on_device: device_at, in_host: host_at, keep, until };
        let both = bench.costs(Direction::Up).and_then(|up| {
            let down = bench.costs(Direction::Down)?;
            Ok(CopyCosts::new(up, down))
        });
        parts.engine.destroy_event(event).and(both)
    });
    parts.engine.destroy_stream(stream).and(outcome)
}

impl Bench<'_> {
    fn costs(&self, direction: Direction) -> Result<Costs, DeviceError> {
        let first = self.best(direction, Method::Dma, SIZES[0], 1)?;
        let dma = self.method(direction, Method::Dma, first)?;
        let has_batch = self.copies.context.driver().has_copy_batch();
        let batch = if has_batch { Some(self.method(direction, Method::Batch, first)?) } else { None };
        let has_kernel = self.parts.facts.reaches_host;
        let kernel = if has_kernel { Some(self.method(direction, Method::Kernel, first)?) } else { None };
        Ok(Costs { dma, batch, kernel })
    }

    /// `first`: what one copy of the least size takes by the first method, which no list can do without.
    fn method(&self, direction: Direction, method: Method, first: u64) -> Result<MethodCosts, DeviceError> {
        let alone = self.best(direction, method, SIZES[0], 1)?;
        let mut each = [0; SIZES.len()];
        for (nanos, size) in each.iter_mut().zip(SIZES) {
            let most = if method == Method::Kernel { u64::MAX } else { CALLS_MAX };
            let count = (SPAN_BYTES / size).min(most);
            let all = self.best(direction, method, size, count)?;
            *nanos = (all.saturating_sub(alone) / count).max(1);
        }
        Ok(MethodCosts { start: alone.saturating_sub(first), each })
    }

    /// Nanoseconds of the best of some samples; the first one is not counted.
    fn best(&self, direction: Direction, method: Method, size: u64, count: u64) -> Result<u64, DeviceError> {
        let places = SPAN_BYTES / size;
        let runs: Vec<Run> = (0..count)
            .map(|index| {
                // Two orders that visit every place once, so that few neighbours at one end are neighbours at the other.
                let (one, other) = ((index * 5 + 1) % places * size, (index * 11 + 3) % places * size);
                let (source, target) = match direction {
                    Direction::Up => (self.in_host + one, self.on_device + other),
                    Direction::Down => (self.on_device + one, self.in_host + other),
                };
                Run { source, target, bytes: size, seam: 0 }
            })
            .collect();
        let units: Vec<Run> = if method == Method::Kernel {
            runs.iter().flat_map(|run| run.units(super::UNIT_BYTES)).collect()
        } else {
            Vec::new()
        };
        let part = match method {
            Method::Dma => Part::Dma(&runs),
            Method::Batch => Part::Batch(&runs),
            Method::Kernel => Part::Units(&units),
        };
        let mut best = u64::MAX;
        for sample in 0..=SAMPLES {
            let nanos = self.time(direction, part)?;
            if sample > 0 {
                best = best.min(nanos);
            }
        }
        Ok(best)
    }

    fn time(&self, direction: Direction, part: Part<'_>) -> Result<u64, DeviceError> {
        let (engine, start) = (self.parts.engine, Instant::now());
        // SAFETY: between two blocks that `keep` keeps, in pieces that do not overlap; nobody refers to them.
        unsafe { self.copies.queue_part(engine, self.stream, direction, part, &self.keep) }?;
        engine.record(self.stream, self.event)?;
        while !engine.query_event(self.event)? {
            if Instant::now() >= self.until {
                return Err(DeviceError::Timeout { what: "measuring copies", waited: BUDGET });
            }
            spin_loop();
        }
        Ok(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}
