//! What the server shows of itself: the shelf's snapshot and its events.
//!
//! Apart from the code that makes them, because the page, the command line and other people's scripts read them as JSON:
//! a field here is a promise. Byte counts are plain numbers of bytes, times are milliseconds since the Unix epoch.
//!
//! Keeps I10 (the ring of events is bounded) and the half of I11 that writes decisions down.

mod event;
mod log;
mod snapshot;
mod why;
mod words;

pub use event::{Event, EventKind, SCHEMA_VERSION};
pub use log::{EventLog, Missed};
pub use snapshot::{
    DeviceSnapshot, DriverSnapshot, KeySnapshot, LatencySnapshot, LeaseSnapshot, ModelBytes, ModelCounts,
    ModelSnapshot, ModelStatus, ProcessSnapshot, ShadowSnapshot, SharingSnapshot, ShelfSnapshot,
    StateSnapshot, ThrashSnapshot, TierSnapshot, WaitingSnapshot, WeightStoreSnapshot,
};
pub use why::Why;
pub(crate) use words::status as status_word;
