//! Why a model is as it is.

#![allow(unused_qualifications, reason = "in what utoipa writes")]

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;

use super::{Name, Parameters};
use crate::gateway::{ApiError, App, ErrorBody};
use crate::state::Why;

const DECISIONS_DEFAULT: usize = 20;
const DECISIONS_MAX: usize = 1_000;

/// How much.
#[derive(Debug, Deserialize, IntoParams)]
pub(crate) struct Newest {
    /// The newest so many decisions (20 by default, 1000 at most).
    last: Option<usize>,
}

/// Why a model is as it is: how it stands now, and what was decided about it, in sentences with their numbers.
#[utoipa::path(get, path = "/api/v1/models/{name}/why", tag = "state",
    params(("name" = String, Path), Newest),
    responses((status = 200, body = Why), (status = 404, body = ErrorBody)))]
pub(crate) async fn why(
    State(app): State<Arc<App>>,
    Name(name): Name,
    Parameters(newest): Parameters<Newest>,
) -> Result<Json<Why>, ApiError> {
    Ok(Json(app.models.why(&name, newest.last.unwrap_or(DECISIONS_DEFAULT).min(DECISIONS_MAX))?))
}
