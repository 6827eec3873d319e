//! The decision: every cut at a block, priced.
//!
//! Apart because it is nothing but arithmetic on a [`Question`]. Linear in the number of blocks times that of tiers.

use core::fmt;
use core::ops::Range;

use serde::Serialize;

use super::{Overlap, Question};

/// What to do with a request, and why.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// The request's tokens.
    pub tokens: u32,
    /// What is on the device already.
    pub ready: u32,
    /// Tokens to load; empty where nothing is. Whatever is neither ready nor in here is computed.
    pub load: Range<u32>,
    /// Whether that is done while it is loaded.
    pub is_overlapped: bool,
    /// Until the last token is computed.
    pub total_us: f64,
    /// Loading, by itself.
    pub load_us: f64,
    /// Computing, by itself.
    pub compute_us: f64,
    /// Until the last token, if all that is there were loaded and then the rest computed.
    pub all_load_us: f64,
    /// Until the last token, if nothing were loaded.
    pub all_compute_us: f64,
    /// How much comes from which tier, by the tiers' names.
    pub from: Vec<(String, u32)>,
}

impl Choice {
    /// How many tokens are computed.
    #[must_use]
    pub fn computed(&self) -> u32 {
        let loaded = self.load.end.saturating_sub(self.load.start);
        self.tokens.saturating_sub(self.ready).saturating_sub(loaded)
    }
}

/// Microseconds as people read them.
struct Time(f64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            us if !us.is_finite() => write!(f, "never"),
            us if us < 10_000.0 => write!(f, "{:.2} ms", us / 1e3),
            us => write!(f, "{:.0} ms", us / 1e3),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let computed = self.computed();
        if self.load.is_empty() {
            write!(f, "{computed} tokens are computed in {}", Time(self.compute_us))?;
        } else {
            write!(
                f,
                "tokens {} to {} are loaded in {} (",
                self.load.start,
                self.load.end,
                Time(self.load_us)
            )?;
            for (index, (tier, tokens)) in self.from.iter().enumerate() {
                let comma = if index == 0 { "" } else { ", " };
                write!(f, "{comma}{tokens} from {tier}")?;
            }
            let meanwhile = if self.is_overlapped { "meanwhile" } else { "then" };
            write!(f, ") and {meanwhile} {computed} computed in {}", Time(self.compute_us))?;
        }
        write!(
            f,
            ": {} in all, against {} with all loaded that is there and {} with nothing loaded",
            Time(self.total_us),
            Time(self.all_load_us),
            Time(self.all_compute_us)
        )
    }
}

/// Where a cut may be, with what comes before it.
struct Cut {
    token: u32,
    /// Bytes before it, from each tier.
    bytes: Vec<f64>,
}

