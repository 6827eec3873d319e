//! What a worker was started with, as a short text: one that was started with something else has to be started anew.
//!
//! Apart because it decides which keys of a model may change under a running worker: those that are not in it (`min`,
//! `priority`, `pin`, `keep_alive`, `parallel_max`) are the server's own business, those that are were said to the worker once.

use xxhash_rust::xxh3::xxh3_64;

use super::{ModelConfig, ServerConfig};

impl ServerConfig {
    /// The fingerprint of `model`'s worker.
    #[must_use]
    pub fn fingerprint(&self, model: &ModelConfig) -> String {
        let said = serde_json::json!([
            [env!("CARGO_PKG_VERSION"), shoal_core::protocol::VERSION],
            [self.device.to_string(), self.device_budget + self.headroom, self.runtime_dir],
            [model.name, model.engine.name(), model.source, model.revision],
            [self.python_of(model), model.env, model.args],
            [model.dtype, model.context, model.max, format!("{:?}", model.sleep)],
            model.command.as_ref().map(|command| format!("{command:?}")),
        ]);
        format!("{:016x}", xxh3_64(said.to_string().as_bytes()))
    }
}
