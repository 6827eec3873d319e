//! Does. The seam to the hardware: device memory by address, streams, events, page-locked host memory.
//!
//! | module | subject |
//! |---|---|
//! | [`device`] | `trait Device`: raw verbs in the style of the driver, and what each promises |
//! | [`owned`] | what callers use: objects that hold their parents and give themselves back on Drop |
//! | [`sim`] | the simulated device: real address space, real faults, memory of this machine |
//! | [`fault`] | a device that fails on request and remembers what it was asked |
//! | [`conformance`] | one suite that every device must pass |
//! | [`error`] | what a call can answer instead |
//!
//! Code above holds `Arc<dyn Device>`: each verb is a driver call, so one virtual call is not measurable.
//! Nothing here waits for a stream unless asked to, and then with a deadline (I5, I10). `unsafe` is allowed in
//! this crate only, one operation a block.

pub mod conformance;
pub mod device;
pub mod error;
pub mod fault;
pub mod owned;
pub mod sim;

pub use device::{Device, DeviceInfo, DeviceKind, DeviceMemory, HostFunction, VirtAddr};
pub use error::{DeviceError, ErrorKind};
pub use fault::FaultDevice;
pub use owned::{Event, Frame, HashTicket, HostBuffer, Mapping, Reservation, Span, Stream};
pub use sim::{SimDevice, SimOptions};

/// The hash of bytes, the same on the host and on every device: xxh3-64 with seed 0.
///
/// Compare device and host copies only through this function and [`Stream::hash`], so that one definition
/// serves both: one long xxh3 is a chain that a GPU cannot compute in parallel, so this will become a hash of
/// hashes of fixed pieces when a kernel has to compute it too. Nothing may store its value across versions
/// without storing which definition made it.
#[must_use]
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}
