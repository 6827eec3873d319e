//! Byte counts as a type, so that a number of pages is never taken for a number of bytes.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

/// The unit of virtual address space (2 MiB): the smallest size the CUDA driver maps.
pub const PAGE_BYTES: ByteCount = ByteCount(2 << 20);
const _: () = assert!(PAGE_BYTES.0.is_power_of_two());

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteCount(pub u64);

impl ByteCount {
    /// No bytes.
    pub const ZERO: Self = Self(0);

    /// Whole mebibytes.
    #[must_use]
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// Whole gibibytes.
    #[must_use]
    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }

    /// `self - other`, or zero where `other` is larger.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// `self + other`, or `None` past `u64::MAX`.
    #[must_use]
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// Rounded up to a whole number of `unit`s (`unit` must not be zero).
    #[must_use]
    pub const fn round_up_to(self, unit: Self) -> Self {
        Self(self.0.div_ceil(unit.0) * unit.0)
    }

    /// How many pages it takes to hold this many bytes.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.0.div_ceil(PAGE_BYTES.0)
    }

    /// True for zero bytes.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl core::ops::Add for ByteCount {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl core::ops::AddAssign for ByteCount {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl core::ops::Sub for ByteCount {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl core::ops::SubAssign for ByteCount {
    fn sub_assign(&mut self, other: Self) {
        self.0 -= other.0;
    }
}

impl core::iter::Sum for ByteCount {
    fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
        items.fold(Self::ZERO, |sum, item| sum + item)
    }
}

const UNITS: [(&str, u64); 5] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = UNITS.iter().rev().find(|(_, unit)| self.0 >= *unit).unwrap_or(&UNITS[0]);
        if self.0.is_multiple_of(*unit) {
            return f.pad(&format!("{} {name}", self.0 / unit));
        }
        f.pad(&format!("{:.1} {name}", self.0 as f64 / *unit as f64))
    }
}

/// Why a text is not a byte count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a size: write a number and a unit, such as \"512MiB\" or \"48GiB\" (B, KiB, MiB, GiB, TiB; KB, MB, GB, TB count in thousands)"
)]
pub struct ParseByteCountError {
    /// What was given.
    pub text: String,
}

impl FromStr for ByteCount {
    type Err = ParseByteCountError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || ParseByteCountError { text: text.to_owned() };
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = (&trimmed[..digits], trimmed[digits..].trim().to_ascii_lowercase());
        let scale: u64 = match unit.as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(refuse()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(scale).map(Self).ok_or_else(refuse);
        }
        let value = number.parse::<f64>().map_err(|_| refuse())? * scale as f64;
        if !(0.0..1.8e19).contains(&value) {
            return Err(refuse());
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "range checked just above"
        )]
        Ok(Self(value.round() as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses() {
        for (text, bytes) in [("0 B", 0), ("512 MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2 TiB", 2 << 40)] {
            assert_eq!(ByteCount(bytes).to_string(), text);
            assert_eq!(text.parse::<ByteCount>(), Ok(ByteCount(bytes)));
        }
        assert_eq!("93MB".parse::<ByteCount>(), Ok(ByteCount(93_000_000)));
        for wrong in ["", "GiB", "-1GiB", "1 parsec", "1e3", "99999999999TiB", "1.2.3MiB"] {
            assert!(wrong.parse::<ByteCount>().is_err(), "{wrong:?} was taken");
        }
    }
}
