//! What a copy costs, by its size and by how it is carried out; measured on a device, or a guess where that cannot be.
//!
//! Apart because the table outlives the process that measured it: it is written to a file and read back, so every value
//! is checked before it is believed.

use serde::{Deserialize, Serialize};

use super::Run;

/// The sizes that are measured: powers of two from 4 KiB to 4 MiB.
pub const SIZES: [u64; 11] = {
    let (mut sizes, mut index) = ([0; 11], 0);
    while index < sizes.len() {
        sizes[index] = 4096 << index;
        index += 1;
    }
    sizes
};
/// No copy of these sizes takes longer on anything that copies at all: a minute.
const NANOS_MAX: u64 = 60_000_000_000;
/// A kernel takes multiprocessors from others' work, so it is chosen only where it is faster by more than this part.
const KERNEL_HANDICAP: u64 = 16;
/// What a file of another layout says here.
const VERSION: u32 = 1;

/// How a copy is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// The copy engine, one call for each.
    Dma,
    /// The copy engine, one call for many; newer drivers have it.
    Batch,
    /// A kernel that reaches page-locked memory of the host.
    Kernel,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Dma, Self::Batch, Self::Kernel];
}

/// Some methods; [`Method::Dma`] is always one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Methods {
    has_batch: bool,
    has_kernel: bool,
}

impl Methods {
    const ALL: [Self; 4] = [
        Self { has_batch: false, has_kernel: false },
        Self { has_batch: true, has_kernel: false },
        Self { has_batch: false, has_kernel: true },
        Self { has_batch: true, has_kernel: true },
    ];

    /// Whether it is one of them.
    #[must_use]
    pub const fn has(self, method: Method) -> bool {
        match method {
            Method::Dma => true,
            Method::Batch => self.has_batch,
            Method::Kernel => self.has_kernel,
        }
    }

    /// Whether there is no other.
    #[must_use]
    pub fn is_only(self, method: Method) -> bool {
        Method::ALL.iter().all(|other| self.has(*other) == (*other == method))
    }
}

/// What one method costs, in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MethodCosts {
    /// Once for a list, whatever its length, beyond what the first method takes to begin.
    pub start: u64,
    /// For each copy of each of [`SIZES`], in a long list.
    pub each: [u64; SIZES.len()],
}

impl MethodCosts {
    /// For one copy of this many bytes: between the sizes measured in proportion, below the least as the least, above the
    /// greatest in proportion to it.
    fn of(&self, bytes: u64) -> u64 {
        let (last, greatest) = (self.each[SIZES.len() - 1], SIZES[SIZES.len() - 1]);
        if bytes >= greatest {
            return scaled(last, bytes, greatest);
        }
        let above = SIZES.partition_point(|size| *size <= bytes);
        if above == 0 {
            return self.each[0];
        }
        let (from, to) = (self.each[above - 1], self.each[above]);
        let (into, width) = (bytes - SIZES[above - 1], SIZES[above] - SIZES[above - 1]);
        if to >= from { from + scaled(to - from, into, width) } else { from - scaled(from - to, into, width) }
    }

    fn check(&self) -> Result<(), CostsError> {
        for nanos in self.each.iter().copied() {
            if nanos == 0 || nanos > NANOS_MAX {
                return Err(CostsError::Value { nanos });
            }
        }
        if self.start > NANOS_MAX {
            return Err(CostsError::Value { nanos: self.start });
        }
        Ok(())
    }
}

/// `value * part / whole`, without overflow.
fn scaled(value: u64, part: u64, whole: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(part) / u128::from(whole)).unwrap_or(u64::MAX)
}

/// What the methods cost in one direction; those that a device lacks are missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Costs {
    /// Always there.
    pub dma: MethodCosts,
    /// See [`Method::Batch`].
    pub batch: Option<MethodCosts>,
    /// See [`Method::Kernel`].
    pub kernel: Option<MethodCosts>,
}

impl Costs {
    /// Costs of a device about which nothing is known but what it can: those of an H100, rounded, whose ratios differ
    /// little from its neighbours'.
    #[must_use]
    pub fn guess(has_batch: bool, has_kernel: bool) -> Self {
        let at = |least: u64, gb_per_second: u64, start: u64| MethodCosts {
            start,
            each: SIZES.map(|size| least.max(1).max(size / gb_per_second)),
        };
        Self {
            dma: at(2500, 52, 0),
            batch: has_batch.then(|| at(1700, 50, 4000)),
            kernel: has_kernel.then(|| at(80, 48, 10_000)),
        }
    }

