//! The page: one hand-written file, no build step, nothing from elsewhere.
//!
//! Its content security policy allows only its own script and style, by a nonce that is new for every response, and
//! connections to this server. The page writes text of models as text, never as HTML.

use std::fmt::Write;
use std::sync::Arc;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;

use crate::gateway::{ApiError, App};

const PAGE: &str = include_str!("index.html");
const NONCE: &str = "NONCE";

pub(crate) fn routes() -> axum::Router<Arc<App>> {
    axum::Router::new().route("/", get(page))
}

async fn page() -> Response {
    let Ok(nonce) = nonce() else {
        return ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "no random numbers")
            .into_response();
    };
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let mut response = Html(PAGE.replace(NONCE, &nonce)).into_response();
    if let Ok(policy) = HeaderValue::try_from(policy) {
        response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    response
}

fn nonce() -> rustix::io::Result<String> {
    let mut bytes = [0u8; 18];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    let mut text = String::with_capacity(36);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}
