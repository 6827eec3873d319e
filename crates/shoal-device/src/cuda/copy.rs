//! One copy, by the spaces of its ends.
//!
//! Apart because coalescing, batching and the kernels for small pieces will stand here; this is the plain one.

#![expect(unsafe_code, reason = "queues copies by address")]

use super::result::{Driver, StreamHandle};
use crate::device::{RawSpan, Space};
use crate::error::DeviceError;

/// Queues one copy. Nothing is queued for no bytes.
///
/// # Safety
/// As for [`crate::Device::copy`].
pub(super) unsafe fn enqueue(
    driver: Driver,
    stream: &StreamHandle,
    source: RawSpan,
    target: RawSpan,
) -> Result<(), DeviceError> {
    let bytes = source.bytes.0;
    if bytes == 0 {
        return Ok(());
    }
    match (source.space, target.space) {
        // SAFETY: the caller's promise.
        (Space::Host, Space::Device) => unsafe { driver.copy_up(source.at, target.at, bytes, stream) },
        // SAFETY: the caller's promise.
        (Space::Device, Space::Host) => unsafe { driver.copy_down(source.at, target.at, bytes, stream) },
        // SAFETY: the caller's promise.
        (Space::Device, Space::Device) => unsafe { driver.copy_inside(source.at, target.at, bytes, stream) },
        // SAFETY: the caller's promise.
        (Space::Host, Space::Host) => unsafe { driver.copy_anywhere(source.at, target.at, bytes, stream) },
    }
}
