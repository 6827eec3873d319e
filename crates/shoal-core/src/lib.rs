//! Decides. The part of Shoal that is pure: what lives where, who may hold how much, and what should move next.
//!
//! Nothing here does I/O, reads a clock, starts a thread or is `unsafe`: time is an argument, actions are values.
//!
//! | module | subject |
//! |---|---|
//! | [`bytes`] | byte counts that print and parse the way people write them |
//! | [`copy_plan`] | how a list of copies is carried out, by what each way of copying costs |
//! | [`ids`] | names for devices, regions, extents, transfers, models |
//! | [`tier`] | the four places bytes can be |
//! | [`extent`] | runs of pages with one frame each, and the rule for their sizes |
//! | [`residency`] | in which tiers the bytes of an extent are valid |
//! | [`page_table`] | the extents of a region; what should move |
//! | [`slabs`] | which part of which slab of host memory is whose, and what moves so that a large part fits |
//! | [`source`] | files that bytes can be read from again |
//! | [`fair`] | whose request is next, of those that wait for one model |
//! | [`store`] | blocks on a slower tier: names, bytes on disk, what goes where, what makes room |
//! | [`kv`] | KV blocks: who owns them, which memory they need, what comes and goes |
//! | [`lease`] | who holds how many device bytes, and that the sum stays within the budget |
//! | [`drift`] | what the ledger says beside what the device's driver shows |
//! | [`shares`] | how a budget that nobody gives back is divided |
//! | [`policy`] | who gives bytes up for whom, each with its reason |
//! | [`simulate`] | requests in virtual time against a policy |
//! | [`protocol`] | what a worker and the server say to each other on the control socket |

#![forbid(unsafe_code)]

pub mod bytes;
pub mod copy_plan;
pub mod drift;
pub mod extent;
pub mod fair;
pub mod ids;
pub mod kv;
pub mod lease;
pub mod page_table;
pub mod policy;
pub mod protocol;
pub mod residency;
pub mod shares;
pub mod simulate;
pub mod slabs;
pub mod source;
pub mod store;
pub mod tier;
