//! Serves. One process that starts a worker for each model, moves memory between them and answers OpenAI clients.
//!
//! | module | subject |
//! |---|---|
//! | [`config`] | what `shoal.toml` says, typed |
//! | [`shelf`] | the models, the device memory they share, the requests that wait for them |
//! | [`state`] | what the server shows of itself: snapshot and events |
//!
//! No CUDA, no Python and no page arithmetic here: those live in the workers.

pub mod config;
pub mod shelf;
pub mod state;