    /// Costs that send all one way, where a run can go it: for those who want to try one.
    #[must_use]
    pub fn only(method: Method) -> Self {
        let costs = |is_cheap: bool| MethodCosts {
            start: 0,
            each: [if is_cheap { 1 } else { NANOS_MAX }; SIZES.len()],
        };
        Self {
            dma: costs(method == Method::Dma),
            batch: (method == Method::Batch).then(|| costs(true)),
            kernel: (method == Method::Kernel).then(|| costs(true)),
        }
    }

    fn of(&self, method: Method) -> Option<&MethodCosts> {
        match method {
            Method::Dma => Some(&self.dma),
            Method::Batch => self.batch.as_ref(),
            Method::Kernel => self.kernel.as_ref(),
        }
    }

    fn of_run(&self, method: Method, run: &Run) -> u64 {
        match self.of(method) {
            Some(costs) if method == Method::Kernel && run.is_wide() => {
                let nanos = costs.of(run.bytes);
                nanos.saturating_add(nanos / KERNEL_HANDICAP)
            }
            Some(costs) if method != Method::Kernel => costs.of(run.bytes),
            _ => u64::MAX,
        }
    }

    /// Which methods to use for a list, so that it is done soonest: each is worth its start or is not used.
    #[must_use]
    pub fn best_methods(&self, runs: &[Run]) -> Methods {
        let mut totals = Methods::ALL.map(|methods| {
            let starts = Method::ALL.into_iter().filter(|method| methods.has(*method));
            starts
                .map(|method| self.of(method).map_or(u64::MAX, |costs| costs.start))
                .fold(0, u64::saturating_add)
        });
        for alike in runs.chunk_by(Run::costs_as) {
            let Some(run) = alike.first() else { continue };
            let [dma, batch, kernel] = Method::ALL.map(|method| self.of_run(method, run));
            let least = [dma, dma.min(batch), dma.min(kernel), dma.min(batch).min(kernel)];
            for (total, cost) in totals.iter_mut().zip(least) {
                *total = total.saturating_add(cost.saturating_mul(alike.len() as u64));
            }
        }
        let best = (0..totals.len()).min_by_key(|index| totals[*index]).unwrap_or(0);
        Methods::ALL[best]
    }

    /// Gives each run of a list the cheapest of some methods.
    #[must_use]
    pub const fn chooser(&self, methods: Methods) -> Chooser<'_> {
        Chooser { costs: self, methods, known: None }
    }

    fn check(&self) -> Result<(), CostsError> {
        Method::ALL.into_iter().filter_map(|method| self.of(method)).try_for_each(MethodCosts::check)
    }
}

/// See [`Costs::chooser`]. Remembers its last answer, since the runs of a list are mostly alike.
#[derive(Debug)]
pub struct Chooser<'a> {
    costs: &'a Costs,
    methods: Methods,
    known: Option<((u64, bool), Method)>,
}

impl Chooser<'_> {
    /// The cheapest method for this run.
    pub fn method(&mut self, run: &Run) -> Method {
        let key = (run.bytes, run.is_wide());
        if let Some((of, method)) = self.known
            && of == key
        {
            return method;
        }
        let allowed = Method::ALL.into_iter().filter(|method| self.methods.has(*method));
        let method = allowed.min_by_key(|method| self.costs.of_run(*method, run)).unwrap_or(Method::Dma);
        self.known = Some((key, method));
        method
    }
}

/// The costs of both directions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopyCosts {
    version: u32,
    /// From the host to the device.
    pub up: Costs,
    /// From the device to the host.
    pub down: Costs,
}

/// Why a text is not a table of costs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CostsError {
    /// It is not written as one.
    #[error("not a table of copy costs: {reason}")]
    Format {
        /// What the reader stumbled over.
        reason: String,
    },
    /// It is of another version of Shoal.
    #[error("a table of copy costs of version {version}")]
    Version {
        /// What it says.
        version: u32,
    },
    /// It holds a value that cannot have been measured.
    #[error("a copy that takes {nanos} ns")]
    Value {
        /// The value.
        nanos: u64,
    },
}

