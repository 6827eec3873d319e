//! Commands to a running server: which one, and one request to it.

use std::path::Path;
use std::time::Duration;

use axum::http::{Request, Uri, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};

use super::{At, Failure};
use crate::config::Surroundings;
use crate::gateway::ErrorBody;

const ANSWER_BYTES_MAX: usize = 64 << 20;
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(5);

/// `server.json` in the runtime directory: where the server is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ServerFile {
    pub(super) pid: u32,
    pub(super) address: String,
    pub(super) url: String,
    pub(super) version: String,
}

impl ServerFile {
    /// Written whole or not at all.
    pub(super) fn write(&self, file: &Path) -> std::io::Result<()> {
        let scratch = file.with_extension("json.new");
        std::fs::write(&scratch, serde_json::to_vec(self)?)?;
        std::fs::rename(scratch, file)
    }
}

/// A server to ask.
#[derive(Debug)]
pub(super) struct Client {
    host: String,
    url: String,
    key: Option<String>,
    found_by: Option<String>,
}

impl Client {
    pub(super) fn find(at: &At) -> Result<Self, Failure> {
        let key = match &at.api_key_file {
            Some(file) => Some(first_key(file)?),
            None => std::env::var("SHOAL_API_KEY").ok().filter(|key| !key.is_empty()),
        };
        let (url, found_by) = if let Some(url) = &at.server {
            (url.clone(), None)
        } else {
            let file = Surroundings::of_this_process().runtime_dir.join("server.json");
            (found_url(&file)?, Some(file.display().to_string()))
        };
        let url = url.trim_end_matches('/').to_owned();
        let parsed = url.parse::<Uri>().ok().filter(|uri| {
            uri.scheme_str() == Some("http") && uri.path_and_query().is_none_or(|path| path == "/")
        });
        match parsed.and_then(|uri| uri.authority().map(|authority| authority.as_str().to_owned())) {
            Some(host) => Ok(Self { host, url, key, found_by }),
            None => Err(Failure::new(format!(
                "{url:?} is not a server's address: write it like http://127.0.0.1:8000"
            ))),
        }
    }

    /// One request; the answer's body where it is a success.
    pub(super) fn ask(
        &self,
        path: &str,
        order: Option<&impl Serialize>,
        wait_max: Duration,
    ) -> Result<Bytes, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            match tokio::time::timeout(wait_max, self.exchange(path, order)).await {
                Ok(answer) => answer,
                Err(_) => {
                    Err(Failure::new(format!("no answer from {} within {} s", self.url, wait_max.as_secs())))
                }
            }
        })
    }

    fn nobody(&self, why: &dyn std::fmt::Display) -> Failure {
        let named = self.found_by.as_ref().map_or_else(String::new, |file| {
            format!("; {file} names it, but the server that wrote it may have been killed")
        });
        Failure::new(format!("nothing answers at {} ({why}){named}", self.url))
    }

    async fn exchange(&self, path: &str, order: Option<&impl Serialize>) -> Result<Bytes, Failure> {
        let broken = |error: &dyn std::fmt::Display| Failure::new(format!("{}: {error}", self.url));
        let has_port = self.host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let address = if has_port { self.host.clone() } else { format!("{}:80", self.host) };
        let stream = tokio::time::timeout(CONNECT_WAIT_MAX, tokio::net::TcpStream::connect(&address))
            .await
            .map_err(|_| self.nobody(&"it does not take connections"))?
            .map_err(|error| self.nobody(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(&error))?;
        let driver = tokio::spawn(connection);
        let mut request = Request::builder().uri(path).header(header::HOST, &self.host);
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let mut body = Vec::new();
        if let Some(order) = order {
            request = request.method("POST").header(header::CONTENT_TYPE, "application/json");
            body = serde_json::to_vec(order).map_err(|error| broken(&error))?;
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(|error| broken(&error))?;
        let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        driver.abort();
        let body = body.map_err(|error| broken(&error))?.to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        let said = serde_json::from_slice::<ErrorBody>(&body).map(|body| body.error.message);
        Err(Failure::new(said.unwrap_or_else(|_| format!("{} answered {status}", self.url))))
    }
}

fn first_key(file: &Path) -> Result<String, Failure> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| Failure::new(format!("{}: {error}", file.display())))?;
    let key = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
    key.map(str::to_owned).ok_or_else(|| Failure::new(format!("{} holds no key", file.display())))
}

fn found_url(file: &Path) -> Result<String, Failure> {
    let text = std::fs::read_to_string(file).map_err(|_| {
        Failure::new(format!(
            "no server runs here (there is no {}); start one with `shoal serve`, or name one with --server URL",
            file.display()
        ))
    })?;
    let found: ServerFile =
        serde_json::from_str(&text).map_err(|error| Failure::new(format!("{}: {error}", file.display())))?;
    Ok(found.url)
}
