//! Addresses, device memory, and the binding of one to the other.

use core::mem;
use std::sync::Arc;

use shoal_core::bytes::ByteCount;

use super::{check_range, record_leak};
use crate::device::{Device, RawFrame, VirtAddr};
use crate::error::DeviceError;

/// A range of addresses without memory.
#[derive(Debug)]
pub struct Reservation {
    device: Arc<dyn Device>,
    at: VirtAddr,
    bytes: ByteCount,
}

impl Reservation {
    /// Reserves `bytes` of address space.
    ///
    /// # Errors
    /// As [`Device::reserve`].
    pub fn new(device: &Arc<dyn Device>, bytes: ByteCount) -> Result<Arc<Self>, DeviceError> {
        let at = device.reserve(bytes)?;
        Ok(Arc::new(Self { device: Arc::clone(device), at, bytes }))
    }

    /// Where it begins; the same until the last holder drops it (I3).
    #[must_use]
    pub fn address(&self) -> VirtAddr {
        self.at
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> ByteCount {
        self.bytes
    }

    /// Whose addresses these are.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Err(cause) = self.device.release(self.at, self.bytes) {
            record_leak(&self.device, "reservation", self.at.0, cause);
        }
    }
}

/// Device memory: one indivisible handle.
#[derive(Debug)]
pub struct Frame {
    device: Arc<dyn Device>,
    raw: RawFrame,
    bytes: ByteCount,
    is_gone: bool,
}

impl Frame {
    /// Takes `bytes` of device memory, zeroed.
    ///
    /// # Errors
    /// As [`Device::create_frame`]; [`DeviceError::OutOfMemory`] is the one that evicting may cure.
    pub fn create(device: &Arc<dyn Device>, bytes: ByteCount) -> Result<Arc<Self>, DeviceError> {
        let raw = device.create_frame(bytes)?;
        Ok(Arc::new(Self { device: Arc::clone(device), raw, bytes, is_gone: false }))
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> ByteCount {
        self.bytes
    }

    /// Whose memory this is.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Gives the memory back, as dropping it does, and says so where the device refuses: the frame is as before then.
    ///
    /// # Errors
    /// The frame, and what [`Device::destroy_frame`] said.
    pub fn destroy(mut self) -> Result<(), (Self, DeviceError)> {
        match self.device.destroy_frame(self.raw) {
            Ok(()) => {
                self.is_gone = true;
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        if self.is_gone {
            return;
        }
        if let Err(cause) = self.device.destroy_frame(self.raw) {
            record_leak(&self.device, "frame", self.raw.0, cause);
        }
    }
}

/// A frame mapped in a reservation. Dropping it unmaps at once; the frame's memory goes back when nobody else
/// holds the [`Frame`].
#[derive(Debug)]
pub struct Mapping {
    at: VirtAddr,
    offset: ByteCount,
    is_gone: bool,
    // Dropped after the unmap in `drop`, in this order.
    frame: Arc<Frame>,
    reservation: Arc<Reservation>,
}

impl Mapping {
    /// Maps the whole of `frame` at `offset` of `reservation`.
    ///
    /// # Errors
    /// `OutOfRange` where it does not fit, `UnknownHandle` for a frame of another device, otherwise as
    /// [`Device::map`]. The frame is dropped unless the caller kept another `Arc` of it.
    pub fn new(
        reservation: &Arc<Reservation>,
        offset: ByteCount,
        frame: Arc<Frame>,
    ) -> Result<Arc<Self>, DeviceError> {
        check_range("reservation", offset, frame.bytes, reservation.bytes)?;
        let device = &reservation.device;
        if !Arc::ptr_eq(device, &frame.device) {
            let (device, handle) = (device.info().id, frame.raw.0);
            return Err(DeviceError::UnknownHandle { device, what: "frame", handle });
        }
        let at = reservation.at.offset(offset);
        device.map(at, frame.raw)?;
        Ok(Arc::new(Self { at, offset, is_gone: false, frame, reservation: Arc::clone(reservation) }))
    }

    /// Where it begins.
    #[must_use]
    pub fn address(&self) -> VirtAddr {
        self.at
    }

    /// Where it begins in its reservation.
    #[must_use]
    pub fn offset(&self) -> ByteCount {
        self.offset
    }

    /// Its length, which is its frame's (I4).
    #[must_use]
    pub fn bytes(&self) -> ByteCount {
        self.frame.bytes
    }

    /// What is mapped. Keep an `Arc` of it to go on holding the memory after the mapping is gone.
    #[must_use]
    pub fn frame(&self) -> &Arc<Frame> {
        &self.frame
    }

    /// Where it is mapped.
    #[must_use]
    pub fn reservation(&self) -> &Arc<Reservation> {
        &self.reservation
    }

    /// Whose memory this is.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.reservation.device
    }

    /// Unmaps, as dropping it does, and says so where the device refuses: the mapping is as before then. Gives the frame.
    ///
    /// # Errors
    /// The mapping, and what [`Device::unmap`] said.
    pub fn unmap(mut self) -> Result<Arc<Frame>, (Self, DeviceError)> {
        match self.device().unmap(self.at, self.bytes()) {
            Ok(()) => {
                self.is_gone = true;
                Ok(Arc::clone(&self.frame))
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.is_gone {
            return;
        }
        if let Err(cause) = self.device().unmap(self.at, self.bytes()) {
            record_leak(self.device(), "mapping", self.at.0, cause);
            // Still mapped, as far as anyone knows: neither the memory nor the addresses may go.
            mem::forget(Arc::clone(&self.frame));
            mem::forget(Arc::clone(&self.reservation));
        }
    }
}
