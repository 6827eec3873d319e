//! What of a prompt is loaded, and from which token on it is computed.
//!
//! Apart because it is a decision: the same inputs give the same answer, and both are logged (I11). Reading back is not
//! always the faster way: one disk reads the KV of an 8B model about as fast as a GPU computes it, and a small model is
//! computed faster than any disk reads. So the price of each way is measured ([`Estimate`]) and the best cut is looked for
//! among all of them, block by block.
//!
//! Computing while loading is what Cake does (Jin et al., "Compute or Load KV Cache? Why Not Both?", ICML 2025): it
//! computes from the prompt's start while it loads from the end of what is stored, until both meet. Here the meeting
//! point is computed beforehand. Loading layer by layer while later tokens are computed behind it is the other way
//! (`CacheGen`, Liu et al., SIGCOMM 2024, and `LMCache` load by layers); which of them an engine can do is its [`Overlap`].

mod choose;
mod estimate;
mod learned;
#[cfg(test)]
mod learned_tests;
#[cfg(test)]
mod tests;

use serde::Serialize;

pub use choose::{Choice, choose};
pub use estimate::{Cost, Estimate};
pub use learned::{Asked, Because, Decision, Learned};

/// Whether an engine computes while it loads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(tag = "overlap", rename_all = "snake_case")]
pub enum Overlap {
    /// One after the other: a head is loaded, the rest is computed when all of it is there.
    #[default]
    None,
    /// The tail is computed layer by layer while the head arrives layer by layer.
    ByLayer {
        /// How many layers.
        layers: u32,
    },
    /// The head is computed while what comes after it arrives.
    BothEnds,
}

/// Tokens in a row that one tier has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Run {
    /// How many.
    pub tokens: u32,
    /// Their bytes.
    pub bytes: u64,
    /// Which tier, by its place in [`Question::tiers`].
    pub tier: usize,
}

/// A tier as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TierNow<'q> {
    /// What people call it.
    pub name: &'q str,
    /// What a transfer from it costs, without what waits before it; units are bytes.
    pub cost: Cost,
    /// Bytes that others wait for.
    pub queued_bytes: u64,
}

/// What is known of one request.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Question<'q> {
    /// Its tokens.
    pub tokens: u32,
    /// How many of them, from the first on, are on the device already.
    pub ready: u32,
    /// What tiers have, in order and without a gap from `ready` on; each run on the fastest tier that has it.
    pub runs: &'q [Run],
    /// The tiers. Each loads beside the others.
    pub tiers: &'q [TierNow<'q>],
    /// The link to the device, which all share, if it is known; units are bytes.
    pub link: Option<Cost>,
    /// What computing costs; units are tokens.
    pub prefill: Cost,
    /// Loading begins and ends at multiples of this.
    pub block_tokens: u32,
    /// What the engine can do.
    pub overlap: Overlap,
}
