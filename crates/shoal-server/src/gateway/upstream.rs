//! HTTP/1.1 to the workers' Unix sockets, and to programs at addresses of this machine, with connections kept for the
//! next request.
//!
//! hyper's own pool is keyed by host names and closes what it drops at its leisure; here a lane is a connection that one
//! request owns, and dropping it closes the socket at once, which is how a worker learns that its client went away.

use std::collections::HashMap;
use std::time::Duration;

use axum::http::{Request, Response};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;

use crate::shelf::Target;

const LANES_IDLE_MAX: usize = 32;
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(5);

/// One connection to a worker. Dropping it closes it.
#[derive(Debug)]
pub(crate) struct Lane {
    sender: http1::SendRequest<Full<Bytes>>,
    target: Target,
    driver: JoinHandle<()>,
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Why a request got no response.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamError {
    /// Nobody took the request.
    #[error("cannot connect: {0}")]
    Connect(std::io::Error),
    /// The connection ended before the response began.
    #[error("{0}")]
    Lost(hyper::Error),
    /// No response within the time there was.
    #[error("no answer within {:.0} s", .0.as_secs_f64())]
    Silent(Duration),
}

/// The lanes that nobody uses now, by where they lead.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    idle: Mutex<HashMap<Target, Vec<Lane>>>,
}

impl Lanes {
    /// Sends a request and waits for the head of its response. A kept connection that turns out to be closed is replaced
    /// by a new one without further ado.
    pub(crate) async fn send(
        &self,
        target: &Target,
        request: impl Fn() -> Request<Full<Bytes>>,
        wait_max: Duration,
    ) -> Result<(Response<Incoming>, Lane), UpstreamError> {
        while let Some(mut lane) = self.take(target) {
            if lane.sender.ready().await.is_err() {
                continue;
            }
            match answer(&mut lane, request(), wait_max).await {
                Ok(response) => return Ok((response, lane)),
                // Closed while it lay idle, before the worker saw the request.
                Err(UpstreamError::Lost(error)) if error.is_canceled() => {}
                Err(error) => return Err(error),
            }
        }
        let mut lane = connect(target).await?;
        let response = answer(&mut lane, request(), wait_max).await?;
        Ok((response, lane))
    }

    /// Takes a lane back whose response was read to its end.
    pub(crate) fn give_back(&self, lane: Lane) {
        if lane.sender.is_closed() {
            return;
        }
        let mut idle = self.idle.lock();
        idle.retain(|_, lanes| {
            lanes.retain(|lane| !lane.sender.is_closed());
            !lanes.is_empty()
        });
        let lanes = idle.entry(lane.target.clone()).or_default();
        if lanes.len() < LANES_IDLE_MAX {
            lanes.push(lane);
        }
    }

    fn take(&self, target: &Target) -> Option<Lane> {
        let mut idle = self.idle.lock();
        let lanes = idle.get_mut(target)?;
        while let Some(lane) = lanes.pop() {
            if !lane.sender.is_closed() {
                return Some(lane);
            }
        }
        None
    }
}

async fn answer(
    lane: &mut Lane,
    request: Request<Full<Bytes>>,
    wait_max: Duration,
) -> Result<Response<Incoming>, UpstreamError> {
    match tokio::time::timeout(wait_max, lane.sender.send_request(request)).await {
        Ok(answer) => answer.map_err(UpstreamError::Lost),
        Err(_) => Err(UpstreamError::Silent(wait_max)),
    }
}

async fn connect(target: &Target) -> Result<Lane, UpstreamError> {
    let connect = async {
        match target {
            Target::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(UpstreamError::Connect)?;
                shake_hands(stream, target).await
            }
            Target::Tcp(address) => {
                let stream = TcpStream::connect(address).await.map_err(UpstreamError::Connect)?;
                stream.set_nodelay(true).map_err(UpstreamError::Connect)?;
                shake_hands(stream, target).await
            }
        }
    };
    match tokio::time::timeout(CONNECT_WAIT_MAX, connect).await {
        Ok(lane) => lane,
        Err(_) => Err(UpstreamError::Connect(std::io::ErrorKind::TimedOut.into())),
    }
}

async fn shake_hands(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    target: &Target,
) -> Result<Lane, UpstreamError> {
    let (sender, driver) = http1::handshake(TokioIo::new(stream)).await.map_err(UpstreamError::Lost)?;
    let driver = tokio::spawn(async move {
        if let Err(error) = driver.await {
            tracing::debug!(%error, "a connection to a worker ended");
        }
    });
    Ok(Lane { sender, target: target.clone(), driver })
}

/// Whether a GET of `path` there is answered with 200.
///
/// # Errors
/// What came instead, in words.
pub(crate) async fn probe(target: &Target, path: &str, wait_max: Duration) -> Result<(), String> {
    let ask = async {
        let mut lane = connect(target).await.map_err(|error| error.to_string())?;
        let mut request = Request::new(Full::default());
        *request.uri_mut() = path.parse().map_err(|_| format!("{path:?} is not a path"))?;
        let host = axum::http::HeaderValue::from_static("localhost");
        request.headers_mut().insert(axum::http::header::HOST, host);
        let answer = lane.sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = answer.status();
        if status == axum::http::StatusCode::OK { Ok(()) } else { Err(format!("it answered {status}")) }
    };
    match tokio::time::timeout(wait_max, ask).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("no answer within {:.0} s", wait_max.as_secs_f64())),
    }
}
