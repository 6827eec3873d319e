//! Serves. One process that starts a worker for each model, moves memory between them and answers OpenAI clients.
//!
//! | module | subject |
//! |---|---|
//! | [`config`] | what `shoal.toml` says, typed |
//!
//! No CUDA, no Python and no page arithmetic here: those live in the workers.

pub mod config;
