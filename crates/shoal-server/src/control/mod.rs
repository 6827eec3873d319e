//! The control socket: where workers say hello, ask for leases and take orders.
//!
//! Apart from what is said over it ([`shoal_core::protocol`]) and from who decides. This module gives whole, well-formed
//! messages or a typed error, within a bound and a deadline (I10), from processes that are who they say they are.

mod connection;
mod error;
mod listener;

pub use connection::{Incoming, Outgoing};
pub use error::ControlError;
pub use listener::{Greeted, Listener};
