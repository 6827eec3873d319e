//! The thrash index: how much of the moving was for nothing.
//!
//! A byte *thrashes* when it comes back to the device within [`THRASH_WINDOW_MS`] of having left it: whoever sent it away
//! would have done better to wait. The **index** is the bytes that thrashed in the last [`THRASH_WINDOW_MS`], over the
//! bytes that were *served* in it: the weights that requests were answered with, each request counting all of its
//! model's. At 1 every request has paid for bringing back a whole model that had just left; at 0.01 one in a hundred has.
//!
//! A model gives up its last bytes first and gets the newest missing ones back, so what comes back is taken to be what
//! left last. Kept for each model apart and summed for the shelf. Pure, and bounded: what left is kept for a window, in at
//! most [`LEFT_MAX`] pieces, the rest in buckets of a second.

use std::collections::VecDeque;

use crate::bytes::ByteCount;

/// How soon a byte has to come back to count, and the time that the index looks back over (milliseconds).
pub const THRASH_WINDOW_MS: u64 = 60_000;
/// Pieces that are remembered as having left; more are joined into the newest.
const LEFT_MAX: usize = 256;
const BUCKET_MS: u64 = 1_000;

/// Sums over the last window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThrashFigures {
    /// Bytes that came back so soon.
    pub thrashed: ByteCount,
    /// Bytes that requests were answered with.
    pub served: ByteCount,
}

impl ThrashFigures {
    /// Thrashed over served; where nothing was served, 0 without and 1 with bytes that thrashed.
    #[must_use]
    pub fn index(&self) -> f64 {
        if self.thrashed.is_zero() {
            0.0
        } else if self.served.is_zero() {
            1.0
        } else {
            self.thrashed.0 as f64 / self.served.0 as f64
        }
    }
}

impl core::iter::Sum for ThrashFigures {
    fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
        items.fold(Self::default(), |sum, item| Self {
            thrashed: ByteCount(sum.thrashed.0.saturating_add(item.thrashed.0)),
            served: ByteCount(sum.served.0.saturating_add(item.served.0)),
        })
    }
}

/// What came and went of one model.
#[derive(Clone, Debug, Default)]
pub struct Thrash {
    /// When bytes left, newest last.
    left: VecDeque<(u64, ByteCount)>,
    /// By second: figures of it.
    buckets: VecDeque<(u64, ThrashFigures)>,
    /// Bytes that came back within the window of leaving, since the beginning.
    total: ByteCount,
}

impl Thrash {
    /// Bytes of weights left the device.
    pub fn left(&mut self, bytes: ByteCount, now_ms: u64) {
        self.forget(now_ms);
        if bytes.is_zero() {
            return;
        }
        let is_full = self.left.len() >= LEFT_MAX;
        match self.left.back_mut() {
            Some((at_ms, sum)) if is_full || *at_ms == now_ms => {
                *at_ms = now_ms;
                *sum += bytes;
            }
            _ => self.left.push_back((now_ms, bytes)),
        }
    }

    /// Bytes of weights came back. Gives how many of them thrashed.
    pub fn came_back(&mut self, bytes: ByteCount, now_ms: u64) -> ByteCount {
        self.forget(now_ms);
        let mut rest = bytes;
        while let Some((_, newest)) = self.left.back_mut() {
            let part = rest.min(*newest);
            *newest -= part;
            rest -= part;
            if !newest.is_zero() {
                break;
            }
            self.left.pop_back();
        }
        let thrashed = bytes - rest;
        self.bucket(now_ms).thrashed += thrashed;
        self.total += thrashed;
        thrashed
    }

    /// A request was answered with so many bytes of weights.
    pub fn served(&mut self, bytes: ByteCount, now_ms: u64) {
        self.forget(now_ms);
        self.bucket(now_ms).served += bytes;
    }

    /// Sums over the window that ends at `now_ms`.
    #[must_use]
    pub fn figures(&self, now_ms: u64) -> ThrashFigures {
        let since_ms = now_ms.saturating_sub(THRASH_WINDOW_MS);
        self.buckets
            .iter()
            .filter(|(at_ms, _)| *at_ms + BUCKET_MS > since_ms)
            .map(|(_, figures)| *figures)
            .sum()
    }

    /// Bytes that thrashed since the beginning.
    #[must_use]
    pub const fn total(&self) -> ByteCount {
        self.total
    }

    fn bucket(&mut self, now_ms: u64) -> &mut ThrashFigures {
        let at_ms = now_ms / BUCKET_MS * BUCKET_MS;
        if self.buckets.back().is_none_or(|(newest, _)| *newest < at_ms) {
            self.buckets.push_back((at_ms, ThrashFigures::default()));
        }
        let newest = self.buckets.len() - 1;
        &mut self.buckets[newest].1
    }

    fn forget(&mut self, now_ms: u64) {
        let since_ms = now_ms.saturating_sub(THRASH_WINDOW_MS);
        while self.left.front().is_some_and(|(at_ms, _)| *at_ms < since_ms) {
            self.left.pop_front();
        }
        while self.buckets.front().is_some_and(|(at_ms, _)| at_ms + BUCKET_MS <= since_ms) {
            self.buckets.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: fn(u64) -> ByteCount = ByteCount::mib;

    #[test]
    fn only_what_left_within_the_window_thrashes_and_the_newest_first() {
        let mut thrash = Thrash::default();
        thrash.left(MIB(10), 0);
        thrash.left(MIB(4), 50_000);
        assert_eq!(thrash.came_back(MIB(6), 60_000), MIB(6), "4 of the newest and 2 of the older");
        assert_eq!(thrash.came_back(MIB(8), 60_001), MIB(0), "the rest left more than a minute ago");
        assert_eq!(thrash.total(), MIB(6));
        assert_eq!(thrash.figures(60_001).thrashed, MIB(6));
        assert_eq!(
            thrash.figures(200_000),
            ThrashFigures::default(),
            "and a minute later nothing is left of it"
        );
    }

    #[test]
    fn the_index_is_what_thrashed_over_what_was_served() {
        let mut thrash = Thrash::default();
        assert!(thrash.figures(0).index().abs() < f64::EPSILON);
        thrash.left(MIB(50), 100);
        thrash.came_back(MIB(50), 200);
        assert!((thrash.figures(300).index() - 1.0).abs() < f64::EPSILON, "all for nothing");
        for _ in 0..4 {
            thrash.served(MIB(100), 1_500);
        }
        assert!((thrash.figures(2_000).index() - 0.125).abs() < f64::EPSILON);
        let shelf: ThrashFigures = [thrash.figures(2_000), ThrashFigures::default()].into_iter().sum();
        assert_eq!(shelf.served, MIB(400));
    }

    #[test]
    fn it_stays_small_whatever_happens() {
        let mut thrash = Thrash::default();
        for moment in 0..100_000 {
            thrash.left(MIB(1), moment);
            thrash.served(MIB(1), moment);
        }
        assert!(thrash.left.len() <= LEFT_MAX && thrash.buckets.len() <= 62, "{}", thrash.buckets.len());
    }
}
