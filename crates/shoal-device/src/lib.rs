//! Does. The seam to the hardware: device memory by address, streams, events, page-locked host memory.
//!
//! | module | subject |
//! |---|---|
//! | [`device`] | `trait Device`: raw verbs in the style of the driver, and what each promises |
//! | [`owned`] | what callers use: objects that hold their parents and give themselves back on Drop |
//! | [`sim`] | the simulated device: real address space, real faults, memory of this machine |
//! | `cuda` (feature `cuda`) | the CUDA device: an NVIDIA GPU through its driver |
//! | [`gauge`] | how much of a device is taken and by whom, without opening it |
//! | [`fault`] | a device that fails on request and remembers what it was asked |
//! | [`conformance`] | one suite that every device must pass |
//! | [`host`] | memory of this machine: what it is made of, what is allowed |
//! | [`hash`] | the one definition of a hash that host and devices share |
//! | [`error`] | what a call can answer instead |
//!
//! Code above holds `Arc<dyn Device>`: each verb is a driver call, so one virtual call is not measurable.
//! Nothing here waits for a stream unless asked to, and then with a deadline (I5, I10). `unsafe` is allowed in
//! this crate only, one operation a block.

pub mod conformance;
#[cfg(any(feature = "cuda", test))]
mod copy_cache;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod error;
pub mod fault;
pub mod gauge;
pub mod hash;
pub mod host;
pub mod owned;
pub mod sim;

#[cfg(feature = "cuda")]
pub use cuda::CudaDevice;
pub use device::{
    Device, DeviceInfo, DeviceKind, DeviceMemory, ForeignStream, ForeignWork, HostBacking, HostFunction,
    VirtAddr,
};
pub use error::{DeviceError, ErrorKind};
pub use fault::FaultDevice;
pub use hash::{Hasher, hash_bytes};
pub use owned::{
    Event, Frame, HashTicket, HostBuffer, HostSlab, HostView, HostViewMut, Mapping, Reservation, Span, Stream,
};
pub use sim::{SimDevice, SimOptions};
