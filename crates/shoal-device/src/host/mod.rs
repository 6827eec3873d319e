//! Memory of this machine for the host tier: what it is made of, what the kernel allows, and taking it fast.
//!
//! | module | subject |
//! |---|---|
//! | `memory` | mapping it, filling it from several threads, which of it is page-locked |
//! | `file` | memory that several processes can map |
//! | `survey` | what this machine's settings and limits allow, and how to raise them |
//!
//! Apart from the devices because it is the same for all of them; what page-locking means is the device's.

mod file;
pub(crate) mod memory;
mod survey;

pub use file::HostFile;
pub use survey::{HostSurvey, PageSetting, survey};
