//! The host tier: how much of `host_budget` keeps KV that the device forgot, and what of it each model gets.
//!
//! Apart because it lies inside a model's share of the host budget and never beside it (I1): its worker takes it off what
//! its copies may use. Copies of weights go first; the tier gets some of what they leave.

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::shares::fair_shares;
use toml::de::DeTable;

use super::disk::keeps_kv;
use super::error::{Problem, ProblemKind};
use super::parse::{ModelSection, Reader, Sited};
use super::{Engine, ModelConfig, ServerConfig};
use crate::broker::host_need;

/// The least that is of use to a model; with less it has none.
pub(super) const HOST_TIER_MIN: ByteCount = ByteCount::mib(16);

/// `host_tier = "auto|off|SIZE"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostTier {
    /// Half of what the copies of a model leave of its share.
    #[default]
    Auto,
    /// There is none.
    Off,
    /// So much, all models together; each gets an equal part, as far as its copies leave that.
    Of(ByteCount),
}

impl ServerConfig {
    /// What `model` gets of a tier whose size is given, as far as copies leave that.
    #[must_use]
    pub fn host_tier_part(&self, model: &ModelConfig) -> ByteCount {
        let HostTier::Of(bytes) = self.host_tier else { return ByteCount::ZERO };
        let sharing = self.models.iter().filter(|model| uses_it(model)).count();
        if !uses_it(model) || sharing == 0 { ByteCount::ZERO } else { ByteCount(bytes.0 / sharing as u64) }
    }

    /// How much of a share of the host budget is the host tier of `model`, whose copies need `need`. Where that is not
    /// known yet, a tier whose size is given gets half of the share at most, and one by default nothing.
    #[must_use]
    pub fn host_tier_of(&self, model: &ModelConfig, share: ByteCount, need: Option<ByteCount>) -> ByteCount {
        let left = need.map(|need| share.saturating_sub(need));
        let bytes = match self.host_tier {
            HostTier::Off => ByteCount::ZERO,
            _ if !uses_it(model) => ByteCount::ZERO,
            HostTier::Auto => ByteCount(left.unwrap_or_default().0 / 2),
            HostTier::Of(_) => self.host_tier_part(model).min(left.unwrap_or(ByteCount(share.0 / 2))),
        };
        let bytes = ByteCount(bytes.0 / PAGE_BYTES.0 * PAGE_BYTES.0);
        if bytes < HOST_TIER_MIN { ByteCount::ZERO } else { bytes }
    }

    /// What each model that can use it would get if all started now, by name, as far as the sizes of their weights are
    /// known; for people.
    #[must_use]
    pub fn host_tiers(&self) -> Vec<(&str, ByteCount)> {
        let need = |model: &ModelConfig| match model.engine {
            Engine::Command => Some(ByteCount::ZERO),
            _ => model.weights.map(host_need),
        };
        let needs = self.models.iter().map(|model| (need(model), self.host_tier_part(model)));
        // As the broker does: a part for one that may be added.
        let needs: Vec<_> = needs.chain([(Some(ByteCount::ZERO), ByteCount::ZERO)]).collect();
        let shares = fair_shares(self.host_budget, &with_parts(self.host_budget, &needs));
        let each = |(model, share): (&ModelConfig, ByteCount)| {
            self.host_tier_of(model, share, model.weights.map(host_need))
        };
        self.models
            .iter()
            .zip(shares)
            .filter(|(model, _)| uses_it(model))
            .map(|(model, share)| (model.name.as_str(), each((model, share))))
            .collect()
    }
}

/// What models need of the host budget: each for its copies and, where all of that fits together, its part of the tier.
pub(crate) fn with_parts(
    budget: ByteCount,
    needs: &[(Option<ByteCount>, ByteCount)],
) -> Vec<Option<ByteCount>> {
    let sum = |sum: u64, (need, part): &(Option<ByteCount>, ByteCount)| {
        Some(sum.saturating_add(need.as_ref()?.0).saturating_add(part.0))
    };
    let fits = needs.iter().try_fold(0, sum).is_some_and(|all| all <= budget.0);
    needs.iter().map(|(need, part)| need.map(|need| if fits { need + *part } else { need })).collect()
}

/// Whether a model's worker can keep KV in host memory.
fn uses_it(model: &ModelConfig) -> bool {
    keeps_kv(model.engine, model.prefix_caching)
}

pub(super) fn read<'i>(reader: &mut Reader<'i>, table: &DeTable<'i>) -> Option<Sited<HostTier>> {
    const KEY: &str = "host_tier";
    let value = table.get(KEY)?;
    let choice = match value.get_ref().as_str() {
        Some("auto") => HostTier::Auto,
        Some("off") => HostTier::Off,
        Some(text) if text.parse::<ByteCount>().is_err() => {
            reader.bad(
                value,
                KEY,
                format!("{text:?} is none of \"auto\", \"off\" and a size such as \"8GiB\""),
            );
            return None;
        }
        _ => HostTier::Of(reader.size(table, KEY)?.value),
    };
    Some(reader.sited(&value.span(), choice))
}

