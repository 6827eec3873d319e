//! `/api/v1`: seeing and ordering. Declared through `OpenAPI`, which `/openapi.json` serves.

mod extract;
mod log;
mod why;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use utoipa::{OpenApi, ToSchema};

use crate::gateway::{ApiError, App, ErrorBody};
use crate::shelf::{Reloaded, Report};
use crate::state::ShelfSnapshot;

pub(crate) use extract::{Name, Order, Parameters};

/// How long an order is waited for by default, in seconds.
const ORDER_WAIT_S: f64 = 120.0;
const ORDER_WAIT_S_MAX: f64 = 3600.0;

/// The API, for `/openapi.json`.
#[derive(Debug, OpenApi)]
#[openapi(
    info(
        title = "Shoal",
        description = "Managing the models of a Shoal server. Clients of models use /v1 (OpenAI's API)."
    ),
    paths(state, why::why, wake, sleep, pin, reload, crate::events::watch, log::log, healthz, metrics),
    components(schemas(crate::state::Event))
)]
pub(crate) struct Document;

pub(crate) fn routes() -> axum::Router<Arc<App>> {
    axum::Router::new()
        .route("/api/v1/state", get(state))
        .route("/api/v1/models/{name}/why", get(why::why))
        .route("/api/v1/events", get(crate::events::watch))
        .route("/api/v1/models/{name}/wake", post(wake))
        .route("/api/v1/models/{name}/sleep", post(sleep))
        .route("/api/v1/models/{name}/pin", post(pin))
        .route("/api/v1/models/{name}/log", get(log::log))
        .route("/api/v1/reload", post(reload))
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi))
}

/// Everything, at this moment.
#[utoipa::path(get, path = "/api/v1/state", tag = "state", responses((status = 200, body = ShelfSnapshot)))]
async fn state(State(app): State<Arc<App>>) -> Json<ShelfSnapshot> {
    Json(app.models.snapshot())
}

/// What to wake.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct WakeOrder {
    /// How long to wait for it, in seconds (120 by default).
    #[serde(default)]
    pub(crate) wait_s: Option<f64>,
}

/// What to put to sleep.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SleepOrder {
    /// The part of the weights that stays on the device, 0 to 1 (0 by default).
    #[serde(default)]
    pub(crate) keep: f64,
    /// How long to wait for it, in seconds (120 by default).
    #[serde(default)]
    pub(crate) wait_s: Option<f64>,
}

/// Whether to pin.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PinOrder {
    /// True pins, false lets go.
    #[serde(default = "yes")]
    pub(crate) pinned: bool,
}

const fn yes() -> bool {
    true
}

fn deadline(wait_s: Option<f64>) -> Result<Instant, ApiError> {
    let wait_s = wait_s.unwrap_or(ORDER_WAIT_S);
    if !(0.0..=ORDER_WAIT_S_MAX).contains(&wait_s) {
        let message = format!("`wait_s` must lie between 0 and {ORDER_WAIT_S_MAX}");
        return Err(ApiError::invalid(Some("wait_s"), "out_of_range", message));
    }
    Ok(Instant::now() + Duration::from_secs_f64(wait_s))
}

/// Bring a model's weights to the device.
#[utoipa::path(post, path = "/api/v1/models/{name}/wake", tag = "orders",
    params(("name" = String, Path)), request_body = WakeOrder,
    responses((status = 200, body = Report), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
              (status = 504, body = ErrorBody)))]
async fn wake(
    State(app): State<Arc<App>>,
    Name(name): Name,
    Order(order): Order<WakeOrder>,
) -> Result<Json<Report>, ApiError> {
    Ok(Json(app.models.wake(&name, deadline(order.wait_s)?).await?))
}

/// Take a model's weights off the device, wholly or in part.
#[utoipa::path(post, path = "/api/v1/models/{name}/sleep", tag = "orders",
    params(("name" = String, Path)), request_body = SleepOrder,
    responses((status = 200, body = Report), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
              (status = 504, body = ErrorBody)))]
async fn sleep(
    State(app): State<Arc<App>>,
    Name(name): Name,
    Order(order): Order<SleepOrder>,
) -> Result<Json<Report>, ApiError> {
    if !(0.0..=1.0).contains(&order.keep) {
        return Err(ApiError::invalid(Some("keep"), "out_of_range", "`keep` must lie between 0 and 1"));
    }
    Ok(Json(app.models.sleep(&name, order.keep, deadline(order.wait_s)?).await?))
}

/// Keep a model on the device, or let it go again. Answers at once; a model that is not there is brought back meanwhile,
/// and where that fails, `error` of the model and a `wake_failed` event say why. The pin stays.
#[utoipa::path(post, path = "/api/v1/models/{name}/pin", tag = "orders",
    params(("name" = String, Path)), request_body = PinOrder,
    responses((status = 200, body = Report), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
async fn pin(
    State(app): State<Arc<App>>,
    Name(name): Name,
    Order(order): Order<PinOrder>,
) -> Result<Json<Report>, ApiError> {
    Ok(Json(app.models.pin(&name, order.pinned)?))
}

/// Nothing to say beside the order.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReloadOrder {}

/// Read the configuration's file again. Only what changed is touched; a file that is wrong changes nothing.
#[utoipa::path(post, path = "/api/v1/reload", tag = "orders", request_body = ReloadOrder,
    responses((status = 200, body = Reloaded), (status = 409, body = ErrorBody)))]
async fn reload(
    State(app): State<Arc<App>>,
    Order(ReloadOrder {}): Order<ReloadOrder>,
) -> Result<Json<Reloaded>, ApiError> {
    Ok(Json(app.models.reload().await?))
}

/// Alive.
#[utoipa::path(get, path = "/healthz", tag = "state", responses((status = 200, content_type = "application/json")))]
async fn healthz() -> Json<serde_json::Value> {
    Json(serde_json::json!({"status": "ok"}))
}

/// Figures for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "state", responses((status = 200, content_type = "application/openmetrics-text")))]
async fn metrics(State(app): State<Arc<App>>) -> Response {
    match app.metrics.text() {
        Ok(text) => {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, content_type)], text).into_response()
        }
        Err(_) => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "cannot write the metrics")
            .into_response(),
    }
}

async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(Document::openapi())
}
