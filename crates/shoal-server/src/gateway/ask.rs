//! The two things the gateway reads in a request's body: which model, and whether to stream.

use std::time::Duration;

use axum::body::Body;
use axum::http::StatusCode;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserialize;
use serde_json::Value;

use super::error::ApiError;
use shoal_core::bytes::ByteCount;

/// How much of a body that is too long is read only to be thrown away, and for how long.
const AWAY_BYTES_MAX: usize = 1 << 30;
const AWAY_WAIT_MAX: Duration = Duration::from_secs(5);

/// What a body asks for. Everything else in it is the worker's business.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ask {
    pub(crate) model: String,
    pub(crate) stream: bool,
}

#[derive(Deserialize)]
struct Seen {
    #[serde(default)]
    model: Value,
    #[serde(default)]
    stream: Value,
}

impl Ask {
    pub(crate) fn read(body: &[u8]) -> Result<Self, ApiError> {
        let malformed = |why: &dyn std::fmt::Display| {
            ApiError::invalid(None, "invalid_json", format!("the body is not a JSON object: {why}"))
        };
        // serde takes a list for a struct; OpenAI's format does not.
        match body.iter().find(|byte| !byte.is_ascii_whitespace()) {
            None => return Err(malformed(&"it is empty")),
            Some(b'{') => {}
            Some(_) => return Err(malformed(&"it must begin with {")),
        }
        let seen: Seen = serde_json::from_slice(body).map_err(|error| malformed(&error))?;
        match seen.model {
            Value::String(model) if !model.is_empty() => {
                Ok(Self { model, stream: seen.stream.as_bool().unwrap_or(false) })
            }
            Value::Null => {
                Err(ApiError::invalid(Some("model"), "missing_required_parameter", "`model` is missing"))
            }
            _ => Err(ApiError::invalid(
                Some("model"),
                "invalid_type",
                "`model` must be a string, the name of a model",
            )),
        }
    }
}

/// The whole body, or 413 where it is longer than `limit`.
pub(crate) async fn read_body(mut body: Body, limit: ByteCount) -> Result<Bytes, ApiError> {
    let bytes_max = usize::try_from(limit.0).unwrap_or(usize::MAX);
    match Limited::new(&mut body, bytes_max).collect().await {
        Ok(whole) => Ok(whole.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            read_away(&mut body).await;
            Err(ApiError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "request_too_large",
                format!("the request's body is longer than {limit}"),
            ))
        }
        Err(error) => {
            Err(ApiError::invalid(None, "incomplete_body", format!("the body did not arrive whole: {error}")))
        }
    }
}

/// Reads what is left of a body and keeps none of it, within bounds. A client that is answered while it still writes sees
/// its connection break, and never the answer.
async fn read_away(body: &mut Body) {
    let mut left = AWAY_BYTES_MAX;
    let read = async {
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                return;
            }
        }
    };
    // Past the deadline it is answered all the same.
    let _ = tokio::time::timeout(AWAY_WAIT_MAX, read).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_model_and_stream_are_read() {
        let read = |text: &str| Ask::read(text.as_bytes());
        let ask = |model: &str, stream| Ask { model: model.to_owned(), stream };
        assert_eq!(read(r#"{"model":"chat","x":{"model":3}}"#), Ok(ask("chat", false)));
        assert_eq!(read(r#" {"stream":true,"model":"chat"}"#), Ok(ask("chat", true)));
        assert_eq!(read(r#"{"stream":"yes","model":"chat"}"#), Ok(ask("chat", false)));
        assert_eq!(read(r#"{"model":"\u0063hat"}"#), Ok(ask("chat", false)));
    }

    #[test]
    fn everything_else_is_400_and_says_why() {
        let deep = format!("{}{}", "[".repeat(9000), "]".repeat(9000));
        let deep_elsewhere = format!("{{\"model\":\"a\",\"x\":{deep}}}");
        assert!(
            Ask::read(deep_elsewhere.as_bytes()).is_ok(),
            "skipped without recursion; the worker's business"
        );
        let deep = format!("{{\"model\":{deep}}}");
        for (text, code) in [
            ("", "invalid_json"),
            ("  ", "invalid_json"),
            ("[\"chat\",true]", "invalid_json"),
            ("{\"model\":\"chat\"", "invalid_json"),
            ("{\"model\":\"chat\"} x", "invalid_json"),
            ("{\"model\":\"a\",\"model\":\"b\"}", "invalid_json"),
            (deep.as_str(), "invalid_json"),
            ("{\"model\":\"\\ud800\"}", "invalid_json"),
            ("{}", "missing_required_parameter"),
            ("{\"model\":null}", "missing_required_parameter"),
            ("{\"model\":3}", "invalid_type"),
            ("{\"model\":\"\"}", "invalid_type"),
            ("{\"model\":[\"chat\"]}", "invalid_type"),
        ] {
            let error = Ask::read(text.as_bytes()).expect_err(text);
            assert_eq!((error.status, error.code), (StatusCode::BAD_REQUEST, code), "{text:.60}");
        }
        assert!(Ask::read(b"{\"model\":\"\xff\"}").is_err());
    }
}
