//! The one form of every error that a client sees: OpenAI's.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::shelf::{RouteError, ShelfError};

/// The body of an error: `{"error": {...}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// A sentence for people.
    pub message: String,
    /// The kind of error, in OpenAI's words.
    #[serde(rename = "type")]
    pub kind: String,
    /// A word for programs.
    pub code: Option<String>,
    /// The field of the request that is to blame.
    pub param: Option<String>,
}

/// An error on its way to a client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The status of the response.
    pub status: StatusCode,
    /// A sentence for people.
    pub message: String,
    /// A word for programs.
    pub code: &'static str,
    /// The field of the request that is to blame.
    pub param: Option<&'static str>,
    /// When it may be worth asking again.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    /// An error without parameter or retry.
    #[must_use]
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), code, param: None, retry_after: None }
    }

    /// 400 with the field to blame.
    #[must_use]
    pub fn invalid(param: Option<&'static str>, code: &'static str, message: impl Into<String>) -> Self {
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, code, message) }
    }

    /// 502: the worker went away.
    #[must_use]
    pub fn worker_lost(model: &str, why: &dyn std::fmt::Display) -> Self {
        let message = format!("the worker of model {model:?} went away while it answered: {why}");
        Self::new(StatusCode::BAD_GATEWAY, "worker_lost", message)
    }

    /// As it stands in a response's body.
    #[must_use]
    pub fn body(&self) -> ErrorBody {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::GATEWAY_TIMEOUT => "timeout_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        ErrorBody {
            error: ErrorDetail {
                message: self.message.clone(),
                kind: kind.to_owned(),
                code: Some(self.code.to_owned()),
                param: self.param.map(str::to_owned),
            },
        }
    }

    /// As one event of a stream that has begun already.
    #[must_use]
    pub fn sse(&self) -> String {
        format!("data: {}\n\n", serde_json::to_string(&self.body()).unwrap_or_default())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs_f64().ceil().clamp(1.0, 3600.0);
            if let Ok(value) = HeaderValue::try_from(format!("{seconds:.0}")) {
                response.headers_mut().insert(header::RETRY_AFTER, value);
            }
        }
        response
    }
}

impl From<RouteError> for ApiError {
    fn from(error: RouteError) -> Self {
        let message = error.to_string();
        match error {
            RouteError::UnknownModel { .. } => {
                Self { param: Some("model"), ..Self::new(StatusCode::NOT_FOUND, "model_not_found", message) }
            }
            RouteError::Failed { retry_after, .. } => Self {
                retry_after,
                ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "model_unavailable", message)
            },
            RouteError::Full { retry_after, .. } => Self {
                retry_after: Some(retry_after),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_waiting", message)
            },
            RouteError::KeyFull { retry_after, .. } => Self {
                retry_after: Some(retry_after),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_waiting_of_key", message)
            },
            RouteError::Deadline { .. } => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "model_wait_timeout", message)
            }
            RouteError::ShuttingDown => Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", message),
        }
    }
}

impl From<ShelfError> for ApiError {
    fn from(error: ShelfError) -> Self {
        let message = error.to_string();
        let (status, code) = match error {
            ShelfError::UnknownModel { .. } => (StatusCode::NOT_FOUND, "model_not_found"),
            ShelfError::Refused { .. } => (StatusCode::CONFLICT, "refused"),
            ShelfError::Configuration { .. } => (StatusCode::CONFLICT, "configuration"),
            ShelfError::Deadline { .. } => (StatusCode::GATEWAY_TIMEOUT, "deadline"),
            ShelfError::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        };
        Self::new(status, code, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_with_too_much_waiting_is_told_to_come_again() {
        let error = ApiError::from(RouteError::KeyFull {
            model: "chat".to_owned(),
            key: "alice".to_owned(),
            parked: 128,
            left: 128,
            retry_after: Duration::from_secs(2),
        });
        assert_eq!(
            (error.code, error.body().error.kind.as_str()),
            ("too_many_waiting_of_key", "rate_limit_error")
        );
        let response = error.into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
    }
}
