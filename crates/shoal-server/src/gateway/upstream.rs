//! HTTP/1.1 to the workers' Unix sockets, with connections kept for the next request.
//!
//! hyper's own pool is keyed by host names and closes what it drops at its leisure; here a lane is a connection that one
//! request owns, and dropping it closes the socket at once, which is how a worker learns that its client went away.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::{Request, Response};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

const LANES_IDLE_MAX: usize = 32;
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(5);

/// One connection to a worker. Dropping it closes it.
#[derive(Debug)]
pub(crate) struct Lane {
    sender: http1::SendRequest<Full<Bytes>>,
    socket: PathBuf,
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

/// The lanes that nobody uses now, by socket.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    idle: Mutex<HashMap<PathBuf, Vec<Lane>>>,
}

impl Lanes {
    /// Sends a request and waits for the head of its response. A kept connection that turns out to be closed is replaced
    /// by a new one without further ado.
    pub(crate) async fn send(
        &self,
        socket: &Path,
        request: impl Fn() -> Request<Full<Bytes>>,
        wait_max: Duration,
    ) -> Result<(Response<Incoming>, Lane), UpstreamError> {
        while let Some(mut lane) = self.take(socket) {
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
        let mut lane = connect(socket).await?;
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
        let lanes = idle.entry(lane.socket.clone()).or_default();
        if lanes.len() < LANES_IDLE_MAX {
            lanes.push(lane);
        }
    }

    fn take(&self, socket: &Path) -> Option<Lane> {
        let mut idle = self.idle.lock();
        let lanes = idle.get_mut(socket)?;
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

async fn connect(socket: &Path) -> Result<Lane, UpstreamError> {
    let connect = async {
        let stream = UnixStream::connect(socket).await.map_err(UpstreamError::Connect)?;
        let (sender, driver) = http1::handshake(TokioIo::new(stream)).await.map_err(UpstreamError::Lost)?;
        let driver = tokio::spawn(async move {
            if let Err(error) = driver.await {
                tracing::debug!(%error, "a connection to a worker ended");
            }
        });
        Ok(Lane { sender, socket: socket.to_owned(), driver })
    };
    match tokio::time::timeout(CONNECT_WAIT_MAX, connect).await {
        Ok(lane) => lane,
        Err(_) => Err(UpstreamError::Connect(std::io::ErrorKind::TimedOut.into())),
    }
}
