//! Serves. One process that starts a worker for each model, moves memory between them and answers OpenAI clients.
//!
//! | module | subject |
//! |---|---|
//! | [`config`] | what `shoal.toml` says, typed |
//! | `broker` | one owner of all state: leases, orders, parked requests, decisions |
//! | [`control`] | the socket on which workers speak |
//! | [`supervisor`] | worker processes |
//! | [`shelf`] | the models, the device memory they share, the requests that wait for them |
//! | [`state`] | what the server shows of itself: snapshot and events |
//! | [`gateway`] | what listens: who may ask, and the way of a request to its model |
//! | `api` | `/api/v1`: seeing and ordering |
//! | `events` | `/api/v1/events` |
//! | `metrics` | `/metrics` |
//! | `page` | `/` |
//! | [`cli`] | the `shoal` command |
//! | `bounded` | words of others, before they are kept or shown |
//! | `fuzzing` | what must hold for any bytes, for tests and fuzzers |
//!
//! No CUDA, no Python and no page arithmetic here: those live in the workers.

mod api;
mod bounded;
mod broker;
pub mod cli;
pub mod config;
pub mod control;
mod events;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod gateway;
mod metrics;
mod page;
pub mod shelf;
pub mod state;
pub mod supervisor;
