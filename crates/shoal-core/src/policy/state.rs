//! What a decision is made from, and what it is.

use serde::{Deserialize, Serialize};

use crate::bytes::ByteCount;
use crate::ids::ModelId;
use crate::protocol::LeaseKind;

/// The shelf as the policy sees it. Times are milliseconds on any one clock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShelfState {
    /// What may be leased in all (the budget less its headroom and what others have of it).
    pub budget: ByteCount,
    /// What others have that could be leased otherwise; not in `budget`. What is leased beyond the budget because of it has
    /// to come back.
    #[serde(default)]
    pub taken: ByteCount,
    /// Leases for overhead of which less was measured lately: so much of them comes back before long, if nobody takes it again.
    #[serde(default)]
    pub falling: ByteCount,
    /// Leased in the name of processes that are gone, and seen to be free before long: in `budget`, to be granted to nobody
    /// until then.
    #[serde(default)]
    pub returning: ByteCount,
    /// The unit in which bytes are ordered back.
    pub extent: ByteCount,
    /// How long a model may run before it can be made to yield to a waiting one.
    pub quantum_ms: u64,
    /// Nothing is evicted for others' sake: only KV that nobody uses and that holds nothing is taken.
    #[serde(default)]
    pub is_manual: bool,
    /// All models.
    pub models: Vec<ModelState>,
    /// All requests that were not answered yet.
    pub requests: Vec<PendingRequest>,
}

/// One model as the policy sees it.
#[expect(clippy::struct_excessive_bools, reason = "facts that do not exclude one another")]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelState {
    /// Which.
    pub id: ModelId,
    /// Its name, for reasons.
    pub name: String,
    /// Its worker lives and takes orders. Where not, what it holds is on its way back.
    pub ready: bool,
    /// All its weights.
    pub weights_total: ByteCount,
    /// Its lease for weights.
    pub weights_held: ByteCount,
    /// Its lease for KV.
    pub kv_held: ByteCount,
    /// KV that some request uses.
    pub kv_live: ByteCount,
    /// KV that no request uses and that holds a prefix, which the next one may save computing.
    #[serde(default)]
    pub kv_cached: ByteCount,
    /// KV without which it cannot run any request.
    pub kv_min: ByteCount,
    /// Its lease for what its process takes besides; cannot be ordered back.
    pub overhead_held: ByteCount,
    /// What its steps will take besides once it has weights, and is not leased yet: asked for with them, as one request.
    #[serde(default)]
    pub overhead_lacking: ByteCount,
    /// What of its overhead is free again before long once it has no weights: what only steps take.
    #[serde(default)]
    pub overhead_leaves: ByteCount,
    /// Bytes it was ordered to give back and has not yet.
    pub ordered: ByteCount,
    /// Of that, it was told to give up weights before what is cached.
    #[serde(default)]
    pub ordered_cached_last: bool,
    /// Never evicted.
    pub pinned: bool,
    /// It gives up all that it holds or nothing, and holds all that it needs or nothing.
    #[serde(default)]
    pub is_rigid: bool,
    /// Its weights are never taken, only KV that it can do without.
    #[serde(default)]
    pub keeps_weights: bool,
    /// Never evicted below this; whoever is rigid keeps all then.
    pub min: ByteCount,
    /// Never leased more than this.
    pub max: Option<ByteCount>,
    /// Higher yields later.
    pub priority: i32,
    /// Requests it works on.
    pub active: u32,
    /// Requests that wait for it to come back.
    pub parked: u32,
    /// When a request last began or ended.
    pub last_used_ms: u64,
    /// When its turn began: wholly resident, with the KV of a request, and used.
    pub turn_since_ms: Option<u64>,
    /// Since when it has had requests without being able to run them.
    pub wanting_since_ms: Option<u64>,
    /// It has its lease and its bytes are being brought back; protected until then at the latest.
    pub rising_until_ms: Option<u64>,
    /// How soon a request has lately followed the end of the one before; none where that is not known.
    pub pause_ms: Option<u64>,
    /// All its weights are on the device and none were ordered away since.
    pub up: bool,
    /// An order to wake was given and not answered yet.
    pub wake_ordered: bool,
    /// Put to sleep after so long without requests, and preferred among the idle until then.
    pub keep_alive_ms: Option<u64>,
    /// Gave nothing when last asked; not asked again before this.
    pub skip_until_ms: u64,
    /// What it takes to bring a MiB of its weights back (microseconds).
    pub restore_us_per_mib: u64,
    /// What it takes to bring a MiB of a prefix back, or to compute it again; 0 where nobody knows.
    #[serde(default)]
    pub kv_back_us_per_mib: u64,
    /// What part of its prefixes one use finds again, in thousandths; 0 where nobody knows.
    #[serde(default)]
    pub kv_found_milli: u64,
    /// How often somebody came, in thousandths, old times counting less ([`UseRate`](super::UseRate)).
    #[serde(default)]
    pub uses_milli: u64,
    /// The time those are spread over, up to the last one.
    #[serde(default)]
    pub uses_window_ms: u64,
    /// When somebody is expected to come next; none where nobody can tell ([`Rhythm`](super::Rhythm)).
    #[serde(default)]
    pub expected_ms: Option<u64>,
    /// When it was last wholly brought back.
    #[serde(default)]
    pub restored_ms: Option<u64>,
    /// Models that must have nothing on the device beside it. Holds both ways.
    #[serde(default)]
    pub apart: Vec<ModelId>,
    /// To be brought to the device without anybody asking, where nobody has to give anything up for it.
    #[serde(default)]
    pub preload: bool,
}

