//! Blocks on a slower tier, as far as that needs no I/O: what they are called, how they lie on a disk, where the next one
//! goes, which ones make room.
//!
//! Apart from [`crate::kv`], which is about memory that an engine computes in: here a block is bytes with a name. What
//! reads and writes is in shoal-memory (`disk`). Keeps I8 (everything on disk carries a checksum that knows its place and
//! its name), I10 (bounds on entries and bytes) and I12 (a name has its tenant in it).
//!
//! | module | subject |
//! |---|---|
//! | [`key`] | names of blocks: model and layout, tenant, content |
//! | [`format`] | the bytes of segment headers, records and footers |
//! | [`log`] | which segment is written, what lies where, what makes room |
//! | [`admission`] | what is worth a write |
//! | [`health`] | when a disk has failed too often |
//! | [`recompute`] | what of a prompt is loaded, and from which token on it is computed |

pub mod admission;
pub mod format;
pub mod health;
pub mod key;
pub mod log;
pub mod recompute;
pub mod weights;
