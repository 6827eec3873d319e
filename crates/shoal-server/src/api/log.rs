//! The end of a worker's output.

#![allow(unused_qualifications, reason = "in what utoipa writes")]

use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{Name, Parameters};
use crate::gateway::{ApiError, App, ErrorBody};

const BYTES_DEFAULT: u64 = 64 << 10;
const BYTES_MAX: u64 = 4 << 20;

/// How much.
#[derive(Debug, Deserialize, IntoParams)]
pub(crate) struct Tail {
    /// The newest so many bytes, from the beginning of a line (64 KiB by default, 4 MiB at most).
    bytes: Option<u64>,
}

/// The end of a worker's output.
#[utoipa::path(get, path = "/api/v1/models/{name}/log", tag = "state",
    params(("name" = String, Path), Tail),
    responses((status = 200, content_type = "text/plain", body = String), (status = 404, body = ErrorBody)))]
pub(crate) async fn log(
    State(app): State<Arc<App>>,
    Name(name): Name,
    Parameters(tail): Parameters<Tail>,
) -> Result<Response, ApiError> {
    let shelf = app.models.snapshot();
    let Some(model) = shelf.model(&name) else {
        let known = shelf.models.iter().map(|model| model.name.clone()).collect();
        return Err(crate::shelf::RouteError::UnknownModel { name, known }.into());
    };
    let file = std::path::PathBuf::from(&model.log);
    let bytes = tail.bytes.unwrap_or(BYTES_DEFAULT).min(BYTES_MAX);
    let text = tokio::task::spawn_blocking(move || end_of(&file, bytes)).await;
    match text {
        Ok(Ok(text)) => Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response()),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            let message = format!("model {name:?} has written nothing yet");
            Err(ApiError::new(StatusCode::NOT_FOUND, "no_log", message))
        }
        Ok(Err(error)) => {
            Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()))
        }
        Err(error) => Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string())),
    }
}

/// At most `bytes` from the end, beginning with a whole line where something was left out.
fn end_of(file: &std::path::Path, bytes: u64) -> std::io::Result<String> {
    let mut file = std::fs::File::open(file)?;
    let length = file.metadata()?.len();
    let start = length.saturating_sub(bytes);
    file.seek(SeekFrom::Start(start))?;
    let mut end = Vec::new();
    file.take(bytes).read_to_end(&mut end)?;
    if start > 0 {
        let line = end.iter().position(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
        end.drain(..line);
    }
    Ok(String::from_utf8_lossy(&end).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_begins_with_a_whole_line() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "one\ntwo\nthree \u{e9}\n").expect("written");
        assert_eq!(end_of(file.path(), 100).expect("read"), "one\ntwo\nthree \u{e9}\n");
        assert_eq!(end_of(file.path(), 12).expect("read"), "three \u{e9}\n");
        assert_eq!(end_of(file.path(), 0).expect("read"), "");
    }
}
