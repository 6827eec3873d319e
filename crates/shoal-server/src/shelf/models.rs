//! The shelf as the gateway sees it.

use std::sync::Arc;
use std::time::Instant;

use futures_util::future::{BoxFuture, FutureExt};
use tokio::sync::broadcast;

use super::{Caller, Reloaded, Report, Route, RouteError, Shelf, ShelfError};
use crate::gateway::Models;
use crate::state::{Event, Missed, ShelfSnapshot, Why};

impl Models for Shelf {
    fn route<'a>(
        &'a self,
        model: &'a str,
        caller: &'a Caller,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Route, RouteError>> {
        self.route_for(model, caller, deadline).boxed()
    }

    fn wake<'a>(&'a self, model: &'a str, deadline: Instant) -> BoxFuture<'a, Result<Report, ShelfError>> {
        Self::wake(self, model, deadline).boxed()
    }

    fn sleep<'a>(
        &'a self,
        model: &'a str,
        keep: f64,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Report, ShelfError>> {
        Self::sleep(self, model, keep, deadline).boxed()
    }

    fn why(&self, model: &str, last: usize) -> Result<Why, ShelfError> {
        Self::why(self, model, last)
    }

    fn pin(&self, model: &str, pinned: bool) -> Result<Report, ShelfError> {
        Self::pin(self, model, pinned)
    }

    fn is_strict(&self, model: &str) -> bool {
        Self::is_strict(self, model)
    }

    fn is_awake(&self, model: &str) -> bool {
        Self::is_awake(self, model)
    }

    fn trouble(&self, model: &str) -> Option<String> {
        Self::trouble(self, model)
    }

    fn progress(&self, model: &str, caller: &Caller) -> Option<String> {
        Self::progress(self, model, caller)
    }

    fn reload(&self) -> BoxFuture<'_, Result<Reloaded, ShelfError>> {
        Self::reload(self).boxed()
    }

    fn snapshot(&self) -> ShelfSnapshot {
        Self::snapshot(self)
    }

    fn subscribe(&self) -> broadcast::Receiver<Arc<Event>> {
        Self::subscribe(self)
    }

    fn events_since(&self, id: u64) -> Result<Vec<Arc<Event>>, Missed> {
        Self::events_since(self, id)
    }
    fn shutdown(&self, deadline: Instant) -> BoxFuture<'_, ()> {
        Self::shutdown(self, deadline).boxed()
    }
}
