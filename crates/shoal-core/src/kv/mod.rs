//! KV blocks: which pages they need.

pub mod backing;
