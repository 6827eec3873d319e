//! The shelf: the models, the device memory they share, and the requests that wait for them.
//!
//! ```text
//! Shelf::start(Arc<ServerConfig>) -> Result<Shelf, ShelfError>          (async, inside a tokio runtime)
//! shelf.snapshot() -> ShelfSnapshot
//! shelf.subscribe() -> broadcast::Receiver<Arc<Event>>
//! shelf.events_since(id) -> Result<Vec<Arc<Event>>, Missed>
//! shelf.route(model, deadline: Instant) -> Result<Route, RouteError>    (async)
//! shelf.wake(model, deadline) -> Result<Report, ShelfError>             (async)
//! shelf.sleep(model, keep: f64, deadline) -> Result<Report, ShelfError> (async)
//! shelf.pin(model, pinned) -> Result<Report, ShelfError>
//! shelf.shutdown(deadline)                                              (async)
//! ```

mod error;
mod route;

pub use error::{RouteError, ShelfError};
pub use route::{Report, Route, RouteSink};
