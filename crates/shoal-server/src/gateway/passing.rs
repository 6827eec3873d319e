//! A worker's response on its way to the client: frame by frame, nothing kept, nothing changed.
//!
//! The body owns the route and the connection. When the client goes away the server drops the body, and with it the
//! connection (the worker cancels) and the route (the model may be idle again). The next frame is asked for only when the
//! client took the last one, so a slow client slows its worker and nothing else.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::BoxError;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::Sleep;

use super::App;
use super::forward::told_of;
use super::upstream::Lane;
use crate::shelf::Route;

/// What a response needs to know of its request.
#[derive(Debug)]
pub(crate) struct Journey {
    pub(crate) model: String,
    pub(crate) route: Route,
    pub(crate) asked: Instant,
    /// The worker answered what was asked; a refusal says nothing of how fast a model is.
    pub(crate) is_answer: bool,
    pub(crate) app: Arc<App>,
}

#[derive(Debug)]
pub(crate) struct Passing {
    frames: Incoming,
    first: Option<Frame<Bytes>>,
    lane: Option<Lane>,
    journey: Option<Journey>,
    is_event_stream: bool,
    /// The last bytes passed on ended an event.
    between_events: bool,
    /// Rings where nothing came for a while; set while something is waited for.
    silence: Pin<Box<Sleep>>,
    silent_since: Option<Instant>,
    silence_max: Duration,
    told_every: Duration,
    /// When the shelf last heard that bytes come.
    bytes_told: Instant,
    bytes_passed: u64,
}

impl Passing {
    pub(crate) fn new(frames: Incoming, lane: Lane, journey: Journey, is_event_stream: bool) -> Self {
        let super::Settings { silence_max, silence_told_every: told_every, .. } = journey.app.settings;
        Self {
            frames,
            first: None,
            lane: Some(lane),
            journey: Some(journey),
            is_event_stream,
            between_events: true,
            silence: Box::pin(tokio::time::sleep(told_every)),
            silent_since: None,
            silence_max,
            told_every,
            bytes_told: Instant::now(),
            bytes_passed: 0,
        }
    }

    /// Waits for the first frame and keeps it, so that a worker that dies between head and body can still be answered
    /// for with a proper status. Streams do not wait: their head is worth having early.
    pub(crate) async fn first_frame(&mut self) -> Result<(), String> {
        if self.is_event_stream {
            return Ok(());
        }
        let frame = tokio::time::timeout(self.silence_max, self.frames.frame());
        let frame = match &self.journey {
            Some(journey) => told_of(&journey.route, self.told_every, frame).await,
            None => frame.await,
        };
        let why = match frame {
            Ok(None) => return Ok(()),
            Ok(Some(Ok(frame))) => {
                self.first = Some(frame);
                return Ok(());
            }
            Ok(Some(Err(error))) => error.to_string(),
            Err(_) => format!("not a byte for {} s", self.silence_max.as_secs()),
        };
        self.lane = None;
        Err(why)
    }

    fn passed(&mut self, frame: &Frame<Bytes>) {
        let Some(data) = frame.data_ref().filter(|data| !data.is_empty()) else { return };
        if self.bytes_passed == 0
            && let Some(journey) = self.journey.as_ref().filter(|journey| journey.is_answer)
        {
            journey.route.first_byte();
            journey.app.metrics.first_byte(
                &journey.model,
                journey.route.was_asleep(),
                journey.asked.elapsed(),
            );
        }
        if self.bytes_told.elapsed() >= self.told_every
            && let Some(journey) = &self.journey
        {
            self.bytes_told = Instant::now();
            journey.route.more_bytes();
        }
        self.bytes_passed += data.len() as u64;
        self.between_events = data.ends_with(b"\n\n") || data.ends_with(b"\r\n\r\n");
    }

    /// The answer is whole: its connection can serve the next, and its route ends.
    fn finish(&mut self) {
        if let (Some(lane), Some(journey)) = (self.lane.take(), self.journey.take()) {
            journey.app.lanes.give_back(lane);
        }
    }

    /// Nothing has come yet; the client would take more. The shelf is told of it now and then, until it is too long.
    fn wait(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let since = if let Some(since) = self.silent_since {
            since
        } else {
            self.silence.as_mut().reset(tokio::time::Instant::now() + self.told_every);
            *self.silent_since.insert(Instant::now())
        };
        while self.silence.as_mut().poll(context).is_ready() {
            if since.elapsed() >= self.silence_max {
                let why = format!("not a byte for {} s", self.silence_max.as_secs());
                return Poll::Ready(self.broke(&why));
            }
            if let Some(journey) = &self.journey {
                journey.route.no_byte(since.elapsed());
            }
            self.silence.as_mut().reset(tokio::time::Instant::now() + self.told_every);
        }
        Poll::Pending
    }

    /// The worker is lost in the middle: events end with one that says so, anything else ends torn.
    fn broke(&mut self, why: &str) -> Option<Result<Frame<Bytes>, BoxError>> {
        self.lane = None;
        let journey = self.journey.take()?;
        let error = journey.app.lost(&journey.model, &why);
        tracing::warn!(
            model = journey.model,
            why,
            bytes_passed = self.bytes_passed,
            "lost a worker in mid-answer"
        );
        if !self.is_event_stream {
            return Some(Err(error.into()));
        }
        let gap = if self.between_events { "" } else { "\n\n" };
        Some(Ok(Frame::data(Bytes::from(format!("{gap}{}", error.sse())))))
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        // Whoever knows the length does not ask for the end; anything else that is dropped early is a client gone away.
        if self.first.is_none() && self.frames.is_end_stream() {
            self.finish();
        }
    }
}

impl Body for Passing {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(frame) = self.first.take() {
            self.passed(&frame);
            return Poll::Ready(Some(Ok(frame)));
        }
        if self.journey.is_none() {
            return Poll::Ready(None);
        }
        let Poll::Ready(frame) = Pin::new(&mut self.frames).poll_frame(context) else {
            return self.wait(context);
        };
        self.silent_since = None;
        Poll::Ready(match frame {
            Some(Ok(frame)) => {
                self.passed(&frame);
                Some(Ok(frame))
            }
            Some(Err(error)) => self.broke(&error.to_string()),
            None => {
                self.finish();
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.journey.is_none() && self.first.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.first.is_some() { SizeHint::default() } else { self.frames.size_hint() }
    }
}
