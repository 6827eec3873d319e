//! Long loads while the driver scrubs memory that was given back.
//!
//! Apart because it is about a thing that nobody asks the driver for and that it tells nobody: what is released is scrubbed
//! afterwards, by the copy engine that loads want too, and while that goes on a load gets half of the link. On an H100,
//! 13 GiB that went to the device at once after 13 GiB had been given back took 21 ms longer for it (50 GB/s in place of 54),
//! and 20 ms after that nothing of it was left. A kernel needs no copy engine: so loads that would begin before the
//! scrubbing has ended go by the kernel of small blocks, at 50 GB/s. Only what this process gives back is known here.

#![expect(unsafe_code, reason = "queues a kernel by address")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::copy_plan::Run;

use super::{Copies, Direction, Part, Parts, Places, UNIT_BYTES};
use crate::device::{Keep, RawCopy, RawStream};
use crate::error::DeviceError;

/// Shorter loads are over before it matters.
const LOAD_BYTES_MIN: u64 = 4 << 20;
/// What the driver scrubs in a second, and what a kernel loads; both low, as measured on an H100.
const SCRUBBED_PER_SECOND: u64 = 450_000_000_000;
const LOADED_PER_SECOND: u64 = 50_000_000_000;

fn duration(bytes: u64, per_second: u64) -> Duration {
    Duration::from_nanos(bytes.saturating_mul(1000) / (per_second / 1_000_000))
}

/// Until when the driver scrubs, as far as is known.
#[derive(Debug, Default)]
pub(in crate::cuda) struct Scrubbing(Mutex<Option<Instant>>);

impl Scrubbing {
    /// So much was given back just now.
    pub(in crate::cuda) fn add(&self, bytes: u64) {
        let mut until = self.0.lock();
        let now = Instant::now();
        *until = Some(until.unwrap_or(now).max(now) + duration(bytes, SCRUBBED_PER_SECOND));
    }

    fn until(&self) -> Option<Instant> {
        *self.0.lock()
    }
}

/// Until when the loads are done that go by the kernel.
#[derive(Debug, Default)]
pub(super) struct Lane(Mutex<Option<Instant>>);

impl Lane {
    /// Whether a load that is queued now would begin before the scrubbing has ended; then it counts as queued.
    fn enter(&self, bytes: u64, scrubbed: Option<Instant>) -> bool {
        let now = Instant::now();
        let Some(scrubbed) = scrubbed.filter(|until| *until > now) else { return false };
        let mut loaded = self.0.lock();
        let begins = loaded.unwrap_or(now).max(now);
        let is_before = begins < scrubbed;
        if is_before {
            *loaded = Some(begins + duration(bytes, LOADED_PER_SECOND));
        }
        is_before
    }
}

impl Copies {
    /// Queues a load by the kernel if the copy engine is busy scrubbing; else gives `keep` back.
    ///
    /// # Safety
    /// As for [`crate::Device::copy`].
    pub(in crate::cuda) unsafe fn load_beside_scrubbing(
        &self,
        parts: Parts<'_>,
        stream: RawStream,
        copy: &RawCopy,
        keep: Keep,
    ) -> Result<Option<Keep>, DeviceError> {
        let bytes = copy.source.bytes.0;
        let scrubbed = parts.vmm.scrubbing().until();
        if scrubbed.is_none() || bytes < LOAD_BYTES_MIN || !parts.facts.reaches_host {
            return Ok(Some(keep));
        }
        let mut places = Places { vmm: parts.vmm, host: parts.host, on_device: None, in_host: None };
        // Where memory is not page-locked a kernel does not reach it.
        let run = places.run(copy, Direction::Up).filter(Run::is_wide);
        let Some(run) = run.filter(|_| self.lane.enter(bytes, scrubbed)) else { return Ok(Some(keep)) };
        let units: Vec<Run> = run.units(UNIT_BYTES).collect();
        let keep = Arc::new(Mutex::new(keep));
        // SAFETY: the caller's promise; the units are the copy, and every job holds `keep`.
        unsafe { self.queue_part(parts.engine, stream, Direction::Up, Part::Units(&units), &keep) }?;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_go_by_the_kernel_for_as_long_as_the_scrubbing_lasts() {
        let (scrubbing, lane) = (Scrubbing::default(), Lane::default());
        let piece = 256 << 20;
        assert!(!lane.enter(piece, scrubbing.until()), "nothing was given back");
        // An hour's worth of scrubbing, so that a slow machine does not count.
        scrubbing.add(SCRUBBED_PER_SECOND * 3600);
        let until = scrubbing.until();
        let hour = LOADED_PER_SECOND * 3600;
        assert!(lane.enter(hour / 2, until) && lane.enter(hour, until), "both begin before it has ended");
        assert!(!lane.enter(piece, until), "it has ended when those before are done");
        assert!(!lane.enter(piece, Some(Instant::now())), "it is over");
    }
}
