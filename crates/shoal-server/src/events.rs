//! `/api/v1/events`: everything that happens, as server-sent events with ids, resumable.
//!
//! The event log is read by id and the broadcast only says that there is something to read: a watcher that falls behind
//! reads the log where it left off, and hears `missed` if that place is gone.

#![allow(unused_qualifications, reason = "in what utoipa writes")]

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event as Line, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use utoipa::IntoParams;

use crate::api::Parameters;
use crate::gateway::{ApiError, App};
use crate::state::Event;

/// Where to begin.
#[derive(Debug, Deserialize, IntoParams)]
pub(crate) struct Since {
    /// Begin after this event; 0 begins with the oldest kept. The header `Last-Event-ID` goes before it. By default only
    /// what happens from now on.
    since: Option<u64>,
}

struct Watch {
    app: Arc<App>,
    feed: Receiver<Arc<Event>>,
    last_id: u64,
    ready: std::collections::VecDeque<Line>,
    _permit: OwnedSemaphorePermit,
}

/// The feed.
#[utoipa::path(
    get,
    path = "/api/v1/events",
    tag = "state",
    params(Since, ("Last-Event-ID" = Option<u64>, Header, description = "Begin after this event")),
    responses(
        (status = 200, description = "Server-sent events; each `data` is an Event. `event: missed` says that some are \
         no longer kept", content_type = "text/event-stream", body = Event),
        (status = 503, description = "Too many watch already", body = crate::gateway::ErrorBody),
    )
)]
pub(crate) async fn watch(
    State(app): State<Arc<App>>,
    Parameters(query): Parameters<Since>,
    headers: HeaderMap,
) -> Response {
    let Ok(permit) = Arc::clone(&app.watchers).try_acquire_owned() else {
        let message = "too many watch the events already";
        return ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_watchers", message).into_response();
    };
    let resumed = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.trim().parse().ok());
    // Subscribed before the log is read: what happens in between is in one of the two.
    let feed = app.models.subscribe();
    let last_id = resumed.or(query.since).unwrap_or_else(|| app.models.snapshot().last_event_id);
    let heartbeat_every = app.settings.heartbeat_every;
    let mut watch = Watch { app, feed, last_id, ready: std::collections::VecDeque::new(), _permit: permit };
    watch.ready.push_back(Line::default().comment("events of a shoal server"));
    watch.read();
    let lines = stream::unfold(watch, |mut watch| async move {
        let line = watch.next().await?;
        Some((Ok::<_, Infallible>(line), watch))
    });
    Sse::new(lines).keep_alive(KeepAlive::new().interval(heartbeat_every)).into_response()
}

impl Watch {
    /// Reads what is new in the log.
    fn read(&mut self) {
        let events = match self.app.models.events_since(self.last_id) {
            Ok(events) => events,
            Err(missed) => {
                let data = serde_json::json!({"oldest_kept": missed.oldest_kept}).to_string();
                self.ready.push_back(Line::default().event("missed").data(data));
                self.last_id = missed.oldest_kept.saturating_sub(1);
                self.app.models.events_since(self.last_id).unwrap_or_default()
            }
        };
        for event in events {
            self.last_id = event.id;
            let data = serde_json::to_string(&*event).unwrap_or_default();
            self.ready.push_back(Line::default().id(event.id.to_string()).data(data));
        }
    }

    async fn next(&mut self) -> Option<Line> {
        loop {
            if let Some(line) = self.ready.pop_front() {
                return Some(line);
            }
            tokio::select! {
                () = self.app.ending.cancelled() => return None,
                heard = self.feed.recv() => match heard {
                    Ok(event) if event.id <= self.last_id => {}
                    Ok(_) | Err(RecvError::Lagged(_)) => self.read(),
                    Err(RecvError::Closed) => return None,
                },
            }
        }
    }
}
