//! What the gateway reads in a request's body: which model, whether to stream, and whether what no request of its kind can
//! do without is there, so that a bad one does not wake a model.

use std::time::Duration;

use axum::body::Body;
use axum::http::StatusCode;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
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
    messages: Given,
    prompt: Given,
    prompt_embeds: Given,
    input: Given,
}

/// What is there of a field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Given {
    /// Nothing, or null.
    #[default]
    Missing,
    EmptyList,
    List,
    Other,
}

impl<'de> Deserialize<'de> for Given {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Look;
        impl<'de> Visitor<'de> for Look {
            type Value = Given;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("anything")
            }
            fn visit_unit<E>(self) -> Result<Given, E> {
                Ok(Given::Missing)
            }
            fn visit_bool<E>(self, _: bool) -> Result<Given, E> {
                Ok(Given::Other)
            }
            fn visit_i64<E>(self, _: i64) -> Result<Given, E> {
                Ok(Given::Other)
            }
            fn visit_u64<E>(self, _: u64) -> Result<Given, E> {
                Ok(Given::Other)
            }
            fn visit_f64<E>(self, _: f64) -> Result<Given, E> {
                Ok(Given::Other)
            }
            fn visit_str<E>(self, _: &str) -> Result<Given, E> {
                Ok(Given::Other)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Given, A::Error> {
                let mut given = Given::EmptyList;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    given = Given::List;
                }
                Ok(given)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Given, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Given::Other)
            }
        }
        deserializer.deserialize_any(Look)
    }
}

#[derive(Deserialize)]
struct Seen {
    #[serde(default)]
    messages: Given,
    #[serde(default)]
    prompt: Given,
    #[serde(default)]
    prompt_embeds: Given,
    #[serde(default)]
    input: Given,
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
                let stream = seen.stream.as_bool().unwrap_or(false);
                let Seen { messages, prompt, prompt_embeds, input, .. } = seen;
                Ok(Self { model, stream, messages, prompt, prompt_embeds, input })
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

impl Ask {
    /// Finds what a request to this path cannot do without, in the words of our worker. Of other paths nothing is known, and
    /// what is more than missing is the worker's business.
    pub(crate) fn check(&self, path: &str) -> Result<(), ApiError> {
        let missing = |name: &'static str| {
            Err(ApiError::invalid(Some(name), "missing_required_parameter", format!("'{name}' is missing")))
        };
        match path {
            "/v1/chat/completions" => match self.messages {
                Given::List => Ok(()),
                Given::Missing => missing("messages"),
                Given::EmptyList => {
                    let message = "'messages' must hold at least one message";
                    Err(ApiError::invalid(Some("messages"), "invalid_value", message))
                }
                Given::Other => {
                    Err(ApiError::invalid(Some("messages"), "invalid_type", "'messages' must be a list"))
                }
            },
            "/v1/completions" if [self.prompt, self.prompt_embeds] == [Given::Missing; 2] => {
                missing("prompt")
            }
            "/v1/embeddings" if [self.input, self.messages] == [Given::Missing; 2] => missing("input"),
            _ => Ok(()),
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
        let missing = Given::Missing;
        let ask = |model: &str, stream| Ask {
            model: model.to_owned(),
            stream,
            messages: missing,
            prompt: missing,
            prompt_embeds: missing,
            input: missing,
        };
        assert_eq!(read(r#"{"model":"chat","x":{"model":3}}"#), Ok(ask("chat", false)));
        assert_eq!(read(r#" {"stream":true,"model":"chat"}"#), Ok(ask("chat", true)));
        assert_eq!(read(r#"{"stream":"yes","model":"chat"}"#), Ok(ask("chat", false)));
        assert_eq!(read(r#"{"model":"\u0063hat"}"#), Ok(ask("chat", false)));
    }

    #[test]
    fn what_no_request_can_do_without_is_missed_by_path_and_nothing_more() {
        let (chat, text, embed) = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings");
        for (path, fields, code) in [
            (chat, "", Some("missing_required_parameter")),
            (chat, r#","messages":null"#, Some("missing_required_parameter")),
            (chat, r#","messages":7"#, Some("invalid_type")),
            (chat, r#","messages":{"a":[1]}"#, Some("invalid_type")),
            (chat, r#","messages":[]"#, Some("invalid_value")),
            (chat, r#","messages":[7,{"a":[]}]"#, None),
            (text, r#","messages":[1]"#, Some("missing_required_parameter")),
            (text, r#","prompt":"x"   "#, None),
            (text, r#","prompt":[1,2]"#, None),
            (text, r#","prompt_embeds":"x"   "#, None),
            (embed, r#","prompt":"x"   "#, Some("missing_required_parameter")),
            (embed, r#","input":false"#, None),
            ("/v1/rerank", "", None),
        ] {
            let ask = Ask::read(format!("{{\"model\":\"m\"{fields}}}").as_bytes()).expect("a body");
            assert_eq!(ask.check(path).err().map(|error| error.code), code, "{path} {fields}");
        }
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
