//! What of a sequence is loaded and what is left to be computed.
//!
//! Apart because the decision is [`Learned`]'s: here are the clock, the lock and what the tiers say at the moment. Loads teach
//! what they took from the first request to the last copy, run by run, where a run is blocks in a row of one tier.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::store::recompute::{Asked, Decision, Learned, Run};

use super::Inner;

/// What was seen, and what was decided last.
#[derive(Debug)]
pub(super) struct Choices {
    learned: Mutex<Learned>,
    last: Mutex<Option<Decision>>,
    begun: Instant,
}

impl Choices {
    pub(super) fn new(parts: Vec<String>) -> Self {
        Self { learned: Mutex::new(Learned::new(parts)), last: Mutex::default(), begun: Instant::now() }
    }

    /// Knows from now on what another one knows. Each has its own lock, taken one after the other.
    pub(super) fn take_over(&self, other: &Self) {
        let seen = other.learned.lock().clone();
        let later = self.begun.saturating_duration_since(other.begun);
        self.learned.lock().take_over(&seen, u64::try_from(later.as_millis()).unwrap_or(u64::MAX));
    }

    pub(super) fn computed(&self, tokens: u64, took: Duration) {
        self.learned.lock().computed(tokens, took.as_secs_f64() * 1e6);
    }

    pub(super) fn load_us_per_mib(&self) -> Option<f64> {
        self.learned.lock().load_us_per_mib()
    }

    pub(super) fn last(&self) -> Option<String> {
        self.last.lock().as_ref().map(ToString::to_string)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// What blocks in a row that are loaded take, by the parts they come from.
#[derive(Debug)]
pub(super) struct Watch {
    parts: Vec<usize>,
    /// So many are there.
    arrived: usize,
    /// When the last ones were.
    at: Instant,
    /// Since the part changed: from where, how many, and what they took.
    run: Option<(usize, usize, Duration)>,
}

impl Watch {
    pub(super) fn new(parts: Vec<usize>) -> Self {
        Self { parts, arrived: 0, at: Instant::now(), run: None }
    }

    /// More have arrived, together. What ends by that: from where, how many, and what they took.
    fn arrive(&mut self, blocks: usize) -> Option<(usize, usize, Duration)> {
        let took = self.at.elapsed();
        self.at += took;
        let end = (self.arrived + blocks).min(self.parts.len());
        let new = &self.parts[self.arrived..end];
        self.arrived = end;
        let part = new.first().copied().filter(|first| new.iter().all(|part| part == first));
        match (&mut self.run, part) {
            (Some((run, count, all)), Some(part)) if *run == part => {
                *count += blocks;
                *all += took;
                None
            }
            // Of several parts at once nobody knows which of them took the time.
            (run, part) => std::mem::replace(run, part.map(|part| (part, blocks, took))),
        }
    }

    /// No more come. One that did not come in time counts as if it had just come.
    fn end(mut self, is_late: bool) -> Vec<(usize, usize, Duration)> {
        let last = if is_late && self.arrived < self.parts.len() { self.arrive(1) } else { None };
        last.into_iter().chain(self.run).collect()
    }
}

impl Inner {
    /// Of these parts of the blocks that follow the first `held`: how many blocks are loaded.
    pub(super) fn choose(&self, tokens: usize, held: usize, parts: &[usize]) -> usize {
        if !self.options.is_choosing {
            return parts.len();
        }
        let small = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let mut runs: Vec<Run> = Vec::new();
        for part in parts {
            let (tokens, bytes) = (small(self.block_tokens), self.payload_bytes as u64);
            match runs.last_mut() {
                Some(run) if run.tier == *part => {
                    run.tokens = run.tokens.saturating_add(tokens);
                    run.bytes += bytes;
                }
                _ => runs.push(Run { tokens, bytes, tier: *part }),
            }
        }
        let queued: Vec<u64> =
            (0..self.store.parts().len()).map(|part| self.store.queued_bytes(part)).collect();
        let asked = Asked {
            // One more than can be found: the last one is computed in any case.
            tokens: small(tokens).saturating_add(1),
            ready: small(held * self.block_tokens),
            runs: &runs,
            queued_bytes: &queued,
            block_tokens: small(self.block_tokens),
        };
        let decision = self.choices.learned.lock().decide(&asked, self.choices.now_ms());
        let load = (decision.load_end.saturating_sub(asked.ready)) as usize / self.block_tokens;
        tracing::debug!(?asked, %decision, "what of a sequence is loaded and what is computed");
        *self.choices.last.lock() = Some(decision);
        let load = load.min(parts.len());
        self.count(|counts| counts.recomputed += (parts.len() - load) as u64);
        load
    }

    /// Blocks in a row are on the device.
    pub(super) fn have_arrived(&self, watch: &mut Watch, blocks: usize) {
        if let Some(run) = watch.arrive(blocks) {
            self.teach(run);
        }
    }

    /// Nothing more comes: what did not come in time was slow too.
    pub(super) fn have_ended(&self, watch: Watch, is_late: bool) {
        for run in watch.end(is_late) {
            self.teach(run);
        }
    }

    fn teach(&self, (part, blocks, took): (usize, usize, Duration)) {
        let (bytes, us) = ((blocks * self.payload_bytes) as u64, took.as_secs_f64() * 1e6);
        self.choices.learned.lock().loaded(part, bytes, us, self.choices.now_ms());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_to_the_part_that_took_it() {
        let mut watch = Watch::new(vec![0, 0, 0, 0, 1, 1, 1, 1, 1, 1]);
        let mut told = Vec::new();
        for blocks in [2, 1, 3, 2] {
            std::thread::sleep(Duration::from_millis(1));
            told.extend(watch.arrive(blocks));
        }
        // The third time both parts gave something: that teaches nothing.
        told.extend(watch.end(true));
        let counts: Vec<_> = told.iter().map(|(part, blocks, _)| (*part, *blocks)).collect();
        assert_eq!(counts, [(0, 3), (1, 3)], "the last one is the one that did not come");
        assert!(told.iter().all(|(_, _, took)| *took >= Duration::from_millis(1)));
        let nothing = Watch::new(vec![1]);
        assert_eq!(nothing.end(false), []);
        let hung = Watch::new(vec![1, 1]);
        assert_eq!(hung.end(true).len(), 1);
    }
}
