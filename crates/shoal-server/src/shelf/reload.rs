//! Reading the configuration again while the server runs.

use serde::{Deserialize, Serialize};
use shoal_core::bytes::ByteCount;
use utoipa::ToSchema;

use super::{Code, Shelf, ShelfError, policy_process, tasks};
use crate::broker::{Core, Follow};
use crate::config::{ConfigError, ServerConfig, Surroundings};
use crate::state::EventKind;

/// What another configuration came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reloaded {
    /// Models that are new.
    pub added: Vec<String>,
    /// Models that are not there any more; their last requests are answered first.
    pub removed: Vec<String>,
    /// Models that were configured otherwise: another worker serves them from now on.
    pub restarted: Vec<String>,
    /// Models of which only limits changed; they go on.
    pub changed: Vec<String>,
    /// Policies in Python of the same name as before whose code has changed, and is read anew.
    #[serde(default)]
    pub policies: Vec<String>,
    /// Keys of `[server]` that changed and count from the next start of the server.
    pub needs_restart: Vec<String>,
}

impl Shelf {
    /// Reads the configuration's file again and puts it in place of the present one. Only what changed is touched: models
    /// of which nothing or only limits changed go on, awake or asleep. Policies in Python are read anew where their code changed.
    ///
    /// # Errors
    /// [`ShelfError::Configuration`]: the file is wrong; nothing changed.
    pub async fn reload(&self) -> Result<Reloaded, ShelfError> {
        let (file, policies) = self.shared().with(|core, _| (core.config.file.clone(), core.policies_read()));
        let read = tokio::task::spawn_blocking(move || {
            let config = ServerConfig::load(&file, &Surroundings::of_this_process())?;
            Ok((config, rewritten(policies)))
        });
        let read = read.await.map_err(|error| error.to_string());
        match read.and_then(|read: Result<_, ConfigError>| read.map_err(|error| error.to_string())) {
            Ok((config, rewritten)) => self.put(config, &rewritten),
            Err(reason) => Err(self.refused(reason)),
        }
    }

    /// [`reload`](Self::reload) with a configuration that was read already. Must be called inside a tokio runtime. Asks the disk
    /// whether the files of policies in Python have changed.
    ///
    /// # Errors
    /// [`ShelfError::Configuration`]: minimums that do not fit; nothing changed.
    pub fn reload_with(&self, config: ServerConfig) -> Result<Reloaded, ShelfError> {
        let policies = self.shared().with(|core, _| core.policies_read());
        self.put(config, &rewritten(policies))
    }

    fn put(&self, config: ServerConfig, rewritten: &[u64]) -> Result<Reloaded, ShelfError> {
        let budget = self.shared().with(|core, _| core.config.device_budget);
        let sum: ByteCount = config.models.iter().filter_map(|model| model.min).sum();
        if sum > budget {
            return Err(self.refused(ShelfError::Minimums { sum, budget }.to_string()));
        }
        let (said, follow) = self.shared().with(|core, now_ms| core.handle_reload(config, rewritten, now_ms));
        let Follow { places, reused, pins } = follow;
        let models = self.shared().with(|core, _| core.models.len());
        let gone: Vec<_> = {
            let mut pool = self.shared().pool.lock();
            pool.grow(models);
            reused.into_iter().flat_map(|place| pool.clear(place)).collect()
        };
        tasks::let_go(gone);
        policy_process::keep_all(self.shared());
        self.shared()
            .templates
            .keep_needed(&self.shared().with(|core, _| std::sync::Arc::clone(&core.config)));
        for place in places {
            tasks::keep(self.shared(), place, None);
        }
        for (model, pinned) in pins {
            self.pin(&model, pinned)?;
        }
        self.shared().with(Core::handle_timer);
        Ok(said)
    }

    fn refused(&self, reason: String) -> ShelfError {
        let what = EventKind::ReloadRefused { reason: reason.clone() };
        self.shared().with(|core, now_ms| core.tell(now_ms, None, what));
        ShelfError::Configuration { reason }
    }
}

/// Those policies whose code is not what was read, or of which nobody knows.
fn rewritten(policies: Vec<(u64, Option<Code>)>) -> Vec<u64> {
    let is_rewritten = |code: &Option<Code>| code.as_ref().is_none_or(Code::has_changed);
    policies.into_iter().filter(|(_, code)| is_rewritten(code)).map(|(id, _)| id).collect()
}