impl ModelState {
    /// All it holds.
    #[must_use]
    pub fn held(&self) -> ByteCount {
        self.weights_held + self.kv_held + self.overhead_held
    }

    /// It can make a difference to a plan at `now_ms`. A model that sleeps and that nobody wants makes none, unless it asks
    /// for bytes itself, so it need not be in a state: a thousand of them cost nothing.
    #[must_use]
    pub fn matters(&self, now_ms: u64) -> bool {
        !(self.held() + self.ordered).is_zero()
            || self.is_busy()
            || self.up
            || self.wake_ordered
            || self.preload
            || self.turn_since_ms.is_some()
            || self.rising_until_ms.is_some()
            || self.skip_until_ms > now_ms
    }

    /// What it holds of weights and KV.
    #[must_use]
    pub fn stands(&self) -> ByteCount {
        self.weights_held + self.kv_held
    }

    /// Its lease covers all its weights.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.weights_held >= self.weights_total
    }

    /// Its lease is what it takes to run a request; a model in its turn stays one that can, whatever KV it gives back.
    #[must_use]
    pub fn can_run(&self) -> bool {
        self.is_whole() && (self.kv_held >= self.kv_min || self.turn_since_ms.is_some())
    }

    /// How long it takes to bring all its weights back, in milliseconds.
    #[must_use]
    pub const fn restore_ms(&self) -> u64 {
        (self.weights_total.0 >> 20).saturating_mul(self.restore_us_per_mib) / 1_000
    }

    /// Somebody wants something of it.
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        self.active > 0 || self.parked > 0
    }
}

/// A request for bytes that was not answered yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingRequest {
    /// Who asks.
    pub model: ModelId,
    /// The number that the asking worker gave it.
    pub request: u64,
    /// What for.
    pub kind: LeaseKind,
    /// How many more bytes.
    pub bytes: ByteCount,
    /// The least that is of use.
    pub bytes_min: ByteCount,
    /// When it was asked.
    pub asked_ms: u64,
    /// When an answer is no longer of use.
    pub deadline_ms: u64,
}

/// What to do, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The actions.
    pub actions: Vec<Action>,
    /// When to plan again, if nothing happens before.
    pub again_at_ms: Option<u64>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Action {
    /// Order `model` to give `bytes` back.
    Evict {
        /// Who yields.
        model: ModelId,
        /// For whose request; `model` itself where it gives up KV that it does not use, to have it as weights. For whose
        /// sake, where two were set apart that are both there. None where nobody asked (`keep_alive`), or others took
        /// memory of the device.
        requester: Option<ModelId>,
        /// How much.
        bytes: ByteCount,
        /// Weights go before KV that holds prefixes and that no request uses: that would cost more to bring back.
        #[serde(default)]
        cached_last: bool,
        /// Why, and why this one.
        reason: String,
    },
    /// Order `model` to bring its weights back; it will ask for the lease it lacks.
    Restore {
        /// Who.
        model: ModelId,
        /// What is missing.
        bytes: ByteCount,
        /// Why.
        reason: String,
    },
    /// Grant a request.
    Grant {
        /// Who asked.
        model: ModelId,
        /// Which request.
        request: u64,
        /// How much; at least its minimum.
        bytes: ByteCount,
        /// Out of what.
        reason: String,
    },
    /// Turn a request down.
    Deny {
        /// Who asked.
        model: ModelId,
        /// Which request.
        request: u64,
        /// Not even with everything that may be taken: asking again is of no use.
        never: bool,
        /// Why.
        reason: String,
    },
    /// Let a request wait.
    Wait {
        /// Who asked.
        model: ModelId,
        /// Which request.
        request: u64,
        /// When something may change by itself; its deadline at the latest.
        until_ms: u64,
        /// For what.
        reason: String,
    },
}
