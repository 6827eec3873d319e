//! The four places bytes can be, fastest first.

use core::fmt;

use serde::{Deserialize, Serialize};

/// Where a valid copy of some bytes lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Memory of the device: VRAM, or the simulated device's share of RAM.
    Device,
    /// The host arena: page-locked RAM where that is allowed.
    Host,
    /// The disk tier's log.
    Disk,
    /// The file that clean bytes were first read from (safetensors) and can be read from again.
    Source,
}

impl Tier {
    /// All tiers, fastest first.
    pub const ALL: [Self; 4] = [Self::Device, Self::Host, Self::Disk, Self::Source];
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
            Self::Source => "source",
        })
    }
}
