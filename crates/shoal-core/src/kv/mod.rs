//! KV blocks: who owns them, which memory they need, and what comes and goes.
//!
//! | module | subject |
//! |---|---|
//! | [`layout`] | groups, planes and strides: where each block lies |
//! | [`blocks`] | the blocks of one group: free, owned by so many, cached; the granules they lie in |
//! | [`ids`] | the integer types that ids are kept in |
//! | [`limit`] | how much memory a cache may have |
//! | [`demand`] | how many blocks to keep mapped ahead of need |
//! | [`compact`] | which blocks to move so that memory can go back |
//! | [`moves`] | moves begun and ended, with others going on in between |
//! | [`reuse`] | what sealed blocks hold, put together with who owns them |
//! | [`room`] | what a group could have of the memory of the others |
//! | [`prefix`] | which blocks hold the beginning of a sequence already |
//! | [`eviction`] | which cached blocks, or whole extents of them, go first |
//! | [`state`] | all of it together: [`KvState`](state::KvState) |
//! | [`backing`] | which pages blocks need whose ids somebody else chooses |

mod bits;
mod fill;
mod runs;

pub mod backing;
pub mod blocks;
pub mod compact;
pub mod demand;
pub mod eviction;
pub mod ids;
pub mod layout;
pub mod limit;
pub mod moves;
pub mod prefix;
pub mod reuse;
pub mod room;
pub mod state;
