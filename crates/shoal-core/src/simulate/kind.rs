//! What a simulated shelf consists of: its limits, its models, and the requests that come.

use crate::bytes::{ByteCount, PAGE_BYTES};

/// What holds for the whole shelf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Device bytes that all models together may hold.
    pub budget: ByteCount,
    /// The unit in which memory is ordered back.
    pub extent: ByteCount,
    /// How long a busy model runs before it yields to one that waits.
    pub quantum_ms: u64,
    /// What giving memory up takes: a fence between two steps, and unmapping.
    pub yield_ms: u64,
    /// Nothing is evicted for others' sake (`evict = "never"`).
    pub is_manual: bool,
    /// A request that has waited so long is refused; none: it waits for ever.
    pub wait_max_ms: Option<u64>,
    /// The most requests that wait for one model; one more is refused.
    pub parked_max: usize,
}

impl Settings {
    /// A shelf of this budget of which nothing else is said.
    #[must_use]
    pub const fn new(budget: ByteCount) -> Self {
        Self {
            budget,
            extent: PAGE_BYTES,
            quantum_ms: 3_000,
            yield_ms: 10,
            is_manual: false,
            wait_max_ms: None,
            parked_max: usize::MAX,
        }
    }
}

/// One model.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "facts that do not exclude one another")]
pub struct Kind {
    /// Its name, for reasons and reports.
    pub name: String,
    /// What its weights take on the device.
    pub weights: ByteCount,
    /// What bringing a MiB back takes (microseconds).
    pub restore_us_per_mib: u64,
    /// What comes back comes over the link that all share, one model after the other; not so where a program is started.
    pub uses_link: bool,
    /// What its process has on the device besides, as long as it runs.
    pub overhead: ByteCount,
    /// Never evicted.
    pub pinned: bool,
    /// All or nothing.
    pub is_rigid: bool,
    /// Its weights are never taken.
    pub keeps_weights: bool,
    /// To be there before it is asked for.
    pub preload: bool,
    /// Never evicted below this.
    pub min: ByteCount,
    /// Never more than this.
    pub max: Option<ByteCount>,
    /// Higher yields later.
    pub priority: i32,
    /// Put to sleep after so long without requests.
    pub keep_alive_ms: Option<u64>,
    /// The most requests at the same time.
    pub parallel_max: usize,
    /// Models, by their places, that may not stand beside it. Holds both ways.
    pub apart: Vec<usize>,
}

impl Kind {
    /// A model of which nothing else is said.
    #[must_use]
    pub fn new(name: impl Into<String>, weights: ByteCount, restore_us_per_mib: u64) -> Self {
        Self {
            name: name.into(),
            weights,
            restore_us_per_mib,
            uses_link: true,
            overhead: ByteCount::ZERO,
            pinned: false,
            is_rigid: false,
            keeps_weights: false,
            preload: false,
            min: ByteCount::ZERO,
            max: None,
            priority: 0,
            keep_alive_ms: None,
            parallel_max: usize::MAX,
            apart: Vec::new(),
        }
    }
}

/// A request that comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When (milliseconds from the beginning).
    pub at_ms: u64,
    /// For which model, by its place.
    pub model: usize,
    /// From the moment that it is begun to its first token.
    pub first_ms: u64,
    /// From the moment that it is begun to its end.
    pub runs_ms: u64,
}
