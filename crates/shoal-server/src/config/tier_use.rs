//! How workers use the tiers below the device: `tier_load`, `tier_idle` and `tier_remote` of `[server]`.
//!
//! Apart because the server only hands it on: a worker chooses and moves by itself.

use std::time::Duration;

use toml::de::DeTable;

use super::parse::{Reader, Sited, one_of};
use super::remote::RemoteConfig;

const LOADS: [&str; 2] = ["fastest", "always"];
const IDLE_DEFAULT: Duration = Duration::from_mins(10);
const IDLE_MAX: Duration = Duration::from_hours(24);

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierUse {
    /// What is there is loaded, also where computing it is faster by what was measured.
    pub always_loads: bool,
    /// How long a conversation's KV stays on the device unused once it lies in a tier; none for as long as there is room.
    pub idle: Option<Duration>,
    /// What several servers keep KV in together; none where that is nowhere.
    pub remote: Option<Sited<RemoteConfig>>,
}

impl Default for TierUse {
    fn default() -> Self {
        Self { always_loads: false, idle: Some(IDLE_DEFAULT), remote: None }
    }
}

impl TierUse {
    pub(super) fn read<'i>(reader: &mut Reader<'i>, table: &DeTable<'i>) -> Self {
        let loads = reader.parsed(table, "tier_load", |text| match text {
            "fastest" => Ok(false),
            "always" => Ok(true),
            _ => Err(one_of(text, &LOADS)),
        });
        let idle = reader.duration(table, "tier_idle", Duration::ZERO, IDLE_MAX).unwrap_or(IDLE_DEFAULT);
        Self {
            always_loads: loads.is_some_and(|always| always.value),
            idle: (!idle.is_zero()).then_some(idle),
            remote: RemoteConfig::read(reader, table),
        }
    }

    /// The remote tier, wherever it was said.
    #[must_use]
    pub fn remote(&self) -> Option<&RemoteConfig> {
        self.remote.as_ref().map(|remote| &remote.value)
    }

    /// As in the configuration, and as workers are told.
    #[must_use]
    pub const fn load(&self) -> &'static str {
        LOADS[self.always_loads as usize]
    }
}
