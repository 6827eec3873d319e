//! What listens: the routes, who may use them, and the way of a request to its model.
//!
//! Written against [`Models`], not against the shelf, so that tests bring a shelf that does what they need. The gateway
//! reads `model` and `stream` of a request and nothing else; bodies pass through unchanged in both directions.
//!
//! | module | subject |
//! |---|---|
//! | `guard` | hosts, origins, keys, headers: who may ask |
//! | `keys` | the keys that may be shown, and whose they are |
//! | `ask` | the two fields that are read |
//! | `forward` | waiting, passing on, trying again |
//! | `passing` | an answer on its way back |
//! | `salts` | what keeps the cached prefixes of one key from another |
//! | `unread` | answers to requests whose body nobody read |
//! | `upstream` | connections to the workers |
//! | `error` | the one form of every error |
//!
//! Keeps I10: bodies, waits, watchers and connections kept for later are bounded, and the parked requests by the shelf.

mod ask;
mod error;
mod forward;
mod guard;
mod keys;
mod models;
mod passing;
mod salts;
mod serve;
mod unread;
mod upstream;

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::api::Name;
use crate::config::{Limits, ServerConfig};
use crate::metrics::Metrics;
use crate::shelf::Caller;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use ask::Ask;
pub(crate) use ask::read_body;
pub use error::{ApiError, ErrorBody, ErrorDetail};
pub use keys::{KeyError, Keys};
pub use models::Models;
pub use serve::{bind, serve};

pub(crate) use guard::Guard;
use salts::Salts;
use upstream::Lanes;
pub(crate) use upstream::probe;

const WATCHERS_MAX: usize = 64;

/// Times that users have no reason to change and tests have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long a stream may wait before it begins early, with comments.
    pub grace: Duration,
    /// How often a waiting stream says that it waits.
    pub comment_every: Duration,
    /// The longest a worker may say nothing in the middle of an answer.
    pub silence_max: Duration,
    /// How often the shelf is told that a worker has said nothing in the middle of an answer.
    pub silence_told_every: Duration,
    /// How often a feed of events without events says that it lives.
    pub heartbeat_every: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(2),
            comment_every: Duration::from_secs(5),
            silence_max: Duration::from_hours(1),
            silence_told_every: Duration::from_secs(5),
            heartbeat_every: Duration::from_secs(15),
        }
    }
}

/// Everything the handlers share.
#[derive(Debug)]
pub struct App {
    pub(crate) models: Arc<dyn Models>,
    pub(crate) limits: Limits,
    pub(crate) settings: Settings,
    pub(crate) guard: Guard,
    pub(crate) salts: Option<Salts>,
    pub(crate) lanes: Arc<Lanes>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) watchers: Arc<Semaphore>,
    /// Cancelled when the server begins to end: feeds that would never end by themselves do then.
    pub(crate) ending: CancellationToken,
}

impl App {
    /// An application for `models`. `keys` guards it where there are any.
    #[must_use]
    pub fn new(
        models: Arc<dyn Models>,
        config: &ServerConfig,
        keys: Option<Keys>,
        settings: Settings,
    ) -> Arc<Self> {
        Arc::new(Self {
            metrics: Arc::new(Metrics::new(&models)),
            models,
            limits: config.limits,
            settings,
            guard: Guard::new(config, keys),
            salts: config.separate_keys.then(Salts::new),
            lanes: Arc::default(),
            watchers: Arc::new(Semaphore::new(WATCHERS_MAX)),
            ending: CancellationToken::new(),
        })
    }

    /// Tells feeds to end; new requests are still answered until the listener is gone.
    pub fn begin_ending(&self) {
        self.ending.cancel();
    }

    /// All routes, guarded.
    pub fn router(self: &Arc<Self>) -> axum::Router {
        axum::Router::new()
            .route("/v1/models", axum::routing::get(list_models))
            .route("/v1/models/{id}", axum::routing::get(show_model))
            .route("/v1/{*path}", axum::routing::any(forward::forward))
            .merge(crate::api::routes())
            .merge(crate::page::routes())
            .fallback(nothing_here)
            .method_not_allowed_fallback(wrong_method)
            .layer(axum::middleware::from_fn_with_state(Arc::clone(self), guard::check))
            .layer(axum::middleware::from_fn(unread::close))
            .with_state(Arc::clone(self))
    }

    /// A worker went away in the middle of an answer: why it was ended, where that is known, else how that looked from here.
    pub(crate) fn lost(&self, model: &str, how: &dyn std::fmt::Display) -> ApiError {
        match self.models.trouble(model) {
            Some(why) => ApiError::worker_lost(model, &why),
            None => ApiError::worker_lost(model, how),
        }
    }

    /// Counts a refusal and gives it its form.
    pub(crate) fn refused(&self, model: Option<&str>, caller: &Caller, error: ApiError) -> Response {
        tracing::debug!(model, status = error.status.as_u16(), message = error.message, "refused");
        self.metrics.request(model.unwrap_or(""), caller, error.status);
        error.into_response()
    }
}

fn described(model: &crate::state::ModelSnapshot, started_at_ms: u64) -> Value {
    json!({
        "id": model.name,
        "object": "model",
        "created": started_at_ms / 1000,
        "owned_by": "shoal",
        "shoal": {"status": model.status, "source": model.source, "capabilities": model.capabilities},
    })
}

async fn list_models(State(app): State<Arc<App>>) -> Json<Value> {
    let shelf = app.models.snapshot();
    let models: Vec<Value> = shelf.models.iter().map(|model| described(model, shelf.started_at_ms)).collect();
    Json(json!({"object": "list", "data": models}))
}

async fn show_model(State(app): State<Arc<App>>, Name(id): Name) -> Response {
    let shelf = app.models.snapshot();
    match shelf.model(&id) {
        Some(model) => Json(described(model, shelf.started_at_ms)).into_response(),
        None => ApiError::from(crate::shelf::RouteError::UnknownModel {
            name: id,
            known: shelf.models.iter().map(|model| model.name.clone()).collect(),
        })
        .into_response(),
    }
}

async fn nothing_here(uri: axum::http::Uri) -> ApiError {
    let message = format!(
        "there is nothing at {}; /v1 is for clients, /api/v1 for managing (/openapi.json), / is the page",
        uri.path()
    );
    ApiError::new(axum::http::StatusCode::NOT_FOUND, "unknown_url", message)
}

async fn wrong_method(method: axum::http::Method, uri: axum::http::Uri) -> ApiError {
    let message = format!("{} does not take {method}", uri.path());
    ApiError::new(axum::http::StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}
