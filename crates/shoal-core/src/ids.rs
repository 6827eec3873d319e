//! Names for things, one type each, so that one is never passed for another.

use core::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A device of this machine, by its ordinal.
    DeviceId(u32),
    "device "
);
id!(
    /// A model of the shelf, by its place in the configuration.
    ModelId(u32),
    "model "
);
id!(
    /// A region of one memory manager.
    RegionId(u64),
    "region "
);
id!(
    /// An extent of one region, by its place in order of use.
    ExtentIndex(u32),
    "extent "
);
id!(
    /// One copy of one extent between two tiers.
    TransferId(u64),
    "transfer "
);
id!(
    /// A slab of host memory of one arena, in the order they were made.
    SlabId(u64),
    "slab "
);
