//! What loading and computing cost here, as it was seen, and which way a request goes by that.
//!
//! Apart because it is all that has to be remembered between two requests. No clock: times are said to it. Nothing is
//! computed for a guess: until a step was seen, and unless computing saves a good deal, what is there is loaded. A tier that
//! is passed over would never be measured again, so from time to time a few of its blocks are loaded all the same.

use core::fmt;

use serde::Serialize;

use super::{Choice, Cost, Estimate, Overlap, Question, Run, TierNow, choose};

/// What a transfer is believed to cost before one was seen: little, so that each way is tried.
const TIER_GUESS: Cost = Cost { fixed_us: 100.0, unit_us: 1e-4 };
/// The same of computing a token; it only fills up the first few samples.
const PREFILL_GUESS: Cost = Cost { fixed_us: 1_000.0, unit_us: 50.0 };
/// Computing what is there has to save at least so much.
const SAVED_US_MIN: f64 = 5_000.0;
/// And this part of the time that loading takes: an estimate may be off by that much.
const SAVED_PART_MIN: f64 = 0.15;
const MIB_BYTES: f64 = 1_048_576.0;
/// A tier that was not read for so long is measured anew.
const STALE_MS: u64 = 60_000;
/// How much of it is read for that.
const PROBE_BYTES: u64 = 4 << 20;

/// One request, as far as tiers matter to it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Asked<'q> {
    /// Its tokens.
    pub tokens: u32,
    /// How many of them, from the first on, are on the device already.
    pub ready: u32,
    /// What tiers have, as in [`Question::runs`].
    pub runs: &'q [Run],
    /// Bytes that wait in each tier before it.
    pub queued_bytes: &'q [u64],
    /// Tokens of a block.
    pub block_tokens: u32,
}

/// Why a request goes the way it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Because {
    /// It is the fastest.
    Fastest,
    /// All is loaded: nobody knows yet what computing costs.
    Unmeasured,
    /// All is loaded: computing would save too little.
    Close,
    /// A few blocks are loaded: their tier has not been measured for a while.
    Stale,
}

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fastest => "the fastest way",
            Self::Unmeasured => "all is loaded, as nobody knows yet what computing takes",
            Self::Close => "all is loaded, as computing saves too little",
            Self::Stale => "a few blocks are loaded to measure their tier again",
        })
    }
}

/// Which way a request goes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    /// What is loaded ends before this token.
    pub load_end: u32,
    /// What of the request tiers have ends before this one.
    pub there_end: u32,
    /// Why.
    pub because: Because,
    /// The fastest way by these costs, with its numbers; none where computing was never measured.
    pub choice: Option<Choice>,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.because)?;
        match (&self.choice, self.because) {
            (None, _) => Ok(()),
            (Some(choice), Because::Fastest) => write!(f, ": {choice}"),
            (Some(choice), _) => write!(f, "; by what was measured, {choice}"),
        }
    }
}

#[derive(Clone, Debug)]
struct Tier {
    name: String,
    cost: Estimate,
    /// When it was read last.
    read_ms: Option<u64>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Learned {
    tiers: Vec<Tier>,
    prefill: Estimate,
    /// The most tokens that were computed in one step.
    step_tokens: u64,
}

impl Learned {
    /// Knows nothing yet of these tiers.
    #[must_use]
    pub fn new(tiers: impl IntoIterator<Item = String>) -> Self {
        let tier = |name| Tier { name, cost: Estimate::new(TIER_GUESS), read_ms: None };
        Self {
            tiers: tiers.into_iter().map(tier).collect(),
            prefill: Estimate::new(PREFILL_GUESS),
            step_tokens: 0,
        }
    }

    /// Takes over what another one saw: of computing, and of tiers of the same names. `later_ms` is by how much this one's clock
    /// began later. For a cache that gets one more tier: what was seen of the others holds as before.
    pub fn take_over(&mut self, other: &Self, later_ms: u64) {
        for tier in &mut self.tiers {
            if let Some(same) = other.tiers.iter().find(|same| same.name == tier.name) {
                let read_ms = same.read_ms.map(|read| read.saturating_sub(later_ms));
                *tier = Tier { name: tier.name.clone(), cost: same.cost.clone(), read_ms };
            }
        }
        self.prefill = other.prefill.clone();
        self.step_tokens = other.step_tokens;
    }

