//! What the gateway and the API need of the shelf, so that both are tested without one.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Instant;

use futures_util::future::BoxFuture;
use tokio::sync::broadcast;

use crate::shelf::{Caller, Reloaded, Report, Route, RouteError, ShelfError};
use crate::state::{Event, Missed, ShelfSnapshot, Why};

/// The models, seen from the outside. [`crate::shelf::Shelf`] is the real one.
pub trait Models: Debug + Send + Sync + 'static {
    /// The way to `model` for a request of `caller`, once it is awake and its turn has come. Dropping the future gives the
    /// place in the queue up.
    fn route<'a>(
        &'a self,
        model: &'a str,
        caller: &'a Caller,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Route, RouteError>>;

    /// Brings a model's weights to the device.
    fn wake<'a>(&'a self, model: &'a str, deadline: Instant) -> BoxFuture<'a, Result<Report, ShelfError>>;

    /// Takes a model's weights off the device, but for the part `keep` (0 to 1).
    fn sleep<'a>(
        &'a self,
        model: &'a str,
        keep: f64,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Report, ShelfError>>;

    /// Why a model is as it is, with the newest `last` decisions about it.
    ///
    /// # Errors
    /// There is no such model.
    fn why(&self, model: &str, last: usize) -> Result<Why, ShelfError>;

    /// Makes a model stay on the device, or lets it go again.
    ///
    /// # Errors
    /// As the shelf's.
    fn pin(&self, model: &str, pinned: bool) -> Result<Report, ShelfError>;

    /// Whether there is a model of that name whose requests must be of OpenAI's form.
    fn is_strict(&self, model: &str) -> bool;

    /// Whether a model of that name is awake now.
    fn is_awake(&self, model: &str) -> bool;

    /// Why the newest worker of a model was ended, where it had to be.
    fn trouble(&self, model: &str) -> Option<String>;

    /// How far a model that `caller` waits for is, in a few words, such as `"waking, 45 %"`.
    fn progress(&self, model: &str, caller: &Caller) -> Option<String>;

    /// Reads the configuration again; only what changed is touched.
    fn reload(&self) -> BoxFuture<'_, Result<Reloaded, ShelfError>>;

    /// Everything, at this moment.
    fn snapshot(&self) -> ShelfSnapshot;

    /// Events from now on.
    fn subscribe(&self) -> broadcast::Receiver<Arc<Event>>;

    /// Events after `id`, oldest first.
    ///
    /// # Errors
    /// [`Missed`] where some are no longer kept.
    fn events_since(&self, id: u64) -> Result<Vec<Arc<Event>>, Missed>;

    /// Ends every worker, by force where one still lives at the deadline.
    fn shutdown(&self, deadline: Instant) -> BoxFuture<'_, ()>;
}
