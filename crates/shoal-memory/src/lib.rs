//! Drives. Turns the plans of shoal-core into memory that comes and goes behind stable addresses.
//!
//! | module | subject |
//! |---|---|
//! | [`manager`] | [`MemoryManager`]: regions of one device, reclaim, figures |
//! | [`guard`] | [`Guard`]: what a step holds so that nothing is evicted under it |
//! | [`region`] | [`Region`]: stage, seal, freeze, commit, sleep, wake |
//! | [`transfer`] | what a wake under way tells, and how it is cancelled |
//! | [`kv`] | [`KvBacking`]: memory for KV blocks on demand |
//! | [`kv_cache`] | [`KvCache`]: KV blocks with memory behind them, for engines |
//! | [`segments`] | [`Segments`]: a region that grows by what torch's allocator asks for |
//! | [`pool`] | frames that regions gave up and the next growth takes |
//! | [`lease`] | who grants device bytes: [`LeaseSource`], [`LocalBudget`] |
//! | [`broker`] | [`BrokerClient`]: leases and orders over the control socket |
//! | [`store`] | [`Store`](store::Store): blocks by name, on whatever tier |
//! | [`disk`] | [`DiskTier`](disk::DiskTier): blocks that outlive the process |
//! | [`weights`] | [`WeightStore`](weights::WeightStore): weights at rest, for all models of a machine |
//! | [`remote`] | [`RemoteTier`](remote::RemoteTier): blocks that several servers share |
//! | [`error`] | why something was not done |
//!
//! How locks nest: first the turn of restores, then the *gate* (I13: steps share it, evictions take it alone), then the *turn* (one operation changes
//! memory at a time), then short data locks. A lease is asked for while holding neither turn nor data lock, because
//! the answer may need this process to give something up first; no data lock is held across a device call (I9).

mod arena;
mod gate;
#[cfg(test)]
mod gate_tests;
mod key_file;
mod retire;
mod slab_source;
mod source;
mod supply;
mod swap;
mod sync;
mod turn;
#[cfg(test)]
mod turn_tests;

pub mod broker;
pub mod disk;
pub mod error;
pub mod guard;
pub mod kv;
pub mod kv_cache;
pub mod lease;
pub mod manager;
pub mod pool;
pub mod region;
pub mod remote;
pub mod segments;
pub mod store;
pub mod transfer;
pub mod weights;

pub use arena::HostUsage;
pub use broker::{BrokerClient, ShutdownOrder, Welcome};
pub use error::{ErrorKind, LeaseError, MemoryError};
pub use guard::Guard;
pub use kv::KvBacking;
pub use kv_cache::{KvCache, KvCacheSpec, KvTier, KvTierOptions, Loading, Prefetch};
pub use lease::{LeaseAhead, LeaseSource, LocalBudget};
pub use manager::{ManagerOptions, MemoryManager};
pub use pool::{PoolOptions, PoolUsage};
pub use region::{
    Flush, FlushReport, Region, RegionSpec, RegionUsage, RegionUse, Report, SealReport, StoredTensor,
};
pub use segments::{Segments, SegmentsUsage};
pub use shoal_core::page_table::Backing;
pub use shoal_core::source::{Conversion, SourcePiece};
pub use slab_source::{LentSlab, SlabSource};
pub use swap::SwapReport;
pub use transfer::{Progress, Transfer};
