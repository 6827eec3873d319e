//! What it costs to bring a MiB back, measured: from host copies, and from the source where no copy is.
//!
//! Every wake tells how many bytes came from where and how long it took. The newest counts for a quarter, so that a
//! slower disk or a busier link is known after a few. Pure: whoever measures gives the figures.

use serde::{Deserialize, Serialize};

use crate::bytes::ByteCount;

/// Before anything was measured: 2 GiB/s.
const HOST_US_PER_MIB: u64 = 500;
/// Before anything was measured: 1 GiB/s.
const SOURCE_US_PER_MIB: u64 = 1_000;
/// The part of a new figure: one in so many.
const NEWEST_PART: u64 = 4;

/// The links to the device, as far as they were measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkSpeeds {
    host_us_per_mib: Option<u64>,
    source_us_per_mib: Option<u64>,
}

impl LinkSpeeds {
    /// Bytes came to the device in `took_us`: so many from host copies, so many from the source. What of the time falls
    /// to which is told by what is known of the link that brought fewer.
    pub fn note(&mut self, host: ByteCount, source: ByteCount, took_us: u64) {
        let mib = |bytes: ByteCount| bytes.0 >> 20;
        if mib(host) >= mib(source) && mib(host) > 0 {
            let rest = took_us.saturating_sub(mib(source) * self.source_us_per_mib());
            blend(&mut self.host_us_per_mib, rest / mib(host));
        } else if mib(source) > 0 {
            let rest = took_us.saturating_sub(mib(host) * self.host_us_per_mib());
            blend(&mut self.source_us_per_mib, rest / mib(source));
        }
    }

    /// True once something came from host copies or from the source.
    #[must_use]
    pub const fn is_measured(&self) -> bool {
        self.host_us_per_mib.is_some() || self.source_us_per_mib.is_some()
    }

    /// A MiB from a host copy.
    #[must_use]
    pub fn host_us_per_mib(&self) -> u64 {
        self.host_us_per_mib.unwrap_or(HOST_US_PER_MIB)
    }

    /// A MiB from the source; never cheaper than a host copy, since it passes through the host.
    #[must_use]
    pub fn source_us_per_mib(&self) -> u64 {
        self.source_us_per_mib.unwrap_or(SOURCE_US_PER_MIB).max(self.host_us_per_mib())
    }

    /// A MiB of a model of whose `total` bytes so many have no copy but the source.
    #[must_use]
    pub fn restore_us_per_mib(&self, total: ByteCount, source_only: ByteCount) -> u64 {
        if total.is_zero() {
            return self.host_us_per_mib();
        }
        let source = u128::from(source_only.min(total).0);
        let host = u128::from(total.0) - source;
        let sum = host * u128::from(self.host_us_per_mib()) + source * u128::from(self.source_us_per_mib());
        u64::try_from(sum / u128::from(total.0)).unwrap_or(u64::MAX).max(1)
    }
}

fn blend(known: &mut Option<u64>, newest: u64) {
    let newest = newest.max(1);
    *known = Some(known.map_or(newest, |old| (old * (NEWEST_PART - 1) + newest) / NEWEST_PART).max(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: fn(u64) -> ByteCount = ByteCount::mib;

    #[test]
    fn what_was_measured_takes_the_place_of_what_was_assumed() {
        let mut links = LinkSpeeds::default();
        assert_eq!(links.restore_us_per_mib(MIB(100), MIB(0)), 500);
        assert!(!links.is_measured());
        links.note(MIB(100), MIB(0), 2_000);
        assert!(links.is_measured());
        assert_eq!(links.host_us_per_mib(), 20);
        links.note(MIB(100), MIB(0), 6_000);
        assert_eq!(links.host_us_per_mib(), 30, "the newest counts for a quarter");
        links.note(MIB(0), MIB(0), 6_000);
        assert_eq!(links.host_us_per_mib(), 30, "nothing moved, nothing learnt");
    }

    #[test]
    fn bytes_without_a_copy_cost_what_the_source_costs() {
        let mut links = LinkSpeeds::default();
        links.note(MIB(100), MIB(0), 2_000);
        links.note(MIB(10), MIB(90), 200 + 90 * 400);
        assert_eq!((links.host_us_per_mib(), links.source_us_per_mib()), (20, 400));
        assert_eq!(links.restore_us_per_mib(MIB(100), MIB(50)), 210);
        assert_eq!(links.restore_us_per_mib(MIB(0), MIB(0)), 20);
        links.note(MIB(0), MIB(1 << 20), 1);
        links.note(MIB(0), MIB(1 << 20), 1);
        assert!(links.source_us_per_mib() >= links.host_us_per_mib());
    }
}
