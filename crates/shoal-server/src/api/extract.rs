//! What handlers read of a request, with refusals in our own form instead of axum's plain text.

use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;
use shoal_core::bytes::ByteCount;

use crate::gateway::{ApiError, read_body};

const ORDER_BYTES_MAX: ByteCount = ByteCount(64 << 10);

/// The one name in a path.
#[derive(Debug)]
pub(crate) struct Name(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Self(name)),
            Err(error) => Err(ApiError::invalid(None, "invalid_path", error.body_text())),
        }
    }
}

/// What stands after the question mark.
#[derive(Debug)]
pub(crate) struct Parameters<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Parameters<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(parameters)) => Ok(Self(parameters)),
            Err(error) => Err(ApiError::invalid(None, "invalid_query", error.body_text())),
        }
    }
}

/// The body of an order: a small JSON object; an empty body is an empty object.
#[derive(Debug)]
pub(crate) struct Order<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Order<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        Self::parse(&read_body(request.into_body(), ORDER_BYTES_MAX).await?)
    }
}

impl<T: DeserializeOwned> Order<T> {
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let body = if body.trim_ascii().is_empty() { b"{}" } else { body.trim_ascii() };
        // serde takes a list for a struct; an order is an object.
        if body.first() != Some(&b'{') {
            return Err(ApiError::invalid(None, "invalid_json", "the body must be a JSON object"));
        }
        let order = serde_json::from_slice(body);
        order.map(Self).map_err(|error| ApiError::invalid(None, "invalid_json", error.to_string()))
    }
}
