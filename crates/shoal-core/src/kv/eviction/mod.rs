//! Which cached KV blocks go when memory is wanted: sealed blocks that no sequence refers to.
//!
//! Apart from the prefix index because a policy needs to know nothing of content: it sees blocks come and go, and names
//! the next victim. One file a policy, all behind [`EvictionPolicy`]; [`Evictor`] adds what is the same for all: which
//! extents hold how many cached blocks, so that a victim can be a whole extent and memory really is given back.
//!
//! | kind | victim | from |
//! |---|---|---|
//! | [`Lru`] | unused for longest | - |
//! | [`S3Fifo`] | oldest that was not found again | Yang et al., SOSP 2023 |
//! | [`CostAware`] | least worth keeping: hits times the price of computing it again | Cherkasova 1998, after Cao and Irani 1997 |
//!
//! Every call costs O(1), amortised. Nothing here keeps time: the order of calls is the clock, so equal histories give
//! equal victims (I11).

mod cost;
mod evictor;
mod extents;
mod list;
mod lru;
mod s3fifo;

pub use cost::{CostAware, CostModel};
pub use evictor::Evictor;
pub use extents::ExtentSpan;
pub use lru::Lru;
pub use s3fifo::S3Fifo;

/// What a policy may know of a block that becomes cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct About {
    /// Stands for its content: equal for equal content, so that a policy can tell what came back after it was evicted.
    pub key: u64,
    /// Tokens before it and in it.
    pub tokens: u32,
    /// Whether it can be found: false if something before it is missing, so that keeping it serves nobody.
    pub reachable: bool,
    /// A cached block that comes after it in a sequence. The block should outlive it: without it, it is not found.
    pub successor: Option<u32>,
}

impl About {
    /// Of a block that can be found and has no cached successor.
    #[must_use]
    pub const fn new(key: u64, tokens: u32) -> Self {
        Self { key, tokens, reachable: true, successor: None }
    }
}

/// Which policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum EvictionKind {
    /// Least recently used.
    #[default]
    Lru,
    /// Three queues.
    S3Fifo,
    /// By what it costs to compute again.
    CostAware(CostModel),
}

impl EvictionKind {
    /// A policy for blocks with ids below `blocks`.
    #[must_use]
    pub fn policy(self, blocks: u32) -> Box<dyn EvictionPolicy> {
        match self {
            Self::Lru => Box::new(Lru::new(blocks)),
            Self::S3Fifo => Box::new(S3Fifo::new(blocks)),
            Self::CostAware(model) => Box::new(CostAware::new(blocks, model)),
        }
    }
}

/// The order in which cached blocks go. Block ids are below the number the policy was made for; a call about a block in
/// another state than it says changes nothing.
pub trait EvictionPolicy: std::fmt::Debug + Send {
    /// Nobody refers to the block any more: it may be a victim from now on. Of several that are given up at once, the
    /// one furthest from the start of its sequence comes first.
    fn cached(&mut self, block: u32, about: &About);

    /// The block was found again and is referred to: no victim, until it is cached again.
    fn used(&mut self, block: u32);

    /// The block's content is gone, evicted or invalid; what the policy remembers of it goes too. Its id may come back
    /// with other content.
    fn gone(&mut self, block: u32);

    /// The block's content was moved to another, of which the policy has not heard: it takes the block's place.
    fn renumbered(&mut self, from: u32, to: u32);

    /// The block that should go next, if any is cached. It stays cached until [`gone`](Self::gone).
    fn victim(&mut self) -> Option<u32>;

    /// How much a cached block adds to the weight of its extents. Asked once, after [`cached`](Self::cached).
    fn weight(&self, block: u32) -> u64;

    /// How bad it would be to lose all `cached` blocks of an extent, whose weights sum to `weight`; compared only.
    fn loss(&self, cached: u32, weight: u64) -> u64;

    /// Says what is wrong inside, if anything is.
    ///
    /// # Errors
    /// A sentence that names the first contradiction.
    fn check_invariants(&self) -> Result<(), String>;
}
