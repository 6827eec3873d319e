//! Decides. The part of Shoal that is pure: what lives where, who may hold how much, and what should move next.
//!
//! Nothing here does I/O, reads a clock, starts a thread or is `unsafe`: time is an argument, actions are values.
//!
//! | module | subject |
//! |---|---|
//! | [`bytes`] | byte counts that print and parse the way people write them |
//! | [`ids`] | names for devices, regions, extents, transfers, models |
//! | [`tier`] | the four places bytes can be |
//! | [`protocol`] | what a worker and the server say to each other on the control socket |

#![forbid(unsafe_code)]

pub mod bytes;
pub mod ids;
pub mod protocol;
pub mod tier;
