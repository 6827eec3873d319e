//! Block ids as engines hold them: 32 or 64 bits, signed or not.
//!
//! Apart so that the allocator is written once and fills a caller's own buffer, whatever its type.

/// A type that block ids can be kept in.
pub trait BlockId: Copy {
    /// The id as one of this type. Ids are below 2^31, so every type holds them.
    fn of(block: u32) -> Self;

    /// The block, if it can be one.
    fn block(self) -> Option<u32>;

    /// The number as 64 bits, of which a negative one has all the upper ones.
    fn bits(self) -> u64;

    /// The number as it is, for messages.
    fn shown(self) -> i64;
}

macro_rules! block_id {
    ($($kind:ty),*) => {$(
        impl BlockId for $kind {
            #[inline]
            #[expect(clippy::allow_attributes, reason = "not each of these casts is of each kind")]
            #[allow(clippy::cast_possible_wrap, clippy::cast_lossless, trivial_numeric_casts, reason = "below 2^31")]
            fn of(block: u32) -> Self {
                block as $kind
            }

            #[inline]
            #[expect(clippy::allow_attributes, reason = "not each of these conversions can fail")]
            #[allow(clippy::unnecessary_fallible_conversions, reason = "one text for all kinds")]
            fn block(self) -> Option<u32> {
                u32::try_from(self).ok()
            }

            #[inline]
            #[expect(clippy::allow_attributes, reason = "not each of these casts is of each kind")]
            #[allow(clippy::cast_sign_loss, clippy::cast_lossless, trivial_numeric_casts, reason = "as its text says")]
            fn bits(self) -> u64 {
                self as u64
            }

            #[inline]
            #[expect(clippy::allow_attributes, reason = "not each of these conversions can fail")]
            #[allow(clippy::unnecessary_fallible_conversions, clippy::useless_conversion, reason = "one text for all kinds")]
            fn shown(self) -> i64 {
                i64::try_from(self).unwrap_or(i64::MAX)
            }
        }
    )*};
}

block_id!(u32, i32, u64, i64);
