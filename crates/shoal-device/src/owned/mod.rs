//! Objects over the raw verbs: a child holds its parents, and dropping is the teardown.
//!
//! Apart because the raw verbs know no lifetimes. Kept here: I3 (an address stays reserved while anything holds
//! the reservation), I4 (a mapping is as long as its frame), and that a queued job holds what it touches.
//! Left to the caller: fences (I5). A dropped [`Mapping`] is unmapped at once, whatever kernels are running;
//! only jobs queued through [`Stream`] hold their own `Arc`s.
//!
//! | object | verb / Drop | holds |
//! |---|---|---|
//! | [`Reservation`] | reserve / release | device |
//! | [`Frame`] | create / destroy | device |
//! | [`Mapping`] | map / unmap | reservation, frame |
//! | [`HostSlab`] | allocate, lock / free | device |
//! | [`HostBuffer`] | a part of a slab | slab |
//! | [`HostView`], [`HostViewMut`] | a range of it that is read, that is written | buffer |
//! | [`Stream`] | create / destroy | device |
//! | [`Event`] | create + record / destroy | device |
//!
//! A Drop that fails records [`DeviceError::Leaked`] on the device ([`Device::take_errors`]) and leaks what the
//! object held on purpose: a frame that may still be mapped must not be destroyed, nor its address given away.

mod copies;
mod host;
mod memory;
mod slab;
mod stream;

use std::sync::Arc;

pub use host::{HostBuffer, HostView, HostViewMut};
pub use memory::{Frame, Mapping, Reservation};
use shoal_core::bytes::ByteCount;
pub use slab::HostSlab;
pub use stream::{Event, HashTicket, Span, Stream};

use crate::device::Device;
use crate::error::DeviceError;

/// Drop has nobody to tell: the device keeps the error.
fn record_leak(device: &Arc<dyn Device>, what: &'static str, handle: u64, cause: DeviceError) {
    device.record_error(DeviceError::Leaked { what, handle, cause: Box::new(cause) });
}

/// Checks that `offset..offset + bytes` lies in `0..limit` and is not empty.
fn check_range(
    what: &'static str,
    offset: ByteCount,
    bytes: ByteCount,
    limit: ByteCount,
) -> Result<(), DeviceError> {
    match offset.checked_add(bytes) {
        Some(end) if end <= limit => Ok(()),
        _ => Err(DeviceError::OutOfRange { what, offset, bytes, limit }),
    }
}
