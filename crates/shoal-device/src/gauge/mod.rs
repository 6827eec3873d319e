//! How much of a device is taken, and by whom, without opening it.
//!
//! Apart from [`Device`](crate::device::Device) because whoever shares a device out must not hold any of it: a CUDA context
//! takes half a gibibyte. A [`Gauge`] only looks. What a reading means beside a ledger is shoal-core's part
//! ([`shoal_core::drift`]).
//!
//! | module | reads |
//! |---|---|
//! | `nvml` | NVIDIA's management library, found at run time |
//! | `sim` | the file in which processes share a simulated device |
//!
//! A reading may block, in a driver that hangs for ever: not for a thread that others wait for (I10).

mod nvml;
mod sim;

use shoal_core::drift::Reading;

use crate::error::DeviceError;

pub use nvml::NvmlGauge;
pub use sim::SimGauge;

/// Looks at one device.
pub trait Gauge: Send {
    /// What it reads, for people.
    fn source(&self) -> String;

    /// Reads the device's memory now. May block.
    ///
    /// # Errors
    /// [`GaugeError`]: nothing is known of this moment. The next reading may succeed.
    fn read(&mut self) -> Result<Reading, GaugeError>;
}

/// Why a device could not be looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GaugeError {
    /// The library is not there, or not one that can be loaded.
    #[error("{library} cannot be loaded ({why}); it comes with NVIDIA's driver")]
    Library {
        /// Which.
        library: String,
        /// Why, by the loader's word.
        why: String,
    },
    /// The library is too old.
    #[error("{library} has no {function}; a driver of version 470 or newer has it")]
    Function {
        /// Which library.
        library: String,
        /// What is missing.
        function: &'static str,
    },
    /// The driver refused.
    #[error("{function} failed: {why} (code {code})")]
    Driver {
        /// What was called.
        function: &'static str,
        /// Its answer.
        code: i32,
        /// Its answer in words.
        why: String,
    },
    /// A simulated device's file could not be read.
    #[error(transparent)]
    Simulated(#[from] DeviceError),
}
