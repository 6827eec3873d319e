//! torch's `alloc`, once for each slot, under a name that `torch.cuda.memory.CUDAPluggableAllocator` can find.

use std::ffi::{c_int, c_void};

use super::alloc_in;

macro_rules! exports {
    ($($name:ident $slot:literal),* $(,)?) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name(size: isize, device: c_int, stream: *mut c_void) -> *mut c_void {
                alloc_in::<$slot>(size, device, stream)
            }
        )*

        const _: () = assert!([$($slot),*].len() == super::SLOTS);
    };
}

exports! {
    shoal_torch_alloc_0 0, shoal_torch_alloc_1 1, shoal_torch_alloc_2 2,
    shoal_torch_alloc_3 3, shoal_torch_alloc_4 4, shoal_torch_alloc_5 5,
    shoal_torch_alloc_6 6, shoal_torch_alloc_7 7, shoal_torch_alloc_8 8,
    shoal_torch_alloc_9 9, shoal_torch_alloc_10 10, shoal_torch_alloc_11 11,
    shoal_torch_alloc_12 12, shoal_torch_alloc_13 13, shoal_torch_alloc_14 14,
    shoal_torch_alloc_15 15, shoal_torch_alloc_16 16, shoal_torch_alloc_17 17,
    shoal_torch_alloc_18 18, shoal_torch_alloc_19 19, shoal_torch_alloc_20 20,
    shoal_torch_alloc_21 21, shoal_torch_alloc_22 22, shoal_torch_alloc_23 23,
    shoal_torch_alloc_24 24, shoal_torch_alloc_25 25, shoal_torch_alloc_26 26,
    shoal_torch_alloc_27 27, shoal_torch_alloc_28 28, shoal_torch_alloc_29 29,
    shoal_torch_alloc_30 30, shoal_torch_alloc_31 31, shoal_torch_alloc_32 32,
    shoal_torch_alloc_33 33, shoal_torch_alloc_34 34, shoal_torch_alloc_35 35,
    shoal_torch_alloc_36 36, shoal_torch_alloc_37 37, shoal_torch_alloc_38 38,
    shoal_torch_alloc_39 39, shoal_torch_alloc_40 40, shoal_torch_alloc_41 41,
    shoal_torch_alloc_42 42, shoal_torch_alloc_43 43, shoal_torch_alloc_44 44,
    shoal_torch_alloc_45 45, shoal_torch_alloc_46 46, shoal_torch_alloc_47 47,
    shoal_torch_alloc_48 48, shoal_torch_alloc_49 49, shoal_torch_alloc_50 50,
    shoal_torch_alloc_51 51, shoal_torch_alloc_52 52, shoal_torch_alloc_53 53,
    shoal_torch_alloc_54 54, shoal_torch_alloc_55 55, shoal_torch_alloc_56 56,
    shoal_torch_alloc_57 57, shoal_torch_alloc_58 58, shoal_torch_alloc_59 59,
    shoal_torch_alloc_60 60, shoal_torch_alloc_61 61, shoal_torch_alloc_62 62,
    shoal_torch_alloc_63 63
}
