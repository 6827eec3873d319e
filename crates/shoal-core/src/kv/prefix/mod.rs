//! Which KV blocks hold the beginning of a sequence already: a tree of sealed blocks, found by content.
//!
//! Apart from who owns blocks because it never allocates or counts references: it maps content to block ids and says
//! which. [`PrefixIndex`] is that map alone; [`PrefixCache`] puts it together with an eviction policy
//! ([`eviction`](super::eviction)), which is what a block manager wants.
//!
//! # Identity is exact, hashes only find
//! Each full block is a node: its parent node, its tokens, and for each group the block that holds their KV. A node is
//! looked up by a 128-bit chained key ([`KeyChain`]: xxh3 over the parent's key and the tokens), but it counts as found
//! only if its parent *is* the node the walk came from and its tokens are the tokens asked for. xxh3 is fast and no
//! match for somebody who wants to collide, and a wrong hit would hand one conversation's KV to another; comparing 16
//! tokens costs a few nanoseconds and one cache line, so no hit rests on a hash. Two contents of one key: the second is
//! refused and counted ([`PrefixStats::collisions`]), it is a miss for ever and never a wrong hit. Keys go out in events
//! for routers; whoever treats a key alone as proof across machines should pass keys of its own cryptographic hash
//! ([`PrefixIndex::seal_keys`]), which are compared in full.
//!
//! # Tenants
//! Each salt has a root of its own, told apart by the salt's bytes, so a walk for one tenant cannot reach a node of
//! another (I12), whatever the hashes do.
//!
//! # Holes
//! A node whose blocks were all evicted stays as long as it has children, with its tokens: its descendants match up to
//! the hole only, and again when the hole is sealed again. The number of nodes is bounded
//! ([`PrefixOptions::nodes_max`]); past it blocks are not sealed, which [`Sealed`] tells.

mod cache;
mod checks;
mod events;
mod find;
mod index;
mod key;
mod nodes;
mod options;
mod table;
#[cfg(test)]
mod tests;

pub use cache::PrefixCache;
pub use events::{EventBatch, EventKind, PrefixEvent};
pub use find::{Found, GroupFound};
pub use index::{Duplicate, Position, PrefixIndex, PrefixStats, Sealed, Start};
pub use key::{BlockKey, KeyChain};
pub use options::{GroupOptions, GroupRule, PrefixError, PrefixOptions};

/// Stands in a list of block ids where a group holds no block for that part of the sequence.
pub const NO_BLOCK: u32 = u32::MAX;

/// The longest key that an engine may bring, in bytes.
pub const ENGINE_KEY_BYTES_MAX: usize = 64;

/// No node.
const NO_NODE: u32 = u32::MAX;