/// Whether a size that is given makes sense.
pub(super) fn check(
    tier: Option<&Sited<HostTier>>,
    budget: ByteCount,
    models: &[ModelSection],
    problems: &mut Vec<Problem>,
) {
    let Some((tier, HostTier::Of(bytes))) = tier.map(|tier| (tier, tier.value)) else { return };
    let engine =
        |model: &ModelSection| model.engine.as_ref().map_or_else(Engine::default, |engine| engine.value);
    let sharing = models.iter().filter(|model| keeps_kv(engine(model), model.prefix_caching)).count().max(1);
    let least = ByteCount(HOST_TIER_MIN.0 * sharing as u64);
    let why = if bytes > budget {
        format!(
            "{bytes} do not fit into `host_budget`, which is {budget} and holds the copies of weights first"
        )
    } else if bytes < least {
        format!("{bytes} is too little: at least {least}, {HOST_TIER_MIN} for each model, or \"off\"")
    } else {
        return;
    };
    problems.push(tier.problem(ProblemKind::BadValue { key: "host_tier".to_owned(), why }));
}

#[cfg(test)]
mod tests {
    use super::super::tests::load_here;
    use super::*;

    #[test]
    fn copies_of_all_models_go_before_the_tier_of_any() {
        let mib = |need: Option<u64>| need.map(ByteCount::mib);
        let all = |budget: u64, needs: &[(Option<u64>, u64)]| {
            let needs: Vec<_> =
                needs.iter().map(|(need, part)| (mib(*need), ByteCount::mib(*part))).collect();
            with_parts(ByteCount::mib(budget), &needs)
        };
        let needs = [(Some(500), 100), (Some(4), 100)];
        assert_eq!(all(704, &needs), [mib(Some(600)), mib(Some(104))]);
        assert_eq!(all(703, &needs), [mib(Some(500)), mib(Some(4))], "else the large one would lack some");
        assert_eq!(all(1 << 20, &[(None, 100), (Some(4), 100)]), [None, mib(Some(4))]);
    }

    /// Copies of weights go first, and a tier that is too small to be of use is none.
    #[test]
    fn the_host_tier_lies_within_a_models_share() {
        let models = "[[model]]\nname = 'a'\nsource = 'a'\n[[model]]\nname = 'b'\nsource = 'b'\n\
                      [[model]]\nname = 'c'\nsource = 'c'\nprefix_caching = false\n";
        let gets = |key: &str, share: u64, need: Option<u64>| {
            let config =
                load_here(&format!("[server]\nhost_budget = '1GiB'\n{key}\n{models}")).expect("good");
            let of = |name: &str| {
                let model = config.model(name).expect("listed");
                config.host_tier_of(model, ByteCount::mib(share), need.map(ByteCount::mib)).0 >> 20
            };
            assert_eq!(of("c"), 0, "it finds nothing again");
            assert_eq!(of("a"), of("b"));
            of("a")
        };
        assert_eq!(gets("", 400, Some(100)), 150, "half of what is left");
        assert_eq!(gets("", 101, Some(100)), 0);
        assert_eq!(gets("", 131, Some(100)), 0, "15.5 MiB are of no use");
        assert_eq!(gets("", 50, Some(100)), 0);
        assert_eq!(gets("", 400, None), 0, "nobody knows what its copies need");
        assert_eq!(gets("host_tier = 'auto'", 400, Some(100)), 150);
        assert_eq!(gets("host_tier = 'off'", 400, Some(100)), 0);
        assert_eq!(gets("host_tier = '200MiB'", 400, Some(100)), 100);
        assert_eq!(gets("host_tier = '200MiB'", 150, Some(100)), 50, "what the copies leave");
        assert_eq!(gets("host_tier = '200MiB'", 100, None), 50);
        assert_eq!(gets("host_tier = 209715200", 400, Some(100)), 100);

        for (key, says) in [
            (
                "host_tier = '16GiB'",
                ":3:13: `host_tier`: 16 GiB do not fit into `host_budget`, which is 1 GiB",
            ),
            (
                "host_tier = '20MiB'",
                "20 MiB is too little: at least 32 MiB, 16 MiB for each model, or \"off\"",
            ),
            ("host_tier = 'some'", "\"some\" is none of \"auto\", \"off\" and a size such as \"8GiB\""),
            ("host_tier = true", ":3:13: `host_tier` must be"),
        ] {
            let said =
                load_here(&format!("[server]\nhost_budget = '1GiB'\n{key}\n{models}")).expect_err(says);
            assert!(said.contains(says), "{said}\n{says}");
        }
    }
}