impl CopyCosts {
    /// Costs of both directions.
    #[must_use]
    pub const fn new(up: Costs, down: Costs) -> Self {
        Self { version: VERSION, up, down }
    }

    /// Reads what [`text`](Self::text) wrote.
    ///
    /// # Errors
    /// [`CostsError`] for anything else.
    pub fn parse(text: &str) -> Result<Self, CostsError> {
        let costs: Self =
            serde_json::from_str(text).map_err(|error| CostsError::Format { reason: error.to_string() })?;
        if costs.version != VERSION {
            return Err(CostsError::Version { version: costs.version });
        }
        costs.up.check()?;
        costs.down.check()?;
        Ok(costs)
    }

    /// Itself as text, one line.
    ///
    /// # Errors
    /// None in practice: numbers can always be written.
    pub fn text(&self) -> Result<String, CostsError> {
        serde_json::to_string(self).map_err(|error| CostsError::Format { reason: error.to_string() })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;

    fn runs(count: u64, bytes: u64) -> Vec<Run> {
        (0..count).map(|i| Run { source: i * bytes * 2, target: i * bytes * 3, bytes, seam: 0 }).collect()
    }

    #[test]
    fn a_kernel_is_for_many_small_copies_and_not_for_one() {
        let costs = Costs::guess(true, true);
        assert!(costs.best_methods(&runs(1, 4096)).is_only(Method::Dma));
        let many = costs.best_methods(&runs(1000, 4096));
        assert!(many.has(Method::Kernel) && !many.has(Method::Batch), "{many:?}");
        assert!(costs.best_methods(&runs(1000, 8 << 20)).is_only(Method::Dma));
        assert!(costs.best_methods(&[]).is_only(Method::Dma));
    }

    #[test]
    fn what_lies_differently_at_its_ends_is_not_for_a_kernel() {
        let costs = Costs::guess(false, true);
        let skewed: Vec<_> =
            runs(1000, 4096).iter().map(|run| Run { source: run.source + 1, ..*run }).collect();
        assert!(costs.best_methods(&skewed).is_only(Method::Dma));
    }

    #[test]
    fn one_way_only_is_that_way_for_every_size() {
        for method in Method::ALL {
            let costs = Costs::only(method);
            for bytes in [1, 4096, 5000, 8 << 20] {
                let runs = runs(1, bytes);
                let methods = costs.best_methods(&runs);
                assert_eq!(costs.chooser(methods).method(&runs[0]), method, "{bytes}");
            }
            let table = CopyCosts::new(costs.clone(), costs);
            assert_eq!(CopyCosts::parse(&table.text().unwrap()).unwrap(), table);
        }
    }

    #[test]
    fn costs_between_the_sizes_are_in_proportion() {
        let mut each = [0; SIZES.len()];
        for (nanos, size) in each.iter_mut().zip(SIZES) {
            *nanos = size / 32;
        }
        let costs = MethodCosts { start: 0, each };
        for bytes in [4096, 5120, 6144, 12_288, 100_000_000] {
            assert_eq!(costs.of(bytes), bytes / 32, "{bytes}");
        }
        assert_eq!((costs.of(0), costs.of(100)), (128, 128));
        let falling = MethodCosts { start: 0, each: core::array::from_fn(|i| 1000 - 50 * i as u64) };
        assert_eq!(falling.of(6144), 975);
    }

    #[test]
    fn a_table_is_read_as_it_was_written_and_wrong_ones_are_refused() {
        let costs = CopyCosts::new(Costs::guess(true, true), Costs::guess(false, false));
        let text = costs.text().unwrap();
        assert_eq!(CopyCosts::parse(&text).unwrap(), costs);
        let other = text.replace("\"version\":1", "\"version\":2");
        assert_eq!(CopyCosts::parse(&other), Err(CostsError::Version { version: 2 }));
        let zero = text.replace("[2500,", "[0,");
        assert_eq!(CopyCosts::parse(&zero), Err(CostsError::Value { nanos: 0 }));
        let shorter = text.replace("[2500,", "[");
        assert!(matches!(CopyCosts::parse(&shorter), Err(CostsError::Format { .. })));
    }
}