impl Question<'_> {
    /// Every place where loading may begin or end, the first at `ready`. At least the last token is computed: what comes
    /// after it is read off it.
    fn cuts(&self) -> Vec<Cut> {
        let block = self.block_tokens.max(1);
        let last = self.tokens.saturating_sub(1) / block * block;
        let mut bytes = vec![0.0; self.tiers.len()];
        let mut cuts = vec![Cut { token: self.ready, bytes: bytes.clone() }];
        let mut token = self.ready;
        for run in self.runs.iter().filter(|run| run.tokens > 0) {
            // What a tier has that nobody knows cannot be loaded, nor anything behind it.
            if run.tier >= bytes.len() {
                break;
            }
            let end = token.saturating_add(run.tokens);
            let token_bytes = run.bytes as f64 / f64::from(run.tokens);
            while token < end {
                let next = (token / block + 1).saturating_mul(block).min(end);
                if next > last || next <= token {
                    return cuts;
                }
                bytes[run.tier] += f64::from(next - token) * token_bytes;
                token = next;
                if token.is_multiple_of(block) {
                    cuts.push(Cut { token, bytes: bytes.clone() });
                }
            }
        }
        cuts
    }

    fn load_us(&self, from: &Cut, to: &Cut) -> f64 {
        let mut slowest: f64 = 0.0;
        let mut all = 0.0;
        for (tier, (before, until)) in self.tiers.iter().zip(from.bytes.iter().zip(&to.bytes)) {
            let bytes = until - before;
            if bytes > 0.0 {
                slowest = slowest.max(tier.cost.of(bytes + tier.queued_bytes as f64));
                all += bytes;
            }
        }
        slowest.max(self.link.map_or(0.0, |link| link.of(all)))
    }

    fn compute_us(&self, tokens: u32) -> f64 {
        self.prefill.of(f64::from(tokens))
    }

    /// Until the last token, with the head before the cut loaded.
    fn head_us(&self, load_us: f64, compute_us: f64) -> f64 {
        let parts = match self.overlap {
            // The first layer is computed when the first part has arrived, the last one when all has.
            Overlap::ByLayer { layers } => f64::from(layers.max(1)),
            Overlap::None | Overlap::BothEnds => 1.0,
        };
        (load_us + compute_us / parts).max(load_us / parts + compute_us)
    }

    /// The fastest way; of ways that are equally fast the one that loads least.
    fn fastest(&self, cuts: &[Cut]) -> Way {
        let left = self.tokens.saturating_sub(self.ready);
        let nothing = self.compute_us(left);
        let mut best = Way {
            from: 0,
            to: 0,
            total_us: nothing,
            load_us: 0.0,
            compute_us: nothing,
            is_overlapped: false,
        };
        for (index, cut) in cuts.iter().enumerate().skip(1) {
            let load_us = self.load_us(&cuts[0], cut);
            let compute_us = self.compute_us(self.tokens - cut.token);
            let total_us = self.head_us(load_us, compute_us);
            if total_us < best.total_us {
                let is_overlapped = matches!(self.overlap, Overlap::ByLayer { .. });
                best = Way { from: 0, to: index, total_us, load_us, compute_us, is_overlapped };
            }
        }
        if self.overlap != Overlap::BothEnds {
            return best;
        }
        // The head is computed up to the cut, what is there behind it arrives meanwhile, then comes what is nowhere.
        let end = &cuts[cuts.len() - 1];
        let tail_us = self.compute_us(self.tokens.saturating_sub(end.token));
        for (index, cut) in cuts.iter().enumerate().take(cuts.len() - 1).skip(1) {
            let load_us = self.load_us(cut, end);
            let compute_us = self.compute_us(cut.token - self.ready);
            let total_us = load_us.max(compute_us) + tail_us;
            let loads_less = cuts.len() - 1 - index < best.to - best.from;
            if total_us < best.total_us || (total_us <= best.total_us && loads_less) {
                let compute_us = compute_us + tail_us;
                best = Way {
                    from: index,
                    to: cuts.len() - 1,
                    total_us,
                    load_us,
                    compute_us,
                    is_overlapped: true,
                };
            }
        }
        best
    }
}

struct Way {
    from: usize,
    to: usize,
    total_us: f64,
    load_us: f64,
    compute_us: f64,
    is_overlapped: bool,
}

/// Decides. The same inputs give the same answer, and no way that was thought of is faster by these costs.
#[must_use]
pub fn choose(question: &Question<'_>) -> Choice {
    let cuts = question.cuts();
    let way = question.fastest(&cuts);
    let (from, to) = (&cuts[way.from], &cuts[way.to]);
    let end = &cuts[cuts.len() - 1];
    let parts = question.runs_between(from.token, to.token);
    Choice {
        tokens: question.tokens,
        ready: question.ready,
        load: from.token..to.token,
        is_overlapped: way.is_overlapped,
        total_us: way.total_us,
        load_us: way.load_us,
        compute_us: way.compute_us,
        all_load_us: question.load_us(&cuts[0], end)
            + question.compute_us(question.tokens.saturating_sub(end.token)),
        all_compute_us: question.compute_us(question.tokens.saturating_sub(question.ready)),
        from: parts,
    }
}

impl Question<'_> {
    /// How many of the tokens between lie on which tier.
    fn runs_between(&self, from: u32, to: u32) -> Vec<(String, u32)> {
        let mut tokens = vec![0_u32; self.tiers.len()];
        let mut at = self.ready;
        for run in self.runs {
            let end = at.saturating_add(run.tokens);
            let common = end.min(to).saturating_sub(at.max(from));
            if let Some(count) = tokens.get_mut(run.tier) {
                *count += common;
            }
            at = end;
        }
        let named = self.tiers.iter().zip(tokens).filter(|(_, tokens)| *tokens > 0);
        named.map(|(tier, tokens)| (tier.name.to_owned(), tokens)).collect()
    }
}