    /// So many bytes came from a tier to the device in `us` microseconds.
    pub fn loaded(&mut self, tier: usize, bytes: u64, us: f64, now_ms: u64) {
        if let Some(tier) = self.tiers.get_mut(tier) {
            tier.cost.saw(bytes, us);
            tier.read_ms = Some(now_ms);
        }
    }

    /// A step computed so many tokens in `us` microseconds.
    pub fn computed(&mut self, tokens: u64, us: f64) {
        if us.is_finite() && us > 0.0 {
            self.prefill.saw(tokens, us);
            self.step_tokens = self.step_tokens.max(tokens);
        }
    }

    /// What bringing one MiB more to the device takes (microseconds), from the fastest tier of those that were read; none before
    /// one was.
    #[must_use]
    pub fn load_us_per_mib(&self) -> Option<f64> {
        let read = self.tiers.iter().filter(|tier| tier.cost.seen() > 0);
        read.map(|tier| tier.cost.cost().unit_us * MIB_BYTES).min_by(f64::total_cmp)
    }

    /// What computing so many tokens costs: one step, or as many full ones as they take.
    fn prefill_of(&self, tokens: u32) -> Cost {
        let cost = self.prefill.cost();
        if u64::from(tokens) <= self.step_tokens || self.step_tokens == 0 {
            return cost;
        }
        let step = self.step_tokens as f64;
        Cost { fixed_us: 0.0, unit_us: cost.of(step) / step }
    }

    /// Decides. The same history and the same request give the same answer.
    #[must_use]
    pub fn decide(&self, asked: &Asked<'_>, now_ms: u64) -> Decision {
        let there_end = asked.runs.iter().fold(asked.ready, |end, run| end.saturating_add(run.tokens));
        let all = |because, choice| Decision { load_end: there_end, there_end, because, choice };
        if self.prefill.seen() == 0 {
            return all(Because::Unmeasured, None);
        }
        let now: Vec<_> = self
            .tiers
            .iter()
            .enumerate()
            .map(|(index, tier)| TierNow {
                name: &tier.name,
                cost: tier.cost.cost(),
                queued_bytes: asked.queued_bytes.get(index).copied().unwrap_or(0),
            })
            .collect();
        let choice = choose(&Question {
            tokens: asked.tokens,
            ready: asked.ready,
            runs: asked.runs,
            tiers: &now,
            link: None,
            prefill: self.prefill_of(asked.tokens.saturating_sub(asked.ready)),
            block_tokens: asked.block_tokens,
            // The worker computes when all is there.
            overlap: Overlap::None,
        });
        let load_end = if choice.load.is_empty() { asked.ready } else { choice.load.end };
        let saved_us = choice.all_load_us - choice.total_us;
        if load_end >= there_end {
            return all(Because::Fastest, Some(choice));
        }
        if saved_us < SAVED_US_MIN || saved_us < SAVED_PART_MIN * choice.all_load_us {
            return all(Because::Close, Some(choice));
        }
        match self.probe(asked, load_end, now_ms) {
            Some(probe_end) => {
                Decision { load_end: probe_end, there_end, because: Because::Stale, choice: Some(choice) }
            }
            None => Decision { load_end, there_end, because: Because::Fastest, choice: Some(choice) },
        }
    }

    /// Where loading a little of the first tier that is passed over would end, if that was not read for long.
    fn probe(&self, asked: &Asked<'_>, load_end: u32, now_ms: u64) -> Option<u32> {
        let block = asked.block_tokens.max(1);
        let mut at = asked.ready;
        for run in asked.runs {
            let end = at.saturating_add(run.tokens);
            if end > load_end {
                let tier = self.tiers.get(run.tier)?;
                let is_stale = tier.read_ms.is_none_or(|read| now_ms.saturating_sub(read) >= STALE_MS);
                let token_bytes = (run.bytes / u64::from(run.tokens.max(1))).max(1);
                let tokens = u32::try_from(PROBE_BYTES / token_bytes).unwrap_or(u32::MAX);
                let tokens = (tokens / block).max(1).saturating_mul(block);
                return is_stale.then(|| load_end.max(at).saturating_add(tokens).min(end));
            }
            at = end;
        }
        None
    }
}
